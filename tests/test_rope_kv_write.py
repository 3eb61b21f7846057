from __future__ import annotations

import pytest
import torch
from kernels import DTYPES, each_cpu_kernel, each_kernel, each_kernel_and_dtype
from numerics import KERNEL_DTYPES, assert_bitwise_equal

import glm4_kernels as gk
from glm4_kernels.library import raise_device_errors
from glm4_kernels.rope_kv_write import (
    QUANTISED_LIMIT,
    launch_rope_kv_write,
    rope_kv_write_cpu,
    rope_kv_write_reference,
)

MAX_POSITIONS = 40
N_PAGES = 4
INT8, FP8 = torch.int8, torch.float8_e4m3fn
# T, H, G, page_size, D, rotary_dim
SHAPES = [
    (1, 32, 2, 64, 128, 64),  # one token of GLM-4-9B
    (5, 6, 1, 4, 64, 64),  # every dim turns; several tokens in a page
    (3, 3, 3, 1, 96, 32),  # D not a power of two, as many KV heads as heads, pages of one token
]


class Problem:
    """The op's arguments, with caches full of a sentinel so that every write shows."""

    def __init__(self, shape, dtype, device, cache_dtype=None, table_dtype=None, bias=True):
        n_tokens, n_heads, n_kv_heads, page_size, head_dim, rotary_dim = shape
        width = (n_heads + 2 * n_kv_heads) * head_dim
        cache_dtype = cache_dtype or dtype
        pages = (N_PAGES, n_kv_heads, page_size)
        self.arguments = {
            "qkv": torch.randn(n_tokens, width).to(dtype),
            "positions": torch.randint(MAX_POSITIONS, (n_tokens,)),
            "table": gk.rope_table(MAX_POSITIONS, 1e2, rotary_dim, dtype=table_dtype or dtype),
            "k_cache": torch.full((*pages, head_dim), 77.0).to(cache_dtype),
            "v_cache": torch.full((*pages, head_dim), 78.0).to(cache_dtype),
            "slots": torch.randperm(N_PAGES * page_size)[:n_tokens],
            "n_heads": n_heads,
        }
        if bias:
            self.arguments["bias"] = torch.randn(width).to(dtype)
        if cache_dtype in QUANTISED_LIMIT:
            self.arguments["k_scale"] = torch.full(pages, 7.0)
            self.arguments["v_scale"] = torch.full(pages, 8.0)
        for name, value in self.arguments.items():
            if isinstance(value, torch.Tensor):
                self.arguments[name] = value.to(device)

    def __getitem__(self, name):
        return self.arguments[name]

    def run(self, implementation):
        """q and the written tensors, on copies of the caches that keep their strides."""
        arguments = dict(self.arguments)
        for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
            if name in arguments:
                arguments[name] = copy_of(arguments[name])
        q = implementation(**arguments)
        return {"q": q} | {
            name: arguments[name]
            for name in ("k_cache", "v_cache", "k_scale", "v_scale")
            if name in arguments
        }


def copy_of(x):
    """A copy with x's strides, offset and whole buffer, so that a stray write would show."""
    whole = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    copy = whole.clone()
    return copy.as_strided(x.shape, x.stride(), x.storage_offset())


