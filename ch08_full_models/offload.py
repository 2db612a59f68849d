"""Chapter 8: models larger than memory. What does not fit stays on disk and is read when called.

    model, tokenizer = load("path/to/folder", memory=6 << 30)    # bytes that weights may take

Of a mixture of experts, a token needs a few experts a layer: the rest can wait on disk. All other
weights stay in memory, and what is left of it keeps the experts that were used last, about as many
of each layer: the least recently used of all would be those of the next layer, always. As soon as a
layer's router has chosen, all the experts it chose are being read, while the first ones work.

A dense model needs all of its weights for every token. As many layers as fit stay in memory; the
others are read again for each token, the next one while one works. This is as slow as it sounds:
a token takes as long as reading those layers from disk.

The model's code knows nothing of this. A part that waits on disk is an ordinary module whose
parameters have no memory ("meta") but for the time of a call.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import RLock

import torch
import torch.nn as nn
from torch import Tensor

READERS = 4  # threads that read


@dataclass(frozen=True)
class Place:
    """Where a parameter lies on disk."""

    read_to: Callable[[Tensor], None]
    like: Tensor  # of its shape and dtype, without memory

    def new(self, device: torch.device) -> Tensor:
        """Memory for it."""
        return torch.empty_like(self.like, device=device)


class Disk:
    """Parts of a model that wait on disk, and the ones in memory that were used last.

    budget: bytes that the parts in memory may take together. A part that is being called stays
    until the call ends. n_calls counts calls of parts, n_reads how often one was read for that, and
    n_bytes_read what it came to.
    """

    def __init__(self, budget: int, device: torch.device) -> None:
        self.budget, self.device = budget, device
        self.places: dict[nn.Module, dict[str, Place]] = {}
        self.group: dict[nn.Module, str] = {}
        self.held: OrderedDict[nn.Module, Future] = OrderedDict()  # least recently used first
        self.free: dict[tuple, list[Tensor]] = {}  # by shape and dtype, to be used again
        self.n_calls = self.n_reads = self.n_bytes_read = 0
        self.lock = RLock()
        self.readers = ThreadPoolExecutor(READERS, "read")

    def add(self, part: nn.Module, places: dict[str, Place], group: str) -> None:
        """Leaves a part on disk; places has each of its parameters by name.

        Groups share the budget evenly.
        """
        self.places[part], self.group[part] = places, group
        part.register_forward_pre_hook(self.fill)
        part.register_forward_hook(self.empty, always_call=True)  # after an error, too

    def size(self, part: nn.Module) -> int:
        """Bytes that a part takes in memory."""
        return sum(place.like.nbytes for place in self.places[part].values())

    def n_bytes(self) -> int:
        """Bytes of the parts that are in memory or on their way."""
        return sum(map(self.size, self.held))

    def read(self, part: nn.Module) -> dict[str, Tensor]:
        """A part's parameters by name, read now.

        Into memory that a part of the same shape gave up, where there is some: giving it back to
        the system and asking for it anew leaves holes, a gigabyte of them in all.
        """
        tensors = {}
        for name, place in self.places[part].items():
            with self.lock:
                free = self.free.get((place.like.shape, place.like.dtype))
                tensors[name] = free.pop() if free else place.new(self.device)
            place.read_to(tensors[name])
        return tensors

    def prefetch(self, parts: Iterable[nn.Module]) -> None:
        """Begins to read parts, in order, as far as the budget goes without giving up one of them.

        Those that are in memory count as used.
        """
        room, wanted = self.budget, []
        for part in parts:
            room -= self.size(part)
            if room < 0:
                break
            wanted.append(part)
        with self.lock:
            for part in wanted:
                self.want(part, wanted)

    def want(self, part: nn.Module, wanted: Sequence[nn.Module] = ()) -> Future:
        """The part, in memory or on its way. Others make room for it, but not those wanted, too."""
        with self.lock:
            if part in self.held and failed(self.held[part]):
                del self.held[part]  # tried again
            if part in self.held:
                self.held.move_to_end(part)
                return self.held[part]
            while self.held and self.n_bytes() + self.size(part) > self.budget:
                self.give_up(self.least_needed(part, wanted))
            self.n_reads += 1
            self.n_bytes_read += self.size(part)
            self.held[part] = self.readers.submit(self.read, part)
            return self.held[part]

    def give_up(self, part: nn.Module) -> None:
        """Forgets a part that is in memory."""
        future = self.held.pop(part)
        if future.done() and not failed(future):
            for tensor in future.result().values():
                self.free.setdefault((tensor.shape, tensor.dtype), []).append(tensor)

    def least_needed(self, part: nn.Module, wanted: Sequence[nn.Module]) -> nn.Module:
        """Of the group that holds most, the part that was used longest ago."""
        mine, others = self.group[part], [p for p in self.held if p not in wanted]
        held = Counter(map(self.group.get, others))
        largest = max(held, key=lambda group: (held[group], group == mine))
        return next(p for p in others if self.group[p] == largest)

    def fill(self, part: nn.Module, _: tuple) -> None:
        """Before a call: puts the part's parameters into it."""
        self.n_calls += 1
        for name, tensor in self.want(part).result().items():
            put(part, name, tensor)

    def empty(self, part: nn.Module, *_: object) -> None:
        """After a call: takes them out again. They are in memory for as long as they are held."""
        for name in self.places[part]:
            put(part, name, part.get_parameter(name).to("meta"))


