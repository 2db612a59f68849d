"""llama4.py against transformers' Llama 4, with each of its parts switched on."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    PreTrainedModel,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ch08_full_models import llama3, llama4
from tests.parity import (
    TOLERANCE,
    assert_equal,
    assert_noticed,
    brute_force_attention,
    equals_generate,
    errors,
    forward_lengths,
    goes_on,
    mutant,
    reference,
    same_alone_and_padded,
)
from tests.test_ch08_llama3 import (
    LLAMA3,
    NO_ENDS,
    STRETCHED,
    bfloat16_errors,
    check_first_read_is_exact,
    check_gradients,
    check_growth,
    in_bfloat16,
    masks_built,
    older,
    oldest,
    rope,
)

pytestmark = pytest.mark.usefixtures("one_thread")


SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=40,
    intermediate_size_mlp=56,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    num_local_experts=4,
    attention_chunk_size=8,  # all texts have 40 tokens
    floor_scale=3,
    attn_scale=0.5,
    **NO_ENDS,
)
BLENDED = rope(1000.0, **LLAMA3, original_max_position_embeddings=32)
ABRUPT = BLENDED | {"factor": 16.0, "high_freq_factor": 1.0}  # the instruct model's: no blend


def scout(**changes: object) -> Llama4TextConfig:
    return Llama4TextConfig(**SIZES | dict(rope_parameters=BLENDED) | changes)


def maverick(**changes: object) -> Llama4TextConfig:
    other = dict(interleave_moe_layer_step=2, use_qk_norm=False, num_local_experts=7)
    return Llama4TextConfig(**SIZES | other | changes)


CASES = {
    "Scout": scout(),
    "Scout, instruct": scout(rope_parameters=ABRUPT),
    "Scout, not scaled": scout(rope_parameters=rope()),
    "Scout, one layer": scout(num_hidden_layers=1),
    "Scout, ends on a layer that sees everything": scout(num_hidden_layers=4),
    "Scout, one key head": scout(num_key_value_heads=1),
    "Scout, every head its own keys": scout(num_key_value_heads=6),
    "Scout, narrow heads": scout(head_dim=4, rope_parameters=rope(50.0)),
    "Scout, large epsilon": scout(rms_norm_eps=0.05),
    "Scout, no norm": scout(use_qk_norm=False),
    "Scout, queries do not grow": scout(attn_temperature_tuning=False),
    "Scout, queries grow with each token": scout(floor_scale=1),
    "Scout, chunks of one": scout(attention_chunk_size=1),
    "Scout, chunks one short": scout(attention_chunk_size=39),
    "Scout, chunk of the text": scout(attention_chunk_size=40),
    "Scout, one expert": scout(num_local_experts=1),
    "Scout, two experts a token": scout(num_experts_per_tok=2),
    "Scout, square matrices": scout(intermediate_size=48),
    "Maverick": maverick(),
    "Maverick, normed": maverick(use_qk_norm=True),
    "Maverick, scaled": maverick(rope_parameters=STRETCHED),
    "Maverick, experts in one layer": maverick(moe_layers=[1]),
    "Maverick, without experts": maverick(moe_layers=[]),
    "Maverick, no layer with chunks": maverick(no_rope_layers=[0] * 5),
    "Maverick, layers in another order": maverick(no_rope_layers=[0, 1, 1, 0, 1]),
}


def drawn(seed: int) -> Llama4TextConfig:
    """A config drawn from what this family can be, with several parts switched on."""
    rng = random.Random(seed)
    n_kv_heads, groups = rng.randint(1, 3), rng.randint(1, 4)
    n_heads, n_layers = n_kv_heads * groups, rng.randint(2, 6)
    n_experts = rng.randint(2, 6)
    changes = dict(
        vocab_size=rng.randint(20, 200),
        hidden_size=n_heads * rng.randint(3, 12),
        intermediate_size=rng.randint(10, 80),
        intermediate_size_mlp=rng.randint(10, 120),
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=2 * rng.randint(2, 10),
        rms_norm_eps=rng.choice([1e-6, 1e-5, 1e-2]),
        num_local_experts=n_experts,
        num_experts_per_tok=rng.choice([1, 1, 1, 2]),
        interleave_moe_layer_step=rng.choice([1, 2, 3]),
        no_rope_layer_interval=rng.randint(2, 4),
        attention_chunk_size=rng.randint(1, 20),
        floor_scale=rng.randint(1, 12),
        attn_scale=rng.choice([0.1, 0.5]),
        attn_temperature_tuning=rng.random() < 0.8,
        use_qk_norm=rng.random() < 0.6,
        rope_parameters=rng.choice([rope(100.0), rope(5e5), BLENDED, ABRUPT]),
    )
    if rng.random() < 0.3:
        changes["no_rope_layers"] = [rng.randint(0, 1) for _ in range(n_layers)]
    if rng.random() < 0.3:
        changes["moe_layers"] = [i for i in range(n_layers) if rng.random() < 0.5]
    return Llama4TextConfig(**SIZES | changes)


CASES |= {f"drawn {seed}": drawn(seed) for seed in range(20)}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """Guards the forward pass: whole, with the cache, in chunks, padded; from one file or many."""
    hf = reference(CASES[name], scale=2.0)
    many = len(name) % 2 == 0
    hf.save_pretrained(tmp_path, max_shard_size="20KB" if many else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == many
    assert_equal(llama4.load_folder(tmp_path), hf)


OFF = {  # a part and what it is when it does nothing
    "chunks": ("Scout", dict(chunks=(40,) * 3 + (None,))),
    "chunks one short": ("Scout, chunks one short", dict(chunks=(40,) * 3 + (None,))),
    "layer that sees everything": ("Maverick", dict(chunks=(8,))),
    "layers with chunks": ("Maverick", dict(chunks=(None,))),
    "norm": ("Scout", dict(qk_norm=False)),
    "no norm": ("Maverick", dict(qk_norm=True)),
    "epsilon": ("Scout, large epsilon", dict(norm_eps=1e-5)),
    "growth": ("Scout", dict(query_growth=0.0)),
    "growth of Maverick": ("Maverick", dict(query_growth=0.0)),
    "tokens of growth": ("Scout", dict(growth_len=4)),
    "no growth": ("Scout, queries do not grow", dict(query_growth=0.5)),
    "rotary base": ("Scout, not scaled", dict(rope_theta=500_000.0)),
    "scaling": ("Scout", dict(rope_scaling=None)),
    "abrupt scaling": ("Scout, instruct", dict(rope_scaling=None)),
    "second expert": ("Scout, two experts a token", dict(n_active=1)),
}


@pytest.mark.parametrize("part", OFF)
def test_parts_are_switched_on(part: str, tmp_path: Path) -> None:
    """Guards the cases above: without the part the logits are others."""
    name, off = OFF[part]
    hf = reference(CASES[name], scale=2.0)
    hf.save_pretrained(tmp_path)
    model = llama4.load_folder(tmp_path)
    without = llama4.Transformer(dataclasses.replace(model.cfg, **off))
    llama4.load_weights(without, model.state_dict())
    assert next(errors(without, hf))[1] > 1e-3


def test_every_expert_is_used(tmp_path: Path) -> None:
    """Guards the cases above: experts that get no token would be compared with nothing."""
    hf = reference(CASES["Maverick"], scale=2.0)
    hf.save_pretrained(tmp_path)
    model = llama4.load_folder(tmp_path)
    assert [isinstance(block.mlp, llama4.MoE) for block in model.blocks] == [False, True] * 2 + [
        False
    ]
    read = [forward_lengths(expert) for expert in model.blocks[1].mlp.experts]
    with torch.no_grad():
        model(torch.randint(97, (3, 40)))
    assert len(read) == 7 and all(read)


@pytest.mark.parametrize("name", ["Scout", "Maverick"])
def test_names_in_memory(name: str) -> None:
    """Guards the names and shapes of transformers' live model."""
    hf = reference(CASES[name], scale=2.0)
    model = llama4.Transformer(llama4.config_from_hf(hf.config.to_dict()))
    llama4.load_weights(model, hf.state_dict())
    assert_equal(model, hf)


