"""Inputs for chapter 6's exercises."""

import torch
from torch import Tensor, nn


def real(value):
    """A tensor of any floating type in float32; anything else as it is."""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.float() if floating else value


def whole(value):
    """A tensor of any integer type in int64; anything else as it is."""
    is_whole = isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int16, torch.uint8)
    return value.long() if is_whole else value


def pair_of(answer):
    """The two things that a router returns; None for what is not there."""
    return answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, None)


def in_order(answer):
    """A router's experts in rising order, and their weights along: their own order is free."""
    expert_NA, weight_NA = pair_of(answer)
    expert_NA, weight_NA = whole(expert_NA), real(weight_NA)
    if isinstance(expert_NA, Tensor) and isinstance(weight_NA, Tensor):
        if expert_NA.ndim == 2 and expert_NA.shape == weight_NA.shape:
            expert_NA, order_NA = expert_NA.sort(dim=1)
            weight_NA = weight_NA.gather(1, order_NA)
    return {"expert_NA": expert_NA, "weight_NA": weight_NA}


def gradients(y, towards, tensors):
    """The gradients of (y * towards).sum(); zeros where there is none."""
    if not (isinstance(y, Tensor) and y.requires_grad):
        return [torch.zeros_like(t) for t in tensors]
    loss = (y * towards).sum()
    return torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)


