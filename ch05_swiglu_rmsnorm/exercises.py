"""Chapter 5, exercises: telling parts of the chapter to be written by you.

    python -m tests start ch05    copies this file to ch05_swiglu_rmsnorm/my_swiglu_rmsnorm.py
    python -m tests check ch05    says what is right, and what is not

Made from the chapter's files by `python -m tests start ch05 --stubs`.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ch05_swiglu_rmsnorm import swiglu_rmsnorm
from ch05_swiglu_rmsnorm.swiglu_rmsnorm import Config


# 1. mlp_width: The width that a budget buys (6 points, 10 minutes, easy)
def widest(d_model: int, budget: int, multiple: int, gated: bool, bias: bool) -> int:
    """The largest hidden width, a multiple of `multiple`, of an MLP within the budget.

    `budget` is a number of parameters. A plain MLP has two matrices, a gated one three. With bias
    each has a bias, too, a number for every number that comes out. 0 if the least width is too
    expensive.
    """
    raise NotImplementedError("widest is not written yet")  # your code here


# 2. swiglu_mlp: A gated MLP (6 points, 15 minutes, easy)
class MLP(nn.Module):
    """The position-wise feed-forward network with a SiLU gate (Shazeer 2020, section 2)."""

    def __init__(self, cfg: Config, d_ff: int) -> None:
        raise NotImplementedError("MLP is not written yet")  # your code here

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("MLP is not written yet")  # your code here


# 3. rms_norm: A norm that only divides (9 points, 20 minutes, medium)
class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich 2019, section 4), computed in float32.

    Rounded to the input's type before the weight multiplies it: Llama's order.
    """

    def __init__(self, width: int, eps: float) -> None:
        raise NotImplementedError("RMSNorm is not written yet")  # your code here

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("RMSNorm is not written yet")  # your code here


# 4. gemma_norm_weights: Gemma's norms multiply by 1 + w (6 points, 15 minutes, easy)
def plain_norm_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gemma's weights for norms that multiply by w: Gemma's multiply by 1 + w.

    The names of norms' weights end in "norm.weight". They come out in float32, since 1 + w has
    more digits than 16 bits can hold. All others come out as they are. The input is not changed.
    """
    raise NotImplementedError("plain_norm_weights is not written yet")  # your code here


# 5. bilinear_as_swiglu: A product from two gated units (7 points, 25 minutes, medium)
def bilinear_as_swiglu(
    gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of a SwiGLU MLP that computes what a bilinear MLP with these weights does.

    The bilinear MLP is x -> ((x gate^T) * (x up^T)) down^T (Shazeer 2020, section 2). Returned are
    gate and up, both (2F, D), and down (D, 2F).
    """
    raise NotImplementedError("bilinear_as_swiglu is not written yet")  # your code here


# 6. fused_gate_up: One matrix for gate and up (8 points, 25 minutes, medium)
class FusedMLP(nn.Module):
    """An MLP of two matrices: gate_proj and up_proj as one, gate_up_proj, and down_proj.

    Of the 2F rows of gate_up_proj the first F are the gate's. Both are of class nn.Linear.
    """

    def __init__(self, mlp: swiglu_rmsnorm.MLP) -> None:
        """Copies the weights of a gated MLP, and its biases if it has any."""
        raise NotImplementedError("FusedMLP is not written yet")  # your code here

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("FusedMLP is not written yet")  # your code here


# 7. rms_norm_backward: The norm's gradient by hand (8 points, 40 minutes, hard)
def rms_norm_backward(
    x: Tensor, weight_D: Tensor, grad: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to x, shaped like x, and to the weight, (D,), without autograd.

    The norm is y = weight * x / sqrt(mean of x^2 over the last axis + eps). grad, shaped like x, is
    the gradient with respect to y.
    """
    raise NotImplementedError("rms_norm_backward is not written yet")  # your code here


# 8. turned_stream: The same model in other coordinates (12 points, 90 minutes, design)
@torch.no_grad()
def turned(
    model: swiglu_rmsnorm.Transformer, turn_DD: Tensor
) -> tuple[swiglu_rmsnorm.Transformer, Tensor]:
    """A model whose stream is turned and whose norms all have weights of one; an output matrix.

    turn_DD is orthogonal. Where the given model's stream is x_BTD, the new one's is
    x_BTD @ turn_DD, from the embedding to the last norm. What comes out of the new model's last
    norm, times the output matrix (V, D), gives the old logits. The given model is not changed.
    (Ashkboos et al. 2024, SliceGPT, section 3.)
    """
    raise NotImplementedError("turned is not written yet")  # your code here
