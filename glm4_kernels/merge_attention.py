"""Two partial attentions of the same queries over disjoint keys, merged into one.

    w_a = exp(lse_a - m)    w_b = exp(lse_b - m)    m = max(lse_a, lse_b)
    out = (w_a out_a + w_b out_b) / (w_a + w_b)     lse = m + log(w_a + w_b)

A side with lse = -inf saw no key: its `out` is ignored, whatever it holds; with both sides empty,
out = 0 and lse = -inf. fp32 arithmetic, one rounding to the dtype of out.

Bytes moved: rows * (3 * D * itemsize + 12), a row being one head of one token; nothing else, so
the floor is that over the memory bandwidth.
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
    register_op,
    strided_rows,
)
from glm4_kernels.triton_import import tl, triton

MAX_HEAD_DIM = 1024


def merge_attention_reference(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(out_a.dtype, torch.float32)
    m = torch.maximum(lse_a, lse_b)
    m = m.where(m > -torch.inf, 0.0)
    w_a, w_b = torch.exp(lse_a - m)[..., None], torch.exp(lse_b - m)[..., None]
    total = w_a + w_b
    a = torch.where(w_a == 0, 0.0, w_a * out_a.to(compute))
    b = torch.where(w_b == 0, 0.0, w_b * out_b.to(compute))
    out = (a + b) / total.where(total > 0, 1.0)
    return out.to(out_a.dtype), m + torch.log(total[..., 0])


@triton.jit
def _merge_attention_kernel(
    out_ptr,
    lse_ptr,
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    stride_a_row,
    stride_b_row,
    n_rows,
    head_dim,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = (w_a out_a + w_b out_b) / (w_a + w_b), w = exp(lse - max lse); BLOCK_R rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask = rows < n_rows
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < head_dim

    lse_a = tl.load(lse_a_ptr + rows, mask=row_mask, other=float("-inf"))
    lse_b = tl.load(lse_b_ptr + rows, mask=row_mask, other=float("-inf"))
    m = tl.maximum(lse_a, lse_b)
    m_finite = tl.where(m == float("-inf"), 0.0, m)
    w_a = tl.exp(lse_a - m_finite)
    w_b = tl.exp(lse_b - m_finite)
    total = w_a + w_b
    total = tl.where(total == 0.0, 1.0, total)

    a_mask = (w_a != 0.0)[:, None] & dim_mask[None, :]
    b_mask = (w_b != 0.0)[:, None] & dim_mask[None, :]
    a_ptrs = out_a_ptr + rows[:, None] * stride_a_row + dims[None, :]
    b_ptrs = out_b_ptr + rows[:, None] * stride_b_row + dims[None, :]
    a = tl.load(a_ptrs, mask=a_mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptrs, mask=b_mask, other=0.0).to(tl.float32)
    out = (w_a[:, None] * a + w_b[:, None] * b) / total[:, None]

    out_ptrs = out_ptr + rows[:, None] * head_dim + dims[None, :]
    out_mask = row_mask[:, None] & dim_mask[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=out_mask)
    tl.store(lse_ptr + rows, m + tl.log(total), mask=row_mask)


def launch_merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=out_a.device)
    if out.numel() == 0:
        return out, lse
    rows_a, rows_b = as_rows(out_a), as_rows(out_b)
    n_rows, head_dim = rows_a.shape
    block_d = triton.next_power_of_2(head_dim)
    # Two 16-byte bf16 loads a thread and side; one token of 32 heads still makes four programs.
    block_r = max(1024 // block_d, 1)

    _merge_attention_kernel[(triton.cdiv(n_rows, block_r),)](
        out,
        lse,
        rows_a,
        lse_a.contiguous(),
        rows_b,
        lse_b.contiguous(),
        rows_a.stride(0),
        rows_b.stride(0),
        n_rows,
        head_dim,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=2,
    )
    return out, lse


def merge_attention_cpu(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, variant: str = ""
) -> tuple[Tensor, Tensor]:
    """The C++ kernel; `variant`: one of build_info()["simd_variants"], by default the best."""
    out = torch.empty_like(out_a, memory_format=torch.contiguous_format)
    lse = torch.empty_like(lse_a, memory_format=torch.contiguous_format)
    rows_a, stride_a = strided_rows(out_a)
    rows_b, stride_b = strided_rows(out_b)
    lse_a, lse_b = lse_a.contiguous(), lse_b.contiguous()
    extension().merge_attention_cpu(
        buffer(out),
        buffer(lse),
        buffer(rows_a),
        buffer(lse_a),
        buffer(rows_b),
        buffer(lse_b),
        DTYPE_CODES[out.dtype],
        lse.numel(),
        out.shape[-1],
        stride_a,
        stride_b,
        torch.get_num_threads(),
        variant,
    )
    return out, lse


def check_merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, op: str = "merge_attention"
) -> None:
    if out_a.dim() < 2:
        raise bad_value(op, "out_a", "[..., H, D]", list(out_a.shape))
    if out_a.dtype not in FLOAT_DTYPES:
        raise bad_type(op, "out_a", "float32, bfloat16 or float16", out_a.dtype)
    if not 1 <= out_a.shape[-1] <= MAX_HEAD_DIM:
        expected = f"[..., H, D] with 1 <= D <= {MAX_HEAD_DIM}"
        raise bad_value(op, "out_a", expected, list(out_a.shape))
    if out_b.shape != out_a.shape:
        raise bad_value(op, "out_b", list(out_a.shape), list(out_b.shape))
    if out_b.dtype != out_a.dtype:
        raise bad_type(op, "out_b", out_a.dtype, out_b.dtype)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.shape != out_a.shape[:-1]:
            raise bad_value(op, name, list(out_a.shape[:-1]), list(lse.shape))
        if lse.dtype != torch.float32:
            raise bad_type(op, name, torch.float32, lse.dtype)
    for name, tensor in (("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        if tensor.device != out_a.device:
            raise bad_value(op, name, f"on {out_a.device}", tensor.device)


_merge_attention = register_op(
    "merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    check=check_merge_attention,
    reference=merge_attention_reference,
    launch=launch_merge_attention,
    cpu=merge_attention_cpu if HAS_EXTENSION else None,
    fake=lambda out_a, lse_a, *_: (out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)),
)


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Merges two attentions of the same queries over disjoint keys (Milakov & Gimelshein, 2018).

    Args:
        out_a, out_b: [..., H, D], float32, bfloat16 or float16; any strides; D at most 1024.
        lse_a, lse_b: [..., H] float32, natural log; -inf where a side saw no key.

    Returns:
        out [..., H, D], dtype of out_a, and lse [..., H] float32, both contiguous.

    Raises:
        ValueError: shapes or devices are wrong. TypeError: a dtype is.
    """
    return _merge_attention(out_a, lse_a, out_b, lse_b)
