"""Two partial attentions of the same queries over disjoint keys, merged into one.

    w_a = exp(lse_a - m)    w_b = exp(lse_b - m)    m = max(lse_a, lse_b)
    out = (w_a out_a + w_b out_b) / (w_a + w_b)     lse = m + log(w_a + w_b)

A side with lse = -inf saw no key: its `out` is ignored, whatever it holds; with both sides empty,
out = 0 and lse = -inf. fp32 arithmetic, one rounding to the dtype of out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4_kernels.library import bad_type, bad_value, register_op

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


def check_merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, op: str = "merge_attention"
) -> None:
    if out_a.dim() < 2:
        raise bad_value(op, "out_a", "[..., H, D]", list(out_a.shape))
    if out_a.dtype not in FLOAT_DTYPES:
        raise bad_type(op, "out_a", "float32, bfloat16 or float16", out_a.dtype)
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
    launch=None,
    fake=lambda out_a, lse_a, *_: (out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)),
)


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Merges two attentions over disjoint keys by their log-sum-exp."""
    return _merge_attention(out_a, lse_a, out_b, lse_b)
