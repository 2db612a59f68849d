"""Two real models, SmolLM2 135M and Gemma 3 270M, from their quantized files to their words.

The reference is transformers with the same weights. They are read here by other code than the
project's, from the format's description; only the quantized blocks are undone by the same package.
"""

import dataclasses
import functools
import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from ch08_full_models.checkpoint import MODELS, family_of, load
from ch08_full_models.tokenizer import Tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

NAMES = ("smollm2-135m", "gemma3-270m")
CAPITALS = (
    "The capital of France is Paris. The capital of Germany is Berlin. "
    "The capital of Italy is Rome. The capital of Spain is"
)
TEXT = (
    "In the beginning the ship was only a drawing on the back of a letter. Anna had drawn it while "
    "she waited for the rain to stop, and when it did she folded the paper and forgot it. Years "
    "later, in 1974, her brother found the letter in a box; he built the ship from her lines, 12 "
    "metres long, and gave it her name. It still sails every summer."
)
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def stored_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a GGUF file of version 3, in its names and layout, in float32."""
    data = np.memmap(path, mode="r")
    head = data[: 32 << 20].tobytes()  # fields and vocabulary end well before
    place = 8

    def take(kind: str) -> int:
        nonlocal place
        [value] = struct.unpack_from(f"<{kind}", head, place)
        place += struct.calcsize(f"<{kind}")
        return value

    def string() -> str:
        nonlocal place
        n = take("Q")
        place += n
        return head[place - n : place].decode(errors="replace")

    def skip(kind: int) -> None:
        nonlocal place
        if kind == 8:
            string()
        elif kind == 9:
            inner, count = take("I"), take("Q")
            for _ in range(count):
                skip(inner)
        else:
            place += [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8][kind]

    n_tensors, n_fields = take("Q"), take("Q")
    for _ in range(n_fields):
        assert string() != "general.alignment"  # else it is 32
        skip(take("I"))
    described = []
    for _ in range(n_tensors):
        name, n_axes = string(), take("I")
        shape = [take("Q") for _ in range(n_axes)][::-1]
        described.append((name, shape, GGMLQuantizationType(take("I")), take("Q")))
    start = math.ceil(place / 32) * 32
    for name, shape, kind, offset in described:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        n_bytes = math.prod(shape) // block * block_bytes
        rows = data[start + offset : start + offset + n_bytes].reshape(math.prod(shape[:-1]), -1)
        yield name, dequantize(rows, kind).reshape(shape).astype(np.float32, copy=False)


def hf_state(path: Path, n_heads: dict[str, int] | None) -> dict[str, Tensor]:
    """The file's weights as transformers wants them.

    n_heads, of a Llama: those of "q_proj" and "k_proj", whose rows llama.cpp reorders. A Gemma's
    norm weights it stores with the 1 added.
    """
    state = {}
    for name, array in stored_tensors(path):
        w = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
            layer, part = match.groups()
            names = LAYER_NAMES | {
                "ffn_norm": "post_attention_layernorm" if n_heads else "pre_feedforward_layernorm"
            }
            name = f"model.layers.{layer}.{names[part]}.weight"
        else:
            outer = {"token_embd.weight": "embed_tokens", "output_norm.weight": "norm"}
            name = f"model.{outer[name]}.weight"
        heads = (n_heads or {}).get(name.split(".")[-2])
        if heads:
            per_head = w.shape[0] // heads
            order = torch.arange(w.shape[0]).view(heads, per_head // 2, 2).mT.flatten()
            w = w[order]
        state[name] = w - 1 if "norm" in name and not n_heads else w
    return state


def reference(path: Path, config: dict) -> nn.Module:
    """transformers' model with the file's weights, built from the published config.json."""
    if config["model_type"] == "llama":
        n_heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        kind, hf_config = LlamaForCausalLM, LlamaConfig(**config)
    else:
        n_heads, kind, hf_config = None, Gemma3ForCausalLM, Gemma3TextConfig(**config)
    state = hf_state(path, n_heads)
    hf, found = kind.from_pretrained(
        None,
        config=hf_config,
        state_dict=state,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    return hf.eval()


@dataclass(frozen=True)
class Real:
    """A real model of ours, a text of 64 tokens (1, T), and transformers' logits (1, T, V)."""

    model: nn.Module
    tokenizer: Tokenizer
    text: Tensor
    expected: Tensor
    long: Tensor  # (1, 560) tokens, more than Gemma's window
    expected_last: Tensor | None  # (V,), Gemma's after the long text

    def generate(self, tokens_BT: Tensor, n_new: int, n_pad_B: Tensor | None = None) -> list:
        """Greedy tokens, a list a text."""
        new = family_of(self.model).generate(self.model, tokens_BT, n_new, n_pad_B=n_pad_B)
        return torch.cat(list(new), dim=1).tolist()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make a busy machine slower than one does."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def real_models(gguf_path: Callable[[str], Path]) -> Callable[[str], Real]:
    """A function from a model's name to the model, which is loaded once."""

    @functools.cache
    def get(name: str) -> Real:
        path = gguf_path(name)
        model, tokenizer = load(path, device="cpu")
        text_1T = torch.tensor([tokenizer.encode(TEXT)[:64]])
        long_1T = torch.tensor([tokenizer.encode(TEXT * 9)[:560]])
        hf = reference(path, MODELS[name].config)
        with torch.no_grad():
            expected_1TV = hf(text_1T).logits
            last_V = hf(long_1T, logits_to_keep=1).logits[0, -1] if "gemma" in name else None
        return Real(model, tokenizer, text_1T, expected_1TV, long_1T, last_V)

    return get


