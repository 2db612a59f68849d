"""Speculative decoding: the text of generate and its cache, whatever the draft says."""

import copy
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ch01_gpt2 import gpt2
from ch08_full_models import (
    deepseek_v3,
    gemma3,
    llama3,
    llama4,
    mixtral,
    olmo2,
    qwen3,
    smollm3,
    speculative_demo,
)
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
from tests.parity import forward_lengths

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = dict(vocab_size=37, n_layers=3, d_model=32, n_heads=4)
GROUPED = SIZES | dict(n_kv_heads=2, head_dim=8)
CONFIGS = {  # every part that has to do with the cache is on; windows are shorter than the texts
    "llama3": llama3.Config(**GROUPED, windows=(7, None), d_ff=48, qkv_bias=True, tied=False),
    "gemma3": gemma3.Config(**GROUPED, windows=(5, 9, None), d_ff=48, local_theta=100.0),
    "gemma2": gemma3.Config(
        **GROUPED, windows=(6, None), d_ff=48, qk_norm=False, attn_cap=5.0, logit_cap=9.0
    ),
    "qwen3": qwen3.Config(**GROUPED, windows=(None, 7), d_ff=48),
    "qwen3_moe": qwen3.Config(
        **GROUPED, sparse=(False, True), d_ff=48, n_experts=6, n_active=2, d_expert=24
    ),
    "deepseek_v3": deepseek_v3.Config(
        **SIZES,
        head_dim=8,
        d_latent=16,
        d_q_latent=20,
        d_rope=4,
        d_value=6,
        d_ff=48,
        n_experts=8,
        n_active=3,
        n_shared=1,
        d_expert=16,
        router="sigmoid",
        n_groups=4,
        n_active_groups=2,
        n_mtp=1,
        rope_scaling=None,
    ),
    "olmo2": olmo2.Config(**GROUPED, d_ff=48),
    "mixtral": mixtral.Config(**GROUPED, windows=(6,), n_experts=5, n_active=2, d_expert=24),
    "smollm3": smollm3.Config(**GROUPED, windows=(8, None), turns=(True, False), d_ff=48),
    "llama4": llama4.Config(
        **GROUPED, chunks=(7, 7, None), growth_len=9, n_experts=4, d_expert=24, d_ff=48
    ),
    "gpt2": gpt2.Config(**SIZES, head_dim=8, d_ff=48, max_seq_len=64),
}
PROMPT, N_NEW = 6, 40  # tokens


def made(cfg: object, seed: int = 0) -> nn.Module:
    """A model with weights so large that its text is varied, and no logits tie nearly."""
    torch.manual_seed(seed)
    model = sys.modules[type(cfg).__module__].Transformer(cfg).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            # Norm weights of either sign: else a tied model repeats its last token.
            is_norm = name.endswith("norm.weight")
            param += torch.randn_like(param) * (1.0 if is_norm else 0.3)
            if name == "norm.weight":
                param.normal_()
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return made(CONFIGS[request.param])


def prompt(n: int = PROMPT) -> Tensor:
    return torch.arange(n)[None] * 11 % 37


def text(new: Iterator[Tensor]) -> list[int]:
    """The tokens, each of which must be (1, 1)."""
    tokens = list(new)
    assert {token.shape for token in tokens} <= {(1, 1)}
    return [int(token) for token in tokens]


def plain(model: nn.Module, n_new: int = N_NEW, **options: object) -> list[int]:
    """What the family's generate says."""
    return text(family_of(model).generate(model, prompt(), n_new, **options))


