"""Decode attention over shuffled pages, beside what else computes it.

Ours reads pages whose table and lengths are on the device. The schedule of a step, shared by its
layers, is made beforehand (bench_decode_schedule times it); a second contender makes it in each
call, others have more or fewer programs than `programs_per_kv_head` says. The peers read K and V in
bf16, contiguous, already gathered and dequantised; over one new token a sequence, not several.

    torch SDPA          one length for the whole batch, known to the host: PyTorch's choice of
                        backend, flash and cuDNN; `rows` gives it the query heads of a group as rows
                        of one head, its best form on the CPU, where `enable_gqa` reads every KV
                        head once for each query head
    flex_attention      compiled; its decoding kernel, which takes groups of a power of two
    varlen_attn         lengths on the device, where this torch takes them (`seqused_k`);
                        else one length for the whole batch
    flash_attn          FlashAttention 3, else 2: lengths on the device, where it is installed
    flashinfer          over our own pages, planned on the host before it is timed, where installed

A peer that is not there or refuses a case says so in its note.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import Case
from benchmarks.shapes import SHAPES
from glm4_kernels.decode_schedule import decode_schedule, launch_decode_schedule
from glm4_kernels.flash_decode import flash_decode, flash_decode_reference, launch_flash_decode
from glm4_kernels.huge_pages import zeros_in_huge_pages
from glm4_kernels.library import multiprocessor_count

DTYPE, PAGE_SIZE = torch.bfloat16, 64
INT8, FP8 = torch.int8, torch.float8_e4m3fn
LARGEST = {INT8: 127, FP8: 448}
NAMES = {DTYPE: "", INT8: ", int8 cache", FP8: ", fp8 cache"}
TOLERANCE = torch.finfo(DTYPE).eps  # p and out are rounded once, each by at most half of it
K = 1024
# Many short sequences beside few long ones: 16 of 1K to 128K.
RAGGED = [K << (7 * i // 15) for i in range(16)]
PROGRAMS = (1, 2, 3, 4)  # on a multiprocessor
SIZES: dict[str, list[tuple[str, list[int], torch.dtype]]] = {  # model, lengths, cache
    "cuda": [
        *(("glm-4-9b", [n * K], DTYPE) for n in (8, 32, 128, 256)),
        *(("glm-4-9b-chat-1m", [n * K], DTYPE) for n in (32, 128, 256, 1024)),
        *(("glm-4-32b-0414", [n * K], DTYPE) for n in (32, 128)),
        *(("glm-4-9b", [8 * K] * batch, DTYPE) for batch in (8, 64)),
        ("glm-4-32b-0414", [8 * K] * 32, DTYPE),
        ("glm-4-9b", RAGGED, DTYPE),
        *(
            (model, [128 * K], kind)
            for model in ("glm-4-9b", "glm-4-9b-chat-1m")
            for kind in (INT8, FP8)
        ),
    ],
    "cpu": [
        *(("glm-4-9b", [n * K], kind) for kind in (DTYPE, INT8) for n in (4, 32, 128)),
        ("glm-4-9b", [K] * 8, DTYPE),
        ("glm-4-9b-chat-1m", [8 * K], DTYPE),
        ("glm-4-32b-0414", [8 * K], DTYPE),
    ],
}


def cases(device: torch.device) -> Iterator[Case]:
    for model, lengths, cache_dtype in SIZES[device.type]:
        if cache_dtype == FP8 and torch.cuda.get_device_capability(device) < (8, 9):
            continue
        yield case(model, lengths, cache_dtype, device)
    if device.type == "cuda":  # speculative verification
        for cache_dtype in (DTYPE, INT8):
            for n_queries in (4, 8):
                yield case("glm-4-9b", [128 * K], cache_dtype, device, n_queries)


def case(
    model: str,
    lengths: list[int],
    cache_dtype: torch.dtype,
    device: torch.device,
    n_queries: int = 1,
) -> Case:
    shape = SHAPES[model]
    scale = shape.head_dim**-0.5
    batch, longest = len(lengths), max(lengths)
    pages = longest // PAGE_SIZE
    quantised = cache_dtype in LARGEST

    def inputs() -> tuple:
        rows = (batch, shape.heads) if n_queries == 1 else (batch, n_queries, shape.heads)
        q = torch.randn(*rows, shape.head_dim, dtype=DTYPE, device=device)
        sizes = (batch, shape.kv_heads, longest, shape.head_dim)
        if device.type == "cuda":  # heads inside tokens, as the GPU peers like it
            sizes = (batch, longest, shape.kv_heads, shape.head_dim)
        k, v = (zeros_in_huge_pages(sizes, DTYPE, device).normal_() for _ in range(2))
        if device.type == "cuda":
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        table = torch.randperm(batch * pages, device=device)
        scales: tuple = (None, None)
        k_cache, v_cache = k, v
        if quantised:
            (k_cache, k_scale), (v_cache, v_scale) = rounded(k), rounded(v)
            k, v = ((c.float() * s).to(DTYPE) for c, s in ((k_cache, k_scale), (v_cache, v_scale)))
            scales = tuple(paged(s, table).squeeze(-1) for s in (k_scale, v_scale))
        k_cache, v_cache = paged(k_cache, table), paged(v_cache, table)
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        group = (shape.heads, shape.kv_heads, n_queries)
        schedules = tuple(
            launch_decode_schedule(
                seq_lens, *group, programs=n * multiprocessor_count(device) // shape.kv_heads
            )
            for n in (PROGRAMS if device.type == "cuda" else ())
        )
        paging = (table.int().view(batch, pages), seq_lens)
        schedule = decode_schedule(seq_lens, *group)
        return q, k_cache, v_cache, *paging, *scales, schedule, schedules, k, v

    def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
        step = x.float().abs().amax(-1, keepdim=True) / LARGEST[cache_dtype]
        x = x / step
        return (x.round() if cache_dtype == INT8 else x).to(cache_dtype), step

    def paged(x: Tensor, table: Tensor) -> Tensor:
        in_order = x.unflatten(2, (pages, PAGE_SIZE)).transpose(1, 2).flatten(0, 1)
        cache = zeros_in_huge_pages(in_order.shape, in_order.dtype, in_order.device)
        cache.view(torch.int8)[table] = in_order.contiguous().view(torch.int8)
        return cache

    def ours(q, k_cache, v_cache, table, seq_lens, k_scale, v_scale, schedule, *_) -> Tensor:
        arguments = (q, k_cache, v_cache, table, seq_lens, scale, k_scale, v_scale)
        return flash_decode(*arguments, schedule=schedule)

    def alone(q, k_cache, v_cache, table, seq_lens, k_scale, v_scale, *_) -> Tensor:
        return flash_decode(q, k_cache, v_cache, table, seq_lens, scale, k_scale, v_scale)

    def invariant(q, k_cache, v_cache, table, seq_lens, k_scale, v_scale, *_) -> Tensor:
        arguments = (q, k_cache, v_cache, table, seq_lens, scale, k_scale, v_scale)
        return flash_decode(*arguments, batch_invariant=True)

    def dependent(q, k_cache, v_cache, table, seq_lens, k_scale, v_scale, schedule, *_) -> Tensor:
        arguments = (q, k_cache, v_cache, table, seq_lens, scale, k_scale, v_scale)
        return launch_flash_decode(*arguments, schedule, pdl=True)[0]

    def with_programs(i: int) -> Callable[..., Any]:
        def call(q, k_cache, v_cache, table, seq_lens, k_scale, v_scale, _, schedules, *rest):
            arguments = (q, k_cache, v_cache, table, seq_lens, scale, k_scale, v_scale)
            return launch_flash_decode(*arguments, schedules[i])[0]

        return call

    def eager(q, k_cache, v_cache, table, seq_lens, k_scale, v_scale, *_) -> Tensor:
        arguments = (q, k_cache, v_cache, table, seq_lens, scale, k_scale, v_scale)
        return flash_decode_reference(*arguments)[0]

    def oracle(q, k_cache, v_cache, *rest) -> Tensor:
        return eager(q.double(), k_cache.double(), v_cache.double(), *rest)

    contenders: dict[str, Callable[..., Any]] = {"glm4_kernels": ours, "torch eager": eager}
    if device.type == "cuda":
        contenders["glm4_kernels, schedule inside"] = alone
        contenders["glm4_kernels, batch-invariant"] = invariant
        if torch.cuda.get_device_capability(device) >= (9, 0):
            contenders["glm4_kernels, dependent launch"] = dependent
        for i, n in enumerate(PROGRAMS):
            contenders[f"glm4_kernels, {n} programs a multiprocessor"] = with_programs(i)
    if device.type == "cuda" and n_queries == 1:
        contenders |= gpu_peers(lengths, scale)
        if not quantised:
            contenders["flashinfer"] = flashinfer(shape.kv_heads, lengths, scale)
    if min(lengths) == longest and n_queries == 1:
        contenders |= sdpa_peers(shape.kv_heads, scale, device)
    token_bytes = shape.head_dim * cache_dtype.itemsize + (4 if quantised else 0)
    context = (
        f"{longest // K}K"
        if min(lengths) == longest
        else f"{min(lengths) // K}K to {longest // K}K"
    )
    queries = "" if n_queries == 1 else f", {n_queries} queries"
    return Case(
        op="flash_decode",
        label=f"{model}, batch {batch}{queries}, {context} keys{NAMES[cache_dtype]}",
        bytes_moved=2 * sum(lengths) * shape.kv_heads * token_bytes,
        flops=0,
        inputs=inputs,
        contenders=contenders,
        oracle=oracle,
        tolerance=TOLERANCE,
    )


def sdpa_peers(kv_heads: int, scale: float, device: torch.device) -> dict[str, Callable[..., Any]]:
    def sdpa(q, *rest) -> Tensor:
        k, v = rest[-2:]
        out = scaled_dot_product_attention(q.unsqueeze(2), k, v, scale=scale, enable_gqa=True)
        return out.squeeze(2)

    def sdpa_rows(q, *rest) -> Tensor:
        k, v = rest[-2:]
        rows = q.unflatten(1, (kv_heads, -1))
        return scaled_dot_product_attention(rows, k, v, scale=scale).flatten(1, 2)

    def pinned(backend: SDPBackend) -> Callable[..., Any]:
        def call(*arguments) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(*arguments)

        return call

    if device.type == "cpu":
        return {"torch SDPA": sdpa, "torch SDPA rows": sdpa_rows}
    return {
        "torch SDPA": sdpa,
        "torch SDPA flash": pinned(SDPBackend.FLASH_ATTENTION),
        "torch SDPA cuDNN": pinned(SDPBackend.CUDNN_ATTENTION),
        "torch flex_attention": flex_attention(scale),
    }


def flex_attention(scale: float) -> Callable[..., Any]:
    from torch.nn.attention import flex_attention as flex

    compiled = torch.compile(flex.flex_attention, dynamic=False)

    def call(q, *rest) -> Tensor:
        k, v = rest[-2:]
        return compiled(q.unsqueeze(2), k, v, scale=scale, enable_gqa=True).squeeze(2)

    return call


def gpu_peers(lengths: list[int], scale: float) -> dict[str, Callable[..., Any]]:
    """Those that take lengths on the device, over K and V as [B, S, G, D]."""
    batch, longest = len(lengths), max(lengths)

    @cache
    def starts(device: torch.device) -> tuple[Tensor, Tensor]:
        one = torch.arange(batch + 1, dtype=torch.int32, device=device)
        return one, one * longest

    def varlen(q, *rest) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        seq_lens, (k, v) = rest[3], rest[-2:]
        k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))
        options: dict[str, Any] = {"scale": scale}
        if "seqused_k" in inspect.signature(varlen_attn).parameters:
            options |= {"enable_gqa": True, "seqused_k": seq_lens}
        elif min(lengths) < longest:
            raise NotImplementedError("this torch takes no lengths beside the starts (seqused_k)")
        return varlen_attn(q, k, v, *starts(q.device), 1, longest, **options)

    def flash_attn(q, *rest) -> Tensor:
        seq_lens, (k, v) = rest[3], rest[-2:]
        call = flash_attn_call()
        k, v = (x.transpose(1, 2) for x in (k, v))
        out = call(q.unsqueeze(1), k, v, cache_seqlens=seq_lens, softmax_scale=scale)
        return out.squeeze(1)

    return {"torch varlen_attn": varlen, "flash_attn": flash_attn}


@cache
def flash_attn_call() -> Callable[..., Any]:
    try:
        return importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
    except ImportError:
        return importlib.import_module("flash_attn").flash_attn_with_kvcache


def flashinfer(kv_heads: int, lengths: list[int], scale: float) -> Callable[..., Any]:
    plans: dict[int, Any] = {}  # by table, which is kept: a set is planned when it is first met

    def plan(q: Tensor, table: Tensor) -> Any:
        library = importlib.import_module("flashinfer")
        used = torch.tensor([-(-n // PAGE_SIZE) for n in lengths], dtype=torch.int32)
        ends = torch.cat([used.new_zeros(1), used.cumsum(0).int()])
        indices = torch.cat([row[:n] for row, n in zip(table, used.tolist(), strict=True)])
        last = torch.tensor([(n - 1) % PAGE_SIZE + 1 for n in lengths], dtype=torch.int32)
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=True
        )
        wrapper.plan(
            *(ends, indices, last, q.shape[1], kv_heads, q.shape[2], PAGE_SIZE),
            q_data_type=DTYPE, kv_data_type=DTYPE, sm_scale=scale,
        )  # fmt: skip
        return wrapper, table

    def call(q, k_cache, v_cache, table, *_) -> Tensor:
        if table.data_ptr() not in plans:
            plans[table.data_ptr()] = plan(q, table)
        return plans[table.data_ptr()][0].run(q, (k_cache, v_cache))

    return call
