"""The rows of a decode step made ready for the next, once their tokens are chosen.

    tokens = max(chosen, 0)                  a step may run on a -1 before the host has seen it
    positions, seq_lens, n_drawn += 1        of running rows: those with seq_len > 0
    slots = page * page_size + offset        of the new position; -1 of padding
    uniform = uniforms[n_drawn]              0 beyond the last
    results = flags | chosen                 what the host reads, in one copy

A running row whose new position has no page gets slot -2, which `rope_kv_write` reports if a step
is made there.

Bytes moved: some 60 a row, a sector of 32 for each page and number: nothing beside a launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4_kernels.extension import HAS_EXTENSION, buffer, extension
from glm4_kernels.library import bad_type, bad_value, register_op
from glm4_kernels.overlap import check_apart
from glm4_kernels.triton_import import tl, triton


def decode_advance_reference(
    chosen: Tensor,
    flags: Tensor,
    block_table: Tensor,
    uniforms: Tensor,
    page_size: int,
    tokens: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    n_drawn: Tensor,
    uniform: Tensor,
    results: Tensor,
) -> None:
    running = seq_lens > 0
    torch.clamp(chosen, min=0, out=tokens)
    for count in (positions, seq_lens, n_drawn):
        count.add_(running)
    results.copy_(torch.cat((flags, chosen)))

    column, offset = positions // page_size, positions % page_size
    with_pages = torch.nn.functional.pad(block_table, (0, 1), value=-1)
    page = with_pages.gather(1, _within(column, block_table.shape[1])[:, None])[:, 0].long()
    slot = torch.where(page >= 0, page * page_size + offset, -2)
    slots.copy_(torch.where(running, slot, -1))

    with_numbers = torch.nn.functional.pad(uniforms, (0, 1))
    uniform.copy_(with_numbers.gather(1, _within(n_drawn, uniforms.shape[1])[:, None])[:, 0])


def _within(index: Tensor, end: int) -> Tensor:
    """The index, or `end` for one that is not below it, or negative."""
    return index.where((index >= 0) & (index < end), end)


@triton.jit
def _decode_advance_kernel(
    tokens_ptr,
    positions_ptr,
    seq_lens_ptr,
    slots_ptr,
    n_drawn_ptr,
    uniform_ptr,
    results_ptr,
    chosen_ptr,
    flags_ptr,
    block_table_ptr,
    uniforms_ptr,
    stride_table_row,
    stride_uniforms_row,
    n_rows,
    n_flags,
    n_pages,
    n_uniforms,
    PAGE_SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """BLOCK_B rows a program."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = rows < n_rows
    flag = tl.arange(0, BLOCK_F)

    chosen = tl.load(chosen_ptr + rows, mask=mask, other=0)
    position = tl.load(positions_ptr + rows, mask=mask, other=0)
    seq_len = tl.load(seq_lens_ptr + rows, mask=mask, other=0)
    drawn = tl.load(n_drawn_ptr + rows, mask=mask, other=0)
    flags = tl.load(flags_ptr + flag, mask=flag < n_flags, other=0)

    running = seq_len > 0
    one = running.to(tl.int64)
    position += one
    drawn += one
    column = position // PAGE_SIZE
    paged = running & (position >= 0) & (column < n_pages)
    page = tl.load(block_table_ptr + rows * stride_table_row + column, mask=paged, other=-1)
    slot = tl.where(page >= 0, page.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE, -2)
    numbered = mask & (drawn >= 0) & (drawn < n_uniforms)
    uniform = tl.load(uniforms_ptr + rows * stride_uniforms_row + drawn, mask=numbered, other=0.0)

    tl.store(tokens_ptr + rows, tl.maximum(chosen, 0), mask=mask)
    tl.store(positions_ptr + rows, position, mask=mask)
    tl.store(seq_lens_ptr + rows, seq_len + running.to(tl.int32), mask=mask)
    tl.store(slots_ptr + rows, tl.where(running, slot, -1), mask=mask)
    tl.store(n_drawn_ptr + rows, drawn, mask=mask)
    tl.store(uniform_ptr + rows, uniform, mask=mask)
    tl.store(results_ptr + flag, flags.to(tl.int64), mask=flag < n_flags)
    tl.store(results_ptr + n_flags + rows, chosen, mask=mask)


def launch_decode_advance(
    chosen: Tensor,
    flags: Tensor,
    block_table: Tensor,
    uniforms: Tensor,
    page_size: int,
    tokens: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    n_drawn: Tensor,
    uniform: Tensor,
    results: Tensor,
) -> None:
    n_rows, n_flags = len(chosen), len(flags)
    block_b = 64  # two warps: one program for the batches that a step has
    _decode_advance_kernel[(max(triton.cdiv(n_rows, block_b), 1),)](
        *(tokens, positions, seq_lens, slots, n_drawn, uniform, results),
        *(chosen, flags, block_table, uniforms),
        *(block_table.stride(0), uniforms.stride(0)),
        *(n_rows, n_flags, block_table.shape[1], uniforms.shape[1]),
        PAGE_SIZE=page_size,
        BLOCK_B=block_b,
        BLOCK_F=triton.next_power_of_2(max(n_flags, 1)),
        num_warps=2,
    )


