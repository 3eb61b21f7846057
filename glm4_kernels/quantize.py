"""Weights in 4 or 8 bits, chosen without calibration.

    w ~ scale * (u - z)        u in 0 .. 2^bits - 1, unsigned, one (scale, z) per row and group

The grid of each group is the method's choice (grid_search.py), and each weight is then rounded to
the nearest point of it, or where the layer's inputs are known, to where errors cancel in its
output (error_feedback.py). The layout is `QuantizedWeight`'s affair (quantized_weight.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glm4_kernels.error_feedback import round_with_feedback, upper_root
from glm4_kernels.grid_search import METHODS as GRIDS
from glm4_kernels.grid_search import choose_grid, codes_of
from glm4_kernels.library import bad_type, bad_value, without_autocast
from glm4_kernels.quantized_weight import BITS, BLOCK, GROUP_SIZES, QuantizedWeight, slabs

# Grids are chosen for this many weights at a time: what the search reads again stays in cache.
PIECE = 2**18
METHODS = (*GRIDS, "feedback")


@without_autocast
def quantize(
    weight: Tensor,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = True,
    method: str = "search",
    second_moment: Sequence[Tensor] | None = None,
) -> QuantizedWeight:
    """Rounds a weight to 4 or 8 bits.

    Args:
        weight: [N, K], any float dtype, any strides; K a multiple of 32 and of the group.
        bits: 4 or 8.
        group_size: 32, 64 or 128 weights of a row share a scale; None: the whole row does.
        symmetric: false stores a zero point per group beside the scale.
        method: "nearest", the grid that covers each group's range; "search", the one of the least
            squared error, clipping tried; "hqq", the same with float zero points (not symmetric);
            "feedback", integer codes whose errors make up for each other in the layer's output.
        second_moment: for "feedback" alone: E[x x^T] of the layer's inputs in blocks along its
            diagonal, each [B, B] with B a multiple of the group, K in all.

    Returns:
        A QuantizedWeight on the weight's device. Scratch is tens of MiB, whatever the matrix.

    Raises:
        ValueError: an argument or the shape is not supported, or a weight is NaN or infinite.
        TypeError: the weight is not floating point.
    """
    if bits not in BITS:
        raise bad_value("quantize", "bits", "4 or 8", bits)
    if group_size not in GROUP_SIZES:
        raise bad_value("quantize", "group_size", "32, 64, 128 or None", group_size)
    if method not in METHODS:
        raise bad_value("quantize", "method", f"one of {', '.join(METHODS)}", repr(method))
    if method == "hqq" and symmetric:
        raise bad_value("quantize", "symmetric", "False for method 'hqq'", symmetric)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        actual = getattr(weight, "dtype", type(weight).__name__)
        raise bad_type("quantize", "weight", "floating point", actual)
    block = max(group_size or 0, BLOCK)
    if weight.dim() != 2 or weight.numel() == 0 or weight.shape[1] % block:
        expected = f"[N, K] with N at least 1 and K a multiple of {block}"
        raise bad_value("quantize", "weight", expected, list(weight.shape))

    if (method == "feedback") != (second_moment is not None):
        given = "None" if second_moment is None else "one"
        raise bad_value("quantize", "second_moment", f"None but for 'feedback' ({method})", given)
    if second_moment is not None:
        check_second_moment(second_moment, weight, group_size)
    check_finite(weight)

    weight = weight.detach()
    n, k = weight.shape
    n_groups = k // (group_size or k)
    zero_point_dtype = None if symmetric else torch.bfloat16 if method == "hqq" else torch.uint8
    qweight = QuantizedWeight.empty(
        (n, k), bits, group_size, torch.bfloat16, zero_point_dtype, weight.device
    )
    if second_moment is not None:
        roots = [upper_root(block.to(weight.device)) for block in second_moment]
        for rows in slabs(n, max(map(len, roots))):
            u, scale, z = round_with_feedback(weight[rows], roots, group_size or k, bits, symmetric)
            qweight.fill(rows, u, scale, None if symmetric else z.to(torch.uint8))
        return qweight
    for rows in slabs(n, k):
        pieces = []
        for piece in weight[rows].split(max(PIECE // k, 1)):
            groups = piece.to(torch.float32).unflatten(-1, (n_groups, -1))
            scale, z = choose_grid(groups, bits, symmetric, method)
            u = codes_of(groups, scale, z, bits).to(torch.uint8)
            pieces.append((u.flatten(1), scale.squeeze(-1), z.squeeze(-1)))
        u, scale, z = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        zero_point = None if zero_point_dtype is None else z.to(zero_point_dtype)
        qweight.fill(rows, u, scale, zero_point)
    return qweight


def check_finite(weight: Tensor) -> None:
    for rows in slabs(*weight.shape):
        slab = weight[rows].detach().to(torch.float32)
        if not slab.isfinite().all():
            row, col = (~slab.isfinite()).nonzero()[0].tolist()
            where = f"{slab[row, col].item()} at [{rows.start + row}, {col}]"
            raise bad_value("quantize", "weight", "finite in float32", where)


def check_second_moment(blocks: Sequence[Tensor], weight: Tensor, group_size: int | None) -> None:
    k = weight.shape[1]
    group = group_size or k
    shapes = [list(block.shape) for block in blocks]
    square = all(len(shape) == 2 and shape[0] == shape[1] for shape in shapes)
    if not square or any(b % group for b, _ in shapes) or sum(b for b, _ in shapes) != k:
        expected = f"square blocks, multiples of {group}, {k} in all"
        raise bad_value("quantize", "second_moment", expected, shapes)
    if not all(block.isfinite().all() for block in blocks):
        raise bad_value("quantize", "second_moment", "finite", "NaN or infinite values")