@pytest.fixture(params=NAMES)
def real(request: pytest.FixtureRequest, real_models: Callable[[str], Real]) -> Real:
    return real_models(request.param)


@torch.no_grad()
def loss(model: nn.Module, tokens: list[int]) -> tuple[float, int]:
    """Mean loss a token, in nats, and the likeliest next token."""
    logits_TV = model(torch.tensor([tokens]))[0]
    mean = nn.functional.cross_entropy(logits_TV[:-1], torch.tensor(tokens[1:]))
    return float(mean), int(logits_TV[-1].argmax())


def close(found: Tensor, expected: Tensor) -> bool:
    """Within 1e-4 of the largest logit."""
    return bool((found - expected).abs().max() < 1e-4 * expected.abs().max())


@torch.no_grad()
def test_logits_equal_transformers(real: Real) -> None:
    """Guards the whole way from the file to the logits, on 64 tokens of English."""
    assert real.text.shape == (1, 64)
    logits_1TV = real.model(real.text)
    assert logits_1TV.dtype == torch.float32
    assert close(logits_1TV, real.expected)


@torch.no_grad()
def test_cached_and_chunked_equal_whole(real: Real) -> None:
    """Guards the cache on real weights: in chunks, and token by token."""
    for sizes in ([40, 7, 1, 1, 15], [54] + [1] * 10):
        cache = real.model.new_cache()
        parts = [real.model(part_1T, cache) for part_1T in real.text.split(sizes, dim=1)]
        assert close(torch.cat(parts, dim=1), real.expected)


@torch.no_grad()
def test_gemma_beyond_its_window(real_models: Callable[[str], Real]) -> None:
    """Guards 560 tokens, read at once and in parts: the local layers see the last 512."""
    real = real_models("gemma3-270m")
    assert real.long.shape == (1, 560) and 512 in real.model.cfg.windows
    assert close(real.model(real.long, last_only=True)[0, -1], real.expected_last)
    cache = real.model.new_cache()
    for part_1T in real.long.split([500, 50, 1, 8, 1], dim=1):
        logits_11V = real.model(part_1T, cache, last_only=True)
    assert close(logits_11V[0, -1], real.expected_last)


def test_smollm2_knows_the_capitals(real_models: Callable[[str], Real]) -> None:
    """Guards the rows of q and k: left as they are, the loss is 2.41, the next word ' the'."""
    real = real_models("smollm2-135m")
    tokens = real.tokenizer.encode(CAPITALS)
    mean, next_token = loss(real.model, tokens)
    assert mean == pytest.approx(1.16, abs=0.02)
    assert real.tokenizer.decode([next_token]) == " Madrid"


def test_gemma_knows_the_capitals(real_models: Callable[[str], Real]) -> None:
    """Guards <bos>, the norms' 1 and the two rotary bases, each by the loss without it."""
    real = real_models("gemma3-270m")
    tokens = real.tokenizer.encode(CAPITALS)
    assert tokens[0] == real.tokenizer.bos_id == 2
    mean, next_token = loss(real.model, tokens)
    assert mean == pytest.approx(1.59, abs=0.01)
    assert real.tokenizer.decode([next_token]) == " Madrid"
    assert loss(real.model, tokens[1:])[0] == pytest.approx(3.6, abs=0.1)


def test_gemma_with_one_rotary_base(
    real_models: Callable[[str], Real], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the local base: with the global one in its place the text is still plausible."""
    real = real_models("gemma3-270m")
    one_base = dataclasses.replace(real.model.cfg, local_theta=1e6)
    monkeypatch.setattr(real.model, "cfg", one_base)
    mean, _ = loss(real.model, real.tokenizer.encode(CAPITALS))
    assert mean == pytest.approx(1.713, abs=0.005)


def test_padded_batch_gives_what_each_gives_alone(real: Real) -> None:
    """Guards prompts of unequal length in one batch, on real weights."""
    prompts = [real.tokenizer.encode(text) for text in (CAPITALS, "Once upon a time")]
    alone = [real.generate(torch.tensor([prompt]), 8)[0] for prompt in prompts]
    length = max(map(len, prompts))
    n_pad_B = torch.tensor([length - len(prompt) for prompt in prompts])
    padded_BT = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    assert real.generate(padded_BT, 8, n_pad_B) == alone
    assert real.tokenizer.decode(alone[0]).startswith(" Madrid")
