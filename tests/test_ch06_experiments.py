"""Chapter 6's experiments: the same result by every way, fair kinds, and the files they write."""

import itertools
import json
import random
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ch06_moe import balancing, dense, dispatch, moe
from ch06_moe.balance import RouterLog
from tests.parity import mutant

pytestmark = pytest.mark.usefixtures("one_thread")

ALTERNATIVES = ("loop_all", "loop_active", "dense_all")
LAYERS = [(8, 2, 0), (5, 1, 1), (6, 6, 2), (16, 3, 1)]  # routed experts, active, shared


def run_main(module: types.ModuleType, path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The record that `python -m module --smoke --out path` writes."""
    monkeypatch.setattr(sys, "argv", [module.__name__, "--smoke", "--out", str(path)])
    module.main()
    return json.loads(path.read_text(encoding="utf-8"))


def committed(name: str) -> dict:
    return json.loads(Path(dispatch.__file__).with_name(name).read_text(encoding="utf-8"))


def layer_of(n_experts: int, n_active: int, n_shared: int, bias: float = 0.0) -> moe.MoE:
    """A layer in float64; bias: of the choice, how much the first two experts are preferred."""
    cfg = moe.Config(
        d_model=12, d_expert=7, n_experts=n_experts, n_active=n_active, n_shared=n_shared
    )
    layer = moe.MoE(cfg).double()
    layer.choice_bias.data[:2] = bias
    return layer


# ---- dispatch.py


def distance(module: types.ModuleType, layer: moe.MoE, x_BTD: Tensor, how: str) -> float:
    """How far an alternative's output and gradients are from those of MoE.forward."""
    found = dispatch.output_and_gradients(getattr(module, how), layer, x_BTD)
    expected = dispatch.output_and_gradients(moe.MoE.forward, layer, x_BTD)
    assert found.keys() == expected.keys() and len(found) > 5
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


@pytest.mark.parametrize("how", ALTERNATIVES)
def test_ways_equal_the_layer(how: str) -> None:
    """Guards every way and its gradients: few tokens, idle experts, shared ones, a bias."""
    for sizes, bias, (B, T) in itertools.product(LAYERS, (0.0, 10.0), [(1, 1), (2, 9)]):
        layer = layer_of(*sizes, bias)
        assert distance(dispatch, layer, torch.randn(B, T, 12).double(), how) < 1e-12


@pytest.mark.parametrize(
    ("how", "change"),
    [
        ("loop_all", "weight_NA[token_M, place_M, None] -> weight_NA[token_M, 0, None]"),
        ("loop_active", "weight_NA[token_M, place_M, None] -> weight_NA[token_M, 0, None]"),
        ("loop_active", "expert_NA.unique() -> expert_NA[:, 0].unique()"),
        ("loop_all", "range(len(layer.experts)) -> range(layer.n_active)"),
        ("dense_all", "weight_NI[:, i, None] * expert -> layer.n_active**-1 * expert"),
        ("dense_all", "else layer.shared(x_ND) -> else torch.zeros_like(x_ND)"),
    ],
)
def test_a_wrong_way_is_noticed(how: str, change: str) -> None:
    """Guards the guard."""
    wrong = mutant(dispatch, change)
    x_BTD = torch.randn(2, 9, 12).double()
    assert distance(wrong, layer_of(16, 3, 1), x_BTD, how) > 1e-3


def test_unequal_ways_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the assertion before the timing: a way that only its gradient sets apart, too."""
    layer, x_BTD = layer_of(5, 2, 1), torch.randn(1, 4, 12).double()
    dispatch.assert_equal(layer, x_BTD)
    for wrong in (
        lambda layer, x_BTD: 1.01 * layer(x_BTD),
        lambda layer, x_BTD: layer(x_BTD) + 0.1 * (x_BTD - x_BTD.detach()),
    ):
        monkeypatch.setitem(dispatch.WAYS, "loop_all", wrong)
        with pytest.raises(AssertionError):
            dispatch.assert_equal(layer, x_BTD)


def test_ways_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the timing: every way once a round with and once without gradients."""
    layer, called = layer_of(5, 2, 0), []

    def noting(how: str) -> types.FunctionType:
        def way(layer: moe.MoE, x_BTD: Tensor) -> Tensor:
            called.append((how, torch.is_grad_enabled()))
            return layer(x_BTD)

        return way

    for how in dispatch.WAYS:
        monkeypatch.setitem(dispatch.WAYS, how, noting(how))
    found = dispatch.measure(layer, torch.randn(1, 3, 12).double(), rounds=4)
    a_round = [(how, grad) for how in dispatch.WAYS for grad in (False, True)]
    assert called == 5 * a_round
    for seconds in found.values():
        assert min(seconds.values()) > 0
        assert seconds["backward"] < seconds["training"]


def test_multiplications_are_those_of_the_code() -> None:
    """Guards the formula against torch's own counter, router and shared experts apart."""
    for sizes, n_tokens in itertools.product(LAYERS, (1, 7)):
        layer = layer_of(*sizes)
        cfg = moe.Config(d_model=12, d_expert=7, n_experts=sizes[0], n_active=sizes[1])
        x_BTD = torch.randn(1, n_tokens, 12).double()
        with FlopCounterMode(display=False) as counter:
            layer.route(x_BTD[0])
            dispatch.shared_output(layer, x_BTD[0])
        besides = counter.get_total_flops()
        for how, way in dispatch.WAYS.items():
            with FlopCounterMode(display=False) as counter:
                way(layer, x_BTD)
            counted = (counter.get_total_flops() - besides) // 2  # an addition comes with each
            assert counted == dispatch.multiplications(how, n_tokens, cfg)


def check_dispatch(record: dict, plan: dispatch.Plan) -> None:
    """The record has what the notebook reads, and its sizes and counts are this code's."""
    assert list(record) == ["environment", "settings", "runs"]
    settings = json.loads(json.dumps(asdict(plan)))
    assert record["settings"] == settings | {"dtype": "float32", "n_shared": 0}
    sizes = [(run["n_experts"], run["n_active"]) for run in record["runs"]]
    found = [
        (size, run["n_tokens"], run["how"]) for size, run in zip(sizes, record["runs"], strict=True)
    ]
    assert found == list(itertools.product(plan.experts, plan.n_tokens, dispatch.WAYS))
    for run in record["runs"]:
        cfg = dispatch.layer_config(plan, run["n_experts"], run["n_active"])
        assert run["multiplications"] == dispatch.multiplications(run["how"], run["n_tokens"], cfg)
        assert min(run["forward"], run["backward"], run["training"]) > 0


def test_dispatch_smoke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the command from end to end: the file it writes and the tables it prints."""
    check_dispatch(run_main(dispatch, tmp_path / "x.json", monkeypatch), dispatch.SMOKE)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("experts") for line in lines) == 2
    assert lines[-1].split()[:3] == ["8", "2", "8"]


def test_committed_dispatch_belongs_to_this_code() -> None:
    """Guards that dispatch.json is no smoke run and was made with the sizes that stand here."""
    record = committed("dispatch.json")
    rounds = record["settings"]["rounds"]
    check_dispatch(record, replace(dispatch.Plan(), rounds=rounds))
    assert rounds >= 7


# ---- balancing.py


def test_methods_differ_in_the_extra_loss_only() -> None:
    """Guards what each method does to the loss and to the bias, with the coefficients named."""
    cfg, _ = balancing.SMOKE
    extra, moved = {}, {}
    for method, act in balancing.METHODS.items():
        model = balancing.new_model(cfg, 0).train()
        with RouterLog(model) as routers:
            model(torch.arange(40).view(2, 20))
            extra[method] = act(routers).item()
            moved[method] = {
                step for layer in routers.layers for step in layer.choice_bias.abs().tolist()
            }
    assert extra["none"] == extra["bias"] == 0
    assert 0.01 < extra["aux"] < 0.08  # 0.01 in perfect balance, 8 times that in the worst case
    z = (extra["aux_z"] - extra["aux"]) / balancing.Z_COEFFICIENT
    assert z == pytest.approx(torch.tensor(8).log().item() ** 2, rel=0.1)  # all logits near zero
    assert moved["none"] == moved["aux"] == moved["aux_z"] == {0.0}
    assert max(moved["bias"]) == pytest.approx(balancing.BIAS_STEP)


def test_load_is_averaged_over_the_steps_before_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the windows, and that layers are compared each by itself."""
    cfg, training = balancing.SMOKE
    training = replace(training, steps=40)
    share_SLI = torch.rand(40, 2, 8)
    share_SLI = share_SLI / share_SLI.sum(dim=-1, keepdim=True)

    def train(model: nn.Module, *args: object, extra_loss: object, **kwargs: object) -> object:
        for i in range(40):
            model(torch.arange(6)[None])
            extra_loss()
            log.shares[-1] = share_SLI[i].tolist()
        return types.SimpleNamespace(final_val_loss=1.5)

    class Log(RouterLog):
        def __enter__(self) -> RouterLog:
            nonlocal log
            log = self
            return super().__enter__()

    log = None
    monkeypatch.setattr(balancing, "train", train)
    monkeypatch.setattr(balancing, "RouterLog", Log)
    model = balancing.new_model(cfg, 0).train()
    run = balancing.train_one("none", model, training, (torch.arange(9), torch.arange(9)))
    assert run["steps"] == [2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40]
    for i, step in enumerate(run["steps"]):
        load_LI = (share_SLI[step - 2] + share_SLI[step - 1]) / 2
        torch.testing.assert_close(torch.tensor(run["load_by_layer"][i]), load_LI)
        torch.testing.assert_close(torch.tensor(run["load"][i]), load_LI.mean(dim=0))
        expected = 8 * (max(load_LI[0]) + max(load_LI[1])) / 2
        assert run["max_over_mean"][i] == pytest.approx(expected.item(), rel=1e-5)


def test_record_steps() -> None:
    """Guards that windows end within the run and do not overlap."""
    assert balancing.record_steps(400) == ([10, *range(40, 401, 40)], 10)
    for n_steps in (20, 57, 200, 1000):
        steps, window = balancing.record_steps(n_steps)
        assert steps[0] == window >= 1 and steps[-1] == n_steps
        assert all(b - a >= window for a, b in itertools.pairwise(steps))


def test_max_over_mean() -> None:
    """Guards the two ends, and against layers that hide each other's imbalance."""
    assert balancing.max_over_mean(torch.full((3, 8), 1 / 8)) == 1
    one_each_LI = F.one_hot(torch.arange(4), 4).float()
    assert balancing.max_over_mean(one_each_LI) == 4
    assert balancing.max_over_mean(torch.tensor([[0.5, 0.5], [1.0, 0.0]])) == 1.5


def test_kinds_of_tokens() -> None:
    """Guards the classes: every token is in one of them, and most are in the right one."""
    expected = {
        " the": "letters", "q": "letters", " 7": "digits", "12": "digits",
        " ": "spaces and line ends", "\n\n": "spaces and line ends",
        " (": "punctuation and the rest", "'s": "punctuation and the rest",
        "\ufffd": "punctuation and the rest",
    }  # fmt: skip
    assert {text: balancing.kind(text) for text in expected} == expected
    assert set(expected.values()) == {*balancing.KINDS} - {"all"}


def test_choices_are_counted_by_token() -> None:
    """Guards the counts against a loop over tokens that asks each layer's route."""
    cfg, training = balancing.SMOKE
    model = balancing.new_model(cfg, 3).eval()
    for block in model.blocks[1:]:
        block.mlp.choice_bias.data.normal_(std=0.1)
    tokens = torch.randint(cfg.vocab_size, (150,))
    count_LVI = balancing.choices_by_token(model, tokens, training)
    assert not model.training and count_LVI.shape == (2, 512, 8)
    expected = torch.zeros_like(count_LVI)
    seen: list[Tensor] = []
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        for block in model.blocks[1:]
    ]
    with torch.no_grad():
        for first in range(0, 149, training.seq_len):  # in windows of their own
            part = tokens[first : min(first + training.seq_len, 149)]
            seen.clear()
            model(part[None])
            for layer, (block, x_ND) in enumerate(zip(model.blocks[1:], seen, strict=True)):
                for token, experts in zip(part, block.mlp.route(x_ND)[0], strict=True):
                    expected[layer, token, experts] += 1
    for hook in hooks:
        hook.remove()
    assert torch.equal(count_LVI, expected)


