"""The hot paths of GLM-4 as PyTorch ops."""

from glm4_kernels.flash_decode import flash_decode
from glm4_kernels.merge_attention import merge_attention
from glm4_kernels.rms_norm import rms_norm

__all__ = [
    "flash_decode",
    "merge_attention",
    "rms_norm",
]