class Scripted(Draft):
    """Guesses from a text that is known to come: right, wrong from place `wrong` on, or so drawn.

    It notes what it is told, and how many guesses it was asked for.
    """

    def __init__(self, answer: list[int], wrong: int | str = 99) -> None:
        super().__init__()
        self.answer, self.wrong = answer, wrong
        self.told: list[int] = []
        self.asked: list[int] = []
        self.generator = torch.Generator().manual_seed(0)

    def keep(self, tokens_1T: Tensor) -> None:
        self.told += tokens_1T[0].tolist()

    def propose(self, last_11: Tensor, n: int) -> Tensor:
        self.asked.append(n)
        known = len(self.told) + 1 - PROMPT  # of the answer, the newest token with it
        assert self.answer[known - 1] == int(last_11)
        guesses = torch.tensor([self.answer[known : known + n]])
        if self.wrong == "drawn":
            wrong = int(torch.randint(n + 1, (1,), generator=self.generator))
            n = int(torch.randint(n + 1, (1,), generator=self.generator))  # and how many guesses
        else:
            wrong = self.wrong
        guesses[:, wrong:] = (guesses[:, wrong:] + 1) % 37
        return guesses[:, :n]


@pytest.mark.parametrize(
    ("n_draft", "wrong"), [(1, 0), (4, 99), (4, 0), (4, 1), (4, "drawn"), (11, 99), (11, "drawn")]
)
def test_the_text_is_that_of_generate(model: nn.Module, n_draft: int, wrong: int | str) -> None:
    """Guards every family: guesses right, wrong, half right, and rings that they overwrite."""
    expected = plain(model)
    assert len(set(expected)) > 4
    draft = Scripted(expected, wrong)
    cache = model.new_cache()
    found = text(speculate(model, prompt(), N_NEW, draft, n_draft, cache=cache))
    assert found == expected
    assert draft.told == [*prompt()[0].tolist(), *expected[:-1]]
    assert cache[0].n_seen == PROMPT + N_NEW - 1


@pytest.mark.parametrize("options", [dict(temperature=0.9), dict(temperature=1.3, top_k=9)])
def test_sampled_text_is_that_of_generate(model: nn.Module, options: dict) -> None:
    """Guards the other temperatures: the same seed draws the same tokens."""
    options = options | dict(top_p=0.95, seed=5)
    expected = plain(model, **options)
    draft = Scripted(expected, "drawn")
    assert text(speculate(model, prompt(), N_NEW, draft, **options)) == expected
    assert draft.n_accepted > 5
    assert text(speculate(model, prompt(), N_NEW, PromptLookup(2, 1), **options)) == expected


def shortest_window(model: nn.Module) -> int:
    return min(getattr(layer, "window", None) or 99 for layer in model.new_cache())


@torch.no_grad()
@pytest.mark.parametrize("n_before", [3, 5, 8, 29])
def test_rolled_back_is_never_read(model: nn.Module, n_before: int) -> None:
    """Guards roll_back alone: later logits are those of a cache that never saw what was dropped.

    n_before lies before the shortest ring is full, at its end, and after many turns of it.
    """
    tokens = torch.randint(37, (1, 60))
    clean = model.new_cache()
    model(tokens[:, :n_before], clean)
    n_read = min(shortest_window(model), 6)
    for n_kept in (0, 1, n_read - 1):
        dirty = copy.deepcopy(clean)
        layers = dirty[: model.cfg.n_layers]
        saved = overwritten(layers, n_read)
        right, wrong = tokens[:, n_before:], 36 - tokens[:, n_before:]
        model(torch.cat((right[:, :n_kept], wrong[:, n_kept:n_read]), dim=1), dirty)
        roll_back(layers, n_read - n_kept, saved)
        caches = dirty, copy.deepcopy(clean)
        if n_kept:
            model(right[:, :n_kept], caches[1])
        at = n_before + n_kept
        for size in (1, 3, 1):  # one by one from a ring, and several
            found, expected = (model(tokens[:, at : at + size], cache) for cache in caches)
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
            at += size


