"""qwen3.py against transformers' Qwen3, Qwen3-MoE and Qwen2-MoE, with each of their parts on."""

import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from ch06_moe import routers
from ch08_full_models import checkpoint, qwen3
from tests import parity
from tests.parity import (
    TOLERANCE,
    assert_equal,
    assert_noticed,
    check_mask_by_loops,
    equals_generate,
    errors,
    forward_lengths,
    goes_on,
    mutant,
    same_alone_and_padded,
)
from tests.test_ch08_llama3 import (
    NO_ENDS,
    bfloat16_errors,
    check_first_read_is_exact,
    check_gradients,
    check_growth,
    check_ring,
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
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=128,
    **NO_ENDS,
)
SLIDES = dict(use_sliding_window=True, sliding_window=8)  # all texts have 40 tokens
EXPERTS = dict(num_experts=6, moe_intermediate_size=20)


def dense(**changes: object) -> Qwen3Config:
    return Qwen3Config(**SIZES | changes)


def moe(**changes: object) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **SIZES | EXPERTS | dict(num_experts_per_tok=2, norm_topk_prob=True) | changes
    )


def qwen2(**changes: object) -> Qwen2MoeConfig:
    shared = dict(num_experts_per_tok=3, shared_expert_intermediate_size=28)
    return Qwen2MoeConfig(**SIZES | EXPERTS | shared | changes)


def yarn(theta: float = 1000.0, original: int = 16, **scaling: object) -> dict:
    """transformers 5's rope_parameters; the texts are longer than the original length."""
    stretch = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=original)
    return rope(theta, **stretch | scaling)


CASES = {
    "Qwen3, tied": dense(tie_word_embeddings=True),
    "Qwen3, untied": dense(),
    "Qwen3, one key head": dense(num_key_value_heads=1),
    "Qwen3, every head its own keys": dense(num_key_value_heads=6),
    "Qwen3, narrow heads": dense(head_dim=4),
    "Qwen3, wide heads": dense(head_dim=32, hidden_size=36),
    "Qwen3, low base": dense(rope_parameters=rope(50.0)),
    "Qwen3, large epsilon": dense(rms_norm_eps=0.05),
    "Qwen3, YaRN": dense(rope_parameters=yarn()),
    "Qwen3, YaRN, more": dense(rope_parameters=yarn(1e4, 20, factor=16.0), head_dim=16),
    "Qwen3, YaRN with a factor of its own": dense(rope_parameters=yarn(attention_factor=1.7)),
    "Qwen3, YaRN without a ramp": dense(rope_parameters=yarn(100.0, 6)),
    "Qwen3, last layers have a window": dense(**SLIDES, max_window_layers=1),
    "Qwen3, a window that is switched off": dense(sliding_window=8, max_window_layers=0),
    "Qwen3-MoE": moe(),
    "Qwen3-MoE, tied": moe(tie_word_embeddings=True),
    "Qwen3-MoE, weights as they are": moe(norm_topk_prob=False),
    "Qwen3-MoE, one of six": moe(num_experts_per_tok=1),
    "Qwen3-MoE, one of six, its weight as it is": moe(num_experts_per_tok=1, norm_topk_prob=False),
    "Qwen3-MoE, six of six": moe(num_experts_per_tok=6),
    "Qwen3-MoE, one of one": moe(num_experts=1, num_experts_per_tok=1),
    "Qwen3-MoE, most experts idle": moe(num_experts=60, moe_intermediate_size=11),
    "Qwen3-MoE, every second layer": moe(decoder_sparse_step=2, num_hidden_layers=4),
    "Qwen3-MoE, every third layer": moe(decoder_sparse_step=3),
    "Qwen3-MoE, first layer dense": moe(mlp_only_layers=[0]),
    "Qwen3-MoE, both": moe(decoder_sparse_step=2, mlp_only_layers=[0, 3], num_hidden_layers=6),
    "Qwen3-MoE, YaRN": moe(rope_parameters=yarn()),
    "Qwen3-MoE with a window": moe(**SLIDES),
    "Qwen2-MoE": qwen2(),
    "Qwen2-MoE, tied, one key head": qwen2(tie_word_embeddings=True, num_key_value_heads=1),
    "Qwen2-MoE, weights sum to one": qwen2(norm_topk_prob=True),
    "Qwen2-MoE without biases": qwen2(qkv_bias=False),
    "Qwen2-MoE, dense layers": qwen2(decoder_sparse_step=2, num_hidden_layers=4),
    "Qwen2-MoE, YaRN": qwen2(rope_parameters=yarn()),
    "Qwen2-MoE, every second layer has a window": qwen2(**SLIDES, max_window_layers=3),
}


def drawn(seed: int) -> PretrainedConfig:
    """A config drawn from what these families can be, with several parts switched on."""
    rng = random.Random(seed)
    kind = rng.choice([dense, moe, moe, qwen2])
    n_kv_heads, n_experts = rng.randint(1, 3), rng.randint(1, 9)
    n_heads, n_layers = n_kv_heads * rng.randint(1, 4), rng.randint(1, 5)
    changes = dict(
        vocab_size=rng.randint(20, 200),
        hidden_size=rng.randint(8, 60),
        intermediate_size=rng.randint(10, 120),
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=2 * rng.randint(2, 10),
        rms_norm_eps=rng.choice([1e-6, 1e-2]),
        tie_word_embeddings=rng.random() < 0.5,
        rope_parameters=rope(rng.choice([100.0, 1e4, 1e6])),
    )
    if rng.random() < 0.5:
        changes["rope_parameters"] = yarn(
            rng.choice([100.0, 1e4]), rng.randint(8, 36), factor=rng.choice([2.0, 4.0, 32.0])
        )
    if rng.random() < 0.4:
        changes |= dict(use_sliding_window=True, sliding_window=rng.randint(1, 20))
        if kind is not moe:
            changes["max_window_layers"] = rng.randint(0, 4)
    if kind is not dense:
        changes |= dict(
            num_experts=n_experts,
            num_experts_per_tok=rng.randint(1, n_experts),
            moe_intermediate_size=rng.randint(3, 40),
            norm_topk_prob=rng.random() < 0.5,
            decoder_sparse_step=rng.choice([1, 1, 2]),
            mlp_only_layers=rng.choice([[], [rng.randrange(n_layers)]]),
        )
    if kind is qwen2:
        changes["shared_expert_intermediate_size"] = rng.randint(3, 40)
    return kind(**changes)


