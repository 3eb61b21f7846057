"""Decode attention over shuffled pages, beside PyTorch's SDPA on contiguous K and V of one length.

SDPA has no paged cache, no lengths on the device and no int8 cache: its K and V are bf16 tensors
of their own, already gathered (and dequantised), and every sequence of a batch is equally long.
`rows` gives it the query heads of a group as rows of one head, its best form on the CPU, where
`enable_gqa` reads every KV head once for each query head.
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
SIZES: dict[str, list[tuple[str, int, int, torch.dtype]]] = {  # model, batch, context, cache
    "cuda": [
        (model, batch, context << 10, DTYPE)
        for model in ("glm-4-9b", "glm-4-9b-chat-1m", "glm-4-32b-0414")
        for batch in (1, 8)
        for context in (8, 32, 128)
    ],
    "cpu": [
        *(
            ("glm-4-9b", 1, context << 10, cache)
            for cache in (DTYPE, torch.int8)
            for context in (4, 32, 128)
        ),
        ("glm-4-9b", 8, 1024, DTYPE),
        ("glm-4-9b-chat-1m", 1, 8192, DTYPE),
        ("glm-4-32b-0414", 1, 8192, DTYPE),
    ],
}


def cases(device: torch.device) -> Iterator[Case]:
    for model, batch, context, cache_dtype in SIZES[device.type]:
        yield case(model, batch, context, cache_dtype, device)


def case(
    model: str, batch: int, context: int, cache_dtype: torch.dtype, device: torch.device
) -> Case:
    shape = SHAPES[model]
    scale = shape.head_dim**-0.5
    pages = context // PAGE_SIZE
    quantised = cache_dtype == torch.int8

    def inputs() -> tuple:
        q = torch.randn(batch, shape.heads, shape.head_dim, dtype=DTYPE, device=device)
        k, v = torch.randn(
            2, batch, shape.kv_heads, context, shape.head_dim, dtype=DTYPE, device=device
        )
        table = torch.randperm(batch * pages, device=device)
        lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
        scales: tuple = (None, None)
        k_cache, v_cache = k, v
        if quantised:
            (k_cache, k_scale), (v_cache, v_scale) = rounded(k), rounded(v)
            k, v = ((c * s).to(DTYPE) for c, s in ((k_cache, k_scale), (v_cache, v_scale)))
            scales = tuple(paged(s, table).squeeze(-1) for s in (k_scale, v_scale))
        k_cache, v_cache = paged(k_cache, table), paged(v_cache, table)
        paging = (table.int().view(batch, pages), lengths)
        return q, k_cache, v_cache, *paging, *scales, k, v

    def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
        step = x.float().abs().amax(-1, keepdim=True) / 127
        return (x / step).round().to(torch.int8), step

    def paged(x: Tensor, table: Tensor) -> Tensor:
        in_order = x.unflatten(2, (pages, PAGE_SIZE)).transpose(1, 2).flatten(0, 1)
        cache = torch.empty_like(in_order, memory_format=torch.contiguous_format)
        cache[table] = in_order
        return cache

    def ours(q, k_cache, v_cache, table, lengths, k_scale, v_scale, *_) -> Tensor:
        return flash_decode(q, k_cache, v_cache, table, lengths, scale, k_scale, v_scale)

    def eager(q, k_cache, v_cache, table, lengths, k_scale, v_scale, *_) -> Tensor:
        return flash_decode_reference(q, k_cache, v_cache, table, lengths, scale, k_scale, v_scale)[
            0
        ]

    def oracle(q, k_cache, v_cache, *rest) -> Tensor:
        return eager(q.double(), k_cache.double(), v_cache.double(), *rest)

    def sdpa(q, *rest) -> Tensor:
        k, v = rest[-2:]
        out = scaled_dot_product_attention(q.unsqueeze(2), k, v, scale=scale, enable_gqa=True)
        return out.squeeze(2)

    def sdpa_rows(q, *rest) -> Tensor:
        k, v = rest[-2:]
        rows = q.unflatten(1, (shape.kv_heads, -1))
        return scaled_dot_product_attention(rows, k, v, scale=scale).flatten(1, 2)

    contenders = {"glm4_kernels": ours, "torch eager": eager, "torch SDPA": sdpa}
    if device.type == "cpu":
        contenders["torch SDPA rows"] = sdpa_rows
    token_bytes = shape.head_dim * cache_dtype.itemsize + (4 if quantised else 0)
    cache_name = ", int8 cache" if quantised else ""
    return Case(
        op="flash_decode",
        label=f"{model}, batch {batch}, {context // 1024}K keys{cache_name}",
        bytes_moved=2 * batch * context * shape.kv_heads * token_bytes,
        flops=0,
        inputs=inputs,
        contenders=contenders,
        oracle=oracle,
        tolerance=TOLERANCE,
    )
