"""Checkpoints that hold more, less or other names than `save_pretrained` writes, each against
transformers: equal logits, with a warning of what is not used, or the true reason why not."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from checkpoints import rewrite_as_chatglm, transformers_model, write_json
from quantized_checkpoints import Matrix, pack_quantized, write_quantized
from safetensors.torch import load_file, save_file
from test_parity import LOGITS_TOLERANCE, relative_error

import glm4

TOKENS = torch.randint(0, 320, (1, 40), generator=torch.Generator().manual_seed(0))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def rewrite(folder, change):
    """model.safetensors with what `change` makes of its tensors, or does to them."""
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    made = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(made, folder / "model.safetensors", {"format": "pt"})


def ours(folder, **options):
    """(logits, what was warned of)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = glm4.load(folder, "cpu", progress=False, **options)
    return model.logits(TOKENS), [str(warning.message) for warning in caught]


def theirs(folder):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.eval().requires_grad_(False)(TOKENS).logits.float()


def layer(name, tensor):
    return {f"model.layers.{i}.{name}": tensor.clone() for i in range(2)}


# What is stored besides: (tensors, what the warning says of it; None: nothing).
EXTRA = {
    "rotary tables": (
        {"model.rotary_emb.inv_freq": torch.ones(16)}
        | layer("self_attn.rotary_emb.inv_freq", torch.ones(16)),
        None,
    ),
    "zero biases": (
        layer("self_attn.o_proj.bias", torch.zeros(64))
        | layer("mlp.down_proj.bias", torch.zeros(64, dtype=torch.half))
        | layer("input_layernorm.bias", torch.zeros(64)),
        None,
    ),
    "extra state": (
        layer("mlp.down_proj._extra_state", torch.ones(5, dtype=torch.uint8)),
        r"not used: model\.layers\.0\.mlp\.down_proj\._extra_state, model\.layers\.1\S*$",
    ),
    "a value head": (
        {"v_head.summary.weight": torch.ones(1, 64), "v_head.summary.bias": torch.ones(1)},
        r"not used: v_head\.summary\.bias, v_head\.summary\.weight$",
    ),
    "many": (
        {f"score.{i}.weight": torch.ones(1) for i in range(9)},
        r"not used: score\.0\.weight, score\.1\.weight, score\.2\.weight and 6 more$",
    ),
    "two lines": ({"two\nlines": torch.ones(1)}, r"not used: two\\nlines$"),
    "KV scales": (
        layer("self_attn.k_scale", torch.ones(1)) | layer("self_attn.v_scale", torch.ones(1)),
        r"KV cache is not quantised here, .* model\.layers\.0\.self_attn\.k_scale, .* and 1 more$",
    ),
    "KV scales of other tools": (
        layer("self_attn.k_proj.output_scale", torch.ones(()))
        | layer("self_attn.v_proj.v_scale", torch.ones(1))
        | layer("self_attn.kv_scale", torch.ones(1)),
        r"KV cache is not quantised here, .* and 3 more$",
    ),
}


@pytest.mark.parametrize("extra, message", EXTRA.values(), ids=EXTRA)
def test_what_is_not_used(extra, message, tmp_path):
    transformers_model("glm4").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | extra)
    logits, lines = ours(tmp_path)
    assert relative_error(logits, theirs(tmp_path)) < LOGITS_TOLERANCE
    assert len(lines) == (message is not None)
    for line in lines:
        assert "\n" not in line and line.startswith(f"{tmp_path / 'model.safetensors'}: ")
        assert re.search(message, line)


# transformers ignores these too, but the result is not what the checkpoint's maker had.
HARMFUL = [
    "model.layers.0.self_attn.o_proj.bias",
    "model.layers.0.self_attn.q_proj.lora_A.weight",
    "model.layers.0.self_attn.q_norm.weight",
    "model.layers.2.mlp.down_proj.weight",
    "model.layers.0.mlp.down_proj.weight_scale",
    "lm_head.bias",
    "layers.0.mlp.gate.weight",
]


@pytest.mark.parametrize("name", HARMFUL)
def test_what_would_change_the_result_is_refused(name, tmp_path):
    transformers_model("glm4").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {name: torch.ones(64)})
    with pytest.raises(
        glm4.CheckpointError, match=rf"model\.safetensors: tensor {name} \[64\] is un"
    ):
        glm4.load(tmp_path, "cpu")


