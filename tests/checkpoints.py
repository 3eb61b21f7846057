"""Small random checkpoints: saved by transformers, rewritten under the remote code's names, or
written tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "pad_token_id": 0,
    "eos_token_id": [1, 2],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
}


def transformers_model(model_type: str = "glm4", seed: int = 0, **sizes: Any) -> Any:
    """A GlmForCausalLM or Glm4ForCausalLM with every parameter random, norms and biases too, of
    such sizes that greedy text does not fall into a loop."""
    import transformers

    name = {"glm": "Glm", "glm4": "Glm4"}[model_type]
    config = getattr(transformers, f"{name}Config")(**(SIZES | sizes))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5, generator=generator)
        elif "embed" in name:
            parameter.normal_(generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.5, generator=generator)
        else:
            parameter.normal_(0.0, 3.0 * parameter.shape[1] ** -0.5, generator=generator)
    return model


def rewrite_as_chatglm(source: Path, target: Path) -> None:
    """The same weights as the remote code of `chatglm` names them, with its config.json."""
    config = json.loads((source / "config.json").read_text())
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            qkv = [load_tensor(source, name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
            tensor = torch.cat(qkv)
        for theirs, ours in (
            ("model.embed_tokens", "transformer.embedding.word_embeddings"),
            ("model.norm", "transformer.encoder.final_layernorm"),
            ("model.layers", "transformer.encoder.layers"),
            ("lm_head", "transformer.output_layer"),
            ("self_attn.q_proj", "self_attention.query_key_value"),
            ("self_attn.o_proj", "self_attention.dense"),
            ("gate_up_proj", "dense_h_to_4h"),
            ("down_proj", "dense_4h_to_h"),
        ):
            name = name.replace(theirs, ours)
        tensors[name] = tensor
    tensors["transformer.rotary_pos_emb.inv_freq"] = torch.ones(16, dtype=torch.bfloat16)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    write_json(
        target / "config.json",
        {
            "model_type": "chatglm",
            "num_layers": config["num_hidden_layers"],
            "hidden_size": config["hidden_size"],
            "ffn_hidden_size": config["intermediate_size"],
            "num_attention_heads": config["num_attention_heads"],
            "multi_query_attention": True,
            "multi_query_group_num": config["num_key_value_heads"],
            "kv_channels": config["head_dim"],
            "padded_vocab_size": config["vocab_size"],
            "layernorm_epsilon": config["rms_norm_eps"],
            "seq_length": config["max_position_embeddings"],
            "rope_ratio": config["rope_parameters"]["rope_theta"] / 10000,
            "add_qkv_bias": config["attention_bias"],
            "add_bias_linear": False,
            "original_rope": True,
            "rmsnorm": True,
            "eos_token_id": config["eos_token_id"],
            "tie_word_embeddings": False,
            "torch_dtype": config["dtype"],
        },
    )


def load_tensor(folder: Path, name: str) -> Tensor:
    return load_file(folder / "model.safetensors")[name]


def write_checkpoint(
    folder: Path,
    changes: dict[str, Any] | None = None,
    tensors: dict[str, Tensor | None] | None = None,
    dtype: torch.dtype = torch.float32,
    model_type: str = "glm4",
) -> Path:
    """A checkpoint of `SIZES`, written without transformers.

    Args:
        changes: to config.json; None removes the entry.
        tensors: put in place of, or beside, those that the config asks for; None removes one.
    """
    config = {"model_type": model_type, "dtype": str(dtype).removeprefix("torch."), **SIZES}
    config = {k: v for k, v in (config | (changes or {})).items() if v is not None}
    hidden, ffn, dim = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["head_dim"]
    q_rows, kv_rows = (SIZES[f"num_{x}_heads"] * dim for x in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (SIZES["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (SIZES["vocab_size"], hidden),
    }
    for i in range(SIZES["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for part, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            shapes[f"{layer}self_attn.{part}_proj.weight"] = (rows, hidden)
            shapes[f"{layer}self_attn.{part}_proj.bias"] = (rows,)
        shapes |= {
            layer + "self_attn.o_proj.weight": (hidden, q_rows),
            layer + "mlp.gate_up_proj.weight": (2 * ffn, hidden),
            layer + "mlp.down_proj.weight": (hidden, ffn),
            layer + "input_layernorm.weight": (hidden,),
            layer + "post_attention_layernorm.weight": (hidden,),
        }
        if model_type == "glm4":
            shapes[layer + "post_self_attn_layernorm.weight"] = (hidden,)
            shapes[layer + "post_mlp_layernorm.weight"] = (hidden,)
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor | None] = {
        name: (torch.randn(shape, generator=generator) * 0.2).to(dtype)
        for name, shape in shapes.items()
    }
    kept = {name: tensor for name, tensor in (made | (tensors or {})).items() if tensor is not None}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(kept, folder / "model.safetensors")
    write_json(folder / "config.json", config)
    return folder


def split_into_shards(folder: Path, n_shards: int = 3) -> dict[str, str]:
    """model.safetensors -> shards and their index; returns the weight map."""
    tensors = load_file(folder / "model.safetensors")
    files = [f"model-{i + 1:05}-of-{n_shards:05}.safetensors" for i in range(n_shards)]
    weight_map = {name: files[i % n_shards] for i, name in enumerate(sorted(tensors))}
    for file in files:
        shard = {name: tensors[name] for name, place in weight_map.items() if place == file}
        save_file(shard, folder / file)
    (folder / "model.safetensors").unlink()
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return weight_map


def write_tokenizer(folder: Path, adds_prefix: bool = True) -> Path:
    """A byte-level BPE tokenizer.json of fewer than `SIZES` ids, with GLM-4's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"],
    )
    tokenizer.train_from_iterator(["the beginning of the world, the word and the light"], trainer)
    if adds_prefix:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", 1), ("<sop>", 2)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
