"""tokenizer.model to tokenizer.json, on the demo model's tokenizer taken back to that form."""

from __future__ import annotations

import base64
import json

import pytest
from tokenizers import Tokenizer

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
    ],
)
def test_rejects(damage, message, tokenizer_model, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n".join(damage(tokenizer_model.read_bytes().splitlines())))
    with pytest.raises(ValueError, match=f"tokenizer.model: .*{message}"):
        convert_tokenizer(path)
