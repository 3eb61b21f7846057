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

from glm4_kernels.library import (
    DEVICE_CHECKED,
    FLOAT_DTYPES,
    bad_type,
    bad_value,
    error_flags,
    multiprocessor_count,
    register_op,
)
from glm4_kernels.triton_import import tl, triton

MAX_HEAD_DIM = 256


def rope_reference(
    q: Tensor, k: Tensor, positions: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    cos, sin = table[positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, rotary_dim / 2]
    rotary_dim = table.shape[1]

    def rotate(x: Tensor) -> Tensor:
        x0, x1 = x[..., :rotary_dim:2], x[..., 1:rotary_dim:2]
        pairs = torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), dim=-1)
        return torch.cat((pairs.flatten(-2).to(x.dtype), x[..., rotary_dim:]), dim=-1)

    return rotate(q), rotate(k)


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
    if positions.shape != x.shape[:1]:
        raise bad_value(op, "positions", f"[{x.shape[0]}]", list(positions.shape))
    if positions.dtype not in (torch.int32, torch.int64):
        raise bad_type(op, "positions", "int32 or int64", positions.dtype)
    if table.dim() != 2 or table.shape[1] % 2 != 0 or not 2 <= table.shape[1] <= head_dim:
        expected = f"[max_positions, rotary_dim] with rotary_dim even and at most {head_dim}"
        raise bad_value(op, "table", expected, list(table.shape))
    if table.dtype not in (x.dtype, torch.float32):
        raise bad_type(op, "table", f"{x.dtype} or torch.float32", table.dtype)
    for argument, tensor in (("positions", positions), ("table", table)):
        if tensor.device != x.device:
            raise bad_value(op, argument, f"on {x.device}", tensor.device)


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
    launch=None,
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
