"""Chapter 8: the same model, faster, or in less memory. The model files stay as they are.

Each step changes a loaded model in place:

    vector_products(model)    one token's products as matrix times vector; plain_products undoes it
    quantize(model, "int8")   matrices as int8 times a scale a row, the embedding too
    quantize(model, "int4")   some matrices as int4 in groups of 32, the others as int8

A token of decoding reads every weight once. So its time is the bytes of the weights, at the speed
of memory, and what some two thousand small operations cost besides. These steps work on the first
part. `load` takes the first step on a CPU where it is faster than torch's linear: for bfloat16 on
some processors, for float32 where torch leaves the product to one thread. It changes results no
more than rounding does. Its integers are fitted to the weights alone; `quantize` with some text
fits them to what the matrices are multiplied by. What that gains, and what each choice costs in
quality, is in quality.py; `python -m ch08_full_models.benchmark` measures the rest.

    D  columns of a matrix, its input   N  rows of a matrix, its output
    G  groups of columns that share a scale   C  columns in a group
"""

import functools
import time
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

KINDS = ("int8", "int4")
EIGHT_BITS = ("k_proj", "v_proj", "up_proj", "down_proj")  # of int4: four bits cost most there
STAY = (
    "router", "out_gate",  # small, and they choose
    "kv_b_proj",  # absorbed attention reads all of it for each token (deepseek_v3.py)
)  # fmt: skip
INT4_GROUP = 32  # columns that share a scale, as in GGUF's Q4 formats
COLUMN_ROWS = 1024  # rows, at most, of a matrix that say how large its columns are
PART = 1 << 10  # rows of a matrix that are floats at a time where it is needed whole
FIT = 1 << 17  # numbers that are fitted at a time, which takes ten times as many
FEW_ROWS = 4  # up to here a product of integers is faster than making floats


# One token is a vector


class VectorLinear(nn.Linear):
    """A Linear that multiplies one token as matrix times vector."""

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
    """F.linear(x, weight, bias), by vector_product if x is one row."""
    if x.numel() != weight.shape[1] or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    y_N = matrix_vector(weight, x.reshape(-1))
    y_N = y_N if bias is None else y_N + bias
    return y_N.view(*x.shape[:-1], -1)


def matrix_vector(w_ND: Tensor, x_D: Tensor) -> Tensor:
    """vector_product. A compiler is to leave it alone: its own code for it is slower where used."""
    if torch.compiler.is_compiling():
        return torch.ops.opaque.mv(w_ND, x_D)
    return vector_product(w_ND, x_D)


def vector_product(w_ND: Tensor, x_D: Tensor) -> Tensor:
    """Matrix times vector, (N,). That of floats is cut into as many parts as there are threads.

    torch.mv of float32 may be the work of one thread, but the products of a batch are divided.
    """
    n = torch.get_num_threads()
    if w_ND.dtype != torch.float32 or len(w_ND) % n:
        return torch.mv(w_ND, x_D)
    return torch.bmm(w_ND.unflatten(0, (n, -1)), x_D.expand(n, 1, -1).mT).view(-1)


OPAQUE = torch.library.Library("opaque", "DEF")
OPAQUE.define("mv(Tensor w_ND, Tensor x_D) -> Tensor")
OPAQUE.impl("mv", vector_product, "CompositeExplicitAutograd")


@torch.library.register_fake("opaque::mv")
def _(w_ND: Tensor, x_D: Tensor) -> Tensor:
    return x_D.new_empty(w_ND.shape[0])


