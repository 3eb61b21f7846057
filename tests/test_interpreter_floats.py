"""What Triton's interpreter, as the tests patch it, computes in bf16: PyTorch's results."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_bitwise_equal

from glm4_kernels.triton_import import HAS_TRITON, tl, triton

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not HAS_TRITON, reason="no kernel is interpreted here"
)
BF16, N = torch.bfloat16, 1 << 16


@triton.jit
def _convert_kernel(out_ptr, x_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def _compute_kernel(out_ptr, a_ptr, b_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(out_ptr + at, a + b)
    tl.store(out_ptr + N + at, a - b)
    tl.store(out_ptr + 2 * N + at, a * b)
    tl.store(out_ptr + 3 * N + at, tl.where(a < b, a, b))
    tl.store(out_ptr + 4 * N + at, tl.maximum(-a, b))


@triton.jit
def _dot_kernel(out_ptr, a_ptr, b_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


def every_bf16() -> torch.Tensor:
    return torch.arange(-(N // 2), N // 2).to(torch.int16).view(BF16)


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    _convert_kernel[(1,)](out, x, N=len(x))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_from_every_bf16(dtype):
    assert_bitwise_equal(converted(every_bf16(), dtype), every_bf16().to(dtype))


@pytest.mark.parametrize("low_bits", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_fp32_rounds_half_to_even(low_bits):
    bits = (torch.arange(-(N // 2), N // 2, dtype=torch.int32) << 16) + low_bits
    x = bits.view(torch.float32)
    assert_bitwise_equal(converted(x, BF16), x.to(BF16))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float16])
def test_to_bf16(dtype):
    x = torch.arange(-128, 128).to(dtype)
    assert_bitwise_equal(converted(x, BF16), x.to(BF16))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of infinity and NaN
def test_arithmetic():
    a, b = every_bf16(), every_bf16()[torch.randperm(N)]
    out = torch.empty(5, N, dtype=BF16)
    _compute_kernel[(1,)](out, a, b, N=N)
    for actual, expected in zip(out, (a + b, a - b, a * b), strict=False):
        assert_bitwise_equal(actual, expected)
    assert_bitwise_equal(out[3], torch.where(a < b, a, b))
    known = ~(a.isnan() | b.isnan())
    assert_bitwise_equal(out[4][known], torch.maximum(-a, b)[known])


def test_dot():
    a, b = torch.randn(2, 64, 64).to(BF16)
    out = torch.empty(64, 64)
    _dot_kernel[(1,)](out, a, b, N=64)
    assert torch.allclose(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
