"""How a batch's keys are shared out, once per decode step; to be seen beside flash_decode's times.

Its bytes are the lengths and the table: a floor that a kernel of one program never meets.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case
from benchmarks.shapes import SHAPES
from glm4_kernels.decode_schedule import decode_schedule, decode_schedule_reference


def cases(device: torch.device) -> Iterator[Case]:
    for batch in (1, 64):
        for batch_invariant in (False, True):
            yield case(batch, batch_invariant, device)


def case(batch: int, batch_invariant: bool, device: torch.device) -> Case:
    shape = SHAPES["glm-4-9b"]
    sizes = shape.heads, shape.kv_heads, 1, batch_invariant
    rows = len(decode_schedule_reference(torch.ones(batch, dtype=torch.int32), *sizes))

    def inputs() -> tuple:
        return (torch.randint(1, 32768, (batch,), dtype=torch.int32, device=device),)

    def eager(lengths):
        return decode_schedule_reference(lengths, *sizes)

    return Case(
        op="decode_schedule",
        label=f"glm-4-9b, batch {batch}{', batch-invariant' if batch_invariant else ''}",
        bytes_moved=4 * batch + 16 * rows,
        flops=0,
        inputs=inputs,
        contenders={
            "glm4_kernels": lambda lengths: decode_schedule(lengths, *sizes),
            "torch eager": eager,
        },
        oracle=eager,
        tolerance=0.0,
    )
