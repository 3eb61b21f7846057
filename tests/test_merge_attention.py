from __future__ import annotations

import math

import pytest
import torch
from kernels import each_kernel, each_kernel_and_dtype
from numerics import assert_bitwise_equal, assert_within_rule

import glm4_kernels as gk
from glm4_kernels.merge_attention import (
    MAX_HEAD_DIM,
    launch_merge_attention,
    merge_attention_cpu,
    merge_attention_reference,
)

SHAPES = [
    (1, 32, 128),  # one token of GLM-4-9B
    (3, 5, 64),  # rows that do not fill the last program
    (7, 2, 80),  # not a power of two
    (2, 3, 2, 128),  # leading dimensions
    (4, 1, 1),  # one column
]


def inputs(shape, dtype, device):
    """Sides of comparable weight, side a first far lighter, then far heavier than side b."""
    out_a, out_b = torch.randn(2, *shape).to(dtype).to(device)
    lse_a, lse_b = torch.randn(2, *shape[:-1])
    lse_a[0] -= 30
    lse_a[-1] += 30
    return out_a, lse_a.to(device), out_b, lse_b.to(device)


def oracle(out_a, lse_a, out_b, lse_b):
    """fp64, one row at a time: the softmax of the two lse weighs the two sides."""
    size = out_a.shape[-1]
    sides = torch.stack([out_a, out_b]).double().cpu().reshape(2, -1, size)
    lses = torch.stack([lse_a, lse_b]).double().cpu().reshape(2, -1)
    out = torch.zeros(sides.shape[1:]).double()
    for row in range(sides.shape[1]):
        for side, weight in zip(sides[:, row], lses[:, row].softmax(0), strict=True):
            if weight > 0:  # false for NaN too: two empty sides
                out[row] += weight * side
    return out.reshape(out_a.shape), lses.logsumexp(0).reshape(lse_a.shape)


def check(kernel, *sides):
    (out, lse), (true_out, true_lse) = kernel(*sides), oracle(*sides)
    reference_out, reference_lse = merge_attention_reference(*sides)
    assert_within_rule(out, reference_out, true_out)
    assert lse.dtype == torch.float32 and out.is_contiguous() and lse.is_contiguous()
    for actual in (lse, reference_lse):
        # Two fp32 roundings of m and of log(total), each at most eps / 2 of max(|lse|, log 2).
        torch.testing.assert_close(actual.cpu().double(), true_lse, rtol=2e-7, atol=2e-7)


@each_kernel_and_dtype(launch_merge_attention, merge_attention_cpu)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, kernel, dtype):
    check(kernel, *inputs(shape, dtype, kernel.device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_matches_fp64(dtype):
    sides = inputs((6, 4, 64), dtype, "cpu")
    out, lse = gk.merge_attention(*sides)
    truth, true_lse = oracle(*sides)
    # One rounding to the dtype after a handful of fp32 operations.
    allowed = torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
    assert ((out - truth).abs() <= allowed * truth.abs().amax(-1, keepdim=True)).all()
    torch.testing.assert_close(lse.double(), true_lse, rtol=2e-7, atol=2e-7)


@each_kernel(launch_merge_attention, merge_attention_cpu)
def test_layouts(kernel):
    out_a, lse_a, out_b, lse_b = inputs((6, 4, 64), torch.float16, kernel.device)
    by_head = out_a.transpose(0, 1).contiguous().transpose(0, 1)  # as SDPA returns it
    wide = torch.cat([out_b, out_b], dim=-1)[..., 64:]
    check(kernel, by_head, lse_a.t().contiguous().t(), wide, lse_b)
    check(kernel, out_a, lse_a, out_b[:1].expand(6, 4, 64), lse_b[:1].expand(6, 4))
    check(kernel, out_a.mT, lse_a.new_ones(6, 64), out_b.mT, lse_b.new_zeros(6, 64))


@pytest.mark.parametrize("empty", ["a", "b", "both"])
@each_kernel_and_dtype(launch_merge_attention, merge_attention_cpu)
def test_an_empty_side_is_ignored_whatever_it_holds(empty, kernel, dtype):
    out_a, lse_a, out_b, lse_b = inputs((4, 2, 64), dtype, kernel.device)
    row = (1, 1)
    for name, out, lse in (("a", out_a, lse_a), ("b", out_b, lse_b)):
        if empty in (name, "both"):
            out[row], lse[row] = math.nan, -math.inf
    check(kernel, out_a, lse_a, out_b, lse_b)
    for merge in (launch_merge_attention, merge_attention_reference):
        out, lse = merge(out_a, lse_a, out_b, lse_b)
        if empty == "both":
            assert (out[row] == 0).all() and lse[row] == -math.inf
        else:
            kept_out, kept_lse = (out_b, lse_b) if empty == "a" else (out_a, lse_a)
            assert_bitwise_equal(out[row], kept_out[row])
            assert_bitwise_equal(lse[row], kept_lse[row])


@each_kernel(launch_merge_attention, merge_attention_cpu)
def test_edges(kernel):
    nothing = torch.empty(0, 4, 64, device=kernel.device)
    out, lse = kernel(nothing, nothing[..., 0], nothing, nothing[..., 0])
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)
    check(kernel, *inputs((2, 1, MAX_HEAD_DIM), torch.float32, kernel.device))


ROW = torch.ones(2, 4, 8)
LSE = torch.zeros(2, 4)


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"out_a must be \[\.\.\., H, D\], got \[8\]", {"out_a": torch.ones(8)}),
        (ValueError, r"out_a must be .* 1 <= D <= 1024", {"out_a": torch.ones(2, 4, 1025)}),
        (TypeError, r"out_a must be float32, bfloat16 or", {"out_a": ROW.int()}),
        (ValueError, r"out_b must be \[2, 4, 8\], got \[2, 4, 7\]", {"out_b": ROW[..., :7]}),
        (TypeError, r"out_b must be torch.float32, got torch.float16", {"out_b": ROW.half()}),
        (ValueError, r"out_b must be on cpu", {"out_b": ROW.to("meta")}),
        (ValueError, r"lse_a must be \[2, 4\], got \[2, 3\]", {"lse_a": LSE[:, :3]}),
        (TypeError, r"lse_a must be torch.float32", {"lse_a": LSE.half()}),
        (ValueError, r"lse_b must be \[2, 4\], got \[4\]", {"lse_b": LSE[0]}),
        (TypeError, r"lse_b must be torch.float32", {"lse_b": LSE.double()}),
        (ValueError, r"lse_b must be on cpu", {"lse_b": LSE.to("meta")}),
        (RuntimeError, r"out_b requires grad", {"out_b": ROW.clone().requires_grad_()}),
    ],
)
def test_rejects(error, message, change):
    arguments = {"out_a": ROW, "lse_a": LSE, "out_b": ROW, "lse_b": LSE}
    gk.merge_attention(**arguments)
    with pytest.raises(error, match=f"^merge_attention: {message}"):
        gk.merge_attention(**(arguments | change))
