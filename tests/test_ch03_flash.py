"""flash.py against gqa.py's attention: equal whatever the tiles, at a fraction of the memory."""

import inspect
import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ch03_gqa import flash, gqa
from tests.parity import brute_force_attention, mutant
from tests.shapes import check_shapes

pytestmark = pytest.mark.usefixtures("one_thread")

TILES = (1, 3, 8, 16, 24, 1000)  # against 24 keys: one, odd, even, with a rest, exact, larger
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-6}  # of the largest number of the result


def case(
    n_new: int = 24,
    n_seen: int = 0,
    window: int | None = None,
    n_pad: tuple[int, int] = (0, 0),
    heads: tuple[int, int] = (6, 2),
    scale: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """What attend takes: two texts, n_new tokens after n_seen, the first n_pad of each padding."""
    B, K, S = 2, 5, n_seen + n_new
    q_BTHK = torch.randn(B, n_new, heads[0], K, dtype=dtype)
    k_BSJK, v_BSJK = torch.randn(2, B, S, heads[1], K, dtype=dtype)
    pos_BS = torch.arange(S) - torch.tensor(n_pad)[:, None]
    return q_BTHK, k_BSJK, v_BSJK, gqa.causal_mask(pos_BS[:, n_seen:], pos_BS, window), scale


CASES = {
    "causal": dict(),
    "multi-head": dict(heads=(4, 4)),
    "multi-query": dict(heads=(4, 1)),
    "window": dict(window=4),
    "window of one": dict(window=1),
    "padding": dict(n_pad=(5, 0)),
    "padding and window": dict(n_pad=(0, 9), window=3),
    "after a cache": dict(n_new=7, n_seen=17),
    "one token after a cache": dict(n_new=1, n_seen=23),
    "sharp": dict(scale=30.0),
}


def error(module: ModuleType, inputs: tuple, tile: int) -> float:
    """How far the tiled result is from attend's, in parts of the largest number there."""
    expected_BTHK = gqa.attend(*inputs)
    found_BTHK = module.flash_attention(*inputs, tile=tile)
    assert found_BTHK.shape == expected_BTHK.shape and found_BTHK.dtype == expected_BTHK.dtype
    off = (found_BTHK - expected_BTHK).abs().nan_to_num(math.inf).max()
    return float(off / expected_BTHK.abs().max())


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", CASES)
def test_equals_attend(name: str, dtype: torch.dtype) -> None:
    for tile in TILES:
        inputs = case(**CASES[name], dtype=dtype)
        largest = CLOSE[dtype] * max(1.0, inputs[-1])  # scores are rounded in parts of their size
        assert error(flash, inputs, tile) < largest, tile


def test_equals_loops() -> None:
    """Against brute force, which shares no code with either."""
    q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale = inputs = case(n_new=6, n_seen=3, n_pad=(2, 0))
    expected_BTHK = brute_force_attention(
        q_BTHK, k_BSJK, v_BSJK, lambda b, t, s: bool(mask_BTS[b, t, s]), scale
    )
    torch.testing.assert_close(flash.flash_attention(*inputs, tile=2), expected_BTHK)


def test_default_tile_and_many_tokens() -> None:
    inputs = case(n_new=300, n_seen=90, window=200)
    expected_BTHK = gqa.attend(*inputs)
    torch.testing.assert_close(flash.flash_attention(*inputs), expected_BTHK, rtol=0, atol=1e-12)


def test_any_mask() -> None:
    """Rows that see only the last tile, only the middle, or single tokens far apart."""
    q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale = case()
    mask_BTS = torch.rand(mask_BTS.shape) < 0.1
    mask_BTS[:, 0], mask_BTS[:, 1] = False, False
    mask_BTS[:, 0, -1], mask_BTS[:, 1, 9] = True, True
    mask_BTS |= torch.eye(24, dtype=torch.bool)
    mask_BTS[:, :2, :2] = False
    for tile in TILES:
        assert error(flash, (q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale), tile) < 1e-12


def test_a_row_that_sees_nothing_is_no_number_in_both() -> None:
    inputs = case()
    inputs[3][1, 4] = False
    for found_BTHK in (gqa.attend(*inputs), flash.flash_attention(*inputs, tile=5)):
        nowhere_BTHK = torch.zeros_like(found_BTHK, dtype=torch.bool)
        nowhere_BTHK[1, 4] = True
        assert torch.equal(found_BTHK.isnan(), nowhere_BTHK)


@pytest.mark.parametrize("dtype", CLOSE)
def test_large_scores(dtype: torch.dtype) -> None:
    """Scores from -1e4 to 1e4, whose exponentials no type here can hold."""
    q_BTHK, k_BSJK, v_BSJK, mask_BTS, _ = case(dtype=dtype)
    scores = torch.einsum("BTJGK,BSJK->BJGTS", q_BTHK.unflatten(2, (2, 3)), k_BSJK)
    scale = 1e4 / float(scores.abs().max())
    inputs = (q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale)
    for tile in TILES:
        # The scores' own rounding, 1e4 times that of a number, is in the exponent.
        assert error(flash, inputs, tile) < 1e4 * CLOSE[dtype]


@pytest.mark.parametrize("name", ["causal", "window", "padding and window", "after a cache"])
def test_gradients_are_equal(name: str) -> None:
    *inputs, mask_BTS, scale = case(**CASES[name])
    for tensor in inputs:
        tensor.requires_grad_()
    towards_BTHK = torch.randn_like(inputs[0])
    expected = torch.autograd.grad(gqa.attend(*inputs, mask_BTS, scale), inputs, towards_BTHK)
    for tile in TILES:
        found_BTHK = flash.flash_attention(*inputs, mask_BTS, scale, tile=tile)
        found = torch.autograd.grad(found_BTHK, inputs, towards_BTHK)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * float(other.abs().max()))


