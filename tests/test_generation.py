"""The scheduler is tested on a model whose next token is a hash of all tokens that it reads back
through its block table, so that a wrong slot, page, position or length shows; then on a real one.
"""

from __future__ import annotations

import inspect
import math
import random
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from glm4 import decoder, generation
from glm4.cache import PAGE_SIZE
from glm4.generation import generate, stream
from glm4.model import Config, Model
from glm4.sampling import Sampling
from glm4.threads import Team

VOCAB = 61
STOP = 7
MAX_POSITIONS = 512


class PagedHash:
    """A model in the engine's eyes; `expected` is the same function without a cache."""

    device = torch.device("cpu")
    dtype = torch.float32
    decoder = None
    team = Team(on=False)
    config = SimpleNamespace(
        layers=40, kv_heads=2, head_dim=128, vocab=VOCAB, max_positions=MAX_POSITIONS,
        eos_token_ids=(STOP,),
    )  # fmt: skip

    def __init__(self):
        self.passes = []  # rows of each pass
        self.caches = []  # pages of each cache

    def new_cache(self, n_pages):
        self.caches.append(n_pages)
        return torch.full((n_pages * PAGE_SIZE,), -1)

    def forward(self, step, cache):
        self.passes.append(len(step.tokens))
        spans = step.spans or [(max(n - 1, 0), n) for n in step.seq_lens.tolist()]
        row_lens = [stop - start or 1 for start, stop in spans]
        padded = torch.tensor([stop == 0 for _, stop in spans]).repeat_interleave(
            torch.tensor(row_lens)
        )
        assert sum(row_lens) == len(step.tokens) == len(step.slots)
        assert (step.slots[padded] == -1).all() and (step.positions[padded] == 0).all()
        slots = step.slots[~padded]
        assert (slots >= 0).all(), "writes past the pages of a sequence"
        assert len(set(slots.tolist())) == len(slots), "two rows write the same slot"
        cache[slots] = step.tokens[~padded]
        hidden, row = [], 0
        for table, (start, stop) in zip(step.block_table, spans, strict=True):
            rows = stop - start
            if stop == 0:
                hidden, row = [*hidden, 0], row + 1
                continue
            assert step.positions[row : row + rows].tolist() == list(range(start, stop))
            slots = (table.long()[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()
            text = cache[slots[:stop]].tolist()
            hidden += [self.hash(text[: start + i + 1]) for i in range(rows)]
            row += rows
        return torch.tensor(hidden)[:, None]

    def head(self, hidden):
        return torch.stack([self.logits(key) for key in hidden[:, 0].tolist()])

    @staticmethod
    def hash(text):
        assert min(text) >= 0, "reads a slot that was never written"
        return hash(tuple(text)) % 2**31

    @staticmethod
    def logits(key):
        return 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(key))

    def expected(self, prompt, max_new_tokens, stops=(STOP,)):
        text = list(prompt)
        while len(text) - len(prompt) < max_new_tokens:
            text.append(int(self.logits(self.hash(text)).argmax()))
            if text[-1] in stops:
                break
        return text[len(prompt) :]


@pytest.fixture
def model():
    return PagedHash()


@pytest.fixture(params=[0, 1], ids=["in step", "a step ahead"])
def steps_ahead(request, monkeypatch):
    """The GPU's order of launching and reading, on the CPU."""
    monkeypatch.setitem(generation.STEPS_AHEAD, "cpu", request.param)


def make_prompts(lengths):
    numbers = random.Random(1)
    return [[numbers.randrange(VOCAB) for _ in range(length)] for length in lengths]


RAGGED = make_prompts([1, 63, 64, 65, 130, 2])  # around the edges of a page


@pytest.mark.usefixtures("steps_ahead")
@pytest.mark.parametrize("prefill_chunk", [None, 1, 50, 64])
def test_ragged_batch(model, prefill_chunk):
    expected = [model.expected(prompt, 70) for prompt in RAGGED]
    assert len({len(text) for text in expected}) > 2, "all end at the same time"
    assert generate(model, RAGGED, 70, prefill_chunk=prefill_chunk) == expected


def test_prefill_is_chunked_and_decode_is_batched(model):
    progress = []
    options = {"prefill_chunk": 50, "on_prefill": lambda *at: progress.append(at)}
    generate(model, make_prompts([130, 64]), 4, stop_token_ids=(), **options)
    assert model.passes == [50, 50, 30, 50, 14, 2, 2, 2]
    assert progress == [(0, 130), (50, 130), (100, 130), (130, 130), (0, 64), (50, 64), (64, 64)]


def test_short_prompts_share_a_prefill(model):
    prompts, progress = make_prompts([20, 30, 1, 40, 130, 50]), []
    options = {"prefill_chunk": 50, "on_prefill": lambda *at: progress.append(at)}
    texts = generate(model, prompts, 4, stop_token_ids=(), **options)
    assert texts == [model.expected(prompt, 4, stops=()) for prompt in prompts]
    assert model.passes == [20 + 30, 1 + 40, 50, 50, 30, 50, 6, 6, 6]
    assert progress[:4] == [(0, 20), (0, 30), (20, 20), (30, 30)]


@pytest.mark.parametrize("ahead", [0, 1])
def test_others_wait_for_a_chunk_at_most(model, monkeypatch, ahead):
    """The third prompt starts when the first has ended, while the second still runs."""
    monkeypatch.setitem(generation.STEPS_AHEAD, "cpu", ahead)
    prompts = make_prompts([3, 4, 130])
    texts = [model.expected(prompt, 12, stops=()) for prompt in prompts]
    stop = next(token for token in texts[0][2:] if token not in texts[1] + texts[2])
    options = {"stop_token_ids": [stop], "max_batch": 2, "prefill_chunk": 50}
    texts[0] = texts[0][: texts[0].index(stop) + 1]
    assert generate(model, prompts, 12, **options) == texts
    before = len(texts[0]) - 1 + ahead  # steps of both; the stop is seen a step late
    alone = 12 - 1 - before - 2  # after the third has joined, until the second has ended
    assert model.passes == [7, *[2] * before, 50, 1, 50, 1, 30, *[2] * alone, *[1] * (11 - alone)]


def test_others_wait_for_a_pass_at_most(model):
    """Two prompts start when the second has ended, each in a pass of its own."""
    prompts = make_prompts([4, 60, 40, 45])
    texts = [model.expected(prompt, 12, stops=()) for prompt in prompts]
    stop = next(token for token in texts[1][2:] if token not in texts[0] + texts[2] + texts[3])
    texts[1] = texts[1][: texts[1].index(stop) + 1]
    options = {"stop_token_ids": [stop], "n_pages": 3, "prefill_chunk": 50}
    assert generate(model, prompts, 12, **options) == texts
    before = len(texts[1]) - 1
    after = 11 - before - 1
    assert model.passes == [4, 50, 10, *[2] * before, 40, 1, 45, *[3] * after, *[2] * (11 - after)]


@pytest.mark.usefixtures("steps_ahead")
@pytest.mark.parametrize("limit", [{"n_pages": 4}, {"n_pages": 7}, {"max_batch": 2}], ids=str)
def test_queue(model, limit):
    prompts = make_prompts([100, 3, 150, 90, 1, 1, 64, 20, 128])
    started, texts = [], [[] for _ in prompts]
    for index, token in stream(model, prompts, 20, **limit):
        started += [index] if index not in started else []
        texts[index].append(token)
    assert texts == [model.expected(prompt, 20) for prompt in prompts]
    assert started == list(range(len(prompts))), "not first come, first served"
    assert model.caches == [limit.get("n_pages", 6)]  # 3 + 3: the two largest can run together


@pytest.mark.usefixtures("steps_ahead")
@pytest.mark.parametrize("seed", range(25))
def test_any_schedule_writes_the_same_texts(model, monkeypatch, seed):
    """Prompts, limits and stops at random, rows padded as for graphs."""
    numbers = random.Random(seed)
    monkeypatch.setitem(decoder.BUCKETS, "cpu", (1, 2, 4, 8))
    prompts = make_prompts([numbers.choice((1, 5, 63, 64, 65, 150)) for _ in range(9)])
    new_tokens = numbers.choice((1, 2, 17, 70))
    stops = tuple(numbers.sample(range(VOCAB), numbers.choice((0, 1, 6))))
    largest = max(-(-(len(prompt) + new_tokens - 1) // PAGE_SIZE) for prompt in prompts)
    limits = {
        "n_pages": largest + numbers.choice((0, 1, 5, 30)),
        "max_batch": numbers.choice((1, 2, 3, 8)),
        "prefill_chunk": numbers.choice((1, 40, 64, 500)),
    }
    texts = generate(model, prompts, new_tokens, stop_token_ids=stops, **limits)
    assert texts == [model.expected(prompt, new_tokens, stops) for prompt in prompts]


@pytest.mark.usefixtures("steps_ahead")
def test_max_batch(model):
    prompts = make_prompts([20] * 5)
    generate(model, prompts, 8, stop_token_ids=(), n_pages=100, max_batch=3)
    prefills = {60, 40}  # three prompts, then the last two
    assert set(model.passes) == prefills | {3, 2}


@pytest.mark.usefixtures("steps_ahead")
def test_no_step_runs_past_a_full_page(model):
    """The second sequence fills its page to the last slot while the third has more to come."""
    first, second, third = make_prompts([30, PAGE_SIZE - 19, 30])
    texts = [model.expected(prompt, 20, stops=()) for prompt in (first, second, third)]
    stop = next(token for token in texts[0] if token not in texts[1] + texts[2])
    options = {"stop_token_ids": [stop], "max_batch": 2}
    texts[0] = texts[0][: texts[0].index(stop) + 1]
    assert generate(model, [first, second, third], 20, **options) == texts
    assert 1 < len(texts[0]) < 15


@pytest.mark.usefixtures("steps_ahead")
def test_stops(model):
    prompt = RAGGED[1]
    free = model.expected(prompt, 30, stops=())
    assert generate(model, [prompt], 30, stop_token_ids=[]) == [free]
    for n in (1, 2, 12):  # at the prefill's own token, at the first step, later
        text = generate(model, [prompt], 30, stop_token_ids=[free[n - 1]])[0]
        assert text == free[: free.index(free[n - 1]) + 1], "the stop token is the last"
    assert generate(model, [prompt], 1, stop_token_ids=[]) == [free[:1]]


def test_the_context_can_be_filled(model):
    prompt = make_prompts([MAX_POSITIONS - 5])[0]
    assert generate(model, [prompt], 5) == [model.expected(prompt, 5)]
    assert generate(model, [], 5) == []


def test_prompts_of_other_types(model):
    expected = [model.expected(prompt, 5) for prompt in RAGGED]
    assert generate(model, iter(RAGGED), 5) == expected
    assert generate(model, tuple(torch.tensor(prompt) for prompt in RAGGED), 5) == expected
    for dtype in (numpy.int16, numpy.uint8, numpy.uint64):
        prompts = [numpy.array(prompt, dtype) for prompt in RAGGED]
        assert generate(model, prompts, numpy.int64(5), max_batch=numpy.uint8(9)) == expected
        assert generate(model, [list(prompt) for prompt in prompts], 5) == expected


def test_a_consumer_may_stop_early(model):
    tokens = stream(model, RAGGED, 50)
    assert next(tokens)[0] == 0
    tokens.close()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.usefixtures("steps_ahead")
def test_a_sample_does_not_depend_on_its_neighbours(model):
    options = {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "stop_token_ids": ()}
    together = generate(model, RAGGED, 12, seed=3, **options)
    for i, prompt in enumerate(RAGGED):
        assert generate(model, [prompt], 12, seed=3 + i, **options) == [together[i]]
    assert generate(model, RAGGED, 12, seed=3, n_pages=4, **options) == together
    assert generate(model, RAGGED, 12, seed=1000, **options) != together
    twice = generate(model, [RAGGED[0]] * 2, 12, seed=3, **options)
    assert twice[0] != twice[1], "equal prompts must not get equal samples"


@pytest.mark.usefixtures("steps_ahead")
def test_each_token_has_its_own_number(model):
    sampling = Sampling(temperature=1.0, seed=4)
    uniforms = sampling.uniforms(0, 20)
    text = list(RAGGED[0])
    for i in range(20):
        logits = model.logits(model.hash(text))[None]
        text += sampling.choose(logits, uniforms[:, i], torch.empty(1, 0)).tolist()
    options = {"temperature": 1.0, "seed": 4, "stop_token_ids": ()}
    assert generate(model, RAGGED[:1], 20, **options) == [text[1:]]


@pytest.mark.usefixtures("steps_ahead")
def test_penalty_counts_prompt_and_text(model):
    from transformers import RepetitionPenaltyLogitsProcessor

    penalise = RepetitionPenaltyLogitsProcessor(1.8)
    expected = []
    for prompt in RAGGED:
        text = list(prompt)
        for _ in range(15):
            logits = penalise(torch.tensor([text]), model.logits(model.hash(text))[None])
            text.append(int(logits.argmax()))
        expected.append(text[len(prompt) :])
    options = {"stop_token_ids": (), "n_pages": 6}
    assert generate(model, RAGGED, 15, repetition_penalty=1.8, **options) == expected
    assert generate(model, RAGGED, 15, **options) != expected


@pytest.mark.usefixtures("steps_ahead")
@pytest.mark.parametrize("n_good", [0, 1, 5])
def test_bad_logits_are_an_error(model, monkeypatch, n_good):
    good = model.expected(RAGGED[2], n_good, stops=())
    poisoned = model.hash(RAGGED[2] + good)
    logits = model.logits
    poison = lambda key: logits(key) * (math.nan if key == poisoned else 1)  # noqa: E731
    monkeypatch.setattr(model, "logits", poison)
    tokens = stream(model, RAGGED, 10, stop_token_ids=())
    texts = [[] for _ in RAGGED]
    message = r"^generate: the logits of prompts\[2\] became NaN or infinite"
    with pytest.raises(FloatingPointError, match=message):  # noqa: PT012
        for index, token in tokens:
            texts[index].append(token)
    assert texts[2] == good


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"prompts\[1\] must be at least one token", {"prompts": [[1], []]}),
        (ValueError, r"prompts\[0\] must be token ids in \[0, 61\), got 61", {"prompts": [[61]]}),
        (ValueError, r"prompts\[0\] must be token ids .* got -1", {"prompts": [[-1]]}),
        (TypeError, r"prompts\[0\] must be a list of token ids, got str", {"prompts": ["text"]}),
        (TypeError, r"prompts\[0\] must be a list .* got \[1.5\]", {"prompts": [[1.5]]}),
        (TypeError, r"prompts\[0\] must be a list .* got \[True\]", {"prompts": [[True]]}),
        (TypeError, r"prompts\[0\] must be a list .* \[\[1, 2\]\]", {"prompts": [[[1, 2]]]}),
        (TypeError, r"prompts\[0\] must be .* got 1; wrap one prompt in a list: \[\[1, 2\]\]$",
         {"prompts": [1, 2]}),
        (TypeError, r"prompts\[0\] must be .* got 3; wrap one prompt in a list: \[prompt\]$",
         {"prompts": torch.tensor([3, 4])}),
        (TypeError, r"prompts\[0\] must be .* got torch.float32 \[1\]",
         {"prompts": [torch.ones(1)]}),
        (TypeError, r"prompts\[0\] must be .* got \[\[1\], \[2, 3\]\]",
         {"prompts": [[[1], [2, 3]]]}),
        (TypeError, r"prompts\[0\] must be a list",
         {"prompts": [None]}),
        (ValueError, rf"prompts\[0\] must be token ids in .* got {2**63}$",
         {"prompts": [[1, 2**63]]}),
        (ValueError, rf"prompts\[0\] must be token ids in .* got {2**70}$", {"prompts": [[2**70]]}),
        (TypeError, "prompts must be a list of lists of ids, got str", {"prompts": "text"}),
        (TypeError, "prompts must be a list of lists of ids, got int", {"prompts": 3}),
        (ValueError, "max_new_tokens must be at least 1, got 0", {"max_new_tokens": 0}),
        (TypeError, "max_new_tokens must be an integer, got '9'", {"max_new_tokens": "9"}),
        (ValueError, "n_pages must be at least 1, got 0", {"n_pages": 0}),
        (ValueError, r"n_pages must be at most \d+, which take the .* GiB free on cpu, got 10{30} ",
         {"n_pages": 10**30}),
        (ValueError, r"prompts\[0\] with its new tokens must be at most 512 .* got 2 \+ 10{30}",
         {"max_new_tokens": 10**30}),
        (TypeError, "max_new_tokens must be an integer, got nan", {"max_new_tokens": math.nan}),
        (ValueError, "temperature must be at least 0 and finite, got inf",
         {"temperature": 10**400}),
        (ValueError, "repetition_penalty must be over 0 and finite, got -inf",
         {"repetition_penalty": -10**400}),
        (TypeError, "'temprature' is no option; there is temperature$", {"temprature": 1}),
        (TypeError, "'sample' is no option; there is temperature, .*, on_warmup$", {"sample": 1}),
        (TypeError, r"prefill_chunk must be an integer, got 0\.5", {"prefill_chunk": 0.5}),
        (ValueError, "max_batch must be at least 1, got -1", {"max_batch": -1}),
        (ValueError, r"stop_token_ids must be token ids .* got 99", {"stop_token_ids": [99]}),
        (TypeError, "stop_token_ids must be a list of token ids", {"stop_token_ids": 5}),
        (ValueError, "temperature must be", {"temperature": -0.1}),
        (
            ValueError,
            r"prompts\[1\] with its new tokens must be at most 512 tokens \(the model's context\), "
            # 8 pages * 64 tokens * 2 * 40 layers * 2 heads * 128 * 4 bytes
            r"got 509 \+ 4, whose cache takes 0\.0391 GiB",
            {"prompts": [[1], [1] * 509]},
        ),
        (
            ValueError,
            r"prompts\[0\] with its new tokens must be within 1 pages of cache \(n_pages\), "
            r"got 64 \+ 4, whose cache takes 0\.00977 GiB",
            {"prompts": [[1] * 64], "n_pages": 1},
        ),
    ],
)  # fmt: skip
def test_rejects(model, error, message, change):
    arguments = {"prompts": [[1, 2]], "max_new_tokens": 4} | change
    with pytest.raises(error, match=f"^generate: {message}"):
        generate(model, **arguments)
    if "is no option" not in message:
        with pytest.raises(error, match=f"^generate: {message}"):
            stream(model, **arguments)  # at the call, not at the first token
    assert model.caches == [] and model.passes == []


