"""mixtral.py against transformers' Mixtral, with each of its parts switched on."""

import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from ch06_moe import routers
from ch08_full_models import checkpoint, mixtral
from tests.parity import (
    assert_equal,
    assert_noticed,
    check_mask_by_loops,
    equals_generate,
    errors,
    forward_lengths,
    goes_on,
    mutant,
    same_alone_and_padded,
)
from tests.test_ch08_llama3 import SIZES as LLAMA_SIZES
from tests.test_ch08_llama3 import (
    bfloat16_errors,
    check_first_read_is_exact,
    check_gradients,
    check_growth,
    check_ring,
    masks_built,
    older,
    oldest,
    rope,
)
from tests.test_ch08_qwen3 import from_memory, reference

pytestmark = pytest.mark.usefixtures("one_thread")


SIZES = LLAMA_SIZES | dict(intermediate_size=24, num_local_experts=6)


def make(**changes: object) -> MixtralConfig:
    return MixtralConfig(**SIZES | changes)


CASES = {  # all texts have 40 tokens
    "eight experts": make(num_local_experts=8),
    "six experts": make(),
    "one of six": make(num_experts_per_tok=1),
    "three of six": make(num_experts_per_tok=3),
    "six of six": make(num_experts_per_tok=6),
    "one of one": make(num_local_experts=1, num_experts_per_tok=1),
    "most experts idle": make(num_local_experts=60, intermediate_size=7),
    "one key head": make(num_key_value_heads=1),
    "every head its own keys": make(num_key_value_heads=6),
    "narrow heads": make(head_dim=4),
    "wide heads": make(head_dim=32, hidden_size=36),
    "one layer": make(num_hidden_layers=1),
    "low base": make(rope_parameters=rope(50.0)),
    "large epsilon": make(rms_norm_eps=0.05),
    "a window": make(sliding_window=8),
    "a window one short": make(sliding_window=39),
}


def drawn(seed: int) -> MixtralConfig:
    """A config drawn from what this family can be."""
    rng = random.Random(seed)
    n_kv_heads, n_experts = rng.randint(1, 3), rng.randint(1, 9)
    return make(
        vocab_size=rng.randint(20, 200),
        hidden_size=rng.randint(8, 60),
        intermediate_size=rng.randint(3, 60),
        num_hidden_layers=rng.randint(1, 4),
        num_attention_heads=n_kv_heads * rng.randint(1, 4),
        num_key_value_heads=n_kv_heads,
        head_dim=2 * rng.randint(2, 10),
        num_local_experts=n_experts,
        num_experts_per_tok=rng.randint(1, n_experts),
        rms_norm_eps=rng.choice([1e-5, 1e-2]),
        rope_parameters=rope(rng.choice([100.0, 1e4, 1e6])),
        sliding_window=rng.choice([None, None, rng.randint(1, 24)]),
    )


