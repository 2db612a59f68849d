"""olmo2.py against transformers' OLMo 2, with each of its parts switched on."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Olmo2Config, PreTrainedModel

from ch08_full_models import olmo2
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
    in_bfloat16,
    masks_built,
    older,
    oldest,
    rope,
    silent,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def olmo(**changes: object) -> Olmo2Config:
    return Olmo2Config(**SIZES | changes)


CASES = {  # six query heads of width 8, two key heads, three layers; untied, as all OLMo 2 are
    "grouped": olmo(),
    "every head its own keys": olmo(num_key_value_heads=6),
    "one key head": olmo(num_key_value_heads=1),
    "one head": olmo(num_attention_heads=1, num_key_value_heads=1, head_dim=16),
    "32B's heads": olmo(num_attention_heads=40, num_key_value_heads=8, head_dim=4),
    "narrow heads": olmo(head_dim=4),
    "wide heads": olmo(head_dim=32, hidden_size=36),
    "wide heads, every one its own keys": olmo(head_dim=32, num_key_value_heads=6),
    "one layer": olmo(num_hidden_layers=1),
    "six layers": olmo(num_hidden_layers=6),
    "low base": olmo(rope_parameters=rope(50.0)),
    "published base": olmo(rope_parameters=rope(500_000.0)),
    "published epsilon": olmo(rms_norm_eps=1e-6),
    "large epsilon": olmo(rms_norm_eps=0.05),
}


def drawn(seed: int) -> Olmo2Config:
    """A config drawn from what the family can be."""
    rng = random.Random(seed)
    n_kv_heads, groups = rng.randint(1, 3), rng.randint(1, 5)
    n_heads = n_kv_heads * groups
    return olmo(
        vocab_size=rng.randint(20, 200),
        hidden_size=n_heads * rng.randint(3, 12),
        intermediate_size=rng.randint(10, 120),
        num_hidden_layers=rng.randint(1, 5),
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=2 * rng.randint(2, 10),
        rms_norm_eps=rng.choice([1e-6, 1e-5, 1e-2]),
        rope_parameters=rope(rng.choice([100.0, 1e4, 5e5])),
    )


CASES |= {f"drawn {seed}": drawn(seed) for seed in range(20)}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """Guards the forward pass: whole, with the cache, in chunks, padded; from one file or many."""
    hf = reference(CASES[name], seed=len(name), scale=1.5)
    many = len(name) % 2 == 0
    hf.save_pretrained(tmp_path, max_shard_size="4KB" if many else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == many
    assert_equal(olmo2.load_folder(tmp_path), hf, seed=len(name))


OFF = {  # a part and what it is when it does nothing
    "rotary base": ("low base", dict(rope_theta=10_000.0)),
    "published base": ("published base", dict(rope_theta=10_000.0)),
    "epsilon": ("large epsilon", dict(norm_eps=1e-5)),
}


@pytest.mark.parametrize("part", OFF)
def test_parts_are_switched_on(part: str, tmp_path: Path) -> None:
    """Guards the cases above: without the part the logits are others. MUTANTS has the norms."""
    name, off = OFF[part]
    hf = reference(CASES[name])
    hf.save_pretrained(tmp_path)
    model = olmo2.load_folder(tmp_path)
    without = olmo2.Transformer(dataclasses.replace(model.cfg, **off))
    olmo2.load_weights(without, model.state_dict())
    assert next(errors(without, hf))[1] > 1e-3


def test_positions_beyond_4096(tmp_path: Path) -> None:
    """Guards the angles far out: they must be computed in float32, at every step of a long text."""
    config = olmo(
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_size=16,
        head_dim=8,
        max_position_embeddings=8192,
    )
    hf = reference(config)
    hf.save_pretrained(tmp_path)
    model = olmo2.load_folder(tmp_path)
    tokens_1T = torch.randint(97, (1, 4200))
    with torch.no_grad():
        expected_1TV = hf(tokens_1T).logits
        cache = model.new_cache()
        found_1TV = torch.cat([model(t, cache) for t in tokens_1T.split([4000, 1, 190, 9], 1)], 1)
    assert (found_1TV - expected_1TV).abs().max() < TOLERANCE * expected_1TV.abs().max()


# ---- mistakes

ATTN = "x_BTD + self.attn_out_norm(self.attn(x_BTD, pos_BT, turn, cache))"
MLP = "x_BTD + self.mlp_out_norm(self.mlp(x_BTD))"
Q = "self.q_norm(self.q_proj(x_BTD)).unflatten(-1, (-1, self.head_dim))"
K = "self.k_norm(self.k_proj(x_BTD)).unflatten(-1, (-1, self.head_dim))"
V = "self.v_proj(x_BTD).unflatten(-1, (-1, self.head_dim))"
NORM = "return (x.float() * torch.rsqrt(mean_square + self.eps) * self.weight).type_as(x)"


def by_head(x: str, weight: str) -> str:
    """Source that norms each head of x for itself."""
    head = f"{x}_proj(x_BTD).unflatten(-1, (-1, self.head_dim))"
    return f"{weight} * F.rms_norm({head}, (self.head_dim,), eps={x}_norm.eps)"


PLAIN, OWN = "grouped", "every head its own keys"
SPOILT = {
    PLAIN: olmo(rms_norm_eps=0.01, head_dim=12, rope_parameters=rope(100.0)),
    OWN: olmo(num_key_value_heads=6),
}
MUTANTS = {
    # where a block norms
    "attention normed on the way in": (
        PLAIN,
        f"{ATTN} -> x_BTD + self.attn(self.attn_out_norm(x_BTD), pos_BT, turn, cache)",
    ),
    "MLP normed on the way in": (
        PLAIN,
        f"{MLP} -> x_BTD + self.mlp(self.mlp_out_norm(x_BTD))",
    ),
    "both normed on the way in": (
        PLAIN,
        f"{ATTN} -> x_BTD + self.attn(self.attn_out_norm(x_BTD), pos_BT, turn, cache)",
        f"{MLP} -> x_BTD + self.mlp(self.mlp_out_norm(x_BTD))",
    ),
    "post-LN, attention": (
        PLAIN,
        f"{ATTN} -> self.attn_out_norm(x_BTD + self.attn(x_BTD, pos_BT, turn, cache))",
    ),
    "post-LN, MLP": (PLAIN, f"{MLP} -> self.mlp_out_norm(x_BTD + self.mlp(x_BTD))"),
    "post-LN, both": (
        PLAIN,
        f"{ATTN} -> self.attn_out_norm(x_BTD + self.attn(x_BTD, pos_BT, turn, cache))",
        f"{MLP} -> self.mlp_out_norm(x_BTD + self.mlp(x_BTD))",
    ),
    "attention not normed": (PLAIN, f"{ATTN} -> x_BTD + self.attn(x_BTD, pos_BT, turn, cache)"),
    "MLP not normed": (PLAIN, f"{MLP} -> x_BTD + self.mlp(x_BTD)"),
    "MLP normed by attention's norm": (
        PLAIN,
        f"{MLP} -> x_BTD + self.attn_out_norm(self.mlp(x_BTD))",
    ),
    "norms named as in Llama": (
        PLAIN,
        "{}.post_attention_layernorm -> {}.exchanged",
        "{}.post_feedforward_layernorm -> {}.post_attention_layernorm",
        "{}.exchanged -> {}.post_feedforward_layernorm",
    ),
    "final norm lost": (PLAIN, "x_BTD = self.norm(x_BTD) -> pass"),
    # queries and keys
    "queries normed head by head": (
        PLAIN,
        f"{Q} -> {by_head('self.q', 'self.q_norm.weight.view(-1, self.head_dim)')}",
    ),
    "keys normed head by head": (
        PLAIN,
        f"{K} -> {by_head('self.k', 'self.k_norm.weight.view(-1, self.head_dim)')}",
    ),
    "one head's weights for all": (
        PLAIN,
        f"{Q} -> {Q} / self.q_norm.weight.view(-1, self.head_dim)"
        " * self.q_norm.weight[: self.head_dim]",
    ),
    "weights in another order": (
        PLAIN,
        "self.q_norm(self.q_proj(x_BTD)) -> self.q_norm(self.q_proj(x_BTD)"
        ".unflatten(-1, (-1, self.head_dim)).mT.flatten(-2))"
        ".unflatten(-1, (self.head_dim, -1)).mT.flatten(-2)",
    ),
    "queries normed after they are turned": (
        PLAIN,
        "self.q_norm(self.q_proj(x_BTD)) -> self.q_proj(x_BTD)",
        "= rope(q_BTHK, turn) -> = self.q_norm(rope(q_BTHK, turn).flatten(-2)).view_as(q_BTHK)",
    ),
    "keys normed after they are turned": (
        PLAIN,
        "self.k_norm(self.k_proj(x_BTD)) -> self.k_proj(x_BTD)",
        "= rope(k_BTJK, turn) -> = self.k_norm(rope(k_BTJK, turn).flatten(-2)).view_as(k_BTJK)",
    ),
    "norms of queries and keys exchanged": (
        OWN,
        "self.q_norm(self.q_proj -> self.k_norm(self.q_proj",
        "self.k_norm(self.k_proj -> self.q_norm(self.k_proj",
    ),
    "names of their norms exchanged": (
        OWN,
        "self_attn.q_norm -> self_attn.exchanged",
        "self_attn.k_norm -> self_attn.q_norm",
        "self_attn.exchanged -> self_attn.k_norm",
    ),
    "queries' norm for the keys": (OWN, "self.k_norm(self.k_proj -> self.q_norm(self.k_proj"),
    "queries not normed": (PLAIN, "self.q_norm(self.q_proj(x_BTD)) -> self.q_proj(x_BTD)"),
    "keys not normed": (PLAIN, "self.k_norm(self.k_proj(x_BTD)) -> self.k_proj(x_BTD)"),
    "values normed": (PLAIN, "self.v_proj(x_BTD) -> self.k_norm(self.v_proj(x_BTD))"),
    "no scale besides": (PLAIN, "self.head_dim**-0.5 -> 1.0"),
    # the norm itself
    "no epsilon": (PLAIN, "mean_square + self.eps -> mean_square"),
    "epsilon fixed": (PLAIN, "mean_square + self.eps -> mean_square + 1e-6"),
    "queries' epsilon fixed": (
        PLAIN,
        "RMSNorm(cfg.n_heads * cfg.head_dim, cfg.norm_eps) -> "
        "RMSNorm(cfg.n_heads * cfg.head_dim, 1e-6)",
    ),
    "keys' epsilon fixed": (
        PLAIN,
        "RMSNorm(cfg.n_kv_heads * cfg.head_dim, cfg.norm_eps) -> "
        "RMSNorm(cfg.n_kv_heads * cfg.head_dim, 1e-6)",
    ),
    "epsilon outside the root": (
        PLAIN,
        "torch.rsqrt(mean_square + self.eps) -> 1 / (mean_square.sqrt() + self.eps)",
    ),
    "norm by the sum": (PLAIN, "x.float().square().mean( -> x.float().square().sum("),
    "weight raised as in Gemma": (PLAIN, "* self.weight).type_as -> * (1 + self.weight)).type_as"),
    # what it shares with Llama
    "head is the embedding": (
        PLAIN,
        "self.head(x_BTD -> F.linear(x_BTD",
        "if last_only else x_BTD) -> if last_only else x_BTD, self.embed.weight)",
    ),
    "base ignored": (PLAIN, "rope_theta=theta -> rope_theta=500_000.0"),
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
    "rotary pairs side by side": (
        PLAIN,
        "x_BTHK.chunk(2, dim=-1) -> x_BTHK[..., ::2], x_BTHK[..., 1::2]",
    ),
    "later chunks without a mask": (PLAIN, "(first or n_new == 1) -> (first or n_new >= 1)"),
    "padding is seen": (PLAIN, " & ((k_pos_B1S >= 0) | (q_pos_BT1 < 0)) -> "),
    "padding without a mask": (PLAIN, "self.n_pad_B is not None or -> "),
    "padding forgotten": (PLAIN, "LayerCache(None, n_pad_B) -> LayerCache(None)"),
    "positions start again with each call": (PLAIN, "self.n_seen + torch.arange -> torch.arange"),
    "last_only gives the first": (PLAIN, "x_BTD[:, -1:] if -> x_BTD[:, :1] if"),
}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, PreTrainedModel]]:
    """Folders that transformers wrote, and the models in them; they are right as they are."""
    made = {}
    for name, config in SPOILT.items():
        hf = reference(config, scale=2.0)
        made[name] = tmp_path_factory.mktemp(name.replace(" ", "_")), hf
        hf.save_pretrained(made[name][0])
        assert_equal(olmo2.load_folder(made[name][0]), hf)
    return made


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str, spoilt: dict[str, tuple[Path, PreTrainedModel]]) -> None:
    """Guards the comparison with transformers: with a mistake in the source it must fail."""
    case, *changes = MUTANTS[name]
    folder, hf = spoilt[case]
    assert_noticed(mutant(olmo2, *changes).load_folder(folder), hf)


# ---- bfloat16


def test_norm_rounds_in_olmos_order() -> None:
    """Guards RMSNorm in bfloat16, bit by bit: times the weight first, then rounded."""
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    theirs = Olmo2RMSNorm(64, eps=1e-6).bfloat16()
    theirs.weight.data = torch.randn(64).bfloat16()
    ours = olmo2.RMSNorm(64, 1e-6).bfloat16()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(50, 64).bfloat16()
    assert torch.equal(ours(x), theirs(x))
    assert ours(x).dtype == torch.bfloat16


ROUNDING = {
    "Llama's order": f"{NORM} -> "
    "return self.weight * (x.float() * torch.rsqrt(mean_square + self.eps)).type_as(x)",
    "weight rounded product": f"{NORM} -> "
    "return (x.float() * torch.rsqrt(mean_square + self.eps)).type_as(x) * self.weight",
    "statistics in bfloat16": "x.float().square().mean( -> x.square().mean(",
    "root in bfloat16": "torch.rsqrt(mean_square -> torch.rsqrt(mean_square.type_as(x)",
}


@torch.no_grad()
def test_rounding_of_a_loaded_model(tmp_path: Path) -> None:
    """Guards the order of casts, which float32 cannot show, in the first layer of a loaded model.

    Its normed queries and keys are transformers' bit by bit; with a mistake some bits are not.
    """
    reference(olmo()).bfloat16().save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens_BT = torch.randint(97, (4, 30))

    def normed(model: nn.Module, attention: nn.Module) -> list[Tensor]:
        """Queries and keys as they leave their norms."""
        out: list[Tensor] = []
        for norm in (attention.q_norm, attention.k_norm):
            norm.register_forward_hook(lambda *call: out.append(call[2]))
        model(tokens_BT)
        assert [x.dtype for x in out] == [torch.bfloat16] * 2
        return out

    expected = normed(half, half.model.layers[0].self_attn)
    model = in_bfloat16(olmo2, tmp_path)
    for ours, theirs in zip(normed(model, model.blocks[0].attn), expected, strict=True):
        assert torch.equal(ours, theirs)
    for name, change in ROUNDING.items():
        model = in_bfloat16(mutant(olmo2, change), tmp_path)
        for ours, theirs in zip(normed(model, model.blocks[0].attn), expected, strict=True):
            assert (ours != theirs).float().mean() > 0.01, name


def test_bfloat16_is_as_good_as_transformers(tmp_path: Path) -> None:
    """Guards the rounding in bfloat16: an error of 3 %, and at most 1.5 times transformers'."""
    configs = [olmo(), olmo(num_key_value_heads=6), olmo(num_hidden_layers=5), olmo(head_dim=20)]
    ours, theirs = bfloat16_errors(olmo2, configs, tmp_path)
    assert ours < 0.03
    assert ours < 1.5 * theirs