def failed(future: Future) -> bool:
    return future.done() and future.exception() is not None


def put(part: nn.Module, name: str, tensor: Tensor) -> None:
    """Makes the tensor the part's parameter of that name."""
    *path, last = name.split(".")
    part.get_submodule(".".join(path)).register_parameter(last, nn.Parameter(tensor, False))


def choose(model: nn.Module, memory: int) -> tuple[list[nn.Module], int]:
    """The parts of a model without memory ("meta") that must wait on disk, and a budget for them.

    memory: bytes that all weights together may take. Raises ValueError if that is too little.
    """
    total = n_bytes(model)
    if total <= memory:
        return [], 0
    layers = [module for module in model.modules() if hasattr(module, "experts")]
    if layers:
        parts = [expert for layer in layers for expert in layer.experts]
        wanted = max(layer.n_active * n_bytes(layer.experts[0]) for layer in layers)
    else:
        parts = list(model.blocks)
        wanted = 2 * n_bytes(parts[0])  # one at work, one on its way
    rest = total - sum(map(n_bytes, parts))
    if memory < rest + wanted:
        raise ValueError(f"memory is {memory:,} bytes, expected {rest + wanted:,} or more")
    if not layers:  # reading in turns makes a cache useless: the first layers stay, the last do not
        n_kept = (memory - rest - wanted) // n_bytes(parts[0])
        return parts[n_kept:], wanted
    return parts, memory - rest


def n_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(param.nbytes for param in module.parameters())


def leave(
    model: nn.Module,
    parts: list[nn.Module],
    places: dict[str, Place],
    budget: int,
    device: torch.device,
) -> Disk:
    """Leaves these parts of a model on disk; places has each of their parameters by its full name.

    Returns what reads them from now on.
    """
    disk, waiting = Disk(budget, device), set(parts)
    for prefix, module in model.named_modules():
        if module in waiting:
            names = (name for name, _ in module.named_parameters())
            late = {name: places[f"{prefix}.{name}"] for name in names}
            disk.add(module, late, group=prefix.rpartition(".")[0])
    foresee(model, disk)
    return disk


def foresee(model: nn.Module, disk: Disk) -> None:
    """Has parts read before they are called."""
    for module in model.modules():
        if hasattr(module, "experts") and module.experts[0] in disk.places:
            module.route = partial(route_and_read, module.route, module.experts, disk)
    blocks = [block for block in model.blocks if block in disk.places]
    for block, after in zip(blocks, blocks[1:] + blocks[:1], strict=True):
        block.register_forward_pre_hook(lambda *_, after=after: disk.prefetch([after]))


def route_and_read(
    route: Callable[[Tensor], tuple[Tensor, Tensor]],
    experts: Sequence[nn.Module],
    disk: Disk,
    x_ND: Tensor,
) -> tuple[Tensor, Tensor]:
    """What the router says, (N, A) both; the experts it chose are being read."""
    expert_NA, weight_NA = route(x_ND)
    disk.prefetch(experts[i] for i in expert_NA.unique().tolist())
    return expert_NA, weight_NA
