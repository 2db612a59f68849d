"""Runs an untrusted Python script in a box: bytes come back, and nothing else.

    outcome = run(folder, "worker.py")

The script runs in `folder` with Python's isolated mode, an empty stdin, and an environment without
anything of ours. What it writes to its stdout comes back as Outcome.sent, so it should keep that
for itself before anything else can print:

    channel = os.dup(1)
    os.dup2(2, 1)

Nothing that comes back may be trusted: sent is for the caller to parse with care, never to unpickle
or to execute, and text may hold any character, a terminal's commands as well.

How much the script is kept from is a question of the system: LEVELS says what each level protects,
available() which of them work here. jail.py builds the box.
"""

import functools
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tests import jail

ROOT = Path(__file__).resolve().parents[1]
GRACE = 3.0  # seconds that the launcher has to end everything, once asked

LEVELS = {
    "namespaces": (
        "The script sees a system of its own, with Python, the system's libraries and a copy of "
        "its folder in memory, all else being absent: no other file, process or network, a bound "
        "on what it writes, nothing left behind; a hole in the kernel would let it out, and it may "
        "use as many cores as there are until its time is over."
    ),
    "bubblewrap": (
        "The same view, made by the program bwrap, but the script's folder is the real one, and "
        "what it writes there and in its /tmp is bounded for each file only."
    ),
    "another user": (
        "The script runs as a user without rights, who cannot touch the grader's processes and "
        "files; it can read every file that all users may read, reach the network, leave files in "
        "/tmp, and disturb other runs at the same time."
    ),
    "limits only": (
        "Only time, output, memory (not on macOS), the number of processes and (not on Windows) "
        "processor time and the size of a file have bounds, and what is started is ended, unless "
        "it hides well; the script can do all that the user who grades can do: read and change "
        "their files, use the network, kill the grader."
    ),
}

ENDINGS = {
    "exit": "It ended by itself; code is its exit status.",
    "signal": "A signal that was not ours ended it; code is minus the signal. The system's own "
    "answer to a lack of memory looks like this: -9.",
    "time": "It ran longer than wall_s.",
    "cpu": "One of its processes used more than cpu_s of processor time.",
    "memory": "Its processes together held more than memory_bytes. (One process alone that asks "
    'for more gets a MemoryError instead, and most end with "exit", code 1.)',
    "sent too much": "It wrote more than sent_bytes to its channel.",
    "launcher killed": "The process that watched over it was killed: by the script, most likely.",
}


class SandboxError(RuntimeError):
    """The box could not be built. It is not the script's fault."""


@dataclass(frozen=True)
class Limits:
    """What a run may use."""

    wall_s: float = 60.0  # seconds, start and end of the box included
    cpu_s: int = 60  # seconds of processor time, of each process
    memory_bytes: int = 6 * 2**30  # address space of each process; memory of all together
    n_processes: int = 64  # and threads
    file_bytes: int = 32 * 2**20  # of each file
    sent_bytes: int = 64 * 2**20
    text_bytes: int = 20_000


@dataclass(frozen=True)
class Outcome:
    """What came out of a run."""

    sent: bytes  # all that came over the channel, at most sent_bytes
    text: str  # what was printed, stdout and stderr together, its middle cut out if it was long
    ended: str  # a word of ENDINGS
    code: int | None  # exit status or minus the signal; None where we ended it
    seconds: float
    isolation: str  # the level that was in force


class Channel:
    """Keeps the first n_most bytes."""

    def __init__(self, n_most: int, too_much: threading.Event) -> None:
        self.kept, self.n_most, self.too_much = bytearray(), n_most, too_much
        self.full = False

    def add(self, part: bytes) -> None:
        self.full = self.full or len(self.kept) + len(part) > self.n_most
        self.kept += part[: self.n_most - len(self.kept)]
        if self.full:
            self.too_much.set()