# ---- parts


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_ring(window: int | None, padded: bool) -> None:
    """Guards the cache: no token is lost, none is seen that is too old, at any chunk size."""
    check_ring(olmo2, window, padded)


def test_buffers_double() -> None:
    """Guards the cost of a token, and the memory of a long prompt."""
    check_growth(olmo2, None)
    check_first_read_is_exact(olmo2)


def test_causal_mask_by_loops() -> None:
    """Guards who sees whom."""
    check_mask_by_loops(olmo2)


def test_masks_are_built_only_where_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards speed and memory: no mask larger than new x seen, and none that would be all true."""
    model = olmo2.Transformer(olmo2.config_from_hf(olmo(num_hidden_layers=2).to_dict()))
    tokens_BT = torch.zeros(3, 40, dtype=torch.long)

    def built(cache: list, n: int) -> list:
        return masks_built(olmo2, monkeypatch, lambda: model(tokens_BT[:, :n], cache))

    cache = model.new_cache()
    assert built(cache, 8) == []
    assert [built(cache, 1) for _ in range(10)] == [[]] * 10
    assert built(cache, 5) == [((3, 5, 23), None)] * 2
    assert built(cache, 1) == []
    cache = model.new_cache(torch.tensor([0, 3, 9]))
    assert built(cache, 12) == [((3, 12, 12), None)] * 2
    assert built(cache, 1) == [((3, 1, 13), None)] * 2


@pytest.mark.parametrize("name", ["grouped", "every head its own keys"])
def test_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    """Guards training: no part is cut off from the loss, not by the cache's buffers either."""
    hf = reference(CASES[name])
    hf.save_pretrained(tmp_path)
    check_gradients(olmo2, olmo2.load_folder(tmp_path), hf)


