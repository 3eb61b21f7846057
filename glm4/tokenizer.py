"""Text to tokens and back: the checkpoint's tokenizer.json, through the `tokenizers` library.

Every GLM-4 prompt begins with `[gMASK] <sop>`. Some tokenizer.json add the two by themselves and
some do not, so here they are always added by hand, once. Text is only ever text: a "<|user|>" in it
becomes ordinary tokens, never the special one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

PREFIX = ("[gMASK]", "<sop>")


class Tokenizer:
    def __init__(self, folder: str | Path) -> None:
        """Raises ValueError or OSError, in one line, if `folder` has no usable tokenizer.json."""
        path = Path(folder) / "tokenizer.json"
        if not path.exists() and path.with_name("tokenizer.model").exists():
            raise ValueError(
                f"{folder}: holds only tokenizer.model, the format of the remote-code checkpoints, "
                "which a later release will read; take tokenizer.json from the -hf or 0414 "
                "repository of this model"
            )
        if not path.exists():
            raise FileNotFoundError(f"{folder}: tokenizer.json is missing")
        try:
            self.backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path}: not a tokenizer that can be read: {error}") from error
        self.backend.encode_special_tokens = True
        self.backend.no_padding()
        self.backend.no_truncation()
        self.prefix = [self.special(token) for token in PREFIX]

    def special(self, token: str) -> int:
        """The id of a special token."""
        id_ = self.backend.token_to_id(token)
        if id_ is None:
            raise ValueError(f"tokenizer.json has no {token} token, so it is not one of GLM-4")
        return id_

    def encode(self, text: str) -> list[int]:
        """A prompt's tokens: `[gMASK] <sop>` and the text. Raises ValueError on empty text."""
        if not text:
            raise ValueError("the prompt is empty")
        try:
            text.encode()
        except UnicodeEncodeError:  # a lone surrogate, from bytes of the command line
            raise ValueError("the prompt is not valid UTF-8") from None
        return self.prefix + self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, without special tokens; broken UTF-8 becomes U+FFFD."""
        return self.backend.decode(list(tokens))


class TextStream:
    """Decodes tokens one by one. A character whose bytes are not all there yet is held back, so
    that the pieces and `end()` together are `decode` of all tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.stream = DecodeStream(skip_special_tokens=True)
        self.tokens: list[int] = []
        self.length = 0

    def push(self, token: int) -> str:
        self.tokens.append(token)
        piece = self.stream.step(self.tokenizer.backend, token) or ""
        self.length += len(piece)
        return piece

    def end(self) -> str:
        """What was held back, with U+FFFD for the bytes that never came."""
        return self.tokenizer.decode(self.tokens)[self.length :]
