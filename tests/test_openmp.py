from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

import glm4
import glm4_kernels as gk
from glm4_kernels.swiglu import swiglu_reference

SECONDS = 60  # for a child that has work for a moment


def answers(model: glm4.Model) -> list[object]:
    """Of the model, an op, a reference, and torch itself, at sizes that take a team."""
    x = torch.arange(1 << 20, dtype=torch.float32).view(512, 2048) / (1 << 20)
    values = (gk.swiglu(x), swiglu_reference(x), x @ x.T)
    return [model.generate([[1, 2, 3]] * 4, 3), *(value.double().sum().item() for value in values)]


def main(quantize: str) -> None:
    """As a parent whose team has worked."""
    torch.set_num_threads(2)
    model = glm4.load("demo", quantize=quantize or None, progress=False)
    expected = answers(model)
    fork = multiprocessing.get_context("fork")

    def check(generations: int) -> None:
        assert torch.get_num_threads() == 2
        assert answers(model) == expected
        if generations:
            child = fork.Process(target=check, args=(generations - 1,))
            child.start()
            child.join(SECONDS)
            assert child.exitcode == 0, child.exitcode
            assert answers(model) == expected

    check(2)  # a child and its own child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.parametrize("quantize", ["", "int8"])
def test_children_compute(quantize):
    path = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
    # Waiting threads sleep: on a busy machine they would keep those that work from it.
    environment = os.environ | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE"}
    script = f"import test_openmp; test_openmp.main({quantize!r})"
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, start_new_session=True, stderr=-1
    ) as process:
        try:
            _, error = process.communicate(timeout=3 * SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            pytest.fail("hangs")
        assert process.returncode == 0, error.decode()
