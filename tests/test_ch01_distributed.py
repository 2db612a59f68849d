"""Chapter 1's training loop on two processes against one, its restarts, and its fused kernels.

Whatever needs two processes is done by this file itself, which torchrun runs as a module: see WORK.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import ch01_gpt2.train as train_module
from ch01_gpt2 import distributed, gpt2, throughput
from ch01_gpt2.gpt2 import Config, Transformer, generate
from ch01_gpt2.train import CHECKPOINT, RESULT, TrainConfig, TrainResult, evaluate, main, train
from ch06_moe import moe

ROOT = Path(__file__).parent.parent
SECONDS = 400  # only against a hang
SMALL = Config(
    vocab_size=32, max_seq_len=16, n_layers=2, d_model=16, n_heads=2, head_dim=8, d_ff=32
)
SPARSE = moe.Config(
    vocab_size=32,
    n_layers=1,
    d_model=16,
    n_heads=2,
    n_kv_heads=2,
    head_dim=8,
    d_latent=None,
    n_experts=32,  # so many that some get no token
    n_active=2,  # with one, a router's gradient is nothing but rounding
    d_expert=8,
    n_dense_layers=0,
)
# The held-out text's last batches have three rows and one, which two processes cannot share evenly.
CFG = TrainConfig(steps=20, batch_size=4, seq_len=8, lr=1e-2, eval_every=8, eval_tokens=60)
STOPPED_AT = 11  # steps
WAYS = ["ddp", "fsdp"]

pytestmark = pytest.mark.usefixtures("one_thread")


def some_tokens() -> Tensor:
    """A text with something to learn in twenty steps."""
    return (torch.arange(400).square() // 3) % 32


def trained(model: nn.Module, out: Path, **options: bool) -> TrainResult:
    return train(model, some_tokens(), some_tokens(), CFG, device="cpu", out=out, **options)


def with_seed(seed: int) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(SMALL)


def sparse_model() -> moe.Transformer:
    torch.manual_seed(0)
    return moe.Transformer(SPARSE)


def stop_in_step(model: nn.Module, step: int) -> None:
    """Sends this process, in the middle of the model's training step, what torchrun ends it with.

    Where it is alone, Ctrl-C.
    """
    calls = []

    def hook(module: nn.Module, *_: object) -> None:
        calls.append(module.training)
        if module.training and sum(calls) == step:
            signal.raise_signal(distributed.stop_signals()[-1])

    model.register_forward_pre_hook(hook)


def stopped(out: Path, **options: bool) -> None:
    """Trains until the last process is told to stop."""
    model = with_seed(0)
    if distributed.process() == distributed.n_processes() - 1:
        stop_in_step(model, STOPPED_AT)
    try:
        trained(model, out, **options)
    except KeyboardInterrupt:
        return
    raise AssertionError("not stopped")


# What two processes do


def work_together(folder: Path) -> None:
    """Trains each way: all steps; some steps; the rest of what one process has begun."""
    with distributed.processes():
        for way in WAYS:
            options = {"fsdp": way == "fsdp"}
            model = with_seed(distributed.process() if way == "ddp" else 0)
            trained(model, folder / way, **options)
            tokens_1T = some_tokens()[None, :4]
            text = [int(token) for token in generate(model, tokens_1T, 8)]
            (folder / f"{way}-{distributed.process()}.json").write_text(
                json.dumps(text), encoding="utf-8"
            )
            stopped(folder / f"{way}-stopped", **options)
            trained(with_seed(99), folder / f"one-to-{way}", resume=True, **options)
            trained(sparse_model(), folder / f"{way}-sparse", **options)


def work_and_die(folder: Path) -> None:
    """The training command; the first time one process is killed, the second time the other one.

    The second is process 0, while it writes a checkpoint. Notes the steps that process 0 takes.
    """
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    rank = int(os.environ["RANK"])
    train_step = train_module.train_step

    def step(run: train_module.Run, tokens: Tensor) -> None:
        if (attempt, rank, run.step) == (0, 1, 10):
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0:
            with (folder / "steps").open("a", encoding="utf-8") as file:
                print(attempt, run.step, file=file)
        train_step(run, tokens)

    def half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata)
        if attempt == 1 and json.loads(metadata["run"])["step"] == 12:
            path.write_bytes(path.read_bytes()[:1000])
            os.kill(os.getpid(), signal.SIGKILL)

    train_module.train_step, train_module.save_file = step, half
    sys.argv = ["train.py", *command_args(folder / "text.txt"), "--out", str(folder / "run")]
    main()


WORK = {"together": work_together, "die": work_and_die}


def torchrun(*args: object) -> subprocess.Popen:
    """Two processes that run a module, as the README's command starts them; the port is any."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "2" if "die" in args else "0"]
    return subprocess.Popen(
        [*command, "-m", *map(str, args)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def finished(process: subprocess.Popen) -> tuple[str, str]:
    """What it printed, on stdout and on stderr."""
    try:
        return process.communicate(timeout=SECONDS)
    finally:
        process.terminate()  # which ends the processes it has started, too


def command_args(text: Path, steps: int = 18) -> list[str]:
    """Arguments that make the training command quick."""
    text.write_text("the cat sat on the mat, " * 50, encoding="utf-8")
    size = f"--steps {steps} --batch-size 4 --seq-len 16 --n-vocab 256 --n-layers 1 --d-model 32"
    return [*size.split(), "--device", "cpu", "--text", str(text)]


def run_main(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """The training command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# The same numbers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process left in "one" and "one-sparse", and two in the folders of work_together."""
    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trained(with_seed(0), folder / "one")
    trained(sparse_model(), folder / "one-sparse")
    stopped(folder / "one-stopped")
    torch.set_num_threads(threads)
    for way in WAYS:
        copytree(folder / "one-stopped", folder / f"one-to-{way}")
    process = torchrun("tests.test_ch01_distributed", "together", folder)
    out, err = finished(process)
    assert process.returncode == 0, err
    return folder


def record(folder: Path) -> dict:
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))


def step_of(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["run"])["step"]


def assert_same(found: dict, expected: dict) -> None:
    """The losses to 1e-5 nats, and the norms of the gradients."""
    assert len(found["losses"]) == CFG.steps
    assert found["val_steps"] == expected["val_steps"] == [0, 8, 16, 20]
    for name in ("losses", "val_losses", "grad_norms"):
        assert found[name] == pytest.approx(expected[name], rel=0, abs=1e-5), name


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_give_the_losses_of_one(way: str, folder: Path) -> None:
    """Guards the shares of a batch, the means of losses and gradients, and the clipping.

    DDP's processes begin with other weights, and take those of process 0.
    """
    found, expected = record(folder / way), record(folder / "one")
    assert_same(found, expected)
    assert max(expected["grad_norms"]) > CFG.clip  # something is clipped
    assert expected["losses"][-1] < expected["losses"][0] - 0.1
    assert found["environment"]["processes"] == 2
    assert expected["environment"]["processes"] == 1
    assert found["n_parameters"] == expected["n_parameters"]


@pytest.mark.parametrize("way", WAYS)
def test_experts_without_tokens(way: str, folder: Path) -> None:
    """Guards models some of whose parameters get no gradient, in one process or in both.

    AdamW leaves an expert alone that no token has chosen. FSDP has zeros for its gradient, so there
    it decays and moves on, and the losses of one process come back only roughly.
    """
    found, expected = record(folder / f"{way}-sparse"), record(folder / "one-sparse")
    saved = load_file(folder / f"{way}-sparse" / CHECKPOINT)
    n_steps = {float(count) for name, count in saved.items() if name.startswith("step.")}
    if way == "ddp":
        assert_same(found, expected)
        assert min(n_steps) < CFG.steps
    else:
        assert found["final_val_loss"] == pytest.approx(expected["final_val_loss"], abs=0.05)
        assert n_steps == {CFG.steps}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_stop_together_and_one_goes_on(way: str, folder: Path) -> None:
    """Guards the end by a signal to one of two processes, and a checkpoint of two for one."""
    assert step_of(folder / f"{way}-stopped" / CHECKPOINT) == STOPPED_AT
    assert not (folder / f"{way}-stopped" / RESULT).exists()
    copytree(folder / f"{way}-stopped", folder / f"{way}-to-one")
    trained(with_seed(99), folder / f"{way}-to-one", resume=True)
    assert_same(record(folder / f"{way}-to-one"), record(folder / "one"))


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_go_on_from_one(way: str, folder: Path) -> None:
    """Guards a checkpoint of one process for two: weights, moments, and the order of the text."""
    assert step_of(folder / "one-stopped" / CHECKPOINT) == STOPPED_AT
    assert_same(record(folder / f"one-to-{way}"), record(folder / "one"))
    ours, theirs = (load_file(folder / n / CHECKPOINT) for n in (f"one-to-{way}", "one"))
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {
        n: (t.dtype, t.shape) for n, t in theirs.items()
    }
    assert torch.equal(ours["rng.batch"], theirs["rng.batch"])
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize("way", WAYS)
def test_the_trained_model_is_an_ordinary_one(way: str, folder: Path) -> None:
    """Guards what comes of it: weights that load anywhere, and a text, the same on each process."""
    weights = load_file(folder / way / CHECKPOINT)
    model = with_seed(99).eval()
    model.load_state_dict(
        {n.removeprefix("model."): w for n, w in weights.items() if n.startswith("model.")}
    )
    loss = evaluate(model, some_tokens(), CFG)
    assert loss == pytest.approx(record(folder / way)["final_val_loss"], abs=1e-5)
    text = [int(token) for token in generate(model, some_tokens()[None, :4], 8)]
    for process in range(2):
        assert json.loads((folder / f"{way}-{process}.json").read_text(encoding="utf-8")) == text


# The command


def test_killed_processes_are_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Guards torchrun --max-restarts: what is lost are the steps since the last whole checkpoint.

    One process dies in a step, then the other one while it writes; the half file is not taken.
    """
    args = [*command_args(tmp_path / "text.txt"), "--out", tmp_path / "one"]
    assert run_main(monkeypatch, *args) == 0
    process = torchrun("tests.test_ch01_distributed", "die", tmp_path)
    out, err = finished(process)
    assert process.returncode == 0, err
    steps = [tuple(map(int, line.split())) for line in (tmp_path / "steps").open(encoding="utf-8")]
    whole_steps = [step for step in steps if step != (0, 10)]  # the last one may have begun
    assert whole_steps == (
        [(0, step) for step in range(10)]
        + [(1, step) for step in range(9, 12)]
        + [(2, step) for step in range(9, 18)]
    )
    found, expected = record(tmp_path / "run"), record(tmp_path / "one")
    for name in ("losses", "val_losses"):
        assert found[name] == pytest.approx(expected[name], rel=0, abs=1e-5)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [CHECKPOINT, RESULT]
    assert out.count("step      0") == out.count("step     18") == out.count(">>> the model's") == 1


def test_sigterm_ends_the_command_between_two_steps(tmp_path: Path) -> None:
    """Guards the end that a cluster's scheduler asks for: a checkpoint, and one line."""
    args = command_args(tmp_path / "text.txt", steps=2400)  # evaluated every 400
    process = torchrun("ch01_gpt2.train", *args, "--fsdp", "--out", tmp_path / "run")
    watchdog = threading.Timer(SECONDS, process.terminate)
    watchdog.start()
    for line in process.stdout:
        if line.startswith("step      0"):
            break
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, err = finished(process)
    watchdog.cancel()
    assert err.count("interrupted; --resume goes on\n") == 1
    assert step_of(tmp_path / "run" / CHECKPOINT) % 400
    assert [path.name for path in (tmp_path / "run").iterdir()] == [CHECKPOINT]


def test_a_batch_that_does_not_divide(tmp_path: Path) -> None:
    """Guards the message: one line, of whichever process comes first, and exit code 2."""
    args = command_args(tmp_path / "text.txt")
    process = torchrun("ch01_gpt2.train", *args, "--batch-size", "3")
    _, err = finished(process)
    assert process.returncode == 1  # torchrun's own; it reports that of the process
    assert re.search(r"exitcode\s*: 2\b", err)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert errors == ["error: batch_size: 3, expected a multiple of 2, the processes"]
    assert not re.search(r'File ".*ch01_gpt2', err)


# One process


def test_one_process_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the ordinary run, in which SIGTERM ends at once and fsdp has nothing to cut."""
    assert (distributed.n_processes(), distributed.process()) == (1, 0)
    assert distributed.stop_signals() == [signal.SIGINT]
    model = with_seed(0)
    assert distributed.spread(model, torch.device("cpu"), fsdp=False) is model
    args = command_args(tmp_path / "text.txt")
    assert run_main(monkeypatch, *args, "--fsdp") == 2
    assert capsys.readouterr().err == (
        "error: fsdp: one process, expected several, as torchrun starts them\n"
    )


def test_what_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the messages for a loss that is no mean over the rows, and for too few GPUs."""
    monkeypatch.setattr(distributed, "n_processes", lambda: 2)
    distributed.check(4, None)
    with pytest.raises(ValueError, match="batch_size: 5, expected a multiple of 2"):
        distributed.check(5, None)
    with pytest.raises(ValueError, match="extra_loss: not the mean over 2 processes"):
        distributed.check(4, lambda: 0)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="nproc-per-node: more than 2, expected a GPU"):
        distributed.own_device(torch.device("cuda"))
    assert distributed.own_device(torch.device("mps")) == torch.device("cpu")


