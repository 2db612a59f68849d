"""Inputs for chapter 3's exercises."""

import torch


class grouped_attend:  # noqa: N801
    def inputs(rng, n_groups=None):
        B, T, S, J, G, K = rng.sizes(6, 2, 9)
        G = n_groups or G
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

    def one_group(rng):
        return [grouped_attend.inputs(rng, 1)]

    def nothing_hidden(rng):
        case = grouped_attend.inputs(rng)
        return [case | {"mask_BTS": torch.ones_like(case["mask_BTS"])}]

    def run(m, q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale):
        return {"y_BTHK": m.attend(q_BTHK, k_BSJK, v_BSJK, mask_BTS, scale)}
