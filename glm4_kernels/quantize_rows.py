"""Rows in int8 or float8_e4m3fn with a scale per group of columns: what the norms can write for
the matmul that follows, and what `quantized_matmul` makes of its activations.

    s = max|y| / limit        q = round_half_even(y * (1 / s))        y ~ s * q

over each group of `group_size` columns, or over the row; limit is 127 for int8, 448 for
float8_e4m3fn, whose q has four significant bits.

Rounding points: s, 1 / s, y * (1 / s) and q; q = 0 where s is not a normal number, so that a NaN
or an infinity shows as the scale of its group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4_kernels.library import bad_type, bad_value, check_fp8
from glm4_kernels.triton_import import tl, triton

# The largest magnitude that each dtype represents.
QUANTISED_LIMIT = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
GROUP_SIZES = (32, 64, 128)


def quantize_rows(y: Tensor, dtype: torch.dtype, group_size: int | None) -> tuple[Tensor, Tensor]:
    """y [..., N] -> q [..., N] of dtype, scale [..., ceil(N / group_size)]; the last group of a row
    may be shorter. Scales are fp32, or fp64 where y is."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    n_cols = y.shape[-1]
    group = group_size or n_cols
    groups = torch.nn.functional.pad(wide, (0, -n_cols % group)).unflatten(-1, (-1, group))
    limit = QUANTISED_LIMIT[dtype]
    amax = groups.abs().amax(-1)
    scale = amax / torch.full_like(amax, limit)  # by a number, CUDA would multiply by 1 / limit
    usable = (scale >= torch.finfo(torch.float32).tiny) & scale.isfinite()
    steps_in_one = (1.0 / torch.where(usable, scale, 1.0)).unsqueeze(-1)
    q = torch.where(usable.unsqueeze(-1), groups * steps_in_one, 0.0).clamp(-limit, limit)
    q = q.round() if dtype == torch.int8 else q
    return q.to(dtype).flatten(-2)[..., :n_cols], scale


@triton.jit
def store_quantised(q_ptr, scale_ptr, y, row, n_cols, GROUP: tl.constexpr):
    """Stores one row, y in fp32 and 0 past n_cols, as q and its scales."""
    BLOCK_N: tl.constexpr = y.shape[0]
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    LIMIT: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    groups = tl.reshape(y, (BLOCK_N // GROUP, GROUP))

    # Bits of non-negative floats are ordered as the floats are, NaN above infinity; tl.max of the
    # floats would skip a NaN.
    amax = tl.max(tl.abs(groups).to(tl.int32, bitcast=True), axis=1, keep_dims=True)
    scale = tl.div_rn(amax.to(tl.float32, bitcast=True), LIMIT)
    usable = (scale >= 1.1754943508222875e-38) & (scale < float("inf"))
    q = tl.where(usable, groups * tl.div_rn(1.0, tl.where(usable, scale, 1.0)), 0.0)
    q = tl.minimum(tl.maximum(q, -LIMIT), LIMIT)
    if dtype == tl.int8:
        q = (q + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum rounds half to even

    group = tl.arange(0, BLOCK_N // GROUP)
    n_groups = tl.cdiv(n_cols, GROUP)
    scale = tl.reshape(scale, (BLOCK_N // GROUP,))
    tl.store(scale_ptr + row * n_groups + group, scale, mask=group < n_groups)

    # Eight columns a thread, as y was loaded: for 16 of one byte each, which Triton would choose,
    # every value would change its thread by way of shared memory.
    WIDTH: tl.constexpr = 8 if BLOCK_N >= 8 else BLOCK_N
    cols = tl.arange(0, BLOCK_N // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    q = tl.reshape(q.to(dtype), (BLOCK_N // WIDTH, WIDTH))
    tl.store(q_ptr + row * n_cols + cols, q, mask=cols < n_cols)


def empty_quantized(x: Tensor, dtype: torch.dtype, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Memory for q and the scales of rows like x."""
    n_groups = x.shape[-1] // group_size if group_size else 1
    scale = x.new_empty((*x.shape[:-1], n_groups), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), scale


def check_quantize_rows(op: str, x: Tensor, dtype: torch.dtype, group_size: int | None) -> None:
    if dtype not in QUANTISED_LIMIT:
        raise bad_type(op, "dtype", "int8 or float8_e4m3fn", dtype)
    if group_size is not None and (group_size not in GROUP_SIZES or x.shape[-1] % group_size):
        expected = f"None or one of {GROUP_SIZES} that divides {x.shape[-1]}"
        raise bad_value(op, "group_size", expected, group_size)
    check_fp8(op, "dtype", dtype, x.device)
