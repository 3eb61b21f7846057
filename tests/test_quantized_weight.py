from __future__ import annotations

import copy
import mmap

import pytest
import torch

from glm4_kernels.huge_pages import HUGE_PAGE
from glm4_kernels.quantized_weight import (
    QuantizedWeight,
    pack_rows,
    pack_tiles,
    unpack_rows,
    unpack_tiles,
)


@pytest.mark.parametrize("bits", [4, 8])
def test_tiles(bits):
    """The table in csrc/quantized_weight.h, read as it is drawn."""
    u = torch.randint(0, 2**bits, (37, 96), dtype=torch.uint8)  # 37: a tile of 5 rows
    packed = pack_tiles(u, bits)
    assert packed.shape == (3, 16 * 96 * bits // 8)
    blocks = packed.view(3, -1, 64)
    for n in range(48):
        for k in range(96):
            if bits == 8:
                stored = blocks[n // 16, k // 4, n % 16 * 4 + k % 4]
            else:
                byte = blocks[n // 16, k // 8, n % 16 * 4 + k % 4]
                stored = byte >> (4 if k % 8 >= 4 else 0) & 15
            assert stored == (u[n, k] if n < 37 else 0), (n, k)
    assert torch.equal(unpack_tiles(packed, bits)[:37], u)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows(bits):
    u = torch.randint(0, 2**bits, (3, 96), dtype=torch.uint8)
    packed = pack_rows(u, bits)
    for k in range(96):
        if bits == 8:
            stored = packed[:, k]
        else:
            piece, i = divmod(k, 32)
            stored = packed[:, 16 * piece + i % 16] >> (4 * (i // 16)) & 15
        assert torch.equal(stored, u[:, k]), k
    assert torch.equal(unpack_rows(packed, bits), u)


@pytest.mark.parametrize("bits, group_size", [(4, 32), (4, None), (8, 64)])
@pytest.mark.parametrize("zero_dtype", [None, torch.uint8, torch.float16])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_come_back(bits, group_size, zero_dtype, scale_dtype):
    n, k = 37, 192
    u = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale = torch.randn(n, k // (group_size or k)).to(scale_dtype)
    zero_point = None if zero_dtype is None else (torch.rand(scale.shape) * 15).to(zero_dtype)
    qweight = QuantizedWeight.from_codes(u, scale, zero_point, bits, group_size)
    for given, back in zip((u, scale, zero_point), qweight.codes(), strict=True):
        assert (given is None and back is None) or (
            torch.equal(given, back) and given.dtype == back.dtype
        )
    z = float(2 ** (bits - 1)) if zero_point is None else zero_point.double().unsqueeze(-1)
    groups = u.double().unflatten(1, (scale.shape[1], -1))
    exact = (scale.double().unsqueeze(-1) * (groups - z)).flatten(1)
    error = (qweight.dequantize(torch.float64) - exact).abs()
    assert (error <= 2e-7 * exact.abs() + 1e-6 * scale.abs().max()).all()


@pytest.mark.parametrize("zero_dtype", [None, torch.uint8])
def test_copies_share_nothing_and_lie_as_well(zero_dtype):
    n, k = 528, 8192  # two huge pages and a bit
    u = torch.randint(0, 256, (n, k), dtype=torch.uint8)
    zero_point = None if zero_dtype is None else torch.full((n, 1), 7, dtype=zero_dtype)
    order = torch.arange(k).flip(0)
    first = QuantizedWeight.from_codes(u, torch.rand(n, 1), zero_point, 8, None, order.clone())
    scale = first.codes()[1].clone()
    second = copy.deepcopy(first)
    for tensor in (first.packed, first.scale, first.zero_point, first.order):
        if tensor is not None:
            tensor.zero_()
    assert torch.equal(second.codes()[0], u) and torch.equal(second.codes()[1], scale)
    assert zero_point is None or torch.equal(second.codes()[2], zero_point)
    assert torch.equal(second.order, order)
    lies = [weight.packed.data_ptr() % HUGE_PAGE for weight in (first, second)]
    assert not hasattr(mmap, "MADV_HUGEPAGE") or lies == [0, 0]


def test_an_order_that_changes_nothing_is_dropped():
    u, scale = torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1)
    assert QuantizedWeight.from_codes(u, scale, None, 4, None, torch.arange(32)).order is None
    order = torch.arange(32).flip(0)
    assert torch.equal(QuantizedWeight.from_codes(u, scale, None, 4, None, order).order, order)


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"bits must be 4 or 8, got 2", {"bits": 2}),
        (ValueError, r"group_size must be 32, 64, 128 or None, got 16", {"group_size": 16}),
        (TypeError, r"u must be torch.uint8", {"u": torch.zeros(3, 64)}),
        (ValueError, r"u must be .* multiple of 32", {"u": torch.zeros(3, 40, dtype=torch.uint8)}),
        (ValueError, r"u must be at most 15, got 16", {"u": torch.full((3, 64), 16).byte()}),
        (ValueError, r"scale must be \[3, 2\], got \[3, 1\]", {"scale": torch.ones(3, 1)}),
        (TypeError, r"scale must be float32", {"scale": torch.ones(3, 2).double()}),
        (ValueError, r"zero_point must be \[3, 2\]", {"zero_point": torch.ones(3)}),
        (TypeError, r"zero_point must be uint8", {"zero_point": torch.ones(3, 2).int()}),
        (ValueError, r"scale must be on cpu", {"scale": torch.ones(3, 2, device="meta")}),
        (ValueError, r"order must be a permutation", {"order": torch.zeros(64).long()}),
        (ValueError, r"order must be a permutation", {"order": torch.arange(63)}),
    ],
)
def test_rejects(error, message, change):
    arguments = {
        "u": torch.zeros(3, 64, dtype=torch.uint8),
        "scale": torch.ones(3, 2),
        "zero_point": None,
        "bits": 4,
        "group_size": 32,
    }
    with pytest.raises(error, match=f"^from_codes: {message}"):
        QuantizedWeight.from_codes(**(arguments | change))
