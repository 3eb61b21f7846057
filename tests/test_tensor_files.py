"""The tensors of a checkpoint: headers by the rules of safetensors, and what is read is what was
examined."""

from __future__ import annotations

import json
import os
import random
import time
import warnings

import pytest
import torch
from checkpoints import split_into_shards, write_checkpoint, write_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import glm4
import glm4.tensor_files
from glm4.checkpoint import examine, read_into
from glm4.checkpoint_file import CheckpointError
from glm4.tensor_files import BITS, find_tensors, is_beside, tensors_in

TOKENS = torch.tensor([[5, 6, 7, 300]])
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
TENSORS = {
    "bf16": torch.arange(6).view(2, 3).to(torch.bfloat16),
    "é": torch.tensor(3.5),
    "empty": torch.zeros(0, 4, dtype=torch.half),
    "int8": torch.arange(-3, 2, dtype=torch.int8),
    "int32": torch.arange(4, dtype=torch.int32),
    "int64": torch.tensor([2**40, -1]),
    "half": torch.arange(8).half(),
}


def written(path, header, n_data=0):
    """A file of this header, an object or its text, and so many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(n_data))
    return path


def theirs(path):
    """What safetensors says of the file; None: it refuses it."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
    except (SafetensorError, OSError):
        return None


def ours(path):
    try:
        return {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in tensors_in(path)}
    except CheckpointError as error:
        return None if str(error).startswith(f"{path}: not a whole safetensors file (") else error


def test_reads_what_was_saved(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors", {"format": "pt"})
    stored = {tensor.name: tensor for tensor in tensors_in(tmp_path / "a.safetensors")}
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        read = stored[name].read()
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_into_another_dtype_piece_by_piece(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(glm4.tensor_files, "PIECE", 5)  # of 33 values: a last one that is shorter
    given = torch.randn(11, 3)
    save_file({"a": given, "b": torch.ones(3)}, tmp_path / "a.safetensors")
    stored = {tensor.name: tensor for tensor in tensors_in(tmp_path / "a.safetensors")}
    weight = torch.full((13, 3), torch.nan, dtype=dtype)
    stored["a"].read_into(weight[1:12])
    assert torch.equal(weight[1:12], given.to(dtype))
    assert weight[[0, 12]].isnan().all()
    for shape in ((3, 11), (1, 3), (33,), ()):
        with pytest.raises(ValueError, match="tensor must be"):
            stored["a"].read_into(torch.zeros(shape))


def test_values_of_other_types_are_not_read(tmp_path):
    save_file({"a": torch.ones(3, dtype=torch.float64)}, tmp_path / "a.safetensors")
    (stored,) = tensors_in(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a must be F32, .*, got F64"):
        stored.read()


def info(dtype="U8", shape=(2,), begin=0, end=2):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


BIG = 2**63
HEADERS = {
    "sound": ({"a": info(), "b": info(begin=2, end=4)}, 4),
    "any order": ({"b": info(begin=2, end=4), "a": info()}, 4),
    "metadata": ({"__metadata__": {"format": "pt"}, "a": info()}, 2),
    "metadata null": ({"__metadata__": None, "a": info()}, 2),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": info()}, 2),
    "metadata a text": ({"__metadata__": "a", "a": info()}, 2),
    "metadata false": ({"__metadata__": False, "a": info()}, 2),
    "nothing": ({}, 0),
    "scalar": ({"a": info("F32", (), 0, 4)}, 4),
    "empty ones": ({"a": info(shape=(0,), end=0), "b": info(), "c": info("F32", (0, 9), 2, 2)}, 2),
    "fields beside": ({"a": info() | {"note": [1, {"x": -1.5}]}}, 2),
    "half a byte": ({"a": info("F4", (3,), 0, 2)}, 2),
    "halves of bytes": ({"a": info("F4", (4,), 0, 2)}, 2),
    "six bits": ({"a": info("F6_E2M3", (4,), 0, 3)}, 3),
    "padded": (json.dumps({"a": info()}).encode() + b"    ", 2),
    "space before": (b"  " + json.dumps({"a": info()}).encode(), 2),
    "gap": ({"a": info(), "b": info(begin=3, end=5)}, 5),
    "gap at first": ({"a": info(begin=1, end=3)}, 3),
    "overlap": ({"a": info(), "b": info(begin=1, end=3)}, 3),
    "same bytes": ({"a": info(), "b": info()}, 2),
    "backwards": ({"a": info(begin=2, end=0)}, 2),
    "bytes left over": ({"a": info()}, 3),
    "bytes missing": ({"a": info()}, 1),
    "size of another": ({"a": info("F32")}, 2),
    "type unknown": ({"a": info("F31")}, 2),
    "type small": ({"a": info("u8")}, 2),
    "type none": ({"a": info(None)}, 2),
    "shape negative": ({"a": info(shape=(-2,))}, 2),
    "shape of floats": ({"a": info(shape=(2.0,))}, 2),
    "shape of truths": ({"a": info(shape=(True, 2))}, 2),
    "shape a number": ({"a": info() | {"shape": 2}}, 2),
    "shape overflows": ({"a": info(shape=(BIG, BIG, 0), end=0)}, 0),
    "bits overflow": ({"a": info("F64", (BIG,))}, 2),
    "one offset": ({"a": info() | {"data_offsets": [0]}}, 2),
    "three offsets": ({"a": info() | {"data_offsets": [0, 2, 2]}}, 2),
    "offsets past any": ({"a": info(end=2**64)}, 2),
    "offset -0": (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[-0,2]}}', 2),
    "field missing": ({"a": {"dtype": "U8", "shape": [2]}}, 2),
    "field twice": (b'{"a":{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}}', 2),
    "no object": ([info()], 2),
    "tensor no object": ({"a": 7}, 0),
    "surrogate": (b'{"\\ud800":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', 2),
    "NaN": (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2],"x":NaN}}', 2),
    "not UTF-8": (b'{"\xff":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', 2),
    "BOM": ("\ufeff{}".encode(), 0),
    "two values": (b"{}{}", 0),
    "no text": (b"", 0),
    "deep": (b'{"a":' + b"[" * 10000 + b"]" * 10000 + b"}", 0),
}


