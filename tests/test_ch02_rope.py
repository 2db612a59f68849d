"""rope.py against transformers' GPT-NeoX and Llama, and the rotation against complex numbers."""

import math
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from ch01_gpt2 import gpt2
from ch02_rope import rope
from tests.parity import (
    TOLERANCE,
    assert_equal,
    assert_noticed,
    brute_force_attention,
    equals_generate,
    errors,
    goes_on,
    mutant,
    reference,
    same_alone_and_padded,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the whole model against GPT-NeoX


def neox(theta: float = 10_000.0, **changes: object) -> GPTNeoXConfig:
    """GPT-NeoX without what chapter 2 lacks: a parallel block, unturned dimensions, a head."""
    sizes = dict(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="gelu_new",
        use_parallel_residual=False,
        tie_word_embeddings=True,
        layer_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=None,
    )
    turn = dict(rope_type="default", rope_theta=theta, partial_rotary_factor=1.0)
    return GPTNeoXConfig(**sizes | dict(rope_parameters=turn) | changes)


def convert(theirs: dict[str, Tensor], n_heads: int) -> dict[str, Tensor]:
    """GPT-NeoX's tensors under our names; each head's q, k and v lie together in theirs."""
    names = {
        "embed_in": "embed",
        "final_layer_norm": "norm",
        "layers": "blocks",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "mlp_norm",
        "attention": "attn",
        "dense": "o_proj",
        "dense_h_to_4h": "up_proj",
        "dense_4h_to_h": "down_proj",
    }
    ours = {}
    for name, w in theirs.items():
        if name.startswith("gpt_neox."):  # else it is the tied head
            name = ".".join(names.get(part, part) for part in name.split(".")[1:])
            if "query_key_value" in name:
                rows = w.unflatten(0, (n_heads, 3, -1)).unbind(1)
                for letter, part in zip("qkv", rows, strict=True):
                    ours[name.replace("query_key_value", f"{letter}_proj")] = part.flatten(0, 1)
            else:
                ours[name] = w
    return ours


def config_of(module: ModuleType, hf: PreTrainedModel) -> rope.Config:
    theirs = hf.config
    return module.Config(
        vocab_size=theirs.vocab_size,
        n_layers=theirs.num_hidden_layers,
        d_model=theirs.hidden_size,
        n_heads=theirs.num_attention_heads,
        head_dim=theirs.hidden_size // theirs.num_attention_heads,
        d_ff=theirs.intermediate_size,
        norm_eps=theirs.layer_norm_eps,
        rope_theta=theirs.rope_parameters["rope_theta"],
    )


def ours(hf: PreTrainedModel, module: ModuleType = rope) -> rope.Transformer:
    """Our model, or that of a spoiled module, with the weights of transformers'."""
    model = module.Transformer(config_of(module, hf)).eval()
    model.load_state_dict(convert(hf.state_dict(), hf.config.num_attention_heads))
    return model


def drawn(seed: int) -> GPTNeoXConfig:
    rng = random.Random(seed)
    n_heads = rng.randint(1, 6)
    return neox(
        theta=rng.choice([20.0, 500.0, 1e4, 5e5]),
        vocab_size=rng.randint(20, 300),
        hidden_size=n_heads * 2 * rng.randint(1, 12),
        intermediate_size=rng.randint(5, 200),
        num_hidden_layers=rng.randint(1, 5),
        num_attention_heads=n_heads,
        layer_norm_eps=rng.choice([1e-6, 1e-5, 1e-3]),
    )


CASES = {
    "plain": neox(),
    "one head": neox(num_attention_heads=1, num_hidden_layers=2),
    "heads of one pair": neox(hidden_size=8),
    "low base": neox(theta=50.0),
    "high base": neox(theta=1e6),
    "one layer": neox(num_hidden_layers=1),
    "deep": neox(hidden_size=16, num_attention_heads=2, num_hidden_layers=8),
    "large epsilon": neox(layer_norm_eps=0.1),
}
CASES |= {f"drawn {seed}": drawn(seed) for seed in range(5)}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str) -> None:
    """Guards every part of the forward pass, with the cache, in chunks, and with padding."""
    hf = reference(CASES[name], seed=len(name))
    assert_equal(ours(hf), hf, seed=len(name))


def test_without_biases() -> None:
    """Guards Config.bias; GPT-NeoX has no such switch for its MLP, so there they are zero."""
    hf = reference(neox(attention_bias=False))
    with torch.no_grad():
        for layer in hf.gpt_neox.layers:
            layer.mlp.dense_h_to_4h.bias.zero_()
            layer.mlp.dense_4h_to_h.bias.zero_()
    model = rope.Transformer(replace(config_of(rope, hf), bias=False)).eval()
    state = convert(hf.state_dict(), hf.config.num_attention_heads)
    model.load_state_dict({name: w for name, w in state.items() if "proj.bias" not in name})
    assert_equal(model, hf)


