"""moe.py against transformers' Mixtral, Qwen3-MoE and DeepSeek, and its dispatch against loops.

DeepSeek-V3's router is exchanged for one with a softmax; all else in that reference is its own:
latent attention, a dense first layer, shared experts, a bias on the choice.
"""

import dataclasses
import math
import random
import re
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from ch01_gpt2.train import decay_groups, token_losses
from ch05_swiglu_rmsnorm import swiglu_rmsnorm
from ch06_moe import moe
from tests import test_ch05_swiglu_rmsnorm as ch05
from tests.parity import (
    TOLERANCE,
    assert_equal,
    assert_noticed,
    equals_generate,
    errors,
    goes_on,
    mutant,
    reference,
    same_alone_and_padded,
)
from tests.test_ch04_mla import v3

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the whole model


def mixtral(**changes: object) -> MixtralConfig:
    experts = dict(num_local_experts=6, num_experts_per_tok=2, sliding_window=None)
    return MixtralConfig(**ch05.sizes(**experts | changes))


def deepseek(**changes: object) -> DeepseekV3Config:
    sizes = dict(
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_routed_experts=6,
        num_experts_per_tok=3,
        n_shared_experts=2,
        moe_intermediate_size=22,
        n_group=1,
        topk_group=1,
        attention_bias=False,
    )
    return v3(**sizes | changes)


def drawn(seed: int) -> MixtralConfig:
    """A Mixtral drawn at random."""
    rng = random.Random(seed)
    n_experts, n_kv_heads = rng.randint(1, 9), rng.randint(1, 3)
    return mixtral(
        hidden_size=rng.randint(8, 40),
        intermediate_size=rng.randint(3, 60),
        num_hidden_layers=rng.randint(1, 3),
        num_attention_heads=n_kv_heads * rng.randint(1, 3),
        num_key_value_heads=n_kv_heads,
        head_dim=2 * rng.randint(2, 8),
        num_local_experts=n_experts,
        num_experts_per_tok=rng.randint(1, n_experts),
        sliding_window=rng.choice([None, rng.randint(1, 24)]),
    )


CASES = {
    "Mixtral": mixtral(),
    "Mixtral with a window": mixtral(sliding_window=8),
    "one of six": mixtral(num_experts_per_tok=1),
    "six of six": mixtral(num_experts_per_tok=6),
    "one of one": mixtral(num_local_experts=1, num_experts_per_tok=1),
    "many, most of them idle": mixtral(num_local_experts=40, intermediate_size=11),
    "DeepSeek": deepseek(),
    "DeepSeek, one shared expert": deepseek(n_shared_experts=1, q_lora_rank=None),
    "DeepSeek, two dense layers": deepseek(first_k_dense_replace=2),
    "DeepSeek, no dense layer": deepseek(first_k_dense_replace=0, num_hidden_layers=2),
}
CASES |= {f"drawn {seed}": drawn(seed) for seed in range(4)}


def route_by_softmax(gate: nn.Module, _: tuple, routed: tuple) -> tuple:
    """In place of what DeepSeek-V3's router says: probabilities, the bias on the choice alone."""
    logit_NI = routed[0]
    prob_NI = logit_NI.exp() / logit_NI.exp().sum(dim=-1, keepdim=True)
    wanted_NI = prob_NI + gate.e_score_correction_bias
    expert_NA = wanted_NI.argsort(dim=-1, descending=True)[:, : gate.top_k]
    chosen_NI = torch.zeros_like(prob_NI).scatter(1, expert_NA, 1.0)
    weight_NI = prob_NI * chosen_NI / (prob_NI * chosen_NI).sum(dim=-1, keepdim=True)
    return logit_NI, weight_NI.gather(1, expert_NA), expert_NA


def reference_of(config: PretrainedConfig, seed: int = 0, scale: float = 1.0) -> PreTrainedModel:
    """transformers' model; a DeepSeek with a softmax in its routers, and a bias that matters."""
    hf = reference(config, seed, scale)
    hf.config._experts_implementation = "eager"  # the others do not take every width
    for module in hf.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.copy_(0.1 * torch.randn(module.num_experts))
            module.register_forward_hook(route_by_softmax)
    return hf


def expert_sizes(theirs: PretrainedConfig) -> dict[str, int]:
    """The fields of Config that chapter 6 adds, as a transformers config has them."""
    return dict(
        n_experts=theirs.num_local_experts,
        n_active=theirs.num_experts_per_tok,
        n_shared=getattr(theirs, "n_shared_experts", 0),
        d_expert=getattr(theirs, "moe_intermediate_size", theirs.intermediate_size),
        n_dense_layers=getattr(theirs, "first_k_dense_replace", 0),
    )


