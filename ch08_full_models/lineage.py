"""Every chapter's model from 1 to 7, trained under one budget: what each change buys and costs.

    python -m ch08_full_models.lineage                  under an hour on two cores: lineage.json
    python -m ch08_full_models.lineage --size gpu       larger, for a GPU: lineage_gpu.json
    python -m ch08_full_models.lineage --quiet          adds chapter 7 with quiet output norms
    python -m ch08_full_models.lineage --speeds         measures the speeds again, a few minutes
    python -m ch08_full_models.lineage --plot           draws lineage.png from lineage.json

All models have as many parameters as chapter 1's, within 2 percent: the MLP's width makes up for
what a change adds or takes away. All see the same tokens in the same order under the same schedule;
the highest learning rate is chosen for each by a search on shorter runs, which goes on upwards or
downwards for as long as its end is its best. Chapter 6's model has most of its parameters idle at
any one token, so equal parameters mean less work a token, not equal work.

Quiet output norms: chapter 7's norms on outputs have weights of one, so each half adds a vector of
size one to embeddings of size 0.02, in which the tokens' identity drowns. With --quiet the weights
start at 0.02, too. It is the same model with another start, trained and searched like the others.

Losses do not depend on what else the machine does, speeds do: so these are measured apart, on one
thread, all models by turns.
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ch01_gpt2 import gpt2
from ch01_gpt2.data import encode, load_text, split
from ch01_gpt2.train import (
    TrainConfig,
    environment,
    pick_device,
    save_json,
    start_run,
    train,
    train_step,
)
from ch02_rope import rope
from ch03_gqa import gqa
from ch04_mla import mla
from ch05_swiglu_rmsnorm import swiglu_rmsnorm
from ch06_moe import moe
from ch06_moe.balance import RouterLog
from ch07_norm_placement import norm_placement

FOLDER = Path(__file__).parent
QUIET = 0.02  # the standard deviation of the embeddings, before training
CHAPTERS = {
    1: (gpt2, "GPT-2"),
    2: (rope, "rotary positions"),
    3: (gqa, "grouped queries, windows"),
    4: (mla, "latent attention"),
    5: (swiglu_rmsnorm, "SwiGLU, RMSNorm"),
    6: (moe, "mixture of experts"),
    7: (norm_placement, "norms in and out"),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the models are and how long they learn."""

    n_vocab: int
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int  # from chapter 3 on
    head_dim: int
    window: int  # of every other layer, from chapter 3 on
    d_latent: int  # from chapter 4 on
    d_rope: int
    d_ff: int  # of chapter 1
    n_experts: int  # from chapter 6 on
    n_active: int
    seq_len: int
    batch_size: int
    steps: int
    search_steps: int  # for each learning rate of the search
    lrs: tuple[float, ...]  # that the search begins with, each twice the one before
    n_seeds: int
    n_timed_steps: int  # of training, for its speed
    n_decoded: int  # tokens made for the speed of decoding, after a text of seq_len


LAPTOP = Size(
    n_vocab=512,
    n_layers=4,
    d_model=96,
    n_heads=6,
    n_kv_heads=2,
    head_dim=16,
    window=64,
    d_latent=32,
    d_rope=8,
    d_ff=384,
    n_experts=8,
    n_active=2,
    seq_len=128,
    batch_size=16,
    steps=400,
    search_steps=120,
    lrs=(2e-3, 4e-3, 8e-3),
    n_seeds=3,
    n_timed_steps=10,
    n_decoded=64,
)
GPU = Size(
    n_vocab=4096,
    n_layers=8,
    d_model=512,
    n_heads=8,
    n_kv_heads=2,
    head_dim=64,
    window=128,
    d_latent=128,
    d_rope=32,
    d_ff=2048,
    n_experts=16,
    n_active=2,
    seq_len=512,
    batch_size=64,
    steps=3000,
    search_steps=500,
    lrs=(6e-4, 1.2e-3, 2.4e-3),
    n_seeds=3,
    n_timed_steps=20,
    n_decoded=256,
)
SMOKE = dataclasses.replace(
    LAPTOP,
    n_layers=2,
    d_model=48,
    d_ff=192,
    seq_len=32,
    batch_size=4,
    steps=4,
    search_steps=2,
    lrs=(3.2e-2, 6.4e-2),
    n_seeds=1,
    n_timed_steps=2,
    n_decoded=4,
)
SIZES = {"laptop": LAPTOP, "gpu": GPU, "smoke": SMOKE}