CASES |= {f"drawn {seed}": drawn(seed) for seed in range(20)}


def reference(config: PretrainedConfig, seed: int = 0, scale: float = 1.5) -> PreTrainedModel:
    """transformers' model; its experts are computed one after the other."""
    hf = parity.reference(config, seed, scale)
    hf.config._experts_implementation = "eager"  # the others do not take every width
    return hf


def from_memory(module: ModuleType, hf: PreTrainedModel) -> nn.Module:
    """Our model with the weights of transformers' in memory, where experts are fused."""
    model = module.Transformer(module.config_from_hf(hf.config.to_dict()))
    module.load_weights(model, hf.state_dict())
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """Guards the forward pass: whole, with the cache, in chunks, padded; from one file or many."""
    hf = reference(CASES[name])
    many = len(name) % 2 == 0
    hf.save_pretrained(tmp_path, max_shard_size="20KB" if many else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == many
    model = qwen3.load_folder(tmp_path)
    assert_equal(model, hf)
    same, state = from_memory(qwen3, hf), model.state_dict()
    assert same.cfg == model.cfg
    for key, tensor in same.state_dict().items():
        assert torch.equal(tensor, state[key]), key


OFF = {  # a part and what it is when it does nothing
    "rotary base": ("Qwen3, low base", dict(rope_theta=10_000.0)),
    "epsilon": ("Qwen3, large epsilon", dict(norm_eps=1e-6)),
    "YaRN": ("Qwen3, YaRN", dict(rope_scaling=None)),
    "YaRN's gain": ("Qwen3, YaRN", dict(rope_scaling=qwen3.RopeScaling(4.0, 16, 1.0))),
    "a gain of its own": (
        "Qwen3, YaRN with a factor of its own",
        dict(rope_scaling=qwen3.RopeScaling(4.0, 16, 0.1 * math.log(4) + 1)),
    ),
    "a step for a ramp": ("Qwen3, YaRN without a ramp", dict(rope_scaling=None)),
    "window": ("Qwen3, last layers have a window", dict(windows=(None,))),
    "no window in the first layer": ("Qwen3, last layers have a window", dict(windows=(8,))),
    "window in every layer": ("Qwen3-MoE with a window", dict(windows=(None, 8))),
    "window in every second layer": (
        "Qwen2-MoE, every second layer has a window",
        dict(windows=(None, 8)),
    ),
    "renormalising": ("Qwen3-MoE", dict(renormalise=False)),
    "not renormalising": ("Qwen3-MoE, weights as they are", dict(renormalise=True)),
    "one of six": ("Qwen3-MoE, one of six", dict(n_active=2)),
    "six of six": ("Qwen3-MoE, six of six", dict(n_active=5)),
    "most experts idle": ("Qwen3-MoE, most experts idle", dict(n_active=3)),
}


@pytest.mark.parametrize("part", OFF)
def test_parts_are_switched_on(part: str) -> None:
    """Guards the cases above: without the part the logits are others."""
    name, off = OFF[part]
    hf = reference(CASES[name])
    model = from_memory(qwen3, hf)
    without = qwen3.Transformer(dataclasses.replace(model.cfg, **off)).eval()
    without.load_state_dict(model.state_dict())
    assert next(errors(without, hf))[1] > 1e-3


# ---- YaRN


@pytest.mark.parametrize(
    ("head_dim", "theta", "factor", "original"),
    [
        (128, 1e6, 4.0, 32768),  # what Qwen3's cards tell to set
        (128, 1e6, 2.0, 32768),
        (64, 1e4, 40.0, 4096),
        (16, 100.0, 4.0, 4096),  # the ramp ends after the last pair
        (6, 100.0, 4.0, 6),  # it starts and ends at pair 0
        (10, 1000.0, 4.0, 16),
    ],
)
def test_yarn_equals_transformers(
    head_dim: int, theta: float, factor: float, original: int
) -> None:
    """Guards frequencies and gain at published sizes and at the ramp's ends."""
    scaling = yarn(theta, original, factor=factor)
    config = dense(head_dim=head_dim, rope_parameters=scaling)
    theirs_P, gain = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    cfg = qwen3.config_from_hf(config.to_dict())
    assert cfg.rope_scaling.gain == pytest.approx(gain, rel=1e-12)
    freq_P = qwen3.rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    torch.testing.assert_close(freq_P, theirs_P, rtol=1e-6, atol=0)


def test_yarn_by_known_figures() -> None:
    """Guards YaRN's formula by figures known from DeepSeek-V3, and Qwen3's gain."""
    freq_P = qwen3.rope_frequencies(64, 10_000.0, qwen3.RopeScaling(40.0, 4096, 1.0))
    for pair, value in {1: 0.749894, 8: 0.1, 16: 0.0055, 24: 2.5e-5, 31: 3.3338e-6}.items():
        assert float(freq_P[pair]) == pytest.approx(value, rel=1e-4)
    published = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    cfg = qwen3.config_from_hf(PUBLISHED["Qwen3-0.6B"][0] | {"rope_scaling": published})
    assert cfg.rope_scaling == qwen3.RopeScaling(4.0, 32768, pytest.approx(1.1386, abs=5e-5))
    plain_P = qwen3.rope_frequencies(128, 1e6, None)
    ratio_P = qwen3.rope_frequencies(128, 1e6, cfg.rope_scaling) / plain_P
    assert (ratio_P == 1).sum() > 20 and torch.isclose(ratio_P, torch.tensor(0.25)).sum() > 20
    assert ((ratio_P > 0.26) & (ratio_P < 0.99)).sum() > 10


def test_yarn_in_a_long_text(tmp_path: Path) -> None:
    """Guards YaRN with fast, slow and blended pairs, far beyond the original length."""
    small = dict(num_attention_heads=2, num_key_value_heads=1, hidden_size=16, head_dim=16)
    hf = reference(dense(num_hidden_layers=2, rope_parameters=yarn(100.0, 700), **small))
    hf.save_pretrained(tmp_path)
    model = qwen3.load_folder(tmp_path)
    ratio_P = qwen3.rope_frequencies(16, 100.0, model.cfg.rope_scaling)
    ratio_P = ratio_P / qwen3.rope_frequencies(16, 100.0, None)
    assert ratio_P[1] == 1 and ratio_P[-1] < 0.6 and ratio_P.unique().numel() > 4
    tokens_1T = torch.randint(97, (1, 2400))
    with torch.no_grad():
        expected_1TV = hf(tokens_1T).logits
        cache = model.new_cache()
        found_1TV = torch.cat([model(t, cache) for t in tokens_1T.split([2200, 1, 190, 9], 1)], 1)
    assert (found_1TV - expected_1TV).abs().max() < TOLERANCE * expected_1TV.abs().max()


def test_angles_stay_in_float32() -> None:
    """Guards bfloat16 models: 8 bits cannot tell position 30,000 from 30,001."""
    torch.set_default_dtype(torch.bfloat16)
    freq_P = qwen3.rope_frequencies(128, 1e6, qwen3.RopeScaling(4.0, 32768, 1.1386))
    cos, sin = qwen3.rope_angles(torch.tensor([[30_000, 30_001]]), freq_P)
    torch.set_default_dtype(torch.float32)
    assert freq_P.dtype == cos.dtype == sin.dtype == torch.float32
    assert torch.equal(freq_P, qwen3.rope_frequencies(128, 1e6, qwen3.RopeScaling(4.0, 32768, 1.0)))


# ---- mistakes

DENSE, SPARSE, QWEN2, WINDOW, FUSED = "dense", "sparse", "Qwen2-MoE", "window", "fused"
SPOILT = {
    DENSE: dense(rms_norm_eps=0.01, rope_parameters=yarn(100.0, 24)),
    SPARSE: moe(
        num_experts_per_tok=3,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        num_hidden_layers=6,
        rope_parameters=rope(100.0),
    ),
    QWEN2: qwen2(),
    WINDOW: dense(**SLIDES, max_window_layers=1),
    FUSED: moe(tie_word_embeddings=True),
}
MUTANTS = {
    "query norm after turning": (
        DENSE,
        "rope(self.q_norm(q_BTHK), turn) -> self.q_norm(rope(q_BTHK, turn))",
    ),
    "key norm after turning": (
        DENSE,
        "rope(self.k_norm(k_BTJK), turn) -> self.k_norm(rope(k_BTJK, turn))",
    ),
    "query norm lost": (DENSE, "self.q_norm(q_BTHK) -> q_BTHK"),
    "key norm lost": (DENSE, "self.k_norm(k_BTJK) -> k_BTJK"),
    "one norm for queries and keys": (DENSE, "self.k_norm(k_BTJK) -> self.q_norm(k_BTJK)"),
    "values normed": (DENSE, "append(k_BTJK, v_BTJK -> append(k_BTJK, self.k_norm(v_BTJK)"),
    "norm over all heads": (
        DENSE,
        "self.q_norm(q_BTHK) -> "
        "self.q_norm.weight * F.rms_norm(q_BTHK, q_BTHK.shape[-2:], None, self.q_norm.eps)",
    ),
    "no epsilon": (DENSE, "mean_square + self.eps -> mean_square"),
    "epsilon of the class": (DENSE, 'norm_eps=hf["rms_norm_eps"] -> norm_eps=1e-6'),
    "keys repeated in turn": (
        DENSE,
        "k_BSJK.transpose(1, 2), -> k_BSJK.transpose(1, 2).repeat(1, 3, 1, 1),",
        "v_BSJK.transpose(1, 2), -> v_BSJK.transpose(1, 2).repeat(1, 3, 1, 1),",
    ),
    "scale of the width": (DENSE, "self.head_dim**-0.5 -> (x_BTD.shape[-1] / 6) ** -0.5"),
    "rotary base": (SPARSE, "rope_theta=theta -> rope_theta=1e4"),
    "rotary pairs side by side": (
        DENSE,
        "x_BTHK.chunk(2, dim=-1) -> x_BTHK[..., ::2], x_BTHK[..., 1::2]",
    ),
    "YaRN's gain lost": (DENSE, "part * cfg.rope_scaling.gain -> part"),
    "YaRN's gain on one of two": (DENSE, "part in turn) -> part in turn[:1]) + turn[1:]"),
    "YaRN's gain squared": (DENSE, "part * cfg.rope_scaling.gain -> part * 1.1386**2"),
    "YaRN's gain by log 2": (DENSE, '0.1 * math.log(scaling["factor"]) -> 0.1 * math.log(2)'),
    "YaRN's ramp inverted": (
        DENSE,
        "slow_P * freq_P / scaling.factor + (1 - slow_P) * freq_P -> "
        "(1 - slow_P) * freq_P / scaling.factor + slow_P * freq_P",
    ),
    "YaRN's ramp a step": (DENSE, "width = last - first or 0.001 -> width = 0.001"),
    "YaRN multiplies": (DENSE, "freq_P / scaling.factor -> freq_P * scaling.factor"),
    "YaRN's slow end by 32 turns": (DENSE, "for n in (32, 1)) -> for n in (32, 32))"),
    "YaRN's length without 2 pi": (DENSE, "scaling.original_len / (2 * math.pi) -> 24.0"),
    "YaRN's ends not whole": (DENSE, "min(math.ceil(slow), head_dim - 1) -> slow"),
    "no renormalising": (SPARSE, "if self.renormalise: -> if False:"),
    "renormalising without being told": (QWEN2, "if self.renormalise: -> if True:"),
    "softmax over the chosen": (
        QWEN2,
        ".softmax(dim=-1, dtype=torch.float32) -> ",
        "weight_NA.type_as(x_ND) -> weight_NA.softmax(dim=-1)",
    ),
    "softmax over the tokens": (SPARSE, "self.router(x_ND).softmax(dim=-1 -> "
                                        "self.router(x_ND).softmax(dim=0"),
    "sigmoid for softmax": (SPARSE, ".softmax(dim=-1, dtype=torch.float32) -> .sigmoid()"),
    "one expert too few": (SPARSE, '=hf["num_experts_per_tok"] -> =hf["num_experts_per_tok"] - 1'),
    "one expert too many": (SPARSE, '=hf["num_experts_per_tok"] -> =hf["num_experts_per_tok"] + 1'),
    "weights of other tokens": (SPARSE, "weight_NA.flatten()[order_M, None] -> "
                                        "weight_NA.flatten()[:, None]"),
    "results to other tokens": (SPARSE, "order_M // self.n_active -> order_M % len(x_ND)"),
    "results not added up": (SPARSE, "y_ND.index_add( -> y_ND.index_copy("),
    "dense and sparse layers exchanged": (
        SPARSE,
        "(i + 1) % step == 0 -> (i + 1) % step != 0",
        "if missing: -> if False:",
        "raise KeyError(f\"{theirs}: -> continue  # (f\"{theirs}:",
    ),
    "a sparse layer where a dense one belongs": (
        SPARSE,
        "i not in dense and -> ",
        "if missing: -> if False:",
        "raise KeyError(f\"{theirs}: -> continue  # (f\"{theirs}:",
    ),
    "shared expert lost": (QWEN2, "if self.shared is None else -> if True else"),
    "shared expert's gate lost": (QWEN2, "self.out_gate(x).sigmoid() * -> "),
    "shared expert's gate without a sigmoid": (QWEN2, "self.out_gate(x).sigmoid() -> "
                                                      "self.out_gate(x)"),
    "gate on the routed experts, too": (
        QWEN2,
        "y_MD.type_as(y_ND)) -> "
        "y_MD * self.shared.out_gate(x_ND)[token_M].sigmoid())",
    ),
    "query bias lost": (QWEN2, "self.q_proj(x_BTD) -> F.linear(x_BTD, self.q_proj.weight)"),
    "key bias lost": (QWEN2, "self.k_proj(x_BTD) -> F.linear(x_BTD, self.k_proj.weight)"),
    "value bias lost": (QWEN2, "self.v_proj(x_BTD) -> F.linear(x_BTD, self.v_proj.weight)"),
    "norms on Qwen2's queries": (QWEN2, "qk_norm=not is_2 -> qk_norm=True",
                                 "if missing: -> if False:"),
    "gate on the wrong matrix": (
        SPARSE,
        "silu(self.gate_proj(x)) * self.up_proj(x) -> silu(self.up_proj(x)) * self.gate_proj(x)",
    ),
    "fused: gate and up exchanged": (FUSED, "gate, up = w.chunk -> up, gate = w.chunk"),
    "fused: rows in turn": (FUSED, "w.chunk(2, dim=1) -> w[:, ::2], w[:, 1::2]"),
    "fused: experts reversed": (FUSED, 'parts = {"down_proj": w} -> '
                                       'parts = {"down_proj": w.flip(0)}'),
    "windows in other layers": (WINDOW, "cfg.windows[layer % -> cfg.windows[(layer + 1) %"),
    "window one too wide": (WINDOW, "> q_pos_BT1 - window -> >= q_pos_BT1 - window"),
    "window without being told": (
        WINDOW,
        'if not hf.get("use_sliding_window") -> if hf.get("use_sliding_window")',
    ),
    "padding is seen": (SPARSE, " & ((k_pos_B1S >= 0) | (q_pos_BT1 < 0)) -> "),
    "padding takes positions": (WINDOW, "pos_T - n_pad) -> pos_T - 0 * n_pad)"),
    "positions start again with each call": (DENSE, "self.n_seen + torch.arange -> torch.arange"),
    "head is the embedding": (DENSE, "self.embed if cfg.tied else self.head -> self.embed"),
}  # fmt: skip


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, PreTrainedModel]]:
    """Folders that transformers wrote, and the models in them; they are right as they are."""
    made = {}
    for name, config in SPOILT.items():
        hf = reference(config, scale=2.0)
        made[name] = tmp_path_factory.mktemp(name), hf
        hf.save_pretrained(made[name][0])
        assert_equal(qwen3.load_folder(made[name][0]), hf)
    return made


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str, spoilt: dict[str, tuple[Path, PreTrainedModel]]) -> None:
    """Guards the comparison with transformers: with a mistake in the source it must fail."""
    case, *changes = MUTANTS[name]
    folder, hf = spoilt[case]
    module = mutant(qwen3, *changes)
    model = from_memory(module, hf) if case == FUSED else module.load_folder(folder)
    assert_noticed(model, hf)


