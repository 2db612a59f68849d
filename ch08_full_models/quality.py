"""Chapter 8, measured: what integers in place of weights cost in quality, for their bytes.

For each way to quantize: the bytes of the weights, the mean KL divergence in nats a token of the
predictions from the float32 model's, and the change of the loss, on 20,000 tokens for what `load`
offers and on a quarter of them for the rest. The text is the one that comes with every Python, its
help topics. Calibration sees a later part of it.

    python -m ch08_full_models.quality --resume    quality.json: goes on with what it lacks

All ways on both models take an hour on two cores. The committed record has the first six for
Gemma 3 270M, and the tests hold it to this:
- int8 changes the loss by less than 0.5 percent, int4 by less than 4 percent.
- Compensating errors on calibration text lowers the KL, that of int4 by half.
- int4, which leaves keys, values, up and down projections in int8, still has several times int8's
  KL and saves little more than a twentieth of its bytes: two thirds of Gemma's weights are the
  embedding, which is int8 in both.

Each window starts with the token that starts a text, where the model has one. Gemma without it
predicts badly, and small changes of its weights seem large.
"""

import argparse
import json
import pydoc_data.topics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ch01_gpt2.train import environment, result_path, save_json
from ch08_full_models.checkpoint import fetch, load
from ch08_full_models.speed import INT4_GROUP, quantize, weight_bytes

