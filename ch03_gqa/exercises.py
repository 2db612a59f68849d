"""Chapter 3, exercises: telling parts of the chapter to be written by you.

    python -m tests start ch03    copies this file to ch03_gqa/my_gqa.py
    python -m tests check ch03    says what is right, and what is not

Made from the chapter's files by `python -m tests start ch03 --stubs`.
"""

import math

import torch
from torch import Tensor


# 1. grouped_attend: Groups of queries share a key head (6 points, 30 minutes, medium)
def attend(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, mask_BTS: Tensor, scale: float
) -> Tensor:
    """Scaled dot-product attention, (B, T, H, K): query head h reads key/value head h // G."""
    raise NotImplementedError("attend is not written yet")  # your code here
