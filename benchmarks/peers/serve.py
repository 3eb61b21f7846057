"""What runs in a peer's process (`worker.py`): prepares its contenders, takes their turns."""

from __future__ import annotations

import importlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import Contender, Layer, Problem

SETTLE_SECONDS = 0.3


@dataclass
class Prepared:
    layer: Layer
    input: Any = None
    next_copy: int = 0

    def run(self) -> Any:
        copies = self.layer.copies
        self.next_copy = (self.next_copy + 1) % len(copies)
        return self.layer.run(copies[self.next_copy], self.input)


class Peer:
    def __init__(self, module: str) -> None:
        self.module = module
        self.contenders: dict[str, Contender] = {}
        self.prepared: dict[str, Prepared] = {}
        self.problem: Problem | None = None

    def describe(self) -> list[dict[str, Any]]:
        """Names, bits and descriptions; ImportError where the package is missing."""
        module = importlib.import_module(f"benchmarks.peers.{self.module}")
        self.contenders = {contender.name: contender for contender in module.contenders()}
        return [{"name": c.name, "bits": c.bits, "what": c.what} for c in self.contenders.values()]

    def pose(self, rows: Path, n: int, rotate_bytes: int, threads: int) -> None:
        """A new problem; what was prepared for the last one goes."""
        self.prepared.clear()
        self.problem = Problem(np.load(rows), n, rotate_bytes, threads)

    def prepare(self, name: str) -> dict[str, int]:
        layer = self.contenders[name].prepare(self.problem)
        self.prepared[name] = Prepared(layer)
        return {"bytes": layer.nbytes, "copies": len(layer.copies)}

    def multiply(self, name: str, x: np.ndarray) -> np.ndarray:
        """The product with the problem's rows, by the first of the copies; later turns take x."""
        prepared = self.prepared[name]
        prepared.input = prepared.layer.input(x)
        for _ in prepared.layer.copies[1:]:  # every copy once, so that its memory is there
            prepared.run()
        y = prepared.layer.output(prepared.run())
        return y[:, : len(self.problem.rows)]

    def turn(self, name: str, seconds: float) -> dict[str, Any]:
        """Seconds of each call of a turn, after one that warms up unless it fills the turn; and
        the share of the processors' time that others had meanwhile."""
        prepared = self.prepared[name]
        busy, cpu, began = busy_seconds(), time.process_time(), time.perf_counter()
        times = [timed(prepared)]
        if times[0] < seconds:
            times = [timed(prepared) for _ in range(3)]
            while time.perf_counter() - began < seconds:
                times.append(timed(prepared))
        took = time.perf_counter() - began
        others = busy_seconds() - busy - (time.process_time() - cpu)
        settle()
        return {"times": times, "foreign": max(others, 0.0) / (took * (os.cpu_count() or 1))}

    def leave(self, name: str) -> None:
        """Frees what a contender holds."""
        self.prepared.pop(name, None)


def busy_seconds() -> float:
    """Seconds that all processors together have worked, or were taken away by the hypervisor."""
    try:
        line = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, line.split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def settle() -> None:
    """Waits until this process' threads have stopped spinning, which would slow the next peer and
    the samples of the ceilings: ONNX Runtime's spin for 40 ms. The clock ticks every 4 to 10 ms."""
    deadline = time.perf_counter() + SETTLE_SECONDS
    while time.perf_counter() < deadline:
        cpu = time.process_time()
        time.sleep(0.012)
        if time.process_time() - cpu < 0.001:
            return


def timed(prepared: Prepared) -> float:
    began = time.perf_counter()
    prepared.run()
    return time.perf_counter() - began
