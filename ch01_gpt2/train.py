"""One training loop for the models of every chapter: for whatever turns tokens into logits.

    result = train(model, train_tokens, val_tokens, TrainConfig(steps=300, lr=2e-3))
    plt.plot(result.losses)

AdamW, warm-up and cosine decay, clipped gradients: GPT-3's recipe (Brown et al. 2020, appendix B),
and a checkpoint from which a run goes on, on a CPU, with the same losses to the last bit.
Letters: B batch, T time, V vocabulary, N steps.

    python -m ch01_gpt2.train                                    a small GPT-2 on built-in text
    python -m ch01_gpt2.train --text book.txt --out runs/book    later the same with --resume

On several processes, with torchrun in place of python: distributed.py says how and with what.
"""

import argparse
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ch01_gpt2 import distributed
from ch01_gpt2.data import batch, decode, encode, in_order, load_text, split
from ch01_gpt2.gpt2 import Config, Transformer, generate

CHECKPOINT, RESULT = "checkpoint.safetensors", "result.json"  # the files in a run's folder


@dataclass(frozen=True)
class TrainConfig:
    """What decides the losses, together with the model and the text."""

    steps: int = 400
    batch_size: int = 8  # sequences
    seq_len: int = 64  # tokens a sequence
    lr: float = 2e-3  # at its highest
    lr_floor: float = 0.1  # where the decay ends, as a share of lr
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest norm of a step's gradient, over all parameters together
    eval_every: int = 50  # steps
    eval_tokens: int = 8192  # how much of the held-out text, from its start
    bf16: bool | None = None  # autocast to bfloat16; None: on CUDA
    seed: int = 0  # of the batches, and torch's

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "lr", "clip", "eval_every", "eval_tokens"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}: {value}, expected more than 0")


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves. Losses are in nats a token."""

    losses: list[float] = field(repr=False)  # of each step's batch, before the step
    grad_norms: list[float] = field(repr=False)  # before clipping
    val_steps: list[int]  # steps done at each evaluation, from 0 on
    val_losses: list[float]
    final_train_loss: float  # mean over the last tenth of the steps
    final_val_loss: float
    tokens_per_s: float  # in training; evaluations and checkpoints are not counted
    train_seconds: float
    n_parameters: int
    train_config: TrainConfig
    model_config: dict
    environment: dict[str, str | int | bool]

    def save(self, path: Path) -> None:
        """Writes all of it as JSON, whole or not at all."""
        save_json(path, asdict(self))


@dataclass
class Run:
    """All that the next step depends on, and what the steps so far have left."""

    model: nn.Module
    cfg: TrainConfig
    bf16: bool
    optimizer: torch.optim.AdamW
    generator: torch.Generator  # of the batches
    losses: Tensor  # (N,), on the model's device: a number read at each step would make it wait
    grad_norms: Tensor  # (N,)
    settings: dict[str, object]  # what a checkpoint must agree with
    extra_loss: Callable[[], Tensor] | None = None
    step: int = 0  # steps done
    val: list[tuple[int, float]] = field(default_factory=list)  # steps done, held-out loss
    seconds: float = 0.0  # spent in steps


def lr_at(step: int, cfg: TrainConfig) -> float:
    """The learning rate of a step, counted from 0: up in a line, then down half a cosine.

    The last step of the warm-up has all of cfg.lr, the last step of the run the floor.
    """
    done, n_warmup = step + 1, round(cfg.warmup * cfg.steps)
    if done <= n_warmup:
        return cfg.lr * done / n_warmup
    share = (done - n_warmup) / (cfg.steps - n_warmup)
    cosine = (1 + math.cos(math.pi * share)) / 2
    return cfg.lr * (cfg.lr_floor + (1 - cfg.lr_floor) * cosine)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The parameters in two groups: matrices decay; norms, biases and other vectors do not.

    Decay pulls towards zero, and a norm's weight belongs near one. Embeddings decay: the tokens'
    table is the output matrix, too, and each sequence uses each position, so every row has a
    gradient at every step. Rows that are seldom used would mostly shrink.
    """
    params = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW with its moments in place, as zeros, so that every checkpoint has the same tensors.

    torch makes them at a parameter's first gradient, and an expert without tokens has had none.
    """
    groups = decay_groups(model, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)
    for param in [param for group in groups for param in group["params"]]:
        optimizer.state[param] = {
            "step": torch.zeros((), device=param.device),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
        }
    return optimizer


def token_losses(
    model: nn.Module, inputs_BT: Tensor, targets_BT: Tensor, bf16: bool, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of the next tokens in nats: their mean or their sum, a scalar tensor."""
    device = next(model.parameters()).device
    if device.type == "cuda":  # a copy from pinned memory does not wait for the GPU's queue to end
        inputs_BT, targets_BT = inputs_BT.pin_memory(), targets_BT.pin_memory()
    with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
        logits_BTV = model(inputs_BT.to(device, non_blocking=True))
    targets_BT = targets_BT.to(device, non_blocking=True)
    logits_BTV = logits_BTV.float()  # bfloat16's eight bits lose the small terms of a long sum
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor, cfg: TrainConfig, bf16: bool = False) -> float:
    """Mean loss in nats a token on the text's first cfg.eval_tokens targets, every time the same.

    Raises ValueError for a text of less than two tokens.
    """
    tokens = tokens[: cfg.eval_tokens + 1]
    if len(tokens) < 2:
        raise ValueError(f"held-out text: {len(tokens)} tokens, expected 2 or more")
    was_training = model.training
    model.eval()
    batches = map(distributed.own_rows, in_order(tokens, cfg.batch_size, cfg.seq_len))
    sums = [
        token_losses(model, inputs_BT, targets_BT, bf16, "sum") for inputs_BT, targets_BT in batches
    ]
    model.train(was_training)
    return distributed.total(torch.stack(sums).sum()).item() / (len(tokens) - 1)


