"""The compiled extension `glm4_kernels._C`: C++ and CUDA kernels that know nothing of torch.

Tensors cross as (address, bytes), or as they are (csrc/tensor.h). Importing this package works
without it; the ops that need it then say how to build it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_C: ModuleType | None = None
_missing = ""
try:
    _module = importlib.import_module("glm4_kernels._C")
    _module.learn_torch(torch)
    _C = _module
except (ImportError, AttributeError) as error:  # none, or one built from older sources
    _missing = str(error)
HAS_EXTENSION = _C is not None

# enum class DType in csrc/float_formats.h
DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.uint8: 3,
    torch.int8: 4,
    torch.float8_e4m3fn: 5,
}
# (address, bytes) of a tensor that is not there
ABSENT = (0, 0)


class MissingExtension(RuntimeError):
    """What was called needs the compiled extension, or its CUDA kernels, and they are not there."""


def extension() -> ModuleType:
    """The compiled module; MissingExtension if it was not built or does not load."""
    if _C is None:
        raise MissingExtension(
            "glm4_kernels was not built: run pip install -e . again, with a C++17 compiler and "
            f"without GLM4_EXTENSION=0 ({_missing})"
        )
    return _C


def direct_call(op: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """An op on CPU tensors as one call of C++, which checks them too, where there is one; it goes
    `otherwise` for what does not fit."""
    return otherwise if _C is None else _C.direct_call(op, otherwise)


def cuda_extension() -> ModuleType:
    """The compiled module, with its CUDA kernels; MissingExtension if it has none."""
    module = extension()
    if not hasattr(module, "quantized_matmul_cuda"):
        message = "glm4_kernels was built without CUDA: install nvcc, then pip install ."
        raise MissingExtension(message)
    return module


def build_info() -> dict[str, Any]:
    """What the extension was built with, and what this processor can run.

    `compiler`, `cuda` (None without), `cuda_architectures` (CMake's form), `sanitize`,
    `cpu_features`, `cpu_variants`, `flash_decode_variants` and `simd_variants` (inner loops it
    runs, best first, of `quantized_matmul`, `flash_decode` and the other ops); or only `error`, if
    there is no extension.
    """
    return {"error": _missing} if _C is None else _C.build_info()


def buffer(tensor: Tensor | None) -> tuple[int, int]:
    """Address of a tensor's first value, and bytes from there: its own if contiguous, else to the
    end of its memory."""
    if tensor is None:
        return ABSENT
    if tensor.is_contiguous():
        return tensor.data_ptr(), tensor.numel() * tensor.element_size()
    begin = int(tensor.storage_offset()) * tensor.element_size()
    return tensor.data_ptr(), tensor.untyped_storage().nbytes() - begin


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous and on a 16-byte boundary, which vector loads need; a copy only where it must."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
