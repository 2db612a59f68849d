"""Chapter 7, the experiment on signals: what each placement does to the sizes inside a model.

Six placements, each without and with QK-norm per head, at a moderate depth. Looked at is one fixed
batch of held-out text, before the training and after some of its steps. For each layer:

    stream          root mean square of the residual stream: of the embeddings, after each block
    attn_added      root mean square of what attention adds to the stream, after its norm if any
    mlp_added       the same of the MLP
    attn_grad       norm of the loss's gradient by attention's four matrices together, not clipped
    mlp_grad        the same of the MLP's three
    largest_score   largest score, before the softmax, of a query and a key that it may see
    entropy         of attention's weights, as a share of what equal weights have; the mean

The matrices start in three ways. "gpt2" is what init_weights does: a standard deviation of 0.02,
and o_proj and down_proj smaller, by 1 / sqrt(2 n_layers). "flat" leaves that last factor out. In
"unit" each matrix has 1 / sqrt(its inputs), so that its output is about as large as its input: a
matrix as narrow as ours with 0.02 adds little to the stream. Trained is from "gpt2", as in
sweep.py; at the others one looks before the training only. The learning rate is a low one of
sweep.py's, at which no kind breaks. Pre-norm is trained at a higher one, too, for its scores.

The second part trains sweep.py's post-norm and pre-norm with warm-ups of several lengths, at a
learning rate that is too high for the first with a short one.

    python -m ch07_norm_placement.signals            10 to 20 minutes on one CPU thread
    python -m ch07_norm_placement.signals --smoke    in seconds, with numbers that say nothing

The first writes signals.json, the second signals.smoke.json, unless --out names another place.
"""

import argparse
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import geometric_mean, mean

import torch
import torch.nn as nn
from torch import Tensor

from ch01_gpt2.data import encode, in_order, load_text, split
from ch01_gpt2.notebook import table
from ch01_gpt2.train import (
    TrainConfig,
    environment,
    evaluate,
    result_path,
    save_json,
    start_run,
    token_losses,
    train_step,
)
from ch07_norm_placement.norm_placement import (
    Config,
    Transformer,
    causal_mask,
    rope,
    rope_angles,
    rope_frequencies,
)
from ch07_norm_placement.placements import PLACEMENTS, build
from ch07_norm_placement.sweep import unigram_loss

STARTS = ("gpt2", "flat", "unit")
QK_NORMS = (None, "head")


@dataclass(frozen=True)
class Plan:
    """How large the experiment is."""

    n_vocab: int = 256
    n_layers: int = 12
    d_model: int = 64
    steps: int = 150
    looks: tuple[int, ...] = (0, 50, 150)  # steps done when the signals are measured
    batch_size: int = 12  # sequences, in training and of the batch that is looked at
    seq_len: int = 64  # tokens
    eval_tokens: int = 8192
    seeds: tuple[int, ...] = (0, 1, 2)
    lr: float = 1e-3
    high_lr: float = 1e-2  # pre-norm only
    warmups: tuple[float, ...] = (0.0, 0.05, 0.3, 1.0)  # shares of the steps
    warmup_lr: float = 3e-3
    warmup_layers: int = 6  # this and the next as in sweep.py
    warmup_batch_size: int = 16


SMOKE = Plan(n_layers=2, d_model=32, steps=2, looks=(0, 2), batch_size=2, seq_len=8,
             eval_tokens=32, seeds=(0,), warmups=(0.0, 0.5), warmup_layers=1,
             warmup_batch_size=2)  # fmt: skip


def new_model(
    placement: str, qk_norm: str | None, start: str, seed: int, plan: Plan
) -> Transformer:
    """An untrained model; the same seed draws the same numbers, whatever the start."""
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
    start_from(model, start)
    return model


@torch.no_grad()
def start_from(model: Transformer, start: str) -> None:
    """Gives the matrices of a new model's blocks the sizes of one of STARTS.

    Raises ValueError for another start.
    """
    if start not in STARTS:
        raise ValueError(f"start: {start!r}, expected one of {', '.join(STARTS)}")
    if start == "gpt2":
        return
    for name, param in model.blocks.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            param.mul_(math.sqrt(2 * model.cfg.n_layers))
        if start == "unit" and param.ndim == 2:
            param.mul_(param.shape[1] ** -0.5 / 0.02)


