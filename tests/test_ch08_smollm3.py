"""smollm3.py against transformers' SmolLM3, with each of its parts switched on."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, SmolLM3Config

from ch08_full_models import smollm3
from tests.parity import (
    TOLERANCE,
    assert_equal,
    assert_noticed,
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
    LLAMA3,
    SIZES,
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

pytestmark = pytest.mark.usefixtures("one_thread")


FULL, SLIDING = "full_attention", "sliding_attention"


def smol(**changes: object) -> SmolLM3Config:
    """Five layers, of which the fourth does not turn, unless changed."""
    base = dict(num_hidden_layers=5, rope_parameters=rope(5_000_000.0))
    return SmolLM3Config(**SIZES | base | changes)


def windowed(window: int = 8, **changes: object) -> SmolLM3Config:
    """The layers that do not turn have a window, unless layer_types says otherwise."""
    return smol(use_sliding_window=True, sliding_window=window, **changes)


CASES = {  # all texts have 40 tokens: every window is smaller than the text
    "every fourth": smol(),
    "every fourth of eight": smol(num_hidden_layers=8),
    "untied": smol(tie_word_embeddings=False),
    "every head its own keys": smol(num_key_value_heads=6),
    "one key head": smol(num_key_value_heads=1),
    "narrow heads": smol(head_dim=4),
    "wide heads": smol(head_dim=32, hidden_size=36),
    "every second": smol(no_rope_layer_interval=2),
    "every third": smol(no_rope_layer_interval=3),
    "none turns": smol(no_rope_layer_interval=1),
    "all turn": smol(no_rope_layer_interval=6),
    "one layer, turns": smol(num_hidden_layers=1),
    "one layer, does not": smol(num_hidden_layers=1, no_rope_layers=[0]),
    "flags against the interval": smol(no_rope_layers=[0, 1, 0, 0, 1]),
    "more flags than layers": smol(no_rope_layers=[0, 1, 1, 0, 1, 1, 1, 0]),
    "all flags set": smol(no_rope_layers=[1] * 5),
    "low base": smol(rope_parameters=rope(50.0)),
    "large epsilon": smol(rms_norm_eps=0.05),
    "window": windowed(),
    "window of one": windowed(1, num_hidden_layers=4),
    "window one short": windowed(39),
    "window of the text": windowed(40),
    "window in every layer": windowed(layer_types=[SLIDING] * 5),
    "window in layers that turn": windowed(layer_types=[SLIDING, FULL, SLIDING, FULL, FULL]),
    "window, flags by hand, untied": windowed(
        5, no_rope_layers=[0, 1, 0, 1, 1], tie_word_embeddings=False
    ),
    "window switched off": smol(sliding_window=8, use_sliding_window=False),
    "window switched on, but none": smol(sliding_window=None, use_sliding_window=True),
}


def drawn(seed: int) -> SmolLM3Config:
    """A config drawn from what the family can be, with several parts switched on."""
    rng = random.Random(seed)
    n_kv_heads, groups, n_layers = rng.randint(1, 3), rng.randint(1, 5), rng.randint(1, 9)
    n_heads = n_kv_heads * groups
    changes = dict(
        vocab_size=rng.randint(20, 200),
        hidden_size=n_heads * rng.randint(3, 12),
        intermediate_size=rng.randint(10, 120),
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=2 * rng.randint(2, 10),
        rms_norm_eps=rng.choice([1e-6, 1e-5, 1e-2]),
        tie_word_embeddings=rng.random() < 0.5,
        rope_parameters=rope(rng.choice([100.0, 1e4, 5e6])),
        no_rope_layer_interval=rng.randint(1, 5),
    )
    if rng.random() < 0.3:
        changes["no_rope_layers"] = [rng.randint(0, 1) for _ in range(n_layers)]
    if rng.random() < 0.5:
        return smol(**changes)
    if rng.random() < 0.5:
        changes["layer_types"] = [rng.choice([FULL, SLIDING]) for _ in range(n_layers)]
    return windowed(rng.randint(1, 20), **changes)


CASES |= {f"drawn {seed}": drawn(seed) for seed in range(20)}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """Guards the forward pass: whole, with the cache, in chunks, padded; from one file or many."""
    hf = reference(CASES[name], seed=len(name))
    many = len(name) % 2 == 0
    hf.save_pretrained(tmp_path, max_shard_size="10KB" if many else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == many
    assert_equal(smollm3.load_folder(tmp_path), hf, seed=len(name))


OFF = {  # a part and what it is when it does nothing
    "a layer that does not turn": ("every fourth", dict(turns=(True,))),
    "layers that turn": ("every fourth", dict(turns=(False,))),
    "the last of eight": (
        "every fourth of eight",
        dict(turns=(True,) * 3 + (False,) + (True,) * 4),
    ),
    "flags": ("flags against the interval", dict(turns=(True, True, True, False))),
    "rotary base": ("low base", dict(rope_theta=5e6)),
    "published base": ("every fourth", dict(rope_theta=2e6)),
    "epsilon": ("large epsilon", dict(norm_eps=1e-6)),
    "window": ("window", dict(windows=(None,))),
    "window one short": ("window one short", dict(windows=(40,))),
    "window in all layers": ("window in every layer", dict(windows=(8, None))),
    "window by layer": ("window in layers that turn", dict(windows=(8,))),
}


@pytest.mark.parametrize("part", OFF)
def test_parts_are_switched_on(part: str, tmp_path: Path) -> None:
    """Guards the cases above: without the part the logits are others."""
    name, off = OFF[part]
    hf = reference(CASES[name])
    hf.save_pretrained(tmp_path)
    model = smollm3.load_folder(tmp_path)
    without = smollm3.Transformer(dataclasses.replace(model.cfg, **off))
    smollm3.load_weights(without, model.state_dict())
    assert next(errors(without, hf))[1] > 1e-3


def test_positions_beyond_4096(tmp_path: Path) -> None:
    """Guards the angles far out, beside a layer that has none."""
    config = smol(
        num_hidden_layers=2,
        no_rope_layer_interval=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_size=16,
        head_dim=8,
        max_position_embeddings=8192,
    )
    hf = reference(config)
    hf.save_pretrained(tmp_path)
    model = smollm3.load_folder(tmp_path)
    assert model.cfg.turns == (True, False)
    tokens_1T = torch.randint(97, (1, 4200))
    with torch.no_grad():
        expected_1TV = hf(tokens_1T).logits
        cache = model.new_cache()
        found_1TV = torch.cat([model(t, cache) for t in tokens_1T.split([4000, 1, 190, 9], 1)], 1)
    assert (found_1TV - expected_1TV).abs().max() < TOLERANCE * expected_1TV.abs().max()


@torch.no_grad()
def test_positions_matter_where_layers_turn() -> None:
    """Guards the idea itself: a layer that does not turn sees its past as a set.

    With one such layer, the last token's logits stay when the tokens before it change places; with
    one that turns they do not.
    """
    tokens_1T = torch.randint(50, (1, 12))
    shuffled_1T = torch.cat((tokens_1T[:, torch.randperm(11)], tokens_1T[:, 11:]), dim=1)
    sizes = dict(vocab_size=50, n_layers=1, d_model=16, n_heads=4, n_kv_heads=2, head_dim=8)
    for turns in (False, True):
        model = smollm3.Transformer(smollm3.Config(**sizes, d_ff=20, turns=(turns,)))
        for param in model.parameters():
            param += 0.3 * torch.randn_like(param)
        change = (model(tokens_1T) - model(shuffled_1T))[:, -1].abs().max()
        assert (change > 1e-2) == turns, change
        assert turns or change < 1e-5


# ---- config.json as others write it


def silent(config: dict) -> dict:
    """Without the keys that only say what transformers' class says, and the lists it derives."""
    config = older(config)
    whole = SmolLM3Config(**config)
    n_layers, interval = config["num_hidden_layers"], config["no_rope_layer_interval"]
    turns = [int((layer + 1) % interval != 0) for layer in range(n_layers)]
    slides = config["use_sliding_window"] and config["sliding_window"]
    kinds = [SLIDING if slides and not turn else FULL for turn in whole.no_rope_layers]
    absent = {
        "rope_theta": 2_000_000.0,
        "rope_scaling": None,
        "no_rope_layers": turns,
        "layer_types": kinds[:n_layers],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "sliding_window": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
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
    assert smollm3.config_from_hf(old) == smollm3.config_from_hf(today)


def test_silent_config_means_what_transformers_says() -> None:
    """Guards the defaults of absent keys, base and kinds of layers included, by transformers'."""
    for flags in ({}, {"use_sliding_window": True, "sliding_window": 8}):
        sizes = {k: v for k, v in SIZES.items() if k not in ("bos_token_id", "eos_token_id")}
        bare = {"model_type": "smollm3", "rms_norm_eps": 1e-6, **sizes, **flags}
        whole = SmolLM3Config(**bare).to_dict()
        assert whole["rope_parameters"]["rope_theta"] == 2_000_000.0
        assert smollm3.config_from_hf(bare) == smollm3.config_from_hf(whole)


PUBLISHED = dict(  # config.json of SmolLM3-3B; max_position_embeddings is unverified
    model_type="smollm3",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=4,
    hidden_act="silu",
    max_position_embeddings=65536,
    max_window_layers=28,
    rms_norm_eps=1e-6,
    rope_theta=5000000.0,
    rope_scaling=None,
    no_rope_layer_interval=4,
    no_rope_layers=[1, 1, 1, 0] * 9,
    sliding_window=None,
    use_sliding_window=False,
    tie_word_embeddings=True,
    attention_bias=False,
    mlp_bias=False,
    bos_token_id=128000,
    eos_token_id=128012,
    pad_token_id=128004,
    torch_dtype="bfloat16",
)


def test_published_model() -> None:
    """Guards the published config, without its bytes: parameters, names and shapes."""
    hf_config = SmolLM3Config(**PUBLISHED)
    with torch.device("meta"):
        model = smollm3.Transformer(smollm3.config_from_hf(PUBLISHED))
        hf = AutoModelForCausalLM.from_config(hf_config)
    assert sum(p.numel() for p in model.parameters()) == 3_075_098_624
    assert sum(p.numel() for p in hf.parameters()) == 3_075_098_624
    smollm3.load_weights(model, hf.state_dict())
    assert smollm3.config_from_hf(hf_config.to_dict()) == model.cfg  # with every key there is
    assert [i for i, block in enumerate(model.blocks) if not block.attn.turns] == [*range(3, 36, 4)]


def test_defaults_are_smollm3_3b() -> None:
    """Guards Config's defaults against the published file's values."""
    cfg = smollm3.config_from_hf(PUBLISHED)
    assert dataclasses.replace(cfg, turns=cfg.turns[:4], windows=(None,)) == smollm3.Config()
    assert cfg.turns == cfg.turns[:4] * 9
    assert cfg.windows == (None,) * 36


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
        ({"attention_bias": True}, "attention_bias.*True"),
        ({"mlp_bias": True}, "mlp_bias.*True"),
        ({"rope_parameters": rope(**LLAMA3)}, "rope_scaling.*llama3"),
        ({"rope_parameters": rope(rope_type="yarn", factor=2.0)}, "rope_scaling.*yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_scaling.*dynamic"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.*yarn"),
        ({"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers.*4 entries"),
        ({"layer_types": [FULL] * 3}, "layer_types.*3 entries"),
        ({"layer_types": [FULL, "chunked_attention"] * 3}, "layer_types.*chunked_attention"),
        ({"layer_types": [SLIDING] * 5}, "layer_types.*sliding_attention"),
        ({"layer_types": [SLIDING] * 5, "sliding_window": 8}, "layer_types.*sliding_attention"),
        ({"layer_types": [SLIDING] * 5, "use_sliding_window": True}, "layer_types.*sliding"),
    ],
)
def test_config_that_cannot_be_run(change: dict, said: str) -> None:
    """Guards against running a variant as if it were SmolLM3: the key and its value are said."""
    with pytest.raises(ValueError, match=said) as error:
        smollm3.config_from_hf(smol().to_dict() | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
    ],
)
def test_config_without_a_key(key: str) -> None:
    """Guards against guessing a size."""
    config = smol().to_dict()
    del config[key]
    with pytest.raises(KeyError, match=key):
        smollm3.config_from_hf(config)


