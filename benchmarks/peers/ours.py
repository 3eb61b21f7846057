"""glm4_kernels.quantized_matmul, in the forms the model uses."""

from __future__ import annotations

import copy
from functools import partial

import torch

from benchmarks.peers import Contender, Layer, Problem
from glm4_kernels.extension import extension
from glm4_kernels.quantize import quantize
from glm4_kernels.quantized_matmul import quantized_matmul
from glm4_kernels.quantized_weight import QuantizedWeight

# Name, bits, group, symmetric, method. The first of its bits is the one that is compared.
FORMS = (
    ("int4 g128", 4, 128, True, "search"),
    ("int4 g32", 4, 32, True, "search"),
    ("int4 g32 hqq", 4, 32, False, "hqq"),
    ("int8", 8, None, True, "search"),
    ("int8 g128", 8, 128, True, "search"),
)


def contenders() -> list[Contender]:
    extension()  # the fallback in torch is no contender
    return [
        Contender(
            f"glm4_kernels {name}",
            bits,
            f"weights {'symmetric' if symmetric else 'with float zero points'}, "
            f"{f'groups of {group}' if group else 'per channel'}; activations int8 by group; "
            "bf16 in and out",
            partial(prepare, (bits, group, symmetric, method)),
        )
        for name, bits, group, symmetric, method in FORMS
    ]


def prepare(form: tuple[int, int | None, bool, str], problem: Problem) -> Layer:
    torch.set_num_threads(problem.threads)
    torch.set_grad_enabled(False)  # once, as the model does, not at each call
    rows = quantize(torch.from_numpy(problem.rows), *form)
    repeated = (None if t is None else t.repeat(problem.repeats, 1) for t in rows.codes())
    first = QuantizedWeight.from_codes(*repeated, rows.bits, rows.group_size)
    others = problem.copies(first.nbytes) - 1
    return Layer(
        nbytes=first.nbytes,
        copies=[first, *(copy.deepcopy(first) for _ in range(others))],
        input=lambda x: torch.from_numpy(x).bfloat16(),
        run=run,
        output=lambda y: y.float().numpy(),
    )


def run(weight: QuantizedWeight, x: torch.Tensor) -> torch.Tensor:
    return quantized_matmul(x, weight)
