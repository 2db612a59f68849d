"""The learner's commands: learn, start, check, hint, diff."""

import ast
import difflib
import hashlib
import json
import time
from pathlib import Path

from tests.exercise import (
    ROOT,
    Exercise,
    ExerciseError,
    chapter_folder,
    chapter_folders,
    definition,
    find,
    load,
    reference_source,
    segment,
    stubs,
)

PROGRESS = "my_progress.json"


def my_file(chapter: str, root: Path = ROOT) -> Path:
    """Where the learner's answers to a chapter stand: ch03_gqa/my_gqa.py."""
    return root / chapter / f"my_{chapter.split('_', 1)[1]}.py"


def my_source(chapter: str, root: Path = ROOT) -> str:
    """The learner's answers. Raises ExerciseError if there are none."""
    path = my_file(chapter, root)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        make = f"python -m tests start {chapter[:4]}"
        raise ExerciseError(f"{path.relative_to(root)}: not there yet; make it: {make}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ExerciseError(f"{path.relative_to(root)}: {error}") from None


# What is remembered between calls: results for a text that has not changed, hints that were read


def progress(root: Path) -> dict:
    try:
        kept = json.loads((root / PROGRESS).read_text(encoding="utf-8"))
        return kept if isinstance(kept, dict) else {}
    except (OSError, ValueError):
        return {}


def remember(root: Path, key: str, value: object) -> None:
    kept = progress(root) | {key: value}
    path = root / PROGRESS
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    partial.replace(path)


def fingerprint(exercise: Exercise, root: Path) -> str:
    """Changes whenever a result might: with the answers, the reference, the task or the cases."""
    paths = [my_file(exercise.chapter, root), root / exercise.chapter / exercise.file]
    paths += [root / exercise.chapter / "exercises.toml"]
    paths += [root / "tests" / "cases" / f"{exercise.chapter[:4]}.py"]
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:16]


# The commands; each returns the exit code


def learn(root: Path = ROOT) -> int:
    """Prints a table of all exercises with what is done, and the next one."""
    rows, following = [], None
    got = most = 0
    for chapter in chapter_folders(root):
        for exercise in load(chapter, root):
            state, points = state_of(exercise, root)
            rows.append((chapter[:4], exercise, state, points))
            got, most = got + points, most + exercise.points
            if following is None and points < exercise.points:
                following = exercise
    width = max(len(exercise.name) for _, exercise, _, _ in rows)
    last = ""
    for chapter, exercise, state, points in rows:
        print(
            f"{chapter if chapter != last else '':4}  {exercise.name:{width}}"
            f"  {points:2}/{exercise.points:<2}  {exercise.minutes:3} min"
            f"  {exercise.difficulty:6}  {state}"
        )
        last = chapter
    print(f"{got} of {most} points")
    if following:
        print(f"next: {following.name}: {following.title}")
        short = following.chapter[:4]
        there = my_file(following.chapter, root).is_file()
        command = f"check {short} {following.name}" if there else f"start {short}"
        print(f"      python -m tests {command}")
    return 0


def state_of(exercise: Exercise, root: Path) -> tuple[str, int]:
    """(right, wrong, not written or not started; the points)."""
    if not my_file(exercise.chapter, root).is_file():
        return "", 0
    key = fingerprint(exercise, root)
    kept = progress(root).get(exercise.name, {})
    if kept.get("key") != key:
        result = run_check(exercise, root)
        kept = progress(root)[exercise.name]
        assert kept["points"] == result.points
    return kept["state"], kept["points"]


def run_check(exercise: Exercise, root: Path) -> "Result":  # noqa: F821
    """Checks the learner's answer, and remembers how it went."""
    from tests.checking import check_here
    from tests.handout import oracle_for

    path = my_file(exercise.chapter, root)
    key = fingerprint(exercise, root)
    result = check_here(oracle_for(exercise, root), my_source(exercise.chapter, root), path.name)
    state = "right" if result.passed else "wrong" if result.written else "not written"
    state = "checked when handed in" if result.later else state
    kept = progress(root).get(exercise.name, {})
    remember(root, exercise.name, kept | {"key": key, "state": state, "points": result.points})
    return result


