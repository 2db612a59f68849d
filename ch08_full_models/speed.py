"""Chapter 8: the same model in less memory.

quantize(model, "int8") swaps, in place, every matrix inside the layers for whole numbers and a
scale: weight = scale * integer. The embedding (which is the output matrix as well in tied models)
and the norms stay as they are. Nothing is calibrated: this is plain rounding, so int8 is close to
the float model and int4 is visibly worse; tests/test_ch08_speed.py measures both. It buys memory,
not time: each product first turns its integers back into floats.

    D  columns of a matrix, its input   N  rows of a matrix, its output
    G  groups of columns that share a scale   C  columns in a group
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

INT4_GROUP = 32  # columns that share a scale, as in GGUF's Q4 formats


class Int8Linear(nn.Module):
    """A Linear whose rows are int8 times one scale a row: about 1 byte a weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        w_ND = linear.weight.detach().float()
        scale_N1 = w_ND.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("int_ND", (w_ND / scale_N1).round().to(torch.int8))
        self.register_buffer("scale_N1", scale_N1.to(linear.weight.dtype))
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The matrix in floats, (N, D)."""
        return self.int_ND.to(self.scale_N1.dtype) * self.scale_N1

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Int4Linear(nn.Module):
    """A Linear of 4-bit steps from each group's least weight: about 0.6 to 0.75 bytes a weight.

    Each 32 columns of a row share a smallest value and a step; two weights share a byte.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        w_NGC = linear.weight.detach().float().unflatten(1, (-1, INT4_GROUP))
        low_NG1 = w_NGC.amin(dim=2, keepdim=True)
        step_NG1 = ((w_NGC.amax(dim=2, keepdim=True) - low_NG1) / 15).clamp(min=1e-12)
        int_NGC = ((w_NGC - low_NG1) / step_NG1).round().to(torch.uint8)
        first_NGC, second_NGC = int_NGC.chunk(2, dim=2)
        self.register_buffer("pair_NGC", first_NGC | second_NGC << 4)
        self.register_buffer("low_NG1", low_NG1.to(linear.weight.dtype))
        self.register_buffer("step_NG1", step_NG1.to(linear.weight.dtype))
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The matrix in floats, (N, D)."""
        int_NGC = torch.cat((self.pair_NGC & 15, self.pair_NGC >> 4), dim=2)
        return (int_NGC.to(self.low_NG1.dtype) * self.step_NG1 + self.low_NG1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


KINDS = {"int8": Int8Linear, "int4": Int4Linear}


@torch.no_grad()
def quantize(model: nn.Module, kind: str) -> nn.Module:
    """The model itself, with the matrices of its layers as int8 or int4.

    Raises ValueError for another kind, and for a matrix whose width int4's groups do not divide.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize is {kind!r}, expected one of {', '.join(KINDS)}")
    for name, module in list(model.blocks.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        if kind == "int4" and module.in_features % INT4_GROUP:
            width = f"width {module.in_features}, not a multiple of {INT4_GROUP}"
            raise ValueError(f"blocks.{name} has {width}: int4 cannot group it")
        parent, _, last = name.rpartition(".")
        setattr(model.blocks.get_submodule(parent), last, KINDS[kind](module))
    return model


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the model's weights take, quantized or not."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
