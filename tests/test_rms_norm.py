from __future__ import annotations

import pytest
import torch
from kernels import each_kernel, each_kernel_and_dtype
from numerics import assert_bitwise_equal, assert_within_rule

import glm4_kernels as gk
from glm4_kernels.rms_norm import MAX_COLS, launch_rms_norm, rms_norm_cpu, rms_norm_reference

EPS = 1.5625e-07
SHAPES = [
    (1, 4096),  # one token of GLM-4-9B
    (2, 6144),  # GLM-4-32B: not a power of two
    (3, 257),  # nothing divides
    (2, 3, 64),  # leading dimensions
    (5, 1),  # one column
]


def inputs(shape, dtype, device):
    scale = torch.logspace(-3, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    x = (torch.randn(shape) * scale).to(dtype).to(device)
    weight = torch.randn(shape[-1]).to(dtype).to(device)
    return x, weight


def check(kernel, x, weight, eps=EPS):
    oracle = rms_norm_reference(x.double(), weight.double(), eps)
    assert_within_rule(kernel(x, weight, eps), rms_norm_reference(x, weight, eps), oracle)


@each_kernel_and_dtype(launch_rms_norm, rms_norm_cpu)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, kernel, dtype):
    check(kernel, *inputs(shape, dtype, kernel.device))


def test_reference_is_transformers():
    from transformers.models.glm4.modeling_glm4 import Glm4RMSNorm

    x, weight = inputs((7, 320), torch.bfloat16, "cpu")
    norm = Glm4RMSNorm(320, eps=EPS).to(torch.bfloat16)
    norm.weight.data = weight
    assert_bitwise_equal(rms_norm_reference(x, weight, EPS), norm(x).detach())


@each_kernel(launch_rms_norm, rms_norm_cpu)
def test_rounds_before_the_weight(kernel):
    # 1.5 + 1 ulp is where rounding before and after the product differ in many columns.
    x, _ = inputs((64, 128), torch.float16, kernel.device)
    weight = torch.full((128,), 1.5 + 2**-10, dtype=torch.float16, device=kernel.device)
    late = (rms_norm_reference(x.float(), weight.float(), EPS)).half()
    reference = rms_norm_reference(x, weight, EPS)
    assert (late != reference).any(), "these inputs cannot tell the two orders apart"
    assert ((kernel(x, weight, EPS) != reference).float().mean()) < 0.01


@each_kernel(launch_rms_norm, rms_norm_cpu)
def test_fp32_rounds_once(kernel):
    x, weight = inputs((64, 128), torch.float16, kernel.device)
    once = rms_norm_reference(x.float(), weight.float(), EPS).half()
    assert_bitwise_equal(rms_norm_reference(x, weight, EPS, "fp32"), once)
    assert (once != rms_norm_reference(x, weight, EPS)).float().mean() > 0.1
    y = kernel(x, weight, EPS, "fp32")
    assert (y != once).float().mean() < 0.01
    assert_within_rule(y, once, rms_norm_reference(x.double(), weight.double(), EPS))


@pytest.mark.parametrize("layout", ["transposed", "slice", "expanded"])
@each_kernel(launch_rms_norm, rms_norm_cpu)
def test_layouts(layout, kernel):
    wide, weight = inputs((6, 96), torch.float32, kernel.device)
    x = {"transposed": wide.t()[:, :6], "slice": wide[:, 5:70], "expanded": wide[:1].expand(4, 96)}
    check(kernel, x[layout], weight[: x[layout].shape[-1]])


@each_kernel(launch_rms_norm, rms_norm_cpu)
def test_edges(kernel):
    weight = torch.randn(8, device=kernel.device)
    assert kernel(torch.empty(0, 8, device=kernel.device), weight, EPS).shape == (0, 8)
    check(kernel, torch.zeros(2, 8, device=kernel.device), weight, eps=1e-5)
    check(
        kernel,
        torch.randn(1, MAX_COLS, device=kernel.device),
        torch.randn(MAX_COLS, device=kernel.device),
    )


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"x must be \[\.\.\., N\], got \[\]", {"x": torch.tensor(1.0)}),
        (ValueError, r"x must be .* 1 <= N", {"x": torch.empty(2, 0)}),
        (TypeError, r"x must be float32, bfloat16 or float16", {"x": torch.ones(2, 8).long()}),
        (ValueError, r"weight must be \[8\], got \[7\]", {"weight": torch.ones(7)}),
        (TypeError, r"weight must be torch.float32", {"weight": torch.ones(8).half()}),
        (ValueError, r"weight must be on cpu", {"weight": torch.ones(8, device="meta")}),
        (ValueError, r"eps must be at least 0", {"eps": -1.0}),
        (ValueError, r"rounding must be 'hf' or 'fp32', got 'bf16'", {"rounding": "bf16"}),
        (RuntimeError, r"x requires grad", {"x": torch.ones(2, 8, requires_grad=True)}),
    ],
)
def test_rejects(error, message, change):
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(8), "eps": EPS} | change
    with pytest.raises(error, match=f"^rms_norm: {message}"):
        gk.rms_norm(**arguments)