def test_specialisation_by_hand() -> None:
    """Guards shares and numbers of tokens where every count is known."""
    cfg, _ = balancing.SMOKE
    before_LVI, after_LVI = (torch.zeros(2, 512, 8, dtype=torch.int64) for _ in range(2))
    texts = [balancing.decode([token], 512) for token in range(512)]
    the, space, seven = texts.index(" the"), texts.index(" "), texts.index("7")
    after_LVI[:, the, 3], after_LVI[:, the, 5] = 60, 60
    after_LVI[0, space, 3], after_LVI[0, space, 6] = 30, 10
    after_LVI[1, space, 2], after_LVI[1, space, 7] = 20, 20
    before_LVI[:, seven, :2] = 1
    found = balancing.specialisation(before_LVI, after_LVI, cfg)
    assert found["layers"] == [1, 2]
    assert dict(zip(found["kinds"], found["n_tokens"], strict=True)) == {
        "all": 80, "letters": 60, "digits": 0,
        "spaces and line ends": 20, "punctuation and the rest": 0,
    }  # fmt: skip
    share_LKI = torch.tensor(found["share"])
    assert share_LKI[0, 0].tolist() == pytest.approx([0, 0, 0, 90 / 160, 0, 60 / 160, 10 / 160, 0])
    assert share_LKI[1, 3].tolist() == [0, 0, 0.5, 0, 0, 0, 0, 0.5]
    assert share_LKI[:, 2].count_nonzero() == 0
    assert torch.tensor(found["untrained_share"])[1, 2].tolist() == [0.5, 0.5] + [0] * 6
    assert found["tokens"][:2] == [" the", " "] and found["n_token"][:2] == [60, 20]
    assert torch.tensor(found["token_share"])[0, 1, 3] == 0.75


