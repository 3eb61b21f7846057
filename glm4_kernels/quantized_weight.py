"""A weight in 4 or 8 bits, in the layout that the kernels of its device read.

    w = scale * (u - z)        u in 0 .. 2^bits - 1, unsigned, one (scale, z) per row and group

z is 2^(bits-1) throughout (symmetric, not stored), an integer 0..255, or a float. Two layouts,
drawn in csrc/quantized_weight.h, whose only Python is here: `tiles` on CPU (16 rows interleaved, so
that a vector of 16 lanes holds one column each), `rows` on CUDA. A weight is in one of them, never
in both: `from_codes` packs it once, `codes` and `dequantize` decode what the kernels read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from glm4_kernels.huge_pages import zeros_in_huge_pages
from glm4_kernels.library import FLOAT_DTYPES, bad_type, bad_value

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128, None)
# K is always a multiple of it.
BLOCK = 32
# Names of a `state_dict`.
STATE = frozenset(("codes", "scale", "zero_point", "order", "form"))
# Rows of a tile.
TILE = 16
# Weights are unpacked this many at a time: 16 MiB of scratch in fp32, whatever the matrix.
SLAB = 4 * 2**20


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight [N, K] of a linear layer, as `quantized_matmul` reads it. `from_codes` makes one.

    Attributes:
        packed: uint8, T = ceil(N / 16): [T, 16 * K * bits / 8] on CPU; [N, K * bits / 8] on CUDA.
        scale: float, G = K / group_size, or 1 per channel: [T, G, 16] on CPU; [N, G] on CUDA.
        zero_point: uint8 or float, shaped like scale; None where symmetric.
        bits: 4 or 8.
        group_size: 32, 64 or 128 weights of a row share a scale; None: the whole row.
        shape: (N, K).
        order: int64 [K] or None. Column k of the codes multiplies x[..., order[k]] (the act-order
            of GPTQ, whose groups are not neighbours in x).
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int | None
    shape: tuple[int, int]
    order: Tensor | None = None

    @classmethod
    def from_codes(
        cls,
        u: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bits: int,
        group_size: int | None,
        order: Tensor | None = None,
    ) -> QuantizedWeight:
        """Packs row-major codes for the device they are on.

        Args:
            u: uint8 [N, K], below 2^bits; K a multiple of 32 and of the group.
            scale: float [N, G]. zero_point: uint8 or float [N, G], or None for 2^(bits-1).
            order: int64 [K], a permutation, or None.

        Raises:
            ValueError, TypeError: a shape, dtype or value is wrong.
        """
        check_codes(u, scale, zero_point, bits, group_size, order)
        weight = cls.empty(
            (u.shape[0], u.shape[1]),
            *(bits, group_size, scale.dtype, None if zero_point is None else zero_point.dtype),
            device=u.device,
        )
        for rows in slabs(*weight.shape):
            weight.fill(
                rows, u[rows], scale[rows], zero_point if zero_point is None else zero_point[rows]
            )
        if order is not None and not torch.equal(order, unmoved(order)):
            weight = replace(weight, order=order.to(u.device))
        return weight

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        bits: int,
        group_size: int | None,
        scale_dtype: torch.dtype,
        zero_point_dtype: torch.dtype | None,
        device: torch.device | str,
    ) -> QuantizedWeight:
        """Memory for a weight, to be filled slab by slab (`fill`)."""
        n, k = shape
        device = torch.device(device)
        n_groups = k // (group_size or k)
        n_tiles = -(-n // TILE)
        if in_tiles(device):
            packed_shape, scale_shape = [n_tiles, TILE * k * bits // 8], [n_tiles, n_groups, TILE]
        else:
            packed_shape, scale_shape = [n, k * bits // 8], [n, n_groups]
        packed = zeros_in_huge_pages(packed_shape, torch.uint8, device)
        scale = torch.empty(scale_shape, dtype=scale_dtype, device=device)
        zero_point = None
        if zero_point_dtype is not None:
            zero_point = torch.empty(scale_shape, dtype=zero_point_dtype, device=device)
        return cls(packed, scale, zero_point, bits, group_size, (n, k))

    def fill(self, rows: slice, u: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
        """Packs the codes of `rows`, a slice of `slabs(*shape)`, into this weight's memory."""
        if not in_tiles(self.packed.device):
            self.packed[rows] = pack_rows(u, self.bits)
            self.scale[rows] = scale
            if self.zero_point is not None and zero_point is not None:
                self.zero_point[rows] = zero_point
            return
        tiles = slice(rows.start // TILE, rows.start // TILE + -(-len(u) // TILE))
        self.packed[tiles] = pack_tiles(u, self.bits)
        self.scale[tiles] = interleave(scale)
        if self.zero_point is not None and zero_point is not None:
            self.zero_point[tiles] = interleave(zero_point)

    def codes(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(u, scale, zero_point), row-major: what `from_codes` was given."""
        n = self.shape[0]
        if not in_tiles(self.packed.device):
            return unpack_rows(self.packed, self.bits), self.scale, self.zero_point
        zero_point = None if self.zero_point is None else separate(self.zero_point, n)
        return unpack_tiles(self.packed, self.bits)[:n], separate(self.scale, n), zero_point

    def state_dict(self) -> dict[str, Tensor]:
        """The weight as plain tensors, for `torch.save` and safetensors: row-major, so that another
        device can read them.

            save_file(qweight.state_dict(), "weight.safetensors")
            qweight = QuantizedWeight.from_state_dict(load_file("weight.safetensors"))

        `codes`: uint8, [N, K], or of 4 bits [N, K / 2], the first of two in the low half. `scale`:
        [N, G]. `zero_point`: [N, G], where there is one. `order`: int64 [K], where there is one.
        `form`: int64, bits and group_size (0 for None).
        """
        u, scale, zero_point = self.codes()
        if self.bits == 4:
            u = u[:, ::2] | u[:, 1::2] << 4
        state = {"codes": u, "scale": scale, "zero_point": zero_point, "order": self.order}
        tensors = {name: t.contiguous() for name, t in state.items() if t is not None}
        form = [self.bits, self.group_size or 0]
        return tensors | {"form": torch.tensor(form, dtype=torch.int64, device="cpu")}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> QuantizedWeight:
        """The weight of `state_dict`, packed for the device that its tensors are on.

        Raises:
            ValueError, TypeError: a name, shape, dtype or value is not one that `state_dict` gives;
            the file may be anybody's.
        """
        name = "from_state_dict"
        tensors = dict(state)
        if not {"codes", "scale", "form"} <= set(tensors) <= STATE:
            raise bad_value(name, "state", f"of {', '.join(sorted(STATE))}", sorted(tensors))
        for key, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
                raise bad_type(name, key, "a dense tensor", type(tensor).__name__)
            if not tensor.is_contiguous():  # a small file could claim any shape
                raise bad_value(name, key, "contiguous", f"strides {tensor.stride()}")
            if tensor.dtype in FLOAT_DTYPES and not tensor.isfinite().all():
                raise bad_value(name, key, "finite", "NaN or infinity")
            tensors[key] = tensor.detach()
        codes, scale, form = (tensors.pop(key) for key in ("codes", "scale", "form"))
        if form.shape != (2,) or form.dtype != torch.int64:
            raise bad_value(name, "form", "int64 [2]", f"{form.dtype} {list(form.shape)}")
        bits, group_size = form.tolist()
        if bits not in BITS:
            raise bad_value(name, "form", "of 4 or 8 bits", bits)
        if bits == 4:
            if codes.dtype != torch.uint8 or codes.dim() != 2:
                raise bad_value(name, "codes", "uint8 [N, K / 2]", f"{codes.dtype} {codes.dim()}-D")
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
        return cls.from_codes(
            *(codes, scale, tensors.get("zero_point"), bits, group_size or None),
            order=tensors.get("order"),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuilt, (self.state_dict(),)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, scales and zero points included."""
        tensors = (self.packed, self.scale, self.zero_point, self.order)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The weight on another device, in that device's layout."""
        device = torch.device(device)
        if in_tiles(device) == in_tiles(self.packed.device):
            packed, scale = self.packed.to(device), self.scale.to(device)
            zero_point, order = moved(self.zero_point, device), moved(self.order, device)
            return replace(self, packed=packed, scale=scale, zero_point=zero_point, order=order)
        u, scale, zero_point = self.codes()
        codes = u.to(device), scale.to(device), moved(zero_point, device)
        return self.from_codes(*codes, self.bits, self.group_size, moved(self.order, device))

    def __deepcopy__(self, memo: dict[int, object]) -> QuantizedWeight:
        packed = zeros_in_huge_pages(self.packed.shape, torch.uint8, self.packed.device)
        packed.copy_(self.packed)
        zero_point = None if self.zero_point is None else self.zero_point.clone()
        order = None if self.order is None else self.order.clone()
        return replace(
            self, packed=packed, scale=self.scale.clone(), zero_point=zero_point, order=order
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """scale * (u - z), [N, K] in x's order, computed in fp32 and rounded once to `dtype`
        (float32)."""
        n, k = self.shape
        weight = torch.empty(n, k, dtype=dtype or torch.float32, device=self.packed.device)
        for rows in slabs(n, k):
            part = rows if not in_tiles(self.packed.device) else tiles_of(rows)
            zero_point = None if self.zero_point is None else self.zero_point[part]
            slab = dequantize(
                self.packed[part], self.scale[part], zero_point, self.bits, torch.float32
            )
            weight[rows] = slab[: len(weight[rows])]
        if self.order is not None:
            weight = weight[:, self.order.argsort()]
        return weight


def moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def in_tiles(device: torch.device) -> bool:
    """Whether weights on `device` are in the layout `tiles`; else in `rows`."""
    return device.type != "cuda"


def unmoved(order: Tensor) -> Tensor:
    """The permutation that leaves everything in its place, beside `order`."""
    return torch.arange(len(order), dtype=torch.int64, device=order.device)


def rebuilt(state: dict[str, Tensor]) -> QuantizedWeight:
    """What `pickle` and `torch.save` store of a weight; `torch.load` takes both names:
    `torch.serialization.safe_globals([QuantizedWeight, rebuilt])`."""
    return QuantizedWeight.from_state_dict(state)


def slabs(n: int, k: int) -> Iterator[slice]:
    """The rows of an [n, k] matrix in slices of whole tiles, at most about `SLAB` weights."""
    rows = max(SLAB // k // TILE, 1) * TILE
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def tiles_of(rows: slice) -> slice:
    return slice(rows.start // TILE, -(-rows.stop // TILE))


def pad_rows(x: Tensor) -> Tensor:
    """Zero rows up to whole tiles."""
    missing = -len(x) % TILE
    return torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) if missing else x


def interleave(x: Tensor) -> Tensor:
    """[N, G] -> [T, G, 16]."""
    return pad_rows(x).unflatten(0, (-1, TILE)).transpose(1, 2)


def separate(x: Tensor, n: int) -> Tensor:
    """[T, G, 16] -> [N, G], the inverse of `interleave`."""
    return x.transpose(1, 2).flatten(0, 1)[:n]


def pack_tiles(u: Tensor, bits: int) -> Tensor:
    """uint8 [N, K] of values below 2^bits -> uint8 [T, 16 * K * bits / 8]."""
    tiles = pad_rows(u).unflatten(0, (-1, TILE))  # [T, 16, K]
    if bits == 8:
        return tiles.unflatten(2, (-1, 4)).transpose(1, 2).flatten(1)
    low, high = tiles.unflatten(2, (-1, 2, 4)).unbind(3)  # [T, 16, K / 8, 4]
    return (low | high << 4).transpose(1, 2).flatten(1)


def unpack_tiles(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_tiles`, with the rows that were added: uint8 [16 * T, K]."""
    quads = packed.unflatten(1, (-1, TILE, 4)).transpose(1, 2)  # [T, 16, blocks, 4]
    if bits == 4:
        quads = torch.stack((quads & 15, quads >> 4), dim=3).flatten(2, 3)
    return quads.flatten(2).flatten(0, 1)


def pack_rows(u: Tensor, bits: int) -> Tensor:
    """uint8 [N, K] of values below 2^bits -> uint8 [N, K * bits / 8]."""
    if bits == 8:
        return u.contiguous()
    low, high = u.unflatten(-1, (-1, 2, BLOCK // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_rows`."""
    if bits == 8:
        return packed
    block = packed.unflatten(-1, (-1, BLOCK // 2))
    return torch.stack((block & 15, block >> 4), dim=-2).flatten(-3)


def dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype
) -> Tensor:
    """scale * (u - z), computed in `dtype`, of tensors in their device's layout: [N, K], or whole
    tiles [16 * T, K]."""
    if in_tiles(packed.device):
        u = unpack_tiles(packed, bits)
        scale = separate(scale, len(u))
        zero_point = None if zero_point is None else separate(zero_point, len(u))
    else:
        u = unpack_rows(packed, bits)
    groups = u.unflatten(-1, (scale.shape[-1], -1)).to(dtype)
    z = 2 ** (bits - 1) if zero_point is None else zero_point.to(dtype).unsqueeze(-1)
    return (scale.to(dtype).unsqueeze(-1) * (groups - z)).flatten(-2)


def check_codes(
    u: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group_size: int | None,
    order: Tensor | None,
) -> None:
    name = "from_codes"
    if bits not in BITS:
        raise bad_value(name, "bits", "4 or 8", bits)
    if group_size not in GROUP_SIZES:
        raise bad_value(name, "group_size", "32, 64, 128 or None", group_size)
    block = max(group_size or 0, BLOCK)
    if u.dim() != 2 or u.numel() == 0 or u.shape[1] % block:
        expected = f"[N, K] with N at least 1 and K a multiple of {block}"
        raise bad_value(name, "u", expected, list(u.shape))
    if u.dtype != torch.uint8:
        raise bad_type(name, "u", torch.uint8, u.dtype)
    n, k = u.shape
    n_groups = k // (group_size or k)
    if scale.dtype not in FLOAT_DTYPES:
        raise bad_type(name, "scale", "float32, bfloat16 or float16", scale.dtype)
    for argument, tensor in {"scale": scale, "zero_point": zero_point}.items():
        if tensor is not None and tensor.shape != (n, n_groups):
            raise bad_value(name, argument, f"[{n}, {n_groups}]", list(tensor.shape))
        if tensor is not None and tensor.device != u.device:
            raise bad_value(name, argument, f"on {u.device}", tensor.device)
    if zero_point is not None and zero_point.dtype not in (torch.uint8, *FLOAT_DTYPES):
        expected = "uint8, float32, bfloat16 or float16"
        raise bad_type(name, "zero_point", expected, zero_point.dtype)
    if u.device.type != "meta":
        if bits == 4 and (largest := int(u.max())) > 15:
            raise bad_value(name, "u", "at most 15", largest)
        if order is not None and (
            order.shape != (k,)
            or order.dtype != torch.int64
            or not torch.equal(order.sort().values, unmoved(order))
        ):
            raise bad_value(name, "order", f"a permutation of 0 to {k - 1}", "something else")