NAMES = ("gemma3-270m", "smollm2-135m")
WINDOW, KL_WINDOW, N_KL = 512, 128, 8  # tokens of a window; for KL; how many of the latter
N_CALIBRATION = 16  # windows
LESS = ("k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Way:
    """A way to keep the weights."""

    dtype: str = "bfloat16"
    kind: str | None = None
    eight_bits: tuple[str, ...] | None = None  # None: speed.EIGHT_BITS
    calibrated: bool = False
    plain: bool = False  # 4 bits from each group's least to its largest number


WAYS = {
    "float32": Way("float32"),
    "bfloat16": Way(),
    "int8": Way(kind="int8"),
    "int4": Way(kind="int4"),
    "int8, calibrated": Way(kind="int8", calibrated=True),
    "int4, calibrated": Way(kind="int4", calibrated=True),
    "int4, gates in int8": Way(kind="int4", eight_bits=LESS),
    "int4, gates in int8, calibrated": Way(kind="int4", eight_bits=LESS, calibrated=True),
    "int4 in all layers, plain rounding": Way(kind="int4", eight_bits=(), plain=True),
    "int4 in all layers": Way(kind="int4", eight_bits=()),
    "int4 in all layers, calibrated": Way(kind="int4", eight_bits=(), calibrated=True),
}

ALL_TOKENS = ("float32", "bfloat16", "int8", "int4")  # the others' loss is that of fewer windows
SPARSE = 4


def made(path: Path, way: Way, calibration_BT: Tensor) -> nn.Module:
    """The model of the file or folder with its weights kept that way."""
    model, _ = load(path, way.dtype, "cpu")
    if way.plain:
        round_plainly(model)
    if way.kind:
        more = {} if way.eight_bits is None else {"eight_bits": way.eight_bits}
        quantize(model, way.kind, calibration_BT if way.calibrated else None, **more)
    return model


@torch.no_grad()
def round_plainly(model: nn.Module) -> None:
    """Puts the layers' matrices on grids of 16 numbers, from each group's least to its largest."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            w_NGC = module.weight.float().unflatten(1, (-1, INT4_GROUP))
            low_NG1, high_NG1 = w_NGC.amin(dim=2, keepdim=True), w_NGC.amax(dim=2, keepdim=True)
            step_NG1 = ((high_NG1 - low_NG1) / 15).clamp(min=1e-8)
            rounded_NGC = ((w_NGC - low_NG1) / step_NG1).round() * step_NG1 + low_NG1
            module.weight.copy_(rounded_NGC.flatten(1))


# Text


def text_tokens(tokenizer: object, n_tokens: int) -> tuple[list[int], list[int]]:
    """The help topics' tokens: the first n_tokens, and as many later ones as calibration takes.

    The first of both is the token that starts a text, if the tokenizer puts one.
    """
    topics = pydoc_data.topics.topics
    words = "\n".join(topics[key] for key in sorted(topics))
    tokens = tokenizer.encode(words[: 8 * n_tokens])[:n_tokens]
    n_later = N_CALIBRATION * WINDOW
    later = tokenizer.encode(words[-8 * n_later :])[:n_later]
    assert len(tokens) == n_tokens and len(later) == n_later
    assert 8 * (n_tokens + n_later) < len(words)  # so that they do not meet
    return tokens, later


def windows(tokens: list[int], size: int) -> Tensor:
    """The tokens in windows (B, T), all with the first token first, if that starts every text."""
    starts = tokens[:1] if tokens.count(tokens[0]) == 1 else []
    body = tokens[len(starts) :]
    step = size - len(starts)
    full = range(0, len(body) - step + 1, step)
    return torch.tensor([starts + body[i : i + step] for i in full])


# Measures


@torch.inference_mode()
def log_probs(model: nn.Module, windows_BT: Tensor) -> Iterator[Tensor]:
    """Of each window (T, V), float32."""
    for window_T in windows_BT:
        yield model(window_T[None])[0].float().log_softmax(dim=-1)


@torch.inference_mode()
def losses(model: nn.Module, windows_BT: Tensor) -> list[float]:
    """Nats a token, a number for each window."""
    return [
        F.cross_entropy(model(window_T[None, :-1])[0].float(), window_T[1:]).item()
        for window_T in windows_BT
    ]


@torch.inference_mode()
def divergence(right: list[Tensor], model: nn.Module, windows_BT: Tensor) -> list[float]:
    """KL in nats a token from the right log-probabilities (T, V), a number for each window."""
    return [
        F.kl_div(found_TV, right_TV, reduction="batchmean", log_target=True).item()
        for right_TV, found_TV in zip(right, log_probs(model, windows_BT), strict=True)
    ]


def measure(path: Path, n_tokens: int, n_kl: int, done: dict[str, dict]) -> Iterator[dict]:
    """The rows found so far, by way, after each way that is not done yet."""
    model, tokenizer = load(path, "float32", "cpu")
    tokens, later = text_tokens(tokenizer, n_tokens)
    loss_BT, calibration_BT = windows(tokens, WINDOW), windows(later, WINDOW)
    kl_BT = windows(tokens, KL_WINDOW)
    kl_BT = kl_BT[:: max(1, len(kl_BT) // n_kl)][:n_kl]
    right = list(log_probs(model, kl_BT))
    del model
    for label, way in WAYS.items():
        if label in done:
            continue
        model = made(path, way, calibration_BT)
        kl = divergence(right, model, kl_BT)
        step = 1 if label in ALL_TOKENS else SPARSE
        found = losses(model, loss_BT[::step])
        done[label] = {
            "bytes": weight_bytes(model),
            "kl": round(mean(kl), 5),
            "kl_of_windows": [round(x, 5) for x in kl],
            "loss_tokens": len(found) * (WINDOW - 1),
            "loss": round(mean(found), 5),
            "loss_of_windows": [round(x, 5) for x in found],
        }
        before = mean(done["float32"]["loss_of_windows"][::step])
        done[label]["loss_change"] = round(mean(found) / before - 1, 5)
        yield done


def print_table(name: str, rows: dict[str, dict]) -> None:
    print(f"\n{name:40}   MB      KL    loss  change")
    for label, row in rows.items():
        print(
            f"  {label:38}{row['bytes'] / 1e6:5.0f}{row['kl']:8.4f}{row['loss']:8.3f}"
            f"{row['loss_change']:+8.2%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=NAMES, metavar="MODEL")
    parser.add_argument("--smoke", action="store_true", help="few tokens, in seconds")
    parser.add_argument("--out", type=Path, help="where to write the record")
    parser.add_argument("--resume", action="store_true", help="keep what the record has already")
    args = parser.parse_args()
    out = args.out or result_path(__file__, args.smoke)
    n_tokens, n_kl = (1024, 1) if args.smoke else (20_000, N_KL)
    results: dict[str, dict] = {}
    if args.resume and out.exists():
        results = json.loads(out.read_text(encoding="utf-8"))["results"]
    for name in args.models:
        rows = results.setdefault(Path(name).name, {})
        for _ in measure(fetch(name), n_tokens, n_kl, rows):
            sizes = {"tokens": n_tokens, "kl_tokens": n_kl * KL_WINDOW}
            record = {"environment": environment(torch.device("cpu")), **sizes}
            save_json(out, record | {"results": results})
        print_table(name, rows)


if __name__ == "__main__":
    main()
