"""Threads of a model on a quiet machine and beside a busy process: one, all, and the default.

    quiet      nothing else runs: the default should reach what all threads do
    crowded    a process of ours spins, on whichever processor the system gives it: the default
               should reach 0.8 of what one thread does

A turn is one generation of greedy tokens after a short prompt, timed without its prefill; the
contenders take turns, a different one first in each round, and the default keeps what it learnt
from its turn before. "others" is how many processors all other
processes used in a turn: 0 where it is quiet and 1 beside the one that spins, else it is no
measurement.
"""

from __future__ import annotations

import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

import glm4
import glm4_kernels as gk
from benchmarks.peers.serve import busy_seconds
from glm4.generation import stream
from glm4.model import Model, Weight
from glm4.threads import Team, default_threads

AT_LEAST_OF_ONE = 0.8  # of one thread's speed, in a crowd


@dataclass(frozen=True)
class Plan:
    """A model and how long it is timed."""

    model: str  # "demo", or a preset whose first `layers` layers run in int4
    layers: int = 0
    rounds: int = 7
    turn_seconds: float = 2.0


PLANS = (Plan("demo"), Plan("glm-4-9b-0414", layers=4))
QUICK_PLANS = (Plan("demo", rounds=1, turn_seconds=0.2),)


def measure(plan: Plan, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yields the plan's result after every round."""
    say(f"{plan.model}: making it")
    model = made(plan)
    teams = {"1 thread": Team(1)}
    if default_threads() > 1:
        teams[f"{default_threads()} threads"] = Team(default_threads())
    teams["default"] = Team()
    result: dict[str, Any] = {"model": plan.model, "layers": model.config.layers}
    for condition, neighbours in (("quiet", 0), ("crowded", 1)):
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in teams}
        order = list(teams)
        with busy(neighbours):
            for done in range(plan.rounds):
                say(f"{plan.model}, {condition}: round {done + 1} of {plan.rounds}")
                for name in order:
                    model.team = teams[name]
                    turns[name].append(turn(model, plan.turn_seconds))
                order = order[1:] + order[:1]
                result[condition] = [judged(name, taken) for name, taken in turns.items()]
                yield result
    yield result | ratios(result)


def made(plan: Plan) -> Model:
    """Each kind of matrix is quantised once and copied for the other layers: random anyway."""
    if plan.model == "demo":
        return glm4.load("demo", device="cpu", progress=False)
    preset = glm4.PRESETS[plan.model]
    config = replace(preset, layers=plan.layers, vocab=32000, eos_token_ids=())
    first: dict[str, gk.QuantizedWeight] = {}

    def prepare(name: str, weight: torch.Tensor) -> Weight:
        kind = name.split(".")[-1]
        if kind not in ("qkv", "o", "gate_up", "down", "lm_head"):
            return weight
        if kind not in first:
            first[kind] = gk.quantize(weight, bits=4, group_size=128)
            return first[kind]
        return copy.deepcopy(first[kind])

    return Model.random(config, prepare=prepare)


@contextmanager
def busy(n_processes: int) -> Iterator[None]:
    """Beside so many processes that never sleep."""
    spin = [sys.executable, "-c", "while True: pass"]
    children = []
    try:
        for _ in range(n_processes):
            children.append(subprocess.Popen(spin))
        time.sleep(1.0 if children else 0.0)  # until they spin
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def turn(model: Model, seconds: float) -> dict[str, float]:
    room = model.config.max_positions - 8
    tokens = stream(model, [[1, 2, 3, 4]], min(room, 4096), stop_token_ids=[])
    next(tokens)
    busy_before, own_before = busy_seconds(), time.process_time()
    began = time.perf_counter()
    count = 0
    while (took := time.perf_counter() - began) < seconds or count == 0:
        if next(tokens, None) is None:
            break
        count += 1
    tokens.close()
    own = time.process_time() - own_before
    others = max(0.0, (busy_seconds() - busy_before - own) / took)
    return {"tokens_per_s": count / took, "cpu_s_per_token": own / count, "others": others}


def judged(name: str, turns: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the turns, and the turns."""
    medians = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    return {"name": name, **medians, "turns": [round(t["tokens_per_s"], 2) for t in turns]}


def ratios(result: dict[str, Any]) -> dict[str, Any]:
    """The default against all threads where it is quiet, and against one in a crowd."""
    quiet, crowded = (
        {entry["name"]: entry["tokens_per_s"] for entry in result[condition]}
        for condition in ("quiet", "crowded")
    )
    *_, most, _ = quiet
    return {
        "quiet_default_of_all": quiet["default"] / quiet[most],
        "crowded_default_of_one": crowded["default"] / crowded["1 thread"],
        "crowded_wanted": AT_LEAST_OF_ONE,
    }
