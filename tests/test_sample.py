from __future__ import annotations

import math

import pytest
import torch
from kernels import each_cpu_kernel, each_kernel, each_kernel_and_dtype
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import glm4_kernels as gk
from glm4_kernels.extension import ABSENT, buffer, extension
from glm4_kernels.sample import (
    EXP2,
    MAX_VOCAB,
    exponent_scale,
    kept_masses,
    launch_sample,
    masses_of,
    sample_cpu,
    sample_reference,
)

VOCAB = 151552
EPS = 2.0**-24  # of one rounding in fp32
PENALTY = 1.3


def random_logits(n_rows, vocab, kind="random"):
    logits = 3 * torch.randn(n_rows, vocab)
    if kind == "ties":
        return (2 * logits).round() / 2
    if kind == "equal":
        return torch.full_like(logits, -1.5)
    if kind == "zeros of both signs":
        return torch.where(logits > 0, 0.0, -0.0)
    if kind == "mostly -inf":
        return logits.masked_fill(torch.rand_like(logits) < 0.9, -math.inf)
    if kind == "sorted":  # the largest share one block, so that its maximum tells little
        return logits.sort(-1, descending=True).values
    assert kind == "random"
    return logits


def assert_as_reference(kernel, logits, uniform, seen, *options):
    """The same tokens, and the same of them marked."""
    marked = None if seen is None else seen.clone()
    expected = sample_reference(logits, uniform, marked, *options)
    on = [x if x is None else x.clone().to(kernel.device) for x in (logits, uniform, seen)]
    on[0] = logits.to(kernel.device)  # with its strides
    actual = kernel(*on, *options)
    assert actual.dtype == torch.int64 and actual.tolist() == expected.tolist()
    assert seen is None or torch.equal(on[2].cpu(), marked)
    return expected


@each_kernel(launch_sample, sample_cpu)
@pytest.mark.parametrize(
    "vocab, kind, options",
    [
        (1, "random", (0.8, 5, 0.9)),
        (2, "random", (0.8, 1, 1.0)),
        (2, "equal", (1.0, None, 0.5)),
        (63, "random", (1.0, None, 1.0)),  # less than a block
        (64, "ties", (1.0, 7, 1.0)),
        (65, "ties", (1.0, None, 0.7)),  # a block of one column
        (1000, "random", (0.8, None, 1.0)),
        (1000, "random", (0.8, 50, 0.9)),  # k over the number of blocks
        (1000, "sorted", (0.8, 10, 1.0)),
        (1000, "ties", (0.8, 10, 0.6)),
        (1000, "equal", (0.8, None, 0.3)),
        (1000, "equal", (0.8, 3, 0.3)),  # all tie with the third
        (1000, "zeros of both signs", (0.8, 3, 0.3)),
        (1000, "mostly -inf", (0.8, 200, 0.999)),
        (1000, "random", (1.0, 1000, 1.0)),  # k = V
        (1000, "random", (1.0, None, 1e-9)),
        (1000, "random", (1.0, None, 1 - 1e-12)),
        (1000, "random", (1e-30, None, 0.9)),
        (1000, "random", (1e30, 30, 0.9)),
        (1000, "mostly -inf", (1e30, None, 0.9)),
        (4500, "random", (0.8, 100, 1.0)),  # so too, and they are no power of two
        (5000, "random", (3.0, None, 0.99)),  # more candidates than a program holds at a time
    ],
)
def test_matches_reference(kernel, vocab, kind, options):
    """Bit for bit: masses are integers, whoever adds them up."""
    logits, uniform = random_logits(3, vocab, kind), torch.rand(3, dtype=torch.float64)
    uniform[0], uniform[2] = 0.0, 1 - 2.0**-53
    assert_as_reference(kernel, logits, uniform, None, *options)
    seen = torch.rand(3, vocab) < 0.3
    assert_as_reference(kernel, logits, uniform, seen, *options, PENALTY)
    assert_as_reference(kernel, logits, None, seen, 1.0, None, 1.0, PENALTY)


