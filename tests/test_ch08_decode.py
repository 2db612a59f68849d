"""The step of one token: other ways, the same logits, and all of it undone."""

import copy

import pytest
import torch
import torch.nn.functional as F

from ch01_gpt2 import gpt2
from ch08_full_models import decode, deepseek_v3, gemma3, llama3, llama4, olmo2, qwen3, smollm3
from ch08_full_models.checkpoint import family_of
from ch08_full_models.decode import (
    compiled_steps,
    grouped_attention,
    plain_decode,
    short_norms,
    two_step_head,
)
from ch08_full_models.speed import VectorWeight, quantize, vector_products

SMALL = {"vocab_size": 224, "n_layers": 3, "d_model": 64, "n_heads": 4, "d_ff": 96}
GROUPED = SMALL | {"n_kv_heads": 2, "head_dim": 32}
MODELS = {  # windows and chunks are shorter than the texts; every family without experts
    "llama3": (llama3, GROUPED),
    "mistral": (llama3, GROUPED | {"windows": (6,)}),
    "qwen3": (qwen3, GROUPED),
    "gemma3": (gemma3, GROUPED | {"windows": (6, 6, None)}),
    "gemma2": (gemma3, GROUPED | {"windows": (6, None), "attn_cap": 5.0, "logit_cap": 9.0}),
    "olmo2": (olmo2, GROUPED),
    "smollm3": (smollm3, GROUPED),
    "llama4": (llama4, GROUPED | {"chunks": (6, 6, None), "sparse": (False,)}),
    "deepseek_v3": (
        deepseek_v3,
        SMALL | {"head_dim": 32, "d_rope": 16, "d_value": 32, "d_latent": 32, "d_q_latent": 48,
                 "n_experts": 0},
    ),
}  # fmt: skip


def random_model(family, sizes: dict, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A model with random weights, large enough that its logits differ."""
    torch.manual_seed(0)
    model = family.Transformer(family.Config(**sizes)).eval()
    for param in model.parameters():
        if param.ndim > 1:
            param.data.normal_(std=0.2)
    return model.to(dtype)


def small_model(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return random_model(*MODELS[name], dtype)


@torch.no_grad()
def step_by_step(model, tokens_BT, n_first=4, n_pad_B=None):
    """Logits of a prompt and then one token after the other, (B, T, V)."""
    cache = model.new_cache(n_pad_B)
    sizes = (n_first, *(1,) * (tokens_BT.shape[1] - n_first))
    return torch.cat([model(part, cache) for part in tokens_BT.split(sizes, 1)], dim=1)


def close(a, b, dtype=torch.float32):
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    return (a - b).abs().max() <= tolerance * b.abs().max()


# Grouped attention


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", ["one", "padded"])
def test_grouped_attention_keeps_the_logits(name, batch):
    model = small_model(name)
    n_pad_B = None if batch == "one" else torch.tensor([0, 3])
    tokens_BT = torch.randint(0, 224, (1 if batch == "one" else 2, 15))
    before = step_by_step(model, tokens_BT, n_pad_B=n_pad_B)
    grouped_attention(model)
    after = step_by_step(model, tokens_BT, n_pad_B=n_pad_B)
    if n_pad_B is not None:  # padding predicts nothing
        before, after = before[:, 3:], after[:, 3:]
    assert close(after, before)
    assert family_of(model) is MODELS[name][0]


def test_grouped_attention_reads_each_key_head_once(monkeypatch):
    """The kernel gets two key heads and the four query heads as two rows each."""
    model, shapes = grouped_attention(small_model("llama3")), []
    kernel = F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        shapes.append((tuple(q.shape), tuple(k.shape)))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    step_by_step(model, torch.randint(0, 224, (1, 6)))
    assert shapes[:3] == [((1, 4, 4, 32), (1, 2, 4, 32))] * 3  # the prompt: the family's own
    assert shapes[3:] == [((1, 2, 2, 32), (1, 2, n, 32)) for n in (5, 6) for _ in range(3)]


# Norms


@pytest.mark.parametrize("name", MODELS)
def test_short_norms_keep_the_logits(name):
    """In bfloat16, against float64: no further from it than the family's own; float32 is equal."""
    model, tokens_BT = small_model(name), torch.randint(0, 224, (2, 15))
    right, double = step_by_step(model, tokens_BT), copy.deepcopy(model).double()
    assert torch.equal(step_by_step(short_norms(model), tokens_BT), right)
    assert close(right, step_by_step(double, tokens_BT), torch.float32)
    norms = [m for m in model.modules() if isinstance(m, decode.ShortNorm)]
    plain_decode(model)
    assert norms
    torch.manual_seed(1)
    for norm in norms:
        width = len(norm.weight)
        x = torch.randn(2, 7, width).mul(5).bfloat16()
        w = torch.randn(width).to(torch.bfloat16)
        norm.weight.data = w.float() if name.startswith("gemma") else w  # as they are loaded
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + norm.eps).sqrt()
        exact = exact * w.double()
        before = x.clone()
        with torch.no_grad():
            own = (norm(x) - exact).abs().mean()
            decode.change(norm, decode.ShortNorm)
            ours = (norm(x) - exact).abs().mean()
        assert torch.equal(x, before) and 0 < ours <= 1.01 * own


