"""Answers to the exercises that the chapter's own files do not contain.

The letters are those of swiglu_rmsnorm.py.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ch05_swiglu_rmsnorm import swiglu_rmsnorm


def widest(d_model: int, budget: int, multiple: int, gated: bool, bias: bool) -> int:
    """The largest hidden width, a multiple of `multiple`, of an MLP within the budget.

    `budget` is a number of parameters. A plain MLP has two matrices, a gated one three. With bias
    each has a bias, too, a number for every number that comes out. 0 if the least width is too
    expensive.
    """
    n_into_hidden = 2 if gated else 1
    per_unit = (n_into_hidden + 1) * d_model + n_into_hidden * bias
    left = budget - d_model * bias  # down_proj's bias, whatever the width
    return max(left // per_unit // multiple, 0) * multiple


def plain_norm_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gemma's weights for norms that multiply by w: Gemma's multiply by 1 + w.

    The names of norms' weights end in "norm.weight". They come out in float32, since 1 + w has
    more digits than 16 bits can hold. All others come out as they are. The input is not changed.
    """
    return {
        name: 1 + weight.float() if name.endswith("norm.weight") else weight
        for name, weight in weights.items()
    }


def bilinear_as_swiglu(
    gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of a SwiGLU MLP that computes what a bilinear MLP with these weights does.

    The bilinear MLP is x -> ((x gate^T) * (x up^T)) down^T (Shazeer 2020, section 2). Returned are
    gate and up, both (2F, D), and down (D, 2F).
    """
    # silu(g) u + silu(-g) (-u) = g (sigmoid(g) + sigmoid(-g)) u = g u
    gate = torch.cat((gate_FD, -gate_FD))
    up = torch.cat((up_FD, -up_FD))
    down = torch.cat((down_DF, down_DF), dim=1)
    return gate, up, down


class FusedMLP(nn.Module):
    """An MLP of two matrices: gate_proj and up_proj as one, gate_up_proj, and down_proj.

    Of the 2F rows of gate_up_proj the first F are the gate's. Both are of class nn.Linear.
    """

    def __init__(self, mlp: swiglu_rmsnorm.MLP) -> None:
        """Copies the weights of a gated MLP, and its biases if it has any."""
        super().__init__()
        d_ff, d_model = mlp.gate_proj.weight.shape
        bias = mlp.gate_proj.bias is not None
        self.gate_up_proj = nn.Linear(d_model, 2 * d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)
        self.down_proj.load_state_dict(mlp.down_proj.state_dict())
        gate, up = mlp.gate_proj.state_dict(), mlp.up_proj.state_dict()
        self.gate_up_proj.load_state_dict({k: torch.cat((gate[k], up[k])) for k in gate})

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def rms_norm_backward(
    x: Tensor, weight_D: Tensor, grad: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to x, shaped like x, and to the weight, (D,), without autograd.

    The norm is y = weight * x / sqrt(mean of x^2 over the last axis + eps). grad, shaped like x, is
    the gradient with respect to y.
    """
    inverse = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    normed = x * inverse
    wanted = weight_D * grad  # the gradient with respect to normed
    along = (wanted * normed).mean(dim=-1, keepdim=True)
    grad_x = inverse * (wanted - along * normed)
    grad_weight_D = (grad * normed).reshape(-1, len(weight_D)).sum(dim=0)
    return grad_x, grad_weight_D


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
    model = copy.deepcopy(model)
    output_VD = (model.embed.weight * model.norm.weight) @ turn_DD
    model.embed.weight.copy_(model.embed.weight @ turn_DD)
    model.norm.weight.fill_(1)
    for block in model.blocks:
        attn = dict(block.attn.named_children())
        names = ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj")  # those that it has
        attn_readers = [attn[name] for name in names if name in attn]
        mlp_readers = [block.mlp.gate_proj, block.mlp.up_proj]
        readers = {block.attn_norm: attn_readers, block.mlp_norm: mlp_readers}
        for latent in ("q", "kv"):  # read by matrices of their own, and not turned
            if f"{latent}_a_norm" in attn:
                readers[attn[f"{latent}_a_norm"]] = [attn[f"{latent}_b_proj"]]
        for norm, matrices in readers.items():
            for linear in matrices:
                linear.weight.mul_(norm.weight)
            norm.weight.fill_(1)
        for linear in attn_readers + mlp_readers:
            linear.weight.copy_(linear.weight @ turn_DD)
        for linear in (block.attn.o_proj, block.mlp.down_proj):
            linear.weight.copy_(turn_DD.T @ linear.weight)
            if linear.bias is not None:
                linear.bias.copy_(linear.bias @ turn_DD)
    return model, output_VD
