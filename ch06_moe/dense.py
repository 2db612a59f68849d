"""Chapter 6: is a mixture of experts better than a dense model, and than which one?

Trains four small models on the same batches, with the same attention and as many tokens:

    dense_active     one MLP as wide as the experts together that work on a token
    dense_total      one MLP as wide as all experts together
    moe              8 routed experts, 2 of them active, and a shared one
    moe_no_shared    9 routed experts, 3 of them active: as many in all, as many at work

The widths are equal, so the mixtures have their routers besides, less than 1 % of their
parameters. Their load is balanced by the bias on the choice (balance.py).

All kinds train with one learning rate. A search on shorter runs and another seed finds it: the
lowest sum of the losses of dense_active, dense_total and moe.

The training loss is the mean over the last tenth of the steps. The held-out text is the end of
Python's help topics, with other subjects than the rest, so the two need not rank the kinds alike.

"tokens_per_s" is of each whole training; other programs make it wander, so compare it within a
seed at most. "step_seconds" is fairer: medians of training steps of the four kinds in turns.

    python -m ch06_moe.dense            about 10 minutes on one CPU thread; writes dense.json
    python -m ch06_moe.dense --smoke    the same in seconds, with losses that say nothing
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor

from ch01_gpt2.data import encode, load_text, split
from ch01_gpt2.notebook import table
from ch01_gpt2.train import (
    TrainConfig,
    TrainResult,
    environment,
    result_path,
    save_json,
    start_run,
    train,
    train_step,
)
from ch06_moe.balance import RouterLog
from ch06_moe.balancing import WINDOW, max_over_mean
from ch06_moe.moe import Config, MoE, Transformer

# What each kind changes in the model's config; the widths of dense MLPs are in experts.
KINDS: dict[str, dict[str, int]] = {
    "dense_active": {"n_experts": 0, "d_ff": 3},
    "dense_total": {"n_experts": 0, "d_ff": 9},
    "moe": {"n_experts": 8, "n_active": 2, "n_shared": 1},
    "moe_no_shared": {"n_experts": 9, "n_active": 3, "n_shared": 0},
}
SEARCHED = ("dense_active", "dense_total", "moe")


@dataclass(frozen=True)
class Plan:
    """How large the experiment is."""

    n_layers: int = 4
    d_model: int = 96
    d_expert: int = 64
    n_vocab: int = 512
    steps: int = 300
    batch_size: int = 8  # sequences
    seq_len: int = 128  # tokens
    n_evals: int = 5  # after the one before the first step
    eval_tokens: int = 16384
    seeds: tuple[int, ...] = (0, 1, 2)
    lrs: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3)
    search_steps: int = 100
    search_seed: int = 100
    bias_step: float = 0.003
    rounds: int = 15  # of the timing


SMOKE = Plan(n_layers=1, d_model=32, d_expert=8, steps=8, batch_size=2, seq_len=32, n_evals=2,
             eval_tokens=512, lrs=(1e-3, 2e-3), search_steps=2, rounds=2)  # fmt: skip


def config(kind: str, plan: Plan) -> Config:
    """The kind's model."""
    changes = dict(KINDS[kind])
    if "d_ff" in changes:
        changes["d_ff"] *= plan.d_expert
    return Config(
        vocab_size=plan.n_vocab,
        n_layers=plan.n_layers,
        d_model=plan.d_model,
        n_heads=4,
        n_kv_heads=4,
        head_dim=plan.d_model // 4,
        d_latent=None,
        d_expert=plan.d_expert,
        n_dense_layers=0,
        **changes,
    )


def n_parameters(cfg: Config) -> tuple[int, int]:
    """How many parameters a model has, and how many of them work on any one token."""
    with torch.device("meta"):  # counted, without the memory for them
        model = Transformer(cfg)
    n_all = sum(param.numel() for param in model.parameters())
    n_idle = 0
    for layer in model.modules():
        if isinstance(layer, MoE):
            n_expert = sum(param.numel() for param in layer.experts[0].parameters())
            n_idle += (cfg.n_experts - cfg.n_active) * n_expert
    return n_all, n_all - n_idle


def training(plan: Plan, seed: int, lr: float) -> TrainConfig:
    """How every kind trains."""
    return TrainConfig(
        steps=plan.steps,
        batch_size=plan.batch_size,
        seq_len=plan.seq_len,
        lr=lr,
        eval_every=plan.steps // plan.n_evals,
        eval_tokens=plan.eval_tokens,
        seed=seed,
    )


def balancing(routers: RouterLog, plan: Plan) -> Callable[[], Tensor] | None:
    """What keeps the experts of a model busy while it trains; None where it has none."""
    return partial(routers.balance_by_bias, step=plan.bias_step) if routers.layers else None


def train_one(
    kind: str, plan: Plan, seed: int, lr: float, tokens: tuple[Tensor, Tensor]
) -> tuple[TrainResult, float | None]:
    """The record of one training, and how uneven the load of its experts was in the end.

    That is max_over_mean of the last steps; None for a dense model. Kinds with the same seed see
    the same batches.
    """
    torch.manual_seed(seed)
    model = Transformer(config(kind, plan))
    cfg = training(plan, seed, lr)
    with RouterLog(model) as routers:
        extra_loss = balancing(routers, plan)
        result = train(model, *tokens, cfg, device="cpu", extra_loss=extra_loss)
    if not routers.layers:
        return result, None
    return result, max_over_mean(torch.tensor(routers.shares[-WINDOW:]).mean(dim=0))


