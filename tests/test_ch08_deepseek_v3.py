"""deepseek_v3.py against transformers' DeepSeek-V2, V3 and Youtu, with each of their parts on."""

import dataclasses
import inspect
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    YoutuConfig,
)
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP, DeepseekV3MoE

from ch02_rope import rope_scaling
from ch06_moe import routers
from ch08_full_models import checkpoint, deepseek_v3
from tests.parity import (
    TOLERANCE,
    assert_equal,
    assert_noticed,
    brute_force_attention,
    equals_generate,
    errors,
    forward_lengths,
    goes_on,
    mutant,
    reference,
    same_alone_and_padded,
)
from tests.shapes import check_shapes
from tests.test_ch08_llama3 import (
    NO_ENDS,
    bfloat16_errors,
    in_bfloat16,
    masks_built,
    older,
    oldest,
    rope,
)

pytestmark = pytest.mark.usefixtures("one_thread")


SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=20,
    kv_lora_rank=24,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=14,
    max_position_embeddings=128,
    **NO_ENDS,
)
EXPERTS = dict(
    first_k_dense_replace=1,
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_shared_experts=2,
    moe_intermediate_size=22,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
)


def v2(**changes: object) -> DeepseekV2Config:
    limited = dict(topk_method="group_limited_greedy", routed_scaling_factor=16.0)
    return DeepseekV2Config(**SIZES | EXPERTS | limited | changes)


def v3(**changes: object) -> DeepseekV3Config:
    return DeepseekV3Config(**SIZES | EXPERTS | changes)


def youtu(**changes: object) -> YoutuConfig:
    return YoutuConfig(**SIZES | changes)


def yarn(**changes: object) -> dict:
    """rope_parameters: a text of 40 tokens is longer than the original length, and all bands are
    there."""
    return rope(100.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=16) | dict(
        beta_fast=2, beta_slow=0.5, mscale=0.707, mscale_all_dim=0.707, **changes
    )


GREEDY = dict(topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0)
WIDE = dict(qk_rope_head_dim=16)
CASES = {
    "V3": v3(),
    "V3, one group": v3(n_group=1, topk_group=1),
    "V3, one group of two": v3(n_group=2, topk_group=1),
    "V3, all groups": v3(topk_group=4),
    "V3, all biased below zero": v3(),  # see reference_of
    "V3, one expert a token": v3(num_experts_per_tok=1),
    "V3, most experts idle": v3(n_routed_experts=40, moe_intermediate_size=8),
    "V3, no dense layer": v3(first_k_dense_replace=0),
    "V3, two dense layers": v3(num_hidden_layers=3, first_k_dense_replace=2, n_shared_experts=1),
    "V3, queries from the stream": v3(q_lora_rank=None),
    "V3, large epsilon": v3(rms_norm_eps=0.05),
    "V3, YaRN": v3(**WIDE, rope_parameters=yarn()),
    "V3, YaRN with a gain": v3(**WIDE, rope_parameters=yarn() | dict(mscale=2.0)),
    "V3, YaRN without mscale": v3(
        **WIDE, rope_parameters=yarn() | dict(mscale=None, mscale_all_dim=None)
    ),
    "V3, YaRN with a step": v3(
        **WIDE, rope_parameters=yarn() | dict(beta_fast=1, beta_slow=1, factor=32.0)
    ),
    "V3, turns by halves": v3(rope_interleave=False),
    "V3, tied": v3(tie_word_embeddings=True),
    "V3, one head": v3(num_attention_heads=1, num_key_value_heads=1),
    "V3, values wider than keys": v3(v_head_dim=30),
    "V3, latent so narrow that the first read absorbs": v3(kv_lora_rank=8),
    "V2": v2(),
    "V2, all groups": v2(topk_group=4),
    "V2, YaRN": v2(**WIDE, rope_parameters=yarn()),
    "V2-Lite": v2(**GREEDY, **WIDE, q_lora_rank=None, rope_parameters=yarn()),
    "V2-Lite, scaled": v2(**GREEDY | dict(routed_scaling_factor=3.0), q_lora_rank=None),
    "Youtu": youtu(),
    "Youtu, untied": youtu(tie_word_embeddings=False, rope_parameters=rope(1.6e6)),
    "Youtu, queries from the stream": youtu(q_lora_rank=None, rope_parameters=rope(30.0)),
}


def drawn(seed: int) -> PretrainedConfig:
    """A config drawn from what these families can be, with several parts switched on."""
    rng = random.Random(seed)
    kind = rng.choice([v2, v3, v3, youtu])
    n_heads, n_groups = rng.randint(1, 6), rng.randint(1, 4)
    n_layers, d_rope = rng.randint(2, 4), 2 * rng.randint(1, 9)
    changes = dict(
        vocab_size=rng.randint(20, 200),
        hidden_size=n_heads * rng.randint(3, 12),
        intermediate_size=rng.randint(10, 120),
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        q_lora_rank=rng.choice([None, rng.randint(4, 40)]),
        kv_lora_rank=2 * rng.randint(2, 20),  # even, as the next: transformers' V2 needs it
        qk_nope_head_dim=2 * rng.randint(1, 10),
        qk_rope_head_dim=d_rope,
        v_head_dim=rng.randint(2, 20),
        rms_norm_eps=rng.choice([1e-6, 1e-5, 1e-2]),
        tie_word_embeddings=rng.random() < 0.3,
        rope_parameters=rope(rng.choice([50.0, 1e4])),
    )
    if rng.random() < 0.5 and d_rope > 2:
        mscales = rng.choice([(1.0, 1.0), (0.707, 0.707), (1.0, 0.3)])
        changes["rope_parameters"] = yarn() | dict(
            factor=rng.choice([2.0, 40.0]), mscale=mscales[0], mscale_all_dim=mscales[1]
        )
    if kind is not youtu:
        per_group = rng.randint(2, 5)
        n_active_groups = rng.randint(1, n_groups)
        changes |= dict(
            n_group=n_groups,
            topk_group=n_active_groups,
            n_routed_experts=n_groups * per_group,
            num_experts_per_tok=rng.randint(1, n_active_groups * per_group),
            n_shared_experts=rng.randint(1, 3),
            moe_intermediate_size=rng.randint(3, 40),
            first_k_dense_replace=rng.randint(0, n_layers - 1),
            routed_scaling_factor=rng.choice([1.0, 2.446, 16.0]),
        )
    if kind is v2:
        changes["topk_method"] = rng.choice(["greedy", "group_limited_greedy"])
    return kind(**changes)


CASES |= {f"drawn {seed}": drawn(seed) for seed in range(20)}


@torch.no_grad()
def reference_of(
    config: PretrainedConfig, seed: int = 0, scale: float = 2.0, bias: float = 0.0
) -> PreTrainedModel:
    """transformers' model, with biases that change the choice; bias is their mean."""
    hf = reference(config, seed, scale)
    hf.config._experts_implementation = "eager"  # the others do not take every width
    for module in hf.modules():
        if hasattr(module, "e_score_correction_bias"):
            noise = 0.3 * torch.randn(len(module.e_score_correction_bias))
            module.e_score_correction_bias.copy_(bias + noise)
    return hf


def below_zero(name: str) -> float:
    """The mean of a case's biases."""
    return -2.5 if "below zero" in name else 0.0


def force(model: nn.Module, form: str) -> nn.Module:
    """The model, told which form of attention to use; "rule" leaves it its choice."""
    for block in model.blocks if form != "rule" else ():
        block.attn.absorbs = lambda *_: form == "absorbed"
    return model


