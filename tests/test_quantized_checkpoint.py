"""Quantised checkpoints: each format read to the bit, written, and refused where it is damaged."""

from __future__ import annotations

import re
import shutil
import time

import numpy as np
import pytest
import torch
from checkpoints import rewrite_as_chatglm, transformers_model, write_json
from quantized_checkpoints import (
    Matrix,
    awq,
    gptq,
    gptq_by_autogptq,
    gptq_by_gptqmodel,
    pack_quantized,
    write_quantized,
)
from safetensors.torch import load_file, save_file

import glm4
import glm4_kernels as gk

# K of 256 and 384: two and three groups of 128.
SIZES = {"hidden_size": 256, "intermediate_size": 384}
TOKENS = torch.tensor([[5, 6, 7, 300]])
OURS = ("qkv", "o", "gate_up", "down")
HEADS = ("lm_head", "output_layer")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One model under both families of names."""
    folder = tmp_path_factory.mktemp("sources")
    transformers_model("glm4", **SIZES).save_pretrained(folder / "transformers")
    rewrite_as_chatglm(folder / "transformers", folder / "chatglm")
    return folder


def config_groups(*groups, **fields):
    """quantization_config of compressed-tensors; groups are (targets, weights)."""
    made = {
        f"group_{i}": {"targets": targets, "weights": {"type": "int", **weights}}
        for i, (targets, weights) in enumerate(groups)
    }
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": made,
            "quantization_status": "compressed",
            **fields,
        }
    }


def weights_args(bits=4, group_size=128, symmetric=True, **fields):
    strategy = {"strategy": "group", "group_size": group_size}
    if group_size is None:
        strategy = {"strategy": "channel", "group_size": None}
    return {"num_bits": bits, "symmetric": symmetric, **strategy, **fields}


def gptq_config(bits=4, group_size=128, sym=True, **fields):
    size = -1 if group_size is None else group_size
    given = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": sym, **fields}
    return {"quantization_config": given}


def awq_config(**fields):
    given = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, **fields}
    return {"quantization_config": given}


def auto_round_config(packing="auto_round:auto_gptq", **fields):
    given = {"quant_method": "auto-round", "packing_format": packing, "data_type": "int"}
    return {"quantization_config": given | {"bits": 4, "group_size": 128, "sym": True, **fields}}


def maker(pack, heads=False, **sizes):
    """Makes every linear layer but the head alike."""

    def make(module, n, k, generator):
        if not heads and module.rpartition(".")[2] in HEADS:
            return None
        matrix = Matrix(generator, n, k, **sizes)
        return matrix, pack(matrix)

    return make


def read_weights(model):
    """By our names, in fp32."""
    found = {"lm_head": model.lm_head}
    for i, block in enumerate(model.blocks):
        for name in ("qkv", "o"):
            found[f"layers.{i}.{name}"] = getattr(block.attention, name)
        for name in ("gate_up", "down"):
            found[f"layers.{i}.{name}"] = getattr(block.mlp, name)
    return {
        name: weight.dequantize() if isinstance(weight, gk.QuantizedWeight) else weight.float()
        for name, weight in found.items()
    }


def by_our_names(weights):
    ours = {"lm_head": weights.get("lm_head", weights.get("transformer.output_layer"))}
    for i in range(2):
        remote = f"transformer.encoder.layers.{i}."
        own = f"model.layers.{i}."
        if own + "mlp.down_proj" in weights:
            qkv = torch.cat([weights[f"{own}self_attn.{x}_proj"] for x in "qkv"])
            rest = [
                own + name for name in ("self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
            ]
        else:
            qkv = weights[remote + "self_attention.query_key_value"]
            names = ("self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
            rest = [remote + name for name in names]
        tensors = (qkv, *(weights[name] for name in rest))
        ours |= {f"layers.{i}.{x}": t for x, t in zip(OURS, tensors, strict=True)}
    return ours


def check_read(folder, weights):
    """The quantised layers of `folder` are these weights, bit for bit; returns the model."""
    model = glm4.load(folder, "cpu", dtype="float32", activations="float")
    read, expected = read_weights(model), by_our_names(weights)
    assert read.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(read[name], weight.float()), name
    return model


def scattered(k, group_size):
    """The group of each column when groups are dealt out in a random order, as act-order does."""
    group = np.empty(k, np.int64)
    group[np.random.default_rng(k).permutation(k)] = np.arange(k) // group_size
    return group


def act_order(pack, group_size=64, **sizes):
    def make(module, n, k, generator):
        if module.rpartition(".")[2] in HEADS:
            return None
        group = scattered(k, group_size)
        matrix = Matrix(generator, n, k, group_size=group_size, group=group, **sizes)
        return matrix, pack(matrix)

    return make


def ct(*args, targets=("Linear",), ignore=HEADS, **fields):
    return config_groups((list(targets), weights_args(*args, **fields)), ignore=list(ignore))


READABLE = {
    "ct int4 g128": (ct(4, 128), maker(pack_quantized)),
    "ct int4 g32 bf16 scales": (
        ct(4, 32),
        maker(pack_quantized, group_size=32, scale_dtype=torch.bfloat16),
    ),
    "ct int4 channel": (ct(4, None), maker(pack_quantized, group_size=None)),
    "ct int4 g64 asymmetric": (
        ct(4, 64, False),
        maker(pack_quantized, group_size=64, symmetric=False, lowest_zero=0),
    ),
    "ct int4 asymmetric, zero points of 0.9": (
        ct(4, 128, False),
        maker(lambda m: pack_quantized(m, int8_zeros=True), symmetric=False, lowest_zero=0),
    ),
    "ct int8 g128": (ct(8, 128), maker(pack_quantized, bits=8)),
    "ct int8 channel asymmetric, head too": (
        ct(8, None, False, ignore=()),
        maker(pack_quantized, heads=True, bits=8, group_size=None, symmetric=False, lowest_zero=0),
    ),
    "ct int8 g128, int8 zero points": (
        ct(8, 128, False),
        maker(lambda m: pack_quantized(m, int8_zeros=True), bits=8, symmetric=False, lowest_zero=0),
    ),
    "ct groups of 192 become 64": (ct(4, 192), maker(pack_quantized, group_size=192)),
    "ct groups of 256 become 128": (ct(4, 256), maker(pack_quantized, group_size=256)),
    "ct act-order": (
        ct(4, 64, actorder="group"),
        act_order(lambda m: pack_quantized(m, g_idx=True)),
    ),
    "ct act-order unused": (
        ct(4, 128),
        maker(lambda m: pack_quantized(m) | {"weight_g_idx": torch.full((m.k,), -1).int()}),
    ),
    "gptq v1": (gptq_config(), maker(gptq)),
    "gptq v1 without g_idx": (gptq_config(), maker(lambda m: gptq(m, g_idx=False))),
    "gptq v1 asymmetric": (gptq_config(sym=False), maker(gptq, symmetric=False)),
    "gptq v1 asymmetric with zeros, by gptqmodel": (
        gptq_config(sym=False, meta={"quantizer": ["gptqmodel:4.2.5"]}),
        maker(gptq_by_gptqmodel, symmetric=False, lowest_zero=0),
    ),
    "gptq v1 int8 with zeros, by gptqmodel": (
        gptq_config(8, sym=False, meta={"quantizer": "gptqmodel:1.0"}),
        maker(gptq_by_gptqmodel, bits=8, symmetric=False, lowest_zero=0),
    ),
    "gptq v2 asymmetric with zeros": (
        gptq_config(sym=False, checkpoint_format="gptq_v2"),
        maker(lambda m: gptq(m, version=2), symmetric=False, lowest_zero=0),
    ),
    "gptq int8 per channel": (gptq_config(8, None), maker(gptq, bits=8, group_size=None)),
    "gptq act-order": (gptq_config(group_size=64, desc_act=True), act_order(gptq)),
    "gptq int8 act-order, asymmetric": (
        gptq_config(8, 128, sym=False, desc_act=True),
        act_order(gptq, group_size=128, bits=8, symmetric=False),
    ),
    "gptq, a last group that is shorter": (
        gptq_config(group_size=160, sym=False),
        maker(gptq, group_size=160, symmetric=False),
    ),
    "awq": (awq_config(), maker(awq, symmetric=False, lowest_zero=0)),
    "auto-round as gptq": (auto_round_config(), maker(lambda m: gptq(m, g_idx=False))),
    "auto-round as gptq, int8 asymmetric": (
        auto_round_config(bits=8, group_size=-1, sym=False),
        maker(lambda m: gptq(m, g_idx=False), bits=8, group_size=None, symmetric=False),
    ),
    "auto-round, zero points as they are": (
        auto_round_config("auto_round", sym=False),
        maker(lambda m: gptq(m, version=2, g_idx=False), symmetric=False, lowest_zero=0),
    ),
    "auto-round as awq": (
        auto_round_config("auto_round:auto_awq", sym=False),
        maker(awq, symmetric=False, lowest_zero=0),
    ),
    "awq g32": (
        awq_config(group_size=32, version="gemm"),
        maker(awq, group_size=32, symmetric=False, lowest_zero=0),
    ),
}


@pytest.mark.parametrize("case", READABLE.values(), ids=READABLE)
def test_reads(case, sources, tmp_path, recwarn):
    config, make = case
    weights = write_quantized(tmp_path, sources / "transformers", config, make)
    check_read(tmp_path, weights)
    assert not [w for w in recwarn if "zero points" in str(w.message)]


@pytest.mark.parametrize("name", ["ct int4 g64 asymmetric", "gptq act-order", "awq"])
def test_reads_names_of_the_remote_code(name, sources, tmp_path):
    config, make = READABLE[name]
    check_read(tmp_path, write_quantized(tmp_path, sources / "chatglm", config, make))


def test_logits_are_those_of_the_weights(sources, tmp_path):
    """Through the model, act-order included, against the same weights as floats."""
    config, make = READABLE["gptq act-order"]
    weights = write_quantized(tmp_path / "quantised", sources / "transformers", config, make)
    floats = shutil.copytree(sources / "transformers", tmp_path / "floats")
    tensors = load_file(floats / "model.safetensors")
    tensors |= {f"{module}.weight": weight for module, weight in weights.items()}
    save_file(tensors, floats / "model.safetensors")
    truth = glm4.load(floats, "cpu").logits(TOKENS)
    logits = glm4.load(tmp_path / "quantised", "cpu", activations="float").logits(TOKENS)
    assert (logits - truth).norm() < 1e-5 * truth.norm()


def mixed(schemes, pack):
    """Makes each kind of layer by its own sizes; a kind that is not there stays as it is."""

    def make(module, n, k, generator):
        kind = module.rpartition(".")[2]
        if kind not in schemes:
            return None
        matrix = Matrix(generator, n, k, **schemes[kind])
        return matrix, pack(matrix)

    return make


def test_groups_of_a_config(sources, tmp_path):
    """Names before expressions before the class; what is joined takes the finest form of all."""
    kinds = {
        "q_proj": {"group_size": None, "bits": 4},
        "k_proj": {"group_size": 32, "bits": 8, "symmetric": False},
        "v_proj": {"group_size": 64, "bits": 4, "scale_dtype": torch.float32},
        "down_proj": {"group_size": 32},
        "lm_head": {"group_size": None, "bits": 8},
    }
    config = config_groups(
        (["Linear"], weights_args(4, 32)),
        (["re:.*k_proj", "re:.*nothing"], weights_args(8, 32, False)),
        (["re:.*_proj"], weights_args(4, 64)),
        (["re:.*down"], weights_args(4, 32)),
        (["lm_head"], weights_args(8, None)),
        ([f"model.layers.{i}.self_attn.q_proj" for i in range(2)], weights_args(4, None)),
        ignore=["re:.*o_proj", "model.layers.0.mlp.gate_up_proj"],
    )
    # Expressions are tried in the order of their text: of "down", "k_proj" and "_proj", the last
    # comes first and would fit all three.
    groups = config["quantization_config"]["config_groups"]
    groups["group_2"]["targets"] = ["re:.*v_proj"]
    weights = write_quantized(
        tmp_path, sources / "transformers", config, mixed(kinds, pack_quantized)
    )
    qkv = check_read(tmp_path, weights).blocks[0].attention.qkv
    assert (qkv.bits, qkv.group_size) == (8, 32) and qkv.scale.dtype == torch.float32
    assert glm4.load(tmp_path, "cpu").blocks[0].mlp.down.group_size == 32


def test_dynamic_rules_of_gptqmodel(sources, tmp_path):
    kinds = {
        "o_proj": {"bits": 8, "group_size": 32},
        "down_proj": {"bits": 8, "group_size": 128},
        "gate_up_proj": {"bits": 4, "group_size": 64},
    }
    dynamic = {
        "-:.*q_proj": {},
        "+:.*o_proj": {"bits": 8, "group_size": 32},
        ".*down_proj": {"bits": 8, "group_size": 128},
    }
    config = gptq_config(group_size=64, dynamic=dynamic)
    weights = write_quantized(tmp_path, sources / "transformers", config, mixed(kinds, gptq))
    check_read(tmp_path, weights)


@pytest.mark.parametrize("config", ["ct", "dynamic"])
def test_patterns_that_backtrack_do_not_hang(config, sources, tmp_path):
    hangs = r"(([a-z0-9_.]+)+)+!"
    rules = {
        "ct": ct(4, 128, ignore=[f"re:{hangs}", *HEADS]),
        "dynamic": gptq_config(dynamic={f"-:{hangs}": {}}),
    }
    make = maker(pack_quantized if config == "ct" else gptq)
    write_quantized(tmp_path, sources / "transformers", rules[config], make)
    start = time.process_time()
    glm4.load(tmp_path, "cpu")
    assert time.process_time() - start < 5


def test_extra_config_of_auto_round(sources, tmp_path):
    """By name, or by an expression that is found in the name."""
    kinds = {
        "o_proj": {"bits": 8, "group_size": 32},
        "down_proj": {"bits": 8, "group_size": 128},
        "gate_up_proj": {"bits": 4, "group_size": 64},
    }
    extra = {f"model.layers.{i}.self_attn.o_proj": {"bits": 8, "group_size": 32} for i in range(2)}
    extra |= {"down.*": {"bits": 8, "group_size": 128}, "lm_head": {"bits": 16}}
    config = auto_round_config(group_size=64, extra_config=extra)
    make = mixed(kinds, lambda m: gptq(m, g_idx=False))
    check_read(tmp_path, write_quantized(tmp_path, sources / "transformers", config, make))


@pytest.mark.parametrize(
    ("file", "given", "pack"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "sym": False}, gptq),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, awq),
    ],
)
def test_older_tools_described_themselves_in_a_file(file, given, pack, sources, tmp_path):
    make = maker(pack, symmetric=False)
    file_name = "gptq_model-4bit-128g.safetensors"
    weights = write_quantized(tmp_path, sources / "transformers", {}, make, file=file_name)
    write_json(tmp_path / file, given)
    check_read(tmp_path, weights)


def test_biases_of_autogptq(sources, tmp_path):
    bias = "model.layers.1.mlp.down_proj.bias"
    config, make = READABLE["gptq v1"]
    zeros = {bias: torch.zeros(256, dtype=torch.half)}
    check_read(tmp_path, write_quantized(tmp_path, sources / "transformers", config, make, zeros))
    ones = {bias: torch.ones(256, dtype=torch.half)}
    write_quantized(tmp_path, sources / "transformers", config, make, ones)
    assert f"model.safetensors: tensor {bias} [256] is unexpected" in refusal(tmp_path)


def test_zero_points_that_overflowed_warn(sources, tmp_path):
    """What AutoGPTQ wrote beside a zero is lost; the zero and what lies below it are not."""
    made = []

    def make(module, n, k, generator):
        if not module.endswith("1.mlp.down_proj"):
            return None
        made.append(Matrix(generator, n, k, symmetric=False, zero_row=3))  # of eight to a word
        return made[0], gptq_by_autogptq(made[0])

    write_quantized(tmp_path, sources / "transformers", gptq_config(sym=False), make)
    with pytest.warns(UserWarning, match=r"model\.safetensors: some zero points are 0") as caught:
        model = glm4.load(tmp_path, "cpu", dtype="float32")
    assert len(caught) == 1
    right = (model.blocks[1].mlp.down.dequantize() == made[0].weight).all(1)
    assert right[:4].all() and not right[4:8].any() and right[8:].all()


def test_float16_of_the_tools_becomes_bfloat16_where_it_overflows(sources, tmp_path, monkeypatch):
    config, make = READABLE["gptq v1"]
    write_quantized(tmp_path, sources / "transformers", config | {"dtype": "float16"}, make)
    assert glm4.load(tmp_path, "cpu").dtype == torch.float16
    monkeypatch.setattr(glm4.model, "FP16_OVERFLOWS_FROM_HIDDEN", 256)
    model = glm4.load(tmp_path, "cpu")
    assert model.dtype == torch.bfloat16
    assert model.blocks[0].mlp.down.scale.dtype == torch.float16  # as they were stored
    with pytest.raises(ValueError, match="float16: the activations"):
        glm4.load(tmp_path, "cpu", dtype="float16")


def test_quantize_applies_to_what_is_not_quantised(sources, tmp_path):
    config, make = READABLE["gptq v1"]
    weights = write_quantized(tmp_path, sources / "transformers", config, make)
    model = glm4.load(tmp_path, "cpu", quantize="int8")
    assert model.lm_head.bits == 8 and model.blocks[0].mlp.down.bits == 4
    expected = gk.quantize(weights["lm_head"], 8, None).dequantize()
    assert (model.lm_head.dequantize() - expected).abs().max() <= 0.1 * expected.abs().max()


def refusal(folder, **options) -> str:
    """The message with which `folder` is refused; one line."""
    with pytest.raises(glm4.CheckpointError) as refused:
        glm4.load(folder, "cpu", **options)
    message = str(refused.value)
    assert "\n" not in message and message.startswith(str(folder))
    return message


# Each damages one tensor of layer 1's down_proj, K 384, N 256, groups of 128.
DOWN = "model.layers.1.mlp.down_proj."
CT, GPTQ, AWQ = "ct int4 g64 asymmetric", "gptq act-order", "awq"
DAMAGE = [
    (CT, "weight_packed", None, r"listing: tensor \S+down_proj.weight \[256, 384\] is missing"),
    (CT, "weight_scale", None, r"weight_scale \[256, 6\] is missing"),
    (CT, "weight_shape", None, r"weight_shape \[2\] is missing"),
    (CT, "weight_zero_point", None, r"weight_zero_point \[32, 6\] is missing"),
    (
        CT,
        "weight_packed",
        lambda t: t[:, :-1],
        r"weight_packed must be \[256, 48\] \(.*got \[256, 47\]",
    ),
    (CT, "weight_packed", lambda t: t.T, r"weight_packed must be \[256, 48\] .* got \[48, 256\]"),
    (CT, "weight_packed", lambda t: t.float(), r"weight_packed must be I32, got F32"),
    (CT, "weight_packed", lambda t: t.view(torch.uint8), r"weight_packed must be \[256, 48\]"),
    (
        CT,
        "weight_scale",
        lambda t: t[:, :3],
        r"weight_scale must be \[256, 6\] .*64.* got \[256, 3\]",
    ),
    (CT, "weight_scale", lambda t: t.int(), r"weight_scale must be F32 or BF16 or F16, got I32"),
    (CT, "weight_scale", lambda t: t * torch.nan, r"weight_scale must be finite, got NaN"),
    (CT, "weight_scale", lambda t: t / 0, r"weight_scale must be finite"),
    (
        CT,
        "weight_shape",
        lambda t: t.flip(0),
        r"weight_shape must be \[256, 384\], got \[384, 256\]",
    ),
    (CT, "weight_shape", lambda t: t[:1], r"weight_shape must be \[2\] .* got \[1\]"),
    (CT, "weight_zero_point", lambda t: t.T, r"weight_zero_point must be \[32, 6\]"),
    (
        CT,
        "weight_zero_point",
        lambda t: torch.full((256, 6), 8, dtype=torch.int8),
        r"weight_zero_point must be from -8 to 7, got 8 to 8",
    ),
    (CT, "weight", lambda t: torch.ones(256, 384), r"weight \[256, 384\] is unexpected"),
    (GPTQ, "qweight", lambda t: t.T, r"qweight must be \[48, 256\] \(gptq, 4 bits, groups of 64"),
    (GPTQ, "qzeros", None, r"qzeros \[6, 32\] is missing"),
    (GPTQ, "qzeros", lambda t: t[:3], r"qzeros must be \[6, 32\] .* got \[3, 32\]"),
    (GPTQ, "qzeros", lambda t: t + 1, r"qzeros must be 8 throughout, as sym is true, got 9"),
    (GPTQ, "scales", lambda t: t.T, r"scales must be \[6, 256\]"),
    (GPTQ, "g_idx", None, r"g_idx \[384\] is missing"),
    (GPTQ, "g_idx", lambda t: t - 1, r"g_idx must be from 0 to 5, got -1 to 4"),
    (GPTQ, "g_idx", lambda t: t + 1, r"g_idx must be from 0 to 5, got 1 to 6"),
    (GPTQ, "g_idx", lambda t: t[:256], r"g_idx must be \[384\]"),
    (GPTQ, "g_idx", lambda t: t.long(), r"g_idx must be I32, got I64"),
    (
        GPTQ,
        "g_idx",
        lambda t: torch.where(torch.arange(384) == 7, (t + 1) % 6, t),
        r"g_idx must be in groups of 32, 64, 128 or their multiples, got groups of 63, 64, 65",
    ),
    (AWQ, "qweight", lambda t: t.T, r"qweight must be \[384, 32\] \(awq"),
    (AWQ, "scales", lambda t: t.double(), r"scales must be F32 or BF16 or F16, got F64"),
]


@pytest.mark.parametrize(
    "name, part, damage, message", DAMAGE, ids=[f"{d[0]} {d[1]} {i}" for i, d in enumerate(DAMAGE)]
)
def test_rejects_tensors(name, part, damage, message, sources, tmp_path):
    config, make = READABLE[name]

    def damaged(module, *args):
        made = make(module, *args)
        if made is not None and f"{module}." == DOWN:
            if damage is None:
                del made[1][part]
            else:
                made[1][part] = damage(made[1].get(part))
        return made

    write_quantized(tmp_path, sources / "transformers", config, damaged)
    message = message.replace("listing:", r"model\.safetensors:")
    assert re.search(message, refusal(tmp_path)), refusal(tmp_path)
    assert f"model.safetensors: tensor {DOWN}" in refusal(tmp_path)


def test_rejects_orders_that_differ(sources, tmp_path):
    """q, k and v see one input, so one order serves the three, or else they are not joined."""

    def make(module, n, k, generator):
        if "self_attn" not in module:
            return None
        order = np.random.default_rng(len(module) if "v_proj" not in module else 0)
        group = np.empty(k, np.int64)
        group[order.permutation(k)] = np.arange(k) // 64
        matrix = Matrix(generator, n, k, group_size=64, group=group)
        return matrix, gptq(matrix)

    config = gptq_config(group_size=64, desc_act=True)
    write_quantized(tmp_path, sources / "transformers", config, make)
    message = refusal(tmp_path)
    assert re.search(r"act-order \(g_idx\) of \S+0\S+v_proj must be that of \S+q_proj", message)


def test_rejects_half_a_matrix(sources, tmp_path):
    def make(module, n, k, generator):
        if not module.endswith("1.self_attn.k_proj"):
            return None
        matrix = Matrix(generator, n, k)
        return matrix, gptq(matrix)

    write_quantized(tmp_path, sources / "transformers", gptq_config(), make)
    message = refusal(tmp_path)
    assert re.search(
        r"1\S+q_proj.weight, \S+, \S+v_proj.weight must be all quantised or none", message
    )


def test_rejects_rows_of_no_whole_block(tmp_path):
    sizes = {"hidden_size": 40, "intermediate_size": 96, "num_hidden_layers": 2}
    transformers_model("glm4", **sizes).save_pretrained(tmp_path / "source")
    make = maker(gptq, group_size=None)
    write_quantized(tmp_path / "a", tmp_path / "source", gptq_config(group_size=None), make)
    assert "must have a multiple of 32 columns, got 40" in refusal(tmp_path / "a")


def test_rejects_truncated_files(sources, tmp_path):
    config, make = READABLE["gptq v1"]
    write_quantized(tmp_path, sources / "transformers", config, make)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert f"{file}: not a whole safetensors file" in refusal(tmp_path)


CONFIGS = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method must be .*'bitsandb"),
    ({"quant_method": ["gptq"]}, r"quant_method must be .* got \['gptq'\]"),
    ([4], r"must be an object, got \[4\]"),
    (gptq_config(3), "bits must be 4 or 8, got 3"),
    (gptq_config("4"), "bits must be 4 or 8, got '4'"),
    (gptq_config(True), "bits must be 4 or 8, got True"),
    (gptq_config(group_size=0), "group_size must be a positive integer or -1, got 0"),
    (gptq_config(group_size="128"), "group_size must be a positive integer or -1, got '128'"),
    (gptq_config(sym="yes"), "sym must be True or False, got 'yes'"),
    (gptq_config(desc_act=2), "desc_act must be True or False, got 2"),
    (gptq_config(checkpoint_format="marlin"), "checkpoint_format must be .* got 'marlin'"),
    (gptq_config(is_marlin_format=True), "is_marlin_format must be False, got True"),
    (gptq_config(pack_dtype="int16"), "pack_dtype must be 'int32', got 'int16'"),
    (gptq_config(rotation="hadamard"), "rotation must be .* got 'hadamard'"),
    (gptq_config(dynamic=[1]), "dynamic must be an object"),
    (gptq_config(dynamic={".*q": 8}), r"dynamic\.\.\*q must be an object, got 8"),
    (gptq_config(dynamic={"(": {"bits": 8}}), r"pattern 're:\(' must be a regular expression"),
    (gptq_config(dynamic={r"-:(a)\1": {}}), "expression, as far as they are read here .references"),
    (gptq_config(dynamic={"-:a{99999999999}": {}}), "expression, .*more than 1000 parts"),
    (
        gptq_config(dynamic={"-:" + "(" * 9999: {}}),
        r"'re:\(+\.\.\.\(+' must be a regular .*50 groups",
    ),
    (ct(4, 128, targets=["re:(?<=x)y"]), r"pattern 're:\(\?<=x\)y' must be a regular expression"),
    (ct(4, 128, ignore=["re:(?i)head"]), r"pattern 're:\(\?i\)head' must be a regular expression"),
    (
        gptq_config(dynamic={f"-:{i}(a{{900}})": {} for i in range(6)}),
        "its regular expressions must have at most 5000 parts together",
    ),
    (gptq_config(dynamic={".*q": {"bits": 2}}), r"dynamic\.\.\*q: bits must be 4 or 8, got 2"),
    (auto_round_config(None), "packing_format must be 'auto_round:auto_gptq' or .* got None"),
    (auto_round_config("auto_round:llm_compressor"), "got 'auto_round:llm_compressor'"),
    (auto_round_config(data_type="mx_fp"), "data_type must be 'int', got 'mx_fp'"),
    (auto_round_config(act_bits=8), "act_bits must be None or 16 or 32, got 8"),
    (auto_round_config(bits=2), "bits must be 4 or 8, got 2"),
    (auto_round_config(extra_config=[1]), "extra_config must be an object"),
    (auto_round_config(extra_config={"o": {"bits": 3}}), "extra_config.o: bits must be 4 or 8"),
    (auto_round_config(extra_config={"(": {"bits": 8}}), "must be a regular expression"),
    (awq_config(version="gemv"), "version must be 'gemm', got 'gemv'"),
    (awq_config(version=None), "version must be 'gemm', got 'none'"),
    (awq_config(bits=8), "bits must be 4, got 8"),
    (ct(4, 128, num_bits=2), r"config_groups\.group_0\.weights\.num_bits must be 4 or 8, got 2"),
    (ct(4, 128, type="float"), "type must be 'int', got 'float'"),
    (ct(4, 128, strategy="block"), "strategy must be 'group' or 'channel', got 'block'"),
    (ct(4, 128, strategy="tensor"), "strategy must be .* got 'tensor'"),
    (ct(4, -1), "group_size must be a positive integer, got -1"),
    (ct(4, 128, actorder="sideways"), "actorder must be .* got 'sideways'"),
    (config_groups(), "config_groups must be an object of groups"),
    (config_groups((None, {})), "targets must be a list of modules, got None"),
    (config_groups((["Linear"], weights_args()), format="float-quantized"), "'float-quantized'"),
    (config_groups((["Linear"], weights_args()), ignore="lm_head"), "ignore must be a list"),
    (
        config_groups((["Linear"], weights_args()), transform_config={"config_groups": {"R1": {}}}),
        "transform_config must be empty",
    ),
    (
        config_groups((["Linear"], weights_args()), sparsity_config={"format": "sparse-24"}),
        "sparsity_config must be empty",
    ),
]


@pytest.mark.parametrize("config, message", CONFIGS, ids=[m for _, m in CONFIGS])
def test_rejects_config(config, message, sources, tmp_path):
    if not isinstance(config, dict) or "quantization_config" not in config:
        config = {"quantization_config": config}
    write_quantized(tmp_path, sources / "transformers", config, READABLE["gptq v1"][1])
    assert re.search(f"/config.json: .*{message}", refusal(tmp_path)), refusal(tmp_path)


def test_rejects_what_the_config_does_not_describe(sources, tmp_path):
    config = ct(4, 128, targets=["re:.*self_attn.*"])
    write_quantized(tmp_path, sources / "transformers", config, READABLE["ct int4 g128"][1])
    message = refusal(tmp_path)
    assert re.search(r"tensor \S+gate_up_proj.weight_packed is unexpected: config.json", message)
    write_quantized(tmp_path, sources / "transformers", gptq_config(), maker(pack_quantized))
    assert re.search(r"tensor \S+q_proj.qweight \S+ \S+ is missing", refusal(tmp_path))
    write_quantized(tmp_path, sources / "transformers", {}, maker(gptq))
    assert re.search(r"q_proj.weight \[256, 256\] is missing", refusal(tmp_path))


def test_rejects_groups_of_16(sources, tmp_path):
    make = maker(awq, group_size=16, symmetric=False)
    write_quantized(tmp_path, sources / "transformers", awq_config(group_size=16), make)
    message = (
        r"q_proj.qweight must be in groups of 32, 64, 128 or their multiples, got groups of 16"
    )
    assert re.search(message, refusal(tmp_path))
