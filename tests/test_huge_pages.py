from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from glm4_kernels.huge_pages import HUGE_PAGE, zeros_in_huge_pages

CPU = torch.device("cpu")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((0, 3), torch.uint8),  # empty
        ((HUGE_PAGE - 1,), torch.uint8),  # just below a page
        ((HUGE_PAGE // 2,), torch.bfloat16),  # exactly one
        ((3, 2**18 + 1), torch.float32),  # a page and a bit, nothing divides
    ],
)
def test_zeros(shape, dtype):
    x = zeros_in_huge_pages(shape, dtype, CPU)
    assert x.shape == shape and x.dtype == dtype and x.is_contiguous() and not x.any()
    x.fill_(1)
    assert x.sum(dtype=torch.float64) == x.numel()
    large = x.nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE")
    assert not large or x.data_ptr() % HUGE_PAGE == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_outlives_the_first_tensor_and_goes_with_the_last():
    x = zeros_in_huge_pages((HUGE_PAGE,), torch.uint8, CPU)
    part = x[5:9]
    del x
    part.fill_(7)
    assert part.tolist() == [7, 7, 7, 7]
    before = resident_bytes()
    for _ in range(20):
        zeros_in_huge_pages((10 * HUGE_PAGE,), torch.uint8, CPU).fill_(1)
    assert resident_bytes() - before < 100 * HUGE_PAGE


def test_elsewhere_it_is_torch_zeros():
    x = zeros_in_huge_pages((HUGE_PAGE,), torch.uint8, torch.device("meta"))
    assert x.is_meta and x.shape == (HUGE_PAGE,)
