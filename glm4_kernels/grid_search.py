"""Which grid a group of weights is rounded to: the methods of `quantize`.

    w ~ scale * (u - z)        u in 0 .. n = 2^bits - 1, nearest to w / scale + z

"nearest" covers the range. Symmetric, z = h = 2^(bits-1): with P the group's largest |w| and Q the
largest on the other side of zero, scale = -sign(P's w) * max(P / (h + 1/2), Q / (h - 1/2)): P takes
the side that has one step more, and the range is used half a step beyond its ends, where rounding
still errs by no more than half a step. Zero-point: the range is stretched to contain 0, scale =
(max - min) / n, z = round(-min / scale). Either way |scale * (u - z) - w| <= |scale| / 2.

"search" tries that grid, and shrunk by each of `SHRINK`, which clips the extremes and rounds the
rest finer; to the codes of each try it fits the scale of least squares,

    scale = sum (u - z) w / sum (u - z)^2

and keeps, group by group, whichever of all these has the least sum of (scale * (u - z) - w)^2.
Nearest is among them, so no group gets worse.

"hqq" (half-quadratic quantisation, Badri and Shaji 2023) stores z as a float, and fits it too,
z = mean u - (mean w) / scale. Then, for `HQQ_STEPS` steps, it takes the errors
e = w / scale - (u - z) for sparse: splits off the large ones,

    e' = sign(e) * max(|e| - |e|^(p-1) / beta, 0)        p = 0.7, beta = 10 * 1.01^step

and moves z to the mean of u - (w / scale - e'). Again the least squared error is kept.

Scales (and float z) are bfloat16: half the bytes of fp32 with its range, so the smallest and the
largest rows survive (fp16 loses both). Weights are rounded against the stored scale. Those of
"nearest" are rounded away from zero: a wider step of at most 2^-7, and no clipping.
"""

from __future__ import annotations

import torch
from torch import Tensor

METHODS = ("nearest", "search", "hqq")
SHRINK = {4: (0.96, 0.92, 0.88, 0.84, 0.78, 0.7, 0.6), 8: (0.98, 0.95, 0.9, 0.8)}
HQQ_STEPS, HQQ_P, HQQ_BETA, HQQ_KAPPA = 20, 0.7, 10.0, 1.01


def choose_grid(groups: Tensor, bits: int, symmetric: bool, method: str) -> tuple[Tensor, Tensor]:
    """(scale bfloat16, z fp32), [..., 1] each, of fp32 groups [..., g]."""
    scale, z = nearest_grid(groups, bits, symmetric)
    if method == "nearest":
        return scale, z
    unit = divisor(scale)
    search = Search(groups, unit, bits)
    search.offer(scale, z, search.codes(scale, z))
    # A zero point's tries lie about the middle of the range, not about 0.
    middle = search.w.amax(-1, keepdim=True).add_(search.w.amin(-1, keepdim=True)).div_(2)
    for shrink in (1.0, *SHRINK[bits]):
        tried = (unit * shrink).to(torch.bfloat16)
        if not symmetric:
            z = (2**bits - 1) / 2 - middle / shrink
            z = z.to(torch.bfloat16).float() if method == "hqq" else z.round_()
            z.clamp_(0, 2**bits - 1)
        u = search.codes(tried, z)
        search.offer(tried, z, u)
        search.offer(*(search.fit_both(u) if method == "hqq" else search.fit_scale(u, z)), u)
    if method == "hqq":
        search.half_quadratic()
    scale = torch.where(scale == 0, scale, search.scale.to(torch.bfloat16))
    return scale, search.z


def nearest_grid(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    top, bottom = groups.amax(-1, keepdim=True), -groups.amin(-1, keepdim=True)
    if symmetric:
        half = 2 ** (bits - 1)
        larger, smaller = torch.maximum(top, bottom), torch.minimum(top, bottom)
        scale = torch.maximum(larger / (half + 0.5), smaller / (half - 0.5))
        scale = torch.where(top > bottom, -scale, scale)
        return round_up_to_bfloat16(scale), torch.full_like(scale, half)
    steps = 2**bits - 1
    top.clamp_(min=0)
    bottom.clamp_(min=0)
    scale = round_up_to_bfloat16(top / steps + bottom / steps)  # max - min may overflow
    return scale, (bottom / divisor(scale)).round_()


def codes_of(groups: Tensor, scale: Tensor, z: Tensor, bits: int) -> Tensor:
    """u of fp32 groups, as fp32."""
    return (groups / divisor(scale)).add_(z).round_().clamp_(0, 2**bits - 1)


def divisor(scale: Tensor) -> Tensor:
    """The scale in fp32; 1 for a group of zeros, whose scale is 0: it rounds to z all the same."""
    return torch.where(scale == 0, 1.0, scale.float())


def round_up_to_bfloat16(x: Tensor) -> Tensor:
    """fp32 -> bfloat16, away from zero."""
    return ((x.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


class Search:
    """The grid of the least squared error so far, group by group.

    Weights are held in units of the nearest grid's step, where squares neither overflow nor vanish.
    """

    def __init__(self, groups: Tensor, unit: Tensor, bits: int) -> None:
        self.unit, self.n = unit, 2**bits - 1
        self.w = groups / unit
        self.square = self.total(self.w, self.w)
        self.error = torch.full_like(unit, float("inf"))
        self.scale, self.z = torch.zeros_like(unit), torch.zeros_like(unit)

    def total(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(-1, keepdim=True)

    def codes(self, scale: Tensor, z: Tensor) -> Tensor:
        return (self.w * (self.unit / divisor(scale))).add_(z).round_().clamp_(0, self.n)

    def offer(self, scale: Tensor, z: Tensor, u: Tensor) -> None:
        """Keeps (scale, z) where its error on codes `u` is less: |s d - w|^2, d = u - z."""
        s = scale.float() / self.unit
        d = u - z
        error = self.square + s * (s * self.total(d, d) - 2 * self.total(d, self.w))
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale.float(), self.scale)
        self.z = torch.where(better, z, self.z)

    def fit_scale(self, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        d = u - z
        s = self.total(d, self.w) / self.total(d, d).clamp_(min=1e-30)
        return (s * self.unit).to(torch.bfloat16), z

    def fit_both(self, u: Tensor) -> tuple[Tensor, Tensor]:
        mean, mean_w = u.mean(-1, keepdim=True), self.w.mean(-1, keepdim=True)
        d = u - mean
        s = self.total(d, self.w) / self.total(d, d).clamp_(min=1e-30)
        scale = (s * self.unit).to(torch.bfloat16)
        z = mean - mean_w * self.unit / divisor(scale)
        return scale, z.clamp_(0, self.n).to(torch.bfloat16).float()

    def half_quadratic(self) -> None:
        """Refines z from the best grid so far, its scale held."""
        scale, z = self.scale, self.z
        w = self.w * (self.unit / divisor(scale))
        for step in range(HQQ_STEPS):
            u = (w + z).round_().clamp_(0, self.n)
            self.offer(scale, z, u)
            e = w - (u - z)
            large = e.abs()
            large = (large - large.pow(HQQ_P - 1) / (HQQ_BETA * HQQ_KAPPA**step)).clamp_(min=0)
            z = (u - w + large.copysign_(e)).mean(-1, keepdim=True)
            z = z.clamp_(0, self.n).to(torch.bfloat16).float()
        self.offer(scale, z, (w + z).round_().clamp_(0, self.n))
