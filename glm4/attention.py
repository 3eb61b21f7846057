"""Prefill attention. On a GPU: the library's kernels on each part, our merge between them.

A chunk's rows see its sequence's prefix (all of it) and themselves (causally), and softmax over a
union of keys is a merge of the parts by their log-sum-exp:

    attention(chunk) = merge(dense over the prefix, segment by segment; causal on the chunk)

K and V come from their pages, one segment at a time, so extra memory is bounded by the chunk and
the segment, not by the context. Partial results are merged in fp32 and rounded once.

On a CPU the library's kernel takes 24 ms a layer for 512 tokens of GLM-4-9B, a fifth of what the
layer's int8 matmuls take, our decode kernel a fifth of that: there a chunk runs as many decode
steps at once, each a few rows of it, over the pages where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import glm4_kernels as gk
from glm4.cache import PAGE_SIZE, Step
from glm4_kernels.extension import HAS_EXTENSION
from glm4_kernels.flash_decode import MAX_QUERIES

# Tokens of prefix that are gathered at a time: 2 * 8192 * G * D values.
SEGMENT = 128 * PAGE_SIZE
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
    """Where each sequence of a prefill step stands; waits for the device once."""
    assert step.query_lens is not None
    chunks, row = [], 0
    for i, (length, stop) in enumerate(zip(step.query_lens, step.seq_lens.tolist(), strict=True)):
        chunks.append(Chunk(slice(row, row + length), step.block_table[i], stop - length, stop))
        row += length
    return chunks


def prefill_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, chunks: list[Chunk], scale: float
) -> Tensor:
    """q [T, H, D], its K and V already in their pages -> [T, H, D]."""
    y = torch.empty_like(q)
    for chunk in chunks:
        if chunk.start == chunk.stop:
            continue
        if q.device.type == "cpu" and HAS_EXTENSION:
            y[chunk.rows] = decode_attention(q[chunk.rows], k_cache, v_cache, chunk, scale)
            continue
        q_chunk = q[chunk.rows].transpose(0, 1)[None]  # [1, H, Q, D]
        k, v = (gather(cache, chunk.pages, chunk.start, chunk.stop) for cache in (k_cache, v_cache))
        if chunk.start == 0:
            out = F.scaled_dot_product_attention(
                q_chunk, k, v, is_causal=True, scale=scale, enable_gqa=True
            )[0].transpose(0, 1)  # [Q, H, D]
        else:
            out, lse = partial_attention(q_chunk, k, v, scale, causal=True)
            for start in range(0, chunk.start, SEGMENT):
                stop = min(start + SEGMENT, chunk.start)
                k, v = (gather(cache, chunk.pages, start, stop) for cache in (k_cache, v_cache))
                prefix = partial_attention(q_chunk, k, v, scale, causal=False)
                out, lse = gk.merge_attention(out, lse, *prefix)  # [Q, H, D], [Q, H]
        y[chunk.rows] = out.to(q.dtype)
    return y


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, chunk: Chunk, scale: float
) -> Tensor:
    """One chunk by the decode kernel: each block of rows is a sequence that ends with its last.

    q [Q, H, D] -> [Q, H, D].
    """
    blocks, rest = divmod(len(q), MAX_QUERIES)
    at_once = max(BLOCKS_TIMES_KEYS // chunk.stop, 1)
    parts = []
    for first in range(0, blocks, at_once):
        n = min(at_once, blocks - first)
        rows = q[first * MAX_QUERIES : (first + n) * MAX_QUERIES]
        ends = torch.arange(first + 1, first + n + 1, dtype=torch.int32) * MAX_QUERIES
        parts.append((rows.unflatten(0, (n, MAX_QUERIES)), ends + chunk.start))
    if rest:
        parts.append((q[None, -rest:], torch.tensor([chunk.stop], dtype=torch.int32)))
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
    tokens = cache[pages[first : -(-stop // PAGE_SIZE)]].transpose(0, 1).flatten(1, 2)
    return tokens[None, :, start - first * PAGE_SIZE : stop - first * PAGE_SIZE]


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention with its log-sum-exp, by the library kernel that gives it on this device.

    q [1, H, Q, D], k and v [1, G, N, D] -> float32 (out [Q, H, D], lse [Q, H]).

    These are private ops of torch; tests/test_model.py runs them against the formula, so that a
    torch that changed them shows. On CPU the op takes grouped heads as they are; on CUDA K and V
    are expanded first, which costs one segment.
    """
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scale
        )
    else:
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        if q.dtype == torch.float32:
            out, lse = aten._scaled_dot_product_efficient_attention(
                q, k, v, None, True, 0.0, causal, scale=scale
            )[:2]
        else:
            out, lse = aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, causal, False, scale=scale
            )[:2]
        lse = lse[:, :, : q.shape[2]]  # padded to whole tiles
    return out[0].transpose(0, 1).float(), lse[0].transpose(0, 1).float()
