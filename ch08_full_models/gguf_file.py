"""GGUF, llama.cpp's file format: settings, vocabulary and quantized weights in one file.

A header comes first: named fields ("llama.block_count": 30, "tokenizer.ggml.tokens": [...]) and a
list of the tensors, each with its sizes, number format and place. Then the tensors' bytes.
`read_gguf` reads the header. What it returns speaks as a Hugging Face folder would: `config()` is
the config.json, `tensors()` are the weights. On the way are translated:

    names         blk.3.attn_q.weight is model.layers.3.self_attn.q_proj.weight.
    sizes         The header lists them the other way round. The bytes are row-major [out, in].
    formats       Most weights are quantized, in blocks of 32 or 256 numbers (Q8_0, Q4_K, ...).
    rotary pairs  A `llama` file has the rows of q and k reordered, so that two numbers that are
                  rotated together lie side by side. Left so, the model still writes, but badly.
    Gemma's norms hold 1 + w, because llama.cpp multiplies by it; Gemma's own code adds the 1.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package knows the
number formats, and is used for them. Its GGUFReader is not used: it makes numpy arrays of every
single string, and so takes over 10 s for Gemma's 262,144 tokens; `read_gguf` takes 0.2 s.
"""

import math
import mmap
import re
import reprlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ch08_full_models.download import CheckpointError

Value = str | int | float | bool | list  # of a field

# A field's kind is a code in the file. Here struct's letters for those that are numbers.
NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, LIST = 8, 9
LENGTH = struct.Struct("<Q")  # before every string
MAX_COUNT = 1 << 24  # fields, tensors or entries of a list: with more, the header is damaged

# Numbers dequantized at a time. Measured: the gguf package's intermediate results then stay in the
# processor's cache. Whole tensors in one call take ten times as long, and gigabytes.
CHUNK = 1 << 15

# general.architecture in the file: Hugging Face's model_type
MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_LAYER_NAMES = LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FACTORS = "rope_freqs.weight"  # no weight: Llama 3.1's rope scaling, worked out


def error(path: Path, what: str) -> CheckpointError:
    """The error that says what is wrong with the file, in a line that can be read."""
    # A damaged name may be as long as the file.
    return CheckpointError(f"{path}: {what if len(what) < 500 else what[:500] + ' ...'}")


class Header:
    """Takes value after value from the start of a file, and none from beyond its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.place = 0  # of the next value, in bytes

    def error(self, what: str) -> CheckpointError:
        return error(self.path, f"cut off or damaged: {what}")

    def numbers(self, letter: str, count: int) -> list:
        """`count` numbers of the kind that struct calls `letter`."""
        layout = struct.Struct(f"<{count}{letter}")  # "<": lowest byte first, no gaps
        start, self.place = self.place, self.place + layout.size
        if self.place > len(self.data):
            raise self.error(f"the header needs more than the {len(self.data)} bytes there are")
        return list(layout.unpack_from(self.data, start))

    def number(self, letter: str) -> int | float | bool:
        return self.numbers(letter, 1)[0]

    def count(self, what: str) -> int:
        """The next number, which says how many of `what` there are."""
        count = self.number("Q")
        if count > MAX_COUNT:
            raise self.error(f"{count} {what}")
        return count

    def strings(self, count: int) -> list[str]:
        """`count` strings: each its length in bytes, then the bytes, in UTF-8."""
        # A tight loop: with a method call for each of Gemma's strings it takes three times as long.
        data, size, place, length_at = self.data, len(self.data), self.place, LENGTH.unpack_from
        strings = []
        for _ in range(count):
            start = place + LENGTH.size
            place = start + length_at(data, place)[0] if start <= size else start
            if place > size:
                raise self.error(f"the header needs more than the {size} bytes there are")
            try:
                strings.append(data[start:place].decode())
            except UnicodeDecodeError:
                raise self.error(f"the text at byte {start} is not UTF-8") from None
        self.place = place
        return strings

    def string(self) -> str:
        return self.strings(1)[0]

    def value(self, name: str) -> Value:
        """The value of the field `name`, which comes next: a code for its kind, then the value."""
        kind, count = self.number("I"), 1
        if is_list := kind == LIST:
            kind, count = self.number("I"), self.count(f"entries in {name!r}")
        if kind == STRING:
            values = self.strings(count)
        elif kind in NUMBERS:
            values = self.numbers(NUMBERS[kind], count)
        else:  # a list of lists is among these: the format allows it, no model has one
            raise self.error(f"{name!r} is of the unknown kind {kind}")
        return values if is_list else values[0]


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor."""

    shape: tuple[int, ...]  # [out, in], as torch has it
    kind: int  # its number format, a gguf.GGMLQuantizationType
    start: int  # its first byte, counted from the first tensor's
    n_bytes: int


