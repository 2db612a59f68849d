"""From multi-head to grouped-query attention: pool the trained heads, then train a little more.

Chapter 3's experiment on Ainslie et al. 2023 (GQA), section 2.1: each group's key and value heads
become their mean, and the model trains on for a small share of its first steps. The other two ways
are those the paper compares it with (figure 4): the group's first head, and new random heads. The
control is the multi-head model itself, trained on for as many steps on the same batches.

    J  key/value heads after   G  heads before that become one   K  width of one head

    python -m ch03_gqa.uptrain            about 15 minutes on one CPU thread; writes uptrain.json
    python -m ch03_gqa.uptrain --smoke    everything tiny, in seconds
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from ch01_gpt2.data import encode, load_text, split
from ch01_gpt2.train import TrainConfig, environment, result_path, save_json, train
from ch03_gqa.gqa import Config, Transformer

HOWS = ("mean", "first", "random")
MODEL = Config(
    vocab_size=512,
    n_layers=4,
    d_model=128,
    n_heads=8,
    n_kv_heads=8,
    head_dim=16,
    windows=(None,),
    d_ff=512,
)
ORIGINAL = TrainConfig(steps=560, batch_size=16, seq_len=128, lr=2e-3, eval_every=560)
# Half the peak of the first run, which had ended at a tenth of it; down to a tenth again.
UPTRAINING = replace(ORIGINAL, steps=56, lr=1e-3, eval_every=7)
SMOKE_MODEL = replace(MODEL, n_layers=1, d_model=32, head_dim=4, d_ff=64)
SMOKE = dict(batch_size=2, seq_len=32, eval_tokens=512)


def to_gqa(model: Transformer, n_kv_heads: int, how: str) -> Transformer:
    """A copy of the model with fewer key/value heads; all other weights stay as they are.

    Key/value head j is made of the old heads j G to j G + G - 1, which are those that its queries
    read before: by `how` their "mean" (Ainslie et al. 2023, section 2.1), their "first", or
    "random", as in a new model. Rotary angles depend on the position only, so a mean of the
    matrices is the mean of the rotated keys. Raises ValueError for another `how`, and for a number
    that does not divide the old one.
    """
    cfg = model.cfg
    if how not in HOWS:
        raise ValueError(f"how: {how!r}, expected one of {', '.join(HOWS)}")
    if n_kv_heads < 1 or cfg.n_kv_heads % n_kv_heads:
        raise ValueError(f"n_kv_heads: {n_kv_heads}, expected a divisor of {cfg.n_kv_heads}")
    new = Transformer(replace(cfg, n_kv_heads=n_kv_heads)).to(model.embed.weight)
    weights = new.state_dict()
    for name, weight in model.state_dict().items():
        if ".k_proj." not in name and ".v_proj." not in name:
            weights[name] = weight
        elif how != "random":
            weights[name] = pool(weight, n_kv_heads, cfg.head_dim, how)
    new.load_state_dict(weights)
    return new.train(model.training)


def pool(weight: Tensor, n_kv_heads: int, head_dim: int, how: str) -> Tensor:
    """The rows of a matrix (or the numbers of a bias) of one head for each group, (J K, ...)."""
    heads = weight.unflatten(0, (n_kv_heads, -1, head_dim))  # (J, G, K, ...)
    pooled = heads.mean(dim=1) if how == "mean" else heads[:, 0]
    return pooled.flatten(0, 1)


def kinds(n_heads: int) -> list[tuple[str, int, str]]:
    """What is trained on after the first run: (method, key/value heads, how), the control first."""
    fewer = (("gqa", n_heads // 4), ("mqa", 1))
    converted = [(f"{kind}_{how}", n, how) for kind, n in fewer for how in HOWS]
    return [("mha", n_heads, "mean"), *converted]  # of groups of one the mean changes nothing


def uptrain_seed(
    cfg: Config, original: TrainConfig, uptraining: TrainConfig, tokens: tuple[Tensor, Tensor]
) -> list[dict]:
    """The records of one seed: one first run, then each conversion trained on from its end.

    All of them train on the same batches, which are not those the first run began with.
    """
    torch.manual_seed(original.seed)
    model = Transformer(cfg)
    before = train(model, *tokens, original, device="cpu").final_val_loss
    runs = []
    for method, n_kv_heads, how in kinds(cfg.n_heads):
        torch.manual_seed(original.seed)
        converted = to_gqa(model, n_kv_heads, how)
        result = train(converted, *tokens, uptraining, device="cpu")
        runs.append(
            {
                "method": method,
                "seed": original.seed,
                "n_kv_heads": n_kv_heads,
                "before": before,
                "converted": result.val_losses[0],
                "steps": result.val_steps,
                "losses": result.val_losses,
            }
        )
        path = (
            f"{before:.3f}, converted {result.val_losses[0]:.3f}, then {result.final_val_loss:.3f}"
        )
        print(f"seed {original.seed}  {method:10}  {path}", flush=True)
    return runs


def print_table(runs: list[dict]) -> None:
    """Means over the seeds, in nats a token, and the least and largest seed of the last column."""
    print("held-out loss       before  converted  trained on  (over seeds)    minus the control's")
    methods = list(dict.fromkeys(run["method"] for run in runs))
    control = {run["seed"]: run["losses"][-1] for run in runs if run["method"] == "mha"}
    for method in methods:
        rows = [run for run in runs if run["method"] == method]
        last = [run["losses"][-1] for run in rows]
        gaps = [run["losses"][-1] - control[run["seed"]] for run in rows]
        print(
            f"{method:10} {rows[0]['n_kv_heads']:2} heads"
            f" {mean(run['before'] for run in rows):8.3f}"
            f" {mean(run['converted'] for run in rows):10.3f}"
            f" {mean(last):11.3f}  ({min(last):.3f} to {max(last):.3f})"
            f" {mean(gaps):+8.3f} ({min(gaps):+.3f} to {max(gaps):+.3f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows only that it runs")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    args = parser.parse_args()
    args.out = args.out or result_path(__file__, args.smoke)
    torch.set_num_threads(1)
    cfg, original, uptraining, seeds = MODEL, ORIGINAL, UPTRAINING, (0, 1, 2)
    if args.smoke:
        cfg = SMOKE_MODEL
        original = replace(original, steps=80, eval_every=80, **SMOKE)
        uptraining = replace(uptraining, steps=8, eval_every=1, **SMOKE)
    text = load_text()
    tokens = split(encode(text, cfg.vocab_size))
    settings = {
        "model": asdict(cfg),
        "original": asdict(original) | {"seed": "each of the seeds"},
        "uptraining": asdict(uptraining) | {"seed": "the same + 1000"},
        "seeds": seeds,
        "text": f"Python's help topics, {len(tokens[0])} tokens to train on",
        "smoke": args.smoke,
    }
    runs = []
    for seed in seeds:
        phases = replace(original, seed=seed), replace(uptraining, seed=seed + 1000)
        runs += uptrain_seed(cfg, *phases, tokens)
        record = {
            "environment": environment(torch.device("cpu")),
            "settings": settings,
            "share": uptraining.steps / original.steps,
            "runs": runs,
        }
        save_json(args.out, record)
    print_table(runs)


if __name__ == "__main__":
    main()
