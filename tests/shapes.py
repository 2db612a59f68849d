"""Checks, on a real run, that every tensor named x_ABC has the axes its name says.

    with check_shapes(gpt2, D=24, H=4) as seen:
        gpt2.Transformer(cfg)(tokens_BT)
    assert seen.missing() == set()

Each time a function of the given modules returns or yields, its parameters and locals are read.
Within one call a letter stands for one size; letters given as keywords have that size in every
call, which also catches names that are wrong in the same way (H and K swapped throughout, say). A
digit is an axis of that length: 1 for a broadcast axis. A tuple or list under such a name answers
for each of its tensors. What a comprehension names is read as the comprehension ends.

A suffix proves a shape, not what the axis means: give all axes of a test different lengths.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType

from torch import Tensor

SUFFIX = re.compile(r"_((?=[A-Z0-9]*[A-Z])[A-Z0-9]+)$")  # not of `part_1`, which names no axis


def axes(name: str) -> str | None:
    """The axes that a name claims, "BTHK" of q_BTHK; None if it claims none."""
    match = SUFFIX.search(name)
    return match[1] if match else None


def tensors(value: object) -> Iterator[Tensor]:
    """The tensor, or those in a tuple or list, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def suffix_names(source: str) -> set[tuple[str, str]]:
    """(function, name) of every suffixed parameter and local in a module's source.

    Names inside a lambda or a comprehension are left out: how they can be seen differs between
    Python versions.
    """
    found: set[tuple[str, str]] = set()

    def visit(node: ast.AST, stem: str, function: str | None) -> None:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            inner = f"{stem}{node.name}"
            is_function = isinstance(node, ast.FunctionDef)
            for child in ast.iter_child_nodes(node):
                stem_inside = f"{inner}.<locals>." if is_function else f"{inner}."
                visit(child, stem_inside, inner if is_function else None)
            return
        if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp)):
            return
        if isinstance(node, ast.GeneratorExp):
            return
        name = node.arg if isinstance(node, ast.arg) else None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        if function and name and axes(name):
            found.add((function, name))
        for child in ast.iter_child_nodes(node):
            visit(child, stem, function)

    visit(ast.parse(source), "", None)
    return found


class check_shapes:  # noqa: N801  used as a statement, like pytest.raises
    """Context manager. Raises AssertionError on leaving, with a line for each name that lies."""

    def __init__(self, *modules: ModuleType, **sizes: int) -> None:
        self.files = {module.__file__ for module in modules}
        self.sizes = sizes
        self.seen: set[tuple[str, str]] = set()  # (function, name) of all tensors looked at
        self.n_checked = 0
        self.lies: dict[tuple[str, str], str] = {}  # the first of each name

    def __enter__(self) -> "check_shapes":
        self.previous = sys.getprofile()
        sys.setprofile(self.look)
        return self

    def __exit__(self, kind: type | None, error: object, traceback: object) -> None:
        sys.setprofile(self.previous)
        if kind is None and self.lies:  # else the run's own error matters more
            lies = (f"{function}: {name} {lie}" for (function, name), lie in self.lies.items())
            raise AssertionError("\n".join(lies))

    def look(self, frame: FrameType, event: str, arg: object) -> None:
        """Reads the function that is about to return or yield."""
        if event != "return" or frame.f_code.co_filename not in self.files:
            return
        function = frame.f_code.co_qualname
        sizes = {letter: (size, "given") for letter, size in self.sizes.items()}
        for name, value in frame.f_locals.items():
            if claimed := axes(name):
                for tensor in tensors(value):
                    self.seen.add((function, name))
                    self.n_checked += 1
                    if lie := misfit(claimed, tuple(tensor.shape), sizes, name):
                        shape = tuple(tensor.shape)
                        self.lies.setdefault((function, name), f"has shape {shape}: {lie}")

    def missing(self) -> set[tuple[str, str]]:
        """(function, name) of the suffixed names in the source that no call has shown."""
        texts = [Path(file).read_text(encoding="utf-8") for file in self.files]
        return set().union(*map(suffix_names, texts)) - self.seen


def misfit(
    claimed: str, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]], name: str
) -> str | None:
    """What is wrong with the shape under this name, or None. Binds letters in `sizes`."""
    if len(claimed) != len(shape):
        return f"{len(claimed)} axes in the name, {len(shape)} in the tensor"
    for letter, size in zip(claimed, shape, strict=True):
        if letter.isdigit():
            expected, source = int(letter), "its name"
        else:
            expected, source = sizes.setdefault(letter, (size, name))
        if size != expected:
            return f"{letter} is {size} here, {expected} in {source}"
    return None
