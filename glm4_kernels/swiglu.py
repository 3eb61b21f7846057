"""SwiGLU on the packed output of gate_up_proj.

    y = round(silu(gate)) * up      silu(g) = g / (1 + exp(-g))      gate | up = gate_up

Rounding points: silu in fp32, rounded to the dtype; the product is rounded again. This is `GlmMLP`
/ `Glm4MLP` of transformers. With rounding="fp32" only the product is rounded.

Bytes moved: 3 * rows * F * itemsize.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4_kernels.dependent_launch import dependent, issue_loads, wait_for_producers
from glm4_kernels.extension import DTYPE_CODES, HAS_EXTENSION, buffer, extension
from glm4_kernels.library import (
    FLOAT_DTYPES,
    as_rows,
    bad_type,
    bad_value,
    multiprocessor_count,
    register_op,
    strided_rows,
)
from glm4_kernels.rounding import Rounding, check_rounding, round_as_hf
from glm4_kernels.triton_import import tl, triton


def swiglu_reference(gate_up: Tensor, rounding: Rounding = "hf") -> Tensor:
    dtype = gate_up.dtype
    wide = gate_up if rounding == "hf" else gate_up.to(torch.promote_types(dtype, torch.float32))
    gate, up = wide.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(dtype)


@triton.jit
def _swiglu_kernel(
    y_ptr,
    gate_up_ptr,
    stride_gate_up_row,
    n_cols,
    HF_ROUNDING: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = silu(gate) * up, BLOCK_N columns of one row a program."""
    n_blocks = tl.cdiv(n_cols, BLOCK_N)
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    cols = tl.program_id(0) % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < n_cols

    gate_ptr = gate_up_ptr + row * stride_gate_up_row
    wait_for_producers(PDL)
    gate = tl.load(gate_ptr + cols, mask=mask, other=0.0)
    up = tl.load(gate_ptr + n_cols + cols, mask=mask, other=0.0)
    issue_loads()

    g = gate.to(tl.float32)
    silu = round_as_hf(g / (1.0 + tl.exp(-g)), gate.dtype, HF_ROUNDING)
    y = silu * up.to(tl.float32)

    tl.store(y_ptr + row * n_cols + cols, y.to(gate.dtype), mask=mask)


def column_block(n_rows: int, n_cols: int, multiprocessors: int) -> int:
    """Columns of one program: the most that still leave eight programs, or less than 2048 columns
    one program, for every multiprocessor.

    Derived, not measured yet. A token of GLM-4-9B is 214 programs of one warp over 132 SMs. With
    many, two thirds of 4.3 TB/s are read: at a latency of about 1 us 22 KB must be on their way to
    each SM. From 256 columns on, a thread has 32 bytes there, in 2048 columns 64, which is 131 KB
    an SM: six times that, for programs that load once and then do something else.
    """
    for block_n, programs in ((2048, 8), (1024, 1), (512, 1), (256, 1), (128, 1)):
        if n_rows * triton.cdiv(n_cols, block_n) >= programs * multiprocessors:
            return block_n
    return 64


def column_warps(block_n: int) -> int:
    """A warp for 256 columns, 16 bytes a thread a load; four at most."""
    return min(max(block_n // 256, 1), 4)


def launch_swiglu(gate_up: Tensor, rounding: Rounding = "hf", pdl: bool = False) -> Tensor:
    n_cols = gate_up.shape[-1] // 2
    y = torch.empty((*gate_up.shape[:-1], n_cols), dtype=gate_up.dtype, device=gate_up.device)
    if y.numel() == 0:
        return y
    rows = as_rows(gate_up)
    block_n = column_block(rows.shape[0], n_cols, multiprocessor_count(gate_up.device))

    _swiglu_kernel[(rows.shape[0] * triton.cdiv(n_cols, block_n),)](
        y,
        rows,
        rows.stride(0),
        n_cols,
        HF_ROUNDING=rounding == "hf",
        BLOCK_N=block_n,
        num_warps=column_warps(block_n),
        **dependent(pdl),
    )
    return y


def swiglu_cpu(gate_up: Tensor, rounding: Rounding = "hf", variant: str = "") -> Tensor:
    """The C++ kernel; `variant`: one of build_info()["simd_variants"], by default the best."""
    shape = gate_up.shape
    n_cols = shape[-1] // 2
    y = gate_up.new_empty((*shape[:-1], n_cols))
    rows, stride = strided_rows(gate_up)
    extension().swiglu_cpu(
        buffer(y),
        buffer(rows),
        DTYPE_CODES[gate_up.dtype],
        rounding == "hf",
        y.numel() // n_cols,
        n_cols,
        stride,
        torch.get_num_threads(),
        variant,
    )
    return y


def check_swiglu(gate_up: Tensor, rounding: Rounding = "hf") -> None:
    shape = gate_up.shape
    if not shape or shape[-1] < 2 or shape[-1] % 2 != 0:
        raise bad_value("swiglu", "gate_up", "[..., 2F] with F >= 1", list(shape))
    if gate_up.dtype not in FLOAT_DTYPES:
        raise bad_type("swiglu", "gate_up", "float32, bfloat16 or float16", gate_up.dtype)
    check_rounding("swiglu", rounding)


_swiglu = register_op(
    'swiglu(Tensor gate_up, str rounding="hf") -> Tensor',
    check=check_swiglu,
    reference=swiglu_reference,
    launch=launch_swiglu,
    cpu=swiglu_cpu if HAS_EXTENSION else None,
    fake=lambda gate_up, *_: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
)


def swiglu(gate_up: Tensor, rounding: Rounding = "hf") -> Tensor:
    """silu(gate) * up (Shazeer, 2020).

    Args:
        gate_up: [..., 2F], gate in the first F columns and up in the last; float32, bfloat16 or
            float16; any strides.
        rounding: "hf": where transformers rounds; "fp32": the result only.

    Returns:
        [..., F], contiguous, dtype of gate_up.

    Raises:
        ValueError: the shape or rounding is wrong. TypeError: the dtype is.
    """
    return _swiglu(gate_up, rounding)
