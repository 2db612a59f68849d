"""Inputs for chapter 2's exercises."""

import math

import torch


def sizes(rng, n, P):
    """n different sizes, none of them P or 2P."""
    free = [size for size in range(2, 13) if size not in (P, 2 * P)]
    return [free[i] for i in rng.permutation(len(free))[:n]]


def turn_of(rng, B, T, P):
    """Cosines and sines of any angles, (B, T, 1, P)."""
    angle_BT1P = 6.3 * rng.rand(B, T, 1, P)
    return {"cos_BT1P": angle_BT1P.cos(), "sin_BT1P": angle_BT1P.sin()}


def rounded_once(narrow, wide):
    """Whether bfloat16 numbers are nothing but float32 ones, rounded."""
    return bool(((narrow.float() - wide).abs() <= 0.00392 * wide.abs() + 1e-6).all())


class rope_frequencies:
    def values(rng):
        P = rng.int(3, 6)
        thetas = [rng.choice([20.0, 50.0, 90.0]), rng.choice([300.0, 700.0]), 10_000.0]
        return [{"head_dim": 2 * (P + i), "theta": theta} for i, theta in enumerate(thetas)]

    def one_pair(rng):
        return [{"head_dim": 2, "theta": rng.choice([100.0, 10_000.0])}]

    def large_base(rng):
        return [{"head_dim": rng.choice([64, 96, 128]), "theta": rng.choice([5e5, 1e6, 5e6])}]

    def run(m, head_dim, theta):
        freq_P = m.rope_frequencies(head_dim, theta)
        return {"freq_P": freq_P, "log_freq_P": freq_P.log()}  # slow pairs count as much as fast


class rope_rotation:
    def inputs(rng, T=None, P=None):
        P = P or rng.int(2, 5)
        B, T_, H = sizes(rng, 3, P)
        return {"x_BTHK": rng.randn(B, T or T_, H, 2 * P), **turn_of(rng, B, T or T_, P)}

    def values(rng):
        return [rope_rotation.inputs(rng) for _ in range(3)]

    def one_token(rng):
        return [rope_rotation.inputs(rng, 1), rope_rotation.inputs(rng, 1, 1)]

    def bfloat16(rng):
        case = rope_rotation.inputs(rng, P=16)
        return [case | {"x_BTHK": case["x_BTHK"].bfloat16()}]

    def run(m, x_BTHK, cos_BT1P, sin_BT1P):
        return {"y_BTHK": m.rope(x_BTHK, (cos_BT1P, sin_BT1P))}

    def run_bfloat16(m, x_BTHK, cos_BT1P, sin_BT1P):
        y_BTHK = m.rope(x_BTHK, (cos_BT1P, sin_BT1P))
        wide_BTHK = m.rope(x_BTHK.float(), (cos_BT1P, sin_BT1P))
        return {"type": str(y_BTHK.dtype), "rounded once": rounded_once(y_BTHK, wide_BTHK)}


class partial_rope:
    def inputs(rng, share=0.5):
        P = rng.choice([4, 6, 8])  # of the whole head
        B, T, H = sizes(rng, 3, P)
        n_pad_B1 = rng.integers(3, B, 1)
        return {
            "x_BTHK": rng.randn(B, T, H, 2 * P),
            "pos_BT": torch.arange(T) + rng.int(3, 20) - 5 * n_pad_B1,
            "n_turned": 2 * int(P * share),
            "theta": rng.choice([30.0, 200.0, 900.0]),
        }

    def values(rng):
        return [partial_rope.inputs(rng, share) for share in (0.5, 0.25, 0.75)]

    def none_and_all(rng):
        return [partial_rope.inputs(rng, share) for share in (0.0, 1.0)]

    def bfloat16(rng):
        case = partial_rope.inputs(rng)
        return [case | {"x_BTHK": case["x_BTHK"].bfloat16()}]

    def run(m, **inputs):
        return {"y_BTHK": m.partial_rope(**inputs)}

    def run_bfloat16(m, x_BTHK, n_turned, **inputs):
        y_BTHK = m.partial_rope(x_BTHK, n_turned=n_turned, **inputs)
        wide_BTHK = m.partial_rope(x_BTHK.float(), n_turned=n_turned, **inputs)
        return {
            "type": str(y_BTHK.dtype),
            "rest_BTHM": y_BTHK[..., n_turned:].float(),
            "rounded once": rounded_once(y_BTHK, wide_BTHK),
        }


class pairs_to_halves:
    def matrix(rng):
        cases = []
        for P in (rng.int(3, 5), rng.int(6, 8)):
            H = rng.choice([n for n in (3, 4, 5) if n != P])
            D = 2 * H * rng.choice([n for n in (2, 3, 4) if n != P])
            cases.append({"rows": rng.randn(H * 2 * P, D), "n_heads": H})
        return cases

    def bias(rng):
        P, H = rng.sizes(2, 3, 7)
        return [{"rows": rng.randn(H * 2 * P), "n_heads": n} for n in (H, 1)]

    def more_axes(rng):
        P, H = rng.sizes(2, 3, 6)
        return [{"rows": rng.integers(100, H * 2 * P, rng.int(2, 3), 2 * H), "n_heads": H}]

    def run(m, rows, n_heads):
        return {"sorted": m.pairs_to_halves(rows, n_heads)}


