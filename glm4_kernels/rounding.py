"""Where an op rounds: "hf", at every point where transformers does, so that greedy tokens are its;
or "fp32", its results only, which is closer to the exact value."""

from __future__ import annotations

from typing import Literal

from glm4_kernels.library import bad_value
from glm4_kernels.triton_import import tl, triton

Rounding = Literal["hf", "fp32"]
ROUNDINGS = ("hf", "fp32")


@triton.jit
def round_as_hf(x, dtype: tl.constexpr, HF_ROUNDING: tl.constexpr):
    """x in fp32, rounded to `dtype` or not at all."""
    return x.to(dtype).to(tl.float32) if HF_ROUNDING else x


def check_rounding(op: str, rounding: Rounding) -> None:
    if rounding not in ROUNDINGS:
        raise bad_value(op, "rounding", " or ".join(map(repr, ROUNDINGS)), repr(rounding))