# ---- parts


@torch.no_grad()
@pytest.mark.parametrize("renormalise", [False, True])
def test_route_equals_chapter_6s(renormalise: bool) -> None:
    """Guards the router: choice and weights by the function that chapter 6 tests by itself."""
    cfg = qwen3.config_from_hf(moe(num_experts_per_tok=3, norm_topk_prob=renormalise).to_dict())
    layer, x_ND = qwen3.MoE(cfg), torch.randn(50, 48)
    nn.init.normal_(layer.router.weight)
    expert_NA, weight_NA = layer.route(x_ND)
    expected = routers.qwen3(layer.router(x_ND), 3, renormalise)
    assert torch.equal(expert_NA, expected[0])
    torch.testing.assert_close(weight_NA, expected[1])


@torch.no_grad()
@pytest.mark.parametrize("renormalise", [False, True])
def test_router_rounds_as_transformers(renormalise: bool) -> None:
    """Guards the order in bfloat16, bit by bit: softmax and sum in float32, rounded at the end."""
    config = moe(num_experts=64, num_experts_per_tok=5, norm_topk_prob=renormalise)
    theirs = Qwen3MoeTopKRouter(config).bfloat16()
    nn.init.normal_(theirs.weight, std=0.3)
    layer = qwen3.MoE(qwen3.config_from_hf(config.to_dict())).bfloat16()
    layer.router.load_state_dict(theirs.state_dict())
    x_ND = torch.randn(200, 48).bfloat16()
    _, expected_NA, chosen_NA = theirs(x_ND)
    expert_NA, weight_NA = layer.route(x_ND)
    assert torch.equal(expert_NA, chosen_NA)
    assert weight_NA.dtype == torch.bfloat16 and torch.equal(weight_NA, expected_NA)


