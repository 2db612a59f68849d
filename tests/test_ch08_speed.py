"""Faster products and weights as integers: what they keep, what they cost, what they save."""

import copy
import time
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
    """One token is a vector, also for the tied output; results differ by rounding."""
    model, tokens_BT = small_model(family, dtype), torch.randint(0, 211, (1, 14))
    before = logits_step_by_step(model, tokens_BT)
    n_parameters = sum(1 for _ in model.parameters())
    storage = {p.data_ptr() for p in model.parameters()}
    assert vector_products(model) is model
    assert {p.data_ptr() for p in model.parameters()} == storage  # nothing is copied
    assert sum(1 for _ in model.parameters()) == n_parameters
    calls, product = [], speed.vector_product
    monkeypatch.setattr(
        speed, "vector_product", lambda w, x: calls.append(tuple(w.shape)) or product(w, x)
    )
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
    monkeypatch.setattr(speed, "vector_product", lambda *_: pytest.fail("it was used"))
    model(torch.randint(0, 211, (1, 1))).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        model(torch.randint(0, 211, (2, 1)))


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("mv", [False, True])
def test_load_takes_the_step_where_it_is_the_faster_one(tiny, mv, parts, monkeypatch):  # noqa: F811
    monkeypatch.setattr(speed, "mv_is_faster", lambda: mv)
    monkeypatch.setattr(speed, "parts_are_faster", lambda: parts)
    for dtype, fast in ((torch.float32, parts), (torch.bfloat16, mv), (torch.float16, False)):
        model, _ = load(tiny, dtype, "cpu")
        kind = speed.VectorLinear if fast else nn.Linear
        assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {kind}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_in_parts(dtype, threads, monkeypatch):
    """As many parts as threads; 3 do not divide 64 rows."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    parts, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: parts.append(len(a)) or bmm(a, b))
    w_ND, x_D = torch.randn(64, 48).to(dtype), torch.randn(48).to(dtype)
    right = w_ND.double() @ x_D.double()
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    found = speed.vector_product(w_ND, x_D)
    assert (found - right).abs().max() <= tolerance * right.abs().max()
    assert parts == ([threads] if dtype == torch.float32 and threads < 3 else [])


@pytest.mark.parametrize(("slow", "faster"), [("bmm", False), ("linear", True)])
def test_whether_parts_are_faster_is_tried(slow, faster, monkeypatch):
    module = torch if slow == "bmm" else F
    product = getattr(module, slow)

    def late(*arguments):
        time.sleep(0.01)
        return product(*arguments)

    monkeypatch.setattr(module, slow, late)
    for threads, answer in ((2, faster), (1, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        speed.parts_are_faster.cache_clear()
        assert speed.parts_are_faster() is answer
    speed.parts_are_faster.cache_clear()


@pytest.mark.parametrize(("slow", "faster"), [("mv", False), ("linear", True)])
def test_which_is_faster_is_tried(slow, faster, monkeypatch):
    """One of the two is made to wait; the answer is kept."""
    module, calls = torch if slow == "mv" else F, []
    product = getattr(module, slow)

    def late(*arguments):
        calls.append(slow)
        time.sleep(0.01)
        return product(*arguments)

    before = torch.get_num_threads()
    monkeypatch.setattr(module, slow, late)
    speed.mv_is_faster.cache_clear()
    assert speed.mv_is_faster() is speed.mv_is_faster() is faster
    assert len(calls) == 16 and torch.get_num_threads() == before
    speed.mv_is_faster.cache_clear()


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
    quantize(model, "int4", eight_bits=())
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
    all_four = {"kind": "int4", "eight_bits": ()}
    for how in (None, {"kind": "int8"}, {"kind": "int4"}, all_four):
        model = small_model(family, dtype)
        reference = logits_step_by_step(model, tokens_BT).float()
        if how:
            assert quantize(model, **how) is model
        found = logits_step_by_step(model, tokens_BT).float()
        label = how and (how["kind"] if len(how) == 1 else "all int4")
        drift[label] = ((found - reference).norm() / reference.norm()).item()
        size[label] = weight_bytes(model)
    assert drift[None] == 0 < drift["int8"] < 0.06
    assert 3 * drift["int8"] < drift["int4"] < 0.9 * drift["all int4"] < 0.9
    one_byte = size[None] / (4 if dtype == torch.float32 else 2)
    assert size["all int4"] < 0.95 * one_byte
    assert size["all int4"] < size["int4"] < size["int8"] < 1.17 * one_byte  # and the scales


def test_a_kind_that_is_not_there_and_a_width_that_does_not_divide():
    with pytest.raises(ValueError, match="'int2', expected one of int8, int4"):
        quantize(small_model(llama3), "int2")
    odd = llama3.Transformer(llama3.Config(**SMALL | {"d_model": 48}, head_dim=16, d_ff=96))
    with pytest.raises(ValueError, match="width 48, not a multiple of 32"):
        quantize(odd, "int4")
    quantize(odd, "int8")


def test_latent_attention_and_experts_too():
    """Routers stay, and so does what the absorbed form reads without a call: kv_b_proj."""
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
    assert {name.rpartition(".")[2] for name in kept} == {"router", "kv_b_proj"}
    packed = {type(model.get_submodule(n)) for n, _ in model.named_modules() if n.endswith("_proj")}
    assert packed == {nn.Linear, speed.Int8Matrix}


def test_columns_of_an_embedding_have_scales():
    """Some large columns do not take the precision of all others, and no row changes otherwise."""
    embedding = nn.Embedding(500, 64)
    embedding.weight.data[:, 5] *= 50
    plain, scaled = speed.Int8Matrix(embedding.weight), speed.Int8Embedding(embedding)
    w_ND = embedding.weight.detach()
    error_D = (scaled.matrix.weight - w_ND).square().mean(dim=0)
    plain_D = (plain.weight - w_ND).square().mean(dim=0)
    others = torch.arange(64) != 5
    assert error_D[others].mean() < 0.1 * plain_D[others].mean()
    tokens_BT = torch.randint(0, 500, (2, 7))
    rows = scaled(tokens_BT)
    assert torch.equal(rows, scaled.matrix.weight[tokens_BT])
    for n_rows in (1, 30):  # the product of integers, and that of floats
        x = torch.randn(1, n_rows, 64)
        expected = x.double() @ scaled.matrix.weight.double().T
        assert (F.linear(x, scaled.weight) - expected).abs().max() < 1e-5 * expected.abs().max()


# Integers that suit what they are multiplied by


def correlated(n_rows, width):
    """Inputs (M, D) that go together, as those of a real layer do."""
    mixing = torch.randn(width, width) * torch.logspace(0, -2, width)[:, None]
    return torch.randn(n_rows, width) @ mixing


@pytest.mark.parametrize("kind", [speed.Int8Matrix, speed.Int4Matrix])
def test_compensated_rounding_keeps_outputs_closer(kind):
    """On inputs it has not seen, too. The weights alone are less close: that is the bargain."""
    torch.manual_seed(0)
    w_ND, x_MD = torch.randn(64, 96).T, correlated(4000, 64)
    seen_MD, new_MD = x_MD[:2000], x_MD[2000:]
    before = w_ND.clone()
    near, suited = kind(w_ND), kind(w_ND, moment_DD=seen_MD.T @ seen_MD)
    assert torch.equal(w_ND, before)
    errors = [(new_MD @ (m.weight - w_ND).T).square().mean() for m in (near, suited)]
    assert errors[1] < 0.3 * errors[0]
    distances = [(m.weight - w_ND).square().mean() for m in (near, suited)]
    assert distances[1] > distances[0]


def test_compensation_is_the_best_there_is():
    """What one column's rounding adds, the later columns take away by least squares."""
    torch.manual_seed(0)
    w_ND, x_MD = torch.randn(5, 8), correlated(200, 8)
    share_DD = speed.shares(x_MD.T @ x_MD)
    step_N, zero_N, calls = torch.ones(5), torch.zeros(5), []

    def fit(w_NC):
        calls.append(w_NC.clone())
        return step_N, zero_N

    int_ND, *_ = speed.compensated(w_ND, share_DD, fit, -100, 100)
    assert len(calls) == 1 and torch.equal(calls[0], w_ND)
    damped = x_MD.double().T @ x_MD.double()
    damped += 0.01 * damped.diagonal().mean() * torch.eye(8)
    for n in range(5):  # by brute force: round one column, solve for the rest, go on
        w_D = w_ND[n].double()
        for c in range(8):
            error = int_ND[n, c] - w_D[c]
            assert abs(error) <= 0.5001
            rest = damped[c + 1 :, c + 1 :]
            if len(rest):
                w_D[c + 1 :] -= torch.linalg.solve(rest, damped[c + 1 :, c]) * error


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_calibration_is_by_what_each_matrix_meets(kind):
    """The moments are those of the inputs, behind matrices that are rounded already."""
    tokens_BT = torch.randint(0, 211, (8, 64))
    model, right = small_model(llama3), small_model(llama3)
    quantize(model, kind, tokens_BT, eight_bits=())
    assert not any(module._forward_pre_hooks for module in model.modules())
    x_BTD = right.blocks[0].attn_norm(right.embed(tokens_BT))
    matrix = speed.Int8Matrix if kind == "int8" else speed.Int4Matrix

    def check(name, x_BTD):
        x_MD = x_BTD.detach().flatten(0, 1)
        linear = right.get_submodule(name)
        expected = matrix(linear.weight.detach(), moment_DD=x_MD.T @ x_MD).weight
        found = model.get_submodule(name).weight
        step = (linear.weight - expected).abs().mean()
        # Sums in another order may round a number the other way.
        assert ((found - expected).abs() < 0.01 * step).float().mean() > 0.97
        assert ((found - matrix(linear.weight.detach()).weight).abs() > 0.1 * step).any()
        linear.weight.data = found.contiguous()

    for name in ("q_proj", "k_proj", "v_proj"):
        check(f"blocks.0.attn.{name}", x_BTD)
    met = {}
    hook = right.blocks[0].mlp.gate_proj.register_forward_pre_hook(lambda m, x: met.update(x=x[0]))
    right.blocks[0].attn.o_proj.weight.data = model.blocks[0].attn.o_proj.weight.contiguous()
    right(tokens_BT)
    hook.remove()
    check("blocks.0.mlp.gate_proj", met["x"])


