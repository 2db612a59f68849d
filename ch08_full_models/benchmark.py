"""Chapter 8: how fast the models run, beside transformers and llama.cpp with the same weights.

    python -m ch08_full_models.benchmark --model gemma3-270m --out results.json --chart results.png
    python -m ch08_full_models.benchmark --show ch08_full_models/benchmark_gemma3.json

Each side is a process of its own, which holds one model. They take turns: each reads the prompt
(prefill) and makes new tokens (decode), then the next one does, so that whatever else the machine
does falls on all. The first turn warms up, and compiles where a side is compiled, and does not
count. Given are medians over the rounds; on a busy machine trust the ratios, not the rates. Prompt
tokens do not count as new ones, and the first new token belongs to the prefill.

Beside every speed stands what it cost: the mean KL divergence, in nats a token, of a side's
predictions from those of the float32 model, the change of the loss, and the peak memory of the
process, also above what Python and torch take without a model.

llama.cpp is measured where the package llama-cpp-python is installed, with files converted from
the same GGUF. How it was built decides its speed: for the native build that is fastest here,
    CC=clang CXX=clang++ CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

SIDES = (
    "ours float32", "ours float32 compiled",
    "ours bfloat16", "ours bfloat16 compiled", "ours bfloat16 two-step",
    "ours int8", "ours int8 compiled", "ours int4", "ours int4 compiled",
    "transformers float32", "transformers bfloat16",
    "llama.cpp BF16", "llama.cpp Q8_0", "llama.cpp Q4_K_M",
)  # fmt: skip
WINDOW = 512  # tokens
FTYPES = {"BF16": 32, "Q8_0": 7, "Q4_K_M": 15}  # llama.cpp's numbers for kinds of files

# (what, side, other side or the project whose best counts, at least this many times its rate)
TARGETS = (
    ("decode", "ours bfloat16 compiled", "transformers bfloat16", 2.0),
    ("decode", "ours bfloat16 compiled", "llama.cpp BF16", 1.0),
    ("decode", "ours bfloat16 two-step", "llama.cpp BF16", 1.2),
    ("decode", "ours int8 compiled", "llama.cpp Q8_0", 0.75),
    ("decode", "ours int4 compiled", "llama.cpp Q4_K_M", 0.9),
    ("prefill", "ours bfloat16", "transformers bfloat16", 1.4),
    ("prefill", "ours bfloat16", "llama.cpp", 1.7),
    ("prefill", "ours int8", "ours bfloat16", 0.8),
    ("prefill", "ours int4", "ours bfloat16", 0.8),
)
# (side, other side): KL at most twice the other's
KL_TARGETS = (("ours int8", "llama.cpp Q8_0"), ("ours int4", "llama.cpp Q4_K_M"))
LOSS_TARGETS = {"ours int8": 0.005, "ours int4": 0.04}  # of the float32 model's loss, at most


# One side, in its own process


@dataclass
class Runner:
    """A loaded model: how to time it, and how to get its logits."""

    time: Callable[[list[int], int], tuple[float, float]]  # prompt, new tokens -> seconds for each
    log_probs: Callable[[list[int]], object]  # tokens -> (T, V), float32
    loss: Callable[[list[int]], float] | None = None  # nats a token, over windows as quality.py has


def ours(path: str, kind: str) -> Runner:
    import torch

    from ch08_full_models.checkpoint import family_of, load
    from ch08_full_models.decode import compiled_steps, plain_decode, two_step_head

    kind, _, steps = kind.partition(" ")
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    model, _ = load(path, dtype, "cpu", kind if kind.startswith("int") else None)
    if steps == "two-step":
        two_step_head(model)
    if steps:
        compiled_steps(model)

    @torch.inference_mode()
    def timed(prompt: list[int], n_new: int) -> tuple[float, float]:
        start = time.perf_counter()
        new = family_of(model).generate(model, torch.tensor([prompt]), n_new)
        next(new).tolist()
        middle = time.perf_counter()
        for token_11 in new:
            token_11.tolist()
        return middle - start, time.perf_counter() - middle

    @torch.inference_mode()
    def log_probs(tokens: list[int]) -> torch.Tensor:
        """Token by token behind the first half: decoding is what is timed."""
        if steps == "two-step":  # its smaller logits are rough; the largest is that of the others
            compiled_steps(plain_decode(model))
        half = len(tokens) // 2
        cache = model.new_cache()
        parts = [model(torch.tensor([tokens[:half]]), cache)]
        parts += [model(torch.tensor([[token]]), cache) for token in tokens[half:]]
        return torch.cat(parts, dim=1)[0].float().log_softmax(dim=-1)

    @torch.inference_mode()
    def loss(tokens: list[int]) -> float:
        # Imported here, as torch is: other sides need neither.
        from ch08_full_models.quality import losses, windows

        return statistics.mean(losses(model, windows(tokens, min(WINDOW, len(tokens)))))

    return Runner(timed, log_probs, None if steps else loss)  # steps change single tokens


def transformers_side(path: str, kind: str) -> Runner:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ch08_full_models.gguf_file import read_gguf

    dtype = getattr(torch, kind)
    if Path(path).is_dir():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    else:
        gguf = read_gguf(Path(path))
        config = AutoConfig.for_model(**gguf.config())
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        state = model.state_dict()
        missing = set(state) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
        for name, tensor in gguf.tensors():  # one at a time, since the peak is compared
            state[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise RuntimeError(f"{path}: lacks {sorted(missing)}")
        model.eval()

    @torch.inference_mode()
    def timed(prompt: list[int], n_new: int) -> tuple[float, float]:
        """Step by step, as ours: without generate's own overhead."""
        start, cache, tokens_1T = time.perf_counter(), None, torch.tensor([prompt])
        for i in range(n_new):
            out = model(tokens_1T, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, tokens_1T = out.past_key_values, out.logits[:, -1].argmax(dim=-1, keepdim=True)
            tokens_1T.tolist()
            if i == 0:
                middle = time.perf_counter()
        return middle - start, time.perf_counter() - middle

    @torch.inference_mode()
    def log_probs(tokens: list[int]) -> torch.Tensor:
        return model(torch.tensor([tokens])).logits[0].float().log_softmax(dim=-1)

    return Runner(timed, log_probs)


def llama_cpp(path: str, kind: str) -> Runner:
    import ctypes

    import llama_cpp
    import torch

    llama = llama_cpp.Llama(path, n_ctx=8192, n_threads=torch.get_num_threads(),
                            n_threads_batch=torch.get_num_threads(), logits_all=True,
                            verbose=False)  # fmt: skip
    n_vocab = llama.n_vocab()

    def timed(prompt: list[int], n_new: int) -> tuple[float, float]:
        """llama.cpp's own decode calls, with logits of the last token only."""
        context = llama._ctx.ctx
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        start, tokens = time.perf_counter(), prompt
        for i in range(n_new):
            for first in range(0, len(tokens), 512):
                part = tokens[first : first + 512]
                array = (llama_cpp.llama_token * len(part))(*part)
                batch = llama_cpp.llama_batch_get_one(array, len(part))
                if llama_cpp.llama_decode(context, batch):
                    raise RuntimeError("llama.cpp: decode failed")
            row = llama_cpp.llama_get_logits_ith(context, -1)
            raw = bytearray(ctypes.string_at(row, 4 * n_vocab))
            logits = torch.frombuffer(raw, dtype=torch.float32)
            tokens = [int(logits.argmax())]
            if i == 0:
                middle = time.perf_counter()
        return middle - start, time.perf_counter() - middle

    def log_probs(tokens: list[int]) -> torch.Tensor:
        llama.reset()
        half = len(tokens) // 2
        llama.eval(tokens[:half])
        for token in tokens[half:]:
            llama.eval([token])
        return torch.tensor(llama.scores[: len(tokens)]).log_softmax(dim=-1)

    return Runner(timed, log_probs)


def child(side: str, path: str) -> None:
    """Answers one line of JSON for each line that comes in."""
    import os

    # What a library prints must not get between the answers.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import torch

    from ch08_full_models.__main__ import peak_rss_bytes

    empty = peak_rss_bytes()
    where, _, kind = side.partition(" ")
    make = {"ours": ours, "transformers": transformers_side, "llama.cpp": llama_cpp}[where]
    runner = make(path, kind)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "time":
            answer: object = runner.time(asked["prompt"], asked["n_new"])
        elif asked["do"] == "quality":
            found_TV = runner.log_probs(asked["tokens"])
            file = Path(asked["file"])
            if side == "ours float32":
                file.write_bytes(found_TV.numpy().tobytes())
            right_TV = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32)
            right_TV = right_TV.view(len(found_TV), -1)
            kl_T = (right_TV.exp() * (right_TV - found_TV[:, : right_TV.shape[1]])).sum(dim=-1)
            following = torch.tensor(asked["tokens"][1:])[:, None]
            loss = -found_TV[:-1].gather(1, following).mean()
            answer = {"kl": kl_T.mean().item(), "loss": loss.item()}
            if runner.loss and asked["long"]:
                answer["long_loss"] = runner.loss(asked["long"])
        else:
            answer = {"peak": peak_rss_bytes(), "empty": empty}
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


