"""Chapter 1's tokenizer against Hugging Face's BPE, on every token and on thousands of texts."""

import hashlib
import itertools
import os
import random
import socket
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ch01_gpt2 import tokenizer as ours
from ch01_gpt2.tokenizer import END_OF_TEXT, MERGES_FILE, gpt2_tokenizer


def hugging_face(n_vocab: int) -> Tokenizer:
    """The reference: the library's own byte alphabet, split and merges; only the file is shared."""
    lines = MERGES_FILE.read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines[1:] if line][: n_vocab - 256]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    reference = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return reference


def assert_same(texts: list[str], n_vocab: int = 50257) -> None:
    """Both tokenizers give the same ids for each text, and ours gives the text back."""
    tokenizer = gpt2_tokenizer(n_vocab)
    for text, expected in zip(texts, hugging_face(n_vocab).encode_batch(texts), strict=True):
        ids = tokenizer.encode_ordinary(text)
        assert ids == expected.ids, f"{text!r}: {ids} but Hugging Face says {expected.ids}"
        assert tokenizer.decode(ids) == text


EDGES = [
    "",
    " ",
    "\n",
    "   leading and trailing   ",
    "\t\ttabs\r\nand \r\n\r\n line ends\n\n\n",
    "no\u00a0break \u3000wide \u2028line \u2029paragraph \u200bzero \ufeffmark \x85next",
    "".join(map(chr, range(256))),
    "it's IT'S I'll I'LL we've we're I'm he'd it’s 's 'S ' s 'sa '' 'ss 'll'l 'vex",
    "1234567890 12 345,678.90 ²³ ½ Ⅷ ٣٤٥ ४५६ 一二三",
    "e\u0301 a\u0308\u0323 \u0301 lone, नमस्ते दुनिया, ไทย, עִבְרִית, عَرَبِيّ",
    "你好，世界。こんにちは 안녕하세요 Привет мир Γειά σου",
    "🙂 👩‍👩‍👧‍👦 👩🏽‍🚀 🇫🇷🇯🇵 1️⃣ ❤️ 🏴\U000e0067\U000e0062\U000e007f",
    "\u200d\u200d a\u200db \ufe0f \ue000 \uffff \U0010ffff \x00\x00 \x7f\x1b[0m",
    f"{END_OF_TEXT} {END_OF_TEXT[:-1]}",
    "a" * 3000 + " " * 3000 + "\n" * 3000 + "!?" * 1500,
]


def test_edge_cases() -> None:
    """Guards splitting at scripts, digits, endings, white space, joiners and control characters."""
    assert_same(EDGES)


def test_random_texts() -> None:
    """Guards the same on 6,000 mixtures that nobody thought of."""
    rng = random.Random(0)
    # Characters whose class has not changed since Unicode 3.2: libraries differ in newer ones.
    old = unicodedata.ucd_3_2_0.category
    stable = [
        char
        for char in map(chr, [*range(0xD800), *range(0xE000, 0x110000, 7)])
        if old(char) == unicodedata.category(char) != "Cn"
    ]
    pieces = [part for edge in EDGES[1:-1] for part in edge.split(" ") if part]
    sources = [" ", "  \n\t", "'’-_.,!", "aestlvmrdS", "0123", pieces, stable, stable]

    def text() -> str:
        return "".join(rng.choice(rng.choice(sources)) for _ in range(rng.randrange(1, 30)))

    assert_same([text() for _ in range(6000)])


@pytest.mark.parametrize("alphabet", [" \n\ta1.", "'sldveS ", " \u00a0é\u03010²"])
def test_all_short_texts(alphabet: str) -> None:
    """Guards the order of the alternatives in the split: every text of up to four characters."""
    texts = ["".join(t) for n in range(5) for t in itertools.product(alphabet, repeat=n)]
    assert_same(texts)