def check_balancing(record: dict, cfg: moe.Config, training: object) -> None:
    """The record has what the notebook reads, and belongs to this code's settings."""
    assert list(record) == ["environment", "settings", "runs", "specialisation"]
    settings = record["settings"]
    assert settings["model"] == json.loads(json.dumps(asdict(cfg)))
    expected = json.loads(json.dumps(asdict(training))) | {"seed": "each of the seeds"}
    assert settings["training"] == expected
    found = (settings["coefficient"], settings["z_coefficient"], settings["bias_step"])
    assert found == (balancing.COEFFICIENT, balancing.Z_COEFFICIENT, balancing.BIAS_STEP)
    steps, window = balancing.record_steps(training.steps)
    assert settings["window"] == window
    pairs = [(run["seed"], run["method"]) for run in record["runs"]]
    assert pairs == list(itertools.product(balancing.SEEDS, balancing.METHODS))
    assert len(set(settings["seeds"])) >= 3
    n_layers = cfg.n_layers - cfg.n_dense_layers
    for run in record["runs"]:
        assert run["steps"] == steps and len(run["z_loss"]) == len(steps)
        assert 0 < run["final_val_loss"] < torch.tensor(cfg.vocab_size).log()
        load_SLI = torch.tensor(run["load_by_layer"])
        assert load_SLI.shape == (len(steps), n_layers, cfg.n_experts)
        assert load_SLI.sum(dim=-1).sub(1).abs().max() < 1e-5
        torch.testing.assert_close(torch.tensor(run["load"]), load_SLI.mean(dim=1))
        expected = [balancing.max_over_mean(load_LI) for load_LI in load_SLI]
        assert run["max_over_mean"] == pytest.approx(expected)
    check_specialisation(record["specialisation"], n_layers, cfg)


