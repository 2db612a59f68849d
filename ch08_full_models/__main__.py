"""Chapter 8, the command line: real models continue your text, or talk to you, in a terminal.

    python -m ch08_full_models "Why is the sky blue?"                   an answer
    python -m ch08_full_models                                          a chat
    python -m ch08_full_models "The capital of France is" --raw         the text continued
    python -m ch08_full_models --list                                   every model by name

Exit code 0; 2 after an error, with one line on stderr; 130 after Ctrl-C.
"""

import argparse
import gc
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ch08_full_models.download import MODELS, CheckpointError, fetch, table

if TYPE_CHECKING:  # torch takes seconds to import: --help, --list and typing errors need not wait
    from torch import Tensor, nn

    from ch08_full_models.chat import Chat
    from ch08_full_models.tokenizer import Tokenizer

# What is asked for


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is in --help."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}\n")


def number(kind: type, lowest: float, highest: float, wanted: str) -> Callable[[str], float]:
    """Reads an option's value; argparse makes one line of the error."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not lowest <= value <= highest:  # not a number is in no range
            raise argparse.ArgumentTypeError(f"{text!r}, expected {wanted}")
        return value

    return read


def device(text: str) -> str:
    """Reads --device, without torch; whether the machine has it shows later."""
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected cpu, mps, cuda or cuda:1")
    return text


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m ch08_full_models",
        description="Real language models in your terminal: answers, a chat, or a text continued.",
        epilog="Without PROMPT: a chat in a terminal; from a pipe, the prompt is read (UTF-8).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    whole, share = "a whole number from 1", "a number above 0, at most 1"
    add("prompt", nargs="?", metavar="PROMPT", help="what to say to the model")
    add(
        "--model",
        metavar="NAME|PATH",
        default="smollm2-135m",
        help="a name of --list, a folder, a .gguf, a Hub id org/name (default: %(default)s)",
    )
    add(
        "--max-new-tokens",
        metavar="N",
        type=number(int, 1, 2**31, whole),
        default=256,
        help="longest answer, in tokens (default: %(default)s)",
    )
    add(
        "--temperature",
        metavar="T",
        type=number(float, 0, 1e6, "a number from 0"),
        default=0.0,
        help="0: always the likeliest token, the same text each time; a small model that repeats "
        "itself does so less at 0.7 (default: %(default)s)",
    )
    add(
        "--top-k",
        metavar="K",
        type=number(int, 1, 2**31, whole),
        help="draw from the K likeliest tokens only",
    )
    add(
        "--top-p",
        metavar="P",
        type=number(float, sys.float_info.min, 1, share),
        help="draw from the fewest tokens that have probability P together",
    )
    add(
        "--seed",
        metavar="S",
        type=number(int, 0, 2**63 - 1, "a whole number from 0"),
        default=0,
        help="the same seed, the same text (default: %(default)s)",
    )
    add("--raw", action="store_true", help="continue the text, without a chat template")
    add(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="let the model think first, where its chat template knows of that (default: its own)",
    )
    add("--quantize", choices=("int8", "int4"), help="keep the layers' weights in fewer bits")
    add(
        "--compile",
        action="store_true",
        help="decode by one compiled function, on a CPU: faster after a minute or two of compiling "
        "(seconds the next time); needs a C++ compiler",
    )
    add(
        "--two-step",
        action="store_true",
        help="look for the likeliest token among few words, on a CPU: for --dtype bfloat16 and "
        "--temperature 0; pays for large vocabularies, with --compile",
    )
    add(
        "--memory",
        metavar="GB",
        type=number(float, sys.float_info.min, 1e6, "a number above 0"),
        help="what weights may take, in 1e9 bytes; the rest is read from disk when it is needed",
    )
    add(
        "--device",
        metavar="D",
        type=device,
        help="cpu, mps, cuda or cuda:1 (default: the fastest there is)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: the checkpoint's own; float32 for a .gguf; bfloat16 with "
        "--quantize on a CPU)",
    )
    add("--stats", action="store_true", help="end with speed and memory, as JSON on stderr")
    add("--list", action="store_true", help="list every model by name, and stop")
    return parser


def check_prompt(prompt: str) -> str:
    """The prompt itself. Raises CheckpointError if it is empty or was not UTF-8."""
    if not prompt.strip():
        raise CheckpointError("the prompt is empty")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as err:  # Python keeps bytes it cannot read as lone surrogates
        raise CheckpointError(f"the prompt is not UTF-8, at character {err.start}") from None
    return prompt


def read_pipe() -> str:
    """What comes through the pipe, less a byte order mark and the last line's end."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise CheckpointError(f"the prompt is not UTF-8, at byte {err.start}") from None
    return text.removesuffix("\n").removesuffix("\r")


