"""Chapter 8: DeepSeek-V2 and V3, R1; Kimi K2, Moonlight, Youtu-LLM.

Since chapter 7: grouped-query attention, windows, norms on outputs and norms on queries and keys
are left out. Its own: experts that compete in groups, with V2's or V3's router (chapter 6), YaRN
(Peng et al. 2023, section 3.4) with its sharper attention in the scores' scale (DeepSeek's
published code), rotary pairs that lie side by side, multi-token prediction (DeepSeek-V3, section
2.2), and weights stored in float8, a scale for each block of them. For speed: torch's attention
kernel, and a cache in buffers that are allocated ahead.

A tensor's name ends in its axes: `q_BTHK` has shape (B, T, H, K).
    B  sequences in the batch         T  tokens in this call
    S  tokens attention can see: those in the cache, then the T new ones
    D  width of the residual stream   F  hidden width of the MLP
    H  heads                          K  width of one head; here, of the part that does not turn
    C  latent: stands for the keys and values of all heads
    R  the part of a head that turns  P  pairs of dimensions that turn together
    U  width of one head's value      Q  latent of the queries
    E  a head's query or key: K + R   X  its key and value side by side: K + U
    W  the one wide key of the absorbed form: C + R
    N  tokens of all sequences: B * T                 A  experts that a token goes to
    M  pairs of a token and one of its experts: N * A, in the order of the experts
    I  routed experts                 L  groups of experts
    O  experts of one group
    V  vocabulary                     1  an axis of length one

Run it:  python deepseek_v3.py                                        random weights, no download
         python deepseek_v3.py --weights FOLDER --prompt "Once upon"  a Hugging Face folder
"""

import argparse
import json
import math
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """How YaRN stretches rotary positions past the length the model was first trained at."""

    factor: float  # slow pairs turn this many times slower
    beta_fast: float  # fast, left alone: this many turns or more within original_len
    beta_slow: float  # slow: this many or fewer
    original_len: int  # tokens
    gain: float  # multiplies cosine and sine
    score_gain: float  # multiplies all scores, of the parts that do not turn as well


