"""What `glm4 quantize` copies beside the weights: only what the checkpoint's folder holds."""

from __future__ import annotations

import json
import os
import shutil
import socket

import pytest
from checkpoints import write_checkpoint, write_json, write_tokenizer

import glm4
from glm4 import companions
from glm4.checkpoint_file import read_file
from glm4.hub import COMPANIONS
from glm4.quantize import quantize_checkpoint

HASH = "ab" + 62 * "0"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tokenizer(write_checkpoint(tmp_path_factory.mktemp("sources") / "glm4"))


def small(source, target):
    return quantize_checkpoint(source, target, 8, None, device="cpu", progress=False)


def test_all_are_copied(source, tmp_path):
    given = shutil.copytree(source, tmp_path / "given")
    for name in COMPANIONS:
        if name.endswith(".json") and name != "tokenizer.json":
            write_json(given / name, {"eos_token_id": 1})
        elif name != "tokenizer.json":
            (given / name).write_bytes(b"\xff of any bytes \0")
    target = small(given, tmp_path / "target")
    for name in COMPANIONS:
        assert (target / name).read_bytes() == (given / name).read_bytes(), name
    made = {"config.json", "model.safetensors", *COMPANIONS}
    assert {path.name for path in target.iterdir()} == made


def fifo(path, folder):
    os.mkfifo(path)


def device(path, folder):
    path.symlink_to("/dev/zero")


def device_by_number(path, folder):
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root makes devices")


def listening(path, folder):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def sub_folder(path, folder):
    path.mkdir()


def sparse(path, folder):
    with path.open("wb") as file:
        file.truncate(1 << 40)


def secret(path, folder):
    (folder / "secret").write_text("a secret of the user")
    path.symlink_to("../secret")


def absolute_secret(path, folder):
    (folder / "secret").write_text("a secret of the user")
    path.symlink_to(folder / "secret")


def through_a_folder(path, folder):
    """The last part is no link."""
    (folder / "secrets").mkdir()
    (folder / "secrets" / "id").write_text("a secret of the user")
    (path.parent / "sub").symlink_to("../secrets")
    path.symlink_to("sub/id")


def prefix(path, folder):
    """A folder beside it, whose name starts with the checkpoint's."""
    (folder / "modelled").mkdir()
    (folder / "modelled" / "secret").write_text("a secret of the user")
    path.symlink_to("../modelled/secret")


def nothing(path, folder):
    path.symlink_to("gone")


def itself(path, folder):
    path.symlink_to(path.name)


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (fifo, "must be a regular file"),
        (device, "is a link to /dev/zero, outside of the checkpoint's folder"),
        (device_by_number, "must be a regular file"),
        (listening, "must be a regular file"),
        (sub_folder, "must be a regular file"),
        (sparse, "must have at most (64|8) MB"),
        (secret, r"is a link to .*/secret, outside of the checkpoint's folder"),
        (absolute_secret, r"is a link to .*/secret, outside of the checkpoint's folder"),
        (through_a_folder, r"is a link to .*/secrets/id, outside of the checkpoint's folder"),
        (prefix, r"is a link to .*/modelled/secret, outside of the checkpoint's folder"),
        (nothing, "is a link to gone, which is not there"),
        (itself, "cannot be read"),
    ],
)
def test_refuses(name, make, message, source, tmp_path, monkeypatch):
    """In one line, before any work, and without opening what never ends."""
    given = shutil.copytree(source, tmp_path / "model")
    (given / "tokenizer.json").unlink()
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make(given / name, tmp_path)
    monkeypatch.setattr(glm4.quantize, "read", lambda *_: pytest.fail("worked"))
    with pytest.raises(glm4.CheckpointError, match=rf"model/{name}: ({message})") as caught:
        small(given, tmp_path / "new" / "target")
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("swap", [fifo, secret])
def test_replaced_between_look_and_opening(swap, source, tmp_path, monkeypatch):
    given = shutil.copytree(source, tmp_path / "model")
    path = given / "LICENSE"
    path.write_text("of the model")
    real = os.open

    def replace(place, *args, **options):
        monkeypatch.setattr(os, "open", real)
        path.unlink()
        swap(path, tmp_path)
        return real(place, *args, **options)

    monkeypatch.setattr(os, "open", replace)
    with pytest.raises(glm4.CheckpointError, match=r"LICENSE: (must be a regular|cannot be read)"):
        read_file(path)


