"""Norm, residual add, norm: what stands between two blocks of GLM-4-0414, in one launch.

    residual' = round(residual + norm(x, post_weight))
    y         = norm(residual', pre_weight)

where norm is `rms_norm`. With post_self_attn_layernorm and post_attention_layernorm it joins
attention to the MLP, with post_mlp_layernorm and the next layer's input_layernorm the MLP to the
next layer's attention.

Rounding points: those of `rms_norm` twice, and the sum is rounded to the dtype before the second
norm reads it (`Glm4DecoderLayer` of transformers). With rounding="fp32" only the two results are
rounded.

`sandwich_norm_quantized` gives y in int8 or float8_e4m3fn, as `rms_norm_quantized` does.

Bytes moved: rows * N * (3 * itemsize of x + itemsize of y) + 2 * N * itemsize, and 4 a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4_kernels.add_rms_norm import (
    add_rms_norm_quantized_reference,
    add_rms_norm_reference,
    check_residual,
)
from glm4_kernels.dependent_launch import dependent, issue_loads, wait_for_producers
from glm4_kernels.extension import HAS_EXTENSION
from glm4_kernels.library import as_rows, register_op
from glm4_kernels.quantize_rows import check_quantize_rows, empty_quantized
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


def sandwich_norm_reference(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    eps: float,
    rounding: Rounding = "hf",
) -> tuple[Tensor, Tensor]:
    normed = normalised(x, post_weight, eps, rounding)
    return add_rms_norm_reference(normed, residual, pre_weight, eps, rounding)


def sandwich_norm_quantized_reference(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None = None,
    rounding: Rounding = "hf",
) -> tuple[Tensor, Tensor, Tensor]:
    normed = normalised(x, post_weight, eps, rounding)
    return add_rms_norm_quantized_reference(
        normed, residual, pre_weight, eps, dtype, group_size, rounding
    )


@triton.jit
def _sandwich_norm_kernel(
    y_ptr,
    scale_ptr,
    residual_out_ptr,
    x_ptr,
    residual_ptr,
    post_weight_ptr,
    pre_weight_ptr,
    stride_x_row,
    stride_residual_row,
    n_cols,
    eps,
    HF_ROUNDING: tl.constexpr,
    PDL: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """residual' = residual + norm(x, post); y = norm(residual', pre); one row a program."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < n_cols

    post_weight = tl.load(post_weight_ptr + cols, mask=mask, other=0.0)
    pre_weight = tl.load(pre_weight_ptr + cols, mask=mask, other=0.0)
    wait_for_producers(PDL)
    x = tl.load(x_ptr + row * stride_x_row + cols, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * stride_residual_row + cols, mask=mask, other=0.0)
    issue_loads()

    normed = rms_normalise(x, post_weight, n_cols, eps, HF_ROUNDING)
    total = round_as_hf(residual.to(tl.float32) + normed, residual.dtype, HF_ROUNDING)
    tl.store(residual_out_ptr + row * n_cols + cols, total.to(residual.dtype), mask=mask)
    y = rms_normalise(total, pre_weight, n_cols, eps, HF_ROUNDING)

    store_row(y_ptr, scale_ptr, y, row, cols, n_cols, GROUP)


