"""One decode step of a batch, in buffers that stay where they are.

    embed the current tokens -> layers -> logits -> sample -> they become current, a position on

Nothing in it waits for the host or depends on it, so on a GPU the step is captured once for each of
a few batch sizes as a CUDA graph, and replayed; the host writes rows of the buffers when a sequence
joins or leaves, and reads chosen tokens when they have come. On a CPU the same code is called.

Rows past the running sequences are padding: not active, so their slot is -1, and of length 0. A
padded row writes nothing, attends to nothing, and no other row sees it.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

import glm4_kernels as gk
from glm4.cache import PAGE_SIZE, Cache, Step
from glm4.sampling import Sampling
from glm4_kernels.library import error_flags, raise_device_errors

if TYPE_CHECKING:
    from glm4.model import Model

T = TypeVar("T")

# Batch sizes that a step runs at, to which the number of running sequences is padded up. A GPU has
# a graph for each; a CPU has none and would pay for padding.
BUCKETS: dict[str, Sequence[int]] = {
    "cpu": range(1, 1 << 16),
    "cuda": (1, 2, 4, 8, 16, 24, 32, 48, *range(64, 1 << 16, 64)),
}


@dataclass(frozen=True)
class Rows:
    """What the device knows of B sequences: the first dimension of each tensor."""

    tokens: Tensor  # [B] int64, chosen last and not yet in the cache
    positions: Tensor  # [B] int64, of `tokens`
    seq_lens: Tensor  # [B] int32, with `tokens`: positions + 1, or 0 in a padded row
    slots: Tensor  # [B] int64, of `positions` in the cache; -1 in a padded row
    n_drawn: Tensor  # [B] int64, of `uniforms`
    uniform: Tensor  # [B] float64, the next of them
    block_table: Tensor  # [B, max_pages] int32
    uniforms: Tensor  # [B, max_new_tokens] float64, or [B, 0]
    seen: Tensor  # [B, vocab] bool, or [B, 0]

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def first(self, n_rows: int) -> Rows:
        return Rows(*(tensor[:n_rows] for tensor in self.tensors()))

    def advance(self, sampling: Sampling, logits: Tensor, flags: Tensor, results: Tensor) -> None:
        """The next token of each row becomes its current one; the results are the flags, then the
        tokens, -1 on NaN."""
        gk.decode_advance(
            sampling.choose(logits, self.uniform, self.seen),
            flags,
            self.block_table,
            self.uniforms,
            PAGE_SIZE,
            self.tokens,
            self.positions,
            self.seq_lens,
            self.slots,
            self.n_drawn,
            self.uniform,
            results,
        )


class Decoder:
    """Steps the sequences in its rows; those that run come first.

    Args:
        capacity: rows, the most sequences that run at a time.
        max_pages: columns of the block table.
        max_new_tokens: draws that a sequence may make.
        on_warmup: called with (what, seconds of the host) for each first step and capture.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        sampling: Sampling,
        capacity: int,
        max_pages: int,
        max_new_tokens: int,
        on_warmup: Callable[[str, float], None] | None = None,
    ) -> None:
        device = model.device
        self.model, self.cache, self.sampling = model, cache, sampling
        self.on_warmup = on_warmup
        capacity = bucket_of(capacity, device)
        n_draws = max_new_tokens if sampling.temperature else 0
        n_seen = model.config.vocab if sampling.repetition_penalty != 1.0 else 0
        self.rows = Rows(
            tokens=torch.zeros(capacity, dtype=torch.int64, device=device),
            positions=torch.zeros(capacity, dtype=torch.int64, device=device),
            seq_lens=torch.zeros(capacity, dtype=torch.int32, device=device),
            slots=torch.full((capacity,), -1, dtype=torch.int64, device=device),
            n_drawn=torch.zeros(capacity, dtype=torch.int64, device=device),
            uniform=torch.zeros(capacity, dtype=torch.float64, device=device),
            block_table=torch.full((capacity, max_pages), -1, dtype=torch.int32, device=device),
            uniforms=torch.zeros(capacity, n_draws, dtype=torch.float64, device=device),
            seen=torch.zeros(capacity, n_seen, dtype=torch.bool, device=device),
        )
        # What the host reads: the error flags of the kernels, then the chosen tokens.
        self.flags = error_flags(device)
        self.results = torch.zeros(len(self.flags) + capacity, dtype=torch.int64, device=device)
        self.views: dict[int, tuple[Rows, Tensor]] = {}  # of both, by bucket
        self.graphs = GRAPHS[device.type](device) if device.type in GRAPHS else None
        self.replays: dict[int, Callable[[], None]] = {}  # by bucket
        self.warm: set[str] = set()  # what has run before

    def serves(
        self,
        sampling: Sampling,
        capacity: int,
        n_pages: int,
        max_pages: int,
        max_new_tokens: int,
    ) -> bool:
        """Whether another generation could run here; its random numbers come with its rows."""
        rows = self.rows
        return (
            replace(sampling, seed=None) == replace(self.sampling, seed=None)
            and capacity <= len(rows.tokens)
            and n_pages <= self.cache.n_pages
            and max_pages <= rows.block_table.shape[1]
            and (not sampling.temperature or max_new_tokens <= rows.uniforms.shape[1])
        )

    def clear(self, first: int = 0) -> None:
        """Makes padding of the rows from `first` on."""
        rows = self.rows
        for tensor in (rows.positions, rows.seq_lens, rows.n_drawn):
            tensor[first:].zero_()
        rows.slots[first:].fill_(-1)

    def join(self, row: int, source: Rows) -> None:
        """Rows from `row` on become those of `source`."""
        for mine, theirs in zip(self.rows.tensors(), source.tensors(), strict=True):
            mine[row : row + len(theirs)].copy_(theirs)

    def move(self, row: int, source: int) -> None:
        """`row` becomes what `source` is."""
        for tensor in self.rows.tensors():
            tensor[row].copy_(tensor[source])

    def step(self, n_rows: int) -> Callable[[], list[int]]:
        """Launches a step of the first `n_rows` rows; the function returned waits for its tokens,
        and raises IndexError if a kernel has met an index out of range."""
        bucket = bucket_of(n_rows, self.model.device)
        self.launch(bucket)
        return self._results_later(self.views[bucket][1], n_rows)

    def first_tokens(self, rows: Rows, logits: Tensor) -> Callable[[], list[int]]:
        """The same for rows that have yet to join, after their prefill."""
        n_rows = len(rows.tokens)
        results = self.results.new_empty(len(self.flags) + n_rows)
        rows.advance(self.sampling, logits, self.flags, results)
        return self._results_later(results, n_rows)

    def _results_later(self, results: Tensor, n_rows: int) -> Callable[[], list[int]]:
        read, n_flags = read_later(results), len(self.flags)

        def tokens() -> list[int]:
            values = read()
            if any(values[:n_flags]):
                raise_device_errors(self.flags.device)
            return values[n_flags : n_flags + n_rows]

        return tokens

    def launch(self, bucket: int) -> None:
        """With graphs, the first step of a bucket runs as it is, which compiles and loads all that
        it needs; the second is captured (the first may be the last); then it is replayed."""
        run, graphs = partial(self.run, bucket), self.graphs
        if graphs is None:
            run()
        elif (first := f"first step of {bucket} rows") not in self.warm:
            self.counted(first, run)
        else:
            if bucket not in self.replays:
                capture = f"CUDA graph of {bucket} rows"
                self.replays[bucket] = self.counted(capture, lambda: graphs.capture(run))
            self.replays[bucket]()

    def counted(self, what: str, call: Callable[[], T]) -> T:
        """Makes a call; where there are graphs, the first under its name is a warm-up."""
        if self.graphs is None or what in self.warm:
            return call()
        self.warm.add(what)
        began = time.perf_counter()
        result = call()
        if self.on_warmup is not None:
            self.on_warmup(what, time.perf_counter() - began)
        return result

    def run(self, bucket: int) -> None:
        """The step itself, on the first `bucket` rows: what a graph replays."""
        if bucket not in self.views:
            n_results = len(self.flags) + bucket
            self.views[bucket] = self.rows.first(bucket), self.results[:n_results]
        rows, results = self.views[bucket]
        step = Step(rows.tokens, rows.positions, rows.slots, rows.block_table, rows.seq_lens)
        logits = self.model.head(self.model.forward(step, self.cache))
        rows.advance(self.sampling, logits, self.flags, results)


def bucket_of(n_rows: int, device: torch.device) -> int:
    sizes = BUCKETS[device.type]
    return sizes[bisect_left(sizes, n_rows)]


class CudaGraphs:
    """Captures on one side stream, into one memory pool: what a graph allocates is free again when
    it ends, so that all of them can share it."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """What replays a call that has run before, so that nothing is compiled or loaded here;
        capturing runs nothing."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            call()
        return graph.replay


GRAPHS: dict[str, Callable[[torch.device], CudaGraphs]] = {"cuda": CudaGraphs}


def read_later(values: Tensor) -> Callable[[], list[int]]:
    """Starts the copy to the host; the function returned waits for it, and for nothing newer."""
    if values.device.type != "cuda":
        now = values.tolist()
        return lambda: now
    host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.current_stream(values.device).record_event()

    def read() -> list[int]:
        copied.synchronize()
        return host.tolist()

    return read


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copies from the host without waiting for what the device has to do before."""
    if device.type != "cuda" or values.numel() == 0:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
