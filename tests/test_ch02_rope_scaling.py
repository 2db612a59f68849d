"""rope_scaling.py against transformers, published figures and plain loops; length.py's parts.

Each check takes the module, so that the mutants at the end can be given to it, too.
"""

import dataclasses
import inspect
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from ch02_rope import length, rope, rope_scaling
from ch02_rope.length import EDGES, TRAINED, Settings
from tests.parity import brute_force_attention, mutant
from tests.shapes import check_shapes

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = [  # head_dim, theta, trained length
    (128, 10_000.0, 4096),
    (64, 500_000.0, 8192),
    (64, 50_000.0, 4096),
    (32, 10_000.0, 128),  # length.py's
    (16, 100.0, 4096),  # YaRN's ramp ends after the last pair
    (16, 10.0, 100_000),  # and after the last dimension, were it not cut there
    (6, 100.0, 20),
    (6, 100.0, 6),  # YaRN's ramp starts and ends at pair 0
]
FACTORS = (1.0, 1.5, 8.0, 40.0)
YARN_BETAS = [(32.0, 1.0), (1.0, 1.0), (4.0, 2.0)]


def theirs(
    kind: str, head_dim: int, theta: float, n: int, seq_len: int | None = None, **scaling: float
) -> tuple[Tensor, float]:
    """transformers' frequencies (P,) and what it multiplies cosine and sine by."""
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=n,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **scaling},
    )
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=seq_len)


def assert_close(found_P: Tensor, expected_P: Tensor) -> None:
    """Equal but for rounding, in every pair for itself: the slow ones are thousands times less."""
    assert found_P.dtype == torch.float32
    torch.testing.assert_close(found_P, expected_P.float(), rtol=1e-6, atol=0)


# ---- the checks


def check_interpolation(module: ModuleType) -> None:
    for (head_dim, theta, n), factor in itertools.product(MODELS, FACTORS):
        freq_P = module.position_interpolation(head_dim, theta, factor)
        assert_close(freq_P, theirs("linear", head_dim, theta, n, factor=factor)[0])


