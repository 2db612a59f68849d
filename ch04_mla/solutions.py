"""Chapter 4: answers to the exercises that the chapter's own files do not contain.

The letters are those of mla.py, and two more:
    A  the halves of a head, whose numbers turn together    Y  values of all groups: J times U
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ch04_mla import mla


def cache_bytes(cfg: mla.Config, n_tokens: int, bytes_a_number: int) -> int:
    """Bytes in the cache of all layers after one text of n_tokens, positions not counted.

    cfg.windows is repeated over the layers. One with a window keeps at most that many tokens.
    """
    grouped = 2 * cfg.n_kv_heads * cfg.head_dim  # keys and values
    n_numbers = grouped if cfg.d_latent is None else cfg.d_latent + cfg.d_rope
    windows = [cfg.windows[layer % len(cfg.windows)] for layer in range(cfg.n_layers)]
    n_kept = sum(n_tokens if window is None else min(window, n_tokens) for window in windows)
    return n_kept * n_numbers * bytes_a_number


def absorbed_output(attn: mla.LatentAttention) -> Tensor:
    """For each head the matrix from its sum of latents to the stream, (H, D, C).

    It does what the head's value rows of kv_b_proj and its columns of o_proj do, without the bias.
    """
    d_key, d_value = attn.kv_widths
    up_HXC = attn.kv_b_proj.weight.unflatten(0, (-1, d_key + d_value))
    out_DHU = attn.o_proj.weight.unflatten(1, (-1, d_value))
    return torch.einsum("DHU,HUC->HDC", out_DHU, up_HXC[:, d_key:])


@torch.no_grad()
def latent_from_grouped(grouped: mla.Attention, x_ND: Tensor, d_latent: int) -> mla.LatentAttention:
    """A latent attention that does what a grouped one without biases does, rotation included.

    Query head h of the grouped one reads key/value head h // G. All its keys turn, and are in the
    cache: R = JK, and pair j K/2 + i of the R/2 pairs turns as pair i of a grouped head, for each
    group j. The latent has no norm, and the values are made from it: exactly, if d_latent is at
    least their rank, else as near as possible on the streams x_ND, in the sum of squares.
    """
    width = grouped.head_dim
    n_heads, n_kv_heads = (proj.out_features // width for proj in (grouped.q_proj, grouped.k_proj))
    group_H = torch.arange(n_heads) // (n_heads // n_kv_heads)
    reads_HJ = F.one_hot(group_H, n_kv_heads).type_as(x_ND)
    cfg = mla.Config(
        d_model=x_ND.shape[1],
        n_heads=n_heads,
        head_dim=0,  # every key turns
        d_latent=d_latent,
        d_q_latent=None,
        d_rope=n_kv_heads * width,
        d_value=width,
        bias=False,
    )
    latent = mla.LatentAttention(cfg, grouped.window)
    latent.kv_a_norm = nn.Identity()

    # A head's query is zero where the one wide key has other groups' numbers. The layer divides
    # by the root of JK, and the grouped one by that of K.
    q_HAPD = grouped.q_proj.weight.unflatten(0, (n_heads, 2, -1)) * n_kv_heads**0.5
    q_HAJPD = torch.einsum("HJ,HAPD->HAJPD", reads_HJ, q_HAPD)
    k_AJPD = grouped.k_proj.weight.unflatten(0, (n_kv_heads, 2, -1)).transpose(0, 1)

    # No C directions hold more of the values than these (Eckart and Young 1936).
    best_CY = torch.linalg.svd(grouped.v_proj(x_ND), full_matrices=False).Vh[:d_latent]
    down_CD = best_CY @ grouped.v_proj.weight
    up_CJU = best_CY.unflatten(1, (n_kv_heads, width))
    up_HUC = torch.einsum("HJ,CJU->HUC", reads_HJ, up_CJU)

    latent.q_proj.weight.copy_(q_HAJPD.flatten(0, 3))
    latent.kv_a_proj.weight.copy_(torch.cat((down_CD, k_AJPD.flatten(0, 2))))
    latent.kv_b_proj.weight.copy_(up_HUC.flatten(0, 1))
    latent.o_proj.weight.copy_(grouped.o_proj.weight)
    return latent
