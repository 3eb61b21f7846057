"""Whether tensors that an op writes lie apart in memory: two views of one buffer may."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glm4_kernels.library import bad_value

share_storage: Callable[[Tensor, Tensor], bool] = vars(torch._C)["_is_alias_of"]


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether a and b share a byte; exact whatever their strides, and no matter of addresses."""
    if not share_storage(a, b) or a.numel() == 0 or b.numel() == 0:
        return False
    # Byte strides, and how often each can be taken from the start of b to a byte that is a's too.
    steps = {1: (1 - b.element_size(), a.element_size() - 1)}
    for sign, tensor in ((1, a), (-1, b)):
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            if stride and size > 1:
                low, high = steps.get(stride * tensor.element_size(), (0, 0))
                ends = sorted((0, sign * (size - 1)))
                steps[stride * tensor.element_size()] = (low + ends[0], high + ends[1])
    start_a, start_b = (int(t.storage_offset()) * t.element_size() for t in (a, b))
    return _reaches(start_b - start_a, sorted(steps.items(), reverse=True))


def _reaches(distance: int, steps: list[tuple[int, tuple[int, int]]]) -> bool:
    """Whether `distance` is a sum of so many of each stride; the strides fall."""
    if not steps:
        return distance == 0
    (stride, (low, high)), *rest = steps
    least = sum(s * few for s, (few, _) in rest)
    most = sum(s * many for s, (_, many) in rest)
    first = max(low, -((most - distance) // stride))
    last = min(high, (distance - least) // stride)
    return any(_reaches(distance - n * stride, rest) for n in range(first, last + 1))


def check_apart(op: str, written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """Raises if a tensor of `written` overlaps another of either."""
    tensors = written | read
    storages = [tensor.untyped_storage()._cdata for tensor in tensors.values()]
    if len(set(storages)) == len(storages):
        return
    of_storage: dict[int, list[str]] = {}
    for name, storage in zip(tensors, storages, strict=True):
        of_storage.setdefault(storage, []).append(name)
    for names in of_storage.values():
        for i, name in enumerate(names):
            for other in names[i + 1 :]:
                if name in written and overlap(tensors[name], tensors[other]):
                    raise not_apart(op, other, name)


def not_apart(op: str, name: str, other: str) -> ValueError:
    return bad_value(op, name, f"apart from {other} in memory", "a tensor that overlaps it")
