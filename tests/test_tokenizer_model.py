"""tokenizer.model to tokenizer.json, on the demo model's tokenizer taken back to that form."""

from __future__ import annotations

import base64
import json
import os
import resource

import pytest
from tokenizers import Tokenizer

import glm4.tokenizer
from glm4.hub import DEMO
from glm4.tokenizer_model import SPECIAL, byte_letters, convert_tokenizer


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    bytes_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    vocab = json.loads((DEMO / "tokenizer.json").read_text())["model"]["vocab"]
    lines = []
    for text, rank in sorted(vocab.items(), key=lambda item: item[1]):
        token = bytes(bytes_of[letter] for letter in text)
        lines.append(b"%s %d\n" % (base64.b64encode(token), rank))
    path.write_bytes(b"".join(lines))
    return path


def test_tokens_are_the_same(tokenizer_model):
    original = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    converted = convert_tokenizer(tokenizer_model)
    text = (DEMO / "heldout.en.txt").read_text()[:20000]
    text += "'S 12345\r\n\n  日本 <|user|> naïve\t\x00 🙂"
    ids = original.encode(text).ids
    assert converted.encode(text).ids == ids
    assert converted.decode(ids) == original.decode(ids)
    assert converted.get_vocab() == original.get_vocab()
    vocab = original.get_vocab_size(with_added_tokens=False)
    assert [converted.token_to_id(token) for token in SPECIAL] == list(range(vocab, vocab + 14))
    assert converted.encode("a").tokens[:2] == ["[gMASK]", "<sop>"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:7], b"AA==", *lines[7:]], "line 8 must be base64 and a rank, got"),
        (lambda lines: [b"?? 0", *lines[1:]], "line 1 must be base64"),
        (lambda lines: [b"IQ== none", *lines[1:]], "line 1 must be base64"),
        (lambda lines: [], "must rank every byte"),
        (lambda lines: lines[:100], "must rank every byte"),
        (lambda lines: lines[:-2] + lines[-1:], "without gaps"),
        (lambda lines: [*lines, b"YWJjZGVm 3"], "without gaps"),
        (lambda lines: [*lines, b"YWJjZGVm " + b"9" * 10**6], "without gaps"),
        (
            lambda lines: [*lines, base64.b64encode(b"a" * 1025) + b" %d" % len(lines)],
            "line 1511 must be a token of at most 1024 bytes, got 1025",
        ),
    ],
)
def test_rejects(damage, message, tokenizer_model, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n".join(damage(tokenizer_model.read_bytes().splitlines())))
    with pytest.raises(ValueError, match=f"tokenizer.model: .*{message}"):
        convert_tokenizer(path)


def test_small_files_that_ask_for_much(tmp_path):
    """A token can be split in as many ways as it has bytes, each of them as long as the token."""
    path = tmp_path / "tokenizer.model"
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"%c" % letter * n for letter in b"abcd" for n in range(2, 400)]
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    path.write_bytes(b"".join(lines))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"must split into pairs of at most 64 MB"):
        convert_tokenizer(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 150 << 10  # KB
    os.truncate(path, 30 << 30)
    with pytest.raises(ValueError, match=r"tokenizer.model: must have at most 8 MB, got 30,720 MB"):
        convert_tokenizer(path)


def test_tokenizer_reads_it(tokenizer_model):
    """Where there is no tokenizer.json."""
    tokenizer = glm4.tokenizer.Tokenizer(tokenizer_model.parent)
    expected = glm4.tokenizer.Tokenizer(DEMO)
    for text in ("In the beginning", "日本 <|user|> naïve 🙂"):
        assert tokenizer.encode(text) == expected.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
