"""Prefill attention. On a GPU: the library's kernels on each part, our merge between them.

A chunk's rows see its sequence's prefix (all of it) and themselves (causally), and softmax over a
union of keys is a merge of the parts by their log-sum-exp:

    attention(chunk) = merge(dense over the prefix, segment by segment; causal on the chunk)

K and V come from their pages, one segment at a time, so extra memory is bounded by the chunk and
the segment, not by the context. The library rounds each part to the dtype of q; two parts merge in
that dtype, more of them in fp32, and the result is rounded once more.

On a CPU the library's kernel takes 24 ms a layer for 512 tokens of GLM-4-9B, a fifth of what the
layer's int8 matmuls take, our decode kernel a fifth of that: there a chunk runs as many decode
steps at once, each a few rows of it, over the pages where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import glm4_kernels as gk
from glm4.cache import PAGE_SIZE, Step
from glm4_kernels.extension import HAS_EXTENSION
from glm4_kernels.flash_decode import MAX_QUERIES

# Tokens of prefix that are gathered at a time: 2 * 65536 * G * D values, 67 MB for GLM-4-9B.
# A merge moves 3 H D values a row, a key takes 4 H D flops: at 4 TB/s and 600 TFLOP/s a merge is
# worth 230 keys in bf16 and some 900 in fp32, casts included; a segment of 8192 would pay a tenth.
SEGMENT = 1024 * PAGE_SIZE
# cuDNN builds a plan for each new pair of lengths, for tens of milliseconds on the host; so it only
# gets lengths that come again, multiples of this.
CUDNN_LENGTHS = 1024
# Blocks of rows times keys that one call of the decode kernel takes on a CPU: its partial results
# are then at most 17 MB for GLM-4-9B.
BLOCKS_TIMES_KEYS = 1 << 15


@dataclass(frozen=True)
class Chunk:
    """The rows of one sequence in a prefill step."""

    rows: slice
    pages: Tensor  # [max_pages], this sequence's row of the block table
    start: int  # tokens in the cache before this chunk
    stop: int  # and after it


def chunks_of(step: Step) -> list[Chunk]:
    """Where each sequence of a prefill step stands."""
    assert step.spans is not None
    chunks, row = [], 0
    for pages, (start, stop) in zip(step.block_table, step.spans, strict=True):
        chunks.append(Chunk(slice(row, row + stop - start), pages, start, stop))
        row += stop - start
    return chunks


def prefill_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, chunks: list[Chunk], scale: float
) -> Tensor:
    """q [T, H, D], its K and V already in their pages -> [T, H, D]."""
    by_kernel = q.device.type == "cpu" and HAS_EXTENSION
    attention = decode_attention if by_kernel else merged_attention
    parts = [
        attention(q[chunk.rows], k_cache, v_cache, chunk, scale)
        for chunk in chunks
        if chunk.start < chunk.stop
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty_like(q)


def merged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, chunk: Chunk, scale: float
) -> Tensor:
    """One chunk by the library: q [Q, H, D] -> [Q, H, D]."""

    def part(start: int, stop: int, causal: bool) -> tuple[Tensor, Tensor]:
        k, v = (gather(cache, chunk.pages, start, stop) for cache in (k_cache, v_cache))
        return partial_attention(q.transpose(0, 1)[None], k, v, scale, causal)

    out, lse = part(chunk.start, chunk.stop, causal=True)
    for start in range(0, chunk.start, SEGMENT):
        stop = min(start + SEGMENT, chunk.start)
        prefix_out, prefix_lse = part(start, stop, causal=False)
        if chunk.start > SEGMENT:
            out, prefix_out = out.float(), prefix_out.float()
        out, lse = gk.merge_attention(out, lse, prefix_out, prefix_lse)
    return out.to(q.dtype)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, chunk: Chunk, scale: float
) -> Tensor:
    """One chunk by the decode kernel: each block of rows is a sequence that ends with its last.

    q [Q, H, D] -> [Q, H, D].
    """
    blocks, rest = divmod(len(q), MAX_QUERIES)
    at_once = max(BLOCKS_TIMES_KEYS // chunk.stop, 1)
    ends = torch.arange(1, blocks + 1, dtype=torch.int32, device=q.device) * MAX_QUERIES
    parts = []
    for first in range(0, blocks, at_once):
        n = min(at_once, blocks - first)
        rows = q[first * MAX_QUERIES : (first + n) * MAX_QUERIES]
        parts.append((rows.unflatten(0, (n, MAX_QUERIES)), chunk.start + ends[first : first + n]))
    if rest:
        parts.append((q[None, -rest:], ends.new_tensor([chunk.stop])))
    return torch.cat(
        [
            gk.flash_decode(
                rows, k_cache, v_cache, chunk.pages.expand(len(rows), -1), ends, scale
            ).flatten(0, 1)
            for rows, ends in parts
        ]
    )


def gather(cache: Tensor, pages: Tensor, start: int, stop: int) -> Tensor:
    """Tokens start..stop of a sequence: cache [n_pages, G, PAGE_SIZE, D] -> [1, G, N, D]."""
    first = start // PAGE_SIZE
    pages = pages[first : -(-stop // PAGE_SIZE)]
    tokens = cache.transpose(0, 1).index_select(1, pages).flatten(1, 2)  # one copy
    return tokens[None, :, start - first * PAGE_SIZE : stop - first * PAGE_SIZE]


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention with its log-sum-exp, by the kernel that torch's SDPA would take on this device.

    q [1, H, Q, D], k and v [1, G, N, D] -> (out [Q, H, D] in the dtype of q, lse [Q, H] float32).

    These are private ops of torch; tests/test_model.py runs them against the formula, so that a
    torch that changed them shows. All but the last take grouped heads as they are.
    """
    aten = torch.ops.aten
    args = (q, k, v, 0.0, causal)
    backend = torch._fused_sdp_choice(q, k, v, None, 0.0, causal, scale=scale, enable_gqa=True)
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*args, scale=scale)
    elif backend == SDPBackend.CUDNN_ATTENTION.value and recurring(q.shape[2], k.shape[2]):
        out, lse = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, scale=scale
        )[:2]
    elif q.dtype in (torch.bfloat16, torch.float16):
        out, lse = aten._scaled_dot_product_flash_attention(*args, scale=scale)[:2]
    else:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        out, lse = aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=scale
        )[:2]
    # cuDNN gives [1, H, Q, 1]; others may pad Q to whole tiles.
    lse = lse.flatten(2)[0, :, : q.shape[2]].transpose(0, 1)
    return out[0].transpose(0, 1), lse.float()


def recurring(n_rows: int, n_keys: int) -> bool:
    return n_rows % CUDNN_LENGTHS == 0 and n_keys % CUDNN_LENGTHS == 0
