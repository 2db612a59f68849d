"""gqa.py against transformers' Starcoder2, Llama and Mistral, and its cache against brute force."""

import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, MistralConfig, PreTrainedModel, Starcoder2Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention

from ch02_rope import rope
from ch03_gqa import gqa
from tests.parity import (
    TOLERANCE,
    assert_equal,
    assert_noticed,
    brute_force_attention,
    check_mask_by_loops,
    equals_generate,
    errors,
    forward_lengths,
    goes_on,
    mutant,
    reference,
    same_alone_and_padded,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Windows = tuple[int | None, ...]


# ---- the whole model against Starcoder2


def starcoder2(theta: float = 10_000.0, **changes: object) -> Starcoder2Config:
    """Starcoder2 is chapter 3's model to the letter, its window the same in all layers."""
    sizes = dict(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,  # all texts have 40 tokens
        hidden_act="gelu_pytorch_tanh",
        norm_epsilon=1e-5,
        use_bias=True,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=theta),
        bos_token_id=None,
        eos_token_id=None,
    )
    return Starcoder2Config(**sizes | changes)


def visible(n: int, window: int | None) -> Tensor:
    """True where token t may look at token s, (T, S), by loops."""
    rows = [[s <= t and (window is None or t - s < window) for s in range(n)] for t in range(n)]
    return torch.tensor(rows)


def with_windows(hf: PreTrainedModel, windows: Windows) -> PreTrainedModel:
    """transformers' model with a mask of its own for each layer, put in where its mask arrives."""

    def put_in(window: int | None) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            n = kwargs["hidden_states"].shape[1]
            mask_11TS = torch.zeros(1, 1, n, n).masked_fill(~visible(n, window), -math.inf)
            return args, kwargs | {"attention_mask": mask_11TS}

        return hook

    for layer, block in enumerate(hf.model.layers):
        hook = put_in(windows[layer % len(windows)])
        block.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    return hf


