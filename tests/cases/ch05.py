"""Inputs for chapter 5's exercises."""

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode


def fill(module, numbers_N):
    """Gives every parameter, in the order of their names, the next of the numbers.

    Norms' weights come to lie around one.
    """
    start = 0
    for name, param in sorted(module.named_parameters()):
        new = numbers_N[start : start + param.numel()].view_as(param)
        param.data = 1 + 0.4 * new if "norm" in name else new.clone()
        start += param.numel()


def shapes(module):
    """Parameters by name, in the order of their names."""
    return {name: list(param.shape) for name, param in sorted(module.named_parameters())}


class mlp_width:
    def case(rng, gated, bias):
        D, multiple = rng.int(20, 99), rng.choice([8, 16, 64])
        return {
            "d_model": D,
            "budget": rng.int(6 * D * multiple, 40 * D * multiple),
            "multiple": multiple,
            "gated": gated,
            "bias": bias,
        }

    def widths(rng):
        return [mlp_width.case(rng, gated, False) for gated in [True, False] * 5]

    def biases(rng):
        """Budgets for which a bias decides about one multiple more."""
        found = []
        for gated in (True, False, True, False):
            D, multiple, n = rng.int(10, 40), rng.choice([3, 4, 5]), rng.int(5, 9)
            n_matrices = 3 if gated else 2
            without = n_matrices * D * multiple * n
            found += [
                {"d_model": D, "budget": without + more, "multiple": multiple, "gated": gated}
                for more in (0, D - 1, D + multiple * n, D + (n_matrices - 1) * multiple * n)
            ]
        return [case | {"bias": True} for case in found]

    def nothing_fits(rng):
        cases = [mlp_width.case(rng, gated, bias) for gated in (0, 1) for bias in (0, 1)]
        return [
            case | {"gated": bool(case["gated"]), "bias": bool(case["bias"]), "budget": budget}
            for case in cases
            for budget in (0, case["d_model"] - 1, 2 * case["d_model"] * case["multiple"] - 1)
        ]

    def run(m, d_model, budget, multiple, gated, bias):
        return {"width": m.widest(d_model, budget, multiple, gated, bias)}


class swiglu_mlp:
    def case(rng, bias, n_axes):
        *axes, D, n_hidden = rng.sizes(5, 2, 9)
        return {
            "x": rng.randn(*axes[:n_axes], D),
            "numbers_3N": rng.randn(3, 100),
            "n_hidden": n_hidden,
            "bias": bias,
        }

    def values(rng):
        return [swiglu_mlp.case(rng, False, 2) for _ in range(3)]

    def any_axes(rng):
        return [swiglu_mlp.case(rng, False, n) for n in (0, 1, 3)]

    def biases(rng):
        return [swiglu_mlp.case(rng, True, 2) for _ in range(2)]

    def parameters(rng):
        D, n_hidden = rng.sizes(2, 2, 9)
        sizes = {"d_model": D, "n_hidden": n_hidden}
        return [sizes | {"bias": bias} for bias in (False, True)]

    def run_parameters(m, d_model, n_hidden, bias):
        return shapes(m.MLP(m.Config(d_model=d_model, bias=bias), n_hidden))

    def run(m, x, numbers_3N, n_hidden, bias):
        mlp = m.MLP(m.Config(d_model=x.shape[-1], bias=bias), n_hidden)
        linears = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        for linear, numbers_N in zip(linears, numbers_3N, strict=True):
            fill(linear, numbers_N)
        return {named("y", x): mlp(x)}


def named(name, x):
    """The name with letters for the axes of x: y_BTD."""
    return f"{name}_{('D', 'ND', 'BTD', 'BTHD')[x.ndim - 1]}"


