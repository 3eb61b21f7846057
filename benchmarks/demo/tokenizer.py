"""The demo model's tokenizer: byte-level BPE with GLM-4's regex, special tokens and prefix.

    python -m benchmarks.demo.tokenizer --corpus corpus --out demo/tokenizer.json

It is trained on the training books alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from benchmarks.demo.corpus import load_split

GLM_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
]
STOP_TOKENS = ["<|endoftext|>", "<|user|>", "<|observation|>"]
VOCABULARY = 1510  # without the special tokens; the model pads the sum to a multiple of 64


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GLM_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    prefix = [(token, tokenizer.token_to_id(token)) for token in ("[gMASK]", "<sop>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", pair="[gMASK] <sop> $A $B:1", special_tokens=prefix
    )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, required=True, help="folder of benchmarks.demo.corpus"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    texts = [book.text for book in load_split(args.corpus, "train")]
    tokenizer = train_tokenizer(texts)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out))
    n_bytes = sum(len(text.encode()) for text in texts)
    n_tokens = sum(
        len(encoding) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)
    )
    print(
        f"{tokenizer.get_vocab_size()} tokens, {n_bytes / n_tokens:.3f} bytes a token in training"
    )


if __name__ == "__main__":
    main()
