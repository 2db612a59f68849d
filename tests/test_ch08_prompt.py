"""A prompt's attention in blocks: the same logits, and no score that no query of a block needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ch08_full_models import prompt, prompt_time
from ch08_full_models.checkpoint import family_of
from ch08_full_models.decode import grouped_attention, plain_decode
from ch08_full_models.prompt import block_attention
from tests.shapes import check_shapes
from tests.test_ch08_decode import MODELS, close, small_model

ROOT = Path(__file__).parent.parent


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks in a short text, heads of any width; what block_by_block was given."""
    monkeypatch.setattr(prompt, "BLOCK", 4)
    monkeypatch.setattr(prompt, "WIDE", 1)
    calls, plain = [], prompt.block_by_block

    def spy(*args):
        calls.append(args)
        return plain(*args)

    monkeypatch.setattr(prompt, "block_by_block", spy)
    return calls


@torch.no_grad()
def in_parts(model, tokens_BT, sizes, n_pad_B=None):
    """Logits of a text that is read in parts of these sizes, (B, T, V)."""
    cache = model.new_cache(n_pad_B)
    return torch.cat([model(part, cache) for part in tokens_BT.split(sizes, 1)], dim=1)


@pytest.mark.parametrize("sizes", [(23,), (6, 9, 1, 7)], ids=["at once", "in parts"])
@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_block_attention_keeps_the_logits(name, batch, sizes, small_blocks):
    """Windows and chunks of 6 tokens are shorter than the text, which no blocks of 4 fill."""
    model = small_model(name)
    n_pad_B = None if batch == "one" else torch.tensor([0, 3])
    tokens_BT = torch.randint(0, 224, (1 if batch == "one" else 2, 23))
    before = in_parts(model, tokens_BT, sizes, n_pad_B)
    assert block_attention(grouped_attention(model)) is model
    after = in_parts(model, tokens_BT, sizes, n_pad_B)
    own = name in ("gemma2", "deepseek_v3")  # these have their own way
    n_calls = 0 if own else model.cfg.n_layers * sum(size > 1 for size in sizes)
    assert len(small_blocks) == n_calls
    if n_pad_B is not None:  # padding predicts nothing
        before, after = before[:, 3:], after[:, 3:]
    assert close(after, before)
    assert family_of(model) is MODELS[name][0]
    plain_decode(model)
    in_parts(model, tokens_BT, sizes, n_pad_B)
    assert len(small_blocks) == n_calls


def brute_force(q_BTHK, k_BSJK, v_BSJU, mask_BTS, scale):
    """Attention in float64, one query after the other."""
    y_BTHU = q_BTHK.new_zeros(*q_BTHK.shape[:3], v_BSJU.shape[3], dtype=torch.float64)
    group = q_BTHK.shape[2] // k_BSJK.shape[2]
    for b, t, h in torch.cartesian_prod(*map(torch.arange, q_BTHK.shape[:3])).tolist():
        k_SK, v_SU = k_BSJK[b, :, h // group].double(), v_BSJU[b, :, h // group].double()
        score_S = scale * (k_SK @ q_BTHK[b, t, h].double())
        weight_S = score_S.masked_fill(~mask_BTS[b, t], -torch.inf).softmax(dim=0)
        y_BTHU[b, t, h] = weight_S @ v_SU
    return y_BTHU


def some_attention(dtype, window):
    torch.manual_seed(0)
    q_BTHK, k_BSJK, v_BSJU = (
        torch.randn(2, 19, heads, width).to(dtype) for heads, width in ((6, 8), (2, 8), (2, 10))
    )
    t = torch.arange(19)
    mask_TS = (t <= t[:, None]) & (t > t[:, None] - window)
    return q_BTHK, k_BSJK, v_BSJU, mask_TS.expand(2, -1, -1)


@pytest.mark.parametrize("given", [True, False], ids=["mask", "no mask"])
def test_blocks_against_brute_force(given, small_blocks):
    *qkv, mask_BTS = some_attention(torch.float32, window=5 if given else 19)
    right = brute_force(*qkv, mask_BTS, 0.3)
    with check_shapes(prompt, B=2, T=19, S=19, H=6, J=2, G=3, K=8, U=10) as seen:
        y_BTHU = prompt.block_by_block(*qkv, mask_BTS if given else None, 0.3)
    assert len(small_blocks) == 1 and not seen.missing() & {"block_by_block"}
    assert (y_BTHU - right).abs().max() < 1e-5


def test_bfloat16_is_no_further_from_float64_than_torchs_kernel(small_blocks):
    """Large scores: were they rounded to bfloat16, the weights would be off by percents."""
    *qkv, mask_BTS = some_attention(torch.bfloat16, window=19)
    scale = 3.0
    right = brute_force(*qkv, mask_BTS, scale)
    q, k, v = (x.transpose(1, 2) for x in qkv)
    kernel = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    off = [
        (y - right).pow(2).mean().sqrt()
        for y in (prompt.block_by_block(*qkv, None, scale), kernel.transpose(1, 2))
    ]
    assert off[0] < 1.5 * off[1]


def test_what_no_query_sees_is_not_multiplied(small_blocks, monkeypatch):
    """A window of 6 and blocks of 4 queries: at most 9 keys, wherever in the text."""
    *qkv, mask_BTS = some_attention(torch.float32, window=6)
    widths, softmax = [], torch.Tensor.softmax

    def spy(score, dim):
        widths.append(score.shape[-1])
        return softmax(score, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", spy)
    prompt.block_by_block(*qkv, mask_BTS, 1.0)
    assert widths == [4, 8, 9, 9, 8]
    widths.clear()
    prompt.block_by_block(*qkv, None, 1.0)
    assert widths == [4, 8, 12, 16, 19]


def test_narrow_heads_without_a_mask_and_gradients_stay_with_the_family(small_blocks, monkeypatch):
    model, tokens_BT = block_attention(small_model("gemma3")), torch.randint(0, 224, (1, 23))
    model(tokens_BT)
    assert not small_blocks  # gradients
    monkeypatch.setattr(prompt, "WIDE", 64)  # heads are 32 wide
    with torch.no_grad():
        model(tokens_BT)
    assert len(small_blocks) == 2  # the two layers with a window


def test_smoke(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    command = [sys.executable, "-m", "ch08_full_models.prompt_time", "--smoke", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (run,) = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert list(run["ms"]) == list(prompt_time.SIDES) and min(run["ms"].values()) > 0


def test_the_record_says_what_the_text_says() -> None:
    """A window pays on a long text; nothing is lost elsewhere but what machines wander by."""
    record = json.loads(Path(prompt_time.__file__).with_name("prompt_time.json").read_text("utf-8"))
    gain = {
        (run["model"], run["tokens"]): run["ms"]["torch's kernel"] / run["ms"]["in blocks"]
        for run in record["runs"]
    }
    assert gain["gemma3-270m", 4096] > 1.5 and gain["gemma3-270m", 512] > 1
    assert min(gain.values()) > 0.9
