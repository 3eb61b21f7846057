from __future__ import annotations

import json
import time

import pytest
from checkpoints import write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4.hub import DEMO
from glm4.tokenizer import TextStream, Tokenizer

DEMO_TOKENIZER = Tokenizer(DEMO)
GMASK, SOP, USER = 1, 2, 3
TEXTS = [
    "in the beginning",
    "a<|user|>b[gMASK]<sop>",  # names of special tokens
    "naïve 北京 🦜👩‍👩‍👧 \U0010ffff",  # two, three and four bytes
    " leading, trailing \r\n\t",
    "\ufffd",  # the replacement character itself
]


@pytest.fixture(scope="module", params=[True, False], ids=["adds prefix", "adds nothing"])
def tokenizer(request, tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param))


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_with_one_prefix(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokens[:2] == [GMASK, SOP]
    assert not {GMASK, SOP, USER} & set(tokens[2:]), "text became a special token"
    assert tokenizer.decode(tokens) == text


def test_streaming_holds_back_half_characters(tokenizer):
    text = "日本🦜é."
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)[2:]]
    assert len(pieces) == len(text.encode()), "each byte must be a token here"
    assert pieces == ["", "", "日", "", "", "本", "", "", "", "🦜", "", "é", "."]
    assert stream.end() == ""


def test_streaming_ends_in_a_half_character(tokenizer):
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode("ok 🦜")[2:-1]]
    assert "".join(pieces) == "ok " and stream.end() == "\ufffd"


def test_streaming_skips_special_tokens(tokenizer):
    stream = TextStream(tokenizer)
    first, second = tokenizer.encode("é")[2:]
    assert [stream.push(token) for token in (GMASK, first, USER, second, 0)] == [
        "",
        "",
        "",
        "é",
        "",
    ]
    assert stream.end() == ""


@settings(deadline=None, database=None, derandomize=True)
@given(tokens=st.lists(st.integers(0, 1535), max_size=40))
def test_streaming_any_tokens_is_decoding_them(tokens):
    stream = TextStream(DEMO_TOKENIZER)
    text = "".join([stream.push(token) for token in tokens])
    assert text + stream.end() == DEMO_TOKENIZER.decode(tokens)


def test_streaming_is_linear_in_what_cannot_be_shown(tokenizer):
    """Bytes that never become a character: decoded from the first one again, each took longer."""
    (byte,) = tokenizer.encode("\u00ff")[3:]  # of C3 BF the second
    stream = TextStream(tokenizer)
    start = time.process_time()
    assert {stream.push(byte) for _ in range(50000)} == {"\ufffd"}
    assert time.process_time() - start < 1
    assert stream.end() == ""


@settings(deadline=None, database=None, derandomize=True)
@given(tokens=st.lists(st.integers(0, 1535) | st.integers(1524, 1530), max_size=40))
def test_decoding_is_that_of_the_library(tokens, added_texts):
    assert added_texts.decode(tokens) == added_texts.backend.decode(tokens)
    assert DEMO_TOKENIZER.decode(tokens) == DEMO_TOKENIZER.backend.decode(tokens)


@pytest.fixture(scope="module")
def added_texts(tmp_path_factory):
    """The demo's and texts added to it: of letters that stand for bytes, and of others."""
    content = json.loads((DEMO / "tokenizer.json").read_text())
    for i, text in enumerate(["日本", "é", "a b", "<think>", "ĠĊ"]):
        entry = content["added_tokens"][0] | {"id": 1524 + i, "content": text, "special": False}
        content["added_tokens"].append(entry)
    folder = tmp_path_factory.mktemp("added")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer(folder)


def changed(folder, change):
    """The small tokenizer.json, changed."""
    path = write_tokenizer(folder) / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return folder


def test_panics_of_the_library_are_one_line(tmp_path):
    """They are no Exception, and would pass every handler."""
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    folder = changed(tmp_path / "a", lambda content: content.update(normalizer=charsmap))
    with pytest.raises(ValueError, match=r"a/tokenizer.json: not a tokenizer that can be read: P"):
        Tokenizer(folder)
    split = {
        "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    folder = changed(tmp_path / "b", lambda content: content.update(pre_tokenizer=split))
    with pytest.raises(ValueError, match=r"b/tokenizer.json: cannot encode the prompt: Onig") as e:
        Tokenizer(folder).encode("a" * 40 + "b")
    assert "\n" not in str(e.value)


def test_ctrl_c_passes(tokenizer, monkeypatch):
    class Interrupted:
        def encode(self, *_, **__):
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "backend", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")


def test_other_decoders_are_refused(tmp_path):
    for decoder in (None, {"type": "ByteFallback"}):
        folder = changed(tmp_path, lambda content, decoder=decoder: content.update(decoder=decoder))
        with pytest.raises(ValueError, match=r"tokenizer.json: decoder must be ByteLevel, as GLM"):
            Tokenizer(folder)


def test_demo_tokenizer():
    tokens = DEMO_TOKENIZER.encode("In the beginning")
    assert DEMO_TOKENIZER.backend.decode(tokens, skip_special_tokens=False) == (
        "[gMASK]<sop>In the beginning"
    )


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    path = write_tokenizer(tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer(tmp_path)
    assert (
        tokenizer.decode(tokenizer.encode("longer than four tokens")) == "longer than four tokens"
    )


def test_rejects(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"^the prompt is empty$"):
        tokenizer.encode("")
    with pytest.raises(ValueError, match=r"^the prompt is not valid UTF-8$"):
        tokenizer.encode("a\udcff")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing$"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0")
    with pytest.raises(ValueError, match=r"tokenizer\.model: must rank every byte"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer that can be read: "):
        Tokenizer(tmp_path)
    content = json.loads((write_tokenizer(tmp_path / "other") / "tokenizer.json").read_text())
    text = json.dumps(content).replace("[gMASK]", "[MASK]")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"has no \[gMASK\] token"):
        Tokenizer(tmp_path)
