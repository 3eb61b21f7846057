"""What the C++ kernels of the small ops owe beside each op's own test: the same bits on every
instruction set, at any address and with any number of threads; nothing written outside the output;
sizes that are checked again."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from kernels import DTYPES, SIMD_VARIANTS
from numerics import assert_bitwise_equal

import glm4_kernels as gk
from glm4_kernels.add_rms_norm import add_rms_norm_cpu, add_rms_norm_reference
from glm4_kernels.extension import ABSENT, DTYPE_CODES, buffer, extension
from glm4_kernels.merge_attention import merge_attention_cpu, merge_attention_reference
from glm4_kernels.rms_norm import rms_norm_cpu, rms_norm_reference
from glm4_kernels.rope import rope_cpu, rope_reference
from glm4_kernels.sandwich_norm import sandwich_norm_cpu, sandwich_norm_reference
from glm4_kernels.swiglu import swiglu_cpu, swiglu_reference

EPS = 1e-5
# Columns: vectors have 4, 8 or 16 lanes, sums 64.
SIZES = [1, 3, 15, 16, 17, 63, 64, 65, 127, 257, 1000]


def unaligned(*shape, dtype):
    """Random rows that start one value off any boundary and are one value apart."""
    wide = torch.randn(*shape[:-1], shape[-1] + 1)
    return torch.cat((torch.zeros(1), wide.flatten()))[1:].to(dtype).view_as(wide)[..., :-1]


def norm_arguments(n_weights, residual, n_rows, n_cols, dtype):
    rows = [unaligned(n_rows, n_cols, dtype=dtype) for _ in range(1 + residual)]
    weights = [unaligned(1, n_cols, dtype=dtype)[0] for _ in range(n_weights)]
    return *rows, *weights, EPS


def swiglu_arguments(n_rows, n_cols, dtype):
    return (unaligned(n_rows, 2 * n_cols, dtype=dtype) * 4,)


def rope_arguments(n_rows, n_cols, dtype):
    head_dim = min(-(-n_cols // 16) * 16, 256)
    q, k = (unaligned(n_rows, heads, head_dim, dtype=dtype) for heads in (3, 2))
    table = gk.rope_table(50, 1e4, min(n_cols + n_cols % 2, head_dim), dtype=dtype)
    return q, k, torch.randint(50, (n_rows,)), table


def merge_arguments(n_rows, n_cols, dtype):
    a, b = (unaligned(n_rows, 2, n_cols, dtype=dtype) for _ in range(2))
    lse_a, lse_b = torch.randn(2, n_rows, 2) * 3
    return a, lse_a, b, lse_b


OPS = {
    "rms_norm": (rms_norm_cpu, rms_norm_reference, functools.partial(norm_arguments, 1, 0)),
    "add_rms_norm": (
        add_rms_norm_cpu,
        add_rms_norm_reference,
        functools.partial(norm_arguments, 1, 1),
    ),
    "sandwich_norm": (
        sandwich_norm_cpu,
        sandwich_norm_reference,
        functools.partial(norm_arguments, 2, 1),
    ),
    "swiglu": (swiglu_cpu, swiglu_reference, swiglu_arguments),
    "rope": (rope_cpu, rope_reference, rope_arguments),
    "merge_attention": (merge_attention_cpu, merge_attention_reference, merge_arguments),
}
each_op = pytest.mark.parametrize("op", OPS)


def outputs(values):
    return values if isinstance(values, tuple) else (values,)


def in_double(arguments):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in arguments]  # fmt: skip


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_every_instruction_set_and_address(op, dtype):
    cpu, reference, make = OPS[op]
    for n_cols in SIZES:
        arguments = make(3, n_cols, dtype)
        aligned = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        expected = outputs(cpu(*arguments, variant="portable"))
        for variant in SIMD_VARIANTS:
            for given in (arguments, aligned):
                for a, b in zip(outputs(cpu(*given, variant=variant)), expected, strict=True):
                    assert_bitwise_equal(a, b)
        oracle, allowed = outputs(reference(*in_double(arguments))), 4 * torch.finfo(dtype).eps
        for a, truth in zip(expected, oracle, strict=True):
            scale = truth.abs().amax(-1, keepdim=True) if truth.dim() > 2 else truth.abs().amax()
            assert ((a.double() - truth).abs() <= allowed * (scale + EPS)).all(), n_cols


@each_op
def test_threads_change_no_bit(op):
    cpu, _, make = OPS[op]
    arguments = make(1200, 250, torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            results.append(outputs(cpu(*arguments)))
    finally:
        torch.set_num_threads(before)
    for more in results[1:]:
        for a, b in zip(more, results[0], strict=True):
            assert_bitwise_equal(a, b)


@each_op
@pytest.mark.parametrize("variant", SIMD_VARIANTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_so(op, variant, value, dtype):
    """As the reference has it, where it stands and everywhere else."""
    cpu, reference, make = OPS[op]
    arguments = make(3, 70, dtype)
    arguments[0][1, ..., 5] = value
    actual, expected = outputs(cpu(*arguments, variant=variant)), outputs(reference(*arguments))
    for a, b in zip(actual, expected, strict=True):
        assert_bitwise_equal(a.isnan(), b.isnan())
        assert_bitwise_equal(a.isinf(), b.isinf())
        assert a[0].isfinite().all() and a[2].isfinite().all()


@pytest.mark.parametrize("variant", SIMD_VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_nothing_outside(variant, dtype):
    """Outputs inside a larger buffer, whose border is a number that no kernel makes."""
    module, code = extension(), DTYPE_CODES[dtype]

    def bordered(n_rows, n_cols):
        whole = torch.full((n_rows * n_cols + 64,), 77.0, dtype=dtype)
        return whole, whole[31 : 31 + n_rows * n_cols].view(n_rows, n_cols)

    for n_cols in SIZES:
        (whole_y, y), (whole_sum, sum_out) = bordered(2, n_cols), bordered(2, n_cols)
        gate_up = torch.randn(2, 2 * n_cols).to(dtype)
        x, weight = gate_up[:, :n_cols], torch.randn(n_cols).to(dtype)
        tensors = (y, None, sum_out, x, x, None, weight)
        sizes = (2, n_cols, n_cols, 2 * n_cols, 2 * n_cols)
        module.norm_cpu(*map(buffer, tensors), code, code, True, *sizes, EPS, 1, variant)
        for out, expected in ((y, add_rms_norm_reference(x, x, weight, EPS)[0]), (sum_out, x + x)):
            assert (out - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()
        module.swiglu_cpu(
            *(buffer(y), buffer(gate_up), code, True, 2, n_cols, 2 * n_cols, 1, variant)
        )
        for whole in (whole_y, whole_sum):
            assert (whole[:31] == 77).all() and (whole[31 + 2 * n_cols :] == 77).all()


@pytest.mark.parametrize(
    "message, change",
    [
        (r"y must have more than 7 \* 4 bytes, got 28", {"y": torch.empty(7)}),
        (r"x must have more than 7 \* 4 bytes, got 24", {"x": torch.empty(6)}),
        (r"x must have more than 12 \* 4 bytes", {"strides": (9, 4)}),
        (r"residual must have more than 103 \* 4", {"strides": (4, 100)}),
        (r"residual_out has no memory", {"residual_out": None}),
        (r"post_weight is for a norm with a residual", {"residual": None}),
        (r"post_weight must have", {"post_weight": torch.empty(3)}),
        (r"weight must have", {"weight": torch.empty(3)}),
        (r"weight has no memory", {"weight": None}),
        (r"x has a negative stride", {"strides": (-4, 4)}),
        (r"x must have", {"strides": (2**62, 4)}),
        (r"y is not aligned", {"y": torch.empty(40, dtype=torch.uint8)[1:]}),
        (r"impossible n_rows -1", {"sizes": (-1, 4)}),
        (r"impossible n_cols", {"sizes": (2, 2**31)}),
        (r"unknown dtype code 3", {"dtypes": (3, 3)}),
        (r"y must be of the dtype of x, int8 or float8_e4m3", {"dtypes": (0, 1)}),
        (r"scale has no memory", {"dtypes": (0, 4)}),
        (
            r"scale must have more than 3 \* 4",
            {"dtypes": (0, 5), "group": 2, "scale": torch.ones(3)},
        ),
        (r"group must divide n_cols", {"dtypes": (0, 4), "group": 3, "scale": torch.ones(4)}),
        (r"group must divide n_cols", {"dtypes": (0, 4), "group": 0, "scale": torch.ones(4)}),
        (r"this processor runs no variant mmx", {"variant": "mmx"}),
    ],
)
def test_norm_checks_sizes_itself(message, change):
    """For callers that come around Python's checks: ValueError, and no memory touched."""
    good = {name: torch.ones(2, 4) for name in ("y", "residual_out", "x", "residual")}
    good |= {"post_weight": torch.ones(4), "weight": torch.ones(4), "scale": None}
    good |= {"sizes": (2, 4), "strides": (4, 4), "dtypes": (0, 0), "group": 4, "variant": ""}
    names = ("y", "scale", "residual_out", "x", "residual", "post_weight", "weight")

    def call(sizes, strides, dtypes, group, variant, **tensors):
        buffers = [buffer(tensors[name]) for name in names]
        extension().norm_cpu(*buffers, *dtypes, True, *sizes, group, *strides, EPS, 1, variant)

    call(**good)
    with pytest.raises(ValueError, match=message):
        call(**(good | change))


