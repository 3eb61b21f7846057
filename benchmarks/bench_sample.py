"""From logits to tokens at GLM-4's vocabulary: greedy, and drawn.

    torch eager, .compile   the usual composition: sort, softmax, running sum, search, in fp64;
                            torch 2.11 cannot compile the running sum of several rows, and says so
    FlashInfer              top-k and top-p by rejection, where it is installed; it draws numbers of
                            its own, so only where all samplers must agree

Logits are `predictable` (top-p keeps tens of tokens), `certain` (one has more than p), or `flat`,
where a third of the vocabulary stays. One other token than the oracle's is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, torch_peers
from benchmarks.libraries import library_peers
from benchmarks.shapes import SHAPES
from glm4_kernels.sample import sample, sample_reference

VOCAB = SHAPES["glm-4-9b"].vocab
DTYPE = torch.bfloat16  # so that equals are frequent
# temperature, top_k, top_p, penalty
OPTIONS: dict[str, tuple[Any, ...]] = {
    "greedy": (),
    "temperature": (0.8, None, 1.0, 1.0),
    "top-p": (0.8, None, 0.8, 1.0),
    "top-k, top-p": (0.8, 50, 0.95, 1.0),
    "penalty, top-k, top-p": (0.8, 50, 0.95, 1.1),
}


def cases(device: torch.device) -> Iterator[Case]:
    for batch in (1, 8, 64) if device.type == "cuda" else (1, 8):
        for label, options in OPTIONS.items():
            yield case(batch, f"{label}, predictable", options, device)
        for label in ("top-p", "top-k, top-p"):
            yield case(batch, f"{label}, certain", OPTIONS[label], device)
        yield case(batch, "top-p, flat", OPTIONS["top-p"], device)


def case(batch: int, label: str, options: tuple[Any, ...], device: torch.device) -> Case:
    penalised = bool(options) and options[-1] != 1.0

    def inputs() -> tuple:
        logits = torch.randn(batch, VOCAB, device=device)
        if "flat" not in label:
            logits *= 4
        if "certain" in label:
            logits[:, 1234] += 40
        uniform = torch.rand(batch, dtype=torch.float64, device=device) if options else None
        seen = torch.rand(batch, VOCAB, device=device) < 0.01 if penalised else None
        return logits.to(DTYPE), uniform, seen, *options

    return Case(
        op="sample",
        label=f"glm-4, {batch} rows, {label}",
        bytes_moved=batch * VOCAB * (DTYPE.itemsize + penalised),
        flops=0,
        inputs=inputs,
        contenders={
            "glm4_kernels": sample,
            **torch_peers(composition, device),
            **(library_peers("sample", device) if "certain" in label else {}),
        },
        oracle=sample_reference,
        tolerance=0.0,
    )


def composition(
    logits: Tensor,
    uniform: Tensor | None,
    seen: Tensor | None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    penalty: float = 1.0,
) -> Tensor:
    """As inference engines write it, but for a stable sort; NaN is not looked for."""
    scores = logits.float()
    if seen is not None:
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(seen, penalised, scores)
    if uniform is None:
        return scores.argmax(-1)
    if top_k is not None:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ascending, order = scores.sort(dim=-1, stable=True)
        dropped = (ascending.double() / temperature).softmax(-1).cumsum(-1) <= 1.0 - top_p
        dropped[:, -1].fill_(False)
        scores = scores.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)
    ends = (scores.double() / temperature).softmax(-1).cumsum(-1)
    chosen = torch.searchsorted(ends, uniform[:, None] * ends[:, -1:], right=True)[:, 0]
    if seen is not None:
        seen.scatter_(1, chosen[:, None], True)
    return chosen
