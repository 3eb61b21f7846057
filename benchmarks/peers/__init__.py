"""Everybody who multiplies by 4- and 8-bit weights on a CPU, each behind the same small interface.

A module here names its package and lists its `contenders`; each runs in a process of its own, as
`serve.py` says, since the thread pools of several OpenMP runtimes fight in one. Nothing here
imports torch before a peer that is torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# Module -> the package whose version decides its times; ours first.
PEERS = {
    "ours": "glm4-kernels",
    "torch_linear": "torch",
    "onnx_runtime": "onnxruntime",
    "ggml": "llama-cpp-python",
    "open_vino": "openvino",
}


@dataclass(frozen=True)
class Problem:
    """The layer y = x W^T that everybody prepares.

    Quantising hundreds of millions of weights takes a while, and no kernel looks at values: W is
    `rows` over and over, and peers repeat what they made of them.
    """

    rows: np.ndarray  # fp32 [R, K], R divides N
    n: int
    rotate_bytes: int  # copies of the quantised weight fill at least so many
    threads: int

    @property
    def repeats(self) -> int:
        return self.n // len(self.rows)

    @property
    def k(self) -> int:
        return self.rows.shape[1]

    def copies(self, nbytes: int) -> int:
        return max(1, math.ceil(self.rotate_bytes / nbytes))


@dataclass
class Layer:
    """A quantised weight, several times over, and how to multiply by it."""

    nbytes: int  # one copy, scales and zero points included
    copies: list[Any]
    input: Callable[[np.ndarray], Any]  # fp32 [M, K] -> what `run` takes, untimed
    run: Callable[[Any, Any], Any]  # (copy, input) -> output, timed
    output: Callable[[Any], np.ndarray]  # -> fp32 [M, N], untimed


@dataclass(frozen=True)
class Contender:
    """One way to multiply.

    Attributes:
        bits: of a weight; contenders of the same number are compared.
        what: what is quantised, and how.
        prepare: ValueError where the shape does not suit the format.
    """

    name: str
    bits: int
    what: str
    prepare: Callable[[Problem], Layer]


def repeated(array: np.ndarray, repeats: int) -> np.ndarray:
    """The rows over and over."""
    return array if repeats == 1 else np.tile(array, (repeats, *[1] * (array.ndim - 1)))
