from __future__ import annotations

import numpy as np
import pytest
import torch
from numerics import assert_bitwise_equal

import glm4_kernels as gk
from glm4_kernels.rope_table import CHUNK, rope_frequencies

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS = {
    "none": None,
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "yarn": YARN,  # what the README of GLM-4-0414 says
    "betas": YARN | {"beta_fast": 48, "beta_slow": 2.5, "truncate": False},
    "attention factor": YARN | {"attention_factor": 0.75},
    "mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
    "short": YARN | {"original_max_position_embeddings": 7, "factor": 2},  # an empty ramp
}


def transformers_table(positions, theta, head_dim, scaling, dtype):
    from transformers.models.glm4.modeling_glm4 import Glm4Config, Glm4RotaryEmbedding

    parameters = {"rope_type": "default"} | (scaling or {})
    parameters |= {"rope_theta": theta, "partial_rotary_factor": 0.5}
    config = Glm4Config(head_dim=head_dim, rope_parameters=parameters)
    module = Glm4RotaryEmbedding(config)
    cos, sin = module(torch.empty(0, dtype=dtype), positions[None])
    half = head_dim // 4  # of the rotary half of the head, one value per pair
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("theta", [1e4, 5e6, 1e8])
def test_reference_is_transformers(theta, dtype):
    table = gk.rope_table(2000, theta, dtype=dtype)
    expected = transformers_table(torch.arange(2000), theta, 128, None, dtype)
    assert_bitwise_equal(table, expected)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_scaling_is_transformers(scaling):
    table = gk.rope_table(3000, 1e4, scaling=scaling, dtype=torch.bfloat16)
    expected = transformers_table(torch.arange(3000), 1e4, 128, scaling, torch.bfloat16)
    assert_bitwise_equal(table, expected)
    if scaling not in (None, SCALINGS["default"]):
        plain = gk.rope_table(3000, 1e4, dtype=torch.bfloat16)
        assert (table != plain).any(), "this scaling changes nothing, so it proves nothing"


def test_every_chunk():
    n = 2 * CHUNK + 3
    table = gk.rope_table(n, 1e8, rotary_dim=4)
    expected = transformers_table(torch.arange(n), 1e8, 8, None, torch.float32)
    assert_bitwise_equal(table, expected)


@pytest.mark.parametrize("scaling", [None, YARN], ids=["none", "yarn"])
def test_exact_is_exact(scaling):
    """Against extended precision at the end of 1M positions, where `reference` is visibly off."""
    if np.finfo(np.longdouble).nmant <= np.finfo(np.float64).nmant:
        pytest.skip("this machine's long double is no wider than fp64")
    n, last, theta, rotary_dim = 1 << 20, 4096, 3.0, 4  # f = 1, 0.577...: not a round product
    frequency, attention_factor = rope_frequencies(theta, rotary_dim, scaling, torch.float64)
    angle = np.arange(n - last, n, dtype=np.longdouble)[:, None] * frequency.numpy()
    truth = np.concatenate((np.cos(angle), np.sin(angle)), axis=1) * attention_factor
    exact = gk.rope_table(n, theta, rotary_dim, mode="exact", scaling=scaling)[-last:]
    reference = gk.rope_table(n, theta, rotary_dim, scaling=scaling)[-last:]

    assert exact.dtype == torch.float32
    # fp32 rounds once; fp64 holds the largest angle to 2^-52 of itself
    allowed = np.abs(truth) * 2.0**-24 + angle.max() * 2.0**-52
    assert np.all(np.abs(exact.numpy() - truth) <= allowed)
    assert np.abs(reference.numpy() - truth).max() > 1e-3


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_frequencies_agree_in_fp64(scaling):
    """The fp64 frequencies are the fp32 ones, which transformers confirms, without their error."""
    wide, attention_factor = rope_frequencies(5e6, 64, scaling, torch.float64)
    narrow, same_factor = rope_frequencies(5e6, 64, scaling, torch.float32)
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=0)
    assert attention_factor == same_factor
    if scaling is None:
        powers = np.longdouble(5e6) ** (-np.arange(0, 64, 2, dtype=np.longdouble) / 64)
        np.testing.assert_allclose(wide.numpy(), powers.astype(np.float64), rtol=1e-15)


def test_type_is_read_as_rope_type():
    old = {("type" if name == "rope_type" else name): value for name, value in YARN.items()}
    assert_bitwise_equal(gk.rope_table(9, 1e4, scaling=old), gk.rope_table(9, 1e4, scaling=YARN))


