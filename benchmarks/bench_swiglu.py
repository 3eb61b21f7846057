"""SwiGLU on the packed gate_up of GLM-4, whose 13696 columns are no power of two."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case, dependent_launch, torch_peers
from benchmarks.libraries import library_peers
from benchmarks.shapes import SHAPES, TOKENS
from glm4_kernels.swiglu import launch_swiglu, swiglu, swiglu_reference

DTYPE = torch.bfloat16
TOLERANCE = torch.finfo(DTYPE).eps  # each of two roundings costs at most half of it


def cases(device: torch.device) -> Iterator[Case]:
    for model in ("glm-4-9b", "glm-4-32b-0414"):
        for n_tokens in TOKENS[device.type]:
            yield case(model, n_tokens, device)


def case(model: str, n_tokens: int, device: torch.device) -> Case:
    n_cols = SHAPES[model].ffn
    return Case(
        op="swiglu",
        label=f"{model}, {n_tokens} tokens",
        bytes_moved=3 * n_tokens * n_cols * DTYPE.itemsize,
        flops=0,
        inputs=lambda: (torch.randn(n_tokens, 2 * n_cols, dtype=DTYPE, device=device),),
        contenders={
            "glm4_kernels": swiglu,
            **torch_peers(swiglu_reference, device),
            "unfused": unfused,
            **library_peers("swiglu", device),
            **dependent_launch(launch_swiglu, device),
        },
        oracle=lambda gate_up: swiglu_reference(gate_up.double()),
        tolerance=TOLERANCE,
    )


def unfused(gate_up: torch.Tensor) -> torch.Tensor:
    """Two kernels; silu's result goes to memory and back."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)
