"""Whole models on the CPU, side by side: ours in 4, 8 and 16 bits, transformers, llama.cpp.

    heat        a model of GLM-4-9B's layer sizes, and the contenders that run it on the same random
                weights, each in a process of its own, all in memory at once, taking turns
    prefill     time from a prompt to its first token
    decode      the tokens after it, one by one: greedy, batch 1, over the prompt's cache
    roofline    bytes of every weight but the embedding, and of K and V, over the read bandwidth
                sampled before and after the turn
    matmuls     the time our linear layers alone take for as many rows as the prompt has

Layers beyond `DISTINCT` repeat those before, in memory of their own: the bytes a step must read
are those of the whole model, and making weights does not take longer than measuring. A heat holds
as many layers as fit in the memory that is free. "Ours" is what `Model.generate` runs, Python
included. A contender that dies, hangs or is wrong costs itself alone: its row says how.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import glm4
from benchmarks.ceilings import CpuReadProbe
from benchmarks.cpu_contenders import DISTINCT, Contender, GgufWriter
from benchmarks.harness import quantile
from benchmarks.memory import allowed, shown
from benchmarks.model_bench import MEMORY_SHARE
from benchmarks.worker import Worker, WorkerError
from glm4.model import Config

Result = dict[str, Any]

MAX_STEPS = 64  # of one decode turn
# Far above the minute that loading 40 layers takes: who is silent for so long hangs.
ANSWER_SECONDS = 900.0

# Packages whose versions decide a result.
PEERS = ("transformers", "llama-cpp-python", "gguf")

# Bytes a weight takes in a linear layer and in the embedding, to plan memory with.
CONTENDERS = {
    "glm4 int4": (0.55, 2),
    "glm4 int8": (1.02, 2),
    "glm4 bf16": (2, 2),
    "transformers bf16": (2, 2),
    "llama.cpp Q4_0": (0.57, 0.57),
    "llama.cpp Q8_0": (1.07, 1.07),
}
# A process before its model: torch, and what a prefill of 512 tokens needs.
BASE_BYTES = 700 << 20

# Share of the processors' time that others may use in a turn of decode; else it is taken again.
FOREIGN = 0.1
# Last logits against ours in bf16 after DISTINCT layers, relative L2. 16 bits: see model_bench. 8
# bits: each weight is off by 1 % of its row's largest. 4 bits: random weights have no structure
# that would damp the error, so all this says is that both are the same model: unrelated logits
# are 1.4 apart.
TOLERANCE = {"bf16": 0.1, "int8": 0.2, "Q8_0": 0.2, "int4": 1.0, "Q4_0": 1.0}


@dataclass(frozen=True)
class Heat:
    """One model, and who runs it."""

    name: str
    contenders: tuple[str, ...]
    layers: int  # at most
    vocab: int = 151552
    prompt: int = 512
    rounds: int = 6
    turn_seconds: float = 0.6  # of decode
    prefill_seconds: float = 24.0  # once a contender's prefills took so long, no further ones
    retries: int = 2
    model: str = "glm-4-9b-chat"


HEATS = (
    Heat("all", tuple(CONTENDERS), 4, 32000),
    Heat("4-bit", ("glm4 int4", "llama.cpp Q4_0"), 40),
    Heat("8-bit", ("glm4 int8", "llama.cpp Q8_0"), 40),
    Heat("16-bit", ("glm4 bf16", "transformers bf16"), 16),
)
QUICK_HEATS = (Heat("quick", tuple(CONTENDERS), 1, 512, 32, 1, 0.0, 0.0, 0),)


def measure_heat(
    heat: Heat, threads: int, say: Callable[[str], None], memory: int | None = None
) -> Iterator[Result]:
    """Yields the heat's result after every round; it names contenders that cannot run here.
    `memory`: bytes that all contenders together may take."""
    missing = missing_contenders()
    here = tuple(name for name in heat.contenders if name not in missing)
    config = fitted(replace(heat, contenders=here), allowed(memory, MEMORY_SHARE))
    result: Result = {
        "heat": heat.name,
        "model": heat.model,
        "layers": config.layers,
        "all_layers": config.layers == glm4.PRESETS[heat.model].layers,
        "vocab": config.vocab,
        "prompt": heat.prompt,
        "contenders": [],
        "skipped": [f"{name}: {missing[name]}" for name in heat.contenders if name in missing],
    }
    yield result
    say("measuring the cache")
    for contenders in run_heat(replace(heat, contenders=here), config, threads, say):
        yield result | {"contenders": contenders}


def faults(heat: Result) -> list[str]:
    """Contenders that died or were wrong."""
    return [f"{who['name']}: {who['note']}" for who in heat["contenders"] if "note" in who]


def missing_contenders() -> dict[str, str]:
    """Contenders that cannot run here, with what to install."""
    packages = {
        "transformers": ("transformers",),
        "llama.cpp": ("gguf", "llama_cpp"),
    }
    missing = {}
    for name in CONTENDERS:
        engine = name.split()[0]
        absent = [p for p in packages.get(engine, ()) if importlib.util.find_spec(p) is None]
        if absent:
            how = "-r benchmarks/peers/requirements.txt" if engine == "llama.cpp" else engine
            missing[name] = f"not installed: pip install {how}"
    return missing


def fitted(heat: Heat, room: int) -> Config:
    """The heat's model with as many layers as all its contenders can hold at once in
    `room` bytes."""
    config = replace(
        glm4.PRESETS[heat.model], vocab=heat.vocab, layers=heat.layers, eos_token_ids=()
    )
    sizes = {name: math.prod(shape) for name, shape in config.shapes.items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("layers.0."))
    per_layer = fixed = 0.0
    for name in heat.contenders:
        linear_bytes, embedding_bytes = CONTENDERS[name]
        per_layer += layer * linear_bytes
        head_bytes = max(linear_bytes, 1.02)
        fixed += sizes["embedding"] * embedding_bytes + sizes["lm_head"] * head_bytes + BASE_BYTES
    fits = int((room - fixed) / per_layer)
    if fits < 1:
        raise MemoryError(
            f"{heat.name}: one layer of each contender takes {shown(fixed + per_layer)}, "
            f"{shown(room)} are allowed (--memory)"
        )
    return replace(config, layers=min(heat.layers, fits))


def run_heat(
    heat: Heat, config: Config, threads: int, say: Callable[[str], None]
) -> Iterator[list[Result]]:
    """Yields everybody's row after every round."""
    probe = CpuReadProbe()
    prompt = torch.randint(config.vocab, (heat.prompt,)).tolist()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        say(f"writing the files of llama.cpp, {min(config.layers, DISTINCT)} layers")
        files = written_ggufs(heat, config, folder, threads)
        entrants = []
        for name in heat.contenders:
            say(f"loading {name}, {config.layers} layers")
            entrants.append(Entrant(name, config, prompt, threads, folder))
            stack.callback(entrants[-1].worker.end)
            entrants[-1].load(files.get(name, {}))
        compare_logits(entrants)
        for done in range(heat.rounds):
            start = done % len(entrants)
            for entrant in entrants[start:] + entrants[:start]:
                say(f"round {done + 1} of {heat.rounds}, {entrant.name}")
                entrant.tried(lambda e=entrant: e.take_turn(heat, probe))
            yield [entrant.judged() for entrant in entrants]
        for entrant in entrants:
            if entrant.name.startswith("glm4"):
                say(f"budget of {entrant.name}")
                entrant.tried(lambda e=entrant: e.facts.update(budgets=e.ask("budgets")))
        yield [entrant.judged() for entrant in entrants]


