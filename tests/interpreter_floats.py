"""Teaches Triton's interpreter bfloat16 and float8_e4m3fn as a GPU computes them.

It keeps both as unsigned integers. Its conversions to them round ties away from zero and drop the
carry out of the significand; what is computed in bf16, or converted from integers, it takes for
the integers that it is kept as. Here PyTorch converts, which rounds half to even (where it gives
NaN beyond the largest fp8, `cvt.rn.satfinite` saturates, and so does this), and bf16 is computed in
fp32 and rounded: what bf16 instructions do, since fp32 has more than twice its digits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

FP8, LARGEST = torch.float8_e4m3fn, 448.0
# dtype of PyTorch and the integers to carry it through numpy
FLOATS = {
    tl.float32: (torch.float32, np.int32),
    tl.float16: (torch.float16, np.int16),
    tl.bfloat16: (torch.bfloat16, np.int16),
    tl.float8e4nv: (FP8, np.int8),
}
triton_converts = interpreter._convert_float
triton_casts = InterpreterBuilder.cast_impl
triton_computes = InterpreterBuilder.binary_op
triton_computes_one = InterpreterBuilder.unary_op
triton_multiplies = InterpreterBuilder.create_dot


def convert(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    if not {source, target} & {tl.bfloat16, tl.float8e4nv} or not {source, target} <= {*FLOATS}:
        return triton_converts(values, source, target, rounding_mode)
    dtype, carrier = FLOATS[source]
    bits = np.ascontiguousarray(values).view(carrier)
    wide = torch.from_numpy(bits).view(dtype).float()
    dtype, carrier = FLOATS[target]
    if dtype == FP8:
        wide = torch.where(wide.isnan(), wide, wide.clamp(-LARGEST, LARGEST))
    narrow = wide.to(dtype).view(torch.from_numpy(np.empty(0, carrier)).dtype).numpy()
    return narrow.view(f"u{carrier.__name__}").reshape(values.shape)


def widened(x: TensorHandle) -> TensorHandle:
    """x in fp32 where it is in bf16, else x."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    wide = convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return TensorHandle(wide, tl.float32)


def narrowed(x: TensorHandle) -> TensorHandle:
    """x in bf16 where it is in fp32, else (a comparison) x."""
    if x.data.dtype != np.float32:
        return x
    return TensorHandle(convert(x.data, tl.float32, tl.bfloat16, None), tl.bfloat16)


def constant(builder: InterpreterBuilder, value: float) -> TensorHandle:
    return narrowed(builder.get_fp32(value))


def cast(builder: InterpreterBuilder, x: TensorHandle, target: Any) -> TensorHandle:
    if target.scalar == tl.bfloat16 and x.dtype.scalar != tl.bfloat16:
        return narrowed(triton_casts(builder, x, tl.float32))
    return triton_casts(builder, widened(x), target)


def compute(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, op: Any) -> Any:
    if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
        return triton_computes(builder, a, b, op)
    return narrowed(triton_computes(builder, widened(a), widened(b), op))


def compute_one(builder: InterpreterBuilder, x: TensorHandle, op: Any) -> Any:
    y = triton_computes_one(builder, widened(x), op)
    return narrowed(y) if x.dtype.scalar == tl.bfloat16 else y


def multiply(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> Any:
    return triton_multiplies(builder, widened(a), widened(b), *rest)


interpreter._convert_float = convert
InterpreterBuilder.get_bf16 = constant  # Triton 3.6 has none
InterpreterBuilder.cast_impl = cast
InterpreterBuilder.binary_op = compute
InterpreterBuilder.unary_op = compute_one
InterpreterBuilder.create_dot = multiply
