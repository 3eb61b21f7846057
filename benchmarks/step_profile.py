"""Where a captured decode step goes on a GPU: every kernel, and a budget of each op in a layer.

The step is called once and replayed once under the profiler. A called step's kernels are launched
inside their ops, which the trace says; a replay launches the same kernels in the same order, so the
i-th kernel of the one belongs to the op of the i-th of the other. Of an op:

    floor    the bytes it must move over the bandwidth measured in the same run
    kernels  its kernels' own time in the replay
    gaps     time before each of them in which no kernel ran: what launching costs in a graph
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

import glm4
from benchmarks.op_budget import watched_ops
from glm4.decoder import Decoder

MARK = "op: "
REST = "rest"  # what no op launched
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Kernel:
    name: str
    start: float  # us
    us: float
    op: str = REST


def profile_step(decoder: Decoder, bucket: int) -> tuple[list[Kernel], list[Kernel]]:
    """The kernels of a step that is called, by op, and of one that is replayed."""
    with marked_ops(decoder.model):
        called = kernels_of(trace(lambda: decoder.run(bucket)))
    return called, kernels_of(trace(lambda: decoder.launch(bucket)))


def marked_ops(model: glm4.Model) -> Any:
    """Inside the block ops appear in traces under their names."""

    def marked(name: Callable[[tuple], str], function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(MARK + name(args)):
                return function(*args, **kwargs)

        return call

    return watched_ops(model, marked)


def trace(call: Callable[[], object]) -> list[dict[str, Any]]:
    """The events of one call, as in Chrome's trace format."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        if cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return json.loads(file.read_text())["traceEvents"]


def kernels_of(events: list[dict[str, Any]]) -> list[Kernel]:
    """What ran on the device, in order; of each the op inside which the host launched it."""
    marks, launches = [], {}
    for event in events:
        kind, name = event.get("cat", ""), event.get("name", "")
        if kind == "user_annotation" and name.startswith(MARK):
            marks.append((event["ts"], event["ts"] + event["dur"], name.removeprefix(MARK)))
        elif kind in ("cuda_runtime", "cuda_driver"):
            launches[event["args"].get("correlation")] = event["ts"]
    marks.sort()
    starts = [mark[0] for mark in marks]

    def op_of(event: dict[str, Any]) -> str:
        when = launches.get(event["args"].get("correlation"))
        if when is None:
            return REST
        at = bisect_right(starts, when) - 1
        return marks[at][2] if at >= 0 and when <= marks[at][1] else REST

    ran = [event for event in events if event.get("cat") in ON_DEVICE]
    ran.sort(key=lambda event: event["ts"])
    return [Kernel(e["name"][:160], e["ts"], e["dur"], op_of(e)) for e in ran]


def kernel_rows(kernels: list[Kernel]) -> list[dict[str, Any]]:
    """Calls and time of each kernel, the longest first."""
    times: dict[str, list[float]] = {}
    for kernel in kernels:
        times.setdefault(kernel.name, []).append(kernel.us)
    rows = [{"kernel": name, "calls": len(us), "us": sum(us)} for name, us in times.items()]
    return sorted(rows, key=lambda row: -row["us"])


def budget_rows(
    called: list[Kernel], replayed: list[Kernel], op_bytes: dict[str, int], bandwidth: float
) -> list[dict[str, Any]]:
    """Of each op over the whole step: kernels, us in them, us of gaps before them, us of its floor
    (None where its bytes are not known).

    Raises:
        ValueError: the replay ran other kernels than the call.
    """
    for i, (mine, theirs) in enumerate(zip(called, replayed, strict=False)):
        if mine.name != theirs.name:
            raise ValueError(f"kernel {i} is {theirs.name} in the replay, {mine.name} in the call")
    if len(called) != len(replayed):
        raise ValueError(f"{len(replayed)} kernels in the replay, {len(called)} in the call")
    rows: dict[str, dict[str, Any]] = {}
    end = replayed[0].start if replayed else 0.0
    for mine, theirs in zip(called, replayed, strict=True):
        row = rows.setdefault(mine.op, {"op": mine.op, "kernels": 0, "us": 0.0, "gap_us": 0.0})
        row["kernels"] += 1
        row["us"] += theirs.us
        row["gap_us"] += max(theirs.start - end, 0.0)
        end = max(end, theirs.start + theirs.us)
    for op, row in rows.items():
        row["floor_us"] = op_bytes[op] / bandwidth * 1e6 if op in op_bytes else None
    return sorted(rows.values(), key=lambda row: -row["us"] - row["gap_us"])


def step_op_bytes(model: glm4.Model, batch: int, context: int) -> dict[str, int]:
    """Bytes that each op of a decode step must move, all layers together."""
    config, item = model.config, model.dtype.itemsize
    layers, hidden = config.layers, config.hidden
    q, kv = config.heads * config.head_dim, 2 * config.kv_heads * config.head_dim
    weights = {
        "qkv": (hidden, q + kv), "o": (q, hidden),
        "gate_up": (hidden, 2 * config.ffn), "down": (config.ffn, hidden),
    }  # fmt: skip
    found = {name: layers * item * (k * n + batch * (k + n)) for name, (k, n) in weights.items()}
    norms = {"sandwich_norm": 2 * layers} if config.sandwich else {"add_rms_norm": 2 * layers}
    n_weights = 2 if config.sandwich else 1
    found |= {
        name: calls * hidden * item * (4 * batch + n_weights) for name, calls in norms.items()
    }
    return found | {
        "lm_head": item * (hidden * config.vocab + batch * (hidden + config.vocab)),
        "embedding": 2 * batch * hidden * item,
        "rms_norm": hidden * item * (2 * batch + 1),
        "swiglu": layers * batch * 3 * config.ffn * item,
        "rope_kv_write": layers * batch * 2 * (q + kv) * item,
        "flash_decode": layers * batch * (context * kv + 2 * q) * item,
        "sample": batch * config.vocab * item,
    }
