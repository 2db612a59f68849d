"""The process between the grader and an untrusted script: builds the box, waits, tidies up.

sandbox.py starts this file as a program of its own, so nothing here imports the repository. With
POSIX there are three processes, each the parent of the next:
    launcher   waits for the keeper, or for the grader to close the launcher's stdin; then kills
    keeper     builds the box, starts the worker, waits for it, reports; pid 1 where there is a
               pid namespace, so that its end is the end of all that the worker started
    worker     gives up every privilege, then becomes the script
The report is one line of JSON on a pipe that the worker does not inherit.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

if os.name == "posix":
    import resource
    import select
    import shutil

NOBODY = 65534  # the user and group that a root grader's worker becomes
TICK = 0.2  # seconds between two looks at the memory in use
MAX_WRITTEN = 8  # times file_bytes: the room in the box's /tmp, and again in its folder
SYSTEM = "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/usr", "/nix/store"
ETC = "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime"
DEVICES = "null", "zero", "full", "random", "urandom"
PREFIX_PARTS = "bin", "lib", "lib64", "pyvenv.cfg"  # a prefix may hold other things than Python
CPU = "/sys/devices/system/cpu"  # torch asks there which instructions it may use

# From the kernel's headers, the same on every architecture.
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (1 << n for n in (17, 26, 27, 28, 29, 30))
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = (
    1 << n for n in (0, 1, 2, 3, 5, 12, 14, 18)
)
DETACH = 2  # umount2
PDEATHSIG, DUMPABLE, CAPBSET_DROP, SUBREAPER, NO_NEW_PRIVS = 1, 4, 24, 36, 38  # prctl
CAPABILITY_VERSION_3 = 0x20080522


def system(name: str, *args: int | str | None) -> None:
    """Calls a function of the C library. Raises OSError if it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    values = [os.fsencode(a) if isinstance(a, str) else a for a in args]
    values = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in values]
    if getattr(libc, name)(*values) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}", str(args))


def prctl(option: int, value: int) -> None:
    """Linux's prctl. Elsewhere nothing, and so it is where the kernel is too old for the option."""
    if sys.platform == "linux":
        with suppress(OSError):
            system("prctl", option, value, 0, 0, 0)


# The tree of processes


def ps(*columns: str) -> list[list[str]]:
    """What ps says about every process but itself, for systems without /proc."""
    import subprocess

    command = ["ps", "-axo", ",".join(f"{name}=" for name in ("pid", *columns))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        rows = [line.split() for line in process.stdout]
    return [row for row in rows if row[0] != str(process.pid)]


def scan(pid: int) -> set[int]:
    """All running processes below pid or in its group, as ps sees them."""
    rows, below, last = ps("ppid", "pgid", "stat"), set(), {pid}
    heads = {int(row[0]): {int(row[1]), int(row[2])} for row in rows if row[3][0] != "Z"}
    while last:
        last = {process for process in heads if heads[process] & last} - below - {pid}
        below |= last
    return below


def descendants(pid: int) -> set[int]:
    """All running processes below pid. On Linux in well under a millisecond, if they are few."""
    if sys.platform != "linux":
        return scan(pid)
    running, todo = set(), [pid]
    while todo:
        process = todo.pop()
        with suppress(OSError):
            for task in os.listdir(f"/proc/{process}/task"):
                found = Path(f"/proc/{process}/task/{task}/children").read_bytes().split()
                todo += map(int, found)
            # The name before the state is in parentheses and may itself hold any character.
            state = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0]
            if process != pid and state not in b"ZX":
                running.add(process)
    return running


