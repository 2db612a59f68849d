"""Chapter 8: the step that makes one token, with less around its matrix products.

speed.py makes the weights' bytes fewer. The rest of a token's time goes to a thousand or two small
operations: each takes microseconds, however small one token is. Every step here changes a loaded
model in place, and plain_decode undoes them all:

    grouped_attention(model)   heads that share keys are the rows of one query: keys are read once
    short_norms(model)         half as many passes over the numbers; for prompts as well
    two_step_head(model)       a rough product over all words finds those that can win, an exact one
                               decides. The likeliest token is the same; other logits are rough
    compiled_steps(model)      one token's forward as one compiled function

`load` takes the first two on a CPU. The third is for temperature 0. The last takes about a minute
the first time, seconds later on, when it finds its code on disk; it needs a C++ compiler and pays
where thousands of tokens are made. Which matrix products are best, torch's or the compiler's own,
depends on the processor. `python -m ch08_full_models.benchmark` measures them.

A tensor's name ends in its axes, as in the models:
    B  sequences      T  tokens in this call           S  tokens attention can see
    H  query heads    J  key/value heads               G  query heads that share one: H/J
    V  vocabulary     D  width of the residual stream  K  width of one head
    M  words that can win                              1  an axis of length one
"""

import copy
import types
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ch08_full_models import speed

SCAN_GROUP = 32  # columns that share a step in the rough product
SUMS = 8
FEW = 0.25  # of the words: where more than these can win, the full product is as fast


class Changed:
    """Stands before a model's own class; `plain` is that class."""

    plain: type


def change(module: nn.Module, base: type, **members: object) -> None:
    """Puts `base` and the members before the module's own class."""
    plain = type(module)
    # family_of finds the family by the class's module.
    members = {"plain": plain, "__module__": plain.__module__, **members}
    module.__class__ = type(f"{base.__name__}{plain.__name__}", (base, plain), members)


def plain_decode(model: nn.Module) -> nn.Module:
    """Undoes what this file has done to the model; the model itself."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, TwoStepHead):
                setattr(parent, name, module.undone())
    for module in model.modules():
        while isinstance(module, Changed):
            module.__class__ = type(module).plain
    return model


# Attention of one token


def grouped_attention(model: nn.Module) -> nn.Module:
    """The model itself, its attention of one token by `grouped`.

    The layers run their own code; one name in it has another meaning.
    """
    for module in model.modules():
        code = getattr(type(module).forward, "__code__", None)
        if code and "attend" in code.co_names and not isinstance(module, Changed):
            forward = type(module).forward
            attend = grouped(forward.__globals__["attend"])
            change(module, Changed, forward=with_names(forward, attend=attend))
    return model


def with_names(function: Callable, **names: object) -> Callable:
    """The same code, with other meanings for some of the global names in it."""
    return types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def grouped(attend: Callable) -> Callable:
    """The family's attend, but for one token: heads that share a key head as rows of one query.

    So torch's kernel reads keys and values once for all of these heads, not once for each.
    """

    def attend_once(
        q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, mask_BTS: Tensor | None, scale: float
    ) -> Tensor:
        if q_BTHK.shape[1] != 1:
            return attend(q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale)
        y_BJGK = F.scaled_dot_product_attention(
            q_BTHK[:, 0].unflatten(1, (k_BSJK.shape[2], -1)),
            k_BSJK.transpose(1, 2),
            v_BSJK.transpose(1, 2),
            attn_mask=None if mask_BTS is None else mask_BTS[:, None],
            scale=scale,
        )
        return y_BJGK.flatten(1, 2)[:, None]

    return attend_once


# Norms


class ShortNorm(Changed):
    """An RMSNorm of 16-bit numbers that turns them into floats once, and works on these in place.

    It is rounded once, at the end; some families' own is rounded before the weight as well.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        y = x.float()
        scale = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(y.shape[-1])
        return y.mul_(scale.add_(self.eps).rsqrt_()).mul_(self.weight).to(x.dtype)


def short_norms(model: nn.Module) -> nn.Module:
    """The model itself, its RMSNorms with fewer passes over the numbers."""
    for module in model.modules():
        if type(module).__name__ == "RMSNorm" and not isinstance(module, nn.RMSNorm):
            change(module, ShortNorm)
    return model


# The likeliest token in two steps


