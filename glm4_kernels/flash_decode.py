"""Decode attention over a paged KV cache, with grouped query heads (Flash-Decoding, split KV).

    s = scale * q k^T        p = exp(s - lse)        out = p v        lse = log sum exp(s)

The Q newest tokens of a sequence are its query rows: row i sees `seq_len - Q + i + 1` keys. A row
that sees none gives out = 0 and lse = -inf. Keys live in pages; key t of sequence b is at page
`block_table[b, t // page_size]`, offset `t % page_size`. A quantised cache has a scale per token
and head: k = k_scale * k_cache, folded into s; v = v_scale * v_cache, folded into p.

Two stages: the group's query heads (times Q) form one tile, so that a KV head is read once (for
more rows than its registers hold, several: `row_tiles`). A fixed number of programs takes runs of
keys, shared out by `decode_schedule` (partial); the results of a sequence that several programs had
are merged by lse in a fixed order (combine), one that a single program had it writes itself.

Rounding points: s, p, lse and all sums in fp32 (the kernel rounds p, or p v_scale, to the dtype of
q for the tensor cores; the reference does not); one rounding of out to the dtype of q.

On the CPU scores that are all -inf, of keys that are not finite, have no softmax: out = NaN; and a
V that is not finite reaches no query that must not see its key. The Triton kernel gives 0 for the
first, and lets the Q newest tokens' V reach all Q queries, as 0 * NaN.

On the CPU (csrc/cpu/flash_decode*) products are in fp32, but for two pairs on a processor with
AVX512-BF16 and VNNI, both with q in bf16. Over a bf16 cache p is rounded to bf16. Over an int8
cache q is rounded to 16-bit integers, exact down to a 128th of its row's largest (lse then errs by
up to 1e-5), and p v_scale, over 32 keys, to 8-bit integers of the largest p and v_scale, where
those keys' weights are so alike that this errs by less than 1/32 of their sum even if all err
alike; else to finer ones, that err by less than 1/128 of it, and a second byte.

Bytes moved: keys * G * (2 * D * itemsize, + 8 if quantised), plus q, out and lse; the partials
(splits * Q * H * (D + 1) * 4 written and read) are bounded by the number of programs, not by keys.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from glm4_kernels.decode_schedule import (
    MAX_GROUP,
    MAX_QUERIES,
    UNIT,
    capability,
    launch_decode_schedule,
    most_splits,
    parts_of,
    programs_per_kv_head,
    row_tiles,
    schedule_rows,
    schedule_slots,
)
from glm4_kernels.dependent_launch import COMPILED, dependent, wait_for_producers
from glm4_kernels.extension import DTYPE_CODES, HAS_EXTENSION, buffer, extension
from glm4_kernels.library import (
    FLOAT_DTYPES,
    bad_type,
    bad_value,
    check_fp8,
    error_flag,
    register_op,
)
from glm4_kernels.triton_import import tl, triton

QUANTIZED_DTYPES = (torch.int8, torch.float8_e4m3fn)
HEAD_DIMS = (64, 128)
MIN_PAGE_SIZE = 16
# Normal numbers of fp32, and so is their product with log2(e).
LEAST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**127
# enum class CacheFormat in csrc/flash_decode.h; any other dtype is that of q
CACHE_FORMATS = {torch.int8: 1, torch.float8_e4m3fn: 2}
# Arguments of the kernels that have no bearing on how they load: one binary serves all batches.
SIZES_OF_A_BATCH = (
    *("stride_table_batch", "n_sequences", "n_heads", "n_runs", "n_slots"),
    *("n_pages", "max_pages", "max_keys"),
)
# p * v_scale times this stays among fp16's normal numbers for smaller p; times the largest |v| of
# fp16, 65504, over 127 it stays finite, where p <= 1.
P_RANGE = 64.0
HEADROOM = {torch.float16: 0.0}  # p <= 2^this, see the partial kernel; of other dtypes 8
LOWEST = tl.constexpr(-1e30)  # below all scores, and finite


def flash_decode_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """`schedule` and `batch_invariant` change nothing: here no sequence is split."""
    rows = q if q.dim() == 4 else q.unsqueeze(1)  # [B, Q, H, D]
    n_queries, n_heads = rows.shape[1:3]
    n_kv_heads, page_size = k_cache.shape[1:3]
    group = n_heads // n_kv_heads
    compute = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(rows.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(rows.shape[:3], -torch.inf, dtype=compute, device=q.device)

    for b, length in enumerate(seq_lens.tolist()):
        pages = block_table[b, : -(-length // page_size)].long()
        k = gather_tokens(k_cache, k_scale, pages, length, compute)
        v = gather_tokens(v_cache, v_scale, pages, length, compute)
        for i, n_keys in enumerate(range(length - n_queries + 1, length + 1)):
            if n_keys < 1:
                continue
            grouped = rows[b, i].unflatten(0, (n_kv_heads, group))
            s = grouped.to(compute) @ k[:, :n_keys].mT * scale  # [G, group, n_keys]
            row_lse = s.logsumexp(-1, keepdim=True)
            out[b, i] = (torch.exp(s - row_lse) @ v[:, :n_keys]).flatten(0, 1)
            lse[b, i] = row_lse.flatten()
    return out.view(q.shape), lse.view(q.shape[:-1])


def gather_tokens(
    cache: Tensor, cache_scale: Tensor | None, pages: Tensor, n_keys: int, dtype: torch.dtype
) -> Tensor:
    """The first `n_keys` tokens of a sequence, dequantised: [G, n_keys, D]."""
    by_head = cache[pages].transpose(0, 1).to(dtype, memory_format=torch.contiguous_format)
    tokens = by_head.flatten(1, 2)[:, :n_keys]
    if cache_scale is None:
        return tokens
    return tokens * cache_scale[pages].transpose(0, 1).flatten(1)[:, :n_keys, None]


# Two int16, each of two int8 u, become two bf16x2. 0x4300 | (u & 0x7f) is 128 + (u & 0x7f) in bf16,
# 0x4300 | (u & 0x80) is 128, or 256 where u < 0: their difference is u, exactly.
INT8_TO_BF16 = tl.constexpr(
    """{
    .reg .b32 high, bits, sign, minus_one;
    mov.b32 minus_one, 0xbf80bf80;
    lop3.b32 bits, $2, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 sign, $2, 0x00800080, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, sign, minus_one, bits;
    shr.u32 high, $2, 8;
    lop3.b32 bits, high, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 sign, high, 0x00800080, 0x43004300, 0xea;
    fma.rn.bf16x2 $1, sign, minus_one, bits;
    }"""
)
# The same of e4m3, by way of fp16, which holds all of them.
E4M3_TO_BF16 = tl.constexpr(
    """{
    .reg .b16 a, b, a_low, a_high, b_low, b_high;
    .reg .b32 wide;
    .reg .f32 c, d;
    mov.b32 {a, b}, $2;
    cvt.rn.f16x2.e4m3x2 wide, a;
    mov.b32 {a_low, a_high}, wide;
    cvt.rn.f16x2.e4m3x2 wide, b;
    mov.b32 {b_low, b_high}, wide;
    cvt.f32.f16 c, a_low;
    cvt.f32.f16 d, b_low;
    cvt.rn.bf16x2.f32 $0, d, c;
    cvt.f32.f16 c, a_high;
    cvt.f32.f16 d, b_high;
    cvt.rn.bf16x2.f32 $1, d, c;
    }"""
)


@triton.jit
def _low_and_high(x, dtype: tl.constexpr, FP8: tl.constexpr):
    """The two bytes of int16s, int8 or e4m3, as `dtype`. For bf16 in as few instructions as it
    takes, two registers at a time."""
    if COMPILED and dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            E4M3_TO_BF16 if FP8 else INT8_TO_BF16,
            "=&r,=&r,r",
            [x],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        low, high = x.to(tl.int8), (x >> 8).to(tl.int8)
        if FP8:
            low = low.to(tl.float8e4nv, bitcast=True).to(tl.float32)
            high = high.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        low, high = low.to(dtype), high.to(dtype)
    return low, high


@triton.jit
def _rows(tile, n_queries, kv_head, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The query rows of a tile, their query and head, and which of them there are."""
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = (rows // GROUP).to(tl.int64)
    return rows, query, kv_head * GROUP + rows % GROUP, query < n_queries


@triton.jit
def _unknown(x):
    """x, an int32; to the compiler it might be any."""
    if COMPILED:
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1
        )
    return x


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _flash_decode_partial_kernel(
    out_ptr,
    lse_ptr,
    split_out_ptr,
    split_lse_ptr,
    error_ptr,
    programs_ptr,
    runs_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    seq_lens_ptr,
    k_scale_ptr,
    v_scale_ptr,
    stride_q_batch,
    stride_q_query,
    stride_q_head,
    stride_k_page,
    stride_k_head,
    stride_v_page,
    stride_v_head,
    stride_k_scale_page,
    stride_k_scale_head,
    stride_v_scale_page,
    stride_v_scale_head,
    stride_table_batch,
    n_sequences,
    n_queries,
    n_runs,
    n_slots,
    n_pages,
    max_pages,
    scale,
    STRIDE_K_TOKEN: tl.constexpr,
    STRIDE_V_TOKEN: tl.constexpr,
    FP8: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    P_RANGE: tl.constexpr,
    HEADROOM: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = softmax(scale q k^T) v and its lse, over each run of keys that this program has.

    Online softmax, to base 2, over tiles of BLOCK_N keys, transposed: a column is a query row.
        x = scale k q^T - m        p = 2^x        total += p        acc += v^T p
    m, a reference for each column, is the largest score of the first tile. It rises only when a
    score exceeds it by HEADROOM; acc and total then fall. total is summed over the keys of a tile
    at the very end.

    So keys are the rows of both products: 64 of them fill wgmma's M, few query rows are its N.

    A quantised cache comes as int16, two dims each: q and acc have even and odd dims apart.
    """
    program = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    n_kv_heads = tl.num_programs(1)
    wait_for_producers(PDL)  # all that is read below may have been written in the same graph
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    more = tl.load(programs_ptr + program * 8 + 4)
    n_more = tl.load(programs_ptr + program * 8 + 5)
    schedule_bad = (more < 0) | (n_more < 0) | (more > n_runs - n_more)
    n_more = tl.where(schedule_bad, 0, n_more)
    bad = schedule_bad

    QUANTIZED: tl.constexpr = k_scale_ptr is not None
    WIDTH: tl.constexpr = HEAD_DIM // 2 if QUANTIZED else HEAD_DIM
    # Nothing leaves this loop: what depends on rows alone would fill registers in the inner one.
    for i in tl.range(-1, n_more, disable_licm=True):
        run_ptr = runs_ptr + (more + i).to(tl.int64) * 4
        if i < 0:
            run_ptr = programs_ptr + program * 8
        sequence = tl.load(run_ptr).to(tl.int64)
        first_unit = tl.load(run_ptr + 1)
        end_unit = tl.load(run_ptr + 2)
        slot = tl.load(run_ptr + 3).to(tl.int64)
        run_bad = (sequence < 0) | (sequence >= n_sequences) | (slot >= n_slots)
        sequence = tl.where(run_bad, 0, sequence)
        seq_len = tl.load(seq_lens_ptr + sequence)
        run_bad |= (seq_len < 0) | (seq_len > max_pages * PAGE_SIZE)
        run_bad |= (first_unit < 0) | (end_unit > tl.cdiv(seq_len, UNIT))
        empty = first_unit >= end_unit
        bad |= run_bad & (empty == 0)
        empty |= run_bad
        first_key = tl.where(empty, 0, first_unit.to(tl.int64) * UNIT).to(tl.int32)
        end_key = tl.minimum(end_unit.to(tl.int64) * UNIT, seq_len).to(tl.int32)
        end_key = tl.where(empty, 0, end_key)

        if first_key < end_key:
            # Rows are the group's heads of query 0, then those of query 1, ...
            tile = tl.program_id(2)
            rows, query, head, row_mask = _rows(tile, n_queries, kv_head, GROUP, BLOCK_M)
            first_hidden = seq_len - n_queries + 1  # the first key that query 0 does not see

            units = tl.arange(0, WIDTH)
            q_rows = sequence * stride_q_batch + query * stride_q_query + head * stride_q_head
            q_ptrs = q_ptr + q_rows[:, None] + units[None, :] * (HEAD_DIM // WIDTH)
            q = tl.trans(tl.load(q_ptrs, mask=row_mask[:, None], other=0.0))
            m = tl.zeros([BLOCK_M], tl.float32)
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            acc = tl.zeros([WIDTH, BLOCK_M], tl.float32)
            if QUANTIZED:
                q_odd = tl.trans(tl.load(q_ptrs + 1, mask=row_mask[:, None], other=0.0))
                acc_odd = tl.zeros([WIDTH, BLOCK_M], tl.float32)
            scale_log2 = scale * 1.4426950408889634

            token = tl.arange(0, BLOCK_N)
            k_offsets = token.to(tl.int64)[:, None] * STRIDE_K_TOKEN + units[None, :]
            v_offsets = token.to(tl.int64)[None, :] * STRIDE_V_TOKEN + units[:, None]
            table_ptr = block_table_ptr + sequence * stride_table_batch
            page_id = tl.load(table_ptr + first_key // PAGE_SIZE)
            fresh = first_key < end_key  # no key seen yet
            for start in range(first_key, end_key, BLOCK_N):
                page = page_id.to(tl.int64)
                page_bad = (page < 0) | (page >= n_pages)
                bad |= page_bad
                n_keys = tl.where(page_bad, 0, seq_len)
                in_page = tl.cast(start % PAGE_SIZE, tl.int64) if BLOCK_N < PAGE_SIZE else 0
                # A tile ahead, so that no K waits for the address of its page.
                next_start = start + BLOCK_N
                next_ptr = table_ptr + next_start // PAGE_SIZE
                page_id = tl.load(next_ptr, mask=next_start < end_key, other=0)

                page_mask = tl.full([BLOCK_N], n_keys, tl.int32) > 0
                k_tile = page * stride_k_page + kv_head * stride_k_head + in_page * STRIDE_K_TOKEN
                k = tl.load(
                    k_ptr + k_tile + k_offsets,
                    mask=page_mask[:, None],
                    other=0,
                    eviction_policy="evict_first",
                )
                if QUANTIZED:
                    k, k_odd = _low_and_high(k, q.dtype, FP8)
                    k_scales = page * stride_k_scale_page + kv_head * stride_k_scale_head + in_page
                    k_scale = tl.load(k_scale_ptr + k_scales + token, mask=page_mask, other=0.0)
                    s = tl.dot(k, q, input_precision="ieee")
                    s = tl.dot(k_odd, q_odd, s, input_precision="ieee")
                    x = s * (k_scale * scale_log2)[:, None] - m[None, :]
                else:
                    x = tl.dot(k, q, input_precision="ieee") * scale_log2 - m[None, :]
                if next_start > tl.minimum(n_keys, first_hidden):
                    n_visible = tl.minimum(first_hidden + rows // GROUP, n_keys)
                    visible = (start + token)[:, None] < n_visible[None, :]
                    x = tl.where(visible, x, float("-inf"))

                first = fresh & (page_bad == 0)
                if first | (tl.max(x) > HEADROOM):
                    m_new = m + tl.maximum(tl.max(x, axis=0), tl.where(first, LOWEST, 0.0))
                    rise = m_new - m
                    m = m_new
                    x -= rise[None, :]
                    decay = tl.exp2(-tl.maximum(rise, 0.0))[None, :]
                    total *= decay
                    acc *= decay
                    if QUANTIZED:
                        acc_odd *= decay
                fresh &= page_bad
                p = tl.exp2(x)
                total += p

                v_mask = start + token < n_keys  # what lies past a length may be NaN
                v_tile = page * stride_v_page + kv_head * stride_v_head + in_page * STRIDE_V_TOKEN
                v = tl.load(
                    v_ptr + v_tile + v_offsets,
                    mask=v_mask[None, :],
                    other=0,
                    eviction_policy="evict_first",
                )
                if QUANTIZED:
                    v, v_odd = _low_and_high(v, q.dtype, FP8)
                    v_scales = page * stride_v_scale_page + kv_head * stride_v_scale_head + in_page
                    v_scale = tl.load(v_scale_ptr + v_scales + token, mask=v_mask, other=0.0)
                    p = (p * (v_scale * P_RANGE)[:, None]).to(q.dtype)
                    acc_odd = tl.dot(v_odd, p, acc_odd, input_precision="ieee")
                    acc = tl.dot(v, p, acc, input_precision="ieee")
                else:
                    acc = tl.dot(v, p.to(q.dtype), acc, input_precision="ieee")

            sums = tl.sum(total, axis=0)
            seen = sums != 0.0  # NaN is
            lse_log2 = tl.where(seen, m + tl.log2(sums), float("-inf"))
            norm = 1.0 / tl.where(seen, sums, 1.0)
            if QUANTIZED:
                norm *= 1.0 / P_RANGE
                acc = tl.permute(tl.join(acc, acc_odd), (0, 2, 1)).reshape(HEAD_DIM, BLOCK_M)
            out = tl.trans(acc * norm[None, :])
            dims = tl.arange(0, HEAD_DIM)
            tile = _unknown(tile)  # else all this stays in registers since above
            rows, query, head, row_mask = _rows(tile, n_queries, kv_head, GROUP, BLOCK_M)
            if slot < 0:
                n_heads = n_kv_heads * GROUP
                out_rows = (sequence * n_queries + query) * n_heads + head
                tl.store(lse_ptr + out_rows, lse_log2 * 0.6931471805599453, mask=row_mask)
                out_ptrs = out_ptr + out_rows[:, None] * HEAD_DIM + dims[None, :]
                tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None])
            else:
                split_rows = (kv_head * n_slots + slot) * (n_queries * GROUP) + rows
                tl.store(split_lse_ptr + split_rows, lse_log2, mask=row_mask)
                split_ptrs = split_out_ptr + split_rows[:, None] * HEAD_DIM + dims[None, :]
                tl.store(split_ptrs, out, mask=row_mask[:, None])
    if bad:
        tl.store(error_ptr, 1)


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _flash_decode_combine_kernel(
    out_ptr,
    lse_ptr,
    error_ptr,
    split_out_ptr,
    split_lse_ptr,
    splits_ptr,
    seq_lens_ptr,
    n_queries,
    n_heads,
    n_slots,
    max_keys,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = sum_s w_s out_s / sum_s w_s with w_s = 2^(lse_s - max lse); one row, BLOCK_D dims.

    Nothing to do for a row with one split; zeros and -inf for one with none.
    """
    wait_for_producers(PDL)
    row = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sequence = row // (n_queries * n_heads)
    query, head = row // n_heads % n_queries, row % n_heads
    kv_head, row_of_head = head // GROUP, query * GROUP + head % GROUP

    seq_len = tl.load(seq_lens_ptr + sequence)
    n_splits = tl.load(splits_ptr + sequence * 4)
    first_slot = tl.load(splits_ptr + sequence * 4 + 1)
    base = tl.load(splits_ptr + sequence * 4 + 2)
    units = tl.load(splits_ptr + sequence * 4 + 3)
    bad = (seq_len < 0) | (seq_len > max_keys) | (tl.cdiv(seq_len, UNIT) != units)
    bad |= (n_splits < 1) & (units > 0)
    if n_splits > 1:
        bad |= (
            (first_slot < 0) | (first_slot >= n_slots) | (base < -1) | (base > n_slots - n_splits)
        )
    n_splits = tl.where(bad, 0, n_splits)
    if bad:
        tl.store(error_ptr, 1)

    if n_splits != 1:
        m = tl.max(tl.full([BLOCK_S], float("-inf"), tl.float32), axis=0)
        total = tl.sum(tl.zeros([BLOCK_S], tl.float32), axis=0)
        acc = tl.zeros([BLOCK_D], tl.float32)
        for first in range(0, n_splits, BLOCK_S):
            split = first + tl.arange(0, BLOCK_S)
            slot = tl.where(split == 0, first_slot, base + split)
            split_rows = (kv_head * n_slots + slot) * (n_queries * GROUP) + row_of_head
            mask = split < n_splits
            split_lse = tl.load(split_lse_ptr + split_rows, mask=mask, other=float("-inf"))
            split_ptrs = split_out_ptr + split_rows[:, None] * HEAD_DIM + dims[None, :]
            split_out = tl.load(split_ptrs, mask=mask[:, None], other=0.0)

            m_new = tl.maximum(m, tl.max(split_lse, axis=0))
            m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
            weight = tl.exp2(split_lse - m_finite)
            decay = tl.exp2(m - m_finite)
            total = total * decay + tl.sum(weight, axis=0)
            acc = acc * decay + tl.sum(weight[:, None] * split_out, axis=0)
            m = m_new

        total = tl.where(total == 0.0, 1.0, total)
        tl.store(out_ptr + row * HEAD_DIM + dims, (acc / total).to(out_ptr.dtype.element_ty))
        lse = (m + tl.log2(total)) * 0.6931471805599453
        tl.store(lse_ptr + row, lse, mask=tl.program_id(1) == 0)


def launch_plan(
    n_rows: int, q_bytes: int, kv_bytes: int, capability: int
) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps, num_stages) of the partial kernel.

    Derived and compiled, not measured yet. To stream at full speed an H200 needs about
    4.3 TB/s * 1 us / 132 = 33 KB in flight per multiprocessor. Up to 32 rows two programs share a
    multiprocessor (`programs_per_kv_head`), and each has a tile or more of K and V in flight, 32 KB
    in bf16, 16 KB in int8: two of bf16, three of int8, one less where a multiprocessor has no more
    than 100 KB. Beyond 32 rows one program of 8 warps has it.

    Rows are padded to a power of two from 8 on: to no more than the next 16 for the groups of
    GLM-4 and one query. Two tiles a program, 32 + 16 rows for 48, compile to more instructions than
    the padding, and spill.

    Args:
        n_rows: query rows that share a KV head, Q * group.
        q_bytes, kv_bytes: bytes of one element of q and of the caches.
        capability: of the device, 90 for sm_90.
    """
    n_tiles = row_tiles(n_rows, capability, quantized=kv_bytes == 1)
    block_m = max(triton.next_power_of_2(triton.cdiv(n_rows, n_tiles)), 8)
    if q_bytes == 4:  # no tensor cores: the products live in registers
        return min(block_m, 16), 32, 8, 2
    roomy = capability // 10 != 12 and capability not in (86, 89)
    return block_m, 64, 4 if block_m <= 32 else 8, (4 if kv_bytes == 1 else 3) - (not roomy)


def combine_plan(n_rows: int, most_splits: int, batch_invariant: bool) -> tuple[int, int]:
    """(BLOCK_S, BLOCK_D) of the combine kernel: the order of its sums, so that `batch_invariant`
    may not depend on the batch.

    Derived, not measured yet. Few rows have many splits each: 32 dims a program, all splits loaded
    at once. Many rows have few: a program has the whole row.

    Args:
        n_rows: B * Q * H.
        most_splits: splits that one sequence may have.
    """
    if batch_invariant:
        return 64, 64
    if n_rows <= 256:
        return max(min(triton.next_power_of_2(most_splits), 256), 16), 32
    return 32, 128


def launch_flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """`schedule` may be for any number of programs.

    `pdl` (sm_90 up): programmatic dependent launch. The partial kernel is then launched while the
    kernel before it still runs, the combine while the partial kernel does; each waits for all of
    its predecessor's writes (`gdc_wait`) before it touches memory: even the lengths, the table and
    the schedule may have been written in the same graph. Not measured yet, so nobody but the
    benchmark asks for it.
    """
    rows = q if q.dim() == 4 else q.unsqueeze(1)  # [B, Q, H, D]
    batch, n_queries, n_heads, head_dim = rows.shape
    n_pages, n_kv_heads, page_size = k_cache.shape[:3]
    max_pages = block_table.shape[1]
    group = n_heads // n_kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    rows = rows if rows.stride(3) == 1 else rows.contiguous()
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    seq_lens = seq_lens.contiguous()
    if schedule is None:
        schedule = launch_decode_schedule(seq_lens, n_heads, n_kv_heads, n_queries, batch_invariant)

    runs = batch * most_splits(n_kv_heads, batch_invariant)
    programs = (len(schedule) - runs - batch) // 2
    of_programs, more_runs, of_sequences = parts_of(schedule, batch, programs)
    slots = schedule_slots(batch, programs, n_kv_heads, max_pages * page_size, batch_invariant)
    split_shape = (n_kv_heads, slots, n_queries * group)
    split_out = torch.empty((*split_shape, head_dim), dtype=torch.float32, device=q.device)
    split_lse = torch.empty(split_shape, dtype=torch.float32, device=q.device)

    block_m, block_n, num_warps, num_stages = launch_plan(
        n_queries * group, q.element_size(), k_cache.element_size(), capability(q.device)
    )
    k, v = k_cache, v_cache
    if k_scale is not None:
        k, v = k_cache.view(torch.int16), v_cache.view(torch.int16)
    error = error_flag("flash_decode", q.device)
    _flash_decode_partial_kernel[(programs, n_kv_heads, triton.cdiv(n_queries * group, block_m))](
        out,
        lse,
        split_out,
        split_lse,
        error,
        of_programs,
        more_runs,
        rows,
        k,
        v,
        block_table,
        seq_lens,
        k_scale,
        v_scale,
        *rows.stride()[:3],
        *k.stride()[:2],
        *v.stride()[:2],
        *((0, 0) if k_scale is None else k_scale.stride()[:2]),
        *((0, 0) if v_scale is None else v_scale.stride()[:2]),
        block_table.stride(0),
        batch,
        n_queries,
        runs,
        slots,
        n_pages,
        max_pages,
        scale,
        STRIDE_K_TOKEN=k.stride(2),
        STRIDE_V_TOKEN=v.stride(2),
        FP8=k_cache.dtype == torch.float8_e4m3fn,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        UNIT=UNIT,
        BLOCK_M=block_m,
        BLOCK_N=min(block_n, page_size),  # a tile lies within one page
        P_RANGE=P_RANGE,
        HEADROOM=HEADROOM.get(q.dtype, 8.0),
        num_warps=num_warps,
        num_stages=num_stages,
        maxnreg=255,  # else ptxas may spill to fit more programs than the schedule has
        **dependent(pdl),
    )
    n_rows = batch * n_queries * n_heads
    block_s, block_d = combine_plan(n_rows, programs + 1, batch_invariant)
    block_d = min(block_d, head_dim)
    _flash_decode_combine_kernel[(n_rows, head_dim // block_d)](
        out,
        lse,
        error,
        split_out,
        split_lse,
        of_sequences,
        seq_lens,
        n_queries,
        n_heads,
        slots,
        max_pages * page_size,
        GROUP=group,
        HEAD_DIM=head_dim,
        UNIT=UNIT,
        BLOCK_S=block_s,
        BLOCK_D=block_d,
        **dependent(pdl),
    )
    return out, lse


def flash_decode_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
    variant: str = "",
) -> tuple[Tensor, Tensor]:
    """The C++ kernel, which checks lengths and page ids itself. It shares out the keys itself too,
    each sequence by its own length, so that `schedule` and `batch_invariant` change nothing.
    `variant`: its inner loops, of build_info()["flash_decode_variants"]; the best by default."""
    rows = q if q.dim() == 4 else q.unsqueeze(1)  # [B, Q, H, D]
    rows = rows if rows.stride(3) == 1 else rows.contiguous()
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    seq_lens = seq_lens.contiguous()
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    extension().flash_decode_cpu(
        *map(buffer, (out, lse, rows, k_cache, v_cache, block_table, seq_lens, k_scale, v_scale)),
        DTYPE_CODES[q.dtype],
        CACHE_FORMATS.get(k_cache.dtype, 0),
        scale,
        [*rows.shape, *k_cache.shape[:3], block_table.shape[1]],
        [
            *rows.stride()[:3],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            *((0, 0) if k_scale is None else k_scale.stride()[:2]),
            *((0, 0) if v_scale is None else v_scale.stride()[:2]),
            block_table.stride(0),
        ],
        torch.get_num_threads(),
        variant,
    )
    return out, lse


def check_flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
    op: str = "flash_decode",
) -> None:
    if q.dim() not in (3, 4):
        raise bad_value(op, "q", "[B, H, D] or [B, Q, H, D]", list(q.shape))
    if q.dtype not in FLOAT_DTYPES:
        raise bad_type(op, "q", "float32, bfloat16 or float16", q.dtype)
    batch, n_heads, head_dim = q.shape[0], q.shape[-2], q.shape[-1]
    if head_dim not in HEAD_DIMS:
        raise bad_value(op, "q", f"[..., D] with D one of {HEAD_DIMS}", list(q.shape))
    if q.dim() == 4 and not 1 <= q.shape[1] <= MAX_QUERIES:
        raise bad_value(op, "q", f"[B, Q, H, D] with 1 <= Q <= {MAX_QUERIES}", list(q.shape))

    if k_cache.dim() != 4 or k_cache.shape[3] != head_dim:
        raise bad_value(op, "k_cache", f"[n_pages, G, page_size, {head_dim}]", list(k_cache.shape))
    n_kv_heads, page_size = k_cache.shape[1:3]
    if page_size < MIN_PAGE_SIZE or page_size & (page_size - 1) != 0:
        expected = f"pages of a power of two of at least {MIN_PAGE_SIZE} tokens"
        raise bad_value(op, "k_cache", expected, list(k_cache.shape))
    if not (n_kv_heads >= 1 and n_kv_heads <= n_heads <= MAX_GROUP * n_kv_heads) or (
        n_heads % n_kv_heads != 0
    ):
        expected = f"1 to {MAX_GROUP} times the {n_kv_heads} KV heads"
        raise bad_value(op, "q", f"[..., H, D] with H {expected}", list(q.shape))
    if k_cache.dtype not in (q.dtype, *QUANTIZED_DTYPES):
        raise bad_type(op, "k_cache", f"{q.dtype}, int8 or float8_e4m3fn", k_cache.dtype)
    if v_cache.shape != k_cache.shape:
        raise bad_value(op, "v_cache", list(k_cache.shape), list(v_cache.shape))
    if v_cache.dtype != k_cache.dtype:
        raise bad_type(op, "v_cache", k_cache.dtype, v_cache.dtype)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(3) != 1:
            raise bad_value(op, name, "contiguous over D", f"strides {cache.stride()}")
        # Kernels read two bytes at a time.
        if cache.dtype in QUANTIZED_DTYPES and any(
            x % 2 for x in (*cache.stride()[:3], cache.storage_offset())
        ):
            expected = "a view with even strides and an even offset"
            raise bad_value(op, name, expected, f"{cache.stride()}, {cache.storage_offset()}")

    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise bad_value(op, "block_table", f"[{batch}, max_pages]", list(block_table.shape))
    if block_table.shape[1] * page_size >= 2**31:
        expected = "[B, max_pages] with max_pages * page_size < 2^31"
        raise bad_value(op, "block_table", expected, list(block_table.shape))
    if seq_lens.shape != (batch,):
        raise bad_value(op, "seq_lens", f"[{batch}]", list(seq_lens.shape))
    for name, index in (("block_table", block_table), ("seq_lens", seq_lens)):
        if index.dtype != torch.int32:
            raise bad_type(op, name, torch.int32, index.dtype)

    if schedule is not None:
        n_queries = q.shape[1] if q.dim() == 4 else 1
        programs = programs_per_kv_head(n_queries * n_heads // n_kv_heads, n_kv_heads, q.device)
        shape = [schedule_rows(batch, programs, n_kv_heads, batch_invariant), 4]
        if list(schedule.shape) != shape or not schedule.is_contiguous():
            expected = f"what decode_schedule gives for these sizes, {shape}"
            raise bad_value(op, "schedule", expected, list(schedule.shape))
        if schedule.dtype != torch.int32:
            raise bad_type(op, "schedule", torch.int32, schedule.dtype)

    if not LEAST_SCALE <= scale <= LARGEST_SCALE:
        expected = "positive and finite in float32, from 2^-126 to 2^127"
        raise bad_value(op, "scale", expected, scale)
    check_fp8(op, "k_cache", k_cache.dtype, q.device)
    quantized = k_cache.dtype in QUANTIZED_DTYPES
    for name, cache_scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if cache_scale is None:
            if quantized:
                raise bad_value(op, name, f"given with a cache of {k_cache.dtype}", None)
            continue
        if not quantized:
            raise bad_value(op, name, f"None with a cache of {k_cache.dtype}", "a tensor")
        if cache_scale.shape != k_cache.shape[:3]:
            raise bad_value(op, name, list(k_cache.shape[:3]), list(cache_scale.shape))
        if cache_scale.dtype != torch.float32:
            raise bad_type(op, name, torch.float32, cache_scale.dtype)
        if cache_scale.stride(2) != 1:
            raise bad_value(op, name, "contiguous over tokens", f"strides {cache_scale.stride()}")

    for name, tensor in (
        ("k_cache", k_cache),
        ("v_cache", v_cache),
        ("block_table", block_table),
        ("seq_lens", seq_lens),
        ("k_scale", k_scale),
        ("v_scale", v_scale),
        ("schedule", schedule),
    ):
        if tensor is not None and tensor.device != q.device:
            raise bad_value(op, name, f"on {q.device}", tensor.device)


def check_flash_decode_values(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *_: object,
) -> None:
    n_pages, _n_kv_heads, page_size = k_cache.shape[:3]
    max_pages = block_table.shape[1]
    bad = (seq_lens < 0) | (seq_lens > max_pages * page_size)
    if bad.any():
        expected = f"in 0..{max_pages * page_size}"
        raise bad_value("flash_decode", "seq_lens", expected, seq_lens[bad][0].item())
    first_keys = torch.arange(max_pages, dtype=torch.int64, device=q.device) * page_size
    used = first_keys < seq_lens[:, None]
    pages = block_table[used]
    bad = (pages < 0) | (pages >= n_pages)
    if bad.any():
        expected = f"page ids in 0..{n_pages - 1} within the lengths"
        raise bad_value("flash_decode", "block_table", expected, pages[bad][0].item())


def fake_flash_decode(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


_flash_decode = register_op(
    "flash_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, "
    "float scale, Tensor? k_scale=None, Tensor? v_scale=None, Tensor? schedule=None, "
    "bool batch_invariant=False) -> (Tensor, Tensor)",
    check=check_flash_decode,
    check_values=check_flash_decode_values,
    reference=flash_decode_reference,
    launch=launch_flash_decode,
    cpu=flash_decode_cpu if HAS_EXTENSION else None,
    fake=fake_flash_decode,
)


@overload
def flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: Literal[False] = False,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor: ...
@overload
def flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    return_lse: Literal[True],
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]: ...
def flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a batch's newest tokens over its paged KV cache (Flash-Decoding, Dao 2023).

    Args:
        q: [B, H, D], or [B, Q, H, D] with Q <= 8 newest tokens, causal; any strides; float32,
            bfloat16 or float16; D 64 or 128.
        k_cache, v_cache: [n_pages, G, page_size, D], H = 1..32 times G, page_size a power of two
            of at least 16; dtype of q, int8 or float8_e4m3fn (CUDA: from sm_89); any strides
            (of a quantised cache even ones), D contiguous.
        block_table: [B, max_pages] int32, page ids; entries past a length are never read.
        seq_lens: [B] int32, the tokens in the cache, those of q included; 0 is allowed.
        scale: multiplies q k^T; 1 / sqrt(D) as a rule.
        k_scale, v_scale: [n_pages, G, page_size] float32, given exactly with a quantised cache;
            tokens contiguous.
        return_lse: return also the natural log of each row's sum of exponentials.
        schedule: what `decode_schedule` made of seq_lens, H, G, Q and `batch_invariant`, so that
            the layers of a step share it; None makes it here. The CPU needs none.
        batch_invariant: a sequence's result does not depend, in any bit, on the others in the
            batch. Costs time where lengths are short or uneven. The CPU is always so.

    Returns:
        out, shape and dtype of q; or (out, lse), lse float32 [B, H] or [B, Q, H].
        Deterministic run to run on one device.

    Raises:
        ValueError, TypeError: the message names the argument. Page ids and lengths out of range
        raise on CPU; on CUDA their keys are left out and `raise_device_errors` reports them, as it
        does a schedule made for other lengths.
    """
    out, lse = _flash_decode(
        *(q, k_cache, v_cache, block_table, seq_lens, scale),
        *(k_scale, v_scale, schedule, batch_invariant),
    )
    return (out, lse) if return_lse else out