def ours(hf: PreTrainedModel, module: ModuleType = moe, **changes: object) -> nn.Module:
    """Our model, or that of a spoiled module, with the weights of transformers'."""
    return ch05.ours(hf, module, **expert_sizes(hf.config) | changes)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str) -> None:
    """Guards the forward pass, however texts are fed: each token is routed by itself."""
    hf = reference_of(CASES[name], seed=len(name))
    assert_equal(ours(hf), hf, seed=len(name))


OFF = {
    "one of six": dict(n_active=2),
    "six of six": dict(n_active=5),
    "Mixtral": dict(n_active=1),
    "DeepSeek": dict(n_active=2),
}


@pytest.mark.parametrize("name", [*OFF, "bias"])
@torch.no_grad()
def test_parts_are_switched_on(name: str) -> None:
    """Guards the cases above: another number of experts, or no bias, gives other logits."""
    hf = reference_of(CASES["DeepSeek" if name == "bias" else name])
    model = ours(hf, **OFF.get(name, {}))
    if name == "bias":
        for block in model.blocks[1:]:
            block.mlp.choice_bias.zero_()
    assert next(errors(model, hf))[1] > 1e-3


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek"])
def test_gradients_equal_transformers(name: str) -> None:
    """Guards training: the router, every expert and the shared ones."""
    hf = reference_of(CASES[name], scale=2.0)
    ch05.check_gradients(ours(hf), hf)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [dict(n_experts=0), dict(n_experts=4, n_dense_layers=2)], ids=str)
@pytest.mark.parametrize("d_latent", [None, 10])
def test_without_experts_it_is_chapter_5s(d_latent: int | None, sizes: dict[str, int]) -> None:
    """Guards the claim that the parent is a special case: bit by bit, with the same weights."""
    shape = dict(vocab_size=50, n_layers=2, d_model=24, n_heads=8, d_ff=30, d_latent=d_latent)
    before = swiglu_rmsnorm.Transformer(swiglu_rmsnorm.Config(**shape)).eval()
    after = moe.Transformer(moe.Config(**shape, **sizes)).eval()
    for param in before.parameters():
        param.add_(0.2 * torch.randn_like(param))
    after.load_state_dict(before.state_dict())
    tokens_BT = torch.randint(50, (3, 20))
    caches = before.new_cache(), after.new_cache()
    for part_BT in (tokens_BT, *tokens_BT.split([9, 1, 10], dim=1)):
        given = [()] * 2 if part_BT is tokens_BT else [(cache,) for cache in caches]
        assert torch.equal(before(part_BT, *given[0]), after(part_BT, *given[1]))


# ---- one layer against transformers' own blocks


def load(layer: nn.Module, theirs: nn.Module) -> None:
    """Gives our MoE layer the weights of one of transformers' blocks."""
    state = ch05.convert(theirs.state_dict())
    state.setdefault("choice_bias", torch.zeros_like(layer.choice_bias))
    layer.load_state_dict(state)


I, A, D, WIDTH = 6, 3, 24, 22  # noqa: E741
DEEPSEEK = dict(
    n_routed_experts=I, num_experts_per_tok=A, hidden_size=D, moe_intermediate_size=WIDTH,
    n_shared_experts=2, num_attention_heads=4, n_group=3, topk_group=2, routed_scaling_factor=2.5,
)  # fmt: skip
BLOCKS: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {  # shared experts, own routing
    "Mixtral": (
        lambda: MixtralSparseMoeBlock(
            MixtralConfig(
                num_local_experts=I, num_experts_per_tok=A, hidden_size=D, intermediate_size=WIDTH
            )
        ),
        0,
        True,
    ),
    "Qwen3-MoE": (
        lambda: Qwen3MoeSparseMoeBlock(
            Qwen3MoeConfig(
                num_experts=I,
                num_experts_per_tok=A,
                hidden_size=D,
                moe_intermediate_size=WIDTH,
                norm_topk_prob=True,
            )
        ),
        0,
        True,
    ),
    "DeepSeek-V2": (
        lambda: DeepseekV2Moe(DeepseekV2Config(**DEEPSEEK, topk_method="group_limited_greedy")),
        2,
        False,
    ),
    "DeepSeek-V3": (lambda: DeepseekV3MoE(DeepseekV3Config(**DEEPSEEK)), 2, False),
}


