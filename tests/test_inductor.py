"""Every op through torch.compile's default backend and AOTInductor: the numbers are those without,
and what is written is written in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_ops import EXAMPLES, Example, assert_equal, tensors
from torch import Tensor

FIRST = {example.op: example for example in reversed(EXAMPLES)}
each_op = pytest.mark.parametrize("op", sorted(FIRST))


class Step(torch.nn.Module):
    """Ops in turn, between pointwise operations, of their tensors alone: the rest is constant."""

    def __init__(self, examples: list[Example], device: torch.device):
        super().__init__()
        self.examples = [e for e in examples if device.type in e.devices]
        self.arguments = [e.arguments(torch.float32, device) for e in self.examples]

    def tensors(self) -> list[Tensor]:
        return [x.clone() for x in tensors(sum(self.arguments, ()))]

    def forward(self, *given: Tensor) -> list[Tensor]:
        left, outputs = iter(given), []
        for example, arguments in zip(self.examples, self.arguments, strict=True):
            first, *others = (next(left) if isinstance(a, Tensor) else a for a in arguments)
            outputs += [x.float() + 1 for x in tensors(example.public(first * 2, *others))]
        return outputs


def check(step: Step, compiled: Any) -> None:
    """Twice, so that what is written is there to be read."""
    given, expected = step.tensors(), step.tensors()
    for _ in range(2):
        assert_equal(tensors(compiled(*given)), step(*expected))
        assert_equal(given, expected)


def test_compiles_every_op(device):
    """One graph of all."""
    torch._dynamo.reset()
    step = Step(list(FIRST.values()), device)
    check(step, torch.compile(step, fullgraph=True))


@pytest.mark.exhaustive
@each_op
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_each_example(dynamic, op, device):
    """One graph of all examples of an op: most of the time goes to the C++ compiler's start."""
    torch._dynamo.reset()
    step = Step([example for example in EXAMPLES if example.op == op], device)
    check(step, torch.compile(step, fullgraph=True, dynamic=dynamic))


def test_compiles_ahead_of_time(device, tmp_path):
    """One package of all."""
    check_package(Step(list(FIRST.values()), device), tmp_path)


@pytest.mark.exhaustive
@each_op
def test_compiles_each_example_ahead_of_time(op, device, tmp_path):
    check_package(Step([example for example in EXAMPLES if example.op == op], device), tmp_path)


def check_package(step: Step, folder: Any) -> None:
    program = torch.export.export(step, tuple(step.tensors()))
    path = str(folder / "step.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    check(step, torch._inductor.aoti_load_package(path))
