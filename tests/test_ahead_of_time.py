"""Every Triton kernel, compiled for six architectures at GLM-4's sizes, on a machine without a GPU.

sm_90 gets every launch of launches.py, the other architectures those marked `everywhere`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from offset_overflow import overflowing_products

pytest.importorskip("triton", reason="ahead-of-time compiles need Triton")

HERE = Path(__file__).parent
TRITON_OPS = (
    "rms_norm",
    "add_rms_norm",
    "sandwich_norm",
    "swiglu",
    "rope",
    "rope_kv_write",
    "flash_decode",
    "merge_attention",
)


def run_without_interpreter(script: str | Path, *arguments: str) -> Any:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
    command = [sys.executable, str(script), *arguments]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return run_without_interpreter(HERE / "launches.py")


@pytest.fixture
def rows(measured, request) -> list[dict[str, Any]]:
    """The launches of one op; those that did not compile fail here."""
    rows = [row for row in measured["rows"] if row["op"] == request.param]
    assert rows, f"launches.py has no case for {request.param}"
    report([f"{name(row)}: {row['error']}" for row in rows if "error" in row])
    return rows


def name(row: dict[str, Any]) -> str:
    return f"{row['arch']} {row['kernel'] or row['op']} ({row['case']})"


def report(failures: list[str]) -> None:
    assert not failures, f"{len(failures)} failed:\n" + "\n".join(failures)


each_op = pytest.mark.parametrize("rows", TRITON_OPS, indirect=True)


@each_op
def test_stays_within_the_hardware(rows):
    from glm4_kernels.ahead_of_time import SHARED_LIMIT

    failures = []
    for row in rows:
        limit = SHARED_LIMIT[int(row["arch"].removeprefix("sm_"))]
        if row["figures"]["spill_bytes"]:
            failures.append(f"{name(row)}: spills {row['figures']['spill_bytes']} bytes a thread")
        if row["figures"]["shared_bytes"] > limit:
            used = row["figures"]["shared_bytes"]
            failures.append(f"{name(row)}: {used} bytes of shared memory, a block has {limit}")
    report(failures)


@each_op
def test_offsets_are_64_bit(rows):
    report([f"{name(row)}: {overflow}" for row in rows for overflow in row["overflows"]])


@each_op
def test_keeps_wide_loads_and_tensor_cores(rows, measured):
    from launches import figures_path, figures_table

    path = figures_path(measured["triton"])
    if not path.exists():
        pytest.skip(f"no figures of Triton {measured['triton']} are committed")
    committed = json.loads(path.read_text())
    hint = f"if that is meant, run `python tests/launches.py --write` and commit {path.name}"
    failures = []
    for arch, table in figures_table(rows).items():
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
    return ", ".join(lost)


def wide_share(loads: dict[str, int]) -> float:
    """The share of a thread's global reads that arrives 16 bytes or more at a time."""
    bits = {width: (128 if width == "bulk" else int(width)) for width in loads}
    total = sum(bits[width] * count for width, count in loads.items())
    wide = sum(bits[width] * count for width, count in loads.items() if bits[width] >= 128)
    return wide / total if total else 1.0


def test_every_kernel_is_launched(measured):
    assert measured["never_launched"] == [], "launches.py reaches none of these kernels"


def test_every_architecture_is_compiled(measured):
    from glm4_kernels.ahead_of_time import SHARED_LIMIT

    assert {row["arch"] for row in measured["rows"]} == {f"sm_{cc}" for cc in SHARED_LIMIT}


def test_the_harness_sees_faults():
    """Kernels with one fault each; what is measured of them must show it."""
    spilling, narrow, wide, dot, overflowing = run_without_interpreter(HERE / "faulty_kernels.py")
    assert spilling["figures"]["spill_bytes"] > 0
    assert wide["figures"]["loads"] == {"128": 1}
    assert losses(wide["figures"], narrow["figures"]).startswith("wide loads")
    assert dot["figures"]["mma"] == "wgmma" and dot["figures"]["shared_bytes"] > 99 * 1024
    assert losses(dot["figures"], {**dot["figures"], "mma": "none"}).startswith("tensor cores")
    assert len(overflowing["overflows"]) == 3
    assert [fault["overflows"] for fault in (spilling, narrow, wide, dot)] == [[], [], [], []]


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
