"""Runs PTX on the CPU: what Triton compiled for a GPU that is not here, on ordinary memory.

    with executed_on_cpu(capability=90):
        y = launch_rms_norm(x, weight, 1e-5)  # CPU tensors, the compiled code of sm_90

Every launch inside the block is compiled as on that GPU and executed, program by program, warp by
warp, 32 lanes at a time. What a GPU would fault on, or may do wrongly without telling, is an error:

    an address outside the tensors of the launch, or not a multiple of the access
    shared memory out of bounds; what nobody wrote there, or in a register, is NaN
    lanes apart where the instruction needs them together

A missing barrier or wait shows as a wrong result under some order of events, of which a GPU may
take any: warps run from barrier to barrier one after the other, `forward` or back, and
copies to shared memory happen as early or as `late` as they may.

What it is not: a clock. Approximate instructions (ex2, rsqrt, ...) are exact to the last bit or so.
It knows the instructions that our kernels compile to, and says which one it does not know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime.jit import JITFunction

from glm4_kernels import ahead_of_time
from ptx_machine.numbers import MachineError
from ptx_machine.program import Program, parse, run_block
from ptx_machine.state import Block, Events, GlobalMemory, SharedMemory

__all__ = ["Events", "MachineError", "executed_on_cpu"]


PROGRAMS: dict[Any, tuple[Program, int]] = {}  # by identity of the launch: and shared memory


def bits_of(number: int | float, dtype: np.dtype) -> Any:
    """A launch's argument as a numpy integer, which extends by sign."""
    if dtype.kind == "f":
        return np.array(number, dtype).view(np.int32)[()]
    return np.array(int(number) & (256**dtype.itemsize - 1), f"u{dtype.itemsize}").view(
        f"i{dtype.itemsize}"
    )[()]


@contextmanager
def executed_on_cpu(
    capability: int, events: Events | None = None, counts: Counter[str] | None = None
) -> Iterator[None]:
    """Launches inside the block run here.

    Args:
        counts: counts, if given, the instructions of warps; what their accesses touch ("global
            bytes") and move ("global sectors", of 32 bytes); and how often shared memory is read or
            written ("shared wavefronts"), without bank conflicts once a phase ("shared phases");
            but not what wgmma reads there.
    """
    events, launch_on_gpu = events or Events(), JITFunction.run

    def execute(kernel: Any, *args: Any, grid: Any, **kwargs: Any) -> None:
        with mock.patch.object(JITFunction, "run", launch_on_gpu):
            (launch,) = ahead_of_time.capture(
                lambda: kernel.run(*args, grid=grid, **kwargs), capability
            )
        if launch.identity not in PROGRAMS:
            compiled = ahead_of_time.compile_launch(launch)
            PROGRAMS[launch.identity] = parse(compiled.asm["ptx"]), compiled.metadata.shared
        program, shared_bytes = PROGRAMS[launch.identity]
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        values = [given[name] for name, kind in launch.signature.items() if kind != "constexpr"]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        memory = GlobalMemory(tensors, counts)
        numbers = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values]
        numbers += [0] * (len(program.parameters) - len(numbers))  # scratch that no kernel uses
        parameters = {
            name: bits_of(number, dtype)
            for (name, dtype), number in zip(program.parameters.items(), numbers, strict=True)
        }
        sizes = (*launch.grid, 1, 1)[:3]
        indices = [index[::-1] for index in np.ndindex(sizes[::-1])]
        with np.errstate(all="ignore"):
            for index in indices[:: 1 if events.forward else -1]:
                shared = SharedMemory(shared_bytes, counts)
                run_block(program, Block(memory, shared, parameters, index, sizes, events, counts))

    with mock.patch.object(JITFunction, "run", execute):
        yield
