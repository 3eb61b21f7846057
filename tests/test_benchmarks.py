"""The judge is judged: wrong contenders are caught, results survive JSON, stale tables go red.

No test here asserts a time.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import uses_gpu
from recorded_graphs import RecordedGraphs

import glm4
import glm4_kernels as gk
from benchmarks import (
    bench_flash_decode,
    cpu_model,
    gpu,
    harness,
    libraries,
    model_bench,
    op_budget,
    quality,
    quantized,
    report,
    step_profile,
    summary,
)
from benchmarks.__main__ import main
from benchmarks.ceilings import (
    Ceilings,
    CpuReadProbe,
    last_level_cache,
    measure_ceilings,
    multiply_add_peak,
    read_bandwidth,
)
from benchmarks.harness import Case, discover, gate, run_case, take_turns
from benchmarks.model_bench import Plan, measure_model
from benchmarks.peers import PEERS
from benchmarks.provenance import provenance, shown_command, source_hash
from glm4 import decoder
from glm4_kernels.extension import extension

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


def test_slow_contenders_take_fewer_turns(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(harness.time, "monotonic", lambda: float(next(clock)))
    turns = {"slow": SimpleNamespace(seconds_per_call=lambda: 1.0)}

    def rounds(*effort):
        return len(take_turns(turns, harness.Effort(*effort), None)["slow"])

    assert rounds(0.0, 10, 0.0) == 10
    assert rounds(0.0, 10, 0.0, 5.0) == 4
    assert rounds(0.0, 10, 0.0, 1.0) == 3


def test_ceilings_are_measured():
    ceilings = measure_ceilings(CPU, quick=True)
    assert all(value > 0 for value in asdict(ceilings).values() if value is not None)
    assert ceilings.int8
    assert last_level_cache(CPU) >= 1 << 18


def test_loops_of_the_ceilings():
    variants = extension().cpu_ceiling_variants()
    assert variants[-1] == "portable"
    x = torch.zeros(1 << 20)
    bytes_multiplied = {"avx512_vnni": 64, "avx_vnni": 32, "avx2": 32, "portable": 16}
    for variant in variants:
        assert read_bandwidth(x, variant) > 0
        peak = multiply_add_peak(0.001, 1, variant)
        # No more than two instructions a clock at 6 GHz: sums that the compiler merges would be.
        assert 0 < peak < 2 * 6e9 * 2 * bytes_multiplied[variant], variant
    assert read_bandwidth(torch.zeros(16 * 67)[: 16 * 65]) > 0  # no multiple of what a round reads


def test_loops_of_the_ceilings_reject():
    with pytest.raises(ValueError, match="variant must be one this processor runs, got nope"):
        read_bandwidth(torch.zeros(64), "nope")
    with pytest.raises(ValueError, match="needs 64 bytes at least"):
        read_bandwidth(torch.zeros(15))


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


def test_our_own_variants_are_no_peers():
    variant = {"glm4_kernels, PDL": lambda x: 2 * x}
    ours_first = {"glm4_kernels": lambda x: 2 * x, **variant}
    result = result_of(replace(doubling(), contenders=ours_first))
    assert result["best_peer"] is None and result["compared_in"] is None
    result = result_of(replace(doubling(), contenders=ours_first | {"other": lambda x: x + x}))
    assert result["best_peer"] == "other"


def test_libraries_that_are_missing_are_skipped_with_a_line(monkeypatch, capsys):
    monkeypatch.setattr(libraries, "missing", set())
    for module in ("liger_kernel", "flashinfer"):
        monkeypatch.setitem(sys.modules, module, None)
    gpu_device = torch.device("cuda")
    assert libraries.library_peers("rms_norm", gpu_device) == {}
    assert libraries.library_peers("rms_norm", gpu_device) == {}
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["Liger", "FlashInfer"]
    assert libraries.library_peers("rms_norm", CPU) == {}


def test_libraries_get_their_arguments_in_their_order(monkeypatch):
    """Modules with the libraries' signatures, and our references behind them."""
    from glm4_kernels.add_rms_norm import add_rms_norm_reference
    from glm4_kernels.rms_norm import rms_norm_reference
    from glm4_kernels.rope import rope_reference
    from glm4_kernels.sample import sample_reference
    from glm4_kernels.sandwich_norm import sandwich_norm_reference
    from glm4_kernels.swiglu import swiglu_reference

    def fused_add_rmsnorm(input, residual, weight, eps=1e-6, enable_pdl=None):
        y, total = add_rms_norm_reference(input, residual, weight, eps)
        input.copy_(y), residual.copy_(total)

    def apply_rope(positions, query, key, head_size, cos_sin_cache, is_neox=True):
        assert not is_neox and cos_sin_cache.dtype == torch.float32
        heads = (x.unflatten(1, (-1, head_size)) for x in (query, key))
        return [x.flatten(1) for x in rope_reference(*heads, positions, cos_sin_cache)]

    def top_k_top_p(probs, top_k, top_p):
        assert top_k in (None, 2) and top_p == 0.9
        torch.testing.assert_close(probs, (certain / 0.7).softmax(-1))
        return probs.argmax(-1).int()

    functional = SimpleNamespace(
        liger_rms_norm=lambda X, W, eps, offset=0.0, casting_mode="llama", in_place=True: (
            rms_norm_reference(X, W, eps)
        ),
        liger_fused_add_rms_norm=lambda X, R, W, eps, offset=0.0, casting_mode="", in_place=True: (
            add_rms_norm_reference(X, R, W, eps)
        ),
        liger_swiglu=lambda a, b: swiglu_reference(torch.cat((a, b), -1)),
    )
    modules = {
        "liger_kernel.transformers.functional": functional,
        "flashinfer.norm": SimpleNamespace(
            rmsnorm=lambda input, weight, eps=1e-6, out=None, enable_pdl=None: rms_norm_reference(
                input, weight, eps
            ),
            fused_add_rmsnorm=fused_add_rmsnorm,
        ),
        "flashinfer.activation": SimpleNamespace(
            silu_and_mul=lambda input, out=None, enable_pdl=None: swiglu_reference(input)
        ),
        "flashinfer.rope": SimpleNamespace(apply_rope_with_cos_sin_cache=apply_rope),
        "flashinfer.sampling": SimpleNamespace(
            top_k_top_p_sampling_from_logits=lambda logits, top_k, top_p: top_k_top_p(
                logits.softmax(-1), top_k, top_p
            ),
            top_p_sampling_from_probs=lambda probs, top_p: top_k_top_p(probs, None, top_p),
        ),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name.partition(".")[0], SimpleNamespace())
        monkeypatch.setitem(sys.modules, name, module)
    x, residual = torch.randn(2, 3, 8)
    weights = torch.randn(2, 8)
    q, k, positions = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.arange(3)
    certain = torch.tensor([[0.0, 30.0, 1.0], [40.0, 0.0, 3.0]])
    drawn = certain, torch.rand(2, dtype=torch.float64), None, 0.7
    for op, reference, arguments in (
        ("rms_norm", rms_norm_reference, (x, weights[0], 1e-5)),
        ("add_rms_norm", add_rms_norm_reference, (x, residual, weights[0], 1e-5)),
        ("sandwich_norm", sandwich_norm_reference, (x, residual, *weights, 1e-5)),
        ("swiglu", swiglu_reference, (x,)),
        ("rope", rope_reference, (q, k, positions, torch.randn(5, 4))),
        ("sample", sample_reference, (*drawn, 2, 0.9, 1.0)),
        ("sample", sample_reference, (*drawn, None, 0.9, 1.0)),
    ):
        peers = libraries.library_peers(op, torch.device("cuda"))
        assert list(peers) == (
            ["FlashInfer"] if op in ("rope", "sample") else ["Liger", "FlashInfer"]
        )
        expected = harness.first_output(reference(*arguments))
        for peer in peers.values():
            actual = harness.first_output(peer(*deepcopy(arguments)))
            torch.testing.assert_close(actual, expected, check_dtype=False)


