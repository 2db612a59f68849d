"""Attention without the table of scores: tiles and an online softmax, in plain torch.

Not a new architecture: the same result, summed up tile by tile. The sum so far shrinks whenever a
larger score turns up (Milakov and Gimelshein 2018, section 3). FlashAttention (Dao et al. 2022,
section 3.1, algorithm 1) does so in a kernel that keeps a tile in the GPU's fast memory. Here it
shows the memory, not the speed: a loop over tiles in Python is slow.

    B  sequences in the batch         T  tokens that ask, in this call or in one tile
    S  tokens attention can see       U  those of them in one tile
    H  query heads                    K  width of one head
    J  key/value heads                G  query heads that share one: H/J
    1  an axis of length one

    python -m ch03_gqa.flash    peak memory of both ways, in seconds
"""

import argparse
import math
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LENGTHS = (512, 1024, 2048, 4096)  # tokens
HEADS = (4, 2, 32)  # H, J and K


def flash_attention(
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJK: Tensor,
    mask_BTS: Tensor,
    scale: float,
    tile: int = 128,
) -> Tensor:
    """Scaled dot-product attention, (B, T, H, K): what `attend` gives, but for rounding.

    `tile` is the most tokens on either side that are multiplied at a time; ValueError below 1. The
    mask comes whole, a byte a pair of tokens; a kernel would make its tiles from the positions.
    Autograd keeps the weights of all tiles; the paper's backward pass computes them again.
    """
    if tile < 1:
        raise ValueError(f"tile: {tile}, expected 1 or more tokens")
    parts = zip(q_BTHK.split(tile, dim=1), mask_BTS.split(tile, dim=1), strict=True)
    rows = [attend_rows(q, k_BSJK, v_BSJK, mask, scale, tile) for q, mask in parts]
    return torch.cat(rows, dim=1)


def attend_rows(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, mask_BTS: Tensor, scale: float, tile: int
) -> Tensor:
    """The result's rows for one tile of queries, (B, T, H, K), from all tiles of keys.

    Divides once, at the end (Dao 2023, FlashAttention-2, section 3.1), where the first paper does
    so in every tile. A row with nothing to see is 0/0, as in `attend`.
    """
    q_BTJGK = q_BTHK.unflatten(2, (k_BSJK.shape[2], -1))
    out_BTJGK = torch.zeros_like(q_BTJGK)
    sum_BTJG1 = torch.zeros_like(q_BTJGK[..., :1])
    # Not -inf: for a row that has seen nothing yet, -inf - -inf would be NaN.
    max_BTJG1 = torch.full_like(sum_BTJG1, torch.finfo(q_BTHK.dtype).min)
    tiles = zip(
        k_BSJK.split(tile, dim=1),
        v_BSJK.split(tile, dim=1),
        mask_BTS[:, :, None, None].split(tile, dim=-1),
        strict=True,
    )
    for k_BUJK, v_BUJK, mask_BT11U in tiles:
        scores_BTJGU = torch.einsum("BTJGK,BUJK->BTJGU", q_BTJGK, k_BUJK) * scale
        scores_BTJGU = scores_BTJGU.masked_fill(~mask_BT11U, -math.inf)
        # Any number may be subtracted, so no gradient flows through the largest.
        new_max_BTJG1 = scores_BTJGU.detach().amax(dim=-1, keepdim=True).maximum(max_BTJG1)
        rescale_BTJG1 = (max_BTJG1 - new_max_BTJG1).exp()
        weights_BTJGU = (scores_BTJGU - new_max_BTJG1).exp()
        sum_BTJG1 = sum_BTJG1 * rescale_BTJG1 + weights_BTJGU.sum(dim=-1, keepdim=True)
        tile_BTJGK = torch.einsum("BTJGU,BUJK->BTJGK", weights_BTJGU, v_BUJK)
        out_BTJGK = out_BTJGK * rescale_BTJG1 + tile_BTJGK
        max_BTJG1 = new_max_BTJG1
    return (out_BTJGK / sum_BTJG1).flatten(2, 3)


def attend(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, mask_BTS: Tensor, scale: float
) -> Tensor:
    """Scaled dot-product attention, (B, T, H, K): query head h reads key/value head h // G."""
    q_BTJGK = q_BTHK.unflatten(2, (k_BSJK.shape[2], -1))
    scores_BJGTS = torch.einsum("BTJGK,BSJK->BJGTS", q_BTJGK, k_BSJK) * scale
    scores_BJGTS = scores_BJGTS.masked_fill(~mask_BTS[:, None, None], -math.inf)
    weights_BJGTS = scores_BJGTS.softmax(dim=-1)
    return torch.einsum("BJGTS,BSJK->BTJGK", weights_BJGTS, v_BSJK).flatten(2, 3)


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that torch makes inside it, while they live.

    Views share their tensor's memory, which is counted once. What an operation needs only inside
    itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}  # bytes by address; 0 for memory from outside
        self.peak = 0

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        self.note((args, kwargs), made_here=False)
        result = func(*args, **kwargs)
        self.note(result, made_here=True)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result

    def note(self, tree: object, made_here: bool) -> None:
        """Enters the memory of all tensors in the tree until the last of its users is gone."""
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                address = storage.data_ptr()
                if address not in self.sizes:
                    self.sizes[address] = storage.nbytes() * made_here
                    weakref.finalize(storage, self.sizes.pop, address)


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes of tensors alive at once that the function made, its result included."""
    with LiveBytes() as live:
        function()
    return live.peak


def compare(n: int, tile: int) -> tuple[int, int, float]:
    """For n tokens: the peak bytes of `attend` and of the tiles, and the largest difference."""
    H, J, K = HEADS
    q_BTHK = torch.randn(1, n, H, K)
    k_BSJK, v_BSJK = torch.randn(2, 1, n, J, K)
    mask_BTS = torch.ones(1, n, n, dtype=torch.bool).tril()
    inputs = (q_BTHK, k_BSJK, v_BSJK, mask_BTS, K**-0.5)
    results = []
    direct = peak_bytes(lambda: results.append(attend(*inputs)))
    tiled = peak_bytes(lambda: results.append(flash_attention(*inputs, tile=tile)))
    return direct, tiled, (results[0] - results[1]).abs().max().item()


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tile = 128
    print("{} query heads on {} key/value heads of width {}, causal, float32:".format(*HEADS))
    print(
        f"peak memory in MiB, directly and in tiles of {tile}, and the results' largest difference"
    )
    print("   T = S     direct     tiles   difference")
    for n in LENGTHS:
        direct, tiled, difference = compare(n, tile)
        print(f"{n:8,} {direct / 2**20:10.2f} {tiled / 2**20:9.2f}   {difference:.1e}")


if __name__ == "__main__":
    main()
