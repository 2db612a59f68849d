"""Chapter 8: one token's step as a CUDA graph. The model files stay as they are.

    fixed_steps(model, room)                 caches for `room` tokens; one token's step is replayed
    fixed_steps(model, room, "inductor")     its layers compiled first, so that it has fewer parts
    plain_steps(model)                       undoes both

A step of decoding is many small operations, and on a GPU most take less time than Python needs to
ask for them. A CUDA graph records the asking once; from then on one call replays it all, on the
same addresses, with the same shapes. So a step must have fixed ones:

    cache       made once for `room` tokens (a layer with a window: for the window). A step writes
                the new token at a place that a tensor holds, and looks at all of it. Places not
                filled yet have a position so late that the causal mask hides them.
    attention   grouped, on keys that lie head after head in memory: none is copied or repeated.
    experts     all in two products, which know from a tensor what is whose, not from a list.
    rotations   frequencies are computed once and stay on the GPU.

A prompt, or any call with more tokens than one, runs as before and fills the same cache.

Written for a GPU. The tests run it on a CPU only, where a step is run instead of replayed, and
record and replay it by other means; no measurement is committed. `python -m
ch08_full_models.benchmark_gpu` is the measurement, for whoever has a GPU.

Letters as in the models' files; X is gate and up together: 2 F.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ch08_full_models import llama4
from ch08_full_models.decode import plain_decode
from ch08_full_models.experts import plain_experts

UNFILLED = 1 << 30  # the position of a place without a token: later than any query's


class FixedLayer:
    """What makes a family's LayerCache one of fixed size. It stands before it among the bases."""

    in_step = False  # True during a step; else it is a LayerCache that has all its memory

    def __init__(self, window: int | None, n_pad_B: Tensor | None, room: int, place_1: Tensor):
        super().__init__(window, n_pad_B)
        self.room = room
        self.place_1 = place_1  # of the step's token, counted from 0; all layers share it

    def positions(self, tokens_BT: Tensor) -> Tensor:
        """Positions (B, T) of tokens that come next; in a step, T = 1, from the tensor."""
        if not self.in_step:
            return super().positions(tokens_BT)
        n_pad = 0 if self.n_pad_B is None else self.n_pad_B[:, None]
        return (self.place_1 - n_pad).expand(tokens_BT.shape)

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Stores the new tokens; in a step, returns the whole buffers.

        Then n_seen is left to the caller: in a graph no Python runs.
        """
        if not self.in_step:
            return super().append(*new)
        slot_1 = self.place_1
        if self.window is not None:
            slot_1 = slot_1 % self.buffers[0].shape[1]
        for buffer, t in zip(self.buffers, new, strict=True):
            buffer.index_copy_(1, slot_1, t)
        return self.buffers

    def grow(self, new: tuple[Tensor, ...]) -> None:
        """Makes room, once and for all."""
        if not self.buffers:
            size = min(self.room, self.window or self.room)
            self.buffers = tuple(empty_buffer(t, size) for t in new)

    def needs_mask(self, n_new: int) -> bool:
        """In a step always: the token must not see what is not filled."""
        return self.in_step or super().needs_mask(n_new)


def empty_buffer(t: Tensor, size: int) -> Tensor:
    """A place for `size` tokens like those of t (B, T, ...), one head after the other in memory.

    Zeros, since what is hidden still enters a product, with weight 0, and 0 times NaN is NaN.
    """
    if not t.is_floating_point():
        return t.new_full((t.shape[0], size), UNFILLED)
    return t.new_zeros((t.shape[0], *t.shape[2:-1], size, t.shape[-1])).movedim(-2, 1)


class FixedCache(list):
    """The caches of all layers, and what they share. It belongs to one text at a time."""

    def __init__(self, layers: Iterator, room: int, place_1: Tensor) -> None:
        super().__init__(layers)
        self.room, self.place_1 = room, place_1
        self.tokens_B1: Tensor | None = None  # the step's input
        self.replay: Callable[[], Tensor] | None = None  # one step; its logits (B, 1, V)

    def rewind(self) -> None:
        """Forgets the text. Memory and graph stay, for the next one of as many sequences.

        What the old text leaves behind is hidden until it is overwritten: its positions are later.
        """
        for layer in self:
            layer.n_seen = 0


class FixedModel:
    """What makes a family's Transformer one with fixed steps. It stands before it among the bases.

    Its attributes room and parts are set by fixed_steps.
    """

    def new_cache(self, n_pad_B: Tensor | None = None) -> FixedCache:
        """An empty cache of fixed size. n_pad_B (B,) counts each sequence's left padding."""
        family = sys.modules[type(self).__module__]
        kind = type("FixedLayer", (FixedLayer, family.LayerCache), {})
        place_1 = torch.zeros(1, dtype=torch.int64, device=self.embed.weight.device)
        layers = super().new_cache(n_pad_B)
        fixed = (kind(layer.window, n_pad_B, self.room, place_1) for layer in layers)
        return FixedCache(fixed, self.room, place_1)

    def forward(
        self, tokens_BT: Tensor, cache: list | None = None, last_only: bool = False
    ) -> Tensor:
        """As the family's. Raises ValueError for more tokens than a fixed cache has room for."""
        if not isinstance(cache, FixedCache):
            return super().forward(tokens_BT, cache or super().new_cache(), last_only)
        if (n := cache[0].n_seen + tokens_BT.shape[1]) > cache.room:
            raise ValueError(f"{n} tokens: the cache has room for {cache.room}")
        if tokens_BT.shape[1] > 1 or not cache[0].buffers:
            return super().forward(tokens_BT, cache, last_only)
        return self.next_step(tokens_BT, cache)

    @torch.no_grad()
    def next_step(self, tokens_B1: Tensor, cache: FixedCache) -> Tensor:
        """Logits (B, 1, V) after one token more."""
        if cache.replay is None:
            cache.tokens_B1 = tokens_B1.clone()
        cache.tokens_B1.copy_(tokens_B1)
        cache.place_1.fill_(cache[0].n_seen)
        if cache.replay is None:
            cache.replay = record(functools.partial(self.step, cache), tokens_B1.device)
        logits_B1V = cache.replay()
        for layer in cache[: self.cfg.n_layers]:  # not multi-token prediction's
            layer.n_seen += 1
        return logits_B1V

    def step(self, cache: FixedCache) -> Tensor:
        """What is recorded. It reads nothing but tensors; done twice, it does no harm."""
        with swapped(self.parts):
            return super().forward(cache.tokens_B1, cache, last_only=True)


