"""What one more token costs: seconds and bytes against the context, by number of key/value heads.

Chapter 3's measurement. Each layer's cache is filled with random numbers up to a context; then the
model reads one token. Without a cache it reads the whole text again for each token.

The chapter's cache joins old and new tokens with torch.cat, so a step copies the whole cache before
attention reads it, and a layer with a window copies that a second time. The seconds contain those
copies, which grow with the cache in the same way as what attention itself reads. Chapter 8 writes
into buffers instead.

    B  sequences   T  new tokens   S  tokens in the cache   J  key/value heads   K  width of a head

    python -m ch03_gqa.decode            about 2 minutes on one CPU thread; writes decode.json
    python -m ch03_gqa.decode --smoke    everything tiny, in seconds
"""

import argparse
import copy
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch

from ch01_gpt2.train import environment, result_path, save_json
from ch03_gqa.gqa import Config, LayerCache, Transformer

MODEL = Config(
    vocab_size=256,
    n_layers=4,
    d_model=512,
    n_heads=16,
    n_kv_heads=16,
    head_dim=32,
    windows=(None,),
    d_ff=2048,
)
WINDOW = 256
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)
NO_CACHE_CONTEXTS = (256, 512, 1024, 2048)  # beyond, one token takes many seconds
ROUNDS, REPEATS, NO_CACHE_ROUNDS = 9, 3, 5  # REPEATS: timings in a row of one kind, in each round


def kinds(cfg: Config, window: int) -> dict[str, Config]:
    """The models that are compared. They differ in their caches only, and in k_proj and v_proj."""
    quarter = replace(cfg, n_kv_heads=cfg.n_heads // 4)
    return {
        "mha": cfg,
        "gqa": quarter,
        "mqa": replace(cfg, n_kv_heads=1),
        "window": replace(quarter, windows=(window,)),
    }


def filled_cache(model: Transformer, context: int) -> list[LayerCache]:
    """A cache as after a text of `context` tokens, with random keys and values."""
    cfg, cache = model.cfg, model.new_cache()
    pos_1S = torch.arange(context)[None]
    for layer_cache in cache:
        k_1SJK, v_1SJK = torch.randn(2, 1, context, cfg.n_kv_heads, cfg.head_dim)
        layer_cache.append(k_1SJK, v_1SJK, pos_1S)
    return cache


@torch.no_grad()
def seconds_to_read(model: Transformer, cache: list[LayerCache] | None, n_new: int) -> float:
    """Seconds for one call that reads n_new tokens. The cache stays as it is."""
    tokens_1T = torch.zeros(1, n_new, dtype=torch.int64)
    cache = cache and [copy.copy(layer) for layer in cache]  # append replaces tensors, changes none
    start = time.perf_counter()
    model(tokens_1T, cache, last_only=True)
    return time.perf_counter() - start


def time_context(
    models: dict[str, Transformer], context: int, rounds: int
) -> dict[str, tuple[float, int]]:
    """Median seconds of one token after `context` tokens, and the cache's bytes then, by kind.

    All kinds take turns in each round, so that whatever else slows the machine down meets them all
    alike. The first round warms up and is not counted.
    """
    caches = {kind: filled_cache(model, context) for kind, model in models.items()}
    n_bytes = {kind: sum(layer.n_bytes() for layer in cache) for kind, cache in caches.items()}
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(rounds + 1):
        for kind, model in models.items():
            times[kind] += [seconds_to_read(model, caches[kind], 1) for _ in range(REPEATS)]
    return {kind: (median(times[kind][REPEATS:]), n_bytes[kind]) for kind in models}


def time_no_cache(model: Transformer, context: int, rounds: int) -> float:
    """Median seconds to read a text of `context` tokens and one more, all of them at once."""
    times = [seconds_to_read(model, None, context + 1) for _ in range(rounds + 1)]
    return median(times[1:])


def measure(cfg: Config, window: int, contexts: tuple[int, ...], rounds: int) -> list[dict]:
    """One record a kind, with the seconds and bytes of every context."""
    torch.manual_seed(0)
    models = {kind: Transformer(c).eval() for kind, c in kinds(cfg, window).items()}
    cells = [time_context(models, context, rounds) for context in contexts]
    return [
        {
            "kind": kind,
            "n_kv_heads": model.cfg.n_kv_heads,
            "window": model.cfg.windows[0],
            "seconds_per_token": [cell[kind][0] for cell in cells],
            "cache_bytes": [cell[kind][1] for cell in cells],
        }
        for kind, model in models.items()
    ]


def print_table(record: dict) -> None:
    """Milliseconds a token, without any cache in the last column, and the caches in MiB."""
    runs, n_columns = record["runs"], len(record["runs"]) + 1
    names = "".join(f"{run['kind']:>9}" for run in runs)
    print(
        f"{'context':8}{'milliseconds a token':>{9 * n_columns}}{'cache in MiB':>{9 * len(runs)}}"
    )
    print(f"{'':8}{names}{'no cache':>9}{names}")
    no_cache = dict(zip(*record["no_cache"].values(), strict=True))
    for i, context in enumerate(record["contexts"]):
        seconds = [run["seconds_per_token"][i] for run in runs] + [no_cache.get(context)]
        times = "".join(f"{'' if s is None else f'{1000 * s:.2f}':>9}" for s in seconds)
        sizes = "".join(f"{run['cache_bytes'][i] / 2**20:9.2f}" for run in runs)
        print(f"{context:8,}{times}{sizes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows only that it runs")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    args = parser.parse_args()
    args.out = args.out or result_path(__file__, args.smoke)
    torch.set_num_threads(1)
    cfg, window, contexts, no_cache = MODEL, WINDOW, CONTEXTS, NO_CACHE_CONTEXTS
    if args.smoke:
        cfg = replace(cfg, n_layers=2, d_model=64, n_heads=4, n_kv_heads=4, head_dim=16, d_ff=128)
        window, contexts, no_cache = 32, (32, 64, 128), (32, 64)
    runs = measure(cfg, window, contexts, ROUNDS)
    torch.manual_seed(0)
    mha = Transformer(cfg).eval()
    record = {
        "environment": environment(torch.device("cpu")),
        "settings": {
            "model": asdict(cfg),
            "window": window,
            "dtype": "float32",
            "batch": 1,
            "rounds": ROUNDS,
            "repeats_a_round": REPEATS,
            "no_cache_rounds": NO_CACHE_ROUNDS,
            "seed": 0,
            "text": "none: random keys, values and weights",
            "smoke": args.smoke,
        },
        "contexts": contexts,
        "runs": runs,
        "no_cache": {
            "contexts": no_cache,
            "seconds_per_token": [time_no_cache(mha, n, NO_CACHE_ROUNDS) for n in no_cache],
        },
    }
    save_json(args.out, record)
    print_table(record)


if __name__ == "__main__":
    main()
