"""Chapter 8: several tokens from one forward, and still the same text (speculative decoding).

A model that makes one token reads all of its weights for it, and waits for memory more than for
arithmetic: five tokens read at once cost far less than five forwards. So something cheap, a draft,
guesses the next few tokens, and the model reads them all in one forward. It then knows what it
would have said itself at each place. The guesses that agree stay; at the first that does not, the
model's own token takes its place, and the rest is taken back out of the cache (Stern et al. 2018,
section 3; Leviathan et al. 2023, section 2). A wrong guess costs time, never the text.

    PromptLookup()        what followed the last time these tokens stood in the text (Saxena 2023)
    DraftModel(smaller)   a smaller model with the same tokenizer, and a cache of its own
    MTP()                 DeepSeek-V3's module for multi-token prediction (report, section 2.2)

    for token_11 in speculate(model, tokens_1T, n_new=100, draft=PromptLookup()): ...

The text is that of the family's generate, token by token: greedy, or sampled with the same seed. A
draft names tokens, not probabilities. Whoever draws from the model as always, and goes on while the
draw is the draft's token, has drawn from the model's distribution: what rejection sampling comes
to for a draft that is sure of its token (Leviathan et al., section 2.3). With a draft model's
probabilities at hand it would accept more.

"The same text" has one condition: five tokens read at once and one by one are rounded differently.
In float32 two logits must agree in five or six digits for that to change a token, in bfloat16 in
two or three. It is then another text, not a worse one.

When it pays: if the tokens that a forward yields outweigh what a longer forward costs more, and the
draft itself. A draft that is always right but as slow as the model loses; prompt lookup costs
nothing, and pays where the answer repeats the question. Measured by speculative_demo.py in float32
on one core:

- Prompt lookup makes SmolLM2 135M 2.6 and Gemma 3 270M 2.0 times as fast where the answer repeats
  the question, and 0.9 and 1.1 times where it does not.
- A small model trained with its module: 77 percent of the guesses right where text is drawn, 1.3
  times as fast; 19 percent with an untrained module, slower than without. DeepSeek-V3 reports 85 to
  90 percent and 1.8 times (section 5.4.3).

A mixture of experts gains less, since every token read has experts of its own: the bytes grow with
the guesses. So does a large batch: it has arithmetic enough already.

    T  tokens   M  guesses   V  vocabulary   D  width of the residual stream   1  an axis of one
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from ch08_full_models.checkpoint import family_of

Cache = list  # of a family's LayerCache, one a layer
Slots = list[tuple[Tensor, ...]]  # by layer, for each buffer: (B, n, ...)


def overwritten(cache: Cache, n_new: int) -> Slots:
    """Copies of what the next n_new tokens will overwrite: in a full window, each an older token.

    Raises ValueError for more than a window: the first of them would be overwritten as well.
    """
    slots = []
    for layer in cache:
        window = getattr(layer, "window", None)  # GPT-2's cache knows none
        if window is None:
            slots.append(())
            continue
        if n_new > window:
            raise ValueError(f"n_new: {n_new}, expected at most the window of {window}")
        end = layer.n_seen + n_new
        places = [i % window for i in range(max(layer.n_seen, window), end)]
        slots.append(tuple(buffer[:, places] for buffer in layer.buffers))
    return slots


def roll_back(cache: Cache, n: int, saved: Slots | None = None) -> None:
    """Forgets the last n tokens. `saved` is what overwritten gave before the last tokens were read.

    Raises ValueError if they are more than were read, or overwrote what was not saved.
    """
    for i, layer in enumerate(cache):
        if not 0 <= n <= layer.n_seen:
            raise ValueError(f"n: {n}, expected 0 to {layer.n_seen}, the tokens in the cache")
        window, end = getattr(layer, "window", None), layer.n_seen
        n_lost = 0 if window is None else max(min(n, end - window), 0)
        if n_lost:
            slots = saved[i] if saved else ()
            if not slots or slots[0].shape[1] < n_lost:
                raise ValueError(f"n: {n}, but what the last {n_lost} overwrote was not saved")
            places = [j % window for j in range(end - n_lost, end)]
            for buffer, old in zip(layer.buffers, slots, strict=True):
                buffer[:, places] = old[:, -n_lost:]
        layer.n_seen = end - n
        if hasattr(layer, "kept"):  # GPT-2's: no buffers
            layer.kept = tuple(t[:, : layer.n_seen] for t in layer.kept)


class Draft:
    """Guesses how a text goes on. `speculate` tells it what of the text is certain.

    It serves one text at a time, in any number of calls. The counts add up over its life.
    """

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.n_forwards = 0  # of the model, not counting those that read a prompt
        self.n_drafted = 0  # tokens guessed
        self.n_accepted = 0  # of these, guessed right

    def begin(self, model: nn.Module) -> None:
        """A new text: the last one is forgotten. Raises ValueError for a model that cannot be."""
        self.model = model

    def forward(self, tokens_1T: Tensor, cache: Cache, last_only: bool = False) -> Tensor:
        """The model's logits, (1, T, V). A draft that reads more from the model does it here."""
        return self.model(tokens_1T, cache, last_only=last_only)

    def keep(self, tokens_1T: Tensor) -> None:
        """Tells what goes on the text: the first of the tokens last read, those that stay."""

    def propose(self, last_11: Tensor, n: int) -> Tensor:
        """Guesses at what follows the text and its newest token, (1, M), M at most n."""
        raise NotImplementedError