def written_ggufs(heat: Heat, config: Config, folder: Path, threads: int) -> dict[str, Result]:
    """The facts of each of llama.cpp's contenders, whose files then lie in the folder; a note of
    what went wrong instead."""
    names = [name for name in heat.contenders if name.startswith("llama.cpp")]
    if not names:
        return {}
    worker = Worker(GgufWriter, config, folder, threads)
    facts: dict[str, Result] = {}
    try:
        for name in names:
            try:
                facts[name] = worker.call("write", name.split()[1])
            except WorkerError as error:
                facts[name] = {"note": f"writing its file: {error}"}
    finally:
        worker.end()
    return facts


@dataclass(frozen=True)
class DecodeTurn:
    seconds: float  # a token, the median
    read: float  # bytes/s beside it
    foreign: float  # share of the processors' time that others used


class Entrant:
    """A contender as the judge sees it: its process, and its turns. What goes wrong ends it; what
    it did before stays."""

    def __init__(
        self, name: str, config: Config, prompt: list[int], threads: int, folder: Path
    ) -> None:
        self.name, self.config = name, config
        self.worker = Worker(Contender, name, config, prompt, threads, folder)
        self.decode_turns: list[DecodeTurn] = []
        self.prefill_turns: list[float] = []
        self.matmul_turns: list[float] = []
        self.steps = 1
        self.facts: Result = {}
        self.note: str | None = None

    def load(self, known: Result) -> None:
        """`known`: facts from before, or the note of what went wrong then."""
        self.note = known.get("note")
        self.tried(lambda: self.facts.update(self.ask("facts") | known))

    def tried(self, measure: Callable[[], object]) -> None:
        if self.note is not None:
            return
        try:
            measure()
        except WorkerError as error:
            self.note = str(error)
            self.worker.end()

    def ask(self, command: str, *arguments: Any) -> Any:
        return self.worker.call("answer", command, *arguments, seconds=ANSWER_SECONDS)

    def take_turn(self, heat: Heat, probe: CpuReadProbe) -> None:
        if not self.prefill_turns or sum(self.prefill_turns) < heat.prefill_seconds:
            self.prefill_turns.append(self.ask("prefill"))
            if self.name.startswith("glm4"):
                self.matmul_turns.append(self.ask("matmuls"))
        if not self.decode_turns:
            times, _ = self.ask("decode", 3)
            self.steps = math.ceil(heat.turn_seconds / statistics.median(times))
            self.steps = min(max(3, self.steps), MAX_STEPS)
        turns = [self.decode_turn(probe)]
        while min(turn.foreign for turn in turns) > FOREIGN and len(turns) <= heat.retries:
            turns.append(self.decode_turn(probe))
        self.decode_turns.append(min(turns, key=lambda turn: turn.foreign))

    def decode_turn(self, probe: CpuReadProbe) -> DecodeTurn:
        before = read_beside(probe)
        times, foreign = self.ask("decode", self.steps)
        read = (before + read_beside(probe)) / 2
        return DecodeTurn(statistics.median(times), read, foreign)

    def judged(self) -> Result:
        """Its row: of what it did not do there is nothing."""
        judged: Result = {"name": self.name, **self.facts}
        if self.note is None:
            self.tried(lambda: judged.update(peak_gib=self.ask("peak_gib")))
        if self.note is not None:
            judged["note"] = self.note
        if self.prefill_turns:
            judged["prefill"] = self.judged_prefill()
        if self.decode_turns:
            judged["decode"] = self.judged_decode()
        return judged

    def judged_decode(self) -> Result:
        n_bytes, turns = self.facts["bytes_per_token"], self.decode_turns
        seconds = [turn.seconds for turn in turns]
        return rates(seconds, 1) | {
            "gb_per_s": n_bytes / statistics.median(seconds) / 1e9,
            "share": statistics.median(n_bytes / turn.read / turn.seconds for turn in turns),
            "read_beside_gb_per_s": [round(turn.read / 1e9, 1) for turn in turns],
            "foreign": [round(turn.foreign, 3) for turn in turns],
        }

    def judged_prefill(self) -> Result:
        judged = rates(self.prefill_turns, self.facts["prompt"])
        if not self.matmul_turns:
            return judged
        pairs = zip(self.matmul_turns, self.prefill_turns, strict=False)  # the last may have failed
        return judged | {
            "of_matmuls": statistics.median(matmuls / whole for matmuls, whole in pairs),
            "matmuls_tflop_per_s": self.facts["matmul_flops"]
            / statistics.median(self.matmul_turns)
            / 1e12,
        }