# ---- the whole model


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """Guards the forward pass, whole, with the cache, in chunks, padded; and both ways to store
    experts: as the hub has them, in one file or many, and as transformers has them in memory.
    """
    scale = 1.0 if "drawn" in name else 2.0  # large heads and weights make rounding large
    hf = reference_of(CASES[name], len(name), scale, below_zero(name))
    many = len(name) % 2 == 0
    hf.save_pretrained(tmp_path, max_shard_size="4KB" if many else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == many
    model = deepseek_v3.load_folder(tmp_path)
    assert_equal(model, hf, seed=len(name))
    fused = deepseek_v3.Transformer(model.cfg)
    state = hf.state_dict()
    deepseek_v3.load_weights(fused, state)
    assert any("experts.gate_up_proj" in key for key in state) == (model.cfg.n_experts > 0)
    for (key, param), other in zip(model.named_parameters(), fused.parameters(), strict=True):
        assert torch.equal(param, other), key


def loaded(hf: PreTrainedModel, module: ModuleType = deepseek_v3, **changes: object) -> nn.Module:
    """Our model, or that of a spoiled module, with the weights of transformers'."""
    cfg = dataclasses.replace(module.config_from_hf(hf.config.to_dict()), **changes)
    model = module.Transformer(cfg).eval()
    module.load_weights(model, hf.state_dict())
    return model


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("name", ["V3, YaRN with a gain", "V2", "V3, values wider than keys"])
def test_both_forms_in_every_use(name: str, form: str) -> None:
    """Guards each form of attention where the rule would choose the other."""
    hf = reference_of(CASES[name])
    assert_equal(force(loaded(hf), form), hf)


UNSCALED = dict(rope_scaling=None)
OFF: dict[str, tuple[str, dict[str, object]]] = {  # a part and what it is when it does nothing
    "groups": ("V3", dict(n_groups=1, n_active_groups=1)),
    "groups of V2": ("V2", dict(n_groups=1, n_active_groups=1)),
    "number of groups": ("V3", dict(n_active_groups=3)),
    "scale of the weights": ("V3", dict(route_scale=1.0)),
    "scale of V2's": ("V2", dict(route_scale=1.0)),
    "number of experts": ("V3", dict(n_active=2)),
    "epsilon": ("V3, large epsilon", dict(norm_eps=1e-6)),
    "YaRN": ("V3, YaRN", UNSCALED),
    "YaRN of V2": ("V2, YaRN", UNSCALED),
    "interleaving": ("V3", dict(rope_interleave=False)),
    "no interleaving": ("V3, turns by halves", dict(rope_interleave=True)),
    "base": ("Youtu, queries from the stream", dict(rope_theta=1e4)),
}


@pytest.mark.parametrize("part", OFF)
def test_parts_are_switched_on(part: str) -> None:
    """Guards the cases above: without the part the logits are others."""
    name, off = OFF[part]
    hf = reference_of(CASES[name])
    assert next(errors(loaded(hf), hf))[1] < TOLERANCE
    assert next(errors(loaded(hf, **off), hf))[1] > 1e-3


@torch.no_grad()
def test_biases_change_the_choice() -> None:
    """Guards the cases above: without their biases tokens go to other experts."""
    for name in ("V3", "V3, all biased below zero"):
        hf = reference_of(CASES[name], bias=below_zero(name))
        model = loaded(hf)
        for block in model.blocks[1:]:
            assert name == "V3" or (block.mlp.choice_bias < -1).all()  # every score is below one
            block.mlp.choice_bias.zero_()
        assert next(errors(model, hf))[1] > 1e-3


@torch.no_grad()
def test_layers_with_experts_can_be_every_second(tmp_path: Path) -> None:
    """Guards moe_layer_freq, which transformers does not know: there, layers are exchanged."""
    config = v3(num_hidden_layers=5)
    hf = reference_of(config)
    for i in (1, 3):
        hf.model.layers[i].mlp = DeepseekV3MLP(config)
        for param in hf.model.layers[i].mlp.parameters():
            param.copy_(0.2 * torch.randn_like(param))
    cfg = deepseek_v3.config_from_hf(config.to_dict() | {"moe_layer_freq": 2})
    model = deepseek_v3.Transformer(cfg).eval()
    deepseek_v3.load_weights(model, hf.state_dict())
    assert_equal(model, hf)


# ---- the router


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (routers, "deepseek_v2"),
        (routers, "deepseek_v3"),
        (routers, "within_best_groups"),
        (rope_scaling, "yarn_attention_factor"),
    ],
)
def test_what_earlier_chapters_explain_is_equal_to_the_letter(
    module: ModuleType, name: str
) -> None:
    """Guards the routers and YaRN's factor against drift from the chapters that explain them."""
    assert inspect.getsource(getattr(deepseek_v3, name)) == inspect.getsource(getattr(module, name))


def layer_of(theirs: nn.Module, **changes: object) -> nn.Module:
    """Our layer of experts with transformers' weights."""
    cfg = dataclasses.replace(deepseek_v3.config_from_hf(theirs.config.to_dict()), **changes)
    layer = deepseek_v3.MoE(cfg)
    prefix = "model.layers.0.mlp."
    ours = deepseek_v3.convert({prefix + name: w for name, w in theirs.state_dict().items()})
    layer.load_state_dict({name.removeprefix("blocks.0.mlp."): w for name, w in ours.items()})
    return layer


def by_expert(n_experts: int, expert_NA: Tensor, weight_NA: Tensor) -> Tensor:
    """Weights (N, I), zero for experts that were not chosen; -1 on top for chosen ones of zero."""
    dense_NI = torch.full((len(expert_NA), n_experts), math.nan)
    return dense_NI.scatter(1, expert_NA, weight_NA)


@torch.no_grad()
def test_router_in_a_case_for_the_hand() -> None:
    """Guards V3's router: the biased expert wins, the one with the highest score is in no group."""
    logits = [2, -3, 1, 0.9, -1, 0.5, -1.5, 0.2]
    cfg = deepseek_v3.Config(
        d_model=8, n_experts=8, n_active=2, d_expert=1, router="sigmoid", n_groups=4,
        n_active_groups=2, route_scale=2.5,
    )  # fmt: skip
    layer = deepseek_v3.MoE(cfg)
    layer.router.weight.copy_(torch.tensor(logits).diag())
    layer.choice_bias[6] = 0.6
    expert_1A, weight_1A = layer.route(torch.ones(1, 8))
    found = dict(zip(expert_1A[0].tolist(), weight_1A[0].tolist(), strict=True))
    assert found == {2: pytest.approx(2.0007, abs=1e-4), 6: pytest.approx(0.4993, abs=1e-4)}


@torch.no_grad()
def test_scores_of_zero_give_weights_of_zero() -> None:
    """Guards the 1e-20: sigmoids that underflow must not become 0/0."""
    config = v3()
    theirs = DeepseekV3MoE(config).eval()
    for param in theirs.parameters():
        nn.init.normal_(param, std=0.3)
    theirs.gate.e_score_correction_bias.normal_()
    theirs.gate.weight.abs_().neg_()
    layer = layer_of(theirs)
    x_ND = torch.full((3, 48), 100.0)
    _, weight_NA, expert_NA = theirs.gate(x_ND)
    found = layer.route(x_ND)
    assert not weight_NA.any() and not found[1].any()
    assert found[0].sort().values.tolist() == expert_NA.sort().values.tolist()


@torch.no_grad()
def test_router_is_in_float32() -> None:
    """Guards the choice in a model of 16 bits: logits in bfloat16 would take other experts."""
    config = v3(n_routed_experts=64, num_experts_per_tok=8)
    theirs = DeepseekV3MoE(config).eval()
    for param in theirs.parameters():
        nn.init.normal_(param, std=0.05)
    theirs.gate.e_score_correction_bias.normal_(std=0.01)
    bias_I = theirs.gate.e_score_correction_bias.clone()
    layer = layer_of(theirs).bfloat16()
    theirs = theirs.bfloat16()
    layer.choice_bias.data = bias_I
    theirs.gate.e_score_correction_bias = bias_I
    x_ND = torch.randn(500, 48).bfloat16()
    _, weight_NA, expert_NA = theirs.gate(x_ND)
    found = layer.route(x_ND)
    assert found[1].dtype == weight_NA.dtype == torch.float32
    pairs = (by_expert(64, *found), by_expert(64, expert_NA, weight_NA))
    torch.testing.assert_close(*pairs, equal_nan=True, rtol=1e-5, atol=0)
    rough_NI = layer.router(x_ND).float().sigmoid()
    rough_NA = (rough_NI + bias_I).topk(8).indices
    same = rough_NA.sort().values == expert_NA.sort().values
    assert not same.all()  # groups aside, it matters


def test_choice_bias_is_in_float32(tmp_path: Path) -> None:
    """Guards choice_bias in a model of 16 bits, bit by bit; and that V2 has none."""
    hf = reference_of(v3())
    hf.save_pretrained(tmp_path)
    model = in_bfloat16(deepseek_v3, tmp_path)
    for name, param in model.named_parameters():
        kept = name.endswith("choice_bias")
        assert param.dtype == (torch.float32 if kept else torch.bfloat16), name
    theirs_I = hf.model.layers[1].mlp.gate.e_score_correction_bias
    assert torch.equal(model.blocks[1].mlp.choice_bias, theirs_I)
    assert not model.blocks[1].mlp.choice_bias.requires_grad
    assert not any("choice_bias" in name for name, _ in loaded(reference(v2())).named_parameters())


# ---- YaRN


