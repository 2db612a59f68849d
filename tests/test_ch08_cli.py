"""Chapter 8's command line: what it prints, what it answers to bad input, how it stops."""

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ch08_full_models import __main__ as cli
from ch08_full_models import chat, checkpoint, decode, llama3
from ch08_full_models.checkpoint import MODELS, load
from tests.test_ch08_chat import SMOLLM2, write_tokenizer

ROOT = Path(__file__).parent.parent
CONTEXT = 96  # tokens
posix = pytest.mark.skipif(os.name != "posix", reason="signals and terminals as POSIX has them")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random chat model, as transformers writes it."""
    path = tmp_path_factory.mktemp("tiny")
    write_tokenizer(path, SMOLLM2, ["<|im_start|>", "<|im_end|>"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        bos_token_id=330,
        eos_token_id=331,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def base_folder(folder: Path, tmp_path: Path) -> Path:
    """The same model without a chat template."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tmp_path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function that runs the command line here: its exit code, stdout and stderr."""

    def call(*argv: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            code = cli.main([str(arg) for arg in argv])
        except SystemExit as stop:  # argparse's errors, and --help
            code = stop.code
        return code, *capsys.readouterr()

    return call


def continuation(folder: Path, ids: list[int], n_new: int, **sampling: float | int) -> list[int]:
    """What the model makes of the tokens, up to its first end."""
    model, tokenizer = load(folder, device="cpu")
    new = [int(t) for t in llama3.generate(model, torch.tensor([ids]), n_new, **sampling)]
    ends = [i for i, token in enumerate(new) if token in tokenizer.eos_ids]
    return new[: ends[0]] if ends else new


# What it prints


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_k": 50, "top_p": 0.8}])
def test_raw_prints_the_continuation(folder: Path, run: Run, sampling: dict) -> None:
    """Guards the text itself, and that every option for sampling arrives where it should."""
    _, tokenizer = load(folder)
    expected = continuation(folder, tokenizer.encode("Why is the"), 20, **sampling, seed=3)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sampling.items()]
    argv = ["Why is the", "--raw", "--model", folder, "--max-new-tokens=20", "--seed=3", *options]
    assert run(*argv, "--device=cpu") == (0, tokenizer.decode(expected) + "\n", "")


def test_a_prompt_gets_the_chat_template(folder: Path, run: Run) -> None:
    """Guards that without --raw an instruct model reads a turn, not a bare text."""
    _, tokenizer = load(folder)
    ids = tokenizer.chat([{"role": "user", "content": "Why?"}])
    expected = tokenizer.decode(continuation(folder, ids, 20))
    argv = ["Why?", "--model", folder, "--max-new-tokens", 20, "--device", "cpu"]
    assert run(*argv) == (0, expected + "\n", "")


def test_memory_is_a_limit(folder: Path, run: Run) -> None:
    """Guards --memory: enough changes nothing, too little is one line."""
    argv = ["Why is the", "--raw", "--model", folder, "--max-new-tokens", 8, "--device", "cpu"]
    code, out, err = run(*argv, "--memory", 0.5, "--stats")
    assert (code, out) == run(*argv)[:2]
    assert json.loads(err)["bytes_read_late"] == 0
    code, out, err = run(*argv, "--memory", 1e-6)
    assert (code, out) == (2, "") and "memory is 1,000 bytes, expected" in err
    assert err.count("\n") == 1


