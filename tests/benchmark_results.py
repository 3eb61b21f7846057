"""What the tests of the benchmarks share: a case, results of tiny models, a repository of them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache

import pytest
import torch
from recorded_graphs import RecordedGraphs

import glm4
from benchmarks import cpu_model
from benchmarks.__main__ import main
from benchmarks.ceilings import Ceilings
from benchmarks.harness import Case, run_case
from benchmarks.model_bench import Plan, measure_model
from benchmarks.provenance import provenance
from glm4 import decoder

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


TINY = replace(
    glm4.PRESETS["glm-4-9b"],
    layers=40, hidden=128, ffn=192, heads=4, kv_heads=2, vocab=320, max_positions=1024,
    eos_token_ids=(0,),
)  # fmt: skip


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text


@cache
def made_model_result() -> str:
    """Of a model of two layers, its graphs recorded as on a GPU."""
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
    return json.dumps(result)


@cache
def made_heat_result() -> str:
    """A heat on three layers, the third of which repeats; without llama.cpp."""
    names = ("glm4 int4", "glm4 bf16", "transformers bf16", "llama.cpp Q4_0")
    heat = cpu_model.Heat("tiny", names, 3, 320, 16, 2, 0.01, model="tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(glm4.PRESETS, "tiny", TINY)
        patch.setattr(cpu_model, "missing_contenders", lambda: {names[3]: "not installed: pip …"})
        *_, result = cpu_model.measure_heat(heat, 1, lambda what: None)
    return json.dumps(result)


def model_result_of() -> dict:
    return json.loads(made_model_result())


def heat_result_of() -> dict:
    return json.loads(made_heat_result())


def committed_results(tmp_path):
    """A repository's README and results, the README up to date."""
    folder = tmp_path / "results" / "cpu"
    folder.mkdir(parents=True)
    result = {"provenance": ORIGIN, "ceilings": asdict(CEILINGS), "models": [model_result_of()]}
    result["heats"] = [heat_result_of()]
    result["ops"] = [result_of(doubling(peer=lambda x: x + x))]
    (folder / "cpu.json").write_text(json.dumps(result))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks:start -->\n<!-- benchmarks:end -->\nafter\n")
    assert report_on(tmp_path) == 0
    return tmp_path


def report_on(repository, *more: str) -> int:
    paths = [str(repository / "results"), "--readme", str(repository / "README.md")]
    return main(["report", *paths, *more])
