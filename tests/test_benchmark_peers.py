"""Quantised layers beside the peers: turns, deaths, memory."""

from __future__ import annotations

import json
import os
import re
import signal

import numpy as np
import pytest
from benchmark_results import ORIGIN, one_line, report_on

from benchmarks import commands, quantized
from benchmarks.__main__ import main
from benchmarks.peers import PEERS
from benchmarks.record import merged
from benchmarks.worker import Worker, WorkerError

pytestmark = pytest.mark.usefixtures("small_caches")


@pytest.fixture
def small_stage(monkeypatch):
    """One stage, of a layer that takes no time."""
    stage = quantized.Stage(128, 256, (1, 3))
    monkeypatch.setattr(quantized, "STAGES", {"small": stage})
    monkeypatch.setattr(quantized, "rotate_bytes", lambda stage, bits, room: 1 << 16)
    return stage


def test_quantized_runs_and_resumes(small_stage, tmp_path, capsys):
    file = tmp_path / "quantized.json"
    assert main(["quantized", "--quick", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    stage = merged(result)["quantized"]["small"]
    assert result["provenance"]["quick"] and stage["timed"] == [1, 3]
    took_part = {c["peer"] for c in stage["contenders"]}
    assert {"ours", "torch_linear"} <= took_part
    for peer, package in PEERS.items():  # here or named as missing
        assert (peer in took_part) != any(line.startswith(package) for line in stage["skipped"])
    for contender in stage["contenders"]:
        assert contender["copies"] * contender["bytes"] >= 1 << 16, contender
        for figures in contender["tokens"].values():
            assert figures["status"] == "ok", (contender["name"], figures)
            assert 0 < figures["relative_l2"] <= quantized.TOLERANCE[contender["bits"]]
            assert figures["us"] > 0 and figures["share"] > 0
    printed = capsys.readouterr().out
    assert "glm4_kernels int4 g128" in printed and "torch int8pack" in printed

    written = file.read_bytes()
    assert main(["quantized", "--quick", "--json", str(file)]) == 0
    assert file.read_bytes() == written and "already there" in capsys.readouterr().out

    file.write_text(json.dumps({"ops": []}))
    assert main(["quantized", "--quick", "--json", str(file)]) == 2
    assert "--json must be new" in one_line(capsys.readouterr().err)


class ScriptedPeer:
    """In a peer's process: its contenders are right, but for what their names say."""

    def describe(self):
        names = ("sound", "segfaults", "exits", "raises")
        return [{"name": name, "bits": 4, "what": "all"} for name in names]

    def pose(self, rows, n, rotate_bytes, threads):
        self.rows = np.load(rows)

    def prepare(self, name):
        if name == "raises":
            raise ValueError("K = 256 does not suit it")
        return {"bytes": 1000, "copies": 1}

    def multiply(self, name, x):
        if name == "segfaults" and len(x) == 3:
            print("about to fall", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        return x @ self.rows.T

    def turn(self, name, seconds):
        if name == "exits":
            os._exit(7)
        return {"times": [1e-3], "foreign": 0.0}


def test_a_contender_that_dies_costs_itself_alone(small_stage, tmp_path, monkeypatch, capsys):
    real = quantized.PeerProcess.started

    def started(self):
        return Worker(ScriptedPeer) if self.module == "open_vino" else real(self)

    monkeypatch.setattr(quantized.PeerProcess, "started", started)
    file = tmp_path / "quantized.json"
    monkeypatch.setattr(commands, "CPU_PEERS", {"ours": "glm4-kernels", "open_vino": "openvino"})
    for _ in range(2):  # and when nothing is left to measure
        assert main(["quantized", "--quick", "--json", str(file)]) == 1
        first, second = capsys.readouterr().err.splitlines()
        assert first == (
            "benchmarks: small: segfaults: its process died of SIGSEGV: about to fall"
            if "segfaults" in first
            else "benchmarks: small: exits: its process ended with status 7"
        )
        assert {"segfaults", "exits"} == {line.split(": ")[2] for line in (first, second)}
    stage = merged(json.loads(file.read_text()))["quantized"]["small"]
    who = {c["name"]: c for c in stage["contenders"]}
    assert all("us" in who["sound"]["tokens"][m] for m in ("1", "3"))
    assert who["raises"]["note"] == "ValueError: K = 256 does not suit it"
    assert "us" in who["segfaults"]["tokens"]["1"]
    assert who["segfaults"]["tokens"]["3"] == {
        "status": "failed",
        "note": "its process died of SIGSEGV: about to fall",
    }
    assert who["exits"]["tokens"]["1"]["note"] == "its process ended with status 7"
    assert who["exits"]["tokens"]["3"]["note"] == "not asked again: its process ended with status 7"
    ours = [c for c in stage["contenders"] if c["peer"] == "ours"]
    assert ours and all("us" in figures for c in ours for figures in c["tokens"].values())


def test_copies_take_what_is_allowed(monkeypatch):
    monkeypatch.setattr(quantized, "cache_bytes", lambda: 60 << 20)
    o, in_cache = quantized.STAGES["o"], quantized.STAGES["in_cache"]
    bits = [4] * 8 + [8] * 6 + [16] * 2
    plenty = quantized.rotate_bytes(o, bits, 64 << 30)
    assert plenty == 480 << 20
    short = quantized.rotate_bytes(o, bits, 8 << 30)
    assert 240 << 20 <= short < plenty and len(bits) * short < 8 << 30
    with pytest.raises(
        MemoryError, match=r"16 contenders need \d.\d GiB.*4 times.*60 MiB.*4.0 GiB"
    ):
        quantized.rotate_bytes(o, bits, 4 << 30)
    assert quantized.rotate_bytes(in_cache, bits, 0) < 60 << 20


def test_a_run_without_memory_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quantized, "STAGES", {"small": quantized.Stage(128, 256, (1,))})
    file = tmp_path / "quantized.json"
    arguments = ["quantized", "--peers", "ours", "--quick", "--json", str(file)]
    assert main([*arguments, "--memory", "1M"]) == 2
    told = one_line(capsys.readouterr().err)
    assert re.search(r"small: \d contenders need .* 1 MiB are allowed \(--memory, --peers\)$", told)


class FakePeer:
    """Multiplies rightly up to `error`, and takes the times it is given, others' share beside."""

    def __init__(self, rows, times, foreign=(0.0,), error=0.0):
        self.rows, self.error = rows, error
        self.times, self.foreign = list(times), list(foreign)
        self.turns = 0

    def multiply(self, name, x):
        return x @ self.rows.T * (1 + self.error)

    def turn(self, name, seconds):
        time, foreign = (of[min(self.turns, len(of) - 1)] for of in (self.times, self.foreign))
        self.turns += 1
        if time is None:
            raise WorkerError("its process died (-11)")
        return {"times": [time], "foreign": foreign}


class FakeProbe:
    def sample(self):
        return 1e9, 1e12


def measured(**peers) -> dict[str, dict]:
    """Figures of ours and of int4 peers, each (times, foreign, error), at M = 1."""
    stage = quantized.Stage(100, 200, (1,))
    rows = quantized.random_rows(stage)
    entrants = [
        quantized.Entrant(
            FakePeer(rows, **what),
            {"name": name, "peer": name, "bits": 4, "bytes": 10_000, "tokens": {}},
        )
        for name, what in peers.items()
    ]
    effort = quantized.Effort(rounds=5)
    quantized.measure(entrants, rows, 1, stage, effort, FakeProbe(), lambda what: None)
    return {e.name: e.result["tokens"]["1"] | {"asked": e.peer.turns} for e in entrants}


def test_turns_of_peers():
    figures = measured(
        ours={"times": [20e-6, 40e-6, 20e-6, 10e-6, 20e-6]},
        wrong={"times": [1e-6], "error": 0.16},
        nan={"times": [1e-6], "error": float("nan")},
        slow={"times": [100e-6]},
        late={"times": [100e-6, 20e-6]},
        dies={"times": [20e-6, None]},
        disturbed={"times": [50e-6, 20e-6], "foreign": [0.5, 0.0]},
    )
    ours = figures["ours"]
    assert ours["us"] == pytest.approx(20) and ours["p75_us"] == pytest.approx(20)
    assert ours["share"] == pytest.approx(0.5)  # 10 kB at 1 GB/s
    assert ours["share_of_peak"] == pytest.approx(2 * 100 * 200 / 1e12 / 20e-6)
    for name in ("wrong", "nan"):
        assert figures[name]["status"] == "wrong" and figures[name]["asked"] == 0
        assert "us" not in figures[name]
    assert figures["slow"]["asked"] == 2 and figures["late"]["asked"] == 6
    assert figures["dies"]["note"] == "its process died (-11)"
    assert figures["disturbed"]["turns_us"] == [pytest.approx(20)] * 5
    assert figures["disturbed"]["asked"] == 6


def test_weights_are_rows_that_divide_them():
    for stage in quantized.STAGES.values():
        rows = quantized.random_rows(stage)
        assert stage.n % len(rows) == 0 and len(rows) >= 100 and rows.shape[1] == stage.k
        assert rows.std() == pytest.approx(0.02, rel=0.01)


def test_report_of_the_peers(committed):
    def contender(peer, name, bits, us):
        figures = {"status": "ok", "relative_l2": 0.1, "us": us, "share": 0.5}
        figures |= {"read_beside_gb_per_s": [50.0], "peak_beside_gop_per_s": [2000]}
        return {
            "peer": peer,
            "name": name,
            "bits": bits,
            "bytes": 100,
            "what": "all",
            "tokens": {"1": figures},
        }

    stage = {"n": 10, "k": 20, "in_cache": False, "versions": {"torch": "9.9"}}
    stage["skipped"] = ["openvino: not here"]
    stage["contenders"] = [
        contender("ours", "ours int4", 4, 20.0),
        contender("ours", "ours int8", 8, 30.0),
        contender("a", "peer a", 4, 50.0),
        contender("b", "peer b", 8, 27.0),
        contender("c", "plain bf16", 16, 40.0),
    ]
    result = {"provenance": ORIGIN, "quantized": {"o": stage}}
    (committed / "results" / "cpu" / "quantized.json").write_text(json.dumps(result))
    assert report_on(committed) == 0
    text = (committed / "results" / "README.md").read_text()
    row = "| o 10 x 20 | 1 | 20.0 µs | plain bf16 | 40.0 µs | 2.00x | 50% | 30.0 µs | peer b | "
    assert row + "27.0 µs | 0.90x | 50% |" in text
    assert "torch 9.9" in text and "Skipped: openvino: not here." in text and "peer a" in text
    assert report_on(committed, "--check") == 0
