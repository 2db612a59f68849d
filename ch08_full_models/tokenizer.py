"""Tokenizers of real checkpoints: text to token ids and back, as the original does it.

    from_folder   of a Hugging Face folder: tokenizer.json, or GPT-2's vocab.json and merges.txt
    from_gguf     of a GGUF file: the vocabulary it carries

Two kinds of byte pair encoding (BPE) are behind the Tokenizer that both return:

    byte-level     GPT-2, Llama 3 and 4, Qwen, DeepSeek, OLMo 2, SmolLM. The text is cut into words
                   and numbers, each merged from its bytes up. The tokenizers library does it.
    SentencePiece  Llama 2, Gemma (Kudo and Richardson 2018). No cuts: spaces become U+2581, and
                   the text is merged from its characters up, always where the score is best. A
                   character that is not in the vocabulary is written as its bytes in UTF-8.

The library does the second kind too, given a tokenizer.json with all merges: 514,906 for Gemma. A
GGUF file has scores instead. Working out the merges and having the library sort them would take
seconds in every process; the algorithm itself is short, and stands here.
"""

import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ch08_full_models.download import CheckpointError, read_json, shorten

if TYPE_CHECKING:  # it imports torch, a second that text alone need not wait for
    from ch08_full_models.gguf_file import GGUF

# End a turn of a chat. Not every checkpoint that has one says so.
TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>")

# Looks like a control token, whatever its file calls it: DeepSeek-V3's <｜User｜> is not special
# there, and somebody who writes it into a message could make a turn of their own.
BARRED = re.compile(r"<[|｜][^<>\s]+[|｜]>")

SPACE = "\u2581"  # what a space is in SentencePiece
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6  # kinds of tokens in a GGUF file

# How Llama 3 cuts text: English endings, words with the character before them, digits by threes,
# signs, line ends, spaces. Qwen cuts digits one by one.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


class LibraryBPE:
    """A tokenizer of the tokenizers library."""

    def __init__(self, library: tokenizers.Tokenizer, bos: Sequence[int] = ()) -> None:
        """`bos` goes before a text's ids, where the library's tokenizer does not add it itself."""
        library.no_truncation()  # some tokenizer.json ask for these, left over from training
        library.no_padding()
        self.library, self.bos = library, bos
        added = library.get_added_tokens_decoder()
        self.added = {token.content: i for i, token in added.items()}
        plain = [token.content for token in added.values() if not token.special]
        barred = "|".join(re.escape(token) for token in plain if BARRED.fullmatch(token))
        self.barred = re.compile(barred or "(?!)")  # the library finds these in any text
        # Some put a space before what begins a text, and before nothing else, as transformers does
        # where it converts SentencePiece's files today.
        self.spaces_first = getattr(library.pre_tokenizer, "prepend_scheme", None) == "first"

    def encode(self, text: str, bos: bool, parse_special: bool, goes_on: bool = False) -> list[int]:
        if self.spaces_first:
            self.library.pre_tokenizer.prepend_scheme = "never" if goes_on else "first"
        self.library.encode_special_tokens = not parse_special
        # So a text is cut within them.
        cuts = [] if parse_special else [found.start() + 1 for found in self.barred.finditer(text)]
        first, *rest = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
        ids = self.library.encode(first, add_special_tokens=bos).ids
        for part in rest:
            ids += self.library.encode(part, add_special_tokens=False).ids
        return [*self.bos, *ids] if bos else ids

    def decode(self, ids: list[int]) -> str:
        return self.library.decode(ids)

    def token_of(self, token_id: int) -> str | None:
        return self.library.id_to_token(token_id)


class Ids:
    """The ids of many tokens by their text, in a sixth of a dict's memory, and built sooner.

    The tokens' hashes lie in order, each token's id beside its hash.
    """

    def __init__(self, tokens: list[str], ids: Sequence[int]) -> None:
        import numpy as np  # here, since most tokenizers do without

        hashes = np.fromiter((hash(tokens[i]) for i in ids), np.int64, len(ids))
        order = np.argsort(hashes, kind="stable")
        self.tokens = tokens
        self.hashes = array("q", hashes[order].tobytes())
        self.ids = array("q", np.asarray(ids, np.int64)[order].tobytes())

    def get(self, token: str) -> int | None:
        """The token's id, the last one if it has several; None if it has none."""
        wanted = hash(token)
        at = bisect_right(self.hashes, wanted)
        while at and self.hashes[at - 1] == wanted:
            at -= 1
            if self.tokens[self.ids[at]] == token:
                return self.ids[at]
        return None


