"""Chapter 5: a gate in the MLP, and a norm that only divides.

Since chapter 4: the MLP multiplies its hidden layer by a gate (Shazeer 2020, section 2: SwiGLU),
norms divide by the root mean square and subtract no mean (Zhang and Sennrich 2019, section 4), and
no linear layer has a bias.

A tensor's name ends in its axes: `q_BTHK` has shape (B, T, H, K).
    B  sequences in the batch         T  tokens in this call
    S  tokens attention can see: those in the cache, then the T new ones
    D  width of the residual stream   F  hidden width of the MLP
    H  query heads                    K  width of one head
    J  key/value heads                G  query heads that share one: H/J
    C  latent: stands for the keys and values of all heads
    R  the part of a latent head that turns; K is then the part that does not
    U  width of one head's value      Q  latent of the queries
    E  a latent head's query or key: K + R            X  its key and value side by side: K + U
    W  the one wide key of the absorbed form: C + R
    P  pairs of dimensions that turn together: K/2
    V  vocabulary                     1  an axis of length one

Run it:  python swiglu_rmsnorm.py    random weights, no download
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Sizes of the model. The defaults are those of GPT-2 small."""

    vocab_size: int = 50257
    n_layers: int = 12
    d_model: int = 768
    n_heads: int = 12
    n_kv_heads: int = 4  # n_heads: plain multi-head attention; 1: multi-query attention
    head_dim: int = 64  # always given: d_model / n_heads only by custom
    windows: tuple[int | None, ...] = (None,)  # by layer, repeated; None sees everything
    d_latent: int | None = 256  # C, latent attention; None: grouped-query attention
    d_q_latent: int | None = 384  # Q; None: queries straight from the stream, as in V2-Lite
    d_rope: int = 32  # R
    d_value: int = 64  # U
    d_ff: int = 2048  # 2/3 of 3072: three matrices now, with as many parameters as two
    bias: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0  # the slowest pair turns once in about 2 pi theta tokens


