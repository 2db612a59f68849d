"""Chapter 7, the experiment: how high a learning rate does each placement of the norms stand?

Six placements, each without and with QK-norm, so that the two are varied apart from each other
(reports often change both at once); the chapter's own placements with QK-norm over the full width,
too. Every model is trained for a short time with each learning rate and each seed. There is no
warm-up beyond a twentieth of the steps, since warm-up is what hides the differences.

With gradients clipped, few losses leave the range of numbers: a model that a high learning rate
has broken goes on to learn how often each byte occurs, and no more. So the record has the loss of
just that, "unigram_loss", and a run that ends no lower has failed: it is broken, or, with a low
learning rate, not yet there.

    python -m ch07_norm_placement.sweep            about 30 minutes on two cores; writes sweep.json
    python -m ch07_norm_placement.sweep --smoke    the same in seconds, with losses that say nothing
"""

import argparse
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from ch01_gpt2.data import encode, load_text, split
from ch01_gpt2.notebook import table
from ch01_gpt2.train import TrainConfig, environment, result_path, save_json, train
from ch07_norm_placement.norm_placement import Config
from ch07_norm_placement.placements import PLACEMENTS, build


@dataclass(frozen=True)
class Plan:
    """How large the experiment is."""

    n_vocab: int = 256
    n_layers: int = 6
    d_model: int = 64
    steps: int = 150
    batch_size: int = 16  # sequences
    seq_len: int = 64  # tokens
    eval_tokens: int = 8192
    seeds: tuple[int, ...] = (0, 1, 2)
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


MARGIN = 0.02  # nats a byte

SMOKE = Plan(n_layers=1, d_model=32, steps=3, batch_size=2, seq_len=16, eval_tokens=64,
             seeds=(0,), lrs=(1e-3, 1e2))  # fmt: skip


def kinds() -> list[tuple[str, str | None]]:
    """All (placement, QK-norm) pairs."""
    both = [(placement, qk_norm) for placement in PLACEMENTS for qk_norm in (None, "head")]
    return both + [(placement, "full") for placement in ("pre", "out", "sandwich")]


def train_one(
    placement: str,
    qk_norm: str | None,
    lr: float,
    seed: int,
    plan: Plan,
    texts: tuple[Tensor, Tensor],
) -> dict:
    """The record of one training; its loss is None where it is no number any more."""
    cfg = Config(
        vocab_size=plan.n_vocab,
        n_layers=plan.n_layers,
        d_model=plan.d_model,
        n_heads=plan.d_model // 16,
        n_kv_heads=plan.d_model // 16,
        head_dim=16,
        d_latent=None,
        d_ff=round(8 / 3 * plan.d_model),
        n_experts=0,
        qk_norm=qk_norm,
    )
    torch.manual_seed(seed)
    model = build(cfg, placement)
    train_cfg = TrainConfig(
        steps=plan.steps,
        batch_size=plan.batch_size,
        seq_len=plan.seq_len,
        lr=lr,
        eval_every=plan.steps,
        eval_tokens=plan.eval_tokens,
        seed=seed,
    )
    run = {"placement": placement, "qk_norm": qk_norm, "lr": lr, "seed": seed}
    try:
        result = train(model, *texts, train_cfg, device="cpu", progress=False)
    except FloatingPointError:
        return run | {"final_val_loss": None, "max_grad_norm": None}
    largest = max(result.grad_norms)
    return run | {
        "final_val_loss": result.final_val_loss,
        "max_grad_norm": largest if math.isfinite(largest) else None,
    }


def train_all_rates(placement: str, qk_norm: str | None, seed: int, plan: Plan) -> list[dict]:
    """The records of one kind and seed, a learning rate after the other, on one thread."""
    torch.set_num_threads(1)
    texts = split(encode(load_text(), plan.n_vocab))
    return [train_one(placement, qk_norm, lr, seed, plan, texts) for lr in plan.lrs]


def unigram_loss(texts: tuple[Tensor, Tensor], plan: Plan) -> float:
    """Held-out loss of a model that knows how often each byte occurs, and nothing else.

    In nats a byte, on what the models are scored on; one is added to each count.
    """
    train_tokens, val_tokens = texts
    count_V = train_tokens.bincount(minlength=plan.n_vocab) + 1
    log_prob_V = (count_V / count_V.sum()).log()
    return -log_prob_V[val_tokens[1 : plan.eval_tokens + 1]].mean().item()


def experiment(plan: Plan, n_jobs: int) -> Iterator[dict]:
    """Yields the record (the JSON's content) after each kind and seed. Losses are nats a byte."""
    tokens = encode(load_text(), plan.n_vocab)
    floor, runs = unigram_loss(split(tokens), plan), []
    wanted = [(*kind, seed, plan) for seed in plan.seeds for kind in kinds()]
    with ProcessPoolExecutor(n_jobs) as pool:
        for records in pool.map(train_all_rates, *zip(*wanted, strict=True)):
            runs += records
            losses = [run["final_val_loss"] for run in records]
            shown = "  ".join("    -" if loss is None else f"{loss:5.3f}" for loss in losses)
            run = records[0]
            kind = f"{run['placement']:9} {run['qk_norm'] or '-':5}"
            print(f"seed {run['seed']}  {kind} {shown}", flush=True)
            yield {
                "environment": environment(torch.device("cpu")),
                "settings": asdict(plan) | {"text": f"Python's help topics, {len(tokens)} bytes"},
                "lrs": plan.lrs,
                "unigram_loss": floor,
                "runs": runs,
            }


def failed(run: dict, record: dict) -> bool:
    """Whether a run ended with no number, or no lower than the bytes' frequencies alone give.

    A broken model ends a little below them at times, by less than MARGIN; one that learns does not
    stay there.
    """
    loss = run["final_val_loss"]
    return loss is None or loss > record["unigram_loss"] - MARGIN


def print_table(record: dict) -> None:
    """Mean losses over the seeds by learning rate; in brackets, how many of the seeds failed."""
    rows = []
    for placement, qk_norm in kinds():
        cells = []
        for lr in record["lrs"]:
            runs = [
                run
                for run in record["runs"]
                if (run["placement"], run["qk_norm"], run["lr"]) == (placement, qk_norm, lr)
            ]
            losses = [run["final_val_loss"] for run in runs]
            n_failed = sum(failed(run, record) for run in runs)
            shown = "-" if None in losses or not losses else f"{mean(losses):.3f}"
            cells.append(shown + (f" ({n_failed})" if n_failed else ""))
        rows.append([placement, qk_norm or "-", *cells])
    print(f"the bytes' frequencies alone: {record['unigram_loss']:.3f} nats")
    table(["placement", "QK-norm", *(f"{lr:g}" for lr in record["lrs"])], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    args = parser.parse_args()
    args.out = args.out or result_path(__file__, args.smoke)
    torch.set_num_threads(1)
    for record in experiment(SMOKE if args.smoke else Plan(), args.jobs):
        save_json(args.out, record)
    print_table(record)


if __name__ == "__main__":
    main()
