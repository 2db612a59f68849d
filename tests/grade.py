"""Grading for instructors: one submission, or a folder of them.

Each exercise of each submission runs in a child process of its own, in a temporary folder that
holds the worker, the inputs and the submission: no reference and no expected number. What it
returns comes back over a pipe and is compared here. tests/sandbox.py says what holds the child in.
"""

import argparse
import ast
import csv
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path

from tests import sandbox, worker
from tests.checking import Oracle, Result, before_running, judge, report
from tests.exercise import (
    ROOT,
    Exercise,
    ExerciseError,
    chapter_folder,
    definition,
    is_blank,
    load,
    reference_source,
    segment,
)

MAX_SUBMISSION = 2_000_000  # bytes
PARTS = ("visible", "hidden")  # each with inputs of its own


@dataclass(frozen=True)
class Course:
    """What is graded, and how."""

    exercises: tuple[Exercise, ...]
    seed: int = 0
    variant: bool = False
    overlay: Path | None = None
    timeout: float = 60.0  # seconds an exercise
    isolation: str | None = None  # the best that works here

    @cached_property
    def oracles(self) -> dict[tuple[str, str], Oracle]:
        """(exercise, part) -> its inputs and expected answers."""
        return {
            (e.name, part): Oracle(
                e,
                f"{self.seed}/{part}",
                self.variant,
                overlay=self.overlay if part == "hidden" else None,
            )
            for e in self.exercises
            for part in PARTS
        }

    @cached_property
    def key(self) -> str:
        """Changes whenever the same submission might get another result."""
        digest = hashlib.sha256(f"{self.seed} {self.variant} {self.timeout}".encode())
        for exercise in self.exercises:
            digest.update(repr(exercise).encode())
            digest.update(self.oracles[exercise.name, "hidden"].driver.encode())
            digest.update(reference_source(exercise, ROOT, self.variant).encode())
        return digest.hexdigest()[:16]


# Reading what was handed in