# The head in two steps


def exact_head(model):
    """What the model multiplies the last state with, in float64, (V, D)."""
    return getattr(model, "head", model.embed).weight.detach().double()


@pytest.mark.parametrize("name", ["llama3", "gemma3", "deepseek_v3"])
def test_two_steps_find_the_likeliest_token(name):
    """On 300 states, that of the full product; the largest logit is exact, the others near."""
    model = vector_products(small_model(name, torch.bfloat16))
    head = model.head if hasattr(model, "head") else model.embed
    weight = head.weight.detach().as_subclass(torch.Tensor)
    two_step_head(model)
    found = model.head if hasattr(model, "head") else model.embed
    with torch.no_grad():
        for seed in range(300):
            x_11D = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
            rough_V = F.linear(x_11D, found.weight)[0, 0]
            full_V = torch.mv(weight, x_11D.flatten())
            assert rough_V.argmax() == full_V.argmax()
            assert rough_V.max() == full_V.max()
            assert (rough_V - full_V).abs().max() < 0.5 * full_V.abs().max()


WIDE_C = torch.arange(5, 37)  # of 64 columns


def rough_logits(x_ND, pairs, step_zero_GV2):
    """What the rough product says of some states, (V, N) in float64."""
    both_NE = torch.cat((x_ND, x_ND[:, WIDE_C]), dim=1).contiguous()
    return torch._weight_int4pack_mm_for_cpu(
        both_NE, pairs, decode.SCAN_GROUP, step_zero_GV2
    ).T.double()


def test_the_bound_holds_and_decides():
    """Every word's exact logit lies within the bound, for states that make it as bad as can be."""
    torch.manual_seed(0)
    w_VD = torch.randn(64, 64).bfloat16()
    pairs, step_zero_GV2, error_2V = decode.rough_copy(w_VD, WIDE_C)
    off_VD = rough_logits(torch.eye(64).bfloat16(), pairs, step_zero_GV2) - w_VD.double()
    wide_VD, narrow_VD = torch.zeros_like(off_VD), off_VD.clone()
    wide_VD[:, WIDE_C], narrow_VD[:, WIDE_C] = off_VD[:, WIDE_C], 0
    for part_VD, error_V in zip((wide_VD, narrow_VD), error_2V, strict=True):
        assert (part_VD.norm(dim=1) <= error_V).all()
        assert (part_VD.norm(dim=1) >= 0.5 * error_V).all()
    assert error_2V[0].max() < 0.3 * error_2V[1].min()  # there most of the error is taken back
    # The worst state for a word points along its own errors: the bound is reached, not passed.
    worst_VD = sum(part / part.norm(dim=1, keepdim=True) for part in (wide_VD, narrow_VD))
    worst_VD = worst_VD.bfloat16()
    logit_V = rough_logits(worst_VD, pairs, step_zero_GV2).diagonal()
    exact_V = (w_VD.double() * worst_VD.double()).sum(dim=1)
    share_V = (logit_V - exact_V).abs() / error_2V.sum(dim=0)
    assert share_V.max() < 1.02 and share_V.median() > 0.8


def test_a_rival_that_the_rough_product_prefers_loses():
    """Two words whose rough logits stand in the wrong order."""
    torch.manual_seed(1)
    w_VD = torch.randn(512, 64).bfloat16()
    x_VD = torch.randn(400, 64).bfloat16()
    copy_of_it, fooled = decode.rough_copy(w_VD, WIDE_C), 0
    rough_VN = rough_logits(x_VD, *copy_of_it[:2])
    for x_D, rough_V in zip(x_VD, rough_VN.T, strict=True):
        best = torch.mv(w_VD, x_D).argmax()
        fooled += int(rough_V.argmax() != best)
        assert decode.two_step(x_D, w_VD, WIDE_C, *copy_of_it).argmax() == best
    assert fooled > 3  # else this test shows nothing