def test_only_the_chosen_experts_are_called() -> None:
    """Guards the cost of a token, and experts that are read from disk when they are called."""
    cfg = qwen3.config_from_hf(moe(num_experts=40, num_experts_per_tok=2).to_dict())
    layer = qwen3.MoE(cfg)
    calls: list[tuple[int, int]] = []  # expert, tokens
    for i, expert in enumerate(layer.experts):
        expert.register_forward_pre_hook(lambda _, args, i=i: calls.append((i, len(args[0]))))
    x_BTD = torch.randn(2, 3, 48)
    layer(x_BTD)
    n_tokens = layer.route(x_BTD.flatten(0, 1))[0].flatten().bincount().tolist()
    assert calls == [(i, n) for i, n in enumerate(n_tokens) if n]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_ring(window: int | None, padded: bool) -> None:
    """Guards the cache: no token is lost, none is seen that is too old, at any chunk size."""
    check_ring(qwen3, window, padded)


@pytest.mark.parametrize("window", [None, 24])
def test_buffers_double(window: int | None) -> None:
    """Guards the cost of a token, and the memory of a layer with a window."""
    check_growth(qwen3, window)


def test_first_read_is_exact() -> None:
    """Guards the memory of a long prompt."""
    check_first_read_is_exact(qwen3)


