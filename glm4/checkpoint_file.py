"""One file of a checkpoint, opened with suspicion: who made the checkpoint chose what lies there.

Only regular files are opened, links must end where `place_of` says, and sizes are known before
anything is read. Every error is a `CheckpointError`: one line that names the file.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

# Bytes of a JSON file that Python parses: an index of 50,000 tensors has 5 MB, and objects can take
# twenty times as much memory as their text.
JSON_LIMIT = 16 << 20
# Bytes of a file that is read at once for others: GLM-4's tokenizer.json has 20 MB.
FILE_LIMIT = 64 << 20

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
DEPTH_LIMIT = 100  # objects and lists within each other
MESSAGE_LIMIT = 2000  # characters; a name out of a damaged file may have millions


class CheckpointError(ValueError):
    """A checkpoint that is not what it should be; the message, one line, names the file."""

    def __init__(self, message: str) -> None:
        if len(message) > MESSAGE_LIMIT:
            half = MESSAGE_LIMIT // 2
            message = f"{message[:half]} ... {message[-half:]}"
        super().__init__(one_line(message))


def one_line(message: str) -> str:
    """`message`, which may quote names out of a damaged file, without a character that moves the
    cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)


def place_of(path: Path, anywhere: bool = False) -> Path:
    """Where the file at `path` lies, links resolved.

    The folder of a checkpoint may be a link to any place; its user named it. A file in it may be a
    link only if that ends inside the folder or, in a snapshot of the Hub's cache, among the blobs:

        CACHE/models--org--name/snapshots/REVISION   the folder
        CACHE/models--org--name/blobs/               of this repository
        CACHE/blobs/xx/<64 hex digits>               shared by all, since huggingface_hub 2

    Else a checkpoint that came from elsewhere could name a file of the user's, which
    `glm4 quantize` would copy into one that is then published.

    Args:
        anywhere: the link may end in any place. For weights, which often lie on another disk: no
            more is read of them than numbers, in the shapes that config.json asks for.

    Raises:
        CheckpointError: nothing is there, or it lies elsewhere.
    """
    try:
        folder, place = (Path(os.path.realpath(p, strict=True)) for p in (path.parent, path))
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        if isinstance(error, FileNotFoundError):
            link = os.readlink(path) if path.is_symlink() else None
            reason = f"is a link to {link}, which is not there" if link else "no such file"
        raise CheckpointError(f"{path}: {reason}") from None
    if not (anywhere or place.is_relative_to(folder) or is_blob(place, folder)):
        raise CheckpointError(
            f"{path}: is a link to {place}, outside of the checkpoint's folder; put the file "
            "itself there, or name the folder in which it lies"
        )
    return place


def is_blob(place: Path, folder: Path) -> bool:
    """Whether a snapshot `folder` of the Hub's cache may link to `place`; both without links, so
    that the folders of blobs are none either."""
    if folder.parent.name != "snapshots" or not folder.parent.parent.name.startswith("models--"):
        return False
    repository, cache = folder.parents[1], folder.parents[2]
    shared = rf"{re.escape(str(cache / 'blobs'))}/[0-9a-f]{{2}}/[0-9a-f]{{64}}"
    return place.is_relative_to(repository / "blobs") or bool(re.fullmatch(shared, str(place)))


@contextmanager
def opened(path: Path, anywhere: bool = False) -> Iterator[FileIO]:
    """The regular file at `path`, unbuffered; see `place_of`."""
    place = place_of(path, anywhere)
    try:
        check_regular(path, os.stat(place))  # first, since opening a device can have effects
        with FileIO(place, opener=open_quietly) as file:
            check_regular(path, os.fstat(file.fileno()))  # it may be another one by now
            yield file
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


def open_quietly(path: str, flags: int) -> int:
    """Without waiting for the other end of a FIFO, and through no link that was put there since."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW)


def check_regular(path: Path, status: os.stat_result) -> None:
    kinds: dict[str, Callable[[int], bool]] = {
        "a directory": stat.S_ISDIR,
        "a FIFO": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
    }
    if not stat.S_ISREG(status.st_mode):
        kind = next((kind for kind, is_one in kinds.items() if is_one(status.st_mode)), "a device")
        raise CheckpointError(f"{path}: must be a regular file, got {kind}")


def read_exactly(file: FileIO, buffer: memoryview, path: Path) -> None:
    """Fills `buffer` from where `file` stands; `path` is what an error calls it."""
    done = 0
    while done < len(buffer):
        n_bytes = file.readinto(buffer[done:])  # 2 GB at most
        if not n_bytes:
            raise CheckpointError(f"{path}: was cut short while it was read")
        done += n_bytes


def read_file(path: Path, limit: int = FILE_LIMIT) -> bytes:
    """All of the file at `path`, which has at most `limit` bytes."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(
                f"{path}: must have at most {limit >> 20} MB, got {size >> 20:,} MB"
            )
        data = bytearray(size)
        read_exactly(file, memoryview(data), path)
    refuse_pointer(path, data)
    return bytes(data)


def refuse_pointer(path: Path, start: bytes | bytearray) -> None:
    """Raises CheckpointError if a file that starts with `start` only points to the real one."""
    if start.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{path}: is a pointer of Git LFS, not the file itself; run `git lfs pull` beside it"
        )


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_file(path, JSON_LIMIT))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def parse_json(data: bytes, **hooks: Callable[[str], Any]) -> Any:
    """`json.loads`, which also refuses an object with a key twice and numbers past any sense.

    Raises:
        ValueError, RecursionError: it is none, or nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise ValueError(f"{key!r} stands there twice")
        return value

    hooks = {"parse_int": integer, **hooks}
    value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, **hooks)  # type: ignore
    level = [value]
    for _ in range(DEPTH_LIMIT):
        level = [inner for outer in level for inner in values_in(outer)]
    if level:  # what is deeper may be past what an error message could show of it
        raise ValueError(f"nested more than {DEPTH_LIMIT} deep")
    return value


def values_in(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def integer(text: str) -> int:
    if len(text) > 1000:  # before Python 3.10.7 it would take a time quadratic in its digits
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)