class SentencePieceBPE:
    """SentencePiece's BPE, from the tokens, scores and kinds of tokens in a GGUF file."""

    def __init__(
        self, tokens: list[str], scores: list[float], kinds: list[int], prefix: str, bos: list[int]
    ) -> None:
        """`prefix` goes before each text, `bos` before its ids. KeyError: a byte has no token."""
        self.tokens, self.scores = tokens, array("d", scores)
        self.kinds = bytes(kind if 0 <= kind <= BYTE else 0 for kind in kinds)
        self.prefix, self.bos = prefix, bos
        by_kind: dict[int, dict[str, int]] = {CONTROL: {}, USER_DEFINED: {}, BYTE: {}}
        for i, kind in enumerate(self.kinds):
            if kind in by_kind:
                by_kind[kind][tokens[i]] = i
        # Only these are made by merging, whatever a text says.
        self.ids = Ids(tokens, [i for i, kind in enumerate(self.kinds) if kind == NORMAL])
        self.byte_ids = [by_kind[BYTE][f"<0x{byte:02X}>"] for byte in range(256)]
        self.byte_of = {i: byte for byte, i in enumerate(self.byte_ids)}
        # These are not merged but found in the text as they are. Gemma's runs of spaces are among
        # them, which llama.cpp writes with real spaces.
        self.user_defined = {t.replace(" ", SPACE): i for t, i in by_kind[USER_DEFINED].items()}
        self.added = by_kind[CONTROL] | self.user_defined

        self.lengths: dict[str, list[int]] = {}  # of these, longest first, by first character
        for length, first in sorted({(len(t), t[:1]) for t in self.added}, reverse=True):
            self.lengths.setdefault(first, []).append(length)
        firsts = "".join(map(re.escape, self.lengths))
        self.may_begin = re.compile(f"[{firsts}]" if firsts else "(?!)")

    def encode(self, text: str, bos: bool, parse_special: bool, goes_on: bool = False) -> list[int]:
        # As llama.cpp has it, the prefix comes after each control token: goes_on changes nothing.
        ids = [*self.bos] if bos else []
        for part in self.cut(text, self.added if parse_special else self.user_defined):
            if isinstance(part, int):
                ids.append(part)
                continue
            # Once more, since runs of spaces look like their tokens only now.
            for piece in self.cut(self.prefix + part.replace(" ", SPACE), self.user_defined):
                ids += [piece] if isinstance(piece, int) else self.merge(piece)
        return ids

    def cut(self, text: str, whole: dict[str, int]) -> Iterator[str | int]:
        """The text in parts: the id of each token in `whole`, and what is between them."""
        end = 0
        for found in self.may_begin.finditer(text):
            start = found.start()
            if start < end:  # within the token before
                continue
            for length in self.lengths[found[0]]:
                token_id = whole.get(text[start : start + length])
                if token_id is not None:
                    if start > end:
                        yield text[end:start]
                    yield token_id
                    end = start + length
                    break
        if end < len(text):
            yield text[end:]

    def merge(self, text: str) -> list[int]:
        """The ids of a text, its characters merged two by two, always to the best token there is.

        A heap holds every pair that makes a token. It is never searched for pairs that are gone:
        they are noticed when they come up. So n characters take n log n steps, not n squared.
        """
        n, ids, scores = len(text), self.ids, self.scores
        symbols = list(text)  # the token that starts at each place, or "" where one goes on
        after, before = list(range(1, n + 1)), list(range(-1, n - 1))  # where neighbours start
        heap: list[tuple[float, int, str]] = []

        def offer(i: int) -> None:
            if 0 <= i and after[i] < n:
                token = symbols[i] + symbols[after[i]]
                token_id = ids.get(token)
                if token_id is not None:
                    heappush(heap, (-scores[token_id], i, token))  # of equal scores, the leftmost

        for i in range(n):
            offer(i)
        while heap:
            _, i, token = heappop(heap)
            j = after[i]
            if not symbols[i] or j == n or symbols[i] + symbols[j] != token:
                continue
            symbols[i], symbols[j] = token, ""
            after[i] = after[j]
            if after[i] < n:
                before[after[i]] = i
            offer(before[i])
            offer(i)

        merged: list[int] = []
        for symbol in filter(None, symbols):
            token_id = ids.get(symbol)
            if token_id is not None:
                merged.append(token_id)
            else:  # a single character
                merged += [self.byte_ids[byte] for byte in symbol.encode()]
        return merged

    def decode(self, ids: list[int]) -> str:
        shown = [i for i in ids if self.token_of(i) is not None]
        shown = [i for i in shown if self.kinds[i] in (NORMAL, USER_DEFINED, BYTE)]
        text = ""
        for is_bytes, group in groupby(shown, self.byte_of.__contains__):
            if is_bytes:
                raw = bytes(self.byte_of[i] for i in group)
                try:
                    text += raw.decode()
                except UnicodeDecodeError:  # as the tokenizers library has it: one for each byte
                    text += "\ufffd" * len(raw)
            else:
                text += "".join(self.tokens[i] for i in group).replace(SPACE, " ")
        return text.removeprefix(self.prefix and " ")

    def token_of(self, token_id: int) -> str | None:
        return self.tokens[token_id] if 0 <= token_id < len(self.tokens) else None


