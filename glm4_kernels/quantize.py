"""Weights in 4 or 8 bits, chosen without calibration.

    w ~ scale * (u - z)        u in 0 .. 2^bits - 1, unsigned, one (scale, z) per row and group

The grid of each group is the method's choice (grid_search.py), and each weight is then rounded to
the nearest point of it. The layout is `QuantizedWeight`'s affair (quantized_weight.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4_kernels.grid_search import METHODS, choose_grid, codes_of
from glm4_kernels.library import bad_type, bad_value
from glm4_kernels.quantized_weight import BITS, BLOCK, GROUP_SIZES, QuantizedWeight, slabs

# Grids are chosen for this many weights at a time: what the search reads again stays in cache.
PIECE = 2**19


def quantize(
    weight: Tensor,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = True,
    method: str = "search",
) -> QuantizedWeight:
    """Rounds a weight to 4 or 8 bits.

    Args:
        weight: [N, K], any float dtype, any strides; K a multiple of 32 and of the group.
        bits: 4 or 8.
        group_size: 32, 64 or 128 weights of a row share a scale; None: the whole row does.
        symmetric: false stores a zero point per group beside the scale.
        method: "nearest", the grid that covers each group's range; "search", the one of the least
            squared error, clipping tried; "hqq", the same with float zero points (not symmetric).

    Returns:
        A QuantizedWeight on the weight's device. Scratch is 16 MiB a copy, whatever the matrix.

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
    if not weight.is_floating_point():
        raise bad_type("quantize", "weight", "floating point", weight.dtype)
    block = max(group_size or 0, BLOCK)
    if weight.dim() != 2 or weight.numel() == 0 or weight.shape[1] % block:
        expected = f"[N, K] with N at least 1 and K a multiple of {block}"
        raise bad_value("quantize", "weight", expected, list(weight.shape))

    n, k = weight.shape
    n_groups = k // (group_size or k)
    zero_point_dtype = None if symmetric else torch.bfloat16 if method == "hqq" else torch.uint8
    qweight = QuantizedWeight.empty(
        (n, k), bits, group_size, torch.bfloat16, zero_point_dtype, weight.device
    )
    for rows in slabs(n, k):
        slab = weight.detach()[rows].to(torch.float32)
        if not slab.isfinite().all():
            row, col = (~slab.isfinite()).nonzero()[0].tolist()
            where = f"{slab[row, col].item()} at [{rows.start + row}, {col}]"
            raise bad_value("quantize", "weight", "finite in float32", where)
        pieces = []
        for piece in slab.unflatten(-1, (n_groups, -1)).split(max(PIECE // k, 1)):
            scale, z = choose_grid(piece, bits, symmetric, method)
            u = codes_of(piece, scale, z, bits).to(torch.uint8)
            pieces.append((u.flatten(1), scale.squeeze(-1), z.squeeze(-1)))
        u, scale, z = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        zero_point = None if zero_point_dtype is None else z.to(zero_point_dtype)
        qweight.fill(rows, u, scale, zero_point)
    return qweight
