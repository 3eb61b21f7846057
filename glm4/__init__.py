"""GLM-4 on one machine: `load` a checkpoint, then `generate` or `logits`."""

from glm4.checkpoint import CheckpointError, load
from glm4.model import PRESETS, Config, Model

__all__ = ["PRESETS", "CheckpointError", "Config", "Model", "load"]
