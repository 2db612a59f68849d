"""Chapter 8: how fast the models run, beside transformers with the same weights.

    python -m ch08_full_models.benchmark --out results.json

Both sides read the same prompt (prefill) and make the same number of tokens (decode), taking turns
in one process, so that whatever else the machine does falls on both. Prompt tokens do not count as
new ones. Given are medians over the rounds; on a busy machine trust the ratios, not the rates.
Before anything is timed, the two must agree on the prompt's logits.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from ch08_full_models.checkpoint import CheckpointError, family_of, fetch, load
from ch08_full_models.gguf_file import read_gguf

Seconds = tuple[float, float]  # for the prompt, and for the new tokens after the first


def reference(path: Path, dtype: torch.dtype) -> nn.Module:
    """The same weights in transformers. Raises CheckpointError if transformers is not there."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as err:
        raise CheckpointError(f"transformers is needed to compare with ({err})") from err
    if path.is_dir():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    gguf = read_gguf(path)
    config = gguf.config()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
    weights = dict(gguf.tensors())
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])  # tied
    model.load_state_dict(weights)
    return model.eval()


def run_ours(model: nn.Module, tokens_1T: Tensor, n_new: int) -> Seconds:
    """Times this book's model on one prompt."""
    start = time.perf_counter()
    new = family_of(model).generate(model, tokens_1T, n_new)
    next(new).tolist()  # the first token comes with the prefill; a GPU is waited for
    middle = time.perf_counter()
    for token_11 in new:
        token_11.tolist()
    return middle - start, time.perf_counter() - middle


@torch.inference_mode()
def run_theirs(model: nn.Module, tokens_1T: Tensor, n_new: int) -> Seconds:
    """Times transformers on one prompt, step by step, as ours: without generate's own overhead."""
    start = time.perf_counter()
    cache = None
    for i in range(n_new):
        out = model(tokens_1T, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, tokens_1T = out.past_key_values, out.logits[:, -1].argmax(dim=-1, keepdim=True)
        tokens_1T.tolist()
        if i == 0:
            middle = time.perf_counter()
    return middle - start, time.perf_counter() - middle


def measure(
    sides: dict[str, Callable[[Tensor, int], Seconds]], prompt: Tensor, n_new: int, rounds: int
) -> dict[str, dict]:
    """Rates of each side in tokens a second: medians over the rounds, and every single one."""
    seconds: dict[str, list[Seconds]] = {side: [] for side in sides}
    for round_ in range(rounds + 1):
        for side, run in sides.items():
            measured = run(prompt, n_new)
            if round_:  # the first warms up
                seconds[side].append(measured)
    rates = {}
    for side, times in seconds.items():
        prefill = [prompt.shape[1] / p for p, _ in times]
        decode = [(n_new - 1) / d for _, d in times]
        rates[side] = {
            "prefill_tokens_per_s": round(statistics.median(prefill), 1),
            "decode_tokens_per_s": round(statistics.median(decode), 2),
            "all_prefill": [round(rate, 1) for rate in prefill],
            "all_decode": [round(rate, 2) for rate in decode],
        }
    return rates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a name, a folder or a .gguf")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096], metavar="T")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, help="where to write the results, as JSON")
    args = parser.parse_args()
    try:
        path, dtype = fetch(args.model), getattr(torch, args.dtype)
        model, _ = load(path, dtype, "cpu")
        theirs = reference(path, dtype)
    except CheckpointError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    sides = {
        "ours": lambda tokens_1T, n_new: run_ours(model, tokens_1T, n_new),
        "transformers": lambda tokens_1T, n_new: run_theirs(theirs, tokens_1T, n_new),
    }
    generator, results = torch.Generator().manual_seed(0), []
    for context in args.contexts:
        prompt = torch.randint(model.cfg.vocab_size, (1, context), generator=generator)
        with torch.inference_mode():
            ours, other = model(prompt, last_only=True), theirs(prompt, logits_to_keep=1).logits
        error = ((ours - other).abs().max() / other.abs().max()).item()
        assert error < (1e-4 if args.dtype == "float32" else 0.1), error
        rates = measure(sides, prompt, args.new_tokens, args.rounds)
        ratio = {
            kind: round(rates["ours"][kind] / rates["transformers"][kind], 2)
            for kind in ("prefill_tokens_per_s", "decode_tokens_per_s")
        }
        row = {"context": context, "largest_logit_error": error, "ratio": ratio} | rates
        results.append(row)
        print(
            f"context {context:6,}: "
            + ", ".join(
                f"{kind.split('_')[0]} {rates['ours'][kind]:8.1f} tokens/s, {r} times transformers"
                for kind, r in ratio.items()
            ),
            flush=True,
        )
    if args.out:
        import transformers

        report = {
            "command": "python -m ch08_full_models.benchmark " + " ".join(sys.argv[1:]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "platform": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "model": args.model,
            "dtype": args.dtype,
            "new_tokens": args.new_tokens,
            "results": results,
        }
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
