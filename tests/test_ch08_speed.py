"""Faster products and weights as integers: what they keep, what they cost, what they save."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from ch08_full_models import deepseek_v3, gemma3, llama3, qwen3, speed
from ch08_full_models.checkpoint import load
from ch08_full_models.speed import plain_products, quantize, vector_products, weight_bytes
from tests.test_ch08_checkpoint import tiny  # noqa: F401  a fixture: a folder as on the Hub

SMALL = {"vocab_size": 211, "n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 2}


def small_model(family, dtype=torch.float32):
    torch.manual_seed(0)
    cfg = family.Config(**SMALL, head_dim=32, d_ff=96)
    model = family.Transformer(cfg).eval()
    for param in model.parameters():
        if param.ndim > 1:
            param.data.normal_(std=0.2)
    return model.to(dtype)


def matrices(model):
    """Name -> weight, of every Linear."""
    found = model.named_modules()
    return {n: m.weight.detach().clone() for n, m in found if isinstance(m, nn.Linear)}


@torch.no_grad()
def logits_step_by_step(model, tokens_BT, n_first=9):
    """Logits of a prompt and then one token after the other, (B, T, V)."""
    cache = model.new_cache()
    sizes = (n_first, *(1,) * (tokens_BT.shape[1] - n_first))
    return torch.cat([model(part, cache) for part in tokens_BT.split(sizes, 1)], dim=1)


# One token is a vector


@pytest.mark.parametrize("family", [llama3, gemma3, qwen3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vector_products_keep_the_logits(family, dtype, monkeypatch):
    """One row of a batch takes torch.mv, also for the tied output; results differ by rounding."""
    model, tokens_BT = small_model(family, dtype), torch.randint(0, 211, (1, 14))
    before = logits_step_by_step(model, tokens_BT)
    n_parameters = sum(1 for _ in model.parameters())
    storage = {p.data_ptr() for p in model.parameters()}
    assert vector_products(model) is model
    assert {p.data_ptr() for p in model.parameters()} == storage  # nothing is copied
    assert sum(1 for _ in model.parameters()) == n_parameters
    calls = []
    mv = torch.mv
    monkeypatch.setattr(torch, "mv", lambda w, x: calls.append(tuple(w.shape)) or mv(w, x))
    after = logits_step_by_step(model, tokens_BT)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert (after - before).abs().max() <= tolerance * before.abs().max()
    assert len(calls) == 5 * (14 + 1)  # for each token alone, the layers' products and the head's
    assert calls.count((211, 64)) == 5


def test_plain_products_take_everything_back():
    model = small_model(llama3)
    before = copy.deepcopy(model)
    plain_products(vector_products(model))
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert [type(p) for p in model.parameters()] == [type(p) for p in before.parameters()]
    tokens_BT = torch.randint(0, 211, (1, 12))
    assert torch.equal(
        logits_step_by_step(model, tokens_BT), logits_step_by_step(before, tokens_BT)
    )


def test_training_and_batches_are_untouched(monkeypatch):
    """With gradients on, or with more than one row, the products are F.linear's."""
    model = vector_products(small_model(llama3))
    monkeypatch.setattr(torch, "mv", lambda *_: pytest.fail("mv was used"))
    model(torch.randint(0, 211, (1, 1))).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        model(torch.randint(0, 211, (2, 1)))


def test_load_takes_the_step_for_bfloat16_alone(tiny):  # noqa: F811
    for dtype, kind in ((torch.float32, nn.Linear), (torch.bfloat16, speed.VectorLinear)):
        model, _ = load(tiny, dtype, "cpu")
        assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {kind}


# Whole numbers


