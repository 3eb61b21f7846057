"""How each linear layer is quantised by `glm4.load(quantize=...)` and `glm4 quantize`: a table.

Measured on the demo model's held-out text (`python -m benchmarks quality`): int8 is lossless, and
int4 with the head in int8 does half the damage of rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import glm4_kernels as gk
from glm4.model import Config, Weight
from glm4.random_inputs import RandomInputs
from glm4_kernels.library import bad_value
from glm4_kernels.quantize import METHODS
from glm4_kernels.quantized_weight import BITS, GROUP_SIZES

LINEAR = ("qkv", "o", "gate_up", "down", "lm_head")


@dataclass(frozen=True)
class Form:
    """The arguments of `gk.quantize` for a weight. A K that the group does not divide gets the
    largest group that does; method "feedback" is "search" where the inputs are not known."""

    bits: int
    group_size: int | None
    symmetric: bool = True
    method: str = "search"


# By the name of a tensor in `Config.shapes`, or its last part; what is not named stays as it is.
Policy = Mapping[str, Form]

INT8 = Form(8, None)
INT4 = Form(4, 128, method="feedback")

POLICIES: dict[str, Policy] = {
    "int8": dict.fromkeys(LINEAR, INT8),
    "int4": {**dict.fromkeys(LINEAR, INT4), "lm_head": INT8},
}


def preparer(
    quantize: str | Policy | None, config: Config | None = None
) -> Callable[[str, Tensor], Weight]:
    """What becomes of each tensor, called with its name and itself.

    Args:
        quantize: a key of `POLICIES`, or a policy; None changes nothing.
        config: of the model, where every tensor will come, in the order of `config.shapes`: then
            "feedback" knows the inputs, and a policy must be of this model.
    """
    policy = policy_of(quantize, config)
    wanted = any(form.method == "feedback" for form in policy.values())
    inputs = RandomInputs(config) if wanted and config is not None else None

    @torch.no_grad()
    def prepare(name: str, weight: Tensor) -> Weight:
        moment = None if inputs is None else inputs.see(name, weight)
        form = form_of(policy, name)
        return weight if form is None else quantized(name, weight, form, moment)

    return prepare


def policy_of(quantize: str | Policy | None, config: Config | None = None) -> Policy:
    """Raises ValueError if it is not one, or names a layer that the model of `config` has not."""
    if quantize is None:
        return {}
    if isinstance(quantize, str) and quantize in POLICIES:
        return POLICIES[quantize]
    if not isinstance(quantize, Mapping):
        expected = f"None, {', '.join(map(repr, POLICIES))} or a policy"
        raise bad_value("load", "quantize", expected, repr(quantize))
    for name, form in quantize.items():
        if not isinstance(name, str) or name.rpartition(".")[2] not in LINEAR:
            raise bad_value("load", "quantize", f"a policy of {', '.join(LINEAR)}", repr(name))
        if not isinstance(form, Form):
            raise bad_value("load", "quantize", f"a policy whose {name} is a Form", repr(form))
        check_form(name, form)
        if config is not None and name not in LINEAR and name not in config.shapes:
            expected = f"a policy of the model's layers, 0 to {config.layers - 1}"
            raise bad_value("load", "quantize", expected, repr(name))
    return quantize


def check_form(name: str, form: Form) -> None:
    """Raises ValueError, before a tensor is read, where `gk.quantize` would or could not say it."""
    for field, allowed in (
        ("bits", BITS),
        ("group_size", GROUP_SIZES),
        ("symmetric", (True, False)),
        ("method", METHODS),
    ):
        value = getattr(form, field)
        if not any(type(value) is type(one) and value == one for one in allowed):
            expected = f"{', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}"
            raise bad_value("load", f"quantize[{name!r}].{field}", expected, repr(value))
    if form.method == "hqq" and form.symmetric:
        raise bad_value("load", f"quantize[{name!r}].symmetric", "False for method 'hqq'", True)


def form_of(policy: Policy, name: str) -> Form | None:
    return policy.get(name, policy.get(name.rpartition(".")[2]))


def quantized(name: str, weight: Tensor, form: Form, moment: list[Tensor] | None) -> Weight:
    """`weight` by `form`; errors name the tensor."""
    k = weight.shape[-1]
    groups = [g for g in (128, 64, 32) if k % g == 0 and g <= (form.group_size or 0)]
    options: dict[str, Any] = {"group_size": groups[0] if groups else None, "method": form.method}
    if form.method == "feedback":
        usable = moment is not None and bool(groups)
        options |= {"second_moment": moment} if usable else {"method": "search"}
    try:
        return gk.quantize(weight, form.bits, symmetric=form.symmetric, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
