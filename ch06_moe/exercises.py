"""Chapter 6, exercises: telling parts of the chapter to be written by you.

    python -m tests start ch06    copies this file to ch06_moe/my_moe.py
    python -m tests check ch06    says what is right, and what is not

Made from the chapter's files by `python -m tests start ch06 --stubs`.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ch06_moe.moe import MLP, Config
from ch06_moe.routers import within_best_groups


# 1. expert_shares: How busy each expert is (3 points, 10 minutes, easy)
def shares(expert_NA: Tensor, n_experts: int) -> Tensor:
    """Share of all choices that went to each expert, (I,); they add up to one."""
    raise NotImplementedError("shares is not written yet")  # your code here


# 2. move_balance_bias: Balance by a bias that is moved by hand (4 points, 10 minutes, easy)
@torch.no_grad()
def move_bias(choice_bias_I: Tensor, expert_NA: Tensor, step: float) -> None:
    """Raises the bias of experts with fewer tokens than the mean by `step`, lowers the others'.

    In place (Wang et al. 2024, algorithm 1). An expert with just the mean keeps its bias.
    """
    raise NotImplementedError("move_bias is not written yet")  # your code here


# 3. expert_balance_loss: A loss on the imbalance (6 points, 15 minutes, medium)
def balance_loss(logit_NI: Tensor, expert_NA: Tensor) -> Tensor:
    """I times the sum over experts of (share of the choices) x (mean probability), a scalar.

    1 when all experts have the same share, up to I when one has them all. The gradient flows
    through the probabilities only: shares are counts (Fedus et al. 2021, equations 4 to 6).
    """
    raise NotImplementedError("balance_loss is not written yet")  # your code here


# 4. moe_route: The router chooses and weighs (6 points, 20 minutes, medium)
#    moe_forward: MoE.forward, 10 points
class MoE(nn.Module):
    """Routed experts, each an MLP, and the shared ones, which are one MLP (DeepSeekMoE, section 3).

    choice_bias has no gradient: whoever trains lowers it for experts that get too many tokens.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.n_active = cfg.n_active
        self.router = nn.Linear(cfg.d_model, cfg.n_experts, bias=False)
        self.choice_bias = nn.Parameter(torch.zeros(cfg.n_experts), requires_grad=False)
        self.experts = nn.ModuleList(MLP(cfg, cfg.d_expert) for _ in range(cfg.n_experts))
        self.shared = MLP(cfg, cfg.n_shared * cfg.d_expert) if cfg.n_shared else None

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The experts that each token goes to, and their weights, which sum to one: both (N, A)."""
        raise NotImplementedError("MoE.route is not written yet")  # your code here

    def forward(self, x_BTD: Tensor) -> Tensor:
        raise NotImplementedError("MoE.forward is not written yet")  # your code here


# 5. switch_route: One expert, and a queue at its door (7 points, 25 minutes, medium)
def switch(logit_NI: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The likeliest expert, weighted with its probability (Fedus et al. 2021, section 2.1).

    An expert takes the first `capacity` tokens; later ones get expert -1 and weight 0: no MLP at
    all, only the residual stream (section 2.2). The weight is not 1, so that the router has a
    gradient.
    """
    raise NotImplementedError("switch is not written yet")  # your code here


# 6. deepseek_v3_route: Groups, a sigmoid, and a bias on the choice (9 points, 40 minutes, hard)
def deepseek_v3(
    logit_NI: Tensor,
    choice_bias_I: Tensor,
    n_active: int,
    n_groups: int,
    n_active_groups: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Sigmoid scores; a bias that only the choice sees (DeepSeek-V3, section 2.1.2).

    A group counts as its best two experts together, the bias included. The weights are the scores
    without the bias, scaled to a sum of `scale`. With one group, Kimi K2's and Moonlight's router.
    """
    raise NotImplementedError("deepseek_v3 is not written yet")  # your code here


# 8. expert_places: Shapes that do not depend on the data (12 points, 120 minutes, design)
def in_places(
    experts: nn.ModuleList, x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor, capacity: int
) -> Tensor:
    """The weighted sum of what each token's experts give, (N, D), each with `capacity` places.

    Pairs of a token and an expert take places in the order of the tokens, of one token in the order
    of its row. A pair that finds its expert full adds nothing. Each expert computes all its places,
    filled or not, so that no shape depends on the choices (Fedus et al. 2021, section 2.2).
    """
    raise NotImplementedError("in_places is not written yet")  # your code here
