"""Chapter 3, exercises: telling parts of the chapter to be written by you.

    python -m tests start ch03    copies this file to ch03_gqa/my_gqa.py
    python -m tests check ch03    says what is right, and what is not

Made from the chapter's files by `python -m tests start ch03 --stubs`.
"""

import math

import torch
from torch import Tensor


# 1. longest_text: How long a text fits into the cache (4 points, 10 minutes, easy)
def longest_text(
    n_bytes: int,
    n_local: int,
    n_full: int,
    window: int,
    n_kv_heads: int,
    head_dim: int,
    number_bytes: int = 2,
) -> int | None:
    """The most tokens whose keys and values take no more than n_bytes; None if any number fits.

    n_full layers keep all tokens, n_local layers the last `window`. Each number takes number_bytes.
    """
    raise NotImplementedError("longest_text is not written yet")  # your code here


# 2. window_mask: Who may see whom, with a window and with padding (6 points, 20 minutes, medium)
def causal_mask(q_pos_BT: Tensor, k_pos_BS: Tensor, window: int | None) -> Tensor:
    """True where a query may look, (B, T, S): at itself and earlier positions, `window` in all.

    Padding has positions below zero. Texts never see it; it sees itself, since a row with nothing
    to see would be 0/0.
    """
    raise NotImplementedError("causal_mask is not written yet")  # your code here


# 3. grouped_attend: Groups of queries share a key head (7 points, 30 minutes, medium)
def attend(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, mask_BTS: Tensor, scale: float
) -> Tensor:
    """Scaled dot-product attention, (B, T, H, K): query head h reads key/value head h // G."""
    raise NotImplementedError("attend is not written yet")  # your code here


# 4. window_cache: A cache that forgets at the right moment (7 points, 25 minutes, medium)
class LayerCache:
    """What one attention layer keeps of the tokens it has seen: tensors shaped (B, seen, ...).

    A layer with a window keeps the last `window` of them.
    """

    def __init__(self, window: int | None, n_pad_B: Tensor | None = None) -> None:
        self.window = window
        self.n_pad_B = n_pad_B
        self.kept: tuple[Tensor, ...] = ()
        self.n_seen = 0

    def positions(self, tokens_BT: Tensor) -> Tensor:
        """Positions (B, T) of tokens that come next. Padding, on the left, counts below zero."""
        pos_T = self.n_seen + torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        n_pad = 0 if self.n_pad_B is None else self.n_pad_B[:, None]
        return (pos_T - n_pad).expand(tokens_BT.shape)

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Joins the new tokens to the kept ones along axis 1, oldest first.

        Returns all of them: the first new token may look at `window` - 1 old ones. Keeps fewer.
        """
        raise NotImplementedError("LayerCache.append is not written yet")  # your code here

    def n_bytes(self) -> int:
        """Memory held, in bytes, not counting the integer positions."""
        return sum(t.nbytes for t in self.kept if t.is_floating_point())


# 5. regroup_heads: Converting weights with another order of heads (7 points, 30 minutes, medium)
def regroup(weights: dict[str, Tensor], n_kv_heads: int, head_dim: int) -> dict[str, Tensor]:
    """Weights for this chapter's model from one in which query head h reads key/value head h % J.

    The logits are the same. Names, shapes and all that has no query heads stay as they are.
    """
    raise NotImplementedError("regroup is not written yet")  # your code here


# 6. sink_cache: A window that does not forget the beginning (7 points, 30 minutes, medium)
class SinkCache(LayerCache):
    """A cache whose first n_sinks tokens stay for ever (Xiao et al. 2023, section 3)."""

    def __init__(self, window: int, n_sinks: int) -> None:
        super().__init__(window)
        self.n_sinks = n_sinks

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Joins the new tokens to the kept ones along axis 1, oldest first; returns all of them.

        Then keeps the first n_sinks tokens of the text and, beside them, its last `window`.
        """
        raise NotImplementedError("SinkCache.append is not written yet")  # your code here


# 7. tiled_softmax: Softmax without the table of scores (10 points, 45 minutes, hard)
def attend_rows(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, mask_BTS: Tensor, scale: float, tile: int
) -> Tensor:
    """The result's rows for one tile of queries, (B, T, H, K), from all tiles of keys.

    Divides once, at the end (Dao 2023, FlashAttention-2, section 3.1), where the first paper does
    so in every tile. A row with nothing to see is 0/0, as in `attend`.
    """
    raise NotImplementedError("attend_rows is not written yet")  # your code here


# 8. paged_cache: One memory for many texts, in pages (12 points, 150 minutes, design)
class PagedCache:
    """Keys and values of several texts in one memory, cut into pages (Kwon et al. 2023, section 4).

    The memory is made once: n_pages pages for page_size tokens each, in float32. A text holds as
    few pages as its tokens need. A fork shares its pages with the text that it comes from, until
    one of them writes into a page that both hold; then the writer gets a copy of that page.
    `read` gives a text's tokens oldest first.
    """

    def __init__(self, n_pages: int, page_size: int, n_kv_heads: int, head_dim: int) -> None:
        raise NotImplementedError("PagedCache is not written yet")  # your code here

    def new(self) -> int:
        """Begins an empty text. Returns a number for it that no other living text has."""
        raise NotImplementedError("PagedCache is not written yet")  # your code here

    def append(self, text: int, k_TJK: Tensor, v_TJK: Tensor) -> bool:
        """Adds T tokens to the text's end: True. If pages lack for them, changes nothing: False."""
        raise NotImplementedError("PagedCache is not written yet")  # your code here

    def read(self, text: int) -> tuple[Tensor, Tensor]:
        """The text's keys and its values, each (S, J, K), in memory of their own."""
        raise NotImplementedError("PagedCache is not written yet")  # your code here

    def fork(self, text: int) -> int:
        """Begins a text with the same tokens, in the same pages. Returns its number, as `new`."""
        raise NotImplementedError("PagedCache is not written yet")  # your code here

    def free(self, text: int) -> None:
        """Ends the text. Pages that no other text holds can be given out again."""
        raise NotImplementedError("PagedCache is not written yet")  # your code here

    def n_free(self) -> int:
        """The pages that no text holds."""
        raise NotImplementedError("PagedCache is not written yet")  # your code here
