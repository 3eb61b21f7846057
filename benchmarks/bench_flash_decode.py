"""Decode attention over shuffled pages, beside PyTorch's SDPA on contiguous K and V of one length.

SDPA has no paged cache and no lengths on the device: its K and V are tensors of their own, already
gathered, and every sequence of a batch is equally long.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import Case
from benchmarks.shapes import SHAPES
from glm4_kernels.flash_decode import flash_decode, flash_decode_reference

DTYPE, PAGE_SIZE = torch.bfloat16, 64
TOLERANCE = torch.finfo(DTYPE).eps  # p and out are rounded once, each by at most half of it
MODELS = ("glm-4-9b", "glm-4-9b-chat-1m", "glm-4-32b-0414")
SIZES = {  # (batch, context)
    "cuda": [(batch, context << 10) for batch in (1, 8) for context in (8, 32, 128)],
    "cpu": [(1, 1024), (1, 8192), (8, 1024)],
}


def cases(device: torch.device) -> Iterator[Case]:
    for model in MODELS:
        for batch, context in SIZES[device.type]:
            yield case(model, batch, context, device)


def case(model: str, batch: int, context: int, device: torch.device) -> Case:
    shape = SHAPES[model]
    scale = shape.head_dim**-0.5
    pages = context // PAGE_SIZE

    def inputs() -> tuple:
        q = torch.randn(batch, shape.heads, shape.head_dim, dtype=DTYPE, device=device)
        k, v = torch.randn(
            2, batch, shape.kv_heads, context, shape.head_dim, dtype=DTYPE, device=device
        )
        table = torch.randperm(batch * pages, device=device)
        lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
        k_cache, v_cache = paged(k, table), paged(v, table)
        return q, k_cache, v_cache, table.int().view(batch, pages), lengths, k, v

    def paged(x: Tensor, table: Tensor) -> Tensor:
        in_order = x.unflatten(2, (pages, PAGE_SIZE)).transpose(1, 2).flatten(0, 1)
        cache = torch.empty_like(in_order, memory_format=torch.contiguous_format)
        cache[table] = in_order
        return cache

    def ours(q, k_cache, v_cache, table, lengths, *_) -> Tensor:
        return flash_decode(q, k_cache, v_cache, table, lengths, scale)

    def eager(q, k_cache, v_cache, table, lengths, *_) -> Tensor:
        return flash_decode_reference(q, k_cache, v_cache, table, lengths, scale)[0]

    def sdpa(q, _k_cache, _v_cache, _table, _lengths, k, v) -> Tensor:
        out = scaled_dot_product_attention(q.unsqueeze(2), k, v, scale=scale, enable_gqa=True)
        return out.squeeze(2)

    return Case(
        op="flash_decode",
        label=f"{model}, batch {batch}, {context // 1024}K keys",
        bytes_moved=2 * batch * context * shape.kv_heads * shape.head_dim * DTYPE.itemsize,
        flops=0,
        inputs=inputs,
        contenders={"glm4_kernels": ours, "torch eager": eager, "torch SDPA": sdpa},
        oracle=lambda q, k_cache, v_cache, *rest: eager(
            q.double(), k_cache.double(), v_cache.double(), *rest
        ),
        tolerance=TOLERANCE,
    )