@pytest.mark.parametrize(
    "message, change",
    [
        (r"y must have", {"y": torch.empty(7)}),
        (r"gate_up must have", {"gate_up": torch.empty(15)}),
        (r"gate_up must have", {"sizes": (2, 4, 9)}),
        (r"impossible n_rows", {"sizes": (2**31, 4, 8)}),
        (r"unknown dtype code -1", {"dtype": -1}),
    ],
)
def test_swiglu_checks_sizes_itself(message, change):
    good = {"y": torch.ones(8), "gate_up": torch.ones(16), "dtype": 0, "sizes": (2, 4, 8)}

    def call(y, gate_up, dtype, sizes):
        extension().swiglu_cpu(buffer(y), buffer(gate_up), dtype, True, *sizes, 1, "")

    call(**good)
    with pytest.raises(ValueError, match=message):
        call(**(good | change))


@pytest.mark.parametrize(
    "message, change",
    [
        (r"out must have", {"out": torch.empty(31)}),
        (r"lse must have", {"lse": torch.empty(1)}),
        (r"a must have", {"strides": (17, 16)}),
        (r"b must have", {"strides": (16, 17)}),
        (r"lse_a must have", {"lse_a": torch.empty(1)}),
        (r"lse_b has no memory", {"lse_b": None}),
        (r"impossible head_dim", {"sizes": (2, -1)}),
    ],
)
def test_merge_attention_checks_sizes_itself(message, change):
    good = {name: torch.ones(2, 16) for name in ("out", "a", "b")}
    good |= {name: torch.ones(2) for name in ("lse", "lse_a", "lse_b")}
    good |= {"sizes": (2, 16), "strides": (16, 16)}

    def call(out, lse, a, lse_a, b, lse_b, sizes, strides):
        buffers = [buffer(t) for t in (out, lse, a, lse_a, b, lse_b)]
        extension().merge_attention_cpu(*buffers, 0, *sizes, *strides, 1, "")

    call(**good)
    with pytest.raises(ValueError, match=message):
        call(**(good | change))


