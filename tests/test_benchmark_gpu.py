"""The GPU run: its stages fail alone."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from benchmark_results import CPU, ORIGIN, doubling, one_line
from conftest import uses_gpu
from rich.console import Console

from benchmarks import gpu, memory
from benchmarks.__main__ import main
from benchmarks.harness import discover
from benchmarks.record import FolderRecord
from benchmarks.stages import run_stages

pytestmark = pytest.mark.usefixtures("small_caches")


def test_gpu_run_needs_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu", "--out", str(tmp_path)]) == 2
    assert "CUDA device" in one_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_the_kernels_stages_time_every_op_once():
    timed = [op for stage in gpu.KERNELS for op in gpu.ops_of(stage)]
    assert sorted(timed) == sorted(discover())


def faulty_cases():
    memory.told_cache = lambda: (8 << 20, 1)  # in the process that times them

    def hang(x):
        time.sleep(600)

    right = doubling()
    return [
        replace(doubling(ours=lambda x: os._exit(7)), label="dies"),
        replace(right, label="is right"),
        replace(doubling(ours=hang), label="hangs"),
        replace(right, label="has no truth", oracle=None),
        replace(doubling(ours=lambda x: 3 * x), label="is wrong"),
    ]


def test_a_case_that_dies_or_hangs_costs_itself_alone(monkeypatch):
    monkeypatch.setattr(gpu, "CASE_SECONDS", 5.0)
    results = []
    with pytest.raises(RuntimeError) as raised:
        results.extend(gpu.kernels(faulty_cases, CPU))
    result = results[-1]
    assert [(op["label"], op["contenders"][0]["status"]) for op in result["ops"]] == [
        ("is right", "ok"),
        ("is wrong", "wrong"),
    ]
    assert result["failed"] == [
        "double (dies): its process ended with status 7",
        "double (hangs): no answer in 5 s",
        "double (has no truth): TypeError: 'NoneType' object is not callable",
    ]
    for failed in (*result["failed"], "double (is wrong)"):
        assert failed in str(raised.value)
    assert result["ceilings"]["copy"] > 0


def ends_well(folder):
    with open(folder / "runs", "a") as runs:
        runs.write("x")
    yield {"value": 1}
    yield {"value": 2}


def raises(folder):
    yield {"value": 1}
    raise RuntimeError("one line\nand another")


def dies(folder):
    yield {"value": 1}
    os._exit(7)


def hangs(folder):
    time.sleep(600)
    yield {}


def test_stages_fail_alone_and_resume(tmp_path, monkeypatch, capsys):
    functions = {"well": ends_well, "raises": raises, "dies": dies, "hangs": hangs}
    limited = {
        name: gpu.Limited(partial(run, tmp_path), 0.05 if run is hangs else 5.0)
        for name, run in functions.items()
    }
    monkeypatch.setattr(gpu, "STAGES", limited)
    out = tmp_path / "out"

    def ran(names, origin=ORIGIN, fresh=False):
        record = FolderRecord(origin, out, fresh)
        return run_stages(gpu.stages(names), record, Console()).faults

    assert ran(list(limited)) == [
        "raises: RuntimeError: one line",
        "dies: its process ended with status 7",
        "hangs: stopped after 0.05 minutes",
    ]
    written = {name: json.loads((out / f"{name}.json").read_text()) for name in limited}
    assert written["well"]["error"] is None and written["well"]["value"] == 2
    assert written["raises"]["error"] == "RuntimeError: one line"
    assert written["dies"]["error"] == "its process ended with status 7"
    assert written["hangs"]["error"] == "stopped after 0.05 minutes"
    for name in ("raises", "dies"):
        assert written[name]["value"] == 1, "what was measured before the failure is kept"
    assert all(result["provenance"] == ORIGIN for result in written.values())

    assert ran(["well"]) == []
    assert (tmp_path / "runs").read_text() == "x", "a stage that ended well is not run again"
    assert ran(["well"], fresh=True) == []
    assert (tmp_path / "runs").read_text() == "xx"
    assert ran(["well"], ORIGIN | {"source_hash": "another"}) == []
    assert (tmp_path / "runs").read_text() == "xxx", "other sources are measured"
    assert "starting over" in capsys.readouterr().out


def test_stage_of_tests_counts_them(tmp_path):
    file = tmp_path / "test_three.py"
    file.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='r')\n"
        "def test_skipped(): pass\n"
    )
    outcomes = {test.split("::")[1]: outcome for outcome, test, _ in gpu.run_test_file(file)}
    assert outcomes == {"test_good": "passed", "test_bad": "failed", "test_skipped": "skipped"}


def test_a_test_file_that_hangs_has_failed(monkeypatch, tmp_path):
    file = tmp_path / "test_slow.py"
    file.write_text("import time\ndef test_slow(): time.sleep(600)\n")
    monkeypatch.setattr(gpu, "FILE_SECONDS", 3.0)
    assert gpu.run_test_file(file) == [("failed", "test_slow.py", "took more than 3 s")]


def test_the_tests_of_a_gpu_are_told_from_the_others():
    def on(device):
        kernel = SimpleNamespace(device=torch.device(device))
        return SimpleNamespace(
            callspec=SimpleNamespace(params={"kernel": kernel}), fixturenames=["device"]
        )

    assert uses_gpu(on("cuda")) and not uses_gpu(on("cpu"))
    assert uses_gpu(SimpleNamespace(fixturenames=["device", "seeded"]))
    assert not uses_gpu(SimpleNamespace(fixturenames=["seeded"]))
