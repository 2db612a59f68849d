"""Chapter 6: four ways to bring the tokens to their experts, and what each costs.

All compute what moe.MoE.forward computes, from the same routing. A loop over the experts is easy to
read, but asks each one for its tokens, even where a single token can have only a few experts. The
layer itself sorts the pairs of a token and an expert once and cuts the sorted list. Computing all
experts for all tokens needs no order at all, and I / A times the multiplications.

A tensor's name ends in its axes: `expert_NA` has shape (N, A).
    B  sequences                      T  tokens of a sequence
    D  width of the stream            F  hidden width of an expert
    N  tokens of all sequences: B * T                 A  experts that a token goes to
    I  routed experts                 M  tokens of one expert
    1  an axis of length one

    python -m ch06_moe.dispatch            about a minute on one CPU thread; writes dispatch.json
    python -m ch06_moe.dispatch --smoke    tiny, in seconds
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from ch01_gpt2.notebook import table
from ch01_gpt2.train import environment, result_path, save_json
from ch06_moe.moe import Config, MoE


@dataclass(frozen=True)
class Plan:
    """What is timed."""

    d_model: int = 256  # D
    d_expert: int = 128  # F
    experts: tuple[tuple[int, int], ...] = ((8, 2), (32, 4), (64, 2), (64, 8))  # I, A
    n_tokens: tuple[int, ...] = (1, 16, 128, 1024)
    rounds: int = 9
    seed: int = 0


SMOKE = Plan(d_model=16, d_expert=8, experts=((4, 1), (8, 2)), n_tokens=(1, 8), rounds=2)


def loop_all(layer: MoE, x_BTD: Tensor) -> Tensor:
    """Each expert in turn collects its tokens, adds its output to theirs: (B, T, D)."""
    x_ND = x_BTD.flatten(0, 1)
    expert_NA, weight_NA = layer.route(x_ND)
    y_ND = shared_output(layer, x_ND)
    for i in range(len(layer.experts)):
        y_ND = add_expert(layer, i, x_ND, expert_NA, weight_NA, y_ND)
    return y_ND.view_as(x_BTD)


def loop_active(layer: MoE, x_BTD: Tensor) -> Tensor:
    """The same loop over the experts that any token chose: (B, T, D)."""
    x_ND = x_BTD.flatten(0, 1)
    expert_NA, weight_NA = layer.route(x_ND)
    y_ND = shared_output(layer, x_ND)
    for i in expert_NA.unique().tolist():
        y_ND = add_expert(layer, i, x_ND, expert_NA, weight_NA, y_ND)
    return y_ND.view_as(x_BTD)


def dense_all(layer: MoE, x_BTD: Tensor) -> Tensor:
    """Every expert computes every token, with weight zero where it was not chosen: (B, T, D)."""
    x_ND = x_BTD.flatten(0, 1)
    expert_NA, weight_NA = layer.route(x_ND)
    weight_NI = x_ND.new_zeros(len(x_ND), len(layer.experts)).scatter(1, expert_NA, weight_NA)
    y_ND = shared_output(layer, x_ND)
    for i, expert in enumerate(layer.experts):
        y_ND = y_ND + weight_NI[:, i, None] * expert(x_ND)
    return y_ND.view_as(x_BTD)


def shared_output(layer: MoE, x_ND: Tensor) -> Tensor:
    """What the shared experts add for each token, (N, D); zeros where there are none."""
    return torch.zeros_like(x_ND) if layer.shared is None else layer.shared(x_ND)


def add_expert(
    layer: MoE, i: int, x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor, y_ND: Tensor
) -> Tensor:
    """The outputs so far and expert i's, weighted, for the tokens that chose it: (N, D)."""
    token_M, place_M = torch.where(expert_NA == i)
    y_MD = layer.experts[i](x_ND[token_M]) * weight_NA[token_M, place_M, None]
    return y_ND.index_add(0, token_M, y_MD)


# MoE.forward is called as layer(x) calls it, without the hooks of a module.
WAYS: dict[str, Callable[[MoE, Tensor], Tensor]] = {
    "loop_all": loop_all,
    "loop_active": loop_active,
    "sorted": MoE.forward,
    "dense_all": dense_all,
}


def multiplications(how: str, n_tokens: int, cfg: Config) -> int:
    """Multiplications in the routed experts' matrices: 3 D F for each token and expert."""
    n_experts = cfg.n_experts if how == "dense_all" else cfg.n_active
    return n_tokens * n_experts * 3 * cfg.d_model * cfg.d_expert


