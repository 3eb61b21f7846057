"""Linear layer with a 4- or 8-bit weight.

    y = x W^T + bias        W = scale * (u - z), per row and group of K

activations="float": x as it is, products and sums in fp32.
activations="int8": each row of x is first rounded to int8, a scale per group of A values of K:

    s = max|x| / 127        q = round_half_even(x / s)        x ~ s * q

A = min(weight group, 128), 128 per channel (the last group of a row may be shorter). Then

    y = sum over groups of (scale * s) * (sum of q * u - z * sum of q) + bias

with the inner sums exact in int32 and the outer ones in fp32, in the order of K.

Rounding points: s, x / s and q as above; fp32 accumulation; bias added in fp32; one rounding to the
dtype of x.

Bytes moved: N * K * bits / 8 + scales and zero points + (M * K + M * N) * itemsize; the floor is
that over the memory bandwidth for few rows, and 2 * M * N * K over the matmul peak for many.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm4_kernels.extension import DTYPE_CODES, aligned, buffer, cuda_extension, extension
from glm4_kernels.library import FLOAT_DTYPES, bad_type, bad_value, register_op
from glm4_kernels.quantize import BITS, BLOCK, GROUP_SIZES, QuantizedWeight, dequantize

ACTIVATIONS = ("int8", "float")
MAX_ACTIVATION_GROUP = 128


def quantize_activations(x: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """x [M, K] -> int8 [M, K], and the fp32 scales [M, ceil(K / A)]. A group that holds a NaN or an
    infinity gets that as its scale, so that the output shows it."""
    group = min(group_size or MAX_ACTIVATION_GROUP, MAX_ACTIVATION_GROUP)
    n_cols = x.shape[1]
    padding = -n_cols % group
    groups = torch.nn.functional.pad(x.float(), (0, padding)).unflatten(1, (-1, group))
    scale = groups.abs().amax(-1) / 127
    usable = (scale > 0) & scale.isfinite()
    step = torch.where(usable, scale, 1.0).unsqueeze(-1)
    q = torch.where(usable.unsqueeze(-1), (groups / step).round(), 0.0).clamp(-127, 127)
    return q.to(torch.int8).flatten(1)[:, :n_cols], scale


def quantized_matmul_reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int | None,
    int8_activations: bool,
) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    if int8_activations:
        q, step = quantize_activations(rows, group_size)
        group = min(group_size or MAX_ACTIVATION_GROUP, MAX_ACTIVATION_GROUP)
        step = step.to(compute).repeat_interleave(group, dim=1)[:, : rows.shape[1]]
        rows = q.to(compute) * step
    weight = dequantize(packed, scale, zero_point, bits, compute)
    y = rows.to(compute) @ weight.t()
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype).reshape(*x.shape[:-1], packed.shape[0])


def launch_quantized_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int | None,
    int8_activations: bool,
    variant: str = "",
) -> Tensor:
    """The C++ kernel on CPU tensors (`variant`: its inner loops, of build_info()["cpu_variants"],
    the best by default), the CUDA kernel on CUDA tensors."""
    k = x.shape[-1]
    n = packed.shape[0]
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, packed = aligned(x), aligned(packed)
    bias = None if bias is None else bias.contiguous()
    problem: tuple[Any, ...] = (
        *(buffer(t) for t in (y, x, packed, scale, zero_point, bias)),
        *(DTYPE_CODES[t.dtype] for t in (x, scale)),
        *(y.numel() // n, n, k, bits, group_size or k),
    )
    if x.device.type == "cpu":
        n_threads = torch.get_num_threads()
        extension().quantized_matmul_cpu(*problem, int8_activations, n_threads, variant)
    else:
        stream = torch.cuda.current_stream(x.device).cuda_stream
        cuda_extension().quantized_matmul_cuda(*problem, x.device.index, stream)
    return y


def check_quantized_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int | None,
    int8_activations: bool,
) -> None:
    op = "quantized_matmul"
    if bits not in BITS:
        raise bad_value(op, "bits", "4 or 8", bits)
    if group_size not in GROUP_SIZES:
        raise bad_value(op, "group_size", "32, 64, 128 or None", group_size)
    if x.dim() < 1:
        raise bad_value(op, "x", "[..., K]", list(x.shape))
    if x.dtype not in FLOAT_DTYPES:
        raise bad_type(op, "x", "float32, bfloat16 or float16", x.dtype)
    k = x.shape[-1]
    block = max(group_size or 0, BLOCK)
    if k == 0 or k % block:
        raise bad_value(op, "x", f"[..., K] with K a positive multiple of {block}", list(x.shape))
    if int8_activations and x.device.type == "cuda":
        raise bad_value(op, "activations", "'float' on CUDA (int8 is for the CPU)", "'int8'")

    n_groups = k // (group_size or k)
    if packed.dtype != torch.uint8:
        raise bad_type(op, "packed", torch.uint8, packed.dtype)
    if packed.dim() != 2 or packed.shape[0] == 0 or packed.shape[1] != k * bits // 8:
        raise bad_value(op, "packed", f"[N, {k * bits // 8}]", list(packed.shape))
    n = packed.shape[0]
    if scale.dtype not in FLOAT_DTYPES:
        raise bad_type(op, "scale", "float32, bfloat16 or float16", scale.dtype)
    if scale.shape != (n, n_groups):
        raise bad_value(op, "scale", f"[{n}, {n_groups}]", list(scale.shape))
    if zero_point is not None and zero_point.dtype != torch.uint8:
        raise bad_type(op, "zero_point", torch.uint8, zero_point.dtype)
    if zero_point is not None and zero_point.shape != scale.shape:
        raise bad_value(op, "zero_point", f"[{n}, {n_groups}]", list(zero_point.shape))
    if bias is not None and bias.dtype != x.dtype:
        raise bad_type(op, "bias", x.dtype, bias.dtype)
    if bias is not None and bias.shape != (n,):
        raise bad_value(op, "bias", f"[{n}]", list(bias.shape))
    for name, tensor in {
        "packed": packed,
        "scale": scale,
        "zero_point": zero_point,
        "bias": bias,
    }.items():
        if tensor is not None and tensor.device != x.device:
            raise bad_value(op, name, f"on {x.device}", tensor.device)
        if tensor is not None and name != "bias" and not tensor.is_contiguous():
            raise bad_value(op, name, "contiguous", f"strides {list(tensor.stride())}")


_quantized_matmul = register_op(
    "quantized_matmul(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, "
    "int bits, int? group_size, bool int8_activations) -> Tensor",
    check=check_quantized_matmul,
    reference=quantized_matmul_reference,
    launch=launch_quantized_matmul,
    launch_needs_triton=False,
    cpu=launch_quantized_matmul,
    fake=lambda x, packed, *_: x.new_empty((*x.shape[:-1], packed.shape[0])),
)


def quantized_matmul(
    x: Tensor,
    qweight: QuantizedWeight,
    bias: Tensor | None = None,
    activations: str | None = None,
) -> Tensor:
    """x W^T + bias with a weight from `quantize`.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides; no rows are fine.
        qweight: [N, K], on the device of x.
        bias: [N], dtype and device of x.
        activations: "float" takes x as it is; "int8" rounds it per row and group first (the module
            says how), which is what runs at the speed of a CPU, and is for the CPU only; None is
            "int8" on CPU and "float" elsewhere.

    Returns:
        [..., N], contiguous, dtype of x.

    Raises:
        ValueError: shapes, device or activations are wrong. TypeError: a dtype is.
    """
    if not isinstance(qweight, QuantizedWeight):
        raise bad_type("quantized_matmul", "qweight", "a QuantizedWeight", type(qweight).__name__)
    if activations is None:
        activations = "int8" if x.device.type == "cpu" else "float"
    if activations not in ACTIVATIONS:
        raise bad_value("quantized_matmul", "activations", "'int8', 'float' or None", activations)
    if x.dim() and x.shape[-1] != qweight.shape[1]:
        raise bad_value("quantized_matmul", "x", f"[..., {qweight.shape[1]}]", list(x.shape))
    return _quantized_matmul(
        x,
        qweight.packed,
        qweight.scale,
        qweight.zero_point,
        bias,
        qweight.bits,
        qweight.group_size,
        activations == "int8",
    )
