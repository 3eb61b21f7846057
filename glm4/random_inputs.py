"""What the inputs of every linear layer look like, without any text: random tokens, run through.

A layer's rounding errors cancel best where its inputs correlate, and most of that is the model's
own doing: tokens drawn at random, every id alike, meet the same norms, heads and gates. On the demo
model's held-out text the KL divergence from the model unquantised falls from 25.0 mnat ("search")
to 16.0 (`python -m benchmarks quality`).

`RandomInputs` is shown the tensors one by one, in the order of `config.shapes`, which is that of
their use: so it needs none of them twice, and holds activations only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import glm4_kernels as gk
from glm4.model import Config

SEQUENCES, LENGTH = 8, 512
# Correlations within this many neighbouring channels are seen, a multiple of every group.
BLOCK = 1024


def random_tokens(config: Config, n: int) -> Tensor:
    """[n] int64 on the CPU, the same each time."""
    # Ids from the first stop id on are not text.
    stops = [token for token in config.eos_token_ids if token > config.vocab // 2]
    generator = torch.Generator("cpu").manual_seed(0)
    first_stop = min(stops, default=config.vocab)
    return torch.randint(first_stop, (n,), generator=generator, dtype=torch.int64, device="cpu")


class RandomInputs:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.length = min(LENGTH, config.max_positions)
        self.tokens = random_tokens(config, SEQUENCES * self.length)
        self.expected = iter(config.shapes)

    def see(self, name: str, weight: Tensor) -> list[Tensor] | None:
        """Runs the tokens through `weight`. Of a linear layer, returns E[x x^T] of its inputs, in
        blocks along the diagonal; None of other tensors, and once tensors came out of order."""
        if next(self.expected, None) != name:
            self.expected = iter(())
            return None
        kind = name.rpartition(".")[2]
        if kind == "embedding":
            self.residual = F.embedding(self.tokens.to(weight.device), weight)
            self.x = torch.zeros_like(self.residual)
        elif kind in ("input_norm", "mlp_norm", "norm"):
            self.residual = self.residual + self.x
            self.x = gk.rms_norm(self.residual, weight, self.config.eps)
        elif kind in ("post_attention_norm", "post_mlp_norm"):
            self.x = gk.rms_norm(self.x, weight, self.config.eps)
        elif kind == "qkv_bias":
            self.x += weight
        else:
            if kind == "o":
                self.x = self.attention(self.x)
            moment = self.second_moment()
            if kind == "gate_up":  # a sequence at a time: its outputs are the widest of all
                parts = self.x.split(self.length)
                self.x = torch.cat([gk.swiglu(F.linear(part, weight)) for part in parts])
            elif kind != "lm_head":
                self.x = F.linear(self.x, weight)
            return moment
        return None

    def attention(self, qkv: Tensor) -> Tensor:
        """[T, (H + 2G) * D] -> [T, H * D], causal, sequence by sequence."""
        config = self.config
        sizes = (config.heads, config.kv_heads, config.kv_heads)
        q, k, v = qkv.unflatten(1, (-1, config.head_dim)).split(sizes, dim=1)
        positions = torch.arange(self.length, dtype=torch.int64, device=qkv.device)
        table = gk.rope_table(
            self.length,
            config.theta,
            rotary_dim=config.rotary_dim,
            scaling=config.rope_scaling,
            dtype=qkv.dtype,
            device=qkv.device,
        )
        q, k = gk.rope(q.contiguous(), k.contiguous(), positions.repeat(SEQUENCES), table)
        q, k, v = (x.unflatten(0, (SEQUENCES, -1)).transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(2).flatten(0, 1)

    def second_moment(self) -> list[Tensor]:
        """E[x x^T] in blocks of `BLOCK`, fp32; products of 16-bit inputs are rounded to bfloat16,
        whose 2^-9 is far below what so few tokens resolve."""
        x = self.x if self.x.dtype == torch.float32 else self.x.to(torch.bfloat16)
        blocks = []
        for columns in x.split(BLOCK, dim=1):
            parts = columns.contiguous().split(self.length)
            blocks.append(sum((p.t() @ p).float() for p in parts) / len(x))
        return blocks
