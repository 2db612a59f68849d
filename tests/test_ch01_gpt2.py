"""GPT-2 against transformers' own, its cache and sampling against brute force, its loading.

Holds what the tests of chapter 8 share as well: `reference` makes a transformers model whose every
parameter matters, `errors` compares one of ours with it in every way that it can be fed, `mutant`
is one of our files with a mistake put in.
"""

import itertools
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from ch01_gpt2 import gpt2
from tests.parity import (
    TOLERANCE,
    assert_equal,
    assert_noticed,
    brute_force_attention,
    equals_generate,
    goes_on,
    mutant,
    reference,
    same_alone_and_padded,
)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- GPT-2 itself


def small(**changes: object) -> GPT2Config:
    sizes = dict(vocab_size=97, n_positions=64, n_embd=48, n_layer=3, n_head=4)
    return GPT2Config(**sizes | changes)


CASES = {
    "plain": small(),
    "one head": small(n_head=1, n_layer=2),
    "head of one dimension": small(n_embd=8, n_head=8),
    "wide MLP": small(n_inner=300, n_layer=2),
    "narrow MLP": small(n_inner=7),
    "one layer": small(n_layer=1, n_positions=40),  # the position table ends with the text
    "deep": small(n_embd=20, n_head=2, n_layer=8),
    "large epsilon": small(layer_norm_epsilon=0.1),
}


def drawn(seed: int) -> GPT2Config:
    rng = random.Random(seed)
    n_heads = rng.randint(1, 6)
    return small(
        vocab_size=rng.randint(20, 300),
        n_positions=rng.randint(40, 90),
        n_embd=n_heads * rng.randint(3, 20),
        n_layer=rng.randint(1, 5),
        n_head=n_heads,
        n_inner=rng.choice([None, rng.randint(5, 200)]),
        layer_norm_epsilon=rng.choice([1e-6, 1e-5, 1e-3]),
    )