def test_positions_beyond_4096(tmp_path: Path) -> None:
    """Guards the angles and the growth far out, and a ring that has gone round many times."""
    config = scout(
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_size=16,
        intermediate_size=24,
        head_dim=8,
        no_rope_layers=[1, 0],
        max_position_embeddings=8192,
        attention_chunk_size=30,
        floor_scale=512,
    )
    hf = reference(config)
    hf.save_pretrained(tmp_path)
    model = llama4.load_folder(tmp_path)
    tokens_1T = torch.randint(97, (1, 4200))
    with torch.no_grad():
        expected_1TV = hf(tokens_1T, use_cache=False).logits
        cache = model.new_cache()
        found_1TV = torch.cat([model(t, cache) for t in tokens_1T.split([4000, 1, 190, 9], 1)], 1)
    assert (found_1TV - expected_1TV).abs().max() < TOLERANCE * expected_1TV.abs().max()


# ---- config.json as others write it


def silent(config: dict) -> dict:
    """Without the keys that only say what their absence says."""
    config = older(config)
    n_layers, step = config["num_hidden_layers"], config["interleave_moe_layer_step"]
    turns = [int((i + 1) % config["no_rope_layer_interval"] != 0) for i in range(n_layers)]
    if config["no_rope_layers"] == turns:
        config["no_rope_layers"] = []  # some copies have it so
    if config["moe_layers"] == [i for i in range(n_layers) if (i + 1) % step == 0]:
        del config["moe_layers"]
    absent = {
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "no_rope_layer_interval": 4,
        "rope_theta": 500_000.0,
        "rope_scaling": None,
        "layer_types": config["layer_types"],
    }
    return {k: v for k, v in config.items() if k not in absent or v != absent[k]}


def truthy(config: dict) -> dict:
    """As the first files were: a number for true."""
    config = older(config)
    config["attn_temperature_tuning"] = 4 if config["attn_temperature_tuning"] else 0
    return config


@pytest.mark.parametrize("edit", [older, oldest, silent, truthy])
@pytest.mark.parametrize("name", CASES)
def test_older_configs(name: str, edit: Callable[[dict], dict], tmp_path: Path) -> None:
    """Guards config.json as older versions wrote it: it gives the same Config."""
    CASES[name].save_pretrained(tmp_path)
    today = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "rope_parameters" in today
    old = edit(json.loads(json.dumps(today)))
    assert "rope_parameters" not in old
    assert llama4.config_from_hf(old) == llama4.config_from_hf(today)
    multimodal = {"model_type": "llama4", "text_config": old, "vision_config": {}}
    assert llama4.config_from_hf(multimodal) == llama4.config_from_hf(today)


