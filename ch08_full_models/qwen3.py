"""Chapter 8: Qwen3, 0.6B to 235B-A22B, dense and with experts; Qwen1.5-MoE and Qwen2-57B-A14B.

Since chapter 7: latent attention, norms on outputs and the bias on the choice of experts are left
out. Its own: experts in chosen layers only, weights of experts that need not sum to one, a shared
expert with a gate (Qwen1.5-MoE's published code), biases on q, k and v (Qwen2 report, section
2.2.1), YaRN (Peng et al. 2023, section 3.4), an output matrix that may be tied. For speed: torch's
attention kernel, and a cache in buffers that are allocated ahead.

A tensor's name ends in its axes: `q_BTHK` has shape (B, T, H, K).
    B  sequences in the batch         T  tokens in this call
    S  tokens attention can see: those in the cache, then the T new ones
    D  width of the residual stream   F  hidden width of the MLP
    H  query heads                    K  width of one head
    J  key/value heads                P  pairs of dimensions that turn together: K/2
    N  tokens of all sequences: B * T                 A  experts that a token goes to
    M  pairs of a token and one of its experts: N * A, in the order of the experts
    I  routed experts
    V  vocabulary                     1  an axis of length one

Run it:  python qwen3.py                                        random weights, no download
         python qwen3.py --weights FOLDER --prompt "Once upon"  a Hugging Face folder
"""

import argparse
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """How YaRN stretches rotary positions past the length the model was first trained at."""

    factor: float  # slow pairs turn this many times slower
    original_len: int  # tokens
    gain: float  # multiplies cosine and sine, so scores by its square


@dataclass(frozen=True)
class Config:
    """Sizes of the model. The defaults are Qwen3 0.6B."""

    vocab_size: int = 151936
    max_seq_len: int = 40960  # tokens the model was trained for; nothing here ends there
    n_layers: int = 28
    d_model: int = 1024
    n_heads: int = 16
    n_kv_heads: int = 8
    head_dim: int = 128
    windows: tuple[int | None, ...] = (None,)  # by layer, repeated; None sees everything
    d_ff: int = 3072
    sparse: tuple[bool, ...] = (False,)  # by layer, repeated; experts in place of the one MLP
    n_experts: int = 0  # I
    n_active: int = 0  # A
    d_expert: int = 0  # hidden width of one expert
    d_shared: int | None = None  # hidden width of Qwen2-MoE's shared expert; None: there is none
    renormalise: bool = False  # weights of a token's experts sum to one: in Qwen3-MoE
    qkv_bias: bool = False  # in Qwen2-MoE
    qk_norm: bool = True  # not in Qwen2-MoE
    norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0  # the slowest pair turns once in about 2 pi theta tokens
    rope_scaling: RopeScaling | None = None
    tied: bool = True  # the output matrix is the embedding


