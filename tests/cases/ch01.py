"""Inputs for chapter 1's exercises."""

import math
import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class bits_per_byte:
    def text(rng, loss_nats):
        n_tokens = rng.int(1000, 9000)
        n_bytes = n_tokens * rng.int(21, 49) // 10
        return {"loss_nats": loss_nats, "n_tokens": n_tokens, "n_bytes": n_bytes}

    def values(rng):
        return [bits_per_byte.text(rng, rng.int(100, 900) / 100) for _ in range(4)]

    def bytes_as_tokens(rng):
        n = rng.int(1000, 9000)
        return [
            {"loss_nats": loss, "n_tokens": n, "n_bytes": n}
            for loss in (math.log(256), rng.int(50, 500) / 100)
        ]

    def run(m, loss_nats, n_tokens, n_bytes):
        return {"bits_per_byte": m.bits_per_byte(loss_nats, n_tokens, n_bytes)}


class layer_norm:
    def inputs(rng, x, eps):
        return {
            "x": x,
            "eps": eps,
            "weight": 1 + 0.5 * rng.randn(x.shape[-1]),
            "bias": rng.randn(x.shape[-1]),
        }

    def values(rng):
        cases = []
        for eps in (1e-5, 0.1, 0.5):
            B, T, D = rng.sizes(3, 3, 9)
            x_BTD = rng.choice([0.7, 1.5]) * rng.randn(B, T, D) + rng.randn(B, T, 1)
            cases.append(layer_norm.inputs(rng, x_BTD, eps))
        return cases

    def other_axes(rng):
        D, H, T, K = rng.sizes(4, 3, 9)
        return [
            layer_norm.inputs(rng, rng.randn(*shape), 0.1) for shape in ((D,), (T, D), (2, T, H, K))
        ]

    def far_from_zero(rng):
        # Whole numbers and a width of a power of two: the mean is exact in any order of summing.
        x_TD = 4000.0 + rng.integers(16, rng.int(3, 5), rng.choice([8, 16]))
        return [layer_norm.inputs(rng, x_TD, 0.1)]

    def half_precision(rng):
        x_TD = 128.0 + rng.integers(100, 3, 8)  # whole numbers that bfloat16 can hold
        return [layer_norm.inputs(rng, x_TD.bfloat16(), 0.1)]

    def run(m, x, eps, weight, bias):
        norm = m.LayerNorm(x.shape[-1], eps)
        with torch.no_grad():
            norm.weight.copy_(weight)
            norm.bias.copy_(bias)
        letters = {1: "D", 2: "TD", 3: "BTD", 4: "BTHK"}[x.ndim]
        return {f"y_{letters}": norm(x)}


class causal_mask_with_padding:
    def sizes(rng):
        B, T, old = rng.sizes(3, 2, 6)
        return B, T, T + old

    def no_padding(rng):
        cases = []
        for _ in range(3):
            B, T, S = causal_mask_with_padding.sizes(rng)
            pos_BS = 1 + rng.permutation(9)[:B, None] + torch.arange(S)
            cases.append({"q_pos_BT": pos_BS[:, -T:], "k_pos_BS": pos_BS})
        return cases

    def padding(rng):
        cases = []
        for whole in (True, False):
            B, T, S = causal_mask_with_padding.sizes(rng)
            n_pad_B = rng.integers(S, B)
            n_pad_B[:2] = torch.tensor([0, S - 1])
            pos_BS = torch.arange(S) - n_pad_B[:, None]
            cases.append({"q_pos_BT": pos_BS if whole else pos_BS[:, -T:], "k_pos_BS": pos_BS})
        return cases

    def any_order(rng):
        B, T, S = causal_mask_with_padding.sizes(rng)
        pos_BS = torch.stack([rng.permutation(S) for _ in range(B)]) - 2
        return [{"q_pos_BT": pos_BS.flip(1)[:, :T].contiguous(), "k_pos_BS": pos_BS}]

    def run(m, q_pos_BT, k_pos_BS):
        return {"mask_BTS": m.causal_mask(q_pos_BT, k_pos_BS)}