@pytest.mark.parametrize("name", ["low base", "high base"])
def test_base_is_switched_on(name: str) -> None:
    """Guards the two cases above: with the usual base the logits are others."""
    hf = reference(CASES[name])
    model = rope.Transformer(replace(config_of(rope, hf), rope_theta=10_000.0)).eval()
    model.load_state_dict(ours(hf).state_dict())
    assert next(errors(model, hf))[1] > 1e-3


PLAIN, LOW = "plain", "low base"
MUTANTS = {
    "turned backwards": (
        PLAIN,
        "a_BTHP * cos_BT1P - b_BTHP -> a_BTHP * cos_BT1P + b_BTHP",
        "b_BTHP * cos_BT1P + a_BTHP -> b_BTHP * cos_BT1P - a_BTHP",
    ),
    "first half turned backwards": (
        PLAIN,
        "a_BTHP * cos_BT1P - b_BTHP -> a_BTHP * cos_BT1P + b_BTHP",
    ),
    "second half turned backwards": (
        PLAIN,
        "b_BTHP * cos_BT1P + a_BTHP -> b_BTHP * cos_BT1P - a_BTHP",
    ),
    "second half sees the turned first": (
        PLAIN,
        "b_BTHP * cos_BT1P + a_BTHP -> b_BTHP * cos_BT1P + a_turned_BTHP",
    ),
    "cosine and sine exchanged": (
        PLAIN,
        "return angle_BT1P.cos(), angle_BT1P.sin() -> return angle_BT1P.sin(), angle_BT1P.cos()",
    ),
    "sine without cosine": (
        PLAIN,
        "return angle_BT1P.cos(), -> return torch.ones_like(angle_BT1P),",
    ),
    "pairs side by side": (
        PLAIN,
        "x_BTHK.chunk(2, dim=-1) -> x_BTHK[..., ::2], x_BTHK[..., 1::2]",
    ),
    "queries not turned": (PLAIN, "q_BTHK = rope(q_BTHK, turn) -> pass"),
    "keys not turned": (PLAIN, "k_BTHK = rope(k_BTHK, turn) -> pass"),
    "values turned": (PLAIN, "append(k_BTHK, v_BTHK -> append(k_BTHK, rope(v_BTHK, turn)"),
    "turned twice": (PLAIN, "= rope(q_BTHK, -> = rope(rope(q_BTHK, turn),"),
    "both turned twice": (
        PLAIN,
        "= rope(q_BTHK, -> = rope(rope(q_BTHK, turn),",
        "= rope(k_BTHK, -> = rope(rope(k_BTHK, turn),",
    ),
    "nothing turned": (PLAIN, "* freq_P.to( -> * 0 * freq_P.to("),
    "keys turned when they are read, from zero": (  # the last key of each call stands still
        PLAIN,
        "k_BTHK = rope(k_BTHK, turn) -> pass",
        "mask_BTS = causal_mask -> "
        "k_BSHK = rope(k_BSHK, rope_angles(pos_BS - pos_BS[:, -1:], "
        "rope_frequencies(self.head_dim, 1e4))); mask_BTS = causal_mask",
    ),
    "frequencies theta^(-i/K)": (
        PLAIN,
        "torch.arange(0, head_dim, 2).float() -> torch.arange(head_dim // 2).float()",
    ),
    "frequencies theta^(-2i/P)": (PLAIN, ".float() / head_dim) -> .float() / (head_dim // 2))"),
    "frequencies from the second on": (
        PLAIN,
        "torch.arange(0, head_dim, 2) -> torch.arange(2, head_dim + 2, 2)",
    ),
    "wavelengths for frequencies": (PLAIN, "return 1.0 / theta -> return 1.0 * theta"),
    "all pairs turn alike": (PLAIN, "* freq_P.to( -> * freq_P[:1].expand_as(freq_P).to("),
    "base of a million": (PLAIN, "self.cfg.rope_theta) -> 1e6)"),
    "base not the config's": (LOW, "self.cfg.rope_theta) -> 1e4)"),
    "frequencies of the whole width": (
        PLAIN,
        "(self.cfg.head_dim, self.cfg.rope_theta) -> "
        "(self.cfg.d_model, self.cfg.rope_theta)[: self.cfg.head_dim // 2]",
    ),
    "positions start again with each call": (PLAIN, "self.n_seen + torch.arange -> torch.arange"),
    "positions run backwards": (PLAIN, "= rope_angles(pos_BT, -> = rope_angles(-pos_BT,"),
    "turned by the last position": (
        PLAIN,
        "= rope_angles(pos_BT, -> = rope_angles(pos_BT[:, -1:].expand_as(pos_BT),",
    ),
    "turned by the place in the call": (
        PLAIN,
        "= rope_angles(pos_BT, -> = rope_angles(pos_BT - pos_BT[:, :1],",
    ),
    "padding takes positions": (PLAIN, "(pos_T - n_pad) -> (pos_T - 0 * n_pad)"),
    "padding is seen": (PLAIN, " & ((k_pos_B1S >= 0) | (q_pos_BT1 < 0)) -> "),
    "padding turns by zero": (PLAIN, "(pos_T - n_pad) -> (pos_T - n_pad).clamp(min=0)"),
    "sees the future": (PLAIN, "k_pos_B1S <= q_pos_BT1 -> k_pos_B1S <= q_pos_BT1 + 1"),
    "cache forgets": (PLAIN, "self.kept or tuple -> tuple"),
    "scale 1 / head_dim": (PLAIN, "self.head_dim**-0.5 -> self.head_dim**-1.0"),
    "last_only gives the first": (PLAIN, "x_BTD[:, -1:] if -> x_BTD[:, :1] if"),
}