class Side:
    """A child process, and what has been measured of it."""

    def __init__(self, name: str, path: str) -> None:
        command = [sys.executable, "-m", "ch08_full_models.benchmark", "--child", name, path]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        self.times: dict[int, list[tuple[float, float]]] = {}

    def ask(self, **what: object) -> object:
        """The child's answer. Raises RuntimeError if it ended."""
        try:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as error:
            raise RuntimeError(f"a side has ended: {self.process.args[-2]} ({error})") from None

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


# All sides


def available(names: list[str], path: Path) -> list[str]:
    """Those of the sides whose packages are installed and which can read the model."""
    from importlib.util import find_spec

    missing = [n for n in ("transformers", "llama_cpp") if find_spec(n) is None]
    missing += [] if path.suffix == ".gguf" else ["llama_cpp"]
    return [n for n in names if n.split()[0].replace(".", "_") not in missing]


def converted(path: Path, kind: str, folder: Path) -> Path:
    """The GGUF file in one of llama.cpp's kinds; what is written goes into the folder."""
    import ctypes

    import llama_cpp

    out = folder / f"{kind}.gguf"
    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = FTYPES[kind], True
    if llama_cpp.llama_model_quantize(str(path).encode(), str(out).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp: cannot convert {path} to {kind}")
    return out


def measure(
    sides: dict[str, Side], text: list[int], contexts: list[int], n_new: int, rounds: int,
    n_quality: int, n_loss: int,
) -> dict[str, dict]:  # fmt: skip
    """Side -> rates by context, quality and memory."""
    for round_ in range(rounds + 1):
        for context in contexts:
            for side in sides.values():
                seconds = side.ask(do="time", prompt=text[:context], n_new=n_new)
                if round_:
                    side.times.setdefault(context, []).append(seconds)
    # Before the quality, which needs all words' logits of a whole text.
    memory = {name: side.ask(do="memory") for name, side in sides.items()}
    with tempfile.TemporaryDirectory() as folder:
        ask = {"do": "quality", "tokens": text[:n_quality], "file": f"{folder}/float32",
               "long": text[:n_loss]}  # fmt: skip
        first = sorted(sides, key=lambda name: name != "ours float32")
        quality = {name: sides[name].ask(**ask) for name in first}
    found = {}
    for name, side in sides.items():
        peak, empty = memory[name]["peak"], memory[name]["empty"]
        found[name] = quality[name] | {
            "peak_rss_bytes": peak,
            "above_empty_bytes": peak - empty,
            "contexts": {
                context: {
                    "prefill_tokens_per_s": round(statistics.median(context / p for p, _ in t), 1),
                    "decode_tokens_per_s": round(
                        statistics.median((n_new - 1) / d for _, d in t), 2
                    ),
                    "seconds": [[round(x, 4) for x in pair] for pair in t],
                }
                for context, t in side.times.items()
            },
        }
    return found


def verdicts(results: dict[str, dict], context: int | str) -> list[dict]:
    """A line for every target whose sides were measured: the ratio, and whether it is reached."""
    lines = []

    def rate(name: str, what: str) -> float:
        """Of a side, or the best of a project's; 0 if it was not measured."""
        found = [f for n, f in results.items() if name in (n, n.split()[0])]
        return max((f["contexts"][context][f"{what}_tokens_per_s"] for f in found), default=0.0)

    def add(what: str, ratio: float, target: str, reached: bool) -> None:
        lines.append({"target": f"{what} {target}", "ratio": round(ratio, 3), "reached": reached})

    for what, side, other, least in TARGETS:
        if (a := rate(side, what)) and (b := rate(other, what)):
            add(f"{what} at {context}: {side}", a / b, f">= {least} x {other}", a / b >= least)
    for side, other in KL_TARGETS:
        if side in results and other in results:
            ratio = results[side]["kl"] / results[other]["kl"]
            add(f"KL: {side}", ratio, f"<= 2 x {other}", ratio <= 2)
    for side, most in LOSS_TARGETS.items():
        if side in results and "ours float32" in results:
            a, b = results[side], results["ours float32"]
            change = a.get("long_loss", a["loss"]) / b.get("long_loss", b["loss"]) - 1
            add(f"loss: {side}", change, f"<= {most:+.1%} of float32", change <= most)
    return lines


def show(path: Path) -> int:
    """Prints a record that was written before; the exit code."""
    try:
        print_table(json.loads(path.read_text(encoding="utf-8"))["results"])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` perhaps, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    except (OSError, ValueError, KeyError, TypeError) as err:
        print(f"error: {path}: not a record of the benchmark ({err})", file=sys.stderr)
        return 2
    return 0


def print_table(results: dict[str, dict]) -> None:
    """All rates and what they cost; then each target, by the first context."""
    for context in next(iter(results.values()))["contexts"]:
        print(f"\n{context} tokens before       prefill    decode  tokens/s      KL     loss  MB")
        for name, found in results.items():
            rates = found["contexts"][context]
            print(
                f"  {name:22}{rates['prefill_tokens_per_s']:10.0f}"
                f"{rates['decode_tokens_per_s']:10.1f}{found['kl']:16.4f}{found['loss']:9.3f}"
                f"{found['above_empty_bytes'] / 1e6:7.0f}"
            )
    print()
    for line in verdicts(results, next(iter(next(iter(results.values()))["contexts"]))):
        print(f"{'reached    ' if line['reached'] else 'not reached'}  {line['ratio']:7.3f}  "
              f"{line['target']}")  # fmt: skip


def chart(results: dict[str, dict], context: int, path: Path) -> None:
    """Bars of both rates, one colour a project."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"ours": "tab:blue", "transformers": "tab:orange", "llama.cpp": "tab:green"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.4 * len(results) + 1), sharey=True)
    names = list(results)[::-1]
    for axis, what in zip(axes, ("prefill", "decode"), strict=True):
        rates = [results[n]["contexts"][context][f"{what}_tokens_per_s"] for n in names]
        axis.barh(names, rates, color=[colours[n.split()[0]] for n in names])
        axis.set(xlabel="tokens a second", title=f"{what}, {context} tokens")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a name, a folder or a .gguf")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512], metavar="T")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quality-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--loss-tokens", type=int, default=20_000, metavar="N", help="0: none")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, metavar="SIDE")
    parser.add_argument("--out", type=Path, help="where to write the results, as JSON")
    parser.add_argument("--chart", type=Path, help="where to draw them, as .png")
    parser.add_argument("--show", type=Path, metavar="FILE", help="a record, and nothing measured")
    args = parser.parse_args()
    if args.show:
        return show(args.show)
    if min(*args.contexts, args.new_tokens - 1, args.rounds, args.quality_tokens - 1) < 1:
        parser.exit(2, "error: expected contexts and rounds from 1 on, tokens from 2 on\n")

    from ch08_full_models.checkpoint import CheckpointError, fetch

    try:
        report = run(args, fetch(args.model))
    except (CheckpointError, RuntimeError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    print_table(report["results"])
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.chart:
        chart(report["results"], args.contexts[0], args.chart)
    return 0


def run(args: argparse.Namespace, path: Path) -> dict:
    """Starts the sides, measures, and returns the record."""
    import pydoc_data.topics

    import torch

    from ch08_full_models.checkpoint import load

    names = available(args.sides, path)
    _, tokenizer = load(path, "bfloat16", "cpu")
    topics = pydoc_data.topics.topics
    words = "\n".join(topics[key] for key in sorted(topics))
    need = max(*args.contexts, args.quality_tokens, args.loss_tokens)
    text = tokenizer.encode(words[: 8 * need])[:need]
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Side] = {}
        try:
            for name in names:
                where, _, kind = name.partition(" ")
                file = converted(path, kind, Path(folder)) if where == "llama.cpp" else path
                sides[name] = Side(name, str(file))
            results = measure(
                sides, text, args.contexts, args.new_tokens, args.rounds, args.quality_tokens,
                args.loss_tokens,
            )  # fmt: skip
        finally:
            for side in sides.values():
                side.close()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for module in ("transformers", "llama_cpp"):
        if any(name.startswith(module.replace("_", ".")) for name in names):
            versions[module] = __import__(module).__version__
    assert all(math.isfinite(found["kl"]) for found in results.values())
    return {
        "command": "python -m ch08_full_models.benchmark " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "platform": platform.platform(),
        **versions,
        "model": args.model,
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "quality_tokens": args.quality_tokens,
        "loss_tokens": args.loss_tokens,
        "results": results,
    }


if __name__ == "__main__":
    sys.exit(main())