class LayerCache:
    """What one attention layer keeps of the tokens it has seen: tensors shaped (B, seen, ...).

    A layer with a window keeps the last `window` of them.
    """

    def __init__(self, window: int | None, n_pad_B: Tensor | None = None) -> None:
        self.window = window
        self.n_pad_B = n_pad_B
        self.kept: tuple[Tensor, ...] = ()
        self.n_seen = 0

    def positions(self, tokens_BT: Tensor) -> Tensor:
        """Positions (B, T) of tokens that come next. Padding, on the left, counts below zero."""
        pos_T = self.n_seen + torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        n_pad = 0 if self.n_pad_B is None else self.n_pad_B[:, None]
        return (pos_T - n_pad).expand(tokens_BT.shape)

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Joins the new tokens to the kept ones along axis 1, oldest first.

        Returns all of them: the first new token may look at `window` - 1 old ones. Keeps fewer.
        """
        kept = self.kept or tuple(t[:, :0] for t in new)
        self.n_seen += new[0].shape[1]
        joined = tuple(torch.cat(pair, dim=1) for pair in zip(kept, new, strict=True))
        self.kept = joined
        if self.window is not None:  # cloned, since a slice would hold on to all of the memory
            self.kept = tuple(t[:, -self.window :].clone() for t in joined)
        return joined

    def n_bytes(self) -> int:
        """Memory held, in bytes, not counting the integer positions."""
        return sum(t.nbytes for t in self.kept if t.is_floating_point())


def causal_mask(q_pos_BT: Tensor, k_pos_BS: Tensor, window: int | None) -> Tensor:
    """True where a query may look, (B, T, S): at itself and earlier positions, `window` in all.

    Padding has positions below zero. Texts never see it; it sees itself, since a row with nothing
    to see would be 0/0.
    """
    q_pos_BT1, k_pos_B1S = q_pos_BT[:, :, None], k_pos_BS[:, None, :]
    mask_BTS = (k_pos_B1S <= q_pos_BT1) & ((k_pos_B1S >= 0) | (q_pos_BT1 < 0))
    return mask_BTS if window is None else mask_BTS & (k_pos_B1S > q_pos_BT1 - window)


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """Radians that each pair of dimensions turns a token, (P,) in float32.

    theta^(-2i/K) (Su et al. 2021, section 3.2.2).
    """
    return 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)


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
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJU: Tensor, mask_BTS: Tensor, scale: float
) -> Tensor:
    """Scaled dot-product attention, (B, T, H, U): query head h reads key/value head h // G."""
    q_BTJGK = q_BTHK.unflatten(2, (k_BSJK.shape[2], -1))
    scores_BJGTS = torch.einsum("BTJGK,BSJK->BJGTS", q_BTJGK, k_BSJK) * scale
    scores_BJGTS = scores_BJGTS.masked_fill(~mask_BTS[:, None, None], -math.inf)
    weights_BJGTS = scores_BJGTS.softmax(dim=-1)
    return torch.einsum("BJGTS,BSJU->BTJGU", weights_BJGTS, v_BSJU).flatten(2, 3)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, section 2.2) over a sliding window."""

    def __init__(self, cfg: Config, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.head_dim = cfg.head_dim
        self.q_proj = nn.Linear(cfg.d_model, cfg.n_heads * cfg.head_dim, bias=cfg.bias)
        self.k_proj = nn.Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim, bias=cfg.bias)
        self.v_proj = nn.Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim, bias=cfg.bias)
        self.o_proj = nn.Linear(cfg.n_heads * cfg.head_dim, cfg.d_model, bias=cfg.bias)

    def forward(
        self, x_BTD: Tensor, pos_BT: Tensor, turn: tuple[Tensor, Tensor], cache: LayerCache
    ) -> Tensor:
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTJK = self.k_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTJK = self.v_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        q_BTHK = rope(q_BTHK, turn)
        k_BTJK = rope(k_BTJK, turn)
        k_BSJK, v_BSJK, pos_BS = cache.append(k_BTJK, v_BTJK, pos_BT)
        mask_BTS = causal_mask(pos_BT, pos_BS, self.window)
        y_BTHK = attend(q_BTHK, k_BSJK, v_BSJK, mask_BTS, self.head_dim**-0.5)
        return self.o_proj(y_BTHK.flatten(-2))


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1): C + R numbers a token in the cache.

    The letters a and b in the names are the checkpoints': a goes down to a latent, b up from it.
    """

    def __init__(self, cfg: Config, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.d_q_latent = cfg.d_q_latent
        self.q_widths = (cfg.head_dim, cfg.d_rope)
        self.kv_widths = (cfg.head_dim, cfg.d_value)
        self.cache_widths = (cfg.d_latent, cfg.d_rope)
        if cfg.d_q_latent is None:
            self.q_proj = nn.Linear(cfg.d_model, cfg.n_heads * sum(self.q_widths), bias=False)
        else:
            self.q_a_proj = nn.Linear(cfg.d_model, cfg.d_q_latent, bias=cfg.bias)
            self.q_a_norm = RMSNorm(cfg.d_q_latent, 1e-6)  # whatever norm_eps: so in DeepSeek
            self.q_b_proj = nn.Linear(cfg.d_q_latent, cfg.n_heads * sum(self.q_widths), bias=False)
        self.kv_a_proj = nn.Linear(cfg.d_model, sum(self.cache_widths), bias=cfg.bias)
        self.kv_a_norm = RMSNorm(cfg.d_latent, 1e-6)
        self.kv_b_proj = nn.Linear(cfg.d_latent, cfg.n_heads * sum(self.kv_widths), bias=False)
        self.o_proj = nn.Linear(cfg.n_heads * cfg.d_value, cfg.d_model, bias=cfg.bias)

    def forward(
        self, x_BTD: Tensor, pos_BT: Tensor, turn: tuple[Tensor, Tensor], cache: LayerCache
    ) -> Tensor:
        q_BTHK, q_rot_BTHR = self.queries(x_BTD).split(self.q_widths, dim=-1)
        c_BTC, k_rot_BTR = self.kv_a_proj(x_BTD).split(self.cache_widths, dim=-1)
        q_rot_BTHR = rope(q_rot_BTHR, turn)
        k_rot_BTR = rope(k_rot_BTR[:, :, None], turn)[:, :, 0]
        c_BSC, k_rot_BSR, pos_BS = cache.append(self.kv_a_norm(c_BTC), k_rot_BTR, pos_BT)
        mask_BTS = causal_mask(pos_BT, pos_BS, self.window)
        form = self.absorbed if self.absorbs(*mask_BTS.shape[1:]) else self.expanded
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
        self, q_BTHK: Tensor, q_rot_BTHR: Tensor, c_BSC: Tensor, k_rot_BSR: Tensor, mask_BTS: Tensor
    ) -> Tensor:
        """(B, T, H, U): multi-head attention on keys and values made from every latent."""
        kv_BSHX = self.kv_b_proj(c_BSC).unflatten(-1, (-1, sum(self.kv_widths)))
        k_BSHK, v_BSHU = kv_BSHX.split(self.kv_widths, dim=-1)
        k_rot_BSHR = k_rot_BSR[:, :, None].expand(-1, -1, k_BSHK.shape[2], -1)
        q_BTHE = torch.cat((q_BTHK, q_rot_BTHR), dim=-1)
        k_BSHE = torch.cat((k_BSHK, k_rot_BSHR), dim=-1)
        return attend(q_BTHE, k_BSHE, v_BSHU, mask_BTS, sum(self.q_widths) ** -0.5)

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
        k_BS1W = torch.cat((c_BSC, k_rot_BSR), dim=-1)[:, :, None]
        scale = sum(self.q_widths) ** -0.5  # of the heads' own width, not of the wide key's
        y_BTHC = attend(q_BTHW, k_BS1W, c_BSC[:, :, None], mask_BTS, scale)
        return torch.einsum("BTHC,HUC->BTHU", y_BTHC, v_up_HUC)


