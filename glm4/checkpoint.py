"""From a checkpoint on disk to a `Model`: safetensors and JSON only, checked before use.

Quirks of checkpoints end here. Both families of tensor names are read, whatever the model type:

    transformers    model.layers.N.self_attn.{q,k,v}_proj.weight    (q, k, v become one matrix)
    remote code     transformer.encoder.layers.N.self_attention.query_key_value.weight

Nothing is read before every tensor's name, shape and dtype agree with config.json. Tensors are
then read one by one onto the device, so the host never holds more than the model plus one.
Quantised weights are the matter of `quantized_checkpoint`.
Each error is one line that names the file, and the field or tensor.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm4.config_json import read_config, warn_of_theta
from glm4.hub import DEMO as DEMO  # where it has always been found
from glm4.hub import find_folder
from glm4.model import Config, Model, Weight, check_dtype, overflows
from glm4.progress import progress_bar
from glm4.quantization_config import Quantization, read_quantization
from glm4.quantization_policy import LINEAR, Policy, policy_of, preparer
from glm4.quantized_checkpoint import QuantizedPart, find_part, is_idle_bias, read_quantized
from glm4.tensor_files import STORED_DTYPES, CheckpointError, Stored, find_tensors, read_json
from glm4.threads import check_threads
from glm4_kernels.huge_pages import zeros_in_huge_pages
from glm4_kernels.library import bad_value

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@torch.no_grad()
def load(
    path_or_repo: str | os.PathLike[str],
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | Policy | None = None,
    rope_theta: float | None = None,
    rope_mode: str = "reference",
    progress: bool = True,
    activations: str | None = None,
    threads: int | None = None,
) -> Model:
    """A model from a folder, from the Hugging Face Hub ("org/name"), or the bundled "demo".

    Args:
        device: "auto" is the GPU if there is one, else the CPU.
        dtype: "auto" is the checkpoint's own; else "bfloat16", "float32" or "float16". Tools that
            quantise write float16 whatever the model: where it would overflow, "auto" is bfloat16.
        quantize: None, "int8" or "int4": of the linear layers, as they are read; the head is int8.
            Or a policy of your own: see `glm4.quantization_policy`. int4 takes two CPU cores ten
            seconds a layer of a 9B each time: `glm4 quantize` does it once.
            Layers that are quantised on disk load as they are.
        rope_theta: overrides the checkpoint's.
        rope_mode: "reference" rounds RoPE's table as transformers does, "exact" (needed past 256K
            tokens) does not.
        progress: shows a bar on stderr once loading has taken two seconds.
        activations: of quantised layers, "int8" (the CPU's default) or "float"; see
            `gk.quantized_matmul`.
        threads: of the CPU, that each pass takes. None takes as many as torch, the affinity mask
            and the control groups allow, and fewer while other processes need the processors; see
            `glm4.threads`.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or not a supported GLM-4.
        ValueError, TypeError: another argument is wrong.
    """
    policy = policy_of(quantize)
    if rope_mode not in ("reference", "exact"):
        raise bad_value("load", "rope_mode", "'reference' or 'exact'", repr(rope_mode))
    if activations not in (None, "int8", "float"):
        raise bad_value("load", "activations", "None, 'int8' or 'float'", repr(activations))
    threads = check_threads("load", threads)
    if dtype != "auto" and str(dtype).removeprefix("torch.") not in DTYPES:
        raise bad_value("load", "dtype", f"'auto', {', '.join(DTYPES)}", repr(dtype))
    target = resolve_device(device)

    folder = find_folder(path_or_repo)
    checkpoint = examine(folder, rope_theta)
    config = checkpoint.config
    if rope_theta is None and checkpoint.config_json["model_type"] == "glm":
        warn_of_theta(config, folder)
    if dtype == "auto":
        dtype = checkpoint.dtype
        if checkpoint.quantised and overflows(config, dtype):
            dtype = torch.bfloat16
    dtype = DTYPES[str(dtype).removeprefix("torch.")]
    check_dtype(config, dtype)

    prepare = preparer(policy, config)
    weights: dict[str, Weight] = {}
    with progress_bar(f"Loading {folder.name}", len(config.shapes), progress) as show:
        for done, (name, shape) in enumerate(config.shapes.items(), 1):
            if name in checkpoint.quantised:
                weights[name] = read_quantized(checkpoint.quantised[name], target)
            elif name == "lm_head" and config.tied:
                weights[name] = prepare(name, weights["embedding"])
            else:
                weight = zeros_in_huge_pages(shape, dtype, target)
                read_into(weight, checkpoint.floats[name])
                weights[name] = prepare(name, weight)
            show(done)
    model = Model(config, weights, target, dtype, rope_mode, activations, threads)
    model.path = folder
    return model


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose tensors are all there and as its config.json asks; none of them is read yet.

    Each tensor of `config.shapes`, a tied head aside, is in `floats` or in `quantised`.
    """

    config: Config
    config_json: dict[str, Any]
    floats: dict[str, list[Stored]]
    quantised: dict[str, list[QuantizedPart]]

    @property
    def dtype(self) -> torch.dtype:
        declared = str(self.config_json.get("dtype", self.config_json.get("torch_dtype")))
        return DTYPES.get(declared, STORED_DTYPES[self.floats["embedding"][0].dtype])


def examine(folder: Path, rope_theta: float | None = None) -> Checkpoint:
    """Raises CheckpointError if `folder` holds no whole GLM-4."""
    config = read_config(folder, rope_theta)
    config_json = read_json(folder / "config.json")
    listing, stored = find_tensors(folder)
    if "transformer.encoder.layers.0.post_self_attn_layernorm.weight" in stored:
        config = replace(config, sandwich=True)  # configs of the remote code do not say it
    quantization = read_quantization(folder, config_json)
    floats, quantised = match_tensors(config, stored, listing, quantization)
    return Checkpoint(config, config_json, floats, quantised)


def resolve_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise bad_value("load", "device", "'auto', 'cpu' or 'cuda[:N]'", repr(device)) from None
    if resolved.type == "cpu":
        return torch.device("cpu")
    if resolved.type != "cuda":
        raise bad_value("load", "device", "'auto', 'cpu' or 'cuda[:N]'", repr(str(device)))
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (resolved.index or 0) >= n_devices:
        raise bad_value("load", "device", f"one of {n_devices} CUDA devices", repr(str(device)))
    return torch.empty(0, device=resolved).device  # with its index


# What each of our tensors is called: by transformers, by the remote code. `{}` is the layer; more
# than one name: its rows, in that order.
NAMES = {
    "embedding": ("model.embed_tokens.weight", "transformer.embedding.word_embeddings.weight"),
    "norm": ("model.norm.weight", "transformer.encoder.final_layernorm.weight"),
    "lm_head": ("lm_head.weight", "transformer.output_layer.weight"),
}
PREFIXES = ("model.layers.{}.", "transformer.encoder.layers.{}.")
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
# Tables of RoPE that some checkpoints carry; the model computes its own.
IGNORED = {"inv_freq", "cos_cached", "sin_cached"}


def names_on_disk(config: Config, ours: str, remote_code: bool = False) -> dict[str, int]:
    """The tensors that a tensor of `config.shapes` is stored as: each name and its rows, in order
    of the rows."""
    rows = config.shapes[ours][0]
    layer, _, kind = ours.removeprefix("layers.").rpartition(".")
    if not layer:
        return {NAMES[kind][remote_code]: rows}
    own = PREFIXES[remote_code].format(layer)
    names = [own + name for name in LAYER_NAMES[kind][remote_code].split()]
    if len(names) == 1:
        return {names[0]: rows}
    heads = (config.heads, config.kv_heads, config.kv_heads)
    return {name: n * config.head_dim for name, n in zip(names, heads, strict=True)}


def match_tensors(
    config: Config,
    stored: dict[str, Stored],
    listing: Path,
    quantization: Quantization | None = None,
) -> tuple[dict[str, list[Stored]], dict[str, list[QuantizedPart]]]:
    """What is stored of each tensor in `config.shapes`, as floats or else quantised; refuses any
    that differs."""
    remote_code = any(name.startswith("transformer.") for name in stored)
    floats: dict[str, list[Stored]] = {}
    quantised: dict[str, list[QuantizedPart]] = {}
    unexpected = dict(stored)
    for ours, (_, *rest) in config.shapes.items():
        if ours == "lm_head" and config.tied:
            continue
        kind = ours.rpartition(".")[2]
        rows_of = names_on_disk(config, ours, remote_code)
        for name, n in rows_of.items():
            expected = [n, *rest]
            if quantization is not None and kind in LINEAR:
                module = name.removesuffix(".weight")
                part = find_part(quantization, module, expected, unexpected, listing)
                if part is not None:
                    quantised.setdefault(ours, []).append(part)
                    continue
            tensor = unexpected.pop(name, None)
            if tensor is None:
                raise CheckpointError(f"{listing}: tensor {name} {expected} is missing")
            if list(tensor.shape) != expected:
                raise CheckpointError(
                    f"{tensor.path}: tensor {name} must be {expected}, got {list(tensor.shape)}"
                )
            if tensor.dtype not in STORED_DTYPES:
                raise CheckpointError(
                    f"{tensor.path}: tensor {name} must be {', '.join(STORED_DTYPES)}, "
                    f"got {tensor.dtype}"
                )
            floats.setdefault(ours, []).append(tensor)
        if ours in floats and ours in quantised:
            raise CheckpointError(
                f"{listing}: tensors {', '.join(rows_of)} must be all quantised or none, got both"
            )
    for name, tensor in unexpected.items():
        idle = quantization is not None and is_idle_bias(quantization, tensor)
        if name.rpartition(".")[2] not in IGNORED and not idle:
            raise CheckpointError(
                f"{tensor.path}: tensor {name} {list(tensor.shape)} is unexpected; config.json "
                "describes a model without it"
            )
    return floats, quantised


def read_into(weight: Tensor, parts: list[Stored]) -> None:
    """Fills `weight` with the rows of its parts; refuses NaN and infinities."""
    row = 0
    for part in parts:
        rows = weight[row : row + part.shape[0]]
        rows.copy_(part.read())
        smallest, largest = (x.item() for x in rows.aminmax())  # either is NaN if any value is
        if not (math.isfinite(smallest) and math.isfinite(largest)):
            raise CheckpointError(
                f"{part.path}: tensor {part.name} must be finite, got NaN or infinite values "
                f"(stored as {part.dtype}, read as {weight.dtype})"
            )
        row += part.shape[0]
