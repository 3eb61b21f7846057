"""llama.cpp as a contender on our weights: a GGUF file of them, quantised by llama.cpp itself, and
its low-level interface driven directly, so that nothing of Python stands between two tokens.

    checkpoint (bf16) -> write_gguf -> llama_model_quantize -> repeat_layers -> LlamaCpp

Needs gguf and llama-cpp-python, built for this machine as peers/requirements.txt says. GLM-4-9B is
llama.cpp's architecture `chatglm`, the 0414 models are its `glm4`; both want q, k and v as one
matrix and gate and up as one, gate first, as we hold them. The vocabulary is left out: tokens come
as numbers.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from glm4.model import Config

# Ours -> theirs; `{}` is the layer.
NAMES = {
    "embedding": "token_embd.weight",
    "norm": "output_norm.weight",
    "lm_head": "output.weight",
    "input_norm": "blk.{}.attn_norm.weight",
    "qkv": "blk.{}.attn_qkv.weight",
    "qkv_bias": "blk.{}.attn_qkv.bias",
    "o": "blk.{}.attn_output.weight",
    "post_attention_norm": "blk.{}.post_attention_norm.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "gate_up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
    "post_mlp_norm": "blk.{}.post_ffw_norm.weight",
}


def their_name(ours: str) -> str:
    layer, _, kind = ours.removeprefix("layers.").rpartition(".")
    return NAMES[kind].format(layer)


def writer_of(path: Path, config: Config, layers: int) -> Any:
    """A GGUFWriter that holds everything but tensors."""
    import gguf

    writer = gguf.GGUFWriter(path, "glm4" if config.sandwich else "chatglm")
    writer.add_block_count(layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.eps)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_freq_base(float(config.theta))
    writer.add_vocab_size(config.vocab)
    writer.add_tokenizer_model("none")
    return writer


def write_gguf(path: Path, config: Config, weights: Iterable[tuple[str, Tensor]]) -> None:
    """All of `config.shapes` to one file: matrices in bfloat16, vectors in float32."""
    import gguf

    writer = writer_of(path, config, config.layers)
    for name, weight in weights:
        if weight.dim() == 1:
            writer.add_tensor(their_name(name), weight.float().numpy())
        else:
            raw = weight.to(torch.bfloat16).view(torch.uint8).numpy()
            writer.add_tensor(their_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    finish(writer)


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, target: Path, kind: str, threads: int) -> None:
    """llama.cpp's own quantiser, `kind` one of its names: Q4_0, Q8_0."""
    api = quiet_api()
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = threads
    failed = api.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    if failed:
        raise RuntimeError(f"llama.cpp could not quantise to {kind} ({failed})")


def repeat_layers(source: Path, target: Path, config: Config) -> None:
    """The file again with `config.layers` layers: those it has, over and over."""
    import gguf

    tensors = gguf.GGUFReader(source).tensors
    layers = 1 + max(int(t.name.split(".")[1]) for t in tensors if t.name.startswith("blk."))
    writer = writer_of(target, config, config.layers)
    for tensor in tensors:
        prefix, _, rest = tensor.name.partition(".")
        names = [tensor.name]
        if prefix == "blk":
            layer, _, rest = rest.partition(".")
            names = [f"blk.{i}.{rest}" for i in range(int(layer), config.layers, layers)]
        for name in names:
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
    finish(writer)


def quiet_api() -> Any:
    """The low-level interface, without its log."""
    from llama_cpp import llama_cpp as api

    api.llama_log_set(silent, ctypes.c_void_p(0))
    api.llama_backend_init()
    return api


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def silent(level: int, text: bytes, user_data: int) -> None:
    pass


class LlamaCpp:
    """One model of llama.cpp at its defaults, on `threads` threads; greedy."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        self.api = api = quiet_api()
        began = time.perf_counter()
        params = api.llama_model_default_params()
        self.model = api.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path.name}")
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = context
        params.n_threads = params.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not make a context of {context} tokens")
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.load_seconds = time.perf_counter() - began

    def logits(self, tokens: list[int], fresh: bool) -> numpy.ndarray:
        """Float32 logits that follow the last of `tokens`; `fresh` empties the cache first."""
        api = self.api
        if fresh:
            api.llama_memory_clear(api.llama_get_memory(self.context), True)
        ids = (api.llama_token * len(tokens))(*tokens)
        failed = api.llama_decode(self.context, api.llama_batch_get_one(ids, len(tokens)))
        if failed:
            raise RuntimeError(f"llama_decode failed ({failed})")
        found = api.llama_get_logits_ith(self.context, -1)
        return numpy.ctypeslib.as_array(found, (self.vocab,))

    def next_token(self, tokens: list[int], fresh: bool = False) -> int:
        return int(self.logits(tokens, fresh).argmax())


def step_bytes(path: Path, config: Config, context: int) -> int:
    """Bytes of one decode step: every tensor but the embedding, K and V of `context` tokens in
    fp16 (llama.cpp's default)."""
    import gguf

    weights = sum(
        int(tensor.n_bytes)
        for tensor in gguf.GGUFReader(path).tensors
        if tensor.name != NAMES["embedding"]
    )
    return weights + context * 4 * config.layers * config.kv_heads * config.head_dim


def linear_bits(path: Path, config: Config) -> float:
    """Average bits of a weight over all linear layers, the head included."""
    import gguf

    names = {NAMES[kind].partition("{}.")[2] for kind in ("qkv", "o", "gate_up", "down")}
    chosen = [
        tensor
        for tensor in gguf.GGUFReader(path).tensors
        if tensor.name == NAMES["lm_head"] or tensor.name.split(".", 2)[-1] in names
    ]
    bits = 8 * sum(int(tensor.n_bytes) for tensor in chosen)
    return bits / sum(math.prod(int(n) for n in tensor.shape) for tensor in chosen)
