"""Experts by what is cheapest: the family's outputs, from fewer calls, and all of it undone."""

import copy
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from ch08_full_models import deepseek_v3, experts, experts_demo, llama4, mixtral, qwen3
from ch08_full_models.checkpoint import load
from ch08_full_models.decode import compiled_steps, one_function, plain_decode
from ch08_full_models.experts import FastMoE, fast_experts, plain_experts, step_experts
from ch08_full_models.speed import (
    Int8Matrix,
    plain_products,
    quantize,
    vector_products,
    weight_bytes,
)
from tests.parity import reference
from tests.test_ch08_decode import random_model, step_by_step
from tests.test_ch08_offload import CONFIGS, logits, tight

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"d_model": 64, "d_expert": 32, "n_experts": 12, "n_active": 3}
GROUPS = {"n_groups": 4, "n_active_groups": 2, "n_shared": 2, "route_scale": 2.5}
LAYERS: dict[str, tuple[ModuleType, dict]] = {
    "mixtral": (mixtral, SIZES),
    "qwen3, renormalised": (qwen3, SIZES | {"renormalise": True}),
    "qwen2, weighed shared expert": (qwen3, SIZES | {"d_shared": 96}),
    "llama4, one": (llama4, SIZES | {"n_active": 1}),
    "llama4, three": (llama4, SIZES),
    "deepseek v2": (deepseek_v3, SIZES | GROUPS | {"router": "softmax"}),
    "deepseek v3": (deepseek_v3, SIZES | GROUPS | {"router": "sigmoid"}),
    "deepseek v3, none shared": (deepseek_v3, SIZES | GROUPS | {"n_shared": 0}),
}
SHAPES = ((1, 1), (1, 2), (2, 1), (1, 5), (3, 4), (1, 64))  # sequences, tokens
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def layer_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A layer of experts with weights so large that the experts' outputs matter."""
    torch.manual_seed(0)
    family, sizes = LAYERS[name]
    layer = family.MoE(family.Config(**sizes)).eval()
    for param in layer.parameters():
        param.data.normal_(std=0.2)
    return layer.to(dtype)


def fast_copy(layer: nn.Module) -> nn.Module:
    return fast_experts(copy.deepcopy(layer))


