from __future__ import annotations

import math
import sys

import pytest
import torch

import glm4_kernels as gk
from glm4_kernels.quantized_weight import QuantizedWeight, slabs

FORMS = [
    (bits, group_size, symmetric)
    for bits in (4, 8)
    for group_size in (32, 64, 128, None)
    for symmetric in (True, False)
]


def assert_within_half_a_step(weight, qweight):
    """|scale * (u - z) - w| <= |scale| / 2, and what fp32 adds: three roundings of |w| at most."""
    k = qweight.shape[1]
    _, scale, _ = qweight.codes()
    scale = scale.double().abs().repeat_interleave(k // scale.shape[1], dim=1)
    error = (qweight.dequantize(torch.float64) - weight.double()).abs()
    allowed = scale / 2 + 3 * torch.finfo(torch.float32).eps * weight.double().abs()
    assert (error <= allowed).all(), f"{(error / scale).max().item()} steps"


@pytest.mark.parametrize("bits, group_size, symmetric", FORMS)
def test_within_half_a_step(bits, group_size, symmetric):
    weight = torch.distributions.StudentT(3.0).sample((7, 384))
    weight[0] = weight[0].abs()  # one-sided: the zero point at an end of the range
    weight[1] = -weight[1].abs()
    weight[2, ::2] = weight[2].max()  # many at the top
    qweight = gk.quantize(weight, bits, group_size, symmetric, method="nearest")
    assert_within_half_a_step(weight, qweight)

    n_groups = 384 // (group_size or 384)
    assert qweight.shape == (7, 384)
    assert qweight.packed.shape == (1, 16 * 384 * bits // 8)
    assert qweight.scale.shape == (1, n_groups, 16)
    assert (qweight.zero_point is None) == symmetric
    assert qweight.nbytes == 16 * (384 * bits // 8 + n_groups * (2 if symmetric else 3))


@pytest.mark.parametrize("bits, group_size, symmetric", FORMS)
def test_error_on_normal_weights(bits, group_size, symmetric):
    """The relative L2 error of "nearest" is step / sqrt(12), and the step follows from the largest
    of g normal values, in expectation at most sqrt(2 ln 2g) of both signs, sqrt(2 ln g) of one."""
    weight = torch.randn(512, 768)
    g = group_size or 768
    if symmetric:
        step = math.sqrt(2 * math.log(2 * g)) / (2 ** (bits - 1) - 0.5)
    else:
        step = 2 * math.sqrt(2 * math.log(g)) / (2**bits - 1)
    nearest, search = (
        (gk.quantize(weight, bits, group_size, symmetric, method).dequantize() - weight).norm()
        for method in ("nearest", "search")
    )
    assert search <= nearest <= step / math.sqrt(12) * weight.norm()


def test_symmetric_beats_the_usual_scale():
    weight = torch.randn(256, 1024)
    groups = weight.unflatten(1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    usual = (groups / scale).round().clamp(-8, 7) * scale
    for method, share in (("nearest", 0.75), ("search", 0.7)):
        ours = gk.quantize(weight, method=method).dequantize().unflatten(1, (-1, 128))
        assert (ours - groups).square().mean() < share * (usual - groups).square().mean()


def group_errors(weight, qweight):
    """Squared error, and squared weight, of each group: float64 [N, G]."""
    group_size = qweight.group_size or weight.shape[1]
    groups = weight.double().unflatten(1, (-1, group_size))
    error = qweight.dequantize(torch.float64).unflatten(1, (-1, group_size)) - groups
    return error.square().sum(-1), groups.square().sum(-1)


# Rows of 512 drawn as trained weights are, and worse.
TAILS = {
    "normal": lambda: torch.randn(64, 512),
    "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample((64, 512)),
    "student_t": lambda: torch.distributions.StudentT(3.0).sample((64, 512)),
    "outlier columns": lambda: torch.randn(64, 512) * (1 + 7 * (torch.arange(512) % 61 == 0)),
    "one-sided": lambda: torch.randn(64, 512).abs(),
    "one weight": lambda: torch.randn(64, 512) * (torch.arange(512) == 77),
    "tiny": lambda: torch.randn(64, 512) * 1e-37,
    "huge": lambda: torch.randn(64, 512).clamp(-3, 3) * 1e38,
}


@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("bits, group_size, symmetric", FORMS)
def test_search_loses_to_nearest_in_no_group(bits, group_size, symmetric, tails):
    """Up to what fp32 sums of squares resolve: of 512 terms, 512 eps of the group's own square."""
    weight = TAILS[tails]()
    methods = ("nearest", "search") if symmetric else ("nearest", "search", "hqq")
    errors = []
    for method in methods:
        error, square = group_errors(
            weight, gk.quantize(weight, bits, group_size, symmetric, method)
        )
        errors.append(error)
    resolution = 512 * torch.finfo(torch.float32).eps * square
    for better in errors[1:]:
        assert (better <= errors[0] + resolution).all()


@pytest.mark.parametrize(
    "tails, shares", [("normal", (0.94, 0.90, 0.87)), ("student_t", (0.96, 0.93, 0.90))]
)
def test_search_gains_what_it_should(tails, shares):
    """int4, groups of 128: squared error as a share of nearest's, symmetric, with a zero point,
    with a float one against that."""
    weight = TAILS[tails]()
    forms = [(True, "search", "nearest"), (False, "search", "nearest"), (False, "hqq", "nearest")]
    for (symmetric, method, other), share in zip(forms, shares, strict=True):
        ours, theirs = (
            group_errors(weight, gk.quantize(weight, 4, 128, symmetric, m))[0].sum()
            for m in (method, other)
        )
        assert ours < share * theirs


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e-8, 1.0, 1e5, 1e30, 3e38])
@pytest.mark.parametrize("symmetric", [True, False])
def test_tiny_and_huge_rows(magnitude, symmetric):
    weight = torch.rand(3, 64) * 2 - 1
    weight = weight / weight.abs().max() * magnitude
    for method in ("nearest", "search"):
        qweight = gk.quantize(weight, 4, 32, symmetric, method)
        assert qweight.dequantize().isfinite().all()
        if method == "nearest":
            assert_within_half_a_step(weight, qweight)


def test_the_same_every_time():
    weight = torch.randn(40, 256)
    for method in ("search", "hqq"):
        first, again = (gk.quantize(weight, symmetric=False, method=method) for _ in range(2))
        for ours, theirs in zip(first.codes(), again.codes(), strict=True):
            assert torch.equal(ours, theirs)


def test_float_zero_points():
    qweight = gk.quantize(torch.randn(16, 256), symmetric=False, method="hqq")
    _, _, zero_point = qweight.codes()
    assert zero_point.dtype == torch.bfloat16 and (zero_point != zero_point.round()).any()


@pytest.mark.parametrize("bits, group_size, symmetric", FORMS)
def test_zeros_stay_zero(bits, group_size, symmetric):
    weight = torch.randn(4, 128)
    weight[1] = 0.0
    weight[2, ::3] = 0.0
    restored = gk.quantize(weight, bits, group_size, symmetric).dequantize()
    assert (restored[weight == 0] == 0).all()


def test_slabs_do_not_show(monkeypatch):
    weight = torch.randn(37, 64)
    whole = gk.quantize(weight, 4, 32, symmetric=False)
    monkeypatch.setattr(sys.modules[slabs.__module__], "SLAB", 16 * 64)
    in_slabs = gk.quantize(weight, 4, 32, symmetric=False)
    for name in ("packed", "scale", "zero_point"):
        assert torch.equal(getattr(whole, name), getattr(in_slabs, name))
    assert torch.equal(whole.dequantize(), in_slabs.dequantize())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_strides(dtype):
    weight = torch.randn(64, 5).to(dtype)
    plain = gk.quantize(weight.t().float(), 8, 32)
    strided = gk.quantize(torch.nn.Parameter(weight).t(), 8, 32)
    assert torch.equal(plain.packed, strided.packed) and torch.equal(plain.scale, strided.scale)
    assert strided.dequantize(dtype).dtype == dtype
    assert strided.dequantize().dtype == torch.float32


def test_to():
    qweight = gk.quantize(torch.randn(2, 32), 4, 32, symmetric=False)
    moved = qweight.to("meta")
    assert isinstance(moved, QuantizedWeight)
    assert {moved.packed.device.type, moved.scale.device.type} == {"meta"}
    assert moved.zero_point.device.type == "meta" and qweight.packed.device.type == "cpu"


def with_value(value):
    weight = torch.ones(5, 32)
    weight[3, 7] = value
    return weight


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"bits must be 4 or 8, got 3", {"bits": 3}),
        (ValueError, r"group_size must be 32, 64, 128 or None, got -1", {"group_size": -1}),
        (ValueError, r"method must be one of nearest, .*, got 'gptq'", {"method": "gptq"}),
        (ValueError, r"symmetric must be False for method 'hqq', got True", {"method": "hqq"}),
        (TypeError, r"weight must be floating point", {"weight": torch.ones(4, 128).long()}),
        (ValueError, r"weight must be \[N, K\].*, got \[128\]", {"weight": torch.ones(128)}),
        (ValueError, r"weight must be .*, got \[0, 128\]", {"weight": torch.ones(0, 128)}),
        (
            ValueError,
            r"weight must be .* multiple of 128, got \[4, 96\]",
            {"weight": torch.ones(4, 96)},
        ),
        (
            ValueError,
            r"weight must be .* multiple of 32, got \[4, 40\]",
            {"weight": torch.ones(4, 40), "group_size": None},
        ),
        (
            ValueError,
            r"weight must be finite in float32, got nan at \[3, 7\]",
            {"weight": with_value(math.nan), "group_size": 32},
        ),
        (
            ValueError,
            r"weight must be finite in float32, got -inf at \[3, 7\]",
            {"weight": with_value(-math.inf), "group_size": 32},
        ),
        (
            ValueError,
            r"weight must be finite in float32, got inf at \[3, 7\]",
            {"weight": with_value(1e20).double().square(), "group_size": 32},
        ),
    ],
)
def test_rejects(error, message, change):
    arguments = {"weight": torch.ones(4, 128)} | change
    with pytest.raises(error, match=f"^quantize: {message}"):
        gk.quantize(**arguments)