def convert(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Starcoder2's tensors under our names."""
    names = {
        "embed_tokens": "embed",
        "layers": "blocks",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "mlp_norm",
        "self_attn": "attn",
        "c_fc": "up_proj",
        "c_proj": "down_proj",
    }
    return {
        ".".join(names.get(part, part) for part in name.split(".")[1:]): w
        for name, w in theirs.items()
        if name.startswith("model.")  # else it is the tied head
    }


def config_of(module: ModuleType, hf: PreTrainedModel, windows: Windows | None) -> gqa.Config:
    theirs = hf.config
    return module.Config(
        vocab_size=theirs.vocab_size,
        n_layers=theirs.num_hidden_layers,
        d_model=theirs.hidden_size,
        n_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        windows=windows or (theirs.sliding_window,),
        d_ff=theirs.intermediate_size,
        bias=theirs.use_bias,
        norm_eps=theirs.norm_epsilon,
        rope_theta=theirs.rope_parameters["rope_theta"],
    )


def ours(
    hf: PreTrainedModel, windows: Windows | None = None, module: ModuleType = gqa
) -> gqa.Transformer:
    """Our model, or that of a spoiled module, with the weights of transformers'."""
    model = module.Transformer(config_of(module, hf, windows)).eval()
    model.load_state_dict(convert(hf.state_dict()))
    return model


def drawn(seed: int) -> Starcoder2Config:
    rng = random.Random(seed)
    n_kv_heads = rng.randint(1, 4)
    n_heads = n_kv_heads * rng.randint(1, 4)
    return starcoder2(
        theta=rng.choice([20.0, 1e4, 5e5]),
        vocab_size=rng.randint(20, 200),
        hidden_size=rng.randint(4, 60),
        intermediate_size=rng.randint(5, 150),
        num_hidden_layers=rng.randint(1, 4),
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=2 * rng.randint(1, 10),
        sliding_window=rng.choice([None, *range(1, 24)]),
        norm_epsilon=rng.choice([1e-6, 1e-5, 1e-3]),
        use_bias=rng.random() < 0.5,
    )


CASES = {
    "three heads a group": starcoder2(),
    "one key/value head": starcoder2(num_key_value_heads=1),
    "every head its own": starcoder2(num_key_value_heads=6),
    "no window": starcoder2(sliding_window=None),
    "window of one": starcoder2(sliding_window=1),
    "window of two": starcoder2(sliding_window=2),
    "window one short": starcoder2(sliding_window=39),
    "window of the text": starcoder2(sliding_window=40),
    "wide heads": starcoder2(head_dim=20, num_key_value_heads=3),
    "no biases": starcoder2(use_bias=False),
}
CASES |= {f"drawn {seed}": drawn(seed) for seed in range(5)}
LAYERED: dict[str, tuple[Windows, Starcoder2Config]] = {
    "local, global": ((8, None), starcoder2()),
    "global, local": ((None, 5), starcoder2(num_hidden_layers=4)),
    "three kinds": ((3, None, 11), starcoder2(num_key_value_heads=1)),
    "two local, one global": ((4, 6, None), starcoder2(num_hidden_layers=5)),
    "more windows than layers": ((2, 7, None, None), starcoder2(num_hidden_layers=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str) -> None:
    """Guards groups and windows, with chunks that straddle the window, and with padding."""
    hf = reference(CASES[name], seed=len(name))
    assert_equal(ours(hf), hf, seed=len(name))


@pytest.mark.parametrize("name", LAYERED)
def test_windows_by_layer(name: str) -> None:
    """Guards layers with windows of their own, repeated over the layers."""
    windows, config = LAYERED[name]
    hf = with_windows(reference(config), windows)
    assert_equal(ours(hf, windows), hf)


OFF = {  # what each case would be without its point
    "three heads a group": (None,),
    "window of one": (2,),
    "window of two": (1,),
    "window one short": (40,),
    "window of the text": (39,),
}


@pytest.mark.parametrize("name", OFF)
def test_windows_are_switched_on(name: str) -> None:
    """Guards the cases above: with another window the logits are others."""
    hf = reference(CASES[name], seed=len(name))
    assert next(errors(ours(hf, OFF[name]), hf))[1] > 1e-3


# ---- mistakes

GROUPS, LAYERS, MANY, WIDE = "groups", "layers", "many", "wide"
SPOILT: dict[str, tuple[Windows, Starcoder2Config]] = {
    GROUPS: ((8,), starcoder2()),
    LAYERS: ((8, None), starcoder2()),
    MANY: ((3, None, 11), starcoder2(num_hidden_layers=4)),
    WIDE: ((None,), starcoder2(head_dim=20)),
}
TURNED_GROUPS = "q_BTHK.unflatten(2, (k_BSJK.shape[2], -1)) -> " + (
    "q_BTHK.unflatten(2, (-1, k_BSJK.shape[2])).transpose(2, 3)"
)
MUTANTS = {
    "window one too wide": (GROUPS, "> q_pos_BT1 - window -> >= q_pos_BT1 - window"),
    "window one too narrow": (GROUPS, "> q_pos_BT1 - window -> > q_pos_BT1 - window + 1"),
    "window ignored by the mask": (GROUPS, "mask_BTS if window is None else -> mask_BTS if 1 else"),
    "window ignored everywhere": (
        GROUPS,
        "self.attn = Attention(cfg, -> self.attn = Attention(cfg, 99 or ",
    ),
    "window instead of causal": (GROUPS, "else mask_BTS & -> else "),
    "blocks, not a sliding window": (
        GROUPS,
        "(k_pos_B1S > q_pos_BT1 - window) -> (k_pos_B1S // window == q_pos_BT1 // window)",
    ),
    "window by the place in the cache": (
        GROUPS,
        "(k_pos_B1S > q_pos_BT1 - window) -> "
        "(torch.arange(k_pos_BS.shape[1]) > q_pos_BT1 - window)",
    ),
    "window takes padding for text": (
        GROUPS,
        "mask_BTS & (k_pos_B1S > q_pos_BT1 - window) -> (k_pos_B1S <= q_pos_BT1) & "
        "(k_pos_B1S > q_pos_BT1 - window)",
    ),
    "cache keeps two too few": (GROUPS, "t[:, -self.window :] -> t[:, -(self.window - 2) :]"),
    "cache keeps the oldest": (GROUPS, "t[:, -self.window :] -> t[:, : self.window]"),
    "cache keeps the last call": (GROUPS, "self.kept = joined -> self.kept = joined = new"),
    "cache forgets": (GROUPS, "self.kept or tuple -> tuple"),
    "only what is kept is returned": (GROUPS, "return joined -> return self.kept"),
    "newest first": (GROUPS, "zip(kept, new, strict=True) -> zip(new, kept, strict=True)"),
    "count of tokens stops at the window": (
        GROUPS,
        "self.n_seen += new[0].shape[1] -> "
        "self.n_seen = min(self.n_seen + new[0].shape[1], self.window)",
    ),
    "padding takes positions": (GROUPS, "(pos_T - n_pad) -> (pos_T - 0 * n_pad)"),
    "padding is seen": (GROUPS, " & ((k_pos_B1S >= 0) | (q_pos_BT1 < 0)) -> "),
    "head h reads h % J": (
        GROUPS,
        TURNED_GROUPS,
        ".flatten(2, 3) -> .transpose(2, 3).flatten(2, 3)",
    ),
    "heads come out in another order": (
        GROUPS,
        ".flatten(2, 3) -> .transpose(2, 3).flatten(2, 3)",
    ),
    "heads go in in another order": (GROUPS, TURNED_GROUPS),
    "keys of the first head for all": (
        GROUPS,
        "q_BTJGK, k_BSJK) -> q_BTJGK, k_BSJK[:, :, :1].expand_as(k_BSJK))",
    ),
    "keys averaged over heads": (
        GROUPS,
        "q_BTJGK, k_BSJK) -> q_BTJGK, k_BSJK.mean(2, keepdim=True).expand_as(k_BSJK))",
    ),
    "values averaged over heads": (
        GROUPS,
        "weights_BJGTS, v_BSJK) -> weights_BJGTS, v_BSJK.mean(2, keepdim=True).expand_as(v_BSJK))",
    ),
    "softmax over the group": (GROUPS, "softmax(dim=-1) -> softmax(dim=2)"),
    "queries of a group added up": (
        GROUPS,
        "q_BTJGK, k_BSJK) -> q_BTJGK.mean(3, keepdim=True).expand_as(q_BTJGK), k_BSJK)",
    ),
    "keys and values exchanged": (GROUPS, "append(k_BTJK, v_BTJK -> append(v_BTJK, k_BTJK"),
    "keys for values": (GROUPS, "append(k_BTJK, v_BTJK -> append(k_BTJK, k_BTJK"),
    "keys not turned": (GROUPS, "k_BTJK = rope(k_BTJK, turn) -> pass"),
    "queries not turned": (GROUPS, "q_BTHK = rope(q_BTHK, turn) -> pass"),
    "values turned": (GROUPS, "append(k_BTJK, v_BTJK -> append(k_BTJK, rope(v_BTJK, turn)"),
    "scale of all key heads": (
        GROUPS,
        "self.head_dim**-0.5 -> (k_BTJK.shape[2] * self.head_dim) ** -0.5",
    ),
    "scale of the width a head": (WIDE, "self.head_dim**-0.5 -> (48 / 6) ** -0.5"),
    "windows one layer off": (
        LAYERS,
        "[layer % len(cfg.windows)] -> [(layer + 1) % len(cfg.windows)]",
    ),
    "windows one layer off, of three": (
        MANY,
        "[layer % len(cfg.windows)] -> [(layer - 1) % len(cfg.windows)]",
    ),
    "first window for all layers": (MANY, "[layer % len(cfg.windows)] -> [0]"),
    "windows not repeated": (
        MANY,
        "[layer % len(cfg.windows)] -> [min(layer, len(cfg.windows) - 1)]",
    ),
    "windows in blocks of layers": (
        MANY,
        "[layer % len(cfg.windows)] -> [layer * len(cfg.windows) // cfg.n_layers]",
    ),
    "all caches with the first window": (
        LAYERS,
        "LayerCache(block.attn.window, -> LayerCache(self.blocks[0].attn.window,",
    ),
    "all masks with the first window": (
        LAYERS,
        "causal_mask(pos_BT, pos_BS, self.window) -> causal_mask(pos_BT, pos_BS, 8)",
    ),
}


@pytest.fixture(scope="module")
def spoilt() -> dict[str, PreTrainedModel]:
    """The models that spoiled ones are compared with; unspoiled, ours equal them."""
    made = {}
    for name, (windows, config) in SPOILT.items():
        made[name] = with_windows(reference(config, scale=2.0), windows)
        assert_equal(ours(made[name], windows), made[name])
    return made


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str, spoilt: dict[str, PreTrainedModel]) -> None:
    """Guards the comparison with transformers: with a mistake in the source it must fail."""
    case, *changes = MUTANTS[name]
    model = ours(spoilt[case], SPOILT[case][0], mutant(gqa, *changes))
    assert_noticed(model, spoilt[case])


# ---- the cache


def draw_chunks(rng: random.Random, n: int) -> Iterator[slice]:
    """Parts of n tokens: often one, at times more than a window."""
    start = 0
    while start < n:
        n_new = min(rng.choice([1, 1, 1, 2, 3, 9, 14]), n - start)
        yield slice(start, start + n_new)
        start += n_new


def check_cache(
    module: ModuleType,
    window: int | None,
    padded: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """What the cache gives and keeps after each of many calls, and how much memory is alive."""
    rng = random.Random(seed)
    B, J, K, n = 2, 3, 4, 40
    k_BTJK, v_BTJK = torch.randn(2, B, n, J, K, dtype=dtype)
    n_pad = [7, 0] if padded else [0, 0]
    cache = module.LayerCache(window, torch.tensor(n_pad) if padded else None)

    def check_tokens(tensors: tuple[Tensor, ...], start: int, stop: int) -> None:
        found_k_BSJK, found_v_BSJK, found_pos_BS = tensors
        assert torch.equal(found_k_BSJK, k_BTJK[:, start:stop])
        assert torch.equal(found_v_BSJK, v_BTJK[:, start:stop])
        assert found_pos_BS.tolist() == [[t - p for t in range(start, stop)] for p in n_pad]

    n_kept = 0
    for part in draw_chunks(rng, n):
        tokens_BT = torch.zeros(B, part.stop - part.start, dtype=torch.long)
        pos_BT = cache.positions(tokens_BT)
        given = cache.append(k_BTJK[:, part], v_BTJK[:, part], pos_BT)
        assert cache.n_seen == part.stop
        check_tokens(given, part.start - n_kept, part.stop)
        n_kept = min(part.stop, window or n)
        check_tokens(cache.kept, part.stop - n_kept, part.stop)
        assert cache.n_bytes() == 2 * B * n_kept * J * K * dtype.itemsize
        alive = sum(t.untyped_storage().nbytes() for t in cache.kept[:2])
        assert alive == cache.n_bytes()
        assert cache.kept[2].untyped_storage().nbytes() == B * n_kept * 8  # positions


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 12, 40, 99])
def test_cache_holds_the_window(window: int | None, padded: bool) -> None:
    """Guards the memory: min(seen, window) tokens, the last ones, and no storage beside them."""
    for seed in range(4):
        check_cache(gqa, window, padded, seed)
    check_cache(gqa, window, padded, dtype=torch.bfloat16)


CACHE_MUTANTS = {  # the logits do not show these
    "one too few": "t[:, -self.window :] -> t[:, -(self.window - 1) :]",
    "one too many": "t[:, -self.window :] -> t[:, -(self.window + 1) :]",
    "everything": "if self.window is not None -> if False",
    "a slice of everything": "t[:, -self.window :].clone() for -> t[:, -self.window :] for",
    "positions counted as bytes": " if t.is_floating_point() -> ",
    "bytes of the keys alone": "for t in self.kept if -> for t in self.kept[:1] if",
    "numbers for bytes": "sum(t.nbytes -> sum(t.numel()",
}


@pytest.mark.parametrize("name", CACHE_MUTANTS)
def test_mistakes_in_the_cache_are_noticed(name: str, spoilt: dict[str, PreTrainedModel]) -> None:
    """Guards check_cache where no comparison of logits can help."""
    spoiled = mutant(gqa, CACHE_MUTANTS[name])
    assert_equal(ours(spoilt[GROUPS], (8,), spoiled), spoilt[GROUPS])
    with pytest.raises(AssertionError):
        check_cache(spoiled, 5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 12])
