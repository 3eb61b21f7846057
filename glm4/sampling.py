"""How tokens are chosen from logits, and the numbers that they are drawn with.

The numbers of a prompt depend on its seed alone, so its text depends neither on its neighbours in
the batch nor on the device's random generator.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

import glm4_kernels as gk
from glm4_kernels.library import bad_type, bad_value


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the most likely one (the first, where tied).

    Args:
        temperature: divides the logits; 0 ignores top_k, top_p and seed.
        top_k: keeps the k most likely tokens, and those tied with the last of them.
        top_p: keeps the smallest set of most likely tokens whose probabilities reach p.
        repetition_penalty: tokens of the prompt or the text so far have positive logits divided
            and negative ones multiplied by it.
        seed: prompt i draws from `seed + i`; None takes a fresh seed each time.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):
            _make(self, name, numbers.Real, float, "a number")
        for name in ("top_k", "seed"):
            if getattr(self, name) is not None:
                _make(self, name, numbers.Integral, int, "an integer or None")
        if not 0.0 <= self.temperature < math.inf:
            raise bad_value("generate", "temperature", "at least 0 and finite", self.temperature)
        if self.top_k is not None and self.top_k < 1:
            raise bad_value("generate", "top_k", "at least 1 or None", self.top_k)
        if not 0.0 < self.top_p <= 1.0:
            raise bad_value("generate", "top_p", "over 0 and at most 1", self.top_p)
        if not 0.0 < self.repetition_penalty < math.inf:
            raise bad_value(
                "generate", "repetition_penalty", "over 0 and finite", self.repetition_penalty
            )
        if self.seed is not None and self.seed < 0:
            raise bad_value("generate", "seed", "at least 0 or None", self.seed)

    def uniforms(self, index: int, n_tokens: int) -> Tensor:
        """The numbers in [0, 1) that prompt `index` draws with: [1, n_tokens] float64 ([1, 0] if
        greedy)."""
        if self.temperature == 0.0:
            return torch.empty(1, 0, dtype=torch.float64, device="cpu")
        generator = numpy.random.default_rng(None if self.seed is None else self.seed + index)
        return torch.from_numpy(generator.random((1, n_tokens)))

    def seen(self, prompt: Tensor, vocab_size: int) -> Tensor:
        """Which tokens the penalty applies to at first: [1, vocab_size] bool ([1, 0] if none)."""
        if self.repetition_penalty == 1.0:
            return torch.empty(1, 0, dtype=torch.bool, device=prompt.device)
        seen = torch.zeros(1, vocab_size, dtype=torch.bool, device=prompt.device)
        return seen.index_fill_(1, prompt, True)

    def choose(self, logits: Tensor, uniform: Tensor, seen: Tensor) -> Tensor:
        """The next token of each row; -1 for a row whose logits hold NaN or infinity.

        Args:
            logits: [B, V], float32, bfloat16 or float16.
            uniform: [B] float64 in [0, 1), of no matter if greedy.
            seen: [B, V] bool, or [B, 0]; the chosen tokens are added to it.

        Returns:
            [B] int64.
        """
        penalty, marks = self.repetition_penalty, seen if seen.shape[1] else None
        top_k = None if self.top_k is None else min(self.top_k, logits.shape[1])
        if self.temperature == 0.0:
            return gk.sample(logits, seen=marks, repetition_penalty=penalty)
        return gk.sample(logits, uniform, marks, self.temperature, top_k, self.top_p, penalty)


def _make(settings: Sampling, name: str, kind: type, plain: type, expected: str) -> None:
    """Puts a number of any such kind, numpy's too, as Python's own."""
    value: Any = getattr(settings, name)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise bad_type("generate", name, expected, repr(value))
    try:
        object.__setattr__(settings, name, plain(value))
    except OverflowError:
        object.__setattr__(settings, name, plain("-inf" if str(value)[0] == "-" else "inf"))
