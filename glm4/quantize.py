"""`glm4 quantize`: a checkpoint into a smaller one, layer by layer.

What is written is compressed-tensors' `pack-quantized`, under transformers' names and config,
whatever the source calls them: transformers, vLLM and `glm4.load` read it. Memory is that of one
source tensor and one shard, never of the model.

A run that is killed leaves nothing that looks finished, and the next one starts over: see
`working_folder`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from glm4.checkpoint import Checkpoint, examine, read_into, resolve_device
from glm4.checkpoint_file import CheckpointError
from glm4.companions import as_json, copy_companions
from glm4.config_json import FIELDS, check_theta
from glm4.hub import find_folder
from glm4.model import Config, Weight
from glm4.progress import progress_bar
from glm4.quantization_config import Scheme, write_quantization
from glm4.quantization_policy import LINEAR, Form, preparer
from glm4.quantized_checkpoint import Codes, pack_quantized
from glm4.rope_config import ROPE_FIELDS, rope_fields
from glm4.tensor_files import STORED_DTYPES
from glm4.tensor_names import Naming
from glm4.working_folder import WorkingFolder, appearing, free_place
from glm4_kernels.library import bad_type, bad_value, without_autocast
from glm4_kernels.quantized_weight import slabs

# Bytes of a shard, and so of what waits in memory to be written; a larger tensor has its own.
SHARD_SIZE = 1 << 30
# Who else reads what is written, and whether with zero points.
ENGINES = {"transformers": False, "vllm": True, "sglang": False}


@torch.no_grad()
@without_autocast
def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = True,
    head_bits: int | None = None,
    device: str | torch.device = "auto",
    rope_theta: float | None = None,
    progress: bool = True,
    engine: str | None = None,
) -> Path:
    """Writes `source` with its linear layers in 4 or 8 bits to `target`.

    Args:
        source: a folder or Hub repository, as for `glm4.load`; its weights are not quantised yet.
        target: a folder that does not exist, and does not lie in `source`.
        bits: 4 or 8, of every linear layer but the head.
        group_size: 32, 64, 128 or None (per channel); where it does not divide a row, the largest
            that does.
        symmetric: false stores a zero point for each group too.
        head_bits: 4, 8 or 16 (left as it is), of lm_head; None is 8, or what `engine` reads.
        device: where to compute: "auto" is the GPU if there is one.
        rope_theta: written in place of the source's.
        progress: shows a bar on stderr after two seconds.
        engine: who else is to read it: "transformers", "vllm" or "sglang". Some of their versions
            and ways to load are right only with one scheme for all layers, so the group is the
            largest that divides the rows of all, and with a head of 16 bits.

    Returns:
        The path of `target`.

    Raises:
        CheckpointError: the source cannot be read or is quantised already; the target exists or
            cannot be written.
        ValueError, TypeError: another argument is wrong.
    """
    form, head_bits = options(bits, group_size, symmetric, head_bits, engine)
    rope_theta = check_theta("quantize_checkpoint", rope_theta)
    place = resolve_device(device)
    target = free_place(target)
    folder = find_folder(source)
    checkpoint = examine(folder, rope_theta)
    config = checkpoint.config
    if checkpoint.quantised:
        raise CheckpointError(f"{folder}: must not be quantised already, got quantised weights")
    config_json = as_transformers(checkpoint)
    checkpoint.warn()
    if engine is not None:
        form = replace(form, group_size=common_group(config, form.group_size))
    policy = dict.fromkeys(LINEAR, form)
    del policy["lm_head"]
    if head_bits != 16:
        policy["lm_head"] = replace(form, bits=head_bits, method="search")
    prepare = preparer(policy, config)

    with appearing(target, folder) as partial:
        copy_companions(folder, partial, checkpoint.config_json["model_type"] == "chatglm")
        shards = Shards(partial)
        schemes: dict[str, Scheme | None] = {}
        with progress_bar(f"Quantising {folder.name}", len(config.shapes), progress) as show:
            for done, name in enumerate(checkpoint.floats, 1):
                weight = read(checkpoint, name, place)
                codes = codes_of(weight, prepare(name, weight))
                for part, rows in rows_on_disk(config, name).items():
                    module = part.rpartition(".")[0]
                    if name.rpartition(".")[2] in LINEAR:
                        schemes[module] = None if codes is None else scheme_of(codes)
                    if codes is None:
                        shards.add(part, weight[rows])
                    else:
                        for kind, tensor in pack_quantized(rows_of(codes, rows)).items():
                            shards.add(f"{module}.{kind}", tensor)
                show(done)
            shards.close()
        config_json["quantization_config"] = write_quantization(schemes)
        partial.write("config.json", as_json(config_json))
    return target


def options(
    bits: int, group_size: int | None, symmetric: bool, head_bits: int | None, engine: str | None
) -> tuple[Form, int]:
    """(the form of every layer but the head, the bits of the head); raises for any other value."""
    name = "quantize_checkpoint"
    if bits not in (4, 8):
        raise bad_value(name, "bits", "4 or 8", repr(bits))
    if group_size not in (32, 64, 128, None):
        raise bad_value(name, "group_size", "32, 64, 128 or None", group_size)
    if not isinstance(symmetric, bool):
        raise bad_type(name, "symmetric", "a bool", repr(symmetric))
    if head_bits not in (None, 4, 8, 16):
        raise bad_value(name, "head_bits", "4, 8 or 16", repr(head_bits))
    if engine is None:
        head_bits = head_bits or 8
    elif engine not in ENGINES:
        raise bad_value(name, "engine", f"None, {', '.join(ENGINES)}", repr(engine))
    elif not symmetric and not ENGINES[engine]:
        raise bad_value(name, "symmetric", f"True for {engine}", symmetric)
    elif head_bits not in (None, 16):
        raise bad_value(name, "head_bits", f"16 for {engine}", head_bits)
    # Rounding to 8 bits leaves nothing to answer for.
    method = "feedback" if bits == 4 else "search"
    group_size = None if group_size is None else int(group_size)
    return Form(int(bits), group_size, symmetric, method), int(head_bits or 16)


def common_group(config: Config, group_size: int | None) -> int | None:
    """The largest group, up to `group_size`, that divides the rows of all layers but the head."""
    kinds = [kind for kind in LINEAR if kind != "lm_head"]
    columns = [shape[-1] for name, shape in config.shapes.items() if name.split(".")[-1] in kinds]
    sizes = (size for size in (128, 64, 32) if size <= (group_size or 0))
    return next((size for size in sizes if not any(n % size for n in columns)), None)


def read(checkpoint: Checkpoint, name: str, device: torch.device) -> Tensor:
    """A tensor of `config.shapes`, in the dtype that it is stored in."""
    parts = checkpoint.floats[name]
    dtype = STORED_DTYPES[parts[0].dtype]
    weight = torch.empty(checkpoint.config.shapes[name], dtype=dtype, device=device)
    read_into(weight, parts)
    return weight


def codes_of(weight: Tensor, prepared: Weight) -> Codes | None:
    """The codes of `prepared`, made of `weight`, as the format holds them; None: it is a float."""
    if isinstance(prepared, Tensor):
        return None
    u, scale, zero_point = prepared.codes()
    codes = Codes(u, scale, zero_point, prepared.bits, prepared.group_size)
    if codes.zero_point is None or not codes.zero_point.is_floating_point():
        return codes
    return integer_zero_points(weight, codes)


def integer_zero_points(weight: Tensor, codes: Codes) -> Codes:
    """Rounds float zero points, which the format does not have, and fits the rest to them again.

    With z fixed, a group's u are rounded again, its scale is that of least squares for them,
    <w, u - z> / <u - z, u - z>, and it is kept where u rounded with it errs less.
    """
    n, k = weight.shape
    top = 2**codes.bits - 1
    assert codes.zero_point is not None
    zero_point = codes.zero_point.round().clamp(0, top)
    u, scale = torch.empty_like(codes.u), torch.empty_like(codes.scale)
    for rows in slabs(n, k):
        w = weight[rows].float().unflatten(1, (scale.shape[1], -1))  # [R, G, g]
        z = zero_point[rows].float().unsqueeze(-1)
        best = codes.scale[rows].float().unsqueeze(-1)
        steps = rounded(w, best, z, top) - z
        length = (steps * steps).sum(-1, keepdim=True)
        fitted = (w * steps).sum(-1, keepdim=True) / torch.where(length == 0, 1.0, length)
        fitted = fitted.to(scale.dtype).float()
        better = error(w, fitted, z, top) < error(w, best, z, top)
        best = torch.where(better & fitted.isfinite(), fitted, best)
        u[rows] = rounded(w, best, z, top).flatten(1).to(torch.uint8)
        scale[rows] = best.squeeze(-1).to(scale.dtype)
    return Codes(u, scale, zero_point.to(torch.uint8), codes.bits, codes.group_size)


def rounded(w: Tensor, scale: Tensor, z: Tensor, top: int) -> Tensor:
    """u of the weights [..., g] on the grid of their group [..., 1]."""
    return (w / torch.where(scale == 0, 1.0, scale)).add_(z).round_().clamp_(0, top)


def error(w: Tensor, scale: Tensor, z: Tensor, top: int) -> Tensor:
    return (scale * (rounded(w, scale, z, top) - z) - w).square_().sum(-1, keepdim=True)


def rows_on_disk(config: Config, name: str) -> dict[str, slice]:
    """The tensors, as transformers names them, that one of ours is stored as: q, k and v apart."""
    rows, start = {}, 0
    for part, n_rows in Naming().on_disk(config, name).items():
        rows[part] = slice(start, start + n_rows)
        start += n_rows
    return rows


def rows_of(codes: Codes, rows: slice) -> Codes:
    zero_point = None if codes.zero_point is None else codes.zero_point[rows]
    return replace(codes, u=codes.u[rows], scale=codes.scale[rows], zero_point=zero_point)


def scheme_of(codes: Codes) -> Scheme:
    return Scheme("pack-quantized", codes.bits, codes.group_size, codes.zero_point is None)


class Shards:
    """Tensors on their way into files of about `SHARD_SIZE`; `close` numbers and lists them."""

    def __init__(self, folder: WorkingFolder) -> None:
        self.folder = folder
        self.pending: dict[str, Tensor] = {}
        self.files: list[list[str]] = []  # the names in each
        self.size = self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        n_bytes = tensor.numel() * tensor.element_size()
        if self.pending and self.size + n_bytes > SHARD_SIZE:
            self.flush()
        # Rows of a larger tensor are copied: as they are they would keep all of it.
        partly = tensor.untyped_storage().nbytes() > n_bytes
        self.pending[name] = tensor.to("cpu", copy=partly).contiguous()
        self.size += n_bytes
        self.total += n_bytes

    def flush(self) -> None:
        with self.folder.writing(f"{len(self.files)}.safetensors") as file:
            save_file(self.pending, file, metadata={"format": "pt"})
        self.files.append(list(self.pending))
        self.pending, self.size = {}, 0

    def close(self) -> None:
        self.flush()
        if len(self.files) == 1:
            self.folder.rename("0.safetensors", "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self.files):
            file = f"model-{i + 1:05}-of-{len(self.files):05}.safetensors"
            self.folder.rename(f"{i}.safetensors", file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        self.folder.write("model.safetensors.index.json", as_json(index))


def as_transformers(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json to write: the source's, or for the remote code, transformers' of it, with
    what may stand in several places in one that every reader takes.

    Raises:
        CheckpointError: its dtype is not that of a float checkpoint.
    """
    config, given = checkpoint.config, checkpoint.config_json
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    if given["model_type"] != "chatglm":
        # The last is that of tensors which are not quantised after all.
        idle = {*ROPE_FIELDS, "compression_config"}
        if given.get("dtype") is not None:
            idle.add("torch_dtype")
        kept = {name: value for name, value in given.items() if name not in idle}
        return kept | rope_fields(config) | {"tie_word_embeddings": config.tied}
    stops = list(config.eos_token_ids)
    return {
        "architectures": ["Glm4ForCausalLM" if config.sandwich else "GlmForCausalLM"],
        "model_type": "glm4" if config.sandwich else "glm",
        "dtype": dtype,
        **{names[1]: getattr(config, field) for field, names in FIELDS.items()},
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        **rope_fields(config),
        "eos_token_id": given.get("eos_token_id", stops),
        "pad_token_id": given.get("pad_token_id", stops[0] if stops else None),
    }
