"""The files of a checkpoint, read with suspicion: JSON and safetensors, nothing else.

Every error is a `CheckpointError`: one line that names the file, and the tensor where there is one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that is not what it should be; the message, one line, names the file."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(message: str) -> str:
    """`message`, which may quote names out of a damaged file, without a character that moves the
    cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)


def read_json(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError(f"{max(keys, key=keys.count)!r} stands there twice")
        return dict(pairs)

    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Stored:
    """One tensor on disk."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it

    def read(self) -> Tensor:
        # Opened for each tensor: an open file keeps the pages that were read in this process.
        with opened(self.path) as file:
            return file.get_tensor(self.name)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({str(error) or type(error).__name__})"
        ) from None


def find_tensors(folder: Path) -> tuple[Path, dict[str, Stored]]:
    """(the file that lists them, every tensor by name) from the headers alone."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not single.is_file() and not index.is_file():
        # Tools for GPTQ name a file after its bits and groups.
        index = lone(folder.glob("*.safetensors.index.json")) or index
        single = lone(p for p in folder.glob("*.safetensors") if "-of-" not in p.name) or single
    if single.is_file():
        return single, {tensor.name: tensor for tensor in tensors_in(single)}
    if not index.is_file():
        pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".pth")]
        if pickles:
            raise CheckpointError(
                f"{folder / pickles[0]}: pickled weights can run code as they load and are not "
                "read; convert them to safetensors"
            )
        raise CheckpointError(f"{folder}: holds neither {single.name} nor {index.name}")

    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object of tensor: file")
    for name, file in weight_map.items():
        # By its name, not where it resolves to: the Hub's cache is made of links.
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
            raise CheckpointError(
                f"{index}: the file of tensor {name} must be a .safetensors beside it, got {file!r}"
            )
    stored = {}
    for file in sorted(set(weight_map.values())):
        for tensor in tensors_in(folder / file):
            if weight_map.get(tensor.name) != file:
                place = weight_map.get(tensor.name, "no file")
                raise CheckpointError(
                    f"{folder / file}: tensor {tensor.name} must not be there: {index.name} "
                    f"places it in {place}"
                )
            stored[tensor.name] = tensor
    for name, file in weight_map.items():
        if name not in stored:
            raise CheckpointError(f"{folder / file}: tensor {name} is missing")
    return index, stored


def lone(paths: Iterable[Path]) -> Path | None:
    found = list(paths)
    return found[0] if len(found) == 1 else None


def tensors_in(path: Path) -> list[Stored]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return [
            Stored(path, name, tuple(part.get_shape()), part.get_dtype())
            for name, part in slices.items()
        ]
