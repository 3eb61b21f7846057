"""Weights in 4 or 8 bits, rounded to nearest, in the layout that the kernels read.

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

The layout is drawn in csrc/quantized_weight.h; `pack` and `unpack` are its only Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glm4_kernels.library import bad_type, bad_value

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128, None)
# One packing block: K is always a multiple of it.
BLOCK = 32
# Weights are converted to fp32 this many at a time: 16 MiB of scratch, whatever the matrix.
SLAB = 4 * 2**20


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight [N, K] of a linear layer, as `quantized_matmul` reads it.

    Attributes:
        packed: uint8 [N, K * bits / 8].
        scale: float [N, G], G = K / group_size, or 1 per channel.
        zero_point: uint8 [N, G]; None where symmetric.
        bits: 4 or 8.
        group_size: 32, 64 or 128 weights of a row share a scale; None: the whole row.
        shape: (N, K).
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int | None
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes in memory, scales and zero points included."""
        tensors = (self.packed, self.scale, self.zero_point)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return replace(
            self,
            packed=self.packed.to(device),
            scale=self.scale.to(device),
            zero_point=zero_point,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """scale * (u - z), [N, K], computed in fp32 and rounded once to `dtype` (float32)."""
        weight = torch.empty(self.shape, dtype=dtype or torch.float32, device=self.packed.device)
        for rows in slabs(*self.shape):
            zero_point = None if self.zero_point is None else self.zero_point[rows]
            weight[rows] = dequantize(
                self.packed[rows], self.scale[rows], zero_point, self.bits, torch.float32
            )
        return weight


def pack(u: Tensor, bits: int) -> Tensor:
    """uint8 [N, K] of values below 2^bits -> uint8 [N, K * bits / 8]."""
    if bits == 8:
        return u.contiguous()
    low, high = u.unflatten(-1, (-1, 2, BLOCK // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`."""
    if bits == 8:
        return packed
    block = packed.unflatten(-1, (-1, BLOCK // 2))
    return torch.stack((block & 15, block >> 4), dim=-2).flatten(-3)


def dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype
) -> Tensor:
    """scale * (u - z), [N, K], computed in `dtype`."""
    u = unpack(packed, bits).unflatten(-1, (scale.shape[-1], -1)).to(dtype)
    z = 2 ** (bits - 1) if zero_point is None else zero_point.to(dtype).unsqueeze(-1)
    return (scale.to(dtype).unsqueeze(-1) * (u - z)).flatten(-2)


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
    device = weight.device
    packed = torch.empty(n, k * bits // 8, dtype=torch.uint8, device=device)
    scale = torch.empty(n, n_groups, dtype=torch.bfloat16, device=device)
    zero_point = None
    if not symmetric:
        zero_point = torch.empty(n, n_groups, dtype=torch.uint8, device=device)

    for rows in slabs(n, k):
        slab = weight.detach()[rows].to(torch.float32)
        if not slab.isfinite().all():
            row, col = (~slab.isfinite()).nonzero()[0].tolist()
            where = f"{slab[row, col].item()} at [{rows.start + row}, {col}]"
            raise bad_value("quantize", "weight", "finite in float32", where)
        groups = slab.unflatten(-1, (n_groups, -1))
        choose = symmetric_grid if symmetric else zero_point_grid
        slab_scale, z = choose(groups, bits)
        # A group of zeros has scale 0, and rounds to z whatever it is divided by.
        step = torch.where(slab_scale == 0, 1.0, slab_scale.float())
        u = (groups / step).round_().add_(z).clamp_(0, 2**bits - 1)
        packed[rows] = pack(u.flatten(1).to(torch.uint8), bits)
        scale[rows] = slab_scale.squeeze(-1)
        if zero_point is not None:
            zero_point[rows] = z.squeeze(-1).to(torch.uint8)

    return QuantizedWeight(packed, scale, zero_point, bits, group_size, (n, k))


def slabs(n: int, k: int) -> Iterator[slice]:
    """The rows of an [n, k] matrix in slices of at most `SLAB` weights."""
    rows = max(SLAB // k, 1)
    return (slice(start, start + rows) for start in range(0, n, rows))


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
