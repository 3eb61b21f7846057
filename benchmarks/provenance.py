"""Where a result comes from: device, versions, source tree, command, date.

No host name and no path outside the repository is recorded: results are committed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "glm4_kernels", "glm4", "benchmarks", "setup.py", "CMakeLists.txt")
SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h", ".txt"}

# Packages whose versions decide a timing; absent ones are peers that the run skips.
VERSIONS = ("torch", "triton", "numpy")
PEERS = ("transformers", "flashinfer-python", "liger-kernel", "quack-kernels", "flash-attn")


def provenance(
    device: torch.device, quick: bool = False, peers: tuple[str, ...] = PEERS
) -> dict[str, Any]:
    versions = {name: installed_version(name) for name in VERSIONS + peers}
    cuda = device.type == "cuda"
    return {
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions | {"cuda": torch.version.cuda if cuda else None},
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", *SOURCES)),
        "source_hash": source_hash(),
        "command": shown_command(sys.argv[1:]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": quick,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    name = model.group(1).strip() if model else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git(*args: str) -> str | None:
    """Output of a git command in this repository; None where there is no git or no history."""
    try:
        ran = subprocess.run(["git", *args], cwd=REPOSITORY, capture_output=True, text=True)
    except OSError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def source_hash(root: Path = REPOSITORY) -> str:
    """SHA-256 over names and contents of all sources, so that a result names what it timed even
    where the tree travelled without its history."""
    digest = hashlib.sha256()
    for top in SOURCES:
        files = [root / top] if (root / top).is_file() else sorted((root / top).rglob("*"))
        for file in files:
            if file.is_file() and file.suffix in SUFFIXES:
                digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def shown_command(arguments: list[str]) -> str:
    """The command line, absolute paths cut down to their last part."""
    shown = (Path(arg).name if os.path.isabs(arg) else arg for arg in arguments)
    return " ".join(("python -m benchmarks", *shown))


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes the file whole or not at all: a killed run leaves the last complete state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)
