"""Chapter 6, side by side: how published models choose experts, from 2021 to today.

Each function takes a router's logits and returns the experts that each token goes to, and the
weight of each expert's output, both (N, A). What they disagree on: softmax or sigmoid, whether the
weights of the chosen add up to one, whether experts compete in groups, and how balance is kept.
moe.py's own router is `mixtral`, with a bias on the choice as in `deepseek_v3`.

A tensor's name ends in its axes: `prob_NI` has shape (N, I).
    N  tokens                         I  routed experts
    A  experts that a token goes to   L  groups of experts
    O  experts of one group           1  an axis of length one

Run it:  python routers.py    the same four tokens, sent by each router
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def switch(logit_NI: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The likeliest expert, weighted with its probability (Fedus et al. 2021, section 2.1).

    An expert takes the first `capacity` tokens; later ones get expert -1 and weight 0: no MLP at
    all, only the residual stream (section 2.2). The weight is not 1, so that the router has a
    gradient.
    """
    prob_NI = logit_NI.softmax(dim=-1, dtype=torch.float32)
    weight_N1, expert_N1 = prob_NI.max(dim=-1, keepdim=True)
    place_NI = F.one_hot(expert_N1[:, 0], prob_NI.shape[1]).cumsum(dim=0)  # 1 for the first token
    dropped_N1 = place_NI.gather(1, expert_N1) > capacity
    return expert_N1.masked_fill(dropped_N1, -1), weight_N1.masked_fill(dropped_N1, 0.0)


def mixtral(logit_NI: Tensor, n_active: int) -> tuple[Tensor, Tensor]:
    """The likeliest experts, their probabilities scaled to a sum of one (Jiang et al. 2024, 2.1).

    The same as a softmax over the chosen logits only, which is how the paper writes it.
    """
    logit_NA, expert_NA = logit_NI.float().topk(n_active, dim=-1)
    return expert_NA, logit_NA.softmax(dim=-1)


def qwen3(logit_NI: Tensor, n_active: int, renormalise: bool = True) -> tuple[Tensor, Tensor]:
    """The likeliest experts by a softmax over all (Qwen3 report, section 2).

    `renormalise` is norm_topk_prob in the checkpoint's config: true in Qwen3, where this is what
    `mixtral` computes, false in Qwen2-MoE and DeepSeek-V2-Lite.
    """
    prob_NI = logit_NI.softmax(dim=-1, dtype=torch.float32)
    weight_NA, expert_NA = prob_NI.topk(n_active, dim=-1)
    if renormalise:
        weight_NA = weight_NA / weight_NA.sum(dim=-1, keepdim=True)
    return expert_NA, weight_NA


def deepseek_v2(
    logit_NI: Tensor, n_active: int, n_groups: int, n_active_groups: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The likeliest experts within the best groups (DeepSeek-V2, section 2.2.2).

    A group counts as its best expert. The weights are probabilities times `scale`, not scaled to a
    sum of one.
    """
    prob_NI = logit_NI.softmax(dim=-1, dtype=torch.float32)
    group_NL = prob_NI.unflatten(-1, (n_groups, -1)).amax(dim=-1)
    prob_NI = within_best_groups(prob_NI, group_NL, n_active_groups, otherwise=0.0)
    weight_NA, expert_NA = prob_NI.topk(n_active, dim=-1)
    return expert_NA, weight_NA * scale


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
    score_NI = logit_NI.float().sigmoid()
    choice_NI = score_NI + choice_bias_I
    group_NL = choice_NI.unflatten(-1, (n_groups, -1)).topk(2, dim=-1).values.sum(dim=-1)
    # Not 0: a biased score can be below it, and an expert of a lost group would win.
    choice_NI = within_best_groups(choice_NI, group_NL, n_active_groups, otherwise=-math.inf)
    expert_NA = choice_NI.topk(n_active, dim=-1).indices
    weight_NA = score_NI.gather(1, expert_NA)
    return expert_NA, scale * weight_NA / (weight_NA.sum(dim=-1, keepdim=True) + 1e-20)


def within_best_groups(
    score_NI: Tensor, group_NL: Tensor, n_active_groups: int, otherwise: float
) -> Tensor:
    """The scores (N, I), with `otherwise` in place of those outside each token's best groups."""
    best = group_NL.topk(n_active_groups, dim=-1).indices
    lost_NL = torch.ones_like(group_NL, dtype=torch.bool).scatter(1, best, False)
    score_NLO = score_NI.unflatten(-1, (group_NL.shape[1], -1))
    return score_NLO.masked_fill(lost_NL[:, :, None], otherwise).flatten(1)


def llama4(logit_NI: Tensor) -> tuple[Tensor, Tensor]:
    """The expert with the highest logit, and the sigmoid of that (Llama 4's published code).

    The weight multiplies the expert's input, not its output, which is not the same: an expert is
    not linear. A shared expert sees the token besides.
    """
    logit_N1, expert_N1 = logit_NI.float().max(dim=-1, keepdim=True)
    return expert_N1, logit_N1.sigmoid()


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.manual_seed(0)
    logit_NI, choice_bias_I = 2 * torch.randn(4, 8), torch.zeros(8)
    choice_bias_I[5] = 0.6
    routes = {
        "Switch, room for 1 token": switch(logit_NI, capacity=1),
        "Mixtral": mixtral(logit_NI, 2),
        "Qwen3": qwen3(logit_NI, 2),
        "Qwen2-MoE": qwen3(logit_NI, 2, renormalise=False),
        "DeepSeek-V2, 2 of 4 groups": deepseek_v2(logit_NI, 2, 4, 2, scale=16.0),
        "DeepSeek-V3, expert 5 wanted": deepseek_v3(logit_NI, choice_bias_I, 2, 4, 2, scale=2.5),
        "Llama 4": llama4(logit_NI),
    }
    print("expert x weight, of four tokens")
    for name, (expert_NA, weight_NA) in routes.items():
        tokens = (
            " ".join(f"{expert:2} x {weight:5.2f}" for expert, weight in zip(*pair, strict=True))
            for pair in zip(expert_NA.tolist(), weight_NA.tolist(), strict=True)
        )
        print(f"{name:29}" + "  |  ".join(tokens))


if __name__ == "__main__":
    main()
