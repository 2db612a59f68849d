"""gemma3.py against transformers' Gemma 2 and Gemma 3, with each of their parts switched on."""

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
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from ch08_full_models import gemma3
from ch08_full_models.download import MODELS
from tests.parity import (
    TOLERANCE,
    assert_equal,
    assert_noticed,
    brute_force_attention,
    check_mask_by_loops,
    equals_generate,
    errors,
    forward_lengths,
    goes_on,
    mutant,
    reference,
    same_alone_and_padded,
)
from tests.test_ch08_llama3 import (
    NO_ENDS,
    bfloat16_errors,
    check_first_read_is_exact,
    check_gradients,
    check_growth,
    check_ring,
    in_bfloat16,
    masks_built,
)

pytestmark = pytest.mark.usefixtures("one_thread")


SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    query_pre_attn_scalar=24,
    max_position_embeddings=128,
    sliding_window=8,  # all texts have 40 tokens
    **NO_ENDS,
)


def gemma_2(**changes: object) -> Gemma2Config:
    small_caps = dict(attn_logit_softcapping=1.5, final_logit_softcapping=2.5)
    return Gemma2Config(**SIZES | dict(num_hidden_layers=4) | small_caps | changes)


def gemma_3(**changes: object) -> Gemma3TextConfig:
    return Gemma3TextConfig(**SIZES | dict(num_hidden_layers=7) | changes)


def rope(full: float = 1e6, sliding: float = 1e4, factor: float | None = None) -> dict:
    """transformers 5's rope_parameters of a Gemma 3."""
    kind = {"rope_type": "linear", "factor": factor} if factor else {"rope_type": "default"}
    return {
        "full_attention": kind | {"rope_theta": full},
        "sliding_attention": {"rope_type": "default", "rope_theta": sliding},
    }


