"""What every op owes PyTorch, over one table of examples: a correct schema, a fake that tells the
truth, `torch.compile` without a graph break, fresh outputs, no gradient, and a check at the door.

`opcheck` proves nothing numerical; the numbers are tested per op, in test_<op>.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import glm4_kernels as gk
from glm4_kernels.library import register_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5


@dataclass(frozen=True)
class Example:
    """Arguments of `torch.ops.glm4_kernels.<op>`, or of its overload `<op>.<name>`, made afresh at
    each call."""

    op: str
    label: str
    make: Callable[[torch.dtype, torch.device], tuple[Any, ...]]
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __str__(self) -> str:
        return f"{self.op}, {self.label}"

    @property
    def name(self) -> str:
        return self.op.partition(".")[0]

    @property
    def public(self) -> Callable[..., Any]:
        """The op through its public function, with the op's arguments."""
        return PUBLIC.get(self.name, getattr(gk, self.name))

    @property
    def overload(self) -> Any:
        overload = self.op.partition(".")[2] or "default"
        return getattr(getattr(torch.ops.glm4_kernels, self.name), overload)

    def arguments(self, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        if device.type not in self.devices:
            pytest.skip(f"{self} is for {self.devices[0]}")
        torch.manual_seed(7)
        return self.make(dtype, device)


def rows(dtype, device, *shape):
    return torch.randn(shape, dtype=dtype, device=device)


def norm(layout, *options):
    def make(dtype, device):
        return layout(rows(dtype, device, 6, 4, 32)), rows(dtype, device, 32), EPS, *options

    return make


def residual_norm(n_weights, *options):
    def make(dtype, device):
        x = rows(dtype, device, 3, 64)[:, 8:40]
        residual = rows(dtype, device, 32, 3).t()
        return x, residual, *(rows(dtype, device, 32) for _ in range(n_weights)), EPS, *options

    return make


def packed_qkv(dtype, device, n_tokens, n_heads, n_kv_heads):
    """q, k and v as views of one projection."""
    qkv = rows(dtype, device, n_tokens, n_heads + 2 * n_kv_heads, 64)
    return qkv, qkv.split([n_heads, n_kv_heads, n_kv_heads], dim=1)


def rope(table_dtype, index_dtype):
    def make(dtype, device):
        _, (q, k, _) = packed_qkv(dtype, device, 5, 6, 2)
        positions = torch.tensor([3, 0, 7, 7, 1], dtype=index_dtype, device=device)
        table = gk.rope_table(8, 1e4, rotary_dim=32, dtype=table_dtype or dtype, device=device)
        return q, k, positions, table

    return make


def cache(n_pages, dtype, device):
    """Pages and scales of K or of V; head-major strides, so that they are not contiguous."""
    pages = torch.randn(n_pages, 16, 2, 64, device=device).mul(20).to(dtype).transpose(1, 2)
    if dtype.is_floating_point:
        return pages, None
    return pages, torch.rand(n_pages, 2, 16, device=device)


def rope_kv_write(cache_dtype, bias):
    def make(dtype, device):
        qkv, _ = packed_qkv(dtype, device, 3, 6, 2)
        positions = torch.tensor([4, 5, 0], device=device)
        table = gk.rope_table(8, 1e4, rotary_dim=32, dtype=dtype, device=device)
        (k, k_scale), (v, v_scale) = (cache(2, cache_dtype or dtype, device) for _ in range(2))
        slots = torch.tensor([17, 3, -1], device=device)
        added = rows(dtype, device, 10 * 64) if bias else None
        return qkv.flatten(1), positions, table, k, v, slots, 6, added, k_scale, v_scale

    return make


def decode_schedule(batch_invariant):
    def make(dtype, device):
        lengths = torch.tensor([20, 0, 5000], dtype=torch.int32, device=device)
        return lengths, 32, 2, 1, batch_invariant

    return make


def flash_decode(n_queries, cache_dtype, batch_invariant=None):
    def make(dtype, device):
        sizes = (3, 6) if n_queries is None else (3, n_queries, 6)
        q = rows(dtype, device, *sizes, 128)[..., 64:]
        (k, k_scale), (v, v_scale) = (cache(5, cache_dtype or dtype, device) for _ in range(2))
        table = torch.tensor([[4, 0], [1, 99], [2, 3]], dtype=torch.int32, device=device)
        lengths = torch.tensor([20, 5, 32], dtype=torch.int32, device=device)
        arguments = q, k, v, table, lengths, 0.125, k_scale, v_scale
        if batch_invariant is None:
            return *arguments, None, False
        schedule = gk.decode_schedule(lengths, 6, 2, n_queries or 1, batch_invariant)
        return *arguments, schedule, batch_invariant

    return make


def merge_attention(dtype, device):
    outs = [rows(dtype, device, 3, 6, 64) for _ in range(2)]
    lses = [torch.randn(3, 6, device=device) for _ in range(2)]
    lses[0][1] = -torch.inf
    return outs[0], lses[0], outs[1], lses[1]


def sample(drawn, seen, *options):
    def make(dtype, device):
        logits = rows(dtype, device, 3, 90)[:, 5:75]
        uniform = torch.rand(3, dtype=torch.float64, device=device) if drawn else None
        marks = torch.zeros(3, 70, dtype=torch.bool, device=device) if seen else None
        return logits, uniform, marks, *options

    return make


def decode_advance(dtype, device):
    integers = partial(torch.tensor, device=device)
    tokens, positions, slots, n_drawn = integers([[7, 0, 9], [4, 9, 0], [5, 6, 8], [0, 1, 0]])
    chosen, flags = integers([3, -1, 2]), integers([0, 1], dtype=torch.int32)
    table = integers([[2, 3], [1, -1], [0, 0]], dtype=torch.int32)
    uniforms = torch.rand(3, 4, dtype=torch.float64, device=device)
    lengths = integers([5, 10, 0], dtype=torch.int32)
    results = torch.zeros(5, dtype=torch.int64, device=device)
    written = tokens, positions, lengths, slots, n_drawn, uniforms[:, 3].clone(), results
    return chosen, flags, table, uniforms, 8, *written


def quantized_matmul(bits, group_size, symmetric, bias, int8_activations, swiglu=False):
    def make(dtype, device):
        weight = gk.quantize(torch.randn(24, 128), bits, group_size, symmetric).to(device)
        x = rows(dtype, device, 128, 5).t()
        added = rows(dtype, device, 24) if bias else None
        weights = weight.packed, weight.scale, weight.zero_point
        return x, *weights, added, 24, bits, group_size, int8_activations, swiglu

    return make


EXAMPLES = [
    Example("rms_norm", "three dims", norm(lambda x: x)),
    Example("rms_norm", "permuted", norm(lambda x: x.transpose(0, 1))),
    Example("rms_norm", "one row, expanded", norm(lambda x: x[:1].expand(2, 4, 32))),
    Example("rms_norm", "no rows", norm(lambda x: x[:0])),
    Example("rms_norm", "fp32 rounding", norm(lambda x: x, "fp32")),
    Example("rms_norm_quantized", "int8", norm(lambda x: x.transpose(0, 1), torch.int8)),
    Example("rms_norm_quantized", "fp8, groups", norm(lambda x: x, torch.float8_e4m3fn, 32)),
    Example("add_rms_norm", "strided", residual_norm(1)),
    Example("add_rms_norm", "fp32 rounding", residual_norm(1, "fp32")),
    Example("add_rms_norm_quantized", "int8, groups", residual_norm(1, torch.int8, 32)),
    Example("sandwich_norm", "strided", residual_norm(2)),
    Example("sandwich_norm", "fp32 rounding", residual_norm(2, "fp32")),
    Example("sandwich_norm_quantized", "int8, fp32", residual_norm(2, torch.int8, None, "fp32")),
    Example("swiglu", "contiguous", lambda *on: (rows(*on, 3, 64),)),
    Example("swiglu", "slice", lambda *on: (rows(*on, 2, 3, 80)[..., 3:71],)),
    Example("rope", "views of qkv", rope(None, torch.int64)),
    Example("rope", "float32 table, int32 positions", rope(torch.float32, torch.int32)),
    Example("rope_kv_write", "bias", rope_kv_write(None, bias=True)),
    Example("rope_kv_write", "int8 cache", rope_kv_write(torch.int8, bias=False)),
    Example("decode_schedule", "shared", decode_schedule(False)),
    Example("decode_schedule", "batch-invariant", decode_schedule(True)),
    Example("flash_decode", "one query", flash_decode(None, None)),
    Example("flash_decode", "with its schedule", flash_decode(2, None, False)),
    Example("flash_decode", "batch-invariant", flash_decode(None, None, True)),
    Example("flash_decode", "three queries, int8 cache", flash_decode(3, torch.int8)),
    Example("merge_attention", "an empty side", merge_attention),
    Example("sample", "greedy", sample(False, False)),
    Example("sample", "drawn", sample(True, False)),
    Example("sample.seen", "greedy", sample(False, True)),
    Example("sample.seen", "all", sample(True, True, 0.7, 20, 0.9, 1.2)),
    Example("decode_advance", "a running row, one at its end, padding", decode_advance),
    Example("quantized_matmul", "int4", quantized_matmul(4, 32, True, True, False)),
    Example(
        "quantized_matmul", "int8, zero points", quantized_matmul(8, None, False, False, False)
    ),
    Example(
        "quantized_matmul",
        "int4, int8 activations",
        quantized_matmul(4, 64, False, True, True),
        devices=("cpu",),
    ),
    Example("quantized_matmul", "swiglu", quantized_matmul(4, 64, True, True, False, swiglu=True)),
]
# The same op through its public function, where that takes other arguments than the op.
PUBLIC: dict[str, Callable[..., Any]] = {
    "flash_decode": lambda *arguments: gk.flash_decode(*arguments[:8], True, *arguments[8:]),
    "quantized_matmul": lambda x, packed, scale, zero, bias, n, bits, group_size, int8, swiglu: (
        gk.quantized_matmul(
            x,
            gk.QuantizedWeight(packed, scale, zero, bits, group_size, (n, x.shape[-1])),
            bias,
            "int8" if int8 else "float",
            swiglu,
        )
    ),
}

each_example = pytest.mark.parametrize("example", EXAMPLES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def test_every_op_has_an_example():
    registered = {
        name.removeprefix("glm4_kernels::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("glm4_kernels::")
    }
    assert registered == {example.op for example in EXAMPLES}


@each_example
@each_dtype
def test_opcheck(example, dtype, device):
    torch.library.opcheck(example.overload, example.arguments(dtype, device))


@each_example
def test_compiles_without_a_graph_break(example, device):
    """Through the public function, between other operations, inputs written in place included."""

    def step(*arguments):
        first = arguments[0] * 2
        return [x.float() + 1 for x in tensors(example.public(first, *arguments[1:]))]

    eager_arguments = example.arguments(torch.float32, device)
    compiled_arguments = example.arguments(torch.float32, device)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*compiled_arguments), step(*eager_arguments))
    assert_equal(tensors(compiled_arguments), tensors(eager_arguments))


@each_example
@each_dtype
def test_fake_tells_the_truth(example, dtype, device):
    real = tensors(example.overload(*example.arguments(dtype, device)))
    mode = FakeTensorMode()
    arguments = [
        mode.from_tensor(a) if isinstance(a, Tensor) else a
        for a in example.arguments(dtype, device)
    ]
    with mode:
        fake = tensors(example.overload(*arguments))
    assert [describe(x) for x in fake] == [describe(x) for x in real]


@each_example
def test_outputs_are_fresh_and_inputs_kept(example, device):
    arguments = example.arguments(torch.float32, device)
    before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    outputs = tensors(example.overload(*arguments))

    inputs = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, Tensor)} - {0}
    for output in outputs:
        assert output.is_contiguous()
        assert output.untyped_storage().data_ptr() not in inputs, "an output is a view of an input"
    parameters = example.overload._schema.arguments[: len(arguments)]  # the others have defaults
    for parameter, old, new in zip(parameters, before, arguments, strict=True):
        if isinstance(new, Tensor):
            kept = torch.equal(old, new)
            written = parameter.alias_info is not None and parameter.alias_info.is_write
            assert kept != written, f"{parameter.name}: declared written {written}, kept {kept}"


