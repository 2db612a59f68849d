"""Chapter 2, exercises: telling parts of the chapter to be written by you.

    python -m tests start ch02    copies this file to ch02_rope/my_rope.py
    python -m tests check ch02    says what is right, and what is not

Made from the chapter's files by `python -m tests start ch02 --stubs`.
"""

import math

import torch
from torch import Tensor

from ch02_rope.rope import LayerCache, rope_angles
from ch02_rope.rope_scaling import pair_with_turns


# 1. rope_frequencies: The speeds of the hands (5 points, 10 minutes, easy)
def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """Radians that each pair of dimensions turns a token, (P,) in float32.

    theta^(-2i/K) (Su et al. 2021, section 3.2.2).
    """
    raise NotImplementedError("rope_frequencies is not written yet")  # your code here


# 2. rope_rotation: Turn the pairs (7 points, 20 minutes, medium)
def rope(x_BTHK: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turns dimensions (i, i + K/2) of each head by its position's angles, in float32."""
    raise NotImplementedError("rope is not written yet")  # your code here


# 3. partial_rope: Turn a part of each head (5 points, 15 minutes, easy)
def partial_rope(x_BTHK: Tensor, pos_BT: Tensor, n_turned: int, theta: float) -> Tensor:
    """Turns the first n_turned numbers of each head and leaves the others, (B, T, H, K).

    With the speeds of a head that is n_turned wide (GPT-NeoX-20B: Black et al. 2022, section 2).
    """
    raise NotImplementedError("partial_rope is not written yet")  # your code here


# 4. pairs_to_halves: Sort a checkpoint's rows (5 points, 20 minutes, medium)
def pairs_to_halves(rows: Tensor, n_heads: int) -> Tensor:
    """Rows (H K, ...) of an interleaved q_proj or k_proj, in the order for half-split pairs.

    The rows of a head come in as pairs 0, 1, 2, ..., of each the first partner, then the second.
    They go out as the first partners of all pairs, then the second ones. Also for biases, (H K,).
    """
    raise NotImplementedError("pairs_to_halves is not written yet")  # your code here


# 5. read_clock: Read the clock (7 points, 35 minutes, medium)
def read_clock(cos_P: Tensor, sin_P: Tensor, freq_P: Tensor) -> int:
    """The position, 0 to 9,999, whose angles have these cosines and sines.

    They may be rounded to bfloat16. The pairs go from fast to slow, and the slowest makes less than
    one turn in 10,000 tokens.
    """
    raise NotImplementedError("read_clock is not written yet")  # your code here


# 6. alibi_bias: A bias in place of a rotation (5 points, 15 minutes, easy)
def alibi_bias(slopes_H: Tensor, q_pos_BT: Tensor, k_pos_BS: Tensor) -> Tensor:
    """What is added to the scaled scores, (B, H, T, S): minus slope times distance.

    (Press et al. 2021, section 3.) Above zero for keys after the query, which the mask hides.
    """
    raise NotImplementedError("alibi_bias is not written yet")  # your code here


# 7. yarn_frequencies: YaRN's frequencies (8 points, 45 minutes, hard)
def yarn(
    head_dim: int,
    theta: float,
    factor: float,
    original_len: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Tensor:
    """Fast pairs as they are, slow ones divided by the factor, a ramp between them, (P,).

    Fast: beta_fast turns or more within original_len tokens; slow: beta_slow or fewer (Peng et al.
    2023, section 3.2). As in the authors' code, the ramp is straight in the pair's number and its
    ends are whole numbers; the paper's is straight in the number of turns. YaRN is these
    frequencies together with yarn_attention_factor.
    """
    raise NotImplementedError("yarn is not written yet")  # your code here


# 8. rope_cache_drop: Forget the middle of a conversation (12 points, 90 minutes, design)
def drop_middle(cache: LayerCache, n_keep: int, n_drop: int, freq_P: Tensor) -> None:
    """Takes n_drop tokens of every text out of the cache, after its first n_keep, in place.

    cache.kept is (k_BSHK, v_BSHK, pos_BS), with turned keys. Afterwards every position is as if the
    texts had been read without those tokens: what stood behind the gap has moved up, and what is
    read next goes on there. Padding stays as it is. Every text has n_keep + n_drop tokens or more.
    """
    raise NotImplementedError("drop_middle is not written yet")  # your code here
