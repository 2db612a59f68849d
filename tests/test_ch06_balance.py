"""balance.py: its losses against loops and transformers, its biases on routers that need them."""

import dataclasses
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ch01_gpt2.train import TrainConfig, TrainResult, train
from ch06_moe import balance, moe
from tests.parity import mutant

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the losses


def draw(N: int, I: int, A: int) -> tuple[Tensor, Tensor]:  # noqa: E741
    """Logits (N, I), experts not equally liked, and the A likeliest of each token, (N, A)."""
    logit_NI = torch.randn(N, I) + torch.linspace(0, 1, I)
    return logit_NI, logit_NI.topk(A, dim=-1).indices


def balance_by_loops(logit_NI: Tensor, expert_NA: Tensor) -> float:
    """Switch's equations 4 to 6 in float64, with shares of the choices, which add up to one."""
    logits, choices = logit_NI.tolist(), expert_NA.tolist()
    n_experts, total = len(logits[0]), 0.0
    for i in range(n_experts):
        n_chosen = sum(row.count(i) for row in choices)
        share = n_chosen / sum(len(row) for row in choices)
        probs = [math.exp(row[i]) / sum(math.exp(a) for a in row) for row in logits]
        total += share * sum(probs) / len(probs)
    return n_experts * total


def z_by_loops(logit_NI: Tensor) -> float:
    """ST-MoE's equation 5 in float64."""
    logs = [math.log(sum(math.exp(a) for a in row)) for row in logit_NI.tolist()]
    return sum(log**2 for log in logs) / len(logs)


SHAPES = [(1, 1, 1), (5, 4, 1), (40, 6, 2), (7, 3, 3), (30, 16, 5)]


def check_losses(module: ModuleType) -> None:
    """Both losses equal loops, at all sizes."""
    for N, I, A in SHAPES:  # noqa: E741
        logit_NI, expert_NA = draw(N, I, A)
        found = float(module.balance_loss(logit_NI, expert_NA))
        assert found == pytest.approx(balance_by_loops(logit_NI, expert_NA), rel=1e-5)
        assert float(module.z_loss(logit_NI)) == pytest.approx(z_by_loops(logit_NI), rel=1e-5)


def test_losses_by_loops() -> None:
    """Guards both formulas."""
    check_losses(balance)


@pytest.mark.parametrize("A", [1, 2])
def test_balance_loss_at_its_ends(A: int) -> None:
    """Guards the scale: 1 where all are equal, in shares or in probabilities; I where one has all.

    With two choices a token, the second expert has half of them and no probability: I / 2.
    """
    I = 6  # noqa: E741
    even_NA = torch.arange(12 * A).view(12, A) % I
    logit_NI, likeliest_NA = draw(12, I, A)
    for logits, experts in ((logit_NI, even_NA), (torch.zeros(12, I), likeliest_NA)):
        assert float(balance.balance_loss(logits, experts)) == pytest.approx(1, rel=1e-6)
    certain_NI = 50.0 * torch.eye(I)[[2] * 12]
    all_NA = certain_NI.topk(A, dim=-1).indices
    assert float(balance.balance_loss(certain_NI, all_NA)) == pytest.approx(I / A, rel=1e-6)


@pytest.mark.parametrize(("N", "I", "A"), SHAPES)
def test_balance_loss_equals_transformers(N: int, I: int, A: int) -> None:  # noqa: E741
    """Guards the loss of one layer against Mixtral's, which is A times as large.

    Theirs divides the counts by N tokens: its shares add up to A. Ours divides by N x A choices:
    they add up to one. All else is the same product, so theirs = A x ours.
    """
    logit_NI, expert_NA = draw(N, I, A)
    theirs = load_balancing_loss_func((logit_NI,), num_experts=I, top_k=A)
    ours = balance.balance_loss(logit_NI, expert_NA)
    assert float(theirs) == pytest.approx(A * float(ours), rel=1e-5)


