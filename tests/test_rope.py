from __future__ import annotations

import pytest
import torch
from kernels import each_kernel, each_kernel_and_dtype
from numerics import KERNEL_DTYPES, assert_bitwise_equal, assert_within_rule

import glm4_kernels as gk
from glm4_kernels.library import error_flags, raise_device_errors
from glm4_kernels.rope import head_block, launch_rope, rope_cpu, rope_reference

MAX_POSITIONS = 40
# T, H, G, D, rotary_dim
SHAPES = [
    (1, 32, 2, 128, 64),  # one token of GLM-4-9B
    (3, 6, 1, 64, 64),  # every dim turns
    (2, 3, 5, 96, 32),  # D not a power of two, more k heads than q heads
    (3, 17, 1, 16, 6),  # heads that no block divides, a rotary_dim that is no multiple of 4
]


def inputs(shape, dtype, table_dtype, device):
    n_tokens, n_heads, n_kv_heads, head_dim, rotary_dim = shape
    q = torch.randn(n_tokens, n_heads, head_dim).to(dtype).to(device)
    k = torch.randn(n_tokens, n_kv_heads, head_dim).to(dtype).to(device)
    positions = torch.randint(MAX_POSITIONS, (n_tokens,)).to(device)
    table = gk.rope_table(MAX_POSITIONS, 1e2, rotary_dim, dtype=table_dtype, device=device)
    return q, k, positions, table


def check(kernel, q, k, positions, table):
    """Bit for bit: elementwise, with every rounding point in the contract."""
    for actual, expected in zip(
        kernel(q, k, positions, table),
        rope_reference(q, k, positions, table),
        strict=True,
    ):
        assert actual.is_contiguous()
        assert_bitwise_equal(actual, expected)


