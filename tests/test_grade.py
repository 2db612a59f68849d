"""The grader gives every submission the right result in bounded time, whatever it does."""

import ast
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from tests import sandbox
from tests.__main__ import main
from tests.exercise import ROOT, load, segment
from tests.grade import Course, alike, grade_path, gradescope, job_of, judged, run_in_child

pytestmark = pytest.mark.usefixtures("one_thread")

EXERCISES = tuple(e for e in load("ch03_gqa") if e.name == "grouped_attend")
TIMEOUT = 100.0  # seconds; a run takes about two, on a busy machine ten
SHORT = 6.0  # for what never ends by itself
FOLDERS: list[str] = []  # that graded() has made
COURSE = Course(EXERCISES, seed=5, timeout=TIMEOUT)
MOST = EXERCISES[0].points

RIGHT = """
import torch

def attend(q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale):
    before()
    H, J = q_BTHK.shape[2], k_BSJK.shape[2]
    heads = []
    for h in range(H):
        scores = torch.matmul(q_BTHK[:, :, h], k_BSJK[:, :, h // (H // J)].transpose(1, 2)) * scale
        scores = scores.masked_fill(mask_BTS.logical_not(), -torch.inf)
        heads.append(torch.matmul(torch.softmax(scores, -1), v_BSJK[:, :, h // (H // J)]))
    return torch.stack(heads, dim=2)
"""
WRONG = """
import torch

def attend(q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale):
    before()
    return torch.zeros_like(q_BTHK)
"""


def right(before: str) -> str:
    """A right answer that first does something else."""
    return f"{RIGHT}\ndef before():\n" + "".join(f"    {line}\n" for line in before.splitlines())


def wrong(before: str) -> str:
    return right(before).replace(RIGHT, WRONG)