def test_causal_mask_by_loops() -> None:
    """Guards who sees whom."""
    check_mask_by_loops(qwen3)


def test_masks_are_built_only_where_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards speed and memory: no mask larger than new x seen, and none that would be all true."""
    model = qwen3.Transformer(qwen3.config_from_hf(SPOILT[WINDOW].to_dict()))
    assert model.cfg.windows == (None, 8, 8)
    tokens_BT = torch.zeros(3, 40, dtype=torch.long)

    def built(cache: list, n: int) -> list:
        return masks_built(qwen3, monkeypatch, lambda: model(tokens_BT[:, :n], cache))

    cache = model.new_cache()
    assert built(cache, 8) == []  # a first read within the window
    assert [built(cache, 1) for _ in range(10)] == [[]] * 10
    assert built(cache, 5) == [((3, 5, 23), None)] + [((3, 5, 8 + 5), 8)] * 2
    assert built(cache, 1) == []


def test_bfloat16_is_as_good_as_transformers(tmp_path: Path) -> None:
    """Guards the rounding in bfloat16: an error of 3 %, and at most 1.5 times transformers'."""
    width = dict(moe_intermediate_size=24)  # transformers' fast experts take no 20
    configs = [dense(rope_parameters=yarn()), moe(**width), qwen2(**width)]
    configs += [moe(**width, norm_topk_prob=False), dense(num_hidden_layers=5)]
    ours, theirs = bfloat16_errors(qwen3, configs, tmp_path)
    assert ours < 0.03
    assert ours < 1.5 * theirs


@pytest.mark.parametrize("name", ["Qwen3, YaRN", "Qwen3-MoE", "Qwen2-MoE"])
def test_gradients_equal_transformers(name: str) -> None:
    """Guards training: router, every expert, the shared one and its gate, norms and biases."""
    hf = reference(CASES[name])
    check_gradients(qwen3, from_memory(qwen3, hf), hf)