def test_links_inside_the_folder(source, tmp_path):
    """And the folder itself may be a link."""
    given = shutil.copytree(source, tmp_path / "given")
    (given / "texts").mkdir()
    (given / "texts" / "licence").write_text("of the model")
    (given / "LICENSE").symlink_to("texts/licence")
    (tmp_path / "link").symlink_to("given")
    target = small(tmp_path / "link", tmp_path / "target")
    assert (target / "LICENSE").read_text() == "of the model"
    assert not (target / "LICENSE").is_symlink()


@pytest.mark.parametrize("shared", [False, True])
def test_snapshot_of_the_hubs_cache(shared, source, tmp_path):
    """Links into blobs; which may be links themselves to blobs that repositories share."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    blobs = repository / "blobs"
    blobs.mkdir()
    (tmp_path / "hub" / "blobs" / "ab").mkdir(parents=True)
    for i, path in enumerate(sorted(source.iterdir())):
        blob = blobs / f"{i:040x}"
        if shared:
            common = tmp_path / "hub" / "blobs" / "ab" / f"ab{i:062x}"
            shutil.copyfile(path, common)
            blob.symlink_to(os.path.relpath(common, blobs))
        else:
            shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    target = small(snapshot, tmp_path / "target")
    for name in {path.name for path in source.iterdir()} - {"config.json", "model.safetensors"}:
        assert (target / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    "place",
    [
        "models--org--other/blobs/x",
        "models--org--name/refs/main",
        "blobs/secret",
        f"blobs/cd/../{HASH}",
        f"elsewhere/ab/{HASH}",
    ],
)
def test_snapshot_that_links_elsewhere(place, tmp_path):
    hub = tmp_path / "hub"
    snapshot = hub / "models--org--name" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    secret = hub / place
    secret.parent.mkdir(parents=True, exist_ok=True)
    (hub / "blobs" / "cd").mkdir(parents=True, exist_ok=True)
    secret.parent.mkdir(parents=True, exist_ok=True)
    secret.write_text("of the user")
    (snapshot / "LICENSE").symlink_to(secret)
    with pytest.raises(glm4.CheckpointError, match="LICENSE: is a link to"):
        read_file(snapshot / "LICENSE")


def test_blobs_that_are_a_link(tmp_path):
    """A cache that came in an archive can hold any link."""
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "id").write_text("of the user")
    (snapshot.parent.parent / "blobs").symlink_to(tmp_path / "keys")
    (snapshot / "LICENSE").symlink_to("../../blobs/id")
    with pytest.raises(glm4.CheckpointError, match=r"LICENSE: is a link to .*keys/id"):
        read_file(snapshot / "LICENSE")


def test_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    assert read_file(path, 1 << 20) == bytes(1 << 20)
    path.write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(glm4.CheckpointError, match="file: must have at most 1 MB"):
        read_file(path, 1 << 20)


@pytest.mark.parametrize("text", ["[1]", "{", "\xff", "[" * 100_000])
def test_tokenizer_config_of_remote_code(text, source, tmp_path):
    path = tmp_path / "tokenizer_config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(glm4.CheckpointError, match=r"tokenizer_config\.json: (not readable|must)"):
        companions.without_code(path)
    path.write_text(json.dumps({"auto_map": {}, "padding_side": "left"}))
    made = json.loads(companions.without_code(path))
    assert made == {"padding_side": "left", "tokenizer_class": "PreTrainedTokenizerFast"}
