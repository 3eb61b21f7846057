"""The paged KV cache, and the description of one forward pass over it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glm4_kernels.huge_pages import zeros_in_huge_pages

PAGE_SIZE = 64


@dataclass(frozen=True)
class Step:
    """One forward pass: T packed rows of B sequences, the rows of a sequence consecutive.

    A slot is `page * PAGE_SIZE + offset`; -1 writes nothing (padding). A decode step has one row a
    sequence, T = B, and its `seq_lens` count the tokens in the cache once it has written its own. A
    prefill has `spans` instead: each sequence's tokens in the cache before and after the pass,
    known to the host.
    """

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64
    block_table: Tensor  # [B, max_pages] int32
    seq_lens: Tensor | None = None  # [B] int32
    spans: tuple[tuple[int, int], ...] | None = None
    schedule: Tensor | None = None  # of a decode step on a GPU: `gk.decode_schedule`


class Cache:
    """K and V pages of every layer: `[n_pages, n_kv_heads, PAGE_SIZE, head_dim]` each."""

    def __init__(
        self,
        n_layers: int,
        n_pages: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (n_pages, n_kv_heads, PAGE_SIZE, head_dim)
        self.n_pages = n_pages
        self.k = [zeros_in_huge_pages(shape, dtype, device) for _ in range(n_layers)]
        self.v = [zeros_in_huge_pages(shape, dtype, device) for _ in range(n_layers)]
