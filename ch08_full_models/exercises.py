"""Chapter 8, exercises: telling parts of the chapter to be written by you.

    python -m tests start ch08    copies this file to ch08_full_models/my_full_models.py
    python -m tests check ch08    says what is right, and what is not

Made from the chapter's files by `python -m tests start ch08 --stubs`.
"""

import torch
from torch import Tensor

from ch08_full_models.deepseek_v3 import LatentAttention, causal_mask, part_pairs, rename, rope


# 1. llama_from_meta: Read Meta's own files of a Llama (9 points, 40 minutes, medium)
def llama_from_meta(
    files: list[dict[str, Tensor]], n_heads: int, n_kv_heads: int
) -> dict[str, Tensor]:
    """The tensors of Meta's own files of one Llama, joined, by the names of llama3.py's parameters.

    Each file holds a part of every matrix, in the order of the files, and the norms whole. Rows of
    queries and keys come out in the order in which dimensions i and i + K/2 of a head turn
    together. Tables of rotations are left out.
    """
    raise NotImplementedError("llama_from_meta is not written yet")  # your code here


# 2. deepseek_v31: DeepSeek-V3.1's chat template (8 points, 25 minutes, easy)
def deepseek_v31(messages: list[dict[str, str]], open_turn: bool, thinking: bool) -> str:
    """The conversation as DeepSeek-V3.1 reads it, with the assistant's turn opened or not.

    System messages stand at the start, wherever they were. A turn is opened only for an answer to a
    user. Old answers have lost their thoughts.
    """
    raise NotImplementedError("deepseek_v31 is not written yet")  # your code here


# 3. absorbed_decode: Latent attention on a cache in pages (12 points, 90 minutes, design)
def absorbed_decode(
    attn: LatentAttention,
    x_BTD: Tensor,
    pos_BT: Tensor,
    turn: tuple[Tensor, Tensor],
    pages: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """What the layer adds to the stream of new tokens, (B, T, D), and their cache rows, (B, T, W).

    pages hold all earlier tokens, oldest first, in tensors (B, S, W) of any number of tokens each.
    A row is a token's normed latent and, right of it, its rotary key as `rope` returned it. The
    token before position pos_BT[b, 0] is the last of text b's rows, and positions below zero are
    padding. No head's keys or values are made, and no scores of more than one page are held.
    """
    raise NotImplementedError("absorbed_decode is not written yet")  # your code here
