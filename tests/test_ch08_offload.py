"""Models larger than the memory they may take: the same logits, and no more bytes than allowed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    Llama4TextConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from ch08_full_models import offload
from ch08_full_models.checkpoint import CheckpointError, family_of, load
from ch08_full_models.decode import plain_decode
from ch08_full_models.experts import plain_experts
from tests.parity import reference

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
)
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, num_experts=12, num_experts_per_tok=3, moe_intermediate_size=40
    ),
    "deepseek_v2": DeepseekV2Config(
        **SIZES | dict(num_key_value_heads=4, head_dim=8),
        n_routed_experts=12,
        num_experts_per_tok=3,
        moe_intermediate_size=40,
        n_shared_experts=2,
        first_k_dense_replace=1,
        kv_lora_rank=24,
        q_lora_rank=None,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
    ),
    "llama4_text": Llama4TextConfig(  # all experts of a layer in one tensor, transposed
        **SIZES,
        num_local_experts=12,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        intermediate_size_mlp=80,
        attention_chunk_size=16,
    ),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
}
TOKENS_BT = torch.arange(60).view(2, 30) % 97


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each kind, as transformers saves it."""
    path = tmp_path_factory.mktemp(request.param)
    reference(CONFIGS[request.param]).save_pretrained(path)
    return path


def parts_of(model: nn.Module) -> list[nn.Module]:
    """What of a model may wait on disk."""
    experts = [m.experts for m in model.modules() if hasattr(m, "experts")]
    return [part for layer in experts for part in layer] or list(model.blocks)


