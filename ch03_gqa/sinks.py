"""Attention sinks: what it costs a model trained without a window when the first token drops out.

Chapter 3's measurement on Xiao et al. 2023 (StreamingLLM, section 3), with a real model: SmolLM2
135M Instruct, from the file that sinks.json names. It reads the same texts with full attention,
with a window of 256 keys, and with the first one or four tokens kept in place of the window's
oldest ones, so that a query never sees more keys than with the window alone.

Two things differ from the paper. Tokens keep their positions in the text, where StreamingLLM counts
them anew within the cache: these texts stay below the 8,192 tokens that the model was trained for.
And a mask hides the other keys while the whole text is read at once, so nothing is saved here; the
losses are those of a cache that drops the same keys.

    B  sequences   T  tokens that ask   S  tokens they look at   N  tokens of a text
    H  query heads   K  width of a head   J  key/value heads   G  query heads that share one

    python -m ch03_gqa.sinks            about 5 minutes on one CPU thread; writes sinks.json
    python -m ch03_gqa.sinks --smoke    a tiny random model, in seconds
"""

import argparse
import difflib
import inspect
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from ch01_gpt2.train import environment, result_path, save_json
from ch08_full_models import llama3
from ch08_full_models.checkpoint import fetch, load

MODEL = "smollm2-135m"
WINDOW = 256
EDGES = (0, 32, 64, 128, 192, 256, 320, 384, 512, 768, 1024, 1280, 1536, 1792, 2048)
SINKS = {"full": None, "window": 0, "sinks_1": 1, "sinks_4": 4}  # first tokens that are kept
TEXTS = {
    "help('compound')": topics["compound"],
    "help('types')": topics["types"],
    "help('debugger')": topics["debugger"],
    "source of difflib": inspect.getsource(difflib),
}


def sink_mask(
    q_pos_BT: Tensor, k_pos_BS: Tensor, _: int | None, keys: int, n_sinks: int | None
) -> Tensor:
    """True where a query may look, (B, T, S): at the first n_sinks tokens and the last others.

    At `keys` in all, itself included; n_sinks None: at everything before. Has the signature of
    llama3.causal_mask before its own two numbers.
    """
    q_pos_BT1, k_pos_B1S = q_pos_BT[:, :, None], k_pos_BS[:, None, :]
    mask_BTS = k_pos_B1S <= q_pos_BT1
    if n_sinks is None:
        return mask_BTS
    recent_BTS = k_pos_B1S > q_pos_BT1 - (keys - n_sinks)
    return mask_BTS & (recent_BTS | (k_pos_B1S < n_sinks))


@torch.no_grad()
def logits_with(
    model: llama3.Transformer, tokens_N: Tensor, keys: int, n_sinks: int | None
) -> Tensor:
    """The model's logits (N, V) where every layer has that mask."""
    mask = partial(sink_mask, keys=keys, n_sinks=n_sinks)
    with (
        patch.object(llama3, "causal_mask", mask),
        patch.object(llama3.LayerCache, "needs_mask", lambda *_: True),
    ):
        return model(tokens_N[None])[0]


def check_masks(model: llama3.Transformer, tokens_N: Tensor) -> None:
    """AssertionError unless the model obeys the masks.

    A window of one key leaves a token alone with itself, whatever the number of layers: another
    first token must change nothing at the last. One sink, or all keys, must let it through.
    """
    tokens_N = tokens_N[:32]
    other_N = tokens_N.clone()
    other_N[0] = (tokens_N[0] + 1) % model.cfg.vocab_size
    for keys, n_sinks, reaches in ((1, 0, False), (2, 1, True), (1, None, True)):
        pair = [logits_with(model, text_N, keys, n_sinks)[-1] for text_N in (tokens_N, other_N)]
        assert (not torch.equal(*pair)) == reaches, f"{keys} keys, {n_sinks} sinks"
    with torch.no_grad():
        usual_NV = model(tokens_N[None])[0]
    torch.testing.assert_close(logits_with(model, tokens_N, 1, None), usual_NV, rtol=0, atol=2e-3)