# ---- mistakes

PLAIN, UNTIED, FLAGS, WINDOW = "plain", "untied", "flags", "window"
SILENT, SWITCHED_OFF = "silent config", "silent config, window switched off"
SPOILT = {
    PLAIN: smol(rms_norm_eps=0.01, head_dim=12),
    UNTIED: smol(tie_word_embeddings=False),
    FLAGS: smol(no_rope_layers=[0, 1, 1, 0, 0]),
    WINDOW: windowed(layer_types=[SLIDING, FULL, SLIDING, FULL, FULL]),
    SILENT: windowed(rope_parameters=rope(2_000_000.0)),
    SWITCHED_OFF: smol(sliding_window=8, rope_parameters=rope(2_000_000.0)),
}
IF = "        if self.turns:\n"
TURN_Q = "            q_BTHK = rope(q_BTHK, turn)\n"
TURN_K = "            k_BTJK = rope(k_BTJK, turn)\n"
BY_LAYER = "(each[layer % len(each)] for each in (cfg.windows, cfg.turns))"
KIND = "if turn or not window else"
MUTANTS = {
    # which layers turn
    "every layer turns": (PLAIN, "if self.turns: -> if True:"),
    "no layer turns": (PLAIN, "if self.turns: -> if False:"),
    "the fourth turns, the others do not": (PLAIN, "if self.turns: -> if not self.turns:"),
    "flags read as the name says": (PLAIN, "bool(turn) for turn -> not turn for turn"),
    "flags read as the name says, by hand": (FLAGS, "bool(turn) for turn -> not turn for turn"),
    "flags ignored": (FLAGS, 'hf.get("no_rope_layers") or default -> default'),
    "off by one layer, forwards": (PLAIN, "layer % len(each) -> (layer + 1) % len(each)"),
    "off by one layer, backwards": (FLAGS, "layer % len(each) -> (layer - 1) % len(each)"),
    "interval off by one layer": (SILENT, "(layer + 1) % interval -> layer % interval"),
    "interval off by one layer, back": (SILENT, "(layer + 1) % interval -> (layer + 2) % interval"),
    "interval inverted": (SILENT, "% interval != 0 -> % interval == 0"),
    "interval of five": (SILENT, 'hf.get("no_rope_layer_interval", 4) -> 5'),
    "queries turned everywhere": (PLAIN, f"{IF}{TURN_Q} -> {TURN_Q[4:]}{IF}"),
    "keys turned everywhere": (PLAIN, f"{TURN_K} -> {TURN_K[4:]}"),
    "values turned": (PLAIN, "append(k_BTJK, v_BTJK -> append(k_BTJK, rope(v_BTJK, turn)"),
    # how they turn
    "base of transformers' class": (PLAIN, "rope_theta=theta -> rope_theta=2_000_000.0"),
    "base of Llama 2": (PLAIN, "rope_theta=theta -> rope_theta=10_000.0"),
    "base absent, Llama's": (SILENT, "2_000_000.0 -> 10_000.0"),
    "base absent, the published": (SILENT, 'hf.get("rope_theta", 2_000_000.0) -> 5_000_000.0'),
    "rotary pairs side by side": (
        PLAIN,
        "x_BTHK.chunk(2, dim=-1) -> x_BTHK[..., ::2], x_BTHK[..., 1::2]",
    ),
    "turned the other way": (PLAIN, "a_BTHP * cos_BT1P - b_BTHP -> a_BTHP * cos_BT1P + b_BTHP"),
    # windows
    "windows in the wrong layers": (
        WINDOW,
        f"{BY_LAYER} -> (cfg.windows[layer - 1], cfg.turns[layer])",
    ),
    "windows in no layer": (WINDOW, f"{BY_LAYER} -> (None, cfg.turns[layer])"),
    "windows in all layers": (WINDOW, f"{BY_LAYER} -> (8, cfg.turns[layer])"),
    "windows where layers turn": (SILENT, f"{KIND} -> if not turn or not window else"),
    "windows in all layers by default": (SILENT, f"{KIND} -> if not window else"),
    "windows without their switch": (SWITCHED_OFF, 'if hf.get("use_sliding_window") else None -> '),
    "window one too wide": (WINDOW, "> q_pos_BT1 - window -> >= q_pos_BT1 - window"),
    "window one too narrow": (WINDOW, "> q_pos_BT1 - window -> > q_pos_BT1 - window + 1"),
    "ring one off": (WINDOW, "[:, n_old % self.window] -> [:, (n_old + 1) % self.window]"),
    "first long read without a mask": (WINDOW, "and n_new <= (self.window or n_new) -> "),
    # heads, norms, output
    "query heads interleaved": (
        PLAIN,
        "y_BHTK.transpose(1, 2) -> "
        "y_BHTK.transpose(1, 2).unflatten(2, (k_BSJK.shape[2], -1)).transpose(2, 3).flatten(2, 3)",
    ),
    "keys repeated in turn": (
        PLAIN,
        "k_BSJK.transpose(1, 2), -> k_BSJK.transpose(1, 2).repeat(1, 3, 1, 1),",
        "v_BSJK.transpose(1, 2), -> v_BSJK.transpose(1, 2).repeat(1, 3, 1, 1),",
    ),
    "key heads backwards": (PLAIN, "k_BSJK.transpose(1, 2), -> k_BSJK.flip(2).transpose(1, 2),"),
    "untied head is the embedding": (UNTIED, "self.embed if cfg.tied else self.head -> self.embed"),
    "tied head is its own": (
        PLAIN,
        'hf.get("tie_word_embeddings", True) -> False',
        "if missing: -> if False:",
    ),
    "tied if the config is silent": (
        SILENT,
        'hf.get("tie_word_embeddings", True) -> hf.get("tie_word_embeddings", False)',
        "if missing: -> if False:",
    ),
    "epsilon fixed": (PLAIN, "mean_square + self.eps -> mean_square + 1e-6"),
    "norms exchanged": (
        PLAIN,
        "{}.post_attention_layernorm -> {}.exchanged",
        "{}.input_layernorm -> {}.post_attention_layernorm",
        "{}.exchanged -> {}.input_layernorm",
    ),
    "final norm lost": (PLAIN, "x_BTD = self.norm(x_BTD) -> pass"),
    "scale of the width": (PLAIN, "self.head_dim**-0.5 -> (x_BTD.shape[-1] / 6) ** -0.5"),
    "padding is seen": (PLAIN, " & ((k_pos_B1S >= 0) | (q_pos_BT1 < 0)) -> "),
    "padding without a mask": (PLAIN, "self.n_pad_B is not None or -> "),
    "later chunks without a mask": (PLAIN, "(first or n_new == 1) -> (first or n_new >= 1)"),
    "positions start again with each call": (PLAIN, "self.n_seen + torch.arange -> torch.arange"),
    "last_only gives the first": (PLAIN, "x_BTD[:, -1:] if -> x_BTD[:, :1] if"),
}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, PreTrainedModel]]:
    """Folders that transformers wrote, and the models in them; they are right as they are."""
    made = {}
    for name, config in SPOILT.items():
        hf = reference(config, scale=2.0)
        folder = tmp_path_factory.mktemp(name.replace(" ", "_").replace(",", ""))
        hf.save_pretrained(folder)
        if name in (SILENT, SWITCHED_OFF):
            file = folder / "config.json"
            bare = silent(json.loads(file.read_text(encoding="utf-8")))
            assert not {"no_rope_layers", "layer_types", "rope_theta"} & bare.keys()
            file.write_text(json.dumps(bare), encoding="utf-8")
        made[name] = folder, hf
        assert_equal(smollm3.load_folder(folder), hf)
    return made


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str, spoilt: dict[str, tuple[Path, PreTrainedModel]]) -> None:
    """Guards the comparison with transformers: with a mistake in the source it must fail."""
    case, *changes = MUTANTS[name]
    folder, hf = spoilt[case]
    assert_noticed(mutant(smollm3, *changes).load_folder(folder), hf)


