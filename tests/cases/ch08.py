"""Inputs for chapter 8's exercises."""

import re

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class llama_from_meta:
    def inputs(rng, n_files, n_layers, cut_embedding, rotations=None):
        """Random parts of the matrices of a model, as many as files."""
        G, n_in_head = rng.int(2, 3), rng.int(3, 4)
        J, K = 2 * n_files, 2 * n_in_head
        H, D, F, V = J * G, 4 * rng.int(5, 7), 4 * rng.int(8, 10), 4 * rng.int(11, 14)
        down = {"wo": (D, H * K // n_files), "w2": (D, F // n_files)}
        shapes = {"attention.wq": (H * K // n_files, D), "attention.wk": (J * K // n_files, D)}
        shapes |= {"attention.wv": (J * K // n_files, D), "attention.wo": down["wo"]}
        shapes |= {"feed_forward.w1": (F // n_files, D), "feed_forward.w2": down["w2"]}
        shapes |= {"feed_forward.w3": (F // n_files, D)}
        embedding = (V // n_files, D) if cut_embedding == "rows" else (V, D // n_files)
        norms = {"norm.weight": rng.rand(D)}
        for layer in range(n_layers):
            for name in ("attention_norm", "ffn_norm"):
                norms[f"layers.{layer}.{name}.weight"] = rng.rand(D)
        files = []
        for _ in range(n_files):
            file = {"tok_embeddings.weight": rng.randn(*embedding)} | norms
            file["output.weight"] = rng.randn(V // n_files, D)
            if rotations:
                file[rotations] = rng.rand(K // 2)
            for layer in range(n_layers):
                for name, shape in shapes.items():
                    file[f"layers.{layer}.{name}.weight"] = rng.randn(*shape)
            files.append(file)
        return {"files": files, "n_heads": H, "n_kv_heads": J}

    def one_file(rng):
        return [llama_from_meta.inputs(rng, 1, n_layers, "rows") for n_layers in (2, 3)]

    def several_files(rng):
        return [llama_from_meta.inputs(rng, n, 2, "rows") for n in (2, 4)]

    def embedding(rng):
        return [llama_from_meta.inputs(rng, n, 1, "columns") for n in (2, 4)]

    def rotations(rng):
        old = "layers.0.attention.inner_attention.rope.freqs"
        names = {1: old, 2: "rope.freqs"}
        return [llama_from_meta.inputs(rng, n, 1, "rows", name) for n, name in names.items()]

    def run(m, files, n_heads, n_kv_heads):
        found = m.llama_from_meta(files, n_heads, n_kv_heads)
        if not isinstance(found, dict):
            return found
        parts = {}  # by layer, so that a message lists few names
        for name, w in found.items():
            number = re.search(r".*\.\d+(?=\.)", str(name))
            parts.setdefault(f"{number[0]}..." if number else "not in a layer", {})[name] = w
        return parts


TOKEN = re.compile(r"(<｜[^｜<>]*｜>|</?think>)")


class deepseek_v31:
    def word(rng):
        return "".join(rng.choice("abcdefgh") for _ in range(rng.int(3, 5)))

    def talk(rng, roles, spaces=False):
        """Messages of random words; s, u, a and t: system, user, assistant, one that thought."""
        found = []
        for role in roles:
            content = deepseek_v31.word(rng)
            if spaces:
                content = rng.choice([" ", "\n", "\n "]) + content + rng.choice([" ", "\n"])
            if role == "t":
                content = f"<think>{deepseek_v31.word(rng)}</think>{content}"
            name = {"s": "system", "u": "user", "a": "assistant", "t": "assistant"}[role]
            found.append({"role": name, "content": content})
        return found

    def cases(rng, roles, **how):
        return [
            {"messages": deepseek_v31.talk(rng, r, **how), "open_turn": o, "thinking": t}
            for r in roles for o, t in ((True, False), (True, True), (False, False))
        ]  # fmt: skip

    def talks(rng):
        return deepseek_v31.cases(rng, ("u", "su", "uau", "suauau"))

    def old_thoughts(rng):
        cases = deepseek_v31.cases(rng, ("utu", "utuau"))
        word = deepseek_v31.word
        for case in deepseek_v31.cases(rng, ("utu",)):
            answer = f"<think>{word(rng)}</think>{word(rng)} </think> {word(rng)}"
            case["messages"][1]["content"] = answer
            cases.append(case)
        return cases

    def texts_as_they_are(rng):
        return deepseek_v31.cases(rng, ("suau", "utu"), spaces=True)

    def not_in_turn(rng):
        return deepseek_v31.cases(rng, ("ua", "uaau", "uu", "uuat", "a", "aua"))

    def system_messages(rng):
        return deepseek_v31.cases(rng, ("ssu", "suasu", "us", "uas"))

    def run(m, messages, open_turn, thinking):
        text = m.deepseek_v31(messages, open_turn, thinking)
        if not isinstance(text, str):
            return text
        start, *rest = TOKEN.split(text)
        pieces = {"before the first token": start}
        for n, (token, after) in enumerate(zip(rest[::2], rest[1::2], strict=True), 1):
            pieces[f"{token} ({n})"] = after
        return pieces


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.numel = max(self.numel, out.numel())
        return out


def refuse(*args, **kwargs):
    raise RuntimeError("the layer itself must not be called: its weights are yours to use")


class absorbed_decode:
    """H, K, C, R, U of the layer, D of the stream, Q of the queries' latent; pages, texts, ..."""

    def inputs(rng, T=1, B=2, pages=None, first=None, size=1.0, **changes):
        H, K, C, U = rng.sizes(4, 3, 9)
        R, D, Q = 2 * rng.int(3, 4), rng.int(20, 24), rng.int(10, 15)
        sizes = {
            "d_model": D, "n_heads": H, "head_dim": K, "d_latent": C, "d_q_latent": Q,
            "d_rope": R, "d_value": U, "rope_interleave": True,
        } | changes  # fmt: skip
        pages = [rng.int(2, 3), rng.int(4, 5), 1] if pages is None else pages
        first_B = torch.tensor([sum(pages)] * B if first is None else first)
        W = sizes["d_latent"] + sizes["d_rope"]
        return {
            "sizes": sizes,
            "weights_seed": rng.int(0, 10**6),
            "score_gain": rng.choice([0.6, 1.5, 1.9]),
            "x_BTD": rng.randn(len(first_B), T, D),
            "pos_BT": first_B[:, None] + torch.arange(T),
            "pages": [size * rng.randn(len(first_B), n, W) for n in pages],
        }

    def one_token(rng):
        more = [rng.int(2, 6) for _ in range(4)]
        return [
            absorbed_decode.inputs(rng),
            absorbed_decode.inputs(rng, B=1, pages=more),
            absorbed_decode.inputs(rng, B=3, pages=[7]),
        ]

    def several_tokens(rng):
        return [absorbed_decode.inputs(rng, T=T) for T in (2, 4)]

    def padding(rng):
        pages = [3, rng.int(2, 4), 2]
        n = sum(pages)
        firsts = ([n, n - 1, n - 4], [1, n - 3, 0])
        return [
            absorbed_decode.inputs(rng, T=T, pages=pages, first=first)
            for T, first in zip((1, 3), firsts, strict=True)
        ]

    def first_tokens(rng):
        return [absorbed_decode.inputs(rng, T=T, pages=[]) for T in (1, 5)]

    def other_layers(rng):
        return [
            absorbed_decode.inputs(rng, d_q_latent=None),
            absorbed_decode.inputs(rng, rope_interleave=False),
        ]

    def large_scores(rng):
        return [absorbed_decode.inputs(rng, size=size) for size in (60.0, 90.0)]

    def memory(rng):
        fixed = {"n_heads": 8, "head_dim": 7, "d_latent": 12, "d_rope": 4, "d_value": 6}
        return [absorbed_decode.inputs(rng, B=1, pages=[256] * 16, **fixed)]

    def layer(m, sizes, weights_seed, score_gain):
        deepseek = absorbed_decode.file_of(m.LatentAttention)
        scaling = deepseek["RopeScaling"](40.0, 32.0, 1.0, 4096, gain=1.0, score_gain=score_gain)
        cfg = deepseek["Config"](**sizes, rope_theta=100.0, rope_scaling=scaling)
        torch.manual_seed(weights_seed)
        m.LatentAttention.forward = m.LatentAttention.absorbed = refuse
        m.LatentAttention.expanded = refuse
        attn = m.LatentAttention(cfg)
        for param in attn.parameters():
            param.requires_grad_(False)
            if param.ndim == 1:
                param.add_(torch.rand_like(param))
            else:  # so that numbers keep their size
                param.copy_(torch.randn_like(param) * param.shape[1] ** -0.5)
        return attn, deepseek["rope_frequencies"](cfg.d_rope, cfg.rope_theta, None)

    def file_of(thing):
        """The names of the file in which a class was written."""
        return thing.__init__.__globals__

    def run(m, sizes, weights_seed, score_gain, x_BTD, pos_BT, pages):
        attn, freq_P = absorbed_decode.layer(m, sizes, weights_seed, score_gain)
        turn = absorbed_decode.file_of(m.LatentAttention)["rope_angles"](pos_BT, freq_P)
        y_BTD, row_BTW = m.absorbed_decode(attn, x_BTD, pos_BT, turn, pages)
        return {"row_BTW": row_BTW, "y_BTD": y_BTD}

    def run_memory(m, sizes, weights_seed, score_gain, x_BTD, pos_BT, pages):
        attn, freq_P = absorbed_decode.layer(m, sizes, weights_seed, score_gain)
        turn = absorbed_decode.file_of(m.LatentAttention)["rope_angles"](pos_BT, freq_P)
        with Largest() as largest:
            y_BTD, _ = m.absorbed_decode(attn, x_BTD, pos_BT, turn, pages)
        page = pages[0].shape[1]
        keys = page * sizes["n_heads"] * min(sizes["head_dim"], sizes["d_value"])
        scores = sizes["n_heads"] * sum(page.shape[1] for page in pages)
        return {
            "y_BTD": y_BTD,
            "no tensor is as large as the heads' keys or values of one page": largest.numel < keys,
            "no tensor is as large as the scores of all pages": largest.numel < scores,
        }
