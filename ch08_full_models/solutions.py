"""Chapter 8: answers to the exercises that the chapter's own files do not contain.

The letters are those of deepseek_v3.py. S counts the tokens of one page.
"""

import torch
from torch import Tensor

from ch08_full_models.deepseek_v3 import LatentAttention, causal_mask, part_pairs, rename, rope


def llama_from_meta(
    files: list[dict[str, Tensor]], n_heads: int, n_kv_heads: int
) -> dict[str, Tensor]:
    """The tensors of Meta's own files of one Llama, joined, by the names of llama3.py's parameters.

    Each file holds a part of every matrix, in the order of the files, and the norms whole. Rows of
    queries and keys come out in the order in which dimensions i and i + K/2 of a head turn
    together. Tables of rotations are left out.
    """
    names = {
        "tok_embeddings.weight": "embed.weight",
        "output.weight": "head.weight",
        "norm.weight": "norm.weight",
        "layers.{}.attention_norm.weight": "blocks.{}.attn_norm.weight",
        "layers.{}.attention.wq.weight": "blocks.{}.attn.q_proj.weight",
        "layers.{}.attention.wk.weight": "blocks.{}.attn.k_proj.weight",
        "layers.{}.attention.wv.weight": "blocks.{}.attn.v_proj.weight",
        "layers.{}.attention.wo.weight": "blocks.{}.attn.o_proj.weight",
        "layers.{}.ffn_norm.weight": "blocks.{}.mlp_norm.weight",
        "layers.{}.feed_forward.w1.weight": "blocks.{}.mlp.gate_proj.weight",
        "layers.{}.feed_forward.w2.weight": "blocks.{}.mlp.down_proj.weight",
        "layers.{}.feed_forward.w3.weight": "blocks.{}.mlp.up_proj.weight",
    }
    n_heads_of = {"wq": n_heads, "wk": n_kv_heads}
    d_model = len(files[0]["norm.weight"])
    joined = {}
    for name in files[0]:
        if name.endswith("rope.freqs"):
            continue
        parts = [file[name] for file in files]
        matrix = name.split(".")[-2]
        # Llama 2 cuts the embedding by columns, Llama 3 by rows.
        narrow = matrix == "tok_embeddings" and parts[0].shape[1] < d_model
        if matrix.endswith("norm"):
            w = parts[0]
        else:
            w = torch.cat(parts, dim=1 if narrow or matrix in ("wo", "w2") else 0)
        if matrix in n_heads_of:
            pairs = w.unflatten(0, (n_heads_of[matrix], -1, 2))
            w = pairs.transpose(1, 2).flatten(0, 2)
        joined[rename(name, names)] = w
    return joined


def deepseek_v31(messages: list[dict[str, str]], open_turn: bool, thinking: bool) -> str:
    """The conversation as DeepSeek-V3.1 reads it, with the assistant's turn opened or not.

    System messages stand at the start, wherever they were. A turn is opened only for an answer to a
    user. Old answers have lost their thoughts.
    """
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    text = "<｜begin▁of▁sentence｜>" + system
    asked = False
    for m in messages:
        if m["role"] == "user":
            text += "<｜User｜>" + m["content"]
            asked = True
        elif m["role"] == "assistant":
            answer = m["content"].split("</think>", 1)[-1]
            opening = "<｜Assistant｜></think>" if asked else ""
            text += opening + answer + "<｜end▁of▁sentence｜>"
            asked = False
    if open_turn and asked:
        text += "<｜Assistant｜>" + ("<think>" if thinking else "</think>")
    return text


def absorbed_decode(
    attn: LatentAttention,
    x_BTD: Tensor,
    pos_BT: Tensor,
    turn: tuple[Tensor, Tensor],
    pages: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """What the layer adds to the stream of new tokens, (B, T, D), and their cache rows, (B, T, W).

    pages hold all earlier tokens, oldest first, in tensors (B, S, W) of any number of tokens each.
    A row is a token's normed latent and, right of it, its rotary key as `rope` returned it. The
    token before position pos_BT[b, 0] is the last of text b's rows, and positions below zero are
    padding. No head's keys or values are made, and no scores of more than one page are held.
    """
    q_BTHK, q_rot_BTHR = attn.queries(x_BTD).split(attn.q_widths, dim=-1)
    c_BTC, k_rot_BTR = attn.kv_a_proj(x_BTD).split(attn.cache_widths, dim=-1)
    k_rot_BT1R = k_rot_BTR[:, :, None]
    if attn.interleave:
        q_rot_BTHR, k_rot_BT1R = part_pairs(q_rot_BTHR), part_pairs(k_rot_BT1R)
    q_rot_BTHR, k_rot_BTR = rope(q_rot_BTHR, turn), rope(k_rot_BT1R, turn)[:, :, 0]
    row_BTW = torch.cat((attn.kv_a_norm(c_BTC), k_rot_BTR), dim=-1)

    up_HXC = attn.kv_b_proj.weight.unflatten(0, (-1, sum(attn.kv_widths)))
    k_up_HKC, v_up_HUC = up_HXC.split(attn.kv_widths, dim=1)
    q_BTHC = torch.einsum("BTHK,HKC->BTHC", q_BTHK, k_up_HKC)
    q_BTHW = torch.cat((q_BTHC, q_rot_BTHR), dim=-1) * attn.scale

    def scores(page_BSW: Tensor, pos_BS: Tensor) -> Tensor:
        mask_BT1S = causal_mask(pos_BT, pos_BS, None)[:, :, None]
        scores_BTHS = torch.einsum("BTHW,BSW->BTHS", q_BTHW, page_BSW)
        return scores_BTHS.masked_fill(~mask_BT1S, -torch.inf)

    # The new tokens first: each sees itself, so `largest` is finite from here on.
    scores_BTHS = scores(row_BTW, pos_BT)
    largest_BTH1 = scores_BTHS.amax(dim=-1, keepdim=True)
    weight_BTHS = (scores_BTHS - largest_BTH1).exp()
    total_BTH1 = weight_BTHS.sum(dim=-1, keepdim=True)
    sum_BTHC = torch.einsum("BTHS,BSC->BTHC", weight_BTHS, row_BTW[..., : c_BTC.shape[-1]])
    first = -sum(page_BSW.shape[1] for page_BSW in pages)
    for page_BSW in pages:
        after = first + page_BSW.shape[1]
        pos_BS = pos_BT[:, :1] + torch.arange(first, after, device=pos_BT.device)
        first = after
        scores_BTHS = scores(page_BSW, pos_BS)
        before_BTH1 = largest_BTH1
        largest_BTH1 = torch.maximum(before_BTH1, scores_BTHS.amax(dim=-1, keepdim=True))
        shrink_BTH1 = (before_BTH1 - largest_BTH1).exp()
        weight_BTHS = (scores_BTHS - largest_BTH1).exp()
        total_BTH1 = total_BTH1 * shrink_BTH1 + weight_BTHS.sum(dim=-1, keepdim=True)
        c_BSC = page_BSW[..., : c_BTC.shape[-1]]
        new_BTHC = torch.einsum("BTHS,BSC->BTHC", weight_BTHS, c_BSC)
        sum_BTHC = sum_BTHC * shrink_BTH1 + new_BTHC
    y_BTHU = torch.einsum("BTHC,HUC->BTHU", sum_BTHC / total_BTH1, v_up_HUC)
    return attn.o_proj(y_BTHU.flatten(-2)), row_BTW