def test_attention_over_the_cache_by_loops(window: int | None, padded: bool) -> None:
    """Guards cache, mask and attend together: they equal brute force over all tokens ever seen."""
    rng = random.Random(0)
    B, H, J, K, n = 2, 4, 2, 3, 24
    q_BTHK = torch.randn(B, n, H, K)
    k_BTJK, v_BTJK = torch.randn(2, B, n, J, K)
    n_pad = [7, 0] if padded else [0, 0]

    def sees(b: int, t: int, s: int) -> bool:
        near = s <= t and (window is None or s > t - window)
        return near and (s >= n_pad[b] or t < n_pad[b])

    expected_BTHK = brute_force_attention(q_BTHK, k_BTJK, v_BTJK, sees, 0.6).float()
    cache = gqa.LayerCache(window, torch.tensor(n_pad) if padded else None)
    for part in draw_chunks(rng, n):
        pos_BT = cache.positions(q_BTHK[:, part, 0, 0])
        k_BSJK, v_BSJK, pos_BS = cache.append(k_BTJK[:, part], v_BTJK[:, part], pos_BT)
        mask_BTS = gqa.causal_mask(pos_BT, pos_BS, window)
        y_BTHK = gqa.attend(q_BTHK[:, part], k_BSJK, v_BSJK, mask_BTS, 0.6)
        torch.testing.assert_close(y_BTHK, expected_BTHK[:, part])