def layer_config(plan: Plan, n_experts: int, n_active: int) -> Config:
    """The config of a layer that is timed: routed experts only."""
    sizes = {"d_model": plan.d_model, "d_expert": plan.d_expert, "n_shared": 0}
    return Config(n_experts=n_experts, n_active=n_active, **sizes)


def assert_equal(layer: MoE, x_BTD: Tensor) -> None:
    """Raises AssertionError unless all ways have the same output and the same gradients."""
    found = {how: output_and_gradients(way, layer, x_BTD) for how, way in WAYS.items()}
    for tensors in found.values():
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, found["sorted"][name], rtol=1e-4, atol=1e-5)


def output_and_gradients(
    way: Callable[[MoE, Tensor], Tensor], layer: MoE, x_BTD: Tensor
) -> dict[str, Tensor]:
    """The output, and the gradients of its mean square with respect to input and parameters.

    Zeros for an expert that nothing has reached.
    """
    x_BTD = x_BTD.clone().requires_grad_()
    y_BTD = way(layer, x_BTD)
    params = {name: param for name, param in layer.named_parameters() if param.requires_grad}
    inputs = {"x": x_BTD} | params
    grads = torch.autograd.grad(
        y_BTD.square().mean(), list(inputs.values()), allow_unused=True, materialize_grads=True
    )
    return {"output": y_BTD.detach()} | dict(zip(inputs, grads, strict=True))


def measure(layer: MoE, x_BTD: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Medians in seconds by way, the ways taking turns, after one round that does not count.

    "forward" keeps nothing for a backward pass, as in generation; "training" is a forward and a
    backward pass, and "backward" the second half of that.
    """
    seconds = {how: {"forward": [], "backward": [], "training": []} for how in WAYS}
    grad_BTD = torch.randn_like(x_BTD)
    x_BTD = x_BTD.clone().requires_grad_()
    for n in range(rounds + 1):
        for how, way in WAYS.items():
            with torch.no_grad():
                start = time.perf_counter()
                way(layer, x_BTD)
                forward = time.perf_counter() - start
            layer.zero_grad()
            x_BTD.grad = None
            start = time.perf_counter()
            y_BTD = way(layer, x_BTD)
            middle = time.perf_counter()
            y_BTD.backward(grad_BTD)
            end = time.perf_counter()
            if n > 0:
                seconds[how]["forward"].append(forward)
                seconds[how]["backward"].append(end - middle)
                seconds[how]["training"].append(end - start)
    return {how: {part: median(x) for part, x in parts.items()} for how, parts in seconds.items()}


def experiment(plan: Plan) -> dict:
    """The record: a run for each number of experts, number of tokens and way."""
    runs = []
    for n_experts, n_active in plan.experts:
        torch.manual_seed(plan.seed)
        cfg = layer_config(plan, n_experts, n_active)
        layer = MoE(cfg)
        for n_tokens in plan.n_tokens:
            x_BTD = torch.randn(1, n_tokens, cfg.d_model)
            assert_equal(layer, x_BTD)
            for how, seconds in measure(layer, x_BTD, plan.rounds).items():
                sizes = {"n_tokens": n_tokens, "n_experts": n_experts, "n_active": n_active}
                counted = {"multiplications": multiplications(how, n_tokens, cfg)}
                runs.append({"how": how} | sizes | seconds | counted)
    return {
        "environment": environment(torch.device("cpu")),
        "settings": asdict(plan) | {"dtype": "float32", "n_shared": 0},
        "runs": runs,
    }


def print_tables(record: dict) -> None:
    """Prints milliseconds by way: of a forward pass, and of a forward and a backward pass."""
    rows: dict[tuple[int, int, int], dict[str, dict]] = {}
    for run in record["runs"]:
        key = (run["n_experts"], run["n_active"], run["n_tokens"])
        rows.setdefault(key, {})[run["how"]] = run
    for part in ("forward", "training"):
        print(f"\n{part}, milliseconds")
        cells = [[*key, *(f"{1e3 * by[h][part]:.2f}" for h in WAYS)] for key, by in rows.items()]
        table(["experts", "active", "tokens", *WAYS], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--rounds", type=int, help=f"of each timing; default: {Plan.rounds}")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    args = parser.parse_args()
    args.out = args.out or result_path(__file__, args.smoke)
    torch.set_num_threads(1)
    plan = SMOKE if args.smoke else Plan()
    if args.rounds is not None:
        plan = replace(plan, rounds=args.rounds)
    record = experiment(plan)
    save_json(args.out, record)
    print_tables(record)


if __name__ == "__main__":
    main()