@torch.no_grad()
@pytest.mark.parametrize("name", BLOCKS)
def test_layer_equals_transformers(name: str) -> None:
    """Guards dispatch and shared experts; DeepSeek's routers, which are others, tell ours."""
    build, n_shared, own_routing = BLOCKS[name]
    theirs = build().eval()
    for param in theirs.parameters():
        nn.init.normal_(param, std=0.3)
    cfg = moe.Config(d_model=D, n_experts=I, n_active=A, n_shared=n_shared, d_expert=WIDTH)
    layer = moe.MoE(cfg)
    load(layer, theirs)
    if not own_routing:
        layer.route = lambda x_ND: theirs.gate(x_ND)[:0:-1]
    x_BTD = torch.randn(4, 9, D)
    wrong_BTD = layer(x_BTD) - theirs(x_BTD)
    assert wrong_BTD.abs().max() < TOLERANCE * theirs(x_BTD).abs().max()


# ---- one layer against loops


def make(module: ModuleType = moe, seed: int = 0, **sizes: int) -> nn.Module:
    """One MoE layer in float64, with a router that prefers some and no parameter at zero."""
    torch.manual_seed(seed)
    cfg = dict(d_model=10, n_experts=6, n_active=2, n_shared=1, d_expert=7) | sizes
    layer = module.MoE(module.Config(**cfg)).double()
    for name, param in layer.named_parameters():
        nn.init.normal_(param, std=0.05 if name == "choice_bias" else 0.5)
    return layer


def choice(layer: nn.Module, x_D: Tensor) -> dict[int, Tensor]:
    """The experts of one token and their weights, by the definition, with gradients."""
    exps = [(row_D @ x_D).exp() for row_D in layer.router.weight]
    probs = [e / sum(exps) for e in exps]
    wanted = [p.item() + b.item() for p, b in zip(probs, layer.choice_bias, strict=True)]
    chosen = sorted(range(len(wanted)), key=lambda i: -wanted[i])[: layer.n_active]
    return {i: probs[i] / sum(probs[j] for j in chosen) for i in chosen}


def token_by_token(layer: nn.Module, x_BTD: Tensor) -> Tensor:
    """What the layer must give, (B, T, D): each token alone, one expert after the other."""
    out = []
    for x_D in x_BTD.flatten(0, 1):
        y_D = torch.zeros_like(x_D) if layer.shared is None else layer.shared(x_D)
        for i, weight in choice(layer, x_D).items():
            y_D = y_D + weight * layer.experts[i](x_D)
        out.append(y_D)
    return torch.stack(out).view_as(x_BTD)


def all_experts(layer: nn.Module, x_BTD: Tensor) -> Tensor:
    """The same (B, T, D) with every expert on every token, times a weight that is mostly zero."""
    x_ND = x_BTD.flatten(0, 1)
    weight_NI = torch.stack(
        [
            torch.stack([choice(layer, x_D).get(i, x_D.new_zeros(())) for x_D in x_ND])
            for i in range(len(layer.experts))
        ],
        dim=1,
    )
    y_NDI = torch.stack([expert(x_ND) for expert in layer.experts], dim=-1)
    y_ND = torch.einsum("NDI,NI->ND", y_NDI, weight_NI)
    return (y_ND if layer.shared is None else y_ND + layer.shared(x_ND)).view_as(x_BTD)


LOADS: dict[str, tuple[dict[str, int], tuple[int, int], dict[int, float]]] = {
    # sizes that differ from make's, batch and time, biases that force the choice
    "spread": ({}, (2, 9), {}),
    "one token": ({}, (1, 1), {}),
    "one active": (dict(n_active=1), (2, 9), {}),
    "all active": (dict(n_active=6), (2, 9), {}),
    "all tokens to one": (dict(n_active=1), (2, 9), {3: 9.0}),
    "all tokens to the same two": ({}, (2, 9), {5: 9.0, 0: 8.0}),
    "some get none": (dict(n_active=3), (2, 9), {0: -9.0, 2: -9.0, 5: -9.0}),
    "more experts than tokens": (dict(n_experts=20), (1, 3), {}),
    "no shared expert": (dict(n_shared=0), (2, 9), {}),
    "no shared expert, some get none": (dict(n_shared=0, n_active=1), (2, 9), {4: 9.0}),
    "three shared experts": (dict(n_shared=3), (2, 9), {}),
    "one expert": (dict(n_experts=1, n_active=1), (2, 9), {}),
}


