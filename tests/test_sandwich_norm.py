from __future__ import annotations

import pytest
import torch
from kernels import each_kernel, each_kernel_and_dtype
from numerics import assert_bitwise_equal, assert_within_rule
from test_add_rms_norm import Returns

import glm4_kernels as gk
from glm4_kernels.rms_norm import MAX_COLS, rms_norm_reference
from glm4_kernels.sandwich_norm import (
    launch_sandwich_norm,
    sandwich_norm_cpu,
    sandwich_norm_reference,
)

EPS = 1e-5
SHAPES = [
    (1, 4096),  # one token of GLM-4-9B-0414
    (2, 6144),  # GLM-4-32B-0414: not a power of two
    (3, 257),  # nothing divides
    (2, 3, 64),  # leading dimensions
    (5, 1),  # one column
]


def inputs(shape, dtype, device):
    scale = torch.logspace(-3, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    tensors = (
        torch.randn(shape) * scale,
        torch.randn(shape),
        torch.randn(shape[-1]),
        torch.randn(shape[-1]),
    )
    return tuple(tensor.to(dtype).to(device) for tensor in tensors)


def check(kernel, x, residual, post_weight, pre_weight, eps=EPS):
    tensors = (x, residual, post_weight, pre_weight)
    oracle = sandwich_norm_reference(*(tensor.double() for tensor in tensors), eps)
    reference = sandwich_norm_reference(*tensors, eps)
    residual_before = residual.clone()
    kernel = kernel(*tensors, eps)
    for output in (1, 0):  # the sum first: the second norm inherits its error
        assert_within_rule(kernel[output], reference[output], oracle[output])
    assert_bitwise_equal(residual, residual_before)


@each_kernel_and_dtype(launch_sandwich_norm, sandwich_norm_cpu)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, kernel, dtype):
    check(kernel, *inputs(shape, dtype, kernel.device))


def test_reference_is_transformers():
    """The very layer, with the attention's output and the MLP's input in our hands."""
    from transformers.models.glm4.modeling_glm4 import Glm4Config, Glm4DecoderLayer

    config = Glm4Config(hidden_size=320, intermediate_size=8, head_dim=8, rms_norm_eps=EPS)
    layer = Glm4DecoderLayer(config, 0).to(torch.bfloat16)
    x, residual, post_weight, pre_weight = inputs((7, 320), torch.bfloat16, "cpu")
    layer.post_self_attn_layernorm.weight.data = post_weight
    layer.post_attention_layernorm.weight.data = pre_weight
    layer.post_mlp_layernorm.weight.data = -pre_weight
    layer.self_attn = Returns((x, None))
    layer.mlp = Returns(x * 3)

    out = layer(residual)
    y, residual_out = sandwich_norm_reference(x, residual, post_weight, pre_weight, EPS)
    assert_bitwise_equal(y, layer.mlp.received)
    out_again = sandwich_norm_reference(x * 3, residual_out, -pre_weight, post_weight, EPS)[1]
    assert_bitwise_equal(out_again, out)


@each_kernel(launch_sandwich_norm, sandwich_norm_cpu)
def test_rounding_points(kernel):
    """Exact sums of squares (|x| = 2, eps = 0) leave nothing but the rounding of residual'."""
    _, residual, post_weight, pre_weight = inputs((64, 128), torch.float16, kernel.device)
    x = torch.where(residual > 0, 2.0, -2.0).half()
    y, residual_out = kernel(x, residual, post_weight, pre_weight, 0.0)
    reference = sandwich_norm_reference(x, residual, post_weight, pre_weight, 0.0)
    assert_bitwise_equal(residual_out, reference[1])

    unrounded = residual.float() + rms_norm_reference(x, post_weight, 0.0).float()
    rstd = torch.rsqrt(unrounded.square().mean(-1, keepdim=True))
    late = pre_weight * (unrounded * rstd).half()
    assert (late != reference[0]).float().mean() > 0.1
    assert (y != reference[0]).float().mean() < 0.01


@each_kernel(launch_sandwich_norm, sandwich_norm_cpu)
def test_fp32_rounds_the_results_only(kernel):
    tensors = inputs((64, 128), torch.float16, kernel.device)
    once = [t.half() for t in sandwich_norm_reference(*(t.float() for t in tensors), EPS)]
    reference = sandwich_norm_reference(*tensors, EPS, "fp32")
    hf = sandwich_norm_reference(*tensors, EPS)
    oracle = sandwich_norm_reference(*(t.double() for t in tensors), EPS)
    actual = kernel(*tensors, EPS, "fp32")
    for output in (0, 1):
        assert_bitwise_equal(reference[output], once[output])
        assert (once[output] != hf[output]).float().mean() > 0.1
        assert (actual[output] != once[output]).float().mean() < 0.01
        assert_within_rule(actual[output], once[output], oracle[output])


@pytest.mark.parametrize("layout", ["transposed", "slice", "expanded"])
@each_kernel(launch_sandwich_norm, sandwich_norm_cpu)
def test_layouts(layout, kernel):
    wide, other, post_weight, pre_weight = inputs((6, 96), torch.float32, kernel.device)
    x, residual = {
        "transposed": (wide.t()[:, :6], other.t()[:, :6]),
        "slice": (wide[:, 5:70], other[:, 31:]),  # two different offsets
        "expanded": (wide[:1].expand(4, 96), other[2:]),
    }[layout]
    n_cols = x.shape[-1]
    check(kernel, x, residual, post_weight[::2].repeat(2)[:n_cols], pre_weight.flip(0)[:n_cols])


@each_kernel(launch_sandwich_norm, sandwich_norm_cpu)
def test_edges(kernel):
    weight = torch.randn(8, device=kernel.device)
    empty = torch.empty(0, 8, device=kernel.device)
    y, residual_out = kernel(empty, empty, weight, weight, EPS)
    assert y.shape == residual_out.shape == (0, 8)
    check(
        kernel,
        torch.zeros(2, 8, device=kernel.device),
        torch.zeros(2, 8, device=kernel.device),
        weight,
        weight,
    )
    check(kernel, *inputs((1, MAX_COLS), torch.float32, kernel.device))


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"x must be \[\.\.\., N\], got \[\]", {"x": torch.tensor(1.0)}),
        (TypeError, r"x must be float32, bfloat16 or float16", {"x": torch.ones(2, 8).long()}),
        (ValueError, r"post_weight must be \[8\], got \[7\]", {"post_weight": torch.ones(7)}),
        (TypeError, r"pre_weight must be torch.float32", {"pre_weight": torch.ones(8).half()}),
        (ValueError, r"pre_weight must be on cpu", {"pre_weight": torch.ones(8, device="meta")}),
        (ValueError, r"residual must be \[2, 8\], got \[2, 7\]", {"residual": torch.ones(2, 7)}),
        (TypeError, r"residual must be torch.float32", {"residual": torch.ones(2, 8).half()}),
        (ValueError, r"residual must be on cpu", {"residual": torch.ones(2, 8, device="meta")}),
        (ValueError, r"eps must be at least 0", {"eps": -1.0}),
        (RuntimeError, r"pre_weight requires grad", {"pre_weight": torch.ones(8).requires_grad_()}),
    ],
)
def test_rejects(error, message, change):
    arguments = {"x": torch.ones(2, 8), "residual": torch.ones(2, 8), "eps": EPS}
    arguments |= {"post_weight": torch.ones(8), "pre_weight": torch.ones(8)} | change
    with pytest.raises(error, match=f"^sandwich_norm: {message}"):
        gk.sandwich_norm(**arguments)