def test_what_calibration_does_not_reach_is_packed_all_the_same():
    """Experts that no token chose, and routers, which stay."""
    torch.manual_seed(0)
    cfg = qwen3.Config(**SMALL, head_dim=32, d_ff=96, n_experts=16, n_active=1, d_expert=64)
    cfg = replace(cfg, sparse=(True,))
    model = qwen3.Transformer(cfg).eval()
    quantize(model, "int4", torch.tensor([[3, 4]]), eight_bits=())
    kept = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert kept and all(name.endswith("router") for name in kept)
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]]))).all()


def test_weights_that_are_4_bit_numbers_stay_so():
    """As from a GGUF file: int4 takes them wherever they are."""
    model = small_model(llama3)
    module = model.blocks[0].mlp.down_proj
    module.weight.data = speed.Int4Matrix(module.weight.detach()).weight.contiguous()
    right = module.weight.detach().clone()
    quantize(model, "int4")
    found = model.blocks[0].mlp.down_proj
    assert type(found) is speed.Int4Matrix
    assert (found.weight - right).abs().max() < 1e-4
    assert type(model.blocks[1].mlp.down_proj) is speed.Int8Matrix
    assert type(model.blocks[1].attn.q_proj) is speed.Int4Matrix


@pytest.mark.parametrize("block", [0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_rows_are_those_of_its_product(block, dtype, monkeypatch):
    """In torch's order of the numbers, and in our own where torch's is not known."""
    if block is not None:
        monkeypatch.setattr(speed, "packed_block", lambda: block)
    w_ND = torch.randn(256, 96).to(dtype)
    matrix = speed.Int4Matrix(w_ND)
    assert block == 0 or matrix.block == speed.packed_block()
    by_product = matrix.multiply(torch.eye(96, dtype=dtype)).T
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    assert (matrix.weight.float() - by_product.float()).abs().max() <= tolerance
    assert torch.equal(matrix.rows(slice(64, 192)), matrix.weight[64:192])
    assert (matrix.weight.float() - w_ND.float()).square().mean() < 0.01


@pytest.mark.parametrize("kind", [speed.Int8Matrix, speed.Int4Matrix])
@pytest.mark.parametrize("n_out", [200, 192, 208, 50])
def test_a_matrix_filled_part_by_part_is_the_same(kind, n_out, monkeypatch):
    """Also one that was laid out without memory; int4's packed order is one of blocks of rows."""
    w_ND, bias = torch.randn(n_out, 64).bfloat16(), torch.randn(n_out).bfloat16()
    whole = kind(w_ND, bias)
    monkeypatch.setattr(speed, "PART", 64)
    parts = kind(w_ND, bias)
    late = kind(w_ND.to("meta"), bias)
    assert all(t.is_meta for t in late.buffers())
    late.to_empty(device="cpu")
    for start in range(0, n_out, 64):
        late.put(start, w_ND[start : start + 64].float())
    for name, right in whole.named_buffers():
        assert torch.equal(parts.get_buffer(name), right)
        assert torch.equal(late.get_buffer(name), right)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(parts(x), whole(x)) and torch.equal(late(x), whole(x))


def test_a_packed_embedding_is_used_for_products_only():
    model = quantize(small_model(llama3), "int8")
    with pytest.raises(TypeError, match="knows F.linear only"):
        torch.add(model.embed.weight, 1)
    assert model.embed.weight.shape == (211, 64)