def fields(chapter: int, size: Size) -> dict[str, object]:
    """What chapter N's Config is given besides the MLP's width: a line a chapter."""
    given: dict[str, object] = dict(
        vocab_size=size.n_vocab,
        n_layers=size.n_layers,
        d_model=size.d_model,
        n_heads=size.n_heads,
        head_dim=size.head_dim,
    )
    if chapter == 1:
        given |= dict(max_seq_len=size.seq_len + size.n_decoded)
    if chapter >= 3:
        given |= dict(n_kv_heads=size.n_kv_heads, windows=(size.window, None))
    if chapter >= 4:
        given |= dict(d_latent=size.d_latent, d_q_latent=None, d_rope=size.d_rope)
        given |= dict(d_value=size.head_dim)
    if chapter >= 6:
        given |= dict(n_experts=size.n_experts, n_active=size.n_active)
    if chapter == 7:
        given |= dict(norm_at="both")
    return given


def n_parameters(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def n_active_parameters(model: nn.Module) -> int:
    """Parameters that work on any one token: all but the experts it is not sent to."""
    idle = 0
    for module in model.modules():
        if isinstance(module, (moe.MoE, norm_placement.MoE)):
            n_idle = len(module.experts) - module.n_active
            idle += n_idle * n_parameters(module.experts[0])
    return n_parameters(model) - idle


def config(chapter: int, size: Size) -> object:
    """Chapter N's Config, its MLP as wide as gives the parameters of chapter 1's model.

    From chapter 6 on the experts' width is what is chosen, and the first, dense layer keeps the
    width of chapter 5.
    """
    module, _ = CHAPTERS[chapter]
    given = fields(chapter, size)
    if chapter == 1:
        return module.Config(**given, d_ff=size.d_ff)
    wanted, width = count(config(1, size), gpt2), "d_ff"
    if chapter >= 6:
        given["d_ff"], width = config(5, size).d_ff, "d_expert"
    low, high = 1, 4 * size.d_ff
    while low < high:  # the narrowest with at least as many
        middle = (low + high) // 2
        if count(module.Config(**given, **{width: middle}), module) < wanted:
            low = middle + 1
        else:
            high = middle
    return module.Config(**given, **{width: low})


def count(cfg: object, module: object) -> int:
    with torch.device("meta"):
        return n_parameters(module.Transformer(cfg))


def build(chapter: int, size: Size, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return CHAPTERS[chapter][0].Transformer(config(chapter, size))


@functools.cache
def texts(n_vocab: int) -> tuple[Tensor, Tensor]:
    """Tokens to train on and held-out ones: Python's help topics, and the source of four modules.

    Each process makes them once.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [folder / f"{name}.py" for name in ("argparse", "datetime", "inspect", "typing")]
    source = load_text([path for path in paths if path.exists()])
    return split(encode(load_text() + source, n_vocab))


def training(size: Size, steps: int, lr: float, seed: int) -> TrainConfig:
    """The schedule that every model has."""
    return TrainConfig(
        steps=steps,
        batch_size=size.batch_size,
        seq_len=size.seq_len,
        lr=lr,
        eval_every=max(1, steps // 10),
        eval_tokens=10 * size.seq_len * size.batch_size,
        seed=seed,
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """One training."""

    size: Size
    chapter: int
    steps: int
    lr: float
    seed: int
    device: str
    gain: float = 1.0  # what weights of norms on outputs start at


def fit(job: Job) -> dict:
    """Trains a model; returns its held-out losses in nats a token, None if it diverged.

    Experts are kept busy by the bias on their choice (chapter 6); no loss is added.
    """
    if job.device == "cpu":
        torch.set_num_threads(1)
    model = build(job.chapter, job.size, job.seed)
    if job.gain != 1:
        for name, param in model.named_parameters():
            if "_out_norm" in name:
                nn.init.constant_(param, job.gain)
    cfg = training(job.size, job.steps, job.lr, job.seed)
    run = {"chapter": job.chapter, "seed": job.seed, "lr": job.lr, "final_val_loss": None}
    with RouterLog(model) as routers:
        try:
            result = train(
                model,
                *texts(job.size.n_vocab),
                cfg,
                device=job.device,
                progress=False,
                extra_loss=routers.balance_by_bias,
            )
        except FloatingPointError:
            return run
    return run | {
        "final_val_loss": result.final_val_loss,
        "final_train_loss": result.final_train_loss,
        "val_steps": result.val_steps,
        "val_losses": result.val_losses,
    }


@contextmanager
def workers(n: int) -> Iterator[Callable[[Iterable[Job]], Iterator[dict]]]:
    """A function that runs trainings, in n processes, and yields their records in order."""
    if n == 1:
        yield lambda jobs: map(fit, jobs)
        return
    with ProcessPoolExecutor(n, multiprocessing.get_context("spawn")) as pool:
        yield lambda jobs: pool.map(fit, jobs)


def search(
    size: Size,
    device: str,
    run: Callable[[Iterable[Job]], Iterator[dict]],
    chapters: Iterable[int] = tuple(CHAPTERS),
    gain: float = 1.0,
) -> dict[int, dict[float, float | None]]:
    """Held-out losses of short runs by chapter and learning rate; None for one that diverged.

    Where the best rate is the highest or lowest tried, the next one is tried as well.
    """
    losses: dict[int, dict[float, float | None]] = {chapter: {} for chapter in chapters}
    wanted = [(chapter, lr) for chapter in losses for lr in size.lrs]
    while wanted:
        jobs = [Job(size, c, size.search_steps, lr, 0, device, gain) for c, lr in wanted]
        for found in run(jobs):
            losses[found["chapter"]][found["lr"]] = found["final_val_loss"]
        wanted = [(chapter, lr) for chapter in losses for lr in beyond(losses[chapter])]
    return losses


def beyond(losses: dict[float, float | None]) -> list[float]:
    """The rate past the best one, if that is the highest or the lowest tried; else none."""
    lr = best(losses)
    return [2 * lr] * (lr == max(losses)) + [lr / 2] * (lr == min(losses))


def best(losses: dict[float, float | None]) -> float:
    """The learning rate with the lowest loss. ValueError if all diverged."""
    finite = {lr: loss for lr, loss in losses.items() if loss is not None}
    if not finite:
        raise ValueError(f"lrs: {list(losses)}, expected one that does not diverge")
    return min(finite, key=finite.__getitem__)


def speeds(size: Size, device: torch.device, rounds: int = 7) -> dict[int, dict[str, float]]:
    """Tokens a second of each chapter's model in training, and in decoding after a text of seq_len.

    Medians. The models take turns, so that what else the machine does falls on all alike.
    """
    seconds: dict[int, dict[str, list[float]]] = {c: {} for c in CHAPTERS}
    cfg = training(size, rounds * size.n_timed_steps, 1e-4, seed=0)
    models = {chapter: build(chapter, size, 0).to(device) for chapter in CHAPTERS}
    train_tokens, _ = texts(size.n_vocab)
    runs = {c: start_run(model.train(), train_tokens, cfg) for c, model in models.items()}
    text_1T = train_tokens[None, : size.seq_len].to(device)
    for _ in range(rounds):
        for chapter, model in models.items():

            def learn(run: object = runs[chapter]) -> None:
                for _ in range(size.n_timed_steps):
                    train_step(run, train_tokens)

            found = seconds[chapter]
            found.setdefault("train", []).append(timed(learn, device))
            found.setdefault("decode", []).append(decode_seconds(chapter, model, text_1T, size))
    n_learnt = size.n_timed_steps * size.batch_size * size.seq_len
    return {
        chapter: {
            "train_tokens_per_s": n_learnt / statistics.median(found["train"]),
            "decode_tokens_per_s": size.n_decoded / statistics.median(found["decode"]),
        }
        for chapter, found in seconds.items()
    }


@torch.no_grad()
def decode_seconds(chapter: int, model: nn.Module, text_1T: Tensor, size: Size) -> float:
    """Seconds for n_decoded tokens after the text, whose reading is not counted."""
    cache = model.new_cache()
    model(text_1T, cache, last_only=True)
    generate = CHAPTERS[chapter][0].generate
    new = generate(model, text_1T[:, -1:], size.n_decoded, cache=cache)
    return timed(lambda: list(new), text_1T.device)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def cache_bytes(model: nn.Module, n_tokens: int) -> int:
    """Bytes that the caches of all layers hold after a text of n_tokens."""
    cache = model.new_cache()
    model(torch.zeros(1, n_tokens, dtype=torch.long), cache, last_only=True)
    return sum(layer.n_bytes() for layer in cache)


def measure(size: Size, out: Path, device: torch.device, n_jobs: int) -> None:
    """Everything, written to `out` after each trained model: a run that is stopped leaves much."""
    with workers(n_jobs) as run:
        losses = search(size, str(device), run)
        record = {
            "environment": environment(device),
            "settings": dataclasses.asdict(size) | {"tokens": sum(map(len, texts(size.n_vocab)))},
            "chapters": {
                chapter: describe(chapter, size) | {"search": found, "lr": best(found)}
                for chapter, found in losses.items()
            },
            "runs": [],
        }
        for chapter, found in record["chapters"].items():
            print(f"chapter {chapter}: {found['n_parameters']:,} parameters, lr {found['lr']:g}")
        jobs = [
            Job(size, chapter, size.steps, best(found), seed, str(device))
            for seed in range(size.n_seeds)
            for chapter, found in losses.items()
        ]
        for found in run(jobs):
            record["runs"].append(found)
            save_json(out, record)
            loss = found["final_val_loss"]
            if loss is None:
                raise FloatingPointError(f"lr: {found['lr']}, chapter {found['chapter']} diverged")
            print(f"seed {found['seed']}, chapter {found['chapter']}: {loss:.4f}", flush=True)
    add_speeds(record, size, out, device)


def measure_quiet(record: dict, size: Size, out: Path, device: torch.device, n_jobs: int) -> None:
    """Adds chapter 7's model with quiet output norms to the record, and writes it to `out`."""
    with workers(n_jobs) as run:
        [(chapter, losses)] = search(size, str(device), run, (7,), QUIET).items()
        lr, seeds = best(losses), range(size.n_seeds)
        jobs = [Job(size, chapter, size.steps, lr, seed, str(device), QUIET) for seed in seeds]
        record["quiet"] = {"gain": QUIET, "search": losses, "lr": lr, "runs": list(run(jobs))}
    save_json(out, record)


def describe(chapter: int, size: Size) -> dict:
    """A model's sizes."""
    model = build(chapter, size, 0)
    return {
        "name": CHAPTERS[chapter][1],
        "n_parameters": n_parameters(model),
        "n_active_parameters": n_active_parameters(model),
        "cache_bytes": cache_bytes(model, size.seq_len),
        "config": dataclasses.asdict(config(chapter, size)),
    }


def add_speeds(record: dict, size: Size, out: Path, device: torch.device) -> None:
    """Measures the speeds and writes them into the record and to `out`."""
    for chapter, found in speeds(size, device).items():
        chapters = record["chapters"]  # keys are numbers here, and words in what JSON gives back
        chapters[chapter if chapter in chapters else str(chapter)] |= found
    record["speeds_environment"] = environment(device)
    save_json(out, record)


def summary(record: dict) -> list[dict]:
    """A row a chapter: loss over the seeds, and what the model costs."""
    rows = []
    kinds = [
        (number, chapter["name"], [run for run in record["runs"] if run["chapter"] == int(number)])
        for number, chapter in record["chapters"].items()
    ]
    if "quiet" in record:  # as large and as fast
        number, name, _ = kinds[-1]
        kinds.append((number, f"{name}, quiet", record["quiet"]["runs"]))
    for number, name, runs in kinds:
        chapter = record["chapters"][number]
        losses = [run["final_val_loss"] for run in runs]
        rows.append(
            {
                "chapter": int(number),
                "name": name,
                "losses": losses,
                "loss": statistics.mean(losses),
                "n_parameters": chapter["n_parameters"],
                "n_active_parameters": chapter["n_active_parameters"],
                "cache_bytes_per_token": chapter["cache_bytes"] / record["settings"]["seq_len"],
                "train_tokens_per_s": chapter["train_tokens_per_s"],
                "decode_tokens_per_s": chapter["decode_tokens_per_s"],
            }
        )
    return rows


def print_table(rows: list[dict]) -> None:
    head = "chapter                        loss (range over seeds)  parameters  active"
    print(head + "  cache B/token  train tok/s  decode tok/s")
    for row in rows:
        spread = f"{row['loss']:.4f} ({min(row['losses']):.4f} to {max(row['losses']):.4f})"
        print(
            f"{row['chapter']} {row['name']:26}  {spread:25}"
            f"{row['n_parameters']:10,}{row['n_active_parameters']:10,}"
            f"{row['cache_bytes_per_token']:13,.0f}{row['train_tokens_per_s']:13,.0f}"
            f"{row['decode_tokens_per_s']:13,.0f}"
        )


def draw(rows: list[dict], path: Path) -> None:
    """What each change bought and what it cost: one row a chapter, one panel a measure."""
    import matplotlib.pyplot as plt

    from ch01_gpt2.notebook import BLUE, GREEN, GREY, ORANGE, RED, style

    style()
    panels = [
        ("held-out loss (nats a token)", "loss", BLUE),
        ("cache (bytes a token)", "cache_bytes_per_token", ORANGE),
        ("training (tokens a second)", "train_tokens_per_s", GREEN),
        ("decoding (tokens a second)", "decode_tokens_per_s", RED),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.2), sharey=True)
    places = range(len(rows))
    for ax, (title, key, colour) in zip(axes, panels, strict=True):
        values = [row[key] for row in rows]
        if key == "loss":
            for place, row in zip(places, rows, strict=True):
                ax.plot(row["losses"], [place] * len(row["losses"]), "o", color=GREY, ms=4)
            ax.plot(values, places, "D-", color=colour, lw=1, ms=5)
        else:
            ax.barh(places, values, color=colour, height=0.6)
            for place, value in zip(places, values, strict=True):
                ax.text(value, place, f" {value:,.0f}", va="center", fontsize=8)
            ax.set_xlim(0, 1.25 * max(values))
        ax.set_title(title)
    axes[0].set_yticks(places, [f"{row['chapter']} {row['name']}" for row in rows])
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="laptop")
    parser.add_argument("--out", type=Path, help="default: lineage.json, or lineage_SIZE.json")
    parser.add_argument("--device", help="cpu, cuda or mps; default: the best one here")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time; 1 on a GPU")
    parser.add_argument("--quiet", action="store_true", help="add chapter 7 with quiet norms")
    parser.add_argument("--speeds", action="store_true", help="measure only the speeds again")
    parser.add_argument("--plot", action="store_true", help="draw the file that is there")
    args = parser.parse_args()
    name = "lineage.json" if args.size == "laptop" else f"lineage_{args.size}.json"
    out = args.out or FOLDER / name
    if (args.plot or args.speeds or args.quiet) and not out.exists():
        parser.exit(2, f"error: {out}: not there, expected the record of an earlier run\n")
    device = pick_device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    size, n_jobs = SIZES[args.size], args.jobs if device.type == "cpu" else 1
    if args.speeds or args.quiet:
        record = json.loads(out.read_text(encoding="utf-8"))
        if args.quiet:
            measure_quiet(record, size, out, device, n_jobs)
        if args.speeds:
            add_speeds(record, size, out, device)
    elif not args.plot:
        measure(size, out, device, n_jobs)
    rows = summary(json.loads(out.read_text(encoding="utf-8")))
    print_table(rows)
    draw(rows, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
