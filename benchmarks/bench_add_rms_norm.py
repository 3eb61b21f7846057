"""Residual add and RMSNorm: twice a layer in GLM-4-9B (2024)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Case, dependent_launch, torch_peers
from benchmarks.libraries import library_peers
from benchmarks.shapes import SHAPES, TOKENS
from glm4_kernels.add_rms_norm import (
    add_rms_norm,
    add_rms_norm_reference,
    launch_add_rms_norm,
)
from glm4_kernels.rms_norm import rms_norm

DTYPE, EPS = torch.bfloat16, 1.5625e-07
TOLERANCE = torch.finfo(DTYPE).eps  # each of three roundings costs at most half of it, in any row


def cases(device: torch.device) -> Iterator[Case]:
    for n_tokens in TOKENS[device.type]:
        yield case("glm-4-9b", n_tokens, device)


def case(model: str, n_tokens: int, device: torch.device) -> Case:
    n_cols = SHAPES[model].hidden

    def inputs() -> tuple:
        x, residual = torch.randn(2, n_tokens, n_cols, dtype=DTYPE, device=device)
        return x, residual, torch.randn(n_cols, dtype=DTYPE, device=device), EPS

    return Case(
        op="add_rms_norm",
        label=f"{model}, {n_tokens} tokens",
        bytes_moved=(4 * n_tokens + 1) * n_cols * DTYPE.itemsize,
        flops=0,
        inputs=inputs,
        contenders={
            "glm4_kernels": add_rms_norm,
            **torch_peers(add_rms_norm_reference, device),
            "unfused": unfused,
            **library_peers("add_rms_norm", device),
            **dependent_launch(launch_add_rms_norm, device),
        },
        oracle=lambda x, residual, weight, eps: add_rms_norm_reference(
            x.double(), residual.double(), weight.double(), eps
        ),
        tolerance=TOLERANCE,
    )


def unfused(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual = residual + x
    return rms_norm(residual, weight, eps), residual
