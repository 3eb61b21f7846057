"""How every run goes: stages that are kept, gone on with, interrupted; what is asked in vain."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmark_results import ORIGIN, one_line
from rich.console import Console

from benchmarks import commands, memory, quality
from benchmarks.__main__ import main
from benchmarks.record import Record, merged
from benchmarks.stages import Stage, run_stages
from benchmarks.worker import REPOSITORY, Worker, WorkerError, death

QUICK = ORIGIN | {"quick": True}


def counted(calls: list[str], name: str, *values: int) -> Stage:
    """Yields its values one by one; an exception among them is raised."""

    def measure(say):
        calls.append(name)
        for value in values:
            if isinstance(value, BaseException):
                raise value
            yield {"ops": [{"op": name, "value": value}]}

    return Stage(name, measure)


def run(file, stages, origin=ORIGIN, options=None, fresh=False, run="ops"):
    record = Record(run, origin, options or {}, file, fresh)
    return run_stages(stages, record, Console()), record


def test_a_run_goes_on_where_it_was_interrupted(tmp_path):
    file, calls = tmp_path / "ops.json", []
    stages = [
        counted(calls, "a", 1),
        counted(calls, "b", 1, 2, KeyboardInterrupt()),
        counted(calls, "c", 3),
    ]
    with pytest.raises(KeyboardInterrupt):
        run(file, stages)
    found = json.loads(file.read_text())
    assert {name: entry["state"] for name, entry in found["stages"].items()} == {
        "a": "done",
        "b": "started",
    }
    whole = merged(found)
    assert whole["interrupted"] == "1 of 3"
    assert [(op["op"], op["value"]) for op in whole["ops"]] == [("a", 1), ("b", 2)]

    outcome, record = run(file, [stages[0], counted(calls, "b", 4), stages[2]])
    assert outcome.status == 0 and calls == ["a", "b", "b", "c"]
    whole = merged(json.loads(file.read_text()))
    assert "interrupted" not in whole and [op["value"] for op in whole["ops"]] == [1, 4, 3]
    assert record.summary().startswith("3 of 3 stages done, kept in")


@pytest.mark.parametrize("key", ["source_hash", "versions", "device", "threads"])
def test_a_run_of_other_sources_starts_over(tmp_path, key, capsys):
    file, calls = tmp_path / "ops.json", []
    run(file, [counted(calls, "a", 1), counted(calls, "b", 1)])
    run(file, [counted(calls, "a", 2)], ORIGIN | {key: "another"})
    assert calls == ["a", "b", "a"]
    assert "starting over" in capsys.readouterr().out
    assert [op["value"] for op in merged(json.loads(file.read_text()))["ops"]] == [2]


def test_other_options_and_fresh_start_over(tmp_path):
    file, calls = tmp_path / "ops.json", []
    for options, fresh in (({"peers": ["a"]}, False), ({"peers": ["b"]}, False)):
        run(file, [counted(calls, "a", 1)], options=options, fresh=fresh)
    run(file, [counted(calls, "a", 1)], options={"peers": ["b"]})
    assert calls == ["a", "a"]
    run(file, [counted(calls, "a", 1)], options={"peers": ["b"]}, fresh=True)
    assert calls == ["a", "a", "a"]


def test_a_stage_that_fails_costs_itself_alone_and_is_tried_again(tmp_path):
    file, calls = tmp_path / "ops.json", []
    outcome, _ = run(file, [counted(calls, "a", 1, ValueError("no\nway")), counted(calls, "b", 2)])
    assert outcome.faults == ["a: ValueError: no"] and outcome.status == 1
    entry = json.loads(file.read_text())["stages"]["a"]
    assert entry["state"] == "failed" and entry["error"] == "ValueError: no"
    assert entry["result"]["ops"][0]["value"] == 1, "what was measured before the failure is kept"
    outcome, _ = run(file, [counted(calls, "a", 5), counted(calls, "b", 2)])
    assert outcome.status == 0 and calls == ["a", "b", "a"]


def test_only_lack_of_memory_everywhere_is_a_refusal(tmp_path):
    poor = [counted([], name, MemoryError("1 GiB is needed")) for name in "ab"]
    outcome, _ = run(None, poor)
    assert outcome.status == 2 and outcome.faults == ["a: 1 GiB is needed", "b: 1 GiB is needed"]
    outcome, _ = run(None, [*poor, counted([], "c", 1)])
    assert outcome.status == 1


def test_quick_says_that_its_times_mean_nothing(tmp_path, capsys):
    file = tmp_path / "ops.json"
    run(file, [counted([], "a", 1)], QUICK)
    assert capsys.readouterr().out.count("the times mean nothing") == 2  # before and after
    run(file, [counted([], "a", 1)])  # real results may replace them,
    with pytest.raises(ValueError, match="--quick must not replace real results"):  # never so
        run(file, [counted([], "a", 1)], QUICK)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"provenance": 3}', ""])
def test_what_is_no_result_is_never_overwritten(tmp_path, text, capsys):
    file = tmp_path / "notes.json"
    file.write_text(text)
    for command in ((), ("cpu-model",), ("quality",), ("quantized",)):
        assert main([*command, "--quick", "--fresh", "--json", str(file)]) == 2
        assert "--json must be new or an earlier result" in one_line(capsys.readouterr().err)
        assert file.read_text() == text


def test_the_result_of_another_run_is_refused(tmp_path):
    file = tmp_path / "ops.json"
    run(file, [counted([], "a", 1)])
    with pytest.raises(ValueError, match=r"quality: --json must be new .* is of ops"):
        run(file, [], run="quality")


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["nope"], "invalid choice: 'nope'"),
        (["--memory", "4X"], "must be a size as 4G or 512M, got '4X'"),
        (["--memory", "0G"], "must be a size"),
        (
            ["--only", "rms_norm", "--memory", "900000G", "--device", "cpu"],
            "--memory must be at most",
        ),
        (["quantized"], "--json FILE must say where"),
        (["quantized", "--peers", "nobody"], "invalid choice: 'nobody'"),
        (["report"], "the following arguments are required: RESULTS_DIR"),
        (["report", "/nonexistent"], "RESULTS_DIR must be a folder"),
        (
            ["report", str(REPOSITORY / "benchmarks/results"), "--check", "--readme", "/no/file"],
            "/no/file",
        ),
        (["quality", "--draws", "0"], "--draws must be at least 1"),
        (["gpu"], "required: --out"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:30],
)
def test_wrong_arguments_cost_one_line(arguments, told, capsys):
    assert main(arguments) == 2
    assert told in one_line(capsys.readouterr().err)


def test_a_peer_that_is_asked_for_and_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(commands.CPU_PEERS, "ggml", "no-such-package")
    assert main(["quantized", "--peers", "ours", "ggml", "--json", str(tmp_path / "q.json")]) == 2
    assert "--peers names no-such-package, not installed: pip" in one_line(capsys.readouterr().err)


# Ctrl-C, and worse


class Sleeper:
    def __init__(self, pid_file):
        pid_file.write_text(str(os.getpid()))

    def sleep(self):
        time.sleep(600)


def fake_draw(contenders, draw, limit, say):
    say("a window")
    raw = {name: [0.01 * (draw + 1), 0.02, 0.03, 0.04, 0.05, 0.06] for name in contenders}
    bits = dict.fromkeys(contenders, 4.0)
    windows = {"en": 2, "es": 2, "prose": 2}
    return {"windows": windows, "bits_per_weight": bits, "rise": raw, "kl": raw}


def interrupted_run(file: str) -> int:
    """`quality` with draws that take no time, but for the second, whose worker never answers."""

    def measure_draw(contenders, draw, limit, say):
        if draw == 1:
            Worker(Sleeper, Path(file).with_name("pid")).call("sleep")
        return fake_draw(contenders, draw, limit, say)

    quality.measure_draw, quality.layer_errors = measure_draw, list
    return main(["quality", "--draws", "3", "--json", file])


def is_alive(pid: int) -> bool:
    """And no zombie that waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL], ids=lambda blow: blow.name)
