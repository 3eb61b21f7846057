"""The report: tables from results, whole or not; where results come from."""

from __future__ import annotations

import json
import random

import pytest
from benchmark_results import (
    ORIGIN,
    doubling,
    heat_result_of,
    model_result_of,
    one_line,
    report_on,
    result_of,
)

from benchmarks import (
    gpu,
    report,
    summary,
    tables,
)
from benchmarks.__main__ import main
from benchmarks.provenance import shown_command, source_hash

pytestmark = pytest.mark.usefixtures("small_caches")


def test_report_writes_the_tables(committed):
    text = (committed / "results" / "README.md").read_text()
    for expected in (
        ORIGIN["device"],
        "| double | 1,000 values |",
        "x peer |",
        "tiny, bfloat16, random weights",
        "| decode step in a CUDA graph, drawn | 3 | 70 cached |",
        "| prompt, glm4 | 1 | 9 |",
        "**tiny, 3 layers, vocabulary 320, 16 tokens of prompt, random weights**",
        "| glm4 int4 | prefill | gate_up |",
    ):
        assert expected in text
    assert report_on(committed, "--check") == 0


def test_readme_has_ours_beside_the_best_peer_of_the_same_bits(committed):
    ours, slow, fast = ({"linear_bits": 4.6} for _ in range(3))
    for who, name, decode in ((ours, "glm4 int4", 30.0), (slow, "a", 10.0), (fast, "b", 20.0)):
        who |= {"name": name, "decode": {"tokens_per_s": decode}}
        who["prefill"] = {"tokens_per_s": 900 / decode}
    alone = ours | {"name": "glm4 int8", "linear_bits": 8.0}
    heat = {"model": "m", "layers": 2, "contenders": [ours, alone, slow, {"name": "died"}, fast]}
    assert list(summary.rows_of(heat)) == [
        ("m, 2 layers, int4", "30", "20 (b)", "1.50x", "30", "90 (a)", "0.33x")
    ]
    text = (committed / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "[results/README.md](results/README.md)" in text


def test_a_stage_that_did_not_end_is_told(committed):
    """From a tree that travelled without its history."""
    origin = ORIGIN | {"commit": None, "source_hash": "0123456789abcdef"}
    stage = {"stage": "kernels-small", "provenance": origin, "error": "did not end"}
    (committed / "results" / "cpu" / "kernels-small.json").write_text(json.dumps(stage))
    assert report_on(committed) == 0
    text = (committed / "results" / "README.md").read_text()
    assert f"source 0123456789abcdef on {ORIGIN['date'][:10]}" in text
    assert "Stage kernels-small failed: did not end." in text


def test_what_an_interrupted_run_left_is_reported(committed):
    """In the form of before: a heat that had just begun beside one that was done."""
    heats = [heat_result_of(), {"heat": "4-bit", "contenders": [], "skipped": []}]
    file = committed / "results" / "cpu" / "cpu-model.json"
    file.write_text(json.dumps({"provenance": ORIGIN, "heats": heats}))
    assert report_on(committed) == 0
    text = (committed / "results" / "README.md").read_text()
    assert "cpu-model was interrupted: 1 of 2 stages done." in text
    assert text.count("**tiny, 3 layers") == 2


def test_stages_that_are_missing_are_told(committed):
    """In the form of now: one heat done, one with a row whose contender died, one not begun."""
    fell = heat_result_of() | {"heat": "8-bit"}
    note = "its process died of SIGSEGV"
    fell["contenders"] = [{"name": "llama.cpp Q8_0", "linear_bits": 8.5, "note": note}]
    stages = {
        "all": {"state": "done", "result": {"heats": [heat_result_of()]}},
        "8-bit": {"state": "started", "result": {"heats": [fell]}},
    }
    found = {"run": "cpu-model", "provenance": ORIGIN, "of": ["all", "8-bit", "16-bit"]}
    file = committed / "results" / "cpu" / "cpu-model.json"
    file.write_text(json.dumps(found | {"stages": stages}))
    assert report_on(committed) == 0
    text = (committed / "results" / "README.md").read_text()
    assert "cpu-model was interrupted: 1 of 3 stages done." in text
    assert "| llama.cpp Q8_0 | 8.50 |" in text
    assert "Llama.cpp Q8_0: its process died of SIGSEGV." in text


def test_no_hole_in_a_result_breaks_the_report(tmp_path):
    """Fields and rows go from the committed results at random."""
    rng = random.Random(0)
    folder = tmp_path / "cpu"
    folder.mkdir()
    files = sorted((gpu.REPOSITORY / "benchmarks/results").rglob("*.json"))
    whole = [shortened(json.loads(file.read_text())) for file in files]
    whole.append({"provenance": ORIGIN, "models": [model_result_of()], "heats": [heat_result_of()]})
    for _ in range(20):
        for i, result in enumerate(whole):
            holed = {"provenance": ORIGIN} | with_holes(result, rng)
            (folder / f"{i}.json").write_text(json.dumps(holed))
        report.markdown(tmp_path)
        summary.summary(tmp_path, tmp_path / "README.md")


def shortened(result):
    """At most three rows of each list."""
    if isinstance(result, dict):
        return {key: shortened(value) for key, value in result.items()}
    return [shortened(value) for value in result[:3]] if isinstance(result, list) else result


def with_holes(result, rng):
    """One field or row in twenty-five is missing."""
    if isinstance(result, dict):
        kept = {key: value for key, value in result.items() if rng.random() > 0.04}
        return {key: with_holes(value, rng) for key, value in kept.items()}
    if isinstance(result, list):
        return [with_holes(value, rng) for value in result if rng.random() > 0.04]
    return result


def test_first_calls_are_told():
    row = {"first_token_ms": 12.3}
    assert tables.first_token(row) == "12 ms"
    assert tables.first_token(row | {"warmup_s": 0.01}) == "12 ms"
    assert tables.first_token(row | {"warmup_s": 81.26}) == "12 ms (first call +81.3 s)"


def test_check_goes_red_when_the_readme_is_stale(committed, capsys):
    file = committed / "results" / "cpu" / "cpu.json"
    result = json.loads(file.read_text())
    result["ops"][0]["contenders"][0]["eager"]["us"] *= 2
    file.write_text(json.dumps(result))
    capsys.readouterr()
    assert report_on(committed, "--check") == 2
    assert "is out of date" in one_line(capsys.readouterr().err)
    assert report_on(committed) == 0 and report_on(committed, "--check") == 0


def test_a_wrong_op_is_reported_as_wrong(committed):
    file = committed / "results" / "cpu" / "cpu.json"
    result = json.loads(file.read_text())
    case = doubling(peer=lambda x: x + x)
    case.contenders["ours"] = lambda x: 3 * x
    result["ops"].append(result_of(case))
    file.write_text(json.dumps(result))
    assert report_on(committed) == 0
    text = (committed / "results" / "README.md").read_text()
    assert "| wrong: relative L2 5.0e-01, allowed" in text


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda root: (root / "README.md").write_text("no markers"), "README.md must hold"),
        (lambda root: (root / "results" / "cpu" / "x.json").write_text("{"), "must be JSON"),
        (
            lambda root: (root / "results" / "cpu" / "x.json").write_text(
                json.dumps({"provenance": ORIGIN | {"quick": True}})
            ),
            "must not come from --quick",
        ),
    ],
    ids=["markers", "json", "quick"],
)
def test_report_rejects(committed, change, message, capsys):
    change(committed)
    capsys.readouterr()
    assert report_on(committed, "--check") == 2
    assert message in one_line(capsys.readouterr().err)


