"""Every Triton kernel, compiled for six architectures at GLM-4's sizes, on a machine without a GPU.

sm_90 gets every launch of launches.py, the other architectures those marked `everywhere`.
"""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest
from offset_overflow import overflowing_products

triton = pytest.importorskip("triton", reason="ahead-of-time compiles need Triton")

import faulty_kernels  # noqa: E402
import launches  # noqa: E402

from glm4_kernels.ahead_of_time import (  # noqa: E402
    MULTIPROCESSORS,
    accesses_before_wait,
    instructions_per_tile,
    outstanding_bytes,
    programs_per_sm,
)


@pytest.fixture(scope="module")
def rows(compiler, request) -> list[dict[str, Any]]:
    """The launches of one op on one GPU; those that did not compile fail here."""
    op, capability = request.param
    rows = compiler.submit(launches.measure, op, capability).result()
    assert rows, f"launches.py has no case for {op} on sm_{capability}"
    report([f"{name(row)}: {row['error']}" for row in rows if "error" in row])
    return rows


def name(row: dict[str, Any]) -> str:
    return f"{row['arch']} {row['kernel'] or row['op']} ({row['case']})"


def report(failures: list[str]) -> None:
    assert not failures, f"{len(failures)} failed:\n" + "\n".join(failures)


# Compiled for one of each generation at every run; the others differ from those in their limits.
GENERATIONS = (80, 90, 100)


def part_of(op: str, capability: int) -> Any:
    marks = () if capability in GENERATIONS else pytest.mark.exhaustive
    return pytest.param((op, capability), id=f"{op}-sm_{capability}", marks=marks)


each_op_and_gpu = pytest.mark.parametrize(
    "rows", [part_of(*part) for part in product(launches.OPS, MULTIPROCESSORS)], indirect=True
)


@each_op_and_gpu
def test_stays_within_the_hardware(rows):
    failures = []
    for row in rows:
        limit = MULTIPROCESSORS[int(row["arch"].removeprefix("sm_"))].shared_limit
        if row["figures"]["spill_bytes"]:
            failures.append(f"{name(row)}: spills {row['figures']['spill_bytes']} bytes a thread")
        if row["figures"]["shared_bytes"] > limit:
            used = row["figures"]["shared_bytes"]
            failures.append(f"{name(row)}: {used} bytes of shared memory, a program has {limit}")
        elif not row["figures"]["programs_per_sm"]:
            failures.append(f"{name(row)}: not one program fits an SM")
    report(failures)


@each_op_and_gpu
def test_offsets_are_64_bit(rows):
    report([f"{name(row)}: {overflow}" for row in rows for overflow in row["overflows"]])


@each_op_and_gpu
def test_waits_before_it_touches_what_others_write(rows):
    """Only loads of weights stand ahead of griddepcontrol.wait, which is there if asked for."""
    report(
        [
            f"{name(row)}: {row['figures']['accesses_before_wait']} accesses before the wait, "
            f"not {row['before_wait']}"
            for row in rows
            if row["figures"]["accesses_before_wait"] != row["before_wait"]
        ]
    )


@each_op_and_gpu
def test_loses_nothing(rows):
    path = launches.figures_path(triton.__version__)
    if not path.exists():
        pytest.skip(f"no figures of Triton {triton.__version__} are committed")
    committed = json.loads(path.read_text())
    hint = f"if that is meant, run `python tests/launches.py --write` and commit {path.name}"
    failures = []
    for arch, table in launches.figures_table(rows).items():
        for key, now in table.items():
            before = committed.get(arch, {}).get(key)
            if before is None:
                failures.append(f"{arch} {key}: not in the committed figures; {hint}")
            elif lost := losses(before, now):
                failures.append(f"{arch} {key}: {lost}; {hint}")
    report(failures)