def loaded(name: str, module: ModuleType = moe) -> tuple[nn.Module, Tensor]:
    """The layer of a case, and its input."""
    sizes, (B, T), biases = LOADS[name]
    layer = make(module, **sizes)
    for i, bias in biases.items():
        layer.choice_bias.data[i] = bias
    return layer, torch.randn(B, T, 10, dtype=torch.float64)


@pytest.mark.parametrize("name", LOADS)
def test_dispatch_equals_loops(name: str) -> None:
    """Guards sorting, grouping and adding up, forward and backward, at every kind of load.

    In float64; weights are rounded to float32 on their way, hence 1e-6.
    """
    layer, x_BTD = loaded(name)
    x_BTD.requires_grad_()
    towards_BTD = torch.randn_like(x_BTD)
    names = ["x", *(n for n, p in layer.named_parameters() if p.requires_grad)]
    tensors = [x_BTD, *(p for p in layer.parameters() if p.requires_grad)]
    results = []
    for way in (layer, lambda x: token_by_token(layer, x), lambda x: all_experts(layer, x)):
        y_BTD = way(x_BTD)
        grads = torch.autograd.grad((y_BTD * towards_BTD).sum(), tensors, allow_unused=True)
        results.append([y_BTD, *grads])
    largest = max(g.detach().abs().max() for g in results[1] if g is not None)
    for key, found, *expected in zip(["y", *names], *results, strict=True):
        for truth in expected:  # None: nothing of this loss depends on it
            zero = torch.zeros(())
            wrong = (zero if found is None else found) - (zero if truth is None else truth)
            assert wrong.abs().max() < 1e-6 * largest, key


def test_a_token_does_not_know_its_neighbours() -> None:
    """Guards against capacities and other limits: in any company, in any order, the same result."""
    layer, x_BTD = loaded("spread")
    y_BTD = layer(x_BTD)
    order = torch.randperm(9)
    torch.testing.assert_close(layer(x_BTD[:, order]), y_BTD[:, order], rtol=0, atol=1e-12)
    for b, t in ((0, 0), (1, 8), (1, 3)):
        alone_D = layer(x_BTD[b : b + 1, t : t + 1])[0, 0]
        torch.testing.assert_close(alone_D, y_BTD[b, t], rtol=0, atol=1e-12)


# ---- the router


def check_route(module: ModuleType) -> None:
    """Choice and weights by the definition, with biases that change many choices."""
    layer = make(module, n_experts=8, n_active=3)
    layer.choice_bias.data.normal_(std=0.2)
    x_ND = torch.randn(50, 10, dtype=torch.float64)
    expert_NA, weight_NA = layer.route(x_ND)
    assert expert_NA.shape == weight_NA.shape == (50, 3) and weight_NA.dtype == torch.float64
    for x_D, experts, weights in zip(x_ND, expert_NA.tolist(), weight_NA.tolist(), strict=True):
        expected = {i: w.item() for i, w in choice(layer, x_D).items()}
        found = dict(zip(experts, weights, strict=True))
        assert found == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_route_by_its_definition() -> None:
    """Guards the bias, which only the choice sees, and weights that add up to one."""
    check_route(moe)
    layer = make(n_experts=8, n_active=3)
    x_ND = torch.randn(200, 10, dtype=torch.float64)
    sum_N = layer.route(x_ND)[1].sum(dim=-1)
    torch.testing.assert_close(sum_N, torch.ones_like(sum_N), rtol=0, atol=1e-6)
    layer.choice_bias.zero_()
    before, before_weight = layer.route(x_ND)
    layer.choice_bias.fill_(0.7)  # the same for all: no change at all
    after, after_weight = layer.route(x_ND)
    assert torch.equal(before.sort(dim=-1).values, after.sort(dim=-1).values)
    by_expert = [
        torch.zeros(200, 8, dtype=torch.float64).scatter(1, experts, weights)
        for experts, weights in ((before, before_weight), (after, after_weight))
    ]
    assert torch.equal(*by_expert)
    layer.choice_bias[2] += 0.05
    wanted = (layer.route(x_ND)[0] == 2).any(dim=-1)
    assert wanted.sum() > (before == 2).any(dim=-1).sum()