# What the submission is, the points it must get, and what its author or the instructor must read.
# None: any of both, since it depends on the system whether it was stopped first.
FULL, NOTHING = MOST, 0
HOSTILE: dict[str, tuple[str, int | None, str]] = {
    "raises at import": ("raise ValueError('not today')" + RIGHT, NOTHING, "not today"),
    "exits at import": ("import sys; sys.exit(0)" + RIGHT, NOTHING, "SystemExit"),
    "_exit at import": ("import os; os._exit(0)" + RIGHT, NOTHING, "ended the process"),
    "never ends at import": ("while True: pass" + RIGHT, NOTHING, "still running|processor time"),
    "is not Python": ("def attend(:\n", NOTHING, "line 1 is not Python"),
    "is deeply nested": ("x = " + "(" * 5000 + ")" * 5000 + RIGHT, NOTHING, "is not Python"),
    "never returns": (right("while True: pass"), NOTHING, "still running|processor time"),
    "sleeps": (right("import time; time.sleep(10**6)"), NOTHING, "still running"),
    "ignores signals and sleeps": (
        right(
            "import signal, time\nfor s in range(1, 30):\n"
            "    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\n"
            "while True: time.sleep(1)"
        ),
        NOTHING,
        "still running",
    ),
    "allocates 100 GB": (right("torch.ones(25 * 10**9)"), NOTHING, "alloc|memory"),
    "allocates 100 GB of bytes": (right("x = bytes(10**11)"), NOTHING, "MemoryError|memory"),
    "returns gigabytes": (
        WRONG.replace("before()", "pass").replace(
            "torch.zeros_like(q_BTHK)", "torch.zeros(300, 1024, 1024)"
        ),
        NOTHING,
        "bytes|memory|alloc",
    ),
    "forks and goes on": (right("import os; os.fork()"), FULL, "right"),
    "forks without end": (
        right(
            "import os, time\nif os.path.exists('bomb'): return\nopen('bomb', 'w')\n"
            "for _ in range(100):\n    try: child = os.fork()\n    except OSError: break\n"
            "    if child == 0: time.sleep(5); os._exit(0)"
        ),
        FULL,
        "right",
    ),
    "leaves a daemon that holds the pipes": (
        right(
            "import os, time\nif os.path.exists('daemon'): return\nopen('daemon', 'w')\n"
            "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(30)\n"
            "    os._exit(0)"
        ),
        FULL,
        "right",
    ),
    "leaves a thread": (
        right("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()"),
        FULL,
        "right",
    ),
    "prints megabytes": (right("print('x' * 5_000_000)"), FULL, "right"),
    "writes to stderr and warns": (
        right("import sys, warnings\nsys.stderr.write('oh no')\nwarnings.warn('deprecated')"),
        FULL,
        "right",
    ),
    "turns warnings into errors": (
        right("import warnings\nwarnings.simplefilter('error')"), FULL, "right",
    ),
    "ends the process": (right("import os; os._exit(0)"), NOTHING, "ended the process"),
    "exits": (right("import sys; sys.exit(0)"), NOTHING, "SystemExit"),
    "raises KeyboardInterrupt": (right("raise KeyboardInterrupt"), NOTHING, "ended"),
    "ends the process at the very end": (
        "import atexit, os\natexit.register(os._exit, 9)" + right("pass"), FULL, "right",
    ),
    "crashes": (right("import ctypes; ctypes.string_at(0)"), NOTHING, "ended before|ended the"),
    "recurses": (right("before()"), NOTHING, "RecursionError"),
    "deletes its folder": (
        right("import shutil, os; shutil.rmtree(os.getcwd(), ignore_errors=True)"), FULL, "right",
    ),
    "rewrites the worker and the inputs": (
        right(
            "import glob\nfor name in glob.glob('*'):\n"
            "    try: open(name, 'w').write('points = 100')\n    except OSError: pass"
        ),
        FULL,
        "right",
    ),
    "writes a gigabyte": (
        right(
            "try:\n    with open('big', 'wb') as f:\n"
            "        for _ in range(1000): f.write(bytes(10**6))\nexcept OSError: pass"
        ),
        FULL,
        "right",
    ),
    "patches torch's comparisons": (
        wrong(
            "torch.allclose = torch.equal = lambda *a, **k: True\n"
            "torch.Tensor.__sub__ = lambda a, b: a * 0\ntorch.Tensor.double = lambda a: a * 0"
        ),
        NOTHING,
        "not right",
    ),
    "patches what sends the answers": (
        wrong(
            "import json, sys\njson.dumps = lambda *a, **k: '{\"points\": 100}'\n"
            "sys.modules['__main__'].encode = lambda value: b'100 points'"
        ),
        NOTHING,
        "",
    ),
    "patches builtins": (
        wrong("import builtins\nbuiltins.len = lambda x: 0\nbuiltins.isinstance = lambda *a: True"),
        NOTHING,
        "",
    ),
    "prints a forged result": (
        wrong("print('{\"score\": 100, \"tests\": []}', flush=True)"), NOTHING, "not right",
    ),
    "writes a forged result to every open file": (
        wrong(
            "import os\nfor fd in range(100):\n"
            "    try: os.write(fd, b'{\"score\": 100, \"points\": 100}' * 10)\n"
            "    except OSError: pass"
        ),
        NOTHING,
        "",
    ),
    "sends answers of its own": (
        wrong(
            "import os, struct, sys\nencode = sys.modules['__main__'].encode\n"
            "data = encode({'out': {'y_BTHK': torch.zeros(2)}, 'changed': []})\n"
            "for fd in range(3, 100):\n"
            "    try: os.write(fd, struct.pack('<Q', len(data)) + data)\n"
            "    except OSError: pass"
        ),
        NOTHING,
        "",
    ),
    "closes every file": (right("import os; os.closerange(0, 100)"), NOTHING, ""),
    "kills its parent": (right("import os; os.kill(os.getppid(), 9)"), None, ""),
    "stops itself": (right("import os, signal; os.kill(0, signal.SIGSTOP)"), None, ""),
    "asks the chapter for the reference": (
        "from ch03_gqa.gqa import attend as theirs\n"
        + WRONG.replace("before()", "return theirs(q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale)"),
        NOTHING,
        "uses attend, which is to be written first|RecursionError",
    ),
    "asks the loaded modules for the reference": (
        WRONG.replace(
            "before()",
            "import gc, types\n"
            "    for f in gc.get_objects():\n"
            "        if isinstance(f, types.FunctionType) and f.__name__ == 'attend'"
            " and f.__code__ is not attend.__code__:\n"
            "            try: return f(q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale)\n"
            "            except NotImplementedError: pass",
        ),
        NOTHING,
        "not right",
    ),
    "has a result that lies about itself": (
        WRONG.replace("before()", "pass").replace(
            "torch.zeros_like(q_BTHK)",
            "type('Liar', (torch.Tensor,), {'__eq__': lambda a, b: True, 'detach': lambda a: a,"
            " '__class__': property(lambda a: torch.Tensor)})(torch.zeros_like(q_BTHK))",
        ),
        NOTHING,
        "not right",
    ),
    "returns a list that holds itself": (
        WRONG.replace("before()", "x = []; x.append(x); return x"), NOTHING, "not right",
    ),
    "raises an error whose text ends the process": (
        right(
            "import os\nclass Bad(Exception):\n    def __str__(self): os._exit(0)\nraise Bad"
        ),
        NOTHING,
        "ended the process",
    ),
    "raises an error that clears the screen": (
        right("raise ValueError('\\x1b[2J\\x1b]0;points\\x07')"), NOTHING, "ValueError: ?[2J",
    ),
    "changes the inputs that it is compared on": (
        WRONG.replace("before()", "q_BTHK.zero_(); k_BSJK.zero_(); v_BSJK.zero_()"),
        NOTHING,
        "not right",
    ),
    "traces and profiles": (
        right("import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)"),
        FULL,
        "right",
    ),
    "changes torch's defaults": (
        right("torch.set_default_dtype(torch.float64); torch.manual_seed(1)"), FULL, "right",
    ),
    "is empty": ("", NOTHING, "no definition"),
    "uses what is forbidden, by another name": (
        "from torch.nn.functional import scaled_dot_product_attention as f\n"
        + WRONG.replace("before()", "return f(q_BTHK, k_BSJK, v_BSJK)"),
        NOTHING,
        "not allowed here",
    ),
}  # fmt: skip

