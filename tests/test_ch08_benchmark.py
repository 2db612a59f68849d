"""The benchmark measures all sides by turns, and says of each target whether it is reached."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ch08_full_models import benchmark
from ch08_full_models.benchmark import chart, verdicts

ROOT = Path(__file__).parent.parent


def rates(prefill: float, decode: float, kl: float = 0.0, loss: float = 2.0) -> dict:
    contexts = {512: {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}}
    return {"contexts": contexts, "kl": kl, "loss": loss}


def test_targets_are_judged_by_ratios() -> None:
    results = {
        "ours float32": rates(10, 1),
        "ours bfloat16": rates(30, 3.0),
        "ours bfloat16 compiled": rates(33, 5.0),  # a prompt is read as without: no best of two
        "ours int8": rates(25, 4.0, kl=0.02, loss=2.02),
        "ours int8 compiled": rates(25, 6.0, kl=0.02),
        "transformers bfloat16": rates(20, 2.5),
        "llama.cpp BF16": rates(25, 4.0),
        "llama.cpp Q8_0": rates(20, 9.0, kl=0.011),
    }
    found = {line["target"]: (line["ratio"], line["reached"]) for line in verdicts(results, 512)}
    assert found == {
        "decode at 512: ours bfloat16 compiled >= 2.0 x transformers bfloat16": (2.0, True),
        "decode at 512: ours bfloat16 compiled >= 1.0 x llama.cpp BF16": (1.25, True),
        "decode at 512: ours int8 compiled >= 0.75 x llama.cpp Q8_0": (0.667, False),
        "prefill at 512: ours bfloat16 >= 1.4 x transformers bfloat16": (1.5, True),
        "prefill at 512: ours bfloat16 >= 1.7 x llama.cpp": (1.2, False),  # its best
        "prefill at 512: ours int8 >= 0.8 x ours bfloat16": (0.833, True),
        "KL: ours int8 <= 2 x llama.cpp Q8_0": (1.818, True),
        "loss: ours int8 <= +0.5% of float32": (0.01, False),
    }


def test_chart_is_drawn(tmp_path: Path) -> None:
    chart({"ours int8": rates(2, 1), "llama.cpp Q8_0": rates(2, 1)}, 512, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ch08_full_models.benchmark", *arguments],
        cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip


def test_measures_a_real_model(tmp_path: Path, gguf_path) -> None:
    """Three sides, small numbers: the record has every rate, and float32 agrees with itself."""
    out = tmp_path / "results.json"
    sides = ["ours float32", "ours int4", "transformers float32"]
    done = command(
        "--model", str(gguf_path("smollm2-135m")), "--contexts", "16", "--new-tokens", "3",
        "--rounds", "1", "--quality-tokens", "12", "--loss-tokens", "100", "--out", str(out),
        "--sides", *sides,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text(encoding="utf-8"))
    assert list(record["results"]) == sides
    for found in record["results"].values():
        assert found["contexts"]["16"]["decode_tokens_per_s"] > 0
        assert found["peak_rss_bytes"] > found["above_empty_bytes"] > 0
    assert record["results"]["ours float32"]["kl"] == 0
    assert record["results"]["transformers float32"]["kl"] < 1e-5
    assert 1e-5 < record["results"]["ours int4"]["kl"] < 0.1
    assert "reached" in done.stdout
    assert command("--show", str(out)).stdout == done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error there")
def test_a_reader_that_stops_is_no_error() -> None:
    """Guards `--show FILE | head -1`: no complaint, and the exit code of success."""
    record = Path(benchmark.__file__).with_name("benchmark_gemma3.json")
    line = [sys.executable, "-u", "-m", "ch08_full_models.benchmark", "--show", str(record)]
    child = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nosuch"], "nosuch"),
        (["--rounds", "0"], "expected contexts and rounds from 1 on"),
        (["--sides", "theirs"], "invalid choice"),
        (["--show", "nosuch.json"], "nosuch.json: not a record of the benchmark"),
        (["--show", "ch08_full_models/quality.json"], "quality.json: not a record"),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2 and words in done.stderr