def test_an_interrupted_run_ends_clean_and_goes_on(tmp_path, monkeypatch, capsys, blow):
    file, pid_file = tmp_path / "quality.json", tmp_path / "pid"
    code = f"import sys, test_benchmark_runs as t; sys.exit(t.interrupted_run({str(file)!r}))"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = int(pid_file.read_text())
    child.send_signal(blow)
    _, told = child.communicate(timeout=60)
    if blow == signal.SIGINT:
        assert child.returncode == 130
        assert one_line(told) == (
            f"benchmarks: interrupted: 2 of 4 stages done, kept in {file}; "
            "the same command goes on\n"
        )
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker), "its processes go with it"

    drawn = []

    def measure_draw(contenders, draw, limit, say):
        drawn.append(draw)
        return fake_draw(contenders, draw, limit, say)

    monkeypatch.setattr(quality, "measure_draw", measure_draw)
    assert main(["quality", "--draws", "3", "--json", str(file)]) == 0
    assert drawn == [1, 2], "the first draw is kept"
    assert quality.summary(merged(json.loads(file.read_text()))["draws"])["draws"] == 3


# Workers


class Calls:
    def __init__(self, start):
        self.total = start

    def add(self, n):
        self.total += n
        return self.total

    def die(self, how):
        print("last words", flush=True)
        os.kill(os.getpid(), how) if how else os._exit(3)


