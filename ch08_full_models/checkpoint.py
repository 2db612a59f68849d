"""Chapter 8: from a checkpoint on disk to a model that runs.

    model, tokenizer = load("smollm2-135m")        a name of MODELS, a folder, a .gguf, "org/name"
    for token_B1 in family_of(model).generate(model, tokens_BT, n_new=20): ...

A folder as Hugging Face lays it out: config.json says what to build, *.safetensors hold the
weights, tokenizer.json the vocabulary. download.py brings such a folder here; gguf_file.py reads
llama.cpp's single file instead. The families (gpt2.py, llama3.py, gemma3.py) know nothing of files.

Loading takes little more memory than the weights: the model is laid out without any ("meta"), and
each tensor is read and copied into its place before the next one. The files are read, not mapped
into memory, since the pages of a map that have been touched count as this process's memory.
"""

import importlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn as nn
from torch import Tensor

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
from ch08_full_models.gguf_file import read_gguf
from ch08_full_models.tokenizer import Tokenizer, from_folder, from_gguf

__all__ = ["MODELS", "CheckpointError", "Model", "family_of", "fetch", "load", "table"]

FAMILIES = {  # model_type in config.json: the module that builds it
    "gpt2": "ch01_gpt2.gpt2",
    "llama": "ch08_full_models.llama3",
    "mistral": "ch08_full_models.llama3",
    "qwen2": "ch08_full_models.llama3",
    "gemma2": "ch08_full_models.gemma3",
    "gemma3_text": "ch08_full_models.gemma3",
    "gemma3": "ch08_full_models.gemma3",  # with a vision part, which is left out
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
BLOCK = 1 << 20  # numbers that are read at a time if they change dtype or device


def load(
    name: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantize: str | None = None,
) -> tuple[nn.Module, Tokenizer | None]:
    """A model ready to generate, and its Tokenizer, or None if the folder has none.

    name is what fetch takes. dtype is float32, bfloat16 or float16; by default the checkpoint's
    own, and for a .gguf float32. device is by default cuda, mps or cpu, whichever is there.
    quantize is "int8" or "int4". Raises CheckpointError for what cannot be found, read or built.
    """
    if quantize not in (None, "int8", "int4"):
        raise CheckpointError(f"quantize is {quantize!r}, expected 'int8' or 'int4'")
    dtype, device = to_dtype(dtype, "dtype") if dtype else None, pick_device(device)
    path = fetch(name)
    if path.is_dir():
        model, tokenizer = load_folder(path, dtype, device)
    elif path.suffix.lower() == ".gguf":
        model, tokenizer = load_gguf(path, dtype, device)
    else:
        raise CheckpointError(f"{path}: expected a folder or a .gguf file")
    if quantize:
        from ch08_full_models import speed

        try:
            speed.quantize(model, quantize)
        except ValueError as err:
            raise CheckpointError(f"{path}: {one_line(err)}") from err
    return model.eval(), tokenizer


def load_folder(
    folder: Path, dtype: torch.dtype | None, device: torch.device
) -> tuple[nn.Module, Tokenizer | None]:
    """Model and tokenizer of a Hugging Face folder."""
    where = folder / "config.json"
    hf = read_json(where)
    family = find_family(hf, where)
    stored = read_folder(folder)
    model = build(family, hf, where, dtype or checkpoint_dtype(hf, where, stored), device)
    files = {t.name: t.file for t in stored}
    fill(model, family, read_into(model, family, stored), files, folder)
    return model, from_folder(folder)


def load_gguf(
    file: Path, dtype: torch.dtype | None, device: torch.device
) -> tuple[nn.Module, Tokenizer]:
    """Model and tokenizer of a GGUF file."""
    gguf = read_gguf(file)
    hf = gguf.config()
    family = find_family(hf, file)
    model = build(family, hf, file, dtype or torch.float32, device)
    fill(model, family, adopt(model, family, gguf.tensors()), {}, file)
    return model, from_gguf(gguf)


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
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"{where}: model_type is {kind!r}, expected one of {known}")
    return importlib.import_module(FAMILIES[kind])