# ---- generation


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> tuple[olmo2.Transformer, PreTrainedModel]:
    """Ours and transformers': a model whose greedy texts vary."""
    folder = tmp_path_factory.mktemp("lively")
    hf = reference(olmo(), scale=3.0)
    hf.save_pretrained(folder)
    return olmo2.load_folder(folder), hf


def test_generate_equals_transformers(lively: tuple[olmo2.Transformer, PreTrainedModel]) -> None:
    """Guards greedy generation, and that the cache is used: one token a step after the prompt."""
    equals_generate(olmo2, *lively)


def test_generate_padded_batch(lively: tuple[olmo2.Transformer, PreTrainedModel]) -> None:
    """Guards prompts of unequal length in one batch."""
    same_alone_and_padded(olmo2, lively[0])


def test_generate_goes_on(lively: tuple[olmo2.Transformer, PreTrainedModel]) -> None:
    """Guards a cache that is handed from one call to the next."""
    goes_on(olmo2, lively[0])


def test_decoding_reads_one_token_a_step() -> None:
    """Guards the cost of a step: in no layer is an old token computed again."""
    model = olmo2.Transformer(olmo2.config_from_hf(olmo().to_dict()))
    read = [forward_lengths(part) for part in (model, *(block.attn for block in model.blocks))]
    list(olmo2.generate(model, torch.zeros(1, 20, dtype=torch.long), 15))
    assert read == [[20] + [1] * 14] * 4


