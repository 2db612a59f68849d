"""Fixed steps give what ordinary steps give, and read nothing but tensors; the GPU benchmark runs.

There is no GPU here. What a CUDA graph does is done on the CPU by Recording: it keeps a step's
operations, and replays them on the same tensors without any Python of the model.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ch01_gpt2 import gpt2
from ch01_gpt2.throughput import fused
from ch08_full_models import (
    cuda_steps,
    deepseek_v3,
    gemma3,
    llama3,
    llama4,
    mixtral,
    olmo2,
    qwen3,
    smollm3,
)
from ch08_full_models.benchmark_gpu import (
    SHAPES,
    SMOKE,
    main,
    our_model,
    their_model,
    train_flops,
    verdicts,
    weight_bytes,
)
from ch08_full_models.checkpoint import MODELS, build, find_family
from ch08_full_models.cuda_steps import fixed_steps, plain_steps
from ch08_full_models.decode import grouped_attention
from ch08_full_models.experts import fast_experts
from ch08_full_models.speed import quantize

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
N = 28  # tokens of a text
STEP = 12  # from here on they come one by one
SIZES = dict(vocab_size=61, n_layers=4, d_model=32, n_heads=4)
GROUPED = SIZES | dict(n_kv_heads=2, head_dim=16)
DENSE = GROUPED | dict(d_ff=48)
EXPERTS = dict(n_experts=5, n_active=2, d_expert=24)
LLAMA31 = llama3.RopeScaling(4.0, 1.0, 4.0, 16)
YARN = deepseek_v3.RopeScaling(4.0, 2.0, 0.5, 16, gain=1.1, score_gain=1.2)

CASES: dict[str, tuple[object, object]] = {  # windows and chunks are shorter than the text
    "llama3": (llama3, llama3.Config(**DENSE, qkv_bias=True, rope_scaling=LLAMA31)),
    "llama3, window": (llama3, llama3.Config(**DENSE, windows=(8,))),
    "qwen3": (qwen3, qwen3.Config(**DENSE)),
    "qwen3, window, experts": (
        qwen3,
        qwen3.Config(
            **DENSE | EXPERTS, windows=(8, None), sparse=(True, False), d_shared=24,
            renormalise=True, rope_scaling=qwen3.RopeScaling(4.0, 16, 1.1),
        ),
    ),
    "gemma3": (
        gemma3,
        gemma3.Config(**DENSE, windows=(8, 8, None), attn_scale=0.3, rope_factor=4.0),
    ),
    "gemma2": (
        gemma3,
        gemma3.Config(**DENSE, windows=(8, None), qk_norm=False, attn_cap=5.0, logit_cap=3.0),
    ),
    "olmo2": (olmo2, olmo2.Config(**DENSE)),
    "smollm3": (smollm3, smollm3.Config(**DENSE, windows=(8, None))),
    "mixtral": (mixtral, mixtral.Config(**GROUPED | EXPERTS, windows=(8,))),
    "llama4": (
        llama4,
        llama4.Config(
            **DENSE | EXPERTS, chunks=(8, None), sparse=(True, False), growth_len=4,
            rope_scaling=None,
        ),
    ),
    "deepseek_v3": (
        deepseek_v3,
        deepseek_v3.Config(
            **SIZES | EXPERTS | dict(n_experts=8), head_dim=16, d_value=12, d_latent=24, d_rope=8,
            d_q_latent=20, d_ff=48, router="sigmoid", n_groups=4, n_active_groups=2,
            rope_scaling=YARN, n_mtp=1,
        ),
    ),
}  # fmt: skip


def tiny(name: str) -> nn.Module:
    """A model whose every parameter matters."""
    torch.manual_seed(0)
    family, cfg = CASES[name]
    model = family.Transformer(cfg).eval()
    with torch.no_grad():
        for param in model.parameters():
            param += torch.randn_like(param) * (0.3 if param.ndim == 1 else 0.12)
    return model


def text(rows: int = 2) -> Tensor:
    return torch.randint(61, (rows, N), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def read(model: nn.Module, tokens_BT: Tensor, cache: list, first: int = 7) -> Tensor:
    """Logits (B, N, V): two chunks, then one token after the other."""
    sizes = [first, STEP - first] + [1] * (N - STEP)
    parts = [model(part, cache) for part in tokens_BT.split(sizes, dim=1)]
    return torch.cat(parts, dim=1)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().nan_to_num(9e9).max() < 1e-5 * expected.abs().max())


# The steps


@pytest.mark.parametrize("name", CASES)
def test_fixed_steps_give_the_plain_models_logits(name: str) -> None:
    """Guards the fixed cache and every swapped part, past windows and chunks, for two texts."""
    model, tokens_BT = tiny(name), text()
    with torch.no_grad():
        expected_BTV = model(tokens_BT)  # the whole text at once: no cache to speak of
    fixed_steps(model, room=N)
    cache = model.new_cache()
    assert close(read(model, tokens_BT, cache), expected_BTV)
    cache.rewind()
    flipped_BT = tokens_BT.flip(0, 1)
    with torch.no_grad():
        expected_BTV = plain_steps(model)(flipped_BT)
    fixed_steps(model, room=N)
    assert close(read(model, flipped_BT, cache, first=3), expected_BTV)


@pytest.mark.parametrize("name", CASES)
def test_padded_texts_are_as_alone(name: str) -> None:
    """Guards positions below zero in a step: padding on the left changes nothing."""
    model, tokens_BT = tiny(name), text()
    n_pad_B = torch.tensor([0, 5])
    padded_BT = torch.stack((tokens_BT[0], tokens_BT[1].roll(5)))
    padded_BT[1, :5] = 0
    with torch.no_grad():
        expected_BTV = model(tokens_BT)
    fixed_steps(model, room=N)
    found_BTV = read(model, padded_BT, model.new_cache(n_pad_B))
    assert close(found_BTV[0], expected_BTV[0])
    assert close(found_BTV[1, 5:], expected_BTV[1, :-5])


@pytest.mark.parametrize("name", CASES)
def test_generate_runs_unchanged(name: str) -> None:
    """Guards the interface, from a prompt of one token on, and that all can be undone."""
    model, family = tiny(name), CASES[name][0]
    plain, before = type(model), vars(family).copy()

    def new_tokens(n_prompt: int) -> list[int]:
        prompt_1T = text(1)[:, :n_prompt]
        new = family.generate(model, prompt_1T, 15, temperature=1.0, seed=3)
        return [int(token) for token in new]

    expected = [new_tokens(1), new_tokens(9)]
    fixed_steps(model, room=23)
    assert [new_tokens(1), new_tokens(9)] == expected
    assert type(model) is not plain
    assert type(plain_steps(model)) is plain
    assert [new_tokens(1), new_tokens(9)] == expected
    assert vars(family) == before and not hasattr(model, "room")


class Recording(TorchDispatchMode):
    """The operations that run within it; replay runs them again, into the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            given = {t.untyped_storage().data_ptr() for t in tensors(args)}
            for kept, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if kept.untyped_storage().data_ptr() not in given:  # else a view, or in place
                    kept.copy_(new)


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class FakeGraph:
    """torch.cuda.CUDAGraph, by a Recording."""

    def __init__(self) -> None:
        self.recording = Recording()

    def replay(self) -> None:
        self.recording.replay()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """Steps on the CPU are recorded as on a GPU, in what is here a graph; all that were made."""
    made: list[FakeGraph] = []

    def new_graph() -> FakeGraph:
        made.append(FakeGraph())
        return made[-1]

    stream = Mock()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph.recording)
    record = cuda_steps.record
    monkeypatch.setattr(cuda_steps, "record", lambda step, device: record(step, Mock(type="cuda")))
    return made