class read_clock:
    def clock(rng, position, factor=1):
        """What a bfloat16 model keeps of a position; the last pair makes most of a turn."""
        P = rng.choice([8, 16, 32])
        last = rng.choice([4.6, 5.2, 5.8]) / 10_000  # radians a token
        freq_P = (last ** (torch.arange(P, dtype=torch.float64) / (P - 1)) / factor).float()
        angle_P = position * freq_P
        cos_P, sin_P = (t.bfloat16().float() for t in (angle_P.cos(), angle_P.sin()))
        return {"cos_P": cos_P, "sin_P": sin_P, "freq_P": freq_P}

    def rounded(rng):
        places = [rng.int(20, 3_000), rng.int(3_000, 7_000)]
        places += [rng.int(7_500, 9_990) for _ in range(3)]
        return [read_clock.clock(rng, position) for position in places]

    def interpolated(rng):
        return [read_clock.clock(rng, rng.int(100, 9_990), factor) for factor in (4, 16)]

    def ends(rng):
        return [read_clock.clock(rng, position) for position in (0, 1, 9_999)]

    def run(m, cos_P, sin_P, freq_P):
        return {"position": int(m.read_clock(cos_P, sin_P, freq_P))}


class alibi_bias:
    def inputs(rng, T=None, step=1):
        B, H, T_, n_old = rng.sizes(4, 2, 7)
        T = T or T_
        steps_BS = 1 + rng.integers(step, B, n_old + T)
        pos_BS = steps_BS.cumsum(dim=1) - rng.integers(6, B, 1)
        return {"slopes_H": rng.rand(H) + 0.1, "q_pos_BT": pos_BS[:, n_old:], "k_pos_BS": pos_BS}

    def values(rng):
        return [alibi_bias.inputs(rng) for _ in range(3)]

    def one_token(rng):
        return [alibi_bias.inputs(rng, 1)]

    def gaps(rng):
        return [alibi_bias.inputs(rng, None, 4)]

    def run(m, **inputs):
        return {"bias_BHTS": m.alibi_bias(**inputs)}


class yarn_frequencies:
    def inputs(rng, **fixed):
        drawn = {
            "head_dim": rng.choice([32, 64, 96, 128]),
            "theta": rng.choice([1e4, 5e4, 1e6]),
            "factor": rng.choice([2.0, 4.0, 10.0, 40.0]),
            "original_len": rng.choice([2048, 4096, 8192]),
            "beta_fast": rng.choice([16.0, 24.0, 32.0]),
            "beta_slow": rng.choice([1.0, 1.5, 2.0]),
        }
        return drawn | fixed

    def values(rng):
        return [yarn_frequencies.inputs(rng) for _ in range(4)]

    def short_training(rng):
        """Not even the fastest pair makes beta_fast turns."""
        return [yarn_frequencies.inputs(rng, original_len=rng.int(70, 100), theta=1e4)]

    def long_training(rng):
        """Even the slowest pair makes more than beta_slow turns."""
        fixed = {"head_dim": 16, "theta": rng.choice([50.0, 100.0]), "beta_slow": 1.0}
        lengths = (rng.int(2_000, 5_000), 2**17)
        return [yarn_frequencies.inputs(rng, original_len=n, **fixed) for n in lengths]

    def no_ramp(rng):
        """Not even the fastest pair makes beta_slow turns, but nearly."""
        n = rng.int(100, 180)
        turns = 1.02 * n / (2 * math.pi)
        fixed = {"original_len": n, "beta_slow": turns, "beta_fast": turns + 2, "theta": 1e4}
        return [yarn_frequencies.inputs(rng, **fixed)]

    def run(m, **inputs):
        freq_P = m.yarn(**inputs)
        return {"freq_P": freq_P, "log_freq_P": freq_P.log()}  # slow pairs count as much as fast


