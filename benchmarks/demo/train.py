"""Train the demo model on the training books and export it as `save_pretrained` writes it.

    python -m benchmarks.demo.train --corpus corpus --tokenizer demo/tokenizer.json \\
        --work work --out demo

Runs on a CPU: bf16 autocast over fp32 weights, 4096 tokens a step, in windows of 512 and, while the
learning rate falls, of 1024. Matrices inside the blocks are updated by Muon, everything else by
AdamW. The learning rate warms up, stays, then falls linearly to zero over the last `--decay-steps`;
creating the file `WORK/cooldown` starts that fall at once. The exported weights are an exponential
moving average. Every `--save-every` steps `WORK/checkpoint.pt` gets the whole state and
`WORK/training.json` says how far the run came; the same command resumes, and the batches depend
only on the seed and the step.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import (
    AttentionInterface,
    GenerationConfig,
    Glm4Config,
    Glm4ForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.demo.corpus import Book, load_split
from benchmarks.demo.measure import bits_per_byte
from benchmarks.demo.tokenizer import STOP_TOKENS

CONTEXT = 1024
SHORT_CONTEXT = 512
TOKENS = 4096  # a step
GOLDEN_RATIO = (5**0.5 - 1) / 2
VALIDATION_CHARACTERS = 60_000  # of each source


def demo_config(tokenizer: Tokenizer) -> Glm4Config:
    stop_ids = [tokenizer.token_to_id(token) for token in STOP_TOKENS]
    return Glm4Config(
        vocab_size=math.ceil(tokenizer.get_vocab_size() / 64) * 64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        attention_bias=True,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        pad_token_id=stop_ids[0],
        eos_token_id=stop_ids,
        bos_token_id=None,
    )


def token_stream(
    books: list[Book], tokenizer: Tokenizer, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Documents in random order as one stream of ids, and where each starts.

    A document is `[gMASK]<sop>`, a run of consecutive chapters, `<|endoftext|>`; a chapter ends it
    with probability 1/2, so that the model meets both a stop after a chapter and the next chapter
    after a blank line.
    """
    rng = np.random.default_rng(seed)
    documents = []
    for book in books:
        run: list[str] = []
        for chapter in book.chapters:
            run.append(chapter)
            if rng.random() < 0.5 or chapter is book.chapters[-1]:
                documents.append("\n".join(run))
                run = []
    end = tokenizer.token_to_id("<|endoftext|>")
    encoded = [
        np.array([*encoding.ids, end], np.int16) for encoding in tokenizer.encode_batch(documents)
    ]
    encoded = [encoded[i] for i in rng.permutation(len(encoded))]
    starts = np.cumsum([0, *(len(ids) for ids in encoded[:-1])])
    return np.concatenate(encoded), starts