def read_submission(path: Path) -> tuple[str, bool]:
    """The Python text of a .py or .ipynb file, and whether it is a notebook's.

    Raises ExerciseError, in one line that a student can act on, for a file that is neither.
    """
    try:
        if path.is_symlink() or not path.is_file():
            raise ExerciseError(f"{path.name}: is not a file")
        if path.stat().st_size > MAX_SUBMISSION:
            raise ExerciseError(f"{path.name}: is larger than {MAX_SUBMISSION:,} bytes")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ExerciseError(f"{path.name}: is not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise ExerciseError(f"{path.name}: {error.strerror}") from None
    return (notebook_text(text, path.name), True) if path.suffix == ".ipynb" else (text, False)


def notebook_text(text: str, name: str) -> str:
    """The code cells of a notebook, one below the other. Magics and checks become comments."""
    try:
        cells = json.loads(text)["cells"]
        sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ExerciseError(f"{name}: is not a notebook") from None
    kept = []
    for source in sources:
        if source.lstrip().startswith("%%"):
            continue
        lines = [
            f"# {line}"
            if re.match(r"\s*([%!?]|from tests\b|import tests\b|check\()", line)
            else line
            for line in source.splitlines()
        ]
        cell = "\n".join(lines)
        try:
            ast.parse(cell)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            # A cell that is not Python is left out, as a notebook would go on without it; but one
            # that holds an answer stays, so that its author is told.
            if not re.search(r"^\s*(def|class) ", cell, re.MULTILINE):
                continue
        kept.append(cell)
    return "\n\n".join(kept) + "\n"


def the_file_in(folder: Path, topic: str) -> Path:
    """A student's file in a folder: my_<topic>.py, or the only .py or .ipynb file."""
    files = sorted(
        p for p in folder.rglob("*") if p.suffix in (".py", ".ipynb") and not p.is_symlink()
    )
    files = [p for p in files if not any(part.startswith((".", "__")) for part in p.parts)]
    named = [p for p in files if p.stem == f"my_{topic}"] or files
    if not named:
        raise ExerciseError(f"{folder.name}: no .py and no .ipynb file was handed in")
    if len(named) > 1:
        names = ", ".join(p.name for p in named[:5])
        raise ExerciseError(f"{folder.name}: expected one file, my_{topic}.py, found {names}")
    return named[0]


def submissions_in(folder: Path, topic: str) -> dict[str, Path]:
    """Student -> file or folder. A file is named after its student, or lies in their folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__")) or path.is_symlink():
            continue
        if path.is_dir():
            found[path.name] = path
        elif path.suffix in (".py", ".ipynb"):
            found[path.stem] = path
    if not found:
        raise ExerciseError(f"{folder}: holds no .py file, no .ipynb file and no folder")
    return found


# Grading one


def grade_text(text: str, name: str, course: Course, lenient: bool = False) -> dict:
    """All results of a submission, as they are written to a file."""
    start = time.perf_counter()
    jobs = [job_of(e, text, name, course, lenient) for e in course.exercises]
    # Only the children run side by side: judging puts modules in and out of this process.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(lambda job: job and run_in_child(job, course), jobs))
    graded = [
        judged(exercise, text, name, course, outcome)
        for exercise, outcome in zip(course.exercises, outcomes, strict=True)
    ]
    return {
        "submission": name,
        "sha256": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest(),
        "graded_with": course.key,
        "points": sum(e["points"] for e in graded),
        "max_points": sum(e["max_points"] for e in graded),
        "isolation": next((e["isolation"] for e in graded if e["isolation"]), ""),
        "seconds": round(time.perf_counter() - start, 2),
        "exercises": graded,
    }


def job_of(
    exercise: Exercise, text: str, name: str, course: Course, lenient: bool
) -> worker.Job | None:
    """What a child is to run: both parts' inputs. None where the text alone decides."""
    if before_running(exercise, text, name) is not None:
        return None
    oracles = [course.oracles[exercise.name, part] for part in PARTS]
    job = oracles[-1].job(text, name)  # the last has the overlay's checks as well
    calls = [call for oracle in oracles for call in oracle.calls]
    return replace(job, calls=calls, lenient=lenient)


def run_in_child(job: worker.Job, course: Course) -> sandbox.Outcome:
    """Runs a job in a folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="grade-"))
    try:
        shutil.copyfile(worker.__file__, folder / "worker.py")
        worker.write_job(job, folder)
        limits = sandbox.Limits(wall_s=course.timeout, cpu_s=int(course.timeout) + 1)
        return sandbox.run(folder, "worker.py", limits, course.isolation)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def judged(
    exercise: Exercise, text: str, name: str, course: Course, outcome: sandbox.Outcome | None
) -> dict:
    """The record of one exercise, from what the child sent."""
    answers = worker.frames(outcome.sent) if outcome else []
    ended = how_it_ended(outcome) if outcome else ""
    first, calls, at = answers[:1], answers[1:], 0
    results = []
    for part in PARTS:
        oracle = course.oracles[exercise.name, part]
        results.append(judge(oracle, first + calls[at : at + len(oracle.calls)], text, name, ended))
        at += len(oracle.calls)
    return as_record(exercise, results, outcome)


def how_it_ended(outcome: sandbox.Outcome) -> str:
    """Why answers are missing, in words; used only where some are."""
    words = {
        "time": f"still running after {outcome.seconds:.0f} seconds, and was stopped",
        "cpu": "used more processor time than is allowed, and was stopped",
        "memory": "used more memory than is allowed, and was stopped",
        "sent too much": "returned more data than is allowed",
    }
    if outcome.ended in words:
        return words[outcome.ended]
    if outcome.ended == "exit":
        return f"the answer ended the process (exit status {outcome.code}) before it was done"
    return f"the process was ended before it was done ({outcome.ended})"


def as_record(exercise: Exercise, results: list[Result], outcome: sandbox.Outcome | None) -> dict:
    """Both parts' results. They share a check's points; the larger half is the visible one's."""
    checks = []
    for part, result in zip(PARTS, results, strict=True):
        for check in result.checks:
            own = exercise.checks.get(check.name)
            half = (own - own // 2, own // 2)[part == "hidden"] if own else check.points
            earned = half if check.passed and check.counted else 0
            checks.append(
                {"name": check.name, "part": part, "points": earned, "max_points": half,
                 "passed": check.passed, "counted": check.counted, "lines": check.lines}
            )  # fmt: skip
    visible, hidden = results
    says = {m.name: m.says for m in exercise.mutants}
    return {
        "name": exercise.name,
        "title": exercise.title,
        "points": sum(c["points"] for c in checks),
        "max_points": sum(c["max_points"] for c in checks),
        "written": visible.written,
        "mutant": visible.mutant,
        "says": says.get(visible.mutant),
        "lines": visible.lines,
        "report": report(visible, points=False),
        "hidden_report": report(hidden, points=False),
        "checks": checks,
        "ended": outcome.ended if outcome else "not run",
        "seconds": round(outcome.seconds, 2) if outcome else 0.0,
        "printed": outcome.text if outcome else "",
        "isolation": outcome.isolation if outcome else "",
    }


def failed_record(name: str, course: Course, why: str) -> dict:
    """The result of a submission that could not be read: no points, and the reason."""
    most = sum(
        sum(o.checks.values()) for (_, part), o in course.oracles.items() if part == "hidden"
    )
    return {
        "submission": name, "sha256": "", "graded_with": course.key, "points": 0,
        "max_points": most, "isolation": "", "seconds": 0.0, "exercises": [], "error": why,
    }  # fmt: skip


def grade_path(path: Path, name: str, course: Course) -> dict:
    """Grades a file, or a folder with one. Whatever the submission is, there is a result."""
    topic = course.exercises[0].chapter.split("_", 1)[1]
    try:
        file = the_file_in(path, topic) if path.is_dir() else path
        text, lenient = read_submission(file)
        return grade_text(text, file.name, course, lenient) | {"submission": name}
    except ExerciseError as error:
        return failed_record(name, course, str(error))


# Gradescope


def gradescope(record: dict) -> dict:
    """Gradescope's results.json: for every exercise one visible test, and one that is not."""
    tests = []
    for number, e in enumerate(record["exercises"], 1):
        for part, title in zip(PARTS, ("", ", with other inputs"), strict=True):
            checks = [c for c in e["checks"] if c["part"] == part]
            lines = e["report"] if part == "visible" else e["hidden_report"]
            tests.append(
                {
                    "number": f"{number}.{PARTS.index(part) + 1}",
                    "name": f"{e['name']}: {e['title']}{title}",
                    "score": sum(c["points"] for c in checks),
                    "max_score": sum(c["max_points"] for c in checks),
                    "output": "\n".join(lines),
                    "visibility": "visible" if part == "visible" else "hidden",
                }
            )
    out = {
        "output": record.get("error", ""),
        "stdout_visibility": "hidden",
        "execution_time": round(record["seconds"]),
        "tests": tests,
        "extra_data": {"isolation": record["isolation"], "max_points": record["max_points"]},
    }
    if not tests:
        out["score"] = 0
    return out


# Many


def key_of(path: Path) -> str:
    """A digest of a submission's bytes, file or folder."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if not file.is_symlink():
            digest.update(str(file.relative_to(path)).encode() + file.read_bytes())
    return digest.hexdigest()


def grade_all(found: dict[str, Path], course: Course, out: Path | None) -> list[dict]:
    """Grades every student. What `out` holds already, of the same text and course, is kept."""
    records = []
    if out:
        out.mkdir(parents=True, exist_ok=True)
    for number, (student, path) in enumerate(found.items(), 1):
        kept = out / f"{student}.json" if out else None
        files = key_of(path)
        record = read_record(kept, files, course) if kept else None
        how = "kept"
        if record is None:
            record = grade_path(path, student, course) | {"files": files}
            how = f"{record['seconds']:.0f} s"
            if kept:
                write_json(kept, record)
        records.append(record)
        note = f"  {record['error']}" if "error" in record else ""
        points = f"{record['points']:3}/{record['max_points']}"
        print(f"{number:4}/{len(found)}  {points}  {student}  ({how}){note}", flush=True)
    return records


def read_record(path: Path, files: str, course: Course) -> dict | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        same = record["files"] == files and record["graded_with"] == course.key
        return record if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_json(path: Path, value: object) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def write_csv(path: Path, rows: list[dict], columns: list[str]) -> None:
    partial = path.with_name(path.name + ".part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({k: plain(v) for k, v in row.items()} for row in rows)
    partial.replace(path)


def plain(value: object) -> object:
    """A spreadsheet takes a text that begins so for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def csv_rows(records: list[dict]) -> list[dict]:
    return [
        {"student": r["submission"], "points": r["points"], "max_points": r["max_points"]}
        | {e["name"]: e["points"] for e in r["exercises"]}
        | {"note": r.get("error", "")}
        for r in records
    ]


# Answers that look alike


def fingerprint(node: ast.AST) -> set[tuple[str, ...]]:
    """Runs of five tokens of a definition, with its own names, strings and layout taken out."""
    names: dict[str, str] = {}
    tokens: list[str] = []
    for child in ast.walk(node):
        kind = type(child).__name__
        if isinstance(child, ast.Name):
            kind = names.setdefault(child.id, f"n{len(names)}")
        elif isinstance(child, ast.Attribute):
            kind = f".{child.attr}"
        elif isinstance(child, ast.Constant) and not isinstance(child.value, str):
            kind = repr(child.value)
        elif isinstance(child, (ast.Load, ast.Store, ast.arg, ast.arguments)):
            continue
        tokens.append(kind)
    return {tuple(tokens[i : i + 5]) for i in range(max(1, len(tokens) - 4))}


def alike(texts: dict[str, str], exercises: tuple[Exercise, ...]) -> list[dict]:
    """Pairs of students, most alike first.

    `similarity` is the share of runs of five tokens that two answers have in common, rare runs
    counting more (by the logarithm of how few answers have them, the reference being one of them),
    as a mean over the exercises that both have written. `same_text` counts exercises that are equal
    letter by letter. Short answers to the same task are alike by nature: look, do not judge by the
    number.
    """
    import math

    pairs: dict[tuple[str, str], list[float]] = {}
    same: dict[tuple[str, str], int] = {}
    for exercise in exercises:
        prints: dict[str, set] = {}
        written: dict[str, str] = {}
        for student, text in texts.items():
            try:
                node = definition(ast.parse(text).body, exercise.target)
                if node is not None and not is_blank(node):
                    prints[student] = fingerprint(node)
                    written[student] = segment(text, exercise.target)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
        reference = fingerprint(
            definition(ast.parse(reference_source(exercise)).body, exercise.target)
        )
        counts: dict[tuple, int] = {}
        for grams in [*prints.values(), reference]:
            for gram in grams:
                counts[gram] = counts.get(gram, 0) + 1
        n = len(prints) + 1
        weight = {gram: math.log((n + 1) / count) for gram, count in counts.items()}
        for a, b in combinations(prints, 2):
            common = sum(weight[g] for g in prints[a] & prints[b])
            either = sum(weight[g] for g in prints[a] | prints[b])
            pairs.setdefault((a, b), []).append(common / either if either else 0.0)
            same[a, b] = same.get((a, b), 0) + (written[a] == written[b])
    rows = [
        {"student": a, "other": b, "similarity": round(sum(found) / len(found), 3),
         "same_text": same[a, b], "exercises": len(found)}
        for (a, b), found in pairs.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (-row["similarity"], row["student"], row["other"]))


# The command


def course_from(args: argparse.Namespace) -> Course:
    exercises = load(chapter_folder(args.chapter))
    if args.only:
        exercises = tuple(e for e in exercises if e.name == args.only)
        if not exercises:
            raise ExerciseError(f"--only {args.only}: not an exercise of {args.chapter}")
    if args.timeout <= 0:
        raise ExerciseError(f"--timeout is {args.timeout:g}, expected seconds above 0")
    overlay = checked_overlay(args.overlay, exercises) if args.overlay else None
    return Course(exercises, args.seed, args.variant, overlay, args.timeout)


def checked_overlay(overlay: Path, exercises: tuple[Exercise, ...]) -> Path:
    """The folder, if its checks belong to exercises. Raises ExerciseError if not."""
    import tomllib

    path = overlay / "overlay.toml"
    try:
        listed = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ExerciseError(f"{path}: {error}") from None
    known = {e.name for e in load(exercises[0].chapter)}
    for name, checks in listed.items():
        if name not in known:
            raise ExerciseError(f"{path}: {name}: not an exercise of {exercises[0].chapter}")
        for check, points in checks.items():
            if type(points) is not int or points < 1:
                raise ExerciseError(f"{path}: {name}.{check} is {points}, expected points from 1")
    return overlay.resolve()


def grade(args: argparse.Namespace) -> int:
    """Grades a file or a folder, and writes what was asked for. 0: graded, whatever the points."""
    course = course_from(args)
    topic = course.exercises[0].chapter.split("_", 1)[1]
    if args.gradescope:  # whatever happens, there is a file from here on
        write_json(args.gradescope, {"score": 0, "output": "The grader did not finish."})
    try:
        if args.file.is_dir() and not args.gradescope:
            found = submissions_in(args.file, topic)
            records = grade_all(found, course, args.out)
        else:
            if not args.file.exists() and not args.gradescope:
                raise ExerciseError(f"{args.file}: no such file")
            records = [grade_path(args.file, args.file.stem, course)]
            found = {records[0]["submission"]: args.file}
    except ExerciseError:
        raise
    except Exception as error:
        if args.gradescope:
            text = f"The grader failed; tell your instructor: {type(error).__name__}: {error}"
            write_json(args.gradescope, {"score": 0, "output": text})
        raise
    if args.gradescope:
        write_json(args.gradescope, gradescope(records[0]))
    if args.json:
        write_json(args.json, records if args.file.is_dir() and not args.gradescope else records[0])
    names = [e.name for e in course.exercises]
    if args.csv:
        columns = ["student", "points", "max_points", *names, "note"]
        write_csv(args.csv, csv_rows(records), columns)
    if args.similarity:
        columns = ["student", "other", "similarity", "same_text", "exercises"]
        write_csv(args.similarity, alike(texts_of(found, topic), course.exercises), columns)
    if len(records) == 1:
        print_one(records[0])
    return 0


def texts_of(found: dict[str, Path], topic: str) -> dict[str, str]:
    texts = {}
    for student, path in found.items():
        try:
            file = the_file_in(path, topic) if path.is_dir() else path
            texts[student] = read_submission(file)[0]
        except ExerciseError:
            continue
    return texts


def print_one(record: dict) -> None:
    if "error" in record:
        print(record["error"])
    for exercise in record["exercises"]:
        head, *rest = exercise["report"]
        print("\n".join([f"{exercise['points']:3} of {exercise['max_points']:2}  {head}", *rest]))
        other = [c for c in exercise["checks"] if c["part"] == "hidden" and not c["passed"]]
        seen = [c for c in exercise["checks"] if c["part"] == "visible" and not c["passed"]]
        if other and not seen:
            print("\n".join(["    with other inputs:", *exercise["hidden_report"][1:]]))
    print(f"{record['points']} of {record['max_points']} points")