class LayerCache:
    """What one attention layer keeps of the tokens it has seen: tensors shaped (B, seen, ...).

    The buffers double when they are full. A layer with a window needs no more than `window`
    tokens: its buffers stop growing there, and token n overwrites the one at n modulo window.
    """

    def __init__(self, window: int | None, n_pad_B: Tensor | None = None) -> None:
        self.window = window
        self.n_pad_B = n_pad_B
        self.buffers: tuple[Tensor, ...] = ()
        self.n_seen = 0

    def positions(self, tokens_BT: Tensor) -> Tensor:
        """Positions (B, T) of tokens that come next. Padding, on the left, counts below zero."""
        pos_T = self.n_seen + torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        n_pad = 0 if self.n_pad_B is None else self.n_pad_B[:, None]
        return (pos_T - n_pad).expand(tokens_BT.shape)

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Stores the new tokens; returns all that they may look at, themselves included.

        Oldest first, except for one new token in a full window: there the order is that of the
        buffer, which attention does not mind.
        """
        n_old, self.n_seen = self.n_seen, self.n_seen + new[0].shape[1]
        self.grow(new)
        if self.window is None or self.n_seen <= self.window:
            for buffer, t in zip(self.buffers, new, strict=True):
                buffer[:, n_old : self.n_seen] = t
            return tuple(buffer[:, : self.n_seen] for buffer in self.buffers)
        if new[0].shape[1] == 1:
            for buffer, t in zip(self.buffers, new, strict=True):
                buffer[:, n_old % self.window] = t[:, 0]
            return self.buffers
        slots = torch.arange(self.n_seen, device=new[0].device) % self.window
        old, kept = slots[:n_old][-self.window :], slots[n_old:][-self.window :]
        pairs = tuple(zip(self.buffers, new, strict=True))
        joined = tuple(torch.cat((buffer[:, old], t), dim=1) for buffer, t in pairs)
        for buffer, t in pairs:
            buffer[:, kept] = t[:, -self.window :]
        return joined

    def grow(self, new: tuple[Tensor, ...]) -> None:
        """Makes room for n_seen tokens, or for one window of them."""
        room = self.buffers[0].shape[1] if self.buffers else 0
        need = min(self.n_seen, self.window or self.n_seen)
        if need > room:
            size = min(max(need, 2 * room), self.window or 2 * need)
            larger = tuple(t.new_empty((t.shape[0], size, *t.shape[2:])) for t in new)
            for i, old in enumerate(self.buffers):
                larger[i][:, :room] = old
            self.buffers = larger

    def needs_mask(self, n_new: int) -> bool:
        """Whether the last n_new tokens may see less than all before them in what append gave."""
        first = self.n_seen == n_new and n_new <= (self.window or n_new)
        return self.n_pad_B is not None or not (first or n_new == 1)

    def n_bytes(self) -> int:
        """Memory held, in bytes, not counting the integer positions."""
        return sum(t.nbytes for t in self.buffers if t.is_floating_point())


def causal_mask(q_pos_BT: Tensor, k_pos_BS: Tensor, window: int | None) -> Tensor:
    """True where a query may look, (B, T, S): at itself and earlier positions, `window` in all.

    Padding has positions below zero. Texts never see it; it sees itself, since a row with nothing
    to see would be 0/0.
    """
    q_pos_BT1, k_pos_B1S = q_pos_BT[:, :, None], k_pos_BS[:, None, :]
    mask_BTS = (k_pos_B1S <= q_pos_BT1) & ((k_pos_B1S >= 0) | (q_pos_BT1 < 0))
    return mask_BTS if window is None else mask_BTS & (k_pos_B1S > q_pos_BT1 - window)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians that each pair of dimensions turns a token, (P,) in float32.

    theta^(-2i/K) (Su et al. 2021, section 3.2.2). YaRN leaves pairs alone that turn 32 times or
    more within original_len tokens, slows down those that turn once or less, and blends in between
    (Peng et al. 2023, section 3.2; a straight ramp over whole pairs, as in the authors' code).
    """
    freq_P = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if scaling is None:
        return freq_P
    length = scaling.original_len / (2 * math.pi)
    fast, slow = (head_dim * math.log(length / n) / (2 * math.log(theta)) for n in (32, 1))
    first, last = max(math.floor(fast), 0), min(math.ceil(slow), head_dim - 1)
    width = last - first or 0.001  # a step instead of a ramp, without dividing by zero
    slow_P = ((torch.arange(len(freq_P)).float() - first) / width).clamp(0, 1)
    return slow_P * freq_P / scaling.factor + (1 - slow_P) * freq_P


