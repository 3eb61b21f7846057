"""How the tests themselves run: what conftest.py and heartbeat.py see to."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import WORKER_BYTES, mark_quick, pytest_xdist_auto_num_workers
from heartbeat import Heartbeat


class Reporter:
    def __init__(self):
        self.lines = []

    def ensure_newline(self):
        pass

    def write_line(self, line, flush):
        assert flush
        self.lines.append(line)


def lines_after(seconds, *, silence):
    reporter = Reporter()
    config = SimpleNamespace(
        pluginmanager=SimpleNamespace(get_plugin={"terminalreporter": reporter}.get)
    )
    heartbeat = Heartbeat(config, silence)
    heartbeat.pytest_sessionstart()
    heartbeat.pytest_runtest_logstart("test_x.py::test_ended")
    heartbeat.pytest_runtest_logfinish("test_x.py::test_ended")
    heartbeat.pytest_runtest_logstart("test_x.py::test_long")
    time.sleep(seconds)
    heartbeat.pytest_sessionfinish()
    return reporter.lines


def test_silence_is_broken_by_what_is_at_work():
    assert "at work: test_x.py::test_long (0 s)" in lines_after(0.3, silence=0.05)
    assert lines_after(0.05, silence=60.0) == []


class Item(SimpleNamespace):
    def get_closest_marker(self, name):
        return name in self.marks

    def add_marker(self, name):
        self.marks.append(name)


def test_quick_is_the_first_case_of_each_test():
    def item(file, test, *marks):
        return Item(path=Path(file), originalname=test, name=test, marks=list(marks))

    items = [
        item("test_a.py", "test_one"),
        item("test_a.py", "test_one"),
        item("test_b.py", "test_one"),
        item("test_b.py", "test_all", "exhaustive"),
        item("test_compiled.py", "test_slow"),
    ]
    mark_quick(items)
    assert ["quick" in each.marks for each in items] == [True, False, True, False, False]


@pytest.mark.parametrize(
    "cores, free_workers, workers", [(2, 30, 2), (64, 30, 8), (4, 3, 3), (1, 30, 1), (4, 0, 1)]
)
def test_workers_fit_cores_and_memory(cores, free_workers, workers):
    with (
        mock.patch("glm4.generation.free_bytes", return_value=free_workers * WORKER_BYTES),
        mock.patch("os.sched_getaffinity", return_value=set(range(cores)), create=True),
    ):
        assert pytest_xdist_auto_num_workers() == workers
