"""The whole model, random weights at true sizes: decode steps, first tokens, then `generate` beside
transformers.

A decode step is the engine's own (`glm4.decoder`): on CUDA its captured graph, replayed. Bytes it
must move: every weight but the embedding once, and K and V of every token in the cache. Those over
the bandwidth measured in the same run are the roofline that tokens/s are held against; a prompt's
is its flops over the matmul rate.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

import glm4
from benchmarks.ceilings import Ceilings, CpuReadProbe, seconds
from benchmarks.memory import free_bytes
from benchmarks.worker import one_line
from glm4.cache import PAGE_SIZE
from glm4.decoder import Decoder
from glm4.generation import stream
from glm4.sampling import Sampling

T = TypeVar("T")

# Of the free memory, what weights and caches may take; the rest is for activations and logits.
MEMORY_SHARE = 0.85

# Our logits against transformers' on the same weights. bf16 rounds by up to 2^-9, some ten times a
# layer: sqrt(61 * 10) * 2^-9 = 5 % after the 61 layers of the largest model; twice that.
LOGITS_TOLERANCE = 0.1


@dataclass(frozen=True)
class Plan:
    """What is measured of one model."""

    model: str  # a preset of glm4.PRESETS, or "demo"
    layers: int | None = None  # None is all of them
    batches: tuple[int, ...] = (1, 8, 64)
    contexts: tuple[int, ...] = (1024, 32768, 131072)
    prompt: int = 1024
    new_tokens: int = 128
    generate_batches: tuple[int, ...] = (1, 8)
    steps: int = 30  # of decode, timed
    first_tokens: tuple[int, ...] = ()  # lengths of prompts
    # Of `generate_batches`, those that transformers gets too: on a GPU it compiles for each.
    their_batches: tuple[int, ...] | None = None


# What `python -m benchmarks` measures: minutes on a GPU, about one on two CPU cores.
PLANS = {
    "cuda": (Plan("glm-4-9b-chat", first_tokens=(1024, 32768)),),
    "cpu": (
        Plan("demo", None, (1, 8, 64), (256,), 64, 32, (1, 8), 20),
        Plan("glm-4-9b-chat", 4, (1, 8, 64), (1024,), 128, 8, (1,), 5),
    ),
}
QUICK_PLAN = Plan("demo", None, (1, 2), (64,), 8, 3, (1, 2), 1, (16,))
# What drawing costs: a step that does all of it, at the first context, beside the greedy one.
DRAWN = Sampling(0.8, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=0)


def measure_model(
    plan: Plan, device: torch.device, ceilings: Ceilings, say: Callable[[str], None] = print
) -> Iterator[dict[str, Any]]:
    """Yields the model's result again and again as it grows; the last one is whole.

    Raises:
        ValueError: at the end, if parts of it failed; the others were measured.
    """
    model = made(plan, device)
    config = model.config
    result: dict[str, Any] = {
        "model": plan.model,
        "layers": config.layers,
        "all_layers": plan.model == "demo" or config.layers == glm4.PRESETS[plan.model].layers,
        "weights": "trained" if plan.model == "demo" else "random",
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": config.parameters,
        "decode": [],
        "first_token": [],
        "generate": [],
        "skipped": [],
        "failed": [],
    }

    def tried(what: str, measure: Callable[[], T], errors: str = "failed") -> T | None:
        """What `measure` returns; None if it fails, and why is in the result."""
        say(f"{plan.model}: {what}")
        try:
            return measure()
        except torch.OutOfMemoryError:
            result["skipped"].append(f"{what}: out of memory")
            torch.cuda.empty_cache()
        except Exception as error:
            traceback.print_exc()
            result[errors].append(f"{what}: {one_line(error)}")
        return None

    theirs = None
    if importlib.util.find_spec("transformers"):
        theirs = tried("transformers on the same weights", lambda: transformers_twin(model))
    else:
        result["skipped"].append("transformers: not installed")
    if theirs is not None:
        what = "logits beside transformers'"
        distance = tried(what, lambda: logits_distance(model, theirs))
        result["relative_l2_of_logits"] = distance
        if distance is not None and not distance <= LOGITS_TOLERANCE:
            wrong = f"{what}: relative L2 {distance:.1e}, allowed {LOGITS_TOLERANCE:.1e}"
            result["failed"].append(wrong)
        yield result

    for context in plan.contexts:
        for batch in plan.batches:
            what = f"decode of {batch} x {context} tokens"
            cache_bytes = batch * math.ceil(context / PAGE_SIZE) * PAGE_SIZE * token_bytes(model)
            if context > config.max_positions:
                result["skipped"].append(f"{what}: the model ends at {config.max_positions}")
            elif cache_bytes > MEMORY_SHARE * free_bytes(device):
                result["skipped"].append(f"{what}: its cache takes {cache_bytes / 2**30:.0f} GiB")
            else:
                for sampling in (None, DRAWN) if context == plan.contexts[0] else (None,):
                    drawn = ", drawn" if sampling else ""
                    call = partial(measure_decode, model, batch, context, ceilings, plan.steps)
                    row = tried(what + drawn, partial(call, sampling))
                    result["decode"] += [row] if row else []
            yield result

    ours = our_engine(model)
    for length in plan.first_tokens:
        what = f"first token after {length} tokens"
        row = tried(what, partial(measure_first_token, ours, model, length, ceilings))
        result["first_token"] += [row] if row else []
        yield result

    engines = {"glm4": ours} | ({"transformers": their_engine(theirs)} if theirs else {})
    prompts = torch.randint(config.vocab, (max(plan.generate_batches, default=0), plan.prompt))
    for name, engine in engines.items():  # theirs last: it compiles for minutes
        model.decoder = None  # frees pages and graphs
        for batch in plan.generate_batches:
            if name != "glm4" and batch not in (plan.their_batches or plan.generate_batches):
                continue
            what = f"{name} generates {batch} x {plan.new_tokens} tokens"
            some = prompts[:batch].tolist()
            call = partial(measure_generate, engine, some, plan.new_tokens, device)
            row = tried(what, call, "failed" if name == "glm4" else "skipped")
            result["generate"] += [{"engine": name, "batch": batch, **row}] if row else []
            yield result
    if result["failed"]:
        raise ValueError(f"{plan.model}: {'; '.join(result['failed'])}")


def made(plan: Plan, device: torch.device) -> glm4.Model:
    if plan.model == "demo":
        return glm4.load("demo", device=str(device))
    config = glm4.PRESETS[plan.model]
    if plan.layers is not None:
        config = replace(config, layers=plan.layers)
    needed, free = 2 * config.parameters, free_bytes(device)
    if needed > MEMORY_SHARE * free:
        raise MemoryError(
            f"{plan.model}: {config.layers} layers take {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free on {device}"
        )
    return glm4.Model.random(config, device, torch.bfloat16, seed=0)


def token_bytes(model: glm4.Model) -> int:
    """Bytes of K and V that one token takes in all layers."""
    config = model.config
    return 2 * config.layers * config.kv_heads * config.head_dim * model.dtype.itemsize


def step_bytes(model: glm4.Model, batch: int, context: int) -> int:
    shapes = model.config.shapes
    weights = sum(math.prod(shape) for name, shape in shapes.items() if name != "embedding")
    return weights * model.dtype.itemsize + batch * context * token_bytes(model)


@torch.inference_mode()
def measure_decode(
    model: glm4.Model,
    batch: int,
    context: int,
    ceilings: Ceilings,
    steps: int,
    sampling: Sampling | None = None,
) -> dict[str, Any]:
    """One step of `batch` sequences over `context` tokens each, greedy unless `sampling` is given:
    called, and on CUDA replayed as the engine does."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    warmup: dict[str, float] = {}
    decoder = decoder_at(model, batch, context, sampling or Sampling(), warmup.__setitem__)
    decoder.launch(batch)  # compiles, loads
    modes: dict[str, Callable[[int], object]] = {"eager": decoder.run}
    if decoder.graphs is not None:
        decoder.launch(batch)  # captures
        modes["graph"] = decoder.launch

    n_bytes = step_bytes(model, batch, context)
    probe = CpuReadProbe() if device.type == "cpu" else None
    row: dict[str, Any] = {"batch": batch, "context": context, "drawn": sampling is not None}
    for mode, call in modes.items():
        samples = []
        for _ in range(3 + steps):
            rewind(decoder, context)
            bandwidth = probe.sample() if probe else ceilings.bandwidth(device)
            samples.append((seconds(lambda call=call: call(batch), device), bandwidth))
        del samples[:3]
        took = statistics.median(t for t, _ in samples)
        row[mode] = {
            "ms": took * 1e3,
            "tokens_per_s": batch / took,
            "share": statistics.median(n_bytes / bandwidth / t for t, bandwidth in samples),
            "steps_ms": [round(t * 1e3, 4) for t, _ in samples],
        }
    rewind(decoder, context)
    decoder.step(batch)()  # an index out of range would be an error
    row |= {"bytes_moved": n_bytes, "peak_gib": peak_gib(device)}
    return row | {"warmup_s": warmup} if warmup else row


