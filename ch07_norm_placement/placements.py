"""Chapter 7, beside the chapter's own: places for the norms that today's models have left behind.

norm_placement.py norms inputs, outputs or both. Here are the others: after the addition (Vaswani et
al. 2017, section 3.1), one norm for two halves that run side by side (Chowdhery et al. 2022, PaLM,
section 2), and none. And Gemma 2's caps on scores and logits (Gemma 2 report, section 2), which
QK-norm replaced in Gemma 3. `build` makes a model with any of them.

A tensor's name ends in its axes, with the letters of norm_placement.py.

Run it:  python -m ch07_norm_placement.placements    the residual stream's size, layer by layer
"""

import argparse
import math
from dataclasses import replace

import torch
import torch.nn as nn
from torch import Tensor

from ch07_norm_placement.norm_placement import (
    Attention,
    Block,
    Config,
    LayerCache,
    Transformer,
    causal_mask,
    rope,
    rope_angles,
    rope_frequencies,
)

PLACEMENTS = ("post", "pre", "out", "sandwich", "parallel", "none")
NORM_AT = {"pre": "in", "out": "out", "sandwich": "both"}


class PostNormBlock(Block):
    """The sum of the stream and a half's output is normed, so the stream itself is."""

    def forward(
        self, x_BTD: Tensor, pos_BT: Tensor, turn: tuple[Tensor, Tensor], cache: LayerCache
    ) -> Tensor:
        x_BTD = self.attn_norm(x_BTD + self.attn(x_BTD, pos_BT, turn, cache))
        x_BTD = self.mlp_norm(x_BTD + self.mlp(x_BTD))
        return x_BTD


class ParallelBlock(Block):
    """Attention and MLP read the same normed input, and both are added at once."""

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__(cfg, layer)
        self.mlp_norm = nn.Identity()

    def forward(
        self, x_BTD: Tensor, pos_BT: Tensor, turn: tuple[Tensor, Tensor], cache: LayerCache
    ) -> Tensor:
        normed_BTD = self.attn_norm(x_BTD)
        return x_BTD + self.attn(normed_BTD, pos_BT, turn, cache) + self.mlp(normed_BTD)


class BareBlock(Block):
    """No norm in either half."""

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__(cfg, layer)
        self.attn_norm, self.mlp_norm = nn.Identity(), nn.Identity()


BLOCKS = {"post": PostNormBlock, "parallel": ParallelBlock, "none": BareBlock}


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


class CappedAttention(Attention):
    """Grouped-query attention with capped scores."""

    def __init__(self, cfg: Config, window: int | None, cap: float) -> None:
        super().__init__(cfg, window)
        self.cap = cap

    def forward(
        self, x_BTD: Tensor, pos_BT: Tensor, turn: tuple[Tensor, Tensor], cache: LayerCache
    ) -> Tensor:
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTJK = self.k_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTJK = self.v_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        q_BTHK = rope(self.normed(self.q_norm, q_BTHK), turn)
        k_BTJK = rope(self.normed(self.k_norm, k_BTJK), turn)
        k_BSJK, v_BSJK, pos_BS = cache.append(k_BTJK, v_BTJK, pos_BT)
        mask_BTS = causal_mask(pos_BT, pos_BS, self.window)
        y_BTHK = attend_capped(q_BTHK, k_BSJK, v_BSJK, mask_BTS, self.head_dim**-0.5, self.cap)
        return self.o_proj(y_BTHK.flatten(-2))


class CappedTransformer(Transformer):
    """A model whose logits stay within -logit_cap and logit_cap."""

    def __init__(self, cfg: Config, logit_cap: float) -> None:
        super().__init__(cfg)
        self.logit_cap = logit_cap

    def forward(
        self, tokens_BT: Tensor, cache: list[LayerCache] | None = None, last_only: bool = False
    ) -> Tensor:
        return soft_cap(super().forward(tokens_BT, cache, last_only), self.logit_cap)


def build(
    cfg: Config,
    placement: str,
    attn_cap: float | None = None,
    logit_cap: float | None = None,
) -> Transformer:
    """An untrained model with its norms at a place of PLACEMENTS, whatever cfg.norm_at says.

    "post" and "none" have no norm before the output matrix either: the first needs none, the second
    has none. attn_cap (Gemma 2: 50) is for grouped-query attention only; logit_cap is 30 there.
    Raises ValueError for another placement.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement: {placement!r}, expected one of {', '.join(PLACEMENTS)}")
    cfg = replace(cfg, norm_at=NORM_AT.get(placement, "in"))
    model = Transformer(cfg) if logit_cap is None else CappedTransformer(cfg, logit_cap)
    if placement in BLOCKS:
        blocks = (BLOCKS[placement](cfg, layer) for layer in range(cfg.n_layers))
        model.blocks = nn.ModuleList(blocks)
    if placement in ("post", "none"):
        model.norm = nn.Identity()
    if attn_cap is not None:
        for block in model.blocks:
            block.attn = CappedAttention(cfg, block.attn.window, attn_cap)
    model.init_weights()
    return model


@torch.no_grad()
def stream_sizes(model: Transformer, tokens_BT: Tensor) -> list[float]:
    """Root mean square of the residual stream: of the embeddings, then after each block."""
    cache = model.new_cache()
    pos_BT = cache[0].positions(tokens_BT)
    turn = rope_angles(pos_BT, rope_frequencies(model.cfg.head_dim, model.cfg.rope_theta))
    x_BTD = model.embed(tokens_BT)
    sizes = [x_BTD.square().mean().sqrt().item()]
    for block, layer_cache in zip(model.blocks, cache, strict=True):
        x_BTD = block(x_BTD, pos_BT, turn, layer_cache)
        sizes.append(x_BTD.square().mean().sqrt().item())
    return sizes


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    cfg = Config(vocab_size=256, n_layers=8, d_model=256, n_heads=4, d_latent=None, n_experts=0)
    tokens_BT = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
    print("root mean square of the residual stream, untrained: embeddings, then after each layer")
    for placement in PLACEMENTS:
        torch.manual_seed(0)
        sizes = stream_sizes(build(cfg, placement), tokens_BT)
        print(f"{placement:9}" + "".join(f"{size:7.3f}" for size in sizes))


if __name__ == "__main__":
    main()
