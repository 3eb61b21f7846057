"""How an op of this package meets PyTorch: one schema, one check, one implementation per device.

Every op module calls `register_op` once. The dispatcher then runs, behind the same check,

    CPU, other devices   reference (or `cpu`, a compiled kernel, called from C++ where it can be)
    CUDA                 launch    (the Triton or CUDA kernel)
    tracing              fake      (shapes and dtypes only)

`define` + `impl` rather than `@custom_op`: 2-3 us a call against 5-12 us, and a decode step makes
ten such calls per layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from glm4_kernels.extension import direct_call
from glm4_kernels.triton_import import HAS_TRITON

P = ParamSpec("P")
T = TypeVar("T")

LIBRARY = torch.library.Library("glm4_kernels", "DEF")

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Where the dispatcher enters the innermost transform of torch.func: the last place that sees what
# this one differentiates.
TRANSFORMS = "FuncTorchDynamicLayerFrontMode"

# Ops whose index arguments (positions, slots, page ids, lengths) are checked inside the kernel.
DEVICE_CHECKED = ("rope", "rope_kv_write", "flash_decode")


def bad_value(op: str, argument: str, expected: object, actual: object) -> ValueError:
    """The one form of a message about a wrong rank, shape, device, stride or value."""
    return ValueError(f"{op}: {argument} must be {expected}, got {actual}")


def bad_type(op: str, argument: str, expected: object, actual: object) -> TypeError:
    """The one form of a message about a wrong dtype or Python type."""
    return TypeError(f"{op}: {argument} must be {expected}, got {actual}")


def check_fp8(op: str, argument: str, dtype: torch.dtype, device: torch.device) -> None:
    """Raises for float8 on a GPU that has none; of a GPU that is not there nothing is known."""
    if dtype == torch.float8_e4m3fn and device.type == "cuda":
        with suppress(RuntimeError, AssertionError):  # fake tensors, and no driver
            if torch.cuda.get_device_capability(device) < (8, 9):
                raise bad_type(op, argument, "int8 before sm_89", dtype)


def as_rows(x: Tensor) -> Tensor:
    """x [..., N] as [rows, N] with unit column stride: a view wherever one row stride describes
    it, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def strided_rows(x: Tensor) -> tuple[Tensor, int]:
    """What `as_rows` gives, or x itself where its memory is the same, and the stride of a row."""
    if x.is_contiguous():
        return x, x.shape[-1]
    rows = as_rows(x)
    return rows, rows.stride(0)


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """`function` in the dtypes that it names, whatever autocast its caller is in; where there is
    none, 0.3 us a call."""

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return call(*args, **options)
        return function(*args, **options)

    return call


