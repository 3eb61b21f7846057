"""Programmatic dependent launch (sm_90 up): a kernel begins while the one before it still runs.

A kernel launched with `**dependent(True)` may start as soon as every program of the kernel before
it has issued its loads or ended. It may then load what no kernel of the stream writes (norm
weights, biases), and waits before it touches anything else:

    weight = tl.load(weight_ptr + cols, mask=mask)
    wait_for_producers(PDL)
    x = tl.load(x_ptr + cols, mask=mask)
    issue_loads()

The wait ends when all kernels before have ended and their writes are visible, whenever those let
others start. So starting early is safe where every kernel that is launched this way waits before
its first load of what others write, and before its first store.

Off by default: what it gains has not been measured yet.
"""

from __future__ import annotations

from glm4_kernels.triton_import import HAS_TRITON, tl, triton

if HAS_TRITON:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.language.target_info import cuda_capability_geq

COMPILED = tl.constexpr(HAS_TRITON and not triton.knobs.runtime.interpret)


@triton.jit
def wait_for_producers(PDL: tl.constexpr):
    if PDL:
        gdc_wait()


@triton.jit
def issue_loads():
    """From sm_90 on, all loads above are under way before anything below, and kernels that depend
    on this one may start.

    Without this ptxas lets a load that is used late wait until the first have arrived: a second
    latency of the memory. It moves nothing across `griddepcontrol.launch_dependents`, which costs
    one instruction; barriers do not help, since it moves arithmetic across them.
    """
    if COMPILED and cuda_capability_geq(9, 0):
        gdc_launch_dependents()


def dependent(pdl: bool) -> dict[str, bool]:
    """Keywords of a launch of a kernel that takes PDL; the interpreter knows no `launch_pdl`."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
