"""Chapter 1's text and batches: windows, resuming, evaluation, and files that are no text."""

import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from ch01_gpt2.data import batch, decode, encode, in_order, load_text, split
from ch01_gpt2.tokenizer import gpt2_tokenizer


def test_default_text_needs_no_file() -> None:
    """Guards the offline default: long, English, the same at each call, little beyond ASCII."""
    text = load_text()
    assert len(text) > 300_000
    assert text == load_text() == load_text([])
    assert text.count(" the ") > 2000
    assert sum(char.isascii() for char in text) > 0.99 * len(text)


def test_stripped_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards installations without pydoc_data: the source, and said; else one clear line."""
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.warns(UserWarning, match="pydoc_data is missing"):
        text = load_text()
    assert len(text) > 300_000 and "import " in text
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="name a text file"):
        load_text()


def test_files(tmp_path: Path) -> None:
    """Guards reading: one name or several, in their order, UTF-8, byte order mark and CRLF gone."""
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_bytes("\ufeffnaïve\r\n🙂".encode())
    two.write_bytes(b"zweite")
    assert load_text(one) == load_text(str(one)) == "naïve\n🙂"
    assert load_text([two, str(one)]) == "zweite\nnaïve\n🙂"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "empty"),
        (b" \n\t ", "empty"),
        (b"fine until \xff here", "not UTF-8 at byte 11"),
        ("UTF-16".encode("utf-16"), "not UTF-8 at byte 0"),
        ("folder", "expected a text file"),
    ],
)
def test_bad_files(content: bytes | str | None, message: str, tmp_path: Path) -> None:
    """Guards the error: one line, with the file's name and what is wrong."""
    path = tmp_path / "bad.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_text([path])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("n_vocab", [256, 1024, 50257])
def test_encode_and_back(n_vocab: int) -> None:
    """Guards the vocabularies: ids in range, nothing lost, and what they are made of."""
    text = "naïve 🙂 <|endoftext|>\n"
    tokens_N = encode(text, n_vocab)
    assert tokens_N.dtype == torch.int64 and tokens_N.ndim == 1
    assert 0 <= tokens_N.min() and tokens_N.max() < n_vocab
    assert decode(tokens_N, n_vocab) == decode(tokens_N.tolist(), n_vocab) == text
    bytes_or_bpe = list(text.encode()) if n_vocab == 256 else None
    assert tokens_N.tolist() == (bytes_or_bpe or gpt2_tokenizer(n_vocab).encode_ordinary(text))
    assert encode("", n_vocab).shape == (0,)
    assert decode(encode("", n_vocab), n_vocab) == ""


def test_vocabulary_shortens_the_text() -> None:
    """Guards the figure in encode's docstring: 1,024 ids halve English, and 50,257 do more."""
    text = load_text()
    n_bytes, n_1024, n_gpt2 = (len(encode(text, n_vocab)) for n_vocab in (256, 1024, 50257))
    assert n_bytes == len(text.encode())
    assert n_gpt2 < n_1024 < n_bytes / 2


def test_bytes_need_no_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards training on bytes where tiktoken is not installed."""
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    monkeypatch.delitem(sys.modules, "ch01_gpt2.tokenizer")
    assert decode(encode("bytes")) == "bytes"
    with pytest.raises(ImportError):
        encode("bytes", 1024)


def test_broken_utf8_and_bad_size() -> None:
    """Guards a sample cut inside a character, and a size that no vocabulary has."""
    assert decode(encode("é")[:1]) == "\ufffd"
    for n_vocab in (255, 50258):
        with pytest.raises(ValueError, match="n_vocab"):
            encode("text", n_vocab)


def test_split_is_one_cut() -> None:
    """Guards the held-out part: the end of the text, nothing lost, nothing in both."""
    tokens_N = torch.arange(101)
    train_N, val_N = split(tokens_N, 0.2)
    assert len(val_N) == 20
    assert torch.equal(torch.cat([train_N, val_N]), tokens_N)
    for fraction in (0.0, 1.0, 0.001, -0.5):
        with pytest.raises(ValueError, match="val_fraction"):
            split(tokens_N, fraction)


def test_batch_is_shifted_by_one() -> None:
    """Guards the windows: neighbouring tokens, targets one later, from every place in the text."""
    tokens_N = torch.arange(100, 112)
    inputs_BT, targets_BT = batch(tokens_N, 500, 5, torch.Generator().manual_seed(0))
    assert inputs_BT.shape == targets_BT.shape == (500, 5)
    assert torch.equal(targets_BT, inputs_BT + 1)
    assert torch.equal(inputs_BT, inputs_BT[:, :1] + torch.arange(5))
    assert sorted(set(inputs_BT[:, 0].tolist())) == list(range(100, 107))
    assert targets_BT.max() == 111

    only_BT, next_BT = batch(tokens_N, 2, 11, torch.Generator())  # one window in all
    assert torch.equal(only_BT, tokens_N[:-1].expand(2, -1))
    assert torch.equal(next_BT, tokens_N[1:].expand(2, -1))
    with pytest.raises(ValueError, match="seq_len: 12, expected less than the text's 12 tokens"):
        batch(tokens_N, 2, 12, torch.Generator())


def test_batches_resume_from_the_generator() -> None:
    """Guards resuming: the generator's state is all there is, whatever torch's global one says."""
    tokens_N = encode(load_text())
    generator = torch.Generator().manual_seed(7)
    first_BT, _ = batch(tokens_N, 4, 16, generator)
    state = generator.get_state()
    expected = [batch(tokens_N, 4, 16, generator) for _ in range(3)]
    assert not torch.equal(first_BT, expected[0][0])

    resumed = torch.Generator()
    resumed.set_state(state)
    torch.rand(1)
    for inputs_BT, targets_BT in expected:
        again_BT, again_targets_BT = batch(tokens_N, 4, 16, resumed)
        assert torch.equal(again_BT, inputs_BT) and torch.equal(again_targets_BT, targets_BT)
    assert torch.equal(generator.get_state(), resumed.get_state())


def test_batch_leaves_the_global_generator_alone() -> None:
    """Guards dropout and sampling, which draw from torch's global generator."""
    before = torch.get_rng_state()
    batch(torch.arange(50), 4, 8, torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("seq_len", [1, 3, 8])
def test_evaluation_covers_each_token_once(batch_size: int, seq_len: int) -> None:
    """Guards the held-out loss: every token but the first is a target, in order, exactly once."""
    for n in range(2, 45):
        tokens_N = torch.arange(n)
        batches = list(in_order(tokens_N, batch_size, seq_len))
        inputs_N = torch.cat([inputs_BT.flatten() for inputs_BT, _ in batches])
        targets_N = torch.cat([targets_BT.flatten() for _, targets_BT in batches])
        assert torch.equal(inputs_N, tokens_N[:-1])
        assert torch.equal(targets_N, tokens_N[1:])
        for inputs_BT, targets_BT in batches:
            assert inputs_BT.shape == targets_BT.shape and inputs_BT.numel() > 0
            assert len(inputs_BT) <= batch_size and inputs_BT.shape[1] <= seq_len
        assert len(batches) <= -(-((n - 1) // seq_len) // batch_size) + 1


@pytest.mark.parametrize("n", [0, 1])
def test_evaluation_of_nothing(n: int) -> None:
    """Guards against a loss that is 0 divided by 0."""
    with pytest.raises(ValueError, match=f"tokens: {n}, expected at least 2"):
        next(in_order(torch.arange(n), 4, 8))
