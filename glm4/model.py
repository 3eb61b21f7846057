"""GLM-4, dense: one model for the checkpoints of type `chatglm`, `glm` and `glm4`.

What it does differently from Llama:

- RoPE turns interleaved pairs (2i, 2i+1), and only on the first half of each head's dimensions.
- Few KV heads: 2 for 32 or 48 query heads, so groups of 16 and 24.
- q, k and v carry a bias (not in the 32B models); o_proj and the MLP have none.
- gate and up are one matrix, gate first; here q, k and v are one matrix too.
- The 0414 models norm a sublayer's output as well, before it meets the residual ("sandwich").

The residual is a second value threaded through the blocks, so that each "add, then norm" is one
kernel. Rounding is that of transformers' `GlmForCausalLM` and `Glm4ForCausalLM`.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import glm4_kernels as gk
from glm4.attention import Chunk, chunks_of, prefill_attention
from glm4.cache import PAGE_SIZE, Cache, Step
from glm4.threads import Team, check_threads
from glm4_kernels.library import bad_type, bad_value, without_autocast
from glm4_kernels.rope_table import MAX_THETA

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from glm4.decoder import Decoder
    from glm4.generation import Options

# A weight as `linear` takes it: a tensor, or what `gk.quantize` made of one.
Weight = Any

# From this width on, activations of GLM-4 leave fp16's range: the MLP of GLM-4-9B in layer 39, the
# 32B models in many ("!!!!" is what users then read). bf16 has fp32's range and costs the same.
FP16_OVERFLOWS_FROM_HIDDEN = 4096

# `Model.logits` runs this many rows at a time.
LOGITS_ROWS = 2048


@dataclass(frozen=True)
class Config:
    """Sizes and constants of one model. Raises ValueError, naming the field, if they cannot be."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    eps: float
    theta: float
    max_positions: int  # after scaling, where `rope_scaling` extends the context
    qkv_bias: bool
    sandwich: bool
    head_dim: int = 128
    rotary_dim: int = 64
    rope_scaling: dict[str, Any] | None = None  # YaRN, under transformers' names
    tied: bool = False  # the head is the embedding
    eos_token_ids: tuple[int, ...] = (151329, 151336, 151338)

    def __post_init__(self) -> None:
        got = reprlib.repr  # no longer than a line, whatever a config.json holds
        if type(self.head_dim) is not int or self.head_dim not in (64, 128):
            raise ValueError(f"head_dim must be 64 or 128, got {got(self.head_dim)}")
        limits = {
            "layers": 1024,
            "hidden": 32768,  # the norm kernels' limit
            "ffn": 1 << 20,
            "heads": 1024,
            "kv_heads": 1024,
            "vocab": 1 << 24,
            "max_positions": 1 << 22,
            "rotary_dim": self.head_dim,
        }
        for field, limit in limits.items():
            value = getattr(self, field)
            if type(value) is not int or not 1 <= value <= limit:
                raise ValueError(f"{field} must be an integer from 1 to {limit}, got {got(value)}")
        for field, lowest, highest in (("eps", 0, 1), ("theta", 1, MAX_THETA)):
            value = getattr(self, field)
            if type(value) not in (int, float) or not lowest < value < math.inf:
                over = f" over {lowest}" if lowest else ""
                raise ValueError(f"{field} must be a positive number{over}, got {got(value)}")
            if value > highest:
                raise ValueError(f"{field} must be at most {highest:g}, got {got(value)}")
        for field in ("qkv_bias", "sandwich", "tied"):
            if type(getattr(self, field)) is not bool:
                raise ValueError(f"{field} must be true or false, got {got(getattr(self, field))}")
        if self.heads % self.kv_heads or self.heads // self.kv_heads > 32:
            raise ValueError(
                f"heads must be a multiple of kv_heads, at most 32-fold, got {self.heads} heads "
                f"and {self.kv_heads} kv_heads"
            )
        if self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even, got {self.rotary_dim}")
        for token in self.eos_token_ids:
            if type(token) is not int or not 0 <= token < self.vocab:
                raise ValueError(
                    f"eos_token_ids must be below vocab {self.vocab}, got {got(token)}"
                )
        try:
            gk.rope_table(0, self.theta, self.rotary_dim, scaling=self.rope_scaling)
        except (TypeError, ValueError) as error:
            raise ValueError(f"rope_scaling is wrong: {error}") from None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor the model holds, in the order it is used."""
        heads, kv_heads, dim = self.heads, self.kv_heads, self.head_dim
        layer = {
            "input_norm": (self.hidden,),
            "qkv": ((heads + 2 * kv_heads) * dim, self.hidden),
            "qkv_bias": ((heads + 2 * kv_heads) * dim,),
            "o": (self.hidden, heads * dim),
            "post_attention_norm": (self.hidden,),
            "mlp_norm": (self.hidden,),
            "gate_up": (2 * self.ffn, self.hidden),
            "down": (self.hidden, self.ffn),
            "post_mlp_norm": (self.hidden,),
        }
        if not self.qkv_bias:
            del layer["qkv_bias"]
        if not self.sandwich:
            del layer["post_attention_norm"], layer["post_mlp_norm"]
        shapes: dict[str, tuple[int, ...]] = {"embedding": (self.vocab, self.hidden)}
        for i in range(self.layers):
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        return shapes | {"norm": (self.hidden,), "lm_head": (self.vocab, self.hidden)}

    @property
    def parameters(self) -> int:
        shapes = self.shapes
        return sum(math.prod(shapes[name]) for name in shapes if name != "lm_head" or not self.tied)


_9B = Config(
    layers=40,
    hidden=4096,
    ffn=13696,
    heads=32,
    kv_heads=2,
    vocab=151552,
    eps=1.5625e-07,
    theta=1e4,
    max_positions=8192,
    qkv_bias=True,
    sandwich=False,
)
_9B_CHAT = replace(_9B, theta=5e6, max_positions=131072)
_9B_0414 = replace(_9B, eps=1e-5, max_positions=32768, sandwich=True)
_32B_0414 = replace(_9B_0414, layers=61, hidden=6144, ffn=23040, heads=48, qkv_bias=False)

PRESETS = {
    "glm-4-9b": _9B,
    "glm-4-9b-chat": _9B_CHAT,
    "glm-4-9b-chat-1m": replace(_9B, kv_heads=4, theta=1e8, max_positions=1048576),
    "longwriter-glm4-9b": replace(_9B_CHAT, max_positions=1048576),
    "codegeex4-all-9b": replace(_9B_CHAT, eps=1e-5),
    "glm-4-9b-0414": _9B_0414,
    "glm-z1-9b-0414": _9B_0414,
    "glm-4-32b-0414": _32B_0414,
    "glm-4-32b-base-0414": _32B_0414,
    "glm-z1-32b-0414": _32B_0414,
    "glm-z1-rumination-32b-0414": replace(_32B_0414, kv_heads=8, max_positions=131072),
}


class Model:
    """The weights of one GLM-4 on one device, and the passes over them."""

    path: Path | None = None  # the folder it was loaded from, where its tokenizer lies
    # Of the last generation: its pages and graphs serve the next one. Who replaces a weight by
    # another tensor sets this to None, since graphs hold addresses.
    decoder: Decoder | None = None

    def __init__(
        self,
        config: Config,
        weights: dict[str, Weight],
        device: torch.device,
        dtype: torch.dtype,
        rope_mode: str = "reference",
        activations: str | None = None,
        threads: int | None = None,
    ) -> None:
        """`weights` holds every name of `config.shapes`; `glm4.load` and `random` make them.
        `activations` is that of `gk.quantized_matmul`, for the weights that are quantised;
        `threads` that of `glm4.load`."""
        check_dtype(config, dtype)
        self.config, self.device, self.dtype = config, device, dtype
        self.embedding: Tensor = weights["embedding"]
        self.first_norm: Tensor = weights["layers.0.input_norm"]
        self.lm_head = weights["lm_head"]
        self.activations = activations
        self.threads = check_threads("Model", threads)
        self.team = Team(self.threads, on=device.type == "cpu")
        rope = gk.rope_table(
            config.max_positions,
            config.theta,
            rotary_dim=config.rotary_dim,
            mode=rope_mode,
            scaling=config.rope_scaling,
            dtype=dtype if rope_mode == "reference" else torch.float32,
            device=device,
        )
        self.blocks = [Block(config, weights, rope, i, activations) for i in range(config.layers)]

    @classmethod
    @torch.no_grad()
    @without_autocast
    def random(
        cls,
        config: Config,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
        prepare: Callable[[str, Tensor], Weight] = lambda name, weight: weight,
    ) -> Model:
        """A model of true sizes with random weights made on the device, for measurements.

        Args:
            prepare: what becomes of each weight, e.g. `glm4.quantization_policy.preparer("int4")`.
        """
        check_dtype(config, dtype)
        device = torch.device(device)
        generator = torch.Generator(device).manual_seed(seed)

        def made(name: str, shape: tuple[int, ...]) -> Weight:
            weight = torch.empty(shape, dtype=dtype, device=device)
            mean = 1.0 if name.endswith("norm") else 0.0
            return prepare(name, weight.normal_(mean, 0.02, generator=generator))

        weights = {name: made(name, shape) for name, shape in config.shapes.items()}
        return cls(config, weights, device, dtype)

    def new_cache(self, n_pages: int) -> Cache:
        config = self.config
        self.decoder = None  # whose cache may take most of the memory
        return Cache(
            config.layers, n_pages, config.kv_heads, config.head_dim, self.dtype, self.device
        )

    @torch.inference_mode()
    @without_autocast
    def forward(self, step: Step, cache: Cache) -> Tensor:
        """One pass over the rows of `step`, whose K and V it writes into `cache`.

        Returns:
            [T, hidden], after the final norm.
        """
        residual = F.embedding(step.tokens, self.embedding)  # [T, hidden]
        y = gk.rms_norm(residual, self.first_norm, self.config.eps)  # [T, hidden]
        chunks = None if step.spans is None else chunks_of(step)
        if step.seq_lens is not None and self.device.type != "cpu":
            heads = self.config.heads, self.config.kv_heads
            step = replace(step, schedule=gk.decode_schedule(step.seq_lens, *heads))
        for block, k_cache, v_cache in zip(self.blocks, cache.k, cache.v, strict=True):
            self.team.look()
            y, residual = block.forward(y, residual, step, chunks, k_cache, v_cache)
        return y

    @torch.inference_mode()
    @without_autocast
    def head(self, hidden: Tensor) -> Tensor:
        """Next-token logits: [T, hidden] -> [T, vocab]."""
        return linear(hidden, self.lm_head, activations=self.activations)

    @torch.inference_mode()
    def logits(self, token_ids: Tensor) -> Tensor:
        """Logits at every position of B equally long sequences, for evaluation.

        Args:
            token_ids: int64 [B, T].

        Returns:
            float32 [B, T, vocab]: row t has seen tokens 0..t.
        """
        if not isinstance(token_ids, Tensor):
            actual = f"{type(token_ids).__name__}; make one by torch.tensor([[1, 2, 3]])"
            raise bad_type("logits", "token_ids", "an int64 tensor [B, T]", actual)
        if token_ids.dim() != 2 or token_ids.dtype != torch.long:
            actual = f"{token_ids.dtype} {list(token_ids.shape)}"
            raise bad_value("logits", "token_ids", "int64 [B, T]", actual)
        n_sequences, length = token_ids.shape
        config = self.config
        if length > config.max_positions:
            raise bad_value("logits", "token_ids", f"[B, at most {config.max_positions}]", length)
        shape = n_sequences, length, config.vocab
        logits = torch.empty(shape, dtype=torch.float32, device=self.device)
        if token_ids.numel() == 0:
            return logits
        low, high = token_ids.min().item(), token_ids.max().item()
        if low < 0 or high >= config.vocab:
            actual = f"{low} to {high}"
            raise bad_value("logits", "token_ids", f"from 0 to {config.vocab - 1}", actual)
        token_ids = token_ids.to(self.device)

        n_pages = math.ceil(length / PAGE_SIZE)
        cache = self.new_cache(n_sequences * n_pages)
        table = torch.arange(n_sequences * n_pages, dtype=torch.int32, device=self.device)
        table = table.view(n_sequences, n_pages)
        counted = partial(torch.arange, dtype=torch.int64, device=self.device)
        chunk = max(LOGITS_ROWS // n_sequences, 1)
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
            positions = counted(start, stop).repeat(n_sequences)
            first_slot = counted(0, n_sequences) * n_pages * PAGE_SIZE
            step = Step(
                tokens=token_ids[:, start:stop].reshape(-1),
                positions=positions,
                slots=positions + first_slot.repeat_interleave(stop - start),
                block_table=table,
                spans=((start, stop),) * n_sequences,
            )
            with self.team:
                rows = self.head(self.forward(step, cache))  # [B * (stop - start), vocab]
            logits[:, start:stop] = rows.view(n_sequences, stop - start, -1)
        return logits

    def generate(
        self,
        prompts: Iterable[Sequence[int]],
        max_new_tokens: int,
        **options: Unpack[Options],
    ) -> list[list[int]]:
        """New tokens of each prompt; `glm4.generation.generate` says what the options are."""
        from glm4.generation import generate

        return generate(self, prompts, max_new_tokens, **options)


class Block:
    """Attention and MLP, each followed by "add to the residual, then norm for the next"."""

    def __init__(
        self,
        config: Config,
        weights: dict[str, Weight],
        rope: Tensor,
        layer: int,
        activations: str | None = None,
    ) -> None:
        own = f"layers.{layer}."
        last = layer == config.layers - 1
        self.eps = config.eps
        self.attention = Attention(config, weights, rope, own, activations)
        self.mlp = MLP(weights, own, activations)
        self.post_attention_norm: Tensor | None = weights.get(own + "post_attention_norm")
        self.mlp_norm: Tensor = weights[own + "mlp_norm"]
        self.post_mlp_norm: Tensor | None = weights.get(own + "post_mlp_norm")
        self.next_norm: Tensor = weights["norm" if last else f"layers.{layer + 1}.input_norm"]

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        step: Step,
        chunks: list[Chunk] | None,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """x [T, hidden] is the residual, normed; so is what comes back, for the next block."""
        y = self.attention.forward(x, step, chunks, k_cache, v_cache)
        y, residual = add_and_norm(y, residual, self.post_attention_norm, self.mlp_norm, self.eps)
        y = self.mlp.forward(y)
        return add_and_norm(y, residual, self.post_mlp_norm, self.next_norm, self.eps)


class Attention:
    def __init__(
        self,
        config: Config,
        weights: dict[str, Weight],
        rope: Tensor,
        own: str,
        activations: str | None,
    ) -> None:
        self.rope = rope  # [max_positions, rotary_dim], the same for every layer
        self.heads = config.heads
        self.scale = config.head_dim**-0.5
        self.qkv = weights[own + "qkv"]
        self.qkv_bias: Tensor | None = weights.get(own + "qkv_bias")
        self.o = weights[own + "o"]
        self.activations = activations

    def forward(
        self,
        x: Tensor,
        step: Step,
        chunks: list[Chunk] | None,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor:
        qkv = linear(x, self.qkv, self.qkv_bias, self.activations)  # [T, (H + 2G) * D]
        q = gk.rope_kv_write(
            qkv, step.positions, self.rope, k_cache, v_cache, step.slots, self.heads
        )  # [T, H, D]; K and V are in their pages
        if chunks is None:
            assert step.seq_lens is not None
            y = gk.flash_decode(
                *(q, k_cache, v_cache, step.block_table, step.seq_lens, self.scale),
                schedule=step.schedule,
            )  # [T, H, D]
        else:
            y = prefill_attention(q, k_cache, v_cache, chunks, self.scale)  # [T, H, D]
        return linear(y.flatten(1), self.o, activations=self.activations)  # [T, hidden]


class MLP:
    def __init__(self, weights: dict[str, Weight], own: str, activations: str | None) -> None:
        self.gate_up = weights[own + "gate_up"]
        self.down = weights[own + "down"]
        self.activations = activations

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.gate_up, activations=self.activations, swiglu=True)  # [T, ffn]
        return linear(y, self.down, activations=self.activations)


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    activations: str | None = None,
    swiglu: bool = False,
) -> Tensor:
    """x [..., K] @ weight [N, K]^T + bias -> [..., N], whatever form the weight has; with `swiglu`
    its rows are gate | up, and silu(gate) * up comes back."""
    if isinstance(weight, Tensor):
        y = F.linear(x, weight, bias)
        return gk.swiglu(y) if swiglu else y
    return gk.quantized_matmul(x, weight, bias, activations, swiglu)


def add_and_norm(
    x: Tensor, residual: Tensor, post_norm: Tensor | None, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """-> (normed, residual'): residual' = residual + x, x normed first in a sandwich model."""
    if post_norm is None:
        return gk.add_rms_norm(x, residual, norm, eps)
    return gk.sandwich_norm(x, residual, post_norm, norm, eps)


def check_dtype(config: Config, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if overflows(config, dtype):
        raise ValueError(
            "dtype must be bfloat16 or float32, got float16: the activations of GLM-4 at hidden "
            f"size {config.hidden} overflow it and the model would write garbage"
        )


def overflows(config: Config, dtype: torch.dtype) -> bool:
    return dtype == torch.float16 and config.hidden >= FP16_OVERFLOWS_FROM_HIDDEN
