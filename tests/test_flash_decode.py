from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from numerics import KERNEL_DTYPES, assert_bitwise_equal, assert_within_rule
from torch import Tensor

import glm4_kernels as gk
from glm4_kernels.decode_schedule import (
    launch_decode_schedule,
    parts_of,
    row_tiles,
)
from glm4_kernels.extension import buffer, build_info, extension
from glm4_kernels.flash_decode import (
    E4M3_TO_BF16,
    INT8_TO_BF16,
    flash_decode_cpu,
    flash_decode_reference,
    launch_flash_decode,
    launch_plan,
)
from glm4_kernels.library import raise_device_errors

GARBAGE_PAGE = 2**31 - 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # compiled kernels: bf16 runs anywhere
VARIANTS = build_info().get("flash_decode_variants", [])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@dataclass(frozen=True)
class Problem:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    scale: float
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def args(self) -> tuple:
        return tuple(vars(self).values())


def problem(
    lengths,
    device,
    *,
    heads=(32, 2),
    queries=None,
    head_dim=64,
    page_size=64,
    dtype=torch.float16,
    cache_dtype=None,
    room=0,
) -> Problem:
    """Random tokens in shuffled pages; whatever lies past a length is NaN, or a page that is not
    there. `queries` None makes q [B, H, D]; cache and table have room for `room` tokens at least.

    Scores have deviation 0.7: out then errs by less than the rule allows in fp32 too, where the
    error of p is that of the scores, eps * |s|, in the reference as in the kernel.
    """
    n_heads, kv_heads = heads
    used = [-(-n // page_size) for n in lengths]
    most = [-(-max(n, room) // page_size) for n in lengths]
    n_pages = sum(most) + 1
    table = torch.full((len(lengths), max(most) + 1), GARBAGE_PAGE, dtype=torch.int32)
    shape = (n_pages, kv_heads, page_size, head_dim)
    k, v = torch.full((2, *shape), math.nan)
    pages = iter(torch.randperm(n_pages).tolist())
    for b, length in enumerate(lengths):
        for j in range(used[b]):
            table[b, j] = page = next(pages)
            live = min(length - j * page_size, page_size)
            k[page, :, :live] = torch.randn(kv_heads, live, head_dim)
            v[page, :, :live] = torch.randn(kv_heads, live, head_dim)

    scales: dict[str, Tensor] = {}
    if cache_dtype is not None:
        limit = 127 if cache_dtype == torch.int8 else 448
        k_scale, v_scale = (x.abs().amax(-1) / limit for x in (k, v))  # NaN past the lengths
        k, v = (x / scale[..., None] for x, scale in ((k, k_scale), (v, v_scale)))
        if cache_dtype == torch.int8:
            k, v = k.round().nan_to_num(127), v.round().nan_to_num(127)
        scales = {"k_scale": k_scale.to(device), "v_scale": v_scale.to(device)}
    q_shape = (len(lengths), *([] if queries is None else [queries]), n_heads, head_dim)
    return Problem(
        torch.randn(q_shape).to(dtype).to(device),
        k.to(cache_dtype or dtype).to(device),
        v.to(cache_dtype or dtype).to(device),
        table.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        0.7 / math.sqrt(head_dim),
        **scales,
    )


def oracle(p: Problem) -> tuple[Tensor, Tensor]:
    """fp64, one sequence, row and head at a time; the key list is walked token by token."""
    rows = (p.q if p.q.dim() == 4 else p.q.unsqueeze(1)).double().cpu()
    k_cache, v_cache = p.k_cache.cpu().double(), p.v_cache.cpu().double()
    if p.k_scale is not None:
        k_cache = k_cache * p.k_scale.cpu().double()[..., None]
        v_cache = v_cache * p.v_scale.cpu().double()[..., None]
    n_queries, n_heads = rows.shape[1:3]
    kv_heads, page_size = k_cache.shape[1:3]
    table = p.block_table.tolist()
    out, lse = torch.zeros_like(rows), torch.full(rows.shape[:3], -math.inf).double()
    for b, length in enumerate(p.seq_lens.tolist()):
        for h in range(n_heads):
            g = h * kv_heads // n_heads
            tokens = [(table[b][t // page_size], g, t % page_size) for t in range(length)]
            for i in range(n_queries):
                visible = max(length - n_queries + i + 1, 0)
                if visible == 0:
                    continue
                k = torch.stack([k_cache[token] for token in tokens[:visible]])
                v = torch.stack([v_cache[token] for token in tokens[:visible]])
                s = k @ rows[b, i, h] * p.scale
                lse[b, i, h] = s.logsumexp(0)
                out[b, i, h] = s.softmax(0) @ v
    return out.view(p.q.shape), lse.view(p.q.shape[:-1])


def assert_right(actual, p: Problem, truth=None) -> None:
    (out, lse), (true_out, true_lse) = actual, truth or oracle(p)
    reference_out, reference_lse = flash_decode_reference(*p.args)
    assert_within_rule(out, reference_out, true_out)
    assert lse.dtype == torch.float32
    seen = true_lse > -math.inf
    assert (lse.cpu()[~seen] == -math.inf).all()
    # One row: where an lse is near zero, its error is that of the scores it sums.
    assert_within_rule(lse.cpu()[seen], reference_lse.cpu()[seen], true_lse[seen])


def schedule_for(p: Problem, programs: int, batch_invariant: bool = False) -> Tensor:
    n_queries = p.q.shape[1] if p.q.dim() == 4 else 1
    sizes = (p.q.shape[-2], p.k_cache.shape[1], n_queries, batch_invariant, programs)
    return launch_decode_schedule(p.seq_lens, *sizes)


def attend(p: Problem, programs: int = 5, batch_invariant: bool = False) -> tuple[Tensor, Tensor]:
    """The Triton kernels with few programs a KV head: the interpreter runs them one by one."""
    schedule = schedule_for(p, programs, batch_invariant)
    return launch_flash_decode(*p.args, schedule, batch_invariant)


def n_splits(p: Problem, programs: int, batch_invariant: bool = False) -> list[int]:
    schedule = schedule_for(p, programs, batch_invariant)
    return parts_of(schedule, len(p.seq_lens), programs)[2][:, 0].tolist()


CACHE_DTYPES = (None, torch.int8, torch.float8_e4m3fn)
HEADS = [
    (2, 2),  # no grouping: one row of 16
    (6, 2),  # group 3
    (12, 2),  # group 6: GLM-4-32B-Rumination
    (32, 4),  # group 8: GLM-4-9B-Chat-1M
    (12, 1),  # group 12, one KV head
    (32, 2),  # group 16: GLM-4-9B
    (48, 2),  # group 24: GLM-4-32B; a tile of 16 would straddle the KV heads
    (96, 4),  # the same, twice
    (32, 1),  # group 32: the limit
]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_matches_reference(heads, head_dim, dtype, device):
    p = problem([65, 0, 130], device, heads=heads, head_dim=head_dim, dtype=dtype)
    assert_right(attend(p, programs=1), p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [None, 4])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_reference_matches_fp64(cache_dtype, queries, dtype):
    p = problem(
        [2, 100, 0], "cpu", heads=(6, 2), queries=queries, dtype=dtype, cache_dtype=cache_dtype
    )
    truth, true_lse = oracle(p)
    out, lse = flash_decode_reference(*p.args)
    # One rounding to the dtype, and fp32 sums over 100 keys and 64 dims before it.
    allowed = torch.finfo(dtype).eps / 2 + 100 * torch.finfo(torch.float32).eps
    assert ((out - truth).abs() <= allowed * truth.abs().amax(-1, keepdim=True)).all()
    torch.testing.assert_close(lse, true_lse.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_edges(dtype, device):
    p = problem([0, 1, 63, 64, 65, 200], device, heads=(6, 2), dtype=dtype)
    out, lse = attend(p)
    assert_right((out, lse), p)
    assert (out[0] == 0).all() and (lse[0] == -math.inf).all()


def test_nothing_to_do(device):
    p = problem([3], device)
    none = replace(p, q=p.q[:0], block_table=p.block_table[:0], seq_lens=p.seq_lens[:0])
    assert [x.shape for x in launch_flash_decode(*none.args)] == [(0, 32, 64), (0, 32)]
    no_pages = replace(p, block_table=p.block_table[:, :0], seq_lens=p.seq_lens * 0)
    assert_right(attend(no_pages), no_pages)


QUERIES = [
    (1, (6, 2)),  # as [B, 1, H, D]
    (2, (6, 2)),
    (3, (6, 2)),
    (5, (6, 2)),
    (7, (6, 2)),
    (8, (6, 2)),
    (4, (16, 1)),  # 64 rows
    (8, (24, 1)),  # 192 rows: two tiles of 128, the second half empty
]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("queries, heads", QUERIES, ids=str)
def test_causal_queries(queries, heads, dtype, device):
    # 2: fewer keys than queries. 66: some rows see into the second page, some do not.
    p = problem([2, 66, 0], device, heads=heads, queries=queries, dtype=dtype)
    assert_right(attend(p, programs=1), p)


@pytest.mark.parametrize("programs", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("queries, head_dim", [(None, 128), (3, 64)])
def test_splits(queries, head_dim, programs, device):
    p = problem([0, 450, 65, 0, 129, 1], device, heads=(6, 2), queries=queries, head_dim=head_dim)
    assert (max(n_splits(p, programs)) > 1) == (programs > 2)
    assert_right(attend(p, programs), p)


def test_last_split_of_few_keys(device):
    """Of 8 causal queries, most see nothing of the last split, which holds one key."""
    p = problem([65, 66, 200], device, heads=(6, 2), queries=8)
    p = replace(p, seq_lens=p.seq_lens[:1], q=p.q[:1], block_table=p.block_table[:1])
    schedule = by_hand(p, [[(0, 0, 1)], [(0, 1, 2)]])
    assert_right(launch_flash_decode(*p.args, schedule), p)


def by_hand(p: Problem, runs: list[list[tuple[int, int, int]]]) -> Tensor:
    """A schedule for one sequence: (sequence, first unit, end unit) of each program."""
    programs = len(runs)
    schedule = torch.zeros(2 * programs + 2, 4, dtype=torch.int32)
    for i, ((sequence, first, end),) in enumerate(runs):
        schedule[2 * i] = torch.tensor([sequence, first, end, i])
    schedule[-1] = torch.tensor([programs, 0, 0, runs[-1][-1][2]])
    return schedule.to(p.q.device)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@pytest.mark.parametrize("queries", [None, 3])
def test_batch_invariant(queries, cache_dtype, device):
    """No bit of a sequence's result depends on the batch, its place in it or the programs."""
    lengths = [1100, 65, 0, 300, 1, 640]
    p = problem(lengths, device, heads=(6, 2), queries=queries, cache_dtype=cache_dtype)
    assert n_splits(p, 3, batch_invariant=True) == [5, 1, 0, 2, 1, 3]
    together = attend(p, 3, batch_invariant=True)
    assert_right(together, p)
    for rows in ([0], [5, 0], [3, 4, 2, 1], [4] * 20 + [0]):
        index = torch.tensor(rows, device=device)
        some = replace(
            p, q=p.q[index], block_table=p.block_table[index], seq_lens=p.seq_lens[index]
        )
        for programs in (2, 7):
            for whole, part in zip(together, attend(some, programs, True), strict=True):
                assert_bitwise_equal(part, whole[index])


def test_schedule_is_made_where_none_is_given(device):
    p = problem([200, 65, 0], device, heads=(6, 2))
    for batch_invariant in (False, True):
        schedule = launch_decode_schedule(p.seq_lens, 6, 2, 1, batch_invariant)
        given = launch_flash_decode(*p.args, schedule, batch_invariant)
        made = launch_flash_decode(*p.args, batch_invariant=batch_invariant)
        assert_right(made, p)
        for a, b in zip(given, made, strict=True):
            assert_bitwise_equal(a, b)


def test_one_buffer_serves_every_length(device):
    """As in a captured graph: the same grid and the same memory, other lengths."""
    p = problem([450, 130, 65, 3], device, heads=(6, 2))
    schedule = schedule_for(p, 6)
    for lengths in ([450, 130, 65, 3], [0, 0, 0, 0], [1, 64, 0, 2], [450, 0, 0, 0]):
        p.seq_lens.copy_(torch.tensor(lengths))
        schedule.copy_(schedule_for(p, 6))
        assert_right(launch_flash_decode(*p.args, schedule), p)


def test_bad_schedules_are_reported(device):
    """What a CUDA tensor cannot check at the door: nothing outside the tensors is read or written,
    and sequences that the schedule was not made for give zeros."""
    p = problem([450, 65, 0], device, heads=(6, 2))
    right = schedule_for(p, 5)
    stale = replace(p, seq_lens=with_entry(p.seq_lens, 0, 300))
    out, lse = launch_flash_decode(*stale.args, right)
    assert (out[0] == 0).all() and (lse[0] == -math.inf).all()
    with pytest.raises(IndexError, match="flash_decode"):
        raise_device_errors(device)
    grown = replace(p, seq_lens=with_entry(p.seq_lens, 0, 449))  # as many units: still right
    assert_right(launch_flash_decode(*grown.args, right), grown)
    raise_device_errors(device)
    for value in (-(2**31), -2, 2**31 - 1):
        for column in range(4):
            bad = right.clone()
            bad[:, column] = value
            launch_flash_decode(*p.args, bad)
            with pytest.raises(IndexError, match="flash_decode"):
                raise_device_errors(device)


@needs_gpu
@pytest.mark.parametrize("batch", [1, 5])
def test_dependent_launch_waits_for_what_it_reads(batch, device):
    """A producer that is slow to write q, K, V, the table and the lengths, then the partial kernel,
    then the combine, each launched before the one before it ends; whoever reads too early reads the
    last replay's inputs, and a combine its partials."""
    if torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("programmatic dependent launch needs sm_90")
    inputs = race_inputs(batch, device)
    expected = [launch_flash_decode(*p.args, pdl=False) for p in inputs]
    static = replace(
        inputs[0], **{n: x.clone() for n, x in vars(inputs[0]).items() if n in WRITTEN}
    )
    sources = [torch.empty_like(x) for x in written(static)]
    launch_flash_decode(*static.args, pdl=True)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = []
        for _ in range(4):  # layers: a combine is followed by the next producer
            for target in written(static):
                target.zero_()
            for target, source in zip(written(static), sources, strict=True):
                target.copy_(source)
            results.append(launch_flash_decode(*static.args, pdl=True))
    for i in range(400):
        which = i % len(inputs)
        for source, value in zip(sources, written(inputs[which]), strict=True):
            source.copy_(value)
        graph.replay()
        for out, lse in results:
            assert torch.equal(out, expected[which][0]) and torch.equal(lse, expected[which][1])


def race_inputs(batch, device) -> list[Problem]:
    """63 and 64 units of keys: the schedule changes too."""
    options = {"dtype": torch.bfloat16, "head_dim": 128, "room": 4096}
    return [problem([length] * batch, device, **options) for length in (4000, 4095, 3969, 4050)]


@pytest.mark.parametrize("batch", [1, 5])
def test_inputs_of_the_race_fit_one_graph(batch):
    shapes = {tuple(x.shape for x in written(p)) for p in race_inputs(batch, "cpu")}
    assert len(shapes) == 1


WRITTEN = ("q", "k_cache", "v_cache", "block_table", "seq_lens")


def written(p: Problem) -> list[Tensor]:
    return [getattr(p, name) for name in WRITTEN]


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_query_rows_are_padded_little(capability):
    """One query of GLM-4's groups to no more than the next 16; any number of rows to less than
    twice as many, or 8, in as many tiles as `programs_per_kv_head` reckons with."""
    for n_rows in range(1, 257):
        for kv_bytes in (1, 2):
            block_m, *_ = launch_plan(n_rows, 2, kv_bytes, capability)
            padded = -(-n_rows // block_m) * block_m
            assert padded < max(2 * n_rows, 9)
            assert padded // block_m <= row_tiles(n_rows, capability, kv_bytes == 1)
            if n_rows in (6, 8, 12, 16, 24):
                assert padded <= -(-n_rows // 16) * 16


@pytest.mark.parametrize("page_size", [16, 32, 128, 256])
def test_page_sizes(page_size, device):
    p = problem([page_size + 1, 2 * page_size, 7], device, heads=(6, 2), page_size=page_size)
    assert_right(attend(p), p)


def strided(x: Tensor) -> Tensor:
    """The same values, every second element of a wider tensor."""
    return torch.stack([x, x], dim=-1)[..., 0]


@pytest.mark.parametrize("layout", ["q strided", "q of qkv", "kv slices", "token-major", "indices"])
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_layouts(layout, cache_dtype, device):
    p = problem([65, 3], device, heads=(6, 2), queries=2, cache_dtype=cache_dtype)
    if layout == "q strided":
        p = replace(p, q=strided(p.q))
    elif layout == "q of qkv":
        p = replace(p, q=torch.cat([p.q, p.q], dim=2)[:, :, :6])
    elif layout == "kv slices":
        k, v = torch.stack([p.k_cache, p.v_cache], dim=1).unbind(1)
        p = replace(p, k_cache=k, v_cache=v[:])
        if cache_dtype is not None:
            k_scale, v_scale = torch.stack([p.k_scale, p.v_scale], dim=1).unbind(1)
            p = replace(p, k_scale=k_scale, v_scale=v_scale)
    elif layout == "token-major":
        p = replace(p, k_cache=p.k_cache.transpose(1, 2).contiguous().transpose(1, 2))
    else:
        p = replace(p, block_table=strided(p.block_table), seq_lens=strided(p.seq_lens))
    assert_right(attend(p), p)
    assert_right(torch.ops.glm4_kernels.flash_decode(*p.args), p)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("queries", [None, 3])
def test_int8_cache(queries, dtype, device):
    p = problem(
        [65, 0, 130], device, heads=(6, 2), queries=queries, dtype=dtype, cache_dtype=torch.int8
    )
    assert_right(attend(p), p)


def run_ptx(text: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the inline PTX makes of uint32 `x`: its steps one by one, as the PTX manual has them."""
    registers = {"$2": x.astype(np.uint32)}

    def value(operand: str) -> np.ndarray:
        if operand.startswith("0x") or operand.isdigit():
            return np.full(x.shape, int(operand, 0), np.uint32)
        return registers[operand]

    def halves_of_bf16(operand: str) -> list[np.ndarray]:
        both = value(operand)
        return [(half << 16).view(np.float32) for half in (both & 0xFFFF, both >> 16)]

    def to_bf16(wide: np.ndarray) -> np.ndarray:
        rounded = torch.from_numpy(wide.astype(np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)

    for line in text.strip("{} \n").splitlines():
        step, _, operands = line.strip(" ;").partition(" ")
        if step == ".reg":
            continue
        target, *sources = re.findall(r"\{.*?\}|[^\s,]+", operands)
        if step == "lop3.b32":
            a, b, c = (value(source) for source in sources[:3])
            table, out = int(sources[3], 0), np.zeros_like(x)
            for i in range(8):
                terms = [v if i >> n & 1 else ~v for n, v in ((2, a), (1, b), (0, c))]
                out |= (terms[0] & terms[1] & terms[2]) * np.uint32(table >> i & 1)
        elif step == "shr.u32":
            out = value(sources[0]) >> value(sources[1])
        elif step == "fma.rn.bf16x2":
            low, high = zip(*map(halves_of_bf16, sources), strict=True)
            out = to_bf16(low[0] * low[1] + low[2]) | to_bf16(high[0] * high[1] + high[2]) << 16
        elif step == "cvt.rn.f16x2.e4m3x2":
            pair = value(sources[0]).astype(np.uint16).view(np.uint8)
            half = torch.from_numpy(pair.copy()).view(torch.float8_e4m3fn).half().numpy()
            out = half.view(np.uint32)
        elif step == "cvt.f32.f16":
            out = value(sources[0]).astype(np.uint16).view(np.float16).astype(np.float32)
        elif step == "cvt.rn.bf16x2.f32":  # the first source is the upper half
            out = to_bf16(value(sources[0])) << 16 | to_bf16(value(sources[1]))
        elif step == "mov.b32" and target.startswith("{"):
            names = re.findall(r"\w+", target)
            registers[names[0]], out = value(sources[0]) & 0xFFFF, value(sources[0]) >> 16
            target = names[1]
        else:
            assert step == "mov.b32", line
            out = value(sources[0])
        registers[target] = out
    return registers["$0"], registers["$1"]


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn])
def test_inline_ptx_converts_every_value(cache_dtype):
    """Every byte in every place of a register, beside every other byte, comes out as what it is."""
    ptx = INT8_TO_BF16 if cache_dtype == torch.int8 else E4M3_TO_BF16
    pairs = np.arange(2**16, dtype=np.uint32)
    for packed in (pairs | pairs[::-1] << 16, pairs << 16 | pairs * 257 % 2**16):
        values = torch.from_numpy(packed.view(np.uint8).copy()).view(cache_dtype).float()
        values = values.view(-1, 4)  # the bytes of a register, lowest first
        low, high = run_ptx(ptx.value, packed)
        for register, expected in ((low, values[:, ::2]), (high, values[:, 1::2])):
            converted = torch.from_numpy(register.view(np.int16).copy()).view(torch.bfloat16)
            torch.testing.assert_close(
                converted.float().view(-1, 2), expected, rtol=0, atol=0, equal_nan=True
            )


def test_every_value_of_a_quantized_cache(device):
    """k = 0 and one key: out is v. Every int8; on a GPU this is the inline PTX."""
    values = torch.arange(-128, 128).to(torch.int8).view(2, 1, 1, 128)
    v = values.expand(2, 1, 16, 128).contiguous().to(device)
    ones = torch.ones(2, 1, 16, device=device)
    for dtype in KERNEL_DTYPES:
        table = torch.arange(2, dtype=torch.int32, device=device).view(2, 1)
        lengths = torch.ones(2, dtype=torch.int32, device=device)
        q = torch.ones(2, 1, 128, dtype=dtype, device=device)
        cache = (torch.zeros_like(v), v, table, lengths)
        out, _ = launch_flash_decode(q, *cache, 1.0, ones, ones)
        assert torch.equal(out.flatten().float().cpu(), values.flatten().float())


def in_double(p: Problem) -> tuple[Tensor, Tensor]:
    """The reference in fp64, which test_reference_matches_fp64 ties to the slow oracle."""
    double = {
        name: x.double() for name, x in vars(p).items() if name in ("q", "k_cache", "v_cache")
    }
    out, lse = flash_decode_reference(*replace(p, **double).args)
    return out.cpu(), lse.cpu()


def assert_cpu_right(p: Problem, variant: str) -> None:
    actual, truth = flash_decode_cpu(*p.args, variant=variant), in_double(p)
    lse_allowed = rounding_of_q(p) if variant == "avx512_bf16" else 0.0
    if lse_allowed == 0.0:
        return assert_right(actual, p, truth)
    (out, lse), (true_out, true_lse) = actual, truth
    assert_within_rule(out, flash_decode_reference(*p.args)[0], true_out)
    unseen = true_lse == -math.inf
    assert (lse[unseen] == -math.inf).all()
    error = (lse - true_lse)[~unseen].abs()
    assert (error <= lse_allowed + 4e-7 * true_lse[~unseen].abs()).all()


def rounding_of_q(p: Problem) -> float:
    """The largest error of a score where q is rounded to 16-bit integers: values below a 128th of
    their row's largest err by half a step, 2^-15 of that largest."""
    if p.q.dtype != torch.bfloat16 or p.k_cache.dtype != torch.int8:
        return 0.0
    q = p.q.double().abs()
    largest = q.amax(-1)
    n_rounded = ((q > 0) & (q < largest.unsqueeze(-1) / 128)).sum(-1)
    k = 127 * p.k_scale.double().nan_to_num(0).max()
    return float((n_rounded * largest).max() * 2**-15 * k * p.scale)


def one_key_takes_all(device, dtype=torch.float16) -> Problem:
    """One key takes nearly all the mass and has v = 0, so out is the rest: 199 keys of p = 2e-3
    and v_scale = 1e-3, whose products are subnormal in fp16."""
    p = problem([200], device, heads=(2, 2), cache_dtype=torch.int8, dtype=dtype)
    p.q.copy_(torch.full_like(p.q, 0.125))
    p.k_cache.fill_(0)
    p.k_scale.fill_(1.0)
    p.v_scale.fill_(1e-3)
    page = p.block_table[0, 0]
    p.k_cache[page, :, 5] = 1
    p.v_cache[page, :, 5] = 0
    return replace(p, scale=math.log(500) / 8)


def test_small_probabilities_survive_small_scales(device):
    p = one_key_takes_all(device)
    assert_right(attend(p), p)


@pytest.mark.parametrize("queries", [None, 8])
def test_fp8_cache(queries, device):
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("fp8 needs sm_89")
    p = problem(
        [65, 0, 130],
        device,
        queries=queries,
        dtype=torch.bfloat16,
        cache_dtype=torch.float8_e4m3fn,
    )
    assert_right(attend(p), p)


def test_deterministic(device):
    p = problem([450, 65], device, heads=(6, 2))
    assert max(n_splits(p, 3)) > 1
    first, again = (attend(p, programs=3) for _ in range(2))
    assert_bitwise_equal(first[0], again[0])
    assert_bitwise_equal(first[1], again[1])


def test_halves_merge_to_the_whole(device):
    p = problem([200, 65, 64, 3], device, heads=(6, 2))
    cut = 1  # page
    head = replace(p, seq_lens=p.seq_lens.clamp(max=64 * cut))
    tail = replace(
        p, seq_lens=(p.seq_lens - 64 * cut).clamp(min=0), block_table=p.block_table[:, cut:]
    )
    a, b = attend(head), attend(tail)
    out, lse = gk.merge_attention(*a, *b)
    truth, true_lse = oracle(p)
    # Each half is rounded to fp16 before the merge rounds again.
    assert ((out.cpu() - truth).abs() <= 3 * 2**-11 * truth.abs().amax(-1, keepdim=True)).all()
    torch.testing.assert_close(lse.cpu(), true_lse.float(), rtol=1e-5, atol=1e-5)


def with_entry(x: Tensor, index, value) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


def test_bad_indices_are_left_out_and_reported(device):
    """What a CUDA tensor cannot check at the door: the kernel treats a bad length as 0 and leaves
    out the keys of a page that is not there."""
    p = problem([70, 130, 3], device, heads=(6, 2))
    raise_device_errors(device)  # nothing yet, so nothing raises
    for bad_length in (-1, 2**31 - 1, p.block_table.shape[1] * 64 + 1):
        bad = replace(p, seq_lens=with_entry(p.seq_lens, 1, bad_length))
        result = attend(bad)
        assert_right(result, replace(p, seq_lens=with_entry(p.seq_lens, 1, 0)))
        with pytest.raises(IndexError, match=r"flash_decode: .* page id or length"):
            raise_device_errors(device)
    for bad_page in (-1, p.k_cache.shape[0], GARBAGE_PAGE):
        bad = replace(p, block_table=with_entry(p.block_table, (1, 2), bad_page))
        result = attend(bad)
        assert_right(result, replace(p, seq_lens=with_entry(p.seq_lens, 1, 128)))
        with pytest.raises(IndexError, match=r"flash_decode: .* page id or length"):
            raise_device_errors(device)
    raise_device_errors(device)  # the flag was cleared


def test_first_page_is_left_out(device):
    """The keys after it count alone, however low their scores: a run begins with the first key that
    there is."""
    p = problem([130, 70], device, heads=(6, 2))
    p = replace(p, scale=1.0, q=torch.full_like(p.q, 2.0), k_cache=-p.k_cache.abs())
    bad = replace(p, block_table=with_entry(p.block_table, (0, 0), -1))
    rest = p.block_table.clone()
    rest[0, :-1] = p.block_table[0, 1:]
    left = replace(p, block_table=rest, seq_lens=with_entry(p.seq_lens, 0, 130 - 64))
    result = attend(bad, programs=1)
    assert (result[1] < -64).all()
    assert_right(result, left)
    with pytest.raises(IndexError, match="flash_decode"):
        raise_device_errors(device)


def test_not_finite_stays_not_finite(device):
    """And spoils no other row, though rows share the decision to raise their references."""
    for value in (math.nan, math.inf):
        p = problem([130], device, heads=(4, 2))
        p.q[0, 0, 3] = value
        out, lse = attend(p, programs=1)
        assert out[0, 0].isnan().all() and not lse[0, 0].isfinite()
        others = slice(1, None)
        truth, true_lse = in_double(p)
        assert_within_rule(
            out[:, others], flash_decode_reference(*p.args)[0][:, others], truth[:, others]
        )
        torch.testing.assert_close(lse[:, others].cpu(), true_lse[:, others].float())


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_scores_that_rise_and_fall(dtype, cache_dtype, device):
    """By a few or by 20 a tile of 64 keys: the reference of a row lags behind, or follows."""
    p = problem([330], device, heads=(2, 2), dtype=dtype, cache_dtype=cache_dtype)
    pages = p.block_table[0, :6].long()
    tiles = torch.arange(6, dtype=torch.float32, device=device)[:, None, None]
    for rise in (2.0, 20.0, -20.0):
        moved = replace(p, q=torch.zeros_like(p.q), k_cache=p.k_cache.clone(), scale=1.0)
        moved.q[..., 0] = rise
        if cache_dtype is None:
            moved.k_cache[pages, :, :, 0] = tiles.to(dtype).expand(6, 2, 64)
        else:
            moved.k_cache[pages, :, :, 0] = 1
            moved = replace(moved, k_scale=p.k_scale.clone())
            moved.k_scale[pages] = tiles.expand(6, 2, 64)
        assert_right(attend(moved, programs=1), moved)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_cpu_matches_reference(heads, dtype, cache_dtype, variant):
    for head_dim in (64, 128):
        p = problem(
            [65, 0, 130],
            "cpu",
            heads=heads,
            head_dim=head_dim,
            dtype=dtype,
            cache_dtype=cache_dtype,
        )
        assert_cpu_right(p, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_causal_queries(dtype, cache_dtype, variant):
    for queries, heads in QUERIES:
        # 2: fewer keys than queries. 66: some rows see into the second page. 257: only the last row
        # sees the second split.
        p = problem(
            [2, 66, 0, 257],
            "cpu",
            heads=heads,
            queries=queries,
            dtype=dtype,
            cache_dtype=cache_dtype,
        )
        assert_cpu_right(p, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("page_size", [16, 32, 128, 256])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
def test_cpu_page_sizes(cache_dtype, page_size, variant):
    lengths = [1, 15, 16, 17, 31, 33, 63, 64, page_size + 1, 2 * page_size, 255, 256, 300]
    p = problem(
        lengths,
        "cpu",
        heads=(6, 2),
        page_size=page_size,
        dtype=torch.bfloat16,
        cache_dtype=cache_dtype,
    )
    assert_cpu_right(p, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_long_context(dtype, cache_dtype, variant):
    """Splits of 256 keys up to 16384, of twice that beyond; the last one holds one key."""
    for heads, length in (((16, 1), 3 * 256 + 1), ((2, 1), 33 * 512 + 1)):
        p = problem(
            [length, 5], "cpu", heads=heads, head_dim=128, dtype=dtype, cache_dtype=cache_dtype
        )
        assert_cpu_right(p, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_sharp_and_growing_scores(dtype, cache_dtype, variant):
    """Scores of deviation 7, and rising by 60 over the keys: the largest so far keeps changing, and
    in most tiles one key has nearly all the weight."""
    p = problem([300], "cpu", heads=(16, 1), head_dim=128, dtype=dtype, cache_dtype=cache_dtype)
    p = replace(p, scale=10 * p.scale)
    assert_close(p, variant)
    page_size = p.k_cache.shape[2]
    for t in range(300):
        page, token = p.block_table[0, t // page_size], t % page_size
        p.k_cache[page, 0, token] = 0
        p.k_cache[page, 0, token, 5] = 1
        if p.k_scale is not None:
            p.k_scale[page, 0, token] = t / 300
        else:
            p.k_cache[page, 0, token, 5] = t / 300
    p.q[0, :, 5] = 60.0
    assert_close(replace(p, scale=1.0), variant)


def assert_close(p: Problem, variant: str) -> None:
    """Where scores are large, the error of p is that of the scores, eps * |s| of fp32."""
    (out, lse), (true_out, true_lse) = flash_decode_cpu(*p.args, variant=variant), in_double(p)
    largest = 1 + p.scale * p.q.double().norm(dim=-1).max() * 20
    allowed = torch.finfo(p.q.dtype).eps + 4 * largest * torch.finfo(torch.float32).eps
    assert ((out - true_out).abs() <= allowed * true_out.abs().amax(-1, keepdim=True)).all()
    torch.testing.assert_close(lse, true_lse.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_small_probabilities_survive_small_scales(dtype, variant):
    p = one_key_takes_all("cpu", dtype)
    assert_cpu_right(p, variant)


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
def test_cpu_threads_change_no_bit(cache_dtype):
    p = problem(
        [5000, 0, 700],
        "cpu",
        heads=(32, 2),
        queries=2,
        dtype=torch.bfloat16,
        cache_dtype=cache_dtype,
    )
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(gk.flash_decode(*p.args, return_lse=True))
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert_bitwise_equal(out, results[0][0])
        assert_bitwise_equal(lse, results[0][1])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_not_finite_stays_not_finite(dtype, variant):
    p = problem([70], "cpu", heads=(2, 2), dtype=dtype)
    p.q[0, 0, 3] = math.nan
    page = p.block_table[0, 1]
    p.v_cache[page, 1, 2, 7] = math.inf
    out, _ = flash_decode_cpu(*p.args, variant=variant)
    assert out[0, 0].isnan().all()
    assert not out[0, 1, 7].isfinite() and out[0, 1, :7].isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_cpu_scales_not_finite(variant):
    for name, value in (("k_scale", math.nan), ("v_scale", math.nan), ("v_scale", math.inf)):
        p = problem([70], "cpu", heads=(2, 2), dtype=torch.bfloat16, cache_dtype=torch.int8)
        getattr(p, name)[p.block_table[0, 1], 1, 2] = value
        out, _ = flash_decode_cpu(*p.args, variant=variant)
        assert out[0, 0].isfinite().all() and not out[0, 1].isfinite().any()


@pytest.mark.parametrize("variant", [*VARIANTS, None])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_hidden_keys_reach_nothing(dtype, cache_dtype, variant):
    """Not with weight 0 either: 0 * NaN is NaN. None: the reference."""
    kernel = partial(flash_decode_cpu, variant=variant) if variant else flash_decode_reference
    p = problem([40, 300, 2], "cpu", heads=(6, 2), queries=4, dtype=dtype, cache_dtype=cache_dtype)
    right, right_lse = flash_decode_reference(*p.args)
    for b, length in enumerate(p.seq_lens.tolist()):  # seen by the last query alone
        spoilt = p.block_table[b, (length - 1) // 64], slice(None), (length - 1) % 64
        if cache_dtype == torch.int8:
            p.v_scale[spoilt] = math.nan
        else:
            p.v_cache[spoilt] = torch.tensor(math.nan).to(p.v_cache.dtype)
    out, lse = kernel(*p.args)
    assert out[:, 3].isnan().all()
    close = (
        {"rtol": 0.05, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 2e-3, "atol": 2e-3}
    )
    torch.testing.assert_close(out[:, :3], right[:, :3], **close)
    torch.testing.assert_close(lse, right_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", [*VARIANTS, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_keys_of_infinity_show(dtype, variant):
    """Scores that are all -inf have no softmax; a row without a score gives 0 as ever."""
    kernel = partial(flash_decode_cpu, variant=variant) if variant else flash_decode_reference
    p = problem([70, 2], "cpu", heads=(2, 2), queries=3, dtype=dtype)
    p = replace(p, q=torch.ones_like(p.q))
    p.k_cache[..., 0] = -math.inf
    out, lse = kernel(*p.args)
    assert (lse == -math.inf).all()
    assert (out[1, 0] == 0).all()
    assert out[0].isnan().all() and out[1, 1:].isnan().all()


def test_cpu_sees_every_float8():
    """k = 0 and one key: out is v. Every finite number, subnormals too, and NaN."""
    values = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn)
    for variant in VARIANTS:
        v = values.view(4, 1, 1, 64).expand(4, 1, 16, 64).contiguous()
        ones = torch.ones(4, 1, 16)
        table, lengths = torch.arange(4).int().view(4, 1), torch.ones(4).int()
        out, _ = flash_decode_cpu(
            torch.ones(4, 1, 64),
            torch.zeros_like(v),
            v,
            table,
            lengths,
            1.0,
            ones,
            ones,
            variant=variant,
        )
        torch.testing.assert_close(out.flatten(), values.float(), rtol=3e-7, atol=0, equal_nan=True)


def test_cpu_rejects_short_buffers():
    p = problem([5], "cpu", heads=(2, 2), cache_dtype=torch.int8)
    out, lse = torch.empty_like(p.q), torch.empty(1, 2)
    tensors = [out, lse, p.q, p.k_cache, p.v_cache, p.block_table, p.seq_lens, p.k_scale, p.v_scale]
    spans = [buffer(t) for t in tensors]
    sizes = [1, 1, 2, 64, *p.k_cache.shape[:3], p.block_table.shape[1]]
    strides = [128, 128, 64, *p.k_cache.stride()[:3], *p.v_cache.stride()[:3]]
    strides += [*p.k_scale.stride()[:2], *p.v_scale.stride()[:2], p.block_table.shape[1]]

    def call(spans=spans, sizes=sizes, strides=strides, dtype=2, cache_format=1, variant=""):
        extension().flash_decode_cpu(*spans, dtype, cache_format, 0.125, sizes, strides, 1, variant)

    call()
    for i, (address, size) in enumerate(spans):
        with pytest.raises(ValueError, match="must have more than"):
            call([*spans[:i], (address, size - 1), *spans[i + 1 :]])
        with pytest.raises(ValueError, match="no memory"):
            call([*spans[:i], (0, size), *spans[i + 1 :]])
        if tensors[i].element_size() > 1:
            with pytest.raises(ValueError, match="not aligned"):
                call([*spans[:i], (address + 1, size), *spans[i + 1 :]])
    for i in range(len(strides)):
        for wrong in (-1, 2**62, 2**40):
            if wrong > 0 and i in (0, 1, 13):  # of one sequence, one query: never used
                continue
            with pytest.raises(ValueError, match=r"stride|must have"):
                call(strides=[*strides[:i], wrong, *strides[i + 1 :]])
    for i, wrong in enumerate((2**31, 9, 3, 96, 2**31, 0, 48, 2**30)):
        with pytest.raises(ValueError, match=r"^flash_decode"):
            call(sizes=[*sizes[:i], wrong, *sizes[i + 1 :]])
    for wrong in ({"dtype": 3}, {"cache_format": -1}, {"variant": "mmx"}):
        with pytest.raises(ValueError, match=r"^flash_decode"):
            call(**wrong)


@needs_gpu
def test_one_graph_serves_every_length(device):
    p = problem([5000, 65, 3], device, dtype=torch.bfloat16)
    for batch_invariant in (False, True):
        launch_flash_decode(*p.args, batch_invariant=batch_invariant)  # compiled before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = launch_flash_decode(*p.args, batch_invariant=batch_invariant)
        for lengths in ([5000, 65, 3], [1, 64, 0], [130, 0, 2], [0, 0, 0], [5000, 65, 3]):
            p.seq_lens.copy_(torch.tensor(lengths))
            graph.replay()
            assert_right(result, p, in_double(p))


@needs_gpu
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_long_context(cache_dtype, device):
    length = 128 * 1024 + 17
    p = problem([length, 5], device, dtype=torch.bfloat16, cache_dtype=cache_dtype, head_dim=128)
    assert_right(launch_flash_decode(*p.args), p, in_double(p))


@needs_gpu
def test_pages_past_two_to_the_31(device):
    """The one live page starts 2^31 elements into the cache, which serves as K and V."""
    small = problem([64], device, dtype=torch.bfloat16, head_dim=128)
    small = replace(small, v_cache=small.k_cache)
    n_pages = 2**31 // small.k_cache[0].numel() + 1
    cache = torch.empty((n_pages, *small.k_cache.shape[1:]), dtype=torch.bfloat16, device=device)
    cache[-1] = small.k_cache[small.block_table[0, 0]]
    table = torch.full_like(small.block_table, n_pages - 1)
    big = replace(small, k_cache=cache, v_cache=cache, block_table=table)
    assert_right(launch_flash_decode(*big.args), small)


@pytest.mark.parametrize(
    "message, argument, index, value",
    [
        (r"seq_lens must be in 0\.\.128, got -1", "seq_lens", 0, -1),
        (r"seq_lens must be in 0\.\.128, got 129", "seq_lens", 0, 129),
        (r"block_table must be page ids in 0\.\.1 .*, got 2", "block_table", (0, 0), 2),
        (r"block_table must be page ids in 0\.\.1 .*, got -1", "block_table", (0, 0), -1),
    ],
)
def test_rejects_values(message, argument, index, value):
    p = problem([5], "cpu")  # one page, one spare; one entry, one garbage entry
    gk.flash_decode(*p.args)
    bad = replace(p, **{argument: with_entry(getattr(p, argument), index, value)})
    with pytest.raises(ValueError, match=f"^flash_decode: {message}"):
        gk.flash_decode(*bad.args)


def cache(*shape, dtype=torch.float32, device="cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"q must be \[B, H, D\] or \[B, Q, H, D\]", {"q": cache(4, 64)}),
        (TypeError, r"q must be float32, bfloat16 or", {"q": cache(1, 4, 64, dtype=torch.int8)}),
        (ValueError, r"q must be .* D one of \(64, 128\)", {"q": cache(1, 4, 96)}),
        (ValueError, r"q must be .* 1 <= Q <= 8", {"q": cache(1, 9, 4, 64)}),
        (ValueError, r"q must be .* 1 to 32 times the 2", {"q": cache(1, 3, 64)}),
        (ValueError, r"q must be .* 1 to 32 times the 2", {"q": cache(1, 66, 64)}),
        (ValueError, r"k_cache must be \[n_pages, G, pag", {"k_cache": cache(3, 2, 64)}),
        (ValueError, r"k_cache must be .* 64\], got", {"k_cache": cache(3, 2, 64, 128)}),
        (ValueError, r"k_cache must be pages of a power", {"k_cache": cache(3, 2, 48, 64)}),
        (ValueError, r"k_cache must be pages of .* 16 tok", {"k_cache": cache(3, 2, 8, 64)}),
        (
            TypeError,
            r"k_cache must be torch.float32, int8",
            {"k_cache": cache(3, 2, 64, 64).half()},
        ),
        (ValueError, r"k_cache must be contiguous", {"k_cache": strided(cache(3, 2, 64, 64))}),
        (ValueError, r"v_cache must be contiguous", {"v_cache": strided(cache(3, 2, 64, 64))}),
        (
            ValueError,
            r"v_cache must be a view with even strides",
            {"quantized": True, "v_cache": cache(3, 2, 64, 65, dtype=torch.int8)[..., :64]},
        ),
        (
            ValueError,
            r"k_cache must be a view with even strides",
            {"quantized": True, "k_cache": cache(3, 2, 64, 66, dtype=torch.int8)[..., 1:65]},
        ),
        (ValueError, r"v_cache must be \[3, 2, 64, 64\]", {"v_cache": cache(2, 2, 64, 64)}),
        (TypeError, r"v_cache must be torch.float32", {"v_cache": cache(3, 2, 64, 64).half()}),
        (ValueError, r"v_cache must be on cpu", {"v_cache": cache(3, 2, 64, 64, device="meta")}),
        (ValueError, r"block_table must be \[1, max_p", {"block_table": cache(2, 2).int()}),
        (TypeError, r"block_table must be torch.int32", {"block_table": cache(1, 2).long()}),
        (
            ValueError,
            r"block_table must be .* < 2\^31",
            {"block_table": cache(1, 1).int().expand(1, 2**25)},
        ),
        (ValueError, r"seq_lens must be \[1\]", {"seq_lens": cache(2).int()}),
        (TypeError, r"seq_lens must be torch.int32", {"seq_lens": cache(1).long()}),
        (ValueError, r"scale must be positive", {"scale": math.nan}),
        (ValueError, r"scale must be positive and finite in float32", {"scale": 1e-320}),
        (ValueError, r"scale must be positive and finite in float32", {"scale": 2.0**-127}),
        (ValueError, r"scale must be positive and finite in float32", {"scale": 3e38}),
        (ValueError, r"scale must be positive and finite in float32", {"scale": 1e300}),
        (ValueError, r"k_scale must be None with", {"k_scale": cache(3, 2, 64)}),
        (ValueError, r"k_scale must be given with", {"quantized": True, "k_scale": None}),
        (ValueError, r"v_scale must be given with", {"quantized": True, "v_scale": None}),
        (ValueError, r"v_scale must be \[3, 2, 64\]", {"quantized": True, "v_scale": cache(3, 2)}),
        (
            TypeError,
            r"v_scale must be torch.float32",
            {"quantized": True, "v_scale": cache(3, 2, 64).half()},
        ),
        (
            ValueError,
            r"v_scale must be contiguous",
            {"quantized": True, "v_scale": strided(cache(3, 2, 64))},
        ),
        (RuntimeError, r"q requires grad", {"q": cache(1, 4, 64).requires_grad_()}),
    ],
)
def test_rejects(error, message, change):
    quantized = change.pop("quantized", False)
    pages = cache(3, 2, 64, 64, dtype=torch.int8 if quantized else torch.float32)
    scales = cache(3, 2, 64) if quantized else None
    arguments = {
        "q": cache(1, 4, 64),
        "k_cache": pages,
        "v_cache": pages,
        "block_table": cache(1, 2).int(),
        "seq_lens": cache(1).int(),
        "scale": 0.125,
        "k_scale": scales,
        "v_scale": scales,
    }
    gk.flash_decode(**arguments)
    with pytest.raises(error, match=f"^flash_decode: {message}"):
        gk.flash_decode(**(arguments | change))