@pytest.mark.parametrize("family", [llama3, gemma3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_are_within_half_a_step(family, dtype):
    model = small_model(family, dtype)
    before = matrices(model)
    quantize(model, "int8")
    assert len(before) == 14
    for name, w in before.items():
        step = w.float().abs().amax(dim=1, keepdim=True) / 127
        error = (model.get_submodule(name).weight.float() - w.float()).abs() / step
        assert 0.2 < error.max() <= (0.5001 if dtype == torch.float32 else 1.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_fits_better_than_plain_rounding(dtype):
    """The squared error is smaller than that of steps from each group's least to its largest."""
    model = small_model(llama3, dtype)
    before = matrices(model)
    quantize(model, "int4")
    for name, w in before.items():
        groups = w.float().unflatten(1, (-1, 32))
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        plain = ((groups - low) / (high - low) * 15).round() * (high - low) / 15 + low
        found = model.get_submodule(name).weight.float().unflatten(1, (-1, 32))
        ratio = (found - groups).square().sum() / (plain - groups).square().sum()
        assert 0.5 < ratio < 0.95


def test_int4_finds_a_grid_that_is_there():
    """Weights that are 4-bit numbers already, as from a GGUF file, come through unchanged."""
    int_NGC = torch.randint(0, 16, (64, 3, 32))
    step, low = torch.rand(64, 3, 1) + 0.5, torch.randn(64, 3, 1)
    int_NGC[:, :, 0], int_NGC[:, :, 1] = 0, 15
    w_ND = (int_NGC * step + low).flatten(1)
    assert (speed.Int4Matrix(w_ND).weight - w_ND).abs().max() < 1e-4


@pytest.mark.parametrize("kind", [speed.Int8Matrix, speed.Int4Matrix])
@pytest.mark.parametrize("n_out", [48, 50])  # 4-bit products of torch need a multiple of 16
@pytest.mark.parametrize("n_rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_weight(kind, n_out, n_rows, dtype):
    """Few rows or many, packed or not: the product is F.linear's with the matrix in floats."""
    w_ND, bias = torch.randn(n_out, 64, dtype=dtype), nn.Parameter(torch.randn(n_out, dtype=dtype))
    matrix, x = kind(w_ND, bias), torch.randn(2, n_rows, 64, dtype=dtype)
    for part in (x[:1], x):
        expected = F.linear(part.float(), matrix.weight.float(), bias.float())
        error = (matrix(part).float() - expected).abs().max()
        assert error <= (1e-5 if dtype == torch.float32 else 0.03) * expected.abs().max()


@pytest.mark.parametrize("family", [llama3, gemma3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_fall_and_outputs_stay_close(family, dtype):
    tokens_BT, drift, size = torch.randint(0, 211, (1, 12)), {}, {}
    for kind in (None, "int8", "int4"):
        model = small_model(family, dtype)
        reference = logits_step_by_step(model, tokens_BT).float()
        if kind:
            assert quantize(model, kind) is model
        found = logits_step_by_step(model, tokens_BT).float()
        drift[kind] = ((found - reference).norm() / reference.norm()).item()
        size[kind] = weight_bytes(model)
    assert drift[None] == 0 < drift["int8"] < 0.06
    assert 3 * drift["int8"] < drift["int4"] < 1
    one_byte = size[None] / (4 if dtype == torch.float32 else 2)
    assert size["int8"] < 1.15 * one_byte  # and the scales
    assert size["int4"] < 0.95 * one_byte


def test_a_kind_that_is_not_there_and_a_width_that_does_not_divide():
    with pytest.raises(ValueError, match="'int2', expected one of int8, int4"):
        quantize(small_model(llama3), "int2")
    odd = llama3.Transformer(llama3.Config(**SMALL | {"d_model": 48}, head_dim=16, d_ff=96))
    with pytest.raises(ValueError, match="width 48, not a multiple of 32"):
        quantize(odd, "int4")


def test_latent_attention_and_experts_too():
    """Guards what is read without a call: kv_b_proj in the absorbed form. The router stays."""
    torch.manual_seed(0)
    sizes = {key: SMALL[key] for key in ("vocab_size", "n_layers", "d_model", "n_heads")}
    cfg = deepseek_v3.Config(
        **sizes, head_dim=32, d_latent=64, d_rope=16, d_value=32, d_ff=96, d_expert=64, n_experts=6
    )
    model = deepseek_v3.Transformer(replace(cfg, n_active=2)).eval()
    tokens_BT = torch.randint(0, 211, (2, 12))
    before = logits_step_by_step(model, tokens_BT)
    quantize(model, "int8")
    after = logits_step_by_step(model, tokens_BT)
    assert 0 < (after - before).norm() / before.norm() < 0.05
    kept = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert kept and all(name.endswith("router") for name in kept)


def test_a_packed_embedding_is_used_for_products_only():
    model = quantize(small_model(llama3), "int8")
    with pytest.raises(TypeError, match="knows F.linear only"):
        torch.add(model.embed.weight, 1)
    assert model.embed.weight.shape == (211, 64)