# ---- loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A folder that transformers wrote, and the model in it."""
    folder = tmp_path_factory.mktemp("saved")
    hf = reference(olmo())
    hf.save_pretrained(folder)
    return folder, hf


def test_rotary_tables_are_left_out(saved: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    """Guards files of older days."""
    folder, hf = saved
    state = load_file(folder / "model.safetensors")
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(3)}
    save_file(state | {"model.rotary_emb.inv_freq": torch.zeros(4)}, tmp_path / "model.safetensors")
    tmp_path.joinpath("config.json").write_bytes(folder.joinpath("config.json").read_bytes())
    assert_equal(olmo2.load_folder(tmp_path), hf, n=24)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.embed_tokens.weight", "embed.weight"),
        ("lm_head.weight", "head.weight"),
        ("model.norm.weight", "norm.weight"),
        ("model.layers.1.self_attn.q_norm.weight", "blocks.1.attn.q_norm.weight"),
        ("model.layers.1.self_attn.k_norm.weight", "blocks.1.attn.k_norm.weight"),
        ("model.layers.2.post_attention_layernorm.weight", "blocks.2.attn_out_norm.weight"),
        ("model.layers.0.post_feedforward_layernorm.weight", "blocks.0.mlp_out_norm.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blocks.0.mlp.down_proj.weight"),
    ],
)
def test_each_tensor_must_find_its_partner(
    theirs: str, ours: str, saved: tuple[Path, PreTrainedModel]
) -> None:
    """Guards strict loading: missing, left over, misshapen; both names and shapes are said."""
    state = load_file(saved[0] / "model.safetensors")
    model = olmo2.load_folder(saved[0])
    with pytest.raises(KeyError) as error:
        olmo2.load_weights(model, {name: w for name, w in state.items() if name != theirs})
    assert theirs in str(error.value) and ours in str(error.value)
    extra = f"extra.{theirs}"
    with pytest.raises(KeyError, match=extra):
        olmo2.load_weights(model, state | {extra: state[theirs]})
    wrong = torch.zeros(1, *state[theirs].shape[1:])  # a plain copy would broadcast it
    with pytest.raises(ValueError) as error:
        olmo2.load_weights(model, state | {theirs: wrong})
    for part in (theirs, ours, str(tuple(wrong.shape)), str(tuple(state[theirs].shape))):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["input_layernorm", "pre_feedforward_layernorm"])