def test_a_model_with_it_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In gqa.py's place for attend, text in chunks, with padding and a window."""
    sizes = dict(vocab_size=50, n_layers=2, d_model=24, n_heads=4, n_kv_heads=2, head_dim=6)
    cfg = gqa.Config(**sizes, windows=(6, None))
    model = gqa.Transformer(cfg).double().eval()
    tokens_BT, n_pad_B = torch.randint(50, (2, 20)), torch.tensor([0, 7])

    def logits() -> Tensor:
        cache = model.new_cache(n_pad_B)
        return torch.cat([model(part, cache) for part in tokens_BT.split(9, dim=1)], dim=1)

    expected_BTV = logits()
    calls = []

    def tiled(*inputs: Tensor) -> Tensor:
        calls.append(inputs[0].shape)
        return flash.flash_attention(*inputs, tile=4)

    monkeypatch.setattr(gqa, "attend", tiled)
    torch.testing.assert_close(logits(), expected_BTV)
    assert len(calls) == 3 * cfg.n_layers


def test_tile_below_one() -> None:
    with pytest.raises(ValueError, match="tile: 0, expected 1 or more"):
        flash.flash_attention(*case(), tile=0)


def test_names_tell_the_shapes() -> None:
    B, T, S, H, J, K = 2, 6, 14, 12, 4, 5  # with tiles of 7: T = 6, U = 7, G = 3
    q_BTHK, (k_BSJK, v_BSJK) = torch.randn(B, T, H, K), torch.randn(2, B, S, J, K)
    inputs = (q_BTHK, k_BSJK, v_BSJK, torch.ones(B, T, S, dtype=torch.bool), 1.0)
    with check_shapes(flash, B=B, T=T, S=S, H=H, J=J, K=K, U=7, G=3) as seen:
        flash.flash_attention(*inputs, tile=7)
        flash.attend(*inputs)
    assert {function for function, _ in seen.missing()} == {"compare"}


# ---- mistakes that the comparison must see

MISTAKES = {
    "the old sum is never rescaled": "sum_BTJG1 * rescale_BTJG1 -> sum_BTJG1",
    "the old values are never rescaled": "out_BTJGK * rescale_BTJG1 -> out_BTJGK",
    "rescaled by the inverse": "(max_BTJG1 - new_max_BTJG1) -> (new_max_BTJG1 - max_BTJG1)",
    "the largest of this tile only": ".maximum(max_BTJG1) -> ",
    "the largest is never renewed": "max_BTJG1 = new_max_BTJG1 -> pass",
    "not divided by the sum": "(out_BTJGK / sum_BTJG1) -> out_BTJGK",
    "the maximum starts at zero": "torch.finfo(q_BTHK.dtype).min) -> 0.0)",
    "the maximum starts at -inf": "torch.finfo(q_BTHK.dtype).min) -> -math.inf)",
    "no mask": "~mask_BT11U -> ~mask_BT11U & False",
    "the first tile's mask for all": "BTS[:, :, None, None].split(tile, dim=-1) -> "
    "BTS[:, :, None, None, :tile].repeat(1, 1, 1, 1, 99)[..., : k_BSJK.shape[1]].split(tile, -1)",
    "the scale is forgotten": "k_BUJK) * scale -> k_BUJK)",
    "rows in the wrong order": "torch.cat(rows, dim=1) -> torch.cat(rows[::-1], dim=1)",
}


