"""What is exported, transformers loads: the same logits and names; nothing is half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ch08_full_models import export as module
from ch08_full_models import speed
from ch08_full_models.checkpoint import CheckpointError, load
from ch08_full_models.download import INDEX, SINGLE
from ch08_full_models.export import export
from tests.parity import TOLERANCE, mutant, reference
from tests.test_ch08_checkpoint import CONFIGS, MULTIMODAL, error

pytestmark = pytest.mark.usefixtures("one_thread")

Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A function from a kind of model to a folder that transformers saved, every parameter random.

    Do not change it.
    """
    folders: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            if kind in CONFIGS:
                hf = reference(CONFIGS[kind]())
            else:
                hf = transformers.AutoModelForImageTextToText.from_config(MULTIMODAL[kind]())
                with torch.no_grad():
                    for param in hf.parameters():
                        param += torch.randn_like(param) * 0.1
            hf.save_pretrained(folders[kind])
        return folders[kind]

    return folder


def theirs(folder: Path) -> nn.Module:
    """transformers' model of an exported folder; it must miss nothing, and have nothing left."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def worst(a: nn.Module, b: nn.Module) -> float:
    """How far two models' logits are apart, in parts of the largest."""
    tokens_BT = torch.randint(90, (3, 23))
    logits_BTV, other_BTV = (
        out if isinstance(out, torch.Tensor) else out.logits for out in (a(tokens_BT), b(tokens_BT))
    )
    return float((logits_BTV - other_BTV).abs().max() / other_BTV.abs().max())


@pytest.mark.parametrize("kind", [*CONFIGS, *MULTIMODAL])
def test_transformers_loads_what_is_exported(kind: str, saved: Saved, tmp_path: Path) -> None:
    """Guards every family: its names, its layout, its config, by logits; and our own way back."""
    model, _ = load(saved(kind), device="cpu", dtype="float32")
    folder = export(model, None, tmp_path / "new")
    assert worst(model, theirs(folder)) < TOLERANCE
    again, _ = load(folder, device="cpu")
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6, msg=name)
    if kind in CONFIGS:  # the published layout is the one that transformers saves
        expected, found = load_file(saved(kind) / SINGLE), load_file(folder / SINGLE)
        if kind == "gpt2":  # published without the prefix that transformers gives it
            expected = {name.removeprefix("transformer."): w for name, w in expected.items()}
        assert found.keys() == expected.keys()
        for name, w in expected.items():
            torch.testing.assert_close(found[name], w, atol=1e-7, rtol=1e-6, msg=name)


