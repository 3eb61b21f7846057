"""Weights as other tools quantise and store them, and as `glm4 quantize` does.

    w[n, k] = scale[n, g] * (u[n, k] - z[n, g])        g: the group of column k, one of G

Words are int32 and hold V = 32 / bits unsigned values, the lowest bits first; the axis along which
values follow each other in a word is the one that is shorter by V:

    compressed-tensors   weight_packed [N, K/V]   weight_scale [N, G]   weight_zero_point [N/V, G]
    (pack-quantized)     weight_shape [2] = N, K          weight_g_idx [K]: the group of each column
    GPTQ                 qweight [K/V, N]         scales [G, N]         qzeros [G, N/V]  g_idx [K]
    AWQ (gemm)           qweight [K, N/V]         scales [G, N]         qzeros [G, N/V]

compressed-tensors packs signed values, q + 2^(bits-1), so what is read is u and z as they are; up
to 0.9 it left zero points unpacked, int8 [N, G]. AWQ's word holds columns 0 2 4 6 1 3 5 7 of eight.
GPTQ's first format ("gptq", v1) stores z - 1, and its tools disagree on z = 0: AutoGPTQ writes ones
from that value upwards, over its neighbours in the word; GPTQModel subtracts 0x11111111 from the
word, which borrows. Here v1 is read value by value, (stored + 1) mod 2^bits, with a warning where
that may not be what was meant; what GPTQModel wrote, by the addition that undoes its subtraction.

Act-order (`g_idx`) scatters the members of a group over the row. Columns are sorted by group, which
makes groups contiguous again, and the order travels with the weight. Groups of any size that is a
multiple of 32 become groups of 128, 64 or 32, their scales repeated: the same numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import glm4_kernels as gk
from glm4.checkpoint_file import CheckpointError
from glm4.quantization_config import Quantization, Scheme, describe
from glm4.tensor_files import STORED_DTYPES, Stored
from glm4_kernels.quantized_weight import slabs

# Sizes that the kernels have; the rest of a row is one group.
GROUPS = (128, 64, 32)
AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)  # column j of eight lies in nibble AWQ_COLUMNS[j]


@dataclass(frozen=True)
class Codes:
    """A matrix as `gk.QuantizedWeight.from_codes` takes it.

    u: uint8 [N, K]. scale: float [N, G]. zero_point: uint8 or float [N, G], None: 2^(bits-1).
    group_size: 32, 64, 128, or None: G = 1. order: int64 [K]; column k of u multiplies
    x[..., order[k]]; None: in place.
    """

    u: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int | None
    order: Tensor | None = None


def parts_of(
    scheme: Scheme, n: int, k: int
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...], bool]]:
    """name: (shape, dtypes, required) of the tensors of a matrix [n, k]."""
    values = 32 // scheme.bits
    n_groups = -(-k // (scheme.group_size or k))
    words, floats = ("I32",), tuple(STORED_DTYPES)
    if scheme.format == "pack-quantized":
        asymmetric = scheme.symmetric is False
        return {
            "weight_packed": ((n, -(-k // values)), words, True),
            "weight_scale": ((n, n_groups), floats, True),
            "weight_zero_point": ((-(-n // values), n_groups), words, asymmetric),
            "weight_shape": ((2,), ("I64", "I32"), True),
            "weight_g_idx": ((k,), words, scheme.act_order),
        }
    awq = scheme.format == "awq"
    return {
        "qweight": ((k, -(-n // values)) if awq else (-(-k // values), n), words, True),
        "scales": ((n_groups, n), floats, True),
        "qzeros": ((n_groups, -(-n // values)), words, True),
        "g_idx": ((k,), words, scheme.act_order),
    }


@dataclass(frozen=True)
class QuantizedPart:
    """The quantised weight of one module on disk, its tensors checked but not read."""

    module: str
    scheme: Scheme
    shape: tuple[int, int]
    tensors: dict[str, Stored]

    def read(self) -> Codes:
        """Reads it; refuses values that cannot be, by the name of their tensor."""
        scheme, (n, k) = self.scheme, self.shape
        tensors = {name: stored.read() for name, stored in self.tensors.items()}
        if scheme.format == "pack-quantized":
            if tensors["weight_shape"].tolist() != [n, k]:
                raise self.bad("weight_shape", [n, k], tensors["weight_shape"].tolist())
            u, name = unpack_rows(tensors.pop("weight_packed"), scheme.bits, n, k), "weight_scale"
            scale, zero_point = tensors["weight_scale"], tensors.get("weight_zero_point")
            if zero_point is not None:
                zero_point = self.signed_zero_points(zero_point)
        else:
            unpack_weight = unpack_awq if scheme.format == "awq" else unpack_columns
            u, name = unpack_weight(tensors.pop("qweight"), scheme.bits, n, k), "scales"
            scale, zero_point = tensors["scales"].T, self.zero_points(tensors["qzeros"])
        if not scale.isfinite().all():
            raise self.bad(name, "finite", "NaN or infinite values")
        group = torch.arange(k, dtype=torch.int64, device="cpu") // (scheme.group_size or k)
        for name in ("g_idx", "weight_g_idx"):
            # compressed-tensors fills one that it does not use with -1.
            if name in tensors and not (tensors[name] == -1).all():
                group = tensors[name].long()
                low, high = group.min().item(), group.max().item()
                if low < 0 or high >= scale.shape[1]:
                    expected = f"from 0 to {scale.shape[1] - 1}"
                    raise self.bad(name, expected, f"{low} to {high}")
        return self.grouped(u, scale, zero_point, group)

    def signed_zero_points(self, stored: Tensor) -> Tensor:
        """weight_zero_point, int32 [N / V, G] or int8 [N, G] -> uint8 [N, G]."""
        bits = self.scheme.bits
        if stored.dtype == torch.int32:
            return unpack(stored.T, bits)[:, : self.shape[0]].T
        half, low, high = 2 ** (bits - 1), stored.min().item(), stored.max().item()
        if low < -half or high >= half:
            raise self.bad("weight_zero_point", f"from {-half} to {half - 1}", f"{low} to {high}")
        return (stored.to(torch.int16) + half).to(torch.uint8)

    def zero_points(self, words: Tensor) -> Tensor:
        """qzeros [G, N / V] -> uint8 [N, G]."""
        scheme, n = self.scheme, self.shape[0]
        stored = unpack(words, scheme.bits)
        if scheme.format == "awq":
            stored = stored.unflatten(1, (-1, 8))[..., AWQ_COLUMNS].flatten(1)
        elif scheme.format == "gptq" and scheme.borrows:
            stored = unpack(words + (0x11111111 if scheme.bits == 4 else 0x01010101), scheme.bits)
        elif scheme.format == "gptq":
            top = 2**scheme.bits - 1
            if (stored.unflatten(1, (words.shape[1], -1))[..., :-1] == top).any():
                warnings.warn(
                    f"{self.tensors['qzeros'].path}: some zero points are 0, which the first "
                    "format of GPTQ cannot store safely: those beside them may have been "
                    "overwritten when it was saved; a copy in format gptq_v2 has none of this",
                    stacklevel=2,
                )
            stored = (stored + 1) & top
        zero_point = stored[:, :n].T
        half = 2 ** (scheme.bits - 1)
        if scheme.symmetric and not (zero_point == half).all():
            other = zero_point[zero_point != half][0].item()
            raise self.bad(
                "qzeros", f"{half} throughout, as sym is true", f"{other}; see checkpoint_format"
            )
        return zero_point

    def grouped(self, u: Tensor, scale: Tensor, zero_point: Tensor | None, group: Tensor) -> Codes:
        """Codes in groups that the kernels have, out of any: `group` [K] is that of each column."""
        bits = self.scheme.bits
        if zero_point is not None and (zero_point == 2 ** (bits - 1)).all():
            zero_point = None
        order = None
        if (group.diff() < 0).any():
            order = group.argsort(stable=True)
            group = group[order]
            for rows in slabs(*u.shape):
                u[rows] = u[rows][:, order]
        if (group == group[0]).all():
            size = None
            first = group[:1]
        else:
            fitting = (
                size
                for size in GROUPS
                if len(group) % size == 0
                and (group.view(-1, size) == group.view(-1, size)[:, :1]).all()
            )
            size = next(fitting, None)
            if size is None:
                name = next((n for n in ("g_idx", "weight_g_idx") if n in self.tensors), None)
                sizes = sorted(set(group.bincount().tolist()))
                raise self.bad(
                    name or next(iter(self.tensors)),
                    "in groups of 32, 64, 128 or their multiples",
                    f"groups of {', '.join(str(size) for size in sizes)}",
                )
            first = group[::size]
        scale = scale[:, first].contiguous()
        zero_point = None if zero_point is None else zero_point[:, first].contiguous()
        return Codes(u, scale, zero_point, bits, size, order)

    def bad(self, name: str, expected: object, actual: object) -> CheckpointError:
        tensor = self.tensors[name]
        return CheckpointError(
            f"{tensor.path}: tensor {tensor.name} must be {expected}, got {actual}"
        )


def find_part(
    quantization: Quantization,
    module: str,
    shape: Sequence[int],
    tensors: dict[str, Stored],
    listing: Path,
) -> QuantizedPart | None:
    """The quantised weight [N, K] of `module`, taken out of `tensors`; None if it is not.

    Raises:
        CheckpointError: a part is missing, or not of the shape and dtype that the scheme asks.
    """
    mains = [f"{module}.{name}" for name in ("weight_packed", "qweight")]
    main = next((tensors[name] for name in mains if name in tensors), None)
    if main is None:
        return None
    scheme = quantization.scheme(module)
    if scheme is None:
        raise CheckpointError(
            f"{main.path}: tensor {main.name} is unexpected: {quantization.path.name} describes no "
            "quantization of it"
        )
    n, k = shape
    if k % 32:
        raise CheckpointError(
            f"{main.path}: tensor {main.name} must have a multiple of 32 columns, got {k}"
        )
    found: dict[str, Stored] = {}
    for name, (expected, dtypes, required) in parts_of(scheme, n, k).items():
        tensor = tensors.pop(f"{module}.{name}", None)
        if tensor is None:
            if required:
                raise CheckpointError(
                    f"{listing}: tensor {module}.{name} {list(expected)} is missing"
                )
            continue
        if name == "weight_zero_point" and tensor.dtype == "I8":
            expected, dtypes = parts_of(scheme, n, k)["weight_scale"][0], ("I8",)
        if tensor.shape != expected:
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name} must be {list(expected)} ({describe(scheme)}"
                f" of a matrix {[n, k]}), got {list(tensor.shape)}"
            )
        if tensor.dtype not in dtypes:
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name} must be {' or '.join(dtypes)}, "
                f"got {tensor.dtype}"
            )
        found[name] = tensor
    return QuantizedPart(module, scheme, (n, k), found)


def read_quantized(parts: Sequence[QuantizedPart], device: torch.device) -> gk.QuantizedWeight:
    """One matrix whose rows are those of `parts`, in the layout of the device's kernels."""
    codes = [part.read() for part in parts]
    for part, one in zip(parts, codes, strict=True):
        orders = [x.order for x in (codes[0], one) if x.order is not None]
        if orders and not (len(orders) == 2 and torch.equal(*orders)):
            raise CheckpointError(
                f"{next(iter(part.tensors.values())).path}: the act-order (g_idx) of {part.module} "
                f"must be that of {parts[0].module}, whose input it shares, got another"
            )
    one = codes[0] if len(codes) == 1 else concatenated(codes)
    u, scale = one.u.to(device), one.scale.to(device)
    zero_point = None if one.zero_point is None else one.zero_point.to(device)
    order = None if one.order is None else one.order.to(device)
    return gk.QuantizedWeight.from_codes(u, scale, zero_point, one.bits, one.group_size, order)


