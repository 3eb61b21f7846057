from __future__ import annotations

import pytest
import torch
from kernels import Kernel

import glm4_kernels as gk
from glm4_kernels.decode_advance import (
    decode_advance_cpu,
    decode_advance_reference,
    launch_decode_advance,
)
from glm4_kernels.extension import buffer, extension

PAGE = 8
ON = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
KERNELS = (
    Kernel("triton", launch_decode_advance, ON, ()),
    Kernel("cpp", decode_advance_cpu, torch.device("cpu"), ()),
    Kernel("reference", decode_advance_reference, torch.device("cpu"), ()),
)
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=str)
WRITTEN = ("tokens", "positions", "seq_lens", "slots", "n_drawn", "uniform", "results")


def made(lengths, max_pages=4, n_uniforms=5, n_flags=3):
    """Rows after so many tokens each; rows of the tables lie in wider ones."""
    n = len(lengths)
    seq_lens = torch.tensor(lengths, dtype=torch.int32).reshape(n)
    pages = torch.randperm(n * (max_pages + 1)).view(n, max_pages + 1).int()
    return {
        "chosen": torch.randint(50, (n,)),
        "flags": torch.randint(2, (n_flags,)).int(),
        "block_table": pages[:, 1:],
        "uniforms": torch.rand(n, n_uniforms + 2, dtype=torch.float64)[:, 2:],
        "page_size": PAGE,
        "tokens": torch.randint(50, (n,)),
        "positions": (seq_lens - 1).clamp(min=0).long(),
        "seq_lens": seq_lens,
        "slots": torch.full((n,), -7),
        "n_drawn": torch.arange(n) % 4,
        "uniform": torch.full((n,), 7.0).double(),
        "results": torch.full((n_flags + n,), -9),
    }


def advanced(kernel, arguments):
    on = {
        name: value.to(kernel.device, copy=True) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    assert kernel(*on.values()) is None
    return {name: on[name].cpu().tolist() for name in WRITTEN}


@each_kernel
def test_a_step(kernel):
    arguments = made([5, 8, 0, 32, 31, 17])  # in a page, at its end, padding, at the last page's
    arguments["chosen"][1] = -1
    arguments["block_table"][5] = -1  # has no pages
    table = arguments["block_table"].tolist()
    now = advanced(kernel, arguments)

    chosen = arguments["chosen"].tolist()
    assert now["results"] == [*arguments["flags"].tolist(), *chosen]
    assert now["tokens"] == [chosen[0], 0, *chosen[2:]]
    assert now["positions"] == [5, 8, 0, 32, 31, 17]
    assert now["seq_lens"] == [6, 9, 0, 33, 32, 18]
    expected = [table[0][0] * PAGE + 5, table[1][1] * PAGE, -1, -2, table[4][3] * PAGE + 7, -2]
    assert now["slots"] == expected
    assert now["n_drawn"] == [1, 2, 2, 4, 1, 2]
    numbers = arguments["uniforms"].tolist()
    assert now["uniform"] == [numbers[i][drawn] for i, drawn in enumerate(now["n_drawn"])]


@each_kernel
@pytest.mark.parametrize(
    "sizes",
    [
        {"lengths": []},
        {"lengths": [3], "n_uniforms": 0},  # greedy
        {"lengths": [3, 9], "max_pages": 0},
        {"lengths": [40] * 3, "n_uniforms": 1},  # beyond both tables
        {"lengths": [i % 30 for i in range(200)], "n_flags": 5},  # more rows than a program has
        {"lengths": [4], "n_flags": 0},
    ],
    ids=str,
)
def test_matches_reference(kernel, sizes):
    arguments = made(**sizes)
    assert advanced(kernel, arguments) == advanced(KERNELS[-1], arguments)


@each_kernel
def test_counts_out_of_range_reach_nothing(kernel):
    arguments = made([3, 4, 5])
    arguments["positions"] = torch.tensor([-1000, 2**40, -2])
    arguments["n_drawn"] = torch.tensor([-9, 2**40, -2])
    now = advanced(kernel, arguments)
    assert now["slots"] == [-2] * 3
    assert now["uniform"] == [0.0] * 3


@each_kernel
def test_the_largest_page_and_count(kernel):
    """No sum or product leaves its type, but for a count at its largest, which wraps round."""
    arguments = made([3, 2**31 - 1], max_pages=1)
    arguments |= {"page_size": 2**31 - 1, "block_table": torch.tensor([[2**31 - 1], [0]]).int()}
    arguments["positions"] = torch.tensor([5, 2**63 - 1])
    now = advanced(kernel, arguments)
    assert now["slots"] == [(2**31 - 1) ** 2 + 6, -2]
    assert now["positions"] == [6, -(2**63)] and now["seq_lens"] == [4, -(2**31)]


TWO, FIVE = torch.zeros(2).long(), torch.zeros(5).long()


@pytest.mark.parametrize(
    "error, message, change",
    [
        (TypeError, "chosen must be torch.int64", {"chosen": torch.ones(2).int()}),
        (ValueError, r"chosen must be \[B\]", {"chosen": torch.ones(2, 1).long()}),
        (TypeError, "flags must be torch.int32", {"flags": torch.ones(3).long()}),
        (ValueError, r"positions must be \[2\], got \[3\]", {"positions": torch.ones(3).long()}),
        (TypeError, "seq_lens must be torch.int32", {"seq_lens": torch.ones(2).long()}),
        (ValueError, "slots must be contiguous", {"slots": torch.ones(4).long()[::2]}),
        (ValueError, r"results must be \[5\], got \[4\]", {"results": torch.ones(4).long()}),
        (TypeError, "uniforms must be torch.float64", {"uniforms": torch.ones(2, 5)}),
        (ValueError, r"uniforms must be \[2, columns\]", {"uniforms": torch.ones(3, 5).double()}),
        (ValueError, "block_table must be of", {"block_table": torch.ones(4, 2).int().t()}),
        (ValueError, "page_size must be at least 1", {"page_size": 0}),
        (ValueError, "page_size must be at least 1 and below 2", {"page_size": 2**31}),
        (ValueError, "page_size must be at least 1 and below 2", {"page_size": 2**63 - 1}),
        (
            ValueError,
            "positions must be apart from tokens",
            dict.fromkeys(("tokens", "positions"), TWO),
        ),
        (ValueError, "chosen must be apart from results", {"results": FIVE, "chosen": FIVE[3:]}),
    ],
)
def test_rejects(error, message, change):
    good = made([3, 4])
    gk.decode_advance(**good)
    with pytest.raises(error, match=f"^decode_advance: {message}"):
        gk.decode_advance(**(good | change))


@pytest.mark.parametrize("name", ["chosen", "flags", "block_table", "uniforms", *WRITTEN])
def test_checks_sizes_itself(name):
    """For callers that come around Python's checks: ValueError, and no memory touched."""
    good = made([3, 4])
    inputs = ("chosen", "flags", "block_table", "uniforms")

    def call(arguments):
        buffers = [buffer(arguments[name]) for name in (*WRITTEN, *inputs)]
        extension().decode_advance_cpu(*buffers, 2, 3, 4, 5, 5, 7, PAGE)

    call(good)
    with pytest.raises(ValueError, match=r"^decode_advance: .* must have more than"):
        call(good | {name: good[name].flatten()[:1]})
    with pytest.raises(ValueError, match=r"^decode_advance: impossible n_rows"):
        extension().decode_advance_cpu(*[(0, 0)] * 11, -1, 3, 4, 5, 5, 7, PAGE)