def childless() -> bool:
    """Reaps what has ended; whether this process then has no child, dead or alive."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True
    return False


def kill_below(pid: int, seconds: float = 3.0) -> None:
    """Kills what runs below pid; gives up after some seconds.

    All are stopped before the first is killed, or a process that forks without end would win.
    One that always moves on to a new child may be missed by a look at /proc, never by childless():
    on Linux the launcher and the keeper inherit every process below them whose parent ends.
    """
    stopped: set[int] = set()
    exact = pid == os.getpid() and sys.platform == "linux"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        running = descendants(pid)
        if not running and (not exact or childless()):
            return
        name = signal.SIGSTOP if running - stopped else signal.SIGKILL
        for process in running:
            with suppress(OSError):
                os.kill(process, name)
        stopped |= running


def resident(pid: int) -> int:
    """Bytes of memory that a process holds, all of what it shares included; 0 if it is gone."""
    with suppress(OSError):
        return (
            int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
            * resource.getpagesize()
        )
    return 0


def fair_share(pid: int) -> int:
    """The same, but shared memory divided among its holders. Slow: up to 10 ms."""
    with suppress(OSError):  # a process can forbid to be looked into
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return resident(pid)


def too_much_memory(limit: int) -> bool:
    """Whether everything below this process holds more than limit bytes."""
    if sys.platform != "linux":
        return False
    pids = descendants(os.getpid())
    return sum(map(resident, pids)) > limit and sum(map(fair_share, pids)) > limit


# The box: what the worker sees


def python_places(spec: dict) -> set[str]:
    """The parts of the Python installation, also under their real paths."""
    prefixes = {*spec["prefixes"], os.path.dirname(os.path.dirname(os.path.realpath(spec["exe"])))}
    parts = {os.path.join(prefix, part) for prefix in prefixes for part in PREFIX_PARTS}
    parts = {path for path in parts if os.path.exists(path)}
    return parts | {os.path.realpath(path) for path in parts}


def covers(outer: str, inner: str) -> bool:
    """Whether path inner is outer or lies below it."""
    return Path(inner).is_relative_to(outer)


def view(spec: dict) -> list[tuple[str, str]]:
    """What of the system is visible, outermost first: (path, real path), or (path, "") to hide it.

    Links among the system's folders are (path, "-> target").
    """
    places = python_places(spec) | {p for p in (*SYSTEM, CPU) if os.path.isdir(p)}
    places |= {path for name in ETC if os.path.exists(path := f"/etc/{name}")}
    inside = [path for path in places if covers(path, spec["hidden"])]
    if inside and not any(covers(p, spec["hidden"]) for p in python_places(spec)):
        places.add(spec["hidden"])
    shown: list[tuple[str, str]] = []
    for path in sorted(places, key=lambda path: (path.count("/"), path)):
        around = [other for other in shown if covers(other[0], path)]
        if path == spec["hidden"]:
            shown.append((path, ""))
        elif path in SYSTEM and os.path.islink(path):
            shown.append((path, f"-> {os.readlink(path)}"))
        elif not around or not around[-1][1]:  # else it is visible already
            shown.append((path, os.path.realpath(path)))
    return shown


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    system("mount", source, target, kind, flags, data)


def show(source: str, target: str) -> None:
    """Makes a file or folder visible at target, with what is mounted below it."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if not os.path.exists(target):
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(source, target, None, BIND | REC)


def room(path: str, n_bytes: int, mode: str) -> None:
    """A new folder in memory that holds at most n_bytes."""
    os.makedirs(path, exist_ok=True)
    options = f"size={n_bytes},nr_inodes=20000,mode={mode}"
    mount("tmpfs", path, "tmpfs", NOSUID | NODEV, options)


def make_read_only(but: set[str]) -> None:
    """Every mount becomes read-only, but those named."""
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        path = line.split()[4].encode().decode("unicode_escape").encode("latin-1")
        path = os.fsdecode(path)  # spaces are written as \040
        if path not in but:
            kept = os.statvfs(path).f_flag & (NOSUID | NODEV | NOEXEC)
            mount(None, path, None, REMOUNT | BIND | RDONLY | NOSUID | kept)


def copy_folder(source: str, spec: dict) -> None:
    """A copy of the caller's folder in memory, at its own path: the real one is out of reach."""
    folder, (user, group) = spec["folder"], spec["ids"]
    files = [os.path.join(at, name) for at, _, names in os.walk(source) for name in names]
    taken = sum(os.lstat(path).st_size + 8192 for path in files)  # pages are rounded up
    room(folder, taken + MAX_WRITTEN * spec["file_bytes"], "700")
    shutil.copytree(source, folder, symlinks=True, dirs_exist_ok=True)
    for at, folders, names in os.walk(folder):
        for name in (".", *folders, *names):
            os.chown(os.path.join(at, name), user, group, follow_symlinks=False)


