"""What quantizing costs in quality: the measures, and that the record says what is claimed."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ch08_full_models import llama3, quality, speed
from tests.test_ch08_speed import small_model

RECORD = Path(quality.__file__).with_suffix(".json")


class Characters:
    """A tokenizer: a number for each character."""

    def encode(self, words):
        return [1, *(2 + ord(c) % 200 for c in words)]


@pytest.fixture
def small(monkeypatch):
    """Puts a small random model in the place of those that would be loaded."""

    def load(path, dtype, device):
        return small_model(llama3, getattr(torch, dtype)), Characters()

    monkeypatch.setattr(quality, "load", load)
    monkeypatch.setattr(quality, "fetch", Path)


def test_smoke(small, tmp_path, monkeypatch):
    """Guards the command: every way is measured, and what is there already is kept."""
    out = tmp_path / "quality.json"
    command = ["quality.py", "--smoke", "--models", "small", "--out", str(out), "--resume"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(quality, "N_CALIBRATION", 2)
    quality.main()
    rows = json.loads(out.read_text(encoding="utf-8"))["results"]["small"]
    assert list(rows) == list(quality.WAYS)
    assert rows["float32"]["kl"] == 0 == rows["float32"]["loss_change"]
    assert 0 < rows["bfloat16"]["kl"] < rows["int8"]["kl"] < rows["int4"]["kl"]
    assert rows["int4"]["kl"] < rows["int4 in all layers"]["kl"]
    everywhere = [row["bytes"] for label, row in rows.items() if "all layers" in label]
    assert len(set(everywhere)) == 1  # plain, fitted and calibrated take the same
    assert everywhere[0] < rows["int4"]["bytes"] < rows["int8"]["bytes"]
    monkeypatch.setattr(quality, "made", lambda *_: pytest.fail("measured again"))
    quality.main()


def test_measures():
    """KL and loss against their definitions, written out."""
    model, other = small_model(llama3), speed.quantize(small_model(llama3), "int8")
    windows_BT = torch.randint(0, 211, (3, 12))
    right = list(quality.log_probs(model, windows_BT))
    with torch.no_grad():
        p_BTV, q_BTV = (m(windows_BT).double().softmax(dim=-1) for m in (model, other))
    kl_B = (p_BTV * (p_BTV / q_BTV).log()).sum(dim=-1).mean(dim=1)
    assert quality.divergence(right, other, windows_BT) == pytest.approx(kl_B.tolist(), rel=0.01)
    likely_BT = q_BTV[:, :-1].gather(2, windows_BT[:, 1:, None])[..., 0]
    loss_B = -likely_BT.log().mean(dim=1)
    assert quality.losses(other, windows_BT) == pytest.approx(loss_B.tolist(), rel=1e-4)


def test_text_and_windows():
    """Calibration text is other text; windows start as a text does, if there is such a token."""
    tokens, later = quality.text_tokens(Characters(), 20_000)
    assert len(tokens) == 20_000 and len(later) == quality.N_CALIBRATION * quality.WINDOW
    with_start = quality.windows([1, *range(2, 42)], 9)
    assert with_start.shape == (5, 9) and with_start[:, 0].unique().tolist() == [1]
    assert with_start[:, 1:].flatten().tolist() == list(range(2, 42))
    without = quality.windows([7, 5, 7, 6, 4, 3, 2], 3)
    assert without.tolist() == [[7, 5, 7], [6, 4, 3]]


def test_plain_rounding():
    """At most half a step from each weight, sixteen numbers a group."""
    model = small_model(llama3)
    before = model.blocks[0].mlp.up_proj.weight.detach().unflatten(1, (-1, 32)).clone()
    quality.round_plainly(model)
    after = model.blocks[0].mlp.up_proj.weight.detach().unflatten(1, (-1, 32))
    step = (before.amax(2) - before.amin(2)) / 15
    assert ((after - before).abs().amax(2) <= 0.501 * step).all()
    assert max(len(group.unique()) for group in after[0]) <= 16
    assert F.mse_loss(after, before) > 0


def test_record():
    """Guards the claims in the script's docstring."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert record["tokens"] == 20_000 and record["kl_tokens"] == 1024
    rows = record["results"]["gemma3-270m"]
    assert list(rows) == list(quality.WAYS)[:6]
    assert all(math.isfinite(row["kl"]) for row in rows.values())
    assert all(rows[kind]["loss_tokens"] > 19_900 for kind in ("float32", "int8", "int4"))
    assert abs(rows["int8"]["loss_change"]) <= 0.005
    assert abs(rows["int4"]["loss_change"]) <= 0.04
    assert rows["int8, calibrated"]["kl"] < rows["int8"]["kl"]
    assert rows["int4, calibrated"]["kl"] < rows["int4"]["kl"] / 2
    assert rows["int4"]["kl"] > 3 * rows["int8"]["kl"]
    assert 0.9 < rows["int4"]["bytes"] / rows["int8"]["bytes"] < 0.95
