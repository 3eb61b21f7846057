"""Chooses where kernels run: on the GPU if there is one, else under the Triton interpreter, or with
GLM4_COMPILED=90 (80, 89, ...) as compiled for that architecture, on the CPU (ptx_machine)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# One thread, in child processes too: at these sizes a second only waits, and where other programs
# are busy its spinning makes a test fifty times slower. Tests of threads set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

COMPILED = os.environ.get("GLM4_COMPILED")
if COMPILED and not torch.cuda.is_available():
    from ptx_machine import executed_on_cpu

    LAUNCHES = executed_on_cpu(int(COMPILED))
    LAUNCHES.__enter__()  # until the process ends
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported anywhere
    with suppress(ImportError):
        import interpreter_floats  # noqa: F401

from glm4_kernels.extension import HAS_EXTENSION, MissingExtension  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu-only", action="store_true", help="leave out tests that run nothing on a GPU"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--gpu-only"):
        items[:] = filter(uses_gpu, items)


def uses_gpu(item: pytest.Item) -> bool:
    """By the kernel that a test is parametrised with, else by the `device` fixture."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "kernel" in parameters:
        return parameters["kernel"].device.type == "cuda"
    return "device" in item.fixturenames


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """In a checkout without the compiled extension, skips what needs it."""
    try:
        yield
    except MissingExtension as error:
        if HAS_EXTENSION:
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where `launch_<op>` runs in this session."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is NaN (integers: the largest value), so an output that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20240605)
