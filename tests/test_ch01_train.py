"""Chapter 1's training loop: the step against an oracle, resuming to the bit, files, errors."""

import copy
import json
import math
import signal
import sys
import threading
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


pytestmark = pytest.mark.usefixtures("one_thread")


class Moody(Transformer):
    """All that a checkpoint can forget: dropout, a buffer, a weight that gets no gradient."""

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
    cfg = TrainConfig(steps=60, batch_size=8, seq_len=12, lr=2e-2, eval_tokens=100)
    model = Transformer(SMALL).eval()
    result = train(model, tokens, tokens[:200], cfg, device="cpu")
    assert result.val_losses[0] == pytest.approx(math.log(32), abs=0.3)
    assert result.losses[0] == pytest.approx(math.log(32), abs=0.3)
    assert max(result.final_val_loss, result.final_train_loss) < 0.3
    assert not model.training


def test_overfits_one_batch() -> None:
    """Guards the targets: random tokens can be learned only by heart, and only if they stay put."""
    tokens = random_tokens(13)
    cfg = TrainConfig(steps=80, batch_size=2, seq_len=12, lr=2e-2, eval_every=80)
    result = train(Transformer(SMALL), tokens, tokens, cfg, device="cpu")
    assert result.losses[0] > 3 and result.losses[-1] < 0.1


def test_extra_loss_is_in_the_gradient_and_not_in_the_record() -> None:
    """Guards what balances a router: it acts at every training step, and losses stay comparable."""
    plain, pulled = with_seed(0), with_seed(0)
    calls: list[bool] = []

    def extra_loss() -> Tensor:
        calls.append(pulled.training)
        return 100 * pulled.embed.weight.square().sum()

    tokens = random_tokens()
    without = train(plain, tokens, tokens, FAST, device="cpu")
    result = train(pulled, tokens, tokens, FAST, device="cpu", extra_loss=extra_loss)
    assert calls == [True] * FAST.steps
    assert result.losses[0] == without.losses[0]
    assert result.losses[-1] != without.losses[-1]
    assert result.grad_norms[0] > 2 * without.grad_norms[0]
    assert pulled.embed.weight.norm() < plain.embed.weight.norm()


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


# Going on


def interrupt_at(model: nn.Module, call: int, what: type[BaseException]) -> None:
    """Lets Ctrl-C, or an error, arrive in the middle of the model's call-th training step."""
    calls = []

    def hook(module: nn.Module, *_: object) -> None:
        calls.append(module.training)
        if sum(calls) == call and module.training:
            if what is KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)
            else:
                raise what("the machine stops")

    model.register_forward_pre_hook(hook)


def with_seed(seed: int) -> Moody:
    torch.manual_seed(seed)
    return Moody(SMALL)


@pytest.mark.parametrize(
    ("call", "what", "resumes_at"), [(3, KeyboardInterrupt, 3), (6, RuntimeError, 4)]
)
def test_resuming_is_exact(
    call: int, what: type[BaseException], resumes_at: int, tmp_path: Path
) -> None:
    """Guards the checkpoint: whatever it forgot, of the model, AdamW or chance, would show.

    Ctrl-C saves after the step it arrives in; after a crash, the last evaluation's file is there.
    """
    tokens, one, two = random_tokens(), tmp_path / "one", tmp_path / "two"
    model = with_seed(0)
    whole = train(model, tokens, tokens, FAST, device="cpu", out=one)
    stopped = with_seed(0)
    interrupt_at(stopped, call, what)
    with pytest.raises(what):
        train(stopped, tokens, tokens, FAST, device="cpu", out=two)
    with safe_open(two / CHECKPOINT, framework="pt") as file:
        assert json.loads(file.metadata()["run"])["step"] == resumes_at

    resumed = with_seed(99)  # other weights, another random state
    rest = train(resumed, tokens, tokens, FAST, device="cpu", out=two, resume=True)
    assert rest.losses == whole.losses and rest.grad_norms == whole.grad_norms
    assert (rest.val_steps, rest.val_losses) == (whole.val_steps, whole.val_losses)
    assert whole.val_steps == [0, 4, 6]
    assert_equal(weights_of(resumed), weights_of(model))
    assert_equal(load_file(two / CHECKPOINT), load_file(one / CHECKPOINT))
    assert len(set(whole.losses)) == 6


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    """Guards --resume once too often."""
    model, tokens = with_seed(0), random_tokens()
    first = train(model, tokens, tokens, FAST, device="cpu", out=tmp_path)
    again = train(with_seed(5), tokens, tokens, FAST, device="cpu", out=tmp_path, resume=True)
    assert (again.losses, again.tokens_per_s) == (first.losses, first.tokens_per_s)


