"""torch's OpenMP team and forks.

The threads of a team die with a fork, and the first parallel loop of the child then waits for them
for ever. So the team is dissolved before a fork; parent and child each make a new one at their next
parallel loop. Where the OpenMP library cannot do that, the child gets one thread.
"""

from __future__ import annotations

import ctypes
import os

import torch

OMP_PAUSE_HARD = 2


def survive_forks() -> None:
    """From now on; forks that Python knows of, and not those of C libraries."""
    if not hasattr(os, "register_at_fork"):
        return
    try:
        # Looked up through libtorch_cpu, since a process may hold more than one OpenMP library.
        torch_cpu = ctypes.CDLL("libtorch_cpu.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        pause = torch_cpu.omp_pause_resource_all
    except (OSError, AttributeError):
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
    else:
        os.register_at_fork(before=lambda: pause(OMP_PAUSE_HARD))
