"""Inputs for chapter 3's exercises."""

import sys

import torch


class longest_text:
    def values(rng):
        budgets = [10**5, 10**7 + rng.int(0, 10**6), 10**10, 10**12 + rng.int(0, 10**9)]
        found = []
        for n_local, n_full in ((rng.int(5, 40), rng.int(2, 8)), (rng.int(2, 9), 20), (0, 24)):
            sizes = {
                "n_local": n_local,
                "n_full": n_full,
                "window": rng.int(512, 4096),
                "n_kv_heads": rng.int(1, 16),
                "head_dim": rng.choice([64, 96, 128]),
                "number_bytes": rng.choice([1, 2, 4]),
            }
            found.append({"budgets": budgets, "sizes": sizes})
        return found

    def each_byte(rng):
        J, K = rng.sizes(2, 1, 3)
        sizes = {"n_local": rng.int(1, 3), "n_full": rng.int(1, 2), "window": rng.int(2, 4)}
        sizes |= {"n_kv_heads": J, "head_dim": K, "number_bytes": 1}
        return [{"budgets": list(range(200)), "sizes": sizes}]

    def no_limit(rng):
        small = {"n_local": rng.int(1, 3), "n_full": 0, "window": rng.int(2, 4)}
        small |= {"n_kv_heads": 1, "head_dim": 2, "number_bytes": 2}
        large = {"n_local": 32, "n_full": 0, "window": 4096, "n_kv_heads": 8, "head_dim": 128}
        return [
            {"budgets": list(range(200)), "sizes": small},
            {"budgets": [10**5, 10**8, 10**11], "sizes": large},
        ]

    def run(m, budgets, sizes):
        return {f"tokens for {n} bytes": m.longest_text(n, **sizes) for n in budgets}


class window_mask:
    def positions(rng, padded):
        """Positions of T queries and of S keys in any order; the queries are among the keys."""
        B, T, S = rng.int(2, 3), rng.int(4, 6), rng.int(10, 14)
        first_B1 = rng.integers(9, B, 1) + 20
        if padded:  # the first of the S positions, below zero for some texts
            first_B1 = -torch.tensor([0, 4, S - 2])[rng.permutation(3)[:B], None]
            first_B1[0] = -4
        pos_BS = first_B1 + torch.arange(S)
        n_later = 0 if padded else 2
        q_pos_BT = pos_BS[:, S - n_later - T : S - n_later]
        return {"q_pos_BT": q_pos_BT.clone(), "k_pos_BS": pos_BS[:, rng.permutation(S)]}

    def values(rng):
        cases = [window_mask.positions(rng, False) for _ in range(3)]
        return [c | {"window": w} for c, w in zip(cases, (3, rng.int(4, 6), 1), strict=True)]

    def no_window(rng):
        return [window_mask.positions(rng, False) | {"window": None}]

    def padding(rng):
        cases = [window_mask.positions(rng, True) for _ in range(3)]
        cases += [{"q_pos_BT": c["k_pos_BS"].sort()[0], "k_pos_BS": c["k_pos_BS"]} for c in cases]
        return [c | {"window": w} for c, w in zip(cases, (None, 3, 5) * 2, strict=True)]

    def run(m, q_pos_BT, k_pos_BS, window):
        return {"mask_BTS": m.causal_mask(q_pos_BT, k_pos_BS, window)}


class grouped_attend:
    def inputs(rng, J=None, G=None):
        B, T, S, n_groups, n_in_group, K = rng.sizes(6, 2, 9)
        J, G = J or n_groups, G or n_in_group
        mask_BTS = rng.rand(B, T, S) < 0.6
        mask_BTS[:, :, 0] = True
        return {
            "q_BTHK": rng.randn(B, T, J * G, K),
            "k_BSJK": rng.randn(B, S, J, K),
            "v_BSJK": rng.randn(B, S, J, K),
            "mask_BTS": mask_BTS,
            "scale": rng.choice([0.3, 0.5, 0.7]),
        }

    def values(rng):
        return [grouped_attend.inputs(rng) for _ in range(3)]

    def one_key_head(rng):
        return [grouped_attend.inputs(rng, J=1)]

    def own_key_heads(rng):
        return [grouped_attend.inputs(rng, G=1)]

    def large_scores(rng):
        case = grouped_attend.inputs(rng)  # whole numbers: all ways to the scores are exact
        for name in ("q_BTHK", "k_BSJK"):
            case[name] = (rng.integers(41, *case[name].shape) - 20).float()
        return [case | {"scale": 0.5}]

    def run(m, q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale):
        return {"y_BTHK": m.attend(q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale)}