def decoder_at(
    model: glm4.Model,
    batch: int,
    context: int,
    sampling: Sampling | None = None,
    on_warmup: Callable[[str, float], None] | None = None,
) -> Decoder:
    """The engine's decoder in the middle of `batch` sequences, over random K and V in pages that
    lie anywhere."""
    device, pages = model.device, math.ceil(context / PAGE_SIZE)
    cache = model.new_cache(batch * pages)
    for tensor in (*cache.k, *cache.v):
        tensor.normal_()
    sampling = sampling or Sampling()
    decoder = Decoder(model, cache, sampling, batch, pages, 1024, on_warmup)
    rows = decoder.rows
    rows.tokens.copy_(torch.randint(model.config.vocab, (batch,)))
    rows.block_table.copy_(torch.randperm(batch * pages, device=device).view(batch, pages))
    rows.uniforms.uniform_()
    rewind(decoder, context)
    return decoder


def rewind(decoder: Decoder, context: int) -> None:
    """The next step again attends to `context` tokens, its own included."""
    rows = decoder.rows
    rows.positions.fill_(context - 1)
    rows.seq_lens.fill_(context)
    page, offset = divmod(context - 1, PAGE_SIZE)
    rows.slots.copy_(rows.block_table[:, page] * PAGE_SIZE + offset)
    rows.n_drawn.zero_()


