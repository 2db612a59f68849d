"""Chapter 4's experiments: fair kinds and the files that hold their losses, costs that are true.

The counted costs are compared with torch's own counter and with the memory that is really held.
"""

import itertools
import json
import math
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ch04_mla import compare, cost, mla
from ch04_mla.cost import FORMS, SMOKE, V2_LITE, V3, Shape
from tests.parity import mutant

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [  # all widths differ, so that none can stand in for another
    Shape(n_heads=3, head_dim=5, d_rope=2, d_value=7, d_latent=11),
    Shape(n_heads=1, head_dim=4, d_rope=6, d_value=3, d_latent=13),
    Shape(n_heads=2, head_dim=9, d_rope=4, d_value=8, d_latent=6),  # K + U > 2C
    Shape(n_heads=2, head_dim=8, d_rope=2, d_value=4, d_latent=6),  # K + U = 2C
]
# New, all. Not one in all: torch's counter sees no product where there is one value to weigh.
TOKENS = [(1, 2), (2, 2), (1, 17), (4, 17), (16, 17), (17, 17)]


def run_main(module: types.ModuleType, path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The record that `python -m module --smoke --out path` writes."""
    monkeypatch.setattr(sys, "argv", [module.__name__, "--smoke", "--out", str(path)])
    module.main()
    return json.loads(path.read_text(encoding="utf-8"))


def committed(name: str) -> dict:
    return json.loads(Path(compare.__file__).with_name(name).read_text(encoding="utf-8"))


# ---- compare.py


def test_kinds_have_equal_parameters() -> None:
    """Guards the comparison: no kind may win by being larger, whatever the plan."""
    for plan in (compare.Plan(), compare.SMOKE, compare.Plan(n_layers=5, n_vocab=300)):
        counts = {}
        for kind in compare.KINDS:
            model = mla.Transformer(compare.config(kind, plan))
            counts[kind] = sum(param.numel() for param in model.parameters())
            assert counts[kind] == compare.n_parameters(model.cfg)
        assert max(counts.values()) < 1.01 * min(counts.values()), counts


def test_kinds_cache_what_they_say() -> None:
    """Guards the cache sizes, measured in a cache that two calls have filled, and their pairs."""
    numbers = {}
    for kind in compare.KINDS:
        model = mla.Transformer(compare.config(kind, compare.SMOKE))
        cache = model.new_cache()
        for n in (5, 2):
            model(torch.randint(model.cfg.vocab_size, (1, n)), cache)
        for layer_cache in cache:
            assert layer_cache.n_bytes() == 4 * 7 * compare.cache_numbers(model.cfg)
        numbers[kind] = compare.cache_numbers(model.cfg)
    assert numbers == {"mha": 256, "gqa": 64, "mla": 64, "mqa": 32, "mla_small": 32}


def test_kinds_differ_in_attention_and_width_only() -> None:
    """Guards that nothing else, heads or depth say, sets the kinds apart."""
    mha = compare.config("mha", compare.Plan())
    assert (mha.d_ff, mha.n_heads * mha.head_dim) == (4 * mha.d_model, mha.d_model)
    for kind, changes in compare.KINDS.items():
        cfg = compare.config(kind, compare.Plan())
        assert cfg == replace(mha, **changes, d_ff=cfg.d_ff)


def test_held_out_pieces_are_held_out_and_spread() -> None:
    """Guards that no evaluated token was trained on, and that not one file alone is evaluated."""
    plan = replace(compare.SMOKE, n_files=40, n_pieces=5)
    train_tokens, val_tokens = compare.texts(plan)
    whole, _ = compare.texts(replace(plan, n_pieces=1))
    assert torch.equal(train_tokens, whole)
    files = sorted(Path(compare.sysconfig.get_path("stdlib")).glob("*.py"))
    files = [path for path in files if path.stat().st_size][:40]
    text = compare.encode(compare.load_text(files), plan.n_vocab)
    held_out = text[len(train_tokens) :]
    assert torch.equal(train_tokens, text[: len(train_tokens)])
    assert 0.09 < len(held_out) / len(text) < 0.11
    windows = held_out.unfold(0, 1024, 1024)
    places = [int((windows == piece).all(dim=1).nonzero()[0]) for piece in val_tokens.view(5, 1024)]
    assert places == sorted(set(places))
    assert places[-1] > 0.7 * len(windows)


def fake_train(losses: dict[tuple[float, bool], float], seen: list) -> types.FunctionType:
    """A stand-in for train(): notes what it is given, and looks the loss up, by lr and latent."""

    def train(
        model: torch.nn.Module, tokens: Tensor, val_tokens: Tensor, cfg: object, device: str
    ) -> types.SimpleNamespace:
        seen.append((model.cfg, cfg, tokens, val_tokens))
        loss = losses[cfg.lr, model.cfg.d_latent is not None]
        return types.SimpleNamespace(
            val_steps=[0], val_losses=[loss], final_val_loss=loss, environment={"text": "crc"}
        )

    return train


LOSSES = {  # mha's best rate is the first, mla's the last; for both together it is the second
    (0.1, False): 1.0, (0.2, False): 2.0, (0.3, False): 3.0,
    (0.1, True): 5.0, (0.2, True): 2.0, (0.3, True): 1.5,
}  # fmt: skip
FAKED = replace(compare.SMOKE, lrs=(0.1, 0.2, 0.3), seeds=(4, 7, 9))


def test_one_rate_is_best_for_both_and_kinds_share_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards pairing: within a seed all kinds train alike, with the rate the search found.

    mha and mla also train with the rates that one of them would have preferred.
    """
    seen: list = []
    monkeypatch.setattr(compare, "train", fake_train(LOSSES, seen))
    records = [json.loads(json.dumps(record)) for record in compare.experiment(FAKED)]
    record = records[-1]
    assert record["settings"]["lr"] == 0.2
    assert record["settings"]["search_losses"] == {"mha": [1.0, 2.0, 3.0], "mla": [5.0, 2.0, 1.5]}
    counts = [(len(r["runs"]), len(r["other_rates"])) for r in records]  # anew after each model
    assert counts == [(n, 0) for n in range(1, 16)] + [(15, n) for n in range(1, 13)]
    order = [(run["seed"], run["kind"], 0.2) for run in record["runs"]]
    assert order == list(itertools.product(FAKED.seeds, compare.KINDS, [0.2]))
    others = [(run["seed"], run["kind"], run["lr"]) for run in record["other_rates"]]
    assert sorted(others) == sorted(itertools.product(FAKED.seeds, ["mha", "mla"], [0.1, 0.3]))
    searched, trained = seen[:6], seen[6:]
    assert {cfg.seed for _, cfg, _, _ in searched}.isdisjoint(FAKED.seeds)
    first = trained[0]
    for (seed, kind, lr), (model_cfg, cfg, tokens, val_tokens) in zip(
        order + others, trained, strict=True
    ):
        assert model_cfg == compare.config(kind, FAKED)
        assert cfg == replace(first[1], seed=seed, lr=lr)
        assert torch.equal(tokens, first[2]) and torch.equal(val_tokens, first[3])
        assert cfg.eval_tokens == len(val_tokens)


def test_no_other_rate_where_both_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards that only a disputed rate is tried twice."""
    losses = {(lr, latent): abs(lr - 0.3) for lr in FAKED.lrs for latent in (False, True)}
    monkeypatch.setattr(compare, "train", fake_train(losses, []))
    *_, record = compare.experiment(FAKED)
    assert record["settings"]["lr"] == 0.3 and record["other_rates"] == []


def test_an_interrupted_comparison_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards --resume: no model twice, none left out, and no mixing with another plan."""
    seen: list = []
    monkeypatch.setattr(compare, "train", fake_train(LOSSES, seen))
    *_, whole = compare.experiment(FAKED)
    n_models = len(seen)
    seen.clear()
    left = next(itertools.islice(compare.experiment(FAKED), 16, None))  # 17 of 27 models
    *_, resumed = compare.experiment(FAKED, json.loads(json.dumps(left)))
    assert len(seen) == n_models
    for part in ("settings", "kinds", "runs", "other_rates"):
        assert json.dumps(resumed[part]) == json.dumps(whole[part])
    assert list(compare.experiment(FAKED, resumed)) == []  # nothing is left to do
    for other in (replace(FAKED, steps=5), replace(FAKED, n_files=11)):
        with pytest.raises(ValueError, match="start without --resume"):
            next(compare.experiment(other, resumed))
    with pytest.raises(ValueError, match="text is source of .*, expected source of"):
        compare.check_fits(resumed, FAKED, torch.arange(5))


def test_differences_are_paired_by_seed() -> None:
    """Guards the last column: each loss less mha's with the same seed, no other."""
    losses = {("mha", 0): 3.0, ("gqa", 0): 3.5, ("mha", 1): 4.0, ("gqa", 1): 3.75, ("gqa", 2): 9.0}
    runs = [{"kind": k, "seed": s, "final_val_loss": loss} for (k, s), loss in losses.items()]
    assert compare.against_mha(runs) == {"mha": {0: 0.0, 1: 0.0}, "gqa": {0: 0.5, 1: -0.25}}
    assert compare.summary(runs[:4])["gqa"] == [
        "3.6250 (3.5000..3.7500)",
        "+0.1250 (-0.2500..+0.5000)",
    ]


def check_compare(record: dict, plan: compare.Plan) -> None:
    """The record has what the notebook reads, and belongs to this code's kinds."""
    assert list(record) == ["environment", "settings", "kinds", "runs", "other_rates"]
    assert list(record["kinds"]) == list(compare.KINDS)
    for kind, sizes in record["kinds"].items():
        cfg = compare.config(kind, plan)
        assert mla.Config(**{key: sizes[key] for key in asdict(cfg)} | {"windows": (None,)}) == cfg
        assert sizes["windows"] == [None]
        assert sizes["cache_numbers"] == compare.cache_numbers(cfg)
        assert sizes["n_parameters"] == compare.n_parameters(cfg)
    settings = record["settings"]
    assert settings["lr"] in settings["lrs"]
    assert all(len(losses) == len(settings["lrs"]) for losses in settings["search_losses"].values())
    plan = replace(plan, lrs=tuple(settings["lrs"]), seeds=tuple(settings["seeds"]))
    runs = record["runs"] + record["other_rates"]
    found = [(run["kind"], run["seed"], run.get("lr", settings["lr"])) for run in runs]
    assert found == list(compare.trainings(plan, settings))
    assert {run["kind"] for run in record["runs"]} == {*compare.KINDS}
    assert len(set(settings["seeds"])) >= 3
    for run in runs:
        assert run["val_steps"] == record["runs"][0]["val_steps"]
        assert run["val_steps"][0] == 0 and run["val_steps"][-1] == settings["steps"]
        assert len(run["val_losses"]) == len(run["val_steps"])
        assert run["final_val_loss"] == run["val_losses"][-1] < run["val_losses"][0]


def test_compare_smoke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the command from end to end: the file it writes and the table it prints."""
    record = run_main(compare, tmp_path / "x.json", monkeypatch)
    check_compare(record, compare.SMOKE)
    lines = capsys.readouterr().out.splitlines()
    lines = lines[lines.index(f"learning rate {record['settings']['lr']:g}") + 2 :][:5]
    assert [line.split()[0] for line in lines] == list(compare.KINDS)
    for line, sizes in zip(lines, record["kinds"].values(), strict=True):
        assert line.split()[1] == str(sizes["cache_numbers"])


def test_committed_comparison_belongs_to_this_code() -> None:
    """Guards that compare.json is no smoke run and was made with the sizes that stand here."""
    record = committed("compare.json")
    check_compare(record, compare.Plan())
    assert record["settings"]["steps"] >= 100
    assert len(record["runs"][0]["val_steps"]) >= 8


# ---- cost.py


def torch_counts(shape: Shape, n_new: int, n_all: int, form: str) -> int:
    """Multiplications in the form's real code, as torch's counter sees its products."""
    call = cost.calls(cost.layer_of(shape), n_new, n_all)[form]
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2  # an addition comes with each


def miscounts(multiplications: types.FunctionType) -> list[tuple]:
    """Where the function and torch's counter differ."""
    cases = itertools.product(SHAPES[:2], TOKENS, FORMS)
    return [
        (shape, n_new, n_all, form)
        for shape, (n_new, n_all), form in cases
        if multiplications(shape, n_new, n_all, form) != torch_counts(shape, n_new, n_all, form)
    ]


def test_multiplications_are_those_of_the_code() -> None:
    """Guards the formula against the code it speaks of, as torch counts it."""
    assert miscounts(cost.multiplications) == []


@pytest.mark.parametrize(
    "change",
    [
        "T * S * H * (C + R) -> T * S * H * C",
        "T * S * H * (K + R) -> T * S * H * K",
        "T * H * K * C, -> S * H * K * C,",
        "T * H * C * U -> S * H * C * U",
        "S * C * H * (K + U) -> T * C * H * (K + U)",
        "S * C * H * (K + U) -> S * C * H * K",
        "T * S * H * C, -> T * S * C,",
        "T * S * H * U -> T * S * H * C",
    ],
)
def test_a_wrong_formula_is_noticed(change: str) -> None:
    """Guards the guard: each term of the formula matters to the comparison."""
    assert miscounts(mutant(cost, change).multiplications)


@pytest.mark.parametrize("function", [cost.products, cost.multiplications, cost.bytes_read])
def test_an_unknown_form_is_refused(function: types.FunctionType) -> None:
    """Guards against a cost of zero for a misspelt form."""
    with pytest.raises(ValueError, match="form: 'absorb', expected one of expanded, absorbed"):
        function(V3, 1, 10, "absorb")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_those_held(dtype: torch.dtype) -> None:
    """Guards the formula against what the layer's own cache holds after two calls."""
    for shape in SHAPES:
        layer, cache = cost.layer_of(shape).to(dtype), mla.LayerCache(None)
        for n in (6, 1):
            x_BTD = torch.randn(1, n, shape.n_heads * shape.head_dim, dtype=dtype)
            pos_BT = cache.positions(torch.zeros(1, n))
            turn = mla.rope_angles(pos_BT, mla.rope_frequencies(shape.d_rope, 1e4))
            layer(x_BTD, pos_BT, turn, cache)
        assert cache.n_bytes() == cost.cache_bytes(shape, 7, dtype.itemsize)
    held = cost.cache_bytes(V3, 1, bytes_a_number=2)
    assert held == 2 * 576  # V3 caches 576 numbers


def moved(shape: Shape, n_all: int, form: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that bytes_read speaks of, from the tensors that the code really makes."""
    layer, made = cost.layer_of(shape), []
    attend = mla.attend

    def noting(*args: Tensor) -> Tensor:
        made.append(args[1].nbytes + args[2].nbytes)  # the keys and the values
        return attend(*args)

    monkeypatch.setattr(mla, "attend", noting)
    cost.calls(layer, 1, n_all)[form]()
    monkeypatch.setattr(mla, "attend", attend)
    made_new = 2 * made[0] if form == "expanded" else 0  # else they are the cache itself
    return layer.kv_b_proj.weight.nbytes + cost.cache_bytes(shape, n_all) + made_new


def test_bytes_read_are_those_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the formula against the sizes of weights, keys and values, in both number formats."""
    for shape, n_all, form in itertools.product(SHAPES, (1, 9), FORMS):
        found = cost.bytes_read(shape, 1, n_all, form)
        assert found == moved(shape, n_all, form, monkeypatch)
        assert found == 2 * cost.bytes_read(shape, 1, n_all, form, bytes_a_number=2)


@pytest.mark.parametrize(
    "change",
    [
        "H * (K + U) * C * bytes_a_number -> H * K * C * bytes_a_number",
        "S * H * (K + R + U) -> S * H * (K + U)",
        "2 * made[form] -> made[form]",
        "(shape.d_latent + shape.d_rope) * bytes -> shape.d_latent * bytes",
    ],
)
def test_wrong_bytes_are_noticed(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the guard: each part of the bytes matters to the comparison."""
    wrong = mutant(cost, change)
    cases = itertools.product(SHAPES, (1, 9), FORMS)
    expected = [moved(*case, monkeypatch) for case in cases]
    found = [wrong.bytes_read(s, 1, n, f) for s, n, f in itertools.product(SHAPES, (1, 9), FORMS)]
    assert found != expected


def disagreements(module: types.ModuleType) -> int:
    """How often the layer's choice is not the cheaper form, or not on its side of the crossing."""
    wrong = 0
    for shape in [*SHAPES, V2_LITE]:
        layer = cost.layer_of(shape)
        for n_all in (1, 2, 3, 10, 40, 157, 600):
            meet = module.crossing(shape, n_all)
            for n_new in range(1, n_all + 1):
                expanded, absorbed = (
                    module.multiplications(shape, n_new, n_all, form) for form in FORMS
                )
                absorbs = layer.absorbs(n_new, n_all)
                wrong += absorbs != (absorbed < expanded)
                if meet < math.inf:
                    wrong += absorbs != (n_new < meet)
                else:
                    wrong += absorbed > expanded
    return wrong


def test_the_layer_takes_the_cheaper_form() -> None:
    """Guards LatentAttention.absorbs, the counts and the crossing: each by the two others."""
    assert disagreements(cost) == 0


@pytest.mark.parametrize(
    "change",
    [
        "2 * C - (K + U) -> C - (K + U)",
        "return n_all * C * (K + U) / -> return C * (K + U) / ",
        "T * H * K * C, -> S * H * K * C,",
        "n_all * wider) -> 2 * n_all * wider)",
    ],
)
def test_a_wrong_crossing_is_noticed(change: str) -> None:
    """Guards the guard."""
    assert disagreements(mutant(cost, change)) > 0


def test_crossing_of_deepseek_v3() -> None:
    """Guards the number the chapter names, and its limit for long texts."""
    limit = cost.crossing(V3, math.inf)
    assert limit == pytest.approx(512 * 256 / (2 * 512 - 256)) and 170 < limit < 171
    assert cost.crossing(V3, 10**9) == pytest.approx(limit, rel=1e-5)
    assert cost.crossing(V3, 100) < cost.crossing(V3, 1000) < limit
    assert cost.crossing(SHAPES[2], math.inf) == cost.crossing(SHAPES[3], 50) == math.inf


def test_what_is_timed_is_the_same_result_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the timing: both forms on the same inputs, causal, one after the other."""
    layer = cost.layer_of(SHAPES[0]).double()
    torch.set_default_dtype(torch.float64)
    forms = cost.calls(layer, 4, 9)
    torch.set_default_dtype(torch.float32)
    expanded_BTHU, absorbed_BTHU = forms["expanded"](), forms["absorbed"]()
    assert expanded_BTHU.shape == (1, 4, 3, 7)
    torch.testing.assert_close(expanded_BTHU, absorbed_BTHU, rtol=1e-10, atol=1e-12)
    called: list[str] = []
    waiting = {form: lambda form=form: called.append(form) for form in FORMS}
    monkeypatch.setattr(cost, "calls", lambda *_: waiting)
    found = cost.seconds(layer, 1, 2, rounds=5)
    assert called == [*FORMS] * 6
    assert found.keys() == {*FORMS} and min(found.values()) > 0


def test_measured_crossing() -> None:
    """Guards the line between the two measurements on both sides of the crossing."""
    assert cost.measured_crossing([1, 100, 200], [-5.0, -1.0, 3.0]) == 125
    assert cost.measured_crossing([1, 100], [-5.0, -1.0]) is None
    assert cost.measured_crossing([1, 100], [1.0, 5.0]) is None


def check_cost(record: dict, plan: cost.Plan) -> None:
    """The record has what the notebook reads, and its counts are this code's."""
    assert record["shape"] == asdict(plan.shape) and record["contexts"] == list(plan.contexts)
    assert [(run["n_new"], run["form"]) for run in record["runs"]] == [(1, form) for form in FORMS]
    for run in record["runs"]:
        assert len(run["seconds"]) == len(plan.contexts) and min(run["seconds"]) > 0
        for name in ("multiplications", "bytes_read"):
            counts = [getattr(cost, name)(plan.shape, 1, n, run["form"]) for n in plan.contexts]
            assert run[name] == counts
    cross = record["crossing"]
    assert (cross["context"], cross["n_new"]) == (plan.crossing_context, list(plan.crossing_n_new))
    assert cross["predicted"] == cost.crossing(plan.shape, plan.crossing_context)
    gaps = [
        absorbed - expanded
        for absorbed, expanded in zip(cross["absorbed"], cross["expanded"], strict=True)
    ]
    assert cross["measured"] == cost.measured_crossing(cross["n_new"], gaps)
    assert record["settings"]["rounds"] == plan.rounds >= 5


def test_cost_smoke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the command from end to end: the file it writes and the tables it prints."""
    check_cost(run_main(cost, tmp_path / "x.json", monkeypatch), SMOKE)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["16", "32"]
    assert "the multiplications at" in lines[-1]


def test_committed_cost_belongs_to_this_code() -> None:
    """Guards that cost.json is no smoke run, and that its counts are this code's."""
    record = committed("cost.json")
    check_cost(record, cost.Plan())
    expanded, absorbed = record["runs"]
    assert expanded["seconds"][-1] > absorbed["seconds"][-1]  # by two orders, on any machine