@pytest.fixture(scope="module")
def spoilt() -> dict[str, PreTrainedModel]:
    """The models that spoiled ones are compared with; unspoiled, ours equal them."""
    made = {name: reference(CASES[name], scale=2.0) for name in (PLAIN, LOW)}
    for hf in made.values():
        assert_equal(ours(hf), hf)
    return made


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str, spoilt: dict[str, PreTrainedModel]) -> None:
    """Guards the comparison above: with a mistake in the source it must fail."""
    case, *changes = MUTANTS[name]
    assert_noticed(ours(spoilt[case], mutant(rope, *changes)), spoilt[case])


def test_a_shift_of_all_positions_changes_nothing(spoilt: dict[str, PreTrainedModel]) -> None:
    """Guards the point of the chapter: the whole model, too, knows distances alone.

    Which also means that no comparison of logits sees a mistake that only shifts all positions of a
    text; the tests of `rope_angles` do. Chapter 1's table does change its logits.
    """
    hf = spoilt[PLAIN]
    tokens_BT = torch.randint(97, (2, 30))
    model = ours(hf)
    shift_B = torch.tensor([100, 1000])  # "padding" of less than none
    cache = model.new_cache(-shift_B)
    assert cache[0].positions(tokens_BT)[:, 0].tolist() == [100, 1000]
    with torch.no_grad():
        there_BTV = torch.cat([model(part, cache) for part in tokens_BT.split((21, 9), 1)], 1)
        here_BTV = model(tokens_BT)
        theirs_BTV = hf(tokens_BT, position_ids=shift_B[:, None] + torch.arange(30)).logits
        largest = here_BTV.abs().max()
        assert (
            there_BTV - here_BTV
        ).abs().max() < 1e-4 * largest  # float32 rounds an angle of 1000 by 3e-5
        assert (there_BTV - theirs_BTV).abs().max() < TOLERANCE * largest
        shifted = mutant(rope, "= rope_angles(pos_BT, -> = rope_angles(pos_BT + 1000,")
        assert next(errors(ours(hf, shifted), hf))[1] < 1e-4

        table = gpt2.Transformer(gpt2.Config(97, 1200, 2, 16, 2, 8, 20)).eval()
        nn.init.normal_(table.pos_embed.weight)
        there_BTV, here_BTV = table(tokens_BT, table.new_cache(-shift_B)), table(tokens_BT)
        assert (there_BTV - here_BTV).abs().max() > 0.1 * here_BTV.abs().max()


def test_no_end_to_the_text() -> None:
    """Guards length: 2,000 tokens at once and with the cache, where chapter 1 has an error."""
    hf = reference(neox(hidden_size=16, num_attention_heads=2, num_hidden_layers=1))
    model, tokens_1T = ours(hf), torch.randint(97, (1, 2000))
    with torch.no_grad():
        expected_1TV = hf(tokens_1T, use_cache=False).logits
        cache = model.new_cache()
        parts = [model(part, cache) for part in tokens_1T.split((1500, 1, 490, 9), dim=1)]
        for found_1TV in (model(tokens_1T), torch.cat(parts, dim=1)):
            assert (found_1TV - expected_1TV).abs().max() < TOLERANCE * expected_1TV.abs().max()
    assert not any("max_seq_len" in name for name in vars(rope.Config()))
    with pytest.raises(ValueError, match="2000 tokens: the position table ends at 1024"):
        gpt2.Transformer(gpt2.Config(97, 1024, 1, 16, 2, 8, 20))(tokens_1T)


