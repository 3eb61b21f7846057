"""The tensors of a checkpoint, as safetensors holds them; read with suspicion, and nothing else.

    file       header length, 8 bytes | header, JSON | bytes of the tensors, one after the other
    header     {name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}

Headers are parsed once, by the rules of the safetensors library, and tensors are read, not mapped:
a file that is cut short under a map kills the process. What is read must still be the file that was
examined. Every error is a `CheckpointError`: one line that names the file, and the tensor where
there is one.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm4.checkpoint_file import (
    LFS_POINTER,
    CheckpointError,
    one_line,
    opened,
    parse_json,
    read_exactly,
    read_json,
    refuse_pointer,
)
from glm4_kernels.library import bad_value

STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# What is read at all; besides weights, the codes and tables of quantised ones.
READABLE_DTYPES = {**STORED_DTYPES, "I64": torch.int64, "I32": torch.int32, "I8": torch.int8}
# Bits of a value, by safetensors' name of its type.
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
HEADER_LIMIT = 100_000_000  # bytes; safetensors' own
TENSORS_LIMIT = 500_000  # of an index; links could name one file many times
PIECE = 4 << 20  # values that are read before they are converted, or copied to a GPU


@dataclass(frozen=True)
class Stored:
    """One tensor on disk."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it
    start: int  # of its bytes in the file
    version: tuple[int, ...]  # of the file; see `version_of`
    placed: bool = True  # false: the index does not know it

    def read(self) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.torch_dtype, device="cpu")
        self.read_into(tensor)
        return tensor

    def read_into(self, tensor: Tensor) -> None:
        """Fills `tensor`, contiguous and of this shape: in place if it lies in memory as it does on
        disk, else piece by piece."""
        if tensor.shape != self.shape:  # or copy_ would broadcast
            raise bad_value("read_into", "tensor", list(self.shape), list(tensor.shape))
        in_place = tensor.dtype == self.torch_dtype and tensor.device.type == "cpu"
        n_values = 0 if in_place else min(tensor.numel(), PIECE)
        buffer = torch.empty(n_values, dtype=self.torch_dtype, device="cpu")
        with opened(self.path, anywhere=True) as file:
            self.check_version(file)
            file.seek(self.start)
            for piece in tensor.view(-1).split(PIECE):
                read = piece if in_place else buffer[: len(piece)]
                read_exactly(file, read.view(torch.uint8).numpy().data, self.path)
                if not in_place:
                    piece.copy_(read)
            self.check_version(file)

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype not in READABLE_DTYPES:
            expected = ", ".join(READABLE_DTYPES)
            raise CheckpointError(
                f"{self.path}: tensor {self.name} must be {expected}, got {self.dtype}"
            )
        return READABLE_DTYPES[self.dtype]

    def check_version(self, file: FileIO) -> None:
        if version_of(file) != self.version:
            raise CheckpointError(
                f"{self.path}: has changed since it was examined; try again once it is complete"
            )


