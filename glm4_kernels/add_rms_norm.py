"""Residual add, then RMSNorm: what stands between two blocks of GLM-4 (2024).

    residual' = round(residual + x)
    y         = weight * round(residual' * rsqrt(mean(residual'^2) + eps))

Rounding points: the sum is rounded to the dtype before the norm reads it (`GlmDecoderLayer` of
transformers; reading the unrounded sum changes greedy tokens); then those of `rms_norm`. With
rounding="fp32" the norm reads the unrounded sum, and only the two results are rounded.

`add_rms_norm_quantized` gives y in int8 or float8_e4m3fn, as `rms_norm_quantized` does.

Bytes moved: rows * N * (3 * itemsize of x + itemsize of y) + N * itemsize, and 4 a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4_kernels.dependent_launch import dependent, issue_loads, wait_for_producers
from glm4_kernels.extension import HAS_EXTENSION
from glm4_kernels.library import as_rows, bad_type, bad_value, register_op
from glm4_kernels.quantize_rows import check_quantize_rows, empty_quantized, quantize_rows
from glm4_kernels.rms_norm import (
    check_rms_norm,
    norm_cpu,
    normalised,
    rms_normalise,
    row_tiles,
    store_row,
)
from glm4_kernels.rounding import Rounding, round_as_hf
from glm4_kernels.triton_import import tl, triton


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: Rounding = "hf"
) -> tuple[Tensor, Tensor]:
    total = added(x, residual, rounding)
    y = normalised(total, weight, eps, rounding)
    return y.to(residual.dtype), total.to(residual.dtype)


def add_rms_norm_quantized_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None = None,
    rounding: Rounding = "hf",
) -> tuple[Tensor, Tensor, Tensor]:
    total = added(x, residual, rounding)
    y, scale = quantize_rows(normalised(total, weight, eps, rounding), dtype, group_size)
    return y, scale, total.to(residual.dtype)


def added(x: Tensor, residual: Tensor, rounding: Rounding) -> Tensor:
    """residual + x: in their dtype, as HF does, or in fp32."""
    wide = torch.promote_types(residual.dtype, torch.float32)
    return residual + x if rounding == "hf" else residual.to(wide) + x


@triton.jit
def _add_rms_norm_kernel(
    y_ptr,
    scale_ptr,
    residual_out_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    stride_x_row,
    stride_residual_row,
    n_cols,
    eps,
    HF_ROUNDING: tl.constexpr,
    PDL: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """residual' = residual + x; y = norm(residual'); one row a program."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < n_cols

    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    wait_for_producers(PDL)
    x = tl.load(x_ptr + row * stride_x_row + cols, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * stride_residual_row + cols, mask=mask, other=0.0)
    issue_loads()

    total = round_as_hf(residual.to(tl.float32) + x, residual.dtype, HF_ROUNDING)
    tl.store(residual_out_ptr + row * n_cols + cols, total.to(residual.dtype), mask=mask)
    y = rms_normalise(total, weight, n_cols, eps, HF_ROUNDING)

    store_row(y_ptr, scale_ptr, y, row, cols, n_cols, GROUP)


def launch_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    rounding: Rounding = "hf",
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, _launch(y, None, x, residual, weight, eps, None, rounding, pdl)


