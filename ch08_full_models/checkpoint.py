"""Chapter 8: from a checkpoint on disk to a model that runs.

    model, tokenizer = load("smollm2-135m")        a name of MODELS, a folder, a .gguf, "org/name"
    for token_B1 in family_of(model).generate(model, tokens_BT, n_new=20): ...

A folder as Hugging Face lays it out: config.json says what to build, *.safetensors hold the
weights, tokenizer.json the vocabulary. download.py brings such a folder here; gguf_file.py reads
llama.cpp's single file instead. The families (gpt2.py, llama3.py, gemma3.py, ...) know of no files.

Loading takes little more memory than the weights. The model is laid out without any ("meta"), and
so are the stored tensors: names and shapes must fit before anything is read. Then each tensor is
read straight into its place, or, where the model has its numbers in another order, part by part.
The files are read, not mapped into memory, since the pages of a map that have been touched count as
this process's memory. With `quantize` the places are matrices of integers, and a matrix's floats
are never all there: some rows are read, become integers, and make room for the next ones.

FP8 (DeepSeek-V3): a matrix `x.weight` of 8-bit floats comes with `x.weight_scale_inv`, which has a
number for each block of 128 x 128. They are multiplied, whatever "inv" may say; a block at the edge
may be smaller.
"""

import importlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ch08_full_models import offload
from ch08_full_models.download import (
    INDEX,
    MODELS,
    CheckpointError,
    Model,
    fetch,
    read_header,
    read_json,
    shorten,
    table,
    weight_files,
)
from ch08_full_models.gguf_file import StoredGGUF, read_gguf
from ch08_full_models.tokenizer import Tokenizer, from_folder, from_gguf

__all__ = ["MODELS", "CheckpointError", "Model", "family_of", "fetch", "load", "table"]