@pytest.mark.parametrize("header, n_data", HEADERS.values(), ids=HEADERS)
def test_headers_as_safetensors_judges_them(header, n_data, tmp_path):
    path = written(tmp_path / "a.safetensors", header, n_data)
    assert ours(path) == theirs(path)


@pytest.mark.parametrize("dtype", BITS)
def test_sizes_of_types(dtype, tmp_path):
    path = written(
        tmp_path / "a.safetensors", {"a": info(dtype, (8,), 0, BITS[dtype])}, BITS[dtype]
    )
    assert ours(path) == theirs(path) == {"a": (dtype, [8])}


def test_a_name_twice_is_refused(tmp_path):
    """Of which safetensors takes the last, against the format's own rule."""
    one = json.dumps(info())
    path = written(tmp_path / "a.safetensors", f'{{"a": {one}, "a": {one}}}'.encode(), 2)
    with pytest.raises(CheckpointError, match="'a' stands there twice"):
        tensors_in(path)


def test_mutated_files_as_safetensors_judges_them(tmp_path):
    random.seed(2)
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    whole = path.read_bytes()
    n_header = int.from_bytes(whole[:8], "little")
    alphabet = b'{}[]",:0123456789eE+-.\\uFIB \x00\x80'
    letters = [i for i in range(8, 8 + n_header) if whole[i : i + 1].isalpha()]
    accepted = 0
    for _ in range(250):
        data = bytearray(whole)
        kind = random.random()
        if kind < 0.15:
            data[random.randrange(8)] ^= 1 << random.randrange(8)
        elif kind < 0.3:
            del data[random.randrange(len(data)) :]
        elif kind < 0.6:
            data[random.choice(letters)] = random.choice(b"abf")
        else:
            for _ in range(random.randint(1, 3)):
                data[random.randrange(8, 8 + n_header)] = random.choice(alphabet)
        path.write_bytes(data)
        assert ours(path) == theirs(path), bytes(data)
        accepted += theirs(path) is not None
    assert 10 < accepted < 240


