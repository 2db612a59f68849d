"""The diff between a file and its parent is the lesson: nothing else may differ.

LINEAGE (lineage.py) lists every file that holds a model, its parent, and the names that may differ
from the parent's; every other name that both have must be equal to the letter. The lists are exact:
a name listed as changed that did not change is a failure, too. Each check takes the folder and the
table as arguments and returns complaints, so that the last tests can feed it files that drift.
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
import torch

from tests.lineage import DEEPSEEK, GPT2, LINEAGE, LLAMA3, MOE, NORMS, Entry
from tests.shapes import axes, check_shapes, suffix_names

ROOT = Path(__file__).parent.parent
COLUMNS = 100
DEMO_SECONDS = 300  # only against a hang: a demo takes seconds, but machines and their load differ


LOADS_CHECKPOINTS = ("ch01", "ch08")
HELPERS = ("exercises.py", "my_")  # files beside a chapter's own that may hold its classes, too


def chapter(file: str) -> int:
    """The number of a file's chapter."""
    return int(file[2:4])


def source(root: Path, file: str) -> str:
    return (root / file).read_text(encoding="utf-8")


def on_disk(root: Path) -> list[str]:
    """Files that hold a model: each chapter's own, and whatever defines a Transformer."""
    found = []
    for path in sorted(root.glob("ch0[1-8]_*/*.py")):
        if path.name.startswith(HELPERS):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defines = any(isinstance(n, ast.ClassDef) and n.name == "Transformer" for n in tree.body)
        if defines or path.stem == path.parent.name.split("_", 1)[1]:
            found.append(path.relative_to(root).as_posix())
    return found


def unlisted(root: Path, table: dict[str, Entry]) -> list[str]:
    """Complaints about files that the table does not know, or whose parent it has wrong."""
    files = on_disk(root)
    complaints = [f"{file}: not in LINEAGE" for file in files if file not in table]
    complaints += [f"{file}: in LINEAGE, but not there" for file in table if file not in files]
    for file, entry in table.items():
        elders = [elder for elder in files if chapter(elder) < chapter(file)]
        nearest = max(elders, key=chapter, default=None)
        if entry.parent != nearest:
            complaints.append(f"{file}: its parent is {nearest}, LINEAGE says {entry.parent}")
    return complaints


def units(text: str) -> dict[str, str]:
    """Source text by name: functions, constants, methods as Class.method, and classes without them.

    Decorators and the comment lines right above belong to the text; in a class's own, blank lines
    are left out.
    """
    lines = text.splitlines()
    found: dict[str, str] = {}

    def span(node: ast.stmt) -> range:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while first and lines[first - 1].lstrip().startswith("#"):
            first -= 1
        return range(first, node.end_lineno)

    def add(name: str, numbers: list[int] | range) -> None:
        found[name] = found.get(name, "") + "\n".join(lines[i] for i in numbers)

    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            add(node.name, span(node))
        elif isinstance(node, ast.ClassDef):
            methods = {f.name: span(f) for f in node.body if isinstance(f, ast.FunctionDef)}
            for method, numbers in methods.items():
                add(f"{node.name}.{method}", numbers)
            inside = {i for numbers in methods.values() for i in numbers}
            add(node.name, [i for i in span(node) if i not in inside and lines[i].strip()])
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                add(ast.unparse(target), span(node))
    return found


def drift_from(root: Path, file: str, other: str, changed: frozenset[str]) -> list[str]:
    """Complaints about names that differ and may not, and about ones listed that do not."""
    mine, theirs = units(source(root, file)), units(source(root, other))
    differ = {name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name]}
    complaints = [f"{file}: {name} differs from {other}'s" for name in sorted(differ - changed)]
    for name in sorted(changed - differ):
        what = "does not differ" if name in mine.keys() & theirs.keys() else "is not in both"
        complaints.append(f"{file}: {name}, listed as changed from {other}, {what}")
    return complaints


def drift(root: Path, table: dict[str, Entry]) -> list[str]:
    """Complaints about drift from parents and other kin."""
    return [
        complaint
        for file, entry in table.items()
        for other, kin in entry.kin.items()
        for complaint in drift_from(root, file, other, kin.changed)
    ]


def n_changed_lines(old: str, new: str) -> int:
    """Lines of the diff, those that go and those that come."""
    diff = list(difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm=""))
    return sum(line[0] in "+-" for line in diff[2:])  # the first two name the files


def over_budget(root: Path, table: dict[str, Entry]) -> list[str]:
    """Complaints about diffs that have grown."""
    complaints = []
    for file, entry in table.items():
        for other, kin in entry.kin.items():
            n = n_changed_lines(source(root, other), source(root, file))
            if n > kin.budget:
                complaints.append(f"{file}: {n} lines differ from {other}, {kin.budget} may")
    return complaints