def read_info(header: Header, name: str) -> TensorInfo:
    """What comes next in the header: the description of the tensor `name`."""
    # Here, as it takes 0.1 s, and most checkpoints are no GGUF files.
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    n_axes = header.number("I")
    if not 1 <= n_axes <= 4:
        raise header.error(f"tensor {name!r} has {n_axes} axes, expected 1 to 4")
    shape = tuple(reversed(header.numbers("Q", n_axes)))
    code = header.number("I")
    if code not in [*GGMLQuantizationType]:
        raise header.error(f"tensor {name!r} is in the unknown number format {code}")
    kind = GGMLQuantizationType(code)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % block:
        raise header.error(f"tensor {name!r} has shape {shape} in {kind.name}, blocks of {block}")
    return TensorInfo(shape, kind, header.number("Q"), math.prod(shape) // block * block_bytes)


@dataclass(frozen=True)
class GGUF:
    """A GGUF file, its header read. What does not fit together raises CheckpointError when used."""

    path: Path
    fields: dict[str, Value] = field(repr=False)
    infos: dict[str, TensorInfo] = field(repr=False)  # the tensors, by their names in the file
    data_start: int  # the first tensor's first byte

    @property
    def architecture(self) -> str:
        """One of MODEL_TYPES; it begins the name of every setting."""
        name = self.fields.get("general.architecture")
        if not isinstance(name, str) or name not in MODEL_TYPES:
            known = ", ".join(MODEL_TYPES)
            raise self.error(f"general.architecture is {reprlib.repr(name)}, not one of {known}")
        return name

    def error(self, what: str) -> CheckpointError:
        return error(self.path, what)

    def setting(self, key: str, kind: type = int, default: float | None = None) -> int | float:
        """The architecture's field `key`: a number above 0 of that kind."""
        name = f"{self.architecture}.{key}"
        value = self.fields.get(name, default)
        if value is None:
            raise self.error(f"{name} is missing")
        if type(value) is not kind or not 0 < value < math.inf:
            raise self.error(f"{name} is {reprlib.repr(value)}, expected {kind.__name__} above 0")
        # As a float32 in the file, 1e-5 has become 9.999999747378752e-06.
        return float(f"{value:.7g}") if kind is float else value

    def config(self) -> dict:
        """What the model's config.json says."""
        architecture, setting = self.architecture, self.setting
        width, n_heads = setting("embedding_length"), setting("attention.head_count")
        head_dim = setting("attention.key_length", default=width // n_heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if (found := setting(key, default=head_dim)) != head_dim:
                raise self.error(f"{architecture}.{key} is {found}, a head's width is {head_dim}")
        config = {
            "model_type": MODEL_TYPES[architecture],
            "hidden_size": width,
            "intermediate_size": setting("feed_forward_length"),
            "num_hidden_layers": setting("block_count"),
            "num_attention_heads": n_heads,
            "num_key_value_heads": setting("attention.head_count_kv", default=n_heads),
            "head_dim": head_dim,
            "max_position_embeddings": setting("context_length"),
            "rms_norm_eps": setting("attention.layer_norm_rms_epsilon", float),
            "rope_theta": setting("rope.freq_base", float, default=10_000.0),
            "tie_word_embeddings": "output.weight" not in self.infos,
        }
        config["vocab_size"] = self.check_shapes(config)
        config["rope_scaling"] = self.rope_scaling(head_dim, config["rope_theta"])
        for name in ("bos_token_id", "eos_token_id"):
            config[name] = self.fields.get(f"tokenizer.ggml.{name}")
        if architecture.startswith("gemma"):
            return config | self.gemma_config(config)
        if architecture == "llama":
            config["attention_bias"] = "blk.0.attn_q.bias" in self.infos
            config["mlp_bias"] = "blk.0.ffn_up.bias" in self.infos
        return config | {"hidden_act": "silu"}

    def check_shapes(self, config: dict) -> int:
        """The size of the vocabulary, once settings and tensors are found to agree.

        Nothing is ever allocated for a model whose tensors are not there.
        """
        width, head_dim = config["hidden_size"], config["head_dim"]
        last = f"blk.{config['num_hidden_layers'] - 1}"
        rows = {
            "token_embd": None,  # as many as there are
            f"{last}.attn_q": config["num_attention_heads"] * head_dim,
            f"{last}.attn_k": config["num_key_value_heads"] * head_dim,
            f"{last}.ffn_up": config["intermediate_size"],
        }
        for name, n_rows in rows.items():
            info = self.infos.get(f"{name}.weight")
            if info is None:
                raise self.error(f"tensor {name}.weight is missing")
            if info.shape != (n_rows or info.shape[0], width):
                expected = f"{(n_rows or 'vocabulary', width)} by the header's settings"
                raise self.error(f"tensor {name}.weight is {info.shape}, expected {expected}")
        return self.infos["token_embd.weight"].shape[0]

    def gemma_config(self, config: dict) -> dict:
        """The keys that only Gemma has. Some are not in the file, but in llama.cpp's code."""
        is_2 = self.architecture == "gemma2"
        n_layers, pattern = config["num_hidden_layers"], 2 if is_2 else 6
        # The 27B models, told by their layers, do not scale attention by the width of a head.
        is_27b = n_layers == (46 if is_2 else 62)
        per_head = config["hidden_size"] // config["num_attention_heads"]
        kinds = ["full" if (i + 1) % pattern == 0 else "sliding" for i in range(n_layers)]
        gemma = {
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "query_pre_attn_scalar": per_head if is_27b else config["head_dim"],
            "sliding_window": self.setting("attention.sliding_window"),
            "sliding_window_pattern": pattern,
            "layer_types": [f"{kind}_attention" for kind in kinds],
        }
        if is_2:
            return gemma | {
                "attn_logit_softcapping": self.setting("attn_logit_softcapping", float, 50.0),
                "final_logit_softcapping": self.setting("final_logit_softcapping", float, 30.0),
            }
        return gemma | {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "rope_local_base_freq": self.setting("rope.freq_base_swa", float, 10_000.0),
        }

    def rope_scaling(self, head_dim: int, theta: float) -> dict | None:
        """config.json's rope_scaling: None, linear, or Llama 3.1's."""
        kind = self.fields.get(f"{self.architecture}.rope.scaling.type", "none")
        if ROPE_FACTORS in self.infos:
            return self.llama3_scaling(head_dim // 2, theta)
        if kind == "linear":
            return {"rope_type": "linear", "factor": self.setting("rope.scaling.factor", float)}
        if kind != "none":
            raise self.error(f"rope.scaling.type is {reprlib.repr(kind)}, expected none or linear")
        return None

    def llama3_scaling(self, n_pairs: int, theta: float) -> dict:
        """Llama 3.1's rope scaling, told from its result, by how much each pair is slowed down."""
        found_P = self.array(ROPE_FACTORS).reshape(-1)
        factor, low, high, length = float(f"{found_P.max():.7g}"), 1.0, 4.0, 8192
        turns_P = length / math.tau * theta ** (-np.arange(n_pairs) / n_pairs)
        fast_P = np.clip((turns_P - low) / (high - low), 0, 1)
        expected_P = 1 / (fast_P + (1 - fast_P) / factor)
        if found_P.shape != expected_P.shape or not np.allclose(found_P, expected_P, rtol=1e-4):
            raise self.error(f"{ROPE_FACTORS} is not Llama 3.1's rope scaling from {length} on")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": length,
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights one by one, in float32, under Hugging Face's names and in its layout."""
        for name in self.infos:
            if name != ROPE_FACTORS:
                theirs = self.hf_name(name)
                yield theirs, torch.from_numpy(self.hf_layout(theirs, self.array(name)))

    def hf_name(self, name: str) -> str:
        """Hugging Face's name for a tensor of the file."""
        layer_names = GEMMA_LAYER_NAMES if "gemma" in self.architecture else LAYER_NAMES
        match = re.fullmatch(r"(?:blk\.([0-9]+)\.)?(\w+)\.(weight|bias)", name)
        layer, part, kind = match.groups() if match else (None, None, None)
        if layer is None and part in OUTER_NAMES:
            return f"{OUTER_NAMES[part]}.{kind}"
        if layer is not None and part in layer_names:
            return f"model.layers.{layer}.{layer_names[part]}.{kind}"
        raise self.error(f"tensor {name!r} has no place in a {self.architecture} model")

    def hf_layout(self, theirs: str, array: np.ndarray) -> np.ndarray:
        """The tensor with that name of Hugging Face's, as it has it; may change `array`."""
        part = theirs.split(".")[-2]
        if self.architecture == "llama" and part in ("q_proj", "k_proj"):
            n_heads = self.setting("attention.head_count")
            if part == "k_proj":
                n_heads = self.setting("attention.head_count_kv", default=n_heads)
            if array.shape[0] % (2 * n_heads):
                raise self.error(f"{theirs} has {array.shape[0]} rows for {n_heads} heads")
            # Two by two what turns together: each head's rows lie as 0, h/2, 1, h/2 + 1, ...
            pairs = array.reshape(n_heads, -1, 2, *array.shape[1:])
            return pairs.swapaxes(1, 2).reshape(array.shape)
        if self.architecture.startswith("gemma") and theirs.endswith("norm.weight"):
            # Nothing is lost in float32: all of gemma-3-270m's norms become bfloat16 numbers again,
            # which is what they were before llama.cpp added the 1.
            array -= 1
        return array

    def array(self, name: str) -> np.ndarray:
        """A tensor of the file in float32, in the file's layout."""
        from gguf.constants import GGML_QUANT_SIZES
        from gguf.quants import dequantize

        info = self.infos[name]
        block, block_bytes = GGML_QUANT_SIZES[info.kind]
        array = np.empty(info.shape, np.float32)
        flat = array.reshape(-1)
        try:
            with open(self.path, "rb") as file:
                file.seek(self.data_start + info.start)
                for i in range(0, flat.size, CHUNK):
                    part = flat[i : i + CHUNK]
                    n_bytes = part.size // block * block_bytes
                    # One long row: the package takes 16 rows at a time, however short they are.
                    row = np.fromfile(file, np.uint8, n_bytes).reshape(1, n_bytes)
                    part[:] = dequantize(row, info.kind)
        except NotImplementedError:
            what = f"tensor {name!r} is in {info.kind.name}, which gguf cannot dequantize"
            raise self.error(what) from None
        except (OSError, ValueError) as err:  # it was whole when the header was read
            raise self.error(f"tensor {name!r} cannot be read ({err})") from err
        return array


def read_gguf(path: Path) -> GGUF:
    """Reads the header; the tensors stay on the disk.

    CheckpointError for what is not a GGUF file, for one that is cut off, and for a header that
    does not fit the file.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise error(path, "not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return read_header(Header(path, data))
    except OSError as err:
        raise error(path, f"cannot be read ({err.strerror})") from err


def read_header(header: Header) -> GGUF:
    """The file's header, checked against its size."""
    header.numbers("B", 4)  # "GGUF", seen by the caller
    version = header.number("I")
    if version not in (2, 3):
        raise error(header.path, f"GGUF version {version}, expected 2 or 3")
    n_tensors, n_fields = header.count("tensors"), header.count("fields")
    fields: dict[str, Value] = {}
    for _ in range(n_fields):
        name = header.string()
        if name in fields:
            raise header.error(f"field {name!r} is there twice")
        fields[name] = header.value(name)
    infos: dict[str, TensorInfo] = {}
    for _ in range(n_tensors):
        name = header.string()
        if name in infos:
            raise header.error(f"tensor {name!r} is there twice")
        infos[name] = read_info(header, name)

    alignment = fields.get("general.alignment", 32)  # bytes
    if type(alignment) is not int or alignment < 1:
        raise header.error(f"general.alignment is {reprlib.repr(alignment)}")
    data_start = math.ceil(header.place / alignment) * alignment
    n_bytes = len(header.data)
    for name, info in infos.items():
        if (end := data_start + info.start + info.n_bytes) > n_bytes:
            raise header.error(f"tensor {name!r} ends at byte {end:,} of {n_bytes:,}")
    return GGUF(header.path, fields, infos, data_start)
