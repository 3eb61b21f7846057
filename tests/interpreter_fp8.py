"""Teaches Triton's interpreter to convert to and from float8_e4m3fn as a GPU does.

Its own conversion rounds ties away from zero and drops the carry out of the significand, so that
fp8 kernels could only be tested on a GPU. PyTorch's conversion rounds half to even; where it gives
NaN beyond the largest value, `cvt.rn.satfinite` saturates, and so does this.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

FP8, LARGEST = torch.float8_e4m3fn, 448.0
WIDE = {tl.float32: np.float32, tl.float16: np.float16}
triton_converts = interpreter._convert_float


def convert(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    if target == tl.float8e4nv and source in WIDE:
        wide = torch.from_numpy(values.view(WIDE[source]).astype(np.float32))
        narrow = torch.where(wide.isnan(), wide, wide.clamp(-LARGEST, LARGEST)).to(FP8)
        return narrow.view(torch.uint8).numpy()
    if source == tl.float8e4nv and target in WIDE:
        narrow = torch.from_numpy(values.view(np.uint8).copy()).view(FP8)
        return (
            narrow.float().numpy().astype(WIDE[target]).view(f"uint{8 * WIDE[target]().itemsize}")
        )
    return triton_converts(values, source, target, rounding_mode)


interpreter._convert_float = convert
