"""Converting heads: what stays, what is pooled, and that the committed results are whole."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ch03_gqa import gqa, uptrain
from ch03_gqa.uptrain import to_gqa
from tests.parity import mutant

pytestmark = pytest.mark.usefixtures("one_thread")

CFG = gqa.Config(50, 2, 24, n_heads=6, n_kv_heads=6, head_dim=4, windows=(None,), d_ff=32)
FOLDER = Path(gqa.__file__).parent


def shaken(cfg: gqa.Config) -> gqa.Transformer:
    """A model with random biases and norms, too."""
    model = gqa.Transformer(cfg).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.4)
    return model


def with_equal_heads(n_groups: int) -> gqa.Transformer:
    """A multi-head model in which the key and value heads of each group are the same."""
    model, n = shaken(CFG), CFG.n_heads // n_groups
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "k_proj" in name or "v_proj" in name:
                heads = param.unflatten(0, (n_groups, n, CFG.head_dim))
                heads.copy_(heads[:, :1].expand_as(heads).clone())
    return model


@pytest.mark.parametrize("n_kv_heads", [1, 2, 3])
@pytest.mark.parametrize("how", ["mean", "first"])
def test_nothing_changes_where_heads_are_equal(n_kv_heads: int, how: str) -> None:
    """Guards which heads are pooled: those of the group that its queries read afterwards."""
    model = with_equal_heads(n_kv_heads)
    converted = to_gqa(model, n_kv_heads, how)
    assert converted.cfg == replace(CFG, n_kv_heads=n_kv_heads)
    assert not converted.training
    tokens_BT = torch.randint(50, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(converted(tokens_BT), model(tokens_BT))


def test_pooling_by_loops() -> None:
    """Guards the mean and the first head, of matrices and biases, by loops over heads."""
    model = shaken(CFG)
    for how in ("mean", "first"):
        converted = dict(to_gqa(model, 2, how).named_parameters())
        for name, old in model.named_parameters():
            if "k_proj" not in name and "v_proj" not in name:
                assert torch.equal(converted[name], old)
                continue
            for group in range(2):
                heads = [old[4 * h : 4 * h + 4] for h in range(3 * group, 3 * group + 3)]
                expected = sum(heads) / 3 if how == "mean" else heads[0]
                torch.testing.assert_close(converted[name][4 * group : 4 * group + 4], expected)


def test_random_heads_are_new_and_the_model_is_left_alone() -> None:
    """Guards the paper's third way, and the original, which the other ways still need."""
    model = shaken(CFG)
    before = {name: param.clone() for name, param in model.named_parameters()}
    converted = to_gqa(model, 2, "random")
    weight = converted.blocks[0].attn.k_proj.weight
    assert 0.01 < weight.std() < 0.03
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


@pytest.mark.parametrize(
    ("n_kv_heads", "how", "said"),
    [(4, "mean", "n_kv_heads: 4"), (0, "mean", "n_kv_heads: 0"), (2, "best", "how: 'best'")],
)
def test_what_cannot_be_converted(n_kv_heads: int, how: str, said: str) -> None:
    """Guards the messages, which name the argument and what was expected."""
    with pytest.raises(ValueError, match=said):
        to_gqa(gqa.Transformer(CFG), n_kv_heads, how)


@pytest.mark.parametrize(
    "change",
    [
        "weight.unflatten(0, (n_kv_heads, -1, head_dim)) -> "
        "weight.unflatten(0, (-1, n_kv_heads, head_dim)).transpose(0, 1)",  # head h to group h % J
        "heads.mean(dim=1) -> heads.sum(dim=1)",
        ' and ".v_proj." not in name ->  and ".k_proj." not in name',
    ],
)
def test_mistakes_are_noticed(change: str) -> None:
    """Guards the comparison with equal heads: other groups, another mean, values forgotten."""
    spoiled = mutant(uptrain, change)
    model = with_equal_heads(2)
    tokens_BT = torch.randint(50, (2, 9))
    try:
        with torch.no_grad():
            wrong = spoiled.to_gqa(model, 2, "mean")(tokens_BT) - model(tokens_BT)
    except RuntimeError:  # shapes that do not fit are noticed, too
        return
    assert wrong.abs().max() > 1e-3


def test_committed_results_are_whole() -> None:
    """Guards the files that the notebook plots: three seeds a method, finite, not a smoke run."""
    record = json.loads((FOLDER / "uptrain.json").read_text(encoding="utf-8"))
    assert record["settings"]["smoke"] is False
    methods = {run["method"] for run in record["runs"]}
    assert len(methods) == 7
    for method in methods:
        assert {run["seed"] for run in record["runs"] if run["method"] == method} == {0, 1, 2}
    decode = json.loads((FOLDER / "decode.json").read_text(encoding="utf-8"))
    for run in decode["runs"]:
        cfg = replace(gqa.Config(**decode["settings"]["model"]), n_kv_heads=run["n_kv_heads"])
        for context, n_bytes in zip(decode["contexts"], run["cache_bytes"], strict=True):
            kept = min(context, run["window"] or context)
            assert n_bytes == cfg.n_layers * 2 * cfg.n_kv_heads * cfg.head_dim * 4 * kept
    sinks = json.loads((FOLDER / "sinks.json").read_text(encoding="utf-8"))
    assert len({run["text"] for run in sinks["runs"]}) >= 3