@torch.no_grad()
def by_hand(layer: nn.Module, x_BTD: Tensor) -> Tensor:
    """Token by token and expert by expert in float64, (N, D); the choice is the layer's own."""
    x_ND = x_BTD.flatten(0, 1)
    expert_NA, weight_NA = layer.route(x_ND)
    layer, x_ND = copy.deepcopy(layer).double(), x_ND.double()
    y_ND = torch.zeros_like(x_ND)
    if getattr(layer, "shared", None) is not None:
        y_ND += layer.shared(x_ND)
    for n, x_D in enumerate(x_ND):
        for i, weight in zip(expert_NA[n].tolist(), weight_NA[n].tolist(), strict=True):
            if isinstance(layer, llama4.MoE):
                y_ND[n] += layer.experts[i](weight * x_D[None])[0]
            else:
                y_ND[n] += weight * layer.experts[i](x_D[None])[0]
    return y_ND


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in parts of the largest number."""
    found, expected = found.flatten().double(), expected.flatten().double()
    return float((found - expected).abs().max() / expected.abs().max())


def calls(layer: nn.Module) -> list[tuple[int, int]]:
    """A list that grows with each call of an expert: which one, and for how many tokens."""
    seen: list[tuple[int, int]] = []
    for i, expert in enumerate(layer.experts):
        expert.register_forward_pre_hook(
            lambda _, inputs, i=i: seen.append((i, len(inputs[0])))  # None: nothing is replaced
        )
    return seen


# The same outputs


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_outputs_are_the_family_s_and_those_by_hand(name: str, shape: tuple[int, int]) -> None:
    layer = layer_of(name)
    x_BTD = torch.randn(*shape, layer.router.in_features)
    y_BTD = fast_copy(layer)(x_BTD)
    assert y_BTD.shape == x_BTD.shape
    assert error(y_BTD, layer(x_BTD)) < 2e-6
    assert error(y_BTD, by_hand(layer, x_BTD)) < 2e-6


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_bfloat16_is_as_near_to_exact_as_the_family_s(name: str, shape: tuple[int, int]) -> None:
    layer = layer_of(name, torch.bfloat16)
    x_BTD = torch.randn(*shape, layer.router.in_features, dtype=torch.bfloat16)
    expected_ND = by_hand(layer, x_BTD)
    y_BTD = vector_products(fast_copy(layer))(x_BTD)
    assert y_BTD.dtype == torch.bfloat16
    assert error(y_BTD, expected_ND) < max(0.01, 1.5 * error(layer(x_BTD), expected_ND))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("n_tokens", [2, 7, 8, 40])  # on both sides of FEW_FLOAT32
@torch.no_grad()
def test_tokens_that_share_their_experts(name: str, n_tokens: int) -> None:
    """All tokens go to the same experts, which see them together; the others see none."""
    layer = layer_of(name)
    x_BTD = torch.randn(1, 1, layer.router.in_features).repeat(1, n_tokens, 1)
    fast = fast_copy(layer)
    seen = calls(fast)
    assert error(fast(x_BTD), by_hand(layer, x_BTD)) < 2e-6
    chosen = layer.route(x_BTD[0])[0][0].tolist()
    assert sorted(seen) == [(i, n_tokens) for i in sorted(chosen)]


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_an_expert_far_from_all_tokens_has_no_part(name: str) -> None:
    """Weights that are not numbers, in the experts that no token chose, change nothing."""
    layer = layer_of(name)
    x_BTD = torch.randn(1, 2, layer.router.in_features)
    chosen = set(layer.route(x_BTD[0])[0].flatten().tolist())
    others = [expert for i, expert in enumerate(layer.experts) if i not in chosen]
    assert others
    expected = layer(x_BTD)
    for expert in others:
        expert.down_proj.weight.fill_(torch.nan)
    fast = fast_copy(layer)
    assert error(fast(x_BTD), expected) < 2e-6
    assert error(fast(x_BTD[:, :1]), expected[:, :1]) < 1e-5  # of a token alone


# What is called


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_one_token_calls_its_experts_and_sorts_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(name)
    fast = fast_copy(layer)
    seen = calls(fast)
    x_BTD = torch.randn(1, 1, layer.router.in_features)
    expected = layer.route(x_BTD[0])[0][0].tolist()
    for word in ("sort", "bincount", "unique_consecutive", "index_add", "index_add_"):
        monkeypatch.setattr(Tensor, word, lambda *_, **__: pytest.fail("for one token"))
    fast(x_BTD)
    assert seen == [(i, 1) for i in expected]


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_many_tokens_call_each_chosen_expert_once(name: str) -> None:
    layer = layer_of(name)
    fast = fast_copy(layer)
    seen = calls(fast)
    x_BTD = torch.randn(2, 3, layer.router.in_features)
    expert_M = layer.route(x_BTD.flatten(0, 1))[0].flatten().tolist()
    fast(x_BTD)
    assert seen == [(i, expert_M.count(i)) for i in sorted(set(expert_M))]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@torch.no_grad()
def test_one_token_by_mv_and_a_prompt_with_the_weight_on_the_left(
    dtype: torch.dtype, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three products by torch.mv for each expert; of a prompt, none by F.linear but the router.

    Where torch.mv is slow in bfloat16, one token's are by F.linear, and a prompt's.
    """
    monkeypatch.setattr(experts, "mv_is_faster", lambda: fast)
    layer = fast_copy(layer_of("mixtral", dtype))
    made = []
    mv, linear = torch.mv, nn.functional.linear
    monkeypatch.setattr(experts, "vector_product", lambda w, x: made.append("mv") or mv(w, x))
    monkeypatch.setattr(
        nn.functional, "linear", lambda *args: made.append("linear") or linear(*args)
    )
    layer(torch.randn(1, 1, 64, dtype=dtype))
    by_mv = fast or dtype == torch.float32
    assert made == ["linear"] + ["mv" if by_mv else "linear"] * 9
    made.clear()
    layer(torch.randn(1, 1, 64, dtype=dtype).repeat(1, 20, 1))
    assert made == ["linear"] * (1 if fast else 10)
    made.clear()
    layer(torch.randn(1, 1, 64, dtype=dtype).repeat(1, 3, 1))
    assert made == ["linear"] * (1 if fast and dtype == torch.bfloat16 else 10)


