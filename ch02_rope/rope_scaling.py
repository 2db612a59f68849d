"""Chapter 2, beyond the trained length: other frequencies for `rope`, and a bias in its place.

A model trained on texts of L tokens has never seen the angles of position L and after. Five ways
to run it at `factor` times L change nothing but the frequencies of rope.py: interpolation slows
all pairs down alike; NTK-aware scaling, YaRN and Llama 3.1's rule spare the fast ones, which have
been through all of their angles; a larger base (ABF) is rope_frequencies with a larger theta. ALiBi
has no angles at all: it takes away from a score what its distance costs.

A tensor's name ends in its axes: `bias_BHTS` has shape (B, H, T, S).
    B  sequences in the batch         T  tokens in this call
    S  tokens attention can see       H  attention heads
    P  pairs of dimensions that turn together: half of a head's width
    1  an axis of length one

Run it:  python rope_scaling.py    tokens that each pair takes for a turn, method by method
"""

import argparse
import math

import torch
from torch import Tensor


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """Radians that each pair of dimensions turns a token, (P,) in float32.

    theta^(-2i/K) (Su et al. 2021, section 3.2.2).
    """
    return 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)


def position_interpolation(head_dim: int, theta: float, factor: float) -> Tensor:
    """All frequencies divided by the factor, (P,) (Chen et al. 2023, section 3.2).

    The paper divides the positions, which gives the same angles.
    """
    return rope_frequencies(head_dim, theta) / factor


def ntk_aware(head_dim: int, theta: float, factor: float) -> Tensor:
    """The frequencies of a base so large that the slowest pair slows by the factor, (P,).

    Pair i of K/2 slows by factor^(2i / (K - 2)), so the first one not at all (bloc97 2023; Peng et
    al. 2023, section 3.1). head_dim must be more than 2.
    """
    return rope_frequencies(head_dim, theta * factor ** (head_dim / (head_dim - 2)))


def yarn(
    head_dim: int,
    theta: float,
    factor: float,
    original_len: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Tensor:
    """Fast pairs as they are, slow ones divided by the factor, a ramp between them, (P,).

    Fast: beta_fast turns or more within original_len tokens; slow: beta_slow or fewer (Peng et al.
    2023, section 3.2). As in the authors' code, the ramp is straight in the pair's number and its
    ends are whole numbers; the paper's is straight in the number of turns. YaRN is these
    frequencies together with yarn_attention_factor.
    """
    freq_P = rope_frequencies(head_dim, theta)
    low = max(math.floor(pair_with_turns(beta_fast, head_dim, theta, original_len)), 0)
    high = min(math.ceil(pair_with_turns(beta_slow, head_dim, theta, original_len)), head_dim - 1)
    width = high - low or 0.001  # a step instead of a ramp, without dividing by zero
    ramp_P = ((torch.arange(head_dim // 2) - low) / width).clamp(0, 1)
    return freq_P / factor * ramp_P + freq_P * (1 - ramp_P)


def pair_with_turns(turns: float, head_dim: int, theta: float, n_tokens: int) -> float:
    """The pair, counted from 0 and not a whole number, that makes so many turns in n_tokens.

    theta^(-2i/K) n_tokens = 2 pi turns, solved for i.
    """
    return head_dim * math.log(n_tokens / (2 * math.pi * turns)) / (2 * math.log(theta))


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What multiplies cosine and sine, so that scores grow by its square; 1 for no extension.

    Against the flatter softmax over more tokens (Peng et al. 2023, section 3.4). Models of
    DeepSeek's put mscale before the logarithm and multiply the score's scale by the square instead.
    """
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def llama3(
    head_dim: int,
    theta: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_len: int,
) -> Tensor:
    """Fast pairs as they are, slow ones divided by the factor, a blend between them, (P,).

    The two limits are turns within original_len tokens, and the blend is straight in the turns
    (Llama 3.1's published code). Limits that are equal leave no pair between them.
    """
    freq_P = rope_frequencies(head_dim, theta)
    turns_P = original_len * freq_P / (2 * math.pi)
    if high_freq_factor == low_freq_factor:
        keep_P = (turns_P >= low_freq_factor).float()
    else:
        keep_P = (turns_P - low_freq_factor) / (high_freq_factor - low_freq_factor)
    keep_P = keep_P.clamp(0, 1)
    return keep_P * freq_P + (1 - keep_P) * freq_P / factor


def alibi_slopes(n_heads: int) -> Tensor:
    """What each head takes off a score for a token of distance, (H,).

    2^(-8h/H) for head h = 1, 2, ..., H (Press et al. 2021, section 3). Where H is no power of two:
    the slopes of the largest power below it, then every second one of twice as many heads, as in
    the authors' code.
    """
    n = 2 ** (n_heads.bit_length() - 1)
    exponents = [8 * h / n for h in range(1, n + 1)]
    exponents += [8 * h / (2 * n) for h in range(1, 2 * n, 2)]
    return 2.0 ** -torch.tensor(exponents[:n_heads])


def alibi_bias(slopes_H: Tensor, q_pos_BT: Tensor, k_pos_BS: Tensor) -> Tensor:
    """What is added to the scaled scores, (B, H, T, S): minus slope times distance.

    (Press et al. 2021, section 3.) Above zero for keys after the query, which the mask hides.
    """
    distance_B1TS = (q_pos_BT[:, :, None] - k_pos_BS[:, None, :])[:, None]
    return -slopes_H[:, None, None] * distance_B1TS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dim", type=int, default=32, help="width of a head")
    parser.add_argument("--theta", type=float, default=10_000.0, help="the base")
    parser.add_argument("--original-len", type=int, default=128, help="trained length, in tokens")
    parser.add_argument("--factor", type=float, default=8.0, help="how many times longer")
    args = parser.parse_args()
    head_dim, theta, factor, n = args.head_dim, args.theta, args.factor, args.original_len
    columns = {
        "plain": rope_frequencies(head_dim, theta),
        "interpolation": position_interpolation(head_dim, theta, factor),
        "NTK-aware": ntk_aware(head_dim, theta, factor),
        "base x 50": rope_frequencies(head_dim, 50 * theta),
        "YaRN": yarn(head_dim, theta, factor, n),
        "Llama 3.1": llama3(head_dim, theta, factor, 1.0, 4.0, n),
    }
    print(f"tokens a turn; trained on {n:,}, to be run on {factor * n:,.0f}; theta {theta:,.0f}")
    print("pair" + "".join(f"{name:>15}" for name in columns))
    for pair in range(head_dim // 2):
        turns = (2 * math.pi / float(freq_P[pair]) for freq_P in columns.values())
        print(f"{pair:4}" + "".join(f"{tokens:15,.1f}" for tokens in turns))
    print(f"YaRN multiplies cosine and sine by {yarn_attention_factor(factor):.4f}")
    slopes = ", ".join(f"{slope:.4f}" for slope in alibi_slopes(8).tolist())
    print(f"ALiBi with 8 heads takes off a token of distance: {slopes}")


if __name__ == "__main__":
    main()