def buffer(x):
    """All memory behind x, seen as bytes."""
    return torch.as_strided(
        x.view(torch.uint8) if x.dtype == FP8 else x,
        (x.untyped_storage().nbytes() // x.element_size(),),
        (1,),
        0,
    )


def check(kernel, problem):
    """Bit for bit, in every byte of the buffers that the caches are views of."""
    actual, expected = problem.run(kernel), problem.run(rope_kv_write_reference)
    assert actual["q"].is_contiguous()
    for name in expected:
        assert_bitwise_equal(buffer(actual[name]), buffer(expected[name]))
    return actual


@each_kernel_and_dtype(launch_rope_kv_write, rope_kv_write_cpu)
@pytest.mark.parametrize("cache", ["float", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, cache, kernel, dtype):
    check(
        kernel, Problem(shape, dtype, kernel.device, cache_dtype=INT8 if cache == "int8" else dtype)
    )


@each_kernel_and_dtype(launch_rope_kv_write, rope_kv_write_cpu)
def test_without_bias_and_with_a_float32_table(kernel, dtype):
    shape = (3, 5, 2, 4, 32, 16)
    check(kernel, Problem(shape, dtype, kernel.device, bias=False))
    check(kernel, Problem(shape, dtype, kernel.device, table_dtype=torch.float32))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_fp8_cache_matches_reference(dtype, device):
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("float8_e4m3fn needs sm_89")
    for shape in SHAPES:
        check(launch_rope_kv_write, Problem(shape, dtype, device, cache_dtype=FP8))


@each_cpu_kernel(rope_kv_write_cpu)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_cache_on_the_cpu(kernel, dtype):
    for shape in SHAPES:
        check(kernel, Problem(shape, dtype, "cpu", cache_dtype=FP8))


@each_cpu_kernel(rope_kv_write_cpu)
@pytest.mark.parametrize("cache_dtype", [INT8, FP8], ids=str)
def test_quantises_every_magnitude(kernel, cache_dtype):
    """Each code, its neighbours and the halves between two codes; then what is not finite."""
    problem = Problem((256, 1, 1, 64, 32, 2), torch.float32, "cpu", cache_dtype, bias=False)
    limit = QUANTISED_LIMIT[cache_dtype]
    codes = torch.arange(256, dtype=torch.uint8).view(cache_dtype).float()
    codes = codes[codes.isfinite() & (codes.abs() <= limit)].sort().values
    values = torch.cat((codes, (codes[1:] + codes[:-1]) / 2))
    values = torch.cat([values, *(values.nextafter(values + side) for side in (-1e9, 1e9))])
    values = values.clamp(-limit, limit)
    v = problem["qkv"][:, -32:]
    v[:, 0] = limit  # scale 1: values are codes
    assert len(values) <= 254 * 31
    v[:254, 1:] = values.repeat(8)[: 254 * 31].view(254, 31)
    v[254, 3], v[255, 5] = torch.inf, torch.nan
    check(kernel, problem)


def test_reference_is_transformers():
    """q, k and v as GlmAttention hands them to attention; the bias inside the linear, as there."""
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb

    problem = Problem((9, 6, 2, 4, 128, 64), torch.bfloat16, "cpu", bias=False)
    weight = torch.randn(problem["qkv"].shape[1], 48).bfloat16()
    hidden, bias = torch.randn(9, 48).bfloat16(), torch.randn(weight.shape[0]).bfloat16()
    problem.arguments["qkv"] = torch.nn.functional.linear(hidden, weight, bias)
    written = problem.run(gk.rope_kv_write)

    rows = (slice(0, 6 * 128), slice(6 * 128, 8 * 128), slice(8 * 128, None))
    q, k, v = (
        torch.nn.functional.linear(hidden, weight[row], bias[row]).view(9, -1, 128) for row in rows
    )
    cos, sin = (half.repeat(1, 2) for half in problem["table"][problem["positions"]].chunk(2, -1))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    page, offset = problem["slots"] // 4, problem["slots"] % 4
    assert_bitwise_equal(written["q"], q)
    assert_bitwise_equal(written["k_cache"][page, :, offset], k)
    assert_bitwise_equal(written["v_cache"][page, :, offset], v)


def test_reference_is_close_to_fp64():
    problem = Problem((9, 6, 2, 4, 128, 64), torch.float16, "cpu")
    written = problem.run(gk.rope_kv_write)
    for name in ("qkv", "bias", "table", "k_cache", "v_cache"):
        problem.arguments[name] = problem[name].double()
    oracle = problem.run(rope_kv_write_reference)
    for name, truth in oracle.items():
        error = (written[name].double() - truth).norm() / truth.norm()
        assert 0 < error < 2**-10, f"{name}: three roundings to fp16 cost less than an eps"


@each_kernel_and_dtype(launch_rope_kv_write, rope_kv_write_cpu)
def test_touches_nothing_but_its_slots(kernel, dtype):
    problem = Problem((3, 4, 2, 4, 32, 16), dtype, kernel.device, cache_dtype=INT8)
    slots = torch.tensor([6, -1, 15], device=kernel.device)
    problem.arguments["slots"] = slots
    written = check(kernel, problem)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        changed = (
            (written[name] != problem[name]).flatten(3).any(-1)
            if "cache" in name
            else (written[name] != problem[name])
        )
        expected = torch.zeros(N_PAGES, 2, 4, dtype=torch.bool, device=kernel.device)
        expected[1, :, 2] = expected[3, :, 3] = True
        assert_bitwise_equal(changed, expected)
    assert written["q"].isfinite().all(), "a skipped token still gets its q"


@pytest.mark.parametrize("layout", ["pages", "paired", "tokens first", "padded", "qkv"])
@each_kernel(launch_rope_kv_write, rope_kv_write_cpu)
def test_layouts(layout, kernel):
    problem = Problem((3, 4, 2, 4, 32, 16), torch.float16, kernel.device, cache_dtype=INT8)
    arguments = problem.arguments
    shape = arguments["k_cache"].shape
    like = {"dtype": INT8, "device": kernel.device}
    if layout == "pages":  # some pages of a larger pool
        pool = torch.full((2, 9, *shape[1:]), 55, **like)
        arguments["k_cache"], arguments["v_cache"] = pool[0, 2:6], pool[1, 5:9]
        pool = torch.full((2, 9, *shape[1:3]), 9.0, device=kernel.device)
        arguments["k_scale"], arguments["v_scale"] = pool[0, 2:6], pool[1, 5:9]
    elif layout == "paired":  # K and V of a page side by side
        pool = torch.full((N_PAGES, 2, *shape[1:]), 55, **like)
        arguments["k_cache"], arguments["v_cache"] = pool.unbind(1)
        pool = torch.full((N_PAGES, 2, *shape[1:3]), 9.0, device=kernel.device)
        arguments["k_scale"], arguments["v_scale"] = pool.unbind(1)
    elif layout == "tokens first":  # NHD in memory
        for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
            arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "padded":  # rows of a wider buffer
        for name in ("k_cache", "v_cache"):
            arguments[name] = torch.full((*shape[:3], 48), 55, **like)[..., 3:35]
    else:
        for name in ("bias", "positions", "slots"):
            arguments[name] = arguments[name].repeat_interleave(2)[::2]
        arguments["table"] = arguments["table"].t().contiguous().t()
        for qkv in (arguments["qkv"].t().contiguous().t(), arguments["qkv"][:1].expand(3, -1)):
            arguments["qkv"] = qkv
            check(kernel, problem)
        arguments["qkv"] = torch.cat((qkv, qkv), 1)[:, : qkv.shape[1]]
        arguments["positions"], arguments["slots"] = (
            arguments["positions"].int(),
            arguments["slots"].int(),
        )
    check(kernel, problem)


def test_large_head_blocks(monkeypatch, device):
    """A small GPU (or a long prompt on a large one) gets sixteen heads a program."""
    monkeypatch.setitem(launch_rope_kv_write.__globals__, "multiprocessor_count", lambda _: 1)
    problem = Problem((3, 17, 9, 4, 16, 8), torch.float16, device, cache_dtype=INT8)
    check(launch_rope_kv_write, problem)


@each_kernel(launch_rope_kv_write, rope_kv_write_cpu)
def test_edges(kernel):
    empty = Problem((0, 4, 2, 4, 32, 16), torch.float16, kernel.device)
    assert check(kernel, empty)["q"].shape == (0, 4, 32)
    limits = Problem((2, 4, 2, 4, 32, 16), torch.float16, kernel.device)
    limits.arguments["slots"] = torch.tensor([0, N_PAGES * 4 - 1], device=kernel.device)
    limits.arguments["positions"] = torch.tensor([MAX_POSITIONS - 1, 0], device=kernel.device)
    check(kernel, limits)
    limits.arguments["slots"] = torch.tensor([-1, -1], device=kernel.device)
    written = check(kernel, limits)
    assert_bitwise_equal(written["k_cache"], limits["k_cache"])


@each_kernel(launch_rope_kv_write, rope_kv_write_cpu)
def test_int8_rounds_half_to_even(kernel):
    """Rows of v whose scale is 1, 0, underflows to 0, and is rounded down to the least value."""
    least = 2.0**-149
    problem = Problem(
        (4, 1, 1, 4, 16, 2), torch.float32, kernel.device, cache_dtype=INT8, bias=False
    )
    v = torch.zeros(4, 16)
    v[0, :8] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5])
    v[2, :2] = torch.tensor([60 * least, -40 * least])
    v[3, :2] = torch.tensor([190 * least, -40 * least])  # 190 / 127 rounds to 1: 190 must not wrap
    problem["qkv"][:, 32:] = v.to(kernel.device)
    problem.arguments["slots"] = torch.arange(4, device=kernel.device)
    written = check(kernel, problem)
    expected = torch.zeros(4, 16, dtype=INT8)
    expected[0, :8] = torch.tensor([127, 0, 2, 2, 0, -2, -126, 126], dtype=INT8)
    expected[3, :2] = torch.tensor([127, -40], dtype=INT8)
    assert_bitwise_equal(written["v_cache"][0, 0], expected.to(kernel.device))
    scale = torch.tensor([1.0, 0.0, 0.0, least], device=kernel.device)
    assert_bitwise_equal(written["v_scale"][0, 0], scale)