def test_gradients_of_the_losses() -> None:
    """Guards what trains: the gradient pulls down the probabilities of experts with large shares.

    By hand: d/dl_ni of I/N sum_j f_j p_nj is I/N p_ni (f_i - sum_j f_j p_nj); that of the z-loss
    is 2/N p_ni times the log of the sum.
    """
    logit_NI, expert_NA = draw(20, 6, 2)
    logit_NI = logit_NI.double().requires_grad_()
    prob_NI = logit_NI.detach().softmax(dim=-1)
    share_I = torch.tensor([(expert_NA == i).sum() / 40 for i in range(6)]).double()
    expected_NI = 6 / 20 * prob_NI * (share_I - (prob_NI @ share_I)[:, None])
    [found_NI] = torch.autograd.grad(balance.balance_loss(logit_NI, expert_NA), logit_NI)
    torch.testing.assert_close(found_NI, expected_NI, rtol=1e-4, atol=1e-7)
    expected_NI = 2 / 20 * prob_NI * logit_NI.detach().logsumexp(dim=-1, keepdim=True)
    [found_NI] = torch.autograd.grad(balance.z_loss(logit_NI), logit_NI)
    torch.testing.assert_close(found_NI, expected_NI, rtol=1e-4, atol=1e-7)


def test_losses_in_bfloat16() -> None:
    """Guards the type: logits of 16 bits, sums in float32."""
    logit_NI, expert_NA = draw(300, 8, 2)
    half_NI = logit_NI.bfloat16()
    for found, truth in (
        (balance.balance_loss(half_NI, expert_NA), balance_by_loops(half_NI, expert_NA)),
        (balance.z_loss(half_NI), z_by_loops(half_NI)),
    ):
        assert found.dtype == torch.float32
        assert float(found) == pytest.approx(truth, rel=1e-5)


def test_shares() -> None:
    """Guards the counts: one share an expert, none forgotten, one in all."""
    expert_NA = torch.tensor([[0, 3], [3, 1], [3, 0], [1, 3]])
    assert balance.shares(expert_NA, 6).tolist() == [0.25, 0.25, 0, 0.5, 0, 0]


# ---- the bias


def check_bias(module: ModuleType) -> None:
    """One step up for experts with less than the mean, one down for more, none for the mean."""
    expert_NA = torch.tensor([[0, 3], [3, 1], [3, 0], [2, 3]])
    bias_I = torch.tensor([0.5, -0.5, 0.0, 0.25, 0.0])  # shares 2/8, 1/8, 1/8, 4/8, 0
    before_I = bias_I.clone()
    module.move_bias(bias_I, expert_NA, 0.125)
    assert (bias_I - before_I).tolist() == [-0.125, 0.125, 0.125, -0.125, 0.125]
    for n_experts in range(1, 65):  # shares of just 1/I, though float32 holds few of these
        even_NA = torch.arange(n_experts).repeat(7)[:, None]
        bias_I = torch.zeros(n_experts)
        module.move_bias(bias_I, even_NA, 0.1)
        assert not bias_I.any(), n_experts


def test_bias_moves_by_one_step() -> None:
    """Guards sign, size and the mean itself, in place."""
    check_bias(balance)


def test_bias_of_a_trained_parameter() -> None:
    """Guards that the move is no part of any graph, on a Parameter, too."""
    bias_I = torch.nn.Parameter(torch.zeros(3))
    balance.move_bias(bias_I, torch.tensor([[0], [0], [2]]), 0.5)
    assert bias_I.tolist() == [-0.5, 0.5, 0.0] and bias_I.grad_fn is None


def toy(step: float, n_steps: int) -> tuple[float, float]:
    """Largest share over the mean, of the first tokens and of the last, of a router in disorder.

    The logits are new at each step, and no loss changes them.
    """
    generator, bias_I, found = torch.Generator().manual_seed(0), torch.zeros(8), []
    for _ in range(n_steps):
        logit_NI = torch.randn(256, 8, generator=generator) + torch.linspace(0, 2, 8)
        expert_NA = (logit_NI.softmax(dim=-1) + bias_I).topk(2, dim=-1).indices
        found.append(float(8 * balance.shares(expert_NA, 8).max()))
        balance.move_bias(bias_I, expert_NA, step)
    return sum(found[:20]) / 20, sum(found[-20:]) / 20