@each_example
def test_refuses_gradients(example, device):
    arguments = example.arguments(torch.float32, device)
    parameters = example.overload._schema.arguments[: len(arguments)]
    for index, (parameter, argument) in enumerate(zip(parameters, arguments, strict=True)):
        if isinstance(argument, Tensor) and argument.is_floating_point():
            wanted = argument.detach().requires_grad_()
            changed = (*arguments[:index], wanted, *arguments[index + 1 :])
            with pytest.raises(
                RuntimeError, match=f"^{example.name}: {parameter.name} requires grad"
            ):
                example.overload(*changed)


def floats(example, device):
    """What of its arguments could be differentiated: (position, name, argument)."""
    arguments = example.arguments(torch.float32, device)
    parameters = example.overload._schema.arguments[: len(arguments)]
    for index, (parameter, argument) in enumerate(zip(parameters, arguments, strict=True)):
        if isinstance(argument, Tensor) and argument.is_floating_point():
            written = parameter.alias_info is not None  # in the strides that it shares with others
            yield index, parameter.name, argument if written else argument.contiguous()


def forward_dual(f, x):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, torch.ones_like(x)))


DIFFERENTIATED = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(x[None]),
    "grad of vmap": lambda f, x: torch.func.grad(lambda x: torch.func.vmap(f)(x[None]).sum())(x),
    "forward mode": forward_dual,
}  # fmt: skip