@dataclass(frozen=True)
class Config:
    """Sizes of the model. The defaults are DeepSeek-V2-Lite."""

    vocab_size: int = 102400
    max_seq_len: int = 163840  # tokens the model was trained for; nothing here ends there
    n_layers: int = 27
    d_model: int = 2048
    n_heads: int = 16
    head_dim: int = 128  # K
    d_latent: int = 512  # C
    d_q_latent: int | None = None  # Q; None: queries straight from the stream
    d_rope: int = 64  # R
    d_value: int = 128  # U
    d_ff: int = 10944  # of layers without experts
    n_experts: int = 64  # I; 0: all layers are without, as in Youtu-LLM
    n_active: int = 6  # A
    n_shared: int = 2  # experts that every token goes to besides
    d_expert: int = 1408  # hidden width of one expert
    n_dense_layers: int = 1  # the first layers are without experts
    moe_every: int = 1  # after these, layers whose number it divides have experts
    router: str = "softmax"  # V2's; V3's: "sigmoid"
    n_groups: int = 1  # L
    n_active_groups: int = 1  # those that a token's experts come from
    route_scale: float = 1.0  # multiplies the experts' weights
    n_mtp: int = 0  # 1: with the module for multi-token prediction
    norm_eps: float = 1e-6  # but for the norms of latents
    rope_theta: float = 10_000.0  # the slowest pair turns once in about 2 pi theta tokens
    rope_scaling: RopeScaling | None = RopeScaling(
        40.0, 32.0, 1.0, 4096, gain=1.0, score_gain=(0.1 * 0.707 * math.log(40) + 1) ** 2
    )
    rope_interleave: bool = True  # a pair is two neighbours; False: i and i + R/2
    tied: bool = False  # the output matrix is the embedding

    def __post_init__(self) -> None:
        if self.router not in ("softmax", "sigmoid"):
            raise ValueError(f"router: {self.router!r}, expected 'softmax' or 'sigmoid'")
        if self.n_mtp not in (0, 1):
            raise ValueError(f"n_mtp: {self.n_mtp!r}, expected 0 or 1")


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

    theta^(-2i/K) (Su et al. 2021, section 3.2.2). YaRN leaves fast pairs alone, slows down the slow
    ones and blends in between (Peng et al. 2023, section 3.2; a straight ramp over whole pairs, as
    in the authors' code).
    """
    freq_P = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if scaling is None:
        return freq_P
    length, betas = scaling.original_len / (2 * math.pi), (scaling.beta_fast, scaling.beta_slow)
    fast, slow = (head_dim * math.log(length / n) / (2 * math.log(theta)) for n in betas)
    first, last = max(math.floor(fast), 0), min(math.ceil(slow), head_dim - 1)
    width = last - first or 0.001  # a step instead of a ramp, without dividing by zero
    slow_P = ((torch.arange(len(freq_P)).float() - first) / width).clamp(0, 1)
    return slow_P * freq_P / scaling.factor + (1 - slow_P) * freq_P


def rope_angles(pos_BT: Tensor, freq_P: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, both (B, T, 1, P) in float32: once a call."""
    angle_BT1P = pos_BT[:, :, None, None] * freq_P.to(pos_BT.device)
    return angle_BT1P.cos(), angle_BT1P.sin()


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What multiplies cosine and sine, so that scores grow by its square; 1 for no extension.

    Against the flatter softmax over more tokens (Peng et al. 2023, section 3.4). Models of
    DeepSeek's put mscale before the logarithm and multiply the score's scale by the square instead.
    """
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope(x_BTHK: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turns dimensions (i, i + K/2) of each head by its position's angles, in float32."""
    cos_BT1P, sin_BT1P = turn
    a_BTHP, b_BTHP = x_BTHK.chunk(2, dim=-1)
    a_turned_BTHP = a_BTHP * cos_BT1P - b_BTHP * sin_BT1P
    b_turned_BTHP = b_BTHP * cos_BT1P + a_BTHP * sin_BT1P
    return torch.cat((a_turned_BTHP, b_turned_BTHP), dim=-1).type_as(x_BTHK)


def part_pairs(x_BTHR: Tensor) -> Tensor:
    """Brings dimensions (2i, 2i + 1) to (i, i + R/2), where `rope` turns them.

    There they stay: queries and keys agree, and only their products count.
    """
    return x_BTHR.unflatten(-1, (-1, 2)).mT.flatten(-2)


def attend(
    q_BTHK: Tensor, k_BSHK: Tensor, v_BSHU: Tensor, mask_BTS: Tensor | None, scale: float
) -> Tensor:
    """Scaled dot-product attention, (B, T, H, U). No mask: each query sees all up to itself.

    torch's fast kernels want values as wide as keys: zeros fill them up.
    """
    d_value, d_key = v_BSHU.shape[-1], k_BSHK.shape[-1]
    v_BSHK = F.pad(v_BSHU, (0, max(d_key - d_value, 0)))
    y_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSHK.transpose(1, 2),
        v_BSHK.transpose(1, 2),
        attn_mask=None if mask_BTS is None else mask_BTS[:, None],
        is_causal=mask_BTS is None and q_BTHK.shape[1] > 1,
        scale=scale,
    )
    return y_BHTK.transpose(1, 2)[..., :d_value]