@pytest.mark.parametrize("takes_lengths", [True, False])
def test_varlen_attn_of_every_torch(monkeypatch, takes_lengths):
    """Its form with lengths, which later torches have, and without."""
    from torch.nn.attention import varlen

    seen: dict = {}

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None):
        seen.update(locals())
        return query

    def newer(query, key, value, *rest, scale=None, enable_gqa=False, seqused_k=None):
        assert enable_gqa and seqused_k.tolist() in ([128, 128], [64, 128])
        return older(query, key, value, *rest, scale=scale)

    monkeypatch.setattr(varlen, "varlen_attn", newer if takes_lengths else older)
    q, cache = torch.randn(2, 4, 64), torch.randn(2, 2, 128, 64)
    for lengths in ([128, 128], [64, 128]):
        call = bench_flash_decode.gpu_peers(lengths, 0.125)["torch varlen_attn"]
        arguments = (q, None, None, None, torch.tensor(lengths), None, None, None, cache, cache)
        if takes_lengths or min(lengths) == 128:
            assert call(*arguments) is q
            assert seen["key"].shape == (256, 2, 64) and seen["scale"] == 0.125
            assert seen["cu_seq_q"].tolist() == [0, 1, 2]
            assert seen["cu_seq_k"].tolist() == [0, 128, 256]
            assert (seen["max_q"], seen["max_k"]) == (1, 128)
        else:
            with pytest.raises(NotImplementedError, match="seqused_k"):
                call(*arguments)


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