@pytest.mark.parametrize("transform", DIFFERENTIATED)
@each_example
def test_refuses_to_be_differentiated(example, transform, device):
    """Where a zero for a derivative would be silent; no_grad switches gradients off, and leaves
    forward mode on."""
    written = [a for a in example.overload._schema.arguments if a.alias_info is not None]
    if "vmap" in transform and written:
        pytest.skip("what an op writes cannot be a batch (test_vmap)")
    for index, name, argument in floats(example, device):
        arguments = example.arguments(torch.float32, device)

        def call(x, index=index, arguments=arguments):
            changed = (*arguments[:index], x, *arguments[index + 1 :])
            outputs = tensors(example.overload(*changed))
            return sum(output.float().sum() for output in outputs) + x.sum()

        def call_without_grad(x, call=call):
            with torch.no_grad():
                return call(x)

        forward = transform in ("jvp", "jacfwd", "forward mode")
        what = "(has a tangent|requires grad)" if forward else "requires grad"
        refused = f"^{example.name}: {name} {what}, but this op is for inference only"
        with pytest.raises(RuntimeError, match=refused):
            DIFFERENTIATED[transform](call, argument)
        if not forward:
            continue
        with pytest.raises(RuntimeError, match=refused):
            DIFFERENTIATED[transform](call_without_grad, argument)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@each_example
