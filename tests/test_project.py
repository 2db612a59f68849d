"""What no single file can promise: the README's commands, the pins, safe and portable code."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ch01_gpt2.train import result_path

ROOT = Path(__file__).parent.parent
TEST_COMMAND = "pip install -r requirements.txt && pytest"
MAIN_COMMAND = 'pip install -r requirements.txt && python -m ch08_full_models "'  # then a prompt

BINARY = {".png", ".pdf", ".ico", ".gz", ".zip"}
# The last is the reference: only what compares with it may import it.
BANNED_IMPORTS = {
    "tensorflow",
    "lightning",
    "pytorch_lightning",
    "einops",
    "pickle",
    "transformers",
}


def project_files() -> list[Path]:
    """Every file that git has or would add; without git, all but hidden ones and environments."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
        files = [ROOT / name for name in listed.decode("utf-8").split("\0") if name]
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy without its history
        files = [
            path
            for top in ROOT.iterdir()
            if not top.name.startswith((".", "venv", "env", "build", "dist"))
            for path in ([top] if top.is_file() else top.rglob("*"))
            if "__pycache__" not in path.parts
        ]
    return sorted(path for path in files if path.is_file())


FILES = project_files()
PYTHON = [path for path in FILES if path.suffix == ".py"]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# What the reader types


def test_readme_gives_the_two_commands() -> None:
    """Guards the two lines that a reader copies, each on a line of its own, to the letter."""
    lines = [line.strip().removeprefix("$ ") for line in text("README.md").splitlines()]
    assert any(re.match(re.escape(TEST_COMMAND) + r"(\s{2,}|\s*#|$)", line) for line in lines)
    assert any(line.startswith(MAIN_COMMAND) for line in lines)


@pytest.mark.parametrize("name", [".ci/run", ".github/workflows/ci.yml"])
def test_ci_runs_the_readme_command(name: str) -> None:
    """Guards that CI tests what the README says, not something that only CI knows."""
    assert re.search(rf"(command='|run: ){re.escape(TEST_COMMAND)}'?$", text(name), re.MULTILINE)


# Versions


def requirements() -> dict[str, Requirement]:
    lines = [line.split("#")[0].strip() for line in text("requirements.txt").splitlines()]
    parsed = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def test_requirements_are_pins_and_end_with_this_project() -> None:
    """Guards that two people who install on different days test the same versions."""
    assert [
        r.name for r in requirements().values() if not re.match("==[0-9.]+$", str(r.specifier))
    ] == []
    assert text("requirements.txt").splitlines()[-1] == "-e ."


def test_pins_lie_inside_the_ranges() -> None:
    """Guards that pyproject's ranges and the tested pins do not drift apart."""
    project = tomllib.loads(text("pyproject.toml"))["project"]
    ranges = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    pins, wrong = requirements(), []
    for wanted in map(Requirement, ranges):
        pin = pins.get(canonicalize_name(wanted.name))
        if pin is None or not wanted.specifier.contains(str(pin.specifier).removeprefix("==")):
            wrong.append(f"{wanted}: {pin or 'no pin'}")
    assert wrong == []
    assert len(ranges) >= 10


def test_every_import_is_a_dependency() -> None:
    """Guards that an install from pyproject alone can import every module outside the tests."""
    import sys
    from importlib.metadata import packages_distributions

    project = tomllib.loads(text("pyproject.toml"))["project"]
    wanted = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    ours = {path.name for path in ROOT.iterdir() if path.is_dir()}
    providers = packages_distributions()
    undeclared = []
    for path in PYTHON:
        for module in imported(ast.parse(path.read_text(encoding="utf-8"))):
            names = {canonicalize_name(name) for name in providers.get(module, [module])}
            if not (
                compares(path)
                or module in sys.stdlib_module_names
                or module in ours | {sibling.stem for sibling in path.parent.glob("*.py")}
                or names & wanted
            ):
                undeclared.append(f"{short(path)}: {module}")
    assert undeclared == []


# The tree


def test_every_package_says_what_it_is() -> None:
    """Guards that a new chapter is a package, so that it is installed and can be imported."""
    folders = [path for path in ROOT.iterdir() if re.fullmatch(r"ch0\d_\w+|tests", path.name)]
    silent = []
    for folder in folders:
        init = folder / "__init__.py"
        if not init.exists() or not ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))):
            silent.append(folder.name)
    assert silent == []
    assert len(folders) >= 3


def test_files_are_utf8_with_lf() -> None:
    """Guards byte identity across systems: the lineage and the vocabularies depend on it."""
    bad = []
    for path in FILES:
        if path.suffix not in BINARY:
            content = path.read_bytes()
            try:
                content.decode("utf-8")
            except UnicodeDecodeError as error:
                bad.append(f"{short(path)}: not UTF-8, byte {error.start}")
            if b"\r" in content:
                bad.append(f"{short(path)}: a carriage return")
    assert bad == []


