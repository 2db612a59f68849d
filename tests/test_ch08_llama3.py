"""llama3.py against transformers' Llama, Mistral and Qwen2, with each of their parts switched on.

Holds what the tests of gemma3.py share: the cache's rings and masks against brute force, and the
comparison in bfloat16. Every one takes the family's module.
"""

import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ch08_full_models import llama3
from ch08_full_models.download import MODELS
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


NO_ENDS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)  # generate goes on
SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
    **NO_ENDS,
)


# ---- what both families' caches must do


def check_ring(module: ModuleType, window: int | None, padded: bool, seed: int = 0) -> None:
    """Attention over what the cache gives equals brute force over all tokens ever seen."""
    rng = random.Random(seed)
    B, H, J, K, n = 2, 4, 2, 3, 30
    q_BTHK = torch.randn(B, n, H, K)
    k_BTJK, v_BTJK = torch.randn(2, B, n, J, K)
    tokens_BT = torch.zeros(B, n, dtype=torch.long)
    n_pad = [7, 0] if padded else [0, 0]

    def sees(b: int, t: int, s: int) -> bool:
        near = s <= t and (window is None or s > t - window)
        return near and (s >= n_pad[b] or t < n_pad[b])

    expected_BTHK = brute_force_attention(q_BTHK, k_BTJK, v_BTJK, sees, 0.6).float()
    cache = module.LayerCache(window, torch.tensor(n_pad) if padded else None)
    start = 0
    while start < n:
        n_new = min(rng.choice([1, 1, 1, 2, 3, 9, 14]), n - start)
        part = slice(start, start + n_new)
        pos_BT = cache.positions(tokens_BT[:, part])
        assert pos_BT.tolist() == [[t - p for t in range(n)[part]] for p in n_pad]
        k_BSJK, v_BSJK, pos_BS = cache.append(k_BTJK[:, part], v_BTJK[:, part], pos_BT)
        start += n_new
        assert cache.n_seen == start
        if window is not None:  # no more than is needed: the window, or what it was, and the new
            assert k_BSJK.shape[1] <= (window if n_new == 1 else window + n_new)
            assert all(buffer.shape[1] <= window for buffer in cache.buffers)
        for b, p in enumerate(n_pad):  # each token under its own position
            assert torch.equal(k_BSJK[b], k_BTJK[b, pos_BS[b] + p])
            assert torch.equal(v_BSJK[b], v_BTJK[b, pos_BS[b] + p])
        needs_mask = cache.needs_mask(n_new)
        assert needs_mask or not padded
        mask_BTS = module.causal_mask(pos_BT, pos_BS, window) if needs_mask else None
        y_BTHK = module.attend(q_BTHK[:, part], k_BSJK, v_BSJK, mask_BTS, 0.6)
        torch.testing.assert_close(y_BTHK, expected_BTHK[:, part])


def check_growth(module: ModuleType, window: int | None) -> None:
    """Buffers double, so that 1000 tokens are moved 10 times, not 1000; n_bytes is what is held."""
    cache, last, rooms = module.LayerCache(window), None, []
    for _ in range(1000):
        k_BTJK = torch.zeros(2, 1, 3, 5)
        cache.append(k_BTJK, k_BTJK, torch.zeros(2, 1).long())
        room = cache.buffers[0].shape[1]
        if cache.buffers[0] is not last:
            last = cache.buffers[0]
            rooms.append(room)
        assert cache.n_bytes() == 2 * room * 2 * 3 * 5 * 4  # keys and values, float32
    powers = [2**i for i in range(11)]
    full = powers if window is None else [p for p in powers if p < window] + [window]
    assert rooms == full


def check_first_read_is_exact(module: ModuleType) -> None:
    """A prompt takes the room of its tokens, not of the next power of two; a window caps it."""
    for window, room in ((None, 100), (64, 64), (100, 100), (300, 100)):
        cache = module.LayerCache(window)
        k_BTJK = torch.zeros(1, 100, 2, 4)
        cache.append(k_BTJK, k_BTJK, torch.zeros(1, 100).long())
        assert cache.buffers[0].shape[1] == room


def masks_built(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]
) -> list[tuple[tuple[int, ...], int | None]]:
    """Shape and window of each mask that the call builds."""
    built = []
    causal_mask = module.causal_mask

    def record(q_pos_BT: Tensor, k_pos_BS: Tensor, window: int | None) -> Tensor:
        mask_BTS = causal_mask(q_pos_BT, k_pos_BS, window)
        built.append((tuple(mask_BTS.shape), window))
        return mask_BTS

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "causal_mask", record)
        call()
    return built


