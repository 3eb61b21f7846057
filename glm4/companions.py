"""What `glm4 quantize` passes on besides tensors and config.json: the tokenizer, its template, the
defaults of generation, the licence. Who made the checkpoint chose what lies under these names."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

from glm4.checkpoint_file import read_file, read_json
from glm4.hub import COMPANIONS
from glm4.tokenizer_model import convert_tokenizer
from glm4.working_folder import WorkingFolder


def copy_companions(source: Path, target: WorkingFolder, remote_code: bool) -> None:
    """All of `COMPANIONS` that there are; tokenizer.model becomes tokenizer.json.

    Raises:
        CheckpointError: one is no regular file, is a link out of the folder, or is too large.
        ValueError: tokenizer.model is not one of GLM-4.
    """
    found = {name: source / name for name in COMPANIONS if os.path.lexists(source / name)}
    ranks = source / "tokenizer.model"
    for name, path in found.items():
        of_code = name == "tokenizer_config.json" and remote_code
        target.write(name, without_code(path) if of_code else read_file(path))
    if "tokenizer.json" not in found and os.path.lexists(ranks):
        text = convert_tokenizer(ranks).to_str(pretty=True)
        target.write("tokenizer.json", text.encode())
    elif "tokenizer.json" not in found:
        warnings.warn(
            f"{source}: has neither tokenizer.json nor tokenizer.model, so what is written has no "
            "tokenizer either; copy one into it",
            stacklevel=5,
        )


def without_code(path: Path) -> bytes:
    """A tokenizer_config.json whose class is code beside it, which is not copied."""
    given = read_json(path)
    given.pop("auto_map", None)
    given["tokenizer_class"] = "PreTrainedTokenizerFast"
    return as_json(given)


def as_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