@each_kernel_and_dtype(launch_sample, sample_cpu)
def test_layouts(kernel, dtype):
    """Slices of wider rows, expanded ones, transposed ones; `seen` inside a border."""
    wide = random_logits(3, 210).to(dtype)
    uniform = torch.rand(6, dtype=torch.float64)[::2]
    border = torch.rand(5, 205) < 0.5
    before = border.clone()
    for logits in (
        wide[:, 7:207],
        wide[:1, :200].expand(3, -1),
        wide[:, :200].t().contiguous().t(),
    ):
        seen = border[1:4, 2:202]
        chosen = assert_as_reference(kernel, logits, uniform, seen, 0.9, 40, 0.9, PENALTY)
        kernel_seen = border.clone().to(kernel.device)
        kernel(
            *(logits.to(kernel.device), uniform.to(kernel.device), kernel_seen[1:4, 2:202]),
            *(0.9, 40, 0.9, PENALTY),
        )
        before = border.clone()
        before[torch.arange(1, 4), 2 + chosen] = True
        assert torch.equal(kernel_seen.cpu(), before), "marks outside"


@each_kernel(launch_sample, sample_cpu)
@pytest.mark.parametrize("options", [(), (0.8,), (0.8, 5), (0.8, None, 0.7)], ids=str)
def test_refuses_bad_rows(kernel, options):
    """Each alone among good rows, which draw as if it were not there."""
    logits = random_logits(6, 300)
    for row, bad in enumerate((math.nan, math.inf, -math.nan, -math.inf)):
        logits[row + 1, 100] = bad
    logits[4] = -math.inf  # nothing else
    seen = torch.zeros(6, 300, dtype=torch.bool)
    uniform = torch.rand(6, dtype=torch.float64) if options else None
    chosen = assert_as_reference(kernel, logits, uniform, seen, *options).tolist()
    assert chosen[1:5] == [-1] * 4 and min(chosen[0], chosen[5]) >= 0


def test_penalty_may_overflow():
    logits = torch.tensor([[1e38, 0.0], [-1e38, 0.0]])
    seen = torch.tensor([[True, False], [True, False]])
    assert gk.sample(logits, seen=seen, repetition_penalty=1e-9).tolist() == [-1, 1]


@each_kernel(launch_sample, sample_cpu)
@pytest.mark.parametrize("n_rows", [0, 65])
def test_any_number_of_rows(kernel, n_rows):
    logits, uniform = random_logits(n_rows, 70), torch.rand(n_rows, dtype=torch.float64)
    assert_as_reference(kernel, logits, uniform, None, 0.8)
    assert_as_reference(kernel, logits, None, None)


@each_kernel(launch_sample, sample_cpu)
@pytest.mark.parametrize("options", [(), (0.8,), (0.8, 50, 0.95), (0.6, None, 0.9)], ids=str)
def test_full_vocabulary(kernel, options):
    logits = 2 * torch.randn(2, VOCAB)
    uniform = torch.rand(2, dtype=torch.float64) if options else None
    seen = torch.rand(2, VOCAB) < 0.01 if len(options) == 3 else None
    options = (*options, PENALTY) if seen is not None else options
    assert_as_reference(kernel, logits, uniform, seen, *options)


@each_cpu_kernel(sample_cpu)
def test_threads_change_nothing(kernel):
    logits, uniform = random_logits(5, 40000), torch.rand(5, dtype=torch.float64)
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            for options in ((), (0.8,), (0.8, None, 0.9)):
                drawn = uniform if options else None
                assert_as_reference(kernel, logits, drawn, None, *options)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_masses_are_as_near_as_derived(temperature):
    """1 + m (2.1 |x| + 2) 2^-24, over scores that are spaced evenly and some that are not."""
    even = torch.linspace(-40 * temperature, 0, 1 << 20)
    uneven = -40 * temperature * torch.rand(1 << 20) ** 4
    scores = torch.cat((even, uneven, torch.zeros(1)))[None]
    x = scores.double() * math.log2(math.e) / temperature
    truth = 2.0**44 * x.exp2()
    error = (masses_of(scores, exponent_scale(temperature)).double() - truth).abs()
    allowed = 1 + truth * (2.1 * x.abs() + 2) * EPS
    assert (error <= allowed).all()
    assert (error > 0.3 * allowed).any(), "derived too loosely"
    assert math.isclose(sum(c * 0.5**i for i, c in enumerate(EXP2[::-1])), 2**0.5, rel_tol=1e-8)


