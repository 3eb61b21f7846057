"""A process that holds an object and answers calls of its methods, one at a time.

    python -m benchmarks.worker FD

Whatever becomes of it, it costs its caller one `WorkerError` that says how it ended: by a signal,
with an exit status, or because no answer came in time. It has a session of its own, so that Ctrl-C
reaches the caller alone, who ends it, and it dies with its caller. Nothing here imports torch.

Pickled over the socket FD: first (what makes the object, arguments), then any number of (method,
arguments), each answered by (result, None), or (None, the error in one line).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
ANSWER_SECONDS = 600.0
GOODBYE_SECONDS = 5.0
PR_SET_PDEATHSIG = 1


class WorkerError(RuntimeError):
    """A call that failed; `died` if the process went with it."""

    def __init__(self, message: str, died: bool = False) -> None:
        super().__init__(message)
        self.died = died


class Worker:
    """The caller's side.

    Args:
        make: a module's function or class, called in the process with `arguments` at the first
            call of a method.
        environment: variables set there.
        silent: stdout and stderr go to a file, whose last line tells why the process died.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        *arguments: Any,
        environment: dict[str, str] | None = None,
        silent: bool = True,
    ) -> None:
        self.log = tempfile.TemporaryFile() if silent else None  # noqa: SIM115
        self.connection, there = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(there.fileno())],
            pass_fds=[there.fileno()],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        there.close()
        with suppress(OSError):  # a process that has died says so at the first call
            self.connection.send((make, arguments))

    def call(self, method: str, *arguments: Any, seconds: float = ANSWER_SECONDS) -> Any:
        """What the object's method returns.

        Raises:
            WorkerError: it raised, the process died, or no answer came within `seconds`, after
                which the process is ended.
        """
        try:
            self.connection.send((method, arguments))
            if not self.connection.poll(seconds):
                self.end()
                raise WorkerError(f"no answer in {seconds:g} s", died=True)
            result, error = self.connection.recv()
        except (EOFError, OSError):
            self.connection.close()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GOODBYE_SECONDS)
            how = death(self.process.poll()) + self.last_words()
            raise WorkerError(f"its process {how}", died=True) from None
        if error is not None:
            raise WorkerError(error)
        return result

    def last_words(self) -> str:
        """The last line that it wrote, if any."""
        if self.log is None or self.log.closed:
            return ""
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1].strip()[:200]}" if lines else ""

    def end(self) -> None:
        """Ends it and what it started."""
        self.connection.close()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.log is not None:
            self.log.close()


def death(status: int | None) -> str:
    """How a process ended, from what `Popen.poll` says."""
    if status is None:
        return "closed its end"
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"died of {signal.Signals(-status).name}"
    except ValueError:
        return f"died of signal {-status}"


def one_line(error: BaseException) -> str:
    """Type and first line of the message; results carry no traceback."""
    message = str(error).strip().split("\n")[0][:200]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def die_with_parent() -> None:
    """On Linux: a caller that is killed leaves no process behind."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(descriptor: str) -> None:
    die_with_parent()
    with Connection(int(descriptor)) as caller, suppress(EOFError, BrokenPipeError):
        make, arguments = caller.recv()
        made: Any = None
        while True:
            method, more = caller.recv()
            try:
                made = make(*arguments) if made is None else made
                answer = getattr(made, method)(*more), None
            except Exception as error:
                answer = None, one_line(error)
            caller.send(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
