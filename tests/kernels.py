"""The implementations of an op that this machine runs, for tests that owe all of them the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from numerics import KERNEL_DTYPES

from glm4_kernels.extension import build_info

TRITON_OPS = (
    "rms_norm",
    "add_rms_norm",
    "sandwich_norm",
    "swiglu",
    "rope",
    "rope_kv_write",
    "decode_schedule",
    "flash_decode",
    "merge_attention",
    "sample",
    "decode_advance",
)  # each has a module and a launcher of its name
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIMD_VARIANTS = build_info().get("simd_variants", [])


@dataclass(frozen=True)
class Kernel:
    """`launch_<op>`, or `<op>_cpu` with the loops of one instruction set."""

    name: str
    run: Callable[..., Any]
    device: torch.device
    dtypes: tuple[torch.dtype, ...]

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.run(*arguments, **named)

    def __str__(self) -> str:
        return self.name


def cpu_kernels(cpu: Callable[..., Any]) -> list[Kernel]:
    return [
        Kernel(variant, partial(cpu, variant=variant), torch.device("cpu"), DTYPES)
        for variant in SIMD_VARIANTS
    ]


def kernels(launch: Callable[..., Any], cpu: Callable[..., Any]) -> list[Kernel]:
    on = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return [Kernel("triton", launch, on, KERNEL_DTYPES), *cpu_kernels(cpu)]


def each_kernel(launch: Callable[..., Any], cpu: Callable[..., Any]) -> pytest.MarkDecorator:
    """Parametrises a test by `kernel`."""
    return pytest.mark.parametrize("kernel", kernels(launch, cpu), ids=str)


def each_cpu_kernel(cpu: Callable[..., Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kernel", cpu_kernels(cpu), ids=str)


def each_kernel_and_dtype(
    launch: Callable[..., Any], cpu: Callable[..., Any]
) -> pytest.MarkDecorator:
    """Parametrises a test by `kernel` and each `dtype` that it computes."""
    cases = [(kernel, dtype) for kernel in kernels(launch, cpu) for dtype in kernel.dtypes]
    return pytest.mark.parametrize("kernel, dtype", cases, ids=str)
