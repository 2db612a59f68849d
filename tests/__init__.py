"""Tests, what they share, and the exercises: `python -m tests`, or in a notebook

from tests import check
check("grouped_attend")
"""


def check(
    name: str, must_pass: bool = False, only: str | None = None, hidden: str | None = None
) -> None:
    """Checks an exercise, or all of a chapter ("ch03"), that cells have defined; prints the result.

    With must_pass it raises AssertionError with the same text unless all is right, or unless the
    one check is that `only` names. `hidden` is what nbgrader's hidden tests compare with.
    """
    from tests.notebook import check_cells

    check_cells(name, must_pass, only, hidden)