def train_step(run: Run, tokens: Tensor) -> None:
    """One batch forward and backward, one step of the optimizer. Nothing here waits for a GPU."""
    for group in run.optimizer.param_groups:
        group["lr"] = lr_at(run.step, run.cfg)
    whole_batch = batch(tokens, run.cfg.batch_size, run.cfg.seq_len, run.generator)
    inputs_BT, targets_BT = distributed.own_rows(whole_batch)
    loss = token_losses(run.model, inputs_BT, targets_BT, run.bf16)
    (loss if run.extra_loss is None else loss + run.extra_loss()).backward()
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.cfg.clip)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.losses[run.step], run.grad_norms[run.step] = loss.detach(), distributed.whole(grad_norm)
    run.step += 1


def score(run: Run, tokens: Tensor, log: bool) -> None:
    """Adds the held-out loss to the run's record, and prints a line if `log`."""
    before = run.val[-1][0] if run.val else 0
    loss = evaluate(run.model, tokens, run.cfg, run.bf16)
    run.val.append((run.step, loss))
    if log:
        line = f"step {run.step:6,}   held-out loss {loss:6.3f}"
        if run.step:
            line += f"   training loss {run.losses[before : run.step].mean().item():6.3f}"
        with tqdm.external_write_mode():  # without breaking the bar
            print(line, flush=True)


