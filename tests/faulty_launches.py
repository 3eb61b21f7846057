"""Kernels and PTX with a known fault each, for the tests of `ptx_machine`."""

from unittest import mock

import ptx_machine
import torch
import triton
import triton.language as tl
from ptx_machine import Events, MachineError, executed_on_cpu


@triton.jit
def sum_kernel(y_ptr, x_ptr, BLOCK: tl.constexpr):
    """Over four warps: by way of shared memory and a barrier."""
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), axis=0))


@triton.jit
def product_kernel(y_ptr, x_ptr, n, BLOCK: tl.constexpr):
    """Of n tiles, which cp.async brings."""
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    y = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in tl.range(n, num_stages=3):
        x = tl.load(x_ptr + i * BLOCK * BLOCK + rows * BLOCK + cols)
        y = tl.dot(x, x, y)
    tl.store(y_ptr + rows * BLOCK + cols, y)


def total(x):
    """Sums 1024 numbers of x, which may be fewer."""
    y = torch.zeros(1)
    sum_kernel[(1,)](y, x, BLOCK=1024)
    return y, x.sum()[None]


def products():
    x = torch.randn(5, 32, 32, generator=torch.Generator().manual_seed(0)).half()
    y = torch.zeros(32, 32)
    product_kernel[(1,)](y, x, 5, BLOCK=32)
    return y, (x.float() @ x.float()).sum(0)


def verdict(call, capability=80, events=None, old="", new=""):
    """Of a call whose PTX has `new` in place of every `old`."""

    def edited(ptx):
        assert not old or old in ptx, f"no {old} in the PTX"
        return parse(ptx.replace(old, new) if old else ptx)

    parse = ptx_machine.parse
    ptx_machine.PROGRAMS.clear()
    try:
        with (
            mock.patch.object(ptx_machine, "parse", edited),
            executed_on_cpu(capability, events),
        ):
            actual, expected = call()
    except MachineError as error:
        return str(error)
    return "right" if torch.allclose(actual, expected, rtol=1e-3, atol=1e-3) else "wrong"


def verdicts():
    """What the machine said of each, "right" or "wrong" of the result."""
    numbers, one_short = torch.arange(1024.0), torch.arange(1023.0)
    orders = [Events(forward, late) for forward in (True, False) for late in (True, False)]

    def in_all_orders(call, **edit):
        return [verdict(call, events=events, **edit) for events in orders]

    return {
        "sum": in_all_orders(lambda: total(numbers)),
        "sum without barriers": in_all_orders(lambda: total(numbers), old="bar.sync", new="//"),
        "sum out of bounds": verdict(lambda: total(one_short)),
        "sum misaligned": verdict(lambda: total(numbers), old="%rd1 + 0", new="%rd1 + 4"),
        "sum of unknown kind": verdict(lambda: total(numbers), old="add.f32", new="frob.f32"),
        "product": in_all_orders(products),
        "product without barriers": in_all_orders(products, old="bar.sync", new="//"),
        "product without waits": in_all_orders(products, old="cp.async.wait_group", new="//"),
        "product beyond shared memory": verdict(products, old="global_smem;", new="16384;"),
    }