CASES |= {f"drawn {seed}": drawn(seed) for seed in range(8)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A folder that transformers wrote, and the model in it."""
    folder = tmp_path_factory.mktemp("gpt2")
    hf = reference(small(layer_norm_epsilon=0.01), scale=3.0)  # so large that greedy texts vary
    hf.save_pretrained(folder)
    assert_equal(gpt2.load_folder(folder), hf)
    return folder, hf


@pytest.fixture(scope="module")
def weights(saved: tuple[Path, PreTrainedModel]) -> dict[str, Tensor]:
    """The folder's tensors, under the published names: without the prefix `transformer.`"""
    state = load_file(saved[0] / "model.safetensors")
    return {name.removeprefix("transformer."): w for name, w in state.items()}


def rewritten(folder: Path, saved: Path, *shards: dict[str, Tensor]) -> Path:
    """A folder with the saved config and these tensors, one file a dict."""
    folder.joinpath("config.json").write_bytes(saved.joinpath("config.json").read_bytes())
    for i, shard in enumerate(shards, start=1):
        file = folder / f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file({name: w.contiguous() for name, w in shard.items()}, file)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """Guards every part of the forward pass, with the cache, in chunks, and with padding."""
    hf = reference(CASES[name])
    hf.save_pretrained(tmp_path)
    assert_equal(gpt2.load_folder(tmp_path), hf)


MUTANTS = {
    "exact GELU": 'approximate="tanh" -> approximate="none"',
    "unbiased variance": "variance = centred.square().mean(dim=-1, keepdim=True)"
    " -> variance = x.float().var(dim=-1, keepdim=True)",
    "no epsilon": "variance + self.eps -> variance",
    "norm without its mean": "x.float() - x.float().mean(dim=-1, keepdim=True) -> x.float()",
    "norm bias lost": "* self.weight + self.bias) -> * self.weight)",
    "final norm lost": "x_BTD = self.norm(x_BTD) -> pass",
    "norm after, not before": "self.mlp(self.mlp_norm(x_BTD)) -> self.mlp_norm(self.mlp(x_BTD))",
    "scale 1 / head_dim": "self.head_dim**-0.5 -> self.head_dim**-1.0",
    "sees the future": "k_pos_B1S <= q_pos_BT1 -> k_pos_B1S <= q_pos_BT1 + 1",
    "blind to itself": "k_pos_B1S <= q_pos_BT1 -> k_pos_B1S < q_pos_BT1",
    "padding is seen": " & ((k_pos_B1S >= 0) | (q_pos_BT1 < 0)) -> ",
    "padding is blind": " | (q_pos_BT1 < 0)) -> )",
    "padding takes positions": "(pos_T - n_pad) -> (pos_T - 0 * n_pad)",
    "positions start again with each call": "self.n_seen + torch.arange -> torch.arange",
    "positions from one": "self.n_seen + torch.arange -> self.n_seen + 1 + torch.arange",
    "cache forgets": "self.kept or tuple -> tuple",
    "heads interleaved": ".unflatten(-1, (-1, self.head_dim))"
    " -> .unflatten(-1, (self.head_dim, -1)).transpose(-1, -2)",
    "keys and values exchanged": 'zip("qkv" -> zip("qvk"',
    "square matrix not turned": "(c_attn|c_proj|c_fc) -> (c_attn|mlp.c_proj|c_fc)",
    "last_only gives the first": "x_BTD[:, -1:] if -> x_BTD[:, :1] if",
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str, saved: tuple[Path, PreTrainedModel]) -> None:
    """Guards the comparison above: with a mistake in the source it must fail."""
    folder, hf = saved
    assert_noticed(mutant(gpt2, MUTANTS[name]).load_folder(folder), hf)


def test_gradients_equal_transformers(saved: tuple[Path, PreTrainedModel]) -> None:
    """Guards training: no part is cut off from the loss."""
    folder, hf = saved
    model = gpt2.load_folder(folder)
    tokens_BT = torch.randint(97, (2, 20))
    for logits_BTV in (model(tokens_BT), hf(tokens_BT).logits):
        nn.functional.cross_entropy(logits_BTV[:, :-1].mT, tokens_BT[:, 1:]).backward()
    theirs = gpt2.convert({name: p.grad for name, p in hf.named_parameters()})
    largest = max(grad.abs().max() for grad in theirs.values())
    for name, param in model.named_parameters():
        assert (param.grad - theirs[name]).abs().max() < TOLERANCE * largest, name


# ---- parts


def test_causal_mask_by_loops() -> None:
    """Guards who sees whom, for positions in any order and below zero."""
    q_pos_BT, k_pos_BS = torch.randint(-3, 6, (4, 5)), torch.randint(-3, 6, (4, 7))
    mask_BTS = gpt2.causal_mask(q_pos_BT, k_pos_BS)
    for b, t, s in itertools.product(range(4), range(5), range(7)):
        q, k = int(q_pos_BT[b, t]), int(k_pos_BS[b, s])
        expected = k <= q if q < 0 else 0 <= k <= q
        assert bool(mask_BTS[b, t, s]) == expected


def test_attend_by_loops() -> None:
    """Guards the einsums: each head, each sequence and each token its own."""
    q, k, v = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 4, 5), torch.randn(2, 6, 4, 5)
    mask_BTS = torch.rand(2, 3, 6) > 0.5
    mask_BTS[:, :, 0] = True
    expected = brute_force_attention(q, k, v, lambda b, t, s: bool(mask_BTS[b, t, s]), 0.7)
    torch.testing.assert_close(gpt2.attend(q, k, v, mask_BTS, 0.7), expected.float())


def test_gelu_is_the_tanh_approximation() -> None:
    """Guards the activation: it is at most 4.7e-4 from the exact one, and that far at 2.70."""
    mlp = gpt2.MLP(gpt2.Config(d_model=1, bias=False), 1)
    nn.init.ones_(mlp.up_proj.weight)
    nn.init.ones_(mlp.down_proj.weight)
    x = torch.linspace(-6, 6, 12001)
    cubed = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    with torch.no_grad():
        ours = mlp(x[:, None])[:, 0]
    torch.testing.assert_close(ours, 0.5 * x * (1 + torch.tanh(cubed)), atol=2e-6, rtol=0)
    off = (ours - 0.5 * x * (1 + torch.erf(x / 2**0.5))).abs()
    assert 4.6e-4 < off.max() < 4.8e-4
    assert float(x[off.argmax()].abs()) == pytest.approx(2.70, abs=0.05)


def test_initial_weights() -> None:
    """Guards init_weights: measured spread of every matrix; biases zero, norm weights one."""
    cfg = gpt2.Config(
        vocab_size=300, max_seq_len=100, n_layers=8, d_model=64, n_heads=4, head_dim=16
    )
    for name, param in gpt2.Transformer(cfg).named_parameters():
        if name.endswith("bias"):
            assert not param.any(), name
        elif "norm" in name:
            assert (param == 1).all(), name
        else:
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * 8) if into_stream else 0.02
            error = 1 / math.sqrt(2 * param.numel())  # standard error of a measured std, relative
            assert float(param.detach().std()) == pytest.approx(std, rel=5 * error), name
            assert abs(float(param.detach().mean())) < 5 * std / math.sqrt(param.numel()), name