def make_devices(old: str) -> None:
    """A /dev with the few that a program may need."""
    for name in DEVICES:
        show(f"{old}/dev/{name}", f"/dev/{name}")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"/dev/{name}")
    os.symlink("/proc/self/fd", "/dev/fd")
    os.symlink("/tmp", "/dev/shm")


def make_root(spec: dict) -> None:
    """A new root: an empty folder in memory, to which only what view() names is added."""
    shown, folder = view(spec), spec["folder"]
    mount(None, "/", None, REC | PRIVATE)
    mount("tmpfs", folder, "tmpfs", NOSUID | NODEV, "size=16m,mode=755")
    os.chdir(folder)
    os.mkdir("old")
    system("pivot_root", ".", "old")  # the new root no longer lies on folder, which is at /old
    os.chdir("/")
    os.mkdir("/proc")
    mount("proc", "/proc", "proc", NOSUID | NODEV | NOEXEC)
    room("/tmp", MAX_WRITTEN * spec["file_bytes"], "1777")  # first: Python may lie in it
    for path, source in shown:
        if source.startswith("-> "):
            os.symlink(source[3:], path)
        elif source:
            show(f"/old{source}", path)
        else:
            room(path, 1 << 20, "755")
    make_devices("/old")
    os.makedirs("/etc", exist_ok=True)
    user, group = spec["ids"]
    Path("/etc/passwd").write_text(
        f"student:x:{user}:{group}::{folder}:/bin/sh\n", encoding="utf-8"
    )
    copy_folder(f"/old{folder}", spec)
    system("umount2", "/old", DETACH)
    os.rmdir("/old")
    make_read_only({"/proc", "/tmp", folder})


def new_user_namespace(spec: dict) -> None:
    """Enters user and pid namespaces; the second is for the children only.

    A child that stays outside writes which users there are inside, as only it may.
    """
    launcher, (user, group) = os.getpid(), spec["ids"]
    ready, go = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(go)
        os.read(ready, 1)
        with suppress(OSError):
            at = Path(f"/proc/{launcher}")
            if os.getuid():
                (at / "setgroups").write_text("deny", encoding="utf-8")
            both = "" if os.getuid() else "0 0 1\n"  # root, to read what only root may
            (at / "uid_map").write_text(f"{both}{user} {user} 1\n", encoding="utf-8")
            (at / "gid_map").write_text(f"{both}{group} {group} 1\n", encoding="utf-8")
            os._exit(0)
        os._exit(1)
    try:
        system("unshare", NEWUSER | NEWPID)
    finally:
        os.close(go)
        os.close(ready)
        _, status = os.waitpid(helper, 0)
    if status:
        raise OSError("this system does not let a user namespace have the users it needs")


def enter_box(spec: dict) -> None:
    """The keeper, pid 1 of its namespace, builds the worker's view of the system."""
    prctl(PDEATHSIG, signal.SIGKILL)
    system("unshare", NEWNS | NEWNET | NEWIPC | NEWUTS)
    os.umask(0o022)
    make_root(spec)
    for name, value in (("user/max_user_namespaces", "0"), ("kernel/shmall", "0")):
        with suppress(OSError):  # not every kernel lets a namespace decide
            Path(f"/proc/sys/{name}").write_text(value, encoding="utf-8")


# The worker


def tasks_of(user: int) -> int:
    """How many processes and threads the user has already: the system's limit counts them too."""
    if sys.platform != "linux":
        return sum(row[1] == str(user) for row in ps("uid"))
    n = 0
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            if os.stat(f"/proc/{pid}").st_uid == user:
                n += len(os.listdir(f"/proc/{pid}/task"))
    return n


def counted_inside() -> bool:
    """Whether the kernel counts a user's processes for each user namespace apart."""
    release = os.uname().release.split(".")
    return (int(release[0]), int(release[1])) >= (5, 14)