def version_of(file: FileIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def tensors_in(path: Path) -> list[Stored]:
    """What the header of a safetensors file describes; it covers the whole file, without gaps."""
    with opened(path, anywhere=True) as file:
        version, size = version_of(file), os.fstat(file.fileno()).st_size
        start = bytearray(min(size, len(LFS_POINTER)))
        read_exactly(file, memoryview(start), path)
        refuse_pointer(path, start)
        n_header = int.from_bytes(start[:8], "little")
        n_data = size - 8 - n_header
        if len(start) < 8 or n_header > HEADER_LIMIT or n_data < 0:
            raise not_whole(path, f"{size:,} bytes cannot begin with a header of {n_header:,}")
        header = bytearray(n_header)
        file.seek(8)
        read_exactly(file, memoryview(header), path)
    try:
        entries = parse_header(bytes(header), n_data)
    except (ValueError, RecursionError) as error:
        raise not_whole(path, str(error)) from None
    return [
        Stored(path, name, shape, dtype, 8 + n_header + begin, version)
        for begin, _, name, dtype, shape in entries
    ]


def not_whole(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a whole safetensors file ({reason})")


Entry = tuple[int, int, str, str, tuple[int, ...]]  # begin, end, name, dtype, shape


def parse_header(header: bytes, n_data: int) -> list[Entry]:
    """The tensors in a header, in the order of their bytes. Raises ValueError or RecursionError
    where safetensors refuses it, and for a name twice, of which that takes the last."""
    infos = parse_json(header, parse_int=size_of_text, parse_constant=no_number)
    if not isinstance(infos, dict):
        raise ValueError("its header is no object")
    texts = infos.pop("__metadata__", None)
    texts = {} if texts is None else texts
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("its __metadata__ is no object of texts")
    "".join((*infos, *texts, *texts.values())).encode()  # raises on half a surrogate pair
    entries = sorted(entry(name, info) for name, info in infos.items())
    at = 0
    for begin, end, name, dtype, shape in entries:
        if begin != at or end < begin:
            raise ValueError(f"tensor {name} lies at {begin} to {end}, its neighbour ends at {at}")
        if (end - begin) * 8 != n_bits(dtype, shape):
            raise ValueError(f"tensor {name}, {dtype} {list(shape)[:8]}, has {end - begin} bytes")
        at = end
    if at != n_data:
        raise ValueError(f"its tensors have {at:,} bytes, got {n_data:,}")
    return entries


def entry(name: str, info: Any) -> Entry:
    match info:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            if dtype in BITS and all(type(size) is int for size in (*shape, begin, end)):
                return begin, end, name, dtype, tuple(shape)
    raise ValueError(f"tensor {name} has no known dtype, shape and data_offsets")


def n_bits(dtype: str, shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
        if product >= 1 << 64:  # even where a later size is 0, as in safetensors
            raise ValueError("its sizes overflow")
    return product * BITS[dtype]


def size_of_text(text: str) -> int:
    if text.startswith("-") or len(text) > 20 or int(text) >= 1 << 64:
        raise ValueError(f"{text[:20]} is no size")
    return int(text)


def no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def find_tensors(folder: Path) -> tuple[Path, dict[str, Stored]]:
    """(what lists them, every tensor by name) from the headers alone: one file, the shards of an
    index, or a whole set of numbered shards."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not os.path.lexists(single) and not os.path.lexists(index):
        # Tools for GPTQ name a file after its bits and groups.
        index = lone(folder.glob("*.safetensors.index.json")) or index
        single = lone(p for p in folder.glob("*.safetensors") if "-of-" not in p.name) or single
    if os.path.lexists(single):
        return single, {tensor.name: tensor for tensor in tensors_in(single)}
    if os.path.lexists(index):
        return index, indexed_tensors(index)
    shards = numbered_shards(folder, index)
    if shards:
        return folder, joined_tensors(shards)
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:  # `glob` finds nothing in it, without a word
        raise CheckpointError(f"{folder}: cannot be listed ({error.strerror})") from None
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]}: pickled weights can run code as they load and are not "
            "read; convert them to safetensors"
        )
    raise CheckpointError(f"{folder}: holds neither {single.name} nor {index.name}")


def lone(paths: Iterable[Path]) -> Path | None:
    found = list(paths)
    return found[0] if len(found) == 1 else None


def indexed_tensors(index: Path) -> dict[str, Stored]:
    """A shard may hold more than the index places in it: of a tensor in two shards that one counts
    which the index names, and one that it does not know is there if the model needs it.

    transformers goes by the order of the files instead, the last one wins: a warning says where
    that is another.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object of tensor: file")
    for name, file in weight_map.items():
        # By its name, not where it resolves to: the Hub's cache is made of links.
        if not isinstance(file, str) or not is_beside(file):
            raise CheckpointError(
                f"{index}: the file of tensor {name} must be a .safetensors beside it, got {file!r}"
            )
    stored, overruled, n_tensors = {}, {}, 0
    for file in sorted(set(weight_map.values())):
        found = tensors_in(index.parent / file)
        n_tensors += len(found)
        if n_tensors > TENSORS_LIMIT:
            raise CheckpointError(f"{index}: its files must hold at most {TENSORS_LIMIT:,} tensors")
        for tensor in found:
            place = weight_map.get(tensor.name)
            if place == file:
                stored[tensor.name] = tensor
            elif place is None:
                stored[tensor.name] = replace(tensor, placed=False)
            elif place < file:
                overruled[tensor.name] = file
    for name, file in weight_map.items():
        if name not in stored:
            raise CheckpointError(f"{index.parent / file}: tensor {name} is missing")
    if overruled:
        name, file = next(iter(overruled.items()))
        warnings.warn(
            one_line(
                f"{index}: tensor {name} is read from {weight_map[name]}, as it says; transformers "
                f"would take the one in {file} ({len(overruled)} such)"
            ),
            stacklevel=2,
        )
    return stored


def is_beside(file: str) -> bool:
    """Whether it is the name of a .safetensors, without a folder."""
    return file.isprintable() and bool(re.fullmatch(r"[^/\\]+\.safetensors", file))


def numbered_shards(folder: Path, index: Path) -> list[Path]:
    """The shards NAME-00001-of-00003.safetensors and so on of a folder without an index."""
    sets: dict[tuple[str, str], dict[int, Path]] = {}
    for path in folder.glob("*.safetensors"):
        numbers = re.fullmatch(r"(.+)-(\d{1,5})-of-(\d{1,5})\.safetensors", path.name)
        if numbers:
            other = sets.setdefault((numbers[1], numbers[3]), {}).setdefault(int(numbers[2]), path)
            if other != path:
                raise CheckpointError(f"{path}: must not be shard {numbers[2]} beside {other.name}")
    if not sets:
        return []
    if len(sets) > 1:
        names = ", ".join(f"{name}-...-of-{total}" for name, total in sorted(sets))
        raise CheckpointError(f"{index}: no such file, and there are shards of several: {names}")
    ((name, total), shards), = sets.items()  # fmt: skip
    missing = [i for i in range(1, int(total) + 1) if i not in shards]
    if missing:
        first = f"{name}-{missing[0]:0{len(total)}}-of-{total}.safetensors"
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{folder / first}: no such file{others}; {len(shards)} of {total} shards are there, "
            f"and no {index.name}"
        )
    return [shards[i] for i in sorted(shards)]


def joined_tensors(shards: Iterable[Path]) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for path in shards:
        for tensor in tensors_in(path):
            other = stored.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise CheckpointError(f"{path}: tensor {tensor.name} is in {other.path.name} too")
    return stored
