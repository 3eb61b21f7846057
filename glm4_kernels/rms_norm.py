"""RMSNorm over the last dimension.

    y = weight * round(x * rsqrt(mean(x^2) + eps))

Rounding points: mean, rsqrt and the first product in fp32; one rounding to the dtype of x; the
product with weight is rounded again. This is `GlmRMSNorm` / `Glm4RMSNorm` of transformers. With
rounding="fp32" only y is rounded.

`rms_norm_quantized` gives y in int8 or float8_e4m3fn, rounded from what y would hold (with "fp32":
before its rounding) as `quantize_rows` says.

Bytes moved: rows * N * (itemsize of x + of y) + N * itemsize, and 4 a scale; nothing else, so the
floor is that over the memory bandwidth.
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
    register_op,
    strided_rows,
)
from glm4_kernels.quantize_rows import (
    check_quantize_rows,
    empty_quantized,
    quantize_rows,
    store_quantised,
)
from glm4_kernels.rounding import Rounding, check_rounding, round_as_hf
from glm4_kernels.triton_import import tl, triton

# One program holds one row in registers: 32K fp32 values over 16 warps are 64 registers a thread
# (the fused norms then spill; at 16K nothing does, and the widest GLM-4 has 6144).
MAX_COLS = 32768


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, rounding: Rounding = "hf") -> Tensor:
    return normalised(x, weight, eps, rounding).to(x.dtype)


def rms_norm_quantized_reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None = None,
    rounding: Rounding = "hf",
) -> tuple[Tensor, Tensor]:
    return quantize_rows(normalised(x, weight, eps, rounding), dtype, group_size)


def normalised(x: Tensor, weight: Tensor, eps: float, rounding: Rounding) -> Tensor:
    """The norm of x: in the dtype of weight, rounded as HF does, or in fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (y.to(weight.dtype) if rounding == "hf" else y)


@triton.jit
def rms_normalise(x, weight, n_cols, eps, HF_ROUNDING: tl.constexpr):
    """The norm of x, in fp32 as x is, rounded where HF rounds; x is 0 past n_cols."""
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / n_cols + eps)
    y = weight.to(tl.float32) * round_as_hf(x * rstd, weight.dtype, HF_ROUNDING)
    return round_as_hf(y, weight.dtype, HF_ROUNDING)


@triton.jit
def store_row(y_ptr, scale_ptr, y, row, cols, n_cols, GROUP: tl.constexpr):
    """Stores one row in the dtype of y_ptr, quantised where there are scales."""
    if scale_ptr is not None:
        store_quantised(y_ptr, scale_ptr, y, row, n_cols, GROUP)
    else:
        tl.store(y_ptr + row * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=cols < n_cols)


