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
included.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import glm4
from benchmarks import llama_cpp
from benchmarks.ceilings import CpuReadProbe
from benchmarks.harness import one_line, quantile
from benchmarks.model_bench import MEMORY_SHARE, transformers_twin
from benchmarks.op_budget import budget
from benchmarks.peers.serve import busy_seconds, settle
from glm4.generation import free_bytes, stream
from glm4.model import Config, Model, Weight, linear
from glm4.quantization_policy import preparer

Result = dict[str, Any]

DISTINCT = 2
LINEAR = ("qkv", "o", "gate_up", "down", "lm_head")
SEED_ROWS = 1024  # rows of a matrix that one seed makes
MAX_STEPS = 64  # of one decode turn
NEW_TOKENS = 512  # room in the cache: all decode turns together take fewer

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


def measure_heat(heat: Heat, threads: int, say: Callable[[str], None]) -> Iterator[Result]:
    """Yields the heat's result after every round; it names contenders that cannot run here."""
    missing = missing_contenders()
    here = tuple(name for name in heat.contenders if name not in missing)
    result: Result = {
        "heat": heat.name,
        "contenders": [],
        "skipped": [f"{name}: {missing[name]}" for name in heat.contenders if name in missing],
    }
    yield result
    for more in run_heat(replace(heat, contenders=here), threads, CpuReadProbe(), say):
        yield result | more


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
            install = " ".join(p.replace("llama_cpp", "llama-cpp-python") for p in absent)
            missing[name] = f"not installed: pip install {install}"
    return missing


def fitted(heat: Heat, free: int) -> Config:
    """The heat's model with as many layers as all its contenders can hold at once."""
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
    fits = int((MEMORY_SHARE * free - fixed) / per_layer)
    if fits < 1:
        raise MemoryError(
            f"{heat.name}: one layer of each contender takes {(fixed + per_layer) / 2**30:.1f} "
            f"GiB, {free / 2**30:.1f} GiB are free"
        )
    return replace(config, layers=min(heat.layers, fits))


