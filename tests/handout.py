"""Where the expected answers come from: the references, or, in a hand-out, a recording.

A hand-out holds the chapter's files with every exercise's body gone. What the references gave is
recorded in tests/expected, one file an exercise, so that students can check without them. There an
answer runs among the student's other answers, since no reference can stand in for those.
"""

import ast
import base64
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests import worker
from tests.checking import Answer, Oracle, chapter_sources
from tests.exercise import (
    ROOT,
    Exercise,
    ExerciseError,
    blanked,
    definition,
    is_blank,
    load,
    parse,
    reference_source,
    without_twins,
)

RECORDING = Path("tests") / "expected"  # which only a hand-out has


def is_handout(root: Path = ROOT) -> bool:
    """Whether this tree is a hand-out, without solutions."""
    return (root / RECORDING).is_dir()


def oracle_for(exercise: Exercise, root: Path = ROOT) -> Oracle:
    """The inputs and expected answers that a learner's answer is compared with."""
    if not is_handout(root):
        return Oracle(exercise, root=root)
    path = root / RECORDING / f"{exercise.name}.bin"
    try:
        return Recorded(exercise, root=root, recording=zlib.decompress(path.read_bytes()))
    except (OSError, zlib.error) as error:
        raise ExerciseError(f"{path.relative_to(root)}: {error}") from None


@dataclass
class Recorded(Oracle):
    """An oracle that has no reference, only what it once gave."""

    recording: bytes = b""

    @cached_property
    def kept(self) -> dict:
        try:
            return worker.decode(self.recording)
        except ValueError as error:
            raise ExerciseError(f"{self.exercise.name}: the recording is {error}") from None

    @cached_property
    def driver(self) -> str:
        return self.kept["driver"]

    @cached_property
    def checks(self) -> dict[str, int]:
        return self.kept["checks"]

    @cached_property
    def calls(self) -> list[tuple[str, dict]]:
        return [(check, inputs) for check, inputs in self.kept["calls"]]

    @cached_property
    def expected(self) -> list[Answer]:
        return self.kept["expected"]

    @cached_property
    def mutants(self) -> dict[str, list[Answer]]:
        return self.kept["mutants"]

    @property
    def later(self) -> bool:
        """Whether only the grader can check this exercise.

        It uses others of the chapter. Where those follow a variant's convention, no reference that
        students may have could stand in.
        """
        return self.kept.get("later", False)

    @cached_property
    def modules(self) -> dict[str, str]:
        """The blanked files; or the references around the exercise, if they were recorded."""
        return self.kept.get("modules") or super().modules

    def job(self, submission: str, name: str) -> worker.Job:
        job = super().job(submission, name)
        if "modules" in self.kept:
            return job
        body = ast.parse(submission).body
        job.take = {self.exercise.module: [self.exercise.target]}
        for other in load(self.exercise.chapter, self.root):
            node = definition(body, other.target)
            if node is None or is_blank(node):
                continue
            for module, source in job.modules.items():  # some files have it as well, with a gap
                gap = definition(parse(source).body, other.target)
                known = job.take.setdefault(module, [])
                if gap is not None and is_blank(gap) and other.target not in known:
                    known.append(other.target)
        return job


def recorded(oracle: Oracle, with_modules: bool = False) -> bytes:
    """What `Recorded` needs of an oracle. with_modules: also the references of the others."""
    kept = {
        "driver": oracle.driver,
        "checks": oracle.checks,
        "calls": [list(call) for call in oracle.calls],
        "expected": oracle.expected,
        "mutants": {} if with_modules else oracle.mutants,
    }
    if with_modules:
        kept["modules"] = oracle.modules
    elif oracle.variant:
        kept["later"] = uses_others(oracle)
    return zlib.compress(worker.encode(kept), 9)


def uses_others(oracle: Oracle) -> bool:
    """Whether the reference calls another exercise's reference: tried, with those cut out."""
    own = oracle.exercise
    sources = chapter_sources(own, oracle.root) | {own.module: oracle.reference}
    for other in load(own.chapter, oracle.root):
        if other.name != own.name and other.module in sources:
            plain = reference_source(other, oracle.root)
            sources = without_twins(sources, other, plain)
            sources[other.module] = blanked(sources[other.module], [other.target])
    job = worker.Job(sources, own.module, oracle.driver, own.name, oracle.fresh_calls())
    return any("is not written yet" in a.get("message", "") for a in worker.answers(job))


def from_text(exercise: Exercise, text: str, root: Path = ROOT) -> Recorded:
    """The oracle of a recording that stands as text in a hidden test."""
    recording = zlib.decompress(base64.b85decode(text))
    return Recorded(exercise, root=root, recording=recording)


def as_text(recording: bytes) -> str:
    return base64.b85encode(recording).decode("ascii")