# The text parts of published files; the first is a whole text_config, as it was dumped.
PUBLISHED_SCOUT = dict(
    model_type="llama4_text",
    vocab_size=202048,
    hidden_size=5120,
    intermediate_size=8192,
    intermediate_size_mlp=16384,
    num_hidden_layers=48,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    hidden_act="silu",
    max_position_embeddings=262144,
    rms_norm_eps=1e-05,
    rope_theta=500_000.0,
    rope_scaling={
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    num_local_experts=16,
    num_experts_per_tok=1,
    interleave_moe_layer_step=1,
    attention_chunk_size=8192,
    use_qk_norm=True,
    attn_temperature_tuning=4,
    floor_scale=8192,
    attn_scale=0.1,
    attention_bias=False,
    bos_token_id=200000,
    eos_token_id=[200001, 200007, 200008],
    pad_token_id=200018,
    no_rope_layers=[1, 1, 1, 0] * 12,
    moe_layers=list(range(48)),
    cache_implementation="hybrid",
    for_llm_compressor=False,
    router_aux_loss_coef=0.001,
    router_jitter_noise=0.0,
)
PUBLISHED = {
    "Scout": (PUBLISHED_SCOUT, 107_769_861_120),
    "Scout, instruct": (
        PUBLISHED_SCOUT
        | dict(
            max_position_embeddings=10_485_760,
            rope_scaling=PUBLISHED_SCOUT["rope_scaling"]
            | {"factor": 16.0, "high_freq_factor": 1.0},
            no_rope_layers=[],
            attn_temperature_tuning=True,
        ),
        107_769_861_120,
    ),
    "Maverick": (
        PUBLISHED_SCOUT
        | dict(
            max_position_embeddings=1_048_576,
            rope_scaling=None,
            num_local_experts=128,
            interleave_moe_layer_step=2,
            use_qk_norm=False,
            no_rope_layers=[],
            moe_layers=list(range(1, 48, 2)),
        ),
        400_711_848_960,
    ),
}


@pytest.mark.parametrize("name", ["Scout", "Maverick"])
def test_published_models(name: str) -> None:
    """Guards the published configs, without their bytes: parameters, names and shapes."""
    published, n_params = PUBLISHED[name]
    hf_config = Llama4TextConfig(**published | dict(attn_temperature_tuning=True))
    whole = {"model_type": "llama4", "tie_word_embeddings": False, "text_config": published}
    with torch.device("meta"):
        model = llama4.Transformer(llama4.config_from_hf(whole))
        hf = AutoModelForCausalLM.from_config(hf_config)
    assert sum(p.numel() for p in model.parameters()) == n_params
    assert sum(p.numel() for p in hf.parameters()) == n_params
    llama4.load_weights(model, hf.state_dict())
    assert llama4.config_from_hf(hf_config.to_dict()) == model.cfg  # with every key there is


def test_defaults_are_scout() -> None:
    """Guards Config's defaults against the published file's values."""
    cfg = llama4.config_from_hf(PUBLISHED_SCOUT)
    assert cfg.chunks == cfg.chunks[:4] * 12
    assert cfg.sparse == (True,) * 48
    assert dataclasses.replace(cfg, chunks=cfg.chunks[:4], sparse=(True,)) == llama4.Config()


def test_maverick_is_every_other_layer() -> None:
    """Guards what the comments in Config say of Maverick."""
    cfg = llama4.config_from_hf(PUBLISHED["Maverick"][0])
    assert cfg.sparse == (False, True) * 24
    assert not cfg.qk_norm and cfg.rope_scaling is None and cfg.n_experts == 128


@pytest.mark.parametrize("name", ["Scout", "Scout, instruct"])
def test_frequencies_of_published_models(name: str) -> None:
    """Guards Llama 3's scaling with these numbers: 16 has no band in between, 0 / 0 must not be."""
    published = PUBLISHED[name][0]
    cfg = llama4.config_from_hf(published)
    freq_P = llama4.rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    config = Llama4TextConfig(**published | dict(attn_temperature_tuning=True))
    theirs_P, factor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert factor == 1.0
    torch.testing.assert_close(freq_P, theirs_P, rtol=1e-6, atol=0)
    plain_P = llama4.rope_frequencies(cfg.head_dim, cfg.rope_theta, None)
    between_P = (freq_P > 1.01 * plain_P / cfg.rope_scaling.factor) & (freq_P < 0.99 * plain_P)
    assert bool(between_P.any()) == (name == "Scout")
    assert float(freq_P[-1]) == pytest.approx(float(plain_P[-1]) / cfg.rope_scaling.factor)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
        ({"attention_bias": True}, "attention_bias.*True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings.*True"),
        ({"attention_chunk_size": None}, "attention_chunk_size.*None"),
        ({"layer_types": ["full_attention"] * 5}, "layer_types.*full_attention"),
        ({"rope_parameters": rope(rope_type="yarn", factor=4.0)}, "rope_scaling.*yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_scaling.*dynamic"),
    ],
)
def test_config_that_cannot_be_run(change: dict, said: str) -> None:
    """Guards against running a variant as if it were Llama 4: the key and its value are said."""
    for config in (scout().to_dict(), {"model_type": "llama4", "text_config": scout().to_dict()}):
        config.get("text_config", config).update(change)
        with pytest.raises(ValueError, match=said):
            llama4.config_from_hf(config)


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "intermediate_size_mlp",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_local_experts",
        "num_experts_per_tok",
        "attention_chunk_size",
        "floor_scale",
        "attn_scale",
        "attn_temperature_tuning",
        "use_qk_norm",
        "rms_norm_eps",
    ],
)
def test_config_without_a_key(key: str) -> None:
    """Guards against guessing."""
    config = scout().to_dict()
    del config[key]
    with pytest.raises(KeyError, match=key):
        llama4.config_from_hf(config)


def test_config_without_the_layers_that_have_experts() -> None:
    """Guards against guessing them: one of two keys must say."""
    config = scout().to_dict()
    del config["moe_layers"], config["interleave_moe_layer_step"]
    with pytest.raises(KeyError, match="interleave_moe_layer_step"):
        llama4.config_from_hf(config)