def check_sizes_by_layer(module: ModuleType) -> None:
    """Each layer's cache after 33 tokens: 2 J K numbers of four bytes a token that it holds."""
    model = module.Transformer(
        module.Config(
            vocab_size=50,
            n_layers=4,
            d_model=12,
            n_heads=6,
            n_kv_heads=2,
            head_dim=10,
            windows=(None, 5, 100),
            d_ff=16,
        )
    ).eval()
    cache = model.new_cache()
    with torch.no_grad():
        for n_new in (20, 1, 12):
            model(torch.randint(50, (3, n_new)), cache)
    assert [layer.n_bytes() for layer in cache] == [2 * 2 * 10 * 4 * 3 * n for n in (33, 5, 33, 33)]
    assert [layer.n_seen for layer in cache] == [33] * 4


def test_sizes_by_layer() -> None:
    """Guards the caches that a model makes; a layer that keeps too much shows in no logits."""
    check_sizes_by_layer(gqa)
    with pytest.raises(AssertionError):
        check_sizes_by_layer(mutant(gqa, "LayerCache(block.attn.window, -> LayerCache(None,"))


@pytest.mark.parametrize(
    ("n_layers", "n_kv_heads", "head_dim", "n_bytes"),
    [(12, 12, 64, 36_864), (32, 32, 128, 524_288), (32, 8, 128, 131_072), (30, 3, 64, 23_040)],
    ids=["GPT-2", "Llama 2 7B", "Llama 3.1 8B", "SmolLM2-135M"],
)
def test_bytes_a_token_of_published_models(
    n_layers: int, n_kv_heads: int, head_dim: int, n_bytes: int
) -> None:
    """Guards n_bytes against known figures, in bfloat16."""
    cache = gqa.LayerCache(None)
    new_BTJK = torch.zeros(1, 1, n_kv_heads, head_dim, dtype=torch.bfloat16)
    cache.append(new_BTJK, new_BTJK, torch.zeros(1, 1, dtype=torch.long))
    assert n_layers * cache.n_bytes() == n_bytes