def noting_attend(shares: list[float]) -> Callable[..., Tensor]:
    """llama3.attend by hand, which adds a layer's share of attention on token 0 to the list."""

    def attend(
        q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, mask_BTS: Tensor, scale: float
    ) -> Tensor:
        q_BTJGK = q_BTHK.unflatten(2, (k_BSJK.shape[2], -1))
        scores_BJGTS = torch.einsum("BTJGK,BSJK->BJGTS", q_BTJGK, k_BSJK) * scale
        scores_BJGTS = scores_BJGTS.masked_fill(~mask_BTS[:, None, None], -math.inf)
        weights_BJGTS = scores_BJGTS.softmax(dim=-1)
        shares.append(weights_BJGTS[..., 0].mean().item())
        return torch.einsum("BJGTS,BSJK->BTJGK", weights_BJGTS, v_BSJK).flatten(2, 3)

    return attend


def bin_losses(logits_NV: Tensor, targets_N: Tensor, edges: tuple[int, ...]) -> list[float]:
    """Mean loss of each bin of positions in nats a token; a position is that of the query."""
    losses_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
    return [losses_N[a:b].mean().item() for a, b in zip(edges[:-1], edges[1:], strict=True)]


def measure(
    model: llama3.Transformer, name: str, tokens_N: Tensor, window: int, edges: tuple[int, ...]
) -> tuple[list[dict], list[float]]:
    """One text's record for each method, and the share of attention on token 0 in each layer."""
    runs, shares = [], []
    for method, n_sinks in SINKS.items():
        attend = noting_attend(shares) if method == "full" else llama3.attend
        with patch.object(llama3, "attend", attend):
            logits_NV = logits_with(model, tokens_N[:-1], window, n_sinks)
        losses = bin_losses(logits_NV, tokens_N[1:], edges)
        runs.append({"method": method, "text": name, "loss": losses})
        print(f"{name:20} {method:8} {losses[-1]:.3f}", flush=True)
    return runs, shares


def print_table(record: dict) -> None:
    """Each bin's loss by method, the mean over the texts, and attention on token 0 by layer."""
    print("mean over the texts, nats a token\npositions    " + "".join(f"{m:>9}" for m in SINKS))
    for i, (a, b) in enumerate(zip(record["edges"][:-1], record["edges"][1:], strict=True)):
        rows = [[r["loss"][i] for r in record["runs"] if r["method"] == m] for m in SINKS]
        print(f"{a:5} to {b:5}" + "".join(f"{mean(row):9.3f}" for row in rows))
    shares = record["attention_on_first"]
    print("share of attention on token 0, by layer: " + " ".join(f"{s:.2f}" for s in shares))
    print(f"mean {mean(shares):.3f}; alike on all keys it would be {record['even_share']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny random model")
    parser.add_argument("--model", default=MODEL, help="a Llama's name, folder or .gguf file")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    args = parser.parse_args()
    args.out = args.out or result_path(__file__, args.smoke)
    torch.set_num_threads(1)
    if args.smoke:
        window, edges = 16, (0, 8, 16, 32, 64)
        sizes = dict(n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=64)
        torch.manual_seed(0)
        model = llama3.Transformer(llama3.Config(vocab_size=256, **sizes)).eval()
        ids = {name: list(text.encode()) for name, text in TEXTS.items()}
    else:
        window, edges = WINDOW, EDGES
        model, tokenizer = load(args.model, dtype=torch.float32, device="cpu")
        ids = {name: tokenizer.encode(text) for name, text in TEXTS.items()}
    n = edges[-1] + 1  # the last one is only a target
    texts = {name: torch.tensor(tokens[:n]) for name, tokens in ids.items()}
    for name, tokens_N in texts.items():
        assert len(tokens_N) == n, f"{name}: {len(tokens_N)} tokens, expected {n}"
        check_masks(model, tokens_N)
    settings = {
        "model": "random" if args.smoke else fetch(args.model).name,
        "dtype": "float32",
        "tokens": n,
        "texts": {name: f"starts with token {int(t[0])}" for name, t in texts.items()},
        "positions": "as in the text",
        "keys": "as many as the window has, the sinks included",
        "smoke": args.smoke,
    }
    runs, shares = [], {}
    for name, tokens_N in texts.items():
        new, shares[name] = measure(model, name, tokens_N, window, edges)
        runs += new
        record = {
            "environment": environment(torch.device("cpu")),
            "settings": settings,
            "window": window,
            "edges": edges,
            "runs": runs,
            "attention_on_first": [mean(layer) for layer in zip(*shares.values(), strict=True)],
            "attention_on_first_by_text": shares,
            "even_share": mean(1 / (t + 1) for t in range(edges[-1])),
        }
        save_json(args.out, record)
    print_table(record)


if __name__ == "__main__":
    main()
