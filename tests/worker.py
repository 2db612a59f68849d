"""Runs an answer on inputs and sends back what it returned. It knows no expected result.

Used in two ways. As a script in a child process: it reads `job` in its own folder and writes
answers to its original standard output, while everything that the answer prints goes elsewhere.
And as a module, in the learner's own process, with the same functions.

The module that runs is put together from the chapter's source, in which the exercise's body is
gone, and the learner's definition in its place; everything else in it is the reference's. So an
exercise is judged alone. What else the learner's file defines is there as well, under names that
the chapter does not use.
"""

import ast
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import struct
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import CodeType, ModuleType

import safetensors.torch
import torch
from torch import Tensor

REFERENCE_LINES = 10**6  # added to the line numbers of what is not the learner's
MAX_TEXT = 2_000  # letters of an error's message that are sent
MAX_BYTES = 2**24  # of one string or tensor


# Values as bytes: JSON for the tree, safetensors for the tensors. No pickle, in either direction.


def encode(value: object) -> bytes:
    """A value made of None, bool, int, float, str, list, tuple, dict and Tensor, as bytes.

    Anything else becomes {"$type": its type's name}, so that the reader can say what it was.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(flatten(value, tensors)).encode()
    return struct.pack("<Q", len(tree)) + tree + safetensors.torch.save(tensors)


def flatten(value: object, tensors: dict[str, Tensor]) -> object:
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) is str:
        return value if len(value) <= MAX_BYTES else {"$type": f"str of {len(value)} letters"}
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_complex() or value.is_quantized:
            return {"$type": f"tensor of {value.dtype}, {value.layout}"}
        if value.nbytes > MAX_BYTES:
            return {"$type": f"tensor of {value.nbytes:,} bytes"}
        name = str(len(tensors))
        tensors[name] = value.detach().as_subclass(Tensor).cpu().clone().contiguous()
        return {"$tensor": name}
    if type(value) is list:
        return [flatten(item, tensors) for item in value]
    if type(value) is tuple:
        return {"$tuple": [flatten(item, tensors) for item in value]}
    if type(value) is dict:
        return {"$dict": [[flatten(k, tensors), flatten(v, tensors)] for k, v in value.items()]}
    kind = type(value)
    return {"$type": f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")}


@dataclass(frozen=True)
class Other:
    """Stands for a value of a type that cannot be sent."""

    kind: str


def decode(data: bytes) -> object:
    """What `encode` was given. Raises ValueError for bytes that are not its work."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        tree = json.loads(data[8 : 8 + length])
        return unflatten(tree, safetensors.torch.load(data[8 + length :]))
    except (ValueError, KeyError, TypeError, struct.error, RecursionError) as error:
        raise ValueError(f"not an answer: {error}") from None
    except Exception as error:  # safetensors has an error type of its own
        raise ValueError(f"not an answer: {error}") from None


def unflatten(tree: object, tensors: dict[str, Tensor]) -> object:
    if isinstance(tree, list):
        return [unflatten(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, inner),) = tree.items()
    if kind == "$tensor":
        return tensors[inner]
    if kind == "$tuple":
        return tuple(unflatten(item, tensors) for item in inner)
    if kind == "$dict":
        return {unflatten(k, tensors): unflatten(v, tensors) for k, v in inner}
    if kind == "$type":
        return Other(str(inner)[:200])
    raise ValueError(f"unknown mark {kind!r}")


# The module under test


@dataclass
class Job:
    """What to run: sources, which definitions to take from the submission, and the inputs."""

    modules: dict[str, str]  # ch03_gqa.gqa -> its source
    module: str  # the one that the checks are given
    driver: str  # the source of tests/cases/chNN.py
    exercise: str  # the class in it
    calls: list[tuple[str, dict]]  # (check, inputs)
    submission: str | None = None
    submission_name: str = "submission.py"
    take: dict[str, list[str]] = field(default_factory=dict)  # module -> targets, of the submission
    own: list[str] = field(default_factory=list)  # all exercises' top-level names: never helpers
    lenient: bool = False  # a notebook: statements between the definitions may fail
    extras: dict[str, object] | None = None  # a notebook's globals, in place of a file's statements


class ContextFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves the job's sources as modules, and no other file of the book."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.packages = {name.rpartition(".")[0] for name in job.modules} - {""}

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name in self.job.modules:
            return importlib.machinery.ModuleSpec(name, self)
        if name in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        if name.split(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r} here", name=name)
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        if name in self.packages:
            return
        module.__file__ = f"{name.replace('.', '/')}.py"
        source = self.job.modules[name]
        targets = self.job.take.get(name, [])
        if not targets or self.job.submission is None:
            exec(compiled(source, module.__file__), module.__dict__)
            return
        # First all of the chapter, so that the learner's other statements find what they use; then
        # those; then the chapter once more, with the learner's definitions inside.
        own = ast.parse(self.job.submission)
        exec(compiled(source, module.__file__), module.__dict__)
        if self.job.extras is not None:
            for key, value in self.job.extras.items():
                module.__dict__.setdefault(key, value)
        else:
            run_extras(own, self.job, module)
        tree = ast.increment_lineno(ast.parse(source), REFERENCE_LINES)
        for target in targets:
            put(tree.body, own.body, target)
        exec(compile(tree, self.job.submission_name, "exec"), module.__dict__)


@lru_cache(maxsize=256)
def compiled(source: str, name: str) -> CodeType:
    return compile(source, name, "exec")


