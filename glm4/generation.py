"""Text from many prompts over one paged cache.

    admit    first come, first served: a prompt starts once pages for all of its tokens are free
    prefill  short prompts together, a long one in chunks; then the first new token of each
    decode   one token of every running sequence a step; a step after each chunk, while others run

The host launches and the device works: on a GPU a step is launched before the tokens of the one
before are read, so a stop is seen one step late and its row there is dropped. How many tokens a
sequence may make is known to the host at once. What the device does it does in order of launch:
pages of a sequence that left serve the next one, whatever is still in flight.
"""

from __future__ import annotations

import numbers
import reprlib
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, TypedDict

import numpy
import torch
from torch import Tensor
from torch.nn.functional import pad

from glm4.cache import PAGE_SIZE, Step, free_bytes, gib, page_bytes
from glm4.decoder import GRAPHS, Decoder, Rows, to_device
from glm4.sampling import Sampling
from glm4_kernels.library import bad_type, bad_value

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from glm4.model import Config, Model

# Of the memory that is free, for the cache; the rest is for activations and logits.
CACHE_SHARE = 0.9

on_host = partial(torch.tensor, dtype=torch.int64, device="cpu")

# Decode steps launched before the tokens of the one before are read, and tokens of a prompt that
# one forward pass takes, by type of device. Not measured yet.
STEPS_AHEAD = {"cpu": 0, "cuda": 1}
PREFILL_CHUNK = {"cpu": 512, "cuda": 4096}


class Options(TypedDict, total=False):
    """What `generate` and `stream` take besides; `stream` says what each is."""

    temperature: float
    top_k: int | None
    top_p: float
    repetition_penalty: float
    seed: int | None
    stop_token_ids: Sequence[int] | None
    n_pages: int | None
    prefill_chunk: int | None
    max_batch: int
    on_prefill: Callable[[int, int], None] | None
    on_warmup: Callable[[str, float], None] | None


def generate(
    model: Model,
    prompts: Iterable[Sequence[int]],
    max_new_tokens: int,
    **options: Unpack[Options],
) -> list[list[int]]:
    """The new tokens of each prompt, a stop token included; arguments and errors as `stream`."""
    for name in options.keys() - Options.__annotations__.keys():
        close = get_close_matches(name, Options.__annotations__, 1)
        known = close or Options.__annotations__
        raise TypeError(f"generate: {name!r} is no option; there is {', '.join(known)}")
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
    on_warmup: Callable[[str, float], None] | None = None,
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
        on_warmup: on a GPU called with (what, seconds) after the first pass over a prompt and, for
            each batch size, after the first decode step and the capture of its CUDA graph:
            seconds of the host, which compiles and loads then.

    Raises:
        ValueError, TypeError: an argument is wrong, or a prompt with its new tokens fits neither
            the model's context nor the cache; before any work.
        FloatingPointError: the logits of a prompt became NaN or infinite.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    if temperature == 0 and (top_k is not None or top_p != 1.0):
        message = "generate: top_k and top_p do nothing at temperature 0, which takes the likeliest"
        warnings.warn(f"{message} token; give a temperature, e.g. 1", stacklevel=3)
    config = model.config
    if prefill_chunk is None:
        prefill_chunk = PREFILL_CHUNK[model.device.type]
    if stop_token_ids is None:
        stop_token_ids = config.eos_token_ids
    max_new_tokens = _count("max_new_tokens", max_new_tokens)
    prefill_chunk = _count("prefill_chunk", prefill_chunk)
    max_batch = _count("max_batch", max_batch)
    n_pages = None if n_pages is None else _count("n_pages", n_pages)
    stops = frozenset(_token_ids("stop_token_ids", stop_token_ids, config.vocab).tolist())
    waiting = list(enumerate(check_prompts(config, model.dtype, prompts, max_new_tokens)))
    lengths = [len(ids) for _, ids in waiting]
    n_pages = _plan_pages(model, lengths, max_new_tokens, n_pages, max_batch)
    engine = _Engine(model, sampling, stops, max_new_tokens, prefill_chunk, on_prefill, on_warmup)
    return engine.run(deque(waiting), n_pages, min(max_batch, len(waiting)))


