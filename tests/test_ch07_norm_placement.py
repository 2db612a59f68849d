"""norm_placement.py against transformers' Qwen3, OLMo and Gemma, each placement and each QK-norm.

| norms           | none on q, k   | per head          | over the full width    |
|-----------------|----------------|-------------------|------------------------|
| on the way in   | Llama, Mixtral | Qwen3, Qwen3-MoE  | OLMoE                  |
| on the way out  | by hand        | by hand           | OLMo 2, OLMo 3, FlexOlmo |
| both            | Gemma 2        | Gemma 3           | by hand                |

Gemma differs in more: here it gets SiLU for GELU, no scale on its embedding, and no caps; its norm
weights are one less than ours.
"""

import dataclasses
import itertools
import re
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    FlexOlmoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from ch06_moe import moe
from ch07_norm_placement import norm_placement
from tests import test_ch05_swiglu_rmsnorm as ch05
from tests import test_ch06_moe as ch06
from tests.parity import (
    TOLERANCE,
    assert_equal,
    assert_noticed,
    equals_generate,
    errors,
    goes_on,
    mutant,
    same_alone_and_padded,
)
from tests.test_ch04_mla import rope

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the whole model

PLACES = ("in", "out", "both")
QK_NORMS = (None, "head", "full")
PLACED = {  # transformers' model_type: norm_at and qk_norm
    "llama": ("in", None),
    "mixtral": ("in", None),
    "qwen3": ("in", "head"),
    "qwen3_moe": ("in", "head"),
    "olmoe": ("in", "full"),
    "olmo2": ("out", "full"),
    "olmo3": ("out", "full"),
    "flex_olmo": ("out", "full"),
    "gemma2": ("both", None),
    "gemma3_text": ("both", "head"),
}
NAMES = {  # transformers' post_attention_layernorm is a norm before the MLP, or after attention
    "in": {"post_attention_layernorm": "mlp_norm"},
    "out": {
        "post_attention_layernorm": "attn_out_norm",
        "post_feedforward_layernorm": "mlp_out_norm",
    },
    "both": {
        "post_attention_layernorm": "attn_out_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_out_norm",
    },
}
GEMMA = dict(
    query_pre_attn_scalar=12,  # the width of a head
    hidden_activation="silu",
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    sliding_window=8,
)
EXPERTS = dict(num_experts=6, num_experts_per_tok=3, norm_topk_prob=True)
OLMO = dict(head_dim=8)  # d_model / n_heads; transformers' OLMo knows no other


def qwen3(**changes: object) -> Qwen3Config:
    return Qwen3Config(**ch05.sizes(**changes))


def qwen3_moe(**changes: object) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**ch05.sizes(**EXPERTS | dict(moe_intermediate_size=22) | changes))


def olmo2(**changes: object) -> Olmo2Config:
    return Olmo2Config(**ch05.sizes(**OLMO | changes))


def gemma2(**changes: object) -> Gemma2Config:
    return Gemma2Config(**ch05.sizes(**GEMMA | changes))


def gemma3(**changes: object) -> Gemma3TextConfig:
    angles = {f"{kind}_attention": rope(10_000.0) for kind in ("full", "sliding")}
    return Gemma3TextConfig(**ch05.sizes(**GEMMA | dict(rope_parameters=angles) | changes))


CASES = {
    "Llama": ch05.llama(),
    "Mixtral": ch06.mixtral(),
    "Qwen3": qwen3(),
    "Qwen3, one key/value head": qwen3(num_key_value_heads=1),
    "Qwen3, large epsilon": qwen3(rms_norm_eps=0.05),
    "Qwen3-MoE": qwen3_moe(),
    "Qwen3-MoE, a dense layer": qwen3_moe(mlp_only_layers=[0]),
    "OLMoE": OlmoeConfig(**ch05.sizes(**OLMO | EXPERTS)),
    "OLMo 2": olmo2(),
    "OLMo 2, one key/value head": olmo2(num_key_value_heads=1),
    "OLMo 2, every head its own": olmo2(num_key_value_heads=6),
    "OLMo 2, large epsilon": olmo2(rms_norm_eps=0.05),
    "OLMo 3": Olmo3Config(**ch05.sizes(**OLMO | dict(sliding_window=8, num_hidden_layers=5))),
    "FlexOlmo": FlexOlmoConfig(**ch05.sizes(**OLMO | EXPERTS)),
    "Gemma 2": gemma2(),
    "Gemma 2, large epsilon": gemma2(rms_norm_eps=0.05),
    "Gemma 3": gemma3(num_hidden_layers=6),
    "Gemma 3, full layers only": gemma3(layer_types=["full_attention"] * 3),
}


