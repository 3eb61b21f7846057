"""Chooses where kernels run: on the GPU if there is one, else under the Triton interpreter, or with
GLM4_COMPILED=90 (80, 89, ...) as compiled for that architecture, on the CPU (ptx_machine)."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from unittest import mock

# One thread, in child processes too: at these sizes a second only waits, and where other programs
# are busy its spinning makes a test fifty times slower. Tests of threads set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from heartbeat import Heartbeat

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
WORKER_BYTES = 1 << 30  # of memory, and of the GPU's, for each process of tests
SLOW = {  # files and tests that take over two seconds of a processor: not in the quick subset
    *("test_ahead_of_time.py", "test_compiled.py", "test_inductor.py", "test_build.py"),
    *("test_decode_schedule.py", "test_dependent_launch.py", "test_openmp.py"),
    *("test_benchmark_gpu.py", "test_benchmark_harness.py", "test_benchmark_models.py"),
    *("test_benchmark_peers.py", "test_benchmark_quality.py", "test_benchmark_report.py"),
    *("test_benchmark_runs.py", "test_batch_invariant", "test_draws_follow_the_distribution"),
    "test_takes_only_what_the_check_admits",
    "test_memory_is_that_of_a_tensor_and_a_shard",
    "test_peak_memory_is_the_model_and_one_tensor",
    "test_damage_on_the_demo_model",
    "test_readme_examples_run",
    "test_closed_streams",
    "test_compiled_without_grad_takes_parameters",
    *("test_without_the_extension", "test_without_triton_the_cpu_serves"),
    *("test_killed_at_any_moment", "test_killed_run", "test_interrupt", "test_reader_that_leaves"),
}


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # but in the process that starts the others
        config.pluginmanager.register(Heartbeat(config))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers() -> int:
    """One for each processor that this process may use, as far as there is memory."""
    from glm4.generation import free_bytes  # now that TRITON_INTERPRET is set

    may_use = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    free = min(free_bytes(torch.device(device)) for device in devices)
    return max(1, min(len(may_use(0)), 8, free // WORKER_BYTES))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu-only", action="store_true", help="leave out tests that run nothing on a GPU"
    )


@pytest.hookimpl(tryfirst=True)  # before -m chooses among them
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_quick(items)
    if config.getoption("--gpu-only"):
        items[:] = filter(uses_gpu, items)


def mark_quick(items: list[pytest.Item]) -> None:
    """The first case of each test, but for the slow and the exhaustive ones."""
    seen: set[tuple[Path, str]] = set()
    for item in items:
        test = item.path, getattr(item, "originalname", item.name)
        slow = not SLOW.isdisjoint((item.path.name, test[1])) or item.get_closest_marker(
            "exhaustive"
        )
        if test not in seen and not slow:
            seen.add(test)
            item.add_marker("quick")


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


@pytest.fixture(scope="session")
def compiler() -> Iterator[Executor]:
    """A process without TRITON_INTERPRET, in which kernels compile."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        with mock.patch.dict(os.environ):
            os.environ.pop("TRITON_INTERPRET", None)
            process.submit(os.getpid).result()  # it has started, in this environment
        yield process


@pytest.fixture
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that takes no time to measure, for the tests of the benchmarks."""
    monkeypatch.setattr("benchmarks.memory.told_cache", lambda: (8 << 20, 1))


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """A repository with results of tiny models, as their files are committed."""
    from benchmark_results import committed_results

    return committed_results(tmp_path)


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
