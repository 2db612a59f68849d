"""Chapter 8, measured: what a layer of experts costs, and what of that its weights' bytes cost.

One layer of routed experts (Qwen3-MoE's router), 6 of 16, 64 or 256 experts for each token. It is
computed three ways, which take turns: by the loop over all experts that one writes first, by the
family's own forward, and by that of experts.py. In bfloat16 the last two have speed.py's vector
products where torch.mv is fast, as `load` gives them. A layer is measured

- for one token, 32 different ones after each other, each through another of several layers. All
  layers together are far larger than the processor's caches, and as large for 16 experts as for
  256: they lie in the same memory, cut in another way. So the weights come from memory, always.
- for 256 tokens at once.

Beside it stands what reading the active experts' weights takes, at the speed at which torch adds up
all of that memory. A row "products alone" gives the time of each of the same experts' matrix
products and nothing else, by torch.mv or linear as experts.py does: the least that a layer takes
without another kernel.

    D  columns of a matrix    R  rows of all matrices together    E  experts of all layers
    B  sequences    T  tokens of a sequence    N  tokens    A  experts of a token
    M  tokens of one expert    1  an axis of length one

    python -m ch08_full_models.experts_demo            a minute; experts_demo.json
    python -m ch08_full_models.experts_demo --smoke    the same in seconds, tiny
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ch01_gpt2.notebook import table
from ch01_gpt2.train import environment, result_path, save_json
from ch08_full_models.experts import fast_experts
from ch08_full_models.qwen3 import Config, MoE
from ch08_full_models.speed import mv_is_faster, vector_products


@dataclass(frozen=True)
class Plan:
    """What is timed."""

    d_model: int = 1024
    d_expert: int = 512
    n_active: int = 6
    experts: tuple[int, ...] = (16, 64, 256)
    middle: int = 64  # experts, where one number is asked for
    memory: int = 1_620_000_000  # bytes of all layers together, at most, if one layer fits
    n_single: int = 32  # tokens, one at a time
    n_many: int = 256  # tokens at once
    rounds: int = 9
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    seed: int = 0


SMOKE = Plan(
    d_model=32,
    d_expert=16,
    n_active=2,
    experts=(4, 8, 16),
    middle=8,
    memory=200_000,
    n_single=3,
    n_many=12,
    rounds=2,
)
READ_TARGET, LOOP_TARGET, GROWTH_TARGET = 1.3, 1.3, 1.1
# The last: 16 times as many experts, and one token costs at most a tenth more, for the router.


def loop_all(layer: MoE, x_BTD: Tensor) -> Tensor:
    """The plain loop: each expert in turn looks for its tokens, (B, T, D)."""
    x_ND = x_BTD.flatten(0, 1)
    expert_NA, weight_NA = layer.route(x_ND)
    y_ND = torch.zeros_like(x_ND)
    for i, expert in enumerate(layer.experts):
        token_M, place_M = torch.where(expert_NA == i)
        y_MD = expert(x_ND[token_M]) * weight_NA[token_M, place_M, None]
        y_ND.index_add_(0, token_M, y_MD)
    return y_ND.view_as(x_BTD)


def products_alone(layer: MoE, x_BTD: Tensor) -> Tensor:
    """One token times its experts' matrices, and nothing in between, (D,) of the last."""
    x_1D = x_BTD.flatten(0, 1)
    by_mv = x_1D.dtype == torch.float32 or mv_is_faster()
    product = torch.mv if by_mv else lambda w_RD, x_D: F.linear(x_D, w_RD)
    for i in layer.route(x_1D)[0][0].tolist():
        expert = layer.experts[i]
        up = product(expert.up_proj.weight, x_1D[0])
        product(expert.gate_proj.weight, x_1D[0])
        y_D = product(expert.down_proj.weight, up)
    return y_D