def build(
    family: ModuleType, hf: dict, where: Path, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The model that config.json describes, its weights not yet set. Raises CheckpointError."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = family.Transformer(family.config_from_hf(hf))
    except KeyError as err:
        raise CheckpointError(f"{where}: {one_line(err)} is missing") from err
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as err:
        raise CheckpointError(f"{where}: {one_line(err)}") from err  # numbers that are none, say
    finally:
        torch.set_default_dtype(before)
    try:
        return model.to_empty(device=device)
    except RuntimeError as err:
        what = f"no room for the model on {device}: {one_line(err)}"
        raise CheckpointError(f"{where}: {what}") from err


def fill(
    model: nn.Module,
    family: ModuleType,
    weights: Iterator[tuple[str, Tensor]],
    files: dict[str, Path],
    path: Path,
) -> None:
    """Loads the weights into the model.

    Raises CheckpointError for a tensor that is missing, left over or of the wrong shape. It names
    the file that holds the tensor, if files (tensor name -> file) says, else the path.
    """
    try:
        family.load_weights(model, weights)
    except CheckpointError:
        raise
    except (KeyError, RuntimeError, ValueError) as err:
        text = one_line(err)
        file = next((files[word] for word in text.replace(":", " ").split() if word in files), path)
        raise CheckpointError(f"{file}: {text}") from err


@torch.no_grad()
def adopt(
    model: nn.Module, family: ModuleType, weights: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The weights, for load_weights. One that is just what the model needs becomes the parameter's
    memory, in place of the empty one, and load_weights gets the parameter itself: nothing to copy.
    """
    params = dict(model.named_parameters())
    for name, tensor in weights:
        for ours, kept in family.convert({name: tensor}).items():
            param = params.get(ours)
            if kept is tensor and param is not None and alike(param, tensor):
                param.data = tensor
                tensor = param
        yield name, tensor


def alike(a: Tensor, b: Tensor) -> bool:
    """True if one can take the other's place."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def one_line(err: Exception) -> str:
    """The error's message on one line."""
    return shorten(str(err.args[0] if isinstance(err, KeyError) and err.args else err), 400)


@dataclass(frozen=True)
class Stored:
    """A tensor in a .safetensors file."""

    name: str
    file: Path
    start: int  # byte in the file
    dtype: str  # as the file says it: BF16
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor."""
        tensor = torch.empty(self.shape, dtype=STORED_DTYPES[self.dtype])
        self.read_numbers(0, tensor.view(-1))
        return tensor

    def read_to(self, param: Tensor) -> None:
        """Reads the tensor into a parameter of its shape."""
        dtype, numbers = STORED_DTYPES[self.dtype], param.view(-1)
        if (param.dtype, param.device.type) == (dtype, "cpu"):
            self.read_numbers(0, numbers)
            return
        buffer = torch.empty(min(BLOCK, len(numbers)), dtype=dtype)
        for first in range(0, len(numbers), BLOCK):
            block = numbers[first : first + BLOCK]
            self.read_numbers(first, buffer[: len(block)])
            block.copy_(buffer[: len(block)])

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
    if dtype in STORED_DTYPES and math.prod(shape) * STORED_DTYPES[dtype].itemsize != stop - begin:
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


@torch.no_grad()
def read_into(
    model: nn.Module, family: ModuleType, stored: list[Stored]
) -> Iterator[tuple[str, Tensor]]:
    """Reads the tensors one by one, for load_weights.

    A probe, a tensor of the same shape without memory, shows first what becomes of each. One that
    the model has no place for is not read: load_weights gets the probe and says whether that is an
    error. One that is kept as it is stored is read straight into its place, and load_weights gets
    the place itself. So not even an embedding that is half of the model is ever held twice.
    Raises CheckpointError for numbers in a format that is not read, such as float8.
    """
    params = dict(model.named_parameters())
    for t in stored:
        probe = torch.empty(t.shape, device="meta")
        places = family.convert({t.name: probe})
        if not places.keys() & params.keys():
            yield t.name, probe
            continue
        if t.dtype not in STORED_DTYPES:
            formats = ", ".join(STORED_DTYPES)
            raise CheckpointError(f"{t.file}: {t.name} is {t.dtype}, expected one of {formats}")
        [name, kept], *others = places.items()
        if others or kept is not probe or params[name].shape != t.shape:
            yield t.name, t.read()
        else:
            t.read_to(params[name])
            yield t.name, params[name]
