"""Packers of the quantised formats, each written from its definition, value by value, and small
checkpoints made with them. Numpy and shifts here; `glm4` uses torch and bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import write_json
from safetensors.torch import load_file, save_file
from torch import Tensor

LINEAR = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_up_proj",
    "down_proj",
    "query_key_value",
    "dense",
    "dense_h_to_4h",
    "dense_4h_to_h",
    "lm_head",
    "output_layer",
]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words_along_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """[R, C] -> uint32 [ceil(R / V), C]; value i of a word is row V * r + i."""
    per_word = 32 // bits
    values = np.pad(values, ((0, -len(values) % per_word), (0, 0))).astype(np.uint32)
    words = np.zeros((len(values) // per_word, values.shape[1]), np.uint32)
    for i in range(per_word):
        words |= values[i::per_word] << np.uint32(bits * i)
    return words


def words_along_columns(values: np.ndarray, bits: int) -> np.ndarray:
    return words_along_rows(values.T, bits).T


def awq_words(values: np.ndarray) -> np.ndarray:
    words = np.zeros((len(values), values.shape[1] // 8), np.uint32)
    for i, column in enumerate(AWQ_ORDER):
        words |= values[:, column::8].astype(np.uint32) << np.uint32(4 * i)
    return words


def tensor(words: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32).copy())


class Matrix:
    """Random codes of a weight [n, k], and the weight that they stand for, in fp32: exact."""

    def __init__(
        self,
        generator: np.random.Generator,
        n: int,
        k: int,
        bits: int = 4,
        group_size: int | None = 128,
        symmetric: bool = True,
        group: np.ndarray | None = None,
        lowest_zero: int = 1,
        zero_row: int | None = None,
        scale_dtype: torch.dtype = torch.float16,
    ) -> None:
        size = group_size or k
        self.n, self.k, self.bits, self.symmetric = n, k, bits, symmetric
        self.group = np.arange(k) // size if group is None else group  # of each column
        n_groups = -(-k // size)
        half, top = 2 ** (bits - 1), 2**bits - 1
        self.u = generator.integers(0, top + 1, (n, k))
        self.z = generator.integers(lowest_zero, top + 1, (n, n_groups))
        if symmetric:
            self.z = np.full((n, n_groups), half)
        if zero_row is not None:
            self.z[zero_row] = 0
        scale = generator.uniform(0.5, 1.5, (n, n_groups)) * 3 / half * k**-0.5
        self.scale = torch.from_numpy(scale).to(scale_dtype)
        scales = self.scale.float().numpy()[:, self.group]
        steps = (self.u - self.z[:, self.group]).astype(np.float32)
        self.weight = torch.from_numpy(scales * steps)


def pack_quantized(m: Matrix, int8_zeros: bool = False, g_idx: bool = False) -> dict[str, Tensor]:
    half = 2 ** (m.bits - 1)
    tensors = {
        "weight_packed": tensor(words_along_columns((m.u - half) + half, m.bits)),
        "weight_scale": m.scale,
        "weight_shape": torch.tensor([m.n, m.k]),
    }
    if not m.symmetric:
        zeros = tensor(words_along_rows(m.z, m.bits))
        if int8_zeros:
            zeros = torch.from_numpy(m.z - half).to(torch.int8)
        tensors["weight_zero_point"] = zeros
    if g_idx:
        tensors["weight_g_idx"] = torch.from_numpy(m.group).int()
    return tensors


def gptq(m: Matrix, version: int = 1, g_idx: bool = True) -> dict[str, Tensor]:
    """v1 as most of its writers do it, each value for itself."""
    stored = (m.z - (version == 1)) % 2**m.bits
    tensors = {
        "qweight": tensor(words_along_rows(m.u.T, m.bits)),
        "qzeros": tensor(words_along_columns(stored.T, m.bits)),
        "scales": m.scale.T.contiguous(),
    }
    if g_idx:
        tensors["g_idx"] = torch.from_numpy(m.group).int()
    return tensors


def gptq_by_gptqmodel(m: Matrix) -> dict[str, Tensor]:
    """v1 made of v2: each word less 0x11111111 (or 0x01010101), so that zeros borrow."""
    words = words_along_columns(m.z.T, m.bits)
    words = words - np.uint32(0x11111111 if m.bits == 4 else 0x01010101)
    return gptq(m) | {"qzeros": tensor(words)}


def gptq_by_autogptq(m: Matrix) -> dict[str, Tensor]:
    """v1 with -1 in 32 bits, ORed in unmasked: a zero fills the word from its place upwards."""
    stored = ((m.z.T - 1) % 2**32).astype(np.uint32)
    per_word = 32 // m.bits
    words = np.zeros((len(stored), stored.shape[1] // per_word), np.uint32)
    for i in range(per_word):
        words |= stored[:, i::per_word] << np.uint32(m.bits * i)
    return gptq(m) | {"qzeros": tensor(words)}


def awq(m: Matrix) -> dict[str, Tensor]:
    return {
        "qweight": tensor(awq_words(m.u.T)),
        "qzeros": tensor(awq_words(m.z.T)),
        "scales": m.scale.T.contiguous(),
    }


def write_quantized(
    folder: Path,
    source: Path,
    config: dict[str, Any],
    make: Callable[[str, int, int, np.random.Generator], tuple[Matrix, dict[str, Tensor]] | None],
    changes: dict[str, Tensor | None] | None = None,
    file: str = "model.safetensors",
) -> dict[str, Tensor]:
    """The checkpoint of `source` with other linear layers: random ones, quantised.

    Args:
        make: from (module, n, k, generator) its matrix and tensors; None leaves it as it is.
        changes: to the tensors; None removes one.

    Returns:
        The weights that should be read, by module; of layers left alone too.
    """
    generator = np.random.default_rng(1)
    weights: dict[str, Tensor] = {}
    tensors: dict[str, Tensor | None] = {}
    for name, stored in sorted(load_file(source / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in LINEAR or module == name:
            tensors[name] = stored
            continue
        made = make(module, *stored.shape, generator)
        if made is None:
            tensors[name] = weights[module] = stored
        else:
            weights[module] = made[0].weight
            tensors |= {f"{module}.{part}": t for part, t in made[1].items()}
    folder.mkdir(parents=True, exist_ok=True)
    kept = {k: t for k, t in (tensors | (changes or {})).items() if t is not None}
    save_file({k: t.contiguous() for k, t in kept.items()}, folder / file)
    config_json = json.loads((source / "config.json").read_text())
    write_json(folder / "config.json", config_json | config)
    for name in ("tokenizer.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, folder)
    return weights
