"""Memory, programs and warps on their way, and how instructions read and write registers."""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ptx_machine.numbers import (
    EVERY,
    LANE,
    LANES,
    POISON,
    PREDICATE,
    U32,
    U64,
    Array,
    MachineError,
)

REGISTERS = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64}


class GlobalMemory:
    """The memory of the tensors that a launch was given."""

    def __init__(self, tensors: list[torch.Tensor], counts: Counter[str] | None) -> None:
        self.counts = counts
        storages = [tensor.untyped_storage() for tensor in tensors]
        extents = sorted({(s.data_ptr(), s.nbytes()) for s in storages if s.nbytes()})
        self.starts = [start for start, _ in extents]
        self.storages = [
            np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
            for start, size in extents
        ]

    def load(self, addresses: Array, size: int) -> Array:
        """[number of addresses, size] uint8."""
        which = self._storages_of(addresses, size)
        if (which == which[0]).all():
            return at(self.storages[which[0]], addresses - self.starts[which[0]], size)
        pairs = zip(which, addresses, strict=True)
        return np.concatenate(
            [at(self.storages[i], a[None] - self.starts[i], size) for i, a in pairs]
        )

    def store(self, addresses: Array, values: Array) -> None:
        which = self._storages_of(addresses, values.shape[1])
        for i in np.unique(which):
            mine = which == i
            put(self.storages[i], addresses[mine] - self.starts[i], values[mine])

    def _storages_of(self, addresses: Array, size: int) -> Array:
        if self.counts is not None:
            distinct = np.unique(addresses[:, None] + np.arange(size))
            self.counts["global bytes"] += len(distinct)
            self.counts["global sectors"] += len(np.unique(distinct // 32))
        which = np.searchsorted(self.starts, addresses, "right") - 1
        if (which < 0).any():
            raise MachineError("an address that lies in no tensor of the launch")
        return which


class SharedMemory:
    """32 banks of 4 bytes: words of one bank are read one after the other."""

    def __init__(self, n_bytes: int, counts: Counter[str] | None) -> None:
        self.bytes, self.counts = np.full(n_bytes, POISON, dtype=np.uint8), counts

    def load(self, addresses: Array, size: int) -> Array:
        self._count(addresses, size)
        return at(self.bytes, addresses, size)

    def store(self, addresses: Array, values: Array) -> None:
        self._count(addresses, values.shape[1])
        put(self.bytes, addresses, values)

    def _count(self, addresses: Array, size: int) -> None:
        if self.counts is None:
            return
        lanes = 128 // max(size, 4)  # at a time
        for first in range(0, len(addresses), lanes):
            some = addresses[first : first + lanes, None] + np.arange(0, size, 4)
            self.counts["shared phases"] += 1
            self.counts["shared wavefronts"] += int(np.bincount(np.unique(some // 4) % 32).max())


def at(memory: Array, offsets: Array, size: int) -> Array:
    check_access(memory, offsets, size)
    return memory[offsets[:, None] + np.arange(size)]


def put(memory: Array, offsets: Array, values: Array) -> None:
    check_access(memory, offsets, values.shape[1])
    memory[offsets[:, None] + np.arange(values.shape[1])] = values


def check_access(memory: Array, offsets: Array, size: int) -> None:
    """Tensors and shared memory begin at multiples of 16."""
    if offsets.min() < 0 or offsets.max() + size > len(memory):
        raise MachineError(
            f"{size} bytes at {offsets.min()} to {offsets.max()}, of {len(memory)} there are"
        )
    if (offsets % size).any():
        raise MachineError(f"{size} bytes at an address that is no multiple of {size}")


@dataclass
class Events:
    """The order of what may happen in any order."""

    forward: bool = True  # programs and warps from the first to the last, not back
    late: bool = True  # copies to shared memory when they are waited for, not when they are issued


@dataclass
class Block:
    """One program on its way."""

    memory: GlobalMemory
    shared: SharedMemory
    parameters: dict[str, Any]  # numpy integers, of the bits
    index: tuple[int, ...]
    grid: tuple[int, ...]
    events: Events
    counts: Counter[str] | None


@dataclass
class Warp:
    block: Block
    number: int
    registers: dict[str, Array] = field(default_factory=dict)
    # cp.async that has not happened, by group; the last group is not committed yet
    copies: list[list[Callable[[], None]]] = field(default_factory=lambda: [[]])

    def special(self, name: str) -> Array:
        """%tid.x, %ctaid.y, ..."""
        if name == "%tid.x":
            return LANE + np.uint32(LANES * self.number)
        sizes = {"%ctaid": self.block.index, "%nctaid": self.block.grid}[name[:-2]]
        return np.full(LANES, sizes["xyz".index(name[-1])], np.uint32)


Operand = Callable[[Warp], Array]
Write = Callable[[Warp, Array, Array], None]
Step = Callable[[Warp, Array], None]


def source(text: str, dtype: np.dtype) -> Operand:
    """Reads a register or a constant as `dtype`."""
    if text.startswith("%") and "." in text:
        return lambda warp: warp.special(text)
    if not re.match(r"[%a-z]", text) or text == "global_smem":  # which begins at 0
        constant = np.full(LANES, immediate("0" if text == "global_smem" else text, dtype))
        return lambda warp: constant

    unknown = np.full(LANES * dtype.itemsize, POISON, np.uint8).view(dtype)

    def read(warp: Warp) -> Array:
        value = warp.registers.get(text, unknown)  # a compiler may pack what it never uses
        if value.dtype is dtype:
            return value
        if value.itemsize != dtype.itemsize:
            value = value.astype(f"u{dtype.itemsize}")
        return value if value.dtype == dtype else value.view(dtype)

    return read


def immediate(text: str, dtype: np.dtype) -> Any:
    """`text` is -1, 0x7632U, or the bits of an fp32 or fp64 number, 0f3F800000, 0d3FF..."""
    is_float = text.startswith(("0f", "0d"))
    value = int(text[2:], 16) if is_float else int(text.rstrip("U"), 0)
    if dtype == PREDICATE:
        return np.bool_(value)
    bits = value & (256**dtype.itemsize - 1)
    return np.array(bits, f"u{dtype.itemsize}").view(dtype)[()]


def target(text: str) -> Write:
    """Writes a register in some lanes; integers wrap or are extended. A register that inline
    assembly declares, s0 or f1, takes the type of what is written."""
    found = re.fullmatch(r"%(p|rs|rd|r)\d+", text)
    dtype = np.dtype(REGISTERS[found[1]]) if found else None

    def write(warp: Warp, values: Array, lanes: Array) -> None:
        if dtype is not None and values.dtype != dtype:
            same_size = values.itemsize == dtype.itemsize
            values = values.view(dtype) if same_size else values.astype(dtype)
        if lanes is not EVERY:
            before = warp.registers.get(text)
            if before is None:
                before = np.full(values.nbytes, POISON, np.uint8).view(values.dtype)
            values = np.where(lanes, values, before)
        warp.registers[text] = np.ascontiguousarray(values)

    return write


def listed(text: str) -> list[str]:
    """The operands in braces."""
    return [part.strip() for part in text.strip("{} ").split(",")]


def address(text: str) -> Operand:
    """[ %rd1 + 16 ], [%r1+16], [global_smem]: int64."""
    base, _, offset = text.strip("[] ").replace(" ", "").partition("+")
    read, distance = source(base, U64 if base.startswith("%rd") else U32), int(offset or "0", 0)
    return lambda warp: read(warp).astype(np.int64) + distance


def together(lanes: Array, what: str) -> None:
    if lanes is not EVERY:
        raise MachineError(f"{what} where not all lanes of the warp are")
