"""Linear layer with a 4- or 8-bit weight.

    y = x W^T + bias        W = scale * (u - z), per row and group of K

activations="float": x as it is, products and sums in fp32.
activations="int8": each row of x is first rounded to int8, a scale per group of A values of K:

    s = max|x| / 127        q = round_half_even(x * (1 / s))        x ~ s * q

A = min(weight group, ACTIVATION_GROUP) (the last group of a row may be shorter). Then

    y = sum over weight groups of scale * (sum over its A-groups of s * sum of q * (u - z)) + bias

with the innermost sums exact in int32 and the outer ones in fp32, in the order of K. The innermost
sum is of q * (u - h), h = 2^(bits-1), and a zero point adds (h - z) * sum of s * q after it.

swiglu: the rows of W are gate | up, y = silu(gate half) * up half, as `swiglu` rounds it.

Rounding points: s, 1 / s, x * (1 / s) and q as above (q = 0 where s is not a normal number); fp32
accumulation; bias added in fp32; one rounding to the dtype of x, and those of swiglu.

Bytes moved: N * K * bits / 8 + scales and zero points + (M * K + M * N) * itemsize; the floor is
that over the memory bandwidth for few rows, and 2 * M * N * K over the matmul peak for many.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from glm4_kernels.extension import (
    ABSENT,
    DTYPE_CODES,
    aligned,
    cuda_extension,
    extension,
)
from glm4_kernels.library import FLOAT_DTYPES, bad_type, bad_value, register_op
from glm4_kernels.quantize_rows import quantize_rows
from glm4_kernels.quantized_weight import (
    BITS,
    BLOCK,
    GROUP_SIZES,
    TILE,
    QuantizedWeight,
    dequantize,
)
from glm4_kernels.swiglu import launch_swiglu, swiglu_reference

ACTIVATIONS = ("int8", "float")
# Activations that share a scale, at most.
ACTIVATION_GROUP = 64


def quantize_activations(x: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """x [M, K] -> int8 [M, K], and the fp32 scales [M, ceil(K / A)]. A group that holds a NaN or an
    infinity gets that as its scale, so that the output shows it."""
    group = min(group_size or ACTIVATION_GROUP, ACTIVATION_GROUP)
    return quantize_rows(x.float(), torch.int8, group)


def quantized_matmul_reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    n: int,
    bits: int,
    group_size: int | None,
    int8_activations: bool,
    swiglu: bool,
) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    if int8_activations:
        qweight = QuantizedWeight(packed, scale, zero_point, bits, group_size, (n, x.shape[-1]))
        y = int8_product(rows, qweight, compute)
    else:
        y = rows.to(compute) @ dequantize(packed, scale, zero_point, bits, compute)[:n].t()
    if bias is not None:
        y = y + bias.to(compute)
    y = y.to(x.dtype).reshape(*x.shape[:-1], n)
    return swiglu_reference(y) if swiglu else y


def int8_product(x: Tensor, qweight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """x W^T with activations rounded to int8, [M, N], outer sums in `dtype`: step for step what the
    kernels do, so that in fp32 the bits are theirs."""
    q, step = quantize_activations(x, qweight.group_size)
    u, scale, zero_point = qweight.codes()
    middle = 2 ** (qweight.bits - 1)
    u, q, step, scale = (u.to(dtype) - middle).t(), q.to(dtype), step.to(dtype), scale.to(dtype)
    k, n = u.shape
    group = qweight.group_size or k
    chunk = min(group, ACTIVATION_GROUP)
    y = torch.zeros(len(x), n, dtype=dtype, device=x.device)
    for g in range(k // group):
        product, total = torch.zeros_like(y), y.new_zeros(len(x), 1)
        for start in range(g * group, (g + 1) * group, chunk):
            columns = slice(start, min(start + chunk, (g + 1) * group))
            s = step[:, start // chunk].unsqueeze(1)
            product = product + q[:, columns] @ u[columns] * s  # integers below 2^24: exact
            total = total + q[:, columns].sum(1, keepdim=True) * s
        if zero_point is not None:
            product = product - (zero_point[:, g].to(dtype) - middle) * total
        y = y + scale[:, g] * product
    return y


def launch_quantized_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    n: int,
    bits: int,
    group_size: int | None,
    int8_activations: bool,
    swiglu: bool,
    variant: str = "",
) -> Tensor:
    """The C++ kernel on CPU tensors (`variant`: its inner loops, of build_info()["cpu_variants"],
    the best by default), the CUDA kernel on CUDA tensors."""
    on_cpu = x.is_cpu
    fused = swiglu and on_cpu and n % (2 * TILE) == 0  # else tiles of gate and up do not pair
    *batch, k = x.shape
    columns = n // 2 if fused else n
    y = x.new_empty((*batch, columns))
    size = y.numel()
    if size:
        x = x.contiguous() if on_cpu else aligned(x)
        bias = None if bias is None else bias.contiguous()
        # Spelled out: a call at one token takes microseconds.
        problem: tuple[Any, ...] = (
            (y.data_ptr(), y.nbytes),
            (x.data_ptr(), x.nbytes),
            (packed.data_ptr(), packed.nbytes),
            (scale.data_ptr(), scale.nbytes),
            ABSENT if zero_point is None else (zero_point.data_ptr(), zero_point.nbytes),
            ABSENT if bias is None else (bias.data_ptr(), bias.nbytes),
            DTYPE_CODES[x.dtype],
            DTYPE_CODES[scale.dtype],
            0 if zero_point is None else DTYPE_CODES[zero_point.dtype],
            *(size // columns, n, k, bits, group_size or k),
        )
        if on_cpu:
            activation_group = ACTIVATION_GROUP if int8_activations else 0
            n_threads = torch.get_num_threads()
            extension().quantized_matmul_cpu(*problem, activation_group, fused, n_threads, variant)
        else:
            stream = torch.cuda.current_stream(x.device).cuda_stream
            cuda_extension().quantized_matmul_cuda(*problem, x.device.index, stream)
    if swiglu and not fused:
        y = swiglu_reference(y) if on_cpu else launch_swiglu(y)
    return y


def require_quantized_matmul(device: torch.device) -> None:
    """RuntimeError, which says how to build it, if this installation has no kernel for `device`."""
    if device.type == "cpu":
        extension()
    else:
        cuda_extension()


def check_quantized_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    n: int,
    bits: int,
    group_size: int | None,
    int8_activations: bool,
    swiglu: bool,
) -> None:
    op = "quantized_matmul"
    if bits not in BITS:
        raise bad_value(op, "bits", "4 or 8", bits)
    if group_size not in GROUP_SIZES:
        raise bad_value(op, "group_size", "32, 64, 128 or None", group_size)
    shape = x.shape
    if not shape:
        raise bad_value(op, "x", "[..., K]", [])
    if x.dtype not in FLOAT_DTYPES:
        raise bad_type(op, "x", "float32, bfloat16 or float16", x.dtype)
    k = shape[-1]
    block = max(group_size or 0, BLOCK)
    if k == 0 or k % block:
        raise bad_value(op, "x", f"[..., K] with K a positive multiple of {block}", list(shape))
    if int8_activations and x.is_cuda:
        raise bad_value(op, "activations", "'float' on CUDA (int8 is for the CPU)", "'int8'")

    if n < 1 or (swiglu and n % 2):
        raise bad_value(op, "n", "even with swiglu" if n > 0 else "at least 1", n)

    n_groups = k // (group_size or k)
    packed_shape: tuple[int, ...] = n, k * bits // 8
    scale_shape: tuple[int, ...] = n, n_groups
    if not x.is_cuda:
        n_tiles = -(-n // TILE)
        packed_shape, scale_shape = (n_tiles, TILE * k * bits // 8), (n_tiles, n_groups, TILE)
    if packed.dtype != torch.uint8:
        raise bad_type(op, "packed", torch.uint8, packed.dtype)
    check_memory(op, "packed", packed, x)  # first: the shape depends on the device
    if packed.shape != packed_shape:
        raise bad_value(op, "packed", list(packed_shape), list(packed.shape))
    if scale.dtype not in FLOAT_DTYPES:
        raise bad_type(op, "scale", "float32, bfloat16 or float16", scale.dtype)
    check_memory(op, "scale", scale, x)
    if scale.shape != scale_shape:
        raise bad_value(op, "scale", list(scale_shape), list(scale.shape))
    if zero_point is not None:
        if zero_point.dtype not in (torch.uint8, *FLOAT_DTYPES):
            expected = "uint8, float32, bfloat16 or float16"
            raise bad_type(op, "zero_point", expected, zero_point.dtype)
        if zero_point.shape != scale_shape:
            raise bad_value(op, "zero_point", list(scale_shape), list(zero_point.shape))
        check_memory(op, "zero_point", zero_point, x)
    if bias is not None:
        if bias.dtype != x.dtype:
            raise bad_type(op, "bias", x.dtype, bias.dtype)
        if bias.shape != (n,):
            raise bad_value(op, "bias", f"[{n}]", list(bias.shape))
        if bias.device != x.device:
            raise bad_value(op, "bias", f"on {x.device}", bias.device)


def check_memory(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    if not (tensor.is_cpu and x.is_cpu) and tensor.device != x.device:
        raise bad_value(op, name, f"on {x.device}", tensor.device)
    if not tensor.is_contiguous():
        raise bad_value(op, name, "contiguous", f"strides {list(tensor.stride())}")


_quantized_matmul = register_op(
    "quantized_matmul(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, "
    "int n, int bits, int? group_size, bool int8_activations, bool swiglu) -> Tensor",
    check=check_quantized_matmul,
    reference=quantized_matmul_reference,
    launch=launch_quantized_matmul,
    launch_needs_triton=False,
    cpu=launch_quantized_matmul,
    fake=lambda x, _packed, _scale, _zero_point, _bias, n, _bits, _group_size, _int8, swiglu: (
        x.new_empty((*x.shape[:-1], n // 2 if swiglu else n))
    ),
)


def int8_activation_error(x: Tensor, qweight: QuantizedWeight) -> float:
    """What int8 activations cost for this x [..., K] on the CPU: |y - y'| / |y'| in L2 norms, where
    y' has activations="float"; inf where either overflows."""
    exact = quantized_matmul(x, qweight, activations="float").double()
    error = (quantized_matmul(x, qweight, activations="int8").double() - exact).norm().item()
    if not math.isfinite(error):
        return math.inf
    return error / exact.norm().item() if error else 0.0


