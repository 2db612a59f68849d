"""swiglu_rmsnorm.py against transformers' Llama, Mistral and DeepSeek, and its parts in float64.

Holds what the tests of chapters 6 and 7 share: transformers' tensors under this book's names,
experts included, a Config that fits a transformers config, and the comparison of gradients.
"""

import dataclasses
import math
import random
import re
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from ch04_mla import mla
from ch05_swiglu_rmsnorm import swiglu_rmsnorm
from tests.parity import (
    TOLERANCE,
    assert_equal,
    assert_noticed,
    equals_generate,
    errors,
    goes_on,
    mutant,
    reference,
    same_alone_and_padded,
)
from tests.test_ch04_mla import convert as turned_by_halves
from tests.test_ch04_mla import force, rope, v2, v3

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- transformers' models under our names

SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=12,  # not the 8 that a head would have by custom
    rms_norm_eps=1e-5,
    max_position_embeddings=128,
    tie_word_embeddings=True,
    bos_token_id=None,  # generate goes on
    eos_token_id=None,
    pad_token_id=None,
)


def sizes(**changes: object) -> dict:
    """SIZES with changes, and a base; transformers writes into the dict that it is given."""
    return SIZES | dict(rope_parameters=rope(10_000.0)) | changes


NAMES = {  # theirs and ours, part by part
    "embed_tokens": "embed",
    "layers": "blocks",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn": "attn",
    "gate": "router",
    "shared_experts": "shared",
}


def convert(theirs: dict[str, Tensor], names: dict[str, str] | None = None) -> dict[str, Tensor]:
    """transformers' tensors, or their gradients, under our names, experts one by one.

    `names` come before NAMES. A tensor that is already ours stays what it is.
    """
    names = NAMES | (names or {})
    converted = {}
    for name, w in theirs.items():
        if name == "lm_head.weight":
            continue  # the embedding once more
        parts = name.removeprefix("model.").split(".")
        name = ".".join(names.get(part, part) for part in parts)
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for e, (gate, up) in enumerate(both.chunk(2) for both in w):
                converted[f"{stem}.{e}.gate_proj.weight"] = gate
                converted[f"{stem}.{e}.up_proj.weight"] = up
        elif last == "down_proj":
            converted |= {f"{stem}.{e}.down_proj.weight": down for e, down in enumerate(w)}
        elif last == "e_score_correction_bias":
            converted[name.replace("router.e_score_correction_bias", "choice_bias")] = w
        else:
            converted[name] = w
    return converted


def windows_of(theirs: PretrainedConfig) -> tuple[int | None, ...]:
    """What each layer sees, as Config.windows has it; some families list their layers' kinds."""
    window = getattr(theirs, "sliding_window", None)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def config_of(module: ModuleType, theirs: PretrainedConfig, **changes: object) -> object:
    """The module's Config with the sizes of a transformers config; `changes` come last."""
    width = theirs.hidden_size // theirs.num_attention_heads
    angles = theirs.rope_parameters
    given = dict(
        vocab_size=theirs.vocab_size,
        n_layers=theirs.num_hidden_layers,
        d_model=theirs.hidden_size,
        n_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads,
        head_dim=getattr(theirs, "head_dim", None) or width,
        windows=windows_of(theirs),
        d_latent=None,
        d_ff=theirs.intermediate_size,
        bias=bool(getattr(theirs, "attention_bias", False)),
        norm_eps=theirs.rms_norm_eps,
        rope_theta=angles.get("full_attention", angles)["rope_theta"],  # Gemma 3 has two
    )
    if hasattr(theirs, "kv_lora_rank"):
        given |= dict(
            n_kv_heads=1,  # says nothing here
            head_dim=theirs.qk_nope_head_dim,
            d_latent=theirs.kv_lora_rank,
            d_q_latent=theirs.q_lora_rank,
            d_rope=theirs.qk_rope_head_dim,
            d_value=theirs.v_head_dim,
        )
    return module.Config(**given | changes)


def ours(
    hf: PreTrainedModel,
    module: ModuleType = swiglu_rmsnorm,
    names: dict[str, str] | None = None,
    **changes: object,
) -> nn.Module:
    """Our model, or that of a spoiled module, with the weights of transformers'."""
    model = module.Transformer(config_of(module, hf.config, **changes)).eval()
    state = our_tensors(hf, hf.state_dict(), names)
    for name, param in model.named_parameters():
        if name.endswith("choice_bias"):
            state.setdefault(name, torch.zeros_like(param))  # most families have none
    model.load_state_dict(state)
    return model


