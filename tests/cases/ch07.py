"""Inputs for chapter 7's exercises."""

import sys

import torch


def file_of(m):
    """The chapter's own file, from which m has its Config."""
    return sys.modules[m.Config.__module__]


def shake(module, seed):
    """Draws every parameter: matrices that keep a vector's size, norms and biases around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, param in sorted(module.named_parameters()):
            if param.ndim == 1:
                param.copy_(0.3 + 1.4 * torch.rand(param.shape, generator=generator))
            else:
                fresh = torch.randn(param.shape, generator=generator)
                param.copy_(1.5 * fresh * param.shape[1] ** -0.5)
    return module.eval()


def sizes(rng, **more):
    """A small config with grouped attention and no experts; all its widths differ."""
    J, G, P = rng.sizes(3, 2, 4)
    D, d_ff = rng.sizes(2, 25, 35)
    small = dict(vocab_size=19, n_layers=1, d_model=D, n_heads=J * G, n_kv_heads=J, head_dim=2 * P)
    return small | dict(d_latent=None, d_ff=d_ff, n_experts=0, norm_eps=0.05, qk_norm=None) | more


def through(m, part, x_BTD, chunks, head_dim, window):
    """What attention or a block makes of a text that is read in chunks, joined."""
    home = file_of(m)
    cache, n_seen, found = home.LayerCache(window), 0, []
    freq_P = home.rope_frequencies(head_dim, 100.0)
    for new_BTD in [x_BTD] if chunks is None else x_BTD.split(chunks, dim=1):
        B, T = new_BTD.shape[:2]
        pos_BT = (n_seen + torch.arange(T)).expand(B, T)
        found.append(part(new_BTD, pos_BT, home.rope_angles(pos_BT, freq_P), cache))
        n_seen += T
    return found[0] if chunks is None else torch.cat(found, dim=1)


def what_halves_read(block):
    """A dictionary in which each call of attention and of the MLP leaves what it was given."""
    found = {}

    def keep(name, args, kwargs):
        found[name] = next(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))

    for half, words in (("attn", "attention"), ("mlp", "mlp")):
        block.get_submodule(half).register_forward_pre_hook(
            lambda _, *given, name=f"what_{words}_reads_BTD": keep(name, *given), with_kwargs=True
        )
    return found


def stream(rng, D):
    """A stream (B, T, D) that is not of size one."""
    B, T = rng.sizes(2, 2, 8)
    return rng.choice([0.6, 1.7]) * rng.randn(B, T, D)


class soft_cap:
    def inputs(rng, size, n=2):
        return {"x_BTD": size * rng.randn(*rng.sizes(3, 2, 6)), "cap": rng.choice([3.0, 5.0, 8.0])}

    def values(rng):
        return [soft_cap.inputs(rng, size) for size in (4.0, 20.0)]

    def slope(rng):
        return [soft_cap.inputs(rng, size) for size in (3.0, 10.0)]

    def infinite(rng):
        case = soft_cap.inputs(rng, 5.0)
        case["x_BTD"][0, 0, 0], case["x_BTD"][1, 1, 1] = torch.inf, -torch.inf
        return [case, case | {"x_BTD": case["x_BTD"].bfloat16()}]

    def run(m, x_BTD, cap):
        return {"y_BTD": m.soft_cap(x_BTD, cap)}

    def run_slope(m, x_BTD, cap):
        with torch.enable_grad():
            leaf_BTD = x_BTD.clone().requires_grad_()
            y_BTD = m.soft_cap(leaf_BTD, cap)
            if not y_BTD.requires_grad:
                return {"slope_BTD": None}
            y_BTD.sum().backward()
        return {"slope_BTD": leaf_BTD.grad}


class norm_parameters:
    def inputs(rng, **more):
        n_layers, J, G, K, D = rng.sizes(5, 3, 20)
        model = dict(n_layers=n_layers, d_model=16 * D, n_heads=J * G, n_kv_heads=J, head_dim=2 * K)
        return {"sizes": model | dict(d_latent=None) | more}

    def grouped(rng):
        return [
            norm_parameters.inputs(rng, norm_at=norm_at, qk_norm=qk_norm)
            for norm_at in ("in", "out", "both")
            for qk_norm in (None, "head", "full")
        ]

    def latent(rng):
        C, Q = rng.sizes(2, 20, 60)
        return [
            norm_parameters.inputs(
                rng, norm_at=norm_at, qk_norm=qk_norm, d_latent=C, d_q_latent=d_q_latent
            )
            for norm_at, qk_norm, d_q_latent in (
                ("in", None, None), ("both", None, Q), ("out", "head", Q)
            )
        ]  # fmt: skip

    def run(m, sizes):
        words = [f"{key} {sizes[key]}" for key in ("norm_at", "qk_norm", "d_latent")]
        n = m.norm_parameters(m.Config(**sizes))
        return {", ".join(words): int(n) if n == int(n) else n}


class block_with_norms:
    def inputs(rng, norm_at, chunks=None, **more):
        cfg = sizes(rng, norm_at=norm_at, **more)
        x_BTD = stream(rng, cfg["d_model"])
        return {"sizes": cfg, "seed": rng.int(0, 10**6), "x_BTD": x_BTD, "chunks": chunks}

    def both(rng):
        return [block_with_norms.inputs(rng, "both", qk_norm=q) for q in (None, "head", None)]

    def only_in(rng):
        return [block_with_norms.inputs(rng, "in")]

    def only_out(rng):
        return [block_with_norms.inputs(rng, "out")]

    def chunks(rng):
        return [block_with_norms.inputs(rng, "both", chunks=n) for n in (1, 3)]

    def run(m, sizes, seed, x_BTD, chunks):
        block = shake(m.Block(m.Config(**sizes), 0), seed)
        read = what_halves_read(block)
        y_BTD = through(m, block, x_BTD, chunks, sizes["head_dim"], None)
        return read | {"y_BTD": y_BTD}


class qk_norm_attention:
    def inputs(rng, qk_norm, window=None, chunks=None, **more):
        cfg = sizes(rng, qk_norm=qk_norm, **more)
        x_BTD = stream(rng, cfg["d_model"])
        case = {"sizes": cfg, "window": window, "chunks": chunks}
        return case | {"seed": rng.int(0, 10**6), "x_BTD": x_BTD}

    def per_head(rng):
        return [
            qk_norm_attention.inputs(rng, "head"),
            qk_norm_attention.inputs(rng, "head", bias=True),
            qk_norm_attention.inputs(rng, "head", window=2),
        ]

    def full_width(rng):
        return [qk_norm_attention.inputs(rng, "full") for _ in range(2)]

    def no_norm(rng):
        return [qk_norm_attention.inputs(rng, None)]

    def chunks(rng):
        return [
            qk_norm_attention.inputs(rng, qk_norm, window, chunks)
            for qk_norm, window, chunks in (("head", None, 1), ("full", 3, 2))
        ]

    def run(m, sizes, window, seed, x_BTD, chunks):
        attn = shake(m.Attention(m.Config(**sizes), window), seed)
        shapes = {f"shape of {name}": list(p.shape) for name, p in sorted(attn.named_parameters())}
        return shapes | {"y_BTD": through(m, attn, x_BTD, chunks, sizes["head_dim"], window)}


class parallel_sandwich:
    def values(rng):
        return [block_with_norms.inputs(rng, "both", qk_norm=q) for q in (None, "head", None)]

    def one_norm(rng):
        return [block_with_norms.inputs(rng, "both")]

    def chunks(rng):
        return [block_with_norms.inputs(rng, "both", chunks=n) for n in (1, 3)]

    def block(m, sizes, seed):
        return shake(m.ParallelSandwich(m.Config(**sizes), 0), seed)

    def run(m, sizes, seed, x_BTD, chunks):
        block = parallel_sandwich.block(m, sizes, seed)
        read = what_halves_read(block)
        y_BTD = through(m, block, x_BTD, chunks, sizes["head_dim"], None)
        return read | {"y_BTD": y_BTD}

    def run_one_norm(m, sizes, seed, x_BTD, chunks):
        block, calls = parallel_sandwich.block(m, sizes, seed), []
        for name in ("attn_norm", "attn_out_norm", "mlp_out_norm"):
            getattr(block, name).register_forward_hook(lambda *_, name=name: calls.append(name))
        through(m, block, x_BTD, chunks, sizes["head_dim"], None)
        return {f"calls of {name}": calls.count(name) for name in sorted(set(calls))}


class score_bound:
    def small(rng, *shape):
        """Numbers between 0.2 and 1 of either sign."""
        return (0.2 + 0.8 * rng.rand(*shape)) * (2 * (rng.rand(*shape) < 0.5) - 1)

    def inputs(rng, J=1, G=1):
        P = rng.int(4, 7)
        q_JG2P, k_J2P = score_bound.small(rng, J, G, 2, P), score_bound.small(rng, J, 2, P)
        a, b, c, d = rng.permutation(P)[:4].tolist()
        j, side, sign = rng.int(0, J - 1), rng.int(0, 1), rng.choice([-1, 1])
        g, other = (
            rng.choice([g for g in range(G) if (i * G + g) % J != j] or [0])
            for i in (j, (j + 1) % J)
        )
        large = 2 + rng.rand(1).item()
        q_JG2P[j, g, side, a] = sign * large
        k_J2P[j, 1 - side, a] = -sign * 2
        q_JG2P[j, g, 0, b] = 3.5
        k_J2P[j, 0, c] = 3.5
        if J > 1:
            q_JG2P[(j + 1) % J, other, side, a] = 3.5
        return {"q_weight": q_JG2P.flatten(), "k_weight": k_J2P.flatten(), "head_dim": 2 * P}

    def per_head(rng):
        return [score_bound.inputs(rng) for _ in range(4)]

    def full_width(rng):
        return [score_bound.inputs(rng, *rng.sizes(2, 2, 4)) for _ in range(3)]

    def run(m, q_weight, k_weight, head_dim):
        return {"bound": float(m.score_bound(q_weight, k_weight, head_dim))}


class norm_jacobian:
    def inputs(rng, size, eps):
        D = rng.int(4, 9)
        x_D = (size * rng.randn(D)).double()
        return {"x_D": x_D, "weight_D": (0.5 + rng.rand(D)).double(), "eps": eps}

    def values(rng):
        return [norm_jacobian.inputs(rng, size, 0.0) for size in (1.0, 3.0, 0.4)]

    def tiny_stream(rng):
        return [norm_jacobian.inputs(rng, size, 1e-2) for size in (0.1, 0.02)]

    def along_the_stream(rng):
        return [norm_jacobian.inputs(rng, 1.0, eps) for eps in (0.0, 0.1)]

    def run(m, x_D, weight_D, eps):
        return {"jacobian_IJ": m.norm_jacobian(x_D, weight_D, eps)}

    def run_along_the_stream(m, x_D, weight_D, eps):
        return {"jacobian_times_x_D": m.norm_jacobian(x_D, weight_D, eps) @ x_D}


class fold_norms:
    def inputs(rng, scale=None, **more):
        B, T = rng.sizes(2, 2, 7)
        cfg = sizes(rng, **more)
        width = cfg["head_dim"] + (0 if cfg["d_latent"] is None else cfg["d_rope"])
        return {
            "sizes": cfg,
            "scale": scale or width**-0.5,
            "seed": rng.int(0, 10**6),
            "tokens_BT": rng.integers(19, B, T),
        }

    def latent_sizes(rng, with_queries):
        C, Q, U = rng.sizes(3, 5, 12)
        return dict(d_latent=C, d_q_latent=Q if with_queries else None, d_rope=4, d_value=U)

    def expert_sizes(rng, n_shared):
        n_experts, d_expert = rng.sizes(2, 3, 6)
        routing = dict(n_experts=n_experts, n_active=2, n_shared=n_shared, n_dense_layers=0)
        return routing | dict(d_expert=d_expert)

    def grouped(rng):
        return [
            fold_norms.inputs(rng, norm_at="in", n_layers=2),
            fold_norms.inputs(rng, norm_at="both", bias=True),
            fold_norms.inputs(rng, norm_at="out"),
        ]

    def experts(rng):
        return [
            fold_norms.inputs(rng, norm_at=norm_at, **fold_norms.expert_sizes(rng, n_shared))
            for norm_at, n_shared in (("in", 0), ("both", 2))
        ]

    def latent(rng):
        return [
            fold_norms.inputs(
                rng, norm_at=norm_at, qk_norm="head", **fold_norms.latent_sizes(rng, with_queries)
            )
            for norm_at, with_queries in (("in", True), ("both", False))
        ]

    def queries_and_keys(rng):
        return [
            fold_norms.inputs(rng, norm_at=norm_at, qk_norm=qk_norm, n_layers=n_layers)
            for norm_at, qk_norm, n_layers in (("in", "head", 1), ("both", "full", 2))
        ]

    def another_scale(rng):
        latent = fold_norms.latent_sizes(rng, rng.choice([True, False]))
        scale = rng.choice([0.7, 0.8, 0.9])
        return [
            fold_norms.inputs(rng, scale, norm_at="in", bias=True),
            fold_norms.inputs(rng, scale, norm_at="both", qk_norm="head"),
            fold_norms.inputs(rng, scale, norm_at="in", **latent),
        ]

    def run(m, sizes, scale, seed, tokens_BT):
        home = file_of(m)
        cfg = home.Config(**sizes)
        model = shake(home.Transformer(cfg), seed)
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        for name, weight in weights.items():
            if "k_norm" in name or "q_norm" in name:
                weight *= 1 - 2 * (torch.rand(weight.shape) < 0.3).float()
        before = {name: weight.clone() for name, weight in weights.items()}
        folded = m.fold_norms(weights, cfg, scale)
        given = [name for name in before if not torch.equal(before[name], weights[name])]
        results = {"names": sorted(folded), "given tensors that were changed": sorted(given)}
        if not set(folded) <= set(before):
            return results
        norms = {name: p for name, p in model.named_parameters() if "norm" in name}
        with torch.no_grad():
            for param in norms.values():  # as in a new model
                param.fill_(1)
            model.load_state_dict(model.state_dict() | folded)
            results["logits_BTV"] = model(tokens_BT)
            for name, param in norms.items():
                n = int(((param - 1).abs() > 1e-5).sum())
                results[f"numbers of {name.removesuffix('.weight')} other than 1"] = n
        return results