def test_the_bias_has_no_gradient() -> None:
    """Guards choice_bias: not trained, not decayed, but saved with the model, and zero at first."""
    cfg = moe.Config(vocab_size=50, n_layers=2, d_model=24, d_ff=16, d_expert=8, d_latent=None)
    model = moe.Transformer(cfg)
    assert not model.blocks[1].mlp.choice_bias.any()
    layer = model.blocks[1].mlp
    layer.choice_bias.data.normal_(std=0.01)
    model(torch.randint(50, (2, 9))).square().mean().backward()
    assert layer.choice_bias.grad is None and layer.router.weight.grad.any()
    trained = {p for group in decay_groups(model, 0.1) for p in group["params"]}
    assert layer.choice_bias not in trained and layer.router.weight in trained
    assert "blocks.1.mlp.choice_bias" in model.state_dict()


@torch.no_grad()
@pytest.mark.parametrize("n_same", [6, 3])
def test_ties(n_same: int) -> None:
    """Guards equal probabilities: as many experts as ever, each once, with equal weights."""
    layer = make(n_active=2)
    layer.choice_bias.zero_()
    layer.router.weight.copy_(torch.zeros(6, 10))
    layer.router.weight[n_same:] = -1.0
    x_ND = torch.rand(20, 10, dtype=torch.float64)
    expert_NA, weight_NA = layer.route(x_ND)
    assert (expert_NA < n_same).all() and (expert_NA[:, 0] != expert_NA[:, 1]).all()
    assert (weight_NA == 0.5).all()
    assert layer(x_ND[None]).isfinite().all()


@torch.no_grad()
def check_bfloat16(module: ModuleType) -> None:
    """Probabilities in float32 from logits in bfloat16: right choices, weights rounded once."""
    layer = make(module, n_experts=32, n_active=4).bfloat16()
    layer.choice_bias.zero_()
    x_ND = torch.randn(300, 10, dtype=torch.bfloat16)
    expert_NA, weight_NA = layer.route(x_ND)
    assert weight_NA.dtype == torch.bfloat16
    logit_NI = layer.router(x_ND).double()
    best_NA = logit_NI.topk(4, dim=-1).values
    # of two experts with equal logits, either may be chosen
    assert torch.equal(logit_NI.gather(1, expert_NA).sort(-1, descending=True).values, best_NA)
    exact_NA = logit_NI.gather(1, expert_NA).softmax(dim=-1)
    assert ((weight_NA.double() - exact_NA).abs() / exact_NA).max() < 1.01 * 2**-8
    y_BTD = layer(x_ND[None])
    assert y_BTD.dtype == torch.bfloat16 and y_BTD.isfinite().all()


def test_router_in_bfloat16() -> None:
    """Guards the softmax's type in a model of 16 bits."""
    check_bfloat16(moe)


def test_training_in_mixed_precision() -> None:
    """Guards what training does on CUDA: float32 weights under autocast to bfloat16."""
    cfg = moe.Config(vocab_size=50, n_layers=2, d_model=24, d_ff=16, d_expert=8, d_latent=None)
    model, tokens_BT = moe.Transformer(cfg), torch.randint(50, (2, 9))
    full = token_losses(model, tokens_BT, tokens_BT, bf16=False)
    half = token_losses(model, tokens_BT, tokens_BT, bf16=True)
    half.backward()
    assert half.item() == pytest.approx(full.item(), rel=0.02)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ---- what it costs


def check_cost(module: ModuleType) -> None:
    """Experts see the rows that were sent to them, N x A in all; those without rows do not run."""
    for name in LOADS:
        layer, x_BTD = loaded(name, module)
        rows: dict[object, list[int]] = {}
        for key, expert in [*enumerate(layer.experts), ("shared", layer.shared)]:
            if expert is not None:
                expert.register_forward_pre_hook(
                    lambda _, args, key=key, rows=rows: rows.setdefault(key, []).append(
                        len(args[0])
                    )
                )
        layer(x_BTD)
        N = x_BTD.shape[0] * x_BTD.shape[1]
        expert_NA, _ = layer.route(x_BTD.flatten(0, 1))
        expected = {i: [n] for i, n in enumerate(expert_NA.flatten().bincount().tolist()) if n}
        assert sum(n for [n] in expected.values()) == N * layer.n_active
        assert rows == expected | ({} if layer.shared is None else {"shared": [N]}), name


@torch.no_grad()
def test_each_expert_runs_once_on_its_own_rows() -> None:
    """Guards the point of it all: idle experts cost nothing."""
    check_cost(moe)
    layer, x_BTD = loaded("all tokens to one")
    for i, expert in enumerate(layer.experts):
        if i != 3:
            expert.register_forward_hook(lambda *_: pytest.fail("an idle expert ran"))
    layer(x_BTD)


