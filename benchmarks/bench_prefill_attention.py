"""A prompt's attention in chunks over its pages, as the engine reads it, beside PyTorch's SDPA on
the whole prompt: K and V gathered already, no pages, no chunks. Ours also pays for joining its
chunks, which the engine does not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import Case
from benchmarks.shapes import SHAPES
from glm4.attention import Chunk, prefill_attention
from glm4.cache import PAGE_SIZE
from glm4.generation import PREFILL_CHUNK

DTYPE = torch.bfloat16
# The library rounds p and out of each part, our merge its result: three roundings, each by at most
# half of this, and one more where parts of opposite sign cancel.
TOLERANCE = 2 * torch.finfo(DTYPE).eps
SIZES = {
    "cuda": (("glm-4-9b", 8192), ("glm-4-9b", 32768), ("glm-4-32b-0414", 32768)),
    "cpu": (("glm-4-9b", 1024),),
}
ORACLE_ROWS = 512


def cases(device: torch.device) -> Iterator[Case]:
    for model, length in SIZES[device.type]:
        yield case(model, length, device)


def case(model: str, length: int, device: torch.device) -> Case:
    shape, chunk = SHAPES[model], PREFILL_CHUNK[device.type]
    scale = shape.head_dim**-0.5

    def inputs() -> tuple:
        q = torch.randn(length, shape.heads, shape.head_dim, dtype=DTYPE, device=device)
        n_pages = length // PAGE_SIZE
        k_cache, v_cache = torch.randn(
            2, n_pages, shape.kv_heads, PAGE_SIZE, shape.head_dim, dtype=DTYPE, device=device
        )
        pages = torch.randperm(n_pages, device=device).int()
        k, v = (c[pages].transpose(0, 1).flatten(1, 2)[None] for c in (k_cache, v_cache))
        return q, k_cache, v_cache, pages, k, v

    def ours(q, k_cache, v_cache, pages, *_) -> Tensor:
        parts = []
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
            chunks = [Chunk(slice(0, stop - start), pages, start, stop)]
            parts.append(prefill_attention(q[start:stop], k_cache, v_cache, chunks, scale))
        return torch.cat(parts)

    def sdpa(q, *rest) -> Tensor:
        rows = q.transpose(0, 1)[None]
        out = scaled_dot_product_attention(
            rows, *rest[-2:], is_causal=True, scale=scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    def oracle(q, *rest) -> Tensor:
        """Some rows and one group of heads at a time: all scores would take gigabytes."""
        k, v = (x[0].double().transpose(0, 1) for x in rest[-2:])  # [N, G, D]
        group = shape.heads // shape.kv_heads
        out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
        for first in range(0, length, ORACLE_ROWS):
            rows = q[first : first + ORACLE_ROWS].double()
            stop = first + len(rows)
            ones = torch.ones(len(rows), stop, dtype=torch.bool, device=q.device)
            hidden = ones.triu(first + 1)[:, None]
            for head in range(shape.kv_heads):
                heads = slice(head * group, (head + 1) * group)
                scores = torch.einsum("qhd,nd->qhn", rows[:, heads], k[:stop, head]) * scale
                p = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
                out[first:stop, heads] = torch.einsum("qhn,nd->qhd", p, v[:stop, head])
        return out

    return Case(
        op="prefill_attention",
        label=f"{model}, {length} tokens, chunks of {chunk}",
        bytes_moved=2 * length * (shape.heads + shape.kv_heads) * shape.head_dim * DTYPE.itemsize,
        flops=2 * length**2 * shape.heads * shape.head_dim,
        inputs=inputs,
        contenders={"glm4_kernels": ours, "torch SDPA, whole prompt": sdpa},
        oracle=oracle,
        tolerance=TOLERANCE,
    )
