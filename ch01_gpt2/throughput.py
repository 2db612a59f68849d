"""Chapter 1: tokens a second in training, beside the plain loop that most people would write.

The plain loop is nanoGPT's recipe in our own words: queries, keys and values from one matrix,
torch's attention, LayerNorm and GELU, fused AdamW, clipped gradients. Ours is train.train_step on
gpt2.Transformer. Its attention keeps the whole table of scores, its norm is written out in six
operations, and each call fills a cache, because that is the lesson; `fused` swaps these for torch's
own, as `--fused` of the training command does. All start from the same weights, draw the same
batches and must have the same losses; then they take turns.

A tensor's name ends in its axes: `tokens_BT` has shape (B, T).
    B  sequences in the batch         T  tokens of a sequence
    S  tokens attention can see       D  width of the residual stream
    H  attention heads                K  width of one head
    V  vocabulary                     N  tokens of the text

    python -m ch01_gpt2.throughput            two minutes on one CPU thread; writes throughput.json
    python -m ch01_gpt2.throughput --smoke    tiny, in seconds
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ch01_gpt2 import gpt2
from ch01_gpt2.gpt2 import Config, LayerCache, LayerNorm, Transformer
from ch01_gpt2.notebook import table
from ch01_gpt2.train import (
    TrainConfig,
    environment,
    lr_at,
    result_path,
    save_json,
    start_run,
    train_step,
)


@dataclass(frozen=True)
class Plan:
    """What is timed."""

    sizes: tuple[tuple[str, int, int, int, int, int], ...] = (  # name, V, layers, D, B, T
        ("the command's default", 1024, 4, 128, 8, 64),
        ("bigger", 4096, 6, 384, 2, 256),
    )
    rounds: int = 31  # turns of each loop, after one that does not count
    steps: tuple[int, ...] = (5, 1)  # in a turn, by size
    check_steps: int = 3  # whose losses are compared
    tolerance: float = 1e-4  # nats, between two loops
    n_tokens: int = 200_000  # of random text
    seed: int = 0


SMOKE = Plan(sizes=(("tiny", 32, 1, 32, 2, 16),), rounds=2, steps=(2,), n_tokens=500)


# Torch's own parts in place of the lesson's


@contextmanager
def fused() -> Iterator[None]:
    """Within it, gpt2.Transformer trains with torch's attention and norm: equal, but for rounding.

    Only for texts that are read whole, as in training: nothing is kept for a next token. It acts
    on the module gpt2, so on every model of it. RuntimeError where a cache is filled a second time,
    and for padding.
    """
    ours = gpt2.attend, gpt2.causal_mask, LayerNorm.forward, LayerCache.append
    gpt2.attend, gpt2.causal_mask = fused_attend, no_mask
    LayerNorm.forward, LayerCache.append = fused_norm, keep_nothing
    try:
        yield
    finally:
        gpt2.attend, gpt2.causal_mask, LayerNorm.forward, LayerCache.append = ours


def fused_attend(
    q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, mask_BTS: None, scale: float
) -> Tensor:
    """gpt2.attend for S = T, (B, T, H, K), without a table of scores (Dao et al. 2022)."""
    q_BHTK, k_BHSK, v_BHSK = (x.transpose(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, is_causal=True, scale=scale)
    return y_BHTK.transpose(1, 2)


def no_mask(q_pos_BT: Tensor, k_pos_BS: Tensor) -> None:
    """In place of gpt2.causal_mask, which fused_attend does without."""


def fused_norm(self: LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm.forward in one operation, in float32 within autocast, too."""
    return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps).type_as(x)


def keep_nothing(self: LayerCache, *new: Tensor) -> tuple[Tensor, ...]:
    """LayerCache.append for a text that ends with this call."""
    if self.n_seen or self.n_pad_B is not None:
        raise RuntimeError("fused: for whole texts without padding, not for generating")
    self.n_seen = new[0].shape[1]
    return new


# The plain loop


