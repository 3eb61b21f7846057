"""What was built: the extension as it lies in this installation."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import pytest

from glm4_kernels.extension import build_info, extension


def test_build_info():
    extension()
    info = build_info()
    assert set(info) == {
        *("compiler", "sanitize", "cuda", "cuda_architectures"),
        *("cpu_features", "cpu_variants", "flash_decode_variants", "simd_variants"),
    }
    assert re.match(r"\w+ \d+", info["compiler"])
    assert info["cuda"] is None or re.match(r"\d+\.\d+", info["cuda"])
    assert bool(info["cuda"]) == bool(info["cuda_architectures"])
    assert info["cpu_variants"][-1] == "portable"
    assert ("avx2" in info["cpu_variants"]) == ("avx2" in info["cpu_features"])
    assert info["flash_decode_variants"][-1] == "portable"
    assert info["simd_variants"][-1] == "portable"
    assert ("avx512" in info["simd_variants"]) == ("avx512bw" in info["cpu_features"])


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(),
    reason="compares with /proc/cpuinfo of x86-64 Linux",
)
def test_cpu_features_are_the_systems():
    flags = re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split()
    extension()
    names = {"avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"}
    assert names & set(build_info()["cpu_features"]) == names & set(flags)


def cuobjdump(*options: str) -> str:
    extension()
    if build_info()["cuda"] is None:
        pytest.skip("the extension was built without CUDA")
    triton = pytest.importorskip("triton", reason="its wheel carries cuobjdump")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), *options, extension().__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_every_architecture_is_in_the_binary():
    cubins = set(re.findall(r"\.sm_(\d+)\.cubin", cuobjdump("--list-elf")))
    ptx = set(re.findall(r"\.sm_(\d+)\.ptx", cuobjdump("--list-ptx")))
    asked = build_info()["cuda_architectures"].split()
    assert cubins == {a.split("-")[0] for a in asked if not a.endswith("-virtual")}
    assert ptx == {a.split("-")[0] for a in asked if not a.endswith("-real")}


def test_no_cuda_kernel_spills():
    usage = re.findall(
        r"Function (\S+):\s+REG:\d+ STACK:(\d+) .*?LOCAL:(\d+)", cuobjdump("--dump-resource-usage")
    )
    assert any("column_kernel" in name for name, *_ in usage)
    assert any("tile_kernel" in name for name, *_ in usage)
    spilled = [name for name, stack, local in usage if (stack, local) != ("0", "0")]
    assert not spilled
