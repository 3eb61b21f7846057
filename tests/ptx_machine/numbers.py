"""Number formats as numpy has them and as PTX names them; lanes are the only dimension."""

from __future__ import annotations

import numpy as np
import torch

Array = np.ndarray
LANES = 32
LANE = np.arange(LANES, dtype=np.uint32)
EVERY = np.ones(LANES, dtype=bool)  # all lanes: compared by identity
INTEGERS = {
    f"{kind}{bits}": np.dtype(f"{letter}int{bits}")
    for kind, letter in (("s", ""), ("u", "u"), ("b", "u"))
    for bits in (8, 16, 32, 64)
}
# What a register's bits are read as; formats that numpy lacks stay integers.
TYPES: dict[str, np.dtype] = {
    **INTEGERS,
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    **dict.fromkeys(("f16", "bf16", "e4m3x2"), np.dtype(np.uint16)),
    **dict.fromkeys(("f16x2", "bf16x2"), np.dtype(np.uint32)),
    "f32x2": np.dtype(np.uint64),
    "pred": np.dtype(np.bool_),
}
U32, U64, F32, PREDICATE = (TYPES[name] for name in ("u32", "u64", "f32", "pred"))
FP8_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
POISON = 0xFF  # a byte that nobody wrote: NaN in every float format


class MachineError(Exception):
    """What a GPU would not do, or what this machine cannot."""


def wide(bits: Array, kind: str) -> Array:
    """The numbers behind uint16 `bits`, "f16" or "bf16", in fp32."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)


def narrow(x: Array, kind: str) -> Array:
    """fp32 or fp64 x as uint16 bits, rounded half to even."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def halves(x: Array) -> tuple[Array, Array]:
    """Low and high 16 bits of uint32 x."""
    return (x & 0xFFFF).astype(np.uint16), (x >> 16).astype(np.uint16)


def packed(low: Array, high: Array) -> Array:
    return low.astype(np.uint32) | (high.astype(np.uint32) << 16)


def to_fp8(x: Array) -> Array:
    """fp32 to the bits of e4m3, half to even and saturated, in uint16."""
    clamped = torch.from_numpy(np.ascontiguousarray(x)).clamp(-448.0, 448.0)
    return clamped.to(torch.float8_e4m3fn).view(torch.uint8).numpy().astype(np.uint16)


def flushed(x: Array) -> Array:
    """Subnormals as zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def truncated(x: Array, target: np.dtype) -> Array:
    """Floats to integers as `cvt.rzi`: towards zero, saturated, NaN to 0."""
    low, high = (float(limit) for limit in (np.iinfo(target).min, np.iinfo(target).max))
    return np.clip(np.nan_to_num(x.astype(np.float64)), low, high).astype(target)


def quotient(a: Array, b: Array) -> Array:
    """Integers, rounded towards zero; what a GPU gives for b = 0 is not said, here b = 1."""
    b = np.where(b == 0, 1, b).astype(b.dtype)
    rounded_down = a // b
    return rounded_down + ((rounded_down < 0) & (rounded_down * b != a)).astype(a.dtype)
