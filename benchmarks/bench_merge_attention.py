"""Two partial attentions merged: a decode step's rows, and a prefill chunk against its prefix."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case, torch_peers
from benchmarks.shapes import SHAPES, TOKENS
from glm4_kernels.merge_attention import merge_attention, merge_attention_reference

DTYPE = torch.bfloat16
TOLERANCE = torch.finfo(DTYPE).eps  # one rounding costs at most half of it


def cases(device: torch.device) -> Iterator[Case]:
    for model in ("glm-4-9b", "glm-4-32b-0414"):
        for n_tokens in TOKENS[device.type]:
            yield case(model, n_tokens, device)


def case(model: str, n_tokens: int, device: torch.device) -> Case:
    shape = SHAPES[model]
    rows = (n_tokens, shape.heads)

    def inputs() -> tuple:
        out_a, out_b = torch.randn(2, *rows, shape.head_dim, dtype=DTYPE, device=device)
        lse_a, lse_b = torch.randn(2, *rows, device=device)
        return out_a, lse_a, out_b, lse_b

    return Case(
        op="merge_attention",
        label=f"{model}, {n_tokens} tokens",
        bytes_moved=n_tokens * shape.heads * (3 * shape.head_dim * DTYPE.itemsize + 12),
        flops=0,
        inputs=inputs,
        contenders={
            "glm4_kernels": merge_attention,
            **torch_peers(merge_attention_reference, device),
        },
        oracle=lambda *sides: merge_attention_reference(*(side.double() for side in sides)),
        tolerance=TOLERANCE,
    )