def measure_first_token(
    engine: Engine, model: glm4.Model, length: int, ceilings: Ceilings
) -> dict[str, Any]:
    """Time from the call to the first token after one prompt; the call before it compiles."""
    prompts = torch.randint(model.config.vocab, (1, length)).tolist()
    took = []
    for _ in range(2):
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        engine(prompts, 1, lambda count: None)
        took.append(time.perf_counter() - began)
    return {
        "prompt": length,
        "first_token_ms": took[1] * 1e3,
        "tokens_per_s": length / took[1],
        "share": prefill_flops(model, length) / ceilings.matmul / took[1],
        "warmup_s": took[0] - took[1],
        "peak_gib": peak_gib(model.device),
    }


def prefill_flops(model: glm4.Model, length: int) -> int:
    """Of the linear layers for every token, of causal attention, of the head for one token."""
    config, shapes = model.config, model.config.shapes
    matrices = [n for n, shape in shapes.items() if len(shape) == 2 and n.startswith("layers.")]
    linear = 2 * length * sum(math.prod(shapes[name]) for name in matrices)
    attention = 2 * length**2 * config.heads * config.head_dim * config.layers
    return linear + attention + 2 * math.prod(shapes["lm_head"])


def peak_gib(device: torch.device) -> float | None:
    """Peak of allocated device memory since the last reset; a CPU process has no such figure."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


# Generates `new_tokens` for each prompt, greedily; calls back with the number of tokens as they
# come to the host.
Engine = Callable[[list[list[int]], int, Callable[[int], None]], None]


def measure_generate(
    engine: Engine, prompts: list[list[int]], new_tokens: int, device: torch.device
) -> dict[str, Any]:
    """Time until every prompt has its first token, then tokens/s of the rest, as a caller sees
    them."""
    began = time.perf_counter()
    engine(prompts, new_tokens, lambda count: None)  # compiles, captures
    cold = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    arrivals: list[tuple[int, float]] = []  # tokens so far, when
    began = time.perf_counter()
    engine(
        prompts,
        new_tokens,
        lambda count: arrivals.append(
            (count + (arrivals[-1][0] if arrivals else 0), time.perf_counter() - began)
        ),
    )
    made, last = arrivals[-1]
    if made != len(prompts) * new_tokens:
        raise RuntimeError(f"{made} tokens came, {len(prompts)} x {new_tokens} were asked for")
    first = next(when for so_far, when in arrivals if so_far >= len(prompts))
    return {
        "prompt": len(prompts[0]),
        "new_tokens": new_tokens,
        "first_token_ms": first * 1e3,
        "tokens_per_s": len(prompts) * (new_tokens - 1) / (last - first),
        "warmup_s": cold - last,
        "peak_gib": peak_gib(device),
    }


def our_engine(model: glm4.Model) -> Engine:
    def generate(prompts: list[list[int]], n: int, arrived: Callable[[int], None]) -> None:
        for _ in stream(model, prompts, n, stop_token_ids=[]):
            arrived(1)

    return generate


def their_engine(theirs: Any) -> Engine:
    """transformers' `generate`; on CUDA with the static cache, for which it compiles itself."""
    cache = {"cache_implementation": "static"} if theirs.device.type == "cuda" else {}

    def generate(prompts: list[list[int]], n: int, arrived: Callable[[int], None]) -> None:
        def put(ids: Tensor) -> None:
            if ids.dim() == 1:  # the prompts come first, as [B, T]
                arrived(ids.numel())

        theirs.generate(
            torch.tensor(prompts, device=theirs.device),
            max_new_tokens=n,
            streamer=SimpleNamespace(put=put, end=lambda: None),
            **cache,
        )

    return generate


