"""Chapter 8: a prompt's attention in blocks of queries, which skips what no query of a block sees.

    block_attention(model)    decode.plain_decode undoes it

torch's attention on a CPU computes the scores of all queries with all keys and then hides some. A
window hides nearly all of a long text: with 4,096 tokens and a window of 512, 7 of 8 scores are
computed for nothing. Here 128 queries at a time meet the keys that at least one of them may see.
The heads that share a key head are rows of one matrix product, as in decode.py.

Scores are floats, as in torch's own kernel. A product in bfloat16 would round them before they are
exponents, and what is off by a tenth there is off by a tenth of the weight.

`load` takes this on a CPU, in bfloat16. Narrow heads without a window stay with torch's kernel,
which is as fast for them, and so do scores that are bent (Gemma 2) or latent (DeepSeek).
`python -m ch08_full_models.prompt_time` measures both.

A tensor's name ends in its axes:
    B  sequences     T  tokens in this call     S  tokens attention can see
    H  query heads   J  key/value heads         G  query heads that share one: H/J
    N  queries of a block                       C  the tokens that at least one of these may see
    E  those of them that not all may see
    K  width of one head, U of its values       M  rows of a product: N * G
    1  an axis of length one
"""

from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from ch08_full_models.decode import change_attend

BLOCK = 128  # queries
WIDE = 128  # heads so wide are faster here than in torch's kernel, with a window or without


def block_attention(model: nn.Module) -> nn.Module:
    """The model itself, its attention of more than one token by `in_blocks`."""
    for module in model.modules():
        change_attend(module, in_blocks)
    return model


def in_blocks(attend: Callable) -> Callable:
    """The family's attend, but in blocks where these are faster: with a mask or wide heads."""

    def attend_prompt(
        q_BTHK: Tensor, k_BSJK: Tensor, v_BSJU: Tensor, mask_BTS: Tensor | None, scale: float
    ) -> Tensor:
        faster = mask_BTS is not None or q_BTHK.shape[3] >= WIDE
        if q_BTHK.shape[1] == 1 or not faster or torch.is_grad_enabled() or q_BTHK.is_cuda:
            return attend(q_BTHK, k_BSJK, v_BSJU, mask_BTS, scale)
        return block_by_block(q_BTHK, k_BSJK, v_BSJU, mask_BTS, scale)

    return attend_prompt


def block_by_block(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJU: Tensor, mask_BTS: Tensor | None, scale: float
) -> Tensor:
    """Attention, (B, T, H, U). No mask: as many keys as queries, each sees all up to itself."""
    q_BJTGK = q_BTHK.unflatten(2, (k_BSJK.shape[2], -1)).transpose(1, 2)
    k_BJKS, v_BJSU = k_BSJK.float().permute(0, 2, 3, 1), v_BSJU.transpose(1, 2)
    parts = []
    for start in range(0, q_BTHK.shape[1], BLOCK):
        q_BJNGK = q_BJTGK[:, :, start : start + BLOCK]
        n = q_BJNGK.shape[2]
        if mask_BTS is None:
            first, end = 0, start + n
            hidden_BNE = torch.ones(len(q_BTHK), n, n, dtype=torch.bool).triu(1)
        else:
            seen_BNS = mask_BTS[:, start : start + n]
            seen = seen_BNS.flatten(0, 1).any(dim=0).nonzero()
            first, end = int(seen[0]), int(seen[-1]) + 1
            hidden_BNE = ~seen_BNS[:, :, first:end]
        score_BJMC = q_BJNGK.float().flatten(2, 3) @ k_BJKS[..., first:end]
        score_BJNGC = score_BJMC.mul_(scale).unflatten(2, (n, -1))
        score_BJNGE = score_BJNGC[..., -hidden_BNE.shape[2] :]
        score_BJNGE.masked_fill_(hidden_BNE[:, None, :, None], -torch.inf)
        weight_BJMC = score_BJNGC.softmax(dim=-1).type_as(v_BSJU).flatten(2, 3)
        y_BJMU = weight_BJMC @ v_BJSU[:, :, first:end]
        parts.append(y_BJMU.unflatten(2, (n, -1)).transpose(1, 2))
    return torch.cat(parts, dim=1).flatten(2, 3)
