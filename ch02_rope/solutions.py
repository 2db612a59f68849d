"""Answers to the exercises that the chapter's own files do not contain.

A tensor's name ends in its axes, with the letters of rope.py and two more:
    N  numbers of a head that are turned   M  its other numbers
"""

import math

import torch
from torch import Tensor

from ch02_rope.rope import LayerCache, rope, rope_angles, rope_frequencies


def partial_rope(x_BTHK: Tensor, pos_BT: Tensor, n_turned: int, theta: float) -> Tensor:
    """Turns the first n_turned numbers of each head and leaves the others, (B, T, H, K).

    With the speeds of a head that is n_turned wide (GPT-NeoX-20B: Black et al. 2022, section 2).
    """
    turn = rope_angles(pos_BT, rope_frequencies(n_turned, theta))
    turned_BTHN, rest_BTHM = x_BTHK[..., :n_turned], x_BTHK[..., n_turned:]
    return torch.cat((rope(turned_BTHN, turn), rest_BTHM), dim=-1)


def pairs_to_halves(rows: Tensor, n_heads: int) -> Tensor:
    """Rows (H K, ...) of an interleaved q_proj or k_proj, in the order for half-split pairs.

    The rows of a head come in as pairs 0, 1, 2, ..., of each the first partner, then the second.
    They go out as the first partners of all pairs, then the second ones. Also for biases, (H K,).
    """
    return rows.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def read_clock(cos_P: Tensor, sin_P: Tensor, freq_P: Tensor) -> int:
    """The position, 0 to 9,999, whose angles have these cosines and sines.

    They may be rounded to bfloat16. The pairs go from fast to slow, and the slowest makes less than
    one turn in 10,000 tokens.
    """
    angle_P = torch.atan2(sin_P.double(), cos_P.double())
    position = 5_000.0  # from the middle, the slowest pair is less than half a turn off
    for angle, speed in zip(angle_P.flip(0).tolist(), freq_P.flip(0).tolist(), strict=True):
        turns = round((position * speed - angle) / (2 * math.pi))
        position = (angle + 2 * math.pi * turns) / speed
    return round(position)


def drop_middle(cache: LayerCache, n_keep: int, n_drop: int, freq_P: Tensor) -> None:
    """Takes n_drop tokens of every text out of the cache, after its first n_keep, in place.

    cache.kept is (k_BSHK, v_BSHK, pos_BS), with turned keys. Afterwards every position is as if the
    texts had been read without those tokens: what stood behind the gap has moved up, and what is
    read next goes on there. Padding stays as it is. Every text has n_keep + n_drop tokens or more.
    """
    k_BSHK, v_BSHK, pos_BS = cache.kept
    before_BS = pos_BS < n_keep  # padding, too
    after_BS = pos_BS >= n_keep + n_drop
    move_BS = torch.where(before_BS, 0, -n_drop)
    k_BSHK = rope(k_BSHK, rope_angles(move_BS, freq_P))
    stays_BS = before_BS | after_BS
    sizes = (len(pos_BS), pos_BS.shape[1] - n_drop)
    everything = (k_BSHK, v_BSHK, pos_BS + move_BS)
    cache.kept = tuple(t[stays_BS].unflatten(0, sizes) for t in everything)
    cache.n_seen -= n_drop
