"""`check` in a notebook: finds the cell that holds the answer, and judges it as the commands do."""

import ast
import sys

from tests.exercise import ROOT, Exercise, ExerciseError, chapter_folder, definition, find, load


def check_cells(
    name: str, must_pass: bool = False, only: str | None = None, hidden: str | None = None
) -> None:
    """Prints how the exercise went, or each of a chapter's that has been defined.

    Raises AssertionError with the same text if must_pass, and it is not right; ExerciseError for
    an unknown name. With `only`, one check decides whether it is; `hidden` is a recording to
    compare with.
    """
    from tests.checking import check_here, report
    from tests.handout import from_text, is_handout, oracle_for

    cells, names = notebook_cells()
    try:
        exercises = [find(name, ROOT)]
    except ExerciseError:
        if not name.startswith(("ch", *"12345678")):
            raise
        exercises = [e for e in load(chapter_folder(name)) if e.target.split(".")[0] in names]
    lines, passed = [], True
    for exercise in exercises:
        source = last_definition(cells, exercise)
        if source is None:
            lines.append(f"{exercise.name}: no cell has defined {exercise.target}; run yours first")
            passed = False
            continue
        oracle = from_text(exercise, hidden) if hidden else oracle_for(exercise)
        if is_handout() and not hidden:  # no reference stands in for the other exercises
            source = "\n\n".join([source, *(c for c in defining(cells, exercise) if c != source)])
        result = check_here(oracle, source, "your cell", names)
        lines += report(result)
        deciding = [c for c in result.checks if only in (None, c.name)]
        passed = passed and (result.later or all(c.passed and c.counted for c in deciding))
    if must_pass and not passed:
        raise AssertionError("\n".join(lines))
    print("\n".join(lines))


def notebook_cells() -> tuple[list[str], dict[str, object]]:
    """The cells run so far, oldest first, and what they have defined.

    Outside a notebook: the text of the script, and its globals.
    """
    main = sys.modules["__main__"]
    if "IPython" in sys.modules:
        from IPython import get_ipython
        from IPython.core.inputtransformer2 import TransformerManager

        shell = get_ipython()
        if shell is not None:
            plain = TransformerManager().transform_cell
            return [plain(cell) for cell in shell.user_ns.get("In", [])], shell.user_ns
    file = getattr(main, "__file__", None)
    if file is None:
        raise ExerciseError("check: found no notebook and no script to read the answer from")
    with open(file, encoding="utf-8") as script:
        return [script.read()], vars(main)


def defining(cells: list[str], exercise: Exercise) -> list[str]:
    """The cells with answers to the chapter's other exercises, as far as there are any."""
    others = [e for e in load(exercise.chapter) if e.target != exercise.target]
    found = (last_definition(cells, e) for e in others)
    return list(dict.fromkeys(cell for cell in found if cell is not None))


def last_definition(cells: list[str], exercise: Exercise) -> str | None:
    """The last cell that defines the exercise's target; None if none does."""
    for cell in reversed(cells):
        try:
            tree = ast.parse(cell)
        except SyntaxError:
            continue
        if definition(tree.body, exercise.target) is not None:
            return cell
    return None
