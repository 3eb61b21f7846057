"""GLM-4 on one machine: `load` a checkpoint, then `generate` or `logits`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm4.checkpoint import CheckpointError, load
    from glm4.model import PRESETS, Config, Model

__all__ = ["PRESETS", "CheckpointError", "Config", "Model", "load"]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `glm4 --help` need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'glm4' has no attribute {name!r}")
    home = "glm4.checkpoint" if name in ("CheckpointError", "load") else "glm4.model"
    return getattr(import_module(home), name)
