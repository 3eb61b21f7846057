"""What a Triton launch becomes on a GPU that is not here: registers, spills, shared memory,
occupancy, bytes in flight, SASS.

    x = torch.empty(1 << 20, 4096, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(4096, dtype=torch.bfloat16, device="meta")
    for launch in capture(lambda: launch_rms_norm(x, weight, 1e-5), capability=90):
        print(launch.kernel_name, figures(compile_launch(launch)))  # of many, `all_figures`

The launcher runs as it is, on meta tensors (real sizes, no memory, 16-byte aligned as allocations
are), and Triton's own JIT derives types, divisibility and constants; nothing is listed by hand.
Kernel lab only: the library never imports this module. It needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import math
import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Multiprocessor:
    """What one SM holds (CUDA programming guide, "compute capabilities")."""

    shared_bytes: int
    warps: int
    programs: int
    registers: int = 64 * 1024

    @property
    def shared_limit(self) -> int:
        """Shared memory one program may have: all but what the system keeps of it."""
        return self.shared_bytes - SYSTEM_SHARED


SYSTEM_SHARED = 1024  # of every program, in bytes
SHARED_UNIT = 128  # shared memory comes in so many bytes
REGISTER_UNIT = 256  # the registers of one warp come in so many
PARTITIONS = 4  # each with a quarter of the registers
MATRIX_INSTRUCTION = r"\b(?:[HIQO]|HG|UTC\w)MMA\b"
MULTIPROCESSORS = {
    80: Multiprocessor(shared_bytes=164 * 1024, warps=64, programs=32),
    86: Multiprocessor(shared_bytes=100 * 1024, warps=48, programs=16),
    89: Multiprocessor(shared_bytes=100 * 1024, warps=48, programs=24),
    90: Multiprocessor(shared_bytes=228 * 1024, warps=64, programs=32),
    100: Multiprocessor(shared_bytes=228 * 1024, warps=64, programs=32),
    120: Multiprocessor(shared_bytes=100 * 1024, warps=48, programs=24),
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
    shared_bytes: int  # per program
    programs_per_sm: int  # resident at once; 0: not one
    bytes_in_flight: int  # global memory on its way to one SM at most, see `bytes_in_flight`
    loads: dict[str, int]  # global load instructions by width in bits, in the SASS
    mma: str  # "none", "mma", "wgmma" or "tcgen05"
    instructions_per_tile: int | None  # of one warp, see `instructions_per_tile`
    accesses_before_wait: int | None  # to global memory, ahead of griddepcontrol.wait if it waits


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
    return all_figures([compiled])[0]


def all_figures(compiled: list[Any]) -> list[Figures]:
    """Of each of `compiled`, in their order."""
    found: dict[int, Figures] = {}
    for capability in MULTIPROCESSORS:
        places = [i for i, one in enumerate(compiled) if one.metadata.target.arch == capability]
        cubins = [compiled[i].asm["cubin"] for i in places]
        for i, sass in zip(places, disassemble(cubins, capability), strict=True):
            found[i] = _figures(compiled[i], sass)
    return [found[i] for i in range(len(compiled))]


def _figures(compiled: Any, sass: str) -> Figures:
    report = nvidia_tool("cuobjdump", "--dump-resource-usage", content=compiled.asm["cubin"])
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    threads = int(re.search(r"\.reqntid\s+(\d+)", compiled.asm["ptx"]).group(1))  # type: ignore[union-attr]
    shared = compiled.metadata.shared
    capability = compiled.metadata.target.arch
    programs = programs_per_sm(MULTIPROCESSORS[capability], threads // 32, used["REG"], shared)
    return Figures(
        registers=used["REG"],
        spill_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=shared,
        programs_per_sm=programs,
        bytes_in_flight=programs
        * (threads * outstanding_bytes(sass) + pipeline_bytes(compiled.asm["ttgir"])),
        loads=load_widths(sass),
        mma=tensor_core_kind(compiled.asm["ptx"]),
        instructions_per_tile=instructions_per_tile(sass),
        accesses_before_wait=accesses_before_wait(sass),
    )


def disassemble(cubins: list[bytes], capability: int) -> list[str]:
    """The SASS of cubins of one kernel each. Addresses go on from one to the next: all are read by
    one nvdisasm, which takes a third of a second to start, whatever it is given."""
    code = [machine_code(cubin) for cubin in cubins]
    target = f"SM{capability}a" if capability >= 90 else f"SM{capability}"
    text = nvidia_tool("nvdisasm", "--binary", target, content=b"".join(code)) if code else ""
    ends = list(accumulate(map(len, code)))
    lines: list[list[str]] = [[] for _ in code]
    for line, address in re.findall(r"(/\*([0-9a-f]{4,})\*/.*\n)", text):
        lines[bisect_right(ends, int(address, 16))].append(line)
    return ["".join(of_one) for of_one in lines]


def machine_code(cubin: bytes) -> bytes:
    """What the section `.text.<kernel>` of a 64-bit ELF file holds."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(count)]
    first_name = headers[names][4]
    (code,) = [
        cubin[offset : offset + n_bytes]
        for name, _, _, _, offset, n_bytes in headers
        if cubin.startswith(b".text.", first_name + name)
    ]
    return code