def decode_advance_cpu(
    chosen: Tensor,
    flags: Tensor,
    block_table: Tensor,
    uniforms: Tensor,
    page_size: int,
    tokens: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    n_drawn: Tensor,
    uniform: Tensor,
    results: Tensor,
) -> None:
    """The C++ kernel."""
    extension().decode_advance_cpu(
        buffer(tokens),
        buffer(positions),
        buffer(seq_lens),
        buffer(slots),
        buffer(n_drawn),
        buffer(uniform),
        buffer(results),
        buffer(chosen),
        buffer(flags),
        buffer(block_table),
        buffer(uniforms),
        len(chosen),
        len(flags),
        block_table.shape[1],
        block_table.stride(0),
        uniforms.shape[1],
        uniforms.stride(0),
        page_size,
    )


def check_decode_advance(
    chosen: Tensor,
    flags: Tensor,
    block_table: Tensor,
    uniforms: Tensor,
    page_size: int,
    tokens: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    n_drawn: Tensor,
    uniform: Tensor,
    results: Tensor,
) -> None:
    op, n_rows = "decode_advance", chosen.shape[0] if chosen.dim() == 1 else -1
    n_results = n_rows + (flags.shape[0] if flags.dim() == 1 else 0)
    for name, tensor, size, dtype in (
        ("chosen", chosen, n_rows, torch.int64),
        ("flags", flags, None, torch.int32),
        ("tokens", tokens, n_rows, torch.int64),
        ("positions", positions, n_rows, torch.int64),
        ("seq_lens", seq_lens, n_rows, torch.int32),
        ("slots", slots, n_rows, torch.int64),
        ("n_drawn", n_drawn, n_rows, torch.int64),
        ("uniform", uniform, n_rows, torch.float64),
        ("results", results, n_results, torch.int64),
    ):
        if tensor.dtype != dtype:
            raise bad_type(op, name, dtype, tensor.dtype)
        if tensor.dim() != 1 or (size is not None and tensor.shape[0] != size):
            expected = "[B]" if size in (None, -1) else [size]
            raise bad_value(op, name, expected, list(tensor.shape))
        if not tensor.is_contiguous():
            raise bad_value(op, name, "contiguous", f"strides {tensor.stride()}")
        if tensor.device != chosen.device:
            raise bad_value(op, name, f"on {chosen.device}", tensor.device)
    for name, table, dtype in (
        ("block_table", block_table, torch.int32),
        ("uniforms", uniforms, torch.float64),
    ):
        if table.dtype != dtype:
            raise bad_type(op, name, dtype, table.dtype)
        if table.dim() != 2 or table.shape[0] != n_rows:
            raise bad_value(op, name, f"[{n_rows}, columns]", list(table.shape))
        if table.shape[1] > 1 and table.stride(1) != 1:
            raise bad_value(op, name, "of contiguous rows", f"strides {table.stride()}")
        if table.device != chosen.device:
            raise bad_value(op, name, f"on {chosen.device}", table.device)
    if not 1 <= page_size < 2**31:  # a page is an int32: slots are below 2^62
        raise bad_value(op, "page_size", "at least 1 and below 2^31", page_size)
    check_apart(
        op,
        {
            "tokens": tokens,
            "positions": positions,
            "seq_lens": seq_lens,
            "slots": slots,
            "n_drawn": n_drawn,
            "uniform": uniform,
            "results": results,
        },
        {"chosen": chosen, "flags": flags, "block_table": block_table, "uniforms": uniforms},
    )


_decode_advance = register_op(
    "decode_advance(Tensor chosen, Tensor flags, Tensor block_table, Tensor uniforms, "
    "int page_size, Tensor(a!) tokens, Tensor(b!) positions, Tensor(c!) seq_lens, "
    "Tensor(d!) slots, Tensor(e!) n_drawn, Tensor(f!) uniform, Tensor(g!) results) -> ()",
    check=check_decode_advance,
    reference=decode_advance_reference,
    launch=launch_decode_advance,
    cpu=decode_advance_cpu if HAS_EXTENSION else None,
    fake=lambda *_: None,
)


def decode_advance(
    chosen: Tensor,
    flags: Tensor,
    block_table: Tensor,
    uniforms: Tensor,
    page_size: int,
    tokens: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    n_drawn: Tensor,
    uniform: Tensor,
    results: Tensor,
) -> None:
    """Makes the rows of a decode step ready for the next one, and gathers what the host reads.

    Args:
        chosen: [B] int64, what `sample` gave.
        flags: [F] int32, the kernels' error flags (any F).
        block_table: [B, max_pages] int32, -1 where a sequence has no page.
        uniforms: [B, n] float64, the numbers that each row draws with, in order; n may be 0.
        page_size: tokens of a page, below 2^31.
        tokens, positions, slots, n_drawn: [B] int64, written; n_drawn counts `uniforms`.
        seq_lens: [B] int32, written; 0 in a row of padding, which stays as it is but for `tokens`.
        uniform: [B] float64, written: what `sample` takes next.
        results: [F + B] int64, written: flags, then chosen.

    Raises:
        ValueError, TypeError: the message names the argument; tensors that are written may overlap
        no other. Positions and counts are not checked: beyond their tables they give slot -2 and
        number 0.
    """
    _decode_advance(
        chosen, flags, block_table, uniforms, page_size,
        tokens, positions, seq_lens, slots, n_drawn, uniform, results,
    )  # fmt: skip