def check_specialisation(found: dict, n_layers: int, cfg: moe.Config) -> None:
    """Shares add up to one for every kind that has tokens; the kinds are all there are."""
    assert len(found["layers"]) == n_layers and found["kinds"] == list(balancing.KINDS)
    everything, *kinds = found["n_tokens"]
    assert everything == sum(kinds) and min(kinds) > 0
    assert len(found["tokens"]) == len(found["n_token"]) == balancing.N_FREQUENT
    assert found["n_token"] == sorted(found["n_token"], reverse=True)
    for name in ("share", "untrained_share", "token_share", "untrained_token_share"):
        share = torch.tensor(found[name])
        n = balancing.N_FREQUENT if "token" in name else len(balancing.KINDS)
        assert share.shape == (n_layers, n, cfg.n_experts)
        assert share.sum(dim=-1).sub(1).abs().max() < 1e-5


def test_balancing_smoke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the command from end to end, and that methods start alike within a seed."""
    record = run_main(balancing, tmp_path / "x.json", monkeypatch)
    check_balancing(record, *balancing.SMOKE)
    for seed in balancing.SEEDS:
        first = {str(run["load"][0]) for run in record["runs"] if run["seed"] == seed}
        assert len(first) == 1  # the first step's, before any method has acted
    lines = capsys.readouterr().out.splitlines()[-len(balancing.METHODS) :]
    assert [line.split()[0] for line in lines] == list(balancing.METHODS)


def test_committed_balancing_belongs_to_this_code() -> None:
    """Guards that balancing.json is no smoke run, and that balancing really balanced."""
    record = committed("balancing.json")
    check_balancing(record, balancing.MODEL, balancing.TRAINING)
    last = {(run["method"], run["seed"]): run["max_over_mean"][-1] for run in record["runs"]}
    for (method, seed), load in last.items():
        assert method == "none" or load < last["none", seed]


# ---- dense.py


def test_kinds_have_the_parameters_they_claim() -> None:
    """Guards the comparison: equal at work, or equal in all, but for the routers' few."""
    for plan in (dense.Plan(), dense.Plan(n_layers=2, d_model=64, d_expert=96)):
        n = {}
        for kind in dense.KINDS:
            n[kind] = dense.n_parameters(dense.config(kind, plan))
            model = moe.Transformer(dense.config(kind, plan))
            assert n[kind][0] == sum(param.numel() for param in model.parameters())
        routers = plan.n_layers * (plan.d_model + 1)  # with the bias on the choice, an expert
        for kind, n_experts in (("moe", 8), ("moe_no_shared", 9)):
            assert n[kind][0] == n["dense_total"][0] + n_experts * routers
            assert n[kind][1] == n["dense_active"][1] + n_experts * routers
            assert n_experts * routers < 0.01 * n[kind][1]
        for kind in ("dense_active", "dense_total"):
            assert n[kind][0] == n[kind][1]