class Tokenizer:
    """Text to token ids and back, and what the checkpoint says of its control tokens."""

    def __init__(
        self,
        model: LibraryBPE | SentencePieceBPE,
        bos_id: int | None,
        eos_id: int | None,
        eos_ids: set[int],
        chat_template: str | None,
    ) -> None:
        """`eos_ids` are ends besides eos_id and the ends of a chat's turn."""
        self.model = model
        self.bos_id = bos_id
        self.bos_token = None if bos_id is None else model.token_of(bos_id)
        self.eos_token = None if eos_id is None else model.token_of(eos_id)
        self.eos_ids = {eos_id, *eos_ids, *map(self.id_of, TURN_ENDS)} - {None}
        self.chat_template = chat_template  # the checkpoint's own, in Jinja

    def encode(
        self, text: str, bos: bool = True, parse_special: bool = True, goes_on: bool = False
    ) -> list[int]:
        """The text's token ids.

        They begin with bos_id if the original tokenizer adds it, unless `bos` is False. Without
        `parse_special` a control token in the text, "<|im_end|>", is text like any other: what
        somebody else wrote must not end a turn. A text that `goes_on` follows a control token.
        """
        # A terminal's bytes that are not UTF-8 arrive as lone surrogates, which nothing can encode.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.model.encode(text, bos, parse_special, goes_on)

    def decode(self, ids: list[int]) -> str:
        """The ids' text. Control tokens are left out; bytes that are not UTF-8 become U+FFFD."""
        return self.model.decode(ids)

    def id_of(self, token: str) -> int | None:
        """The id of a control token, "<|im_end|>". None for a token that is made of text."""
        return self.model.added.get(token)

    def chat(self, messages: list[dict[str, str]], thinking: bool | None = None) -> list[int]:
        """The ids of a conversation, up to where the assistant's answer begins. `thinking` tells a
        model that can do either whether to think first; None leaves it to the chat template."""
        from ch08_full_models.chat import encode_chat

        return encode_chat(self, messages, thinking=thinking)


# A Hugging Face folder