IN_NAMESPACES = {
    "reads the reference from the disk": (
        WRONG.replace(
            "before()",
            f"text = open({str(ROOT / 'ch03_gqa' / 'gqa.py')!r}).read()\n"
            "    space = {}; exec(text, space)\n"
            "    return space['attend'](q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale)",
        ),
        NOTHING,
        "FileNotFoundError",
    ),
    "reads the grader's memory": (
        right(
            "import os\nmemory = f'/proc/{os.getppid()}/mem'\n"
            "assert os.getppid() <= 2 or not os.path.exists(memory)\n"
            "seen = [int(p) for p in os.listdir('/proc') if p.isdigit()]\n"
            f"assert {os.getpid()} not in seen or len(seen) < 20, seen"
        ),
        FULL,
        "right",
    ),
    "kills everything it can": (right("import os; os.kill(-1, 9)"), None, ""),
    "calls home": (
        right(
            "import socket\ntry: socket.create_connection(('127.0.0.1', 9), 1)\n"
            "except OSError as error: assert error.errno in (101, 111)\n"
            "assert socket.if_nameindex()[1:] == []"
        ),
        FULL,
        "right",
    ),
}  # fmt: skip


def graded(texts: dict[str, str], isolation: str | None) -> dict[str, tuple[dict, float]]:
    """Name -> (record, seconds), of runs side by side."""
    course = Course(EXERCISES, COURSE.seed, timeout=TIMEOUT, isolation=isolation)
    endless = Course(EXERCISES, COURSE.seed, timeout=SHORT, isolation=isolation)
    (exercise,) = EXERCISES
    jobs = {name: job_of(exercise, text, "my.py", course, False) for name, text in texts.items()}

    def noting_mkdtemp(prefix: str) -> str:
        FOLDERS.append(tempfile.mkdtemp(prefix=prefix))
        return FOLDERS[-1]

    def run(name: str) -> tuple[sandbox.Outcome | None, float]:
        start = time.perf_counter()
        never_ends = name in HOSTILE and "still running" in HOSTILE[name][2]
        limited = endless if never_ends or name == "stops itself" else course
        outcome = jobs[name] and run_in_child(jobs[name], limited)
        return outcome, time.perf_counter() - start

    noting = SimpleNamespace(mkdtemp=noting_mkdtemp)
    with mock.patch("tests.grade.tempfile", noting), ThreadPoolExecutor(4) as pool:
        outcomes = dict(zip(texts, pool.map(run, texts), strict=True))
    return {
        name: (judged(exercise, texts[name], "my.py", course, outcome), seconds)
        for name, (outcome, seconds) in outcomes.items()
    }


