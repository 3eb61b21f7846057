"""Where a checkpoint lies: a folder, the bundled demo, or a snapshot of a Hub repository.

And which files it consists of; nothing else of a repository is downloaded, read or copied.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from glm4.checkpoint_file import CheckpointError
from glm4_kernels.library import bad_type

DEMO = Path(__file__).parent / "demo"
# What a checkpoint has besides tensors and config.json, and `glm4 quantize` passes on.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
# By their names in the repository's top folder: neither pickles nor code.
DOWNLOADED = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "quantize_config.json",
    "quant_config.json",
    "tokenizer.model",
    *COMPANIONS,
)


def find_folder(path_or_repo: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint; downloads a Hub repository.

    Raises:
        CheckpointError: there is no such folder, and the Hub does not give it.
    """
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
        # Its "*" goes across "/": without the second, the tensors of every sub-folder would come.
        return Path(
            snapshot_download(name, allow_patterns=list(DOWNLOADED), ignore_patterns=["*/*"])
        )
    except Exception as error:  # network, HTTP, authorisation, offline mode: many classes
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{name}: no such folder, and the Hugging Face Hub did not give it "
            f"({type(error).__name__}: {reason})"
        ) from None
