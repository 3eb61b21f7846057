"""Text to tokens and back: the checkpoint's tokenizer.json, or the tokenizer.model of the remote
code, through the `tokenizers` library.

Every GLM-4 prompt begins with `[gMASK] <sop>`. Some tokenizer.json add the two by themselves and
some do not, so here they are always added by hand, once. Text is only ever text: a "<|user|>" in it
becomes ordinary tokens, never the special one.

A token is some bytes, and the bytes of all tokens are UTF-8: that is what decoding does, in one
piece or as tokens come.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from glm4.checkpoint_file import read_file
from glm4.tokenizer_model import byte_letters, convert_tokenizer, errors_of_tokenizers

PREFIX = ("[gMASK]", "<sop>")
BYTES = {letter: byte for byte, letter in enumerate(byte_letters())}


class Tokenizer:
    def __init__(self, folder: str | Path) -> None:
        """Raises ValueError or OSError, in one line, if `folder` has no usable tokenizer.json or,
        without one, tokenizer.model."""
        files = [Path(folder) / name for name in ("tokenizer.json", "tokenizer.model")]
        self.path = next(filter(os.path.lexists, files), None)  # a link without an end is an error
        if self.path is None:
            raise FileNotFoundError(f"{folder}: tokenizer.json is missing")
        if self.path.suffix == ".model":
            self.backend = convert_tokenizer(self.path)
        else:
            data = read_file(self.path)
            with errors_of_tokenizers(f"{self.path}: not a tokenizer that can be read"):
                self.backend = Backend.from_buffer(data)
        self.backend.encode_special_tokens = True
        self.backend.no_padding()
        self.backend.no_truncation()
        decoder = self.backend.decoder
        if not isinstance(decoder, decoders.ByteLevel):
            kind = type(decoder).__name__
            raise ValueError(f"{self.path}: decoder must be ByteLevel, as GLM-4's is, got {kind}")
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = {id_ for id_, token in added.items() if token.special}
        self.bytes: dict[int, bytes] = {}
        self.prefix = [self.special(token) for token in PREFIX]

    def special(self, token: str) -> int:
        """The id of a special token."""
        id_ = self.backend.token_to_id(token)
        if id_ is None:
            raise ValueError(f"{self.path}: has no {token} token, so it is not one of GLM-4")
        return id_

    def encode(self, text: str) -> list[int]:
        """A prompt's tokens: `[gMASK] <sop>` and the text. Raises ValueError on empty text."""
        if not text:
            raise ValueError("the prompt is empty")
        try:
            text.encode()
        except UnicodeEncodeError:  # a lone surrogate, from bytes of the command line
            raise ValueError("the prompt is not valid UTF-8") from None
        with errors_of_tokenizers(f"{self.path}: cannot encode the prompt"):
            return self.prefix + self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, without special tokens; broken UTF-8 becomes U+FFFD."""
        return b"".join([self.bytes_of(token) for token in tokens]).decode(errors="replace")

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for; nothing, if it is special or unknown."""
        if token not in self.bytes:
            known = None if token in self.special_ids else self.backend.id_to_token(token)
            text = known or ""
            letters = [BYTES[letter] for letter in text if letter in BYTES]
            # Text that was added to the vocabulary stands there as it is.
            self.bytes[token] = text.encode() if len(letters) < len(text) else bytes(letters)
        return self.bytes[token]


class TextStream:
    """Decodes tokens one by one. A character whose bytes are not all there yet is held back, so
    that the pieces and `end()` together are `decode` of all tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self.decoder.decode(self.tokenizer.bytes_of(token))

    def end(self) -> str:
        """What was held back, with U+FFFD for the bytes that never came."""
        return self.decoder.decode(b"", final=True)