def launch_sandwich_norm(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    eps: float,
    rounding: Rounding = "hf",
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, _launch(y, None, x, residual, post_weight, pre_weight, eps, None, rounding, pdl)


def launch_sandwich_norm_quantized(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None = None,
    rounding: Rounding = "hf",
    pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    y, scale = empty_quantized(x, dtype, group_size)
    residual_out = _launch(
        y, scale, x, residual, post_weight, pre_weight, eps, group_size, rounding, pdl
    )
    return y, scale, residual_out


def _launch(
    y: Tensor,
    scale: Tensor | None,
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
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

    _sandwich_norm_kernel[(x_rows.shape[0],)](
        y,
        scale,
        residual_out,
        x_rows,
        residual_rows,
        post_weight.contiguous(),
        pre_weight.contiguous(),
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


def sandwich_norm_cpu(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    eps: float,
    rounding: Rounding = "hf",
    variant: str = "",
) -> tuple[Tensor, ...]:
    """The C++ kernel; `variant`: one of build_info()["simd_variants"], by default the best."""
    return norm_cpu(x, residual, post_weight, pre_weight, eps, None, None, rounding, variant)


def sandwich_norm_quantized_cpu(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None = None,
    rounding: Rounding = "hf",
    variant: str = "",
) -> tuple[Tensor, ...]:
    """The C++ kernel; `variant`: one of build_info()["simd_variants"], by default the best."""
    norms = (post_weight, pre_weight, eps)
    return norm_cpu(x, residual, *norms, dtype, group_size, rounding, variant)


def check_sandwich_norm(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    eps: float,
    rounding: Rounding = "hf",
    op: str = "sandwich_norm",
) -> None:
    check_rms_norm(x, post_weight, eps, rounding, op=op, weight_name="post_weight")
    check_rms_norm(x, pre_weight, eps, rounding, op=op, weight_name="pre_weight")
    check_residual(op, x, residual)


def check_sandwich_norm_quantized(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None = None,
    rounding: Rounding = "hf",
) -> None:
    op = "sandwich_norm_quantized"
    check_sandwich_norm(x, residual, post_weight, pre_weight, eps, rounding, op=op)
    check_quantize_rows(op, x, dtype, group_size)


_sandwich_norm = register_op(
    "sandwich_norm(Tensor x, Tensor residual, Tensor post_weight, Tensor pre_weight, float eps, "
    'str rounding="hf") -> (Tensor, Tensor)',
    check=check_sandwich_norm,
    reference=sandwich_norm_reference,
    launch=launch_sandwich_norm,
    cpu=sandwich_norm_cpu if HAS_EXTENSION else None,
    fake=lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
)

_sandwich_norm_quantized = register_op(
    "sandwich_norm_quantized(Tensor x, Tensor residual, Tensor post_weight, Tensor pre_weight, "
    'float eps, ScalarType dtype, int? group_size=None, str rounding="hf")'
    " -> (Tensor, Tensor, Tensor)",
    check=check_sandwich_norm_quantized,
    reference=sandwich_norm_quantized_reference,
    launch=launch_sandwich_norm_quantized,
    cpu=sandwich_norm_quantized_cpu if HAS_EXTENSION else None,
    fake=lambda x, residual, post_weight, pre_weight, eps, dtype, group_size=None, *_: (
        *empty_quantized(x, dtype, group_size),
        x.new_empty(x.shape),
    ),
)


def sandwich_norm(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    eps: float,
    rounding: Rounding = "hf",
) -> tuple[Tensor, Tensor]:
    """Norms a block's output, adds it to the residual stream and norms the sum.

    Args:
        x: [..., N], float32, bfloat16 or float16; any strides; N at most 32768.
        residual: shape, dtype and device of x; any strides; not changed.
        post_weight: [N], dtype and device of x: the norm of x.
        pre_weight: [N], dtype and device of x: the norm of the sum.
        eps: added to the mean square, in both.
        rounding: "hf": where transformers rounds; "fp32": the results only.

    Returns:
        (y, residual'), both [..., N], contiguous, dtype of x.

    Raises:
        ValueError: shapes, device, eps or rounding are wrong. TypeError: a dtype is.
    """
    return _sandwich_norm(x, residual, post_weight, pre_weight, eps, rounding)


def sandwich_norm_quantized(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None = None,
    rounding: Rounding = "hf",
) -> tuple[Tensor, Tensor, Tensor]:
    """`sandwich_norm`, the second norm quantised for the matmul that follows.

    Args:
        x, residual, post_weight, pre_weight, eps, rounding: as for `sandwich_norm`.
        dtype, group_size: as for `rms_norm_quantized`.

    Returns:
        (q, scale, residual'): q and scale as of `rms_norm_quantized`; residual' [..., N], dtype of
        x; all contiguous.

    Raises:
        ValueError: shapes, device, eps, group_size or rounding are wrong. TypeError: a dtype is.
    """
    return _sandwich_norm_quantized(
        x, residual, post_weight, pre_weight, eps, dtype, group_size, rounding
    )