def check_gradients(module: ModuleType, model: nn.Module, hf: PreTrainedModel) -> None:
    """Gradients are finite and transformers' own, to 1e-4 of the largest of their tensor."""
    tokens_BT = torch.randint(hf.config.vocab_size, (2, 30))
    for logits_BTV in (model(tokens_BT), hf(tokens_BT, use_cache=False).logits):
        nn.functional.cross_entropy(logits_BTV[:, :-1].mT, tokens_BT[:, 1:]).backward()
    theirs = {name: p.grad for name, p in hf.named_parameters()}
    zeros = module.convert({name: torch.zeros_like(g) for name, g in theirs.items()})
    theirs = {name: g - zeros[name] for name, g in module.convert(theirs).items()}  # Gemma adds 1
    ours = {name: p.grad for name, p in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert grad.isfinite().all() and grad.any(), name
        assert (grad - theirs[name]).abs().max() < 1e-4 * theirs[name].abs().max(), name


def in_bfloat16(module: ModuleType, folder: Path) -> nn.Module:
    """The folder's model in bfloat16, as a loader builds it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = module.Transformer(module.config_from_hf(config))
    finally:
        torch.set_default_dtype(torch.float32)
    module.load_weights(model, load_file(folder / "model.safetensors"))
    return model.eval()


@torch.no_grad()
def bfloat16_errors(
    module: ModuleType, configs: list[PretrainedConfig], folder: Path
) -> tuple[float, float]:
    """Ours and transformers' root-mean-square error in bfloat16, in parts of the logits' own.

    What is right is transformers' result in float32 from the same rounded weights.
    """
    ours, theirs = [], []
    for seed, config in enumerate(configs):
        hf = reference(config, seed)
        for param in hf.parameters():
            param.copy_(param.bfloat16())
        hf.save_pretrained(folder / str(seed))
        half = AutoModelForCausalLM.from_pretrained(
            folder / str(seed), dtype=torch.bfloat16, attn_implementation="eager"
        )
        tokens_BT = torch.randint(config.vocab_size, (4, 64))
        expected_BTV = hf(tokens_BT).logits
        for found, model in ((ours, in_bfloat16(module, folder / str(seed))), (theirs, half)):
            logits = model(tokens_BT)
            logits_BTV = logits if isinstance(logits, Tensor) else logits.logits
            assert logits_BTV.dtype == torch.bfloat16
            wrong_BTV = logits_BTV.float() - expected_BTV
            found.append(float(wrong_BTV.square().mean() / expected_BTV.square().mean()))
    return math.sqrt(sum(ours) / len(ours)), math.sqrt(sum(theirs) / len(theirs))


# ---- Llama, Mistral, Qwen2

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)


def rope(theta: float = 10_000.0, **scaling: object) -> dict:
    return {"rope_type": "default", "rope_theta": theta} | scaling


def llama(**changes: object) -> LlamaConfig:
    return LlamaConfig(**SIZES | changes)


def mistral(**changes: object) -> MistralConfig:
    return MistralConfig(**SIZES | dict(sliding_window=8) | changes)


def qwen2(**changes: object) -> Qwen2Config:
    sliding = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    return Qwen2Config(**SIZES | sliding | changes)


STRETCHED = rope(1000.0, **LLAMA3, original_max_position_embeddings=32)
CASES = {  # all texts have 40 tokens: every window is smaller than the text
    "Llama, tied": llama(tie_word_embeddings=True),
    "Llama, untied": llama(),
    "Llama, every head its own keys": llama(num_key_value_heads=6),
    "Llama, one key head": llama(num_key_value_heads=1),
    "Llama, narrow heads": llama(head_dim=4),
    "Llama, wide heads": llama(head_dim=32, hidden_size=36),
    "Llama, one layer": llama(num_hidden_layers=1),
    "Llama, low base": llama(rope_parameters=rope(50.0)),
    "Llama, large epsilon": llama(rms_norm_eps=0.05),
    "Llama 3.1, scaled": llama(head_dim=16, rope_parameters=STRETCHED),
    "Llama 3.2, scaled more": llama(
        head_dim=20, rope_parameters=STRETCHED | {"factor": 32.0, "rope_theta": 5e5}
    ),
    "Llama, scaled, other borders": llama(
        head_dim=16,
        rope_parameters=STRETCHED | {"low_freq_factor": 0.5, "high_freq_factor": 2.0},
        tie_word_embeddings=True,
    ),
    "Mistral": mistral(),
    "Mistral, window of one": mistral(sliding_window=1),
    "Mistral, window of the text": mistral(sliding_window=40),
    "Mistral, window one short": mistral(sliding_window=39),
    "Mistral, without a window": mistral(sliding_window=None),
    "Mistral, one key head": mistral(num_key_value_heads=1, sliding_window=5, head_dim=10),
    "Qwen2, all layers see everything": qwen2(use_sliding_window=False),
    "Qwen2, first layer sees everything": qwen2(),
    "Qwen2, last layer has a window": qwen2(max_window_layers=2, tie_word_embeddings=True),
    "Qwen2, all layers have a window": qwen2(max_window_layers=0, sliding_window=3),
    "Qwen2, one key head": qwen2(num_key_value_heads=1, use_sliding_window=False),
}


def drawn(seed: int) -> PretrainedConfig:
    """A config drawn from what these families can be, with several parts switched on."""
    rng = random.Random(seed)
    kind = rng.choice([llama, mistral, qwen2])
    n_kv_heads, groups, head_dim = rng.randint(1, 3), rng.randint(1, 4), 2 * rng.randint(2, 10)
    n_heads = n_kv_heads * groups
    changes = dict(
        vocab_size=rng.randint(20, 200),
        hidden_size=n_heads * rng.randint(3, 12),
        intermediate_size=rng.randint(10, 120),
        num_hidden_layers=rng.randint(1, 5),
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=rng.choice([1e-6, 1e-5, 1e-2]),
        tie_word_embeddings=rng.random() < 0.5,
        rope_parameters=rope(rng.choice([100.0, 1e4, 1e6])),
    )
    if kind is llama and rng.random() < 0.6:
        changes["rope_parameters"] |= LLAMA3 | {
            "factor": rng.choice([2.0, 8.0, 32.0]),
            "original_max_position_embeddings": rng.randint(12, 36),
        }
    if kind is not llama:
        changes["sliding_window"] = rng.randint(1, 20)
    if kind is qwen2:
        changes["max_window_layers"] = rng.randint(0, 2)
    return kind(**changes)


CASES |= {f"drawn {seed}": drawn(seed) for seed in range(12)}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """Guards the forward pass: whole, with the cache, in chunks, padded; from one file or many."""
    hf = reference(CASES[name])
    many = len(name) % 2 == 0
    hf.save_pretrained(tmp_path, max_shard_size="20KB" if many else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == many
    assert_equal(llama3.load_folder(tmp_path), hf)


OFF = {  # a part and what it is when it does nothing
    "rotary base": ("Llama, low base", dict(rope_theta=10_000.0)),
    "epsilon": ("Llama, large epsilon", dict(norm_eps=1e-5)),
    "scaling": ("Llama 3.1, scaled", dict(rope_scaling=None)),
    "window": ("Mistral", dict(windows=(None,))),
    "window one short": ("Mistral, window one short", dict(windows=(40,))),
    "window in some layers": ("Qwen2, first layer sees everything", dict(windows=(8,))),
    "window in the last layer": ("Qwen2, last layer has a window", dict(windows=(None,))),
}


@pytest.mark.parametrize("part", OFF)
def test_parts_are_switched_on(part: str, tmp_path: Path) -> None:
    """Guards the cases above: without the part the logits are others."""
    name, off = OFF[part]
    hf = reference(CASES[name])
    hf.save_pretrained(tmp_path)
    model = llama3.load_folder(tmp_path)
    without = llama3.Transformer(dataclasses.replace(model.cfg, **off))
    llama3.load_weights(without, model.state_dict())
    assert next(errors(without, hf))[1] > 1e-3


def test_scaling_has_three_bands() -> None:
    """Guards the scaled cases: some pairs are left alone, some slowed down, some in between."""
    for name, config in CASES.items():
        if "scaled" in name:
            cfg = llama3.config_from_hf(config.to_dict())
            plain_P = llama3.rope_frequencies(cfg.head_dim, cfg.rope_theta, None)
            freq_P = llama3.rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
            ratio_P = freq_P / plain_P
            slowest = 1 / cfg.rope_scaling.factor
            assert torch.isclose(ratio_P, torch.ones(())).any(), name
            assert torch.isclose(ratio_P, torch.tensor(slowest)).any(), name
            assert ((ratio_P > 1.05 * slowest) & (ratio_P < 0.95)).any(), name


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (
            "llama3.2-1b",
            {0: 1.0, 1: 0.663601, 8: 0.037606, 16: 4.29557e-4, 24: 1.66197e-6, 31: 9.41831e-8},
        ),
        ("llama3.1-8b", {0: 1.0, 32: 5.24846e-4, 48: 6.64787e-6, 63: 3.06893e-7}),
    ],
)
def test_frequencies_of_published_models(name: str, values: dict[int, float]) -> None:
    """Guards Llama 3's scaling: known figures, and transformers' own from the same config."""
    cfg = llama3.config_from_hf(MODELS[name].config)
    freq_P = llama3.rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    for pair, value in values.items():
        assert float(freq_P[pair]) == pytest.approx(value, rel=1e-5)
    theirs_P, factor = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**MODELS[name].config), "cpu")
    assert factor == 1.0
    torch.testing.assert_close(freq_P, theirs_P, rtol=1e-6, atol=0)


def test_positions_beyond_4096(tmp_path: Path) -> None:
    """Guards the angles far out: they must be computed in float32, at every step of a long text."""
    config = llama(
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_size=16,
        head_dim=8,
        max_position_embeddings=8192,
    )
    hf = reference(config)
    hf.save_pretrained(tmp_path)
    model = llama3.load_folder(tmp_path)
    tokens_1T = torch.randint(97, (1, 4200))
    with torch.no_grad():
        expected_1TV = hf(tokens_1T).logits
        cache = model.new_cache()
        found_1TV = torch.cat([model(t, cache) for t in tokens_1T.split([4000, 1, 190, 9], 1)], 1)
    assert (found_1TV - expected_1TV).abs().max() < TOLERANCE * expected_1TV.abs().max()


def test_angles_stay_in_float32() -> None:
    """Guards bfloat16 models: 8 bits cannot tell position 30,000 from 30,001."""
    torch.set_default_dtype(torch.bfloat16)
    freq_P = llama3.rope_frequencies(8, 10_000.0, llama3.RopeScaling(8.0, 1.0, 4.0, 8192))
    cos, sin = llama3.rope_angles(torch.tensor([[30_000, 30_001]]), freq_P)
    torch.set_default_dtype(torch.float32)
    assert freq_P.dtype == cos.dtype == sin.dtype == torch.float32
    angle = 30_001 * freq_P.double()
    torch.testing.assert_close(cos[0, 1, 0], angle.cos().float(), atol=5e-3, rtol=0)
    torch.testing.assert_close(sin[0, 1, 0], angle.sin().float(), atol=5e-3, rtol=0)


# ---- mistakes

PLAIN, WINDOW, SCALED, BIASED = "plain", "window", "scaled", "biased"
SPOILT = {
    PLAIN: llama(rms_norm_eps=0.01, head_dim=12, rope_parameters=rope(100.0)),
    WINDOW: mistral(),
    SCALED: llama(head_dim=16, rope_parameters=STRETCHED),
    BIASED: qwen2(use_sliding_window=False),
}
MUTANTS = {
    "window one too wide": (WINDOW, "> q_pos_BT1 - window -> >= q_pos_BT1 - window"),
    "window one too narrow": (WINDOW, "> q_pos_BT1 - window -> > q_pos_BT1 - window + 1"),
    "window ignored by the mask": (
        WINDOW,
        "mask_BTS if window is None else -> mask_BTS if True else",
    ),
    "ring one off": (WINDOW, "[:, n_old % self.window] -> [:, (n_old + 1) % self.window]"),
    "ring in the wrong order": (WINDOW, "buffer[:, kept] = -> buffer[:, kept.flip(0)] ="),
    "ring keeps the oldest": (WINDOW, "= t[:, -self.window :] -> = t[:, : len(kept)]"),
    "chunk forgets the ring": (WINDOW, "torch.cat((buffer[:, old], t), dim=1) -> t"),
    "growing loses the old": (PLAIN, "[:, :room] = old -> [:, :room] = 0 * old"),
    "first long read without a mask": (WINDOW, "and n_new <= (self.window or n_new) -> "),
    "later chunks without a mask": (PLAIN, "(first or n_new == 1) -> (first or n_new >= 1)"),
    "padding without a mask": (PLAIN, "self.n_pad_B is not None or -> "),
    "padding is seen": (PLAIN, " & ((k_pos_B1S >= 0) | (q_pos_BT1 < 0)) -> "),
    "padding takes positions": (WINDOW, "pos_T - n_pad) -> pos_T - 0 * n_pad)"),
    "positions start again with each call": (PLAIN, "self.n_seen + torch.arange -> torch.arange"),
    "query heads interleaved": (
        PLAIN,
        "y_BHTK.transpose(1, 2) -> "
        "y_BHTK.transpose(1, 2).unflatten(2, (k_BSJK.shape[2], -1)).transpose(2, 3).flatten(2, 3)",
    ),
    "keys repeated in turn": (
        PLAIN,
        "k_BSJK.transpose(1, 2), -> k_BSJK.transpose(1, 2).repeat(1, 3, 1, 1),",
        "v_BSJK.transpose(1, 2), -> v_BSJK.transpose(1, 2).repeat(1, 3, 1, 1),",
    ),
    "rotary pairs side by side": (
        PLAIN,
        "x_BTHK.chunk(2, dim=-1) -> x_BTHK[..., ::2], x_BTHK[..., 1::2]",
    ),
    "turned the other way": (
        PLAIN,
        "a_BTHP * cos_BT1P - b_BTHP -> a_BTHP * cos_BT1P + b_BTHP",
    ),
    "queries not turned": (PLAIN, "q_BTHK = rope(q_BTHK, turn) -> pass"),
    "values turned": (PLAIN, "append(k_BTJK, v_BTJK -> append(k_BTJK, rope(v_BTJK, turn)"),
    "frequencies over P, not K": (PLAIN, ".float() / head_dim) -> .float() / (head_dim // 2))"),
    "blend inverted": (SCALED, "keep_P = (( -> keep_P = 1 - (("),
    "everything stretched": (SCALED, "clamp(0, 1) -> clamp(0, 0)"),
    "turns without 2 pi": (SCALED, "/ (2 * math.pi) -> "),
    "scaling multiplies": (SCALED, "freq_P / scaling.factor -> freq_P * scaling.factor"),
    "no epsilon": (PLAIN, "mean_square + self.eps -> mean_square"),
    "epsilon outside the root": (
        PLAIN,
        "torch.rsqrt(mean_square + self.eps) -> 1 / (mean_square.sqrt() + self.eps)",
    ),
    "norm by the sum": (PLAIN, "x.float().square().mean( -> x.float().square().sum("),
    "gate on the wrong matrix": (
        PLAIN,
        "silu(self.gate_proj(x)) * self.up_proj(x) -> silu(self.up_proj(x)) * self.gate_proj(x)",
    ),
    "GELU for SiLU": (PLAIN, "F.silu( -> F.gelu("),
    "scale 1 / head_dim": (PLAIN, "self.head_dim**-0.5 -> self.head_dim**-1.0"),
    "scale of the width": (PLAIN, "self.head_dim**-0.5 -> (x_BTD.shape[-1] / 6) ** -0.5"),
    "query bias lost": (BIASED, "self.q_proj(x_BTD) -> F.linear(x_BTD, self.q_proj.weight)"),
    "key bias lost": (BIASED, "self.k_proj(x_BTD) -> F.linear(x_BTD, self.k_proj.weight)"),
    "value bias lost": (BIASED, "self.v_proj(x_BTD) -> F.linear(x_BTD, self.v_proj.weight)"),
    "norms exchanged": (
        PLAIN,
        "{}.post_attention_layernorm -> {}.exchanged",
        "{}.input_layernorm -> {}.post_attention_layernorm",
        "{}.exchanged -> {}.input_layernorm",
    ),
    "final norm lost": (PLAIN, "x_BTD = self.norm(x_BTD) -> pass"),
    "head is the embedding": (PLAIN, "self.embed if cfg.tied else self.head -> self.embed"),
    "last_only gives the first": (PLAIN, "x_BTD[:, -1:] if -> x_BTD[:, :1] if"),
}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, PreTrainedModel]]:
    """Folders that transformers wrote, and the models in them; they are right as they are."""
    made = {}
    for name, config in SPOILT.items():
        hf = reference(config, scale=2.0)
        made[name] = tmp_path_factory.mktemp(name), hf
        hf.save_pretrained(made[name][0])
        assert_equal(llama3.load_folder(made[name][0]), hf)
    return made


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str, spoilt: dict[str, tuple[Path, PreTrainedModel]]) -> None:
    """Guards the comparison with transformers: with a mistake in the source it must fail."""
    case, *changes = MUTANTS[name]
    folder, hf = spoilt[case]
    assert_noticed(mutant(llama3, *changes).load_folder(folder), hf)


# ---- parts


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 12, 30])
def test_ring(window: int | None, padded: bool) -> None:
    """Guards the cache: no token is lost, none is seen that is too old, at any chunk size."""
    for seed in range(2):
        check_ring(llama3, window, padded, seed)


@pytest.mark.parametrize("window", [None, 1, 24, 64])
def test_buffers_double(window: int | None) -> None:
    """Guards the cost of a token, and the memory of a layer with a window."""
    check_growth(llama3, window)


def test_first_read_is_exact() -> None:
    """Guards the memory of a long prompt."""
    check_first_read_is_exact(llama3)


def test_causal_mask_by_loops() -> None:
    """Guards who sees whom."""
    check_mask_by_loops(llama3)


def test_attend_by_loops() -> None:
    """Guards the call of torch's kernel: heads, groups, mask and scale."""
    q, k, v = torch.randn(2, 5, 6, 3), torch.randn(2, 5, 2, 3), torch.randn(2, 5, 2, 3)
    causal = brute_force_attention(q, k, v, lambda b, t, s: s <= t, 0.7).float()
    torch.testing.assert_close(llama3.attend(q, k, v, None, 0.7), causal)
    mask_BTS = torch.rand(2, 5, 5) > 0.5
    mask_BTS[:, :, 0] = True
    masked = brute_force_attention(q, k, v, lambda b, t, s: bool(mask_BTS[b, t, s]), 0.7).float()
    torch.testing.assert_close(llama3.attend(q, k, v, mask_BTS, 0.7), masked)
    last = brute_force_attention(q[:, 4:], k, v, lambda b, t, s: True, 0.7).float()
    torch.testing.assert_close(llama3.attend(q[:, 4:], k, v, None, 0.7), last)


def test_masks_are_built_only_where_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards speed and memory: no mask larger than new x seen, and none that would be all true."""
    cfg = llama3.config_from_hf(qwen2(num_hidden_layers=2).to_dict())
    assert cfg.windows == (None, 8)
    model = llama3.Transformer(cfg)
    tokens_BT = torch.zeros(3, 40, dtype=torch.long)

    def built(cache: list, n: int) -> list:
        return masks_built(llama3, monkeypatch, lambda: model(tokens_BT[:, :n], cache))

    cache = model.new_cache()
    assert built(cache, 8) == []  # a first read within the window
    assert [built(cache, 1) for _ in range(10)] == [[]] * 10
    assert built(cache, 5) == [((3, 5, 23), None), ((3, 5, 8 + 5), 8)]
    assert built(cache, 20) == [((3, 20, 43), None), ((3, 20, 8 + 20), 8)]
    assert built(cache, 1) == []
    assert built(model.new_cache(), 30) == [((3, 30, 30), 8)]  # only the layer with a window
    assert built(model.new_cache(), 1) == []
    cache = model.new_cache(torch.tensor([0, 3, 9]))
    assert built(cache, 12) == [((3, 12, 12), None), ((3, 12, 12), 8)]
    assert built(cache, 1) == [((3, 1, 13), None), ((3, 1, 8), 8)]


def test_norm_rounds_in_llamas_order() -> None:
    """Guards RMSNorm in bfloat16, bit by bit: rounded first, then times the weight."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(64, eps=1e-5).bfloat16()
    theirs.weight.data = torch.randn(64).bfloat16()
    ours = llama3.RMSNorm(64, 1e-5).bfloat16()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(50, 64).bfloat16()
    assert torch.equal(ours(x), theirs(x))


def test_bfloat16_is_as_good_as_transformers(tmp_path: Path) -> None:
    """Guards the rounding in bfloat16: an error of 2 %, and at most 1.5 times transformers'."""
    configs = [llama(num_hidden_layers=4), mistral(), qwen2(), llama(rope_parameters=STRETCHED)]
    ours, theirs = bfloat16_errors(llama3, configs, tmp_path)
    assert ours < 0.02
    assert ours < 1.5 * theirs


def test_gradients_equal_transformers(tmp_path: Path) -> None:
    """Guards training: no part is cut off from the loss, not by the cache's buffers either."""
    hf = reference(qwen2())
    hf.save_pretrained(tmp_path)
    check_gradients(llama3, llama3.load_folder(tmp_path), hf)


def test_initial_weights() -> None:
    """Guards init_weights: spread of every matrix, and the biases and norm weights."""
    cfg = llama3.Config(
        vocab_size=300,
        n_layers=8,
        d_model=64,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        d_ff=96,
        qkv_bias=True,
        tied=False,
    )
    for name, param in llama3.Transformer(cfg).named_parameters():
        if name.endswith("bias"):
            assert not param.any(), name
        elif "norm" in name:
            assert (param == 1).all(), name
        else:
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * 8) if into_stream else 0.02
            error = 1 / math.sqrt(2 * param.numel())
            assert float(param.detach().std()) == pytest.approx(std, rel=5 * error), name