class PlainBlock(nn.Module):
    """A layer as one writes it with torch's own parts."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.n_heads = cfg.n_heads
        self.norm_1 = nn.LayerNorm(cfg.d_model, cfg.norm_eps)
        self.qkv = nn.Linear(cfg.d_model, 3 * cfg.d_model)
        self.out = nn.Linear(cfg.d_model, cfg.d_model)
        self.norm_2 = nn.LayerNorm(cfg.d_model, cfg.norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(cfg.d_model, cfg.d_ff),
            nn.GELU(approximate="tanh"),
            nn.Linear(cfg.d_ff, cfg.d_model),
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = (
            part_BTD.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for part_BTD in self.qkv(self.norm_1(x_BTD)).chunk(3, dim=-1)
        )
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        x_BTD = x_BTD + self.out(y_BHTK.transpose(1, 2).flatten(-2))
        return x_BTD + self.mlp(self.norm_2(x_BTD))


class PlainModel(nn.Module):
    """GPT-2 as one writes it with torch's own parts, with the weights of one of ours."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        cfg = model.cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.pos_embed = nn.Embedding(cfg.max_seq_len, cfg.d_model)
        self.blocks = nn.ModuleList(PlainBlock(cfg) for _ in range(cfg.n_layers))
        self.norm = nn.LayerNorm(cfg.d_model, cfg.norm_eps)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.head.weight = self.embed.weight
        self.copy(model)

    @torch.no_grad()
    def copy(self, model: Transformer) -> None:
        """Takes over our weights, q_proj, k_proj and v_proj as one matrix."""
        ours = model.state_dict()
        pairs = {"embed": "embed", "pos_embed": "pos_embed", "norm": "norm"}
        for layer in range(len(self.blocks)):
            block = f"blocks.{layer}"
            pairs |= {
                f"{block}.norm_1": f"{block}.attn_norm",
                f"{block}.norm_2": f"{block}.mlp_norm",
                f"{block}.out": f"{block}.attn.o_proj",
                f"{block}.mlp.0": f"{block}.mlp.up_proj",
                f"{block}.mlp.2": f"{block}.mlp.down_proj",
            }
            for end in ("weight", "bias"):
                ours[f"{block}.qkv.{end}"] = torch.cat(
                    [ours[f"{block}.attn.{letter}_proj.{end}"] for letter in "qkv"]
                )
            pairs[f"{block}.qkv"] = f"{block}.qkv"
        for name, param in self.named_parameters():
            module, _, end = name.rpartition(".")
            param.copy_(ours[f"{pairs[module]}.{end}"])

    def forward(self, tokens_BT: Tensor) -> Tensor:
        pos_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.embed(tokens_BT) + self.pos_embed(pos_T)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD))


