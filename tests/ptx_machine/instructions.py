"""Instructions that work lane by lane, on memory, or between lanes: what each does to a warp.

A maker takes the modifiers of an opcode (`add.rn.f32`: ["rn", "f32"]) and its operands as text, and
gives a step: (warp, lanes it is done in) -> None.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np

from ptx_machine.numbers import (
    FP8_VALUES,
    INTEGERS,
    LANE,
    LANES,
    PREDICATE,
    TYPES,
    U32,
    Array,
    MachineError,
    flushed,
    halves,
    narrow,
    packed,
    quotient,
    to_fp8,
    truncated,
    wide,
)
from ptx_machine.state import (
    GlobalMemory,
    SharedMemory,
    Step,
    Warp,
    address,
    listed,
    source,
    target,
    together,
)

OF_FLOATS: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "fma": lambda a, b, c: a * b + c,
    "max": lambda *values: reduce(np.fmax, values),  # of two, or of three
    "min": lambda *values: reduce(np.fmin, values),
    "max.NaN": lambda *values: reduce(np.maximum, values),
    "min.NaN": lambda *values: reduce(np.minimum, values),
    "neg": np.negative,
    "abs": np.abs,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "sqrt": np.sqrt,
}
ROUNDED_ONCE = ("add", "sub", "mul", "div", "sqrt", "max", "min", "neg", "abs")  # by numpy's fp32
OF_INTEGERS: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "div": quotient,
    "rem": lambda a, b: a - quotient(a, b) * b,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "popc": lambda a: np.unpackbits(a.view(np.uint8)).reshape(LANES, -1).sum(1).astype(np.uint32),
}
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def lane_by_lane(operands: list[str], dtype: np.dtype, function: Callable[..., Array]) -> Step:
    """operands[0] = function(the others, read as `dtype`)"""
    write, sources = target(operands[0]), [source(text, dtype) for text in operands[1:]]
    return lambda warp, lanes: write(warp, function(*(read(warp) for read in sources)), lanes)


def arithmetic(name: str, modifiers: list[str], operands: list[str]) -> Step:
    kind = modifiers[-1]
    if kind in INTEGERS or kind == "pred":
        return lane_by_lane(operands, TYPES[kind], OF_INTEGERS[name])
    function = OF_FLOATS[f"{name}.NaN" if "NaN" in modifiers else name]
    flush = flushed if "ftz" in modifiers else lambda x: x

    def fp32(*values: Array) -> Array:
        """What numpy does not round once by way of fp64, which holds the product of two exactly."""
        if name in ROUNDED_ONCE:
            return flush(function(*map(flush, values)))
        exact = function(*(flush(value).astype(np.float64) for value in values))
        return flush(exact.astype(np.float32))

    short = kind.removesuffix("x2")

    def half(*values: Array) -> Array:
        return narrow(function(*(wide(value, short).astype(np.float64) for value in values)), short)

    def two_halves(*values: Array) -> Array:
        pairs = [halves(value) for value in values]
        return packed(*(half(*(pair[i] for pair in pairs)) for i in range(2)))

    def two_fp32(*values: Array) -> Array:
        return fp32(*(value.view(np.float32) for value in values)).view(np.uint64)

    computes = {"f64": function, "f32": fp32, "f32x2": two_fp32, "f16": half, "bf16": half}
    return lane_by_lane(operands, TYPES[kind], computes.get(kind, two_halves))


def multiply(name: str, modifiers: list[str], operands: list[str]) -> Step:
    """mul and mad of integers: .lo, .hi and .wide."""
    part, dtype = modifiers[0], TYPES[modifiers[1]]
    bits = 8 * dtype.itemsize
    double = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}") if bits < 64 else dtype
    if part == "hi" and bits == 64:
        raise MachineError("mul.hi of 64 bits is not known")
    a, b = (source(text, dtype) for text in operands[1:3])
    result = double if part == "wide" else dtype
    write, c = target(operands[0]), source(operands[3] if name == "mad" else "0", result)

    def step(warp: Warp, lanes: Array) -> None:
        product = a(warp).astype(double) * b(warp).astype(double)
        if part == "hi":
            product >>= bits
        write(warp, product.astype(result) + c(warp), lanes)

    return step


def shift(name: str, modifiers: list[str], operands: list[str]) -> Step:
    """shl, shr: by the width or more gives 0, or the sign."""
    dtype = TYPES[modifiers[0]]
    bits = 8 * dtype.itemsize
    write, x, distance = target(operands[0]), source(operands[1], dtype), source(operands[2], U32)

    def step(warp: Warp, lanes: Array) -> None:
        n = distance(warp)
        by = np.minimum(n, bits - 1).astype(dtype)
        result = x(warp) << by if name == "shl" else x(warp) >> by
        if name == "shl" or dtype.kind == "u":
            result = np.where(n < bits, result, dtype.type(0))
        write(warp, result, lanes)

    return step


def bit_field(modifiers: list[str], operands: list[str]) -> Step:
    """bfe: `length` bits of x from `start` on, extended by sign where signed."""
    dtype = TYPES[modifiers[0]]
    start, length = (int(text) for text in operands[2:])
    up = 8 * dtype.itemsize - start - length
    if up < 0:
        raise MachineError("bfe beyond the last bit is not known")
    return lane_by_lane(operands[:2], dtype, lambda x: (x << up) >> (up + start))


def permute(modifiers: list[str], operands: list[str]) -> Step:
    """prmt: bytes of b:a by the nibbles of a selector, whose top bit repeats the byte's sign."""

    def function(a: Array, b: Array, selector: Array) -> Array:
        eight = a.astype(np.uint64) | (b.astype(np.uint64) << 32)
        result = np.zeros(LANES, np.uint32)
        for i in range(4):
            nibble = (selector >> (4 * i)) & 0xF
            byte = (eight >> (8 * (nibble & 7)).astype(np.uint64)).astype(np.uint32) & 0xFF
            sign = np.where(byte & 0x80, 0xFF, 0).astype(np.uint32)
            result |= np.where(nibble & 8, sign, byte) << (8 * i)
        return result

    return lane_by_lane(operands, U32, function)