def test_shards(saved: Saved, tmp_path: Path) -> None:
    """Guards several files: their index, their size, and a tensor larger than that."""
    model, _ = load(saved("qwen3_moe"), device="cpu", dtype="float32")
    folder = export(model, None, tmp_path / "new", shard_bytes=9_000)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    files = sorted(folder.glob("*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    total = 0
    for file in files:
        weights = load_file(file)
        n_bytes = sum(w.nbytes for w in weights.values())
        assert n_bytes <= 9_000 or len(weights) == 1
        assert all(index["weight_map"][name] == file.name for name in weights)
        total += n_bytes
    assert total == index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert any(file.stat().st_size > 9_000 for file in files)
    assert worst(model, theirs(folder)) < TOLERANCE


def test_dtype(saved: Saved, tmp_path: Path) -> None:
    """Guards bfloat16: it is written, named in config.json, and read again bit by bit."""
    model, _ = load(saved("llama"), device="cpu", dtype="bfloat16")
    folder = export(model, None, tmp_path / "new")
    assert {w.dtype for w in load_file(folder / SINGLE).values()} == {torch.bfloat16}
    again, _ = load(folder, device="cpu")
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert transformers.AutoConfig.from_pretrained(folder).dtype == torch.bfloat16


def test_tokenizer_comes_along(saved: Saved, tmp_path: Path) -> None:
    """Guards the second argument: the tokenizer's files, no others, and a folder without any."""
    source = tmp_path / "source"
    source.mkdir()
    model, _ = load(saved("llama"), device="cpu")
    assert "tokenizer.json" in error(export, model, source, tmp_path / "new")
    for name in ("tokenizer.json", "tokenizer_config.json", "other.bin"):
        (source / name).write_text("{}", encoding="utf-8")
    folder = export(model, source, tmp_path / "new")
    names = {"config.json", SINGLE, "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in folder.iterdir()} == names


@pytest.mark.parametrize("there", ["file", "folder"])
def test_nothing_is_overwritten(there: str, saved: Saved, tmp_path: Path) -> None:
    """Guards what lies at the place already."""
    target = tmp_path / "new"
    target.write_text("mine", "utf-8") if there == "file" else target.mkdir()
    model, _ = load(saved("llama"), device="cpu")
    assert str(target) in error(export, model, None, target)
    assert target.is_dir() or target.read_text("utf-8") == "mine"


@pytest.mark.parametrize(
    "problem", [OSError(28, "No space left on device"), SafetensorError("I/O error"), None]
)
def test_nothing_is_left_half_written(
    problem: Exception | None, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards a disk that is full in the second file, and Ctrl-C: one line, and no folder."""
    save_file, calls = module.save_file, []

    def fails(*args: object, **options: object) -> None:
        save_file(*args, **options)
        calls.append(1)
        assert not (tmp_path / "new").exists()
        if len(calls) == 2:
            raise problem or KeyboardInterrupt

    monkeypatch.setattr(module, "save_file", fails)
    model, _ = load(saved("llama"), device="cpu")
    with pytest.raises(CheckpointError if problem else KeyboardInterrupt):
        export(model, None, tmp_path / "new", shard_bytes=9_000)
    assert len(calls) == 2 and list(tmp_path.iterdir()) == []


def test_models_that_are_not_as_they_were_loaded(saved: Saved, tmp_path: Path) -> None:
    """Guards against integers and missing parts being written as a model, and a wrong place."""
    model, _ = load(saved("llama"), device="cpu")
    assert "no/such" in error(export, model, None, tmp_path / "no/such/folder")
    speed.quantize(model, "int8")
    assert "quantized" in error(export, model, None, tmp_path / "new")
    model, _ = load(saved("llama"), device="cpu")
    model.blocks[1].to("meta")
    assert "blocks.1." in error(export, model, None, tmp_path / "new")
    del model.hf_config
    assert "hf_config" in error(export, model, None, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_fp8_is_exported_as_what_it_was_read(saved: Saved, tmp_path: Path) -> None:
    """Guards config.json: FP8 and multi-token prediction are gone, and it no longer says so."""
    source = Path(shutil.copytree(saved("deepseek_v3"), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config |= {"model_type": "kimi_k2", "num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model, _ = load(source, device="cpu")
    folder = export(model, None, tmp_path / "new")
    assert worst(model, theirs(folder)) < TOLERANCE
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert found["model_type"] == "deepseek_v3" and "quantization_config" not in found


MISTAKES = {
    "gpt2": ["torch.cat(parts)\n -> torch.cat(parts[::-1])\n", "joined.T if -> joined if"],
    "gemma3_text": ["part.float() - 1 -> part.float()"],
    "llama4_text": [
        "torch.cat(expert).T -> torch.cat(expert[::-1]).T",
        "range(0, len -> range(size, len",
    ],
}


@pytest.mark.parametrize(
    ("kind", "mistake"), [(kind, m) for kind, mistakes in MISTAKES.items() for m in mistakes]
)
def test_mistakes_are_noticed(kind: str, mistake: str, saved: Saved, tmp_path: Path) -> None:
    """Guards the comparison itself: each inverse, spoiled, gives another model or none."""
    model, _ = load(saved(kind), device="cpu", dtype="float32")
    try:
        folder = mutant(module, mistake).export(model, None, tmp_path / "new")
        distance = worst(model, theirs(folder))
    except (AssertionError, RuntimeError, ValueError):
        return
    assert not distance < 100 * TOLERANCE