def train(
    model: nn.Module,
    train_tokens: Tensor,
    val_tokens: Tensor,
    cfg: TrainConfig,
    *,
    device: str | None = None,
    out: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
    log: bool = False,
    extra_loss: Callable[[], Tensor] | None = None,
    fsdp: bool = False,
) -> TrainResult:
    """Trains the model in place on a text's tokens, 1-D int64, and leaves it in eval mode.

    `device` None: the best one here. `out`: a folder for the result and for a checkpoint, which is
    saved at every evaluation and at Ctrl-C, before KeyboardInterrupt is raised; `resume` goes on
    from it. `progress` None: a bar on a terminal. `log`: prints a line an evaluation.
    `extra_loss`: called between a step's forward and backward, and added to its loss; the record
    has the loss without it. Within distributed.processes() each process computes its rows of the
    batches; `fsdp` cuts the model in parts for them, and leaves it so.

    Raises ValueError for a checkpoint that does not fit and for a text shorter than a sequence,
    FloatingPointError for a loss that is no number any more.
    """
    if resume and out is None:
        raise ValueError("resume: needs `out`, the folder with the checkpoint")
    distributed.check(cfg.batch_size, extra_loss)
    model = distributed.spread(model, pick_device(device), fsdp).train()
    run = start_run(model, train_tokens, cfg)
    run.extra_loss = extra_loss
    if resume:
        load_checkpoint(out / CHECKPOINT, run)
    else:
        score(run, val_tokens, log)
    if out:
        out.mkdir(parents=True, exist_ok=True)
    no_bar = None if progress is None else not progress  # None: where there is no terminal
    if distributed.process() > 0:
        no_bar = True
    with (
        tqdm(total=cfg.steps, initial=run.step, disable=no_bar) as bar,
        interrupts_between_steps() as interrupted,
    ):
        while run.step < cfg.steps:
            start, first = time.perf_counter(), run.step
            stop = min(run.step + cfg.eval_every - run.step % cfg.eval_every, cfg.steps)
            while run.step < stop and not distributed.any_set(interrupted):
                train_step(run, train_tokens)
                bar.update()
            distributed.average(run.losses[first : run.step])  # so far, of this process's rows
            total_loss = run.losses.sum().item()  # waits for the device
            run.seconds += time.perf_counter() - start
            if run.step == stop:
                score(run, val_tokens, log)
            if not math.isfinite(total_loss + run.val[-1][1]):
                raise FloatingPointError(
                    f"lr: {cfg.lr}, expected a lower one: by step {run.step} the loss is not finite"
                )
            if out:
                save_checkpoint(out / CHECKPOINT, run)
            if distributed.any_set(interrupted):
                raise KeyboardInterrupt
    model.eval()
    result = result_of(run)
    if out and distributed.process() == 0:
        result.save(out / RESULT)
    return result


def start_run(model: nn.Module, train_tokens: Tensor, cfg: TrainConfig) -> Run:
    """A run before its first step, with torch's seed set."""
    torch.manual_seed(cfg.seed)  # for models that draw numbers while they train
    device = next(model.parameters()).device
    settings = {f"train.{key}": value for key, value in asdict(cfg).items()}
    settings |= {f"model.{key}": value for key, value in model_config(model).items()}
    settings["text"] = f"{len(train_tokens)} tokens, CRC {zlib.crc32(train_tokens.numpy()):08x}"
    return Run(
        model=model,
        cfg=cfg,
        bf16=device.type == "cuda" if cfg.bf16 is None else cfg.bf16,
        optimizer=make_optimizer(model, cfg),
        generator=torch.Generator().manual_seed(cfg.seed),
        losses=torch.zeros(cfg.steps, device=device),
        grad_norms=torch.zeros(cfg.steps, device=device),
        settings=json.loads(json.dumps(settings, default=str)),  # as a checkpoint gives them back
    )


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name, or the best one here: cuda, mps, cpu. ValueError if it is not."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    names = [device for device in usable if usable[device]] + ["cpu"]
    if name is not None and name.split(":")[0] not in names:
        raise ValueError(f"device: {name!r}, expected {' or '.join(names)}")
    return torch.device(name or names[0])


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which takes the path's place in the end.

    After an error, or a crash at any point, the old file is still there and whole.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def tensors_of(run: Run) -> dict[str, Tensor]:
    """A checkpoint's tensors by name: the run's own, but for copies of the random states."""
    model = distributed.plain(run.model)
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    names = {weight: name for name, weight in weights.items()}
    tensors = {f"model.{name}": weight.detach() for name, weight in weights.items()}
    for param, moments in run.optimizer.state.items():
        tensors |= {f"{kind}.{names[param]}": moment for kind, moment in moments.items()}
    tensors |= {"losses": run.losses, "grad_norms": run.grad_norms}
    return tensors | {"rng.torch": torch.get_rng_state(), "rng.batch": run.generator.get_state()}


