"""Where a checkpoint lies: a folder, the bundled demo, or a snapshot of a Hub repository."""

from __future__ import annotations

import os
import re
from pathlib import Path

from glm4.tensor_files import CheckpointError
from glm4_kernels.library import bad_type

DEMO = Path(__file__).parent / "demo"


def find_folder(path_or_repo: str | os.PathLike[str]) -> Path:
    if not isinstance(path_or_repo, (str, os.PathLike)):
        raise bad_type("load", "path_or_repo", "a folder or 'org/name'", repr(path_or_repo))
    if path_or_repo == "demo":
        return DEMO
    name = os.fspath(path_or_repo)
    path = Path(os.path.expanduser(name))  # leaves a user who is not there as it is
    try:
        if name and path.is_dir():
            return path
        if name and path.exists():
            raise CheckpointError(f"{path}: must be a checkpoint's folder, got a file")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise CheckpointError(
            f"{name!r}: no such folder, and not a Hub repository of the form org/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # network, HTTP, authorisation, offline mode: many classes
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{name}: no such folder, and the Hugging Face Hub did not give it "
            f"({type(error).__name__}: {reason})"
        ) from None
