"""SwiGLU on the packed output of gate_up_proj.

    y = round(silu(gate)) * up      silu(g) = g / (1 + exp(-g))      gate | up = gate_up

Rounding points: silu in fp32, rounded to the dtype; the product is rounded again. This is `GlmMLP`
/ `Glm4MLP` of transformers.

Bytes moved: 3 * rows * F * itemsize.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
from glm4_kernels.triton_import import tl, triton


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@triton.jit
def _swiglu_kernel(
    y_ptr,
    gate_up_ptr,
    stride_gate_up_row,
    n_cols,
    BLOCK_N: tl.constexpr,
):
    """y = round(silu(gate)) * up, BLOCK_N columns of one row a program."""
    n_blocks = tl.cdiv(n_cols, BLOCK_N)
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    cols = tl.program_id(0) % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < n_cols

    gate_ptr = gate_up_ptr + row * stride_gate_up_row
    gate = tl.load(gate_ptr + cols, mask=mask, other=0.0)
    up = tl.load(gate_ptr + n_cols + cols, mask=mask, other=0.0)

    g = gate.to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(gate.dtype)
    y = silu.to(tl.float32) * up.to(tl.float32)

    tl.store(y_ptr + row * n_cols + cols, y.to(gate.dtype), mask=mask)


def column_block(n_rows: int, n_cols: int, multiprocessors: int) -> int:
    """The widest block that still gives every multiprocessor a program.

    Not measured yet; from 16-byte loads by four warps down to 107 -> 214 programs for one token
    of GLM-4-9B.
    """
    for block_n in (1024, 512, 256, 128):
        if n_rows * triton.cdiv(n_cols, block_n) >= multiprocessors:
            return block_n
    return 64


def launch_swiglu(gate_up: Tensor) -> Tensor:
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
        BLOCK_N=block_n,
        num_warps=max(block_n // 256, 1),
    )
    return y


def swiglu_cpu(gate_up: Tensor, variant: str = "") -> Tensor:
    """The C++ kernel; `variant`: one of build_info()["simd_variants"], by default the best."""
    shape = gate_up.shape
    n_cols = shape[-1] // 2
    y = torch.empty((*shape[:-1], n_cols), dtype=gate_up.dtype)
    rows, stride = strided_rows(gate_up)
    extension().swiglu_cpu(
        buffer(y),
        buffer(rows),
        DTYPE_CODES[gate_up.dtype],
        y.numel() // n_cols,
        n_cols,
        stride,
        torch.get_num_threads(),
        variant,
    )
    return y


def check_swiglu(gate_up: Tensor) -> None:
    shape = gate_up.shape
    if not shape or shape[-1] < 2 or shape[-1] % 2 != 0:
        raise bad_value("swiglu", "gate_up", "[..., 2F] with F >= 1", list(shape))
    if gate_up.dtype not in FLOAT_DTYPES:
        raise bad_type("swiglu", "gate_up", "float32, bfloat16 or float16", gate_up.dtype)


_swiglu = register_op(
    "swiglu(Tensor gate_up) -> Tensor",
    check=check_swiglu,
    reference=swiglu_reference,
    launch=launch_swiglu,
    cpu=swiglu_cpu if HAS_EXTENSION else None,
    fake=lambda gate_up: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020), rounded as HF does.

    Args:
        gate_up: [..., 2F], gate in the first F columns and up in the last; float32, bfloat16 or
            float16; any strides.

    Returns:
        [..., F], contiguous, dtype of gate_up.

    Raises:
        ValueError: the shape is wrong. TypeError: the dtype is.
    """
    return _swiglu(gate_up)
