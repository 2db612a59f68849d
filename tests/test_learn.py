"""The learner's commands, run on a copy of chapter 3."""

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests import learn
from tests.exercise import ROOT, ExerciseError, find, forbidden_uses, load, segment
from tests.notebook import check_cells

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "grouped_attend"
RIGHT = """
def attend(q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale):
    heads = []
    for h in range(q_BTHK.shape[2]):
        j = h * k_BSJK.shape[2] // q_BTHK.shape[2]
        scores = (q_BTHK[:, :, h] @ k_BSJK[:, :, j].mT * scale).masked_fill(~mask_BTS, -torch.inf)
        heads.append(scores.softmax(-1) @ v_BSJK[:, :, j])
    return torch.stack(heads, 2)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree with chapter 3's exercises only."""
    (tmp_path / "ch03_gqa").mkdir()
    (tmp_path / "tests" / "cases").mkdir(parents=True)
    for path in (ROOT / "ch03_gqa").glob("*"):
        if path.suffix in (".py", ".toml") and not path.name.startswith("my_"):
            shutil.copy(path, tmp_path / "ch03_gqa")
    shutil.copy(ROOT / "tests" / "cases" / "ch03.py", tmp_path / "tests" / "cases")
    return tmp_path


def answer(root: Path, code: str) -> None:
    """Puts code in the place of attend's gap."""
    learn.start("ch03", root)
    path = learn.my_file("ch03_gqa", root)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(segment(text, "attend"), code), encoding="utf-8")


def test_start_check_learn(root: Path, capsys: pytest.CaptureFixture) -> None:
    """The way through: a file of gaps, nothing right, one answer, and the next exercise."""
    n = len(load("ch03_gqa"))
    assert learn.learn(root) == 0
    assert "start ch03" in capsys.readouterr().out
    assert learn.start("ch03", root) == 0
    assert f"{n} exercises" in capsys.readouterr().out
    assert learn.check("ch03", None, False, root) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("not written yet" in line for line in lines) == n
    assert lines[-1].startswith("0 of ")

    learn.my_file("ch03_gqa", root).unlink()
    answer(root, RIGHT)
    capsys.readouterr()
    assert learn.check("ch03", NAME, False, root) == 0
    points = find(NAME).points
    assert f"{NAME}: right, {points} of {points} points" in capsys.readouterr().out
    assert learn.learn(root) == 0
    table = capsys.readouterr().out
    assert f"{points} of " in table.splitlines()[n] and " right" in table
    assert learn.check("3", "attend", False, root) == 0  # by its function's name as well


def test_start_loses_nothing(root: Path) -> None:
    answer(root, RIGHT)
    before = learn.my_file("ch03_gqa", root).read_bytes()
    with pytest.raises(ExerciseError, match="is there already"):
        learn.start("ch03", root)
    assert learn.my_file("ch03_gqa", root).read_bytes() == before


def test_learn_runs_an_answer_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the table's speed: an answer that did not change is not run again."""
    answer(root, RIGHT)
    learn.learn(root)
    monkeypatch.setattr(learn, "run_check", lambda *_: pytest.fail("ran again"))
    learn.learn(root)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (RIGHT.replace("stack(heads, 2)", "stack(heads, 1)"), "axes are in another order"),
        (RIGHT.replace(" * scale", ""), "A known mistake gives exactly this"),
        (RIGHT.replace("    heads = []", "    q_BTHK *= 1.5\n    heads = []"), "the worst is [b="),
        (RIGHT.replace("heads = []", "heads = [x]"), "NameError: name 'x' is not defined"),
        (RIGHT.replace("def attend", "def attends"), "no definition of attend"),
        (RIGHT.replace("heads = []", "heads = ["), "is not Python"),
        (RIGHT.replace("torch.stack(heads, 2)", "heads"), "expected a tensor (B="),
        (
            RIGHT.replace("heads = []", "return F.scaled_dot_product_attention(q_BTHK)"),
            "F.scaled_dot_product_attention is not allowed here",
        ),
    ],
)
def test_wrong_answers_are_told(
    code: str, words: str, root: Path, capsys: pytest.CaptureFixture
) -> None:
    answer(root, f"import torch.nn.functional as F\n{code}")
    assert learn.check("ch03", NAME, False, root) == 1
    out = capsys.readouterr().out
    assert words in out, out
    assert len(out) < 2_000