def same_head(tensors):
    tensors[HEAD] = tensors[EMBEDDING]


def other_head(tensors):
    tensors[HEAD] = tensors[EMBEDDING] * 2


def head_alone(tensors):
    tensors[HEAD] = tensors.pop(EMBEDDING)


@pytest.mark.parametrize("model_type", ["glm", "glm4"])
@pytest.mark.parametrize(
    "change, tied", [(same_head, True), (other_head, False), (head_alone, True)]
)
def test_tied_models_that_store_a_head(change, tied, model_type, tmp_path):
    transformers_model(model_type, tie_word_embeddings=True).save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    logits, lines = ours(tmp_path)
    assert relative_error(logits, theirs(tmp_path)) < LOGITS_TOLERANCE
    model = glm4.load(tmp_path, "cpu") if tied else None
    assert tied == (not lines) == (model is not None and model.lm_head is model.embedding)
    assert all("the head differs from the embedding" in line for line in lines)


def test_a_tied_head_of_another_shape(tmp_path):
    transformers_model("glm4", tie_word_embeddings=True).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {HEAD: tensors[EMBEDDING][:300]})
    with pytest.raises(
        glm4.CheckpointError, match=r"lm_head\.weight must be \[320, 64\], got \[300"
    ):
        glm4.load(tmp_path, "cpu")


@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_the_base_model_alone(model_type, tmp_path):
    """As GlmModel.save_pretrained writes it: names without `model.`, and no head."""
    tied = transformers_model(model_type, tie_word_embeddings=True)
    tied.model.save_pretrained(tmp_path / "tied")
    logits, lines = ours(tmp_path / "tied")
    assert not lines
    assert relative_error(logits, theirs(tmp_path / "tied")) < LOGITS_TOLERANCE
    # transformers makes up a random head, with a warning.
    transformers_model(model_type).model.save_pretrained(tmp_path / "untied")
    why = r"lm_head\.weight \[320, 64\] is missing; it was saved from the base model, which has no"
    with pytest.raises(glm4.CheckpointError, match=why):
        glm4.load(tmp_path / "untied", "cpu")


def test_the_base_model_of_the_remote_code(tmp_path):
    """Its head is in the base model."""
    theirs = transformers_model("glm4")
    theirs.save_pretrained(tmp_path / "a")
    rewrite_as_chatglm(tmp_path / "a", tmp_path / "b")
    rewrite(tmp_path / "b", lambda given: {k.removeprefix("transformer."): given[k] for k in given})
    logits, lines = ours(tmp_path / "b")
    assert not lines
    assert relative_error(logits, theirs(TOKENS).logits) < LOGITS_TOLERANCE


def test_kv_scales_beside_int4(tmp_path):
    """They change nothing, and are spoken of once. transformers quantises its cache by them, so
    it is the same checkpoint without them that is the truth."""
    transformers_model("glm4", hidden_size=128, intermediate_size=256).save_pretrained(
        tmp_path / "m"
    )

    def make(module, n, k, generator):
        matrix = None if module == "lm_head" else Matrix(generator, n, k)
        return matrix and (matrix, pack_quantized(matrix))

    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    scales = layer("self_attn.k_scale", torch.ones(1)) | layer("self_attn.v_scale", torch.ones(1))
    found = {}
    for name, kv in {"plain": {}, "kv": {"kv_cache_scheme": scheme}}.items():
        given = {"quantization_config": config | kv}
        write_quantized(tmp_path / name, tmp_path / "m", given, make, scales if kv else {})
        found[name] = ours(tmp_path / name, activations="float")
    assert torch.equal(found["kv"][0], found["plain"][0])
    assert not found["plain"][1] and len(found["kv"][1]) == 1
    assert relative_error(found["plain"][0], theirs(tmp_path / "plain")) < LOGITS_TOLERANCE


def test_a_quantised_cache_and_nothing_else(tmp_path):
    """A quantization_config of the cache alone."""
    model = transformers_model("glm4")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
    }
    write_json(tmp_path / "config.json", config)
    assert relative_error(ours(tmp_path)[0], model(TOKENS).logits) < LOGITS_TOLERANCE