def tight(model: nn.Module, n_parts: int) -> int:
    """Memory for all that must stay, and n_parts of what need not."""
    parts = parts_of(model)
    rest = offload.n_bytes(model) - sum(map(offload.n_bytes, parts))
    return rest + n_parts * offload.n_bytes(parts[0])


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of the whole text, then of its tokens one by one from the cache, (B, 2T, V)."""
    cache = model.new_cache()
    one_by_one = [model(token_B1, cache) for token_B1 in TOKENS_BT.split(1, dim=1)]
    return torch.cat([model(TOKENS_BT), *one_by_one], dim=1)


def in_memory(folder: Path, dtype: str) -> nn.Module:
    """The whole model; a model on disk goes without what load does for a CPU."""
    model, _ = load(folder, dtype=dtype, device="cpu")
    return plain_experts(plain_decode(model))


def test_the_same_logits(folder: Path) -> None:
    """Guards the result: reading a part when it is called changes no bit of the logits."""
    whole = in_memory(folder, "float32")
    small, _ = load(folder, dtype="float32", device="cpu", memory=tight(whole, 3))
    assert torch.equal(logits(small), logits(whole))
    assert small.disk.n_reads > 10
    ours = [list(family_of(m).generate(m, TOKENS_BT[:, :9], 8)) for m in (whole, small)]
    assert torch.equal(*(torch.cat(tokens, dim=1) for tokens in ours))


def test_no_more_memory_than_allowed(folder: Path) -> None:
    """Guards the budget, at each call of a part; a part that is not called has no memory."""
    whole = in_memory(folder, "float32")
    memory = tight(whole, 3)
    small, _ = load(folder, dtype="float32", device="cpu", memory=memory)
    parts = [part for part in parts_of(small) if part in small.disk.places]
    stays = sum(p.nbytes for p in small.parameters() if p.device.type != "meta")
    seen = []

    def look(part: nn.Module, *_: object) -> None:
        filled = [p for p in parts if any(w.device.type != "meta" for w in p.parameters())]
        assert filled == [part]
        seen.append(stays + small.disk.n_bytes())

    for part in parts:
        part.register_forward_pre_hook(look)
    logits(small)
    assert len(seen) == small.disk.n_calls > 50
    assert max(seen) <= memory
    assert all(w.device.type == "meta" for part in parts for w in part.parameters())


@pytest.mark.parametrize("folder", [k for k in CONFIGS if k != "llama"], indirect=True)
def test_what_was_used_last_is_not_read_again(folder: Path) -> None:
    """Guards the cache of parts: with room for all but one, the same token reads little twice."""
    whole = in_memory(folder, "float32")
    small, _ = load(
        folder, dtype="float32", device="cpu", memory=tight(whole, len(parts_of(whole)) - 1)
    )
    with torch.no_grad():
        small(TOKENS_BT[:1, :1])
        first = small.disk.n_reads
        small(TOKENS_BT[:1, :1])
    assert 0 < first == small.disk.n_reads
    assert small.disk.n_calls == 2 * first


@pytest.mark.parametrize("folder", [k for k in CONFIGS if k != "llama"], indirect=True)
def test_each_layer_keeps_its_share(folder: Path) -> None:
    """Guards against keeping just what the next layers do not need: less room than one token's
    experts take all together, and still some of them are there when it comes again."""
    whole = in_memory(folder, "float32")
    layers = [m for m in whole.modules() if hasattr(m, "experts")]
    n_called = sum(layer.n_active for layer in layers)
    n_room = max(n_called - 1, layers[0].n_active + 1 if layers[0].n_active > 1 else 1)
    small, _ = load(folder, dtype="float32", device="cpu", memory=tight(whole, n_room))
    with torch.no_grad():
        small(TOKENS_BT[:1, :1])
        first = small.disk.n_reads
        small(TOKENS_BT[:1, :1])
    assert first == n_called
    assert small.disk.n_reads - first <= len(layers)  # with the oldest thrown out: n_called again


def test_chosen_experts_are_read_ahead(folder: Path) -> None:
    """Guards prefetching: a part is on its way before it is called."""
    whole = in_memory(folder, "float32")
    small, _ = load(folder, dtype="float32", device="cpu", memory=tight(whole, 3))
    on_their_way = []
    for part in small.disk.places:  # runs first
        part.register_forward_pre_hook(
            lambda part, _: on_their_way.append(part in small.disk.held), prepend=True
        )
    with torch.no_grad():
        small(TOKENS_BT[:1, :1])
        small(TOKENS_BT[:1, 1:2])
    n_first = 0 if any(hasattr(m, "experts") for m in whole.modules()) else 1
    assert on_their_way.count(False) == n_first  # the first layer of all has nobody to announce it


def test_all_that_fits_stays(folder: Path) -> None:
    """Guards the ordinary case: with memory enough, nothing waits on disk."""
    whole = in_memory(folder, "float32")
    model, _ = load(folder, dtype="float32", device="cpu", memory=offload.n_bytes(whole))
    assert model.disk is None
    assert torch.equal(logits(plain_experts(model)), logits(whole))


def test_too_little_memory(folder: Path) -> None:
    """Guards the message: one line with what was given and what is needed, which then is enough."""
    with pytest.raises(CheckpointError, match=r"memory is 1,000 bytes, expected [\d,]+ or") as err:
        load(folder, dtype="float32", device="cpu", memory=1000)
    needed = int(str(err.value).split("expected ")[1].split(" ")[0].replace(",", ""))
    with pytest.raises(CheckpointError, match="memory is"):
        load(folder, dtype="float32", device="cpu", memory=needed - 1)
    model, _ = load(folder, dtype="float32", device="cpu", memory=needed)
    assert model.disk is not None
    with torch.no_grad():
        assert model(TOKENS_BT).isfinite().all()


def test_half_precision(folder: Path) -> None:
    """Guards conversion on the way: bfloat16 from a float32 file, read late or early, is equal."""
    whole = in_memory(folder, "bfloat16")
    small, _ = load(folder, dtype="bfloat16", device="cpu", memory=tight(whole, 3))
    assert torch.equal(logits(small), logits(whole))


def test_quantizing_needs_all_weights(folder: Path) -> None:
    """Guards against a mixture that would quantize what it has and forget the rest."""
    whole = in_memory(folder, "float32")
    with pytest.raises(CheckpointError, match="quantize"):
        load(folder, device="cpu", quantize="int8", memory=tight(whole, 3))


def test_a_file_that_is_gone(folder: Path) -> None:
    """Guards a long run: a checkpoint deleted meanwhile is one line that names the file."""
    whole = in_memory(folder, "float32")
    small, _ = load(folder, dtype="float32", device="cpu", memory=tight(whole, 3))
    file = folder / "model.safetensors"
    file.rename(folder / "gone")
    try:
        with torch.no_grad(), pytest.raises(CheckpointError, match="model.safetensors: cannot be"):
            small(TOKENS_BT)
    finally:
        (folder / "gone").rename(file)
    with torch.no_grad():
        assert torch.equal(small(TOKENS_BT), whole(TOKENS_BT))  # it goes on once the file is back
