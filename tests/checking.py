"""Compares an answer with the reference, and says in words what is wrong with it.

The inputs come from `tests/cases/chNN.py`, drawn from a seed. The reference runs on them here, in
the process that decides; the answer may run elsewhere, and only what it returned is looked at.
"""

import _thread
import ast
import dataclasses
import hashlib
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tests import worker
from tests.exercise import (
    ROOT,
    Exercise,
    ExerciseError,
    blanked,
    definition,
    forbidden_uses,
    is_blank,
    load,
    parse,
    reference_source,
    replaced,
    without_twins,
)
from tests.shapes import axes

Answer = dict  # what the worker yields for one call
SECONDS = 60.0  # that an answer may take on the learner's own computer


class Rng:
    """Random inputs, the same for the same seed on every machine."""

    def __init__(self, *key: object) -> None:
        digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
        self.random = random.Random(digest)
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))

    def int(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return self.random.randint(low, high)

    def sizes(self, n: int, low: int = 2, high: int = 9) -> list[int]:
        """n different sizes, so that no two axes of a tensor can be taken for each other."""
        return self.random.sample(range(low, high + 1), n)

    def choice(self, items: list | tuple) -> object:
        return self.random.choice(items)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Whole numbers from 0 up to, not including, high."""
        return torch.randint(high, shape, generator=self.generator)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)


# The reference's side


@dataclass
class Oracle:
    """Inputs and expected answers of one exercise for one seed."""

    exercise: Exercise
    seed: int | str = 0
    variant: bool = False
    root: Path = ROOT
    overlay: Path | None = None  # a folder with more checks

    @cached_property
    def driver(self) -> str:
        """The source of the cases; what an overlay adds stands at its end."""
        name = f"{self.exercise.chapter[:4]}.py"
        text = (self.root / "tests" / "cases" / name).read_text(encoding="utf-8")
        if self.overlay and (self.overlay / name).is_file():
            more = (self.overlay / name).read_text(encoding="utf-8")
            text = "\n".join((text, OVERLAY_START, more, OVERLAY_END))
        return text

    @cached_property
    def checks(self) -> dict[str, int]:
        """Check -> points; those of an overlay last."""
        return self.exercise.checks | overlay_checks(self.overlay, self.exercise)

    @cached_property
    def calls(self) -> list[tuple[str, dict]]:
        """(check, inputs) of all checks in order."""
        namespace: dict[str, object] = {}
        exec(compile(self.driver, "cases.py", "exec"), namespace)
        cases = namespace[self.exercise.name]
        found = []
        for check in self.checks:
            rng = Rng(self.seed, self.exercise.name, check)
            found += [(check, inputs) for inputs in getattr(cases, check)(rng)]
        return found

    @cached_property
    def modules(self) -> dict[str, str]:
        """The sources that an answer runs among; the exercise's own body is gone.

        The chapter's other files with exercises are there only because a learner's file imports
        from them: they have gaps.
        """
        sources = chapter_sources(self.exercise, self.root)
        own = self.exercise.module
        sources[own] = blanked(sources[own], [self.exercise.target])
        for other in load(self.exercise.chapter, self.root):
            if other.module not in sources:
                targets = [
                    e.target
                    for e in load(self.exercise.chapter, self.root)
                    if e.module == other.module
                ]
                more = chapter_sources(other, self.root)
                more[other.module] = blanked(more[other.module], targets)
                sources = more | sources
        plain = reference_source(self.exercise, self.root)
        return without_twins(sources, self.exercise, plain)

    def job(self, submission: str, name: str) -> worker.Job:
        """For the worker: the submission's own definition among the reference's others."""
        return worker.Job(
            modules=self.modules,
            module=self.exercise.module,
            driver=self.driver,
            exercise=self.exercise.name,
            calls=self.calls,
            submission=submission,
            submission_name=name,
            take={self.exercise.module: [self.exercise.target]},
            own=own_names(self.exercise, self.root),
        )

    def run_source(self, source: str) -> list[Answer]:
        """What the checks give with this source in place of the exercise's file."""
        sources = chapter_sources(self.exercise, self.root) | {self.exercise.module: source}
        job = worker.Job(
            sources, self.exercise.module, self.driver, self.exercise.name, self.fresh_calls()
        )
        return through_the_channel(worker.answers(job))

    def fresh_calls(self) -> list[tuple[str, dict]]:
        """A copy of the calls, for a run that may write to its inputs."""
        calls = worker.decode(worker.encode([list(call) for call in self.calls]))
        return [(check, inputs) for check, inputs in calls]

    @property
    def later(self) -> bool:
        """Whether this exercise cannot be checked here, but only by the grader."""
        return False

    @cached_property
    def reference(self) -> str:
        return reference_source(self.exercise, self.root, self.variant)

    @cached_property
    def expected(self) -> list[Answer]:
        """The reference's answers. Raises ExerciseError if the reference itself fails."""
        found = self.run_source(self.reference)
        for (check, _), answer in zip(self.calls, found[1:], strict=True):
            if "out" not in answer:
                raise ExerciseError(f"{self.exercise.name}, {check}: the reference fails: {answer}")
        return found[1:]

    @cached_property
    def mutants(self) -> dict[str, list[Answer]]:
        """What each named mistake gives."""
        found = {}
        for mutant in self.exercise.mutants:
            try:
                source = replaced(self.reference, self.exercise.target, mutant.replace)
            except ExerciseError:
                if self.variant:  # the mistake cannot be made in this convention
                    continue
                raise
            ran = self.run_source(source)
            found[mutant.name] = ran[1:] if "ready" in ran[0] else [ran[0]] * len(self.calls)
        return found


# An overlay's class has the name of a class above it, which it hides: here it inherits from it.
OVERLAY_START = "_above = {k: v for k, v in globals().items() if isinstance(v, type)}"
OVERLAY_END = """
for _name, _old in _above.items():
    if globals()[_name] is not _old:
        globals()[_name] = type(_name, (globals()[_name], _old), {})
"""


def overlay_checks(overlay: Path | None, exercise: Exercise) -> dict[str, int]:
    """The private checks that an instructor's folder adds to an exercise, with their points."""
    import tomllib

    if overlay is None:
        return {}
    path = overlay / "overlay.toml"
    try:
        listed = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ExerciseError(f"{path}: {error}") from None
    return dict(listed.get(exercise.name, {}))


def chapter_sources(exercise: Exercise, root: Path) -> dict[str, str]:
    """The exercise's file and every other file of the book that it imports, by module name."""
    sources: dict[str, str] = {}
    todo = [exercise.module]
    while todo:
        name = todo.pop()
        path = root / f"{name.replace('.', '/')}.py"
        if name in sources or not path.is_file():
            continue
        sources[name] = path.read_text(encoding="utf-8")
        for node in parse(sources[name]).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
        todo = [name for name in todo if name.startswith("ch0")]
    return sources


def own_names(exercise: Exercise, root: Path) -> list[str]:
    """Top-level names that belong to the chapter's exercises; a file's other ones are helpers."""
    return sorted({e.target.split(".")[0] for e in load(exercise.chapter, root)})


def through_the_channel(found: Iterator[Answer]) -> list[Answer]:
    """Answers as they would arrive from another process, so that both sides are treated alike."""
    return [worker.decode(worker.encode(answer)) for answer in found]


# Comparing


def difference(expected: object, got: object, tolerance: float, name: str = "result") -> list[str]:
    """What is wrong with a value, in lines; none if nothing is."""
    if isinstance(expected, Tensor):
        return tensor_difference(expected, got, tolerance, name)
    if isinstance(expected, dict) and isinstance(got, dict):
        if list(map(str, expected)) != list(map(str, got)) and set(expected) != set(got):
            return [f"{name}: expected the keys {listed(expected)}, got {listed(got)}"]
        pairs = [(key, expected[key], got[key]) for key in expected]
        return first_difference(((v, w, str(k)) for k, v, w in pairs), tolerance)
    if isinstance(expected, (list, tuple)) and type(expected) is type(got):
        if len(expected) != len(got):
            return [f"{name}: expected {len(expected)} items, got {len(got)}"]
        items = enumerate(zip(expected, got, strict=True))
        return first_difference(((v, w, item_name(name, i)) for i, (v, w) in items), tolerance)
    if isinstance(expected, float) and type(got) in (int, float):
        if got == expected or abs(got - expected) <= tolerance * max(1.0, abs(expected)):
            return []
        return [f"{name}: expected {expected:.6g}, got {got:.6g}"]
    if type(expected) is type(got) and expected == got:
        return []
    return [f"{name}: expected {shown(expected)}, got {shown(got)}"]


def first_difference(pairs: Iterator, tolerance: float) -> list[str]:
    return next((lines for v, w, n in pairs if (lines := difference(v, w, tolerance, n))), [])


def item_name(name: str, i: int) -> str:
    """The i-th part of `kept_BSK` is kept_BSK[i]; its axes stay those of the name."""
    return f"{name}[{i}]"


def listed(keys: dict) -> str:
    return ", ".join(map(str, keys)) or "none"


def shown(value: object) -> str:
    """A value in few letters, for a message."""
    if isinstance(value, worker.Other):
        return f"a {value.kind}"
    if isinstance(value, Tensor):
        if value.numel() == 1:
            return f"a tensor of shape {tuple(value.shape)} with {value.item():.6g}"
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    if not isinstance(value, (bool, int, float, str, type(None))):
        text = f"{type(value).__name__} {text}"
    return text if len(text) <= 200 else text[:120] + f" … ({len(text)} letters)"


def named_shape(letters: str | None, shape: tuple[int, ...]) -> str:
    """(B=2, T=5) for the letters BT; (2, 5) where the name has none or another number."""
    if not letters or len(letters) != len(shape):
        return str(tuple(shape))
    parts = (f"{a}={n}" if a.isalpha() else str(n) for a, n in zip(letters, shape, strict=True))
    return f"({', '.join(parts)})"


def tensor_difference(expected: Tensor, got: object, tolerance: float, name: str) -> list[str]:
    letters = axes(name.split("[")[0])
    if not isinstance(got, Tensor):
        return [
            f"{name}: expected a tensor {named_shape(letters, expected.shape)}, got {shown(got)}"
        ]
    if expected.shape != got.shape:
        line = f"{name}: expected {named_shape(letters, expected.shape)}, got {tuple(got.shape)}"
        return [line + shape_remark(letters, tuple(expected.shape), tuple(got.shape))]
    if expected.dtype != got.dtype:
        return [f"{name}: expected numbers of type {expected.dtype}, got {got.dtype}"]
    if torch.equal(expected, got):
        return []
    a, b = expected.double(), got.double()
    scale = max(1.0, float(a[a.isfinite()].abs().max())) if a.isfinite().any() else 1.0
    exact = not expected.is_floating_point()
    limit = 0.0 if exact else tolerance * scale
    error = (a - b).abs()
    error = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, error.nan_to_num(torch.inf))
    wrong = error > limit
    if not wrong.any():
        return []
    worst = int(error.argmax())
    place, rest = [], worst
    for size in reversed(error.shape):
        rest, i = divmod(rest, size)
        place.insert(0, i)
    letters = letters if letters and len(letters) == len(place) else "?" * len(place)
    where = ", ".join(
        f"{letter.lower()}={i}" if letter.isalpha() else str(i)
        for letter, i in zip(letters, place, strict=True)
    )
    want, have = (t.flatten()[worst].item() for t in (expected, got))
    numbers = f"expected {number(want)}, got {number(have)}"
    if b.isnan().any() and not a.isnan().any():
        numbers += f"; {int(b.isnan().sum())} are not a number"
    within = "" if exact else f" by more than {limit:.1e}"
    return [
        f"{name} {named_shape(letters, expected.shape)}: {int(wrong.sum())} of {wrong.numel()}"
        f" elements are wrong{within}",
        f"the worst is [{where}]: {numbers}",
    ]