def attend_one(
    q_BTHW: Tensor, k_BSW: Tensor, v_BSC: Tensor, mask_BTS: Tensor, scale: float
) -> Tensor:
    """The same with one key and one value for all heads, (B, T, H, C): not copied for each head."""
    scores_BHTS = torch.einsum("BTHW,BSW->BHTS", q_BTHW, k_BSW) * scale
    scores_BHTS = scores_BHTS.masked_fill(~mask_BTS[:, None], -math.inf)
    return torch.einsum("BHTS,BSC->BTHC", scores_BHTS.softmax(dim=-1), v_BSC)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1): C + R numbers a token in the cache.

    The letters a and b in the names are the checkpoints': a goes down to a latent, b up from it.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.interleave = cfg.rope_interleave
        self.d_q_latent = cfg.d_q_latent
        self.q_widths = (cfg.head_dim, cfg.d_rope)
        self.kv_widths = (cfg.head_dim, cfg.d_value)
        self.cache_widths = (cfg.d_latent, cfg.d_rope)
        self.scale = sum(self.q_widths) ** -0.5
        if cfg.rope_scaling is not None:
            self.scale *= cfg.rope_scaling.score_gain
        if cfg.d_q_latent is None:
            self.q_proj = nn.Linear(cfg.d_model, cfg.n_heads * sum(self.q_widths), bias=False)
        else:
            self.q_a_proj = nn.Linear(cfg.d_model, cfg.d_q_latent, bias=False)
            self.q_a_norm = RMSNorm(cfg.d_q_latent, 1e-6)  # whatever norm_eps: so in DeepSeek
            self.q_b_proj = nn.Linear(cfg.d_q_latent, cfg.n_heads * sum(self.q_widths), bias=False)
        self.kv_a_proj = nn.Linear(cfg.d_model, sum(self.cache_widths), bias=False)
        self.kv_a_norm = RMSNorm(cfg.d_latent, 1e-6)
        self.kv_b_proj = nn.Linear(cfg.d_latent, cfg.n_heads * sum(self.kv_widths), bias=False)
        self.o_proj = nn.Linear(cfg.n_heads * cfg.d_value, cfg.d_model, bias=False)

    def forward(
        self, x_BTD: Tensor, pos_BT: Tensor, turn: tuple[Tensor, Tensor], cache: LayerCache
    ) -> Tensor:
        q_BTHK, q_rot_BTHR = self.queries(x_BTD).split(self.q_widths, dim=-1)
        c_BTC, k_rot_BTR = self.kv_a_proj(x_BTD).split(self.cache_widths, dim=-1)
        k_rot_BT1R = k_rot_BTR[:, :, None]
        if self.interleave:
            q_rot_BTHR, k_rot_BT1R = part_pairs(q_rot_BTHR), part_pairs(k_rot_BT1R)
        q_rot_BTHR = rope(q_rot_BTHR, turn)
        k_rot_BTR = rope(k_rot_BT1R, turn)[:, :, 0]
        c_BSC, k_rot_BSR, pos_BS = cache.append(self.kv_a_norm(c_BTC), k_rot_BTR, pos_BT)
        absorbs = self.absorbs(pos_BT.shape[1], pos_BS.shape[1])
        needs_mask = absorbs or cache.needs_mask(pos_BT.shape[1])
        mask_BTS = causal_mask(pos_BT, pos_BS, None) if needs_mask else None
        form = self.absorbed if absorbs else self.expanded
        y_BTHU = form(q_BTHK, q_rot_BTHR, c_BSC, k_rot_BSR, mask_BTS)
        return self.o_proj(y_BTHU.flatten(-2))

    def queries(self, x_BTD: Tensor) -> Tensor:
        """Each head's query before it is turned, (B, T, H, E): K that will not be, R that will."""
        if self.d_q_latent is None:
            q = self.q_proj(x_BTD)
        else:
            q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BTD)))
        return q.unflatten(-1, (-1, sum(self.q_widths)))

    def absorbs(self, n_new: int, n_all: int) -> bool:
        """Whether the absorbed form takes fewer multiplications: it does for few new tokens.

        It spares kv_b_proj the tokens that are not new, and pays with wider keys and values.
        """
        d_latent, d_key_and_value = self.cache_widths[0], sum(self.kv_widths)
        spared = (n_all - n_new) * d_latent * d_key_and_value
        return spared > n_new * n_all * (2 * d_latent - d_key_and_value)

    def expanded(
        self,
        q_BTHK: Tensor,
        q_rot_BTHR: Tensor,
        c_BSC: Tensor,
        k_rot_BSR: Tensor,
        mask_BTS: Tensor | None,
    ) -> Tensor:
        """(B, T, H, U): multi-head attention on keys and values made from every latent."""
        kv_BSHX = self.kv_b_proj(c_BSC).unflatten(-1, (-1, sum(self.kv_widths)))
        k_BSHK, v_BSHU = kv_BSHX.split(self.kv_widths, dim=-1)
        k_rot_BSHR = k_rot_BSR[:, :, None].expand(-1, -1, k_BSHK.shape[2], -1)
        q_BTHE = torch.cat((q_BTHK, q_rot_BTHR), dim=-1)
        k_BSHE = torch.cat((k_BSHK, k_rot_BSHR), dim=-1)
        return attend(q_BTHE, k_BSHE, v_BSHU, mask_BTS, self.scale)

    def absorbed(
        self, q_BTHK: Tensor, q_rot_BTHR: Tensor, c_BSC: Tensor, k_rot_BSR: Tensor, mask_BTS: Tensor
    ) -> Tensor:
        """(B, T, H, U): multi-query attention whose one key and one value are the latent itself.

        q (M c) = (q M) c: what kv_b_proj would do to every token seen is done to the new queries,
        and to the sum of values instead of each value (DeepSeek-V2, section 2.1.2).
        """
        up_HXC = self.kv_b_proj.weight.unflatten(0, (-1, sum(self.kv_widths)))
        k_up_HKC, v_up_HUC = up_HXC.split(self.kv_widths, dim=1)
        q_BTHC = torch.einsum("BTHK,HKC->BTHC", q_BTHK, k_up_HKC)
        q_BTHW = torch.cat((q_BTHC, q_rot_BTHR), dim=-1)
        k_BSW = torch.cat((c_BSC, k_rot_BSR), dim=-1)
        y_BTHC = attend_one(q_BTHW, k_BSW, c_BSC, mask_BTS, self.scale)
        return torch.einsum("BTHC,HUC->BTHU", y_BTHC, v_up_HUC)


