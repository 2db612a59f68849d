"""Answers to the exercises that the chapter's own files do not contain.

The letters are those of gqa.py, but for two in the paged cache:
    N  pages of memory   P  tokens in one page
"""

import torch
from torch import Tensor

from ch03_gqa.gqa import LayerCache


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
    token_bytes = 2 * n_kv_heads * head_dim * number_bytes  # of one layer
    n_tokens = n_bytes // (token_bytes * (n_local + n_full))
    if n_tokens < window:
        return n_tokens
    if n_full == 0:
        return None
    return (n_bytes - token_bytes * n_local * window) // (token_bytes * n_full)


def regroup(weights: dict[str, Tensor], n_kv_heads: int, head_dim: int) -> dict[str, Tensor]:
    """Weights for this chapter's model from one in which query head h reads key/value head h % J.

    The logits are the same. Names, shapes and all that has no query heads stay as they are.
    """
    regrouped = {}
    for name, weight in weights.items():
        if ".q_proj." in name:  # rows, and the numbers of the bias: G times J heads
            heads = weight.unflatten(0, (-1, n_kv_heads, head_dim))
            weight = heads.transpose(0, 1).flatten(0, 2)
        elif name.endswith(".o_proj.weight"):  # columns; its bias is as wide as the stream
            heads = weight.unflatten(1, (-1, n_kv_heads, head_dim))
            weight = heads.transpose(1, 2).flatten(1, 3)
        regrouped[name] = weight
    return regrouped


class SinkCache(LayerCache):
    """A cache whose first n_sinks tokens stay for ever (Xiao et al. 2023, section 3)."""

    def __init__(self, window: int, n_sinks: int) -> None:
        super().__init__(window)
        self.n_sinks = n_sinks

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Joins the new tokens to the kept ones along axis 1, oldest first; returns all of them.

        Then keeps the first n_sinks tokens of the text and, beside them, its last `window`.
        """
        kept = self.kept or tuple(t[:, :0] for t in new)
        self.n_seen += new[0].shape[1]
        joined = tuple(torch.cat(pair, dim=1) for pair in zip(kept, new, strict=True))
        start = max(self.n_sinks, joined[0].shape[1] - self.window)  # no token is kept twice
        self.kept = tuple(torch.cat((t[:, : self.n_sinks], t[:, start:]), dim=1) for t in joined)
        return joined


class PagedCache:
    """Keys and values of several texts in one memory, cut into pages (Kwon et al. 2023, section 4).

    The memory is made once: n_pages pages for page_size tokens each, in float32. A text holds as
    few pages as its tokens need. A fork shares its pages with the text that it comes from, until
    one of them writes into a page that both hold; then the writer gets a copy of that page.
    `read` gives a text's tokens oldest first.
    """

    def __init__(self, n_pages: int, page_size: int, n_kv_heads: int, head_dim: int) -> None:
        self.k_NPJK = torch.zeros(n_pages, page_size, n_kv_heads, head_dim)
        self.v_NPJK = torch.zeros_like(self.k_NPJK)
        self.page_size = page_size
        self.unused = list(range(n_pages))
        self.n_users = [0] * n_pages  # texts that hold the page
        self.tables: dict[int, list[int]] = {}  # text -> its pages in the order of its tokens
        self.n_tokens: dict[int, int] = {}
        self.n_made = 0

    def new(self) -> int:
        """Begins an empty text. Returns a number for it that no other living text has."""
        self.n_made += 1
        self.tables[self.n_made], self.n_tokens[self.n_made] = [], 0
        return self.n_made

    def append(self, text: int, k_TJK: Tensor, v_TJK: Tensor) -> bool:
        """Adds T tokens to the text's end: True. If pages lack for them, changes nothing: False."""
        table, n, P = self.tables[text], self.n_tokens[text], self.page_size
        n_after = n + len(k_TJK)
        copies = n % P > 0 and self.n_users[table[-1]] > 1  # the last page is begun, and shared
        n_more = -(-n_after // P) - len(table) + copies
        if n_more > len(self.unused):
            return False
        pages = [self.unused.pop() for _ in range(n_more)]
        if copies:
            shared = table.pop()
            self.k_NPJK[pages[0]] = self.k_NPJK[shared]
            self.v_NPJK[pages[0]] = self.v_NPJK[shared]
            self.n_users[shared] -= 1
        for page in pages:
            self.n_users[page] = 1
        table += pages
        place_T = torch.arange(n, n_after)
        page_T, slot_T = torch.tensor(table)[place_T // P], place_T % P
        self.k_NPJK[page_T, slot_T], self.v_NPJK[page_T, slot_T] = k_TJK, v_TJK
        self.n_tokens[text] = n_after
        return True

    def read(self, text: int) -> tuple[Tensor, Tensor]:
        """The text's keys and its values, each (S, J, K), in memory of their own."""
        table, n = self.tables[text], self.n_tokens[text]
        k_SJK, v_SJK = (t[table].flatten(0, 1)[:n] for t in (self.k_NPJK, self.v_NPJK))
        return k_SJK, v_SJK

    def fork(self, text: int) -> int:
        """Begins a text with the same tokens, in the same pages. Returns its number, as `new`."""
        child = self.new()
        self.tables[child], self.n_tokens[child] = list(self.tables[text]), self.n_tokens[text]
        for page in self.tables[child]:
            self.n_users[page] += 1
        return child

    def free(self, text: int) -> None:
        """Ends the text. Pages that no other text holds can be given out again."""
        for page in self.tables.pop(text):
            self.n_users[page] -= 1
            if self.n_users[page] == 0:
                self.unused.append(page)
        del self.n_tokens[text]

    def n_free(self) -> int:
        """The pages that no text holds."""
        return len(self.unused)
