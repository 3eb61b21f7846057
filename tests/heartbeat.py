"""Shows that tests are at work where none has ended for a while, as on a busy machine."""

from __future__ import annotations

import threading
import time

import pytest

SILENCE = 20.0  # seconds


class Heartbeat:
    """A pytest plugin: after each SILENCE, a line that names the tests under way."""

    def __init__(self, config: pytest.Config, silence: float = SILENCE) -> None:
        self.config, self.silence = config, silence
        self.started: dict[str, float] = {}  # tests under way, and when they began
        self.last = time.monotonic()  # when something was last written
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def pytest_sessionstart(self) -> None:
        self.thread.start()

    def pytest_sessionfinish(self) -> None:
        self.ended.set()
        self.thread.join()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.started[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.started.pop(nodeid, None)
        self.last = time.monotonic()

    def _beat(self) -> None:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        while reporter and not self.ended.wait(self.silence / 10):
            now = time.monotonic()
            if now - self.last < self.silence:
                continue
            self.last = now
            under_way = [f"{test} ({now - at:.0f} s)" for test, at in list(self.started.items())]
            reporter.ensure_newline()
            reporter.write_line(f"at work: {', '.join(under_way) or 'starting'}", flush=True)