@torch.no_grad()
@pytest.mark.parametrize("n_experts", [4, 16, 64])
@pytest.mark.parametrize("n_active", [1, 2, 4])
def test_multiplications(n_experts: int, n_active: int) -> None:
    """Guards the cost: it grows with the active experts; of idle ones only the router knows."""
    N, D, d_expert, n_shared = 12, 10, 7, 2
    layer = make(n_experts=n_experts, n_active=n_active, n_shared=n_shared)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(3, 4, D, dtype=torch.float64))
    per_token = 3 * D * d_expert * (n_active + n_shared) + D * n_experts
    assert counter.get_total_flops() == 2 * N * per_token


def test_gradients_reach_the_chosen_alone() -> None:
    """Guards sparse training: experts that a token did not go to have no gradient at all.

    Nor has the router a gradient for them: weights that add up to one depend on the chosen alone.
    """
    layer = make(n_active=2, n_shared=0)
    x_11D = torch.randn(1, 1, 10, dtype=torch.float64)
    chosen = layer.route(x_11D[0])[0][0].tolist()
    layer(x_11D).square().sum().backward()
    for i, expert in enumerate(layer.experts):
        for param in expert.parameters():
            assert param.grad.any() if i in chosen else param.grad is None
    size_I = layer.router.weight.grad.abs().amax(dim=-1)
    assert min(size_I[chosen]) > 1e-3
    idle = [i for i in range(6) if i not in chosen]
    assert max(size_I[idle]) < 1e-6 * max(size_I)


def test_with_one_active_expert_the_router_learns_nothing_from_the_loss() -> None:
    """Guards a known price of weights that add up to one: a single one is 1, whatever it was."""
    layer = make(n_active=1)
    x_BTD = torch.randn(2, 9, 10, dtype=torch.float64)
    assert (layer.route(x_BTD.flatten(0, 1))[1] == 1).all()
    layer(x_BTD).square().sum().backward()
    largest = max(p.grad.abs().max() for p in layer.experts.parameters() if p.grad is not None)
    assert layer.router.weight.grad.abs().max() < 1e-6 * largest


# ---- mistakes

