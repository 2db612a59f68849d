"""Chapter 6: what each way of balancing does to the load of the experts, and to the loss.

Trains one small mixture of experts with each method from balance.py, on the same batches from the
same start: "none"; "aux", a loss on the imbalance; "aux_z", one on large logits besides; "bias",
which moves the bias on the choice. It moves by 0.003 a step, three times as far as balance.py has
it, since a few hundred steps are all there are.

The load is what the routers chose in training. It is averaged over a window of steps, and in each
layer by itself: expert 3 of one layer has nothing to do with expert 3 of the next.

For one model in the end: where do tokens of some kinds go? Counted over the held-out text, and
for the same model before its training, too, since a router with random weights also sends equal
tokens to the same experts.

A tensor's name ends in its axes: `load_LI` has shape (L, I).
    B  sequences in the batch         T  tokens of a sequence
    N  tokens of all sequences        A  experts that a token goes to
    I  routed experts                 L  layers that have experts
    S  steps of the training          V  vocabulary
    K  kinds of tokens

    python -m ch06_moe.balancing            about 10 minutes on one CPU thread; writes the JSON
    python -m ch06_moe.balancing --smoke    everything tiny, in seconds
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from ch01_gpt2.data import decode, encode, in_order, load_text, split
from ch01_gpt2.notebook import table
from ch01_gpt2.train import TrainConfig, environment, result_path, save_json, train
from ch06_moe.balance import RouterLog, z_loss
from ch06_moe.moe import Config, Transformer

MODEL = Config(
    vocab_size=512,
    n_layers=4,
    d_model=96,
    n_heads=4,
    n_kv_heads=4,
    head_dim=24,
    d_latent=None,
    d_ff=256,
    n_experts=8,
    n_active=2,
    n_shared=0,
    d_expert=64,
)
TRAINING = TrainConfig(
    steps=400,
    batch_size=8,
    seq_len=128,
    lr=2e-3,
    eval_every=400,
    eval_tokens=30_000,  # all there are
)
COEFFICIENT, Z_COEFFICIENT, BIAS_STEP = 0.01, 0.001, 0.003
METHODS: dict[str, Callable[[RouterLog], Tensor]] = {
    "none": RouterLog.watch,
    "aux": partial(RouterLog.balance_by_loss, coefficient=COEFFICIENT),
    "aux_z": partial(
        RouterLog.balance_by_loss, coefficient=COEFFICIENT, z_coefficient=Z_COEFFICIENT
    ),
    "bias": partial(RouterLog.balance_by_bias, step=BIAS_STEP),
}
SEEDS = (0, 1, 2)
WINDOW = 10  # steps that one record of the load is averaged over
N_RECORDS = 10  # after the one of the first steps
KINDS = ("all", "letters", "digits", "spaces and line ends", "punctuation and the rest")
N_FREQUENT = 30  # tokens that are looked at one by one

SMOKE = (
    replace(MODEL, n_layers=3, d_model=32, head_dim=8, d_ff=64, d_expert=16),
    replace(TRAINING, steps=20, seq_len=32, eval_every=20, eval_tokens=1024),
)


def train_one(
    method: str, model: Transformer, training: TrainConfig, tokens: tuple[Tensor, Tensor]
) -> dict:
    """Trains the model in place with one method; the run's record."""
    z: list[float] = []
    with RouterLog(model) as routers:

        def extra_loss() -> Tensor:
            with torch.no_grad():
                z.append(mean(z_loss(logit_NI).item() for logit_NI in routers.logits))
            return METHODS[method](routers)

        result = train(model, *tokens, training, device="cpu", extra_loss=extra_loss)
    steps, window = record_steps(training.steps)
    share_SLI = torch.tensor(routers.shares)
    loads = [share_SLI[step - window : step].mean(dim=0) for step in steps]  # (L, I) each
    return {
        "method": method,
        "seed": training.seed,
        "final_val_loss": result.final_val_loss,
        "steps": steps,
        "load": [load_LI.mean(dim=0).tolist() for load_LI in loads],
        "max_over_mean": [max_over_mean(load_LI) for load_LI in loads],
        "load_by_layer": [load_LI.tolist() for load_LI in loads],
        "z_loss": [mean(z[step - window : step]) for step in steps],
    }


