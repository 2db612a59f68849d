"""Chapter 8, measured: a model of 31 GB decodes in 6 GB of memory.

Writes a checkpoint in the exact shape of DeepSeek-V2-Lite, with random weights, into a temporary
folder, and has a child process generate with it while its weights may take 5e9 bytes. Random
routers spread tokens over all experts, so the cache of experts does worse here than with a trained
model, whose experts have favourites. Files that were just written are partly still in the system's
own cache, which a process's memory does not count: a disk read for the first time is slower.

    python -m ch08_full_models.offload_demo                  needs 32 GB of disk; offload_demo.json
    python -m ch08_full_models.offload_demo --name qwen3-0.6b --memory 0.9    a smaller one, dense
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from ch01_gpt2.train import environment, save_json
from ch08_full_models.__main__ import peak_rss_bytes
from ch08_full_models.checkpoint import MODELS, build, family_of, find_family, load
from ch08_full_models.download import INDEX

SHARD = 4_000_000_000  # bytes
PROMPT, N_NEW = 16, 16  # tokens


def write_checkpoint(folder: Path, hf: dict) -> int:
    """A checkpoint of random bfloat16 weights as hf (config.json) describes it; its bytes.

    Matrices are cut from one long row of random numbers, each from another place: random enough,
    and as fast as the disk. Norm weights are one.
    """
    where = folder / "config.json"
    where.write_text(json.dumps(hf), encoding="utf-8")
    family = find_family(hf, where)
    model = build(family, hf, where, torch.bfloat16)
    params = {family.rename(name, family.HF_NAMES): p for name, p in model.named_parameters()}
    random = (torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)) / 50).bfloat16()
    shards: list[dict[str, Tensor]] = [{}]
    for name, param in params.items():
        if sum(p.nbytes for p in shards[-1].values()) + param.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = param
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):06}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        write_shard(folder / file, shard, random)
    total = sum(p.nbytes for p in params.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return total


def write_shard(file: Path, shard: dict[str, Tensor], random: Tensor) -> None:
    """One .safetensors file: the length of the header, the header, the numbers."""
    header, end = {}, 0
    for name, param in shard.items():
        dtype = {torch.bfloat16: "BF16", torch.float32: "F32"}[param.dtype]
        offsets = [end, end + param.nbytes]
        header[name] = {"dtype": dtype, "shape": list(param.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header).encode("utf-8")
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for i, param in enumerate(shard.values()):
            if param.ndim == 1:
                numbers = torch.ones(param.shape, dtype=param.dtype)
                f.write(numbers.view(torch.uint8).numpy())
                continue
            left, start = param.numel(), 7919 * i % len(random)
            while left:
                piece = random[start : start + left].to(param.dtype)
                f.write(piece.view(torch.uint8).numpy())
                left, start = left - len(piece), 0


def decode(folder: Path, memory: int) -> dict:
    """Loads the checkpoint, reads a prompt, makes tokens; speed and memory, with all of Python."""
    start = time.perf_counter()
    model, _ = load(folder, device="cpu", memory=memory)
    loaded = time.perf_counter()
    prompt_1T = torch.arange(PROMPT)[None] * 101 % model.cfg.vocab_size
    times, reads = [], []
    for _ in family_of(model).generate(model, prompt_1T, N_NEW + 1):
        times.append(time.perf_counter())
        reads.append((model.disk.n_calls, model.disk.n_reads, model.disk.n_bytes_read))
    calls, n_reads, n_bytes = (b - a for a, b in zip(reads[0], reads[-1], strict=True))
    return {
        "load_s": loaded - start,
        "prompt_tokens": PROMPT,
        "prompt_s": times[0] - loaded,
        "new_tokens": N_NEW,
        "tokens_per_s": N_NEW / (times[-1] - times[0]),
        "bytes_read_per_token": n_bytes / N_NEW,
        "parts_called_per_token": calls / N_NEW,
        "share_of_calls_that_read": n_reads / calls,
        "peak_rss_bytes": peak_rss_bytes(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", choices=MODELS, default="deepseek-v2-lite", help="whose shape")
    parser.add_argument("--memory", type=float, default=5.0, help="of the weights, in 1e9 bytes")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--decode", type=Path, metavar="FOLDER", help="what the child process does")
    args = parser.parse_args()
    memory = round(args.memory * 1e9)
    if args.decode:
        print(json.dumps(decode(args.decode, memory)))
        return
    with tempfile.TemporaryDirectory() as folder:
        n_bytes = write_checkpoint(Path(folder), MODELS[args.name].config)
        print(f"{n_bytes:,} bytes written")
        command = [sys.executable, "-m", "ch08_full_models.offload_demo", "--decode", folder]
        command += ["--memory", str(args.memory)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    record = {
        "environment": environment(torch.device("cpu")),
        "model": args.name,
        "checkpoint_bytes": n_bytes,
        "memory": memory,
        "result": json.loads(done.stdout),
    }
    save_json(args.out, record)
    print(json.dumps(record["result"], indent=2))


if __name__ == "__main__":
    main()