def logic_of_three(modifiers: list[str], operands: list[str]) -> Step:
    """lop3: bit i of the table is what a, b, c give whose bits together are i."""
    table = int(operands[4], 0)

    def function(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros(LANES, np.uint32)
        for i in range(8):
            if table >> i & 1:
                bits = zip((4, 2, 1), (a, b, c), strict=True)
                result |= np.bitwise_and.reduce([x if i & bit else ~x for bit, x in bits])
        return result

    return lane_by_lane(operands[:4], U32, function)


def compare(modifiers: list[str], operands: list[str]) -> Step:
    """setp; of floats ordered, or unordered ("neu"): true where one is NaN."""
    comparison, kind = modifiers
    if kind in INTEGERS:
        return lane_by_lane(operands, TYPES[kind], COMPARISONS[comparison])

    def floats(x: Array, y: Array) -> Array:
        unknown = np.isnan(x) | np.isnan(y)
        if comparison in ("nan", "num"):
            return unknown if comparison == "nan" else ~unknown
        result = COMPARISONS[comparison.removesuffix("u")](x, y)
        return result | unknown if comparison.endswith("u") else result & ~unknown

    return lane_by_lane(operands, TYPES[kind], floats)


def select(modifiers: list[str], operands: list[str]) -> Step:
    dtype = TYPES[modifiers[0]]
    write, condition = target(operands[0]), source(operands[3], PREDICATE)
    a, b = source(operands[1], dtype), source(operands[2], dtype)
    return lambda warp, lanes: write(warp, np.where(condition(warp), a(warp), b(warp)), lanes)


def move(modifiers: list[str], operands: list[str]) -> Step:
    """mov; also between a register and its parts, {low, high}."""
    dtype = TYPES[modifiers[0]]
    if operands[0].startswith("{"):
        writes, whole = [target(name) for name in listed(operands[0])], source(operands[1], dtype)

        def unpack(warp: Warp, lanes: Array) -> None:
            small = f"u{dtype.itemsize // len(writes)}"
            parts = whole(warp).view(small).reshape(LANES, len(writes))
            for i, write in enumerate(writes):
                write(warp, parts[:, i].copy(), lanes)

        return unpack
    names = listed(operands[1])
    write, small = target(operands[0]), np.dtype(f"u{dtype.itemsize // len(names)}")
    if len(names) == 1:
        return lane_by_lane(operands, dtype, lambda x: x)
    parts = [source(name, small) for name in names]
    return lambda warp, lanes: write(
        warp, np.stack([part(warp) for part in parts], axis=1).view(dtype)[:, 0], lanes
    )


def convert(modifiers: list[str], operands: list[str]) -> Step:
    """cvt: `to` and `of` are its last two types. Of two operands the first is the upper half."""
    to, of = modifiers[-2:]
    short = to.removesuffix("x2")
    conversions: dict[tuple[str, str], Callable[..., Array]] = {
        ("f32", "bf16"): lambda x: wide(x, "bf16"),
        ("f32", "f16"): lambda x: wide(x, "f16"),
        ("bf16", "f32"): lambda x: narrow(x, "bf16"),
        ("f16", "f32"): lambda x: narrow(x, "f16"),
        ("bf16x2", "f32"): lambda high, low: packed(narrow(low, short), narrow(high, short)),
        ("f16x2", "f32"): lambda high, low: packed(narrow(low, short), narrow(high, short)),
        ("f16x2", "e4m3x2"): lambda x: packed(
            *(narrow(FP8_VALUES[byte], "f16") for byte in (x & 0xFF, x >> 8))
        ),
        ("e4m3x2", "f32"): lambda high, low: to_fp8(low) | (to_fp8(high) << np.uint16(8)),
    }
    function = conversions.get((to, of))
    if function is None and to in INTEGERS and of in ("f32", "f64") and "rzi" in modifiers:
        return lane_by_lane(operands, TYPES[of], lambda x: truncated(x, TYPES[to]))
    if function is None and of in INTEGERS and (to in INTEGERS or to in ("f32", "f64")):
        return lane_by_lane(operands, TYPES[of], lambda x: x.astype(TYPES[to]))
    if function is None and of in INTEGERS and to in ("f16", "bf16"):
        return lane_by_lane(operands, TYPES[of], lambda x: narrow(x.astype(np.float64), to))
    if function is None:
        raise MachineError(f"cvt to {to} of {of} is not known")
    return lane_by_lane(operands, TYPES[of], function)


def memory_of(warp: Warp, space: str) -> GlobalMemory | SharedMemory:
    return warp.block.memory if space == "global" else warp.block.shared


def load(modifiers: list[str], operands: list[str]) -> Step:
    space, dtype = modifiers[0], TYPES[modifiers[-1]]
    writes = [target(name) for name in listed(operands[0])]
    if space == "param":
        name = operands[1].strip("[]")
        return lambda warp, lanes: writes[0](
            warp, np.full(LANES, warp.block.parameters[name].astype(dtype)), lanes
        )
    where = address(operands[1])

    def step(warp: Warp, lanes: Array) -> None:
        loaded = memory_of(warp, space).load(where(warp)[lanes], dtype.itemsize * len(writes))
        values = np.zeros((LANES, len(writes)), dtype)
        values[lanes] = loaded.view(dtype)
        for i, write in enumerate(writes):
            write(warp, values[:, i].copy(), lanes)

    return step


def store(modifiers: list[str], operands: list[str]) -> Step:
    space, dtype = modifiers[0], TYPES[modifiers[-1]]
    where, sources = address(operands[0]), [source(name, dtype) for name in listed(operands[1])]

    def step(warp: Warp, lanes: Array) -> None:
        values = np.stack([read(warp)[lanes] for read in sources], axis=1)
        memory_of(warp, space).store(where(warp)[lanes], values.view(np.uint8))

    return step


def copy_async(modifiers: list[str], operands: list[str]) -> Step:
    """cp.async: `size` bytes from global to shared memory, or as many zeros."""
    to, of, size = address(operands[0]), address(operands[1]), int(operands[2], 0)
    used = source(operands[3] if len(operands) > 3 else operands[2], U32)

    def step(warp: Warp, lanes: Array) -> None:
        targets, sources, n_bytes = to(warp), of(warp), used(warp)
        some = lanes & (n_bytes == size)
        if (n_bytes[lanes & ~some] > 0).any():
            raise MachineError("cp.async of a part is not known")

        def happen() -> None:
            values = np.zeros((LANES, size), np.uint8)
            if some.any():
                values[some] = warp.block.memory.load(sources[some], size)
            warp.block.shared.store(targets[lanes], values[lanes])

        if warp.block.events.late:
            warp.copies[-1].append(happen)
        else:
            happen()

    return step


def wait_for_copies(warp: Warp, n_groups: int) -> None:
    """Of the groups that were committed all but the last `n_groups` have happened."""
    n_done = max(len(warp.copies) - 1 - n_groups, 0)
    for group in warp.copies[:n_done]:
        for happen in group:
            happen()
    del warp.copies[:n_done]


def shuffle(modifiers: list[str], operands: list[str]) -> Step:
    how = modifiers[1]
    if "|" in operands[0] or operands[3] not in ("31", "0"):
        raise MachineError(f"shfl.{how} of {operands} is not known")
    write, x, by = target(operands[0]), source(operands[1], U32), source(operands[2], U32)
    lane = LANE.astype(np.int64)
    partners: dict[str, Callable[[Array], Array]] = {
        "bfly": lambda n: lane ^ n,
        "idx": lambda n: n & 31,
        "up": lambda n: lane - n,
        "down": lambda n: lane + n,
    }
    partner = partners[how]

    def step(warp: Warp, lanes: Array) -> None:
        together(lanes, "shfl")
        of = partner(by(warp).astype(np.int64))
        write(warp, x(warp)[np.where((of >= 0) & (of < LANES), of, lane)], lanes)

    return step


def reduce_over_lanes(modifiers: list[str], operands: list[str]) -> Step:
    """redux.sync"""
    dtype = TYPES[modifiers[2]]
    write, x = target(operands[0]), source(operands[1], dtype)
    function = {"max": np.max, "min": np.min, "add": np.sum}[modifiers[1]]

    def step(warp: Warp, lanes: Array) -> None:
        together(lanes, "redux")
        write(warp, np.full(LANES, function(x(warp)), dtype), lanes)

    return step