def run_heat(
    heat: Heat, threads: int, probe: CpuReadProbe, say: Callable[[str], None]
) -> Iterator[Result]:
    """Yields the heat's result after every round."""
    config = fitted(heat, free_bytes(torch.device("cpu")))
    prompt = torch.randint(config.vocab, (heat.prompt,)).tolist()
    result: Result = {
        "model": heat.model,
        "layers": config.layers,
        "all_layers": config.layers == glm4.PRESETS[heat.model].layers,
        "vocab": config.vocab,
        "prompt": heat.prompt,
        "contenders": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        kinds = [name.split()[1] for name in heat.contenders if name.startswith("llama.cpp")]
        if kinds:
            say(f"{heat.name}: writing {' and '.join(kinds)} with llama.cpp")
            quantised = in_process(write_ggufs, (config, Path(folder), kinds, threads))
        entrants = []
        try:
            for name in heat.contenders:
                say(f"{heat.name}: loading {name}, {config.layers} layers")
                entrant = Entrant(name, config, prompt, threads, Path(folder))
                entrants.append(entrant)
                if name.startswith("llama.cpp"):
                    entrant.facts |= quantised[name.split()[1]]
            compare_logits(entrants)
            for done in range(heat.rounds):
                say(f"{heat.name}: round {done + 1} of {heat.rounds}")
                start = done % len(entrants)
                for entrant in entrants[start:] + entrants[:start]:
                    entrant.take_turn(heat, probe)
                result["contenders"] = [entrant.judged() for entrant in entrants]
                yield result
            for entrant, judged in zip(entrants, result["contenders"], strict=True):
                if entrant.name.startswith("glm4"):
                    say(f"{heat.name}: budget of {entrant.name}")
                    judged["budgets"] = entrant.ask("budgets")
            yield result
        finally:
            for entrant in entrants:
                entrant.stop()


@dataclass(frozen=True)
class DecodeTurn:
    seconds: float  # a token, the median
    read: float  # bytes/s beside it
    foreign: float  # share of the processors' time that others used


class Entrant:
    """A contender as the judge sees it: the pipe to its process, and its turns."""

    def __init__(
        self, name: str, config: Config, prompt: list[int], threads: int, folder: Path
    ) -> None:
        self.name, self.config = name, config
        self.process, self.pipe = spawned(serve, (name, config, prompt, threads, folder))
        self.decode_turns: list[DecodeTurn] = []
        self.prefill_turns: list[float] = []
        self.matmul_turns: list[float] = []
        self.steps = 1
        self.facts: Result = receive(self.pipe, self.process, name)

    def ask(self, command: str, *arguments: Any) -> Any:
        self.pipe.send((command, arguments))
        return receive(self.pipe, self.process, self.name)

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
        tokens, n_bytes = self.facts["prompt"], self.facts["bytes_per_token"]
        turns = self.decode_turns
        seconds = [turn.seconds for turn in turns]
        judged: Result = {"name": self.name, **self.facts, "peak_gib": self.ask("peak_gib")}
        judged["decode"] = rates(seconds, 1) | {
            "gb_per_s": n_bytes / statistics.median(seconds) / 1e9,
            "share": statistics.median(n_bytes / turn.read / turn.seconds for turn in turns),
            "read_beside_gb_per_s": [round(turn.read / 1e9, 1) for turn in turns],
            "foreign": [round(turn.foreign, 3) for turn in turns],
        }
        judged["prefill"] = rates(self.prefill_turns, tokens)
        if self.matmul_turns:
            pairs = zip(self.matmul_turns, self.prefill_turns, strict=True)
            judged["prefill"] |= {
                "of_matmuls": statistics.median(matmuls / whole for matmuls, whole in pairs),
                "matmuls_tflop_per_s": self.facts["matmul_flops"]
                / statistics.median(self.matmul_turns)
                / 1e12,
            }
        return judged

    def stop(self) -> None:
        with suppress(OSError):
            self.pipe.send(("stop", ()))
        self.process.join(10)
        self.process.kill()


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
    """Right first: the logits after the prompt against ours in bf16, where that takes part."""
    truths = [entrant for entrant in entrants if entrant.name == "glm4 bf16"]
    if not truths:
        return
    truth = torch.from_numpy(truths[0].ask("logits")).double()
    for entrant in entrants:
        logits = torch.from_numpy(entrant.ask("logits")).double()
        distance = ((logits - truth).norm() / truth.norm()).item()
        if not distance <= TOLERANCE[entrant.name.split()[1]]:
            raise ValueError(f"{entrant.name}: logits are off by relative L2 {distance:.1e}")
        entrant.facts["relative_l2_of_logits"] = distance


# Processes


def spawned(target: Callable[..., None], arguments: tuple) -> tuple[Any, Any]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, *arguments), daemon=True)
    process.start()
    there.close()
    return process, here


def receive(pipe: multiprocessing.connection.Connection, process: Any, name: str) -> Any:
    try:
        answer, failure = pipe.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(f"{name}: its process died ({process.exitcode})") from None
    if failure:
        raise ChildProcessError(f"{name}: {failure}")
    return answer


def in_process(function: Callable[..., Any], arguments: tuple) -> Any:
    """What the function returns, run in a process whose memory is then free."""
    process, pipe = spawned(answer_once, (function, arguments))
    try:
        return receive(pipe, process, function.__name__)
    finally:
        process.join()


def answer_once(pipe: Any, function: Callable[..., Any], arguments: tuple) -> None:
    try:
        pipe.send((function(*arguments), None))
    except Exception as error:
        pipe.send((None, one_line(error)))


def serve(
    pipe: Any, name: str, config: Config, prompt: list[int], threads: int, folder: Path
) -> None:
    """A contender's process: its facts, then an answer to each command until "stop"."""
    torch.set_num_threads(threads)
    engine, kind = name.split()
    try:
        contender: Any
        if engine == "glm4":
            contender = Ours(config, prompt, kind)
        elif engine == "transformers":
            contender = Transformers(config, prompt)
        else:
            contender = LlamaCpp(config, prompt, folder / f"{kind}.gguf", threads)
        pipe.send((contender.facts, None))
        while True:
            command, arguments = pipe.recv()
            if command == "stop":
                return
            call = peak_gib if command == "peak_gib" else getattr(contender, command)
            answer = call(*arguments)
            settle()
            pipe.send((answer, None))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as error:
        pipe.send((None, one_line(error)))