def save_checkpoint(path: Path, run: Run) -> None:
    """Writes the run to a safetensors file, whole or not at all."""
    header = {"settings": run.settings, "step": run.step, "val": run.val, "seconds": run.seconds}
    tensors = tensors_of(run) | distributed.gathered(run.model, run.optimizer)
    if distributed.process() > 0:
        return
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"run": json.dumps(header)})


@torch.no_grad()
def load_checkpoint(path: Path, run: Run) -> None:
    """Puts a checkpoint into the run, bit for bit.

    Raises ValueError, and changes nothing, for a file that is missing, damaged or no checkpoint,
    for other settings, and for a tensor that is missing, left over or of another shape or type.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["run"])
            theirs, step, val = header["settings"], header["step"], header["val"]
            saved = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{path}: not a checkpoint of this training loop") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: no checkpoint can be read: {error}") from None
    for key in sorted(theirs.keys() | run.settings.keys()):
        found, expected = theirs.get(key, "absent"), run.settings.get(key, "absent")
        if found != expected:
            raise ValueError(f"{path}: {key} is {found}, expected {expected} as in this run")
    tensors = tensors_of(run)
    for name in sorted(saved.keys() | tensors.keys()):
        found, expected = kind_of(saved.get(name)), kind_of(tensors.get(name))
        if found != expected:
            raise ValueError(f"{path}: {name} is {found}, expected {expected}")
    torch.set_rng_state(saved["rng.torch"])
    run.generator.set_state(saved["rng.batch"])
    for name, tensor in tensors.items():
        tensor.copy_(distributed.part_of(saved[name], tensor))
    run.step, run.val, run.seconds = step, val, header["seconds"]


def kind_of(tensor: Tensor | None) -> str:
    """Type and shape as a message says them, "torch.float32 (8, 4)"; "absent" for None."""
    return "absent" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"


@contextmanager
def interrupts_between_steps() -> Iterator[threading.Event]:
    """Ctrl-C sets the event and lets the step end, since half an update cannot be resumed.

    The second Ctrl-C acts at once. Outside the main thread, Python delivers none. Where torchrun
    has started several processes, SIGTERM, with which it ends them, is taken like Ctrl-C.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in distributed.stop_signals()}

    def on_interrupt(number: int, *_: object) -> None:
        event.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, on_interrupt)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def model_config(model: nn.Module) -> dict:
    """The fields of model.cfg, or none where a model has no such thing."""
    model = distributed.plain(model)
    return asdict(model.cfg) if hasattr(model, "cfg") else {}


def result_of(run: Run) -> TrainResult:
    """The record of a run that has taken all its steps."""
    losses = run.losses.tolist()
    last = losses[-math.ceil(len(losses) / 10) :]
    return TrainResult(
        losses=losses,
        grad_norms=run.grad_norms.tolist(),
        val_steps=[step for step, _ in run.val],
        val_losses=[loss for _, loss in run.val],
        final_train_loss=sum(last) / len(last),
        final_val_loss=run.val[-1][1],
        tokens_per_s=run.step * run.cfg.batch_size * run.cfg.seq_len / run.seconds,
        train_seconds=run.seconds,
        n_parameters=sum(param.numel() for param in run.model.parameters()),
        train_config=run.cfg,
        model_config=model_config(run.model),
        environment=environment(run.losses.device)
        | {"bf16": run.bf16, "text": run.settings["text"], "seed": run.cfg.seed}
        | {"processes": distributed.n_processes()},
    )


def save_json(path: Path, record: dict) -> None:
    """Writes a record as JSON, one key a line: whole or not at all. ValueError for NaN.

    Makes the folder if it is missing, since an experiment saves only after it has worked.
    """
    lines = [
        f"{json.dumps(key)}: {json.dumps(value, default=str, allow_nan=False)}"
        for key, value in record.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def result_path(script: str, smoke: bool) -> Path:
    """Where an experiment writes its record: beside the script.

    A smoke run, which only shows that the script works, never takes the record's place.
    """
    return Path(script).with_suffix(".smoke.json" if smoke else ".json")


def environment(device: torch.device) -> dict[str, str | int | bool]:
    """What a result depends on besides the code: the command, the versions and the machine."""
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "hardware": hardware_name(device),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }


