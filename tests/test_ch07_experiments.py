"""Chapter 7's experiments: what they measure against other ways to it, and the files they write."""

import dataclasses
import json
import math
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ch01_gpt2.train import TrainConfig, lr_at
from ch07_norm_placement import norm_placement, placements, signals, sweep
from ch07_norm_placement.placements import PLACEMENTS, stream_sizes
from tests.parity import mutant

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = Path(signals.__file__).parent
TINY = dataclasses.replace(signals.SMOKE, n_layers=3, seq_len=9)
KINDS = [(placement, qk_norm) for placement in PLACEMENTS for qk_norm in signals.QK_NORMS]


def run_main(module: types.ModuleType, path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The record that `python -m module --smoke --out path` writes."""
    monkeypatch.setattr(sys, "argv", [module.__name__, "--smoke", "--out", str(path)])
    module.main()
    return json.loads(path.read_text(encoding="utf-8"))


def committed(name: str) -> dict:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def model_and_batch(placement: str, qk_norm: str | None) -> tuple[nn.Module, Tensor, Tensor]:
    """A model none of whose parameters is at its start, and a batch."""
    model = signals.new_model(placement, qk_norm, "unit", 1, TINY)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.1 * torch.randn_like(param)
    inputs_BT, targets_BT = torch.randint(TINY.n_vocab, (2, 3, 9))
    return model, inputs_BT, targets_BT


# ---- signals.py: what is measured


@pytest.mark.parametrize(("placement", "qk_norm"), KINDS)
def test_stream_is_that_of_the_demo(placement: str, qk_norm: str | None) -> None:
    """Guards the stream's size: the loop of placements.py finds the same, without hooks."""
    model, inputs_BT, targets_BT = model_and_batch(placement, qk_norm)
    found = signals.signals(model, inputs_BT, targets_BT)["stream"]
    assert found == pytest.approx(stream_sizes(model, inputs_BT), rel=1e-5)


def test_post_norm_keeps_the_stream_at_one() -> None:
    """Guards what the notebook says of it, and that it is the placement that does it."""
    inputs_BT, targets_BT = torch.randint(TINY.n_vocab, (2, 3, 9))
    for placement in PLACEMENTS:
        model = signals.new_model(placement, None, "unit", 0, TINY)
        embeddings, *stream = signals.signals(model, inputs_BT, targets_BT)["stream"]
        assert embeddings == pytest.approx(0.02, rel=0.1)
        assert all(abs(size - 1) < 1e-2 for size in stream) == (placement == "post")


def by_hand(placement: str, block: nn.Module, x: Tensor, *rest: object) -> tuple[Tensor, ...]:
    """What attention and the MLP add to the stream x, and the stream after the block."""
    if placement == "post":
        attn = block.attn(x, *rest)
        x = block.attn_norm(x + attn)
        mlp = block.mlp(x)
        return attn, mlp, block.mlp_norm(x + mlp)
    if placement == "parallel":
        attn, mlp = block.attn(block.attn_norm(x), *rest), block.mlp(block.attn_norm(x))
        return attn, mlp, x + attn + mlp
    attn = block.attn(block.attn_norm(x), *rest)
    if placement in ("out", "sandwich"):
        attn = block.attn_out_norm(attn)
    mlp = block.mlp(block.mlp_norm(x + attn))
    if placement in ("out", "sandwich"):
        mlp = block.mlp_out_norm(mlp)
    return attn, mlp, x + attn + mlp


@torch.no_grad()
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_the_halves_add(placement: str) -> None:
    """Guards the two sizes: after a norm of the output where there is one, before it nowhere."""
    model, inputs_BT, targets_BT = model_and_batch(placement, "head")
    with torch.enable_grad():
        found = signals.signals(model, inputs_BT, targets_BT)
    x_BTD, pos_BT = model.embed(inputs_BT), torch.arange(9).expand(3, 9)
    turn = norm_placement.rope_angles(pos_BT, norm_placement.rope_frequencies(16, 10_000.0))
    for layer, block in enumerate(model.blocks):
        cache = norm_placement.LayerCache(None)
        attn, mlp, x_BTD = by_hand(placement, block, x_BTD, pos_BT, turn, cache)
        for half, added_BTD in (("attn", attn), ("mlp", mlp)):
            size = float(added_BTD.norm() / added_BTD.numel() ** 0.5)
            assert found[f"{half}_added"][layer] == pytest.approx(size, rel=1e-4)


@pytest.mark.parametrize(("placement", "qk_norm"), KINDS)
def test_gradients_are_autograds(placement: str, qk_norm: str | None) -> None:
    """Guards which parameters a gradient is of: four matrices, three, and no norm's weight."""
    model, inputs_BT, targets_BT = model_and_batch(placement, qk_norm)
    found = signals.signals(model, inputs_BT, targets_BT)
    assert all(param.grad is None for param in model.parameters())
    loss = F.cross_entropy(model(inputs_BT).flatten(0, 1), targets_BT.flatten())
    for layer, block in enumerate(model.blocks):
        matrices = {
            "attn": [getattr(block.attn, f"{name}_proj").weight for name in "qkvo"],
            "mlp": [getattr(block.mlp, f"{name}_proj").weight for name in ("gate", "up", "down")],
        }
        for half, weights in matrices.items():
            grads = torch.autograd.grad(loss, weights, retain_graph=True)
            norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
            assert found[f"{half}_grad"][layer] == pytest.approx(norm, rel=1e-4)


def test_a_gradient_is_the_slope_of_the_loss() -> None:
    """Guards the unit of the gradients: a step along one lowers the loss by its square."""
    model, inputs_BT, targets_BT = model_and_batch("pre", "head")
    norm = signals.signals(model, inputs_BT, targets_BT)["mlp_grad"][1]

    def loss() -> Tensor:
        return F.cross_entropy(model(inputs_BT).flatten(0, 1), targets_BT.flatten())

    weights = list(model.blocks[1].mlp.parameters())
    grads, before, step = torch.autograd.grad(loss(), weights), loss().item(), 0.01
    with torch.no_grad():
        for weight, grad in zip(weights, grads, strict=True):
            weight -= step * grad / norm
        assert before - loss().item() == pytest.approx(step * norm, rel=0.1)


@pytest.mark.parametrize(("placement", "qk_norm"), KINDS)
def test_scores_are_those_of_attend(
    placement: str, qk_norm: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards scores and entropy: made here by loops from what the model gives attend."""
    model, inputs_BT, targets_BT = model_and_batch(placement, qk_norm)
    found, given = signals.signals(model, inputs_BT, targets_BT), []
    attend = norm_placement.attend

    def noting(*args: object) -> Tensor:
        given.append(args)
        return attend(*args)

    monkeypatch.setattr(norm_placement, "attend", noting)
    with torch.no_grad():
        model(inputs_BT)
    assert len(given) == TINY.n_layers
    for layer, (q_BTHK, k_BSJK, _, _, scale) in enumerate(given):
        largest, shares = 0.0, []
        for b, h, t in torch.cartesian_prod(*map(torch.arange, (3, q_BTHK.shape[2], 9))).tolist():
            scores = [float(q_BTHK[b, t, h] @ k_BSJK[b, s, h]) * scale for s in range(t + 1)]
            largest = max(largest, *map(abs, scores))
            total = sum(map(math.exp, scores))
            if t:
                weights = [math.exp(score) / total for score in scores]
                shares.append(-sum(w * math.log(w) for w in weights) / math.log(t + 1))
        assert found["largest_score"][layer] == pytest.approx(largest, rel=1e-4)
        assert found["entropy"][layer] == pytest.approx(sum(shares) / len(shares), rel=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        "score_BHTS.masked_fill(hidden_B1TS, 0) -> score_BHTS",
        "score_BHTS.masked_fill(hidden_B1TS, 0).abs() -> score_BHTS.masked_fill(hidden_B1TS, 0)",
        "* cfg.head_dim**-0.5 -> ",
        "rope(q_BTHK, turn), rope(k_BSHK, turn) -> q_BTHK, k_BSHK",
        "-math.inf).softmax -> 0).softmax",
        "entropy_BHT[..., 1:] / most_T[1:] -> entropy_BHT[..., 1:]",
    ],
)
def test_wrong_scores_are_noticed(change: str) -> None:
    """Guards the guard: another number where the right one is compared."""
    q_BTHK, k_BSHK = 3 * torch.randn(2, 2, 7, 3, 16)
    q_BTHK[0, 0, 0], k_BSHK[0, 0, 0] = 3.0, -9.0  # the largest score is negative
    q_BTHK[0, 1, 0], k_BSHK[0, 5, 0] = 3.0, 15.0  # but for one that the mask hides
    cfg = signals.new_model("pre", None, "gpt2", 0, TINY).cfg
    right, wrong = (
        module.scores(q_BTHK, k_BSHK, cfg) for module in (signals, mutant(signals, change))
    )
    assert any(abs(a - b) > 1e-3 * abs(a) for a, b in zip(right, wrong, strict=True))


def test_starts() -> None:
    """Guards the three sizes of the matrices: measured, one draw, everything else untouched."""
    models = {
        start: signals.new_model("sandwich", "head", start, 0, TINY) for start in signals.STARTS
    }
    gpt2 = dict(models["gpt2"].named_parameters())
    for start, model in models.items():
        for name, param in model.named_parameters():
            if param.ndim == 1 or name == "embed.weight":
                assert torch.equal(param, gpt2[name])
                continue
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = {
                "gpt2": 0.02 / math.sqrt(6) if writes else 0.02,
                "flat": 0.02,
                "unit": param.shape[1] ** -0.5,
            }
            assert param.std().item() == pytest.approx(expected[start], rel=0.1)
            assert F.cosine_similarity(param.flatten(), gpt2[name].flatten(), dim=0) > 0.9999
    with pytest.raises(ValueError, match="start: 'unity', expected one of gpt2, flat, unit"):
        signals.new_model("pre", None, "unity", 0, TINY)


def test_looks_do_not_disturb_the_training() -> None:
    """Guards the looks: a model that is looked at often ends with the same weights, to the bit."""
    texts = torch.randint(256, (2, 400))
    training = dataclasses.replace(signals.training_of(TINY, 0), steps=4)
    ends = []
    for looks in ((4,), (0, 1, 3, 4)):
        model = signals.new_model("pre", None, "gpt2", 0, TINY)
        found = signals.look_on(model, training, tuple(texts), looks)
        assert [look["step"] for look in found] == list(looks)
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    before = signals.new_model("pre", None, "gpt2", 0, TINY).state_dict()
    assert not torch.equal(ends[0]["embed.weight"], before["embed.weight"])


def test_what_is_no_number_is_none() -> None:
    """Guards the file: JSON has no word for infinity."""
    signal = signals.rounded({"stream": [1.234567, math.inf, math.nan]})
    assert signal == {"stream": [1.2346, None, None]}


def test_warmups_differ_in_the_warmup_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the second part: its sizes are sweep.py's, and the length reaches the training."""
    seen: list[tuple[TrainConfig, norm_placement.Config]] = []

    def noting(model: nn.Module, training: TrainConfig, texts: tuple, looks: tuple) -> list:
        seen.append((training, model.cfg))
        return []

    monkeypatch.setattr(signals, "look_on", noting)
    monkeypatch.setattr(signals, "final_loss", lambda *_: 1.0)
    plan, other = signals.Plan(), sweep.Plan()
    runs = list(signals.warmup_runs(2, plan, ()))
    assert [(run["placement"], run["warmup"]) for run in runs] == [
        (placement, warmup) for placement in ("post", "pre") for warmup in plan.warmups
    ]
    for run, (training, cfg) in zip(runs, seen, strict=True):
        assert dataclasses.replace(training, warmup=0.5) == dataclasses.replace(
            seen[0][0], warmup=0.5
        )
        assert training.warmup == run["warmup"] and training.seed == 2
        assert (cfg.n_layers, cfg.d_model) == (other.n_layers, other.d_model)
        sizes = (training.steps, training.batch_size, training.seq_len, training.eval_tokens)
        assert sizes == (other.steps, other.batch_size, other.seq_len, other.eval_tokens)
        assert max(lr_at(step, training) for step in range(plan.steps)) == pytest.approx(
            plan.warmup_lr, rel=1e-3
        )
    assert TrainConfig().warmup in plan.warmups and plan.warmup_lr in other.lrs


def check_signals(record: dict, plan: signals.Plan) -> None:
    """The record has what the notebook reads, of every model, and belongs to this code."""
    assert list(record) == ["environment", "settings", "unigram_loss", "runs", "warmups"]
    settings = json.loads(json.dumps(dataclasses.asdict(plan)))
    assert {name: record["settings"][name] for name in settings} == settings
    expected = Counter()
    for seed in plan.seeds:
        for placement, qk_norm in KINDS:
            for start in signals.STARTS:
                lr = plan.lr if start == "gpt2" else None
                expected[placement, qk_norm, start, lr, seed] += 1
        for qk_norm in signals.QK_NORMS:
            expected["pre", qk_norm, "gpt2", plan.high_lr, seed] += 1
    keys = ("placement", "qk_norm", "start", "lr", "seed")
    assert Counter(tuple(run[key] for key in keys) for run in record["runs"]) == expected
    for run in record["runs"]:
        trained = run["start"] == "gpt2"
        assert [look["step"] for look in run["looks"]] == (list(plan.looks) if trained else [0])
        assert trained or run["final_val_loss"] is None
        for look in run["looks"]:
            assert len(look["stream"]) == plan.n_layers + 1
            lengths = {len(look[name]) for name in look.keys() - {"step", "stream"}}
            assert lengths == {plan.n_layers} and len(look) == 8
    found = Counter((run["placement"], run["warmup"], run["seed"]) for run in record["warmups"])
    assert found == Counter(
        (placement, warmup, seed)
        for placement in ("post", "pre")
        for warmup in plan.warmups
        for seed in plan.seeds
    )


def test_signals_smoke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the command from end to end: the file it writes and the table it prints."""
    record = run_main(signals, tmp_path / "x.json", monkeypatch)
    check_signals(record, signals.SMOKE)
    lines = capsys.readouterr().out.splitlines()[-19:]
    assert lines[0].startswith("placement")
    assert [line.split()[0] for line in lines[1::3]] == list(PLACEMENTS)
    run = next(
        run for run in record["runs"] if run["start"] == "gpt2" and run["placement"] == "pre"
    )
    stream = run["looks"][0]["stream"]
    grown = stream[-1] / stream[1]  # of one seed, so the mean is itself
    assert float(lines[4].split()[2]) == pytest.approx(grown, rel=1e-2)


def test_committed_signals_belong_to_this_code() -> None:
    """Guards that signals.json is no smoke run, and that its untrained models are this code's."""
    record, plan = committed("signals.json"), signals.Plan()
    check_signals(record, plan)
    seed = plan.seeds[-1]
    inputs_BT, targets_BT = torch.zeros(2, 1, 8, dtype=torch.int64)
    for placement in ("post", "sandwich"):
        (run,) = [
            run
            for run in record["runs"]
            if (run["placement"], run["qk_norm"], run["start"], run["seed"])
            == (placement, None, "gpt2", seed)
        ]
        model = signals.new_model(placement, None, "gpt2", seed, plan)
        stream = signals.signals(model, inputs_BT, targets_BT)["stream"]
        assert run["looks"][0]["stream"] == pytest.approx(stream, rel=0.5)  # other text


# ---- sweep.py


def test_unigram_loss_by_counting() -> None:
    """Guards the floor that failure is judged by, with Python's own counts and logarithms."""
    train_tokens, val_tokens = torch.randint(11, (500,)), torch.randint(13, (90,))
    plan = dataclasses.replace(sweep.SMOKE, n_vocab=16, eval_tokens=64)
    count = Counter(train_tokens.tolist())
    scored = val_tokens.tolist()[1:65]
    losses = [-math.log((count[token] + 1) / (500 + 16)) for token in scored]
    expected = sum(losses) / 64
    assert sweep.unigram_loss((train_tokens, val_tokens), plan) == pytest.approx(expected, rel=1e-5)


def test_the_floor_is_a_models_own() -> None:
    """Guards the comparison: a model that knows the frequencies only has the floor as its loss."""
    tokens = torch.randint(7, (600,))
    texts = tokens[:500], tokens[500:]
    plan = dataclasses.replace(sweep.SMOKE, n_vocab=8, eval_tokens=64)
    logit_V = (texts[0].bincount(minlength=8) + 1).log()

    class Unigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit_V = nn.Parameter(logit_V)

        def forward(self, tokens_BT: Tensor) -> Tensor:
            return self.logit_V.expand(*tokens_BT.shape, 8)

    loss = signals.evaluate(Unigram(), texts[1], TrainConfig(eval_tokens=64))
    assert sweep.unigram_loss(texts, plan) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(None, True), (3.4, True), (3.3, True), (3.29, True), (3.27, False), (1.0, False)],
)
def test_what_counts_as_failed(loss: float | None, expected: bool) -> None:
    """Guards the mark in the table and the plots, with a floor of 3.3."""
    assert sweep.failed({"final_val_loss": loss}, {"unigram_loss": 3.3}) is expected