def peak_gib() -> float | None:
    """The most memory this process has held, mapped files included; None where nobody says."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    peak = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(peak[1]) / 2**20 if peak else None


# Contenders


def random_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """bfloat16, the same in every process: each block of rows from its own seed."""
    mean = 1.0 if name.endswith("norm") else 0.0
    weight = torch.empty(shape, dtype=torch.bfloat16)

    def fill(first: int) -> None:
        seed = zlib.crc32(f"{name} {first}".encode())
        rows = weight[first : first + SEED_ROWS]
        rows.normal_(mean, 0.02, generator=torch.Generator().manual_seed(seed))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, range(0, shape[0], SEED_ROWS)))
    return weight


def distinct_layers(config: Config) -> Config:
    return replace(config, layers=min(config.layers, DISTINCT))


def model_of(config: Config, kind: str) -> tuple[Model, Result]:
    """Our model of random weights, and what preparing them took."""
    prepare = preparer(None if kind == "bf16" else kind)
    weights: dict[str, Weight] = {}
    seconds = 0.0
    with torch.no_grad():
        for name, shape in distinct_layers(config).shapes.items():
            weight = random_weight(name, shape)
            began = time.perf_counter()
            weights[name] = prepare(name, weight)
            seconds += time.perf_counter() - began
        for name in config.shapes:
            if name not in weights:
                _, layer, own = name.split(".", 2)
                source = weights[f"layers.{int(layer) % DISTINCT}.{own}"]
                weights[name] = copy.deepcopy(source)
    model = Model(config, weights, torch.device("cpu"), torch.bfloat16)
    shapes = {name: s for name, s in config.shapes.items() if name.rpartition(".")[2] in LINEAR}
    n_linear = sum(math.prod(shape) for shape in shapes.values())
    n_prepared = sum(
        math.prod(shape) for name, shape in shapes.items() if name in distinct_layers(config).shapes
    )
    facts: Result = {
        "linear_bits": 8 * sum(weights[name].nbytes for name in shapes) / n_linear,
        "weight_bytes": sum(w.nbytes for name, w in weights.items() if name != "embedding"),
        "matmul_flops": 2 * (n_linear - math.prod(config.shapes["lm_head"])),
    }
    if kind != "bf16":
        facts["quantised_weights_per_s"] = n_prepared / seconds
    return model, facts


class Ours:
    """What `Model.generate` does; the same generator goes on over all decode turns."""

    def __init__(self, config: Config, prompt: list[int], kind: str) -> None:
        began = time.perf_counter()
        self.model, self.facts = model_of(config, kind)
        self.prompt = prompt
        self.running: Iterator[tuple[int, int]] = iter(())
        kv = 2 * config.layers * config.kv_heads * config.head_dim * self.model.dtype.itemsize
        self.facts |= {
            "prompt": len(prompt),
            "bytes_per_token": self.facts.pop("weight_bytes") + len(prompt) * kv,
            "matmul_flops": self.facts["matmul_flops"] * len(prompt),
            "load_seconds": time.perf_counter() - began,
        }

    def prefill(self) -> float:
        self.running = iter(())  # frees the cache
        began = time.perf_counter()
        self.running = stream(self.model, [self.prompt], NEW_TOKENS, stop_token_ids=[])
        next(self.running)
        return time.perf_counter() - began

    def decode(self, n_tokens: int) -> tuple[list[float], float]:
        return watched(lambda: next(self.running), n_tokens)

    @torch.inference_mode()
    def matmuls(self) -> float:
        """Seconds of the linear layers alone for the prompt's rows, measured over DISTINCT layers
        and scaled to all."""
        config, rows = self.model.config, len(self.prompt)
        x, heads, gated = (
            torch.randn(rows, k).to(self.model.dtype)
            for k in (config.hidden, config.heads * config.head_dim, config.ffn)
        )
        seconds = 0.0
        blocks = self.model.blocks[:DISTINCT]
        for block in blocks:
            attention, mlp = block.attention, block.mlp
            seconds += timed(lambda a=attention: linear(x, a.qkv, a.qkv_bias))
            seconds += timed(lambda a=attention: linear(heads, a.o))
            fused = not isinstance(mlp.gate_up, Tensor)
            seconds += timed(lambda m=mlp, f=fused: linear(x, m.gate_up, swiglu=f))
            seconds += timed(lambda m=mlp: linear(gated, m.down))
        return seconds * config.layers / len(blocks)

    def logits(self) -> Any:
        return self.model.logits(torch.tensor([self.prompt]))[0, -1].numpy()

    def budgets(self) -> Result:
        """Where both passes go, op by op."""

        def prefill() -> None:
            next(stream(self.model, [self.prompt], 2, stop_token_ids=[]))

        return {
            "decode": budget(self.model, lambda: next(self.running), 10),
            "prefill": budget(self.model, prefill, 2),
        }


class Transformers:
    """transformers' model on the very same tensors, at its defaults."""

    def __init__(self, config: Config, prompt: list[int]) -> None:
        began = time.perf_counter()
        model, facts = model_of(config, "bf16")
        self.theirs = transformers_twin(model)
        self.prompt = torch.tensor([prompt])
        kv = 2 * config.layers * config.kv_heads * config.head_dim * model.dtype.itemsize
        self.facts = {
            "linear_bits": facts["linear_bits"],
            "prompt": len(prompt),
            "bytes_per_token": facts["weight_bytes"] + len(prompt) * kv,
            "load_seconds": time.perf_counter() - began,
        }

    @torch.inference_mode()
    def prefill(self) -> float:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.theirs.config)
        began = time.perf_counter()
        self.token = self.step(self.prompt)
        return time.perf_counter() - began

    @torch.inference_mode()
    def decode(self, n_tokens: int) -> tuple[list[float], float]:
        def step() -> None:
            self.token = self.step(self.token)

        return watched(step, n_tokens)

    def step(self, tokens: Tensor) -> Tensor:
        out = self.theirs(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def logits(self) -> Any:
        return self.theirs(self.prompt, logits_to_keep=1).logits[0, -1].float().numpy()


class LlamaCpp:
    """llama.cpp's low-level interface, greedy."""

    def __init__(self, config: Config, prompt: list[int], path: Path, threads: int) -> None:
        self.engine = llama_cpp.LlamaCpp(path, threads, len(prompt) + NEW_TOKENS)
        self.prompt, self.token = prompt, 0
        self.facts = {
            "linear_bits": llama_cpp.linear_bits(path, config),
            "prompt": len(prompt),
            "bytes_per_token": llama_cpp.step_bytes(path, config, len(prompt)),
            "load_seconds": self.engine.load_seconds,
        }

    def prefill(self) -> float:
        began = time.perf_counter()
        self.token = self.engine.next_token(self.prompt, fresh=True)
        return time.perf_counter() - began

    def decode(self, n_tokens: int) -> tuple[list[float], float]:
        def step() -> None:
            self.token = self.engine.next_token([self.token])

        return watched(step, n_tokens)

    def logits(self) -> Any:
        return self.engine.logits(self.prompt, fresh=True).copy()


def write_ggufs(config: Config, folder: Path, kinds: list[str], threads: int) -> dict[str, Result]:
    """`folder/KIND.gguf` for each kind: llama.cpp quantises the distinct layers, which then
    repeat."""
    torch.set_num_threads(threads)
    distinct = distinct_layers(config)
    weights = ((name, random_weight(name, shape)) for name, shape in distinct.shapes.items())
    source, quantised = folder / "bf16.gguf", folder / "distinct.gguf"
    llama_cpp.write_gguf(source, distinct, weights)
    facts = {}
    for kind in kinds:
        began = time.perf_counter()
        llama_cpp.quantize(source, quantised, kind, threads)
        n_weights = sum(math.prod(s) for s in distinct.shapes.values() if len(s) == 2)
        facts[kind] = {"quantised_weights_per_s": n_weights / (time.perf_counter() - began)}
        llama_cpp.repeat_layers(quantised, folder / f"{kind}.gguf", config)
    for path in (source, quantised):
        path.unlink()
    return facts


def watched(step: Callable[[], object], steps: int) -> tuple[list[float], float]:
    """Seconds of each step, and the share of the processors' time that others used meanwhile."""
    busy, cpu, began = busy_seconds(), time.process_time(), time.perf_counter()
    times = [timed(step) for _ in range(steps)]
    others = busy_seconds() - busy - (time.process_time() - cpu)
    return times, max(others, 0.0) / ((time.perf_counter() - began) * (os.cpu_count() or 1))


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