def test_the_bias_evens_out_a_router() -> None:
    """Guards the method: within 300 steps the shares are even; without it they stay as they are."""
    first, last = toy(step=0.003, n_steps=300)
    assert first > 2 and last < 1.2
    first, last = toy(step=0.0, n_steps=300)
    assert first == pytest.approx(last, rel=0.05) and last > 2


# ---- the log

SMALL = moe.Config(
    vocab_size=32,
    n_layers=3,
    d_model=16,
    n_heads=2,
    n_kv_heads=1,
    head_dim=8,
    d_latent=None,
    d_ff=16,
    n_experts=6,
    n_active=2,
    d_expert=8,
)


def small_model(cfg: moe.Config = SMALL, seed: int = 0) -> moe.Transformer:
    """A model whose routers have opinions from the start: shares are far from even."""
    torch.manual_seed(seed)
    model = moe.Transformer(cfg)
    for name, param in model.named_parameters():
        if name.endswith(("router.weight", "embed.weight")):
            param.data *= 20
    return model


def moe_layers(model: moe.Transformer) -> list[moe.MoE]:
    return [block.mlp for block in model.blocks if isinstance(block.mlp, moe.MoE)]


def check_log(module: ModuleType) -> None:
    """What the log keeps, and what its three ways to balance do with it, on one model."""
    model, tokens_BT = small_model(), torch.randint(32, (4, 9))
    layers = moe_layers(model)
    for layer in layers:
        layer.choice_bias.data.normal_(std=0.3)
    chosen: list[tuple[Tensor, Tensor]] = []

    def note(layer: moe.MoE) -> None:
        """Each later call of the layer's route adds its logits and its choice."""
        route = layer.route

        def noted(x_ND: Tensor) -> tuple[Tensor, Tensor]:
            expert_NA, weight_NA = route(x_ND)
            chosen.append((x_ND @ layer.router.weight.T, expert_NA))
            return expert_NA, weight_NA

        layer.route = noted

    for layer in layers:
        note(layer)
    with module.RouterLog(model) as log:
        assert log.layers == layers
        model.train()(tokens_BT)
        seen = chosen[:2]
        model.eval()(torch.randint(32, (2, 5)))
        assert len(chosen) == 4
        for (logit_NI, _), kept_NI in zip(seen, log.logits, strict=True):
            torch.testing.assert_close(kept_NI, logit_NI)
        for (_, expert_NA), found_NA in zip(seen, log.choices(), strict=True):
            assert torch.equal(found_NA.sort().values, expert_NA.sort().values)
        counted = [expert_NA.flatten().bincount(minlength=6) / 72 for _, expert_NA in seen]
        assert len(log.shares) == 1
        for found, expected_I in zip(log.shares[0], counted, strict=True):
            assert found == pytest.approx(expected_I.tolist()) and sum(found) == pytest.approx(1)

        for coefficients in ((0.01, 0.0), (2.0, 0.0), (0.0, 3.0), (0.5, 0.25)):
            aux = sum(balance_by_loops(*pair) for pair in seen) / 2
            z = sum(z_by_loops(logit_NI) for logit_NI, _ in seen) / 2
            expected = coefficients[0] * aux + coefficients[1] * z
            extra = log.balance_by_loss(*coefficients)
            assert extra.item() == pytest.approx(expected, rel=1e-5)
        extra.backward()
        for layer in layers:
            assert layer.router.weight.grad.abs().max() > 1e-6
            assert layer.choice_bias.grad is None
        assert all(param.grad is None for param in layers[-1].experts.parameters())

        assert float(log.watch()) == 0
        before = [layer.choice_bias.detach().clone() for layer in layers]
        assert float(log.balance_by_bias(step=0.125)) == 0
        for layer, before_I, share_I in zip(layers, before, counted, strict=True):
            expected_I = before_I + 0.125 * torch.sign(1 / 6 - share_I)
            torch.testing.assert_close(layer.choice_bias.detach(), expected_I)
        assert len(log.shares) == 7  # one entry a call of any of them
    kept = [logit_NI.clone() for logit_NI in log.logits]
    model.train()(tokens_BT)
    assert all(map(torch.equal, kept, log.logits))
    assert not any(layer.router._forward_hooks for layer in layers)