class Text:
    """Keeps the first and the last n_most / 2 bytes."""

    def __init__(self, n_most: int) -> None:
        self.head, self.tail, self.n_all = bytearray(), deque[bytes](), 0
        self.n_head, self.n_tail, self.in_tail = n_most - n_most // 2, n_most // 2, 0

    def add(self, part: bytes) -> None:
        self.n_all += len(part)
        n = self.n_head - len(self.head)
        self.head += part[:n]
        self.tail.append(part[n:])
        self.in_tail += len(part[n:])
        while self.in_tail - len(self.tail[0]) >= self.n_tail and len(self.tail) > 1:
            self.in_tail -= len(self.tail.popleft())

    def read(self) -> str:
        tail = b"".join(self.tail)
        tail = tail[max(0, len(tail) - self.n_tail) :]
        n_cut = self.n_all - len(self.head) - len(tail)
        cut = f"\n[... {n_cut} bytes are left out here ...]\n".encode() if n_cut else b""
        return (self.head + cut + tail).decode(errors="replace")


class Drain(threading.Thread):
    """Empties a pipe until it is closed; after finish() was called, until it is empty."""

    def __init__(self, pipe: io.RawIOBase, into: Channel | Text) -> None:
        super().__init__(daemon=True)
        self.pipe, self.into, self.end = pipe, into, math.inf
        self.start()

    def ready(self, seconds: float) -> bool:
        """Whether there is something to read, after some waiting; on Windows reading waits."""
        if os.name != "posix":
            return True
        import select

        poll = select.poll()
        poll.register(self.pipe, select.POLLIN)
        return bool(poll.poll(1000 * seconds))

    def run(self) -> None:
        while time.monotonic() < self.end:
            finishing = self.end < math.inf
            if self.ready(0 if finishing else 0.05):
                part = os.read(self.pipe.fileno(), 1 << 16)
                if not part:
                    return
                self.into.add(part)
            elif finishing:
                return

    def finish(self) -> None:
        """Takes what is left. A process that got away and goes on writing has one second."""
        self.end = time.monotonic() + 1.0
        self.join(2.0)


