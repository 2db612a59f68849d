"""Chapter 8, measured: how long a reader waits for the first token, and how much memory it takes.

    python -m ch08_full_models.start_time             start_time.json, in two minutes
    python -m ch08_full_models.start_time --smoke     one round and one model, to see that it works

Nothing can start sooner than `python -c "import torch"`, and every weight must be read once. So the
time from the command to its first text is compared with the sum of these two. All take turns, each
a process of its own; the first round warms up and does not count, the medians of the others do. By
then the files lie in the system's cache: what is measured is the program, not the disk.

Memory is the peak of a process that loads a model, reads a prompt of 20 tokens and makes 20 more,
above what it held when Python, torch and this package were there and a tiny model had run. It is
compared with the bytes of the weights it keeps and of its cache. The vocabulary is in the peak.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from ch01_gpt2.train import environment, result_path, save_json
from ch08_full_models.__main__ import peak_rss_bytes
from ch08_full_models.checkpoint import CheckpointError, family_of, fetch, load

ROOT = Path(__file__).parents[1]
RUNS = (  # name, quantize
    ("smollm2-135m", None),
    ("gemma3-270m", None),
    ("smollm2-135m", "int8"),
    ("gemma3-270m", "int8"),
)
MEMORY_RUNS = (*RUNS, ("smollm2-135m", "int4"), ("gemma3-270m", "int4"))
AT_MOST = 1.5  # times importing torch and reading the weights once
PEAK_AT_MOST = 1.15  # times the bytes of the weights that are kept, plus the cache
N_PROMPT, N_NEW = 20, 20  # tokens


def first_text(name: str, quantize: str | None) -> float:
    """Seconds from the command to the first byte of the model's answer."""
    command = [sys.executable, "-m", "ch08_full_models", "Hi", "--max-new-tokens", "1"]
    command += ["--model", name, *(["--quantize", quantize] if quantize else [])]
    start = time.perf_counter()
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    with child:
        first = child.stdout.read(1)
        seconds = time.perf_counter() - start
        _, notices = child.communicate()
    if child.returncode or not first:
        raise RuntimeError(f"{name}: {notices.decode(errors='replace')}")
    return seconds


def import_torch() -> float:
    """Seconds that `python -c "import torch"` takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], cwd=ROOT, check=True)
    return time.perf_counter() - start


def read_once(path: Path) -> float:
    """Seconds that reading the files with the weights takes, from the system's cache."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    buffer, start = bytearray(1 << 22), time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    return time.perf_counter() - start


def measure(runs: tuple[tuple[str, str | None], ...], rounds: int) -> list[dict]:
    """For each of the runs: medians in seconds, the ratio, and whether the target is reached."""
    import_s: list[float] = []
    read_s: dict[str, list[float]] = {name: [] for name, _ in runs}
    first_s: dict[tuple[str, str | None], list[float]] = {run: [] for run in runs}
    for round_ in range(rounds + 1):
        if round_ == 1:  # the first one warmed up
            for times in (import_s, *read_s.values(), *first_s.values()):
                times.clear()
        import_s.append(import_torch())
        for name, times in read_s.items():
            times.append(read_once(fetch(name)))
        for run, times in first_s.items():
            times.append(first_text(*run))
    found = []
    for (name, quantize), times in first_s.items():
        least = statistics.median(import_s) + statistics.median(read_s[name])
        ratio = statistics.median(times) / least
        found.append(
            {
                "model": name,
                "quantize": quantize,
                "first_text_s": round(statistics.median(times), 3),
                "import_torch_s": round(statistics.median(import_s), 3),
                "read_s": round(statistics.median(read_s[name]), 3),
                "ratio": round(ratio, 3),
                "target": AT_MOST,
                "reached": ratio <= AT_MOST,
                "all_first_text_s": [round(t, 3) for t in times],
            }
        )
    return found


