"""The rounding of rows to int8 and float8_e4m3fn, and the norms that write such rows."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from kernels import DTYPES, SIMD_VARIANTS
from numerics import KERNEL_DTYPES, assert_bitwise_equal, assert_within_rule

import glm4_kernels as gk
from glm4_kernels.add_rms_norm import (
    add_rms_norm_cpu,
    add_rms_norm_quantized_cpu,
    add_rms_norm_quantized_reference,
    launch_add_rms_norm,
    launch_add_rms_norm_quantized,
)
from glm4_kernels.quantize_rows import QUANTISED_LIMIT, check_quantize_rows, quantize_rows
from glm4_kernels.rms_norm import (
    launch_rms_norm,
    launch_rms_norm_quantized,
    rms_norm_cpu,
    rms_norm_quantized_cpu,
    rms_norm_quantized_reference,
)
from glm4_kernels.sandwich_norm import (
    launch_sandwich_norm,
    launch_sandwich_norm_quantized,
    sandwich_norm_cpu,
    sandwich_norm_quantized_cpu,
    sandwich_norm_quantized_reference,
)

EPS = 1e-5
INT8, FP8 = torch.int8, torch.float8_e4m3fn
# Inputs of [..., N], weights of [N]; the plain launcher, the quantising one, its reference; both in
# C++.
NORMS = {
    "rms_norm": (
        *(1, 1, launch_rms_norm),
        *(launch_rms_norm_quantized, rms_norm_quantized_reference),
        *(rms_norm_cpu, rms_norm_quantized_cpu),
    ),
    "add_rms_norm": (
        *(2, 1, launch_add_rms_norm),
        *(launch_add_rms_norm_quantized, add_rms_norm_quantized_reference),
        *(add_rms_norm_cpu, add_rms_norm_quantized_cpu),
    ),
    "sandwich_norm": (
        *(2, 2, launch_sandwich_norm),
        *(launch_sandwich_norm_quantized, sandwich_norm_quantized_reference),
        *(sandwich_norm_cpu, sandwich_norm_quantized_cpu),
    ),
}
SHAPES = [
    ((1, 4096), None),  # one token of GLM-4-9B, a scale a token
    ((2, 6144), 64),  # GLM-4-32B, the groups of the int8 matmul; not a power of two
    ((3, 257), None),  # nothing divides
    ((2, 3, 96), 32),  # leading dimensions
    ((4, 128), 128),  # one group
    ((5, 1), None),  # one column
]
KERNELS = ["triton", *SIMD_VARIANTS]
each_norm = pytest.mark.parametrize("norm", NORMS)
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_kernel_and_dtype = pytest.mark.parametrize(
    "kernel, dtype",
    [(k, dtype) for k in KERNELS for dtype in (KERNEL_DTYPES if k == "triton" else DTYPES)],
    ids=str,
)
each_target = pytest.mark.parametrize("target", [INT8, FP8], ids=["int8", "fp8"])


def inputs(norm, shape, dtype, device):
    """Rows of sizes from 1e-3 to 1e2, weights with a few large columns."""
    n_inputs, n_weights = NORMS[norm][:2]
    scale = torch.logspace(-3, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    rows = [torch.randn(shape) * scale for _ in range(n_inputs)]
    weights = [torch.randn(shape[-1]) for _ in range(n_weights)]
    for weight in weights:
        weight[::97] *= 20
    return [x.to(dtype).to(device) for x in (*rows, *weights)]


def kernels_of(norm, kernel, device):
    """The plain norm, the quantising one, and where they run."""
    _, _, launch, launch_quantized, _, cpu, cpu_quantized = NORMS[norm]
    if kernel == "triton":
        return launch, launch_quantized, device
    return partial(cpu, variant=kernel), partial(cpu_quantized, variant=kernel), torch.device("cpu")


def skip_without_fp8(target, device):
    if target == FP8 and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8_e4m3fn needs sm_89")


@each_target
def test_every_code_and_the_middles_between(target):
    limit = QUANTISED_LIMIT[target]
    codes = torch.arange(256, dtype=torch.uint8).view(target).float()
    codes = codes[codes.isfinite() & (codes.abs() <= limit)]
    q, scale = quantize_rows(codes[None] * 2.0**-3, target, None)
    assert_bitwise_equal(scale, torch.full((1, 1), 2.0**-3))
    assert_bitwise_equal(q.float(), codes[None])

    ordered = codes.unique()
    middles = (ordered[1:] + ordered[:-1]) / 2
    q, _ = quantize_rows(torch.cat((middles, ordered[-1:]))[None], target, None)
    below, above = ordered[:-1], ordered[1:]
    if target == INT8:
        even = torch.where(below % 2 == 0, below, above)
    else:
        even = torch.where(below.to(FP8).view(torch.uint8) % 2 == 0, below, above)
    assert_bitwise_equal(q.float()[0, :-1], even)


@each_target
def test_what_is_not_a_normal_number(target):
    y = torch.ones(6, 4)
    y[1] = 0.0
    y[2, 1] = torch.nan
    y[3, 2] = -torch.inf
    y[4] = 1e-38  # its scale is not normal
    y[5] = 3e38
    q, scale = quantize_rows(y, target, None)
    assert (q.float()[[0, 5]] == QUANTISED_LIMIT[target]).all()
    assert (q.float()[1:5] == 0).all()
    assert scale[1] == 0 and scale[2].isnan() and scale[3].isinf()


def test_a_shorter_last_group():
    y = torch.randn(3, 70)
    q, scale = quantize_rows(y, INT8, 64)
    assert q.shape == (3, 70) and scale.shape == (3, 2)
    last_q, last_scale = quantize_rows(y[:, 64:], INT8, None)
    assert_bitwise_equal(q[:, 64:], last_q)
    assert_bitwise_equal(scale[:, 1:], last_scale)


@each_norm
@each_target
@each_kernel_and_dtype
@pytest.mark.parametrize("shape, group_size", SHAPES, ids=str)
def test_quantises_what_the_norm_gives(norm, shape, group_size, kernel, dtype, target, device):
    """Bit for bit: the norm is the same kernel, and what follows has no freedom."""
    launch, launch_quantized, device = kernels_of(norm, kernel, device)
    skip_without_fp8(target, device)
    arguments = (*inputs(norm, shape, dtype, device), EPS)
    y, *residual = tensors(launch(*arguments))
    q, scale, *residual_out = launch_quantized(*arguments, target, group_size)
    expected_q, expected_scale = quantize_rows(y, target, group_size)
    assert_bitwise_equal(scale, expected_scale)
    assert_bitwise_equal(q.float(), expected_q.float())
    assert q.dtype == target and q.is_contiguous() and scale.is_contiguous()
    for actual, expected in zip(residual_out, residual, strict=True):
        assert_bitwise_equal(actual, expected)


@each_norm
@each_kernel_and_dtype
@pytest.mark.parametrize("rounding", ["hf", "fp32"])
def test_matches_reference(norm, rounding, kernel, dtype, device):
    """The scale by the one rule; no value further off than half a step and the norm's own error."""
    _, launch_quantized, device = kernels_of(norm, kernel, device)
    reference = NORMS[norm][4]
    tensors_in = inputs(norm, (7, 192), dtype, device)
    options = {"dtype": INT8, "group_size": 64, "rounding": rounding}
    q, scale, *residual = launch_quantized(*tensors_in, EPS, **options)
    q_reference, scale_reference, *residual_reference = reference(*tensors_in, EPS, **options)
    wide = [x.double() for x in tensors_in]
    _, scale_oracle, *residual_oracle = reference(*wide, EPS, **options)
    assert_within_rule(scale, scale_reference, scale_oracle.float())
    assert (q.int() - q_reference.int()).abs().max() <= 1
    assert (q != q_reference).float().mean() < 0.01
    for group in residual, residual_reference, residual_oracle:
        assert len(group) == NORMS[norm][0] - 1
    for actual, expected, oracle in zip(residual, residual_reference, residual_oracle, strict=True):
        assert_within_rule(actual, expected, oracle)


