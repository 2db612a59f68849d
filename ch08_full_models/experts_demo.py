"""Chapter 8, measured: what a layer of experts costs, and what of that its weights' bytes cost.

One layer of routed experts (Qwen3-MoE's router), 6 of 16, 64 or 256 experts for each token. It is
computed in ways that take turns: by the loop over all experts that one writes first, by the
family's own forward, and by that of experts.py. The last two have speed.py's vector products where
these are fast, as `load` gives them. One token is also computed as in a compiled step, eight layers
in one function: each begins when the one before it has ended. A layer is measured

- for one token, 32 different ones after each other, each through another of several layers. All
  layers together are far larger than the processor's caches, and as large for 16 experts as for
  256: they lie in the same memory, cut in another way. So the weights come from memory, always.
- for 256 tokens at once.

Beside it stands what reading the active experts' weights takes, at the speed at which torch adds up
all of that memory. A row "products alone" gives the time of each of the same experts' matrix
products and nothing else, as experts.py makes them: the least that it can take.

    D  columns of a matrix    R  rows of all matrices together    E  experts of all layers
    B  sequences    T  tokens of a sequence    N  tokens    A  experts of a token
    M  tokens of one expert    1  an axis of length one

    python -m ch08_full_models.experts_demo            three minutes; experts_demo.json
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
from ch08_full_models.decode import one_function, step_products
from ch08_full_models.experts import fast_experts, step_experts
from ch08_full_models.qwen3 import Config, MoE
from ch08_full_models.speed import mv_is_faster, parts_are_faster, vector_product, vector_products


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
    n_compiled: int = 8  # layers in one compiled function, each with a token of its own
    n_many: int = 256  # tokens at once
    rounds: int = 9
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    backend: str = "inductor"  # the compiler
    seed: int = 0


SMOKE = Plan(
    d_model=32,
    d_expert=16,
    n_active=2,
    experts=(4, 8, 16),
    middle=8,
    memory=200_000,
    n_single=4,
    n_compiled=2,
    n_many=12,
    rounds=2,
    backend="eager",
)
ONE_TOKEN = ("compiled", "products alone")  # ways that are for one token alone
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
    product = vector_product if by_mv else lambda w_RD, x_D: F.linear(x_D, w_RD)
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
        router_ID = (torch.randn(n_experts, plan.d_model) / plan.d_model**0.5).to(big_RD.dtype)
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
    torch.manual_seed(plan.seed)
    step = make_layers(plan, big_RD, n_experts)
    for layer in step:
        step_products(step_experts(layer), own_products=True)
    if mv_is_faster() if big_RD.dtype == torch.bfloat16 else parts_are_faster():
        for layer in family + fast:
            vector_products(layer)
    return {
        "loop over all": (loop_all, plain),
        "family": (lambda layer, x: layer(x), family),
        "experts.py": (lambda layer, x: layer(x), fast),
        "compiled": (compiled(plan), step),
        "products alone": (products_alone, plain),
    }


def compiled(plan: Plan) -> Callable:
    """A compiled function of layers and as many tokens (1, 1, D): what each says of its own."""

    def step(layers: list[MoE], tokens: list[Tensor]) -> list[Tensor]:
        said = [torch.zeros_like(tokens[0])]
        for layer, token_11D in zip(layers, tokens, strict=True):
            # To the compiler a layer needs the one before it, as in a model.
            said.append(layer(token_11D + 0 * said[-1]))
        return said[1:]

    return one_function(step, plan.backend)


def seconds(way: Callable, layers: list[MoE], batches: list[Tensor], first: int) -> float:
    """Seconds a batch, each through another layer; from the first-th layer on."""
    start = time.perf_counter()
    for i, x_BTD in enumerate(batches, first):
        way(layers[i % len(layers)], x_BTD)
    return (time.perf_counter() - start) / len(batches)


def compiled_seconds(way: Callable, layers: list[MoE], tokens: list[Tensor], n: int) -> float:
    """The same for a compiled function, which takes n layers at a time."""
    stacks = [[layers[i % len(layers)] for i in range(k, k + n)] for k in range(0, len(layers), n)]
    start = time.perf_counter()
    for k, i in enumerate(range(0, len(tokens), n)):
        way(stacks[k % len(stacks)], tokens[i : i + n])
    return (time.perf_counter() - start) / len(tokens)


@torch.inference_mode()
def measure(plan: Plan, dtype_name: str) -> dict:
    """Medians of one type in seconds, all that is compared taking turns."""
    dtype = getattr(torch, dtype_name)
    torch.manual_seed(plan.seed)
    big_RD = big_matrix(plan, dtype)
    by_count = {n: ways(plan, big_RD, n) for n in plan.experts}
    one = [torch.randn(1, 1, plan.d_model, dtype=dtype) for _ in range(plan.n_single)]
    many = [torch.randn(1, plan.n_many, plan.d_model, dtype=dtype)]
    assert_equal(plan, by_count, one, many[0])
    found: dict[tuple, list[float]] = {}
    for turn in range(plan.rounds + 1):  # the first one warms up
        for n_experts, by_name in by_count.items():
            for name, (way, layers) in by_name.items():
                key = (1, n_experts, name)
                time_s = (
                    compiled_seconds(way, layers, one, plan.n_compiled)
                    if name == "compiled"
                    else seconds(way, layers, one, turn)
                )
                found.setdefault(key, []).append(time_s)
                if n_experts == plan.middle and name not in ONE_TOKEN:
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


def assert_equal(plan: Plan, by_count: dict[int, dict], one: list[Tensor], many: Tensor) -> None:
    """Raises AssertionError unless all ways say the same, but for rounding."""
    tolerance = 1e-5 if many.dtype == torch.float32 else 0.03

    def equal(found: Tensor, right: Tensor) -> bool:
        return bool((found.float() - right).abs().max() <= tolerance * right.abs().max())

    for by_name in by_count.values():
        plain = by_name["loop over all"][1]
        for x_BTD in (*one[:2], many):
            right = loop_all(plain[0], x_BTD).float()
            for name, (way, layers) in by_name.items():
                assert name in ONE_TOKEN or equal(way(layers[0], x_BTD), right)
        way, layers = by_name["compiled"]
        places = [i % len(layers) for i in range(plan.n_compiled)]
        tokens = one[: plan.n_compiled]
        found = way([layers[i] for i in places], tokens)
        n_equal = sum(
            equal(y_11D, loop_all(plain[i], x_11D).float())
            for y_11D, i, x_11D in zip(found, places, tokens, strict=True)
        )
        # Its router's products are its own. Of two experts as good as each other but for the last
        # bit of bfloat16 it may take the other one.
        assert n_equal >= plan.n_compiled * (1 if many.dtype == torch.float32 else 0.75)


def targets(plan: Plan, result: dict) -> list[dict]:
    """What was to be reached in one type, the ratio found, and whether it is reached."""
    times = {(r["n_tokens"], r["n_experts"], r["way"]): r["seconds"] for r in result["runs"]}
    few, most = min(plan.experts), max(plan.experts)
    rows = []
    for way in ("experts.py", "compiled"):
        one = times[1, plan.middle, way] / result["read_active_s"]
        growth = times[1, most, way] / times[1, few, way]
        rows += [
            (f"{way}: one token / reading its experts", one, READ_TARGET, False),
            (f"{way}: one token, {most} experts / {few}", growth, GROWTH_TARGET, False),
        ]
    loop, ours = (times[plan.n_many, plan.middle, w] for w in ("loop over all", "experts.py"))
    what = f"experts.py: {plan.n_many} tokens, times as fast as the loop"
    rows.append((what, loop / ours, LOOP_TARGET, True))
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