@pytest.mark.parametrize("fast", [False, True])
def test_where_too_many_words_can_win_the_product_is_the_full_one(fast, monkeypatch):
    monkeypatch.setattr("ch08_full_models.speed.mv_is_faster", lambda: fast)
    w_VD = (1 + 0.001 * torch.randn(64, 64)).bfloat16()
    x_D = torch.randn(64).bfloat16()
    logit_V = decode.two_step(x_D, w_VD, WIDE_C, *decode.rough_copy(w_VD, WIDE_C))
    right = torch.mv(w_VD, x_D) if fast else F.linear(x_D[None], w_VD)[0]
    assert torch.equal(logit_V, right)


def test_the_widest_columns_are_found_and_leave_few_words_open(monkeypatch):
    """A model whose states are large in 32 columns: its exact products are of few words."""
    torch.manual_seed(0)
    model, rows = small_model("llama3", torch.bfloat16), []
    wide_C = torch.randperm(64)[:32].sort().values
    model.norm.weight.data[wide_C] = 20.0
    mv = torch.mv
    monkeypatch.setattr(torch, "mv", lambda w, x: rows.append(len(w)) or mv(w, x))
    two_step_head(model)
    assert torch.equal(model.embed.wide_C, wide_C)
    step_by_step(model, torch.randint(0, 224, (1, 12)))
    few = sum(rows)
    rows.clear()
    narrow_C = torch.tensor([c for c in range(64) if c not in wide_C])
    model.embed = decode.TwoStepHead(model.embed.inner, narrow_C)
    step_by_step(model, torch.randint(0, 224, (1, 12)))
    assert 2 * 8 <= few < 0.5 * sum(rows)  # two products a token: of the good guess, of the open


def test_a_head_in_two_steps_refuses():
    with pytest.raises(ValueError, match="bfloat16"):
        two_step_head(small_model("llama3"))
    with pytest.raises(ValueError, match="bfloat16"):
        two_step_head(quantize(small_model("gemma3", torch.bfloat16), "int8"))
    narrow = llama3.Transformer(llama3.Config(**(GROUPED | {"d_model": 72}))).bfloat16()
    with pytest.raises(ValueError, match="72"):
        two_step_head(narrow)


# One compiled function

CAPTURE = "eager"  # the graph is captured and run as it is: no C++ compiler, and seconds less


@pytest.mark.parametrize("name", MODELS)
def test_compiled_steps_keep_the_logits(name):
    """From a prompt within the window to texts beyond it, with one compiled function."""
    model, tokens_BT = small_model(name), torch.randint(0, 224, (1, 14))
    before = step_by_step(model, tokens_BT)
    torch.compiler.reset()
    compiled_steps(grouped_attention(model), CAPTURE)
    torch._dynamo.utils.counters.clear()
    after = step_by_step(model, tokens_BT)
    assert close(after, before)
    n_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= n_graphs <= 3  # not one for each length
    assert family_of(model) is MODELS[name][0]


def test_the_compiled_function_is_what_runs(monkeypatch):
    """One call a token; prompts, batches, padding and gradients take the model's own forward."""
    model, calls = compiled_steps(small_model("llama3"), CAPTURE), []
    kind = type(model)
    monkeypatch.setattr(kind, "step", staticmethod(lambda *a: calls.append(1) or torch.zeros(1)))
    with torch.no_grad():
        for tokens_BT, n_pad_B in (
            (torch.zeros(2, 1, dtype=torch.long), None),
            (torch.zeros(1, 1, dtype=torch.long), torch.tensor([1])),
        ):
            cache = model.new_cache(n_pad_B)
            model(tokens_BT.expand(-1, 3), cache)
            model(tokens_BT, cache)
        assert not calls
        cache = model.new_cache()
        model(torch.zeros(1, 3, dtype=torch.long), cache)
        model(torch.zeros(1, 1, dtype=torch.long), cache)
        assert len(calls) == 1
    model(torch.zeros(1, 1, dtype=torch.long), cache)  # with gradients
    model(torch.zeros(1, 1, dtype=torch.long))  # no cache
    assert len(calls) == 1


def test_gpt2s_cache_is_refused():
    model = gpt2.Transformer(gpt2.Config(n_layers=1, d_model=32, n_heads=2))
    with pytest.raises(ValueError, match="cache"):
        compiled_steps(model)