def test_every_option_is_listed():
    options = list(inspect.signature(stream).parameters)[3:]
    assert list(generation.Options.__annotations__) == options


def test_what_a_greedy_text_ignores_is_told(model):
    with pytest.warns(UserWarning, match="^generate: top_k and top_p do nothing at temperature 0"):
        assert generate(model, RAGGED, 5, top_p=0.5) == generate(model, RAGGED, 5)
    with pytest.warns(UserWarning, match="^generate: top_k and top_p"):
        stream(model, RAGGED, 5, top_k=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, RAGGED, 5, seed=1)  # repeatable as it is
        generate(model, RAGGED, 5, temperature=1.0, top_k=2**70, top_p=0.5, seed=10**400)


def test_a_cache_over_free_memory_is_refused(model, monkeypatch):
    page = 2 * 40 * 2 * 128 * 4 * PAGE_SIZE
    monkeypatch.setattr(generation, "free_bytes", lambda device: int(2.5 * page))
    with pytest.raises(ValueError, match=r"within the 0\.00977 GiB that a cache may take on cpu"):
        generate(model, make_prompts([1, 128]), 2)
    short = make_prompts([1, 60, 128, 70])
    assert generate(model, short, 1) == [model.expected(prompt, 1) for prompt in short]
    assert model.caches == [2], "queues in what there is"