@pytest.fixture(scope="module")
def hostile_records() -> dict[str, tuple[dict, float]]:
    return graded({name: text for name, (text, _, _) in HOSTILE.items()}, None)


def assert_record(record: dict, points: int | None, words: str) -> None:
    assert record["max_points"] == MOST
    assert record["points"] == points if points is not None else record["points"] in (0, MOST)
    text = "\n".join(record["report"])
    assert any(word in text for word in words.split("|")), text
    json.dumps(record)  # it can be written
    assert len(text) < 10_000 and len(record["printed"]) < 50_000


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_submission(name: str, hostile_records: dict) -> None:
    """Each gets its result: nothing for doing nothing right, and everything for a right answer."""
    record, seconds = hostile_records[name]
    _, points, words = HOSTILE[name]
    assert_record(record, points, words)
    assert seconds < TIMEOUT + 10


def test_there_are_thirty() -> None:
    assert len(HOSTILE) >= 30


@pytest.mark.skipif("namespaces" not in sandbox.available(), reason="needs user namespaces (Linux)")
def test_in_namespaces() -> None:
    """What only the strongest level keeps from a submission."""
    records = graded({name: text for name, (text, _, _) in IN_NAMESPACES.items()}, "namespaces")
    for name, (record, seconds) in records.items():
        assert record["isolation"] == "namespaces"
        assert_record(record, *IN_NAMESPACES[name][1:])
        assert seconds < TIMEOUT + 10


def test_with_limits_only() -> None:
    """The weakest level, which every system has, still gives a result to each of these."""
    names = ["never returns", "allocates 100 GB", "prints megabytes", "ends the process",
             "kills its parent", "forks and goes on", "prints a forged result"]  # fmt: skip
    records = graded({name: HOSTILE[name][0] for name in names}, "limits only")
    for name, (record, seconds) in records.items():
        assert record["isolation"] == "limits only"
        assert_record(record, *HOSTILE[name][1:])
        assert seconds < TIMEOUT + 10


def test_nothing_is_left_behind(hostile_records: dict) -> None:
    """No process of a submission lives on, and no temporary folder."""
    assert len(hostile_records) > 0 and len(FOLDERS) > 30
    assert [folder for folder in FOLDERS if Path(folder).exists()] == []
    if Path("/proc").is_dir():
        time.sleep(0.2)
        lines = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
        names = [Path(folder).name.encode() for folder in FOLDERS]
        assert [line for line in lines if any(name in line for name in names)] == []