def untold(root: Path, table: dict[str, Entry]) -> list[str]:
    """Complaints about docstrings that do not begin "Chapter N: ...", then "Since PARENT: ...".

    PARENT is "chapter N", or the name of a file in the same folder.
    """
    complaints = []
    for file, entry in table.items():
        lines = (ast.get_docstring(ast.parse(source(root, file))) or "").splitlines()
        if not lines or not lines[0].startswith(f"Chapter {chapter(file)}: "):
            complaints.append(f"{file}: the docstring does not begin with Chapter {chapter(file)}:")
        same_folder = [Path(kin).name for kin in entry.kin if chapter(kin) == chapter(file)]
        elders = [f"chapter {chapter(kin)}" for kin in entry.kin if chapter(kin) < chapter(file)]
        since = [f"Since {kin}: " for kin in elders + same_folder]
        if since and (lines[1:2] != [""] or not lines[2].startswith(tuple(since))):
            complaints.append(f"{file}: the docstring's third line begins with none of {since}")
    return complaints


def foreign_imports(root: Path, table: dict[str, Entry]) -> list[str]:
    """Complaints about imports, anywhere in a file, of more than torch and the standard library."""
    complaints = []
    for file in table:
        tree = ast.parse(source(root, file))
        in_main = {
            inner
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.name == "main"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = ["." if node.level else node.module.split(".")[0]]
            else:
                continue
            allowed = {"torch"} | (sys.stdlib_module_names - {"typing"})
            if file.startswith(LOADS_CHECKPOINTS):
                allowed |= {"safetensors"}
            if node in in_main:
                allowed |= {"tokenizers", "tiktoken"}
            complaints += [f"{file}:{node.lineno}: {m}" for m in modules if m not in allowed]
    return complaints


def long_lines(root: Path, table: dict[str, Entry]) -> list[str]:
    """Complaints about lines that a reader has to scroll."""
    return [
        f"{file}:{number}: {len(line)} columns"
        for file in table
        for number, line in enumerate(source(root, file).splitlines(), 1)
        if len(line) > COLUMNS
    ]


def letters_without_legend(root: Path, table: dict[str, Entry]) -> list[str]:
    """Complaints about axis letters that the module docstring does not explain."""
    complaints = []
    for file in table:
        text = source(root, file)
        legend = set(
            re.findall(r"(?:^ {4}| {2})(\w) {2}\w", ast.get_docstring(ast.parse(text)), re.M)
        )
        used = {letter for _, name in suffix_names(text) for letter in axes(name)}
        complaints += [f"{file}: {letter} is not in the legend" for letter in sorted(used - legend)]
    return complaints


def load(path: Path) -> ModuleType:
    """The module in a file, under a name of its own, whatever else has been imported."""
    name = "lineage_" + "_".join(path.with_suffix("").parts[-2:])
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_small(module: ModuleType, entry: Entry) -> check_shapes:
    """Checks each suffixed name on runs of a small model: whole, in chunks, padded, sampled.

    Returns the checker. Raises AssertionError for a name that lies.
    """
    tokens_BT = torch.randint(50, (3, 9))
    n_pad_B = torch.tensor([0, 2, 5])
    with check_shapes(module, **entry.sizes) as checker, torch.no_grad():
        for cfg in entry.small(module):
            model = module.Transformer(cfg).eval()
            model(tokens_BT)
            cache = model.new_cache()
            for chunk_BT in tokens_BT.split((5, 3, 1), dim=1):
                model(chunk_BT, cache)
            model(tokens_BT, model.new_cache(n_pad_B))
            for temperature in (0.0, 1.0):
                sampling = {"temperature": temperature, "top_k": 7, "top_p": 0.9}
                list(module.generate(model, tokens_BT, 3, n_pad_B=n_pad_B, **sampling))
    return checker


def run_alone(path: Path, folder: Path) -> subprocess.CompletedProcess:
    """Copies one file to an empty folder and runs it there without arguments."""
    folder.mkdir(parents=True)
    shutil.copy(path, folder)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}  # two of these at a time
    return subprocess.run(
        [sys.executable, path.name],
        cwd=folder,
        env=env,
        capture_output=True,
        encoding="utf-8",
        timeout=DEMO_SECONDS,
        stdin=subprocess.DEVNULL,
    )


# The files as they are