@pytest.mark.parametrize(
    "message, change",
    [
        (r"q_out must have", {"q_out": torch.empty(95)}),
        (r"cache must have", {"v_cache": torch.ones(2, 1, 4, 15).to(torch.int8)}),
        (r"cache must have", {"cache_stride": (64, 64, 17, 1)}),
        (r"contiguous over D", {"cache_stride": (64, 64, 16, 2)}),
        (r"scale must have", {"k_scale": torch.ones(7)}),
        (r"scale has no memory", {"v_scale": None}),
        (r"scale must have", {"scale_stride": (4, 4, 2)}),
        (r"qkv must have", {"qkv": torch.ones(3, 63)}),
        (r"bias must have", {"bias": torch.ones(63)}),
        (r"positions must have", {"positions": torch.arange(2)}),
        (r"slots must have", {"slots": torch.arange(2)}),
        (r"table must have", {"table": torch.ones(8, 8)}),
        (r"head_dim must be a multiple of 16", {"cache_shape": (2, 1, 4, 8)}),
        (r"page_size must be at least 1", {"cache_shape": (2, 1, 0, 16)}),
        (r"cache must be of the dtype of qkv, int8 or float8_e4m3", {"cache_dtype": 3}),
        (r"indices have 4 or 8 bytes", {"slot_bytes": 2}),
        (r"table must be of the dtype", {"table_dtype": 1}),
    ],
)
def test_rope_kv_write_checks_sizes_itself(message, change):
    good = {"q_out": torch.ones(3, 2, 16), "qkv": torch.ones(3, 64), "bias": torch.ones(64)}
    good |= {name: torch.ones(2, 1, 4, 16, dtype=torch.int8) for name in ("k_cache", "v_cache")}
    good |= {name: torch.ones(2, 1, 4) for name in ("k_scale", "v_scale")}
    good |= {"positions": torch.arange(3), "slots": torch.arange(3), "table": torch.ones(9, 8)}
    good |= {"table_dtype": 0, "cache_dtype": 4, "slot_bytes": 8, "cache_shape": (2, 1, 4, 16)}
    good |= {"cache_stride": (64, 64, 16, 1), "scale_stride": (4, 4, 1)}
    names = ("q_out", "k_cache", "v_cache", "k_scale", "v_scale")
    names += ("qkv", "bias", "positions", "slots", "table")

    def call(**given):
        wrong = extension().rope_kv_write_cpu(
            *(buffer(given[name]) for name in names),
            *(0, given["table_dtype"], given["cache_dtype"], 8, given["slot_bytes"]),
            *(3, 2, 64, 9, 8, 8),
            *(given[name] for name in ("cache_shape", "cache_stride", "scale_stride")),
            *(1, ""),
        )
        assert wrong is None

    call(**good)
    with pytest.raises(ValueError, match=message):
        call(**(good | change))