def test_every_token() -> None:
    """Guards the byte map and the ids: 50,257 of them, all different, each encoded as itself."""
    tokenizer = gpt2_tokenizer()
    assert tokenizer.n_vocab == 50257
    tokens = [tokenizer.decode_single_token_bytes(i) for i in range(50257)]
    assert len(set(tokens)) == 50257
    assert set(tokens[:256]) == {bytes([byte]) for byte in range(256)}
    assert [tokenizer.encode_single_token(token) for token in tokens] == list(range(50257))
    readable = [t.decode("utf-8") for t in tokens if t.decode("utf-8", "ignore").encode() == t]
    assert len(readable) > 49000
    assert_same(readable)


@pytest.mark.parametrize("n_vocab", [256, 257, 1024, 8000])
def test_fewer_merges(n_vocab: int) -> None:
    """Guards the small vocabularies: still a BPE, with the merges that are left."""
    tokenizer = gpt2_tokenizer(n_vocab)
    assert tokenizer.n_vocab == n_vocab
    assert tokenizer.special_tokens_set == set()
    assert_same([*EDGES, Path(ours.__file__).read_text(encoding="utf-8")], n_vocab)


@pytest.mark.parametrize("n_vocab", [255, 50258, 0, -1])
def test_impossible_size(n_vocab: int) -> None:
    """Guards against a tokenizer that lacks bytes or promises tokens that there are not."""
    with pytest.raises(ValueError, match=f"n_vocab: {n_vocab}, expected 256 to 50257"):
        gpt2_tokenizer(n_vocab)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, my dog is cute", [15496, 11, 616, 3290, 318, 13779]),  # Hugging Face's manual
        ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),  # its card
        ("hello world", [31373, 995]),  # tiktoken's README and tests
    ],
)
def test_published_ids(text: str, ids: list[int]) -> None:
    """Guards the ids against sources that know nothing of our file."""
    assert gpt2_tokenizer().encode(text) == ids


def test_file_is_openai_s() -> None:
    """Guards the shipped file: the SHA-256 that tiktoken demands of OpenAI's vocab.bpe."""
    text = MERGES_FILE.read_text(encoding="utf-8")  # whatever line ends the checkout has
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    assert digest == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    assert "MIT" in (MERGES_FILE.parent / "LICENSE").read_text(encoding="utf-8")


def test_end_of_text_only_when_allowed() -> None:
    """Guards against a control token that comes in through somebody's text."""
    tokenizer = gpt2_tokenizer()
    text = f"one{END_OF_TEXT}two"
    assert tokenizer.eot_token == 50256
    assert tokenizer.encode(text, allowed_special={END_OF_TEXT}) == [505, 50256, 11545]
    with pytest.raises(ValueError, match="special token"):
        tokenizer.encode(text)
    plain = tokenizer.encode_ordinary(text)
    assert 50256 not in plain and tokenizer.decode(plain) == text
    assert tokenizer.decode([50256]) == END_OF_TEXT


def test_half_a_character_and_lone_surrogate() -> None:
    """Guards what cannot be text: both become U+FFFD, neither is an error."""
    tokenizer = gpt2_tokenizer()
    first = tokenizer.encode_ordinary("🤖")[:1]
    assert tokenizer.decode(first) == "\ufffd"
    assert tokenizer.decode(tokenizer.encode_ordinary("a\ud83db")) == "a\ufffdb"


def test_built_once_and_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a download, which is what tiktoken.get_encoding("gpt2") does."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the tokenizer opened a connection")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    assert gpt2_tokenizer.__wrapped__().encode("hello world") == [31373, 995]
    assert gpt2_tokenizer() is gpt2_tokenizer()


def test_demo_prints_pieces_on_any_console() -> None:
    """Guards the command line where the console knows ASCII only, as on old Windows code pages."""
    result = subprocess.run(
        [sys.executable, ours.__file__, "naïve 🙂"],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        r"  2616  b'na'",
        r" 38776  b'\xc3\xafve'",
        r" 32485  b' \xf0\x9f\x99\x82'",
        "7 characters, 11 bytes, 3 tokens",
    ]