def chunks(rng, sizes, B=None):
    """Keys, values and positions of a text in parts of these sizes."""
    n_texts, J, K = rng.sizes(3, 2, 5)
    B, n = B or n_texts, sum(sizes)
    pos_BT = torch.arange(n).expand(B, n) - rng.integers(3, B, 1)
    whole = (rng.randn(B, n, J, K), rng.randn(B, n, J, K), pos_BT)
    return [list(part) for part in zip(*(t.split(sizes, 1) for t in whole), strict=True)]


def named(call, tensors):
    """Keys of results: which call, and k_BSJK, v_BSJK, pos_BS."""
    names = ("k_BSJK", "v_BSJK", "pos_BS")
    return {f"call {call}: {name}": t for name, t in zip(names, tensors, strict=True)}


class window_cache:
    def returned(rng):
        sizes = [[5, 2, 1, 1, 7, 3], [1, 1, 1, 1, 1, 2, 9, 1], [rng.int(9, 12), 1, 4]]
        return [{"window": rng.int(3, 4), "new": chunks(rng, s)} for s in sizes]

    def kept(rng):
        sizes = [[2, 2, 1, rng.int(6, 9), 1], [12, 1], [1, 1, 1]]
        windows = (rng.int(3, 4), 1, 5)
        return [{"window": w, "new": chunks(rng, s)} for w, s in zip(windows, sizes, strict=True)]

    def no_window(rng):
        return [{"window": None, "new": chunks(rng, [4, 1, 1, rng.int(2, 5)])}]

    def memory(rng):
        sizes = [rng.int(9, 12), 1, 1]
        return [{"window": 3, "new": chunks(rng, sizes, B)} for B in (1, None)]

    def run(m, window, new):
        cache, found = m.LayerCache(window), {}
        for call, tensors in enumerate(new, 1):
            found |= named(call, cache.append(*tensors))
        return found

    def run_kept(m, window, new):
        cache, found = m.LayerCache(window), {}
        for call, tensors in enumerate(new, 1):
            cache.append(*tensors)
            kept = named(call, cache.kept)
            found |= {key.replace(": ", ", kept: "): t for key, t in kept.items()}
            found[f"call {call}: n_seen"] = int(cache.n_seen)
        return found

    def run_memory(m, window, new):
        cache, found = m.LayerCache(window), {}
        for call, tensors in enumerate(new, 1):
            cache.append(*tensors)
            held = sum(t.untyped_storage().nbytes() for t in cache.kept)
            shown = sum(t.nbytes for t in cache.kept)
            found[f"call {call}: the kept tensors hold no more memory than they show"] = (
                held <= shown
            )
        return found


class regroup_heads:
    def inputs(rng, J=None, bias=True):
        n_groups, G = rng.sizes(2, 2, 4)
        J, K, D, F, V, L = J or n_groups, 2 * rng.int(1, 3), 10, 14, rng.int(11, 17), 2
        widths = {"q": J * G * K, "k": J * K, "v": J * K}
        weights = {"embed.weight": rng.randn(V, D)}
        for layer in range(L):
            at = f"blocks.{layer}."
            shapes = {f"attn.{name}_proj": (width, D) for name, width in widths.items()}
            shapes |= {"attn.o_proj": (D, J * G * K), "mlp.up_proj": (F, D)}
            shapes["mlp.down_proj"] = (D, F)
            for name, shape in shapes.items():
                weights[f"{at}{name}.weight"] = 0.3 * rng.randn(*shape)
                if bias:
                    weights[f"{at}{name}.bias"] = rng.randn(shape[0])
        for name in ("norm", *(f"blocks.{n}.{x}_norm" for n in range(L) for x in ("attn", "mlp"))):
            weights |= {f"{name}.weight": 1 + rng.rand(D), f"{name}.bias": rng.randn(D)}
        return {
            "weights": {name: w.double() for name, w in weights.items()},
            "sizes": {
                "vocab_size": V, "n_layers": L, "d_model": D, "n_heads": J * G, "n_kv_heads": J,
                "head_dim": K, "windows": (None,), "d_ff": F, "bias": bias,
            },
            "tokens_BT": rng.integers(V, 2, 7),
        }  # fmt: skip

    def logits(rng):
        return [regroup_heads.inputs(rng) for _ in range(2)]

    def no_bias(rng):
        return [regroup_heads.inputs(rng, bias=False)]

    def one_key_head(rng):
        return [regroup_heads.inputs(rng, J=1)]

    def others_stay(rng):
        return [regroup_heads.inputs(rng)]

    def run(m, weights, sizes, tokens_BT):
        gqa = sys.modules[m.LayerCache.__module__]
        model = gqa.Transformer(gqa.Config(**sizes)).double().eval()
        model.load_state_dict(m.regroup(weights, sizes["n_kv_heads"], sizes["head_dim"]))
        return {"logits_BTV": model(tokens_BT)}

    def run_others_stay(m, weights, sizes, tokens_BT):
        regrouped = m.regroup(weights, sizes["n_kv_heads"], sizes["head_dim"])
        return {n: w for n, w in regrouped.items() if ".q_proj." not in n and ".o_proj." not in n}


