"""One file of a checkpoint: whatever lies there, nothing hangs, fills memory or stays open."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import socket
import time

import pytest
from checkpoints import split_into_shards, write_checkpoint, write_tokenizer

import glm4
from glm4.checkpoint_file import (
    FILE_LIMIT,
    JSON_LIMIT,
    CheckpointError,
    opened,
    parse_json,
    read_file,
    read_json,
)
from glm4.tensor_files import find_tensors
from glm4.tokenizer import Tokenizer


def refusal(read, *arguments) -> str:
    """The message of the error, one line; no descriptor stays open, and no time or memory goes."""
    before, start = os.listdir("/proc/self/fd"), time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as refused:
        read(*arguments)
    message = str(refused.value)
    assert os.listdir("/proc/self/fd") == before
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 << 10  # KB
    assert message.isprintable() and len(message) < 5000
    return message


def fifo(path):
    os.mkfifo(path)


def directory(path):
    path.mkdir()


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # its path may have 108 bytes


def endless_link(path):
    path.symlink_to(path)


def dangling_link(path):
    path.symlink_to("gone")


def link_to_a_device(path):
    path.symlink_to("/dev/zero")


def link_out(path):
    path.parent.with_name("secret").write_text('{"a": 1}')
    path.symlink_to("../secret")


def sparse(path):
    path.touch()
    os.truncate(path, 30 << 30)


def lfs_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")


STRANGE = {
    fifo: "must be a regular file, got a FIFO",
    directory: "must be a regular file, got a directory",
    unix_socket: "must be a regular file, got a socket",
    endless_link: r"cannot be read \(Too many levels",
    dangling_link: "is a link to gone, which is not there",
    link_to_a_device: "is a link to /dev/zero, outside of the checkpoint's folder",
    link_out: r"is a link to \S+secret, outside of the checkpoint's folder",
    sparse: r"must have at most \d+ MB, got 30,720 MB",
    lfs_pointer: "is a pointer of Git LFS, not the file itself; run `git lfs pull`",
}
FILES = {
    "config.json": read_json,
    "tokenizer.json": lambda path: Tokenizer(path.parent),
    "tokenizer.model": lambda path: Tokenizer(path.parent),
    "quantize_config.json": lambda path: glm4.load(path.parent, "cpu"),
    "model.safetensors.index.json": lambda path: find_tensors(path.parent),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("put", STRANGE, ids=lambda put: put.__name__)
def test_strange_files(name, put, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    if name == "quantize_config.json":
        write_checkpoint(folder)
    put(folder / name)
    message = refusal(FILES[name], folder / name)
    assert re.fullmatch(rf"{re.escape(str(folder / name))}: {STRANGE[put]}.*", message)


# Weights may be links to any place: a device is no file still, and 30 GB of nothing no header.
STRANGE_WEIGHTS = STRANGE | {
    link_to_a_device: "must be a regular file, got a device",
    link_out: "not a whole safetensors file",
    sparse: "not a whole safetensors file",
}


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("put", STRANGE_WEIGHTS, ids=lambda put: put.__name__)
def test_strange_weights(put, indexed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_checkpoint(tmp_path / "model")
    file = folder / (
        split_into_shards(folder)["lm_head.weight"] if indexed else "model.safetensors"
    )
    file.unlink()
    put(file)
    message = refusal(glm4.load, folder, "cpu")
    assert re.fullmatch(rf"{re.escape(str(file))}: {STRANGE_WEIGHTS[put]}.*", message)


def test_links_that_users_have(tmp_path):
    """The folder may be a link, files of it to each other, and weights to another disk."""
    folder = write_checkpoint(tmp_path / "disk" / "model")
    write_tokenizer(folder)
    (tmp_path / "link").symlink_to(folder)
    (folder / "config.json").rename(folder / "config-1.json")
    (folder / "config.json").symlink_to("config-1.json")
    (folder / "model.safetensors").rename(tmp_path / "weights")
    (folder / "model.safetensors").symlink_to(tmp_path / "weights")
    glm4.load(tmp_path / "link", "cpu")
    Tokenizer(tmp_path / "link")


def test_links_of_the_hub(tmp_path):
    """Its cache, as it lies on disk; and what only looks like it."""
    cache, digits = tmp_path / "hub", "0123456789abcdef" * 4
    repository = cache / "models--org--name"
    folder = repository / "snapshots" / "main"
    for path in (folder, repository / "blobs", cache / "blobs" / "01", cache / "other"):
        path.mkdir(parents=True)
    for path in ("models--org--name/blobs/1a", f"blobs/01/{digits}", "blobs/notes", "other/1a"):
        (cache / path).write_text('{"a": 1}')
    (folder / "own.json").symlink_to("../../blobs/1a")
    assert read_json(folder / "own.json") == {"a": 1}
    (repository / "blobs" / "2b").symlink_to(f"../../blobs/01/{digits}")
    (folder / "shared.json").symlink_to("../../blobs/2b")
    assert read_json(folder / "shared.json") == {"a": 1}
    (tmp_path / "link").symlink_to(folder)
    assert read_json(tmp_path / "link" / "own.json") == {"a": 1}

    for place in ("../../../blobs/notes", "../../../other/1a", "../../blobs/3c", "/etc/passwd"):
        (folder / "out.json").unlink(missing_ok=True)
        (folder / "out.json").symlink_to(place)
        (repository / "blobs" / "3c").unlink(missing_ok=True)
        (repository / "blobs" / "3c").symlink_to(cache / "other" / "1a")
        assert "outside of the checkpoint's folder" in refusal(read_json, folder / "out.json")
    repository.rename(cache / "name")  # not of the Hub's
    moved = cache / "name" / "snapshots" / "main"
    assert "outside of" in refusal(read_json, moved / "own.json")


def test_blobs_that_are_a_link_are_not_the_hubs(tmp_path):
    folder = tmp_path / "models--org--name" / "snapshots" / "main"
    folder.mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret").write_text("{}")
    (folder.parents[1] / "blobs").symlink_to(tmp_path / "home")
    (folder / "config.json").symlink_to("../../blobs/secret")
    assert "outside of" in refusal(read_json, folder / "config.json")


def test_a_device_is_not_opened(tmp_path, monkeypatch):
    """To open one can have effects; and what is a FIFO by the time that it is open is refused."""
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    (tmp_path / "a").symlink_to("/dev/null")
    with (
        pytest.raises(CheckpointError, match="got a device"),
        opened(tmp_path / "a", anywhere=True),
    ):
        pass
    monkeypatch.undo()
    (tmp_path / "b").write_text("{}")
    os.mkfifo(tmp_path / "c")
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: real(tmp_path / "c", flags))
    assert "b: must be a regular file, got a FIFO" in refusal(read_file, tmp_path / "b")


def test_errors_of_the_system_name_the_file_once(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("{}")

    def denied(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", denied)
    assert refusal(read_json, path) == f"{path}: cannot be read (Permission denied)"
    monkeypatch.undo()
    assert "cannot be read" in refusal(read_json, tmp_path / "a\0b")
    assert "cannot be read" in refusal(read_json, tmp_path / ("x" * 300))
    assert "no such file" in refusal(read_json, tmp_path / "x")
    assert "cannot be read" in refusal(read_json, path / "x")


def test_files_cut_short_while_they_are_read(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("{" + " " * 100 + "}")
    real, calls = os.fstat, []

    def then_cut(descriptor):
        status = real(descriptor)
        calls.append(descriptor)
        if len(calls) == 2:  # once its size is known
            os.truncate(path, 10)
        return status

    monkeypatch.setattr(os, "fstat", then_cut)
    assert refusal(read_json, path) == f"{path}: was cut short while it was read"


def test_sizes(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 9)
    assert read_file(path, 9) == b"x" * 9
    with pytest.raises(CheckpointError, match="must have at most 0 MB"):
        read_file(path, 8)
    assert JSON_LIMIT < FILE_LIMIT


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100000, "maximum recursion"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested more than 100 deep"),
        ('{"a": ' + "9" * 5000 + "}", "a number of 5000 digits"),
        ('{"a": -' + "9" * 4000 + "}", "a number of 4001 digits"),
        ("\ufeff{}", "BOM"),
        ("{" + '"%s": 1, "%s": 1}' % (("k" * 10000,) * 2), "stands there twice"),
    ],
    ids=["deep", "deep for a message", "digits", "negative", "BOM", "long key twice"],
)
def test_bombs(text, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    assert re.search(f"config.json: not readable as JSON .*{message}", refusal(read_json, path))


def test_a_key_twice_among_many_is_found_at_once():
    """By counting each key for itself it took a time quadratic in them."""
    keys = [f'"{i}": 0' for i in range(50000)]
    start = time.process_time()
    with pytest.raises(ValueError, match="'49999' stands there twice"):
        parse_json(("{" + ", ".join([*keys, keys[-1]]) + "}").encode())
    assert time.process_time() - start < 1


def test_mutated_json_is_a_value_or_one_line(tmp_path):
    random.seed(1)
    path = tmp_path / "config.json"
    given = {"a": [1, 2.5e3, -1], "b": {"c": None, "d": "\u00e9\n"}, "e": True, "f": []}
    whole = json.dumps(given).encode()
    alphabet = b'{}[]",:0123456789eE+-.\\utfnaN \x00\x80\xff'
    outcomes = set()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(random.randint(1, 4)):
            at = random.randrange(len(data))
            data[at : at + random.randint(0, 3)] = random.choices(alphabet, k=random.randint(0, 3))
        path.write_bytes(data)
        try:
            outcomes.add(type(read_json(path)))
        except CheckpointError as error:
            outcomes.add(str(error)[: len(f"{path}: ")])
    assert outcomes == {dict, f"{path}: "}


def test_message_is_one_line_of_bounded_length():
    message = str(CheckpointError("/a/b: tensor " + "x\n" * 10**6 + " is unexpected"))
    assert message.startswith("/a/b: tensor x\\nx") and message.endswith("x\\n is unexpected")
    assert len(message) < 5000