def check_interpolation_of_angles(module: ModuleType) -> None:
    """What the paper defines: position p has the angles that the plain model has at p / factor."""
    freq_P = module.position_interpolation(32, 10_000.0, 8.0)
    pos_BT = torch.arange(0, 1024, 8)[None]
    found = rope.rope_angles(pos_BT, freq_P)
    expected = rope.rope_angles(pos_BT // 8, rope.rope_frequencies(32, 10_000.0))
    torch.testing.assert_close(found, expected)


def check_ntk(module: ModuleType) -> None:
    """transformers has the dynamic kind, which grows with the text.

    Its base is theta (f r - (f - 1))^(K / (K - 2)) on texts r times the trained length, so that it
    is ours with the factor f r - f + 1: f + 1 on texts of twice the length, r itself for f = 1.
    """
    for (head_dim, theta, n), f, r in itertools.product(MODELS, FACTORS, (1, 2, 5)):
        expected_P, _ = theirs("dynamic", head_dim, theta, n, seq_len=r * n, factor=f)
        assert_close(module.ntk_aware(head_dim, theta, f * r - f + 1), expected_P)


def check_ntk_ends(module: ModuleType) -> None:
    """What the exponent is for: the fastest pair stays, the slowest one slows by the factor."""
    for (head_dim, theta, _), factor in itertools.product(MODELS, FACTORS):
        slower_P = module.rope_frequencies(head_dim, theta) / module.ntk_aware(
            head_dim, theta, factor
        )
        assert slower_P[0] == 1
        assert float(slower_P[-1]) == pytest.approx(factor, rel=1e-5)


def check_yarn(module: ModuleType) -> None:
    for (head_dim, theta, n), factor, betas in itertools.product(MODELS, FACTORS, YARN_BETAS):
        scaling = dict(zip(("beta_fast", "beta_slow"), betas, strict=True))
        expected_P, attention_factor = theirs(
            "yarn",
            head_dim,
            theta,
            n,
            factor=factor,
            original_max_position_embeddings=n,
            **scaling,
        )
        assert_close(module.yarn(head_dim, theta, factor, n, **scaling), expected_P)
        assert module.yarn_attention_factor(factor) == pytest.approx(attention_factor, rel=1e-12)


def check_yarn_by_loop(module: ModuleType) -> None:
    """DeepSeek's published inference code, pair by pair in float64.

    The ends of its ramp are found by counting turns, without a logarithm: the last pair that makes
    beta_fast turns or more, the first that makes beta_slow or fewer.
    """
    for (head_dim, theta, n), factor, betas in itertools.product(MODELS, FACTORS, YARN_BETAS):

        def turns(pair: int, head_dim: int = head_dim, theta: float = theta, n: int = n) -> float:
            return n * theta ** (-2 * pair / head_dim) / (2 * math.pi)

        wide = range(-4 * head_dim, 4 * head_dim)
        low = max(max(pair for pair in wide if turns(pair) >= betas[0]), 0)
        high = min(min(pair for pair in wide if turns(pair) <= betas[1]), head_dim - 1)
        expected = []
        for pair in range(head_dim // 2):
            freq = theta ** (-2 * pair / head_dim)
            interpolated = min(max((pair - low) / (high - low or 0.001), 0), 1)
            expected.append(freq * (1 - interpolated) + freq / factor * interpolated)
        expected_P = torch.tensor(expected, dtype=torch.float64)
        assert_close(module.yarn(head_dim, theta, factor, n, *betas), expected_P)


def check_yarn_of_deepseek(module: ModuleType) -> None:
    """Figures of DeepSeek-V3 (x 40 from 4,096) and of Kimi K2 (x 32, both betas 1)."""
    freq_P = module.yarn(64, 10_000.0, 40.0, 4096)
    values = {1: 0.749894, 8: 0.1, 16: 0.0055, 24: 2.5e-5, 31: 3.3338e-6}
    for pair, value in values.items():
        assert float(freq_P[pair]) == pytest.approx(value, rel=2e-5)
    kept_P = freq_P / module.rope_frequencies(64, 10_000.0)
    assert kept_P[10] == 1 > kept_P[11]
    assert kept_P[22] > kept_P[23] == pytest.approx(1 / 40)
    kimi_P = module.yarn(64, 50_000.0, 32.0, 4096, 1.0, 1.0)
    kept_P = kimi_P / module.rope_frequencies(64, 50_000.0)
    assert kept_P[:20].tolist() == pytest.approx([1] * 20)
    assert kept_P[20:].tolist() == pytest.approx([1 / 32] * 12)


def check_yarn_attention_factor(module: ModuleType) -> None:
    """Published figures, and the quotient that cosine and sine get where a model names two."""
    found = module.yarn_attention_factor
    assert found(40.0) == pytest.approx(1.3688879, abs=1e-7)
    assert found(40.0) ** 2 == pytest.approx(1.8738542, abs=1e-7)
    assert found(40.0, 0.707) == pytest.approx(1.2608038, abs=1e-7)
    assert found(40.0, 0.707) ** 2 == pytest.approx(1.5896262, abs=1e-7)
    assert found(32.0) == pytest.approx(1.3465736, abs=1e-7)
    assert found(4.0) == pytest.approx(1.1386, abs=1e-4)
    assert found(1.0) == found(0.5) == 1
    for factor, a, b in itertools.product(FACTORS, (0.707, 1.0), (0.5, 1.0)):
        scaling = dict(original_max_position_embeddings=4096, mscale=a, mscale_all_dim=b)
        expected = theirs("yarn", 64, 10_000.0, 4096, factor=factor, **scaling)[1]
        assert found(factor, a) / found(factor, b) == pytest.approx(expected, rel=1e-12)


def check_llama3(module: ModuleType) -> None:
    for (head_dim, theta, n), factor in itertools.product(MODELS, FACTORS):
        for low, high in ((1.0, 4.0), (1.0, 32.0), (2.5, 3.0), (1.0, 1.0)):
            expected_P, _ = theirs(
                "llama3",
                head_dim,
                theta,
                n,
                factor=factor,
                low_freq_factor=low,
                high_freq_factor=high,
                original_max_position_embeddings=n,
            )
            assert_close(module.llama3(head_dim, theta, factor, low, high, n), expected_P)


def check_llama3_of_meta(module: ModuleType) -> None:
    """Figures of Llama 3.2 1B and Llama 3.1 8B."""
    freq_P = module.llama3(64, 500_000.0, 32.0, 1.0, 4.0, 8192)
    values = {0: 1, 1: 0.663601, 8: 0.037606, 16: 4.29557e-4, 24: 1.66197e-6, 31: 9.41831e-8}
    for pair, value in values.items():
        assert float(freq_P[pair]) == pytest.approx(value, rel=1e-5)
    freq_P = module.llama3(128, 500_000.0, 8.0, 1.0, 4.0, 8192)
    for pair, value in {32: 5.24846e-4, 48: 6.64787e-6, 63: 3.06893e-7}.items():
        assert float(freq_P[pair]) == pytest.approx(value, rel=1e-5)


def check_llama3_on_the_limit(module: ModuleType) -> None:
    """With equal limits and a pair right on them there must be no 0/0."""
    freq_P = module.llama3(4, 10_000.0, 8.0, 1.0, 1.0, 2 * math.pi)  # pair 0 makes one turn
    assert freq_P.tolist() == pytest.approx([1, 0.01 / 8])


def check_alibi_slopes(module: ModuleType) -> None:
    assert module.alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]  # the paper's example
    for n_heads in (*range(1, 35), 112):
        mask_BT = torch.ones(1, 2)
        bloom_HT = build_alibi_tensor(mask_BT, n_heads, torch.float32)[:, 0]
        assert_close(module.alibi_slopes(n_heads), bloom_HT[:, 1])  # of the key at position 1


def check_alibi_bias(module: ModuleType) -> None:
    """By loops, and against Bloom's, which leaves out what is equal for all keys of a query."""
    B, T, H = 3, 7, 6
    n_pad_B = torch.tensor([0, 2, 3])
    pos_BT = torch.arange(T) - n_pad_B[:, None]
    slopes_H = module.alibi_slopes(H)
    bias_BHTS = module.alibi_bias(slopes_H, pos_BT[:, 2:], pos_BT)
    assert bias_BHTS.shape == (B, H, T - 2, T)
    for b, h, t, s in itertools.product(range(B), range(H), range(T - 2), range(T)):
        expected = float(slopes_H[h]) * (s - (t + 2))
        assert float(bias_BHTS[b, h, t, s]) == pytest.approx(expected)
    bloom = build_alibi_tensor((pos_BT >= 0).float(), H, torch.float32)
    bloom_BH1S = bloom.unflatten(0, (B, H))
    scores_BHTS = torch.randn(B, H, T - 2, T)
    hidden_B1TS = ~rope.causal_mask(pos_BT[:, 2:], pos_BT)[:, None]

    def weights(bias: Tensor) -> Tensor:
        return (scores_BHTS + bias).masked_fill(hidden_B1TS, -math.inf).softmax(dim=-1)

    text_B = n_pad_B <= 2  # the rest has queries that are padding
    torch.testing.assert_close(weights(bias_BHTS)[text_B], weights(bloom_BH1S)[text_B])


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]
CHECKS.remove(check_shapes)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check(check: Callable[[ModuleType], None]) -> None:
    check(rope_scaling)