class rms_norm:
    def case(rng, n_axes, eps):
        *axes, D = rng.sizes(4, 2, 9)
        x = 2 * rng.randn(*axes[:n_axes], D) + 1
        return {"x": x + x.sign(), "weight_D": rng.randn(D), "eps": eps}

    def values(rng):
        """Epsilon is too small to matter."""
        return [rms_norm.case(rng, n, 1e-6) for n in (2, 1, 3, 0)]

    def epsilon(rng):
        zeros = rms_norm.case(rng, 1, 1e-5)
        zeros["x"][0] = 0
        return [rms_norm.case(rng, 2, rng.choice([0.5, 1.0, 2.0])), zeros]

    def start(rng):
        return [{"width": rng.int(3, 9), "eps": 1e-6}]

    def run_start(m, width, eps):
        norm = m.RMSNorm(width, eps)
        names = [name for name, _ in norm.named_parameters()]
        return {"parameters": names, "weight_D": norm.weight}

    def sixteen_bits(rng, dtype, size):
        """Rows of whole numbers whose mean square is the square of a whole number.

        So a sum is the same in any order, and no result lies so near the middle between two numbers
        of 16 bits that another order of operations would round it the other way.
        """
        root = rng.choice([19, 21, 23, 29, 31])
        up_to = torch.arange(2 * root + 1)
        three_N3 = torch.cartesian_prod(up_to, up_to, up_to)
        rest_N = 4 * root**2 - three_N3.square().sum(dim=1)
        fourth_N = rest_N.clamp(min=0).sqrt().round().long()
        fours_N4 = torch.cat((three_N3, fourth_N[:, None]), dim=1)[fourth_N.square() == rest_N]
        n_rows, n_fours = rng.int(5, 9), rng.int(10, 14)
        pick_RN = rng.integers(len(fours_N4), n_rows, n_fours)
        x_RD = fours_N4[pick_RN].flatten(1) * (2 * rng.integers(2, n_rows, 4 * n_fours) - 1)
        weight_D = (3 + rng.integers(13, 4 * n_fours)) / 8
        return {"x": (size * x_RD).to(dtype), "weight_D": weight_D.to(dtype), "eps": 1e-6}

    def bfloat16(rng):
        return [rms_norm.sixteen_bits(rng, torch.bfloat16, 1) for _ in range(2)]

    def large_float16(rng):
        return [rms_norm.sixteen_bits(rng, torch.float16, 16)]

    def run(m, x, weight_D, eps):
        norm = m.RMSNorm(len(weight_D), eps)
        norm.weight.data = weight_D.clone()
        return {named("y", x): norm(x)}


class gemma_norm_weights:
    def case(rng, dtype=torch.float32):
        D, K, V = rng.sizes(3, 3, 9)
        shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
        for layer in range(rng.int(1, 2)):
            shapes |= {
                f"model.layers.{layer}.{name}.weight": shape
                for name, shape in (
                    ("input_layernorm", (D,)),
                    ("self_attn.q_norm", (K,)),
                    ("self_attn.q_proj", (K, D)),
                    ("post_feedforward_layernorm", (D,)),
                )
            }
        weights = {name: (0.3 * rng.randn(*shape)).to(dtype) for name, shape in shapes.items()}
        return {"weights": weights}

    def values(rng):
        return [gemma_norm_weights.case(rng) for _ in range(2)]

    def bfloat16(rng):
        return [gemma_norm_weights.case(rng, torch.bfloat16)]

    def other_names(rng):
        case = gemma_norm_weights.case(rng)
        D = rng.int(10, 15)
        case["weights"] |= {
            "model.layers.0.self_attn.q_proj.bias": rng.randn(D),
            "model.layers.0.norm_gate.weight": rng.randn(D),
            "model.layers.0.input_layernorm.bias": rng.randn(D),
            "model.layers.0.router.scale.weight": rng.randn(D),
        }
        return [case]

    def run(m, weights):
        return {"weights": m.plain_norm_weights(weights)}


class bilinear_as_swiglu:
    def case(rng, n_hidden=None, size=1.0):
        B, T, D, n = rng.sizes(4, 2, 7)
        n = n_hidden or n
        return {
            "gate_FD": size * rng.randn(n, D),
            "up_FD": rng.randn(n, D),
            "down_DF": rng.randn(D, n),
            "x_BTD": rng.randn(B, T, D),
        }

    def values(rng):
        return [bilinear_as_swiglu.case(rng) for _ in range(3)]

    def one_unit(rng):
        return [bilinear_as_swiglu.case(rng, n_hidden=1)]

    def large_and_small_gates(rng):
        return [bilinear_as_swiglu.case(rng, size=size) for size in (0.03, 30.0)]

    def run(m, gate_FD, up_FD, down_DF, x_BTD):
        new = gate, up, down = m.bilinear_as_swiglu(gate_FD, up_FD, down_DF)
        names = ("shape of gate", "shape of up", "shape of down")
        found = {name: list(w.shape) for name, w in zip(names, new, strict=True)}
        y_BTD = None
        if up.shape == gate.shape == down.T.shape and gate.shape[1] == x_BTD.shape[2]:
            y_BTD = F.linear(F.silu(F.linear(x_BTD, gate)) * F.linear(x_BTD, up), down)
        return found | {"y_BTD": y_BTD}


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.n += name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "matmul")
        return func(*args, **(kwargs or {}))


