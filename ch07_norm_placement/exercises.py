"""Chapter 7, exercises: telling parts of the chapter to be written by you.

    python -m tests start ch07    copies this file to ch07_norm_placement/my_norm_placement.py
    python -m tests check ch07    says what is right, and what is not

Made from the chapter's files by `python -m tests start ch07 --stubs`.
"""

import math

import torch
import torch.nn as nn
from torch import Tensor

from ch07_norm_placement.norm_placement import (
    MLP,
    Config,
    LatentAttention,
    LayerCache,
    MoE,
    RMSNorm,
    attend,
    causal_mask,
    norm_at,
    rope,
)
from ch07_norm_placement.placements import ParallelBlock


# 1. soft_cap: A cap that bends (4 points, 5 minutes, easy)
def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Bends x so that it stays within -cap and cap (Gemma 2 report, section 2)."""
    raise NotImplementedError("soft_cap is not written yet")  # your code here


# 2. norm_parameters: How many numbers do the norms have? (4 points, 10 minutes, easy)
def norm_parameters(cfg: Config) -> int:
    """How many numbers the weights of all norms in a Transformer(cfg) have, that at the end too."""
    raise NotImplementedError("norm_parameters is not written yet")  # your code here


# 3. block_with_norms: Norms on the way in and on the way out (6 points, 15 minutes, easy)
class Block(nn.Module):
    """One layer: attention, then the MLP, each normed on the way in, out or both, and added."""

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        self.attn_norm, self.attn_out_norm = norm_at("in", cfg), norm_at("out", cfg)
        kind = Attention if cfg.d_latent is None else LatentAttention
        self.attn = kind(cfg, cfg.windows[layer % len(cfg.windows)])
        self.mlp_norm, self.mlp_out_norm = norm_at("in", cfg), norm_at("out", cfg)
        dense = cfg.n_experts == 0 or layer < cfg.n_dense_layers
        self.mlp = MLP(cfg, cfg.d_ff) if dense else MoE(cfg)

    def forward(
        self, x_BTD: Tensor, pos_BT: Tensor, turn: tuple[Tensor, Tensor], cache: LayerCache
    ) -> Tensor:
        raise NotImplementedError("Block.forward is not written yet")  # your code here


# 4. qk_norm_attention: Attention that norms its queries and keys (8 points, 40 minutes, medium)
class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, section 2.2) over a sliding window."""

    def __init__(self, cfg: Config, window: int | None) -> None:
        raise NotImplementedError("Attention is not written yet")  # your code here

    def forward(
        self, x_BTD: Tensor, pos_BT: Tensor, turn: tuple[Tensor, Tensor], cache: LayerCache
    ) -> Tensor:
        raise NotImplementedError("Attention is not written yet")  # your code here

    def normed(self, norm: nn.Module, x_BTHK: Tensor) -> Tensor:
        """Queries or keys, (B, T, H, K), normed head by head or all heads as one vector."""
        raise NotImplementedError("Attention is not written yet")  # your code here


# 5. parallel_sandwich: A parallel sandwich (5 points, 15 minutes, easy)
class ParallelSandwich(ParallelBlock):
    """Attention and MLP read the same normed stream, and each is normed before both are added.

    The norms are attn_norm on the way in, attn_out_norm and mlp_out_norm on the way out.
    """

    def forward(
        self, x_BTD: Tensor, pos_BT: Tensor, turn: tuple[Tensor, Tensor], cache: LayerCache
    ) -> Tensor:
        raise NotImplementedError("ParallelSandwich is not written yet")  # your code here


# 6. score_bound: How large can a score get? (6 points, 30 minutes, medium)
def score_bound(q_weight: Tensor, k_weight: Tensor, head_dim: int) -> float:
    """The smallest number that no score exceeds in size, whatever the stream and the matrices.

    The weights are those of q_norm and k_norm: (K,) and (K,) if each head is normed, (H K,) and
    (J K,) if the full width is. The scores are those that the softmax gets, q · k / sqrt(K). The
    rotation may turn each pair (i, i + K/2) by any angle.
    """
    raise NotImplementedError("score_bound is not written yet")  # your code here


# 7. norm_jacobian: What a norm does to gradients (7 points, 40 minutes, hard)
def norm_jacobian(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The derivative of RMSNorm for one token, (D, D): at [i, j] that of result i by input j.

    The result is weight * x / sqrt(mean(x^2) + eps).
    """
    raise NotImplementedError("norm_jacobian is not written yet")  # your code here


# 8. fold_norms: A checkpoint with as few norm weights as possible (12 points, 120 minutes, design)
def fold_norms(weights: dict[str, Tensor], cfg: Config, scale: float) -> dict[str, Tensor]:
    """A checkpoint for Transformer(cfg) in which as few numbers of norms as possible are not one.

    `weights` belong to a model that is a Transformer(cfg) but for its scores: it multiplies q · k
    by `scale`. The result gives the logits of that model, and has the same names and shapes.
    """
    raise NotImplementedError("fold_norms is not written yet")  # your code here