WAITING = ("_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select")


@pytest.mark.parametrize("name", CASES)
def test_a_recorded_step_can_be_replayed(name: str, graphs: list[FakeGraph]) -> None:
    """Guards what a CUDA graph needs: no step depends on Python's numbers or waits for a tensor."""
    model, tokens_BT = tiny(name), text()
    with torch.no_grad():
        expected_BTV = model(tokens_BT)
    fixed_steps(model, room=N)
    cache = model.new_cache()
    assert close(read(model, tokens_BT, cache), expected_BTV)
    cache.rewind()
    assert close(read(model, tokens_BT, cache), expected_BTV)
    assert len(graphs) == 1
    names = [str(func) for func, *_ in graphs[0].recording.calls]
    assert len(names) > 100
    assert [n for n in names if any(w in n for w in WAITING)] == []


@pytest.mark.parametrize("name", ["qwen3, window, experts", "deepseek_v3"])
def test_steps_for_a_cpu_are_undone_first(name: str) -> None:
    """Guards against code that waits for the GPU, which a graph cannot record."""
    plain, model, tokens_BT = tiny(name), tiny(name), text()
    fast_experts(grouped_attention(model))
    assert [type(m) for m in model.modules()] != [type(m) for m in plain.modules()]
    fixed_steps(model, N)
    assert [type(m) for m in model.modules()][1:] == [type(m) for m in plain.modules()][1:]
    found = read(model, tokens_BT, model.new_cache())
    assert close(found, read(plain, tokens_BT, plain.new_cache()))