@pytest.mark.parametrize("cache_dtype, error", [(INT8, 0.5 / 127), (FP8, 2.0**-4)], ids=str)
def test_quantisation_error(cache_dtype, error):
    """Half a step of the grid: of 127 equal steps to amax, or of 3 mantissa bits at each value."""
    exact = Problem((8, 2, 2, 4, 128, 64), torch.float32, "cpu")
    coarse = Problem((8, 2, 2, 4, 128, 64), torch.float32, "cpu", cache_dtype=cache_dtype)
    for name in ("qkv", "positions", "slots", "bias"):
        coarse.arguments[name] = exact[name]
    exact, slots = exact.run(gk.rope_kv_write), coarse["slots"]
    written = coarse.run(gk.rope_kv_write)
    for name in ("k", "v"):
        rows = (slots // 4, slice(None), slots % 4)
        truth = exact[f"{name}_cache"][rows]
        scale = written[f"{name}_scale"][rows][..., None]
        amax = truth.abs().amax(-1, keepdim=True)
        restored = written[f"{name}_cache"][rows].float() * scale
        step = amax if cache_dtype == INT8 else truth.abs() + amax * 2.0**-9 / 448 / error
        assert ((restored - truth).abs() <= error * step * (1 + 1e-5)).all()
        torch.testing.assert_close(scale, amax / QUANTISED_LIMIT[cache_dtype])


@pytest.mark.parametrize(
    "argument, value",
    [("positions", -1), ("positions", MAX_POSITIONS), ("slots", -2), ("slots", N_PAGES * 4)],
)
def test_masks_a_bad_index(argument, value, device):
    problem = Problem((3, 4, 2, 4, 32, 16), torch.float16, device, cache_dtype=INT8)
    good = problem.run(rope_kv_write_reference)
    skipped = problem["slots"].clone()
    skipped[1] = -1
    arguments = problem.arguments
    arguments["slots"], slots = skipped, arguments["slots"].clone()
    expected = problem.run(rope_kv_write_reference)
    arguments["slots"] = slots
    arguments[argument][1] = value
    if argument == "positions":
        expected["q"][1] = 0.0
    else:
        assert_bitwise_equal(expected["q"], good["q"])

    raise_device_errors(device)
    written = problem.run(launch_rope_kv_write)
    for name in expected:
        assert_bitwise_equal(written[name], expected[name])
    with pytest.raises(IndexError, match=r"^rope_kv_write: a position, slot"):
        raise_device_errors(device)


@pytest.mark.parametrize("dtype", [torch.float32, INT8])
@pytest.mark.parametrize("dim", range(4))
def test_views_of_one_buffer(dim, dtype):
    """K and V in turn: all of them, or those of each page, head or token."""
    pages, scales = [3, 2, 4, 32], [3, 2, 4]
    pages.insert(dim, 2), scales.insert(dim, 2)
    given = {"qkv": torch.randn(3, 256), "positions": torch.arange(3), "n_heads": 4}
    given |= {"table": torch.ones(9, 16), "slots": torch.tensor([0, 7, 9])}
    pairs = {"k_cache, v_cache": torch.zeros(pages, dtype=dtype)}
    if dtype == INT8:
        pairs["k_scale, v_scale"] = torch.zeros(scales)
    views = {
        name: both.select(dim, i)
        for names, both in pairs.items()
        for i, name in enumerate(names.split(", "))
    }
    alone = {name: view.clone() for name, view in views.items()}
    assert_bitwise_equal(gk.rope_kv_write(**given, **views), gk.rope_kv_write(**given, **alone))
    for name, view in views.items():
        assert_bitwise_equal(view, alone[name])


CACHE, SCALE = torch.ones(2, 2, 4, 32), torch.ones(2, 2, 4)
THREE, WIDE = torch.ones(3, 2, 4, 32), torch.ones(2, 2, 4, 64)


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"qkv must be \[T, \(H \+ 2G\) \* D\]", {"qkv": torch.ones(3, 8, 32)}),
        (ValueError, r"qkv must be \[T, \(4 \+ 2 \* 2\) \* 32\]", {"qkv": torch.ones(3, 255)}),
        (TypeError, r"qkv must be float32, bfloat16", {"qkv": torch.ones(3, 256).long()}),
        (RuntimeError, r"qkv requires grad", {"qkv": torch.ones(3, 256).requires_grad_()}),
        (ValueError, r"n_heads must be at least 1, got 0", {"n_heads": 0}),
        (ValueError, r"positions must be \[3\], got \[2\]", {"positions": torch.arange(2)}),
        (TypeError, r"positions must be int32 or int64", {"positions": torch.ones(3)}),
        (ValueError, r"positions must be in \[0, 9\), got 9", {"positions": torch.arange(7, 10)}),
        (ValueError, r"positions must be on cpu", {"positions": torch.arange(3, device="meta")}),
        (ValueError, r"table must be \[max_pos", {"table": torch.ones(9, 33)}),
        (TypeError, r"table must be torch.float32", {"table": torch.ones(9, 16).half()}),
        (ValueError, r"k_cache must be \[n_pages, G", {"k_cache": torch.ones(2, 4, 32)}),
        (ValueError, r"k_cache must be of a page_size", {"k_cache": torch.ones(2, 2, 3, 32)}),
        (ValueError, r"k_cache must be of at least one", {"k_cache": torch.ones(2, 0, 4, 32)}),
        (
            ValueError,
            r"k_cache must be of head size D a multiple of 16",
            {"qkv": torch.ones(3, 192), "k_cache": torch.ones(2, 2, 4, 24)},
        ),
        (TypeError, r"k_cache must be torch.float32, int8", {"k_cache": CACHE.half()}),
        (ValueError, r"k_cache must be on cpu", {"k_cache": CACHE.to("meta")}),
        (ValueError, r"v_cache must be \[2, 2, 4, 32\]", {"v_cache": torch.ones(3, 2, 4, 32)}),
        (TypeError, r"v_cache must be torch.float32", {"v_cache": CACHE.half()}),
        (
            ValueError,
            r"v_cache must be of strides .*, those of K",
            {"v_cache": CACHE.mT.contiguous().mT},
        ),
        (ValueError, r"v_cache must be on cpu", {"v_cache": CACHE.to("meta")}),
        (
            ValueError,
            r"k_cache must be without overlap",
            {"k_cache": CACHE[:1].expand(2, 2, 4, 32)},
        ),
        (
            ValueError,
            r"k_cache must be contiguous over D",
            dict.fromkeys(("k_cache", "v_cache"), CACHE.mT.contiguous().mT),
        ),
        (ValueError, r"slots must be \[3\], got \[4\]", {"slots": torch.arange(4)}),
        (TypeError, r"slots must be int32 or int64", {"slots": torch.ones(3)}),
        (ValueError, r"slots must be in \[-1, 8\), got 8", {"slots": torch.arange(6, 9)}),
        (ValueError, r"slots must be in \[-1, 8\), got -2", {"slots": torch.arange(-2, 1)}),
        (ValueError, r"slots must be on cpu", {"slots": torch.arange(3, device="meta")}),
        (ValueError, r"bias must be \[256\], got \[128\]", {"bias": torch.ones(128)}),
        (TypeError, r"bias must be torch.float32", {"bias": torch.ones(256).half()}),
        (ValueError, r"bias must be on cpu", {"bias": torch.ones(256, device="meta")}),
        (
            ValueError,
            r"k_scale must be None with a cache of torch.float32, got a tensor",
            {"k_scale": SCALE},
        ),
        (
            ValueError,
            r"v_cache must be apart from k_cache in memory, got a tensor that overlaps it",
            {"k_cache": CACHE, "v_cache": CACHE},
        ),
        (
            ValueError,
            r"v_cache must be apart from k_cache",
            {"k_cache": THREE[:2], "v_cache": THREE[1:]},
        ),
        (
            ValueError,
            r"v_cache must be apart from k_cache",
            {"k_cache": WIDE[..., :32], "v_cache": WIDE[..., 31:63]},
        ),
    ],
)
def test_rejects(error, message, change):
    arguments = {"qkv": torch.ones(3, 256), "positions": torch.arange(3), "n_heads": 4}
    arguments |= {"table": torch.ones(9, 16), "slots": torch.arange(3)}
    arguments |= {"k_cache": CACHE.clone(), "v_cache": CACHE.clone()}
    with pytest.raises(error, match=f"^rope_kv_write: {message}"):
        gk.rope_kv_write(**arguments | change)


