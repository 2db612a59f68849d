"""Chapter 8, measured: how long a prompt takes, with torch's attention and in blocks (prompt.py).

    python -m ch08_full_models.prompt_time             prompt_time.json, in five minutes
    python -m ch08_full_models.prompt_time --smoke     a tiny model, to see that it works

Both sides are bfloat16 on a CPU and read the same random tokens by turns, with an empty cache; the
first turn does not count. What is given is the median of the others.
"""

import argparse
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from ch01_gpt2.train import environment, result_path, save_json
from ch08_full_models import gemma3
from ch08_full_models.checkpoint import load
from ch08_full_models.decode import grouped_attention, plain_decode, short_norms
from ch08_full_models.prompt import block_attention
from ch08_full_models.token_time import seconds

SIDES = ("torch's kernel", "in blocks")


@dataclass
class Plan:
    """Sizes of the experiment."""

    models: tuple[str, ...] = ("gemma3-270m", "smollm2-135m")
    lengths: tuple[int, ...] = (128, 512, 4096)
    rounds: int = 5


SMOKE = Plan(models=("tiny",), lengths=(40,), rounds=1)
TINY = dict(vocab_size=64, n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=64)


def build(name: str, side: str) -> nn.Module:
    """The model of that name with all that `load` does, but for blocks where the side has none."""
    if name == "tiny":
        torch.manual_seed(0)
        model = gemma3.Transformer(gemma3.Config(**TINY, windows=(8, None))).eval().bfloat16()
    else:
        model, _ = load(name, "bfloat16", "cpu")
    short_norms(grouped_attention(plain_decode(model)))
    return block_attention(model) if side == "in blocks" else model


def read_ms(model: nn.Module, tokens_1T: Tensor) -> float:
    """Milliseconds to read the prompt with an empty cache."""
    cache = model.new_cache()
    return 1000 * seconds(lambda: model(tokens_1T, cache, last_only=True))


def measure(name: str, n: int, rounds: int, models: dict[str, nn.Module]) -> dict:
    """Milliseconds to read n tokens, of each side."""
    generator = torch.Generator().manual_seed(0)
    tokens_1T = torch.randint(0, models[SIDES[0]].cfg.vocab_size, (1, n), generator=generator)
    ms: dict[str, list[float]] = {side: [] for side in models}
    for _ in range(rounds + 1):
        for side, model in models.items():
            ms[side].append(read_ms(model, tokens_1T))
    medians = {side: round(statistics.median(found[1:]), 2) for side, found in ms.items()}
    all_ms = {side: [round(x, 2) for x in found[1:]] for side, found in ms.items()}
    return {"model": name, "tokens": n, "ms": medians, "all_ms": all_ms}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    args = parser.parse_args()
    plan, runs = SMOKE if args.smoke else Plan(), []
    for name in plan.models:
        models = {side: build(name, side) for side in SIDES}
        for n in plan.lengths:
            runs.append(measure(name, n, plan.rounds, models))
            ms = runs[-1]["ms"]
            print(f"{name:14}{n:6} tokens", *(f"{s} {ms[s]:9.1f} ms" for s in SIDES), sep="   ")
    record = {"environment": environment(torch.device("cpu")), "settings": asdict(plan)}
    save_json(args.out or result_path(__file__, args.smoke), record | {"runs": runs})


if __name__ == "__main__":
    main()