@functools.cache
def mv_is_faster() -> bool:
    """Whether torch.mv multiplies one bfloat16 token faster than F.linear on this machine's CPU.

    It depends on the processor, either way by a fifth and more. So both are tried once, which takes
    some hundredths of a second. On one thread: where other programs run, threads would wait for
    each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        vector, linear = tried(torch.bfloat16, 1 << 8, 16)
    finally:
        torch.set_num_threads(threads)
    return 1.1 * vector < linear


@functools.cache
def parts_are_faster() -> bool:
    """Whether float32 matrices in parts multiply one token faster than F.linear, as tried once.

    In doubt they do: a machine that is busy just now keeps the parts waiting for each other.
    """
    if torch.get_num_threads() == 1:
        return False
    vector, linear = tried(torch.float32, 1 << 11, 2)
    return vector < 1.1 * linear


@torch.no_grad()
def tried(dtype: torch.dtype, n_rows: int, n_parts: int) -> list[float]:
    """Seconds that vector_product and F.linear take for n_rows rows: the fastest of 16 tries each.

    One after the other, as in a model: threads that have nothing to do fall asleep.
    """
    w_ND = torch.ones(n_parts * n_rows, 1 << 10, dtype=dtype)
    x_D = w_ND[0].clone()
    products = (vector_product, lambda part_ND, x_D: F.linear(x_D[None], part_ND))
    fastest = []
    for product in products:
        times = []
        for part_ND in (16 // n_parts) * w_ND.split(n_rows):
            start = time.perf_counter()
            product(part_ND, x_D)
            times.append(time.perf_counter() - start)
        fastest.append(min(times))
    return fastest


def vector_products(model: nn.Module) -> nn.Module:
    """The model itself, its products of one token by vector_product. No weight is copied."""
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
    """A matrix whose rows are int8 times one scale a row: about 1 byte a number.

    With `columns` a scale for each column divides them first. In an embedding some columns are ten
    times as large as most, and would decide every row's scale. A column's is the square root of its
    size in the first rows. From a weight without memory (meta) the matrix is laid out only: put
    fills it, some rows at a time, the first ones first.
    """

    def __init__(
        self,
        w_ND: Tensor,
        bias: Tensor | None = None,
        moment_DD: Tensor | None = None,
        columns: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = w_ND.shape
        self.register_buffer("int_ND", w_ND.new_empty(w_ND.shape, dtype=torch.int8))
        self.register_buffer("scale_N", w_ND.new_empty(self.out_features))
        self.register_buffer("column_D", w_ND.new_empty(self.in_features) if columns else None)
        self.bias = bias
        put_all(self, w_ND, moment_DD)

    @torch.no_grad()
    def put(self, start: int, w_ND: Tensor, share_DD: Tensor | None = None) -> None:
        """Keeps rows from number start on. share_DD is what `compensated` takes."""
        w_ND = w_ND.detach().to(self.scale_N).float()
        if self.column_D is not None:
            if start == 0:
                size_D = w_ND[:COLUMN_ROWS].square().mean(dim=0).sqrt()
                self.column_D.copy_(size_D.sqrt().clamp(min=1e-4))
            w_ND = w_ND / self.column_D
        scale_N1 = w_ND.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        scale_N1 = scale_N1.to(self.scale_N.dtype).float()  # as it is kept, to fit the integers
        rows = slice(start, start + len(w_ND))
        self.scale_N[rows] = scale_N1[:, 0]
        if share_DD is None:
            self.int_ND[rows] = (w_ND / scale_N1).round_().clamp_(-127, 127)
        else:
            grid = (scale_N1[:, 0], torch.zeros_like(scale_N1[:, 0]))
            self.int_ND[rows] = compensated(w_ND, share_DD, lambda _: grid, -127, 127)[0]

    def rows(self, index: Tensor | slice) -> Tensor:
        """Some rows in floats, (..., D)."""
        w = self.int_ND[index].to(self.scale_N.dtype).mul_(self.scale_N[index][..., None])
        return w if self.column_D is None else w.mul_(self.column_D)

    def multiply(self, x_MD: Tensor) -> Tensor:
        """x times the transposed matrix, (M, N), columns' scales aside; makes no floats of it."""
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
    From a weight without memory (meta) it is laid out only, as Int8Matrix is.
    """

    def __init__(
        self, w_ND: Tensor, bias: Tensor | None = None, moment_DD: Tensor | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = w_ND.shape
        self.column_D = None  # each group has a scale of its own
        shape = (self.in_features // INT4_GROUP, self.out_features, 2)
        pairs = w_ND.new_empty(self.out_features, self.in_features // 2, dtype=torch.uint8)
        self.register_buffer("step_zero_GN2", w_ND.new_empty(shape))
        self.register_buffer("pairs", pairs)
        self.bias = bias
        put_all(self, w_ND, moment_DD)

    @property
    def block(self) -> int:
        """Rows that lie together in torch's order, 0 where the numbers are in our own."""
        block = packed_block() if self.pairs.device.type == "cpu" else 0
        return block if block and self.out_features % block == 0 else 0

    @torch.no_grad()
    def put(self, start: int, w_ND: Tensor, share_DD: Tensor | None = None) -> None:
        """Keeps rows from number start on, a multiple of 64. share_DD as for Int8Matrix."""
        w_ND = w_ND.detach().to(self.step_zero_GN2)
        if share_DD is None:
            n_rows = max(1, FIT // self.in_features)
            parts = [fit_int4(part) for part in w_ND.unflatten(1, (-1, INT4_GROUP)).split(n_rows)]
            int_NGC, step_NG1, low_NG1 = map(torch.cat, zip(*parts, strict=True))
            int_ND = int_NGC.flatten(1)
        else:
            dtype = w_ND.dtype

            def fit(w_NC: Tensor) -> tuple[Tensor, Tensor]:
                _, step_N11, low_N11 = fit_int4(w_NC[:, None], dtype)
                return step_N11[:, 0, 0], low_N11[:, 0, 0]

            int_ND, step_NG, low_NG = compensated(w_ND.float(), share_DD, fit, 0, 15)
            step_NG1, low_NG1 = step_NG[..., None], low_NG[..., None]
        if self.block:
            pairs = torch._convert_weight_to_int4pack_for_cpu(int_ND.int(), 1)
        else:
            first_NC, second_NC = int_ND.to(torch.uint8).chunk(2, dim=1)
            pairs = first_NC | second_NC << 4
        rows = slice(start, start + len(w_ND))
        self.pairs[rows] = pairs
        step_zero_NG2 = torch.cat((step_NG1, low_NG1 + 8 * step_NG1), dim=2)
        self.step_zero_GN2[:, rows] = step_zero_NG2.transpose(0, 1)

    def rows(self, part: slice) -> Tensor:
        """Some rows in floats, (R, D); the part starts and ends at a multiple of 64."""
        dtype, block = self.step_zero_GN2.dtype, self.block
        if block:
            int_BDR = unpacked(self.pairs[part], block)
        else:
            int_RD = torch.cat((self.pairs[part] & 15, self.pairs[part] >> 4), dim=1)
            int_BDR = int_RD.T[None]
        int_GCBR = int_BDR.to(torch.int8).sub_(8).unflatten(1, (-1, INT4_GROUP)).permute(1, 2, 0, 3)
        step_zero_2GR = self.step_zero_GN2[:, part].permute(2, 0, 1).contiguous()
        step_G1BR, zero_G1BR = step_zero_2GR.view(2, len(int_GCBR), 1, *int_GCBR.shape[2:])
        w_GCBR = torch.empty(int_GCBR.shape, dtype=dtype, device=self.pairs.device)
        torch.mul(int_GCBR, step_G1BR, out=w_GCBR).add_(zero_G1BR)
        return w_GCBR.view(self.in_features, -1).T

    def multiply(self, x_MD: Tensor) -> Tensor:
        """x times the transposed matrix, (M, N)."""
        if not self.block:
            return F.linear(x_MD, self.weight)
        return torch._weight_int4pack_mm_for_cpu(x_MD, self.pairs, INT4_GROUP, self.step_zero_GN2)

    @property
    def weight(self) -> Tensor:
        """The matrix in floats, (N, D)."""
        return self.rows(slice(None))

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(self, x)


def unpacked(pairs_RP: Tensor, block: int) -> Tensor:
    """The integers of rows that torch has packed, (blocks, D, rows of a block).

    Of each block of rows torch keeps the first column, then the second, and so on. A byte holds
    a number of the block's first half and, in its upper four bits, one of the second.
    """
    byte_BDH = pairs_RP.reshape(-1, 2 * pairs_RP.shape[1], block // 2)
    return torch.cat((byte_BDH & 15, byte_BDH >> 4), dim=2)


@functools.cache
def packed_block() -> int:
    """Rows of a block in torch's order, which depends on the processor; 0 if it is another order.

    So it is tried once with some numbers.
    """
    int_ND = torch.arange(128 * 32).mul(40503).div(977, rounding_mode="floor").view(128, 32) % 16
    pairs = torch._convert_weight_to_int4pack_for_cpu(int_ND.int(), 1)
    for block in (64, 32):
        if torch.equal(unpacked(pairs, block).transpose(1, 2).reshape(128, 32), int_ND):
            return block
    return 0


def put_all(matrix: Int8Matrix | Int4Matrix, w_ND: Tensor, moment_DD: Tensor | None) -> None:
    """Fills the matrix part by part, so that a small part of it is in float32 at a time."""
    if not w_ND.is_meta:
        share_DD = None if moment_DD is None else shares(moment_DD)
        for start in range(0, len(w_ND), PART):
            matrix.put(start, w_ND[start : start + PART], share_DD)


def shares(moment_DD: Tensor) -> Tensor:
    """How `compensated` shares a column's error among those after it, from the inputs' moment.

    The Cholesky factor of the inverse (Frantar et al. 2023, GPTQ, section 3.3), damped as there.
    """
    damp = 0.01 * moment_DD.diagonal().mean() + 1e-8
    damped_DD = moment_DD + damp * torch.eye(len(moment_DD), device=moment_DD.device)
    inverse_DD = torch.cholesky_inverse(torch.linalg.cholesky(damped_DD))
    return torch.linalg.cholesky(inverse_DD, upper=True)


def compensated(
    w_ND: Tensor,
    share_DD: Tensor,
    fit: Callable[[Tensor], tuple[Tensor, Tensor]],
    least: int,
    most: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers (N, D), step and low (N, G): w is about step * integer + low.

    Rounded column by column. What a column's rounding adds to the output, later columns take away
    again, as far as inputs go together: the best correction for the squared error of the outputs
    (GPTQ, section 3). fit gives step and low (N,) of a group's columns when their turn has come.
    """
    w_DN = w_ND.T.clone(memory_format=torch.contiguous_format)
    int_DN, steps, lows = torch.empty_like(w_DN), [], []
    for start in range(0, len(w_DN), INT4_GROUP):
        end = min(start + INT4_GROUP, len(w_DN))
        step_N, low_N = fit(w_DN[start:end].T)
        error_CN = torch.empty_like(w_DN[start:end])
        for c in range(start, end):
            int_DN[c] = ((w_DN[c] - low_N) / step_N).round().clamp(least, most)
            error_CN[c - start] = (w_DN[c] - int_DN[c] * step_N - low_N) / share_DD[c, c]
            w_DN[c + 1 : end] -= share_DD[c, c + 1 : end, None] * error_CN[c - start]
        w_DN[end:] -= share_DD[start:end, end:].T @ error_CN
        steps.append(step_N)
        lows.append(low_N)
    return int_DN.T, torch.stack(steps, dim=1), torch.stack(lows, dim=1)


def fit_int4(w_NGC: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Integers 0 to 15 (N, G, C), step and low (N, G, 1): w is about step * integer + low.

    Rounding from the smallest to the largest number of a group, as is usual, lets its two extremes
    decide. Here narrower ranges are tried as well, and for each the step and the low that fit its
    integers best by least squares; the one with the smallest squared error stays. step and zero
    are numbers of that dtype, in which the product keeps them; by default the weights' own.
    """
    dtype, w_NGC = dtype or w_NGC.dtype, w_NGC.float()
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


def packed_linear(matrix: Int8Matrix | Int4Matrix, x: Tensor) -> Tensor:
    """F.linear with a matrix of integers: few rows of x by its own product, many by floats.

    The floats are made a part at a time, so the whole matrix never is.
    """
    rows_MD = x.reshape(-1, x.shape[-1])
    if len(rows_MD) <= FEW_ROWS and x.device.type == "cpu":
        column_D = matrix.column_D
        y_MN = matrix.multiply(rows_MD if column_D is None else rows_MD * column_D)
    else:
        parts = (slice(start, start + PART) for start in range(0, matrix.out_features, PART))
        y_MN = torch.cat([F.linear(rows_MD, matrix.rows(part)) for part in parts], dim=1)
    y_MN = y_MN if matrix.bias is None else y_MN + matrix.bias
    return y_MN.view(*x.shape[:-1], -1)


class LinearOnly:
    """Stands where a model has a matrix, and knows one use of it: F.linear(x, matrix)."""

    what: str  # it is, for the message
    multiply: Callable[[Tensor], Tensor]  # what F.linear is to give

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Tensor:
        if func is not F.linear or kwargs or len(args) != 2:
            raise TypeError(f"{func.__name__}: {cls.what} knows F.linear only")
        return args[1].multiply(args[0])


class PackedWeight(LinearOnly):
    """What the model's F.linear(x, embed.weight) meets, where the embedding is packed."""

    what = "a packed embedding"

    def __init__(self, matrix: Int8Matrix) -> None:
        self.matrix = matrix
        self.dtype, self.device = matrix.scale_N.dtype, matrix.scale_N.device
        self.shape = (matrix.out_features, matrix.in_features)

    def multiply(self, x: Tensor) -> Tensor:
        return packed_linear(self.matrix, x)


class Int8Embedding(nn.Module):
    """An Embedding whose rows are int8; also the output matrix, in models that tie the two."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.matrix = Int8Matrix(embedding.weight.detach(), columns=True)

    @property
    def weight(self) -> PackedWeight:
        return PackedWeight(self.matrix)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.matrix.rows(tokens)


def quantize(
    model: nn.Module,
    kind: str,
    calibration: Tensor | None = None,
    eight_bits: tuple[str, ...] = EIGHT_BITS,
) -> nn.Module:
    """The model itself, its matrices as integers. What `packed` leaves alone stays as it is.

    calibration: tokens (B, T) of ordinary text, some thousands in all. Then the matrices inside the
    layers are rounded so that their outputs for this text change little, which takes seconds to
    minutes. Raises the ValueErrors of `packed`.
    """
    pack = functools.partial(packed, kind=kind, eight_bits=eight_bits)
    found = {} if calibration is None else calibrated(model, pack, calibration)
    for name, module in list(model.named_modules()):
        matrix = found[name] if name in found else pack(name, module)
        if matrix is not None:
            parent_name, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent_name), last, matrix)
    return model


def packed(
    name: str,
    module: nn.Module,
    kind: str,
    moment_DD: Tensor | None = None,
    eight_bits: tuple[str, ...] = EIGHT_BITS,
) -> nn.Module | None:
    """What takes the place of one Linear or Embedding of a model; None where nothing does.

    name is the module's in the model. "int4" packs matrices inside the layers so, but for those of
    the names eight_bits, unless they are 4-bit numbers already. The embedding and the output
    matrix, which decide between many near tokens, become int8. A module on "meta" is only laid out,
    and filled by its matrix's put. moment_DD: the sum of x x^T over the inputs of a Linear, which
    its rounding should suit. Raises ValueError for another kind, and for a matrix whose width
    int4's groups do not divide.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize is {kind!r}, expected one of {', '.join(KINDS)}")
    if isinstance(module, nn.Embedding):
        return Int8Embedding(module)
    last = name.rpartition(".")[2]
    if not isinstance(module, nn.Linear) or last in STAY:
        return None
    w_ND, grouped = module.weight.detach(), module.in_features % INT4_GROUP == 0
    inside = kind == "int4" and name.startswith("blocks.")
    if inside and last not in eight_bits and not grouped:
        width = f"width {module.in_features}, not a multiple of {INT4_GROUP}"
        raise ValueError(f"{name} has {width}: int4 cannot group it")
    if inside and (last not in eight_bits or (grouped and is_int4(w_ND))):
        return Int4Matrix(w_ND, module.bias, moment_DD)
    return Int8Matrix(w_ND, module.bias, moment_DD)


def is_int4(w_ND: Tensor) -> bool:
    """Whether the weights are 4-bit numbers in groups already, as from a GGUF file of type Q4_1.

    The first rows are asked. Of a matrix without memory (meta) it is not known.
    """
    if w_ND.is_meta:
        return False
    w_NGC = w_ND[:64].unflatten(1, (-1, INT4_GROUP)).float()
    int_NGC, step_NG1, low_NG1 = fit_int4(w_NGC, w_ND.dtype)
    error = (int_NGC * step_NG1 + low_NG1 - w_NGC).square().sum()
    return bool(error < 1e-4 * w_NGC.square().sum())


def calibrated(
    model: nn.Module, pack: Callable[..., nn.Module | None], tokens_BT: Tensor
) -> dict[str, nn.Module]:
    """What pack makes of the layers' Linears, by name, given the inputs that they meet.

    Each is packed when the tokens reach it. It goes on with its new weights, so that those after it
    meet, and correct, what its rounding has changed. Experts that no token reaches are left out.
    """
    found: dict[str, nn.Module] = {}

    def meet(name: str, module: nn.Linear, inputs: tuple[Tensor]) -> None:
        x_MD = inputs[0].reshape(-1, module.in_features).float()
        if name not in found and len(x_MD):
            matrix = pack(name, module, moment_DD=x_MD.T @ x_MD)
            if matrix is not None:
                found[name] = matrix
                module.weight = nn.Parameter(matrix.weight, requires_grad=False)

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    hooks = [
        module.register_forward_pre_hook(functools.partial(meet, name))
        for name, module in linears
        if name.startswith("blocks.")
    ]
    try:
        with torch.no_grad():
            model(tokens_BT, last_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the model's weights take, quantized or not."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
