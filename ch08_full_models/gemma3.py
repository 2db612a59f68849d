"""Chapter 8: Gemma 2 and Gemma 3 (text).

Since llama3.py: norms before and after each part (chapter 7; Gemma 2 report, section 2), norms on
queries and keys (Gemma 3 report, section 2), a GELU in the gate, embeddings times sqrt(D), five
layers with a short window for each one that sees everything, and two rotary bases, one a kind.
Gemma 2 has no norms on queries and keys; it caps scores and logits instead, by tanh. Norm weights
are stored less one, and stay in float32: one plus a small number loses bits in bfloat16.

A tensor's name ends in its axes: `q_BTHK` has shape (B, T, H, K).
    B  sequences in the batch         T  tokens in this call
    S  tokens attention can see: those in the cache, then the T new ones
    D  width of the residual stream   F  hidden width of the MLP
    H  query heads                    K  width of one head
    J  key/value heads                G  query heads that share one: H/J
    P  pairs of dimensions that turn together: K/2
    V  vocabulary                     1  an axis of length one

Run it:  python gemma3.py                                        random weights, no download
         python gemma3.py --weights FOLDER --prompt "Once upon"  a Hugging Face folder
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
class Config:
    """Sizes of the model. The defaults are Gemma 3 270M."""

    vocab_size: int = 262144
    max_seq_len: int = 32768  # tokens the model was trained for; nothing here ends there
    n_layers: int = 18
    d_model: int = 640
    n_heads: int = 4
    n_kv_heads: int = 1
    head_dim: int = 256
    windows: tuple[int | None, ...] = (512,) * 5 + (None,)  # by layer, repeated; None sees all
    d_ff: int = 2048
    norm_eps: float = 1e-6
    qk_norm: bool = True
    attn_scale: float = 256**-0.5
    attn_cap: float | None = None  # Gemma 2: scores stay below it
    logit_cap: float | None = None
    rope_theta: float = 1_000_000.0  # the slowest pair turns once in about 2 pi theta tokens
    local_theta: float = 10_000.0  # in layers with a window
    rope_factor: float = 1.0  # positions are divided by it in layers without one


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


def rope_frequencies(head_dim: int, theta: float, factor: float) -> Tensor:
    """Radians that each pair of dimensions turns a token, (P,) in float32.

    theta^(-2i/K) (Su et al. 2021, section 3.2.2), divided by factor: position interpolation (Chen
    et al. 2023, section 2.3).
    """
    freq_P = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return freq_P / factor


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


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Bends x so that it stays within -cap and cap (Gemma 2 report, section 2)."""
    return cap * torch.tanh(x / cap)


def attend_capped(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, mask_BTS: Tensor, scale: float, cap: float
) -> Tensor:
    """Attention with capped scores, (B, T, H, K): torch's kernel cannot bend them."""
    q_BTJGK = q_BTHK.unflatten(2, (k_BSJK.shape[2], -1))
    scores_BJGTS = soft_cap(torch.einsum("BTJGK,BSJK->BJGTS", q_BTJGK, k_BSJK) * scale, cap)
    scores_BJGTS = scores_BJGTS.masked_fill(~mask_BTS[:, None, None], -math.inf)
    weights_BJGTS = scores_BJGTS.softmax(dim=-1)
    return torch.einsum("BJGTS,BSJK->BTJGK", weights_BJGTS, v_BSJK).flatten(2, 3)


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
        self.scale, self.cap = cfg.attn_scale, cfg.attn_cap
        self.q_proj = nn.Linear(cfg.d_model, cfg.n_heads * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim, bias=False)
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
        needs_mask = cache.needs_mask(pos_BT.shape[1]) or self.cap is not None
        mask_BTS = causal_mask(pos_BT, pos_BS, self.window) if needs_mask else None
        if self.cap is None:
            y_BTHK = attend(q_BTHK, k_BSJK, v_BSJK, mask_BTS, self.scale)
        else:
            y_BTHK = attend_capped(q_BTHK, k_BSJK, v_BSJK, mask_BTS, self.scale, self.cap)
        return self.o_proj(y_BTHK.flatten(-2))