class PromptLookup(Draft):
    """Guesses that the text goes on as it did the last time it had these tokens (Saxena 2023).

    `longest` tokens are looked for, then fewer, down to `shortest`. Nothing found: no guess.
    """

    def __init__(self, longest: int = 3, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"longest, shortest: {longest}, {shortest}, expected 1 or more, less")
        super().__init__()
        self.lengths = range(longest, shortest - 1, -1)

    def begin(self, model: nn.Module) -> None:
        super().begin(model)
        self.text: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # where the text went on after these tokens

    def keep(self, tokens_1T: Tensor) -> None:
        for token in tokens_1T[0].tolist():
            self.text.append(token)
            for n in self.lengths:
                if n <= len(self.text):
                    self.after[tuple(self.text[-n:])] = len(self.text)

    def propose(self, last_11: Tensor, n: int) -> Tensor:
        text = [*self.text, int(last_11)]
        found = (self.after.get(tuple(text[-length:])) for length in self.lengths)
        start = next((place for place in found if place is not None), None)
        if start is None:
            return last_11[:, :0]
        for i in range(n):  # a copy that comes to the end of the text goes on with the copy itself
            text.append(text[start + i])
        return last_11.new_tensor([text[-n:]])


class DraftModel(Draft):
    """Guesses what another model says, greedily: a smaller one, with the same tokenizer."""

    def __init__(self, smaller: nn.Module) -> None:
        super().__init__()
        self.smaller = smaller

    def begin(self, model: nn.Module) -> None:
        super().begin(model)
        self.cache = self.smaller.new_cache()
        self.layers = self.cache[: self.smaller.cfg.n_layers]  # what it reads: not its own MTP
        device = next(self.smaller.parameters()).device
        self.unread_1T = torch.empty((1, 0), dtype=torch.long, device=device)
        self.n_ahead = 0  # tokens in its cache that are not certain, the last of all

    def keep(self, tokens_1T: Tensor) -> None:
        n_known = min(tokens_1T.shape[1], self.n_ahead)
        if self.n_ahead > n_known:
            roll_back(self.layers, self.n_ahead - n_known, self.saved)
        self.n_ahead = 0
        self.unread_1T = torch.cat((self.unread_1T, tokens_1T[:, n_known:]), dim=1)

    def propose(self, last_11: Tensor, n: int) -> Tensor:
        n = min(n, longest_read(self.layers, n) + 1)
        read_1T = torch.cat((self.unread_1T, last_11), dim=1)
        n_known = self.smaller.cfg.vocab_size
        if int(read_1T.max()) >= n_known:
            raise ValueError(f"draft: has {n_known} tokens, expected the model's tokenizer")
        guesses = [self.likeliest(read_1T)]
        self.saved = overwritten(self.layers, n - 1)
        for _ in range(n - 1):
            guesses.append(self.likeliest(guesses[-1]))
        self.unread_1T, self.n_ahead = last_11[:, :0], n  # last_11, and all guesses but one
        return torch.cat(guesses, dim=1)

    def likeliest(self, tokens_1T: Tensor) -> Tensor:
        """Its next token, (1, 1), among those that the model has: some fill their tables up."""
        logits_11V = self.smaller(tokens_1T, self.cache, last_only=True)
        return logits_11V[:, :, : self.model.cfg.vocab_size].argmax(dim=-1)