class sink_cache:
    def returned(rng):
        n_sinks, window = rng.int(1, 2), rng.int(3, 4)
        sizes = [[7, 2, 1, 1, 9, 3], [rng.int(9, 12), 1, 1, 4]]
        return [{"window": window, "n_sinks": n_sinks, "new": chunks(rng, s)} for s in sizes]

    def short_text(rng):
        sizes = [[1, 1, 1, 1, 1, 1, 1, 1, 1], [2, 3, 1, rng.int(2, 4), 1, 1]]
        return [{"window": 3, "n_sinks": 4, "new": chunks(rng, s)} for s in sizes]

    def no_sinks(rng):
        return [{"window": 3, "n_sinks": 0, "new": chunks(rng, [5, 1, rng.int(3, 6), 1])}]

    def kept(rng):
        sizes = [rng.int(9, 12), 1, rng.int(5, 9), 2]
        return [{"window": 4, "n_sinks": 2, "new": chunks(rng, sizes)}]

    def run(m, window, n_sinks, new):
        cache, found = m.SinkCache(window, n_sinks), {}
        for call, tensors in enumerate(new, 1):
            found |= named(call, cache.append(*tensors))
        return found

    def run_kept(m, window, n_sinks, new):
        cache, found = m.SinkCache(window, n_sinks), {}
        for call, tensors in enumerate(new, 1):
            cache.append(*tensors)
            kept = named(call, cache.kept)
            found |= {key.replace(": ", ", kept: "): t for key, t in kept.items()}
            found[f"call {call}: n_seen"] = int(cache.n_seen)
        return found


class tiled_softmax:
    def inputs(rng, S, tile, J=None, T=None):
        B, n_queries, n_groups, G, K = rng.sizes(5, 2, 6)
        J, T = J or n_groups, T or n_queries
        mask_BTS = rng.rand(B, T, S) < 0.6
        mask_BTS[:, :, 0::tile] = True  # a key in each tile
        return {
            "q_BTHK": rng.randn(B, T, J * G, K),
            "k_BSJK": rng.randn(B, S, J, K),
            "v_BSJK": rng.randn(B, S, J, K),
            "mask_BTS": mask_BTS,
            "scale": rng.choice([0.7, 1.3, 1.7]),
            "tile": tile,
        }

    def values(rng):
        return [tiled_softmax.inputs(rng, 12, 4), tiled_softmax.inputs(rng, 15, 3)]

    def tiles(rng):
        sizes = ((13, 4), (9, 7), (rng.int(7, 9), 1), (rng.int(7, 9), 10))
        return [tiled_softmax.inputs(rng, S, tile) for S, tile in sizes]

    def large_scores(rng):
        found = []
        # The size of the keys in three tiles: falling, growing, and all scores far below zero.
        orders = (([8.0, 6.0, 1.0], 1), ([1.0, 6.0, 8.0], 1), ([16.0, 12.0, 14.0], -1))
        for sizes, sign in orders:
            case = tiled_softmax.inputs(rng, 12, 4)
            for name in ("q_BTHK", "k_BSJK"):  # whole numbers: all ways to the scores are exact
                case[name] = (rng.integers(6, *case[name].shape) + 2).float()
            case["q_BTHK"] *= sign
            case["k_BSJK"] *= torch.tensor(sizes).repeat_interleave(4)[:, None, None]
            found.append(case | {"scale": 0.5})
        return found

    def hidden_tiles(rng):
        case = tiled_softmax.inputs(rng, 12, 3)
        T = case["mask_BTS"].shape[1]
        for t in range(T):  # each query sees one of the tiles only
            first = 3 * ((t + 1) % 4)
            case["mask_BTS"][:, t, :first] = case["mask_BTS"][:, t, first + 3 :] = False
        return [case]

    def memory(rng):
        return [tiled_softmax.inputs(rng, 1024, 32, J=1, T=32)]

    def run(m, q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale, tile):
        return {"y_BTHK": m.attend_rows(q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale, tile)}

    def run_memory(m, q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale, tile):
        found = []
        peak = m.peak_bytes(
            lambda: found.append(m.attend_rows(q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale, tile))
        )
        table = 4 * q_BTHK.shape[2] * mask_BTS.numel()
        return {"y_BTHK": found[0], "peak memory is below half of all scores": peak < table / 2}