# The published config.json files, as far as they matter to a loader; models differ by what follows
# a |. V2's has the sizes of DeepSeek's own inference code.
FP8 = dict(
    activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128]
)
SHARED = dict(
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    hidden_act="silu",
    rms_norm_eps=1e-06,
    attention_bias=False,
    tie_word_embeddings=False,
)
YARN_FILE = dict(
    beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0,
    original_max_position_embeddings=4096, type="yarn",
)  # fmt: skip
FILE_V3 = SHARED | dict(
    model_type="deepseek_v3",
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    num_attention_heads=128,
    num_key_value_heads=128,
    q_lora_rank=1536,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    first_k_dense_replace=3,
    moe_layer_freq=1,
    n_group=8,
    topk_group=4,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    max_position_embeddings=163840,
    rope_theta=10000,
    rope_scaling=YARN_FILE,
    quantization_config=FP8,
)
FILE_KIMI = FILE_V3 | dict(
    model_type="kimi_k2",
    vocab_size=163840,
    num_attention_heads=64,
    num_key_value_heads=64,
    n_routed_experts=384,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.827,
    num_nextn_predict_layers=0,
    max_position_embeddings=131072,
    rope_theta=50000.0,
    rope_scaling=YARN_FILE | dict(beta_fast=1.0, beta_slow=1.0, factor=32.0),
)
FILE_MOONLIGHT = FILE_KIMI | dict(
    model_type="deepseek_v3",
    hidden_size=2048,
    intermediate_size=11264,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    num_attention_heads=16,
    num_key_value_heads=16,
    q_lora_rank=None,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    routed_scaling_factor=2.446,
    max_position_embeddings=8192,
    rms_norm_eps=1e-05,
    rope_scaling=None,
    quantization_config=None,
)
FILE_V2_LITE = FILE_MOONLIGHT | dict(
    model_type="deepseek_v2",
    vocab_size=102400,
    intermediate_size=10944,
    topk_method="greedy",
    scoring_func="softmax",
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    max_position_embeddings=163840,
    rms_norm_eps=1e-06,
    rope_theta=10000,
    rope_scaling=YARN_FILE | dict(mscale=0.707, mscale_all_dim=0.707),
)
FILE_V2 = FILE_V2_LITE | dict(
    hidden_size=5120,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    num_hidden_layers=60,
    num_attention_heads=128,
    num_key_value_heads=128,
    q_lora_rank=1536,
    n_routed_experts=160,
    n_group=8,
    topk_group=3,
    topk_method="group_limited_greedy",
    routed_scaling_factor=16.0,
)
FILE_YOUTU = SHARED | dict(
    model_type="youtu",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=32,
    num_attention_heads=16,
    num_key_value_heads=16,
    q_lora_rank=1536,
    max_position_embeddings=131072,
    rope_parameters=dict(rope_theta=1600000, rope_type="default"),
    rope_interleave=True,
    tie_word_embeddings=True,
)
PUBLISHED = {  # with the parameters computed elsewhere, which agree with what is advertised
    "DeepSeek-V2-Lite": (FILE_V2_LITE, 15_706_484_224),
    "DeepSeek-V2": (FILE_V2, 235_741_434_880),
    "DeepSeek-V3": (FILE_V3, 671_026_404_352),
    "Kimi-K2": (FILE_KIMI, 1_026_408_209_408),
    "Moonlight-16B-A3B": (FILE_MOONLIGHT, 15_960_108_544),
    "Youtu-LLM-2B": (FILE_YOUTU, 1_961_560_064),
}
SCALES = {  # of scores: facts of three published configs
    "DeepSeek-V3": 0.1352338,
    "DeepSeek-V2-Lite": 0.1147214,
    "Kimi-K2": 0.1308608,
    "Moonlight-16B-A3B": 0.0721688,
    "Youtu-LLM-2B": 0.0721688,
}


def hf_config(published: dict) -> PretrainedConfig:
    """transformers' config of a published file."""
    kinds = {"deepseek_v2": DeepseekV2Config, "youtu": YoutuConfig}
    kind = kinds.get(published["model_type"], DeepseekV3Config)
    return kind(**{k: v for k, v in published.items() if k != "quantization_config"})


@pytest.mark.parametrize("name", SCALES)
def test_scales_of_published_models(name: str) -> None:
    """Guards the score's scale, and cosine and sine: known figures, and transformers' own."""
    published = PUBLISHED[name][0]
    cfg = deepseek_v3.config_from_hf(published)
    with torch.device("meta"):
        attn = deepseek_v3.LatentAttention(cfg)
    assert attn.scale == pytest.approx(SCALES[name], rel=1e-6)
    freq_P = deepseek_v3.rope_frequencies(cfg.d_rope, cfg.rope_theta, cfg.rope_scaling)
    if cfg.rope_scaling is not None:
        theirs_P, gain = ROPE_INIT_FUNCTIONS["yarn"](hf_config(published), "cpu")
        torch.testing.assert_close(freq_P, theirs_P, rtol=1e-6, atol=0)
        assert cfg.rope_scaling.gain == gain == 1.0
    if name == "DeepSeek-V3":
        values = {1: 0.749894, 8: 0.1, 16: 0.0055, 24: 2.5e-5, 31: 3.3338e-6}
        for pair, value in values.items():
            assert float(freq_P[pair]) == pytest.approx(value, rel=1e-4)


def test_scaling_has_three_bands() -> None:
    """Guards the scaled cases: some pairs are left alone, some slowed down, some in between."""
    for name in ("V3, YaRN", "V2, YaRN", "V3, YaRN with a gain"):
        cfg = deepseek_v3.config_from_hf(CASES[name].to_dict())
        plain_P = deepseek_v3.rope_frequencies(cfg.d_rope, cfg.rope_theta, None)
        ratio_P = deepseek_v3.rope_frequencies(cfg.d_rope, cfg.rope_theta, cfg.rope_scaling)
        ratio_P = ratio_P / plain_P
        assert torch.isclose(ratio_P, torch.ones(())).any(), name
        assert torch.isclose(ratio_P, torch.tensor(0.25)).any(), name
        assert ((ratio_P > 0.3) & (ratio_P < 0.95)).any(), name


def test_positions_beyond_4096() -> None:
    """Guards the angles far out, and a cache that has grown many times."""
    small = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, hidden_size=16)
    hf = reference_of(v3(**small, max_position_embeddings=8192))
    model, tokens_1T = loaded(hf), torch.randint(97, (1, 4200))
    with torch.no_grad():
        expected_1TV = hf(tokens_1T).logits
        cache = model.new_cache()
        found_1TV = torch.cat([model(t, cache) for t in tokens_1T.split([4000, 1, 190, 9], 1)], 1)
    assert (found_1TV - expected_1TV).abs().max() < TOLERANCE * expected_1TV.abs().max()


# ---- attention


def test_decoding_absorbs_and_first_reads_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the cost: by the rule, a published model reads in one form and decodes in the other.

    The masks: none for a first read, one row for a token.
    """
    with torch.device("meta"):
        attn = deepseek_v3.LatentAttention(deepseek_v3.Config())
    assert not attn.absorbs(100, 100) and not attn.absorbs(500, 600)
    assert attn.absorbs(1, 2) and attn.absorbs(1, 100_000) and attn.absorbs(100, 100_000)
    model = deepseek_v3.Transformer(deepseek_v3.config_from_hf(v3().to_dict()))
    used: list[str] = []
    for block in model.blocks:
        for form in ("absorbed", "expanded"):
            method = getattr(block.attn, form)
            record = lambda *args, form=form, method=method: used.append(form) or method(*args)  # noqa: E731
            monkeypatch.setattr(block.attn, form, record)
    tokens_BT, cache = torch.zeros(3, 40, dtype=torch.long), model.new_cache()

    def built(n: int) -> list:
        return masks_built(deepseek_v3, monkeypatch, lambda: model(tokens_BT[:, :n], cache))

    assert built(20) == [] and used == ["expanded"] * 2
    used.clear()
    assert built(1) == [((3, 1, 21), None)] * 2 and used == ["absorbed"] * 2


def test_attend_by_loops() -> None:
    """Guards the call of torch's kernel, with values narrower or wider than keys, and ours."""
    for d_value in (2, 5, 9):
        q, k, v = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 9)
        v = v[..., :d_value]
        wide = brute_force_attention(*padded_to(9, q, k, v), lambda b, t, s: s <= t, 0.7).float()
        torch.testing.assert_close(deepseek_v3.attend(q, k, v, None, 0.7), wide[..., :d_value])
        mask_BTS = torch.rand(2, 4, 4) > 0.5
        mask_BTS[:, :, 0] = True

        def sees(b: int, t: int, s: int, mask_BTS: Tensor = mask_BTS) -> bool:
            return bool(mask_BTS[b, t, s])

        wide = brute_force_attention(*padded_to(9, q, k, v), sees, 0.7).float()
        torch.testing.assert_close(deepseek_v3.attend(q, k, v, mask_BTS, 0.7), wide[..., :d_value])
        one = (t[:, :, :1].expand_as(t) for t in (k, v))
        wide = brute_force_attention(*padded_to(9, q, *one), sees, 0.7).float()
        found = deepseek_v3.attend_one(q, k[:, :, 0], v[:, :, 0], mask_BTS, 0.7)
        torch.testing.assert_close(found, wide[..., :d_value])


def padded_to(width: int, *tensors: Tensor) -> Iterator[Tensor]:
    """The tensors with zeros at the end of their last axis: they change no product."""
    return (nn.functional.pad(t, (0, width - t.shape[-1])) for t in tensors)


def test_cache_holds_latents_alone() -> None:
    """Guards the cache's size: C + R numbers a token and layer, and it doubles when it is full."""
    cfg = deepseek_v3.config_from_hf(v3().to_dict())
    model, cache = deepseek_v3.Transformer(cfg), None
    for n in (16, 100):
        cache = model.new_cache()
        model(torch.zeros(2, n, dtype=torch.long), cache)
        n_bytes = sum(layer.n_bytes() for layer in cache)
        assert n_bytes == 2 * n * cfg.n_layers * (cfg.d_latent + cfg.d_rope) * 4
    model(torch.zeros(2, 1, dtype=torch.long), cache)
    assert sum(layer.n_bytes() for layer in cache) == 2 * n_bytes
    ours = [shape_of(t) for t in cache[0].buffers if t.is_floating_point()]
    assert ours == [(2, 200, 24), (2, 200, 6)]