def nvidia_tool(name: str, *options: str, content: bytes) -> str:
    """What one of the tools that Triton's wheel carries says of a file with this content."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        command = [str(tool), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def programs_per_sm(sm: Multiprocessor, warps: int, registers: int, shared_bytes: int) -> int:
    """Programs of `warps` warps that one SM holds, as CUDA's occupancy calculator counts."""
    per_warp = -(-32 * registers // REGISTER_UNIT) * REGISTER_UNIT
    warps_with_registers = sm.registers // PARTITIONS // per_warp * PARTITIONS
    shared = -(-shared_bytes // SHARED_UNIT) * SHARED_UNIT + SYSTEM_SHARED
    return min(
        sm.programs,
        sm.warps // warps,
        warps_with_registers // warps,
        sm.shared_bytes // shared,
    )


def outstanding_bytes(sass: str) -> int:
    """Global loads into registers that one thread has under way at most, in bytes: going down the
    SASS, a load ends where an instruction first names a register that it fills."""
    under_way: dict[tuple[int, int], int] = {}  # (first, last register) -> bytes
    most = 0
    for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", sass):
        named = [int(register) for register in re.findall(r"\bR(\d+)\b", instruction)]
        for first, last in list(under_way):
            if any(first <= register <= last for register in named):
                del under_way[first, last]
        if load := re.search(r"\bLDG\b([.\w]*) R(\d+),", instruction):
            size, first = load_bits(load.group(1)) // 8, int(load.group(2))
            under_way[first, first + max(size // 4, 1) - 1] = size
            most = max(most, sum(under_way.values()))
    return most


def pipeline_bytes(ttgir: str) -> int:
    """Shared memory of one program that cp.async or TMA fills while it computes: all stages of the
    pipeline's buffers, the most that can be on its way."""
    size: dict[str, int] = {}
    buffer_of: dict[str, str] = {}
    filled = set()
    for line in ttgir.splitlines():
        if buffer := re.search(
            r"(%\w+) = ttg\.local_alloc.*!ttg\.memdesc<([\dx]+)x([a-z]\w*)", line
        ):
            name, shape, element = buffer.groups()
            bits = re.search(r"\d+", element)
            assert bits is not None, element
            size[name] = math.prod(map(int, shape.split("x"))) * int(bits.group()) // 8
            buffer_of[name] = name
        elif view := re.search(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", line):
            buffer_of[view.group(1)] = buffer_of.get(view.group(2), "")
        elif copy := re.search(r"async_(?:tma_)?(?:copy_global_to_local|gather)\b(.*)", line):
            targets = [buffer_of[n] for n in re.findall(r"%\w+", copy.group(1)) if n in buffer_of]
            assert targets, f"a copy into shared memory of unknown size: {line}"
            filled.update(targets)
    return sum(size[name] for name in filled)


def load_widths(sass: str) -> dict[str, int]:
    """{"128": 4, "16": 1}: global loads by bits a thread; "bulk" counts TMA copies."""
    widths: Counter[str] = Counter()
    for name, modifiers in re.findall(r"\b(LDG|LDGSTS|UTMALDG|UBLKCP)\b([.\w]*)", sass):
        if name in ("UTMALDG", "UBLKCP"):
            widths["bulk"] += 1
        else:
            widths[str(load_bits(modifiers))] += 1
    return dict(sorted(widths.items()))


def load_bits(modifiers: str) -> int:
    """128 for the ".E.128" of a load instruction."""
    bits = re.search(r"\.[US]?(8|16|64|128|256)\b", modifiers)
    return int(bits.group(1)) if bits else 32


def accesses_before_wait(sass: str) -> int | None:
    head, waits, _ = sass.partition("ACQBULK")  # griddepcontrol.wait
    return (
        len(re.findall(r"\b(?:LDG|STG|LDGSTS|ATOMG?|RED|UTMALDG|UBLKCP)\b", head))
        if waits
        else None
    )


def instructions_per_tile(sass: str) -> int | None:
    """Instructions that a warp issues in one pass of the innermost loop with tensor-core
    instructions, the shortest way through it; None without such a loop, which a conditional branch
    closes."""
    code = [
        (int(address, 16), text)
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    ]
    place = {address: i for i, (address, _) in enumerate(code)}
    jumps: dict[int, tuple[int, bool]] = {}  # place -> (place, is conditional)
    for i, (_, text) in enumerate(code):
        if branch := re.search(r"^(@\S+ +)?BRA\b(.*?)0x([0-9a-f]+)", text):
            conditional = bool(branch.group(1)) or "UP" in branch.group(2)
            jumps[i] = place[int(branch.group(3), 16)], conditional
    matrix = [i for i, (_, text) in enumerate(code) if re.search(MATRIX_INSTRUCTION, text)]
    loops = [
        (last - first, first, last)
        for last, (first, conditional) in jumps.items()
        if conditional and any(first <= i <= last for i in matrix)
    ]
    if not loops:
        return None
    _, first, last = min(loops)
    steps = {first: 1}
    queue = [first]
    for i in queue:
        target, conditional = jumps.get(i, (i + 1, False))
        for following in (target, i + 1) if conditional else (target,):
            if first <= following <= last and following not in steps:
                steps[following] = steps[i] + 1
                queue.append(following)
    return steps[last]


def tensor_core_kind(ptx: str) -> str:
    for kind, instruction in (
        ("tcgen05", "tcgen05.mma"),
        ("wgmma", "wgmma.mma_async"),
        ("mma", "mma.sync"),
    ):
        if instruction in ptx:
            return kind
    return "none"