class fused_gate_up:
    def case(rng, bias):
        B, T, D, n_hidden = rng.sizes(4, 2, 9)
        numbers_N = rng.randn(400)
        return {
            "x_BTD": rng.randn(B, T, D),
            "numbers_N": numbers_N,
            "n_hidden": n_hidden,
            "bias": bias,
        }

    def values(rng):
        return [fused_gate_up.case(rng, False) for _ in range(3)]

    def biases(rng):
        return [fused_gate_up.case(rng, True) for _ in range(2)]

    def two_products(rng):
        return [fused_gate_up.case(rng, False)]

    def fused(m, x_BTD, numbers_N, n_hidden, bias):
        cfg = m.swiglu_rmsnorm.Config(d_model=x_BTD.shape[-1], bias=bias)
        mlp = m.swiglu_rmsnorm.MLP(cfg, n_hidden)
        fill(mlp, numbers_N)
        return m.FusedMLP(mlp)

    def run(m, **inputs):
        fused = fused_gate_up.fused(m, **inputs)
        found = {"gate_up_proj.weight": fused.gate_up_proj.weight}
        if inputs["bias"]:
            found["gate_up_proj.bias"] = fused.gate_up_proj.bias
        return found | {"y_BTD": fused(inputs["x_BTD"])}

    def run_two_products(m, **inputs):
        fused = fused_gate_up.fused(m, **inputs)
        with Products() as products:
            fused(inputs["x_BTD"])
        return {"parameters": shapes(fused), "products in forward": products.n}


class rms_norm_backward:
    def case(rng, n_axes, eps):
        *axes, D = rng.sizes(4, 3, 9)
        shape = (*axes[:n_axes], D)
        return {
            "x": rng.randn(*shape) + 0.3,
            "weight_D": rng.randn(D),
            "grad": rng.randn(*shape),
            "eps": eps,
        }

    def values(rng):
        return [rms_norm_backward.case(rng, 1, eps) for eps in (1e-5, 0.2, 1.0)]

    def any_axes(rng):
        return [rms_norm_backward.case(rng, n, 0.2) for n in (0, 2, 3)]

    def no_epsilon(rng):
        return [rms_norm_backward.case(rng, 1, 0.0)]

    def run(m, x, weight_D, grad, eps):
        grad_x, grad_weight_D = m.rms_norm_backward(x, weight_D, grad, eps)
        return {named("grad_x", x): grad_x, "grad_weight_D": grad_weight_D}


class turned_stream:
    def case(rng, **changes):
        B, T, D, n_hidden, K, V = rng.sizes(6, 3, 12)
        n_kv_heads = rng.int(1, 2)
        sizes = {
            "vocab_size": V, "n_layers": 1, "d_model": D, "n_kv_heads": n_kv_heads,
            "n_heads": 2 * n_kv_heads, "head_dim": 2 * (K // 2), "d_ff": n_hidden,
            "d_latent": None, "bias": False,
        }  # fmt: skip
        turn_DD, _ = torch.linalg.qr(rng.randn(D, D))
        return {
            "sizes": sizes | changes,
            "numbers_N": rng.randn(12_000),
            "turn_DD": turn_DD,
            "tokens_BT": rng.integers(V, B, T),
        }

    def grouped_attention(rng):
        return [turned_stream.case(rng, n_layers=n) for n in (2, 1)]

    def latent_attention(rng):
        C, Q, U = rng.sizes(3, 2, 9)
        widths = {"d_latent": C, "d_rope": 4, "d_value": U}
        return [turned_stream.case(rng, d_q_latent=q, **widths) for q in (Q, None)]

    def biases(rng):
        latent = {"d_latent": rng.int(3, 9), "d_q_latent": 5, "d_rope": 2, "d_value": 3}
        return [turned_stream.case(rng, bias=True), turned_stream.case(rng, bias=True, **latent)]

    def given_model_kept(rng):
        return [turned_stream.case(rng)]

    def model(m, sizes, numbers_N):
        model = m.swiglu_rmsnorm.Transformer(m.swiglu_rmsnorm.Config(**sizes)).eval()
        fill(model, 0.5 * numbers_N)
        return model

    def run_given_model_kept(m, sizes, numbers_N, turn_DD, tokens_BT):
        model = turned_stream.model(m, sizes, numbers_N)
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        m.turned(model, turn_DD)
        after = dict(model.named_parameters())
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        return {"parameters that changed": changed}

    def run(m, sizes, numbers_N, turn_DD, tokens_BT):
        new, output_VD = m.turned(turned_stream.model(m, sizes, numbers_N), turn_DD)
        found = {}

        def look(name, module):
            def hook(_, args):
                found[f"{name}_BTD"] = args[0]

            module.register_forward_pre_hook(hook)

        for i, block in enumerate(new.blocks):
            look(f"stream_before_attention_{i}", block)
            look(f"stream_before_mlp_{i}", block.mlp_norm)
        look("stream_at_the_end", new.norm)
        new.norm.register_forward_hook(lambda _, args, out: found.update(normed=out))
        new(tokens_BT)
        found["logits_BTV"] = found.pop("normed") @ output_VD.T
        norms = [(name, p) for name, p in new.named_parameters() if "norm" in name]
        found["norms with weights other than one"] = [n for n, p in norms if not (p == 1).all()]
        return found
