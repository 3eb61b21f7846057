"""The one way in which every run goes: stage by stage, each kept as it grows and shown at its end.

A stage that fails costs itself alone. One that was interrupted is measured again by the next start
of the same command, those that were done are not.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape

from benchmarks.record import Record, Result
from benchmarks.worker import Worker, WorkerError, one_line

Say = Callable[[str], None]
QUICK = "--quick: the times mean nothing"
LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal


def no_faults(result: Result) -> list[str]:
    return []


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        measure: yields the stage's result as it grows, and says what it does.
        faults: of a whole result: what of it makes the run fail, a line each.
        table: what to print of it.
        needed: the run ends where it fails.
    """

    name: str
    measure: Callable[[Say], Iterator[Result]]
    faults: Callable[[Result], list[str]] = no_faults
    table: Callable[[Result], Any] | None = None
    needed: bool = False


@dataclass
class Outcome:
    faults: list[str] = field(default_factory=list)
    refused: bool = True  # nothing was measured: every stage lacked memory

    @property
    def status(self) -> int:
        return 0 if not self.faults else 2 if self.refused else 1


def run_stages(stages: list[Stage], record: Record, console: Console) -> Outcome:
    """Runs what the record does not hold, in order."""
    record.ask_for([stage.name for stage in stages])
    if record.note:
        console.print(escape(record.note), style="yellow")
    quick = record.whole["provenance"]["quick"]
    if quick:
        console.print(QUICK, style="yellow")
    outcome = Outcome()
    for stage in stages:
        if record.done(stage.name):
            console.print(f"{stage.name}: already there", style="dim")
            outcome.refused = False
        else:
            record.begin(stage.name)
            error = measured(stage, record, console)
            outcome.refused &= error is not None and error.startswith("MemoryError: ")
            if error:
                outcome.faults.append(f"{stage.name}: {error.removeprefix('MemoryError: ')}")
        result = record.result(stage.name)
        if record.done(stage.name):
            outcome.faults += [f"{stage.name}: {fault}" for fault in stage.faults(result)]
        if stage.table and result and (table := stage.table(result)):
            if quick:
                table.title = f"{table.title} ({QUICK})"
            console.print(table)
        if stage.needed and not record.done(stage.name):
            break
    if quick:
        console.print(QUICK, style="yellow")
    return outcome


def measured(stage: Stage, record: Record, console: Console) -> str | None:
    """Measures a stage; what went wrong, if anything did, is also in the record."""
    error = None
    with progress(stage.name, console) as say:
        try:
            for result in stage.measure(say):
                record.keep(stage.name, result)
        except WorkerError as failed:
            error = str(failed)
        except Exception as failed:
            error = one_line(failed)
    record.end(stage.name, error)
    return error


@contextmanager
def progress(name: str, console: Console) -> Iterator[Say]:
    """Says what is being measured: in one moving line on a terminal, else now and then in a new."""
    if console.is_terminal:
        with console.status(escape(name)) as status:
            yield lambda what: status.update(escape(f"{name}: {what}"))
        return
    last = time.monotonic()
    console.print(escape(f"{name} …"), style="dim")

    def say(what: str) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            console.print(escape(f"{name}: {what}"), style="dim")
            last = time.monotonic()

    yield say


class Steps:
    """A generator whose values are fetched one at a time."""

    def __init__(self, run: Callable[[], Iterator[Result]]) -> None:
        self.values = run()

    def next(self) -> Result | None:
        try:
            return next(self.values, None)
        except Exception:
            traceback.print_exc()
            raise


def apart(run: Callable[[], Iterator[Result]], minutes: float) -> Iterator[Result]:
    """What `run` yields, in a process of its own, which is ended after so many minutes."""
    deadline = time.monotonic() + 60 * minutes
    worker = Worker(Steps, run, silent=False)
    try:
        while True:
            left = max(0.0, deadline - time.monotonic())
            try:
                result = worker.call("next", seconds=left)
            except WorkerError as error:
                late = error.died and time.monotonic() >= deadline
                raise WorkerError(f"stopped after {minutes:g} minutes") if late else error from None
            if result is None:
                return
            yield result
    finally:
        worker.end()