@each_target
@each_kernel
def test_fp32_quantises_the_unrounded_norm(target, kernel, device):
    _, launch_quantized, device = kernels_of("rms_norm", kernel, device)
    skip_without_fp8(target, device)
    x, weight = inputs("rms_norm", (64, 128), torch.float16, device)
    arguments = (x, weight, EPS, target, None)
    unrounded = rms_norm_quantized_reference(x.float(), weight.float(), *arguments[2:])
    hf = rms_norm_quantized_reference(*arguments)
    q, scale = launch_quantized(*arguments, rounding="fp32")
    assert (scale != hf[1]).float().mean() > 0.5
    # On a GPU rsqrt.approx errs by 2^-22; the sums of 128 squares and their quotient, or root,
    # quotient and products, by as much together.
    torch.testing.assert_close(scale, unrounded[1], rtol=2**-21, atol=0)
    assert (q.float() != unrounded[0].float()).float().mean() < 0.01


@each_norm
@each_kernel
def test_a_row_does_not_depend_on_its_neighbours(norm, kernel, device):
    """Batch invariance: alone, or among others, a row has the same bits."""
    launch, launch_quantized, device = kernels_of(norm, kernel, device)
    n_inputs = NORMS[norm][0]
    wide = inputs(norm, (9, 320), torch.float16, device)
    one = [x[4:5] for x in wide[:n_inputs]] + wide[n_inputs:]
    for run in (launch, lambda *arguments: launch_quantized(*arguments, INT8, 64)):
        alone, among = tensors(run(*one, EPS)), tensors(run(*wide, EPS))
        for a, b in zip(alone, among, strict=True):
            assert_bitwise_equal(a, b[4:5])


