"""What chapter 1's training loop needs beyond one process; with one, every function does nothing.

    torchrun --standalone --nproc-per-node 2 -m ch01_gpt2.train --out runs/book
    torchrun --standalone --nproc-per-node 2 -m ch01_gpt2.train --out runs/fsdp --fsdp

All processes draw the same batch, and each computes its rows of it. A batch is as large, and the
losses are the same but for rounding, whatever their number. PyTorch does the rest:
DistributedDataParallel keeps the whole model in each process and averages the gradients; FSDP2
(Zhao et al. 2023) gives each a part of every parameter, gradient and moment, and puts a layer
together while it is used. On GPUs, one a process, messages go by NCCL, elsewhere by Gloo.

A checkpoint is the file that one process writes, so a run goes on with any number of processes.
torch.distributed.checkpoint could let each of them write its part, but its folders are described
by a pickle, and no pickle is ever loaded here. So its state-dict functions gather the parts on
process 0, tensor by tensor, whose memory must hold them all. To load, every process reads the file,
which on several machines lies in a folder that all of them see.

Limits: random numbers within a model, such as dropout's, are the same in every process. A loss that
is not a mean over sequences, like one that balances experts, is refused. With FSDP an expert that
no token has chosen gets zeros for its gradient, and AdamW moves it; without, it stays.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

IGNORED = -100  # as a target: torch's cross-entropy leaves it out


def n_processes() -> int:
    """How many processes train together: 1 unless torchrun has started more."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process() -> int:
    """This process's number, from 0 on. Number 0 prints and writes the files."""
    return dist.get_rank() if n_processes() > 1 else 0


def n_restarts() -> int:
    """How often torchrun has started the processes again because one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def processes() -> Iterator[None]:
    """Within it, the processes that torchrun has started know each other.

    Only process 0 prints. An error that all of them meet is raised in one; the others end silently,
    with the same exit code.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield
        return
    store, rank, size = next(dist.rendezvous("env://"))
    # torchrun's store outlives the processes, and would give new ones the addresses of the old.
    store = dist.PrefixStore(f"attempt {n_restarts()}", store)
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere) if rank else nullcontext(),
        ):
            yield
    except (OSError, ValueError, FloatingPointError, KeyboardInterrupt) as error:
        if store.add(f"{type(error).__name__}: {error}", 1) > 1:
            time.sleep(1)  # torchrun ends all as soon as one has ended, and the first has to speak
            sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
        raise
    dist.destroy_process_group()


# The model


def spread(model: nn.Module, device: torch.device, fsdp: bool) -> nn.Module:
    """The model on its device, and shared by the processes: wrapped or, with fsdp, cut in place.

    fsdp needs the layers in `model.blocks`. Raises ValueError for fsdp in a single process, and for
    more processes than GPUs.
    """
    if n_processes() == 1:
        if fsdp:
            raise ValueError("fsdp: one process, expected several, as torchrun starts them")
        return model.to(device)
    device, n_sparse = own_device(device), sum(hasattr(m, "experts") for m in model.modules())
    if not fsdp:
        # An expert without tokens has no gradient to wait for. To look for such parameters is slow.
        return DistributedDataParallel(model.to(device), find_unused_parameters=n_sparse > 0)
    from torch.distributed.device_mesh import init_device_mesh  # these take two seconds
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (n_processes(),))
    # The last one takes what the layers leave: the embeddings, of which one is the output matrix.
    # By default it would stay whole after an evaluation, and tensors_of would find it so.
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    if n_sparse:
        model.set_reduce_scatter_unused_params(True)
    return model.to(device)


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process, or the CPU: of Apple's GPUs there is one, and no messages to it."""
    if device.type != "cuda":
        return torch.device("cpu")
    number, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= n_gpus:
        raise ValueError(f"nproc-per-node: more than {n_gpus}, expected a GPU for each process")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def plain(model: nn.Module) -> nn.Module:
    """The model without what spread wrapped it in."""
    return model.module if isinstance(model, DistributedDataParallel) else model


# The numbers


def check(batch_size: int, extra_loss: object) -> None:
    """Raises ValueError for what cannot be computed in equal parts."""
    n = n_processes()
    if batch_size % n:
        raise ValueError(f"batch_size: {batch_size}, expected a multiple of {n}, the processes")
    if n > 1 and extra_loss is not None:
        raise ValueError(f"extra_loss: not the mean over {n} processes, expected none")


def own_rows(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """This process's rows of inputs and targets that all of them have.

    Where there are too few, one row whose targets do not count: FSDP needs every process's call.
    """
    if n_processes() == 1:
        return batch
    inputs_BT, targets_BT = batch
    if process() >= len(inputs_BT):
        return inputs_BT[:1], torch.full_like(targets_BT[:1], IGNORED)
    return tuple(tensor.tensor_split(n_processes())[process()] for tensor in batch)


def total(tensor: Tensor) -> Tensor:
    """The sum over the processes, in place."""
    if n_processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def average(tensor: Tensor) -> None:
    """Makes the tensor the mean over the processes."""
    if n_processes() > 1 and tensor.numel():  # none, where a signal came before the first step
        total(tensor).div_(n_processes())


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process has a part, or of which the norm was taken part by part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_of(saved: Tensor, tensor: Tensor) -> Tensor:
    """This process's part of a saved tensor, cut as `tensor` is; all of it where that is whole."""
    if not hasattr(tensor, "full_tensor"):
        return saved
    from torch.distributed.tensor import distribute_tensor

    saved = saved.to(tensor.device)
    return distribute_tensor(saved, tensor.device_mesh, tensor.placements, src_data_rank=None)


def gathered(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What fsdp has cut, whole and by its name in a checkpoint, on process 0; elsewhere nothing."""
    if not any(hasattr(param, "full_tensor") for param in model.parameters()):
        return {}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, adam = get_state_dict(model, optimizer, options=options)
    tensors = {f"model.{name}": weight for name, weight in weights.items()}
    for name, moments in adam.get("state", {}).items():
        tensors |= {f"{kind}.{name}": moment for kind, moment in moments.items()}
    return tensors


# The end


def stop_signals() -> list[signal.Signals]:
    """What ends a run after its step: Ctrl-C, and what torchrun sends to end its processes."""
    return [signal.SIGINT] if n_processes() == 1 else [signal.SIGINT, signal.SIGTERM]


def any_set(event: threading.Event) -> bool:
    """Whether the event of any process is set. All of them have to ask, and wait for each other."""
    if n_processes() == 1:
        return event.is_set()
    flag = torch.tensor(event.is_set(), dtype=torch.int32)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
