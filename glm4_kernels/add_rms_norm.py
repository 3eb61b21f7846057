"""Residual add, then RMSNorm: what stands between two blocks of GLM-4 (2024).

    residual' = round(residual + x)
    y         = weight * round(residual' * rsqrt(mean(residual'^2) + eps))

Rounding points: the sum is rounded to the dtype before the norm reads it (`GlmDecoderLayer` of
transformers; reading the unrounded sum changes greedy tokens); then those of `rms_norm`.

Bytes moved: 4 * rows * N * itemsize + N * itemsize.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4_kernels.extension import ABSENT, DTYPE_CODES, HAS_EXTENSION, buffer, extension
from glm4_kernels.library import as_rows, bad_type, bad_value, register_op, strided_rows
from glm4_kernels.rms_norm import check_rms_norm, rms_norm_reference, rms_normalise, row_warps
from glm4_kernels.triton_import import tl, triton


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    residual = residual + x
    return rms_norm_reference(residual, weight, eps), residual


@triton.jit
def _add_rms_norm_kernel(
    y_ptr,
    residual_out_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    stride_x_row,
    stride_residual_row,
    n_cols,
    eps,
    BLOCK_N: tl.constexpr,
):
    """residual' = round(residual + x); y = norm(residual'); one row a program."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < n_cols

    x = tl.load(x_ptr + row * stride_x_row + cols, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * stride_residual_row + cols, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)

    residual = (residual.to(tl.float32) + x).to(weight.dtype)
    y = rms_normalise(residual.to(tl.float32), weight, n_cols, eps)

    tl.store(residual_out_ptr + row * n_cols + cols, residual, mask=mask)
    tl.store(y_ptr + row * n_cols + cols, y, mask=mask)


def launch_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    n_cols = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_out = torch.empty_like(y)
    if y.numel() == 0:
        return y, residual_out
    x_rows, residual_rows = as_rows(x), as_rows(residual)
    block_n = triton.next_power_of_2(n_cols)

    _add_rms_norm_kernel[(x_rows.shape[0],)](
        y,
        residual_out,
        x_rows,
        residual_rows,
        weight.contiguous(),
        x_rows.stride(0),
        residual_rows.stride(0),
        n_cols,
        eps,
        BLOCK_N=block_n,
        num_warps=row_warps(block_n),
        enable_fp_fusion=False,
    )
    return y, residual_out


def add_rms_norm_cpu(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, variant: str = ""
) -> tuple[Tensor, Tensor]:
    """The C++ kernel; `variant`: one of build_info()["simd_variants"], by default the best."""
    n_cols = x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    residual_out = torch.empty_like(y)
    x_rows, stride_x = strided_rows(x)
    residual_rows, stride_residual = strided_rows(residual)
    weight = weight.contiguous()
    extension().norm_cpu(
        buffer(y),
        buffer(residual_out),
        buffer(x_rows),
        buffer(residual_rows),
        ABSENT,
        buffer(weight),
        DTYPE_CODES[x.dtype],
        y.numel() // n_cols,
        n_cols,
        stride_x,
        stride_residual,
        eps,
        torch.get_num_threads(),
        variant,
    )
    return y, residual_out


def check_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    check_rms_norm(x, weight, eps, op="add_rms_norm")
    check_residual("add_rms_norm", x, residual)


def check_residual(op: str, x: Tensor, residual: Tensor) -> None:
    if residual.shape != x.shape:
        raise bad_value(op, "residual", list(x.shape), list(residual.shape))
    if residual.dtype != x.dtype:
        raise bad_type(op, "residual", x.dtype, residual.dtype)
    if residual.device != x.device:
        raise bad_value(op, "residual", f"on {x.device}", residual.device)


_add_rms_norm = register_op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    check=check_add_rms_norm,
    reference=add_rms_norm_reference,
    launch=launch_add_rms_norm,
    cpu=add_rms_norm_cpu if HAS_EXTENSION else None,
    fake=lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds x to the residual stream and norms the sum, rounded as HF does.

    Args:
        x: [..., N], float32, bfloat16 or float16; any strides; N at most 32768.
        residual: shape, dtype and device of x; any strides; not changed.
        weight: [N], dtype and device of x.
        eps: added to the mean square.

    Returns:
        (y, residual'), both [..., N], contiguous, dtype of x.

    Raises:
        ValueError: shapes, device or eps are wrong. TypeError: a dtype is.
    """
    return _add_rms_norm(x, residual, weight, eps)
