"""The judge is judged: wrong contenders are caught, results survive JSON, stale tables go red.

No test here asserts a time.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

import glm4
from benchmarks import gpu, harness, report
from benchmarks.__main__ import main
from benchmarks.ceilings import Ceilings, CpuReadProbe, last_level_cache, measure_ceilings
from benchmarks.harness import Case, discover, gate, run_case, take_turns
from benchmarks.model_bench import Plan, measure_model
from benchmarks.provenance import provenance, shown_command, source_hash

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy=2e10, read=3e10, matmul=4e11, cache_bytes=1 << 20)
ORIGIN = provenance(CPU)


def doubling(**contenders) -> Case:
    """The op "2x" with the contenders given, after a right one."""
    return Case(
        op="double",
        label="1,000 values",
        bytes_moved=8000,
        flops=0,
        inputs=lambda: (torch.randn(1000),),
        contenders={"ours": lambda x: 2 * x} | contenders,
        oracle=lambda x: 2 * x.double(),
        tolerance=1e-6,
    )


def result_of(case: Case, **arguments) -> dict:
    result = run_case(case, CPU, CEILINGS, **({"quick": True} | arguments))
    return json.loads(json.dumps(result))


@pytest.mark.parametrize(
    "contender, status, note",
    [
        (lambda x: 2.001 * x, "wrong", "relative L2 5.0e-04, allowed 1.0e-06"),
        (lambda x: (2 * x).index_fill(0, torch.tensor([7]), torch.nan), "wrong", "nan"),
        (lambda x: 2 * x[None], "wrong", r"shape \[1, 1000\], expected \[1000\]"),
        (lambda x: 1 / 0, "failed", "^ZeroDivisionError: division by zero$"),
    ],
    ids=["inaccurate", "nan", "shape", "raises"],
)
def test_wrong_contenders_are_named_and_never_timed(contender, status, note):
    ours, other = result_of(doubling(other=contender))["contenders"]
    assert ours["status"] == "ok" and "eager" in ours
    assert other["status"] == status and "eager" not in other
    assert re.search(note, other["note"])


def test_every_contender_is_judged_on_the_same_inputs():
    def in_place(x):
        return x.mul_(2)

    verdicts = gate(doubling(in_place=in_place, again=in_place, first_of_two=lambda x: (2 * x, x)))
    assert [verdict["status"] for verdict in verdicts] == ["ok"] * 4


def test_no_contender_inherits_the_right_answer():
    big = replace(
        doubling(unwritten=torch.empty_like),
        inputs=lambda: (torch.randn(1 << 20),),
        contenders={"ours": lambda x: 2 * x, "unwritten": torch.empty_like},
    )
    torch.use_deterministic_algorithms(False)  # so that fresh memory is not filled with NaN
    assert [verdict["status"] for verdict in gate(big)] == ["ok", "wrong"]


def test_result_is_sane():
    case = replace(doubling(slow=lambda x: torch.stack([2 * x] * 50)[0]), flops=0)
    result = result_of(case, quick=False, probe=CpuReadProbe())
    assert result["bound"] == "memory" and result["in_cache"] and result["compared_in"] == "eager"
    assert result["best_peer"] == "slow" and result["speedup"] > 0
    for contender in result["contenders"]:
        eager = contender["eager"]
        assert 0 < eager["p20_us"] <= eager["us"] <= eager["p80_us"]
        assert eager["share"] > 0
        assert eager["gb_per_s"] == pytest.approx(8e-3 / eager["us"] * 1e3)
        assert len(eager["turns_us"]) == len(eager["read_beside_gb_per_s"])
        assert len(eager["turns_us"]) >= harness.EFFORT["cpu"].rounds
    compute = result_of(replace(case, flops=10**9))
    assert compute["bound"] == "compute"


def test_share_is_of_the_floor():
    case = replace(doubling(), bytes_moved=3_000_000, flops=40_000_000)  # both floors: 100 us
    judged = harness.judge([(200e-6, None), (200e-6, 6e10)], case, CEILINGS, CPU)
    assert judged["share"] == pytest.approx(0.5)  # the faster memory leaves the flops' floor
    assert judged["us"] == pytest.approx(200)
    assert judged["gb_per_s"] == pytest.approx(15)
    assert judged["tflop_per_s"] == pytest.approx(0.2)


def test_sets_rotate_and_exceed_the_cache():
    seen = set()
    case = doubling(other=lambda x: (seen.add(x.data_ptr()), 2 * x)[1])
    result = result_of(replace(case, bytes_moved=1 << 19), quick=False)
    assert result["n_sets"] == 6 and not result["in_cache"]  # three times the cache of CEILINGS
    assert len(seen) >= 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_is_timed_twice(device):
    case = replace(
        doubling(waits=lambda x: 2 * x if x.sum().isfinite().item() else x),
        inputs=lambda: (torch.randn(1000, device=device),),
    )
    result = run_case(case, device, measure_ceilings(device, quick=True), quick=True)
    ours, waits = result["contenders"]
    assert ours["eager"]["us"] > 0 and ours["graph"]["us"] > 0
    assert waits["eager"]["us"] > 0 and "graph" not in waits
    assert waits["note"].startswith("no graph: ") and result["compared_in"] == "eager"
    assert torch.randn(3, device=device).isfinite().all(), "a refused capture harms nothing"


def test_contenders_take_turns():
    order = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def seconds_per_call(self):
            order.append(self.name)
            return 1.0

    turns = {name: Recorder(name) for name in "abc"}
    samples = take_turns(turns, harness.Effort(0.0, 3, 0.0), None)
    assert "".join(order) == "abcbcacab"
    assert samples == {name: [(1.0, None)] * 3 for name in "abc"}


def test_ceilings_are_measured():
    ceilings = measure_ceilings(CPU, quick=True)
    assert all(value > 0 for value in asdict(ceilings).values())
    assert last_level_cache(CPU) >= 1 << 18


def test_every_op_has_its_benchmark():
    schemas = torch._C._jit_get_all_schemas()
    ops = {s.name.split("::")[1] for s in schemas if s.name.startswith("glm4_kernels::")}
    assert ops and ops <= set(discover())


@pytest.mark.parametrize("op", discover())
def test_benchmark_is_right_on_this_machine(op):
    cases = list(discover([op])[op].cases(CPU))
    assert cases, f"bench_{op} has no case for a CPU"
    for case in cases:
        assert case.op == op and case.bytes_moved > 0 and len(case.contenders) >= 2
        assert [v for v in gate(case) if v["status"] != "ok"] == [], case.label


def test_only_rejects_unknown_ops(capsys):
    assert main(["--only", "rms_norm,nope"]) == 2
    assert "got nope" in one_line(capsys.readouterr().err)


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text


# The GPU run


def test_gpu_run_needs_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu", "--out", str(tmp_path)]) == 2
    assert "CUDA device" in one_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


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


def test_stages_fail_alone_and_resume(tmp_path):
    functions = {"well": ends_well, "raises": raises, "dies": dies, "hangs": hangs}
    stages = {
        name: gpu.Stage(partial(run, tmp_path), 0.05 if run is hangs else 5.0)
        for name, run in functions.items()
    }
    out = tmp_path / "out"
    assert gpu.run_stages(stages, out, ORIGIN) == ["raises", "dies", "hangs"]
    written = {name: json.loads((out / f"{name}.json").read_text()) for name in stages}
    assert written["well"]["error"] is None and written["well"]["value"] == 2
    assert written["raises"]["error"] == "RuntimeError: one line"
    assert written["dies"]["error"] == "its process died (7)"
    assert written["hangs"]["error"] == "stopped after 0.05 minutes"
    for name in ("raises", "dies"):
        assert written[name]["value"] == 1, "what was measured before the failure is kept"
    assert all(result["provenance"] == ORIGIN for result in written.values())

    well = {"well": stages["well"]}
    assert gpu.run_stages(well, out, ORIGIN) == []
    assert (tmp_path / "runs").read_text() == "x", "a stage that ended well is not run again"
    assert gpu.run_stages(well, out, ORIGIN, force=True) == []
    assert (tmp_path / "runs").read_text() == "xx"


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


# The whole model


@pytest.fixture(scope="module")
def model_result():
    tiny = replace(
        glm4.PRESETS["glm-4-9b-0414"],
        layers=2, hidden=128, ffn=192, heads=4, kv_heads=2, vocab=320, max_positions=256,
        eos_token_ids=(0,),
    )  # fmt: skip
    plan = Plan("tiny", None, (1, 3), (70, 512), 5, 4, (2,), 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(glm4.PRESETS, "tiny", tiny)
        *_, result = measure_model(plan, CPU, CEILINGS, lambda what: None)
    return json.loads(json.dumps(result))


def test_model_result(model_result):
    assert [(row["batch"], row["context"]) for row in model_result["decode"]] == [(1, 70), (3, 70)]
    layer = 128 * (8 * 128) + 128 * (4 * 128) + 3 * 128 * 192 + 4 * 128  # qkv, o, MLP, norms
    layer += 8 * 128  # qkv bias
    weights = 2 * layer + 128 + 320 * 128
    cache = 2 * 2 * 2 * 128 * 70  # layers, K and V, heads, head_dim, tokens
    assert [row["bytes_moved"] for row in model_result["decode"]] == [
        2 * (weights + cache),
        2 * (weights + 3 * cache),
    ]
    engines = {row["engine"]: row for row in model_result["generate"]}
    assert set(engines) == {"glm4", "transformers"}
    assert all(row["tokens_per_s"] > 0 < row["first_token_ms"] for row in engines.values())
    assert model_result["relative_l2_of_logits"] < 0.02
    assert [line.split(":")[1] for line in model_result["skipped"]] == [
        " the model ends at 256"
    ] * 2


# The report


@pytest.fixture
def committed(tmp_path, model_result):
    """A repository's README and results, the README up to date."""
    folder = tmp_path / "results" / "cpu"
    folder.mkdir(parents=True)
    result = {"provenance": ORIGIN, "ceilings": asdict(CEILINGS), "models": [model_result]}
    result["ops"] = [result_of(doubling(peer=lambda x: x + x))]
    (folder / "cpu.json").write_text(json.dumps(result))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.START}\n{report.END}\nafter\n")
    assert report_on(tmp_path) == 0
    return tmp_path


def report_on(repository, *more: str) -> int:
    paths = [str(repository / "results"), "--readme", str(repository / "README.md")]
    return main(["report", *paths, *more])


def test_report_writes_the_tables(committed):
    text = (committed / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    for expected in (
        ORIGIN["device"],
        "| double | 1,000 values |",
        "x peer |",
        "tiny, bfloat16, random weights",
    ):
        assert expected in text
    assert report_on(committed, "--check") == 0


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
    assert "| wrong: relative L2 5.0e-01, allowed" in (committed / "README.md").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda root: (root / "README.md").write_text("no markers"), "--readme must name a file"),
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
    assert "](results/cpu/share.svg)" in (committed / "README.md").read_text()


def test_committed_readme_is_up_to_date():
    results, readme = gpu.REPOSITORY / "benchmarks/results", gpu.REPOSITORY / "README.md"
    assert main(["report", str(results), "--readme", str(readme), "--check"]) == 0


# Provenance


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
