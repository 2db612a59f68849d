"""Chapter 2, the experiment: what happens to a model past the length that it was trained on?

Trains four kinds of small model on short texts: chapter 1's position table, rope, ALiBi, and
attention without positions (NoPE). Measures their held-out loss position by position on texts
eight times as long: as they are, with each way to stretch rope's frequencies put in at test time,
and after a short fine-tune on long texts. All see the same batches, and the same held-out text.

The text is the source of Python's standard library, where names come back far apart, so that
context matters; it differs a little from one Python version to the next.

    python -m ch02_rope.length                       all of it, about half an hour on one core
    python -m ch02_rope.length --smoke --out FILE    in seconds, too small to mean anything

Letters: as in rope.py, W windows of held-out text, N = T + 1 tokens of a window.
"""

import argparse
import copy
import statistics
import sysconfig
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ch01_gpt2 import gpt2
from ch01_gpt2.data import encode, load_text, split
from ch01_gpt2.train import TrainConfig, environment, result_path, save_json, train
from ch02_rope import rope
from ch02_rope.rope_scaling import (
    alibi_bias,
    alibi_slopes,
    llama3,
    ntk_aware,
    position_interpolation,
    rope_frequencies,
    yarn,
    yarn_attention_factor,
)

TRAINED = {  # kind of model that is trained: what is then done to its positions
    "learned": ("learned",),
    "rope": ("rope", "interpolation", "ntk", "abf", "yarn", "llama3"),
    "alibi": ("alibi",),
    "nope": ("nope",),
}
EDGES = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 9 / 8, 5 / 4, 3 / 2, 2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment. Lengths are in tokens."""

    train_len: int = 128
    factor: int = 8  # how many times longer the texts are that it is tested on
    n_layers: int = 4
    d_model: int = 96
    n_heads: int = 3
    head_dim: int = 32
    d_ff: int = 384
    n_vocab: int = 1024
    theta: float = 10_000.0
    abf_theta: float = 500_000.0  # the larger base: Llama 3's
    low_freq_factor: float = 1.0  # Llama 3.1's
    high_freq_factor: float = 4.0
    steps: int = 320
    batch_size: int = 16  # sequences
    lr: float = 3e-3
    tune_steps: int = 40
    tune_batch_size: int = 2
    tune_lr: float = 1e-3
    n_windows: int = 32  # held-out texts of factor x train_len tokens
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def test_len(self) -> int:
        return self.factor * self.train_len


SMOKE = Settings(
    train_len=32, n_layers=1, steps=12, batch_size=4, tune_steps=2, n_windows=2, seeds=(0, 1)
)


def fused_attend(
    q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, mask_BTS: Tensor, scale: float
) -> Tensor:
    """rope.py's attend, (B, T, H, K), by torch's fused function: long texts take less time."""
    q_BHTK, k_BHSK, v_BHSK = (x.transpose(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    mask_B1TS = mask_BTS[:, None]
    y_BHTK = F.scaled_dot_product_attention(
        q_BHTK, k_BHSK, v_BHSK, attn_mask=mask_B1TS, scale=scale
    )
    return y_BHTK.transpose(1, 2)


class AlibiAttention(rope.Attention):
    """Attention without rotation: each head's scores fall with the distance (Press et al. 2021)."""

    def forward(
        self, x_BTD: Tensor, pos_BT: Tensor, turn: tuple[Tensor, Tensor], cache: rope.LayerCache
    ) -> Tensor:
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTHK = self.k_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTHK = self.v_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BSHK, v_BSHK, pos_BS = cache.append(k_BTHK, v_BTHK, pos_BT)
        slopes_H = alibi_slopes(q_BTHK.shape[2]).to(x_BTD.device)
        scores_BHTS = torch.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK) * self.head_dim**-0.5
        scores_BHTS = scores_BHTS + alibi_bias(slopes_H, pos_BT, pos_BS)
        mask_BTS = rope.causal_mask(pos_BT, pos_BS)
        weights_BHTS = scores_BHTS.masked_fill(~mask_BTS[:, None], -torch.inf).softmax(dim=-1)
        y_BTHK = torch.einsum("BHTS,BSHK->BTHK", weights_BHTS, v_BSHK)
        return self.o_proj(y_BTHK.flatten(-2))