# ---- parts


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_ring(window: int | None, padded: bool) -> None:
    """Guards the cache: no token is lost, none is seen that is too old, at any chunk size."""
    check_ring(smollm3, window, padded)


@pytest.mark.parametrize("window", [None, 24])
def test_buffers_double(window: int | None) -> None:
    """Guards the cost of a token, and the memory of a layer with a window."""
    check_growth(smollm3, window)


def test_first_read_is_exact() -> None:
    """Guards the memory of a long prompt."""
    check_first_read_is_exact(smollm3)


def test_causal_mask_by_loops() -> None:
    """Guards who sees whom."""
    check_mask_by_loops(smollm3)


def test_masks_are_built_only_where_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards speed and memory: no mask larger than new x seen, and none that would be all true."""
    cfg = smollm3.config_from_hf(windowed(num_hidden_layers=4).to_dict())
    assert cfg.windows == (None, None, None, 8)
    model = smollm3.Transformer(cfg)
    tokens_BT = torch.zeros(3, 40, dtype=torch.long)

    def built(cache: list, n: int) -> list:
        return masks_built(smollm3, monkeypatch, lambda: model(tokens_BT[:, :n], cache))

    cache = model.new_cache()
    assert built(cache, 8) == []  # a first read within the window
    assert [built(cache, 1) for _ in range(10)] == [[]] * 10
    assert built(cache, 5) == [((3, 5, 23), None)] * 3 + [((3, 5, 8 + 5), 8)]
    assert built(cache, 1) == []
    assert built(model.new_cache(), 30) == [((3, 30, 30), 8)]  # only the layer with a window
    cache = model.new_cache(torch.tensor([0, 3, 9]))
    assert built(cache, 12) == [((3, 12, 12), None)] * 3 + [((3, 12, 12), 8)]
    assert built(cache, 1) == [((3, 1, 13), None)] * 3 + [((3, 1, 8), 8)]


def test_bfloat16_is_as_good_as_transformers(tmp_path: Path) -> None:
    """Guards the rounding in bfloat16: an error of 2 %, and at most 1.5 times transformers'."""
    configs = [smol(), smol(tie_word_embeddings=False), windowed(), smol(num_key_value_heads=6)]
    ours, theirs = bfloat16_errors(smollm3, configs, tmp_path)
    assert ours < 0.02
    assert ours < 1.5 * theirs


