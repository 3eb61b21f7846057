"""From a checkpoint on disk to a `Model`: safetensors and JSON only, checked before use.

Quirks of checkpoints end here: both families of tensor names are read, whatever the model type.

Nothing is read before every tensor's name, shape and dtype agree with config.json. A tensor that
has no place in the model is refused where it may change the result, else named in a warning.
Tensors are then read one by one onto the device, so the host never holds more than the model plus
one. Quantised weights are the matter of `quantized_checkpoint`.
Each error is one line that names the file, and the field or tensor.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm4.checkpoint_file import CheckpointError, one_line, read_json
from glm4.config_json import DTYPES, check_theta, config_of, declared_dtype
from glm4.hub import DEMO as DEMO  # where it has always been found
from glm4.hub import find_folder
from glm4.int8_error import warn_of_int8
from glm4.model import Config, Model, Weight, check_dtype, overflows
from glm4.progress import progress_bar
from glm4.quantization_config import Quantization, read_quantization
from glm4.quantization_policy import LINEAR, Policy, policy_of, preparer
from glm4.quantized_checkpoint import QuantizedPart, find_part, read_quantized
from glm4.tensor_files import STORED_DTYPES, Stored, find_tensors
from glm4.tensor_names import ROOTS, Naming, naming_of
from glm4.threads import check_threads
from glm4_kernels.huge_pages import zeros_in_huge_pages
from glm4_kernels.library import bad_value, without_autocast
from glm4_kernels.quantized_matmul import require_quantized_matmul


@torch.no_grad()
@without_autocast
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
        activations: of quantised layers, "int8" or "float"; see `gk.quantized_matmul`. None is
            "float" on a GPU and "int8" on a CPU, where loading then takes a few tokens through the
            model both ways and warns if a layer's output is off by over 5 %.
        threads: of the CPU, that each pass takes. None takes as many as torch, the affinity mask
            and the control groups allow, and fewer while other processes need the processors; see
            `glm4.threads`.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or not a supported GLM-4.
        ValueError, TypeError: another argument is wrong.
        RuntimeError: the weights are quantised, and glm4_kernels was built without the kernels
            that `device` needs for them.
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

    rope_theta = check_theta("load", rope_theta)
    folder = find_folder(path_or_repo)
    checkpoint = examine(folder, rope_theta)
    config = checkpoint.config
    if dtype == "auto":
        dtype = checkpoint.dtype
        if checkpoint.quantised and overflows(config, dtype):
            dtype = torch.bfloat16
    dtype = DTYPES[str(dtype).removeprefix("torch.")]
    check_dtype(config, dtype)
    prepare = preparer(policy, config)
    if checkpoint.quantised or policy:
        require_quantized_matmul(target)  # now, not when the whole model was read
    checkpoint.warn()

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
    if activations is None and target.type == "cpu":
        warn_of_int8(model)
    return model


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose tensors are all there and as its config.json asks; none of them is read yet.

    Each tensor of `config.shapes`, a tied head aside, is in `floats` or in `quantised`.
    """

    folder: Path
    config: Config
    config_json: dict[str, Any]
    floats: dict[str, list[Stored]]
    quantised: dict[str, list[QuantizedPart]]
    remarks: tuple[str, ...]  # what its user should know, though nothing is wrong

    @property
    def dtype(self) -> torch.dtype:
        """What config.json says, else that of the embedding; CheckpointError: it says another."""
        declared = declared_dtype(self.folder / "config.json", self.config_json)
        return declared or STORED_DTYPES[self.floats["embedding"][0].dtype]

    def warn(self) -> None:
        for remark in self.remarks:
            warnings.warn(one_line(remark), stacklevel=5)  # who called `load`, past its decorators


def examine(folder: Path, rope_theta: float | None = None) -> Checkpoint:
    """Raises CheckpointError if `folder` holds no whole GLM-4."""
    config_json = read_json(folder / "config.json")
    config, remarks = config_of(folder, config_json, rope_theta)
    listing, stored = find_tensors(folder)
    naming = naming_of(stored)
    if naming.remote_code:  # whose configs do not say it
        norm = naming.on_disk(replace(config, sandwich=True), "layers.0.post_attention_norm")
        config = replace(config, sandwich=norm.keys() <= stored.keys())
    if config.tied:
        config = settle_tied_head(config, stored, naming)
        if not config.tied:
            remarks.append(
                f"{listing}: the head differs from the embedding, though tie_word_embeddings is "
                "true; both are used as they are stored"
            )
    quantization = read_quantization(folder, config_json)
    floats, quantised = match_tensors(config, stored, listing, naming, quantization)
    remarks += settle_unused(stored, listing)
    return Checkpoint(folder, config, config_json, floats, quantised, tuple(remarks))


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
        found = "one" if n_devices == 1 else str(n_devices)
        if n_devices == 0:
            built = f"torch {torch.__version__} is built without CUDA"
            found = f"none ({'no GPU, or no driver for it' if torch.version.cuda else built})"
        expected = f"one of the CUDA devices that torch finds here; it finds {found}"
        raise bad_value("load", "device", expected, repr(str(device)))
    return torch.empty(0, dtype=torch.uint8, device=resolved).device  # with its index


