"""The exercises as notebook cells: in the chapter's own notebook, and in what is handed out."""

import json
from pathlib import Path

from tests.exercise import (
    ROOT,
    Exercise,
    blanked,
    definition,
    load,
    reference_source,
    segment,
    stub_imports,
)

PREFIX = "ex-"  # of the ids of generated cells


def exercise_cells(chapter: str, root: Path = ROOT, variant: bool = False) -> list[dict]:
    """Cells {"id", "cell_type", "source"}: the imports, then for each exercise its text and gap."""
    imports = stub_imports(chapter, root, variant) + "\nfrom tests import check"
    cells = [cell(f"{PREFIX}imports", "code", sorted_imports(imports))]
    for number, exercise in enumerate(load(chapter, root), 1):
        cells.append(
            cell(f"{PREFIX}{exercise.name}", "markdown", text_of(exercise, number, variant))
        )
        code = f'{stub_of(exercise, root, variant)}\n\n\ncheck("{exercise.name}")'
        cells.append(cell(f"{PREFIX}{exercise.name}-code", "code", code))
    return cells


def cell(name: str, kind: str, source: str) -> dict:
    return {"id": name.replace("_", "-")[:64], "cell_type": kind, "source": source}


def sorted_imports(text: str) -> str:
    """Imports of other projects in one block, those of the book in the last."""
    blocks = text.split("\n\n")
    if blocks[-1].startswith(("from ch0", "import ch0")) or len(blocks) == 1:
        return text
    return "\n\n".join([*blocks[:-1], blocks[-1].replace("\nfrom tests", "\n\nfrom tests")])


def text_of(exercise: Exercise, number: int, variant: bool = False) -> str:
    """What is asked, in markdown, with the three hints folded away."""
    lines = [
        f"**Exercise {number}: {exercise.title}**"
        f" (`{exercise.name}`, {exercise.points} points, {exercise.minutes} minutes,"
        f" {exercise.difficulty})",
        exercise.task,
    ]
    if variant and exercise.variant:
        lines.append(f"**In this course:** {exercise.variant.says}")
    if exercise.forbidden:
        names = ", ".join(f"`{name}`" for name in exercise.forbidden)
        lines.append(f"Not allowed: {names}.")
    if not variant and exercise.hints:  # the hints speak of the plain task
        idea, pseudocode, key_line = exercise.hints
        lines.append(folded("Hint 1: the idea", idea))
        lines.append(folded("Hint 2: pseudocode", f"```text\n{pseudocode}\n```"))
        lines.append(folded("Hint 3: one key line", f"```python\n{key_line}\n```"))
    return "\n\n".join(lines)


def folded(title: str, text: str) -> str:
    """A part that opens at a click."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def stub_of(exercise: Exercise, root: Path = ROOT, variant: bool = False) -> str:
    """The gap to fill: a function or class as it is; of a class's method, only that method."""
    import ast

    source = blanked(reference_source(exercise, root, variant), [exercise.target])
    top, _, method = exercise.target.partition(".")
    if not method:
        return segment(source, top).rstrip()
    node = definition(ast.parse(source).body, top)
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    head = f"class {top}({bases}):" if bases else f"class {top}:"
    return f"{head}\n{segment(source, exercise.target).rstrip()}"


def write_into(path: Path, cells: list[dict]) -> None:
    """Puts the cells where the notebook's generated ones stand, or before its last cell.

    A code cell whose source is the same keeps its outputs.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    old = {c["id"]: c for c in notebook["cells"] if c.get("id", "").startswith(PREFIX)}
    at = next(
        (i for i, c in enumerate(notebook["cells"]) if c.get("id") in old),
        len(notebook["cells"]) - 1,
    )
    new = []
    for made in cells:
        kept = old.get(made["id"])
        whole = {
            "cell_type": made["cell_type"],
            "id": made["id"],
            "metadata": {},
            "source": made["source"].splitlines(keepends=True),
        }
        if made["cell_type"] == "code":
            whole |= {"execution_count": None, "outputs": []}
        same = kept and "".join(kept["source"]) == made["source"]
        new.append(kept if same else whole)
    rest = [c for c in notebook["cells"] if c.get("id") not in old]
    notebook["cells"] = rest[:at] + new + rest[at:]
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