def losses(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What a kernel lost since its figures were committed, in words; "" if nothing."""
    lost = []
    if before["mma"] != "none" and now["mma"] != before["mma"]:
        lost.append(f"tensor cores: was {before['mma']}, is {now['mma']}")
    if wide_share(now["loads"]) < wide_share(before["loads"]):
        lost.append(f"wide loads: was {before['loads']}, is {now['loads']} (bits: instructions)")
    instructions = now["instructions_per_tile"], before.get("instructions_per_tile")
    if None not in instructions and instructions[0] > instructions[1]:
        lost.append("instructions a tile: was {1}, is {0}".format(*instructions))
    for figure, unit in (("programs_per_sm", "programs an SM"), ("bytes_in_flight", "bytes an SM")):
        if now[figure] < before[figure]:
            lost.append(f"{figure}: was {before[figure]}, is {now[figure]} {unit}")
    return ", ".join(lost)


def wide_share(loads: dict[str, int]) -> float:
    """The share of a thread's global reads that arrives 16 bytes or more at a time."""
    bits = {width: (128 if width == "bulk" else int(width)) for width in loads}
    total = sum(bits[width] * count for width, count in loads.items())
    wide = sum(bits[width] * count for width, count in loads.items() if bits[width] >= 128)
    return wide / total if total else 1.0


def test_every_kernel_is_launched(compiler):
    assert compiler.submit(launches.never_launched).result() == [], "launches.py reaches none"


def test_the_harness_sees_faults(compiler):
    """Kernels with one fault each; what is measured of them must show it."""
    faults = compiler.submit(faulty_kernels.measured).result()
    spilling, narrow, wide, dot, shallow, overflowing = faults
    assert spilling["figures"]["spill_bytes"] > 0
    assert wide["figures"]["loads"] == {"128": 1}
    assert losses(wide["figures"], narrow["figures"]).startswith("wide loads")
    assert dot["figures"]["mma"] == "wgmma" and dot["figures"]["shared_bytes"] > 99 * 1024
    assert losses(dot["figures"], {**dot["figures"], "mma": "none"}).startswith("tensor cores")
    lost = losses(shallow["figures"], dot["figures"])  # one program instead of three
    assert "programs_per_sm: was 3, is 1" in lost and "bytes_in_flight" in lost
    tile = 128 * 128 * 2
    for stages, pipeline in ((5, dot), (2, shallow)):
        under_way = pipeline["figures"]["programs_per_sm"] * stages * tile
        assert pipeline["figures"]["bytes_in_flight"] == under_way
    assert wide["figures"]["bytes_in_flight"] == 16 * 128 * wide["figures"]["programs_per_sm"]
    assert len(overflowing["overflows"]) == 3
    assert [fault["overflows"] for fault in (spilling, narrow, wide, dot)] == [[], [], [], []]


def test_kernels_are_disassembled_together_as_alone(compiler):
    together, alone = compiler.submit(faulty_kernels.disassembled).result()
    assert together == alone and all(together) and together[0] != together[1]


@pytest.mark.parametrize(
    "capability, warps, registers, shared_bytes, programs",
    [
        (90, 1, 16, 0, 32),  # as many as an SM takes
        (90, 8, 32, 32, 8),  # warps
        (86, 8, 32, 32, 6),  # its SM holds 48 of them, not 64
        (90, 4, 166, 0, 3),  # registers: 168 a thread, twelve warps
        (90, 8, 166, 0, 1),
        (90, 4, 32, 71680, 3),  # shared memory
        (90, 4, 32, 113 * 1024, 2),
        (90, 4, 32, 113 * 1024 + 1, 1),
        (90, 16, 255, 0, 0),  # does not run
    ],
)
def test_programs_per_sm(capability, warps, registers, shared_bytes, programs):
    sm = MULTIPROCESSORS[capability]
    assert programs_per_sm(sm, warps, registers, shared_bytes) == programs


def test_accesses_before_the_wait():
    load, store = "LDG.E.128 R8, desc[UR10][R20.64] ;\n", "STG.E [R4.64], R8 ;\n"
    assert accesses_before_wait(load + store) is None
    assert accesses_before_wait("ACQBULK ;\n" + load) == 0
    assert accesses_before_wait(load + store + "ACQBULK ;\n" + load) == 2


def test_instructions_of_a_tile():
    def sass(*lines: str) -> str:
        return "".join(f"/*{16 * i:04x}*/ {line} ;\n" for i, line in enumerate(lines))

    loop = ("MOV R1, R2", "HMMA.16816 R4, R4, R5, R4", "@!P0 BRA 0x0")
    assert instructions_per_tile(sass(*loop)) == 3
    assert instructions_per_tile(sass("MOV R1, R2", "@P0 BRA 0x0")) is None
    skips = (
        "MOV R1, R2",
        "@P1 BRA 0x40",
        "FMUL R3, R3, R3",
        "FMUL R4, R4, R4",
        "HGMMA.64x16x16 R8",
    )
    assert instructions_per_tile(sass(*skips, "@!P0 BRA 0x0")) == 4
    outer = ("UTCHMMA R4", "FADD R1, R1, R1", "@!P0 BRA 0x10", "HMMA R4", "@P0 BRA 0x30", "BRA 0x0")
    assert instructions_per_tile(sass(*outer)) == 2
    # What is seldom needed lies apart, and jumps back.
    apart = ("FADD R1, R1, R1", "@P1 BRA 0x40", "HMMA R4", "@P0 BRA 0x0", "FMUL R1, R1, R1")
    assert instructions_per_tile(sass(*apart, "BRA 0x20")) == 4
    inside = ("MOV R1, R2", "@P1 BRA 0x50", "FADD R1, R1, R1", "HMMA R4", "BRA 0x70")
    inside += ("FMUL R1, R1, R1", "BRA 0x20", "BRA.U UP0, 0x0")
    assert instructions_per_tile(sass(*inside)) == 6


def test_a_load_is_under_way_until_a_register_of_it_is_named():
    wide = "/*0000*/ @!P2 LDG.E.128 R8, desc[UR10][R20.64] ;\n"
    narrow = "/*0010*/ LDG.E.U16 R4, desc[UR10][R22.64+0x1000] ;\n"
    use, another = "/*0020*/ FADD R0, R11, R1 ;\n", "/*0020*/ FADD R0, R12, R1 ;\n"
    assert outstanding_bytes(wide + narrow + use) == 18
    assert outstanding_bytes(wide + use + narrow) == 16
    assert outstanding_bytes(wide + another + narrow) == 18
    assert outstanding_bytes(use) == 0


@pytest.mark.parametrize(
    "stride, programs, overflows",
    [(4096, 1 << 20, True), (4096, 1 << 19, False), (2047, 1 << 20, False)],
)
def test_overflow_is_judged_at_the_sizes_of_the_launch(stride, programs, overflows):
    ttir = (
        "    %row = tt.get_program_id x : i32 loc(#loc1)\n"
        "    %offset = arith.muli %row, %stride : i32 loc(#loc1)\n"
        '#loc1 = loc("a_kernel.py":12:3)\n'
    )
    found = list(overflowing_products(ttir, (programs,), {"stride": stride}))
    assert bool(found) == overflows
    assert all(line.startswith("a_kernel.py:12: ") for line in found)
