"""Text from many prompts over one paged cache.

    admit    first come, first served: a prompt starts once pages for all of its tokens are free
    prefill  short prompts together, a long one in chunks; then the first new token of each
    decode   one token of every running sequence a step, until one of them ends

Between two ends a decode step needs nothing from the host: on a GPU the next step is launched
before the last one's tokens are read, so a stop is seen one step late and its row there is dropped.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glm4.cache import PAGE_SIZE, Step
from glm4.sampling import Sampling
from glm4_kernels.library import bad_type, bad_value, raise_device_errors

if TYPE_CHECKING:
    from glm4.model import Model

# Of the memory that is free, for the cache; the rest is for activations and logits.
CACHE_SHARE = 0.9

# Decode steps launched before the tokens of the one before are read, and tokens of a prompt that
# one forward pass takes, by type of device. Not measured yet.
STEPS_AHEAD = {"cpu": 0, "cuda": 1}
PREFILL_CHUNK = {"cpu": 512, "cuda": 2048}


def generate(
    model: Model, prompts: Iterable[Sequence[int]], max_new_tokens: int, **options: Any
) -> list[list[int]]:
    """The new tokens of each prompt, a stop token included; arguments and errors as `stream`."""
    texts: dict[int, list[int]] = {}  # in the order of the prompts, since they start in it
    for index, token in stream(model, prompts, max_new_tokens, **options):
        texts.setdefault(index, []).append(token)
    return list(texts.values())


def stream(
    model: Model,
    prompts: Iterable[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop_token_ids: Sequence[int] | None = None,
    n_pages: int | None = None,
    prefill_chunk: int | None = None,
    max_batch: int = 64,
    on_prefill: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, int]]:
    """Yields (index of the prompt, token) as tokens are made.

    A sequence ends with its first stop token, which is yielded (as transformers' `generate`
    returns it), or after `max_new_tokens`.

    Args:
        model: what `glm4.load` returned.
        prompts: token ids, `[gMASK] <sop>` included; of any lengths; at least one token each.
        max_new_tokens: at most, for each prompt.
        temperature, top_k, top_p, repetition_penalty, seed: see `glm4.sampling.Sampling`.
        stop_token_ids: None takes those of the checkpoint; an empty list never stops.
        n_pages: of the cache; None takes what the prompts need, or what fits in free memory.
        prefill_chunk: tokens of a prompt that one forward pass takes, which bounds memory; None
            takes what suits the device.
        max_batch: sequences that run at the same time; the others wait.
        on_prefill: called with (tokens done, tokens of this prompt) before each chunk and at the
            prompt's end.

    Raises:
        ValueError, TypeError: an argument is wrong, or a prompt with its new tokens fits neither
            the model's context nor the cache; before any work.
        FloatingPointError: the logits of a prompt became NaN or infinite.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    config = model.config
    if prefill_chunk is None:
        prefill_chunk = PREFILL_CHUNK[model.device.type]
    if stop_token_ids is None:
        stop_token_ids = config.eos_token_ids
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("prefill_chunk", prefill_chunk),
        ("max_batch", max_batch),
        ("n_pages", 1 if n_pages is None else n_pages),
    ):
        if not isinstance(value, int) or isinstance(value, bool):
            raise bad_type("generate", name, "an integer", repr(value))
        if value < 1:
            raise bad_value("generate", name, "at least 1", value)
    stops = frozenset(_token_ids("stop_token_ids", stop_token_ids, config.vocab).tolist())
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
        raise bad_type("generate", "prompts", "a list of lists of ids", type(prompts).__name__)
    waiting = []
    for index, prompt in enumerate(prompts):
        name = f"prompts[{index}]"
        ids = _token_ids(name, prompt, config.vocab)
        if len(ids) == 0:
            raise bad_value("generate", name, "at least one token", "an empty list")
        waiting.append((index, ids))
    lengths = [len(ids) for _, ids in waiting]
    n_pages = _plan_pages(model, lengths, max_new_tokens, n_pages, max_batch)
    engine = _Engine(model, sampling, stops, max_new_tokens, prefill_chunk, on_prefill)
    return engine.run(deque(waiting), n_pages, max_batch)