def test_active_parameters_are_those_with_a_gradient() -> None:
    """Guards the count by what a single token reaches, embeddings of other tokens included."""
    for kind in dense.KINDS:
        cfg = dense.config(kind, dense.SMOKE)
        model = moe.Transformer(cfg)
        model(torch.tensor([[7]])).square().sum().backward()
        reached = sum(p.numel() for p in model.parameters() if p.grad is not None)
        biases = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        assert reached + biases == dense.n_parameters(cfg)[1]


def test_kinds_differ_in_the_mlp_only() -> None:
    """Guards that attention, depth and vocabulary are the same for all."""
    mlp = ("n_experts", "n_active", "n_shared", "d_ff")
    plan = dense.Plan()
    rest = [asdict(dense.config(kind, plan)) for kind in dense.KINDS]
    assert all({k: v for k, v in one.items() if k not in mlp} ==
               {k: v for k, v in rest[0].items() if k not in mlp} for one in rest)  # fmt: skip
    for kind, width in (("dense_active", 3 * plan.d_expert), ("dense_total", 9 * plan.d_expert)):
        model = moe.Transformer(dense.config(kind, plan))
        assert {block.mlp.gate_proj.out_features for block in model.blocks} == {width}
    for kind, n_experts in (("moe", 8), ("moe_no_shared", 9)):
        model = moe.Transformer(dense.config(kind, plan))
        assert {len(block.mlp.experts) for block in model.blocks} == {n_experts}