def test_position_table_ends() -> None:
    """Guards the end of the table: a clear error, not an index out of range or a wrong position."""
    cfg = gpt2.Config(vocab_size=10, max_seq_len=8, n_layers=1, d_model=8, n_heads=2, head_dim=4)
    model = gpt2.Transformer(cfg)
    assert model(torch.zeros(1, 8, dtype=torch.long)).shape == (1, 8, 10)
    with pytest.raises(ValueError, match="9 tokens: the position table ends at 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    cache = model.new_cache()
    model(torch.zeros(1, 7, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="9 tokens.*8"):
        model(torch.zeros(1, 2, dtype=torch.long), cache)
    assert len(list(gpt2.generate(model, torch.zeros(1, 3, dtype=torch.long), 6))) == 6
    with pytest.raises(ValueError, match="9 tokens.*8"):
        list(gpt2.generate(model, torch.zeros(1, 3, dtype=torch.long), 7))


def test_cache_bytes() -> None:
    """Guards n_bytes: keys and values of each token, four bytes a number, nothing else."""
    cfg = gpt2.Config(vocab_size=10, max_seq_len=32, n_layers=2, d_model=14, n_heads=3, head_dim=5)
    model, cache = gpt2.Transformer(cfg), None
    cache = model.new_cache()
    for n in (7, 1, 4):
        model(torch.zeros(6, n, dtype=torch.long), cache)
    assert cache[0].n_seen == 12
    assert [layer.n_bytes() for layer in cache] == [2 * 6 * 12 * 3 * 5 * 4] * 2


# ---- sampling


def kept_by_brute_force(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> list[float]:
    """The probability of each token, by the definitions."""
    exps = [math.exp(logit / temperature) for logit in logits]
    order = sorted(range(len(exps)), key=lambda i: -exps[i])[:top_k]
    total = sum(exps[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if top_p is None or mass < top_p:
            kept.append(i)
            mass += exps[i] / total
    return [exps[i] / sum(exps[j] for j in kept) if i in kept else 0.0 for i in range(len(exps))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 6, 50])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.4, 0.8, 1.0])
def test_sample_draws_by_the_definition(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Guards top_k, top_p and temperature, and their order: how often each token comes."""
    logits = [0.3, 1.5, -0.7, 1.1, 0.9, -1.2]
    n = 20_000
    generator = torch.Generator().manual_seed(1)
    tokens_B1 = gpt2.sample(torch.tensor([logits] * n), temperature, top_k, top_p, generator)
    assert tokens_B1.shape == (n, 1)
    expected = kept_by_brute_force(logits, temperature, top_k, top_p)
    for count, p in zip(tokens_B1.flatten().bincount(minlength=6).tolist(), expected, strict=True):
        assert (count > 0) == (p > 0)
        assert abs(count / n - p) <= 5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("seed", range(6))
def test_sample_keeps_what_transformers_keeps(seed: int) -> None:
    """Guards the borders of top_k and top_p on random logits, rows apart, by set membership."""
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

    logits_BV = torch.randn(4, 12, generator=torch.Generator().manual_seed(seed))
    rng = random.Random(seed)
    top_k, top_p = rng.randint(1, 12), rng.uniform(0.05, 0.95)
    for k, p in ((top_k, None), (None, top_p), (top_k, top_p)):
        warped_BV = logits_BV
        warped_BV = warped_BV if k is None else TopKLogitsWarper(k)(None, warped_BV)
        warped_BV = warped_BV if p is None else TopPLogitsWarper(p)(None, warped_BV)
        generator = torch.Generator().manual_seed(seed)
        drawn_BN = gpt2.sample(logits_BV.repeat(6000, 1), 1.0, k, p, generator).view(-1, 4).T
        for row_V, drawn_N in zip(warped_BV, drawn_BN, strict=True):
            assert set(drawn_N.tolist()) == set(row_V.isfinite().nonzero().flatten().tolist())


def test_temperature_zero_is_argmax() -> None:
    """Guards greedy decoding, whatever top_k and top_p say."""
    logits_BV = torch.randn(50, 11)
    generator = torch.Generator().manual_seed(0)
    for top_k, top_p in ((None, None), (3, 0.5)):
        tokens_B1 = gpt2.sample(logits_BV, 0.0, top_k, top_p, generator)
        assert tokens_B1.tolist() == logits_BV.argmax(-1, keepdim=True).tolist()


def test_seeds_reproduce(saved: tuple[Path, PreTrainedModel]) -> None:
    """Guards the private generator: a seed gives one text, whatever else draws numbers."""
    model = gpt2.load_folder(saved[0])
    prompt_BT = torch.randint(97, (2, 4))

    def draw(seed: int) -> list[list[int]]:
        torch.rand(seed + 1)  # another user of torch's global generator
        new = gpt2.generate(model, prompt_BT, 20, temperature=1.0, top_k=20, top_p=0.9, seed=seed)
        return torch.cat(list(new), dim=1).tolist()

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


# ---- generation


def test_generate_equals_transformers(saved: tuple[Path, PreTrainedModel]) -> None:
    """Guards greedy generation, and that the cache is used: one token a step after the prompt."""
    equals_generate(gpt2, gpt2.load_folder(saved[0]), saved[1])


def test_generate_padded_batch(saved: tuple[Path, PreTrainedModel]) -> None:
    """Guards prompts of unequal length in one batch."""
    same_alone_and_padded(gpt2, gpt2.load_folder(saved[0]))


def test_generate_goes_on(saved: tuple[Path, PreTrainedModel]) -> None:
    """Guards a cache that is handed from one call to the next."""
    goes_on(gpt2, gpt2.load_folder(saved[0]))


# ---- loading

MASKS = {
    f"h.{i}.attn.{name}": mask
    for i in range(3)
    for name, mask in {"bias": torch.ones(1, 1, 64, 64), "masked_bias": torch.tensor(-1e4)}.items()
}


@pytest.mark.parametrize(
    "form", ["published", "prefix", "masks", "prefix, masks", "head", "shards"]
)
def test_load_folder_forms(
    form: str, saved: tuple[Path, PreTrainedModel], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    """Guards the layouts in which GPT-2 is found: all of them are one model."""
    state = weights | MASKS if "masks" in form else dict(weights)
    if "prefix" in form:
        state = {f"transformer.{name}": w for name, w in state.items()}
    if form == "head":
        state["lm_head.weight"] = state["wte.weight"].clone()
    names = sorted(state)
    shards = [names[::2], names[1::2]] if form == "shards" else [names]
    folder = rewritten(tmp_path, saved[0], *[{name: state[name] for name in s} for s in shards])
    tokens_BT = torch.randint(97, (2, 20))
    with torch.no_grad():
        expected_BTV = saved[1](tokens_BT).logits
        wrong = (gpt2.load_folder(folder)(tokens_BT) - expected_BTV).abs().max()
    assert wrong < TOLERANCE * expected_BTV.abs().max()


def model_of(saved: tuple[Path, PreTrainedModel]) -> gpt2.Transformer:
    config = json.loads((saved[0] / "config.json").read_text(encoding="utf-8"))
    return gpt2.Transformer(gpt2.config_from_hf(config))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("wte.weight", "embed.weight"),
        ("h.1.mlp.c_fc.weight", "blocks.1.mlp.up_proj.weight"),
        ("h.2.ln_1.bias", "blocks.2.attn_norm.bias"),
        ("h.0.attn.c_attn.bias", "blocks.0.attn.q_proj.bias"),
    ],
)
def test_missing_tensor_is_an_error(
    theirs: str, ours: str, saved: tuple[Path, PreTrainedModel], weights: dict[str, Tensor]
) -> None:
    """Guards strictness: no parameter keeps its random values."""
    state = {name: w for name, w in weights.items() if name != theirs}
    with pytest.raises(KeyError) as error:
        gpt2.load_weights(model_of(saved), state)
    assert theirs in str(error.value) and ours in str(error.value)


@pytest.mark.parametrize(
    "name", ["h.3.ln_1.weight", "h.0.attn.rope", "score.weight", "lm_head.bias"]
)
def test_left_over_tensor_is_an_error(
    name: str, saved: tuple[Path, PreTrainedModel], weights: dict[str, Tensor]
) -> None:
    """Guards strictness: no tensor of the file is ignored, but masks and the tied head."""
    with pytest.raises(KeyError, match=name):
        gpt2.load_weights(model_of(saved), weights | {name: torch.zeros(48)})


@pytest.mark.parametrize(
    ("theirs", "ours", "shape", "seen", "needed"),
    [
        ("wte.weight", "embed.weight", (96, 48), (96, 48), (97, 48)),
        ("wpe.weight", "pos_embed.weight", (65, 48), (65, 48), (64, 48)),
        ("h.1.ln_2.bias", "blocks.1.mlp_norm.bias", (47,), (47,), (48,)),
        ("h.2.mlp.c_fc.weight", "blocks.2.mlp.up_proj.weight", (192, 48), (48, 192), (192, 48)),
        ("h.0.attn.c_attn.weight", "blocks.0.attn.q_proj.weight", (48, 150), (50, 48), (48, 48)),
        ("ln_f.weight", "norm.weight", (1,), (1,), (48,)),  # would be broadcast by a plain copy
    ],
)
def test_shape_that_differs_is_an_error(
    theirs: str,
    ours: str,
    shape: tuple[int, ...],
    seen: tuple[int, ...],
    needed: tuple[int, ...],
    saved: tuple[Path, PreTrainedModel],
    weights: dict[str, Tensor],
) -> None:
    """Guards shapes: the message has both names and both shapes."""
    with pytest.raises(ValueError) as error:
        gpt2.load_weights(model_of(saved), weights | {theirs: torch.zeros(shape)})
    for part in (theirs, ours, str(seen), str(needed)):
        assert part in str(error.value)


def test_load_weights_takes_our_own_names(saved: tuple[Path, PreTrainedModel]) -> None:
    """Guards a round trip: what a model of ours saves, a model of ours loads."""
    one, two = gpt2.load_folder(saved[0]), model_of(saved)
    gpt2.load_weights(two, iter(one.state_dict().items()))
    for name, param in two.named_parameters():
        assert torch.equal(param, one.get_parameter(name)), name


@pytest.mark.parametrize(
    ("sizes", "n_params"),
    [
        (dict(n_layer=12, n_embd=768, n_head=12), 124_439_808),
        (dict(n_layer=24, n_embd=1024, n_head=16), 354_823_168),
        (dict(n_layer=36, n_embd=1280, n_head=20), 774_030_080),
        (dict(n_layer=48, n_embd=1600, n_head=25), 1_557_611_200),
    ],
    ids=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"],
)
def test_published_sizes(sizes: dict[str, int], n_params: int) -> None:
    """Guards the four published models, without their bytes: parameters, names and shapes."""
    hf_config = GPT2Config(**sizes)  # the class defaults are the rest of the published file
    with torch.device("meta"):
        model = gpt2.Transformer(gpt2.config_from_hf(hf_config.to_dict()))
        hf = AutoModelForCausalLM.from_config(hf_config)
    assert sum(p.numel() for p in model.parameters()) == n_params
    published = {
        name.removeprefix("transformer."): w
        for name, w in hf.state_dict().items()
        if name != "lm_head.weight"
    }
    published |= {name: w.to("meta") for name, w in MASKS.items()}
    gpt2.load_weights(model, published)
    del published[f"h.{sizes['n_layer'] - 1}.mlp.c_proj.bias"]
    with pytest.raises(KeyError):
        gpt2.load_weights(model, published)


def test_defaults_are_gpt2_small() -> None:
    """Guards Config's defaults against the published file's values."""
    assert gpt2.Config() == gpt2.config_from_hf(GPT2Config().to_dict())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "relu"),
        ("tie_word_embeddings", False),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
    ],
)
def test_config_that_cannot_be_run(key: str, value: object) -> None:
    """Guards against running a variant as if it were GPT-2."""
    with pytest.raises(ValueError, match=f"{key}.*{value!r}"):
        gpt2.config_from_hf(small().to_dict() | {key: value})


@pytest.mark.parametrize("key", ["n_embd", "n_layer", "vocab_size", "n_positions"])
def test_config_without_a_key(key: str) -> None:
    """Guards against guessing a size."""
    config = small().to_dict()
    del config[key]
    with pytest.raises(KeyError, match=key):
        gpt2.config_from_hf(config)


def test_runs_from_the_command_line(
    saved: tuple[Path, PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards --weights and --prompt: the words are those that transformers goes on with."""
    folder, hf = saved
    words = Tokenizer(WordLevel({f"word{i}": i for i in range(97)}, unk_token="word0"))
    words.pre_tokenizer = WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    prompt = "word5 word9 word31"
    arguments = ["--weights", str(folder), "--prompt", prompt, "--n-new", "6"]
    monkeypatch.setattr(sys, "argv", ["gpt2.py", *arguments])
    gpt2.main()
    prompt_1T = torch.tensor([[5, 9, 31]])
    mask_1T = torch.ones_like(prompt_1T)
    text_1T = hf.generate(prompt_1T, attention_mask=mask_1T, max_new_tokens=6, do_sample=False)
    assert capsys.readouterr().out.splitlines()[-1] == words.decode(text_1T[0].tolist())