def _token_ids(name: str, ids: object, vocab_size: int) -> Tensor:
    """[T] int64 on the CPU."""
    if isinstance(ids, (str, bytes)):
        raise bad_type("generate", name, "a list of token ids", type(ids).__name__)
    try:
        tensor = torch.as_tensor(ids).cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise bad_type("generate", name, "a list of token ids", type(ids).__name__) from None
    if tensor.numel() == 0 and tensor.dim() == 1:
        return tensor.long()
    if tensor.dim() != 1 or tensor.dtype not in (torch.int64, torch.int32):
        actual = f"{tensor.dtype} {list(tensor.shape)}"
        raise bad_type("generate", name, "a list of token ids", actual)
    outside = tensor[(tensor < 0) | (tensor >= vocab_size)]
    if len(outside):
        raise bad_value("generate", name, f"token ids in [0, {vocab_size})", outside[0].item())
    return tensor.long()


def _plan_pages(
    model: Model, lengths: list[int], max_new_tokens: int, n_pages: int | None, max_batch: int
) -> int:
    """Refuses prompts that can never run; returns the number of pages of the cache."""
    config = model.config
    page_bytes = 2 * config.layers * config.kv_heads * PAGE_SIZE * config.head_dim
    page_bytes *= model.dtype.itemsize
    needs = [_pages_for(length, max_new_tokens) for length in lengths]
    room = f"{n_pages} pages of cache (n_pages)"
    if n_pages is None:
        affordable = int(CACHE_SHARE * free_bytes(model.device)) // page_bytes
        n_pages = min(sum(sorted(needs)[-max_batch:]), affordable)
        room = f"the {_gib(n_pages * page_bytes)} that a cache may take on {model.device}"
    context = f"{config.max_positions} tokens (the model's context)"
    for index, (length, need) in enumerate(zip(lengths, needs, strict=True)):
        actual = f"{length} + {max_new_tokens}, whose cache takes {_gib(need * page_bytes)}"
        name = f"prompts[{index}] with its new tokens"
        if length + max_new_tokens > config.max_positions:
            raise bad_value("generate", name, f"at most {context}", actual)
        if need > n_pages:
            raise bad_value("generate", name, f"within {room}", actual)
    return n_pages