def oracle_probabilities(scores, temperature, top_k, top_p):
    """[B, V] float64, by sorting, and how near 1 - p a running sum comes."""
    scores, nearest = scores.double(), torch.full((len(scores),), math.inf).double()
    if top_k is not None and top_k < scores.shape[1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1.0:
        ascending, order = scores.sort(dim=-1, stable=True)
        sums = (ascending / temperature).softmax(-1).cumsum(-1)
        nearest = (sums - (1.0 - top_p)).abs().amin(-1)
        dropped = sums <= 1.0 - top_p
        dropped[:, -1] = False
        scores = scores.masked_fill(dropped.scatter(1, order, dropped), -math.inf)
    return (scores / temperature).softmax(-1), nearest


@pytest.mark.parametrize(
    "options", [(1.0, None, 1.0), (0.8, 50, 1.0), (0.7, None, 0.9), (1.2, 100, 0.8)], ids=str
)
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_tokens_are_those_of_exact_arithmetic(options, spread):
    """But for a uniform number within the derived bound of the end of a token's share; and as near
    an end as twice the bound, so that a tenfold error would show."""
    n_rows, temperature = 400, options[0]
    scores = spread * torch.randn(n_rows, 3000)
    exact, nearest = oracle_probabilities(scores, *options)
    top = scores.amax(-1, keepdim=True).double()
    x = (scores - top) * math.log2(math.e) / temperature
    mass = torch.where(exact > 0, 2.0**44 * x.exp2(), 0.0)
    error = (mass * (2.1 * x.abs() + 2) * EPS + (mass > 0)).sum(-1)
    bound = 2 * error / mass.sum(-1) + 2.0**-50
    assert (bound < 4e-6).all()

    same = ((kept_masses(scores, *options) > 0) == (exact > 0)).all(-1)
    assert (same | (nearest <= bound + 2.0**-30)).all() and same.float().mean() > 0.99

    ends = exact.cumsum(-1)
    ends = ends / ends[:, -1:]
    token = torch.searchsorted(ends, torch.rand(n_rows, 1, dtype=torch.float64))[:, 0]
    end = ends.gather(1, token[:, None])[:, 0]
    for offset in (-2.0, 2.0):
        uniform = (end + offset * bound).clamp(0, 1 - 2.0**-53)
        expected = torch.searchsorted(ends, uniform[:, None], right=True)[:, 0]
        other_end = (ends - uniform[:, None]).abs().amin(-1)
        judged = same & (other_end > bound)
        assert judged.float().mean() > 0.7
        chosen = gk.sample(scores, uniform, None, *options)
        assert torch.equal(chosen[judged], expected[judged])


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (1.0, None, 1.0),
        (0.6, None, 1.0),
        (1.7, 5, 1.0),
        (1.0, 1, 1.0),
        (1.0, 1000, 1.0),  # more than there are
        (1.0, None, 0.9),
        (0.8, None, 0.3),
        (1.0, None, 1e-9),  # one is always left
        (0.8, 20, 0.8),  # top-p of what top-k left
    ],
)
def test_keeps_what_transformers_keeps(temperature, top_k, top_p):
    logits = 2 * torch.randn(4, 200)
    logits[0, 10:20] = logits[0].sort().values[-5]  # ties with the fifth
    expected = TemperatureLogitsWarper(temperature)(None, logits.double())
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1.0:
        expected = TopPLogitsWarper(top_p)(None, expected)
    probabilities = expected.softmax(-1)

    masses = kept_masses(logits, temperature, top_k, top_p).double()

    masses /= masses.sum(-1, keepdim=True)
    if top_k is not None and top_p < 1.0:  # which of equals top-p drops is its sort's affair
        masses[0], probabilities[0] = masses[0].sort().values, probabilities[0].sort().values
    assert torch.equal(masses > 0, probabilities > 0)
    torch.testing.assert_close(masses, probabilities, rtol=1e-5, atol=1e-12)


def test_top_p_keeps_the_smallest_set():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in [(0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4)]:
        assert (kept_masses(logits, 1.0, None, top_p) > 0).sum() == kept


@each_kernel(launch_sample, sample_cpu)
def test_top_p_keeps_the_last_of_equals(kernel):
    """As transformers does where its sort is stable: of ten equal ones, three make 0.25."""
    uniform = torch.tensor([0.0, 0.34, 0.67, 1 - 2.0**-53], dtype=torch.float64)
    logits = torch.zeros(4, 10)
    chosen = kernel(logits.to(kernel.device), uniform.to(kernel.device), None, 1.0, None, 0.25)
    assert chosen.tolist() == [7, 8, 9, 9]


