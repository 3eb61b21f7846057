"""What this device can do at most, measured in the run that is judged by it.

    copy    bytes read + written per second by a large `copy_`
    read    bytes per second of the fastest large reduction
    matmul  bf16 multiply-adds, two flops each, per second of a large product of random matrices
    int8    8-bit integer multiply-adds, two operations each, per second (CPU, with the extension)

On CPU `read` is sampled again beside every turn of a contender (`CpuReadProbe`): shared machines
flip between bandwidths that differ by nearly two, within a second. Where the extension is built,
`read` and `int8` are its loops (csrc/cpu/ceilings.h); torch's reductions stay up to a tenth below.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.memory import CPU, MIB, cache_bytes, free_bytes, shown
from glm4_kernels.extension import HAS_EXTENSION, buffer, extension

# Of the free memory, what the buffer of a read bandwidth may take.
BUFFER_SHARE = 1 / 8
# Times the cache: the buffer of a read bandwidth, and the least of it that still says something.
# With four times the cache, a quarter of what it gives comes out of it.
BUFFER_CACHES, LEAST_CACHES = 8, 4


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of one device, in bytes and flops per second."""

    copy: float
    read: float
    matmul: float
    cache_bytes: int
    int8: float | None = None  # operations per second

    def bandwidth(self, device: torch.device) -> float:
        """The limit that memory-bound ops are held against."""
        return self.copy if device.type == "cuda" else self.read


def measure_ceilings(device: torch.device, quick: bool = False) -> Ceilings:
    """Measures all three; `quick` shrinks the buffers so far that only their form is right."""
    cache = last_level_cache(device)
    large = 1024 * MIB if device.type == "cuda" else max(256 * MIB, read_buffer_bytes())
    n_bytes = 16 * MIB if quick else max(large, 8 * cache) if device.type == "cuda" else large
    n = 256 if quick else 8192 if device.type == "cuda" else 2048
    repeats = 2 if quick else 15

    x = torch.randn(n_bytes // 4, device=device)
    reductions = (x.sum, x.amax, lambda: x.dot(x))
    read = n_bytes / min(median_seconds(f, device, repeats) for f in reductions)
    int8 = None
    if device.type == "cpu" and HAS_EXTENSION:
        read = max(read, statistics.median(read_bandwidth(x) for _ in range(repeats)))
        peaks = [multiply_add_peak(0.004, torch.get_num_threads()) for _ in range(repeats)]
        int8 = statistics.median(peaks)
    copy = 2 * n_bytes / median_seconds(partial(torch.empty_like(x).copy_, x), device, repeats)
    a, b = torch.randn(2, n, n, device=device).to(torch.bfloat16)
    matmul = 2 * n**3 / median_seconds(lambda: a @ b, device, repeats)
    return Ceilings(copy, read, matmul, cache, int8)


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    for _ in range(2):
        call()
    return statistics.median(seconds(call, device) for _ in range(repeats))


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of one call: device events on CUDA, the clock elsewhere."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - began) / 1e9


def read_buffer_bytes() -> int:
    """BUFFER_CACHES times the cache, or what memory allows.

    Raises:
        MemoryError: that would be less than LEAST_CACHES times.
    """
    cache = cache_bytes()
    room = int(BUFFER_SHARE * free_bytes(CPU))
    if room < LEAST_CACHES * cache:
        raise MemoryError(
            f"the read bandwidth needs a buffer of {LEAST_CACHES} times the cache's "
            f"{shown(cache)}, and {shown(room)} are an eighth of what is free"
        )
    return min(BUFFER_CACHES * cache, room) >> 8 << 8


def read_bandwidth(x: Tensor, variant: str = "") -> float:
    """Bytes per second of reading a tensor once, on torch's threads."""
    return extension().cpu_read_bandwidth(buffer(x), torch.get_num_threads(), variant)


def multiply_add_peak(seconds: float, threads: int, variant: str = "") -> float:
    """8-bit integer operations per second, two for a multiply-add; takes about `seconds`."""
    return extension().cpu_multiply_add_peak(seconds, threads, variant)


class CpuReadProbe:
    """Samples the read bandwidth that memory gives right now, in a few milliseconds."""

    def __init__(self) -> None:
        self.x = torch.randn(read_buffer_bytes() // 4)
        self.sample()

    def sample(self) -> float:
        """Bytes per second of one read of a buffer of several times the last-level cache."""
        if HAS_EXTENSION:  # its loops see more of the hardware than torch's
            return read_bandwidth(self.x)
        return self.x.nbytes / seconds(self.x.sum, self.x.device)


def last_level_cache(device: torch.device) -> int:
    """Bytes of L2 (CUDA), or of the last-level cache that is this machine's own."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return cache_bytes()