def shape_of(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def test_cached_keys_are_transformers_own() -> None:
    """Guards what is cached: V3's latents after their norm, and its turned keys, in its order."""
    hf = reference_of(v3())
    model, tokens_BT = loaded(hf), torch.randint(97, (2, 12))
    cache = model.new_cache()
    with torch.no_grad():
        model(tokens_BT, cache)
        theirs = hf(tokens_BT, use_cache=True).past_key_values
    for ours, layer in zip(cache, theirs.layers, strict=True):
        torch.testing.assert_close(ours.buffers[0], layer.keys[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.buffers[1], layer.values[:, 0], rtol=1e-5, atol=1e-5)


# ---- rounding and gradients


def test_bfloat16_is_as_good_as_transformers(tmp_path: Path) -> None:
    """Guards the rounding in bfloat16: an error of 5 %, and at most 1.5 times transformers'."""
    even = dict(hidden_size=64, moe_intermediate_size=32, intermediate_size=96, kv_lora_rank=32)
    configs = [
        v3(**even),
        v3(**even, **WIDE, rope_parameters=yarn()),
        v2(**even, routed_scaling_factor=2.0),
        youtu(**{k: v for k, v in even.items() if k != "moe_intermediate_size"}),
    ]
    ours, theirs = bfloat16_errors(deepseek_v3, configs, tmp_path)
    assert ours < 0.05  # much of it tokens that go to other experts
    assert ours < 1.5 * theirs


@torch.no_grad()
def test_decoding_in_bfloat16_is_as_good_as_transformers(tmp_path: Path) -> None:
    """Guards the rounding of the absorbed form, in which transformers does not compute."""
    wrong = {"ours": 0.0, "theirs": 0.0}
    for seed in range(3):
        hf = reference(youtu(), seed)
        for param in hf.parameters():
            param.copy_(param.bfloat16())
        hf.save_pretrained(tmp_path)
        half = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.bfloat16, attn_implementation="eager"
        )
        model, tokens_BT = in_bfloat16(deepseek_v3, tmp_path), torch.randint(97, (4, 48))
        cache = model.new_cache()
        found = torch.cat([model(t, cache) for t in tokens_BT.split(1, dim=1)], dim=1)
        expected_BTV = hf(tokens_BT).logits
        for who, logits_BTV in (("ours", found), ("theirs", half(tokens_BT).logits)):
            wrong[who] += float((logits_BTV.float() - expected_BTV).square().mean())
    assert math.sqrt(wrong["ours"]) < 1.5 * math.sqrt(wrong["theirs"])


@pytest.mark.parametrize("form", ["rule", "absorbed"])
@pytest.mark.parametrize("name", ["V3, YaRN", "V2", "Youtu"])
def test_gradients_equal_transformers(name: str, form: str) -> None:
    """Guards training, to 1e-4 of the largest of each tensor: no part is cut off from the loss."""
    hf = reference_of(CASES[name], scale=1.0)
    for module in hf.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias *= 0.1  # every expert gets some tokens
    model = force(loaded(hf), form)
    tokens_BT = torch.randint(97, (3, 40))
    for logits_BTV in (model(tokens_BT), hf(tokens_BT, use_cache=False).logits):
        nn.functional.cross_entropy(logits_BTV[:, :-1].mT, tokens_BT[:, 1:]).backward()
    theirs = deepseek_v3.convert({name: p.grad for name, p in hf.named_parameters()})
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for key, grad in ours.items():
        assert grad.isfinite().all() and grad.any(), key
        assert (grad - theirs[key]).abs().max() < 1e-4 * theirs[key].abs().max(), key


def test_initial_weights() -> None:
    """Guards init_weights: no bias on the choice, norms of one, smaller steps into the stream."""
    cfg = deepseek_v3.config_from_hf(v3(hidden_size=64).to_dict())
    for name, param in deepseek_v3.Transformer(
        dataclasses.replace(cfg, n_mtp=1)
    ).named_parameters():
        if name.endswith("choice_bias"):
            assert not param.any(), name
        elif "norm" in name:
            assert (param == 1).all(), name
        else:
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * 2) if into_stream else 0.02
            error = 1 / math.sqrt(2 * param.numel())
            assert float(param.detach().std()) == pytest.approx(std, rel=5 * error), name


# ---- multi-token prediction

MTP_CASES = {
    "V3": v3(num_nextn_predict_layers=1),
    "V3, YaRN": v3(**WIDE, rope_parameters=yarn(), num_nextn_predict_layers=1),
    "V3, large epsilon": v3(rms_norm_eps=0.05, num_nextn_predict_layers=1),
    "V3, queries from the stream": v3(q_lora_rank=None, num_nextn_predict_layers=1),
}


@torch.no_grad()
def mtp_reference(config: PretrainedConfig, seed: int = 0) -> tuple[PreTrainedModel, MtpModel]:
    """transformers' model and its own module for multi-token prediction, no parameter initial."""
    hf = reference_of(config, seed)
    mtp = MtpModel(hf, 1).eval()
    mtp.config._experts_implementation = mtp.config._attn_implementation = "eager"
    for name, param in mtp.layers.named_parameters():
        param.copy_((1 if "norm" in name else 0) + 0.2 * torch.randn_like(param))
    mtp.layers[0].mtp_block.mlp.gate.e_score_correction_bias.normal_(std=0.3)
    return hf, mtp


def mtp_weights(hf: PreTrainedModel, mtp: MtpModel, fused: bool) -> dict[str, Tensor]:
    """All weights as a checkpoint has them: the module is one more layer, with its own copies of
    embedding and head. They are spoiled, since nobody may read them."""
    state, layer = dict(hf.state_dict()), f"model.layers.{hf.config.num_hidden_layers}"
    for name, w in mtp.layers[0].state_dict().items():
        name = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        state[f"{layer}.{name}"] = w
    state[f"{layer}.embed_tokens.weight"] = torch.zeros_like(hf.model.embed_tokens.weight)
    state[f"{layer}.shared_head.head.weight"] = torch.zeros_like(hf.lm_head.weight)
    return state if fused else hub(state)


def hub(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with a tensor an expert and matrix: written apart from the file's own split."""
    out = {}
    for name, w in state.items():
        stem = name.rpartition("experts.")[0] + "experts"
        if name.endswith("experts.gate_up_proj"):
            half = w.shape[1] // 2
            for i in range(w.shape[0]):
                out[f"{stem}.{i}.gate_proj.weight"] = w[i, :half].clone()
                out[f"{stem}.{i}.up_proj.weight"] = w[i, half:].clone()
        elif name.endswith("experts.down_proj"):
            for i in range(w.shape[0]):
                out[f"{stem}.{i}.down_proj.weight"] = w[i].clone()
        else:
            out[name] = w
    return out


def mtp_folder(folder: Path, hf: PreTrainedModel, mtp: MtpModel, fused: bool = False) -> Path:
    """The folder of a checkpoint with multi-token prediction."""
    weights = {name: w.clone() for name, w in mtp_weights(hf, mtp, fused).items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf.config.to_dict()), encoding="utf-8")
    return folder


def mtp_errors(
    model: nn.Module, hf: PreTrainedModel, mtp: MtpModel, n: int = 24
) -> Iterator[tuple[str, float]]:
    """Ways to predict the token after the next, and how far the logits are from transformers'.

    In parts of the largest. transformers reads each text whole, without padding.
    """
    tokens_BT = torch.randint(hf.config.vocab_size, (3, n + 1))
    now_BT, next_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    x_BTD = hf.model(now_BT).last_hidden_state
    pos_BT = torch.arange(1, n + 1).expand(3, n)  # the next tokens'
    y_BTD = mtp.forward_layer(0, x_BTD, pos_BT, MtpCache(config=mtp.config), input_ids=next_BT)
    expected_BTV = mtp._project_to_logits(y_BTD)
    largest = expected_BTV.abs().max()

    def read(sizes: list[int], now_BT: Tensor, next_BT: Tensor, cache: list) -> Tensor:
        found = []
        for now, after in zip(now_BT.split(sizes, 1), next_BT.split(sizes, 1), strict=True):
            found.append(model.after_next(model.hidden(now, cache), after, cache))
        return torch.cat(found, dim=1)

    def error(found_BTV: Tensor, expected_BTV: Tensor) -> float:
        return float((found_BTV - expected_BTV).abs().nan_to_num(math.inf).max() / largest)

    x_ours_BTD = model.hidden(now_BT, model.new_cache())
    yield "whole", error(model.after_next(x_ours_BTD, next_BT), expected_BTV)
    yield "chunks", error(read([7, 1, 9, n - 17], now_BT, next_BT, model.new_cache()), expected_BTV)
    yield "one by one", error(read([1] * n, now_BT, next_BT, model.new_cache()), expected_BTV)
    n_pad = 5
    padded = [nn.functional.pad(t[:1], (n_pad, 0)) for t in (now_BT, next_BT)]
    padded[1][0, n_pad - 1] = now_BT[0, 0]  # comes after the last padding
    for sizes in ([n + n_pad], [9, 1, n + n_pad - 10]):
        found_1TV = read(sizes, *padded, model.new_cache(torch.tensor([n_pad])))
        yield f"padded, {len(sizes)} parts", error(found_1TV[:, n_pad:], expected_BTV[:1])


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", MTP_CASES)
def test_multi_token_prediction_equals_transformers(name: str, fused: bool, tmp_path: Path) -> None:
    """Guards the module, from file to logits, with and without cache; the model itself stays."""
    hf, mtp = mtp_reference(MTP_CASES[name])
    model = deepseek_v3.load_folder(mtp_folder(tmp_path, hf, mtp, fused), n_mtp=1)
    assert len(model.blocks) == 3 == len(model.new_cache())
    wrong = {way: e for way, e in mtp_errors(model, hf, mtp) if not e < TOLERANCE}
    assert not wrong
    assert_equal(model, hf)


