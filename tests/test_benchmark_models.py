"""Whole models: decode steps, profiles, heats."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from benchmark_results import (
    CEILINGS,
    CPU,
    ORIGIN,
    TINY,
    heat_result_of,
    model_result_of,
    one_line,
    report_on,
)

import glm4
import glm4_kernels as gk
from benchmarks import (
    cpu_contenders,
    cpu_model,
    gpu,
    model_bench,
    op_budget,
    step_profile,
    tables,
)
from benchmarks.__main__ import main
from benchmarks.model_bench import Plan, measure_model

pytestmark = pytest.mark.usefixtures("small_caches")


def test_model_result():
    model_result = model_result_of()
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


def test_heat_result():
    heat_result = heat_result_of()
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
    assert more - few == pytest.approx(two_gib / (3.02 * layer), abs=1)
    assert cpu_model.fitted(heat, 1 << 40).layers == 40
    with pytest.raises(MemoryError, match="h: one layer of each contender takes"):
        cpu_model.fitted(heat, 1 << 30)


class Falling(cpu_model.Contender):
    """Transformers' process hangs in its first decode turn, int8's dies in its first prefill."""

    def answer(self, command, *arguments):
        if isinstance(self.engine, cpu_contenders.Transformers) and command == "decode":
            time.sleep(600)
        if command == "prefill" and self.engine.facts["linear_bits"] == pytest.approx(8, abs=1):
            os._exit(7)
        return super().answer(command, *arguments)


def test_a_contender_that_is_wrong_dies_or_hangs_costs_itself_alone(monkeypatch, capsys):
    monkeypatch.setitem(glm4.PRESETS, "tiny", TINY)
    monkeypatch.setattr(cpu_model, "Contender", Falling)
    monkeypatch.setattr(cpu_model, "TOLERANCE", {"bf16": 1.0, "int8": 1.0, "int4": 1e-6})
    monkeypatch.setattr(cpu_model, "ANSWER_SECONDS", 20.0)
    names = ("glm4 bf16", "glm4 int4", "glm4 int8", "transformers bf16")
    heat = cpu_model.Heat("tiny", names, 1, 320, 4, 1, 0.0, model="tiny")
    monkeypatch.setattr(cpu_model, "HEATS", (heat,))
    assert main(["cpu-model"]) == 1
    told = capsys.readouterr()
    assert "glm4 bf16" in told.out
    int4, int8, transformers = told.err.splitlines()
    assert int4.startswith("benchmarks: tiny: glm4 int4: logits are off by relative L2")
    assert int8 == "benchmarks: tiny: glm4 int8: its process ended with status 7"
    assert transformers.startswith("benchmarks: tiny: transformers bf16: no answer in 20 s")


def test_llama_cpp_that_dies_costs_itself_alone(monkeypatch):
    """In the process that writes its files, where it quantises."""
    monkeypatch.setitem(glm4.PRESETS, "tiny", TINY)
    monkeypatch.setattr(cpu_model, "missing_contenders", dict)
    monkeypatch.setattr(cpu_model, "GgufWriter", Killed)
    heat = cpu_model.Heat("tiny", ("glm4 bf16", "llama.cpp Q4_0"), 1, 320, 4, 1, 0.0, model="tiny")
    *_, result = cpu_model.measure_heat(heat, 1, lambda what: None)
    ours, theirs = result["contenders"]
    assert ours["decode"]["tokens_per_s"] > 0 and "note" not in ours
    assert theirs == {
        "name": "llama.cpp Q4_0",
        "note": "writing its file: its process died of SIGSEGV",
    }
    assert any(row[0] == "llama.cpp Q4_0" for row in tables.heat_rows(result))


class Killed:
    def __init__(self, *arguments):
        os.kill(os.getpid(), signal.SIGSEGV)


def test_heats_are_named_on_the_command_line(capsys):
    assert main(["cpu-model", "--heat", "nope"]) == 2
    assert "got ['nope']" in one_line(capsys.readouterr().err)
