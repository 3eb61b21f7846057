"""Rotary position embedding of queries and keys, in interleaved pairs on the first dims of a head.

    (y_2i, y_2i+1) = (x_2i * c_i - x_2i+1 * s_i,  x_2i+1 * c_i + x_2i * s_i)    i < rotary_dim / 2
    y_d            = x_d                                                        d >= rotary_dim

with (c, s) the row of the table (`rope_table`) at the token's position p.

Rounding points: each product is rounded to the table's dtype, their sum to the dtype of x. With a
table in the dtype of x that is `apply_rotary_pos_emb` of transformers' glm and glm4 modules; with
a float32 table everything is computed in fp32 and rounded once.

Bytes moved: 2 * T * (H + G) * D * itemsize + T * (rotary_dim * itemsize of the table + 8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4_kernels.dependent_launch import dependent, issue_loads, wait_for_producers
from glm4_kernels.extension import DTYPE_CODES, HAS_EXTENSION, buffer, extension
from glm4_kernels.library import (
    FLOAT_DTYPES,
    bad_type,
    bad_value,
    error_flag,
    multiprocessor_count,
    register_op,
)
from glm4_kernels.triton_import import tl, triton

MAX_HEAD_DIM = 256
INDEX_DTYPES = (torch.int32, torch.int64)


def rope_reference(q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = table[positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, rotary_dim / 2]
    rotary_dim = table.shape[1]

    def rotate(x: Tensor) -> Tensor:
        x0, x1 = x[..., :rotary_dim:2], x[..., 1:rotary_dim:2]
        pairs = torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), dim=-1)
        return torch.cat((pairs.flatten(-2).to(x.dtype), x[..., rotary_dim:]), dim=-1)

    return rotate(q), rotate(k)


@triton.jit
def load_rotation(
    positions_ptr,
    table_ptr,
    error_ptr,
    token,
    stride_table_row,
    n_positions,
    ROTARY_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """c, s [BLOCK_D / 2] at the token's position, and whether it is in range; flagged if not."""
    position = tl.load(positions_ptr + token).to(tl.int64)
    known = (position >= 0) & (position < n_positions)
    tl.store(error_ptr, 1, mask=known == 0)

    pair = tl.arange(0, BLOCK_D // 2)
    mask = pair < tl.where(known, ROTARY_DIM // 2, 0)
    row_ptr = table_ptr + position * stride_table_row
    cos = tl.load(row_ptr + pair, mask=mask, other=0.0)
    sin = tl.load(row_ptr + ROTARY_DIM // 2 + pair, mask=mask, other=0.0)
    return cos, sin, known


@triton.jit
def rotate_pairs(x, cos, sin, ROTARY_DIM: tl.constexpr):
    """The rotation of x [heads, D]; products rounded to the table's dtype, sums to that of x."""
    x0, x1 = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    a, b = x0.to(tl.float32), x1.to(tl.float32)
    c, s = cos.to(tl.float32), sin.to(tl.float32)

    y0 = (a * c).to(cos.dtype).to(tl.float32) - (b * s).to(cos.dtype).to(tl.float32)
    y1 = (b * c).to(cos.dtype).to(tl.float32) + (a * s).to(cos.dtype).to(tl.float32)
    turns = tl.arange(0, x.shape[1] // 2) < ROTARY_DIM // 2
    y0 = tl.where(turns, y0.to(x.dtype), x0)
    y1 = tl.where(turns, y1.to(x.dtype), x1)

    return tl.reshape(tl.join(y0, y1), x.shape)


@triton.jit
def _rotate_heads(
    y_ptr,
    x_ptr,
    first_head,
    n_heads,
    stride_x_head,
    error_ptr,
    positions_ptr,
    table_ptr,
    token,
    stride_table_row,
    n_positions,
    ROTARY_DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_H heads of one token, at x_ptr and y_ptr; zeros where the position is not known."""
    head = first_head.to(tl.int64) + tl.arange(0, BLOCK_H)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < n_heads) & (dim < HEAD_DIM)

    x = tl.load(x_ptr + head * stride_x_head + dim, mask=mask, other=0.0)
    cos, sin, known = load_rotation(
        positions_ptr, table_ptr, error_ptr, token, stride_table_row, n_positions,
        ROTARY_DIM, BLOCK_D,
    )  # fmt: skip
    issue_loads()

    y = tl.where(known, rotate_pairs(x, cos, sin, ROTARY_DIM), 0.0)

    tl.store(y_ptr + head * HEAD_DIM + dim, y.to(x.dtype), mask=mask)


@triton.jit
def _rope_kernel(
    q_out_ptr,
    k_out_ptr,
    error_ptr,
    q_ptr,
    k_ptr,
    positions_ptr,
    table_ptr,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_table_row,
    n_positions,
    n_q_heads,
    n_k_heads,
    PDL: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rotates BLOCK_H heads of q, or of k, of one token a program."""
    n_q_blocks = tl.cdiv(n_q_heads, BLOCK_H)
    n_blocks = n_q_blocks + tl.cdiv(n_k_heads, BLOCK_H)
    token = (tl.program_id(0) // n_blocks).to(tl.int64)
    block = tl.program_id(0) % n_blocks
    wait_for_producers(PDL)

    if block < n_q_blocks:
        _rotate_heads(
            q_out_ptr + token * n_q_heads * HEAD_DIM, q_ptr + token * stride_q_token,
            block * BLOCK_H, n_q_heads, stride_q_head,
            error_ptr, positions_ptr, table_ptr, token, stride_table_row, n_positions,
            ROTARY_DIM, HEAD_DIM, BLOCK_H, BLOCK_D,
        )  # fmt: skip
    else:
        _rotate_heads(
            k_out_ptr + token * n_k_heads * HEAD_DIM, k_ptr + token * stride_k_token,
            (block - n_q_blocks) * BLOCK_H, n_k_heads, stride_k_head,
            error_ptr, positions_ptr, table_ptr, token, stride_table_row, n_positions,
            ROTARY_DIM, HEAD_DIM, BLOCK_H, BLOCK_D,
        )  # fmt: skip


def head_block(n_tokens: int, n_heads: int, multiprocessors: int) -> int:
    """Heads of one program, which share one read of the table: the most that still give every
    multiprocessor four programs.

    Not measured yet; two heads of 128 bf16 values are 16 bytes a thread of one warp.
    """
    for block_h in (16, 8, 4):
        if n_tokens * triton.cdiv(n_heads, block_h) >= 4 * multiprocessors:
            return block_h
    return 2


def head_warps(block_h: int, block_d: int) -> int:
    """Warps for one tile of heads: 16 values a thread, two 16-byte loads of bf16."""
    return max(block_h * block_d // 512, 1)


def launch_rope(
    q: Tensor, k: Tensor, positions: Tensor, table: Tensor, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    n_tokens, n_q_heads, head_dim = q.shape
    n_k_heads = k.shape[1]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if q.numel() + k.numel() == 0:
        return q_out, k_out
    q = q if q.stride(2) == 1 else q.contiguous()
    k = k if k.stride(2) == 1 else k.contiguous()
    table = table if table.stride(1) == 1 else table.contiguous()
    block_h = head_block(n_tokens, n_q_heads + n_k_heads, multiprocessor_count(q.device))
    block_d = triton.next_power_of_2(head_dim)
    n_blocks = triton.cdiv(n_q_heads, block_h) + triton.cdiv(n_k_heads, block_h)

    _rope_kernel[(n_tokens * n_blocks,)](
        q_out,
        k_out,
        error_flag("rope", q.device),
        q,
        k,
        positions.contiguous(),
        table,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        table.stride(0),
        table.shape[0],
        n_q_heads,
        n_k_heads,
        ROTARY_DIM=table.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=head_warps(block_h, block_d),
        enable_fp_fusion=False,  # a fused multiply-add would skip the rounding of a product
        **dependent(pdl),
    )
    return q_out, k_out


def rope_cpu(
    q: Tensor, k: Tensor, positions: Tensor, table: Tensor, variant: str = ""
) -> tuple[Tensor, Tensor]:
    """The C++ kernel; `variant`: one of build_info()["simd_variants"], by default the best."""
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    q = q if q.stride(2) == 1 else q.contiguous()
    k = k if k.stride(2) == 1 else k.contiguous()
    table = table if table.stride(1) == 1 else table.contiguous()
    positions = positions.contiguous()
    wrong = extension().rope_cpu(
        buffer(q_out),
        buffer(k_out),
        buffer(q),
        buffer(k),
        buffer(positions),
        buffer(table),
        DTYPE_CODES[q.dtype],
        DTYPE_CODES[table.dtype],
        positions.itemsize,
        *q.shape[:2],
        *k.shape[1:],
        *table.shape,
        *q.stride()[:2],
        *k.stride()[:2],
        table.stride(0),
        torch.get_num_threads(),
        variant,
    )
    if wrong:
        check_positions("rope", positions, table)
    return q_out, k_out


def check_rope(q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> None:
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 3:
            raise bad_value("rope", name, "[T, heads, D]", list(x.shape))
    if q.dtype not in FLOAT_DTYPES:
        raise bad_type("rope", "q", "float32, bfloat16 or float16", q.dtype)
    n_tokens, _, head_dim = q.shape
    if (k.shape[0], k.shape[2]) != (n_tokens, head_dim):
        raise bad_value("rope", "k", f"[{n_tokens}, G, {head_dim}]", list(k.shape))
    if k.dtype != q.dtype:
        raise bad_type("rope", "k", q.dtype, k.dtype)
    if k.device != q.device:
        raise bad_value("rope", "k", f"on {q.device}", k.device)
    check_rotation("rope", "q", q, head_dim, positions, table)


def check_rotation(
    op: str, name: str, x: Tensor, head_dim: int, positions: Tensor, table: Tensor
) -> None:
    """What `rope` and `rope_kv_write` ask of the head size, the positions and the table."""
    if head_dim % 16 != 0 or not 16 <= head_dim <= MAX_HEAD_DIM:
        expected = f"of head size D a multiple of 16, at most {MAX_HEAD_DIM}"
        raise bad_value(op, name, expected, head_dim)
    n_tokens = x.shape[0]
    if positions.shape != (n_tokens,):
        raise bad_value(op, "positions", f"[{n_tokens}]", list(positions.shape))
    if positions.dtype not in INDEX_DTYPES:
        raise bad_type(op, "positions", "int32 or int64", positions.dtype)
    rotary_dim = table.shape[1] if table.dim() == 2 else 0
    if rotary_dim % 2 != 0 or not 2 <= rotary_dim <= head_dim:
        expected = f"[max_positions, rotary_dim] with rotary_dim even and at most {head_dim}"
        raise bad_value(op, "table", expected, list(table.shape))
    if table.dtype not in (x.dtype, torch.float32):
        raise bad_type(op, "table", f"{x.dtype} or torch.float32", table.dtype)
    device = x.device
    for argument, tensor in (("positions", positions), ("table", table)):
        if tensor.device != device:
            raise bad_value(op, argument, f"on {device}", tensor.device)


def check_positions(op: str, positions: Tensor, table: Tensor) -> None:
    wrong = positions[(positions < 0) | (positions >= table.shape[0])]
    if wrong.numel():
        raise bad_value(op, "positions", f"in [0, {table.shape[0]})", wrong[0].item())


def check_rope_values(q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> None:
    check_positions("rope", positions, table)


_rope = register_op(
    "rope(Tensor q, Tensor k, Tensor positions, Tensor table) -> (Tensor, Tensor)",
    check=check_rope,
    check_values=check_rope_values,
    reference=rope_reference,
    launch=launch_rope,
    cpu=rope_cpu if HAS_EXTENSION else None,
    fake=lambda q, k, positions, table: (q.new_empty(q.shape), k.new_empty(k.shape)),
)


def rope(q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (RoFormer, Su et al., 2021) as GLM-4 applies it.

    Args:
        q: [T, H, D], float32, bfloat16 or float16; any strides (a view of a packed qkv).
        k: [T, G, D], dtype and device of q; any strides.
        positions: [T], int32 or int64, in [0, max_positions).
        table: [max_positions, rotary_dim] from `rope_table`, in the dtype of q (rounds as HF) or
            float32 (rounds once).

    Returns:
        (q, k), rotated, contiguous. On CUDA a token whose position is out of range gives zeros and
        sets the device's error flag (`raise_device_errors`).

    Raises:
        ValueError: shapes or devices are wrong, or on CPU a position. TypeError: a dtype is.
    """
    return _rope(q, k, positions, table)
