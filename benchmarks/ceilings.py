"""What this device can do at most, measured in the run that is judged by it.

    copy    bytes read + written per second by a large `copy_`
    read    bytes per second of the fastest large reduction
    matmul  bf16 multiply-adds, two flops each, per second of a large product of random matrices

On CPU `read` is sampled again beside every turn of a contender (`CpuReadProbe`): shared machines
flip between bandwidths that differ by nearly two, within a second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

MIB = 1 << 20
# Where the size of the last-level cache cannot be read: larger than most of one socket.
UNKNOWN_CACHE = 64 * MIB


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of one device, in bytes and flops per second."""

    copy: float
    read: float
    matmul: float
    cache_bytes: int

    def bandwidth(self, device: torch.device) -> float:
        """The limit that memory-bound ops are held against."""
        return self.copy if device.type == "cuda" else self.read


def measure_ceilings(device: torch.device, quick: bool = False) -> Ceilings:
    """Measures all three; `quick` shrinks the buffers so far that only their form is right."""
    cache = last_level_cache(device)
    large = (1024 if device.type == "cuda" else 256) * MIB
    n_bytes = 16 * MIB if quick else max(large, 4 * cache)
    n = 256 if quick else 8192 if device.type == "cuda" else 2048
    repeats = 2 if quick else 15

    x = torch.randn(n_bytes // 4, device=device)
    reductions = (x.sum, x.amax, lambda: x.dot(x))
    read = n_bytes / min(median_seconds(f, device, repeats) for f in reductions)
    copy = 2 * n_bytes / median_seconds(partial(torch.empty_like(x).copy_, x), device, repeats)
    a, b = torch.randn(2, n, n, device=device).to(torch.bfloat16)
    matmul = 2 * n**3 / median_seconds(lambda: a @ b, device, repeats)
    return Ceilings(copy, read, matmul, cache)


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


class CpuReadProbe:
    """Samples the read bandwidth that memory gives right now, in a few milliseconds."""

    def __init__(self) -> None:
        self.x = torch.randn(4 * last_level_cache(torch.device("cpu")) // 4)
        self.sample()

    def sample(self) -> float:
        """Bytes per second of one reduction over a buffer of four times the last-level cache."""
        return self.x.nbytes / seconds(self.x.sum, self.x.device)


def last_level_cache(device: torch.device) -> int:
    """Bytes of L2 (CUDA), or of the largest cache level of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes: dict[int, dict[str, int]] = {}  # level -> the CPUs that share an instance -> bytes
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            level = int((index / "level").read_text())
            shared = (index / "shared_cpu_list").read_text()
            kib = int((index / "size").read_text().strip().removesuffix("K"))
        except (OSError, ValueError):
            continue
        sizes.setdefault(level, {})[shared] = kib << 10
    return sum(sizes[max(sizes)].values()) if sizes else UNKNOWN_CACHE