# ---- generation


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> tuple[llama3.Transformer, PreTrainedModel]:
    """Ours and transformers': Qwen2 with a window, whose greedy texts vary."""
    folder = tmp_path_factory.mktemp("lively")
    hf = reference(qwen2(tie_word_embeddings=True), scale=3.0)
    hf.save_pretrained(folder)
    return llama3.load_folder(folder), hf


def test_generate_equals_transformers(lively: tuple[llama3.Transformer, PreTrainedModel]) -> None:
    """Guards greedy generation, and that the cache is used: one token a step after the prompt."""
    equals_generate(llama3, *lively)


def test_generate_padded_batch(lively: tuple[llama3.Transformer, PreTrainedModel]) -> None:
    """Guards prompts of unequal length in one batch."""
    same_alone_and_padded(llama3, lively[0])


def test_generate_goes_on(lively: tuple[llama3.Transformer, PreTrainedModel]) -> None:
    """Guards a cache that is handed from one call to the next."""
    goes_on(llama3, lively[0])


def test_decoding_reads_one_token_a_step() -> None:
    """Guards the cost of a step: in no layer is an old token computed again."""
    model = llama3.Transformer(llama3.config_from_hf(mistral().to_dict()))
    lengths = forward_lengths(model)
    read = [forward_lengths(block.attn) for block in model.blocks]
    list(llama3.generate(model, torch.zeros(1, 20, dtype=torch.long), 15))
    assert lengths == [20] + [1] * 14
    assert read == [lengths] * 3


