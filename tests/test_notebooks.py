"""Every notebook runs from top to bottom, offline, and prints what its committed outputs say."""

import math
import os
import re
from functools import cache
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path for path in ROOT.glob("ch0*/*.ipynb") if not path.name.startswith("my_"))
CELL_SECONDS = 300
MIN_WORDS = 2000

# A whole number is compared exactly: parameters, bytes, token ids. One with a point or an exponent
# may differ by a hundredth, since sums round differently on different processors; and whatever is
# below 1e-5 is rounding error, printed to show that it is small.
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)
REL_TOL, ABS_TOL = 1e-2, 1e-5

# A home or work folder in an output tells who ran the notebook, and is nowhere else.
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|Users|work|tmp|opt|mnt|var|usr)/|\b[A-Z]:\\")


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells that have code."""
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def printed(cell: NotebookNode) -> str:
    """The text that a reader sees under the cell: standard output, and values in plain text."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            parts.append(output.text)
        elif output.output_type in ("execute_result", "display_data"):
            parts.append(output.data.get("text/plain", "") + "\n")
    return "".join(parts)


def n_images(cell: NotebookNode) -> int:
    kinds = [kind for output in cell.outputs for kind in output.get("data", {})]
    return sum(kind.startswith("image/") for kind in kinds)


def same_number(a: str, b: str) -> bool:
    if not re.search("[.e]", a + b, re.IGNORECASE):
        return a == b
    x, y = float(a.replace(",", "")), float(b.replace(",", ""))
    return math.isclose(x, y, rel_tol=REL_TOL, abs_tol=ABS_TOL)


def difference(committed: str, now: str) -> str | None:
    """The first line in which two outputs differ, as "committed -> now"; None if none does.

    Words must be equal, numbers equal or near (see NUMBER), the amount of white space may differ.
    """
    old, new = committed.split("\n"), now.split("\n")
    length = max(len(old), len(new))
    for a, b in zip(
        old + [""] * (length - len(old)), new + [""] * (length - len(new)), strict=True
    ):
        words_a, words_b = (" ".join(NUMBER.sub(" # ", line).split()) for line in (a, b))
        numbers = zip(NUMBER.findall(a), NUMBER.findall(b), strict=words_a == words_b)
        if words_a != words_b or not all(same_number(x, y) for x, y in numbers):
            return f"{a.strip()!r} -> {b.strip()!r}"
    return None


@cache
def executed(path: Path) -> NotebookNode:
    """The notebook after a run in a fresh kernel of this interpreter, with no way out to a network.

    Raises CellExecutionError for the first cell that fails, CellTimeoutError for one too slow.
    """
    dead_end = "http://127.0.0.1:9"
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "http_proxy": dead_end,
        "https_proxy": dead_end,
        "HTTP_PROXY": dead_end,
        "HTTPS_PROXY": dead_end,
        "PYTHONHASHSEED": "0",
    }
    env.pop("MPLBACKEND", None)  # the kernel chooses the one that shows pictures in the notebook
    notebook = read(path)
    # With no folders to search, "python3" is ipykernel under sys.executable, not a kernel of the
    # same name that someone installed for another Python.
    manager = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = NotebookClient(notebook, km=manager, timeout=CELL_SECONDS)
    client.execute(env=env, cwd=str(path.parent))
    return notebook


def name(path: Path) -> str:
    return path.stem


each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=name)


def test_the_first_notebook_exists() -> None:
    """Guards the tests below, which check nothing where there is no notebook."""
    assert ROOT / "ch01_gpt2" / "gpt2.ipynb" in NOTEBOOKS


@each_notebook
def test_runs_top_to_bottom(path: Path) -> None:
    """Guards what a reader does first. Any exception in a cell fails."""
    assert len(code_cells(executed(path))) > 0


@each_notebook
def test_committed_outputs_are_those_of_one_run(path: Path) -> None:
    """Guards reading on GitHub: each cell has run, in order, without an error."""
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [cell.source for cell in cells for o in cell.outputs if o.output_type == "error"] == []
    assert any(cell.outputs for cell in cells)


@each_notebook
def test_committed_outputs_are_current(path: Path) -> None:
    """Guards against outputs of older code. Cells tagged "varies" (timings) are left out."""
    stale = []
    for old, new in zip(code_cells(read(path)), code_cells(executed(path)), strict=True):
        if "varies" in old.metadata.get("tags", []):
            continue
        if found := difference(printed(old), printed(new)):
            stale.append(f"cell [{old.execution_count}]: {found}")
        if n_images(old) != n_images(new):
            stale.append(f"cell [{old.execution_count}]: {n_images(old)} -> {n_images(new)} images")
    assert not stale, "\n".join(stale)


@each_notebook
def test_most_cells_are_compared(path: Path) -> None:
    """Guards the test above: the tag "varies" is for a few cells."""
    cells = code_cells(read(path))
    varying = [cell for cell in cells if "varies" in cell.metadata.get("tags", [])]
    assert len(varying) <= len(cells) // 4


@each_notebook
def test_outputs_name_no_place_on_the_build_machine(path: Path) -> None:
    """Guards readers from paths that exist on one computer only."""
    found = []
    for cell in code_cells(read(path)):
        for output in cell.outputs:
            shown = [output.get("text", ""), *map(str, output.get("data", {}).values())]
            images = [kind.startswith("image/p") for kind in output.get("data", {})]
            if not any(images):
                found += [m for text in shown for m in MACHINE_PATH.findall(text)]
    assert found == []


@each_notebook
def test_has_the_chapter_shape(path: Path) -> None:
    """Guards the eight stops, which are the same in every chapter, and that there is prose."""
    markdown = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    number = int(path.parent.name[2:4])
    assert re.match(rf"# Chapter {number}\b", read(path).cells[0].source)
    stops = [int(n) for text in markdown for n in re.findall(r"^#{2,3} (\d)\b", text, re.MULTILINE)]
    assert stops == list(range(1, 9))
    assert sum(len(re.findall(r"\w+", text)) for text in markdown) >= MIN_WORDS


@pytest.mark.parametrize(
    ("committed", "now"),
    [
        ("loss 2.31", "loss 2.40"),
        ("124,439,808 parameters", "124,439,809 parameters"),
        ("heads: 12", "groups: 12"),
        ("one\ntwo", "one"),
        ("2.5 2.5", "2.5"),
        ("error 3e-7", "error 3e-3"),
    ],
)
def test_a_stale_output_is_seen(committed: str, now: str) -> None:
    """Guards the comparison: another word, another count, another number is a difference."""
    assert difference(committed, now) is not None


@pytest.mark.parametrize(
    ("committed", "now"),
    [
        ("loss 2.31\n", "loss 2.309\n"),
        ("error 3.1e-07", "error 5.9e-07"),
        ("[1, 2, 3]", "[1, 2, 3]"),
        ("a   b", "a b"),
        ("-0.5 1,024.0", "-0.5003 1,024.1"),
    ],
)
def test_rounding_is_no_difference(committed: str, now: str) -> None:
    """Guards the comparison: what another processor rounds differently passes."""
    assert difference(committed, now) is None
