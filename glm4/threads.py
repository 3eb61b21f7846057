"""How many threads a model's passes take on a CPU.

    static    min(torch's own count, affinity mask, control groups' quota), or what the user says
    adaptive  fewer while other processes need the processors: only where the user said nothing

Threads that share out a layer wait for each other, spinning, hundreds of times a step. Whenever one
of them is off its processor for a time slice, which is milliseconds, all are: beside a busy process
two threads of the demo model do a fifth of what one does (`python -m benchmarks threads`). Linux
tells how long each thread stood ready to run and did not (/proc/self/task/*/schedstat), which is
nothing on a quiet machine. So the count goes down by as many threads as were kept waiting, and up
again on trial after a while.

The last bit of a float layer may depend on the count (`F.linear` sums in other portions); that of a
quantised layer does not. An explicit count holds it fixed.
"""

from __future__ import annotations

import math
import numbers
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from glm4.processors import cpu_limits
from glm4_kernels.library import bad_type, bad_value

T = TypeVar("T")

MOST = 1024  # more is a mistake, and the system might not start them

# Seconds of work that a reading covers: several time slices. It may cost 1 / 200 of them.
WINDOW = 0.04
WINDOW_PER_COST = 200

# Processors' worth of waiting, over all threads, that is no crowd, however many threads there are:
# systems have work of their own.
USUAL = 0.2

# Seconds until more threads are tried: at first, and at most after trials that failed one after
# the other. A trial that failed is paid off by ten times its length without one.
FIRST_PATIENCE = 0.4
LAST_PATIENCE = 6.4
PATIENCE_PER_TRIAL = 10

# Seconds between two passes after which the last reading says nothing any more.
PAUSE = 1.0


@dataclass
class Controller:
    """The count that readings ask for: at least 1 and at most `most`."""

    most: int
    count: int = 0
    step: int = 1  # up, at the next trial
    patience: float = FIRST_PATIENCE
    fell_at: float = -math.inf
    rose_at: float = -math.inf

    def __post_init__(self) -> None:
        self.count = self.most

    def judge(self, now: float, elapsed: float, waited: float) -> int:
        """The count from now on, after `elapsed` seconds in which the threads, taken together,
        were kept waiting for `waited`."""
        if self.count > 1 and waited > elapsed * tolerable(self.count):
            failed_trial = now - self.rose_at <= self.patience
            patience = min(2 * self.patience, LAST_PATIENCE) if failed_trial else FIRST_PATIENCE
            self.patience = max(patience, PATIENCE_PER_TRIAL * elapsed)
            self.count = max(1, self.count - math.ceil(waited / elapsed))
            self.fell_at, self.step = now, 1
        elif (
            self.count < self.most
            and now >= self.fell_at + self.patience
            and waited <= elapsed * tolerable(self.count + 1)
        ):
            self.count = min(self.most, self.count + self.step)
            self.rose_at, self.step = now, 2 * self.step
        return self.count


def tolerable(count: int) -> float:
    """The share of the time, summed over `count` threads, for which they may be kept waiting.

    If all wait whenever one does, n threads with the share w do n (1 - w) threads' work: less than
    n - 1 would from w = 1 / n on. One busy neighbour of two threads on two CPUs makes it 2 / 3.
    """
    return max(1 / count, USUAL)


@dataclass
class Team:
    """The threads of one model: `with team:` sets torch's count and puts back what was there.

    torch's count belongs to the calling thread, so that a pass must end in the thread it began in;
    `over` sees to it for a generator, whose caller never meets our count.

    Args:
        threads: exactly so many; None takes `default_threads()`, and fewer while others need the
            processors.
        on: False, for a model on another device, leaves everything as it is.
    """

    threads: int | None = None
    on: bool = True
    limit: int = field(default_factory=lambda: min(cpu_limits().values()))
    controller: Controller | None = None
    outside: dict[int, int] = field(default_factory=dict)  # torch's count, by Python thread inside
    depths: dict[int, int] = field(default_factory=dict)
    window: float = WINDOW
    read_at: float = -math.inf
    left_at: float = -math.inf
    waits: dict[str, int] = field(default_factory=dict)  # ns of each thread, at `read_at`

    @property
    def depth(self) -> int:
        """Of passes within passes, in this Python thread."""
        return self.depths.get(threading.get_ident(), 0)

    def __enter__(self) -> None:
        me = threading.get_ident()
        self.depths[me] = self.depths.get(me, 0) + 1
        if self.depths[me] > 1 or not self.on:
            return
        before = self.outside[me] = torch.get_num_threads()
        most = min(before, self.limit)
        if self.threads is not None or most == 1:
            self.controller = None
        elif self.controller is None or self.controller.most != most:
            self.controller = Controller(most)
        count = self.threads or most
        if self.controller is not None:
            count = self.controller.count
            pause = time.perf_counter() - self.left_at
            if pause > PAUSE:
                self.read()
            else:
                self.read_at += pause  # which is no time of ours
        if count != before:
            torch.set_num_threads(count)

    def __exit__(self, *_: object) -> None:
        me = threading.get_ident()
        self.depths[me] -= 1
        if self.depths[me]:
            return
        del self.depths[me]
        if self.on:
            before = self.outside.pop(me)
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)
            self.left_at = time.perf_counter()

    def look(self) -> None:
        """Between two layers of a pass: adapts the count, if a reading is due."""
        if self.controller is None or not self.depth:
            return
        elapsed = time.perf_counter() - self.read_at
        if elapsed < self.window:
            return
        count = self.controller.count
        waited = self.read()
        if self.controller.judge(self.read_at, elapsed, waited) != count:
            torch.set_num_threads(self.controller.count)

    def read(self) -> float:
        """Seconds that the threads of this process were kept waiting since the last reading."""
        began = time.perf_counter()
        before, self.waits = self.waits, thread_waits()
        self.read_at = time.perf_counter()
        self.window = max(WINDOW, WINDOW_PER_COST * (self.read_at - began))
        return sum(waited - before.get(thread, 0) for thread, waited in self.waits.items()) / 1e9

    def over(self, steps: Iterator[T]) -> Iterator[T]:
        """The same items, each made with this team."""
        end = object()
        while True:
            with self:
                item: Any = next(steps, end)
            if item is end:
                return
            yield item


def thread_waits(tasks: str = "/proc/self/task") -> dict[str, int]:
    """Nanoseconds that each thread of this process has spent ready to run and not running; nothing
    where the system does not say."""
    waits = {}
    try:
        for thread in os.listdir(tasks):
            try:
                with open(f"{tasks}/{thread}/schedstat", "rb") as file:
                    waits[thread] = int(file.read().split()[1])
            except (OSError, IndexError, ValueError):
                pass  # it has ended
    except OSError:
        pass  # not Linux
    return waits


def check_threads(name: str, threads: object) -> int | None:
    """Raises TypeError or ValueError if `threads` is neither None nor a number of threads."""
    if threads is None:
        return None
    if not isinstance(threads, numbers.Integral) or isinstance(threads, bool):
        raise bad_type(name, "threads", "an integer or None", repr(threads))
    count = int(threads)
    if not 1 <= count <= MOST:
        raise bad_value(name, "threads", f"from 1 to {MOST}", count)
    return count


def default_threads() -> int:
    """The most threads that a model takes where nobody says how many."""
    return min(torch.get_num_threads(), *cpu_limits().values())
