"""Chapter 4: which attention learns best for the cache it keeps?

Trains five small models on the same batches: multi-head, grouped-query, multi-query and latent
attention, the last with two widths of the latent. All have the same number of parameters: what an
attention saves goes into the MLP. `gqa` and `mla` cache equally many numbers a token, and so do
`mqa` and `mla_small`. The latent ones follow DeepSeek-V2 (section 3.1.2): the part that turns is
half as wide as the part that does not. Their queries come straight from the stream (d_q_latent
None, as in V2-Lite): a latent for the queries saves parameters and activations, but no cache.

The text is the source of Python's own standard library, so the losses differ a little from one
Python version to the next; the settings hold a checksum of its tokens. All kinds train with one
learning rate. A search with mha and mla, on shorter runs and another seed, finds it: the lowest
sum of both losses. A rate that one of the two would have preferred is tried by both in full, since
a rate that suits one kind better decides more than a kind's worth.

    python -m ch04_mla.compare             writes compare.json, after each model anew
    python -m ch04_mla.compare --resume    goes on with the file that an interrupted run left
    python -m ch04_mla.compare --smoke     the same in seconds, with losses that say nothing
"""

import argparse
import json
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from ch01_gpt2.data import encode, load_text, split
from ch01_gpt2.notebook import table
from ch01_gpt2.train import TrainConfig, TrainResult, environment, result_path, save_json, train
from ch04_mla.mla import Config, Transformer

# What each kind changes in the model's config.
KINDS: dict[str, dict[str, int | None]] = {
    "mha": {"d_latent": None, "n_kv_heads": 8},
    "gqa": {"d_latent": None, "n_kv_heads": 2},
    "mla": {"d_latent": 56, "d_rope": 8},
    "mqa": {"d_latent": None, "n_kv_heads": 1},
    "mla_small": {"d_latent": 24, "d_rope": 8},
}


@dataclass(frozen=True)
class Plan:
    """How large the experiment is."""

    n_layers: int = 3
    n_vocab: int = 1024
    n_files: int | None = None  # of the standard library, from the first on; None: all
    steps: int = 400
    batch_size: int = 8  # sequences
    seq_len: int = 128  # tokens
    n_evals: int = 8  # after the one before the first step
    n_pieces: int = 16  # of the held-out text, 1,024 tokens each, spread evenly over it
    seeds: tuple[int, ...] = (0, 1, 2)
    lrs: tuple[float, ...] = (7.5e-4, 1.5e-3, 3e-3)
    warmup: float = 0.1  # share of the steps
    search_steps: int = 150
    search_seed: int = 100


SMOKE = Plan(n_layers=1, n_vocab=256, n_files=10, steps=4, batch_size=4, seq_len=64, n_evals=2,
             n_pieces=1, lrs=(1e-3, 2e-3), search_steps=2)  # fmt: skip


@cache
def n_parameters(cfg: Config) -> int:
    """How many parameters a model has, all of them: counted, without the memory for them."""
    with torch.device("meta"):
        return sum(param.numel() for param in Transformer(cfg).parameters())


def cache_numbers(cfg: Config) -> int:
    """Numbers that a layer caches for a token."""
    if cfg.d_latent is None:
        return 2 * cfg.n_kv_heads * cfg.head_dim
    return cfg.d_latent + cfg.d_rope


def config(kind: str, plan: Plan) -> Config:
    """The kind's model, with an MLP so wide that it has as many parameters as mha's, within 1 %.

    mha's is four times as wide as the stream.
    """
    mha = Config(
        vocab_size=plan.n_vocab,
        n_layers=plan.n_layers,
        d_model=128,
        n_heads=8,
        head_dim=16,
        d_q_latent=None,
        d_value=16,
        d_ff=512,
        **KINDS["mha"],
    )
    cfg = replace(mha, **KINDS[kind])
    missing = n_parameters(mha) - n_parameters(cfg)
    width_costs = mha.n_layers * (2 * mha.d_model + 1)  # a column, a row, a bias in each layer
    cfg = replace(cfg, d_ff=mha.d_ff + round(missing / width_costs))
    assert abs(n_parameters(cfg) / n_parameters(mha) - 1) < 0.01, kind
    return cfg


