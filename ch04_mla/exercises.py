"""Chapter 4, exercises: telling parts of the chapter to be written by you.

    python -m tests start ch04    copies this file to ch04_mla/my_mla.py
    python -m tests check ch04    says what is right, and what is not

Made from the chapter's files by `python -m tests start ch04 --stubs`.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ch04_mla import mla
from ch04_mla.mla import Config, LayerCache, LayerNorm, attend, causal_mask, rope


# 1. latent_cache_bytes: How large is the cache? (4 points, 10 minutes, easy)
def cache_bytes(cfg: mla.Config, n_tokens: int, bytes_a_number: int) -> int:
    """Bytes in the cache of all layers after one text of n_tokens, positions not counted.

    cfg.windows is repeated over the layers. One with a window keeps at most that many tokens.
    """
    raise NotImplementedError("cache_bytes is not written yet")  # your code here


# 2. latent_queries: Queries through a latent (4 points, 10 minutes, easy)
#    expanded_form: LatentAttention.expanded, 6 points
#    absorbed_form: LatentAttention.absorbed, 9 points
#    absorb_or_expand: LatentAttention.absorbs, 5 points
#    latent_forward: LatentAttention.forward, 8 points
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
            self.q_a_norm = LayerNorm(cfg.d_q_latent, 1e-6)  # whatever norm_eps: so in DeepSeek
            self.q_b_proj = nn.Linear(cfg.d_q_latent, cfg.n_heads * sum(self.q_widths), bias=False)
        self.kv_a_proj = nn.Linear(cfg.d_model, sum(self.cache_widths), bias=cfg.bias)
        self.kv_a_norm = LayerNorm(cfg.d_latent, 1e-6)
        self.kv_b_proj = nn.Linear(cfg.d_latent, cfg.n_heads * sum(self.kv_widths), bias=False)
        self.o_proj = nn.Linear(cfg.n_heads * cfg.d_value, cfg.d_model, bias=cfg.bias)

    def forward(
        self, x_BTD: Tensor, pos_BT: Tensor, turn: tuple[Tensor, Tensor], cache: LayerCache
    ) -> Tensor:
        raise NotImplementedError("LatentAttention.forward is not written yet")  # your code here

    def queries(self, x_BTD: Tensor) -> Tensor:
        """Each head's query before it is turned, (B, T, H, E): K that will not be, R that will."""
        raise NotImplementedError("LatentAttention.queries is not written yet")  # your code here

    def absorbs(self, n_new: int, n_all: int) -> bool:
        """Whether the absorbed form takes fewer multiplications: it does for few new tokens.

        It spares kv_b_proj the tokens that are not new, and pays with wider keys and values.
        """
        raise NotImplementedError("LatentAttention.absorbs is not written yet")  # your code here

    def expanded(
        self, q_BTHK: Tensor, q_rot_BTHR: Tensor, c_BSC: Tensor, k_rot_BSR: Tensor, mask_BTS: Tensor
    ) -> Tensor:
        """(B, T, H, U): multi-head attention on keys and values made from every latent."""
        raise NotImplementedError("LatentAttention.expanded is not written yet")  # your code here

    def absorbed(
        self, q_BTHK: Tensor, q_rot_BTHR: Tensor, c_BSC: Tensor, k_rot_BSR: Tensor, mask_BTS: Tensor
    ) -> Tensor:
        """(B, T, H, U): multi-query attention whose one key and one value are the latent itself.

        q (M c) = (q M) c: what kv_b_proj would do to every token seen is done to the new queries,
        and to the sum of values instead of each value (DeepSeek-V2, section 2.1.2).
        """
        raise NotImplementedError("LatentAttention.absorbed is not written yet")  # your code here


# 5. absorbed_output: Absorb the output matrix as well (4 points, 20 minutes, medium)
def absorbed_output(attn: mla.LatentAttention) -> Tensor:
    """For each head the matrix from its sum of latents to the stream, (H, D, C).

    It does what the head's value rows of kv_b_proj and its columns of o_proj do, without the bias.
    """
    raise NotImplementedError("absorbed_output is not written yet")  # your code here


# 8. grouped_to_latent: Turn a grouped layer into a latent one (12 points, 90 minutes, design)
@torch.no_grad()
def latent_from_grouped(grouped: mla.Attention, x_ND: Tensor, d_latent: int) -> mla.LatentAttention:
    """A latent attention that does what a grouped one without biases does, rotation included.

    Query head h of the grouped one reads key/value head h // G. All its keys turn, and are in the
    cache: R = JK, and pair j K/2 + i of the R/2 pairs turns as pair i of a grouped head, for each
    group j. The latent has no norm, and the values are made from it: exactly, if d_latent is at
    least their rank, else as near as possible on the streams x_ND, in the sum of squares.
    """
    raise NotImplementedError("latent_from_grouped is not written yet")  # your code here
