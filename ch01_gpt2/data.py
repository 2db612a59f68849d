"""Text to batches of tokens, for the training runs of every chapter.

    tokens = encode(load_text())    # bytes; encode(text, 50257) gives GPT-2's tokens
    train, held_out = split(tokens, val_fraction=0.1)
    generator = torch.Generator().manual_seed(0)
    inputs_BT, targets_BT = batch(train, batch_size=16, seq_len=128, generator=generator)

Letters: N tokens of a text, B batch, T time, W = T + 1 tokens of a window.
"""

import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor


def load_text(paths: str | Path | Iterable[str | Path] | None = None) -> str:
    """The text of one or several UTF-8 files, one after the other; without any, the default text.

    ValueError with one line for a file that is missing, empty or not UTF-8.
    """
    if not paths:
        return default_text()
    return "\n".join(map(read_text, [paths] if isinstance(paths, str | Path) else paths))


def default_text() -> str:
    """About half a megabyte of English that Python itself brings: what help() says of the language.

    It differs a little from one Python version to the next, and so do the losses made with it.
    Where an installation was stripped of it, a warning says so and the standard library's source
    takes its place; ValueError where that is missing, too.
    """
    try:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name].strip() for name in sorted(topics))
    except ImportError:
        folder = Path(sysconfig.get_path("stdlib"))
        files = sorted(folder.glob("*.py"))
    if not files:
        raise ValueError(f"{folder}: no pydoc_data and no source to read; name a text file")
    warnings.warn(f"pydoc_data is missing; the text is the source in {folder}", stacklevel=3)
    return "\n\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. ValueError as for load_text."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}, expected a text file") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}, expected a text file") from None
    if not text.strip():
        raise ValueError(f"{path}: empty, expected a text file")
    return text


def encode(text: str, n_vocab: int = 256) -> Tensor:
    """The text's tokens, (N,) int64, from a vocabulary of `n_vocab`, which is the model's size too.

    256: the UTF-8 bytes, each its own id. 50257: GPT-2's tokens. Between: GPT-2's first tokens
    (gpt2_tokenizer); 1,024 already halve the length of English. ValueError for any other number.
    """
    if n_vocab == 256:
        return torch.tensor(list(text.encode("utf-8")), dtype=torch.int64)
    from ch01_gpt2.tokenizer import gpt2_tokenizer  # here, so that bytes do without tiktoken

    return torch.tensor(gpt2_tokenizer(n_vocab).encode_ordinary(text), dtype=torch.int64)


def decode(tokens: Tensor | list[int], n_vocab: int = 256) -> str:
    """The text of tokens (N,) that encode made with this `n_vocab`; broken UTF-8 becomes U+FFFD."""
    ids = torch.as_tensor(tokens).tolist()
    if n_vocab == 256:
        return bytes(ids).decode("utf-8", errors="replace")
    from ch01_gpt2.tokenizer import gpt2_tokenizer

    return gpt2_tokenizer(n_vocab).decode(ids)


def split(tokens: Tensor, val_fraction: float = 0.1) -> tuple[Tensor, Tensor]:
    """Tokens (N,) to train on, and the held-out end of the text.

    One cut, since sentences drawn at random would leave their neighbours in the other part.
    ValueError where a part would be empty.
    """
    n_val = round(len(tokens) * val_fraction)
    if not 0 < n_val < len(tokens):
        raise ValueError(f"val_fraction: {val_fraction} of {len(tokens)} tokens, a part is empty")
    return tokens[:-n_val], tokens[-n_val:]


def batch(
    tokens: Tensor, batch_size: int, seq_len: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both (B, T): windows at random places, the targets one token later.

    `generator` is all the state there is: set it back with set_state(), and the same batches come
    again. ValueError where the text is shorter than a window.
    """
    n_starts = len(tokens) - seq_len
    if n_starts < 1:
        raise ValueError(f"seq_len: {seq_len}, expected less than the text's {len(tokens)} tokens")
    start_B1 = torch.randint(n_starts, (batch_size, 1), generator=generator)
    window_BW = tokens[start_B1 + torch.arange(seq_len + 1)]
    return window_BW[:, :-1], window_BW[:, 1:]


def in_order(tokens: Tensor, batch_size: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (B, T) that cover the text once: each token but the first is one target.

    The last batches can be smaller, and the last window shorter, so a mean loss is the sum over all
    targets divided by len(tokens) - 1, not the mean of the batches' means. ValueError for a text of
    fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"tokens: {len(tokens)}, expected at least 2")
    n_windows = (len(tokens) - 1) // seq_len
    end = n_windows * seq_len
    for first in range(0, end, batch_size * seq_len):
        last = min(first + batch_size * seq_len, end)
        yield tokens[first:last].view(-1, seq_len), tokens[first + 1 : last + 1].view(-1, seq_len)
    if end < len(tokens) - 1:
        yield tokens[None, end:-1], tokens[None, end + 1 :]
