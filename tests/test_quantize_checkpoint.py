"""`quantize_checkpoint`: what it writes, who can read it, and what a killed run leaves."""

from __future__ import annotations

import base64
import json
import subprocess
import sys

import pytest
import torch
from checkpoints import (
    load_tensor,
    rewrite_as_chatglm,
    transformers_model,
    write_checkpoint,
    write_json,
    write_tokenizer,
)

import glm4
import glm4_kernels as gk
from glm4 import quantize
from glm4.quantization_policy import Form
from glm4.quantize import integer_zero_points, quantize_checkpoint
from glm4.quantized_checkpoint import Codes
from glm4.tokenizer import Tokenizer

# K of 256 and 384: two and three groups of 128.
SIZES = {"hidden_size": 256, "intermediate_size": 384}
TOKENS = torch.tensor([[5, 6, 7, 300, 17, 2]])
# What transformers reads of a config.json, and has no default for.
SIZES_AND_NAMES = (
    *("architectures", "model_type", "dtype", "hidden_act", "rms_norm_eps", "rope_parameters"),
    *("vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    *("attention_bias", "tie_word_embeddings", "eos_token_id"),
)
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    transformers_model("glm4", **SIZES).save_pretrained(folder / "glm4")
    return write_tokenizer(folder / "glm4")


def quantised_config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def as_floats(model):
    """The same model with its quantised weights as floats."""
    model.lm_head = dequantised(model.lm_head)
    for block in model.blocks:
        for part, names in ((block.attention, ("qkv", "o")), (block.mlp, ("gate_up", "down"))):
            for name in names:
                setattr(part, name, dequantised(getattr(part, name)))
    return model


def dequantised(weight):
    return weight.dequantize() if isinstance(weight, gk.QuantizedWeight) else weight


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "head_bits"),
    [
        (4, 128, True, 8),
        (4, 32, False, 4),
        (4, None, True, 16),
        (8, None, True, 8),
        (8, 64, False, 8),
    ],
)
def test_holds_what_load_would_make(bits, group_size, symmetric, head_bits, source, tmp_path):
    target = tmp_path / "new" / "target"  # and its parents
    assert quantize_checkpoint(source, target, bits, group_size, symmetric, head_bits) == target
    model = glm4.load(target, "cpu")
    form = Form(bits, group_size, symmetric, "feedback" if bits == 4 else "search")
    policy = dict.fromkeys(("qkv", "o", "gate_up", "down"), form)
    if head_bits != 16:
        policy["lm_head"] = Form(head_bits, group_size, symmetric)
    expected = glm4.load(source, "cpu", quantize=policy)
    for block, floats in zip(model.blocks, expected.blocks, strict=True):
        pairs = [(block.attention, floats.attention, name) for name in ("qkv", "o")]
        pairs += [(block.mlp, floats.mlp, name) for name in ("gate_up", "down")]
        for quantised, given, name in pairs:
            ours = getattr(given, name)
            theirs = getattr(quantised, name)
            assert theirs.group_size == group_size and theirs.bits == bits, name
            for a, b in zip(theirs.codes(), ours.codes(), strict=True):
                assert (a is None and b is None) or torch.equal(a, b), name
    if head_bits == 16:
        assert torch.equal(model.lm_head, expected.lm_head)
        assert quantised_config(target)["ignore"] == ["lm_head"]
    else:
        assert torch.equal(model.lm_head.dequantize(), expected.lm_head.dequantize())
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.bias"):
        assert torch.equal(load_tensor(target, name), load_tensor(source, name))
    names = {path.name for path in target.iterdir()}
    given = {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"}
    assert names == given and not list(target.parent.glob("*.partial"))
    modes = {name: (target / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(set(modes.values())) == 1, modes


def test_group_that_divides(tmp_path):
    """Rows of 64, 96 and 256 in groups of at most 128; each kind is told of in the config."""
    source = write_tokenizer(write_checkpoint(tmp_path / "source"))
    target = quantize_checkpoint(source, tmp_path / "target")
    block = glm4.load(target, "cpu").blocks[0]
    sizes = [block.attention.qkv, block.attention.o, block.mlp.gate_up, block.mlp.down]
    # A row of 64 in groups of 64 is one group.
    assert [weight.group_size for weight in sizes] == [None, 128, None, 32]
    groups = quantised_config(target)["config_groups"].values()
    told = {
        (target.removeprefix("re:.*\\.").removesuffix("$"), group["weights"]["group_size"])
        for group in groups
        for target in group["targets"]
    }
    expected = {(kind, 64) for kind in (*KINDS, "lm_head")}
    expected ^= {("o_proj", 64), ("o_proj", 128), ("down_proj", 64), ("down_proj", 32)}
    assert told == expected


def greedy(theirs, prompt, n_tokens=48):
    tokens = torch.tensor([prompt])
    out = theirs.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=n_tokens,
        min_new_tokens=n_tokens,
        do_sample=False,
        eos_token_id=None,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("model_type", ["glm", "glm4", "chatglm"])
def test_transformers_writes_the_same_text(model_type, tmp_path):
    pytest.importorskip("compressed_tensors", reason="transformers reads the format with it")
    import transformers

    source = tmp_path / "source"
    kind = "glm" if model_type == "chatglm" else model_type
    transformers_model(kind, **SIZES, tie_word_embeddings=False).save_pretrained(source)
    if model_type == "chatglm":
        source.rename(tmp_path / "hf")
        rewrite_as_chatglm(tmp_path / "hf", source)
    write_tokenizer(source)
    target = quantize_checkpoint(source, tmp_path / "target", group_size=64)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert type(theirs).__name__ == ("Glm4ForCausalLM" if kind == "glm4" else "GlmForCausalLM")
    ours = glm4.load(target, "cpu", activations="float")
    truth = theirs(TOKENS).logits
    assert (ours.logits(TOKENS) - truth).norm() < 1e-5 * truth.norm()
    prompt = [1, 2, 30, 40, 50]
    expected = greedy(theirs, prompt)
    assert len(set(expected)) >= 16, "this text is too monotonous to show a difference"
    assert ours.generate([prompt], len(expected), stop_token_ids=[]) == [expected]
    # And it is the quantised model that both run, not the original.
    original = glm4.load(source, "cpu").logits(TOKENS)
    assert (truth - original).norm() > 0.05 * truth.norm()
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    assert tokenizer("the word", add_special_tokens=False)["input_ids"]


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(
    ("kind", "options", "scheme"),
    [
        # Rows of 256, 256 and 288: groups of 32 are the largest that divide all.
        ("glm4", {"engine": "transformers"}, (4, "group", 32, True)),
        ("glm", {"engine": "vllm", "symmetric": False}, (4, "group", 32, False)),
        ("glm4", {"engine": "sglang", "group_size": None}, (4, "channel", None, True)),
        ("glm", {"engine": "vllm", "bits": 8, "head_bits": 16}, (8, "group", 32, True)),
    ],
)
def test_other_engines_read_it_dequantised(kind, options, scheme, tmp_path):
    """transformers' `dequantize=True` decodes all modules by the first scheme, head included, and
    rounds to bfloat16."""
    pytest.importorskip("compressed_tensors", reason="transformers reads the format with it")
    import transformers

    sizes = SIZES | {"intermediate_size": 288}
    transformers_model(kind, **sizes, tie_word_embeddings=False).save_pretrained(tmp_path / "a")
    target = quantize_checkpoint(write_tokenizer(tmp_path / "a"), tmp_path / "b", **options)
    [group] = quantised_config(target)["config_groups"].values()
    fields = ("num_bits", "strategy", "group_size", "symmetric")
    assert tuple(group["weights"][field] for field in fields) == scheme
    assert quantised_config(target)["ignore"] == ["lm_head"]

    dequantize = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        target, quantization_config=dequantize
    )
    ours = glm4.load(target, "cpu")
    for block in ours.blocks:
        for part, names in ((block.attention, ("qkv", "o")), (block.mlp, ("gate_up", "down"))):
            for name in names:
                setattr(part, name, dequantised(getattr(part, name)).bfloat16().float())
    truth = theirs(TOKENS).logits
    assert (ours.logits(TOKENS) - truth).norm() < 1e-5 * truth.norm()


def test_compressed_tensors_unpacks_zero_points(source, tmp_path):
    """compressed-tensors 0.20 does not load asymmetric packs in general; its own unpacker does."""
    pytest.importorskip("compressed_tensors", reason="its unpacker is the oracle")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    target = quantize_checkpoint(source, tmp_path / "target", 4, 32, symmetric=False)
    config = QuantizationConfig.model_validate(quantised_config(target))
    unpacker = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = load_file(target / "model.safetensors")
    ours = glm4.load(target, "cpu")
    for i, module in enumerate(("lm_head", "model.layers.1.mlp.down_proj")):
        scheme = list(config.config_groups.values())[1 - i]
        own = {k.removeprefix(f"{module}."): t for k, t in tensors.items() if module in k}
        own["weight_scale"] = own["weight_scale"].float()
        weight = (ours.lm_head, ours.blocks[1].mlp.down)[i]
        assert torch.equal(unpacker.decompress(own, scheme)["weight"], weight.dequantize())


@pytest.mark.parametrize("kind", ["glm", "glm4"])
def test_remote_code_becomes_transformers(kind, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    model = transformers_model(kind, rope_parameters=rope, **SIZES)
    model.save_pretrained(tmp_path / "hf")
    rewrite_as_chatglm(tmp_path / "hf", tmp_path / "chatglm")
    write_tokenizer(tmp_path / "chatglm")
    remote = {
        "auto_map": {"AutoTokenizer": ["code.ChatGLM4Tokenizer", None]},
        "padding_side": "left",
    }
    write_json(tmp_path / "chatglm" / "tokenizer_config.json", remote)
    a = quantize_checkpoint(write_tokenizer(tmp_path / "hf"), tmp_path / "a")
    b = quantize_checkpoint(tmp_path / "chatglm", tmp_path / "b")

    assert quantised_config(a) == quantised_config(b)
    ours, theirs = glm4.load(a, "cpu"), glm4.load(b, "cpu")
    assert ours.config == theirs.config and theirs.config.theta == 5e6
    assert torch.equal(ours.logits(TOKENS), theirs.logits(TOKENS))
    written = json.loads((b / "config.json").read_text())
    given = json.loads((a / "config.json").read_text())
    assert written.items() >= {name: given[name] for name in SIZES_AND_NAMES}.items()
    tokenizer = json.loads((b / "tokenizer_config.json").read_text())
    assert tokenizer == {"padding_side": "left", "tokenizer_class": "PreTrainedTokenizerFast"}


def test_missing_tokenizer_warns(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    with pytest.warns(UserWarning, match=r"source: has neither tokenizer\.json nor") as caught:
        quantize_checkpoint(source, tmp_path / "target")
    assert caught[0].filename == __file__


def test_tokenizer_of_the_remote_code_is_converted(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    every_byte = [b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)]
    (source / "tokenizer.model").write_bytes(b"".join(every_byte))
    target = quantize_checkpoint(source, tmp_path / "target")
    assert Tokenizer(target).encode("ab") == [258, 260, 97, 98]


def test_theta_is_written(source, tmp_path):
    target = quantize_checkpoint(source, tmp_path / "target", rope_theta=5e6)
    assert glm4.load(target, "cpu").config.theta == 5e6
    changes = {"rope_parameters": None, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    old = write_tokenizer(write_checkpoint(tmp_path / "old", changes))
    target = quantize_checkpoint(old, tmp_path / "target2", rope_theta=1e8)
    assert glm4.load(target, "cpu").config.theta == 1e8


def test_shards(source, tmp_path, monkeypatch):
    whole = quantize_checkpoint(source, tmp_path / "whole")
    monkeypatch.setattr(quantize, "SHARD_SIZE", 200_000)
    target = quantize_checkpoint(source, tmp_path / "target")
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(path.name for path in target.glob("*.safetensors")) and len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    expected = glm4.load(whole, "cpu").logits(TOKENS)
    assert torch.equal(glm4.load(target, "cpu").logits(TOKENS), expected)
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    assert 0.98 * size < index["metadata"]["total_size"] < size


def test_tied_head_stays(tmp_path):
    transformers_model("glm", **SIZES, tie_word_embeddings=True).save_pretrained(tmp_path / "a")
    target = quantize_checkpoint(write_tokenizer(tmp_path / "a"), tmp_path / "b")
    model = glm4.load(target, "cpu")
    assert model.lm_head is model.embedding


def test_float_zero_points_are_fitted_again(tmp_path):
    """Where plain rounding moves a group by up to half a step, here its scale answers."""
    weight = torch.randn(64, 256) + 1.5
    groups = weight.unflatten(1, (4, 64))
    scale = ((groups.amax(-1) - groups.amin(-1)) / 15).bfloat16()
    zero_point = -groups.amin(-1) / scale.float()
    u = (groups / scale.float().unsqueeze(-1) + zero_point.unsqueeze(-1)).round().clamp(0, 15)
    codes = Codes(u.flatten(1).to(torch.uint8), scale, zero_point, 4, 64)

    fitted = integer_zero_points(weight, codes)
    assert fitted.zero_point.dtype == torch.uint8 and fitted.scale.dtype == torch.bfloat16

    def damage(u, scale, z):
        steps = u.float().unflatten(1, (4, 64)) - z.float().unsqueeze(-1)
        return (scale.float().unsqueeze(-1) * steps - groups).square().sum(-1)

    ours = damage(fitted.u, fitted.scale, fitted.zero_point)
    plain = damage(codes.u, scale, zero_point.round())
    assert (ours <= plain).all() and ours.sum() < 0.7 * plain.sum()
    assert ours.sum() < 1.25 * damage(codes.u, scale, zero_point).sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits must be 4 or 8, got 3"),
        ({"group_size": 16}, "group_size must be 32, 64, 128 or None, got 16"),
        ({"head_bits": 2}, "head_bits must be 4, 8 or 16, got 2"),
        ({"symmetric": 1}, "symmetric must be a bool, got 1"),
        ({"engine": "llama"}, "engine must be None, transformers, vllm, sglang, got 'llama'"),
        ({"engine": "vllm", "head_bits": 8}, "head_bits must be 16 for vllm, got 8"),
        ({"engine": "sglang", "symmetric": False}, "symmetric must be True for sglang, got False"),
        ({"device": "tpu"}, "device must be"),
        ({"rope_theta": -1.0}, "rope_theta must be over 1"),
    ],
)
def test_rejects_arguments(options, message, source, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        quantize_checkpoint(source, tmp_path / "target", **options)
    assert list(tmp_path.iterdir()) == []


def test_rejects_source_and_target(source, tmp_path):
    target = quantize_checkpoint(source, tmp_path / "target")
    for taken in (target, source, target / "config.json"):
        with pytest.raises(glm4.CheckpointError, match="must not exist yet"):
            quantize_checkpoint(source, taken)
    with pytest.raises(glm4.CheckpointError, match="target: must not be quantised already"):
        quantize_checkpoint(target, tmp_path / "again")
    with pytest.raises(glm4.CheckpointError, match="no such folder"):
        quantize_checkpoint(tmp_path / "nowhere", tmp_path / "again")
    assert not (tmp_path / "again").exists() and not (tmp_path / "again.partial").exists()


MEASURE = """
import sys, glm4_kernels.quantized_weight
from glm4 import quantize
def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) << 10
quantize.SHARD_SIZE = 4 << 20
glm4_kernels.quantized_weight.SLAB = 1 << 18  # or scratch is all that shows at this size
# To 8 bits: the scratch of 4, 130 MB whatever the model, would hide a copy of this small one.
quantize.quantize_checkpoint(sys.argv[1], sys.argv[2], bits=8)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = peak()
quantize.quantize_checkpoint(sys.argv[3], sys.argv[4], bits=8)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads its peak memory from /proc")
def test_memory_is_that_of_a_tensor_and_a_shard(tmp_path):
    write_tokenizer(write_checkpoint(tmp_path / "small"))
    sizes = {"num_hidden_layers": 12, "hidden_size": 512, "intermediate_size": 2048}
    transformers_model("glm4", **sizes).bfloat16().save_pretrained(tmp_path / "large")
    write_tokenizer(tmp_path / "large")
    arguments = [tmp_path / name for name in ("small", "a", "large", "b")]
    run = [sys.executable, "-c", MEASURE, *arguments]
    grown = int(subprocess.run(run, capture_output=True, check=True).stdout)
    model = (tmp_path / "large" / "model.safetensors").stat().st_size  # 84 MB; a tensor has 4 MB
    assert model > 80e6 and grown < 0.6 * model