class MLP(nn.Module):
    """The position-wise feed-forward network with a GELU gate (Shazeer 2020, section 2)."""

    def __init__(self, cfg: Config, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(cfg.d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, cfg.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich 2019, section 4), computed in float32.

    Rounded to the input's type after the weight multiplies it: Gemma's order.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.float().square().mean(dim=-1, keepdim=True)
        return (x.float() * torch.rsqrt(mean_square + self.eps) * self.weight).type_as(x)


class Block(nn.Module):
    """One layer: attention, then the MLP, each normed on the way in and out and added."""

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attn = Attention(cfg, cfg.windows[layer % len(cfg.windows)])
        self.attn_out_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mlp_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mlp = MLP(cfg, cfg.d_ff)
        self.mlp_out_norm = RMSNorm(cfg.d_model, cfg.norm_eps)

    def forward(
        self, x_BTD: Tensor, pos_BT: Tensor, turn: tuple[Tensor, Tensor], cache: LayerCache
    ) -> Tensor:
        y_BTD = self.attn(self.attn_norm(x_BTD), pos_BT, turn, cache)
        x_BTD = x_BTD + self.attn_out_norm(y_BTD)
        x_BTD = x_BTD + self.mlp_out_norm(self.mlp(self.mlp_norm(x_BTD)))
        return x_BTD


class Transformer(nn.Module):
    """Tokens in, next-token logits out. The output matrix is the embedding (tied)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
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
        turn = rope_angles(pos_BT, rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_factor))
        local_turn = rope_angles(pos_BT, rope_frequencies(cfg.head_dim, cfg.local_theta, 1.0))
        x_BTD = self.embed(tokens_BT)
        x_BTD = x_BTD * torch.tensor(cfg.d_model**0.5, dtype=x_BTD.dtype)  # rounded as the weights
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x_BTD = block(x_BTD, pos_BT, local_turn if block.attn.window else turn, layer_cache)
        x_BTD = self.norm(x_BTD)
        logits = F.linear(x_BTD[:, -1:] if last_only else x_BTD, self.embed.weight)
        return logits if cfg.logit_cap is None else soft_cap(logits, cfg.logit_cap)


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
    "norm.weight": "model.norm.weight",
    "blocks.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.attn.q_proj.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.{}.attn.k_proj.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.{}.attn.v_proj.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.{}.attn.o_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.attn.q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.{}.attn.k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "blocks.{}.attn_out_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.mlp_norm.weight": "model.layers.{}.pre_feedforward_layernorm.weight",
    "blocks.{}.mlp.gate_proj.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.mlp.up_proj.weight": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.mlp.down_proj.weight": "model.layers.{}.mlp.down_proj.weight",
    "blocks.{}.mlp_out_norm.weight": "model.layers.{}.post_feedforward_layernorm.weight",
}


def rename(name: str, names: dict[str, str]) -> str:
    """The name that `names` gives, its numbers kept in place; a name it lacks stays as it is."""
    number = r"(?<=\.)\d+(?=\.)"
    pattern = re.sub(number, "{}", name)
    return names.get(pattern, pattern).format(*re.findall(number, name))


GEMMA_2 = {  # what transformers' classes say where a published config.json is silent
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rope_theta": 10_000.0,
}
GEMMA_3 = GEMMA_2 | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}


def rope_config(hf: dict) -> tuple[float, float, float]:
    """Base, local base and factor from config.json: today's `rope_parameters`, or older keys."""
    today = hf.get("rope_parameters") or {}
    older = {"rope_theta": hf["rope_theta"]} | (hf.get("rope_scaling") or {})
    full = today.get("full_attention", today) or older
    local = today.get("sliding_attention")
    if local is None:  # Gemma 2 has one base
        local = {"rope_theta": hf.get("rope_local_base_freq", full["rope_theta"])}
    for rope, known in ((full, ("default", "linear")), (local, ("default",))):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in known:
            raise ValueError(f"rope_scaling is {kind!r}, only {' and '.join(known)} can be run")
    return full["rope_theta"], local["rope_theta"], full.get("factor", 1.0)


def config_from_hf(hf: dict) -> Config:
    """The Config that a checkpoint's config.json describes; of a multimodal one, the text part.

    Raises KeyError for a key that is not there, ValueError for one this file cannot run.
    """
    hf = hf.get("text_config", hf)
    is_2 = hf["model_type"] == "gemma2"
    hf = (GEMMA_2 if is_2 else GEMMA_3) | hf
    fixed = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
    }
    for key, value in fixed.items():
        if hf.get(key, value) != value:
            raise ValueError(f"{key} is {hf[key]!r}, only {value!r} can be run")
    if hf.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention is set, only causal attention can be run")
    pattern = hf.get("_sliding_window_pattern") or hf["sliding_window_pattern"]
    n_layers = hf["num_hidden_layers"]
    kinds = ("full" if (i + 1) % pattern == 0 else "sliding" for i in range(n_layers))
    kinds = hf.get("layer_types") or [f"{kind}_attention" for kind in kinds]
    theta, local_theta, factor = rope_config(hf)
    return Config(
        vocab_size=hf["vocab_size"],
        max_seq_len=hf["max_position_embeddings"],
        n_layers=n_layers,
        d_model=hf["hidden_size"],
        n_heads=hf["num_attention_heads"],
        n_kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
        windows=tuple(hf["sliding_window"] if k == "sliding_attention" else None for k in kinds),
        d_ff=hf["intermediate_size"],
        norm_eps=hf["rms_norm_eps"],
        qk_norm=not is_2,
        attn_scale=hf["query_pre_attn_scalar"] ** -0.5,
        attn_cap=hf["attn_logit_softcapping"],
        logit_cap=hf["final_logit_softcapping"],
        rope_theta=theta,
        local_theta=local_theta,
        rope_factor=factor,
    )


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors under our names, norm weights raised by one; no vision tower."""
    ours = {theirs: name for name, theirs in HF_NAMES.items()}
    out = {}
    for name, w in weights.items():
        if re.search(r"vision_tower|multi_modal_projector|lm_head|rotary_emb", name):
            continue  # lm_head is the embedding once more
        theirs = re.sub(r"^(model\.language_model|language_model\.model)\.", "model.", name)
        name = rename(theirs, ours)
        out[name] = w.float() + 1 if name != theirs and "norm" in name else w
    return out


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
        model, prompt = Transformer(Config()).eval(), list(args.prompt.encode())
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