SOFTMAX = "self.router(x_ND).softmax(dim=-1, dtype=torch.float32)"
WANTED = "(prob_NI + self.choice_bias).topk(self.n_active, dim=-1).indices"
GATHER = "weight_NA = prob_NI.gather(1, expert_NA)"
SHARES = "(weight_NA / weight_NA.sum(dim=-1, keepdim=True))"
ROWS = "x_ND[token_M].split(n_tokens)"
WEIGHTED = "y_MD = y_MD * weight_NA.flatten()[order_M, None]"
SHARED = "torch.zeros_like(x_ND) if self.shared is None else self.shared(x_ND)"
ADDED = "y_ND.index_add(0, token_M, y_MD.type_as(y_ND))"
DENSE = "layer < cfg.n_dense_layers"
MUTANTS = {  # those of one line show in both references, the others in the one they name
    "sigmoid for softmax": f"{SOFTMAX} -> self.router(x_ND).sigmoid()",
    "softmax over the tokens": f"{SOFTMAX} -> self.router(x_ND).softmax(dim=0)",
    "logits for probabilities": f"{SOFTMAX} -> self.router(x_ND)",
    "unlikeliest experts": f"{WANTED} -> (-prob_NI).topk(self.n_active, dim=-1).indices",
    "second expert and on": (
        "Mixtral",
        f"{WANTED} -> prob_NI.topk(self.n_active + 1, dim=-1).indices[:, 1:]",
    ),
    "the same first expert for all": f"{WANTED} -> {WANTED}; expert_NA[:, 0] = 0",
    "all tokens as the first": f"{WANTED} -> {WANTED}[:1].expand(len(x_ND), -1)",
    "weights as they are": f"{SHARES} -> weight_NA",
    "equal weights": f"{GATHER} -> weight_NA = torch.ones_like(expert_NA).float()",
    "weights in another order": f"{GATHER} -> {GATHER}.flip(-1)",
    "weights of the first experts": f"{GATHER} -> weight_NA = prob_NI[:, : self.n_active]",
    "weights shared out over the tokens": (
        f"{SHARES} -> (weight_NA / weight_NA.sum(dim=0, keepdim=True))"
    ),
    "softmax of the chosen probabilities": f"{SHARES} -> weight_NA.softmax(dim=-1)",
    "last expert dropped": f"{SHARES} -> (weight_NA / weight_NA.sum(-1, True)).index_fill("
    "1, torch.tensor([self.n_active - 1]), 0.0)",
    "bias forgotten": ("DeepSeek", f"{WANTED} -> prob_NI.topk(self.n_active, dim=-1).indices"),
    "bias lowers": ("DeepSeek", "(prob_NI + self.choice_bias) -> (prob_NI - self.choice_bias)"),
    "bias added to the logits": (
        "DeepSeek",
        "(prob_NI + self.choice_bias) -> (self.router(x_ND) + self.choice_bias)",
    ),
    "bias in the weights": (
        "DeepSeek",
        f"{GATHER} -> weight_NA = (prob_NI + self.choice_bias).gather(1, expert_NA)",
    ),
    "rows of other tokens": "order_M // self.n_active -> order_M % len(x_ND)",
    "rows in the tokens' order": (
        f"{ROWS} -> x_ND.repeat_interleave(self.n_active, 0).split(n_tokens)"
    ),
    "not sorted": (
        "expert_NA.flatten().sort(stable=True) -> "
        "expert_NA.flatten(), torch.arange(expert_NA.numel())"
    ),
    "sorted downwards": "sort(stable=True) -> sort(stable=True, descending=True)",
    "weights not sorted": f"{WEIGHTED} -> y_MD = y_MD * weight_NA.flatten()[:, None]",
    "not weighted": f"{WEIGHTED} -> pass",
    "weighted twice": f"{WEIGHTED} -> {WEIGHTED}.square()",
    "weighted on the way in": (
        f"{WEIGHTED} -> pass",
        f"{ROWS} -> (x_ND[token_M] * weight_NA.flatten()[order_M, None]).split(n_tokens)",
    ),
    "experts from the last": "zip(self.experts, -> zip(list(self.experts)[::-1],",
    "one expert for all": "zip(self.experts, -> zip([self.experts[0]] * len(self.experts),",
    "one expert under all names": (
        "nn.ModuleList(MLP(cfg, cfg.d_expert) for _ in range(cfg.n_experts)) -> "
        "nn.ModuleList([MLP(cfg, cfg.d_expert)] * cfg.n_experts)"
    ),
    "last expert overwrites": f"{ADDED} -> y_ND.index_copy(0, token_M, y_MD)",
    "added in the experts' order": f"{ADDED} -> y_ND.index_add(0, token_M.sort().values, y_MD)",
    "tokens of the batch mixed up": "x_ND = x_BTD.flatten(0, 1) -> "
    "x_ND = x_BTD.transpose(0, 1).flatten(0, 1)",
    "stream added, too": ("Mixtral", f"{SHARED} -> x_ND"),
    "shared experts forgotten": ("DeepSeek", f"{SHARED} -> torch.zeros_like(x_ND)"),
    "shared experts averaged": (
        "DeepSeek",
        f"{SHARED} -> self.shared(x_ND) / 2",
    ),
    "shared experts see what others give": (
        "DeepSeek",
        f"{SHARED} -> self.shared(torch.zeros_like(x_ND).index_add(0, token_M, y_MD))",
    ),
    "one shared expert alone": (
        "DeepSeek",
        "self.shared(x_ND) -> "
        "F.linear(F.silu(x_ND @ self.shared.gate_proj.weight[:22].T)"
        " * (x_ND @ self.shared.up_proj.weight[:22].T), self.shared.down_proj.weight[:, :22])",
    ),
}


@pytest.fixture(scope="module")
def references() -> dict[str, PreTrainedModel]:
    """The models that spoiled ones are compared with; unspoiled, ours equal them."""
    made = {name: reference_of(CASES[name], scale=2.0) for name in ("Mixtral", "DeepSeek")}
    for hf in made.values():
        assert next(errors(ours(hf), hf))[1] < TOLERANCE
    return made


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str, references: dict[str, PreTrainedModel]) -> None:
    """Guards the comparison with transformers: with a mistake in the source it must fail."""
    mistake = MUTANTS[name]
    changes = [mistake] if isinstance(mistake, str) else list(mistake)
    cases = [changes.pop(0)] if changes[0] in references else list(references)
    for case in cases:
        assert_noticed(ours(references[case], mutant(moe, *changes)), references[case])


