"""RMSNorm at the widths of GLM-4, beside PyTorch's own fused `rms_norm` (rounded once)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case, dependent_launch, torch_peers
from benchmarks.libraries import library_peers
from benchmarks.shapes import SHAPES, TOKENS
from glm4_kernels.rms_norm import launch_rms_norm, rms_norm, rms_norm_reference

DTYPE, EPS = torch.bfloat16, 1.5625e-07
TOLERANCE = torch.finfo(DTYPE).eps  # each of two roundings costs at most half of it


def cases(device: torch.device) -> Iterator[Case]:
    for model in ("glm-4-9b", "glm-4-32b-0414"):
        for n_tokens in TOKENS[device.type]:
            yield case(model, n_tokens, device)


def case(model: str, n_tokens: int, device: torch.device) -> Case:
    n_cols = SHAPES[model].hidden

    def inputs() -> tuple:
        x = torch.randn(n_tokens, n_cols, dtype=DTYPE, device=device)
        return x, torch.randn(n_cols, dtype=DTYPE, device=device), EPS

    return Case(
        op="rms_norm",
        label=f"{model}, {n_tokens} tokens",
        bytes_moved=(2 * n_tokens + 1) * n_cols * DTYPE.itemsize,
        flops=0,
        inputs=inputs,
        contenders={
            "glm4_kernels": rms_norm,
            **torch_peers(rms_norm_reference, device),
            **library_peers("rms_norm", device),
            **dependent_launch(launch_rms_norm, device),
            "torch rms_norm": lambda x, weight, eps: torch.nn.functional.rms_norm(
                x, (n_cols,), weight, eps
            ),
        },
        oracle=lambda x, weight, eps: rms_norm_reference(x.double(), weight.double(), eps),
        tolerance=TOLERANCE,
    )