def worst(module: ModuleType) -> float:
    """The largest error of all cases, sharp and far below zero among them."""
    q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale = case()
    low = (q_BTHK.abs(), -k_BSJK.abs() - 100, v_BSJK, mask_BTS, 30.0)  # all scores below -1000
    inputs = [case(**kwargs) for kwargs in CASES.values()] + [low]
    return max(error(module, one, tile) for one in inputs for tile in (3, 8))


def test_the_right_code_passes() -> None:
    assert worst(flash) < 1e-10  # scores near 1e5 among them: their rounding is in the exponent


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(mistake: str) -> None:
    assert worst(mutant(flash, MISTAKES[mistake])) > 1e-3


def test_without_the_maximum_large_scores_overflow() -> None:
    """Small scores do not need it: only the large ones tell."""
    careless = mutant(
        flash,
        "rescale_BTJG1 = (max_BTJG1 - new_max_BTJG1).exp() -> "
        "new_max_BTJG1 = torch.zeros_like(max_BTJG1); rescale_BTJG1 = new_max_BTJG1.exp()",
    )
    assert error(careless, case(), tile=8) < 1e-12
    q_BTHK, k_BSJK, v_BSJK, mask_BTS, _ = case()
    assert error(careless, (q_BTHK, k_BSJK, v_BSJK, mask_BTS, 1e4), tile=8) > 1e-3


# ---- memory


def allocated_peak(function: Callable[[], object]) -> int:
    """The same as peak_bytes, told by the CPU's allocator instead: other code altogether."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def long_case(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    return case(n_new=n, heads=(4, 2), dtype=torch.float32)


@pytest.mark.parametrize("n", [256, 300])
def test_peak_is_what_the_allocator_says(n: int) -> None:
    inputs = long_case(n)
    for way in (
        lambda: flash.attend(*inputs),
        lambda: flash.flash_attention(*inputs, tile=64),
    ):
        # The allocator may see more: what a machine's kernels need inside one operation.
        assert 1.0 <= allocated_peak(way) / flash.peak_bytes(way) < 1.05


def test_peak_by_hand() -> None:
    x = torch.randn(1000)

    def chain() -> Tensor:
        y = x + 1  # 4,000 bytes; x itself came from outside
        z = y * 2  # 8,000
        del y
        view = z.view(10, 100)[:, 3:]  # nothing new
        del z  # and nothing freed: the view needs it
        return view + 1  # another 3,880

    assert flash.peak_bytes(chain) == 8000
    assert flash.peak_bytes(lambda: x[2:].t()) == 0
    assert flash.peak_bytes(lambda: [x + i for i in range(7)]) == 7 * 4000
    assert flash.peak_bytes(lambda: [(x + i).sum().item() for i in range(7)]) == 4004
    assert flash.peak_bytes(lambda: x.add_(1)) == 0


def test_peak_counts_what_autograd_keeps() -> None:
    x = torch.randn(1000, requires_grad=True)

    def chain() -> Tensor:
        y = x
        for _ in range(10):
            y = y.sin()  # its input is kept for the gradient
        return y

    assert flash.peak_bytes(chain) == 10 * 4000
    with torch.no_grad():
        assert flash.peak_bytes(chain) == 2 * 4000


def test_memory_grows_with_the_square_or_not() -> None:
    peaks = {}
    for n in (256, 512, 1024):
        inputs = long_case(n)
        peaks["direct", n] = flash.peak_bytes(lambda: flash.attend(*inputs))  # noqa: B023
        tiled = lambda: flash.flash_attention(*inputs, tile=64)  # noqa: B023, E731
        peaks["tiled", n] = flash.peak_bytes(tiled)
    for n in (256, 512):
        assert 3.7 < peaks["direct", 2 * n] / peaks["direct", n] < 4.1
        assert 1.0 < peaks["tiled", 2 * n] / peaks["tiled", n] < 2.0
    table = 2 * 4 * 1024 * 1024 * 4  # bytes: B, H, T, S, float32
    assert peaks["direct", 1024] > 2 * table
    assert peaks["tiled", 1024] < table / 20


def test_one_tile_has_the_memory_of_the_whole_table() -> None:
    """The saving is the tiles': without them there is none."""
    inputs = long_case(512)
    whole = flash.peak_bytes(lambda: flash.flash_attention(*inputs, tile=512))
    assert whole > 10 * flash.peak_bytes(lambda: flash.flash_attention(*inputs, tile=64))


def test_main_prints_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flash, "LENGTHS", (64, 128))
    monkeypatch.setattr("sys.argv", ["flash.py"])
    flash.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["64", "128"]
    assert float(rows[1][1]) > 3.5 * float(rows[0][1])
    assert all(float(row[3]) < 1e-5 for row in rows)


def test_attend_is_gqas_to_the_letter() -> None:
    assert inspect.getsource(flash.attend) == inspect.getsource(gqa.attend)
