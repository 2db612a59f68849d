"""Chapter 8: the same model, faster, or in less memory. The model files stay as they are.

Each step changes a loaded model in place:

    vector_products(model)    one token's products as matrix times vector; plain_products undoes it
    quantize(model, "int8")   matrices as int8 times a scale a row, the embedding too
    quantize(model, "int4")   matrices as int4 in groups of 32, the embedding as int8

A token of decoding reads every weight once. So its time is the bytes of the weights, at the speed
of memory, and what some two thousand small operations cost besides. These steps work on the first
part. `load` takes the first step for bfloat16 on a CPU, where it is faster and changes results no
more than bfloat16's own rounding does. Nothing is calibrated: integers are fitted to the weights
alone. `python -m ch08_full_models.benchmark` measures what each step gains and what it costs.

    D  columns of a matrix, its input   N  rows of a matrix, its output
    G  groups of columns that share a scale   C  columns in a group
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

INT4_GROUP = 32  # columns that share a scale, as in GGUF's Q4 formats
PART = 1 << 14  # rows of a matrix that are floats at a time where it is needed whole


# One token is a vector


class VectorLinear(nn.Linear):
    """A Linear that multiplies one token by torch.mv: on a CPU, in bfloat16, faster than linear."""

    def forward(self, x: Tensor) -> Tensor:
        return vector_linear(x, self.weight, self.bias)


class VectorWeight(nn.Parameter):
    """An embedding's weight that does the same where it is the output matrix."""

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear and not kwargs:
                return vector_linear(*args)
            return func(*args, **(kwargs or {}))


def vector_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias), by torch.mv if x is one row."""
    if x.numel() != weight.shape[1] or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    y_N = torch.mv(weight, x.reshape(-1))
    y_N = y_N if bias is None else y_N + bias
    return y_N.view(*x.shape[:-1], -1)


def vector_products(model: nn.Module) -> nn.Module:
    """The model itself, its products of one token by torch.mv. No weight is copied."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = VectorLinear
        elif type(module) is nn.Embedding:
            module.weight = VectorWeight(module.weight.detach(), module.weight.requires_grad)
    return model


def plain_products(model: nn.Module) -> nn.Module:
    """Undoes vector_products."""
    for module in model.modules():
        if type(module) is VectorLinear:
            module.__class__ = nn.Linear
        elif type(module) is nn.Embedding:
            module.weight = nn.Parameter(module.weight.detach(), module.weight.requires_grad)
    return model


# Whole numbers


