"""Chapter 1, exercises: telling parts of the chapter to be written by you.

    python -m tests start ch01    copies this file to ch01_gpt2/my_gpt2.py
    python -m tests check ch01    says what is right, and what is not

Made from the chapter's files by `python -m tests start ch01 --stubs`.
"""

import math
import re

import torch
import torch.nn as nn
from torch import Tensor

from ch01_gpt2.gpt2 import HF_NAMES, rename


# 1. bits_per_byte: Compare losses across vocabularies (3 points, 10 minutes, easy)
def bits_per_byte(loss_nats: float, n_tokens: int, n_bytes: int) -> float:
    """A mean loss in nats a token, over a text of n_tokens and n_bytes, in bits a byte."""
    raise NotImplementedError("bits_per_byte is not written yet")  # your code here


# 2. layer_norm: Bring every vector to one size (7 points, 15 minutes, easy)
class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016, section 3), computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("LayerNorm.forward is not written yet")  # your code here


# 3. causal_mask_with_padding: Who may look at whom (6 points, 20 minutes, medium)
def causal_mask(q_pos_BT: Tensor, k_pos_BS: Tensor) -> Tensor:
    """True where a query may look, (B, T, S): at itself and at earlier positions.

    Padding has positions below zero. Texts never see it; it sees itself, since a row with nothing
    to see would be 0/0.
    """
    raise NotImplementedError("causal_mask is not written yet")  # your code here


# 4. packed_mask: Several texts in one window (5 points, 15 minutes, easy)
def packed_mask(doc_BT: Tensor) -> Tensor:
    """True where a query may look, (B, T, T): at itself and at earlier tokens of its own text.

    doc_BT says which text each token belongs to. Within a row, each text has a number of its own.
    """
    raise NotImplementedError("packed_mask is not written yet")  # your code here


# 5. scaled_dot_product: Attention in two products (8 points, 30 minutes, medium)
def attend(
    q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, mask_BTS: Tensor, scale: float
) -> Tensor:
    """Scaled dot-product attention, (B, T, H, K) (Vaswani et al. 2017, section 3.2.1)."""
    raise NotImplementedError("attend is not written yet")  # your code here


# 6. sample_token: Draw the next token (10 points, 40 minutes, medium)
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
    raise NotImplementedError("sample is not written yet")  # your code here


# 7. convert_gpt2: Read another program's weights (9 points, 45 minutes, hard)
def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors under our names and in our layout.

    GPT-2 stores its matrices as (in, out), and q, k and v side by side: they are turned and split.
    """
    raise NotImplementedError("convert is not written yet")  # your code here


# 8. attend_in_chunks: Attention without the table (12 points, 90 minutes, design)
def attend_in_chunks(
    q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, mask_BTS: Tensor, scale: float, chunk: int
) -> Tensor:
    """What `attend` returns, (B, T, H, K), from `chunk` keys at a time.

    Softmax as a running sum (Milakov and Gimelshein 2018, section 3), with the values weighted on
    the way (Dao et al. 2022, section 3.1). Each query sees at least one key.
    """
    raise NotImplementedError("attend_in_chunks is not written yet")  # your code here
