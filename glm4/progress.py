"""A bar on stderr for what takes longer than two seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


@contextmanager
def progress_bar(label: str, total: int, wanted: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with how much is done; after two seconds a bar shows on stderr."""
    console = Console(stderr=True)
    seen = wanted and (console.is_terminal or console.is_jupyter)
    bar = Progress(console=console, transient=True, disable=not seen)
    task = bar.add_task(label, total=total)
    timer = threading.Timer(2.0, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda done: bar.update(task, completed=done)
    finally:
        timer.cancel()
        timer.join()
        if bar.live.is_started:  # else stop() prints an empty line
            bar.stop()
