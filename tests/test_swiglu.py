from __future__ import annotations

import pytest
import torch
from kernels import each_kernel, each_kernel_and_dtype
from numerics import assert_bitwise_equal, assert_within_rule

import glm4_kernels as gk
from benchmarks.shapes import SHAPES as MODELS
from glm4_kernels.swiglu import column_block, launch_swiglu, swiglu_cpu, swiglu_reference

SHAPES = [
    (1, 2 * 13696),  # one token of GLM-4-9B: the narrowest blocks
    (66, 2 * 1025),  # wide blocks, the second of each row all but empty
    (1056, 2 * 3),  # the widest blocks, all but empty
    (3, 2 * 257),  # nothing divides
    (2, 3, 2 * 64),  # leading dimensions
    (5, 2),  # one column
]


def inputs(shape, dtype, device):
    scale = torch.logspace(-2, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return (torch.randn(shape) * scale).to(dtype).to(device)


def check(kernel, gate_up):
    oracle = swiglu_reference(gate_up.double())
    assert_within_rule(kernel(gate_up), swiglu_reference(gate_up), oracle)


@each_kernel_and_dtype(launch_swiglu, swiglu_cpu)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, kernel, dtype):
    check(kernel, inputs(shape, dtype, kernel.device))


def test_reference_is_transformers():
    from transformers.models.glm4.modeling_glm4 import Glm4Config, Glm4MLP

    mlp = Glm4MLP(Glm4Config(hidden_size=8, intermediate_size=8))
    mlp.gate_up_proj = mlp.down_proj = torch.nn.Identity()
    gate_up = inputs((7, 640), torch.bfloat16, "cpu")
    assert_bitwise_equal(swiglu_reference(gate_up), mlp(gate_up))


@each_kernel(launch_swiglu, swiglu_cpu)
def test_rounds_silu_before_the_product(kernel):
    gate_up = inputs((64, 256), torch.float16, kernel.device)
    gate, up = gate_up.float().chunk(2, -1)
    late = (torch.nn.functional.silu(gate) * up).half()
    reference = swiglu_reference(gate_up)
    assert (late != reference).float().mean() > 0.1
    assert (kernel(gate_up) != reference).float().mean() < 0.01


@each_kernel(launch_swiglu, swiglu_cpu)
def test_fp32_rounds_once(kernel):
    gate_up = inputs((64, 256), torch.float16, kernel.device)
    gate, up = gate_up.float().chunk(2, -1)
    once = (torch.nn.functional.silu(gate) * up).half()
    assert_bitwise_equal(swiglu_reference(gate_up, "fp32"), once)
    y = kernel(gate_up, "fp32")
    assert (y != once).float().mean() < 0.01
    assert_within_rule(y, once, swiglu_reference(gate_up.double()))


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 8, 64, 4096])
@pytest.mark.parametrize("model", ["glm-4-9b", "glm-4-32b-0414"])
def test_fills_the_gpu(model, n_tokens):
    n_cols = MODELS[model].ffn
    block_n = column_block(n_tokens, n_cols, multiprocessors=132)
    programs = n_tokens * -(-n_cols // block_n)
    assert programs >= (132 if block_n < 2048 else 8 * 132)
    wider = n_tokens * -(-n_cols // (2 * block_n))
    assert block_n == 2048 or wider < (132 if block_n < 1024 else 8 * 132), "could be wider"


@pytest.mark.parametrize("layout", ["transposed", "slice", "expanded"])
@each_kernel(launch_swiglu, swiglu_cpu)
def test_layouts(layout, kernel):
    wide = inputs((6, 96), torch.float32, kernel.device)
    gate_up = {
        "transposed": wide.t()[:, :6],
        "slice": wide[::2, 5:71],  # rows and columns of a wider buffer
        "expanded": wide[:1].expand(4, 96),
    }[layout]
    check(kernel, gate_up)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@each_kernel(launch_swiglu, swiglu_cpu)
def test_edges(kernel):
    assert kernel(torch.empty(0, 8, device=kernel.device)).shape == (0, 4)
    assert kernel(torch.ones(8, device=kernel.device)).shape == (4,)
    # exp(-g) overflows to infinity: silu is -0 there, and g where exp(-g) vanishes.
    gate_up = torch.tensor([[-1e4, 1e4, 0.0, 2.0, 3.0, 4.0]], device=kernel.device)
    expected = torch.tensor([[-0.0, 3e4, 0.0]], device=kernel.device)
    assert_bitwise_equal(kernel(gate_up), expected)


@pytest.mark.parametrize(
    "error, message, gate_up",
    [
        (ValueError, r"gate_up must be \[\.\.\., 2F\] .*, got \[\]", torch.tensor(1.0)),
        (ValueError, r"gate_up must be \[\.\.\., 2F\] .*, got \[2, 7\]", torch.ones(2, 7)),
        (ValueError, r"gate_up must be \[\.\.\., 2F\] .*, got \[2, 0\]", torch.ones(2, 0)),
        (TypeError, r"gate_up must be float32, bfloat16 or float16", torch.ones(2, 8).long()),
        (RuntimeError, r"gate_up requires grad", torch.ones(2, 8, requires_grad=True)),
    ],
)
def test_rejects(error, message, gate_up):
    with pytest.raises(error, match=f"^swiglu: {message}"):
        gk.swiglu(gate_up)