def test_training_is_the_family_s(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("add_to_one", "add_to_many"):
        monkeypatch.setattr(FastMoE, word, lambda *_: pytest.fail("with gradients"))
    monkeypatch.setattr(experts, "vector_product", lambda *_: pytest.fail("it was used"))
    for name in LAYERS:
        layer = layer_of(name)
        fast = fast_copy(layer)
        for n_tokens in (1, 5):
            x_BTD = torch.randn(1, n_tokens, 64)
            assert torch.equal(fast(x_BTD), layer(x_BTD))
            for each in (layer, fast):
                each.zero_grad()
                each(x_BTD).square().sum().backward()
            pairs = zip(fast.parameters(), layer.parameters(), strict=True)
            grads = [(a.grad, b.grad) for a, b in pairs if b.grad is not None]
            assert len(grads) > 3
            assert all(torch.equal(a, b) for a, b in grads)


# In place, and undone


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    sizes = {"n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "d_ff": 96}
    sizes |= SIZES | {"vocab_size": 97, "sparse": (False, True, True), "d_shared": 64}
    return random_model(qwen3, sizes, dtype)


def test_nothing_is_copied_and_all_is_undone() -> None:
    model = small_model()
    before = copy.deepcopy(model)
    places = {p.data_ptr() for p in model.parameters()}
    assert fast_experts(model) is model
    assert sum(isinstance(m, FastMoE) for m in model.modules()) == 2
    assert sum(isinstance(m, experts.FastExpert) for m in model.modules()) == 2 * 12
    fast_experts(model)  # a second time, nothing is left to do
    assert {p.data_ptr() for p in model.parameters()} == places
    assert model.state_dict().keys() == before.state_dict().keys()
    found, expected = logits(model), logits(before)
    assert error(found, expected) < 1e-5
    assert plain_experts(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_every_family_is_undone(name: str) -> None:
    layer = layer_of(name)
    before = [type(m) for m in layer.modules()]
    changed = [type(m) for m in fast_experts(layer).modules()]
    n_changed = sum(a is not b for a, b in zip(before, changed, strict=True))
    assert n_changed == 1 + SIZES["n_experts"]
    assert [type(m) for m in plain_experts(layer).modules()] == before


def test_either_order_with_vector_products() -> None:
    expected = logits(small_model(torch.bfloat16)).float()
    for steps in ((vector_products, fast_experts), (fast_experts, vector_products)):
        model = small_model(torch.bfloat16)
        for step in steps:
            step(model)
        assert error(logits(model), expected) < 0.05
        plain_products(plain_experts(model))
        assert torch.equal(logits(model).float(), expected)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("order", [0, 1])
def test_quantized_experts_multiply_in_their_own_way(
    kind: str, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(quantize(small_model(), kind))
    steps = (lambda m: quantize(m, kind), fast_experts)
    model = small_model()
    for step in (steps, steps[::-1])[order]:
        step(model)
    assert not any(isinstance(e.up_proj, nn.Linear) for e in model.blocks[1].mlp.experts)
    assert error(logits(model), expected) < 1e-5
    if kind == "int8":  # by the product of integers, for one token
        made = []
        multiply = Int8Matrix.multiply
        monkeypatch.setattr(
            Int8Matrix, "multiply", lambda self, x: made.append((self, len(x))) or multiply(self, x)
        )
        layer = model.blocks[1].mlp
        with torch.no_grad():
            layer(torch.randn(1, 1, 64))
        matrices = {m for m in layer.experts.modules() if isinstance(m, Int8Matrix)}
        assert [n for m, n in made if m in matrices] == [1] * 9  # three experts' three


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v2", "llama4_text"])
def test_load_takes_the_step(kind: str, dtype: str, tmp_path: Path) -> None:
    """On a CPU a loaded model has it, and without it says the same."""
    reference(CONFIGS[kind]).save_pretrained(tmp_path)
    model, _ = load(tmp_path, dtype=dtype, device="cpu")
    moes = [module for module in model.modules() if hasattr(module, "experts")]
    assert moes and all(isinstance(module, FastMoE) for module in moes)
    found = logits(model)
    assert error(found, logits(plain_experts(model))) < (1e-5 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v2", "llama4_text"])
def test_experts_that_wait_on_disk(kind: str, tmp_path: Path) -> None:
    """They are read when they are called, as with the family's forward."""
    reference(CONFIGS[kind]).save_pretrained(tmp_path)
    whole, _ = load(tmp_path, dtype="float32", device="cpu")
    model, _ = load(tmp_path, dtype="float32", device="cpu", memory=tight(whole, 3))
    fast_experts(model)
    assert any(isinstance(m, FastMoE) for m in model.modules())
    n_reads = model.disk.n_reads
    assert error(logits(model), logits(plain_experts(whole))) < 1e-5
    assert model.disk.n_reads > n_reads


# A compiled step

SMALL = {"vocab_size": 96, "n_layers": 2, "n_heads": 4} | SIZES
GROUPED = SMALL | {"n_kv_heads": 2, "head_dim": 32}
LATENT = SMALL | {
    "d_ff": 96,
    "head_dim": 32,
    "d_rope": 16,
    "d_value": 32,
    "d_latent": 32,
    "d_q_latent": 48,
}
MODELS: dict[str, tuple[ModuleType, dict]] = {
    "mixtral": (mixtral, GROUPED),
    "qwen3": (qwen3, GROUPED | {"d_ff": 96, "sparse": (False, True)}),
    "qwen2, weighed shared expert": (
        qwen3,
        GROUPED | {"d_ff": 96, "sparse": (True,), "d_shared": 96},
    ),
    "llama4": (llama4, GROUPED | {"d_ff": 96, "sparse": (True,), "chunks": (6, None)}),
    "deepseek v2": (deepseek_v3, LATENT | GROUPS | {"router": "softmax", "n_dense_layers": 1}),
    "deepseek v3": (deepseek_v3, LATENT | GROUPS | {"router": "sigmoid", "n_dense_layers": 0}),
}


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_step_keeps_the_logits(name: str, kind: str | None) -> None:
    """With the compiler's products and torch's; and all of it undone but for where weights lie."""
    model = random_model(*MODELS[name])
    model = fast_experts(quantize(model, kind) if kind else model)
    tokens_BT = torch.randint(0, 96, (1, 14))
    right, classes = step_by_step(model, tokens_BT), [type(m) for m in model.modules()]
    n_bytes = weight_bytes(model)
    for own_products in (False, True):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        compiled_steps(model, "eager", own_products)
        assert any(isinstance(m, experts.StepMoE) for m in model.modules())
        found = step_by_step(model, tokens_BT)
        assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
        assert error(found, right) < 1e-5
        plain_decode(model)
        assert [type(m) for m in model.modules()] == classes
    assert error(step_by_step(model, tokens_BT), right) < 1e-5
    assert weight_bytes(model) == n_bytes


def test_a_compiled_step_reads_the_chosen_experts_alone() -> None:
    """What the others hold does not matter, be it no number: and Python chooses nothing."""
    layer = step_experts(layer_of("qwen3, renormalised"))
    x_BTD, graphs = torch.randn(1, 1, 64), []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(graph)
        return graph.forward

    step = one_function(lambda layer, x_BTD: layer(x_BTD), keep)
    with torch.no_grad():
        right = step(layer, x_BTD)
        chosen = layer.route(x_BTD[0])[0][0].tolist()
        for i, expert in enumerate(layer.experts):
            if i not in chosen:
                expert.up_proj.weight.fill_(torch.nan)  # seen by the compiled step: it is a view
        assert torch.equal(step(layer, x_BTD), right)
        layer.experts[chosen[0]].up_proj.weight.fill_(torch.nan)
        assert step(layer, x_BTD).isnan().all()
    assert len(graphs) == 1 and len(chosen) == SIZES["n_active"]


@pytest.mark.parametrize("kind", [None, "int8"])
def test_experts_lie_together_once(kind: str | None) -> None:
    """Each matrix of a layer in one tensor, the experts' own views of it; nothing moves again."""
    layer = layer_of("mixtral")
    layer = quantize(layer, kind) if kind else layer

    def places() -> list[int]:
        return [t.data_ptr() for t in layer.experts.state_dict().values()]

    before = [t.clone() for t in layer.state_dict().values()]
    step_experts(layer)
    assert all(map(torch.equal, before, layer.state_dict().values()))
    first = places()
    up = layer.together[1].weight_ERC
    ups = [e.up_proj.int_ND if kind else e.up_proj.weight for e in layer.experts]
    assert up.shape == (12, 32, 64) and all(map(torch.equal, up, ups))
    assert [u.data_ptr() for u in ups] == [up[i].data_ptr() for i in range(12)]
    assert all(w.requires_grad for w in layer.experts.parameters())
    step_experts(plain_decode(layer))
    assert places() == first


def test_experts_of_four_bits_are_not_compiled() -> None:
    with pytest.raises(ValueError, match="4 bits"):
        compiled_steps(quantize(random_model(*MODELS["mixtral"], torch.bfloat16), "int4"), "eager")


@pytest.mark.parametrize("dtype", DTYPES)
def test_generated_code_keeps_the_logits(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real compiler."""
    # torch's compiler imports setuptools, which objects if a test before has imported distutils.
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")
    model, tokens_BT = random_model(*MODELS["qwen3"], DTYPES[dtype]), torch.randint(0, 96, (1, 10))
    right = step_by_step(model, tokens_BT)
    torch.compiler.reset()
    found = step_by_step(compiled_steps(model, own_products=True), tokens_BT)
    assert error(found, right) < (1e-5 if dtype == "float32" else 0.05)


# The measurement


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["experts_demo", *arguments])
    experts_demo.main()


def test_smoke_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards that the script works, and a line for each target."""
    run(monkeypatch, "--smoke", "--out", str(tmp_path / "out.json"))
    record = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    said = [line for line in capsys.readouterr().out.splitlines() if line.endswith("reached")]
    assert len(said) == len(record["targets"]) == 10
    for target, line in zip(record["targets"], said, strict=True):
        least = target.get("at_least", 0) <= target["ratio"] <= target.get("at_most", 1e9)
        assert target["reached"] == least == ("not reached" not in line)


def test_layers_lie_in_one_memory_and_the_loop_is_right() -> None:
    """Guards the comparison: the same weights however they are cut, none left over, none twice."""
    plan = experts_demo.SMOKE
    big_RD = experts_demo.big_matrix(plan, torch.float32)
    for n_experts in plan.experts:
        layers = experts_demo.make_layers(plan, big_RD, n_experts)
        weights = [p for layer in layers for p in layer.experts.parameters()]
        assert sum(w.nbytes for w in weights) == big_RD.nbytes
        assert len({w.data_ptr() for w in weights}) == len(weights) == 3 * n_experts * len(layers)
        assert {w.untyped_storage().data_ptr() for w in weights} == {big_RD.data_ptr()}
        x_BTD = torch.randn(2, 3, plan.d_model)
        with torch.no_grad():
            assert error(experts_demo.loop_all(layers[0], x_BTD), by_hand(layers[0], x_BTD)) < 1e-5


def test_committed_record() -> None:
    """Guards that experts_demo.json is no smoke run and was made with the sizes that stand here."""
    path = Path(experts_demo.__file__).with_suffix(".json")
    record = json.loads(path.read_text(encoding="utf-8"))
    plan = experts_demo.Plan()
    assert record["settings"]["experts"] == list(plan.experts)
    assert record["settings"]["rounds"] == plan.rounds >= 5
    assert record["environment"]["command"].endswith("ch08_full_models.experts_demo")
    assert [result["dtype"] for result in record["results"]] == list(plan.dtypes)
    assert all(result["bytes_of_all_layers"] > 1.5e9 for result in record["results"])
    assert record["targets"] == [
        target for result in record["results"] for target in experts_demo.targets(plan, result)
    ]