class MLP(nn.Module):
    """The position-wise feed-forward network with a SiLU gate (Shazeer 2020, section 2)."""

    def __init__(self, cfg: Config, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.d_model, d_ff, bias=cfg.bias)
        self.up_proj = nn.Linear(cfg.d_model, d_ff, bias=cfg.bias)
        self.down_proj = nn.Linear(d_ff, cfg.d_model, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


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
    """One layer: attention, then the MLP, each normed on the way in and added to the stream."""

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        kind = Attention if cfg.d_latent is None else LatentAttention
        self.attn = kind(cfg, cfg.windows[layer % len(cfg.windows)])
        self.mlp_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mlp = MLP(cfg, cfg.d_ff)

    def forward(
        self, x_BTD: Tensor, pos_BT: Tensor, turn: tuple[Tensor, Tensor], cache: LayerCache
    ) -> Tensor:
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), pos_BT, turn, cache)
        x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD))
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
        d_turn = self.cfg.head_dim if self.cfg.d_latent is None else self.cfg.d_rope
        turn = rope_angles(pos_BT, rope_frequencies(d_turn, self.cfg.rope_theta))
        x_BTD = self.embed(tokens_BT)
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x_BTD = block(x_BTD, pos_BT, turn, layer_cache)
        x_BTD = self.norm(x_BTD)
        return F.linear(x_BTD[:, -1:] if last_only else x_BTD, self.embed.weight)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default="The quick brown fox")
    parser.add_argument("--n-new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.prompt or args.n_new < 1 or args.temperature < 0:
        parser.exit(2, "error: expected a --prompt, --n-new from 1 on, --temperature from 0 on\n")
    torch.manual_seed(args.seed)
    model, prompt = Transformer(Config()).eval(), list(args.prompt.encode())
    tokens_1T = torch.tensor([prompt])
    cache = model.new_cache()
    new = generate(model, tokens_1T, args.n_new, args.temperature, seed=args.seed, cache=cache)
    text = prompt + [int(token) for token in new]

    n_params = sum(p.numel() for p in model.parameters())
    n_bytes = sum(layer.n_bytes() for layer in cache) // cache[0].n_seen
    print(f"{n_params:,} parameters; the cache takes {n_bytes:,} bytes a token in float32")
    print(f"random weights, random tokens: {text}")

    d_model = Config.d_model
    n_two, n_three = 2 * d_model * 3072, 3 * d_model * Config.d_ff
    print(f"an MLP of two matrices, 3,072 wide: {n_two:,} parameters; of three: {n_three:,}")
    shifted = torch.randn(d_model) + 10
    print(f"RMSNorm keeps a mean: {RMSNorm(d_model, 1e-6)(shifted).mean():.3f}")


if __name__ == "__main__":
    main()
