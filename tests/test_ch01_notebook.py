"""What the notebooks share: tables that line up, diffs that are computed."""

import pytest

from ch01_gpt2 import gpt2
from ch01_gpt2.notebook import show_diff, table
from ch02_rope import rope


def test_table_lines_up(capsys: pytest.CaptureFixture) -> None:
    """Guards the look of every table: text left, numbers right, thousands marked."""
    table(["name", "n", "share"], [["a", 12345, 0.5], ["long name", 7, 10.25]])
    assert capsys.readouterr().out.splitlines() == [
        "name            n  share",
        "a          12,345    0.5",
        "long name       7  10.25",
    ]


def test_diff_is_that_of_the_sources(capsys: pytest.CaptureFixture) -> None:
    """Guards the fourth stop of every chapter: changed lines, hunk heads, and their count."""
    show_diff(gpt2.Attention, rope.Attention, context=0)
    out = capsys.readouterr().out.splitlines()
    assert "+        q_BTHK = rope(q_BTHK, turn)" in out
    assert "+        k_BTHK = rope(k_BTHK, turn)" in out
    gone = [line for line in out if line.startswith("-")]
    come = [line for line in out if line.startswith("+")]
    assert out[-1] == f"{len(gone)} lines go, {len(come)} come"
    assert not any(line.startswith(("---", "+++", " ")) for line in out)
    show_diff(gpt2.MLP, rope.MLP)
    assert capsys.readouterr().out.split("\n")[-2] == "0 lines go, 0 come"