def test_norms_of_other_families_are_an_error(
    name: str, saved: tuple[Path, PreTrainedModel]
) -> None:
    """Guards against a checkpoint that norms what goes in, as Llama and Gemma do."""
    state = load_file(saved[0] / "model.safetensors")
    with pytest.raises(KeyError, match=name):
        extra = {f"model.layers.0.{name}.weight": torch.ones(48)}
        olmo2.load_weights(olmo2.load_folder(saved[0]), state | extra)


def test_norms_of_one_head_are_an_error(saved: tuple[Path, PreTrainedModel]) -> None:
    """Guards against norms of Qwen3's kind, whose weights would broadcast."""
    state = load_file(saved[0] / "model.safetensors")
    name = "model.layers.0.self_attn.q_norm.weight"
    with pytest.raises(ValueError, match=name):
        olmo2.load_weights(olmo2.load_folder(saved[0]), state | {name: torch.ones(8)})


ONE_B = dict(  # config.json of OLMo-2-0425-1B; max_position_embeddings is unverified
    model_type="olmo2",
    vocab_size=100352,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=16,
    hidden_act="silu",
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    rope_theta=500000,
    rope_scaling=None,
    tie_word_embeddings=False,
    attention_bias=False,
    eos_token_id=100257,
    pad_token_id=100277,
    torch_dtype="bfloat16",
)


