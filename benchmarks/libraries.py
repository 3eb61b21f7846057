"""The kernels of other libraries for our small ops, where a machine has both them and a GPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[..., Any]


def liger(op: str) -> Call:
    """`Liger-Kernel`, in the order of our arguments; it copies rows that are not contiguous."""
    module = importlib.import_module("liger_kernel.transformers.functional")

    def rms_norm(x, weight, eps):
        return module.liger_rms_norm(x, weight, eps, in_place=False)

    def add_rms_norm(x, residual, weight, eps):
        return module.liger_fused_add_rms_norm(x, residual, weight, eps, in_place=False)

    def sandwich_norm(x, residual, post_weight, pre_weight, eps):
        return add_rms_norm(rms_norm(x, post_weight, eps), residual, pre_weight, eps)

    def swiglu(gate_up):
        return module.liger_swiglu(*gate_up.chunk(2, dim=-1))

    return locals()[op]


def flashinfer(op: str) -> Call:
    """FlashInfer, with its own programmatic dependent launch; the fused norm works in place."""
    norm, activation, rotary, sampling = (
        importlib.import_module(f"flashinfer.{name}")
        for name in ("norm", "activation", "rope", "sampling")
    )

    def rms_norm(x, weight, eps):
        return norm.rmsnorm(x, weight, eps)

    def add_rms_norm(x, residual, weight, eps):
        norm.fused_add_rmsnorm(x, residual, weight, eps)
        return x, residual

    def sandwich_norm(x, residual, post_weight, pre_weight, eps):
        return add_rms_norm(rms_norm(x, post_weight, eps), residual, pre_weight, eps)

    def swiglu(gate_up):
        return activation.silu_and_mul(gate_up)

    def rope(q, k, positions, table):
        """The table in fp32, which is all it takes."""
        outputs = rotary.apply_rope_with_cos_sin_cache(
            positions, q.flatten(1), k.flatten(1), q.shape[2], table, is_neox=False
        )
        return [x.unflatten(1, (-1, q.shape[2])) for x in outputs]

    def sample(logits, uniform, seen, temperature, top_k, top_p, penalty):
        """By rejection, with random numbers of its own."""
        logits = logits.float()
        if top_k is None:
            return sampling.top_p_sampling_from_probs((logits / temperature).softmax(-1), top_p)
        return sampling.top_k_top_p_sampling_from_logits(logits / temperature, top_k, top_p)

    return locals()[op]


# What each of them has.
LIBRARIES: dict[str, tuple[Callable[[str], Call], tuple[str, ...]]] = {
    "Liger": (liger, ("rms_norm", "add_rms_norm", "sandwich_norm", "swiglu")),
    "FlashInfer": (
        flashinfer,
        ("rms_norm", "add_rms_norm", "sandwich_norm", "swiglu", "rope", "sample"),
    ),
}
missing: set[str] = set()


def library_peers(op: str, device: torch.device) -> dict[str, Call]:
    """The contenders for `op` by library; a library that is not there is skipped with a line."""
    peers: dict[str, Call] = {}
    if device.type != "cuda":
        return peers
    for library, (calls, ops) in LIBRARIES.items():
        if op not in ops:
            continue
        try:
            peers[library] = calls(op)
        except ImportError as error:
            if library not in missing:
                print(f"{library}: skipped, {error}", file=sys.stderr, flush=True)
            missing.add(library)
    return peers