def our_tensors(
    hf: PreTrainedModel, theirs: dict[str, Tensor], names: dict[str, str] | None = None
) -> dict[str, Tensor]:
    """A transformers model's tensors, or their gradients, as ours are named and laid out."""
    if hasattr(hf.config, "kv_lora_rank"):
        theirs = turned_by_halves(theirs, hf.config)
    return convert(theirs, names)


def check_gradients(
    model: nn.Module, hf: PreTrainedModel, names: dict[str, str] | None = None
) -> None:
    """Gradients are finite and transformers' own, to 1e-4 of the largest of their tensor.

    An expert without tokens has none here, and zeros there.
    """
    tokens_BT = torch.randint(hf.config.vocab_size, (2, 30))
    for logits_BTV in (model(tokens_BT), hf(tokens_BT, use_cache=False).logits):
        F.cross_entropy(logits_BTV[:, :-1].mT, tokens_BT[:, 1:]).backward()
    given = {name: p.grad for name, p in hf.named_parameters() if p.grad is not None}
    theirs = our_tensors(hf, given, names)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert params.keys() == theirs.keys()
    for name, param in params.items():
        if param.grad is None:
            assert ".experts." in name and not theirs[name].any(), name
            continue
        assert param.grad.isfinite().all() and param.grad.any(), name
        wrong = (param.grad - theirs[name]).abs().max()
        assert wrong < 1e-4 * theirs[name].abs().max(), name


# ---- the whole model


def llama(**changes: object) -> LlamaConfig:
    return LlamaConfig(**sizes(**changes))


def mistral(**changes: object) -> MistralConfig:
    return MistralConfig(**sizes(**dict(sliding_window=8) | changes))  # all texts have 40 tokens


def drawn(seed: int) -> PretrainedConfig:
    """A config drawn at random, with groups, a window, biases or an epsilon that matters."""
    rng = random.Random(seed)
    n_kv_heads = rng.randint(1, 3)
    n_heads = n_kv_heads * rng.randint(2, 4)
    changes = dict(
        vocab_size=rng.randint(20, 200),
        hidden_size=n_heads * rng.randint(1, 9),  # transformers takes no others
        intermediate_size=rng.randint(5, 150),
        num_hidden_layers=rng.randint(1, 4),
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=2 * rng.randint(1, 10),
        rms_norm_eps=rng.choice([1e-6, 1e-5, 1e-2]),
        rope_parameters=rope(rng.choice([20.0, 1e4, 5e5])),
    )
    if rng.random() < 0.5:
        return mistral(**changes, sliding_window=rng.randint(1, 24))
    has_bias = rng.random() < 0.5
    return llama(**changes, attention_bias=has_bias, mlp_bias=has_bias)


CASES = {
    "Llama": llama(),
    "one key/value head": llama(num_key_value_heads=1),
    "every head its own": llama(num_key_value_heads=6, head_dim=8),
    "biases": llama(attention_bias=True, mlp_bias=True),
    "large epsilon": llama(rms_norm_eps=0.05),
    "MLP narrower than the stream": llama(intermediate_size=7),
    "Mistral": mistral(),
    "Mistral, window of one": mistral(sliding_window=1),
    "Mistral, window one short": mistral(sliding_window=39),
}
CASES |= {f"drawn {seed}": drawn(seed) for seed in range(6)}

LATENT = {
    "V3": v3(attention_bias=False, rms_norm_eps=1e-3),
    "V3, queries from the stream": v3(attention_bias=False, q_lora_rank=None),
    "V2": v2(mlp_bias=True),
    "V2, no biases": v2(attention_bias=False),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str) -> None:
    """Guards the forward pass: a Llama, however texts are fed."""
    hf = reference(CASES[name], seed=len(name))
    assert_equal(ours(hf), hf, seed=len(name))