def new_model(kind: str, settings: Settings, seed: int) -> nn.Module:
    """An untrained model of that kind; those without a table start with equal weights."""
    sizes = dict(
        vocab_size=settings.n_vocab,
        n_layers=settings.n_layers,
        d_model=settings.d_model,
        n_heads=settings.n_heads,
        head_dim=settings.head_dim,
        d_ff=settings.d_ff,
    )
    torch.manual_seed(seed)
    if kind == "learned":
        return gpt2.Transformer(gpt2.Config(max_seq_len=settings.train_len, **sizes))
    attention = AlibiAttention if kind == "alibi" else rope.Attention
    with patch.object(rope, "Attention", attention):
        return rope.Transformer(rope.Config(rope_theta=settings.theta, **sizes))


def frequencies(method: str, settings: Settings) -> tuple[Tensor, float]:
    """The method's frequencies (P,), and what it multiplies cosine and sine by."""
    pairs, factor = (settings.head_dim, settings.theta), settings.factor
    plain_P = rope_frequencies(*pairs)
    bands = (settings.low_freq_factor, settings.high_freq_factor, settings.train_len)
    freq_P = {
        "learned": plain_P,  # not used, and ALiBi's neither
        "alibi": plain_P,
        "rope": plain_P,
        "nope": torch.zeros_like(plain_P),
        "interpolation": position_interpolation(*pairs, factor),
        "ntk": ntk_aware(*pairs, factor),
        "abf": rope_frequencies(settings.head_dim, settings.abf_theta),
        "yarn": yarn(*pairs, factor, settings.train_len),
        "llama3": llama3(*pairs, factor, *bands),
    }[method]
    return freq_P, yarn_attention_factor(factor) if method == "yarn" else 1.0


@contextmanager
def positions(method: str, settings: Settings) -> Iterator[None]:
    """Within it, models of rope.py use the method's frequencies."""
    freq_P, factor = frequencies(method, settings)
    plain_angles = rope.rope_angles

    def angles(pos_BT: Tensor, freq_P: Tensor) -> tuple[Tensor, Tensor]:
        cos_BT1P, sin_BT1P = plain_angles(pos_BT, freq_P)
        return factor * cos_BT1P, factor * sin_BT1P

    with (
        patch.object(rope, "rope_frequencies", lambda head_dim, theta: freq_P),
        patch.object(rope, "rope_angles", angles),
        patch.object(rope, "attend", fused_attend),
    ):
        yield


def held_out_windows(tokens: Tensor, settings: Settings) -> Tensor:
    """Windows (W, N) of test_len + 1 tokens, spread evenly over the text, none overlapping another.

    Raises ValueError for a text that is too short for them.
    """
    width = settings.test_len + 1
    stride = len(tokens) // settings.n_windows
    if stride < width:
        raise ValueError(f"{len(tokens)} held-out tokens, expected {settings.n_windows * width}")
    start_W1 = stride * torch.arange(settings.n_windows)[:, None]
    return tokens[start_W1 + torch.arange(width)]


@torch.no_grad()
def losses_by_position(model: nn.Module, window_WN: Tensor, batch_size: int) -> Tensor:
    """Loss of the token after each position, in nats, mean over the windows, (T,)."""
    total_T = torch.zeros(window_WN.shape[1] - 1)
    for part_BN in window_WN.split(batch_size):
        logits_BVT = model(part_BN[:, :-1]).transpose(1, 2)
        total_T += F.cross_entropy(logits_BVT, part_BN[:, 1:], reduction="none").sum(dim=0)
    return total_T / len(window_WN)


def measure(model: nn.Module, window_WN: Tensor, settings: Settings, edges: list[int]) -> dict:
    """Loss a bin of positions, and the mean loss on the same text cut to the trained length.

    Bins that the model cannot reach are None.
    """
    n, limit = settings.train_len, getattr(model.cfg, "max_seq_len", settings.test_len)
    loss_T = losses_by_position(model, window_WN[:, : limit + 1], 1)
    bins = [loss_T[a:b].mean().item() if b <= limit else None for a, b in pairwise(edges)]
    starts = range(0, settings.test_len, n)
    short = torch.cat([window_WN[:, start : start + n + 1] for start in starts])
    short_loss = losses_by_position(model, short, settings.factor).mean().item()
    return {"loss": bins, "val_loss_train_len": short_loss}


def train_kind(
    kind: str, seed: int, settings: Settings, train_tokens: Tensor, val_tokens: Tensor
) -> nn.Module:
    """A model of that kind after its training on short texts."""
    cfg = TrainConfig(
        steps=settings.steps,
        batch_size=settings.batch_size,
        seq_len=settings.train_len,
        lr=settings.lr,
        eval_every=settings.steps,
        eval_tokens=settings.test_len,  # next to nothing: `measure` does it
        seed=seed,
    )
    model = new_model(kind, settings, seed)
    with positions(kind, settings):
        train(model, train_tokens, val_tokens, cfg, device="cpu", progress=False)
    return model