FULL, SLIDING = "full_attention", "sliding_attention"
CASES = {
    "Gemma 2": gemma_2(),
    "Gemma 2, no caps": gemma_2(attn_logit_softcapping=None, final_logit_softcapping=None),
    "Gemma 2, published caps": gemma_2(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    "Gemma 2, scores capped": gemma_2(final_logit_softcapping=None),
    "Gemma 2, logits capped": gemma_2(attn_logit_softcapping=None),
    "Gemma 2, one key head": gemma_2(num_key_value_heads=1),
    "Gemma 2, every head its own keys": gemma_2(num_key_value_heads=6, head_dim=8),
    "Gemma 2, odd number of layers": gemma_2(num_hidden_layers=3, sliding_window=1),
    "Gemma 2, another base": gemma_2(rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
    "Gemma 2, large epsilon": gemma_2(rms_norm_eps=0.05),
    "Gemma 3": gemma_3(),
    "Gemma 3, one layer, local": gemma_3(num_hidden_layers=1),
    "Gemma 3, ends on a full layer": gemma_3(num_hidden_layers=6),
    "Gemma 3, one key head": gemma_3(num_key_value_heads=1),
    "Gemma 3, every head its own keys": gemma_3(num_key_value_heads=6),
    "Gemma 3, window of one": gemma_3(sliding_window=1),
    "Gemma 3, window one short": gemma_3(sliding_window=39),
    "Gemma 3, narrow heads": gemma_3(head_dim=4, query_pre_attn_scalar=8),
    "Gemma 3, large epsilon": gemma_3(rms_norm_eps=0.05),
    "Gemma 3, factor 8": gemma_3(rope_parameters=rope(factor=8.0)),
    "Gemma 3, factor 8, low bases": gemma_3(rope_parameters=rope(300.0, 20.0, 8.0)),
    "Gemma 3, local base higher": gemma_3(rope_parameters=rope(100.0, 1e5)),
    "Gemma 3, layers in another order": gemma_3(
        num_hidden_layers=4, layer_types=[FULL, SLIDING, SLIDING, FULL]
    ),
    "Gemma 3, full layers only": gemma_3(num_hidden_layers=2, layer_types=[FULL, FULL]),
    "Gemma 3, logits capped": gemma_3(final_logit_softcapping=2.0),
}


def drawn(seed: int) -> PretrainedConfig:
    """A config drawn from what these families can be, with several parts switched on."""
    rng = random.Random(seed)
    n_kv_heads, groups = rng.randint(1, 3), rng.randint(1, 4)
    n_heads, n_layers = n_kv_heads * groups, rng.randint(1, 8)
    changes = dict(
        vocab_size=rng.randint(20, 200),
        hidden_size=n_heads * rng.randint(3, 12),
        intermediate_size=rng.randint(10, 120),
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=2 * rng.randint(2, 10),
        query_pre_attn_scalar=rng.randint(4, 40),
        rms_norm_eps=rng.choice([1e-6, 1e-2]),
        sliding_window=rng.randint(1, 20),
    )
    if rng.random() < 0.4:
        caps = dict(attn_logit_softcapping=rng.choice([None, 0.5, 4.0]))
        return gemma_2(**changes, **caps, final_logit_softcapping=rng.choice([None, 1.0, 9.0]))
    if rng.random() < 0.4:
        changes["layer_types"] = [rng.choice([FULL, SLIDING]) for _ in range(n_layers)]
    bases = rng.choice([100.0, 1e4, 1e6]), rng.choice([30.0, 1e4])
    return gemma_3(**changes, rope_parameters=rope(*bases, rng.choice([None, 8.0])))


CASES |= {f"drawn {seed}": drawn(seed) for seed in range(12)}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """Guards the forward pass: whole, with the cache, in chunks, padded; from one file or many."""
    hf = reference(CASES[name], scale=2.0)  # so that caps of this size bend the scores
    many = len(name) % 2 == 0
    hf.save_pretrained(tmp_path, max_shard_size="20KB" if many else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == many
    assert_equal(gemma3.load_folder(tmp_path), hf)


SWAPPED = dict(rope_theta=1e4, local_theta=1e6)
OFF = {  # a part and what it is when it does nothing
    "cap on scores": ("Gemma 2", dict(attn_cap=None)),
    "cap on logits": ("Gemma 2", dict(logit_cap=None)),
    "cap on logits of Gemma 3": ("Gemma 3, logits capped", dict(logit_cap=None)),
    "window in even layers": ("Gemma 2", dict(windows=(None,))),
    "no window in odd layers": ("Gemma 2", dict(windows=(8,))),
    "window in five of six": ("Gemma 3", dict(windows=(None,))),
    "no window in one of six": ("Gemma 3", dict(windows=(8,))),
    "window one short": ("Gemma 3, window one short", dict(windows=(40,) * 5 + (None,))),
    "epsilon": ("Gemma 3, large epsilon", dict(norm_eps=1e-6)),
    "bases": ("Gemma 3", SWAPPED),
    "one base for all, the global": ("Gemma 3", dict(local_theta=1e6)),
    "one base for all, the local": ("Gemma 3", dict(rope_theta=1e4)),
    "factor": ("Gemma 3, factor 8", dict(rope_factor=1.0)),
    "scale": ("Gemma 3", dict(attn_scale=16**-0.5)),
    "scale of Gemma 2": ("Gemma 2", dict(attn_scale=16**-0.5)),
}


@pytest.mark.parametrize("part", OFF)
def test_parts_are_switched_on(part: str, tmp_path: Path) -> None:
    """Guards the cases above: without the part the logits are others."""
    name, off = OFF[part]
    hf = reference(CASES[name], scale=2.0)
    hf.save_pretrained(tmp_path)
    model = gemma3.load_folder(tmp_path)
    without = gemma3.Transformer(dataclasses.replace(model.cfg, **off))
    gemma3.load_weights(without, model.state_dict())
    assert next(errors(without, hf))[1] > 1e-3


def test_positions_beyond_4096(tmp_path: Path) -> None:
    """Guards the angles far out, and a ring that has gone round hundreds of times."""
    config = gemma_3(
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_size=16,
        head_dim=8,
        layer_types=[SLIDING, FULL],
        max_position_embeddings=8192,
    )
    hf = reference(config)
    hf.save_pretrained(tmp_path)
    model = gemma3.load_folder(tmp_path)
    tokens_1T = torch.randint(97, (1, 4200))
    with torch.no_grad():
        expected_1TV = hf(tokens_1T).logits
        cache = model.new_cache()
        found_1TV = torch.cat([model(t, cache) for t in tokens_1T.split([4000, 1, 190, 9], 1)], 1)
    assert (found_1TV - expected_1TV).abs().max() < TOLERANCE * expected_1TV.abs().max()


# ---- config.json as others write it


def older(config: dict) -> dict:
    """The config as it was written before transformers 5."""
    today = config.pop("rope_parameters")
    full = today.get("full_attention", today)
    config["rope_theta"] = full.pop("rope_theta")
    config["rope_scaling"] = None if full["rope_type"] == "default" else full
    if "sliding_attention" in today:
        config["rope_local_base_freq"] = today["sliding_attention"]["rope_theta"]
    return config


def oldest(config: dict) -> dict:
    """As before that: the kind of scaling is its `type`, the layers' kinds are a pattern."""
    config = older(config)
    if config["rope_scaling"]:
        config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    pattern = 2 if config["model_type"] == "gemma2" else 6
    kinds = [SLIDING if (i + 1) % pattern else FULL for i in range(config["num_hidden_layers"])]
    if config["layer_types"] == kinds:
        del config["layer_types"]
        config.pop("_sliding_window_pattern", None)
        if pattern == 6:
            config["sliding_window_pattern"] = 6
    return config


def underscored(config: dict) -> dict:
    """As gemma-3-270m's: the pattern's key begins with an underscore."""
    config = oldest(config)
    if "sliding_window_pattern" in config:
        config["_sliding_window_pattern"] = config.pop("sliding_window_pattern")
    return config


def silent(config: dict) -> dict:
    """Without the keys that only say what transformers' classes say."""
    config = oldest(config)
    kind = Gemma2Config if config["model_type"] == "gemma2" else Gemma3TextConfig
    absent = kind(hidden_size=8).to_dict() | {
        "rope_theta": 1e4 if kind is Gemma2Config else 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": None,
        "sliding_window_pattern": 6,
    }
    absent = {k: v for k, v in absent.items() if k not in ("model_type", "hidden_size")}
    return {k: v for k, v in config.items() if k not in absent or v != absent[k]}


@pytest.mark.parametrize("edit", [older, oldest, underscored, silent])
@pytest.mark.parametrize("name", CASES)
def test_older_configs(name: str, edit: Callable[[dict], dict], tmp_path: Path) -> None:
    """Guards config.json as older versions wrote it: it gives the same Config."""
    CASES[name].save_pretrained(tmp_path)
    today = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "rope_parameters" in today
    old = edit(json.loads(json.dumps(today)))
    assert "rope_parameters" not in old
    assert gemma3.config_from_hf(old) == gemma3.config_from_hf(today)


def test_another_pattern() -> None:
    """Guards the pattern, which transformers reads from either key."""
    config = oldest(gemma_3().to_dict())
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        rest = {k: v for k, v in config.items() if not k.endswith("sliding_window_pattern")}
        cfg = gemma3.config_from_hf(rest | {key: 3})
        assert cfg.windows == (8, 8, None, 8, 8, None, 8)


# The text parts of the larger models, as their config.json have them; 12b and 27b from the reports
# and transformers' conversion script. MODELS has the others.
LARGE = {
    "gemma-3-12b": (
        dict(
            model_type="gemma3_text",
            hidden_size=3840,
            intermediate_size=15360,
            num_hidden_layers=48,
            num_attention_heads=16,
            num_key_value_heads=8,
            sliding_window=1024,
            rope_scaling={"factor": 8.0, "rope_type": "linear"},
        ),
        11_766_034_176,
    ),
    "gemma-3-27b": (
        dict(
            model_type="gemma3_text",
            hidden_size=5376,
            intermediate_size=21504,
            num_hidden_layers=62,
            num_attention_heads=32,
            num_key_value_heads=16,
            head_dim=128,
            query_pre_attn_scalar=168,
            sliding_window=1024,
            rope_scaling={"factor": 8.0, "rope_type": "linear"},
        ),
        27_009_346_304,
    ),
    "gemma-2-27b": (
        dict(
            model_type="gemma2",
            hidden_size=4608,
            intermediate_size=36864,
            num_hidden_layers=46,
            num_attention_heads=32,
            num_key_value_heads=16,
            head_dim=128,
            query_pre_attn_scalar=144,
        ),
        27_227_128_320,
    ),
}
PUBLISHED = LARGE | {
    name: (model.config.get("text_config", model.config), model.parameters)
    for name, model in MODELS.items()
    if model.config["model_type"] in ("gemma2", "gemma3_text", "gemma3")
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    """Guards the published configs, without their bytes: parameters, names and shapes."""
    published, n_params = PUBLISHED[name]
    kind = Gemma2Config if published["model_type"] == "gemma2" else Gemma3TextConfig
    hf_config = kind(**published)
    with torch.device("meta"):
        model = gemma3.Transformer(gemma3.config_from_hf(published))
        hf = AutoModelForCausalLM.from_config(hf_config)
    assert sum(p.numel() for p in model.parameters()) == n_params
    assert sum(p.numel() for p in hf.parameters()) == n_params
    gemma3.load_weights(model, hf.state_dict())
    assert gemma3.config_from_hf(hf_config.to_dict()) == model.cfg  # with every key there is


def test_published_4b() -> None:
    """Guards the multimodal config, which leaves out most of what it means."""
    assert "num_attention_heads" not in MODELS["gemma3-4b"].config["text_config"]
    cfg = gemma3.config_from_hf(MODELS["gemma3-4b"].config)
    assert cfg == gemma3.Config(
        vocab_size=262208,
        max_seq_len=131072,
        n_layers=34,
        d_model=2560,
        n_heads=8,
        n_kv_heads=4,
        head_dim=256,
        windows=((1024,) * 5 + (None,)) * 5 + (1024,) * 4,
        d_ff=10240,
        norm_eps=1e-6,
        qk_norm=True,
        attn_scale=256**-0.5,
        rope_theta=1e6,
        local_theta=1e4,
        rope_factor=8.0,
    )


def test_defaults_are_gemma_3_270m() -> None:
    """Guards Config's defaults against the published file's values."""
    cfg = gemma3.config_from_hf(MODELS["gemma3-270m"].config)
    assert dataclasses.replace(cfg, windows=cfg.windows[:6]) == gemma3.Config()
    assert cfg.windows == cfg.windows[:6] * 3


def test_silent_config_runs_as_transformers_runs_it(tmp_path: Path) -> None:
    """Guards the defaults of the multimodal config by logits: 8 heads of 256, 262,208 tokens."""
    published = MODELS["gemma3-4b"].config["text_config"]
    text = published | dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=6, sliding_window=4
    )
    hf = reference(Gemma3TextConfig(**text))
    hf.save_pretrained(tmp_path)
    config = json.dumps({"model_type": "gemma3", "text_config": text})
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    model = gemma3.load_folder(tmp_path)
    tokens_1T = torch.randint(262_208, (1, 12))
    with torch.no_grad():
        expected_1TV, cache = hf(tokens_1T).logits, model.new_cache()
        found_1TV = torch.cat([model(t, cache) for t in tokens_1T.split([5, 6, 1], 1)], 1)
    assert (found_1TV - expected_1TV).abs().max() < TOLERANCE * expected_1TV.abs().max()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_activation": "silu"}, "hidden_activation.*silu"),
        ({"attention_bias": True}, "attention_bias.*True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings.*False"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.*yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_scaling.*dynamic"),
        (
            {"rope_parameters": rope() | {FULL: {"rope_type": "llama3", "rope_theta": 1e6}}},
            "rope_scaling.*llama3",
        ),
        (
            {
                "rope_parameters": rope()
                | {SLIDING: {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}
            },
            "rope.*linear",
        ),
    ],
)
def test_config_that_cannot_be_run(change: dict, said: str) -> None:
    """Guards against running a variant as if it were Gemma: the key and its value are said."""
    for config in (
        gemma_3().to_dict(),
        {"model_type": "gemma3", "text_config": gemma_3().to_dict()},
    ):
        config.get("text_config", config).update(change)
        with pytest.raises(ValueError, match=said):
            gemma3.config_from_hf(config)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers"])
def test_config_without_a_key(key: str) -> None:
    """Guards against guessing a size that differs from model to model."""
    config = gemma_3().to_dict()
    del config[key]
    with pytest.raises(KeyError, match=key):
        gemma3.config_from_hf(config)


# ---- mistakes

G2, G3, OLD = "Gemma 2", "Gemma 3", "Gemma 3 with an old config"
SPOILT = {
    G2: gemma_2(rms_norm_eps=0.01),
    G3: gemma_3(rms_norm_eps=0.01, rope_parameters=rope(300.0, 20.0, 8.0)),
    OLD: gemma_3(rope_parameters=rope(factor=8.0)),
}
MUTANTS = {
    "norm weights not raised": (G3, "w.float() + 1 if -> w.float() if"),
    "only some norm weights raised": (G3, 'and "norm" in name -> and "_norm.weight" in name'),
    "no epsilon": (G3, "mean_square + self.eps -> mean_square"),
    "bases exchanged": (
        G3,
        "local_turn if block.attn.window -> local_turn if not block.attn.window",
    ),
    "one base for all": (G3, "local_turn if block.attn.window else turn, -> turn,"),
    "factor on local layers": (G3, "cfg.local_theta, 1.0 -> cfg.local_theta, cfg.rope_factor"),
    "factor lost": (G3, "return freq_P / factor -> return freq_P"),
    "factor multiplies": (G3, "return freq_P / factor -> return freq_P * factor"),
    "embeddings not scaled": (G3, "torch.tensor(cfg.d_model**0.5 -> torch.tensor(1.0"),
    "embeddings times D": (G3, "torch.tensor(cfg.d_model**0.5 -> torch.tensor(1.0 * cfg.d_model"),
    "norm after attention lost": (G3, "x_BTD + self.attn_out_norm(y_BTD) -> x_BTD + y_BTD"),
    "norm after attention on the sum": (
        G3,
        "x_BTD + self.attn_out_norm(y_BTD) -> self.attn_out_norm(x_BTD + y_BTD)",
    ),
    "norm after the MLP lost": (
        G3,
        "self.mlp_out_norm(self.mlp(self.mlp_norm(x_BTD))) -> self.mlp(self.mlp_norm(x_BTD))",
    ),
    "norm before the MLP lost": (G3, "self.mlp(self.mlp_norm(x_BTD)) -> self.mlp(x_BTD)"),
    "norms named as in Llama": (
        G3,
        "{}.post_attention_layernorm -> {}.exchanged",
        "{}.pre_feedforward_layernorm -> {}.post_attention_layernorm",
        "{}.exchanged -> {}.pre_feedforward_layernorm",
    ),
    "query norm lost": (G3, "rope(self.q_norm(q_BTHK), turn) -> rope(q_BTHK, turn)"),
    "key norm lost": (G3, "rope(self.k_norm(k_BTJK), turn) -> rope(k_BTJK, turn)"),
    "query norm after turning": (
        G3,
        "rope(self.q_norm(q_BTHK), turn) -> self.q_norm(rope(q_BTHK, turn))",
    ),
    "values normed": (G3, "append(k_BTJK, v_BTJK -> append(k_BTJK, self.k_norm(v_BTJK)"),
    "exact GELU": (G3, 'approximate="tanh" -> approximate="none"'),
    "SiLU for GELU": (
        G3,
        'F.gelu(self.gate_proj(x), approximate="tanh") -> F.silu(self.gate_proj(x))',
    ),
    "gate on the wrong matrix": (
        G3,
        'gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x) -> '
        'gelu(self.up_proj(x), approximate="tanh") * self.gate_proj(x)',
    ),
    "scale of the head": (G3, 'hf["query_pre_attn_scalar"] ** -0.5 -> hf["head_dim"] ** -0.5'),
    "scores not capped": (
        G2,
        "soft_cap(torch.einsum( -> (torch.einsum(",
        " * scale, cap) -> * scale)",
    ),
    "scores capped before they are scaled": (
        G2,
        "k_BSJK) * scale, cap) -> k_BSJK), cap) * scale",
    ),
    "capped by clamping": (G2, "cap * torch.tanh(x / cap) -> x.clamp(-cap, cap)"),
    "cap not multiplied back": (G2, "cap * torch.tanh(x / cap) -> torch.tanh(x / cap)"),
    "logits not capped": (G2, "if cfg.logit_cap is None else -> if True else"),
    "logits capped as the scores": (
        G2,
        "soft_cap(logits, cfg.logit_cap) -> soft_cap(logits, cfg.attn_cap)",
    ),
    "capped heads interleaved": (
        G2,
        "q_BTHK.unflatten(2, (k_BSJK.shape[2], -1)) -> "
        "q_BTHK.unflatten(2, (-1, k_BSJK.shape[2])).transpose(2, 3)",
    ),
    "norms on Gemma 2's queries": (
        G2,
        "qk_norm=not is_2 -> qk_norm=True",
        "if missing: -> if False:",
    ),
    "Gemma 2's other layers local": (G2, "cfg.windows[layer % -> cfg.windows[(layer + 1) %"),
    "layers shifted by one": (G3, "cfg.windows[layer % -> cfg.windows[(layer + 1) %"),
    "first layer full": (OLD, "if (i + 1) % pattern -> if i % pattern"),
    "pattern of five": (OLD, '"sliding_window_pattern": 6 -> "sliding_window_pattern": 5'),
    "pattern's key ignored": (
        OLD,
        'hf.get("_sliding_window_pattern") or hf["sliding_window_pattern"] -> '
        'hf["sliding_window_pattern"] - 1',
    ),
    "old local base as the global": (
        OLD,
        '"rope_local_base_freq": 10_000.0 -> "rope_local_base_freq": 1_000_000.0',
    ),
    "old scaling ignored": (OLD, '| (hf.get("rope_scaling") or {}) -> '),
    "window one too wide": (G3, "> q_pos_BT1 - window -> >= q_pos_BT1 - window"),
    "window one too narrow": (G3, "> q_pos_BT1 - window -> > q_pos_BT1 - window + 1"),
    "ring one off": (G3, "[:, n_old % self.window] -> [:, (n_old + 1) % self.window]"),
    "ring one off, capped": (G2, "[:, n_old % self.window] -> [:, (n_old + 1) % self.window]"),
    "ring two too small": (
        G3,
        "slots[:n_old][-self.window :] -> slots[:n_old][-self.window + 2 :]",
    ),
    "padding takes positions": (G3, "pos_T - n_pad) -> pos_T - 0 * n_pad)"),
    "padding is seen": (G2, " & ((k_pos_B1S >= 0) | (q_pos_BT1 < 0)) -> "),
    "positions start again with each call": (G3, "self.n_seen + torch.arange -> torch.arange"),
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
        assert_equal(gemma3.load_folder(folder), hf)
    return made


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str, spoilt: dict[str, tuple[Path, PreTrainedModel]]) -> None:
    """Guards the comparison with transformers: with a mistake in the source it must fail."""
    case, *changes = MUTANTS[name]
    folder, hf = spoilt[case]
    assert_noticed(mutant(gemma3, *changes).load_folder(folder), hf)


# ---- parts


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_ring(window: int | None, padded: bool) -> None:
    """Guards the cache: no token is lost, none is seen that is too old, at any chunk size."""
    check_ring(gemma3, window, padded)


@pytest.mark.parametrize("window", [None, 24])
def test_buffers_double(window: int | None) -> None:
    """Guards the cost of a token, and the memory of a layer with a window."""
    check_growth(gemma3, window)


def test_first_read_is_exact() -> None:
    """Guards the memory of a long prompt."""
    check_first_read_is_exact(gemma3)


def test_causal_mask_by_loops() -> None:
    """Guards who sees whom."""
    check_mask_by_loops(gemma3)


def test_attend_capped_by_loops() -> None:
    """Guards the einsums and the order of scale, cap and mask."""
    q, k, v = torch.randn(2, 3, 6, 5), torch.randn(2, 7, 2, 5), torch.randn(2, 7, 2, 5)
    mask_BTS = torch.rand(2, 3, 7) > 0.5
    mask_BTS[:, :, 0] = True

    def sees(b: int, t: int, s: int) -> bool:
        return bool(mask_BTS[b, t, s])

    expected = brute_force_attention(q, k, v, sees, 0.7, cap=0.9).float()
    torch.testing.assert_close(gemma3.attend_capped(q, k, v, mask_BTS, 0.7, 0.9), expected)
    uncapped = gemma3.attend_capped(q, k, v, mask_BTS, 0.7, 1e6)
    torch.testing.assert_close(uncapped, gemma3.attend(q, k, v, mask_BTS, 0.7), atol=1e-3, rtol=0)


def test_masks_are_built_only_where_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards speed and memory: no mask larger than new x seen, and none that would be all true."""
    model = gemma3.Transformer(gemma3.config_from_hf(gemma_3(num_hidden_layers=6).to_dict()))
    tokens_BT = torch.zeros(3, 40, dtype=torch.long)

    def built(cache: list, n: int) -> list:
        return masks_built(gemma3, monkeypatch, lambda: model(tokens_BT[:, :n], cache))

    cache = model.new_cache()
    assert built(cache, 8) == []  # a first read within the window
    assert [built(cache, 1) for _ in range(10)] == [[]] * 10
    assert built(cache, 5) == [((3, 5, 8 + 5), 8)] * 5 + [((3, 5, 23), None)]
    assert built(cache, 1) == []
    assert built(model.new_cache(), 30) == [((3, 30, 30), 8)] * 5
    cache = model.new_cache(torch.tensor([0, 3, 9]))
    assert built(cache, 12) == [((3, 12, 12), 8)] * 5 + [((3, 12, 12), None)]
    assert built(cache, 1) == [((3, 1, 8), 8)] * 5 + [((3, 1, 13), None)]


def test_norm_weights_stay_in_float32(tmp_path: Path) -> None:
    """Guards 1 + w: in bfloat16 a w below 1/256 would be lost."""
    hf = reference(gemma_3(num_hidden_layers=2)).bfloat16()
    small = torch.full((48,), 2.0**-12)
    hf.model.layers[0].input_layernorm.weight.data = small.bfloat16()
    hf.save_pretrained(tmp_path)
    model = in_bfloat16(gemma3, tmp_path)
    assert torch.equal(model.blocks[0].attn_norm.weight, 1 + small)
    for name, param in model.named_parameters():
        assert param.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name


def test_norm_rounds_in_gemmas_order() -> None:
    """Guards RMSNorm in bfloat16, bit by bit: times the weight first, then rounded."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    theirs = Gemma3RMSNorm(64, eps=1e-6).bfloat16()
    theirs.weight.data = torch.randn(64).bfloat16()
    ours = gemma3.RMSNorm(64, 1e-6)
    ours.weight.data = 1 + theirs.weight.data.float()
    x = torch.randn(50, 64).bfloat16()
    assert torch.equal(ours(x), theirs(x))


def test_embeddings_are_scaled_in_the_weights_type(tmp_path: Path) -> None:
    """Guards sqrt(D), bit by bit: models in bfloat16 were trained with 25.25, not with 25.3."""
    config = gemma_3(num_hidden_layers=1, hidden_size=640, num_attention_heads=2)
    reference(config).bfloat16().save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens_BT = torch.randint(97, (2, 20))
    into_first_block: list[Tensor] = []
    model = in_bfloat16(gemma3, tmp_path)
    model.blocks[0].register_forward_pre_hook(lambda _, args: into_first_block.append(args[0]))
    with torch.no_grad():
        model(tokens_BT)
        expected_BTD = half(tokens_BT, output_hidden_states=True).hidden_states[0]
        unrounded_BTD = (model.embed(tokens_BT).float() * 640**0.5).bfloat16()
    assert torch.equal(into_first_block[0], expected_BTD)
    assert not torch.equal(into_first_block[0], unrounded_BTD)


def test_bfloat16_is_as_good_as_transformers(tmp_path: Path) -> None:
    """Guards the rounding in bfloat16: an error of 3 %, and at most 1.5 times transformers'."""
    configs = [gemma_2(), gemma_3(), gemma_3(rope_parameters=rope(factor=8.0)), gemma_2()]
    ours, theirs = bfloat16_errors(gemma3, configs, tmp_path)
    assert ours < 0.03
    assert ours < 1.5 * theirs


@pytest.mark.parametrize("name", ["Gemma 2", "Gemma 3"])
def test_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    """Guards training: no part is cut off from the loss, not by the cache's buffers either."""
    hf = reference(CASES[name])
    hf.save_pretrained(tmp_path)
    check_gradients(gemma3, gemma3.load_folder(tmp_path), hf)


# ---- generation


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> tuple[gemma3.Transformer, PreTrainedModel]:
    """Ours and transformers': a Gemma 3 whose greedy texts vary."""
    folder = tmp_path_factory.mktemp("lively")
    hf = reference(gemma_3(), scale=3.0)
    hf.model.embed_tokens.weight.data *= 0.05  # else each token is followed by itself
    hf.save_pretrained(folder)
    return gemma3.load_folder(folder), hf


def test_generate_equals_transformers(lively: tuple[gemma3.Transformer, PreTrainedModel]) -> None:
    """Guards greedy generation, and that the cache is used: one token a step after the prompt."""
    equals_generate(gemma3, *lively)


def test_generate_padded_batch(lively: tuple[gemma3.Transformer, PreTrainedModel]) -> None:
    """Guards prompts of unequal length in one batch."""
    same_alone_and_padded(gemma3, lively[0])


def test_generate_goes_on(lively: tuple[gemma3.Transformer, PreTrainedModel]) -> None:
    """Guards a cache that is handed from one call to the next."""
    goes_on(gemma3, lively[0])


def test_decoding_reads_one_token_a_step() -> None:
    """Guards the cost of a step: in no layer is an old token computed again."""
    model = gemma3.Transformer(gemma3.config_from_hf(gemma_3().to_dict()))
    read = [forward_lengths(part) for part in (model, *(block.attn for block in model.blocks))]
    list(gemma3.generate(model, torch.zeros(1, 20, dtype=torch.long), 15))
    assert read == [[20] + [1] * 14] * 8


# ---- loading

VISION = {
    "vision_tower.vision_model.embeddings.patch_embedding.bias": (16,),
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": (16, 16),
    "vision_tower.vision_model.encoder.layers.0.layer_norm1.weight": (16,),
    "vision_tower.vision_model.post_layernorm.weight": (16,),
    "multi_modal_projector.mm_input_projection_weight": (16, 48),
    "multi_modal_projector.mm_soft_emb_norm.weight": (16,),
}
LEFT_OVER = {
    "lm_head.weight": (97, 48),
    **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (8,) for i in range(7)},
}
FORMS = {  # prefix of the text part; prefix of the rest; what else is in the file
    "text only": ("model.", "", {}),
    "left-overs": ("model.", "", LEFT_OVER),
    "vision": ("language_model.model.", "", VISION | {"language_model.lm_head.weight": (97, 48)}),
    "vision, newer": ("model.language_model.", "model.", VISION | {"lm_head.weight": (97, 48)}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A folder that transformers wrote, and the model in it."""
    folder = tmp_path_factory.mktemp("saved")
    hf = reference(gemma_3())
    hf.save_pretrained(folder)
    return folder, hf


@pytest.mark.parametrize("form", FORMS)
def test_names_in_the_wild(form: str, saved: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    """Guards the names under which Gemma's text part is found, and what is left out."""
    prefix, other, extra = FORMS[form]
    folder, hf = saved
    state = load_file(folder / "model.safetensors")
    state = {name.replace("model.", prefix, 1): w for name, w in state.items()}
    for name, shape in extra.items():
        state[name if "lm_head" in name else other + name] = torch.randn(shape)
    save_file(state, tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "vision" in form:
        config = {
            "model_type": "gemma3",
            "text_config": config,
            "vision_config": {"hidden_size": 16},
        }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert_equal(gemma3.load_folder(tmp_path), hf, n=24)


@pytest.mark.parametrize("live", [False, True])
def test_text_part_of_transformers_multimodal_model(live: bool, tmp_path: Path) -> None:
    """Guards 4B and larger: the folder that transformers writes, and its names in memory."""
    vision = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    text = gemma_3(rope_parameters=rope(factor=8.0)).to_dict()
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.set_attn_implementation("eager")
    for param in whole.parameters():
        param.data += 0.1 * torch.randn_like(param)
    whole.save_pretrained(tmp_path)
    assert any("vision" in name for name in load_file(tmp_path / "model.safetensors"))
    model = gemma3.load_folder(tmp_path)
    if live:
        model = gemma3.Transformer(model.cfg).eval()
        gemma3.load_weights(model, whole.state_dict())
    tokens_BT = torch.randint(97, (2, 40))
    with torch.no_grad():
        expected_BTV, found_BTV = whole(tokens_BT).logits, model(tokens_BT)
    assert (found_BTV - expected_BTV).abs().max() < TOLERANCE * expected_BTV.abs().max()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.embed_tokens.weight", "embed.weight"),
        ("model.norm.weight", "norm.weight"),
        ("model.layers.1.self_attn.k_norm.weight", "blocks.1.attn.k_norm.weight"),
        ("model.layers.2.post_attention_layernorm.weight", "blocks.2.attn_out_norm.weight"),
        ("model.layers.6.pre_feedforward_layernorm.weight", "blocks.6.mlp_norm.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blocks.0.mlp.down_proj.weight"),
    ],
)
def test_each_tensor_must_find_its_partner(
    theirs: str, ours: str, saved: tuple[Path, PreTrainedModel]
) -> None:
    """Guards strict loading: missing, left over, misshapen; both names and shapes are said."""
    state = load_file(saved[0] / "model.safetensors")
    model = gemma3.load_folder(saved[0])
    with pytest.raises(KeyError) as error:
        gemma3.load_weights(model, {name: w for name, w in state.items() if name != theirs})
    assert theirs in str(error.value) and ours in str(error.value)
    extra = theirs.replace("model.", "model.extra.", 1)
    with pytest.raises(KeyError, match=extra):
        gemma3.load_weights(model, state | {extra: state[theirs]})
    wrong = torch.zeros(1, *state[theirs].shape[1:])  # a plain copy would broadcast it
    with pytest.raises(ValueError) as error:
        gemma3.load_weights(model, state | {theirs: wrong})
    for part in (theirs, ours, str(tuple(wrong.shape)), str(tuple(state[theirs].shape))):
        assert part in str(error.value)


def test_query_norms_belong_to_gemma_3(saved: tuple[Path, PreTrainedModel]) -> None:
    """Guards Gemma 2: it has none, and Gemma 3 must have them."""
    state = load_file(saved[0] / "model.safetensors")
    bare = {name: w for name, w in state.items() if ".q_norm" not in name}
    with pytest.raises(KeyError, match="q_norm"):
        gemma3.load_weights(gemma3.load_folder(saved[0]), bare)
    model = gemma3.Transformer(gemma3.config_from_hf(gemma_2(num_hidden_layers=7).to_dict()))
    with pytest.raises(KeyError, match="q_norm|k_norm"):
        gemma3.load_weights(model, state)