def transformers_twin(model: glm4.Model) -> Any:
    """transformers' model on the very same weights: views, no copies."""
    from transformers import (
        GenerationConfig,
        Glm4Config,
        Glm4ForCausalLM,
        GlmConfig,
        GlmForCausalLM,
    )

    config = model.config
    config_class: Any = Glm4Config if config.sandwich else GlmConfig
    model_class: Any = Glm4ForCausalLM if config.sandwich else GlmForCausalLM
    their_config = config_class(
        vocab_size=config.vocab,
        hidden_size=config.hidden,
        intermediate_size=config.ffn,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.eps,
        max_position_embeddings=config.max_positions,
        attention_bias=config.qkv_bias,
        tie_word_embeddings=config.tied,
        pad_token_id=0,
        eos_token_id=0,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(config.theta),
            "partial_rotary_factor": config.rotary_dim / config.head_dim,
        },
        dtype=model.dtype,
    )
    with torch.device("meta"):
        theirs = model_class(their_config).to(model.dtype)
    theirs.load_state_dict(their_names(model), strict=True, assign=True)
    rotary = theirs.model.rotary_emb
    theirs.model.rotary_emb = type(rotary)(their_config).to(
        model.device
    )  # its buffers are no state
    theirs.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # no stop ids
    return theirs.eval()


def their_names(model: glm4.Model) -> dict[str, Tensor]:
    config = model.config
    qkv_rows = [n * config.head_dim for n in (config.heads, config.kv_heads, config.kv_heads)]
    state = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.blocks[-1].next_norm,
        "lm_head.weight": model.lm_head,
    }
    norm = model.first_norm
    for i, block in enumerate(model.blocks):
        own = f"model.layers.{i}."
        attention = own + "self_attn."
        state[own + "input_layernorm.weight"] = norm
        state[own + "post_attention_layernorm.weight"] = block.mlp_norm
        if block.post_attention_norm is not None:
            state[own + "post_self_attn_layernorm.weight"] = block.post_attention_norm
            state[own + "post_mlp_layernorm.weight"] = block.post_mlp_norm
        for name, rows in zip("qkv", block.attention.qkv.split(qkv_rows), strict=True):
            state[f"{attention}{name}_proj.weight"] = rows
        if block.attention.qkv_bias is not None:
            for name, rows in zip("qkv", block.attention.qkv_bias.split(qkv_rows), strict=True):
                state[f"{attention}{name}_proj.bias"] = rows
        state[attention + "o_proj.weight"] = block.attention.o
        state[own + "mlp.gate_up_proj.weight"] = block.mlp.gate_up
        state[own + "mlp.down_proj.weight"] = block.mlp.down
        norm = block.next_norm
    return state


@torch.inference_mode()
def logits_distance(model: glm4.Model, theirs: Any) -> float:
    """Relative L2 between both models' logits over one short prompt."""
    ids = torch.randint(model.config.vocab, (1, 32))
    truth = theirs(ids.to(model.device)).logits.double()
    return ((model.logits(ids).double() - truth).norm() / truth.norm()).item()