def test_ctrl_c_is_given_back(tmp_path: Path) -> None:
    """Guards the signal handler: the old one returns, and a thread, which has none, can train."""
    before = signal.getsignal(signal.SIGINT)
    results: list[object] = []

    def work() -> None:
        results.append(train(Transformer(SMALL), random_tokens(), random_tokens(), FAST))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    work()
    assert len(results) == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    """Guards the way out of a step that hangs; the checkpoint from before stays."""
    model = Transformer(SMALL)
    interrupt_at(model, 5, KeyboardInterrupt)
    interrupt_at(model, 5, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        train(model, random_tokens(), random_tokens(), FAST, device="cpu", out=tmp_path)
    with safe_open(tmp_path / CHECKPOINT, framework="pt") as file:
        assert json.loads(file.metadata()["run"])["step"] == 4


# Files


def test_result_file(tmp_path: Path) -> None:
    """Guards the record: valid JSON with all that a published number needs, and no other files."""
    tokens = random_tokens()
    result = train(Transformer(SMALL), tokens, tokens, FAST, device="cpu", out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, RESULT]

    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / RESULT).read_text(encoding="utf-8")
    saved = json.loads(text, parse_constant=no_constants)
    assert len(saved["losses"]) == len(saved["grad_norms"]) == 6
    assert saved["losses"] == result.losses
    assert saved["final_train_loss"] == result.losses[-1]  # a tenth of 6 steps
    assert saved["final_val_loss"] == saved["val_losses"][-1] == result.val_losses[-1]
    assert saved["val_steps"] == [0, 4, 6]
    assert saved["tokens_per_s"] == pytest.approx(6 * 4 * 8 / saved["train_seconds"])
    assert saved["n_parameters"] == sum(p.numel() for p in Transformer(SMALL).parameters())
    assert saved["train_config"]["lr"] == 1e-2 and saved["model_config"]["d_model"] == 16
    environment = saved["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["device"] == "cpu" and environment["seed"] == 0
    for key in ("command", "date", "platform", "hardware", "text"):
        assert isinstance(environment[key], str) and environment[key]


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a full disk and a crash: the file from before is whole, and no piece lies about."""
    path = tmp_path / CHECKPOINT
    run = start_run(Transformer(SMALL), random_tokens(), FAST)
    save_checkpoint(path, run)
    old = path.read_bytes()
    train_step(run, random_tokens())

    def half(tensors: dict[str, Tensor], name: Path, metadata: dict[str, str]) -> None:
        name.write_bytes(old[: len(old) // 2])
        raise OSError("No space left on device")

    def crash(*_: object) -> None:
        raise OSError("the machine stops")

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "save_file", half)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(path, run)
    with monkeypatch.context() as patch:
        patch.setattr(train_module.os, "replace", crash)
        with pytest.raises(OSError, match="stops"):
            save_checkpoint(path, run)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
    save_checkpoint(path, run)
    assert path.read_bytes() != old


NAME = "model.blocks.0.attn.q_proj.weight"


def rewritten(path: Path, **changes: Tensor | None) -> None:
    """Writes a checkpoint again with some tensors changed; None leaves one out."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()} | changes
    save_file({n: t for n, t in tensors.items() if t is not None}, path, metadata=metadata)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    match how:
        case "truncated":
            path.write_bytes(content[:-100])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("once upon a time there was a file", encoding="utf-8")
        case "foreign":
            save_file({"h.0.attn.c_attn.weight": torch.ones(3)}, path)
        case "foreign header":
            save_file({"x": torch.ones(3)}, path, metadata={"run": "[1, 2]"})
        case "absent":
            path.unlink()
        case "missing tensor":
            rewritten(path, **{NAME: None})
        case "missing moment":
            rewritten(path, **{"exp_avg_sq.norm.bias": None})
        case "extra tensor":
            rewritten(path, extra=torch.ones(2))
        case "misshapen":
            rewritten(path, **{NAME: torch.ones(16, 17)})
        case "other type":
            rewritten(path, **{NAME: torch.ones(16, 16, dtype=torch.float16)})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "no checkpoint can be read"),
        ("empty", "no checkpoint can be read"),
        ("text", "no checkpoint can be read"),
        ("absent", "No such file"),
        ("foreign", "not a checkpoint of this training loop"),
        ("foreign header", "not a checkpoint of this training loop"),
        ("missing tensor", f"{NAME} is absent, expected torch.float32 (16, 16)"),
        ("missing moment", "exp_avg_sq.norm.bias is absent, expected torch.float32 (16,)"),
        ("extra tensor", "extra is torch.float32 (2,), expected absent"),
        ("misshapen", f"{NAME} is torch.float32 (16, 17), expected torch.float32 (16, 16)"),
        ("other type", f"{NAME} is torch.float16 (16, 16), expected torch.float32 (16, 16)"),
    ],
)
def test_bad_checkpoints(how: str, message: str, tmp_path: Path) -> None:
    """Guards loading: one line with file, key and both shapes, and nothing half loaded."""
    path = tmp_path / CHECKPOINT
    save_checkpoint(path, start_run(Transformer(SMALL), random_tokens(), FAST))
    damage(path, how)
    run = start_run(Transformer(SMALL), random_tokens(), FAST)
    before = copy.deepcopy(train_module.tensors_of(run))
    with pytest.raises(ValueError) as error:
        load_checkpoint(path, run)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and message in text and "\n" not in text
    assert_equal(train_module.tensors_of(run), before)


