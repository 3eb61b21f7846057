"""What rounding activations to int8 costs each layer, measured on a few random tokens.

Where one channel of a group is a thousand times its neighbours, their share of the scale rounds
them to zero; if the weights of that channel are small, the output is mostly what was lost.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glm4.random_inputs import random_tokens
from glm4_kernels.extension import HAS_EXTENSION
from glm4_kernels.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from glm4.model import Model

# 0.07 s of one core (Xeon) for a layer of GLM-4-9B in int4, reading the weights twice.
TOKENS = 8
# Of a layer's output. Layers of the demo model and of random weights err by 0.3 to 1.3 %; with one
# input channel 100 times as large and its weights as small, by up to 8 %, with 1000 by 58 %.
LIMIT = 0.05


def warn_of_int8(model: Model) -> None:
    """Warns, naming the layer, where a model on a CPU errs by more than `LIMIT`."""
    errors = int8_errors(model)
    worst = max(errors, key=lambda name: errors[name], default="")
    if worst and errors[worst] > LIMIT:
        n_bad = sum(error > LIMIT for error in errors.values())
        warnings.warn(
            f"int8 activations change the output of {worst} by {errors[worst]:.0%} (over "
            f"{LIMIT:.0%} in {n_bad} of {len(errors)} layers): a few channels are far larger than "
            "the rest; activations 'float' is exact and slower, 'int8' accepts this",
            stacklevel=5,  # who called `load`, past its decorators
        )


def int8_errors(model: Model) -> dict[str, float]:
    """|y' - y| / |y| of each quantised layer, the median over tokens, each on exact inputs."""
    names = {
        weight.packed.data_ptr(): name
        for name, weight in linear_layers(model).items()
        if isinstance(weight, QuantizedWeight)
    }
    if not names or not HAS_EXTENSION:
        return {}
    length = min(TOKENS, model.config.max_positions)
    with BothWays(names) as both:
        model.logits(random_tokens(model.config, length)[None])
    return both.errors


def linear_layers(model: Model) -> dict[str, Any]:
    layers = {"lm_head": model.lm_head}
    for i, block in enumerate(model.blocks):
        attention, mlp = block.attention, block.mlp
        named = {"qkv": attention.qkv, "o": attention.o, "gate_up": mlp.gate_up, "down": mlp.down}
        layers |= {f"layers.{i}.{name}": weight for name, weight in named.items()}
    return layers


class BothWays(TorchDispatchMode):
    """Runs each quantised matmul both ways, and goes on with what float activations give."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names  # by the address of their weights
        self.errors: dict[str, float] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.ops.glm4_kernels.quantized_matmul.default:
            return func(*args, **(kwargs or {}))
        rounded, exact = (func(*args[:8], int8, *args[9:]) for int8 in (True, False))
        self.errors[self.names[args[1].data_ptr()]] = relative(rounded, exact)
        return exact


def relative(actual: Tensor, expected: Tensor) -> float:
    """[T, N] each; 0 for a row of zeros."""
    actual, expected = actual.float(), expected.float()
    errors = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    return errors.nan_to_num_(0.0).median().item()
