"""Chapter 4: what the two forms of latent attention cost, counted and measured.

Both forms give the same result from the same cache. The expanded one makes every head's keys and
values from the latents of all tokens, the absorbed one works on the latents themselves. Counted is
one layer and one sequence, from the cache and the queries to each head's sum of values: the part
in which the forms differ. The letters are those of mla.py:

    T  new tokens   S  all tokens, the new ones too   H  heads
    K  width of a head's part that does not turn      R  of the part that does
    U  width of a head's value                        C  latent

The measurement takes the widths of DeepSeek-V2-Lite, float32, and one thread.

    python -m ch04_mla.cost            a minute or two; writes cost.json
    python -m ch04_mla.cost --smoke    the same in seconds, with widths that say nothing
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from ch01_gpt2.notebook import table
from ch01_gpt2.train import environment, result_path, save_json
from ch04_mla.mla import Config, LatentAttention, causal_mask

FORMS = ("expanded", "absorbed")


@dataclass(frozen=True)
class Shape:
    """Widths of a latent attention layer, in numbers."""

    n_heads: int  # H
    head_dim: int  # K
    d_rope: int  # R
    d_value: int  # U
    d_latent: int  # C


V2_LITE = Shape(n_heads=16, head_dim=128, d_rope=64, d_value=128, d_latent=512)
V3 = Shape(n_heads=128, head_dim=128, d_rope=64, d_value=128, d_latent=512)


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    shape: Shape = V2_LITE
    contexts: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)  # tokens, one of them new
    crossing_context: int = 2048  # tokens
    crossing_n_new: tuple[int, ...] = (1, 16, 64, 96, 128, 160, 192, 256, 384, 512)
    rounds: int = 7


SMOKE = Plan(Shape(2, 16, 8, 16, 32), (16, 32), 32, (1, 4, 8, 16, 32), 5)


def products(shape: Shape, n_new: int, n_all: int, form: str) -> dict[str, int]:
    """Multiplications of numbers in each matrix product of a form, for one layer and sequence.

    Every query is multiplied with every key, those that the mask hides too: so does attend.
    Raises ValueError for a form that is not one of FORMS.
    """
    T, S = n_new, n_all
    H, K, R, U, C = astuple(shape)
    if form == "expanded":
        return {
            "keys and values from latents": S * C * H * (K + U),
            "queries times keys": T * S * H * (K + R),
            "weights times values": T * S * H * U,
        }
    if form == "absorbed":
        return {
            "queries to latents": T * H * K * C,
            "queries times keys": T * S * H * (C + R),
            "weights times values": T * S * H * C,
            "values from latents": T * H * C * U,
        }
    raise ValueError(f"form: {form!r}, expected one of {', '.join(FORMS)}")


def multiplications(shape: Shape, n_new: int, n_all: int, form: str) -> int:
    """Multiplications of numbers, each with its addition, for one layer and sequence."""
    return sum(products(shape, n_new, n_all, form).values())


def cache_bytes(shape: Shape, n_all: int, bytes_a_number: int = 4) -> int:
    """Bytes that a layer caches for one sequence of n_all tokens, in either form."""
    return n_all * (shape.d_latent + shape.d_rope) * bytes_a_number


def bytes_read(shape: Shape, n_new: int, n_all: int, form: str, bytes_a_number: int = 4) -> int:
    """Bytes that must go through memory for one layer and sequence, the two forms' difference.

    Counted are the weights of kv_b_proj and the cache, each read once, and in the expanded form
    its keys and values, written once and read once. Not counted is what both forms have alike
    (queries, scores, outputs), nor are the copies that cat and einsum make: a better program does
    without them. So n_new plays no part. Raises ValueError for another form than those of FORMS.
    """
    S = n_all
    H, K, R, U, C = astuple(shape)
    weights = H * (K + U) * C * bytes_a_number
    made = {"expanded": S * H * (K + R + U) * bytes_a_number, "absorbed": 0}
    if form not in made:
        raise ValueError(f"form: {form!r}, expected one of {', '.join(FORMS)}")
    return weights + cache_bytes(shape, n_all, bytes_a_number) + 2 * made[form]


def crossing(shape: Shape, n_all: float) -> float:
    """New tokens, of n_all tokens in all, at which both forms take as many multiplications.

    With fewer the absorbed form takes fewer. Tends to C (K + U) / (2C - K - U) for large n_all,
    which may be math.inf; infinite where the absorbed form always takes fewer.
    """
    H, K, R, U, C = astuple(shape)
    wider = 2 * C - (K + U)  # what a query and a token cost more in the absorbed form
    if wider <= 0:
        return math.inf
    if n_all == math.inf:
        return C * (K + U) / wider
    return n_all * C * (K + U) / (C * (K + U) + n_all * wider)


def layer_of(shape: Shape) -> LatentAttention:
    """A layer with random weights. As wide a stream as all heads, which is so in V2-Lite."""
    cfg = Config(
        d_model=shape.n_heads * shape.head_dim,
        n_heads=shape.n_heads,
        head_dim=shape.head_dim,
        d_latent=shape.d_latent,
        d_q_latent=None,
        d_rope=shape.d_rope,
        d_value=shape.d_value,
    )
    return LatentAttention(cfg, window=None)


def calls(layer: LatentAttention, n_new: int, n_all: int) -> dict[str, Callable]:
    """Both forms by name, ready to be called: on random queries and a random cache."""
    head_dim, d_rope = layer.q_widths
    n_heads = layer.kv_b_proj.out_features // sum(layer.kv_widths)
    q_BTHK = torch.randn(1, n_new, n_heads, head_dim)
    q_rot_BTHR = torch.randn(1, n_new, n_heads, d_rope)
    c_BSC = torch.randn(1, n_all, layer.cache_widths[0])
    k_rot_BSR = torch.randn(1, n_all, d_rope)
    pos_BS = torch.arange(n_all)[None]
    mask_BTS = causal_mask(pos_BS[:, n_all - n_new :], pos_BS, None)
    inputs = (q_BTHK, q_rot_BTHR, c_BSC, k_rot_BSR, mask_BTS)
    return {form: lambda form=form: getattr(layer, form)(*inputs) for form in FORMS}


@torch.inference_mode()
def seconds(layer: LatentAttention, n_new: int, n_all: int, rounds: int) -> dict[str, float]:
    """Median seconds of each form. They take turns; the first round warms up, uncounted."""
    forms = calls(layer, n_new, n_all)
    times: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(rounds + 1):
        for form, call in forms.items():
            start = time.perf_counter()
            call()
            times[form].append(time.perf_counter() - start)
    return {form: median(each[1:]) for form, each in times.items()}


def measured_crossing(n_new: Iterable[int], gaps: Iterable[float]) -> float | None:
    """Where the gaps (absorbed less expanded, seconds) first rise above zero.

    A straight line is drawn between neighbours. None where they do not rise above it.
    """
    points = zip(n_new, gaps, strict=True)
    for (before, low), (after, high) in pairwise(points):
        if low <= 0 < high:
            return before + (after - before) * -low / (high - low)
    return None


def experiment(plan: Plan) -> dict:
    """Measures, and returns the record that becomes the JSON."""
    torch.manual_seed(0)
    layer = layer_of(plan.shape).eval()
    by_context = [seconds(layer, 1, n_all, plan.rounds) for n_all in plan.contexts]
    at_once = [
        seconds(layer, n_new, plan.crossing_context, plan.rounds) for n_new in plan.crossing_n_new
    ]
    gaps = [times["absorbed"] - times["expanded"] for times in at_once]
    return {
        "environment": environment(torch.device("cpu")),
        "settings": {"rounds": plan.rounds, "dtype": "float32", "bytes_a_number": 4},
        "shape": asdict(plan.shape),
        "contexts": list(plan.contexts),
        "runs": [
            {
                "n_new": 1,
                "form": form,
                "seconds": [times[form] for times in by_context],
                "multiplications": [
                    multiplications(plan.shape, 1, n_all, form) for n_all in plan.contexts
                ],
                "bytes_read": [bytes_read(plan.shape, 1, n_all, form) for n_all in plan.contexts],
            }
            for form in FORMS
        ],
        "crossing": {
            "context": plan.crossing_context,
            "n_new": list(plan.crossing_n_new),
            **{form: [times[form] for times in at_once] for form in FORMS},
            "predicted": crossing(plan.shape, plan.crossing_context),
            "measured": measured_crossing(plan.crossing_n_new, gaps),
        },
    }


def print_tables(record: dict) -> None:
    """Prints the times by context, then the times by new tokens, and where they cross."""
    expanded, absorbed = record["runs"]
    rows = []
    for i, context in enumerate(record["contexts"]):
        ratios = [
            round(expanded[key][i] / absorbed[key][i], 1)
            for key in ("seconds", "multiplications", "bytes_read")
        ]
        millis = [round(run["seconds"][i] * 1e3, 2) for run in (expanded, absorbed)]
        rows.append([context, *millis, *ratios])
    head = ["context", "expanded ms", "absorbed ms", "ratio"]
    print("one new token; ratios are expanded to absorbed")
    table([*head, "of multiplications", "of bytes"], rows)
    cross = record["crossing"]
    print(f"\ncontext {cross['context']:,}")
    pairs = zip(cross["n_new"], cross["expanded"], cross["absorbed"], strict=True)
    rows = [[n, round(e * 1e3, 2), round(a * 1e3, 2), round(e / a, 2)] for n, e, a in pairs]
    table(["new tokens", *head[1:]], rows)
    measured = cross["measured"]
    found = "not within these" if measured is None else f"at {measured:.0f} new tokens"
    print(f"the times cross {found}, the multiplications at {cross['predicted']:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    args = parser.parse_args()
    args.out = args.out or result_path(__file__, args.smoke)
    torch.set_num_threads(1)
    record = experiment(SMOKE if args.smoke else Plan())
    save_json(args.out, record)
    print_tables(record)


if __name__ == "__main__":
    main()