def set_limits(spec: dict) -> None:
    """Limits that the worker and its children can only lower."""
    apart = spec["level"] == "namespaces" and counted_inside()
    n_before = 1 if apart else tasks_of(spec["ids"][0])
    limits = {
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_CPU: (spec["cpu_s"], spec["cpu_s"] + 1),  # a signal, then death
        resource.RLIMIT_FSIZE: (spec["file_bytes"],) * 2,
        resource.RLIMIT_NOFILE: (256, 256),
        resource.RLIMIT_NPROC: (spec["n_processes"] + n_before,) * 2,
        resource.RLIMIT_AS: (spec["memory_bytes"],) * 2,
    }
    for name, (soft, hard) in limits.items():
        _, most = resource.getrlimit(name)
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        try:
            resource.setrlimit(name, (soft, hard))
        except (OSError, ValueError):
            if sys.platform == "linux":  # macOS refuses a limit on memory
                raise


def drop_privileges(spec: dict) -> None:
    """No capability is left, none can come back, and the user is the one of the box."""
    for capability in range(64):
        prctl(CAPBSET_DROP, capability)
    user, group = spec["ids"]
    if os.getuid() != user:
        os.setgroups([])
        os.setresgid(group, group, group)
        os.setresuid(user, user, user)
    if sys.platform == "linux" and spec["level"] != "bubblewrap":
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
        if ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) < 0:
            raise OSError("the capabilities could not be given up")
    if spec["level"] != "bubblewrap":  # it may be a program that needs its own privileges
        prctl(NO_NEW_PRIVS, 1)