class rope_cache_drop:
    def inputs(rng, n_pad=0, n_keep=None, n_behind=None):
        P = rng.int(2, 4)
        B, H = sizes(rng, 2, P)
        n_keep = rng.int(2, 4) if n_keep is None else n_keep
        n_drop = rng.int(5, 6)
        n_behind = n_keep + rng.int(2, 4) if n_behind is None else n_behind
        n_pad_B = rng.integers(n_pad + 1, B)
        n_pad_B[0], n_pad_B[1] = 0, n_pad
        S = n_pad + n_keep + n_drop + n_behind
        return {
            "k_BSHK": rng.randn(B, S, H, 2 * P),  # whatever they were before they were turned
            "v_BSHK": rng.randn(B, S, H, 2 * P),
            "n_pad_B": n_pad_B if n_pad else None,
            "n_keep": n_keep,
            "n_drop": n_drop,
            "freq_P": 1.5 * rng.rand(P) + 0.05,
        }

    def moved(rng):
        return [rope_cache_drop.inputs(rng) for _ in range(2)]

    def padding(rng):
        return [rope_cache_drop.inputs(rng, n_pad=rng.int(2, 4))]

    def ends(rng):
        """Nothing behind the gap; nothing before it; nothing at all but the gap."""
        some, none = {"n_behind": 0}, {"n_keep": 0}
        return [rope_cache_drop.inputs(rng, **kw) for kw in (some, none, some | none)]

    def bfloat16(rng):
        case = rope_cache_drop.inputs(rng, n_behind=12)
        return [case | {name: case[name].bfloat16() for name in ("k_BSHK", "v_BSHK")}]

    def filled(m, k_BSHK, v_BSHK, n_pad_B):
        cache = m.LayerCache(n_pad_B)
        for part in (slice(0, 3), slice(3, None)):
            pos_BT = cache.positions(k_BSHK[:, part, 0, 0])
            cache.append(k_BSHK[:, part], v_BSHK[:, part], pos_BT)
        return cache

    def contents(cache):
        k_BSHK, v_BSHK, pos_BS = cache.kept
        next_pos_B1 = cache.positions(k_BSHK.new_zeros(len(k_BSHK), 1))
        return {
            "k_BSHK": k_BSHK,
            "v_BSHK": v_BSHK,
            "pos_BS": pos_BS.long(),
            "next_pos_B1": next_pos_B1.long(),
        }

    def run(m, k_BSHK, v_BSHK, n_pad_B, **how):
        cache = rope_cache_drop.filled(m, k_BSHK, v_BSHK, n_pad_B)
        m.drop_middle(cache, **how)
        return rope_cache_drop.contents(cache)

    def run_bfloat16(m, k_BSHK, v_BSHK, n_pad_B, **how):
        kept = []
        for dtype in (torch.bfloat16, torch.float32):
            cache = rope_cache_drop.filled(m, k_BSHK.to(dtype), v_BSHK.to(dtype), n_pad_B)
            m.drop_middle(cache, **how)
            kept.append(cache.kept)
        (narrow_BSHK, v_BSHK, _), (wide_BSHK, _, _) = kept
        same = narrow_BSHK.float() == wide_BSHK  # what was not turned, and so not rounded
        return {
            "types": [str(t.dtype) for t in (narrow_BSHK, v_BSHK)],
            "rounded at most once": rounded_once(narrow_BSHK, wide_BSHK),
            "unchanged_BS": same.all(dim=-1).all(dim=-1),
        }

    # One layer of attention, read through the cache.

    def layer(rng):
        P = rng.int(2, 4)
        B, H = sizes(rng, 2, P)
        T = rng.int(20, 24)
        return {
            "q_BTHK": rng.randn(B, T, H, 2 * P),
            "k_BTHK": rng.randn(B, T, H, 2 * P),
            "v_BTHK": rng.randn(B, T, H, 2 * P),
            "n_pad_B": rng.permutation(B).clamp(max=2),
            "freq_P": 1.5 * rng.rand(P) + 0.05,
        }

    def recomputed(rng):
        drops = [[14, rng.int(1, 3), rng.int(5, 7)]]  # after so many columns; n_keep, n_drop
        return [rope_cache_drop.layer(rng) | {"drops": drops}]

    def again(rng):
        drops = [[11, 2, 4], [rng.int(13, 14), 1, 3], [rng.int(16, 17), 2, 5]]
        return [rope_cache_drop.layer(rng) | {"drops": drops}]

    def read(m, cache, q_BTHK, k_BTHK, v_BTHK, freq_P):
        """What attention returns for the next tokens, (B, T, H, K)."""
        pos_BT = cache.positions(q_BTHK[:, :, 0, 0])
        turn = m.rope_angles(pos_BT, freq_P)
        q_BTHK, k_BTHK = m.rope(q_BTHK, turn), m.rope(k_BTHK, turn)
        k_BSHK, v_BSHK, pos_BS = cache.append(k_BTHK, v_BTHK, pos_BT)
        mask_B1TS = (pos_BS[:, None] <= pos_BT[:, :, None])[:, None]
        mask_B1TS = mask_B1TS & ((pos_BS[:, None] >= 0) | (pos_BT[:, :, None] < 0))[:, None]
        y_BHTK = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK)), attn_mask=mask_B1TS
        )
        return y_BHTK.transpose(1, 2)

    def run_again(m, q_BTHK, k_BTHK, v_BTHK, n_pad_B, freq_P, drops):
        cache = m.LayerCache(n_pad_B)
        found, start = [], 0
        for end, n_keep, n_drop in [*drops, (q_BTHK.shape[1], 0, 0)]:
            parts = (x[:, start:end] for x in (q_BTHK, k_BTHK, v_BTHK))
            found.append(rope_cache_drop.read(m, cache, *parts, freq_P))
            if n_drop:
                m.drop_middle(cache, n_keep, n_drop, freq_P)
            start = end
        return {"y_BTHK": torch.cat(found[1:], dim=1), **rope_cache_drop.contents(cache)}

    run_recomputed = run_again
