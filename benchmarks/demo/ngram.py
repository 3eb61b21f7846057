"""The demo model's opponent: an interpolated, modified Kneser-Ney n-gram model over bytes.

    P_n(w | h) = (c(hw) - D(c(hw))) / c(h.) + gamma(h) * P_{n-1}(w | h without its first byte)
    gamma(h)   = (D1 N1(h.) + D2 N2(h.) + D3 N3+(h.)) / c(h.)

c is the count of the n-gram at the highest order and, below it, the number of different bytes that
precede it (continuation count). Nk(h.) is how many bytes follow h with count k. With n_k the number
of n-grams of that order that have count k, Y = n_1 / (n_1 + 2 n_2), Dk = k - (k+1) Y n_{k+1} / n_k
(Chen and Goodman 1999, section 3). Below order 1 stands the uniform distribution over 256 bytes.
The order is the one that does best on the validation books.

    python -m benchmarks.demo.ngram --corpus corpus --out work/ngram.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.demo.corpus import HELD_OUT, held_out_text, load_split

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def ngram_hashes(data: np.ndarray, max_order: int) -> list[np.ndarray]:
    """hashes[n][i] identifies the n bytes data[i : i + n]; n from 0.

    A 64-bit hash, so that any order fits one integer: among 2^24 different n-grams the chance of a
    collision is 2^-17.
    """
    hashes = [np.zeros(len(data) + 1, np.uint64)]
    letters = (data.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD1342543DE82EF95)
    for order in range(1, max_order + 1):
        n = len(data) - order + 1
        mixed = (hashes[-1][:n] ^ (hashes[-1][:n] >> np.uint64(29))) * MULTIPLIER
        hashes.append(mixed + letters[order - 1 :])
    return hashes


@dataclass
class Level:
    """One order: the counts of its n-grams and, per context, what smoothing needs."""

    ngrams: np.ndarray  # sorted hashes
    counts: np.ndarray
    discounts: np.ndarray  # [4]: 0, D1, D2, D3+
    contexts: np.ndarray  # sorted hashes
    totals: np.ndarray  # c(h.)
    left_over: np.ndarray  # gamma(h) * c(h.)


def look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def make_level(ngrams: np.ndarray, counts: np.ndarray, context_of: np.ndarray) -> Level:
    n = [np.count_nonzero(counts == k) for k in range(5)]
    y = n[1] / max(1, n[1] + 2 * n[2])
    discounts = np.array(
        [0.0] + [k - (k + 1) * y * n[k + 1] / max(1, n[k]) for k in (1, 2, 3)]
    ).clip(0)
    contexts, inverse = np.unique(context_of, return_inverse=True)
    totals = np.bincount(inverse, weights=counts)
    left_over = np.bincount(inverse, weights=discounts[np.minimum(counts, 3)])
    return Level(ngrams, counts, discounts, contexts, totals, left_over)


def train_levels(data: np.ndarray, max_order: int) -> tuple[list[Level], list[Level]]:
    """(continuation, highest): a model of order n is `[*continuation[: n - 1], highest[n - 1]]`."""
    hashes = ngram_hashes(data, max_order + 1)
    highest, continuation = [], []
    for order in range(1, max_order + 1):
        ngrams, first, counts = np.unique(hashes[order], return_index=True, return_counts=True)
        highest.append(make_level(ngrams, counts, hashes[order - 1][first]))
        _, longer = np.unique(
            hashes[order + 1], return_index=True
        )  # each (order+1)-gram once: its last bytes
        ngrams, again, counts = np.unique(
            hashes[order][longer + 1], return_index=True, return_counts=True
        )
        continuation.append(make_level(ngrams, counts, hashes[order - 1][longer[again] + 1]))
    return continuation, highest


def byte_probabilities(levels: list[Level], text: np.ndarray) -> np.ndarray:
    """P(text[i] | the bytes before it); `levels` are a model's, from order 1 up."""
    hashes = ngram_hashes(text, len(levels))
    probability = np.full(len(text), 1 / 256)
    for order, level in enumerate(levels, 1):
        n = len(text) - order + 1
        total = look_up(level.contexts, level.totals, hashes[order - 1][:n])
        left_over = look_up(level.contexts, level.left_over, hashes[order - 1][:n])
        count = look_up(level.ngrams, level.counts, hashes[order])
        seen = total > 0
        kept = count - level.discounts[np.minimum(count, 3)]
        shorter = probability[order - 1 :]
        mixed = (kept + left_over * shorter) / np.maximum(total, 1)
        probability[order - 1 :] = np.where(seen, mixed, shorter)
    return probability


def bits_per_byte(levels: list[Level], text: str) -> float:
    return float(
        -np.log2(byte_probabilities(levels, np.frombuffer(text.encode(), np.uint8))).mean()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--corpus", type=Path, required=True, help="folder of benchmarks.demo.corpus"
    )
    parser.add_argument("--max-order", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    training = "\n".join(book.text for book in load_split(args.corpus, "train")).encode()
    texts: dict[str, str] = {}
    for book in load_split(args.corpus, "validation"):
        texts[book.source] = texts.get(book.source, "") + book.text

    continuation, highest = train_levels(np.frombuffer(training, np.uint8), args.max_order)
    models = {n: [*continuation[: n - 1], highest[n - 1]] for n in range(2, args.max_order + 1)}
    validation = {
        n: {source: bits_per_byte(levels, text) for source, text in texts.items()}
        for n, levels in models.items()
    }
    order = min(validation, key=lambda n: sum(validation[n].values()))
    books = load_split(args.corpus, "test")
    report = {
        "kind": "interpolated modified Kneser-Ney over bytes",
        "order": order,
        "training_bytes": len(training),
        "validation_bits_per_byte": validation,
        "heldout_bits_per_byte": {
            name: bits_per_byte(models[order], held_out_text(name, books)) for name in HELD_OUT
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
