"""The decode step as a GPU runs it, on a CPU: padded up to a bucket, captured, replayed."""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import replace

import pytest
import torch
from recorded_graphs import RecordedGraphs, Unsafe, recording
from torch.utils._pytree import tree_leaves

from glm4 import decoder, generation
from glm4.cache import PAGE_SIZE
from glm4.decoder import Decoder
from glm4.model import PRESETS, Config, Model
from glm4.sampling import Sampling
from glm4_kernels.library import error_flags

TINY = Config(
    layers=2, hidden=64, ffn=96, heads=6, kv_heads=2, vocab=101, eps=1e-5, theta=1e4,
    max_positions=256, qkv_bias=True, sandwich=True, head_dim=64, rotary_dim=32,
    eos_token_ids=(100,),
)  # fmt: skip
SAMPLINGS = (
    Sampling(),
    Sampling(repetition_penalty=1.7),
    Sampling(0.9, seed=5),
    Sampling(0.9, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=5),
)


@pytest.fixture(scope="module")
def model():
    """fp32, with logits far enough apart for a text that does not repeat itself."""
    return Model.random(TINY, dtype=torch.float32, prepare=lambda name, weight: weight * 8)


@pytest.fixture
def as_on_a_gpu(model, monkeypatch):
    """Buckets, graphs and the order of launching and reading; the graphs made."""
    made = []
    model.decoder = None

    def graphs(device):
        made.append(RecordedGraphs(device))
        return made[-1]

    monkeypatch.setitem(decoder.BUCKETS, "cpu", (1, 2, 4, 8))
    monkeypatch.setitem(decoder.GRAPHS, "cpu", graphs)
    monkeypatch.setitem(generation.STEPS_AHEAD, "cpu", 1)
    yield made
    model.decoder = None


def options_of(sampling: Sampling) -> dict:
    return {name: getattr(sampling, name) for name in sampling.__dataclass_fields__}