def test_log_keeps_what_routers_do() -> None:
    """Guards logits, choices and shares of the training forward, layer by layer, and all losses."""
    check_log(balance)


def test_hooks_are_gone_after_an_error() -> None:
    """Guards the with block: Ctrl-C in training leaves no hook behind."""
    model = small_model()
    with pytest.raises(KeyboardInterrupt), balance.RouterLog(model):
        assert all(layer.router._forward_hooks for layer in moe_layers(model))
        raise KeyboardInterrupt
    assert not any(layer.router._forward_hooks for layer in moe_layers(model))


# ---- in training

CFG = TrainConfig(steps=60, batch_size=4, seq_len=16, lr=3e-3, eval_every=30, eval_tokens=64)


def skewed_text(n: int) -> Tensor:
    """Tokens of which some are much more frequent than others, and each mostly names the next."""
    generator = torch.Generator().manual_seed(3)
    drawn_T = torch.multinomial(1 / torch.arange(1, 33), n, replacement=True, generator=generator)
    told = (torch.rand(n, generator=generator) < 0.7).tolist()
    text = [0]
    for token, follows in zip(drawn_T.tolist(), told, strict=True):
        text.append((5 * text[-1] + 3) % 32 if follows else token)
    return torch.tensor(text[1:])


def run(
    method: str | None, cfg: TrainConfig = CFG, **arguments: float
) -> tuple[TrainResult, list[float], moe.Transformer]:
    """A small training: its record, the largest share over the mean a step, and the model."""
    model, tokens = small_model(), skewed_text(2000)
    with balance.RouterLog(model) as log:
        extra = None
        if method is not None:
            extra = lambda: getattr(log, method)(**arguments)  # noqa: E731
        done = train(model, tokens[:1800], tokens[1800:], cfg, device="cpu", extra_loss=extra)
    worst = [6 * max(max(layer) for layer in call) for call in log.shares]
    return done, worst, model


def test_watching_changes_nothing() -> None:
    """Guards `watch`: a run's losses are the same to the last bit, and shares are noted."""
    cfg = dataclasses.replace(CFG, steps=6)
    plain, _, _ = run(None, cfg)
    watched, worst, model = run("watch", cfg)
    assert plain.losses == watched.losses and plain.val_losses == watched.val_losses
    assert plain.grad_norms == watched.grad_norms and len(worst) == 6
    assert not any(layer.choice_bias.any() for layer in moe_layers(model))


def test_balance_in_training() -> None:
    """Guards both remedies in the training loop: shares become more even than when watched.

    The recorded losses are those of the text alone: before the first update they are the same,
    whatever is added to them.
    """
    watched, left_alone, _ = run("watch")
    by_bias, biased, model = run("balance_by_bias", step=0.01)
    by_loss, pulled, _ = run("balance_by_loss", coefficient=1.0, z_coefficient=0.01)
    assert watched.losses[0] == by_bias.losses[0] == by_loss.losses[0]
    assert watched.grad_norms[0] == by_bias.grad_norms[0] != by_loss.grad_norms[0]
    assert left_alone[0] == biased[0] == pulled[0] > 1.5
    alone, by_bias_later, by_loss_later = (sum(w[20:]) / 40 for w in (left_alone, biased, pulled))
    assert max(by_bias_later, by_loss_later) < 0.85 * alone
    assert all(layer.choice_bias.any() for layer in moe_layers(model))
    steps = [layer.choice_bias.detach() / 0.01 for layer in moe_layers(model)]
    assert all((n_I - n_I.round()).abs().max() < 1e-3 for n_I in steps)  # no optimizer touched it


