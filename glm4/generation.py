"""Text from many prompts over one paged cache.

    admit    first come, first served: a prompt starts once pages for all of its tokens are free
    prefill  its prompt in chunks, then its first new token
    decode   one token of every running sequence a step, until one of them ends

Between two ends a decode step needs nothing from the host: on a GPU the next step is launched
before the last one's tokens are read, so a stop is seen one step late and its row there is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glm4.cache import PAGE_SIZE, Cache, Step
from glm4.sampling import Sampling
from glm4_kernels.library import bad_type, bad_value, raise_device_errors

if TYPE_CHECKING:
    from glm4.model import Model

# Of the memory that is free, for the cache; the rest is for activations and logits.
CACHE_SHARE = 0.9


def generate(
    model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any
) -> list[list[int]]:
    """The new tokens of each prompt, a stop token included; arguments and errors as `stream`."""
    tokens = stream(model, prompts, max_new_tokens, **options)
    texts: list[list[int]] = [[] for _ in prompts]
    for index, token in tokens:
        texts[index].append(token)
    return texts


def stream(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop_token_ids: Sequence[int] | None = None,
    n_pages: int | None = None,
    prefill_chunk: int = 2048,
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
        prefill_chunk: tokens of a prompt that one forward pass takes; bounds memory.
        max_batch: sequences that run at the same time; the others wait.
        on_prefill: called with (tokens done, tokens of this prompt) after each chunk.

    Raises:
        ValueError, TypeError: an argument is wrong, or a prompt with its new tokens fits neither
            the model's context nor the cache; before any work.
        FloatingPointError: the logits of a prompt became NaN or infinite.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    config = model.config
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
    stops = frozenset(_token_ids("stop_token_ids", stop_token_ids, config.vocab_size).tolist())
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
        raise bad_type("generate", "prompts", "a list of lists of ids", type(prompts).__name__)
    waiting = []
    for index, prompt in enumerate(prompts):
        name = f"prompts[{index}]"
        ids = _token_ids(name, prompt, config.vocab_size)
        if len(ids) == 0:
            raise bad_value("generate", name, "at least one token", "an empty list")
        waiting.append((index, ids))
    n_pages = _plan_pages(
        model, [len(ids) for _, ids in waiting], max_new_tokens, n_pages, max_batch
    )
    return _run(
        model, deque(waiting), max_new_tokens, sampling, stops, n_pages, prefill_chunk, max_batch,
        on_prefill or (lambda done, total: None),
    )  # fmt: skip


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
    page_bytes = 2 * config.n_layers * config.n_kv_heads * PAGE_SIZE * config.head_dim
    page_bytes *= model.dtype.itemsize
    needs = [_pages_for(length, max_new_tokens) for length in lengths]
    asked = n_pages is not None
    if n_pages is None:
        affordable = int(CACHE_SHARE * free_bytes(model.device)) // page_bytes
        n_pages = min(sum(sorted(needs)[-max_batch:]), affordable)
    for index, (length, need) in enumerate(zip(lengths, needs, strict=True)):
        size = f"{length} + {max_new_tokens}, whose cache takes {_gib(need * page_bytes)}"
        name = f"prompts[{index}] with its new tokens"
        if length + max_new_tokens > config.max_positions:
            raise bad_value(
                "generate",
                name,
                f"at most {config.max_positions} tokens (the model's context)",
                size,
            )
        if need > n_pages:
            room = f"{n_pages} pages" if asked else f"the {_gib(n_pages * page_bytes)} free for it"
            raise bad_value("generate", name, f"few enough for {room} on {model.device}", size)
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
    free = 2**62
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = (
            next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) << 10
        )
        group = Path("/sys/fs/cgroup")  # version 2: a container's own limit
        limit = int(group.joinpath("memory.max").read_text())
        free = min(free, limit - int(group.joinpath("memory.current").read_text()))
    except (OSError, ValueError, StopIteration):
        pass  # not Linux, or no limit
    return max(free, 0)


@dataclass
class _Sequence:
    """What the host knows of a running sequence."""

    index: int  # of its prompt
    pages: list[int]
    remaining: int  # tokens that it may still make

    def take(self, token: int, stops: frozenset[int]) -> None:
        """Counts a new token."""
        if token < 0:
            raise FloatingPointError(
                f"generate: the logits of prompts[{self.index}] became NaN or infinite; float16 "
                "overflows in GLM-4 (use bfloat16 or float32), or the checkpoint is damaged"
            )
        self.remaining = 0 if token in stops else self.remaining - 1


@dataclass
class _Rows:
    """What the device knows of B running sequences: the first dimension of each tensor."""

    tokens: Tensor  # [B] int64, chosen last and not yet in the cache
    positions: Tensor  # [B] int64, of `tokens`
    n_new: Tensor  # [B] int64, tokens made so far
    block_table: Tensor  # [B, max_pages] int32
    uniforms: Tensor  # [B, max_new_tokens] float64, or [B, 0]
    seen: Tensor  # [B, vocab_size] bool, or [B, 0]

    def joined(self, other: _Rows) -> _Rows:
        names = [field.name for field in fields(self)]
        return _Rows(*(torch.cat((getattr(self, n), getattr(other, n))) for n in names))

    def kept(self, rows: list[int]) -> _Rows:
        index = torch.tensor(rows, dtype=torch.int64, device=self.tokens.device)
        return _Rows(*(getattr(self, field.name)[index] for field in fields(self)))

    def choose(self, logits: Tensor, sampling: Sampling) -> Tensor:
        """Chooses each row's next token and makes it the current one. [B] int64, -1 on NaN."""
        uniform = None
        if self.uniforms.shape[1]:
            uniform = self.uniforms.gather(1, self.n_new[:, None])[:, 0]
        chosen = sampling.choose(logits, uniform, self.seen)
        self.tokens = chosen.clamp(min=0)  # a step may run on it before the host has seen -1
        self.positions = self.positions + 1
        self.n_new = self.n_new + 1
        return chosen