# ---- loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A folder that transformers wrote, with biases and a tied head, and the model in it."""
    folder = tmp_path_factory.mktemp("saved")
    hf = reference(qwen2(tie_word_embeddings=True))
    hf.save_pretrained(folder)
    return folder, hf


@pytest.mark.parametrize(
    "extra",
    [
        {"lm_head.weight": (97, 48)},
        {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (4,) for i in range(3)},
        {"model.rotary_emb.inv_freq": (4,)},
    ],
    ids=["tied head", "rotary tables", "one rotary table"],
)
def test_tensors_that_say_nothing_new(
    extra: dict[str, tuple[int, ...]], saved: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    """Guards files with a second copy of the tied head, or rotary tables of older days."""
    folder, hf = saved
    state = load_file(folder / "model.safetensors")
    save_file(state | {k: torch.zeros(v) for k, v in extra.items()}, tmp_path / "model.safetensors")
    tmp_path.joinpath("config.json").write_bytes(folder.joinpath("config.json").read_bytes())
    assert_equal(llama3.load_folder(tmp_path), hf, n=24)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.embed_tokens.weight", "embed.weight"),
        ("model.norm.weight", "norm.weight"),
        ("model.layers.1.self_attn.k_proj.bias", "blocks.1.attn.k_proj.bias"),
        ("model.layers.2.post_attention_layernorm.weight", "blocks.2.mlp_norm.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blocks.0.mlp.down_proj.weight"),
    ],
)
def test_each_tensor_must_find_its_partner(
    theirs: str, ours: str, saved: tuple[Path, PreTrainedModel]
) -> None:
    """Guards strict loading: missing, left over, misshapen; both names and shapes are said."""
    folder = saved[0]
    state = load_file(folder / "model.safetensors")
    model = llama3.load_folder(folder)
    with pytest.raises(KeyError) as error:
        llama3.load_weights(model, {name: w for name, w in state.items() if name != theirs})
    assert theirs in str(error.value) and ours in str(error.value)
    extra = theirs.replace("model.", "model.extra.", 1)
    with pytest.raises(KeyError, match=extra):
        llama3.load_weights(model, state | {extra: state[theirs]})
    wrong = torch.zeros(1, *state[theirs].shape[1:])  # a plain copy would broadcast it
    with pytest.raises(ValueError) as error:
        llama3.load_weights(model, state | {theirs: wrong})
    for part in (theirs, ours, str(tuple(wrong.shape)), str(tuple(state[theirs].shape))):
        assert part in str(error.value)


