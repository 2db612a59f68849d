"""Weights as integers: what they cost in accuracy and what they save in bytes."""

from dataclasses import replace

import pytest
import torch

from ch08_full_models import deepseek_v3, gemma3, llama3
from ch08_full_models.speed import quantize, weight_bytes

SMALL = {"vocab_size": 211, "n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 2}


def small_model(family):
    torch.manual_seed(0)
    cfg = family.Config(**SMALL, head_dim=32, d_ff=96)
    model = family.Transformer(cfg).eval()
    for param in model.parameters():
        if param.ndim > 1:
            param.data.normal_(std=0.2)
    return model


@pytest.mark.parametrize("family", [llama3, gemma3])
@pytest.mark.parametrize("kind, levels", [("int8", 254), ("int4", 15)])
def test_each_weight_is_within_half_a_step(family, kind, levels):
    model = small_model(family)
    before = {n: p.detach().clone() for n, p in model.blocks.named_parameters() if p.ndim > 1}
    quantize(model, kind)
    assert before and all(isinstance(n, str) for n in before)
    for name, w in before.items():
        module = model.blocks.get_submodule(name.removesuffix(".weight"))
        if kind == "int8":
            step = 2 * w.abs().amax(dim=1, keepdim=True) / levels
            error = (module.weight - w).abs() / step
        else:
            groups = w.unflatten(1, (-1, 32))
            step = (groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)) / levels
            error = (module.weight - w).abs().unflatten(1, (-1, 32)) / step
        assert 0.2 < error.max() <= 0.5001  # rounded, and to the nearest


def test_bytes_fall_as_promised_and_outputs_stay_close():
    tokens_BT = torch.randint(0, 211, (2, 12))
    drift, size = {}, {}
    for kind in (None, "int8", "int4"):
        model = small_model(llama3)
        reference = model(tokens_BT)
        if kind:
            assert quantize(model, kind) is model
        with torch.no_grad():
            drift[kind] = ((model(tokens_BT) - reference).norm() / reference.norm()).item()
        size[kind] = weight_bytes(model) - model.embed.weight.nbytes
    assert drift[None] == 0 < drift["int8"] < 0.05
    assert 5 * drift["int8"] < drift["int4"] < 1
    assert size["int8"] < 0.30 * size[None]  # 1 byte of 4, and the scales
    assert size["int4"] < 0.20 * size[None]  # half a byte, and two floats for 32 weights


def test_a_kind_that_is_not_there_and_a_width_that_does_not_divide():
    with pytest.raises(ValueError, match="'int2', expected one of int8, int4"):
        quantize(small_model(llama3), "int2")
    odd = llama3.Transformer(llama3.Config(**SMALL | {"d_model": 48}, head_dim=16, d_ff=96))
    with pytest.raises(ValueError, match="width 48, not a multiple of 32"):
        quantize(odd, "int4")


def test_latent_attention_and_experts_too():
    """Guards what is read besides being called: kv_b_proj in the absorbed form, and the router."""
    torch.manual_seed(0)
    sizes = {key: SMALL[key] for key in ("vocab_size", "n_layers", "d_model", "n_heads")}
    cfg = deepseek_v3.Config(
        **sizes, head_dim=32, d_latent=64, d_rope=16, d_value=32, d_ff=96, d_expert=64, n_experts=6
    )
    model = deepseek_v3.Transformer(replace(cfg, n_active=2)).eval()
    tokens_BT = torch.randint(0, 211, (2, 12))

    def read() -> torch.Tensor:
        cache = model.new_cache()
        return torch.cat([model(part, cache) for part in tokens_BT.split((9, 1, 1, 1), 1)], dim=1)

    with torch.no_grad():
        before = read()
        quantize(model, "int8")
        assert 0 < (read() - before).norm() / before.norm() < 0.05