CASES |= {f"drawn {seed}": drawn(seed) for seed in range(20)}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """Guards the forward pass: whole, with the cache, in chunks, padded; from one file or many."""
    hf = reference(CASES[name])
    many = len(name) % 2 == 0
    hf.save_pretrained(tmp_path, max_shard_size="20KB" if many else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == many
    model = mixtral.load_folder(tmp_path)
    assert_equal(model, hf)
    same, state = from_memory(mixtral, hf), model.state_dict()
    assert same.cfg == model.cfg
    for key, tensor in same.state_dict().items():
        assert torch.equal(tensor, state[key]), key


OFF = {  # a part and what it is when it does nothing
    "rotary base": ("low base", dict(rope_theta=1e6)),
    "epsilon": ("large epsilon", dict(norm_eps=1e-5)),
    "window": ("a window", dict(windows=(None,))),
    "window one short": ("a window one short", dict(windows=(40,))),
    "two of six": ("six experts", dict(n_active=1)),
    "one of six": ("one of six", dict(n_active=2)),
    "six of six": ("six of six", dict(n_active=5)),
}


@pytest.mark.parametrize("part", OFF)
def test_parts_are_switched_on(part: str) -> None:
    """Guards the cases above: without the part the logits are others."""
    name, off = OFF[part]
    hf = reference(CASES[name])
    model = from_memory(mixtral, hf)
    without = mixtral.Transformer(dataclasses.replace(model.cfg, **off)).eval()
    without.load_state_dict(model.state_dict())
    assert next(errors(without, hf))[1] > 1e-3


# ---- mistakes

PLAIN, WINDOW, FUSED = "plain", "window", "fused"
SPOILT = {
    PLAIN: make(num_experts_per_tok=3, rms_norm_eps=0.01, head_dim=12, rope_parameters=rope(100.0)),
    WINDOW: make(sliding_window=8),
    FUSED: make(),
}
MUTANTS = {
    "weights of a softmax over all": (
        PLAIN,
        "logit_NA, expert_NA = self.router(x_ND).topk( -> "
        "logit_NA, expert_NA = self.router(x_ND).log_softmax(dim=-1).topk(",
        "logit_NA.softmax(dim=-1, dtype=torch.float32) -> logit_NA.exp()",
    ),
    "softmax over the tokens": (PLAIN, "logit_NA.softmax(dim=-1 -> logit_NA.softmax(dim=0"),
    "sigmoid for softmax": (PLAIN, "logit_NA.softmax(dim=-1, dtype=torch.float32) -> "
                                   "logit_NA.sigmoid()"),
    "weights lost": (PLAIN, "y_MD * weight_NA.flatten()[order_M, None] -> y_MD"),
    "weights of other tokens": (PLAIN, "weight_NA.flatten()[order_M, None] -> "
                                       "weight_NA.flatten()[:, None]"),
    "results to other tokens": (PLAIN, "order_M // self.n_active -> order_M % len(x_ND)"),
    "results not added up": (PLAIN, "y_ND.index_add( -> y_ND.index_copy("),
    "one expert too few": (PLAIN, '=hf["num_experts_per_tok"] -> =hf["num_experts_per_tok"] - 1'),
    "one expert too many": (PLAIN, '=hf["num_experts_per_tok"] -> =hf["num_experts_per_tok"] + 1'),
    "always two experts": (PLAIN, '=hf["num_experts_per_tok"] -> =2'),
    "gate and up exchanged": (
        PLAIN, ".{}.w1.weight -> .{}.w0.weight", ".{}.w3.weight -> .{}.w1.weight",
        ".{}.w0.weight -> .{}.w3.weight",
    ),
    "fused: gate and up exchanged": (FUSED, "gate, up = w.chunk -> up, gate = w.chunk"),
    "fused: rows in turn": (FUSED, "w.chunk(2, dim=1) -> w[:, ::2], w[:, 1::2]"),
    "fused: experts reversed": (FUSED, 'parts = {"w2": w} -> parts = {"w2": w.flip(0)}'),
    "no epsilon": (PLAIN, "mean_square + self.eps -> mean_square"),
    "epsilon of another family": (PLAIN, 'norm_eps=hf["rms_norm_eps"] -> norm_eps=1e-6'),
    "keys repeated in turn": (
        PLAIN,
        "k_BSJK.transpose(1, 2), -> k_BSJK.transpose(1, 2).repeat(1, 3, 1, 1),",
        "v_BSJK.transpose(1, 2), -> v_BSJK.transpose(1, 2).repeat(1, 3, 1, 1),",
    ),
    "rotary base": (PLAIN, "rope_theta=theta -> rope_theta=1e6"),
    "rotary pairs side by side": (
        PLAIN, "x_BTHK.chunk(2, dim=-1) -> x_BTHK[..., ::2], x_BTHK[..., 1::2]",
    ),
    "queries not turned": (PLAIN, "q_BTHK = rope(q_BTHK, turn) -> pass"),
    "scale of the width": (PLAIN, "self.head_dim**-0.5 -> (x_BTD.shape[-1] / 6) ** -0.5"),
    "norm before the experts lost": (PLAIN, "self.mlp(self.mlp_norm(x_BTD)) -> self.mlp(x_BTD)"),
    "head is the embedding": (PLAIN, "return self.head(x_BTD[:, -1:] if last_only else x_BTD) -> "
                                     "return (x_BTD[:, -1:] if last_only else x_BTD)"
                                     " @ self.embed.weight.T"),
    "window ignored": (WINDOW, 'windows=(hf.get("sliding_window"),) -> windows=(None,)'),
    "window one too wide": (WINDOW, "> q_pos_BT1 - window -> >= q_pos_BT1 - window"),
    "ring one off": (WINDOW, "[:, n_old % self.window] -> [:, (n_old + 1) % self.window]"),
    "padding is seen": (PLAIN, " & ((k_pos_B1S >= 0) | (q_pos_BT1 < 0)) -> "),
    "padding takes positions": (WINDOW, "pos_T - n_pad) -> pos_T - 0 * n_pad)"),
    "positions start again with each call": (PLAIN, "self.n_seen + torch.arange -> torch.arange"),
}  # fmt: skip


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, PreTrainedModel]]:
    """Folders that transformers wrote, and the models in them; they are right as they are."""
    made = {}
    for name, config in SPOILT.items():
        hf = reference(config, scale=2.0)
        made[name] = tmp_path_factory.mktemp(name), hf
        hf.save_pretrained(made[name][0])
        assert_equal(mixtral.load_folder(made[name][0]), hf)
    return made


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str, spoilt: dict[str, tuple[Path, PreTrainedModel]]) -> None:
    """Guards the comparison with transformers: with a mistake in the source it must fail."""
    case, *changes = MUTANTS[name]
    folder, hf = spoilt[case]
    module = mutant(mixtral, *changes)
    model = from_memory(module, hf) if case == FUSED else module.load_folder(folder)
    assert_noticed(model, hf)