def test_missing_head_is_an_error(saved: tuple[Path, PreTrainedModel]) -> None:
    """Guards untied models: the head must be in the file. And biases, which Llama has none of."""
    state = load_file(saved[0] / "model.safetensors")
    with pytest.raises(KeyError, match="lm_head.weight"):
        llama3.load_weights(llama3.Transformer(llama3.config_from_hf(qwen2().to_dict())), state)
    tied_llama = llama(tie_word_embeddings=True)
    with pytest.raises(KeyError, match="bias"):
        llama3.load_weights(llama3.Transformer(llama3.config_from_hf(tied_llama.to_dict())), state)


KINDS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
PUBLISHED = [name for name, model in MODELS.items() if model.config["model_type"] in KINDS]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    """Guards the published configs, without their bytes: parameters, names and shapes."""
    published = MODELS[name].config
    hf_config = KINDS[published["model_type"]](**published)
    with torch.device("meta"):
        model = llama3.Transformer(llama3.config_from_hf(published))
        hf = AutoModelForCausalLM.from_config(hf_config)
    assert sum(p.numel() for p in model.parameters()) == MODELS[name].parameters
    assert sum(p.numel() for p in hf.parameters()) == MODELS[name].parameters
    llama3.load_weights(model, hf.state_dict())
    assert llama3.config_from_hf(hf_config.to_dict()) == model.cfg  # with every key there is


