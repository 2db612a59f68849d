"""The box for untrusted scripts, against scripts that try to leave it or to wear it out.

What these scripts do is bounded by themselves too: if the box fails, they still do no harm.
"""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import jail, sandbox
from tests.sandbox import Limits, Outcome, SandboxError

START = """
import json, os, signal, sys, time
channel = os.dup(1)
os.dup2(2, 1)

def send(what):
    data = what if isinstance(what, bytes) else json.dumps(what).encode()
    while data:
        data = data[os.write(channel, data):]

def attempt(step):
    try:
        step()
    except OSError as error:
        return type(error).__name__
    return "done"
"""
LINUX = sys.platform == "linux"
OPEN_PYTHON = "/usr/bin/python3"  # one that every user can start, if there is one
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
linux = pytest.mark.skipif(not LINUX, reason="needs Linux")
Runner = Callable[..., Outcome]
pytestmark = pytest.mark.filterwarnings("ignore:.*can be read by everyone")


CLOSED = "bubblewrap", "namespaces"  # the levels at which the script has a view of its own


def open_python_works(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Takes the system's Python, as the one of the tests may lie where only root can read."""
    monkeypatch.setattr(sys, "executable", OPEN_PYTHON)
    return shutil.which(OPEN_PYTHON) is not None and sandbox.works("another user")


@functools.cache
def offered() -> list[str]:
    """The levels that this system offers, if need be with another Python."""
    found = sandbox.available()
    if LINUX and sandbox.is_root() and "another user" not in found:
        with pytest.MonkeyPatch.context() as monkeypatch:
            found += ["another user"] * open_python_works(monkeypatch)
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that asks for a level runs at all those offered; "closed" at those that hide."""
    if "closed" in metafunc.fixturenames:
        metafunc.parametrize("level", [level for level in offered() if level in CLOSED])
    elif "level" in metafunc.fixturenames:
        metafunc.parametrize("level", offered())


@pytest.fixture
def closed(level: str) -> str:
    return level


def open_files() -> set[str]:
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}


def children() -> set[str]:
    """The direct children of this process, dead or alive."""
    found = set()
    for task in os.listdir("/proc/self/task"):
        # A thread that ended since it was listed has no file, and hands its children to another.
        with suppress(FileNotFoundError, ProcessLookupError):
            file = Path(f"/proc/self/task/{task}/children")
            found |= set(file.read_text(encoding="utf-8").split())
    return found


def running(word: str) -> list[int]:
    """The processes that have a word in their command or in their folder's path."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            command = os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes())
            if word in command or word in os.readlink(f"/proc/{pid}/cwd"):
                found.append(int(pid))
    return found


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition comes true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def box(level: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    """A function that runs a script at the level; afterwards nothing may be left of any run."""
    if level not in sandbox.available():
        assert open_python_works(monkeypatch)
    name = f"{uuid.uuid4().hex}.py"
    folder = Path(tempfile.mkdtemp())
    before = (open_files(), children()) if LINUX else None
    n_threads = threading.active_count()

    def run(script: str, **limits: float) -> Outcome:
        (folder / name).write_text(START + script, encoding="utf-8")
        outcome = sandbox.run(folder, name, Limits(**{"wall_s": 20.0, **limits}), level)
        assert outcome.isolation == level
        assert outcome.ended in sandbox.ENDINGS
        return outcome

    run.folder = folder
    yield run
    shutil.rmtree(folder, ignore_errors=os.name == "nt")  # which is slow to let go of folders
    assert threading.active_count() == n_threads
    if LINUX:
        assert (open_files(), children()) == before
        assert not running(name)


def ended_well(outcome: Outcome) -> bool:
    return (outcome.ended, outcome.code) == ("exit", 0)


# What comes back


def test_the_levels_are_found_and_explained() -> None:
    found = sandbox.available()
    assert found == [level for level in sandbox.LEVELS if level in found]
    assert found[-1] == "limits only"
    texts = (*sandbox.LEVELS.values(), *sandbox.ENDINGS.values())
    assert all(text.rstrip(")").endswith(".") for text in texts)


@linux
def test_namespaces_work_where_the_system_has_them() -> None:
    command = ["unshare", "-Urmpinuf", "--mount-proc", "true"]
    if shutil.which("unshare") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this system has no namespaces for us")
    assert sandbox.available()[0] == "namespaces"


def test_bytes_come_back_and_prints_stay_away(box: Runner) -> None:
    outcome = box("""
print("printed")
os.system("echo from a child")
print("an error", file=sys.stderr)
send(bytes(range(256)) * 4096)
""")
    assert ended_well(outcome)
    assert outcome.sent == bytes(range(256)) * 4096
    assert {"printed", "from a child", "an error"} <= set(outcome.text.splitlines())


def test_prints_without_end_neither_block_nor_pile_up(box: Runner) -> None:
    outcome = box("""
sys.stdout.write("first\\n")
for _ in range(50):
    sys.stdout.write("x" * 2**20)
sys.stdout.write("last\\n")
sys.stdout.flush()
send(b"done")
""")
    assert ended_well(outcome) and outcome.sent == b"done"
    assert outcome.text.startswith("first") and outcome.text.rstrip().endswith("last")
    assert len(outcome.text) < 20_100
    n_cut = 50 * 2**20 + len("first\nlast\n") + (2 if os.name == "nt" else 0) - 20_000
    assert f"{n_cut} bytes are left out" in outcome.text


def test_text_is_cut_in_its_middle() -> None:
    for n_most in (0, 1, 7, 100):
        for sizes in ([], [3], [100], [1] * 100, [60, 60], [500, 1, 30]):
            text = sandbox.Text(n_most)
            data = bytes(97 + i % 26 for i in range(sum(sizes)))
            rest = data
            for size in sizes:
                text.add(rest[:size])
                rest = rest[size:]
            n_head, n_tail = n_most - n_most // 2, n_most // 2
            if len(data) <= n_most:
                assert text.read() == data.decode()
            else:
                assert text.read().startswith(data[:n_head].decode() + "\n[... ")
                assert text.read().endswith("...]\n" + data[len(data) - n_tail :].decode())
                assert f" {len(data) - n_most} bytes" in text.read()


def test_bad_bytes_in_the_text(box: Runner) -> None:
    assert "\ufffd" in box(r'os.write(2, b"\xff\xfe")').text


def test_sent_too_much(box: Runner) -> None:
    outcome = box("while True: send(b'x' * 65536)", sent_bytes=1_000_000)
    assert (outcome.ended, outcome.code) == ("sent too much", None)
    assert outcome.sent == b"x" * 1_000_000
    assert box("send(b'x' * 1000)", sent_bytes=1000).ended == "exit"


def test_closed_channel_and_early_end(box: Runner) -> None:
    outcome = box("os.close(1); os.close(channel); os._exit(0)")
    assert ended_well(outcome) and outcome.sent == b""


# Ends


def test_exit_codes(box: Runner) -> None:
    assert ended_well(box("os._exit(0)"))
    assert (box("sys.exit(3)").ended, box("sys.exit(3)").code) == ("exit", 3)
    outcome = box("raise ValueError('of the script')")
    assert (outcome.ended, outcome.code) == ("exit", 1)
    assert "ValueError: of the script" in outcome.text


@posix
def test_signals(box: Runner) -> None:
    for name in ("SIGABRT", "SIGKILL", "SIGSEGV"):
        outcome = box(f"os.kill(os.getpid(), signal.{name})")
        assert (outcome.ended, outcome.code) == ("signal", -getattr(signal, name)), name
    assert box("os.abort()").ended == "signal"


def test_sleeps_forever(box: Runner) -> None:
    wall_s = 1.0 if LINUX else 4.0  # elsewhere Python may start slowly
    outcome = box("send(b'early'); time.sleep(60)", wall_s=wall_s)
    assert (outcome.ended, outcome.code, outcome.sent) == ("time", None, b"early")
    assert wall_s <= outcome.seconds < wall_s + 6.0


@posix
def test_burns_processor_time(box: Runner, level: str) -> None:
    outcome = box("while True: pass", cpu_s=1, wall_s=60.0)
    assert (outcome.ended, outcome.code) == ("cpu", -signal.SIGXCPU)
    if level == offered()[0]:
        script = "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
        outcome = box(script, cpu_s=1, wall_s=60.0)
        assert (outcome.ended, outcome.code) == ("cpu", -signal.SIGKILL)


@linux
def test_asks_for_more_memory_than_there_is(box: Runner) -> None:
    outcome = box("x = bytearray(100 * 2**30)")
    assert (outcome.ended, outcome.code) == ("exit", 1)
    assert "MemoryError" in outcome.text


@linux
def test_children_hold_too_much_memory_together(box: Runner) -> None:
    script = """
for _ in range(4):
    if os.fork() == 0:
        x = b"x" * (60 * 2**20)
        time.sleep(15)
        os._exit(0)
time.sleep(15)
"""
    outcome = box(script, memory_bytes=150 * 2**20)
    assert outcome.ended == "memory"
    assert outcome.seconds < 14.0
    assert box(script.replace("sleep(15)", "sleep(0.5)"), memory_bytes=600 * 2**20).ended == "exit"


# What it leaves behind


@posix
def test_bounded_fork_bomb(box: Runner, level: str) -> None:
    outcome = box("""
n = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            time.sleep(10)
            os._exit(0)
        n += 1
    except OSError:
        break
send(n)
""")
    assert ended_well(outcome)
    assert outcome.seconds < 9.9  # what its children would sleep
    if level == "namespaces" and jail.counted_inside():
        assert 50 <= int(outcome.sent) <= 64
    elif not (level == "limits only" and sandbox.is_root()):  # root has no such limit
        assert int(outcome.sent) < 200


@linux
def test_children_that_fork_on_and_on_are_caught(box: Runner) -> None:
    outcome = box("""
end = time.monotonic() + 4
def chain():
    while time.monotonic() < end:
        if os.fork():
            os._exit(0)
        os.setsid()
        time.sleep(0.001)
    os._exit(0)
for _ in range(4):
    if os.fork() == 0:
        chain()
time.sleep(0.3)
""")
    assert ended_well(outcome)
    assert outcome.seconds < 3.0


@posix
def test_a_daemon_dies_and_keeps_nobody_waiting(box: Runner) -> None:
    outcome = box("""
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    for sig in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(sig, signal.SIG_IGN)
    send(b"daemon")
    time.sleep(10)
    os._exit(0)
time.sleep(0.3)
""")
    assert ended_well(outcome) and outcome.sent == b"daemon"
    assert outcome.seconds < 3.0


def test_a_child_keeps_nobody_waiting(box: Runner) -> None:
    outcome = box("""
import subprocess
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(15)"])
""")
    assert ended_well(outcome)
    assert outcome.seconds < 8.0


@posix
def test_kills_its_parent(box: Runner, level: str) -> None:
    outcome = box("""
result = attempt(lambda: os.kill(os.getppid(), 9))
time.sleep(1)
send(result)
""")
    if level == "limits only":
        assert (outcome.ended, outcome.code, outcome.sent) == ("launcher killed", None, b"")
    elif level == "another user":
        assert ended_well(outcome) and outcome.sent == b'"PermissionError"'
    else:
        assert ended_well(outcome)


@linux
def test_stops_or_kills_the_launcher_as_well(
    box: Runner, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "GRACE", 0.5)
    script = """
parent, grandparent, ours = os.getppid(), 0, False
with open(f"/proc/{parent}/stat") as file:
    grandparent = int(file.read().rpartition(")")[2].split()[1])
if grandparent:
    ours = b"jail.py" in open(f"/proc/{grandparent}/cmdline", "rb").read()
if ours:
    attempt(lambda: os.kill(grandparent, signal.SIGNAL))
    attempt(lambda: os.kill(parent, signal.SIGNAL))
time.sleep(4)
"""
    outcome = box(script.replace("SIGNAL", "SIGSTOP"), wall_s=1.0)
    assert outcome.ended == "time"
    assert outcome.seconds < 3.5
    if level == "limits only":
        # Who kills both at once gets away; one of them is enough to end the rest.
        script = script.replace("os.kill(parent, signal.SIGNAL)", "None")
        outcome = box(script.replace("SIGNAL", "SIGKILL"), wall_s=2.0)
        assert outcome.ended == "launcher killed"
        time.sleep(2 * jail.TICK)


@linux
def test_kills_all_it_can_see(box: Runner, closed: str) -> None:
    namespace = os.readlink("/proc/self/ns/pid")
    outcome = box(f"""
alone = os.readlink("/proc/self/ns/pid") != {namespace!r} and os.getpid() < 20
if alone and not os.path.exists("/proc/100"):
    child = os.fork()
    if child == 0:
        time.sleep(5)
        os._exit(0)
    os.kill(-1, 9)
    send(os.waitpid(child, 0)[1])
""")
    assert ended_well(outcome) and outcome.sent == b"9"  # it spares pid 1 and the one who calls


# What it can reach


def test_the_environment_is_clean(box: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    outcome = box("""
send({"variables": dict(os.environ), "folder": os.getcwd(), "stdin": sys.stdin.read(),
      "isolated": [sys.flags.isolated, sys.flags.dont_write_bytecode]})
""")
    seen = json.loads(outcome.sent)
    names = {"HOME", "TMPDIR", "OMP_NUM_THREADS", "LANG", "PATH", "SYSTEMROOT", "LC_CTYPE", "PWD"}
    names |= {"__PYVENV_LAUNCHER__"}
    assert {name.upper() for name in seen["variables"]} - {"__CF_USER_TEXT_ENCODING"} <= names
    assert Path(seen["folder"]) == box.folder.resolve() == Path(seen["variables"]["HOME"])
    assert Path(seen["variables"]["TMPDIR"]) == box.folder.resolve() / "tmp"
    assert (seen["stdin"], seen["isolated"]) == ("", [1, 1])


@linux
def test_no_files_of_the_grader_are_open(box: Runner) -> None:
    with tempfile.TemporaryFile() as file:
        os.set_inheritable(file.fileno(), True)
        outcome = box("send(sorted(int(fd) for fd in os.listdir('/proc/self/fd')))")
    assert json.loads(outcome.sent) == [0, 1, 2, 3, 4]  # the channel's copy, and the folder listed


def test_the_folder_can_be_read_and_written(box: Runner) -> None:
    (box.folder / "data").mkdir()
    (box.folder / "data" / "with space").write_bytes(b"12345")
    outcome = box("""
import tempfile
data = open("data/with space", "rb").read()
open("new", "wb").write(data)
open(tempfile.mkstemp()[1], "wb").write(data)
send(open("new", "rb").read() + tempfile.gettempdir().encode())
""")
    assert ended_well(outcome), outcome.text
    assert outcome.sent == b"12345" + os.fsencode(box.folder.resolve() / "tmp")


@posix
def test_writes_a_big_file(box: Runner, level: str) -> None:
    script = """
def write(name, n):
    with open(name, "wb") as file:
        for _ in range(n):
            file.write(bytes(2**20))
results = [attempt(lambda: write("big", 3))]
results += [attempt(lambda: write(f"small{i}", 1)) for i in range(12)]
send(results)
"""
    outcome = box(script, file_bytes=2**20)
    results = json.loads(outcome.sent)
    assert ended_well(outcome)
    assert results[0] == "OSError"
    if level == "namespaces":  # all files together are bounded, and the real folder is untouched
        assert results[-1] == "OSError"
        assert not (box.folder / "small0").exists()


@linux
def test_what_a_closed_box_hides(box: Runner, closed: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        outcome = box(f"""
import socket
port, pid, root = {server.getsockname()[1]}, {os.getpid()}, {str(sandbox.ROOT)!r}
parent = os.path.dirname(os.getcwd())
send({{
    "root": os.path.exists(root) and os.listdir(root),
    "others": [path for path in ("/root/.bashrc", "/var", "/run", "/boot", {str(Path.home())!r})
               if os.path.exists(path) and not sys.base_prefix.startswith(path)],
    "beside": os.listdir(parent),
    "in_prefix_folder": os.listdir(os.path.dirname(sys.prefix)),
    "pids": [int(pid) for pid in os.listdir("/proc") if pid.isdecimal()],
    "network": attempt(lambda: socket.create_connection(("127.0.0.1", port), 2)),
    "interfaces": [name for _, name in socket.if_nameindex()],
    "writes": [attempt(lambda: open(path, "w")) for path in (
        "/x", "/usr/x", "/etc/passwd", "/dev/x", sys.prefix + "/bin/x", os.__file__)],
    "user": os.getuid(),
    "hidden": [path for path in sys.path if path.startswith(root) and os.path.exists(path)],
}})
""")
    seen = json.loads(outcome.sent)
    prefix = Path(sys.prefix)
    inside = prefix.is_relative_to(sandbox.ROOT) and prefix.relative_to(sandbox.ROOT).parts[:1]
    assert not seen["root"] or tuple(seen["root"]) == inside
    assert not seen["others"]
    # Python itself may live among temporary files: the way to it is shown, and nothing beside it.
    above = box.folder.parent
    way = prefix.relative_to(above).parts[:1] if prefix.is_relative_to(above) else ()
    assert set(seen["beside"]) == {box.folder.name, *way}
    if way:
        assert seen["in_prefix_folder"] == [prefix.name]
    assert len(seen["pids"]) <= 3 and max(seen["pids"]) < 20
    assert seen["network"] != "done" and set(seen["interfaces"]) <= {"lo"}
    assert "done" not in seen["writes"]
    assert seen["user"] != 0
    assert all(str(sys.prefix) in path for path in seen["hidden"])


@linux
def test_a_repository_among_the_systems_folders_is_hidden(
    box: Runner, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "ROOT", Path("/usr/share"))
    assert os.listdir("/usr/share")
    assert box("send(os.listdir('/usr/share'))").sent == b"[]"


@linux
def test_a_virtual_environment_among_temporary_files_is_shown(
    box: Runner, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        (Path(name) / "lib" / "inside").mkdir(parents=True)
        (Path(name) / "homework").mkdir()
        monkeypatch.setattr(sys, "prefix", name)
        outcome = box(f"send([os.listdir({name!r}), os.listdir({name + '/lib'!r})])")
    assert json.loads(outcome.sent) == [["lib"], ["inside"]]


@posix
def test_a_virtual_environment_in_a_hidden_repository_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path = tmp_path.resolve()
    repository, prefix = tmp_path / "app", tmp_path / "app" / "venv"
    for name in ("bin", "lib", "homework"):
        (prefix / name).mkdir(parents=True)
    monkeypatch.setattr(jail, "SYSTEM", (str(tmp_path),))
    exe = str(prefix / "bin" / "python")
    spec = {"prefixes": [str(prefix)], "exe": exe, "hidden": str(repository)}
    shown = [pair for pair in jail.view(spec) if pair[0].startswith(str(tmp_path))]
    assert shown == [
        (str(tmp_path), str(tmp_path)),
        (str(repository), ""),
        (str(prefix / "bin"), str(prefix / "bin")),
        (str(prefix / "lib"), str(prefix / "lib")),
    ]
    monkeypatch.setattr(jail, "SYSTEM", ())  # then there is nothing to hide
    assert str(repository) not in dict(jail.view(spec))


@linux
def test_no_way_to_rights(box: Runner, level: str) -> None:
    caps = ["CapInh", "CapPrm", "CapEff", "CapAmb"]
    if sandbox.is_root() or level in CLOSED:  # without rights it can't be lowered, nor be used
        caps.append("CapBnd")
    outcome = box(
        """
import ctypes
libc, parent = ctypes.CDLL(None), os.getppid()
status = open("/proc/self/status").read()
send({
    "capabilities": [line.split()[1] for line in status.split("\\n") if line[:6] in CAPS],
    "no_new_privs": "NoNewPrivs:\\t1" in status,
    "ptrace": libc.ptrace(16, parent, 0, 0) if LEVEL != "bubblewrap" else -1,  # PTRACE_ATTACH
    "memory": attempt(lambda: open(f"/proc/{parent}/mem", "rb")),
    "files": attempt(lambda: open(f"/proc/{parent}/fd/1", "wb")),
    "mount": libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, 0),
    "users": libc.unshare(1 << 28) if LEVEL == "namespaces" else -1,
})
""".replace("LEVEL", repr(level)).replace("CAPS", repr(caps))
    )
    seen = json.loads(outcome.sent)
    assert {int(value, 16) for value in seen["capabilities"]} == {0}
    assert seen["no_new_privs"]
    assert seen["ptrace"] == seen["mount"] == seen["users"] == -1
    if level != "bubblewrap":  # there the parent is bwrap's own, inside, and without rights too
        assert seen["memory"] != "done"
        assert seen["files"] != "done"


# The grader's side


def test_mistakes_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no level 'none'"):
        sandbox.run(tmp_path, "x.py", isolation="none")
    with pytest.raises(FileNotFoundError):
        sandbox.run(tmp_path / "missing", "x.py")
    outcome = sandbox.run(tmp_path, "missing.py", Limits(wall_s=20.0), "limits only")
    assert (outcome.ended, outcome.code) == ("exit", 2) and "missing.py" in outcome.text
    if not LINUX:
        with pytest.raises(SandboxError):
            sandbox.run(tmp_path, "x.py", isolation="namespaces")


@linux
def test_a_box_that_cannot_be_built_is_not_the_scripts_fault(
    box: Runner, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = sandbox.describe
    monkeypatch.setattr(sandbox, "describe", lambda *args: describe(*args) | {"folder": "/missing"})
    if level != "bubblewrap":  # its complaint looks like the script's
        with pytest.raises(SandboxError, match="missing"):
            box("")


@linux
@pytest.mark.skipif(not sandbox.is_root(), reason="needs root")
def test_an_open_repository_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(sandbox, "ROOT", Path("/usr"))
    with pytest.warns(UserWarning, match="/usr can be read by everyone"):
        sandbox.prepare(tmp_path, "another user")
    assert tmp_path.stat().st_uid == jail.NOBODY
    monkeypatch.setattr(sandbox, "ROOT", tmp_path)  # 0700, as pytest makes it
    sandbox.prepare(tmp_path, "another user")


def test_runs_side_by_side(box: Runner, level: str) -> None:
    outcomes: list[Outcome] = []

    def one(i: int) -> None:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
            (Path(name) / "w.py").write_text(f"import os; os.write(1, b'{i}')", encoding="utf-8")
            outcomes.append(sandbox.run(Path(name), "w.py", Limits(wall_s=30.0), level))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome.sent for outcome in outcomes) == [b"0", b"1", b"2", b"3"]


@linux
def test_nothing_survives_the_grader(box: Runner, level: str) -> None:
    grader = f"""
import sys
sys.path.insert(0, {str(sandbox.ROOT)!r})
from pathlib import Path
from tests import sandbox
sandbox.run(Path({str(box.folder)!r}), "endless.py", isolation={level!r})
"""
    (box.folder / "endless.py").write_text("import time; time.sleep(20)", encoding="utf-8")
    with subprocess.Popen([sys.executable, "-B", "-c", grader]) as process:
        begun = wait_until(lambda: bool(running("endless.py")), 10)
        time.sleep(0.2)
        process.kill()
    assert begun
    assert wait_until(lambda: not running("endless.py"), 5)