def rope_angles(pos_BT: Tensor, freq_P: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, both (B, T, 1, P) in float32: once a call."""
    angle_BT1P = pos_BT[:, :, None, None] * freq_P.to(pos_BT.device)
    return angle_BT1P.cos(), angle_BT1P.sin()


def rope(x_BTHK: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turns dimensions (i, i + K/2) of each head by its position's angles, in float32."""
    cos_BT1P, sin_BT1P = turn
    a_BTHP, b_BTHP = x_BTHK.chunk(2, dim=-1)
    a_turned_BTHP = a_BTHP * cos_BT1P - b_BTHP * sin_BT1P
    b_turned_BTHP = b_BTHP * cos_BT1P + a_BTHP * sin_BT1P
    return torch.cat((a_turned_BTHP, b_turned_BTHP), dim=-1).type_as(x_BTHK)


def attend(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, mask_BTS: Tensor | None, scale: float
) -> Tensor:
    """Scaled dot-product attention, (B, T, H, K). No mask: each query sees all up to itself."""
    y_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSJK.transpose(1, 2),
        v_BSJK.transpose(1, 2),
        attn_mask=None if mask_BTS is None else mask_BTS[:, None],
        is_causal=mask_BTS is None and q_BTHK.shape[1] > 1,
        scale=scale,
        enable_gqa=True,
    )
    return y_BHTK.transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, section 2.2) over a sliding window."""

    def __init__(self, cfg: Config, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.head_dim = cfg.head_dim
        self.q_proj = nn.Linear(cfg.d_model, cfg.n_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(cfg.n_heads * cfg.head_dim, cfg.d_model, bias=False)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()

    def forward(
        self, x_BTD: Tensor, pos_BT: Tensor, turn: tuple[Tensor, Tensor], cache: LayerCache
    ) -> Tensor:
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTJK = self.k_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTJK = self.v_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        q_BTHK = rope(self.q_norm(q_BTHK), turn)
        k_BTJK = rope(self.k_norm(k_BTJK), turn)
        k_BSJK, v_BSJK, pos_BS = cache.append(k_BTJK, v_BTJK, pos_BT)
        needs_mask = cache.needs_mask(pos_BT.shape[1])
        mask_BTS = causal_mask(pos_BT, pos_BS, self.window) if needs_mask else None
        y_BTHK = attend(q_BTHK, k_BSJK, v_BSJK, mask_BTS, self.head_dim**-0.5)
        return self.o_proj(y_BTHK.flatten(-2))


class MLP(nn.Module):
    """The position-wise feed-forward network with a SiLU gate (Shazeer 2020, section 2)."""

    def __init__(self, cfg: Config, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(cfg.d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, cfg.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SharedExpert(MLP):
    """An MLP that each token weighs between 0 and 1: Qwen2-MoE's (Qwen1.5-MoE's published code)."""

    def __init__(self, cfg: Config, d_ff: int) -> None:
        super().__init__(cfg, d_ff)
        self.out_gate = nn.Linear(cfg.d_model, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_gate(x).sigmoid() * super().forward(x)


class MoE(nn.Module):
    """Routed experts, each an MLP (Qwen3 report, section 2), and Qwen2-MoE's shared one."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.n_active = cfg.n_active
        self.renormalise = cfg.renormalise
        self.router = nn.Linear(cfg.d_model, cfg.n_experts, bias=False)
        self.experts = nn.ModuleList(MLP(cfg, cfg.d_expert) for _ in range(cfg.n_experts))
        self.shared = SharedExpert(cfg, cfg.d_shared) if cfg.d_shared else None

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The experts that each token goes to, and their weights: both (N, A)."""
        prob_NI = self.router(x_ND).softmax(dim=-1, dtype=torch.float32)
        weight_NA, expert_NA = prob_NI.topk(self.n_active, dim=-1)
        if self.renormalise:
            weight_NA = weight_NA / weight_NA.sum(dim=-1, keepdim=True)
        return expert_NA, weight_NA.type_as(x_ND)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        expert_NA, weight_NA = self.route(x_ND)
        expert_M, order_M = expert_NA.flatten().sort(stable=True)
        token_M = order_M // self.n_active
        n_tokens = expert_M.bincount(minlength=len(self.experts)).tolist()
        parts = zip(self.experts, x_ND[token_M].split(n_tokens), strict=True)
        y_MD = torch.cat([expert(part) for expert, part in parts if len(part)])
        y_MD = y_MD * weight_NA.flatten()[order_M, None]
        y_ND = torch.zeros_like(x_ND) if self.shared is None else self.shared(x_ND)
        return y_ND.index_add(0, token_M, y_MD.type_as(y_ND)).view_as(x_BTD)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich 2019, section 4), computed in float32.

    Rounded to the input's type before the weight multiplies it: Llama's order.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.float().square().mean(dim=-1, keepdim=True)
        return self.weight * (x.float() * torch.rsqrt(mean_square + self.eps)).type_as(x)


class Block(nn.Module):
    """One layer: attention, then MLP or experts, each normed on the way in and added."""

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attn = Attention(cfg, cfg.windows[layer % len(cfg.windows)])
        self.mlp_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        sparse = cfg.sparse[layer % len(cfg.sparse)]
        self.mlp = MoE(cfg) if sparse else MLP(cfg, cfg.d_ff)

    def forward(
        self, x_BTD: Tensor, pos_BT: Tensor, turn: tuple[Tensor, Tensor], cache: LayerCache
    ) -> Tensor:
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), pos_BT, turn, cache)
        x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return x_BTD


class Transformer(nn.Module):
    """Tokens in, next-token logits out."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        if not cfg.tied:
            self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Normal weights of standard deviation 0.02 and zero biases (OpenAI's published code).

        Each layer adds two outputs to the residual stream. Their matrices start smaller, by
        1 / sqrt(2 n_layers), so that the sum keeps its size at any depth (GPT-2, section 2.3).
        """
        for name, param in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(param)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(param, std=0.02 / math.sqrt(2 * self.cfg.n_layers))
            elif param.ndim > 1:  # norm weights stay at one
                nn.init.normal_(param, std=0.02)

    def new_cache(self, n_pad_B: Tensor | None = None) -> list[LayerCache]:
        """An empty cache, one entry a layer. n_pad_B (B,) counts each sequence's left padding."""
        return [LayerCache(block.attn.window, n_pad_B) for block in self.blocks]

    def forward(
        self, tokens_BT: Tensor, cache: list[LayerCache] | None = None, last_only: bool = False
    ) -> Tensor:
        """Logits (B, T, V); last_only: (B, 1, V), of the last token.

        The tokens continue those in the cache, if one is given, and are added to it.
        """
        cache = cache or self.new_cache()
        pos_BT = cache[0].positions(tokens_BT)
        cfg = self.cfg
        turn = rope_angles(pos_BT, rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling))
        if cfg.rope_scaling is not None:
            turn = tuple(part * cfg.rope_scaling.gain for part in turn)
        x_BTD = self.embed(tokens_BT)
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x_BTD = block(x_BTD, pos_BT, turn, layer_cache)
        x_BTD = self.norm(x_BTD)
        head = self.embed if cfg.tied else self.head
        return F.linear(x_BTD[:, -1:] if last_only else x_BTD, head.weight)