def counted(experts):
    """Each expert's calls from now on, as the numbers of rows that it was given."""
    rows = [[] for _ in experts]

    def wrap(forward, seen):
        def counting(x):
            seen.append(x.numel() // x.shape[-1])
            return forward(x)

        return counting

    for expert, seen in zip(experts, rows, strict=True):
        expert.forward = wrap(expert.forward, seen)
    return rows


def told(rows):
    """The calls in words, by expert."""
    words = {}
    for i, seen in enumerate(rows):
        numbers = ", ".join(map(str, seen[:4])) + ", …" * (len(seen) > 4)
        times = "once" if len(seen) == 1 else f"{len(seen)} times"
        words[f"calls_of_expert_{i}"] = f"{times}, rows: {numbers}" if seen else "never"
    return words


def liked(rng, N, I):  # noqa: E741
    """Logits (N, I) of which the later experts have the higher ones."""
    return 1.5 * rng.randn(N, I) + torch.linspace(0, 1.5, I)


def choices(rng, N, I, A):  # noqa: E741
    """A different experts for each token, (N, A), unevenly; the last expert has at least one."""
    wish_NI = liked(rng, N, I)
    wish_NI[0, -1] = 99.0
    return wish_NI.topk(A, dim=1).indices


class expert_shares:
    def values(rng):
        cases = []
        for _ in range(3):
            A, I, N = sorted(rng.sizes(3, 2, 9))  # noqa: E741
            cases.append({"expert_NA": choices(rng, N, I, A), "n_experts": I})
        return cases

    def idle_experts(rng):
        A, I, N = sorted(rng.sizes(3, 2, 9))  # noqa: E741
        return [{"expert_NA": choices(rng, N, I, A), "n_experts": I + n} for n in (1, 3)]

    def run(m, expert_NA, n_experts):
        return {"share_I": real(m.shares(expert_NA, n_experts))}


class move_balance_bias:
    def moves(rng):
        cases = []
        while len(cases) < 3:
            A, I, N = sorted(rng.sizes(3, 2, 9))  # noqa: E741
            if N * A % I:  # so no expert has just the mean
                expert_NA = choices(rng, N, I, A)
                step = rng.choice([0.01, 0.03, 0.1])
                cases.append({"choice_bias_I": rng.randn(I), "expert_NA": expert_NA, "step": step})
        return cases

    def at_the_mean(rng):
        # Eight choices among four experts: 2 is the mean; all numbers are exact in float32.
        a, b, c, d = rng.permutation(4).tolist()
        some = torch.tensor([[a, b], [a, c], [d, a], [b, d]])  # 3, 2, 1, 2 choices
        even = torch.tensor([[a, b], [c, d], [b, a], [d, c]])
        step = rng.choice([0.01, 0.03, 0.1])
        return [
            {"choice_bias_I": rng.randn(4), "expert_NA": expert_NA, "step": step}
            for expert_NA in (some, even)
        ]

    def parameter(rng):
        return move_balance_bias.moves(rng)[:1]

    def run(m, choice_bias_I, expert_NA, step):
        choice_bias_I = choice_bias_I.clone()
        m.move_bias(choice_bias_I, expert_NA, step)
        return {"choice_bias_I": choice_bias_I}

    def run_parameter(m, choice_bias_I, expert_NA, step):
        layer = nn.Module()
        layer.choice_bias = nn.Parameter(choice_bias_I.clone())
        with torch.enable_grad():
            m.move_bias(layer.choice_bias, expert_NA, step)
        return {"choice_bias_I": layer.choice_bias, "is_a_leaf": layer.choice_bias.is_leaf}


class expert_balance_loss:
    def inputs(rng, A, I, N):  # noqa: E741
        return {"logit_NI": liked(rng, N, I), "expert_NA": choices(rng, N, I, A)}

    def values(rng):
        cases = [sorted(rng.sizes(3, 2, 9)) for _ in range(3)]
        return [expert_balance_loss.inputs(rng, *sizes) for sizes in cases]

    def gradient(rng):
        return [expert_balance_loss.inputs(rng, *sorted(rng.sizes(3, 2, 9)))]

    def bfloat16(rng):
        case = expert_balance_loss.inputs(rng, 2, rng.int(6, 9), rng.int(30, 40))
        return [case | {"logit_NI": case["logit_NI"].bfloat16()}]

    def run(m, logit_NI, expert_NA):
        return {"loss": real(m.balance_loss(logit_NI, expert_NA))}

    def run_gradient(m, logit_NI, expert_NA):
        logit_NI = logit_NI.clone()
        with torch.enable_grad():
            loss = m.balance_loss(logit_NI.requires_grad_(), expert_NA)
            (grad_NI,) = gradients(loss, 1.0, [logit_NI])
        return {"grad_of_logit_NI": grad_NI}


class moe_route:
    def inputs(rng, N, D, I, A):  # noqa: E741
        return {
            "x_ND": rng.randn(N, D),
            "router_ID": rng.randn(I, D) / D**0.5,
            "choice_bias_I": 0.2 * rng.randn(I),
            "n_active": A,
        }

    def values(rng):
        cases = []
        for _ in range(3):
            A, I, N, D = *sorted(rng.sizes(2, 2, 7)), *rng.sizes(2, 8, 12)  # noqa: E741
            cases.append(moe_route.inputs(rng, N, D, I, A))
        return cases

    def ends(rng):
        I, N, D = rng.sizes(3, 3, 9)  # noqa: E741
        return [moe_route.inputs(rng, N, D, I, A) for A in (1, I)]

    def bfloat16(rng):
        # The router is the identity, so the input is the logits: exact in 16 bits, all different.
        N, I = 200, 16  # noqa: E741
        logit_NI = torch.stack([rng.permutation(I) / 16 for _ in range(N)])
        case = {"x_ND": logit_NI, "router_ID": torch.eye(I), "choice_bias_I": 0.01 * rng.randn(I)}
        return [{k: v.bfloat16() for k, v in case.items()} | {"n_active": rng.int(5, 9)}]

    def routed(m, x_ND, router_ID, choice_bias_I, n_active):
        I, D = router_ID.shape  # noqa: E741
        cfg = m.Config(d_model=D, n_experts=I, n_active=n_active, n_shared=0, d_expert=1)
        layer = m.MoE(cfg).to(x_ND.dtype)
        layer.router.weight.data.copy_(router_ID)
        layer.choice_bias.data.copy_(choice_bias_I)
        return layer.route(x_ND)

    def run(m, **inputs):
        return in_order(moe_route.routed(m, **inputs))

    def run_bfloat16(m, **inputs):
        answer = moe_route.routed(m, **inputs)
        kind = str(getattr(pair_of(answer)[1], "dtype", None))
        return {"expert_NA": in_order(answer)["expert_NA"], "type_of_weight_NA": kind}


class switch_route:
    def values(rng):
        cases = []
        for capacity in (2, 3, 4):
            I, N = rng.int(3, 5), rng.int(14, 20)  # noqa: E741
            cases.append({"logit_NI": liked(rng, N, I), "capacity": capacity})
        return cases

    def ends(rng):
        N, I = rng.sizes(2, 3, 9)  # noqa: E741
        return [
            {"logit_NI": liked(rng, N, I), "capacity": N},
            {"logit_NI": liked(rng, 2 * N, I), "capacity": 1},
            {"logit_NI": liked(rng, 1, I), "capacity": 1},
        ]

    def gradient(rng):
        I, N = rng.int(3, 5), rng.int(9, 12)  # noqa: E741
        return [{"logit_NI": liked(rng, N, I), "capacity": 3, "towards_N1": rng.randn(N, 1)}]

    def bfloat16(rng):
        N, I = rng.int(9, 12), 8  # noqa: E741
        logit_NI = torch.stack([rng.permutation(I) / 8 for _ in range(N)])  # no two are equal
        return [{"logit_NI": logit_NI.bfloat16(), "capacity": 2}]

    def run(m, logit_NI, capacity):
        expert_N1, weight_N1 = pair_of(m.switch(logit_NI, capacity))
        return {"expert_N1": whole(expert_N1), "weight_N1": real(weight_N1)}

    def run_gradient(m, logit_NI, capacity, towards_N1):
        logit_NI = logit_NI.clone()
        with torch.enable_grad():
            _, weight_N1 = pair_of(m.switch(logit_NI.requires_grad_(), capacity))
            (grad_NI,) = gradients(weight_N1, towards_N1, [logit_NI])
        return {"grad_of_logit_NI": grad_NI}


class deepseek_v3_route:
    def inputs(rng, n_groups=None):
        L, O, N = rng.int(3, 5), rng.int(3, 4), rng.int(13, 18)  # noqa: E741
        L = n_groups or L
        n_active_groups = rng.int(2, L - 1) if L > 1 else 1
        return {
            "logit_NI": 2 * rng.randn(N, L * O),
            "choice_bias_I": 0.8 * rng.rand(L * O),
            "n_active": n_active_groups + rng.int(1, 2),
            "n_groups": L,
            "n_active_groups": n_active_groups,
            "scale": rng.choice([1.5, 2.5, 2.827]),
        }

    def values(rng):
        return [deepseek_v3_route.inputs(rng) for _ in range(3)]

    def negative_scores(rng):
        cases = [deepseek_v3_route.inputs(rng) for _ in range(2)]
        return [case | {"choice_bias_I": -0.3 - case["choice_bias_I"]} for case in cases]

    def one_group(rng):
        return [deepseek_v3_route.inputs(rng, n_groups=1)]

    def bfloat16(rng):
        case = deepseek_v3_route.inputs(rng)
        N, I = case["logit_NI"].shape  # noqa: E741
        logit_NI = torch.stack([rng.permutation(I) / 8 for _ in range(N)])  # no two are equal
        return [case | {"logit_NI": logit_NI.bfloat16()}]

    def run(m, **inputs):
        return in_order(m.deepseek_v3(**inputs))


class moe_forward:
    def inputs(rng, A=2, n_shared=1, n_idle=0):
        B, T, D, I, F = rng.sizes(5, 3, 8)  # noqa: E741
        I = A + n_idle + 1 + rng.int(0, 2)  # noqa: E741
        bias_I = 0.2 * rng.randn(I)
        bias_I[I - n_idle :] = -9.0
        return {
            "x_BTD": rng.randn(B, T, D),
            "choice_bias_I": bias_I,
            "sizes": {
                "d_model": D,
                "n_experts": I,
                "n_active": A,
                "n_shared": n_shared,
                "d_expert": F,
            },
            "seed": rng.int(0, 10**6),
        }

    def values(rng):
        return [moe_forward.inputs(rng, A) for A in (2, 3, 2)]

    def calls(rng):
        return [moe_forward.inputs(rng, 2, n_idle=0), moe_forward.inputs(rng, 2, n_idle=2)]

    def ends(rng):
        one = moe_forward.inputs(rng, 2)
        return [
            moe_forward.inputs(rng, 2, n_shared=0, n_idle=2),
            moe_forward.inputs(rng, 1),
            one | {"x_BTD": one["x_BTD"][:1, :1]},
        ]

    def gradients(rng):
        case = moe_forward.inputs(rng, 2)
        return [case | {"towards_BTD": rng.randn(*case["x_BTD"].shape)}]

    def double(rng):
        cases = [moe_forward.inputs(rng, 2, n_shared) for n_shared in (0, 1)]
        return [case | {"x_BTD": case["x_BTD"].double()} for case in cases]

    def layer(m, choice_bias_I, sizes, seed):
        layer = m.MoE(m.Config(**sizes))
        generator = torch.Generator().manual_seed(seed)
        for param in layer.parameters():
            param.data.copy_(0.5 * torch.randn(param.shape, generator=generator))
        layer.choice_bias.data.copy_(choice_bias_I)
        return layer

    def run(m, x_BTD, **how):
        with torch.no_grad():
            return {"y_BTD": moe_forward.layer(m, **how).to(x_BTD.dtype)(x_BTD)}

    def run_calls(m, x_BTD, **how):
        layer = moe_forward.layer(m, **how)
        rows = counted(layer.experts)
        with torch.no_grad():
            layer(x_BTD)
        return told(rows)

    def run_gradients(m, x_BTD, towards_BTD, **how):
        layer, x_BTD = moe_forward.layer(m, **how), x_BTD.clone()
        params = [layer.router.weight, layer.experts[0].down_proj.weight]
        with torch.enable_grad():
            y_BTD = layer(x_BTD.requires_grad_())
            grads = gradients(y_BTD, towards_BTD, [x_BTD, *params])
        names = ("grad_of_x_BTD", "grad_of_router_weight_ID", "grad_of_expert_0_down_proj_DF")
        return dict(zip(names, grads, strict=True))


class expert_places:
    def inputs(rng, A, capacity=None, bias=False):
        N, D, F = rng.sizes(3, 8, 13)
        I = A + rng.int(2, 3)  # noqa: E741
        return {
            "x_ND": rng.randn(N, D),
            "expert_NA": choices(rng, N, I, A),
            "weight_NA": rng.rand(N, A) + 0.1,
            "capacity": capacity or rng.int(2, 3),
            "sizes": [I, D, F, bias],
            "seed": rng.int(0, 10**6),
        }

    def values(rng):
        return [expert_places.inputs(rng, A) for A in (2, 3, 2)]

    def many_places(rng):
        two, one = expert_places.inputs(rng, 2), expert_places.inputs(rng, 1)
        return [
            two | {"capacity": two["expert_NA"].numel() + 3},
            one | {"capacity": len(one["x_ND"])},
        ]

    def with_biases(rng):
        return [expert_places.inputs(rng, 2, capacity, bias=True) for capacity in (1, 6)]

    def calls(rng):
        case = expert_places.inputs(rng, 2)
        I = case["sizes"][0] + 1  # noqa: E741
        case |= {"expert_NA": case["expert_NA"] + 1, "sizes": [I, *case["sizes"][1:]]}
        return [case, case | {"capacity": len(case["x_ND"])}]  # nobody chooses expert 0

    def shapes_only(rng):
        return [expert_places.inputs(rng, 2)]

    def gradients(rng):
        case = expert_places.inputs(rng, 2)
        return [case | {"towards_ND": rng.randn(*case["x_ND"].shape)}]

    def experts(sizes, seed):
        I, D, F, bias = sizes  # noqa: E741
        experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, F, bias), nn.SiLU(), nn.Linear(F, D, bias)) for _ in range(I)
        )
        generator = torch.Generator().manual_seed(seed)
        for param in experts.parameters():
            param.data.copy_(0.5 * torch.randn(param.shape, generator=generator))
        return experts

    def run(m, sizes, seed, **inputs):
        with torch.no_grad():
            return {"y_ND": m.in_places(expert_places.experts(sizes, seed), **inputs)}

    def run_calls(m, sizes, seed, **inputs):
        experts = expert_places.experts(sizes, seed)
        rows = counted(experts)
        with torch.no_grad():
            m.in_places(experts, **inputs)
        return told(rows)

    def run_shapes_only(m, sizes, seed, capacity, **inputs):
        experts = expert_places.experts(sizes, seed).to("meta")
        rows = counted(experts)
        tensors = {name: tensor.to("meta") for name, tensor in inputs.items()}
        with torch.no_grad(), torch.device("meta"):
            y_ND = m.in_places(experts, **tensors, capacity=capacity)
        shape = tuple(y_ND.shape) if isinstance(y_ND, Tensor) else None
        return {"shape_of_y_ND": shape} | told(rows)

    def run_gradients(m, sizes, seed, x_ND, weight_NA, towards_ND, **inputs):
        experts = expert_places.experts(sizes, seed)
        x_ND, weight_NA = x_ND.clone(), weight_NA.clone()
        with torch.enable_grad():
            x_ND.requires_grad_(), weight_NA.requires_grad_()
            y_ND = m.in_places(experts, x_ND, weight_NA=weight_NA, **inputs)
            grads = gradients(y_ND, towards_ND, [x_ND, weight_NA, experts[-1][0].weight])
        names = ("grad_of_x_ND", "grad_of_weight_NA", "grad_of_last_expert_FD")
        return dict(zip(names, grads, strict=True))