# ---- parts


@torch.no_grad()
def test_route_equals_chapter_6s() -> None:
    """Guards the router: choice and weights by the function that chapter 6 tests by itself."""
    layer, x_ND = mixtral.MoE(mixtral.config_from_hf(make().to_dict())), torch.randn(50, 48)
    nn.init.normal_(layer.router.weight)
    expert_NA, weight_NA = layer.route(x_ND)
    expected = routers.mixtral(layer.router(x_ND), 2)
    assert torch.equal(expert_NA, expected[0])
    torch.testing.assert_close(weight_NA, expected[1])


@torch.no_grad()
def test_router_rounds_as_transformers() -> None:
    """Guards bfloat16: the same choice, also between equal logits, and weights in float32."""
    config = make(num_local_experts=64, num_experts_per_tok=5)
    theirs = MixtralTopKRouter(config).bfloat16()
    nn.init.normal_(theirs.weight, std=0.3)
    layer = mixtral.MoE(mixtral.config_from_hf(config.to_dict())).bfloat16()
    layer.router.load_state_dict(theirs.state_dict())
    x_ND = torch.randn(400, 48).bfloat16()
    logit_NI, expected_NA, chosen_NA = theirs(x_ND)
    top = logit_NI.topk(6).values
    assert (top[:, :-1] == top[:, 1:]).any()  # some of the chosen are equals
    expert_NA, weight_NA = layer.route(x_ND)
    assert torch.equal(expert_NA, chosen_NA)
    assert weight_NA.dtype == expected_NA.dtype == torch.float32
    torch.testing.assert_close(weight_NA, expected_NA, rtol=1e-6, atol=1e-7)


def test_only_the_chosen_experts_are_called() -> None:
    """Guards the cost of a token, and experts that are read from disk when they are called."""
    layer = mixtral.MoE(mixtral.config_from_hf(make(num_local_experts=40).to_dict()))
    calls: list[tuple[int, int]] = []  # expert, tokens
    for i, expert in enumerate(layer.experts):
        expert.register_forward_pre_hook(lambda _, args, i=i: calls.append((i, len(args[0]))))
    x_BTD = torch.randn(2, 3, 48)
    layer(x_BTD)
    n_tokens = layer.route(x_BTD.flatten(0, 1))[0].flatten().bincount().tolist()
    assert calls == [(i, n) for i, n in enumerate(n_tokens) if n]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_ring(window: int | None, padded: bool) -> None:
    """Guards the cache: no token is lost, none is seen that is too old, at any chunk size."""
    check_ring(mixtral, window, padded)


@pytest.mark.parametrize("window", [None, 24])
def test_buffers_double(window: int | None) -> None:
    """Guards the cost of a token, and the memory of a layer with a window."""
    check_growth(mixtral, window)


def test_first_read_is_exact() -> None:
    """Guards the memory of a long prompt."""
    check_first_read_is_exact(mixtral)


def test_causal_mask_by_loops() -> None:
    """Guards who sees whom."""
    check_mask_by_loops(mixtral)


def test_masks_are_built_only_where_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards speed and memory: no mask larger than new x seen, and none that would be all true."""
    model = mixtral.Transformer(mixtral.config_from_hf(make(num_hidden_layers=1).to_dict()))
    tokens_BT = torch.zeros(3, 40, dtype=torch.long)

    def built(cache: list, n: int) -> list:
        return masks_built(mixtral, monkeypatch, lambda: model(tokens_BT[:, :n], cache))

    cache = model.new_cache()
    assert built(cache, 30) == []
    assert built(cache, 1) == []
    assert built(cache, 5) == [((3, 5, 36), None)]
    assert built(model.new_cache(torch.tensor([0, 3, 9])), 12) == [((3, 12, 12), None)]


def test_bfloat16_is_as_good_as_transformers(tmp_path: Path) -> None:
    """Guards the rounding in bfloat16: an error of 4 %, and at most 1.5 times transformers'."""
    configs = [make(), make(num_experts_per_tok=3), make(num_local_experts=8), make(head_dim=16)]
    ours, theirs = bfloat16_errors(mixtral, configs, tmp_path)
    assert ours < 0.04
    assert ours < 1.5 * theirs