def big_matrix(plan: Plan, dtype: torch.dtype) -> Tensor:
    """Random weights of as many experts as the memory holds, one after the other, (R, D)."""
    rows = 3 * plan.d_expert
    n = max(1, plan.memory // (dtype.itemsize * rows * plan.d_model * max(plan.experts)))
    expert_D = torch.randn(rows, plan.d_model) / plan.d_model**0.5
    big_RD = torch.empty(n * max(plan.experts) * rows, plan.d_model, dtype=dtype)
    for shift, part in enumerate(big_RD.split(rows), 1):
        part.copy_(expert_D.roll(shift))  # no two experts alike, and faster than drawing each
    return big_RD


def make_layers(plan: Plan, big_RD: Tensor, n_experts: int) -> list[MoE]:
    """As many layers as the big matrix has weights for, which stay where they are."""
    parts = iter(big_RD.split(plan.d_expert))
    layers = []
    for _ in range(len(big_RD) // (3 * plan.d_expert * n_experts)):
        with torch.device("meta"):
            layer = MoE(
                Config(
                    d_model=plan.d_model,
                    d_expert=plan.d_expert,
                    n_experts=n_experts,
                    n_active=plan.n_active,
                )
            )
        router_ID = torch.randn(n_experts, plan.d_model).to(big_RD.dtype)
        layer.router.weight = nn.Parameter(router_ID, False)
        for expert in layer.experts:
            for linear in (expert.gate_proj, expert.up_proj, expert.down_proj):
                weight = next(parts).view(linear.out_features, linear.in_features)
                linear.weight = nn.Parameter(weight, False)
        layers.append(layer)
    return layers


def ways(plan: Plan, big_RD: Tensor, n_experts: int) -> dict[str, tuple[Callable, list[MoE]]]:
    """By name: what is called with a layer and tokens, and the layers. All share their weights."""
    torch.manual_seed(plan.seed)
    plain = make_layers(plan, big_RD, n_experts)
    torch.manual_seed(plan.seed)
    fast = [fast_experts(layer) for layer in make_layers(plan, big_RD, n_experts)]
    torch.manual_seed(plan.seed)
    family = make_layers(plan, big_RD, n_experts)
    if big_RD.dtype == torch.bfloat16 and mv_is_faster():
        for layer in family + fast:
            vector_products(layer)
    return {
        "loop over all": (loop_all, plain),
        "family": (lambda layer, x: layer(x), family),
        "experts.py": (lambda layer, x: layer(x), fast),
        "products alone": (products_alone, plain),
    }


def seconds(way: Callable, layers: list[MoE], batches: list[Tensor], first: int) -> float:
    """Seconds a batch, each through another layer; from the first-th layer on."""
    start = time.perf_counter()
    for i, x_BTD in enumerate(batches, first):
        way(layers[i % len(layers)], x_BTD)
    return (time.perf_counter() - start) / len(batches)


@torch.no_grad()
def measure(plan: Plan, dtype_name: str) -> dict:
    """Medians of one type in seconds, all that is compared taking turns."""
    dtype = getattr(torch, dtype_name)
    torch.manual_seed(plan.seed)
    big_RD = big_matrix(plan, dtype)
    by_count = {n: ways(plan, big_RD, n) for n in plan.experts}
    one = [torch.randn(1, 1, plan.d_model, dtype=dtype) for _ in range(plan.n_single)]
    many = [torch.randn(1, plan.n_many, plan.d_model, dtype=dtype)]
    assert_equal(by_count, one[:2] + many)
    found: dict[tuple, list[float]] = {}
    for turn in range(plan.rounds + 1):  # the first one warms up
        for n_experts, by_name in by_count.items():
            for name, (way, layers) in by_name.items():
                key = (1, n_experts, name)
                found.setdefault(key, []).append(seconds(way, layers, one, turn))
                if n_experts == plan.middle and name != "products alone":
                    key = (plan.n_many, n_experts, name)
                    found.setdefault(key, []).append(seconds(way, layers, many, turn))
        start = time.perf_counter()
        big_RD.view(torch.int64).sum()
        found.setdefault(("read",), []).append(time.perf_counter() - start)
    times = {key: median(values[1:]) for key, values in found.items()}
    active_bytes = plan.n_active * 3 * plan.d_expert * plan.d_model * dtype.itemsize
    rate = big_RD.nbytes / times.pop(("read",))
    return {
        "dtype": dtype_name,
        "bytes_of_all_layers": big_RD.nbytes,
        "active_bytes": active_bytes,
        "read_bytes_per_s": rate,
        "read_active_s": active_bytes / rate,
        "runs": [
            {"n_tokens": n_tokens, "n_experts": n_experts, "way": name, "seconds": time_s}
            for (n_tokens, n_experts, name), time_s in times.items()
        ],
    }


def assert_equal(by_count: dict[int, dict], batches: list[Tensor]) -> None:
    """Raises AssertionError unless all ways say the same, but for rounding."""
    for by_name in by_count.values():
        for x_BTD in batches:
            outputs = [
                way(layers[0], x_BTD).float()
                for name, (way, layers) in by_name.items()
                if name != "products alone"
            ]
            tolerance = 1e-5 if x_BTD.dtype == torch.float32 else 0.03
            for y_BTD in outputs[1:]:
                error = (y_BTD - outputs[0]).abs().max()
                assert error <= tolerance * outputs[0].abs().max()


def targets(plan: Plan, result: dict) -> list[dict]:
    """What was to be reached in one type, the ratio found, and whether it is reached."""
    times = {(r["n_tokens"], r["n_experts"], r["way"]): r["seconds"] for r in result["runs"]}
    few, most = min(plan.experts), max(plan.experts)
    one, fast = times[1, plan.middle, "experts.py"], "experts.py"
    loop, ours = (times[plan.n_many, plan.middle, way] for way in ("loop over all", fast))
    growth = times[1, most, fast] / times[1, few, fast]
    rows = [
        ("one token / reading its experts", one / result["read_active_s"], READ_TARGET, False),
        (f"{plan.n_many} tokens, times as fast as the loop", loop / ours, LOOP_TARGET, True),
        (f"one token, {most} experts / {few}", growth, GROWTH_TARGET, False),
    ]
    return [
        {
            "dtype": result["dtype"],
            "what": what,
            "ratio": ratio,
            "at_least" if more else "at_most": limit,
            "reached": ratio >= limit if more else ratio <= limit,
        }
        for what, ratio, limit, more in rows
    ]


def print_result(result: dict) -> None:
    """Milliseconds of each way; the last column, in parts of the time of reading."""
    read = result["read_active_s"]
    rate = result["read_bytes_per_s"] / 1e9
    ms = f"{1e3 * read:.2f} ms"
    print(f"\n{result['dtype']}: memory is read at {rate:.1f} GB/s, a token's experts in {ms}")
    rows = [
        [
            run["way"],
            run["n_tokens"],
            run["n_experts"],
            f"{1e3 * run['seconds']:.2f}",
            f"{run['seconds'] / read:.2f}" if run["n_tokens"] == 1 else "",
        ]
        for run in sorted(result["runs"], key=lambda run: (run["n_tokens"], run["n_experts"]))
    ]
    table(["way", "tokens", "experts", "ms", "/ read"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    args = parser.parse_args()
    args.out = args.out or result_path(__file__, args.smoke)
    plan = SMOKE if args.smoke else Plan()
    results = []
    for dtype_name in plan.dtypes:
        results.append(measure(plan, dtype_name))
        print_result(results[-1])
    found = [target for result in results for target in targets(plan, result)]
    print()
    for target in found:
        limit = f"{'>=' if 'at_least' in target else '<='} "
        limit += f"{target.get('at_least', target.get('at_most'))}"
        said = "reached" if target["reached"] else "not reached"
        print(f"{target['dtype']}, {target['what']}: {target['ratio']:.2f} ({limit}): {said}")
    record = {"environment": environment(torch.device("cpu")), "settings": asdict(plan)}
    save_json(args.out, record | {"results": results, "targets": found})


if __name__ == "__main__":
    main()
