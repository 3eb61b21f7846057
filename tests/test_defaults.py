"""What a process may set for itself, its default dtype and device, autocast, grad mode, changes
neither a token nor a bit of the logits."""

from __future__ import annotations

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint, write_tokenizer
from conftest import REPOSITORY

import glm4
from glm4.tokenizer import Tokenizer
from glm4_kernels.library import without_autocast

# Of torch's functions that make a tensor of no tensor, those that take the process's defaults.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full"),
    *("linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor"),
    *("tensor", "tril_indices", "triu_indices", "zeros"),
}
SOURCES = [p for package in ("glm4", "glm4_kernels") for p in (REPOSITORY / package).glob("*.py")]


def factory_calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in FACTORIES:
                yield node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_every_factory_names_dtype_and_device(path):
    tree = ast.parse(path.read_text())
    for call in factory_calls(tree):
        named = {keyword.arg for keyword in call.keywords}
        assert named >= {"dtype", "device"}, f"{path}:{call.lineno}: {ast.unparse(call)}"
    imported = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "torch"]
    assert not FACTORIES & {alias.name for n in imported for alias in n.names}


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# A tensor of the host's that lands on "meta" has no data, so that what reads it fails; on "cuda"
# it would fail, or be slow.
SETTINGS = {
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float16": lambda: default_dtype(torch.float16),
    "default device meta": lambda: torch.device("meta"),
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "inference mode": torch.inference_mode,
    "grad enabled": torch.enable_grad,
}
PROMPTS = [list(range(3, 73)), [3], [250, 4, 9]]  # over a page, the shortest, short


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("defaults") / "tiny"
    return write_tokenizer(write_checkpoint(folder, dtype=torch.bfloat16))


def answers(folder: Path, work: Path, ids: torch.Tensor) -> dict[str, object]:
    """What the main path says: loaded, quantised on the way, and written quantised."""
    found: dict[str, object] = {}
    tokenizer = Tokenizer(folder)
    found["text"] = tokenizer.decode(tokenizer.encode("the word"))
    for quantize in (None, "int8", "int4"):
        for dtype in ("float32", "bfloat16"):
            model = glm4.load(folder, "cpu", dtype, quantize)
            name = f"{dtype}, {quantize}"
            found[f"{name}: logits"] = model.logits(ids)
            found[f"{name}: greedy"] = model.generate(PROMPTS, 6, stop_token_ids=())
            drawn = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1}
            found[f"{name}: drawn"] = model.generate(PROMPTS, 6, seed=1, **drawn)
    exact = glm4.load(folder, "cpu", "float32", "int4", rope_mode="exact", activations="float")
    found["exact, float activations"] = exact.logits(ids)
    for flags in ({}, {"bits": 8, "group_size": None, "symmetric": False}):
        target = work / f"target{len(flags)}"
        glm4.quantize_checkpoint(folder, target, device="cpu", **flags)
        found[f"{target.name}: bytes"] = (target / "model.safetensors").read_bytes()
        found[f"{target.name}: logits"] = glm4.load(target, "cpu").logits(ids)
    return found


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    return answers(folder, tmp_path_factory.mktemp("expected"), torch.tensor(PROMPTS[:1]))


@pytest.mark.parametrize("setting", SETTINGS)
def test_main_path_is_the_same_under(setting, expected, folder, tmp_path):
    ids = torch.tensor(PROMPTS[:1])
    with SETTINGS[setting]():
        found = answers(folder, tmp_path, ids)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == torch.float32 and found[name].device.type == "cpu", name
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_reference_computes_in_its_own_dtypes(dtype):
    product = without_autocast(torch.mm)
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype):
        assert torch.mm(x, x).dtype == dtype, "autocast of nothing proves nothing"
        assert product(x, mat2=x).dtype == torch.float32
        assert torch.mm(x, x).dtype == dtype, "on again afterwards"
