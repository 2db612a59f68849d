"""Chapter 1's training loop: the step against an oracle, resuming to the bit, files, errors."""

import copy
import json
import math
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import ch01_gpt2.train as train_module
from ch01_gpt2.data import batch
from ch01_gpt2.gpt2 import Config, Transformer
from ch01_gpt2.train import (
    CHECKPOINT,
    RESULT,
    TrainConfig,
    decay_groups,
    evaluate,
    load_checkpoint,
    lr_at,
    main,
    pick_device,
    save_checkpoint,
    start_run,
    token_losses,
    train,
    train_step,
)

SMALL = Config(
    vocab_size=32, max_seq_len=16, n_layers=2, d_model=16, n_heads=2, head_dim=8, d_ff=32
)
FAST = TrainConfig(steps=6, batch_size=4, seq_len=8, lr=1e-2, eval_every=4, eval_tokens=64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are so small that a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Moody(Transformer):
    """A model with all that a checkpoint can forget: dropout, a buffer, a weight without gradient."""

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.spare = nn.Linear(3, 3)
        self.register_buffer("n_calls", torch.zeros(()))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        if self.training:
            self.n_calls += 1
        return F.dropout(super().forward(tokens_BT), 0.2, self.training) + 0.01 * self.n_calls.cos()


class Bigram(nn.Module):
    """Logits that depend on the last token only: a table, a gain, a bias."""

    def __init__(self, n_vocab: int = 11, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(n_vocab, width)
        self.gain = nn.Parameter(torch.rand(width) + 0.5)
        self.out = nn.Linear(width, n_vocab)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.out(self.embed(tokens_BT) * self.gain)


def random_tokens(n: int = 400, n_vocab: int = 32) -> Tensor:
    return torch.randint(n_vocab, (n,), generator=torch.Generator().manual_seed(7))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# The recipe


def test_decay_groups() -> None:
    """Guards which parameters decay, by name: matrices and tables do; norms and biases do not."""
    model = Transformer(SMALL)
    model.blocks[0].attn.q_proj.weight.requires_grad = False
    name_of = {param: name for name, param in model.named_parameters()}
    decayed, kept = decay_groups(model, 0.1)
    matrices = {"embed.weight", "pos_embed.weight"}
    for layer in (0, 1):
        for part in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj"):
            matrices.add(f"blocks.{layer}.{part}.weight")
        matrices |= {f"blocks.{layer}.mlp.{part}.weight" for part in ("up_proj", "down_proj")}
    frozen = {"blocks.0.attn.q_proj.weight"}
    assert {name_of[param] for param in decayed["params"]} == matrices - frozen
    assert {name_of[param] for param in kept["params"]} == set(name_of.values()) - matrices
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


def test_schedule() -> None:
    """Guards the learning rate at each corner: an off-by-one shows at every one of them."""
    cfg = TrainConfig(steps=100, lr=2.0, warmup=0.1, lr_floor=0.1)
    rates = [lr_at(step, cfg) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[4] == pytest.approx(1.0)
    assert rates[9] == max(rates) == 2.0
    assert rates[54] == pytest.approx(1.1)  # half way between the highest and the floor
    assert rates[99] == min(rates) == pytest.approx(0.2)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert lr_at(0, TrainConfig(steps=1, lr=2.0, warmup=0.0)) == pytest.approx(0.2)
    assert lr_at(3, TrainConfig(steps=4, lr=2.0, warmup=1.0)) == 2.0


def test_steps_equal_a_hand_written_adamw() -> None:
    """Guards the whole step: rate, clipping, decay and AdamW, as written out here in float64."""
    torch.manual_seed(1)
    tokens = random_tokens(200, n_vocab=11)
    cfg = TrainConfig(steps=4, batch_size=3, seq_len=5, lr=0.1, warmup=0.5, clip=0.05, seed=3)
    model = Bigram().double()
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in params.items()}
    second = {name: torch.zeros_like(p) for name, p in params.items()}
    losses, norms = [], []
    generator = torch.Generator().manual_seed(3)
    for t, rate in enumerate([0.05, 0.1, 0.055, 0.01], start=1):
        inputs_BT, targets_BT = batch(tokens, 3, 5, generator)
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        x_BTD = leaves["embed.weight"][inputs_BT] * leaves["gain"]
        logits_BTV = x_BTD @ leaves["out.weight"].T + leaves["out.bias"]
        log_p_BTV = logits_BTV - logits_BTV.exp().sum(-1, keepdim=True).log()
        loss = -log_p_BTV.gather(-1, targets_BT[..., None]).mean()
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        losses.append(loss.item())
        norms.append(norm)
        for name, g in grads.items():
            g = g * min(1.0, 0.05 / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            update = (first[name] / (1 - 0.9**t)) / ((second[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            decay = 0.1 if name in ("embed.weight", "out.weight") else 0.0
            params[name] = params[name] - rate * (update + decay * params[name])
    assert min(norms) > 0.05  # each step is clipped
    result = train(model, tokens, tokens, cfg, device="cpu")
    assert result.losses == pytest.approx(losses, rel=1e-5)
    assert result.grad_norms == pytest.approx(norms, rel=1e-4)
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.detach(), params[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("clip", "clipped"), [(0.01, True), (1e6, False)])
def test_clipping(clip: float, clipped: bool) -> None:
    """Guards that the optimizer sees the clipped gradient, and the record the one before."""
    cfg = TrainConfig(steps=3, batch_size=2, seq_len=8, clip=clip)
    run = start_run(Transformer(SMALL), random_tokens(), cfg)
    seen = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        seen.append(math.sqrt(sum(float(grad.double().square().sum()) for grad in grads)))

    run.optimizer.register_step_pre_hook(look)
    for _ in range(3):
        train_step(run, random_tokens())
    recorded = run.grad_norms.tolist()
    assert min(recorded) > 0.05
    assert seen == pytest.approx([clip] * 3 if clipped else recorded, rel=1e-3)


def test_a_step_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the speed on a GPU: a number taken from a tensor within a step would make it wait."""
    run = start_run(Transformer(SMALL), random_tokens(), FAST)

    def forbidden(self: Tensor, *_: object) -> None:
        raise AssertionError("a step reads a tensor's value")

    for method in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(Tensor, method, forbidden)
    train_step(run, random_tokens())
    monkeypatch.undo()
    assert run.losses[0].item() > 0


def test_bf16_is_for_the_model_only() -> None:
    """Guards autocast: logits in bfloat16 where asked, float32 by default here, the loss always."""
    model, seen = Transformer(SMALL), []
    model.register_forward_hook(lambda module, inputs, logits: seen.append(logits.dtype))
    tokens_BT = random_tokens(32).view(2, 16)
    exact = token_losses(model, tokens_BT, tokens_BT, bf16=False)
    rough = token_losses(model, tokens_BT, tokens_BT, bf16=True)
    assert seen == [torch.float32, torch.bfloat16]
    assert rough.dtype == torch.float32
    assert 0 < abs(exact.item() - rough.item()) < 0.05
    runs = [start_run(model, random_tokens(), TrainConfig(bf16=bf16)) for bf16 in (None, True)]
    assert [run.bf16 for run in runs] == [False, True]


# What comes of it


def test_learns_a_repetitive_text() -> None:
    """Guards that training works: from ln(vocabulary) to far below what is possible untrained."""
    tokens = torch.arange(8).repeat(60)
    cfg = TrainConfig(steps=40, batch_size=8, seq_len=12, lr=1e-2, eval_tokens=100)
    model = Transformer(SMALL).eval()
    result = train(model, tokens, tokens[:200], cfg, device="cpu")
    assert result.val_losses[0] == pytest.approx(math.log(32), abs=0.3)
    assert result.losses[0] == pytest.approx(math.log(32), abs=0.3)
    assert result.final_val_loss < 0.3 and result.final_train_loss < 0.5
    assert not model.training


def test_overfits_one_batch() -> None:
    """Guards the targets: random tokens can be learned only by heart, and only if they stay put."""
    tokens = random_tokens(13)
    cfg = TrainConfig(steps=60, batch_size=2, seq_len=12, lr=1e-2, eval_every=60)
    result = train(Transformer(SMALL), tokens, tokens, cfg, device="cpu")
    assert result.losses[0] > 3 and result.losses[-1] < 0.1


def test_seeds() -> None:
    """Guards that a seed decides everything, and that another one decides otherwise."""

    def losses(seed: int) -> list[float]:
        torch.manual_seed(0)
        cfg = TrainConfig(steps=3, batch_size=2, seq_len=8, seed=seed)
        model = Moody(SMALL)
        torch.rand(seed + 5)  # what ran before does not matter
        return train(model, random_tokens(), random_tokens(), cfg, device="cpu").losses

    assert losses(1) == losses(1)
    assert losses(1)[0] != losses(2)[0]


def test_evaluation_is_the_mean_over_tokens() -> None:
    """Guards the held-out loss against the definition, where the last windows are short."""
    model, tokens = Bigram().train(), random_tokens(80, n_vocab=11)
    cfg = TrainConfig(batch_size=2, seq_len=7, eval_tokens=50)
    expected = F.cross_entropy(model(tokens[None, :50])[0], tokens[1:51]).item()
    assert evaluate(model, tokens, cfg) == pytest.approx(expected, rel=1e-5)
    assert model.training
    moody = Moody(SMALL)  # in training, no two calls give the same
    assert evaluate(moody, tokens, cfg) == evaluate(moody, tokens, cfg)