@torch.no_grad()
def quiet(hf: PreTrainedModel, size: float) -> PreTrainedModel:
    """The model with small latents before their norm, so that the norm's epsilon matters."""
    for layer in hf.model.layers:
        for param in layer.self_attn.kv_a_proj_with_mqa.parameters():
            param[: hf.config.kv_lora_rank] *= size
        if hf.config.q_lora_rank is not None:
            for param in layer.self_attn.q_a_proj.parameters():
                param *= size
    return hf


@pytest.mark.parametrize("size", [1.0, 0.01])
@pytest.mark.parametrize("name", LATENT)
def test_latent_attention_equals_deepseek(name: str, size: float) -> None:
    """Guards the latents' norms: a dense DeepSeek with nothing exchanged, in both forms."""
    hf = quiet(reference(LATENT[name], scale=2.0), size)
    model = ours(hf)
    assert_equal(model, hf, n=24)
    for form in ("expanded", "absorbed"):
        assert next(errors(force(model, form), hf, n=24))[1] < TOLERANCE


OFF = {
    "one key/value head": dict(n_kv_heads=6),
    "biases": dict(bias=False),
    "large epsilon": dict(norm_eps=1e-5),
    "Mistral": dict(windows=(None,)),
    "Mistral, window of one": dict(windows=(2,)),
    "Mistral, window one short": dict(windows=(40,)),
}


