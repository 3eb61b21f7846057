"""How many threads a pass takes: what the readings ask for, what the system allows, and that
nothing of it shows outside or in the results."""

import os
import threading

import pytest
import torch

import glm4
from benchmarks import threads as benchmark
from benchmarks.tables import threads_table
from glm4 import threads
from glm4.cli import main
from glm4.generation import stream
from glm4.processors import cpu_limits, cpu_quota
from glm4.threads import FIRST_PATIENCE, LAST_PATIENCE, WINDOW, Controller, Team

PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7, 1, 8]]
QUIET, BUSY = 0.0, 1.0  # processors' worth of waiting


@pytest.fixture
def two_threads():
    """torch's own count, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> glm4.Model:
    return glm4.load("demo", device="cpu", progress=False)


def run(controller: Controller, busy, seconds: float, began: float = 0.0) -> list[int]:
    """The counts after readings of a window each, while `busy(count, now)` is the waiting."""
    counts = []
    for i in range(round(seconds / WINDOW)):
        now = began + (i + 1) * WINDOW
        counts.append(controller.judge(now, WINDOW, busy(controller.count, now) * WINDOW))
    return counts


def beside(n_busy: int, n_processors: int):
    """Waiting of `count` threads beside busy processes, if the system is fair."""
    return lambda count, now: max(0.0, count * (1 - n_processors / (count + n_busy)))


def test_quiet_machine_keeps_all():
    assert set(run(Controller(16), lambda count, now: 0.1, 60)) == {16}


def test_one_neighbour_costs_one_thread_but_for_trials():
    counts = run(Controller(2), beside(1, 2), 60)
    assert counts[0] == 1
    assert counts.count(2) / len(counts) < 0.02
    late = counts[len(counts) // 2 :]
    assert 2 <= late.count(2) <= 30 / LAST_PATIENCE + 1  # it goes on trying


def test_all_come_back_when_the_neighbour_leaves():
    controller = Controller(2)
    run(controller, beside(1, 2), 60)
    assert set(run(controller, lambda count, now: QUIET, 30, began=60)[-250:]) == {2}
    assert run(controller, beside(1, 2), WINDOW, began=90) == [1]
    assert controller.patience == FIRST_PATIENCE  # what was learnt from the other is forgotten


@pytest.mark.parametrize(("n_busy", "fits"), [(1, 63), (32, 32), (200, 1)])
def test_many_processors(n_busy, fits):
    counts = run(Controller(64), beside(n_busy, 64), 120)
    average = sum(counts[1000:]) / len(counts[1000:])
    assert abs(average - fits) <= 2
    assert min(counts) >= 1


def test_no_trial_while_the_last_thread_waits():
    assert set(run(Controller(2), lambda count, now: BUSY * 0.7, 60)) == {1}


def test_long_trials_are_paid_off():
    """Where a reading takes seconds, since all is so slow, a trial comes ten times as seldom."""
    controller = Controller(2)
    controller.judge(3.0, elapsed=3.0, waited=4.0)
    assert controller.count == 1
    assert controller.judge(32.9, elapsed=WINDOW, waited=0.0) == 1
    assert controller.judge(33.0, elapsed=WINDOW, waited=0.0) == 2


def test_a_team_reads_and_adapts(monkeypatch, two_threads):
    clock, waits = [100.0], {"1": 0, "2": 0}
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(threads, "thread_waits", lambda: dict(waits))
    team = Team(limit=2)

    def work(seconds: float, waited: float) -> int:
        with team:
            clock[0] += seconds
            if "1" in waits:
                waits["1"] += round(waited * 1e9)
            team.look()
            return torch.get_num_threads()

    assert work(0.01, 0.01) == 2  # too short to tell
    clock[0] += 0.5  # the caller's own time is no part of it
    assert work(0.04, 0.03) == 1
    assert torch.get_num_threads() == 2
    assert work(FIRST_PATIENCE * 2, 0.0) == 2  # a trial
    waits["1"] += 10**12
    clock[0] += 3600  # what happened meanwhile says nothing
    assert work(1.0, 0.0) == 2
    waits.clear()
    waits["3"] = 10**12  # threads that ended, and one that has waited as long as it exists
    assert work(1.0, 0.0) == 1


def test_nothing_to_read(monkeypatch, tmp_path):
    assert threads.thread_waits(str(tmp_path / "none")) == {}
    for name, text in (("7", "5 60 7\n"), ("8", "nonsense"), ("9", None)):
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "schedstat").write_text(text)
    assert threads.thread_waits(str(tmp_path)) == {"7": 60}


@pytest.mark.parametrize(
    ("count", "team", "inside"),
    [
        (2, Team(limit=2), 2),
        (2, Team(limit=1), 1),  # what the system allows
        (1, Team(limit=2), 1),  # the user's own torch.set_num_threads is a ceiling
        (1, Team(threads=2, limit=1), 2),  # said by the user, so obeyed
        (2, Team(threads=1, limit=2), 1),
        (2, Team(threads=1, on=False), 2),  # a GPU's model
    ],
)
def test_count_inside_and_outside(count, team, inside, two_threads):
    torch.set_num_threads(count)
    with team, team:
        assert torch.get_num_threads() == inside
        assert (team.controller is not None) == (team.on and team.threads is None and inside > 1)
    assert torch.get_num_threads() == count
    with pytest.raises(RuntimeError, match="stops here"), team:
        raise RuntimeError("stops here")
    assert torch.get_num_threads() == count


def test_generation_sets_and_restores(model, monkeypatch, two_threads):
    seen = []
    forward = type(model).forward

    def spied(self, *args):
        seen.append(torch.get_num_threads())
        return forward(self, *args)

    monkeypatch.setattr(type(model), "forward", spied)
    monkeypatch.setattr(model, "team", Team(threads=1))
    tokens = stream(model, PROMPTS, 8, stop_token_ids=[])
    next(tokens)
    assert torch.get_num_threads() == 2  # between two tokens, too
    next(tokens)
    tokens.close()
    assert torch.get_num_threads() == 2
    model.logits(torch.tensor(PROMPTS[:1]))
    assert torch.get_num_threads() == 2
    assert len(seen) == 2
    assert set(seen) == {1}


def test_every_layer_looks(model, monkeypatch):
    looks = []
    monkeypatch.setattr(Team, "look", lambda self: looks.append(self.depth))
    model.generate(PROMPTS[:1], 2, stop_token_ids=[])
    model.logits(torch.tensor(PROMPTS[:1]))
    assert looks == [1] * 3 * model.config.layers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_same_results_with_one_and_two_threads(dtype, quantize):
    """At the demo model's sizes F.linear's sums are the same too, which it does not promise: so
    floats are held to its rounding only."""
    model = glm4.load("demo", "cpu", dtype, quantize, progress=False, threads=1)
    ids = torch.randint(model.config.vocab, (1, 20), generator=torch.Generator().manual_seed(0))
    results = []
    for count in (1, 2):
        model.team = Team(count)
        made = model.generate(PROMPTS, 3, stop_token_ids=[])
        results.append((model.logits(ids), made))
    assert results[0][1] == results[1][1]
    tolerance = 0.05 if quantize is None else 0.0
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=tolerance)


def test_load_stores_the_count(model):
    assert model.threads is None
    assert model.team.threads is None
    fixed = glm4.load("demo", device="cpu", progress=False, threads=3)
    assert fixed.threads == fixed.team.threads == 3


@pytest.mark.parametrize(
    ("wrong", "error"),
    [(0, ValueError), (-1, ValueError), (10**9, ValueError), ("two", TypeError), (True, TypeError)],
)
def test_rejects(wrong, error):
    with pytest.raises(error, match=r"^load: threads must be .*, got "):
        glm4.load("demo", threads=wrong)


@pytest.mark.parametrize("wrong", ["0", "-1", "two", "1000000000"])
def test_command_line_rejects(wrong, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["generate", "--prompt", "x", "--threads", wrong])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "threads" in error
    assert wrong in error


def test_command_line(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(threads.Team, "__enter__", lambda self: asked.append(self.threads))
    monkeypatch.setattr(threads.Team, "__exit__", lambda self, *_: None)
    assert main(["generate", "--prompt", "x", "--max-new-tokens", "2", "--threads", "1"]) == 0
    assert set(asked) == {1}


GROUP_FILES = [  # /proc/self/cgroup, files below /sys/fs/cgroup, CPUs
    ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
    ("0::/a/b\n", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "50000 100000"}, 0.5),  # outer
    ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "other/cpu.max": "1000 100000"}, None),
    ("0::/\n1:cpu:/\n", {"unified/cpu.max": "300000 100000"}, 3.0),  # both versions mounted
    (
        "4:cpu,cpuacct:/docker/x\n5:memory:/docker/x\n",  # as a container of version 1 sees it
        {"cpu,cpuacct/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        2.5,
    ),
    ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ("5:cpuset:/\n", {"cpuset/cpu.max": "1000 100000"}, None),
    ("0::/\n", {"cpu.max": ""}, None),
    ("0::/\n", {"cpu.max": "100000 0"}, None),
    ("nonsense\n", {}, None),
]


@pytest.mark.parametrize(("groups", "files", "cpus"), GROUP_FILES)
def test_quota(groups, files, cpus, tmp_path):
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert cpu_quota(tmp_path / "cgroup", tmp_path / "sys") == cpus


def test_quota_without_control_groups(tmp_path):
    assert cpu_quota(tmp_path / "none", tmp_path / "none") is None


def test_limits(monkeypatch):
    monkeypatch.setattr("glm4.processors.cpu_quota", lambda: 1.2)
    assert cpu_limits()["quota"] == 2
    monkeypatch.setattr("glm4.processors.cpu_quota", lambda: 0.1)
    assert cpu_limits()["quota"] == 1
    monkeypatch.setattr("glm4.processors.cpu_quota", lambda: None)
    assert "quota" not in cpu_limits()
    if hasattr(os, "sched_getaffinity"):
        assert cpu_limits()["affinity"] == len(os.sched_getaffinity(0))


def test_benchmark_judges():
    def turns(*speeds: float) -> list[dict[str, float]]:
        return [{"tokens_per_s": s, "cpu_s_per_token": 0.1, "others": 0.0} for s in speeds]

    def condition(one: float, two: float, default: float) -> list[dict]:
        speeds = {"1 thread": one, "2 threads": two, "default": default}
        return [benchmark.judged(name, turns(1, s, 1000)) for name, s in speeds.items()]

    result = {"model": "demo", "layers": 5}
    result |= {"quiet": condition(50, 100, 99), "crowded": condition(50, 5, 45)}
    result |= benchmark.ratios(result)
    assert result["quiet_default_of_all"] == 0.99
    assert result["crowded_default_of_one"] == 0.9
    assert len(threads_table(result).rows) == 6


def test_a_team_of_two_python_threads():
    """Each has its own count, which comes back whoever ends first."""
    team, seen = Team(1), {}
    inside, ended = threading.Event(), threading.Event()

    def first():
        torch.set_num_threads(2)
        with team:
            inside.set()
            ended.wait(5)
            seen["first, inside"] = torch.get_num_threads()
        seen["first, after"] = torch.get_num_threads()

    def second():
        inside.wait(5)
        torch.set_num_threads(3)
        with team:
            seen["second, inside"] = torch.get_num_threads()
        seen["second, after"] = torch.get_num_threads()
        ended.set()

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {
        "first, inside": 1, "first, after": 2, "second, inside": 1, "second, after": 3
    }  # fmt: skip