def settle_tied_head(config: Config, stored: dict[str, Stored], naming: Naming) -> Config:
    """Leaves of a tied model's embedding and head the one, as embedding, or where their values
    differ both: then the stored head holds, as in transformers."""
    (embedding,) = naming.on_disk(config, "embedding")
    (head,) = naming.on_disk(config, "lm_head")
    if head not in stored:
        return config
    if embedding not in stored:
        stored[embedding] = stored[head]
    elif {stored[name].shape for name in (head, embedding)} != {(config.vocab, config.hidden)}:
        return replace(config, tied=False)  # `match_tensors` refuses it
    elif not torch.equal(stored[embedding].read(), stored[head].read()):
        return replace(config, tied=False)
    del stored[head]
    return config


def match_tensors(
    config: Config,
    stored: dict[str, Stored],
    listing: Path,
    naming: Naming,
    quantization: Quantization | None,
) -> tuple[dict[str, list[Stored]], dict[str, list[QuantizedPart]]]:
    """What is stored of each tensor in `config.shapes`, as floats or else quantised, taken out of
    `stored`; refuses any that differs."""
    floats: dict[str, list[Stored]] = {}
    quantised: dict[str, list[QuantizedPart]] = {}
    for ours, (_, *rest) in config.shapes.items():
        if ours == "lm_head" and config.tied:
            continue
        kind = ours.rpartition(".")[2]
        rows_of = naming.on_disk(config, ours)
        for name, n in rows_of.items():
            expected = [n, *rest]
            if quantization is not None and kind in LINEAR:
                module = name.removesuffix(".weight")
                part = find_part(quantization, module, expected, stored, listing)
                if part is not None:
                    quantised.setdefault(ours, []).append(part)
                    continue
            tensor = stored.pop(name, None)
            if tensor is None:
                headless = ours == "lm_head" and naming.bare and not naming.remote_code
                why = "; it was saved from the base model, which has no head" if headless else ""
                raise CheckpointError(f"{listing}: tensor {name} {expected} is missing{why}")
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
    return floats, quantised


# Tables of RoPE that some checkpoints carry; the model computes its own.
ROPE_TABLES = {"inv_freq", "cos_cached", "sin_cached"}
KV_SCALES = {
    f"{x}_{what}" for x in ("q", "k", "v", "kv", "prob") for what in ("scale", "zero_point")
}


def settle_unused(stored: dict[str, Stored], listing: Path) -> list[str]:
    """A remark on what `stored` still has; CheckpointError if it may change what is computed."""
    scales, others = [], []
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        attention = "attn" in module or "attention" in module
        if not tensor.placed or kind in ROPE_TABLES or (kind == "bias" and is_zero(tensor)):
            continue
        of_cache = kind == "output_scale" and module.endswith(("k_proj", "v_proj"))
        if attention and (kind in KV_SCALES or of_cache):
            scales.append(name)
        elif name.partition(".")[0] in ROOTS and kind != "_extra_state":
            raise CheckpointError(
                f"{tensor.path}: tensor {name} {list(tensor.shape)} is unexpected; config.json "
                "describes a model without it"
            )
        else:
            others.append(name)
    remarks = []
    if scales:
        remarks.append(
            f"{listing}: the KV cache is not quantised here, so the scales for that are not used: "
            f"{some(scales)}"
        )
    if others:
        remarks.append(
            f"{listing}: tensors that are no part of a GLM-4 are not used: {some(others)}"
        )
    return remarks


MOST_ROWS = 1 << 24  # no layer has more, so no bias that is read to see whether it is zero


def is_zero(bias: Stored) -> bool:
    """Some tools store a bias of zeros for layers that have none."""
    small = len(bias.shape) <= 1 and math.prod(bias.shape) <= MOST_ROWS
    return bias.dtype in STORED_DTYPES and small and not bias.read().any()


def some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def read_into(weight: Tensor, parts: list[Stored]) -> None:
    """Fills `weight` with the rows of its parts; refuses NaN and infinities."""
    row = 0
    for part in parts:
        rows = weight[row : row + part.shape[0]]
        part.read_into(rows)
        smallest, largest = (x.item() for x in rows.aminmax())  # either is NaN if any value is
        if not (math.isfinite(smallest) and math.isfinite(largest)):
            raise CheckpointError(
                f"{part.path}: tensor {part.name} must be finite, got NaN or infinite values "
                f"(stored as {part.dtype}, read as {weight.dtype})"
            )
        row += part.shape[0]