@pytest.mark.parametrize("name", OFF)
@torch.no_grad()
def test_parts_are_switched_on(name: str) -> None:
    """Guards the cases above: without the part the logits are others."""
    hf = reference(CASES[name], seed=len(name))
    model = ours(hf)
    without = swiglu_rmsnorm.Transformer(dataclasses.replace(model.cfg, **OFF[name])).eval()
    state = model.state_dict()
    for key, param in without.state_dict().items():
        w = state[key]
        if w.shape != param.shape:  # each head gets keys of its own: those of another group
            w = w.repeat(param.shape[0] // w.shape[0], 1)
            w = w * torch.linspace(0.5, 1.5, len(w))[:, None]
        param.copy_(w)
    assert next(errors(without, hf))[1] > 1e-3


@pytest.mark.parametrize("name", ["Llama", "Mistral", "biases"])
def test_gradients_equal_transformers(name: str) -> None:
    """Guards training: each matrix and each norm's weight."""
    hf = reference(CASES[name])
    check_gradients(ours(hf), hf)


def test_gradients_equal_deepseek() -> None:
    """Guards training with latents and their norms."""
    hf = reference(LATENT["V3"], scale=2.0)
    check_gradients(ours(hf), hf)


# ---- mistakes

GATED = "F.silu(self.gate_proj(x)) * self.up_proj(x)"
SQUARE = "x.float().square().mean(dim=-1, keepdim=True)"
ROOT = "torch.rsqrt(mean_square + self.eps)"
ATTN_HALF = "x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), pos_BT, turn, cache)"
MLP_HALF = "x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD))"
LARGE_EPS, WINDOW, DEEPSEEK, QUIET = "large epsilon", "Mistral", "V3", "quiet V3"
MUTANTS = {  # the change, and the case in which it shows, if it is not "Llama"
    "gate and up exchanged": f"{GATED} -> F.silu(self.up_proj(x)) * self.gate_proj(x)",
    "GELU for SiLU": "F.silu(self -> F.gelu(self",
    "tanh GELU for SiLU": f"{GATED} -> F.gelu(self.gate_proj(x), approximate='tanh')"
    " * self.up_proj(x)",
    "ReLU for SiLU": "F.silu(self -> F.relu(self",
    "sigmoid for SiLU": "F.silu(self -> torch.sigmoid(self",
    "no activation": "F.silu(self.gate_proj(x)) -> self.gate_proj(x)",
    "activation of the product": f"{GATED} -> F.silu(self.gate_proj(x) * self.up_proj(x))",
    "activation of both": "* self.up_proj(x) -> * F.silu(self.up_proj(x))",
    "sum for product": ") * self.up_proj(x) -> ) + self.up_proj(x)",
    "down of the gate alone": f"{GATED} -> F.silu(self.gate_proj(x))",
    "gate forgotten": f"{GATED} -> F.silu(self.up_proj(x))",
    "gate twice": "* self.up_proj(x) -> * self.gate_proj(x)",
    "mean subtracted": "mean_square = x.float() -> "
    "x = x - x.mean(dim=-1, keepdim=True); mean_square = x.float()",
    "variance for mean square": f"{SQUARE} -> x.float().var(dim=-1, keepdim=True, correction=0)",
    "sum for mean": "square().mean( -> square().sum(",
    "n - 1 for n": f"{SQUARE} -> {SQUARE} * x.shape[-1] / (x.shape[-1] - 1)",
    "mean of absolutes": f"{SQUARE} -> x.float().abs().mean(dim=-1, keepdim=True).square()",
    "statistics over the tokens": "mean(dim=-1, -> mean(dim=-2,",
    "statistics over the batch": "mean(dim=-1, -> mean(dim=0,",
    "statistics over everything": "mean(dim=-1, keepdim=True) -> mean()",
    "square root forgotten": f"{ROOT} -> (1 / (mean_square + self.eps))",
    "weight forgotten": "self.weight * (x.float() -> (x.float()",
    "weight plus one": "self.weight * (x.float() -> (1 + self.weight) * (x.float()",
    "epsilon outside the root": (LARGE_EPS, f"{ROOT} -> (1 / (mean_square.sqrt() + self.eps))"),
    "epsilon forgotten": (LARGE_EPS, f"{ROOT} -> torch.rsqrt(mean_square)"),
    "epsilon's own value": (LARGE_EPS, "self.eps = eps -> self.eps = 1e-6"),
    "epsilon of the final norm": (
        LARGE_EPS,
        "self.norm = RMSNorm(cfg.d_model, cfg.norm_eps) -> self.norm = RMSNorm(cfg.d_model, 1e-5)",
    ),
    "final norm missing": "x_BTD = self.norm(x_BTD) -> pass",
    "no norm before attention": "self.attn(self.attn_norm(x_BTD), -> self.attn(x_BTD,",
    "no norm before the MLP": "self.mlp(self.mlp_norm(x_BTD)) -> self.mlp(x_BTD)",
    "attention's norm for the MLP": "self.mlp(self.mlp_norm(x -> self.mlp(self.attn_norm(x",
    "norm after the addition": f"{MLP_HALF} -> x_BTD = self.mlp_norm(x_BTD + self.mlp(x_BTD))",
    "MLP without the stream": f"{MLP_HALF} -> x_BTD = self.mlp(self.mlp_norm(x_BTD))",
    "both halves side by side": (
        "Llama",
        f"{ATTN_HALF} -> y_BTD = self.attn(self.attn_norm(x_BTD), pos_BT, turn, cache)",
        f"{MLP_HALF} -> x_BTD = x_BTD + y_BTD + self.mlp(self.mlp_norm(x_BTD))",
    ),
    "MLP before attention": (
        "Llama",
        f"{MLP_HALF} -> pass",
        f"{ATTN_HALF} -> {MLP_HALF}; {ATTN_HALF}",
    ),
    "window forgotten": (WINDOW, "cfg.windows[layer % len(cfg.windows)] -> None"),
    "key latent without its norm": (DEEPSEEK, "self.kv_a_norm(c_BTC) -> c_BTC"),
    "query latent without its norm": (
        DEEPSEEK,
        "self.q_a_norm(self.q_a_proj(x_BTD)) -> self.q_a_proj(x_BTD)",
    ),
    "rotary key normed, too": (
        DEEPSEEK,
        "k_rot_BTR = rope(k_rot_BTR[:, :, None] -> "
        "k_rot_BTR = rope(F.rms_norm(k_rot_BTR, k_rot_BTR.shape[-1:])[:, :, None]",
    ),
    "key latent with the block's epsilon": (
        QUIET,
        "self.kv_a_norm = RMSNorm(cfg.d_latent, 1e-6) -> "
        "self.kv_a_norm = RMSNorm(cfg.d_latent, cfg.norm_eps)",
    ),
    "query latent with the block's epsilon": (
        QUIET,
        "RMSNorm(cfg.d_q_latent, 1e-6) -> RMSNorm(cfg.d_q_latent, cfg.norm_eps)",
    ),
    "latents' epsilon 1e-5": (
        QUIET,
        "cfg.d_latent, 1e-6) -> cfg.d_latent, 1e-5)",
        "cfg.d_q_latent, 1e-6) -> cfg.d_q_latent, 1e-5)",
    ),
}


@pytest.fixture(scope="module")
def references() -> dict[str, PreTrainedModel]:
    """The models that spoiled ones are compared with; unspoiled, ours equal them."""
    made = {name: reference(CASES[name], scale=2.0) for name in ("Llama", LARGE_EPS, WINDOW)}
    made[DEEPSEEK] = reference(LATENT["V3"], scale=2.0)
    made[QUIET] = quiet(reference(LATENT["V3"], scale=2.0), 0.01)
    for hf in made.values():
        assert next(errors(ours(hf), hf))[1] < TOLERANCE
    return made


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str, references: dict[str, PreTrainedModel]) -> None:
    """Guards the comparison with transformers: with a mistake in the source it must fail."""
    mistake = MUTANTS[name]
    case, *changes = ("Llama", mistake) if isinstance(mistake, str) else mistake
    spoiled = mutant(swiglu_rmsnorm, *changes)
    assert_noticed(ours(references[case], spoiled), references[case])


