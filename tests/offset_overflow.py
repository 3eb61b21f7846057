"""Finds address arithmetic that overflows 32 bits, from Triton IR, without a GPU or the memory.

Interval arithmetic: program ids run over the launch's grid, integer arguments have the launch's
values, a loaded int32 (page id, length) may be anything up to 2^31 - 1. What the walk does not know
(loop-carried values, floats) it leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

Range = tuple[int, int]

SAME_VALUE = (
    "arith.extsi",
    "arith.extui",
    "arith.trunci",
    "tt.splat",
    "tt.unsplat",
    "tt.broadcast",
    "tt.expand_dims",
    "tt.reshape",
    "tt.trans",
)
MONOTONE: dict[str, Callable[[int, int], int]] = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.divsi": lambda a, b: a // b if a >= 0 else -(-a // b),
    "arith.minsi": min,
    "arith.maxsi": max,
}


def overflowing_products(
    ttir: str, grid: tuple[int, ...], integers: dict[str, int]
) -> Iterator[str]:
    """One line, with its place in the source, per 32-bit product that passes 2^31.

    Args:
        ttir: a kernel's Triton IR, `compiled.asm["ttir"]`.
        grid: programs along x, y, z.
        integers: the values of the kernel's integer arguments.
    """
    ranges: dict[str, Range] = {f"%{name}": (value, value) for name, value in integers.items()}
    locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))

    for line in ttir.splitlines():
        if loop := re.search(r"scf\.for (%\w+) = (%\w+) to (%\w+) step", line):
            index, start, end = loop.groups()
            ranges.pop(index, None)
            if start in ranges and end in ranges:
                ranges[index] = ranges[start][0], max(ranges[start][0], ranges[end][1] - 1)
            continue
        assignment = re.match(r"\s*(%\w+) = ([\w.]+)(.*) : (.*?) loc\((.*)\)$", line)
        if not assignment:
            continue
        name, operation, operands, types, location = assignment.groups()
        ranges.pop(name, None)
        result = _range_of(operation, operands, types, grid, ranges)
        if result is None:
            continue
        largest = max(-result[0], result[1])
        if operation == "arith.muli" and re.search(r"\bi32$|xi32>$", types) and largest >= 2**31:
            place = _source_line(location, locations)
            yield f"{place}: 32-bit product {name} ={operands} reaches {largest:,}"
            continue
        ranges[name] = result


def _range_of(
    operation: str,
    operands: str,
    types: str,
    grid: tuple[int, ...],
    ranges: dict[str, Range],
) -> Range | None:
    if operation == "tt.get_program_id":
        axis = "xyz".index(operands.strip())
        return 0, (grid[axis] if axis < len(grid) else 1) - 1
    if operation == "arith.constant":
        constant = re.fullmatch(r" (?:dense<)?(-?\d+)>?", operands)
        return (int(constant.group(1)), int(constant.group(1))) if constant else None
    if operation == "tt.make_range":
        bounds = dict(re.findall(r"(start|end) = (\d+)", operands))
        return int(bounds["start"]), int(bounds["end"]) - 1
    if operation == "tt.load":
        return (0, 2**31 - 1) if "tt.ptr<i32>" in types else None

    names = re.findall(r"%\w+", operands)
    if operation == "arith.select":
        names = names[1:]
    known = [ranges[name] for name in names if name in ranges]
    if len(known) < len(names) or not known:
        return None
    if operation in SAME_VALUE:
        return known[0]
    if operation == "arith.select":
        return min(low for low, _ in known), max(high for _, high in known)
    if operation not in MONOTONE and operation != "arith.remsi":
        return None
    (low_a, high_a), (low_b, high_b) = known
    if operation in ("arith.divsi", "arith.remsi") and low_b <= 0:
        return None
    if operation == "arith.remsi":
        return min(0, low_a), min(max(0, high_a), high_b - 1)
    ends = [MONOTONE[operation](a, b) for a in (low_a, high_a) for b in (low_b, high_b)]
    return min(ends), max(ends)


def _source_line(location: str, locations: dict[str, str]) -> str:
    while alias := re.search(r"#loc\d*", location):
        location = location.replace(alias.group(), locations.get(alias.group(), ""), 1)
    place = re.search(r'([^/"]+)":(\d+)', location)
    return f"{place.group(1)}:{place.group(2)}" if place else "unknown line"
