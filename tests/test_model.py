"""The model's own parts: sizes, prefill attention, and passes that must agree with each other."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from numerics import assert_within_rule
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

import glm4
import glm4.attention
import glm4.model
from benchmarks.shapes import SHAPES
from glm4 import PRESETS, Config, Model
from glm4.attention import Chunk, gather, partial_attention, prefill_attention
from glm4.cache import PAGE_SIZE, Step
from glm4.quantization_policy import preparer

SMALL = Config(
    layers=2,
    hidden=64,
    ffn=96,
    heads=6,
    kv_heads=2,
    vocab=320,
    eps=1e-5,
    theta=1e4,
    max_positions=512,
    qkv_bias=True,
    sandwich=True,
    head_dim=64,
    rotary_dim=32,
    eos_token_ids=(),
)


@pytest.fixture(scope="module")
def model(device):
    model = Model.random(SMALL, device, torch.float32)
    for name in ("qkv", "o"):
        for block in model.blocks:  # attention that matters: scores of some size
            getattr(block.attention, name).mul_(15)
    return model


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("glm-4-9b-chat", 9_399_951_360),
        ("glm-4-9b-chat-1m", 9_483_857_920),
        ("glm-4-9b-0414", 9_400_279_040),
        ("glm-4-32b-0414", 32_566_081_536),  # published: 32.566 B
        ("glm-z1-rumination-32b-0414", 33_141_749_760),  # published: 33.142 B
    ],
)
def test_presets_have_the_published_size(name, parameters):
    assert PRESETS[name].parameters == parameters


def test_presets_are_the_benchmarks_shapes():
    for name, shape in SHAPES.items():
        config = PRESETS[name]
        for field in dataclasses.fields(shape):
            assert getattr(config, field.name) == getattr(shape, field.name), (name, field.name)


def test_a_tied_head_counts_once():
    tied = dataclasses.replace(SMALL, tied=True)
    assert SMALL.parameters - tied.parameters == SMALL.vocab * SMALL.hidden


@pytest.mark.parametrize("preset", PRESETS)
def test_fp16_is_refused_for_every_preset(preset):
    with pytest.raises(ValueError, match=r"bfloat16 or float32, got float16: .* overflow"):
        Model.random(PRESETS[preset], "meta", torch.float16)


def formula(q, k, v, scale, causal):
    """fp64: q [1, H, Q, D], k and v [1, G, N, D] -> out [Q, H, D], lse [Q, H]."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * scale
    if causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v)[0].transpose(0, 1), scores.logsumexp(-1)[0].T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "n_heads, n_kv_heads, n_queries, n_keys, head_dim",
    [
        (16, 1, 70, 70, 128),  # group 16, causal
        (48, 2, 33, 33, 64),  # group 24, causal
        (6, 2, 5, 130, 64),  # group 3, over a prefix
        (2, 2, 1, 1, 128),  # the smallest
        (4, 2, 1024, 1024, 128),  # lengths that cuDNN gets, causal
        (4, 2, 1024, 2048, 64),  # and over a prefix
    ],
)
def test_partial_attention(n_heads, n_kv_heads, n_queries, n_keys, head_dim, dtype, device):
    q = torch.randn(1, n_heads, n_queries, head_dim, device=device, dtype=dtype)
    k, v = torch.randn(2, 1, n_kv_heads, n_keys, head_dim, device=device, dtype=dtype)
    scale, causal = head_dim**-0.5, n_queries == n_keys
    out, lse = partial_attention(q, k, v, scale, causal)
    assert out.dtype == dtype and lse.dtype == torch.float32
    expected_out, expected_lse = formula(q, k, v, scale, causal)
    # The library rounds p and out to the dtype; scores and their sum stay in fp32.
    eps = torch.finfo(dtype).eps
    assert (out.cpu() - expected_out).abs().max() <= 4 * eps * v.abs().max().cpu()
    torch.testing.assert_close(lse.double().cpu(), expected_lse, rtol=1e-5, atol=1e-4)


