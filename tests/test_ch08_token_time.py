"""The measurement of one token's time: that it runs, and that its record says what is claimed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ch08_full_models import token_time

ROOT = Path(__file__).parent.parent


def test_smoke(tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    command = [sys.executable, "-m", "ch08_full_models.token_time", "--smoke", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (run,) = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert list(run["variants"]) == list(token_time.VARIANTS)
    for name, found in run["variants"].items():
        assert found["ms"] > 0 and found["floor_ms"] > 0
        assert ("products_ms" in found) == ("compiled" not in name)
    sizes = {name: found["weight_bytes"] for name, found in run["variants"].items()}
    assert sizes["float32"] == 2 * sizes["bfloat16"] > sizes["int8"] > sizes["int4"]


@pytest.fixture
def runs() -> dict[tuple[str, int], dict]:
    path = Path(token_time.__file__).with_suffix(".json")
    record = json.loads(path.read_text(encoding="utf-8"))
    return {(run["model"], run["context"]): run for run in record["runs"]}


def test_the_record_says_what_the_text_says(runs: dict[tuple[str, int], dict]) -> None:
    """No variant is faster than reading its weights; fewer bytes and compiling both help."""
    assert set(runs) == {(m, c) for m in token_time.Plan.models for c in token_time.Plan.contexts}
    for run in runs.values():
        ms = {name: found["ms"] for name, found in run["variants"].items()}
        assert all(ms[name] > 0.8 * found["floor_ms"] for name, found in run["variants"].items())
        assert ms["bfloat16, mv"] < ms["float32"]
        for name in ("bfloat16", "int8", "int4"):
            assert (
                ms[f"{name}, compiled"]
                < ms["bfloat16, mv, grouped" if name == "bfloat16" else name]
            )
        assert ms["int8, compiled"] < ms["bfloat16, compiled"]
    for context in token_time.Plan.contexts:
        gemma = {
            name: found["ms"] for name, found in runs["gemma3-270m", context]["variants"].items()
        }
        assert gemma["bfloat16, compiled, two-step head"] < gemma["bfloat16, compiled"]
        assert gemma["bfloat16, compiled, its own products"] > gemma["bfloat16, compiled"]