def test_thinking_reaches_the_template(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards --thinking and --no-thinking; without either, the template decides."""
    given = []
    monkeypatch.setattr(
        chat, "find_template", lambda _, thinking: given.append(thinking) or chat.chatml
    )
    for options in ([], ["--thinking"], ["--no-thinking"]):
        assert run("Why?", "--model", folder, "--max-new-tokens", 2, *options)[0] == 0
    assert list(dict.fromkeys(given)) == [None, True, False]


@pytest.mark.parametrize("stdin", ["Grüße 🌆", "Grüße 🌆\n", "\ufeffGrüße 🌆\r\n"])
def test_a_pipe_is_the_prompt(folder: Path, run: Run, stdin: str) -> None:
    """Guards prompts from pipes: UTF-8 on every system, without mark and last line end."""
    argv = ["--model", folder, "--max-new-tokens", 8]
    assert run(*argv, stdin=stdin.encode()) == run("Grüße 🌆", *argv)


def test_a_base_model_goes_on_with_the_text(base_folder: Path, run: Run) -> None:
    """Guards that a model without a template is not asked to chat, and that the user is told."""
    argv = ["Why is the", "--model", base_folder, "--max-new-tokens", 8]
    code, out, err = run(*argv)
    assert (code, out, err.count("\n")) == (*run(*argv, "--raw")[:2], 1)
    assert "base model" in err


def test_some_base_models_carry_a_template(folder: Path) -> None:
    """Guards that MODELS decides where it knows the model: Qwen's base models have templates."""
    _, tokenizer = load(folder)
    assert not cli.is_base("smollm2-135m", tokenizer)
    assert cli.is_base("gemma3-270m", tokenizer)


def test_stats_are_one_line_of_json(folder: Path, run: Run) -> None:
    """Guards the figures that others measure by."""
    model, tokenizer = load(folder, device="cpu")
    argv = ["Why is the", "--raw", "--model", folder, "--max-new-tokens", 9, "--device", "cpu"]
    code, out, err = run(*argv, "--stats", "--dtype", "bfloat16")
    assert code == 0 and err.count("\n") == 1
    stats = json.loads(err)
    n_prompt = len(tokenizer.encode("Why is the"))
    n_params = sum(p.numel() for p in model.parameters())
    assert stats["prompt_tokens"] == n_prompt and stats["new_tokens"] == 9
    assert stats["weight_bytes"] == 2 * n_params
    assert stats["cache_bytes"] >= 2 * 2 * 2 * 16 * (n_prompt + 8)  # k, v; layers; bytes; width
    assert 0 < stats["prefill_tokens_per_s"] and 0 < stats["decode_tokens_per_s"]
    assert 0 < stats["load_s"] < 60 and 50e6 < stats["peak_rss_bytes"] < 50e9
    assert (stats["model"], stats["source"]) == (str(folder), str(folder))
    assert (stats["dtype"], stats["device"]) == ("bfloat16", "cpu")
    stats = json.loads(run(*argv, "--stats", "--max-new-tokens", 1)[2])
    assert stats["decode_tokens_per_s"] is None  # the first token comes with the prefill


def test_quantize_shrinks_the_weights(folder: Path, run: Run) -> None:
    """Guards that --quantize reaches the model."""
    argv = ["Hi", "--model", folder, "--max-new-tokens", 2, "--stats"]
    whole, small = (json.loads(run(*argv, *more)[2]) for more in ([], ["--quantize", "int8"]))
    assert small["weight_bytes"] < whole["weight_bytes"]


def test_compile_reaches_the_step(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards --compile: the function that decodes is the compiled one, and says the same."""
    argv = ["Hi", "--model", folder, "--max-new-tokens", 4, "--device", "cpu"]
    plain = run(*argv)
    compiled, calls = decode.compiled_steps, []

    def counting(model: nn.Module) -> nn.Module:
        compiled(model, backend="eager")  # the graph is captured, and run without a C++ compiler
        step = type(model).step

        def counted(*args: object) -> Tensor:
            calls.append(args)
            return step(*args)

        type(model).step = staticmethod(counted)
        return model

    monkeypatch.setattr(decode, "compiled_steps", counting)
    assert run(*argv, "--compile") == plain
    assert len(calls) == 3  # the first token comes with the prefill


def test_two_step_reaches_the_head(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards --two-step: its head finds every token but the first, and says the same."""
    argv = [
        "Hi",
        "--model",
        folder,
        "--max-new-tokens",
        4,
        "--device",
        "cpu",
        "--dtype",
        "bfloat16",
    ]
    plain, whole, seen = run(*argv), decode.TwoStepHead.multiply, []

    def counting(self: decode.TwoStepHead, x: Tensor) -> Tensor:
        seen.append(x.numel() // x.shape[-1])
        return whole(self, x)

    monkeypatch.setattr(decode.TwoStepHead, "multiply", counting)
    assert run(*argv, "--two-step") == plain
    assert seen == [1] * 4
    for wrong, what in (
        (["--temperature", 0.5], "0.5, expected 0"),
        (["--dtype", "float32"], "bfl"),
    ):
        code, out, err = run(*argv, *wrong, "--two-step")
        assert (code, out) == (2, "") and err.count("\n") == 1 and what in err


@pytest.mark.parametrize("flag", ["--compile", "--two-step"])
def test_steps_that_need_all_weights_say_so(
    flag: str, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards both beside weights that stay on disk: refused, in one line."""
    whole = checkpoint.load_folder

    def on_disk(*args: object) -> tuple:
        model, tokenizer = whole(*args)
        model.disk = object()
        return model, tokenizer

    monkeypatch.setattr(checkpoint, "load_folder", on_disk)
    argv = ["Hi", "--model", folder, "--device", "cpu", "--dtype", "bfloat16", "--memory", 1]
    assert_one_line(run(*argv, flag), "all weights in memory")


def test_list_shows_every_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards --list: a row a model, and whether it fits into this machine's memory."""
    monkeypatch.setattr(cli, "memory_bytes", lambda: 4e9)
    code, out, err = run("--list")
    head, *rows = out.splitlines()
    assert (code, err) == (0, "")
    assert [row.split()[0] for row in rows] == list(MODELS)
    for column in (
        "name",
        "family",
        "parameters",
        "download",
        "memory",
        "source",
        "cached",
        "fits",
    ):
        assert column in head.split()
    fits = {row.split()[0]: row.split()[-1] for row in rows}
    assert fits["smollm2-135m"] == "yes" and fits["llama3.1-8b"] == "no"
    model = MODELS["smollm2-1.7b"]  # its cache is a fifth of its memory
    for share, expected in ((1.1, "no"), (1.2, "yes")):
        monkeypatch.setattr(cli, "memory_bytes", lambda share=share: share * model.memory_bytes)
        rows = [line.split() for line in run("--list")[1].splitlines()]
        assert {row[0]: row[-1] for row in rows}["smollm2-1.7b"] == expected


def test_memory_is_measured() -> None:
    """Guards the two figures that come from the system; None is for systems that do not say."""
    peak, total = cli.peak_rss_bytes(), cli.memory_bytes()
    assert peak is not None and total is not None
    assert 50e6 < peak < total < 1e14


# Bad input


BAD = {
    "unknown model": ["Hi", "--model", "no-such-model"],
    "near miss": ["Hi", "--model", "smollm2-135"],
    "no such file": ["Hi", "--model", "./none.gguf"],
    "a folder without a model": ["Hi", "--model", ROOT / "tests"],
    "empty prompt": [""],
    "only spaces": [" \n", "--raw"],
    "not UTF-8": ["caf\udce9"],  # as Python passes on the byte 0xE9
    "two prompts": ["Hi", "there"],
    "unknown option": ["Hi", "--colour"],
    "an abbreviation": ["Hi", "--temp", "1"],
    "temperature below 0": ["Hi", "--temperature", "-0.1"],
    "temperature not a number": ["Hi", "--temperature", "nan"],
    "temperature a word": ["Hi", "--temperature", "warm"],
    "infinite temperature": ["Hi", "--temperature", "inf"],
    "top-k 0": ["Hi", "--top-k", "0"],
    "top-k a fraction": ["Hi", "--top-k", "1.5"],
    "top-p 0": ["Hi", "--top-p", "0"],
    "top-p above 1": ["Hi", "--top-p", "1.01"],
    "no tokens": ["Hi", "--max-new-tokens", "0"],
    "negative seed": ["Hi", "--seed", "-1"],
    "unknown device": ["Hi", "--device", "abacus"],
    "unknown dtype": ["Hi", "--dtype", "int8"],
    "unknown quantize": ["Hi", "--quantize", "int2"],
    "list with a prompt": ["Hi", "--list"],
    "two steps, and a word drawn": ["Hi", "--two-step", "--temperature", "1"],
}


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize("argv", BAD.values(), ids=BAD)
def test_bad_input_is_one_line(argv: list, run: Run) -> None:
    """Guards every refusal: exit code 2, one line, no usage, no traceback, nothing on stdout."""
    assert_one_line(run(*argv))


@pytest.mark.parametrize("stdin", [b"", b"\n", b"caf\xe9"])
def test_a_bad_pipe_is_one_line(stdin: bytes, run: Run) -> None:
    """Guards prompts from pipes that are empty or not UTF-8."""
    assert_one_line(run(stdin=stdin), "UTF-8" if stdin.strip() else "empty")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there(folder: Path, run: Run) -> None:
    """Guards the asked for device: no silent fall-back to the processor."""
    assert_one_line(run("Hi", "--model", folder, "--device", "cuda"), "cuda")


@pytest.mark.parametrize("raw", [["--raw"], []])
def test_a_prompt_longer_than_the_context(folder: Path, run: Run, raw: list[str]) -> None:
    """Guards the model's length, with both numbers, before anything is printed."""
    _, tokenizer = load(folder)
    prompt = "x " * CONTEXT
    ids = tokenizer.encode(prompt)
    if not raw:
        ids = tokenizer.chat([{"role": "user", "content": prompt}])
    assert_one_line(run(prompt, "--model", folder, *raw), f"{len(ids):,}", f"{CONTEXT}")


def test_the_context_ends_a_text(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards that a text that is cut by the model's length says so, on stderr."""
    _, tokenizer = load(folder)
    new = CONTEXT - len(tokenizer.encode("a b")) + 1  # the last one is not fed
    endless = torch.tensor([[20]])
    monkeypatch.setattr(llama3, "generate", lambda model, ids, n_new, **_: iter([endless] * n_new))
    argv = ["a b", "--raw", "--model", folder, "--max-new-tokens"]
    told = f"stopped: the model's context of {CONTEXT} tokens is full\n"
    assert run(*argv, 1000) == (0, tokenizer.decode([20] * new) + "\n", told)
    assert run(*argv, new) == (0, tokenizer.decode([20] * new) + "\n", "")


@pytest.mark.parametrize("kind", ["mamba", None])
def test_an_unknown_kind_of_model(kind: str | None, base_folder: Path, run: Run) -> None:
    """Guards models that no family here builds: the line names those that there are."""
    config = json.loads((base_folder / "config.json").read_text(encoding="utf-8"))
    (base_folder / "config.json").write_text(json.dumps(config | {"model_type": kind}), "utf-8")
    result = run("Hi", "--model", base_folder)
    assert_one_line(result, repr(kind), "config.json", *checkpoint.FAMILIES)


def test_a_model_without_a_tokenizer(base_folder: Path, run: Run) -> None:
    """Guards folders that hold weights only."""
    (base_folder / "tokenizer.json").unlink()
    assert_one_line(run("Hi", "--model", base_folder), "tokenizer")


# As a process


def start(*argv: object, **pipes: int) -> subprocess.Popen:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "ch08_full_models", *map(str, argv)]
    return subprocess.Popen(command, cwd=ROOT, **pipes)


def test_help_does_not_wait_for_torch() -> None:
    """Guards quick answers: torch takes seconds to import."""
    code = "import sys; from ch08_full_models.__main__ import main\n"
    code += "try: main([sys.argv[1]])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    for option in ("--help", "--list", "--bogus"):
        done = subprocess.run(
            [sys.executable, "-c", code, option], cwd=ROOT, capture_output=True, encoding="utf-8"
        )
        assert done.stdout.endswith("False\n"), done


@posix
def test_a_closed_pipe_ends_it_quietly(folder: Path) -> None:
    """Guards `| head -c 1`: no traceback, not even at the interpreter's exit."""
    options = ["--raw", "--model", folder, "--max-new-tokens", 80, "--temperature", 1]
    process = start("Why is the", *options, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(120) == 0


ENDLESS = """
import sys, time, torch
from ch08_full_models import __main__ as cli, llama3

def slow(model, tokens, n_new, **options):
    model(tokens, options["cache"])
    for i in range(1000):
        time.sleep(0.02 if i < 4 else 1)
        yield torch.tensor([[20]])

llama3.generate = slow
sys.exit(cli.main(sys.argv[1:]))
"""  # a random model may end at once; this one leaves time to stop it


@posix
def test_ctrl_c_stops_a_text(folder: Path) -> None:
    """Guards Ctrl-C: the line is ended, the exit code is the shell's for it, no traceback."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, "Hi", "--raw", "--model", str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    first = process.stdout.read(1)  # it is printed as it is made, also into a pipe
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, b"")
    assert first and rest.endswith(b"\n")


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, *command: str) -> None:
        import pty

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execvpe(command[0], command, os.environ | {"TERM": "dumb", "INPUTRC": "/dev/null"})

    def read_until(self, text: str, seconds: float = 120) -> str:
        """What appears, up to the text. The text must come within the time."""
        seen, end = b"", time.monotonic() + seconds
        while text.encode() not in seen:
            assert time.monotonic() < end, seen
            if select.select([self.fd], [], [], 0.2)[0]:
                seen += os.read(self.fd, 1 << 12)
        return seen.decode()

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@posix
def test_a_chat_in_a_terminal(folder: Path) -> None:
    """Guards the chat as a person meets it: hint, prompt, an answer stopped by Ctrl-C, /exit."""
    terminal = Terminal(sys.executable, "-c", ENDLESS, "--model", str(folder), "--stats")
    assert "/exit" in terminal.read_until("> ")
    terminal.type("Hi 🌆\r")
    letter = load(folder)[1].decode([20])
    terminal.read_until(letter * 3)
    terminal.type("\x03")
    terminal.read_until("> ")
    terminal.type("\r")  # an empty line is no turn
    terminal.read_until("> ")
    terminal.type("x" * 200 + "\r")
    assert f"{CONTEXT}" in terminal.read_until("> ").partition("error:")[2]
    terminal.type("/exit\r")
    stats = json.loads("{" + terminal.read_until("}\r\n").partition("{")[2])
    assert stats["new_tokens"] >= 3
    assert terminal.wait() == 0


# Real models


def test_smollm2_knows_paris(gguf_path: Callable[[str], Path], run: Run) -> None:
    """Guards the whole way from the file to the text, with real weights."""
    gguf_path("smollm2-135m")
    argv = ["The capital of France is", "--raw", "--temperature", 0, "--max-new-tokens", 4]
    code, out, _ = run(*argv)
    assert code == 0 and "Paris" in out


def test_gemma3_knows_madrid(gguf_path: Callable[[str], Path], run: Run) -> None:
    """Guards the same for Gemma 3, which is wrong in many ways that still write plausible text."""
    gguf_path("gemma3-270m")
    prompt = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"
    argv = [prompt, "--model", "gemma3-270m", "--raw", "--temperature", 0, "--max-new-tokens", 4]
    code, out, _ = run(*argv)
    assert code == 0 and out.strip().startswith("Madrid")
