"""What an exercise is, and the text work around it: stubs, mistakes put in, answers cut out.

A chapter's `exercises.toml` lists its exercises. Each names a function, class or method of one of
the chapter's files, which is the reference; from it come the stub that a learner fills, and the
mutants: the reference with one typical mistake. `tests/cases/chNN.py` holds the inputs. A hand-out
has `exercises.json` instead, which gives nothing away.
"""

import ast
import json
import re
import textwrap
import tomllib
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIFFICULTIES = ("easy", "medium", "hard", "design")
STUB = 'raise NotImplementedError("{} is not written yet")  # your code here'


class ExerciseError(Exception):
    """Something that the person at the keyboard can put right; the message is one line."""


Edits = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Mutant:
    """A typical mistake: find-and-replace on the reference, and what to tell who made it."""

    name: str
    says: str
    replace: Edits


@dataclass(frozen=True)
class Variant:
    """Another convention for the same task, so that last year's answer is wrong."""

    says: str
    replace: Edits


@dataclass(frozen=True)
class Exercise:
    """One exercise. `checks` maps each check to its points; the first decides about the others."""

    chapter: str  # the folder, ch03_gqa
    name: str  # unique in the book
    target: str  # attend, LayerNorm or LayerCache.append
    file: str  # of the chapter, gqa.py
    title: str
    task: str
    minutes: int
    difficulty: str
    hints: tuple[str, ...]
    forbidden: dict[str, str]  # dotted name -> why not
    checks: dict[str, int]
    mutants: tuple[Mutant, ...]
    variant: Variant | None = None
    tolerance: float = 1e-5  # of the largest expected number of a tensor, or of 1 if that is more
    gives: tuple[str, ...] = field(default=())  # names of the file that stubs import besides

    @property
    def points(self) -> int:
        return sum(self.checks.values())

    @property
    def module(self) -> str:
        return f"{self.chapter}.{Path(self.file).stem}"


# Reading exercises.toml


def chapter_folder(name: str, root: Path = ROOT) -> str:
    """The folder of "ch03", "3" or "ch03_gqa". Raises ExerciseError if there is none."""
    chapters = chapter_folders(root)
    number = re.fullmatch(r"(?:ch)?0?(\d)(?:_\w+)?", name)
    for folder in chapters:
        if folder == name or (number and folder.startswith(f"ch0{number[1]}_")):
            return folder
    raise ExerciseError(f"{name}: no such chapter; expected one of {', '.join(chapters)}")


def chapter_folders(root: Path = ROOT) -> list[str]:
    """Every chapter that has exercises, in order."""
    paths = [*root.glob("ch0*/exercises.toml"), *root.glob("ch0*/exercises.json")]
    return sorted({path.parent.name for path in paths})


@cache
def load(chapter: str, root: Path = ROOT) -> tuple[Exercise, ...]:
    """The exercises of a chapter's folder. Raises ExerciseError for a file that is not right."""
    path = root / chapter / "exercises.toml"
    if not path.is_file():
        path = path.with_suffix(".json")
    read = json.loads if path.suffix == ".json" else tomllib.loads
    try:
        listed = read(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExerciseError(f"{path}: {error}") from None
    default = f"{chapter.split('_', 1)[1]}.py"
    return tuple(read_one(entry, chapter, default, path) for entry in listed["exercise"])


def read_one(entry: dict, chapter: str, default_file: str, path: Path) -> Exercise:
    where = f"{path}, exercise {entry.get('name', '?')}"
    try:
        variant = entry.get("variant")
        exercise = Exercise(
            chapter=chapter,
            name=entry["name"],
            target=entry.get("target", entry["name"]),
            file=entry.get("file", default_file),
            title=entry["title"],
            task=textwrap.dedent(entry["task"]).strip(),
            minutes=entry["minutes"],
            difficulty=entry["difficulty"],
            hints=tuple(textwrap.dedent(hint).strip() for hint in entry["hints"]),
            forbidden=entry.get("forbidden", {}),
            checks=entry["checks"],
            mutants=tuple(
                Mutant(m["name"], textwrap.dedent(m["says"]).strip(), edits(m["replace"]))
                for m in entry["mutant"]
            ),
            variant=variant
            and Variant(textwrap.dedent(variant["says"]).strip(), edits(variant["replace"])),
            tolerance=entry.get("tolerance", 1e-5),
            gives=tuple(entry.get("gives", ())),
        )
    except KeyError as error:
        raise ExerciseError(f"{where}: the key {error} is missing") from None
    if exercise.difficulty not in DIFFICULTIES:
        raise ExerciseError(f"{where}: difficulty {exercise.difficulty}, not of {DIFFICULTIES}")
    points = list(exercise.checks.values())
    if not points or any(type(n) is not int or n < 1 for n in points):
        raise ExerciseError(f"{where}: checks {exercise.checks}, expected whole points from 1")
    return exercise


def edits(pairs: list) -> Edits:
    return tuple((old, new) for old, new in pairs)


def find(name: str, root: Path = ROOT) -> Exercise:
    """The exercise of that name. Raises ExerciseError with the nearest names if there is none."""
    import difflib

    known = {e.name: e for chapter in chapter_folders(root) for e in load(chapter, root)}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 3, 0.5) or sorted(known)[:3]
    raise ExerciseError(f"{name}: no such exercise; did you mean {', '.join(near)}?")