@pytest.mark.parametrize(
    "message, change",
    [
        (r"q must have", {"q": torch.ones(3, 2, 15)}),
        (r"k must have", {"strides": (32, 16, 17, 16)}),
        (r"k_out must have", {"k_out": torch.ones(47)}),
        (r"rotary_dim must be even", {"sizes": (3, 2, 1, 16, 9, 18)}),
        (r"impossible n_heads", {"sizes": (3, -2, 1, 16, 9, 8)}),
    ],
)
def test_rope_checks_sizes_itself(message, change):
    good = {"q_out": torch.ones(3, 2, 16), "k_out": torch.ones(3, 1, 16)}
    good |= {"q": torch.ones(3, 2, 16), "k": torch.ones(3, 1, 16), "strides": (32, 16, 16, 16)}
    good |= {"sizes": (3, 2, 1, 16, 9, 8)}
    fixed = (buffer(POSITIONS), buffer(TABLE), 0, 0, 8)

    def call(q_out, k_out, q, k, sizes, strides):
        buffers = [buffer(t) for t in (q_out, k_out, q, k)]
        assert extension().rope_cpu(*buffers, *fixed, *sizes, *strides, 8, 1, "") is None

    call(**good)
    with pytest.raises(ValueError, match=message):
        call(**(good | change))


POSITIONS, TABLE = torch.arange(3), torch.ones(9, 8)


def test_an_index_out_of_range_writes_nothing():
    q, k = torch.ones(3, 2, 16), torch.ones(3, 1, 16)
    q_out, k_out = torch.zeros(3, 2, 16), torch.zeros(3, 1, 16)
    for positions in (torch.tensor([0, 9, 1]), torch.tensor([0, 1, -1]), torch.tensor([2**40] * 3)):
        buffers = [buffer(t) for t in (q_out, k_out, q, k, positions, TABLE)]
        sizes = (0, 0, 8, 3, 2, 1, 16, 9, 8, 32, 16, 16, 16, 8)
        assert extension().rope_cpu(*buffers, *sizes, 1, "") == "positions"
    assert (q_out == 0).all() and (k_out == 0).all()


def test_absent_is_a_null_buffer():
    assert buffer(None) == ABSENT == (0, 0)
