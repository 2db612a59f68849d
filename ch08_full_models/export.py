"""Chapter 8: a loaded model back to a Hugging Face folder, which transformers reads as well.

    model, tokenizer = load("folder")
    export(model, "folder", "new-folder")       the second argument: where the tokenizer's files are

The inverse of loading. config.json is the one the model was built from (checkpoint.build keeps it
as model.hf_config), changed where it is no longer true. Tensors get their published names by the
family's HF_NAMES; the few families whose `convert` does more than rename have it undone here.
Of a multimodal model this is the text part, which transformers knows as a model of its own.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ch08_full_models.checkpoint import build, family_of, one_line
from ch08_full_models.download import INDEX, SINGLE, CheckpointError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


def export(
    model: nn.Module,
    tokenizer_folder: str | Path | None,
    folder: str | Path,
    shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes the model, and a tokenizer if there is one, to a new folder: the folder's path.

    The folder gets its name when all of it is written. Raises CheckpointError if it is there
    already, if the disk does not take it, or if the model is no longer as it was loaded.
    """
    folder = Path(folder).expanduser()
    if os.path.lexists(folder):
        raise CheckpointError(f"{folder}: is there already")
    family, tensors, config = family_of(model), hub_tensors(model), hub_config(model)
    unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        unfinished.mkdir()
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        if tokenizer_folder is not None:
            copy_tokenizer(Path(tokenizer_folder).expanduser(), unfinished)
        write_shards(unfinished, tensors, JOIN.get(family.__name__, only), shard_bytes)
        os.rename(unfinished, folder)
    except (OSError, SafetensorError) as err:
        what = getattr(err, "strerror", None) or one_line(err)
        raise CheckpointError(f"{folder}: cannot be written ({what})") from err
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def hub_config(model: nn.Module) -> dict:
    """What config.json is to say."""
    hf = model.hf_config
    tokens = {key: hf[key] for key in ("bos_token_id", "eos_token_id") if key in hf}
    config = hf.get("text_config", hf) | tokens
    for key in ("quantization_config", "dtype", "num_nextn_predict_layers"):
        config.pop(key, None)  # no FP8, no multi-token prediction
    if config["model_type"] == "kimi_k2":  # code of its own; transformers has what it is
        config["model_type"] = "deepseek_v3"
    if "attn_temperature_tuning" in config:  # Llama 4's files have a number for true
        config["attn_temperature_tuning"] = bool(config["attn_temperature_tuning"])
    config["torch_dtype"] = str(model.embed.weight.dtype).removeprefix("torch.")
    config["tie_word_embeddings"] = not hasattr(model, "head")
    return config


def hub_tensors(model: nn.Module) -> dict[str, list[Tensor]]:
    """Published name -> the parameters, in order, that make up the tensor.

    Raises CheckpointError if the model is not what its config.json describes.
    """
    family, hf = family_of(model), getattr(model, "hf_config", None)
    params = dict(model.named_parameters())
    if hf is None:
        raise CheckpointError("the model was not loaded from a checkpoint: it has no hf_config")
    empty = build(family, hf, Path("config.json"), torch.float32).named_parameters()
    for name, param in empty:
        if name not in params or params[name].is_meta or params[name].shape != param.shape:
            what = "quantized models, and those partly on disk, cannot be exported"
            raise CheckpointError(f"the model has no {name} as it was loaded; {what}")
    tensors: dict[str, list[Tensor]] = {}
    for name, param in params.items():
        theirs = family.rename(name, family.HF_NAMES)
        tensors.setdefault(re.sub(r"\.[qkv]$", "", theirs), []).append(param.detach())
    return tensors


# What `convert` did, undone: the tensor that is stored under a name, made of our parameters


Join = Callable[[str, list[Tensor]], Tensor]


def only(name: str, parts: list[Tensor]) -> Tensor:
    [part] = parts
    return part


def join_gpt2(name: str, parts: list[Tensor]) -> Tensor:
    """q, k and v side by side; matrices as input by output."""
    joined = torch.cat(parts)
    return joined.T if re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name) else joined


def join_gemma3(name: str, parts: list[Tensor]) -> Tensor:
    """Norm weights without the one."""
    part = only(name, parts)
    return (part.float() - 1).to(part.dtype) if "norm" in name else part


def join_llama4(name: str, parts: list[Tensor]) -> Tensor:
    """A layer's experts in one tensor, each as input by output: the gate's columns, then up's."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return only(name, parts)
    size = 2 if name.endswith("gate_up_proj") else 1
    experts = (parts[i : i + size] for i in range(0, len(parts), size))
    return torch.stack([torch.cat(expert).T for expert in experts])


JOIN: dict[str, Join] = {
    "ch01_gpt2.gpt2": join_gpt2,
    "ch08_full_models.gemma3": join_gemma3,
    "ch08_full_models.llama4": join_llama4,
}


# Files


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies what belongs to a tokenizer. Raises CheckpointError if there is none."""
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not {file.name for file in files} & {"tokenizer.json", "vocab.json"}:
        raise CheckpointError(f"{source}: has no tokenizer.json")
    for file in files:
        shutil.copy(file, target)


def write_shards(
    folder: Path, tensors: dict[str, list[Tensor]], join: Join, shard_bytes: int
) -> None:
    """Writes the tensors to one file, or to several of at most so many bytes, and an index.

    A tensor that is larger has a file of its own. Only one file's tensors are made at a time.
    """
    n_bytes = {name: sum(part.nbytes for part in parts) for name, parts in tensors.items()}
    shards: list[list[str]] = [[]]
    for name in tensors:
        if shards[-1] and sum(n_bytes[k] for k in shards[-1]) + n_bytes[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = files if len(files) > 1 else [SINGLE]
    for file, names in zip(files, shards, strict=True):
        shard = {name: join(name, tensors[name]).cpu().contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        shard_of = zip(files, shards, strict=True)
        index = {
            "metadata": {"total_size": sum(n_bytes.values())},
            "weight_map": {name: file for file, names in shard_of for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
