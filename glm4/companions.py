"""What `glm4 quantize` passes on besides tensors and config.json: the tokenizer, its template, the
defaults of generation, the licence. Who made the checkpoint chose what lies under these names."""

from __future__ import annotations

import json
import os
import re
import stat
import warnings
from pathlib import Path

from glm4.hub import COMPANIONS
from glm4.tensor_files import CheckpointError
from glm4.tokenizer_model import convert_tokenizer
from glm4.working_folder import WorkingFolder

LIMIT = 64 << 20  # bytes of a companion; GLM-4's tokenizer.json has 20 MB


def copy_companions(source: Path, target: WorkingFolder, remote_code: bool) -> None:
    """All of `COMPANIONS` that there are; tokenizer.model becomes tokenizer.json.

    Raises:
        CheckpointError: one is no regular file, is a link out of the folder, or is too large.
        ValueError: tokenizer.model is not one of GLM-4.
    """
    found = {name: source / name for name in COMPANIONS if os.path.lexists(source / name)}
    ranks = source / "tokenizer.model"
    for name, path in found.items():
        data = read_file(path)
        if name == "tokenizer_config.json" and remote_code:
            data = without_code(path, data)
        target.write(name, data)
    if "tokenizer.json" not in found and os.path.lexists(ranks):
        read_file(ranks)
        text = convert_tokenizer(ranks).to_str(pretty=True)
        target.write("tokenizer.json", text.encode())
    elif "tokenizer.json" not in found:
        warnings.warn(
            f"{source}: has neither tokenizer.json nor tokenizer.model, so what is written has no "
            "tokenizer either; copy one into it",
            stacklevel=4,
        )


def without_code(path: Path, data: bytes) -> bytes:
    """A tokenizer_config.json whose class is code beside it, which is not copied."""
    try:
        given = json.loads(data)
        if not isinstance(given, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    given.pop("auto_map", None)
    given["tokenizer_class"] = "PreTrainedTokenizerFast"
    return as_json(given)


def as_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_file(path: Path, limit: int = LIMIT) -> bytes:
    """All of a file of a checkpoint.

    Raises:
        CheckpointError: it is none, or larger than `limit` bytes, or not `contained` in its folder.
    """
    try:
        place = contained(path, path.parent)
        if not stat.S_ISREG(place.stat().st_mode):  # opening a device can have effects
            raise CheckpointError(f"{path}: must be a regular file")
        # It may be another by now: a FIFO would be waited for.
        handle = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW)
        with open(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: must be a regular file")
            if status.st_size > limit:
                raise CheckpointError(f"{path}: must have at most {limit >> 20} MB")
            return file.read(status.st_size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def contained(path: Path, folder: Path) -> Path:
    """Where the links of `path`, a file of the checkpoint `folder`, lead.

    Raises:
        CheckpointError: out of the folder, and not to where the Hub's cache keeps its files.
        OSError: there is nothing.
    """
    place, home = (Path(os.path.realpath(one, strict=True)) for one in (path, folder))
    if place.is_relative_to(home):
        return place
    repository, cache = home.parent.parent, home.parent.parent.parent
    if home.parent.name == "snapshots" and repository.name.startswith("models--"):
        # Since huggingface_hub 2 a blob may itself be a link, to one that repositories share.
        shared = rf"{re.escape(str(cache / 'blobs'))}/[0-9a-f]{{2}}/[0-9a-f]{{64}}"
        if place.parent == repository / "blobs" or re.fullmatch(shared, str(place)):
            return place
    raise CheckpointError(
        f"{path}: is a link to {place}, outside of the checkpoint's folder; put the file itself "
        "there"
    )
