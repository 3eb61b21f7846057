from __future__ import annotations

import warnings

import pytest
import torch
from checkpoints import load_tensor, write_checkpoint

import glm4
import glm4_kernels as gk
from glm4.int8_error import LIMIT, TOKENS, int8_errors
from glm4.random_inputs import random_tokens

NAMES = [f"layers.{i}.{kind}" for i in range(2) for kind in ("qkv", "o", "gate_up", "down")]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("sound") / "tiny", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def lopsided(sound, tmp_path_factory):
    """The same, but what goes into the second MLP has a channel 1000 times as large, whose weights
    are as much smaller."""
    norm, weight = (
        f"model.layers.1.{name}.weight" for name in ("post_attention_layernorm", "mlp.gate_up_proj")
    )
    tensors = {name: load_tensor(sound, name) for name in (norm, weight)}
    tensors[norm][5] *= 1000
    tensors[weight][:, 5] /= 1000
    folder = tmp_path_factory.mktemp("lopsided") / "tiny"
    return write_checkpoint(folder, tensors=tensors, dtype=torch.bfloat16)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_sound_model_loads_quietly(sound, quantize):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = glm4.load(sound, "cpu", quantize=quantize)
    errors = int8_errors(model)
    assert set(errors) == {*NAMES, "lm_head"}
    assert all(0.001 < error < LIMIT for error in errors.values()), errors


def test_a_lopsided_layer_is_named(lopsided):
    message = r"change the output of layers\.1\.gate_up by \d\d% \(over 5% in 1 of 9 layers\)"
    with pytest.warns(UserWarning, match=message) as record:
        model = glm4.load(lopsided, "cpu", quantize="int8")
    assert record[0].filename == __file__
    with warnings.catch_warnings():  # who chose has been told
        warnings.simplefilter("error")
        glm4.load(lopsided, "cpu", quantize="int8", activations="int8")
        exact = glm4.load(lopsided, "cpu", quantize="int8", activations="float")
        glm4.load(lopsided, "cpu")

    ids = torch.tensor([[5, 6, 7]])
    expected = exact.logits(ids)
    assert (model.logits(ids) - expected).norm() > LIMIT * expected.norm()


def test_an_error_is_the_layer_s_own(lopsided):
    """Of the first layer, by hand."""
    model = glm4.load(lopsided, "cpu", quantize="int4", activations="int8")
    attention = model.blocks[0].attention
    x = model.embedding[random_tokens(model.config, TOKENS)]
    x = gk.rms_norm(x, model.first_norm, model.config.eps)
    rounded, exact = (
        gk.quantized_matmul(x, attention.qkv, attention.qkv_bias, activations).float()
        for activations in ("int8", "float")
    )
    errors = (rounded - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert int8_errors(model)["layers.0.qkv"] == pytest.approx(errors.median().item())