@pytest.mark.parametrize(
    "check",
    [unlisted, drift, over_budget, untold, foreign_imports, long_lines, letters_without_legend],
)
def test_the_lineage_holds(check: Callable[[Path, dict[str, Entry]], list[str]]) -> None:
    """Guards the book's main promise: a diff shows one idea, and nothing else."""
    complaints = check(ROOT, LINEAGE)
    assert not complaints, "\n".join(complaints)


each_file = pytest.mark.parametrize("file", LINEAGE)


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """The demo of each file, running in a process of its own, two at a time."""
    folder = tmp_path_factory.mktemp("alone")
    with ThreadPoolExecutor(2) as pool:
        yield {
            file: pool.submit(run_alone, ROOT / file, folder / Path(file).stem) for file in LINEAGE
        }


@each_file
def test_suffixes_are_true(file: str) -> None:
    """Guards the names: every suffixed parameter and local is seen, with the axes it claims."""
    checker = run_small(load(ROOT / file), LINEAGE[file])
    assert checker.n_checked > 100
    assert {(f, name) for f, name in checker.missing() if f != "main"} == set()


@each_file
def test_parameters_have_the_agreed_names(file: str) -> None:
    """Guards rule 6: projections named as in checkpoints, and one set of names for the stem."""
    module = load(ROOT / file)
    models = [module.Transformer(cfg) for cfg in LINEAGE[file].small(module)]
    attention = r"attn\.([qkvo]_proj|(q|kv)_[ab]_proj|\w+_norm)"
    network = r"mlp\.((experts\.\d+\.|shared\.)?(gate|up|down)_proj|router|shared\.out_gate)"
    norms = r"(attn|mlp)_(out_)?norm"
    stem = r"embed|pos_embed|norm|head"
    known = rf"({stem}|blocks\.\d+\.({attention}|{network}|{norms}))\.(weight|bias)|.*choice_bias"
    found = list(dict.fromkeys(name for model in models for name, _ in model.named_parameters()))
    assert [name for name in found if not re.fullmatch(known, name)] == []
    projections = {part for name in found for part in name.split(".") if part.endswith("_proj")}
    keys = {"kv_a_proj", "kv_b_proj"} if file == DEEPSEEK else {"k_proj", "v_proj"}
    assert {"q_proj", "o_proj", "up_proj", "down_proj"} | keys <= projections
    if file.startswith("ch08"):
        names = module.HF_NAMES
        patterns = {re.sub(r"(?<=\.)\d+(?=\.)", "{}", name) for name in found}
        assert patterns - names.keys() == set()
        for name, theirs in names.items():  # Mixtral's files call projections w1, w2 and w3
            theirs = theirs.replace("_with_mqa", "").split(".")[-2]
            assert not theirs.endswith("_proj") or name.split(".")[-2] == theirs


def parameters(function: Callable) -> str:
    """The parameters as they are written, "a, b=0", without types."""
    plain = inspect.signature(function).parameters.values()
    return ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in plain)


@each_file
def test_interface(file: str) -> None:
    """Guards the names by which notebooks, exercises and other programs call each file."""
    module = load(ROOT / file)
    fields = {field.name for field in dataclasses.fields(module.Config)}
    assert fields >= {"vocab_size", "n_layers", "d_model", "n_heads", "head_dim"}
    assert module.Config.__dataclass_params__.frozen
    model = module.Transformer
    assert parameters(model) == "cfg"
    assert parameters(model.forward).startswith("self, tokens_BT, cache=None, last_only=False")
    assert parameters(model.new_cache).startswith("self, n_pad_B=None")
    assert parameters(module.generate).startswith(
        "model, tokens_BT, n_new, temperature=0.0, top_k=None, top_p=None, seed=0, n_pad_B=None, "
        "cache=None"
    )
    assert parameters(module.LayerCache.n_bytes) == "self"
    assert parameters(module.main) == ""
    if file.startswith(LOADS_CHECKPOINTS):
        assert "max_seq_len" in fields
        assert parameters(module.config_from_hf) == "hf"
        assert parameters(module.convert) == "weights"
        assert parameters(module.load_weights) == "model, weights"
        assert isinstance(module.HF_NAMES, dict)
    else:
        assert not hasattr(module, "load_weights")  # these chapters' shapes have no checkpoint


@each_file
def test_runs_alone(file: str, alone: dict[str, Future]) -> None:
    """Guards "copy one file, and it runs", and the demo itself."""
    done = alone[file].result()
    assert done.returncode == 0, done.stderr
    assert re.search(r"[\d,]+ parameters", done.stdout)


