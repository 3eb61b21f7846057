"""The judge of ops is judged: wrong contenders are caught. No test here asserts a time."""

from __future__ import annotations

import re
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from benchmark_results import CEILINGS, CPU, doubling, one_line, result_of

from benchmarks import (
    bench_flash_decode,
    harness,
    libraries,
)
from benchmarks.__main__ import main
from benchmarks.ceilings import (
    CpuReadProbe,
    last_level_cache,
    measure_ceilings,
    multiply_add_peak,
    read_bandwidth,
)
from benchmarks.harness import discover, gate, run_case, take_turns
from glm4_kernels.extension import extension

pytestmark = pytest.mark.usefixtures("small_caches")


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
