"""Packed qkv to rotated q and a written KV page, beside the same in plain PyTorch, and beside our
`rope` before plain writes ("unfused"). No library has it in one kernel.

The plain code writes every slot: skipping those of -1, as the reference does, would synchronise.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Case, dependent_launch, torch_peers
from benchmarks.shapes import SHAPES, TOKENS
from glm4_kernels.rope import rope, rope_reference
from glm4_kernels.rope_kv_write import (
    launch_rope_kv_write,
    quantise_heads,
    rope_kv_write,
    rope_kv_write_reference,
)
from glm4_kernels.rope_table import rope_table

DTYPE, CONTEXT, THETA, PAGE_SIZE = torch.bfloat16, 131072, 5e6, 64
TOLERANCE = torch.finfo(DTYPE).eps  # each of four roundings costs at most half of it


def cases(device: torch.device) -> Iterator[Case]:
    table = rope_table(CONTEXT, THETA, dtype=DTYPE, device=device)
    for model in ("glm-4-9b", "glm-z1-rumination-32b-0414"):
        for cache_dtype in (DTYPE, torch.int8):
            for n_tokens in TOKENS[device.type]:
                yield case(model, n_tokens, cache_dtype, table)


def case(model: str, n_tokens: int, cache_dtype: torch.dtype, table: Tensor) -> Case:
    shape, device = SHAPES[model], table.device
    n_pages = max(n_tokens // 4, 2)
    pages = (n_pages, shape.kv_heads, PAGE_SIZE)
    width = shape.linears["qkv"][0]
    quantised = cache_dtype == torch.int8

    def inputs() -> tuple:
        k_cache, v_cache = torch.zeros(2, *pages, shape.head_dim, dtype=cache_dtype, device=device)
        scales = torch.zeros(2, *pages, device=device).unbind() if quantised else (None, None)
        return (
            torch.randn(n_tokens, width, dtype=DTYPE, device=device),
            torch.randint(CONTEXT, (n_tokens,), device=device),
            table,
            k_cache,
            v_cache,
            torch.randperm(n_pages * PAGE_SIZE, device=device)[:n_tokens],
            shape.heads,
            torch.randn(width, dtype=DTYPE, device=device) if shape.qkv_bias else None,
            *scales,
        )

    def oracle(qkv, positions, table, k_cache, v_cache, slots, n_heads, bias, *_) -> Tensor:
        return rope_kv_write_reference(
            qkv.double(),
            positions,
            table.double(),
            k_cache.double(),
            v_cache.double(),
            slots,
            n_heads,
            None if bias is None else bias.double(),
        )

    written = 2 * shape.kv_heads * (shape.head_dim * cache_dtype.itemsize + 4 * quantised)
    per_token = (width + shape.heads * shape.head_dim + shape.rotary_dim) * DTYPE.itemsize
    return Case(
        op="rope_kv_write",
        label=f"{model}, {n_tokens} tokens, {'int8' if quantised else 'bf16'} cache",
        bytes_moved=n_tokens * (per_token + 16 + written) + width * DTYPE.itemsize * shape.qkv_bias,
        flops=0,
        inputs=inputs,
        contenders={
            "glm4_kernels": rope_kv_write,
            **torch_peers(partial(plain, rope_reference), device),
            "unfused": partial(plain, rope),
            **dependent_launch(launch_rope_kv_write, device),
        },
        oracle=oracle,
        tolerance=TOLERANCE,
    )


def plain(
    rotate, qkv, positions, table, k_cache, v_cache, slots, n_heads, bias, k_scale, v_scale
) -> Tensor:
    n_kv_heads, page_size, head_dim = k_cache.shape[1:]
    qkv = qkv if bias is None else qkv + bias
    heads = qkv.unflatten(1, (n_heads + 2 * n_kv_heads, head_dim))
    q, k, v = heads.split([n_heads, n_kv_heads, n_kv_heads], dim=1)
    q, k = rotate(q, k, positions, table)
    page, offset = slots // page_size, slots % page_size
    for x, cache, cache_scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if cache_scale is not None:
            x, scale = quantise_heads(x, cache.dtype)
            cache_scale[page, :, offset] = scale
        cache[page, :, offset] = x
    return q
