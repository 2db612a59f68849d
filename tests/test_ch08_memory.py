"""Loading straight into integers: the same numbers, never all of it in floats; quick starts."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from ch08_full_models import speed
from ch08_full_models.checkpoint import load
from ch08_full_models.gguf_file import FORMATS, read_gguf
from ch08_full_models.start_time import PEAK_AT_MOST
from tests.test_ch08_checkpoint import (  # noqa: F401  tiny is a fixture
    LARGE_KINDS,
    ROOT,
    sparse_folder,
    tiny,
)
from tests.test_ch08_gguf import small_file, write

KINDS = ("int8", "int4")
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}


def child(code: str, *argv: object) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-c", code, *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, env=ALONE, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    """The same names, and the same bits."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


# Into integers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_becomes_the_same_integers(
    kind: str,
    dtype: torch.dtype,
    tiny: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards the order of rows and the rounding: as if all floats had been there first."""
    monkeypatch.setattr(speed, "PART", 64)  # rows, so that there are several parts
    streamed, _ = load(tiny, dtype, "cpu", quantize=kind)
    after, _ = load(tiny, dtype, "cpu")
    assert_same_state(streamed, speed.quantize(speed.plain_products(after), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_becomes_the_same_integers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the same with reordered rows."""
    path = small_file(tmp_path / "m.gguf")
    streamed, _ = load(path, "bfloat16", "cpu", quantize=kind)
    after, _ = load(path, "bfloat16", "cpu")
    assert_same_state(streamed, speed.quantize(speed.plain_products(after), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_model_becomes_the_same_integers(
    kind: str, gguf_path: Callable[[str], Path]
) -> None:
    """Guards the same where matrices have many parts, the last one smaller."""
    path = gguf_path("smollm2-135m")
    streamed, _ = load(path, "bfloat16", "cpu", quantize=kind)
    after, _ = load(path, "bfloat16", "cpu")
    assert_same_state(streamed, speed.quantize(speed.plain_products(after), kind))


def test_fused_experts_become_the_same_integers(tmp_path: Path) -> None:
    """Guards views of a stored tensor: Llama 4 keeps a layer's experts in one, transposed."""
    config, _, _, layout = LARGE_KINDS["experts in one tensor"]
    small = {"vocab_size": 256, "hidden_size": 64, "num_attention_heads": 2, "head_dim": 32}
    small |= {"num_key_value_heads": 2, "num_local_experts": 3, "intermediate_size": 96}
    sparse_folder(tmp_path, config | small | {"intermediate_size_mlp": 128}, **layout)
    [file] = tmp_path.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    n = (len(raw) - start) // 2
    raw[start:] = torch.randn(n).bfloat16().view(torch.uint8).numpy().tobytes()
    file.write_bytes(raw)
    for kind in KINDS:
        streamed, _ = load(tmp_path, "bfloat16", "cpu", quantize=kind)
        after, _ = load(tmp_path, "bfloat16", "cpu")
        assert_same_state(streamed, speed.quantize(speed.plain_products(after), kind))


def test_what_stays_in_floats_is_bfloat16(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    """Guards the default: torch's product of int8 with float32 is five times slower."""
    for path in (tiny, small_file(tmp_path / "m.gguf")):
        model, _ = load(path, device="cpu", quantize="int8")
        assert model.norm.weight.dtype == torch.bfloat16
        assert model.embed.matrix.scale_N.dtype == torch.bfloat16
        model, _ = load(path, "float32", "cpu", quantize="int8")
        assert model.embed.matrix.scale_N.dtype == torch.float32


# Number formats, against loops over bits


def by_hand(name: str, raw: bytes) -> list[float]:
    """One block's numbers, from the formats' descriptions."""
    half = [struct.unpack_from("<e", raw, at)[0] for at in range(0, len(raw) - 1, 2)]
    if name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        at = 2 if name.endswith("0") else 4
        high = int.from_bytes(raw[at : at + 4], "little") if name[1] == "5" else 0
        low = raw[at + 4 :] if name[1] == "5" else raw[at:]
        numbers = [low[i % 16] >> 4 * (i // 16) & 15 | (high >> i & 1) << 4 for i in range(32)]
        if name.endswith("1"):
            return [np.float32(half[0]) * np.float32(q) + np.float32(half[1]) for q in numbers]
        return [half[0] * (q - (16 if name[1] == "5" else 8)) for q in numbers]
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_formats_by_hand(name: str) -> None:
    form = next(form for form in FORMATS.values() if form.name == name)
    raw = torch.randint(0, 256, (7, form.n_bytes), dtype=torch.uint8)
    raw[:, 1], raw[:, 3] = 60, 50  # no infinity among the scales
    found = form.numbers(raw)
    assert found.shape == (7, 32) and found.dtype == torch.float32
    for block, numbers in zip(raw, found, strict=True):
        np.testing.assert_array_equal(
            np.float32(by_hand(name, block.numpy().tobytes())), numbers.numpy()
        )


def test_formats_are_the_packages() -> None:
    """Guards codes and sizes of all that are undone here."""
    for code, form in FORMATS.items():
        kind = gguf.GGMLQuantizationType(code)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (form.name, form.block, form.n_bytes)


def test_rows_are_read_from_the_middle(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((12, 64), np.float32)
    path = write(tmp_path / "m.gguf", "llama", {}, {"x": (array, gguf.GGMLQuantizationType.Q8_0)})
    file, out = read_gguf(path), torch.empty(3 * 64)
    file.read_numbers("x", 5 * 64, out)
    assert torch.equal(out.view(3, 64), torch.from_numpy(file.array("x"))[5:8])


# Memory

MEASURE = """
import json, sys
from ch08_full_models.start_time import use_memory
print(json.dumps(use_memory(sys.argv[1], sys.argv[2])))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="its peak counts differently")
@pytest.mark.parametrize("kind", KINDS)
def test_peak_of_a_folder(kind: str, tmp_path: Path) -> None:
    """Guards against an embedding, half of the model, that is floats before it is integers."""
    config, _, _, layout = LARGE_KINDS["half of it one embedding"]
    sparse_folder(tmp_path, config, **layout)
    ratios: list[float] = []  # malloc may hold back 20 MB; floats of the embedding are 120
    while len(ratios) < 4 and min(ratios, default=9.0) > PEAK_AT_MOST:
        ratios.append(json.loads(child(MEASURE, tmp_path, kind))["ratio"])
    assert min(ratios) <= PEAK_AT_MOST, ratios


@pytest.mark.skipif(sys.platform == "win32", reason="its peak counts differently")
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
@pytest.mark.parametrize("kind", KINDS)
def test_peak_of_real_models(name: str, kind: str, gguf_path: Callable[[str], Path]) -> None:
    """Guards against floats of the whole model, 270 or 540 MB in bfloat16.

    100 MB are for the vocabulary, which is in the peak, and for what torch makes on its way.
    """
    found = json.loads(child(MEASURE, gguf_path(name), kind))
    above = found["peak_bytes"] - found["cache_bytes"] - found["weight_bytes"]
    assert above < 100e6, found
    if (name, kind) == ("gemma3-270m", "int4"):
        assert found["peak_bytes"] < 400e6


# Imports

MODULES = """
import sys
from ch08_full_models.__main__ import main
code = main(sys.argv[1:])
assert code == 0
print()
print(*sorted({name.partition('.')[0] for name in sys.modules}))
"""


def test_a_run_imports_what_it_needs(gguf_path: Callable[[str], Path]) -> None:
    """Guards the start: packages of other parts of the project, and some that torch and gguf load
    when asked for more than is needed, 0.1 to 1 s each."""
    argv = ["Hi", "--max-new-tokens", "1", "--model", gguf_path("gemma3-270m"), "--raw"]
    names = child(MODULES, *argv).splitlines()[-1].split()
    assert {"torch", "tokenizers", "numpy"} <= set(names)
    heavy = {"transformers", "matplotlib", "nbformat", "IPython", "gguf", "sympy"}
    assert not heavy & set(names), heavy & set(names)
    assert not {"jinja2", "huggingface_hub", "safetensors", "tiktoken"} & set(names)


@pytest.mark.parametrize("option", ["--help", "--list"])
def test_questions_import_no_torch(option: str) -> None:
    code = "import sys; from ch08_full_models.__main__ import main\n"
    code += "try: main([sys.argv[1]])\nexcept SystemExit: pass\n"
    code += "print(*{'torch', 'numpy', 'tokenizers', 'jinja2'} & set(sys.modules), sep='', end='.')"
    assert child(code, option).splitlines()[-1] == "."


def test_start_time_as_a_script(gguf_path: Callable[[str], Path], tmp_path: Path) -> None:
    """Guards the measurement: its record says what was run, and whether targets are reached."""
    gguf_path("smollm2-135m")
    command = [sys.executable, "-m", "ch08_full_models.start_time", "--smoke"]
    command += ["--out", str(tmp_path / "record.json")]
    done = subprocess.run(command, cwd=ROOT, env=ALONE, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    [start], [memory] = record["start"], record["memory"]
    assert start["ratio"] == pytest.approx(
        start["first_text_s"] / (start["import_torch_s"] + start["read_s"]), rel=0.02
    )
    assert start["reached"] == (start["ratio"] <= 1.5)
    assert memory["quantize"] == "int8" and memory["weight_bytes"] > 134_000_000
    assert memory["peak_bytes"] > memory["weight_bytes"]
    assert "start_time" in record["command"] and done.stdout.count("reached") == 2