def reference_of(config: PretrainedConfig, seed: int = 0, scale: float = 1.0) -> PreTrainedModel:
    """transformers' model; a Gemma without the scale of its embedding."""
    hf = ch06.reference_of(config, seed, scale)
    if hasattr(hf.model.embed_tokens, "embed_scale"):
        hf.model.embed_tokens.embed_scale.fill_(1.0)
    return hf


@torch.no_grad()
def ours(hf: PreTrainedModel, module: ModuleType = norm_placement, **changes: object) -> nn.Module:
    """Our model, or that of a spoiled module, with the weights of transformers'."""
    theirs = hf.config
    norm_at, qk_norm = PLACED[theirs.model_type]
    sizes: dict[str, object] = dict(norm_at=norm_at, qk_norm=qk_norm, n_experts=0)
    if any(name.endswith("experts.down_proj") for name, _ in hf.named_parameters()):
        dense = getattr(theirs, "mlp_only_layers", None) or []
        sizes |= ch06.expert_sizes(theirs) | dict(n_dense_layers=len(dense))
    model = ch05.ours(hf, module, NAMES[norm_at], **sizes | changes)
    if theirs.model_type.startswith("gemma"):
        for name, param in model.named_parameters():
            param += "norm" in name
    return model


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str) -> None:
    """Guards each placement and each QK-norm, however texts are fed."""
    hf = reference_of(CASES[name], seed=len(name), scale=1.5)
    assert_equal(ours(hf), hf, seed=len(name))


@torch.no_grad()
@pytest.mark.parametrize("name", ["Qwen3", "OLMoE", "OLMo 2", "Gemma 2"])
def test_parts_are_switched_on(name: str) -> None:
    """Guards the cases above: with another placement or QK-norm the logits are others.

    Norms that both have keep their weights, the others get ones.
    """
    hf = reference_of(CASES[name])
    model = ours(hf)
    for norm_at, qk_norm in itertools.product(PLACES, QK_NORMS):
        cfg = dataclasses.replace(model.cfg, norm_at=norm_at, qk_norm=qk_norm)
        if cfg != model.cfg:
            other = norm_placement.Transformer(cfg).eval()
            for key, param in other.named_parameters():
                w = model.state_dict().get(key, param)
                param.copy_(w if w.shape == param.shape else param)
            assert next(errors(other, hf))[1] > 1e-3, (norm_at, qk_norm)


@pytest.mark.parametrize("name", ["Qwen3-MoE, a dense layer", "OLMo 2", "Gemma 3"])
def test_gradients_equal_transformers(name: str) -> None:
    """Guards training, the norms' weights included."""
    hf = reference_of(CASES[name], scale=1.5)
    ch05.check_gradients(ours(hf), hf, NAMES[PLACED[hf.config.model_type][0]])


# ---- each combination, one block by hand

SMALL = norm_placement.Config(
    vocab_size=50,
    n_layers=1,
    d_model=24,
    n_heads=6,
    n_kv_heads=2,
    head_dim=10,
    d_latent=None,
    d_ff=20,
    n_experts=0,
    norm_eps=0.01,
)


def small_block(
    norm_at: str, qk_norm: str | None, module: ModuleType = norm_placement
) -> nn.Module:
    """A block in float64 with no parameter left at its initial value."""
    given = dataclasses.asdict(SMALL) | dict(norm_at=norm_at, qk_norm=qk_norm)
    block = module.Block(module.Config(**given), 0).double()
    for name, param in block.named_parameters():
        nn.init.normal_(param, mean=float("norm" in name), std=0.3)
    return block