def test_rejected_guesses_leave_no_trace(model: nn.Module) -> None:
    """Guards the whole: where the listener leaves, the cache goes on as generate's does."""
    expected = plain(model)
    for n_heard in (1, 2, 8, 9, 23):
        caches = [model.new_cache(), model.new_cache()]
        theirs = family_of(model).generate(model, prompt(), N_NEW, cache=caches[0])
        draft = Scripted(expected, 3)
        ours = speculate(model, prompt(), N_NEW, draft, cache=caches[1])
        for _ in range(n_heard):
            last_11 = next(theirs)
            assert int(next(ours)) == int(last_11)
        ours.close()
        assert [layer.n_seen for layer in caches[1]] == [layer.n_seen for layer in caches[0]]
        assert draft.told == [*prompt()[0].tolist(), *expected[: n_heard - 1]]
        more = torch.cat((last_11, prompt(3)), dim=1)
        rest = text(family_of(model).generate(model, more, 9, cache=caches[0]))
        assert text(family_of(model).generate(model, more, 9, cache=caches[1])) == rest


def drafts(model: nn.Module) -> dict[str, Draft]:
    """One of each kind that can draft for the model; the smaller model has windows, too."""
    smaller = made(replace(CONFIGS["gemma3"], n_layers=2), seed=1)
    kinds = {"lookup": PromptLookup(2, 1), "smaller": DraftModel(smaller)}
    kinds["itself"] = DraftModel(model)
    return kinds | ({"mtp": MTP()} if getattr(model.cfg, "n_mtp", 0) else {})


def converse(
    generate: Callable[..., Iterator[Tensor]], model: nn.Module, n_heard: tuple[int, ...]
) -> list[list[int]]:
    """What is heard in each turn of a conversation in which no answer is heard to its end."""
    cache, new, answers = model.new_cache(), prompt(), []
    for n in n_heard:
        answer = list(itertools.islice(generate(model, new, 30, cache=cache), n))
        answers.append(text(iter(answer)))
        new = torch.cat((answer[-1], prompt(2)), dim=1)
    return answers


def test_drafts_over_several_turns(model: nn.Module) -> None:
    """Guards each kind of draft through a conversation: left mid-way, gone on with, begun anew."""
    turns = (6, 13, 2, 9)
    expected = converse(family_of(model).generate, model, turns)
    for name, draft in drafts(model).items():
        for some in (turns, turns[:2]):  # the second finds a draft that has been through one
            ours = partial(speculate, draft=draft, n_draft=3)
            assert converse(ours, model, some) == expected[: len(some)], name
        if name == "itself":
            assert draft.n_accepted == draft.n_drafted > 0


def test_guesses_are_used(model: nn.Module) -> None:
    """Guards the point of it all: right guesses save forwards, and each token is read once."""
    expected = plain(model, 31)
    for n_draft in (2, 4):
        n_draft = min(n_draft, shortest_window(model) - 1)
        draft = Scripted(expected)
        reads: list[int] = []
        draft.forward = lambda tokens, *args, **options: (  # noqa: B023
            reads.append(tokens.shape[1]) or Draft.forward(draft, tokens, *args, **options)  # noqa: B023
        )
        assert text(speculate(model, prompt(), 31, draft, n_draft)) == expected
        n_full, rest = divmod(30, n_draft + 1)
        assert reads == [PROMPT] + [n_draft + 1] * n_full + [rest] * (rest > 0)
        assert draft.n_forwards == len(reads) - 1
        assert draft.n_accepted == draft.n_drafted == 30 - draft.n_forwards


def test_a_wrong_guess_costs_a_forward_and_no_more(model: nn.Module) -> None:
    """Guards the counts where nothing is right: a forward for each token, as in generate."""
    expected = plain(model, 20)
    draft = Scripted(expected, 0)
    assert text(speculate(model, prompt(), 20, draft)) == expected
    assert (draft.n_forwards, draft.n_accepted) == (19, 0)
    assert draft.asked[-1] == 1 and len(draft.asked) == 18  # none for the last: nobody would hear


