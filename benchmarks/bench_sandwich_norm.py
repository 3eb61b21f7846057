"""Norm, residual add, norm: twice a layer in GLM-4-0414."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case, dependent_launch, torch_peers
from benchmarks.libraries import library_peers
from benchmarks.shapes import SHAPES, TOKENS
from glm4_kernels.add_rms_norm import add_rms_norm
from glm4_kernels.rms_norm import rms_norm
from glm4_kernels.sandwich_norm import (
    launch_sandwich_norm,
    sandwich_norm,
    sandwich_norm_reference,
)

DTYPE, EPS = torch.bfloat16, 1e-5
TOLERANCE = torch.finfo(DTYPE).eps  # five roundings, none above half of it, that do not line up


def cases(device: torch.device) -> Iterator[Case]:
    for model in ("glm-4-9b-0414", "glm-4-32b-0414"):
        for n_tokens in TOKENS[device.type]:
            yield case(model, n_tokens, device)


def case(model: str, n_tokens: int, device: torch.device) -> Case:
    n_cols = SHAPES[model].hidden

    def inputs() -> tuple:
        x, residual = torch.randn(2, n_tokens, n_cols, dtype=DTYPE, device=device)
        post_weight, pre_weight = torch.randn(2, n_cols, dtype=DTYPE, device=device)
        return x, residual, post_weight, pre_weight, EPS

    return Case(
        op="sandwich_norm",
        label=f"{model}, {n_tokens} tokens",
        bytes_moved=(4 * n_tokens + 2) * n_cols * DTYPE.itemsize,
        flops=0,
        inputs=inputs,
        contenders={
            "glm4_kernels": sandwich_norm,
            **torch_peers(sandwich_norm_reference, device),
            "unfused": lambda x, residual, post_weight, pre_weight, eps: add_rms_norm(
                rms_norm(x, post_weight, eps), residual, pre_weight, eps
            ),
            **library_peers("sandwich_norm", device),
            **dependent_launch(launch_sandwich_norm, device),
        },
        oracle=lambda x, residual, post_weight, pre_weight, eps: sandwich_norm_reference(
            x.double(), residual.double(), post_weight.double(), pre_weight.double(), eps
        ),
        tolerance=TOLERANCE,
    )
