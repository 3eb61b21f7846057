from __future__ import annotations

import contextlib
import dataclasses
import math
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import strategies as st
from numerics import assert_bitwise_equal, assert_within_rule
from torch._subclasses.fake_tensor import FakeTensorMode

import glm4_kernels as gk
from glm4_kernels.extension import DTYPE_CODES, buffer, direct_call, extension
from glm4_kernels.quantized_matmul import (
    check_quantized_matmul,
    launch_quantized_matmul,
    quantize_activations,
    quantized_matmul_reference,
)
from glm4_kernels.quantized_weight import BITS, GROUP_SIZES, QuantizedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # compiled kernels: bf16 runs anywhere
MODES = ("float",) if torch.cuda.is_available() else ("float", "int8")
# (M, N, K, bits, group_size, symmetric)
CASES = [
    (1, 257, 128, 4, 128, True),  # one token; N divides by nothing
    (7, 3, 96, 4, 32, False),  # three groups, zero points
    (2, 1, 32, 4, 32, True),  # one piece, one output
    (33, 257, 160, 4, None, False),  # per channel: two chunks of activations, 128 and 32
    (2, 65, 107 * 32, 4, 32, True),  # the odd multiple of GLM-4-9B's down projection, scaled down
    (5, 130, 384, 4, 64, False),
    (9, 48, 2048, 4, 128, True),  # past the columns of a panel that rows of x share, K blocked
    (13, 96, 1056, 8, None, False),  # per channel across those blocks; rows in tiles of 5, 4, 4
    (1, 257, 128, 8, 128, False),
    (16, 5, 96, 8, 32, True),  # the last M of the CUDA column kernel
    (17, 66, 160, 8, None, True),  # the first of its tile kernel, tiles of N and M mostly empty
    (65, 64, 192, 8, 64, False),  # one row into a second tile
]


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU kernel's threads")


def problem(case, dtype, device):
    """The op's arguments but the last two; every row of x at its own magnitude."""
    m, n, k, bits, group_size, symmetric = case
    magnitude = torch.logspace(-2, 1, max(m, 1))[:m].unsqueeze(1)
    x = (torch.randn(m, k) * magnitude).to(dtype).to(device)
    qweight = gk.quantize(torch.randn(n, k), bits, group_size, symmetric).to(device)
    bias = torch.randn(n).to(dtype).to(device)
    return x, qweight.packed, qweight.scale, qweight.zero_point, bias, n, bits, group_size


def check(arguments, mode, swiglu=False):
    x, packed, scale, zero_point, bias, *form = arguments
    form = (*form, mode == "int8", swiglu)
    arguments = (x, packed, scale, zero_point, bias, *form)
    bias64 = None if bias is None else bias.double()
    oracle = quantized_matmul_reference(x.double(), packed, scale, zero_point, bias64, *form)
    reference = quantized_matmul_reference(*arguments)
    y = launch_quantized_matmul(*arguments)
    if mode == "int8" and not swiglu:
        assert_bitwise_equal(y, reference)
    else:
        assert_within_rule(y, reference, oracle)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, dtype, mode, device):
    check(problem(case, dtype, device), mode)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float_mode_is_a_matmul_with_the_dequantised_weight(dtype, device):
    x, _, _, _, bias, *_ = problem((9, 31, 256, 4, 64, False), dtype, device)
    qweight = gk.quantize(torch.randn(31, 256), 4, 64, symmetric=False).to(device)
    truth = x.double() @ qweight.dequantize(torch.float64).t() + bias.double()
    y = gk.quantized_matmul(x, qweight, bias, activations="float")
    assert_within_rule(y, truth.to(dtype), truth)


def test_int8_activations_cost_little():
    """s = max/127 of 128 normal values is about 2.9/127, and the error s/sqrt(12): 0.7 %."""
    x = torch.randn(16, 1024)
    qweight = gk.quantize(torch.randn(64, 1024))
    exact = gk.quantized_matmul(x, qweight, activations="float")
    error = (gk.quantized_matmul(x, qweight) - exact).norm() / exact.norm()
    assert 0.003 < error < 0.01
    assert torch.equal(
        gk.quantized_matmul(x, qweight), gk.quantized_matmul(x, qweight, activations="int8")
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [64, 50])  # gate and up pair in tiles; they do not
def test_swiglu(n, dtype, mode, device):
    for case in [(5, n, 256, 4, 64, False), (1, n, 160, 8, None, True)]:
        x, *rest = problem(case, dtype, device)
        check((x / 16, *rest), mode, swiglu=True)  # products stay within fp16