def test_one_rate_for_all_and_kinds_share_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards pairing: within a seed all kinds train alike, with the rate the search found."""
    seen: list = []

    def train(model: moe.Transformer, *tokens: Tensor, **kwargs: object) -> object:
        cfg = tokens[2]
        kind = next(k for k in dense.KINDS if dense.config(k, plan) == model.cfg)
        seen.append((kind, cfg, kwargs["extra_loss"] is not None))
        if kwargs["extra_loss"]:
            model(tokens[0][None, :9])
            kwargs["extra_loss"]()
        # dense_total alone would take the last rate; together the second is the best
        table = {"dense_active": [2, 1, 3], "dense_total": [5, 2, 1], "moe": [3, 1, 4]}
        loss = table.get(kind, [0, 0, 0])[plan.lrs.index(cfg.lr)]
        return types.SimpleNamespace(
            val_steps=[0],
            val_losses=[loss],
            final_val_loss=loss,
            final_train_loss=loss,
            tokens_per_s=1.0,
        )

    plan = replace(dense.SMOKE, lrs=(0.1, 0.2, 0.3), seeds=(4, 7, 9))
    monkeypatch.setattr(dense, "train", train)
    *_, record = dense.experiment(plan)
    assert record["settings"]["lr"] == 0.2
    searched, trained = seen[:9], seen[9:]
    assert {cfg.seed for _, cfg, _ in searched}.isdisjoint(plan.seeds)
    assert [(cfg.seed, kind) for kind, cfg, _ in trained] == list(
        itertools.product(plan.seeds, dense.KINDS)
    )
    for kind, cfg, balances in trained:
        assert cfg == replace(trained[0][1], seed=cfg.seed) and cfg.lr == 0.2
        assert balances == kind.startswith("moe")


def test_differences_are_paired_by_seed() -> None:
    """Guards the table: each loss less dense_active's with the same seed, no other."""
    runs = [
        {"kind": kind, "seed": seed, "final_val_loss": seed + 0.25 * i * (1 - 2 * seed)}
        for seed in (0, 1)
        for i, kind in enumerate(dense.KINDS)
    ]
    random.Random(0).shuffle(runs)
    found = dense.summary(runs)
    assert list(found) == list(dense.KINDS)
    assert found["dense_total"] == ["0.5000 (0.2500..0.7500)", "+0.0000 (-0.2500..+0.2500)"]


def check_dense(record: dict, plan: dense.Plan) -> None:
    """The record has what the notebook reads, and belongs to this code's kinds."""
    assert list(record) == ["environment", "settings", "step_seconds", "runs"]
    settings = record["settings"]
    for key, expected in json.loads(json.dumps(asdict(plan))).items():
        assert settings[key] == expected, key
    sums = [sum(losses) for losses in zip(*settings["search_losses"].values(), strict=True)]
    assert settings["lr"] == settings["lrs"][sums.index(min(sums))]
    assert record["step_seconds"].keys() == dense.KINDS.keys()
    assert len(set(settings["seeds"])) >= 3
    found = [(run["seed"], run["kind"]) for run in record["runs"]]
    assert found == list(itertools.product(settings["seeds"], dense.KINDS))
    for run in record["runs"]:
        n_all, n_active = dense.n_parameters(dense.config(run["kind"], plan))
        assert (run["n_parameters"], run["n_active"]) == (n_all, n_active)
        assert run["val_steps"] == record["runs"][0]["val_steps"]
        assert run["val_steps"][0] == 0 and run["val_steps"][-1] == settings["steps"]
        assert len(run["val_losses"]) == len(run["val_steps"])
        assert run["final_val_loss"] == run["val_losses"][-1] < run["val_losses"][0]
        assert run["tokens_per_s"] > 0 and run["final_train_loss"] > 0
        assert (run["max_over_mean"] is None) == run["kind"].startswith("dense")


def test_dense_smoke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the command from end to end: the file it writes and the table it prints."""
    check_dense(run_main(dense, tmp_path / "x.json", monkeypatch), dense.SMOKE)
    lines = capsys.readouterr().out.splitlines()[-len(dense.KINDS) :]
    assert [line.split()[0] for line in lines] == list(dense.KINDS)


def test_committed_dense_belongs_to_this_code() -> None:
    """Guards that dense.json is no smoke run and was made with the sizes that stand here."""
    check_dense(committed("dense.json"), dense.Plan())