# ---- RMSNorm


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zhang and Sennrich's equation 4 in float64, row by row, with epsilon under the root."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for row, out_row in zip(
        x.double().view(-1, x.shape[-1]), out.view(-1, x.shape[-1]), strict=True
    ):
        mean_square = math.fsum(float(a) ** 2 for a in row) / len(row)
        out_row.copy_(weight.double() * row / math.sqrt(mean_square + eps))
    return out


def norm_of(module: ModuleType, weight: Tensor, eps: float) -> nn.Module:
    """The module's RMSNorm with this weight, in the weight's type."""
    norm = module.RMSNorm(len(weight), eps).to(weight.dtype)
    norm.weight.data.copy_(weight)
    return norm


@torch.no_grad()
@pytest.mark.parametrize("eps", [1e-6, 0.3])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 40), (2, 3, 4, 1)])
def test_rmsnorm_by_its_formula(shape: tuple[int, ...], eps: float) -> None:
    """Guards the norm over the last axis of any shape: to float32's rounding."""
    x, weight = 3 * torch.randn(shape) + 1, torch.randn(shape[-1])
    found = norm_of(swiglu_rmsnorm, weight, eps)(x)
    torch.testing.assert_close(found.double(), normed(x, weight, eps), rtol=2e-6, atol=0)
    by_torch = F.rms_norm(x, shape[-1:], weight, eps)
    torch.testing.assert_close(found, by_torch, rtol=2e-6, atol=0)


@torch.no_grad()
def test_rmsnorm_keeps_a_mean_and_drops_a_scale() -> None:
    """Guards what the name says: x and 8 x are alike, x and x + 8 are not."""
    norm, x_ND = swiglu_rmsnorm.RMSNorm(64, 0.0), torch.randn(5, 64)
    assert torch.equal(norm(8 * x_ND), norm(x_ND))  # a power of two changes no bit
    assert torch.equal(norm(-x_ND), -norm(x_ND))
    torch.testing.assert_close(norm(x_ND).square().mean(dim=-1), torch.ones(5))
    assert norm(x_ND + 8).mean() > 0.9
    zero = swiglu_rmsnorm.RMSNorm(64, 1e-6)(torch.zeros(2, 64))
    assert torch.equal(zero, torch.zeros(2, 64))


HALVES = [torch.bfloat16, torch.float16]


@torch.no_grad()
def check_rounding(module: ModuleType, dtype: torch.dtype) -> None:
    """Bit for bit Llama's norm of transformers, weights and input in a type of 16 bits."""
    for eps, size in ((1e-6, 1.0), (1e-5, 30.0), (0.3, 0.1)):
        x_BTD = (size * torch.randn(4, 16, 96)).to(dtype)
        weight = (1 + 0.3 * torch.randn(96)).to(dtype)
        theirs = LlamaRMSNorm(96, eps).to(dtype)
        theirs.weight.copy_(weight)
        found_BTD = norm_of(module, weight, eps)(x_BTD)
        assert found_BTD.dtype == dtype
        assert torch.equal(found_BTD, theirs(x_BTD))