def register_op(
    schema: str,
    *,
    check: Callable[..., None],
    reference: Callable[..., Any],
    launch: Callable[..., Any] | None,
    fake: Callable[..., Any],
    check_values: Callable[..., None] | None = None,
    cpu: Callable[..., Any] | None = None,
    launch_needs_triton: bool = True,
) -> Callable[..., Any]:
    """Defines `torch.ops.glm4_kernels.<name>` and returns its callable overload.

    All callables take the schema's arguments, with the schema's defaults.

    Args:
        schema: the dispatcher's schema, `"name(Tensor x, float eps) -> Tensor"`; the name may end
            in that of an overload, `name.overload`. An op that writes nothing but optional
            arguments wants two: Inductor cannot compile a call of it that writes nothing.
        check: raises on wrong ranks, shapes, dtypes, devices; never reads tensor data.
        reference: plain PyTorch; the specification, and the implementation where nothing better is.
        launch: the CUDA implementation; it neither validates nor synchronises.
        fake: allocates the outputs and computes nothing.
        check_values: raises on values out of range; called before `reference` on CPU, where reading
            data costs no synchronisation (on CUDA the kernel masks them and sets its error flag).
        cpu: a compiled CPU implementation, where there is one; it checks values itself.
        launch_needs_triton: false for CUDA kernels of the C++ extension.
    """
    parsed = torch._C.parse_schema(schema)
    name, arguments = parsed.name, parsed.arguments
    written = [a for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    if written and all(isinstance(a.type, torch.OptionalType) for a in written):
        raise ValueError(f"{name}: one of what it writes must be a Tensor, got {schema}")
    qualified = schema.split("(", 1)[0]
    reference = without_autocast(reference)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(getattr(torch.ops.glm4_kernels, name), parsed.overload_name or "default")

    def refuse_grad(args: tuple[Any, ...]) -> None:
        backward = torch.is_grad_enabled()
        forward = forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()
        if not backward and not forward:
            return
        for argument, arg in zip(arguments, args, strict=False):
            if not isinstance(arg, Tensor):
                continue
            if backward and arg.requires_grad:
                raise RuntimeError(
                    f"{name}: {argument.name} requires grad, but this op is for inference only; "
                    "call it under torch.inference_mode() or torch.no_grad()"
                )
            if forward and has_tangent(arg):
                raise RuntimeError(
                    f"{name}: {argument.name} has a tangent, but this op is for inference only and "
                    "has no forward-mode derivative (torch.no_grad() does not switch that off)"
                )

    def admit(args: tuple[Any, ...]) -> None:
        refuse_grad(args)
        try:
            check(*args)
        except AttributeError:  # the dispatcher lets None pass for a Tensor
            for argument, arg in zip(arguments, args, strict=False):
                if arg is None and isinstance(argument.type, torch.TensorType):
                    raise bad_type(name, argument.name, "a tensor", None) from None
            raise

    # Autograd kernels would be passed at every call: the kernels below refuse for themselves, all
    # but what torch.func has wrapped, which is refused where it is unwrapped.
    LIBRARY.impl(qualified, torch.library.fallthrough_kernel, "Autograd")
    unwrap = torch.library.get_kernel(op, TRANSFORMS)

    def run_transformed(keyset: Any, *args: Any) -> Any:
        refuse_grad(args)
        return unwrap.call_boxed(keyset, *args)

    LIBRARY.impl(qualified, run_transformed, TRANSFORMS, with_keyset=True)

    def run_reference(*args: Any) -> Any:
        admit(args)
        if check_values is not None and args[0].device.type == "cpu":
            check_values(*args)
        outputs = reference(*args)  # pointwise PyTorch keeps the strides of permuted inputs
        if outputs is None:  # all that it does, it writes
            return None
        if isinstance(outputs, Tensor):
            return outputs.contiguous()
        return tuple(output.contiguous() for output in outputs)

    LIBRARY.impl(qualified, run_reference, "CompositeExplicitAutograd")

    if cpu is not None:

        def run_cpu(*args: Any) -> Any:
            admit(args)
            return cpu(*args)

        LIBRARY.impl(qualified, direct_call(name, run_cpu), "CPU")

    if launch is not None and (HAS_TRITON or not launch_needs_triton):

        def run_cuda(*args: Any) -> Any:
            admit(args)
            index = args[0].device.index
            if index == torch.cuda.current_device():
                return launch(*args)
            with torch.cuda.device(index):
                return launch(*args)

        LIBRARY.impl(qualified, run_cuda, "CUDA")

    def run_fake(*args: Any) -> Any:
        admit(args)
        return fake(*args)

    torch.library.register_fake(f"glm4_kernels::{qualified}", run_fake, lib=LIBRARY)
    return op


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode AD asks for a derivative of what is made of `tensor`."""
    while torch._C._functorch.is_batchedtensor(tensor):  # vmap has no rule for unpack_dual
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.is_floating_point() and forward_ad.unpack_dual(tensor).tangent is not None


@functools.cache
def error_flags(device: torch.device) -> Tensor:
    """int32 [len(DEVICE_CHECKED)], zero until a kernel on `device` met an index out of range."""
    with torch.inference_mode(False):  # an inference tensor could not be reset outside that mode
        return torch.zeros(len(DEVICE_CHECKED), dtype=torch.int32, device=device)


@functools.cache
def error_flag(op: str, device: torch.device) -> Tensor:
    """The one flag of `op`, int32 []: a view made once, since a kernel takes it at every launch."""
    return error_flags(device)[DEVICE_CHECKED.index(op)]


def raise_device_errors(device: torch.device | str) -> None:
    """Raises if a kernel on `device` masked an index out of range since the last call.

    Synchronises; an engine calls it where it waits for the device anyway.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    flags = error_flags(device)
    raised = [op for op, flag in zip(DEVICE_CHECKED, flags.tolist(), strict=True) if flag]
    if raised:
        flags.zero_()
        raise IndexError(
            f"{', '.join(raised)}: a position, slot, page id or length was out of range on {device}"
        )


@functools.cache
def multiprocessor_count(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; 132 (H100, H200) for CPU tensors, so that the
    interpreter and the ahead-of-time compile see the launch that those GPUs see."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