# Torch's own attention and norm


def test_fused_training_is_the_same(tmp_path: Path) -> None:
    """Guards --fused: the same losses, and the lesson's own functions afterwards."""
    before = gpt2.attend, gpt2.causal_mask, gpt2.LayerNorm.forward, gpt2.LayerCache.append
    trained(with_seed(0), tmp_path / "plain")
    with throughput.fused():
        assert gpt2.attend is throughput.fused_attend
        trained(with_seed(0), tmp_path / "fused")
    assert_same(record(tmp_path / "fused"), record(tmp_path / "plain"))
    assert before == (
        gpt2.attend,
        gpt2.causal_mask,
        gpt2.LayerNorm.forward,
        gpt2.LayerCache.append,
    )


def test_fused_is_not_for_generating() -> None:
    """Guards against text from a model that forgets: an error, and everything as it was."""
    model = with_seed(0).eval()
    expected = [int(token) for token in generate(model, some_tokens()[None, :4], 5)]
    with pytest.raises(RuntimeError, match="not for generating"), throughput.fused():
        list(generate(model, some_tokens()[None, :4], 5))
    with pytest.raises(RuntimeError, match="without padding"), throughput.fused():
        list(generate(model, some_tokens()[None, :4], 1, n_pad_B=torch.tensor([1])))
    assert [int(token) for token in generate(model, some_tokens()[None, :4], 5)] == expected