def test_gradients_equal_transformers() -> None:
    """Guards training: the router and every expert."""
    hf = reference(make())
    check_gradients(mixtral, from_memory(mixtral, hf), hf)


def test_initial_weights() -> None:
    """Guards init_weights: spread of every matrix, and the norm weights."""
    cfg = mixtral.config_from_hf(make(hidden_size=64, num_hidden_layers=8).to_dict())
    for name, param in mixtral.Transformer(cfg).named_parameters():
        if "norm" in name:
            assert (param == 1).all(), name
        else:
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * 8) if into_stream else 0.02
            error = 1 / math.sqrt(2 * param.numel())
            assert float(param.detach().std()) == pytest.approx(std, rel=5 * error), name


# ---- generation


@pytest.fixture(scope="module")
def lively() -> tuple[mixtral.Transformer, PreTrainedModel]:
    """Ours and transformers': a Mixtral with a window, whose greedy texts vary."""
    hf = reference(make(sliding_window=8), scale=3.0)
    return from_memory(mixtral, hf), hf


def test_generate_equals_transformers(lively: tuple[mixtral.Transformer, PreTrainedModel]) -> None:
    """Guards greedy generation, and that the cache is used: one token a step after the prompt."""
    equals_generate(mixtral, *lively)


def test_generate_padded_batch(lively: tuple[mixtral.Transformer, PreTrainedModel]) -> None:
    """Guards prompts of unequal length in one batch."""
    same_alone_and_padded(mixtral, lively[0])


def test_generate_goes_on(lively: tuple[mixtral.Transformer, PreTrainedModel]) -> None:
    """Guards a cache that is handed from one call to the next."""
    goes_on(mixtral, lively[0])


def test_decoding_reads_one_token_a_step() -> None:
    """Guards the cost of a step: in no layer is an old token computed again."""
    model = mixtral.Transformer(mixtral.config_from_hf(make().to_dict()))
    parts = (model, *(b.attn for b in model.blocks), *(b.mlp for b in model.blocks))
    read = [forward_lengths(part) for part in parts]
    list(mixtral.generate(model, torch.zeros(1, 20, dtype=torch.long), 15))
    assert read == [[20] + [1] * 14] * 7