# ---- mistakes

SCOUT, MAVERICK, SQUARE, OLD = "Scout", "Maverick", "square matrices", "old config"
SPOILT = {
    SCOUT: scout(rms_norm_eps=0.05),
    MAVERICK: maverick(),
    SQUARE: scout(intermediate_size=48, num_hidden_layers=2),
    OLD: scout(rope_parameters=rope(500_000.0)),
}
IN_CHUNK = "k_pos_B1S // chunk == q_pos_BT1 // chunk"
STEP = "n = self.window if self.n_pad_B is not None else n_old % self.window + 1"
GROWN = "grow(q_BTHK, pos_BT, self.query_growth, self.growth_len)"
Q_TURNED, K_TURNED = "self.qk_norm(rope(q_BTHK, turn))", "self.qk_norm(rope(k_BTJK, turn))"
PAIRS = "x_BTHK.unflatten(-1, (-1, 2)).unbind(dim=-1)"
INPUT, SHARED = "x_ND[token_M] * weight_NA.flatten()[order_M, None]", "y_ND = self.shared(x_ND)"
SIGMOID = "logit_NA.float().sigmoid()"
HALVES, VIEW = "w.chunk(len(fused[kind]), dim=-1)", "out[name] = expert.mT"
IN_TURN = "[w[..., i :: len(fused[kind])] for i in range(len(fused[kind]))]"
HEAD = "self.head(x_BTD[:, -1:] if last_only else x_BTD)"
MUTANTS = {
    "sliding window": (SCOUT, f"{IN_CHUNK} -> k_pos_B1S > q_pos_BT1 - chunk"),
    "sliding window in Maverick": (MAVERICK, f"{IN_CHUNK} -> k_pos_B1S > q_pos_BT1 - chunk"),
    "everything is seen": (SCOUT, "mask_BTS if chunk is None -> mask_BTS if True"),
    "chunks begin one late": (
        SCOUT,
        f"{IN_CHUNK} -> (k_pos_B1S - 1) // chunk == (q_pos_BT1 - 1) // chunk",
    ),
    "chunks count padding": (
        SCOUT,
        f"{IN_CHUNK} -> (k_pos_B1S - k_pos_B1S[..., :1]) // chunk == "
        "(q_pos_BT1 - k_pos_B1S[..., :1]) // chunk",
    ),
    "a new token sees the chunk before": (SCOUT, f"{STEP} -> n = self.window"),
    "a new token does not see itself": (SCOUT, f"{STEP} -> n = n_old % self.window"),
    "a new token sees the ring's start": (SCOUT, f"{STEP} -> n = n_old % self.window + 1"),
    "ring one off": (SCOUT, "[:, n_old % self.window] -> [:, (n_old + 1) % self.window]"),
    "ring two too small": (
        SCOUT,
        "slots[:n_old][-self.window :] -> slots[:n_old][-self.window + 2 :]",
    ),
    "ring keeps the oldest": (SCOUT, "= t[:, -self.window :] -> = t[:, : len(kept)]"),
    "padding is seen": (SCOUT, " & ((k_pos_B1S >= 0) | (q_pos_BT1 < 0)) -> "),
    "padding takes positions": (SCOUT, "pos_T - n_pad) -> pos_T - 0 * n_pad)"),
    "positions start again with each call": (SCOUT, "self.n_seen + torch.arange -> torch.arange"),
    "queries do not grow": (SCOUT, f"{GROWN} -> q_BTHK"),
    "growth one token late": (SCOUT, "(pos_BT.clamp(min=0) + 1) -> pos_BT.clamp(min=0)"),
    "growth without steps": (SCOUT, "+ 1) // every -> + 1) / every"),
    "growth one step late": (SCOUT, ".log1p() -> .clamp(min=1).log()"),
    "growth by the base of two": (SCOUT, ".log1p() -> .add(1).log2()"),
    "growth counts padding": (
        SCOUT,
        "grow(q_BTHK, pos_BT, -> grow(q_BTHK, pos_BT - pos_BT[:, :1],",
    ),
    "growth of padding": (SCOUT, "pos_BT.clamp(min=0) -> pos_BT"),
    "growth in every layer": (SCOUT, f"{Q_TURNED} -> {GROWN.replace('q_BTHK', Q_TURNED)}"),
    "keys grow, too": (SCOUT, f"q_BTHK = {GROWN} -> q_BTHK, k_BTJK = {GROWN}, 1.3 * k_BTJK"),
    "queries and keys turned in every layer": (
        SCOUT,
        f"q_BTHK = {GROWN} -> q_BTHK, k_BTJK = {GROWN}, rope(k_BTJK, turn)",
        "grow(q_BTHK, pos_BT, -> grow(rope(q_BTHK, turn), pos_BT,",
    ),
    "queries not turned": (SCOUT, f"{Q_TURNED} -> self.qk_norm(q_BTHK)"),
    "rotary pairs half a head apart": (SCOUT, f"{PAIRS} -> x_BTHK.chunk(2, dim=-1)"),
    "rotary pairs of Maverick": (MAVERICK, f"{PAIRS} -> x_BTHK.chunk(2, dim=-1)"),
    "turned the other way": (SCOUT, "a_BTHP * cos_BT1P - b_BTHP -> a_BTHP * cos_BT1P + b_BTHP"),
    "norm in every layer": (
        SCOUT,
        f"q_BTHK = {GROWN} -> q_BTHK, k_BTJK = {GROWN}, self.qk_norm(k_BTJK)",
        "grow(q_BTHK, pos_BT, -> grow(self.qk_norm(q_BTHK), pos_BT,",
    ),
    "norm in Maverick": (MAVERICK, "unit if cfg.qk_norm else nn.Identity() -> unit"),
    "query norm lost": (SCOUT, f"{Q_TURNED} -> rope(q_BTHK, turn)"),
    "key norm lost": (SCOUT, f"{K_TURNED} -> rope(k_BTJK, turn)"),
    "values normed": (SCOUT, "append(k_BTJK, v_BTJK -> append(k_BTJK, self.qk_norm(v_BTJK)"),
    "norm's own epsilon": (SCOUT, "cfg.norm_eps, elementwise -> 1e-6, elementwise"),
    "norm to a length of one": (SCOUT, f"{K_TURNED} -> F.normalize(rope(k_BTJK, turn), dim=-1)"),
    "scaling lost": (SCOUT, "cfg.rope_theta, cfg.rope_scaling -> cfg.rope_theta, None"),
    "weight on the output": (
        SCOUT,
        f"x_MD = {INPUT} -> x_MD = x_ND[token_M]",
        f"{SHARED} -> y_ND, y_MD = self.shared(x_ND), y_MD * weight_NA.flatten()[order_M, None]",
    ),
    "weight lost": (SCOUT, f"{INPUT} -> x_ND[token_M]"),
    "weights of other tokens": (SCOUT, "weight_NA.flatten()[order_M, -> weight_NA.flatten()[:,"),
    "softmax over all experts": (
        SCOUT,
        f"{SIGMOID} -> self.router(x_ND).softmax(dim=-1).gather(1, expert_NA)",
    ),
    "softmax over the chosen": (SCOUT, f"{SIGMOID} -> logit_NA.float().softmax(dim=-1)"),
    "the worst expert": (SCOUT, "topk(self.n_active, -> topk(self.n_active, largest=False,"),
    "outputs of other tokens": (SCOUT, "index_add(0, token_M, -> index_add(0, token_M.sort()[0],"),
    "no shared expert": (SCOUT, f"{SHARED} -> y_ND = torch.zeros_like(x_ND)"),
    "shared expert weighted": (SCOUT, f"{SHARED} -> y_ND = self.shared(x_ND * weight_NA)"),
    "no routed experts": (MAVERICK, "y_ND.index_add(0, token_M, y_MD.type_as(y_ND)) -> y_ND"),
    "gate and up exchanged": (SCOUT, '("gate_proj", "up_proj") -> ("up_proj", "gate_proj")'),
    "gate and up in turn": (SCOUT, f"{HALVES} -> {IN_TURN}"),
    "experts not transposed": (SQUARE, f"{VIEW} -> out[name] = expert"),
    "down not transposed": (
        SQUARE,
        f'{VIEW} -> out[name] = expert if proj == "down_proj" else expert.mT',
    ),
    "gate and up not transposed": (
        SQUARE,
        f'{VIEW} -> out[name] = expert if proj != "down_proj" else expert.mT',
    ),
    "experts backwards": (SCOUT, "mlp.experts.{i}. -> mlp.experts.{len(part) - 1 - i}."),
    "gate on the wrong matrix": (
        SCOUT,
        "silu(self.gate_proj(x)) * self.up_proj(x) -> silu(self.up_proj(x)) * self.gate_proj(x)",
    ),
    "first layer sees everything": (OLD, "(i + 1) % every for -> i % every for"),
    "every fifth layer sees everything": (OLD, '_layer_interval", 4 -> _layer_interval", 5'),
    "Llama 2's rotary base": (OLD, "500_000.0)) -> 10_000.0))"),
    "norms exchanged": (
        SCOUT,
        "{}.post_attention_layernorm -> {}.exchanged",
        "{}.input_layernorm -> {}.post_attention_layernorm",
        "{}.exchanged -> {}.input_layernorm",
    ),
    "head is the embedding": (SCOUT, f"{HEAD} -> F.linear(x_BTD, self.embed.weight)"),
    "last_only gives the first": (SCOUT, "x_BTD[:, -1:] if -> x_BTD[:, :1] if"),
}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, PreTrainedModel]]:
    """Folders that transformers wrote, and the models in them; they are right as they are."""
    made = {}
    for name, config in SPOILT.items():
        hf = reference(config, scale=2.0)
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        hf.save_pretrained(folder)
        if name == OLD:
            file = folder / "config.json"
            old = silent(json.loads(file.read_text(encoding="utf-8")))
            file.write_text(json.dumps(old), encoding="utf-8")
        made[name] = folder, hf
        assert_equal(llama4.load_folder(folder), hf)
    return made


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str, spoilt: dict[str, tuple[Path, PreTrainedModel]]) -> None:
    """Guards the comparison with transformers: with a mistake in the source it must fail."""
    case, *changes = MUTANTS[name]
    folder, hf = spoilt[case]
    assert_noticed(mutant(llama4, *changes).load_folder(folder), hf)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        (MAVERICK, "sparse = cfg.sparse[layer % -> sparse = not cfg.sparse[layer %"),
        (MAVERICK, "cfg.sparse[layer % -> cfg.sparse[(layer + 1) %"),
        (OLD, "range(step - 1, n_layers, step) -> range(step, n_layers, step)"),
    ],
    ids=["exchanged", "one late", "first layer dense"],
)
def test_layers_with_experts_are_held_by_names(
    case: str, change: str, spoilt: dict[str, tuple[Path, PreTrainedModel]]
) -> None:
    """Guards which layers are dense: the wrong ones do not load."""
    with pytest.raises(KeyError, match="feed_forward"):
        mutant(llama4, change).load_folder(spoilt[case][0])


