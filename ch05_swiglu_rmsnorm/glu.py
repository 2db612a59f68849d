"""Chapter 5, the experiment: eight MLPs and two norms, trained on the same batches.

Shazeer 2020 (GLU Variants Improve Transformer) compared MLPs of two and of three matrices with as
many parameters. So does this, on a model of a laptop's size: the two-matrix MLPs are 4 D wide, the
gated ones 8/3 D, so that all have the same number of parameters but for rounding. Attention is
multi-head, norms are RMSNorms; one row more has SwiGLU with LayerNorm.

    python -m ch05_swiglu_rmsnorm.glu            about 20 minutes on one core; writes glu.json
    python -m ch05_swiglu_rmsnorm.glu --smoke    the same in seconds, with losses that say nothing

All train with one learning rate. A search with gelu_tanh and swiglu, on shorter runs and another
seed, finds it: the lowest sum of both losses.
"""

import argparse
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ch01_gpt2.data import encode, load_text, split
from ch01_gpt2.notebook import table
from ch01_gpt2.train import TrainConfig, TrainResult, environment, result_path, save_json, train
from ch04_mla.mla import LayerNorm
from ch05_swiglu_rmsnorm import swiglu_rmsnorm
from ch05_swiglu_rmsnorm.swiglu_rmsnorm import Config, Transformer

# Activation, and whether there is a gate. "bilinear" has a gate without an activation.
MLPS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "relu": (F.relu, False),
    "gelu": (F.gelu, False),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), False),
    "silu": (F.silu, False),
    "bilinear": (lambda x: x, True),
    "reglu": (F.relu, True),
    "geglu": (F.gelu, True),
    "swiglu": (F.silu, True),
}


class AnyMLP(nn.Module):
    """The feed-forward network with any activation, gated or not (Shazeer 2020, section 2)."""

    def __init__(self, cfg: Config, d_ff: int, activation: Callable, gated: bool) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(cfg.d_model, d_ff, bias=False) if gated else None
        self.up_proj = nn.Linear(cfg.d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, cfg.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


@dataclass(frozen=True)
class Plan:
    """How large the experiment is."""

    n_vocab: int = 512
    n_layers: int = 4
    d_model: int = 96
    steps: int = 300
    batch_size: int = 8  # sequences
    seq_len: int = 128  # tokens
    n_evals: int = 6
    eval_tokens: int = 16384
    seeds: tuple[int, ...] = (0, 1, 2)
    lrs: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3)
    warmup: float = 0.1  # share of the steps
    search_steps: int = 150
    search_seed: int = 100


SMOKE = Plan(n_layers=1, d_model=48, steps=4, batch_size=2, seq_len=32, n_evals=2,
             eval_tokens=256, search_steps=2, lrs=(1e-3, 2e-3))  # fmt: skip


def build(mlp: str, norm: str, plan: Plan, seed: int) -> Transformer:
    """An untrained model with that MLP and norm ("rms" or "layer")."""
    activation, gated = MLPS[mlp]
    d_ff = round(8 / 3 * plan.d_model) if gated else 4 * plan.d_model
    cfg = Config(
        vocab_size=plan.n_vocab,
        n_layers=plan.n_layers,
        d_model=plan.d_model,
        n_heads=plan.d_model // 16,
        n_kv_heads=plan.d_model // 16,
        head_dim=16,
        d_latent=None,
        d_ff=d_ff,
    )
    torch.manual_seed(seed)
    norms = {"rms": swiglu_rmsnorm.RMSNorm, "layer": LayerNorm}
    made = partial(AnyMLP, activation=activation, gated=gated)
    with (
        patch.object(swiglu_rmsnorm, "MLP", made),
        patch.object(swiglu_rmsnorm, "RMSNorm", norms[norm]),
    ):
        return Transformer(cfg)