@pytest.mark.parametrize("name", ["gemma3", "llama3"])
def test_products_written_by_the_compiler(name):
    """Every matrix, the head too, and all of it undone."""
    model, graphs = small_model(name, torch.bfloat16), []
    tokens_BT = torch.randint(0, 224, (1, 12))
    before, classes = step_by_step(model, tokens_BT), [type(m) for m in model.modules()]
    torch.compiler.reset()

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled_steps(model, keep, own_products=True)
    assert close(step_by_step(model, tokens_BT), before, torch.bfloat16)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("as_strided" in target for target in targets) == 7 * SMALL["n_layers"] + 1
    assert sum("to_float" in target for target in targets) == SMALL["n_layers"]  # one cut a layer
    assert not any("linear" in target or "attention" in target for target in targets)
    plain_decode(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(step_by_step(model, tokens_BT), before)


@pytest.mark.parametrize("name", MODELS)
def test_attention_written_by_the_compiler(name):
    """Against the family's own, within and beyond windows. Capped scores are not written."""
    model, graphs = small_model(name), []
    tokens_BT = torch.randint(0, 224, (1, 14))
    before = step_by_step(model, tokens_BT)
    torch.compiler.reset()

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled_steps(grouped_attention(model), keep, own_products=True)
    assert close(step_by_step(model, tokens_BT), before)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    written = 0 if name in ("gemma2", "deepseek_v3") else SMALL["n_layers"]
    assert sum("to_float" in target for target in targets) == written
    assert not any("attention" in target for target in targets)


@pytest.mark.parametrize("bias", [False, True])
def test_a_written_product_is_the_product(bias):
    w_ND, x_11D = torch.randn(24, 40).bfloat16(), torch.randn(1, 1, 40).bfloat16()
    bias_N = torch.randn(24).bfloat16() if bias else None
    right = x_11D.double() @ w_ND.double().T + (bias_N.double() if bias else 0)
    found = decode.written_product(x_11D, w_ND, bias_N)
    assert found.shape == (1, 1, 24) and found.dtype == torch.bfloat16
    assert (found.double() - right).abs().max() <= 2**-7 * right.abs().max()


@pytest.mark.parametrize("fast", [False, True])
def test_products_by_what_the_machine_is_fast_at(fast, monkeypatch):
    """The compiler writes them where torch.mv is slow, and only there."""
    monkeypatch.setattr("ch08_full_models.speed.mv_is_faster", lambda: fast)
    model = compiled_steps(vector_products(small_model("gemma3", torch.bfloat16)), CAPTURE)
    linear = model.blocks[0].attn.q_proj
    assert isinstance(linear, decode.StepLinear) is not fast
    assert isinstance(model.embed, decode.StepEmbedding) is not fast
    head = two_step_head(small_model("gemma3", torch.bfloat16))
    compiled_steps(head, CAPTURE)
    assert not isinstance(head.embed.inner, decode.StepEmbedding)  # its rows are taken by number


@pytest.mark.parametrize(
    ("kind", "own_products"), [("int8", False), ("int4", False), ("float", False), ("float", True)]
)
def test_generated_code_keeps_the_logits(kind, own_products, monkeypatch):
    """With the real compiler: everything at once, against the plain model."""
    # torch's compiler imports setuptools, which objects if a test before has imported distutils.
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")
    model = small_model("gemma3", torch.bfloat16)
    model = vector_products(model) if kind == "float" else quantize(model, kind)
    tokens_BT = torch.randint(0, 224, (1, 14))
    before = step_by_step(model, tokens_BT)
    torch.compiler.reset()
    short_norms(grouped_attention(model))
    after = step_by_step(compiled_steps(model, own_products=own_products), tokens_BT)
    assert close(after, before, torch.bfloat16)
    if kind == "float":
        plain_decode(model)
        quick = compiled_steps(two_step_head(model), own_products=own_products)
        quick = step_by_step(quick, tokens_BT)
        largest = [logits.amax(dim=-1) for logits in (quick, before)]
        assert close(*largest, torch.bfloat16)
        assert not torch.equal(quick, after)  # the others are rough


def test_plain_decode_takes_everything_back():
    model = vector_products(small_model("gemma3", torch.bfloat16))
    before, tokens_BT = copy.deepcopy(model), torch.randint(0, 224, (1, 12))
    compiled_steps(two_step_head(short_norms(grouped_attention(model))), CAPTURE)
    plain_decode(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert [type(p) for p in model.parameters()] == [type(p) for p in before.parameters()]
    assert isinstance(model.embed.weight, VectorWeight)
    assert torch.equal(step_by_step(model, tokens_BT), step_by_step(before, tokens_BT))