@each_file
@pytest.mark.parametrize(
    "wrong", [["--n-new", "0"], ["--prompt", ""], ["--temperature", "-1"]], ids=lambda w: w[0]
)
def test_wrong_arguments_are_one_line(
    file: str, wrong: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Guards what a hurried person types: exit code 2 and a line, before any model is built."""
    module = load(ROOT / file)
    monkeypatch.setattr("sys.argv", [file, *wrong])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and re.fullmatch(r"error: .*\n", printed.err)


@pytest.mark.parametrize("path", sorted(ROOT.glob("ch0*/*.ipynb")), ids=lambda path: path.stem)
def test_notebook_computes_its_diff(path: Path) -> None:
    """Guards rule 5: a diff in a notebook comes from the files, since a pasted one goes stale."""
    cells = nbformat.read(path, as_version=4).cells
    assert not any(re.search(r"^(@@ -|```diff)", cell.source, re.MULTILINE) for cell in cells)
    if path.parent.name != Path(GPT2).parent.name:  # GPT-2 has no parent
        code = "".join(cell.source for cell in cells if cell.cell_type == "code")
        assert "difflib" in code or "show_diff(" in code


# The checks themselves, on copies that drift

CHILD = LLAMA3
PARENT = LINEAGE[CHILD].parent


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with a copy of all files of the lineage."""
    for file in LINEAGE:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def edit(root: Path, file: str, old: str, new: str) -> None:
    text = source(root, file)
    assert old in text, f"{file} has no {old!r}: choose another line for this test"
    (root / file).write_text(text.replace(old, new, 1), encoding="utf-8", newline="\n")


def test_a_changed_line_in_a_shared_function_is_seen(copy: Path) -> None:
    """Guards `drift`: one edited expression in a function that no list names."""
    edit(copy, CHILD, "if temperature == 0:", "if temperature <= 0:")
    assert f"{CHILD}: sample differs from {PARENT}'s" in drift(copy, LINEAGE)


def test_a_changed_comment_is_seen(copy: Path) -> None:
    """Guards `drift`: comments, decorators and docstrings are part of the text."""
    edit(copy, CHILD, "# norm weights stay at one", "# norms stay at one")
    assert f"{CHILD}: Transformer.init_weights differs from {PARENT}'s" in drift(copy, LINEAGE)
    edit(copy, CHILD, "@torch.no_grad()\ndef generate", "# why\n@torch.no_grad()\ndef generate")
    assert f"{CHILD}: generate differs from {PARENT}'s" in drift(copy, LINEAGE)


def test_a_name_that_no_longer_differs_is_seen(copy: Path) -> None:
    """Guards `drift`: the lists stay true in both directions."""
    child, parent = units(source(copy, CHILD)), units(source(copy, PARENT))
    edit(copy, CHILD, child["attend"], parent["attend"])
    edit(copy, CHILD, child["Block.__init__"], parent["Block.__init__"])
    complaints = drift(copy, LINEAGE)
    for name in ("attend", "Block.__init__"):
        expected = f"{CHILD}: {name}, listed as changed from {PARENT}, does not differ"
        assert expected in complaints


def test_a_listed_name_that_is_gone_is_seen(copy: Path) -> None:
    """Guards `drift`: a function renamed in the child leaves its entry behind."""
    edit(copy, CHILD, "def attend(", "def attends(")
    expected = f"{CHILD}: attend, listed as changed from {PARENT}, is not in both"
    assert expected in drift(copy, LINEAGE)


def test_a_new_file_and_a_new_parent_are_seen(copy: Path) -> None:
    """Guards `unlisted`: a file that nobody entered, and a parent that is gone."""
    shutil.copy(copy / CHILD, copy / Path(CHILD).with_name("twin.py"))
    (copy / NORMS).unlink()
    complaints = unlisted(copy, LINEAGE)
    assert "ch08_full_models/twin.py: not in LINEAGE" in complaints
    assert f"{NORMS}: in LINEAGE, but not there" in complaints
    assert f"{CHILD}: its parent is {MOE}, LINEAGE says {NORMS}" in complaints


@pytest.mark.parametrize(
    ("check", "old", "new"),
    [
        (over_budget, "\n\ndef main", "\n" + "# padding\n" * 200 + "\n\ndef main"),
        (untold, '"""Chapter 8: ', '"""Models: '),
        (untold, "Since chapter ", "After chapter "),
        (foreign_imports, "import torch\n", "import numpy\nimport torch\n"),
        (foreign_imports, "import torch\n", "import torch\nfrom ch01_gpt2.gpt2 import MLP\n"),
        (foreign_imports, "import torch\n", "import torch\nfrom .gpt2 import MLP\n"),
        (foreign_imports, "    generator = ", "    import tokenizers\n    generator = "),
        (long_lines, "import torch\n", "import torch" + " " * 90 + "\n"),
        (letters_without_legend, "mask_BTS =", "mask_BTZ ="),
    ],
)
def test_each_complaint_can_be_made(
    copy: Path, check: Callable[[Path, dict[str, Entry]], list[str]], old: str, new: str
) -> None:
    """Guards the other checks: each finds what it is there to find."""
    table = {file: LINEAGE[file] for file in (PARENT, CHILD)}
    before = check(copy, table)
    edit(copy, CHILD, old, new)
    assert len(set(check(copy, table)) - set(before)) == 1


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        ("Attention.forward", "y_BTHK", "y_BTKH"),
        ("Attention.forward", "x_BTD", "x_BDT"),
        ("sample", "kth_B1", "kth_BV"),
        ("rope", "a_BTHP", "a_BTHPK"),
    ],
)
def test_a_false_suffix_is_seen(copy: Path, function: str, old: str, new: str) -> None:
    """Guards tests/shapes.py: swapped axes, a wrong parameter, a wrong 1, too many letters."""
    text = units(source(copy, CHILD))[function]
    edit(copy, CHILD, text, re.sub(rf"\b{old}\b", new, text))
    with pytest.raises(AssertionError, match=rf"{re.escape(function)}: {new} has shape"):
        run_small(load(copy / CHILD), LINEAGE[CHILD])