# Finding and changing pieces of a source


Definition = ast.FunctionDef | ast.ClassDef


@lru_cache(maxsize=512)
def parse(source: str) -> ast.Module:
    """The tree of a source. It is shared, so nobody may change it."""
    return ast.parse(source)


def definition(body: list[ast.stmt], target: str) -> Definition | None:
    """The node of `attend` or `LayerCache.append` in a module's body; the last, if several."""
    first, _, rest = target.partition(".")
    nodes = [
        node
        for node in body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == first
    ]
    if not rest:
        return nodes[-1] if nodes else None
    # Two methods of one class may stand in two cells, each in a class statement of its own.
    inside = [definition(node.body, rest) for node in nodes if isinstance(node, ast.ClassDef)]
    return next((node for node in reversed(inside) if node is not None), None)


def span(node: Definition) -> tuple[int, int]:
    """The node's first line, decorators included, and the one after its last; counted from 0."""
    return min(d.lineno for d in [*node.decorator_list, node]) - 1, node.end_lineno


def segment(source: str, target: str) -> str:
    """The lines of a definition as they stand. Raises ExerciseError if it is not there."""
    node = definition(parse(source).body, target)
    if node is None:
        raise ExerciseError(f"{target} is not in the source")
    start, end = span(node)
    return "".join(source.splitlines(keepends=True)[start:end])


def replaced(source: str, target: str, changes: Edits) -> str:
    """The source with edits inside one definition. Each must fit there exactly once."""
    old = new = segment(source, target)
    for find_text, put in changes:
        if (n := new.count(find_text)) != 1:
            raise ExerciseError(f"{target}: {find_text!r} is there {n} times, expected once")
        new = new.replace(find_text, put)
    return source.replace(old, new, 1)


def blanked(source: str, targets: list[str]) -> str:
    """The source with the bodies of these definitions gone; signatures and docstrings stay."""
    lines = source.splitlines()
    cuts: list[tuple[int, int, str]] = []
    for target in targets:
        node = definition(parse(source).body, target)
        if node is None:
            raise ExerciseError(f"{target} is not in the source")
        functions = [node] if isinstance(node, ast.FunctionDef) else methods(node)
        for function in functions:
            first = function.body[0]
            keep = first.end_lineno if ast.get_docstring(function) else first.lineno - 1
            indent = " " * first.col_offset
            cuts.append((keep, function.end_lineno, indent + STUB.format(target)))
    for keep, end, stub in sorted(set(cuts), reverse=True):
        lines[keep:end] = [stub]
    return "\n".join(lines) + "\n"


def without_twins(sources: dict[str, str], exercise: Exercise, reference: str) -> dict[str, str]:
    """The sources with gaps where another file holds the exercise's function, word for word."""
    wanted = segment(reference, exercise.target)
    found = {}
    for name, source in sources.items():
        node = definition(parse(source).body, exercise.target)
        twin = name != exercise.module and node is not None
        if twin and segment(source, exercise.target) == wanted:
            source = blanked(source, [exercise.target])
        found[name] = source
    return found


def methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [child for child in node.body if isinstance(child, ast.FunctionDef)]


def is_blank(node: Definition) -> bool:
    """Whether the body is still the stub's: a docstring at most, and one raise, pass or `...`."""
    if isinstance(node, ast.ClassDef):
        return all(map(is_blank, methods(node)))
    body = [s for s in node.body if not (isinstance(s, ast.Expr) and is_text(s.value))]
    if len(body) > 1:
        return False
    last = body[0] if body else ast.Pass()
    if isinstance(last, ast.Raise):
        return "NotImplementedError" in ast.unparse(last)
    return isinstance(last, ast.Pass) or ast.unparse(last) == "..."


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


# The stubs


def reference_source(exercise: Exercise, root: Path = ROOT, variant: bool = False) -> str:
    """The source of the file that holds the reference, in the variant's convention if asked."""
    source = (root / exercise.chapter / exercise.file).read_text(encoding="utf-8")
    if variant and exercise.variant:
        source = replaced(source, exercise.target, exercise.variant.replace)
    return source


def stubs(chapter: str, root: Path = ROOT, variant: bool = False) -> str:
    """The text of exercises.py: every exercise of the chapter without its solution."""
    exercises = load(chapter, root)
    pieces: list[str] = []
    written: set[tuple[str, str]] = set()
    for number, exercise in enumerate(exercises, 1):
        top = exercise.target.split(".")[0]
        head = (
            f"# {number}. {exercise.name}: {exercise.title}"
            f" ({exercise.points} points, {exercise.minutes} minutes, {exercise.difficulty})\n"
        )
        if (exercise.file, top) in written:  # a second method of a class that is there already
            continue
        written.add((exercise.file, top))
        same = [e for e in exercises if (e.file, e.target.split(".")[0]) == (exercise.file, top)]
        source = reference_source(exercise, root, variant)
        for other in same[1:]:
            head += f"#    {other.name}: {other.target}, {other.points} points\n"
            if variant and other.variant:
                source = replaced(source, other.target, other.variant.replace)
        pieces.append(head + segment(blanked(source, [e.target for e in same]), top))
    number, topic = int(chapter[2:4]), chapter.split("_", 1)[1]
    head = (
        f'"""Chapter {number}, exercises: telling parts of the chapter to be written by you.\n'
        f"\n"
        f"    python -m tests start ch{number:02d}    copies this file to {chapter}/my_{topic}.py\n"
        f"    python -m tests check ch{number:02d}    says what is right, and what is not\n"
        f"\n"
        f"Made from the chapter's files by `python -m tests start ch{number:02d} --stubs`.\n"
        f'"""\n\n'
    )
    return head + stub_imports(chapter, root, variant) + "\n\n\n" + "\n\n".join(pieces)


def stub_imports(chapter: str, root: Path = ROOT, variant: bool = False) -> str:
    """The imports that the answers will need: as far as the references use them."""
    exercises = load(chapter, root)
    imports: dict[str, None] = {}
    given: dict[str, set[str]] = {}
    tops = {exercise.target.split(".")[0] for exercise in exercises}
    for exercise in exercises:
        tree = parse(reference_source(exercise, root, variant))
        used = used_names(definition(tree.body, exercise.target.split(".")[0]))
        imports |= dict.fromkeys(import_lines(tree, used | {"torch", "Tensor"}))
        names = top_names(tree, exercise.module)
        for name in (used | set(exercise.gives)) & names.keys() - tops:
            given.setdefault(names[name], set()).add(name)
    lines = sorted(imports, key=lambda line: (line.startswith("from"), line))
    local = [line for line in lines if line.startswith("import ch0")]
    lines = [line for line in lines if line not in local]
    local += [from_line(module, names) for module, names in sorted(given.items()) if names]
    standard = [line for line in lines if not re.match(r"(from|import) (torch|safetensors)", line)]
    others = [line for line in lines if line not in standard]
    return "\n\n".join("\n".join(block) for block in (standard, others, local) if block)