LAYERS = {
    "one dense layer more": f"{DENSE} -> layer <= cfg.n_dense_layers",
    "one dense layer less": f"{DENSE} -> layer < cfg.n_dense_layers - 1",
    "dense layers last": f"{DENSE} -> cfg.n_layers - 1 - layer < cfg.n_dense_layers",
    "every other layer dense": f"{DENSE} -> layer % 2 == 1",
    "shared experts as wide as the MLP": "cfg.n_shared * cfg.d_expert -> cfg.d_ff",
    "one shared expert": "cfg.n_shared * cfg.d_expert -> cfg.d_expert",
    "experts as wide as the MLP": "MLP(cfg, cfg.d_expert) for -> MLP(cfg, cfg.d_ff) for",
}


@pytest.mark.parametrize("name", LAYERS)
def test_mistakes_of_shape_are_noticed(name: str, references: dict[str, PreTrainedModel]) -> None:
    """Guards which layers have experts, and widths: the reference's weights must fit."""
    with pytest.raises(RuntimeError, match="Error.* in loading state_dict"):
        ours(references["DeepSeek"], mutant(moe, LAYERS[name]))


def test_mistakes_that_logits_do_not_show(references: dict[str, PreTrainedModel]) -> None:
    """Guards check_cost and check_bfloat16: with these mistakes all logits are right."""
    checks = {
        "for expert, part in parts if len(part) -> for expert, part in parts": check_cost,
        ", dtype=torch.float32) -> )": check_bfloat16,
    }
    for change, check in checks.items():
        spoiled = mutant(moe, change)
        for hf in references.values():
            assert next(errors(ours(hf, spoiled), hf))[1] < TOLERANCE
        with pytest.raises(AssertionError):
            check(spoiled)
    with pytest.raises(AssertionError):
        check_route(mutant(moe, MUTANTS["bias in the weights"][1]))


# ---- generation, the first weights and the demo


@pytest.fixture(scope="module", params=["Mixtral with a window", "DeepSeek"])
def lively(request: pytest.FixtureRequest) -> tuple[nn.Module, PreTrainedModel]:
    """Ours and transformers', so large that greedy texts vary."""
    hf = reference_of(CASES[request.param], seed=1, scale=4.0)
    return ours(hf), hf


def test_generate_equals_transformers(lively: tuple[nn.Module, PreTrainedModel]) -> None:
    """Guards greedy generation, and that the cache is used: one token a step after the prompt."""
    equals_generate(moe, *lively)


def test_generate_padded_batch(lively: tuple[nn.Module, PreTrainedModel]) -> None:
    """Guards prompts of unequal length in one batch."""
    same_alone_and_padded(moe, lively[0])


def test_generate_goes_on(lively: tuple[nn.Module, PreTrainedModel]) -> None:
    """Guards a cache that is handed from one call to the next."""
    goes_on(moe, lively[0])


def test_initial_weights() -> None:
    """Guards init_weights on routers and experts: measured spread of every matrix."""
    cfg = moe.Config(
        vocab_size=300, n_layers=8, d_model=64, n_heads=8, head_dim=16, d_latent=None, d_ff=170,
        d_expert=40,
    )  # fmt: skip
    for name, param in moe.Transformer(cfg).named_parameters():
        if name.endswith("choice_bias"):
            assert not param.any(), name
        elif "norm" not in name:
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * 8) if into_stream else 0.02
            error = 1 / math.sqrt(2 * param.numel())  # standard error of a measured std, relative
            assert float(param.detach().std()) == pytest.approx(std, rel=5 * error), name


@dataclasses.dataclass(frozen=True)
class Small(moe.Config):
    """A demo that takes no time."""

    vocab_size: int = 256
    n_layers: int = 3


def test_demo_counts_what_works_on_a_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the demo's numbers: a model without the idle experts is as large as it says."""
    monkeypatch.setattr(sys, "argv", ["moe.py", "--n-new", "2"])
    monkeypatch.setattr(moe, "Config", Small)
    moe.main()
    out = capsys.readouterr().out
    active = moe.Transformer(Small(n_experts=2, n_active=2))
    idle_rows = 2 * 6 * (768 + 1)  # routers and biases stay whole
    printed = int(re.findall(r"([\d,]+) of them work", out)[0].replace(",", ""))
    assert printed == ch05.count(active) + idle_rows
    whole = int(re.findall(r"([\d,]+) parameters", out)[0].replace(",", ""))
    assert whole - printed == 2 * 6 * 3 * 768 * 512
    counts = [int(n) for n in re.findall(r"by expert: \[(.*)\]", out)[0].split(", ")]
    assert len(counts) == 8 and sum(counts) == 2 * 1000
