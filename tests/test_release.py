"""What `release` writes: no solution in what students get, and graders that accept it."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.__main__ import main
from tests.exercise import ROOT, load
from tests.grade import Course
from tests.release import (
    check_for_leaks,
    class_or_function,
    solution_cell,
    solution_lines,
    solved,
    write_handout,
)
from tests.test_grade import OVERLAY, run

CHAPTER, SHORT, TOPIC = "ch03_gqa", "ch03", "gqa"
EXERCISES = load(CHAPTER)
MOST = sum(exercise.points for exercise in EXERCISES)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of chapter 3 with everything switched on: seed, variant, private checks."""
    folder = tmp_path_factory.mktemp("release")
    overlay = folder / "private"
    overlay.mkdir()
    points = "[grouped_attend]\none_query_head = 3\n"
    (overlay / "overlay.toml").write_text(points, encoding="utf-8")
    (overlay / "ch03.py").write_text(OVERLAY, encoding="utf-8")
    command = ["release", SHORT, "--out", str(folder / "dist"), "--seed", "11", "--variant",
               "--overlay", str(overlay)]  # fmt: skip
    assert run(command) == 0
    return folder / "dist"


def course(variant: bool = True) -> Course:
    return Course(EXERCISES, 11, variant)


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs `python -m tests …` as a student would, in the hand-out's own folder."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, "-m", "tests", *arguments],
        cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip


def test_holds_what_it_says(dist: Path) -> None:
    names = {path.relative_to(dist).as_posix() for path in dist.rglob("*") if path.is_file()}
    assert {
        "README.md", "gradescope.zip", "handout/README.md", "handout/exercises.ipynb",
        f"handout/{CHAPTER}/exercises.py", f"handout/{CHAPTER}/exercises.json",
        "handout/.github/workflows/check.yml", f"nbgrader/source/{CHAPTER}/{CHAPTER}.ipynb",
    } <= names  # fmt: skip
    assert not [name for name in names if name.endswith((".toml", ".pkl", ".pyc"))]


def test_students_get_no_solution(dist: Path) -> None:
    """The file with answers, the mutants' edits and the references' lines are absent."""
    text = "\n".join(
        path.read_text(encoding="utf-8")
        for path in (dist / "handout").rglob("*")
        if path.is_file() and path.suffix != ".bin"
    )
    lines = {line for found in solution_lines(course()).values() for line in found}
    bare = {"".join(line.split()) for line in text.splitlines()}
    assert len(lines) >= 3 * len(EXERCISES) and not lines & bare
    for exercise in EXERCISES:
        for mutant in exercise.mutants:
            assert not [new for _, new in mutant.replace if len(new) > 25 and new in text]


@pytest.mark.parametrize("place", ["handout/README.md", "handout/tests/worker.py"])
def test_a_leak_is_found(place: str, dist: Path, tmp_path: Path) -> None:
    """Guards the search itself: a line of a solution in any file stops the release."""
    from tests.exercise import ExerciseError

    shutil.copytree(dist / "handout", tmp_path / "handout")
    assert check_for_leaks(course(), [tmp_path / "handout"]) > 0
    line = class_or_function(EXERCISES[0], True).rstrip().splitlines()[-1]
    found = solution_lines(course())[EXERCISES[0].name]
    line = next(iter(found)) if "".join(line.split()) not in found else line
    path = tmp_path / place
    path.write_text(path.read_text(encoding="utf-8") + f"\n      {line}\n", encoding="utf-8")
    with pytest.raises(ExerciseError, match="solution"):
        check_for_leaks(course(), [tmp_path / "handout"])


def test_student_can_work_in_the_handout(dist: Path, tmp_path: Path) -> None:
    """start, check, learn; a right answer passes, last year's does not; no way to the solutions."""
    folder = tmp_path / "handout"
    shutil.copytree(dist / "handout", folder)
    assert command(folder, "start", SHORT).returncode == 0
    done = command(folder, "check", SHORT)
    assert done.returncode == 1 and done.stdout.count("not written yet") == len(EXERCISES)
    mine = folder / CHAPTER / f"my_{TOPIC}.py"
    mine.write_text(solved(course(variant=True)), encoding="utf-8")
    done = command(folder, "check", SHORT)
    assert (done.returncode, done.stderr) == (0, "")
    later = [line for line in done.stdout.splitlines() if "when you hand it in" in line]
    assert [line.split(":")[0] for line in later] == ["regroup_heads"]  # it uses another exercise
    assert done.stdout.count(": right") == len(EXERCISES) - 1
    mine.write_text(solved(course(variant=False)), encoding="utf-8")
    done = command(folder, "check", SHORT)
    assert done.returncode == 1 and f"0 of {MOST} points" in done.stdout
    assert command(folder, "learn").returncode == 0
    for arguments in (("diff", EXERCISES[0].name), ("grade", "x", "--chapter", SHORT)):
        done = command(folder, *arguments)
        assert done.returncode == 2 and "holds no solutions" in done.stderr


def test_plain_handout_checks_every_exercise(tmp_path: Path) -> None:
    """Without a variant, a learner's other answers stand in, in a file and in a notebook."""
    write_handout(tmp_path, course(variant=False))
    assert command(tmp_path, "start", SHORT).returncode == 0
    mine = tmp_path / CHAPTER / f"my_{TOPIC}.py"
    mine.write_text(solved(course(variant=False)), encoding="utf-8")
    done = command(tmp_path, "check", SHORT)
    assert done.returncode == 0 and f"{MOST} of {MOST} points" in done.stdout

    book = nbformat.read(tmp_path / "exercises.ipynb", as_version=4)
    for cell in book.cells:
        for e in EXERCISES:
            if cell.id == f"ex-{e.name}-code".replace("_", "-"):
                cell.source = solution_cell(e, False) + f'\n\ncheck("{e.name}")'
    client = NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""})
    printed = [o.text for c in book.cells if c.cell_type == "code" for o in c.outputs]
    assert len(printed) == len(EXERCISES) and all(": right" in text for text in printed), printed