def test_a_line_of_the_answer_is_named(root: Path, capsys: pytest.CaptureFixture) -> None:
    answer(root, RIGHT.replace("scores.softmax(-1) @", "scores.softmax(-1) +"))
    learn.check("ch03", NAME, False, root)
    text = learn.my_file("ch03_gqa", root).read_text(encoding="utf-8").splitlines()
    number = next(n for n, line in enumerate(text, 1) if "softmax(-1) +" in line)
    assert f"my_gqa.py, line {number}: {text[number - 1].strip()}" in capsys.readouterr().out


def test_writing_to_an_input_is_told(root: Path, capsys: pytest.CaptureFixture) -> None:
    """The result is right here; the caller's tensor is not, afterwards."""
    spoil = RIGHT.replace("    return", "    k_BSJK += 1\n    return")
    answer(root, spoil)
    assert learn.check("ch03", NAME, False, root) == 1
    assert "writes to its input k_BSJK" in capsys.readouterr().out


def test_an_endless_answer_is_stopped(
    root: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.checking.SECONDS", 1.0)
    answer(root, RIGHT.replace("    heads = []", "    heads = []\n    while True: heads = []"))
    assert learn.check("ch03", NAME, False, root) == 1
    assert "still running after 1 seconds, and was stopped" in capsys.readouterr().out


def test_hints_come_one_by_one(root: Path, capsys: pytest.CaptureFixture) -> None:
    shown = []
    for _ in range(4):
        assert learn.hint(NAME, root) == 0
        shown.append(capsys.readouterr().out)
    first, second, third = (hint.splitlines()[0] for hint in find(NAME).hints)
    assert first in shown[0] and second not in shown[0]
    assert second in shown[1] and third not in shown[1]
    assert third in shown[2] and "one more" not in shown[2]
    assert shown[3] == shown[2]


def test_diff_only_after_passing(root: Path, capsys: pytest.CaptureFixture) -> None:
    answer(root, RIGHT.replace(" * scale", ""))
    with pytest.raises(ExerciseError, match="--reveal"):
        learn.diff(NAME, False, root)
    capsys.readouterr()
    assert learn.diff(NAME, True, root) == 0
    assert "+    scores_BJGTS" in capsys.readouterr().out
    learn.my_file("ch03_gqa", root).unlink()
    answer(root, RIGHT)
    assert learn.diff(NAME, False, root) == 0
    learn.my_file("ch03_gqa", root).unlink()
    answer(root, segment((ROOT / "ch03_gqa" / "gqa.py").read_text(encoding="utf-8"), "attend"))
    capsys.readouterr()
    assert learn.diff(NAME, False, root) == 0
    assert "letter by letter" in capsys.readouterr().out


def test_watch_checks_at_each_change(
    root: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(root, RIGHT.replace(" * scale", ""))
    path, naps = learn.my_file("ch03_gqa", root), []
    n_threads = threading.active_count()

    def nap(_: float) -> None:
        naps.append(1)
        if len(naps) == 2:
            path.write_text(
                path.read_text(encoding="utf-8").replace(".mT", ".mT * scale"), encoding="utf-8"
            )
        if len(naps) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", nap)
    assert learn.check("ch03", NAME, True, root) == 0
    out = capsys.readouterr().out
    assert out.count(f"{NAME}: ") == 2 and "not right yet" in out and "right, " in out
    assert threading.active_count() < n_threads + 2  # none stays behind for each check


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "ch09"], "ch09: no such chapter"),
        (["check", "ch03", "nose"], "nose: not in ch03_gqa"),
        (["hint", "grouped_atend"], "did you mean grouped_attend"),
        (["diff", "nose"], "nose: no such exercise"),
        (["start"], "expected a chapter"),
        (["learns"], "invalid choice"),
        ([], "required"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "tests", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2
    assert done.stdout == "" and words in done.stderr and done.stderr.count("\n") == 1


def test_progress_survives_a_broken_file(root: Path) -> None:
    (root / learn.PROGRESS).write_text("{", encoding="utf-8")
    learn.remember(root, "a", 1)
    assert json.loads((root / learn.PROGRESS).read_text(encoding="utf-8")) == {"a": 1}


# In a notebook


def test_check_reads_the_last_cell_that_defines_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import torch

    def run(cells: list[str]) -> str:
        names: dict[str, object] = {}
        for cell in cells:
            exec(cell, names)
        monkeypatch.setattr("tests.notebook.notebook_cells", lambda: (cells, names))
        check_cells(NAME)
        return capsys.readouterr().out

    start = "import torch\ntwice = 2"
    assert torch.inf
    assert "not written yet" in run([start, 'def attend():\n    raise NotImplementedError("x")'])
    assert ": right" in run([start, "def attend(): ...", RIGHT])
    assert "not right" in run([start, RIGHT, RIGHT.replace("* scale", "* scale * twice")])
    assert "no cell has defined attend" in run([start])
    with pytest.raises(AssertionError, match="not right"):
        cells = ["import torch", RIGHT.replace(" * scale", "")]
        names: dict[str, object] = {}
        exec(cells[0], names)
        monkeypatch.setattr("tests.notebook.notebook_cells", lambda: (cells, names))
        check_cells(NAME, must_pass=True)
    with pytest.raises(ExerciseError, match="no such exercise"):
        check_cells("nose")


def test_helpers_of_a_notebook_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    helper = "import torch\ndef soft(x):\n    return x.softmax(-1)"
    cell = RIGHT.replace("scores.softmax(-1)", "soft(scores)")
    names: dict[str, object] = {}
    exec(helper, names)
    monkeypatch.setattr("tests.notebook.notebook_cells", lambda: ([helper, cell], names))
    check_cells(NAME)
    assert ": right" in capsys.readouterr().out


# What is forbidden


@pytest.mark.parametrize(
    "code",
    [
        "import torch.nn.functional as F\ndef attend():\n    F.scaled_dot_product_attention",
        "import torch\ndef attend():\n    torch.nn.functional.scaled_dot_product_attention",
        "from torch.nn import functional as f\ndef attend():\n    f.scaled_dot_product_attention",
        "from torch.nn.functional import scaled_dot_product_attention as s\n"
        "def attend():\n    return s()",
        "import torch.nn.functional as F\ndef attend():\n"
        "    getattr(F, 'scaled_dot_product_attention')",
        "import torch.nn.functional as F\ndef attend():\n    return mine()\n"
        "def mine():\n    return F.scaled_dot_product_attention()",
        "import torch.nn.functional as F\nmine = F.scaled_dot_product_attention\n"
        "def attend():\n    return mine()",
    ],
)
def test_forbidden_is_found(code: str) -> None:
    """Under other names, in helpers, through strings."""
    found = forbidden_uses(code, find(NAME))
    assert len(found) >= 1
    assert all("scaled_dot" in code.splitlines()[line - 1] or "s()" in code for line, _, _ in found)


def test_what_others_use_is_not_forbidden_here() -> None:
    """A helper that this answer does not reach may do what it likes; so may comments."""
    code = (
        "import torch.nn.functional as F\n"
        "def attend():\n    # no repeat_interleave\n"
        "    '''no F.scaled_dot_product_attention here'''\n"
        "def other():\n    return F.scaled_dot_product_attention()"
    )
    assert forbidden_uses(code, find(NAME)) == []
