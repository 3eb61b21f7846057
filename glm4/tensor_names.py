"""What a checkpoint calls the tensors of `Config.shapes`: transformers' names or the remote code's.

    transformers    model.layers.N.self_attn.{q,k,v}_proj.weight    (q, k, v become one matrix)
    remote code     transformer.encoder.layers.N.self_attention.query_key_value.weight

and either without its first part, as the base model alone is saved: transformers' has no head.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from glm4.model import Config

# By transformers, by the remote code; more than one name: the rows, in that order.
NAMES = {
    "embedding": ("embed_tokens.weight", "embedding.word_embeddings.weight"),
    "norm": ("norm.weight", "encoder.final_layernorm.weight"),
    "lm_head": ("lm_head.weight", "output_layer.weight"),
}
LAYERS = ("layers.{}.", "encoder.layers.{}.")
LAYER_NAMES = {
    "input_norm": ("input_layernorm.weight",) * 2,
    "qkv": (
        "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight",
        "self_attention.query_key_value.weight",
    ),
    "qkv_bias": (
        "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias",
        "self_attention.query_key_value.bias",
    ),
    "o": ("self_attn.o_proj.weight", "self_attention.dense.weight"),
    "post_attention_norm": ("post_self_attn_layernorm.weight",) * 2,
    "mlp_norm": ("post_attention_layernorm.weight",) * 2,
    "gate_up": ("mlp.gate_up_proj.weight", "mlp.dense_h_to_4h.weight"),
    "down": ("mlp.down_proj.weight", "mlp.dense_4h_to_h.weight"),
    "post_mlp_norm": ("post_mlp_layernorm.weight",) * 2,
}
# First parts of the names above, whether or not those of the base model stand before them.
ROOTS = {"model", "transformer"} | {
    name.partition(".")[0] for names in (*NAMES.values(), LAYERS) for name in names
}


@dataclass(frozen=True)
class Naming:
    """One of the families; `bare`: without its first part."""

    remote_code: bool = False
    bare: bool = False

    def on_disk(self, config: Config, ours: str) -> dict[str, int]:
        """The tensors that a tensor of `config.shapes` is stored as: each name and its rows, in
        order of the rows."""
        rows = config.shapes[ours][0]
        layer, _, kind = ours.removeprefix("layers.").rpartition(".")
        own = "" if self.bare else "transformer." if self.remote_code else "model."
        if not layer:
            own = "" if kind == "lm_head" and not self.remote_code else own
            return {own + NAMES[kind][self.remote_code]: rows}
        own += LAYERS[self.remote_code].format(layer)
        names = [own + name for name in LAYER_NAMES[kind][self.remote_code].split()]
        if len(names) == 1:
            return {names[0]: rows}
        heads = (config.heads, config.kv_heads, config.kv_heads)
        return {name: n * config.head_dim for name, n in zip(names, heads, strict=True)}


def naming_of(stored: Collection[str]) -> Naming:
    """The family that the names of a checkpoint are of."""
    ours, theirs = NAMES["embedding"]
    if any(name.startswith("transformer.") for name in stored):
        return Naming(remote_code=True)
    if theirs in stored:
        return Naming(remote_code=True, bare=True)
    return Naming(bare=ours in stored and f"model.{ours}" not in stored)