@pytest.mark.parametrize("name", ["every fourth", "untied", "window"])
def test_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    """Guards training: no part is cut off from the loss, not by the cache's buffers either."""
    hf = reference(CASES[name])
    hf.save_pretrained(tmp_path)
    check_gradients(smollm3, smollm3.load_folder(tmp_path), hf)


# ---- generation

Lively = tuple[smollm3.Transformer, PreTrainedModel]


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Lively:
    """Ours and transformers': a model with a window, whose greedy texts vary."""
    folder = tmp_path_factory.mktemp("lively")
    hf = reference(windowed(tie_word_embeddings=False), scale=3.0)
    hf.save_pretrained(folder)
    return smollm3.load_folder(folder), hf


def test_generate_equals_transformers(lively: Lively) -> None:
    """Guards greedy generation, and that the cache is used: one token a step after the prompt."""
    equals_generate(smollm3, *lively)


def test_generate_padded_batch(lively: Lively) -> None:
    """Guards prompts of unequal length in one batch."""
    same_alone_and_padded(smollm3, lively[0])


def test_generate_goes_on(lively: Lively) -> None:
    """Guards a cache that is handed from one call to the next."""
    goes_on(smollm3, lively[0])


def test_decoding_reads_one_token_a_step() -> None:
    """Guards the cost of a step: in no layer is an old token computed again."""
    model = smollm3.Transformer(smollm3.config_from_hf(smol().to_dict()))
    read = [forward_lengths(part) for part in (model, *(block.attn for block in model.blocks))]
    list(smollm3.generate(model, torch.zeros(1, 20, dtype=torch.long), 15))
    assert read == [[20] + [1] * 14] * 6