def train_one(
    mlp: str, norm: str, plan: Plan, seed: int, lr: float, texts: tuple[Tensor, Tensor]
) -> TrainResult:
    """The record of one training. Runs with the same seed see the same batches."""
    cfg = TrainConfig(
        steps=plan.steps,
        batch_size=plan.batch_size,
        seq_len=plan.seq_len,
        lr=lr,
        warmup=plan.warmup,
        eval_every=max(plan.steps // plan.n_evals, 1),
        eval_tokens=plan.eval_tokens,
        seed=seed,
    )
    return train(build(mlp, norm, plan, seed), *texts, cfg, device="cpu")


def kinds() -> list[tuple[str, str]]:
    """All (MLP, norm) pairs that are trained."""
    return [(mlp, "rms") for mlp in MLPS] + [("swiglu", "layer")]


def experiment(plan: Plan) -> Iterator[dict]:
    """Yields the record (the JSON's content) after each model, seed by seed. Losses in nats."""
    folder = Path(sysconfig.get_path("stdlib"))
    source = load_text([p for p in sorted(folder.glob("*.py")) if p.stat().st_size][:60])
    texts = split(encode(load_text() + source, plan.n_vocab))
    short = replace(plan, steps=plan.search_steps, n_evals=1)
    search: dict[str, list[float]] = {"gelu_tanh": [], "swiglu": []}
    for lr in plan.lrs:
        for mlp, losses in search.items():
            result = train_one(mlp, "rms", short, plan.search_seed, lr, texts)
            losses.append(result.final_val_loss)
            print(f"search: {mlp} with {lr:g}: {result.final_val_loss:.4f}", flush=True)
    of_both = [sum(pair) for pair in zip(*search.values(), strict=True)]
    lr = plan.lrs[of_both.index(min(of_both))]
    settings = asdict(plan) | {"lr": lr, "search_losses": search}
    runs = []
    for seed in plan.seeds:
        for mlp, norm in kinds():
            result = train_one(mlp, norm, plan, seed, lr, texts)
            settings["text"] = "help topics and library source: " + result.environment["text"]
            run = {"mlp": mlp, "norm": norm, "seed": seed, "n_parameters": result.n_parameters}
            run |= {"val_steps": result.val_steps, "val_losses": result.val_losses}
            runs.append(run | {"final_val_loss": result.final_val_loss})
            print(f"seed {seed}, {mlp}, {norm}: {result.final_val_loss:.4f}", flush=True)
            yield {
                "environment": environment(torch.device("cpu")),
                "settings": settings,
                "runs": runs,
            }


def print_table(record: dict) -> None:
    """A line a kind: parameters, final losses, and how far they are from gelu_tanh's."""
    final = {(r["mlp"], r["norm"], r["seed"]): r["final_val_loss"] for r in record["runs"]}
    sizes = {(r["mlp"], r["norm"]): r["n_parameters"] for r in record["runs"]}
    rows = []
    for (mlp, norm), n_parameters in sizes.items():
        seeds = [s for m, n, s in final if (m, n) == (mlp, norm)]
        losses = [final[mlp, norm, seed] for seed in seeds]
        apart = [final[mlp, norm, seed] - final["gelu_tanh", "rms", seed] for seed in seeds
                 if ("gelu_tanh", "rms", seed) in final]  # fmt: skip
        if apart:
            rows.append([
                f"{mlp}, {norm}", n_parameters,
                f"{mean(losses):.4f} ({min(losses):.4f}..{max(losses):.4f})",
                f"{mean(apart):+.4f} ({min(apart):+.4f}..{max(apart):+.4f})",
            ])  # fmt: skip
    table(["MLP, norm", "parameters", "held-out loss (min..max)", "minus gelu_tanh's"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    args = parser.parse_args()
    args.out = args.out or result_path(__file__, args.smoke)
    torch.set_num_threads(1)
    for record in experiment(SMOKE if args.smoke else Plan()):
        save_json(args.out, record)
    print_table(record)


if __name__ == "__main__":
    main()