def test_a_large_header_is_parsed_once(tmp_path):
    """For each tensor again, 17 MB of it took 46 seconds."""
    texts = {f"key {i}": "x" * 1000 for i in range(17000)}
    tensors = {f"tensor {i}": torch.ones(1) for i in range(300)}
    save_file(tensors, tmp_path / "a.safetensors", texts)
    start = time.process_time()
    assert sum(tensor.read().item() for tensor in tensors_in(tmp_path / "a.safetensors")) == 300
    assert time.process_time() - start < 3


def test_what_is_read_is_what_was_examined(tmp_path):
    """Replaced, rewritten, cut or gone since: one line, whatever its shape is now."""
    path = write_checkpoint(tmp_path) / "model.safetensors"
    whole, examined = path.read_bytes(), examine(tmp_path).floats

    def replaced():
        tensors = load_file(path) | {"model.norm.weight": torch.ones(64, dtype=torch.int32)}
        save_file(tensors, tmp_path / "new")
        (tmp_path / "new").rename(path)

    def replaced_by_the_same():
        (tmp_path / "new").write_bytes(whole)
        (tmp_path / "new").rename(path)

    def rewritten():
        path.write_bytes(whole[:-1] + b"\x01")
        os.utime(path, ns=(1, 1))

    def cut():
        os.truncate(path, 1000)

    def gone():
        path.unlink()

    weight = torch.zeros(320, 64)
    for change in (replaced, replaced_by_the_same, rewritten, cut, gone):
        path.unlink(missing_ok=True)
        path.write_bytes(whole)
        examined = examine(tmp_path).floats
        read_into(weight, examined["embedding"])
        change()
        descriptors = os.listdir("/proc/self/fd")
        with pytest.raises(CheckpointError, match=r"has changed since|no such file") as refused:
            read_into(weight, examined["embedding"])
        assert str(refused.value).startswith(f"{path}: ")
        assert os.listdir("/proc/self/fd") == descriptors


@pytest.mark.parametrize("cut", [False, True])
def test_changes_while_it_is_read(cut, tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path) / "model.safetensors"
    examined = examine(tmp_path).floats
    real = glm4.tensor_files.read_exactly

    def then_changed(*arguments):
        if cut:
            os.truncate(path, 1000)
        real(*arguments)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(glm4.tensor_files, "read_exactly", then_changed)
    with pytest.raises(CheckpointError, match=r"was cut short while|has changed since"):
        read_into(torch.zeros(320, 64), examined["embedding"])


def with_shards(folder):
    """A checkpoint of three, their index as it is written, and the expected logits."""
    expected = glm4.load(write_checkpoint(folder), "cpu").logits(TOKENS)
    return split_into_shards(folder), folder / "model.safetensors.index.json", expected


def test_of_two_copies_the_indexed_one_counts(tmp_path):
    weight_map, _, expected = with_shards(tmp_path)
    home = weight_map[Q_PROJ]
    for file in sorted(set(weight_map.values()) - {home}):
        tensors = load_file(tmp_path / file) | {Q_PROJ: torch.ones(7)}
        save_file(tensors, tmp_path / file)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.equal(glm4.load(tmp_path, "cpu").logits(TOKENS), expected)
        # transformers takes the last: said where that is another
        messages = [str(w.message) for w in caught if Q_PROJ in str(w.message)]
        assert len(messages) == (file > home)
        assert all(f"read from {home}" in m and f"in {file} (1 such)" in m for m in messages)


def test_tensors_that_the_index_does_not_know(tmp_path):
    weight_map, index, expected = with_shards(tmp_path)
    del weight_map[Q_PROJ]  # needed all the same
    write_json(index, {"weight_map": weight_map})
    file = next(iter(weight_map.values()))
    save_file(load_file(tmp_path / file) | {"extra": torch.ones(3)}, tmp_path / file)
    assert torch.equal(glm4.load(tmp_path, "cpu").logits(TOKENS), expected)