@torch.inference_mode()
def _run(
    model: Model,
    waiting: deque[tuple[int, Tensor]],
    max_new_tokens: int,
    sampling: Sampling,
    stops: frozenset[int],
    n_pages: int,
    prefill_chunk: int,
    max_batch: int,
    on_prefill: Callable[[int, int], None],
) -> Iterator[tuple[int, int]]:
    if not waiting:
        return
    cache = model.new_cache(n_pages)
    free_pages = list(range(n_pages))
    max_pages = max(_pages_for(len(prompt), max_new_tokens) for _, prompt in waiting)
    running: list[_Sequence] = []
    rows: _Rows | None = None

    while waiting or running:
        while waiting and len(running) < max_batch:
            need = _pages_for(len(waiting[0][1]), max_new_tokens)
            if need > len(free_pages):
                break
            index, prompt = waiting.popleft()
            pages = [free_pages.pop() for _ in range(need)]
            sequence = _Sequence(index, pages, max_new_tokens)
            row = _new_row(model, index, prompt, pages, max_pages, max_new_tokens, sampling)
            logits = _prefill(model, cache, row, prompt, prefill_chunk, on_prefill)
            token = int(row.choose(logits, sampling))
            raise_device_errors(model.device)
            sequence.take(token, stops)
            yield index, token
            if sequence.remaining:
                running.append(sequence)
                rows = row if rows is None else rows.joined(row)
            else:
                free_pages += pages

        if rows is not None:
            yield from _decode(model, cache, rows, running, sampling, stops)
            raise_device_errors(model.device)
            free_pages += [page for s in running if not s.remaining for page in s.pages]
            rows = rows.kept([i for i, s in enumerate(running) if s.remaining])
            running = [s for s in running if s.remaining]
            rows = rows if running else None


def _new_row(
    model: Model,
    index: int,
    prompt: Tensor,
    pages: list[int],
    max_pages: int,
    max_new_tokens: int,
    sampling: Sampling,
) -> _Rows:
    """The row of a prompt before its prefill: its last token is the current one."""
    device = model.device
    table = pages + [0] * (max_pages - len(pages))
    prompt = prompt.to(device)
    return _Rows(
        tokens=prompt[-1:],
        positions=torch.tensor([len(prompt) - 1], device=device),
        n_new=torch.zeros(1, dtype=torch.int64, device=device),
        block_table=torch.tensor([table], dtype=torch.int32, device=device),
        uniforms=sampling.uniforms(index, max_new_tokens, device),
        seen=sampling.seen(prompt, model.config.vocab_size),
    )


def _prefill(
    model: Model,
    cache: Cache,
    row: _Rows,
    prompt: Tensor,
    chunk: int,
    on_prefill: Callable[[int, int], None],
) -> Tensor:
    """Writes a prompt into the cache; the logits that follow it, [1, vocab_size]."""
    for start in range(0, len(prompt), chunk):
        tokens = prompt[start : start + chunk].to(model.device)
        end = start + len(tokens)
        positions = torch.arange(start, end, device=model.device)
        pages = row.block_table[0, positions // PAGE_SIZE].long()
        step = Step(
            tokens=tokens,
            positions=positions,
            slots=pages * PAGE_SIZE + positions % PAGE_SIZE,
            block_table=row.block_table,
            seq_lens=torch.tensor([end], dtype=torch.int32, device=model.device),
            query_lens=(len(tokens),),
        )
        hidden = model.forward(step, cache)
        on_prefill(end, len(prompt))
    return model.head(hidden[-1:])


def _decode(
    model: Model,
    cache: Cache,
    rows: _Rows,
    running: list[_Sequence],
    sampling: Sampling,
    stops: frozenset[int],
) -> Iterator[tuple[int, int]]:
    """Steps all sequences until at least one of them has ended; on a GPU one step ahead."""
    ahead = 1 if model.device.type == "cuda" else 0
    steps_left = min(sequence.remaining for sequence in running)
    in_flight: deque[Callable[[], list[int]]] = deque()
    while in_flight or all(sequence.remaining for sequence in running):
        if steps_left and all(sequence.remaining for sequence in running):
            in_flight.append(_read_later(_decode_step(model, cache, rows, sampling)))
            steps_left -= 1
            if steps_left and len(in_flight) <= ahead:
                continue
        for sequence, token in zip(running, in_flight.popleft()(), strict=True):
            if sequence.remaining:  # else it ended while this step was in flight
                sequence.take(token, stops)
                yield sequence.index, token


def _decode_step(model: Model, cache: Cache, rows: _Rows, sampling: Sampling) -> Tensor:
    """One token for each row; nothing here waits for the device. [B] int64"""
    pages = rows.block_table.gather(1, (rows.positions // PAGE_SIZE)[:, None])[:, 0].long()
    step = Step(
        tokens=rows.tokens,
        positions=rows.positions,
        slots=pages * PAGE_SIZE + rows.positions % PAGE_SIZE,
        block_table=rows.block_table,
        seq_lens=(rows.positions + 1).int(),
    )
    return rows.choose(model.head(model.forward(step, cache)), sampling)


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
