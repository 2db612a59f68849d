"""Chapter 8: how fast the models run on a GPU, beside transformers and beside the GPU's own limits.

    python -m ch08_full_models.benchmark_gpu            needs a GPU; writes benchmark_gpu.json
    python -m ch08_full_models.benchmark_gpu --smoke    tiny, on a CPU, to see that it works

Written for a GPU, run in tests on a CPU only; no measurement is committed. So what it will find is
not known, nor how long it takes: it is meant to end within about eight minutes on an H100, which
has room for DeepSeek-V2-Lite's 31 GB and for what both projects need besides.

Weights are random, in the shapes of published models, and the same tensors on all sides: before
anything is timed, each side's logits are compared with those of ours without graphs. (In a model
with experts a rounding can choose another one.) Sides take turns; a turn reads a prompt (prefill)
and makes new tokens, the likeliest (decode). The first turn compiles and records and does not
count. Given are medians.

A token of decoding reads the weights that it needs once, and what the cache has of all tokens
before it. These bytes over the time, as a share of the bandwidth that this very card reaches in a
plain read or copy, say how far a side is from the limit. Training is held against the rate of a
large bfloat16 matrix product on this card.
"""

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import torch.nn as nn
from torch import Tensor

from ch01_gpt2 import gpt2
from ch01_gpt2.notebook import table
from ch01_gpt2.throughput import fused
from ch01_gpt2.train import TrainConfig, environment, result_path, save_json, start_run, train_step
from ch08_full_models.checkpoint import MODELS, build, find_family, one_line
from ch08_full_models.cuda_steps import fixed_steps