# ---- parts


def test_causal_mask_by_loops() -> None:
    """Guards who sees whom, and the test itself, with mistakes in the window."""
    check_mask_by_loops(gqa)
    for wrong in (">= q_pos_BT1 - window", "> q_pos_BT1 - window + 1", ">= 0"):
        with pytest.raises(AssertionError):
            check_mask_by_loops(mutant(gqa, f"> q_pos_BT1 - window -> {wrong}"))


GROUPINGS = [(6, 6), (6, 3), (6, 2), (6, 1), (1, 1)]


@pytest.mark.parametrize(("H", "J"), GROUPINGS)
def test_attend_by_loops(H: int, J: int) -> None:
    """Guards the einsums: each head, each sequence and each token its own; and torch's kernel."""
    q_BTHK = torch.randn(2, 3, H, 5)
    k_BSJK, v_BSJK = torch.randn(2, 2, 7, J, 5)
    mask_BTS = torch.rand(2, 3, 7) > 0.5
    mask_BTS[:, :, 0] = True
    found_BTHK = gqa.attend(q_BTHK, k_BSJK, v_BSJK, mask_BTS, 0.7)
    expected_BTHK = brute_force_attention(
        q_BTHK, k_BSJK, v_BSJK, lambda b, t, s: bool(mask_BTS[b, t, s]), 0.7
    )
    torch.testing.assert_close(found_BTHK, expected_BTHK.float())
    by_torch_BHTK = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q_BTHK, k_BSJK, v_BSJK)),
        attn_mask=mask_BTS[:, None],
        scale=0.7,
        enable_gqa=True,
    )
    torch.testing.assert_close(found_BTHK, by_torch_BHTK.transpose(1, 2))