def sized(d_model: int, d_ff: int, n_layers: int, n_heads: int, n_kv_heads: int) -> dict:
    """The config of another size."""
    return ONE_B | dict(
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
    )


PUBLISHED = {  # and how many parameters each has
    "OLMo-2-0425-1B": (ONE_B, 1_484_916_736),
    "OLMo-2-1124-7B": (sized(4096, 11008, 32, 32, 32), 7_298_617_344),
    "OLMo-2-1124-13B": (sized(5120, 13824, 40, 40, 40), 13_716_198_400),
    "OLMo-2-0325-32B": (sized(5120, 27648, 64, 40, 8), 32_234_279_936),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    """Guards the published configs, without their bytes: parameters, names and shapes."""
    published, n_params = PUBLISHED[name]
    hf_config = Olmo2Config(**published)
    with torch.device("meta"):
        model = olmo2.Transformer(olmo2.config_from_hf(published))
        hf = AutoModelForCausalLM.from_config(hf_config)
    assert sum(p.numel() for p in model.parameters()) == n_params
    assert sum(p.numel() for p in hf.parameters()) == n_params
    olmo2.load_weights(model, hf.state_dict())
    assert olmo2.config_from_hf(hf_config.to_dict()) == model.cfg  # with every key there is


def test_defaults_are_olmo_2_1b() -> None:
    """Guards Config's defaults against the published file's values."""
    assert olmo2.config_from_hf(ONE_B) == olmo2.Config()


@pytest.mark.parametrize("edit", [older, oldest, silent])
@pytest.mark.parametrize("name", CASES)
def test_older_configs(name: str, edit: Callable[[dict], dict], tmp_path: Path) -> None:
    """Guards config.json as older versions wrote it: it gives the same Config."""
    CASES[name].save_pretrained(tmp_path)
    today = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "rope_parameters" in today
    old = edit(json.loads(json.dumps(today)))
    assert "rope_parameters" not in old
    assert olmo2.config_from_hf(old) == olmo2.config_from_hf(today)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
        ({"attention_bias": True}, "attention_bias.*True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings.*True"),
        ({"rope_parameters": rope(**LLAMA3)}, "rope_scaling.*llama3"),
        ({"rope_parameters": rope(rope_type="yarn", factor=4.0)}, "rope_scaling.*yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_scaling.*linear"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "dynamic"}}, "rope.*dynamic"),
    ],
)
def test_config_that_cannot_be_run(change: dict, said: str) -> None:
    """Guards against running a variant as if it were OLMo 2: the key and its value are said."""
    with pytest.raises(ValueError, match=said) as error:
        olmo2.config_from_hf(olmo().to_dict() | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
    ],
)
def test_config_without_a_key(key: str) -> None:
    """Guards against guessing a size."""
    config = olmo().to_dict()
    del config[key]
    with pytest.raises(KeyError, match=key):
        olmo2.config_from_hf(config)