def number(value: bool | int | float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def shape_remark(letters: str | None, expected: tuple[int, ...], got: tuple[int, ...]) -> str:
    """What seems to have happened to the axes, where it can be told from the sizes."""
    if not letters or len(letters) != len(expected) or len(set(expected)) < len(expected):
        return ""
    if sorted(expected) == sorted(got):
        order = "".join(letters[expected.index(n)] for n in got)
        return f": that is {', '.join(order)}; the axes are in another order"
    missing = [a for a, n in zip(letters, expected, strict=True) if n not in got]
    if len(got) == len(expected) - 1 and len(missing) == 1:
        return f": the axis {missing[0]} is missing"
    if len(got) == len(expected):
        off = [
            f"{a} is {m}, not {n}" for a, n, m in zip(letters, expected, got, strict=True) if n != m
        ]
        return ": " + ", ".join(off)
    return ""


def equal(a: Answer, b: Answer, tolerance: float) -> bool:
    """Whether two answers to a call are the same, errors included."""
    if "error" in a or "error" in b:
        keys = ("error", "message")
        return [a.get(k) for k in keys] == [b.get(k) for k in keys]
    return a["changed"] == b["changed"] and not difference(a["out"], b["out"], tolerance)


# Judging


@dataclass
class CheckResult:
    """How one check of an exercise went."""

    name: str
    points: int
    passed: bool = False
    counted: bool = True  # False behind a first check that failed
    lines: list[str] = field(default_factory=list)


@dataclass
class Result:
    """How an exercise went, and what to tell whoever wrote the answer."""

    exercise: Exercise
    checks: list[CheckResult]
    written: bool = True
    lines: list[str] = field(default_factory=list)  # what concerns the exercise as a whole
    mutant: str | None = None  # the known mistake that the answer makes
    resembles: str | None = None  # the known mistake that it makes where it fails first
    later: bool = False  # written, but checked only when it is handed in

    @property
    def max_points(self) -> int:
        return sum(check.points for check in self.checks)

    @property
    def points(self) -> int:
        return sum(check.points for check in self.checks if check.passed and check.counted)

    @property
    def passed(self) -> bool:
        return self.points == self.max_points


def judge(oracle: Oracle, found: list[Answer], submission: str, name: str, end: str = "") -> Result:
    """The result of an answer from what the worker sent: `ready` or why not, then the calls.

    `end` says how the run ended, where it did not answer all calls.
    """
    exercise = oracle.exercise
    checks = [CheckResult(check, points) for check, points in oracle.checks.items()]
    result = Result(exercise, checks)
    before = before_running(exercise, submission, name)
    if before:
        result.lines, result.written = before
    elif not found or "ready" not in found[0]:
        result.lines = [end or "no answer came"]
        if found:
            error = error_lines(readable(found[0]), submission, name)
            result.lines = [f"{name} cannot be loaded: {error[0]}", *error[1:]]
    if result.lines:
        for check in checks:
            check.counted = False
        return result
    got = [readable(answer) for answer in found[1:]]
    for check in checks:
        places = [i for i, (c, _) in enumerate(oracle.calls) if c == check.name]
        for n, i in enumerate(places, 1):
            if i < len(got):
                lines = answer_lines(oracle.expected[i], got[i], exercise, submission, name)
            else:
                lines = [end or "no answer came"]
            if lines:
                check.lines = [f"case {n} of {len(places)}: {lines[0]}", *lines[1:]]
                break
        check.passed = not check.lines
    if not checks[0].passed:
        for check in checks[1:]:
            check.counted = False
    if not result.passed:
        result.mutant = recognised(oracle, got)
        if result.mutant is None:
            failed = next(check.name for check in checks if not check.passed)
            result.resembles = resembled(oracle, got, failed)
    return result


def readable(answer: object) -> Answer:
    """The answer, if it has the form of one: what comes from another process may be anything."""
    if isinstance(answer, dict):
        if {"out", "changed"} <= answer.keys() and isinstance(answer["changed"], list):
            return answer
        if isinstance(answer.get("error"), str) and isinstance(answer.get("message"), str):
            lines = [n for n in answer.get("lines") or [] if type(n) is int]
            return {"error": answer["error"][:100], "message": answer["message"], "lines": lines}
    return {"error": "no readable answer came", "message": "", "lines": []}


def before_running(exercise: Exercise, submission: str, name: str) -> tuple[list[str], bool] | None:
    """(lines, written) where the text alone decides: not there, not written, or forbidden."""
    try:
        tree = parse(submission)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        text = (getattr(error, "text", None) or "").strip()
        at = f", line {line}" if line else ""
        return [
            f"{name}{at} is not Python: {getattr(error, 'msg', error)}",
            *([text] * bool(text)),
        ], True
    node = definition(tree.body, exercise.target)
    if node is None:
        return [f"{name} has no definition of {exercise.target}"], False
    if is_blank(node):
        return ["not written yet"], False
    uses = forbidden_uses(submission, exercise)
    if uses:
        return [
            f"{name}, line {n}: {text} is not allowed here: {why}" for n, text, why in uses
        ], True
    return None


def error_lines(answer: Answer, submission: str, name: str) -> list[str]:
    """An exception, with the learner's line where it arose."""
    message = answer["message"].split("\n")[0]
    if answer["error"] == "NotImplementedError" and message.endswith(" is not written yet"):
        return [f"uses {message.removesuffix(' is not written yet')}, which is to be written first"]
    lines = [f"{answer['error']}: {message}" if message else answer["error"]]
    source = submission.splitlines()
    for n in answer.get("lines", [])[-1:]:
        if 0 < n <= len(source):
            lines.append(f"{name}, line {n}: {source[n - 1].strip()}")
    return lines


def answer_lines(
    expected: Answer, got: Answer, exercise: Exercise, submission: str, name: str
) -> list[str]:
    """What is wrong with one answer; nothing if nothing is."""
    if "error" in got:
        return error_lines(got, submission, name)
    lines = difference(expected["out"], got["out"], exercise.tolerance)
    if not lines and got["changed"] != expected["changed"]:
        extra = [n for n in got["changed"] if n not in expected["changed"]]
        lines = [f"writes to its input {', '.join(map(str, extra))}; work on a copy"]
    return lines


def recognised(oracle: Oracle, got: list[Answer]) -> str | None:
    """The name of the mutant that answers every call as this answer does, errors included."""
    for name, answers in oracle.mutants.items():
        if len(answers) == len(got) and all(
            equal(a, b, oracle.exercise.tolerance) for a, b in zip(answers, got, strict=True)
        ):
            return name
    return None


def resembled(oracle: Oracle, got: list[Answer], check: str) -> str | None:
    """The mutant that answers a check as this answer does, wrongly; of several the most alike."""
    tolerance, best = oracle.exercise.tolerance, (0, None)
    own = [i for i, (name, _) in enumerate(oracle.calls) if name == check]
    if len(got) < len(oracle.calls):
        return None
    for name, answers in oracle.mutants.items():
        wrong = any(not equal(answers[i], oracle.expected[i], tolerance) for i in own)
        if wrong and all(equal(answers[i], got[i], tolerance) for i in own):
            alike = sum(equal(a, b, tolerance) for a, b in zip(answers, got, strict=True))
            best = max(best, (alike, name), key=lambda pair: pair[0])
    return best[1]


def report(result: Result, points: bool = True) -> list[str]:
    """The result in lines, as a learner reads them; without points where others give those.

    An answer's own words (an exception's, a key's) may hold anything: a terminal's commands do not
    get through.
    """
    return [
        "".join(c if c.isprintable() else "?" for c in line[:500])
        for line in lines_of(result, points)
    ]


def lines_of(result: Result, points: bool) -> list[str]:
    exercise = result.exercise
    of_points = f", {result.points} of {result.max_points} points" if points else ""
    if not result.written and result.lines == ["not written yet"]:
        state = f"not written yet ({result.max_points} points, about {exercise.minutes} minutes)"
        return [f"{exercise.name}: {state}"]
    if result.passed:
        return [f"{exercise.name}: right{of_points}"]
    if result.later:
        return [f"{exercise.name}: {result.lines[0]}"]
    lines = [f"{exercise.name}: not right yet{of_points}"]
    lines += [f"    {line}" for line in result.lines]
    if result.lines:
        return lines
    for check in result.checks:
        if check.passed:
            note = "right" if check.counted else "right, but counts only once the first is"
            lines.append(f"    {check.name}: {note}")
        elif not check.counted:
            lines.append(f"    {check.name}: wrong as well")
        else:
            lines.append(f"    {check.name}: {check.lines[0]}")
            lines += [f"        {line}" for line in check.lines[1:]]
    says = {m.name: m.says for m in exercise.mutants}
    if result.mutant or result.resembles:
        head = "gives exactly this" if result.mutant else "gives this where it first goes wrong"
        lines.append(f"    A known mistake {head}:")
        lines += [
            f"        {line}" for line in says[result.mutant or result.resembles].splitlines()
        ]
    return lines


def check_here(oracle: Oracle, submission: str, name: str, extras: dict | None = None) -> Result:
    """Runs an answer in this process and judges it. For the learner's own computer."""
    before = before_running(oracle.exercise, submission, name)
    if before is None and oracle.later:
        checks = [CheckResult(check, n, counted=False) for check, n in oracle.checks.items()]
        why = "uses other exercises, in conventions of this course; checked when you hand it in"
        return Result(oracle.exercise, checks, lines=[why], later=True)
    found: list[Answer] = []
    if before is None:
        job = oracle.job(submission, name)
        job = dataclasses.replace(job, calls=oracle.fresh_calls(), extras=extras)
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with time_limit(SECONDS) as late:
                for answer in worker.answers(job):
                    found += through_the_channel(iter([answer]))
        except KeyboardInterrupt:
            if not late:
                raise
        finally:
            torch.set_num_threads(n_threads)
        end = f"still running after {SECONDS:g} seconds, and was stopped" if late else ""
        return judge(oracle, found, submission, name, end)
    return judge(oracle, found, submission, name)


@contextmanager
def time_limit(seconds: float) -> Iterator[list[bool]]:
    """Interrupts the block, as Ctrl-C does, when its time is over; then the list is not empty.

    A single call into C code is not interrupted before it returns.
    """
    late: list[bool] = []

    def stop() -> None:
        late.append(True)
        _thread.interrupt_main()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