def test_the_command_takes_fused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards that the sample after a fused run is made by the model as it is written."""
    args = command_args(tmp_path / "text.txt")
    assert run_main(monkeypatch, *args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert run_main(monkeypatch, *args, "--fused") == 0
    fused = capsys.readouterr().out.splitlines()
    assert [line for line in fused if "tokens/s" not in line] == [
        line for line in lines if "tokens/s" not in line
    ]


def test_throughput(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the benchmark's record: every loop of every size, from medians of the turns."""
    out = tmp_path / "throughput.json"
    monkeypatch.setattr(
        sys, "argv", ["throughput.py", "--smoke", "--rounds", "3", "--out", str(out)]
    )
    throughput.main()
    saved = json.loads(out.read_text(encoding="utf-8"))
    assert [run["loop"] for run in saved["runs"]] == ["ours", "fused", "plain"]
    for run in saved["runs"]:
        assert len(run["seconds"]) == len(run["cpu_seconds"]) == 3
        assert run["tokens_per_s"] == pytest.approx(2 * 16 / sorted(run["seconds"])[1])
    assert saved["runs"][2]["times_plain"] == 1
    assert "times plain" in capsys.readouterr().out


def test_the_plain_loop_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the comparison: two loops that do not compute the same are not timed."""
    plan = throughput.SMOKE
    throughput.loops(plan.sizes[0][1:], plan)
    monkeypatch.setattr(throughput, "fused_norm", lambda self, x: 1.1 * x)
    with pytest.raises(AssertionError):
        throughput.loops(plan.sizes[0][1:], plan)


def test_the_committed_record() -> None:
    """Guards the published numbers: made by the full plan, with several turns of each loop."""
    saved = json.loads((ROOT / "ch01_gpt2/throughput.json").read_text(encoding="utf-8"))
    assert [run["loop"] for run in saved["runs"]] == ["ours", "fused", "plain"] * 2
    assert min(len(run["seconds"]) for run in saved["runs"]) >= 5


if __name__ == "__main__":
    work: Callable[[Path], None] = WORK[sys.argv[1]]
    work(Path(sys.argv[2]))
