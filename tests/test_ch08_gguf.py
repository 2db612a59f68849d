"""The GGUF reader against what was written, against the gguf package, and on damaged files."""

import copy
import hashlib
import math
import random
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ch08_full_models.download import CheckpointError
from ch08_full_models.gguf_file import CHUNK, GGUF, read_gguf
from ch08_full_models.tokenizer import from_gguf

# Writing files as llama.cpp's converter does


def write(path: Path, architecture: str, fields: dict, tensors: dict[str, tuple]) -> Path:
    """A GGUF file, made by the gguf package. A tensor is its numbers and their format."""
    writer = gguf.GGUFWriter(path, architecture)
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for name, value in fields.items():
        adders[type(value)](name, value)
    for name, (array, kind) in tensors.items():
        raw = gguf.quantize(array, kind) if array.dtype == np.float32 else array
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Names of llama.cpp's for what transformers calls so, in a layer and outside.
NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
FIELDS = {  # of config.json: llama.cpp's name
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {"hidden_act": "silu", "rope_scaling": None, "rms_norm_eps": 1e-6}
LLAMA_3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 5,
    "rms_norm_eps": 1e-6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 1e6,
    "rope_scaling": None,
}
# The config.json of small models, each key with another value than the code might have by itself.
CONFIGS = {
    "llama": SIZES
    | LLAMA
    | {
        "model_type": "llama",
        "head_dim": 8,
        "rope_theta": 100_000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "llama, scaled": SIZES
    | LLAMA
    | {
        "model_type": "llama",
        "head_dim": 32,
        "rope_theta": 500_000.0,
        "rope_scaling": LLAMA_3 | {"original_max_position_embeddings": 8192},
        "tie_word_embeddings": False,
    },
    "qwen2": SIZES
    | LLAMA
    | {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3": SIZES
    | LLAMA
    | {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6, "tie_word_embeddings": False},
    "gemma2": SIZES
    | GEMMA
    | {
        "model_type": "gemma2",
        "rope_theta": 10_000.0,
        "attn_logit_softcapping": 40.0,
        "final_logit_softcapping": 20.0,
        "layer_types": ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"],
    },
    "gemma3": SIZES
    | GEMMA
    | {
        "model_type": "gemma3_text",
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
    },
    "gemma3, scaled": SIZES
    | GEMMA
    | {
        "model_type": "gemma3_text",
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}


def model_weights(config: dict) -> dict[str, Tensor]:
    """Random weights under transformers' names, in its shapes, bfloat16 numbers in float32."""
    hf = AutoConfig.for_model(**copy.deepcopy(config))  # it would add to config's dicts
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    shapes = {name: param.shape for name, param in model.named_parameters()}  # tied ones once
    return {name: torch.randn(shape).bfloat16().float() for name, shape in shapes.items()}


def as_llama_cpp(config: dict, weights: dict[str, Tensor]) -> dict[str, tuple]:
    """The same weights in llama.cpp's names and layout, moved number by number."""
    gemma = config["model_type"].startswith("gemma")
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = {}
    for name, weight in weights.items():
        layer, part, kind = re.fullmatch(
            r"(?:model\.)?(?:layers\.(\d+)\.)?([\w.]+)\.(weight|bias)", name
        ).groups()
        new = weight.numpy().copy()
        if config["model_type"] == "llama" and part.endswith(("q_proj", "k_proj")):
            n_heads = heads[part.split(".")[1]]
            width = len(new) // n_heads
            for head in range(n_heads):
                for i in range(width // 2):
                    first = head * width
                    new[first + 2 * i] = weight[first + i]
                    new[first + 2 * i + 1] = weight[first + width // 2 + i]
        if gemma and name.endswith("norm.weight"):
            new = new + np.float32(1)
        theirs = (GEMMA_NAMES if gemma else NAMES)[part]
        prefix = "" if layer is None else f"blk.{layer}."
        tensors[f"{prefix}{theirs}.{kind}"] = (new, Kind.F32)
    return tensors


def as_fields(architecture: str, config: dict) -> dict:
    """The same settings as fields of a GGUF file."""
    fields = {
        f"{architecture}.{FIELDS[key]}": value
        for key, value in config.items()
        if key in FIELDS and value is not None
    }
    if config["model_type"] == "llama":
        fields["llama.rope.dimension_count"] = config["head_dim"]
    if "head_dim" in config:
        fields[f"{architecture}.attention.key_length"] = config["head_dim"]
        fields[f"{architecture}.attention.value_length"] = config["head_dim"]
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "linear":
        fields[f"{architecture}.rope.scaling.type"] = "linear"
        fields[f"{architecture}.rope.scaling.factor"] = scaling["factor"]
    for token in ("bos", "eos"):
        fields[f"tokenizer.ggml.{token}_token_id"] = config[f"{token}_token_id"]
    return fields


def rope_factors(theta: float, head_dim: int, factor: float, length: int = 8192) -> np.ndarray:
    """By how much Llama 3.1 slows each pair down, as llama.cpp's converter works it out."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < length / 4:
            factors.append(1)
        elif wavelength > length / 1:
            factors.append(factor)
        else:
            smooth = (length / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_says_what_the_hub_says(tmp_path: Path, name: str) -> None:
    """Guards config and tensors of each architecture: names, q and k's order, norms, biases."""
    config, architecture = CONFIGS[name], name.split(",")[0]
    weights = model_weights(config)
    tensors = as_llama_cpp(config, weights)
    if name == "llama, scaled":
        tensors["rope_freqs.weight"] = (rope_factors(5e5, 32, 32.0), Kind.F32)
    path = write(tmp_path / "m.gguf", architecture, as_fields(architecture, config), tensors)
    file = read_gguf(path)
    found = file.config()
    assert {key: found[key] for key in config} == config
    read = dict(file.tensors())
    assert read.keys() == weights.keys()
    for key, weight in weights.items():
        assert read[key].dtype == torch.float32
        assert torch.equal(read[key], weight), key


@pytest.mark.parametrize(
    ("architecture", "n_layers", "scalar"),
    [("gemma3", 62, 8), ("gemma2", 46, 8), ("gemma3", 46, 16), ("gemma2", 62, 16)],
)
def test_scale_of_27b(tmp_path: Path, architecture: str, n_layers: int, scalar: int) -> None:
    """Guards the one setting of Gemma's that no field has: 27B scales by hidden size over heads."""
    config = CONFIGS[architecture] | {"num_hidden_layers": n_layers}
    last = f"blk.{n_layers - 1}"
    shapes = {"token_embd": 40, f"{last}.attn_q": 64, f"{last}.attn_k": 32, f"{last}.ffn_up": 48}
    tensors = {f"{k}.weight": (np.zeros((n, 32), np.float32), Kind.F32) for k, n in shapes.items()}
    fields = as_fields(architecture, config)
    file = read_gguf(write(tmp_path / "m.gguf", architecture, fields, tensors))
    assert file.config()["query_pre_attn_scalar"] == scalar


# Number formats

QUANTIZED = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]
K_QUANTS = [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL, Kind.IQ4_XS]


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, *QUANTIZED, *K_QUANTS])
@pytest.mark.parametrize("shape", [(3, 256), (5, 3 * CHUNK // 4), (300, 256), (1, 4096)])
def test_number_formats(tmp_path: Path, kind: Kind, shape: tuple[int, int]) -> None:
    """Guards dequantizing in pieces against the package's way, whole tensors by rows."""
    if kind in K_QUANTS:  # the package reads these, but does not write them
        block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        rng = np.random.default_rng(0)
        array = rng.integers(0, 60, (shape[0], shape[1] // block * n_bytes), dtype=np.uint8)
    else:
        array = torch.randn(shape).numpy()
    path = tmp_path / "m.gguf"
    write(
        path, "llama", {}, {"first.weight": (np.ones(3, np.float32), Kind.F32), "x": (array, kind)}
    )
    [_, theirs] = gguf.GGUFReader(path).tensors
    found = read_gguf(path).array("x")
    assert found.dtype == np.float32 and found.shape == shape
    np.testing.assert_array_equal(found, gguf.dequantize(theirs.data, kind))
    if kind in QUANTIZED:
        assert 0 < np.abs(found - array).max() < np.abs(array).max() / 5
    if kind == Kind.F32:
        np.testing.assert_array_equal(found, array)


def test_q8_0_by_hand(tmp_path: Path) -> None:
    """Guards the same without the package: 32 signed bytes after a float16 to multiply them by."""
    array = torch.randn(4, 64).numpy()
    path = write(tmp_path / "m.gguf", "llama", {}, {"x": (array, Kind.Q8_0)})
    start = read_gguf(path).data_start
    raw = path.read_bytes()[start : start + 4 * 2 * 34]
    expected = []
    for i in range(0, len(raw), 34):
        scale, *numbers = struct.unpack("<e32b", raw[i : i + 34])
        expected += [scale * number for number in numbers]
    np.testing.assert_array_equal(read_gguf(path).array("x").reshape(-1), np.float32(expected))


def test_memory(tmp_path: Path) -> None:
    """Guards the peak: a tensor takes its own size in float32, and little more."""
    array = np.zeros((4096, 1024), np.float32)
    path = write(tmp_path / "m.gguf", "llama", {}, {"token_embd.weight": (array, Kind.Q8_0)})
    file = read_gguf(path)
    del array
    tracemalloc.start()
    for _, tensor in file.tensors():
        assert tracemalloc.get_traced_memory()[1] < 1.1 * tensor.nbytes
    tracemalloc.stop()


def test_format_that_cannot_be_read(tmp_path: Path) -> None:
    """Guards against a traceback for a format that the package knows only by name."""
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    path = write(tmp_path / "m.gguf", "llama", {}, {"token_embd.weight": (array, Kind.I32)})
    with pytest.raises(CheckpointError, match="'token_embd.weight' is in I32, which"):
        [*read_gguf(path).tensors()]


# Fields


def test_fields_are_the_packages(tmp_path: Path) -> None:
    """Guards the reading of every kind of field."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "naïve 🙂\n\0")
    writer.add_string("empty", " ")
    writer.add_array("texts", ["", "a", "ü" * 300])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("floats", [0.5, -1e30])
    writer.add_array("bools", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = read_gguf(tmp_path / "m.gguf").fields
    theirs = gguf.GGUFReader(tmp_path / "m.gguf").fields
    expected = {k: field.contents() for k, field in theirs.items() if not k.startswith("GGUF.")}
    assert found == expected and len(found) == 19
    assert {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in expected.items()}


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    """Guards where the tensors begin."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(alignment)
    arrays = {"a": np.float32([1, 2, 3]), "b": np.float32([[4, 5]])}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "m.gguf")
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.array(name), array)


# Damage


def small_file(path: Path, kind: str = "llama") -> Path:
    """A whole model of one layer, with a vocabulary of SentencePiece's or of GPT-2's kind."""
    config = CONFIGS["llama"] | {"num_hidden_layers": 1}
    fields = as_fields("llama", config)
    special = ["<unk>", "<s>", "</s>"]
    if kind == "llama":
        tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "ab"]
        kinds = [2, 3, 3] + [6] * 256 + [1] * 4
        fields["tokenizer.ggml.scores"] = [-float(i) for i in range(len(tokens))]
    else:
        tokens, kinds = [*special, "a", "b", "Ġ", "ab"], [3, 3, 3, 1, 1, 1, 1]
        fields |= {"tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.pre": "smollm"}
    fields |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    fields |= {"tokenizer.ggml.model": kind, "tokenizer.chat_template": "{{ messages }}"}
    return write(path, "llama", fields, as_llama_cpp(config, model_weights(config)))


def use(path: Path) -> None:
    """Everything that can be asked of a file."""
    file = read_gguf(path)
    file.config()
    for _ in file.tensors():
        pass
    from_gguf(file).encode("a b ab <s>")


def end_of_data(file: GGUF) -> int:
    """The byte after the last tensor's last; there may be some to fill the file up."""
    return file.data_start + max(info.start + info.n_bytes for info in file.infos.values())


def test_cut_off_anywhere(tmp_path: Path) -> None:
    """Guards against a download that was not finished: wherever it ended, one clear error."""
    good = small_file(tmp_path / "good.gguf")
    use(good)
    content, file = good.read_bytes(), read_gguf(good)
    path = tmp_path / "cut.gguf"
    places = {*range(700), *range(0, file.data_start, 29), *range(0, end_of_data(file), 499)}
    for n_bytes in sorted(places | {file.data_start, end_of_data(file) - 1}):
        path.write_bytes(content[:n_bytes])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: (cut off|not a GGUF file)"):
            read_gguf(path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_random_damage(tmp_path: Path, kind: str) -> None:
    """Guards against any other end than an error in one line, and against huge allocations."""
    good = small_file(tmp_path / "good.gguf", kind)
    use(good)
    content, start = good.read_bytes(), read_gguf(good).data_start
    path = tmp_path / "bad.gguf"
    rng = random.Random(0)
    refused = 0
    tracemalloc.start()
    for _ in range(300):
        bad = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            new = rng.choice(
                [
                    rng.randbytes(rng.randrange(1, 9)),
                    bytes([rng.randrange(14), 0, 0, 0]),  # another kind of field
                    struct.pack("<Q", rng.choice([0, 1, 2**24, 2**31, 2**40, 2**63, 2**64 - 1])),
                    struct.pack("<I", rng.choice([0, 1, 2**24, 2**31, 2**32 - 1])),
                ]
            )
            # Text and numbers in lists make most of the header; the rest shall have its share.
            at = rng.choice(
                [
                    rng.randrange(start - 8),
                    rng.randrange(900),
                    rng.randrange(start - 700, start - 8),
                ]
            )
            bad[at : at + len(new)] = new
        path.write_bytes(bad)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            use(path)
        except CheckpointError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        assert tracemalloc.get_traced_memory()[1] - before < 8e6  # bytes
    tracemalloc.stop()
    assert refused > 100


def text(value: str | bytes) -> bytes:
    """A string as the format has it."""
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def header(*parts: bytes, n_tensors: int = 0, n_fields: int = 1, version: int = 3) -> bytes:
    """A file that begins right; after its parts come zeros."""
    start = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_fields)
    return start + b"".join(parts) + bytes(2000)


def tensor(
    name: str, dims: tuple[int, ...], kind: int, start: int, n_axes: int | None = None
) -> bytes:
    """A tensor's description, with the sizes in the file's order."""
    n_axes = len(dims) if n_axes is None else n_axes
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", n_axes, *dims, kind, start)


U32, STRING, LIST, U64 = (struct.pack("<I", kind) for kind in (4, 8, 9, 10))
NUMBER = text("n") + U32 + struct.pack("<I", 7)
HUGE = struct.pack("<Q", 2**63 + 5)

BAD_HEADERS = {
    "empty": (b"", "not a GGUF file"),
    "another file": (b"PK\3\4" * 9, "not a GGUF file"),
    "magic only": (b"GGUF", "cut off or damaged"),
    "version 1": (header(version=1), "GGUF version 1, expected 2 or 3"),
    "big-endian": (header(version=3 << 24), "GGUF version 50331648"),
    "fields": (header(n_fields=2**40), f"{2**40} fields"),
    "tensors": (header(n_tensors=2**63), f"{2**63} tensors"),
    "more fields than bytes": (header(n_fields=2**24), "field '' is there twice|header needs more"),
    "name's length": (header(HUGE), "header needs more than the 2032 bytes"),
    "greatest length": (header(b"\xff" * 8), "header needs more than the 2032 bytes"),
    "text's length": (header(text("s") + STRING + HUGE), "header needs more than"),
    "list's length": (header(text("l") + LIST + STRING + HUGE), "entries in 'l'"),
    "list of texts": (header(text("l") + LIST + STRING + struct.pack("<Q", 2**24)), "needs more"),
    "list of numbers": (header(text("l") + LIST + U64 + struct.pack("<Q", 2**24)), "needs more"),
    "list of lists": (header(text("l") + LIST + LIST + bytes(8)), "'l' is of the unknown kind 9"),
    "kind": (header(text("k") + struct.pack("<I", 13)), "'k' is of the unknown kind 13"),
    "long name": (
        header(text("n" * 10**6) + struct.pack("<I", 13)),
        "damaged: 'nnn.{400,500}",
    ),
    "name not UTF-8": (header(text(b"\xff\xfe")), "text at byte 32 is not UTF-8"),
    "text not UTF-8": (header(text("s") + STRING + text(b"a\xc3")), "text at byte 45 is not UTF-8"),
    "field twice": (header(NUMBER, NUMBER, n_fields=2), "field 'n' is there twice"),
    "alignment 0": (header(text("general.alignment") + U32 + bytes(4)), "general.alignment is 0"),
    "alignment text": (
        header(text("general.alignment") + STRING + text("32")),
        "general.alignment is '32'",
    ),
    "no axes": (header(tensor("x", (), 0, 0), n_fields=0, n_tensors=1), "'x' has 0 axes"),
    "axes": (
        header(tensor("x", (1,), 0, 0, n_axes=2**31), n_fields=0, n_tensors=1),
        "'x' has 2147483648 axes, expected 1 to 4",
    ),
    "axis of 0": (header(tensor("x", (0, 5), 0, 0), n_fields=0, n_tensors=1), r"shape \(5, 0\)"),
    "sizes": (
        header(tensor("x", (2**62,) * 4, 0, 0), n_fields=0, n_tensors=1),
        "'x' ends at byte [0-9,]{90,} of",
    ),
    "format": (
        header(tensor("x", (32,), 999, 0), n_fields=0, n_tensors=1),
        "'x' is in the unknown number format 999",
    ),
    "old format": (header(tensor("x", (32,), 4, 0), n_fields=0, n_tensors=1), "number format 4"),
    "half a block": (
        header(tensor("x", (48, 2), 8, 0), n_fields=0, n_tensors=1),
        r"shape \(2, 48\) in Q8_0, blocks of 32",
    ),
    "place": (
        header(tensor("x", (32,), 0, 2**60), n_fields=0, n_tensors=1),
        "'x' ends at byte 1,152,921,504,606,847,",
    ),
    "tensor twice": (
        header(tensor("x", (8,), 0, 0) * 2, n_fields=0, n_tensors=2),
        "tensor 'x' is there twice",
    ),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers(tmp_path: Path, case: str) -> None:
    """Guards against numbers that are believed before they are checked."""
    content, message = BAD_HEADERS[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: .*({message})") as error:
        read_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6 + 10 * len(content)  # bytes
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)
    tracemalloc.stop()


def test_not_a_file(tmp_path: Path) -> None:
    """Guards against a traceback where there is no file, or a folder."""
    for path in (tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: cannot be read"):
            read_gguf(path)


def test_version_2(tmp_path: Path) -> None:
    """Guards the older version, which differs in its number only."""
    content = bytearray(small_file(tmp_path / "m.gguf").read_bytes())
    content[4:8] = struct.pack("<I", 2)
    (tmp_path / "m.gguf").write_bytes(content)
    use(tmp_path / "m.gguf")


BAD_SETTINGS = [
    ("general.architecture", "mamba", "general.architecture is 'mamba', not one of llama, qwen2"),
    ("general.architecture", 7, "general.architecture is 7, not one of"),
    ("llama.block_count", None, "llama.block_count is missing"),
    ("llama.block_count", 0, "llama.block_count is 0, expected int above 0"),
    ("llama.block_count", 10**9, "tensor blk.999999999.attn_q.weight is missing"),
    ("llama.block_count", "1", "llama.block_count is '1', expected int"),
    ("llama.block_count", True, "llama.block_count is True, expected int"),
    ("llama.attention.head_count", 0, "llama.attention.head_count is 0"),
    ("llama.attention.head_count", [4], r"llama.attention.head_count is \[4\]"),
    ("llama.attention.head_count", 8, r"attn_q.weight is \(32, 32\), expected \(64, 32\)"),
    ("llama.attention.head_count_kv", 4, r"attn_k.weight is \(16, 32\), expected \(32, 32\)"),
    ("llama.embedding_length", 64, r"token_embd.weight is \(40, 32\), expected"),
    (
        "llama.feed_forward_length",
        10**9,
        r"ffn_up.weight is \(48, 32\), expected \(1000000000, 32\)",
    ),
    ("llama.rope.dimension_count", 4, "llama.rope.dimension_count is 4, a head's width is 8"),
    ("llama.attention.value_length", 6, "llama.attention.value_length is 6, a head's"),
    ("llama.attention.layer_norm_rms_epsilon", math.nan, "epsilon is nan, expected float above 0"),
    ("llama.attention.layer_norm_rms_epsilon", None, "epsilon is missing"),
    ("llama.rope.freq_base", -1.0, "rope.freq_base is -1.0, expected float"),
    ("llama.rope.scaling.type", "yarn", "rope.scaling.type is 'yarn', expected none or linear"),
    ("llama.rope.scaling.type", "linear", "llama.rope.scaling.factor is missing"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_SETTINGS)
def test_bad_settings(tmp_path: Path, key: str, value: object, message: str) -> None:
    """Guards against settings that the model cannot have, or the tensors do not fit."""
    file = read_gguf(small_file(tmp_path / "m.gguf"))
    file.fields.pop(key, None)
    if value is not None:
        file.fields[key] = value
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(file.path))}: .*{message}"):
        file.config()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "blk.0.ffn_gate_inp.weight",
            (4, 4),
            "'blk.0.ffn_gate_inp.weight' has no place in a llama",
        ),
        ("blk.0.output.weight", (4, 4), "'blk.0.output.weight' has no place in a llama model"),
        ("attn_q.weight", (4, 4), "'attn_q.weight' has no place in a llama model"),
        ("blk.1.attn_q.weight", (30, 4), "q_proj.weight has 30 rows for 4 heads"),
    ],
)
def test_bad_tensors(tmp_path: Path, name: str, shape: tuple[int, int], message: str) -> None:
    """Guards against tensors of models that are not understood, a mixture of experts' above all."""
    fields = as_fields("llama", CONFIGS["llama"])
    array = np.zeros(shape, np.float32)
    path = write(tmp_path / "m.gguf", "llama", fields, {name: (array, Kind.F32)})
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: .*{message}"):
        [*read_gguf(path).tensors()]


@pytest.mark.parametrize(
    "factors",
    [
        rope_factors(5e5, 32, 32.0, length=4096),
        rope_factors(1e5, 32, 32.0),
        rope_factors(5e5, 64, 32.0),
        np.full(16, np.nan, np.float32),
    ],
)
def test_rope_scaling_of_another_kind(tmp_path: Path, factors: np.ndarray) -> None:
    """Guards against a guess: what is not exactly Llama 3.1's scaling is refused."""
    config = CONFIGS["llama, scaled"]
    tensors = as_llama_cpp(config, model_weights(config))
    tensors["rope_freqs.weight"] = (factors, Kind.F32)
    path = write(tmp_path / "m.gguf", "llama", as_fields("llama", config), tensors)
    with pytest.raises(CheckpointError, match="rope_freqs.weight is not Llama 3.1's rope scaling"):
        read_gguf(path).config()


def test_file_that_shrinks(tmp_path: Path) -> None:
    """Guards against a tensor half read, if the file changes after its header was."""
    path = small_file(tmp_path / "m.gguf")
    file = read_gguf(path)
    content = path.read_bytes()
    for n_bytes in (file.data_start + 1, end_of_data(file) - 1):
        path.write_bytes(content[:n_bytes])
        with pytest.raises(CheckpointError, match="tensor .* cannot be read"):
            [*file.tensors()]
    path.unlink()
    with pytest.raises(CheckpointError, match="tensor .* cannot be read"):
        [*file.tensors()]


# The real files

# The first digits, of some tensors as the gguf package's own reader and dequantize give them.
SHA256 = {
    "smollm2-135m": {
        "model.embed_tokens.weight": "3fd491c8066dd9dc",
        "model.layers.7.self_attn.v_proj.weight": "8b6862c014dfc739",
        "model.layers.11.input_layernorm.weight": "44303af04e4ac081",
        "model.layers.29.mlp.down_proj.weight": "c19605745425a11e",
    },
    "gemma3-270m": {
        "model.layers.0.self_attn.k_proj.weight": "e9148680cf79c226",
        "model.layers.0.self_attn.v_proj.weight": "7f2d145de2fbde18",
        "model.layers.4.mlp.up_proj.weight": "623ca1743dbbc6ab",
        "model.layers.9.self_attn.o_proj.weight": "4a6d1ec4e9db54d6",
        "model.layers.17.mlp.down_proj.weight": "7567ae3bdd757fa3",
    },
}
# What config.json says of the two on the Hub, HuggingFaceTB/SmolLM2-135M-Instruct and
# google/gemma-3-270m.
HUB = {
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100_000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gemma3-270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": None,
        "sliding_window": 512,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": False,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    },
}


@pytest.mark.parametrize(
    ("name", "n_tensors", "n_numbers"),
    [("smollm2-135m", 272, 134_515_008), ("gemma3-270m", 236, 268_098_176)],
)
def test_real_files(
    gguf_path: Callable[[str], Path], name: str, n_tensors: int, n_numbers: int
) -> None:
    """Guards the two real files: every setting, every name, and tensors in six formats."""
    file = read_gguf(gguf_path(name))
    found = file.config()
    assert {key: found[key] for key in HUB[name]} == HUB[name]
    shapes = {file.hf_name(key): info.shape for key, info in file.infos.items()}
    assert len(shapes) == n_tensors
    assert sum(map(math.prod, shapes.values())) == n_numbers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**found))
    assert shapes == {key: tuple(param.shape) for key, param in model.named_parameters()}
    # Not all of Gemma's are read: its embedding alone, 168 million numbers, takes seconds.
    skipped = {"token_embd.weight"} if name == "gemma3-270m" else set()
    infos = {key: info for key, info in file.infos.items() if key not in skipped}
    norms = 0
    for key, tensor in GGUF(file.path, file.fields, infos, file.data_start).tensors():
        assert tuple(tensor.shape) == shapes[key]
        if key in SHA256[name]:
            digest = hashlib.sha256(tensor.numpy().astype("<f4").tobytes()).hexdigest()
            assert digest[:16] == SHA256[name][key], key
        if key.endswith("norm.weight"):
            # Published in bfloat16: only what has the 1 taken off again fits into it.
            norms += torch.equal(tensor, tensor.bfloat16().float())
    assert norms == sum(key.endswith("norm.weight") for key in shapes)


def test_real_model_knows_its_capitals(gguf_path: Callable[[str], Path]) -> None:
    """Guards the order of q and k's rows on real weights, in transformers' model. In the wrong one
    the text is less likely (the loss is 2.7), but fluent all the same."""
    file = read_gguf(gguf_path("smollm2-135m"))
    with torch.device("meta"):  # without memory, as the weights are there already
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**file.config())).eval()
    weights = dict(file.tensors())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # tied
    model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    tokenizer = from_gguf(file)
    capitals = "The capital of France is Paris, the capital of Italy is Rome, and that of Spain is"
    tokens_1T = torch.tensor([tokenizer.encode(capitals)])
    with torch.no_grad():
        output = model(tokens_1T, labels=tokens_1T)
    assert tokenizer.decode([int(output.logits[0, -1].argmax())]) == " Madrid"
    assert output.loss < 2
