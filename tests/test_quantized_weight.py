from __future__ import annotations

import copy
import mmap
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

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
        (ValueError, r"order must be a permutation", {"order": torch.arange(64).int()}),
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


FORMS = [(4, 32), (4, 64), (4, 128), (4, None), (8, 32), (8, 64), (8, 128), (8, None)]


def weight_of(bits, group_size, zero_dtype=None, ordered=False):
    u = torch.randint(0, 2**bits, (37, 384), dtype=torch.uint8)
    scale = torch.randn(37, 384 // (group_size or 384)).bfloat16()
    zero_point = None if zero_dtype is None else (torch.rand(scale.shape) * 15).to(zero_dtype)
    order = torch.randperm(384) if ordered else None
    return QuantizedWeight.from_codes(u, scale, zero_point, bits, group_size, order)


def assert_same(a, b):
    assert (a.bits, a.group_size, a.shape) == (b.bits, b.group_size, b.shape)
    for x, y in zip((*a.codes(), a.order), (*b.codes(), b.order), strict=True):
        assert (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y))
    assert torch.equal(a.packed, b.packed)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("zero_dtype", [None, torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("bits, group_size", FORMS)
def test_files_give_the_weight_back(bits, group_size, zero_dtype, ordered, tmp_path):
    weight = weight_of(bits, group_size, zero_dtype, ordered)
    save_file(weight.state_dict(), tmp_path / "weight.safetensors")
    torch.save(weight.state_dict(), tmp_path / "weight.pt")
    loaded = [load_file(tmp_path / "weight.safetensors"), torch.load(tmp_path / "weight.pt")]
    for state in loaded:
        assert_same(QuantizedWeight.from_state_dict(state), weight)
    assert_same(pickle.loads(pickle.dumps(weight)), weight)


def test_a_state_is_row_major():
    """Of no device's layout: two codes a byte, the first in the low half."""
    weight = weight_of(4, 32)
    state = weight.state_dict()
    u = weight.codes()[0]
    assert torch.equal(state["codes"] & 15, u[:, ::2])
    assert torch.equal(state["codes"] >> 4, u[:, 1::2])
    assert state["form"].tolist() == [4, 32] and set(state) == {"codes", "scale", "form"}


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, "state must be of codes, form, order, scale, zero_point", {"more": 1}),
        (ValueError, "state must be of codes, form", {"scale": None}),
        (TypeError, "codes must be a dense tensor, got str", {"codes": "weights"}),
        (TypeError, "codes must be a dense tensor", {"codes": torch.zeros(2, 32, device="meta")}),
        (TypeError, "codes must be a dense tensor", {"codes": torch.zeros(2, 32).to_sparse()}),
        (
            ValueError,
            "codes must be contiguous",
            {"codes": torch.zeros(1, 1, dtype=torch.uint8).expand(2**20, 2**20)},
        ),
        (ValueError, r"codes must be uint8 \[N, K / 2\]", {"codes": torch.zeros(2, 32)}),
        (ValueError, r"codes must be uint8 \[N, K / 2\]", {"codes": torch.zeros(2).byte()}),
        (ValueError, "scale must be finite", {"scale": torch.full((2, 2), torch.nan)}),
        (ValueError, "zero_point must be finite", {"zero_point": torch.full((2, 2), torch.inf)}),
        (ValueError, r"form must be int64 \[2\]", {"form": torch.tensor([4])}),
        (ValueError, r"form must be int64 \[2\]", {"form": torch.tensor([4.0, 32.0])}),
        (ValueError, "form must be of 4 or 8 bits, got 3", {"form": torch.tensor([3, 32])}),
        (ValueError, "group_size must be 32", {"form": torch.tensor([4, 2**40])}),
        (ValueError, "group_size must be 32", {"form": torch.tensor([4, -1])}),
        (ValueError, r"scale must be \[2, 1\]", {"form": torch.tensor([4, 0])}),
        (ValueError, r"scale must be \[2, 2\]", {"scale": torch.ones(2, 3)}),
        (TypeError, "scale must be float32", {"scale": torch.ones(2, 2).double()}),
        (ValueError, "order must be a permutation", {"order": torch.zeros(64).long()}),
        (ValueError, "order must be a permutation", {"order": torch.arange(64).float()}),
    ],
)
def test_rejects_a_state(error, message, change):
    good = QuantizedWeight.from_codes(
        torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 2), None, 4, 32
    ).state_dict()
    state = {name: t for name, t in (good | change).items() if t is not None}
    with pytest.raises(error, match=f"^from_(state_dict|codes): {message}"):
        QuantizedWeight.from_state_dict(state)
