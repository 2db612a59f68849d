"""Answers to the exercises that the chapter's own files do not contain.

A tensor's name ends in its axes: `x_ND` has shape (N, D).
    N  tokens                         D  width of the stream
    A  experts that a token goes to   I  routed experts
    M  pairs of a token and one of its experts: N * A, in the order of the tokens
    P  places of all experts, I * capacity, and one more that nobody reads
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def in_places(
    experts: nn.ModuleList, x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor, capacity: int
) -> Tensor:
    """The weighted sum of what each token's experts give, (N, D), each with `capacity` places.

    Pairs of a token and an expert take places in the order of the tokens, of one token in the order
    of its row. A pair that finds its expert full adds nothing. Each expert computes all its places,
    filled or not, so that no shape depends on the choices (Fedus et al. 2021, section 2.2).
    """
    expert_M = expert_NA.flatten()
    token_M = torch.arange(len(expert_M), device=x_ND.device) // expert_NA.shape[1]
    before_MI = F.one_hot(expert_M, len(experts)).cumsum(dim=0) - 1
    place_M = before_MI.gather(1, expert_M[:, None])[:, 0]
    nowhere = len(experts) * capacity
    row_M = torch.where(place_M < capacity, expert_M * capacity + place_M, nowhere)
    x_PD = x_ND.new_zeros(nowhere + 1, x_ND.shape[1]).index_copy(0, row_M, x_ND[token_M])
    parts = zip(experts, x_PD[:-1].split(capacity), strict=True)
    y_PD = torch.cat([*(expert(part) for expert, part in parts), torch.zeros_like(x_PD[-1:])])
    y_MD = y_PD[row_M] * weight_NA.flatten()[:, None]
    return y_MD.unflatten(0, expert_NA.shape).sum(dim=1)