def test_sweep_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the means and the counts of failures, and that kinds are not mixed."""
    runs = [
        {"placement": p, "qk_norm": q, "lr": lr, "seed": seed, "final_val_loss": 2.0 + seed}
        for p, q in sweep.kinds()
        for lr in (0.1, 0.2)
        for seed in (0, 1)
    ]
    for run in runs:
        if (run["placement"], run["qk_norm"], run["lr"]) == ("out", "full", 0.2):
            run["final_val_loss"] = 4.0 if run["seed"] else 1.0
        if (run["placement"], run["lr"]) == ("none", 0.1):
            run["final_val_loss"] = None
    sweep.print_table({"lrs": [0.1, 0.2], "unigram_loss": 3.5, "runs": runs})
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == len(sweep.kinds()) == 15
    assert "out full 2.500 2.500 (1)" in rows
    assert "none - - (2) 2.500" in rows and "none head - (2) 2.500" in rows
    assert rows.count("pre - 2.500 2.500") == rows.count("pre full 2.500 2.500") == 1


def check_sweep(record: dict, plan: sweep.Plan) -> None:
    """The record has what the notebook reads: each kind, rate and seed once."""
    assert list(record) == ["environment", "settings", "lrs", "unigram_loss", "runs"]
    settings = json.loads(json.dumps(dataclasses.asdict(plan)))
    assert {name: record["settings"][name] for name in settings} == settings
    keys = ("seed", "placement", "qk_norm", "lr")
    found = [tuple(run[key] for key in keys) for run in record["runs"]]
    assert found == [
        (seed, *kind, lr) for seed in plan.seeds for kind in sweep.kinds() for lr in plan.lrs
    ]
    assert 3 < record["unigram_loss"] < 4


def test_sweep_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the command from end to end, its processes included; a loss far too high is none."""
    record = run_main(sweep, tmp_path / "x.json", monkeypatch)
    check_sweep(record, sweep.SMOKE)
    for run in record["runs"]:
        if run["lr"] == 1e-3:
            assert 4 < run["final_val_loss"] < 6  # ln 256 = 5.55


