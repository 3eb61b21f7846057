"""Which program of `flash_decode` takes which keys: worked out on the device, once per decode step.

Each KV head has P programs, which share the sequences' keys, in units of 64. The sequences are laid
end to end with a gap of one unit between them, since to go on to another sequence takes a program
about that long: b, of n_b units, begins at S_b = sum over a < b of (n_a + 1), empty ones left out,
and the last ends at W. Program i takes what lies between the edges

    x_i = floor(min(i, used) W / used)        used = min(P, sum n_b)        0 <= i <= P

so that the work is even to within one unit. Three ways to read an edge that lies inside a sequence:

    cut      where it is: the programs of a sequence leave partial results to be merged
    whole    at the nearer end of the sequence: nothing to merge; chosen where no program then has
             more than one unit above its even share
    chunks   at the nearest end of a chunk (`batch_invariant`): a sequence is cut into chunks that
             depend on nothing but n_b, at least 4 units each and at most 256 / G of them

The grid, and so a captured graph, is the same for all lengths. Partial results take at most
P + min(P, B) slots a KV head, B * min(256 / G, n / 4) in chunks: the programs bound them, not the
context.

The schedule is an int32 table of rows of four:

    row 2i            first run of program i: sequence, first unit, end unit, slot (-1: no merge)
    row 2i + 1        its further runs: the first of them, their number, 0, 0
    row 2P + j        run j of these, as in row 2i; cut and whole have one a sequence
    then, row b       sequence b: n_splits, slot of its first split, s if split i > 0 has slot
                      s + i, n_b

One small program computes it, in a few microseconds a step; nothing here is per key.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from glm4_kernels.library import bad_type, bad_value, multiprocessor_count, register_op
from glm4_kernels.triton_import import tl, triton

UNIT = 64  # keys
CHUNK_UNITS = 4  # fewest units of a chunk: its partial result is then 6% of its keys' bytes
CHUNKS = 256  # most chunks of a sequence, over its KV heads: they fill 132 multiprocessors twice
MAX_QUERIES = 8
MAX_GROUP = 32


cuda_capability = functools.cache(torch.cuda.get_device_capability)


def capability(device: torch.device) -> int:
    """90 for sm_90, which CPU tensors get too (see `multiprocessor_count`). Meta tensors get what
    Triton compiles for, so that an ahead-of-time compile sees the launch of that GPU."""
    if device.type == "cuda":
        major, minor = cuda_capability(device)
        return 10 * major + minor
    if device.type == "meta":
        with suppress(RuntimeError):  # no driver
            return triton.runtime.driver.active.get_current_target().arch
    return 90


def row_tiles(n_rows: int, capability: int, quantized: bool = False) -> int:
    """Programs that share the `n_rows` query rows of a KV head, each with all of its keys. They
    have as many rows as its registers hold: most where products are wgmma's."""
    most = {9: 64 if quantized else 128, 10: 64, 11: 64}.get(capability // 10, 32)
    return -(-n_rows // most)


def programs_per_kv_head(n_rows: int, n_kv_heads: int, device: torch.device) -> int:
    """P: two programs share a multiprocessor up to 32 query rows each, beyond that one has it."""
    tiles = row_tiles(n_rows, capability(device))
    per_multiprocessor = 2 if n_rows <= 32 * tiles else 1
    return max(1, multiprocessor_count(device) * per_multiprocessor // (n_kv_heads * tiles))


def most_splits(n_kv_heads: int, batch_invariant: bool) -> int:
    """Runs that each sequence has room for behind the first runs of the programs."""
    return max(1, CHUNKS // n_kv_heads) if batch_invariant else 1


def schedule_rows(batch: int, programs: int, n_kv_heads: int, batch_invariant: bool) -> int:
    return 2 * programs + batch * most_splits(n_kv_heads, batch_invariant) + batch


def schedule_slots(
    batch: int, programs: int, n_kv_heads: int, max_keys: int, batch_invariant: bool
) -> int:
    """Partial results a KV head may have, for sequences of up to `max_keys` keys."""
    if not batch_invariant:
        return programs + min(programs, batch)
    most = -(-max_keys // (UNIT * CHUNK_UNITS))
    return batch * min(most_splits(n_kv_heads, True), most)


def parts_of(schedule: Tensor, batch: int, programs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Its rows of programs, of their further runs, and of sequences."""
    first, last = 2 * programs, len(schedule) - batch
    return schedule[:first], schedule[first:last], schedule[last:]


def decode_schedule_reference(
    seq_lens: Tensor,
    n_heads: int,
    n_kv_heads: int,
    n_queries: int = 1,
    batch_invariant: bool = False,
    programs: int | None = None,
) -> Tensor:
    """`programs` overrides P, for tests and sweeps."""
    batch, device = len(seq_lens), seq_lens.device
    if programs is None:
        programs = programs_per_kv_head(n_queries * n_heads // n_kv_heads, n_kv_heads, device)
    splits = most_splits(n_kv_heads, batch_invariant)
    units = (seq_lens.long().clamp(min=0) + UNIT - 1) // UNIT
    chunk = units.clamp(min=1)
    if batch_invariant:
        chunk = (-(-units // splits)).clamp(min=CHUNK_UNITS)
    n_chunks = (units + chunk - 1) // chunk  # 0 of an empty sequence
    cost = units + n_chunks  # with the gap, or those between chunks
    start, first_run = cost.cumsum(0) - cost, n_chunks.cumsum(0) - n_chunks
    total = max(int(cost.sum()) - 1, 0)
    used = max(min(programs, int(units.sum())), 1)
    counted = partial(torch.arange, dtype=torch.int64, device=device)
    program = counted(programs)

    def edge(i: Tensor) -> Tensor:
        return i.clamp(max=used) * total // used

    x = edge(counted(programs + 1))
    # The sequence of each edge, the next one's for an edge in a gap; B at the very end.
    at = torch.searchsorted(start + cost - 1, x, right=True)

    def of_edge(per_sequence: Tensor, beyond: int) -> Tensor:
        return torch.cat([per_sequence, per_sequence.new_tensor([beyond])])[at]

    n_runs = int(n_chunks.sum())
    at_unit = (x - of_edge(start, total + 1)).clamp(min=0)
    at_run = of_edge(first_run, n_runs)
    step = of_edge(chunk, 1) + 1
    nearest = (at_unit + step // 2) // step
    moved = of_edge(start, total + 1) + torch.minimum(nearest * step, of_edge(cost, 0))
    whole = int(moved.diff().max()) - 1 <= -(-total // used) + 1

    rows = schedule_rows(batch, programs, n_kv_heads, batch_invariant)
    schedule = torch.zeros(rows, 4, dtype=torch.int32, device=device)
    of_programs, runs, of_sequences = parts_of(schedule, batch, programs)
    first_runs, more_runs = of_programs[::2], of_programs[1::2]
    first_runs[:, 3] = runs[:, 3] = -1
    run = counted(n_runs)
    owner = torch.searchsorted(first_run + n_chunks, run, right=True)  # the sequence of each run
    first_unit = (run - first_run[owner]) * chunk[owner]
    end_unit = torch.minimum(first_unit + chunk[owner], units[owner])
    slot = torch.where(n_chunks[owner] > 1, run, -1)
    n_splits, first_slot, base = n_chunks, first_run, first_run

    if batch_invariant or whole:
        more_runs[:, 0] = (at_run + nearest)[:-1]
        more_runs[:, 1] = (at_run + nearest).diff()
    else:
        live, same = program < used, at[:-1] == at[1:]
        at_units = of_edge(units, 0)[:-1]
        stop = torch.where(same, at_unit[1:], at_units)
        opens = torch.where(stop < at_units, programs + torch.minimum(at[:-1], program), -1)
        first_slot = torch.where(at_unit[:-1] == 0, opens, program)
        first_run_of = torch.stack([at[:-1], at_unit[:-1], stop, first_slot], 1)
        first_runs[live] = first_run_of[live].int()
        n_more = torch.where(same, 0, at_run.diff() - 1 + (at_unit[1:] > 0))
        more_runs[:, 0] = torch.where(live, at_run[:-1] + 1, 0)
        more_runs[:, 1] = torch.where(live, n_more, 0)

        begun_by = ((start + 1) * used - 1) // max(total, 1)
        ended_by = ((start + units) * used - 1) // max(total, 1)
        n_splits = torch.where(units > 0, ended_by - begun_by + 1, 0)
        first_slot = programs + torch.minimum(counted(batch), begun_by)
        slot = torch.where(n_splits > 1, first_slot, -1)[owner]
        base = begun_by
        end_unit = torch.minimum(end_unit, (edge(begun_by + 1) - start)[owner])
    runs[:n_runs] = torch.stack([owner, first_unit, end_unit, slot], 1).int()
    split = n_splits > 1
    of_sequences.copy_(torch.stack([n_splits, first_slot * split, base * split, units], 1))
    return schedule


@triton.jit
def _units_and_chunk(
    seq_lens_ptr, sequences, batch, SPLITS: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr
):
    """n_b and the units of a chunk (CHUNK 0: the whole sequence), both int64; n_b = 0 past B."""
    length = tl.load(seq_lens_ptr + sequences, mask=sequences < batch, other=0).to(tl.int64)
    units = tl.cdiv(tl.maximum(length, 0), UNIT)
    chunk = tl.maximum(units, 1)
    if CHUNK:
        chunk = tl.maximum(tl.cdiv(units, SPLITS), CHUNK)
    return units, chunk


@triton.jit
def _edge(
    i,
    used,
    total,
    seq_lens_ptr,
    batch,
    SPLITS: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Edges x_i. Where each lies: sequence (B beyond the last), unit, n_b, the runs before it. And
    moved to the nearest end of a run: the runs before that, where it lies."""
    x = tl.minimum(i, used) * total // used
    sequence = tl.zeros_like(x)
    start = tl.zeros_like(x)
    runs = tl.zeros_like(x)
    block_start = total * 0
    for first in range(0, batch, BLOCK_B):
        ids = first + tl.arange(0, BLOCK_B)
        n_units, chunk = _units_and_chunk(seq_lens_ptr, ids, batch, SPLITS, UNIT, CHUNK)
        n_chunks = tl.cdiv(n_units, chunk)
        cost = n_units + n_chunks
        end = block_start + tl.cumsum(cost, axis=0)
        before = (end[None, :] - 1 <= x[:, None]) & (ids < batch)[None, :]
        sequence += tl.sum(before.to(tl.int64), axis=1)
        start += tl.sum(tl.where(before, cost[None, :], 0), axis=1)
        runs += tl.sum(tl.where(before, n_chunks[None, :], 0), axis=1)
        block_start += tl.sum(cost, axis=0)

    units, chunk = _units_and_chunk(seq_lens_ptr, sequence, batch, SPLITS, UNIT, CHUNK)
    unit = tl.maximum(x - start, 0)
    nearest = (unit + (chunk + 1) // 2) // (chunk + 1)
    moved = start + tl.minimum(nearest * (chunk + 1), units + tl.cdiv(units, chunk))
    return sequence, unit, units, runs, runs + nearest, moved


@triton.jit
def _store_row(ptr, rows, a, b, c, d, mask):
    tl.store(ptr + rows * 4, a.to(tl.int32), mask=mask)
    tl.store(ptr + rows * 4 + 1, b.to(tl.int32), mask=mask)
    tl.store(ptr + rows * 4 + 2, c.to(tl.int32), mask=mask)
    tl.store(ptr + rows * 4 + 3, d.to(tl.int32), mask=mask)


@triton.jit(do_not_specialize=("batch", "n_programs"))
def _decode_schedule_kernel(
    programs_ptr,
    runs_ptr,
    splits_ptr,
    seq_lens_ptr,
    batch,
    n_programs,
    SPLITS: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The whole table, by one program; every row is written. CHUNK 0 is cut or whole."""
    n_units = tl.zeros([BLOCK_B], tl.int64)
    n_runs = tl.zeros([BLOCK_B], tl.int64)
    for first in range(0, batch, BLOCK_B):
        ids = first + tl.arange(0, BLOCK_B)
        units, chunk = _units_and_chunk(seq_lens_ptr, ids, batch, SPLITS, UNIT, CHUNK)
        n_units += units
        n_runs += tl.cdiv(units, chunk)
    all_runs = tl.sum(n_runs, axis=0)
    total = tl.maximum(tl.sum(n_units, axis=0) + all_runs - 1, 0)
    used = tl.maximum(tl.minimum(tl.sum(n_units, axis=0), n_programs), 1)

    program = tl.arange(0, BLOCK_P).to(tl.int64)
    at, at_unit, at_units, at_run, whole_run, moved = _edge(
        program, used, total, seq_lens_ptr, batch, SPLITS, UNIT, CHUNK, BLOCK_B
    )
    next_at, next_unit, _, next_run, next_whole_run, next_moved = _edge(
        program + 1, used, total, seq_lens_ptr, batch, SPLITS, UNIT, CHUNK, BLOCK_B
    )
    whole = tl.max(next_moved - moved, axis=0) - 1 <= tl.cdiv(total, used) + 1
    if CHUNK:
        whole = total >= 0

    stop = tl.where(at == next_at, next_unit, at_units)
    opens = tl.where(stop < at_units, n_programs + tl.minimum(at, program), -1)
    slot = tl.where(at_unit == 0, opens, program)
    n_more = tl.where(at == next_at, 0, next_run - at_run - 1 + (next_unit > 0).to(tl.int64))

    cuts = (whole == 0) & (program < used)
    more = tl.where(cuts, at_run + 1, tl.where(whole, whole_run, 0))
    n_more = tl.where(cuts, n_more, tl.where(whole, next_whole_run - whole_run, 0))
    at, at_unit = tl.where(cuts, at, 0), tl.where(cuts, at_unit, 0)
    stop, slot = tl.where(cuts, stop, 0), tl.where(cuts, slot, -1)
    mask, zero = program < n_programs, tl.zeros_like(program)
    _store_row(programs_ptr, 2 * program, at, at_unit, stop, slot, mask)
    _store_row(programs_ptr, 2 * program + 1, more, n_more, zero, zero, mask)

    start_of_block = total * 0
    run_of_block = total * 0
    for first in range(0, batch, BLOCK_B):
        sequences = (first + tl.arange(0, BLOCK_B)).to(tl.int64)
        live = sequences < batch
        units, chunk = _units_and_chunk(seq_lens_ptr, sequences, batch, SPLITS, UNIT, CHUNK)
        n_chunks = tl.cdiv(units, chunk)
        cost = units + n_chunks
        start = start_of_block + tl.cumsum(cost, axis=0) - cost
        first_run = run_of_block + tl.cumsum(n_chunks, axis=0) - n_chunks
        start_of_block += tl.sum(cost, axis=0)
        run_of_block += tl.sum(n_chunks, axis=0)

        begun_by = ((start + 1) * used - 1) // tl.maximum(total, 1)
        ended_by = ((start + units) * used - 1) // tl.maximum(total, 1)
        n_splits = tl.where(whole | (units == 0), n_chunks, ended_by - begun_by + 1)
        first_slot = tl.where(whole, first_run, n_programs + tl.minimum(sequences, begun_by))
        base = tl.where(whole, first_run, begun_by)
        first_end = tl.minimum(begun_by + 1, used) * total // used - start
        first_end = tl.minimum(units, tl.where(whole, units, first_end))
        merged = n_splits > 1
        split = merged.to(tl.int64)
        first_slot, base = first_slot * split, base * split
        _store_row(splits_ptr, sequences, n_splits, first_slot, base, units, live)

        for first_i in range(0, SPLITS, BLOCK_S):
            i = first_i + tl.arange(0, BLOCK_S)[None, :]
            here = i < n_chunks[:, None]
            begin = tl.where(here, i * chunk[:, None], 0)
            end = tl.where(here, tl.minimum(begin + chunk[:, None], first_end[:, None]), 0)
            run_slot = tl.where(here & merged[:, None], first_slot[:, None] + i, -1)
            owner = tl.where(here, sequences[:, None], 0)
            # Rows that no run needs follow the others.
            unused = all_runs + sequences * SPLITS - first_run - n_chunks
            run_row = i + tl.where(here, first_run[:, None], unused[:, None])
            run_mask = live[:, None] & (i < SPLITS)
            _store_row(runs_ptr, run_row, owner, begin, end, run_slot, run_mask)


def launch_decode_schedule(
    seq_lens: Tensor,
    n_heads: int,
    n_kv_heads: int,
    n_queries: int = 1,
    batch_invariant: bool = False,
    programs: int | None = None,
) -> Tensor:
    """`programs` overrides P, for tests and sweeps."""
    batch, device = len(seq_lens), seq_lens.device
    if programs is None:
        programs = programs_per_kv_head(n_queries * n_heads // n_kv_heads, n_kv_heads, device)
    splits = most_splits(n_kv_heads, batch_invariant)
    rows = schedule_rows(batch, programs, n_kv_heads, batch_invariant)
    block_p = triton.next_power_of_2(programs)
    schedule = torch.empty(rows, 4, dtype=torch.int32, device=device)
    _decode_schedule_kernel[(1,)](
        *parts_of(schedule, batch, programs),
        seq_lens.contiguous(),
        batch,
        programs,
        SPLITS=splits,
        UNIT=UNIT,
        CHUNK=CHUNK_UNITS if batch_invariant else 0,
        BLOCK_P=block_p,
        BLOCK_B=8,  # int64 sums of [BLOCK_P, BLOCK_B] in registers, 8 a thread
        BLOCK_S=min(triton.next_power_of_2(splits), 64),
        num_warps=max(block_p // 32, 4),
        maxnreg=128,  # else ptxas may spill to fit more programs than the one
    )
    return schedule


def check_decode_schedule(
    seq_lens: Tensor,
    n_heads: int,
    n_kv_heads: int,
    n_queries: int = 1,
    batch_invariant: bool = False,
) -> None:
    op = "decode_schedule"
    if seq_lens.dim() != 1:
        raise bad_value(op, "seq_lens", "[B]", list(seq_lens.shape))
    if seq_lens.dtype != torch.int32:
        raise bad_type(op, "seq_lens", torch.int32, seq_lens.dtype)
    if n_kv_heads < 1:
        raise bad_value(op, "n_kv_heads", "at least 1", n_kv_heads)
    if not n_kv_heads <= n_heads <= MAX_GROUP * n_kv_heads or n_heads % n_kv_heads != 0:
        expected = f"1 to {MAX_GROUP} times the {n_kv_heads} KV heads"
        raise bad_value(op, "n_heads", expected, n_heads)
    if not 1 <= n_queries <= MAX_QUERIES:
        raise bad_value(op, "n_queries", f"1 to {MAX_QUERIES}", n_queries)


def check_decode_schedule_values(seq_lens: Tensor, *_: object) -> None:
    if (seq_lens < 0).any():
        raise bad_value("decode_schedule", "seq_lens", "0 or more", seq_lens.min().item())


def fake_decode_schedule(
    seq_lens: Tensor,
    n_heads: int,
    n_kv_heads: int,
    n_queries: int = 1,
    batch_invariant: bool = False,
) -> Tensor:
    batch = seq_lens.shape[0]
    programs = programs_per_kv_head(n_queries * n_heads // n_kv_heads, n_kv_heads, seq_lens.device)
    rows = schedule_rows(batch, programs, n_kv_heads, batch_invariant)
    return seq_lens.new_empty(rows, 4)


_decode_schedule = register_op(
    "decode_schedule(Tensor seq_lens, int n_heads, int n_kv_heads, int n_queries=1, "
    "bool batch_invariant=False) -> Tensor",
    check=check_decode_schedule,
    check_values=check_decode_schedule_values,
    reference=decode_schedule_reference,
    launch=launch_decode_schedule,
    fake=fake_decode_schedule,
)


def decode_schedule(
    seq_lens: Tensor,
    n_heads: int,
    n_kv_heads: int,
    n_queries: int = 1,
    batch_invariant: bool = False,
) -> Tensor:
    """How `flash_decode` shares out the keys of a batch: made once a step, for all layers.

    Args:
        seq_lens: [B] int32, those that `flash_decode` will get; 0 is allowed.
        n_heads, n_kv_heads, n_queries: H, G and Q of those calls.
        batch_invariant: see `flash_decode`.

    Returns:
        [rows, 4] int32, its shape a function of the other arguments and of the device: a captured
        graph serves all lengths. To be passed on, not read.

    Raises:
        ValueError, TypeError: the message names the argument. Negative lengths raise on CPU; on
        CUDA they count as empty, and `flash_decode` reports them.
    """
    return _decode_schedule(seq_lens, n_heads, n_kv_heads, n_queries, batch_invariant)