def test_never_more_than_is_asked_for(model: nn.Module) -> None:
    """Guards the end, where guesses are many and tokens to come are few."""
    for n_new in range(7):
        lengths: list[int] = []
        cache = model.new_cache()
        expected = plain(model, n_new)
        draft = Scripted([*expected, 0, 0])
        assert text(speculate(model, prompt(), n_new, draft, 4, cache=cache)) == expected
        assert cache[0].n_seen == (PROMPT + n_new - 1 if n_new else 0), lengths


def test_end_tokens_are_the_callers_affair(model: nn.Module) -> None:
    """Guards what generate does too: no token ends the text; whoever stops listening does."""
    expected = plain(model)
    eos = expected[8]
    heard = []
    for token_11 in speculate(model, prompt(), N_NEW, Scripted(expected)):
        heard.append(int(token_11))
        if heard[-1] == eos:
            break
    assert heard == expected[: expected.index(eos) + 1]
    assert text(speculate(model, prompt(), N_NEW, Scripted(expected))).count(eos) >= 1


# ---- The three kinds of draft


@pytest.fixture
def lookup() -> PromptLookup:
    draft = PromptLookup(3, 2)
    draft.begin(nn.Identity())
    return draft


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], 3, [4, 5, 1]),
        ([1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2, 3], 2, [5, 9]),  # the last time counts
        ([1, 2, 3, 7, 2, 3, 8, 1, 2, 3], 1, [7]),  # the longest match, though further back
        ([9, 2, 3, 7, 1, 2, 3], 2, [7, 1]),  # of two tokens
        ([1, 2, 3, 4, 3], 2, []),  # one token is not enough
        ([5, 6, 5, 6], 5, [5, 6, 5, 6, 5]),  # past the end of the text it copies the copy
        ([4, 4, 4], 3, [4, 4, 4]),
        ([7], 3, []),
        ([7, 8], 3, []),  # not itself
    ],
)
def test_prompt_lookup(
    lookup: PromptLookup, tokens: list[int], n: int, expected: list[int]
) -> None:
    """Guards what it finds; told in two parts, as after two forwards."""
    before = torch.tensor([tokens[:-1]])
    for part_1T in before.split([len(tokens) // 2, len(tokens) - 1 - len(tokens) // 2], dim=1):
        lookup.keep(part_1T)
    found = lookup.propose(torch.tensor([tokens[-1:]]), n)
    assert found.tolist() == [expected]


def test_a_repeating_text_is_looked_up() -> None:
    """Guards prompt lookup at work: a model that runs in circles is read in fewer forwards."""
    model = made(CONFIGS["llama3"])
    with torch.no_grad():  # the next token depends on this one alone
        for name, param in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                param.zero_()
    expected = plain(model, 60)
    draft = PromptLookup()
    assert text(speculate(model, prompt(), 60, draft)) == expected
    assert draft.n_forwards < 45 and draft.n_accepted > 0.9 * draft.n_drafted > 0


def test_a_draft_model_reads_each_token_once() -> None:
    """Guards its cache: of its own guesses the right ones stay in it."""
    model = made(CONFIGS["llama3"])
    itself = made(CONFIGS["llama3"])
    lengths = forward_lengths(itself)
    draft = DraftModel(itself)
    assert text(speculate(model, prompt(), 26, draft)) == plain(model, 26)
    assert draft.n_accepted == draft.n_drafted == 20
    # All right, each time: it has read all guesses but the last, and begins with that.
    assert lengths == [PROMPT + 1, 1, 1, 1] + [2, 1, 1, 1] * 4


def test_a_draft_with_more_tokens_than_the_model() -> None:
    """Guards vocabularies that only differ in how far they are filled up, as Qwen2.5's do."""
    model = made(CONFIGS["llama3"])
    larger = made(replace(CONFIGS["llama3"], vocab_size=60), seed=2)
    draft = DraftModel(larger)
    assert text(speculate(model, prompt(), 20, draft)) == plain(model, 20)


@torch.no_grad()
def test_mtp_guesses_what_after_next_says() -> None:
    """Guards the first guess: the module's, for a state and its next token, read at once."""
    model = made(CONFIGS["deepseek_v3"])
    tokens = torch.cat([prompt(), *family_of(model).generate(model, prompt(), 20)], dim=1)
    cache = model.new_cache()
    logits = model.after_next(model.hidden(tokens[:, :-1], cache), tokens[:, 1:], cache)
    expected = logits[0, PROMPT - 1 :].argmax(dim=-1).tolist()

    class Noted(MTP):
        def propose(self, last_11: Tensor, n: int) -> Tensor:
            guess_1M = super().propose(last_11, n)
            guesses.append((self.told, int(guess_1M[0, 0])))
            return guess_1M

        def keep(self, tokens_1T: Tensor) -> None:
            super().keep(tokens_1T)
            self.told = getattr(self, "told", 0) + tokens_1T.shape[1]

    for n_draft in (1, 3):
        guesses: list[tuple[int, int]] = []
        draft = Noted()
        assert text(speculate(model, prompt(), 20, draft, n_draft)) == tokens[0, PROMPT:].tolist()
        assert len(guesses) > 9
        assert [g for _, g in guesses] == [expected[told - PROMPT] for told, _ in guesses]


@torch.no_grad()
def test_mtp_that_is_the_model_is_always_right() -> None:
    """Guards later guesses: a module which reads the token alone, as the model does, knows all."""
    model = made(replace(CONFIGS["deepseek_v3"], n_experts=0, tied=False))
    for name, param in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            param.zero_()
    block = model.blocks[-1]
    half = torch.eye(model.cfg.d_model)
    block.eh_proj.weight.copy_(torch.cat((half, 0 * half), dim=1))
    block.embed_norm.weight.fill_(1)
    block.norm.weight.copy_(model.norm.weight)
    draft = MTP()
    assert text(speculate(model, prompt(), 26, draft)) == plain(model, 26)
    assert draft.n_accepted == draft.n_drafted == 20


# ---- What it refuses


def test_bad_arguments() -> None:
    """Guards the messages: at the call, in one line, with the name and the value."""
    model = made(CONFIGS["llama3"])
    bad = [
        (dict(tokens_1T=torch.zeros((2, 3), dtype=torch.long)), r"tokens_1T: \(2, 3\), expected"),
        (dict(tokens_1T=torch.zeros((1, 0), dtype=torch.long)), r"tokens_1T: \(1, 0\), expected"),
        (dict(tokens_1T=torch.zeros(3, dtype=torch.long)), r"tokens_1T: \(3,\), expected"),
        (dict(n_draft=0), "n_draft: 0, expected 1 or more"),
        (dict(draft="lookup"), "draft: 'lookup', expected a Draft"),
        (dict(draft=MTP()), "model: has no multi-token prediction"),
    ]
    for change, message in bad:
        arguments = dict(model=model, tokens_1T=prompt(), n_new=4, draft=PromptLookup()) | change
        with pytest.raises(ValueError, match=message) as error:
            speculate(**arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="longest, shortest: 2, 3"):
        PromptLookup(2, 3)


def test_a_draft_of_another_tokenizer() -> None:
    """Guards against an index out of range deep in the smaller model."""
    model = made(CONFIGS["llama3"])
    draft = DraftModel(made(replace(CONFIGS["llama3"], vocab_size=20)))
    with pytest.raises(ValueError, match="draft: has 20 tokens"):
        text(speculate(model, prompt(), 9, draft))


def test_a_draft_that_says_too_much() -> None:
    """Guards the count of tokens: guesses past the last one would be read in vain."""

    class Long(Draft):
        def propose(self, last_11: Tensor, n: int) -> Tensor:
            return last_11.repeat(1, n + 1)

    with pytest.raises(ValueError, match="draft: 5 tokens proposed, expected at most 4"):
        text(speculate(made(CONFIGS["llama3"]), prompt(), 9, Long()))


@torch.no_grad()
def test_what_cannot_be_rolled_back() -> None:
    """Guards a ring whose old tokens are gone, and counts that make no sense."""
    model = made(CONFIGS["llama3"])
    cache = model.new_cache()
    model(prompt(6), cache)
    saved = overwritten(cache, 2)
    model(prompt(2), cache)  # the second overwrote the first of all in a window of 7
    for wrong, given in ((1, None), (9, saved), (-1, saved)):
        with pytest.raises(ValueError, match=f"n: {wrong}"):
            roll_back(cache, wrong, given)
    roll_back(cache, 2, saved)
    assert [layer.n_seen for layer in cache] == [6, 6, 6]
    with pytest.raises(ValueError, match="n_new: 8, expected at most the window of 7"):
        overwritten(cache, 8)


# ---- Real models, and the measurement


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_real_models(name: str, gguf_path: Callable[[str], Path]) -> None:
    """Guards the same text on real weights, in float32, where some guesses are right."""
    model, tokenizer = load(gguf_path(name), dtype="float32", device="cpu")
    tokens = tokenizer.encode("one, two, three, four, five. Once more: one, two,")
    tokens_1T = torch.tensor([tokens])
    expected = text(family_of(model).generate(model, tokens_1T, 12))
    draft = PromptLookup()
    assert text(speculate(model, tokens_1T, 12, draft)) == expected
    assert draft.n_accepted > 3


def test_smoke_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the measurement: it runs, and the record has what the docstring promises."""
    out = tmp_path / "new" / "speculative.json"
    monkeypatch.setattr(sys, "argv", ["speculative_demo", "--smoke", "--out", str(out)])
    speculative_demo.main()
    record = json.loads(out.read_text(encoding="utf-8"))
    parts = ["environment", "settings", "trained", "bfloat16", "real", "agreement", "forward"]
    assert list(record) == parts
    for run in [*record["real"], *record["trained"]]:
        assert run["same_text"] and run["tokens_per_forward"] >= 1
        assert 0 <= run["accepted"] <= run["drafted"]


def test_first_layers() -> None:
    """Guards the draft made of a model's layers: all of them are the model, fewer are not."""
    model = made(CONFIGS["gemma3"])
    part = speculative_demo.first_layers(model, 2)
    assert torch.equal(speculative_demo.first_layers(model, 3)(prompt()), model(prompt()))
    assert part(prompt()).shape == model(prompt()).shape
    assert len(part.blocks) == 2 and len(model.blocks) == 3


def test_the_record_says_what_the_text_says() -> None:
    """Guards the claims: the same text in each run, and what gains, by how much at least."""
    path = Path(speculative_demo.__file__).with_name("speculative.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    runs = record["trained"]
    assert all(run["same_text"] and len(run["plain_s"]) >= 5 for run in runs)
    drawn = {run["draft"]: run for run in runs if run["temperature"] == 1 and run["n_draft"] == 1}
    trained, untrained = drawn["trained module"], drawn["untrained module"]
    assert round(trained["acceptance"], 2) == 0.77 and round(trained["speed_up"], 1) == 1.3
    assert round(untrained["acceptance"], 2) == 0.19 and untrained["speed_up"] < 1
    assert all(run["same_text"] and len(run["plain_s"]) >= 5 for run in record["real"])
    found = {
        (run["model"], run["task"]): round(run["speed_up"], 1)
        for run in record["real"]
        if run["draft"] == "prompt lookup"
    }
    assert found == {
        ("smollm2-135m", "repeats"): 2.6,
        ("smollm2-135m", "does not"): 0.9,
        ("gemma3-270m", "repeats"): 2.0,
        ("gemma3-270m", "does not"): 1.1,
    }