def test_a_file_that_needs_its_neighbour_is_seen(copy: Path, tmp_path: Path) -> None:
    """Guards `run_alone`: a module that lies beside the file in the repository is not there."""
    (copy / "ch08_full_models" / "beside.py").touch()
    edit(copy, CHILD, "import torch\n", "import beside\nimport torch\n")
    done = run_alone(copy / CHILD, tmp_path / "alone")
    assert done.returncode != 0
    assert "No module named 'beside'" in done.stderr


# The suffix checker on things that no file does yet

ODD = """
def pairs(x_BT):
    both_BT = (x_BT, x_BT[:, :2])
    return both_BT

def column(x_BT):
    part_1, last_B1, unused_BT = x_BT[0], x_BT[:, -1:], None
    return [row_T.sum() for row_T in x_BT]

def halves(x_BT):
    for half_BT in x_BT.chunk(2, dim=1):
        yield half_BT
"""


@pytest.fixture
def odd(tmp_path: Path) -> ModuleType:
    (tmp_path / "odd.py").write_text(ODD, encoding="utf-8")
    return load(tmp_path / "odd.py")


def test_tensors_in_a_tuple_are_checked(odd: ModuleType) -> None:
    """Guards names that hold several tensors, like what a cache gives back."""
    with pytest.raises(
        AssertionError, match=r"pairs: both_BT has shape \(3, 2\): T is 2 here, 4 in"
    ):
        with check_shapes(odd):
            odd.pairs(torch.zeros(3, 4))


def test_what_was_not_seen_is_missing(odd: ModuleType) -> None:
    """Guards `missing`: names in functions that never ran, and names that held no tensor."""
    with check_shapes(odd) as checker:
        odd.column(torch.zeros(3, 4))
    assert ("column", "last_B1") in checker.seen
    in_others = {("pairs", "x_BT"), ("pairs", "both_BT"), ("halves", "x_BT"), ("halves", "half_BT")}
    assert checker.missing() == {("column", "unused_BT")} | in_others


def test_a_generator_is_checked_at_each_yield(odd: ModuleType) -> None:
    """Guards `generate`, whose tensors change from token to token."""
    with pytest.raises(AssertionError, match="halves: half_BT"):
        with check_shapes(odd):
            next(odd.halves(torch.zeros(3, 4)))


def test_sizes_that_are_given_hold_everywhere(odd: ModuleType) -> None:
    """Guards against names that are wrong in the same way throughout a function."""
    with pytest.raises(AssertionError, match="T is 4 here, 3 in given"):
        with check_shapes(odd, B=4, T=3):
            odd.column(torch.zeros(3, 4))


def test_an_earlier_profiler_comes_back(odd: ModuleType) -> None:
    """Guards whoever profiles the tests; and the run's own error is not hidden behind a lie."""
    before = sys.getprofile()
    calls: list[str] = []
    mine = lambda frame, event, arg: calls.append(event)  # noqa: E731
    sys.setprofile(mine)
    try:
        with pytest.raises(ZeroDivisionError), check_shapes(odd):
            odd.pairs(torch.zeros(3, 4))
            _ = 1 / 0
        assert sys.getprofile() is mine
    finally:
        sys.setprofile(before)
