"""`glm4 env`: what is installed, built and found here, and what each missing part costs."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

from glm4.processors import cpu_limits

PACKAGES = ("glm4-kernels", "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")

# As /proc/cpuinfo spells those that kernels of this package or of torch make use of.
INSTRUCTION_SETS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip


def version(package: str = "glm4-kernels") -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Everything that `glm4 env` reports, ready for JSON."""
    import torch

    from glm4_kernels.extension import build_info

    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: version(package) for package in PACKAGES},
        "torch_cuda": torch.version.cuda,
        "nvidia_driver": _nvidia_driver(),
        "cpu": {**_cpu(), **_threads(torch.get_num_threads())},
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "extension": build_info(),
    }
    return {**found, "missing": missing_parts(found)}


def report(found: dict[str, Any]) -> str:
    """The same, for people."""
    cpu, built = found["cpu"], found["extension"]
    lines = [f"{'python':14}{found['python']} on {found['platform']}"]
    for package, installed in found["packages"].items():
        lines.append(f"{package:14}{installed or 'not installed'}")
    memory = f", {cpu['memory_gib']} GiB" if cpu["memory_gib"] else ""
    lines.append(f"{'CPU':14}{cpu['model']}, {cpu['threads']} threads of {cpu['cores']}{memory}")
    lines.append(f"{'':14}{_why(cpu)}")
    lines.append(f"{'':14}{' '.join(cpu['instruction_sets']) or 'instruction sets unknown'}")
    for gpu in found["gpus"]:
        lines.append(
            f"{'GPU':14}{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, "
            f"{gpu['memory_gib']} GiB, driver {found['nvidia_driver'] or 'unknown'}"
        )
    for name, value in built.items():
        shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        lines.append(f"{'extension':14}{name.replace('_', ' ')}: {shown}")
    lines += [f"\nmissing: {m['what']}\n  cost: {m['cost']}" for m in found["missing"]]
    return "\n".join(lines if found["missing"] else [*lines, "\nnothing is missing"])


def missing_parts(found: dict[str, Any]) -> list[dict[str, str]]:
    """[{"what": ..., "cost": ...}]: what a user of this machine may want to add."""
    missing: list[dict[str, str]] = []

    def note(what: str, cost: str) -> None:
        missing.append({"what": what, "cost": cost})

    gpus, built = found["gpus"], found["extension"]
    if not gpus and found["torch_cuda"] is None and found["nvidia_driver"]:
        note(
            "a torch built with CUDA (this machine has an NVIDIA driver)",
            "the GPU stays unused; install a CUDA build of torch",
        )
    elif not gpus:
        note(
            "an NVIDIA GPU",
            f"models run on the CPU, in {'PyTorch' if 'error' in built else 'C++'}: slower, since "
            "its memory is",
        )
    if found["packages"]["triton"] is None:
        note("Triton", "on a GPU, PyTorch references run in place of the fused kernels: slower")
    if "error" in built:
        note(
            f"the C++ extension of glm4-kernels ({built['error']})",
            "int4 and int8 weights cannot run, and PyTorch references run the rest on the CPU: "
            "slower; with a C++17 compiler, run `pip install .` again",
        )
    elif gpus and built["cuda"] is None:
        note(
            "the CUDA half of the extension (it was built without nvcc)",
            "int4 and int8 weights run on the CPU only; with nvcc, run `pip install .` again",
        )
    if found["packages"]["transformers"] is None:
        note("transformers (optional)", "the tests that compare with it cannot run; nothing else")
    return missing


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
    }


def _nvidia_driver() -> str | None:
    found = re.search(r"Kernel Module\D*([\d.]+)", _read("/proc/driver/nvidia/version"))
    return found[1] if found else None


def _cpu() -> dict[str, Any]:
    info = _read("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", info, re.MULTILINE)
    flag_set = set(flags[1].split()) if flags else set()
    memory = re.search(r"MemTotal:\s*(\d+)", _read("/proc/meminfo"))
    return {
        "model": name[1] if name else platform.processor() or platform.machine(),
        "instruction_sets": [flag for flag in INSTRUCTION_SETS if flag in flag_set],
        "cores": cpu_limits()["affinity"],
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
    }


def _threads(torch_count: int) -> dict[str, Any]:
    """What decides how many threads a model takes where nobody says how many."""
    from glm4.threads import thread_waits

    allowed = {"torch": torch_count, **cpu_limits()}
    return {
        "threads": min(allowed.values()),
        "threads_allowed": allowed,
        "threads_adapt": bool(thread_waits()),
    }


def _why(cpu: dict[str, Any]) -> str:
    allowed = ", ".join(f"{name} {count}" for name, count in cpu["threads_allowed"].items())
    adapt = "fewer beside busy processes" if cpu["threads_adapt"] else "always, without schedstat"
    return f"threads: the least of {allowed}; {adapt}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