@torch.no_grad()
@pytest.mark.parametrize(("H", "J"), GROUPINGS)
@pytest.mark.parametrize("window", [None, 1, 6])
def test_attention_equals_llama_and_mistral(H: int, J: int, window: int | None) -> None:
    """Guards one layer: groups against Llama's, windows against Mistral's, positions far out."""
    sizes = dict(
        hidden_size=24,
        num_attention_heads=H,
        num_key_value_heads=J,
        head_dim=8,
        attn_implementation="eager",
    )
    if window is None:
        theirs = LlamaAttention(LlamaConfig(**sizes, attention_bias=False), 0).eval()
    else:
        theirs = MistralAttention(MistralConfig(**sizes, sliding_window=window), 0).eval()
    for param in theirs.parameters():
        nn.init.normal_(param, std=0.3)
    cfg = gqa.Config(d_model=24, n_heads=H, n_kv_heads=J, head_dim=8, bias=False)
    attn = gqa.Attention(cfg, window).eval()
    attn.load_state_dict(theirs.state_dict())
    x_BTD = torch.randn(2, 20, 24)
    pos_BT = torch.tensor([[0], [4090]]) + torch.arange(20)
    turn = LlamaRotaryEmbedding(LlamaConfig(**sizes))(x_BTD, pos_BT)
    mask_11TS = torch.zeros(1, 1, 20, 20).masked_fill(~visible(20, window), -math.inf)
    expected_BTD = theirs(x_BTD, turn, mask_11TS.expand(2, 1, 20, 20))[0]
    freq_P = gqa.rope_frequencies(8, 10_000.0)
    for parts in ([20], [4, 1, 1, 11, 3]):
        cache, found = gqa.LayerCache(window), []
        for x, pos in zip(x_BTD.split(parts, 1), pos_BT.split(parts, 1), strict=True):
            found.append(attn(x, pos, gqa.rope_angles(pos, freq_P), cache))
        wrong_BTD = torch.cat(found, dim=1) - expected_BTD
        assert wrong_BTD.abs().max() < TOLERANCE * expected_BTD.abs().max()


# ---- beside the models it comes from


def read_in_parts(model: nn.Module, tokens_BT: Tensor) -> list[Tensor]:
    """Logits of the text whole, in chunks, and padded."""
    cache = model.new_cache()
    chunks = torch.cat([model(part, cache) for part in tokens_BT.split([9, 1, 1, 12, 7], 1)], 1)
    padded = model(tokens_BT, model.new_cache(torch.tensor([0, 3, 21])))
    return [model(tokens_BT), chunks, padded]