class MTP(Draft):
    """Guesses with DeepSeek-V3's module for multi-token prediction (report, sections 2.2, 5.4.3).

    The module reads the model's state at a token, with the token after it, and predicts the one
    after that: the first guess. It was trained for one; for more it reads its own state and guess.
    """

    def begin(self, model: nn.Module) -> None:
        if not getattr(model.cfg, "n_mtp", 0):
            raise ValueError("model: has no multi-token prediction, expected load(..., mtp=True)")
        super().begin(model)
        self.cache = model.new_cache()[-1:]  # of the module; what is in it has been read in pairs
        self.tokens_1T: Tensor | None = None  # certain, not read yet
        self.x_1TD: Tensor | None = None  # the model's states at these
        self.n_ahead = 0  # pairs with a guess in them, the last in the cache

    def forward(self, tokens_1T: Tensor, cache: Cache, last_only: bool = False) -> Tensor:
        self.read_1TD = self.model.hidden(tokens_1T, cache)
        return self.model.logits(self.read_1TD[:, -1:] if last_only else self.read_1TD)

    def keep(self, tokens_1T: Tensor) -> None:
        roll_back(self.cache, self.n_ahead)
        self.n_ahead = 0
        x_1TD = self.read_1TD[:, : tokens_1T.shape[1]]
        if self.tokens_1T is not None:
            tokens_1T = torch.cat((self.tokens_1T, tokens_1T), dim=1)
            x_1TD = torch.cat((self.x_1TD, x_1TD), dim=1)
        self.tokens_1T, self.x_1TD = tokens_1T, x_1TD

    def propose(self, last_11: Tensor, n: int) -> Tensor:
        next_1T = torch.cat((self.tokens_1T[:, 1:], last_11), dim=1)
        x_11D = self.read(next_1T, self.x_1TD)[:, -1:]
        guesses = [self.model.logits(x_11D).argmax(dim=-1)]
        for _ in range(n - 1):
            x_11D = self.read(guesses[-1], x_11D)
            guesses.append(self.model.logits(x_11D).argmax(dim=-1))
        self.tokens_1T = self.x_1TD = None
        self.n_ahead = n - 1
        return torch.cat(guesses, dim=1)

    def read(self, next_1T: Tensor, x_1TD: Tensor) -> Tensor:
        """The module's own states, normed, (1, T, D): after_next without its head."""
        block = self.model.blocks[self.model.cfg.n_layers]
        pos_1T = self.cache[0].positions(next_1T)
        x_1TD = block.join(self.model.embed(next_1T), x_1TD)
        return block.norm(block(x_1TD, pos_1T, self.model.turns(pos_1T), self.cache[0]))


def longest_read(cache: Cache, n: int) -> int:
    """n, or the shortest window if it is less: more tokens read at once cannot be taken back."""
    return min(n, *(getattr(layer, "window", None) or n for layer in cache))


def speculate(
    model: nn.Module,
    tokens_1T: Tensor,
    n_new: int,
    draft: Draft,
    n_draft: int = 4,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    cache: Cache | None = None,
) -> Iterator[Tensor]:
    """Yields n_new tokens, one at a time, each (1, 1): those of the family's generate.

    Up to n_draft tokens are guessed for each forward. A cache from an earlier call goes on where it
    ended, and the draft with it; with an empty one the draft begins anew. After the last token, and
    once the generator is closed, as by leaving a for loop, the cache is what generate would leave;
    before that it may be ahead. Raises ValueError for arguments that make no sense, at once.
    """
    if tokens_1T.ndim != 2 or tokens_1T.shape[0] != 1 or tokens_1T.shape[1] == 0:
        raise ValueError(f"tokens_1T: {tuple(tokens_1T.shape)}, expected one text, (1, T)")
    if not isinstance(draft, Draft):
        raise ValueError(f"draft: {draft!r}, expected a Draft, such as PromptLookup()")
    if n_draft < 1:
        raise ValueError(f"n_draft: {n_draft}, expected 1 or more")
    cache = cache or model.new_cache()
    if draft.model is not model or cache[0].n_seen == 0:
        draft.begin(model)
    generator = torch.Generator(tokens_1T.device).manual_seed(seed)
    pick = partial(
        family_of(model).sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
    )
    return turns(tokens_1T, n_new, draft, n_draft, pick, cache)


@torch.no_grad()
def turns(
    tokens_1T: Tensor, n_new: int, draft: Draft, n_draft: int, pick: partial, cache: Cache
) -> Iterator[Tensor]:
    """What speculate yields: after the prompt, guesses and a forward by turns."""
    if n_new < 1:
        return
    logits_11V = draft.forward(tokens_1T, cache, last_only=True)
    draft.keep(tokens_1T)
    last_11 = pick(logits_11V[:, 0])
    yield last_11
    layers = cache[: draft.model.cfg.n_layers]  # a module for prediction keeps its own
    n_left = n_new - 1
    while n_left:
        n = min(n_draft, n_left - 1, longest_read(layers, n_draft + 1) - 1)
        guess_1M = draft.propose(last_11, n) if n else last_11[:, :0]
        if guess_1M.shape[1] > n:
            raise ValueError(f"draft: {guess_1M.shape[1]} tokens proposed, expected at most {n}")
        read_1T = torch.cat((last_11, guess_1M), dim=1)
        saved = overwritten(layers, read_1T.shape[1])
        new = agreed(draft.forward(read_1T, cache), guess_1M, pick)
        draft.n_forwards += 1
        draft.n_drafted += guess_1M.shape[1]
        draft.n_accepted += len(new) - 1
        n_given = 0
        try:
            for last_11 in new:
                n_given += 1
                yield last_11
        finally:  # also when the listener has left: what was not given has not been read
            roll_back(layers, read_1T.shape[1] - n_given, saved)
            draft.keep(read_1T[:, :n_given])
        n_left -= len(new)


def agreed(logits_1TV: Tensor, guess_1M: Tensor, pick: partial) -> list[Tensor]:
    """The model's own tokens, each (1, 1), up to the first that is not the one guessed."""
    new, guesses = [], guess_1M[0].tolist()
    for logits_1V in logits_1TV.unbind(dim=1):
        new.append(pick(logits_1V))
        if len(new) > len(guesses) or int(new[-1]) != guesses[len(new) - 1]:
            break
    return new
