from __future__ import annotations

import copy
import json

import pytest
import torch

from glm4 import env
from glm4.cli import main

GPU = {"name": "H200", "capability": "9.0", "memory_gib": 139.8, "multiprocessors": 132}
BUILT = {"compiler": "GNU 12", "cuda": "13.0", "cpu_features": ["avx2", "fma"]}
COMPLETE = {
    "python": "3.12.0",
    "platform": "Linux",
    "packages": {"torch": "2.11", "triton": "3.6", "transformers": "5.17"},
    "torch_cuda": "13.0",
    "nvidia_driver": "580.1",
    "cpu": {
        "model": "EPYC", "instruction_sets": ["avx2"], "cores": 2, "memory_gib": 8.0, "threads": 2,
        "threads_allowed": {"torch": 2, "affinity": 4}, "threads_adapt": True,
    },
    "gpus": [GPU],
    "extension": BUILT,
}  # fmt: skip


def test_json_is_what_is_here(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # The metadata of a CUDA wheel does not say "+cu130".
    assert found["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["cpu"]["threads"] == torch.get_num_threads() and found["cpu"]["cores"] >= 1
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["cpu"]["model"] and "extension" in found
    assert ("an NVIDIA GPU" in str(found["missing"])) == (not torch.cuda.is_available())


def test_text_is_the_same_for_people(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    found = env.environment()
    for part in (found["python"], found["packages"]["torch"], found["cpu"]["model"]):
        assert part in text
    assert all(m["what"] in text and m["cost"] in text for m in found["missing"])


@pytest.mark.parametrize(
    "change, what",
    [
        ({}, []),
        ({"gpus": []}, ["an NVIDIA GPU"]),
        ({"gpus": [], "nvidia_driver": None, "torch_cuda": None}, ["an NVIDIA GPU"]),
        ({"gpus": [], "torch_cuda": None}, ["a torch built with CUDA"]),
        ({"packages": {"triton": None, "transformers": "5"}}, ["Triton"]),
        ({"packages": {"triton": "3", "transformers": None}}, ["transformers"]),
        ({"extension": {"error": "no _C"}}, ["the C++ extension of glm4-kernels (no _C)"]),
        ({"extension": {"cuda": None}}, ["the CUDA half of the extension"]),
        ({"extension": {"cuda": None}, "gpus": []}, ["an NVIDIA GPU"]),
    ],
)
def test_missing_parts(change, what):
    found = copy.deepcopy(COMPLETE) | change
    missing = env.missing_parts(found)
    assert [any(m["what"].startswith(w) for w in what) for m in missing] == [True] * len(what)
    assert all(m["cost"] for m in missing)
    report = env.report({**found, "missing": missing})
    assert ("nothing is missing" in report) == (not what)
    assert ("H200, sm_90, 139.8 GiB, driver 580.1" in report) == bool(found["gpus"])