def tune(
    model: nn.Module, seed: int, settings: Settings, train_tokens: Tensor, val_tokens: Tensor
) -> nn.Module:
    """A copy of the model after some steps on long texts."""
    cfg = TrainConfig(
        steps=settings.tune_steps,
        batch_size=settings.tune_batch_size,
        seq_len=settings.test_len,
        lr=settings.tune_lr,
        eval_every=settings.tune_steps,
        eval_tokens=settings.test_len,
        seed=1000 + seed,  # other batches than in the training
    )
    model = copy.deepcopy(model)
    train(model, train_tokens, val_tokens, cfg, device="cpu", progress=False)
    return model


def run_seed(
    seed: int, settings: Settings, train_tokens: Tensor, val_tokens: Tensor, edges: list[int]
) -> Iterator[dict]:
    """Yields the record of each method, as it is and after tuning."""
    window_WN = held_out_windows(val_tokens, settings)
    for kind, methods in TRAINED.items():
        model = train_kind(kind, seed, settings, train_tokens, val_tokens)
        for method in methods:
            run = {"method": method, "tuned": False, "seed": seed}
            with positions(method, settings):
                yield run | measure(model, window_WN, settings, edges)
                if method == "learned":
                    continue
                tuned = tune(model, seed, settings, train_tokens, val_tokens)
                yield run | {"tuned": True} | measure(tuned, window_WN, settings, edges)


def source_text() -> str:
    """The modules of the standard library that are single files, by name, one after the other."""
    return load_text(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))


def mean_between(run: dict, edges: list[int], first: int, last: int) -> float | None:
    """A run's mean loss over the positions from first to last - 1, both of them edges."""
    bins = zip(pairwise(edges), run["loss"], strict=True)
    parts = [(b - a, loss) for (a, b), loss in bins if first <= a and b <= last]
    if any(loss is None for _, loss in parts):
        return None
    return sum(width * loss for width, loss in parts) / (last - first)


def print_table(record: dict) -> None:
    """Loss within the trained length and past it: mean over the seeds, and standard deviation."""
    edges, n = record["edges"], record["settings"]["train_len"]
    spans = [(0, n), (n, 2 * n), (2 * n, 4 * n), (edges[-1] - n, edges[-1])]
    heads = [f"texts of {n}"] + [f"{first}-{last}" for first, last in spans]
    print(f"{'nats a token':22}" + "".join(f"{head:>15}" for head in heads))
    for tuned in (False, True):
        for method in [method for methods in TRAINED.values() for method in methods]:
            runs = [r for r in record["runs"] if (r["method"], r["tuned"]) == (method, tuned)]
            if not runs:
                continue
            columns = [[r["val_loss_train_len"] for r in runs]]
            columns += [[mean_between(r, edges, *span) for r in runs] for span in spans]
            cells = "".join(f"{mean_and_spread(losses):>15}" for losses in columns)
            print(f"{method + ', tuned' * tuned:22}" + cells)


def mean_and_spread(losses: list[float | None]) -> str:
    """The seeds' mean and standard deviation, or a dash for what was not measured."""
    if None in losses:
        return "-"
    spread = f" ±{statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, in seconds: for a test")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    args = parser.parse_args()
    args.out = args.out or result_path(__file__, args.smoke)
    torch.set_num_threads(1)  # more gain nothing at this size
    settings = SMOKE if args.smoke else Settings()
    tokens = encode(source_text(), settings.n_vocab)
    train_tokens, val_tokens = split(tokens, val_fraction=0.1)
    edges = [round(share * settings.train_len) for share in EDGES]
    text = f"standard library, {len(tokens):,} tokens, CRC {zlib.crc32(tokens.numpy()):08x}"
    record = {
        "environment": environment(torch.device("cpu")),
        "settings": asdict(settings) | {"text": text},
        "edges": edges,
        "runs": [],
    }
    start = time.perf_counter()
    for seed in settings.seeds:
        for run in run_seed(seed, settings, train_tokens, val_tokens, edges):
            record["runs"].append(run)
            minutes = (time.perf_counter() - start) / 60
            name = run["method"] + ", tuned" * run["tuned"]
            print(f"{minutes:5.1f} min   seed {seed}   {name}", flush=True)
        save_json(args.out, record)  # so that a run that is stopped leaves whole seeds
    print_table(record)


if __name__ == "__main__":
    main()
