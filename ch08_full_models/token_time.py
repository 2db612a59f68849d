"""Chapter 8, measured: where the time of one token goes, and what each step to less gains.

    python -m ch08_full_models.token_time            Gemma 3 270M; writes token_time.json
    python -m ch08_full_models.token_time --smoke    a tiny model, to see that it works

A model reads each of its weights once a token. So there is a floor: the bytes of the weights, over
the speed at which this machine reads memory, which is measured in the same rounds. Above the floor
lie the matrix products, which do not reach that speed, attention, and many small operations. All
variants hold the same weights and text; they take turns, a few tokens each, and the record has
medians over the rounds. Of the bfloat16 products three are measured: torch's linear, torch.mv, and
the compiler's own. Which is best depends on the processor.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ch01_gpt2.train import environment, result_path, save_json
from ch08_full_models import llama3, speed
from ch08_full_models.checkpoint import load
from ch08_full_models.decode import (
    TwoStepHead,
    compiled_steps,
    grouped_attention,
    plain_decode,
    short_norms,
    two_step_head,
)
from ch08_full_models.speed import plain_products, quantize, vector_products, weight_bytes

# variant: dtype, quantize, and the steps taken after that
VARIANTS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "float32": ("float32", None, ()),
    "float32, in parts": ("float32", None, ("mv",)),
    "float32, compiled, its own products": ("float32", None, ("own products",)),
    "bfloat16": ("bfloat16", None, ()),
    "bfloat16, mv": ("bfloat16", None, ("mv",)),
    "bfloat16, mv, grouped": ("bfloat16", None, ("mv", "grouped")),
    "bfloat16, mv, grouped, norms": ("bfloat16", None, ("mv", "grouped", "norms")),
    "bfloat16, grouped, norms": ("bfloat16", None, ("grouped", "norms")),
    "bfloat16, compiled": ("bfloat16", None, ("mv", "grouped", "compiled")),
    "bfloat16, compiled, two-step head": (
        "bfloat16", None, ("mv", "grouped", "two-step head", "compiled"),
    ),
    "int8": ("bfloat16", "int8", ("grouped", "norms")),
    "int8, compiled": ("bfloat16", "int8", ("grouped", "compiled")),
    "int4": ("bfloat16", "int4", ("grouped", "norms")),
    "int4, compiled": ("bfloat16", "int4", ("grouped", "compiled")),
    "bfloat16, compiled, its own products": ("bfloat16", None, ("grouped", "own products")),
    "bfloat16, compiled, its own products, two-step head": (
        "bfloat16", None, ("grouped", "two-step head", "own products"),
    ),
}  # fmt: skip


@dataclass
class Plan:
    """Sizes of the experiment."""

    models: tuple[str, ...] = ("gemma3-270m",)
    contexts: tuple[int, ...] = (512, 4096)
    rounds: int = 7
    tokens: int = 4  # by each variant in a round
    n_read: int = 1 << 26  # int64 numbers that are read to measure the memory's speed


SMOKE = Plan(models=("tiny",), contexts=(12,), rounds=2, tokens=1, n_read=1 << 10)
TINY = dict(vocab_size=64, n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=64)


def build(name: str, variant: str) -> nn.Module:
    """The model of that name, with the variant's steps taken."""
    dtype, kind, steps = VARIANTS[variant]
    if name == "tiny":
        torch.manual_seed(0)
        model = llama3.Transformer(llama3.Config(**TINY)).eval().to(getattr(torch, dtype))
        model = quantize(model, kind) if kind else model
    else:
        model, _ = load(name, dtype, "cpu", kind)
        plain_decode(plain_products(model))
    if "mv" in steps:
        vector_products(model)
    if "grouped" in steps:
        grouped_attention(model)
    if "norms" in steps:
        short_norms(model)
    if "two-step head" in steps:
        two_step_head(model)
    if "compiled" in steps or "own products" in steps:
        backend = "eager" if name == "tiny" else "inductor"
        compiled_steps(model, backend, "own products" in steps)
    return model


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Line:
    """One variant, a text in its cache, and what its tokens took."""

    def __init__(self, model: nn.Module, variant: str, prompt_1T: Tensor) -> None:
        self.model, self.variant = model, variant
        self.token_11 = prompt_1T[:, -1:]
        self.cache = self.model.new_cache()
        self.model(prompt_1T, self.cache, last_only=True)
        self.first_s = self.step()  # compiles, for the first text
        self.step()
        self.ms: list[float] = []

    def step(self) -> float:
        return seconds(lambda: self.model(self.token_11, self.cache, last_only=True))

    def products_ms(self) -> float:
        """All matrix products of one token and nothing else, the head included."""
        matrices = [m for m in self.model.modules() if isinstance(m, MATRICES)]
        inputs = {m.in_features: torch.randn(1, 1, m.in_features) for m in matrices}
        head = getattr(self.model, "head", None)
        weight = None if head is not None else self.model.embed.weight
        dtype = self.model.norm.weight.dtype if weight is None else weight.dtype
        inputs = {width: x.to(dtype) for width, x in inputs.items()}
        state = torch.randn(1, 1, self.model.cfg.d_model).to(dtype)

        def products() -> None:
            for matrix in matrices:
                matrix(inputs[matrix.in_features])
            if weight is not None:
                F.linear(state, weight)

        return 1000 * seconds(products)

    def attention_ms(self) -> float:
        """All layers' attention over what their caches hold, and nothing else."""
        cfg = self.model.cfg

        def attention() -> None:
            for layer in self.cache:
                n = min(layer.n_seen, layer.buffers[0].shape[1])
                k_BSJK, v_BSJK = (buffer[:, :n] for buffer in layer.buffers[:2])
                q_BJGK = k_BSJK.new_zeros(1, cfg.n_kv_heads, cfg.n_heads // cfg.n_kv_heads,
                                          cfg.head_dim)  # fmt: skip
                F.scaled_dot_product_attention(
                    q_BJGK, k_BSJK.transpose(1, 2), v_BSJK.transpose(1, 2)
                )

        return 1000 * seconds(attention)


