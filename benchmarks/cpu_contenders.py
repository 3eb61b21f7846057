"""Who runs in a heat (cpu_model.py), each in a process of its own: ours, transformers, llama.cpp.

Each has `facts`, and the methods `prefill`, `decode` and `logits`; ours `matmuls` and `budgets`.
"""

from __future__ import annotations

import copy
import math
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import llama_cpp
from benchmarks.model_bench import transformers_twin
from benchmarks.op_budget import budget
from benchmarks.peers.serve import busy_seconds, settle
from glm4.generation import stream
from glm4.model import Config, Model, Weight, linear
from glm4.quantization_policy import preparer

Result = dict[str, Any]

DISTINCT = 2
LINEAR = ("qkv", "o", "gate_up", "down", "lm_head")
SEED_ROWS = 1024  # rows of a matrix that one seed makes
NEW_TOKENS = 512  # room in the cache: all decode turns together take fewer


class Contender:
    """What runs in a contender's process."""

    def __init__(
        self, name: str, config: Config, prompt: list[int], threads: int, folder: Path
    ) -> None:
        torch.set_num_threads(threads)
        engine, kind = name.split()
        self.engine: Any
        if engine == "glm4":
            self.engine = Ours(config, prompt, kind)
        elif engine == "transformers":
            self.engine = Transformers(config, prompt)
        else:
            self.engine = LlamaCpp(config, prompt, folder / f"{kind}.gguf", threads)

    def answer(self, command: str, *arguments: Any) -> Any:
        """What one of the engine's methods returns, once its threads sleep."""
        if command == "facts":
            return self.engine.facts
        if command == "peak_gib":
            return peak_gib()
        answer = getattr(self.engine, command)(*arguments)
        settle()
        return answer


def peak_gib() -> float | None:
    """The most memory this process has held, mapped files included; None where nobody says."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    peak = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(peak[1]) / 2**20 if peak else None


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


class GgufWriter:
    """`folder/KIND.gguf`: llama.cpp quantises the distinct layers, which then repeat. Its own
    process gives the memory back."""

    def __init__(self, config: Config, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self.config, self.folder, self.threads = config, folder, threads
        self.distinct = distinct_layers(config)
        self.source = folder / "bf16.gguf"
        shapes = self.distinct.shapes.items()
        weights = ((name, random_weight(name, shape)) for name, shape in shapes)
        llama_cpp.write_gguf(self.source, self.distinct, weights)

    def write(self, kind: str) -> Result:
        quantised = self.folder / "distinct.gguf"
        began = time.perf_counter()
        llama_cpp.quantize(self.source, quantised, kind, self.threads)
        seconds = time.perf_counter() - began
        llama_cpp.repeat_layers(quantised, self.folder / f"{kind}.gguf", self.config)
        quantised.unlink()
        n_weights = sum(math.prod(s) for s in self.distinct.shapes.values() if len(s) == 2)
        return {"quantised_weights_per_s": n_weights / seconds}


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
