"""Ops called from C++ with tensors as they are: it takes arguments that the check admits and no
others, and gives what the kernel gives that is called by addresses; the rest goes the other way."""

from __future__ import annotations

import copy
import importlib
from contextlib import suppress

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from test_ops import DTYPES, EXAMPLES, assert_equal, tensors

from glm4_kernels.extension import HAS_EXTENSION, direct_call

CPU = torch.device("cpu")
OTHERWISE = object()
OPS = [
    *("rms_norm", "add_rms_norm", "sandwich_norm", "swiglu"),
    *("rms_norm_quantized", "add_rms_norm_quantized", "sandwich_norm_quantized"),
    *("rope_kv_write", "flash_decode", "quantized_matmul"),
]
# Examples that need a copy, or that the reference serves, or with a schedule, which no CPU makes.
OTHERWISE_EXAMPLES = {
    "rms_norm, permuted",
    *("rms_norm, one row, expanded", "rms_norm, no rows"),
    "rms_norm_quantized, int8",
    *(
        "add_rms_norm, strided",
        "add_rms_norm, fp32 rounding",
        "add_rms_norm_quantized, int8, groups",
    ),
    *("sandwich_norm, strided", "sandwich_norm, fp32 rounding"),
    "sandwich_norm_quantized, int8, fp32",
    *("flash_decode, with its schedule", "flash_decode, batch-invariant"),
    *(str(example) for example in EXAMPLES if example.op == "quantized_matmul"),
}
SPOILS = [
    lambda t: t.mT if t.dim() > 1 else t.unsqueeze(0),
    lambda t: t.repeat_interleave(2, -1)[..., ::2],
    lambda t: t[..., :-1],
    lambda t: t[:1],
    lambda t: t[:0],
    lambda t: t[:1].expand(t.shape),
    lambda t: t.flatten(),
    lambda t: t.double(),
    lambda t: t.to(torch.int8),
    lambda t: t.to(torch.int32),
    lambda t: t + 40,
    lambda t: t * -(2**20),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: torch.nn.Parameter(t.to_dense(), requires_grad=t.is_floating_point()),
    lambda t: None,
    lambda t: "tensor",
]
NUMBERS = [None, 0, 1, 3, 2**31, 2**70, -1, 0.5, -1.0, float("nan"), True, "hf", torch.int8, []]

pytestmark = pytest.mark.skipif(not HAS_EXTENSION, reason="needs the extension")


def by_addresses(op):
    """The op's check, and its kernel called the other way."""
    module = importlib.import_module(f"glm4_kernels.{op.removesuffix('_quantized')}" if "norm" in op
                                     else f"glm4_kernels.{op}")  # fmt: skip
    if op == "quantized_matmul":
        return module.check_quantized_matmul, module.launch_quantized_matmul
    return getattr(module, f"check_{op}"), getattr(module, f"{op}_cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.op in OPS], ids=str)
def test_takes_what_needs_no_copy(example, dtype):
    call = direct_call(example.op, lambda *arguments: OTHERWISE)
    arguments = example.arguments(dtype, CPU)
    assert (call(*arguments) is OTHERWISE) == (str(example) in OTHERWISE_EXAMPLES)


@pytest.mark.filterwarnings("ignore:.*")  # of sparse tensors and of casts
@hypothesis.settings(max_examples=1500, deadline=None, database=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_takes_only_what_the_check_admits(data):
    example = data.draw(st.sampled_from([e for e in EXAMPLES if e.op in OPS]))
    arguments = list(example.arguments(data.draw(st.sampled_from(DTYPES)), CPU))
    if data.draw(st.booleans()):
        arguments = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments]
    for _ in range(data.draw(st.integers(0, 2))):
        position = data.draw(st.integers(0, len(arguments) - 1))
        if isinstance(arguments[position], torch.Tensor):
            spoil = data.draw(st.sampled_from(SPOILS))
            with suppress(RuntimeError, NotImplementedError), torch.no_grad():
                arguments[position] = spoil(arguments[position])
        else:
            arguments[position] = data.draw(st.sampled_from(NUMBERS))
    arguments = arguments[: data.draw(st.integers(0, 2)) or None]
    others = copy.deepcopy(arguments)

    outputs = direct_call(example.op, lambda *arguments: OTHERWISE)(*arguments)
    if outputs is not OTHERWISE:
        check, kernel = by_addresses(example.op)
        check(*others)
        assert_equal(tensors(outputs), tensors(kernel(*others)))
        assert_equal(tensors(arguments), tensors(others))


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.op in OPS], ids=str)
def test_takes_contiguous_tensors(example):
    call = direct_call(example.op, lambda *arguments: OTHERWISE)
    arguments = [
        a.contiguous() if isinstance(a, torch.Tensor) else a
        for a in example.arguments(torch.bfloat16, CPU)
    ]
    empty, scheduled = arguments[0].numel() == 0, "schedule" in str(example)
    assert (call(*arguments) is OTHERWISE) == (
        empty
        or scheduled
        or str(example) in ("flash_decode, batch-invariant", "quantized_matmul, swiglu")
    )


def test_goes_otherwise_with_what_it_was_given():
    call = direct_call("add_rms_norm", lambda *arguments: arguments)
    given = ("x", 1.0, None)
    assert call(*given) == given and call() == ()
    assert direct_call("no_op", call) is call


@pytest.mark.parametrize("op, n_tensors", [("rms", 2), ("add_rms", 3), ("sandwich", 4)])
def test_quantised_norms_need_a_dtype(op, n_tensors):
    call = direct_call(f"{op}_norm_quantized", lambda *arguments: OTHERWISE)
    tensors = [torch.ones(1, 32) for _ in range(min(n_tensors - 1, 2))]
    tensors += [torch.ones(32)] * (n_tensors - len(tensors))
    assert call(*tensors, 1e-5, torch.int8) is not OTHERWISE
    for missing in ((None,), (), (None, 32)):
        assert call(*tensors, 1e-5, *missing) is OTHERWISE


def test_an_error_otherwise_is_raised():
    def otherwise(*arguments):
        raise KeyError(len(arguments))

    with pytest.raises(KeyError, match="2"):
        direct_call("swiglu", otherwise)(torch.ones(2, 3), 2.0)


def test_refuses_gradients_only_where_they_are_recorded():
    call = direct_call("swiglu", lambda *arguments: OTHERWISE)
    x = torch.ones(2, 4, requires_grad=True)
    assert call(x) is OTHERWISE
    with torch.no_grad():
        assert call(x).shape == (2, 2)
