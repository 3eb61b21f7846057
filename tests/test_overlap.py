from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from glm4_kernels.overlap import check_apart, overlap

BUFFER = torch.zeros(400, dtype=torch.uint8)


def bytes_of(x: torch.Tensor) -> set[int]:
    places = torch.arange(BUFFER.nbytes)
    size = x.element_size()
    first = torch.as_strided(
        places, x.shape, [s * size for s in x.stride()], x.storage_offset() * size
    )
    return {int(place) + i for place in first.flatten() for i in range(size)}


@st.composite
def views(draw):
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.int32]))
    dims = draw(st.integers(1, 3))
    shape = draw(st.lists(st.integers(0, 4), min_size=dims, max_size=dims))
    stride = draw(st.lists(st.integers(0, 9), min_size=dims, max_size=dims))
    offset = draw(st.integers(0, 12))
    return torch.as_strided(BUFFER.view(dtype), shape, stride, offset)


@hypothesis.settings(max_examples=500, deadline=None, database=None, derandomize=True)
@hypothesis.given(a=views(), b=views())
def test_overlap_is_exact(a, b):
    """Against the bytes themselves."""
    assert overlap(a, b) == bool(bytes_of(a) & bytes_of(b))


def test_other_memory_is_apart():
    assert not overlap(torch.zeros(4), torch.zeros(4))
    assert overlap(BUFFER, BUFFER)


def test_views_of_one_buffer():
    both = torch.zeros(64, 2, 8, 16, 64)
    assert not overlap(both[:, 0], both[:, 1])
    assert overlap(both[:, 0], both[:, :, 0])


def test_check_apart():
    a, b = BUFFER[:8], BUFFER[8:16]
    check_apart("op", {"a": a, "b": b}, {"c": BUFFER[16:], "d": BUFFER[20:]})
    with pytest.raises(
        ValueError, match=r"^op: b must be apart from a in memory, got a tensor that"
    ):
        check_apart("op", {"a": a, "b": BUFFER[7:]}, {})
    with pytest.raises(ValueError, match=r"^op: c must be apart from a in memory"):
        check_apart("op", {"a": a}, {"c": BUFFER[7:]})