def test_the_child_holds_no_solution() -> None:
    """Reads what is put beside a submission: no reference, no mistake, no expected number."""
    (exercise,) = EXERCISES
    job = job_of(exercise, right("pass"), "my.py", COURSE, False)
    reference = segment((ROOT / "ch03_gqa" / "gqa.py").read_text(encoding="utf-8"), "attend")
    body = [line.strip() for line in reference.splitlines()[4:] if len(line.strip()) > 20]
    texts = [*job.modules.values(), job.driver]
    assert body and not [line for line in body for text in texts if line in text]
    assert not [m.says for m in exercise.mutants for text in texts if m.says in text]


# The command


def test_gradescope_file(tmp_path: Path) -> None:
    """The form that Gradescope reads: tests with scores, visible ones and hidden ones."""
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission" / "my_gqa.py").write_text(
        RIGHT + "\ndef before(): pass\n", encoding="utf-8"
    )
    out = tmp_path / "results" / "results.json"
    command = ["grade", str(tmp_path / "submission"), "--chapter", "ch03", "--only",
               "grouped_attend", "--gradescope", str(out), "--seed", "3"]  # fmt: skip
    assert run(command) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [t["visibility"] for t in result["tests"]] == ["visible", "hidden"]
    assert sum(t["score"] for t in result["tests"]) == MOST
    assert sum(t["max_score"] for t in result["tests"]) == MOST
    assert "score" not in result  # Gradescope adds the tests up


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no .py and no .ipynb"),
        ({"a.py": b"x = 1", "b.py": b"x = 2"}, "expected one file"),
        ({"my_gqa.py": b"\xff\xfe\x00"}, "UTF-8"),
        ({"my_gqa.ipynb": b"[]"}, "is not a notebook"),
        ({"my_gqa.py": b"#" * 3_000_000}, "larger than"),
    ],
)
def test_unreadable_submission_gets_a_result(
    files: dict[str, bytes], words: str, tmp_path: Path
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    record = grade_path(tmp_path, "ada", COURSE)
    assert (record["points"], record["max_points"]) == (0, MOST)
    assert words in record["error"]
    assert gradescope(record)["score"] == 0


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.py"
    secret.write_text("x = 1", encoding="utf-8")
    (tmp_path / "ada").mkdir()
    (tmp_path / "ada" / "my_gqa.py").symlink_to(secret)
    assert "no .py" in grade_path(tmp_path / "ada", "ada", COURSE)["error"]


def test_notebook_submission(tmp_path: Path) -> None:
    """Cells that fail, magics and checks do not cost the answers their points."""
    answer = RIGHT.replace("before()", "pass")
    sources = ["%matplotlib inline", "from tests import check", "1 / 0", "this is no Python",
               "weights = load_my_weights()", answer, 'check("grouped_attend")']  # fmt: skip
    cells = [{"cell_type": "code", "source": s} for s in sources]
    cells.append({"cell_type": "markdown", "source": ["def attend("]})
    path = tmp_path / "ada.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    assert grade_path(path, "ada", COURSE)["points"] == MOST


def run(arguments: list[str]) -> int:
    """The command's exit code."""
    import sys
    from unittest import mock

    with mock.patch.object(sys, "argv", ["tests", *arguments]):
        try:
            return main()
        except SystemExit as stop:
            return stop.code


def test_a_class(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A folder of students: a CSV, pairs that look alike, and a second run that goes on."""
    folder, out = tmp_path / "class", tmp_path / "out"
    answer = RIGHT.replace("before()", "pass")
    copied = ast.unparse(ast.parse(answer.replace("scores", "s").replace("heads", "parts")))
    other = WRONG.replace("before()", "y = q_BTHK * 2").replace("zeros_like(q_BTHK)", "relu(y) + 1")
    for name, text in {"ada": answer, "bob": copied, "=cy": other}.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "my_gqa.py").write_text(text, encoding="utf-8")
    (folder / "dan.py").write_text("", encoding="utf-8")
    command = ["grade", str(folder), "--chapter", "ch03", "--only", "grouped_attend", "--out",
               str(out), "--csv", str(tmp_path / "marks.csv"), "--similarity",
               str(tmp_path / "pairs.csv"), "--json", str(tmp_path / "all.json")]  # fmt: skip
    assert run(command) == 0
    rows = (tmp_path / "marks.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "student,points,max_points,grouped_attend,note"
    assert {r.split(",")[0]: int(r.split(",")[1]) for r in rows[1:]} == {
        "ada": MOST, "bob": MOST, "'=cy": 0, "dan": 0,
    }  # fmt: skip
    pairs = (tmp_path / "pairs.csv").read_text(encoding="utf-8").splitlines()
    best = pairs[1].split(",")
    assert set(best[:2]) == {"ada", "bob"} and float(best[2]) > 0.9
    assert all(float(line.split(",")[2]) < 0.5 for line in pairs[2:])
    assert "(kept)" not in capsys.readouterr().out

    (folder / "dan.py").write_text(answer, encoding="utf-8")
    (out / "bob.json").write_text("{", encoding="utf-8")  # a run that was cut off
    assert run(command) == 0
    lines = capsys.readouterr().out.splitlines()
    kept = [line.split()[2] for line in lines if "(kept)" in line]
    assert kept == ["=cy", "ada"]
    assert f"dan,{MOST}" in (tmp_path / "marks.csv").read_text(encoding="utf-8")


def test_alike_needs_more_than_the_task() -> None:
    """Two answers of their own are not alike as copies are."""
    loop = RIGHT.replace("before()", "pass")
    einsum = segment((ROOT / "ch03_gqa" / "gqa.py").read_text(encoding="utf-8"), "attend")
    found = alike({"a": loop, "b": einsum, "c": loop.replace("h", "n")}, EXERCISES)
    assert {found[0]["student"], found[0]["other"]} == {"a", "c"}
    assert found[1]["similarity"] < 0.5 < found[0]["similarity"]


OVERLAY = """
class grouped_attend:
    def one_query_head(rng):
        return [grouped_attend_case(rng)]


def grouped_attend_case(rng):
    B, T, S, K = rng.sizes(4)
    draw = rng.randn
    return {"q_BTHK": draw(B, T, 1, K), "k_BSJK": draw(B, S, 1, K), "v_BSJK": draw(B, S, 1, K),
            "mask_BTS": rng.rand(B, T, S) < 2, "scale": 1.0}
"""


def test_overlay_adds_private_checks(tmp_path: Path) -> None:
    (tmp_path / "overlay.toml").write_text(
        "[grouped_attend]\none_query_head = 3\n", encoding="utf-8"
    )
    (tmp_path / "ch03.py").write_text(OVERLAY, encoding="utf-8")
    (tmp_path / "ada.py").write_text(RIGHT + "\ndef before(): pass\n", encoding="utf-8")
    course = Course(EXERCISES, overlay=tmp_path)
    record = grade_path(tmp_path / "ada.py", "ada", course)
    assert (record["points"], record["max_points"]) == (MOST + 3, MOST + 3)
    hidden = [c["name"] for c in record["exercises"][0]["checks"] if c["part"] == "hidden"]
    visible = [c["name"] for c in record["exercises"][0]["checks"] if c["part"] == "visible"]
    assert "one_query_head" in hidden and "one_query_head" not in visible


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.py", "--chapter", "ch03"], "nothing.py: no such file"),
        (["x.py", "--chapter", "ch99"], "ch99: no such chapter"),
        (["x.py", "--chapter", "ch03", "--only", "nose"], "--only nose: not an exercise"),
        (["x.py", "--chapter", "ch03", "--timeout", "-1"], "--timeout is -1"),
        (["x.py", "--chapter", "ch03", "--overlay", "nowhere"], "overlay.toml"),
        (["x.py"], "--chapter"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    assert run(["grade", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and words in printed.err
