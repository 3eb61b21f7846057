"""Norm, residual add, norm, with a quantised result: as bench_rms_norm_quantized does it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.bench_rms_norm_quantized import quantised_cases
from benchmarks.harness import Case
from glm4_kernels.sandwich_norm import (
    launch_sandwich_norm_quantized,
    sandwich_norm,
    sandwich_norm_quantized,
    sandwich_norm_quantized_reference,
)


def cases(device: torch.device) -> Iterator[Case]:
    yield from quantised_cases(
        *("sandwich_norm_quantized", 2, 2, device),
        *(sandwich_norm_quantized, sandwich_norm_quantized_reference),
        *(launch_sandwich_norm_quantized, sandwich_norm),
    )
