"""Chapter 2: rotary positions replace the table of learned ones.

Since chapter 1: `rope` turns queries and keys by an angle that grows with their position (Su et al.
2021, RoFormer, section 3.2), so a score depends on the distance between two tokens alone. The
position table is gone, and with it the length at which it ended.

A tensor's name ends in its axes: `q_BTHK` has shape (B, T, H, K).
    B  sequences in the batch         T  tokens in this call
    S  tokens attention can see: those in the cache, then the T new ones
    D  width of the residual stream   F  hidden width of the MLP
    H  attention heads                K  width of one head
    P  pairs of dimensions that turn together: K/2
    V  vocabulary                     1  an axis of length one

Run it:  python rope.py    random weights, no download
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
    head_dim: int = 64  # always given: d_model / n_heads only by custom
    d_ff: int = 3072
    bias: bool = True  # of the linear layers; the norms always have theirs
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0  # the slowest pair turns once in about 2 pi theta tokens


class LayerCache:
    """What one attention layer keeps of the tokens it has seen: tensors shaped (B, seen, ...)."""

    def __init__(self, n_pad_B: Tensor | None = None) -> None:
        self.n_pad_B = n_pad_B
        self.kept: tuple[Tensor, ...] = ()
        self.n_seen = 0

    def positions(self, tokens_BT: Tensor) -> Tensor:
        """Positions (B, T) of tokens that come next. Padding, on the left, counts below zero."""
        pos_T = self.n_seen + torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        n_pad = 0 if self.n_pad_B is None else self.n_pad_B[:, None]
        return (pos_T - n_pad).expand(tokens_BT.shape)

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Joins the new tokens to the kept ones along axis 1, oldest first."""
        kept = self.kept or tuple(t[:, :0] for t in new)
        self.n_seen += new[0].shape[1]
        self.kept = tuple(torch.cat(pair, dim=1) for pair in zip(kept, new, strict=True))
        return self.kept

    def n_bytes(self) -> int:
        """Memory held, in bytes, not counting the integer positions."""
        return sum(t.nbytes for t in self.kept if t.is_floating_point())


def causal_mask(q_pos_BT: Tensor, k_pos_BS: Tensor) -> Tensor:
    """True where a query may look, (B, T, S): at itself and at earlier positions.

    Padding has positions below zero. Texts never see it; it sees itself, since a row with nothing
    to see would be 0/0.
    """
    q_pos_BT1, k_pos_B1S = q_pos_BT[:, :, None], k_pos_BS[:, None, :]
    return (k_pos_B1S <= q_pos_BT1) & ((k_pos_B1S >= 0) | (q_pos_BT1 < 0))


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
    q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, mask_BTS: Tensor, scale: float
) -> Tensor:
    """Scaled dot-product attention, (B, T, H, K) (Vaswani et al. 2017, section 3.2.1)."""
    scores_BHTS = torch.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK) * scale
    scores_BHTS = scores_BHTS.masked_fill(~mask_BTS[:, None], -math.inf)
    weights_BHTS = scores_BHTS.softmax(dim=-1)
    return torch.einsum("BHTS,BSHK->BTHK", weights_BHTS, v_BSHK)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.head_dim = cfg.head_dim
        self.q_proj = nn.Linear(cfg.d_model, cfg.n_heads * cfg.head_dim, bias=cfg.bias)
        self.k_proj = nn.Linear(cfg.d_model, cfg.n_heads * cfg.head_dim, bias=cfg.bias)
        self.v_proj = nn.Linear(cfg.d_model, cfg.n_heads * cfg.head_dim, bias=cfg.bias)
        self.o_proj = nn.Linear(cfg.n_heads * cfg.head_dim, cfg.d_model, bias=cfg.bias)

    def forward(
        self, x_BTD: Tensor, pos_BT: Tensor, turn: tuple[Tensor, Tensor], cache: LayerCache
    ) -> Tensor:
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTHK = self.k_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTHK = self.v_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        q_BTHK = rope(q_BTHK, turn)
        k_BTHK = rope(k_BTHK, turn)
        k_BSHK, v_BSHK, pos_BS = cache.append(k_BTHK, v_BTHK, pos_BT)
        mask_BTS = causal_mask(pos_BT, pos_BS)
        y_BTHK = attend(q_BTHK, k_BSHK, v_BSHK, mask_BTS, self.head_dim**-0.5)
        return self.o_proj(y_BTHK.flatten(-2))


class MLP(nn.Module):
    """The position-wise feed-forward network. GPT-2's GELU is the tanh approximation."""

    def __init__(self, cfg: Config, d_ff: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(cfg.d_model, d_ff, bias=cfg.bias)
        self.down_proj = nn.Linear(d_ff, cfg.d_model, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016, section 3), computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x.float() - x.float().mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        return (centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias).type_as(x)


class Block(nn.Module):
    """One layer: attention, then the MLP, each normed on the way in and added to the stream."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.attn_norm = LayerNorm(cfg.d_model, cfg.norm_eps)
        self.attn = Attention(cfg)
        self.mlp_norm = LayerNorm(cfg.d_model, cfg.norm_eps)
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
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = LayerNorm(cfg.d_model, cfg.norm_eps)
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
        return [LayerCache(n_pad_B) for _ in self.blocks]

    def forward(
        self, tokens_BT: Tensor, cache: list[LayerCache] | None = None, last_only: bool = False
    ) -> Tensor:
        """Logits (B, T, V); last_only: (B, 1, V), of the last token.

        The tokens continue those in the cache, if one is given, and are added to it.
        """
        cache = cache or self.new_cache()
        pos_BT = cache[0].positions(tokens_BT)
        turn = rope_angles(pos_BT, rope_frequencies(self.cfg.head_dim, self.cfg.rope_theta))
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

    q_11HK, k_11HK = torch.randn(2, 1, 1, 1, 64)
    freq_P = rope_frequencies(64, Config.rope_theta)
    print("the score of one query with one key 5 tokens before it, wherever the two stand:")
    for position in (5, 50, 500, 5000):
        q_turn = rope_angles(torch.tensor([[position]]), freq_P)
        k_turn = rope_angles(torch.tensor([[position - 5]]), freq_P)
        score = (rope(q_11HK, q_turn) * rope(k_11HK, k_turn)).sum()
        print(f"    query at {position:5,}: {score:.4f}")


if __name__ == "__main__":
    main()
