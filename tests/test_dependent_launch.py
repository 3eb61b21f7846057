"""Programmatic dependent launch: a chain of kernels that may overlap gives what it gives in order.

Outputs of one kernel are the next one's inputs, large enough that a kernel still runs when the next
one could start, and memory is reused from step to step: a wait that comes too late shows as values
of a step before.
"""

from __future__ import annotations

import pytest
import torch
from numerics import assert_bitwise_equal

import glm4_kernels as gk
from glm4_kernels.add_rms_norm import launch_add_rms_norm, launch_add_rms_norm_quantized
from glm4_kernels.dependent_launch import dependent
from glm4_kernels.rms_norm import launch_rms_norm
from glm4_kernels.rope import launch_rope
from glm4_kernels.rope_kv_write import launch_rope_kv_write
from glm4_kernels.sandwich_norm import launch_sandwich_norm
from glm4_kernels.swiglu import launch_swiglu

EPS = 1e-5
HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 28, 2, 128, 4096  # (28 + 2 * 2) * 128 = 4096 columns of qkv


class Chain:
    """Every kernel that takes PDL, each reading what the one before it wrote."""

    def __init__(self, n_tokens, dtype, device):
        def new(*shape):
            return torch.randn(shape, device=device).to(dtype)

        self.residual, self.weights = new(n_tokens, HIDDEN), new(4, HIDDEN)
        self.table = gk.rope_table(n_tokens, 1e4, dtype=dtype, device=device)
        self.index = torch.randperm(n_tokens, device=device)
        self.k_cache, self.v_cache = new(2, -(-n_tokens // 64), KV_HEADS, 64, HEAD_DIM)

    def step(self, x, pdl):
        one, two, three, bias = self.weights
        y = launch_rms_norm(x, one, EPS, pdl=pdl)
        y, residual = launch_add_rms_norm(y, self.residual, two, EPS, pdl=pdl)
        q = launch_rope_kv_write(
            *(y, self.index, self.table, self.k_cache, self.v_cache, self.index, HEADS, bias),
            pdl=pdl,
        )
        k = self.k_cache.transpose(1, 2).flatten(0, 1)[: len(x)]
        q, k = launch_rope(q, k, self.index, self.table, pdl=pdl)
        y = torch.cat((q, k, k), dim=1).flatten(1)  # a kernel that knows nothing of all this
        y, residual = launch_sandwich_norm(y, residual, one, three, EPS, pdl=pdl)
        y = launch_swiglu(torch.cat((y, residual), dim=1), pdl=pdl)
        q, scale, residual = launch_add_rms_norm_quantized(
            *(y, residual, two, EPS, torch.int8, 64), pdl=pdl
        )
        return residual, q, scale


@pytest.mark.parametrize("n_tokens", [1, 192, 8192])
def test_overlapping_kernels_give_the_same_bits(n_tokens, device):
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("programmatic dependent launch needs a GPU of sm_90")
    chain = Chain(n_tokens, torch.bfloat16, device)
    xs = torch.randn(20, n_tokens, HIDDEN, device=device).bfloat16().unbind()
    expected = [chain.step(x, pdl=False) for x in xs]
    torch.cuda.synchronize()
    assert_all_equal([chain.step(x, pdl=True) for x in xs], expected)

    x = xs[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = chain.step(x, pdl=True)
    for _ in range(5):
        replayed = []
        for fresh in xs:
            x.copy_(fresh)
            graph.replay()
            replayed.append([output.clone() for output in outputs])
        assert_all_equal(replayed, expected)


def assert_all_equal(actual, expected):
    for step, wanted in zip(actual, expected, strict=True):
        for output, truth in zip(step, wanted, strict=True):
            assert_bitwise_equal(output, truth)


def test_the_chain_carries_its_input_to_its_outputs(device):
    """Else the test above could not fail."""
    chain = Chain(2, torch.bfloat16, device)
    first, second = (
        chain.step(torch.randn(2, HIDDEN, device=device).bfloat16(), pdl=False) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert (a != b).float().mean() > 0.5
    assert all(x.isfinite().all() for x in first)


def test_off_by_default():
    assert dependent(False) == {"PDL": False}
    assert dependent(True) == {"PDL": True, "launch_pdl": True}