def record_steps(n_steps: int) -> tuple[list[int], int]:
    """The steps at which the load is recorded, each the last of its window, and its length."""
    window = min(WINDOW, n_steps // (2 * N_RECORDS))
    return [window, *(n_steps * i // N_RECORDS for i in range(1, N_RECORDS + 1))], window


def max_over_mean(load_LI: Tensor) -> float:
    """How many times the mean load the busiest expert has: the mean of all layers.

    1 in perfect balance, and I / A at most, when all tokens choose the same experts.
    """
    return (load_LI.amax(dim=1) / load_LI.mean(dim=1)).mean().item()


def kind(text: str) -> str:
    """Which of KINDS a token's text is; a space before a word does not make it a space."""
    text = text.strip()
    if not text:
        return "spaces and line ends"
    if text.isalpha():
        return "letters"
    return "digits" if text.isdigit() else "punctuation and the rest"


@torch.no_grad()
def choices_by_token(model: Transformer, tokens: Tensor, training: TrainConfig) -> Tensor:
    """How often each expert of each layer was chosen for each token of the vocabulary, (L, V, I).

    Over a text (N,), read in windows as in an evaluation.
    """
    n_experts, n_vocab = model.cfg.n_experts, model.cfg.vocab_size
    count_LVI: Tensor | int = 0
    with RouterLog(model) as routers:
        model.train()  # what the log listens to; the model computes the same in both modes
        for inputs_BT, _ in in_order(tokens, training.batch_size, training.seq_len):
            model(inputs_BT)
            counts = []
            for expert_NA in routers.choices():
                pair_NA = inputs_BT.reshape(-1, 1) * n_experts + expert_NA
                counts.append(pair_NA.flatten().bincount(minlength=n_vocab * n_experts))
            count_LVI = count_LVI + torch.stack(counts).unflatten(1, (n_vocab, n_experts))
        model.eval()
    return count_LVI


def specialisation(before_LVI: Tensor, after_LVI: Tensor, cfg: Config) -> dict:
    """Where kinds of tokens, and the most frequent ones, go, before and after the training.

    Shares of a kind's choices, which add up to one over the experts; zeros for a kind without
    tokens. `n_tokens` times `n_active` times a share is a count.
    """
    texts = [decode([token], cfg.vocab_size) for token in range(cfg.vocab_size)]
    member_KV = torch.tensor([[name in ("all", kind(text)) for text in texts] for name in KINDS])
    n_V = after_LVI[0].sum(dim=1) // cfg.n_active
    frequent = n_V.topk(N_FREQUENT).indices

    def share_of(count: Tensor) -> list:
        return (count / count.sum(dim=-1, keepdim=True).clamp(min=1)).tolist()

    return {
        "layers": list(range(cfg.n_dense_layers, cfg.n_layers)),
        "kinds": list(KINDS),
        "n_active": cfg.n_active,
        "n_tokens": (member_KV * n_V).sum(dim=1).tolist(),
        "share": share_of(member_KV.long() @ after_LVI),
        "untrained_share": share_of(member_KV.long() @ before_LVI),
        "tokens": [texts[token] for token in frequent.tolist()],
        "n_token": n_V[frequent].tolist(),
        "token_share": share_of(after_LVI[:, frequent]),
        "untrained_token_share": share_of(before_LVI[:, frequent]),
    }


def new_model(cfg: Config, seed: int) -> Transformer:
    """A model with the seed's random weights, which are the same for every method."""
    torch.manual_seed(seed)
    return Transformer(cfg)


def print_table(runs: list[dict]) -> None:
    """Prints means over the seeds, and the least and the largest of them."""
    without = {run["seed"]: run["final_val_loss"] for run in runs if run["method"] == "none"}
    rows = []
    for method in METHODS:
        of_method = [run for run in runs if run["method"] == method]
        losses = [run["final_val_loss"] for run in of_method]
        apart = [run["final_val_loss"] - without[run["seed"]] for run in of_method]
        first, last = ([run["max_over_mean"][i] for run in of_method] for i in (0, -1))
        z = mean(run["z_loss"][-1] for run in of_method)
        cells = [f"{spread(losses, '.4f')}", f"{spread(apart, '+.4f')}"]
        rows.append([method, *cells, spread(first, ".2f"), spread(last, ".2f"), f"{z:.1f}"])
    head = ["method", "held-out loss (min..max)", "minus none's", "max/mean at first", "in the end"]
    table([*head, "z-loss"], rows)


def spread(numbers: list[float], form: str) -> str:
    """Mean, least and largest number, as text."""
    return f"{mean(numbers):{form}} ({min(numbers):{form}}..{max(numbers):{form}})"


def experiment(cfg: Config, training: TrainConfig) -> Iterator[dict]:
    """Yields the record after each model, its losses in nats a token."""
    tokens = split(encode(load_text(), cfg.vocab_size))
    record = {
        "environment": {},
        "settings": {
            "model": asdict(cfg),
            "training": asdict(training) | {"seed": "each of the seeds"},
            "coefficient": COEFFICIENT,
            "z_coefficient": Z_COEFFICIENT,
            "bias_step": BIAS_STEP,
            "window": record_steps(training.steps)[1],
            "seeds": SEEDS,
            "text": f"Python's help topics, {len(tokens[0])} tokens to train on",
        },
        "runs": [],
        "specialisation": {},
    }
    for seed in SEEDS:
        for method in METHODS:
            model = new_model(cfg, seed)
            run = train_one(method, model, replace(training, seed=seed), tokens)
            record["runs"].append(run)
            if (method, seed) == ("bias", SEEDS[0]):
                held_out = tokens[1][: training.eval_tokens + 1]
                counts = [
                    choices_by_token(one, held_out, training)
                    for one in (new_model(cfg, seed), model)
                ]
                record["specialisation"] = {"seed": seed} | specialisation(*counts, cfg)
            record["environment"] = environment(torch.device("cpu"))
            loss, load = run["final_val_loss"], run["max_over_mean"][-1]
            print(f"seed {seed}, {method:5}: loss {loss:.4f}, max/mean {load:.2f}", flush=True)
            yield record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    args = parser.parse_args()
    args.out = args.out or result_path(__file__, args.smoke)
    torch.set_num_threads(1)
    for record in experiment(*(SMOKE if args.smoke else (MODEL, TRAINING))):
        save_json(args.out, record)
    print_table(record["runs"])


if __name__ == "__main__":
    main()