def older(config: dict) -> dict:
    """The config as it was written before transformers 5: rope in two keys."""
    today = config.pop("rope_parameters")
    config["rope_theta"] = today.pop("rope_theta")
    config["rope_scaling"] = None if today["rope_type"] == "default" else today
    return config


def oldest(config: dict) -> dict:
    """As before that: the kind of scaling is its `type`."""
    config = older(config)
    if config["rope_scaling"]:
        config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    return config


def silent(config: dict) -> dict:
    """Without the keys that only say what their absence says."""
    config = older(config)
    absent = {
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "layer_types": config.get("layer_types"),  # max_window_layers says it as well
    }
    return {k: v for k, v in config.items() if k not in absent or v != absent[k]}


@pytest.mark.parametrize("edit", [older, oldest, silent])
@pytest.mark.parametrize("name", CASES)
def test_older_configs(name: str, edit: Callable[[dict], dict], tmp_path: Path) -> None:
    """Guards config.json as older versions wrote it: it gives the same Config."""
    CASES[name].save_pretrained(tmp_path)
    today = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "rope_parameters" in today
    old = edit(json.loads(json.dumps(today)))
    assert "rope_parameters" not in old
    assert llama3.config_from_hf(old) == llama3.config_from_hf(today)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
        ({"attention_bias": True}, "attention_bias.*True"),
        ({"mlp_bias": True}, "mlp_bias.*True"),
        ({"rope_parameters": rope(rope_type="yarn", factor=4.0)}, "rope_scaling.*yarn"),
        ({"rope_parameters": rope(rope_type="linear", factor=4.0)}, "rope_scaling.*linear"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_scaling.*dynamic"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "longrope"}}, "rope.*longrope"),
    ],
)
def test_config_that_cannot_be_run(change: dict, said: str) -> None:
    """Guards against running a variant as if it were Llama: the key and its value are said."""
    with pytest.raises(ValueError, match=said):
        llama3.config_from_hf(llama().to_dict() | change)


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
def test_config_without_a_key(key: str) -> None:
    """Guards against guessing a size."""
    config = llama().to_dict()
    del config[key]
    with pytest.raises(KeyError, match=key):
        llama3.config_from_hf(config)
