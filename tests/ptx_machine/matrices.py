"""Instructions of a whole warp on matrices: ldmatrix, stmatrix, mma and wgmma.

Layouts are those of the PTX ISA's figures: which lane holds which elements, and how a matrix
descriptor describes a tile in shared memory.
"""

from __future__ import annotations

import re

import numpy as np

from ptx_machine.numbers import (
    F32,
    LANE,
    PREDICATE,
    U32,
    U64,
    Array,
    MachineError,
    halves,
    packed,
    wide,
)
from ptx_machine.state import Step, Warp, address, listed, source, target, together

ROW, PAIR = LANE // 4, 2 * (LANE % 4)  # of a lane in an 8 x 8 matrix: its row, its two columns
# By mode of a descriptor: bits of an address that permute its 16-byte pieces, bytes of a row.
SWIZZLED = {0: 0, 1: 0x380, 2: 0x180, 3: 0x80}
ROW_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}


def matrices(name: str, modifiers: list[str], operands: list[str]) -> Step:
    """ldmatrix, stmatrix: 8 x 8 matrices of 16 bits, whose rows' addresses the lanes hold."""
    loads, transposed = name == "ldmatrix", "trans" in modifiers
    registers, at_text = operands if loads else operands[::-1]
    names, where = listed(registers), address(at_text)
    sources, writes = [source(n, U32) for n in names], [target(n) for n in names]

    def step(warp: Warp, lanes: Array) -> None:
        together(lanes, name)
        for i, rows in enumerate(where(warp).reshape(4, 8)[: len(names)]):
            matrix = np.empty((8, 8), np.uint16)
            view = matrix.T if transposed else matrix
            if loads:
                matrix[:] = warp.block.shared.load(rows, 16).view(np.uint16)
                writes[i](warp, packed(view[ROW, PAIR], view[ROW, PAIR + 1]), lanes)
            else:
                view[ROW, PAIR], view[ROW, PAIR + 1] = halves(sources[i](warp))
                warp.block.shared.store(rows, matrix.view(np.uint8))

    return step


def rows_of_a(parts: list[Array], kind: str) -> Array:
    """[16, 16] fp32 from the four registers of each lane."""
    a = np.empty((16, 16), np.float32)
    for i, part in enumerate(parts):
        for j, half in enumerate(halves(part)):
            a[ROW + 8 * (i % 2), PAIR + j + 8 * (i // 2)] = wide(half, kind)
    return a


def multiply_matrices(modifiers: list[str], operands: list[str]) -> Step:
    """mma.m16n8k16: d = a b + c, sums in fp32."""
    kind = modifiers[6]
    if modifiers[2] != "m16n8k16" or kind not in ("bf16", "f16") or modifiers[5] != "f32":
        raise MachineError(f"mma.{'.'.join(modifiers)} is not known")
    writes = [target(name) for name in listed(operands[0])]
    a, b = ([source(name, U32) for name in listed(text)] for text in operands[1:3])
    c = [source(name, F32) for name in listed(operands[3])]

    def step(warp: Warp, lanes: Array) -> None:
        together(lanes, "mma")
        right = np.empty((16, 8), np.float32)
        for i, read in enumerate(b):
            for j, half in enumerate(halves(read(warp))):
                right[PAIR + j + 8 * i, ROW] = wide(half, kind)
        product = rows_of_a([read(warp) for read in a], kind) @ right
        sums = [product[ROW + 8 * (i // 2), PAIR + i % 2] + c[i](warp) for i in range(4)]
        for write, values in zip(writes, sums, strict=True):
            write(warp, values, lanes)

    return step


def described(warp: Warp, descriptor: int, major: int, transposed: bool) -> Array:
    """[major, 16] uint16 of a tile in shared memory whose rows (transposed: columns) lie in atoms
    of eight times 128, 64, 32 or 16 bytes."""
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    mode = descriptor >> 62
    if mode == 0 and transposed:
        leading, stride = stride, leading
    n_bytes, memory = ROW_BYTES[mode], warp.block.shared.bytes
    i, j = np.indices((major, 16))
    along, across = (2 * i, j) if transposed else (2 * j, i)
    addresses = start + along // n_bytes * leading + along % n_bytes
    addresses += across // 8 * stride + across % 8 * n_bytes
    addresses ^= (addresses & SWIZZLED[mode]) >> 3
    if addresses.max() + 2 > len(memory):
        raise MachineError(f"a matrix up to {addresses.max()}, of {len(memory)} bytes there are")
    return memory.view(np.uint16)[addresses // 2]


def multiply_in_group(modifiers: list[str], operands: list[str]) -> Step:
    """wgmma.m64nNk16: this warp's 16 rows of d = a b (+ d); a in registers or shared memory."""
    shape, kind = re.fullmatch(r"m64n(\d+)k16", modifiers[3]), modifiers[5]
    signs, transposes = operands[4:6], operands[6:]
    if not shape or kind not in ("bf16", "f16") or modifiers[4] != "f32" or signs != ["1", "1"]:
        raise MachineError(f"wgmma.{'.'.join(modifiers)} is not known")
    n_columns = int(shape[1])
    writes = [target(name) for name in listed(operands[0])]
    before = [source(name, F32) for name in listed(operands[0])]
    in_registers = operands[1].startswith("{")
    a = [source(name, U32 if in_registers else U64) for name in listed(operands[1])]
    b, keeps = source(operands[2], U64), source(operands[3], PREDICATE)
    *transposed_a, transposed_b = (text == "1" for text in transposes)

    def step(warp: Warp, lanes: Array) -> None:
        together(lanes, "wgmma")
        if in_registers:
            left = rows_of_a([read(warp) for read in a], kind)
        else:
            first = 16 * (warp.number % 4)
            tile = described(warp, int(a[0](warp)[0]), 64, transposed_a[0])
            left = wide(tile[first : first + 16], kind)
        right = wide(described(warp, int(b(warp)[0]), n_columns, transposed_b), kind)
        product, kept = left @ right.T, keeps(warp)[0]
        for i, write in enumerate(writes):
            mine = product[ROW + 8 * (i % 4 // 2), 8 * (i // 4) + PAIR + i % 2]
            write(warp, mine + before[i](warp) if kept else mine, lanes)

    return step