def read_beside(probe: CpuReadProbe) -> float:
    """The median of some samples, after one that wakes the threads."""
    return statistics.median([probe.sample() for _ in range(6)][1:])


def rates(turns: list[float], tokens: int) -> Result:
    return {
        "tokens_per_s": tokens / statistics.median(turns),
        "p20": tokens / quantile(turns, 0.8),
        "p80": tokens / quantile(turns, 0.2),
        "turns_ms": [round(took * 1e3, 3) for took in turns],
    }


def compare_logits(entrants: list[Entrant]) -> None:
    """Right first: the logits after the prompt against ours in bf16, where that takes part. Who is
    wrong is not timed."""
    truths = [entrant for entrant in entrants if entrant.name == "glm4 bf16"]
    found: dict[str, Tensor] = {}
    for entrant in entrants if truths else ():
        entrant.tried(
            lambda e=entrant: found.update({e.name: torch.from_numpy(e.ask("logits")).double()})
        )
    truth = found.get("glm4 bf16")
    for entrant in entrants:
        if truth is None or entrant.name not in found:
            continue
        distance = ((found[entrant.name] - truth).norm() / truth.norm()).item()
        entrant.facts["relative_l2_of_logits"] = distance
        if not distance <= TOLERANCE[entrant.name.split()[1]]:
            entrant.note = f"logits are off by relative L2 {distance:.1e}"
