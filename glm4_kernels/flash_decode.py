"""Decode attention over a paged KV cache, with grouped query heads.

    s = scale * q k^T        p = softmax(s)        out = p v        lse = log sum exp(s)

Each of Q query rows of a sequence sees the keys up to its own position: row i of Q sees
`seq_len - Q + i + 1` keys. A row that sees none gives zeros and lse = -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4_kernels.library import bad_type, bad_value, register_op

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTIZED_DTYPES = (torch.int8, torch.float8_e4m3fn)
HEAD_DIMS = (64, 128)
MAX_GROUP = 32
MAX_QUERIES = 8
MIN_PAGE_SIZE = 16


def flash_decode_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(q.dtype, torch.float32)
    n_kv_heads, page_size = k_cache.shape[1:3]
    rows = q if q.dim() == 4 else q.unsqueeze(1)  # [B, Q, H, D]
    n_queries, n_heads, head_dim = rows.shape[1:]
    group = n_heads // n_kv_heads
    out = torch.zeros(rows.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(rows.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)

    for b, n_keys in enumerate(seq_lens.tolist()):
        if n_keys == 0:
            continue
        pages = block_table[b, : -(-n_keys // page_size)].long()

        def gather(cache: Tensor, cache_scale: Tensor | None) -> Tensor:  # [G, n_keys, D]
            tokens = cache[pages].transpose(0, 1).flatten(1, 2)[:, :n_keys].to(compute)  # noqa: B023
            if cache_scale is None:
                return tokens
            return tokens * cache_scale[pages].transpose(0, 1).flatten(1)[:, :n_keys, None]  # noqa: B023

        grouped = rows[b].unflatten(1, (n_kv_heads, group)).transpose(0, 1)  # [G, Q, group, D]
        scores = grouped.flatten(1, 2).to(compute) @ gather(k_cache, k_scale).transpose(1, 2)
        scores = (scores * scale).unflatten(1, (n_queries, group))  # [G, Q, group, n_keys]
        last_key = torch.arange(n_keys - n_queries, n_keys, device=q.device)
        hidden = torch.arange(n_keys, device=q.device) > last_key[:, None]  # [Q, n_keys]
        scores.masked_fill_(hidden[:, None], -torch.inf)

        row_lse = scores.logsumexp(-1, keepdim=True)  # -inf where every key is hidden
        p = torch.exp(scores - row_lse.where(row_lse > -torch.inf, 0.0))
        values = p.flatten(1, 2) @ gather(v_cache, v_scale)
        out[b] = values.unflatten(1, (n_queries, group)).transpose(0, 1).flatten(1, 2)
        lse[b] = row_lse[..., 0].transpose(0, 1).flatten(1, 2)
    return out.view(q.shape), lse.view(q.shape[:-1])


def check_flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
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
    n_pages, n_kv_heads, page_size = k_cache.shape[:3]
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

    tensors = {"k_cache": k_cache, "v_cache": v_cache, "block_table": block_table}
    tensors |= {"seq_lens": seq_lens, "k_scale": k_scale, "v_scale": v_scale}
    for name, tensor in tensors.items():
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
    used = torch.arange(max_pages, device=q.device) * page_size < seq_lens[:, None]
    pages = block_table[used]
    bad = (pages < 0) | (pages >= n_pages)
    if bad.any():
        expected = f"page ids in 0..{n_pages - 1} within the lengths"
        raise bad_value("flash_decode", "block_table", expected, pages[bad][0].item())


def fake_flash_decode(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


_flash_decode = register_op(
    "flash_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, "
    "float scale, Tensor? k_scale=None, Tensor? v_scale=None) -> (Tensor, Tensor)",
    check=check_flash_decode,
    check_values=check_flash_decode_values,
    reference=flash_decode_reference,
    launch=None,
    fake=fake_flash_decode,
)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens over a paged KV cache (Flash-Decoding, Dao et al., 2023)."""
    out, lse = _flash_decode(q, k_cache, v_cache, block_table, seq_lens, scale, k_scale, v_scale)
    return (out, lse) if return_lse else out