SQUARE = 1024  # rows and columns of the product that shows how fast this machine multiplies
MATRICES = (nn.Linear, speed.Int8Matrix, speed.Int4Matrix)


def measure(models: dict[str, nn.Module], name: str, plan: Plan) -> list[dict]:
    """For each context: milliseconds a token of each variant and of its parts, all by turns."""
    vocab = TINY["vocab_size"] if name == "tiny" else 49152
    seed = torch.Generator().manual_seed(0)
    text_1T = torch.randint(0, vocab, (1, max(plan.contexts)), generator=seed)
    lines = [
        (context, Line(model, variant, text_1T[:, :context]))
        for context in plan.contexts
        for variant, model in models.items()
    ]
    parts = {line: ([], []) for _, line in lines if "compiled" not in line.variant}
    numbers, reads = torch.ones(plan.n_read, dtype=torch.int64), []
    square, squares = torch.zeros(SQUARE, SQUARE, dtype=torch.bfloat16), []
    for _ in range(plan.rounds):
        reads.append(seconds(numbers.sum))
        squares.append(seconds(lambda: square @ square))
        for _, line in sorted(lines, key=lambda one: list(models).index(one[1].variant)):
            line.ms += [1000 * line.step() for _ in range(plan.tokens)]
            if line in parts:
                parts[line][0].append(line.products_ms())
                parts[line][1].append(line.attention_ms())
    gb_s = numbers.nbytes / statistics.median(reads) / 1e9
    found: dict[int, dict] = {context: {} for context in plan.contexts}
    for context, line in lines:
        n_weights, n_cached = bytes_read(line.model), sum(c.n_bytes() for c in line.cache)
        found[context][line.variant] = {
            "ms": round(statistics.median(line.ms), 3),
            "all_ms": [round(ms, 3) for ms in line.ms],
            "first_s": round(line.first_s, 2),
            "weight_bytes": n_weights,
            "cache_bytes": n_cached,
            "floor_ms": round((n_weights + n_cached) / gb_s / 1e6, 3),
        }
        if line in parts:
            products, attention = parts[line]
            found[context][line.variant] |= {
                "products_ms": round(statistics.median(products), 3),
                "attention_ms": round(statistics.median(attention), 3),
            }
    return [
        {
            "model": name,
            "context": context,
            "read_gb_s": round(gb_s, 2),
            "matmul_gflop_s": round(2e-9 * SQUARE**3 / statistics.median(squares), 1),
            "variants": variants,
        }
        for context, variants in found.items()
    ]


def bytes_read(model: nn.Module) -> int:
    """Bytes of the weights, the rough copy of a head in two steps aside."""
    copies = [m for m in model.modules() if isinstance(m, TwoStepHead)]
    return weight_bytes(model) - sum(b.nbytes for m in copies for b in m.buffers(recurse=False))


def print_run(run: dict) -> None:
    print(f"\n{run['model']}, {run['context']} tokens before; memory {run['read_gb_s']} GB/s")
    print(f"{'':40}{'ms':>8}{'tok/s':>8}{'floor':>8}{'products':>10}{'attention':>11}")
    for name, v in run["variants"].items():
        parts = [f"{v[key]:.1f}" if key in v else "" for key in ("products_ms", "attention_ms")]
        print(f"  {name:38}{v['ms']:8.1f}{1000 / v['ms']:8.1f}{v['floor_ms']:8.1f}"
              f"{parts[0]:>10}{parts[1]:>11}", flush=True)  # fmt: skip


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    args = parser.parse_args()
    plan = SMOKE if args.smoke else Plan()
    runs = []
    for name in plan.models:
        models = {variant: build(name, variant) for variant in VARIANTS}
        for run in measure(models, name, plan):
            runs.append(run)
            print_run(run)
    record = {"environment": environment(torch.device("cpu")), "settings": asdict(plan)}
    save_json(args.out or result_path(__file__, args.smoke), record | {"runs": runs})


if __name__ == "__main__":
    main()