SHAPES = ("qwen3-0.6b", "qwen3-4b", "deepseek-v2-lite")
SHARE, TIMES, TRAINING = 0.6, 1.5, 0.4  # of bandwidth; transformers' best; of the matrix rate
VOCAB = 50304  # GPT-2's 50,257 rows and some that no token has: a multiple of 64, for the matrices
TINY = dict(
    vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=3, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
TINY_QWEN = TINY | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
TINY_DEEPSEEK = TINY | dict(
    num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=24, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8, num_experts_per_tok=2,
    moe_intermediate_size=16,
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    device: str = "cuda"
    dtype: str = "bfloat16"
    backend: str = "inductor"  # torch.compile's
    shapes: tuple[str, ...] = SHAPES
    changes: dict[str, dict] = field(default_factory=dict)  # to a shape's config.json
    batches: tuple[int, ...] = (1, 32)
    compiled_batches: tuple[int, ...] = (1,)  # where transformers is compiled, which takes long
    prompt: int = 512  # tokens
    n_new: int = 33  # the first belongs to the prefill
    rounds: int = 5  # turns that count
    large: int = 1 << 30  # numbers in the tensor that is read and copied
    square: int = 8192  # rows of the large matrix
    gpt2: dict = field(default_factory=lambda: dict(vocab_size=VOCAB))  # chapter 1's Config
    train_batch: int = 16  # sequences of the model's full length
    train_steps: int = 5  # in a turn


SMOKE = Plan(
    device="cpu",
    dtype="float32",
    backend="eager",
    changes={name: TINY_DEEPSEEK if "deepseek" in name else TINY_QWEN for name in SHAPES},
    batches=(1, 3),
    prompt=9,
    n_new=5,
    rounds=1,
    large=1 << 12,
    square=64,
    gpt2=dict(
        vocab_size=64, max_seq_len=16, n_layers=1, d_model=32, n_heads=2, head_dim=16, d_ff=64
    ),
    train_batch=2,
    train_steps=1,
)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long it takes until the device has done it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


# The card's own limits


def roofline(plan: Plan) -> dict[str, float]:
    """Bytes a second of a read and of a copy, and bfloat16 operations a second of a product."""
    device, n, times = torch.device(plan.device), plan.square, 10
    large, copy = (torch.ones(plan.large, dtype=torch.bfloat16, device=device) for _ in range(2))
    a, b, c = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(3))

    def rate(amount: float, work: Callable[[], object]) -> float:
        turns = [seconds(lambda: [work() for _ in range(times)], device) for _ in range(6)]
        return amount * times / median(turns[1:])

    return {
        "read_bytes_per_s": rate(large.nbytes, large.amax),
        "copy_bytes_per_s": rate(2 * large.nbytes, lambda: copy.copy_(large)),
        "matrix_flops_per_s": rate(2.0 * n**3, lambda: torch.mm(a, b, out=c)),
    }


# The sides


@dataclass
class Side:
    """One way to run a model: from a prompt (B, T), or one token (B, 1), to logits (B, V)."""

    read: Callable[[Tensor], Tensor]  # forgets the text before
    step: Callable[[Tensor], Tensor]
    held_bytes: int = 0  # kept between turns besides the weights
    peak_bytes: int = 0  # in a turn, on top of these
    turns: list[tuple[float, float]] = field(default_factory=list)  # seconds: prefill, decode

    @torch.no_grad()
    def turn(self, prompt_BT: Tensor, n_new: int) -> tuple[float, float]:
        """Seconds for the prompt and its first new token, and for the n_new - 1 others."""
        tokens_B1 = torch.empty_like(prompt_BT[:, :1])

        def prefill() -> None:
            tokens_B1.copy_(self.read(prompt_BT).argmax(dim=-1, keepdim=True))

        def decode() -> None:
            for _ in range(n_new - 1):
                tokens_B1.copy_(self.step(tokens_B1).argmax(dim=-1, keepdim=True))

        return seconds(prefill, prompt_BT.device), seconds(decode, prompt_BT.device)

    @torch.no_grad()
    def logits(self, text_BT: Tensor, n_single: int) -> Tensor:
        """Logits (B, n_single + 1, V) at the end of a text whose last tokens come one by one."""
        first_BT, *single = text_BT.split([text_BT.shape[1] - n_single] + [1] * n_single, dim=1)
        found = [self.read(first_BT).float().clone()]
        return torch.stack(found + [self.step(t).float().clone() for t in single], dim=1)


def ours(model: nn.Module) -> Side:
    """Whatever steps the model has."""
    caches: list[list] = []

    def read(prompt_BT: Tensor) -> Tensor:
        if caches and hasattr(caches[0], "rewind"):
            caches[0].rewind()
        else:
            caches[:] = [model.new_cache()]
        return model(prompt_BT, caches[0], last_only=True)[:, 0]

    return Side(read, lambda tokens_B1: model(tokens_B1, caches[0], last_only=True)[:, 0])


def theirs(hf: nn.Module, room: int, compiled: bool, backend: str) -> Side:
    """transformers: as it is, or with what its generate takes for a static cache."""
    from transformers import DynamicCache, StaticCache

    mode = "reduce-overhead" if backend == "inductor" else None
    decode = torch.compile(hf.__call__, mode=mode, backend=backend) if compiled else hf
    caches: list = [StaticCache(config=hf.config, max_cache_len=room)] if compiled else []

    def call(run: Callable, tokens_BT: Tensor) -> Tensor:
        return run(tokens_BT, past_key_values=caches[0], use_cache=True, logits_to_keep=1).logits

    def read(prompt_BT: Tensor) -> Tensor:
        if compiled:
            caches[0].reset()
        else:
            caches[:] = [DynamicCache(config=hf.config)]
        return call(hf, prompt_BT)[:, -1]

    return Side(read, lambda tokens_B1: call(decode, tokens_B1)[:, -1])


def their_model(config: dict, plan: Plan) -> nn.Module:
    """transformers' model with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(plan.device):
        hf = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=getattr(torch, plan.dtype)
        )
    return hf.eval().requires_grad_(False)


def our_model(config: dict, hf: nn.Module) -> nn.Module:
    """Ours, with the tensors of transformers' model for weights. KeyError if one is missing."""
    where = Path("config.json")
    family = find_family(config, where)
    model = build(family, config, where, next(hf.parameters()).dtype)
    missing = {name for name, _ in model.named_parameters()}
    for theirs_name, tensor in hf.named_parameters():
        for name, w in family.convert({theirs_name: tensor.detach()}).items():
            module, _, last = name.rpartition(".")
            setattr(model.get_submodule(module), last, nn.Parameter(w, requires_grad=False))
            missing.remove(name)
    if missing:
        raise KeyError(f"transformers has no {', '.join(sorted(missing))}")
    return model.eval()


def weight_bytes(model: nn.Module, batch: int) -> float:
    """Bytes of weights that a step reads for a batch of single tokens.

    Of an embedding that is not also the output matrix, next to nothing. Of experts, those that the
    tokens go to, as many as there would be on average if each token chose at random.
    """
    n_bytes = float(sum(p.nbytes for p in model.parameters()))
    if hasattr(model, "head"):
        n_bytes -= model.embed.weight.nbytes
    for moe in (module for module in model.modules() if hasattr(module, "experts")):
        idle = (1 - moe.n_active / len(moe.experts)) ** batch
        n_bytes -= idle * sum(p.nbytes for p in moe.experts.parameters())
    return n_bytes


def cache_bytes(model: nn.Module, batch: int, n_seen: int) -> float:
    """Bytes that a step reads of what the cache keeps of n_seen tokens of each sequence."""
    cache = model.new_cache()
    prompt_BT = torch.zeros(batch, 2, dtype=torch.int64, device=model.embed.weight.device)
    with torch.no_grad():
        model(prompt_BT, cache, last_only=True)
    return sum(layer.n_bytes() / layer.buffers[0].shape[1] for layer in cache) * n_seen


# The measurement


def decode_shape(name: str, plan: Plan, bandwidth: float) -> list[dict]:
    """A record for each batch size: every side's rates, memory and difference to ours."""
    config = MODELS[name].config | plan.changes.get(name, {})
    hf = their_model(config, plan)
    room = 8 * math.ceil((plan.prompt + plan.n_new) / 8)  # rows of scores start at whole 16 bytes
    records = []
    for batch in plan.batches:
        eager = our_model(config, hf)
        makers: dict[str, Callable[[], Side]] = {
            "ours": lambda model=eager: ours(model),
            "ours, graph": lambda: ours(fixed_steps(our_model(config, hf), room)),
            "ours, compiled, graph": lambda: ours(
                fixed_steps(our_model(config, hf), room, plan.backend)
            ),
            "transformers": lambda: theirs(hf, room, False, plan.backend),
        }
        if batch in plan.compiled_batches:
            makers["transformers, compiled"] = lambda: theirs(hf, room, True, plan.backend)
        n_seen = plan.prompt + plan.n_new / 2
        read = {"weights": weight_bytes(eager, batch), "cache": cache_bytes(eager, batch, n_seen)}
        sides = take_turns(makers, config["vocab_size"], batch, plan)
        for side in sides.values():
            if "error" not in side:
                a_step = side["decode_s"] / (plan.n_new - 1)
                side["share_of_bandwidth"] = sum(read.values()) / a_step / bandwidth
                side["peak_bytes"] += sum(p.nbytes for p in eager.parameters())
        records.append({"shape": name, "batch": batch, "bytes_per_step": read, "sides": sides})
        del eager, makers
        free(plan)
    return records


def take_turns(
    makers: dict[str, Callable[[], Side]], n_vocab: int, batch: int, plan: Plan
) -> dict[str, dict]:
    """What each side takes, by name. One that cannot run has its error there, and others go on."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, plan.prompt)
    prompt_BT = torch.randint(n_vocab, shape, generator=generator).to(plan.device)
    sides: dict[str, Side] = {}
    found: dict[str, dict] = {}
    expected = None
    for name, make in makers.items():
        try:
            held, start = allocated(plan), time.perf_counter()
            side = make()
            side.turn(prompt_BT, plan.n_new)
            logits = side.logits(prompt_BT, n_single=4)
            side.held_bytes = allocated(plan) - held
            expected = logits if expected is None else expected
            difference = ((logits - expected).abs().max() / expected.abs().max()).item()
            found[name] = {"start_s": time.perf_counter() - start, "difference": difference}
            sides[name] = side
        except Exception as error:  # whatever it is: on hardware that nobody has tried this on
            found[name] = {"error": one_line(error)}
    for _ in range(plan.rounds):
        for side in sides.values():
            before = allocated(plan, reset=True)
            side.turns.append(side.turn(prompt_BT, plan.n_new))
            side.peak_bytes = max(side.peak_bytes, allocated(plan, peak=True) - before)
    for name, side in sides.items():
        prefill, decode = (median(column) for column in zip(*side.turns, strict=True))
        found[name] |= {
            "prefill_tokens_per_s": batch * plan.prompt / prefill,
            "decode_tokens_per_s": batch * (plan.n_new - 1) / decode,
            "decode_s": decode,
            "peak_bytes": side.held_bytes + side.peak_bytes,
            "seconds": side.turns,
        }
    return found


def allocated(plan: Plan, peak: bool = False, reset: bool = False) -> int:
    """Bytes that torch has on the GPU, now or at most since the last reset; 0 on a CPU."""
    if plan.device == "cpu":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def free(plan: Plan) -> None:
    """Forgets compiled code, and gives memory back."""
    torch.compiler.reset()
    gc.collect()
    if plan.device == "cuda":
        torch.cuda.empty_cache()


def train_flops(model: gpt2.Transformer, seq_len: int) -> float:
    """Operations a token: 6 a weight, forward and backward, and those of causal attention.

    A query sees half the text on average: what a kernel computes and masks is not counted. Nor is
    the table of positions, which is looked up.
    """
    n_weights = sum(p.numel() for p in model.parameters()) - model.pos_embed.weight.numel()
    return 6 * n_weights + 6 * model.cfg.n_layers * model.cfg.d_model * seq_len


def training(plan: Plan, matrix_rate: float) -> dict:
    """Chapter 1's loop on GPT-2 124M, compiled, with torch's attention and norm."""
    cfg = gpt2.Config(**plan.gpt2)
    torch.manual_seed(0)
    tokens_N = torch.randint(min(cfg.vocab_size, 50257), (200_000,))
    with torch.device(plan.device):
        model = gpt2.Transformer(cfg).train()
    flops = train_flops(model, cfg.max_seq_len)
    settings = TrainConfig(steps=10_000, batch_size=plan.train_batch, seq_len=cfg.max_seq_len)
    run = start_run(model, tokens_N, settings)
    model.compile(backend=plan.backend, dynamic=False)
    turns = []
    with fused():
        for _ in range(plan.rounds + 1):
            work = lambda: [train_step(run, tokens_N) for _ in range(plan.train_steps)]  # noqa: E731
            turns.append(seconds(work, torch.device(plan.device)))
    a_turn = plan.train_steps * plan.train_batch * cfg.max_seq_len
    rate = a_turn / median(turns[1:])
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_token": flops,
        "tokens_per_s": rate,
        "share_of_matrix_rate": rate * flops / matrix_rate,
        "losses": [run.losses[0].item(), run.losses[run.step - 1].item()],
        "seconds": turns,
    }


def verdicts(records: list[dict], trained: dict | None) -> list[dict]:
    """A line for every target: the ratio, and whether it is reached. Each project's best counts."""
    lines = []

    def add(what: str, ratio: float, least: float, of: str) -> None:
        target = f"{what} >= {least} x {of}"
        lines.append({"target": target, "ratio": round(ratio, 3), "reached": ratio >= least})

    def best(sides: dict[str, dict], project: str, what: str) -> float:
        mine = [side for name, side in sides.items() if name.startswith(project)]
        return max((side.get(what, 0.0) for side in mine), default=0.0)

    for record in records:
        if record["batch"] == 1:
            what, sides = f"decode {record['shape']}", record["sides"]
            add(what, best(sides, "ours", "share_of_bandwidth"), SHARE, "bandwidth limit")
            rate, other = (best(sides, p, "decode_tokens_per_s") for p in ("ours", "transformers"))
            if other:
                add(what, rate / other, TIMES, "transformers' best")
    if trained and "error" not in trained:
        add("training GPT-2 124M", trained["share_of_matrix_rate"], TRAINING, "matrix rate")
    return lines


def experiment(plan: Plan) -> dict:
    """The whole record."""
    limits = roofline(plan)
    free(plan)
    bandwidth = max(limits["read_bytes_per_s"], limits["copy_bytes_per_s"])
    records = []
    for name in plan.shapes:
        try:
            records += decode_shape(name, plan, bandwidth)
        except RuntimeError as error:  # out of memory, for one
            print(f"{name}: {one_line(error)}", file=sys.stderr)
        free(plan)
    try:
        trained = training(plan, limits["matrix_flops_per_s"])
    except Exception as error:
        trained = {"error": one_line(error)}
    versions = {"transformers": version("transformers"), "cuda": torch.version.cuda}
    return {
        "environment": environment(torch.device(plan.device)) | versions,
        "settings": asdict(plan),
        "limits": limits,
        "decode": records,
        "training": trained,
        "targets": verdicts(records, trained),
    }


def print_record(record: dict) -> None:
    """Prints the limits, a table of all sides, and the targets."""
    print(", ".join(f"{name} {rate:.3g}" for name, rate in record["limits"].items()))
    head = ["shape", "side", "batch", "prefill/s", "decode/s", "of bandwidth", "GB", "difference"]
    cells = []
    for part in record["decode"]:
        for name, side in part["sides"].items():
            if "error" in side:
                print(f"{part['shape']}, batch {part['batch']}: {name}: {side['error']}")
                continue
            cells.append(
                [part["shape"], name, part["batch"], round(side["prefill_tokens_per_s"])]
                + [round(side["decode_tokens_per_s"], 1), round(side["share_of_bandwidth"], 3)]
                + [round(side["peak_bytes"] / 1e9, 2), f"{side['difference']:.1e}"]
            )
    table(head, cells)
    print("training:", {k: v for k, v in record["training"].items() if k != "seconds"})
    for line in record["targets"]:
        verdict = "reached    " if line["reached"] else "not reached"
        print(f"{verdict}  {line['ratio']:7.3f}  {line['target']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES, metavar="NAME")
    parser.add_argument("--batches", type=int, nargs="+", metavar="B", help="default: 1 32")
    parser.add_argument("--rounds", type=int, help=f"turns that count; default: {Plan.rounds}")
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    args = parser.parse_args()
    args.out = args.out or result_path(__file__, args.smoke)
    plan = replace(SMOKE if args.smoke else Plan(), shapes=tuple(args.shapes))
    if args.batches:
        plan = replace(plan, batches=tuple(args.batches))
    if args.rounds is not None:
        plan = replace(plan, rounds=args.rounds)
    if min(*plan.batches, plan.rounds) < 1:
        parser.exit(2, "error: expected --batches and --rounds from 1 on\n")
    if not args.smoke and not torch.cuda.is_available():
        parser.exit(2, "error: no CUDA device is here; --smoke runs tiny shapes on a CPU\n")
    if find_spec("transformers") is None:
        parser.exit(2, "error: transformers is not here; pip install -e '.[test]' brings it\n")
    record = experiment(plan)
    save_json(args.out, record)
    print_record(record)
    if args.smoke:
        print("tiny shapes on a CPU: it runs, but its numbers mean nothing")


if __name__ == "__main__":
    main()
