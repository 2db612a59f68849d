"""Chapter 8's tokenizers against other libraries, and against ids that the original gave.

To make data/gemma3_tokens.json again, from the tokenizer.json of google/gemma-3-270m:

    python -m tests.test_ch08_tokenizer tokenizer.json
"""

import json
import random
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from ch01_gpt2.tokenizer import MERGES_FILE, PIECES, byte_of_char, gpt2_tokenizer, gpt2_tokens
from ch08_full_models.download import CheckpointError
from ch08_full_models.gguf_file import GGUF, read_gguf
from ch08_full_models.tokenizer import Tokenizer, from_folder, from_gguf

GOLDEN = Path(__file__).parent / "data" / "gemma3_tokens.json"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

# The patterns as others publish them: Meta's llama-models, Qwen's code; SmolLM2's is rewritten for
# tiktoken, which has one pattern where tokenizers first takes out the digits.
PATTERNS = {
    "gpt-2": PIECES,
    "smollm": (
        r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
    ),
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}

EDGES = [
    "",
    " ",
    "\n",
    "Hello, world!",
    "   leading and trailing   ",
    "\t\ttabs\r\nand \r\n\r\n line ends\n\n\n",
    "no\u00a0break \u3000wide \u2028line \u2029paragraph \u200bzero \ufeffmark \x85next",
    "".join(map(chr, range(256))),
    "it's IT'S I'll I'LL we've we're I'm he'd it’s 's 'S ' s 'sa '' 'ss 'll'l 'vex",
    "1234567890 12 345,678.90 ²³ ½ Ⅷ ٣٤٥ ४५६ 一二三",
    "e\u0301 a\u0308\u0323 \u0301 lone \u0301\u0302, नमस्ते दुनिया, ไทย, עִבְרִית, عَرَبِيّ",
    "你好，世界。こんにちは 안녕하세요 Привет мир Γειά σου",
    "🙂 👩‍👩‍👧‍👦 👩🏽‍🚀 🇫🇷🇯🇵 1️⃣ ❤️ 🏴\U000e0067\U000e0062\U000e007f \u200d\u200d a\u200db",
    "\ufe0f \ue000 \uf8ff \U000f0000 \uffff \U0010ffff \u0378 \x00\x00 \x7f\x1b[0m",
    "def f(x):\n    if x:\n\t\treturn {'a': [1, 2.5e-3]}  # why\n\n\n",
    "<b>bold</b> <br/> <table><tr> </ td></table> a<b>c >  </ <h1",
    "\u2581 \u2581\u2581 \u2581\u2581\u2581a\u2581 b \u2581 ",
    "<0x0A> <0xE2><0x96><0x81> <0x41>",
    *(char * n for char in (" ", "\n", "\t", "\u2581") for n in (2, 3, 16, 30, 31, 32, 33, 62, 95)),
    *(" " * n + "word" + " " * n + "\n" for n in (1, 2, 5, 31, 32, 33, 63)),
    "a" * 300 + "ab" * 150 + "!?" * 100,
]


def stable_chars() -> list[str]:
    """Characters on whose class all libraries agree: it has not changed since Unicode 3.2.

    Among them are controls, private use, lone marks, digits of many scripts, and code points far
    from any script that will be added, which nobody has assigned.
    """
    old = unicodedata.ucd_3_2_0.category
    chars = map(chr, [*range(0xD800), *range(0xE000, 0x110000)])
    same = [c for c in chars if old(c) == unicodedata.category(c) != "Cn"]
    return same + [chr(0x40000 + 997 * i) for i in range(500)] + ["\ufffe", "\ufdd0", "\U0001ffff"]


