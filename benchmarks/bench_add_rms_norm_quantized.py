"""Residual add and RMSNorm, with a quantised result: as bench_rms_norm_quantized does it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.bench_rms_norm_quantized import quantised_cases
from benchmarks.harness import Case
from glm4_kernels.add_rms_norm import (
    add_rms_norm,
    add_rms_norm_quantized,
    add_rms_norm_quantized_reference,
    launch_add_rms_norm_quantized,
)


def cases(device: torch.device) -> Iterator[Case]:
    yield from quantised_cases(
        *("add_rms_norm_quantized", 2, 1, device),
        *(add_rms_norm_quantized, add_rms_norm_quantized_reference),
        *(launch_add_rms_norm_quantized, add_rms_norm),
    )
