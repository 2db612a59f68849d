"""Inputs for chapter 4's exercises."""

import torch


def shaken(module, seed):
    """The module with every parameter random, so that no norm weight or bias hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in module.parameters():
            noise = torch.randn(param.shape, generator=generator)
            param.copy_(noise / param.shape[1] ** 0.5 if param.ndim == 2 else param + 0.3 * noise)
    return module


def sizes(rng, **changes):
    """Fields of a Config, all of another size, and three more sizes: B, T, S."""
    H, K, U, C, Q, D, B, T, S = rng.sizes(9, 2, 12)
    R = next(n for n in (4, 6, 8, 10, 12, 14, 16, 18, 20, 22) if n not in (H, K, U, C, Q, D))
    config = {
        "d_model": D, "n_heads": H, "head_dim": K, "d_value": U, "d_latent": C, "d_q_latent": Q,
        "d_rope": R,
    }  # fmt: skip
    return config | changes, B, T, S


def latent(m, config, seed, window=None):
    return shaken(m.LatentAttention(m.Config(**config), window), seed)


class latent_cache_bytes:  # noqa: N801
    def inputs(rng, n_tokens, windows, latent):
        C, R, J, K, H, D = rng.sizes(6, 2, 30)
        config = {"n_layers": 4 + rng.int(0, 5), "n_heads": J * H, "n_kv_heads": J, "head_dim": K}
        config |= {"d_latent": C if latent else None, "d_rope": 2 * R, "d_value": D}
        return {
            "config": config | {"windows": windows},
            "n_tokens": n_tokens,
            "bytes_a_number": rng.choice([1, 2, 4]),
        }

    def latent(rng):
        mixed = (rng.int(5, 9), None, rng.int(10, 15))
        each = ((None,), mixed, mixed[:2])
        return [latent_cache_bytes.inputs(rng, rng.int(20, 90), w, True) for w in each]

    def grouped(rng):
        each = ((None,), (rng.int(3, 9), None), (None, rng.int(3, 9), rng.int(10, 15)))
        return [latent_cache_bytes.inputs(rng, rng.int(20, 90), w, False) for w in each]

    def short_text(rng):
        each = ((9, None), (6, 12), (4,))
        return [latent_cache_bytes.inputs(rng, rng.int(5, 8), w, True) for w in each]

    def run(m, config, n_tokens, bytes_a_number):
        n_bytes = m.cache_bytes(m.mla.Config(**config), n_tokens, bytes_a_number)
        whole = isinstance(n_bytes, float) and n_bytes.is_integer()
        return {"n_bytes": int(n_bytes) if whole else n_bytes}


class latent_queries:  # noqa: N801
    def inputs(rng, **changes):
        config, B, T, _ = sizes(rng, **changes)
        return {
            "config": config,
            "seed": rng.int(0, 10**6),
            "x_BTD": rng.randn(B, changes.get("T", T), config["d_model"]),
        }

    def through_a_latent(rng):
        return [latent_queries.inputs(rng) for _ in range(3)]

    def straight(rng):
        return [latent_queries.inputs(rng, d_q_latent=None) for _ in range(2)]

    def equal_widths(rng):
        size = 2 * rng.int(2, 4)
        return [
            latent_queries.inputs(
                rng,
                d_model=size,
                n_heads=size,
                head_dim=size // 2,
                d_rope=size // 2,
                d_q_latent=size,
            )  # fmt: skip
        ]

    def run(m, config, seed, x_BTD):
        return {"q_BTHE": latent(m, config, seed).queries(x_BTD)}


def parts(rng, n_new=None, n_all=None, **changes):
    """What both forms are given, with a mask that shows and hides something in every row."""
    config, B, T, S = sizes(rng, **changes)
    T, S = n_new or T, n_all or S
    H, K, R, C = (config[key] for key in ("n_heads", "head_dim", "d_rope", "d_latent"))
    mask_BTS = rng.rand(B, T, S) < 0.6
    mask_BTS[:, :, 0], mask_BTS[:, :, 1] = True, False
    return {
        "config": config,
        "seed": rng.int(0, 10**6),
        "q_BTHK": rng.randn(B, T, H, K),
        "q_rot_BTHR": rng.randn(B, T, H, R),
        "c_BSC": rng.randn(B, S, C),
        "k_rot_BSR": rng.randn(B, S, R),
        "mask_BTS": mask_BTS,
    }


class expanded_form:  # noqa: N801
    def values(rng):
        return [parts(rng) for _ in range(3)]

    def one_new_token(rng):
        return [parts(rng, n_new=1, n_all=rng.int(10, 20))]

    def equal_widths(rng):
        size = 2 * rng.int(2, 4)
        return [parts(rng, head_dim=size, d_rope=size, d_value=size, d_latent=size, n_heads=size)]

    def run(m, config, seed, q_BTHK, q_rot_BTHR, c_BSC, k_rot_BSR, mask_BTS):
        attn = latent(m, config, seed)
        return {"y_BTHU": attn.expanded(q_BTHK, q_rot_BTHR, c_BSC, k_rot_BSR, mask_BTS)}


class absorbed_form:  # noqa: N801
    def values(rng):
        return [parts(rng) for _ in range(3)]

    def equal_widths(rng):
        return expanded_form.equal_widths(rng)

    def multi_query(rng):
        return [parts(rng, n_new=1, n_all=rng.int(20, 30))]

    def run(m, config, seed, q_BTHK, q_rot_BTHR, c_BSC, k_rot_BSR, mask_BTS):
        attn = latent(m, config, seed)
        return {"y_BTHU": attn.absorbed(q_BTHK, q_rot_BTHR, c_BSC, k_rot_BSR, mask_BTS)}

    def run_multi_query(m, config, seed, q_BTHK, q_rot_BTHR, c_BSC, k_rot_BSR, mask_BTS):
        """What attend is given, too: keys of one head, and no values made from the latents."""
        attn = latent(m, config, seed)
        inner, keys, values = m.attend, set(), set()

        def watched(q, k, v, mask, scale):
            keys.add(f"{k.shape[2]} of width {k.shape[3]}")
            values.add("narrower than a latent" if v.shape[3] < c_BSC.shape[2] else "wide enough")
            return inner(q, k, v, mask, scale)

        m.attend = watched
        try:
            y_BTHU = attn.absorbed(q_BTHK, q_rot_BTHR, c_BSC, k_rot_BSR, mask_BTS)
        finally:
            m.attend = inner
        return {
            "y_BTHU": y_BTHU,
            "key heads given to attend": ", ".join(sorted(keys)) or "attend was not called",
            "values given to attend": ", ".join(sorted(values)) or "attend was not called",
        }


class absorbed_output:  # noqa: N801
    def inputs(rng, **changes):
        config, *_ = sizes(rng, **changes)
        return {"config": config, "seed": rng.int(0, 10**6)}

    def matrices(rng):
        return [absorbed_output.inputs(rng) for _ in range(3)]

    def one_head(rng):
        return [absorbed_output.inputs(rng, n_heads=1, bias=False)]

    def equal_widths(rng):
        n = rng.int(3, 6)
        return [absorbed_output.inputs(rng, n_heads=n, head_dim=n, d_value=n, d_latent=n)]

    def run(m, config, seed):
        return {"out_HDC": m.absorbed_output(latent(m.mla, config, seed))}


class absorb_or_expand:  # noqa: N801
    def inputs(rng, d_latent, d_key_and_value, pairs):
        """The rule for pairs of new and all tokens."""
        K = rng.int(5, d_key_and_value - 5)
        config = {"d_model": 3, "n_heads": 2, "head_dim": K, "d_value": d_key_and_value - K}
        config |= {"d_latent": d_latent, "d_rope": rng.choice([2, 4])}
        return {"config": config, "pairs": pairs}

    def few_or_many_new(rng):
        cases = []
        for C in rng.sizes(2, 0, 2):
            C = (11, 13, 17)[C]  # prime, and no pair that it divides: no ties here
            old = (1, 2, 5, 13, 34, 1000)
            pairs = [(n, n + n_old) for n in (*range(1, 16), 25, 40, 60) for n_old in old]
            pairs = [(n, n_all) for n, n_all in pairs if n % C and n_all % C]
            cases.append(absorb_or_expand.inputs(rng, C, 2 * C - 2 * rng.int(2, 4), pairs))
        return cases

    def nothing_is_old(rng):
        C, n = rng.int(7, 9), rng.int(2, 9)
        pairs = [(1, 1), (n, n), (1, 9), (5, 9)]
        return [absorb_or_expand.inputs(rng, C, 2 * C + more, pairs) for more in (-4, 0, 4)]

    def a_tie(rng):
        half = rng.int(5, 8)  # C = K + U: equal for half as many new tokens as C, among C
        pairs = [(half - 1, 2 * half), (half, 2 * half), (half + 1, 2 * half)]
        return [absorb_or_expand.inputs(rng, 2 * half, 2 * half, pairs)]

    def run(m, config, pairs):
        attn = m.LatentAttention(m.Config(**config), None)
        C, K, R, U = (config[key] for key in ("d_latent", "head_dim", "d_rope", "d_value"))
        widths = f"C={C}, K={K}, R={R}, U={U}"
        return {
            f"absorbs with {widths}, {n} new of {n_all}": bool(attn.absorbs(n, n_all))
            for n, n_all in pairs
        }


class latent_forward:  # noqa: N801
    def inputs(rng, lengths, window=None, padding=False, **changes):
        """A text for one layer, read in parts of these lengths with one cache."""
        config, B, *_ = sizes(rng, **changes)
        n_pad = [rng.int(0, lengths[0] - 1) for _ in range(B)]
        return {
            "config": config,
            "seed": rng.int(0, 10**6),
            "window": window,
            "n_pad": n_pad if padding else None,
            "x_BTD": rng.randn(B, sum(lengths), config["d_model"]),
            "lengths": lengths,
        }

    def whole(rng):
        return [latent_forward.inputs(rng, [rng.int(13, 20)], bias=bias) for bias in (True, False)]

    def in_parts(rng):
        return [latent_forward.inputs(rng, [rng.int(4, 7), 1, 1, rng.int(2, 4)])]

    def window_and_padding(rng):
        lengths = [rng.int(5, 7), 1, rng.int(3, 5)]
        return [
            latent_forward.inputs(rng, lengths, rng.int(2, 4)),
            latent_forward.inputs(rng, lengths, rng.choice([None, 6]), True),
        ]

    def what_the_cache_keeps(rng):
        return [latent_forward.inputs(rng, [rng.int(13, 15), 1, 3])]

    def which_form(rng):
        lengths = [rng.int(4, 7), 1, rng.int(2, 3), 1]
        absorbs = [False, True, True, False]
        return [latent_forward.inputs(rng, lengths, rng.choice([3, None])) | {"absorbs": absorbs}]

    def read(m, attn, window, n_pad, x_BTD, lengths):
        """The results of all parts, and the cache."""
        cache = m.LayerCache(window, None if n_pad is None else torch.tensor(n_pad))
        freq_P = m.rope_frequencies(attn.q_widths[1], 100.0)
        y = []
        for part_BTD in x_BTD.split(lengths, dim=1):
            pos_BT = cache.positions(part_BTD[:, :, 0])
            y.append(attn(part_BTD, pos_BT, m.rope_angles(pos_BT, freq_P), cache))
        return torch.cat(y, dim=1), cache

    def run(m, config, seed, window, n_pad, x_BTD, lengths):
        attn = latent(m, config, seed, window)
        y_BTD, _ = latent_forward.read(m, attn, window, n_pad, x_BTD, lengths)
        return {"y_BTD": y_BTD}

    def run_what_the_cache_keeps(m, config, seed, window, n_pad, x_BTD, lengths):
        attn = latent(m, config, seed, window)
        _, cache = latent_forward.read(m, attn, window, n_pad, x_BTD, lengths)
        names = [f"kept_{axes}" for axes in ("BSC", "BSR", "BS")]
        names += [f"a {n}th kept tensor" for n in range(4, 4 + len(cache.kept))]
        return dict(zip(names, cache.kept))  # noqa: B905

    def run_which_form(m, config, seed, window, n_pad, x_BTD, lengths, absorbs):
        """absorbs: what the rule answers, part by part."""
        attn = latent(m, config, seed, window)
        asked, done = [], {}

        def rule(n_new, n_all):
            asked.append(f"absorbs({int(n_new)}, {int(n_all)})")
            return absorbs[len(done)]

        def noting(form):
            inner = getattr(attn, form)

            def call(*args, **kwargs):
                question = asked[-1] if asked else "absorbs not asked"
                done[f"part {len(done) + 1}"] = f"{question}, then {form}"
                asked.clear()
                return inner(*args, **kwargs)

            return call

        attn.absorbs, attn.expanded, attn.absorbed = rule, noting("expanded"), noting("absorbed")
        latent_forward.read(m, attn, window, n_pad, x_BTD, lengths)
        return done


class grouped_to_latent:  # noqa: N801
    def inputs(rng, d_latent=None, rank=None, window=None, lengths=None):
        """A grouped layer and streams; its values are of full rank and all kept, if not told."""
        J, G, P, B, T = rng.sizes(5, 2, 6)
        Y = J * 2 * P
        D = Y + rng.int(3, 9)
        N = 2 * D + rng.int(0, 9)
        v_YD = rng.randn(Y, D) if rank is None else rng.randn(Y, rank) @ rng.randn(rank, D)
        lively_D = torch.logspace(0.5, -0.7, D)[rng.permutation(D)]  # some directions more
        return {
            "sizes": {"d_model": D, "n_heads": J * G, "n_kv_heads": J, "head_dim": 2 * P},
            "seed": rng.int(0, 10**6),
            "window": window,
            "v_YD": v_YD / v_YD.shape[1] ** 0.5,
            "x_ND": (rng.randn(N, D) + 0.8) * lively_D,
            "x_BTD": rng.randn(B, 3 * T, D) * lively_D,
            "d_latent": d_latent or rank or Y,
            "lengths": lengths or [3 * T],
        }

    def exact(rng):
        return [grouped_to_latent.inputs(rng) for _ in range(2)]

    def low_rank(rng):
        return [grouped_to_latent.inputs(rng, rank=rng.int(3, 5))]

    def nearest(rng):
        return [grouped_to_latent.inputs(rng, d_latent=n) for n in (1, rng.int(3, 5))]

    def token_by_token(rng):
        first = grouped_to_latent.inputs(rng, window=4)
        n_tokens = first["x_BTD"].shape[1]
        return [first | {"lengths": [n_tokens - 3, 1, 1, 1]}]

    def given_layer(rng):
        return [grouped_to_latent.inputs(rng)]

    def convert(m, sizes, seed, window, v_YD, x_ND, d_latent):
        """(grouped, latent, whether the first is as it was)."""
        grouped = shaken(m.mla.Attention(m.mla.Config(**sizes, bias=False), window), seed)
        with torch.no_grad():
            grouped.v_proj.weight.copy_(v_YD)
        before = [param.detach().clone() for param in grouped.parameters()]
        latent = m.latent_from_grouped(grouped, x_ND, d_latent)
        pairs = zip(before, grouped.parameters(), strict=True)
        return grouped, latent, all(torch.equal(old, new) for old, new in pairs)

    def read(m, latent, sizes, window, x_BTD, lengths):
        """What the layer gives, and how many numbers its cache holds for a token."""
        freq_P = m.mla.rope_frequencies(sizes["head_dim"], 100.0).repeat(sizes["n_kv_heads"])
        cache, y = m.mla.LayerCache(window), []
        for part_BTD in x_BTD.split(lengths, dim=1):
            pos_BT = cache.positions(part_BTD[:, :, 0])
            y.append(latent(part_BTD, pos_BT, m.mla.rope_angles(pos_BT, freq_P), cache))
        kept = sum(t[0, 0].numel() for t in cache.kept if t.is_floating_point())
        return torch.cat(y, dim=1), kept

    def run(m, sizes, seed, window, v_YD, x_ND, x_BTD, d_latent, lengths):
        _, latent, _ = grouped_to_latent.convert(m, sizes, seed, window, v_YD, x_ND, d_latent)
        y_BTD, kept = grouped_to_latent.read(m, latent, sizes, window, x_BTD, lengths)
        return {"numbers cached a token": kept, "y_BTD": y_BTD}

    def run_nearest(m, sizes, seed, window, v_YD, x_ND, x_BTD, d_latent, lengths):
        """The values of all heads on the streams that were given, too."""
        _, latent, _ = grouped_to_latent.convert(m, sizes, seed, window, v_YD, x_ND, d_latent)
        y_BTD, kept = grouped_to_latent.read(m, latent, sizes, window, x_BTD, lengths)
        c_NC = latent.kv_a_norm(latent.kv_a_proj(x_ND)[:, :d_latent])
        up_HXC = latent.kv_b_proj.weight.unflatten(0, (sizes["n_heads"], -1))
        v_up_HUC = up_HXC[:, -sizes["head_dim"] :]
        values_NHU = torch.einsum("NC,HUC->NHU", c_NC, v_up_HUC)
        return {"numbers cached a token": kept, "values_NHU": values_NHU, "y_BTD": y_BTD}

    def run_given_layer(m, sizes, seed, window, v_YD, x_ND, x_BTD, d_latent, lengths):
        _, _, unchanged = grouped_to_latent.convert(m, sizes, seed, window, v_YD, x_ND, d_latent)
        return {"the given layer's weights are as they were": unchanged}
