"""Triton where it is installed; where it is not, importing this package still works.

Without Triton, `triton.jit` leaves a kernel as a plain function that nobody calls, `HAS_TRITON` is
false, and `register_op` lets the reference serve on every device (`glm4 env` says so).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def _plain_function(kernel: Any = None, **options: Any) -> Any:
    """`triton.jit`, with options or without."""
    return kernel if kernel is not None else lambda kernel: kernel


try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False
    triton: Any = SimpleNamespace(jit=_plain_function, __version__=None)  # type: ignore[no-redef]
    tl: Any = SimpleNamespace(constexpr=lambda value: value)  # type: ignore[no-redef]

__all__ = ["HAS_TRITON", "tl", "triton"]