def batch(
    stream: np.ndarray, document_starts: np.ndarray, length: int, seed: int, step: int
) -> torch.Tensor:
    """[TOKENS / length, length + 1] ids; a quarter of the windows start where a document does.

    Starts follow multiples of the golden ratio modulo the stream, which cover it evenly at any
    moment; the snapping depends on the seed and the step alone.
    """
    rows = step * (TOKENS // length) + np.arange(TOKENS // length)
    starts = ((rows * GOLDEN_RATIO) % 1 * (len(stream) - 2 * length)).astype(np.int64)
    snap = np.random.default_rng([seed, step]).random(len(rows)) < 0.25
    before = np.searchsorted(document_starts, starts, side="right") - 1
    starts = np.where(snap, document_starts[before], starts)
    return torch.from_numpy(np.stack([stream[s : s + length + 1] for s in starts]).astype(np.int64))


def matmul_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Causal attention as two bf16 matmuls: at 512 tokens on a CPU, half the time of torch's flash.

    query [B, H, T, D]; key, value [B, G, T, D] -> ([B, T, H, D], None)
    """
    n_batch, n_heads, n_tokens, head_dim = query.shape
    n_groups = key.shape[1]
    grouped = (n_batch, n_groups, n_heads // n_groups * n_tokens)
    scores = torch.matmul(query.reshape(*grouped, head_dim) * scaling, key.transpose(-1, -2))
    future = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1)
    scores = scores.view(n_batch, n_groups, -1, n_tokens, n_tokens).masked_fill(future, -torch.inf)
    result = torch.matmul(scores.softmax(-1).view(*grouped, n_tokens), value)
    return result.view(query.shape).transpose(1, 2), None


def learning_rate_factor(step: int, warmup: int, decay_start: int, decay_steps: int) -> float:
    return min(1.0, (step + 1) / warmup, max(0.0, 1 - (step - decay_start) / decay_steps))


def make_optimizers(
    model: Glm4ForCausalLM, muon_lr: float, adam_lr: float
) -> list[torch.optim.Optimizer]:
    blocks = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    tables = [model.model.embed_tokens.weight, model.lm_head.weight]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [
        torch.optim.Muon(blocks, lr=muon_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": tables, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=adam_lr,
            betas=(0.9, 0.95),
            fused=True,
        ),
    ]


def export(
    state: dict[str, torch.Tensor], config: Glm4Config, tokenizer: Tokenizer, out: Path
) -> None:
    model = Glm4ForCausalLM(config)
    model.load_state_dict(state)
    model.generation_config = GenerationConfig(
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=True,
        temperature=0.8,
        top_p=0.8,
        max_length=CONTEXT,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, required=True, help="folder of benchmarks.demo.corpus"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder for the exported model")
    parser.add_argument("--steps", type=int, default=3287)
    parser.add_argument("--decay-steps", type=int, default=1100)
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--muon-lr", type=float, default=5e-3)
    parser.add_argument("--adam-lr", type=float, default=5e-3)
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    stream, document_starts = token_stream(load_split(args.corpus, "train"), tokenizer, args.seed)
    validation: dict[str, str] = {}
    for book in load_split(args.corpus, "validation"):
        validation[book.source] = (validation.get(book.source, "") + book.text)[
            :VALIDATION_CHARACTERS
        ]

    AttentionInterface.register("matmul", matmul_attention)
    config = demo_config(tokenizer)
    model = Glm4ForCausalLM(config)
    averaged = Glm4ForCausalLM(config).eval()
    averaged.load_state_dict(model.state_dict())
    optimizers = make_optimizers(model, args.muon_lr, args.adam_lr)
    step, decay_start, busy = 0, args.steps - args.decay_steps, 0.0
    checkpoint = args.work / "checkpoint.pt"
    args.work.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, decay_start, busy = state["step"], state["decay_start"], state["busy"]
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters:,} parameters, {len(stream):,} training tokens", flush=True)

    losses = []
    while step < decay_start + args.decay_steps:
        began = time.process_time()
        if step < decay_start and (args.work / "cooldown").exists():
            decay_start = step
        factor = learning_rate_factor(step, args.warmup, decay_start, args.decay_steps)
        for optimizer, lr in zip(optimizers, (args.muon_lr, args.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor

        length = SHORT_CONTEXT if step < decay_start else CONTEXT
        model.set_attn_implementation("matmul" if length == SHORT_CONTEXT else "sdpa")
        windows = batch(stream, document_starts, length, args.seed, step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            decay = min(args.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
        losses.append(loss.item())
        busy += time.process_time() - began
        step += 1

        if step % 25 == 0:
            print(
                f"step {step} loss {np.mean(losses):.4f} lr {factor:.3f} cpu {busy:.0f} s",
                flush=True,
            )
            losses.clear()
        if step % args.save_every == 0 or step == decay_start + args.decay_steps:
            with torch.no_grad():
                measured = {
                    name: bits_per_byte(averaged, tokenizer, text, CONTEXT, CONTEXT)
                    for name, text in validation.items()
                }
            report = {
                "step": step,
                "validation": float(np.mean(list(measured.values()))),
                **measured,
            }
            print(json.dumps(report), flush=True)
            with (args.work / "validation.jsonl").open("a") as log:
                log.write(json.dumps(report) + "\n")
            state = {
                "model": model.state_dict(),
                "averaged": averaged.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
                "decay_start": decay_start,
                "busy": busy,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            export(averaged.state_dict(), config, tokenizer, args.out)
            summary = {
                "steps": step,
                "decay_steps": max(0, step - decay_start),
                "tokens": step * TOKENS,
                "epochs": round(step * TOKENS / len(stream), 2),
                "cpu_seconds": round(busy),
                "validation_bits_per_byte": measured,
            }
            (args.work / "training.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
