"""Mutated config.json and generation_config.json, seeded: whatever they hold, it is read or it is
a CheckpointError of one line that names the file."""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
from checkpoints import SIZES, write_checkpoint
from test_checkpoint import CHATGLM

import glm4
from glm4.checkpoint import examine
from glm4.checkpoint_file import read_json
from glm4.config_json import read_config
from glm4.quantization_config import read_quantization

NESTED = "[" * 900 + "]" * 900  # as deep as json reads; repr and == would go deeper
# JSON text, so that NaN, Infinity and what Python cannot hold come in as from a file.
TEXTS = r"""
null true false 0 -0.0 1 -1 2 3 64 128 320 0.5 1.0 -1e-5 1e-320 1e308 -1e308 1e39 1e400
NaN Infinity -Infinity "" "64" "yarn" "default" "linear" "nan" "\u0000\n" "(((" "int8" "bfloat16"
[] {} [1] [[]] [null] [1e400] [true] [-1] {"":1} {"(":{}}
"""
VALUES = [
    *TEXTS.split(),
    *("9" * 31, "9" * 400, "-" + "9" * 400, "9" * 4299, "9" * 5000),
    *(f"[{'9' * 400}]", f'"{"x" * 5000}"', NESTED, '{"a": ' * 300 + "1" + "}" * 300),
]
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
YARN = ROPE | {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "attention_factor": 1.1,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "truncate": True,
}
QUANTIZATION = {
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "meta": {"quantizer": "x"},
    },
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    "auto-round": {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "extra_config": {"lm_head": {"bits": 16}},
    },
}
BASES = {
    "glm": {"model_type": "glm", **SIZES, "rope_parameters": ROPE},
    "glm4 with yarn": {"model_type": "glm4", **SIZES, "rope_parameters": YARN},
    "glm4, both dicts": {"model_type": "glm4", **SIZES, "rope_scaling": YARN},
    "old style": {
        **{"model_type": "glm4", **SIZES, "rope_parameters": None},
        **{"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 2.0}},
    },
    "chatglm": CHATGLM | {"eos_token_id": [1, 2], "torch_dtype": "bfloat16"},
    **{
        name: {"model_type": "glm4", **SIZES, "quantization_config": given}
        for name, given in QUANTIZATION.items()
    },
}


@pytest.fixture
def folder():
    """In memory where that is possible: thousands of files are written."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def mutated(base, random):
    """JSON text of `base` with one to three of its values, at any depth, another."""
    marks = []

    def mark(value, depth=0):
        if isinstance(value, dict):
            return {key: chosen(one, depth) for key, one in value.items()}
        return value

    def chosen(value, depth):
        if random.random() < (0.06 if depth == 0 else 0.15):
            marks.append(random.choice(VALUES))
            return f"@{len(marks) - 1}@"
        return mark(value, depth + 1)

    while not marks:
        tree = mark(base)
    extra = random.choice(["dtype", "rope_ratio", "rope_scaling", "layernorm_epsilon", "rope_type"])
    if random.random() < 0.2:
        marks.append(random.choice(VALUES))
        tree[extra] = f"@{len(marks) - 1}@"
    text = json.dumps(tree)
    for i, value in enumerate(marks):
        text = text.replace(f'"@{i}@"', value)
    return text


def attempt(read, folder, text):
    """Reads; True if it was refused, as it should be."""
    (folder / "config.json").write_text(text)
    start = time.process_time()
    try:
        read(folder)
        refused = False
    except glm4.CheckpointError as error:
        message, refused = str(error), True
        assert "\n" not in message and len(message) < 600, text[:300]
        assert message.startswith(f"{folder}/"), message
    assert time.process_time() - start < 1, text[:300]
    return refused


@pytest.mark.parametrize("name", BASES)
def test_config(name, folder):
    draw = random.Random(name)
    refused = sum(attempt(read_config, folder, mutated(BASES[name], draw)) for _ in range(600))
    assert 60 < refused < 600  # some change nothing that matters


@pytest.mark.parametrize("name", QUANTIZATION)
def test_quantization_config(name, folder):
    """Each field, and its own fields, by each value."""
    given = QUANTIZATION[name]

    def read(folder):
        read_quantization(folder, read_json(folder / "config.json"))

    for field in given.keys() | {"config_groups", "dynamic", "extra_config", "meta", "ignore"}:
        for value in VALUES:
            for placed in (value, f'{{"lm_head": {value}}}', f'{{"lm_head": {{"bits": {value}}}}}'):
                whole = json.dumps({"quantization_config": given | {field: "@"}})
                attempt(read, folder, whole.replace('"@"', placed))


@pytest.mark.parametrize(
    "field",
    ["model_type", "eos_token_id", "rope_parameters", "dtype", "hidden_size", "hidden_act", "bits"],
)
def test_nested_as_deep_as_json_reads(field, folder):
    """Where the reader only just succeeds, what looks at the value may be the one to fail."""
    write_checkpoint(folder)
    base = BASES["gptq"]
    for depth in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit()):
        change = {field: "@"}
        if field == "bits":
            change = {"quantization_config": base["quantization_config"] | change}
        text = json.dumps(base | change).replace('"@"', "[" * depth + "]" * depth)
        assert attempt(lambda folder: examine(folder).dtype, folder, text)


@pytest.mark.parametrize("name", [name for name in BASES if name != "chatglm"])
def test_whole_checkpoint(name, folder):
    """Through the tensors, quantization_config and the dtype."""
    draw = random.Random(name)
    write_checkpoint(folder)

    def read(folder):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return examine(folder).dtype

    for _ in range(60):
        attempt(read, folder, mutated(BASES[name], draw))


def test_generation_config(folder):
    write_checkpoint(folder)
    text = (folder / "config.json").read_text()
    for value in VALUES:
        for generation in (value, f'{{"eos_token_id": {value}}}', f'{{"eos_token_id": [{value}]}}'):
            (folder / "generation_config.json").write_text(generation)
            attempt(read_config, folder, text)
