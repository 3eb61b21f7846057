"""How one case of one op is judged: right first, then fast.

gate    every contender runs once on the same inputs; relative L2 against the fp64 oracle must
        stay within the case's tolerance. A contender that fails is reported and never timed.
time    warm up; rotate over input sets that together exceed the last-level cache (a case whose
        sets cannot is flagged `in_cache`); contenders take turns, a different one first in
        each round. CUDA is timed twice: eager calls, and a CUDA graph of the same calls.
judge   medians and p20/p80 of the turns; GB/s or TFLOP/s; share of the roofline floor
        max(bytes / bandwidth, flops / matmul) under the ceilings measured in the same run.
"""

from __future__ import annotations

import copy
import importlib
import math
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import benchmarks
from benchmarks.ceilings import Ceilings, CpuReadProbe, seconds

# A tiny op would need thousands of sets to leave the cache; decode finds it there anyway.
MAX_SETS = 64


@dataclass(frozen=True)
class Case:
    """One op at one size, with everybody who computes it.

    `bench_<op>.py` defines `cases(device: torch.device) -> Iterator[Case]`.
    """

    op: str  # "rms_norm"
    label: str  # "glm-4-9b, 1 token"
    bytes_moved: int  # the docstring's expression: the fewest bytes
    flops: int  # 0 where memory-bound beyond doubt
    inputs: Callable[[], tuple]  # one fresh set of random inputs; called several times
    contenders: dict[str, Callable[..., Any]]  # name -> f(*inputs); the first is ours
    oracle: Callable[..., Any]  # f(*inputs) in fp64; its first output is the truth
    tolerance: float  # largest relative L2 error admitted, for the dtype used


@dataclass(frozen=True)
class Effort:
    """How long a case is timed: at least `rounds` rounds, then until `seconds` are over."""

    seconds: float
    rounds: int
    turn_seconds: float  # a turn repeats the call until it lasts about this long


EFFORT = {"cpu": Effort(0.8, 5, 0.010), "cuda": Effort(0.6, 10, 0.002)}
QUICK = Effort(0.0, 1, 0.0)


def discover(only: list[str] | None = None) -> dict[str, ModuleType]:
    """The modules `benchmarks.bench_<op>` by op name; all of them, or those named."""
    names = sorted(
        module.name.removeprefix("bench_")
        for module in pkgutil.iter_modules(benchmarks.__path__)
        if module.name.startswith("bench_")
    )
    unknown = sorted(set(only or ()) - set(names))
    if unknown:
        raise ValueError(
            f"benchmarks: --only must name some of {', '.join(names)}, got {', '.join(unknown)}"
        )
    return {
        name: importlib.import_module(f"benchmarks.bench_{name}")
        for name in names
        if only is None or name in only
    }


