"""Chapter 7: answers to the exercises that the chapter's own files do not contain.

A tensor's name ends in its axes, with the letters of norm_placement.py.
"""

import math

import torch
from torch import Tensor

from ch07_norm_placement.norm_placement import Config, LayerCache
from ch07_norm_placement.placements import ParallelBlock


def norm_parameters(cfg: Config) -> int:
    """How many numbers the weights of all norms in a Transformer(cfg) have, that at the end too."""
    n_layer = {"in": 2, "out": 2, "both": 4}[cfg.norm_at] * cfg.d_model
    if cfg.d_latent is not None:
        n_layer += cfg.d_latent + (cfg.d_q_latent or 0)
    elif cfg.qk_norm == "head":
        n_layer += 2 * cfg.head_dim
    elif cfg.qk_norm == "full":
        n_layer += (cfg.n_heads + cfg.n_kv_heads) * cfg.head_dim
    return cfg.n_layers * n_layer + cfg.d_model


class ParallelSandwich(ParallelBlock):
    """Attention and MLP read the same normed stream, and each is normed before both are added.

    The norms are attn_norm on the way in, attn_out_norm and mlp_out_norm on the way out.
    """

    def forward(
        self, x_BTD: Tensor, pos_BT: Tensor, turn: tuple[Tensor, Tensor], cache: LayerCache
    ) -> Tensor:
        normed_BTD = self.attn_norm(x_BTD)
        attn_BTD = self.attn(normed_BTD, pos_BT, turn, cache)
        mlp_BTD = self.mlp(normed_BTD)
        return x_BTD + self.attn_out_norm(attn_BTD) + self.mlp_out_norm(mlp_BTD)


def score_bound(q_weight: Tensor, k_weight: Tensor, head_dim: int) -> float:
    """The smallest number that no score exceeds in size, whatever the stream and the matrices.

    The weights are those of q_norm and k_norm: (K,) and (K,) if each head is normed, (H K,) and
    (J K,) if the full width is. The scores are those that the softmax gets, q · k / sqrt(K). The
    rotation may turn each pair (i, i + K/2) by any angle.
    """
    q_HP = q_weight.abs().unflatten(0, (-1, 2, head_dim // 2)).amax(dim=1)
    k_JP = k_weight.abs().unflatten(0, (-1, 2, head_dim // 2)).amax(dim=1)
    product_JGP = q_HP.unflatten(0, (len(k_JP), -1)) * k_JP[:, None]
    lengths = math.sqrt(len(q_weight) * len(k_weight))
    return product_JGP.max().item() * lengths / math.sqrt(head_dim)


def norm_jacobian(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The derivative of RMSNorm for one token, (D, D): at [i, j] that of result i by input j.

    The result is weight * x / sqrt(mean(x^2) + eps).
    """
    size = torch.sqrt(x_D.square().mean() + eps)
    y_D = x_D / size
    bare_DD = torch.eye(len(x_D), dtype=x_D.dtype) - torch.outer(y_D, y_D) / len(x_D)
    return weight_D[:, None] * bare_DD / size


def fold_norms(weights: dict[str, Tensor], cfg: Config, scale: float) -> dict[str, Tensor]:
    """A checkpoint for Transformer(cfg) in which as few numbers of norms as possible are not one.

    `weights` belong to a model that is a Transformer(cfg) but for its scores: it multiplies q · k
    by `scale`. The result gives the logits of that model, and has the same names and shapes.
    """
    folded = {name: weight.clone() for name, weight in weights.items()}
    readers = {
        "attn_norm": ("attn", ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj")),
        "mlp_norm": ("mlp", ("gate_proj", "up_proj", "router")),
        "attn.q_a_norm": ("attn", ("q_b_proj",)),
        "attn.kv_a_norm": ("attn", ("kv_b_proj",)),
    }
    d_score = cfg.head_dim if cfg.d_latent is None else cfg.head_dim + cfg.d_rope
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}."
        for norm, (half, matrices) in readers.items():
            if (norm_name := f"{block}{norm}.weight") not in folded:
                continue
            for name, weight in folded.items():
                module, kind = name.split(".")[-2:]
                if name.startswith(f"{block}{half}.") and module in matrices and kind == "weight":
                    weight *= folded[norm_name]  # its columns: what it reads
            folded[norm_name].fill_(1)
        q_norm, k_norm = f"{block}attn.q_norm.weight", f"{block}attn.k_norm.weight"
        queries = ("q_proj.weight", "q_proj.bias", "q_b_proj.weight")
        for name in (q_norm,) if q_norm in folded else (f"{block}attn.{q}" for q in queries):
            if name in folded:
                folded[name] *= scale * math.sqrt(d_score)
        if q_norm in folded:  # a factor common to both numbers of a pair commutes with its rotation
            k_J2P = folded[k_norm].view(-1, 2, cfg.head_dim // 2)
            q_JG2P = folded[q_norm].view(len(k_J2P), -1, 2, cfg.head_dim // 2)
            first_J1P = k_J2P[:, :1].clone()
            k_J2P /= first_J1P
            q_JG2P *= first_J1P[:, None]
    return folded