def test_norm_and_turn_commute(spoilt: dict[str, tuple[Path, PreTrainedModel]]) -> None:
    """Guards what the docstring says: turning changes no length, so the norm may stand before."""
    folder, hf = spoilt[SCOUT]
    before = (
        f"{Q_TURNED} -> rope(self.qk_norm(q_BTHK), turn)",
        f"{K_TURNED} -> rope(self.qk_norm(k_BTJK), turn)",
    )
    assert_equal(mutant(llama4, *before).load_folder(folder), hf)


# ---- parts


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 12, 30])
def test_ring(chunk: int | None, padded: bool) -> None:
    """Guards the cache: attention over what it gives equals brute force over all tokens ever seen.

    It holds no more than a chunk, and gives one new token no more than that token's chunk.
    """
    for seed in range(2):
        rng = random.Random(seed)
        B, H, J, K, n = 2, 4, 2, 3, 30
        q_BTHK = torch.randn(B, n, H, K)
        k_BTJK, v_BTJK = torch.randn(2, B, n, J, K)
        n_pad = [7, 0] if padded else [0, 0]

        def sees(b: int, t: int, s: int) -> bool:
            q, k = t - n_pad[b], s - n_pad[b]  # noqa: B023
            near = chunk is None or q // chunk == k // chunk
            return k <= q and near and (k >= 0 or q < 0)

        expected_BTHK = brute_force_attention(q_BTHK, k_BTJK, v_BTJK, sees, 0.6).float()
        cache = llama4.LayerCache(chunk, torch.tensor(n_pad) if padded else None)
        start = 0
        while start < n:
            n_new = min(rng.choice([1, 1, 1, 2, 3, 9, 14]), n - start)
            part = slice(start, start + n_new)
            pos_BT = cache.positions(torch.zeros(B, n_new, dtype=torch.long))
            k_BSJK, v_BSJK, pos_BS = cache.append(k_BTJK[:, part], v_BTJK[:, part], pos_BT)
            if chunk is not None:
                assert all(buffer.shape[1] <= chunk for buffer in cache.buffers)
                assert k_BSJK.shape[1] <= (chunk if n_new == 1 else chunk + n_new)
                if n_new == 1 and not padded:  # exactly those of its chunk
                    assert k_BSJK.shape[1] == start % chunk + 1
            start += n_new
            for b, p in enumerate(n_pad):  # each token under its own position
                assert torch.equal(k_BSJK[b], k_BTJK[b, pos_BS[b] + p])
                assert torch.equal(v_BSJK[b], v_BTJK[b, pos_BS[b] + p])
            needs_mask = cache.needs_mask(n_new)
            mask_BTS = llama4.causal_mask(pos_BT, pos_BS, chunk) if needs_mask else None
            y_BTHK = llama4.attend(q_BTHK[:, part], k_BSJK, v_BSJK, mask_BTS, 0.6)
            torch.testing.assert_close(y_BTHK, expected_BTHK[:, part])


