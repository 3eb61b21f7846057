"""config.json, of transformers or of the remote code, as a `Config`.

Each error is one line that names the file and the field.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from glm4.model import Config
from glm4.tensor_files import CheckpointError, read_json

# Config's field: the remote code's name (model_type chatglm), transformers' name (glm, glm4).
FIELDS = {
    "layers": ("num_layers", "num_hidden_layers"),
    "hidden": ("hidden_size", "hidden_size"),
    "ffn": ("ffn_hidden_size", "intermediate_size"),
    "heads": ("num_attention_heads", "num_attention_heads"),
    "kv_heads": ("multi_query_group_num", "num_key_value_heads"),
    "head_dim": ("kv_channels", "head_dim"),
    "vocab": ("padded_vocab_size", "vocab_size"),
    "eps": ("layernorm_epsilon", "rms_norm_eps"),
    "max_positions": ("seq_length", "max_position_embeddings"),
    "qkv_bias": ("add_qkv_bias", "attention_bias"),
}
# What the model takes for granted, where a config says it at all.
GRANTED = {
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "hidden_act": "silu",
    "multi_query_attention": True,
    "original_rope": True,  # interleaved pairs
    "post_layer_norm": True,
    "rmsnorm": True,
}


def read_config(folder: Path, rope_theta: float | None = None) -> Config:
    """config.json as a Config; `rope_theta` overrides its own."""
    path = folder / "config.json"
    config_json = read_json(path)
    model_type = config_json.get("model_type")
    if model_type not in ("chatglm", "glm", "glm4") or "vision_config" in config_json:
        vision = " with a vision_config" if "vision_config" in config_json else ""
        raise CheckpointError(
            f"{path}: model_type must be that of a dense GLM-4 for text (chatglm, glm or glm4), "
            f"got {model_type!r}{vision}"
        )
    for field, granted in GRANTED.items():
        if config_json.get(field, granted) != granted:
            expected, actual = json.dumps(granted), json.dumps(config_json[field])
            raise CheckpointError(f"{path}: {field} must be {expected}, got {actual}")

    remote_code = model_type == "chatglm"
    theirs = {field: names[0 if remote_code else 1] for field, names in FIELDS.items()}
    for name in theirs.values():
        if name not in config_json:
            raise CheckpointError(f"{path}: {name} is missing")
    values = {field: config_json[name] for field, name in theirs.items()}

    if remote_code:
        theta, rotary, yarn = product(1e4, config_json.get("rope_ratio", 1)), 0.5, None
    else:
        theta, rotary, yarn = read_rope(path, config_json, values["max_positions"])
    if rope_theta is not None:
        theta = rope_theta
    theirs |= {
        "theta": "rope_ratio" if remote_code else "rope_theta",
        "rotary_dim": "partial_rotary_factor",
        "tied": "tie_word_embeddings",
    }
    try:
        config = Config(
            **values,
            theta=theta,
            rotary_dim=product(values["head_dim"], rotary),
            rope_scaling=yarn,
            sandwich=model_type == "glm4",
            tied=config_json.get("tie_word_embeddings", False),
            eos_token_ids=read_stop_ids(folder, config_json, values["vocab"]),
        )
        if yarn is not None:
            extended = int(yarn["factor"] * yarn["original_max_position_embeddings"])
            config = replace(config, max_positions=max(config.max_positions, extended))
    except ValueError as error:
        field, _, rest = str(error).partition(" ")
        raise CheckpointError(f"{path}: {theirs.get(field, field)} {rest}") from None
    return config


def warn_of_theta(config: Config, folder: Path) -> None:
    """The chat checkpoints converted to transformers' format (`-hf`) say rope_theta 10000, their
    originals 10000 * rope_ratio: one of the two is wrong, and nobody says which."""
    if config.vocab == 151552 and config.max_positions >= 131072 and config.theta == 1e4:
        original = "1e8" if config.kv_heads == 4 else "5e6"
        warnings.warn(
            f"{folder / 'config.json'}: rope_theta is 10000, but the original checkpoint has "
            f"{original}, and a wrong theta does not show in short texts; load with "
            f"rope_theta={original}, or with rope_theta=1e4 to keep it and silence this",
            stacklevel=5,  # who called `load`, past its decorators
        )


def read_rope(
    path: Path, config_json: dict[str, Any], max_positions: Any
) -> tuple[Any, Any, dict[str, Any] | None]:
    """(theta, partial rotary factor, YaRN's entries) of transformers 5's rope_parameters, or of
    the rope_theta, partial_rotary_factor and rope_scaling that came before them."""
    name = "rope_parameters" if config_json.get("rope_parameters") is not None else "rope_scaling"
    scaling = {} if config_json.get(name) is None else config_json[name]
    if not isinstance(scaling, dict):
        raise CheckpointError(f"{path}: {name} must be an object, got {json.dumps(scaling)}")
    rope = config_json | scaling
    if "rope_theta" not in rope:
        raise CheckpointError(f"{path}: rope_theta is missing")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise CheckpointError(f"{path}: {name} must be of type default or yarn, got {kind!r}")
    yarn = None
    if kind == "yarn":
        yarn = {"original_max_position_embeddings": max_positions} | scaling
    return rope["rope_theta"], rope.get("partial_rotary_factor", 0.5), yarn


def product(a: Any, b: Any) -> Any:
    """a * b, an int where `a` is one; what is no number stays for `Config` to refuse."""
    for value in (a, b):
        if type(value) not in (int, float) or not math.isfinite(value):
            return value
    return type(a)(a * b)


def read_stop_ids(folder: Path, config_json: dict[str, Any], vocab: Any) -> tuple[int, ...]:
    """The stop ids of generation_config.json, else of config.json, else the family's."""
    path, ids = folder / "config.json", config_json.get("eos_token_id")
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json")
        if generation.get("eos_token_id") is not None:
            path, ids = folder / "generation_config.json", generation["eos_token_id"]
    if ids is None:
        ids = list(Config.eos_token_ids)
    ids = ids if isinstance(ids, list) else [ids]
    for token in ids:
        if type(token) is not int or token < 0:
            raise CheckpointError(f"{path}: eos_token_id must be token ids, got {token!r}")
    # transformers writes its default ids even into models whose vocabulary ends before them
    return tuple(token for token in ids if type(vocab) is int and token < vocab)
