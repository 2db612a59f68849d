"""mla.py against transformers' DeepSeek-V2 and V3, its two forms against each other and by loops.

The reference is a whole DeepSeek model of transformers in which the attention is theirs, and the
rest is exchanged for torch's own modules, to be what the chapter has: LayerNorm and a GELU MLP.
"""

import copy
import dataclasses
import itertools
import math
import random
from collections import OrderedDict
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV2Config, DeepseekV3Config, PretrainedConfig, PreTrainedModel
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from ch03_gqa import gqa
from ch04_mla import mla
from tests.parity import (
    TOLERANCE,
    assert_equal,
    assert_noticed,
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


# ---- the reference, and our model with its weights

N_LAYERS = 2
SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=N_LAYERS,
    first_k_dense_replace=99,  # no experts
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=20,
    kv_lora_rank=24,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=14,
    rms_norm_eps=1e-5,
    max_position_embeddings=128,
    attention_bias=True,
    tie_word_embeddings=True,
    bos_token_id=None,  # generate goes on
    eos_token_id=None,
    pad_token_id=None,
)


def rope(theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": theta}


def v2(**changes: object) -> DeepseekV2Config:
    return DeepseekV2Config(**SIZES | dict(rope_parameters=rope(10_000.0)) | changes)


def v3(**changes: object) -> DeepseekV3Config:
    return DeepseekV3Config(**SIZES | dict(rope_parameters=rope(10_000.0)) | changes)


@dataclasses.dataclass(frozen=True)
class Case:
    """A reference, and what a DeepSeek config does not say."""

    config: PretrainedConfig
    windows: tuple[int | None, ...] = (None,)  # as in Config
    rms: bool = False  # latent norms of DeepSeek itself, also put into ours; else LayerNorm in both
    quiet: float = 1.0  # size of the latents before their norm; small, the norms' epsilon matters
    scale: float = 2.0  # of all matrices: attention is not flat


def exchange(parent: nn.Module, name: str, module: nn.Module, scale: float) -> None:
    """Puts the module in the place of another; all its parameters are drawn anew."""
    for param in module.parameters():
        if param.ndim == 1:
            param += torch.randn_like(param) * 0.3
        else:
            param.copy_(torch.randn_like(param) * 0.08 * scale)
    setattr(parent, name, module)


def show_window(attn: nn.Module, window: int) -> None:
    """Each later call of transformers' attention sees only the last `window` tokens."""

    def masked(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        n = kwargs["hidden_states"].shape[1]
        ago_TT = torch.arange(n)[:, None] - torch.arange(n)
        hidden_TT = (ago_TT < 0) | (ago_TT >= window)
        mask_11TT = torch.zeros(1, 1, n, n).masked_fill(hidden_TT, -math.inf)
        return args, kwargs | {"attention_mask": mask_11TT}

    attn.register_forward_pre_hook(masked, with_kwargs=True)


@torch.no_grad()
def oracle(case: Case, seed: int = 0) -> PreTrainedModel:
    """transformers' model with all norms and MLPs exchanged, and the attention as it is."""
    config = case.config
    hf = reference(config, seed, case.scale)
    width, eps, bias = config.hidden_size, config.rms_norm_eps, config.attention_bias
    exchange(hf.model, "norm", nn.LayerNorm(width, eps), case.scale)
    for i, layer in enumerate(hf.model.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            exchange(layer, name, nn.LayerNorm(width, eps), case.scale)
        mlp = OrderedDict(
            up_proj=nn.Linear(width, config.intermediate_size, bias),
            gelu=nn.GELU("tanh"),
            down_proj=nn.Linear(config.intermediate_size, width, bias),
        )
        exchange(layer, "mlp", nn.Sequential(mlp), case.scale)
        attn, latents = layer.self_attn, ["kv"] if config.q_lora_rank is None else ["kv", "q"]
        for latent in latents:
            norm = getattr(attn, f"{latent}_a_layernorm")
            width_latent = norm.weight.numel()
            if not case.rms:
                own_norm = nn.LayerNorm(width_latent, 1e-6)
                exchange(attn, f"{latent}_a_layernorm", own_norm, case.scale)
            down = attn.kv_a_proj_with_mqa if latent == "kv" else attn.q_a_proj
            for param in down.parameters():
                param[:width_latent] *= case.quiet
        if window := case.windows[i % len(case.windows)]:
            show_window(attn, window)
    return hf.eval()


NAMES = {  # theirs and ours, part by part
    "embed_tokens": "embed",
    "layers": "blocks",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn": "attn",
    "q_a_layernorm": "q_a_norm",
    "kv_a_layernorm": "kv_a_norm",
    "kv_a_proj_with_mqa": "kv_a_proj",
}


def halves(config: PretrainedConfig) -> Tensor:
    """Where our rotary dimensions are in theirs, (R,): they turn (0, 1), (2, 3), ...; we by halves.

    V3 can be told to turn by halves as well.
    """
    order_R = torch.arange(config.qk_rope_head_dim)
    return order_R.view(-1, 2).T.flatten() if getattr(config, "rope_interleave", True) else order_R


def convert(state: dict[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
    """transformers' tensors, or their gradients, under our names and in our order."""
    order_R, n_heads = halves(config), config.num_attention_heads
    converted = {}
    for name, w in state.items():
        if name == "lm_head.weight":
            continue  # the embedding once more
        if "kv_a_proj" in name:
            w = torch.cat((w[: -len(order_R)], w[-len(order_R) :][order_R]))
        if name.endswith(("q_proj.weight", "q_b_proj.weight")):
            w = w.unflatten(0, (n_heads, -1))
            w = torch.cat((w[:, : -len(order_R)], w[:, -len(order_R) :][:, order_R]), dim=1)
            w = w.flatten(0, 1)
        parts = name.removeprefix("model.").split(".")
        converted[".".join(NAMES.get(part, part) for part in parts)] = w
    return converted


def force(model: nn.Module, form: str) -> nn.Module:
    """The model, told which form to use; "rule" leaves it its choice."""
    for block in model.blocks if form != "rule" else ():
        block.attn.absorbs = lambda *_: form == "absorbed"
    return model


def ours(
    case: Case, hf: PreTrainedModel, form: str = "rule", module: ModuleType = mla
) -> nn.Module:
    """Our model, or a spoiled one, with the reference's weights."""
    config = case.config
    cfg = module.Config(
        vocab_size=config.vocab_size,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=1,  # says nothing here
        head_dim=config.qk_nope_head_dim,
        windows=case.windows,
        d_latent=config.kv_lora_rank,
        d_q_latent=config.q_lora_rank,
        d_rope=config.qk_rope_head_dim,
        d_value=config.v_head_dim,
        d_ff=config.intermediate_size,
        bias=config.attention_bias,
        norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters["rope_theta"],
    )
    model = module.Transformer(cfg).eval()
    for block in model.blocks if case.rms else ():
        block.attn.kv_a_norm = nn.RMSNorm(cfg.d_latent, 1e-6)
        if cfg.d_q_latent is not None:
            block.attn.q_a_norm = nn.RMSNorm(cfg.d_q_latent, 1e-6)
    model.load_state_dict(convert(hf.state_dict(), config))
    return force(model, form)


# ---- the whole model

N = 24  # tokens in a text
CASES = {
    "V3": Case(v3()),
    "V3, as DeepSeek norms its latents": Case(v3(), rms=True),
    "V3, queries from the stream": Case(v3(q_lora_rank=None)),
    "V3, queries from the stream, as DeepSeek norms": Case(v3(q_lora_rank=None), rms=True),
    "V3, no biases": Case(v3(attention_bias=False)),
    "V3, turns by halves": Case(v3(rope_interleave=False)),
    "V2": Case(v2()),
    "V2, queries from the stream, as DeepSeek norms": Case(
        v2(q_lora_rank=None, attention_bias=False), rms=True
    ),
    "small latents": Case(v3(rms_norm_eps=0.05), quiet=0.01),
    "window": Case(v3(), windows=(8,)),
    "window of one in the first layer": Case(v3(), windows=(1, None)),
    "window one short in the last": Case(v3(q_lora_rank=None), windows=(None, N - 1)),
    "window, as DeepSeek norms": Case(v2(), windows=(5, 12), rms=True),
    "one head": Case(v3(num_attention_heads=1, num_key_value_heads=1)),
    "low base": Case(v3(rope_parameters=rope(50.0))),
    "one pair that turns": Case(v3(qk_rope_head_dim=2)),
    "wider rotary part than the rest": Case(v3(qk_rope_head_dim=16, qk_nope_head_dim=3)),
    "wide latent": Case(v3(kv_lora_rank=70)),
    "latent so narrow that the first read absorbs": Case(v3(kv_lora_rank=8)),
    "all widths equal": Case(
        v3(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    ),
}


def drawn(seed: int) -> Case:
    """A case drawn at random, with several parts switched on."""
    rng = random.Random(seed)
    n_heads = rng.randint(1, 6)
    changes = dict(
        vocab_size=rng.randint(20, 200),
        hidden_size=n_heads * rng.randint(3, 12),
        intermediate_size=rng.randint(10, 120),
        num_hidden_layers=rng.randint(1, 3),
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        q_lora_rank=rng.choice([None, rng.randint(4, 40)]),
        kv_lora_rank=2 * rng.randint(2, 30),  # even, since transformers' V2 takes no others
        qk_nope_head_dim=2 * rng.randint(1, 10),  # V2 takes no odd widths
        qk_rope_head_dim=2 * rng.randint(1, 8),
        v_head_dim=rng.randint(1, 20),
        rms_norm_eps=rng.choice([1e-6, 1e-5, 1e-2]),
        attention_bias=rng.random() < 0.5,
        rope_parameters=rope(rng.choice([100.0, 1e4, 1e6])),
    )
    windows = tuple(rng.choice([None, rng.randint(1, 20)]) for _ in range(rng.randint(1, 2)))
    return Case(rng.choice([v2, v3])(**changes), windows, rng.random() < 0.5)


CASES |= {f"drawn {seed}": drawn(seed) for seed in range(8)}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str) -> None:
    """Guards the forward pass, however texts are fed, with the form that the rule chooses.

    With one form alone: whole, the last logits, and in chunks.
    """
    case = CASES[name]
    hf = oracle(case)
    assert_equal(ours(case, hf), hf, n=N)
    for form in ("expanded", "absorbed"):
        for way, error in itertools.islice(errors(ours(case, hf, form), hf, n=N), 3):
            assert error < TOLERANCE, (form, way)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("name", ["V3", "window, as DeepSeek norms"])
def test_one_form_does_everything(name: str, form: str) -> None:
    """Guards each form in every way to feed texts: each could do without the other."""
    hf = oracle(CASES[name])
    assert_equal(ours(CASES[name], hf, form), hf)


OFF = {  # a part, and what it is when it does nothing
    "block's epsilon": ("small latents", dict(norm_eps=1e-5)),
    "rotary base": ("low base", dict(rope_theta=10_000.0)),
    "window": ("window", dict(windows=(None,))),
    "window in the first layer": ("window of one in the first layer", dict(windows=(None,))),
    "window one short": ("window one short in the last", dict(windows=(None,))),
}


@pytest.mark.parametrize("part", OFF)
def test_parts_are_switched_on(part: str) -> None:
    """Guards the cases above: without the part the logits are others."""
    name, off = OFF[part]
    hf = oracle(CASES[name])
    model = ours(CASES[name], hf)
    without = mla.Transformer(dataclasses.replace(model.cfg, **off))
    without.load_state_dict(model.state_dict())
    assert next(errors(without, hf))[1] > 1e-3


FAR = dict(
    num_hidden_layers=1,
    hidden_size=16,
    intermediate_size=8,
    num_attention_heads=1,
    num_key_value_heads=1,
    kv_lora_rank=6,
    qk_nope_head_dim=2,
    max_position_embeddings=8192,
)
FAR_MUTANTS = (
    "pos_BT[:, :, None, None] * freq_P -> pos_BT[:, :, None, None] % 4096 * freq_P",
    "pos_BT[:, :, None, None] * freq_P -> pos_BT[:, :, None, None].bfloat16() * freq_P",
)


@torch.no_grad()
def test_positions_beyond_4096() -> None:
    """Guards the angles far out: they must be computed in float32, at every step of a long text."""
    case = Case(v3(**FAR))
    hf = oracle(case)
    tokens_1T = torch.randint(97, (1, 4120))
    expected_1TV = hf(tokens_1T, use_cache=False).logits[:, 4000:]

    def errors_far(module: ModuleType, forms: list[str]) -> list[float]:
        """In parts of the largest logit, one a form, the text read in parts around 4096."""
        model, found = ours(case, hf, module=module), []
        cache = model.new_cache()
        model(tokens_1T[:, :4000], cache, last_only=True)
        for form in forms:
            rest = tokens_1T[:, 4000:].split([90, 1, 1, 9, 1, 18], dim=1)
            read = copy.deepcopy(cache)
            found_1TV = torch.cat([force(model, form)(part, read) for part in rest], dim=1)
            found.append(float((found_1TV - expected_1TV).abs().max() / expected_1TV.abs().max()))
        return found

    assert max(errors_far(mla, ["rule", "expanded", "absorbed"])) < TOLERANCE
    for change in FAR_MUTANTS:
        assert errors_far(mutant(mla, change), ["rule"]) > [10 * TOLERANCE], change


def gradients(model: nn.Module, tokens_BT: Tensor) -> dict[str, Tensor]:
    """Of the mean cross-entropy of all tokens but the first, by parameter."""
    out = model(tokens_BT)
    logits_BTV = out if isinstance(out, Tensor) else out.logits
    F.cross_entropy(logits_BTV[:, :-1].mT, tokens_BT[:, 1:]).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["V3", "V2, queries from the stream, as DeepSeek norms"])
def test_gradients_equal_transformers(name: str) -> None:
    """Guards training: whatever the form, no part is cut off from the loss."""
    case, tokens_BT = CASES[name], torch.randint(97, (2, 30))
    hf = oracle(case)
    theirs = convert(gradients(hf, tokens_BT), case.config)
    for form in ("rule", "expanded", "absorbed"):
        found = gradients(ours(case, hf, form), tokens_BT)
        assert found.keys() == theirs.keys()
        for key, grad in found.items():
            assert grad.isfinite().all() and grad.any(), (form, key)
            wrong = (grad - theirs[key]).abs().max()
            assert wrong < 1e-4 * theirs[key].abs().max(), (form, key)


# ---- mistakes

KV_SPLIT = "k_BSHK, v_BSHU = kv_BSHX.split(self.kv_widths, dim=-1)"
UP_SPLIT = "k_up_HKC, v_up_HUC = up_HXC.split(self.kv_widths, dim=1)"
Q_SPLIT = "q_BTHK, q_rot_BTHR = self.queries(x_BTD).split(self.q_widths, dim=-1)"
C_SPLIT = "c_BTC, k_rot_BTR = self.kv_a_proj(x_BTD).split(self.cache_widths, dim=-1)"
K_TURN = "k_rot_BTR = rope(k_rot_BTR[:, :, None], turn)[:, :, 0]"
EXPANDED_SCALE = "mask_BTS, sum(self.q_widths) ** -0.5)"
ABSORBED_SCALE = "scale = sum(self.q_widths) ** -0.5"
SHARED = "k_rot_BSR[:, :, None].expand(-1, -1, k_BSHK.shape[2], -1)"
UP_VALUE = 'torch.einsum("BTHC,HUC->BTHU", y_BTHC, v_up_HUC)'
MUTANTS = {
    "latent of the keys without its norm": "self.kv_a_norm(c_BTC) -> c_BTC",
    "latent normed twice, on its way in and at each look": (
        "form(q_BTHK, q_rot_BTHR, c_BSC, -> form(q_BTHK, q_rot_BTHR, self.kv_a_norm(c_BSC),"
    ),
    "latent normed together with the rotary key": (
        C_SPLIT + f" -> {C_SPLIT}; both_BTW = torch.cat((c_BTC, k_rot_BTR), -1); "
        "both_BTW = F.layer_norm(both_BTW, both_BTW.shape[-1:], eps=1e-6); "
        "c_BTC, k_rot_BTR = both_BTW.split(self.cache_widths, dim=-1)"
    ),
    "rotary key normed, too": (
        K_TURN + f" -> k_rot_BTR = F.layer_norm(k_rot_BTR, k_rot_BTR.shape[-1:]); {K_TURN}"
    ),
    "latent of the queries without its norm": (
        "self.q_a_norm(self.q_a_proj(x_BTD)) -> self.q_a_proj(x_BTD)"
    ),
    "rotary key not turned": f"{K_TURN} -> pass",
    "rotary query not turned": "q_rot_BTHR = rope(q_rot_BTHR, turn) -> pass",
    "nothing turned": (f"{K_TURN} -> pass", "q_rot_BTHR = rope(q_rot_BTHR, turn) -> pass"),
    "both turned backwards": "b_BTHP * sin_BT1P -> b_BTHP * -sin_BT1P",
    "pairs side by side": "x_BTHK.chunk(2, dim=-1) -> x_BTHK[..., ::2], x_BTHK[..., 1::2]",
    "rotary key turned before it is kept and after": (
        "mask_BTS = causal_mask(pos_BT, pos_BS, self.window)"
        " -> mask_BTS = causal_mask(pos_BT, pos_BS, self.window); "
        "k_rot_BSR = rope(k_rot_BSR[:, :, None], "
        "rope_angles(pos_BS, rope_frequencies(k_rot_BSR.shape[-1], 1e4)))[:, :, 0]"
    ),
    "rest of the query turned, too": (
        "q_rot_BTHR = rope(q_rot_BTHR, turn) -> q_rot_BTHR = rope(q_rot_BTHR, turn); "
        "q_BTHK = rope(q_BTHK, rope_angles(pos_BT, rope_frequencies(q_BTHK.shape[-1], 1e4)))"
    ),
    "frequencies of the other part's width": (
        "rope_frequencies(d_turn, self.cfg.rope_theta)"
        " -> rope_frequencies(self.cfg.head_dim, self.cfg.rope_theta)[: d_turn // 2]"
    ),
    "frequencies of the whole head": (
        "rope_frequencies(d_turn, self.cfg.rope_theta)"
        " -> rope_frequencies(self.cfg.head_dim + d_turn, self.cfg.rope_theta)[: d_turn // 2]"
    ),
    "expanded scales by K": f"{EXPANDED_SCALE} -> mask_BTS, self.q_widths[0] ** -0.5)",
    "absorbed scales by K": f"{ABSORBED_SCALE} -> scale = self.q_widths[0] ** -0.5",
    "absorbed scales by C + R": f"{ABSORBED_SCALE} -> scale = sum(self.cache_widths) ** -0.5",
    "query: rotary part first": (
        f"{Q_SPLIT} -> q_rot_BTHR, q_BTHK = self.queries(x_BTD).split(self.q_widths[::-1], dim=-1)"
    ),
    "cache: rotary key first": (
        f"{C_SPLIT} -> "
        "k_rot_BTR, c_BTC = self.kv_a_proj(x_BTD).split(self.cache_widths[::-1], dim=-1)"
    ),
    "expanded: value first": (
        f"{KV_SPLIT} -> v_BSHU, k_BSHK = kv_BSHX.split(self.kv_widths[::-1], dim=-1)"
    ),
    "absorbed: value first": (
        f"{UP_SPLIT} -> v_up_HUC, k_up_HKC = up_HXC.split(self.kv_widths[::-1], dim=1)"
    ),
    "key: rotary part first, query: last": (
        "k_BSHE = torch.cat((k_BSHK, k_rot_BSHR), dim=-1)"
        " -> k_BSHE = torch.cat((k_rot_BSHR, k_BSHK), dim=-1)"
    ),
    "wide key: rotary part first": (
        "k_BS1W = torch.cat((c_BSC, k_rot_BSR), dim=-1)"
        " -> k_BS1W = torch.cat((k_rot_BSR, c_BSC), dim=-1)"
    ),
    "expanded without the rotary part": (
        "q_BTHE = torch.cat((q_BTHK, q_rot_BTHR), dim=-1)"
        " -> q_BTHE = torch.cat((q_BTHK, 0 * q_rot_BTHR), dim=-1)"
    ),
    "absorbed without the rotary part": (
        "q_BTHW = torch.cat((q_BTHC, q_rot_BTHR), dim=-1)"
        " -> q_BTHW = torch.cat((q_BTHC, 0 * q_rot_BTHR), dim=-1)"
    ),
    "rotary key of each head from a wrong reshape": (
        f"{SHARED} -> k_rot_BSR.repeat(1, k_BSHK.shape[2], 1).unflatten(1, (-1, k_BSHK.shape[2]))"
    ),
    "rotary key of the first head alone": (
        f"{SHARED} -> F.pad(k_rot_BSR[:, :, None], (0, 0, 0, k_BSHK.shape[2] - 1))"
    ),
    "heads of kv_b interleaved": (
        "self.kv_b_proj(c_BSC).unflatten(-1, (-1, sum(self.kv_widths)))"
        " -> self.kv_b_proj(c_BSC).unflatten(-1, (sum(self.kv_widths), -1)).mT"
    ),
    "absorbed: heads of kv_b interleaved": (
        "unflatten(0, (-1, sum(self.kv_widths)))"
        " -> unflatten(0, (sum(self.kv_widths), -1)).transpose(0, 1)"
    ),
    "heads of the query interleaved": (
        "q.unflatten(-1, (-1, sum(self.q_widths))) -> q.unflatten(-1, (sum(self.q_widths), -1)).mT"
    ),
    "absorbed: one value matrix for all heads, their mean": (
        f"{UP_VALUE} -> "
        'torch.einsum("BTHC,HUC->BTHU", y_BTHC, v_up_HUC.mean(0, True).expand_as(v_up_HUC))'
    ),
    "absorbed: one key matrix for all heads, their mean": (
        "q_BTHK, k_up_HKC) -> q_BTHK, k_up_HKC.mean(0, True).expand_as(k_up_HKC))"
    ),
    "absorbed: the last C of the wide key as value": (
        "attend(q_BTHW, k_BS1W, c_BSC[:, :, None], -> "
        "attend(q_BTHW, k_BS1W, k_BS1W[..., -c_BSC.shape[-1] :],"
    ),
    "latent norms with the block's epsilon": (
        "LayerNorm(cfg.d_q_latent, 1e-6) -> LayerNorm(cfg.d_q_latent, cfg.norm_eps)",
        "LayerNorm(cfg.d_latent, 1e-6) -> LayerNorm(cfg.d_latent, cfg.norm_eps)",
    ),
    "key latent's epsilon 1e-5": "LayerNorm(cfg.d_latent, 1e-6) -> LayerNorm(cfg.d_latent, 1e-5)",
    "query latent's epsilon 1e-5": (
        "LayerNorm(cfg.d_q_latent, 1e-6) -> LayerNorm(cfg.d_q_latent, 1e-5)"
    ),
    "positions start again with each call": "self.n_seen + torch.arange -> torch.arange",
    "angles start again with each call": (
        "turn = rope_angles(pos_BT, -> turn = rope_angles(pos_BT - pos_BT[:, :1],"
    ),
    "padding is seen": " & ((k_pos_B1S >= 0) | (q_pos_BT1 < 0)) -> ",
    "padding takes positions": "(pos_T - n_pad) -> (pos_T - 0 * n_pad)",
    "padding is blind": " | (q_pos_BT1 < 0)) -> )",
    "sees the future": "k_pos_B1S <= q_pos_BT1 -> k_pos_B1S <= q_pos_BT1 + 1",
    "cache forgets": "self.kept or tuple -> tuple",
    "window one short": "q_pos_BT1 - window -> q_pos_BT1 - window + 1",
    "cache keeps two tokens too few": "t[:, -self.window :] -> t[:, 2 - self.window :]",
    "cache keeps the new tokens alone": "self.kept = joined -> self.kept = new",
    "window forgotten": "causal_mask(pos_BT, pos_BS, self.window)\n        form"
    " -> causal_mask(pos_BT, pos_BS, None)\n        form",
}


SHOWN_BY = {  # the case in which a mistake shows; all others show in "V3"
    "latent norms with the block's epsilon": "small latents",
    "key latent's epsilon 1e-5": "small latents",
    "query latent's epsilon 1e-5": "small latents",
    "window one short": "window",
    "cache keeps two tokens too few": "window",
    "window forgotten": "window",
}


@pytest.fixture(scope="module")
def oracles() -> dict[str, PreTrainedModel]:
    """The references of the cases that show mistakes; ours are right as they are."""
    made = {name: oracle(CASES[name]) for name in {"V3", *SHOWN_BY.values()}}
    for name, hf in made.items():
        assert_equal(ours(CASES[name], hf), hf)
    return made


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str, oracles: dict[str, PreTrainedModel]) -> None:
    """Guards the comparison with transformers: with a mistake in the source it must fail."""
    case, changes = SHOWN_BY.get(name, "V3"), MUTANTS[name]
    changes = (changes,) if isinstance(changes, str) else changes
    spoiled = ours(CASES[case], oracles[case], module=mutant(mla, *changes))
    assert_noticed(spoiled, oracles[case])


# ---- the two forms

SMALL = mla.Config(
    vocab_size=50,
    n_layers=N_LAYERS,
    d_model=26,
    n_heads=3,
    head_dim=5,
    d_latent=18,
    d_q_latent=11,
    d_rope=4,
    d_value=7,
    d_ff=34,
)


def attention(cfg: mla.Config = SMALL, window: int | None = None) -> mla.LatentAttention:
    """One attention layer with no parameter left at its initial value, in float64."""
    attn = mla.LatentAttention(cfg, window).double()
    for name, param in attn.named_parameters():
        around = 1.0 if name.endswith("norm.weight") else 0.0
        nn.init.normal_(param, mean=around, std=0.4)
    return attn


def parts(attn: mla.LatentAttention, B: int, T: int, S: int) -> list[Tensor]:
    """Random queries, cache and mask, as both forms take them; each query sees at least one."""
    (K, R), C = attn.q_widths, attn.cache_widths[0]
    H = attn.o_proj.in_features // attn.kv_widths[1]
    kind = dict(dtype=torch.float64)
    q_BTHK, q_rot_BTHR = torch.randn(B, T, H, K, **kind), torch.randn(B, T, H, R, **kind)
    c_BSC, k_rot_BSR = torch.randn(B, S, C, **kind), torch.randn(B, S, R, **kind)
    mask_BTS = torch.rand(B, T, S) < 0.6
    mask_BTS[:, :, 0] = True
    return [q_BTHK, q_rot_BTHR, c_BSC, k_rot_BSR, mask_BTS]


def paper_attention(attn: mla.LatentAttention, x_TD: Tensor, cfg: mla.Config) -> Tensor:
    """One text through equations 9 to 19 of DeepSeek-V2 in float64, by loops, (T, D).

    The norms of the latents are those of its section 3.1.2, here LayerNorm. The rotation is Su et
    al. 2021: a pair of dimensions is a complex number, times exp(i position theta).
    """
    w = {name: param.double() for name, param in attn.state_dict().items()}
    K, R, H = cfg.head_dim, cfg.d_rope, cfg.n_heads

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def turned(x_R: Tensor, pos: int) -> Tensor:
        out_R = x_R.clone()
        for i in range(R // 2):
            angle = pos * cfg.rope_theta ** (-2 * i / R)
            z = complex(x_R[i], x_R[i + R // 2]) * complex(math.cos(angle), math.sin(angle))
            out_R[i], out_R[i + R // 2] = z.real, z.imag
        return out_R

    latents, rotary_keys, outputs = [], [], []
    for t, x_D in enumerate(x_TD):
        down = w["kv_a_proj.weight"] @ x_D + w["kv_a_proj.bias"]
        latents.append(norm(down[: cfg.d_latent], "kv_a_norm"))  # 9
        rotary_keys.append(turned(down[cfg.d_latent :], t))  # 15
        c_Q = norm(w["q_a_proj.weight"] @ x_D + w["q_a_proj.bias"], "q_a_norm")  # 12
        heads = []
        for h in range(H):
            up_q = w["q_b_proj.weight"].view(H, K + R, -1)[h]
            up_kv = w["kv_b_proj.weight"].view(H, K + cfg.d_value, -1)[h]
            q_E = torch.cat((up_q[:K] @ c_Q, turned(up_q[K:] @ c_Q, t)))  # 13, 14, 16
            scores, values = [], []
            for c_C, k_R in zip(latents, rotary_keys, strict=True):
                k_E = torch.cat((up_kv[:K] @ c_C, k_R))  # 10, 17
                scores.append(float(q_E @ k_E) / math.sqrt(K + R))
                values.append(up_kv[K:] @ c_C)  # 11
            total = sum(math.exp(score) for score in scores)
            heads.append(sum(math.exp(s) / total * v for s, v in zip(scores, values, strict=True)))
        outputs.append(w["o_proj.weight"] @ torch.cat(heads) + w["o_proj.bias"])  # 18, 19
    return torch.stack(outputs)


@torch.no_grad()
@pytest.mark.parametrize("absorbs", [False, True])
def test_papers_equations_by_loops(absorbs: bool) -> None:
    """Guards the whole layer against the paper itself; norms and angles are in float32 here."""
    attn, n = attention(), 9
    attn.absorbs = lambda *_: absorbs
    x_BTD = torch.randn(2, n, SMALL.d_model, dtype=torch.float64)
    pos_BT = torch.arange(n).expand(2, n)
    turn = mla.rope_angles(pos_BT, mla.rope_frequencies(SMALL.d_rope, SMALL.rope_theta))
    found_BTD = attn(x_BTD, pos_BT, turn, mla.LayerCache(None))
    expected_BTD = torch.stack([paper_attention(attn, x_TD, SMALL) for x_TD in x_BTD])
    assert (found_BTD - expected_BTD).abs().max() < 1e-6 * expected_BTD.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_forms_are_equal(dtype: torch.dtype, tolerance: float) -> None:
    """Guards the identity that absorption rests on, at any number of new and old tokens."""
    attn = attention()
    for n_new, n_all in ((1, 1), (1, 30), (4, 30), (30, 30)):
        q, q_rot, c, k_rot, mask_BTS = parts(attn.double(), 2, n_new, n_all)
        truth_BTHU = attn.expanded(q, q_rot, c, k_rot, mask_BTS)
        given = [t.to(dtype) for t in (q, q_rot, c, k_rot)]
        for form in (attn.to(dtype).expanded, attn.absorbed):
            found_BTHU = form(*given, mask_BTS)
            assert found_BTHU.dtype == dtype
            assert (found_BTHU - truth_BTHU).abs().max() < tolerance * truth_BTHU.abs().max()


@torch.no_grad()
def test_forms_in_bfloat16() -> None:
    """Guards both forms in bfloat16: errors of at most two roundings, though not the same ones.

    A rounding is half the distance of neighbours, 2^-8 of the number. What is right is computed in
    float64 from the same rounded weights, queries and cache. The layer has V3's proportions.
    """
    cfg = mla.Config(
        d_model=64, n_heads=4, head_dim=32, d_rope=16, d_value=32, d_latent=128, d_q_latent=None
    )
    found: dict[str, list[float]] = {"expanded": [], "absorbed": []}
    for _ in range(4):
        attn = attention(cfg).bfloat16()
        attn.kv_b_proj.weight *= 0.2  # scores of about one
        q, q_rot, c, k_rot, mask_BTS = parts(attn, 2, 8, 64)
        given = [t.bfloat16() for t in (q, q_rot, c, k_rot)]
        half = {name: getattr(attn, name)(*given, mask_BTS) for name in found}
        exact = [t.double() for t in given]
        truth = attn.double().expanded(*exact, mask_BTS)
        for name, y_BTHU in half.items():
            assert y_BTHU.dtype == torch.bfloat16
            error = (y_BTHU.double() - truth).square().mean() / truth.square().mean()
            found[name].append(math.sqrt(error))
    for name, rounded in found.items():
        assert max(rounded) < 2 * 2**-8, (name, rounded)


@torch.no_grad()
def test_expanded_is_multi_head_attention() -> None:
    """Guards expanded against torch's attention: each head alone, by one matrix."""
    attn = attention()
    q_BTHK, q_rot_BTHR, c_BSC, k_rot_BSR, mask_BTS = given = parts(attn, 2, 4, 9)
    K, U = attn.kv_widths
    ups = attn.kv_b_proj.weight.split(K + U)  # one a head
    for h, up_XC in enumerate(ups):
        k_BSE = torch.cat((c_BSC @ up_XC[:K].T, k_rot_BSR), dim=-1)
        q_BTE = torch.cat((q_BTHK[:, :, h], q_rot_BTHR[:, :, h]), dim=-1)
        # torch's own scale: one over the root of the whole head's width
        y_BTU = F.scaled_dot_product_attention(q_BTE, k_BSE, c_BSC @ up_XC[K:].T, mask_BTS)
        torch.testing.assert_close(attn.expanded(*given)[:, :, h], y_BTU, rtol=0, atol=1e-12)


@torch.no_grad()
def test_absorbed_is_multi_query_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards absorbed: one key of C + R for all heads, and the latent in it is the value."""
    attn = attention()
    q_BTHK, q_rot_BTHR, c_BSC, k_rot_BSR, mask_BTS = given = parts(attn, 2, 4, 9)
    (K, U), C = attn.kv_widths, attn.cache_widths[0]
    ups = attn.kv_b_proj.weight.split(K + U)
    q_BTHC = torch.stack([q_BTHK[:, :, h] @ up_XC[:K] for h, up_XC in enumerate(ups)], dim=2)
    q_BHTW = torch.cat((q_BTHC, q_rot_BTHR), dim=-1).transpose(1, 2)
    k_B1SW = torch.cat((c_BSC, k_rot_BSR), dim=-1)[:, None]
    scale = sum(attn.q_widths) ** -0.5
    y_BHTC = F.scaled_dot_product_attention(
        q_BHTW, k_B1SW, k_B1SW[..., :C], mask_BTS[:, None], scale=scale, enable_gqa=True
    )
    y_BTHU = torch.stack([y_BHTC[:, h] @ up_XC[K:].T for h, up_XC in enumerate(ups)], dim=2)
    seen = []
    attend = mla.attend
    monkeypatch.setattr(mla, "attend", lambda *args: seen.append(args) or attend(*args))
    torch.testing.assert_close(attn.absorbed(*given), y_BTHU, rtol=0, atol=1e-12)
    [(q_BTHW, k_BS1W, v_BS1C, _, _)] = seen
    assert q_BTHW.shape == (2, 4, SMALL.n_heads, C + SMALL.d_rope)
    assert k_BS1W.shape == (2, 9, 1, C + SMALL.d_rope) and v_BS1C.shape == (2, 9, 1, C)
    assert torch.equal(k_BS1W[..., :C], v_BS1C) and torch.equal(v_BS1C[:, :, 0], c_BSC)


def test_gradients_of_the_forms_are_equal() -> None:
    """Guards training with either form: gradients to 1e-12 in float64, of weights and inputs."""
    attn = attention()
    *given, mask_BTS = parts(attn, 2, 5, 12)
    inputs = [t.requires_grad_() for t in given]
    weights_BTHU = torch.randn(2, 5, SMALL.n_heads, SMALL.d_value, dtype=torch.float64)
    grads = [
        torch.autograd.grad(
            (form(*inputs, mask_BTS) * weights_BTHU).sum(), [*inputs, attn.kv_b_proj.weight]
        )
        for form in (attn.expanded, attn.absorbed)
    ]
    for expanded, absorbed in zip(*grads, strict=True):
        assert expanded.any()
        assert (expanded - absorbed).abs().max() < 1e-12 * expanded.abs().max()


# ---- the rule that chooses

RULED = {  # widths: as usual; a latent of half a key and value, where both cost the same; narrower
    "usual": dataclasses.replace(SMALL, d_latent=8, head_dim=3, d_value=5),
    "break even": dataclasses.replace(SMALL, d_latent=4, head_dim=3, d_value=5),
    "narrow": dataclasses.replace(SMALL, d_latent=3, head_dim=3, d_value=5),
    "no two equal": SMALL,
}
# Not one token alone: torch then weighs the value without a matrix product, and counts nothing.
GRID = [(n_new, n_all) for n_all in (2, 5, 8, 24) for n_new in range(1, min(n_all, 9) + 1)]
GRID += [(24, 24)]


@torch.no_grad()
def multiplications(attn: mla.LatentAttention, n_new: int, n_all: int) -> list[int]:
    """What torch counts in the expanded form and in the absorbed one, on two sequences."""
    given = parts(attn, 2, n_new, n_all)
    counts = []
    for form in (attn.expanded, attn.absorbed):
        with FlopCounterMode(display=False) as counter:
            form(*given)
        counts.append(counter.get_total_flops() // 2)  # it counts additions, too
    return counts


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[tuple[int, int], list[int]]]:
    """Multiplications of both forms by width, new and all tokens."""
    return {
        name: {sizes: multiplications(attention(cfg), *sizes) for sizes in GRID}
        for name, cfg in RULED.items()
    }


def misjudged(module: ModuleType, counted: dict) -> list[tuple[str, int, int]]:
    """Where the module's rule is not "the absorbed form takes fewer multiplications"."""
    wrong = []
    for name, cfg in RULED.items():
        attn = module.LatentAttention(cfg, None)
        for sizes, (expanded, absorbed) in counted[name].items():
            if attn.absorbs(*sizes) != (absorbed < expanded):
                wrong.append((name, *sizes))
    return wrong


def test_rule_counts_multiplications(counted: dict) -> None:
    """Guards absorbs: at each size it is the comparison of what torch counts, ties included.

    Exactly so, since the rule is the difference of the two counts divided by what is in every term
    (heads and sequences) without the one that is in both: R multiplications a score.
    """
    assert misjudged(mla, counted) == []
    usual, even = counted["usual"], counted["break even"]
    assert usual[4, 8][0] == usual[4, 8][1] and usual[6, 24][0] == usual[6, 24][1]
    assert all(even[n, n][0] == even[n, n][1] for n in (2, 5, 8, 24))
    assert mla.LatentAttention(RULED["narrow"], None).absorbs(8, 8)
    for name, cfg in RULED.items():  # the counts themselves, by hand
        H, C, K, U, R = cfg.n_heads, cfg.d_latent, cfg.head_dim, cfg.d_value, cfg.d_rope
        for (T, S), (expanded, absorbed) in counted[name].items():
            assert expanded == 2 * H * (S * C * (K + U) + T * S * (K + R + U))
            assert absorbed == 2 * H * (T * C * (K + U) + T * S * (C + R + C))


@pytest.mark.parametrize(
    "change",
    [
        "(n_all - n_new) * d_latent -> n_all * d_latent",
        "(n_all - n_new) * d_latent * d_key_and_value -> (n_all - n_new) * d_key_and_value",
        "return spared > n_new -> return spared >= n_new",
        "(2 * d_latent - d_key_and_value) -> (2 * d_latent)",
        "(2 * d_latent - d_key_and_value) -> (d_latent - d_key_and_value)",
        "(2 * d_latent - d_key_and_value) -> (2 * sum(self.cache_widths) - d_key_and_value)",
        "spared > n_new * n_all * -> spared > n_all *",
        "sum(self.kv_widths)\n        spared -> sum(self.q_widths)\n        spared",
        "return spared > n_new * n_all * (2 * d_latent - d_key_and_value) -> return n_new < n_all",
        "return spared > n_new * n_all * (2 * d_latent - d_key_and_value) -> return n_new == 1",
    ],
)
def test_mistakes_in_the_rule_are_noticed(change: str, counted: dict) -> None:
    """Guards the test above: a wrong rule gives right logits, so that counting alone shows it."""
    assert misjudged(mutant(mla, change), counted)


# DeepSeek's published configs: widths, layers, and bytes of the whole cache a token in bfloat16
V3_WIDTHS = dict(
    d_model=7168,
    n_heads=128,
    head_dim=128,
    d_latent=512,
    d_q_latent=1536,
    d_rope=64,
    d_value=128,
    bias=False,
)
V2_WIDTHS = V3_WIDTHS | dict(d_model=5120)
V2_LITE_WIDTHS = V3_WIDTHS | dict(d_model=2048, n_heads=16, d_q_latent=None)
PUBLISHED = {
    "DeepSeek-V3": (DeepseekV3Config, DeepseekV3Attention, V3_WIDTHS, 61, 70_272),
    "DeepSeek-V2": (DeepseekV2Config, DeepseekV2Attention, V2_WIDTHS, 60, 69_120),
    "DeepSeek-V2-Lite": (DeepseekV2Config, DeepseekV2Attention, V2_LITE_WIDTHS, 27, 31_104),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    """Guards the widths of real models, without their bytes: parameters, cache, and the form.

    Our layer has the parameters of transformers', and the biases of the latent norms.
    """
    config_class, attention_class, widths, n_layers, n_bytes = PUBLISHED[name]
    cfg = mla.Config(**widths)
    config = config_class(
        hidden_size=cfg.d_model,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_heads,
        q_lora_rank=cfg.d_q_latent,
        kv_lora_rank=cfg.d_latent,
        qk_nope_head_dim=cfg.head_dim,
        qk_rope_head_dim=cfg.d_rope,
        v_head_dim=cfg.d_value,
    )
    with torch.device("meta"):
        theirs = attention_class(config, 0)
        attn = mla.LatentAttention(cfg, None).bfloat16()
        freq_P = mla.rope_frequencies(cfg.d_rope, cfg.rope_theta)
    n_norm_biases = cfg.d_latent + (cfg.d_q_latent or 0)
    n_theirs = sum(p.numel() for p in theirs.parameters())
    assert sum(p.numel() for p in attn.parameters()) == n_theirs + n_norm_biases

    used, cache = [], mla.LayerCache(None)
    for form in ("expanded", "absorbed"):
        record(attn, form, used)
    for n_new in (4096, 1, 1):
        x_1TD = torch.empty(1, n_new, cfg.d_model, device="meta", dtype=torch.bfloat16)
        pos_1T = cache.positions(x_1TD[:, :, 0])
        attn(x_1TD, pos_1T, mla.rope_angles(pos_1T, freq_P), cache)
    assert used == ["expanded", "absorbed", "absorbed"]
    assert cache.n_bytes() == 4098 * 576 * 2
    assert n_layers * cache.n_bytes() == 4098 * n_bytes


def record(attn: mla.LatentAttention, form: str, used: list[str]) -> None:
    """Each later call of the form puts its name into the list."""
    compute = getattr(attn, form)
    setattr(attn, form, lambda *args: used.append(form) or compute(*args))


@torch.no_grad()
def test_rule_decides_at_each_call() -> None:
    """Guards the defaults: reading uses the expanded form, decoding the absorbed one."""
    cfg = dataclasses.replace(mla.Config(), vocab_size=50, n_layers=1)
    model, used = mla.Transformer(cfg), []
    for form in ("expanded", "absorbed"):
        record(model.blocks[0].attn, form, used)
    list(mla.generate(model, torch.zeros(1, 12, dtype=torch.long), 4))
    assert used == ["expanded"] + ["absorbed"] * 3
    used.clear()
    model(torch.zeros(2, 12, dtype=torch.long))
    model(torch.zeros(2, 1, dtype=torch.long))  # one token, alone: nothing to spare
    assert used == ["expanded"] * 2


# ---- the cache


def complex_turn(x_BTR: Tensor, theta: float) -> Tensor:
    """Pairs (0, 1), (2, 3), ... turned as complex numbers in float64, in our order, (B, T, R)."""
    n, R = x_BTR.shape[1:]
    freq_P = theta ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
    angle_TP = torch.arange(n, dtype=torch.float64)[:, None] * freq_P
    z_BTP = torch.view_as_complex(x_BTR.double().unflatten(-1, (-1, 2)).contiguous())
    z_BTP = z_BTP * torch.polar(torch.ones_like(angle_TP), angle_TP)
    return torch.cat((z_BTP.real, z_BTP.imag), dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("windows", [(None,), (8, None)])
def test_cache_holds_the_normed_latent_and_the_turned_key(windows: tuple[int | None, ...]) -> None:
    """Guards what is kept: C + R numbers a token, transformers' own, and no memory besides."""
    case = Case(v3(), windows)
    hf = oracle(case)
    B, C, R, n = 3, case.config.kv_lora_rank, case.config.qk_rope_head_dim, 30
    latents, rotary = [], []
    for layer in hf.model.layers:
        attn = layer.self_attn
        attn.kv_a_layernorm.register_forward_hook(lambda *call: latents.append(call[2]))
        attn.kv_a_proj_with_mqa.register_forward_hook(lambda *call: rotary.append(call[2][..., C:]))
    tokens_BT = torch.randint(97, (B, n))
    hf(tokens_BT, use_cache=False)
    model = ours(case, hf)
    cache = model.new_cache()
    for part in tokens_BT.split([11, 1, 1, 9, 1, 7], dim=1):
        model(part, cache)
        for layer in cache:
            c_BSC, k_rot_BSR, pos_BS = layer.kept
            n_kept = min(layer.n_seen, layer.window or n)
            assert c_BSC.shape == (B, n_kept, C) and k_rot_BSR.shape == (B, n_kept, R)
            assert not pos_BS.is_floating_point()
            assert layer.n_bytes() == B * n_kept * (C + R) * 4
            alive = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in layer.kept[:2]}
            assert sum(storage.nbytes() for storage in alive.values()) == layer.n_bytes()
    for i, layer in enumerate(cache):
        c_BSC, k_rot_BSR, pos_BS = layer.kept
        n_kept = c_BSC.shape[1]
        assert pos_BS.tolist() == [list(range(n - n_kept, n))] * B
        torch.testing.assert_close(c_BSC, latents[i][:, -n_kept:], rtol=0, atol=2e-5)
        turned_BTR = complex_turn(rotary[i], 10_000.0)[:, -n_kept:].float()
        torch.testing.assert_close(k_rot_BSR, turned_BTR, rtol=0, atol=2e-5)


def test_decoding_reads_one_token_a_step() -> None:
    """Guards the cost of a step: old tokens are computed in no layer, nor made keys of again."""
    model = mla.Transformer(SMALL)
    lengths = forward_lengths(model)
    attns = [block.attn for block in model.blocks]
    down = [forward_lengths(attn.kv_a_proj) for attn in attns]
    up = [forward_lengths(attn.kv_b_proj) for attn in attns]
    list(mla.generate(model, torch.zeros(1, 20, dtype=torch.long), 15))
    assert lengths == [20] + [1] * 14
    assert down == [lengths] * N_LAYERS
    assert up == [[20]] * N_LAYERS  # the absorbed form takes the matrix itself


# ---- what is left of the parents


@torch.no_grad()
def test_without_a_latent_it_is_chapter_3() -> None:
    """Guards the other kind of attention: the parent's model, bit by bit, from the same seed."""
    sizes = dict(
        vocab_size=50, n_layers=3, d_model=26, n_heads=6, n_kv_heads=2, head_dim=10,
        windows=(6, None), d_ff=34,
    )  # fmt: skip
    torch.manual_seed(1)
    parent = gqa.Transformer(gqa.Config(**sizes))
    torch.manual_seed(1)
    model = mla.Transformer(mla.Config(**sizes, d_latent=None))
    assert parent.state_dict().keys() == model.state_dict().keys()
    for name, param in parent.state_dict().items():
        assert torch.equal(param, model.state_dict()[name]), name
    tokens_BT, n_pad_B = torch.randint(50, (3, 20)), torch.tensor([0, 3, 12])
    assert torch.equal(model(tokens_BT), parent(tokens_BT))
    ours_cache, parents_cache = model.new_cache(n_pad_B), parent.new_cache(n_pad_B)
    for part in tokens_BT.split([12, 1, 1, 5, 1], dim=1):
        assert torch.equal(model(part, ours_cache), parent(part, parents_cache))
    for layer, parents in zip(ours_cache, parents_cache, strict=True):
        assert layer.n_bytes() == parents.n_bytes()
        assert all(map(torch.equal, layer.kept, parents.kept))


def test_attend_with_values_of_their_own_width() -> None:
    """Guards attend where keys and values differ in width, with groups, against torch's own."""
    q_BTHK, k_BSJK, v_BSJU = (
        torch.randn(2, 5, 6, 3),
        torch.randn(2, 7, 2, 3),
        torch.randn(2, 7, 2, 4),
    )
    mask_BTS = torch.rand(2, 5, 7) > 0.5
    mask_BTS[:, :, 0] = True
    y_BHTU = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSJK.transpose(1, 2).repeat_interleave(3, dim=1),
        v_BSJU.transpose(1, 2).repeat_interleave(3, dim=1),
        mask_BTS[:, None],
        scale=0.7,
    )
    found_BTHU = mla.attend(q_BTHK, k_BSJK, v_BSJU, mask_BTS, 0.7)
    torch.testing.assert_close(found_BTHU, y_BHTU.transpose(1, 2))


def test_causal_mask_by_loops() -> None:
    """Guards who sees whom."""
    check_mask_by_loops(mla)


def test_initial_weights() -> None:
    """Guards init_weights: spread of every matrix; biases zero, norm weights one."""
    cfg = mla.Config(
        vocab_size=300, n_layers=8, d_model=64, n_heads=4, head_dim=16, d_latent=24, d_q_latent=28,
        d_rope=8, d_value=20, d_ff=96,
    )  # fmt: skip
    straight = dataclasses.replace(cfg, d_q_latent=None)
    named = [
        *mla.Transformer(cfg).named_parameters(),
        *mla.Transformer(straight).named_parameters(),
    ]
    for name, param in named:
        if name.endswith("bias"):
            assert not param.any(), name
        elif "norm" in name:
            assert (param == 1).all(), name
        else:
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * 8) if into_stream else 0.02
            error = 1 / math.sqrt(2 * param.numel())  # standard error of a measured std, relative
            assert float(param.detach().std()) == pytest.approx(std, rel=5 * error), name


# ---- generation


@pytest.fixture(scope="module")
def lively() -> tuple[mla.Transformer, PreTrainedModel]:
    """Ours and transformers', whose greedy texts vary."""
    case = Case(v3(), scale=4.0)
    hf = oracle(case, seed=2)
    return ours(case, hf), hf


def test_generate_equals_transformers(lively: tuple[mla.Transformer, PreTrainedModel]) -> None:
    """Guards greedy generation, and that the cache is used: one token a step after the prompt."""
    equals_generate(mla, *lively)


def test_generate_padded_batch(lively: tuple[mla.Transformer, PreTrainedModel]) -> None:
    """Guards prompts of unequal length in one batch."""
    same_alone_and_padded(mla, lively[0])


def test_generate_goes_on(lively: tuple[mla.Transformer, PreTrainedModel]) -> None:
    """Guards a cache that is handed from one call to the next."""
    goes_on(mla, lively[0])


def test_seeds_reproduce(lively: tuple[mla.Transformer, PreTrainedModel]) -> None:
    """Guards the private generator: a seed gives one text, whatever else draws numbers."""
    prompt_BT = torch.randint(97, (2, 4))

    def draw(seed: int) -> list[list[int]]:
        torch.rand(seed + 1)  # another user of torch's global generator
        new = mla.generate(lively[0], prompt_BT, 12, temperature=1.0, top_k=20, seed=seed)
        return torch.cat(list(new), dim=1).tolist()

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