def from_folder(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, or None if it has none of a kind that is read.

    CheckpointError, with the file's name, for one that is damaged.
    """
    settings, generation, config = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    )
    if (folder / "tokenizer.json").is_file():
        library = read_tokenizer(folder / "tokenizer.json")
    elif (folder / "merges.txt").is_file() and config.get("model_type", "gpt2") == "gpt2":
        library = read_gpt2(folder / "vocab.json", folder / "merges.txt")
        settings = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"} | settings
    else:
        return None
    text_config = config.get("text_config")  # a multimodal checkpoint's language model
    configs = [generation, config, text_config if isinstance(text_config, dict) else {}]
    bos_ids = [i for c in configs for i in token_ids(folder, c, "bos_token_id")]
    eos_ids = [i for c in configs for i in token_ids(folder, c, "eos_token_id")]
    if "bos_token" in settings:  # Qwen's says null there, and has an id in its config all the same
        bos_ids = named_ids(library, settings["bos_token"])
    eos_ids = named_ids(library, settings.get("eos_token")) + eos_ids
    model = LibraryBPE(library)
    if settings.get("add_bos_token") is True and bos_ids[:1] != model.encode("", True, True)[:1]:
        model.bos = bos_ids[:1]  # DeepSeek-V3's tokenizer.json leaves it to whoever reads this
    return Tokenizer(
        model,
        bos_id=bos_ids[0] if bos_ids else None,
        eos_id=eos_ids[0] if eos_ids else None,
        eos_ids={*eos_ids},
        chat_template=read_chat_template(folder, settings),
    )


def read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    """A tokenizer.json."""
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library has no narrower one
        raise CheckpointError(f"{file}: no valid tokenizer: {shorten(str(error), 200)}") from error


def read_gpt2(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer, from the two files that OpenAI published."""
    try:
        library = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:
        what = f"no valid vocabulary and merges: {shorten(str(error), 200)}"
        raise CheckpointError(f"{vocab}, {merges.name}: {what}") from error
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    return library


def token_ids(folder: Path, config: dict, key: str) -> list[int]:
    """The ids at a key of a config: there may be none, one, or a list."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise CheckpointError(f"{folder}: {key} is {value!r}, expected a token's id, or a list")
    return ids


def named_ids(library: tokenizers.Tokenizer, token: str | dict | None) -> list[int]:
    """The id of a token named in tokenizer_config.json, if there is one."""
    name = token.get("content") if isinstance(token, dict) else token
    token_id = library.token_to_id(name) if isinstance(name, str) else None
    return [] if token_id is None else [token_id]


def read_chat_template(folder: Path, settings: dict) -> str | None:
    """The chat template, in its own file or in tokenizer_config.json: one, or several by name."""
    file, template = folder / "chat_template.jinja", settings.get("chat_template")
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except ValueError as error:
            raise CheckpointError(f"{file}: not UTF-8 ({error})") from error
    if isinstance(template, list):
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, str | None):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: chat_template is no text")
    return template


# A GGUF file


def from_gguf(gguf: "GGUF") -> Tokenizer:
    """The tokenizer in a GGUF file. CheckpointError for a vocabulary that does not make one."""
    fields = gguf.fields
    tokens = read_list(gguf, "tokens", str)
    kinds = read_list(gguf, "token_type", int, len(tokens))
    special = {}
    for name in ("bos", "eos", "eot"):
        token_id = fields.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None and not (type(token_id) is int and 0 <= token_id < len(tokens)):
            what = f"{name}_token_id is {token_id!r}, expected one of {len(tokens)} tokens"
            raise gguf.error(f"tokenizer.ggml.{what}")
        special[name] = token_id

    kind, split = (fields.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    adds_bos = fields.get("tokenizer.ggml.add_bos_token", kind == "llama" or split == "llama-bpe")
    bos = [special["bos"]] if adds_bos and special["bos"] is not None else []
    if kind == "gpt2":
        model = LibraryBPE(byte_level(gguf, tokens, kinds, str(split)), bos)
    elif kind == "llama":
        scores = read_list(gguf, "scores", float, len(tokens))
        prefix = SPACE if fields.get("tokenizer.ggml.add_space_prefix", True) else ""
        try:
            model = SentencePieceBPE(tokens, scores, kinds, prefix, bos)
        except KeyError as error:
            raise gguf.error(f"tokenizer.ggml.tokens lacks the byte {error}") from None
    else:
        raise gguf.error(f"tokenizer.ggml.model is {kind!r}, expected gpt2 or llama")
    template = fields.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise gguf.error("tokenizer.chat_template is no text")
    return Tokenizer(model, special["bos"], special["eos"], {special["eot"]}, template)


def read_list(gguf: "GGUF", name: str, kind: type, length: int | None = None) -> list:
    """A list from the vocabulary, with entries of that kind."""
    values = gguf.fields.get(f"tokenizer.ggml.{name}")
    # A list in a GGUF file has entries of one kind, so the first stands for all.
    if not isinstance(values, list) or [type(value) for value in values[:1]] != [kind]:
        raise gguf.error(f"tokenizer.ggml.{name} is no list of {kind.__name__}")
    if length not in (None, len(values)):
        raise gguf.error(f"tokenizer.ggml.{name} has {len(values)} entries for {length} tokens")
    return values


def byte_level(
    gguf: "GGUF", tokens: list[str], kinds: list[int], split: str
) -> tokenizers.Tokenizer:
    """A byte-level tokenizer; `split` is llama.cpp's name for how it cuts text."""
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)  # cuts as GPT-2 does, then the same
    splits = {
        "gpt-2": [gpt2],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), gpt2],
        "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), to_bytes],
        "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated"), to_bytes],
    }
    if split not in splits:
        raise gguf.error(f"tokenizer.ggml.pre is {split!r}, expected one of {', '.join(splits)}")
    merges = [tuple(merge.split(" ")) for merge in read_list(gguf, "merges", str)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        # Llama 3 takes a word that is a token as it is, even where no merges lead to it.
        model = models.BPE(vocabulary, merges, ignore_merges=split == "llama-bpe")
    except Exception as error:  # the library has no narrower one
        raise gguf.error(f"tokenizer.ggml.merges: {shorten(str(error), 200)}") from error
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.Sequence(splits[split])
    library.decoder = decoders.ByteLevel()
    if split == "qwen2":
        library.normalizer = normalizers.NFC()
    library.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    return library
