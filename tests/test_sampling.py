from __future__ import annotations

import math

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from glm4.sampling import Sampling

NOTHING_SEEN = torch.empty(1, 0, dtype=torch.bool)


def draw(sampling, logits, uniforms):
    """One token for each uniform number, all from the same logits [V]."""
    rows = logits.expand(len(uniforms), -1)
    seen = NOTHING_SEEN.expand(len(uniforms), 0)
    return sampling.choose(rows, torch.as_tensor(uniforms, dtype=torch.float64), seen)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_penalty_is_transformers(penalty):
    logits = torch.randn(64, 50)  # of both signs
    history = torch.randint(50, (64, 20))
    seen = torch.zeros(64, 50, dtype=torch.bool).scatter_(1, history, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(history, logits).argmax(-1)
    assert (expected != logits.argmax(-1)).any(), "this penalty changes nothing"
    before = seen.clone()

    chosen = Sampling(repetition_penalty=penalty).choose(logits, None, seen)

    assert chosen.tolist() == expected.tolist()
    assert torch.equal(seen, before.scatter(1, chosen[:, None], True)), "the choice counts as seen"


def test_penalty_changes_the_choice():
    logits = torch.tensor([[1.0, 0.9, -0.1]])
    seen = torch.tensor([[True, False, False]])
    assert Sampling(repetition_penalty=1.2).choose(logits, None, seen).tolist() == [1]
    seen = torch.tensor([[True, True, False]])
    assert Sampling(repetition_penalty=20.0).choose(logits, None, seen).tolist() == [0]


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.4, 0.0, 0.3, 0.2, 0.0, 0.1]).log()
    counts = torch.bincount(draw(Sampling(1.0), logits, torch.rand(20000)), minlength=6)
    expected = 20000 * logits.exp()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001; the seed is fixed


def test_draws_invert_the_distribution():
    logits = torch.tensor([-math.inf, 0.25, -math.inf, 0.5, 0.25, -math.inf])
    logits[[1, 3, 4]] = logits[[1, 3, 4]].log()
    last = 1 - 2**-53  # the largest that numpy draws
    assert draw(Sampling(1.0), logits, [0, 0.24, 0.26, 0.74, 0.76, last]).tolist() == [
        1, 1, 3, 3, 4, 4,
    ]  # fmt: skip


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e30])
def test_extreme_temperatures(temperature):
    logits = torch.tensor([1.0, 3.0, 2.0])
    chosen = draw(Sampling(temperature), logits, [0.0, 0.5, 0.99]).tolist()
    assert chosen == ([1, 1, 1] if temperature < 1 else [0, 1, 2])


def test_greedy_takes_the_first_of_equals():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    assert Sampling().choose(logits, None, NOTHING_SEEN).tolist() == [1]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, 3, 0.5)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_marks_bad_logits(sampling, bad):
    logits = torch.randn(3, 10)
    logits[1, 4] = bad
    uniform = None if sampling.temperature == 0 else torch.rand(3, dtype=torch.float64)
    chosen = sampling.choose(logits, uniform, NOTHING_SEEN.expand(3, 0)).tolist()
    assert chosen[1] == -1 and min(chosen[0], chosen[2]) >= 0
    assert Sampling().choose(torch.full((1, 4), -math.inf), None, NOTHING_SEEN).tolist() == [-1]


def test_seeds():
    first, second = (Sampling(1.0, seed=5).uniforms(i, 8) for i in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(second, Sampling(1.0, seed=6).uniforms(0, 8))
    assert not torch.equal(Sampling(1.0).uniforms(0, 8), Sampling(1.0).uniforms(0, 8))


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, "temperature must be at least 0 and finite, got -1", {"temperature": -1}),
        (ValueError, "temperature must be .*, got nan", {"temperature": math.nan}),
        (ValueError, "temperature must be .*, got inf", {"temperature": math.inf}),
        (TypeError, "temperature must be a number, got 'hot'", {"temperature": "hot"}),
        (TypeError, "temperature must be a number, got True", {"temperature": True}),
        (ValueError, "top_k must be at least 1 or None, got 0", {"top_k": 0}),
        (TypeError, r"top_k must be an integer or None, got 2\.5", {"top_k": 2.5}),
        (ValueError, "top_p must be over 0 and at most 1, got 0", {"top_p": 0}),
        (ValueError, "top_p must be over 0 and at most 1, got 1.5", {"top_p": 1.5}),
        (ValueError, "repetition_penalty must be .*, got 0", {"repetition_penalty": 0}),
        (TypeError, "repetition_penalty must be a number", {"repetition_penalty": None}),
        (ValueError, "seed must be at least 0 or None, got -3", {"seed": -3}),
        (TypeError, "seed must be an integer or None, got '7'", {"seed": "7"}),
    ],
)
def test_rejects(error, message, change):
    with pytest.raises(error, match=f"^generate: {message}"):
        Sampling(**change)
