"""What an instructor gets of a chapter: a hand-out, a Gradescope zip, an nbgrader notebook.

    python -m tests release ch03 --out dist

Before anything is written, the references are graded and must get every point, and the stubs none.
Afterwards every file that students get is searched for lines of the solutions.
"""

import argparse
import ast
import dataclasses
import json
import re
import shutil
import zipfile
from pathlib import Path

from tests.cells import cell, exercise_cells, sorted_imports, stub_of, text_of
from tests.checking import Oracle, chapter_sources
from tests.exercise import (
    ROOT,
    Exercise,
    ExerciseError,
    blanked,
    chapter_folder,
    definition,
    load,
    reference_source,
    replaced,
    segment,
    stub_imports,
    stubs,
    without_twins,
)
from tests.grade import Course, checked_overlay, grade_text
from tests.handout import RECORDING, as_text, recorded, uses_others

# What a hand-out needs of this package. None of it knows a solution.
STUDENT_FILES = (
    "__init__", "__main__", "cases/__init__", "checking", "exercise", "handout", "learn",
    "notebook", "shapes", "worker",
)  # fmt: skip
GRADER_FILES = (*STUDENT_FILES, "cells", "grade", "jail", "sandbox")
NEEDED = ("torch", "numpy", "safetensors")


def release(args: argparse.Namespace) -> int:
    """Writes the folder, whole or not at all. Returns 0."""
    chapter = chapter_folder(args.chapter)
    exercises = load(chapter)
    overlay = checked_overlay(args.overlay, exercises) if args.overlay else None
    course = Course(exercises, args.seed, args.variant, overlay)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ExerciseError(f"--out {args.out}: is there already and not empty")
    partial = args.out.with_name(args.out.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        most = prove(course)
        write_handout(partial / "handout", course)
        write_gradescope(partial / "gradescope.zip", course)
        write_nbgrader(partial / "nbgrader" / "source" / chapter, course, partial / "handout")
        write_text(partial / "README.md", instructor_text(course, most))
        n_lines = check_for_leaks(course, [partial / "handout", partial / "nbgrader"])
        if args.out.exists():
            args.out.rmdir()
        partial.replace(args.out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"{args.out}: {len(exercises)} exercises, {most} points")
    print(f"    the references get {most} of {most} points, the stubs 0")
    print(f"    none of {n_lines} lines of the solutions is in what students get")
    for path in ("handout/", "gradescope.zip", f"nbgrader/source/{chapter}/", "README.md"):
        print(f"    {path}")
    return 0


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


# The proof


def class_or_function(exercise: Exercise, variant: bool) -> str:
    """The reference's text, in a class with all of the class's variants."""
    source = reference_source(exercise, ROOT, variant)
    top = exercise.target.split(".")[0]
    for other in load(exercise.chapter):
        same = (other.file, other.target.split(".")[0]) == (exercise.file, top)
        if variant and other.variant and same and other.name != exercise.name:
            source = replaced(source, other.target, other.variant.replace)
    return segment(source, top)


def solved(course: Course) -> str:
    """A submission that holds every reference."""
    chapter = course.exercises[0].chapter
    pieces = dict.fromkeys(class_or_function(e, course.variant) for e in course.exercises)
    return stub_imports(chapter, ROOT, course.variant) + "\n\n\n" + "\n\n".join(pieces)


def prove(course: Course) -> int:
    """The points of the whole chapter. Raises ExerciseError unless grading does what it must."""
    for name, text, right in (
        ("the references", solved(course), True),
        ("the stubs", stubs(course.exercises[0].chapter, ROOT, course.variant), False),
    ):
        record = grade_text(text, "proof.py", course)
        wanted = record["max_points"] if right else 0
        for e in record["exercises"]:
            if e["points"] != (e["max_points"] if right else 0):
                lines = "; ".join(e["report"] + e["hidden_report"])
                raise ExerciseError(f"{e['name']}: {name} get {e['points']} points: {lines}")
        if record["points"] != wanted:
            raise ExerciseError(f"{name} get {record['points']} points, expected {wanted}")
        most = record["max_points"]
    return most


# For students


def student_modules(course: Course) -> dict[str, str]:
    """Path -> text of the chapter's files that the exercises need, all of their bodies gone."""
    sources: dict[str, str] = {}
    for exercise in course.exercises:
        sources |= chapter_sources(exercise, ROOT)
    for exercise in course.exercises:
        if course.variant and exercise.variant:
            module = exercise.module
            sources[module] = replaced(sources[module], exercise.target, exercise.variant.replace)
    for exercise in course.exercises:
        sources = without_twins(sources, exercise, reference_source(exercise, ROOT))
    for module in {e.module for e in course.exercises}:
        targets = [e.target for e in course.exercises if e.module == module]
        sources[module] = blanked(sources[module], targets)
    files = {f"{module.replace('.', '/')}.py": text for module, text in sources.items()}
    for folder in {name.split("/")[0] for name in files}:
        init = ROOT / folder / "__init__.py"
        files.setdefault(f"{folder}/__init__.py", init.read_text(encoding="utf-8"))
    return files


def student_exercises(course: Course) -> list[Exercise]:
    """The exercises without what gives them away."""
    found = []
    for e in course.exercises:
        task, hints = e.task, e.hints
        if course.variant and e.variant:  # the hints speak of the plain task
            task, hints = f"{task}\n\n**In this course:** {e.variant.says}", ()
        mutants = tuple(dataclasses.replace(m, replace=()) for m in e.mutants)
        plain = dataclasses.replace(e, task=task, hints=hints, mutants=mutants, variant=None)
        found.append(plain)
    return found


def as_json(exercises: list[Exercise]) -> str:
    listed = []
    for e in exercises:
        entry = dataclasses.asdict(e)
        entry["mutant"] = entry.pop("mutants")
        del entry["variant"], entry["chapter"]
        listed.append(entry)
    return json.dumps({"exercise": listed}, indent=1, ensure_ascii=False) + "\n"


def write_handout(folder: Path, course: Course) -> None:
    chapter = course.exercises[0].chapter
    short = chapter[:4]
    for name, text in student_modules(course).items():
        write_text(folder / name, text)
    made = f"\nMade from the chapter's files by `python -m tests start {short} --stubs`.\n"
    stub_text = stubs(chapter, ROOT, course.variant).replace(made, "")
    write_text(folder / chapter / "exercises.py", stub_text)
    write_text(folder / chapter / "exercises.json", as_json(student_exercises(course)))
    for name in (*STUDENT_FILES, f"cases/{short}"):
        text = (ROOT / "tests" / f"{name}.py").read_text(encoding="utf-8")
        write_text(folder / "tests" / f"{name}.py", text)
    for exercise in course.exercises:
        oracle = Oracle(exercise, f"{course.seed}/hand-out", course.variant)
        path = folder / RECORDING / f"{exercise.name}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(recorded(oracle))
    cells = exercise_cells(chapter, ROOT, course.variant)
    title = cell("title", "markdown", f"# {chapter}: exercises\n\n{HOW_NOTEBOOK}")
    write_text(folder / "exercises.ipynb", notebook([title, *cells]))
    write_text(folder / "README.md", student_text(course))
    write_text(folder / "requirements.txt", requirements((*NEEDED, "jupyter")))
    write_text(folder / ".github" / "workflows" / "check.yml", WORKFLOW.format(chapter=short))


def requirements(names: tuple[str, ...]) -> str:
    """Those lines of the project's pins."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return "".join(f"{line}\n" for line in lines if line.split("==")[0] in names)


def notebook(cells: list[dict]) -> str:
    """The text of a notebook, not run."""
    made = []
    for part in cells:
        whole = {"metadata": {}, **part, "source": part["source"].splitlines(keepends=True)}
        if part["cell_type"] == "code":
            whole |= {"execution_count": None, "outputs": []}
        made.append(whole)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book = {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


HOW_NOTEBOOK = """Fill each gap and run its cell: the line under it says whether the answer is \
right, or what is wrong with it. Run the first cell before all others."""


def student_text(course: Course) -> str:
    chapter = course.exercises[0].chapter
    short, topic = chapter[:4], chapter.split("_", 1)[1]
    most = sum(e.points for e in course.exercises)
    minutes = sum(e.minutes for e in course.exercises)
    rows = "\n".join(
        f"| {n} | `{e.name}` | {e.title} | {e.points} | {e.minutes} | {e.difficulty} |"
        for n, e in enumerate(course.exercises, 1)
    )
    users = [
        f"`{e.name}`"
        for e in course.exercises
        if uses_others(Oracle(e, course.seed, course.variant))
    ]
    needs = f", and {', '.join(users)} will need some of those" if users else ""
    tasks = "\n\n".join(
        text_of(e, n, course.variant).split("\n\n<details>")[0]
        for n, e in enumerate(course.exercises, 1)
    )
    return f"""# {chapter}: exercises

{len(course.exercises)} exercises, {most} points, about {minutes} minutes.

| | name | | points | minutes | |
|---|---|---|---|---|---|
{rows}

## How to work

    pip install -r requirements.txt
    python -m tests start {short}

The second line makes `{chapter}/my_{topic}.py`. It holds a gap for each exercise. Fill one, then:

    python -m tests check {short} NAME       one exercise, or all without NAME
    python -m tests check {short} --watch    again at each change of the file
    python -m tests hint NAME                a hint, and at each call one more
    python -m tests learn                    a table of what is done

If you like notebooks better, open `exercises.ipynb` instead and fill the gaps there. Hand in \
`my_{topic}.py`, or the notebook.

An exercise counts only if the first of its checks passes. Your answers are graded with other \
inputs than those which you see here, so numbers that are copied are wrong there. You may define \
helpers of your own beside the gaps. In a class, only the method with the gap is yours; the rest \
of the class is taken as it was given. Files of this folder other than `my_{topic}.py` are not \
looked at. Here an exercise runs among your other answers{needs}. Tasks that speak of the \
chapter's notebook and its stops mean the book's.

## The exercises

{tasks}
"""


WORKFLOW = """# Checks the answers at each push, with the inputs that students have.
name: exercises
on: [push, pull_request]
permissions:
  contents: read
jobs:
  check:
    runs-on: ubuntu-latest
    timeout-minutes: 15
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.12"
      - run: pip install torch --index-url https://download.pytorch.org/whl/cpu
      - run: pip install numpy safetensors
      - run: python -m tests check {chapter}
"""


# For Gradescope


SETUP = """#!/usr/bin/env bash
# Run once, when Gradescope builds the machine.
set -euo pipefail
apt-get update
apt-get install -y python3 python3-venv
python3 -m venv /autograder/venv
/autograder/venv/bin/pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
/autograder/venv/bin/pip install --no-cache-dir numpy safetensors
"""

# AUTOGRADER and PYTHON are for a trial on another machine.
RUN_AUTOGRADER = """#!/usr/bin/env bash
# Run for every submission. The grader writes the result; the answers run in other processes.
root=${{AUTOGRADER:-/autograder}}
python=${{PYTHON:-$root/venv/bin/python}}
chmod 700 "$root/source" # an answer runs as a user without rights, where the system has no better
mkdir -p "$root/results"
rm -f "$root/results/results.json"
cd "$root/source" || exit 1
"$python" -m tests grade "$root/submission" --chapter {chapter} \\
    --gradescope "$root/results/results.json" {flags}
if [ ! -s "$root/results/results.json" ]; then
    echo '{{"score": 0, "output": "The grader could not start; tell your instructor."}}' \\
        > "$root/results/results.json"
fi
"""


def grader_files(course: Course) -> dict[str, bytes]:
    """Path -> bytes of all that grading needs, references included."""
    chapter = course.exercises[0].chapter
    names = {f"tests/{name}.py" for name in (*GRADER_FILES, f"cases/{chapter[:4]}")}
    names |= {f"{chapter}/__init__.py", f"{chapter}/exercises.toml"}
    for exercise in course.exercises:
        for module in chapter_sources(exercise, ROOT):
            names |= {f"{module.replace('.', '/')}.py", f"{module.split('.')[0]}/__init__.py"}
    files = {name: (ROOT / name).read_bytes() for name in sorted(names)}
    if course.overlay:
        for path in sorted(course.overlay.iterdir()):
            if path.is_file():
                files[f"overlay/{path.name}"] = path.read_bytes()
    return files


def write_gradescope(path: Path, course: Course) -> None:
    chapter = course.exercises[0].chapter[:4]
    flags = f"--seed {course.seed}"
    flags += " --variant" * course.variant + " --overlay overlay" * bool(course.overlay)
    run = RUN_AUTOGRADER.format(chapter=chapter, flags=flags)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in grader_files(course).items():
            out.writestr(name, data)
        for name, text in (("setup.sh", SETUP), ("run_autograder", run)):
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o755 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            out.writestr(entry, text)


# For nbgrader


def graded(part: dict, points: int | None, solution: bool, locked: bool) -> dict:
    """A cell with nbgrader's metadata: points make it a test, `solution` an answer."""
    data = {
        "grade": points is not None,
        "grade_id": part["id"],
        "locked": locked,
        "schema_version": 3,
        "solution": solution,
        "task": False,
    }
    if points is not None:
        data["points"] = points
    return part | {"metadata": {"nbgrader": data}}


def solution_cell(exercise: Exercise, variant: bool) -> str:
    """The stub's text with the reference's bodies between nbgrader's marks."""
    text = stub_of(exercise, ROOT, variant)
    source = reference_source(exercise, ROOT, variant)
    for body in bodies(source, exercise.target):
        indent = re.match(r" *", body)[0]
        marked = f"{indent}### BEGIN SOLUTION\n{body}\n{indent}### END SOLUTION"
        stub = re.search(r"^ *raise NotImplementedError\(.*  # your code here$", text, re.MULTILINE)
        text = text[: stub.start()] + marked + text[stub.end() :]
    return text


def bodies(source: str, target: str) -> list[str]:
    """The text of each of the target's function bodies, without the docstring."""
    node = definition(ast.parse(source).body, target)
    functions = (
        [node]
        if isinstance(node, ast.FunctionDef)
        else [child for child in node.body if isinstance(child, ast.FunctionDef)]
    )
    lines = source.splitlines()
    found = []
    for function in functions:
        first = function.body[0]
        start = first.end_lineno if ast.get_docstring(function) else first.lineno - 1
        found.append("\n".join(lines[start : function.end_lineno]))
    return found


def write_nbgrader(folder: Path, course: Course, handout: Path) -> None:
    """The source notebook, beside the files of the hand-out that it imports."""
    chapter = course.exercises[0].chapter
    imports = stub_imports(chapter, ROOT, course.variant) + "\nfrom tests import check"
    cells = [
        graded(cell("title", "markdown", f"# {chapter}\n\n{HOW_NOTEBOOK}"), None, False, True),
        graded(cell("ex-imports", "code", sorted_imports(imports)), None, False, True),
    ]
    for number, e in enumerate(course.exercises, 1):
        text = text_of(e, number, course.variant)
        cells.append(graded(cell(f"{e.name}--text", "markdown", text), None, False, True))
        answer = cell(e.name, "code", solution_cell(e, course.variant))
        cells.append(graded(answer, None, True, False))
        oracle = Oracle(e, f"{course.seed}/hidden", course.variant, overlay=course.overlay)
        hidden = f'hidden_{e.name} = "{as_text(recorded(oracle, with_modules=True))}"'
        for i, (check, points) in enumerate(oracle.checks.items()):
            call = f'"{e.name}", only="{check}", must_pass=True'
            lines = [HIDE.format(hidden)] if i == 0 else []
            lines += [f"check({call})"] if check in e.checks else []
            lines += [HIDE.format(f"check({call}, hidden=hidden_{e.name})")]
            part = cell(f"{e.name}--{check}", "code", "\n".join(lines))
            cells.append(graded(part, points, False, True))
    write_text(folder / f"{chapter}.ipynb", notebook(cells))
    for name in (chapter, "tests"):
        shutil.copytree(handout / name, folder / name)
    for other in handout.glob("ch0*"):
        shutil.copytree(other, folder / other.name, dirs_exist_ok=True)


HIDE = "### BEGIN HIDDEN TESTS\n{}\n### END HIDDEN TESTS"


# Leaks


def solution_lines(course: Course) -> dict[str, set[str]]:
    """Exercise -> lines of its reference that nothing else explains.

    Left out are lines that stand in what students may see (the files with their gaps, the tasks,
    the hints), and those too short to tell anything.
    """
    shown = "\n".join(student_modules(course).values())
    shown += "\n".join("\n".join((e.task, *e.hints)) for e in course.exercises)
    known = {bare(line) for line in shown.splitlines()}
    found = {}
    for e in course.exercises:
        lines = "\n".join(bodies(reference_source(e, ROOT, course.variant), e.target)).splitlines()
        kept = {bare(line) for line in lines} - known
        found[e.name] = {line for line in kept if len(line) >= 16}
    return found


def bare(line: str) -> str:
    """A line without its comment and its spaces."""
    return re.sub(r"\s+", "", re.sub(r"\s#.*$", "", line))


def check_for_leaks(course: Course, folders: list[Path]) -> int:
    """The number of lines looked for. Raises ExerciseError if a student's file has one.

    Of the nbgrader source only what nbgrader gives to students is read: the rest is cut out. The
    cases unpack the same tensors as some answers do: one line in five may be the same there.
    """
    solutions = solution_lines(course)
    wanted = {line: name for name, lines in solutions.items() for line in lines}
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            if path.suffix == ".bin":
                continue  # inputs and results; tests/handout.py writes no source into it
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".ipynb":
                cells = json.loads(text)["cells"]
                text = "\n".join("".join(c["source"]) for c in cells)
                for kind in ("SOLUTION", "HIDDEN TESTS"):
                    text = re.sub(rf"(?s)### BEGIN {kind}.*?### END {kind}", "", text)
            found = {bare(line): line for line in text.splitlines() if bare(line) in wanted}
            for key, line in found.items():
                same = sum(wanted[other] == wanted[key] for other in found)
                if path.parent.name != "cases" or same > len(solutions[wanted[key]]) / 5:
                    what = f"has a line of {wanted[key]}'s solution: {line.strip()}"
                    raise ExerciseError(f"{path.name}: {what}")
    return len(wanted)


# For the instructor


def instructor_text(course: Course, most: int) -> str:
    chapter = course.exercises[0].chapter
    short = chapter[:4]
    flags = f" --seed {course.seed}" + " --variant" * course.variant
    flags += f" --overlay {course.overlay}" if course.overlay else ""
    return f"""# {chapter}: for the instructor

{len(course.exercises)} exercises, {most} points. Made with seed {course.seed}\
{", in the variant's conventions" if course.variant else ""}\
{", with private checks" if course.overlay else ""}. The references got every point and the stubs \
none before this folder was written.

| | |
|---|---|
| `handout/` | give it to students: gaps, a notebook, tasks, checks with recorded results, a GitHub Actions workflow. It holds no solution. |
| `gradescope.zip` | upload it as the autograder. It holds the solutions. |
| `nbgrader/source/{chapter}/` | put it into your course's `source/`, then `nbgrader generate_assignment {chapter}`. It holds the solutions. |

Grade a folder of submissions (one file or one folder a student) with the book itself:

    python -m tests grade SUBMISSIONS --chapter {short}{flags} --out results --csv marks.csv \
--similarity pairs.csv

It goes on where it stopped, if it is run again. What holds a submission in, and what does not, \
stands in the book's README. nbgrader runs answers in the notebook's own process: there nothing \
holds them in.
"""  # noqa: E501