def hardware_name(device: torch.device) -> str:
    """What the steps ran on, as its maker calls it where the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, encoding="utf-8").stdout.strip()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}\n")


def train_gpt2(args: argparse.Namespace) -> None:
    """What the command does: builds the model, trains it, prints the losses and a sample."""
    cfg = TrainConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        lr=args.lr,
        eval_every=min(math.ceil(args.steps / 6), 500),
        seed=args.seed,
    )
    if args.n_layers < 1:
        raise ValueError(f"n-layers: {args.n_layers}, expected more than 0")
    if args.d_model < 32 or args.d_model % 32:
        raise ValueError(f"d-model: {args.d_model}, expected a multiple of 32")
    if args.resume and args.out is None:
        raise ValueError("--resume: expected --out, the folder with the checkpoint")
    found = args.out is not None and (args.out / CHECKPOINT).exists()
    resume = args.resume or (found and distributed.n_restarts() > 0)
    if found and not resume:
        raise ValueError(f"{args.out / CHECKPOINT} exists: add --resume or name another --out")
    train_tokens, val_tokens = split(encode(load_text(args.text), args.n_vocab))
    torch.manual_seed(args.seed)
    model = Transformer(
        Config(
            vocab_size=args.n_vocab,
            max_seq_len=args.seq_len,
            n_layers=args.n_layers,
            d_model=args.d_model,
            n_heads=args.d_model // 32,
            head_dim=32,
            d_ff=4 * args.d_model,
        )
    )
    n_params = sum(param.numel() for param in model.parameters())
    print(f"{n_params:,} parameters, {len(train_tokens):,} tokens of text")
    print(f"a blind guess costs ln {args.n_vocab} = {math.log(args.n_vocab):.3f} nats")
    kernels = nullcontext()
    if args.fused:
        from ch01_gpt2.throughput import fused  # here, since it imports this file

        kernels = fused()
    where = {"device": args.device, "out": args.out, "resume": resume, "fsdp": args.fsdp}
    with kernels:
        result = train(model, train_tokens, val_tokens, cfg, log=True, **where)
    print(f"{result.tokens_per_s:,.0f} tokens/s on {result.environment['hardware']}\n")
    prompt_1T = val_tokens[None, : max(args.seq_len // 4, 1)].to(result.environment["device"])
    n_new = args.seq_len - prompt_1T.shape[1] + 1  # the last one is not fed to the model
    new = generate(model, prompt_1T, n_new, temperature=0.8, seed=args.seed)
    new_1T = torch.cat(list(new), dim=1)
    print("held-out text, and after >>> the model's own:")
    print(decode(prompt_1T[0], args.n_vocab), ">>>", decode(new_1T[0], args.n_vocab))


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add, default = parser.add_argument, TrainConfig()
    add("--text", nargs="+", type=Path, metavar="FILE", help="UTF-8 text; default: Python's help")
    add("--steps", type=int, default=default.steps)
    add("--batch-size", type=int, default=default.batch_size, help="sequences a step")
    add("--seq-len", type=int, default=default.seq_len, help="tokens a sequence")
    add("--lr", type=float, default=default.lr, help="learning rate at its highest")
    add("--n-vocab", type=int, default=1024, help="256 (bytes) to 50257 (all of GPT-2's tokens)")
    add("--n-layers", type=int, default=4)
    add("--d-model", type=int, default=128, help="width, a multiple of 32, which is a head's")
    add("--seed", type=int, default=default.seed)
    add("--device", help="cuda, mps or cpu; default: the first of them that is here")
    add("--out", type=Path, metavar="DIR", help=f"where to write {CHECKPOINT} and {RESULT}")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--fused", action="store_true", help="torch's attention and norm; equal but for rounding")
    add("--fsdp", action="store_true", help="with torchrun: each process keeps a part of the model")
    args = parser.parse_args()
    try:
        with distributed.processes():
            train_gpt2(args)
    except KeyboardInterrupt:
        saved = args.out is not None and (args.out / CHECKPOINT).exists()
        print("interrupted" + "; --resume goes on" * saved, file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, FloatingPointError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
