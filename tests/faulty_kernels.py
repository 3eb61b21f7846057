"""Kernels with a known fault each, for the tests of the ahead-of-time harness."""

import dataclasses
import re

import torch
import triton
import triton.language as tl
from offset_overflow import overflowing_products

from glm4_kernels.ahead_of_time import (
    all_figures,
    capture,
    compile_launch,
    disassemble,
    nvidia_tool,
)


@triton.jit
def spilling_kernel(y_ptr, x_ptr, n, BLOCK: tl.constexpr):
    """Holds 2 * BLOCK * BLOCK values in one warp's registers."""
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + rows * BLOCK + cols)
    y = x
    for _ in range(n):
        y = tl.sqrt(y) + tl.sum(y, axis=0)[None, :] + x
    tl.store(y_ptr + rows * BLOCK + cols, y)


@triton.jit
def copy_kernel(y_ptr, x_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets))


@triton.jit
def dot_kernel(y_ptr, x_ptr, n, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    y = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in tl.range(n, num_stages=STAGES):
        x = tl.load(x_ptr + i * BLOCK * BLOCK + rows * BLOCK + cols)
        y = tl.dot(x, x, y)
    tl.store(y_ptr + rows * BLOCK + cols, y)


@triton.jit
def overflowing_kernel(y_ptr, x_ptr, page_ptr, stride, BLOCK: tl.constexpr):
    """A program id, a loaded page id and a constant row size, each multiplied in 32 bits."""
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    page = tl.load(page_ptr + row)
    x = tl.load(x_ptr + row * stride + cols) + tl.load(x_ptr + page * stride + cols)
    tl.store(y_ptr + row * BLOCK + cols, x)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_all():
    x, rows = meta(8, 8), 1 << 20
    spilling_kernel[(1,)](x, x, 4, BLOCK=64, num_warps=1)  # 256 a thread
    aligned, odd = meta(4096), meta(4097)[1:]
    copy_kernel[(1,)](aligned, odd, BLOCK=512, num_warps=4)
    copy_kernel[(1,)](aligned, aligned, BLOCK=512, num_warps=4)
    half = meta(8, dtype=torch.bfloat16)
    dot_kernel[(1,)](x, half, 16, BLOCK=128, STAGES=5, num_warps=4)
    dot_kernel[(1,)](x, half, 16, BLOCK=128, STAGES=2, num_warps=4)
    overflowing_kernel[(rows,)](x, x, meta(rows, dtype=torch.int32), 8192, BLOCK=4096)


def measured():
    launches = capture(launch_all, capability=90)
    compiled = [compile_launch(launch) for launch in launches]
    return [
        {
            "figures": dataclasses.asdict(made),
            "overflows": list(
                overflowing_products(binary.asm["ttir"], launch.grid, launch.integers)
            ),
        }
        for launch, binary, made in zip(launches, compiled, all_figures(compiled), strict=True)
    ]


def disassembled():
    """Of two kernels the instructions, disassembled together and, by cuobjdump, one by one."""

    def instructions(sass):
        return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z][\w.]*)", sass)

    launches = capture(launch_all, capability=90)[1:3]
    cubins = [compile_launch(launch).asm["cubin"] for launch in launches]
    together = disassemble(cubins, capability=90)
    alone = [nvidia_tool("cuobjdump", "-sass", content=cubin) for cubin in cubins]
    return [[instructions(sass) for sass in way] for way in (together, alone)]