@each_kernel(launch_sample, sample_cpu)
def test_draws_follow_the_distribution(kernel):
    """Chi-square at a fixed seed, over the drawn tokens of one distribution."""
    n = 250 if kernel.name == "triton" and kernel.device.type == "cpu" else 20000
    weights = torch.tensor([0.3, 0.0, 0.25, 0.2, 0.1, 0.08, 0.07])
    logits = weights.log().expand(n, -1).to(kernel.device)
    chosen = kernel(logits, torch.rand(n, dtype=torch.float64).to(kernel.device)).cpu()
    counts, expected = torch.bincount(chosen, minlength=7), n * weights
    assert counts[1] == 0
    chi_square = ((counts - expected)[weights > 0] ** 2 / expected[weights > 0]).sum()
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"logits must be \[B, V\] with 1 <= V <= 262144", {"logits": torch.ones(5)}),
        (ValueError, "logits must be", {"logits": torch.ones(2, 0)}),
        (ValueError, "logits must be", {"logits": torch.ones(1, MAX_VOCAB + 1)}),
        (TypeError, "logits must be float32", {"logits": torch.ones(2, 5).double()}),
        (ValueError, r"uniform must be \[2\], got \[3\]", {"uniform": torch.rand(3).double()}),
        (TypeError, "uniform must be torch.float64", {"uniform": torch.rand(2)}),
        (ValueError, r"seen must be \[2, 5\]", {"seen": torch.ones(2, 4, dtype=torch.bool)}),
        (TypeError, "seen must be torch.bool", {"seen": torch.ones(2, 5)}),
        (
            ValueError,
            "seen must be of contiguous rows",
            {"seen": torch.ones(1, 5, dtype=torch.bool).expand(2, -1)},
        ),
        (
            ValueError,
            "seen must be of contiguous rows",
            {"seen": torch.ones(5, 2, dtype=torch.bool).t()},
        ),
        (ValueError, "repetition_penalty must be 1 without seen", {"repetition_penalty": 1.1}),
        (ValueError, "temperature must be over 0", {"temperature": 0.0}),
        (ValueError, "temperature must be over 0", {"temperature": math.nan}),
        (ValueError, "top_k must be at least 1 or None", {"top_k": 0}),
        (ValueError, "top_p must be over 0", {"top_p": 0.0}),
        (ValueError, "top_p must be .* at most 1", {"top_p": 1.1}),
    ],
)
def test_rejects(error, message, change):
    good = {"logits": torch.ones(2, 5), "uniform": torch.rand(2, dtype=torch.float64)}
    gk.sample(**good)
    with pytest.raises(error, match=f"^sample: {message}"):
        gk.sample(**(good | change))


@pytest.mark.parametrize(
    "message, change",
    [
        ("chosen must have", {"chosen": torch.ones(1, dtype=torch.int64)}),
        ("logits must have", {"logits": torch.ones(9)}),
        ("logits must have", {"stride": 6}),
        ("uniform must have", {"uniform": torch.rand(1).double()}),
        ("seen must have", {"seen": torch.ones(9, dtype=torch.bool)}),
        ("impossible n_rows", {"n_rows": -1}),
        ("impossible n_cols", {"n_cols": 0}),
        ("impossible n_cols", {"n_cols": MAX_VOCAB + 1}),
        ("top_k must be less than n_cols", {"top_k": 5}),
        ("share must be at most", {"share": 1 << 31}),
        ("unknown dtype code 3", {"dtype": 3}),
    ],
)
def test_checks_sizes_itself(message, change):
    """For callers that come around Python's checks: ValueError, and no memory touched."""
    good = {"chosen": torch.ones(2, dtype=torch.int64), "logits": torch.ones(2, 5)}
    good |= {"uniform": torch.rand(2).double(), "seen": torch.ones(2, 5, dtype=torch.bool)}
    good |= {"dtype": 0, "n_rows": 2, "n_cols": 5, "stride": 5, "top_k": 2, "share": 100}

    def call(chosen, logits, uniform, seen, dtype, n_rows, n_cols, stride, top_k, share):
        buffers = [buffer(tensor) for tensor in (chosen, logits, uniform, seen)]
        sizes = (dtype, n_rows, n_cols, stride, 5, 1.1, 1.0, top_k, 10.0, share)
        extension().sample_cpu(*buffers, *sizes, 1, "")

    call(**good)
    with pytest.raises(ValueError, match=f"^sample: {message}"):
        call(**(good | change))
    assert buffer(None) == ABSENT


def test_odd_uniforms_reach_nothing_outside():
    """Numbers that are none in [0, 1) give some token."""
    for number in (math.nan, math.inf, -math.inf, -1.0, 1.0, 1e300):
        uniform = torch.full((2,), number, dtype=torch.float64)
        for options in ((0.8,), (0.8, 3), (0.8, None, 0.5)):
            chosen = sample_cpu(random_logits(2, 100), uniform, None, *options)
            assert ((chosen >= 0) & (chosen < 100)).all()