def test_swiglu_everywhere_it_bends(device):
    """silu from where it is -0 to where it is x, through the identity: against float64."""
    gate = torch.cat((torch.linspace(-120, 120, 3968), torch.logspace(-44, 1, 64), -torch.ones(64)))
    x = torch.cat((gate.view(-1, 32), torch.ones(len(gate) // 32, 32)), dim=1).to(device)
    y = gk.quantized_matmul(x, moved(identity(64), device), activations="float", swiglu=True)
    expected = torch.nn.functional.silu(gate.double()).float().view(-1, 32).to(device)
    assert (y - expected).abs().le(4e-7 * expected.abs() + 2e-36).all()  # flushed below -87


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.uint8, *DTYPES])
@pytest.mark.parametrize("bits, group_size", [(4, 32), (4, 128), (8, None)])
def test_zero_point_dtypes(bits, group_size, dtype, mode, device):
    n, k = 37, 256
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale = torch.rand(n, k // (group_size or k)) / 100
    zero_point = (torch.rand_like(scale) * 2**bits).to(dtype)
    qweight = QuantizedWeight.from_codes(codes, scale, zero_point, bits, group_size).to(device)
    x = torch.randn(3, k, device=device)
    parts = qweight.packed, qweight.scale, qweight.zero_point
    check((x, *parts, None, n, bits, group_size), mode)


@pytest.mark.parametrize("mode", MODES)
def test_order(mode, device):
    order = torch.randperm(256)
    weight = torch.randn(40, 256)
    plain = gk.quantize(weight[:, order], 4, 64)
    ordered = QuantizedWeight.from_codes(*plain.codes(), 4, 64, order).to(device)
    assert torch.equal(ordered.dequantize().cpu()[:, order], plain.dequantize())
    x = torch.randn(3, 256, device=device)
    y = gk.quantized_matmul(x, ordered, activations=mode)
    assert_bitwise_equal(
        y, gk.quantized_matmul(x[:, order.to(device)], plain.to(device), activations=mode)
    )


@on_cpu
@pytest.mark.parametrize("mode, k", [("float", 140_032), ("int8", 600_032)])
def test_rows_longer_than_a_block_of_them(mode, k):
    """One row of x is more than the kernel keeps in L2; seven are two runs of four and three."""
    qweight = gk.quantize(torch.randn(16, 1).expand(16, k), 8, 32, method="nearest")
    x = torch.randn(7, k)
    truth = x.double() @ qweight.dequantize(torch.float64).t()
    y = gk.quantized_matmul(x, qweight, activations=mode)
    error = (y - truth).norm() / truth.norm()
    assert error < (1e-5 if mode == "float" else 0.02)


def identity(n, bits=8, scale=1.0):
    """The weight scale * I, exactly."""
    z = 2 ** (bits - 1)
    u = torch.full((n, n), z, dtype=torch.uint8) + torch.eye(n, dtype=torch.uint8)
    return QuantizedWeight.from_codes(u, torch.full((n, 1), scale), None, bits, None)


def test_activations_are_rounded_like_the_reference():
    """Through the identity, y is s * q, so every integer shows."""
    step = torch.tensor([1.0, 3e-3, 7e5]).unsqueeze(1)
    ties = (torch.arange(32) - 16 + 0.5).repeat(3, 1)
    ties[:, -1] = 127.0
    random = torch.randn(64, 32) * torch.logspace(-44, 38, 64).unsqueeze(1)
    random = random.clamp(-3e38, 3e38)
    x = torch.cat((ties * step, random, torch.zeros(1, 32)))
    q, scale = quantize_activations(x, None)
    assert q.abs().max() == 127 and (q[0, :31] % 2 == 0).all()  # halves go to the even side
    for variant in extension().build_info()["cpu_variants"]:
        weight = identity(32)
        form = (weight.packed, weight.scale, None, None, 32, 8, None)
        y = launch_quantized_matmul(x, *form, True, False, variant=variant)
        assert_bitwise_equal(y, q.float() * scale)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_not_finite_stays_not_finite(value, mode, device):
    x = torch.randn(4, 64, device=device)
    clean = x.clone()
    x[2, 5] = value
    qweight = gk.quantize(torch.randn(9, 64), 8, 32).to(device)
    y = gk.quantized_matmul(x, qweight, activations=mode)
    assert not y[2].isfinite().any()
    others = [0, 1, 3]
    assert torch.equal(y[others], gk.quantized_matmul(clean, qweight, activations=mode)[others])


def test_every_float16_and_bfloat16_survives(device):
    """Conversions are ours (csrc/float_formats.h): in, times one, out, for every number."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).view(-1, 32)
        x = torch.where(x.isfinite(), x, 1.0).to(device)
        y = gk.quantized_matmul(x, moved(identity(32), device), activations="float")
        assert_bitwise_equal(y, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_once_and_to_even(dtype, device):
    x = torch.randn(512, 32) * torch.logspace(-9, 5, 512).unsqueeze(1)
    x = x.clamp(-6e4, 6e4).to(dtype).to(device)
    bias = torch.randn(32).to(dtype).to(device)
    y = gk.quantized_matmul(x, moved(identity(32), device), bias, activations="float")
    assert_bitwise_equal(y, (x.float() + bias.float()).to(dtype))

    halves = (1 + torch.arange(512).view(16, 32) * torch.finfo(dtype).eps).to(dtype).to(device)
    half_ulp = torch.full((32,), torch.finfo(dtype).eps / 2, dtype=dtype, device=device)
    y = gk.quantized_matmul(halves, moved(identity(32), device), half_ulp, activations="float")
    assert_bitwise_equal(y, (halves.float() + half_ulp.float()).to(dtype))

    overflow = torch.full((1, 32), torch.finfo(dtype).max, dtype=dtype, device=device)
    doubled = moved(identity(32, scale=2.0), device)
    assert gk.quantized_matmul(overflow, doubled, activations="float").isinf().all()


def moved(qweight, device):
    return qweight.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_dtypes(dtype, device):
    x, packed, scale, zero_point, bias, *form = problem(CASES[1], torch.float32, device)
    arguments = (x, packed, scale.to(dtype), zero_point, bias, *form)
    for mode in MODES:
        check(arguments, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["transposed", "slice", "unaligned", "expanded", "one row"])
def test_layouts(layout, mode, device):
    wide, packed, scale, zero_point, _, *form = problem(CASES[1], torch.float32, device)
    wide = torch.cat((wide, wide.flip(0)))  # [14, 96]
    x = {
        "transposed": wide.t().contiguous().t(),
        "slice": torch.nn.functional.pad(wide, (5, 3))[:, 5:-3],
        "unaligned": torch.nn.functional.pad(wide.flatten(), (1, 0))[1:].view(14, 96),
        "expanded": wide[:1].expand(4, 96),
        "one row": wide[0],
    }[layout]
    bias = torch.randn(6, device=device)[::2]
    check((x, packed, scale, zero_point, bias, *form), mode)


@pytest.mark.parametrize("mode", MODES)
def test_edges(mode, device):
    x, *weight, bias, n, bits, group_size = problem(CASES[5], torch.float32, device)
    form = (n, bits, group_size)
    for swiglu, columns in ((False, 130), (True, 65)):
        nothing = launch_quantized_matmul(x[:0], *weight, bias, *form, mode == "int8", swiglu)
        assert nothing.shape == (0, columns)
    check((x, *weight, None, *form), mode)
    check((x.view(5, 1, 384), *weight, bias, *form), mode)
    zeros = launch_quantized_matmul(
        torch.zeros_like(x), *weight, None, *form, mode == "int8", False
    )
    assert (zeros == 0).all()


@on_cpu
@pytest.mark.parametrize("mode", ["float", "int8"])
def test_threads_and_variants_change_no_bit(mode):
    for case in [
        (3, 1001, 1024, 4, 128, False),
        (2, 777, 1024, 8, None, True),
        (1, 160, 4096, 4, 32, True),
        (17, 96, 2048, 4, 64, True),
        (7, 64, 1088, 8, None, False),
    ]:
        arguments = problem(case, torch.float32, "cpu")
        results = []
        threads = torch.get_num_threads()
        try:
            for n_threads in (1, 2, 7):  # 7: more than the machine has
                torch.set_num_threads(n_threads)
                for variant in extension().build_info()["cpu_variants"]:
                    form = (mode == "int8", case[1] % 32 == 0)
                    results.append(launch_quantized_matmul(*arguments, *form, variant=variant))
        finally:
            torch.set_num_threads(threads)
        for result in results[1:]:
            assert_bitwise_equal(result, results[0])


@on_cpu
def test_concurrent_callers():
    problems = [problem((2, 640, 1024, 4, 128, True), torch.float32, "cpu") for _ in range(6)]
    alone = [launch_quantized_matmul(*p, True, False) for p in problems]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            together = list(pool.map(lambda p: launch_quantized_matmul(*p, True, False), problems))
            for got, expected in zip(together, alone, strict=True):
                assert_bitwise_equal(got, expected)


@on_cpu
def test_a_forked_child_computes():
    run_python("""
        import os, torch, glm4_kernels as gk
        torch.set_num_threads(2)
        qweight = gk.quantize(torch.randn(640, 1024))
        x = torch.randn(2, 1024)
        expected = gk.quantized_matmul(x, qweight)
        child = os.fork()
        if child == 0:
            os._exit(0 if gk.quantized_matmul(x, qweight).equal(expected) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """)


def test_without_the_extension():
    run_python("""
        import sys
        sys.modules["glm4_kernels._C"] = None
        import torch, glm4_kernels as gk
        from glm4_kernels.extension import build_info
        qweight = gk.quantize(torch.randn(4, 128))
        qweight.dequantize()
        assert list(build_info()) == ["error"]
        try:
            gk.quantized_matmul(torch.ones(1, 128), qweight)
        except RuntimeError as error:
            assert str(error).startswith("glm4_kernels was not built: run pip install -e ."), error
        else:
            raise SystemExit("no error")
    """)


def run_python(code):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@hypothesis.settings(max_examples=60, deadline=None, database=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_shape(data, device):
    mode = data.draw(st.sampled_from(MODES))
    bits = data.draw(st.sampled_from(BITS))
    group_size = data.draw(st.sampled_from(GROUP_SIZES))
    k = (group_size or 32) * data.draw(st.integers(1, 7))
    # The rule weighs errors by the largest output of a row: a row of one may be near zero. Int8
    # activations are compared bit for bit.
    n = data.draw(st.integers(1 if mode == "int8" else 17, 140))
    case = data.draw(st.integers(0, 70)), n, k, bits, group_size, data.draw(st.booleans())
    x, *rest = problem(case, data.draw(st.sampled_from(DTYPES)), device)
    left = data.draw(st.integers(0, 9))
    x = torch.nn.functional.pad(x, (left, 3))[:, left : left + k]
    check((x, *rest), mode)


def weight(**change):
    qweight = gk.quantize(torch.ones(4, 64), 4, 32, symmetric=False)
    return dataclasses.replace(qweight, **change)


def tiles(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def bytes_like(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    "error, message, change",
    [
        (
            TypeError,
            r"qweight must be a QuantizedWeight, got Tensor",
            {"qweight": torch.ones(4, 64)},
        ),
        (ValueError, r"activations must be 'int8', 'float' or None", {"activations": "int4"}),
        (ValueError, r"x must be \[\.\.\., K\], got \[\]", {"x": torch.tensor(1.0)}),
        (ValueError, r"x must be \[\.\.\., 64\], got \[2, 32\]", {"x": torch.ones(2, 32)}),
        (TypeError, r"x must be float32, bfloat16 or float16", {"x": torch.ones(2, 64).double()}),
        (RuntimeError, r"x requires grad", {"x": torch.ones(2, 64, requires_grad=True)}),
        (ValueError, r"bits must be 4 or 8, got 5", {"qweight": weight(bits=5)}),
        (ValueError, r"group_size must be 32, 64, 128 or None", {"qweight": weight(group_size=16)}),
        (ValueError, r"x must be .* multiple of 128", {"qweight": weight(group_size=128)}),
        (TypeError, r"packed must be torch.uint8", {"qweight": weight(packed=tiles(1, 512))}),
        (
            ValueError,
            r"packed must be \[1, 512\], got \[1, 511\]",
            {"qweight": weight(packed=bytes_like(1, 511))},
        ),
        (ValueError, r"packed must be \[1, 512\]", {"qweight": weight(packed=bytes_like(512))}),
        (ValueError, r"packed must be \[1, 512\]", {"qweight": weight(packed=bytes_like(0, 512))}),
        (ValueError, r"packed must be \[2, 512\]", {"qweight": weight(shape=(17, 64))}),
        (ValueError, r"n must be at least 1, got 0", {"qweight": weight(shape=(0, 64))}),
        (
            ValueError,
            r"n must be even with swiglu",
            {"qweight": weight(shape=(3, 64)), "swiglu": True},
        ),
        (
            ValueError,
            r"packed must be contiguous, got strides \[1, 2\]",
            {
                "qweight": weight(
                    shape=(20, 64),
                    packed=bytes_like(512, 2).t(),
                    scale=tiles(2, 2, 16),
                    zero_point=None,
                )
            },
        ),
        (
            ValueError,
            r"packed must be on cpu, got meta",
            {"qweight": weight(packed=bytes_like(1, 512).to("meta"))},
        ),
        (TypeError, r"scale must be float32, bf", {"qweight": weight(scale=bytes_like(1, 2, 16))}),
        (ValueError, r"scale must be \[1, 2, 16\]", {"qweight": weight(scale=tiles(1, 1, 16))}),
        (
            ValueError,
            r"scale must be contiguous",
            {"qweight": weight(scale=tiles(1, 16, 2).transpose(1, 2))},
        ),
        (
            TypeError,
            r"zero_point must be uint8, float32, bfloat16 or float16",
            {"qweight": weight(zero_point=tiles(1, 2, 16, dtype=torch.int32))},
        ),
        (
            ValueError,
            r"zero_point must be \[1, 2, 16\]",
            {"qweight": weight(zero_point=bytes_like(2, 16))},
        ),
        (TypeError, r"bias must be torch.float32", {"bias": torch.ones(4).half()}),
        (ValueError, r"bias must be \[4\], got \[5\]", {"bias": torch.ones(5)}),
        (ValueError, r"bias must be on cpu", {"bias": torch.ones(4, device="meta")}),
    ],
)
def test_rejects(error, message, change):
    arguments = {"x": torch.ones(2, 64), "qweight": weight()} | change
    with pytest.raises(error, match=f"^quantized_matmul: {message}"):
        gk.quantized_matmul(**arguments)


@pytest.mark.parametrize("there", ["packed", "scale"])
def test_a_weight_on_another_device_is_told(there):
    """Packed shapes differ by device: where it is comes first."""
    devices = {"packed": "cpu", "scale": "cpu"} | {there: "cuda"}
    with FakeTensorMode():
        shape = (24, 32) if there == "packed" else (2, 16 * 32)
        packed = torch.empty(shape, dtype=torch.uint8, device=devices["packed"])
        scale = torch.empty(24, 2, device=devices["scale"])
        with pytest.raises(ValueError, match=f"{there} must be on cpu, got cuda"):
            check_quantized_matmul(
                torch.empty(2, 64), packed, scale, None, None, 24, 4, 32, False, False
            )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_int8_activations_are_for_the_cpu(device):
    qweight = gk.quantize(torch.ones(4, 64), 4, 32).to(device)
    with pytest.raises(ValueError, match="activations must be 'float' on CUDA"):
        gk.quantized_matmul(torch.ones(2, 64, device=device), qweight, activations="int8")


@pytest.mark.parametrize(
    "message, change",
    [
        (r"y must have 8 \* 4 bytes, got 28", {"y": torch.empty(7)}),
        (r"x must have", {"x": torch.empty(2, 32)}),
        (r"packed must have", {"packed": bytes_like(1, 511)}),
        (r"scale must have", {"scale": torch.empty(31)}),
        (r"zero_point must have", {"zero_point": bytes_like(33)}),
        (r"bias must have", {"bias": torch.empty(3)}),
        (r"x must have 128 \* 4 bytes, got 0", {"x": None}),
        (r"impossible sizes", {"sizes": (2, 4, 48, 4, 48)}),
        (r"impossible sizes", {"sizes": (-1, 4, 64, 4, 32)}),
        (r"impossible sizes", {"sizes": (2, 2**62, 64, 4, 32)}),
        (r"bits must be 4 or 8", {"sizes": (2, 4, 64, 3, 32)}),
        (r"group size 48 does not divide", {"sizes": (2, 4, 64, 4, 48)}),
        (r"group size 0 does not divide", {"sizes": (2, 4, 64, 4, 0)}),
        (r"group size 192 .* is larger than 128", {"sizes": (2, 4, 384, 4, 192)}),
        (r"unknown dtype code 3", {"dtypes": (3, 0, 3)}),
        (r"unknown dtype code 4", {"dtypes": (0, 0, 4)}),
        (r"activation group must be", {"activation_group": 48}),
        (r"activation group must be", {"activation_group": 256}),
        (r"swiglu needs N a multiple of 32, got 4", {"swiglu": True}),
        (r"this processor runs no variant mmx", {"variant": "mmx"}),
    ],
)
def test_the_extension_checks_sizes_itself(message, change):
    """For callers that come around Python's checks: ValueError, and no memory touched."""
    good = {
        "y": torch.empty(2, 4),
        "x": torch.ones(2, 64),
        "packed": bytes_like(1, 512),
        "scale": torch.ones(1, 2, 16),
        "zero_point": bytes_like(1, 2, 16),
        "bias": torch.ones(4),
        "dtypes": (DTYPE_CODES[torch.float32],) * 2 + (DTYPE_CODES[torch.uint8],),
        "sizes": (2, 4, 64, 4, 32),
        "activation_group": 64,
        "swiglu": False,
        "variant": "",
    }

    def call(
        y, x, packed, scale, zero_point, bias, dtypes, sizes, activation_group, swiglu, variant
    ):
        buffers = (buffer(t) for t in (y, x, packed, scale, zero_point, bias))
        extension().quantized_matmul_cpu(
            *buffers, *dtypes, *sizes, activation_group, swiglu, 1, variant
        )

    call(**good)
    with pytest.raises(ValueError, match=message):
        call(**(good | change))


@on_cpu
@hypothesis.settings(max_examples=400, deadline=None, database=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_the_extension_takes_what_the_check_admits(data):
    """Tensors that need not fit each other: the quick way in gives what the long one gives, or
    leaves to it what would need a copy or is wrong."""
    draw = data.draw
    n, k, bits = draw(st.sampled_from([(4, 64, 4), (37, 128, 4), (64, 128, 8), (32, 96, 8)]))
    group = draw(st.sampled_from([None, 32, 32, 64, 48, 96, 0, -32, k]))
    swiglu, int8_activations = draw(st.booleans()), draw(st.booleans())
    tiles, groups = -(-n // 16), k // group if group and group > 0 else 1
    floats = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    dtype = draw(floats)
    tensors = {
        "x": torch.randn(draw(st.sampled_from([(k,), (1, k), (2, 3, k), (0, k)]))).to(dtype),
        "packed": torch.randint(0, 256, (tiles, 16 * k * bits // 8), dtype=torch.uint8),
        "scale": torch.rand(tiles, groups, 16).to(draw(floats)),
        "zero_point": draw(
            st.sampled_from([None, torch.full((tiles, groups, 16), 7, dtype=torch.uint8)])
        ),
        "bias": draw(st.sampled_from([None, torch.randn(n).to(dtype)])),
    }
    wrong = draw(st.sampled_from([None, None, *tensors]))
    if wrong is not None and tensors[wrong] is not None:
        spoil = draw(
            st.sampled_from(
                [
                    lambda t: t.mT if t.dim() > 1 else t.unsqueeze(0),
                    lambda t: t.repeat_interleave(2, -1)[..., ::2],
                    lambda t: t[..., :-1],
                    lambda t: t.flatten(),
                    lambda t: t.double(),
                    lambda t: t.to("meta"),
                    lambda t: t.to_sparse(),
                    lambda t: torch.nn.Parameter(t, requires_grad=False),
                ]
            )
        )
        tensors[wrong] = spoil(tensors[wrong])
    if draw(st.integers(0, 19)) == 0:
        n = draw(st.sampled_from([0, -1, n + 1, n + 16, 2**31, 2**62]))
    arguments = (*tensors.values(), n, bits, group)
    arguments = (*arguments, int8_activations, swiglu)
    y = direct_call("quantized_matmul", lambda *arguments: None)(*arguments)
    if y is not None:
        check_quantized_matmul(*arguments)
        torch.testing.assert_close(
            y, launch_quantized_matmul(*arguments), rtol=0, atol=0, equal_nan=True
        )
    elif wrong is None and tensors["x"].numel() and not (swiglu and n % 32):
        with pytest.raises((ValueError, TypeError)):
            check_quantized_matmul(*arguments)


@on_cpu
@hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_the_extension_survives_any_argument(data):
    """Sizes, codes and buffers that need not fit each other: a ValueError or a result; run with the
    sanitizers (CONTRIBUTING), no byte outside a buffer either."""
    draw = data.draw
    m, n, blocks = draw(st.integers(-1, 9)), draw(st.integers(-1, 40)), draw(st.integers(0, 9))
    k = blocks * 32 + draw(st.sampled_from([0, 0, 0, 1, 16]))
    bits = draw(st.sampled_from([4, 8, 8, 4, 3]))
    group = draw(st.sampled_from([32, 64, 128, k, k, 0, -32, 96, 2**40]))
    swiglu = draw(st.booleans())
    tiles, groups = -(-max(n, 0) // 16), max(k, 0) // group if group > 0 else 1
    sizes = {
        "y": max(m, 0) * max(n, 0) * 4 // (2 if swiglu else 1),
        "x": max(m, 0) * max(k, 0) * 4,
        "packed": tiles * 16 * max(k, 0) * bits // 8,
        "scale": tiles * groups * 16 * 4,
        "zero_point": draw(st.sampled_from([0, tiles * groups * 16])),
        "bias": draw(st.sampled_from([0, max(n, 0) * 4])),
    }
    wrong = draw(st.sampled_from([None, None, *sizes]))
    if wrong is not None:
        sizes[wrong] = max(sizes[wrong] + draw(st.sampled_from([-64, -4, -1, 1, 4, 64])), 0)
    memory = {
        name: torch.randint(0, 256, (size,), dtype=torch.uint8) for name, size in sizes.items()
    }
    dtypes = draw(st.sampled_from([(0, 0, 3), (0, 0, 3), (0, 1, 3), (1, 0, 0), (5, -1, 9)]))
    arguments = (
        *(buffer(t) if t.numel() else (0, 0) for t in memory.values()),
        *(*dtypes, m, n, k, bits, group, draw(st.sampled_from([0, 32, 64, 128, 33, -1])), swiglu),
        *(
            draw(st.integers(-1, 3)),
            draw(st.sampled_from(["", *extension().build_info()["cpu_variants"]])),
        ),
    )
    with contextlib.suppress(ValueError):
        extension().quantized_matmul_cpu(*arguments)


@pytest.mark.parametrize("step, expected", [(None, 0.006), (64, 0.86), (4096, 0.11)])
def test_int8_activation_error(step, expected):
    """The figures of `quantized_matmul`: every so many channels one 1000 times the others."""
    weight, x = torch.randn(512, 4096), torch.randn(64, 4096)
    if step:
        weight[:, ::step] = 0
        x[:, ::step] *= 1000
    error = gk.int8_activation_error(x, gk.quantize(weight, 4, 64))
    assert error == pytest.approx(expected, rel=0.15)
    assert gk.int8_activation_error(torch.zeros(1, 4096), gk.quantize(weight, 4, 64)) == 0.0
