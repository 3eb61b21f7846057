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
import functools
import importlib
import math
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import benchmarks
from benchmarks.ceilings import Ceilings, CpuReadProbe, seconds
from benchmarks.worker import one_line

OURS = "glm4_kernels"
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
    integer: bool = False  # its products may run on the CPU's 8-bit dot products


def torch_peers(
    function: Callable[..., Any], device: torch.device
) -> dict[str, Callable[..., Any]]:
    """What PyTorch makes of plain code: as it is, and on CUDA compiled for each shape."""
    if device.type != "cuda":
        return {"torch eager": function}
    compiled = torch.compile(function, dynamic=False, fullgraph=True)
    return {"torch eager": function, "torch.compile": compiled}


def dependent_launch(
    launch: Callable[..., Any], device: torch.device
) -> dict[str, Callable[..., Any]]:
    """Our kernel once more, with programmatic dependent launch, where a GPU has it."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {}
    return {f"{OURS}, PDL": functools.partial(launch, pdl=True)}


@dataclass(frozen=True)
class Effort:
    """How long a case is timed: at least `rounds` rounds, then until `seconds` are over; where
    calls are slow, three rounds, then until `most_seconds` are over."""

    seconds: float
    rounds: int
    turn_seconds: float  # a turn repeats the call until it lasts about this long
    most_seconds: float = math.inf


EFFORT = {"cpu": Effort(0.8, 5, 0.010), "cuda": Effort(0.3, 10, 0.002, 3.0)}
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
            f"--only must name some of {', '.join([*names, 'model'])}, got {', '.join(unknown)}"
        )
    return {
        name: importlib.import_module(f"benchmarks.bench_{name}")
        for name in names
        if only is None or name in only
    }


@torch.inference_mode()
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
    if device.type == "cuda":
        torch.compiler.reset()  # torch.compile limits the shapes of a function, not of a case
    verdicts = gate(case)
    right = {v["name"]: case.contenders[v["name"]] for v in verdicts if v["status"] == "ok"}
    effort = QUICK if quick else EFFORT[device.type]
    n_sets = 2 if quick else math.ceil(3 * ceilings.cache_bytes / case.bytes_moved)
    sets = [case.inputs() for _ in range(min(max(n_sets, 2), MAX_SETS))]

    eager = {name: Turn(call, sets, device, effort) for name, call in right.items()}
    modes = {"eager": take_turns(eager, effort, probe)}
    if device.type == "cuda":
        captured, refused = capture_all(right, eager, sets, device, effort)
        modes["graph"] = take_turns(captured, effort, probe)
        for verdict in verdicts:
            if verdict["name"] in refused:
                verdict["note"] = refused[verdict["name"]]

    for verdict in verdicts:
        for mode, samples in modes.items():
            if verdict["name"] in samples:
                verdict[mode] = judge(samples[verdict["name"]], case, ceilings, device)
    return {
        "op": case.op,
        "label": case.label,
        "bytes_moved": case.bytes_moved,
        "flops": case.flops,
        "bound": "memory" if memory_bound(case, ceilings, device) else "compute",
        "n_sets": len(sets),
        "in_cache": len(sets) * case.bytes_moved < 2 * ceilings.cache_bytes,
        "contenders": verdicts,
        **against_peers(verdicts),
    }


@torch.inference_mode()
def gate(case: Case) -> list[dict[str, Any]]:
    """Runs each contender once on copies of the same inputs; `status` is ok, wrong or failed.

    All outputs stay alive until the end: no contender can pass by returning memory, unwritten,
    in which another left the right answer.
    """
    torch.manual_seed(0)
    inputs = case.inputs()
    outputs = [first_output(case.oracle(*copy.deepcopy(inputs))).double()]
    truth = outputs[0]
    verdicts = []
    for name, call in case.contenders.items():
        try:
            outputs.append(first_output(call(*copy.deepcopy(inputs))))
            actual = outputs[-1].to(truth)
        except Exception as error:
            if is_lost():
                raise RuntimeError(f"{name}: {one_line(error)}") from error
            verdicts.append({"name": name, "status": "failed", "note": one_line(error)})
            continue
        if actual.shape != truth.shape:
            note = f"shape {list(actual.shape)}, expected {list(truth.shape)}"
            verdicts.append({"name": name, "status": "wrong", "note": note})
            continue
        l2 = ((actual - truth).norm() / truth.norm()).item()
        if l2 <= case.tolerance:
            verdicts.append({"name": name, "status": "ok", "relative_l2": l2})
        else:  # NaN is wrong too
            note = f"relative L2 {l2:.1e}, allowed {case.tolerance:.1e}"
            verdicts.append({"name": name, "status": "wrong", "note": note})
    return verdicts


def is_lost() -> bool:
    """Whether a kernel has failed on the GPU, after which this process can do nothing there."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def first_output(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