@torch.no_grad()
def check_large(module: ModuleType, dtype: torch.dtype) -> None:
    """Activations of 1e3 to 6e4, whose squares float16 does not hold: right to two roundings."""
    step = torch.finfo(dtype).eps  # of neighbours; a rounding is at most half of it
    for size in (1e3, 1e4, 6e4):
        x_ND = (size * (2 * torch.rand(8, 96) - 1)).to(dtype)
        weight = (1 + 0.3 * torch.randn(96)).to(dtype)
        found_ND = norm_of(module, weight, 1e-6)(x_ND).double()
        exact_ND = normed(x_ND, weight, 1e-6)
        assert found_ND.isfinite().all()
        # the exact value is far from zero wherever a relative error says something
        wrong = (found_ND - exact_ND).abs() / exact_ND.abs().clamp(min=0.01)
        assert wrong.max() < 1.01 * step


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rmsnorm_rounds_as_llama_does(dtype: torch.dtype) -> None:
    """Guards the order: to 16 bits first, then the weight."""
    check_rounding(swiglu_rmsnorm, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rmsnorm_of_large_activations(dtype: torch.dtype) -> None:
    """Guards statistics in float32, for inputs of any size that 16 bits hold."""
    check_large(swiglu_rmsnorm, dtype)


ROUNDED = f"self.weight * (x.float() * {ROOT}).type_as(x)"
NORM_MUTANTS = {
    "weight before rounding": f"{ROUNDED} -> (self.weight * x.float() * {ROOT}).type_as(x)",
    "statistics in the input's type": "= x.float().square() -> = x.square()",
    "mean in the input's type": "= x.float().square() -> = x.float().square().type_as(x)",
    "root in the input's type": f"{ROUNDED} -> self.weight * (x * {ROOT}.type_as(x))",
    "result in float32": ".type_as(x)\n\n\nclass Block -> \n\n\nclass Block",
}


@pytest.mark.parametrize("name", NORM_MUTANTS)
def test_mistakes_of_rounding_are_noticed(
    name: str, references: dict[str, PreTrainedModel]
) -> None:
    """Guards check_rounding and check_large: in float32 these mistakes do not show."""
    spoiled = mutant(swiglu_rmsnorm, NORM_MUTANTS[name])
    hf = references["Llama"]
    assert next(errors(ours(hf, spoiled), hf))[1] < TOLERANCE
    with pytest.raises(AssertionError):
        check_rounding(spoiled, torch.bfloat16)
    if name in ("statistics in the input's type", "mean in the input's type"):
        with pytest.raises(AssertionError):  # 256 squared is infinite already
            check_large(spoiled, torch.float16)


# ---- the MLP


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("D", "d_ff"), [(1, 1), (6, 11), (24, 64)])
def test_mlp_by_its_formula(D: int, d_ff: int, bias: bool) -> None:
    """Guards Shazeer's equation 6 by loops in float64, and equality with transformers' LlamaMLP."""
    widths = dict(hidden_size=D, intermediate_size=d_ff, num_attention_heads=1)
    theirs = LlamaMLP(LlamaConfig(**widths, mlp_bias=bias))
    for param in theirs.parameters():
        nn.init.normal_(param)
    mlp = swiglu_rmsnorm.MLP(swiglu_rmsnorm.Config(d_model=D, bias=bias), d_ff)
    mlp.load_state_dict(theirs.state_dict())
    x_BTD = torch.randn(2, 3, D)
    assert torch.equal(mlp(x_BTD), theirs(x_BTD))
    w = {name: param.double() for name, param in mlp.state_dict().items()}
    zero = torch.zeros(1, dtype=torch.float64)

    def linear(name: str, x: Tensor) -> Tensor:
        return w[f"{name}_proj.weight"] @ x + w.get(f"{name}_proj.bias", zero)

    for x_D, found_D in zip(x_BTD.view(-1, D), mlp(x_BTD).view(-1, D), strict=True):
        gate, up = linear("gate", x_D.double()), linear("up", x_D.double())
        hidden = [float(u) * float(g) / (1 + math.exp(-g)) for g, u in zip(gate, up, strict=True)]
        expected_D = linear("down", torch.tensor(hidden, dtype=torch.float64))
        torch.testing.assert_close(found_D.double(), expected_D, rtol=1e-4, atol=1e-4)


