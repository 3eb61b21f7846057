"""How much memory a run may take, and how much of the last-level cache is this machine's own.

A virtual machine is told the cache of the whole chip, which it shares with others. What it really
has shows in the speed of reading: a working set that stays in the cache is read again faster than
one that does not. One thread reads sets of growing size; the best of several rounds stands for
each, since whoever else works on the machine only slows. The cache ends where sets are no longer
read markedly faster than those past every cache.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from glm4 import generation
from glm4_kernels.extension import HAS_EXTENSION, buffer, extension

MIB, GIB = 1 << 20, 1 << 30
CPU = torch.device("cpu")
# Where the size of the last-level cache cannot be read: larger than most of one socket.
UNKNOWN_CACHE = 64 * MIB
# Of the free memory, what a run takes unless it is told: the rest is for whoever else is there.
SHARE = 0.6
# How much faster than memory a set must be read to count as held by the cache.
FASTER = 1.4
ROUNDS = 5


# What this run was told to take (--memory): all that there is, as far as it is concerned.
limit: int | None = None


def free_bytes(device: torch.device) -> int:
    """Memory that is free on `device`; of a CPU's at most what `--memory` allows."""
    free = generation.free_bytes(device)
    return free if limit is None or device.type != "cpu" else min(free, limit)


def size(text: str) -> int:
    """Bytes of "4G", "512M" or "1.5GiB", for the command line."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"must be a size as 4G or 512M, got {text!r}")
    return int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2].upper())))


def allowed(asked: int | None = None, share: float = SHARE) -> int:
    """Bytes that a run may take: those asked for, else a share of what is free.

    Raises:
        ValueError: more were asked for than are free.
    """
    free = free_bytes(CPU)
    if asked is None:
        return int(share * free)
    if asked > free:
        raise ValueError(f"--memory must be at most the {shown(free)} free, got {shown(asked)}")
    return asked


def shown(n_bytes: float) -> str:
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= GIB else f"{n_bytes / MIB:.0f} MiB"


def told_cache(root: Path = Path("/sys/devices/system/cpu")) -> tuple[int, int]:
    """(bytes of all instances, instances) of the largest cache level that the system tells of."""
    sizes: dict[int, dict[str, int]] = {}  # level -> the CPUs that share an instance -> bytes
    for index in root.glob("cpu[0-9]*/cache/index*"):
        try:
            level = int((index / "level").read_text())
            shared = (index / "shared_cpu_list").read_text()
            kib = int((index / "size").read_text().strip().removesuffix("K"))
        except (OSError, ValueError):
            continue
        sizes.setdefault(level, {})[shared] = kib << 10
    if not sizes:
        return UNKNOWN_CACHE, 1
    last = sizes[max(sizes)]
    return sum(last.values()), len(last)


def knee(speeds: dict[int, float]) -> int:
    """The largest size up to which all are read markedly faster than the three largest; 0 where
    none is."""
    memory = max(speeds[n_bytes] for n_bytes in sorted(speeds)[-3:])
    found = 0
    for n_bytes in sorted(speeds):
        if speeds[n_bytes] < FASTER * memory:
            break
        found = n_bytes
    return found


def speeds_by_size(read: Callable[[torch.Tensor], float], largest: int) -> dict[int, float]:
    """Best bytes/s of reading sets of 1 MiB up to `largest` again, in steps of the square root of
    two."""
    x = torch.zeros(largest // 4, dtype=torch.float32, device="cpu")
    steps = int(2 * math.log2(largest / MIB))
    sizes = [int(largest / 2 ** (i / 2)) >> 8 << 8 for i in range(steps + 1)]
    best = dict.fromkeys(sizes, 0.0)
    for _ in range(ROUNDS):
        for n_bytes in sizes:
            part = x[: n_bytes // 4]
            read(part)  # brings it in
            best[n_bytes] = max(best[n_bytes], read(part))
    return best


@cache
def cache_bytes() -> int:
    """What of the last-level caches is ours: measured in a few seconds, and no more than the system
    tells of; all that it tells of where sets past it cannot be read."""
    told, instances = told_cache()
    largest = max(2 * told // instances, 64 * MIB)
    if not HAS_EXTENSION or largest > free_bytes(CPU) // 4:
        return told
    found = knee(speeds_by_size(one_thread_read, largest))
    return min(told, found * instances) or told


def one_thread_read(x: torch.Tensor) -> float:
    """Bytes per second of reading a tensor once, on one thread."""
    return extension().cpu_read_bandwidth(buffer(x), 1, "")


def cache_line() -> str:
    """What the runs take for the cache, and why."""
    told, _ = told_cache()
    if (ours := cache_bytes()) >= told:
        return f"last-level cache: {shown(told)}"
    return f"last-level cache: {shown(ours)} measured as ours, of the {shown(told)} told"