class Int8Matrix(nn.Module):
    """A matrix whose rows are int8 times one scale a row: about 1 byte a number."""

    def __init__(self, w_ND: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = w_ND.shape[1], w_ND.shape[0]
        int_ND, scale_N = torch.empty(w_ND.shape, dtype=torch.int8), w_ND.new_empty(len(w_ND))
        for start in range(0, len(w_ND), PART):
            part_ND = w_ND[start : start + PART].float()
            scale_N1 = part_ND.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
            scale_N1 = scale_N1.to(
                w_ND.dtype
            ).float()  # as it is kept, so that it fits the integers
            int_ND[start : start + PART] = (part_ND / scale_N1).round().clamp(-127, 127)
            scale_N[start : start + PART] = scale_N1[:, 0]
        self.register_buffer("int_ND", int_ND.to(w_ND.device))
        self.register_buffer("scale_N", scale_N)
        self.bias = bias

    def rows(self, index: Tensor | slice) -> Tensor:
        """Some rows in floats, (..., D)."""
        return self.int_ND[index].to(self.scale_N.dtype) * self.scale_N[index][..., None]

    def multiply(self, x_MD: Tensor) -> Tensor:
        """x times the transposed matrix, (M, N), without making floats of it."""
        return torch._weight_int8pack_mm(x_MD, self.int_ND, self.scale_N)

    @property
    def weight(self) -> Tensor:
        """The matrix in floats, (N, D)."""
        return self.rows(slice(None))

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(self, x)


class Int4Matrix(nn.Module):
    """A matrix of 4-bit numbers: about 0.63 bytes a number in bfloat16.

    Each 32 columns of a row share a step and a zero: weight = step * (integer - 8) + zero.
    """

    def __init__(self, w_ND: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = w_ND.shape[1], w_ND.shape[0]
        int_NGC, step_NG1, low_NG1 = fit_int4(w_ND.unflatten(1, (-1, INT4_GROUP)))
        step_zero_NG2 = torch.cat((step_NG1, low_NG1 + 8 * step_NG1), dim=2).to(w_ND.dtype)
        self.register_buffer("step_zero_GN2", step_zero_NG2.transpose(0, 1).contiguous())
        # torch's own order of the numbers is known to its product alone.
        self.packed = w_ND.device.type == "cpu" and self.out_features % 16 == 0
        if self.packed:
            pairs = torch._convert_weight_to_int4pack_for_cpu(int_NGC.flatten(1).int(), 1)
        else:
            first_NC, second_NC = int_NGC.flatten(1).chunk(2, dim=1)
            pairs = first_NC | second_NC << 4
        self.register_buffer("pairs", pairs)
        self.bias = bias

    def multiply(self, x_MD: Tensor) -> Tensor:
        """x times the transposed matrix, (M, N)."""
        if not self.packed:
            return F.linear(x_MD, self.weight)
        return torch._weight_int4pack_mm_for_cpu(x_MD, self.pairs, INT4_GROUP, self.step_zero_GN2)

    @property
    def weight(self) -> Tensor:
        """The matrix in floats, (N, D)."""
        dtype = self.step_zero_GN2.dtype
        if self.packed:  # each row of the identity picks out one column
            return self.multiply(torch.eye(self.in_features, dtype=dtype)).T
        int_ND = torch.cat((self.pairs & 15, self.pairs >> 4), dim=1)
        step_NG1, zero_NG1 = self.step_zero_GN2.transpose(0, 1)[..., None].unbind(2)
        int_NGC = int_ND.unflatten(1, (-1, INT4_GROUP)).to(dtype)
        return ((int_NGC - 8) * step_NG1 + zero_NG1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x.reshape(-1, self.in_features)).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def fit_int4(w_NGC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integers 0 to 15 (N, G, C), step and low (N, G, 1): w is about step * integer + low.

    Rounding from the smallest to the largest number of a group, as is usual, lets its two extremes
    decide. Here narrower ranges are tried as well, and for each the step and the low that fit its
    integers best by least squares; the one with the smallest squared error stays.
    """
    parts = [fit_rows(part_NGC) for part_NGC in w_NGC.split(PART // 8)]
    int_NGC, step_NG1, low_NG1 = (torch.cat(found) for found in zip(*parts, strict=True))
    return int_NGC, step_NG1, low_NG1


def fit_rows(w_NGC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype, w_NGC = w_NGC.dtype, w_NGC.float()
    lowest_NG1, highest_NG1 = w_NGC.amin(dim=2, keepdim=True), w_NGC.amax(dim=2, keepdim=True)
    mean_NG1 = w_NGC.mean(dim=2, keepdim=True)
    best: tuple[Tensor, ...] = ()
    for share in (1.0, 0.9, 0.8):
        middle_NG1 = (lowest_NG1 + highest_NG1) / 2
        step_NG1 = (share * (highest_NG1 - lowest_NG1) / 15).clamp(min=1e-8)
        low_NG1 = middle_NG1 - 7.5 * step_NG1
        for _ in range(2):
            int_NGC = ((w_NGC - low_NG1) / step_NG1).round().clamp(0, 15)
            off_NGC = int_NGC - int_NGC.mean(dim=2, keepdim=True)
            spread_NG1 = off_NGC.square().sum(dim=2, keepdim=True)
            slope_NG1 = (off_NGC * (w_NGC - mean_NG1)).sum(dim=2, keepdim=True) / spread_NG1
            step_NG1 = torch.where(spread_NG1 > 0, slope_NG1, step_NG1).clamp(min=1e-8)
            # The product keeps step and zero in the model's type, so they are rounded here.
            step_NG1 = step_NG1.to(dtype).float()
            zero_NG1 = mean_NG1 - (int_NGC.mean(dim=2, keepdim=True) - 8) * step_NG1
            low_NG1 = zero_NG1.to(dtype).float() - 8 * step_NG1
        int_NGC = ((w_NGC - low_NG1) / step_NG1).round().clamp(0, 15)
        error_NG1 = (int_NGC * step_NG1 + low_NG1 - w_NGC).square().sum(dim=2, keepdim=True)
        found = (int_NGC.to(torch.uint8), step_NG1, low_NG1, error_NG1)
        if best:
            better_NG1 = error_NG1 < best[3]
            found = tuple(torch.where(better_NG1, a, b) for a, b in zip(found, best, strict=True))
        best = found
    return best[:3]


def packed_linear(matrix: Int8Matrix, x: Tensor) -> Tensor:
    """F.linear with a matrix of integers: few rows of x by its own product, many by floats.

    The floats are made a part at a time, so the whole matrix never is.
    """
    rows_MD = x.reshape(-1, x.shape[-1])
    if len(rows_MD) <= FEW_ROWS and x.device.type == "cpu":
        y_MN = matrix.multiply(rows_MD)
    else:
        parts = (slice(start, start + PART) for start in range(0, matrix.out_features, PART))
        y_MN = torch.cat([F.linear(rows_MD, matrix.rows(part)) for part in parts], dim=1)
    y_MN = y_MN if matrix.bias is None else y_MN + matrix.bias
    return y_MN.view(*x.shape[:-1], -1)


class PackedWeight:
    """What the model's F.linear(x, embed.weight) meets, where the embedding is packed."""

    def __init__(self, matrix: Int8Matrix) -> None:
        self.matrix = matrix
        self.dtype, self.device = matrix.scale_N.dtype, matrix.scale_N.device
        self.shape = (matrix.out_features, matrix.in_features)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Tensor:
        if func is not F.linear or kwargs or len(args) != 2:
            raise TypeError(f"{func.__name__}: a packed embedding knows F.linear only")
        return packed_linear(args[1].matrix, args[0])


class Int8Embedding(nn.Module):
    """An Embedding whose rows are int8; also the output matrix, in models that tie the two."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.matrix = Int8Matrix(embedding.weight.detach())

    @property
    def weight(self) -> PackedWeight:
        return PackedWeight(self.matrix)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.matrix.rows(tokens)


@torch.no_grad()
def quantize(model: nn.Module, kind: str) -> nn.Module:
    """The model itself, its matrices as integers. Routers and norms stay as they are.

    "int4" packs the matrices inside the layers so; the embedding and the output matrix, which
    decide between many near tokens, become int8. Raises ValueError for another kind, and for a
    matrix whose width int4's groups do not divide.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize is {kind!r}, expected one of {', '.join(KINDS)}")
    for name, module in list(model.named_modules()):
        parent_name, _, last = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if isinstance(module, nn.Embedding):
            setattr(parent, last, Int8Embedding(module))
        if not isinstance(module, nn.Linear) or last in ROUTERS:
            continue
        packed = KINDS[kind] if name.startswith("blocks.") else Int8Matrix
        if packed is Int4Matrix and module.in_features % INT4_GROUP:
            width = f"width {module.in_features}, not a multiple of {INT4_GROUP}"
            raise ValueError(f"{name} has {width}: int4 cannot group it")
        setattr(parent, last, packed(module.weight.detach(), module.bias))
    return model


KINDS = {"int8": Int8Matrix, "int4": Int4Matrix}
ROUTERS = ("router", "shared_gate")  # small, and they choose
FEW_ROWS = 4  # up to here a product of integers is faster than making floats


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the model's weights take, quantized or not."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
