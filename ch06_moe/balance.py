"""Chapter 6: what keeps the experts evenly busy while a mixture of experts trains.

Left alone, a router may send most tokens to a few experts, and the others learn nothing. Three
remedies: a loss on the imbalance (Fedus et al. 2021, section 2.2), a loss on large logits (Zoph et
al. 2022, section 3.3), and a bias on the choice that is moved by hand, without a loss (Wang et al.
2024, section 3; DeepSeek-V3, section 2.1.2). RouterLog reads what the routers of a model compute
in training, so that none of this is in the model.

    with RouterLog(model) as routers:
        train(model, train_tokens, val_tokens, cfg, extra_loss=routers.balance_by_bias)

A tensor's name ends in its axes: `logit_NI` has shape (N, I).
    N  tokens                         I  routed experts
    A  experts that a token goes to
"""

from collections.abc import Callable
from types import TracebackType

import torch
import torch.nn as nn
from torch import Tensor


def balance_loss(logit_NI: Tensor, expert_NA: Tensor) -> Tensor:
    """I times the sum over experts of (share of the choices) x (mean probability), a scalar.

    1 when all experts have the same share, up to I when one has them all. The gradient flows
    through the probabilities only: shares are counts (Fedus et al. 2021, equations 4 to 6).
    """
    prob_NI = logit_NI.softmax(dim=-1, dtype=torch.float32)
    return prob_NI.shape[1] * (shares(expert_NA, prob_NI.shape[1]) * prob_NI.mean(dim=0)).sum()


def z_loss(logit_NI: Tensor) -> Tensor:
    """Mean square of the log of the softmax's sum, a scalar: small logits round less.

    (Zoph et al. 2022, ST-MoE, section 3.3, equation 5.)
    """
    return logit_NI.float().logsumexp(dim=-1).square().mean()


def shares(expert_NA: Tensor, n_experts: int) -> Tensor:
    """Share of all choices that went to each expert, (I,); they add up to one."""
    return expert_NA.flatten().bincount(minlength=n_experts) / expert_NA.numel()


@torch.no_grad()
def move_bias(choice_bias_I: Tensor, expert_NA: Tensor, step: float) -> None:
    """Raises the bias of experts with fewer tokens than the mean by `step`, lowers the others'.

    In place (Wang et al. 2024, algorithm 1). An expert with just the mean keeps its bias.
    """
    share_I = shares(expert_NA, len(choice_bias_I))
    choice_bias_I += step * torch.sign(1 / len(choice_bias_I) - share_I)


class RouterLog:
    """What each MoE layer's router did in the last forward pass of training, and in all of them.

    Works on any model whose MoE layers have `router`, `choice_bias` and `n_active`, as in moe.py.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if hasattr(module, "choice_bias")]
        self.logits: list[Tensor] = [torch.empty(0)] * len(self.layers)  # (N, I) each
        self.shares: list[list[list[float]]] = []  # by call of an extra loss, layer, expert
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "RouterLog":
        for i, layer in enumerate(self.layers):
            self.hooks.append(layer.router.register_forward_hook(self.keep(i, layer)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self.hooks:
            hook.remove()
        self.logits = [torch.empty(0)] * len(self.layers)  # they hold on to the last graph

    def keep(self, i: int, layer: nn.Module) -> Callable[..., None]:
        """A hook that keeps the logits of layer i."""

        def hook(router: nn.Module, inputs: tuple[Tensor, ...], logit_NI: Tensor) -> None:
            if layer.training:
                self.logits[i] = logit_NI

        return hook

    def choices(self) -> list[Tensor]:
        """The experts chosen in each layer, (N, A); noted in `shares`, too."""
        chosen = []
        for layer, logit_NI in zip(self.layers, self.logits, strict=True):
            prob_NI = logit_NI.detach().softmax(dim=-1, dtype=torch.float32)
            chosen.append((prob_NI + layer.choice_bias).topk(layer.n_active, dim=-1).indices)
        n_experts = [len(layer.choice_bias) for layer in self.layers]
        counted = zip(chosen, n_experts, strict=True)
        self.shares.append([shares(expert_NA, n).tolist() for expert_NA, n in counted])
        return chosen

    def watch(self) -> Tensor:
        """No loss at all: only notes the shares."""
        self.choices()
        return torch.zeros(())

    def balance_by_loss(self, coefficient: float = 0.01, z_coefficient: float = 0.0) -> Tensor:
        """The extra loss, a scalar: the layers' mean, times the coefficients. 0 without layers."""
        pairs = list(zip(self.logits, self.choices(), strict=True))
        aux = sum(balance_loss(logit_NI, expert_NA) for logit_NI, expert_NA in pairs)
        z = sum(z_loss(logit_NI) for logit_NI, _ in pairs)
        return (coefficient * aux + z_coefficient * z) / max(len(pairs), 1) + torch.zeros(())

    def balance_by_bias(self, step: float = 1e-3) -> Tensor:
        """Moves each layer's bias, between forward and backward; the loss stays what it is."""
        for layer, expert_NA in zip(self.layers, self.choices(), strict=True):
            move_bias(layer.choice_bias.data, expert_NA, step)
        return torch.zeros(())