FAMILIES = {  # model_type in config.json: the module that builds it
    "gpt2": "ch01_gpt2.gpt2",
    "llama": "ch08_full_models.llama3",
    "mistral": "ch08_full_models.llama3",
    "mistral3": "ch08_full_models.llama3",  # Mistral Small 3.1; its vision part is left out
    "qwen2": "ch08_full_models.llama3",
    "qwen2_moe": "ch08_full_models.qwen3",
    "qwen3": "ch08_full_models.qwen3",
    "qwen3_moe": "ch08_full_models.qwen3",
    "mixtral": "ch08_full_models.mixtral",
    "gemma2": "ch08_full_models.gemma3",
    "gemma3_text": "ch08_full_models.gemma3",
    "gemma3": "ch08_full_models.gemma3",  # 4B and up; its vision part is left out
    "olmo2": "ch08_full_models.olmo2",
    "smollm3": "ch08_full_models.smollm3",
    "llama4_text": "ch08_full_models.llama4",
    "llama4": "ch08_full_models.llama4",  # its vision part is left out
    "deepseek_v2": "ch08_full_models.deepseek_v3",
    "deepseek_v3": "ch08_full_models.deepseek_v3",
    "kimi_k2": "ch08_full_models.deepseek_v3",
    "youtu": "ch08_full_models.deepseek_v3",
}
NOT_RUN = {  # model_type: why not
    kind: "its layers read embeddings of their own and share caches, which no file here does"
    for kind in ("gemma3n", "gemma3n_text")
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
FP8, SCALE = "F8_E4M3", "_scale_inv"  # how a file says it; what the name of its scales ends in
FP8_NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # by its byte
BLOCK = 1 << 20  # numbers that are read at a time if they change dtype or device
PART = 1 << 18  # numbers that are floats at a time if they become integers
ROWS = 64  # such a part is a multiple of this: torch packs 4-bit numbers by so many rows at most


@torch.inference_mode(False)  # weights made within it are copied by some of torch's products
def load(
    name: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantize: str | None = None,
    memory: int | None = None,
    mtp: bool = False,
    compile: bool = False,
    two_step: bool = False,
) -> tuple[nn.Module, Tokenizer | None]:
    """A model ready to generate, and its Tokenizer, or None if the folder has none.

    name is what fetch takes. dtype is float32, bfloat16 or float16; by default the checkpoint's
    own, and for a .gguf float32. device is by default cuda, mps or cpu, whichever is there.
    quantize is "int8" or "int4"; what stays in floats is on a CPU by default bfloat16, for which
    torch's products with int8 are five times as fast as for float32. memory: bytes that the weights
    of a folder may take; what is over that stays on disk until it is called (offload.py), and
    model.disk counts how often it is read. mtp: with the module for multi-token prediction
    (deepseek_v3.py). compile: one token's forward as one compiled function (decode.py), on a CPU.
    two_step: only the likeliest token's logit is exact, for temperature 0 and bfloat16 on a CPU.
    Raises CheckpointError for what cannot be found, read or built.
    """
    if quantize not in (None, "int8", "int4"):
        raise CheckpointError(f"quantize is {quantize!r}, expected 'int8' or 'int4'")
    if quantize and memory is not None:
        raise CheckpointError("quantize needs all weights in memory, so it goes without `memory`")
    dtype, device = to_dtype(dtype, "dtype") if dtype else None, pick_device(device)
    if quantize and device.type == "cpu":
        dtype = dtype or torch.bfloat16
    path = fetch(name)
    if path.is_dir():
        model, tokenizer = load_folder(path, dtype, device, quantize, memory, mtp)
    elif memory is not None or mtp:
        raise CheckpointError(f"{path}: expected a folder, for `memory` and `mtp`")
    elif path.suffix.lower() == ".gguf":
        model, tokenizer = load_gguf(path, dtype, device, quantize)
    else:
        raise CheckpointError(f"{path}: expected a folder or a .gguf file")
    if device.type == "cpu" and getattr(model, "disk", None) is None:
        make_faster(model, compile, two_step)
    elif compile or two_step:
        what = "compiled steps need" if compile else "a head in two steps needs"
        raise CheckpointError(f"{what} a CPU, and all weights in memory")
    return model.eval(), tokenizer


def make_faster(model: nn.Module, compile: bool, two_step: bool) -> None:
    """What keeps outputs within rounding (speed.py and its like), and what was asked for.

    Raises CheckpointError for a model that cannot be compiled, or have a head in two steps.
    """
    from ch08_full_models import decode, prompt, speed

    dtype = model.embed.weight.dtype
    if isinstance(model.embed.weight, Tensor):  # else packed, and what is left in floats is small
        tried = {torch.bfloat16: speed.mv_is_faster, torch.float32: speed.parts_are_faster}
        if dtype in tried and tried[dtype]():
            speed.vector_products(model)
    if dtype == torch.bfloat16:
        decode.short_norms(prompt.block_attention(decode.grouped_attention(model)))
    if any(hasattr(module, "experts") for module in model.modules()):
        from ch08_full_models import experts  # imports four families: only where it is of use

        experts.fast_experts(model)
    try:
        if two_step:
            decode.two_step_head(model)
        if compile:
            decode.compiled_steps(model)
    except ValueError as err:
        raise CheckpointError(one_line(err)) from err


def load_folder(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    quantize: str | None = None,
    memory: int | None = None,
    mtp: bool = False,
) -> tuple[nn.Module, Tokenizer | None]:
    """Model and tokenizer of a Hugging Face folder; model.disk reads what is not in memory."""
    where = folder / "config.json"
    hf = read_json(where)
    family = find_family(hf, where)
    stored = join_scales(read_folder(folder), hf, where)
    model = build(family, hf, where, dtype or checkpoint_dtype(hf, where, stored), mtp)
    moves = plan(model, family, stored)
    check(model, family, moves, folder)
    try:
        waiting, budget = ([], 0) if memory is None else offload.choose(model, memory)
    except ValueError as err:
        raise CheckpointError(f"{folder}: {one_line(err)}") from err
    late = places(model, family, moves) if waiting else {}
    pack(model, quantize, folder)
    allocate(model, where, device, waiting)
    read_into(model, family, moves)
    model.disk = offload.leave(model, waiting, late, budget, device) if waiting else None
    return model, from_folder(folder)


def load_gguf(
    file: Path, dtype: torch.dtype | None, device: torch.device, quantize: str | None = None
) -> tuple[nn.Module, Tokenizer]:
    """Model and tokenizer of a GGUF file."""
    gguf = read_gguf(file)
    hf = gguf.config()
    family = find_family(hf, file)
    model = build(family, hf, file, dtype or torch.float32)
    moves = plan(model, family, list(gguf.stored()))
    check(model, family, moves, file)
    tokenizer = from_gguf(gguf)
    gguf.forget_vocabulary()
    pack(model, quantize, file, moves)
    allocate(model, file, device)
    read_into(model, family, moves)
    return model, tokenizer


def family_of(model: nn.Module) -> ModuleType:
    """The module of the model's family, which has its generate()."""
    return sys.modules[type(model).__module__]


def to_dtype(dtype: torch.dtype | str, where: str) -> torch.dtype:
    """The dtype itself, or the one of that name. Raises CheckpointError for one we do not run."""
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise CheckpointError(f"{where} is {dtype}, expected one of {', '.join(DTYPES)}")
    return found


def pick_device(device: torch.device | str | None) -> torch.device:
    """The device, by default the fastest there is. Raises CheckpointError for one that is not."""
    if device is None:
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as err:  # the latter: torch without CUDA
        raise CheckpointError(f"device {device} cannot be used: {one_line(err)}") from err


def find_family(hf: dict, where: Path) -> ModuleType:
    """The module that builds what config.json describes. CheckpointError if there is none."""
    text = hf.get("text_config")
    inner = text.get("model_type") if isinstance(text, dict) else None  # of a multimodal model
    for kind in (hf.get("model_type"), inner or hf.get("model_type")):
        if isinstance(kind, str) and kind in NOT_RUN:
            raise CheckpointError(f"{where}: model_type {kind!r} cannot be run: {NOT_RUN[kind]}")
        if not isinstance(kind, str) or kind not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise CheckpointError(f"{where}: model_type is {kind!r}, expected one of {known}")
    return importlib.import_module(FAMILIES[kind])


class NoInit(TorchFunctionMode):
    """Within it torch.nn.init does nothing: what has no memory needs no random numbers.

    For DeepSeek-V3's 45,395 parameters that makes 3 s out of 20 s.
    """

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build(
    family: ModuleType, hf: dict, where: Path, dtype: torch.dtype, mtp: bool = False
) -> nn.Module:
    """The model that config.json describes, laid out without memory. Raises CheckpointError.

    Its hf_config is what config.json says; export.py writes it again.
    """
    n_mtp = {"n_mtp": 1} if mtp else {}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"), NoInit():
            cfg = family.config_from_hf(hf)
            if mtp and not hasattr(cfg, "n_mtp"):
                what = f"{family.__name__.rpartition('.')[2]} has no multi-token prediction"
                raise ValueError(what)
            model = family.Transformer(replace(cfg, **n_mtp))
    except KeyError as err:
        raise CheckpointError(f"{where}: {one_line(err)} is missing") from err
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as err:
        raise CheckpointError(f"{where}: {one_line(err)}") from err  # numbers that are none, say
    finally:
        torch.set_default_dtype(before)
    model.hf_config = hf
    return model


def pack(model: nn.Module, quantize: str | None, path: Path, moves: "Sequence[Move]" = ()) -> None:
    """Where quantize says so, matrices of integers take the place of the model's, all on "meta".

    Those that a GGUF file has in 4 bits may stay so in int4: moves say which. Raises
    CheckpointError for a model that cannot be quantized.
    """
    if quantize:
        from ch08_full_models import speed

        finer = {
            name.split(".")[-2]
            for move in moves
            for name in move.parts
            if name.endswith(".weight") and move.stored.format_name not in ("Q4_0", "Q4_1")
        }
        eight_bits = tuple(n for n in speed.EIGHT_BITS if not moves or n in finer)
        try:
            speed.quantize(model, quantize, eight_bits=eight_bits)
        except ValueError as err:
            raise CheckpointError(f"{path}: {one_line(err)}") from err


def allocate(
    model: nn.Module, where: Path, device: torch.device, waiting: Sequence[nn.Module] = ()
) -> None:
    """Gives the model memory for its weights, but for parts that wait on disk.

    Raises CheckpointError if there is none.
    """

    def memory(tensor: Tensor) -> Tensor:
        # Module.to_empty would do the same, and import 0.2 s worth of sympy.
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    without = {module for part in waiting for module in part.modules()}
    try:
        for module in model.modules():
            if module not in without:
                module._apply(memory, recurse=False)
    except RuntimeError as err:
        what = f"no room for the model on {device}: {one_line(err)}"
        raise CheckpointError(f"{where}: {what}") from err


def check(model: nn.Module, family: ModuleType, moves: "list[Move]", path: Path) -> None:
    """Has the family find a place for every tensor, as it does for weights, but without memory.

    Raises CheckpointError for a tensor that is missing, left over or of the wrong shape. It names
    the file that holds the tensor, or the path.
    """
    try:
        family.load_weights(model, ((move.stored.name, move.probe) for move in moves))
    except (KeyError, RuntimeError, ValueError) as err:
        text, files = one_line(err), {move.stored.name: move.stored.file for move in moves}
        file = next((files[word] for word in text.replace(":", " ").split() if word in files), path)
        raise CheckpointError(f"{file}: {text}") from err


def one_line(err: Exception) -> str:
    """The error's message on one line."""
    return shorten(str(err.args[0] if isinstance(err, KeyError) and err.args else err), 400)


# Where a weight goes: a parameter's memory, or a matrix of integers that has put(row, floats)
Target = Tensor | nn.Module


@dataclass(frozen=True)
class Stored:
    """A tensor in a .safetensors file."""

    name: str
    file: Path
    start: int  # byte in the file
    dtype: str  # as the file says it: BF16
    shape: tuple[int, ...]
    scale: "Stored | None" = None  # of an FP8 matrix: the number that each block is multiplied by
    block: tuple[int, int] = (1, 1)  # rows and columns of its blocks

    def read(self) -> Tensor:
        """The tensor; one in FP8 as float32."""
        if self.scale:
            tensor = torch.empty(self.shape, dtype=torch.float32)
            self.read_blocks(tensor)
        else:
            tensor = torch.empty(self.shape, dtype=STORED_DTYPES[self.dtype])
            self.read_numbers(0, tensor.view(-1))
        return tensor

    @property
    def in_order(self) -> bool:
        """Whether its numbers can be read from the file as they are."""
        return self.scale is None

    @property
    def numbers_dtype(self) -> torch.dtype:
        """Of the numbers in the file."""
        return STORED_DTYPES[self.dtype]

    def read_parts(self, parts: list[tuple[Tensor, Target]]) -> None:
        """Reads parts of the tensor, each a view of its probe, to their targets.

        Parts that lie in one another's gaps, as columns do, are read in one go.
        """
        stretches: list[tuple[int, int, list[tuple[Tensor, Target]]]] = []
        for view, target in sorted(parts, key=lambda part: part[0].storage_offset()):
            first = view.storage_offset()
            last = first + sum(s * (n - 1) for n, s in zip(view.shape, view.stride(), strict=True))
            if stretches and first <= stretches[-1][1]:
                first, before, inside = stretches.pop()
                stretches.append((first, max(before, last), [*inside, (view, target)]))
            else:
                stretches.append((first, last, [(view, target)]))
        for first, last, inside in stretches:
            if len(inside) == 1 and inside[0][0].is_contiguous():
                read_to(inside[0][1], self, first)
                continue
            row = torch.empty(last + 1 - first, dtype=self.numbers_dtype)
            self.read_numbers(first, row)
            for view, target in inside:
                start = view.storage_offset() - first
                write(target, row.as_strided(view.shape, view.stride(), start))

    def read_row(self, first: int, out: Tensor) -> None:
        """Fills out, in one row, with the numbers from `first` on."""
        dtype = self.numbers_dtype
        if (out.dtype, out.device.type) == (dtype, "cpu"):
            self.read_numbers(first, out)
            return
        buffer = torch.empty(min(BLOCK, len(out)), dtype=dtype)
        for begin in range(0, len(out), BLOCK):
            block = out[begin : begin + BLOCK]
            self.read_numbers(first + begin, buffer[: len(block)])
            block.copy_(buffer[: len(block)])

    def read_blocks(self, out: Tensor) -> None:
        """Fills a matrix with this one in FP8 times its scales, one row of blocks at a time.

        Bytes are looked up in a table: measured, 4 times as fast as torch's conversion.
        """
        (n_rows, n_columns), width = self.block, self.shape[1]
        buffer = torch.empty(n_rows * width, dtype=torch.uint8)
        for i, scale in enumerate(self.scale.read().float()):
            rows = out[i * n_rows : (i + 1) * n_rows]
            code = buffer[: rows.numel()]
            self.read_numbers(i * n_rows * width, code)
            numbers = FP8_NUMBERS.index_select(0, code.int()).view(rows.shape)
            rows.copy_(numbers.mul_(scale.repeat_interleave(n_columns)[:width]))

    def read_numbers(self, first: int, out: Tensor) -> None:
        """Fills out, in one row and of the file's dtype, with the numbers from `first` on."""
        raw = out.view(torch.uint8).numpy()
        try:
            with self.file.open("rb") as f:
                f.seek(self.start + first * out.itemsize)
                n_read = f.readinto(raw)
        except OSError as err:
            raise CheckpointError(f"{self.file}: cannot be read ({err.strerror})") from err
        if n_read != raw.nbytes:
            raise CheckpointError(f"{self.file}: cut off within {self.name}")


def read_folder(folder: Path) -> list[Stored]:
    """All tensors of a folder, as they lie in its files.

    Raises CheckpointError for a file that is missing, cut off or damaged, and for an index that
    promises what its files do not hold.
    """
    stored: dict[str, Stored] = {}
    for file, promised in weight_files(folder).items():
        header, start = read_header(file)
        for name in promised:
            if name not in header:
                raise CheckpointError(f"{file}: lacks {name}, which {INDEX} says it holds")
        for name, entry in header.items():
            if name in stored:
                raise CheckpointError(f"{file}: {name} is in {stored[name].file.name} as well")
            stored[name] = read_entry(name, file, entry, start)
    return list(stored.values())


def read_entry(name: str, file: Path, entry: dict, start: int) -> Stored:
    """The tensor that a header's entry describes. Raises CheckpointError if its parts disagree."""
    begin, stop = entry["data_offsets"]
    dtype, shape = str(entry.get("dtype")), entry.get("shape")
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise CheckpointError(f"{file}: {name}: damaged header: its shape is {shape!r}")
    itemsize = 1 if dtype == FP8 else STORED_DTYPES[dtype].itemsize if dtype in STORED_DTYPES else 0
    if itemsize and math.prod(shape) * itemsize != stop - begin:
        what = f"{dtype} of shape {tuple(shape)} in {stop - begin:,} bytes"
        raise CheckpointError(f"{file}: {name}: damaged header: {what}")
    return Stored(name, file, start + begin, dtype, tuple(shape))


def checkpoint_dtype(hf: dict, where: Path, stored: list[Stored]) -> torch.dtype:
    """What the checkpoint is meant to run in: as config.json says, else as the first tensor is."""
    for config in (hf, hf.get("text_config")):
        for key in ("torch_dtype", "dtype"):
            if isinstance(config, dict) and config.get(key):
                return to_dtype(config[key], f"{where}: {key}")
    first = next((t for t in stored if t.dtype in STORED_DTYPES), None)
    return STORED_DTYPES[first.dtype] if first else torch.float32


def join_scales(stored: list[Stored], hf: dict, where: Path) -> list[Stored]:
    """The tensors; an FP8 matrix takes up its scales, which then are no tensor of their own.

    The two may lie in different files. Raises CheckpointError for shapes that do not fit.
    """
    quantization = hf.get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    by_name = {t.name: t for t in stored}
    joined: dict[str, Stored] = {}
    for t in stored:
        scale = by_name.get(t.name + SCALE)
        if t.dtype != FP8 or not scale:
            continue
        if not isinstance(block, list) or [type(n) for n in block] != [int, int] or min(block) < 1:
            what = f"quantization_config: weight_block_size is {block!r}, expected two numbers"
            raise CheckpointError(f"{where}: {what}, for {t.name}")
        needed = tuple(math.ceil(n / size) for n, size in zip(t.shape, block, strict=False))
        if len(t.shape) != 2 or scale.shape != needed or scale.dtype not in STORED_DTYPES:
            what = f"{scale.dtype} {scale.shape}, not {needed} as {t.name} {t.shape} needs"
            raise CheckpointError(f"{scale.file}: {scale.name} is {what}")
        joined[t.name] = replace(t, scale=scale, block=tuple(block))
    used = {t.scale.name for t in joined.values()}
    return [joined.get(t.name, t) for t in stored if t.name not in used]


@dataclass(frozen=True)
class Move:
    """A stored tensor, and what becomes of it."""

    stored: Stored | StoredGGUF
    probe: Tensor  # of its shape, without memory
    parts: dict[str, Tensor]  # parameter: what `convert` makes of the probe for it


def plan(model: nn.Module, family: ModuleType, stored: Sequence[Stored | StoredGGUF]) -> list[Move]:
    """Where each tensor goes. Raises CheckpointError for numbers in a format that is not read."""
    params, moves = dict(model.named_parameters()), []
    for t in stored:
        # Gemma's norms are raised by one: sums without memory have torch import its compiler, which
        # takes a second. So a small row gets some.
        small = len(t.shape) == 1 and t.shape[0] < BLOCK
        probe = torch.empty(t.shape, device="cpu" if small else "meta")
        try:
            parts = family.convert({t.name: probe})
        except (IndexError, KeyError, RuntimeError, ValueError) as err:
            raise CheckpointError(f"{t.file}: {t.name} is {t.shape}: {one_line(err)}") from err
        moves.append(Move(t, probe, {name: w for name, w in parts.items() if name in params}))
        if not moves[-1].parts or isinstance(t, StoredGGUF) or t.dtype in STORED_DTYPES or t.scale:
            continue
        formats = ", ".join([*STORED_DTYPES, FP8])
        what = f"expected one of {formats}"
        if t.dtype == FP8:
            what = f"but no file holds {t.name}{SCALE} to multiply it by"
        raise CheckpointError(f"{t.file}: {t.name} is {t.dtype}, {what}")
    return moves


def read_into(model: nn.Module, family: ModuleType, moves: list[Move]) -> None:
    """Reads the tensors one by one into the model, whose names and shapes fit.

    Parameters without memory are left as they are.
    """
    targets: dict[str, Target] = {n: p for n, p in model.named_parameters() if not p.is_meta}
    for name, module in model.named_modules():
        if hasattr(module, "put"):  # an embedding's is its `matrix`
            targets[f"{name.removesuffix('.matrix')}.weight"] = module
    # Linux's malloc has the system make each piece of memory that is larger than any it was given
    # back, and take it away again: with every part that is read. So it is given 4 MB back.
    torch.empty(4 << 20, dtype=torch.uint8)
    for move in moves:
        parts = {name: w for name, w in move.parts.items() if name in targets}
        if parts:
            read_move(family, replace(move, parts=parts), targets)


@torch.no_grad()
def read_move(family: ModuleType, move: Move, targets: dict[str, Target]) -> None:
    """Reads one tensor to the targets that it has parts for.

    A parameter that is the stored tensor, or a view of it, is read straight into its place. So not
    even an embedding that is half of the model, or a layer's experts in one tensor, is held twice.
    """
    t, probe, parts = move.stored, move.probe, move.parts
    whole = next((targets[name] for name, part in parts.items() if part is probe), None)
    if len(parts) == 1 and whole is not None and t.in_order:
        read_to(whole, t)
    elif isinstance(whole, Tensor) and t.scale:
        t.read_blocks(whole)
    elif (
        isinstance(t, Stored)
        and t.in_order
        and all(part is probe or part._base is probe for part in parts.values())
    ):
        t.read_parts([(part, targets[name]) for name, part in parts.items()])
    else:
        for name, w in family.convert({t.name: t.read()}).items():
            if name in parts:
                write(targets[name], w)


def read_to(target: Target, stored: Stored | StoredGGUF, first: int = 0) -> None:
    """Reads a weight whose numbers lie in order, from the stored tensor's number `first` on."""
    if isinstance(target, Tensor):
        stored.read_row(first, target.view(-1))
        return
    for rows in row_parts(target):
        w_ND = torch.empty(len(rows), target.in_features, dtype=stored.numbers_dtype)
        stored.read_row(first + rows.start * target.in_features, w_ND.view(-1))
        target.put(rows.start, w_ND)


def write(target: Target, w: Tensor) -> None:
    """Puts a weight that is in memory where it belongs."""
    if isinstance(target, Tensor):
        target.copy_(w)
        return
    for rows in row_parts(target):
        target.put(rows.start, w[rows.start : rows.stop])


def row_parts(matrix: nn.Module) -> Iterator[range]:
    """The matrix's rows, in the parts that its `put` takes: PART numbers, in multiples of ROWS.

    Scales of columns are found in the first part, so it is as large as in speed.put_all.
    """
    from ch08_full_models import speed

    n_rows = max(ROWS, PART // matrix.in_features // ROWS * ROWS)
    n_rows = n_rows if matrix.column_D is None else speed.PART
    for start in range(0, matrix.out_features, n_rows):
        yield range(start, min(start + n_rows, matrix.out_features))


def places(model: nn.Module, family: ModuleType, moves: list[Move]) -> dict[str, offload.Place]:
    """How to read each parameter by itself."""
    params = dict(model.named_parameters())

    def read_to(move: Move, name: str, out: Tensor) -> None:
        read_move(family, replace(move, parts={name: move.parts[name]}), {name: out})

    return {
        name: offload.Place(partial(read_to, move, name), params[name])
        for move in moves
        for name in move.parts
    }