def test_vmap(example, device):
    """Gives what a loop gives, or says that it cannot."""
    written = [a for a in example.overload._schema.arguments if a.alias_info is not None]
    for index, _, argument in floats(example, device):
        if argument.numel() == 0:
            continue
        batch = torch.stack((argument, argument / 2))
        arguments = example.arguments(torch.float32, device)

        def call(x, index=index, arguments=arguments):
            changed = (*arguments[:index], x, *arguments[index + 1 :])
            return tuple(tensors(example.overload(*changed)))

        if written:
            with pytest.raises(RuntimeError, match=r"^Batching rule not implemented"):
                torch.func.vmap(call)(batch)
            continue
        expected = [torch.stack(outputs) for outputs in zip(*map(call, batch), strict=True)]
        assert_equal(tensors(torch.func.vmap(call)(batch)), expected)


@each_example
def test_compiled_without_grad_takes_parameters(example, device):
    """And refuses them with it, as it does uncompiled."""
    arguments = [
        torch.nn.Parameter(a) if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in example.arguments(torch.float32, device)
    ]
    expected = example.arguments(torch.float32, device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: example.public(*given), backend="aot_eager")
    if any(isinstance(a, torch.nn.Parameter) for a in arguments):
        with pytest.raises(RuntimeError, match=f"{example.name}: \\w+ requires grad"):
            compiled(*arguments)
    with torch.no_grad():
        assert_equal(tensors(compiled(*arguments)), tensors(example.public(*expected)))


@each_example
def test_takes_parameters_in_inference_mode(example, device):
    expected = tensors(example.overload(*example.arguments(torch.float32, device)))
    parameters = [
        torch.nn.Parameter(a) if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in example.arguments(torch.float32, device)
    ]
    with torch.inference_mode():
        assert_equal(tensors(example.overload(*parameters)), expected)


@each_example
def test_the_op_checks_what_it_is_called_with(example, device):
    """Each tensor in turn of an impossible dtype, then on another device; real and fake."""
    arguments = example.arguments(torch.float32, device)
    for index, argument in enumerate(arguments):
        if not isinstance(argument, Tensor):
            continue
        wrong = (*arguments[:index], argument.to(torch.complex64), *arguments[index + 1 :])
        with pytest.raises(TypeError, match=f"^{example.name}: \\w+ must be .*, got "):
            example.overload(*wrong)
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in wrong]
        with mode, pytest.raises(TypeError, match=f"^{example.name}: \\w+ must be .*, got "):
            example.overload(*fakes)
        elsewhere = (*arguments[:index], argument.to("meta"), *arguments[index + 1 :])
        if sum(isinstance(a, Tensor) for a in arguments) > 1:
            with pytest.raises(ValueError, match=f"^{example.name}: \\w+ must be on \\w+.*, got "):
                example.overload(*elsewhere)


@each_example
def test_names_a_tensor_that_is_none(example, device):
    """The dispatcher lets None pass for a Tensor."""
    arguments = example.arguments(torch.float32, device)
    for index, parameter in enumerate(example.overload._schema.arguments[: len(arguments)]):
        if isinstance(parameter.type, torch.TensorType):
            missing = (*arguments[:index], None, *arguments[index + 1 :])
            expected = f"^{example.name}: {parameter.name} must be a tensor, got None$"
            with pytest.raises(TypeError, match=expected):
                example.overload(*missing)


def test_an_op_writes_something_at_every_call():
    """Inductor cannot compile a call that writes nothing of an op that may."""
    optional = {"check": rows, "reference": rows, "launch": None, "fake": rows}
    with pytest.raises(ValueError, match="one of what it writes must be a Tensor"):
        register_op("writes_nothing(Tensor x, Tensor(a!)? y=None) -> Tensor", **optional)


def tensors(values: Any) -> list[Tensor]:
    values = values if isinstance(values, (tuple, list)) else (values,)
    return [value for value in values if isinstance(value, Tensor)]


def describe(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), tuple(x.stride()), x.dtype, x.device


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert describe(a) == describe(b)
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
