"""Chapter 8: a mixture of experts, faster. The model files stay as they are.

    fast_experts(model)     experts by what is cheapest for the number of tokens
    plain_experts(model)    undoes it
    step_experts(model)     what decode.compiled_steps needs; decode.plain_decode undoes it

A step on a loaded model, in place and without copying a weight, as those of speed.py are. It
changes how tokens reach their experts, and how an expert multiplies:

- One token has its experts from the router, so they are called one after the other, and nothing is
  sorted or counted. Nothing but the router grows with the number of experts.
- Many tokens are sorted by expert once, as in the family's file, but then only the experts that
  were chosen are looked at.
- An expert multiplies one token by speed.vector_product, in bfloat16 where that is fast
  (speed.mv_is_faster). There, the product for the few dozen tokens that it gets of a prompt is made
  with the weight on the left, W x, and stays transposed until the expert is done: the same
  multiplications by other kernels. Of two processors that were measured, one gains by both and one
  loses by both.

A compiled step cannot call what Python chooses. It can take rows by number: all experts of a layer
are put into one tensor, and the compiler's loop over the rows of the chosen ones starts where they
do. So it reads the bytes of these, and no others, and nothing is called for each expert.

But for that an expert is still called as a module, so what waits on disk (offload.py) is read, and
one that was quantized (speed.quantize) multiplies in its own way. With gradients on, all is as in
the family's file. `python -m ch08_full_models.experts_demo` measures what it gains.

A tensor's name ends in its axes:
    B  sequences                      T  tokens of a sequence
    D  width of the stream            F  hidden width of an expert
    N  tokens of all sequences: B * T                 A  experts that a token goes to
    M  pairs of a token and an expert; within an expert, its tokens
    E  experts of a layer             R, C  rows and columns of a matrix
    1  an axis of length one
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ch08_full_models import deepseek_v3, llama4, mixtral, qwen3
from ch08_full_models.decode import Changed, change, stored_floats
from ch08_full_models.speed import Int8Matrix, mv_is_faster, vector_product

# Fewer float32 tokens than this are faster by F.linear. In bfloat16 no number of them was.
FEW_FLOAT32 = 8


class FastExpert:
    """What comes before a family's MLP in its class."""

    def forward(self, x_MD: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not isinstance(self.gate_proj, nn.Linear):
            return super().forward(x_MD)
        gate_FD, up_FD, down_DF = (
            linear.weight for linear in (self.gate_proj, self.up_proj, self.down_proj)
        )
        is_float = x_MD.dtype == torch.float32
        if len(x_MD) == 1 and (is_float or mv_is_faster()):
            h_F = F.silu(vector_product(gate_FD, x_MD[0])) * vector_product(up_FD, x_MD[0])
            return vector_product(down_DF, h_F)[None]
        if len(x_MD) < (FEW_FLOAT32 if is_float else 2) or not mv_is_faster():
            return super().forward(x_MD)
        h_FM = F.silu(gate_FD @ x_MD.T) * (up_FD @ x_MD.T)
        return (down_DF @ h_FM).T


class FastMoE:
    """What comes before a family's MoE in its class."""

    weighs_input = False  # the weight of an expert multiplies its input, not its output

    def forward(self, x_BTD: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x_BTD)
        x_ND = x_BTD.flatten(0, 1)
        expert_NA, weight_NA = self.route(x_ND)
        shared = getattr(self, "shared", None)
        y_ND = torch.zeros_like(x_ND) if shared is None else shared(x_ND)
        add = self.add_to_one if len(x_ND) == 1 else self.add_to_many
        return add(y_ND, x_ND, expert_NA, weight_NA).view_as(x_BTD)

    def add_to_one(
        self, y_1D: Tensor, x_1D: Tensor, expert_1A: Tensor, weight_1A: Tensor
    ) -> Tensor:
        """What is there already and what the experts of the only token say, (1, D)."""
        weight_A1 = weight_1A.T
        inputs = (x_1D * weight_A1).split(1) if self.weighs_input else [x_1D] * len(weight_A1)
        pairs = zip(expert_1A[0].tolist(), inputs, strict=True)
        y_AD = torch.cat([self.experts[i](part_1D) for i, part_1D in pairs])
        y_AD = y_AD if self.weighs_input else y_AD * weight_A1
        return y_1D + y_AD.sum(dim=0, keepdim=True).type_as(y_1D)

    def add_to_many(
        self, y_ND: Tensor, x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor
    ) -> Tensor:
        """What is there already and what each token's experts say, (N, D)."""
        expert_M, order_M = expert_NA.flatten().sort(stable=True)
        active, n_tokens = expert_M.unique_consecutive(return_counts=True)
        token_M, weight_M1 = order_M // self.n_active, weight_NA.flatten()[order_M, None]
        x_MD = x_ND[token_M] * weight_M1 if self.weighs_input else x_ND[token_M]
        parts = zip(active.tolist(), x_MD.split(n_tokens.tolist()), strict=True)
        y_MD = torch.cat([self.experts[i](part_MD) for i, part_MD in parts])
        y_MD = y_MD if self.weighs_input else y_MD * weight_M1
        return y_ND.index_add_(0, token_M, y_MD.type_as(y_ND))


class MixtralExpert(FastExpert, mixtral.MLP): ...


class MixtralMoE(FastMoE, mixtral.MoE): ...


class Qwen3Expert(FastExpert, qwen3.MLP): ...


class Qwen3MoE(FastMoE, qwen3.MoE): ...


class Llama4Expert(FastExpert, llama4.MLP): ...


class Llama4MoE(FastMoE, llama4.MoE):
    weighs_input = True


class DeepSeekExpert(FastExpert, deepseek_v3.MLP): ...


class DeepSeekMoE(FastMoE, deepseek_v3.MoE): ...


FAST = {
    mixtral.MoE: (MixtralMoE, MixtralExpert),
    qwen3.MoE: (Qwen3MoE, Qwen3Expert),
    llama4.MoE: (Llama4MoE, Llama4Expert),
    deepseek_v3.MoE: (DeepSeekMoE, DeepSeekExpert),
}


def fast_experts(model: nn.Module) -> nn.Module:
    """The model itself, its experts by what is cheapest. One without experts stays as it is."""
    for module in model.modules():
        if type(module) in FAST:
            module.__class__, expert_class = FAST[type(module)]
            for expert in module.experts:
                expert.__class__ = expert_class
    return model


def plain_experts(model: nn.Module) -> nn.Module:
    """Undoes fast_experts."""
    for module in model.modules():
        if isinstance(module, (FastMoE, FastExpert)):
            module.__class__ = type(module).__bases__[1]  # the family's own
    return model


# For a compiled step


class StepMoE(Changed):
    """A layer of experts whose part for one token is written by the compiler."""

    together: tuple["Together", "Together", "Together"]

    def forward(self, x_BTD: Tensor) -> Tensor:
        if x_BTD.shape[:2] != (1, 1) or not torch.compiler.is_compiling():
            return super().forward(x_BTD)
        x_1D, (gate, up, down) = x_BTD[0], self.together
        expert_1A, weight_1A = self.route(x_1D)
        expert_A, weight_A1 = expert_1A[0], weight_1A.T
        weighs_input = isinstance(self, llama4.MoE)
        x_AD = x_1D * weight_A1 if weighs_input else x_1D.expand(len(expert_A), -1)
        h_AF = F.silu(gate.multiply(expert_A, x_AD)) * up.multiply(expert_A, x_AD)
        y_AD = down.multiply(expert_A, h_AF)
        y_1D = (y_AD if weighs_input else y_AD * weight_A1).sum(dim=0, keepdim=True).type_as(x_1D)
        shared = getattr(self, "shared", None)
        return (y_1D if shared is None else shared(x_1D) + y_1D)[None]


class Together:
    """One matrix of each expert, in one tensor of which the experts' own become views."""

    def __init__(self, matrices: list[nn.Module]) -> None:
        self.scale_ER = None
        if isinstance(matrices[0], Int8Matrix):
            self.weight_ERC = joined([matrix.int_ND for matrix in matrices])
            self.scale_ER = joined([matrix.scale_N for matrix in matrices])
            for i, matrix in enumerate(matrices):
                matrix.int_ND, matrix.scale_N = self.weight_ERC[i], self.scale_ER[i]
        elif isinstance(matrices[0], nn.Linear):
            self.weight_ERC = joined([matrix.weight.detach() for matrix in matrices])
            for matrix, weight_RC in zip(matrices, self.weight_ERC, strict=True):
                matrix.weight = nn.Parameter(weight_RC, matrix.weight.requires_grad)
        else:
            raise ValueError("experts of 4 bits cannot be compiled: take int8, or do not compile")

    def multiply(self, expert_A: Tensor, x_AC: Tensor) -> Tensor:
        """Each chosen expert's matrix times its row, (A, R), summed in floats and rounded once."""
        y_AR = (self.weight_ERC[expert_A].float() * stored_floats(x_AC)[:, None]).sum(dim=2)
        return (y_AR if self.scale_ER is None else y_AR * self.scale_ER[expert_A]).type_as(x_AC)


def joined(tensors: list[Tensor]) -> Tensor:
    """All in one, (E, ...): a copy, but where they lie at equal distances in one memory already."""
    first, starts = tensors[0], [t.storage_offset() for t in tensors]
    step = starts[1] - starts[0] if len(starts) > 1 else first.numel()
    in_one = {t.untyped_storage().data_ptr() for t in tensors} == {
        first.untyped_storage().data_ptr()
    }
    if in_one and step > 0 and starts == [starts[0] + i * step for i in range(len(starts))]:
        return first.as_strided((len(starts), *first.shape), (step, *first.stride()))
    return torch.stack(tensors)


def step_experts(model: nn.Module) -> nn.Module:
    """The model itself, its experts put together for a compiled step, a layer after the other.

    Raises ValueError for experts of 4 bits.
    """
    for module in model.modules():
        if hasattr(module, "experts"):
            names = ("gate_proj", "up_proj", "down_proj")
            parts = [[getattr(expert, name) for expert in module.experts] for name in names]
            change(module, StepMoE, together=tuple(map(Together, parts)))
    return model