def test_initial_weights() -> None:
    """Guards init_weights: spread of every matrix, and the biases and norm weights."""
    config = qwen2(hidden_size=64, num_hidden_layers=8, decoder_sparse_step=2)
    cfg = qwen3.config_from_hf(config.to_dict())
    for model in (
        qwen3.Transformer(cfg),
        qwen3.Transformer(dataclasses.replace(cfg, qk_norm=True)),
    ):
        for name, param in model.named_parameters():
            if name.endswith("bias"):
                assert not param.any(), name
            elif "norm" in name:
                assert (param == 1).all(), name
            else:
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * 8) if into_stream else 0.02
                error = 1 / math.sqrt(2 * param.numel())
                assert float(param.detach().std()) == pytest.approx(std, rel=5 * error), name


# ---- generation


@pytest.fixture(scope="module")
def lively() -> tuple[qwen3.Transformer, PreTrainedModel]:
    """Ours and transformers': a Qwen3-MoE with YaRN whose greedy texts vary."""
    config = moe(rope_parameters=yarn(), decoder_sparse_step=2, num_hidden_layers=4)
    hf = reference(config, scale=3.0)
    return from_memory(qwen3, hf), hf


def test_generate_equals_transformers(lively: tuple[qwen3.Transformer, PreTrainedModel]) -> None:
    """Guards greedy generation, and that the cache is used: one token a step after the prompt."""
    equals_generate(qwen3, *lively)


@pytest.mark.parametrize("config", [dense(tie_word_embeddings=True), qwen2()], ids=["dense", "2"])
def test_generate_equals_transformers_in_kind(config: PretrainedConfig) -> None:
    """Guards greedy generation of the other kinds."""
    hf = reference(config, scale=3.0)
    hf.model.embed_tokens.weight.data *= 0.3  # else a tied model says each token again
    equals_generate(qwen3, from_memory(qwen3, hf), hf)


def test_generate_padded_batch(lively: tuple[qwen3.Transformer, PreTrainedModel]) -> None:
    """Guards prompts of unequal length in one batch."""
    same_alone_and_padded(qwen3, lively[0])


def test_generate_goes_on(lively: tuple[qwen3.Transformer, PreTrainedModel]) -> None:
    """Guards a cache that is handed from one call to the next."""
    goes_on(qwen3, lively[0])


def test_decoding_reads_one_token_a_step() -> None:
    """Guards the cost of a step: in no layer is an old token computed again."""
    model = qwen3.Transformer(qwen3.config_from_hf(moe().to_dict()))
    parts = (model, *(b.attn for b in model.blocks), *(b.mlp for b in model.blocks))
    read = [forward_lengths(part) for part in parts]
    list(qwen3.generate(model, torch.zeros(1, 20, dtype=torch.long), 15))
    assert read == [[20] + [1] * 14] * 7


# ---- loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A folder that transformers wrote, with a tied head and all that Qwen2-MoE has."""
    folder = tmp_path_factory.mktemp("saved")
    hf = reference(qwen2(tie_word_embeddings=True, mlp_only_layers=[1]))
    hf.save_pretrained(folder)
    return folder, hf


