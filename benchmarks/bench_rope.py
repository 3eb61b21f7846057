"""Partial interleaved RoPE on q and k, views of a packed qkv projection."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case, dependent_launch, torch_peers
from benchmarks.libraries import library_peers
from benchmarks.shapes import SHAPES, TOKENS
from glm4_kernels.rope import launch_rope, rope, rope_reference
from glm4_kernels.rope_table import rope_table

DTYPE, CONTEXT, THETA = torch.bfloat16, 131072, 5e6
TOLERANCE = torch.finfo(DTYPE).eps  # each of three roundings costs at most half of it


def cases(device: torch.device) -> Iterator[Case]:
    table = rope_table(CONTEXT, THETA, dtype=DTYPE, device=device)
    for model in ("glm-4-9b", "glm-z1-rumination-32b-0414"):
        for n_tokens in TOKENS[device.type]:
            yield case(model, n_tokens, table)


def case(model: str, n_tokens: int, table: torch.Tensor) -> Case:
    shape, device = SHAPES[model], table.device
    n_rotated = shape.heads + shape.kv_heads
    wide_table = table.float()  # FlashInfer takes no other
    libraries = {
        name: lambda q, k, positions, _, call=call: call(q, k, positions, wide_table)
        for name, call in library_peers("rope", device).items()
    }

    def inputs() -> tuple:
        n_packed = n_rotated + shape.kv_heads
        qkv = torch.randn(n_tokens, n_packed, shape.head_dim, dtype=DTYPE, device=device)
        q, k, _ = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        return q, k, torch.randint(CONTEXT, (n_tokens,), device=device), table

    return Case(
        op="rope",
        label=f"{model}, {n_tokens} tokens",
        bytes_moved=2 * n_tokens * n_rotated * shape.head_dim * DTYPE.itemsize
        + n_tokens * (shape.rotary_dim * DTYPE.itemsize + 8),
        flops=0,
        inputs=inputs,
        contenders={
            "glm4_kernels": rope,
            **torch_peers(rope_reference, device),
            **libraries,
            **dependent_launch(launch_rope, device),
        },
        oracle=lambda q, k, positions, table: rope_reference(
            q.double(), k.double(), positions, table.double()
        ),
        tolerance=TOLERANCE,
    )
