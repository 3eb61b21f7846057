"""`glm4 quantize`: a checkpoint into a smaller one, layer by layer.

What is written is compressed-tensors' `pack-quantized`, under transformers' names and config,
whatever the source calls them: transformers, vLLM and `glm4.load` read it. Memory is that of one
source tensor and one shard, never of the model.

Everything goes to `TARGET.partial`, which becomes TARGET by one rename when it is whole: a run that
is killed leaves nothing that looks finished, and the next one starts over.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from glm4.checkpoint import Checkpoint, examine, names_on_disk, read_into, resolve_device
from glm4.config_json import FIELDS, warn_of_theta
from glm4.hub import find_folder
from glm4.model import Config, Weight
from glm4.progress import progress_bar
from glm4.quantization_config import Scheme, write_quantization
from glm4.quantization_policy import LINEAR, Form, preparer
from glm4.quantized_checkpoint import Codes, pack_quantized
from glm4.tensor_files import STORED_DTYPES, CheckpointError, read_json
from glm4.tokenizer_model import convert_tokenizer
from glm4_kernels.library import bad_value, without_autocast
from glm4_kernels.quantized_weight import slabs

# Bytes of a shard, and so of what waits in memory to be written; a larger tensor has its own.
SHARD_SIZE = 1 << 30
# What a checkpoint has besides tensors and config.json.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
)


@torch.no_grad()
@without_autocast
def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = True,
    head_bits: int = 8,
    device: str | torch.device = "auto",
    rope_theta: float | None = None,
    progress: bool = True,
) -> Path:
    """Writes `source` with its linear layers in 4 or 8 bits to `target`.

    Args:
        source: a folder or Hub repository, as for `glm4.load`; its weights are not quantised yet.
        target: a folder that does not exist.
        bits: 4 or 8, of every linear layer but the head.
        group_size: 32, 64, 128 or None (per channel); where it does not divide a row, the largest
            that does.
        symmetric: false stores a zero point for each group too.
        head_bits: 4, 8 or 16 (left as it is), of lm_head.
        device: where to compute: "auto" is the GPU if there is one.
        rope_theta: written in place of the source's.
        progress: shows a bar on stderr after two seconds.

    Returns:
        The path of `target`.

    Raises:
        CheckpointError: the source cannot be read or is quantised already; the target exists.
        ValueError, TypeError: another argument is wrong.
    """
    if bits not in (4, 8):
        raise bad_value("quantize_checkpoint", "bits", "4 or 8", repr(bits))
    if group_size not in (32, 64, 128, None):
        raise bad_value("quantize_checkpoint", "group_size", "32, 64, 128 or None", group_size)
    if head_bits not in (4, 8, 16):
        raise bad_value("quantize_checkpoint", "head_bits", "4, 8 or 16", repr(head_bits))
    place = resolve_device(device)
    folder = find_folder(source)
    checkpoint = examine(folder, rope_theta)
    if checkpoint.quantised:
        raise CheckpointError(f"{folder}: must not be quantised already, got quantised weights")
    if rope_theta is None and checkpoint.config_json["model_type"] == "glm":
        warn_of_theta(checkpoint.config, folder)

    # Rounding to 8 bits leaves nothing to answer for.
    forms = {
        width: Form(width, group_size, symmetric, "feedback" if width == 4 else "search")
        for width in (4, 8)
    }
    policy = dict.fromkeys(LINEAR, forms[bits])
    del policy["lm_head"]
    if head_bits != 16:
        policy["lm_head"] = replace(forms[head_bits], method="search")
    prepare = preparer(policy, checkpoint.config)

    target = Path(target).expanduser()
    with appearing(target) as partial:
        shards = Shards(partial)
        schemes: dict[str, Scheme | None] = {}
        shapes = checkpoint.config.shapes
        with progress_bar(f"Quantising {folder.name}", len(shapes), progress) as show:
            for done, name in enumerate(checkpoint.floats, 1):
                weight = read(checkpoint, name, place)
                codes = codes_of(weight, prepare(name, weight))
                for part, rows in rows_on_disk(checkpoint.config, name).items():
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
        copy_companions(folder, partial, checkpoint.config_json["model_type"] == "chatglm")
        config_json = as_transformers(checkpoint, rope_theta)
        config_json["quantization_config"] = write_quantization(schemes)
        write_json(partial / "config.json", config_json)
    return target


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
    for part, n_rows in names_on_disk(config, name).items():
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

    def __init__(self, folder: Path) -> None:
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
        file = self.folder / f"{len(self.files)}.safetensors"
        try:
            save_file(self.pending, file, metadata={"format": "pt"})
        except SafetensorError as failure:  # a full disk, for instance
            raise CheckpointError(f"{file}: cannot be written ({failure})") from None
        file.chmod(self.folder.stat().st_mode & 0o666)  # safetensors lets only its owner read it
        self.files.append(list(self.pending))
        self.pending, self.size = {}, 0

    def close(self) -> None:
        self.flush()
        if len(self.files) == 1:
            (self.folder / "0.safetensors").rename(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self.files):
            file = f"model-{i + 1:05}-of-{len(self.files):05}.safetensors"
            (self.folder / f"{i}.safetensors").rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        write_json(self.folder / "model.safetensors.index.json", index)


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """Yields a folder to fill, which becomes `target` if nothing fails, and is gone if it does."""
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target}: must not exist yet; remove it, or choose another place")
    partial = target.with_name(f"{target.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        for left in sorted(partial.iterdir()):  # by a run that was killed
            if left.suffix not in (".safetensors", ".json") and left.name not in COMPANIONS:
                raise CheckpointError(f"{left}: is not of a run that was killed; remove its folder")
            left.unlink()
        try:
            yield partial
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Until its end, or that of the process, nobody else has this folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CheckpointError(f"{folder}: another run is writing into it") from None
    finally:
        os.close(handle)


def copy_companions(source: Path, target: Path, remote_code: bool) -> None:
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if remote_code and (target / "tokenizer_config.json").is_file():
        # Its class is code beside the checkpoint, which is not copied.
        given = read_json(target / "tokenizer_config.json")
        given.pop("auto_map", None)
        given["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(target / "tokenizer_config.json", given)
    if not (target / "tokenizer.json").is_file() and (source / "tokenizer.model").is_file():
        convert_tokenizer(source / "tokenizer.model").save(str(target / "tokenizer.json"))
    if not (target / "tokenizer.json").is_file():
        warnings.warn(
            f"{source}: has neither tokenizer.json nor tokenizer.model, so what is written has no "
            "tokenizer either; copy one into it",
            stacklevel=5,
        )


def as_transformers(checkpoint: Checkpoint, rope_theta: float | None) -> dict[str, Any]:
    """The config.json to write: the source's, or for the remote code, transformers' of it."""
    config, given = checkpoint.config, dict(checkpoint.config_json)
    given.pop("compression_config", None)  # that of tensors which are not quantised after all
    if given["model_type"] != "chatglm":
        if rope_theta is not None:
            nested = given.get("rope_parameters")
            if isinstance(nested, dict):
                given["rope_parameters"] = nested | {"rope_theta": rope_theta}
            if "rope_theta" in given or not isinstance(nested, dict):
                given["rope_theta"] = rope_theta
        return given
    partial = config.rotary_dim / config.head_dim
    stops = list(config.eos_token_ids)
    return {
        "architectures": ["Glm4ForCausalLM" if config.sandwich else "GlmForCausalLM"],
        "model_type": "glm4" if config.sandwich else "glm",
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        **{names[1]: getattr(config, field) for field, names in FIELDS.items()},
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        # Before version 5 of transformers these two stood alone.
        "rope_theta": config.theta,
        "partial_rotary_factor": partial,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.theta,
            "partial_rotary_factor": partial,
        },
        "eos_token_id": given.get("eos_token_id", stops),
        "pad_token_id": given.get("pad_token_id", stops[0] if stops else None),
    }


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
