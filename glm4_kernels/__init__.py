"""The hot paths of GLM-4 as PyTorch ops."""

from glm4_kernels.rms_norm import rms_norm

__all__ = ["rms_norm"]
