"""Rounding in which each weight makes up for the errors before it.

A row's error d = ŵ - w costs the layer's output d H d^T in the mean, H = E[x x^T] the second moment
of its inputs. With R the upper triangle for which H^-1 = R^T R,

    d H d^T = sum over k of e_k^2        e_k = (w'_k - ŵ_k) / R_kk

if column by column, after k is rounded, the columns after it move to where they answer best:

    w'_j -= e_k R_kj        j > k

(Frantar et al. 2022, "GPTQ"; Chen et al. 2025 show it to be Babai's nearest plane.) Grids are
chosen group by group as the columns are reached, of the weights as they stand: each row tries
nearest's grid shrunk by each of `SHRINK` and keeps the one of the least sum of e_k^2.

H comes in blocks along the diagonal: what lies outside them is taken for 0. It is estimated from
samples, so correlations are shrunk by `CORRELATION`, which holds R well conditioned too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glm4_kernels.grid_search import divisor, nearest_grid

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
CORRELATION = 0.9
# Columns are updated at once within a panel, and panel by panel beyond it.
PANEL = 16


def upper_root(moment: Tensor) -> Tensor:
    """R of H^-1 = R^T R, [B, B] fp32, for H = `moment` with its correlations shrunk."""
    h = moment.float() * CORRELATION
    diagonal = moment.diagonal().float()
    h.diagonal().copy_(diagonal + 0.01 * diagonal.mean().clamp_(min=1e-30))
    # H = M M^T with M upper, so R = M^-1; the Cholesky factor of H read backwards is M.
    m = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(m, torch.ones_like(diagonal).diag(), upper=True)


def round_with_feedback(
    weight: Tensor, roots: Sequence[Tensor], group_size: int, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(u uint8 [N, K], scale bfloat16 [N, G], z fp32 [N, G]) of weights [N, K].

    Args:
        roots: `upper_root` of each block of H, sizes multiples of the group, K in all.
    """
    n, k = weight.shape
    u = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(n, k // group_size, dtype=torch.bfloat16, device=weight.device)
    z = torch.empty_like(scale, dtype=torch.float32)
    start = 0
    for root in roots:
        block = weight[:, start : start + len(root)].to(torch.float32, copy=True)
        for first in range(0, len(root), group_size):
            columns = slice(first, first + group_size)
            best = round_group(
                block[:, columns].t().contiguous(), root[columns, columns], bits, symmetric
            )
            group = (start + first) // group_size
            u[:, start + first : start + first + group_size] = best[0].t()
            scale[:, group], z[:, group] = best[1], best[2]
            rest = slice(columns.stop, None)
            block[:, rest].addmm_(best[3].t(), root[columns, rest], alpha=-1)
        start += len(root)
    return u, scale, z


def round_group(
    columns: Tensor, root: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(u [g, N], scale [N], z [N], e [g, N]) of weights [g, N] by the best of each row's grids."""
    g, n = columns.shape
    scale, z = (x[:, 0] for x in nearest_grid(columns.t().contiguous(), bits, symmetric))
    scales = torch.stack([(scale.float() * f).to(torch.bfloat16) for f in SHRINK])  # [S, N]
    step = divisor(scales)
    w = columns.repeat(1, len(SHRINK))  # [g, S * N]
    u, e = torch.empty_like(w), torch.empty_like(w)
    scales, step, z = scales.float().flatten(), step.flatten(), z.repeat(len(SHRINK))
    inverse = 1 / step
    for first in range(0, g, PANEL):
        last = min(first + PANEL, g)
        for k in range(first, last):
            torch.addcmul(z, w[k], inverse, out=u[k]).round_().clamp_(0, 2**bits - 1)
            torch.sub(u[k], z, out=e[k]).mul_(scales)
            torch.sub(w[k], e[k], out=e[k]).div_(root[k, k])
            w[k + 1 : last].addr_(root[k, k + 1 : last], e[k], alpha=-1)
        w[last:].addmm_(root[first:last, last:].t(), e[first:last], alpha=-1)
    loss = e.square().sum(0).view(len(SHRINK), n)
    choice = loss.argmin(0)  # [N]
    pick = choice * n + torch.arange(n, dtype=torch.int64, device=w.device)
    return u[:, pick], scales[pick], z[pick], e[:, pick]