@pytest.mark.parametrize(
    ("model", "tokens", "changed", "message"),
    [
        (SMALL, random_tokens(), {"lr": 0.02}, "train.lr is 0.01, expected 0.02"),
        (SMALL, random_tokens(), {"steps": 7}, "train.steps is 6, expected 7"),
        (SMALL, random_tokens(399), {}, "text is 400 tokens, CRC"),
        (Config(**{**vars(SMALL), "n_layers": 1}), random_tokens(), {}, "model.n_layers is 2"),
        (Config(**{**vars(SMALL), "norm_eps": 1e-6}), random_tokens(), {}, "model.norm_eps is"),
    ],
)
def test_checkpoints_of_other_settings(
    model: Config, tokens: Tensor, changed: dict, message: str, tmp_path: Path
) -> None:
    """Guards against going on with another recipe, text or model, even one of the same shapes."""
    path = tmp_path / CHECKPOINT
    save_checkpoint(path, start_run(Transformer(SMALL), random_tokens(), FAST))
    cfg = TrainConfig(**{**vars(FAST), **changed})
    with pytest.raises(ValueError) as error:
        load_checkpoint(path, start_run(Transformer(model), tokens, cfg))
    assert message in str(error.value) and str(path) in str(error.value)


def test_divergence_is_an_error(tmp_path: Path) -> None:
    """Guards the checkpoint against weights that are no numbers any more."""
    tokens, model = random_tokens(), Transformer(SMALL)
    train(model, tokens, tokens, FAST, device="cpu", out=tmp_path)
    old = (tmp_path / CHECKPOINT).read_bytes()
    cfg = TrainConfig(**{**vars(FAST), "lr": 1e38})
    with pytest.raises(FloatingPointError, match="lr: 1e\\+38.*by step 4"):
        train(model, tokens, tokens, cfg, device="cpu", out=tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == old


# Arguments


def test_settings_are_checked() -> None:
    """Guards the messages for numbers that make no run."""
    for name in ("steps", "batch_size", "seq_len", "lr", "clip", "eval_every", "eval_tokens"):
        with pytest.raises(ValueError, match=f"^{name}: -1, expected more than 0"):
            TrainConfig(**{name: -1})
    with pytest.raises(ValueError, match="lr: nan"):
        TrainConfig(lr=math.nan)
    with pytest.raises(ValueError, match="resume: needs"):
        train(Transformer(SMALL), random_tokens(), random_tokens(), FAST, resume=True)
    with pytest.raises(ValueError, match="held-out text: 1 tokens"):
        train(Transformer(SMALL), random_tokens(), random_tokens(1), FAST, device="cpu")


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the order cuda, mps, cpu, and the message for what is not there."""
    here = {"cuda": True, "mps": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: here["mps"])
    assert pick_device().type == "cuda"
    assert pick_device("cpu").type == "cpu"
    here["cuda"] = False
    assert pick_device().type == "mps"
    with pytest.raises(ValueError, match="device: 'cuda:1', expected mps or cpu"):
        pick_device("cuda:1")
    here["mps"] = False
    assert pick_device().type == "cpu"


def run_main(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """The command with these arguments, on the CPU, in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu", *map(str, args)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def small_args(tmp_path: Path) -> list[object]:
    """Arguments that make the command quick; --out is tmp_path/run."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, " * 50, encoding="utf-8")
    size = ["--steps", 6, "--batch-size", 2, "--seq-len", 16, "--n-vocab", 256]
    size += ["--n-layers", 1, "--d-model", 32]
    return [*size, "--text", text, "--out", tmp_path / "run"]


def test_command(
    small_args: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards the command: losses, a sample, both files; no overwriting; Ctrl-C, then --resume."""
    assert run_main(monkeypatch, *small_args) == 0
    whole = capsys.readouterr().out
    assert "ln 256 = 5.545" in whole and "step      0   held-out loss  5." in whole
    assert whole.count("held-out loss") == 7
    sample = whole.partition(" >>> ")[2]
    assert sample
    assert run_main(monkeypatch, *small_args) == 2
    assert "checkpoint.safetensors exists: add --resume" in capsys.readouterr().err

    def interrupted(run: train_module.Run, tokens: Tensor) -> None:
        train_step(run, tokens)
        if run.step == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "train_step", interrupted)
        assert run_main(patch, *small_args[:-1], tmp_path / "other") == 130
    assert capsys.readouterr().err == "interrupted; --resume goes on\n"
    assert not (tmp_path / "other" / RESULT).exists()
    assert run_main(monkeypatch, *small_args[:-1], tmp_path / "other", "--resume") == 0
    rest = capsys.readouterr().out
    assert rest.partition(" >>> ")[2] == sample
    last = [line for line in whole.splitlines() if line.startswith("step      6")]
    assert "step      3" not in rest and last[0] in rest


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--steps", "0"], "steps: 0, expected more than 0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--lr", "nan"], "lr: nan, expected more than 0"),
        (["--lr", "1e38"], "lr: 1e+38, expected a lower one"),
        (["--text", "nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["--device", "abacus"], "device: 'abacus', expected "),
        (["--d-model", "33"], "d-model: 33, expected a multiple of 32"),
        (["--n-layers", "0"], "n-layers: 0, expected more than 0"),
        (["--n-vocab", "255"], "255, expected 256 to 50257"),
        (["--seq-len", "100000"], "seq_len: 100000, expected less than"),
        (["--resume"], "no checkpoint can be read"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_bad_arguments(
    extra: list[str],
    message: str,
    small_args: list[object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards the command's errors: one line on stderr, exit code 2."""
    assert run_main(monkeypatch, *small_args, *extra) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