def test_what_goes_wrong_is_said() -> None:
    """Guards the limits: room, and models whose caches have no fixed size."""
    model, tokens_BT = tiny("llama3"), text()
    with pytest.raises(ValueError, match="room is 0"):
        fixed_steps(model, room=0)
    with pytest.raises(ValueError, match="ch01_gpt2.gpt2 has no caches of fixed size"):
        fixed_steps(gpt2.Transformer(gpt2.Config(n_layers=1, vocab_size=8)), room=8)
    with pytest.raises(ValueError, match="matrices are packed"):
        fixed_steps(quantize(tiny("mixtral"), "int8"), room=8)
    fixed_steps(model, room=20)
    with pytest.raises(ValueError, match="21 tokens: the cache has room for 20"):
        read(model, tokens_BT, model.new_cache())
    with torch.no_grad():  # without a cache, a text may be longer
        assert close(model(tokens_BT), plain_steps(model)(tokens_BT))


@torch.no_grad()
def test_multi_token_prediction_keeps_its_own_cache() -> None:
    """Guards a cache that is no layer's: its tokens are counted apart."""
    model, tokens_BT = tiny("deepseek_v3"), text()
    x_BTD = model.hidden(tokens_BT, model.new_cache())
    expected_BTV = model.after_next(x_BTD[:, :-1], tokens_BT[:, 1:])
    fixed_steps(model, room=N)
    cache = model.new_cache()
    read(model, tokens_BT, cache)
    pairs = zip(x_BTD[:, :-1].split(1, dim=1), tokens_BT[:, 1:].split(1, dim=1), strict=True)
    found = [model.after_next(x_B1D, next_B1, cache) for x_B1D, next_B1 in pairs]
    assert close(torch.cat(found, dim=1), expected_BTV)


def test_layers_of_a_kind_are_compiled_once() -> None:
    """Guards the time to compile: it does not grow with the layers, nor with the tokens."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    model, tokens_BT = tiny("gemma3"), text()  # two layers with a window, one without, one with
    with torch.no_grad():
        expected_BTV = model(tokens_BT)
    fixed_steps(model, room=N, backend=backend)
    assert close(read(model, tokens_BT, model.new_cache()), expected_BTV)
    assert len(compiled) == 2


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in CASES if hasattr(CASES[name][1], "n_experts")])
@pytest.mark.parametrize("rows", [1, 7])
def test_grouped_products_in_bfloat16(name: str, rows: int) -> None:
    """Guards torch's grouped product, which only bfloat16 takes: compiled, as it is there."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = tiny(name).bfloat16()
    fixed_steps(model, room=N)
    at_once = torch.compile(cuda_steps.experts_at_once, backend="eager", fullgraph=True)
    for moe in (module for module in model.modules() if hasattr(module, "experts")):
        x_B1D = torch.randn(rows, 1, 32).bfloat16()
        expected_B1D = moe(x_B1D).float()
        for found_B1D in (at_once(moe, x_B1D), cuda_steps.experts_at_once(moe, x_B1D)):
            torch.testing.assert_close(found_B1D.float(), expected_B1D, rtol=0.02, atol=0.02)


def test_experts_move_only_once() -> None:
    """Guards the memory: weights that lie in one tensor are taken as they lie."""
    model = tiny("mixtral")
    before = [p.clone() for p in model.parameters()]
    fixed_steps(model, room=N)
    places = [p.data_ptr() for p in model.parameters()]
    fixed_steps(model, room=2 * N)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    moe = model.blocks[0].mlp
    assert moe.stacks[0].data_ptr() == moe.experts[0].gate_proj.weight.data_ptr()
    assert moe.stacks[1].data_ptr() == moe.experts[0].down_proj.weight.data_ptr()


# The benchmark


def test_targets_are_judged_by_each_projects_best() -> None:
    """Guards the verdicts: the lines, and that a failed side neither wins nor breaks them."""

    def side(rate: float, share: float) -> dict:
        return {"decode_tokens_per_s": rate, "share_of_bandwidth": share}

    sides = {
        "ours": side(40, 0.1),
        "ours, graph": side(300, 0.59),
        "transformers": side(50, 0.1),
        "transformers, compiled": side(150, 0.3),
    }
    failed = {"ours": side(10, 0.7), "ours, graph": {"error": "x"}, "transformers": side(8, 0.1)}
    records = [
        {"shape": "a", "batch": 1, "sides": sides},
        {"shape": "a", "batch": 32, "sides": sides},
        {"shape": "b", "batch": 1, "sides": failed},
    ]
    found = verdicts(records, {"share_of_matrix_rate": 0.41})
    assert [(line["target"], line["ratio"], line["reached"]) for line in found] == [
        ("decode a >= 0.6 x bandwidth limit", 0.59, False),
        ("decode a >= 1.5 x transformers' best", 2.0, True),
        ("decode b >= 0.6 x bandwidth limit", 0.7, True),
        ("decode b >= 1.5 x transformers' best", 1.25, False),
        ("training GPT-2 124M >= 0.4 x matrix rate", 0.41, True),
    ]
    assert verdicts([], {"error": "out of memory"}) == []