def test_a_worker_answers_and_says_how_it_died():
    worker = Worker(Calls, 3)
    assert [worker.call("add", n) for n in (1, 2)] == [4, 6]
    with pytest.raises(WorkerError, match=r"^TypeError: ") as raised:
        worker.call("add", "x")
    assert not raised.value.died and worker.call("add", 0) == 6
    with pytest.raises(WorkerError, match=r"^its process died of SIGABRT: last words$") as raised:
        worker.call("die", signal.SIGABRT)
    assert raised.value.died
    worker.end()
    worker = Worker(Calls, 3)
    with pytest.raises(WorkerError, match=r"^its process ended with status 3: last words$"):
        worker.call("die", 0)
    worker.end()
    worker = Worker(time.sleep, 600)
    with pytest.raises(WorkerError, match=r"^no answer in 0.5 s$") as raised:
        worker.call("anything", seconds=0.5)
    assert raised.value.died and worker.process.poll() is not None
    worker = Worker(Calls, 3)
    worker.call("add", 1)
    worker.connection.close()
    assert worker.process.wait(60) == 0, "it leaves when nobody asks any more"
    worker.end()
    assert death(-11) == "died of SIGSEGV" and death(-99) == "died of signal 99"


# Memory and caches


def test_the_cache_ends_where_reading_slows():
    shared = {1: 150.0, 2: 39.0, 4: 31.0, 8: 30.0, 16: 29.0, 32: 20.0, 64: 5.6, 128: 7.0, 256: 5.0}
    assert memory.knee(shared) == 32
    assert memory.knee(shared | {128: 12.0}) == 32, "a fast moment of memory is no cache"
    assert memory.knee(dict.fromkeys(range(1, 9), 30.0)) == 0


def test_sets_of_growing_size_are_read():
    def read(x):
        return 3e10 if x.nbytes <= 12 << 20 else 1e10

    speeds = memory.speeds_by_size(read, 64 << 20)
    assert max(speeds) == 64 << 20 and 1 << 20 <= min(speeds) < 2 << 20
    assert 12 << 20 > memory.knee(speeds) > 8 << 20


def test_the_cache_is_at_most_what_the_system_tells(monkeypatch):
    monkeypatch.setattr(memory, "told_cache", lambda: (32 << 20, 2))
    for speeds, expected in (
        ({1 << 20: 9.0, 12 << 20: 9.0, 16 << 20: 1.0, 32 << 20: 1.0, 64 << 20: 1.0}, 24 << 20),
        ({1 << 20: 9.0, 50 << 20: 9.0, 60 << 20: 1.0, 62 << 20: 1.0, 64 << 20: 1.0}, 32 << 20),
        ({1 << 20: 1.0, 50 << 20: 1.0, 60 << 20: 1.0, 62 << 20: 1.0, 64 << 20: 1.0}, 32 << 20),
    ):
        monkeypatch.setattr(memory, "speeds_by_size", lambda read, largest, found=speeds: found)
        assert memory.cache_bytes.__wrapped__() == expected
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100 << 20)  # too little to measure
    assert memory.cache_bytes.__wrapped__() == 32 << 20


def test_told_cache_sums_instances(tmp_path):
    for cpu, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        for level, kib in ((2, 1024), (3, 32768)):
            index = tmp_path / f"cpu{cpu}" / "cache" / f"index{level}"
            index.mkdir(parents=True)
            for name, text in (("level", level), ("shared_cpu_list", shared), ("size", f"{kib}K")):
                (index / name).write_text(f"{text}\n")
    assert memory.told_cache(tmp_path) == (64 << 20, 2)
    assert memory.told_cache(tmp_path / "nothing") == (memory.UNKNOWN_CACHE, 1)


def test_sizes_on_the_command_line():
    sizes = {"4G": 4 << 30, "512M": 512 << 20, "1.5GiB": 3 << 29, "2 gb": 2 << 30}
    assert {text: memory.size(text) for text in sizes} == sizes
    for text in ("", "4", "G", "-1G", "0G", "1e3G", "4GG"):
        with pytest.raises(argparse.ArgumentTypeError):
            memory.size(text)


def test_no_buffer_grows_past_what_is_free(monkeypatch):
    from benchmarks import ceilings

    monkeypatch.setattr(ceilings, "cache_bytes", lambda: 60 << 20)
    for free, expected in ((64 << 30, 480 << 20), (3 << 30, 384 << 20)):
        monkeypatch.setattr(ceilings, "free_bytes", lambda device, free=free: free)
        assert ceilings.read_buffer_bytes() == expected
    monkeypatch.setattr(ceilings, "free_bytes", lambda device: 1 << 30)
    with pytest.raises(MemoryError, match="4 times the cache's 60 MiB, and 128 MiB are an eighth"):
        ceilings.read_buffer_bytes()


def test_memory_holds_for_the_run_and_no_longer(capsys):
    arguments = ["--quick", "--only", "rms_norm", "--device", "cpu", "--memory", "1M"]
    assert main(arguments) != 0
    assert "the read bandwidth needs a buffer" in capsys.readouterr().err
    assert memory.limit is None