def test_dense_models_are_left_alone() -> None:
    """Guards a model without experts: nothing to watch, nothing to move."""
    model = small_model(dataclasses.replace(SMALL, n_experts=0))
    tokens, cfg = skewed_text(300), dataclasses.replace(CFG, steps=2)
    before = {name: param.clone() for name, param in model.named_parameters()}
    with balance.RouterLog(model) as log:
        assert log.layers == []
        model.train()(tokens[None, :9])
        assert (
            float(log.watch()) == float(log.balance_by_bias()) == float(log.balance_by_loss()) == 0
        )
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
        train(model, tokens, tokens, cfg, device="cpu", extra_loss=log.balance_by_bias)
    assert log.shares == [[]] * 5


# ---- mistakes

MEAN = "* prob_NI.mean(dim=0)"
MUTANTS = {
    "shares of tokens, not of choices": (check_losses, "/ expert_NA.numel() -> / len(expert_NA)"),
    "not times I": (check_losses, "return prob_NI.shape[1] * -> return 1 *"),
    "mean over experts for the sum": (check_losses, f"{MEAN}).sum() -> {MEAN}).mean()"),
    "squared shares": (check_losses, f" {MEAN} ->  * shares(expert_NA, prob_NI.shape[1])"),
    "squared probabilities": (check_losses, f"{MEAN} -> * prob_NI.square().mean(dim=0)"),
    "softmax over tokens": (check_losses, "logit_NI.softmax(dim=-1, -> logit_NI.softmax(dim=0,"),
    "sigmoid for softmax": (
        check_losses,
        "logit_NI.softmax(dim=-1, dtype=torch.float32)\n    return -> "
        "logit_NI.sigmoid()\n    return",
    ),
    "z not squared": (check_losses, "logsumexp(dim=-1).square() -> logsumexp(dim=-1)"),
    "z of the mean": (check_losses, ".square().mean() -> .mean().square()"),
    "z summed": (check_losses, ".square().mean() -> .square().sum()"),
    "z over tokens": (check_losses, "logsumexp(dim=-1) -> logsumexp(dim=0)"),
    "z of the logits themselves": (check_losses, ".logsumexp(dim=-1).square() -> .square()"),
    "bias the wrong way": (check_bias, "+= step -> -= step"),
    "bias by the distance": (check_bias, "torch.sign(1 -> (1"),
    "bias by all of one": (check_bias, "step * torch.sign -> torch.sign"),
    "bias not in place": (check_bias, "choice_bias_I += -> choice_bias_I = choice_bias_I +"),
    "bias against a fixed share": (check_bias, "sign(1 / len(choice_bias_I) -> sign(0.1"),
    "bias for tokens, not choices": (check_bias, "/ expert_NA.numel() -> / len(expert_NA)"),
    "evaluation overwrites": (check_log, "if layer.training -> if True"),
    "training is not kept": (check_log, "if layer.training -> if not layer.training"),
    "one layer's logits for all": (check_log, "self.logits[i] = -> self.logits[0] ="),
    "logits cut from the graph": (check_log, "[i] = logit_NI -> [i] = logit_NI.detach()"),
    "hooks stay": (check_log, "hook.remove() -> pass"),
    "choices without the bias": (check_log, "(prob_NI + layer.choice_bias) -> prob_NI"),
    "choices of the logits and the bias": (check_log, "(prob_NI + layer -> (logit_NI + layer"),
    "layers summed": (check_log, " / len(pairs) -> "),
    "one coefficient for both": (check_log, "z_coefficient * z -> coefficient * z"),
    "no z": (check_log, " + z_coefficient * z -> "),
    "all layers by the last choice": (
        check_log,
        "move_bias(layer.choice_bias.data, expert_NA -> "
        "move_bias(layer.choice_bias.data, self.choices()[-1]",
    ),
    "first layer alone": (
        check_log,
        "in zip(self.layers, self.choices(), strict=True):\n            move"
        " -> in zip(self.layers[:1], self.choices()[:1], strict=True):\n            move",
    ),
    "choices not noted": (check_log, "self.shares.append( -> list("),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str) -> None:
    """Guards the checks above: with a mistake in the source they must fail."""
    check, change = MUTANTS[name]
    with pytest.raises((AssertionError, RuntimeError)):
        check(mutant(balance, change))