def test_bytes_and_operations_are_those_of_the_published_shapes() -> None:
    """Guards the limits against counts made by hand from config.json."""
    parameters = {name: MODELS[name].parameters for name in SHAPES}
    for name in SHAPES:
        config = MODELS[name].config
        family = find_family(config, Path("config.json"))
        model = build(family, config, Path("config.json"), torch.bfloat16)
        if name.startswith("qwen3"):  # the embedding is the output matrix
            assert weight_bytes(model, 32) == 2 * parameters[name]
        else:
            expert, table, layers = 3 * 2048 * 1408, 102400 * 2048, 26
            all_but = parameters[name] - table - 64 * layers * expert
            assert weight_bytes(model, 1) == pytest.approx(2 * (all_but + 6 * layers * expert))
            busy = 64 * (1 - (1 - 6 / 64) ** 32)
            assert weight_bytes(model, 32) == pytest.approx(2 * (all_but + busy * layers * expert))
    with torch.device("meta"):
        model = gpt2.Transformer(gpt2.Config())
    layer = 4 * 768 * 768 + 2 * 768 * 3072
    matrices = 12 * layer + 50257 * 768
    vectors = 12 * (9 * 768 + 3072 + 4 * 768 - 768) + 2 * 768
    assert train_flops(model, 1024) == pytest.approx(
        6 * (matrices + vectors) + 12 * 3 * 4 * 768 * 512, rel=1e-3
    )


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ch08_full_models.benchmark_gpu", *arguments],
        cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip


def test_both_projects_share_one_copy_of_the_weights() -> None:
    """Guards the memory: DeepSeek-V2-Lite fits on one card once, not twice."""
    config = MODELS["deepseek-v2-lite"].config | SMOKE.changes["deepseek-v2-lite"]
    hf = their_model(config, SMOKE)
    places = {p.untyped_storage().data_ptr() for p in hf.parameters()}
    model = fixed_steps(our_model(config, hf), room=8)
    stacks = [t for module in model.modules() if hasattr(module, "stacks") for t in module.stacks]
    held = [*model.parameters(), *stacks]
    assert {t.untyped_storage().data_ptr() for t in held} == places
    assert len(stacks) == 4


def test_training_is_compiled_whole() -> None:
    """Guards against code in chapter 1 that torch.compile would leave out."""
    torch.compiler.reset()
    model = gpt2.Transformer(gpt2.Config(**SMOKE.gpt2))
    tokens_BT = text() % 64
    expected_BTV = model(tokens_BT[:, :16])
    with fused():
        found_BTV = torch.compile(model, backend="eager", fullgraph=True)(tokens_BT[:, :16])
    assert close(found_BTV, expected_BTV)


def test_all_sides_agree_in_the_trial_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards every side, on a CPU: the same weights give the same logits, and all is recorded."""
    out = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["benchmark_gpu.py", "--smoke", "--out", str(out)])
    main()
    record = json.loads(out.read_text(encoding="utf-8"))
    assert [(r["shape"], r["batch"]) for r in record["decode"]] == [
        (name, batch) for name in SHAPES for batch in (1, 3)
    ]
    ours = {"ours", "ours, graph", "ours, compiled, graph"}
    for part in record["decode"]:
        compiled = {"transformers, compiled"} if part["batch"] == 1 else set()
        assert set(part["sides"]) == ours | {"transformers"} | compiled
        for name, side in part["sides"].items():
            assert "error" not in side, (name, side)
            assert side["difference"] < 1e-5, (part["shape"], name)
            assert side["decode_tokens_per_s"] > 0 and side["share_of_bandwidth"] > 0
    assert record["training"]["losses"][0] == pytest.approx(math.log(64), rel=0.02)
    assert len(record["targets"]) == 7


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    done = command()
    assert done.returncode == 2
    assert done.stderr == "error: no CUDA device is here; --smoke runs tiny shapes on a CPU\n"
