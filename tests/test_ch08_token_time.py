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


OWN, AROUND_MV = "bfloat16, compiled, its own products", "bfloat16, compiled"


def milliseconds(name: str) -> dict[int, dict[str, float]]:
    """Of a committed record: context -> variant -> milliseconds a token."""
    path = Path(token_time.__file__).with_name(name)
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    assert {run["context"] for run in runs} == set(token_time.Plan.contexts)
    for run in runs:
        assert all(found["ms"] > 0.8 * found["floor_ms"] for found in run["variants"].values())
    return {run["context"]: {n: v["ms"] for n, v in run["variants"].items()} for run in runs}


@pytest.mark.parametrize("name", ["token_time.json", "token_time_amx.json"])
def test_both_records_say_what_the_text_says(name: str) -> None:
    """Fewer bytes and compiling help on both machines."""
    for ms in milliseconds(name).values():
        best = min(ms[OWN], ms[AROUND_MV])
        assert best < 0.9 * min(ms["bfloat16"], ms["bfloat16, mv"])
        assert min(ms["bfloat16"], ms["bfloat16, mv"]) < ms["float32"]
        assert ms["int8, compiled"] < 0.9 * best
        for kind in ("int8", "int4"):
            assert ms[f"{kind}, compiled"] < ms[kind]


def test_which_products_are_fast_depends_on_the_processor() -> None:
    for context in token_time.Plan.contexts:
        here, amx = (milliseconds(n)[context] for n in ("token_time.json", "token_time_amx.json"))
        assert list(here) == list(token_time.VARIANTS)
        assert here["bfloat16, mv"] > here["bfloat16"] and amx["bfloat16, mv"] < amx["bfloat16"]
        assert here[OWN] < 0.5 * here[AROUND_MV] and amx[OWN] > amx[AROUND_MV]


def test_float32_in_parts_and_compiled() -> None:
    """Both threads at work gain most; the compiler's products gain less upon that."""
    for ms in milliseconds("token_time.json").values():
        assert ms["float32, compiled, its own products"] < ms["float32, in parts"]
        assert ms["float32, in parts"] < 0.7 * ms["float32"]