def rms(x: Tensor) -> float:
    return x.detach().square().mean().sqrt().item()


@contextmanager
def outputs_of(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """While it is open, the last output of each module by its name, if the module has run."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: found.update({name: out}))
        for name, module in modules.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def signals(model: Transformer, inputs_BT: Tensor, targets_BT: Tensor) -> dict[str, list[float]]:
    """The signals of one batch by name, a number a layer, first layer first; leaves no gradient.

    "stream" has one number more, in front: the size of the embeddings.
    """
    model.zero_grad()
    with outputs_of(dict(model.named_modules())) as found:
        token_losses(model, inputs_BT, targets_BT, bf16=False).backward()
    signal: dict[str, list[float]] = {"stream": [rms(found["embed"])]}
    names = ("attn_added", "mlp_added", "attn_grad", "mlp_grad", "largest_score", "entropy")
    signal |= {name: [] for name in names}
    for layer, block in enumerate(model.blocks):
        name = f"blocks.{layer}"
        signal["stream"].append(rms(found[name]))
        for half in ("attn", "mlp"):  # a placement that norms no outputs does not call that norm
            out_BTD = found.get(f"{name}.{half}_out_norm", found[f"{name}.{half}"])
            signal[f"{half}_added"].append(rms(out_BTD))
            matrices = [p for p in block.get_submodule(half).parameters() if p.ndim == 2]
            grads = torch.stack([param.grad.norm() for param in matrices])
            signal[f"{half}_grad"].append(grads.norm().item())
        largest, entropy = scores(
            found[f"{name}.attn.q_norm"], found[f"{name}.attn.k_norm"], model.cfg
        )
        signal["largest_score"].append(largest)
        signal["entropy"].append(entropy)
    model.zero_grad()
    return signal


@torch.no_grad()
def scores(q_BTHK: Tensor, k_BSHK: Tensor, cfg: Config) -> tuple[float, float]:
    """The largest absolute score, and the entropy as a share of what equal weights have.

    From queries and keys that are normed, if they are, and not turned yet: as many key/value heads
    as heads, no window, no cache. The first token, which sees only itself, has no share.
    """
    pos_BT = torch.arange(q_BTHK.shape[1]).expand(q_BTHK.shape[:2])
    turn = rope_angles(pos_BT, rope_frequencies(cfg.head_dim, cfg.rope_theta))
    q_BTHK, k_BSHK = rope(q_BTHK, turn), rope(k_BSHK, turn)
    score_BHTS = torch.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK) * cfg.head_dim**-0.5
    hidden_B1TS = ~causal_mask(pos_BT, pos_BT, None)[:, None]
    largest = score_BHTS.masked_fill(hidden_B1TS, 0).abs().max().item()
    weight_BHTS = score_BHTS.masked_fill(hidden_B1TS, -math.inf).softmax(dim=-1)
    entropy_BHT = torch.special.entr(weight_BHTS).sum(dim=-1)
    most_T = torch.arange(1, q_BTHK.shape[1] + 1).log()
    return largest, (entropy_BHT[..., 1:] / most_T[1:]).mean().item()


def look_on(model: Transformer, training: TrainConfig, texts: tuple, looks: tuple) -> list[dict]:
    """Trains the model in place; its signals at each look, with None for what is no number."""
    train_tokens, val_tokens = texts
    fixed = next(in_order(val_tokens, training.batch_size, training.seq_len))
    run, found = start_run(model, train_tokens, training), []
    for look in looks:
        while run.step < look:
            train_step(run, train_tokens)
        found.append({"step": look} | rounded(signals(model, *fixed)))
    return found


def rounded(signal: dict[str, list[float]]) -> dict[str, list[float | None]]:
    """The signals to five digits, with None for what JSON has no word for."""
    return {
        name: [float(f"{number:.5g}") if math.isfinite(number) else None for number in numbers]
        for name, numbers in signal.items()
    }


def final_loss(model: Transformer, training: TrainConfig, texts: tuple) -> float | None:
    """Held-out loss in nats a byte; None if it is no number."""
    loss = evaluate(model, texts[1], training)
    return loss if math.isfinite(loss) else None


def signal_runs(seed: int, plan: Plan, texts: tuple[Tensor, Tensor]) -> Iterator[dict]:
    """The records of all models of a seed. One that is not trained has one look and no loss."""
    kinds = list(itertools.product(PLACEMENTS, QK_NORMS, STARTS, (plan.lr,)))
    kinds += [("pre", qk_norm, "gpt2", plan.high_lr) for qk_norm in QK_NORMS]
    for placement, qk_norm, start, lr in kinds:
        model, training = new_model(placement, qk_norm, start, seed, plan), training_of(plan, seed)
        training, trained = replace(training, lr=lr), start == "gpt2"
        looks = look_on(model, training, texts, plan.looks if trained else (0,))
        yield {
            "placement": placement,
            "qk_norm": qk_norm,
            "start": start,
            "lr": lr if trained else None,
            "seed": seed,
            "final_val_loss": final_loss(model, training, texts) if trained else None,
            "looks": looks,
        }


def warmup_runs(seed: int, plan: Plan, texts: tuple[Tensor, Tensor]) -> Iterator[dict]:
    """The records of the trainings with a warm-up of each length, without QK-norm."""
    plan = replace(plan, n_layers=plan.warmup_layers, batch_size=plan.warmup_batch_size)
    for placement, warmup in itertools.product(("post", "pre"), plan.warmups):
        model = new_model(placement, None, "gpt2", seed, plan)
        training = replace(training_of(plan, seed), lr=plan.warmup_lr, warmup=warmup)
        look_on(model, training, texts, (plan.steps,))
        yield {
            "placement": placement,
            "warmup": warmup,
            "seed": seed,
            "final_val_loss": final_loss(model, training, texts),
        }


def training_of(plan: Plan, seed: int) -> TrainConfig:
    """How a model is trained, but for what the runs change."""
    return TrainConfig(
        steps=plan.steps,
        batch_size=plan.batch_size,
        seq_len=plan.seq_len,
        lr=plan.lr,
        eval_every=plan.steps,
        eval_tokens=plan.eval_tokens,
        seed=seed,
    )


def experiment(plan: Plan) -> Iterator[dict]:
    """Yields the record (the JSON's content) after each model. Losses are nats a byte."""
    tokens = encode(load_text(), plan.n_vocab)
    texts = split(tokens)
    record = {
        "environment": {},
        "settings": asdict(plan) | {"text": f"Python's help topics, {len(tokens)} bytes"},
        "unigram_loss": unigram_loss(texts, plan),
        "runs": [],
        "warmups": [],
    }
    parts = {"runs": signal_runs, "warmups": warmup_runs}
    for seed, (part, runs) in itertools.product(plan.seeds, parts.items()):
        for run in runs(seed, plan, texts):
            record[part].append(run)
            record["environment"] = environment(torch.device("cpu"))
            shown = [str(value) for key, value in run.items() if key != "looks"]
            print("  ".join(shown), flush=True)
            yield record


def print_table(record: dict) -> None:
    """Means over the seeds, without QK-norm: how the stream and the gradients change with depth."""
    rows = []
    for placement in PLACEMENTS:
        for start in STARTS:
            runs = [
                run
                for run in record["runs"]
                if (run["placement"], run["qk_norm"], run["start"]) == (placement, None, start)
                and run["lr"] != record["settings"]["high_lr"]
            ]
            looks = [run["looks"][0] for run in runs]
            grown = [look["stream"][-1] / look["stream"][1] for look in looks]
            faded = [look["mlp_grad"][0] / look["mlp_grad"][-1] for look in looks]
            losses = [run["final_val_loss"] for run in runs]
            loss = "-" if None in losses else f"{mean(losses):.3f}"
            cells = [f"{geometric_mean(numbers):.3g}" for numbers in (grown, faded)]
            rows.append([placement, start, *cells, loss])
    head = ["placement", "start", "stream, last / first", "MLP gradient, first / last", "loss"]
    table(head, rows)


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