def make_prompts(lengths, seed=2):
    numbers = random.Random(seed)
    return [[numbers.randrange(100) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize(
    "sampling, limits",
    [
        *((sampling, {}) for sampling in SAMPLINGS),
        (SAMPLINGS[-1], {"n_pages": 4}),
        (SAMPLINGS[-1], {"max_batch": 3}),
        (SAMPLINGS[0], {"max_batch": 1}),
    ],
    ids=["greedy", "penalty", "drawn", "all", "few pages", "3 at a time", "alone"],
)
def test_replayed_steps_are_called_steps(model, monkeypatch, request, limits, sampling):
    prompts = make_prompts([5, 64, 63, 1, 90, 20])
    # Stop tokens end sequences at different steps, so that buckets shrink and grow again.
    options = options_of(sampling) | {"stop_token_ids": range(0, 101, 20), **limits}
    called = model.generate(prompts, 40, **options)
    assert len({len(text) for text in called}) > 2, "all end at the same time"
    made = request.getfixturevalue("as_on_a_gpu")
    assert model.generate(prompts, 40, **options) == called
    assert made[0].captures >= min(2, limits.get("max_batch", 2)) and made[0].replays > 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_cuda_graphs(device, monkeypatch, sampling):
    scaled = lambda name, weight: weight * 8  # noqa: E731
    model = Model.random(TINY, device, torch.bfloat16, prepare=scaled)
    prompts = make_prompts([5, 64, 63, 1, 90, 20])
    options = options_of(sampling) | {"stop_token_ids": range(0, 101, 20)}
    warmups = []
    replayed = model.generate(prompts, 40, on_warmup=lambda *what: warmups.append(what), **options)
    assert any(what.startswith("CUDA graph of") for what, _ in warmups)
    assert model.decoder.replays
    bucket = max(model.decoder.replays)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            model.decoder.run(bucket)
            model.decoder.launch(bucket)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert model.generate(prompts, 40, **options) == replayed, "graphs of an earlier call"
    model.decoder = None
    monkeypatch.delitem(decoder.GRAPHS, "cuda")
    assert model.generate(prompts, 40, **options) == replayed, "called steps"


def test_graphs_serve_the_next_generation(model, as_on_a_gpu):
    options = {"temperature": 0.9, "stop_token_ids": range(0, 101, 20)}
    longer, shorter = make_prompts([90, 70, 130]), make_prompts([5, 64], seed=3)
    first = model.generate(longer, 20, seed=1, **options)
    assert model.generate(longer, 20, seed=1, **options) == first
    assert model.generate(longer, 20, seed=9, **options) != first
    fresh = [
        model.generate([prompt], 15, seed=4 + i, **options)[0] for i, prompt in enumerate(shorter)
    ]
    interrupted = generation.stream(model, longer, 20, seed=1, **options)
    next(interrupted)
    assert model.generate(shorter, 15, seed=4, **options) == fresh, "while another one runs"
    interrupted.close()
    assert model.generate(shorter, 15, seed=4, **options) == fresh
    assert len(as_on_a_gpu) == 2, "one decoder for all, and one for two at a time"
    captures = as_on_a_gpu[0].captures
    assert captures <= 3, "each bucket once"

    options["temperature"] = 0.5
    model.generate(shorter, 15, seed=4, **options)
    assert len(as_on_a_gpu) == 3, "other constants are in the graph"
    model.generate(make_prompts([200, 100]), 40, seed=4, **options)
    assert len(as_on_a_gpu) == 3, "room for a little more"
    model.generate(shorter, 150, seed=4, **options)
    assert len(as_on_a_gpu) == 4, "more draws than were thought of"
    kept = weakref.ref(model.decoder)
    model.logits(torch.tensor([[1, 2]]))
    assert kept() is None, "its pages are free for another cache"


def test_warm_up_is_reported(model, as_on_a_gpu):
    warmups = []
    model.generate(
        make_prompts([3, 4, 5]),
        12,
        stop_token_ids=(),
        max_batch=2,
        on_warmup=lambda what, seconds: warmups.append((what, seconds)),
    )
    assert [what for what, _ in warmups] == [
        "first pass over a prompt",
        "first step of 2 rows",
        "CUDA graph of 2 rows",
        "first step of 1 rows",
        "CUDA graph of 1 rows",
    ]
    assert all(seconds > 0 for _, seconds in warmups)


def test_without_graphs_nothing_is_warm_up(model):
    model.generate([[1]], 4, on_warmup=lambda *what: pytest.fail(str(what)))


def running(model, sampling=None, rows=2, capacity=4, context=70) -> Decoder:
    """A decoder whose first rows are in the middle of sequences, over random K and V."""
    cache = model.new_cache(3 * capacity)
    generator = torch.Generator().manual_seed(1)
    for tensor in (*cache.k, *cache.v):
        tensor.normal_(generator=generator)
    sampling = sampling or Sampling(0.8, repetition_penalty=1.3, seed=3)
    it = Decoder(model, cache, sampling, capacity, 3, 50)
    for tensor in (it.rows.tokens, it.rows.block_table, it.rows.uniforms, it.rows.seen):
        tensor.zero_()
    for row in range(rows):
        it.rows.tokens[row] = 3 + row
        it.rows.positions[row] = context - 1 - 10 * row
        it.rows.seq_lens[row] = context - 10 * row
        pages = torch.tensor([3, 1, 2], dtype=torch.int32) + 4 * row
        it.rows.block_table[row] = pages
        page, offset = divmod(context - 1 - 10 * row, PAGE_SIZE)
        it.rows.slots[row] = int(pages[page]) * PAGE_SIZE + offset
        it.rows.uniforms[row] = torch.rand(it.rows.uniforms.shape[1], generator=generator)
    return it


def bits_of_cache(it: Decoder) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in (*it.cache.k, *it.cache.v)]


def test_padding_changes_nothing(model):
    clean, dirty = running(model), running(model)
    with torch.inference_mode():
        padding = dirty.rows
        padding.tokens[2:] = torch.tensor([99, 50])
        padding.block_table[2:] = torch.tensor([3, 1, 2], dtype=torch.int32)  # of another row
        padding.uniforms[2:] = 0.5
        padding.seen[2:] = True
        before = bits_of_cache(clean)
        for _ in range(12):
            clean.launch(4)
            dirty.launch(4)
            assert torch.equal(clean.results[3:5], dirty.results[3:5])
            for mine, theirs in zip(bits_of_cache(clean), bits_of_cache(dirty), strict=True):
                assert torch.equal(mine, theirs)
    # Each step has written one slot a running row and layer, and no other.
    slots = set()
    for now, then in zip(bits_of_cache(clean), before, strict=True):
        pages, _, offsets, _ = (now != then).nonzero(as_tuple=True)
        slots |= set(zip(pages.tolist(), offsets.tolist(), strict=True))
    table, expected = clean.rows.block_table, set()
    for row, first in ((0, 69), (1, 59)):
        for position in range(first, first + 12):
            page = int(table[row, position // PAGE_SIZE])
            expected.add((page, position % PAGE_SIZE))
    assert slots == expected
    assert clean.rows.positions.tolist() == [81, 71, 0, 0]
    assert clean.rows.seq_lens.tolist() == [82, 72, 0, 0]
    assert clean.rows.n_drawn.tolist() == [12, 12, 0, 0]


def test_rows_agree_whatever_the_bucket(model):
    texts = []
    for bucket in (2, 3, 4):
        it = running(model)
        with torch.inference_mode():
            steps = []
            for _ in range(20):
                it.launch(bucket)
                steps.append(it.results[3:5].tolist())
        texts.append(steps)
    assert texts[0] == texts[1] == texts[2]


def test_buffers_stay_where_they_are(model):
    it = running(model)
    buffers = [*it.rows.tensors(), it.results, *it.cache.k, *it.cache.v]
    addresses = [tensor.data_ptr() for tensor in buffers]
    with torch.inference_mode():
        it.step(1)()
        it.move(0, 1)
        it.clear(1)
        it.step(1)()
        it.join(1, running(model).rows.first(2))
        it.step(3)()
    assert [tensor.data_ptr() for tensor in buffers] == addresses


def test_nothing_that_a_step_allocates_outlives_it(model):
    """Else graphs that share a pool of memory would write over each other's tensors."""
    it = running(model)
    static = {t.untyped_storage().data_ptr() for t in (*it.rows.tensors(), it.results)}
    static |= {t.untyped_storage().data_ptr() for t in (*it.cache.k, *it.cache.v)}
    with torch.inference_mode(), recording() as mode:
        it.launch(4)
        made = [
            weakref.ref(tensor)
            for call in mode.calls
            for tensor in tree_leaves(call[3])
            if tensor is not None and tensor.untyped_storage().data_ptr() not in static
        ]
        mode.calls.clear()
    gc.collect()
    alive = [ref() for ref in made if ref() is not None]
    assert len(made) > 30 and alive == [], [(t.shape, t.dtype) for t in alive]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_bad_logits_in_a_replayed_step(model, monkeypatch):
    prompts = make_prompts([5, 9, 3])
    texts = model.generate(prompts, 20, stop_token_ids=())
    poisoned = next(token for token in texts[1][5:] if all(token not in t for t in texts[::2]))
    embedding = model.embedding.clone()
    embedding[poisoned] = torch.nan
    monkeypatch.setattr(model, "embedding", embedding)
    model.decoder = None
    good = []
    with pytest.raises(FloatingPointError, match=r"prompts\[1\] became NaN"):  # noqa: PT012
        for index, token in model_stream(model, prompts):
            good += [token] if index == 1 else []
    assert good == texts[1][: texts[1].index(poisoned) + 1]


def model_stream(model, prompts):
    return generation.stream(model, prompts, 20, stop_token_ids=())


@pytest.mark.usefixtures("as_on_a_gpu")
def test_error_flags_are_read_with_the_tokens(model):
    tokens = model_stream(model, make_prompts([5, 9]))
    for _ in range(8):
        next(tokens)
    flags = error_flags(model.device)
    flags[-1] = 1  # as a kernel of the next step would
    with pytest.raises(IndexError, match=r"^flash_decode: .* was out of range"):  # noqa: PT012
        for _ in range(2 * (2 + generation.STEPS_AHEAD["cpu"])):
            next(tokens)
    assert not flags.any(), "read once"


def test_first_tokens_are_checked_too(model, monkeypatch):
    monkeypatch.setattr(model, "forward", forward := model.forward)

    def flagged(step, cache):
        error_flags(model.device)[0] = 1
        return forward(step, cache)

    monkeypatch.setattr(model, "forward", flagged)
    with pytest.raises(IndexError, match=r"^rope: a position"):
        model.generate([[1, 2]], 1)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("preset", ["glm-4-9b-chat", "glm-4-9b-0414", "glm-4-32b-0414"])
def test_step_at_full_size_is_safe_to_capture(preset, sampling, monkeypatch):
    """On a device without data: a line that waits for it or uploads from the host fails."""
    config = replace(PRESETS[preset], layers=2)
    monkeypatch.setitem(decoder.BUCKETS, "meta", decoder.BUCKETS["cuda"])
    meta = torch.device("meta")
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16, device=meta)
        for name, shape in config.shapes.items()
    }
    model = Model(config, weights, meta, torch.bfloat16)
    it = Decoder(model, model.new_cache(64), sampling, 8, 16, 100)
    with torch.inference_mode(), recording() as mode:
        it.run(8)
    names = [func.name() for func, *_ in mode.calls]
    assert names.count("glm4_kernels::flash_decode") == 2
    assert names.count("glm4_kernels::decode_schedule") == 1, "the layers share one"
    # Nothing of the decoder itself is left to torch's small kernels.
    work = [name for name in names if name != "aten::slice.Tensor"]
    assert work[0] == "aten::embedding"
    last_matrix = len(work) - work[::-1].index("aten::mm")
    sample = "glm4_kernels::sample" + ".seen" * (sampling.repetition_penalty != 1.0)
    assert work[last_matrix:] == [sample, "glm4_kernels::decode_advance"]


@pytest.mark.parametrize(
    "line",
    [
        lambda x: x.max().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.as_tensor([1, 2], device=x.device),
        lambda x: x[torch.tensor([0])],
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x + torch.ones(4),
        lambda x: x.copy_(torch.ones(4)),
        lambda x: torch.zeros(4).to(x.device),
        lambda x: x.repeat_interleave(torch.ones_like(x, dtype=torch.int64)),
        lambda x: x.masked_fill_(x > 0, torch.tensor(1.0)),
        lambda x: torch.rand_like(x),
        lambda x: bool(x.any()),
        lambda x: x.unique(),
    ],
    ids=lambda line: "",
)
def test_unsafe_lines_are_refused(line):
    with torch.inference_mode():
        x = torch.empty(4, device="meta")
        with pytest.raises((Unsafe, RuntimeError, NotImplementedError)), recording():
            line(x)


def test_a_value_of_the_host_is_frozen_in_a_replay():
    """The recorder goes red where a CUDA graph would."""
    x, steps = torch.zeros(3), iter((1, 2))

    def step():
        x.add_(next(steps))

    replay = RecordedGraphs(torch.device("cpu")).capture(step)
    assert not x.any(), "capturing runs nothing"
    replay()
    replay()
    assert x.tolist() == [2, 2, 2]