CHARS = stable_chars()
MARKS = [c for c in CHARS if unicodedata.category(c).startswith("M")]
DIGITS = [c for c in CHARS if unicodedata.category(c).startswith("N")]
CONTROLS = [c for c in CHARS if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cn")]


def random_texts(n: int, seed: int, words: list[str]) -> list[str]:
    """Texts of all sorts of pieces, `words` among them."""
    rng = random.Random(seed)
    pieces = [piece for text in EDGES[:18] for piece in text.split(" ") if piece]
    sources: list[Callable[[], str]] = [
        lambda: " ",
        lambda: rng.choice(words) + " ",
        lambda: rng.choice(words),
        lambda: rng.choice(pieces),
        lambda: rng.choice(CHARS),
        lambda: rng.choice(rng.choice([MARKS, DIGITS, CONTROLS])),
        lambda: rng.choice("0123456789'’.,-<>/_ ") * rng.randrange(1, 4),
        lambda: rng.choice([" ", "\n", "\t", "\r\n", " \n", "\u2581"]) * rng.randrange(1, 40),
        lambda: "".join(rng.choice("abest ") for _ in range(8)),
    ]
    return ["".join(rng.choice(sources)() for _ in range(rng.randrange(1, 20))) for _ in range(n)]


def gguf_of(**fields: object) -> GGUF:
    """A GGUF file that holds a vocabulary and nothing else."""
    names = {"chat_template": "tokenizer.chat_template"}
    return GGUF(
        Path("small.gguf"),
        {names.get(key, f"tokenizer.ggml.{key}"): value for key, value in fields.items()},
        infos={},
        data_start=0,
    )


# Vocabularies small enough to make here


def training_lines() -> list[str]:
    """Lines of GPT-2's commonest tokens, the common ones most often."""
    tokens = [token.decode("utf-8", "ignore") for token in gpt2_tokens()[256:4000]]
    rng = random.Random(0)
    weights = [1 / (10 + i) for i in range(len(tokens))]
    return ["".join(rng.choices(tokens, weights, k=8)).strip() for _ in range(3000)]


WORDS = [word for line in training_lines()[:300] for word in line.split()]


def byte_level_vocabulary(n_vocab: int = 1500) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE; the first three tokens are control tokens."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(training_lines(), trainer)
    model = json.loads(library.to_str())["model"]
    return [*model["vocab"]], [" ".join(merge) for merge in model["merges"]]


def in_tiktoken(fields: dict, pattern: str) -> tiktoken.Encoding:
    """The same vocabulary in tiktoken, which finds merges by rank and knows no list of merges."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    byte_of = byte_of_char()
    ranks = {
        bytes(byte_of[char] for char in token): i
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == NORMAL
    }
    # It wants all 256 bytes; these get ranks that nothing reaches.
    for byte in range(256):
        ranks.setdefault(bytes([byte]), len(tokens) + byte)
    special = {t: i for i, (t, k) in enumerate(zip(tokens, kinds, strict=True)) if k == CONTROL}
    return tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def assert_same_as_tiktoken(
    ours: Tokenizer, reference: tiktoken.Encoding, texts: list[str]
) -> None:
    """Both give the same ids and the same text, with control tokens read as such and not."""
    for text in texts:
        expected = reference.encode(text, allowed_special="all", disallowed_special=())
        ids = ours.encode(text)
        assert ids == expected, f"{text!r}: {ids}, but tiktoken says {expected}"
        plain = ours.encode(text, parse_special=False)
        assert plain == reference.encode_ordinary(text), f"{text!r} as plain text"
        assert ours.decode(plain) == reference.decode(plain)


@pytest.mark.parametrize("split", PATTERNS)
def test_byte_level_from_gguf(split: str) -> None:
    """Guards each way to cut text, merges in their order, and control tokens in a text."""
    tokens, merges = byte_level_vocabulary()
    kinds = [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3)
    gguf = gguf_of(model="gpt2", pre=split, tokens=tokens, token_type=kinds, merges=merges)
    texts = EDGES + random_texts(1500, seed=1, words=[*WORDS, *tokens[:3], "<|im_end|", "I'LL"])
    if split == "qwen2":
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    assert_same_as_tiktoken(from_gguf(gguf), in_tiktoken(gguf.fields, PATTERNS[split]), texts)


def test_qwen_normalizes() -> None:
    """Guards the NFC that Qwen's tokenizer begins with, and that no other one has it."""
    tokens, merges = byte_level_vocabulary()
    kinds = [NORMAL] * len(tokens)
    two, one = "e\u0301", "\u00e9"
    for split in PATTERNS:
        vocabulary = {"tokens": tokens, "token_type": kinds, "merges": merges}
        tokenizer = from_gguf(gguf_of(model="gpt2", pre=split, **vocabulary))
        assert (tokenizer.encode(two) == tokenizer.encode(one)) == (split == "qwen2")
        assert tokenizer.decode(tokenizer.encode(two)) == (one if split == "qwen2" else two)


def test_llama3_takes_whole_words() -> None:
    """Guards ignore_merges: Llama 3 has words in its vocabulary that no merges lead to."""
    tokens, merges = byte_level_vocabulary()
    tokens.append("qzxqzx")
    for split, whole in {"llama-bpe": True, "qwen2": False}.items():
        vocabulary = {"tokens": tokens, "token_type": [NORMAL] * len(tokens), "merges": merges}
        ids = from_gguf(gguf_of(model="gpt2", pre=split, **vocabulary)).encode("qzxqzx")
        assert (ids == [len(tokens) - 1]) == whole


def sentencepiece_vocabulary() -> dict[str, list]:
    """A small vocabulary of SentencePiece's kind, in the order of Gemma's: what is found whole,
    the bytes, then what was learned, merges first. Only the first 40 letters are in it."""
    library = tokenizers.Tokenizer(models.BPE())
    trainer = BpeTrainer(vocab_size=700, limit_alphabet=40, show_progress=False)
    library.train_from_iterator((line.replace(" ", "\u2581") for line in training_lines()), trainer)
    model = json.loads(library.to_str())["model"]
    learned = ["".join(merge) for merge in model["merges"]]
    letters = [token for token in model["vocab"] if len(token) == 1]
    whole = ["\n", "\n\n", "\n\n\n", "<b>", "</b>", "  ", "   ", "    "]  # as llama.cpp writes them
    tokens = {
        **dict.fromkeys(["<unk>"], UNKNOWN),
        **dict.fromkeys(["<s>", "</s>", "<end_of_turn>"], CONTROL),
        **dict.fromkeys(whole, USER_DEFINED),
        **dict.fromkeys([f"<0x{byte:02X}>" for byte in range(256)], BYTE),
        **dict.fromkeys(learned + letters, NORMAL),
    }
    first = [*tokens].index(learned[0])
    scores = [float(first - i - 1) if i >= first else 0.0 for i in range(len(tokens))]
    return {"tokens": [*tokens], "token_type": [*tokens.values()], "scores": scores}


def in_tokenizers(vocabulary: dict[str, list], prefix: bool) -> tokenizers.Tokenizer:
    """The same in the tokenizers library, with a list of merges, as Hugging Face converts it.

    Every way to put a token together is a merge, the better token first, then the longer left part.
    """
    tokens = [t.replace(" ", "\u2581") for t in vocabulary["tokens"]]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, vocabulary["scores"], strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                merges.append((-score, -len(left), -len(right), left, right))
    merges = [(left, right) for *_, left, right in sorted(merges, key=lambda merge: merge[:3])]
    model = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    library = tokenizers.Tokenizer(model)
    to_mark = normalizers.Replace(" ", "\u2581")
    before = normalizers.Sequence([normalizers.Prepend("\u2581"), to_mark])
    library.normalizer = before if prefix else to_mark
    after = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*after, decoders.Strip(" ", 1, 0)] if prefix else after)
    for token, kind in zip(tokens, vocabulary["token_type"], strict=True):
        if kind in (CONTROL, USER_DEFINED):
            special = kind == CONTROL
            library.add_tokens([AddedToken(token, special=special, normalized=False)])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return library


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_from_gguf(prefix: bool) -> None:
    """Guards the merge loop: best score first, bytes for what is unknown, runs of spaces, tokens
    found whole, the space before a text (Llama 2 has it), bos; and the way back."""
    vocabulary = sentencepiece_vocabulary()
    special = {"bos_token_id": 1, "eos_token_id": 2, "add_space_prefix": prefix}
    ours = from_gguf(gguf_of(model="llama", **vocabulary, **special))
    reference = in_tokenizers(vocabulary, prefix)
    assert (ours.bos_id, ours.eos_ids) == (1, {2, 3})
    rng = random.Random(2)
    words = [*WORDS, "<b>", "</b>", "<s>", "<end_of_turn>", "<b", *vocabulary["tokens"][-300:]]
    for text in EDGES + random_texts(1500, seed=3, words=words):
        for plain in (False, True):
            reference.encode_special_tokens = plain
            expected = reference.encode(text, add_special_tokens=not plain).ids
            ids = ours.encode(text, bos=not plain, parse_special=not plain)
            assert ids == expected, f"{text!r}: {ids}, but tokenizers says {expected}"
            assert ours.decode(ids) == reference.decode(ids)
        ids = rng.choices(range(1, len(vocabulary["tokens"])), k=8)
        assert ours.decode(ids) == reference.decode(ids)


