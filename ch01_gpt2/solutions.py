"""Answers to the exercises that the chapter's own files do not contain.

The letters are those of gpt2.py, and
    C  keys in one chunk
"""

import math

import torch
from torch import Tensor

from ch01_gpt2.gpt2 import causal_mask


def bits_per_byte(loss_nats: float, n_tokens: int, n_bytes: int) -> float:
    """A mean loss in nats a token, over a text of n_tokens and n_bytes, in bits a byte."""
    return loss_nats * n_tokens / (n_bytes * math.log(2))


def packed_mask(doc_BT: Tensor) -> Tensor:
    """True where a query may look, (B, T, T): at itself and at earlier tokens of its own text.

    doc_BT says which text each token belongs to. Within a row, each text has a number of its own.
    """
    pos_BT = torch.arange(doc_BT.shape[1], device=doc_BT.device).expand(doc_BT.shape)
    return causal_mask(pos_BT, pos_BT) & (doc_BT[:, :, None] == doc_BT[:, None, :])


def attend_in_chunks(
    q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, mask_BTS: Tensor, scale: float, chunk: int
) -> Tensor:
    """What `attend` returns, (B, T, H, K), from `chunk` keys at a time.

    Softmax as a running sum (Milakov and Gimelshein 2018, section 3), with the values weighted on
    the way (Dao et al. 2022, section 3.1). Each query sees at least one key.
    """
    y_BHTK = torch.zeros_like(q_BTHK.transpose(1, 2))
    sum_BHT1 = torch.zeros_like(y_BHTK[..., :1])
    max_BHT1 = torch.full_like(sum_BHT1, -math.inf)
    for first in range(0, k_BSHK.shape[1], chunk):
        here = slice(first, first + chunk)
        scores_BHTC = torch.einsum("BTHK,BCHK->BHTC", q_BTHK, k_BSHK[:, here]) * scale
        scores_BHTC = scores_BHTC.masked_fill(~mask_BTS[:, None, :, here], -math.inf)
        new_BHT1 = scores_BHTC.amax(dim=-1, keepdim=True).maximum(max_BHT1)
        base_BHT1 = new_BHT1.clamp(min=torch.finfo(new_BHT1.dtype).min)  # -inf - -inf is NaN
        shrink_BHT1 = (max_BHT1 - base_BHT1).exp()
        weights_BHTC = (scores_BHTC - base_BHT1).exp()
        sum_BHT1 = sum_BHT1 * shrink_BHT1 + weights_BHTC.sum(dim=-1, keepdim=True)
        chunk_BHTK = torch.einsum("BHTC,BCHK->BHTK", weights_BHTC, v_BSHK[:, here])
        y_BHTK = y_BHTK * shrink_BHT1 + chunk_BHTK
        max_BHT1 = new_BHT1
    return (y_BHTK / sum_BHT1).transpose(1, 2)