def block_by_hand(w: dict[str, Tensor], x_TD: Tensor, cfg: norm_placement.Config) -> Tensor:
    """One text through a block, (T, D), head by head; w holds the block's tensors by name.

    A norm that has no tensor is not there. Pairs of dimensions turn as complex numbers.
    """
    H, J, K, T = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, len(x_TD)

    def norm(name: str, x: Tensor) -> Tensor:
        if f"{name}.weight" not in w:
            return x
        mean_square = (x * x).sum(dim=-1, keepdim=True) / x.shape[-1]
        return w[f"{name}.weight"] * x / (mean_square + cfg.norm_eps) ** 0.5

    def project(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}_proj.weight"].T

    def heads(name: str, x: Tensor) -> list[Tensor]:
        """Queries or keys, normed and turned, (T, K) a head."""
        parts = project(f"attn.{name}", x)
        if cfg.qk_norm == "full":
            parts = norm(f"attn.{name}_norm", parts)
        parts = list(parts.split(K, dim=-1))
        if cfg.qk_norm == "head":
            parts = [norm(f"attn.{name}_norm", part) for part in parts]
        angle_TP = torch.outer(
            torch.arange(T).double(), cfg.rope_theta ** (-torch.arange(K // 2) / (K // 2)).double()
        )
        turn_TP = torch.polar(torch.ones_like(angle_TP), angle_TP)
        turned = [torch.complex(*part.split(K // 2, dim=-1)) * turn_TP for part in parts]
        return [torch.cat((z.real, z.imag), dim=-1) for z in turned]

    into = norm("attn_norm", x_TD)
    q, k, v = heads("q", into), heads("k", into), project("attn.v", into).split(K, dim=-1)
    seen = [
        F.scaled_dot_product_attention(q[h], k[h * J // H], v[h * J // H], is_causal=True)
        for h in range(H)
    ]
    x_TD = x_TD + norm("attn_out_norm", project("attn.o", torch.cat(seen, dim=-1)))
    into = norm("mlp_norm", x_TD)
    hidden = F.silu(project("mlp.gate", into)) * project("mlp.up", into)
    return x_TD + norm("mlp_out_norm", project("mlp.down", hidden))


@torch.no_grad()
def check_block(norm_at: str, qk_norm: str | None, module: ModuleType = norm_placement) -> None:
    """A block equals the one by hand; norms and angles are in float32 here."""
    block, x_BTD = small_block(norm_at, qk_norm, module), torch.randn(2, 9, 24).double()
    pos_BT = torch.arange(9).expand(2, 9)
    turn = module.rope_angles(pos_BT, module.rope_frequencies(SMALL.head_dim, SMALL.rope_theta))
    found_BTD = block(x_BTD, pos_BT, turn, module.LayerCache(None))
    cfg, w = dataclasses.replace(SMALL, qk_norm=qk_norm), block.state_dict()
    expected_BTD = torch.stack([block_by_hand(w, x_TD, cfg) for x_TD in x_BTD])
    assert (found_BTD - expected_BTD).abs().max() < 1e-6 * expected_BTD.abs().max()


@pytest.mark.parametrize("qk_norm", QK_NORMS)
@pytest.mark.parametrize("norm_at", PLACES)
def test_block_by_hand(norm_at: str, qk_norm: str | None) -> None:
    """Guards all nine combinations, those included that no family has."""
    check_block(norm_at, qk_norm)


@pytest.mark.parametrize("qk_norm", QK_NORMS)
@pytest.mark.parametrize("norm_at", PLACES)
def test_norms_appear_and_disappear(norm_at: str, qk_norm: str | None) -> None:
    """Guards the parameters: a norm that is not there has none, and QK-norms have their widths."""
    block = small_block(norm_at, qk_norm)
    shapes = {n: tuple(p.shape) for n, p in block.named_parameters() if "norm" in n}
    expected = {}
    for half in ("attn", "mlp"):
        if norm_at != "out":
            expected[f"{half}_norm.weight"] = (24,)
        if norm_at != "in":
            expected[f"{half}_out_norm.weight"] = (24,)
    if qk_norm:
        n_q, n_k = {"head": (1, 1), "full": (6, 2)}[qk_norm]
        expected |= {"attn.q_norm.weight": (10 * n_q,), "attn.k_norm.weight": (10 * n_k,)}
    assert shapes == expected


@torch.no_grad()
@pytest.mark.parametrize("d_latent", [None, 10])
@pytest.mark.parametrize("n_experts", [0, 4])
def test_norms_in_and_none_on_queries_are_chapter_6s(d_latent: int | None, n_experts: int) -> None:
    """Guards the claim that the parent is a special case: bit by bit, with the same weights."""
    sizes = dict(vocab_size=50, n_layers=2, d_model=24, n_heads=8, d_ff=30, d_expert=9)
    sizes |= dict(d_latent=d_latent, n_experts=n_experts)
    before = moe.Transformer(moe.Config(**sizes)).eval()
    after = norm_placement.Transformer(norm_placement.Config(**sizes, qk_norm=None)).eval()
    for param in before.parameters():
        param.add_(0.2 * torch.randn_like(param))
    after.load_state_dict(before.state_dict())
    tokens_BT = torch.randint(50, (3, 20))
    caches = before.new_cache(), after.new_cache()
    for part_BT in (tokens_BT, *tokens_BT.split([9, 1, 10], dim=1)):
        given = [()] * 2 if part_BT is tokens_BT else [(cache,) for cache in caches]
        assert torch.equal(before(part_BT, *given[0]), after(part_BT, *given[1]))


@torch.no_grad()
@pytest.mark.parametrize("norm_at", PLACES)
def test_latent_attention_has_no_qk_norm(norm_at: str) -> None:
    """Guards what the chapter says: there are no keys to norm, only latents, normed already."""
    latent = dataclasses.replace(SMALL, d_latent=9, d_q_latent=11, norm_at=norm_at)
    tokens_BT, found = torch.randint(50, (2, 9)), []
    for qk_norm in QK_NORMS:
        torch.manual_seed(1)
        model = norm_placement.Transformer(dataclasses.replace(latent, qk_norm=qk_norm)).eval()
        names = {name for name, _ in model.named_parameters()}
        assert not any(re.search(r"attn\.[qk]_norm", name) for name in names)
        assert {"blocks.0.attn.q_a_norm.weight", "blocks.0.attn.kv_a_norm.weight"} <= names
        found.append(model(tokens_BT))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# ---- what norms do


@torch.no_grad()
def outputs(block: nn.Module, x_BTD: Tensor) -> Tensor:
    pos_BT = torch.arange(x_BTD.shape[1]).expand(x_BTD.shape[:2])
    freq_P = norm_placement.rope_frequencies(SMALL.head_dim, SMALL.rope_theta)
    turn = norm_placement.rope_angles(pos_BT, freq_P)
    return block(x_BTD, pos_BT, turn, norm_placement.LayerCache(None))


def quiet_epsilon(block: nn.Module) -> nn.Module:
    """The block with an epsilon that does not matter, so that a norm takes out any scale."""
    for module in block.modules():
        if isinstance(module, norm_placement.RMSNorm):
            module.eps = 1e-12
    return block


def differ(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", QK_NORMS)
def test_qk_norm_takes_out_the_scale_of_scores(qk_norm: str | None) -> None:
    """Guards what QK-norm is for: scores stay as they are when its matrices grow.

    One head's matrix may grow alone only if each head has its own norm.
    """
    block, x_BTD = quiet_epsilon(small_block("in", qk_norm)), torch.randn(2, 9, 24).double()
    before_BTD = outputs(block, x_BTD)
    block.attn.q_proj.weight *= 50
    block.attn.k_proj.weight *= 30
    assert (differ(before_BTD, outputs(block, x_BTD)) < 1e-6) == (qk_norm is not None)
    block.attn.q_proj.weight /= 50
    block.attn.k_proj.weight /= 30
    block.attn.q_proj.weight[:10] *= 50
    assert (differ(before_BTD, outputs(block, x_BTD)) < 1e-6) == (qk_norm == "head")


@torch.no_grad()
@pytest.mark.parametrize("norm_at", PLACES)
def test_norms_take_out_the_scale_of_a_side(norm_at: str) -> None:
    """Guards the places: norms on the way in forget the stream's scale, on the way out a half's."""
    block, x_BTD = quiet_epsilon(small_block(norm_at, None)), torch.randn(2, 9, 24).double()
    added_BTD = outputs(block, x_BTD) - x_BTD
    block.attn.o_proj.weight *= 20
    block.mlp.down_proj.weight *= 20
    louder_BTD = outputs(block, x_BTD) - x_BTD
    assert (differ(added_BTD, louder_BTD) < 1e-6) == (norm_at != "in")
    block = quiet_epsilon(small_block(norm_at, None))
    half_BTD = outputs(block, x_BTD * 4) - x_BTD * 4
    block.mlp.down_proj.weight.zero_()  # attention alone, since its sum with the stream is normed
    alone_BTD, scaled_BTD = (outputs(block, s * x_BTD) - s * x_BTD for s in (1, 4))
    assert (differ(alone_BTD, scaled_BTD) < 1e-6) == (norm_at != "out")
    assert half_BTD.isfinite().all()


@torch.no_grad()
def test_a_head_norm_of_ones_may_as_well_come_after_the_rotation() -> None:
    """Guards what makes that mistake hard to see: turning changes no length. Weights show it."""
    norm, x_BTHK = norm_placement.RMSNorm(10, 1e-6), torch.randn(2, 9, 3, 10)
    pos_BT = torch.arange(9).expand(2, 9)
    turn = norm_placement.rope_angles(pos_BT, norm_placement.rope_frequencies(10, 10_000.0))

    def both_orders() -> tuple[Tensor, Tensor]:
        return norm_placement.rope(norm(x_BTHK), turn), norm(norm_placement.rope(x_BTHK, turn))

    assert differ(*both_orders()) < 1e-6
    norm.weight[:5] = 0.5
    assert differ(*both_orders()) > 0.1


# ---- mistakes

ATTN_IN = "y_BTD = self.attn(self.attn_norm(x_BTD), pos_BT, turn, cache)"
ATTN_OUT = "x_BTD = x_BTD + self.attn_out_norm(y_BTD)"
MLP = "x_BTD = x_BTD + self.mlp_out_norm(self.mlp(self.mlp_norm(x_BTD)))"
Q = "rope(self.normed(self.q_norm, q_BTHK), turn)"
K = "rope(self.normed(self.k_norm, k_BTJK), turn)"
V = "v_BTJK = self.v_proj(x_BTD).unflatten(-1, (-1, self.head_dim))"
FULL = "return norm(x_BTHK.flatten(-2)).view_as(x_BTHK)"
HEAD = "return norm(x_BTHK)\n"
QWEN, LARGE, OLMO2, GEMMA2, GEMMA3 = "Qwen3", "Qwen3, large epsilon", "OLMo 2", "Gemma 2", "Gemma 3"
LLAMA = "Llama"
MUTANTS = {
    # where a block norms
    "out: norm after the addition, attention": (
        OLMO2,
        f"{ATTN_OUT} -> x_BTD = self.attn_out_norm(x_BTD + y_BTD)",
    ),
    "out: norm after the addition, MLP": (
        OLMO2,
        f"{MLP} -> x_BTD = self.mlp_out_norm(x_BTD + self.mlp(self.mlp_norm(x_BTD)))",
    ),
    "out: norm on the way in, attention": (
        OLMO2,
        f"{ATTN_IN} -> y_BTD = self.attn(self.attn_out_norm(x_BTD), pos_BT, turn, cache)",
        f"{ATTN_OUT} -> x_BTD = x_BTD + y_BTD",
    ),
    "out: norm on the way in, MLP": (
        OLMO2,
        f"{MLP} -> x_BTD = x_BTD + self.mlp(self.mlp_out_norm(x_BTD))",
    ),
    "out: attention's for the MLP": (
        OLMO2,
        "self.mlp_out_norm(self.mlp -> self.attn_out_norm(self.mlp",
    ),
    "out: the MLP's for attention": (
        OLMO2,
        "+ self.attn_out_norm(y_BTD) -> + self.mlp_out_norm(y_BTD)",
    ),
    "out: none after attention": (OLMO2, f"{ATTN_OUT} -> x_BTD = x_BTD + y_BTD"),
    "out: none after the MLP": (OLMO2, f"{MLP} -> x_BTD = x_BTD + self.mlp(x_BTD)"),
    "out: twice": (
        OLMO2,
        "+ self.attn_out_norm(y_BTD) -> + self.attn_out_norm(self.attn_out_norm(y_BTD))",
    ),
    "out: the stream, too": (
        OLMO2,
        f"{ATTN_OUT} -> x_BTD = self.attn_out_norm(x_BTD) + self.attn_out_norm(y_BTD)",
    ),
    "both: in and out exchanged, attention": (
        GEMMA2,
        f"{ATTN_IN} -> y_BTD = self.attn(self.attn_out_norm(x_BTD), pos_BT, turn, cache)",
        f"{ATTN_OUT} -> x_BTD = x_BTD + self.attn_norm(y_BTD)",
    ),
    "both: in and out exchanged, MLP": (
        GEMMA2,
        f"{MLP} -> x_BTD = x_BTD + self.mlp_norm(self.mlp(self.mlp_out_norm(x_BTD)))",
    ),
    "both: attention's for the MLP, in": (
        GEMMA2,
        "self.mlp(self.mlp_norm( -> self.mlp(self.attn_norm(",
    ),
    "both: attention's for the MLP, out": (
        GEMMA2,
        "self.mlp_out_norm(self.mlp -> self.attn_out_norm(self.mlp",
    ),
    "both: attention's output norm before the MLP": (
        GEMMA2,
        "self.mlp(self.mlp_norm( -> self.mlp(self.attn_out_norm(",
    ),
    "both: none before attention": (GEMMA2, "self.attn(self.attn_norm(x_BTD), -> self.attn(x_BTD,"),
    "both: none after attention": (GEMMA2, f"{ATTN_OUT} -> x_BTD = x_BTD + y_BTD"),
    "both: none before the MLP": (GEMMA2, "self.mlp(self.mlp_norm(x_BTD)) -> self.mlp(x_BTD)"),
    "both: none after the MLP": (
        GEMMA2,
        f"{MLP} -> x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD))",
    ),
    "both: output norm after the addition": (
        GEMMA2,
        f"{ATTN_OUT} -> x_BTD = self.attn_out_norm(x_BTD + y_BTD)",
    ),
    "in: norm after the addition": (
        LLAMA,
        f"{ATTN_IN} -> y_BTD = self.attn(x_BTD, pos_BT, turn, cache)",
        f"{ATTN_OUT} -> x_BTD = self.attn_norm(x_BTD + y_BTD)",
    ),
    "in: the stream is the normed one": (
        LLAMA,
        f"{ATTN_IN} -> x_BTD = self.attn_norm(x_BTD); "
        "y_BTD = self.attn(x_BTD, pos_BT, turn, cache)",
    ),
    "in: one norm for both halves": (LLAMA, "self.mlp(self.mlp_norm( -> self.mlp(self.attn_norm("),
    "in: both halves side by side": (
        LLAMA,
        f"{ATTN_OUT} -> pass",
        f"{MLP} -> x_BTD = x_BTD + y_BTD + self.mlp(self.mlp_norm(x_BTD))",
    ),
    "final norm missing, in": (LLAMA, "x_BTD = self.norm(x_BTD) -> pass"),
    "final norm missing, out": (OLMO2, "x_BTD = self.norm(x_BTD) -> pass"),
    "final norm missing, both": (GEMMA2, "x_BTD = self.norm(x_BTD) -> pass"),
    # queries and keys
    "head: statistics of all heads": (
        QWEN,
        f"{HEAD} -> return norm.weight * F.rms_norm(x_BTHK, x_BTHK.shape[-2:], eps=norm.eps)\n",
    ),
    "full: statistics of each head": (
        OLMO2,
        f"{FULL} -> return norm.weight.view(x_BTHK.shape[-2:])"
        " * F.rms_norm(x_BTHK, x_BTHK.shape[-1:], eps=norm.eps)",
    ),
    "full: one head's weights for all": (
        OLMO2,
        f"{FULL} -> return norm.weight[: x_BTHK.shape[-1]]"
        " * F.rms_norm(x_BTHK, x_BTHK.shape[-2:], eps=norm.eps)",
    ),
    "full: weights in another order": (
        OLMO2,
        f"{FULL} -> return norm(x_BTHK.mT.flatten(-2)).view_as(x_BTHK.mT).mT",
    ),
    "head: statistics over the heads": (
        QWEN,
        f"{HEAD} -> return norm.weight * "
        "(x_BTHK * (x_BTHK.square().mean(-2, keepdim=True) + norm.eps).rsqrt())\n",
    ),
    "head: mean subtracted": (
        QWEN,
        f"{HEAD} -> return norm(x_BTHK - x_BTHK.mean(-1, keepdim=True))\n",
    ),
    "head: unit length": (
        QWEN,
        f"{HEAD} -> return norm.weight * F.normalize(x_BTHK, dim=-1)\n",
    ),
    "head: no weight": (QWEN, f"{HEAD} -> return norm(x_BTHK) / norm.weight\n"),
    "head: after the rotation, queries": (
        QWEN,
        f"{Q} -> self.normed(self.q_norm, rope(q_BTHK, turn))",
    ),
    "head: after the rotation, keys": (
        QWEN,
        f"{K} -> self.normed(self.k_norm, rope(k_BTJK, turn))",
    ),
    "full: after the rotation": (
        OLMO2,
        f"{Q} -> self.normed(self.q_norm, rope(q_BTHK, turn))",
        f"{K} -> self.normed(self.k_norm, rope(k_BTJK, turn))",
    ),
    "head: queries' weight for the keys": (
        QWEN,
        "self.normed(self.k_norm -> self.normed(self.q_norm",
    ),
    "head: keys' weight for the queries": (
        QWEN,
        "self.normed(self.q_norm -> self.normed(self.k_norm",
    ),
    "head: weights exchanged": (
        QWEN,
        f"{Q} -> rope(self.normed(self.k_norm, q_BTHK), turn)",
        f"{K} -> rope(self.normed(self.q_norm, k_BTJK), turn)",
    ),
    "head: queries not normed": (QWEN, f"{Q} -> rope(q_BTHK, turn)"),
    "head: keys not normed": (QWEN, f"{K} -> rope(k_BTJK, turn)"),
    "full: queries not normed": (OLMO2, f"{Q} -> rope(q_BTHK, turn)"),
    "full: keys not normed": (OLMO2, f"{K} -> rope(k_BTJK, turn)"),
    "both and head: neither normed": (
        GEMMA3,
        f"{Q} -> rope(q_BTHK, turn)",
        f"{K} -> rope(k_BTJK, turn)",
    ),
    "head: values normed, too": (QWEN, f"{V} -> {V}; v_BTJK = self.normed(self.k_norm, v_BTJK)"),
    "full: values normed, too": (OLMO2, f"{V} -> {V}; v_BTJK = self.normed(self.k_norm, v_BTJK)"),
    "head: no scale left": (QWEN, "self.head_dim**-0.5 -> 1.0"),
    "head: keys normed when they are read again": (
        QWEN,
        "mask_BTS = causal_mask(pos_BT, pos_BS, self.window)\n        y_BTHK = -> "
        "mask_BTS = causal_mask(pos_BT, pos_BS, self.window)\n"
        "        k_BSJK = self.normed(self.k_norm, k_BSJK)\n        y_BTHK = ",
    ),
    "head: epsilon of its own, queries": (
        LARGE,
        "RMSNorm(n_q * cfg.head_dim, cfg.norm_eps) -> RMSNorm(n_q * cfg.head_dim, 1e-6)",
    ),
    "head: epsilon of its own, keys": (
        LARGE,
        "RMSNorm(n_k * cfg.head_dim, cfg.norm_eps) -> RMSNorm(n_k * cfg.head_dim, 1e-6)",
    ),
    "blocks' norms with an epsilon of their own": (
        "Gemma 2, large epsilon",
        "return RMSNorm(cfg.d_model, cfg.norm_eps) -> return RMSNorm(cfg.d_model, 1e-6)",
    ),
}


@pytest.fixture(scope="module")
def references() -> dict[str, PreTrainedModel]:
    """The models that spoiled ones are compared with; unspoiled, ours equal them."""
    made = {}
    for name in dict.fromkeys(case for case, *_ in MUTANTS.values()):
        made[name] = reference_of(CASES[name], scale=1.5)
        assert next(errors(ours(made[name]), made[name]))[1] < TOLERANCE
    return made


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str, references: dict[str, PreTrainedModel]) -> None:
    """Guards the comparison with transformers: with a mistake in the source it must fail."""
    case, *changes = MUTANTS[name]
    assert_noticed(ours(references[case], mutant(norm_placement, *changes)), references[case])


SHAPES = {
    "both is in": (GEMMA2, 'in (place, "both") -> == ("in" if place == "both" else place)'),
    "in is both": (LLAMA, 'if cfg.norm_at in (place, "both") -> if True'),
    "out keeps its norms on the way in": (OLMO2, '(place, "both") -> (place, "both", "out")'),
    "full: queries' width for the keys": (
        OLMO2,
        "(cfg.n_heads, cfg.n_kv_heads) if -> (cfg.n_heads, cfg.n_heads) if",
    ),
    "full: one head's width": (OLMO2, 'if cfg.qk_norm == "full" else (1, 1) -> if 0 else (1, 1)'),
    "head: a weight a head": (QWEN, 'if cfg.qk_norm == "full" else (1, 1) -> if 1 else (1, 1)'),
    "always normed": (LLAMA, "if cfg.qk_norm else nn.Identity() -> if 1 else nn.Identity()"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_mistakes_of_shape_are_noticed(name: str, references: dict[str, PreTrainedModel]) -> None:
    """Guards which norms there are, and how wide: the reference's weights must fit."""
    case, change = SHAPES[name]
    with pytest.raises(RuntimeError, match="in loading state_dict"):
        ours(references[case], mutant(norm_placement, change))


IN_A_BLOCK = [
    name
    for name in MUTANTS
    if not name.startswith(("final norm", "head: keys normed when"))  # nothing of one block alone
]


@pytest.mark.parametrize("name", IN_A_BLOCK)
def test_the_block_by_hand_notices_them_too(name: str) -> None:
    """Guards check_block, on which the combinations rest that no family has."""
    case, *changes = MUTANTS[name]
    with pytest.raises(AssertionError):
        check_block(*PLACED[CASES[case].model_type], mutant(norm_placement, *changes))


# ---- generation and the demo


@pytest.fixture(scope="module", params=["Qwen3-MoE", "OLMo 3", "Gemma 3"])
def lively(request: pytest.FixtureRequest) -> tuple[nn.Module, PreTrainedModel]:
    """Ours and transformers', so large that greedy texts vary."""
    hf = reference_of(CASES[request.param], seed=1, scale=3.0)
    return ours(hf), hf


def test_generate_equals_transformers(lively: tuple[nn.Module, PreTrainedModel]) -> None:
    """Guards greedy generation, and that the cache is used: one token a step after the prompt."""
    equals_generate(norm_placement, *lively)


def test_generate_padded_batch(lively: tuple[nn.Module, PreTrainedModel]) -> None:
    """Guards prompts of unequal length in one batch."""
    same_alone_and_padded(norm_placement, lively[0])


def test_generate_goes_on(lively: tuple[nn.Module, PreTrainedModel]) -> None:
    """Guards a cache that is handed from one call to the next."""
    goes_on(norm_placement, lively[0])


@dataclasses.dataclass(frozen=True)
class Small(norm_placement.Config):
    """A demo that takes no time."""

    d_model: int = 48
    n_heads: int = 2
    n_kv_heads: int = 1
    d_ff: int = 32
    d_expert: int = 8


def test_demo_shows_how_the_stream_grows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the demo's table: what goes into the first layer and comes out of the last."""
    measured: dict[str, list[float]] = {}

    class Watched(norm_placement.Transformer):
        """Notes the mean square of the stream at its two ends, at each call."""

        def __init__(self, cfg: norm_placement.Config) -> None:
            super().__init__(cfg)
            ends = measured[cfg.norm_at] = [0.0, 0.0]

            def note(end: int, x_BTD: Tensor) -> None:
                ends[end] = float(x_BTD.detach().square().mean())

            self.blocks[0].register_forward_pre_hook(lambda _, args: note(0, args[0]))
            self.blocks[-1].register_forward_hook(lambda _, args, x_BTD: note(1, x_BTD))

    monkeypatch.setattr(sys, "argv", ["norm_placement.py", "--n-new", "2"])
    monkeypatch.setattr(norm_placement, "Config", Small)
    monkeypatch.setattr(norm_placement, "Transformer", Watched)
    norm_placement.main()
    found = re.findall(r"norms at (\w+): ([\d.]+), ([\d.]+)$", capsys.readouterr().out, re.M)
    assert [place for place, *_ in found] == list(PLACES) == list(measured)
    for place, *printed in found:
        assert printed == [f"{end:.4f}" for end in measured[place]]
        assert (measured[place][1] > 1) == (place != "in")  # norms on the way out make it grow


@pytest.mark.parametrize(("field", "value"), [("norm_at", "post"), ("qk_norm", "heads")])
def test_unknown_places_are_refused(field: str, value: str) -> None:
    """Guards against a model without norms that nobody asked for."""
    with pytest.raises(ValueError, match=f"{field}: '{value}', expected"):
        norm_placement.Config(**{field: value})
