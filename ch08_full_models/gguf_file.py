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

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The number formats that most
files use are undone here, some rows at a time; the gguf package knows the others. Its GGUFReader is
not used: it makes numpy arrays of every single string, and so takes over 10 s for Gemma's 262,144
tokens; `read_gguf` takes 0.1 s.
"""

import math
import mmap
import re
import reprlib
import struct
from collections.abc import Callable, Iterator
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

# Numbers dequantized at a time. Measured: with fewer, the calls cost more than their work; with
# more, what is between two calls no longer stays in the processor's cache.
CHUNK = 1 << 18

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


# Number formats: from blocks of bytes (n, bytes of a block) to float32 (n, numbers of a block)


@dataclass(frozen=True)
class Format:
    """How a tensor's numbers lie in the file."""

    name: str
    block: int  # numbers that lie together
    n_bytes: int  # of a block
    numbers: Callable[[Tensor], Tensor]


def half(raw: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, in float32, (n, 1)."""
    return raw[:, at : at + 2].contiguous().view(torch.float16).float()


def bits(raw: Tensor, width: int, run: int) -> Tensor:
    """Whole numbers of `width` bits, in uint8, (n, 8 / width times the bytes).

    Of each run of bytes come the lowest bits of all, then the next ones of all, and so on.
    """
    runs, mask = raw.unflatten(1, (-1, run)).contiguous(), (1 << width) - 1
    numbers = [(runs >> shift).bitwise_and_(mask) for shift in range(0, 8, width)]
    return torch.stack(numbers, dim=2).flatten(1)


def q4_0(raw: Tensor) -> Tensor:
    return bits(raw[:, 2:], 4, 16).view(torch.int8).sub_(8) * half(raw, 0)


def q4_1(raw: Tensor) -> Tensor:
    return (bits(raw[:, 4:], 4, 16) * half(raw, 0)).add_(half(raw, 2))


def q5_0(raw: Tensor) -> Tensor:
    whole = bits(raw[:, 6:], 4, 16) | bits(raw[:, 2:6], 1, 1) << 4
    return whole.view(torch.int8).sub_(16) * half(raw, 0)


def q5_1(raw: Tensor) -> Tensor:
    whole = bits(raw[:, 8:], 4, 16) | bits(raw[:, 4:8], 1, 1) << 4
    return (whole * half(raw, 0)).add_(half(raw, 2))


def q8_0(raw: Tensor) -> Tensor:
    return raw[:, 2:].view(torch.int8) * half(raw, 0)


def q4_k(raw: Tensor) -> Tensor:
    return eight_groups(raw, bits(raw[:, 16:], 4, 32))


def q5_k(raw: Tensor) -> Tensor:
    return eight_groups(raw, bits(raw[:, 48:], 4, 32) | bits(raw[:, 16:48], 1, 32) << 4)


def eight_groups(raw: Tensor, whole: Tensor) -> Tensor:
    """Each 32 numbers times their step, less their offset: 6 bits each, times a float16 a block.

    Four steps and four offsets have a byte each, whose two upper bits belong to the other four.
    What these lack is in four bytes of their own.
    """
    step, offset, rest = raw[:, 4:16].split(4, dim=1)
    step_8 = torch.cat((step & 63, rest & 15 | step >> 2 & 48), dim=1) * half(raw, 0)
    offset_8 = torch.cat((offset & 63, rest >> 4 | offset >> 2 & 48), dim=1) * half(raw, 2)
    scaled = whole.unflatten(1, (8, 32)) * step_8[..., None]
    return scaled.sub_(offset_8[..., None]).flatten(1)


def q6_k(raw: Tensor) -> Tensor:
    whole = bits(raw[:, :128], 4, 64) | bits(raw[:, 128:192], 2, 32) << 4
    step_16 = raw[:, 192:208].view(torch.int8) * half(raw, 208)
    signed = whole.view(torch.int8).sub_(32).unflatten(1, (16, 16))
    return (signed * step_16[..., None]).flatten(1)


FORMATS = {  # by their codes in the file
    0: Format("F32", 1, 4, lambda raw: raw.view(torch.float32)),
    1: Format("F16", 1, 2, lambda raw: raw.view(torch.float16)),
    2: Format("Q4_0", 32, 18, q4_0),
    3: Format("Q4_1", 32, 20, q4_1),
    6: Format("Q5_0", 32, 22, q5_0),
    7: Format("Q5_1", 32, 24, q5_1),
    8: Format("Q8_0", 32, 34, q8_0),
    12: Format("Q4_K", 256, 144, q4_k),
    13: Format("Q5_K", 256, 176, q5_k),
    14: Format("Q6_K", 256, 210, q6_k),
    30: Format("BF16", 1, 2, lambda raw: raw.view(torch.bfloat16)),
}


def find_format(code: int) -> Format | None:
    """The format of that code; None if there is none."""
    if code in FORMATS:
        return FORMATS[code]
    # Here, as it takes 0.1 s, and most files need it for nothing.
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    if code not in [*GGMLQuantizationType]:
        return None
    kind = GGMLQuantizationType(code)

    def numbers(raw: Tensor) -> Tensor:
        # One long row: the package takes 16 rows at a time, however short they are.
        return torch.from_numpy(dequantize(raw.view(1, -1).numpy(), kind))

    return Format(kind.name, *GGML_QUANT_SIZES[kind], numbers)


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
    format: Format
    start: int  # its first byte, counted from the first tensor's
    n_bytes: int


def read_info(header: Header, name: str) -> TensorInfo:
    """What comes next in the header: the description of the tensor `name`."""
    n_axes = header.number("I")
    if not 1 <= n_axes <= 4:
        raise header.error(f"tensor {name!r} has {n_axes} axes, expected 1 to 4")
    shape = tuple(reversed(header.numbers("Q", n_axes)))
    code = header.number("I")
    form = find_format(code)
    if form is None:
        raise header.error(f"tensor {name!r} is in the unknown number format {code}")
    block = form.block
    if min(shape) < 1 or shape[-1] % block:
        raise header.error(f"tensor {name!r} has shape {shape} in {form.name}, blocks of {block}")
    n_bytes = math.prod(shape) // block * form.n_bytes
    return TensorInfo(shape, form, header.number("Q"), n_bytes)


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

    def forget_vocabulary(self) -> None:
        """Drops the fields that a tokenizer has been made of: Gemma's take 30 MB."""
        for name in [name for name in self.fields if name.startswith("tokenizer.ggml.")]:
            del self.fields[name]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights one by one, in float32, under Hugging Face's names and in its layout."""
        for stored in self.stored():
            yield stored.name, stored.read()

    def stored(self) -> "Iterator[StoredGGUF]":
        """The weights as they lie in the file."""
        for name, info in self.infos.items():
            if name != ROPE_FACTORS:
                yield StoredGGUF(self.hf_name(name), self.path, info.shape, self, name)

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

    def is_turned(self, theirs: str) -> bool:
        """True for a tensor with that name of Hugging Face's if its rows lie in another order."""
        return self.architecture == "llama" and theirs.split(".")[-2] in ("q_proj", "k_proj")

    def is_raised(self, theirs: str) -> bool:
        """True for a tensor with that name of Hugging Face's if 1 has been added to it."""
        return self.architecture.startswith("gemma") and theirs.endswith("norm.weight")

    def hf_layout(self, theirs: str, tensor: Tensor) -> Tensor:
        """The tensor with that name of Hugging Face's, as it has it; may change `tensor`."""
        if self.is_turned(theirs):
            n_heads = self.setting("attention.head_count")
            if theirs.split(".")[-2] == "k_proj":
                n_heads = self.setting("attention.head_count_kv", default=n_heads)
            if len(tensor) % (2 * n_heads):
                raise self.error(f"{theirs} has {len(tensor)} rows for {n_heads} heads")
            # Two by two what turns together: each head's rows lie as 0, h/2, 1, h/2 + 1, ...
            pairs = tensor.view(n_heads, -1, 2, *tensor.shape[1:])
            return pairs.transpose(1, 2).reshape(tensor.shape)
        if self.is_raised(theirs):
            # Nothing is lost in float32: all of gemma-3-270m's norms become bfloat16 numbers again,
            # which is what they were before llama.cpp added the 1.
            tensor -= 1
        return tensor

    def array(self, name: str) -> np.ndarray:
        """A tensor of the file in float32, in the file's layout."""
        out = torch.empty(self.infos[name].shape)
        self.read_numbers(name, 0, out.view(-1))
        return out.numpy()

    def read_numbers(self, name: str, first: int, out: Tensor) -> None:
        """Fills out, in one row, with the tensor's numbers from `first` on. Whole blocks only."""
        info = self.infos[name]
        block, n_bytes = info.format.block, info.format.n_bytes
        try:
            with open(self.path, "rb") as file:
                file.seek(self.data_start + info.start + first // block * n_bytes)
                for part in out.split(CHUNK):
                    raw = torch.empty(len(part) // block, n_bytes, dtype=torch.uint8)
                    if file.readinto(raw.numpy()) != raw.nbytes:
                        raise ValueError("cut off")
                    part.copy_(info.format.numbers(raw).view(-1))
        except NotImplementedError:
            what = f"tensor {name!r} is in {info.format.name}, which gguf cannot dequantize"
            raise self.error(what) from None
        except (OSError, ValueError) as err:  # it was whole when the header was read
            raise self.error(f"tensor {name!r} cannot be read ({err})") from err


@dataclass(frozen=True)
class StoredGGUF:
    """A weight in the file, by Hugging Face's name."""

    name: str
    file: Path
    shape: tuple[int, ...]
    gguf: GGUF = field(repr=False)
    name_there: str  # its name in the file

    scale = None
    numbers_dtype = torch.float32  # of what read_row reads

    @property
    def format_name(self) -> str:
        """How the file keeps its numbers: Q4_K."""
        return self.gguf.infos[self.name_there].format.name

    @property
    def in_order(self) -> bool:
        """Whether the file has its numbers just as Hugging Face has them."""
        return not (self.gguf.is_turned(self.name) or self.gguf.is_raised(self.name))

    def read(self) -> Tensor:
        """The weight, in float32."""
        return self.gguf.hf_layout(self.name, torch.from_numpy(self.gguf.array(self.name_there)))

    def read_row(self, first: int, out: Tensor) -> None:
        """Fills out, in one row, with the numbers from `first` on, if they are in order."""
        self.gguf.read_numbers(self.name_there, first, out)


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