def record(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """The step as a CUDA graph, which gives a copy of its logits; on a CPU the step itself."""
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # libraries choose kernels and get memory: not in a graph
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits_B1V = step()

    def replay() -> Tensor:
        graph.replay()
        return logits_B1V.clone()  # the next replay overwrites them

    return replay


# In place of the family's own parts, during a step


@contextmanager
def swapped(parts: list[tuple[object, str, object]]) -> Iterator[None]:
    """Within it, each (owner, name, value) is set; afterwards all is as before."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in parts]
    try:
        for owner, name, value in parts:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def attend_one_token(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJU: Tensor, mask_BTS: Tensor, scale: float
) -> Tensor:
    """The family's attend for T = 1, (B, T, H, U): the heads of a group as rows of one matrix.

    On a GPU, torch's fast kernels take a mask or grouped heads, not both (its documentation). Here
    products are rounded to the model's type, and the softmax is float32.
    """
    q_BJGK = q_BTHK[:, 0].unflatten(1, (k_BSJK.shape[2], -1))
    scores_BJGS = (q_BJGK @ k_BSJK.permute(0, 2, 3, 1)).float() * scale
    scores_BJGS = scores_BJGS.masked_fill(~mask_BTS[:, :, None], -math.inf)
    y_BJGU = scores_BJGS.softmax(dim=-1).type_as(v_BSJU) @ v_BSJU.transpose(1, 2)
    return y_BJGU.flatten(1, 2)[:, None]


def experts_at_once(moe: nn.Module, x_BTD: Tensor) -> Tensor:
    """MoE.forward without waiting for the GPU: where an expert's tokens end stays in a tensor."""
    gate_up_IXD, down_IDF = moe.stacks
    x_ND = x_BTD.flatten(0, 1)
    expert_NA, weight_NA = moe.route(x_ND)
    expert_M, order_M = expert_NA.flatten().sort(stable=True)
    token_M, weight_M1 = order_M // moe.n_active, weight_NA.flatten()[order_M, None]
    weighs_inputs = isinstance(moe, llama4.MoE)
    x_MD = x_ND[token_M] * weight_M1 if weighs_inputs else x_ND[token_M]
    gate_MF, up_MF = expert_products(x_MD, gate_up_IXD, expert_M).chunk(2, dim=-1)
    y_MD = expert_products(F.silu(gate_MF) * up_MF, down_IDF, expert_M)
    y_MD = y_MD if weighs_inputs else y_MD * weight_M1
    shared = getattr(moe, "shared", None)
    y_ND = torch.zeros_like(x_ND) if shared is None else shared(x_ND)
    return y_ND.index_add(0, token_M, y_MD.type_as(y_ND)).view_as(x_BTD)


def expert_products(x_MD: Tensor, w_IFD: Tensor, expert_M: Tensor) -> Tensor:
    """Each row times its expert's matrix, (M, F). The rows come in the order of their experts.

    torch has a product for this in bfloat16. (Where it has no kernel for the card, it reads the
    ends itself, waits for them, and cannot be recorded.) Other types copy the matrices first.
    """
    if x_MD.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return torch.einsum("MD,MFD->MF", x_MD, w_IFD[expert_M])
    all_I = torch.arange(len(w_IFD), device=x_MD.device)
    end_I = torch.searchsorted(expert_M, all_I, right=True).int()
    return F.grouped_mm(x_MD, w_IFD.mT, offs=end_I)


def stacked(linears: list[nn.Linear]) -> Tensor:
    """Their weights as one tensor, of which they become parts; nothing is copied if they are."""
    first = linears[0].weight
    places = [
        (linear.weight.untyped_storage().data_ptr(), linear.weight.storage_offset())
        for linear in linears
    ]
    start = first.storage_offset()
    wanted = [(places[0][0], start + i * first.numel()) for i in range(len(linears))]
    if places == wanted and first.is_contiguous():
        shape = (len(linears), *first.shape)
        return first.detach().as_strided(shape, (first.numel(), *first.stride()))
    stack = torch.stack([linear.weight.detach() for linear in linears])
    for linear, w in zip(linears, stack, strict=True):
        linear.weight.data = w
    return stack


def fixed_parts(
    family: ModuleType, device: torch.device, backend: str | None
) -> list[tuple[object, str, object]]:
    """What a step swaps."""

    @functools.cache
    def frequencies(*args: object) -> Tensor:
        return plain_frequencies(*args).to(device)

    plain_frequencies = family.rope_frequencies
    parts = [
        (FixedLayer, "in_step", True),
        (family, "attend", attend_one_token),
        (family, "rope_frequencies", frequencies),
    ]
    if hasattr(family, "MoE"):
        parts.append((family.MoE, "forward", experts_at_once))
    if backend is not None:
        # With it, products with one row become kernels of their own, which take in what is around.
        options = {"coordinate_descent_tuning": True} if backend == "inductor" else None
        compiled = torch.compile(
            family.Block.forward, backend=backend, dynamic=False, options=options
        )
        parts.append((family.Block, "forward", compiled))
    return parts


# The steps


def fixed_steps(model: nn.Module, room: int, backend: str | None = None) -> nn.Module:
    """The model itself, its new caches for `room` tokens, its steps of one token replayed.

    backend: torch.compile's, for the layers. Weights of experts move into one tensor a layer and
    stay there. What `load` has done for a CPU is undone (decode.py, experts.py). Raises ValueError
    for a model that has no such steps.
    """
    plain_experts(plain_decode(plain_steps(model)))
    family = sys.modules[type(model).__module__]
    if room < 1 or not hasattr(family, "rope_frequencies"):
        what = f"room is {room}" if room < 1 else f"{family.__name__} has no caches of fixed size"
        raise ValueError(f"fixed_steps: {what}")
    for moe in (module for module in model.modules() if hasattr(module, "experts")):
        if not isinstance(moe.experts[0].gate_proj, nn.Linear):
            raise ValueError("fixed_steps: the experts' matrices are packed, expected floats")
        pairs = [(expert.gate_proj, expert.up_proj) for expert in moe.experts]
        gates_ups = stacked([linear for pair in pairs for linear in pair])
        downs = stacked([expert.down_proj for expert in moe.experts])
        moe.stacks = gates_ups.unflatten(0, (-1, 2)).flatten(1, 2), downs
    model.room, model.parts = room, fixed_parts(family, model.embed.weight.device, backend)
    plain = type(model)
    model.__class__ = type(plain.__name__, (FixedModel, plain), {"__module__": plain.__module__})
    return model


def plain_steps(model: nn.Module) -> nn.Module:
    """Undoes fixed_steps. Caches made before go on, as ordinary ones that have their memory."""
    if isinstance(model, FixedModel):
        model.__class__ = type(model).__bases__[1]
        del model.room, model.parts
        for module in model.modules():
            if hasattr(module, "stacks"):
                del module.stacks
    return model