def test_gradescope_zip_runs(dist: Path, tmp_path: Path) -> None:
    """run_autograder in folders laid out as Gradescope does: source, submission, results."""
    for name in ("source", "submission", "results"):
        (tmp_path / name).mkdir()
    with zipfile.ZipFile(dist / "gradescope.zip") as file:
        file.extractall(tmp_path / "source")
        modes = {i.filename: i.external_attr >> 16 & 0o777 for i in file.infolist()}
    assert modes["run_autograder"] == modes["setup.sh"] == 0o755
    if os.name == "nt":
        return
    env = os.environ | {"AUTOGRADER": str(tmp_path), "PYTHON": sys.executable}
    script = tmp_path / "source" / "run_autograder"

    def graded(text: str | None) -> dict:
        path = tmp_path / "submission" / f"my_{TOPIC}.py"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text, encoding="utf-8")
        subprocess.run(["bash", str(script)], env=env, check=True, capture_output=True)
        return json.loads((tmp_path / "results" / "results.json").read_text(encoding="utf-8"))

    result = graded(solved(course()))
    assert sum(t["score"] for t in result["tests"]) == MOST + 3  # with the overlay's
    assert {t["visibility"] for t in result["tests"]} == {"visible", "hidden"}
    assert sum(t["score"] for t in graded(solved(course(variant=False)))["tests"]) == 0
    assert graded(None)["score"] == 0
    env["PYTHON"] = "/no/python"
    assert "tell your instructor" in graded(solved(course()))["output"]


def test_nbgrader_accepts_and_grades(dist: Path, tmp_path: Path) -> None:
    """The whole way of a course: assign, hand in, grade, marks."""
    (tmp_path / "nbgrader_config.py").write_text(
        'c = get_config()\nc.CourseDirectory.course_id = "trial"\n', encoding="utf-8"
    )
    shutil.copytree(dist / "nbgrader" / "source", tmp_path / "source")
    bin_folder = str(Path(sys.executable).parent)
    env = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": "",
        "PATH": os.pathsep.join((bin_folder, os.environ["PATH"])),
    }  # fmt: skip

    def nbgrader(*arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "nbgrader", *arguments],
            cwd=tmp_path, env=env, capture_output=True, text=True,
        encoding="utf-8")  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]

    nbgrader("generate_assignment", CHAPTER, "--create")
    released = tmp_path / "release" / CHAPTER
    book = json.loads((released / f"{CHAPTER}.ipynb").read_text(encoding="utf-8"))
    text = "\n".join("".join(c["source"]) for c in book["cells"])
    assert "HIDDEN" not in text and "SOLUTION" not in text and "one_query_head" not in text
    lines = {line for found in solution_lines(course()).values() for line in found}
    assert not lines & {"".join(line.split()) for line in text.splitlines()}

    source = json.loads((tmp_path / "source" / CHAPTER / f"{CHAPTER}.ipynb").read_text("utf-8"))
    answers = {c["id"]: c for c in source["cells"] if c["metadata"]["nbgrader"]["solution"]}
    for student in ("ada", "bob"):
        folder = tmp_path / "submitted" / student / CHAPTER
        shutil.copytree(released, folder)
        handed_in = json.loads(json.dumps(book))
        for cell in handed_in["cells"]:
            if student == "ada" and cell["id"] in answers:
                cell["source"] = answers[cell["id"]]["source"]
        (folder / f"{CHAPTER}.ipynb").write_text(json.dumps(handed_in), encoding="utf-8")
    nbgrader("autograde", CHAPTER, "--create")
    nbgrader("export")
    rows = (tmp_path / "grades.csv").read_text(encoding="utf-8").splitlines()
    head = rows[0].split(",")
    marks = {}
    for row in rows[1:]:
        values = dict(zip(head, row.split(","), strict=True))
        marks[values["student_id"]] = (float(values["score"]), float(values["max_score"]))
    assert marks == {"ada": (MOST + 3, MOST + 3), "bob": (0, MOST + 3)}


def test_workflow_is_yaml_with_the_command(dist: Path) -> None:
    yaml = pytest.importorskip("yaml")
    path = dist / "handout" / ".github" / "workflows" / "check.yml"
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    steps = workflow["jobs"]["check"]["steps"]
    assert steps[-1]["run"] == f"python -m tests check {SHORT}"


def test_nothing_is_written_over(dist: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(dist.rglob("*"))
    assert run(["release", SHORT, "--out", str(dist)]) == 2
    assert "is there already and not empty" in capsys.readouterr().err
    assert sorted(dist.rglob("*")) == before


def test_a_reference_that_fails_stops_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Nothing is written unless the references get every point."""
    monkeypatch.setattr("tests.release.solved", lambda course: "x = 1")
    assert run(["release", SHORT, "--out", str(tmp_path / "dist")]) == 2
    assert "the references get 0 points" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_main_is_the_command() -> None:
    assert main.__module__ == "tests.__main__" and (ROOT / "tests" / "__main__.py").is_file()
