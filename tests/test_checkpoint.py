"""Loading: what is read, and that whatever is wrong is one clear line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from checkpoints import (
    SIZES,
    split_into_shards,
    transformers_model,
    write_checkpoint,
    write_json,
    write_tokenizer,
)
from safetensors.torch import save_file

import glm4
from glm4.config_json import read_config
from glm4.quantize import quantize_checkpoint
from glm4_kernels import extension

ROPE = SIZES["rope_parameters"]
OLD_STYLE = {"rope_parameters": None, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
CHATGLM = {
    "model_type": "chatglm",
    "num_layers": 40,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "num_attention_heads": 32,
    "multi_query_group_num": 4,
    "kv_channels": 128,
    "padded_vocab_size": 151552,
    "layernorm_epsilon": 1.5625e-07,
    "seq_length": 1048576,
    "rope_ratio": 10000,
    "add_qkv_bias": True,
}
TOKENS = torch.tensor([[5, 6, 7, 300]])
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def refusal(path, **options) -> str:
    """The message with which `path` is refused; one line."""
    with pytest.raises(glm4.CheckpointError) as refused:
        glm4.load(path, "cpu", **options)
    message = str(refused.value)
    assert "\n" not in message
    return message


def config_of(folder, config, **options):
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", {k: v for k, v in config.items() if v is not None})
    return read_config(folder, **options)


@pytest.mark.parametrize("n_shards", [1, 3])
def test_shards(n_shards, tmp_path):
    expected = glm4.load(write_checkpoint(tmp_path), "cpu").logits(TOKENS)
    split_into_shards(tmp_path, n_shards)
    assert torch.equal(glm4.load(tmp_path, "cpu").logits(TOKENS), expected)


def test_known_extras_pass(tmp_path):
    extras = {
        "transformer.rotary_pos_emb.inv_freq": torch.ones(16),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((16,), torch.nan),
        "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 9, 32),
    }
    del extras["transformer.rotary_pos_emb.inv_freq"]  # of the other family; see test_parity
    expected = glm4.load(write_checkpoint(tmp_path / "a"), "cpu").logits(TOKENS)
    model = glm4.load(write_checkpoint(tmp_path / "b", tensors=extras), "cpu")
    assert torch.equal(model.logits(TOKENS), expected)


def test_dtype(tmp_path):
    folder = write_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert glm4.load(folder, "cpu").dtype == torch.bfloat16
    assert glm4.load(folder, "cpu", dtype="float32").dtype == torch.float32
    model = glm4.load(folder, "cpu", dtype=torch.float16)
    assert model.dtype == model.embedding.dtype == model.blocks[0].attention.qkv.dtype
    write_checkpoint(folder, {"dtype": None, "torch_dtype": "float16"}, dtype=torch.bfloat16)
    assert glm4.load(folder, "cpu").dtype == torch.float16
    write_checkpoint(folder, {"dtype": None}, dtype=torch.float16)  # then what is stored
    assert glm4.load(folder, "cpu").dtype == torch.float16


@pytest.mark.parametrize(
    "declared", ["int8", "float8_e4m3fn", "float64", "auto", "", 7, ["float16"]]
)
def test_a_dtype_that_is_none(declared, tmp_path):
    folder = write_checkpoint(tmp_path, {"dtype": declared})
    message = refusal(folder)
    assert f"{folder / 'config.json'}: dtype must be float32, bfloat16, float16, got " in message
    assert glm4.load(folder, "cpu", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(glm4.CheckpointError, match="dtype must be"):
        quantize_checkpoint(folder, tmp_path / "target")
    assert not list(tmp_path.glob("target*"))


def test_two_names_of_the_dtype(tmp_path):
    """As transformers does: the newer holds."""
    folder = write_checkpoint(tmp_path, {"dtype": "bfloat16", "torch_dtype": "float16"})
    with pytest.warns(UserWarning, match=r'dtype is "bfloat16" and torch_dtype "float16"'):
        assert glm4.load(folder, "cpu").dtype == torch.bfloat16
    write_checkpoint(tmp_path, {"torch_dtype": "bfloat16"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": None}
    write_json(folder / "config.json", config)
    assert glm4.load(folder, "cpu").dtype == torch.bfloat16


def test_path_is_kept(tmp_path):
    assert glm4.load(write_checkpoint(tmp_path), "cpu").path == tmp_path


def test_names_of_a_config(tmp_path):
    base = {"model_type": "glm4", **SIZES}
    config = config_of(tmp_path, base)
    assert (config.layers, config.heads, config.kv_heads, config.ffn) == (2, 4, 2, 96)
    assert config.sandwich and config.qkv_bias and config.eps == 1e-5 and config.rotary_dim == 32
    assert config_of(tmp_path, base | OLD_STYLE) == config
    assert config_of(tmp_path, base | OLD_STYLE | {"partial_rotary_factor": None}) == config
    assert not config_of(tmp_path, base | {"model_type": "glm"}).sandwich
    rope = ROPE | {"partial_rotary_factor": 1.0, "rope_theta": 1e6}
    config = config_of(tmp_path, base | {"rope_parameters": rope})
    assert (config.rotary_dim, config.theta) == (64, 1e6)
    assert config_of(tmp_path, base, rope_theta=5e6).theta == 5e6


def test_remote_code_config_is_its_preset(tmp_path):
    assert config_of(tmp_path, CHATGLM) == glm4.PRESETS["glm-4-9b-chat-1m"]
    base = {"multi_query_group_num": 2, "rope_ratio": None, "seq_length": 8192}
    assert config_of(tmp_path, CHATGLM | base) == glm4.PRESETS["glm-4-9b"]


@pytest.mark.parametrize("style", ["new", "old"])
def test_yarn_extends_the_context(style, tmp_path):
    yarn = {"factor": 4.0, "original_max_position_embeddings": 256}
    rope = {"rope_parameters": ROPE | yarn | {"rope_type": "yarn"}}
    if style == "old":
        rope = OLD_STYLE | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    config = config_of(tmp_path, {"model_type": "glm4", **SIZES, **rope})
    assert config.max_positions == 1024
    assert config.rope_scaling["original_max_position_embeddings"] == 256


def test_stop_ids(tmp_path):
    base = {"model_type": "glm4", **SIZES, "vocab_size": 151552}
    assert config_of(tmp_path, base).eos_token_ids == (1, 2)
    assert config_of(tmp_path, base | {"eos_token_id": 7}).eos_token_ids == (7,)
    family = (151329, 151336, 151338)
    assert config_of(tmp_path, base | {"eos_token_id": None}).eos_token_ids == family
    # transformers' default ids, in a vocabulary that ends before them
    small = base | {"eos_token_id": [*family, 5], "vocab_size": 320}
    assert config_of(tmp_path, small).eos_token_ids == (5,)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [3, 4]})
    assert config_of(tmp_path, base).eos_token_ids == (3, 4)


@pytest.mark.parametrize(
    "generation",
    [None, {}, {"eos_token_id": None}, {"eos_token_id": 7}, {"eos_token_id": [7, 8]}],
    ids=str,
)
@pytest.mark.parametrize("config", [None, 5, [5, 6]], ids=str)
def test_stop_ids_are_those_of_transformers(config, generation, tmp_path):
    import transformers

    model = transformers_model("glm4", num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    given = json.loads((tmp_path / "config.json").read_text()) | {"eos_token_id": config}
    write_json(tmp_path / "config.json", {k: v for k, v in given.items() if v is not None})
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        write_json(tmp_path / "generation_config.json", generation)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    stops = theirs.generation_config.eos_token_id
    if stops is None:  # it would not stop; here config.json's still hold
        stops = config or []
    stops = stops if isinstance(stops, list) else [stops]
    assert read_config(tmp_path).eos_token_ids == tuple(stops)


@pytest.mark.parametrize("kv_heads, original", [(2, "5e6"), (4, "1e8")])
def test_hf_theta_warns(kv_heads, original, tmp_path):
    chat = {
        "vocab_size": 151552,
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_key_value_heads": kv_heads,
        "hidden_size": 2,
    }
    folder = write_checkpoint(tmp_path, chat | {"num_hidden_layers": 1}, model_type="glm")
    rows = {"q": 512, "k": 64 * kv_heads, "v": 64 * kv_heads}
    tensors = {f"model.layers.0.self_attn.{x}_proj.weight": (n, 2) for x, n in rows.items()}
    tensors |= {f"model.layers.0.self_attn.{x}_proj.bias": (n,) for x, n in rows.items()}
    tensors |= {
        "model.embed_tokens.weight": (151552, 2),
        "lm_head.weight": (151552, 2),
        "model.norm.weight": (2,),
        "model.layers.0.self_attn.o_proj.weight": (2, 512),
        "model.layers.0.mlp.gate_up_proj.weight": (192, 2),
        "model.layers.0.mlp.down_proj.weight": (2, 96),
        "model.layers.0.input_layernorm.weight": (2,),
        "model.layers.0.post_attention_layernorm.weight": (2,),
    }
    save_file({k: torch.ones(v) for k, v in tensors.items()}, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=f"rope_theta={original}") as caught:
        assert glm4.load(folder, "cpu").config.theta == 1e4
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert glm4.load(folder, "cpu", rope_theta=5e6).config.theta == 5e6
        assert glm4.load(folder, "cpu", rope_theta=1e4).config.theta == 1e4
        config_json = json.loads((folder / "config.json").read_text())
        config_json["rope_parameters"]["rope_theta"] = 5e6
        write_json(folder / "config.json", config_json)
        glm4.load(folder, "cpu")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llama"}, "model_type must be .* got 'llama'"),
        ({"model_type": None}, "model_type must be .* got None"),
        ({"model_type": "glm4_moe"}, "model_type must be .* dense GLM-4 .* got 'glm4_moe'"),
        ({"vision_config": {}}, "model_type must be .* for text .* with a vision_config"),
        ({"original_rope": False}, "original_rope must be true, got false"),
        ({"hidden_act": "gelu"}, 'hidden_act must be "silu", got "gelu"'),
        ({"add_bias_linear": True}, "add_bias_linear must be false"),
        ({"quantization_config": {"bits": 4}}, "quant_method must be .* got None"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
        ({"attention_bias": None}, "attention_bias is missing"),
        ({"hidden_size": True}, "hidden_size must be an integer .* got True"),
        ({"hidden_size": 64.0}, r"hidden_size must be an integer .* got 64\.0"),
        ({"hidden_size": "64"}, "hidden_size must be an integer .* got '64'"),
        ({"hidden_size": -64}, "hidden_size must be an integer .* got -64"),
        ({"hidden_size": 10**12}, "hidden_size must be an integer from 1 to 32768"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"intermediate_size": [96]}, "intermediate_size must be"),
        ({"vocab_size": 2**40}, "vocab_size must be"),
        ({"vocab_size": {}}, "vocab_size must be"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings must be"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings must be"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of kv_heads"),
        ({"num_attention_heads": 66}, "num_attention_heads must be .* at most 32-fold"),
        ({"head_dim": 96}, "head_dim must be 64 or 128, got 96"),
        ({"head_dim": None}, "head_dim is missing"),
        ({"head_dim": 64.0}, r"head_dim must be 64 or 128, got 64\.0"),
        ({"attention_bias": 1}, "attention_bias must be true or false, got 1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, got nan"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number"),
        ({"rope_parameters": {}}, "rope_theta is missing"),
        ({"rope_parameters": None}, "rope_theta is missing"),
        ({"rope_parameters": "yarn"}, "rope_parameters must be an object"),
        ({"rope_parameters": ROPE | {"rope_theta": "1e4"}}, "rope_theta must be a positive"),
        ({"rope_parameters": ROPE | {"rope_theta": 0}}, "rope_theta must be a positive"),
        ({"rope_parameters": ROPE | {"rope_theta": True}}, "rope_theta must be a positive"),
        ({"rope_parameters": ROPE | {"partial_rotary_factor": 2}}, "partial_rotary_factor must"),
        ({"rope_parameters": ROPE | {"partial_rotary_factor": None}}, "partial_rotary_factor must"),
        ({"rope_parameters": ROPE | {"rope_type": "llama3"}}, "of type default or yarn"),
        ({"rope_parameters": ROPE | {"rope_type": ["yarn"]}}, "of type default or yarn"),
        ({"rope_parameters": ROPE | {"rope_type": "yarn"}}, "rope_scaling is wrong: .*factor"),
        (
            {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": "4"}},
            "rope_scaling is wrong: .*factor.* must be a number",
        ),
        (
            {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 1e9}},
            "max_position_embeddings must be an integer from 1 to 4194304",
        ),
        ({"eos_token_id": "</s>"}, "eos_token_id must be token ids, got '</s>'"),
        ({"eos_token_id": [1, -5]}, "eos_token_id must be token ids, got -5"),
        ({"eos_token_id": True}, "eos_token_id must be token ids, got True"),
        ({"num_hidden_layers": 3}, r"tensor model\.layers\.2\..* is missing"),
        ({"intermediate_size": 97}, r"gate_up_proj\.weight must be \[194, 64\], got \[192, 64\]"),
        ({"attention_bias": False}, r"tensor model\.layers\.0\.self_attn\..*bias .* unexpected"),
        ({"model_type": "glm"}, r"post_\w+_layernorm\.weight \[64\] is unexpected"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_rejects_config(changes, message, tmp_path):
    folder = write_checkpoint(tmp_path, changes)
    assert re.match(rf"{re.escape(str(folder))}/[\w.]+: .*{message}", refusal(folder))


@pytest.mark.parametrize("field", [name for name in CHATGLM if name != "rope_ratio"])
def test_remote_code_fields_are_required(field, tmp_path):
    with pytest.raises(glm4.CheckpointError, match=f"config.json: {field}"):
        config_of(tmp_path, CHATGLM | {field: None})


@pytest.mark.parametrize("ratio", ["500", -1, None, True])
def test_rejects_rope_ratio(ratio, tmp_path):
    write_json(tmp_path / "config.json", CHATGLM | {"rope_ratio": ratio})
    with pytest.raises(glm4.CheckpointError, match=r"config\.json: rope_ratio must be a positive"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not readable as JSON"),
        ("{", "not readable as JSON"),
        ("[" * 100000, "not readable as JSON"),
        ("[1]", "must hold a JSON object, got list"),
        ('{"model_type": "glm", "model_type": "glm4"}', "'model_type' stands there twice"),
        ('{"a": ' + "9" * 5000 + "}", "not readable as JSON"),
        ("\x80", "not readable as JSON"),
    ],
    ids=["empty", "cut", "deep", "list", "twice", "huge number", "not utf-8"],
)
def test_rejects_json(text, message, tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert re.search(f"config.json: .*{message}", refusal(tmp_path))


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({Q_PROJ: None}, r"q_proj\.weight \[256, 64\] is missing"),
        ({Q_PROJ: torch.ones(256, 63)}, r"q_proj\.weight must be \[256, 64\], got \[256, 63\]"),
        ({Q_PROJ: torch.ones(64, 256)}, r"q_proj\.weight must be \[256, 64\], got \[64, 256\]"),
        ({Q_PROJ: torch.ones(256 * 64)}, r"q_proj\.weight must be \[256, 64\], got \[16384\]"),
        ({Q_PROJ: torch.ones(256, 64).int()}, r"q_proj\.weight must be F32, BF16, F16, got I32"),
        ({Q_PROJ: torch.ones(256, 64).double()}, "must be F32, BF16, F16, got F64"),
        ({Q_PROJ: torch.ones(256, 64).to(torch.float8_e4m3fn)}, "got F8_E4M3"),
        ({"model.norm.weight": torch.full((64,), torch.nan)}, r"norm\.weight must be finite"),
        ({Q_PROJ: torch.eye(256, 64) * -torch.inf}, r"q_proj\.weight must be finite"),
        ({"model.layers.2.mlp.down_proj.weight": torch.ones(64, 96)}, "is unexpected"),
        ({"model.two\nlines": torch.ones(64)}, r"two\\nlines .* is unexpected"),
        ({"model.layers.0.self_attn.o_proj.bias": torch.ones(64)}, "is unexpected"),
        ({"transformer.output_layer.weight": torch.ones(320, 64)}, "transformer.embedding"),
    ],
)
def test_rejects_tensors(tensors, message, tmp_path):
    folder = write_checkpoint(tmp_path, tensors=tensors)
    assert re.match(
        rf"{re.escape(str(folder))}/model\.safetensors: tensor .*{message}", refusal(folder)
    )


def test_rejects_values_beyond_the_dtype(tmp_path):
    folder = write_checkpoint(tmp_path, tensors={Q_PROJ: torch.full((256, 64), 1e6)})
    assert "q_proj.weight must be finite" in refusal(folder, dtype="float16")
    glm4.load(folder, "cpu", dtype="bfloat16")


@pytest.mark.parametrize(
    "place",
    ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", 7, None, ["a"],
     "model.bin", "a\x00.safetensors", "C:\\m.safetensors", ".safetensors"],
    ids=str,
)  # fmt: skip
def test_index_stays_in_its_folder(place, tmp_path):
    folder = write_checkpoint(tmp_path / "inside")
    write_checkpoint(tmp_path)
    weight_map = split_into_shards(folder)
    weight_map[Q_PROJ] = place
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    assert re.search(rf"index\.json: the file of tensor {Q_PROJ} must be", refusal(folder))


def test_rejects_index(tmp_path):
    folder = write_checkpoint(tmp_path)
    weight_map = split_into_shards(folder)
    index = folder / "model.safetensors.index.json"
    home = weight_map[Q_PROJ]
    other = next(place for place in weight_map.values() if place != home)

    write_json(index, {"weight_map": weight_map | {Q_PROJ: other}})
    assert f"{other}: tensor {Q_PROJ} is missing" in refusal(folder)
    write_json(index, {"weight_map": weight_map | {"model.extra": home}})
    assert f"{home}: tensor model.extra is missing" in refusal(folder)
    write_json(index, {"weight_map": weight_map | {"model.extra": "gone.safetensors"}})
    assert "gone.safetensors: no such file" in refusal(folder)
    for bad in ({}, {"weight_map": {}}, {"weight_map": ["a"]}):
        write_json(index, bad)
        assert "weight_map must be an object" in refusal(folder)
    twice = json.dumps({"weight_map": weight_map})[:-2] + f', "{Q_PROJ}": "{other}"}}}}'
    index.write_text(twice)
    assert "stands there twice" in refusal(folder)


def test_rejects_damaged_files(tmp_path):
    file = write_checkpoint(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    damaged = {
        "empty": b"",
        "header cut": whole[: 8 + header // 2],
        "data cut": whole[:-1],
        "data half": whole[: len(whole) // 2],
        "longer": whole + b"\0",
        "header size": b"\xff" * 8 + whole[8:],
        "header text": whole[:8] + b"\x00" * header + whole[8 + header :],
        "not safetensors": b"PK\x03\x04" + whole[4:],
    }
    for name, data in damaged.items():
        file.write_bytes(data)
        assert f"{file}: not a whole safetensors file" in refusal(tmp_path), name


def test_rejects_folders(tmp_path, monkeypatch):
    assert "no such folder" in refusal(tmp_path / "missing")
    assert "no such folder" in refusal("")
    assert "no such folder" in refusal("a/b/c")
    assert "cannot be read" in refusal("x" * 5000)
    assert f"{tmp_path / 'config.json'}: no such file" in refusal(tmp_path)
    (tmp_path / "file").write_text("")
    assert "must be a checkpoint's folder, got a file" in refusal(tmp_path / "file")
    with pytest.raises(TypeError, match="load: path_or_repo must be"):
        glm4.load(7)

    folder = write_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor" in refusal(folder)
    torch.save({}, folder / "pytorch_model.bin")
    assert re.search(r"pytorch_model\.bin: pickled weights can run code", refusal(folder))

    def offline(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert "THUDM/GLM-4-9B-0414: no such folder, and the Hugging Face Hub" in refusal(
        "THUDM/GLM-4-9B-0414"
    )


def test_hub(tmp_path, monkeypatch):
    folder, asked = write_checkpoint(tmp_path), []

    def downloaded(repo, allow_patterns, ignore_patterns):
        asked.extend((repo, *allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloaded)
    assert glm4.load("org/name", "cpu").path == folder
    assert asked[0] == "org/name" and not any("bin" in p or p == "*" for p in asked[1:])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device": "tpu"}, "load: device must be"),
        ({"device": "meta"}, "load: device must be"),
        ({"device": "cuda:99"}, "load: device must be one of"),
        ({"dtype": "int8"}, "load: dtype must be"),
        ({"dtype": torch.float64}, "load: dtype must be"),
        ({"quantize": "int3"}, "load: quantize must be"),
        ({"rope_mode": "fast"}, "load: rope_mode must be"),
        ({"activations": "int4"}, "load: activations must be"),
        ({"rope_theta": -1.0}, "rope_theta must be over 1"),
        ({"rope_theta": "5e6"}, "rope_theta must be a number or None"),
    ],
)
def test_rejects_arguments(options, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        glm4.load(write_checkpoint(tmp_path), **({"device": "cpu"} | options))


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = r"device must be one of the CUDA devices that torch finds here; it finds "
    with pytest.raises(
        ValueError, match=found + r"none \(torch \S+ is built without CUDA\), got 'c"
    ):
        glm4.load("demo", "cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(
        ValueError, match=found + r"none \(no GPU, or no driver for it\), got 'cuda:1"
    ):
        glm4.load("demo", "cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=found + "2, got 'cuda:2'"):
        glm4.load("demo", "cuda:2")


@pytest.mark.parametrize("stored", [False, True], ids=["as it is loaded", "on disk"])
def test_a_missing_kernel_shows_before_the_model_is_read(stored, tmp_path, monkeypatch):
    folder = write_tokenizer(write_checkpoint(tmp_path / "a"))
    options = {"quantize": "int4"}
    if stored:
        folder, options = quantize_checkpoint(folder, tmp_path / "b"), {}

    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(glm4.checkpoint, "read_into", read)
    monkeypatch.setattr(glm4.checkpoint, "read_quantized", read)
    monkeypatch.setattr(glm4.checkpoint, "resolve_device", torch.device)
    monkeypatch.setattr(extension, "_C", SimpleNamespace())
    with pytest.raises(RuntimeError, match="built without CUDA: install nvcc"):
        glm4.load(folder, "cuda", **options)
    monkeypatch.setattr(extension, "_C", None)
    with pytest.raises(RuntimeError, match="glm4_kernels was not built"):
        glm4.load(folder, "cpu", **options)


def test_fp16_is_refused_where_it_overflows(tmp_path):
    changes = {"hidden_size": 4096, "dtype": "float16"}
    folder = write_checkpoint(tmp_path, changes | {"num_hidden_layers": 1})
    tensors = {
        "model.embed_tokens.weight": (320, 4096),
        "lm_head.weight": (320, 4096),
        "model.norm.weight": (4096,),
        "model.layers.0.self_attn.o_proj.weight": (4096, 256),
        "model.layers.0.mlp.gate_up_proj.weight": (192, 4096),
        "model.layers.0.mlp.down_proj.weight": (4096, 96),
    }
    for x, rows in (("q", 256), ("k", 128), ("v", 128)):
        tensors[f"model.layers.0.self_attn.{x}_proj.weight"] = (rows, 4096)
        tensors[f"model.layers.0.self_attn.{x}_proj.bias"] = (rows,)
    for norm in ("input", "post_attention", "post_self_attn", "post_mlp"):
        tensors[f"model.layers.0.{norm}_layernorm.weight"] = (4096,)
    halves = {k: torch.ones(v, dtype=torch.half) for k, v in tensors.items()}
    save_file(halves, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"float16: the activations of GLM-4 .* overflow"):
        glm4.load(folder, "cpu")
    assert glm4.load(folder, "cpu", dtype="bfloat16").dtype == torch.bfloat16


MEASURE = """
import sys, glm4
def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) << 10
glm4.load(sys.argv[1], "cpu")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = peak()
model = glm4.load(sys.argv[2], "cpu")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads its peak memory from /proc")
def test_peak_memory_is_the_model_and_one_tensor(tmp_path):
    small = write_checkpoint(tmp_path / "small")
    rows = 131072  # two tensors of 32 MiB each, and little else
    big = {name: torch.ones(rows, 64) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    write_checkpoint(tmp_path / "big", {"vocab_size": rows}, big)
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, small, tmp_path / "big"], capture_output=True, check=True
    )
    tensor, slack = rows * 64 * 4, 4 << 20
    grown = int(out.stdout)
    assert 2 * tensor - slack <= grown <= 3 * tensor + slack
