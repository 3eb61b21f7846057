"""Norm, residual add, norm: what stands between two blocks of GLM-4-0414, in one launch.

    residual' = round(residual + norm(x, post_weight))
    y         = norm(residual', pre_weight)

where norm is `rms_norm`. With post_self_attn_layernorm and post_attention_layernorm it joins
attention to the MLP, with post_mlp_layernorm and the next layer's input_layernorm the MLP to the
next layer's attention.

Rounding points: those of `rms_norm` twice, and the sum is rounded to the dtype before the second
norm reads it (`Glm4DecoderLayer` of transformers).

Bytes moved: 4 * rows * N * itemsize + 2 * N * itemsize.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4_kernels.add_rms_norm import add_rms_norm_reference, check_residual
from glm4_kernels.extension import DTYPE_CODES, HAS_EXTENSION, buffer, extension
from glm4_kernels.library import as_rows, register_op, strided_rows
from glm4_kernels.rms_norm import check_rms_norm, rms_norm_reference, rms_normalise, row_warps
from glm4_kernels.triton_import import tl, triton


def sandwich_norm_reference(
    x: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    normed = rms_norm_reference(x, post_weight, eps)
    return add_rms_norm_reference(normed, residual, pre_weight, eps)


@triton.jit
def _sandwich_norm_kernel(
    y_ptr,
    residual_out_ptr,
    x_ptr,
    residual_ptr,
    post_weight_ptr,
    pre_weight_ptr,
    stride_x_row,
    stride_residual_row,
    n_cols,
    eps,
    BLOCK_N: tl.constexpr,
):
    """residual' = round(residual + norm(x, post)); y = norm(residual', pre); one row a program."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < n_cols

    x = tl.load(x_ptr + row * stride_x_row + cols, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * stride_residual_row + cols, mask=mask, other=0.0)
    post_weight = tl.load(post_weight_ptr + cols, mask=mask, other=0.0)
    pre_weight = tl.load(pre_weight_ptr + cols, mask=mask, other=0.0)

    normed = rms_normalise(x, post_weight, n_cols, eps)
    residual = (residual.to(tl.float32) + normed.to(tl.float32)).to(pre_weight.dtype)
    y = rms_normalise(residual.to(tl.float32), pre_weight, n_cols, eps)

    tl.store(residual_out_ptr + row * n_cols + cols, residual, mask=mask)
    tl.store(y_ptr + row * n_cols + cols, y, mask=mask)


def launch_sandwich_norm(
    x: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    n_cols = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_out = torch.empty_like(y)
    if y.numel() == 0:
        return y, residual_out
    x_rows, residual_rows = as_rows(x), as_rows(residual)
    block_n = triton.next_power_of_2(n_cols)

    _sandwich_norm_kernel[(x_rows.shape[0],)](
        y,
        residual_out,
        x_rows,
        residual_rows,
        post_weight.contiguous(),
        pre_weight.contiguous(),
        x_rows.stride(0),
        residual_rows.stride(0),
        n_cols,
        eps,
        BLOCK_N=block_n,
        num_warps=row_warps(block_n),
        enable_fp_fusion=False,
    )
    return y, residual_out


def sandwich_norm_cpu(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    eps: float,
    variant: str = "",
) -> tuple[Tensor, Tensor]:
    """The C++ kernel; `variant`: one of build_info()["simd_variants"], by default the best."""
    n_cols = x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    residual_out = torch.empty_like(y)
    x_rows, stride_x = strided_rows(x)
    residual_rows, stride_residual = strided_rows(residual)
    post_weight, pre_weight = post_weight.contiguous(), pre_weight.contiguous()
    extension().norm_cpu(
        buffer(y),
        buffer(residual_out),
        buffer(x_rows),
        buffer(residual_rows),
        buffer(post_weight),
        buffer(pre_weight),
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


def check_sandwich_norm(
    x: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float
) -> None:
    op = "sandwich_norm"
    check_rms_norm(x, post_weight, eps, op=op, weight_name="post_weight")
    check_rms_norm(x, pre_weight, eps, op=op, weight_name="pre_weight")
    check_residual(op, x, residual)


_sandwich_norm = register_op(
    "sandwich_norm(Tensor x, Tensor residual, Tensor post_weight, Tensor pre_weight, float eps)"
    " -> (Tensor, Tensor)",
    check=check_sandwich_norm,
    reference=sandwich_norm_reference,
    launch=launch_sandwich_norm,
    cpu=sandwich_norm_cpu if HAS_EXTENSION else None,
    fake=lambda x, residual, post_weight, pre_weight, eps: (
        x.new_empty(x.shape),
        x.new_empty(x.shape),
    ),
)


def sandwich_norm(
    x: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Norms a block's output, adds it to the residual stream and norms the sum, rounded as HF does.

    Args:
        x: [..., N], float32, bfloat16 or float16; any strides; N at most 32768.
        residual: shape, dtype and device of x; any strides; not changed.
        post_weight: [N], dtype and device of x: the norm of x.
        pre_weight: [N], dtype and device of x: the norm of the sum.
        eps: added to the mean square, in both.

    Returns:
        (y, residual'), both [..., N], contiguous, dtype of x.

    Raises:
        ValueError: shapes, device or eps are wrong. TypeError: a dtype is.
    """
    return _sandwich_norm(x, residual, post_weight, pre_weight, eps)