def bubblewrap(spec: dict) -> list[str]:
    """The command that shows the same view by means of bwrap."""
    command = [spec["bwrap"], "--unshare-all", "--die-with-parent", "--new-session"]
    command += ["--cap-drop", "ALL", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    shown, folder = view(spec), spec["folder"]
    for path, source in shown:
        if source.startswith("-> "):
            command += ["--symlink", source[3:], path]
        else:
            command += ["--ro-bind", source, path] if source else ["--tmpfs", path]
    command += ["--bind", folder, folder, "--chdir", folder]
    for path in ("/", "/dev", *(path for path, source in shown if not source)):
        command += ["--remount-ro", path]
    return [*command, "--", spec["exe"]]


def become_script(spec: dict) -> None:
    """Ends as the script: what comes after is the untrusted program."""
    if sys.platform == "linux":  # elsewhere the group is how the launcher finds it again
        os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    set_limits(spec)
    drop_privileges(spec)
    os.chdir(spec["folder"])
    exe, argv = spec["exe"], [spec["exe"], *spec["args"]]
    if spec["level"] == "bubblewrap":
        argv = [*bubblewrap(spec), *spec["args"]]
        exe = argv[0]
    elif not os.path.exists(exe):  # its links lead through folders that the box does not have
        exe = spec["real_exe"]
    os.execve(exe, argv, spec["env"])


# Waiting


class Bell:
    """Something to select() on that rings when a child ends."""

    def __init__(self) -> None:
        self.end, write = os.pipe()
        os.set_blocking(self.end, False)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def wait(self, also: tuple[int, ...], seconds: float | None) -> bool:
        """Waits for a child, for one of the other files, or some seconds: is it another file?"""
        ready, _, _ = select.select((self.end, *also), (), (), seconds)
        with suppress(BlockingIOError):
            while os.read(self.end, 512):
                pass
        return any(fd in ready for fd in also)


def reap(pid: int) -> tuple[int, float] | None:
    """Takes note of the children that ended; of pid, returns the status and the CPU seconds."""
    with suppress(ChildProcessError):
        while True:
            ended, status, usage = os.wait4(-1, os.WNOHANG)
            if ended == pid:
                return status, usage.ru_utime + usage.ru_stime
            if ended == 0:
                break
    return None


def say(spec: dict, **words: str | int) -> None:
    """Sends the grader one line."""
    os.write(spec["report"], json.dumps(words).encode() + b"\n")


def how_it_ended(status: int, cpu_seconds: float, spec: dict) -> dict:
    """The report about a worker that ended by itself or by a limit of the system."""
    code = os.waitstatus_to_exitcode(status)
    if spec["level"] == "bubblewrap" and code > 128:  # as bwrap, like a shell, says it
        code = 128 - code
    if code >= 0:
        return {"ended": "exit", "code": code}
    # SIGXCPU comes at the limit; who ignores it is killed a second later.
    killed_late = code == -signal.SIGKILL and cpu_seconds >= spec["cpu_s"]
    cpu = code == -signal.SIGXCPU or killed_late
    return {"ended": "cpu" if cpu else "signal", "code": code}


def keep(spec: dict) -> None:
    """The keeper: starts the worker, waits until it ends or takes too much memory, reports."""
    bell, launcher = Bell(), os.getppid()
    worker = os.fork()
    if worker == 0:
        run_or_say(become_script, spec)
    while os.getppid() == launcher:  # else the launcher was killed
        bell.wait((), TICK)
        if ended := reap(worker):
            say(spec, **how_it_ended(*ended, spec))
            break
        if too_much_memory(spec["memory_bytes"]):
            say(spec, ended="memory", code=-signal.SIGKILL)
            break
    if os.getpid() != 1:
        kill_below(os.getpid())
    os._exit(0)


def run_or_say(step: Callable[[dict], None], spec: dict) -> None:
    """Runs a step that ends this process; if it fails, the grader is told why."""
    try:
        step(spec)
    except BaseException as error:
        say(spec, error=f"{type(error).__name__}: {error}")
    os._exit(1)


def start_keeper(spec: dict) -> None:
    if spec["level"] == "namespaces":
        enter_box(spec)
    prctl(SUBREAPER, 1)
    keep(spec)


def launch(spec: dict) -> None:
    """The launcher: whatever happens to the keeper, nothing of it is left in the end."""
    os.set_inheritable(spec["report"], False)
    with suppress(OSError):
        # First to go when memory runs out.
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    prctl(SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # pid 1 is then deaf to it
    if spec["level"] == "namespaces":
        new_user_namespace(spec)
    prctl(DUMPABLE, 0)  # the worker may not look into the launcher and the keeper
    bell = Bell()
    keeper = os.fork()
    if keeper == 0:
        run_or_say(start_keeper, spec)
    while reap(keeper) is None:
        if bell.wait((0,), None):  # the grader closed its end, or is gone
            os.kill(keeper, signal.SIGKILL)
            break
    kill_below(os.getpid())
    os._exit(0)


def launch_on_windows(spec: dict) -> None:
    """A job object holds the launcher and all it starts; who closes it, kills them.

    This process has its only handle, so that its end, however it comes, is the end of all.
    """
    import struct
    import subprocess
    import threading

    kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    kernel.CreateJobObjectW.restype = kernel.GetCurrentProcess.restype = ctypes.c_void_p
    job = ctypes.c_void_p(kernel.CreateJobObjectW(None, None))
    flags = 0x8 | 0x200 | 0x2000  # number of processes, memory of all, kill on close
    n_most, most = spec["n_processes"] + 4, spec["memory_bytes"]
    # JOBOBJECT_EXTENDED_LIMIT_INFORMATION, which is number 9
    limits = struct.pack("qqINNIPII6Q4N", 0, 0, flags, 0, 0, n_most, *[0] * 10, most, 0, 0)
    here = ctypes.c_void_p(kernel.GetCurrentProcess())
    if not kernel.SetInformationJobObject(job, 9, limits, len(limits)):
        raise ctypes.WinError(ctypes.get_last_error())
    if not kernel.AssignProcessToJobObject(job, here):
        raise ctypes.WinError(ctypes.get_last_error())

    def wait_for_grader() -> None:
        os.read(0, 1)
        os._exit(1)

    command, nothing = [spec["exe"], *spec["args"]], subprocess.DEVNULL
    worker = subprocess.Popen(command, stdin=nothing, cwd=spec["folder"], env=spec["env"])
    threading.Thread(target=wait_for_grader, daemon=True).start()
    kernel.ExitProcess(ctypes.c_uint(worker.wait()))


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    if os.name == "posix":
        run_or_say(launch, task)
    launch_on_windows(task)