def correlated_inputs(k):
    """Inputs of a few strong directions, and E[x x^T] in blocks of 128."""
    x = torch.randn(2048, k // 4) @ torch.randn(k // 4, k) + 0.3 * torch.randn(2048, k)
    return x, [part.t() @ part / len(part) for part in x.split(128, dim=1)]


@pytest.mark.parametrize("bits, group_size, symmetric", [f for f in FORMS if f[1] is not None])
def test_feedback_lowers_the_error_of_the_output(bits, group_size, symmetric):
    """And its codes are a QuantizedWeight like any other."""
    x, moment = correlated_inputs(256)
    weight = torch.randn(48, 256).to(torch.bfloat16)
    given = weight.clone()
    nearest = gk.quantize(weight, bits, group_size, symmetric, "nearest")
    feedback = gk.quantize(weight, bits, group_size, symmetric, "feedback", moment)
    assert torch.equal(weight, given)
    exact = x @ weight.float().t()
    theirs, ours = ((x @ q.dequantize().t() - exact).norm() for q in (nearest, feedback))
    assert ours < 0.8 * theirs
    for a, b in zip(nearest.codes(), feedback.codes(), strict=True):
        assert (a is None) == (b is None) and (
            a is None or (a.dtype, a.shape) == (b.dtype, b.shape)
        )


def test_feedback_without_correlations_is_a_search():
    """A diagonal H gives no error anything to answer: what is left is the choice of the grid."""
    weight = torch.randn(32, 256)
    feedback = gk.quantize(weight, method="feedback", second_moment=[torch.eye(128)] * 2)
    nearest, search = (gk.quantize(weight, method=method) for method in ("nearest", "search"))
    theirs, best, ours = (group_errors(weight, q)[0].sum() for q in (nearest, search, feedback))
    assert ours < theirs and ours < 1.02 * best


def test_feedback_of_dead_inputs():
    """Channels that are always 0 leave H singular."""
    x, _ = correlated_inputs(256)
    x[:, ::3] = 0
    for moment in ([x.t() @ x / len(x)], [torch.zeros(256, 256)]):
        qweight = gk.quantize(torch.randn(16, 256), method="feedback", second_moment=moment)
        assert qweight.dequantize().isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "search"}, "second_moment must be None but for 'feedback'"),
        ({"second_moment": None}, "second_moment must be None but for 'feedback'"),
        ({"second_moment": [torch.eye(64)] * 4}, "must be square blocks, multiples of 128"),
        ({"second_moment": [torch.eye(128)]}, "256 in all, got"),
        ({"second_moment": [torch.full((256, 256), math.nan)]}, "must be finite"),
    ],
)
def test_rejects_second_moment(change, message):
    given = {"method": "feedback", "second_moment": [torch.eye(256)]} | change
    with pytest.raises(ValueError, match=message):
        gk.quantize(torch.randn(4, 256), **given)
