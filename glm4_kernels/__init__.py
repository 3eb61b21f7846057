"""The hot paths of GLM-4 as PyTorch ops."""

from glm4_kernels.add_rms_norm import add_rms_norm, add_rms_norm_quantized
from glm4_kernels.decode_advance import decode_advance
from glm4_kernels.decode_schedule import decode_schedule
from glm4_kernels.flash_decode import flash_decode
from glm4_kernels.library import raise_device_errors
from glm4_kernels.merge_attention import merge_attention
from glm4_kernels.openmp import survive_forks
from glm4_kernels.quantize import quantize
from glm4_kernels.quantized_matmul import int8_activation_error, quantized_matmul
from glm4_kernels.quantized_weight import QuantizedWeight
from glm4_kernels.rms_norm import rms_norm, rms_norm_quantized
from glm4_kernels.rope import rope
from glm4_kernels.rope_kv_write import rope_kv_write
from glm4_kernels.rope_table import rope_table
from glm4_kernels.sample import sample
from glm4_kernels.sandwich_norm import sandwich_norm, sandwich_norm_quantized
from glm4_kernels.swiglu import swiglu

__all__ = [
    "QuantizedWeight",
    "add_rms_norm",
    "add_rms_norm_quantized",
    "decode_advance",
    "decode_schedule",
    "flash_decode",
    "int8_activation_error",
    "merge_attention",
    "quantize",
    "quantized_matmul",
    "raise_device_errors",
    "rms_norm",
    "rms_norm_quantized",
    "rope",
    "rope_kv_write",
    "rope_table",
    "sample",
    "sandwich_norm",
    "sandwich_norm_quantized",
    "swiglu",
]

survive_forks()
