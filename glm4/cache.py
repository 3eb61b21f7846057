"""The paged KV cache, and the description of one forward pass over it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

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
        n_bytes = n_pages * page_bytes(n_layers, n_kv_heads, head_dim, dtype)
        if n_bytes > (free := free_bytes(device)):
            raise MemoryError(
                f"a cache of {n_pages} pages takes {gib(n_bytes)}, and {gib(free)} are free on "
                f"{device}"
            )
        shape = (n_pages, n_kv_heads, PAGE_SIZE, head_dim)
        self.n_pages = n_pages
        self.k = [zeros_in_huge_pages(shape, dtype, device) for _ in range(n_layers)]
        self.v = [zeros_in_huge_pages(shape, dtype, device) for _ in range(n_layers)]


def page_bytes(n_layers: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Of one page, K and V of all layers."""
    return 2 * n_layers * n_kv_heads * PAGE_SIZE * head_dim * dtype.itemsize


def gib(n_bytes: int) -> str:
    return f"{Decimal(n_bytes) / 2**30:.3g} GiB"  # of any number, also one past floats


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still take on `device`; 2^62 where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused

    def number(pattern: str, file: str) -> int:
        found = re.search(pattern, Path(file).read_text(), re.MULTILINE)
        if found is None:
            raise ValueError(f"{file} does not say")
        return int(found[1])

    free = 2**62
    try:
        free = number(r"^MemAvailable:\s*(\d+)", "/proc/meminfo") << 10
        limit = number(r"^(\d+)", "/sys/fs/cgroup/memory.max")  # a container's own
        free = min(free, limit - number(r"^anon (\d+)", "/sys/fs/cgroup/memory.stat"))
    except (OSError, ValueError):
        pass  # not Linux, or no limit
    return max(free, 0)