def concatenated(codes: Sequence[Codes]) -> Codes:
    """The rows of all, in the smallest of their groups and the most of their bits: exact."""
    k = codes[0].u.shape[1]
    bits = max(one.bits for one in codes)
    size = min(one.group_size or k for one in codes)
    dtypes = {one.scale.dtype for one in codes}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    symmetric = all(one.zero_point is None and one.bits == bits for one in codes)
    scales, zero_points = [], []
    for one in codes:
        repeats = (one.group_size or k) // size
        zero_point = one.zero_point
        if zero_point is None:
            half = 2 ** (one.bits - 1)
            zero_point = torch.full_like(one.scale, half, dtype=torch.uint8)
        scales.append(one.scale.to(dtype).repeat_interleave(repeats, dim=1))
        zero_points.append(zero_point.repeat_interleave(repeats, dim=1))
    return Codes(
        torch.cat([one.u for one in codes]),
        torch.cat(scales),
        None if symmetric else torch.cat(zero_points),
        bits,
        None if size == k else size,
        codes[0].order,
    )


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [R, C] -> uint8 [R, C * 32 / bits]: the values of each word, the lowest first."""
    data = words.contiguous().view(torch.uint8)
    if bits == 8:
        return data
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(1)


def pack(values: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack`; the last word of a row is filled up with zeros."""
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % (32 // bits)))
    if bits == 4:
        low, high = values.unflatten(1, (-1, 2)).unbind(-1)
        values = low | high << 4
    return values.contiguous().view(torch.int32)


def unpack_rows(words: Tensor, bits: int, n: int, k: int) -> Tensor:
    """int32 [N, K / V] -> uint8 [N, K]."""
    u = words.new_empty((n, k), dtype=torch.uint8)
    for rows in slabs(n, k):
        u[rows] = unpack(words[rows], bits)[:, :k]
    return u


def unpack_columns(words: Tensor, bits: int, n: int, k: int) -> Tensor:
    """int32 [K / V, N] -> uint8 [N, K]."""
    return unpack_rows(words.T, bits, n, k)


def unpack_awq(words: Tensor, bits: int, n: int, k: int) -> Tensor:
    """int32 [K, N / 8] -> uint8 [N, K]."""
    n_words = words.shape[1]
    u = words.new_empty((n_words, 8, k), dtype=torch.uint8)
    for columns in slabs(n_words, 8 * k):
        values = unpack(words[:, columns], bits)  # [K, 8 * C]
        u[columns] = values.unflatten(1, (-1, 8))[..., AWQ_COLUMNS].permute(1, 2, 0)
    return u.flatten(0, 1)[:n]


def pack_quantized(codes: Codes) -> dict[str, Tensor]:
    """The tensors of a pack-quantized module, under their names in it; integer zero points only."""
    n, k = codes.u.shape
    tensors = {
        "weight_packed": pack(codes.u, codes.bits),
        "weight_scale": codes.scale.contiguous(),
        "weight_shape": torch.tensor([n, k], dtype=torch.int64, device="cpu"),
    }
    if codes.zero_point is not None:
        words = pack(codes.zero_point.T, codes.bits)
        tensors["weight_zero_point"] = words.T.contiguous()
    return tensors