@torch.no_grad()
def test_multi_token_prediction_is_left_out(tmp_path: Path) -> None:
    """Guards the usual way: no memory for the module, and its tensors are passed over."""
    hf, mtp = mtp_reference(MTP_CASES["V3"])
    model = deepseek_v3.load_folder(mtp_folder(tmp_path, hf, mtp))
    assert len(model.blocks) == 2 == len(model.new_cache())
    assert_equal(model, hf, n=24)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_the_loader_brings_it_when_asked(fused: bool, tmp_path: Path) -> None:
    """Guards load(mtp=True), with all weights in memory and with experts left on disk."""
    hf, mtp = mtp_reference(MTP_CASES["V3"])
    folder = mtp_folder(tmp_path, hf, mtp, fused)
    whole, _ = checkpoint.load(folder, dtype="float32", device="cpu", mtp=True)
    n_bytes = sum(p.nbytes for p in whole.parameters())
    small, _ = checkpoint.load(folder, "float32", "cpu", memory=n_bytes - 1, mtp=True)
    assert small.disk is not None
    for model in (whole, small):
        assert len(model.blocks) == 3
        assert not {way: e for way, e in mtp_errors(model, hf, mtp) if not e < TOLERANCE}
    plain, _ = checkpoint.load(folder, dtype="float32", device="cpu")
    assert len(plain.blocks) == 2


def test_a_family_without_it_says_so(tmp_path: Path) -> None:
    """Guards load(mtp=True) on another model: one line, before anything is read."""
    config = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=1)
    hf = AutoModelForCausalLM.from_config(LlamaConfig(**config, num_attention_heads=4))
    hf.save_pretrained(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="llama3 has no multi-token prediction"):
        checkpoint.load(tmp_path, device="cpu", mtp=True)


@torch.no_grad()
def test_the_model_does_not_touch_the_modules_cache() -> None:
    """Guards drafting: what the module has seen is its own affair."""
    cfg = deepseek_v3.config_from_hf(v3().to_dict())
    model, tokens_BT = deepseek_v3.Transformer(dataclasses.replace(cfg, n_mtp=1)), torch.arange(8)
    cache = model.new_cache()
    x_BTD = model.hidden(tokens_BT[None], cache)
    assert [layer.n_seen for layer in cache] == [8, 8, 0]
    model.after_next(x_BTD[:, :5], tokens_BT[None, 1:6], cache)
    assert [layer.n_seen for layer in cache] == [8, 8, 5]
    assert torch.equal(model(tokens_BT[None]), model.logits(x_BTD))


def test_multi_token_prediction_must_be_whole() -> None:
    """Guards strict loading of the module, and against an ordinary layer taken for one."""
    hf, mtp = mtp_reference(MTP_CASES["V3"])
    weights, cfg = mtp_weights(hf, mtp, fused=True), deepseek_v3.config_from_hf(hf.config.to_dict())
    with_module = deepseek_v3.Transformer(dataclasses.replace(cfg, n_mtp=1))
    theirs = "model.layers.2.shared_head.norm.weight"
    with pytest.raises(KeyError, match=f"{theirs}.*blocks.2.norm.weight"):
        rest = {name: w for name, w in weights.items() if name != theirs}
        deepseek_v3.load_weights(with_module, rest)
    with pytest.raises(KeyError, match="model.layers.2"):
        deepseek_v3.load_weights(with_module, hf.state_dict())
    with pytest.raises(KeyError, match="model.layers.2.else.weight"):
        odd = {"model.layers.2.else.weight": torch.zeros(2)}
        deepseek_v3.load_weights(with_module, weights | odd)
    short = deepseek_v3.Transformer(dataclasses.replace(cfg, n_layers=1))
    with pytest.raises(KeyError, match="model.layers.1.*no such parameter"):
        deepseek_v3.load_weights(short, hf.state_dict())


def test_shapes_of_multi_token_prediction() -> None:
    """Guards the names of the module's tensors: the axes they claim."""
    cfg = deepseek_v3.config_from_hf(v3().to_dict())
    model = deepseek_v3.Transformer(dataclasses.replace(cfg, n_mtp=1))
    tokens_BT = torch.randint(97, (2, 9))
    with check_shapes(deepseek_v3, D=48, V=97) as checker:
        cache = model.new_cache()
        model.after_next(model.hidden(tokens_BT, cache), tokens_BT, cache)
    assert {("Transformer.after_next", n) for n in ("x_BTD", "next_BT", "pos_BT")} <= checker.seen
    assert ("PredictionBlock.join", "next_BTD") in checker.seen


# ---- float8