def _pages_for(length: int, max_new_tokens: int) -> int:
    """Pages of a whole sequence, but for its last token, which nothing ever attends to."""
    return -(-(length + max_new_tokens - 1) // PAGE_SIZE)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.3g} GiB"


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still take on `device`; 2^62 where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused

    def number(pattern: str, file: str) -> int:
        found = re.search(pattern, Path(file).read_text(), re.MULTILINE)
        if found is None:
            raise ValueError(f"{file} does not say")
        return int(found[1])

    free = 2**62
    try:
        free = number(r"^MemAvailable:\s*(\d+)", "/proc/meminfo") << 10
        limit = number(r"^(\d+)", "/sys/fs/cgroup/memory.max")  # a container's own
        free = min(free, limit - number(r"^anon (\d+)", "/sys/fs/cgroup/memory.stat"))
    except (OSError, ValueError):
        pass  # not Linux, or no limit
    return max(free, 0)


@dataclass
class _Sequence:
    """What the host knows of a running sequence."""

    index: int  # of its prompt
    pages: list[int]
    remaining: int  # tokens that it may still make


@dataclass
class _Rows:
    """What the device knows of B running sequences: the first dimension of each tensor."""

    tokens: Tensor  # [B] int64, chosen last and not yet in the cache
    positions: Tensor  # [B] int64, of `tokens`
    n_new: Tensor  # [B] int64, tokens made so far
    block_table: Tensor  # [B, max_pages] int32
    uniforms: Tensor  # [B, max_new_tokens] float64, or [B, 0]
    seen: Tensor  # [B, vocab] bool, or [B, 0]

    def joined(self, other: _Rows) -> _Rows:
        names = [field.name for field in fields(self)]
        return _Rows(*(torch.cat((getattr(self, n), getattr(other, n))) for n in names))

    def kept(self, rows: list[int]) -> _Rows:
        index = torch.tensor(rows, dtype=torch.int64, device=self.tokens.device)
        return _Rows(*(getattr(self, field.name)[index] for field in fields(self)))


@dataclass
class _Engine:
    """One call of `stream`: what its stages share."""

    model: Model
    sampling: Sampling
    stops: frozenset[int]
    max_new_tokens: int
    prefill_chunk: int
    on_prefill: Callable[[int, int], None] | None

    @torch.inference_mode()
    def run(
        self, waiting: deque[tuple[int, Tensor]], n_pages: int, max_batch: int
    ) -> Iterator[tuple[int, int]]:
        if not waiting:
            return
        self.cache = self.model.new_cache(n_pages)
        needs = [_pages_for(len(prompt), self.max_new_tokens) for _, prompt in waiting]
        free = list(range(n_pages))
        running: list[_Sequence] = []
        rows: _Rows | None = None

        while waiting or running:
            starting: list[tuple[_Sequence, Tensor]] = []
            while (
                waiting
                and len(running) + len(starting) < max_batch
                and needs[waiting[0][0]] <= len(free)
            ):
                index, prompt = waiting.popleft()
                pages = [free.pop() for _ in range(needs[index])]
                starting.append((_Sequence(index, pages, self.max_new_tokens), prompt))
            for group in _packed(starting, self.prefill_chunk):
                new = self.new_rows(group, max(needs))
                tokens = self.choose(new, self.prefill(new, [prompt for _, prompt in group]))
                sequences = [sequence for sequence, _ in group]
                first_tokens = tokens.tolist()
                raise_device_errors(self.model.device)
                running += sequences
                rows = new if rows is None else rows.joined(new)
                for sequence, token in zip(sequences, first_tokens, strict=True):
                    yield self.take(sequence, token)

            assert rows is not None
            yield from self.decode(rows, running)
            raise_device_errors(self.model.device)
            free += [page for s in running if not s.remaining for page in s.pages]
            rows = rows.kept([i for i, s in enumerate(running) if s.remaining])
            running = [s for s in running if s.remaining]

    def new_rows(self, group: list[tuple[_Sequence, Tensor]], n_pages: int) -> _Rows:
        """Prompts before their prefill: the last token of each is its current one."""
        device, options = self.model.device, self.sampling
        prompts = [prompt.to(device) for _, prompt in group]
        tables = [s.pages + [-1] * (n_pages - len(s.pages)) for s, _ in group]
        uniforms = [options.uniforms(s.index, self.max_new_tokens, device) for s, _ in group]
        return _Rows(
            tokens=torch.stack([prompt[-1] for prompt in prompts]),
            positions=torch.tensor([len(prompt) - 1 for prompt in prompts], device=device),
            n_new=torch.zeros(len(group), dtype=torch.int64, device=device),
            block_table=torch.tensor(tables, dtype=torch.int32, device=device),
            uniforms=torch.cat(uniforms),
            seen=torch.cat([options.seen(p, self.model.config.vocab) for p in prompts]),
        )

    def prefill(self, rows: _Rows, prompts: list[Tensor]) -> Tensor:
        """Writes prompts into the cache, several in one pass or one in several; the logits that
        follow each, [B, vocab]."""
        report = self.on_prefill or (lambda done, total: None)
        device = self.model.device
        tokens = torch.cat(prompts).to(device)
        positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts]).to(device)
        for start in range(0, len(tokens), self.prefill_chunk):
            for prompt in prompts:
                report(start, len(prompt))
            part = slice(start, start + self.prefill_chunk)
            lengths = tuple(map(len, prompts if len(prompts) > 1 else [tokens[part]]))
            hidden = self.forward(rows, tokens[part], positions[part], lengths)
        for prompt in prompts:
            report(len(prompt), len(prompt))
        return self.model.head(hidden[_last_rows(lengths)])

    def decode(self, rows: _Rows, running: list[_Sequence]) -> Iterator[tuple[int, int]]:
        """Steps all sequences until at least one of them has ended; on a GPU one step ahead."""
        ahead = STEPS_AHEAD[self.model.device.type]
        steps_left = min(sequence.remaining for sequence in running)
        in_flight: deque[Callable[[], list[int]]] = deque()
        while in_flight or all(sequence.remaining for sequence in running):
            if steps_left and all(sequence.remaining for sequence in running):
                hidden = self.forward(rows, rows.tokens, rows.positions)
                in_flight.append(_read_later(self.choose(rows, self.model.head(hidden))))
                steps_left -= 1
                if steps_left and len(in_flight) <= ahead:
                    continue
            for sequence, token in zip(running, in_flight.popleft()(), strict=True):
                if sequence.remaining:  # else it ended while this step was in flight
                    yield self.take(sequence, token)

    def forward(
        self,
        rows: _Rows,
        tokens: Tensor,
        positions: Tensor,
        query_lens: tuple[int, ...] | None = None,
    ) -> Tensor:
        """`query_lens` tokens of each row, or one. [T, hidden]"""
        row = torch.arange(len(rows.tokens), device=tokens.device)
        last = positions
        if query_lens is not None:
            counts = torch.tensor(query_lens, device=tokens.device)
            row = row.repeat_interleave(counts, output_size=len(tokens))
            last = positions[_last_rows(query_lens)]
        pages = rows.block_table[row, positions // PAGE_SIZE].long()
        slots = pages * PAGE_SIZE + positions % PAGE_SIZE
        seq_lens = (last + 1).int()
        step = Step(tokens, positions, slots, rows.block_table, seq_lens, query_lens)
        return self.model.forward(step, self.cache)

    def choose(self, rows: _Rows, logits: Tensor) -> Tensor:
        """Each row's next token, which becomes its current one. [B] int64, -1 on NaN."""
        uniform = None
        if rows.uniforms.shape[1]:
            uniform = rows.uniforms.gather(1, rows.n_new[:, None])[:, 0]
        chosen = self.sampling.choose(logits, uniform, rows.seen)
        rows.tokens = chosen.clamp(min=0)  # a step may run on it before the host has seen -1
        rows.positions = rows.positions + 1
        rows.n_new = rows.n_new + 1
        return chosen

    def take(self, sequence: _Sequence, token: int) -> tuple[int, int]:
        """Counts a new token on the host."""
        if token < 0:
            raise FloatingPointError(
                f"generate: the logits of prompts[{sequence.index}] became NaN or infinite; "
                "float16 overflows in GLM-4 (use bfloat16 or float32), or the checkpoint is damaged"
            )
        sequence.remaining = 0 if token in self.stops else sequence.remaining - 1
        return sequence.index, token


def _packed(
    starting: list[tuple[_Sequence, Tensor]], limit: int
) -> Iterator[list[tuple[_Sequence, Tensor]]]:
    """Prompts in order, in groups of at most `limit` tokens, or of one prompt."""
    group: list[tuple[_Sequence, Tensor]] = []
    for sequence, prompt in starting:
        if group and sum(len(other) for _, other in group) + len(prompt) > limit:
            yield group
            group = []
        group.append((sequence, prompt))
    if group:
        yield group


def _last_rows(query_lens: tuple[int, ...]) -> list[int]:
    return [end - 1 for end in accumulate(query_lens)]


def _read_later(tokens: Tensor) -> Callable[[], list[int]]:
    """Starts the copy to the host; the function returned waits for it, and for nothing newer."""
    if tokens.device.type != "cuda":
        return tokens.tolist
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    copied = torch.cuda.current_stream(tokens.device).record_event()

    def read() -> list[int]:
        copied.synchronize()
        return host.tolist()

    return read