@torch.no_grad()
@pytest.mark.parametrize(("H", "K"), [(1, 8), (4, 12), (6, 4)])
def test_with_all_heads_and_no_window_it_is_chapter_2s(H: int, K: int) -> None:
    """Guards the claim that the parent is a special case: bit by bit, with the same weights."""
    sizes = dict(vocab_size=50, n_layers=2, d_model=24, n_heads=H, head_dim=K, d_ff=30)
    before = rope.Transformer(rope.Config(**sizes)).eval()
    after = gqa.Transformer(gqa.Config(**sizes, n_kv_heads=H, windows=(None,))).eval()
    for param in before.parameters():
        param.add_(0.2 * torch.randn_like(param))
    after.load_state_dict(before.state_dict())
    tokens_BT = torch.randint(50, (3, 30))
    pairs = zip(read_in_parts(before, tokens_BT), read_in_parts(after, tokens_BT), strict=True)
    for before_BTV, after_BTV in pairs:
        assert torch.equal(before_BTV, after_BTV)


@torch.no_grad()
@pytest.mark.parametrize("J", [1, 2, 3])
def test_groups_are_repeated_rows(J: int) -> None:
    """Guards what grouping means: key and value rows that several heads have in common."""
    hf = reference(starcoder2(num_key_value_heads=J), scale=2.0)
    few, tokens_BT = ours(hf, (8, None)), torch.randint(97, (3, 30))
    many = gqa.Transformer(replace(few.cfg, n_kv_heads=6)).eval()
    state = few.state_dict()
    for name, w in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = w.unflatten(0, (J, 8)).repeat_interleave(6 // J, dim=0).flatten(0, 1)
    many.load_state_dict(state)
    pairs = zip(read_in_parts(few, tokens_BT), read_in_parts(many, tokens_BT), strict=True)
    for few_BTV, many_BTV in pairs:
        assert (few_BTV - many_BTV).abs().max() < TOLERANCE * few_BTV.abs().max()
    caches = few.new_cache(), many.new_cache()
    for model, cache in zip((few, many), caches, strict=True):
        model(tokens_BT, cache)
    for layer_few, layer_many in zip(*caches, strict=True):
        assert layer_many.n_bytes() == 6 // J * layer_few.n_bytes()


@torch.no_grad()
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("windows", "n_layers"), [((1,), 3), ((2,), 1), ((4,), 3), ((3, 6), 4), ((3, None), 2)]
)
def test_reach_of_windows(windows: Windows, n_layers: int, chunked: bool) -> None:
    """Guards how far news travels: each layer carries it window - 1 tokens on, and no further."""
    n = 40
    hf = reference(starcoder2(num_hidden_layers=n_layers), scale=3.0)
    model = ours(hf, windows)
    one_1T = torch.randint(97, (1, n))
    other_1T = one_1T.clone()
    other_1T[0, 0] = (one_1T[0, 0] + 1) % 97

    def read(tokens_1T: Tensor) -> Tensor:
        cache = model.new_cache()
        sizes = [7, 1, 1, 20, 11] if chunked else [n]
        return torch.cat([model(part, cache) for part in tokens_1T.split(sizes, dim=1)], dim=1)

    differs_T = (read(one_1T) != read(other_1T)).any(-1)[0]
    steps = [windows[layer % len(windows)] for layer in range(n_layers)]
    reach = n - 1 if None in steps else sum(window - 1 for window in steps)
    assert reach < n and bool(differs_T[reach])
    assert not differs_T[reach + 1 :].any()
    assert differs_T[0]


