"""From the packed qkv projection of new tokens to rotated queries and a written KV cache.

    q, k, v = split(qkv + bias)
    q, k    = rope(q, k)
    K[page, :, offset] = k,  V[page, :, offset] = v        page, offset = divmod(slot, page_size)

into pages [n_pages, G, page_size, D]; slot -1 writes nothing (padding of a captured graph). A
quantised cache holds one scale per token and head, amax|x| / 127 for int8 and amax|x| / 448 for
float8_e4m3fn, and round(x / scale), half to even; a head of zeros has scale 0.

Rounding points: qkv + bias is rounded to the dtype (transformers adds the bias inside the linear,
before its one rounding: with bias=None and the bias in the linear the bits are HF's), then those
of `rope`; quantisation reads the rounded k and v.

Bytes moved: T * (H + 2G) * D * itemsize read, T * H * D * itemsize + 2 * T * G * (D * itemsize of
the cache, + 4 where it is quantised) written, and rotary_dim * itemsize of the table + 16 a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4_kernels.dependent_launch import dependent, issue_loads, wait_for_producers
from glm4_kernels.extension import DTYPE_CODES, HAS_EXTENSION, buffer, extension
from glm4_kernels.library import (
    FLOAT_DTYPES,
    bad_type,
    bad_value,
    check_fp8,
    error_flag,
    multiprocessor_count,
    register_op,
)
from glm4_kernels.overlap import check_apart, not_apart, overlap
from glm4_kernels.quantize_rows import QUANTISED_LIMIT
from glm4_kernels.rope import (
    INDEX_DTYPES,
    check_positions,
    check_rotation,
    head_block,
    head_warps,
    load_rotation,
    rope_reference,
    rotate_pairs,
)
from glm4_kernels.triton_import import tl, triton


def rope_kv_write_reference(
    qkv: Tensor,
    positions: Tensor,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    n_heads: int,
    bias: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    n_kv_heads, page_size, head_dim = k_cache.shape[1:]
    if bias is not None:
        qkv = qkv + bias
    heads = qkv.unflatten(1, (n_heads + 2 * n_kv_heads, head_dim))
    q, k, v = heads.split([n_heads, n_kv_heads, n_kv_heads], dim=1)
    q, k = rope_reference(q, k, positions, table)

    written = slots >= 0
    page, offset = slots[written] // page_size, slots[written] % page_size
    for x, cache, cache_scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        x = x[written]
        if cache_scale is not None:
            x, cache_scale[page, :, offset] = quantise_heads(x, cache.dtype)
            x, cache = x.view(torch.uint8), cache.view(torch.uint8)
        cache[page, :, offset] = x
    return q


def quantise_heads(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [T, G, D] in `dtype`, and scale [T, G] such that x is about scale * the first."""
    limit = QUANTISED_LIMIT[dtype]
    x = x.to(torch.float32)
    amax = x.abs().amax(-1, keepdim=True)
    scale = amax / torch.full_like(amax, limit)  # by a number, CUDA would multiply by 1 / limit
    x = (x / torch.where(scale > 0, scale, 1.0)).clamp(-limit, limit)
    return (x.round() if dtype == torch.int8 else x).to(dtype), scale.squeeze(-1)


@triton.jit
def _load_bias(bias_ptr, offset, mask):
    return 0.0 if bias_ptr is None else tl.load(bias_ptr + offset, mask=mask, other=0.0)


@triton.jit
def _add_bias(x, bias, bias_ptr):
    """round(x + bias), or x where there is no bias."""
    return x if bias_ptr is None else (x.to(tl.float32) + bias.to(tl.float32)).to(x.dtype)


@triton.jit
def _write_heads(cache_ptr, scale_ptr, x, cache_offset, scale_offset, mask, head_mask):
    """Stores x [heads, D], quantised with one scale a head where there are scales."""
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    if scale_ptr is not None:
        LIMIT: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
        x = x.to(tl.float32)
        scale = tl.div_rn(tl.max(tl.abs(x), axis=1, keep_dims=True), LIMIT)
        tl.store(scale_ptr + scale_offset, scale, mask=head_mask)
        x = tl.div_rn(x, tl.where(scale > 0.0, scale, 1.0))
        x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
        if dtype == tl.int8:
            x = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum rounds half to even
    tl.store(cache_ptr + cache_offset, x.to(dtype), mask=mask)


