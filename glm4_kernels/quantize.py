"""Weights in 4 or 8 bits, rounded to nearest, chosen without calibration.

    w ~ scale * (u - z)        u in 0 .. 2^bits - 1, unsigned, one (scale, z) per row and group

Symmetric: z = 2^(bits-1) everywhere and not stored. With P the group's largest |w| and Q the
largest on the other side of zero, scale = -sign(P's w) * max(P / (h + 1/2), Q / (h - 1/2)),
h = 2^(bits-1): P takes the side that has one step more, and the range is used half a step beyond
its ends, where rounding still errs by no more than half a step. Mean squared error on normal
weights, int4, group 128: 0.73 of amax/7 (and 0.94 of amax/8 with the far side clipped).
Zero-point: the range is stretched to contain 0, scale = (max - min) / (2^bits - 1),
z = round(-min / scale).

Error: |scale * (u - z) - w| <= |scale| / 2, up to fp32 rounding.

Scales are bfloat16 rounded away from zero: half the bytes of fp32 with its range, so the smallest
and the largest rows survive (fp16 loses both), and weights are rounded against the stored scale,
so its short mantissa costs a wider step of at most 2^-7 and no bias. The kernels read fp32 and fp16
scales too, for checkpoints that carry them.

The layout is `QuantizedWeight`'s affair (quantized_weight.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4_kernels.library import bad_type, bad_value
from glm4_kernels.quantized_weight import BITS, BLOCK, GROUP_SIZES, QuantizedWeight, slabs


def quantize(
    weight: Tensor, bits: int = 4, group_size: int | None = 128, symmetric: bool = True
) -> QuantizedWeight:
    """Rounds a weight to 4 or 8 bits (round to nearest, no calibration).

    Args:
        weight: [N, K], any float dtype, any strides; K a multiple of 32 and of the group.
        bits: 4 or 8.
        group_size: 32, 64 or 128 weights of a row share a scale; None: the whole row does.
        symmetric: false stores a zero point per group beside the scale.

    Returns:
        A QuantizedWeight on the weight's device. Scratch is 16 MiB a copy, whatever the matrix.

    Raises:
        ValueError: bits, group or shape are not supported, or a weight is NaN or infinite.
        TypeError: the weight is not floating point.
    """
    if bits not in BITS:
        raise bad_value("quantize", "bits", "4 or 8", bits)
    if group_size not in GROUP_SIZES:
        raise bad_value("quantize", "group_size", "32, 64, 128 or None", group_size)
    if not weight.is_floating_point():
        raise bad_type("quantize", "weight", "floating point", weight.dtype)
    block = max(group_size or 0, BLOCK)
    if weight.dim() != 2 or weight.numel() == 0 or weight.shape[1] % block:
        expected = f"[N, K] with N at least 1 and K a multiple of {block}"
        raise bad_value("quantize", "weight", expected, list(weight.shape))

    n, k = weight.shape
    n_groups = k // (group_size or k)
    zero_point_dtype = None if symmetric else torch.uint8
    qweight = QuantizedWeight.empty(
        (n, k), bits, group_size, torch.bfloat16, zero_point_dtype, weight.device
    )
    for rows in slabs(n, k):
        slab = weight.detach()[rows].to(torch.float32)
        if not slab.isfinite().all():
            row, col = (~slab.isfinite()).nonzero()[0].tolist()
            where = f"{slab[row, col].item()} at [{rows.start + row}, {col}]"
            raise bad_value("quantize", "weight", "finite in float32", where)
        groups = slab.unflatten(-1, (n_groups, -1))
        choose = symmetric_grid if symmetric else zero_point_grid
        scale, z = choose(groups, bits)
        # A group of zeros has scale 0, and rounds to z whatever it is divided by.
        step = torch.where(scale == 0, 1.0, scale.float())
        u = (groups / step).round_().add_(z).clamp_(0, 2**bits - 1)
        zero_point = None if symmetric else z.squeeze(-1).to(torch.uint8)
        qweight.fill(rows, u.flatten(1).to(torch.uint8), scale.squeeze(-1), zero_point)
    return qweight


def symmetric_grid(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scale, z) of fp32 groups [..., g] -> [..., 1] each."""
    half = 2 ** (bits - 1)
    top, bottom = groups.amax(-1, keepdim=True), -groups.amin(-1, keepdim=True)
    larger, smaller = torch.maximum(top, bottom), torch.minimum(top, bottom)
    scale = torch.maximum(larger / (half + 0.5), smaller / (half - 0.5))
    scale = torch.where(top > bottom, -scale, scale)
    return round_up_to_bfloat16(scale), torch.full_like(scale, half)


def zero_point_grid(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scale, z) of fp32 groups [..., g] -> [..., 1] each."""
    steps = 2**bits - 1
    top = groups.amax(-1, keepdim=True).clamp_(min=0)
    bottom = groups.amin(-1, keepdim=True).clamp_(max=0)
    scale = round_up_to_bfloat16(top / steps - bottom / steps)  # max - min may overflow
    step = torch.where(scale == 0, 1.0, scale.float())
    return scale, (-bottom / step).round_()


def round_up_to_bfloat16(x: Tensor) -> Tensor:
    """fp32 -> bfloat16, away from zero: a step that is rounded down would clip its extremes."""
    return ((x.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)