def run_case(
    case: Case,
    device: torch.device,
    ceilings: Ceilings,
    probe: CpuReadProbe | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """Gates, times and judges one case; the result is plain data for JSON.

    Args:
        probe: samples the read bandwidth beside every turn; None takes it from `ceilings`.
        quick: one round of one call, to see that everything runs; its times mean nothing.
    """
    contenders = [gate(case, name) for name in case.contenders]
    floor = ceilings.floor_seconds(device, case.bytes_moved, case.flops)
    memory_bound = case.bytes_moved / ceilings.bandwidth(device) >= case.flops / ceilings.matmul

    n_sets = 2 if quick else math.ceil(3 * ceilings.cache_bytes / max(case.bytes_moved, 1))
    sets = [case.inputs() for _ in range(min(max(n_sets, 2), MAX_SETS))]
    effort = QUICK if quick else EFFORT[device.type]
    right = {c["name"]: case.contenders[c["name"]] for c in contenders if c["status"] == "ok"}

    eager = {name: Turn(f, sets, device, effort) for name, f in right.items()}
    modes = {"eager": take_turns(eager, device, effort, probe)}
    if device.type == "cuda":
        graphs, refused = capture_all(right, sets)
        modes["graph"] = take_turns(
            {name: Turn(graph.replay, [()], device, effort, graph_calls(sets))
             for name, graph in graphs.items()},
            device, effort, probe,
        )  # fmt: skip
        for contender in contenders:
            if contender["name"] in refused:
                contender["note"] = refused[contender["name"]]

    for contender in contenders:
        for mode, timed in modes.items():
            if contender["name"] in timed:
                contender[mode] = judge(timed[contender["name"]], case, floor, memory_bound, device)
    return {
        "op": case.op,
        "label": case.label,
        "bytes_moved": case.bytes_moved,
        "flops": case.flops,
        "bound": "memory" if memory_bound else "compute",
        "n_sets": len(sets),
        "in_cache": len(sets) * case.bytes_moved < 2 * ceilings.cache_bytes,
        "contenders": contenders,
        **against_peers(contenders),
    }


def gate(case: Case, name: str) -> dict[str, Any]:
    """Runs one contender once; `status` is ok, wrong or failed, with the reason in `note`."""
    torch.manual_seed(0)
    inputs = case.inputs()
    truth = first_output(case.oracle(*copy.deepcopy(inputs))).double()
    try:
        actual = first_output(case.contenders[name](*inputs)).double()
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        return {"name": name, "status": "failed", "note": f"{type(error).__name__}: {reason}"}
    if actual.shape != truth.shape:
        note = f"shape {list(actual.shape)}, expected {list(truth.shape)}"
        return {"name": name, "status": "wrong", "note": note}
    error_l2 = ((actual - truth).norm() / truth.norm().clamp_min(1e-300)).item()
    if not error_l2 <= case.tolerance:  # NaN is wrong too
        note = f"relative L2 {error_l2:.1e}, allowed {case.tolerance:.1e}"
        return {"name": name, "status": "wrong", "note": note}
    return {"name": name, "status": "ok", "error_l2": error_l2}


def first_output(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


class Turn:
    """One contender's turn: as many calls as fill `turn_seconds`, walking through the sets."""

    def __init__(
        self,
        call: Callable[..., Any],
        sets: list[tuple],
        device: torch.device,
        effort: Effort,
        calls_inside: int = 1,
    ) -> None:
        self.call, self.sets, self.device = call, sets, device
        self.calls_inside = calls_inside
        self.next_set = 0
        self.repeats = len(sets)
        warm = min(self.seconds() for _ in range(2)) / len(sets)
        self.repeats = max(1, math.ceil(effort.turn_seconds / max(warm, 1e-9)))

    def _run(self) -> None:
        for _ in range(self.repeats):
            self.call(*self.sets[self.next_set])
            self.next_set = (self.next_set + 1) % len(self.sets)

    def seconds(self) -> float:
        return seconds(self._run, self.device)

    def seconds_per_call(self) -> float:
        return self.seconds() / (self.repeats * self.calls_inside)


def take_turns(
    turns: dict[str, Turn], device: torch.device, effort: Effort, probe: CpuReadProbe | None
) -> dict[str, list[tuple[float, float | None]]]:
    """(seconds per call, read bandwidth beside it) of every turn, by contender."""
    samples: dict[str, list[tuple[float, float | None]]] = {name: [] for name in turns}
    order = list(turns)
    deadline = time.monotonic() + effort.seconds
    rounds = 0
    while turns and (rounds < effort.rounds or time.monotonic() < deadline):
        for name in order:
            beside = probe.sample() if probe else None
            samples[name].append((turns[name].seconds_per_call(), beside))
        order = order[1:] + order[:1]
        rounds += 1
    return samples


def graph_calls(sets: list[tuple]) -> int:
    """Calls captured in one graph: every set equally often, at least sixteen."""
    return len(sets) * math.ceil(16 / len(sets))


def capture_all(
    contenders: dict[str, Callable[..., Any]], sets: list[tuple]
) -> tuple[dict[str, torch.cuda.CUDAGraph], dict[str, str]]:
    """A graph of `graph_calls` calls for each contender, and why there is none for the others."""
    graphs, refused = {}, {}
    for name, call in contenders.items():
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for i in range(graph_calls(sets)):
                    call(*sets[i % len(sets)])
        except Exception as error:
            torch.cuda.synchronize()
            refused[name] = f"no graph: {type(error).__name__}"
        else:
            graphs[name] = graph
    return graphs, refused


def judge(
    samples: list[tuple[float, float | None]],
    case: Case,
    floor: float,
    memory_bound: bool,
    device: torch.device,
) -> dict[str, Any]:
    """Microseconds, rate and share of the floor; where a probe ran, of the floor beside it."""
    times = [took for took, _ in samples]
    middle = statistics.median(times)
    if memory_bound:
        floors = [case.bytes_moved / beside if beside else floor for _, beside in samples]
    else:
        floors = [floor] * len(times)
    return {
        "us": middle * 1e6,
        "p20_us": quantile(times, 0.2) * 1e6,
        "p80_us": quantile(times, 0.8) * 1e6,
        "gb_per_s": case.bytes_moved / middle / 1e9,
        "tflop_per_s": case.flops / middle / 1e12,
        "share": statistics.median(f / took for f, took in zip(floors, times, strict=True)),
        "turns_us": [round(took * 1e6, 4) for took in times],
    }


def quantile(values: list[float], q: float) -> float:
    """The nearest-rank quantile."""
    return sorted(values)[min(int(q * len(values)), len(values) - 1)]


def against_peers(contenders: list[dict[str, Any]]) -> dict[str, Any]:
    """Our time against the fastest right peer: in graphs where both have one, else eager."""
    ours, *peers = contenders
    for mode in ("graph", "eager"):
        timed = [peer for peer in peers if mode in peer]
        if mode in ours and timed:
            best = min(timed, key=lambda peer: peer[mode]["us"])
            return {
                "best_peer": best["name"],
                "speedup": best[mode]["us"] / ours[mode]["us"],
                "compared_in": mode,
            }
    return {"best_peer": None, "speedup": None, "compared_in": None}


def run_cases(
    modules: dict[str, ModuleType],
    device: torch.device,
    ceilings: Ceilings,
    quick: bool = False,
    done: Callable[[dict[str, Any]], None] = lambda result: None,
) -> Iterator[dict[str, Any]]:
    """Runs every case of every module, one after the other; `done` sees each result at once."""
    probe = CpuReadProbe() if device.type == "cpu" and not quick else None
    for module in modules.values():
        for case in module.cases(device):
            with torch.inference_mode():
                result = run_case(case, device, ceilings, probe, quick)
            done(result)
            yield result