class paged_cache:
    """Each case is a list of steps: new, append, read, fork and free, texts counted from 0."""

    def inputs(rng, n_pages, page_size, steps):
        J, K = rng.sizes(2, 2, 5)
        filled = []
        for step in steps:
            if step[0] == "append":
                step = [*step[:2], rng.randn(step[2], J, K), rng.randn(step[2], J, K)]
            filled.append(list(step))
        sizes = {"n_pages": n_pages, "page_size": page_size, "n_kv_heads": J, "head_dim": K}
        return {"sizes": sizes, "steps": filled}

    def reads(rng):
        few = rng.int(1, 4)
        return [
            paged_cache.inputs(rng, 20, 4, [
                ("new",), ("new",), ("append", 0, 6), ("append", 1, 3), ("append", 0, 1),
                ("append", 1, 10), ("append", 0, 1), ("append", 0, few), ("new",),
                ("append", 2, 5), ("append", 1, 2), ("append", 0, 7),
            ]),
            paged_cache.inputs(rng, 30, rng.int(2, 3), [
                ("new",), ("append", 0, 1), ("new",), ("append", 1, 1), ("append", 0, 1),
                ("append", 1, 9), ("append", 0, 8), ("append", 1, 1), ("append", 0, few),
            ]),
        ]  # fmt: skip

    def pages(rng):
        return [
            paged_cache.inputs(rng, 12, 4, [
                ("new",), ("new",), ("append", 0, 4), ("append", 1, 3), ("append", 1, 1),
                ("append", 0, 1), ("append", 1, 8), ("append", 0, rng.int(4, 7)),
            ])
        ]  # fmt: skip

    def reuse(rng):
        steps = [("new",), ("append", 0, 5)]
        for text in range(1, 6):  # in all more than the memory could hold
            steps += [("new",), ("append", text, rng.int(7, 9)), ("free", text - 1)]
            steps += [("append", text, 3)]
        return [paged_cache.inputs(rng, 8, 3, steps)]

    def full(rng):
        return [
            paged_cache.inputs(rng, 4, 3, [
                ("new",), ("new",), ("append", 0, 5), ("append", 1, 4),
                ("append", 0, rng.int(2, 5)), ("append", 0, 1), ("append", 1, 3),
                ("append", 1, 2), ("append", 0, 1),
                ("free", 1), ("append", 0, 5), ("append", 0, 2), ("append", 0, 1),
            ]),
            paged_cache.inputs(rng, 3, 4, [  # a fork needs a page for the copy
                ("new",), ("append", 0, 10), ("fork", 0), ("append", 1, 1), ("append", 0, 2),
                ("free", 0), ("append", 1, 1), ("append", 1, 1),
            ]),
        ]  # fmt: skip

    def forks(rng):
        return [
            paged_cache.inputs(rng, 40, 4, [
                ("new",), ("append", 0, 6), ("fork", 0), ("append", 1, 1), ("append", 0, 3),
                ("fork", 1), ("append", 2, rng.int(2, 6)), ("append", 1, 4), ("append", 0, 1),
                ("append", 2, 1), ("free", 0), ("append", 1, 1), ("append", 2, 2),
            ]),
            paged_cache.inputs(rng, 40, 3, [
                ("new",), ("fork", 0), ("append", 1, 6), ("fork", 1), ("append", 2, 2),
                ("append", 1, 1), ("append", 0, 2), ("free", 1), ("append", 2, 4),
                ("new",), ("append", 3, 9), ("append", 2, 1),
            ]),
        ]  # fmt: skip

    def sharing(rng):
        return [
            paged_cache.inputs(rng, 15, 4, [
                ("new",), ("append", 0, 10), ("fork", 0), ("fork", 0), ("append", 1, 1),
                ("append", 0, 1), ("append", 2, 1), ("free", 1), ("free", 0), ("append", 2, 6),
                ("fork", 2), ("free", 2), ("append", 3, rng.int(1, 3)), ("free", 3),
            ]),
            paged_cache.inputs(rng, 15, 3, [  # the last shared page is full
                ("new",), ("append", 0, 6), ("fork", 0), ("append", 1, 1), ("append", 0, 1),
                ("append", 1, rng.int(2, 4)), ("free", 0), ("free", 1),
            ]),
        ]  # fmt: skip

    def memory(rng):
        return [
            paged_cache.inputs(rng, 8, 4, [
                ("new",), ("append", 0, 21), ("fork", 0), ("fork", 0), ("append", 1, 6),
                ("append", 0, 2), ("free", 0), ("free", 1), ("append", 2, rng.int(4, 9)),
            ])
        ]  # fmt: skip

    def play(m, sizes, steps, what):
        """What `what(cache, living texts, what append returned)` gives after each step."""
        cache, texts, found = m.PagedCache(**sizes), [], {}
        for n, (kind, *more) in enumerate(steps, 1):
            stored = None
            if kind == "new":
                texts.append(cache.new())
                step = f"step {n} (begin text {len(texts) - 1})"
            elif kind == "append":
                text, k_TJK, v_TJK = more
                stored = cache.append(texts[text], k_TJK, v_TJK)
                step = f"step {n} (append {len(k_TJK)} to text {text})"
            elif kind == "fork":
                texts.append(cache.fork(texts[more[0]]))
                step = f"step {n} (fork text {more[0]} as text {len(texts) - 1})"
            else:
                cache.free(texts[more[0]])
                texts[more[0]] = None
                step = f"step {n} (free text {more[0]})"
            living = {i: text for i, text in enumerate(texts) if text is not None}
            found |= {f"{step}: {key}": value for key, value in what(cache, living, stored).items()}
        return found

    def contents(cache, living, stored=None):
        found = {}
        for i, text in living.items():
            k_SJK, v_SJK = cache.read(text)
            found |= {f"text {i}: k_SJK": k_SJK, f"text {i}: v_SJK": v_SJK}
        return found

    def free_pages(cache, living, stored=None):
        return {"n_free": int(cache.n_free())}

    def run(m, sizes, steps):
        return paged_cache.play(m, sizes, steps, paged_cache.contents)

    def run_pages(m, sizes, steps):
        return paged_cache.play(m, sizes, steps, paged_cache.free_pages)

    def run_sharing(m, sizes, steps):
        return paged_cache.play(m, sizes, steps, paged_cache.free_pages)

    def run_reuse(m, sizes, steps):
        return paged_cache.play(
            m, sizes, steps, lambda c, living, stored: (
                {"stored": stored} | paged_cache.contents(c, living)
            ),
        )  # fmt: skip

    def run_full(m, sizes, steps):
        return paged_cache.play(
            m, sizes, steps, lambda c, living, stored: (
                {"stored": stored} | paged_cache.free_pages(c, living)
                | paged_cache.contents(c, living)
            ),
        )  # fmt: skip

    def run_memory(m, sizes, steps):
        def memory(cache, living, stored):
            storages, todo = {}, [vars(cache)]
            while todo:
                item = todo.pop()
                if isinstance(item, torch.Tensor) and item.is_floating_point():
                    storage = item.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
                elif isinstance(item, dict):
                    todo += item.values()
                elif isinstance(item, (list, tuple)):
                    todo += item
            pages = 2 * 4  # keys and values, of four bytes each
            for size in sizes.values():
                pages *= size
            held = sum(storages.values())
            return {"its tensors need no more than the memory of the pages": held <= pages}

        return paged_cache.play(m, sizes, steps, memory)