class TwoStepHead(nn.Module):
    """An output matrix that finds the likeliest word of one token in two steps.

    A copy of the matrix in 4 bits gives every word's logit roughly, and how far off it can be: the
    logit is w . x, the rough one w' . x, so they differ by at most |w - w'| |x| (Cauchy and
    Schwarz). A word that could not win even so much higher is out. The others, some hundreds, are
    multiplied exactly. Rounding of the results to bfloat16 widens the bound.

    Takes the place of an embedding that is the output matrix too, or of a Linear; `inner` is that.
    """

    def __init__(self, inner: nn.Embedding | nn.Linear) -> None:
        super().__init__()
        self.kind = type(inner.weight)  # speed.VectorWeight, say; here a plain one will do
        inner.weight = nn.Parameter(inner.weight.detach(), inner.weight.requires_grad)
        self.inner = inner
        pairs, step_zero_GV2, error_V = rough_copy(inner.weight.detach())
        self.register_buffer("pairs", pairs)
        self.register_buffer("step_zero_GV2", step_zero_GV2)
        self.register_buffer("error_V", error_V)

    @property
    def weight(self) -> "HeadWeight":
        return HeadWeight(self)

    def undone(self) -> nn.Module:
        """The module whose place this took, as it was."""
        weight = self.inner.weight
        self.inner.weight = self.kind(weight.detach(), weight.requires_grad)
        return self.inner

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.inner, nn.Embedding):
            return self.inner(x)
        return F.linear(x, self.weight)

    def multiply(self, x: Tensor) -> Tensor:
        """Logits: of one token in two steps, exact where they can be the largest."""
        w_VD = self.inner.weight
        if x.numel() != w_VD.shape[1]:
            return F.linear(x, w_VD)
        logit_V = torch.ops.opaque.two_step(
            x.reshape(-1), w_VD, self.pairs, self.step_zero_GV2, self.error_V
        )
        return logit_V.view(*x.shape[:-1], -1)


class HeadWeight(speed.LinearOnly):
    """What the model's F.linear(x, embed.weight) meets."""

    what = "a head in two steps"

    def __init__(self, head: TwoStepHead) -> None:
        self.head = head
        self.dtype, self.device = head.inner.weight.dtype, head.inner.weight.device
        self.shape = head.inner.weight.shape

    def multiply(self, x: Tensor) -> Tensor:
        return self.head.multiply(x)