def test_edges():
    assert gk.rope_table(0, 1e4).shape == (0, 64)
    assert_bitwise_equal(gk.rope_table(1, 1e4, 2), torch.tensor([[1.0, 0.0]]))
    assert gk.rope_table(3, 1e4, mode="exact", dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"max_positions must be in \[0, 2\^24\], got -1", {"max_positions": -1}),
        (ValueError, r"max_positions must be in \[0, 2\^24\]", {"max_positions": 2**24 + 1}),
        (ValueError, r"theta must be greater than 1 and finite, got 1", {"theta": 1.0}),
        (ValueError, r"theta must be greater than 1 and finite", {"theta": float("nan")}),
        (ValueError, r"rotary_dim must be even and at least 2, got 7", {"rotary_dim": 7}),
        (ValueError, r"mode must be 'reference' or 'exact', got 'best'", {"mode": "best"}),
        (TypeError, r"dtype must be float32", {"dtype": torch.int8}),
        (TypeError, r"scaling must be None or a dict, got float", {"scaling": 4.0}),
        (ValueError, r"scaling\['rope_type'\] must be .*, got linear", {"type": "linear"}),
        (ValueError, r"scaling\['rope_type'\] must be .*, got None", {"type": None}),
        (ValueError, r"scaling must be .* without factor", {"factor": ...}),
        (ValueError, r"scaling must be .*, got short_factor", {"short_factor": 2}),
        (ValueError, r"scaling\['factor'\] must be at least 1, got 0.5", {"factor": 0.5}),
        (ValueError, r"scaling\['beta_fast'\] must be positive", {"beta_fast": -1}),
        (TypeError, r"scaling\['factor'\] must be a number, got None", {"factor": None}),
        (TypeError, r"scaling\['factor'\] must be a number, got '4'", {"factor": "4"}),
        (TypeError, r"scaling\['truncate'\] must be a bool", {"truncate": 1}),
    ],
)
def test_rejects(error, message, change):
    """Changes of arguments, or of entries of the YaRN dict (... takes one out)."""
    arguments = {"max_positions": 8, "theta": 1e4}
    if change.keys() <= {"max_positions", "theta", "rotary_dim", "mode", "dtype", "scaling"}:
        arguments |= change
    else:
        scaling = YARN | {"rope_type" if name == "type" else name: v for name, v in change.items()}
        arguments["scaling"] = {name: v for name, v in scaling.items() if v is not ...}
    with pytest.raises(error, match=f"^rope_table: {message}"):
        gk.rope_table(**arguments)


AWKWARD = [
    *(10**400, -(10**400), 10**30, 1e308, -1e308, 1e-320, 1e39, 0, -0.0, 0.5, 1, True, False),
    *(float("nan"), float("inf"), -float("inf"), None, "4", "", [], [4], {}, b"4", 1j, object()),
    *(np.float32(4), np.int64(4), np.float64("nan"), np.bool_(True), torch.tensor(4.0)),
]


@pytest.mark.parametrize("mode", ["reference", "exact"])
def test_awkward_values_are_finite_or_refused(mode):
    """Whatever a scaling holds: a finite table, or a ValueError or TypeError of this op."""
    whole = YARN | {"attention_factor": None, "beta_fast": 32, "beta_slow": 1, "truncate": False}
    whole |= {"mscale": None, "mscale_all_dim": None, "rope_type": "yarn"}
    made = 0
    for first in whole:
        for second in ("factor", "mscale_all_dim"):
            for value in AWKWARD:
                made += finite_or_refused(1e4, whole | {second: 2.0} | {first: value}, mode)
    for value in AWKWARD:
        made += finite_or_refused(value, None, mode) + finite_or_refused(value, YARN, mode)
    assert made > 50


def finite_or_refused(theta, scaling, mode):
    """True where there is a table."""
    try:
        table = gk.rope_table(64, theta, 8, mode=mode, scaling=scaling)
    except (ValueError, TypeError) as error:
        message = str(error)
    else:
        assert table.isfinite().all()
        return True
    assert message.startswith("rope_table: ") and len(message) < 200
    return False


@pytest.mark.parametrize("theta", [1 + 2**-52, 1.0001, 1e30])
@pytest.mark.parametrize("factor", [1, 1e12])
@pytest.mark.parametrize("original", [1, 2**24])
@pytest.mark.parametrize("beta_fast, beta_slow", [(1e6, 1e-6), (1e-6, 1e6), (1e6, 1e6)])
@pytest.mark.parametrize("truncate", [True, False])
def test_limits_of_yarn(theta, factor, original, beta_fast, beta_slow, truncate):
    """What is let in does not overflow on the way."""
    scaling = {"factor": factor, "original_max_position_embeddings": original} | {
        **{"rope_type": "yarn", "beta_fast": beta_fast, "beta_slow": beta_slow},
        **{"truncate": truncate, "mscale": 1e6, "mscale_all_dim": 1e-6},
    }
    for mode in ("reference", "exact"):
        assert gk.rope_table(9, theta, 128, mode=mode, scaling=scaling).isfinite().all()