def run_extras(tree: ast.Module, job: Job, module: ModuleType) -> None:
    """Runs what the learner's file has besides exercises: imports, constants, helpers."""
    body = [
        node
        for node in tree.body
        if not (isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in job.own)
        and not (isinstance(node, ast.ImportFrom) and node.module == "__future__")
    ]
    for part in [[node] for node in body] if job.lenient else [body]:
        try:
            exec(compile(ast.Module(part, []), job.submission_name, "exec"), module.__dict__)
        except Exception:
            if not job.lenient:
                raise


def put(body: list[ast.stmt], own: list[ast.stmt], target: str) -> None:
    """Puts the learner's definition where the reference's stands. Methods they added come along.

    Raises LookupError where the learner's file lacks it.
    """
    first, _, rest = target.partition(".")
    mine = [n for n in own if getattr(n, "name", None) == first]
    theirs = [i for i, n in enumerate(body) if getattr(n, "name", None) == first]
    if rest:  # a notebook may have a class statement for each of its methods
        mine = [n for n in mine if any(getattr(m, "name", None) == rest for m in n.body)]
    if not mine or not theirs:
        raise LookupError(f"there is no definition of {target}")
    if not rest:
        body[theirs[-1]] = mine[-1]
        return
    put(body[theirs[-1]].body, mine[-1].body, rest)
    known = {getattr(n, "name", None) for n in body[theirs[-1]].body}
    for node in mine[-1].body:
        added = isinstance(node, (ast.FunctionDef, ast.Assign))
        if added and getattr(node, "name", "") not in known:
            body[theirs[-1]].body.append(node)


@contextmanager
def loaded(job: Job) -> Iterator[ModuleType]:
    """The module under test. Meanwhile imports of chapters give the job's sources."""
    finder = ContextFinder(job)
    hidden = {n: m for n, m in sys.modules.items() if n.split(".")[0] in finder.packages}
    for name in hidden:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield importlib.import_module(job.module)
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.split(".")[0] in finder.packages]:
            del sys.modules[name]
        sys.modules |= hidden


def failure(error: BaseException, name: str) -> dict:
    """An exception as a value: its type, its message, and where in the learner's file it arose."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == name and frame.lineno and frame.lineno < REFERENCE_LINES
    ]
    if isinstance(error, SyntaxError) and error.lineno:
        lines.append(error.lineno)
    try:
        message = str(error)[:MAX_TEXT]
    except BaseException:  # an exception can lie about its text, or raise
        message = ""
    return {"error": type(error).__name__, "message": message, "lines": lines}


def answers(job: Job) -> Iterator[dict]:
    """First {"ready": True}, or why not; then for each call what it returned, or the exception.

    Answers are {"out": value, "changed": names of the inputs that were written to}, or what
    `failure` makes of an exception.
    """
    driver: dict[str, object] = {}
    exec(compiled(job.driver, "cases.py"), driver)
    cases = driver[job.exercise]
    torch.manual_seed(0)
    try:
        context = loaded(job)
        module = context.__enter__()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        yield failure(error, job.submission_name)
        return
    try:
        yield {"ready": True}
        for check, inputs in job.calls:
            run = getattr(cases, f"run_{check}", None) or cases.run
            before = encode(inputs)
            torch.default_generator.manual_seed(0)  # the processor's, which is the one in use here
            try:
                out = run(module, **inputs)
                after, old = encode(inputs), decode(before)
                changed = [k for k in inputs if after != before and not same(inputs[k], old[k])]
                yield {"out": out, "changed": changed}
            except BaseException as error:  # SystemExit as well: the answer must not end the run
                if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
                    raise
                yield failure(error, job.submission_name)
    finally:
        context.__exit__(None, None, None)


def same(a: object, b: object) -> bool:
    return encode(a) == encode(b)


# As a script


def write_job(job: Job, folder: Path) -> None:
    """Puts the job where the script reads it."""
    tree = {
        "modules": job.modules, "module": job.module, "driver": job.driver,
        "exercise": job.exercise, "calls": [[check, inputs] for check, inputs in job.calls],
        "submission": job.submission, "submission_name": job.submission_name,
        "take": job.take, "own": job.own, "lenient": job.lenient,
    }  # fmt: skip
    sources = json.dumps({k: v for k, v in tree.items() if k != "calls"})
    (folder / "job.json").write_text(sources, encoding="utf-8")
    (folder / "calls.bin").write_bytes(encode(tree["calls"]))


def read_job(folder: Path) -> Job:
    tree = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    calls = decode((folder / "calls.bin").read_bytes())
    return Job(calls=[(check, inputs) for check, inputs in calls], **tree)


def frames(data: bytes) -> list[object]:
    """The answers in what came over the channel, up to the first that is not whole or not one."""
    found: list[object] = []
    start = 0
    while start + 8 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        piece = data[start + 8 : start + 8 + length]
        if len(piece) < length:
            break
        try:
            found.append(decode(piece))
        except ValueError:
            break
        start += 8 + length
    return found


def main() -> None:
    channel = os.dup(1)
    os.dup2(2, 1)  # prints, also those of C code, are not answers
    here = Path(__file__).parent
    # Where the book is installed in place, its folder is on the path. Not here.
    sys.path[:] = [p for p in sys.path if not (Path(p) / "tests" / "cases").is_dir()]
    sys.meta_path[:] = [
        f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")
    ]
    torch.set_num_threads(1)
    me = os.getpid()
    for answer in answers(read_job(here)):
        if os.getpid() != me:  # a copy that the answer made by os.fork
            os._exit(0)
        data = encode(answer)
        data = struct.pack("<Q", len(data)) + data
        while data:
            data = data[os.write(channel, data) :]
    os._exit(0)  # at once: no thread of the answer's, and nothing that it left to be done at exit


if __name__ == "__main__":
    main()