def test_frequencies_are_the_chapters_own() -> None:
    """The file stands alone, so it repeats the one function that it changes."""
    copied = inspect.getsource(rope_scaling.rope_frequencies)
    assert copied == inspect.getsource(rope.rope_frequencies)


def test_larger_base_is_plain_rope() -> None:
    """ABF needs no function of its own."""
    for head_dim, theta, n in MODELS:
        ntk_theta = theta * 8 ** (head_dim / (head_dim - 2))
        plain_P, _ = theirs("dynamic", head_dim, ntk_theta, n, factor=1.0)
        assert_close(rope_scaling.rope_frequencies(head_dim, ntk_theta), plain_P)


# ---- mistakes that the checks must find

KEEP = "keep_P * freq_P + (1 - keep_P) * freq_P / factor"
FAST_END, SLOW_END = (
    f"pair_with_turns({beta}, head_dim, theta, original_len)" for beta in ("beta_fast", "beta_slow")
)
MUTANTS = {
    "interpolation multiplies": (
        check_interpolation,
        "rope_frequencies(head_dim, theta) / factor -> rope_frequencies(head_dim, theta) * factor",
    ),
    "interpolation turns faster": (
        check_interpolation_of_angles,
        "rope_frequencies(head_dim, theta) / factor -> rope_frequencies(head_dim, theta) * factor",
    ),
    "ntk without exponent": (check_ntk, "** (head_dim / (head_dim - 2)) -> "),
    "ntk exponent K/(K+2)": (check_ntk, "(head_dim - 2)) -> (head_dim + 2))"),
    "ntk slows the last pair wrongly": (check_ntk_ends, "(head_dim - 2)) -> (head_dim - 1))"),
    "yarn upside down": (check_yarn, "/ width).clamp(0, 1) -> / width).clamp(0, 1).neg() + 1"),
    "yarn upside down, DeepSeek": (
        check_yarn_of_deepseek,
        "/ width).clamp(0, 1) -> / width).clamp(0, 1).neg() + 1",
    ),
    "yarn without floor": (check_yarn, f"math.floor({FAST_END}) -> {FAST_END}"),
    "yarn without ceil": (check_yarn_by_loop, f"math.ceil({SLOW_END}) -> {SLOW_END}"),
    "yarn floor for ceil": (check_yarn_of_deepseek, "math.ceil( -> math.floor("),
    "yarn starts below the first pair": (check_yarn_by_loop, "theta, original_len)), 0) -> "
    "theta, original_len)), -99)"),
    "yarn ends after the last dimension": (check_yarn, "head_dim - 1) -> 99)"),
    "yarn ends at the last pair": (check_yarn_by_loop, "head_dim - 1) -> head_dim // 2 - 1)"),
    "yarn ramp of no width": (check_yarn, "high - low or 0.001 -> high - low"),
    "yarn turns in radians": (check_yarn, "2 * math.pi * turns -> turns"),
    "yarn factor without 0.1": (check_yarn_attention_factor, "0.1 * mscale -> mscale"),
    "yarn factor in decimal logs": (check_yarn_attention_factor, "math.log(factor) -> "
    "math.log10(factor)"),
    "yarn factor for no extension": (check_yarn_attention_factor, "if factor > 1 -> if factor > 0"),
    "llama3 swapped": (
        check_llama3,
        f"{KEEP} -> {KEEP.replace('keep_P * freq_P +', 'keep_P * freq_P / factor +')[:-9]}",
    ),
    "llama3 counts from the wrong limit": (
        check_llama3_of_meta,
        "(turns_P - low_freq_factor) -> (turns_P - high_freq_factor)",
    ),
    "llama3 blends outwards": (check_llama3, "keep_P.clamp(0, 1) -> keep_P"),
    "llama3 divides by zero": (
        check_llama3_on_the_limit,
        "if high_freq_factor == low_freq_factor: -> if False:",
    ),
    "alibi rewards distance": (check_alibi_bias, "return -slopes_H -> return slopes_H"),
    "alibi slopes for powers of two only": (check_alibi_slopes, "8 * h / n for -> 8 * h / n_heads "
    "for"),
    "alibi takes the other half": (check_alibi_slopes, "range(1, 2 * n, 2) -> "
    "range(2, 2 * n + 1, 2)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mistake_is_found(name: str) -> None:
    """Guards the checks above: each finds what it is for, by a comparison, not by a crash."""
    check, change = MUTANTS[name]
    spoiled = mutant(rope_scaling, change)
    with pytest.raises(AssertionError):
        check(spoiled)


# ---- the experiment's parts

TINY = Settings(
    train_len=16, n_layers=2, d_model=20, n_heads=3, head_dim=8, d_ff=28, n_vocab=50, steps=2,
    batch_size=5, tune_steps=1, n_windows=7, seeds=(0,),
)  # fmt: skip
TINY_EDGES = [round(share * TINY.train_len) for share in EDGES]


def test_fused_attention_is_the_chapters() -> None:
    q_BTHK, k_BTHK, v_BTHK = torch.randn(3, 2, 9, 3, 8)
    pos_BT = torch.arange(9) - torch.tensor([[0], [4]])
    mask_BTS = rope.causal_mask(pos_BT, pos_BT)
    found_BTHK = length.fused_attend(q_BTHK, k_BTHK, v_BTHK, mask_BTS, 0.3)
    expected_BTHK = rope.attend(q_BTHK, k_BTHK, v_BTHK, mask_BTS, 0.3)
    torch.testing.assert_close(found_BTHK, expected_BTHK)


@torch.no_grad()
def test_alibi_attention_by_loops() -> None:
    """One more dimension of q and k carries the bias through the brute force."""
    attention = length.new_model("alibi", TINY, 0).blocks[0].attn
    assert type(attention) is length.AlibiAttention
    for param in attention.parameters():
        torch.nn.init.normal_(param)
    B, T, H, K = 2, 6, TINY.n_heads, TINY.head_dim
    x_BTD, pos_BT = torch.randn(B, T, TINY.d_model), torch.arange(T).expand(B, T)
    q_BTHK, k_BTHK, v_BTHK = (
        proj(x_BTD).view(B, T, H, K)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    slopes = [2**-4, 2**-8, 2**-2]  # of 3 heads: both of 2, then the first of 4
    slope_BTH1 = torch.tensor(slopes).view(1, 1, H, 1).expand(B, T, H, 1) * K**0.5
    q_BTHK = torch.cat((q_BTHK, slope_BTH1), dim=-1)  # slope times the key's position: what is
    k_pos_BTH1 = pos_BT[:, :, None, None].expand(B, T, H, 1)  # missing is equal for all keys
    k_BTHK = torch.cat((k_BTHK, k_pos_BTH1), dim=-1)
    v_BTHK = torch.nn.functional.pad(v_BTHK, (0, 1))
    y_BTHK = brute_force_attention(q_BTHK, k_BTHK, v_BTHK, lambda b, t, s: s <= t, K**-0.5)
    expected_BTD = attention.o_proj(y_BTHK[..., :K].float().flatten(-2))
    found_BTD = attention(x_BTD, pos_BT, None, rope.LayerCache())
    torch.testing.assert_close(found_BTD, expected_BTD, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_positions_are_put_in_and_taken_out() -> None:
    """The model reads with the method's frequencies inside the context only."""
    model = length.new_model("rope", TINY, 0)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.5)
    tokens_BT = torch.randint(TINY.n_vocab, (2, 40))
    before_BTV = model(tokens_BT)
    found = {}
    for method in (*TRAINED["rope"], "nope"):
        with length.positions(method, TINY):
            found[method] = model(tokens_BT)
    torch.testing.assert_close(found["rope"], before_BTV, rtol=1e-4, atol=1e-4)
    for one, other in itertools.combinations(found, 2):
        assert (found[one] - found[other]).abs().max() > 1e-2, (one, other)
    assert torch.equal(model(tokens_BT), before_BTV)
    swapped_BT = tokens_BT.clone()
    swapped_BT[:, [3, 8]] = tokens_BT[:, [8, 3]]
    with length.positions("nope", TINY):  # one layer without positions sees a bag of tokens
        model.blocks = model.blocks[:1]
        torch.testing.assert_close(model(swapped_BT)[:, 9:], model(tokens_BT)[:, 9:])
    assert not torch.allclose(model(swapped_BT)[:, 9:], model(tokens_BT)[:, 9:])


def test_yarn_makes_scores_larger() -> None:
    """Cosine and sine carry the factor, so that query and key bring it in twice."""
    freq_P, factor = length.frequencies("yarn", TINY)
    assert factor == rope_scaling.yarn_attention_factor(TINY.factor) > 1
    pos_BT = torch.arange(5)[None]
    plain = rope.rope_angles(pos_BT, freq_P)
    with length.positions("yarn", TINY):
        turn = rope.rope_angles(pos_BT, rope.rope_frequencies(TINY.head_dim, TINY.theta))
    q_BTHK, k_BTHK = torch.randn(2, 1, 5, 3, 8)
    score = (rope.rope(q_BTHK, turn) * rope.rope(k_BTHK, turn)).sum()
    expected = (rope.rope(q_BTHK, plain) * rope.rope(k_BTHK, plain)).sum() * factor**2
    torch.testing.assert_close(score, expected)


def test_windows_do_not_overlap() -> None:
    window_WN = length.held_out_windows(torch.arange(2000), TINY)
    assert window_WN.shape == (TINY.n_windows, TINY.test_len + 1)
    assert window_WN.unique().numel() == window_WN.numel()
    with pytest.raises(ValueError, match="expected 903"):
        length.held_out_windows(torch.arange(900), TINY)


def test_loss_is_by_position() -> None:
    """A model that knows the token after each of its first 4 positions, and nothing after."""

    class Knows(torch.nn.Module):
        cfg = None

        def forward(self, tokens_BT: Tensor) -> Tensor:
            next_BT = (tokens_BT + 1) % TINY.n_vocab
            logits_BTV = 50.0 * torch.nn.functional.one_hot(next_BT, TINY.n_vocab)
            return logits_BTV * (torch.arange(tokens_BT.shape[1]) < 4)[:, None]

    window_WN = (torch.arange(TINY.test_len + 1) + torch.arange(7)[:, None]) % TINY.n_vocab
    record = length.measure(Knows(), window_WN, TINY, TINY_EDGES)
    blind = math.log(TINY.n_vocab)
    bins = list(itertools.pairwise(TINY_EDGES))
    assert record["loss"] == pytest.approx([0 if b <= 4 else blind for _, b in bins], abs=1e-5)
    assert record["val_loss_train_len"] == pytest.approx(blind * 12 / 16)
    assert length.mean_between(record, TINY_EDGES, 0, 16) == pytest.approx(blind * 12 / 16)
    assert length.mean_between(record, TINY_EDGES, 16, 48) == pytest.approx(blind)


def test_a_seed_of_the_experiment() -> None:
    """All methods, each before and after tuning, and every tensor has the axes of its name."""
    tokens = torch.randint(TINY.n_vocab, (3000,))
    val_tokens = torch.randint(TINY.n_vocab, (1500,))
    with check_shapes(length, D=20, K=8, V=50) as checker:
        runs = list(length.run_seed(0, TINY, tokens, val_tokens, TINY_EDGES))
    assert checker.missing() == set()
    found = [(run["method"], run["tuned"]) for run in runs]
    methods = [method for kind in TRAINED.values() for method in kind]
    expected = [(method, tuned) for method in methods for tuned in (False, True)]
    expected.remove(("learned", True))
    assert found == expected
    for run in runs:
        reach = TINY.train_len if run["method"] == "learned" else TINY.test_len
        for (_, end), loss in zip(itertools.pairwise(TINY_EDGES), run["loss"], strict=True):
            assert (loss is None) == (end > reach)
    again = list(length.run_seed(0, TINY, tokens, val_tokens, TINY_EDGES))
    assert again == runs


def test_committed_result_is_of_this_experiment() -> None:
    """Guards length.json: whole seeds, at least three, made with the settings in the file."""
    record = json.loads(Path(length.__file__).with_suffix(".json").read_text(encoding="utf-8"))
    settings = json.loads(json.dumps(dataclasses.asdict(Settings())))
    assert {key: record["settings"][key] for key in settings} == settings
    assert record["edges"] == [round(share * settings["train_len"]) for share in EDGES]
    found = sorted((run["seed"], run["method"], run["tuned"]) for run in record["runs"])
    methods = [method for kind in TRAINED.values() for method in kind]
    each = [(method, tuned) for method in methods for tuned in (False, True)]
    each.remove(("learned", True))
    assert len(settings["seeds"]) >= 3
    assert found == sorted((seed, *one) for seed in settings["seeds"] for one in each)
