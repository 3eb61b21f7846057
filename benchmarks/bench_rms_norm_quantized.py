"""RMSNorm with a quantised result, beside plain PyTorch for all of it, or after our norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.harness import Case, dependent_launch, first_output, torch_peers
from benchmarks.shapes import SHAPES, TOKENS
from glm4_kernels.quantize_rows import quantize_rows
from glm4_kernels.rms_norm import (
    launch_rms_norm_quantized,
    rms_norm,
    rms_norm_quantized,
    rms_norm_quantized_reference,
)

MODEL, DTYPE, EPS = "glm-4-9b", torch.bfloat16, 1.5625e-07
# bf16 moves a code of 12, the root mean square here, by up to 2^-8 of itself: one in 20 rounds to
# its neighbour, sqrt(1 / 20) / 12 = 2 %. A code of fp8 has steps of 1/8, and one in 16 moves.
TOLERANCE = 2.0**-5


def cases(device: torch.device) -> Iterator[Case]:
    yield from quantised_cases(
        *("rms_norm_quantized", 1, 1, device),
        *(rms_norm_quantized, rms_norm_quantized_reference, launch_rms_norm_quantized, rms_norm),
    )


def quantised_cases(
    op: str,
    n_inputs: int,
    n_weights: int,
    device: torch.device,
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    launch: Callable[..., Any],
    norm: Callable[..., Any],
) -> Iterator[Case]:
    """int8 in the groups of the int8 matmul; fp8, for GPUs, with a scale a token."""
    targets: list[tuple[str, torch.dtype, int | None]] = [("int8, groups of 64", torch.int8, 64)]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        targets.append(("fp8, rows", torch.float8_e4m3fn, None))
    n_cols = SHAPES[MODEL].hidden

    def unfused(*arguments: Any) -> tuple[torch.Tensor, ...]:
        *plain, dtype, group_size = arguments
        y = norm(*plain)
        return quantize_rows(first_output(y), dtype, group_size)

    def oracle(*arguments: Any) -> torch.Tensor:
        wide = (a.double() if isinstance(a, torch.Tensor) else a for a in arguments)
        return first_output(reference(*wide)).double()

    for label, dtype, group_size in targets:
        for n_tokens in (1, TOKENS[device.type][-1]):

            def inputs(n_tokens=n_tokens, dtype=dtype, group_size=group_size) -> tuple:
                rows = torch.randn(n_inputs, n_tokens, n_cols, dtype=DTYPE, device=device)
                weights = torch.randn(n_weights, n_cols, dtype=DTYPE, device=device)
                return *rows, *weights, EPS, dtype, group_size

            per_token = (2 * n_inputs - 1) * n_cols * DTYPE.itemsize + n_cols
            per_token += 4 * (n_cols // group_size if group_size else 1)
            yield Case(
                op=op,
                label=f"{MODEL}, {n_tokens} tokens, {label}",
                bytes_moved=n_tokens * per_token + n_weights * n_cols * DTYPE.itemsize,
                flops=0,
                inputs=inputs,
                contenders={
                    "glm4_kernels": ours,
                    **torch_peers(reference, device),
                    "unfused": unfused,
                    **dependent_launch(launch, device),
                },
                oracle=oracle,
                tolerance=TOLERANCE,
            )
