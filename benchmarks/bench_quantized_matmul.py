"""Linear layers of GLM-4 with int4 and int8 weights: bytes for few rows, flops for many.

Int8 activations (the default on CPU) are gated against the exact activations, so the tolerance
holds their rounding: max/127 of 128 normal values over sqrt(12), about 0.7 %.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Case
from benchmarks.shapes import SHAPES, TOKENS
from glm4_kernels.quantized_matmul import quantized_matmul
from glm4_kernels.quantized_weight import QuantizedWeight

DTYPE = torch.bfloat16
TOLERANCE = 0.015
GROUP_SIZE = {4: 128, 8: None}
MODEL = "glm-4-9b"
# Two cores unpack 4096 x 4096 in milliseconds; lm_head alone would fill a CPU run.
MATRICES = {"cpu": ("o",), "cuda": ("qkv", "o", "gate_up", "down", "lm_head")}


def cases(device: torch.device) -> Iterator[Case]:
    for bits in (4, 8):
        for matrix in MATRICES[device.type]:
            for n_tokens in TOKENS[device.type]:
                yield case(matrix, bits, n_tokens, device)


def case(matrix: str, bits: int, n_tokens: int, device: torch.device) -> Case:
    n, k = SHAPES[MODEL].linears[matrix]
    n_groups = k // (GROUP_SIZE[bits] or k)
    activations = n_tokens * (n + k) * DTYPE.itemsize

    def inputs() -> tuple[Tensor, QuantizedWeight]:
        x = torch.randn(n_tokens, k, dtype=DTYPE, device=device)
        return x, random_weight(n, k, bits, device)

    return Case(
        op="quantized_matmul",
        label=f"{MODEL} {matrix} int{bits}, {n_tokens} tokens",
        bytes_moved=n * k * bits // 8 + n * n_groups * 2 + activations,
        flops=2 * n_tokens * n * k,
        inputs=inputs,
        contenders={
            "glm4_kernels": quantized_matmul,
            "torch, dequantised first": lambda x, w: x @ w.dequantize(x.dtype).t(),
        },
        oracle=lambda x, w: x.double() @ w.dequantize(torch.float64).t(),
        tolerance=TOLERANCE,
        integer=device.type == "cpu",
    )


def random_weight(n: int, k: int, bits: int, device: torch.device) -> QuantizedWeight:
    """Uniform integers: the kernels do not look at values, and quantising takes longer."""
    qweight = QuantizedWeight.empty((n, k), bits, GROUP_SIZE[bits], DTYPE, None, device)
    qweight.packed.random_(0, 256)
    qweight.scale.uniform_(0.5, 1.0)
    return qweight