@pytest.mark.parametrize("chunk", [None, 24])
def test_buffers_double(chunk: int | None) -> None:
    """Guards the cost of a token, and the memory of a layer with chunks."""
    check_growth(llama4, chunk)


def test_first_read_is_exact() -> None:
    """Guards the memory of a long prompt."""
    check_first_read_is_exact(llama4)


def test_causal_mask_by_loops() -> None:
    """Guards who sees whom, for positions in any order and below zero."""
    for chunk in (None, 1, 3):
        q_pos_BT, k_pos_BS = torch.randint(-4, 9, (4, 5)), torch.randint(-4, 9, (4, 7))
        mask_BTS = llama4.causal_mask(q_pos_BT, k_pos_BS, chunk)
        for b, t, s in torch.cartesian_prod(*map(torch.arange, (4, 5, 7))).tolist():
            q, k = int(q_pos_BT[b, t]), int(k_pos_BS[b, s])
            near = chunk is None or q // chunk == k // chunk
            assert bool(mask_BTS[b, t, s]) == (k <= q and (k >= 0 or q < 0) and near)


def test_masks_are_built_only_where_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards speed and memory: no mask larger than new x seen, and none that would be all true."""
    model = llama4.Transformer(llama4.config_from_hf(scout(num_hidden_layers=4).to_dict()))
    tokens_BT = torch.zeros(3, 40, dtype=torch.long)

    def built(cache: list, n: int) -> list:
        return masks_built(llama4, monkeypatch, lambda: model(tokens_BT[:, :n], cache))

    cache = model.new_cache()
    assert built(cache, 8) == []  # a first read within the chunk
    assert [built(cache, 1) for _ in range(10)] == [[]] * 10
    assert built(cache, 5) == [((3, 5, 8 + 5), 8)] * 3 + [((3, 5, 23), None)]
    assert built(cache, 1) == []
    assert built(model.new_cache(), 30) == [((3, 30, 30), 8)] * 3
    cache = model.new_cache(torch.tensor([0, 3, 9]))
    assert built(cache, 12) == [((3, 12, 12), 8)] * 3 + [((3, 12, 12), None)]
    assert built(cache, 1) == [((3, 1, 8), 8)] * 3 + [((3, 1, 13), None)]


def test_rope_pairs_lie_side_by_side() -> None:
    """Guards the layout: Llama 3's turn of the same head, its dimensions put in another order."""
    q_BTHK = torch.randn(2, 5, 3, 8)
    turn = llama4.rope_angles(torch.arange(10).view(2, 5), llama4.rope_frequencies(8, 50.0, None))
    apart_BTHK = q_BTHK[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    assert torch.equal(llama4.rope(q_BTHK, turn), llama3.rope(apart_BTHK, turn))


def test_growth() -> None:
    """Guards the first step, published: positions 0 to 8190 change nothing, 8191 does."""
    q_BTHK = torch.randn(1, 6, 2, 4)
    pos_BT = torch.tensor([[-9000, 0, 8190, 8191, 16382, 16383]])
    grown_BTHK = llama4.grow(q_BTHK, pos_BT, 0.1, 8192)
    ratio = (grown_BTHK / q_BTHK)[0, :, 0, 0].tolist()
    log = [0, 0, 0, 0.6931472, 0.6931472, 1.0986123]
    assert ratio == pytest.approx([1 + 0.1 * x for x in log])
    assert torch.equal(grown_BTHK[:, :3], q_BTHK[:, :3])
    assert llama4.grow(q_BTHK.bfloat16(), pos_BT, 0.1, 8192).dtype == torch.bfloat16


def test_norms_round_as_transformers_do() -> None:
    """Guards both norms in bfloat16, bit by bit."""
    from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm, Llama4TextRMSNorm

    theirs = Llama4TextRMSNorm(64, eps=1e-5).bfloat16()
    theirs.weight.data = torch.randn(64).bfloat16()
    ours = llama4.RMSNorm(64, 1e-5).bfloat16()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(50, 3, 64).bfloat16()
    assert torch.equal(ours(x), theirs(x))
    cfg = llama4.config_from_hf(scout(head_dim=64, rms_norm_eps=0.01).to_dict())
    unit = llama4.Attention(cfg, 8).bfloat16().qk_norm
    assert torch.equal(unit(x), Llama4TextL2Norm(0.01)(x))


def test_bfloat16_is_as_good_as_transformers(tmp_path: Path) -> None:
    """Guards the rounding in bfloat16: an error of 3 %, and at most 1.5 times transformers'."""
    configs = [scout(), maverick(), scout(rope_parameters=ABRUPT), maverick(use_qk_norm=True)]
    ours, theirs = bfloat16_errors(llama4, configs, tmp_path)
    assert ours < 0.03
    assert ours < 1.5 * theirs


@pytest.mark.parametrize("name", ["Scout", "Maverick"])
def test_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    """Guards training: no part is cut off from the loss, not by the cache's buffers either."""
    config = {"Scout": scout, "Maverick": maverick}[name](num_local_experts=2)  # all get tokens
    hf = reference(config)
    hf.save_pretrained(tmp_path)
    check_gradients(llama4, llama4.load_folder(tmp_path), hf)


# ---- generation


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> tuple[llama4.Transformer, PreTrainedModel]:
    """Ours and transformers': a Scout whose greedy texts vary."""
    folder = tmp_path_factory.mktemp("lively")
    hf = reference(scout(), scale=3.0)
    hf.save_pretrained(folder)
    return llama4.load_folder(folder), hf


def test_generate_equals_transformers(lively: tuple[llama4.Transformer, PreTrainedModel]) -> None:
    """Guards greedy generation, and that the cache is used: one token a step after the prompt."""
    equals_generate(llama4, *lively)


def test_generate_padded_batch(lively: tuple[llama4.Transformer, PreTrainedModel]) -> None:
    """Guards prompts of unequal length in one batch."""
    same_alone_and_padded(llama4, lively[0])


def test_generate_goes_on(lively: tuple[llama4.Transformer, PreTrainedModel]) -> None:
    """Guards a cache that is handed from one call to the next."""
    goes_on(llama4, lively[0])


def test_decoding_reads_one_token_a_step() -> None:
    """Guards the cost of a step: no old token is computed again, no expert works that is not asked.

    Not one of them is called without a token, either.
    """
    model = llama4.Transformer(llama4.config_from_hf(scout().to_dict()))
    read = [forward_lengths(part) for part in (model, *(block.attn for block in model.blocks))]
    experts: list[int] = []
    for block in model.blocks:
        for expert in block.mlp.experts:
            expert.register_forward_pre_hook(lambda _, args: experts.append(len(args[0])))
    list(llama4.generate(model, torch.zeros(1, 20, dtype=torch.long), 15))
    assert read == [[20] + [1] * 14] * 6
    assert min(experts) > 0
    assert sum(experts) == 5 * (20 + 14)


# ---- loading

VISION = {
    "vision_model.class_embedding": (16,),
    "vision_model.patch_embedding.linear.weight": (16, 48),
    "vision_model.model.layers.0.self_attn.q_proj.weight": (16, 16),
    "vision_model.vision_adapter.mlp.fc1.weight": (16, 16),
    "multi_modal_projector.linear_1.weight": (48, 16),
}
FORMS = {  # prefixes of the text part, of its head, of the rest
    "text only": ("model.", "", None),
    "published": ("language_model.model.", "language_model.", ""),
    "newer": ("model.language_model.", "", "model."),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A folder that transformers wrote, and the model in it."""
    folder = tmp_path_factory.mktemp("saved")
    hf = reference(maverick(num_hidden_layers=4))
    hf.save_pretrained(folder)
    return folder, hf


@pytest.mark.parametrize("form", FORMS)
def test_names_in_the_wild(form: str, saved: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    """Guards the names under which the text part is found, and what is left out."""
    prefix, of_head, other = FORMS[form]
    folder, hf = saved
    state = {
        of_head + name if "lm_head" in name else name.replace("model.", prefix, 1): w
        for name, w in load_file(folder / "model.safetensors").items()
    }
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if other is None:
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(8)
    else:
        state |= {other + name: torch.randn(shape) for name, shape in VISION.items()}
        config = {"model_type": "llama4", "text_config": config, "vision_config": {}}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert_equal(llama4.load_folder(tmp_path), hf, n=24)


@pytest.mark.parametrize("live", [False, True])
def test_text_part_of_transformers_multimodal_model(live: bool, tmp_path: Path) -> None:
    """Guards the published layout: the folder that transformers writes, and its names in memory."""
    vision = dict(
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        pixel_shuffle_ratio=0.5,
        projector_input_dim=16,
        projector_output_dim=16,
        vision_output_dim=16,
    )
    config = Llama4Config(text_config=scout().to_dict(), vision_config=vision)
    torch.manual_seed(0)
    whole = Llama4ForConditionalGeneration(config).eval()
    whole.set_attn_implementation("eager")
    for param in whole.parameters():
        param.data += 0.1 * torch.randn_like(param)
    whole.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {"language_model.lm_head.weight", "language_model.model.norm.weight"} <= names
    assert any("vision_model" in name for name in names)
    assert any("multi_modal_projector" in name for name in names)
    model = llama4.load_folder(tmp_path)
    if live:
        model = llama4.Transformer(model.cfg).eval()
        llama4.load_weights(model, whole.state_dict())
    tokens_BT = torch.randint(97, (2, 40))
    with torch.no_grad():
        expected_BTV, found_BTV = whole(tokens_BT, use_cache=False).logits, model(tokens_BT)
    assert (found_BTV - expected_BTV).abs().max() < TOLERANCE * expected_BTV.abs().max()


def test_experts_are_views(saved: tuple[Path, PreTrainedModel]) -> None:
    """Guards memory while loading: convert copies nothing, and needs no memory for its answer."""
    name = "language_model.model.layers.1.feed_forward.experts.gate_up_proj"
    fused = torch.randn(7, 48, 80)
    parts = llama4.convert({name: fused})
    assert len(parts) == 14
    for ours, w in parts.items():
        assert w.shape == (40, 48)
        assert w.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
        i, first = int(ours.split(".")[4]), 40 if "up_proj" in ours else 0
        assert torch.equal(w.T, fused[i, :, first : first + 40])
    probe = llama4.convert({name: torch.empty(7, 48, 80, device="meta")})
    assert {k: w.shape for k, w in probe.items()} == {k: w.shape for k, w in parts.items()}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.embed_tokens.weight", "embed.weight"),
        ("lm_head.weight", "head.weight"),
        ("model.norm.weight", "norm.weight"),
        ("model.layers.1.self_attn.k_proj.weight", "blocks.1.attn.k_proj.weight"),
        ("model.layers.2.post_attention_layernorm.weight", "blocks.2.mlp_norm.weight"),
        ("model.layers.0.feed_forward.down_proj.weight", "blocks.0.mlp.down_proj.weight"),
        ("model.layers.1.feed_forward.router.weight", "blocks.1.mlp.router.weight"),
        (
            "model.layers.3.feed_forward.shared_expert.up_proj.weight",
            "blocks.3.mlp.shared.up_proj.weight",
        ),
    ],
)
def test_each_tensor_must_find_its_partner(
    theirs: str, ours: str, saved: tuple[Path, PreTrainedModel]
) -> None:
    """Guards strict loading: missing, left over, misshapen; both names and shapes are said."""
    state = load_file(saved[0] / "model.safetensors")
    model = llama4.load_folder(saved[0])
    with pytest.raises(KeyError) as error:
        llama4.load_weights(model, {name: w for name, w in state.items() if name != theirs})
    assert theirs in str(error.value) and ours in str(error.value)
    extra = "extra." + theirs
    with pytest.raises(KeyError, match=extra):
        llama4.load_weights(model, state | {extra: state[theirs]})
    wrong = torch.zeros(1, *state[theirs].shape[1:])  # a plain copy would broadcast it
    with pytest.raises(ValueError) as error:
        llama4.load_weights(model, state | {theirs: wrong})
    for part in (theirs, ours, str(tuple(wrong.shape)), str(tuple(state[theirs].shape))):
        assert part in str(error.value)


@pytest.mark.parametrize("kind", ["gate_up_proj", "down_proj"])
def test_experts_must_find_their_partners(kind: str, saved: tuple[Path, PreTrainedModel]) -> None:
    """Guards the same of experts: a tensor too few, a layer, an expert or a column too many."""
    state = load_file(saved[0] / "model.safetensors")
    model = llama4.load_folder(saved[0])
    theirs = f"model.layers.1.feed_forward.experts.{kind}"
    ours = f"blocks.1.mlp.experts.6.{kind.removeprefix('gate_')}.weight"
    with pytest.raises(KeyError) as error:
        llama4.load_weights(model, {name: w for name, w in state.items() if name != theirs})
    assert theirs in str(error.value) and ours in str(error.value)
    few = {theirs: state[theirs][:6]}
    with pytest.raises(KeyError, match=ours):
        llama4.load_weights(model, state | few)
    many = {theirs: torch.cat((state[theirs], state[theirs][:1]))}
    with pytest.raises(KeyError, match=theirs):
        llama4.load_weights(model, state | many)
    with pytest.raises(KeyError, match="layers.2"):
        llama4.load_weights(model, state | {theirs.replace("1", "2"): state[theirs]})
    wide = {theirs: torch.cat((state[theirs], state[theirs][:, :, :2]), dim=2)}
    with pytest.raises(ValueError, match=f"{theirs} is .*, not .* as blocks.1.mlp.experts.0"):
        llama4.load_weights(model, state | wide)


def test_bfloat16_model_is_bfloat16_throughout(saved: tuple[Path, PreTrainedModel]) -> None:
    """Guards the dtype that a loader asks for."""
    model = in_bfloat16(llama4, saved[0])
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    logits_BTV: Tensor = model(torch.randint(97, (1, 20)))
    assert logits_BTV.dtype == torch.bfloat16 and logits_BTV.isfinite().all()