def test_control_tokens_cannot_be_merged() -> None:
    """Guards against a control token made of letters that somebody typed."""
    vocabulary = sentencepiece_vocabulary()
    for token in ["<e", "nd", "<end", "_of_turn>", "<end_of_turn>"]:
        if token in vocabulary["tokens"]:
            vocabulary["scores"][vocabulary["tokens"].index(token)] = 5.0
        else:
            vocabulary["tokens"].append(token)
            vocabulary["scores"].append(5.0)
            vocabulary["token_type"].append(NORMAL)
    tokenizer = from_gguf(gguf_of(model="llama", **vocabulary))
    control = tokenizer.id_of("<end_of_turn>")
    assert control in tokenizer.encode("<end_of_turn>")
    assert control not in tokenizer.encode("<end_of_turn>", parse_special=False)


def test_half_a_character_and_lone_surrogates() -> None:
    """Guards what cannot be text: it becomes U+FFFD, for each byte or each surrogate, no error."""
    tokenizer = from_gguf(gguf_of(model="llama", **sentencepiece_vocabulary(), add_space_prefix=False))
    ids = tokenizer.encode("a🤖")
    assert [tokenizer.decode(ids[:n]) for n in range(6)] == ["", "a", *("a" + "\ufffd" * n for n in (1, 2, 3)), "a🤖"]
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"
    assert tokenizer.encode("\ud83e\udd16") == tokenizer.encode("🤖")  # a pair of them is a character
    assert tokenizer.decode([-1, ids[0], 10**9]) == "a"  # a model may have more rows than tokens


