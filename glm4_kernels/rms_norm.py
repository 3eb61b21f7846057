"""RMSNorm over the last dimension.

    y = weight * round(x * rsqrt(mean(x^2) + eps))

Rounding points: mean, rsqrt and the first product in fp32; one rounding to the dtype of x; the
product with weight is rounded again. This is `GlmRMSNorm` / `Glm4RMSNorm` of transformers.

Bytes moved: 2 * rows * N * itemsize + N * itemsize; nothing else, so the floor is that over the
memory bandwidth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4_kernels.extension import ABSENT, DTYPE_CODES, HAS_EXTENSION, buffer, extension
from glm4_kernels.library import (
    FLOAT_DTYPES,
    as_rows,
    bad_type,
    bad_value,
    register_op,
    strided_rows,
)
from glm4_kernels.triton_import import tl, triton

# One program holds one row in registers: 32K fp32 values over 16 warps are 64 registers a thread
# (the fused norms then spill; at 16K nothing does, and the widest GLM-4 has 6144).
MAX_COLS = 32768


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * rstd).to(x.dtype)


@triton.jit
def rms_normalise(x, weight, n_cols, eps):
    """weight * round(x * rsqrt(mean(x^2) + eps)) in weight's dtype; x in fp32, 0 past n_cols."""
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / n_cols + eps)
    normalised = (x * rstd).to(weight.dtype)
    return (weight.to(tl.float32) * normalised.to(tl.float32)).to(weight.dtype)


@triton.jit
def _rms_norm_kernel(
    y_ptr,
    x_ptr,
    weight_ptr,
    stride_x_row,
    n_cols,
    eps,
    BLOCK_N: tl.constexpr,
):
    """y = norm(x), one row a program."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < n_cols

    x = tl.load(x_ptr + row * stride_x_row + cols, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)

    y = rms_normalise(x, weight, n_cols, eps)

    tl.store(y_ptr + row * n_cols + cols, y, mask=mask)


def row_warps(block_n: int) -> int:
    """Warps for one row of `block_n` values: 16 bytes a thread a load, at least two loads each.

    Not measured yet; derived from the load width, to be replaced by a measured ladder.
    """
    return min(max(block_n // 512, 1), 16)


def launch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    n_cols = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows = as_rows(x)
    block_n = triton.next_power_of_2(n_cols)

    _rms_norm_kernel[(rows.shape[0],)](
        y,
        rows,
        weight.contiguous(),
        rows.stride(0),
        n_cols,
        eps,
        BLOCK_N=block_n,
        num_warps=row_warps(block_n),
        enable_fp_fusion=False,  # else the bits would depend on Triton's default
    )
    return y


def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float, variant: str = "") -> Tensor:
    """The C++ kernel; `variant`: one of build_info()["simd_variants"], by default the best."""
    n_cols = x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, stride = strided_rows(x)
    weight = weight.contiguous()
    extension().norm_cpu(
        buffer(y),
        ABSENT,
        buffer(rows),
        ABSENT,
        ABSENT,
        buffer(weight),
        DTYPE_CODES[x.dtype],
        y.numel() // n_cols,
        n_cols,
        stride,
        0,
        eps,
        torch.get_num_threads(),
        variant,
    )
    return y


def check_rms_norm(
    x: Tensor, weight: Tensor, eps: float, op: str = "rms_norm", weight_name: str = "weight"
) -> None:
    shape, dtype = x.shape, x.dtype
    if not shape:
        raise bad_value(op, "x", "[..., N]", list(shape))
    if dtype not in FLOAT_DTYPES:
        raise bad_type(op, "x", "float32, bfloat16 or float16", dtype)
    n_cols = shape[-1]
    if not 1 <= n_cols <= MAX_COLS:
        raise bad_value(op, "x", f"[..., N] with 1 <= N <= {MAX_COLS}", list(shape))
    if weight.shape != (n_cols,):
        raise bad_value(op, weight_name, f"[{n_cols}]", list(weight.shape))
    if weight.dtype != dtype:
        raise bad_type(op, weight_name, dtype, weight.dtype)
    if weight.device != x.device:
        raise bad_value(op, weight_name, f"on {x.device}", weight.device)
    if not eps >= 0.0:
        raise bad_value(op, "eps", "at least 0", eps)


_rms_norm = register_op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    check=check_rms_norm,
    reference=rms_norm_reference,
    launch=launch_rms_norm,
    cpu=rms_norm_cpu if HAS_EXTENSION else None,
    fake=lambda x, weight, eps: x.new_empty(x.shape),
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich, 2019), rounded as HF does.

    Args:
        x: [..., N], float32, bfloat16 or float16; any strides; N at most 32768.
        weight: [N], dtype and device of x.
        eps: added to the mean square.

    Returns:
        [..., N], contiguous, dtype of x.

    Raises:
        ValueError: shapes, device or eps are wrong. TypeError: a dtype is.
    """
    return _rms_norm(x, weight, eps)