def sample(
    logits_BV: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Tensor:
    """Draws one token a sequence, (B, 1); temperature 0 takes the likeliest.

    top_k keeps the k likeliest tokens, top_p the fewest whose probabilities reach p
    (Holtzman et al. 2020, section 3.1).
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None:
        kth_B1 = logits_BV.topk(min(top_k, logits_BV.shape[1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)
    if top_p is not None:
        sorted_BV, order_BV = logits_BV.softmax(dim=-1).sort(dim=-1, descending=True)
        rest_BV = sorted_BV.cumsum(dim=-1) - sorted_BV >= top_p  # the likelier ones are enough
        logits_BV = logits_BV.masked_fill(rest_BV.scatter(1, order_BV, rest_BV), -math.inf)
    return logits_BV.softmax(dim=-1).multinomial(1, generator=generator)


@torch.no_grad()
def generate(
    model: Transformer,
    tokens_BT: Tensor,
    n_new: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    n_pad_B: Tensor | None = None,
    cache: list[LayerCache] | None = None,
) -> Iterator[Tensor]:
    """Yields n_new tokens a sequence, one at a time, each (B, 1).

    The first step reads the whole prompt, each later one the token before. Prompts of unequal
    length are padded on the left; n_pad_B (B,) says by how much. A cache from an earlier call goes
    on where it ended; the last token yielded is not in it yet.
    """
    generator = torch.Generator(tokens_BT.device).manual_seed(seed)
    cache = cache or model.new_cache(n_pad_B)
    for _ in range(n_new):
        logits_B1V = model(tokens_BT, cache, last_only=True)
        tokens_BT = sample(logits_B1V[:, 0], temperature, top_k, top_p, generator)
        yield tokens_BT


HF_NAMES = {  # our parameter: its name in the published checkpoint; {} is the layer
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "blocks.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.attn.q_proj.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.{}.attn.q_proj.bias": "model.layers.{}.self_attn.q_proj.bias",
    "blocks.{}.attn.k_proj.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.{}.attn.k_proj.bias": "model.layers.{}.self_attn.k_proj.bias",
    "blocks.{}.attn.v_proj.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.{}.attn.v_proj.bias": "model.layers.{}.self_attn.v_proj.bias",
    "blocks.{}.attn.o_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.attn.q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.{}.attn.k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "blocks.{}.mlp_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.mlp.gate_proj.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.mlp.up_proj.weight": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.mlp.down_proj.weight": "model.layers.{}.mlp.down_proj.weight",
    "blocks.{}.mlp.router.weight": "model.layers.{}.mlp.gate.weight",
    "blocks.{}.mlp.experts.{}.gate_proj.weight": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
    "blocks.{}.mlp.experts.{}.up_proj.weight": "model.layers.{}.mlp.experts.{}.up_proj.weight",
    "blocks.{}.mlp.experts.{}.down_proj.weight": "model.layers.{}.mlp.experts.{}.down_proj.weight",
    "blocks.{}.mlp.shared.gate_proj.weight": "model.layers.{}.mlp.shared_expert.gate_proj.weight",
    "blocks.{}.mlp.shared.up_proj.weight": "model.layers.{}.mlp.shared_expert.up_proj.weight",
    "blocks.{}.mlp.shared.down_proj.weight": "model.layers.{}.mlp.shared_expert.down_proj.weight",
    "blocks.{}.mlp.shared.out_gate.weight": "model.layers.{}.mlp.shared_expert_gate.weight",
}


def rename(name: str, names: dict[str, str]) -> str:
    """The name that `names` gives, its numbers kept in place; a name it lacks stays as it is."""
    number = r"(?<=\.)\d+(?=\.)"
    pattern = re.sub(number, "{}", name)
    return names.get(pattern, pattern).format(*re.findall(number, name))


def rope_config(hf: dict) -> tuple[float, dict]:
    """Base and scaling from config.json: today's `rope_parameters`, or the two older keys."""
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = scaling.get("rope_theta", hf.get("rope_theta", 10_000.0))
    return float(theta), {"rope_type": scaling.get("type", "default")} | scaling


def config_from_hf(hf: dict) -> Config:
    """The Config that a checkpoint's config.json describes.

    Raises KeyError for a key that is not there, ValueError for one this file cannot run.
    """
    theta, scaling = rope_config(hf)
    if scaling["rope_type"] not in ("default", "yarn"):
        kind = scaling["rope_type"]
        raise ValueError(f"rope_scaling is {kind!r}, only default and yarn can be run")
    fixed = {"hidden_act": "silu", "attention_bias": False}
    of_yarn = {"beta_fast": 32, "beta_slow": 1, "mscale": None, "truncate": True}
    given, fixed = hf | scaling, fixed | of_yarn
    for key, value in fixed.items():
        if given.get(key, value) != value:
            raise ValueError(f"{key} is {given[key]!r}, only {value!r} can be run")
    n_layers, n_heads = hf["num_hidden_layers"], hf["num_attention_heads"]
    is_2 = hf["model_type"] == "qwen2_moe"
    experts = {}
    if is_2 or hf["model_type"] == "qwen3_moe":
        dense, step = hf.get("mlp_only_layers") or (), hf.get("decoder_sparse_step", 1)
        experts = dict(
            sparse=tuple(i not in dense and (i + 1) % step == 0 for i in range(n_layers)),
            n_experts=hf.get("num_local_experts") or hf["num_experts"],  # the first: transformers 5
            n_active=hf["num_experts_per_tok"],
            d_expert=hf["moe_intermediate_size"],
            d_shared=hf["shared_expert_intermediate_size"] if is_2 else None,
            renormalise=hf.get("norm_topk_prob", False),
        )
    return Config(
        vocab_size=hf["vocab_size"],
        max_seq_len=hf["max_position_embeddings"],
        n_layers=n_layers,
        d_model=hf["hidden_size"],
        n_heads=n_heads,
        n_kv_heads=hf.get("num_key_value_heads") or n_heads,
        head_dim=hf.get("head_dim", hf["hidden_size"] // n_heads) if is_2 else hf["head_dim"],
        windows=windows(hf),
        d_ff=hf["intermediate_size"],
        **experts,
        qkv_bias=is_2 and hf.get("qkv_bias", True),
        qk_norm=not is_2,
        norm_eps=hf["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=None
        if scaling["rope_type"] == "default"
        else RopeScaling(
            factor=scaling["factor"],
            original_len=scaling["original_max_position_embeddings"],
            gain=scaling.get("attention_factor") or 0.1 * math.log(scaling["factor"]) + 1,
        ),
        tied=hf.get("tie_word_embeddings", False),
    )


def windows(hf: dict) -> tuple[int | None, ...]:
    """Each layer's window, as config.json says it or else as transformers' classes do."""
    n_layers, limit = hf["num_hidden_layers"], hf.get("max_window_layers", 28)
    if not hf.get("use_sliding_window"):
        return (None,) * n_layers
    by_kind = {
        "qwen3": range(limit, n_layers),
        "qwen3_moe": range(n_layers),
        "qwen2_moe": range(0, limit, 2),
    }
    sliding = by_kind[hf["model_type"]]
    if hf.get("layer_types"):
        sliding = [i for i, kind in enumerate(hf["layer_types"]) if kind == "sliding_attention"]
    return tuple(hf["sliding_window"] if i in sliding else None for i in range(n_layers))


def split_experts(name: str, w: Tensor) -> dict[str, Tensor]:
    """A checkpoint's tensor by its name; one that holds a layer's experts, as one view an expert.

    transformers 5 keeps them in two: gate_up_proj, in each expert the gate's rows first, and
    down_proj.
    """
    stem, _, last = name.rpartition(".")
    if last == "gate_up_proj":
        gate, up = w.chunk(2, dim=1)
        parts = {"gate_proj": gate, "up_proj": up}
    elif last == "down_proj":
        parts = {"down_proj": w}
    else:
        return {name: w}
    return {
        f"{stem}.{i}.{part}.weight": w for part, stack in parts.items() for i, w in enumerate(stack)
    }


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors under our names; rotary tables of old files are left out."""
    ours = {theirs: name for name, theirs in HF_NAMES.items()}
    kept = (pair for pair in weights.items() if not pair[0].endswith("rotary_emb.inv_freq"))
    split = (part for pair in kept for part in split_experts(*pair).items())
    return {rename(name, ours): w for name, w in split}


@torch.no_grad()
def load_weights(
    model: nn.Module, weights: dict[str, Tensor] | Iterable[tuple[str, Tensor]]
) -> None:
    """Copies a checkpoint into the model, tensor by tensor; all on both sides must find a partner.

    Takes a dict, or pairs that a large file yields one by one. Raises KeyError for a tensor that
    only one side has, ValueError for two shapes that differ.
    """
    params = dict(model.named_parameters())
    missing = set(params)
    for theirs, tensor in weights.items() if isinstance(weights, dict) else weights:
        for name, w in convert({theirs: tensor}).items():
            if name == "head.weight" and model.cfg.tied:
                continue  # the embedding once more
            if name not in params:
                raise KeyError(f"{theirs}: the model has no such parameter")
            if w.shape != params[name].shape:
                shapes = f"{tuple(w.shape)}, not {tuple(params[name].shape)}"
                raise ValueError(f"{theirs} is {shapes} as {name} needs")
            params[name].copy_(w)
            missing.discard(name)
    if missing:
        names = ", ".join(f"{rename(name, HF_NAMES)} (for {name})" for name in sorted(missing))
        raise KeyError(f"the checkpoint has no {names}")


def load_folder(folder: Path) -> Transformer:
    """The model in a Hugging Face folder: config.json and *.safetensors, in float32."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = Transformer(config_from_hf(config))
    files = sorted(folder.glob("*.safetensors"))
    load_weights(model, (pair for file in files for pair in load_file(file).items()))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="Hugging Face folder; default: random weights")
    parser.add_argument("--prompt", default="The quick brown fox")
    parser.add_argument("--n-new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.prompt or args.n_new < 1 or args.temperature < 0:
        parser.exit(2, "error: expected a --prompt, --n-new from 1 on, --temperature from 0 on\n")
    torch.manual_seed(args.seed)
    if args.weights:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(args.weights / "tokenizer.json"))
        model, prompt = load_folder(args.weights), tokenizer.encode(args.prompt).ids
    else:
        sizes = dict(vocab_size=256, n_layers=4, d_model=128, n_heads=4, n_kv_heads=2, head_dim=64)
        experts = dict(sparse=(True,), n_experts=32, n_active=4, d_expert=96, renormalise=True)
        model, prompt = Transformer(Config(**sizes, **experts)).eval(), list(args.prompt.encode())
    tokens_1T = torch.tensor([prompt])
    cache = model.new_cache()
    new = generate(model, tokens_1T, args.n_new, args.temperature, seed=args.seed, cache=cache)
    text = prompt + [int(token) for token in new]

    n_params = sum(p.numel() for p in model.parameters())
    n_bytes = sum(layer.n_bytes() // layer.buffers[0].shape[1] for layer in cache)
    print(f"{n_params:,} parameters; the cache takes {n_bytes:,} bytes a token in float32")
    print(tokenizer.decode(text) if args.weights else f"random weights, random tokens: {text}")


if __name__ == "__main__":
    main()