def rough_copy(w_VD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix in 4 bits, as torch's product takes it, and each row's distance from it (V,).

    Plain rounding from the smallest to the largest of each group: what matters is the bound.
    """
    ints, steps, errors = [], [], []
    for part_ND in w_VD.split(speed.PART):
        part_NGC = part_ND.float().unflatten(1, (-1, SCAN_GROUP))
        low_NG1, high_NG1 = part_NGC.amin(dim=2, keepdim=True), part_NGC.amax(dim=2, keepdim=True)
        step_NG1 = ((high_NG1 - low_NG1) / 15).clamp(min=1e-8).to(w_VD.dtype).float()
        zero_NG1 = (low_NG1 + 8 * step_NG1).to(w_VD.dtype).float()
        int_NGC = ((part_NGC - zero_NG1) / step_NG1 + 8).round().clamp(0, 15)
        rough_NGC = (int_NGC - 8) * step_NG1 + zero_NG1
        errors.append((rough_NGC - part_NGC).flatten(1).norm(dim=1))
        ints.append(int_NGC.flatten(1).to(torch.uint8))
        steps.append(torch.cat((step_NG1, zero_NG1), dim=2).to(w_VD.dtype))
    pairs = torch._convert_weight_to_int4pack_for_cpu(torch.cat(ints).int(), 1)
    return pairs, torch.cat(steps).transpose(0, 1).contiguous(), torch.cat(errors)


def two_step(
    x_D: Tensor, w_VD: Tensor, pairs: Tensor, step_zero_GV2: Tensor, error_V: Tensor
) -> Tensor:
    """Logits (V,): exact for every word that can be the likeliest, rough for the others."""
    rough_1V = torch._weight_int4pack_mm_for_cpu(x_D[None], pairs, SCAN_GROUP, step_zero_GV2)
    rough_V, x_norm = rough_1V[0].float(), 1.001 * x_D.float().norm().item()
    # The exact logit of a good guess: who cannot reach that is out.
    best = torch.mv(w_VD[rough_V.argmax()][None], x_D).item()
    # Both products are rounded to bfloat16, so each may be off by 2**-9 of the largest there is.
    largest = rough_V.abs().amax().item() + x_norm * error_V.amax().item()
    reach_V = torch.add(rough_V, error_V, alpha=x_norm)
    open_M = (reach_V >= best - largest * 2**-7).nonzero()[:, 0]
    if len(open_M) > FEW * len(w_VD):
        return torch.mv(w_VD, x_D)
    logit_V = rough_1V[0]
    logit_V[open_M] = torch.mv(w_VD[open_M], x_D)
    return logit_V


speed.OPAQUE.define(  # to a compiler one operation
    "two_step(Tensor x_D, Tensor w_VD, Tensor pairs, Tensor step_zero_GV2, Tensor error_V)"
    " -> Tensor"
)
speed.OPAQUE.impl("two_step", two_step, "CPU")


@torch.library.register_fake("opaque::two_step")
def _(x_D: Tensor, w_VD: Tensor, *rest: Tensor) -> Tensor:
    return x_D.new_empty(w_VD.shape[0])


def two_step_head(model: nn.Module) -> nn.Module:
    """The model itself, with a TwoStepHead. For temperature 0: only the largest logit is exact.

    The rough copy takes about a third of the matrix's memory more. Raises ValueError for weights
    that are not bfloat16 on a CPU, or of a width that groups of 32 do not divide.
    """
    name = "head" if hasattr(model, "head") else "embed"
    inner = getattr(model, name)
    weight = getattr(inner, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype != torch.bfloat16 or weight.is_cuda:
        raise ValueError("a head in two steps needs a bfloat16 output matrix on a CPU")
    if weight.shape[1] % SCAN_GROUP or weight.shape[0] % 16:
        raise ValueError(f"the output matrix is {tuple(weight.shape)}: 4 bits cannot group it")
    setattr(model, name, TwoStepHead(inner))
    return model


# One compiled function


class CompiledStep(Changed):
    """A Transformer whose forward of one token is compiled. All else runs as it was."""

    step: Callable

    def forward(
        self, tokens_BT: Tensor, cache: list | None = None, last_only: bool = False
    ) -> Tensor:
        """What the model's own forward returns."""
        usable = tokens_BT.shape == (1, 1) and cache and cache[0].buffers
        if not usable or cache[0].n_pad_B is not None or torch.is_grad_enabled():
            return super().forward(tokens_BT, cache, last_only)
        pos_11 = cache[0].positions(tokens_BT)
        places = next_places(cache)
        for buffer in (buffer for _, buffers in places for buffer in buffers):
            torch._dynamo.maybe_mark_dynamic(buffer, 0)  # one function for any number of tokens
        with no_duck_shapes():
            return self.step(self, tokens_BT, pos_11, places)


def no_duck_shapes() -> AbstractContextManager:
    """Within it, lengths that are equal by chance may differ later: a window's and the text's."""
    return torch.fx.experimental._config.patch(use_duck_shape=False)


class StepInt8(Changed):
    """An Int8Matrix whose product of one token is written by the compiler.

    Eight sums run side by side: one alone would wait for each addition before the next.
    """

    def multiply(self, x_MD: Tensor) -> Tensor:
        if len(x_MD) != 1 or self.in_features % SUMS or not torch.compiler.is_compiling():
            return super().multiply(x_MD)
        x_D = torch.ops.opaque.to_float(x_MD[0])  # else it is converted anew for every row
        columns = zip(self.int_ND.chunk(SUMS, dim=1), x_D.chunk(SUMS), strict=True)
        first_NC, *other_NC = (int_NC.float() * x_C for int_NC, x_C in columns)
        y_N = sum(other_NC, first_NC).sum(dim=1) * self.scale_N.float()
        return y_N.to(x_MD.dtype)[None]


speed.OPAQUE.define("to_float(Tensor x_D) -> Tensor")
speed.OPAQUE.impl("to_float", Tensor.float, "CompositeExplicitAutograd")


@torch.library.register_fake("opaque::to_float")
def _(x_D: Tensor) -> Tensor:
    return torch.empty_like(x_D, dtype=torch.float32)


class StepLinear(Changed):
    """A Linear whose product of one token is written by the compiler."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != self.in_features or not torch.compiler.is_compiling():
            return super().forward(x)
        return written_product(x, self.weight, self.bias)


class StepEmbedding(Changed):
    """An Embedding whose weight, where it is the output matrix, is multiplied in the same way."""

    @property
    def weight(self) -> "StepWeight":
        return StepWeight(self._parameters["weight"])

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self._parameters["weight"])


class StepWeight(speed.LinearOnly):
    """What the model's F.linear(x, embed.weight) meets."""

    what = "a compiled step's output matrix"

    def __init__(self, weight_VD: Tensor) -> None:
        self.weight_VD = weight_VD
        self.dtype, self.device, self.shape = weight_VD.dtype, weight_VD.device, weight_VD.shape

    def multiply(self, x: Tensor) -> Tensor:
        if x.numel() != self.shape[1] or not torch.compiler.is_compiling():
            return F.linear(x, self.weight_VD)
        return written_product(x, self.weight_VD)


def written_product(x: Tensor, w_ND: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of one row, from operations that a compiler joins: floats are summed, rounded once.

    In memory order, without a product that is stored: the compiler makes one loop a row of it.
    """
    x_D = torch.ops.opaque.to_float(x.reshape(-1))
    y_N = (w_ND.float() * x_D).sum(dim=1).to(x.dtype)
    y_N = y_N if bias is None else y_N + bias
    return y_N.view(*x.shape[:-1], -1)


class StepCache:
    """What the compiled step meets in a LayerCache's place: memory that is there already.

    slot_1 says where the new token goes; of each buffer only the S rows are given that the token
    may see.
    """

    def __init__(self, pos_11: Tensor, slot_1: Tensor, buffers: list[Tensor]) -> None:
        self.pos_11, self.slot_1, self.buffers = pos_11, slot_1, buffers

    def positions(self, tokens_11: Tensor) -> Tensor:
        return self.pos_11

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        for buffer, t in zip(self.buffers, new, strict=True):
            buffer.index_copy_(0, self.slot_1, t[0])
        return tuple(buffer[None] for buffer in self.buffers)

    def needs_mask(self, n_new: int) -> bool:
        return False


def next_places(layers: list) -> list[tuple[Tensor, list[Tensor]]]:
    """Makes room for one more token: where it goes (1,), and of each buffer what it may see.

    The family's own cache is asked, by a copy of it that holds one number a token; layers that are
    alike but for what they hold are asked once.
    """
    answers: dict[tuple, tuple[Tensor, int]] = {}
    places = []
    for layer in layers:
        layer.n_seen += 1
        layer.grow(layer.buffers)
        settings = (value for name, value in vars(layer).items() if name != "buffers")
        key = (type(layer), layer.buffers[0].shape[1], *settings)
        if key not in answers:
            trial = copy.copy(layer)
            trial.n_seen -= 1
            trial.buffers = (torch.zeros(1, layer.buffers[0].shape[1], dtype=torch.bool),)
            (seen_1S,) = trial.append(torch.ones(1, 1, dtype=torch.bool))
            answers[key] = seen_1S[0].nonzero()[:, 0], seen_1S.shape[1]
        slot_1, n_visible = answers[key]
        places.append((slot_1, [buffer[0, :n_visible] for buffer in layer.buffers]))
    return places


def compiled_steps(
    model: nn.Module, backend: str = "inductor", own_products: bool | None = None
) -> nn.Module:
    """The model itself, one token's forward compiled into one function when it is first needed.

    own_products: the compiler writes the products of bfloat16 matrices as well; else it calls
    torch's. By default it does where torch.mv is slow (speed.mv_is_faster). A compiled model must
    not be changed, but by plain_decode, which undoes this.

    Raises ValueError for a model with experts, since Python chooses them, and for a cache that is
    joined anew for each token (gpt2.py).
    """
    if not hasattr(model.new_cache()[0], "grow"):
        raise ValueError("a model whose cache is joined anew for each token cannot be compiled")
    if any(hasattr(module, "experts") for module in model.modules()):
        raise ValueError("a model with experts cannot be compiled: Python chooses them")
    forward = type(model).forward

    def step(
        model: nn.Module,
        tokens_11: Tensor,
        pos_11: Tensor,
        places: list[tuple[Tensor, list[Tensor]]],
    ) -> Tensor:
        """The model's own forward of one token, (1, 1, V), in memory that is there already."""
        return forward(model, tokens_11, [StepCache(pos_11, *place) for place in places], True)

    # torch counts compilations by code object, and stops at eight: each model has one of its own.
    step.__code__ = step.__code__.replace()
    # A product and an addition may be one instruction: that rounds less, not more.
    options = {"cpp.enable_floating_point_contract_flag": "fast"} if backend == "inductor" else {}
    # torch would look at each module before each token, whether it is still the same.
    if hasattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe"):
        options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    compiled = torch.compile(step, fullgraph=True, backend=backend, options=options or None)
    if own_products is None:
        own_products = not speed.mv_is_faster()
    heads = [module.inner for module in model.modules() if isinstance(module, TwoStepHead)]
    for module in model.modules():
        weight = None if module in heads else module._parameters.get("weight")
        if own_products and weight is not None and weight.dtype == torch.bfloat16:
            if isinstance(module, nn.Linear):
                change(module, StepLinear)
            elif isinstance(module, nn.Embedding):
                change(module, StepEmbedding)
        if isinstance(module, speed.Int8Matrix):
            change(module, StepInt8)
        if isinstance(module, speed.Int4Matrix):  # asked once, not by the compiled function
            change(module, Changed, block=module.block)
    change(model, CompiledStep, step=staticmethod(compiled))
    return model
