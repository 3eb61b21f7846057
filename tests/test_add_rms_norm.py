from __future__ import annotations

import pytest
import torch
from kernels import each_kernel, each_kernel_and_dtype
from numerics import assert_bitwise_equal, assert_within_rule

import glm4_kernels as gk
from glm4_kernels.add_rms_norm import add_rms_norm_cpu, add_rms_norm_reference, launch_add_rms_norm
from glm4_kernels.rms_norm import MAX_COLS

EPS = 1.5625e-07
SHAPES = [
    (1, 4096),  # one token of GLM-4-9B
    (3, 257),  # nothing divides
    (2, 3, 64),  # leading dimensions
    (5, 1),  # one column
]


def inputs(shape, dtype, device):
    """x and residual of different sizes from row to row, so that either can carry the sum."""
    scale = torch.logspace(-3, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    tensors = (
        torch.randn(shape) * scale,
        torch.randn(shape) * scale.flip(0),
        torch.randn(shape[-1]),
    )
    return tuple(tensor.to(dtype).to(device) for tensor in tensors)


def check(kernel, x, residual, weight, eps=EPS):
    residual_before = residual.clone()
    oracle = add_rms_norm_reference(x.double(), residual.double(), weight.double(), eps)
    reference = add_rms_norm_reference(x, residual, weight, eps)
    y, residual_out = kernel(x, residual, weight, eps)
    assert_bitwise_equal(residual_out, reference[1])
    assert_within_rule(residual_out, reference[1], oracle[1])
    assert_within_rule(y, reference[0], oracle[0])
    assert_bitwise_equal(residual, residual_before)


@each_kernel_and_dtype(launch_add_rms_norm, add_rms_norm_cpu)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, kernel, dtype):
    check(kernel, *inputs(shape, dtype, kernel.device))


def test_reference_is_transformers():
    """The very layer, with the attention's output and the MLP's input in our hands."""
    from transformers.models.glm.modeling_glm import GlmConfig, GlmDecoderLayer

    config = GlmConfig(hidden_size=320, intermediate_size=8, head_dim=8, rms_norm_eps=EPS)
    layer = GlmDecoderLayer(config, 0).to(torch.bfloat16)
    x, residual, weight = inputs((7, 320), torch.bfloat16, "cpu")
    layer.post_attention_layernorm.weight.data = weight
    layer.self_attn = Returns((x, None))
    layer.mlp = Returns(x * 3)

    out = layer(residual)
    y, residual_out = add_rms_norm_reference(x, residual, weight, EPS)
    assert_bitwise_equal(y, layer.mlp.received)
    assert_bitwise_equal(add_rms_norm_reference(x * 3, residual_out, weight, EPS)[1], out)


class Returns(torch.nn.Module):
    """Stands in for a block: remembers its input and returns what it is told to."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, hidden_states, **_):
        self.received = hidden_states
        return self.value


@each_kernel(launch_add_rms_norm, add_rms_norm_cpu)
def test_rounds_the_sum_before_the_norm(kernel):
    x, residual, weight = inputs((64, 128), torch.float16, kernel.device)
    wide = x.float() + residual.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    unrounded = weight * (wide * rstd).half()
    reference = add_rms_norm_reference(x, residual, weight, EPS)[0]
    y = kernel(x, residual, weight, EPS)[0]
    assert (unrounded != reference).float().mean() > 0.1
    assert (y != reference).float().mean() < 0.01


@each_kernel(launch_add_rms_norm, add_rms_norm_cpu)
def test_fp32_norms_the_unrounded_sum(kernel):
    tensors = inputs((64, 128), torch.float16, kernel.device)
    once = [t.half() for t in add_rms_norm_reference(*(t.float() for t in tensors), EPS)]
    reference = add_rms_norm_reference(*tensors, EPS, "fp32")
    y, residual = kernel(*tensors, EPS, "fp32")
    assert_bitwise_equal(reference[0], once[0])
    assert_bitwise_equal(reference[1], once[1])
    assert_bitwise_equal(residual, once[1])
    assert (once[0] != add_rms_norm_reference(*tensors, EPS)[0]).float().mean() > 0.1
    assert (y != once[0]).float().mean() < 0.01
    oracle = add_rms_norm_reference(*(t.double() for t in tensors), EPS)
    assert_within_rule(y, once[0], oracle[0])


@pytest.mark.parametrize("layout", ["transposed", "slice", "expanded"])
@each_kernel(launch_add_rms_norm, add_rms_norm_cpu)
def test_layouts(layout, kernel):
    wide, other, weight = inputs((6, 96), torch.float32, kernel.device)
    x, residual = {
        "transposed": (wide.t()[:, :6], other.t()[:, :6]),
        "slice": (wide[:, 5:70], other[:, 31:]),  # two different offsets
        "expanded": (wide[:1].expand(4, 96), other[2:]),
    }[layout]
    check(kernel, x, residual, weight[: x.shape[-1]])


@each_kernel(launch_add_rms_norm, add_rms_norm_cpu)
def test_edges(kernel):
    weight = torch.randn(8, device=kernel.device)
    empty = torch.empty(0, 8, device=kernel.device)
    assert [t.shape for t in kernel(empty, empty, weight, EPS)] == [(0, 8), (0, 8)]
    x = torch.randn(2, 8, device=kernel.device)
    check(kernel, x, -x, weight, eps=1e-5)  # the sum is zero
    check(kernel, *inputs((1, MAX_COLS), torch.float32, kernel.device))


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"x must be .* 1 <= N", {"x": torch.empty(2, 0)}),
        (TypeError, r"x must be float32, bfloat16 or float16", {"x": torch.ones(2, 8).long()}),
        (ValueError, r"weight must be \[8\], got \[7\]", {"weight": torch.ones(7)}),
        (ValueError, r"residual must be \[2, 8\], got \[8\]", {"residual": torch.ones(8)}),
        (TypeError, r"residual must be torch.float32", {"residual": torch.ones(2, 8).half()}),
        (ValueError, r"residual must be on cpu", {"residual": torch.ones(2, 8, device="meta")}),
        (ValueError, r"eps must be at least 0", {"eps": float("nan")}),
        (RuntimeError, r"residual requires grad", {"residual": torch.ones(2, 8).requires_grad_()}),
    ],
)
def test_rejects(error, message, change):
    arguments = {"x": torch.ones(2, 8), "residual": torch.ones(2, 8), "weight": torch.ones(8)}
    with pytest.raises(error, match=f"^add_rms_norm: {message}"):
        gk.add_rms_norm(**arguments | {"eps": EPS} | change)
