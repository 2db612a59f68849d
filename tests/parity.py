"""What the tests of all models share: a reference that transformers computes, and mistakes.

`reference` makes a transformers model whose every parameter matters, `errors` compares one of ours
with it in every way that it can be fed, `mutant` is one of our files with a mistake put in.
"""

import itertools
import math
import random
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOLERANCE = 1e-5  # of the largest logit; rounding in float32 gives 1e-6 and less


def reference(config: PretrainedConfig, seed: int = 0, scale: float = 1.0) -> PreTrainedModel:
    """A transformers model in float32 with no parameter left at its initial value.

    At their initial values norm weights and biases do nothing, and matrices are so small that the
    softmax is nearly flat. scale multiplies all matrices.
    """
    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for param in hf.parameters():
            param += torch.randn_like(param) * (0.3 if param.ndim == 1 else 0.08)
            param *= scale if param.ndim > 1 else 1
    return hf


@torch.no_grad()
def errors(
    model: nn.Module, hf: PreTrainedModel, seed: int = 0, n: int = 40
) -> Iterator[tuple[str, float]]:
    """Ways to feed texts of n tokens, and how far the logits then are from the reference's.

    In parts of the largest logit. The reference reads each text alone, whole, without padding.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(hf.config.vocab_size, (3, n), generator=generator)
    expected_BTV = hf(tokens_BT, use_cache=False).logits
    largest = expected_BTV.abs().max()
    lengths = (n, n - rng.randint(1, n // 2), rng.randint(1, 6))  # the last: padding in most chunks
    n_pad_B = n - torch.tensor(lengths)
    padded_BT = torch.zeros_like(tokens_BT)
    for row, length in enumerate(lengths):
        padded_BT[row, n - length :] = tokens_BT[row, :length]

    def chunks() -> list[int]:
        sizes = []
        while sum(sizes) < n:
            sizes.append(min(rng.randint(1, 10), n - sum(sizes)))
        return sizes

    def read(texts_BT: Tensor, sizes: list[int], cache: list) -> Tensor:
        return torch.cat([model(part, cache) for part in texts_BT.split(sizes, dim=1)], dim=1)

    def whole_texts(found_BTV: Tensor) -> float:
        return float((found_BTV - expected_BTV).abs().nan_to_num(math.inf).max() / largest)

    def padded_texts(found_BTV: Tensor, rows: tuple[int, ...] = (0, 1, 2)) -> float:
        pairs = zip(found_BTV, rows, strict=True)
        wrong = [
            found_TV[n - lengths[i] :] - expected_BTV[i, : lengths[i]] for found_TV, i in pairs
        ]
        return float(torch.cat(wrong).abs().nan_to_num(math.inf).max() / largest)

    yield "whole", whole_texts(model(tokens_BT))
    last_B1V = model(tokens_BT, last_only=True)
    assert last_B1V.shape == (3, 1, hf.config.vocab_size)
    yield "last only", float((last_B1V - expected_BTV[:, -1:]).abs().max() / largest)
    yield "chunks", whole_texts(read(tokens_BT, chunks(), model.new_cache()))
    yield "padded", padded_texts(model(padded_BT, model.new_cache(n_pad_B)))
    yield "padded, chunks", padded_texts(read(padded_BT, chunks(), model.new_cache(n_pad_B)))
    one_1T, pad_1, rows = padded_BT[1:2], n_pad_B[1:2], (1,)
    yield "one text, padded", padded_texts(model(one_1T, model.new_cache(pad_1)), rows)
    found_1TV = read(one_1T, chunks(), model.new_cache(pad_1))
    yield "one text, padded, chunks", padded_texts(found_1TV, rows)
    yield "one by one", whole_texts(read(tokens_BT, [1] * n, model.new_cache()))
    sizes = [n - 15] + [1] * 15
    yield "padded, one by one", padded_texts(read(padded_BT, sizes, model.new_cache(n_pad_B)))


def assert_equal(model: nn.Module, hf: PreTrainedModel, seed: int = 0, n: int = 40) -> None:
    """The logits are the reference's, however they are made."""
    wrong = {way: error for way, error in errors(model, hf, seed, n) if not error < TOLERANCE}
    assert not wrong


