"""config.json, of transformers or of the remote code, as a `Config`.

Each error is one line that names the file and the field.
"""

from __future__ import annotations

import json
import numbers
import os
import reprlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from glm4.checkpoint_file import CheckpointError, read_json
from glm4.model import Config
from glm4.rope_config import read_rope, same
from glm4_kernels.library import bad_type, bad_value
from glm4_kernels.rope_table import MAX_THETA

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
    return config_of(folder, read_json(folder / "config.json"), rope_theta)[0]


def check_theta(name: str, rope_theta: Any) -> float | None:
    """Raises TypeError or ValueError if `rope_theta`, an argument, is neither None nor a base."""
    if rope_theta is None:
        return None
    if not isinstance(rope_theta, numbers.Real) or isinstance(rope_theta, bool):
        raise bad_type(name, "rope_theta", "a number or None", reprlib.repr(rope_theta))
    number: Any = rope_theta
    if not 1 < number <= MAX_THETA:
        actual = reprlib.repr(rope_theta)
        raise bad_value(name, "rope_theta", f"over 1 and at most {MAX_THETA:g}", actual)
    return float(number)


def config_of(
    folder: Path, config_json: dict[str, Any], rope_theta: float | None = None
) -> tuple[Config, list[str]]:
    """The Config of what was read from config.json, and a line on each thing in it that should be
    known, though it is no error."""
    path = folder / "config.json"
    check_model(path, config_json)
    remote_code = config_json["model_type"] == "chatglm"
    theirs = {field: names[0 if remote_code else 1] for field, names in FIELDS.items()}
    for name in theirs.values():
        if name not in config_json:
            raise CheckpointError(f"{path}: {name} is missing")
    values = {field: config_json[name] for field, name in theirs.items()}
    theirs |= {
        "theta": "rope_theta",
        "rotary_dim": "partial_rotary_factor times head_dim",
        "tied": "tie_word_embeddings",
    }
    try:
        # Sizes first: how RoPE and the stop ids are read depends on them.
        config = Config(
            **values,
            theta=1e4 if rope_theta is None else rope_theta,
            sandwich=config_json["model_type"] == "glm4",
            tied=config_json.get("tie_word_embeddings", False),
            eos_token_ids=(),
        )
        rope = read_rope(path, config_json, config.max_positions, rope_theta is None)
        config = replace(
            config,
            theta=config.theta if rope.theta is None else rope.theta,
            rotary_dim=int(config.head_dim * rope.partial),
            rope_scaling=rope.yarn,
            eos_token_ids=read_stop_ids(folder, config_json, config.vocab),
        )
        if rope.yarn is not None:
            extended = int(rope.yarn["factor"] * rope.yarn["original_max_position_embeddings"])
            config = replace(config, max_positions=max(config.max_positions, extended))
    except CheckpointError:
        raise
    except ValueError as error:
        field, _, rest = str(error).partition(" ")
        raise CheckpointError(f"{path}: {theirs.get(field, field)} {rest}") from None

    other = FIELDS["eps"][remote_code]  # of the other fields, shapes tell which is wrong
    if config_json.get(other) is not None and not same(config_json[other], config.eps):
        raise CheckpointError(
            f"{path}: {theirs['eps']} and {other} must be one number, got "
            f"{shown(config.eps)} and {shown(config_json[other])}"
        )
    remarks = [*rope.remarks, *differing_dtypes(path, config_json)]
    if rope_theta is None and config_json["model_type"] == "glm":
        remarks += doubtful_theta(config, path)
    return config, remarks


def check_model(path: Path, config_json: dict[str, Any]) -> None:
    """Refuses another kind of model, or a GLM-4 that is not built as ours."""
    model_type = config_json.get("model_type")
    if model_type not in ("chatglm", "glm", "glm4") or "vision_config" in config_json:
        vision = " with a vision_config" if "vision_config" in config_json else ""
        raise CheckpointError(
            f"{path}: model_type must be that of a dense GLM-4 for text (chatglm, glm or glm4), "
            f"got {reprlib.repr(model_type)}{vision}"
        )
    for field, granted in GRANTED.items():
        if config_json.get(field, granted) != granted:
            expected, actual = json.dumps(granted), shown(config_json[field])
            raise CheckpointError(f"{path}: {field} must be {expected}, got {actual}")


def differing_dtypes(path: Path, config_json: dict[str, Any]) -> list[str]:
    new, old = config_json.get("dtype"), config_json.get("torch_dtype")
    if not isinstance(new, str) or not isinstance(old, str) or new == old:
        return []
    return [
        f"{path}: dtype is {shown(new)} and torch_dtype {shown(old)}; the first holds, as in "
        "transformers"
    ]


def doubtful_theta(config: Config, path: Path) -> list[str]:
    """The chat checkpoints converted to transformers' format (`-hf`) say rope_theta 10000, their
    originals 10000 * rope_ratio: one of the two is wrong, and nobody says which."""
    if config.vocab != 151552 or config.max_positions < 131072 or config.theta != 1e4:
        return []
    original = "1e8" if config.kv_heads == 4 else "5e6"
    return [
        f"{path}: rope_theta is 10000, but the original checkpoint has {original}, and a wrong "
        f"theta does not show in short texts; load with rope_theta={original} (--rope-theta), or "
        "with rope_theta=1e4 to keep it and silence this"
    ]


def shown(value: Any) -> str:
    """As JSON writes it, cut to a part of a line."""
    if isinstance(value, str):
        return json.dumps(value[:60])
    return json.dumps(value) if isinstance(value, bool) else reprlib.repr(value)


def declared_dtype(path: Path, config_json: dict[str, Any]) -> torch.dtype | None:
    """That of dtype, or of its older name torch_dtype; as in transformers the first holds."""
    for name in ("dtype", "torch_dtype"):
        declared = config_json.get(name)
        if declared is not None:
            if not isinstance(declared, str) or declared not in DTYPES:
                raise CheckpointError(
                    f"{path}: {name} must be {', '.join(DTYPES)}, got {shown(declared)}; "
                    "correct it, or load with a dtype (--dtype)"
                )
            return DTYPES[declared]
    return None


def read_stop_ids(folder: Path, config_json: dict[str, Any], vocab: int) -> tuple[int, ...]:
    """The stop ids of generation_config.json, else of config.json, else the family's.

    As in transformers, but for a generation_config.json without any, with which it never stops.
    """
    path, ids = folder / "config.json", config_json.get("eos_token_id")
    if os.path.lexists(folder / "generation_config.json"):
        generation = read_json(folder / "generation_config.json")
        if generation.get("eos_token_id") is not None:
            path, ids = folder / "generation_config.json", generation["eos_token_id"]
    if ids is None:
        ids = list(Config.eos_token_ids)
    ids = ids if isinstance(ids, list) else [ids]
    for token in ids:
        if type(token) is not int or token < 0:
            raise CheckpointError(
                f"{path}: eos_token_id must be token ids, got {reprlib.repr(token)}"
            )
    # transformers writes its default ids even into models whose vocabulary ends before them
    return tuple(token for token in ids if token < vocab)
