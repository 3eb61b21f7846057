"""tokenizer.model, the tokenizer of the remote-code checkpoints, as a tokenizer.json.

Its lines are `base64(token) rank`. The rank is the token's id and its priority: of all neighbours
in a word, those join first whose whole has the lowest rank, and a word that is a token is taken as
it is. tokenizer.json lists pairs instead: each way to split each token into two tokens, in the
order of the whole's rank, which is the order of joining.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from glm4.checkpoint_file import read_file

# Bytes: of the file; of a token, which can be split in as many ways; of all pairs of tokens that
# make another. GLM-4's file has 2.6 MB; tiktoken's o200k_base, which is larger, has 128 bytes in
# its longest token and 3.2 MB in pairs. Without limits a small file could ask for any memory.
FILE_LIMIT = 8 << 20
TOKEN_LIMIT = 1024
PAIRS_LIMIT = 64 << 20

# How GLM-4's text is cut into words.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Not in the file; their ids follow its last.
SPECIAL = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)


def convert_tokenizer(path: Path) -> Tokenizer:
    """Raises ValueError, in one line, if `path` is not a tokenizer.model of GLM-4."""
    ranks = read_ranks(path)
    letters = byte_letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges: list[tuple[str, str]] = []
    n_bytes = 0
    for token in ranks:
        pairs = splits(token, ranks)
        n_bytes += len(token) * len(pairs)
        if n_bytes > PAIRS_LIMIT:
            raise ValueError(
                f"{path}: its tokens must split into pairs of at most {PAIRS_LIMIT >> 20} MB"
            )
        merges += [(names[a], names[b]) for a, b in pairs]
    vocab = {names[token]: rank for token, rank in ranks.items()}
    with errors_of_tokenizers(f"{path}: not a tokenizer that can be read"):
        return assembled(models.BPE(vocab, merges, ignore_merges=True))


def splits(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs of tokens that make `token`, in the order of their ranks."""
    halves = ((token[:i], token[i:]) for i in range(1, len(token)))
    known = [(a, b) for a, b in halves if a in ranks and b in ranks]
    return sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def assembled(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    prefix = [(token, tokenizer.token_to_id(token)) for token in ("[gMASK]", "<sop>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", pair="[gMASK] <sop> $A $B:1", special_tokens=prefix
    )
    return tokenizer


@contextmanager
def errors_of_tokenizers(what: str) -> Iterator[None]:
    """Whatever the library raises, as a ValueError of one line. A panic of it is no Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # Ctrl-C, for instance
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from None


def read_ranks(path: Path) -> dict[bytes, int]:
    """Each token's rank, in the order of the ranks."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_file(path, FILE_LIMIT).splitlines(), 1):
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            ranks[token] = int(rank) if len(rank) < 10 else -1  # no rank is as long
        except ValueError:
            raise ValueError(
                f"{path}: line {number} must be base64 and a rank, got {line[:40]!a}"
            ) from None
        if len(token) > TOKEN_LIMIT:
            raise ValueError(
                f"{path}: line {number} must be a token of at most {TOKEN_LIMIT} bytes, "
                f"got {len(token)}"
            )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: must rank every byte and number its tokens from 0 without gaps")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def byte_letters() -> list[str]:
    """The letter of each byte in tokenizer.json: itself where it prints, else from U+0100 on."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in prints]
    return [chr(b if b in prints else 0x100 + others.index(b)) for b in range(256)]