def test_a_broken_run_has_no_loss() -> None:
    """Guards the record where the loss leaves the range of numbers."""
    texts = torch.randint(256, (400,)), torch.randint(256, (100,))
    run = sweep.train_one("none", None, 1e8, 0, sweep.SMOKE, texts)
    assert run["final_val_loss"] is None and run["max_grad_norm"] is None
    run = sweep.train_one("none", None, 1e-3, 0, sweep.SMOKE, texts)
    assert run["final_val_loss"] > 0 and run["max_grad_norm"] > 0


def test_committed_sweep_belongs_to_this_code() -> None:
    """Guards that sweep.json is no smoke run and is complete."""
    check_sweep(committed("sweep.json"), sweep.Plan())


# ---- both


@pytest.mark.parametrize("module", [signals, sweep])
def test_a_smoke_run_leaves_the_committed_record_alone(
    module: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards signals.json and sweep.json: without --out, a smoke run writes beside them."""
    script = tmp_path / "script.py"
    record = script.with_suffix(".json")
    record.write_text("committed", encoding="utf-8")
    monkeypatch.setattr(module, "__file__", str(script))
    monkeypatch.setattr(module, "experiment", lambda *_: iter([{"runs": []}]))
    monkeypatch.setattr(module, "print_table", lambda *_: None)
    monkeypatch.setattr(sys, "argv", [module.__name__, "--smoke"])
    module.main()
    assert record.read_text(encoding="utf-8") == "committed"
    assert json.loads((tmp_path / "script.smoke.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(sys, "argv", [module.__name__])
    module.main()
    assert record.read_text(encoding="utf-8") != "committed"


def test_experiments_build_models_of_one_size() -> None:
    """Guards "the same models": with sweep.py's layers a model here has the sweep's parameters."""
    sizes: list[norm_placement.Config] = []
    build = placements.build

    def noting(cfg: norm_placement.Config, placement: str) -> nn.Module:
        sizes.append(cfg)
        return build(cfg, placement)

    texts = torch.randint(256, (400,)), torch.randint(256, (100,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "build", noting)
        patch.setattr(signals, "build", noting)
        sweep.train_one("pre", "head", 1e-3, 0, sweep.SMOKE, texts)
        plan = dataclasses.replace(signals.SMOKE, n_layers=sweep.SMOKE.n_layers)
        signals.new_model("pre", "head", "gpt2", 0, plan)
    assert sizes[0] == sizes[1]
