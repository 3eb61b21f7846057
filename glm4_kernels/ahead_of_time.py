"""What a Triton launch becomes on a GPU that is not here: registers, spills, shared memory, SASS.

    x = torch.empty(1 << 20, 4096, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(4096, dtype=torch.bfloat16, device="meta")
    for launch in capture(lambda: launch_rms_norm(x, weight, 1e-5), capability=90):
        print(launch.kernel_name, figures(compile_launch(launch)))

The launcher runs as it is, on meta tensors (real sizes, no memory, 16-byte aligned as allocations
are), and Triton's own JIT derives types, divisibility and constants; nothing is listed by hand.
Kernel lab only: the library never imports this module. It needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# Shared memory one block may have, in bytes (CUDA programming guide, "compute capabilities").
SHARED_LIMIT = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}


@dataclass(frozen=True)
class Launch:
    """One `kernel[grid](...)` of a launcher, specialised as the JIT would for `capability`."""

    kernel: Any  # triton.JITFunction
    capability: int
    grid: tuple[int, ...]
    integers: dict[str, int]  # run-time arguments, by name
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    key: str

    @property
    def kernel_name(self) -> str:
        return self.kernel.fn.__qualname__

    @property
    def identity(self) -> tuple[str, str, int]:
        """Equal for launches that compile to the same binary."""
        return self.kernel.fn.__module__, self.kernel_name + self.key, self.capability


@dataclass(frozen=True)
class Figures:
    """What ptxas made of one launch."""

    registers: int  # per thread
    spill_bytes: int  # local memory per thread
    shared_bytes: int  # per block
    loads: dict[str, int]  # global load instructions by width in bits, in the SASS
    mma: str  # "none", "mma", "wgmma" or "tcgen05"


def capture(launcher: Callable[[], Any], capability: int) -> list[Launch]:
    """Runs `launcher` and returns what it would have launched on a GPU of `capability` (90, ...).

    Raises whatever the launcher raises: on meta tensors, reading a value (`.item()`) is an error.
    """
    launches: list[Launch] = []
    grids: list[tuple[tuple[int, ...], dict[str, int]]] = []
    run = JITFunction.run

    def remember_grid(kernel: Any, *args: Any, grid: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        grid = grid(arguments) if callable(grid) else grid
        integers = {name: value for name, value in arguments.items() if type(value) is int}
        grids.append((tuple(grid), integers))
        return run(kernel, *args, grid=grid, **kwargs)

    def remember_specialisation(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        grid, integers = grids[-1]
        options = json.loads(compile["specialization_data"])["options"]
        launches.append(
            Launch(
                kernel=fn.jit_function,
                capability=capability,
                grid=grid,
                integers=integers,
                signature=compile["signature"],
                constants=compile["constants"],
                attributes=compile["configs"][0],
                options={k: tuple(v) if isinstance(v, list) else v for k, v in options.items()},
                key=compile["key"],
            )
        )
        return True  # Triton then neither compiles nor launches

    with (
        _pretended_device(capability),
        mock.patch.object(JITFunction, "run", remember_grid),
        triton.knobs.runtime.scope(),
    ):
        triton.knobs.runtime.jit_cache_hook = remember_specialisation
        launcher()
    return launches


@contextmanager
def _pretended_device(capability: int) -> Iterator[None]:
    """Triton's driver for a GPU that need not exist; the JIT asks it for the target only."""

    class PretendedDriver:
        def get_current_device(self) -> str:
            return f"sm_{capability}"

        def get_current_stream(self, device: str) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

    before = driver._active
    driver.set_active(PretendedDriver())
    try:
        yield
    finally:
        driver._active = before


def compile_launch(launch: Launch) -> Any:
    """Triton's CompiledKernel, made with no GPU; its `.asm` holds ttir, ttgir, llir, ptx, cubin."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    target = GPUTarget("cuda", launch.capability, 32)
    with _pretended_device(launch.capability):
        return triton.compile(source, target=target, options=launch.options)


def figures(compiled: Any) -> Figures:
    """Reads the binary with the cuobjdump that Triton's wheel carries."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [str(cuobjdump), "--dump-resource-usage", "-sass", cubin.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Figures(
        registers=used["REG"],
        spill_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        loads=load_widths(text),
        mma=tensor_core_kind(compiled.asm["ptx"]),
    )


def load_widths(sass: str) -> dict[str, int]:
    """{"128": 4, "16": 1}: global loads by bits a thread; "bulk" counts TMA copies."""
    widths: Counter[str] = Counter()
    for name, modifiers in re.findall(r"\b(LDG|LDGSTS|UTMALDG|UBLKCP)\b([.\w]*)", sass):
        if name in ("UTMALDG", "UBLKCP"):
            widths["bulk"] += 1
        else:
            bits = re.search(r"\.[US]?(8|16|64|128|256)\b", modifiers)
            widths[bits.group(1) if bits else "32"] += 1
    return dict(sorted(widths.items()))


def tensor_core_kind(ptx: str) -> str:
    for kind, instruction in (
        ("tcgen05", "tcgen05.mma"),
        ("wgmma", "wgmma.mma_async"),
        ("mma", "mma.sync"),
    ):
        if instruction in ptx:
            return kind
    return "none"
