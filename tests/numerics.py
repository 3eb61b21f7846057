"""The one tolerance rule of the test suite, and what the tests share to apply it.

Per output row, so that a row of small values cannot hide garbage:

    error(kernel, oracle) <= 2 * (error(reference, oracle) + eps(dtype) * max|oracle|)

with `error` the largest absolute difference, `oracle` the reference evaluated in fp64 and
`eps(dtype)` the spacing of the output's dtype at 1. A kernel may therefore be as wrong as twice
the reference, which rounds where the model rounds, and no more.
"""

from __future__ import annotations

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_within_rule(actual: Tensor, reference: Tensor, oracle: Tensor) -> None:
    """Applies the rule to every row (the last dimension) of `actual`.

    Args:
        actual: the kernel's output, [..., N].
        reference: the reference's output on the same inputs, same shape and dtype.
        oracle: the reference's output on the inputs cast to fp64, same shape.
    """
    assert actual.shape == reference.shape == oracle.shape, (
        f"shapes differ: {list(actual.shape)}, {list(reference.shape)}, {list(oracle.shape)}"
    )
    assert actual.dtype == reference.dtype, f"{actual.dtype} is not {reference.dtype}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"not finite at {_first(~torch.isfinite(actual))}"
    truth = oracle.double().cpu()
    kernel_error = (actual.double().cpu() - truth).abs()
    reference_error = (reference.double().cpu() - truth).abs().amax(-1, keepdim=True)
    spacing = torch.finfo(actual.dtype).eps * truth.abs().amax(-1, keepdim=True)
    allowed = 2 * (reference_error + spacing)
    if (kernel_error > allowed).any():
        worst = _first(kernel_error - allowed == (kernel_error - allowed).max())
        raise AssertionError(
            f"worst element at {worst}: got {actual.cpu()[worst].item()}, "
            f"oracle {truth[worst].item()}, reference {reference.cpu()[worst].item()}, "
            f"error {kernel_error[worst].item():.3e}, "
            f"allowed {allowed.expand_as(kernel_error)[worst].item():.3e}"
        )


def assert_bitwise_equal(actual: Tensor, expected: Tensor) -> None:
    """Same shape, dtype and bits; for rounding points that are part of the contract."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    same = (actual.cpu() == expected.cpu()) | (actual.isnan().cpu() & expected.isnan().cpu())
    if not same.all():
        worst = _first(~same)
        raise AssertionError(f"at {worst}: got {actual[worst]}, expected {expected[worst]}")


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())