@triton.jit
def _rms_norm_kernel(
    y_ptr,
    scale_ptr,
    x_ptr,
    weight_ptr,
    stride_x_row,
    n_cols,
    eps,
    HF_ROUNDING: tl.constexpr,
    PDL: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = norm(x), one row a program."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < n_cols

    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    wait_for_producers(PDL)
    x = tl.load(x_ptr + row * stride_x_row + cols, mask=mask, other=0.0).to(tl.float32)
    issue_loads()

    y = rms_normalise(x, weight, n_cols, eps, HF_ROUNDING)

    store_row(y_ptr, scale_ptr, y, row, cols, n_cols, GROUP)


def row_warps(block_n: int) -> int:
    """Warps for one row of `block_n` values: 16 bytes a thread a load, two loads of each input.

    Derived, not measured yet. Of 4.3 TB/s half is read, 16 bytes a nanosecond on each of 132 SMs:
    at a latency of about 1 us 16 KB must be on their way to an SM. Two loads keep 98 KB to 147 KB
    there while programs load, in programs of eight warps at different stages; with one load in 16
    warps it would be two thirds of that. A row alone on its SM is bound by latency: all loads are
    under way at once, then comes one reduction a norm (shuffles, one exchange through shared
    memory) and, of N = 4096, 16 values a thread. The same for any number of rows, so that the bits
    of a row do not depend on its neighbours.
    """
    return min(max(block_n // 512, 1), 16)


def row_tiles(n_cols: int, group_size: int | None) -> dict[str, int]:
    """The keywords that all kernels over rows take: tiles and warps."""
    block_n = triton.next_power_of_2(n_cols)
    return {"GROUP": group_size or block_n, "BLOCK_N": block_n, "num_warps": row_warps(block_n)}


def launch_rms_norm(
    x: Tensor, weight: Tensor, eps: float, rounding: Rounding = "hf", pdl: bool = False
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(y, None, x, weight, eps, None, rounding, pdl)
    return y


def launch_rms_norm_quantized(
    x: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None = None,
    rounding: Rounding = "hf",
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    y, scale = empty_quantized(x, dtype, group_size)
    _launch(y, scale, x, weight, eps, group_size, rounding, pdl)
    return y, scale


def _launch(
    y: Tensor,
    scale: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int | None,
    rounding: Rounding,
    pdl: bool,
) -> None:
    if x.numel() == 0:
        return
    n_cols = x.shape[-1]
    rows = as_rows(x)

    _rms_norm_kernel[(rows.shape[0],)](
        y,
        scale,
        rows,
        weight.contiguous(),
        rows.stride(0),
        n_cols,
        eps,
        HF_ROUNDING=rounding == "hf",
        enable_fp_fusion=False,  # else the bits would depend on Triton's default
        **row_tiles(n_cols, group_size),
        **dependent(pdl),
    )


def rms_norm_cpu(
    x: Tensor, weight: Tensor, eps: float, rounding: Rounding = "hf", variant: str = ""
) -> Tensor:
    """The C++ kernel; `variant`: one of build_info()["simd_variants"], by default the best."""
    return norm_cpu(x, None, None, weight, eps, None, None, rounding, variant)[0]


def rms_norm_quantized_cpu(
    x: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None = None,
    rounding: Rounding = "hf",
    variant: str = "",
) -> tuple[Tensor, ...]:
    """The C++ kernel; `variant`: one of build_info()["simd_variants"], by default the best."""
    return norm_cpu(x, None, None, weight, eps, dtype, group_size, rounding, variant)


def norm_cpu(
    x: Tensor,
    residual: Tensor | None,
    post_weight: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype | None,
    group_size: int | None,
    rounding: Rounding,
    variant: str,
) -> tuple[Tensor, ...]:
    """The C++ kernel of all the norms: y, or with a dtype q and its scale; then residual', where
    there is a residual."""
    n_cols = x.shape[-1]
    rows, stride = strided_rows(x)
    weights = [None if w is None else w.contiguous() for w in (post_weight, weight)]
    residual_rows, stride_residual = (None, 0) if residual is None else strided_rows(residual)
    y, scale = x.new_empty(x.shape), None
    if dtype is not None:
        y, scale = empty_quantized(x, dtype, group_size)
    residual_out = None if residual is None else x.new_empty(x.shape)
    extension().norm_cpu(
        *map(buffer, (y, scale, residual_out, rows, residual_rows, *weights)),
        DTYPE_CODES[x.dtype],
        DTYPE_CODES[y.dtype],
        rounding == "hf",
        y.numel() // n_cols,
        n_cols,
        group_size or n_cols,
        stride,
        stride_residual,
        eps,
        torch.get_num_threads(),
        variant,
    )
    return tuple(output for output in (y, scale, residual_out) if output is not None)


def check_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    rounding: Rounding = "hf",
    op: str = "rms_norm",
    weight_name: str = "weight",
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
    check_rounding(op, rounding)


def check_rms_norm_quantized(
    x: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None = None,
    rounding: Rounding = "hf",
) -> None:
    check_rms_norm(x, weight, eps, rounding, op="rms_norm_quantized")
    check_quantize_rows("rms_norm_quantized", x, dtype, group_size)


_rms_norm = register_op(
    'rms_norm(Tensor x, Tensor weight, float eps, str rounding="hf") -> Tensor',
    check=check_rms_norm,
    reference=rms_norm_reference,
    launch=launch_rms_norm,
    cpu=rms_norm_cpu if HAS_EXTENSION else None,
    fake=lambda x, *_: x.new_empty(x.shape),
)

_rms_norm_quantized = register_op(
    "rms_norm_quantized(Tensor x, Tensor weight, float eps, ScalarType dtype, "
    'int? group_size=None, str rounding="hf") -> (Tensor, Tensor)',
    check=check_rms_norm_quantized,
    reference=rms_norm_quantized_reference,
    launch=launch_rms_norm_quantized,
    cpu=rms_norm_quantized_cpu if HAS_EXTENSION else None,
    fake=lambda x, weight, eps, dtype, group_size=None, *_: empty_quantized(x, dtype, group_size),
)


def rms_norm(x: Tensor, weight: Tensor, eps: float, rounding: Rounding = "hf") -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich, 2019).

    Args:
        x: [..., N], float32, bfloat16 or float16; any strides; N at most 32768.
        weight: [N], dtype and device of x.
        eps: added to the mean square.
        rounding: "hf": where transformers rounds; "fp32": the result only.

    Returns:
        [..., N], contiguous, dtype of x.

    Raises:
        ValueError: shapes, device, eps or rounding are wrong. TypeError: a dtype is.
    """
    return _rms_norm(x, weight, eps, rounding)


def rms_norm_quantized(
    x: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None = None,
    rounding: Rounding = "hf",
) -> tuple[Tensor, Tensor]:
    """`rms_norm`, its result quantised for the matmul that follows.

    Args:
        x, weight, eps, rounding: as for `rms_norm`.
        dtype: torch.int8, or torch.float8_e4m3fn (on CUDA from sm_89).
        group_size: columns that share a scale: 32, 64 or 128, a divisor of N; None: all N.

    Returns:
        (q, scale): q [..., N] of dtype and fp32 scale [..., N / group_size], or [..., 1], both
        contiguous; q * scale is about the norm. A group that holds a NaN or an infinity has that
        as its scale, and q = 0.

    Raises:
        ValueError: shapes, device, eps, group_size or rounding are wrong. TypeError: a dtype is.
    """
    return _rms_norm_quantized(x, weight, eps, dtype, group_size, rounding)