def resident_bytes() -> int:
    """What this process holds in memory now; where the system does not say, its peak so far."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return peak_rss_bytes()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


@torch.inference_mode()
def run_tiny(quantize: str | None) -> None:
    """Has torch load the code and make the buffers that any model needs."""
    from ch08_full_models import llama3, speed

    sizes = {"vocab_size": 256, "n_layers": 1, "d_model": 64, "n_heads": 2, "n_kv_heads": 1}
    cfg = llama3.Config(**sizes, head_dim=32, d_ff=128)
    model = llama3.Transformer(cfg).to(torch.bfloat16 if quantize else torch.float32)
    if quantize:
        with torch.device("meta"):
            speed.quantize(llama3.Transformer(cfg), quantize)
        speed.quantize(model, quantize)
    for _ in llama3.generate(model.eval(), torch.arange(N_PROMPT)[None], 2):
        pass


def use_memory(source: str, quantize: str | None) -> dict:
    """What the child process does: its peak beside the weights, in bytes."""
    from ch08_full_models import gemma3  # noqa: F401  a family's code is not a model's memory
    from ch08_full_models.speed import weight_bytes

    run_tiny(quantize)
    empty = resident_bytes()
    model, _ = load(source, device="cpu", quantize=quantize)
    loaded = peak_rss_bytes() - empty
    tokens_1T = torch.arange(5, 5 + N_PROMPT)[None] % model.cfg.vocab_size
    cache = model.new_cache()
    for _ in family_of(model).generate(model, tokens_1T, N_NEW, cache=cache):
        pass
    weights, cached = weight_bytes(model), sum(layer.n_bytes() for layer in cache)
    peak = peak_rss_bytes() - empty
    return {
        "model": source,
        "quantize": quantize,
        "empty_bytes": empty,
        "weight_bytes": weights,
        "cache_bytes": cached,
        "peak_bytes_loading": loaded,
        "peak_bytes": peak,
        "ratio": round((peak - cached) / weights, 3),
        "target": PEAK_AT_MOST,
        "reached": peak - cached <= PEAK_AT_MOST * weights,
    }


def memory(source: str | Path, quantize: str | None) -> dict:
    """use_memory, in a process of its own."""
    command = [sys.executable, "-m", "ch08_full_models.start_time", "--child", str(source)]
    command += [quantize] if quantize else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{source}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def show(start: list[dict], memories: list[dict]) -> None:
    """Prints a line for each run: what was found, and whether the target is reached."""
    for found in start:
        what = f"{found['model']} {found['quantize'] or 'unquantized'}"
        bound = f"{found['import_torch_s']:.2f} + {found['read_s']:.2f} s"
        print(
            f"{what:26} first text {found['first_text_s']:5.2f} s, {found['ratio']:5.3f} times "
            f"({bound}), {'' if found['reached'] else 'not '}reached"
        )
    for found in memories:
        what = f"{found['model']} {found['quantize'] or 'unquantized'}"
        peak, weights = found["peak_bytes"] / 1e6, found["weight_bytes"] / 1e6
        print(
            f"{what:26} peak {peak:5.0f} MB, {found['ratio']:5.3f} times {weights:.0f} MB "
            f"of weights, {'' if found['reached'] else 'not '}reached"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="one round of one model")
    parser.add_argument("--out", type=Path, help="where to write the record, as JSON")
    parser.add_argument("--child", nargs="+", metavar="SOURCE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        source, quantize = (*args.child, None)[:2]
        print(json.dumps(use_memory(source, quantize)))
        return 0
    if args.rounds < 1:
        parser.exit(2, "error: expected --rounds from 1 on\n")
    runs, memory_runs = (RUNS[:1], MEMORY_RUNS[2:3]) if args.smoke else (RUNS, MEMORY_RUNS)
    try:
        start = measure(runs, 1 if args.smoke else args.rounds)
        memories = [memory(*run) for run in memory_runs]
    except (CheckpointError, RuntimeError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    record = environment(torch.device("cpu"))
    record |= {"rounds": args.rounds, "start": start, "memory": memories}
    save_json(args.out or result_path(__file__, args.smoke), record)
    show(start, memories)
    return 0


if __name__ == "__main__":
    sys.exit(main())