def _count(name: str, value: object) -> int:
    """A number of tokens, sequences or pages, of any integer type."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise bad_type("generate", name, "an integer", repr(value))
    if value < 1:
        raise bad_value("generate", name, "at least 1", value)
    return int(value)


def check_prompts(
    config: Config, dtype: torch.dtype, prompts: Iterable[Sequence[int]], max_new_tokens: int
) -> list[Tensor]:
    """Their ids. Refuses what is none, and prompts that no model of this config can continue."""
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
        raise bad_type("generate", "prompts", "a list of lists of ids", type(prompts).__name__)
    found = []
    for index, prompt in enumerate(prompts):
        name = f"prompts[{index}]"
        if isinstance(prompt, numbers.Integral) or getattr(prompt, "ndim", None) == 0:
            whole = reprlib.repr(prompts) if isinstance(prompts, (list, tuple)) else "prompt"
            actual = f"{prompt}; wrap one prompt in a list: [{whole}]"
            raise bad_type("generate", name, "a list of token ids", actual)
        ids = _token_ids(name, prompt, config.vocab)
        if len(ids) == 0:
            raise bad_value("generate", name, "at least one token", "an empty list")
        if len(ids) + max_new_tokens > config.max_positions:
            expected = f"at most {config.max_positions} tokens (the model's context)"
            actual = _with_new_tokens(config, dtype, len(ids), max_new_tokens)
            raise bad_value("generate", f"{name} with its new tokens", expected, actual)
        found.append(ids)
    return found


def _token_ids(name: str, ids: object, vocab_size: int) -> Tensor:
    """[T] int64 on the CPU, of integers in whatever holds them."""
    actual = type(ids).__name__ if isinstance(ids, (str, bytes)) else reprlib.repr(ids)
    if isinstance(ids, Tensor):
        actual = f"{ids.dtype} {list(ids.shape)}"
        ids = None if ids.is_floating_point() else ids.numpy(force=True)
    try:
        array = numpy.asarray(ids)
    except ValueError:  # rows of several lengths
        array = numpy.asarray(None)
    if array.dtype.kind == "f":  # numpy's type for none, and for some on both sides of 2^63
        array = numpy.asarray(ids, dtype=object)
    whole = array.dtype.kind in "iu" or all(isinstance(x, numbers.Integral) for x in array.flat)
    if array.ndim != 1 or array.dtype.kind == "b" or not whole:
        raise bad_type("generate", name, "a list of token ids", actual)
    outside = array[(array < 0) | (array >= vocab_size)]
    if len(outside):
        raise bad_value("generate", name, f"token ids in [0, {vocab_size})", outside[0])
    return torch.from_numpy(array.astype(numpy.int64))


def _plan_pages(
    model: Model, lengths: list[int], max_new_tokens: int, n_pages: int | None, max_batch: int
) -> int:
    """Refuses prompts that can never run; returns the number of pages of the cache."""
    page = _page_bytes(model.config, model.dtype)
    kept = model.decoder.cache.n_pages if model.decoder else 0  # free once it does not serve
    free = free_bytes(model.device) + kept * page
    needs = [_pages_for(length, max_new_tokens) for length in lengths]
    room = f"{n_pages} pages of cache (n_pages)"
    if n_pages is None:
        affordable = int(CACHE_SHARE * free) // page
        wanted = sum(sorted(needs)[-max_batch:])
        n_pages = min(_roomy(wanted) if model.device.type in GRAPHS else wanted, affordable)
        room = f"the {gib(n_pages * page)} that a cache may take on {model.device}"
    elif n_pages * page > free:
        expected = f"at most {free // page}, which take the {gib(free)} free on {model.device}"
        raise bad_value("generate", "n_pages", expected, f"{n_pages} ({gib(n_pages * page)})")
    for index, (length, need) in enumerate(zip(lengths, needs, strict=True)):
        if need > n_pages:
            actual = _with_new_tokens(model.config, model.dtype, length, max_new_tokens)
            name = f"prompts[{index}] with its new tokens"
            raise bad_value("generate", name, f"within {room}", actual)
    return n_pages


def _page_bytes(config: Config, dtype: torch.dtype) -> int:
    return page_bytes(config.layers, config.kv_heads, config.head_dim, dtype)


def _with_new_tokens(config: Config, dtype: torch.dtype, length: int, max_new_tokens: int) -> str:
    cache = _pages_for(length, max_new_tokens) * _page_bytes(config, dtype)
    return f"{length} + {max_new_tokens}, whose cache takes {gib(cache)}"


def _roomy(n: int) -> int:
    """Up to an eighth or 64 more, so that what is made for it serves the next, slightly longer
    generation too."""
    step = max(64, (1 << n.bit_length()) // 16)
    return -(-n // step) * step


def _pages_for(length: int, max_new_tokens: int) -> int:
    """Pages of a whole sequence, but for its last token, which nothing ever attends to."""
    return -(-(length + max_new_tokens - 1) // PAGE_SIZE)


@dataclass(eq=False)
class _Sequence:
    """What the host knows of a sequence that has started."""

    index: int  # of its prompt
    prompt: Tensor  # on the CPU
    pages: list[int]
    to_launch: int  # tokens that it may still make
    ended: bool = False  # its last token has been read


@dataclass
class _Engine:
    """One call of `stream`: what its stages share."""

    model: Model
    sampling: Sampling
    stops: frozenset[int]
    max_new_tokens: int
    prefill_chunk: int
    on_prefill: Callable[[int, int], None] | None
    on_warmup: Callable[[str, float], None] | None
    free: list[int] = field(default_factory=list)  # pages
    running: list[_Sequence] = field(default_factory=list)  # in the order of the decoder's rows
    # Sequences whose tokens have been launched together, and what waits for those.
    in_flight: deque[tuple[list[_Sequence], Callable[[], list[int]]]] = field(default_factory=deque)

    @torch.inference_mode()
    def run(
        self, waiting: deque[tuple[int, Tensor]], n_pages: int, capacity: int
    ) -> Iterator[tuple[int, int]]:
        if not waiting:
            return
        self.free = list(range(n_pages))
        max_pages = max(_pages_for(len(prompt), self.max_new_tokens) for _, prompt in waiting)
        self.decoder = self.prepared(capacity, n_pages, max_pages)
        try:
            yield from self.model.team.over(self.served(waiting, capacity))
        finally:
            if self.decoder.graphs is not None:
                self.model.decoder = self.decoder

    def prepared(self, capacity: int, n_pages: int, max_pages: int) -> Decoder:
        """The decoder of the last generation, with its pages and graphs, if it serves this one."""
        sizes = (capacity, n_pages, max_pages, self.max_new_tokens)
        decoder, self.model.decoder = self.model.decoder, None
        if decoder is not None and decoder.serves(self.sampling, *sizes):
            decoder.clear()
            decoder.on_warmup = self.on_warmup
            return decoder
        del decoder  # and its memory
        cache = self.model.new_cache(n_pages)
        return Decoder(
            self.model,
            cache,
            self.sampling,
            capacity,
            _roomy(max_pages),
            _roomy(self.max_new_tokens),
            self.on_warmup,
        )

    def served(
        self, waiting: deque[tuple[int, Tensor]], capacity: int
    ) -> Iterator[tuple[int, int]]:
        """The engine's loop."""
        while waiting or self.running or self.in_flight:
            self.retire()
            starting = self.admitted(waiting, capacity)
            others_run = bool(self.running)
            started: list[tuple[list[_Sequence], Rows]] = []
            groups = list(_packed(starting, self.prefill_chunk))
            for group in groups:
                rows = self.new_rows(group)
                for logits in self.prefill(group, rows):
                    if logits is not None:
                        for sequence in group:
                            sequence.to_launch -= 1
                        self.in_flight.append((group, self.decoder.first_tokens(rows, logits)))
                        yield from self.collect()
                    if others_run and (logits is None or group is not groups[-1]):
                        yield from self.decode()
                started.append((group, rows))
            for group, rows in started:
                self.decoder.join(len(self.running), rows)
                self.running += group
            yield from self.decode()

    def admitted(self, waiting: deque[tuple[int, Tensor]], capacity: int) -> list[_Sequence]:
        """The prompts that start now, with their pages."""
        starting: list[_Sequence] = []
        while waiting and len(self.running) + len(starting) < capacity:
            index, prompt = waiting[0]
            need = _pages_for(len(prompt), self.max_new_tokens)
            if need > len(self.free):
                break
            waiting.popleft()
            pages = [self.free.pop() for _ in range(need)]
            starting.append(_Sequence(index, prompt, pages, self.max_new_tokens))
        return starting

    def retire(self) -> None:
        """Takes sequences that make no more tokens out of their rows, and frees their pages."""
        before = len(self.running)
        for row in reversed(range(before)):
            sequence = self.running[row]
            if sequence.ended or not sequence.to_launch:
                last = self.running.pop()
                if last is not sequence:
                    self.decoder.move(row, len(self.running))
                    self.running[row] = last
                self.free += sequence.pages
        if len(self.running) < before:
            self.decoder.clear(len(self.running))

    def new_rows(self, group: list[_Sequence]) -> Rows:
        """Prompts before their prefill: the last token of each is its current one."""
        device, options = self.model.device, self.sampling
        prompts = [sequence.prompt for sequence in group]
        max_pages, max_draws = (
            columns.shape[1]
            for columns in (self.decoder.rows.block_table, self.decoder.rows.uniforms)
        )
        tables = [s.pages + [-1] * (max_pages - len(s.pages)) for s in group]
        uniforms = [options.uniforms(s.index, max_draws) for s in group]
        seen = [options.seen(prompt, self.model.config.vocab) for prompt in prompts]
        lengths = on_host([len(prompt) for prompt in prompts])
        numbers = torch.cat(uniforms)
        rows = Rows(
            tokens=torch.stack([prompt[-1] for prompt in prompts]),
            positions=lengths - 1,
            seq_lens=lengths.int(),
            slots=torch.full_like(lengths, -1),  # of the prompt's last token: written by now
            n_drawn=torch.zeros_like(lengths),
            uniform=pad(numbers, (0, 1))[:, 0].contiguous(),  # 0 if greedy
            block_table=on_host(tables).int(),
            uniforms=numbers,
            seen=torch.cat(seen),
        )
        return Rows(*(to_device(tensor, device) for tensor in rows.tensors()))

    def prefill(self, group: list[_Sequence], rows: Rows) -> Iterator[Tensor | None]:
        """Writes prompts into the cache, several in one pass or one in several. Yields None after
        each pass but the last, then the logits that follow each prompt, [B, vocab]."""
        report = self.on_prefill or (lambda done, total: None)
        lengths = [len(sequence.prompt) for sequence in group]
        packed = to_device(torch.cat([_rows_of(s) for s in group], dim=1), self.model.device)
        ends = on_host(lengths).cumsum(0) - 1
        for start in range(0, packed.shape[1], self.prefill_chunk):
            for length in lengths:
                report(start, length)
            tokens, positions, slots = packed[:, start : start + self.prefill_chunk]
            spans = [(0, length) for length in lengths]
            if len(group) == 1:
                spans = [(start, start + len(tokens))]
            step = Step(tokens, positions, slots, rows.block_table, spans=tuple(spans))
            forward = partial(self.model.forward, step, self.decoder.cache)
            hidden = self.decoder.counted("first pass over a prompt", forward)
            if start + len(tokens) < packed.shape[1]:
                yield None
        for length in lengths:
            report(length, length)
        ends -= packed.shape[1] - len(hidden)
        yield self.model.head(hidden.index_select(0, to_device(ends, self.model.device)))

    def decode(self) -> Iterator[tuple[int, int]]:
        """Launches a step of the running sequences, and yields the tokens that are due."""
        self.retire()
        if self.running:
            for sequence in self.running:
                sequence.to_launch -= 1
            self.in_flight.append((list(self.running), self.decoder.step(len(self.running))))
            yield from self.collect()
        else:
            yield from self.collect(0)

    def collect(self, keep: int | None = None) -> Iterator[tuple[int, int]]:
        """Yields the tokens of all launches but the last `keep`."""
        if keep is None:
            keep = STEPS_AHEAD[self.model.device.type]
        while len(self.in_flight) > keep:
            sequences, read = self.in_flight.popleft()
            for sequence, token in zip(sequences, read(), strict=True):
                if not sequence.ended:  # else it ended while this step was in flight
                    yield self.take(sequence, token)

    def take(self, sequence: _Sequence, token: int) -> tuple[int, int]:
        if token < 0:
            raise FloatingPointError(
                f"generate: the logits of prompts[{sequence.index}] became NaN or infinite; "
                "float16 overflows in GLM-4 (use bfloat16 or float32), or the checkpoint is damaged"
            )
        sequence.ended = token in self.stops
        return sequence.index, token


def _packed(starting: list[_Sequence], limit: int) -> Iterator[list[_Sequence]]:
    """Sequences in order, in groups whose prompts have at most `limit` tokens, or of one."""
    group: list[_Sequence] = []
    for sequence in starting:
        if group and sum(len(s.prompt) for s in (*group, sequence)) > limit:
            yield group
            group = []
        group.append(sequence)
    if group:
        yield group


def _rows_of(sequence: _Sequence) -> Tensor:
    """Of each token of a prompt its id, position and slot: [3, T] int64."""
    positions = torch.arange(len(sequence.prompt), dtype=torch.int64, device="cpu")
    pages = on_host(sequence.pages)[positions // PAGE_SIZE]
    return torch.stack((sequence.prompt, positions, pages * PAGE_SIZE + positions % PAGE_SIZE))