class Pass:
    """Feeds sequences through a model by hand, over pages in shuffled order."""

    def __init__(self, model, n_sequences, max_pages=4):
        n_pages = n_sequences * max_pages + 3
        self.model, self.cache = model, model.new_cache(n_pages)
        order = torch.randperm(n_pages)[: n_sequences * max_pages]
        self.table = order.view(n_sequences, max_pages).int().to(model.device)
        self.lengths = [0] * n_sequences

    def __call__(self, sequences, decode=False):
        """Logits of the next tokens of each sequence, one tensor [n, vocab] a sequence."""
        device, positions, slots, spans = self.model.device, [], [], []
        for i, tokens in enumerate(sequences):
            own = torch.arange(self.lengths[i], self.lengths[i] + len(tokens), device=device)
            slots.append(self.table[i, own // PAGE_SIZE].long() * PAGE_SIZE + own % PAGE_SIZE)
            positions.append(own)
            spans.append((self.lengths[i], self.lengths[i] + len(tokens)))
            self.lengths[i] += len(tokens)
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        step = Step(
            tokens=torch.cat(sequences).to(device),
            positions=torch.cat(positions),
            slots=torch.cat(slots),
            block_table=self.table,
            **({"seq_lens": lengths} if decode else {"spans": tuple(spans)}),
        )
        rows = self.model.head(self.model.forward(step, self.cache))
        return rows.split([len(tokens) for tokens in sequences])


# fp32 sums in another order, over two layers.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Names(TorchDispatchMode):
    """The operations that run in it."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n_rows, n_keys", [(2048, 4096), (70, 4096)], ids=["cudnn", "flash"])
@pytest.mark.parametrize("backend", ["CUDNN_ATTENTION", "FLASH_ATTENTION", "MATH"])
def test_partial_attention_of_a_gpu_has_these_shapes(n_rows, n_keys, backend, monkeypatch):
    """On tensors without data: the ops that a GPU runs, with fewer KV heads than heads."""
    monkeypatch.setattr(
        torch, "_fused_sdp_choice", lambda *_, **__: getattr(SDPBackend, backend).value
    )
    dtype = torch.float32 if backend == "MATH" else torch.bfloat16
    q = torch.empty(n_rows, 32, 128, device="meta", dtype=dtype).transpose(0, 1)[None]
    kv = torch.empty(1, 2, n_keys + 3, 128, device="meta", dtype=dtype)[:, :, 3:]
    with Names() as names:
        out, lse = partial_attention(q, kv, kv, 0.1, causal=False)
    assert out.shape == (n_rows, 32, 128) and out.dtype == dtype
    assert lse.shape == (n_rows, 32) and lse.dtype == torch.float32
    names = {name.removeprefix("aten::_scaled_dot_product_") for name in names.seen}
    expanded = any("repeat_interleave" in name or "expand" in name for name in names)
    if backend == "MATH":
        assert "efficient_attention" in names and expanded
    else:
        by_cudnn = backend == "CUDNN_ATTENTION" and n_rows == 2048
        assert ("cudnn_attention" if by_cudnn else "flash_attention") in names and not expanded


@pytest.fixture(params=[True, False], ids=["decode_kernel", "library"])
def prefill_by(request, monkeypatch, device):
    """The two ways of prefill attention; a GPU has one."""
    if request.param and (device.type != "cpu" or not glm4.attention.HAS_EXTENSION):
        pytest.skip("on a CPU with the extension")
    monkeypatch.setattr(glm4.attention, "HAS_EXTENSION", request.param)


@pytest.mark.usefixtures("prefill_by")
@pytest.mark.parametrize("segment", [PAGE_SIZE, 2 * PAGE_SIZE, 8192])
@pytest.mark.parametrize("seed", range(6))
def test_chunks_of_any_lengths_are_one_pass(segment, seed, model, monkeypatch):
    """Ragged sequences, each cut anywhere: a pass takes some rows of one, none of another."""
    monkeypatch.setattr(glm4.attention, "SEGMENT", segment)
    numbers = random.Random(seed)
    # Edges of a page, of a segment, of what the decode kernel takes at a time.
    edges = (1, 63, 64, 65, 127, 128, 129, 250)
    lengths = [numbers.choice(edges) for _ in range(2)] + [numbers.randint(1, 256)]
    sequences = [torch.randint(0, 320, (length,)) for length in lengths]
    expected = Pass(model, 3)(sequences)
    run, left, chunks = Pass(model, 3), sequences, [[], [], []]
    while any(map(len, left)):
        cuts = [min(len(t), numbers.choice((0, 1, 7, 50, 64, 100, 300))) for t in left]
        if sum(cuts) == 0:
            continue
        for i, logits in enumerate(run([t[:cut] for t, cut in zip(left, cuts, strict=True)])):
            chunks[i].append(logits)
        left = [tokens[cut:] for tokens, cut in zip(left, cuts, strict=True)]
    for actual, whole in zip(chunks, expected, strict=True):
        torch.testing.assert_close(torch.cat(actual), whole, **CLOSE)


def test_decode_is_prefill(model):
    # The first decode step of the second sequence opens its second page, the third starts empty.
    sequences = [torch.randint(0, 320, (length,)) for length in (90, 80, 16)]
    expected = Pass(model, 3)(sequences)
    run = Pass(model, 3)
    run([tokens[:-16] for tokens in sequences])
    for t in range(-16, 0):
        rows = run([tokens[t:][:1] for tokens in sequences], decode=True)
        for actual, whole in zip(rows, expected, strict=True):
            torch.testing.assert_close(actual[0], whole[t], **CLOSE)


@pytest.mark.usefixtures("prefill_by")
@pytest.mark.parametrize(
    "segment, at_once",
    [(1 << 16, 1 << 15), (PAGE_SIZE, 400)],
    ids=["one part", "several parts"],
)
def test_prefill_in_parts_rounds_as_the_whole(device, monkeypatch, segment, at_once):
    """In bf16 the parts and their merges are as good as the library's attention over the whole."""
    monkeypatch.setattr(glm4.attention, "SEGMENT", segment)
    monkeypatch.setattr(glm4.attention, "BLOCKS_TIMES_KEYS", at_once)
    k_cache, v_cache = torch.randn(2, 4, 2, PAGE_SIZE, 64, device=device).bfloat16()
    q = torch.randn(100, 6, 64, device=device).bfloat16()
    pages = torch.arange(4, dtype=torch.int32, device=device)
    chunk = Chunk(slice(0, 100), pages, 100, 200)
    merged = prefill_attention(q, k_cache, v_cache, [chunk], 0.125)

    # As the last 100 of 200 rows of a sequence without a prefix.
    k, v = gather(k_cache, pages, 0, 200), gather(v_cache, pages, 0, 200)
    rows = torch.cat((torch.zeros_like(q), q)).transpose(0, 1)[None]
    whole, truth = (
        torch.nn.functional.scaled_dot_product_attention(
            *(x.to(dtype) for x in (rows, k, v)), is_causal=True, scale=0.125, enable_gqa=True
        )[0].transpose(0, 1)[100:]
        for dtype in (torch.bfloat16, torch.float64)
    )
    assert_within_rule(merged, whole, truth)


def test_logits_in_parts_are_the_whole(model, monkeypatch):
    tokens = torch.randint(0, 320, (3, 140))
    whole = model.logits(tokens)
    assert whole.shape == (3, 140, 320) and whole.dtype == torch.float32
    monkeypatch.setattr(glm4.model, "LOGITS_ROWS", 100)
    torch.testing.assert_close(model.logits(tokens), whole, **CLOSE)
    assert model.logits(tokens[:, :0]).shape == (3, 0, 320)


def test_logits_are_causal(model):
    tokens = torch.randint(0, 319, (1, 100))
    changed = tokens.clone()
    changed[0, 60] += 1
    same = (model.logits(tokens) == model.logits(changed)).all(-1)[0]
    assert same[:60].all() and not same[60:].any()


@pytest.mark.parametrize(
    "tokens, message",
    [
        (torch.zeros(5).long(), r"int64 \[B, T\], got torch.int64 \[5\]"),
        (torch.zeros(1, 5), r"int64 \[B, T\], got torch.float32"),
        (torch.zeros(1, 513).long(), r"\[B, at most 512\], got 513"),
        (torch.tensor([[0, 320]]), "from 0 to 319, got 0 to 320"),
        (torch.tensor([[-1, 3]]), "from 0 to 319, got -1 to 3"),
    ],
)
def test_logits_rejects(tokens, message, model):
    with pytest.raises(ValueError, match=f"^logits: token_ids must be {message}"):
        model.logits(tokens)


@pytest.mark.parametrize("tokens", [[[1, 2]], None, 3])
def test_logits_takes_tensors(tokens, model):
    kind = type(tokens).__name__
    message = rf"^logits: token_ids must be an int64 tensor \[B, T\], got {kind}; make one by torch"
    with pytest.raises(TypeError, match=message):
        model.logits(tokens)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the system does not say")
@pytest.mark.parametrize("n_pages", [10**9, 10**30])
def test_a_cache_past_memory_is_refused(model, n_pages):
    message = rf"^a cache of {n_pages} pages takes .* GiB, and .* GiB are free on"
    with pytest.raises(MemoryError, match=message):
        model.new_cache(n_pages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_rope(dtype, device):
    made = random_weights(device, dtype)
    exact, reference = (Model(SMALL, made, device, dtype, m) for m in ("exact", "reference"))
    assert exact.blocks[0].attention.rope.dtype == torch.float32
    assert reference.blocks[0].attention.rope.dtype == dtype
    tokens = torch.randint(0, 320, (1, 100))
    difference = (exact.logits(tokens) - reference.logits(tokens)).norm()
    # Near the start both are right, to the rounding of cosines, which these weights amplify.
    assert 0 < difference < 100 * torch.finfo(dtype).eps * reference.logits(tokens).norm()


def random_weights(device, dtype=torch.bfloat16):
    generator = torch.Generator(device).manual_seed(0)
    shapes = SMALL.shapes.items()
    return {k: torch.randn(v, generator=generator, device=device).to(dtype) for k, v in shapes}


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_random_model(quantize, device):
    a, b = (
        Model.random(SMALL, device, seed=3, prepare=preparer(quantize)).logits(torch.tensor([[7]]))
        for _ in range(2)
    )
    assert torch.equal(a, b) and torch.isfinite(a).all() and a.std() > 0
    other = Model.random(SMALL, device, seed=4, prepare=preparer(quantize))
    assert not torch.equal(other.logits(torch.tensor([[7]])), a)


def test_weights_may_carry_gradients(device):
    made = {name: torch.nn.Parameter(weight) for name, weight in random_weights(device).items()}
    model = Model(SMALL, made, device, torch.bfloat16)
    assert not model.logits(torch.tensor([[1, 2]])).requires_grad