def test_padding_can_be_any_token(spoilt: dict[str, PreTrainedModel]) -> None:
    """Guards positions below zero: not a bit of a text depends on what stands before it."""
    model = ours(spoilt[PLAIN])
    one_BT = torch.randint(97, (2, 20))
    other_BT, n_pad_B = one_BT.clone(), torch.tensor([3, 17])
    for row, n_pad in enumerate(n_pad_B.tolist()):
        other_BT[row, :n_pad] = (one_BT[row, :n_pad] + 1) % 97
    assert model.new_cache(n_pad_B)[0].positions(one_BT)[:, 0].tolist() == [-3, -17]
    with torch.no_grad():
        one_BTV, other_BTV = (model(t, model.new_cache(n_pad_B)) for t in (one_BT, other_BT))
    assert one_BTV.isfinite().all() and other_BTV.isfinite().all()
    for row, n_pad in enumerate(n_pad_B.tolist()):
        assert torch.equal(one_BTV[row, n_pad:], other_BTV[row, n_pad:])
        assert not torch.equal(one_BTV[row, :n_pad], other_BTV[row, :n_pad])


def test_gradients_equal_transformers() -> None:
    """Guards training: no part is cut off from the loss; 1e-4 of the largest of each tensor."""
    hf = reference(neox(theta=100.0))
    model, tokens_BT = ours(hf), torch.randint(97, (2, 30))
    for logits_BTV in (model(tokens_BT), hf(tokens_BT, use_cache=False).logits):
        nn.functional.cross_entropy(logits_BTV[:, :-1].mT, tokens_BT[:, 1:]).backward()
    theirs = convert({name: p.grad for name, p in hf.named_parameters()}, 4)
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, param in model.named_parameters():
        assert param.grad.isfinite().all() and param.grad.any(), name
        assert (param.grad - theirs[name]).abs().max() < 1e-4 * theirs[name].abs().max(), name


def test_initial_weights() -> None:
    """Guards init_weights: measured spread of every matrix; biases zero, norm weights one."""
    cfg = rope.Config(vocab_size=300, n_layers=8, d_model=64, n_heads=4, head_dim=16, d_ff=256)
    for name, param in rope.Transformer(cfg).named_parameters():
        if name.endswith("bias"):
            assert not param.any(), name
        elif "norm" in name:
            assert (param == 1).all(), name
        else:
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * 8) if into_stream else 0.02
            error = 1 / math.sqrt(2 * param.numel())  # standard error of a measured std, relative
            assert float(param.detach().std()) == pytest.approx(std, rel=5 * error), name
            assert abs(float(param.detach().mean())) < 5 * std / math.sqrt(param.numel()), name


def test_parameters_are_chapter_1s_without_the_table() -> None:
    """Guards the claim that rotary positions have no weights, and nothing is kept beside them."""
    sizes = dict(vocab_size=50, n_layers=2, d_model=12, n_heads=2, head_dim=6, d_ff=20)
    before = gpt2.Transformer(gpt2.Config(**sizes)).state_dict()
    after = rope.Transformer(rope.Config(**sizes)).state_dict()
    assert before.keys() - after.keys() == {"pos_embed.weight"}
    assert all(w.shape == before[name].shape for name, w in after.items())
    assert list(rope.Transformer(rope.Config(**sizes)).buffers()) == []


# ---- rope

BASE = 10_000.0


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 0::2], x[..., 1::2]


