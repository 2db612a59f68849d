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
    V  vocabulary     D  width of the residual stream  K  width of one head, U of its values
    M  words that can win            C  some of the columns, 32      1  an axis of length one
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
N_TRIED = 64  # tokens that show in which columns the states are large
FEW = 0.25  # of the words: where more than these can win, the full product is as fast


class Changed:
    """Stands before a model's own class; `plain` is that class."""

    plain: type


def change(module: nn.Module, base: type, **members: object) -> None:
    """Puts `base` and the members before the module's own class."""
    plain = type(module)
    # family_of finds the family by the class's module.
    members = {"plain": plain, "__module__": plain.__module__, **members}
    bases = (plain,) if issubclass(plain, base) else (base, plain)
    module.__class__ = type(f"{base.__name__}{plain.__name__}", bases, members)


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
        if not isinstance(module, Changed):
            change_attend(module, grouped)
    return model


def change_attend(module: nn.Module, make: Callable[[Callable], Callable]) -> None:
    """Puts make(attend) in the place of attend where the module's forward has that name."""
    forward = type(module).forward
    code = getattr(forward, "__code__", None)
    if code and "attend" in code.co_names:
        attend = make(forward.__globals__["attend"])
        change(module, Changed, forward=with_names(forward, attend=attend))


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
    Schwarz). A word that could not win even so much higher is out. The others, some dozens or
    hundreds, are multiplied exactly. Rounding of the results to bfloat16 widens the bound.

    Much of |x| lies in a few columns, the same ones for every token. Of 32 of them, wide_C, the
    copy keeps its own error too, in 4 bits: a last group of columns, which x meets once more. So
    that part of x meets a small error, and the bound is that of the other part, nearly.

    Takes the place of an embedding that is the output matrix too, or of a Linear; `inner` is that.
    """

    def __init__(self, inner: nn.Embedding | nn.Linear, wide_C: Tensor) -> None:
        super().__init__()
        self.kind = type(inner.weight)  # speed.VectorWeight, say; here a plain one will do
        inner.weight = nn.Parameter(inner.weight.detach(), inner.weight.requires_grad)
        self.inner = inner
        pairs, step_zero_GV2, error_2V = rough_copy(inner.weight.detach(), wide_C)
        self.register_buffer("wide_C", wide_C)
        self.register_buffer("pairs", pairs)
        self.register_buffer("step_zero_GV2", step_zero_GV2)
        self.register_buffer("error_2V", error_2V)

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
            x.reshape(-1), w_VD, self.wide_C, self.pairs, self.step_zero_GV2, self.error_2V
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


def rough_copy(w_VD: Tensor, wide_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix in 4 bits, as torch's product takes it: pairs, and a step and a zero a group.

    Behind its columns stand the errors of the columns wide_C. Also each row's distance from the
    matrix, (2, V), at most: in the columns wide_C, and in the others.
    """
    ints, steps, errors = [], [], []
    for w_ND in w_VD.split(speed.PART):
        w_ND = w_ND.float()
        int_ND, step_zero_NG2, rough_ND = plainly_rounded(w_ND, w_VD.dtype)
        error_ND = w_ND - rough_ND
        int_NC, step_zero_N12, rough_NC = plainly_rounded(error_ND[:, wide_C], w_VD.dtype)
        error_NC = error_ND[:, wide_C] - rough_NC
        error_ND[:, wide_C] = 0
        # Some processors round a rough weight to bfloat16 before they multiply.
        rounding_N = 2**-9 * (rough_ND.norm(dim=1) + rough_NC.norm(dim=1))
        errors.append(torch.stack((error_NC.norm(dim=1), error_ND.norm(dim=1))) + rounding_N)
        ints.append(torch.cat((int_ND, int_NC), dim=1))
        steps.append(torch.cat((step_zero_NG2, step_zero_N12), dim=1))
    pairs = torch._convert_weight_to_int4pack_for_cpu(torch.cat(ints).int(), 1)
    return pairs, torch.cat(steps).transpose(0, 1).contiguous(), torch.cat(errors, dim=1)


