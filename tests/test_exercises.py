"""Every exercise: solvable, not solved by nothing, and its mistakes are caught and recognised."""

import ast
import json
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.cells import PREFIX, exercise_cells
from tests.checking import CheckResult, Oracle, check_here, difference, judge
from tests.exercise import (
    ROOT,
    Exercise,
    blanked,
    chapter_folders,
    definition,
    forbidden_uses,
    load,
    reference_source,
    replaced,
    segment,
    stubs,
)
from tests.grade import Course
from tests.release import solved

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = [exercise for chapter in chapter_folders() for exercise in load(chapter)]
each = pytest.mark.parametrize("exercise", ALL, ids=lambda e: f"{e.chapter[:4]}-{e.name}")
SEED = "another seed"


@cache
def oracle(exercise_name: str, seed: int | str = 0, variant: bool = False) -> Oracle:
    (exercise,) = [e for e in ALL if e.name == exercise_name]
    return Oracle(exercise, seed, variant)


def answer(exercise: Exercise, source: str) -> str:
    """A learner's file: the exercise's definition cut out of a source, and nothing else of it."""
    top = exercise.target.split(".")[0]
    return segment(source, top)


# The list


def test_names_are_unique() -> None:
    names = [exercise.name for exercise in ALL]
    assert len(set(names)) == len(names)
    targets = [(exercise.module, exercise.target) for exercise in ALL]
    assert len(set(targets)) == len(targets)


@pytest.mark.parametrize("chapter", chapter_folders())
def test_chapter_has_enough(chapter: str) -> None:
    """Guards that a chapter runs from a ten-minute function to one task of design."""
    exercises = load(chapter)
    if chapter.startswith("ch08"):
        assert len(exercises) == 3
    else:
        assert 5 <= len(exercises) <= 8
        assert min(e.minutes for e in exercises) <= 10
        assert [e.difficulty for e in exercises].count("design") == 1
        assert exercises[-1].difficulty == "design"


@pytest.mark.parametrize("chapter", chapter_folders())
def test_stubs_are_up_to_date(chapter: str) -> None:
    """`python -m tests start --stubs` writes them."""
    assert (ROOT / chapter / "exercises.py").read_text(encoding="utf-8") == stubs(chapter)


@pytest.mark.parametrize("chapter", chapter_folders())
def test_notebook_has_the_exercises(chapter: str) -> None:
    """The last stop's cells are those of exercises.toml; `start --stubs` writes them."""
    path = ROOT / chapter / f"{chapter.split('_', 1)[1]}.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = {c["id"]: "".join(c["source"]) for c in cells if c["id"].startswith(PREFIX)}
    assert found == {c["id"]: c["source"] for c in exercise_cells(chapter)}


@each
def test_is_complete(exercise: Exercise) -> None:
    assert len(exercise.hints) == 3 and all(exercise.hints)
    assert len(exercise.mutants) >= 6
    assert len({mutant.name for mutant in exercise.mutants}) == len(exercise.mutants)
    assert len({mutant.says for mutant in exercise.mutants}) == len(exercise.mutants)
    assert len(exercise.checks) >= 2 and exercise.points >= 2
    assert 5 <= exercise.minutes <= 240
    assert exercise.variant is not None
    # The key line is one that the reference has, in this or another layout.
    assert exercise.task and exercise.title


@each
def test_reference_has_no_marks(exercise: Exercise) -> None:
    """The chapters' files are read as they are; nothing in them points at an exercise."""
    source = reference_source(exercise)
    assert "SOLUTION" not in source and "exercise" not in source.lower().split('"""', 2)[2]


# Right answers


@each
@pytest.mark.parametrize("seed", [0, SEED])
def test_reference_gets_all_points(exercise: Exercise, seed: int | str) -> None:
    result = check_here(
        oracle(exercise.name, seed), answer(exercise, reference_source(exercise)), "my.py"
    )
    assert result.passed, [result.lines, [check.lines for check in result.checks]]
    assert result.points == exercise.points


@each
def test_reference_uses_nothing_forbidden(exercise: Exercise) -> None:
    assert forbidden_uses(reference_source(exercise), exercise) == []


@each
def test_seeds_give_other_inputs(exercise: Exercise) -> None:
    """Guards that a list of expected numbers, copied from one seed, is wrong for another."""
    for check in exercise.checks:
        a, b = (
            [out["out"] for (c, _), out in zip(o.calls, o.expected, strict=True) if c == check]
            for o in (oracle(exercise.name), oracle(exercise.name, SEED))
        )
        if check == next(iter(exercise.checks)):
            assert len(a) != len(b) or difference(a, b, 1e-3) != []