def by_complex_numbers(
    x_BTHK: Tensor, pos_BT: Tensor, pairs: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    """Each pair as one complex number, times e^(i m theta^(-2i/K)), in float64 and in place."""
    K = x_BTHK.shape[-1]
    freq_P = torch.tensor([BASE ** (-2 * i / K) for i in range(K // 2)], dtype=torch.float64)
    angle_BT1P = pos_BT[:, :, None, None].double() * freq_P
    out_BTHK = x_BTHK.double().clone()
    a, b = pairs(out_BTHK)
    z = torch.complex(a, b) * torch.exp(1j * angle_BT1P)
    a.copy_(z.real)  # a and b are views of out
    b.copy_(z.imag)
    return out_BTHK


def turned(x_BTHK: Tensor, pos_BT: Tensor) -> Tensor:
    """rope.py's own rotation; in float64 throughout if x is."""
    freq_P = rope.rope_frequencies(x_BTHK.shape[-1], BASE)
    if x_BTHK.dtype == torch.float64:
        K = x_BTHK.shape[-1]
        freq_P = torch.tensor([BASE ** (-2 * i / K) for i in range(K // 2)], dtype=torch.float64)
    return rope.rope(x_BTHK, rope.rope_angles(pos_BT, freq_P))


@pytest.mark.parametrize("theta", [20.0, 10_000.0, 5e5])
@pytest.mark.parametrize("head_dim", [2, 6, 64, 128])
def test_frequencies_by_loops(head_dim: int, theta: float) -> None:
    """Guards theta^(-2i/K): the first pair turns a radian a token, each later one less."""
    freq_P = rope.rope_frequencies(head_dim, theta)
    assert freq_P.dtype == torch.float32 and freq_P.shape == (head_dim // 2,)
    assert freq_P[0] == 1
    for i, freq in enumerate(freq_P.tolist()):
        assert freq == pytest.approx(theta ** (-2 * i / head_dim), rel=1e-6)


def test_angles_by_loops() -> None:
    """Guards cosine and sine at each position, far out and below zero, each sequence its own."""
    freq_P = rope.rope_frequencies(8, BASE)
    pos_BT = torch.tensor([[0, 1, 2, 4999], [-3, -1, 4097, 30_000]])
    cos_BT1P, sin_BT1P = rope.rope_angles(pos_BT, freq_P)
    assert cos_BT1P.shape == sin_BT1P.shape == (2, 4, 1, 4)
    for b, t, p in ((b, t, p) for b in range(2) for t in range(4) for p in range(4)):
        angle = int(pos_BT[b, t]) * BASE ** (-2 * p / 8)
        error = 3e-7 * (1 + abs(angle))  # frequency, product and cosine are each rounded
        assert float(cos_BT1P[b, t, 0, p]) == pytest.approx(math.cos(angle), abs=error)
        assert float(sin_BT1P[b, t, 0, p]) == pytest.approx(math.sin(angle), abs=error)


ANGLE_MUTANTS = {  # they shift all positions of a text alike: logits do not show them
    "from one": "(pos_BT + 1)",
    "every sequence like the first": "pos_BT[:1].expand_as(pos_BT)",
}


@pytest.mark.parametrize("name", ANGLE_MUTANTS)
def test_mistakes_in_angles_are_noticed(
    name: str, spoilt: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the test by loops where no comparison of logits can help."""
    index = "[:, :, None, None]"
    spoiled = mutant(rope, f"pos_BT{index} -> {ANGLE_MUTANTS[name]}{index}")
    assert_equal(ours(spoilt[PLAIN], spoiled), spoilt[PLAIN])
    monkeypatch.setattr(rope, "rope_angles", spoiled.rope_angles)
    with pytest.raises(AssertionError):
        test_angles_by_loops()


@pytest.mark.parametrize("head_dim", [2, 6, 64])
def test_rope_by_complex_numbers(head_dim: int) -> None:
    """Guards the rotation itself: pairs, direction and speed, each head and token its own."""
    x_BTHK = torch.randn(2, 5, 3, head_dim)
    pos_BT = torch.tensor([[0, 1, 2, 3, 100], [-7, 12, 4097, 5, 5]])
    expected_BTHK = by_complex_numbers(x_BTHK, pos_BT, halves)
    found_BTHK = turned(x_BTHK, pos_BT)
    assert found_BTHK.dtype == torch.float32
    torch.testing.assert_close(found_BTHK.double(), expected_BTHK, atol=1e-3, rtol=0)
    near_BT = pos_BT.clamp(max=100)  # where the angles have six digits
    expected_BTHK = by_complex_numbers(x_BTHK, near_BT, halves)
    torch.testing.assert_close(turned(x_BTHK, near_BT).double(), expected_BTHK, atol=1e-4, rtol=0)


def test_position_zero_changes_nothing() -> None:
    """Guards the start of the text, bit by bit."""
    x_BTHK = torch.randn(2, 3, 4, 8)
    assert torch.equal(turned(x_BTHK, torch.zeros(2, 3).long()), x_BTHK)


def test_each_pair_keeps_its_length() -> None:
    """Guards that it is a rotation, and that the same one backwards undoes it."""
    x_BTHK, pos_BT = torch.randn(2, 9, 3, 16), torch.randint(0, 5000, (2, 9))
    found_BTHK = turned(x_BTHK, pos_BT)
    (a, b), (a_turned, b_turned) = halves(x_BTHK), halves(found_BTHK)
    torch.testing.assert_close(a_turned.square() + b_turned.square(), a.square() + b.square())
    torch.testing.assert_close(turned(found_BTHK, -pos_BT), x_BTHK)
    assert (found_BTHK - x_BTHK).abs().max() > 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_depend_on_distance_alone(dtype: torch.dtype) -> None:
    """Guards the point of the chapter: a shift of query and key changes no score, a distance does.

    The score is the real part of sum q conj(k) e^(i d theta^(-2i/K)) for the distance d.
    """
    K = 32
    q_1THK, k_1THK = torch.randn(2, 1, 1, 5, K, dtype=dtype).expand(-1, -1, 40, -1, -1)
    pos_1T = torch.arange(40)[None]
    freq_P = torch.tensor([BASE ** (-2 * i / K) for i in range(K // 2)], dtype=torch.float64)
    q_HP, k_HP = (torch.complex(*halves(x[0, 0].double())) for x in (q_1THK, k_1THK))

    def scores(shift: int) -> Tensor:
        q, k = turned(q_1THK, pos_1T + shift), turned(k_1THK, pos_1T + shift)
        return torch.einsum("BTHK,BSHK->THS", q, k)

    distance_TS = (pos_1T[0, :, None] - pos_1T).double()
    wave_TSP = torch.exp(1j * distance_TS[:, :, None] * freq_P)
    expected_THS = torch.einsum("HP,TSP->THS", q_HP * k_HP.conj(), wave_TSP).real
    for shift in (-40, 0, 1, 1000, 5000):
        # an angle of m radians is rounded by up to m 2^-24 in float32, m 2^-53 in float64
        error = 1e-10 if dtype == torch.float64 else 1e-4 + 5e-6 * abs(shift)
        torch.testing.assert_close(scores(shift).double(), expected_THS, atol=error, rtol=0)
    assert (expected_THS[1:, :, 0] - expected_THS[:-1, :, 0]).abs().amax(1).min() > 0.1


# ---- attention


def llama_attention(n_heads: int, head_dim: int) -> tuple[LlamaAttention, LlamaRotaryEmbedding]:
    config = LlamaConfig(
        hidden_size=24,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        head_dim=head_dim,
        attention_bias=False,
        attn_implementation="eager",
    )
    return LlamaAttention(config, 0).eval(), LlamaRotaryEmbedding(config)


@torch.no_grad()
@pytest.mark.parametrize(("n_heads", "head_dim"), [(4, 6), (1, 24), (3, 16)])
def test_attention_equals_llama(n_heads: int, head_dim: int) -> None:
    """Guards rotation and attention together, beyond 4,096 and at unequal positions a sequence."""
    theirs, rotary = llama_attention(n_heads, head_dim)
    for param in theirs.parameters():
        nn.init.normal_(param, std=0.5)
    attn = rope.Attention(
        rope.Config(d_model=24, n_heads=n_heads, head_dim=head_dim, bias=False)
    ).eval()
    attn.load_state_dict(theirs.state_dict())
    x_BTD = torch.randn(3, 30, 24)
    gaps_BT = torch.randint(1, 4, (3, 30))  # positions that leave some out
    pos_BT = torch.tensor([[-1], [4090], [30_000]]) + gaps_BT.cumsum(1)
    mask_B1TS = torch.full((3, 1, 30, 30), -math.inf).triu(1)
    expected_BTD = theirs(x_BTD, rotary(x_BTD, pos_BT), mask_B1TS)[0]
    freq_P = rope.rope_frequencies(head_dim, BASE)
    for sizes in ([30], [19, 1, 10]):
        cache, found = rope.LayerCache(), []
        for x, pos in zip(x_BTD.split(sizes, 1), pos_BT.split(sizes, 1), strict=True):
            found.append(attn(x, pos, rope.rope_angles(pos, freq_P), cache))
        wrong_BTD = torch.cat(found, dim=1) - expected_BTD
        assert wrong_BTD.abs().max() < TOLERANCE * expected_BTD.abs().max()


@torch.no_grad()
def test_positions_count_not_the_order() -> None:
    """Guards against places that stand for positions: tokens in any order give the same."""
    attn = rope.Attention(rope.Config(d_model=24, n_heads=4, head_dim=6)).eval()
    x_BTD, pos_BT = torch.randn(2, 12, 24), torch.arange(12).expand(2, 12)
    order_T = torch.randperm(12)
    freq_P = rope.rope_frequencies(6, BASE)

    def read(x_BTD: Tensor, pos_BT: Tensor) -> Tensor:
        return attn(x_BTD, pos_BT, rope.rope_angles(pos_BT, freq_P), rope.LayerCache())

    shuffled_BTD = read(x_BTD[:, order_T], pos_BT[:, order_T])
    torch.testing.assert_close(shuffled_BTD, read(x_BTD, pos_BT)[:, order_T])


@torch.no_grad()
def test_pairs_side_by_side_are_the_same_model() -> None:
    """Guards the two layouts: rows of q_proj and k_proj, sorted even before odd, exchange them.

    A checkpoint in the other layout that is loaded as it is gives other texts.
    """
    H, K = 3, 8
    attn = rope.Attention(rope.Config(d_model=24, n_heads=H, head_dim=K)).eval()
    for param in attn.parameters():
        nn.init.normal_(param, std=0.5)
    x_BTD, pos_BT = torch.randn(2, 10, 24), torch.arange(10).expand(2, 10)
    q_BTHK, k_BTHK, v_BTHK = (
        proj(x_BTD).unflatten(-1, (H, K)) for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    q_side_BTHK = by_complex_numbers(q_BTHK, pos_BT, neighbours)
    k_side_BTHK = by_complex_numbers(k_BTHK, pos_BT, neighbours)
    y_BTHK = brute_force_attention(
        q_side_BTHK, k_side_BTHK, v_BTHK, lambda b, t, s: s <= t, K**-0.5
    )
    expected_BTD = attn.o_proj(y_BTHK.float().flatten(2))
    turn = rope.rope_angles(pos_BT, rope.rope_frequencies(K, BASE))
    found_BTD = attn(x_BTD, pos_BT, turn, rope.LayerCache())
    assert (found_BTD - expected_BTD).abs().max() > 0.1 * expected_BTD.abs().max()

    order_K = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    for proj in (attn.q_proj, attn.k_proj):
        for param in proj.parameters():
            param.copy_(param.unflatten(0, (H, K))[:, order_K].flatten(0, 1))
    found_BTD = attn(x_BTD, pos_BT, turn, rope.LayerCache())
    assert (found_BTD - expected_BTD).abs().max() < TOLERANCE * expected_BTD.abs().max()

    q_ours_BTHK = rope.rope(q_BTHK[..., order_K], turn)
    torch.testing.assert_close(q_ours_BTHK.double(), q_side_BTHK[..., order_K], atol=1e-5, rtol=0)


def test_scores_equal_deepseeks_interleaved_pairs() -> None:
    """Guards the same against transformers' DeepSeek, whose checkpoints have pairs side by side."""
    q_BTHK, k_BTHK = torch.randn(2, 2, 10, 3, 8)
    pos_BT = torch.tensor([[0], [5000]]) + torch.arange(10)
    cos_BTP, sin_BTP = (
        part[:, :, 0] for part in rope.rope_angles(pos_BT, rope.rope_frequencies(8, BASE))
    )
    both_BTK = torch.cat((cos_BTP, cos_BTP), dim=-1), torch.cat((sin_BTP, sin_BTP), dim=-1)
    theirs = apply_rotary_pos_emb_interleave(q_BTHK, k_BTHK, *both_BTK, unsqueeze_dim=2)
    expected_BHTS = torch.einsum("BTHK,BSHK->BHTS", *theirs)
    order_K = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def scores(*both: Tensor) -> Tensor:
        return torch.einsum("BTHK,BSHK->BHTS", *(turned(x_BTHK, pos_BT) for x_BTHK in both))

    found_BHTS = scores(q_BTHK[..., order_K], k_BTHK[..., order_K])
    torch.testing.assert_close(found_BHTS, expected_BHTS, atol=1e-4, rtol=0)
    assert (scores(q_BTHK, k_BTHK) - expected_BHTS).abs().max() > 0.5


# ---- bfloat16


def bfloat16_error(model: nn.Module, expected_BTV: Tensor, tokens_BT: Tensor, start: int) -> float:
    """Root-mean-square error of logits at positions from start on, in parts of the logits' own."""
    half = model.to(torch.bfloat16)
    with torch.no_grad():
        logits_BTV = half(tokens_BT, half.new_cache(torch.full((len(tokens_BT),), -start)))
    assert logits_BTV.dtype == torch.bfloat16
    wrong_BTV = logits_BTV.float() - expected_BTV
    return float(wrong_BTV.square().mean().sqrt() / expected_BTV.square().mean().sqrt())


@pytest.mark.parametrize("start", [0, 4000])
def test_bfloat16_is_as_good_as_transformers(start: int, tmp_path: Path) -> None:
    """Guards the rounding in bfloat16: an error of 2 %, at most 1.5 times transformers'.

    What is right is transformers' result in float32 from the same rounded weights.
    """
    hf = reference(neox(num_hidden_layers=2), scale=2.0)  # so large that attention counts
    with torch.no_grad():
        for param in hf.parameters():
            param.copy_(param.bfloat16())
    hf.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager"
    )
    tokens_BT = torch.randint(97, (4, 64))
    pos_BT = (start + torch.arange(64)).expand(4, 64)
    with torch.no_grad():
        expected_BTV = hf(tokens_BT, position_ids=pos_BT, use_cache=False).logits
        theirs_BTV = half(tokens_BT, position_ids=pos_BT, use_cache=False).logits.float()
    theirs = float((theirs_BTV - expected_BTV).square().mean().sqrt())
    theirs /= float(expected_BTV.square().mean().sqrt())
    found = bfloat16_error(ours(hf), expected_BTV, tokens_BT, start)
    assert found < 0.02
    assert found < 1.5 * theirs
    if start:
        coarse = mutant(rope, "* freq_P.to(pos_BT.device) -> * freq_P.bfloat16()")
        assert bfloat16_error(ours(hf, coarse), expected_BTV, tokens_BT, start) > 0.1
    with pytest.raises(RuntimeError):  # queries and keys in float32 beside values that are not
        left = mutant(rope, ".type_as(x_BTHK) -> ")
        bfloat16_error(ours(hf, left), expected_BTV, tokens_BT, start)


def test_angles_stay_in_float32() -> None:
    """Guards bfloat16 models: 8 bits cannot tell position 4,000 from 4,001, keys must."""
    torch.set_default_dtype(torch.bfloat16)
    freq_P = rope.rope_frequencies(64, 10_000.0)
    turns = [rope.rope_angles(torch.tensor([[pos]]), freq_P) for pos in (4000, 4001)]
    torch.set_default_dtype(torch.float32)
    assert freq_P.dtype == torch.float32
    assert {part.dtype for turn in turns for part in turn} == {torch.float32}
    x_11HK = torch.randn(1, 1, 3, 64).bfloat16()
    one, other = (rope.rope(x_11HK, turn) for turn in turns)
    assert one.dtype == other.dtype == torch.bfloat16
    assert (one - other).abs().max() > 0.5  # the fastest pair has turned by a radian
    for found, pos in ((one, 4000), (other, 4001)):
        expected = by_complex_numbers(x_11HK, torch.tensor([[pos]]), halves)
        torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=2**-8)


# ---- generation and the demo


@pytest.fixture(scope="module")
def lively() -> tuple[rope.Transformer, PreTrainedModel]:
    """Ours and transformers', so large that greedy texts vary."""
    hf = reference(neox(), seed=3, scale=3.0)
    return ours(hf), hf


def test_generate_equals_transformers(lively: tuple[rope.Transformer, PreTrainedModel]) -> None:
    """Guards greedy generation, and that the cache is used: one token a step after the prompt."""
    equals_generate(rope, *lively)


def test_generate_padded_batch(lively: tuple[rope.Transformer, PreTrainedModel]) -> None:
    """Guards prompts of unequal length in one batch."""
    same_alone_and_padded(rope, lively[0])


def test_generate_goes_on(lively: tuple[rope.Transformer, PreTrainedModel]) -> None:
    """Guards a cache that is handed from one call to the next."""
    goes_on(rope, lively[0])


def test_cache_holds_turned_keys(lively: tuple[rope.Transformer, PreTrainedModel]) -> None:
    """Guards that a key is turned once, when it is written: later tokens leave it as it is."""
    model, tokens_BT = lively[0], torch.randint(97, (2, 12))
    cache = model.new_cache()
    with torch.no_grad():
        x_BTD = model.blocks[0].attn_norm(model.embed(tokens_BT))
        k_BTHK = model.blocks[0].attn.k_proj(x_BTD).unflatten(-1, (4, 12))
        for part in tokens_BT.split((7, 1, 4), dim=1):
            model(part, cache)
    pos_BT = torch.arange(12).expand(2, 12)
    found_BTHK, _, found_pos_BT = cache[0].kept
    assert found_pos_BT.tolist() == pos_BT.tolist()
    torch.testing.assert_close(found_BTHK, turned(k_BTHK, pos_BT), atol=1e-5, rtol=1e-5)
    assert cache[0].n_bytes() == 2 * 2 * 12 * 4 * 12 * 4  # k and v, two texts, four bytes a number


@dataclass(frozen=True)
class Small(rope.Config):
    """A demo that takes no time."""

    vocab_size: int = 256
    n_layers: int = 1
    d_model: int = 16
    n_heads: int = 2
    head_dim: int = 8
    d_ff: int = 16


def printed_scores(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> list[float]:
    module.main()
    lines = re.findall(r"query at +([\d,]+): +(-?[\d.]+)$", capsys.readouterr().out, re.M)
    assert [position for position, _ in lines] == ["5", "50", "500", "5,000"]
    return [float(score) for _, score in lines]


@pytest.mark.parametrize("seed", range(3))
def test_demo_prints_one_score_four_times(
    seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards what the demo is there to show, to three digits; a key left unturned spoils it."""
    monkeypatch.setattr(sys, "argv", ["rope.py", "--seed", str(seed), "--n-new", "2"])
    monkeypatch.setattr(rope, "Config", Small)
    scores = printed_scores(rope, capsys)
    assert max(scores) - min(scores) < 1e-3 * max(abs(score) for score in scores)
    spoiled = mutant(rope, "rope(k_11HK, k_turn) -> k_11HK")
    spoiled.Config = Small
    scores = printed_scores(spoiled, capsys)
    assert max(scores) - min(scores) > 0.5