@pytest.mark.parametrize("wide_table", [False, True], ids=["table in dtype", "table in float32"])
@each_kernel_and_dtype(launch_rope, rope_cpu)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, kernel, dtype, wide_table):
    check(kernel, *inputs(shape, dtype, torch.float32 if wide_table else dtype, kernel.device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reference_is_transformers(dtype):
    from transformers.models.glm4.modeling_glm4 import (
        Glm4Config,
        Glm4RotaryEmbedding,
        apply_rotary_pos_emb,
    )

    parameters = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    rotary = Glm4RotaryEmbedding(Glm4Config(head_dim=128, rope_parameters=parameters))
    q, k = torch.randn(50, 4, 128).to(dtype), torch.randn(50, 2, 128).to(dtype)
    positions = torch.randperm(5000)[:50]
    expected = apply_rotary_pos_emb(q, k, *(t[0] for t in rotary(q, positions[None])))
    actual = gk.rope(q, k, positions, gk.rope_table(5000, 5e6, dtype=dtype))
    assert_bitwise_equal(actual[0], expected[0])
    assert_bitwise_equal(actual[1], expected[1])


def test_reference_rotates():
    """Against complex multiplication in fp64: x' = x * exp(i * position * frequency)."""
    q, k, positions, table = inputs((20, 3, 2, 128, 64), torch.float32, torch.float32, "cpu")
    q_out, k_out = gk.rope(q, k, positions, table)
    frequency = 1e2 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    turn = torch.exp(1j * positions[:, None, None] * frequency)
    for x, y in ((q, q_out), (k, k_out)):
        pairs = torch.view_as_complex(x.double()[..., :64].unflatten(-1, (32, 2)))
        turned = torch.view_as_real(pairs * turn).flatten(-2)
        oracle = torch.cat((turned, x.double()[..., 64:]), -1)
        # the angle, up to 40, is rounded to fp32 in the table
        torch.testing.assert_close(y.double(), oracle, rtol=0, atol=40 * 2**-23 * 4)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_float32_table_is_closer(dtype, device):
    q, k, positions, exact = inputs((30, 4, 2, 128, 64), dtype, torch.float32, device)
    oracle = rope_reference(q.double(), k.double(), positions, exact.double())
    wide = launch_rope(q, k, positions, exact)
    narrow = launch_rope(q, k, positions, exact.to(dtype))
    for output in (0, 1):
        assert_within_rule(wide[output], wide[output], oracle[output])
        error = [(x[output].double() - oracle[output]).abs().mean() for x in (wide, narrow)]
        assert error[0] < error[1] or dtype == torch.float32


@each_kernel(launch_rope, rope_cpu)
def test_layouts(kernel):
    packed = torch.randn(7, 12 * 32, device=kernel.device)
    table = gk.rope_table(MAX_POSITIONS, 1e2, 16, device=kernel.device)
    positions = torch.randperm(MAX_POSITIONS)[:7].to(kernel.device)
    q = packed[:, : 8 * 32].view(7, 8, 32)
    k = packed[:, 8 * 32 : 10 * 32].view(7, 2, 32)
    check(kernel, q, k, positions, table)  # views of a packed qkv
    check(kernel, q.transpose(0, 1).contiguous().transpose(0, 1), k, positions, table)  # head-major
    check(kernel, q.transpose(1, 2).contiguous().transpose(1, 2), k, positions, table)  # D outside
    check(kernel, q[:1].expand(7, 8, 32), k[:, :1].expand(7, 3, 32), positions, table)
    check(kernel, q[::2], k[::2], positions[::2], table)
    check(kernel, q, k, positions.int(), table)
    wide = torch.cat((torch.full_like(table, torch.nan), table), dim=1)
    check(kernel, q, k, positions, wide[:, 16:])
    check(kernel, q, k, positions, table.t().contiguous().t())


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # inf * 0, discarded
@each_kernel(launch_rope, rope_cpu)
def test_edges(kernel):
    q, k, positions, table = inputs((4, 3, 2, 32, 16), torch.float32, torch.float32, kernel.device)
    q_out, k_out = kernel(q[:0], k[:0], positions[:0], table)
    assert q_out.shape == (0, 3, 32) and k_out.shape == (0, 2, 32)
    check(kernel, q[:, :0], k, positions, table)
    check(kernel, q[:1], k[:1], positions[:1], table)
    check(kernel, q, k, torch.tensor([0, MAX_POSITIONS - 1] * 2, device=kernel.device), table)
    q[..., 16:] = torch.tensor([-0.0, torch.inf], device=kernel.device).repeat(8)
    q_out, _ = kernel(q, k, positions, table)
    assert_bitwise_equal(q_out[..., 16:].view(torch.int32), q[..., 16:].view(torch.int32))


@pytest.mark.parametrize("position", [-1, MAX_POSITIONS, 2**31, -(2**40)])
def test_masks_a_bad_position(position, device):
    q, k, positions, table = inputs((3, 3, 2, 32, 16), torch.float32, torch.float32, device)
    good = rope_reference(q, k, positions, table)
    raise_device_errors(device)
    positions[1] = position
    outputs = launch_rope(q, k, positions, table)
    for output, expected in zip(outputs, good, strict=True):
        expected[1] = 0.0
        assert_bitwise_equal(output, expected)
    with pytest.raises(IndexError, match=r"^rope: a position"):
        raise_device_errors(device)
    raise_device_errors(device)


def test_error_flags_outlive_inference_mode(device):
    with torch.inference_mode():  # where the first launch of a process makes them
        flags = error_flags.__wrapped__(device)
    flags.zero_()  # as raise_device_errors does, outside


def test_large_head_blocks(monkeypatch, device):
    """A small GPU (or a long prompt on a large one) gets sixteen heads a program."""
    monkeypatch.setitem(launch_rope.__globals__, "multiprocessor_count", lambda device: 1)
    check(launch_rope, *inputs((3, 17, 2, 32, 16), torch.float16, torch.float16, device))


def test_head_block_shares_the_table_only_where_the_gpu_stays_full():
    blocks = [head_block(n_tokens, 34, multiprocessors=132) for n_tokens in (1, 64, 128, 8192)]
    assert blocks == [2, 4, 8, 16]


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"q must be \[T, heads, D\], got \[3, 64\]", {"q": torch.ones(3, 64)}),
        (TypeError, r"q must be float32", {"q": torch.ones(3, 4, 32).long()}),
        (ValueError, r"k must be \[3, G, 32\], got \[2, 2, 32\]", {"k": torch.ones(2, 2, 32)}),
        (ValueError, r"k must be \[3, G, 32\]", {"k": torch.ones(3, 2, 64)}),
        (TypeError, r"k must be torch.float32", {"k": torch.ones(3, 2, 32).half()}),
        (ValueError, r"k must be on cpu", {"k": torch.ones(3, 2, 32, device="meta")}),
        (
            ValueError,
            r"q must be of head size D a multiple of 16, .* got 24",
            {"q": torch.ones(3, 4, 24), "k": torch.ones(3, 2, 24)},
        ),
        (ValueError, r"positions must be \[3\], got \[4\]", {"positions": torch.arange(4)}),
        (TypeError, r"positions must be int32 or int64", {"positions": torch.ones(3)}),
        (ValueError, r"positions must be in \[0, 9\), got 9", {"positions": torch.arange(7, 10)}),
        (ValueError, r"positions must be in \[0, 9\), got -1", {"positions": torch.arange(-1, 2)}),
        (ValueError, r"table must be \[max_positions, rotary_dim\]", {"table": torch.ones(9, 64)}),
        (ValueError, r"table must be \[max_positions, rotary_dim\]", {"table": torch.ones(9, 3)}),
        (TypeError, r"table must be torch.float32", {"table": torch.ones(9, 16).half()}),
        (ValueError, r"table must be on cpu", {"table": torch.ones(9, 16, device="meta")}),
        (RuntimeError, r"q requires grad", {"q": torch.ones(3, 4, 32, requires_grad=True)}),
    ],
)
def test_rejects(error, message, change):
    arguments = {"q": torch.ones(3, 4, 32), "k": torch.ones(3, 2, 32)}
    arguments |= {"positions": torch.arange(3), "table": torch.ones(9, 16)} | change
    with pytest.raises(error, match=f"^rope: {message}"):
        gk.rope(**arguments)