class MLP(nn.Module):
    """The position-wise feed-forward network with a SiLU gate (Shazeer 2020, section 2)."""

    def __init__(self, cfg: Config, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(cfg.d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, cfg.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def deepseek_v2(
    logit_NI: Tensor, n_active: int, n_groups: int, n_active_groups: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The likeliest experts within the best groups (DeepSeek-V2, section 2.2.2).

    A group counts as its best expert. The weights are probabilities times `scale`, not scaled to a
    sum of one.
    """
    prob_NI = logit_NI.softmax(dim=-1, dtype=torch.float32)
    group_NL = prob_NI.unflatten(-1, (n_groups, -1)).amax(dim=-1)
    prob_NI = within_best_groups(prob_NI, group_NL, n_active_groups, otherwise=0.0)
    weight_NA, expert_NA = prob_NI.topk(n_active, dim=-1)
    return expert_NA, weight_NA * scale


def deepseek_v3(
    logit_NI: Tensor,
    choice_bias_I: Tensor,
    n_active: int,
    n_groups: int,
    n_active_groups: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Sigmoid scores; a bias that only the choice sees (DeepSeek-V3, section 2.1.2).

    A group counts as its best two experts together, the bias included. The weights are the scores
    without the bias, scaled to a sum of `scale`. With one group, Kimi K2's and Moonlight's router.
    """
    score_NI = logit_NI.float().sigmoid()
    choice_NI = score_NI + choice_bias_I
    group_NL = choice_NI.unflatten(-1, (n_groups, -1)).topk(2, dim=-1).values.sum(dim=-1)
    # Not 0: a biased score can be below it, and an expert of a lost group would win.
    choice_NI = within_best_groups(choice_NI, group_NL, n_active_groups, otherwise=-math.inf)
    expert_NA = choice_NI.topk(n_active, dim=-1).indices
    weight_NA = score_NI.gather(1, expert_NA)
    return expert_NA, scale * weight_NA / (weight_NA.sum(dim=-1, keepdim=True) + 1e-20)


def within_best_groups(
    score_NI: Tensor, group_NL: Tensor, n_active_groups: int, otherwise: float
) -> Tensor:
    """The scores (N, I), with `otherwise` in place of those outside each token's best groups."""
    best = group_NL.topk(n_active_groups, dim=-1).indices
    lost_NL = torch.ones_like(group_NL, dtype=torch.bool).scatter(1, best, False)
    score_NLO = score_NI.unflatten(-1, (group_NL.shape[1], -1))
    return score_NLO.masked_fill(lost_NL[:, :, None], otherwise).flatten(1)


class MoE(nn.Module):
    """Routed experts, each an MLP, and the shared ones, which are one MLP (DeepSeekMoE, section 3).

    choice_bias has no gradient: whoever trains lowers it for experts that get too many tokens. It
    stays in float32, as the router's scores.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.n_active = cfg.n_active
        self.limits = (cfg.n_active, cfg.n_groups, cfg.n_active_groups, cfg.route_scale)
        self.router = nn.Linear(cfg.d_model, cfg.n_experts, bias=False)
        self.choice_bias = None
        if cfg.router == "sigmoid":
            bias_I = torch.zeros(cfg.n_experts, dtype=torch.float32)
            self.choice_bias = nn.Parameter(bias_I, requires_grad=False)
        self.experts = nn.ModuleList(MLP(cfg, cfg.d_expert) for _ in range(cfg.n_experts))
        self.shared = MLP(cfg, cfg.n_shared * cfg.d_expert) if cfg.n_shared else None

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The experts that each token goes to, and their weights in float32: both (N, A)."""
        logit_NI = F.linear(x_ND.float(), self.router.weight.float())
        if self.choice_bias is None:
            return deepseek_v2(logit_NI, *self.limits)
        return deepseek_v3(logit_NI, self.choice_bias, *self.limits)

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
        self.attn = LatentAttention(cfg)
        self.mlp_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        dense = layer < cfg.n_dense_layers or layer % cfg.moe_every != 0
        self.mlp = MLP(cfg, cfg.d_ff) if cfg.n_experts == 0 or dense else MoE(cfg)

    def forward(
        self, x_BTD: Tensor, pos_BT: Tensor, turn: tuple[Tensor, Tensor], cache: LayerCache
    ) -> Tensor:
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), pos_BT, turn, cache)
        x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return x_BTD


class PredictionBlock(Block):
    """One more layer, for multi-token prediction: it reads a token's state and the next token.

    (DeepSeek-V3, section 2.2.) Embedding and head are the model's own.
    """

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__(cfg, layer)
        self.embed_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.hidden_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.eh_proj = nn.Linear(2 * cfg.d_model, cfg.d_model, bias=False)
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)

    def join(self, next_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        """What goes into the layer, (B, T, D); the next token's embedding comes first.

        So it is in the published weights; the paper's formula has it second.
        """
        joined = torch.cat((self.embed_norm(next_BTD), self.hidden_norm(x_BTD)), dim=-1)
        return self.eh_proj(joined)


class Transformer(nn.Module):
    """Tokens in, next-token logits out."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        kinds = [Block] * cfg.n_layers + [PredictionBlock] * cfg.n_mtp
        self.blocks = nn.ModuleList(kind(cfg, layer) for layer, kind in enumerate(kinds))
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
        return [LayerCache(None, n_pad_B) for _ in self.blocks]

    def forward(
        self, tokens_BT: Tensor, cache: list[LayerCache] | None = None, last_only: bool = False
    ) -> Tensor:
        """Logits (B, T, V); last_only: (B, 1, V), of the last token.

        The tokens continue those in the cache, if one is given, and are added to it.
        """
        x_BTD = self.hidden(tokens_BT, cache or self.new_cache())
        return self.logits(x_BTD[:, -1:] if last_only else x_BTD)

    def hidden(self, tokens_BT: Tensor, cache: list[LayerCache]) -> Tensor:
        """Each token's state after the last layer, normed, (B, T, D): `logits` reads it."""
        n_layers = self.cfg.n_layers
        pos_BT = cache[0].positions(tokens_BT)
        turn = self.turns(pos_BT)
        x_BTD = self.embed(tokens_BT)
        for block, layer_cache in zip(self.blocks[:n_layers], cache[:n_layers], strict=True):
            x_BTD = block(x_BTD, pos_BT, turn, layer_cache)
        return self.norm(x_BTD)

    def after_next(
        self, x_BTD: Tensor, next_BT: Tensor, cache: list[LayerCache] | None = None
    ) -> Tensor:
        """Logits (B, T, V) of the token after the next: multi-token prediction, if n_mtp is 1.

        x_BTD is what `hidden` gave for tokens, next_BT the tokens that came after each. The pairs
        continue those that the cache's last entry has seen; it has one more than there are layers.
        """
        block, layer_cache = self.blocks[self.cfg.n_layers], (cache or self.new_cache())[-1]
        pos_BT = layer_cache.positions(next_BT)  # of each pair's first: only differences count
        x_BTD = block.join(self.embed(next_BT), x_BTD)
        return self.logits(block.norm(block(x_BTD, pos_BT, self.turns(pos_BT), layer_cache)))

    def turns(self, pos_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each position's angles, both (B, T, 1, P)."""
        cfg = self.cfg
        turn = rope_angles(pos_BT, rope_frequencies(cfg.d_rope, cfg.rope_theta, cfg.rope_scaling))
        if cfg.rope_scaling is not None:
            turn = tuple(part * cfg.rope_scaling.gain for part in turn)
        return turn

    def logits(self, x_BTD: Tensor) -> Tensor:
        """The next token's, (B, T, V)."""
        head = self.embed if self.cfg.tied else self.head
        return F.linear(x_BTD, head.weight)


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
    "blocks.{}.attn.q_a_proj.weight": "model.layers.{}.self_attn.q_a_proj.weight",
    "blocks.{}.attn.q_a_norm.weight": "model.layers.{}.self_attn.q_a_layernorm.weight",
    "blocks.{}.attn.q_b_proj.weight": "model.layers.{}.self_attn.q_b_proj.weight",
    "blocks.{}.attn.kv_a_proj.weight": "model.layers.{}.self_attn.kv_a_proj_with_mqa.weight",
    "blocks.{}.attn.kv_a_norm.weight": "model.layers.{}.self_attn.kv_a_layernorm.weight",
    "blocks.{}.attn.kv_b_proj.weight": "model.layers.{}.self_attn.kv_b_proj.weight",
    "blocks.{}.attn.o_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.mlp_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.mlp.gate_proj.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.mlp.up_proj.weight": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.mlp.down_proj.weight": "model.layers.{}.mlp.down_proj.weight",
    "blocks.{}.mlp.router.weight": "model.layers.{}.mlp.gate.weight",
    "blocks.{}.mlp.choice_bias": "model.layers.{}.mlp.gate.e_score_correction_bias",
    "blocks.{}.mlp.experts.{}.gate_proj.weight": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
    "blocks.{}.mlp.experts.{}.up_proj.weight": "model.layers.{}.mlp.experts.{}.up_proj.weight",
    "blocks.{}.mlp.experts.{}.down_proj.weight": "model.layers.{}.mlp.experts.{}.down_proj.weight",
    "blocks.{}.mlp.shared.gate_proj.weight": "model.layers.{}.mlp.shared_experts.gate_proj.weight",
    "blocks.{}.mlp.shared.up_proj.weight": "model.layers.{}.mlp.shared_experts.up_proj.weight",
    "blocks.{}.mlp.shared.down_proj.weight": "model.layers.{}.mlp.shared_experts.down_proj.weight",
    "blocks.{}.embed_norm.weight": "model.layers.{}.enorm.weight",
    "blocks.{}.hidden_norm.weight": "model.layers.{}.hnorm.weight",
    "blocks.{}.eh_proj.weight": "model.layers.{}.eh_proj.weight",
    "blocks.{}.norm.weight": "model.layers.{}.shared_head.norm.weight",
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


def yarn_config(scaling: dict) -> RopeScaling:
    """YaRN's part of config.json. What it leaves out is as transformers has it."""
    factor, mscale = scaling["factor"], scaling.get("mscale")
    mscale_all_dim = scaling.get("mscale_all_dim") or 0.0
    all_dim = yarn_attention_factor(factor, mscale_all_dim)
    gain = yarn_attention_factor(factor)
    if mscale and mscale_all_dim:
        gain = yarn_attention_factor(factor, mscale) / all_dim
    return RopeScaling(
        factor=factor,
        beta_fast=scaling.get("beta_fast") or 32.0,
        beta_slow=scaling.get("beta_slow") or 1.0,
        original_len=scaling["original_max_position_embeddings"],
        gain=scaling.get("attention_factor") or gain,
        score_gain=all_dim**2,  # once for the query, once for the key
    )


def config_from_hf(hf: dict) -> Config:
    """The Config that a checkpoint's config.json describes.

    Without multi-token prediction: dataclasses.replace(cfg, n_mtp=1) has it loaded as well. Raises
    KeyError for a key that is not there, ValueError for one this file cannot run.
    """
    theta, scaling = rope_config(hf)
    if scaling["rope_type"] not in ("default", "yarn"):
        kind = scaling["rope_type"]
        raise ValueError(f"rope_scaling is {kind!r}, only default and yarn can be run")
    is_2, is_dense = hf["model_type"] == "deepseek_v2", hf["model_type"] == "youtu"
    grouped = not is_2 or hf["topk_method"] == "group_limited_greedy"
    v2_method = "group_limited_greedy" if grouped else "greedy"
    quantized = hf.get("quantization_config") or {}
    fixed = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "truncate": True,  # of YaRN's ramp, to whole pairs
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "scoring_func": "softmax" if is_2 else "sigmoid",
        "norm_topk_prob": not is_2,
        "topk_method": v2_method if is_2 else "noaux_tc",
    }
    given = hf | scaling | quantized
    for key, value in fixed.items():
        if given.get(key, value) != value:
            raise ValueError(f"{key} is {given[key]!r}, only {value!r} can be run")
    experts = dict(n_experts=0)
    if not is_dense:
        experts = dict(
            n_experts=hf["n_routed_experts"],
            n_active=hf["num_experts_per_tok"],
            n_shared=hf["n_shared_experts"] or 0,
            d_expert=hf["moe_intermediate_size"],
            n_dense_layers=hf["first_k_dense_replace"],
            moe_every=hf.get("moe_layer_freq", 1),
            router=fixed["scoring_func"],
            n_groups=hf["n_group"] if grouped else 1,
            n_active_groups=hf["topk_group"] if grouped else 1,
            route_scale=hf["routed_scaling_factor"],
        )
    return Config(
        vocab_size=hf["vocab_size"],
        max_seq_len=hf["max_position_embeddings"],
        n_layers=hf["num_hidden_layers"],
        d_model=hf["hidden_size"],
        n_heads=hf["num_attention_heads"],
        head_dim=hf["qk_nope_head_dim"],
        d_latent=hf["kv_lora_rank"],
        d_q_latent=hf["q_lora_rank"],
        d_rope=hf["qk_rope_head_dim"],
        d_value=hf["v_head_dim"],
        d_ff=hf["intermediate_size"],
        **experts,
        norm_eps=hf["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=None if scaling["rope_type"] == "default" else yarn_config(scaling),
        rope_interleave=hf.get("rope_interleave", True),
        tied=hf.get("tie_word_embeddings", is_dense),
    )


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
    """The checkpoint's tensors under our names; rotary tables of old files are left out.

    So are the copies of embedding and head that come with multi-token prediction.
    """
    ours = {theirs: name for name, theirs in HF_NAMES.items()}
    spare = re.compile(r"rotary_emb\.inv_freq$|layers\.\d+\.(embed_tokens|shared_head\.head)\.")
    kept = (pair for pair in weights.items() if not spare.search(pair[0]))
    split = (part for pair in kept for part in split_experts(*pair).items())
    return {rename(name, ours): w for name, w in split}


BLOCK = 128  # rows, and columns, of a float8 matrix that share a scale


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """A float8 matrix times its scales, in float32; one scale for each 128 x 128 numbers.

    The last blocks may be smaller. Raises ValueError if there are not as many scales as blocks.
    """
    n_blocks = tuple(math.ceil(n / BLOCK) for n in weight.shape)
    if scale.shape != n_blocks:
        shapes = f"{tuple(scale.shape)}, not {n_blocks}"
        raise ValueError(f"scales are {shapes} as a matrix of {tuple(weight.shape)} needs")
    rows = scale.float().repeat_interleave(BLOCK, dim=0)[: weight.shape[0]]
    return weight.float() * rows.repeat_interleave(BLOCK, dim=1)[:, : weight.shape[1]]


def dequantized(pairs: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The pairs of name and tensor, float8 matrices multiplied with their scales.

    A matrix and its scales, NAME and NAME_scale_inv, may come in any order. Raises KeyError for one
    without the other, ValueError for scales of the wrong shape.
    """
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in pairs:
        stem = name.removesuffix("_scale_inv")
        if name == stem and tensor.dtype != torch.float8_e4m3fn:
            yield name, tensor
            continue
        parts = waiting.setdefault(stem, {})
        parts[name] = tensor
        if len(parts) == 2:
            del waiting[stem]
            try:
                whole = dequantize(parts[stem], parts[f"{stem}_scale_inv"])
            except ValueError as err:
                raise ValueError(f"{stem}_scale_inv: {err}") from err
            yield stem, whole
    for stem, parts in waiting.items():
        lacking = stem if stem not in parts else f"{stem}_scale_inv"
        raise KeyError(f"the checkpoint has no {lacking} (for {next(iter(parts))})")


@torch.no_grad()
def load_weights(
    model: nn.Module, weights: dict[str, Tensor] | Iterable[tuple[str, Tensor]]
) -> None:
    """Copies a checkpoint into the model, tensor by tensor; all on both sides must find a partner.

    Takes a dict, or pairs that a large file yields one by one. Raises KeyError for a tensor that
    only one side has, ValueError for two shapes that differ. Only multi-token prediction may be
    left over: a layer past the last.
    """
    params = dict(model.named_parameters())
    missing, beyond = set(params), {}
    for theirs, tensor in dequantized(weights.items() if isinstance(weights, dict) else weights):
        for name, w in convert({theirs: tensor}).items():
            if name == "head.weight" and model.cfg.tied:
                continue  # the embedding once more
            layer = re.match(r"blocks\.(\d+)\.", name)
            if layer and int(layer[1]) >= len(model.blocks):
                if "eh_proj" not in beyond.get(layer[1], ""):
                    beyond[layer[1]] = theirs
                continue  # multi-token prediction that is not asked for
            if name not in params:
                raise KeyError(f"{theirs}: the model has no such parameter")
            if w.shape != params[name].shape:
                shapes = f"{tuple(w.shape)}, not {tuple(params[name].shape)}"
                raise ValueError(f"{theirs} is {shapes} as {name} needs")
            params[name].copy_(w)
            missing.discard(name)
    for theirs in beyond.values():
        if "eh_proj" not in theirs:  # an ordinary layer
            raise KeyError(f"{theirs}: the model has no such parameter")
    if missing:
        names = ", ".join(f"{rename(name, HF_NAMES)} (for {name})" for name in sorted(missing))
        raise KeyError(f"the checkpoint has no {names}")


def load_folder(folder: Path, n_mtp: int = 0) -> Transformer:
    """The model in a Hugging Face folder: config.json and *.safetensors, in float32.

    n_mtp=1: with multi-token prediction.
    """
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = Transformer(replace(config_from_hf(config), n_mtp=n_mtp))
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
    small = Config(
        vocab_size=256,
        n_layers=4,
        d_model=256,
        n_heads=8,
        d_latent=128,
        d_q_latent=192,
        d_rope=32,
        head_dim=64,
        d_value=64,
        d_ff=512,
        n_experts=32,
        n_active=4,
        n_shared=1,
        d_expert=96,
        router="sigmoid",
        n_groups=4,
        n_active_groups=2,
        route_scale=2.5,
    )
    if args.weights:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(args.weights / "tokenizer.json"))
        model, prompt = load_folder(args.weights), tokenizer.encode(args.prompt).ids
    else:
        model, prompt = Transformer(small).eval(), list(args.prompt.encode())
    tokens_1T = torch.tensor([prompt])
    cache = model.new_cache()
    new = generate(model, tokens_1T, args.n_new, args.temperature, seed=args.seed, cache=cache)
    text = prompt + [int(token) for token in new]

    n_params = sum(p.numel() for p in model.parameters())
    n_bytes = sum(layer.n_bytes() // layer.buffers[0].shape[1] for layer in cache)
    print(f"{n_params:,} parameters; the cache takes {n_bytes:,} bytes a token in float32")
    print(tokenizer.decode(text) if args.weights else f"random weights, random tokens: {text}")

    attn, cfg, n_seen = model.blocks[0].attn, model.cfg, 2000
    q_1THK, q_rot_1THR = attn.queries(torch.randn(1, 1, cfg.d_model)).split(attn.q_widths, -1)
    c_1SC, k_rot_1SR = torch.randn(1, n_seen, sum(attn.cache_widths)).split(attn.cache_widths, -1)
    parts = q_1THK, q_rot_1THR, c_1SC, k_rot_1SR, torch.ones(1, 1, n_seen, dtype=torch.bool)
    outputs, times = [], []
    with torch.no_grad():
        for form in (attn.expanded, attn.absorbed):
            form(*parts)  # once to warm up
            start = time.perf_counter()
            outputs.append(form(*parts))
            times.append(1000 * (time.perf_counter() - start))
    n_mha = cfg.n_heads * (sum(attn.q_widths) + cfg.d_value)
    difference = (outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()
    print(f"a layer keeps {sum(attn.cache_widths)} numbers a token; all heads would {n_mha:,}")
    print(f"one token looks at {n_seen:,}, milliseconds: expanded {times[0]:.1f}, ", end="")
    print(f"absorbed {times[1]:.1f}; they differ by {difference:.0e} of the largest value")


if __name__ == "__main__":
    main()