def import_lines(tree: ast.Module, used: set[str]) -> list[str]:
    """The module's imports of others than chapters, one line each, as far as they are used."""
    found = []
    for node in tree.body:
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        if isinstance(node, ast.ImportFrom) and node.module.startswith(("ch0", "tests")):
            continue
        names = [a for a in node.names if (a.asname or a.name.split(".")[0]) in used]
        if names:
            text = ", ".join(ast.unparse(alias) for alias in names)
            start = f"from {node.module} import" if isinstance(node, ast.ImportFrom) else "import"
            found.append(f"{start} {text}")
    return found


def top_names(tree: ast.Module, module: str) -> dict[str, str]:
    """Name -> where it is defined, for what a module defines or takes from another chapter."""
    names: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = module
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {t.id: module for t in targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("ch0"):
            names |= {
                alias.name: node.module
                for alias in node.names
                if alias.asname in (None, alias.name)
            }
    return names


def used_names(node: ast.AST) -> set[str]:
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


def from_line(module: str, names: set[str]) -> str:
    """The import, its names in the order that isort likes: CONSTANTS, Classes, functions."""
    ordered = sorted(names, key=lambda n: (not n.isupper(), n[:1].islower(), n))
    line = f"from {module} import {', '.join(ordered)}"
    if len(line) <= 100:
        return line
    return f"from {module} import (\n" + "".join(f"    {n},\n" for n in ordered) + ")"


# What a learner may not use


def forbidden_uses(source: str, exercise: Exercise) -> list[tuple[int, str, str]]:
    """(line, what stands there, why not) for every forbidden name that the answer reaches.

    Looked at are the exercise's own code and whatever of the file it uses by name, as deep as that
    goes. Aliases are followed (`import torch.nn.functional as F`), and a name inside a string
    counts, as in getattr.
    """
    tree = parse(source)
    aliases = import_aliases(tree)
    last_names = {name.rsplit(".", 1)[-1]: name for name in exercise.forbidden}
    found: dict[tuple[int, str], str] = {}
    for node in reached(tree, exercise.target):
        for child in ast.walk(node):
            if isinstance(child, (ast.Name, ast.Attribute)):
                dotted = full_name(child, aliases)
                last = child.attr if isinstance(child, ast.Attribute) else dotted.rsplit(".", 1)[-1]
                for name, why in exercise.forbidden.items():
                    # A bare name stands for a function and for a method: x.repeat_interleave().
                    if name in (dotted, last):
                        found[child.lineno, ast.unparse(child)] = why
            elif is_text(child) and child.value in last_names:
                name = last_names[child.value]
                found[child.lineno, repr(child.value)] = exercise.forbidden[name]
    return sorted((line, text, why) for (line, text), why in found.items())


def import_aliases(tree: ast.Module) -> dict[str, str]:
    """Local name -> dotted name, for every import in the source."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                aliases[name] = alias.name if alias.asname else name
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return aliases


def full_name(node: ast.expr, aliases: dict[str, str]) -> str:
    """torch.nn.functional.gelu of F.gelu; "" where the start is not a name."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        start = full_name(node.value, aliases)
        return start and f"{start}.{node.attr}"
    return ""


def reached(tree: ast.Module, target: str) -> list[ast.AST]:
    """The target's node and the top-level statements that it uses by name, directly or not."""
    named: dict[str, list[ast.AST]] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            named.setdefault(node.name, []).append(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for t in targets:
                for name in used_names(t):
                    named.setdefault(name, []).append(node)
    start = definition(tree.body, target)
    first = target.split(".")[0]
    todo, seen = [start] if start else [], []
    if start and "." in target:  # methods that the learner added are part of the answer
        todo += [
            node
            for node in definition(tree.body, first).body
            if not isinstance(node, ast.FunctionDef) or f"self.{node.name}" in ast.unparse(start)
        ]
    while todo:
        node = todo.pop()
        if any(node is other for other in seen):
            continue
        seen.append(node)
        for name in used_names(node) - {first}:
            todo += named.get(name, [])
    return seen