def test_free_memory_is_that_of_this_machine():
    total = int(re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())[1]) << 10
    assert 0 < generation.free_bytes(torch.device("cpu")) <= total


@pytest.fixture(scope="module")
def real_model():
    """fp32, with logits far enough apart for a text that does not repeat itself."""
    config = Config(
        layers=2, hidden=64, ffn=96, heads=6, kv_heads=2, vocab=101, eps=1e-5, theta=1e4,
        max_positions=256, qkv_bias=True, sandwich=True, head_dim=64, rotary_dim=32,
        eos_token_ids=(100,),
    )  # fmt: skip
    return Model.random(config, dtype=torch.float32, prepare=lambda name, weight: weight * 8)


def test_real_model_ragged_is_single_and_agrees_with_its_logits(real_model):
    numbers = random.Random(2)
    prompts = [[numbers.randrange(100) for _ in range(length)] for length in (1, 64, 3, 90, 65)]
    together = real_model.generate(prompts, 24, stop_token_ids=(), prefill_chunk=40)
    assert len({token for text in together for token in text}) > 20
    assert real_model.generate(prompts, 24, stop_token_ids=(), n_pages=3) == together
    for prompt, text in zip(prompts, together, strict=True):
        assert real_model.generate([prompt], 24, stop_token_ids=()) == [text]
        logits = real_model.logits(torch.tensor([prompt + text]))[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == text