class PlainLoop:
    """Called once a step; `losses` as our loop keeps them."""

    def __init__(self, model: PlainModel, tokens_N: Tensor, cfg: TrainConfig) -> None:
        self.model, self.tokens_N, self.cfg, self.losses = model, tokens_N, cfg, []
        matrices = [param for param in model.parameters() if param.ndim >= 2]
        vectors = [param for param in model.parameters() if param.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": cfg.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)
        self.generator = torch.Generator().manual_seed(cfg.seed)

    def __call__(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(len(self.losses), self.cfg)
        n_starts, seq_len = len(self.tokens_N) - self.cfg.seq_len, self.cfg.seq_len
        starts = torch.randint(n_starts, (self.cfg.batch_size,), generator=self.generator)
        inputs_BT = torch.stack([self.tokens_N[i : i + seq_len] for i in starts])
        targets_BT = torch.stack([self.tokens_N[i + 1 : i + 1 + seq_len] for i in starts])
        logits_BTV = self.model(inputs_BT)
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip)
        self.optimizer.step()
        self.losses.append(loss.detach())


# The measurement


def loops(sizes: tuple[int, ...], plan: Plan) -> dict[str, Callable[[], None]]:
    """A step of each loop, all from the same weights. AssertionError if their losses differ."""
    n_vocab, n_layers, d_model, batch_size, seq_len = sizes
    cfg = TrainConfig(steps=10_000, batch_size=batch_size, seq_len=seq_len, seed=plan.seed)
    tokens_N = torch.randint(
        n_vocab, (plan.n_tokens,), generator=torch.Generator().manual_seed(plan.seed)
    )
    model_cfg = Config(
        vocab_size=n_vocab,
        max_seq_len=seq_len,
        n_layers=n_layers,
        d_model=d_model,
        n_heads=d_model // 32,
        head_dim=32,
        d_ff=4 * d_model,
    )
    torch.manual_seed(plan.seed)
    models = [Transformer(model_cfg).train(), Transformer(model_cfg).train()]
    models[1].load_state_dict(models[0].state_dict())
    plain = PlainLoop(PlainModel(models[0]).train(), tokens_N, cfg)
    ours, swapped = (start_run(model, tokens_N, cfg) for model in models)

    def fused_step() -> None:
        with fused():
            train_step(swapped, tokens_N)

    steps = {"ours": lambda: train_step(ours, tokens_N), "fused": fused_step, "plain": plain}
    for _ in range(plan.check_steps):
        for step in steps.values():
            step()
    expected = torch.stack(plain.losses)
    for run in (ours, swapped):
        found = run.losses[: run.step]
        torch.testing.assert_close(found, expected, rtol=0, atol=plan.tolerance)
    return steps


def measure(steps: dict[str, Callable[[], None]], n_steps: int, rounds: int) -> dict[str, dict]:
    """Seconds a step by loop, turn by turn: by the clock, and of the processor's time.

    The first round does not count. Who begins changes from round to round.
    """
    seconds = {name: {"clock": [], "cpu": []} for name in steps}
    names = list(steps)
    for n in range(rounds + 1):
        names.append(names.pop(0))
        for name in names:
            clock, cpu = time.perf_counter(), time.process_time()
            for _ in range(n_steps):
                steps[name]()
            if n > 0:
                seconds[name]["clock"].append((time.perf_counter() - clock) / n_steps)
                seconds[name]["cpu"].append((time.process_time() - cpu) / n_steps)
    return seconds


def experiment(plan: Plan) -> dict:
    """The record: a run for each size and loop, with medians and every single turn.

    times_plain is the median over the rounds of plain's CPU time by this loop's. Others' work only
    ever adds to a turn, so the best turn says most about a machine that is not shared.
    """
    runs = []
    for (name, *sizes), n_steps in zip(plan.sizes, plan.steps, strict=True):
        n_vocab, n_layers, d_model, batch_size, seq_len = sizes
        seconds = measure(loops(tuple(sizes), plan), n_steps, plan.rounds)
        for loop, turns in seconds.items():
            pairs = zip(seconds["plain"]["cpu"], turns["cpu"], strict=True)
            runs.append(
                {"size": name, "loop": loop, "n_vocab": n_vocab, "n_layers": n_layers}
                | {"d_model": d_model, "batch_size": batch_size, "seq_len": seq_len}
                | {"tokens_per_s": batch_size * seq_len / median(turns["clock"])}
                | {"tokens_per_cpu_s": batch_size * seq_len / median(turns["cpu"])}
                | {"best_tokens_per_s": batch_size * seq_len / min(turns["clock"])}
                | {"times_plain": median(plain / own for plain, own in pairs)}
                | {"seconds": turns["clock"], "cpu_seconds": turns["cpu"]}
            )
    return {
        "environment": environment(torch.device("cpu")),
        "settings": asdict(plan) | {"dtype": "float32"},
        "runs": runs,
    }


def print_tables(record: dict) -> None:
    """Prints tokens a second by size and loop."""
    cells = [
        [run["size"], run["loop"], f"{run['tokens_per_s']:,.0f}"]
        + [f"{run['best_tokens_per_s']:,.0f}", f"{run['tokens_per_cpu_s']:,.0f}"]
        + [f"{run['times_plain']:.2f}"]
        for run in record["runs"]
    ]
    table(["size", "loop", "tokens/s", "best", "tokens/CPU second", "times plain"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--rounds", type=int, help=f"turns of each loop; default: {Plan.rounds}")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    args = parser.parse_args()
    args.out = args.out or result_path(__file__, args.smoke)
    torch.set_num_threads(1)
    plan = SMOKE if args.smoke else Plan()
    if args.rounds is not None:
        plan = replace(plan, rounds=args.rounds)
    record = experiment(plan)
    save_json(args.out, record)
    print_tables(record)


if __name__ == "__main__":
    main()