def quantized_matmul(
    x: Tensor,
    qweight: QuantizedWeight,
    bias: Tensor | None = None,
    activations: str | None = None,
    swiglu: bool = False,
) -> Tensor:
    """x W^T + bias with a weight from `quantize`.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides; no rows are fine.
        qweight: [N, K], on the device of x.
        bias: [N], dtype and device of x.
        activations: "float" takes x as it is; "int8" rounds it per row and group first (the module
            says how), which is what runs at the speed of a CPU, and is for the CPU only; None is
            "int8" on CPU and "float" elsewhere. "int8" loses what is small beside the largest of
            its group. Random x err by 0.6 % (|y - y'| / |y'|); with one channel of each 64 that is
            1000 times the others, and weights of 0 for it, by 86 %, with one of 4096 by 11 %.
            `int8_activation_error` measures it; take "float" where it is too much.
        swiglu: the rows of the weight are gate | up, and silu(gate) * up is returned.

    Returns:
        [..., N], or [..., N / 2] with swiglu; contiguous, dtype of x.

    Raises:
        ValueError: shapes, device or activations are wrong. TypeError: a dtype is.
    """
    if not isinstance(qweight, QuantizedWeight):
        raise bad_type("quantized_matmul", "qweight", "a QuantizedWeight", type(qweight).__name__)
    if not isinstance(x, Tensor):
        raise bad_type("quantized_matmul", "x", "a tensor", type(x).__name__)
    if activations is None:
        activations = "int8" if x.is_cpu else "float"
    if activations not in ACTIVATIONS:
        raise bad_value("quantized_matmul", "activations", "'int8', 'float' or None", activations)
    if x.dim() and x.shape[-1] != qweight.shape[1]:
        raise bad_value("quantized_matmul", "x", f"[..., {qweight.shape[1]}]", list(x.shape))
    if qweight.order is not None:
        x = x.index_select(-1, qweight.order)
    return _quantized_matmul(
        x,
        qweight.packed,
        qweight.scale,
        qweight.zero_point,
        bias,
        qweight.shape[0],
        qweight.bits,
        qweight.group_size,
        activations == "int8",
        swiglu,
    )
