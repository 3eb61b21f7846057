"""What compiled kernels move, counted by `ptx_machine`: JSON, by architecture and launch.

PYTHONPATH=.:tests python tests/memory_traffic.py | python -m json.tool
"""

import json
from collections import Counter
from functools import partial

import torch
from ptx_machine import executed_on_cpu

from glm4_kernels.add_rms_norm import launch_add_rms_norm
from glm4_kernels.decode_schedule import decode_schedule_reference
from glm4_kernels.flash_decode import launch_flash_decode
from glm4_kernels.rms_norm import launch_rms_norm
from glm4_kernels.sandwich_norm import launch_sandwich_norm

BF16, INT8, FP8 = torch.bfloat16, torch.int8, torch.float8_e4m3fn


def attention(heads, cache_dtype):
    """512 keys of one KV head, by one program."""
    lengths = torch.tensor([512], dtype=torch.int32)
    q = torch.randn(1, heads, 128).to(BF16)
    k, v = torch.randn(2, 8, 1, 64, 128).to(cache_dtype)
    scales = (None, None) if cache_dtype == BF16 else torch.rand(2, 8, 1, 64).unbind()
    schedule = decode_schedule_reference(lengths, heads, 1, programs=1)
    table = torch.arange(8, dtype=torch.int32)[None]
    return partial(launch_flash_decode, q, k, v, table, lengths, 0.09, *scales, schedule)


def launches():
    x, weight = torch.randn(2, 4096).to(BF16), torch.ones(4096).to(BF16)
    yield "rms_norm", partial(launch_rms_norm, x, weight, 1e-5)
    yield "add_rms_norm", partial(launch_add_rms_norm, x, x, weight, 1e-5)
    yield "sandwich_norm", partial(launch_sandwich_norm, x, x, weight, weight, 1e-5)
    for heads in (8, 16, 24):
        for cache_dtype in (BF16, INT8, FP8):
            yield f"flash_decode, {heads} heads, {cache_dtype}", attention(heads, cache_dtype)


def counted(launch, capability):
    counts = Counter()
    with executed_on_cpu(capability, counts=counts):
        launch()
    return counts


def measured():
    return {
        f"sm_{capability}": {
            name: counted(launch, capability)
            for name, launch in launches()
            if capability >= 89 or str(FP8) not in name
        }
        for capability in (80, 90)
    }


if __name__ == "__main__":
    print(json.dumps(measured()))
