"""Where the expected answers come from: the references, or, in a hand-out, a recording."""

from pathlib import Path

from tests.checking import Oracle
from tests.exercise import ROOT, Exercise

RECORDING = "expected"  # a folder in tests/, which only a hand-out has


def is_handout(root: Path = ROOT) -> bool:
    """Whether this tree is a hand-out, without solutions."""
    return (root / "tests" / RECORDING).is_dir()


def oracle_for(exercise: Exercise, root: Path = ROOT) -> Oracle:
    """The inputs and expected answers that a learner's answer is compared with."""
    return Oracle(exercise, root=root)
