"""Which file comes from which, what may differ, and how to run each file small.

Held by test_lineage.py.
"""

import dataclasses
from collections.abc import Callable
from types import ModuleType

import torch


@dataclasses.dataclass(frozen=True)
class Kin:
    """What may differ from another file."""

    changed: frozenset[str]  # names that both have and whose text differs; methods as Class.method
    budget: int  # lines of the whole diff, - and + together


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file of the lineage: what it comes from, and how to run it small."""

    kin: dict[str, Kin]  # by file: first the parent, then others that it is compared with, too
    small: Callable[[ModuleType], list]  # Configs that turn every part on; all axes unequal
    sizes: dict[str, int]  # axis letters with one size in all functions (`rope` has H and J as H)

    @property
    def parent(self) -> str | None:
        return next(iter(self.kin), None)


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


GPT2, ROPE, GQA = "ch01_gpt2/gpt2.py", "ch02_rope/rope.py", "ch03_gqa/gqa.py"
MLA, SWIGLU = "ch04_mla/mla.py", "ch05_swiglu_rmsnorm/swiglu_rmsnorm.py"
MOE, NORMS = "ch06_moe/moe.py", "ch07_norm_placement/norm_placement.py"
LLAMA3, GEMMA3 = "ch08_full_models/llama3.py", "ch08_full_models/gemma3.py"
QWEN3, MIXTRAL = "ch08_full_models/qwen3.py", "ch08_full_models/mixtral.py"
OLMO2, SMOLLM3 = "ch08_full_models/olmo2.py", "ch08_full_models/smollm3.py"
LLAMA4, DEEPSEEK = "ch08_full_models/llama4.py", "ch08_full_models/deepseek_v3.py"
SMALL = dict(vocab_size=50, n_layers=2, d_model=26, d_ff=34)


def small_mla(module: ModuleType) -> list:
    latent = module.Config(
        **SMALL,
        n_heads=8,
        n_kv_heads=2,
        head_dim=10,
        windows=(6, None),
        d_latent=18,
        d_q_latent=22,
        d_rope=4,
        d_value=12,
    )
    if hasattr(latent, "n_experts"):
        latent = dataclasses.replace(latent, n_experts=5, n_active=3, n_shared=2, d_expert=14)
    straight = dataclasses.replace(latent, d_q_latent=None)
    grouped = dataclasses.replace(latent, d_latent=None)
    return [latent, straight, grouped]


def small_llama3(module: ModuleType) -> list:
    return [
        module.Config(
            vocab_size=50,
            max_seq_len=40,
            n_layers=2,
            d_model=26,
            n_heads=8,
            n_kv_heads=2,
            head_dim=10,
            windows=(6, None),
            d_ff=34,
            qkv_bias=True,
            rope_scaling=module.RopeScaling(8.0, 1.0, 4.0, 32),
            tied=False,
        )
    ]


def small_gemma3(module: ModuleType) -> list:
    gemma_3 = module.Config(
        vocab_size=50,
        max_seq_len=40,
        n_layers=2,
        d_model=26,
        n_heads=8,
        n_kv_heads=2,
        head_dim=10,
        windows=(6, None),
        d_ff=34,
        rope_factor=8.0,
    )
    return [gemma_3, dataclasses.replace(gemma_3, qk_norm=False, attn_cap=50.0, logit_cap=30.0)]


def small_norms(module: ModuleType) -> list:
    placed = zip(small_mla(module), ("in", "out", "both"), strict=True)
    grouped = [dataclasses.replace(cfg, norm_at=place) for cfg, place in placed]
    return [*grouped, dataclasses.replace(grouped[-1], qk_norm="full")]


def small_qwen3(module: ModuleType) -> list:
    experts = module.Config(
        vocab_size=50,
        max_seq_len=40,
        n_layers=2,
        d_model=26,
        n_heads=8,
        n_kv_heads=2,
        head_dim=10,
        windows=(6, None),
        d_ff=34,
        sparse=(False, True),
        n_experts=5,
        n_active=3,
        d_expert=14,
        renormalise=True,
        rope_scaling=module.RopeScaling(4.0, 16, 1.14),
    )
    qwen2 = dict(d_shared=18, renormalise=False, qkv_bias=True, qk_norm=False, tied=False)
    return [experts, dataclasses.replace(experts, **qwen2)]


def small_mixtral(module: ModuleType) -> list:
    return [
        module.Config(
            vocab_size=50,
            max_seq_len=40,
            n_layers=2,
            d_model=26,
            n_heads=8,
            n_kv_heads=2,
            head_dim=10,
            windows=(6, None),
            n_experts=5,
            n_active=3,
            d_expert=14,
        )
    ]


def small_olmo2(module: ModuleType) -> list:
    return [
        module.Config(
            vocab_size=50,
            max_seq_len=40,
            n_layers=2,
            d_model=26,
            n_heads=8,
            n_kv_heads=2,
            head_dim=10,
            d_ff=34,
        )
    ]


def small_smollm3(module: ModuleType) -> list:
    tied = module.Config(
        vocab_size=50,
        max_seq_len=40,
        n_layers=2,
        d_model=26,
        n_heads=8,
        n_kv_heads=2,
        head_dim=10,
        windows=(6, None),
        turns=(True, False),
        d_ff=34,
    )
    return [tied, dataclasses.replace(tied, tied=False)]


def small_llama4(module: ModuleType) -> list:
    scout = module.Config(
        vocab_size=50,
        max_seq_len=40,
        n_layers=2,
        d_model=26,
        n_heads=8,
        n_kv_heads=2,
        head_dim=10,
        chunks=(6, None),
        growth_len=3,
        sparse=(False, True),
        n_experts=7,
        n_active=3,
        d_expert=14,
        d_ff=34,
        rope_scaling=module.RopeScaling(8.0, 1.0, 4.0, 32),
    )
    return [scout, dataclasses.replace(scout, qk_norm=False, n_active=1)]


def small_deepseek_v3(module: ModuleType) -> list:
    latent = dict(n_heads=8, head_dim=10, d_latent=18, d_q_latent=22, d_rope=4, d_value=12)
    experts = dict(n_experts=15, n_active=4, n_shared=2, d_expert=14, n_groups=3, n_active_groups=2)
    v3 = module.Config(
        **SMALL,
        **latent,
        **experts,
        max_seq_len=40,
        router="sigmoid",
        route_scale=2.5,
        rope_scaling=module.RopeScaling(4.0, 2.0, 0.5, 16, gain=1.1, score_gain=1.3),
    )
    v2 = dataclasses.replace(v3, router="softmax", d_q_latent=None, rope_scaling=None, tied=True)
    model = module.Transformer(dataclasses.replace(v3, n_mtp=1))
    tokens_BT, cache = torch.randint(50, (3, 9)), model.new_cache(torch.tensor([0, 2, 5]))
    model.after_next(model.hidden(tokens_BT, cache), tokens_BT, cache)
    return [v3, v2, dataclasses.replace(v3, rope_interleave=False)]


LINEAGE = {
    GPT2: Entry(
        kin={},
        small=lambda module: [module.Config(**SMALL, max_seq_len=40, n_heads=4, head_dim=10)],
        sizes={"D": 26, "H": 4, "K": 10, "V": 50},
    ),
    ROPE: Entry(
        kin={
            GPT2: Kin(
                names(
                    """
                    Config Attention.forward Block.forward Transformer.__init__ Transformer.forward
                    main
                    """
                ),
                budget=210,
            )
        },
        small=lambda module: [module.Config(**SMALL, n_heads=4, head_dim=10)],
        sizes={"D": 26, "H": 4, "K": 10, "P": 5, "V": 50},
    ),
    GQA: Entry(
        kin={
            ROPE: Kin(
                names(
                    """
                    Config LayerCache LayerCache.__init__ LayerCache.append causal_mask attend
                    Attention Attention.__init__ Attention.forward Block.__init__
                    Transformer.__init__ Transformer.new_cache main
                    """
                ),
                budget=120,
            )
        },
        small=lambda module: [
            module.Config(**SMALL, n_heads=8, n_kv_heads=2, head_dim=10, windows=(6, None))
        ],
        sizes={"D": 26, "J": 2, "K": 10, "P": 5, "V": 50},
    ),
    MLA: Entry(
        kin={
            GQA: Kin(
                names(
                    """
                    Config attend Block.__init__ Transformer.forward main
                    """
                ),
                budget=140,
            )
        },
        small=small_mla,
        sizes={"D": 26, "V": 50},
    ),
    SWIGLU: Entry(
        kin={
            MLA: Kin(
                names(
                    """
                    Config LatentAttention.__init__ MLP MLP.__init__ MLP.forward Block.__init__
                    Transformer.__init__ main
                    """
                ),
                budget=70,
            )
        },
        small=small_mla,
        sizes={"D": 26, "V": 50},
    ),
    MOE: Entry(
        kin={
            SWIGLU: Kin(
                names(
                    """
                    Config Block.__init__ main
                    """
                ),
                budget=70,
            )
        },
        small=small_mla,
        sizes={"D": 26, "V": 50},
    ),
    NORMS: Entry(
        kin={
            MOE: Kin(
                names(
                    """
                    Config Attention.__init__ Attention.forward Block Block.__init__ Block.forward
                    main
                    """
                ),
                budget=80,
            )
        },
        small=small_norms,
        sizes={"D": 26, "V": 50},
    ),
    LLAMA3: Entry(
        kin={
            NORMS: Kin(
                names(
                    """
                    Config LayerCache LayerCache.__init__ LayerCache.append LayerCache.n_bytes
                    rope_frequencies attend Attention.__init__ Attention.forward MLP.__init__ Block
                    Block.__init__ Block.forward Transformer Transformer.__init__
                    Transformer.forward main
                    """
                ),
                budget=510,
            )
        },
        small=small_llama3,
        sizes={"D": 26, "J": 2, "K": 10, "P": 5, "V": 50},
    ),
    GEMMA3: Entry(
        kin={
            NORMS: Kin(
                names(
                    """
                    Config LayerCache LayerCache.__init__ LayerCache.append LayerCache.n_bytes
                    rope_frequencies attend Attention.__init__ Attention.forward MLP MLP.__init__
                    MLP.forward RMSNorm RMSNorm.__init__ RMSNorm.forward Block Block.__init__
                    Transformer.forward main
                    """
                ),
                budget=560,
            ),
            LLAMA3: Kin(
                names(
                    """
                    Config rope_frequencies Attention.__init__ Attention.forward MLP MLP.forward
                    RMSNorm RMSNorm.__init__ RMSNorm.forward Block Block.__init__ Block.forward
                    Transformer Transformer.__init__ Transformer.forward
                    HF_NAMES rope_config config_from_hf convert load_weights
                    """
                ),
                budget=280,
            ),
        },
        small=small_gemma3,
        sizes={"D": 26, "J": 2, "G": 4, "K": 10, "P": 5, "V": 50},
    ),
    QWEN3: Entry(
        kin={
            NORMS: Kin(
                names(
                    """
                    Config LayerCache LayerCache.__init__ LayerCache.append LayerCache.n_bytes
                    rope_frequencies attend Attention.__init__ Attention.forward MLP.__init__ MoE
                    MoE.__init__ MoE.route Block Block.__init__ Block.forward Transformer
                    Transformer.__init__ Transformer.forward main
                    """
                ),
                budget=590,
            ),
            LLAMA3: Kin(
                names(
                    """
                    RopeScaling Config rope_frequencies Attention.__init__ Attention.forward Block
                    Block.__init__ Transformer.forward HF_NAMES config_from_hf convert main
                    """
                ),
                budget=270,
            ),
        },
        small=small_qwen3,
        sizes={"D": 26, "J": 2, "K": 10, "P": 5, "V": 50, "I": 5, "A": 3},
    ),
    MIXTRAL: Entry(
        kin={
            NORMS: Kin(
                names(
                    """
                    Config LayerCache LayerCache.__init__ LayerCache.append LayerCache.n_bytes
                    attend Attention.__init__ Attention.forward MLP.__init__ MoE MoE.__init__
                    MoE.route MoE.forward Block Block.__init__ Block.forward Transformer
                    Transformer.__init__ Transformer.forward main
                    """
                ),
                budget=480,
            ),
            LLAMA3: Kin(
                names(
                    """
                    Config rope_frequencies Attention.__init__ Block Block.__init__
                    Transformer.__init__ Transformer.forward HF_NAMES rope_config config_from_hf
                    convert load_weights main
                    """
                ),
                budget=230,
            ),
        },
        small=small_mixtral,
        sizes={"D": 26, "J": 2, "K": 10, "P": 5, "V": 50, "I": 5, "A": 3},
    ),
    OLMO2: Entry(
        kin={
            NORMS: Kin(
                names(
                    """
                    Config LayerCache LayerCache.__init__ LayerCache.append LayerCache.n_bytes
                    attend Attention Attention.__init__ Attention.forward MLP.__init__ RMSNorm
                    RMSNorm.forward Block Block.__init__ Block.forward Transformer
                    Transformer.__init__ Transformer.new_cache Transformer.forward main
                    """
                ),
                budget=485,
            ),
            LLAMA3: Kin(
                names(
                    """
                    Config rope_frequencies Attention Attention.__init__ Attention.forward RMSNorm
                    RMSNorm.forward Block Block.__init__ Block.forward Transformer.__init__
                    Transformer.new_cache Transformer.forward
                    HF_NAMES config_from_hf convert load_weights main
                    """
                ),
                budget=185,
            ),
        },
        small=small_olmo2,
        sizes={"D": 26, "J": 2, "K": 10, "P": 5, "V": 50},
    ),
    SMOLLM3: Entry(
        kin={
            NORMS: Kin(
                names(
                    """
                    Config LayerCache LayerCache.__init__ LayerCache.append LayerCache.n_bytes
                    attend Attention.__init__ Attention.forward MLP.__init__ Block Block.__init__
                    Block.forward Transformer Transformer.__init__ Transformer.forward main
                    """
                ),
                budget=485,
            ),
            LLAMA3: Kin(
                names(
                    """
                    Config rope_frequencies Attention.__init__ Attention.forward Block.__init__
                    Transformer.forward HF_NAMES rope_config config_from_hf convert main
                    """
                ),
                budget=155,
            ),
        },
        small=small_smollm3,
        sizes={"D": 26, "J": 2, "K": 10, "P": 5, "V": 50},
    ),
    LLAMA4: Entry(
        kin={
            NORMS: Kin(
                names(
                    """
                    Config LayerCache LayerCache.__init__ LayerCache.append LayerCache.n_bytes
                    causal_mask rope_frequencies rope attend Attention Attention.__init__
                    Attention.forward MLP.__init__ MoE MoE.__init__ MoE.route MoE.forward Block
                    Block.__init__ Block.forward Transformer Transformer.__init__
                    Transformer.new_cache Transformer.forward main
                    """
                ),
                budget=620,
            ),
            LLAMA3: Kin(
                names(
                    """
                    Config LayerCache LayerCache.append causal_mask rope Attention
                    Attention.__init__ Attention.forward Block.__init__ Transformer.__init__
                    Transformer.new_cache Transformer.forward
                    HF_NAMES rope_config config_from_hf convert load_weights main
                    """
                ),
                budget=300,
            ),
        },
        small=small_llama4,
        sizes={"D": 26, "J": 2, "K": 10, "P": 5, "I": 7, "V": 50},
    ),
    DEEPSEEK: Entry(
        kin={
            NORMS: Kin(
                names(
                    """
                    Config Config.__post_init__ LayerCache LayerCache.__init__ LayerCache.append
                    LayerCache.n_bytes rope_frequencies attend LatentAttention.__init__
                    LatentAttention.forward LatentAttention.expanded LatentAttention.absorbed
                    MLP.__init__ MoE MoE.__init__ MoE.route Block Block.__init__ Block.forward
                    Transformer Transformer.__init__ Transformer.new_cache Transformer.forward main
                    """
                ),
                budget=820,
            ),
            LLAMA3: Kin(
                names(
                    """
                    RopeScaling Config rope_frequencies attend Block Block.__init__
                    Transformer.__init__ Transformer.new_cache Transformer.forward HF_NAMES
                    config_from_hf convert load_weights load_folder main
                    """
                ),
                budget=720,
            ),
        },
        small=small_deepseek_v3,
        sizes={"D": 26, "V": 50},
    ),
}