def test_no_file_is_large() -> None:
    """Guards the clone: weights and data sets are fetched, never committed."""
    limit = 2_000_000  # bytes
    large = [f"{short(path)}: {n:,}" for path in FILES if (n := path.stat().st_size) > limit]
    assert large == []


# The code


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of the modules that a file imports, anywhere in it; not relative imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def is_text_mode(mode: ast.expr | None) -> bool:
    return not (isinstance(mode, ast.Constant) and "b" in str(mode.value))


def without_encoding(call: ast.Call) -> bool:
    """True if the call reads or writes text in whatever encoding the system prefers."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in keywords or None in keywords:  # None: **options, which may hold it
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    n = len(call.args)
    if name == "read_text":
        return n < 1
    if name == "write_text":
        return n < 2
    if name == "open" and isinstance(call.func, ast.Name):
        return is_text_mode(keywords.get("mode") or (call.args[1] if n > 1 else None))
    if name == "open":  # Path.open(mode); with another first argument some archive's open
        mode = keywords.get("mode") or (call.args[0] if n else None)
        is_mode = isinstance(mode, ast.Constant) and re.fullmatch("[rwaxbt+]+", str(mode.value))
        return (mode is None or bool(is_mode)) and is_text_mode(mode)
    switches = [keywords.get("text"), keywords.get("universal_newlines")]  # subprocess
    return any(isinstance(switch, ast.Constant) and switch.value is True for switch in switches)


def compares(path: Path) -> bool:
    """True for the files that set ours beside transformers."""
    return short(path).startswith("tests/") or path.name in ("benchmark.py", "benchmark_gpu.py")


def offences(source: str, may_compare: bool) -> list[str]:
    """What a file does that none may do, each as "line: what"."""
    tree, found = ast.parse(source), []
    for name in sorted(imported(tree) & BANNED_IMPORTS):
        if not (may_compare and name == "transformers"):
            found.append(f"1: imports {name}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called == "torch.load":
            found.append(f"{node.lineno}: {called}()")
        if without_encoding(node):
            found.append(f"{node.lineno}: {called}() without encoding=")
        for keyword in node.keywords if called != "zip" else ():  # its strict is another thing
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if (keyword.arg, value) in {("strict", False), ("shell", True), ("verify", False)}:
                found.append(f"{node.lineno}: {keyword.arg}={value}")
    return found


@pytest.mark.parametrize("path", PYTHON, ids=short)
def test_code_is_safe_and_portable(path: Path) -> None:
    """Guards against pickles, silent loading, shells, and text in a system's own encoding."""
    assert offences(path.read_text(encoding="utf-8"), compares(path)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x.pt')",
        "import pickle",
        "def f():\n    from einops import rearrange",
        "import transformers.models",
        "model.load_state_dict(weights, strict=False)",
        "subprocess.run('ls', shell=True)",
        "subprocess.run(['ls'], text=True)",
        "open('x')",
        "open('x', 'w')",
        "open('x', mode='r')",
        "path.open()",
        "path.open('w')",
        "path.read_text()",
        "path.write_text('x')",
    ],
)
def test_each_offence_is_seen(source: str) -> None:
    """Guards the guard: each thing that is forbidden is found."""
    assert len(offences(source, may_compare=False)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "open('x', 'rb')",
        "open('x', encoding='utf-8')",
        "path.open('wb')",
        "archive.open('member.txt')",
        "path.read_text(encoding='utf-8')",
        "path.write_text('x', 'utf-8')",
        "zip(a, b, strict=False)",
        "model.eval()",
        "subprocess.run(['ls'], text=True, encoding='utf-8')",
    ],
)
def test_what_is_allowed_is_not_an_offence(source: str) -> None:
    """Guards the guard: right code passes."""
    assert offences(source, may_compare=False) == []


# What the experiments leave

EXPERIMENTS = [
    path
    for path in PYTHON
    if path.parent.name.startswith("ch0") and '"--smoke"' in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=short)
def test_a_smoke_run_never_takes_the_records_place(path: Path) -> None:
    """Guards the committed results: without --out, a trial run writes to a name of its own."""
    source = path.read_text(encoding="utf-8")
    assert "result_path(__file__, args.smoke)" in source
    assert not re.search(r'"--out"[^\n]*default=', source)


def test_where_a_record_goes() -> None:
    """Guards the rule above: two names for two kinds of run; git ignores the trial's."""
    record, trial = result_path("a/b.py", smoke=False), result_path("a/b.py", smoke=True)
    assert (record, trial) == (Path("a/b.json"), Path("a/b.smoke.json"))
    assert "*.smoke.json" in text(".gitignore").splitlines()