def test_the_kernels_stages_time_every_op_once():
    timed = [op for stage in gpu.KERNELS for op in gpu.ops_of(stage)]
    assert sorted(timed) == sorted(discover())


def faulty_cases():
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
        "double (dies): its process died",
        "double (hangs): took more than 5 s",
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


# Beside the peers


@pytest.fixture
def small_stage(monkeypatch):
    """One stage, of a layer that takes no time."""
    stage = quantized.Stage(128, 256, (1, 3))
    monkeypatch.setattr(quantized, "STAGES", {"small": stage})
    monkeypatch.setattr(quantized, "rotate_bytes", lambda stage: 1 << 16)
    return stage


def test_quantized_runs_and_resumes(small_stage, tmp_path, capsys):
    file = tmp_path / "quantized.json"
    assert main(["quantized", "--quick", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    stage = result["quantized"]["small"]
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
    assert quantized.held(file, result["provenance"]) == result["quantized"]
    assert quantized.held(file, result["provenance"] | {"source_hash": "another"}) == {}

    file.write_text(json.dumps({"ops": []}))
    assert main(["quantized", "--quick", "--json", str(file)]) == 2
    assert "--json must be new" in one_line(capsys.readouterr().err)


def test_a_peer_that_dies_is_named():
    peer = quantized.PeerProcess("torch_linear", 1)
    peer.process.kill()
    with pytest.raises(quantized.PeerError, match=r"its process died \(-9\)"):
        peer.describe()
    peer.close()
    peer = quantized.PeerProcess("nope", 1)
    with pytest.raises(quantized.PeerError, match="No module named"):
        peer.describe()
    peer.close()
    assert peer.process.poll() == 0, "it leaves when its parent has gone"


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
            raise quantized.PeerError("its process died (-11)")
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


# Quality


def test_quality_and_its_tables(committed, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "WINDOW", 64)
    file = tmp_path / "quality.json"
    assert main(["quality", "--quick", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    contenders = {who["name"]: who for who in result["quality"]["contenders"]}
    assert list(contenders) == list(quality.CONTENDERS)
    assert contenders["int4"]["bits_per_weight"] == pytest.approx(4.588, abs=1e-3)
    assert contenders["int8"]["kl_nats"]["mean"] < contenders["int4"]["kl_nats"]["mean"]
    result["provenance"] = ORIGIN
    (committed / "results" / "cpu" / "quality.json").write_text(json.dumps(result))
    assert report_on(committed) == 0
    text = (committed / "results" / "README.md").read_text()
    assert "| int4 | 4.59 | " in text and "| Laplace | " in text


def test_share_and_interval():
    theirs = torch.tensor([0.01, 0.02, 0.03, 0.02], dtype=torch.float64)
    half = quality.share(theirs / 2, theirs)
    assert half["low"] <= half["mean"] <= half["high"]
    assert half["mean"] == pytest.approx(0.5, rel=0.01) and half["high"] - half["low"] < 0.01
    found = quality.plain_interval(torch.arange(10, dtype=torch.float64))
    assert found["mean"] == 4.5 and found["half"] == pytest.approx(
        2.2622 * 3.0277 / 10**0.5, rel=0.01
    )


# The whole model


@pytest.fixture(scope="module")
def model_result():
    tiny = replace(
        glm4.PRESETS["glm-4-9b-0414"],
        layers=2, hidden=128, ffn=192, heads=4, kv_heads=2, vocab=320, max_positions=256,
        eos_token_ids=(0,),
    )  # fmt: skip
    plan = Plan("tiny", None, (1, 3), (70, 512), 5, 4, (2,), 2, (9,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(glm4.PRESETS, "tiny", tiny)
        patch.setitem(decoder.GRAPHS, "cpu", RecordedGraphs)  # as on a GPU
        *_, result = measure_model(plan, CPU, CEILINGS, lambda what: None)
    return json.loads(json.dumps(result))


def test_model_result(model_result):
    assert [(row["batch"], row["context"], row["drawn"]) for row in model_result["decode"]] == [
        (1, 70, False),
        (1, 70, True),
        (3, 70, False),
        (3, 70, True),
    ]
    layer = 128 * (8 * 128) + 128 * (4 * 128) + 3 * 128 * 192 + 4 * 128  # qkv, o, MLP, norms
    layer += 8 * 128  # qkv bias
    weights = 2 * layer + 128 + 320 * 128
    cache = 2 * 2 * 2 * 128 * 70  # layers, K and V, heads, head_dim, tokens
    assert [row["bytes_moved"] for row in model_result["decode"][::2]] == [
        2 * (weights + cache),
        2 * (weights + 3 * cache),
    ]
    for row in model_result["decode"]:
        assert row["eager"]["tokens_per_s"] > 0 < row["graph"]["tokens_per_s"]
        assert len(row["graph"]["steps_ms"]) == 2
        bucket = row["batch"]
        assert list(row["warmup_s"]) == [
            f"first step of {bucket} rows",
            f"CUDA graph of {bucket} rows",
        ]
    (first,) = model_result["first_token"]
    flops = 2 * 9 * 2 * (128 * (8 * 128) + 128 * (4 * 128) + 3 * 128 * 192)
    flops += 2 * 9 * 9 * 4 * 128 * 2 + 2 * 320 * 128
    seconds = first["first_token_ms"] / 1e3
    assert first["share"] == pytest.approx(flops / CEILINGS.matmul / seconds)
    engines = {row["engine"]: row for row in model_result["generate"]}
    assert set(engines) == {"glm4", "transformers"}
    assert all(row["tokens_per_s"] > 0 < row["first_token_ms"] for row in engines.values())
    assert model_result["relative_l2_of_logits"] < 0.02
    assert [line.split(":")[1] for line in model_result["skipped"]] == [
        " the model ends at 256"
    ] * 2


def test_a_part_of_a_model_that_fails_costs_itself_alone(monkeypatch):
    monkeypatch.setitem(glm4.PRESETS, "tiny", replace(TINY, layers=1))
    plan = Plan("tiny", None, (1,), (16,), 5, 4, (1,), 1, (9, TINY.max_positions))
    monkeypatch.setattr(model_bench, "LOGITS_TOLERANCE", -1.0)
    monkeypatch.setattr(model_bench, "their_engine", lambda theirs: lambda *_: 1 / 0)
    results = []
    with pytest.raises(ValueError, match="tiny: logits beside transformers'") as raised:
        results.extend(measure_model(plan, CPU, CEILINGS, lambda what: None))
    result = json.loads(json.dumps(results[-1]))
    wrong, too_long = result["failed"]
    assert wrong.startswith("logits beside transformers': relative L2")
    assert "first token after 1024 tokens: ValueError: generate: prompts[0]" in too_long
    assert str(raised.value) == f"tiny: {wrong}; {too_long}"
    assert result["skipped"] == [
        "transformers generates 1 x 4 tokens: ZeroDivisionError: division by zero"
    ]
    assert len(result["decode"]) == 2
    assert [row["prompt"] for row in result["first_token"]] == [9]
    assert [row["engine"] for row in result["generate"]] == ["glm4"]


def test_what_the_stages_measure_fits_the_models():
    plans = [part for stage in gpu.STAGES.values() for part in getattr(stage.run, "args", ())]
    plans = [plan for plan in plans if isinstance(plan, Plan)]
    assert len(plans) == 6
    for plan in plans:
        room = glm4.PRESETS[plan.model].max_positions
        assert max(plan.contexts) <= room
        assert max(plan.first_tokens, default=0) + 1 <= room


def test_profile_of_a_step(monkeypatch, committed):
    """Ops stand in for the kernels that a GPU would run: the trace is otherwise a real one."""
    tiny = replace(
        glm4.PRESETS["glm-4-9b-0414"],
        layers=2, hidden=128, ffn=192, heads=4, kv_heads=2, vocab=320, max_positions=256,
        eos_token_ids=(0,),
    )  # fmt: skip
    monkeypatch.setitem(glm4.PRESETS, "tiny", tiny)
    monkeypatch.setattr(gpu, "measure_ceilings", lambda device: CEILINGS)
    real = step_profile.trace

    def trace(call):
        events = real(call)
        ops = [e for e in events if e.get("cat") == "cpu_op" and e["name"] in KERNELS]
        for i, e in enumerate(ops):
            args = {"correlation": i}
            events.append({"cat": "cuda_runtime", "name": "launch", "ts": e["ts"], "args": args})
            late = {"ts": e["ts"] + 1000, "dur": e["dur"], "args": args}  # the device lags behind
            events.append({"cat": "kernel", "name": e["name"], **late})
        return events

    KERNELS = {f"glm4_kernels::{op}" for op in ("sandwich_norm", "rope_kv_write", "flash_decode")}
    KERNELS |= {"aten::linear", "aten::embedding"}
    KERNELS |= {"glm4_kernels::sample", "glm4_kernels::decode_advance"}
    monkeypatch.setattr(step_profile, "trace", trace)
    *_, result = gpu.profile(Plan("tiny", batches=(1, 3), contexts=(70,)), CPU)
    result = json.loads(json.dumps(result))
    _, three = result["profiles"]
    ops = {row["op"]: row for row in three["budget"]}
    assert {op: row["kernels"] for op, row in ops.items()} == {
        "qkv": 2, "o": 2, "gate_up": 2, "down": 2, "lm_head": 1, "embedding": 1,
        "sandwich_norm": 4, "rope_kv_write": 2, "flash_decode": 2, "sample": 1, "decode_advance": 1,
    }  # fmt: skip
    assert three["us"] == pytest.approx(sum(row["us"] for row in ops.values()))
    assert {row["kernel"] for row in three["kernels"]} == KERNELS
    gate_up = 2 * 2 * (128 * 2 * 192 + 3 * (128 + 2 * 192))
    assert ops["gate_up"]["floor_us"] == pytest.approx(gate_up / CEILINGS.read * 1e6)
    assert ops["sample"]["floor_us"] == pytest.approx(3 * 320 * 2 / CEILINGS.read * 1e6)
    assert ops["decode_advance"]["floor_us"] is None

    folder = committed / "results" / "cpu"
    (folder / "profile.json").write_text(json.dumps({"provenance": ORIGIN, **result}))
    assert report_on(committed) == 0
    text = (committed / "results" / "README.md").read_text()
    assert "Where a decode step of tiny goes: batch 3, 70 tokens cached" in text
    assert "| gate_up | 1 | " in text and "| aten::linear | 9 | " in text


def test_a_step_without_a_budget_costs_itself_alone(monkeypatch, committed):
    monkeypatch.setitem(glm4.PRESETS, "tiny", replace(TINY, layers=1))
    monkeypatch.setattr(gpu, "measure_ceilings", lambda device: CEILINGS)
    one, other = ([step_profile.Kernel(name, 0.0, 1.0)] for name in "ab")
    steps = iter([(one, other), (one, one)])
    monkeypatch.setattr(gpu, "profile_step", lambda *_: next(steps))
    results = []
    with pytest.raises(ValueError, match="no budget of 1 x 70: kernel 0 is b in the replay"):
        results.extend(gpu.profile(Plan("tiny", batches=(1, 3), contexts=(70,)), CPU))
    assert ["budget" in found for found in results[-1]["profiles"]] == [False, True]

    folder = committed / "results" / "cpu"
    (folder / "profile.json").write_text(json.dumps({"provenance": ORIGIN, **results[-1]}))
    assert report_on(committed) == 0
    assert "| b | 1 | 1.0 | 100.0% |" in (committed / "results" / "README.md").read_text()


def test_budget_of_other_kernels_is_an_error():
    def kernels(*names):
        return [step_profile.Kernel(n, 10.0 * i, 7.0, f"op {n}") for i, n in enumerate(names)]

    budget = step_profile.budget_rows(kernels("a", "b", "a"), kernels("a", "b", "a"), {}, 1.0)
    assert [(row["op"], row["kernels"], row["us"], row["gap_us"]) for row in budget] == [
        ("op a", 2, 14.0, 3.0),
        ("op b", 1, 7.0, 3.0),
    ]
    with pytest.raises(ValueError, match="kernel 1 is c in the replay, b in the call"):
        step_profile.budget_rows(kernels("a", "b"), kernels("a", "c"), {}, 1.0)
    with pytest.raises(ValueError, match="1 kernels in the replay, 2 in the call"):
        step_profile.budget_rows(kernels("a", "b"), kernels("a"), {}, 1.0)


# Heats of whole models on the CPU

TINY = replace(
    glm4.PRESETS["glm-4-9b"],
    layers=40, hidden=128, ffn=192, heads=4, kv_heads=2, vocab=320, max_positions=1024,
    eos_token_ids=(0,),
)  # fmt: skip


@pytest.fixture(scope="module")
def heat_result():
    """A heat on three layers, the third of which repeats; without llama.cpp."""
    names = ("glm4 int4", "glm4 bf16", "transformers bf16", "llama.cpp Q4_0")
    heat = cpu_model.Heat("tiny", names, 3, 320, 16, 2, 0.01, model="tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(glm4.PRESETS, "tiny", TINY)
        patch.setattr(cpu_model, "missing_contenders", lambda: {names[3]: "not installed: pip …"})
        *_, result = cpu_model.measure_heat(heat, 1, lambda what: None)
    return json.loads(json.dumps(result))


def test_heat_result(heat_result):
    assert heat_result["skipped"] == ["llama.cpp Q4_0: not installed: pip …"]
    assert heat_result["layers"] == 3 and not heat_result["all_layers"]
    who = {row["name"]: row for row in heat_result["contenders"]}
    assert list(who) == ["glm4 int4", "glm4 bf16", "transformers bf16"]
    linear = 3 * (128 * (8 * 128) + 128 * (4 * 128) + 3 * 128 * 192) + 320 * 128
    vectors = 3 * (8 * 128 + 2 * 128) + 128  # biases and norms
    cache = 2 * 3 * 2 * 128 * 16  # K and V, layers, heads, head_dim, tokens
    for name in ("glm4 bf16", "transformers bf16"):
        assert who[name]["bytes_per_token"] == 2 * (linear + vectors + cache)
        assert who[name]["linear_bits"] == 16
    assert who["transformers bf16"]["relative_l2_of_logits"] < 0.02
    assert 4 < who["glm4 int4"]["linear_bits"] < 6  # scales, and a head of 8 bits
    for row in who.values():
        decode, prefill = row["decode"], row["prefill"]
        assert decode["p20"] <= decode["tokens_per_s"] <= decode["p80"]
        assert decode["share"] > 0 and prefill["tokens_per_s"] > 0
        assert len(decode["turns_ms"]) == len(decode["read_beside_gb_per_s"]) == 2
    assert 0 < who["glm4 int4"]["prefill"]["of_matmuls"] < 1
    budgets = who["glm4 int4"]["budgets"]
    for phase, layer_ops in (("decode", 3), ("prefill", 3)):
        ops = budgets[phase]["ops"]
        assert [ops[kind]["calls"] for kind in ("qkv", "o", "gate_up", "down")] == [layer_ops] * 4
        assert ops["lm_head"]["calls"] == 1
        assert 0 < budgets[phase]["rest_us"] < 1e3 * budgets[phase]["ms"]


def test_an_op_within_another_counts_once(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(op_budget.time, "perf_counter", lambda: next(clock))
    model = SimpleNamespace(lm_head=None, blocks=[])
    monkeypatch.setattr(op_budget.gk, "swiglu", lambda: None)
    monkeypatch.setattr(op_budget.gk, "rms_norm", lambda: (gk.swiglu(), gk.swiglu()))
    with op_budget.timed_ops(model) as times:
        gk.rms_norm()
        gk.swiglu()
    assert times == {"swiglu": [1, 1, 1], "rms_norm": [3]}


def test_heat_takes_the_layers_that_fit():
    heat = cpu_model.Heat("h", ("glm4 bf16", "glm4 int8"), 40)
    layer = 4096 * (36 * 128) + 4096 * 4096 + 3 * 4096 * 13696
    two_gib = 2 << 30
    few, more = (cpu_model.fitted(heat, free).layers for free in (12 << 30, (12 << 30) + two_gib))
    assert 0 < few < more < 40
    assert more - few == pytest.approx(0.85 * two_gib / (3.02 * layer), abs=1)
    assert cpu_model.fitted(heat, 1 << 40).layers == 40
    with pytest.raises(MemoryError, match="h: one layer of each contender takes"):
        cpu_model.fitted(heat, 1 << 30)


def test_a_contender_that_is_wrong_or_dies_is_named(monkeypatch):
    monkeypatch.setitem(glm4.PRESETS, "tiny", TINY)
    monkeypatch.setattr(cpu_model, "TOLERANCE", {"bf16": 0.0, "int4": 1e-6})
    heat = cpu_model.Heat("tiny", ("glm4 bf16", "glm4 int4"), 1, 320, 4, 1, 0.0, model="tiny")
    with pytest.raises(ValueError, match="glm4 int4: logits are off by relative L2"):
        list(cpu_model.measure_heat(heat, 1, lambda what: None))
    with pytest.raises(ChildProcessError, match=r"_exit: its process died \(7\)"):
        cpu_model.in_process(os._exit, (7,))


def test_heats_are_named_on_the_command_line(capsys):
    assert main(["cpu-model", "--heat", "nope"]) == 2
    assert "got ['nope']" in one_line(capsys.readouterr().err)


# The report


@pytest.fixture
def committed(tmp_path, model_result, heat_result):
    """A repository's README and results, the README up to date."""
    folder = tmp_path / "results" / "cpu"
    folder.mkdir(parents=True)
    result = {"provenance": ORIGIN, "ceilings": asdict(CEILINGS), "models": [model_result]}
    result["heats"] = [heat_result]
    result["ops"] = [result_of(doubling(peer=lambda x: x + x))]
    (folder / "cpu.json").write_text(json.dumps(result))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks:start -->\n<!-- benchmarks:end -->\nafter\n")
    assert report_on(tmp_path) == 0
    return tmp_path


def report_on(repository, *more: str) -> int:
    paths = [str(repository / "results"), "--readme", str(repository / "README.md")]
    return main(["report", *paths, *more])


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


def test_readme_has_ours_beside_the_best_peer_of_the_same_bits(committed, heat_result):
    ours, slow, fast = ({"linear_bits": 4.6, "decode": {}, "prefill": {}} for _ in range(3))
    for who, name, decode in ((ours, "glm4 int4", 30.0), (slow, "a", 10.0), (fast, "b", 20.0)):
        who |= {"name": name, "decode": {"tokens_per_s": decode}}
        who["prefill"] = {"tokens_per_s": 900 / decode}
    alone = ours | {"name": "glm4 int8", "linear_bits": 8.0}
    heat = {"model": "m", "layers": 2, "all_layers": False, "contenders": [ours, alone, slow, fast]}
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


def test_first_calls_are_told():
    row = {"first_token_ms": 12.3}
    assert report.first_token(row) == "12 ms"
    assert report.first_token(row | {"warmup_s": 0.01}) == "12 ms"
    assert report.first_token(row | {"warmup_s": 81.26}) == "12 ms (first call +81.3 s)"


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
    assert (
        "| wrong: relative L2 5.0e-01, allowed" in (committed / "results" / "README.md").read_text()
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda root: (root / "README.md").write_text("no markers"),
            "README.md must hold",
        ),
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