@each_target
@pytest.mark.parametrize("variant", SIMD_VARIANTS)
def test_the_extension_rounds_as_the_reference(target, variant):
    """Values of all sizes, the middles between codes, and what has no normal scale, through a norm
    that changes nothing: the sum of squares is exact."""
    rows = torch.cat(
        (torch.randn(60, 256) * torch.logspace(-30, 30, 60)[:, None], torch.ones(8, 256))
    )
    rows[60, 5], rows[61, 6], rows[62, 7] = torch.nan, torch.inf, -torch.inf
    rows[63] = 0.0
    rows[64] = 1e-38
    limit = QUANTISED_LIMIT[target]
    codes = torch.arange(256, dtype=torch.uint8).view(target).float()
    codes = torch.where(codes.abs() <= limit, codes, 0.0)
    rows[65], rows[66] = codes, (codes + codes.roll(1)) / 2
    rows[66, 0] = limit
    x = torch.ones(1, 256)
    for y in rows:
        q, scale = rms_norm_quantized_cpu(x, y, 0.0, target, variant=variant)
        expected_q, expected_scale = quantize_rows(y[None], target, None)
        assert_bitwise_equal(scale, expected_scale)
        assert_bitwise_equal(q.float(), expected_q.float())


@each_norm
@each_kernel
def test_layouts(norm, kernel, device):
    _, launch_quantized, device = kernels_of(norm, kernel, device)
    n_inputs, reference = NORMS[norm][0], NORMS[norm][4]
    wide = inputs(norm, (32, 96), torch.float32, device)
    weights = [weight[::3] for weight in wide[n_inputs:]]
    for layout in (
        lambda x: x.t()[:5],
        lambda x: x[::9, 5:37],  # rows and columns of a wider buffer
        lambda x: x[:1, :32].expand(4, 32),
    ):
        views = [layout(x) for x in wide[:n_inputs]]
        arguments = (*views, *weights, EPS, INT8, 32)
        q, scale = launch_quantized(*arguments)[:2]
        expected = reference(*arguments)
        torch.testing.assert_close(scale, expected[1], rtol=2**-21, atol=0)
        assert (q.int() - expected[0].int()).abs().max() <= 1


