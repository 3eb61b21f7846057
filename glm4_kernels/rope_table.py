"""The table of cosines and sines that `rope` and `rope_kv_write` read.

    table[p] = m * (cos(p * f_0), ..., cos(p * f_{R/2-1}), sin(p * f_0), ..., sin(p * f_{R/2-1}))
    f_i      = theta^(-2i/R)

With YaRN (Peng et al., 2023) f_i moves towards f_i / factor where it turns seldom within the
original context, and m is its attention factor; without, m = 1.

Rounding points: `reference` computes f, p * f, cos and sin in fp32 and rounds to the dtype, which
are the bits of `GlmRotaryEmbedding` / `Glm4RotaryEmbedding` of transformers. The rounding of p * f
costs up to 0.03 rad at position 2^20, more than bf16 rounding of the cosine from 256K positions
on. `exact` computes in fp64 and rounds once.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from glm4_kernels.library import FLOAT_DTYPES, bad_type, bad_value

# Positions built at a time: the temporaries of a 1M table stay below 200 MB.
CHUNK = 65536
COMPUTE_DTYPE = {"reference": torch.float32, "exact": torch.float64}
# Larger ones leave fp32 on the way.
MAX_THETA = 1e30
YARN_REQUIRED = {"factor", "original_max_position_embeddings"}
YARN_OPTIONAL = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
# Far beyond what makes sense, and far from where the arithmetic overflows.
YARN_LIMITS = {"factor": (1, 1e12), "original_max_position_embeddings": (1, 2**24)}
YARN_OPTIONAL_LIMITS = (1e-6, 1e6)
# What a HF rope_parameters dict also holds; here they are arguments of their own.
ARGUMENTS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def rope_table(
    max_positions: int,
    theta: float,
    rotary_dim: int = 64,
    mode: str = "reference",
    scaling: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Cosines and sines of every position.

    Args:
        max_positions: number of rows.
        theta: base of the frequencies; for `chatglm` checkpoints 10000 * rope_ratio.
        rotary_dim: R, the leading dims of a head that turn; even.
        mode: `reference` has the bits of transformers, `exact` those of fp64 rounded once.
        scaling: None or HF's rope_scaling / rope_parameters, of type `default` or `yarn`. Its
            rope_theta and partial_rotary_factor are ignored: theta and rotary_dim say it.
        dtype: dtype of q for HF's rounding in the model's dtype; float32 to rotate in float32.
        device: as in torch.empty.

    Returns:
        [max_positions, rotary_dim]: cos half | sin half.

    Raises:
        ValueError: a value is out of range, or scaling is of another type, lacks or has unknown
            entries. TypeError: dtype or the type of a scaling entry is wrong.
    """
    check_rope_table(max_positions, theta, rotary_dim, mode, dtype)
    frequency, attention_factor = rope_frequencies(theta, rotary_dim, scaling, COMPUTE_DTYPE[mode])
    table = torch.empty(max_positions, rotary_dim, dtype=dtype, device=device)
    frequency = frequency.to(table.device)

    for start in range(0, max_positions, CHUNK):
        stop = min(start + CHUNK, max_positions)
        position = torch.arange(start, stop, dtype=torch.int64, device=table.device)
        angle = position[:, None].to(frequency.dtype) * frequency
        table[start:stop, : rotary_dim // 2] = angle.cos() * attention_factor
        table[start:stop, rotary_dim // 2 :] = angle.sin() * attention_factor
    return table


def rope_frequencies(
    theta: float, rotary_dim: int, scaling: Mapping[str, Any] | None, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """f [rotary_dim / 2] on the CPU, computed in `dtype`, and the attention factor m."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=dtype, device="cpu") / rotary_dim
    period = float(theta) ** exponent
    yarn = yarn_entries(scaling)
    if yarn is None:
        return 1.0 / period, 1.0

    def turns(n: float) -> float:
        """The (fractional) i whose frequency turns n times within the original context."""
        context = yarn["original_max_position_embeddings"]
        return rotary_dim * math.log(context / (n * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turns(yarn.get("beta_fast") or 32), turns(yarn.get("beta_slow") or 1)
    if yarn.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    index = torch.arange(rotary_dim // 2, dtype=dtype, device="cpu")
    kept = 1 - torch.clamp((index - low) / (high - low), 0, 1)
    stretched = 1.0 / (yarn["factor"] * period)
    return stretched * (1 - kept) + 1.0 / period * kept, yarn_attention_factor(yarn)


def yarn_attention_factor(yarn: Mapping[str, Any]) -> float:
    """m = 0.1 ln(factor) + 1, or the quotient of two such with mscale and mscale_all_dim."""

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(yarn["factor"]) + 1.0 if yarn["factor"] > 1 else 1.0

    if yarn.get("attention_factor") is not None:
        return float(yarn["attention_factor"])
    if yarn.get("mscale") and yarn.get("mscale_all_dim"):
        return magnitude(yarn["mscale"]) / magnitude(yarn["mscale_all_dim"])
    return magnitude(1)


def yarn_entries(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The checked YaRN entries of `scaling`; None where nothing is scaled."""
    if scaling is None:
        return None
    if not isinstance(scaling, Mapping):
        raise bad_type("rope_table", "scaling", "None or a dict", type(scaling).__name__)
    rope_type = scaling.get("rope_type", scaling.get("type"))
    if rope_type not in ("default", "yarn"):
        expected = "'default' or 'yarn'"
        actual = rope_type if isinstance(rope_type, str) else reprlib.repr(rope_type)
        raise bad_value("rope_table", "scaling['rope_type']", expected, actual)
    if rope_type == "default":
        return None

    entries = {name: value for name, value in scaling.items() if name not in ARGUMENTS}
    missing = YARN_REQUIRED - entries.keys()
    unknown = entries.keys() - YARN_REQUIRED - YARN_OPTIONAL - {"truncate"}
    if missing or unknown:
        names = ", ".join(sorted(map(str, missing or unknown)))
        wrong = f"one without {names}" if missing else names
        raise bad_value("rope_table", "scaling", "a YaRN dict of known entries", wrong)
    for name, value in entries.items():
        argument = f"scaling[{name!r}]"
        if name == "truncate":
            if not isinstance(value, bool):
                raise bad_type("rope_table", argument, "a bool", reprlib.repr(value))
        elif value is None and name in YARN_OPTIONAL:
            continue
        elif not is_number(value):
            raise bad_type("rope_table", argument, "a number", reprlib.repr(value))
        else:
            low, high = YARN_LIMITS.get(name, YARN_OPTIONAL_LIMITS)
            if not low <= value <= high:  # NaN is not either
                expected = "at least 1" if low == 1 else f"positive, from {low:g} to {high:g}"
                expected = f"at most {high:g}" if value > high else expected
                raise bad_value("rope_table", argument, expected, reprlib.repr(value))
    return entries


def is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_rope_table(
    max_positions: int, theta: float, rotary_dim: int, mode: str, dtype: torch.dtype
) -> None:
    op = "rope_table"
    if not 0 <= max_positions <= 2**24:  # beyond, fp32 no longer holds every position
        raise bad_value(op, "max_positions", "in [0, 2^24]", max_positions)
    if not is_number(theta):
        raise bad_type(op, "theta", "a number", reprlib.repr(theta))
    if not 1 < theta < math.inf:
        raise bad_value(op, "theta", "greater than 1 and finite", reprlib.repr(theta))
    if theta > MAX_THETA:
        raise bad_value(op, "theta", f"at most {MAX_THETA:g}", reprlib.repr(theta))
    if rotary_dim < 2 or rotary_dim % 2 != 0:
        raise bad_value(op, "rotary_dim", "even and at least 2", rotary_dim)
    if mode not in COMPUTE_DTYPE:
        raise bad_value(op, "mode", "'reference' or 'exact'", repr(mode))
    if dtype not in (*FLOAT_DTYPES, torch.float64):
        raise bad_type(op, "dtype", "float32, bfloat16, float16 or float64", dtype)
