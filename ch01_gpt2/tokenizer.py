"""GPT-2's tokenizer: text to token ids and back, from a vocabulary file in this folder.

Byte pair encoding on bytes (byte-level BPE; Radford et al. 2019, section 2.2). The alphabet is the
256 bytes, so that any text in any script can be written. Training then joined, 50,000 times, the
two neighbouring tokens that stood side by side most often, and noted each merge. That list is the
whole vocabulary: a token's id is 256 plus the place of its merge in the list, and a new text is
encoded by making the merges in the same order, the lowest id first. tiktoken does that fast; all it
needs is each token's bytes and rank, and here rank and id are one number.

vocab/vocab.bpe is OpenAI's list, shipped in the folder (MIT), so nothing is ever downloaded.

    python ch01_gpt2/tokenizer.py "some text"
"""

import argparse
from functools import cache
from pathlib import Path

import tiktoken

MERGES_FILE = Path(__file__).parent / "vocab" / "vocab.bpe"
END_OF_TEXT = "<|endoftext|>"

# Text is cut into these pieces first, and no merge crosses a cut. A space goes with the word after
# it; of several spaces, only the last one does, which is what the lookahead is for.
PIECES = "|".join(
    (
        r"'s|'t|'re|'ve|'m|'ll|'d",  # English endings; lower case only, as OpenAI left it
        r" ?\p{L}+",  # letters of any script
        r" ?\p{N}+",  # digits
        r" ?[^\s\p{L}\p{N}]+",  # punctuation, symbols, emoji
        r"\s+(?!\S)",  # white space, but for its last character before a piece
        r"\s+",  # that last character, where it is not a space that the piece took along
    )
)


def byte_of_char() -> dict[str, int]:
    """The byte that each character in the vocabulary file stands for, in the order of the ids.

    A byte that prints stands for itself. The other 68, such as the space, would be lost in a text
    file, so they are written as the characters from U+0100 on: a space is Ġ, a newline Ċ.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(b): b for b in printing} | {chr(0x100 + i): b for i, b in enumerate(others)}


def gpt2_tokens() -> list[bytes]:
    """What each of the 50,256 tokens stands for; its place in the list is its id."""
    byte_of = byte_of_char()
    tokens = [bytes([byte]) for byte in byte_of.values()]
    for merge in MERGES_FILE.read_text(encoding="utf-8").splitlines()[1:]:  # after "#version"
        tokens.append(bytes(byte_of[char] for char in merge.replace(" ", "")))
    return tokens


@cache
def gpt2_tokenizer(n_vocab: int = 50257) -> tiktoken.Encoding:
    """GPT-2's tokenizer, or for a small model the one that its first `n_vocab` ids make.

    The tokens are in the order in which they were learned, so the first 1,024 of them are what the
    same training would have given, had it been stopped after 768 merges. <|endoftext|> is the last
    id, 50256, and so only in the whole vocabulary; encode() takes it from a text only where
    `allowed_special` says so. ValueError for an `n_vocab` outside 256 to 50257.
    """
    tokens = gpt2_tokens()
    if not 256 <= n_vocab <= len(tokens) + 1:
        raise ValueError(f"n_vocab: {n_vocab}, expected 256 to {len(tokens) + 1}")
    return tiktoken.Encoding(
        f"gpt2-{n_vocab}",
        pat_str=PIECES,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens[:n_vocab])},
        special_tokens={END_OF_TEXT: len(tokens)} if n_vocab > len(tokens) else {},
        explicit_n_vocab=n_vocab,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the tokens of a text.")
    parser.add_argument("text", nargs="?", default="It's tokenization, naïvely: 2 + 2 🙂")
    parser.add_argument("--n-vocab", type=int, default=50257, help="ids to use, 256 to 50257")
    args = parser.parse_args()
    tokenizer = gpt2_tokenizer(args.n_vocab)
    ids = tokenizer.encode_ordinary(args.text)
    for token in ids:
        print(f"{token:>6}  {tokenizer.decode_single_token_bytes(token)!r}")
    n_bytes = len(args.text.encode("utf-8", "replace"))
    print(f"{len(args.text)} characters, {n_bytes} bytes, {len(ids)} tokens")


if __name__ == "__main__":
    main()