def launch_add_rms_norm_quantized(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None = None,
    rounding: Rounding = "hf",
    pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    y, scale = empty_quantized(x, dtype, group_size)
    return y, scale, _launch(y, scale, x, residual, weight, eps, group_size, rounding, pdl)


def _launch(
    y: Tensor,
    scale: Tensor | None,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int | None,
    rounding: Rounding,
    pdl: bool,
) -> Tensor:
    residual_out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return residual_out
    n_cols = x.shape[-1]
    x_rows, residual_rows = as_rows(x), as_rows(residual)

    _add_rms_norm_kernel[(x_rows.shape[0],)](
        y,
        scale,
        residual_out,
        x_rows,
        residual_rows,
        weight.contiguous(),
        x_rows.stride(0),
        residual_rows.stride(0),
        n_cols,
        eps,
        HF_ROUNDING=rounding == "hf",
        enable_fp_fusion=False,
        **row_tiles(n_cols, group_size),
        **dependent(pdl),
    )
    return residual_out


def add_rms_norm_cpu(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    rounding: Rounding = "hf",
    variant: str = "",
) -> tuple[Tensor, ...]:
    """The C++ kernel; `variant`: one of build_info()["simd_variants"], by default the best."""
    return norm_cpu(x, residual, None, weight, eps, None, None, rounding, variant)


def add_rms_norm_quantized_cpu(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None = None,
    rounding: Rounding = "hf",
    variant: str = "",
) -> tuple[Tensor, ...]:
    """The C++ kernel; `variant`: one of build_info()["simd_variants"], by default the best."""
    return norm_cpu(x, residual, None, weight, eps, dtype, group_size, rounding, variant)


def check_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    rounding: Rounding = "hf",
    op: str = "add_rms_norm",
) -> None:
    check_rms_norm(x, weight, eps, rounding, op=op)
    check_residual(op, x, residual)


def check_add_rms_norm_quantized(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None = None,
    rounding: Rounding = "hf",
) -> None:
    op = "add_rms_norm_quantized"
    check_add_rms_norm(x, residual, weight, eps, rounding, op=op)
    check_quantize_rows(op, x, dtype, group_size)


def check_residual(op: str, x: Tensor, residual: Tensor) -> None:
    if residual.shape != x.shape:
        raise bad_value(op, "residual", list(x.shape), list(residual.shape))
    if residual.dtype != x.dtype:
        raise bad_type(op, "residual", x.dtype, residual.dtype)
    if residual.device != x.device:
        raise bad_value(op, "residual", f"on {x.device}", residual.device)


_add_rms_norm = register_op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, "
    'str rounding="hf") -> (Tensor, Tensor)',
    check=check_add_rms_norm,
    reference=add_rms_norm_reference,
    launch=launch_add_rms_norm,
    cpu=add_rms_norm_cpu if HAS_EXTENSION else None,
    fake=lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
)

_add_rms_norm_quantized = register_op(
    "add_rms_norm_quantized(Tensor x, Tensor residual, Tensor weight, float eps, "
    'ScalarType dtype, int? group_size=None, str rounding="hf") -> (Tensor, Tensor, Tensor)',
    check=check_add_rms_norm_quantized,
    reference=add_rms_norm_quantized_reference,
    launch=launch_add_rms_norm_quantized,
    cpu=add_rms_norm_quantized_cpu if HAS_EXTENSION else None,
    fake=lambda x, residual, weight, eps, dtype, group_size=None, *_: (
        *empty_quantized(x, dtype, group_size),
        x.new_empty(x.shape),
    ),
)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: Rounding = "hf"
) -> tuple[Tensor, Tensor]:
    """Adds x to the residual stream and norms the sum.

    Args:
        x: [..., N], float32, bfloat16 or float16; any strides; N at most 32768.
        residual: shape, dtype and device of x; any strides; not changed.
        weight: [N], dtype and device of x.
        eps: added to the mean square.
        rounding: "hf": where transformers rounds; "fp32": the results only.

    Returns:
        (y, residual'), both [..., N], contiguous, dtype of x.

    Raises:
        ValueError: shapes, device, eps or rounding are wrong. TypeError: a dtype is.
    """
    return _add_rms_norm(x, residual, weight, eps, rounding)


def add_rms_norm_quantized(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None = None,
    rounding: Rounding = "hf",
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_rms_norm`, the norm quantised for the matmul that follows.

    Args:
        x, residual, weight, eps, rounding: as for `add_rms_norm`.
        dtype, group_size: as for `rms_norm_quantized`.

    Returns:
        (q, scale, residual'): q and scale as of `rms_norm_quantized`; residual' [..., N], dtype of
        x; all contiguous.

    Raises:
        ValueError: shapes, device, eps, group_size or rounding are wrong. TypeError: a dtype is.
    """
    return _add_rms_norm_quantized(x, residual, weight, eps, dtype, group_size, rounding)
