"""The compiled kernels, executed on the CPU by `ptx_machine`: tests of this suite once more.

GLM4_COMPILED=90 python -m pytest tests/test_flash_decode.py    # all of a file, for sm_90
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="there is nothing to compile")

import faulty_launches
import memory_traffic

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the compiled code")

HERE = Path(__file__).parent
TESTS = (
    "rms_norm.py::test_matches_reference",
    "rms_norm.py::test_layouts",
    "add_rms_norm.py::test_matches_reference",
    "sandwich_norm.py::test_matches_reference",
    "swiglu.py::test_layouts",
    "swiglu.py::test_edges",
    "rope.py::test_layouts",
    "rope.py::test_masks_a_bad_position",
    "rope_kv_write.py::test_layouts",
    "rope_kv_write.py::test_masks_a_bad_index",
    "rope_kv_write.py::test_fp8_cache_matches_reference",
    "quantize_rows.py::test_matches_reference",
    "quantize_rows.py::test_every_code_and_the_middles_between",
    "merge_attention.py::test_matches_reference",
    "decode_schedule.py::test_other_programs_match_reference",
    "sample.py::test_any_number_of_rows",
    "flash_decode.py::test_last_split_of_few_keys",
    "flash_decode.py::test_causal_queries",
    "flash_decode.py::test_int8_cache",
    "flash_decode.py::test_fp8_cache",
)
# Tests of the C++ kernels; of flash_decode in fp16, which compiles to what bf16 does.
LEFT_OUT = "avx or portable or dtype1"
WITHOUT = {80: f"not ({LEFT_OUT} or fp8 or float8)", 90: f"not ({LEFT_OUT})"}


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.exhaustive), 90])
def test_compiled_kernels(architecture):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["GLM4_COMPILED"] = str(architecture)
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    command += ["-k", WITHOUT[architecture], *(f"{HERE}/test_{test}" for test in TESTS)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]


def test_shared_memory_has_no_bank_conflicts(compiler):
    for architecture, launches in compiler.submit(memory_traffic.measured).result().items():
        for name, counts in launches.items():
            assert counts["shared wavefronts"] == counts["shared phases"] > 0, (architecture, name)
            if "norm" in name:
                assert counts["global bytes"] == 32 * counts["global sectors"], (architecture, name)


@pytest.fixture(scope="module")
def found(compiler):
    """What the machine says of faulty_launches.py."""
    return compiler.submit(faulty_launches.verdicts).result()


# In the order of events: forward and late, forward and early, backward and late, ...
def test_right_code_is_right_in_every_order(found):
    assert found["sum"] == found["product"] == ["right"] * 4


def test_a_missing_barrier_shows(found):
    assert found["sum without barriers"] == ["wrong", "wrong", "right", "right"]
    assert found["product without barriers"] == ["wrong"] * 4


def test_a_missing_wait_shows(found):
    assert found["product without waits"] == ["wrong", "right", "wrong", "right"]


@pytest.mark.parametrize(
    "what, message",
    [
        ("sum out of bounds", "16 bytes at 3584 to 4080, of 4092 there are"),
        ("sum misaligned", "16 bytes at an address that is no multiple of 16"),
        ("sum of unknown kind", "not known: frob.f32"),
        ("product beyond shared memory", "16 bytes at 16384 to"),
    ],
)
def test_faults_are_named(found, what, message):
    assert message in found[what]