@triton.jit
def _rope_kv_write_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    error_ptr,
    qkv_ptr,
    bias_ptr,
    positions_ptr,
    table_ptr,
    slots_ptr,
    stride_qkv_token,
    stride_table_row,
    stride_cache_page,
    stride_cache_head,
    stride_cache_offset,
    stride_scale_page,
    stride_scale_head,
    stride_scale_offset,
    n_positions,
    n_slots,
    n_heads,
    n_kv_heads,
    PDL: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_H query heads, or BLOCK_G heads of the cache, of one token a program."""
    n_q_blocks = tl.cdiv(n_heads, BLOCK_H)
    n_blocks = n_q_blocks + tl.cdiv(n_kv_heads, BLOCK_G)
    token = (tl.program_id(0) // n_blocks).to(tl.int64)
    block = tl.program_id(0) % n_blocks
    row_ptr = qkv_ptr + token * stride_qkv_token
    dim = tl.arange(0, BLOCK_D)[None, :]

    if block < n_q_blocks:
        head = (block * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]).to(tl.int64)
        q_mask = (head < n_heads) & (dim < HEAD_DIM)
        q_column = head * HEAD_DIM + dim

        q_bias = _load_bias(bias_ptr, q_column, q_mask)
        wait_for_producers(PDL)
        q = tl.load(row_ptr + q_column, mask=q_mask, other=0.0)
        cos, sin, known = load_rotation(
            positions_ptr, table_ptr, error_ptr, token, stride_table_row, n_positions,
            ROTARY_DIM, BLOCK_D,
        )  # fmt: skip
        issue_loads()

        q = rotate_pairs(_add_bias(q, q_bias, bias_ptr), cos, sin, ROTARY_DIM)
        q = tl.where(known, q, 0.0).to(q.dtype)
        tl.store(q_ptr + token * n_heads * HEAD_DIM + q_column, q, mask=q_mask)
    else:
        group = ((block - n_q_blocks) * BLOCK_G + tl.arange(0, BLOCK_G)[:, None]).to(tl.int64)
        mask = (group < n_kv_heads) & (dim < HEAD_DIM)
        k_column = (n_heads + group) * HEAD_DIM + dim
        v_column = k_column + n_kv_heads * HEAD_DIM

        k_bias = _load_bias(bias_ptr, k_column, mask)
        v_bias = _load_bias(bias_ptr, v_column, mask)
        wait_for_producers(PDL)
        slot = tl.load(slots_ptr + token).to(tl.int64)
        k = tl.load(row_ptr + k_column, mask=mask, other=0.0)
        v = tl.load(row_ptr + v_column, mask=mask, other=0.0)
        cos, sin, known = load_rotation(
            positions_ptr, table_ptr, error_ptr, token, stride_table_row, n_positions,
            ROTARY_DIM, BLOCK_D,
        )  # fmt: skip
        issue_loads()

        tl.store(error_ptr, 1, mask=(slot < -1) | (slot >= n_slots))
        written = known & (slot >= 0) & (slot < n_slots)
        group_mask = group < tl.where(written, n_kv_heads, 0)
        mask = group_mask & (dim < HEAD_DIM)
        k = rotate_pairs(_add_bias(k, k_bias, bias_ptr), cos, sin, ROTARY_DIM)
        v = _add_bias(v, v_bias, bias_ptr)

        page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
        at = page * stride_cache_page + offset * stride_cache_offset + group * stride_cache_head
        scale_at = (
            page * stride_scale_page + offset * stride_scale_offset + group * stride_scale_head
        )
        _write_heads(k_cache_ptr, k_scale_ptr, k, at + dim, scale_at, mask, group_mask)
        _write_heads(v_cache_ptr, v_scale_ptr, v, at + dim, scale_at, mask, group_mask)


def launch_rope_kv_write(
    qkv: Tensor,
    positions: Tensor,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    n_heads: int,
    bias: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    n_tokens = qkv.shape[0]
    n_pages, n_kv_heads, page_size, head_dim = k_cache.shape
    q = torch.empty((n_tokens, n_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if n_tokens == 0:
        return q
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    table = table if table.stride(1) == 1 else table.contiguous()
    block_h = head_block(n_tokens, n_heads + n_kv_heads, multiprocessor_count(qkv.device))
    block_g = max(block_h // 2, 2)  # K and V of half as many heads: the same work
    block_d = triton.next_power_of_2(head_dim)
    n_blocks = triton.cdiv(n_heads, block_h) + triton.cdiv(n_kv_heads, block_g)

    _rope_kv_write_kernel[(n_tokens * n_blocks,)](
        q,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        error_flag("rope_kv_write", qkv.device),
        qkv,
        None if bias is None else bias.contiguous(),
        positions.contiguous(),
        table,
        slots.contiguous(),
        qkv.stride(0),
        table.stride(0),
        *k_cache.stride()[:3],
        *((0, 0, 0) if k_scale is None else k_scale.stride()),
        table.shape[0],
        n_pages * page_size,
        n_heads,
        n_kv_heads,
        ROTARY_DIM=table.shape[1],
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        BLOCK_H=block_h,
        BLOCK_G=block_g,
        BLOCK_D=block_d,
        num_warps=head_warps(block_h, block_d),
        enable_fp_fusion=False,  # a fused multiply-add would skip the rounding of a product
        **dependent(pdl),
    )
    return q


def rope_kv_write_cpu(
    qkv: Tensor,
    positions: Tensor,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    n_heads: int,
    bias: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    variant: str = "",
) -> Tensor:
    """The C++ kernel; `variant`: one of build_info()["simd_variants"], by default the best."""
    n_tokens = qkv.shape[0]
    cache_shape = k_cache.shape
    q = qkv.new_empty((n_tokens, n_heads, cache_shape[3]))
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    table = table if table.stride(1) == 1 else table.contiguous()
    positions, slots = positions.contiguous(), slots.contiguous()
    bias = None if bias is None else bias.contiguous()
    wrong = extension().rope_kv_write_cpu(
        buffer(q),
        buffer(k_cache),
        buffer(v_cache),
        buffer(k_scale),
        buffer(v_scale),
        buffer(qkv),
        buffer(bias),
        buffer(positions),
        buffer(slots),
        buffer(table),
        DTYPE_CODES[qkv.dtype],
        DTYPE_CODES[table.dtype],
        DTYPE_CODES[k_cache.dtype],
        positions.itemsize,
        slots.itemsize,
        n_tokens,
        n_heads,
        qkv.stride(0),
        *table.shape,
        table.stride(0),
        cache_shape,
        k_cache.stride(),
        (0, 0, 0) if k_scale is None else k_scale.stride(),
        torch.get_num_threads(),
        variant,
    )
    if wrong:
        check_rope_kv_write_values(qkv, positions, table, k_cache, v_cache, slots)
    return q


def check_rope_kv_write(
    qkv: Tensor,
    positions: Tensor,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    n_heads: int,
    bias: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    op = "rope_kv_write"
    dtype, device = qkv.dtype, qkv.device
    if qkv.dim() != 2:
        raise bad_value(op, "qkv", "[T, (H + 2G) * D]", list(qkv.shape))
    if dtype not in FLOAT_DTYPES:
        raise bad_type(op, "qkv", "float32, bfloat16 or float16", dtype)
    if k_cache.dim() != 4:
        raise bad_value(op, "k_cache", "[n_pages, G, page_size, D]", list(k_cache.shape))
    _, n_kv_heads, page_size, head_dim = k_cache.shape
    if page_size < 1 or page_size & (page_size - 1) != 0:
        raise bad_value(op, "k_cache", "of a page_size that is a power of two", page_size)
    if n_kv_heads < 1:
        raise bad_value(op, "k_cache", "of at least one head", list(k_cache.shape))
    if n_heads < 1:
        raise bad_value(op, "n_heads", "at least 1", n_heads)
    n_tokens, n_cols = qkv.shape
    width = (n_heads + 2 * n_kv_heads) * head_dim
    if n_cols != width:
        expected = f"[T, ({n_heads} + 2 * {n_kv_heads}) * {head_dim}]"
        raise bad_value(op, "qkv", expected, list(qkv.shape))
    check_rotation(op, "k_cache", qkv, head_dim, positions, table)
    if slots.shape != (n_tokens,):
        raise bad_value(op, "slots", f"[{n_tokens}]", list(slots.shape))
    if slots.dtype not in INDEX_DTYPES:
        raise bad_type(op, "slots", "int32 or int64", slots.dtype)
    if bias is not None and bias.shape != (width,):
        raise bad_value(op, "bias", f"[{width}]", list(bias.shape))
    if bias is not None and bias.dtype != dtype:
        raise bad_type(op, "bias", dtype, bias.dtype)

    cache_dtype = k_cache.dtype
    quantised = cache_dtype in QUANTISED_LIMIT
    if cache_dtype != dtype and not quantised:
        raise bad_type(op, "k_cache", f"{dtype}, int8 or float8_e4m3fn", cache_dtype)
    check_written(op, "k_cache", k_cache, k_cache, cache_dtype)
    check_written(op, "v_cache", v_cache, k_cache, cache_dtype)
    if k_cache.stride()[3] != 1:
        raise bad_value(op, "k_cache", "contiguous over D", f"strides {k_cache.stride()}")
    if overlap(k_cache, v_cache):
        raise not_apart(op, "v_cache", "k_cache")
    check_fp8(op, "k_cache", cache_dtype, device)
    for name, cache_scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (cache_scale is not None) != quantised:
            expected = f"{'given' if quantised else 'None'} with a cache of {cache_dtype}"
            raise bad_value(op, name, expected, "None" if quantised else "a tensor")
    if k_scale is not None and v_scale is not None:
        if k_scale.shape != k_cache.shape[:3]:
            raise bad_value(op, "k_scale", list(k_cache.shape[:3]), list(k_scale.shape))
        check_written(op, "k_scale", k_scale, k_scale, torch.float32)
        check_written(op, "v_scale", v_scale, k_scale, torch.float32)
        written = {"k_cache": k_cache, "v_cache": v_cache, "k_scale": k_scale, "v_scale": v_scale}
        check_apart(op, written, {})
    for name, tensor in (
        ("k_cache", k_cache),
        ("v_cache", v_cache),
        ("slots", slots),
        ("bias", bias),
        ("k_scale", k_scale),
        ("v_scale", v_scale),
    ):
        if tensor is not None and tensor.device != device:
            raise bad_value(op, name, f"on {device}", tensor.device)


def check_written(op: str, name: str, x: Tensor, like: Tensor, dtype: torch.dtype) -> None:
    """x, which the op writes, is laid out like its K sibling and has no two equal addresses."""
    shape, stride = x.shape, x.stride()
    if x is not like and shape != like.shape:
        raise bad_value(op, name, list(like.shape), list(shape))
    if x.dtype != dtype:
        raise bad_type(op, name, dtype, x.dtype)
    if x is not like and stride != like.stride():
        raise bad_value(op, name, f"of strides {like.stride()}, those of K", stride)
    if 0 in stride and any(s == 0 and n > 1 for s, n in zip(stride, shape, strict=True)):
        raise bad_value(op, name, "without overlap (not expanded)", f"strides {stride}")


def check_rope_kv_write_values(
    qkv: Tensor,
    positions: Tensor,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *_: object,
) -> None:
    check_positions("rope_kv_write", positions, table)
    n_slots = k_cache.shape[0] * k_cache.shape[2]
    wrong = slots[(slots < -1) | (slots >= n_slots)]
    if wrong.numel():
        raise bad_value("rope_kv_write", "slots", f"in [-1, {n_slots})", wrong[0].item())


def fake_rope_kv_write(
    qkv: Tensor,
    positions: Tensor,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    n_heads: int,
    *_: object,
) -> Tensor:
    return qkv.new_empty(qkv.shape[0], n_heads, k_cache.shape[3])


_rope_kv_write = register_op(
    "rope_kv_write(Tensor qkv, Tensor positions, Tensor table, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor slots, int n_heads, Tensor? bias=None, "
    "Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None) -> Tensor",
    check=check_rope_kv_write,
    check_values=check_rope_kv_write_values,
    reference=rope_kv_write_reference,
    launch=launch_rope_kv_write,
    cpu=rope_kv_write_cpu if HAS_EXTENSION else None,
    fake=fake_rope_kv_write,
)


def rope_kv_write(
    qkv: Tensor,
    positions: Tensor,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    n_heads: int,
    bias: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Splits packed qkv, rotates q and k, and writes k and v into the paged cache, in one pass.

    Args:
        qkv: [T, (H + 2G) * D], q heads, then k, then v; float32, bfloat16 or float16; any strides.
        positions: [T], int32 or int64, in [0, max_positions).
        table: [max_positions, rotary_dim] from `rope_table`, in the dtype of qkv (rounds as HF) or
            float32 (rounds once).
        k_cache, v_cache: [n_pages, G, page_size, D], written; dtype of qkv, int8 or float8_e4m3fn;
            of equal strides, contiguous over D, apart in memory (two views of one buffer may be);
            page_size a power of two.
        slots: [T], int32 or int64: page * page_size + offset, or -1 to write nothing. No slot
            twice in a call: which token wins is undefined.
        n_heads: H.
        bias: [(H + 2G) * D] or None, dtype of qkv.
        k_scale, v_scale: float32 [n_pages, G, page_size], written; given if and only if the cache
            is int8 or float8_e4m3fn; of equal strides.

    Returns:
        q [T, H, D], rotated, contiguous. On CUDA a token whose position is out of range gives zeros
        and writes nothing, one whose slot is writes nothing, and both set the device's error flag
        (`raise_device_errors`).

    Raises:
        ValueError: shapes, strides or devices are wrong, or on CPU a position or slot. TypeError: a
        dtype is.
    """
    return _rope_kv_write(
        qkv, positions, table, k_cache, v_cache, slots, n_heads, bias, k_scale, v_scale
    )