# ---- loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A folder that transformers wrote, with a tied head, and the model in it."""
    folder = tmp_path_factory.mktemp("saved")
    hf = reference(smol())
    hf.save_pretrained(folder)
    return folder, hf


@pytest.mark.parametrize(
    "extra",
    [
        {"lm_head.weight": (97, 48)},
        {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (4,) for i in range(5)},
        {"model.rotary_emb.inv_freq": (4,)},
    ],
    ids=["tied head", "rotary tables", "one rotary table"],
)
def test_tensors_that_say_nothing_new(
    extra: dict[str, tuple[int, ...]], saved: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    """Guards files with a second copy of the tied head, or rotary tables of older days."""
    folder, hf = saved
    state = load_file(folder / "model.safetensors")
    save_file(state | {k: torch.zeros(v) for k, v in extra.items()}, tmp_path / "model.safetensors")
    tmp_path.joinpath("config.json").write_bytes(folder.joinpath("config.json").read_bytes())
    assert_equal(smollm3.load_folder(tmp_path), hf, n=24)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.embed_tokens.weight", "embed.weight"),
        ("model.norm.weight", "norm.weight"),
        ("model.layers.3.self_attn.k_proj.weight", "blocks.3.attn.k_proj.weight"),
        ("model.layers.4.input_layernorm.weight", "blocks.4.attn_norm.weight"),
        ("model.layers.2.post_attention_layernorm.weight", "blocks.2.mlp_norm.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blocks.0.mlp.down_proj.weight"),
    ],
)
def test_each_tensor_must_find_its_partner(
    theirs: str, ours: str, saved: tuple[Path, PreTrainedModel]
) -> None:
    """Guards strict loading: missing, left over, misshapen; both names and shapes are said."""
    state = load_file(saved[0] / "model.safetensors")
    model = smollm3.load_folder(saved[0])
    with pytest.raises(KeyError) as error:
        smollm3.load_weights(model, {name: w for name, w in state.items() if name != theirs})
    assert theirs in str(error.value) and ours in str(error.value)
    extra = theirs.replace("model.", "model.extra.", 1)
    with pytest.raises(KeyError, match=extra):
        smollm3.load_weights(model, state | {extra: state[theirs]})
    wrong = torch.zeros(1, *state[theirs].shape[1:])  # a plain copy would broadcast it
    with pytest.raises(ValueError) as error:
        smollm3.load_weights(model, state | {theirs: wrong})
    for part in (theirs, ours, str(tuple(wrong.shape)), str(tuple(state[theirs].shape))):
        assert part in str(error.value)


def test_missing_head_is_an_error(saved: tuple[Path, PreTrainedModel]) -> None:
    """Guards untied models: the head must be in the file."""
    state = load_file(saved[0] / "model.safetensors")
    untied = smollm3.config_from_hf(smol(tie_word_embeddings=False).to_dict())
    with pytest.raises(KeyError, match="lm_head.weight"):
        smollm3.load_weights(smollm3.Transformer(untied), state)
