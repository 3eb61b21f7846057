from __future__ import annotations

import pytest
import torch

import glm4
import glm4_kernels as gk
from benchmarks.quality import CONTENDERS, bits_per_weight, demo, measure_draw, permuted, summary
from glm4.model import Model
from glm4.quantization_policy import LINEAR, POLICIES, Form, policy_of, preparer
from glm4.random_inputs import RandomInputs


def forms(policy, shapes):
    """(bits, group_size, symmetric) of each weight that `policy` quantises."""
    prepare = preparer(policy)
    made = {name: prepare(name, torch.randn(shape)) for name, shape in shapes.items()}
    return {
        name: (q.bits, q.group_size, q.zero_point is None)
        for name, q in made.items()
        if not isinstance(q, torch.Tensor)
    }


def test_tables():
    shapes = {
        "embedding": (4, 256),
        "layers.0.input_norm": (256,),
        "layers.0.qkv": (4, 256),
        "layers.0.o": (4, 192),
        "layers.0.down": (4, 96),
        "layers.0.gate_up": (4, 37 * 32),
        "lm_head": (4, 256),
    }
    assert forms("int8", shapes) == {
        name: (8, None, True) for name in shapes if name.rpartition(".")[2] in LINEAR
    }
    assert forms("int4", shapes) == {
        "layers.0.qkv": (4, 128, True),
        "layers.0.o": (4, 64, True),
        "layers.0.down": (4, 32, True),
        "layers.0.gate_up": (4, 32, True),
        "lm_head": (8, None, True),
    }
    assert forms(None, shapes) == {}


def test_a_policy_of_ones_own():
    """A full name goes before its last part; what is not named stays."""
    policy = {"o": Form(4, 32), "layers.1.o": Form(8, 64, symmetric=False)}
    shapes = {f"layers.{i}.{kind}": (4, 128) for i in (0, 1) for kind in ("o", "down")}
    assert forms(policy, shapes) == {"layers.0.o": (4, 32, True), "layers.1.o": (8, 64, False)}


@pytest.mark.parametrize(
    "quantize, message",
    [
        ("int3", "load: quantize must be None, 'int8', 'int4' or a policy, got 'int3'"),
        (4, "got 4"),
        ({"embedding": Form(8, None)}, "a policy of qkv, .*, got 'embedding'"),
        ({"o": 4}, "a policy whose o is a Form, got 4"),
    ],
)
def test_rejects(quantize, message):
    with pytest.raises(ValueError, match=message):
        policy_of(quantize)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((4, 7), r"load: quantize\['o'\].group_size must be 32, 64, 128 or None, got 7"),
        ((4, True), "group_size must be .* got True"),
        ((4, -1), "group_size must be .* got -1"),
        ((3, 128), "bits must be 4 or 8, got 3"),
        (("4", 128), "bits must be 4 or 8, got '4'"),
        ((4, 128, 1), "symmetric must be True or False, got 1"),
        ((4, 128, True, "best"), "method must be .* or 'feedback', got 'best'"),
        ((4, 128, True, "hqq"), "symmetric must be False for method 'hqq', got True"),
    ],
)
def test_rejects_forms(arguments, message):
    with pytest.raises(ValueError, match=message):
        policy_of({"o": Form(*arguments)})


@pytest.mark.parametrize("name", ["layers.99.o", "layers.-1.o", "model.layers.0.o", ".o"])
def test_rejects_layers_that_are_not_there(name):
    with pytest.raises(ValueError, match=rf"the model's layers, 0 to \d+, got '{name}'"):
        glm4.load("demo", quantize={name: Form(4, 32)}, device="cpu", progress=False)
    glm4.load("demo", quantize={"layers.0.o": Form(4, 32)}, device="cpu", progress=False)


def test_errors_name_the_tensor():
    with pytest.raises(
        ValueError, match=r"^layers.3.down: quantize: weight must be .*, got \[4, 40\]"
    ):
        preparer("int4")("layers.3.down", torch.randn(4, 40))
    with pytest.raises(ValueError, match=r"^lm_head: quantize: weight must be finite"):
        preparer("int8")("lm_head", torch.full((4, 64), torch.nan))


def test_random_inputs_are_the_models():
    """What each linear layer sees is what the model itself would show it."""
    config, weights = demo()
    inputs = RandomInputs(config)
    seen = {name: inputs.see(name, weight) for name, weight in weights.items()}
    assert [name for name, moment in seen.items() if moment is not None] == [
        name for name in config.shapes if name.rpartition(".")[2] in LINEAR
    ]
    model = Model(config, weights, torch.device("cpu"), torch.float32)
    ids = inputs.tokens.unflatten(0, (-1, inputs.length))
    logits = model.logits(ids).flatten(0, 1)
    torch.testing.assert_close(inputs.x @ weights["lm_head"].t(), logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(seen["lm_head"][0], inputs.x.t() @ inputs.x / len(inputs.x))


def test_tensors_out_of_order_are_searched():
    config, weights = demo()
    prepare = preparer("int4", config)
    name = "layers.2.o"
    ours = prepare(name, weights[name])
    plain = gk.quantize(weights[name])
    assert torch.equal(ours.dequantize(), plain.dequantize())


def test_permuted_is_the_same_model():
    config, weights = demo()
    ids = torch.arange(64)[None]
    given, other = (
        Model(config, permuted(config, weights, seed), torch.device("cpu"), torch.float32)
        for seed in (0, 1)
    )
    torch.testing.assert_close(other.logits(ids), given.logits(ids), rtol=1e-4, atol=1e-4)


def test_damage_on_the_demo_model():
    """A few windows of held-out text; `python -m benchmarks quality` measures all of them."""
    config, _ = demo()
    names = ("RTN, max/7", "nearest", "int4", "int8")
    result = summary([measure_draw({n: CONTENDERS[n] for n in names}, 0, 3, lambda _: None)])
    found = {row["name"]: row for row in result["contenders"]}
    assert abs(found["int8"]["all"]["mean"]) < 1e-3
    assert found["int8"]["kl_nats"]["mean"] < 1e-3
    assert found["int4"]["bits_per_weight"] <= 4.6
    assert found["int4"]["kl_share"]["RTN, max/7"]["high"] < 0.6
    assert found["int4"]["kl_share"]["nearest"]["high"] < 0.75
    assert found["int4"]["all"]["mean"] < found["RTN, max/7"]["all"]["mean"]
    assert bits_per_weight(config, POLICIES["int8"]) < 8.1


def test_load():
    model = glm4.load("demo", quantize="int4", device="cpu", progress=False)
    assert model.lm_head.bits == 8 and model.blocks[0].attention.qkv.bits == 4
    own = glm4.load("demo", quantize={"o": Form(8, 64)}, device="cpu", progress=False)
    assert own.blocks[0].attention.o.group_size == 64
    assert isinstance(own.lm_head, torch.Tensor)