def plainly_rounded(w_ND: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Integers 0 to 15 (N, D), step and zero (N, G, 2) in that dtype, and what they stand for.

    From the smallest to the largest of each group: what matters here is the bound.
    """
    w_NGC = w_ND.unflatten(1, (-1, SCAN_GROUP))
    low_NG1, high_NG1 = w_NGC.amin(dim=2, keepdim=True), w_NGC.amax(dim=2, keepdim=True)
    step_NG1 = ((high_NG1 - low_NG1) / 15).clamp(min=1e-8).to(dtype).float()
    zero_NG1 = (low_NG1 + 8 * step_NG1).to(dtype).float()
    int_NGC = ((w_NGC - zero_NG1) / step_NG1 + 8).round().clamp(0, 15)
    rough_NGC = (int_NGC - 8) * step_NG1 + zero_NG1
    step_zero_NG2 = torch.cat((step_NG1, zero_NG1), dim=2).to(dtype)
    return int_NGC.flatten(1).to(torch.uint8), step_zero_NG2, rough_NGC.flatten(1)


def two_step(
    x_D: Tensor,
    w_VD: Tensor,
    wide_C: Tensor,
    pairs: Tensor,
    step_zero_GV2: Tensor,
    error_2V: Tensor,
) -> Tensor:
    """Logits (V,): exact for every word that can be the likeliest, rough for the others."""
    x_C = x_D[wide_C]
    both_1E = torch.cat((x_D, x_C))[None]
    rough_1V = torch._weight_int4pack_mm_for_cpu(both_1E, pairs, SCAN_GROUP, step_zero_GV2)
    narrow_D = x_D.float().index_fill(0, wide_C, 0.0)
    wide, narrow = 1.001 * x_C.float().norm().item(), 1.001 * narrow_D.norm().item()
    rough_V, off_V = rough_1V[0].float(), (wide * error_2V[0]).add_(error_2V[1], alpha=narrow)
    # Both products are rounded to bfloat16, so each may be off by 2**-9 of the largest there is.
    lowest, highest = rough_V.aminmax()
    slack = 2**-7 * (torch.maximum(highest, -lowest) + off_V.amax())
    # Who cannot reach what another surely has is out; then, who cannot reach a good guess.
    open_M = (rough_V + off_V >= (rough_V - off_V).amax() - slack).nonzero()[:, 0]
    rough_M = rough_V[open_M]
    best = torch.mv(w_VD[open_M[rough_M.argmax()]][None], x_D).float()
    open_M = open_M[rough_M + off_V[open_M] >= best - slack]
    if len(open_M) > FEW * len(w_VD):
        return torch.mv(w_VD, x_D) if speed.mv_is_faster() else F.linear(x_D[None], w_VD)[0]
    logit_V = rough_1V[0]
    logit_V[open_M] = torch.mv(w_VD[open_M], x_D)
    return logit_V


speed.OPAQUE.define(  # to a compiler one operation
    "two_step(Tensor x_D, Tensor w_VD, Tensor wide_C, Tensor pairs, Tensor step_zero_GV2,"
    " Tensor error_2V) -> Tensor"
)
speed.OPAQUE.impl("two_step", two_step, "CPU")


@torch.library.register_fake("opaque::two_step")
def _(x_D: Tensor, w_VD: Tensor, *rest: Tensor) -> Tensor:
    return x_D.new_empty(w_VD.shape[0])


@torch.no_grad()
def wide_columns(model: nn.Module, n: int = SCAN_GROUP) -> Tensor:
    """Where the states that meet the output matrix are largest, (n,): tried with some tokens."""
    seen: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda module, inputs, state: seen.append(state))
    try:
        model(torch.linspace(0, model.cfg.vocab_size - 1, N_TRIED)[None].long(), last_only=True)
    finally:
        hook.remove()
    return seen[0].flatten(0, 1).float().square().mean(dim=0).topk(n).indices.sort().values


def two_step_head(model: nn.Module) -> nn.Module:
    """The model itself, with a TwoStepHead. For temperature 0: only the largest logit is exact.

    The rough copy takes about a third of the matrix's memory more. Raises ValueError for weights
    that are not bfloat16 on a CPU, or of a width that groups of 32 do not divide.
    """
    name = "head" if hasattr(model, "head") else "embed"
    inner = getattr(model, name)
    weight = getattr(inner, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype != torch.bfloat16 or weight.is_cuda:
        raise ValueError("a head in two steps needs weights in bfloat16 (--dtype), on a CPU")
    if weight.shape[1] % SCAN_GROUP or weight.shape[0] % 16:
        raise ValueError(f"the output matrix is {tuple(weight.shape)}: 4 bits cannot group it")
    setattr(model, name, TwoStepHead(inner, wide_columns(model)))
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
    """An Int8Matrix whose product of one token is written by the compiler."""

    def multiply(self, x_MD: Tensor) -> Tensor:
        if len(x_MD) != 1 or not torch.compiler.is_compiling():
            return super().multiply(x_MD)
        y_N = (self.int_ND.float() * stored_floats(x_MD[0])).sum(dim=1)
        return (y_N * self.scale_N.float()).to(x_MD.dtype)[None]


def stored_floats(x: Tensor) -> Tensor:
    """The numbers in float32, and in memory: else each row of a matrix would convert them anew.

    The compiler puts an operation into the loop that needs its result, but never as_strided.
    """
    x = x.float().contiguous()
    return x.as_strided(x.shape, x.stride())


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
    x_D = stored_floats(x.reshape(-1))
    y_N = (w_ND.float() * x_D).sum(dim=1).to(x.dtype)
    y_N = y_N if bias is None else y_N + bias
    return y_N.view(*x.shape[:-1], -1)


def written(attend: Callable) -> Callable:
    """An attend, but for one token in a compiled step: loops that the compiler writes.

    Scores and weights stay floats, and the result is rounded once. torch's kernel is made for many
    queries; with one, and few heads, it does not keep two threads busy.
    """

    def attend_written(
        q_BTHK: Tensor, k_BSJK: Tensor, v_BSJU: Tensor, mask_BTS: Tensor | None, scale: float
    ) -> Tensor:
        alone = q_BTHK.shape[:2] == (1, 1) and mask_BTS is None
        if not alone or not torch.compiler.is_compiling():
            return attend(q_BTHK, k_BSJK, v_BSJU, mask_BTS, scale)
        q_JGK = scale * torch.ops.opaque.to_float(q_BTHK[0, 0].unflatten(0, (k_BSJK.shape[2], -1)))
        k_J1SK = k_BSJK[0].transpose(0, 1).float()[:, None]
        v_J1SU = v_BSJU[0].transpose(0, 1).float()[:, None]
        score_JGS = (q_JGK[:, :, None] * k_J1SK).sum(dim=-1)
        weight_JGS = (score_JGS - score_JGS.amax(dim=-1, keepdim=True)).exp()
        y_JGU = (weight_JGS[..., None] * v_J1SU).sum(dim=2) / weight_JGS.sum(dim=-1, keepdim=True)
        return y_JGU.to(v_BSJU.dtype).flatten(0, 1)[None, None]

    return attend_written


# A call to torch ends a function of the compiler's. With one in each layer the layers' functions
# are alike, and so compiled once; without it there would be one function, as long as the model.
speed.OPAQUE.define("to_float(Tensor x) -> Tensor")
speed.OPAQUE.impl("to_float", lambda x: x.to(torch.float32, copy=True), "CompositeExplicitAutograd")


@torch.library.register_fake("opaque::to_float")
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


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


def step_products(model: nn.Module, own_products: bool) -> nn.Module:
    """The model itself, its products and attention of one token as a compiled step wants them."""
    heads = [module.inner for module in model.modules() if isinstance(module, TwoStepHead)]
    for module in model.modules():
        if own_products:
            change_attend(module, written)
        weight = None if module in heads else module._parameters.get("weight")
        if own_products and weight is not None and weight.dtype in (torch.bfloat16, torch.float32):
            if isinstance(module, nn.Linear):
                change(module, StepLinear)
            elif isinstance(module, nn.Embedding):
                change(module, StepEmbedding)
        if isinstance(module, speed.Int8Matrix):
            change(module, StepInt8)
        if isinstance(module, speed.Int4Matrix):  # asked once, not by the compiled function
            change(module, Changed, block=module.block)
    return model


def one_function(function: Callable, backend: str = "inductor") -> Callable:
    """The function compiled, whole, when it is first called; it asks little before each call."""
    from torch._inductor import list_options  # a second to import

    # torch counts compilations by code object, and stops at eight: each function has its own.
    function.__code__ = function.__code__.replace()
    options: dict[str, object] = {}
    if backend == "inductor":
        # A product and an addition may be one instruction: that rounds less, not more.
        options["cpp.enable_floating_point_contract_flag"] = "fast"
        # torch would ask for each tensor's shape and place before each use.
        checks = ("size_asserts", "alignment_asserts", "scalar_asserts")
        options |= {check: False for check in checks if check in list_options()}
    # torch would look at each module before each token, whether it is still the same.
    if hasattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe"):
        options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    return torch.compile(function, fullgraph=True, backend=backend, options=options or None)


def compiled_steps(
    model: nn.Module, backend: str = "inductor", own_products: bool | None = None
) -> nn.Module:
    """The model itself, one token's forward compiled into one function when it is first needed.

    own_products: the compiler writes the products of matrices of floats and attention as well; else
    it calls torch's. By default it does where torch.mv is slow (speed.mv_is_faster). A compiled
    model must not be changed, but by plain_decode, which undoes this.

    Raises ValueError for experts of 4 bits (experts.py), and for a cache that is joined anew for
    each token (gpt2.py).
    """
    if not hasattr(model.new_cache()[0], "grow"):
        raise ValueError("a model whose cache is joined anew for each token cannot be compiled")
    if any(hasattr(module, "experts") for module in model.modules()):
        from ch08_full_models.experts import step_experts  # which imports this file

        step_experts(model)
    forward = type(model).forward

    def step(
        model: nn.Module,
        tokens_11: Tensor,
        pos_11: Tensor,
        places: list[tuple[Tensor, list[Tensor]]],
    ) -> Tensor:
        """The model's own forward of one token, (1, 1, V), in memory that is there already."""
        return forward(model, tokens_11, [StepCache(pos_11, *place) for place in places], True)

    compiled = one_function(step, backend)
    step_products(model, not speed.mv_is_faster() if own_products is None else own_products)
    change(model, CompiledStep, step=staticmethod(compiled))
    return model