@pytest.mark.parametrize(
    "extra",
    [
        {"lm_head.weight": (97, 48)},
        {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (4,) for i in range(3)},
    ],
    ids=["tied head", "rotary tables"],
)
def test_tensors_that_say_nothing_new(
    extra: dict[str, tuple[int, ...]], saved: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    """Guards files with a second copy of the tied head, as Qwen3-0.6B's, or with rotary tables."""
    folder, hf = saved
    state = load_file(folder / "model.safetensors")
    save_file(state | {k: torch.zeros(v) for k, v in extra.items()}, tmp_path / "model.safetensors")
    tmp_path.joinpath("config.json").write_bytes(folder.joinpath("config.json").read_bytes())
    assert_equal(qwen3.load_folder(tmp_path), hf, n=24)


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_by_checkpoint(
    dtype: torch.dtype,
    is_fused: bool,
    saved: tuple[Path, PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards a model laid out without memory and then filled, from either form of the experts."""
    folder, hf = saved
    monkeypatch.setitem(checkpoint.FAMILIES, "qwen2_moe", "ch08_full_models.qwen3")
    state = hf.state_dict() if is_fused else load_file(folder / "model.safetensors")
    assert any("gate_up_proj" in name for name in state) == is_fused
    save_file({k: w.clone() for k, w in state.items()}, tmp_path / "model.safetensors")
    tmp_path.joinpath("config.json").write_bytes(folder.joinpath("config.json").read_bytes())
    model, _ = checkpoint.load(tmp_path, dtype=dtype, device="cpu")
    expected = qwen3.load_folder(folder).to(dtype).state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("shape", [(6, 20), (6, 39, 48), (6, 40, 47), (5, 40, 48), (7, 40, 48)])
def test_fused_tensor_of_a_wrong_shape(
    shape: tuple[int, ...], saved: tuple[Path, PreTrainedModel]
) -> None:
    """Guards the split: no shape is accepted that is not the model's."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    state = saved[1].state_dict()
    assert state[name].shape == (6, 40, 48)
    model = qwen3.load_folder(saved[0])
    with pytest.raises((KeyError, ValueError), match=r"model\.layers\.0\.mlp\.experts"):
        qwen3.load_weights(model, state | {name: torch.zeros(shape)})


def test_fused_experts_are_views(saved: tuple[Path, PreTrainedModel]) -> None:
    """Guards memory: splitting a fused tensor copies nothing."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    w = saved[1].state_dict()[name]
    parts = qwen3.convert({name: w})
    assert len(parts) == 2 * 6
    assert {x.untyped_storage().data_ptr() for x in parts.values()} == {
        w.untyped_storage().data_ptr()
    }


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.embed_tokens.weight", "embed.weight"),
        ("model.layers.1.self_attn.k_proj.bias", "blocks.1.attn.k_proj.bias"),
        ("model.layers.2.post_attention_layernorm.weight", "blocks.2.mlp_norm.weight"),
        ("model.layers.1.mlp.down_proj.weight", "blocks.1.mlp.down_proj.weight"),
        ("model.layers.0.mlp.gate.weight", "blocks.0.mlp.router.weight"),
        (
            "model.layers.2.mlp.experts.5.up_proj.weight",
            "blocks.2.mlp.experts.5.up_proj.weight",
        ),
        (
            "model.layers.2.mlp.shared_expert.down_proj.weight",
            "blocks.2.mlp.shared.down_proj.weight",
        ),
        ("model.layers.0.mlp.shared_expert_gate.weight", "blocks.0.mlp.shared.out_gate.weight"),
    ],
)
def test_each_tensor_must_find_its_partner(
    theirs: str, ours: str, saved: tuple[Path, PreTrainedModel]
) -> None:
    """Guards strict loading: missing, left over, misshapen; both names and shapes are said."""
    folder = saved[0]
    state = load_file(folder / "model.safetensors")
    model = qwen3.load_folder(folder)
    with pytest.raises(KeyError) as error:
        qwen3.load_weights(model, {name: w for name, w in state.items() if name != theirs})
    assert theirs in str(error.value) and ours in str(error.value)
    extra = theirs.replace("model.", "model.extra.", 1)
    with pytest.raises(KeyError, match=extra):
        qwen3.load_weights(model, state | {extra: state[theirs]})
    wrong = torch.zeros(2, *state[theirs].shape[1:])  # a plain copy would broadcast some
    with pytest.raises(ValueError) as error:
        qwen3.load_weights(model, state | {theirs: wrong})
    for part in (theirs, ours, str(tuple(wrong.shape)), str(tuple(state[theirs].shape))):
        assert part in str(error.value)


def test_missing_parts_are_errors(saved: tuple[Path, PreTrainedModel]) -> None:
    """Guards heads that are not tied, and norms of queries that Qwen2-MoE's file has none of."""
    state = load_file(saved[0] / "model.safetensors")
    cfg = qwen3.load_folder(saved[0]).cfg
    with pytest.raises(KeyError, match="lm_head.weight"):
        qwen3.load_weights(qwen3.Transformer(dataclasses.replace(cfg, tied=False)), state)
    with pytest.raises(KeyError, match="q_norm"):
        qwen3.load_weights(qwen3.Transformer(dataclasses.replace(cfg, qk_norm=True)), state)
    with pytest.raises(KeyError, match="shared_expert"):
        qwen3.load_weights(qwen3.Transformer(dataclasses.replace(cfg, d_shared=None)), state)


# ---- config.json

QWEN3 = dict(
    model_type="qwen3",
    vocab_size=151936,
    head_dim=128,
    num_key_value_heads=8,
    hidden_act="silu",
    max_position_embeddings=40960,
    rms_norm_eps=1e-06,
    rope_theta=1000000,
    rope_scaling=None,
    attention_bias=False,
    use_sliding_window=False,
    sliding_window=None,
)
QWEN3_MOE = QWEN3 | dict(
    model_type="qwen3_moe",
    num_key_value_heads=4,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    tie_word_embeddings=False,
)
QWEN2_MOE = dict(
    model_type="qwen2_moe",
    vocab_size=151936,
    hidden_act="silu",
    rms_norm_eps=1e-06,
    rope_theta=1000000.0,
    use_sliding_window=False,
    tie_word_embeddings=False,
    decoder_sparse_step=1,
    norm_topk_prob=False,
)


def sizes(layers: int, width: int, heads: int, d_ff: int, **rest: object) -> dict:
    """The keys of config.json that differ most from model to model."""
    return rest | dict(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=d_ff,
        max_window_layers=layers,
    )


TIED, UNTIED = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)
PUBLISHED = {  # config.json, parameters, those that a token uses
    "Qwen3-0.6B": (QWEN3 | sizes(28, 1024, 16, 3072, **TIED), 596_049_920, None),
    "Qwen3-1.7B": (QWEN3 | sizes(28, 2048, 16, 6144, **TIED), 1_720_574_976, None),
    "Qwen3-4B": (QWEN3 | sizes(36, 2560, 32, 9728, **TIED), 4_022_468_096, None),
    "Qwen3-8B": (QWEN3 | sizes(36, 4096, 32, 12288, **UNTIED), 8_190_735_360, None),
    "Qwen3-14B": (QWEN3 | sizes(40, 5120, 40, 17408, **UNTIED), 14_768_307_200, None),
    "Qwen3-32B": (QWEN3 | sizes(64, 5120, 64, 25600, **UNTIED), 32_762_123_264, None),
    "Qwen3-30B-A3B": (
        QWEN3_MOE | sizes(48, 2048, 32, 6144, moe_intermediate_size=768),
        30_532_122_624,
        3_353_032_704,
    ),
    "Qwen3-235B-A22B": (
        QWEN3_MOE | sizes(94, 4096, 64, 12288, moe_intermediate_size=1536),
        235_093_634_560,
        22_190_763_520,
    ),
    "Qwen1.5-MoE-A2.7B": (
        QWEN2_MOE
        | sizes(24, 2048, 16, 5632, moe_intermediate_size=1408, max_position_embeddings=8192)
        | dict(num_key_value_heads=16, num_experts=60, num_experts_per_tok=4)
        | dict(shared_expert_intermediate_size=5632),
        14_315_784_192,
        2_689_173_504,
    ),
    "Qwen2-57B-A14B": (
        QWEN2_MOE
        | sizes(28, 3584, 28, 18944, moe_intermediate_size=2560, max_position_embeddings=131072)
        | dict(num_key_value_heads=4, num_experts=64, num_experts_per_tok=8)
        | dict(shared_expert_intermediate_size=20480),
        57_408_658_944,
        14_249_270_784,
    ),
}
KINDS = {"qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig, "qwen2_moe": Qwen2MoeConfig}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    """Guards the published configs, without their bytes: parameters, names and shapes."""
    published, n_params, n_used = PUBLISHED[name]
    hf_config = KINDS[published["model_type"]](**published)
    cfg = qwen3.config_from_hf(published)
    assert qwen3.config_from_hf(hf_config.to_dict()) == cfg  # with every key there is
    assert len(set(cfg.sparse)) == 1  # all layers are alike: two tell about all
    n_layers, counts = cfg.n_layers, []
    for few in (1, 2):
        hf_config = KINDS[published["model_type"]](**published | dict(num_hidden_layers=few))
        with torch.device("meta"):
            model = qwen3.Transformer(dataclasses.replace(cfg, n_layers=few))
            hf = AutoModelForCausalLM.from_config(hf_config)
        qwen3.load_weights(model, hf.state_dict())
        counts.append(sum(p.numel() for p in model.parameters()))
        assert counts[-1] == sum(p.numel() for p in hf.parameters())
    assert counts[0] + (n_layers - 1) * (counts[1] - counts[0]) == n_params
    if n_used:
        n_idle = n_layers * (cfg.n_experts - cfg.n_active) * 3 * cfg.d_expert * cfg.d_model
        assert n_params - n_idle == n_used


def test_defaults_are_qwen3_0_6b() -> None:
    """Guards Config's defaults against the published file's values."""
    cfg = qwen3.config_from_hf(PUBLISHED["Qwen3-0.6B"][0])
    assert cfg.windows == (None,) * 28
    assert dataclasses.replace(cfg, windows=(None,)) == qwen3.Config()


def hub(config: dict) -> dict:
    """The config as it lies on the hub: rope in two keys, and the number of experts so called."""
    config = older(config)
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    return config


def silent(config: dict) -> dict:
    """Without the keys that only say what their absence says."""
    config = hub(config)
    absent = {
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "num_key_value_heads": config["num_attention_heads"],
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": False,
        "qkv_bias": True,
        "layer_types": config.get("layer_types"),  # max_window_layers says it as well
    }
    return {k: v for k, v in config.items() if k not in absent or v != absent[k]}


@pytest.mark.parametrize("edit", [hub, oldest, silent])
@pytest.mark.parametrize("name", CASES)
def test_older_configs(name: str, edit: Callable[[dict], dict], tmp_path: Path) -> None:
    """Guards config.json as older versions wrote it: it gives the same Config."""
    CASES[name].save_pretrained(tmp_path)
    today = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "rope_parameters" in today
    old = edit(json.loads(json.dumps(today)))
    assert "rope_parameters" not in old
    assert qwen3.config_from_hf(old) == qwen3.config_from_hf(today)


def test_layer_types_are_read() -> None:
    """Guards the list of each layer's kind, which goes before the rules."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    for make in (dense, qwen2):
        config = make(**SLIDES, layer_types=kinds).to_dict()
        assert qwen3.config_from_hf(config).windows == (8, None, 8)
        config["use_sliding_window"] = False
        assert qwen3.config_from_hf(config).windows == (None, None, None)


def test_width_of_qwen2s_heads() -> None:
    """Guards Qwen2-MoE's config, which says no head_dim."""
    config = qwen2().to_dict()
    del config["head_dim"]
    assert qwen3.config_from_hf(config).head_dim == 48 // 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
        ({"attention_bias": True}, "attention_bias.*True"),
        ({"rope_parameters": rope(rope_type="linear", factor=4.0)}, "rope_scaling.*linear"),
        ({"rope_parameters": rope(rope_type="llama3", factor=4.0)}, "rope_scaling.*llama3"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_scaling.*dynamic"),
        ({"rope_parameters": yarn(beta_fast=16)}, "beta_fast.*16"),
        ({"rope_parameters": yarn(beta_slow=2)}, "beta_slow.*2"),
        ({"rope_parameters": yarn(mscale=0.7, mscale_all_dim=1.0)}, "mscale.*0.7"),
        ({"rope_parameters": yarn(truncate=False)}, "truncate.*False"),
    ],
)
@pytest.mark.parametrize("make", [dense, moe, qwen2])
def test_config_that_cannot_be_run(
    make: Callable[[], PretrainedConfig], change: dict, said: str
) -> None:
    """Guards against running a variant as if it were Qwen: the key and its value are said."""
    with pytest.raises(ValueError, match=said):
        qwen3.config_from_hf(make().to_dict() | change)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (dense, "vocab_size"),
        (dense, "hidden_size"),
        (dense, "intermediate_size"),
        (dense, "num_hidden_layers"),
        (dense, "num_attention_heads"),
        (dense, "head_dim"),
        (dense, "rms_norm_eps"),
        (moe, "head_dim"),
        (moe, "moe_intermediate_size"),
        (moe, "num_experts_per_tok"),
        (qwen2, "num_experts"),
        (qwen2, "shared_expert_intermediate_size"),
    ],
)
def test_config_without_a_key(make: Callable[[], PretrainedConfig], key: str) -> None:
    """Guards against guessing a size."""
    config = make().to_dict()
    del config[key]
    with pytest.raises(KeyError, match=key):
        qwen3.config_from_hf(config)