@pytest.mark.parametrize("name", ["a b", "modèle", "a+(1),~", "-x", ".hidden", "weights..2"])
def test_names_of_shards(name, tmp_path):
    weight_map, index, expected = with_shards(tmp_path)
    old, new = weight_map[Q_PROJ], f"{name}.safetensors"
    (tmp_path / old).rename(tmp_path / new)
    weight_map = {k: new if file == old else file for k, file in weight_map.items()}
    write_json(index, {"weight_map": weight_map})
    assert torch.equal(glm4.load(tmp_path, "cpu").logits(TOKENS), expected)


def test_names_that_are_not_beside():
    for name in ("../a", "/a", "a/b", "a\\b", "a\nb", "a\0b", "\ud800", ""):
        assert not is_beside(f"{name}.safetensors")
    assert not is_beside("a.bin")


def test_shards_without_an_index(tmp_path):
    weight_map, index, expected = with_shards(tmp_path)
    index.unlink()
    assert torch.equal(glm4.load(tmp_path, "cpu").logits(TOKENS), expected)
    listing, _ = find_tensors(tmp_path)
    assert listing == tmp_path

    files = sorted(set(weight_map.values()))
    tensors = load_file(tmp_path / files[1])
    save_file(tensors | {Q_PROJ: torch.ones(3), "x": torch.ones(3)}, tmp_path / files[1])
    save_file(load_file(tmp_path / files[2]) | {"x": torch.ones(3)}, tmp_path / files[2])
    with pytest.raises(CheckpointError, match=f"{files[2]}: tensor x is in {files[1]} too"):
        find_tensors(tmp_path)
    (tmp_path / files[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"/{files[1]}: no such file; 2 of 00003 shards are"):
        find_tensors(tmp_path)
    (tmp_path / files[0]).unlink()
    with pytest.raises(CheckpointError, match=rf"/{files[0]}: no such file and 1 more; 1 of 00003"):
        find_tensors(tmp_path)
    (tmp_path / "other-00001-of-00001.safetensors").touch()
    with pytest.raises(
        CheckpointError, match=r"there are shards of several: model-\.\.\.-of-00003"
    ):
        find_tensors(tmp_path)


def test_idle_biases_are_small(tmp_path):
    """What no layer can have is not read to see whether it is all zeros: a sparse file of 30 GB."""
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64}}
    path = write_checkpoint(tmp_path, config) / "model.safetensors"
    header = {"model.layers.0.mlp.down_proj.bias": info("F32", (7 << 30,), 0, 28 << 30)}
    for tensor in tensors_in(path):
        n_bytes = 4 * torch.Size(tensor.shape).numel()
        begin = max(entry["data_offsets"][1] for entry in header.values())
        header[tensor.name] = info("F32", tensor.shape, begin, begin + n_bytes)
    written(path, header)
    n_data = max(entry["data_offsets"][1] for entry in header.values())
    os.truncate(path, path.stat().st_size + n_data)
    with pytest.raises(CheckpointError, match=r"down_proj.bias \[7516192768\] is unexpected"):
        examine(tmp_path)


def test_two_shards_of_one_number(tmp_path):
    for name in ("model-00001-of-1.safetensors", "model-1-of-1.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(glm4.CheckpointError, match=r"must not be shard 0*1 beside model-"):
        find_tensors(tmp_path)


def test_links_that_multiply_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(glm4.tensor_files, "TENSORS_LIMIT", 5)
    save_file({f"x{i}": torch.zeros(1) for i in range(3)}, tmp_path / "0.safetensors")
    (tmp_path / "1.safetensors").symlink_to("0.safetensors")
    weight_map = {"x0": "0.safetensors", "x1": "1.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(glm4.CheckpointError, match=r"must hold at most 5 tensors"):
        find_tensors(tmp_path)