def environment(folder: Path) -> dict[str, str]:
    """All of the script's environment variables."""
    variables = {"HOME": str(folder), "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    variables |= {"LANG": "C.UTF-8"}
    if os.name == "posix":
        return variables | {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    return variables | {name: os.environ.get(name, "") for name in ("PATH", "SYSTEMROOT")}


def is_root() -> bool:
    return os.name == "posix" and os.geteuid() == 0


def user_inside(level: str) -> tuple[int, int]:
    """The user and group that the script has."""
    if is_root() and level in ("namespaces", "another user"):
        return jail.NOBODY, jail.NOBODY
    return (os.geteuid(), os.getegid()) if os.name == "posix" else (0, 0)


def describe(folder: Path, script: str, limits: Limits, level: str, report: int) -> dict:
    """What the launcher must know, ready for JSON."""
    return asdict(limits) | {
        "level": level,
        "folder": str(folder),
        "args": ["-I", "-B", "-X", "utf8", script],
        "exe": sys.executable,
        "real_exe": os.path.realpath(sys.executable),
        "prefixes": sorted({sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}),
        "hidden": str(ROOT),
        "bwrap": shutil.which("bwrap") or "bwrap",
        "ids": user_inside(level),
        "env": environment(folder),
        "report": report,
    }


def start(folder: Path, script: str, limits: Limits, level: str, report: int) -> subprocess.Popen:
    """The launcher, with pipes. Its stdin stays open as long as the run may go on."""
    spec = json.dumps(describe(folder, script, limits, level, report))
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-X", "utf8", jail.__file__, spec],
        bufsize=0,
        cwd=Path(jail.__file__).parent,
        env=environment(folder),
        pass_fds=(report,) if os.name == "posix" else (),
        start_new_session=os.name == "posix",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def stop(process: subprocess.Popen, waiter: threading.Thread) -> None:
    """Asks the launcher to end everything, and does so in its place where it does not answer."""
    with suppress(OSError):
        process.stdin.close()
    waiter.join(GRACE)
    if waiter.is_alive() and os.name == "posix":
        jail.kill_below(process.pid)
    with suppress(OSError):
        process.kill()
    waiter.join(GRACE)


def read_report(fd: int) -> dict:
    """What the keeper said: how the script ended, or what went wrong before; {} for nothing."""
    os.set_blocking(fd, False)
    with suppress(BlockingIOError, ValueError):
        lines = [json.loads(line) for line in os.read(fd, 1 << 16).splitlines()]
        return {name: value for line in lines for name, value in line.items()}
    return {}


def prepare(folder: Path, level: str) -> None:
    """Makes the folder fit for the user that the script will have."""
    (folder / "tmp").mkdir(exist_ok=True)
    if is_root() and level == "another user":
        for path in (folder, folder / "tmp"):
            # An earlier run in this folder may have left a link in the place of tmp.
            os.chown(path, jail.NOBODY, jail.NOBODY, follow_symlinks=False)
        if open_to_all(ROOT):
            message = f'{ROOT} can be read by everyone, and so by the script; "chmod 700" it.'
            warnings.warn(message, stacklevel=3)


def open_to_all(folder: Path) -> bool:
    """Whether every user may read the folder."""
    return all(path.stat().st_mode & 0o001 for path in (folder, *folder.parents))


def ending(report: dict, process: subprocess.Popen) -> tuple[str, int | None]:
    """The word for how the script ended by itself, and its code."""
    if os.name != "posix":
        return "exit", process.returncode
    if "error" in report:
        raise SandboxError(report["error"])
    if report.get("ended") not in ENDINGS:
        return "launcher killed", None
    return report["ended"], report.get("code")


def run(
    folder: Path, script: str, limits: Limits | None = None, isolation: str | None = None
) -> Outcome:
    """Runs folder/script at a level of LEVELS, by default the best that works here.

    The caller makes a new folder for every run, deletes it, and trusts nothing in it after the run.
    At "another user" every user must be able to pass through the folder's parents. Several threads
    may run scripts at the same time.
    Raises SandboxError if the box cannot be built, ValueError for a level that there is not.
    """
    limits, level = limits or Limits(), isolation or best()
    if level not in LEVELS:
        raise ValueError(f"there is no level {level!r}, only {', '.join(LEVELS)}")
    if level != "limits only" and sys.platform != "linux":
        raise SandboxError(f"{level!r} is a level for Linux")
    folder = Path(folder).resolve(strict=True)
    prepare(folder, level)
    begin, over = time.monotonic(), threading.Event()
    report, write = os.pipe()
    try:
        process = start(folder, script, limits, level, write)
    except BaseException:
        os.close(report)
        raise
    finally:
        os.close(write)
    try:
        return follow(process, report, limits, level, begin, over)
    finally:
        os.close(report)
        for pipe in (process.stdin, process.stdout, process.stderr):
            with suppress(OSError):
                pipe.close()


def follow(
    process: subprocess.Popen, report: int, limits: Limits, level: str, begin: float,
    over: threading.Event,
) -> Outcome:  # fmt: skip
    """Waits for the end of a run, or makes it."""
    channel, text = Channel(limits.sent_bytes, over), Text(limits.text_bytes)
    drains = Drain(process.stdout, channel), Drain(process.stderr, text)

    def wait() -> None:
        process.wait()
        over.set()

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    in_time = False
    try:
        in_time = over.wait(limits.wall_s)
    finally:
        stop(process, waiter)
        for drain in drains:
            drain.finish()
    said = read_report(report) if os.name == "posix" else {}
    if channel.full:
        ended, code = "sent too much", None
    else:
        ended, code = ending(said, process) if in_time else ("time", None)
    seconds = time.monotonic() - begin
    return Outcome(bytes(channel.kept), text.read(), ended, code, seconds, level)


def works(level: str) -> bool:
    """Tries a level with a script that sends two bytes."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        (Path(name) / "try.py").write_text('import os\nos.write(1, b"ok")\n', encoding="utf-8")
        with suppress(SandboxError, OSError), warnings.catch_warnings(action="ignore"):
            outcome = run(Path(name), "try.py", Limits(wall_s=20.0), level)
            return (outcome.sent, outcome.ended, outcome.code) == (b"ok", "exit", 0)
    return False


@functools.cache
def levels_here() -> tuple[str, ...]:
    """The levels that work, best first; each is tried once."""
    possible = ["limits only"]
    if sys.platform == "linux":
        middle = "another user" if is_root() else "bubblewrap"
        possible = ["namespaces", middle, "limits only"]
        if middle == "bubblewrap" and shutil.which("bwrap") is None:
            possible.remove(middle)
    return tuple(level for level in possible if works(level))


def available() -> list[str]:
    """The levels that work on this system, best first."""
    return list(levels_here())


def best() -> str:
    """The best level that works here."""
    if not levels_here():
        raise SandboxError("no script can be started here")
    return levels_here()[0]
