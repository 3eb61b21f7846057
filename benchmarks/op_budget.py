"""Where a pass of the model goes, op by op.

On the CPU ops run to their end before they return, so the clock is exact; what is left of the pass
is Python between them. A timer costs some 0.2 us a call. On a GPU benchmarks/step_profile.py finds
the kernels of each op in a trace.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch.nn.functional as F

import glm4_kernels as gk
from glm4 import generation, model

Times = dict[str, list[float]]


# What makes a call that stands for `function` and is known by `name(arguments)`.
Watch = Callable[[Callable[[tuple], str], Callable[..., Any]], Callable[..., Any]]


@contextmanager
def watched_ops(glm: model.Model, watch: Watch) -> Iterator[None]:
    """Inside the block every call of our ops, of torch's linear (known by its weight's name), and
    of prefill attention goes through what `watch` made of it."""
    names = {id(glm.lm_head): "lm_head"}
    for block in glm.blocks:
        for part, kinds in ((block.attention, ("qkv", "o")), (block.mlp, ("gate_up", "down"))):
            names |= {id(getattr(part, kind)): kind for kind in kinds}

    def namer(op: str) -> Callable[[tuple], str]:
        return lambda args: next((names[id(arg)] for arg in args if id(arg) in names), op)

    ops = [(gk, op) for op in gk.__all__ if callable(getattr(gk, op))]
    ops += [(F, "linear"), (F, "embedding"), (model, "prefill_attention")]
    ops += [(generation._Engine, "take")]
    with ExitStack() as patches:
        for owner, op in ops:
            function = getattr(owner, op)
            if not isinstance(function, type):
                patches.enter_context(mock.patch.object(owner, op, watch(namer(op), function)))
        yield


@contextmanager
def timed_ops(glm: model.Model) -> Iterator[Times]:
    """Seconds of every call inside the block, less those of watched calls within it."""
    times: Times = {}
    within = 0.0  # of the calls that ended inside the one under way

    def timed(name: Callable[[tuple], str], function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal within
            before, within = within, 0.0
            began = time.perf_counter()
            result = function(*args, **kwargs)
            took = time.perf_counter() - began
            times.setdefault(name(args), []).append(took - within)
            within = before + took
            return result

        return call

    with watched_ops(glm, timed):
        yield times


def budget(glm: model.Model, run: Callable[[], object], repeats: int) -> dict[str, Any]:
    """Medians over `repeats` passes: of each op {calls a pass, us a call, share}, and the rest."""
    run()
    passes, rest = [], []
    with timed_ops(glm) as times:
        for _ in range(repeats):
            before = sum(map(sum, times.values()))
            began = time.perf_counter()
            run()
            passes.append(time.perf_counter() - began)
            rest.append(passes[-1] - (sum(map(sum, times.values())) - before))
    whole = statistics.median(passes)
    ops = {
        name: {
            "calls": len(calls) / repeats,
            "us": statistics.median(calls) * 1e6,
            "share": statistics.median(calls) * len(calls) / repeats / whole,
        }
        for name, calls in sorted(times.items(), key=lambda item: -sum(item[1]))
    }
    return {"ms": whole * 1e3, "ops": ops, "rest_us": statistics.median(rest) * 1e6}