def test_dequantize_by_loops() -> None:
    """Guards the blocks: 576 rows are four and a half, as in kv_a_proj_with_mqa; so are columns."""
    weight = torch.randn(576, 200).to(torch.float8_e4m3fn)
    scale = torch.rand(5, 2) + 0.5
    found = deepseek_v3.dequantize(weight, scale)
    assert found.dtype == torch.float32 and found.shape == (576, 200)
    rows, columns = (torch.arange(n) // 128 for n in (576, 200))
    expected = weight.float() * scale[rows[:, None], columns[None, :]]
    assert torch.equal(found, expected)
    for i, j in itertools.product((0, 127, 128, 511, 512, 575), (0, 127, 128, 199)):
        assert float(found[i, j]) == pytest.approx(
            float(weight.float()[i, j]) * float(scale[i // 128, j // 128])
        )
    for shape in ((4, 2), (5, 1), (6, 2), (2, 5)):
        with pytest.raises(ValueError, match=r"not \(5, 2\)"):
            deepseek_v3.dequantize(weight, torch.ones(shape))


def quantized(w: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as float8 and its scales: each block's largest number becomes float8's largest."""
    n_blocks = [math.ceil(n / 128) for n in w.shape]
    scale, rounded = torch.zeros(n_blocks), torch.zeros(w.shape, dtype=torch.float8_e4m3fn)
    for i, j in itertools.product(*map(range, n_blocks)):
        block = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
        scale[i, j] = w[block].abs().max() / 448
        rounded.view(torch.uint8)[block] = (
            (w[block] / scale[i, j]).to(torch.float8_e4m3fn).view(torch.uint8)
        )
    return rounded, scale


def test_dequantized_joins_in_any_order() -> None:
    """Guards pairs whose halves come apart, in other shards: each once, the rest as it is."""
    matrices = {f"model.layers.{i}.x.weight": torch.randn(130, 140) for i in range(4)}
    halves, expected = {"norm.weight": torch.ones(3, dtype=torch.bfloat16)}, {}
    for name, w in matrices.items():
        weight, scale = quantized(w)
        halves |= {name: weight, f"{name}_scale_inv": scale}
        expected[name] = deepseek_v3.dequantize(weight, scale)
        assert (expected[name] - w).abs().max() < 0.04 * w.abs().max()
    for seed in range(10):
        order = random.Random(seed).sample(list(halves), len(halves))
        pairs = list(deepseek_v3.dequantized((name, halves[name]) for name in order))
        found = dict(pairs)
        assert len(pairs) == 5 and found.keys() == matrices.keys() | {"norm.weight"}
        assert found["norm.weight"] is halves["norm.weight"]
        assert all(torch.equal(found[name], w) for name, w in expected.items())


def test_dequantized_yields_as_soon_as_it_can() -> None:
    """Guards memory: of many matrices, only those wait whose other half has not come."""
    weight, scale = quantized(torch.randn(4, 4))
    read: list[str] = []

    def pairs() -> Iterator[tuple[str, Tensor]]:
        for i in range(3):
            for name, tensor in ((f"{i}.weight", weight), (f"{i}.weight_scale_inv", scale)):
                read.append(name)
                yield name, tensor

    joined = deepseek_v3.dequantized(pairs())
    assert next(joined)[0] == "0.weight" and len(read) == 2
    assert next(joined)[0] == "1.weight" and len(read) == 4


def test_half_a_matrix_is_an_error() -> None:
    """Guards float8 numbers without their scales, which would load and mean nothing."""
    weight, scale = quantized(torch.randn(4, 4))
    with pytest.raises(KeyError, match=r"no a\.weight_scale_inv"):
        list(deepseek_v3.dequantized([("a.weight", weight)]))
    with pytest.raises(KeyError, match=r"no a\.weight \(for a\.weight_scale_inv\)"):
        list(deepseek_v3.dequantized([("a.weight_scale_inv", scale)]))
    with pytest.raises(ValueError, match=r"a\.weight_scale_inv: .*\(2, 1\), not \(1, 1\)"):
        halves = {"a.weight": weight, "a.weight_scale_inv": torch.ones(2, 1)}
        list(deepseek_v3.dequantized(halves.items()))


FULL_PRECISION = ("embed_tokens", "head", "norm", "gate.weight", "e_score", "eh_proj")


@torch.no_grad()
@pytest.mark.parametrize("scales", ["before", "after", "elsewhere"])
def test_float8_folder(scales: str, tmp_path: Path) -> None:
    """Guards a folder as DeepSeek-V3's: every matrix in blocks, ragged ones among them, and the
    module for multi-token prediction. The reference runs on the multiplied weights."""
    config = v3(
        hidden_size=136, kv_lora_rank=130, moe_intermediate_size=150, num_nextn_predict_layers=1
    )
    hf, mtp = mtp_reference(config)
    files: list[dict[str, Tensor]] = [{}, {}]
    for name, w in mtp_weights(hf, mtp, fused=False).items():
        if any(part in name for part in FULL_PRECISION):
            files[0][name] = w.clone()
            continue
        weight, scale = quantized(w)
        where = {"before": (1, 0), "after": (0, 1), "elsewhere": (hash_of(name) % 2,) * 2}[scales]
        files[where[0]][name] = weight
        files[where[1] if scales != "elsewhere" else 1 - where[0]][f"{name}_scale_inv"] = scale
        put_back(hf, mtp, name, deepseek_v3.dequantize(weight, scale))
    for i, tensors in enumerate(files):
        save_file(tensors, tmp_path / f"model-{i}.safetensors")
    fp8 = dict(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128])
    text = json.dumps(config.to_dict() | {"quantization_config": fp8})
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    model = deepseek_v3.load_folder(tmp_path, n_mtp=1)
    assert_equal(model, hf, n=24)
    assert all(e < TOLERANCE for _, e in mtp_errors(model, hf, mtp))
    assert_equal(deepseek_v3.load_folder(tmp_path), hf, n=24)  # the module's halves are joined, too


def hash_of(name: str) -> int:
    """A number that differs from name to name and is the same on every run."""
    return sum(map(ord, name))


def put_back(hf: PreTrainedModel, mtp: MtpModel, name: str, w: Tensor) -> None:
    """Writes a tensor of the hub's layout into transformers' models."""
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    is_mtp = int(layer) == hf.config.num_hidden_layers
    block = mtp.layers[0].mtp_block if is_mtp else hf.model.layers[int(layer)]
    if ".experts." not in rest:
        block.get_parameter(rest).copy_(w)
        return
    i, kind, _ = rest.removeprefix("mlp.experts.").split(".")
    experts, half = block.mlp.experts, block.mlp.experts.gate_up_proj.shape[1] // 2
    places = {
        "gate_proj": experts.gate_up_proj[int(i), :half],
        "up_proj": experts.gate_up_proj[int(i), half:],
        "down_proj": experts.down_proj[int(i)],
    }
    places[kind].copy_(w)


# ---- mistakes

V3, V2, BELOW, YARN, GAIN, YOUTU = "V3", "V2", "below zero", "YaRN", "YaRN with a gain", "Youtu"
SPOILT = {
    V3: v3(rms_norm_eps=0.01),
    V2: v2(rms_norm_eps=0.01),
    BELOW: v3(),
    YARN: v3(**WIDE, rope_parameters=yarn()),
    GAIN: v3(**WIDE, rope_parameters=yarn() | dict(mscale=2.0)),
    YOUTU: youtu(),
}
LATENTS = "append(self.kv_a_norm(c_BTC), k_rot_BTR, pos_BT)"
MUTANTS = {
    "weights from biased scores": (
        V3,
        "score_NI.gather(1, expert_NA) -> choice_NI.gather(1, expert_NA)",
    ),
    "bias not in the choice": (V3, "score_NI + choice_bias_I -> score_NI"),
    "bias on the logits": (
        V3,
        "score_NI = logit_NI.float().sigmoid() -> "
        "score_NI = (logit_NI.float() + choice_bias_I).sigmoid()",
    ),
    "softmax for sigmoid": (V3, "logit_NI.float().sigmoid() -> logit_NI.softmax(dim=-1)"),
    "scale missing": (
        V3,
        "return expert_NA, scale * weight_NA / ( -> return expert_NA, weight_NA / (",
    ),
    "scale before normalising": (
        V3,
        "scale * weight_NA / (weight -> scale * weight_NA / (scale * weight",
    ),
    "weights not normalised": (V3, " / (weight_NA.sum(dim=-1, keepdim=True) + 1e-20) -> "),
    "normalised over all experts": (V3, "/ (weight_NA.sum( -> / (score_NI.sum("),
    "groups by their best": (V3, "topk(2, dim=-1).values.sum(dim=-1) -> amax(dim=-1)"),
    "groups by their sum": (V3, "topk(2, dim=-1).values.sum(dim=-1) -> sum(dim=-1)"),
    "groups without the bias": (
        V3,
        "choice_NI.unflatten(-1, (n_groups -> score_NI.unflatten(-1, (n_groups",
    ),
    "groups interleaved": (
        V3,
        "choice_NI.unflatten(-1, (n_groups, -1)) -> choice_NI.unflatten(-1, (-1, n_groups)).mT",
    ),
    "0 for the other groups": (BELOW, "otherwise=-math.inf -> otherwise=0.0"),
    "the worst groups": (
        V3,
        "group_NL.topk(n_active_groups, dim=-1) -> (-group_NL).topk(n_active_groups, dim=-1)",
    ),
    "V2's weights normalised": (
        V2,
        "return expert_NA, weight_NA * scale -> "
        "return expert_NA, weight_NA / weight_NA.sum(-1, True) * scale",
    ),
    "V2's scale missing": (
        V2,
        "return expert_NA, weight_NA * scale -> return expert_NA, weight_NA",
    ),
    "V2's groups by two": (
        V2,
        "(n_groups, -1)).amax(dim=-1) -> (n_groups, -1)).topk(2).values.sum(-1)",
    ),
    "V2's groups ignored": (
        V2,
        'n_groups=hf["n_group"] if grouped -> n_groups=1 if grouped',
        'n_active_groups=hf["topk_group"] if grouped -> n_active_groups=1 if grouped',
    ),
    "V3's router for V2": (
        V2,
        "if self.choice_bias is None: -> if False:",
        "deepseek_v3(logit_NI, self.choice_bias, -> deepseek_v3(logit_NI, 0.0,",
    ),
    "shared experts missing": (V3, "if self.shared is None else self.shared(x_ND) -> "),
    "shared experts scaled": (V3, "else self.shared(x_ND) -> else 2.5 * self.shared(x_ND)"),
    "experts' halves exchanged": (V3, "gate, up = w.chunk -> up, gate = w.chunk"),
    "latent norm with the config's epsilon": (
        V3,
        "RMSNorm(cfg.d_latent, 1e-6) -> RMSNorm(cfg.d_latent, cfg.norm_eps)",
    ),
    "query norm with the config's epsilon": (
        V3,
        "RMSNorm(cfg.d_q_latent, 1e-6) -> RMSNorm(cfg.d_q_latent, cfg.norm_eps)",
    ),
    "block norms with the latents' epsilon": (
        V3,
        "RMSNorm(cfg.d_model, cfg.norm_eps) -> RMSNorm(cfg.d_model, 1e-6)",
    ),
    "latent not normed": (V3, f"{LATENTS} -> append(c_BTC, k_rot_BTR, pos_BT)"),
    "query latent not normed": (V3, "self.q_a_norm(self.q_a_proj(x_BTD)) -> self.q_a_proj(x_BTD)"),
    "rotary key normed, too": (
        V3,
        "k_rot_BT1R = k_rot_BTR[:, :, None] -> "
        "k_rot_BT1R = F.rms_norm(k_rot_BTR, k_rot_BTR.shape[-1:], eps=1e-6)[:, :, None]",
    ),
    "rotary key not turned": (V3, "k_rot_BTR = rope(k_rot_BT1R, turn)[:, :, 0] -> pass"),
    "pairs not parted": (V3, "if self.interleave: -> if False:"),
    "pairs of queries alone parted": (
        V3,
        "part_pairs(q_rot_BTHR), part_pairs(k_rot_BT1R) -> part_pairs(q_rot_BTHR), k_rot_BT1R",
    ),
    "pairs parted the other way": (V3, "unflatten(-1, (-1, 2)).mT -> unflatten(-1, (2, -1)).mT"),
    "rotary part first": (
        V3,
        "q_BTHK, q_rot_BTHR = self.queries(x_BTD).split(self.q_widths, dim=-1) -> "
        "q_rot_BTHR, q_BTHK = self.queries(x_BTD).split(self.q_widths[::-1], dim=-1)",
    ),
    "values before keys": (
        V3,
        "k_BSHK, v_BSHU = kv_BSHX.split(self.kv_widths, dim=-1) -> "
        "v_BSHU, k_BSHK = kv_BSHX.split(self.kv_widths[::-1], dim=-1)",
    ),
    "absorbed values from the keys' rows": (
        V3,
        "k_up_HKC, v_up_HUC = up_HXC.split(self.kv_widths, dim=1) -> "
        "k_up_HKC, v_up_HUC = up_HXC[:, : self.kv_widths[0]], up_HXC[:, : self.kv_widths[1]]",
    ),
    "absorbed values one row off": (
        V3,
        "k_up_HKC, v_up_HUC = up_HXC.split(self.kv_widths, dim=1) -> "
        "k_up_HKC, v_up_HUC = up_HXC.split(self.kv_widths, dim=1); "
        "v_up_HUC = v_up_HUC.roll(1, dims=1)",
    ),
    "absorbed without the rotary part": (
        V3,
        "torch.cat((q_BTHC, q_rot_BTHR), dim=-1) -> torch.cat((q_BTHC, 0 * q_rot_BTHR), dim=-1)",
    ),
    "absorbed scale of the wide key": (
        V3,
        "c_BSC, mask_BTS, self.scale) -> c_BSC, mask_BTS, k_BSW.shape[-1] ** -0.5)",
    ),
    "absorbed without a mask": (
        V3,
        "scores_BHTS = scores_BHTS.masked_fill(~mask_BTS[:, None], -math.inf) -> pass",
    ),
    "later chunks without a mask": (
        V3,
        "needs_mask = absorbs or cache.needs_mask(pos_BT.shape[1]) -> needs_mask = absorbs",
    ),
    "scale of the rotary part": (
        V3,
        "self.scale = sum(self.q_widths) ** -0.5 -> self.scale = cfg.d_rope**-0.5",
    ),
    "scale of the part that does not turn": (
        V3,
        "self.scale = sum(self.q_widths) ** -0.5 -> self.scale = cfg.head_dim**-0.5",
    ),
    "YaRN's scale not squared": (YARN, "score_gain=all_dim**2 -> score_gain=all_dim"),
    "YaRN's scale missing": (YARN, "self.scale *= cfg.rope_scaling.score_gain -> pass"),
    "YaRN's scale divides": (YARN, "self.scale *= cfg -> self.scale /= cfg"),
    "YaRN on all scores and on angles": (YARN, "if mscale and mscale_all_dim: -> if False:"),
    "YaRN's gain missing": (GAIN, "part * cfg.rope_scaling.gain -> part"),
    "YaRN's gain inverted": (
        GAIN,
        "yarn_attention_factor(factor, mscale) / all_dim -> "
        "all_dim / yarn_attention_factor(factor, mscale)",
    ),
    "YaRN's ramp inverted": (
        YARN,
        "slow_P = ((torch.arange -> slow_P = 1 - ((torch.arange",
    ),
    "YaRN's betas exchanged": (
        YARN,
        "(scaling.beta_fast, scaling.beta_slow) -> (scaling.beta_slow, scaling.beta_fast)",
    ),
    "norms exchanged": (
        YOUTU,
        "{}.post_attention_layernorm -> {}.exchanged",
        "{}.input_layernorm -> {}.post_attention_layernorm",
        "{}.exchanged -> {}.input_layernorm",
    ),
    "final norm lost": (YOUTU, "return self.norm(x_BTD) -> return x_BTD"),
    "last_only gives the first": (YOUTU, "x_BTD[:, -1:] if -> x_BTD[:, :1] if"),
    "padding is seen": (V3, " & ((k_pos_B1S >= 0) | (q_pos_BT1 < 0)) -> "),
    "growing loses the old": (V3, "[:, :room] = old -> [:, :room] = 0 * old"),
}
MTP_MUTANTS = {
    "hidden state first": "self.embed_norm(next_BTD), self.hidden_norm(x_BTD) -> "
    "self.hidden_norm(x_BTD), self.embed_norm(next_BTD)",
    "hidden state before the norm": "return self.norm(x_BTD) -> return x_BTD",
    "norms exchanged": "self.embed_norm(next_BTD), self.hidden_norm(x_BTD) -> "
    "self.hidden_norm(next_BTD), self.embed_norm(x_BTD)",
    "final norm lost": "self.logits(block.norm(block(x_BTD, -> self.logits((block(x_BTD,",
    "the model's final norm": "self.logits(block.norm(block(x_BTD, -> "
    "self.logits(self.norm(block(x_BTD,",
    "token of the state itself": "block.join(self.embed(next_BT), x_BTD) -> "
    "block.join(self.embed(next_BT.roll(1, 1)), x_BTD)",
    "positions of the next, padding seen": "layer_cache.positions(next_BT) -> "
    "layer_cache.positions(next_BT) + 1",
    "the last layer's cache": "(cache or self.new_cache())[-1] -> (cache or self.new_cache())[-2]",
    "stream lost": "self.logits(block.norm(block(x_BTD, -> "
    "self.logits(block.norm(-x_BTD + block(x_BTD,",
    "own embedding and head": r"|layers\.\d+\.(embed_tokens|shared_head\.head)\. -> ",
}


@pytest.fixture(scope="module")
def spoilt() -> dict[str, PreTrainedModel]:
    """The models that spoiled ones are compared with; unspoiled, ours equal them."""
    made = {}
    for name, config in SPOILT.items():
        made[name] = reference_of(config, bias=below_zero(name))
        assert_equal(loaded(made[name]), made[name])
    return made


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str, spoilt: dict[str, PreTrainedModel]) -> None:
    """Guards the comparison with transformers: with a mistake in the source it must fail."""
    case, *changes = MUTANTS[name]
    assert_noticed(loaded(spoilt[case], mutant(deepseek_v3, *changes)), spoilt[case])


LAYERS = {
    "one dense layer more": "layer < cfg.n_dense_layers or -> layer <= cfg.n_dense_layers or",
    "one dense layer less": "layer < cfg.n_dense_layers or -> layer < cfg.n_dense_layers - 1 or",
    "one shared expert of two": "cfg.n_shared * cfg.d_expert -> cfg.d_expert",
    "shared experts as wide as the MLP": "cfg.n_shared * cfg.d_expert -> cfg.d_ff",
    "no bias on the choice": 'cfg.router == "sigmoid" -> False',
    "biases on q and kv": "self.cache_widths), bias=False -> self.cache_widths), bias=True",
}


@pytest.mark.parametrize("name", LAYERS)
def test_mistakes_of_shape_are_noticed(name: str, spoilt: dict[str, PreTrainedModel]) -> None:
    """Guards which layers have what: the reference's weights must find their places."""
    with pytest.raises((KeyError, ValueError), match="layers|blocks.*bias"):
        loaded(spoilt[V3], mutant(deepseek_v3, LAYERS[name]))


@torch.no_grad()
def test_mistakes_in_multi_token_prediction_are_noticed(tmp_path: Path) -> None:
    """Guards the comparison with transformers' module."""
    hf, mtp = mtp_reference(MTP_CASES["V3, large epsilon"])
    folder = mtp_folder(tmp_path, hf, mtp)
    for name, change in MTP_MUTANTS.items():
        try:
            model = mutant(deepseek_v3, change).load_folder(folder, n_mtp=1)
            found = [e for _, e in mtp_errors(model, hf, mtp)]
        except (KeyError, RuntimeError) as err:
            assert name == "own embedding and head" and "no such parameter" in str(err), name
            continue
        assert max(found) > 10 * TOLERANCE, name


@torch.no_grad()
def test_mistakes_in_float8_are_noticed() -> None:
    """Guards test_dequantize_by_loops, and the one about scores of zero."""
    for change in (
        "repeat_interleave(BLOCK, dim=0) -> repeat(BLOCK, 1)",
        "weight.float() * rows -> weight.float() / rows",
        "(BLOCK, dim=1)[:, -> (BLOCK, dim=1).flip(1)[:,",
    ):
        spoiled = mutant(deepseek_v3, change)
        weight, scale = torch.randn(576, 200).to(torch.float8_e4m3fn), torch.rand(5, 2) + 0.5
        found = spoiled.dequantize(weight, scale)
        assert not torch.allclose(found, deepseek_v3.dequantize(weight, scale), rtol=1e-3), change
    zero = torch.full((1, 8), -200.0), torch.zeros(8), 2, 4, 2, 2.5
    assert not deepseek_v3.deepseek_v3(*zero)[1].isnan().any()
    assert mutant(deepseek_v3, " + 1e-20) -> )").deepseek_v3(*zero)[1].isnan().all()


# ---- generation


@pytest.fixture(scope="module", params=["V3", "V2", "Youtu"])
def lively(request: pytest.FixtureRequest) -> tuple[nn.Module, PreTrainedModel]:
    """Ours and transformers', so large that greedy texts vary."""
    hf = reference_of(CASES[request.param], seed=1, scale=4.0)
    return loaded(hf), hf


def test_generate_equals_transformers(lively: tuple[nn.Module, PreTrainedModel]) -> None:
    """Guards greedy generation, and that the cache is used: one token a step after the prompt."""
    equals_generate(deepseek_v3, *lively)


def test_generate_padded_batch(lively: tuple[nn.Module, PreTrainedModel]) -> None:
    """Guards prompts of unequal length in one batch."""
    same_alone_and_padded(deepseek_v3, lively[0])


def test_generate_goes_on(lively: tuple[nn.Module, PreTrainedModel]) -> None:
    """Guards a cache that is handed from one call to the next."""
    goes_on(deepseek_v3, lively[0])


def test_decoding_reads_one_token_a_step() -> None:
    """Guards the cost of a step: in no layer is an old token computed again; none expands it."""
    model = deepseek_v3.Transformer(deepseek_v3.config_from_hf(v3().to_dict()))
    read = [forward_lengths(part) for part in (model, *(block.attn for block in model.blocks))]
    expanded = [forward_lengths(block.attn.kv_b_proj) for block in model.blocks]
    list(deepseek_v3.generate(model, torch.zeros(1, 20, dtype=torch.long), 15))
    assert read == [[20] + [1] * 14] * 3
    assert expanded == [[20]] * 2


# ---- config.json and loading


def built(published: dict, n_more: int, n_mtp: int = 0) -> nn.Module:
    """The model on meta, with no more layers than the dense ones and n_more others."""
    n_dense = published.get("first_k_dense_replace", 0)
    cfg = deepseek_v3.config_from_hf(published | {"num_hidden_layers": n_dense + n_more})
    with torch.device("meta"):
        return deepseek_v3.Transformer(dataclasses.replace(cfg, n_mtp=n_mtp))


def whole(published: dict, count: Callable[[nn.Module], int], n_mtp: int = 0) -> int:
    """What count would give for the model with all of its layers: those with experts are alike."""
    one, two = (count(built(published, n, n_mtp)) for n in (1, 2))
    n_layers = published["num_hidden_layers"] - published.get("first_k_dense_replace", 0)
    return one + (n_layers - 1) * (two - one)


def n_parameters(model: nn.Module) -> int:
    """Without the biases on the choice, which published figures leave out."""
    return sum(p.numel() for name, p in model.named_parameters() if "choice_bias" not in name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the published configs, without their bytes: parameters, names and shapes."""
    monkeypatch.setattr(deepseek_v3.Transformer, "init_weights", lambda self: None)  # slow on meta
    published, n_params = PUBLISHED[name]
    assert whole(published, n_parameters) == n_params
    model = built(published, 1)
    assert not list(model.buffers())
    config = hf_config(published | {"num_hidden_layers": len(model.blocks)})
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config)
    deepseek_v3.load_weights(model, hf.state_dict())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_in_todays_keys(name: str) -> None:
    """Guards config.json as transformers 5 writes it again: it gives the same Config."""
    published, _ = PUBLISHED[name]
    config = hf_config(published).to_dict()
    assert "rope_parameters" in config and "rope_scaling" not in config
    assert deepseek_v3.config_from_hf(config) == deepseek_v3.config_from_hf(published)


def test_multi_token_prediction_of_v3_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the module's shapes: with its copies and all scales, R1's files hold 684,531,386,000
    numbers (a list of all their tensors says so)."""
    monkeypatch.setattr(deepseek_v3.Transformer, "init_weights", lambda self: None)

    def n_stored(model: nn.Module) -> int:
        n = 2 * model.embed.weight.numel()  # the copies
        for name, param in model.named_parameters():
            n += param.numel()
            if "_proj" in name and "eh_proj" not in name:
                n += math.prod(math.ceil(size / 128) for size in param.shape)
        return n

    assert whole(FILE_V3, n_stored, n_mtp=1) == 684_531_386_000


def test_defaults_are_deepseek_v2_lite() -> None:
    """Guards Config's defaults against the published file's values."""
    assert deepseek_v3.config_from_hf(FILE_V2_LITE) == deepseek_v3.Config()


@pytest.mark.parametrize("edit", [older, oldest])
@pytest.mark.parametrize("name", CASES)
def test_older_configs(name: str, edit: Callable[[dict], dict], tmp_path: Path) -> None:
    """Guards config.json as older versions wrote it: it gives the same Config."""
    CASES[name].save_pretrained(tmp_path)
    today = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "rope_parameters" in today
    old = edit(json.loads(json.dumps(today)))
    assert "rope_parameters" not in old
    assert deepseek_v3.config_from_hf(old) == deepseek_v3.config_from_hf(today)


@pytest.mark.parametrize(
    ("published", "change", "said"),
    [
        (FILE_V3, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (FILE_V3, {"attention_bias": True}, "attention_bias is True"),
        (FILE_V3, {"scoring_func": "softmax"}, "scoring_func is 'softmax', only 'sigmoid'"),
        (FILE_V2, {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid', only 'softmax'"),
        (FILE_V3, {"norm_topk_prob": False}, "norm_topk_prob is False, only True"),
        (FILE_V2_LITE, {"norm_topk_prob": True}, "norm_topk_prob is True, only False"),
        (FILE_V3, {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        (FILE_V2, {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        (FILE_V3, {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling is 'linear'"),
        (FILE_V3, {"rope_scaling": YARN_FILE | {"truncate": False}}, "truncate is False"),
        (FILE_V3, {"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'"),
        (
            FILE_V3,
            {"quantization_config": FP8 | {"weight_block_size": [64, 64]}},
            r"weight_block_size is \[64, 64\]",
        ),
    ],
)
def test_config_that_cannot_be_run(published: dict, change: dict, said: str) -> None:
    """Guards against running a variant as if it were DeepSeek's: the key and its value are said."""
    with pytest.raises(ValueError, match=said):
        deepseek_v3.config_from_hf(published | change)


OPTIONAL = (
    "hidden_act attention_bias scoring_func norm_topk_prob quantization_config moe_layer_freq "
    "num_nextn_predict_layers num_key_value_heads rope_theta rope_scaling tie_word_embeddings"
).split()


@pytest.mark.parametrize("published", [FILE_V3, FILE_V2], ids=["V3", "V2"])
def test_config_without_a_key(published: dict) -> None:
    """Guards against guessing a size."""
    for key in published:
        rest = {k: v for k, v in published.items() if k != key}
        if key in OPTIONAL or (key == "topk_method" and published is FILE_V3):
            deepseek_v3.config_from_hf(rest)
        else:
            with pytest.raises(KeyError, match=key):
                deepseek_v3.config_from_hf(rest)
    for key in ("factor", "original_max_position_embeddings"):
        scaling = {k: v for k, v in YARN_FILE.items() if k != key}
        with pytest.raises(KeyError, match=key):
            deepseek_v3.config_from_hf(published | {"rope_scaling": scaling})


def test_config_checks_its_choices() -> None:
    """Guards Config against a router, or a number of modules, that nothing would run."""
    with pytest.raises(ValueError, match="router: 'topk'"):
        deepseek_v3.Config(router="topk")
    with pytest.raises(ValueError, match="n_mtp: 2"):
        deepseek_v3.Config(n_mtp=2)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.embed_tokens.weight", "embed.weight"),
        ("lm_head.weight", "head.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blocks.0.mlp.down_proj.weight"),
        ("model.layers.1.self_attn.kv_a_proj_with_mqa.weight", "blocks.1.attn.kv_a_proj.weight"),
        ("model.layers.1.self_attn.q_a_layernorm.weight", "blocks.1.attn.q_a_norm.weight"),
        ("model.layers.1.mlp.gate.weight", "blocks.1.mlp.router.weight"),
        ("model.layers.1.mlp.gate.e_score_correction_bias", "blocks.1.mlp.choice_bias"),
        ("model.layers.1.mlp.experts.7.up_proj.weight", "blocks.1.mlp.experts.7.up_proj.weight"),
        ("model.layers.1.mlp.shared_experts.up_proj.weight", "blocks.1.mlp.shared.up_proj.weight"),
    ],
)
def test_each_tensor_must_find_its_partner(theirs: str, ours: str) -> None:
    """Guards strict loading: missing, left over, misshapen; both names and shapes are said."""
    state = hub(reference(v3()).state_dict())
    model = deepseek_v3.Transformer(deepseek_v3.config_from_hf(v3().to_dict()))
    with pytest.raises(KeyError) as error:
        deepseek_v3.load_weights(model, {name: w for name, w in state.items() if name != theirs})
    assert theirs in str(error.value) and ours in str(error.value)
    extra = f"extra.{theirs}"
    with pytest.raises(KeyError, match=extra):
        deepseek_v3.load_weights(model, state | {extra: state[theirs]})
    wrong = torch.zeros(1, 1, *state[theirs].shape[1:])  # a plain copy would broadcast it
    with pytest.raises(ValueError) as error:
        deepseek_v3.load_weights(model, state | {theirs: wrong})
    for part in (theirs, ours, str(tuple(wrong.shape)), str(tuple(state[theirs].shape))):
        assert part in str(error.value)


def test_tensors_that_say_nothing_new() -> None:
    """Guards files with rotary tables of older days, or a second copy of a tied head."""
    hf = reference_of(youtu())
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(3) for i in range(2)}
    model = deepseek_v3.Transformer(deepseek_v3.config_from_hf(hf.config.to_dict())).eval()
    deepseek_v3.load_weights(model, hf.state_dict() | tables)
    assert "lm_head.weight" in hf.state_dict()
    assert_equal(model, hf, n=24)


def test_one_fused_tensor_becomes_views() -> None:
    """Guards memory: experts are not copied on their way, and each is told apart."""
    fused = torch.arange(4 * 6 * 5.0).view(4, 6, 5)
    found = deepseek_v3.convert({"model.layers.7.mlp.experts.gate_up_proj": fused})
    assert len(found) == 8
    for i in range(4):
        for part, rows in (("gate", slice(0, 3)), ("up", slice(3, 6))):
            view = found[f"blocks.7.mlp.experts.{i}.{part}_proj.weight"]
            assert torch.equal(view, fused[i, rows])
            assert view.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
    [down] = deepseek_v3.convert({"model.layers.7.mlp.experts.down_proj": fused[:1]})
    assert down == "blocks.7.mlp.experts.0.down_proj.weight"
