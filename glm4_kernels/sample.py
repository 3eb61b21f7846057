"""Next tokens from logits: repetition penalty -> temperature -> top-k -> top-p -> draw.

    s = the row's logits; of seen tokens s * penalty where s < 0, else s / penalty
    m = floor(2^44 exp((s - max s) / temperature)); 0 of tokens below the k-th largest s
    D = floor((1 - top_p) sum m): in ascending order of s, ties as they come, tokens are dropped as
        long as the sum of their m is at most D, but for the last one
    token = the first whose running sum of m, over the kept ones as they come, exceeds u * sum m

Without u, the first of the largest s. A row that holds NaN, +inf or nothing but -inf gives -1.

Masses are integers, so that sums do not depend on their order: every implementation, however it
slices the work, chooses the same token. Each is made of fp32 operations rounded once,

    x = (s - max s) * (log2(e) / temperature)    n = round(x)    2^(x - n) by a polynomial

and lies within 1 + m (2.1 |x| + 2) 2^-24 of 2^44 e^.... A token is that of exact arithmetic unless
u lies within 2 sum(errors) / sum m of an end of its share; some 1e-6.

Nothing is sorted. Columns go in blocks of 64, whose maxima come first. They tell which blocks can
hold a token that is kept: one not below the k-th largest maximum, which is at most the k-th largest
s; or, with top-p alone, not below (1 - top_p) / 2V of the largest m, since all that are weigh less
than D. The threshold is bisected over integers in the order of s, among those candidates: few where
a text is predictable, all where it is not at all.

Bytes moved: V * itemsize a row, and V more for `seen`; read twice, and then candidates'
blocks, from the cache.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm4_kernels.extension import DTYPE_CODES, HAS_EXTENSION, buffer, extension
from glm4_kernels.library import FLOAT_DTYPES, as_rows, bad_type, bad_value, register_op
from glm4_kernels.triton_import import HAS_TRITON, tl, triton

MAX_VOCAB = 1 << 18  # times 2^44 is the largest sum; and a program holds the maxima
BLOCK = 64
UNIT_BITS = 44
SHARE_BITS = 30
FLOAT32_MAX = torch.finfo(torch.float32).max
# 2^f for |f| <= 1/2 by Horner's rule: 1e-8 of itself, 1.72 * 2^-24 with the roundings of fp32.
EXP2 = (
    0.00015353361959569156,
    0.0013398875016719103,
    0.00961843691766262,
    0.055503323674201965,
    0.24022647738456726,
    0.6931471824645996,
    1.0,
)


def float32(value: float) -> float:
    """The nearest normal number of fp32."""
    return ctypes.c_float(min(max(value, 2.0**-126), FLOAT32_MAX)).value


def exponent_scale(temperature: float) -> float:
    """log2(e) / temperature: x per unit of score."""
    return float32(math.log2(math.e) / temperature)


def drop_share(top_p: float) -> int:
    """1 - top_p in units of 2^-30."""
    return round((1.0 - top_p) * (1 << SHARE_BITS))


def candidate_reach(scale: float, top_p: float, vocab: int) -> float:
    """How far below the largest score top-p keeps a token at most."""
    if drop_share(top_p) < 8:  # where its own rounding could make D less than the bound's
        return math.inf
    return float32(math.log2(2.0 * vocab / (1.0 - top_p)) / scale)


def sample_reference(
    logits: Tensor,
    uniform: Tensor | None = None,
    seen: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    scores = logits.float()
    if seen is not None:
        penalty = scores.new_full((), float32(repetition_penalty))  # CUDA multiplies by 1 / number
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(seen, penalised, scores)
    largest = scores.amax(-1, keepdim=True)  # NaN if any is
    valid = (largest - largest == 0)[:, 0]
    if uniform is None:
        chosen = scores.argmax(-1)
    else:
        masses = kept_masses(scores.where(valid[:, None], 0.0), temperature, top_k, top_p)
        ends = masses.cumsum(-1)
        total = ends[:, -1:]
        target = (uniform[:, None] * total.double()).long().minimum(total - 1)
        chosen = torch.searchsorted(ends, target, right=True)[:, 0]
    if seen is not None:
        chosen_before = seen.gather(1, chosen[:, None])
        seen.scatter_(1, chosen[:, None], chosen_before | valid[:, None])
    return torch.where(valid, chosen, -1)


def kept_masses(scores: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """[B, V] int64, 0 of what is dropped, from finite penalised scores (or -inf)."""
    masses = masses_of(scores, exponent_scale(temperature))
    if top_k is not None and top_k < scores.shape[1]:
        masses = masses.where(scores >= scores.topk(top_k).values[:, -1:], 0)
    if top_p < 1.0:
        total, share = masses.sum(-1, keepdim=True), drop_share(top_p)
        high, low = total >> SHARE_BITS, total & ((1 << SHARE_BITS) - 1)
        most_dropped = high * share + (low * share >> SHARE_BITS)
        order = scores.sort(dim=-1, stable=True).indices
        dropped = masses.gather(1, order).cumsum(-1) <= most_dropped
        dropped[:, -1].fill_(False)
        masses = masses.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), 0)
    return masses


def masses_of(scores: Tensor, scale: float) -> Tensor:
    x = ((scores - scores.amax(-1, keepdim=True)) * scale).clamp(min=-63.0)
    n = x.round()
    f, power = x - n, torch.full_like(x, EXP2[0])
    for coefficient in EXP2[1:]:
        power = power * f + coefficient
    return ((power * 2.0**30).long() << (UNIT_BITS - 30)) >> (-n).long()


if HAS_TRITON:
    _BLOCK, _UNIT_BITS, _SHARE_BITS = map(tl.constexpr, (BLOCK, UNIT_BITS, SHARE_BITS))
    _C6, _C5, _C4, _C3, _C2, _C1, _C0 = map(tl.constexpr, EXP2)
    _MINUS_INF, _INF = tl.constexpr(-2139095041), tl.constexpr(2139095040)  # their keys


@triton.jit
def _load_scores(logits_ptr, seen_ptr, penalty, columns, mask):
    """s in fp32, without a -0, which would stand below 0; -inf where masked."""
    scores = tl.load(logits_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
    if seen_ptr is not None:
        seen = tl.load(seen_ptr + columns, mask=mask, other=0)
        penalised = tl.where(scores < 0.0, scores * penalty, tl.div_rn(scores, penalty))
        scores = tl.where(seen != 0, penalised, scores)
    return scores + 0.0


@triton.jit
def _keys(scores):
    """int32 in the order of the scores; NaN is the largest."""
    bits = scores.to(tl.int32, bitcast=True)
    return tl.where(scores != scores, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _score_of(keys):
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _masses(keys, largest, scale):
    x = (_score_of(keys) - largest) * scale
    x = tl.where(x > -63.0, x, -63.0)  # NaN too, in rows that are refused in the end
    n = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum rounds half to even
    f = x - n
    power = f * _C6 + _C5
    power = (power * f + _C4) * f + _C3
    power = ((power * f + _C2) * f + _C1) * f + _C0
    mantissa = (power * 1073741824.0).to(tl.int32).to(tl.int64)
    return (mantissa << (_UNIT_BITS - 30)) >> (-n).to(tl.int64)


@triton.jit
def _largest(maxima_ptr, n_blocks, BLOCK_M: tl.constexpr):
    """Of a row: the maxima of its blocks, the largest key, its score (0 where the row is refused)
    and whether it is finite."""
    blocks = tl.arange(0, BLOCK_M)
    maxima = tl.load(maxima_ptr + blocks, mask=blocks < n_blocks, other=_MINUS_INF)
    key = tl.max(maxima, axis=0)
    valid = (key > _MINUS_INF) & (key < _INF)  # those of -inf and inf
    return maxima, key, tl.where(valid, _score_of(key), 0.0), valid


@triton.jit
def _target(uniform_ptr, total):
    """floor(u * total), below total."""
    product = tl.load(uniform_ptr) * total.to(tl.float64)
    return tl.minimum(product.to(tl.int64), total - 1)


@triton.jit
def _store_choice(chosen_ptr, seen_ptr, column, valid):
    tl.store(chosen_ptr, tl.where(valid, column, -1).to(tl.int64))
    if seen_ptr is not None:
        tl.store(seen_ptr + column, 1, mask=valid)


@triton.jit
def _block_maxima_kernel(
    maxima_ptr,
    logits_ptr,
    seen_ptr,
    penalty,
    stride_logits_row,
    stride_seen_row,
    n_cols,
    n_blocks,
    BLOCKS: tl.constexpr,
):
    """The largest key of each of BLOCKS blocks of one row a program."""
    n_programs = tl.cdiv(n_blocks, BLOCKS)
    row = (tl.program_id(0) // n_programs).to(tl.int64)
    blocks = tl.program_id(0) % n_programs * BLOCKS + tl.arange(0, BLOCKS)
    columns = blocks[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    logits_ptr += row * stride_logits_row
    if seen_ptr is not None:
        seen_ptr += row * stride_seen_row

    scores = _load_scores(logits_ptr, seen_ptr, penalty, columns, columns < n_cols)
    maxima = tl.max(_keys(scores), axis=1)

    tl.store(maxima_ptr + row * n_blocks + blocks, maxima, mask=blocks < n_blocks)


@triton.jit
def _block_masses_kernel(
    masses_ptr,
    maxima_ptr,
    logits_ptr,
    seen_ptr,
    penalty,
    scale,
    stride_logits_row,
    stride_seen_row,
    n_cols,
    n_blocks,
    BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The mass of each of BLOCKS blocks of one row a program."""
    n_programs = tl.cdiv(n_blocks, BLOCKS)
    row = (tl.program_id(0) // n_programs).to(tl.int64)
    blocks = tl.program_id(0) % n_programs * BLOCKS + tl.arange(0, BLOCKS)
    columns = blocks[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    logits_ptr += row * stride_logits_row
    if seen_ptr is not None:
        seen_ptr += row * stride_seen_row

    scores = _load_scores(logits_ptr, seen_ptr, penalty, columns, columns < n_cols)
    _, _, largest, _ = _largest(maxima_ptr + row * n_blocks, n_blocks, BLOCK_M)
    masses = tl.sum(_masses(_keys(scores), largest, scale), axis=1)

    tl.store(masses_ptr + row * n_blocks + blocks, masses, mask=blocks < n_blocks)


@triton.jit
def _sample_block_kernel(
    chosen_ptr,
    maxima_ptr,
    masses_ptr,
    logits_ptr,
    uniform_ptr,
    seen_ptr,
    penalty,
    scale,
    stride_logits_row,
    stride_seen_row,
    n_cols,
    n_blocks,
    BLOCK_M: tl.constexpr,
):
    """The token of one row a program where nothing is dropped: its block, then its column. Without
    masses the first of the largest."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits_row
    if seen_ptr is not None:
        seen_ptr += row * stride_seen_row
    maxima, key, largest, valid = _largest(maxima_ptr + row * n_blocks, n_blocks, BLOCK_M)
    blocks = tl.arange(0, BLOCK_M)

    if masses_ptr is None:
        block = tl.min(tl.where(maxima == key, blocks, BLOCK_M), axis=0)
    else:
        masses_ptr += row * n_blocks
        block_masses = tl.load(masses_ptr + blocks, mask=blocks < n_blocks, other=0)
        target = _target(uniform_ptr + row, tl.sum(block_masses, axis=0))
        passed = tl.cumsum(block_masses, axis=0) <= target
        target -= tl.sum(tl.where(passed, block_masses, 0), axis=0)
        block = tl.sum(passed.to(tl.int32), axis=0)

    block = tl.minimum(block, n_blocks - 1)
    columns = block * _BLOCK + tl.arange(0, _BLOCK)
    keys = _keys(_load_scores(logits_ptr, seen_ptr, penalty, columns, columns < n_cols))
    if masses_ptr is None:
        column = tl.min(tl.where(keys == key, columns, n_cols - 1), axis=0)
    else:
        ends = tl.cumsum(_masses(keys, largest, scale), axis=0)
        column = block * _BLOCK + tl.sum((ends <= target).to(tl.int32), axis=0)
        column = tl.minimum(column, n_cols - 1)

    _store_choice(chosen_ptr + row, seen_ptr, column, valid)


@triton.jit
def _threshold(
    keys_ptr,
    n_keys,
    low,
    high,
    limit,
    largest,
    scale,
    BY_MASS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The least integer from low to high above which keys count, or weigh, less than the limit."""
    low, high = low.to(tl.int64), high.to(tl.int64)
    while low < high:
        middle = low + (high - low) // 2
        above = low * 0
        for first in range(0, n_keys, BLOCK_N):
            i = first + tl.arange(0, BLOCK_N)
            keys = tl.load(keys_ptr + i, mask=i < n_keys, other=_MINUS_INF)
            weights = tl.full([BLOCK_N], 1, tl.int64)
            if BY_MASS:
                weights = _masses(keys, largest, scale)
            above += tl.sum(tl.where(keys > middle.to(tl.int32), weights, 0), axis=0)
        low = tl.where(above < limit, low, middle + 1)
        high = tl.where(above < limit, middle, high)
    return low.to(tl.int32)


@triton.jit(do_not_specialize=("top_k", "share"))
def _sample_kept_kernel(
    chosen_ptr,
    keys_ptr,
    columns_ptr,
    starts_ptr,
    maxima_ptr,
    masses_ptr,
    logits_ptr,
    uniform_ptr,
    seen_ptr,
    penalty,
    scale,
    top_k,
    reach,
    share,
    stride_logits_row,
    stride_seen_row,
    n_cols,
    n_blocks,
    TOP_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The token of one row a program with top-k (masses of blocks are None), top-p or both."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits_row
    if seen_ptr is not None:
        seen_ptr += row * stride_seen_row
    maxima_ptr += row * n_blocks
    starts_ptr += row * n_blocks
    keys_ptr += row * n_cols
    columns_ptr += row * n_cols
    maxima, key, largest, valid = _largest(maxima_ptr, n_blocks, BLOCK_M)
    blocks = tl.arange(0, BLOCK_M)
    n_cols = tl.where(valid, n_cols, 0)  # no candidates

    least = _keys(largest - reach)
    if masses_ptr is None:
        smallest = tl.min(tl.where(blocks < n_blocks, maxima, key), axis=0)
        smallest = tl.where(top_k <= n_blocks, smallest, _MINUS_INF)
        high = tl.where(top_k <= n_blocks, key, smallest)
        least = _threshold(
            maxima_ptr, n_blocks, smallest, high, top_k, largest, scale,
            False, BLOCK_N,
        )  # fmt: skip

    live = (maxima >= least) & (blocks < n_blocks)
    live_place = tl.cumsum(live.to(tl.int32), axis=0) - 1
    tl.store(starts_ptr + live_place, blocks * _BLOCK, mask=live)
    n_live = tl.sum(live.to(tl.int32), axis=0) * _BLOCK
    tl.debug_barrier()
    n = n_live * 0
    for first in range(0, n_live, BLOCK_N):
        i = first + tl.arange(0, BLOCK_N)
        start = tl.load(starts_ptr + i // _BLOCK, mask=i < n_live, other=0)
        columns = start + i % _BLOCK
        mask = (i < n_live) & (columns < n_cols)
        keys = _keys(_load_scores(logits_ptr, seen_ptr, penalty, columns, mask))
        taken = mask & (keys >= least)
        place = n + tl.cumsum(taken.to(tl.int32), axis=0) - 1
        tl.store(keys_ptr + place, keys, mask=taken)
        tl.store(columns_ptr + place, columns, mask=taken)
        n += tl.sum(taken.to(tl.int32), axis=0)
    tl.debug_barrier()

    if masses_ptr is None:
        least = _threshold(keys_ptr, n, least, key, top_k, largest, scale, False, BLOCK_N)
        total = n.to(tl.int64) * 0
        for first in range(0, n, BLOCK_N):
            i = first + tl.arange(0, BLOCK_N)
            keys = tl.load(keys_ptr + i, mask=i < n, other=_MINUS_INF)
            masses = _masses(keys, largest, scale)
            total += tl.sum(tl.where(keys >= least, masses, 0), axis=0)
    else:
        masses_ptr += row * n_blocks
        total = tl.sum(tl.load(masses_ptr + blocks, mask=blocks < n_blocks, other=0), axis=0)

    n_dropped = total * 0  # of those that tie with the least
    if TOP_P:
        high = total >> _SHARE_BITS
        low = total - (high << _SHARE_BITS)
        most_dropped = high * share + ((low * share) >> _SHARE_BITS)
        least = _threshold(
            keys_ptr, n, least, key, total - most_dropped, largest, scale,
            True, BLOCK_N,
        )  # fmt: skip
        above, ties = total * 0, total * 0
        for first in range(0, n, BLOCK_N):
            i = first + tl.arange(0, BLOCK_N)
            keys = tl.load(keys_ptr + i, mask=i < n, other=_MINUS_INF)
            masses = _masses(keys, largest, scale)
            above += tl.sum(tl.where(keys > least, masses, 0), axis=0)
            ties += tl.sum((keys == least).to(tl.int64), axis=0)
        tie_mass = tl.sum(_masses(tl.full([1], 0, tl.int32) + least, largest, scale), axis=0)
        below = total - above - ties * tie_mass
        n_dropped = (most_dropped - below) // tl.maximum(tie_mass, 1)
        n_dropped = tl.maximum(tl.minimum(n_dropped, ties - 1), 0)
        total = above + (ties - n_dropped) * tie_mass

    target = _target(uniform_ptr + row, total)
    position, ties, before = n * 0, total * 0, total * 0
    for first in range(0, n, BLOCK_N):
        i = first + tl.arange(0, BLOCK_N)
        keys = tl.load(keys_ptr + i, mask=i < n, other=_MINUS_INF)
        tie = (keys == least).to(tl.int64)
        kept = (keys > least) | ((keys == least) & (ties + tl.cumsum(tie, axis=0) > n_dropped))
        masses = tl.where(kept, _masses(keys, largest, scale), 0)
        passed = (before + tl.cumsum(masses, axis=0) <= target) & (i < n)
        position += tl.sum(passed.to(tl.int32), axis=0)
        ties += tl.sum(tie, axis=0)
        before += tl.sum(masses, axis=0)
    column = tl.load(columns_ptr + position, mask=position < n, other=0)

    _store_choice(chosen_ptr + row, seen_ptr, column, valid)


def launch_sample(
    logits: Tensor,
    uniform: Tensor | None = None,
    seen: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    n_rows, n_cols = logits.shape
    chosen = torch.empty(n_rows, dtype=torch.int64, device=logits.device)
    if n_rows == 0:
        return chosen
    logits = as_rows(logits)
    uniform = None if uniform is None else uniform.contiguous()
    n_blocks = triton.cdiv(n_cols, BLOCK)
    marks = None if seen is None else seen.view(torch.uint8)
    penalty, scale = float32(repetition_penalty), exponent_scale(temperature)
    strides = logits.stride(0), 0 if seen is None else seen.stride(0)
    # A fused multiply-add would make other masses than a CPU does.
    tiles = {"BLOCK_M": triton.next_power_of_2(n_blocks), "enable_fp_fusion": False}
    # Derived, not measured: 1024 columns a program are 148 of them for one row, a wave.
    slices, blocks = (n_rows * triton.cdiv(n_blocks, 16),), 16

    maxima = torch.empty(n_rows, n_blocks, dtype=torch.int32, device=logits.device)
    _block_maxima_kernel[slices](
        *(maxima, logits, marks, penalty, *strides, n_cols, n_blocks),
        BLOCKS=blocks,
        num_warps=2,
    )
    few = uniform is not None and top_k is not None and top_k < n_cols
    masses = None
    if uniform is not None and not few:
        masses = torch.empty(n_rows, n_blocks, dtype=torch.int64, device=logits.device)
        _block_masses_kernel[slices](
            *(masses, maxima, logits, marks, penalty, scale, *strides, n_cols, n_blocks),
            BLOCKS=blocks,
            num_warps=2,
            **tiles,
        )
    if uniform is None or (not few and top_p == 1.0):
        _sample_block_kernel[(n_rows,)](
            *(chosen, maxima, masses, logits, uniform, marks, penalty, scale),
            *(*strides, n_cols, n_blocks),
            num_warps=8,
            **tiles,
        )
        return chosen
    starts = torch.empty_like(maxima)
    keys, columns = torch.empty(2, n_rows, n_cols, dtype=torch.int32, device=logits.device)
    _sample_kept_kernel[(n_rows,)](
        *(chosen, keys, columns, starts, maxima, masses, logits, uniform, marks, penalty, scale),
        *(top_k or 0, candidate_reach(scale, top_p, n_cols), drop_share(top_p)),
        *(*strides, n_cols, n_blocks),
        TOP_P=top_p < 1.0,
        BLOCK_N=2048,
        num_warps=8,
        maxnreg=128,  # else ptxas may spill to fit a program more
        **tiles,
    )
    return chosen


def sample_cpu(
    logits: Tensor,
    uniform: Tensor | None = None,
    seen: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    variant: str = "",
) -> Tensor:
    """The C++ kernel; `variant`: one of build_info()["simd_variants"], by default the best."""
    n_rows, n_cols = logits.shape
    chosen = logits.new_empty(n_rows, dtype=torch.int64)
    logits, scale = as_rows(logits), exponent_scale(temperature)
    uniform = None if uniform is None else uniform.contiguous()
    extension().sample_cpu(
        buffer(chosen),
        buffer(logits),
        buffer(uniform),
        buffer(seen),
        DTYPE_CODES[logits.dtype],
        n_rows,
        n_cols,
        logits.stride(0),
        0 if seen is None else seen.stride(0),
        float32(repetition_penalty),
        scale,
        top_k if top_k is not None and top_k < n_cols else 0,
        candidate_reach(scale, top_p, n_cols),
        drop_share(top_p),
        torch.get_num_threads(),
        variant,
    )
    return chosen


def check_sample(
    logits: Tensor,
    uniform: Tensor | None = None,
    seen: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> None:
    shape, device = logits.shape, logits.device
    if len(shape) != 2 or not 1 <= shape[1] <= MAX_VOCAB:
        raise bad_value("sample", "logits", f"[B, V] with 1 <= V <= {MAX_VOCAB}", list(shape))
    if logits.dtype not in FLOAT_DTYPES:
        raise bad_type("sample", "logits", "float32, bfloat16 or float16", logits.dtype)
    for name, tensor, expected, dtype in (
        ("uniform", uniform, shape[:1], torch.float64),
        ("seen", seen, shape, torch.bool),
    ):
        if tensor is None:
            continue
        if tensor.shape != expected:
            raise bad_value("sample", name, list(expected), list(tensor.shape))
        if tensor.dtype != dtype:
            raise bad_type("sample", name, dtype, tensor.dtype)
        if tensor.device != device:
            raise bad_value("sample", name, f"on {device}", tensor.device)
    if seen is not None:
        rows, column = seen.stride()
        if (shape[0] > 1 and rows < shape[1]) or column != 1:
            raise bad_value("sample", "seen", "of contiguous rows", f"strides {(rows, column)}")
    elif repetition_penalty != 1.0:
        raise bad_value("sample", "repetition_penalty", "1 without seen", repetition_penalty)
    if not 0.0 < temperature < math.inf:
        raise bad_value("sample", "temperature", "over 0 and finite", temperature)
    if top_k is not None and top_k < 1:
        raise bad_value("sample", "top_k", "at least 1 or None", top_k)
    if not 0.0 < top_p <= 1.0:
        raise bad_value("sample", "top_p", "over 0 and at most 1", top_p)
    if not 0.0 < repetition_penalty < math.inf:
        raise bad_value("sample", "repetition_penalty", "over 0 and finite", repetition_penalty)


def check_sample_seen(logits: Tensor, uniform: Tensor | None, seen: Tensor, *settings: Any) -> None:
    if seen is None:
        raise bad_type("sample", "seen", "a tensor", None)
    check_sample(logits, uniform, seen, *settings)


def check_sample_unseen(
    logits: Tensor, uniform: Tensor | None = None, seen: None = None, *settings: Any
) -> None:
    if seen is not None:
        raise bad_value("sample", "seen", "None in this overload, unlike sample.seen", "a tensor")
    check_sample(logits, uniform, None, *settings)


def register(schema: str, check: Callable[..., None]) -> Callable[..., Any]:
    return register_op(
        f"{schema}, float temperature=1.0, int? top_k=None, float top_p=1.0, "
        "float repetition_penalty=1.0) -> Tensor",
        check=check,
        reference=sample_reference,
        launch=launch_sample,
        cpu=sample_cpu if HAS_EXTENSION else None,
        fake=lambda logits, *_: logits.new_empty(logits.shape[0], dtype=torch.int64),
    )


# Two overloads, so that what is written is always there.
_sample_seen = register(
    "sample.seen(Tensor logits, Tensor? uniform, Tensor(a!) seen", check_sample_seen
)
_sample = register(
    "sample(Tensor logits, Tensor? uniform=None, Tensor? seen=None", check_sample_unseen
)


def sample(
    logits: Tensor,
    uniform: Tensor | None = None,
    seen: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """The next token of each row, drawn as transformers' `generate` does, or the most likely one.

    Args:
        logits: [B, V], float32, bfloat16 or float16; any strides; V at most 262,144.
        uniform: [B] float64 in [0, 1), a number to draw each token with; None takes the most likely
            one, the first where tied, whatever temperature, top_k and top_p are.
        seen: [B, V] bool, rows contiguous: tokens that the penalty applies to; the chosen ones are
            added. Needed for a penalty.
        temperature: divides the logits.
        top_k: keeps the k most likely tokens, and those tied with the last of them.
        top_p: keeps the smallest set of most likely tokens whose probabilities reach p.
        repetition_penalty: positive logits of seen tokens are divided, others multiplied by it
            (Keskar et al., 2019).

    Returns:
        [B] int64; -1 for a row that holds NaN, infinity, or nothing but -infinity, once penalised.
        However the work is sliced, by device or threads, it is the same.

    Raises:
        ValueError, TypeError: the message names the argument.
    """
    overload = _sample if seen is None else _sample_seen
    return overload(logits, uniform, seen, temperature, top_k, top_p, repetition_penalty)