def texts(plan: Plan) -> tuple[Tensor, Tensor]:
    """Tokens to train on, and the held-out ones that each evaluation reads, both (N,)."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    files = [path for path in files if path.stat().st_size][: plan.n_files]
    train_tokens, held_out = split(encode(load_text(files), plan.n_vocab))
    pieces = held_out[: len(held_out) // 1024 * 1024].view(-1, 1024)
    apart = len(pieces) // plan.n_pieces  # of many files, since a single one is one topic
    return train_tokens, pieces[::apart][: plan.n_pieces].flatten()


def train_one(
    kind: str, plan: Plan, seed: int, lr: float, train_tokens: Tensor, val_tokens: Tensor
) -> TrainResult:
    """The record of one training. Kinds with the same seed see the same batches."""
    torch.manual_seed(seed)
    model = Transformer(config(kind, plan))
    cfg = TrainConfig(
        steps=plan.steps,
        batch_size=plan.batch_size,
        seq_len=plan.seq_len,
        lr=lr,
        warmup=plan.warmup,
        eval_every=max(plan.steps // plan.n_evals, 1),
        eval_tokens=len(val_tokens),
        seed=seed,
    )
    return train(model, train_tokens, val_tokens, cfg, device="cpu")


def search_lr(plan: Plan, train_tokens: Tensor, val_tokens: Tensor) -> dict[str, list[float]]:
    """Held-out losses of short runs, for mha and mla: one for each of plan.lrs."""
    short = replace(plan, steps=plan.search_steps, n_evals=1)
    losses: dict[str, list[float]] = {"mha": [], "mla": []}
    for lr in plan.lrs:
        for kind in losses:
            result = train_one(kind, short, plan.search_seed, lr, train_tokens, val_tokens)
            losses[kind].append(result.final_val_loss)
            print(f"search: {kind} with {lr:g}: {result.final_val_loss:.4f}", flush=True)
    return losses


def start(plan: Plan, train_tokens: Tensor, val_tokens: Tensor) -> dict:
    """The record (the JSON's content) before the first model: after the search."""
    search = search_lr(plan, train_tokens, val_tokens)
    of_both = [sum(pair) for pair in zip(*search.values(), strict=True)]
    settings = fields_of(plan) | {
        "lr": plan.lrs[of_both.index(min(of_both))],
        "search_losses": search,
        "tokens": plan.steps * plan.batch_size * plan.seq_len,
        "n_val": len(val_tokens),
        "text": text_name(train_tokens),
    }
    kinds = {}
    for kind in KINDS:
        cfg = config(kind, plan)
        sizes = {"cache_numbers": cache_numbers(cfg), "n_parameters": n_parameters(cfg)}
        kinds[kind] = asdict(cfg) | sizes
    parts = {"environment": {}, "settings": settings, "kinds": kinds}
    return parts | {"runs": [], "other_rates": []}


def fields_of(plan: Plan) -> dict:
    """The plan as JSON gives it back, with lists for tuples."""
    return json.loads(json.dumps(asdict(plan)))


def text_name(train_tokens: Tensor) -> str:
    """What the text is, how long, and its checksum."""
    checksum = zlib.crc32(train_tokens.numpy())
    return f"source of the standard library: {len(train_tokens)} tokens, CRC {checksum:08x}"


def check_fits(record: dict, plan: Plan, train_tokens: Tensor) -> None:
    """Raises ValueError if the record is of another plan or text."""
    wanted = fields_of(plan) | {"text": text_name(train_tokens)}
    for key, expected in wanted.items():
        if (found := record["settings"].get(key)) != expected:
            raise ValueError(f"{key} is {found}, expected {expected}: start without --resume")


def trainings(plan: Plan, settings: dict) -> Iterator[tuple[str, int, float]]:
    """Kind, seed and learning rate of each model: seed by seed, and the other rates last."""
    for seed in plan.seeds:
        for kind in KINDS:
            yield kind, seed, settings["lr"]
    losses = settings["search_losses"].values()
    preferred = {plan.lrs[each.index(min(each))] for each in losses} - {settings["lr"]}
    for seed in plan.seeds:
        for lr in sorted(preferred):
            for kind in settings["search_losses"]:
                yield kind, seed, lr


def experiment(plan: Plan, record: dict | None = None) -> Iterator[dict]:
    """Yields the record after each model, its losses in nats a token.

    "runs" has those with the common rate, "other_rates" the others. A record from an earlier call
    is gone on with; ValueError if it does not fit.
    """
    train_tokens, val_tokens = texts(plan)
    if record is None:
        record = start(plan, train_tokens, val_tokens)
    check_fits(record, plan, train_tokens)
    common = record["settings"]["lr"]
    runs = record["runs"] + record["other_rates"]
    done = {(run["kind"], run["seed"], run.get("lr", common)) for run in runs}
    for kind, seed, lr in trainings(plan, record["settings"]):
        if (kind, seed, lr) in done:
            continue
        result = train_one(kind, plan, seed, lr, train_tokens, val_tokens)
        run = {
            "kind": kind,
            "seed": seed,
            "val_steps": result.val_steps,
            "val_losses": result.val_losses,
            "final_val_loss": result.final_val_loss,
        }
        if lr == common:
            record["runs"].append(run)
        else:
            record["other_rates"].append(run | {"lr": lr})
        record["environment"] = environment(torch.device("cpu"))
        print(f"seed {seed}, {kind} with {lr:g}: {result.final_val_loss:.4f}", flush=True)
        yield record


def against_mha(runs: list[dict]) -> dict[str, dict[int, float]]:
    """By kind and seed: how much higher the final loss is than mha's with the same seed."""
    final = {(run["kind"], run["seed"]): run["final_val_loss"] for run in runs}
    apart: dict[str, dict[int, float]] = {}
    for (kind, seed), loss in final.items():
        if ("mha", seed) in final:
            apart.setdefault(kind, {})[seed] = loss - final["mha", seed]
    return apart


def summary(runs: list[dict]) -> dict[str, list[str]]:
    """By kind, as text: the final loss and its distance from mha's, each with the seeds' range."""
    cells = {}
    for kind, by_seed in against_mha(runs).items():
        losses = [run["final_val_loss"] for run in runs if run["kind"] == kind]
        apart = list(by_seed.values())
        cells[kind] = [
            f"{mean(losses):.4f} ({min(losses):.4f}..{max(losses):.4f})",
            f"{mean(apart):+.4f} ({min(apart):+.4f}..{max(apart):+.4f})",
        ]
    return cells


def print_tables(record: dict) -> None:
    """Prints a line a kind, and then a line for each kind and rate that was tried besides."""
    kinds, rows = record["kinds"], []
    for kind, cells in summary(record["runs"]).items():
        rows.append([kind, kinds[kind]["cache_numbers"], kinds[kind]["n_parameters"], *cells])
    columns = ["held-out loss (min..max)", "minus mha's, by seed"]
    print(f"learning rate {record['settings']['lr']:g}")
    table(["kind", "cache", "parameters", *columns], rows)
    for lr in sorted({run["lr"] for run in record["other_rates"]}):
        runs = [run for run in record["other_rates"] if run["lr"] == lr]
        print(f"\nlearning rate {lr:g}")
        table(["kind", *columns], [[kind, *cells] for kind, cells in summary(runs).items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="of each training")
    parser.add_argument("--resume", action="store_true", help="go on with the file at --out")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    args = parser.parse_args()
    args.out = args.out or result_path(__file__, args.smoke)
    torch.set_num_threads(1)  # models this small gain nothing by more
    plan = SMOKE if args.smoke else Plan(steps=args.steps)
    before = json.loads(args.out.read_text(encoding="utf-8")) if args.resume else None
    for record in experiment(plan, before):
        save_json(args.out, record)
    print_tables(json.loads(args.out.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