def search_lr(plan: Plan, tokens: tuple[Tensor, Tensor]) -> dict[str, list[float]]:
    """Held-out losses of short runs, by kind: one for each of plan.lrs."""
    short = replace(plan, steps=plan.search_steps, n_evals=1)
    losses: dict[str, list[float]] = {kind: [] for kind in SEARCHED}
    for lr in plan.lrs:
        for kind in SEARCHED:
            result, _ = train_one(kind, short, plan.search_seed, lr, tokens)
            losses[kind].append(result.final_val_loss)
            print(f"search: {kind} with {lr:g}: {result.final_val_loss:.4f}", flush=True)
    return losses


def step_seconds(plan: Plan, lr: float, tokens: Tensor) -> dict[str, float]:
    """Median seconds of one training step, by kind, the kinds taking turns."""
    cfg = training(plan, plan.search_seed, lr)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with ExitStack() as logs:
        runs = {}
        for kind in KINDS:
            torch.manual_seed(plan.search_seed)
            runs[kind] = start_run(Transformer(config(kind, plan)), tokens, cfg)
            routers = logs.enter_context(RouterLog(runs[kind].model))
            runs[kind].extra_loss = balancing(routers, plan)
        for n in range(plan.rounds + 1):
            for kind, run in runs.items():
                start = time.perf_counter()
                train_step(run, tokens)
                if n > 0:  # the first step of each also makes what later ones find ready
                    seconds[kind].append(time.perf_counter() - start)
    return {kind: median(each) for kind, each in seconds.items()}


def start(plan: Plan, tokens: tuple[Tensor, Tensor]) -> dict:
    """The record (the JSON's content) before the first model: after the search and the timing."""
    search = search_lr(plan, tokens)
    sums = [sum(losses) for losses in zip(*search.values(), strict=True)]
    lr = plan.lrs[sums.index(min(sums))]
    settings = asdict(plan) | {
        "lr": lr,
        "search_losses": search,
        "tokens": plan.steps * plan.batch_size * plan.seq_len,
        "text": f"Python's help topics, {len(tokens[0])} tokens to train on",
    }
    seconds = step_seconds(plan, lr, tokens[0])
    return {"environment": {}, "settings": settings, "step_seconds": seconds, "runs": []}


def experiment(plan: Plan) -> Iterator[dict]:
    """Yields the record after each model, its losses in nats a token."""
    tokens = split(encode(load_text(), plan.n_vocab))
    record = start(plan, tokens)
    for seed in plan.seeds:
        for kind in KINDS:
            n_all, n_active = n_parameters(config(kind, plan))
            result, load = train_one(kind, plan, seed, record["settings"]["lr"], tokens)
            run = {
                "kind": kind,
                "seed": seed,
                "n_parameters": n_all,
                "n_active": n_active,
                "val_steps": result.val_steps,
                "val_losses": result.val_losses,
                "final_val_loss": result.final_val_loss,
                "final_train_loss": result.final_train_loss,
                "tokens_per_s": result.tokens_per_s,
                "max_over_mean": load,
            }
            record["runs"].append(run)
            record["environment"] = environment(torch.device("cpu"))
            print(f"seed {seed}, {kind}: {result.final_val_loss:.4f}", flush=True)
            yield record


def summary(runs: list[dict], which: str = "final_val_loss") -> dict[str, list[str]]:
    """By kind, as text: the final loss, its distance from dense_active's with the same seed.

    Both as the mean of the seeds, and the least and the largest of them.
    """
    active = {run["seed"]: run[which] for run in runs if run["kind"] == "dense_active"}
    cells = {}
    for kind in KINDS:
        of_kind = [run for run in runs if run["kind"] == kind]
        losses = [run[which] for run in of_kind]
        apart = [run[which] - active[run["seed"]] for run in of_kind]
        cells[kind] = [
            f"{mean(losses):.4f} ({min(losses):.4f}..{max(losses):.4f})",
            f"{mean(apart):+.4f} ({min(apart):+.4f}..{max(apart):+.4f})",
        ]
    return cells


def print_table(record: dict) -> None:
    """Prints a line a kind, once with the held-out losses, once with those in training."""
    sizes = {run["kind"]: (run["n_parameters"], run["n_active"]) for run in record["runs"]}
    seconds = record["step_seconds"]
    print(f"learning rate {record['settings']['lr']:g}")
    for which, name in (("final_train_loss", "training"), ("final_val_loss", "held-out")):
        rows = [
            [kind, *sizes[kind], *cells, f"{seconds[kind] / seconds['dense_active']:.2f}"]
            for kind, cells in summary(record["runs"], which).items()
        ]
        head = ["kind", "parameters", "active", f"{name} loss (min..max)", "minus dense_active's"]
        print()
        table([*head, "time of a step"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="of each training")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    args = parser.parse_args()
    args.out = args.out or result_path(__file__, args.smoke)
    torch.set_num_threads(1)
    plan = SMOKE if args.smoke else Plan(steps=args.steps)
    for record in experiment(plan):
        save_json(args.out, record)
    print_table(record)


if __name__ == "__main__":
    main()
