"""The real shapes of GLM-4: the one table that benchmarks and tests draw from."""

from __future__ import annotations

from dataclasses import dataclass

# Tokens of a decode step, and of a prefill that leaves every cache, by type of device.
TOKENS = {"cuda": (1, 8, 64, 8192), "cpu": (1, 8, 64, 512)}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one dense GLM-4 model, as its kernels see them."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    qkv_bias: bool
    sandwich: bool
    head_dim: int = 128
    rotary_dim: int = 64
    vocab: int = 151552

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each matrix of a layer and of the head."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.head_dim, self.hidden),
            "o": (self.hidden, self.heads * self.head_dim),
            "gate_up": (2 * self.ffn, self.hidden),
            "down": (self.hidden, self.ffn),
            "lm_head": (self.vocab, self.hidden),
        }


SHAPES = {
    "glm-4-9b": ModelShape(40, 4096, 13696, 32, 2, True, False),
    "glm-4-9b-chat-1m": ModelShape(40, 4096, 13696, 32, 4, True, False),
    "glm-4-9b-0414": ModelShape(40, 4096, 13696, 32, 2, True, True),
    "glm-4-32b-0414": ModelShape(61, 6144, 23040, 48, 2, False, True),
    "glm-z1-rumination-32b-0414": ModelShape(61, 6144, 23040, 48, 8, False, True),
}