# What it costs


@dataclass
class Meter:
    """Counts tokens and seconds, over all turns of a chat."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    decoded: int = 0  # new tokens without the first of each turn, which comes with the prefill
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def generate(
        self, model: "nn.Module", tokens_1T: "Tensor", n_new: int, **options: object
    ) -> Iterator["Tensor"]:
        """The model's own generate, measured."""
        from ch08_full_models.checkpoint import family_of

        self.prompt_tokens += tokens_1T.shape[1]
        start = time.perf_counter()
        for i, token_11 in enumerate(family_of(model).generate(model, tokens_1T, n_new, **options)):
            token_11.tolist()  # waits until the device has it
            passed = time.perf_counter() - start
            self.new_tokens += 1
            if i == 0:
                self.prefill_s += passed
            else:
                self.decoded += 1
                self.decode_s += passed
            yield token_11
            start = time.perf_counter()  # what the listener does with it is not ours

    def report(self) -> dict[str, float | None]:
        """Tokens, and tokens a second; None where there was nothing to measure."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "prefill_tokens_per_s": per_second(self.prompt_tokens, self.prefill_s),
            "decode_tokens_per_s": per_second(self.decoded, self.decode_s),
        }


def per_second(count: int, seconds: float) -> float | None:
    return round(count / seconds, 2) if seconds else None


def peak_rss_bytes() -> int | None:
    """The most memory this process has held, in bytes; None where the system does not say."""
    with suppress(OSError, ValueError):  # Linux: getrusage would count the parent's peak as well
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    try:
        import resource
    except ImportError:
        return windows_memory()[0]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_bytes() -> int | None:
    """The machine's main memory, in bytes; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return windows_memory()[1]


def windows_memory() -> tuple[int | None, int | None]:
    """This process's peak and the machine's main memory, in bytes; None unless this is Windows."""
    if sys.platform != "win32":
        return None, None
    import ctypes
    from ctypes import c_size_t, c_uint32, c_uint64

    class Process(ctypes.Structure):  # PROCESS_MEMORY_COUNTERS
        _fields_ = [("cb", c_uint32), ("faults", c_uint32), ("peak", c_size_t)]
        _fields_ += [(f"other{i}", c_size_t) for i in range(7)]

    class Machine(ctypes.Structure):  # MEMORYSTATUSEX
        _fields_ = [("cb", c_uint32), ("load", c_uint32), ("total", c_uint64)]
        _fields_ += [(f"other{i}", c_uint64) for i in range(6)]

    kernel = ctypes.windll.kernel32
    process, machine = Process(ctypes.sizeof(Process)), Machine(ctypes.sizeof(Machine))
    handle = ctypes.c_void_p(kernel.GetCurrentProcess())
    peak = kernel.K32GetProcessMemoryInfo(handle, ctypes.byref(process), process.cb)
    total = kernel.GlobalMemoryStatusEx(ctypes.byref(machine))
    return process.peak if peak else None, machine.total if total else None


# Running it


class StopOnCtrlC:
    """Within it the first Ctrl-C only sets `pressed`; a second one interrupts as usual.

    A forward pass that is interrupted costs the cache, and the next turn all of its tokens again.
    """

    def __enter__(self) -> "StopOnCtrlC":
        self.pressed = False
        self.before = signal.signal(signal.SIGINT, self.press)
        return self

    def press(self, signum: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self.before)


def say(line: str, end: str = "\n") -> None:
    """A notice to the person, which is not part of the text."""
    print(line, end=end, file=sys.stderr, flush=True)


