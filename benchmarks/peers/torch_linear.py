"""What torch itself offers: packed int4 and int8 weights, dynamic int8, and plain bf16."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import Contender, Layer, Problem

ENGINES = ("x86", "onednn")


def contenders() -> list[Contender]:
    int4 = [
        Contender(
            f"torch int4pack g{group}",
            4,
            f"_weight_int4pack_mm_for_cpu: weights with zero points, groups of {group}; "
            "activations bf16",
            partial(int4pack, group),
        )
        for group in (128, 32)
    ]
    dynamic = [
        Contender(
            f"torch dynamic int8 {engine}",
            8,
            f"quantized::linear_dynamic, engine {engine}: weights per channel; activations uint8 "
            "per tensor",
            partial(dynamic_int8, engine),
        )
        for engine in ENGINES
        if engine in torch.backends.quantized.supported_engines
    ]
    int8 = Contender(
        "torch int8pack",
        8,
        "_weight_int8pack_mm: weights symmetric, per channel; activations bf16",
        int8pack,
    )
    return [*int4, int8, *dynamic, Contender("torch bf16", 16, "nothing quantised", bf16)]


def layer(
    problem: Problem,
    nbytes: int,
    make: Callable[[], Any],
    run: Callable[[Any, Tensor], Tensor],
    dtype: torch.dtype,
) -> Layer:
    return Layer(
        nbytes=nbytes,
        copies=[make() for _ in range(problem.copies(nbytes))],
        input=lambda x: torch.from_numpy(x).to(dtype),
        run=torch.inference_mode()(run),
        output=as_numpy,
    )


def as_numpy(y: Tensor) -> np.ndarray:
    return y.float().numpy()


def rows_of(problem: Problem) -> Tensor:
    torch.set_num_threads(problem.threads)
    return torch.from_numpy(problem.rows)


def int4pack(group_size: int, problem: Problem) -> Layer:
    groups = rows_of(problem).unflatten(1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()  # the kernel's w = scale * (u - 8) + zero
    step, shift = scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)
    u = ((groups - shift) / step + 8).round().clamp(0, 15).to(torch.int32).flatten(1)
    u = u.repeat(problem.repeats, 1)
    scales_and_zeros = torch.stack((scale, zero), -1).repeat(problem.repeats, 1, 1)
    scales_and_zeros = scales_and_zeros.transpose(0, 1).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(u, 1)
    del u
    return layer(
        problem,
        packed.nbytes + scales_and_zeros.nbytes,
        lambda: (packed.clone(), scales_and_zeros.clone()),
        lambda w, x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w[0], group_size, w[1]),
        torch.bfloat16,
    )


def int8pack(problem: Problem) -> Layer:
    rows = rows_of(problem)
    scale = (rows.abs().amax(1) / 127).bfloat16()
    q = (rows / scale.float()[:, None]).round().clamp(-128, 127).to(torch.int8)
    q, scale = q.repeat(problem.repeats, 1), scale.repeat(problem.repeats)
    return layer(
        problem,
        q.nbytes + scale.nbytes,
        lambda: (q.clone(), scale.clone()),
        lambda w, x: torch._weight_int8pack_mm(x, *w),
        torch.bfloat16,
    )


def dynamic_int8(engine: str, problem: Problem) -> Layer:
    rows = rows_of(problem)
    torch.backends.quantized.engine = engine
    scale = rows.abs().amax(1) / 127
    q = (rows / scale[:, None]).round().to(torch.int8).repeat(problem.repeats, 1)
    scale = scale.repeat(problem.repeats).double()
    zero = torch.zeros(problem.n, dtype=torch.int64)
    weight = torch._make_per_channel_quantized_tensor(q, scale, zero, 0)
    return layer(
        problem,
        q.nbytes + 4 * problem.n,
        lambda: torch.ops.quantized.linear_prepack(weight, None),
        lambda w, x: torch.ops.quantized.linear_dynamic(x, w, False),
        torch.float32,
    )


def bf16(problem: Problem) -> Layer:
    weight = rows_of(problem).bfloat16().repeat(problem.repeats, 1)
    return layer(
        problem,
        weight.nbytes,
        weight.clone,
        lambda w, x: torch.nn.functional.linear(x, w),
        torch.bfloat16,
    )
