"""The whole model against transformers, with every parameter random."""

from __future__ import annotations

import pytest
import torch
from checkpoints import rewrite_as_chatglm, transformers_model

import glm4

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = {
    "glm-4-9b-chat, group 16": ("glm", {"num_attention_heads": 32, "head_dim": 128}),
    "chat-1m, group 8": ("glm", {"num_attention_heads": 32, "num_key_value_heads": 4}),
    "glm-4-9b-0414, group 16": ("glm4", {"num_attention_heads": 32}),
    "glm-4-32b-0414 with yarn, group 24": (
        "glm4",
        {
            "num_attention_heads": 48,
            "head_dim": 128,
            "attention_bias": False,
            "rope_parameters": YARN,
        },
    ),
    "rumination, group 6": (
        "glm4",
        {"num_attention_heads": 48, "num_key_value_heads": 8, "attention_bias": False},
    ),
    "group 3 with yarn and bias": (
        "glm",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "rope_parameters": YARN},
    ),
    "tied": ("glm", {"tie_word_embeddings": True}),
}
# Of fp32 sums in another order, over two layers; on a CPU, where torch's kernels serve both, 0.
LOGITS_TOLERANCE = 2e-5
NEW_TOKENS = 64
PROMPT_LENGTHS = (70, 1, 33)  # over a page, the shortest, within a page


def prompts(vocab: int = 320) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, vocab, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Of all logits, in the Euclidean norm."""
    truth = truth.double().cpu()
    return ((actual.double().cpu() - truth).norm() / truth.norm()).item()


def greedy(theirs, prompt: list[int]) -> list[int]:
    tokens = torch.tensor([prompt])
    out = theirs.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_transformers(case, tmp_path, device):
    model_type, sizes = case
    theirs = transformers_model(model_type, **sizes)
    theirs.save_pretrained(tmp_path)
    ours = glm4.load(tmp_path, device)
    tokens = torch.randint(0, 320, (2, 130))
    assert relative_error(ours.logits(tokens), theirs(tokens).logits) < LOGITS_TOLERANCE

    expected = [greedy(theirs, prompt) for prompt in prompts()]
    assert len(set(expected[0])) >= 20, "this text is too monotonous to show a difference"
    assert ours.generate(prompts()[:1], NEW_TOKENS, stop_token_ids=[]) == expected[:1]
    assert ours.generate(prompts(), NEW_TOKENS, stop_token_ids=[]) == expected


@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_remote_code_names_give_equal_bits(model_type, tmp_path, device):
    rope = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    transformers_model(model_type, rope_parameters=rope).save_pretrained(tmp_path / "a")
    rewrite_as_chatglm(tmp_path / "a", tmp_path / "b")
    a, b = (glm4.load(tmp_path / name, device) for name in "ab")
    assert a.config == b.config and a.config.sandwich == (model_type == "glm4")
    tokens = torch.randint(0, 320, (2, 70))
    assert torch.equal(a.logits(tokens), b.logits(tokens))


def drop_bias(model):
    model.blocks[0].attention.qkv_bias = None


def swap_norms(model):
    block = model.blocks[0]
    block.mlp_norm, block.post_attention_norm = block.post_attention_norm, block.mlp_norm


def swap_last_norms(model):
    block = model.blocks[-1]
    block.post_mlp_norm, block.next_norm = block.next_norm, block.post_mlp_norm


def skip_sandwich(model):
    model.blocks[1].post_mlp_norm = None


def swap_gate_and_up(model):
    model.blocks[0].mlp.gate_up = model.blocks[0].mlp.gate_up.roll(96, 0)


def swap_kv_heads(model):
    q_rows, head_dim = 4 * 64, 64
    qkv = model.blocks[0].attention.qkv
    qkv[q_rows : q_rows + 2 * head_dim] = qkv[q_rows : q_rows + 2 * head_dim].roll(head_dim, 0)


def mix_frequencies(model):
    model.blocks[0].attention.rope = model.blocks[0].attention.rope.roll(1, 1)


MUTATIONS = [
    drop_bias,
    swap_norms,
    swap_last_norms,
    skip_sandwich,
    swap_gate_and_up,
    swap_kv_heads,
    mix_frequencies,
]


def test_mutations_go_red(tmp_path, device):
    theirs = transformers_model("glm4")
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(0, 320, (2, 40))
    truth = theirs(tokens).logits
    mutants = {"wrong theta": glm4.load(tmp_path, device, rope_theta=5e6)}
    for mutate in MUTATIONS:
        mutants[mutate.__name__] = model = glm4.load(tmp_path, device)
        mutate(model)
    for name, model in mutants.items():
        assert relative_error(model.logits(tokens), truth) > 100 * LOGITS_TOLERANCE, name
    assert relative_error(glm4.load(tmp_path, device).logits(tokens), truth) < LOGITS_TOLERANCE


@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_bf16_is_as_good_as_transformers(model_type, tmp_path, device):
    theirs = transformers_model(model_type, num_attention_heads=32).bfloat16()
    theirs.save_pretrained(tmp_path)
    ours = glm4.load(tmp_path, device)
    assert ours.dtype == torch.bfloat16
    tokens = torch.randint(0, 320, (4, 130))
    truth = transformers_model(model_type, num_attention_heads=32).bfloat16().double()(tokens)
    their_error = relative_error(theirs.to(device)(tokens.to(device)).logits, truth.logits)
    our_error = relative_error(ours.logits(tokens), truth.logits)
    # Both round at the same points, so over 166,400 logits the two errors are two samples of one
    # distribution; 1.1 is what their order of summation may make of it.
    assert their_error > 1e-3, "bf16 should show"
    assert our_error <= 1.1 * their_error


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_load_is_the_dequantised_model(quantize, tmp_path, device):
    theirs = transformers_model("glm4")
    theirs.save_pretrained(tmp_path)
    quantised, dequantised = (glm4.load(tmp_path, device, quantize=quantize) for _ in range(2))
    dequantised.lm_head = dequantised.lm_head.dequantize()
    for block in dequantised.blocks:
        for part, names in ((block.attention, ("qkv", "o")), (block.mlp, ("gate_up", "down"))):
            for name in names:
                weight = getattr(part, name)
                assert weight.bits == (8 if quantize == "int8" else 4)
                setattr(part, name, weight.dequantize())

    tokens = torch.randint(0, 320, (2, 70))
    truth = dequantised.logits(tokens)
    as_run = quantised.logits(tokens)
    quantised = glm4.load(tmp_path, device, quantize=quantize, activations="float")
    assert relative_error(quantised.logits(tokens), truth) < LOGITS_TOLERANCE
    # On a CPU activations are int8 too: about 1 % of error from each of nine matmuls in a row, and
    # random weights of this size amplify it (0.06 here); tests of the op bound it properly.
    assert relative_error(as_run, truth) < 0.1