@pytest.mark.parametrize("text", ["a" * 100_000, "ab" * 50_000, "\U0001f916" * 25_000])
def test_long_texts_are_quick(text: str) -> None:
    """Guards against a merge loop that is quadratic: on these it would take hours."""
    tokenizer = from_gguf(gguf_of(model="llama", **sentencepiece_vocabulary(), add_space_prefix=False))
    start = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - start < 10  # seconds
    assert tokenizer.decode(ids) == text


BAD_FIELDS = [
    ("model", "unigram", "model is 'unigram', expected gpt2 or llama"),
    ("model", None, "model is None"),
    ("tokens", None, "tokens is no list of str"),
    ("tokens", [], "tokens is no list of str"),
    ("tokens", [1, 2], "tokens is no list of str"),
    ("token_type", [1, 1], "token_type has 2 entries for"),
    ("token_type", "x", "token_type is no list of int"),
    ("scores", [0.5], "scores has 1 entries for"),
    ("scores", None, "scores is no list of float"),
    ("bos_token_id", 10**6, "bos_token_id is 1000000, expected one of"),
    ("eos_token_id", "2", "eos_token_id is '2', expected one of"),
    ("eot_token_id", -1, "eot_token_id is -1, expected one of"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_FIELDS)
def test_bad_sentencepiece_fields(key: str, value: object, message: str) -> None:
    """Guards against a vocabulary whose parts do not belong together."""
    with pytest.raises(CheckpointError, match=f"^small.gguf: tokenizer.ggml.{message}"):
        from_gguf(gguf_of(**({"model": "llama"} | sentencepiece_vocabulary() | {key: value})))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pre", "tekken", "pre is 'tekken', expected one of gpt-2, smollm"),
        ("pre", ["smollm"], "pre is "),
        ("merges", None, "merges is no list of str"),
        ("merges", ["no-space"], "merges: "),
        ("merges", ["Ġ unheard-of"], "merges: "),
    ],
)
def test_bad_byte_level_fields(key: str, value: object, message: str) -> None:
    """Guards the same for merges."""
    tokens, merges = byte_level_vocabulary(600)
    vocabulary = {"tokens": tokens, "token_type": [NORMAL] * len(tokens), "merges": merges}
    with pytest.raises(CheckpointError, match=f"^small.gguf: tokenizer.ggml.{message}"):
        from_gguf(gguf_of(**({"model": "gpt2", "pre": "gpt-2"} | vocabulary | {key: value})))


def test_lacking_byte() -> None:
    """Guards against a vocabulary that cannot write every text."""
    vocabulary = sentencepiece_vocabulary()
    vocabulary["tokens"][vocabulary["tokens"].index("<0x41>")] = "<0xQQ>"
    with pytest.raises(CheckpointError, match="small.gguf: tokenizer.ggml.tokens lacks .*<0x41>"):
        from_gguf(gguf_of(model="llama", **vocabulary))