def mutant(module: types.ModuleType, *changes: str) -> types.ModuleType:
    """The module with mistakes in its source, each written "right -> wrong"."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    for change in changes:
        right, wrong = change.split(" -> ")
        assert source.count(right) >= 1, f"{module.__name__} has no {right!r} to spoil"
        source = source.replace(right, wrong)
    spoiled = types.ModuleType("spoiled")
    exec(compile(source, "spoiled", "exec"), spoiled.__dict__)
    return spoiled


def assert_noticed(model: nn.Module, hf: PreTrainedModel) -> None:
    """The comparison of a spoiled model with the reference must fail in some way, and clearly."""
    assert any(not error < 10 * TOLERANCE for _, error in errors(model, hf))


def forward_lengths(model: nn.Module) -> list[int]:
    """A list that grows by one at each later call of the model: the tokens it was given."""
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    return lengths


def equals_generate(module: types.ModuleType, model: nn.Module, hf: PreTrainedModel) -> None:
    """Greedy tokens are those of transformers' generate, and follow the prompt one at a time."""
    prompt_BT = torch.randint(hf.config.vocab_size, (2, 9))
    lengths = forward_lengths(model)
    ours = torch.cat(list(module.generate(model, prompt_BT, 14)), dim=1)
    theirs = hf.generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        max_new_tokens=14,
        do_sample=False,
        pad_token_id=0,
    )
    assert ours.tolist() == theirs[:, 9:].tolist()
    assert len(set(ours.flatten().tolist())) > 4  # else any model that repeats itself would do
    assert lengths == [9] + [1] * 13


def same_alone_and_padded(module: types.ModuleType, model: nn.Module, n_new: int = 12) -> None:
    """Prompts of unequal length in one batch give the tokens that each gives alone."""
    lengths = (1, 11, 6)
    prompts = [torch.randint(1, model.cfg.vocab_size, (1, n)) for n in lengths]
    alone = [torch.cat(list(module.generate(model, p, n_new)), dim=1) for p in prompts]
    n_pad_B = max(lengths) - torch.tensor(lengths)
    padded = [nn.functional.pad(p, (max(lengths) - p.shape[1], 0)) for p in prompts]
    together = list(module.generate(model, torch.cat(padded), n_new, n_pad_B=n_pad_B))
    assert torch.cat(together, dim=1).tolist() == torch.cat(alone).tolist()


def goes_on(module: types.ModuleType, model: nn.Module) -> None:
    """Generating in two calls with one cache gives the tokens of a single call."""
    prompt_BT = torch.randint(model.cfg.vocab_size, (2, 5))
    once = torch.cat(list(module.generate(model, prompt_BT, 12)), dim=1)
    cache = model.new_cache()
    first = torch.cat(list(module.generate(model, prompt_BT, 4, cache=cache)), dim=1)
    assert cache[0].n_seen == 5 + 3  # the last token has not been read yet
    then = torch.cat(list(module.generate(model, first[:, -1:], 8, cache=cache)), dim=1)
    assert torch.cat((first, then), dim=1).tolist() == once.tolist()


def brute_force_attention(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, sees: Callable[[int, int, int], bool],
    scale: float, cap: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention in float64 by loops, (B, T, H, K); sees(b, t, s): whether token t may look at s."""
    (B, T, H, K), S, J = q_BTHK.shape, k_BSJK.shape[1], k_BSJK.shape[2]
    out = torch.zeros(B, T, H, K, dtype=torch.float64)
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        j = h // (H // J)  # heads side by side share a key/value head
        seen = [s for s in range(S) if sees(b, t, s)]
        scores = [float(q_BTHK[b, t, h].double() @ k_BSJK[b, s, j].double()) * scale for s in seen]
        scores = scores if cap is None else [cap * math.tanh(score / cap) for score in scores]
        weights = [math.exp(score - max(scores)) for score in scores]
        for s, weight in zip(seen, weights, strict=True):
            out[b, t, h] += weight / sum(weights) * v_BSJK[b, s, j].double()
    return out


def check_mask_by_loops(module: types.ModuleType) -> None:
    """Who sees whom, for positions in any order and below zero, with and without a window."""
    for window in (None, 1, 3):
        q_pos_BT, k_pos_BS = torch.randint(-4, 9, (4, 5)), torch.randint(-4, 9, (4, 7))
        mask_BTS = module.causal_mask(q_pos_BT, k_pos_BS, window)
        for b, t, s in itertools.product(range(4), range(5), range(7)):
            q, k = int(q_pos_BT[b, t]), int(k_pos_BS[b, s])
            expected = k <= q and (k >= 0 or q < 0) and (window is None or k > q - window)
            assert bool(mask_BTS[b, t, s]) == expected