def show_list() -> None:
    """Prints the table of models; the last column tells whether one fits into this machine."""
    head, *rows = table()
    memory, lines = memory_bytes(), [(*head, "fits")]
    for row, model in zip(rows, MODELS.values(), strict=True):
        fits = memory and 1.15 * model.memory_bytes < memory  # and room to work in
        lines.append((*row, "?" if memory is None else "yes" if fits else "no"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def print_text(pieces: Iterator[str], stop: StopOnCtrlC | None = None) -> None:
    """Prints the text as it is made, and ends the line."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            if stop and stop.pressed:
                break
    except KeyboardInterrupt:
        print(flush=True)
        raise
    print(flush=True)


def converse(new_chat: "Callable[[], Chat]", name: str, raw: bool) -> "Chat":
    """A chat in the terminal, or the last of several; with raw, each line is a text to continue."""
    with suppress(ImportError):  # arrow keys and history for input(), where there is readline
        import readline  # noqa: F401
    start_over = "" if raw else "/new starts over, "
    say(f"{name}: Ctrl-C stops an answer, {start_over}/exit or Ctrl-D ends.")
    chat = new_chat()
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return chat
        command = line.strip()
        if command == "/exit":
            return chat
        if command and (raw or command == "/new"):
            chat = new_chat()
        if command in ("", "/new"):
            continue
        try:
            with StopOnCtrlC() as stop:
                print_text(reply(chat, check_prompt(line), raw), stop)
            say_if_full(chat)
        except KeyboardInterrupt:
            continue
        except CheckpointError as err:
            say(f"error: {err}")


def say_if_full(chat: "Chat") -> None:
    """Tells why a text ends before its end, if it is for the model's length."""
    if chat.stopped == "context":
        say(f"stopped: the model's context of {chat.model.cfg.max_seq_len:,} tokens is full")


def reply(chat: "Chat", prompt: str, raw: bool) -> Iterator[str]:
    """What the model says to the prompt, or, with raw, how it goes on with it."""
    return chat.go_on(chat.tokenizer.encode(prompt)) if raw else chat.answer(prompt)


def run(args: argparse.Namespace) -> None:
    """Loads the model and does what was asked for. Raises CheckpointError."""
    prompt = args.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = read_pipe()
    if prompt is not None:
        check_prompt(prompt)
    if args.two_step and args.temperature > 0:
        given = f"--temperature is {args.temperature:g}, expected 0"
        raise CheckpointError(f"--two-step finds the likeliest token: {given}")
    path = fetch(args.model)

    notice = f"loading {args.model} …" if sys.stderr.isatty() else ""
    say(notice, end="\r" if notice else "")
    try:
        import torch

        from ch08_full_models.chat import Chat
        from ch08_full_models.checkpoint import load
        from ch08_full_models.speed import weight_bytes

        start = time.perf_counter()
        memory = None if args.memory is None else round(args.memory * 1e9)
        model, tokenizer = load(
            path,
            args.dtype,
            args.device,
            args.quantize,
            memory,
            compile=args.compile,
            two_step=args.two_step,
        )
        load_s = time.perf_counter() - start
        if not gc.isenabled():
            gc.freeze()
            gc.enable()
    finally:
        say(" " * len(notice), end="\r" if notice else "")
    if tokenizer is None:
        raise CheckpointError(f"{path}: has no tokenizer.json, so text cannot be read or written")
    raw = args.raw or is_base(args.model, tokenizer)
    if raw and not args.raw:
        say(f"{args.model} is a base model: it goes on with the text, as with --raw")
    meter = Meter()
    sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}

    def new_chat() -> Chat:
        options = sampling | {"thinking": args.thinking}
        return Chat(model, meter.generate, tokenizer, args.max_new_tokens, **options)

    if prompt is None:
        chat = converse(new_chat, args.model, raw)
    else:
        chat = new_chat()
        print_text(reply(chat, prompt, raw))
        say_if_full(chat)
    if args.stats:
        parameter = next(model.parameters())
        stats = meter.report() | {
            "load_s": round(load_s, 3),
            "peak_rss_bytes": peak_rss_bytes(),
            "weight_bytes": weight_bytes(model),
            "cache_bytes": sum(layer.n_bytes() for layer in chat.cache),
            "model": args.model,
            "source": str(path),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": str(parameter.device),
            "quantize": args.quantize,
            "bytes_read_late": model.disk.n_bytes_read if getattr(model, "disk", None) else 0,
            "threads": torch.get_num_threads(),
        }
        say(json.dumps(stats))


def is_base(name: str, tokenizer: "Tokenizer") -> bool:
    """True for a model not trained to answer. Some of them carry a chat template all the same."""
    known = MODELS.get(name)
    return tokenizer.chat_template is None or (known is not None and not known.instruct)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    args = build_parser().parse_args(argv)
    # The model may write any character. In a file or a pipe that is UTF-8 everywhere; a console
    # with an older encoding shows "?" for what it does not have.
    encoding = sys.stdout.encoding if sys.stdout.isatty() else "utf-8"
    with suppress(AttributeError):  # a notebook's stdout has no encoding to set
        sys.stdout.reconfigure(encoding=encoding, errors="replace")
    try:
        if args.list and args.prompt is not None:
            raise CheckpointError("--list takes no prompt")
        if args.list:
            show_list()
        else:
            run(args)
    except BrokenPipeError:  # the reader, `head` perhaps, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    except CheckpointError as err:
        say(f"error: {err}")
        return 2
    except OSError as err:
        say(f"error: {err.filename or 'system'}: {err.strerror or err}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    # Imports and loading make half a million objects, which stay: to look through them for garbage,
    # again and again, takes 0.2 s. `run` has Python leave them alone, and look again from then on.
    gc.disable()
    sys.exit(main())