class Turn:
    """One contender's turn: as many calls as fill `turn_seconds`, walking on through the sets."""

    def __init__(
        self,
        call: Callable[..., Any],
        sets: list[tuple],
        device: torch.device,
        effort: Effort,
        calls_inside: int = 1,
    ) -> None:
        self.call, self.sets, self.device, self.calls_inside = call, sets, device, calls_inside
        self.next_set = 0
        self.repeats = 1
        self.run()  # compiles, loads
        once = min(seconds(self.run, device) for _ in range(2))
        self.repeats = max(1, math.ceil(effort.turn_seconds / max(once, 1e-7)))

    def run(self) -> None:
        for _ in range(self.repeats):
            self.call(*self.sets[self.next_set])
            self.next_set = (self.next_set + 1) % len(self.sets)

    def seconds_per_call(self) -> float:
        return seconds(self.run, self.device) / (self.repeats * self.calls_inside)


# One turn's seconds per call, and the read bandwidth sampled beside it (CPU).
Sample = tuple[float, float | None]


def take_turns(
    turns: dict[str, Turn], effort: Effort, probe: CpuReadProbe | None
) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {name: [] for name in turns}
    order = list(turns)
    began = time.monotonic()
    rounds = 0
    while turns:
        took = time.monotonic() - began
        if (
            rounds >= (effort.rounds if took < effort.most_seconds else 3)
            and took >= effort.seconds
        ):
            break
        for name in order:
            beside = probe.sample() if probe else None
            samples[name].append((turns[name].seconds_per_call(), beside))
        order = order[1:] + order[:1]
        rounds += 1
    return samples


def capture_all(
    contenders: dict[str, Callable[..., Any]],
    eager: dict[str, Turn],
    sets: list[tuple],
    device: torch.device,
    effort: Effort,
) -> tuple[dict[str, Turn], dict[str, str]]:
    """Turns that replay a CUDA graph of every set equally often: sixteen calls or more, or, of slow
    ones, as many as fill a turn; and, for contenders that cannot be captured, why not."""
    captured, refused = {}, {}
    for name, call in contenders.items():
        calls = len(sets) * math.ceil(min(16, eager[name].repeats) / len(sets))

        def all_calls(call: Callable[..., Any] = call, calls: int = calls) -> None:
            for i in range(calls):
                call(*sets[i % len(sets)])

        graph = capture(all_calls)
        if isinstance(graph, str):
            refused[name] = graph
        else:
            captured[name] = Turn(graph.replay, [()], device, effort, calls)
    return captured, refused


def capture(call: Callable[[], Any]) -> torch.cuda.CUDAGraph | str:
    """A CUDA graph of a call that has run before, or why there cannot be one.

    A dry run looks for synchronising calls first: a capture that fails half-way leaves torch's
    random numbers and allocator unusable.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        torch.cuda.set_sync_debug_mode("error")
        call()
        torch.cuda.set_sync_debug_mode("default")
        with torch.cuda.graph(graph):
            call()
    except Exception as error:
        return f"no graph: {one_line(error)}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return graph


def memory_bound(case: Case, ceilings: Ceilings, device: torch.device) -> bool:
    return case.bytes_moved / ceilings.bandwidth(device) >= case.flops / peak(case, ceilings)


def peak(case: Case, ceilings: Ceilings) -> float:
    """Operations per second that `case` could reach."""
    return ceilings.int8 if case.integer and ceilings.int8 else ceilings.matmul


def judge(
    samples: list[Sample], case: Case, ceilings: Ceilings, device: torch.device
) -> dict[str, Any]:
    """Microseconds, rates and the share of the floor: max(bytes / bandwidth, flops / matmul), the
    bandwidth being the one sampled beside the turn where there is one."""
    times = [took for took, _ in samples]
    operations = case.flops / peak(case, ceilings)
    floors = [
        max(case.bytes_moved / (beside or ceilings.bandwidth(device)), operations)
        for _, beside in samples
    ]
    middle = statistics.median(times)
    return {
        "us": middle * 1e6,
        "p20_us": quantile(times, 0.2) * 1e6,
        "p80_us": quantile(times, 0.8) * 1e6,
        "gb_per_s": case.bytes_moved / middle / 1e9,
        "tflop_per_s": case.flops / middle / 1e12,
        "share": statistics.median(f / took for f, took in zip(floors, times, strict=True)),
        "turns_us": [round(took * 1e6, 3) for took in times],
        "read_beside_gb_per_s": [round(beside / 1e9, 1) for _, beside in samples if beside],
    }


def quantile(values: list[float], q: float) -> float:
    """The nearest-rank quantile."""
    return sorted(values)[min(int(q * len(values)), len(values) - 1)]


def against_peers(contenders: list[dict[str, Any]]) -> dict[str, Any]:
    """Our time against the fastest right peer: in graphs where both have one, else eager."""
    ours, *others = contenders
    peers = [other for other in others if not other["name"].startswith(f"{OURS}, ")]
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
    cases: Iterable[Case], device: torch.device, ceilings: Ceilings, quick: bool = False
) -> Iterator[dict[str, Any]]:
    """The results of the cases, one after the other."""
    probe = CpuReadProbe() if device.type == "cpu" and not quick else None
    for case in cases:
        yield run_case(case, device, ceilings, probe, quick)