def test_plot_is_reproducible(committed):
    pytest.importorskip("matplotlib", reason="the plot is an extra of [bench]")
    (plot,) = report.plot(committed / "results")
    drawn = plot.read_bytes()
    assert report.plot(committed / "results") == [plot] and plot.read_bytes() == drawn
    assert report_on(committed) == 0
    assert "](cpu/share.svg)" in (committed / "results" / "README.md").read_text()


def test_committed_readme_is_up_to_date():
    results, readme = gpu.REPOSITORY / "benchmarks/results", gpu.REPOSITORY / "README.md"
    assert main(["report", str(results), "--readme", str(readme), "--check"]) == 0


def test_source_hash_sees_every_change(tmp_path):
    (tmp_path / "glm4").mkdir()
    file = tmp_path / "glm4" / "a.py"
    file.write_text("x = 1")
    hashes = [source_hash(tmp_path)]
    file.write_text("x = 2")
    hashes.append(source_hash(tmp_path))
    file.rename(file.with_name("b.py"))
    hashes.append(source_hash(tmp_path))
    assert len(set(hashes)) == 3


def test_no_path_of_this_machine_is_recorded():
    shown = shown_command(["gpu", "--out", "/home/someone/run-1", "--stage", "tests"])
    assert shown == "python -m benchmarks gpu --out run-1 --stage tests"
