"""GLM-4 on one machine: `load` a checkpoint, then `generate` or `logits`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm4.checkpoint import load
    from glm4.checkpoint_file import CheckpointError
    from glm4.model import PRESETS, Config, Model
    from glm4.quantize import quantize_checkpoint

HOMES = {
    "PRESETS": "glm4.model",
    "CheckpointError": "glm4.checkpoint_file",
    "Config": "glm4.model",
    "Model": "glm4.model",
    "load": "glm4.checkpoint",
    "quantize_checkpoint": "glm4.quantize",
}
__all__ = ["PRESETS", "CheckpointError", "Config", "Model", "load", "quantize_checkpoint"]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `glm4 --help` need not wait for torch."""
    if name not in HOMES:
        raise AttributeError(f"module 'glm4' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
