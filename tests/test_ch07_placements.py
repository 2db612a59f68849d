"""Placements of the norms against blocks written by hand, soft caps against their formula."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from ch07_norm_placement import placements
from ch07_norm_placement.norm_placement import Config, Transformer
from ch07_norm_placement.placements import PLACEMENTS, build, stream_sizes
from tests.parity import TOLERANCE, brute_force_attention, mutant

pytestmark = pytest.mark.usefixtures("one_thread")

CFG = Config(
    vocab_size=50,
    n_layers=3,
    d_model=24,
    n_heads=4,
    n_kv_heads=2,
    head_dim=6,
    windows=(5, None),
    d_latent=None,
    d_ff=32,
    n_experts=0,
)


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.3)
    return model.eval()


@torch.no_grad()
def by_hand(model: Transformer, placement: str, tokens_BT: Tensor) -> Tensor:
    """Logits (B, T, V), with the wiring of each placement as the papers draw it."""
    cache = model.new_cache()
    pos_BT = cache[0].positions(tokens_BT)
    freq_P = placements.rope_frequencies(model.cfg.head_dim, model.cfg.rope_theta)
    turn = placements.rope_angles(pos_BT, freq_P)
    x = model.embed(tokens_BT)
    for block, layer_cache in zip(model.blocks, cache, strict=True):

        def attn(y: Tensor, block: nn.Module = block, layer: object = layer_cache) -> Tensor:
            return block.attn(y, pos_BT, turn, layer)

        if placement == "post":
            x = block.attn_norm(x + attn(x))
            x = block.mlp_norm(x + block.mlp(x))
        elif placement == "pre":
            x = x + attn(block.attn_norm(x))
            x = x + block.mlp(block.mlp_norm(x))
        elif placement == "out":
            x = x + block.attn_out_norm(attn(x))
            x = x + block.mlp_out_norm(block.mlp(x))
        elif placement == "sandwich":
            x = x + block.attn_out_norm(attn(block.attn_norm(x)))
            x = x + block.mlp_out_norm(block.mlp(block.mlp_norm(x)))
        elif placement == "parallel":
            y = block.attn_norm(x)
            x = x + attn(y) + block.mlp(y)
        else:
            x = x + attn(x)
            x = x + block.mlp(x)
    if placement not in ("post", "none"):
        x = model.norm(x)
    return x @ model.embed.weight.T


N_NORMS = {"post": 2, "pre": 2, "out": 2, "sandwich": 4, "parallel": 1, "none": 0}  # a block


@pytest.mark.parametrize("qk_norm", [None, "head", "full"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_wiring_and_norms(placement: str, qk_norm: str | None) -> None:
    """Guards where each norm stands, how many there are, and that the cache still works."""
    model = shaken(build(dataclasses.replace(CFG, qk_norm=qk_norm), placement))
    tokens_BT = torch.randint(50, (2, 11))
    with torch.no_grad():
        logits_BTV, cache = model(tokens_BT), model.new_cache()
        parts = [model(part, cache) for part in tokens_BT.split([4, 1, 6], dim=1)]
    for found_BTV in (by_hand(model, placement, tokens_BT), torch.cat(parts, dim=1)):
        assert (found_BTV - logits_BTV).abs().max() < TOLERANCE * logits_BTV.abs().max()
    names = [name for name, _ in model.blocks[0].named_parameters() if "norm" in name]
    assert len([n for n in names if not n.startswith("attn.")]) == N_NORMS[placement]
    assert len([n for n in names if n.startswith("attn.")]) == (0 if qk_norm is None else 2)
    assert any(name.startswith("norm.") for name, _ in model.named_parameters()) == (
        placement not in ("post", "none")
    )


def test_capped_scores_by_loops() -> None:
    """Guards the cap's place: on the scaled scores, before the mask and the softmax."""
    q_BTHK = 4 * torch.randn(2, 6, 4, 5)
    k_BSJK, v_BSJK = 4 * torch.randn(2, 2, 6, 2, 5)
    mask_BTS = torch.ones(2, 6, 6, dtype=torch.bool).tril()
    found = placements.attend_capped(q_BTHK, k_BSJK, v_BSJK, mask_BTS, 5**-0.5, 3.0)
    expected = brute_force_attention(
        q_BTHK, k_BSJK, v_BSJK, lambda b, t, s: s <= t, 5**-0.5, cap=3.0
    )
    torch.testing.assert_close(found, expected.float())


def test_caps_in_a_model() -> None:
    """Guards the wiring of both caps: wide ones change nothing, narrow ones bound the logits."""
    tokens_BT = torch.randint(50, (2, 11))
    models = [build(CFG, "sandwich", *caps) for caps in ((None, None), (1e4, 1e4), (0.5, 2.0))]
    weights = shaken(models[0]).state_dict()
    with torch.no_grad():
        plain, wide, narrow = (
            (model.load_state_dict(weights), model.eval()(tokens_BT))[1] for model in models
        )
    torch.testing.assert_close(wide, plain, rtol=1e-4, atol=1e-4)
    assert narrow.abs().max() <= 2 < plain.abs().max()
    assert not torch.allclose(narrow, 2 * torch.tanh(plain / 2), atol=1e-3)  # the scores' cap acts


@pytest.mark.parametrize(
    ("placement", "change"),
    [
        ("post", "self.attn_norm(x_BTD + self.attn( -> (x_BTD + self.attn("),
        ("post", "x_BTD = self.mlp_norm(x_BTD + self.mlp(x_BTD)) -> "
                 "x_BTD = x_BTD + self.mlp_norm(self.mlp(x_BTD))"),
        ("parallel", "+ self.mlp(normed_BTD) -> + self.mlp(x_BTD)"),
        ("parallel", "return x_BTD + self.attn( -> return normed_BTD + self.attn("),
        ("out", '"out": "out" -> "out": "in"'),
        ("none", '("post", "none"): -> ("post",):'),
    ],
)  # fmt: skip
def test_mistakes_are_noticed(placement: str, change: str) -> None:
    """Guards the comparison with the blocks by hand."""
    spoiled = mutant(placements, change)
    model = shaken(spoiled.build(CFG, placement))
    tokens_BT = torch.randint(50, (2, 11))
    try:
        expected_BTV = by_hand(model, placement, tokens_BT)
        with torch.no_grad():
            wrong = (model(tokens_BT) - expected_BTV).abs().max() / expected_BTV.abs().max()
    except AttributeError:  # a norm that is not there
        return
    n_norms = len([n for n, _ in model.blocks[0].named_parameters() if "_norm." in n]) - 2
    final = any(name.startswith("norm.") for name, _ in model.named_parameters())
    assert wrong > 1e-3 or n_norms != N_NORMS[placement] or final


def test_unknown_placement() -> None:
    """Guards the message."""
    with pytest.raises(ValueError, match="placement: 'middle', expected one of post"):
        build(CFG, "middle")


def test_stream_grows_where_outputs_are_normed() -> None:
    """Guards what the demo shows: normed outputs are of size one at any depth, small ones not."""
    tokens_BT = torch.randint(50, (2, 11))
    sizes = {placement: stream_sizes(build(CFG, placement), tokens_BT) for placement in PLACEMENTS}
    assert all(len(found) == CFG.n_layers + 1 for found in sizes.values())
    assert sizes["sandwich"][-1] > 10 * sizes["pre"][-1]
    assert math.isclose(sizes["post"][-1], 1, rel_tol=0.05)
