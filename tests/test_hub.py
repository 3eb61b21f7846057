"""`find_folder`: folders, and which files of a Hub repository are downloaded. Needs no network."""

from __future__ import annotations

import base64

import huggingface_hub
import pytest
from checkpoints import rewrite_as_chatglm, transformers_model, write_json
from huggingface_hub.utils import filter_repo_objects

import glm4
from glm4.hub import DEMO, find_folder
from glm4.quantize import quantize_checkpoint
from glm4.tokenizer import Tokenizer

SHARDS = """
model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json
"""
CODE = "configuration_chatglm.py modeling_chatglm.py tokenization_chatglm.py"
# What is needed of a repository, and what else lies there: kinds of the family, and all that people
# leave beside a model.
LISTINGS = {
    "zai-org/glm-4-9b-chat": (
        f"LICENSE config.json generation_config.json {SHARDS} tokenizer.model "
        "tokenizer_config.json",
        f".gitattributes README.md README_en.md configuration.json {CODE}",
    ),
    "zai-org/glm-4-9b-chat-hf": (
        f"LICENSE config.json generation_config.json {SHARDS} special_tokens_map.json "
        "tokenizer.json tokenizer_config.json",
        ".gitattributes README.md",
    ),
    "zai-org/GLM-4-9B-0414": (
        f"LICENSE chat_template.jinja config.json generation_config.json {SHARDS} "
        "special_tokens_map.json tokenizer.json tokenizer_config.json",
        ".gitattributes README.md",
    ),
    "org/gptq": (
        "config.json generation_config.json gptq_model-4bit-128g.safetensors quantize_config.json "
        "tokenizer.model tokenizer_config.json",
        f".gitattributes README.md {CODE} quant_log.csv",
    ),
    "org/everything": (
        "config.json model.safetensors tokenizer.json added_tokens.json quant_config.json "
        "LICENSE.md NOTICE",
        "pytorch_model.bin pytorch_model-00001-of-00002.bin pytorch_model.bin.index.json "
        "training_args.bin optimizer.pt scheduler.pt rng_state.pth model.ckpt x.pkl setup.py "
        "model-Q4_K_M.gguf onnx/model.onnx onnx/config.json tf_model.h5 flax_model.msgpack "
        "original/model.safetensors checkpoint-500/model.safetensors 1_Pooling/config.json "
        "checkpoint-500/tokenizer.json trainer_state.json all_results.json vocab.json "
        "runs/events.out.tfevents.1 assets/demo.mp4 model.safetensors.py openvino_model.xml",
    ),
}


@pytest.fixture
def downloads(monkeypatch):
    """The calls of `snapshot_download`, which gives the folder that stands at "folder"."""
    calls = {}

    def download(name, **options):
        calls[name] = options
        return calls["folder"]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


@pytest.mark.parametrize("name", LISTINGS)
def test_downloads_what_is_needed(name, downloads, tmp_path):
    downloads["folder"] = str(tmp_path)
    assert find_folder(name) == tmp_path
    needed, others = (names.split() for names in LISTINGS[name])
    assert list(filter_repo_objects([*needed, *others], **downloads[name])) == needed


def test_quantizes_a_repository_of_remote_code(downloads, tmp_path):
    """Its tokenizer comes too."""
    transformers_model("glm").save_pretrained(tmp_path / "hf")
    whole = tmp_path / "whole"
    rewrite_as_chatglm(tmp_path / "hf", whole)
    every_byte = [b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)]
    (whole / "tokenizer.model").write_bytes(b"".join(every_byte))
    write_json(whole / "tokenizer_config.json", {"auto_map": {}})
    for name in ("LICENSE", "modeling_chatglm.py", "pytorch_model.bin"):
        (whole / name).write_text(name)

    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    downloads["folder"] = str(snapshot)
    find_folder("org/name")
    for name in filter_repo_objects([p.name for p in whole.iterdir()], **downloads["org/name"]):
        (whole / name).rename(snapshot / name)
    target = quantize_checkpoint("org/name", tmp_path / "target", 8, None, progress=False)
    assert Tokenizer(target).encode("ab") == [258, 260, 97, 98]
    made = "LICENSE config.json model.safetensors tokenizer.json tokenizer_config.json"
    assert sorted(path.name for path in target.iterdir()) == made.split()


def test_a_bad_target_is_found_before_the_download(downloads, tmp_path):
    with pytest.raises(glm4.CheckpointError, match="must not exist yet"):
        quantize_checkpoint("org/name", tmp_path)
    assert downloads == {}


def test_finds_folders(tmp_path, monkeypatch):
    assert find_folder("demo") == DEMO
    assert find_folder(str(tmp_path)) == find_folder(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_folder("~") == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(glm4.CheckpointError, match="file: must be a checkpoint's folder, got a"):
        find_folder(tmp_path / "file")
    with pytest.raises(glm4.CheckpointError, match=r"cannot be read \(File name too long\)"):
        find_folder("n" * 300)


@pytest.mark.parametrize(
    "name",
    ["", "nowhere", "a/b/c", "../a", "-x/y", "org/na me", "nul\0/x", "~nobody-of-this-name/x"],
)
def test_rejects_names(name, downloads, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(glm4.CheckpointError, match="no such folder, and not a Hub repository"):
        find_folder(name)
    assert downloads == {}


def test_the_hubs_error_is_one_line(monkeypatch):
    def fails(*_, **__):
        raise OSError("no network\nand a page about it")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(glm4.CheckpointError, match=r"did not give it \(OSError: no network\)$"):
        find_folder("org/name")
