"""Measure the demo model on books that neither it nor the n-gram baseline has seen.

    python -m benchmarks.demo.measure --corpus corpus --work work --demo demo

writes the held-out texts, `metrics.json`, and the tables and samples between the markers of
`demo/README.md`.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.demo.corpus import HELD_OUT, SPLITS, held_out_text, load_split

CONTEXT, STRIDE = 1024, 512
OPENING_CHARACTERS = 2000  # fit one window: a measurement that a test repeats in a second
TOP_P = 0.9
SAMPLES = [  # prompt, temperature
    ("In the beginning God created", 0.0),
    ("En el principio crió Dios", 0.0),
    ("Genesis 51\n", 0.8),
    ("Salmos, capítulo 151\n", 0.8),
    ("Emma, chapter 56\n", 0.8),
]


@torch.inference_mode()
def bits_per_byte(
    model: PreTrainedModel, tokenizer: Tokenizer, text: str, context: int, stride: int
) -> float:
    """-log2 P(text | [gMASK]<sop>) / bytes, by windows of `context` tokens advancing by `stride`.

    Every token of the text is scored once, given at least `context - stride` tokens where the text
    has them. The arithmetic is the model's; the logarithm is taken in float64.
    """
    ids = torch.tensor(tokenizer.encode(text).ids)
    scored = len(tokenizer.encode("").ids)
    nats = 0.0
    while scored < len(ids):
        end = min(len(ids), max(scored + stride, context + 1))
        window = ids[max(0, end - context - 1) : end]
        targets = window[scored - end :]
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0, scored - end :]
        nats += F.cross_entropy(logits.double(), targets, reduction="sum").item()
        scored = end
    return nats / math.log(2) / len(text.encode())


@torch.inference_mode()
def continuation(
    model: PreTrainedModel, tokenizer: Tokenizer, prompt: str, temperature: float
) -> str:
    torch.manual_seed(0)
    sampling = {"temperature": temperature, "top_p": TOP_P} if temperature else {}
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=bool(sampling),
        max_length=ids.shape[1] + (120 if sampling else 48),  # greedy text soon repeats itself
        **sampling,
    )
    return tokenizer.decode(written[0, ids.shape[1] :].tolist())


def report(metrics: dict) -> str:
    lines = [
        "| held-out text | bytes | model, bits/byte | n-gram, bits/byte | perplexity of a token |",
        "|---|---|---|---|---|",
    ]
    for name, row in metrics["heldout"].items():
        model, ngram = row["model_bits_per_byte"], row["ngram_bits_per_byte"]
        lines.append(
            f"| `{name}` ({row['language']}) | {row['bytes']:,} | **{model:.3f}** | {ngram:.3f} "
            f"| {row['token_perplexity']:.2f} |"
        )
    for sample in metrics["samples"]:
        warm = f"temperature {sample['temperature']}, top-p {TOP_P}"
        how = warm if sample["temperature"] else "greedy"
        lines += ["", f"{how}, prompt `{json.dumps(sample['prompt'], ensure_ascii=False)}`:", ""]
        written = (sample["prompt"] + sample["text"]).strip().splitlines()
        lines += [f"> {line}  " for line in written if line]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--corpus", type=Path, required=True, help="folder of benchmarks.demo.corpus"
    )
    parser.add_argument("--work", type=Path, required=True, help="has training.json and ngram.json")
    parser.add_argument("--demo", type=Path, required=True, help="folder of benchmarks.demo.train")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.demo, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(args.demo / "tokenizer.json"))
    splits = {split: load_split(args.corpus, split) for split in SPLITS}
    ngram = json.loads((args.work / "ngram.json").read_text("utf-8"))
    ngram_bits = ngram.pop("heldout_bits_per_byte")

    held_out = {}
    for name, (source, language, _) in HELD_OUT.items():
        text = held_out_text(name, splits["test"])
        (args.demo / name).write_text(text, "utf-8")
        n_bytes = len(text.encode())
        n_tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
        opening = text[:OPENING_CHARACTERS]
        bits = bits_per_byte(model, tokenizer, text, CONTEXT, STRIDE)
        held_out[name] = {
            "language": language,
            "books": sorted({book.title for book in splits["test"] if book.source == source}),
            "bytes": n_bytes,
            "tokens": n_tokens,
            "model_bits_per_byte": bits,
            "ngram_bits_per_byte": ngram_bits[name],
            "token_perplexity": 2 ** (bits * n_bytes / n_tokens),
            "opening_model_bits_per_byte": bits_per_byte(
                model, tokenizer, opening, CONTEXT, STRIDE
            ),
        }
    metrics = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": "bfloat16",
        "arithmetic": "float32",
        "context": CONTEXT,
        "stride": STRIDE,
        "opening_characters": OPENING_CHARACTERS,
        "heldout": held_out,
        "training": json.loads((args.work / "training.json").read_text("utf-8")),
        "ngram": ngram,
        "books": {split: sorted({book.title for book in splits[split]}) for split in SPLITS},
        "samples": [
            {"prompt": prompt, "temperature": t, "text": continuation(model, tokenizer, prompt, t)}
            for prompt, t in SAMPLES
        ],
    }
    listed = json.dumps(metrics, indent=1, ensure_ascii=False)
    (args.demo / "metrics.json").write_text(listed + "\n", "utf-8")

    readme = args.demo / "README.md"
    if readme.exists():
        before, start, rest = readme.read_text("utf-8").partition("<!-- measured -->\n")
        _, end, after = rest.partition("<!-- end -->")
        readme.write_text(f"{before}{start}{report(metrics)}\n{end}{after}", "utf-8")
    print(report(metrics))


if __name__ == "__main__":
    main()
