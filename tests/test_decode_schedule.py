from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import glm4_kernels as gk
from glm4_kernels.decode_schedule import (
    CHUNK_UNITS,
    UNIT,
    decode_schedule_reference,
    launch_decode_schedule,
    most_splits,
    parts_of,
    programs_per_kv_head,
    schedule_slots,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
MILLION = 1 << 20
LENGTHS = [
    [],
    [0],
    [0, 0, 0],
    [1],
    [63, 64, 65],
    [128],  # two units: whole, though two programs could have one each
    [8192],
    [32768],
    [MILLION],
    [MILLION] + [50] * 63,
    [50] * 63 + [MILLION],
    [0] * 40 + [5000] + [0] * 40,
    [8192] * 3,
    [8192] * 64,
    [1024] * 256,  # more sequences than programs: whole
    [1024] * 133,  # one more than programs of two KV heads: cut
    [1] * 300,
    [5000, 1, 300, 0, 77, 64, 12345, 2, 640, 0, 65],
]
HEADS = [(32, 2), (32, 4), (48, 2), (48, 8)]  # GLM-4's
BATCH_INVARIANT = pytest.mark.parametrize("batch_invariant", [False, True])


def lens(values: list[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def random_lengths(rng: random.Random) -> list[int]:
    batch = rng.choice([1, 1, 2, 3, 5, 8, 17, 64])
    longest = rng.choice([70, 300, 3000, 20_000, MILLION])
    kind = rng.choice(["equal", "uniform", "skewed", "edges"])
    if kind == "equal":
        return [rng.randrange(1, longest)] * batch
    if kind == "uniform":
        return [rng.randrange(longest) for _ in range(batch)]
    if kind == "skewed":
        return [int(longest ** rng.random()) for _ in range(batch)]
    return [rng.choice([0, 1, 63, 64, 65, longest]) for _ in range(batch)]


@dataclass(frozen=True)
class Run:
    program: int
    sequence: int
    first: int
    end: int
    slot: int


def walk(schedule: Tensor, batch: int, programs: int) -> list[Run]:
    """What each program does, in its order; empty first runs left out."""
    of_programs, more_runs, _ = (part.tolist() for part in parts_of(schedule, batch, programs))
    runs = []
    for program in range(programs):
        more, n_more, *_ = of_programs[2 * program + 1]
        assert more >= 0 and n_more >= 0 and more + n_more <= len(more_runs)
        for row in (of_programs[2 * program], *more_runs[more : more + n_more]):
            if row[1] < row[2]:
                runs.append(Run(program, *row))
    return runs


def check(
    schedule: Tensor, lengths: list[int], n_kv_heads: int, programs: int, batch_invariant: bool
) -> None:
    """Every key once, nothing else; slots distinct, within bounds and found by the merge; even."""
    batch, longest = len(lengths), max(lengths, default=0)
    units = [-(-n // UNIT) for n in lengths]
    runs = walk(schedule, batch, programs)
    by_sequence: list[list[Run]] = [[] for _ in lengths]
    for run in runs:
        by_sequence[run.sequence].append(run)

    for n, own, merge in zip(
        units, by_sequence, parts_of(schedule, batch, programs)[2].tolist(), strict=True
    ):
        edges = [0, *(run.end for run in own)] if own else [0]
        assert [run.first for run in own] == edges[:-1] and edges[-1] == n
        n_splits, first_slot, base, n_units = merge
        assert (n_splits, n_units) == (len(own), n)
        if n_splits > 1:
            assert [r.slot for r in own] == [first_slot, *range(base + 1, base + n_splits)]
        else:
            assert all(run.slot == -1 for run in own)
    used_slots = [run.slot for run in runs if run.slot >= 0]
    assert len(set(used_slots)) == len(used_slots)
    bound = schedule_slots(batch, programs, n_kv_heads, longest, batch_invariant)
    assert all(slot < bound for slot in used_slots)

    if not any(units):
        return
    if batch_invariant:
        for n, own in zip(units, by_sequence, strict=True):
            chunk = max(CHUNK_UNITS, -(-n // most_splits(n_kv_heads, True)))
            assert all(run.end - run.first == min(chunk, n - run.first) for run in own)
        largest = max(run.end - run.first for run in runs)
        total, slack = sum(units) + len(runs) - 1, largest + 1
    else:
        assert bound <= programs + batch
        total, slack = sum(n + 1 for n in units if n) - 1, 1
    work: Counter[int] = Counter()
    for run in runs:  # to go on to another run counts as a unit
        work[run.program] += run.end - run.first + (run.program in work)
    even = -(-total // min(programs, sum(units)))
    assert max(work.values()) <= even + slack
    if batch == 1 and not batch_invariant and len(runs) > 1:
        sizes = [run.end - run.first for run in runs]
        assert len(runs) == min(programs, sum(units)) and max(sizes) - min(sizes) <= 1


@BATCH_INVARIANT
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_every_key_once(heads, batch_invariant):
    """The reference, over thousands of batches; test_matches_reference ties the kernel to it."""
    rng = random.Random(heads[0] + heads[1])
    programs = programs_per_kv_head(heads[0] // heads[1], heads[1], torch.device("cpu"))
    for lengths in LENGTHS + [random_lengths(rng) for _ in range(500)]:
        schedule = decode_schedule_reference(lens(lengths), *heads, 1, batch_invariant)
        check(schedule, lengths, heads[1], programs, batch_invariant)


@BATCH_INVARIANT
@pytest.mark.parametrize("programs", [1, 2, 3, 7, 64])
def test_any_number_of_programs(programs, batch_invariant):
    rng = random.Random(programs)
    for lengths in LENGTHS + [random_lengths(rng) for _ in range(100)]:
        schedule = decode_schedule_reference(lens(lengths), 32, 2, 1, batch_invariant, programs)
        check(schedule, lengths, 2, programs, batch_invariant)


@BATCH_INVARIANT
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_matches_reference(heads, batch_invariant, device):
    """Bit for bit, rows that no run needs included."""
    rng = random.Random(sum(heads))
    n_random = 500 if device.type == "cuda" else 15
    for lengths in LENGTHS + [random_lengths(rng) for _ in range(n_random)]:
        expected = decode_schedule_reference(lens(lengths), *heads, 1, batch_invariant)
        actual = launch_decode_schedule(lens(lengths, device), *heads, 1, batch_invariant)
        if device.type == "cpu" or programs_per_kv_head(16, 2, device) == 132:
            assert torch.equal(actual.cpu(), expected), lengths
        programs = programs_per_kv_head(heads[0] // heads[1], heads[1], device)
        check(actual.cpu(), lengths, heads[1], programs, batch_invariant)


@BATCH_INVARIANT
def test_other_programs_match_reference(batch_invariant, device):
    for programs, lengths in zip([1, 5] * 9, LENGTHS, strict=True):
        sizes = (32, 2, 1, batch_invariant, programs)
        actual = launch_decode_schedule(lens(lengths, device), *sizes)
        assert torch.equal(actual.cpu(), decode_schedule_reference(lens(lengths), *sizes))


def test_chunks_ignore_the_neighbours():
    """Of a sequence alone and in any place of any batch: the same units in the same order."""
    rng = random.Random(5)
    for _ in range(200):
        lengths = random_lengths(rng)
        schedule = decode_schedule_reference(lens(lengths), 32, 2, 1, True)
        runs = walk(schedule, len(lengths), 132)
        for b, length in enumerate(lengths):
            alone = walk(decode_schedule_reference(lens([length]), 32, 2, 1, True), 1, 132)
            own = [(run.first, run.end) for run in runs if run.sequence == b]
            assert own == [(run.first, run.end) for run in alone]


def test_whole_sequences_where_they_fill_the_programs():
    def n_cut(lengths: list[int]) -> int:
        schedule = decode_schedule_reference(lens(lengths), 32, 2)
        return int((parts_of(schedule, len(lengths), 132)[2][:, 0] > 1).sum())

    assert n_cut([1024] * 132) == n_cut([1024] * 264) == n_cut([1024] * 256) == 0
    assert n_cut([1024] * 133) > 0  # one program would have twice its share
    assert n_cut([32768]) == 1


def test_negative_lengths_are_empty(device):
    """What a CUDA tensor cannot check at the door; flash_decode reports them."""
    actual = launch_decode_schedule(lens([-5, 100, -(2**31)], device), 32, 2, programs=3)
    expected = decode_schedule_reference(lens([0, 100, 0]), 32, 2, programs=3)
    assert torch.equal(actual.cpu(), expected)
    absurd = launch_decode_schedule(lens([2**31 - 1] * 70, device), 32, 2, programs=3)
    check(absurd.cpu(), [2**31 - 1] * 70, 2, 3, False)  # sums pass 2^31


def test_edges_of_programs_follow_each_other():
    """Contiguous: a program goes on where the one before it stopped."""
    lengths = [5000, 1, 300, 0, 77, 64, 12345, 2, 640]
    runs = walk(decode_schedule_reference(lens(lengths), 32, 2), len(lengths), 132)
    for before, after in pairwise(runs):
        assert (before.program, before.sequence) <= (after.program, after.sequence)


@needs_gpu
def test_one_graph_serves_every_length(device):
    for batch_invariant in (False, True):
        lengths = lens([100, 5, 0], device)
        launch_decode_schedule(lengths, 32, 2, 1, batch_invariant)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            schedule = launch_decode_schedule(lengths, 32, 2, 1, batch_invariant)
        for values in ([MILLION, 0, 65], [0, 0, 0], [5000, 1, 64]):
            lengths.copy_(lens(values))
            graph.replay()
            again = launch_decode_schedule(lens(values, device), 32, 2, 1, batch_invariant)
            assert torch.equal(schedule, again)


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"seq_lens must be \[B\]", {"seq_lens": torch.ones(1, 1).int()}),
        (TypeError, r"seq_lens must be torch.int32", {"seq_lens": torch.ones(1).long()}),
        (ValueError, r"seq_lens must be 0 or more, got -1", {"seq_lens": lens([3, -1])}),
        (ValueError, r"n_kv_heads must be at least 1", {"n_kv_heads": 0}),
        (ValueError, r"n_heads must be 1 to 32 times the 3", {"n_kv_heads": 3}),
        (ValueError, r"n_heads must be 1 to 32 times the 2", {"n_heads": 66}),
        (ValueError, r"n_queries must be 1 to 8, got 9", {"n_queries": 9}),
    ],
)
def test_rejects(error, message, change):
    arguments = {"seq_lens": lens([3]), "n_heads": 32, "n_kv_heads": 2, "n_queries": 1}
    gk.decode_schedule(**arguments)
    with pytest.raises(error, match=f"^decode_schedule: {message}"):
        gk.decode_schedule(**(arguments | change))