def test_gradients_equal_transformers() -> None:
    """Guards training with groups and windows; 1e-4 of the largest of each tensor."""
    windows = (8, None)
    hf = with_windows(reference(starcoder2(theta=100.0)), windows)
    model, tokens_BT = ours(hf, windows), torch.randint(97, (2, 30))
    for logits_BTV in (model(tokens_BT), hf(tokens_BT, use_cache=False).logits):
        nn.functional.cross_entropy(logits_BTV[:, :-1].mT, tokens_BT[:, 1:]).backward()
    theirs = convert({name: p.grad for name, p in hf.named_parameters()})
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, param in model.named_parameters():
        assert param.grad.isfinite().all() and param.grad.any(), name
        assert (param.grad - theirs[name]).abs().max() < 1e-4 * theirs[name].abs().max(), name


def test_initial_weights() -> None:
    """Guards init_weights and the shapes that shrink: measured spread of every matrix."""
    cfg = gqa.Config(
        vocab_size=300, n_layers=8, d_model=64, n_heads=8, n_kv_heads=2, head_dim=16, d_ff=256
    )
    model = gqa.Transformer(cfg)
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            assert not param.any(), name
        elif "norm" in name:
            assert (param == 1).all(), name
        else:
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * 8) if into_stream else 0.02
            error = 1 / math.sqrt(2 * param.numel())  # standard error of a measured std, relative
            assert float(param.detach().std()) == pytest.approx(std, rel=5 * error), name
    attn = model.blocks[0].attn
    shapes = [tuple(getattr(attn, f"{name}_proj").weight.shape) for name in "qkvo"]
    assert shapes == [(128, 64), (32, 64), (32, 64), (64, 128)]


# ---- generation and the demo


@pytest.fixture(scope="module")
def lively() -> tuple[gqa.Transformer, PreTrainedModel]:
    """Ours and transformers', so large that greedy texts vary; the window ends in the texts."""
    hf = reference(starcoder2(), seed=1, scale=4.0)
    return ours(hf), hf


def test_generate_equals_transformers(lively: tuple[gqa.Transformer, PreTrainedModel]) -> None:
    """Guards greedy generation, and that the cache is used: one token a step after the prompt."""
    equals_generate(gqa, *lively)


def test_generate_padded_batch(lively: tuple[gqa.Transformer, PreTrainedModel]) -> None:
    """Guards prompts of unequal length in one batch."""
    same_alone_and_padded(gqa, lively[0])


def test_generate_goes_on(lively: tuple[gqa.Transformer, PreTrainedModel]) -> None:
    """Guards a cache that is handed from one call to the next."""
    goes_on(gqa, lively[0])


def test_a_long_text_in_a_short_memory(lively: tuple[gqa.Transformer, PreTrainedModel]) -> None:
    """Guards decoding far past the window: a token a step, and a cache that has stopped growing."""
    model = ours(lively[1])
    cache, lengths, held = model.new_cache(), forward_lengths(model), []
    prompt_BT = torch.randint(97, (2, 5))
    for _ in gqa.generate(model, prompt_BT, 60, cache=cache):
        held.append([layer.kept[0].shape[1] for layer in cache])
    assert lengths == [5] + [1] * 59
    assert held == [[min(n, 8)] * 3 for n in range(5, 65)]
    assert cache[0].kept[2].tolist() == [list(range(56, 64))] * 2


@dataclass(frozen=True)
class Small(gqa.Config):
    """A demo that takes no time, with the caches of the real one."""

    vocab_size: int = 256
    n_layers: int = 2
    d_model: int = 16
    d_ff: int = 16


def test_demo_prints_the_bytes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the table that the demo prints: 2 J K numbers of four bytes a token that is held."""
    monkeypatch.setattr(sys, "argv", ["gqa.py", "--n-new", "2"])
    monkeypatch.setattr(gqa, "Config", Small)
    gqa.main()
    out = capsys.readouterr().out
    assert f"the cache takes {2 * 2 * 4 * 64 * 4:,} bytes a token" in out
    rows = re.findall(r"(\d+) key/value heads, window (\w+): ([\d,]+), ([\d,]+)$", out, re.M)
    assert len(rows) == 4
    for heads, window, *printed in rows:
        limit = 1000 if window == "None" else int(window)
        sizes = [2 * int(heads) * 64 * 4 * min(n, limit) for n in (100, 1000)]
        assert printed == [f"{size:,}" for size in sizes]
