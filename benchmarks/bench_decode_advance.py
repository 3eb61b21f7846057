"""The rows of a decode step made ready for the next: a launch, beside the dozen it stands for."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case, torch_peers
from glm4.cache import PAGE_SIZE
from glm4_kernels.decode_advance import decode_advance, decode_advance_reference

MAX_PAGES, N_UNIFORMS, N_FLAGS = 512, 1024, 3


def cases(device: torch.device) -> Iterator[Case]:
    for batch in (1, 64):
        yield case(batch, device)


def case(batch: int, device: torch.device) -> Case:
    def inputs() -> tuple:
        def integers(limit: int, *shape: int) -> torch.Tensor:
            return torch.randint(limit, shape or (batch,), device=device)

        positions = integers(MAX_PAGES * PAGE_SIZE // 2)  # room for all calls
        return (
            *(integers(151552), integers(1, N_FLAGS).int(), integers(9999, batch, MAX_PAGES).int()),
            *(torch.rand(batch, N_UNIFORMS, dtype=torch.float64, device=device), PAGE_SIZE),
            *(integers(9), positions, positions.int() + 1, integers(9), integers(9)),
            *(torch.zeros(batch, dtype=torch.float64, device=device), integers(9, N_FLAGS + batch)),
        )

    def all_written(*arguments) -> torch.Tensor:
        decode_advance_reference(*(x.clone() if i > 4 else x for i, x in enumerate(arguments)))
        return torch.cat([x.double() for x in arguments[5:]])

    def ours(*arguments) -> torch.Tensor:
        decode_advance(*arguments)
        return arguments[-1]

    def torch_ops(*arguments) -> torch.Tensor:
        decode_advance_reference(*arguments)
        return arguments[-1]

    return Case(
        op="decode_advance",
        label=f"{batch} rows",
        bytes_moved=batch * 124 + 12 * N_FLAGS,
        flops=0,
        inputs=inputs,
        contenders={"glm4_kernels": ours, **torch_peers(torch_ops, device)},
        oracle=torch_ops,
        tolerance=0.0,
    )
