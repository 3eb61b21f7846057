"""How many processors the system lets this process use: its affinity mask and control groups."""

from __future__ import annotations

import math
import os
from pathlib import Path


def cpu_limits() -> dict[str, int]:
    """What the system lets this process use: {"affinity": CPUs, "quota": CPUs, rounded up}, the
    quota only where there is one."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"affinity": affinity or 1}
    quota = cpu_quota()
    return found if quota is None else {**found, "quota": max(1, math.ceil(quota))}


def cpu_quota(
    groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """CPUs' worth of time that the strictest control group of this process (version 1 or 2) may
    take; None without a limit."""
    quotas = []
    for line in _read(groups).splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        roots = ("", "unified") if not controllers else (controllers, "cpu")
        for root in (mount / name for name in roots):
            inside = root / path.lstrip("/")
            for folder in (inside, *inside.parents[: len(inside.parts) - len(root.parts)]):
                limit = _read(folder / "cpu.max") or " ".join(
                    _read(folder / f"cpu.cfs_{part}_us").strip() for part in ("quota", "period")
                )
                quota, _, period = limit.strip().partition(" ")
                if quota.isdigit() and period.isdigit() and int(period):  # else "max", or -1
                    quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