def start(chapter: str, root: Path = ROOT) -> int:
    """Makes my_<topic>.py from the stubs. An existing one is left alone."""
    chapter = chapter_folder(chapter, root)
    path = my_file(chapter, root)
    source = root / chapter / "exercises.py"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        name = path.relative_to(root).as_posix()
        raise ExerciseError(f"{name}: is there already; move it away to start anew") from None
    exercises = load(chapter, root)
    print(f"{path.relative_to(root).as_posix()}: {len(exercises)} exercises")
    print(f"fill one in, then: python -m tests check {chapter[:4]} {exercises[0].name}")
    return 0


def write_stubs(chapter: str | None, root: Path = ROOT) -> int:
    """Writes exercises.py and the notebook's exercises anew, of one chapter or of all."""
    from tests.cells import exercise_cells, write_into

    for folder in [chapter_folder(chapter, root)] if chapter else chapter_folders(root):
        (root / folder / "exercises.py").write_text(stubs(folder, root), encoding="utf-8")
        notebook = root / folder / f"{folder.split('_', 1)[1]}.ipynb"
        write_into(notebook, exercise_cells(folder, root))
    return 0


def check(chapter: str, name: str | None, watch: bool, root: Path = ROOT) -> int:
    """Checks one exercise, or all of a chapter. 0 if all are right, else 1."""
    chapter = chapter_folder(chapter, root)
    exercises = load(chapter, root)
    if name is not None:
        exercises = tuple(e for e in exercises if name in (e.name, e.target))
        if not exercises:
            known = ", ".join(e.name for e in load(chapter, root))
            raise ExerciseError(f"{name}: not in {chapter}, which has {known}")
    if not watch:
        return check_all(exercises, root)
    my_source(chapter, root)
    path = my_file(chapter, root)
    seen = None
    print(f"watching {path.relative_to(root).as_posix()}; Ctrl-C ends it", flush=True)
    try:
        while True:
            now = path.stat().st_mtime_ns if path.is_file() else None
            if now is not None and now != seen:
                print(f"\n{time.strftime('%H:%M:%S')}", flush=True)
                check_all(exercises, root)
            seen = now
            time.sleep(0.3)
    except KeyboardInterrupt:
        print()
        return 0


def check_all(exercises: tuple[Exercise, ...], root: Path) -> int:
    from tests.checking import report

    my_source(exercises[0].chapter, root)
    results = []
    for exercise in exercises:
        results.append(run_check(exercise, root))
        print("\n".join(report(results[-1])), flush=True)
    if len(results) > 1:
        got, most = (sum(getattr(r, k) for r in results) for k in ("points", "max_points"))
        print(f"{got} of {most} points")
    return 0 if all(result.passed or result.later for result in results) else 1


def hint(name: str, root: Path = ROOT) -> int:
    """Prints the hints read so far and one more: the idea, then pseudocode, then one key line."""
    exercise = find(name, root)
    if not exercise.hints:
        raise ExerciseError(f"{name}: this course gives no hints")
    kept = progress(root).get(exercise.name, {})
    n = min(kept.get("hints", 0) + 1, len(exercise.hints))
    for i, text in enumerate(exercise.hints[:n], 1):
        print(f"hint {i} of {len(exercise.hints)}:")
        print("\n".join(f"    {line}" for line in text.splitlines()))
    if n < len(exercise.hints):
        print(f"one more: python -m tests hint {exercise.name}")
    remember(root, exercise.name, kept | {"hints": n})
    return 0


def diff(name: str, reveal: bool, root: Path = ROOT) -> int:
    """Prints how the answer differs from the reference, once it is right, or if told to reveal."""
    from tests.handout import is_handout

    exercise = find(name, root)
    if is_handout(root):
        raise ExerciseError(f"{name}: this folder holds no solutions")
    source = my_source(exercise.chapter, root)
    if not reveal and not run_check(exercise, root).passed:
        raise ExerciseError(f"{name}: not right yet; to see the reference all the same: --reveal")
    theirs = segment(reference_source(exercise, root), exercise.target)
    try:
        node = definition(ast.parse(source).body, exercise.target)
    except SyntaxError:
        node = None
    mine = segment(source, exercise.target) if node else ""
    if mine == theirs:
        print(f"{name}: equal to the reference, letter by letter")
        return 0
    names = (my_file(exercise.chapter, root).name, exercise.file)
    lines = difflib.unified_diff(mine.splitlines(), theirs.splitlines(), *names, lineterm="")
    print("\n".join(lines))
    return 0