@each_norm
@each_kernel
def test_edges(norm, kernel, device):
    _, launch_quantized, device = kernels_of(norm, kernel, device)
    n_inputs, n_weights = NORMS[norm][:2]
    weights = [torch.ones(64, device=device)] * n_weights
    empty = [torch.empty(0, 64, device=device)] * n_inputs
    q, scale = launch_quantized(*empty, *weights, EPS, INT8, 32)[:2]
    assert q.shape == (0, 64) and scale.shape == (0, 2)

    rows = [torch.randn(3, 64, device=device) for _ in range(n_inputs)]
    rows[0][0] = 0.0
    rows[-1][0] = 0.0
    rows[0][1, 40] = torch.nan
    q, scale = launch_quantized(*rows, *weights, EPS, INT8, 32)[:2]
    assert (q[:2] == 0).all() and (scale[0] == 0).all() and scale[1].isnan().all()
    assert scale[2].isfinite().all() and (q[2].abs() == 127).any()


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # inf * 0
@each_kernel
def test_a_nan_in_one_column_shows_in_its_group(kernel, device):
    """An infinite weight of a zero: the other groups keep their values."""
    _, launch_quantized, device = kernels_of("rms_norm", kernel, device)
    x, weight = torch.ones(1, 96, device=device), torch.ones(96, device=device)
    x[0, 40], weight[40] = 0.0, torch.inf
    q, scale = launch_quantized(x, weight, EPS, INT8, 32)
    assert scale[0].isnan().tolist() == [False, True, False]
    assert (q[0, 32:64] == 0).all() and (q[0, :32] == 127).all()


@each_norm
@pytest.mark.parametrize(
    "error, message, dtype, group_size, rounding",
    [
        (
            TypeError,
            r"dtype must be int8 or float8_e4m3fn, got torch.uint8",
            torch.uint8,
            None,
            "hf",
        ),
        (
            ValueError,
            r"group_size must be None or one of .* that divides 96, got 64",
            INT8,
            64,
            "hf",
        ),
        (ValueError, r"group_size must be None or one of .* got 48", FP8, 48, "hf"),
        (ValueError, r"rounding must be 'hf' or 'fp32', got 'bf16'", INT8, None, "bf16"),
    ],
)
def test_rejects(norm, error, message, dtype, group_size, rounding):
    arguments = inputs(norm, (2, 96), torch.float32, "cpu")
    function = partial(getattr(gk, f"{norm}_quantized"), *arguments, EPS)
    with pytest.raises(error, match=f"^{norm}_quantized: {message}"):
        function(dtype, group_size, rounding)


def test_rejects_fp8_on_a_gpu_that_has_none(monkeypatch):
    x = SimpleNamespace(shape=(2, 64), device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    check_quantize_rows("rms_norm_quantized", x, INT8, 64)
    with pytest.raises(TypeError, match=r"^rms_norm_quantized: dtype must be int8 before sm_89"):
        check_quantize_rows("rms_norm_quantized", x, FP8, None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_quantize_rows("rms_norm_quantized", x, FP8, None)


def test_rejects_like_the_norm():
    x, weight = torch.ones(2, 32), torch.ones(31)
    with pytest.raises(ValueError, match=r"^rms_norm_quantized: weight must be \[32\], got \[31\]"):
        gk.rms_norm_quantized(x, weight, EPS, INT8)
    with pytest.raises(ValueError, match=r"^add_rms_norm_quantized: residual must be \[2, 32\]"):
        gk.add_rms_norm_quantized(x, x[:1], torch.ones(32), EPS, INT8)
    with pytest.raises(ValueError, match=r"^sandwich_norm_quantized: pre_weight must be \[32\]"):
        gk.sandwich_norm_quantized(x, x, torch.ones(32), weight, EPS, INT8)


def tensors(outputs):
    return (outputs,) if isinstance(outputs, torch.Tensor) else outputs