@pytest.mark.parametrize(
    "error, message, change",
    [
        (
            ValueError,
            r"k_scale must be given with a cache of torch.int8, got None",
            {"k_scale": None},
        ),
        (
            ValueError,
            r"v_scale must be given with a cache of torch.int8, got None",
            {"v_scale": None},
        ),
        (ValueError, r"k_scale must be \[2, 2, 4\]", {"k_scale": torch.ones(2, 2, 4, 1)}),
        (ValueError, r"v_scale must be \[2, 2, 4\]", {"v_scale": torch.ones(2, 2, 5)}),
        (TypeError, r"k_scale must be torch.float32", {"k_scale": SCALE.half()}),
        (
            ValueError,
            r"k_scale must be without overlap",
            dict.fromkeys(("k_scale", "v_scale"), SCALE[:1, :1, :1].expand(2, 2, 4)),
        ),
        (ValueError, r"v_scale must be of strides", {"v_scale": SCALE.mT.contiguous().mT}),
        (
            ValueError,
            r"v_scale must be apart from k_scale",
            dict.fromkeys(("k_scale", "v_scale"), SCALE),
        ),
        (ValueError, r"k_scale must be on cpu", {"k_scale": SCALE.to("meta")}),
        (TypeError, r"v_cache must be torch.int8", {"v_cache": CACHE}),
    ],
)
def test_rejects_scales(error, message, change):
    arguments = {"qkv": torch.ones(3, 256), "positions": torch.arange(3), "n_heads": 4}
    arguments |= {"table": torch.ones(9, 16), "slots": torch.arange(3)}
    arguments |= {name: CACHE.to(INT8) for name in ("k_cache", "v_cache")}
    arguments |= {name: SCALE.clone() for name in ("k_scale", "v_scale")}
    with pytest.raises(error, match=f"^rope_kv_write: {message}"):
        gk.rope_kv_write(**arguments | change)