@pytest.mark.parametrize("chapter", chapter_folders())
@pytest.mark.parametrize("variant", [False, True])
def test_a_whole_file_of_answers_is_right(chapter: str, variant: bool) -> None:
    """Guards what a learner hands in: all answers in one file, with the stubs' imports."""
    text = solved(Course(load(chapter), variant=variant))
    for exercise in load(chapter):
        result = check_here(oracle(exercise.name, 0, variant), text, "my.py")
        assert result.passed, [result.lines, [check.lines for check in result.checks]]


# Wrong answers


@each
def test_stub_gets_nothing(exercise: Exercise) -> None:
    source = blanked(reference_source(exercise), [exercise.target])
    result = check_here(oracle(exercise.name), answer(exercise, source), "my.py")
    assert (result.points, result.written) == (0, False)
    # And if it is run all the same:
    ran = oracle(exercise.name).run_source(source)
    assert all("error" in a for a in ran) or all("error" in a for a in ran[1:])


@each
@pytest.mark.parametrize("seed", [0, SEED])
def test_mistakes_are_caught_and_recognised(exercise: Exercise, seed: int | str) -> None:
    """Every mutant loses points, and at least eight in ten are called by their name."""
    right, found = oracle(exercise.name, seed), {}
    for mutant in exercise.mutants:
        source = replaced(reference_source(exercise), exercise.target, mutant.replace)
        given = right.mutants[mutant.name]  # what that source returned
        result = judge(right, [{"ready": True}, *given], answer(exercise, source), "my.py")
        found[mutant.name] = (result.points, result.mutant)
    caught = [name for name, (points, _) in found.items() if points < exercise.points]
    known = [name for name, (_, called) in found.items() if called == name]
    assert caught == list(found), f"not caught: {found.keys() - set(caught)}"
    assert len(known) >= 0.8 * len(found), found


@each
def test_a_mistake_in_a_learners_file_is_recognised(exercise: Exercise) -> None:
    """The whole way of one mutant: as a file, run, judged and named."""
    mutant = exercise.mutants[0]
    source = replaced(reference_source(exercise), exercise.target, mutant.replace)
    result = check_here(oracle(exercise.name), answer(exercise, source), "my.py")
    assert result.points < exercise.points and result.mutant == mutant.name


def changed(value: object, how: str, inputs: dict) -> object:
    """An expected result with every number in it replaced by a trivial one."""
    if isinstance(value, Tensor):
        if how == "identity":
            like = [t for t in tensors(inputs) if t.shape == value.shape and t.dtype == value.dtype]
            return like[0].clone() if like else torch.zeros_like(value)
        if how == "random":
            return torch.randn(value.shape).to(value.dtype)
        return torch.full_like(value, {"zeros": 0, "ones": 1}[how])
    if isinstance(value, (list, tuple)):
        return type(value)(changed(item, how, inputs) for item in value)
    if isinstance(value, dict):
        return {key: changed(item, how, inputs) for key, item in value.items()}
    if isinstance(value, (bool, int, float)):
        return type(value)({"ones": 1, "random": 17}.get(how, 0))
    if isinstance(value, str):
        return {"identity": next((v for v in inputs.values() if type(v) is str), "")}.get(how, "")
    return value


def tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [t for v in items for t in tensors(v)] if isinstance(value, (dict, list, tuple)) else []


@each
@pytest.mark.parametrize("how", ["zeros", "ones", "identity", "random", "nothing"])
def test_trivial_answers_get_at_most_a_tenth(exercise: Exercise, how: str) -> None:
    """Whatever the answer's code: these are the results it might give."""
    right = oracle(exercise.name)
    found: list[dict] = [{"ready": True}]
    for (_, inputs), expected in zip(right.calls, right.expected, strict=True):
        out = None if how == "nothing" else changed(expected["out"], how, inputs)
        found.append({"out": out, "changed": expected["changed"]})
    written = answer(exercise, reference_source(exercise))
    result = judge(right, found, written, "my.py")
    assert result.points <= exercise.points / 10
    assert all(isinstance(check, CheckResult) for check in result.checks)


@each
def test_variant_is_another_task(exercise: Exercise) -> None:
    """Its reference gets everything; the plain reference, as a copied answer, a tenth at most."""
    variant = oracle(exercise.name, 0, True)
    source = reference_source(exercise, variant=True)
    assert check_here(variant, answer(exercise, source), "my.py").passed
    copied = check_here(variant, answer(exercise, reference_source(exercise)), "my.py")
    assert copied.points <= exercise.points / 10
    # What the learner sees tells the two apart.
    plain, other = (
        ast.get_docstring(definition(ast.parse(text).body, exercise.target)) or ""
        for text in (reference_source(exercise), source)
    )
    assert exercise.variant.says and (plain != other or plain == "")
