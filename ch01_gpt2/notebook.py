"""What the chapters' notebooks share: one look for the plots, plain tables, and the diff.

from ch01_gpt2.notebook import BLUE, ORANGE, show_diff, style, table

style()
show_diff(gpt2, rope)
"""

import difflib
import inspect
from types import FunctionType, ModuleType

import matplotlib.pyplot as plt

# Okabe and Ito's colours, which readers with any kind of colour vision can tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
PURPLE, SKY = "#CC79A7", "#56B4E9"


def style() -> None:
    """Sets matplotlib's defaults for every plot of the notebook."""
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "lines.linewidth": 2,
        }
    )


def table(head: list[str], rows: list[list[object]]) -> None:
    """Prints rows under a head: text to the left, numbers to the right."""
    cells = [head] + [[f"{x:,}" if isinstance(x, int) else str(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        columns = zip(row, widths, rows[0], strict=True)
        line = [c.ljust(w) if isinstance(x, str) else c.rjust(w) for c, w, x in columns]
        print("  ".join(line).rstrip())


def show_diff(
    old: ModuleType | type | FunctionType, new: ModuleType | type | FunctionType, context: int = 1
) -> None:
    """Prints how the source of two modules, classes or functions differs, as a unified diff.

    `context` lines around each change stay. Ends with the count of lines that go and that come.
    """
    lines = [inspect.getsource(thing).splitlines() for thing in (old, new)]
    changes = list(difflib.unified_diff(*lines, n=context, lineterm=""))[2:]
    print("\n".join(changes))
    n_gone, n_new = (sum(line.startswith(sign) for line in changes) for sign in "-+")
    print(f"\n{n_gone} lines go, {n_new} come")