def count(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def test_three_matrices_cost_as_much_as_two() -> None:
    """Guards the default width: 2/3 of 4 d, so that 3 matrices hold what 2 of 4 d did: 8 d^2."""
    cfg, before = swiglu_rmsnorm.Config(), mla.Config(bias=False)
    assert cfg.d_ff * 3 == before.d_ff * 2 == 4 * cfg.d_model * 2
    gated, plain = swiglu_rmsnorm.MLP(cfg, cfg.d_ff), mla.MLP(before, before.d_ff)
    assert count(gated) == count(plain) == 8 * cfg.d_model**2
    shapes = {name: tuple(p.shape) for name, p in gated.named_parameters()}
    assert shapes == {
        "gate_proj.weight": (2048, 768),
        "up_proj.weight": (2048, 768),
        "down_proj.weight": (768, 2048),
    }


def test_a_norm_is_one_vector_and_nothing_has_a_bias() -> None:
    """Guards the parameters by name: LayerNorm's shift is gone, and every linear layer's bias."""
    latent = swiglu_rmsnorm.Config(vocab_size=50, n_layers=2, d_model=24, d_ff=16)
    for cfg in (latent, dataclasses.replace(latent, d_latent=None)):
        named = dict(swiglu_rmsnorm.Transformer(cfg).named_parameters())
        assert not [name for name in named if not name.endswith(".weight")]
        norms = {name for name in named if "norm" in name}
        assert {tuple(named[name].shape) for name in norms} <= {(24,), (256,), (384,)}
        per_block = 4 if cfg.d_latent else 2
        assert len(norms) == 2 * per_block + 1


def test_initial_weights() -> None:
    """Guards init_weights on the gate, too: measured spread of every matrix; norms are one."""
    cfg = swiglu_rmsnorm.Config(
        vocab_size=300, n_layers=8, d_model=64, n_heads=8, head_dim=16, d_latent=None, d_ff=170
    )
    for name, param in swiglu_rmsnorm.Transformer(cfg).named_parameters():
        if "norm" in name:
            assert (param == 1).all(), name
        else:
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * 8) if into_stream else 0.02
            error = 1 / math.sqrt(2 * param.numel())  # standard error of a measured std, relative
            assert float(param.detach().std()) == pytest.approx(std, rel=5 * error), name


# ---- generation and the demo


@pytest.fixture(scope="module", params=["Llama", "DeepSeek"])
def lively(request: pytest.FixtureRequest) -> tuple[nn.Module, PreTrainedModel]:
    """Ours and transformers', so large that greedy texts vary."""
    config = CASES["Mistral"] if request.param == "Llama" else LATENT["V3"]
    hf = reference(config, seed=1, scale=4.0)
    return ours(hf), hf


def test_generate_equals_transformers(lively: tuple[nn.Module, PreTrainedModel]) -> None:
    """Guards greedy generation, and that the cache is used: one token a step after the prompt."""
    equals_generate(swiglu_rmsnorm, *lively)


def test_generate_padded_batch(lively: tuple[nn.Module, PreTrainedModel]) -> None:
    """Guards prompts of unequal length in one batch."""
    same_alone_and_padded(swiglu_rmsnorm, lively[0])


def test_generate_goes_on(lively: tuple[nn.Module, PreTrainedModel]) -> None:
    """Guards a cache that is handed from one call to the next."""
    goes_on(swiglu_rmsnorm, lively[0])


@dataclasses.dataclass(frozen=True)
class Small(swiglu_rmsnorm.Config):
    """A demo that takes no time."""

    vocab_size: int = 256
    n_layers: int = 2


def test_demo_prints_what_the_gate_costs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the demo's numbers: both MLPs as large, and a mean that the norm keeps."""
    monkeypatch.setattr(sys, "argv", ["swiglu_rmsnorm.py", "--n-new", "2"])
    monkeypatch.setattr(swiglu_rmsnorm, "Config", Small)
    swiglu_rmsnorm.main()
    out = capsys.readouterr().out
    n_two, n_three = re.findall(r"([\d,]+) parameters; of three: ([\d,]+)", out)[0]
    assert n_two == n_three == f"{8 * 768**2:,}"
    assert f"the cache takes {2 * 4 * (256 + 32):,} bytes a token" in out
    # numbers around 10 with a spread of 1: a mean of 10 in a root mean square of sqrt(101)
    mean = float(re.findall(r"RMSNorm keeps a mean: (\S+)", out)[0])
    assert mean == pytest.approx(10 / math.sqrt(101), abs=0.002)