# ---- loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A folder that transformers wrote, and the model in it."""
    folder = tmp_path_factory.mktemp("saved")
    hf = reference(make())
    hf.save_pretrained(folder)
    return folder, hf


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_by_checkpoint(
    dtype: torch.dtype,
    is_fused: bool,
    saved: tuple[Path, PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards a model laid out without memory and then filled, from either form of the experts."""
    folder, hf = saved
    monkeypatch.setitem(checkpoint.FAMILIES, "mixtral", "ch08_full_models.mixtral")
    state = hf.state_dict() if is_fused else load_file(folder / "model.safetensors")
    assert any("gate_up_proj" in name for name in state) == is_fused
    assert any("block_sparse_moe" in name for name in state) != is_fused
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    state = {k: w.clone() for k, w in state.items()} | rotary
    save_file(state, tmp_path / "model.safetensors")
    tmp_path.joinpath("config.json").write_bytes(folder.joinpath("config.json").read_bytes())
    model, _ = checkpoint.load(tmp_path, dtype=dtype, device="cpu")
    expected = mixtral.load_folder(folder).to(dtype).state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("shape", [(6, 24), (6, 47, 48), (6, 48, 47), (5, 48, 48), (7, 48, 48)])
def test_fused_tensor_of_a_wrong_shape(
    shape: tuple[int, ...], saved: tuple[Path, PreTrainedModel]
) -> None:
    """Guards the split: no shape is accepted that is not the model's."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    state = saved[1].state_dict()
    assert state[name].shape == (6, 48, 48)
    model = mixtral.load_folder(saved[0])
    with pytest.raises((KeyError, ValueError), match=r"model\.layers\.0\.\w+\.experts"):
        mixtral.load_weights(model, state | {name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.embed_tokens.weight", "embed.weight"),
        ("lm_head.weight", "head.weight"),
        ("model.layers.1.self_attn.k_proj.weight", "blocks.1.attn.k_proj.weight"),
        ("model.layers.2.post_attention_layernorm.weight", "blocks.2.mlp_norm.weight"),
        ("model.layers.0.block_sparse_moe.gate.weight", "blocks.0.mlp.router.weight"),
        (
            "model.layers.2.block_sparse_moe.experts.5.w3.weight",
            "blocks.2.mlp.experts.5.up_proj.weight",
        ),
        (
            "model.layers.0.block_sparse_moe.experts.1.w2.weight",
            "blocks.0.mlp.experts.1.down_proj.weight",
        ),
    ],
)
def test_each_tensor_must_find_its_partner(
    theirs: str, ours: str, saved: tuple[Path, PreTrainedModel]
) -> None:
    """Guards strict loading: missing, left over, misshapen; both names and shapes are said."""
    folder = saved[0]
    state = load_file(folder / "model.safetensors")
    model = mixtral.load_folder(folder)
    with pytest.raises(KeyError) as error:
        mixtral.load_weights(model, {name: w for name, w in state.items() if name != theirs})
    assert theirs in str(error.value) and ours in str(error.value)
    extra = f"model.extra.{theirs}"
    with pytest.raises(KeyError, match=extra):
        mixtral.load_weights(model, state | {extra: state[theirs]})
    wrong = torch.zeros(1, *state[theirs].shape[1:])  # a plain copy would broadcast it
    with pytest.raises(ValueError) as error:
        mixtral.load_weights(model, state | {theirs: wrong})
    for part in (theirs, ours, str(tuple(wrong.shape)), str(tuple(state[theirs].shape))):
        assert part in str(error.value)


# ---- config.json

PUBLISHED = dict(  # mistralai/Mixtral-8x7B-v0.1
    model_type="mixtral",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    hidden_act="silu",
    max_position_embeddings=32768,
    rms_norm_eps=1e-05,
    rope_theta=1000000.0,
    sliding_window=None,
    num_local_experts=8,
    num_experts_per_tok=2,
    tie_word_embeddings=False,
)


def test_published_model() -> None:
    """Guards the published config, without its bytes: parameters, names, shapes and defaults."""
    with torch.device("meta"):
        model = mixtral.Transformer(mixtral.config_from_hf(PUBLISHED))
        hf = AutoModelForCausalLM.from_config(MixtralConfig(**PUBLISHED))
    n_params = sum(p.numel() for p in model.parameters())
    assert n_params == sum(p.numel() for p in hf.parameters()) == 46_702_792_704
    assert n_params - 32 * (8 - 2) * 3 * 14336 * 4096 == 12_879_925_248  # those a token uses
    mixtral.load_weights(model, hf.state_dict())
    assert model.cfg == mixtral.Config()
    assert mixtral.config_from_hf(MixtralConfig(**PUBLISHED).to_dict()) == model.cfg


def silent(config: dict) -> dict:
    """Without the keys that only say what their absence says."""
    config = older(config)
    absent = {
        "rope_theta": 1_000_000.0,
        "rope_scaling": None,
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": None,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "sliding_window": None,
    }
    return {k: v for k, v in config.items() if k not in absent or v != absent[k]}


@pytest.mark.parametrize("edit", [older, oldest, silent])
@pytest.mark.parametrize("name", CASES)
def test_older_configs(name: str, edit: Callable[[dict], dict], tmp_path: Path) -> None:
    """Guards config.json as older versions wrote it: it gives the same Config."""
    CASES[name].save_pretrained(tmp_path)
    today = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "rope_parameters" in today
    old = edit(json.loads(json.dumps(today)))
    assert "rope_parameters" not in old
    assert mixtral.config_from_hf(old) == mixtral.config_from_hf(today)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings.*True"),
        ({"rope_parameters": rope(rope_type="yarn", factor=4.0)}, "rope_scaling.*yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_scaling.*dynamic"),
    ],
)
def test_config_that_cannot_be_run(change: dict, said: str) -> None:
    """Guards against running a variant as if it were Mixtral: the key and its value are said."""
    with pytest.raises(ValueError, match=said):
        mixtral.config_from_hf(make().to_dict() | change)


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_local_experts",
        "num_experts_per_tok",
        "rms_norm_eps",
    ],
)
def test_config_without_a_key(key: str) -> None:
    """Guards against guessing a size."""
    config = make().to_dict()
    del config[key]
    with pytest.raises(KeyError, match=key):
        mixtral.config_from_hf(config)