class packed_mask:
    def values(rng):
        cases = []
        for _ in range(3):
            B, T = rng.sizes(2, 3, 12)
            T += 4
            starts_BT = (rng.rand(B, T) < 0.25).long()
            starts_BT[:, T // 2] = 1
            number = rng.permutation(99)[:T]  # of each text, in no order
            cases.append({"doc_BT": number[starts_BT.cumsum(dim=1) - starts_BT[:, :1]]})
        return cases

    def one_text(rng):
        B, T = rng.sizes(2, 3, 9)
        return [{"doc_BT": rng.integers(99, B, 1).expand(B, T).contiguous()}]

    def one_token_each(rng):
        T = rng.int(4, 9)
        return [{"doc_BT": torch.stack([rng.permutation(T) for _ in range(3)])}]

    def run(m, doc_BT):
        return {"mask_BTS": m.packed_mask(doc_BT)}


def some_hidden(rng, B, T, S):
    """A mask in whose every row some keys may be seen, and some not."""
    n_seen_BT1 = 1 + rng.integers(S - 1, B, T, 1)
    return rng.rand(B, T, S).argsort(dim=-1) < n_seen_BT1


def attention_inputs(rng, B, T, S, H, K, large=False):
    """Queries, keys, values, mask and scale; if large, scores of hundreds which are exact."""
    q_BTHK, k_BSHK = rng.randn(B, T, H, K), rng.randn(B, S, H, K)
    if large:
        q_BTHK = 16.0 * (rng.integers(9, B, T, H, K) - 4)
        k_BSHK = 1.0 * (rng.integers(9, B, S, H, K) - 4)
    return {
        "q_BTHK": q_BTHK,
        "k_BSHK": k_BSHK,
        "v_BSHK": rng.randn(B, S, H, K),
        "mask_BTS": some_hidden(rng, B, T, S),
        "scale": 0.5 if large else rng.choice([0.4, 0.6, 0.7]),
    }


class scaled_dot_product:
    def values(rng):
        return [attention_inputs(rng, *rng.sizes(5, 2, 9)) for _ in range(3)]

    def one_query(rng):
        B, S, H, K = rng.sizes(4, 2, 9)
        return [attention_inputs(rng, B, 1, S, H, K)]

    def large_scores(rng):
        return [attention_inputs(rng, *rng.sizes(5, 3, 9), large=True)]

    def run(m, q_BTHK, k_BSHK, v_BSHK, mask_BTS, scale):
        return {"y_BTHK": m.attend(q_BTHK, k_BSHK, v_BSHK, mask_BTS, scale)}


class sample_token:
    """What is compared are shares: how often each token comes, not which comes when."""

    n_draws = 3000  # of each row

    def inputs(rng, temperature, top_k=None, top_p=None):
        V = rng.int(6, 8)
        rows = [0.4 * rng.permutation(V) + rng.choice([-1.5, 0.5, 2.5]) for _ in range(2)]
        return {
            "logits_BV": torch.stack(rows),
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": rng.int(0, 10**6),
        }

    def temperature(rng):
        return [sample_token.inputs(rng, t) for t in (0.5, 2.0)]

    def greedy(rng):
        case = sample_token.inputs(rng, 0.0)
        return [case, case | {"top_k": 3, "top_p": 0.5}]

    def top_k(rng):
        return [sample_token.inputs(rng, t, top_k=k) for t, k in ((1.0, 3), (1.0, 1), (0.7, 99))]

    def top_p(rng):
        return [sample_token.inputs(rng, t, top_p=p) for t, p in ((2.0, 0.5), (1.0, 0.05))]

    def both(rng):
        return [sample_token.inputs(rng, 0.8, top_k=3, top_p=p) for p in (0.7, 0.38)]

    def own_generator(rng):
        return [sample_token.inputs(rng, 1.0)]

    def run(m, logits_BV, temperature, top_k, top_p, seed):
        B, V = logits_BV.shape
        generator = torch.Generator().manual_seed(seed)
        rows = logits_BV.repeat(sample_token.n_draws, 1)
        tokens = m.sample(rows, temperature, top_k, top_p, generator)
        found = {"shape_of_the_tokens": list(tokens.shape), "type_of_the_tokens": str(tokens.dtype)}
        if tokens.numel() != len(rows):
            return found
        n_BV = torch.stack([row.bincount(minlength=V) for row in tokens.view(-1, B).T])
        return found | {"drawn_BV": n_BV > 0, "share_BV": n_BV / sample_token.n_draws}

    def run_own_generator(m, logits_BV, temperature, top_k, top_p, seed):
        def draw(seed):
            generator = torch.Generator().manual_seed(seed)
            rows = logits_BV.repeat(100, 1)
            return m.sample(rows, temperature, top_k, top_p, generator).tolist()

        torch.rand(1)  # so that setting the global seed anew shows
        before = torch.get_rng_state()
        first = draw(seed)
        untouched = torch.equal(before, torch.get_rng_state())
        torch.rand(3)  # another user of torch's global generator
        return {
            "same_seed_gives_same_tokens": draw(seed) == first,
            "other_seed_gives_other_tokens": draw(seed + 1) != first,
            "global_generator_is_left_alone": untouched,
        }


class convert_gpt2:
    def sizes(rng):
        F, V, P = rng.sizes(3, 13, 19)
        return rng.choice([6, 9, 12]), F, V, P

    def layer(rng):
        return f"h.{rng.choice([0, 3, 11, 25])}."

    def attention(rng, D, layer):
        return {
            f"{layer}attn.c_attn.weight": rng.randn(D, 3 * D),
            f"{layer}attn.c_attn.bias": rng.randn(3 * D),
            f"{layer}attn.c_proj.weight": rng.randn(D, D),
            f"{layer}attn.c_proj.bias": rng.randn(D),
        }

    def values(rng):
        D, _, _, _ = convert_gpt2.sizes(rng)
        return [{"weights": convert_gpt2.attention(rng, D, convert_gpt2.layer(rng))}]

    def mlp_and_norms(rng):
        D, F, _, _ = convert_gpt2.sizes(rng)
        layer = convert_gpt2.layer(rng)
        mlp = {
            f"{layer}mlp.c_fc.weight": rng.randn(D, F),
            f"{layer}mlp.c_fc.bias": rng.randn(F),
            f"{layer}mlp.c_proj.weight": rng.randn(F, D),
            f"{layer}mlp.c_proj.bias": rng.randn(D),
        }
        norms = {
            f"{layer}ln_1.weight": rng.randn(D),
            f"{layer}ln_2.bias": rng.randn(D),
            "ln_f.weight": rng.randn(D),
        }
        return [{"weights": mlp}, {"weights": norms}]

    def tables(rng):
        D, _, V, P = convert_gpt2.sizes(rng)
        return [{"weights": {"wte.weight": rng.randn(V, D), "wpe.weight": rng.randn(P, D)}}]

    def left_out(rng):
        D, _, V, P = convert_gpt2.sizes(rng)
        layer = convert_gpt2.layer(rng)
        masks = {
            f"{layer}attn.bias": torch.ones(1, 1, P, P).tril(),
            f"{layer}attn.masked_bias": torch.tensor(-1e4),
            f"{layer}attn.c_proj.bias": rng.randn(D),
        }
        head = rng.randn(V, D)
        return [
            {"weights": masks},
            {"weights": {"lm_head.weight": head, "ln_f.bias": rng.randn(D)}},
        ]

    def prefix(rng):
        D, _, V, _ = convert_gpt2.sizes(rng)
        weights = convert_gpt2.attention(rng, D, convert_gpt2.layer(rng))
        weights |= {"wte.weight": rng.randn(V, D)}
        return [
            {"weights": {f"transformer.{name}": w}}
            for name, w in weights.items()
            if name.endswith(("c_attn.bias", "c_proj.weight", "wte.weight"))
        ]

    def run(m, weights):
        found = m.convert(weights)
        if not isinstance(found, dict) or not all(isinstance(w, Tensor) for w in found.values()):
            return {"converted": found}
        return {"converted": {axes_added(name, w): w for name, w in found.items()}}


def axes_added(name, w):
    """A matrix's name with its axes, so that messages can name them."""
    return f"{name}_OI" if w.ndim == 2 and "proj" in str(name) else name


class attend_in_chunks:
    def inputs(rng, chunk, n_chunks, more=0, large=False):
        """Keys for so many whole chunks, and some more."""
        B, T, H, K = rng.sizes(4, 2, 6)
        case = attention_inputs(rng, B, T, chunk * n_chunks + more, H, K, large)
        case["mask_BTS"][:, :, 0] = True  # something to see in the first chunk
        return case | {"chunk": chunk}

    def values(rng):
        return [attend_in_chunks.inputs(rng, c, n) for c, n in ((3, 4), (5, 2), (2, 5))]

    def uneven_chunks(rng):
        cases = [attend_in_chunks.inputs(rng, c, n, more) for c, n, more in ((4, 2, 3), (3, 3, 1))]
        whole = attend_in_chunks.inputs(rng, 7, 1)
        return [*cases, whole | {"chunk": 20}, whole | {"chunk": 1}]

    def hidden_chunk(rng):
        cases = []
        for first in (0, 1):
            case = attend_in_chunks.inputs(rng, 3, 3)
            case["mask_BTS"][:, ::2, 3 * first : 3 * first + 3] = False
            case["mask_BTS"][:, :, -1] = True
            cases.append(case)
        return cases

    def large_scores(rng):
        cases = [attend_in_chunks.inputs(rng, 3, 3, large=True) for _ in range(2)]
        # And one in which all scores are far below zero.
        cases[1]["q_BTHK"] = cases[1]["q_BTHK"].abs() + 16
        cases[1]["k_BSHK"] = -cases[1]["k_BSHK"].abs() - 4
        return cases

    def memory(rng):
        H, K = rng.sizes(2, 2, 3)
        wide = attention_inputs(rng, 1, rng.int(20, 24), 120, H, K)
        narrow = attention_inputs(rng, 1, 1, 210, H, K)
        for case in (wide, narrow):
            case["mask_BTS"][:, :, 0] = True
        return [wide | {"chunk": 4}, narrow | {"chunk": 7}]

    def run(m, q_BTHK, k_BSHK, v_BSHK, mask_BTS, scale, chunk):
        return {"y_BTHK": m.attend_in_chunks(q_BTHK, k_BSHK, v_BSHK, mask_BTS, scale, chunk)}

    def run_memory(m, q_BTHK, k_BSHK, v_BSHK, mask_BTS, scale, chunk):
        table = mask_BTS.shape[1] * mask_BTS.shape[2]
        with LiveNumbers() as live:
            y_BTHK = m.attend_in_chunks(q_BTHK, k_BSHK, v_BSHK, mask_BTS, scale, chunk)
        return {
            "y_BTHK": y_BTHK,
            "largest_tensor_is_smaller_than_T_times_S": live.largest < table,
            "all_tensors_together_are_smaller_than_T_times_S": live.peak < table,
        }


class LiveNumbers(TorchDispatchMode):
    """Counts the floating-point numbers of the tensors made inside it, while they live.

    Views share their tensor's memory, which is counted once.
    """

    def __init__(self):
        super().__init__()
        self.sizes = {}  # numbers by address; 0 for memory from outside
        self.largest = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.note(args, made_here=False)
        result = func(*args, **(kwargs or {}))
        self.note([result], made_here=True)
        self.largest = max(self.largest, *self.sizes.values(), 0)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result

    def note(self, items, made_here):
        for item in items:
            if isinstance(item, (list, tuple)):
                self.note(item, made_here)
            elif isinstance(item, Tensor) and item.is_floating_point():
                storage = item.untyped_storage()
                address = storage.data_ptr()
                if address not in self.sizes:
                    self.sizes[address] = storage.nbytes() // item.element_size() * made_here
                    weakref.finalize(storage, self.sizes.pop, address)
