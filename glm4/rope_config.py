"""How RoPE turns, out of the places where a config.json may say it.

transformers 4 wrote rope_theta and partial_rotary_factor at the top level, and rope_scaling;
transformers 5 writes rope_parameters, which holds all of them, and reads the rest as

    scaling             rope_scaling, else rope_parameters: the one or the other, as a whole
    theta, partial      that of `scaling`, else of the top level, else 10000 and 0.5
    original context    that of the top level, else of `scaling`, else max_position_embeddings

(`RotaryEmbeddingConfigMixin`), so a theta in rope_parameters is lost where rope_scaling stands
beside it. The remote code has rope_ratio, and reads nothing of these.

Here a fact has one value. Places that contradict each other are refused; a value that transformers
would throw away, or a field that has no effect, is a remark.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm4.checkpoint_file import CheckpointError
from glm4.model import Config
from glm4_kernels.rope_table import YARN_OPTIONAL

TOP = "the top level"  # as a place
DICTS = ("rope_scaling", "rope_parameters")  # the first that is there is `scaling`
RATIO = "rope_ratio"
ORIGINAL = "original_max_position_embeddings"
# Settled one by one, over all places.
SETTLED = ("rope_theta", "partial_rotary_factor", ORIGINAL)
# What scales RoPE, and has no effect outside of a scaling.
SCALING_FIELDS = {"factor", "truncate", *YARN_OPTIONAL}


@dataclass(frozen=True)
class Rope:
    """theta: None where the caller has his own. partial: the share of a head's dims that turns.
    yarn: the entries of YaRN's dict, the original context among them, or None."""

    theta: Any
    partial: float
    yarn: dict[str, Any] | None
    remarks: list[str]


@dataclass(frozen=True)
class Places:
    """The places of one config.json that say something, each with its fields."""

    path: Path
    remote_code: bool
    given: dict[str, dict[str, Any]]
    kinds: dict[str, str]  # default or yarn, of those in DICTS
    remarks: list[str] = field(default_factory=list)

    @property
    def chosen(self) -> str:
        """The place that transformers takes for `scaling`."""
        return next(iter(self.kinds), TOP)

    def said(self, field: str) -> dict[str, Any]:
        return {place: fields[field] for place, fields in self.given.items() if field in fields}

    def settle(self, field: str, default: Any, said: dict[str, Any]) -> Any:
        """The one value of `field`, by the places that say it; what is no number is left to
        `Config` to refuse."""
        values = list(said.values())
        if not all(map(is_number, values)):
            return next(value for value in values if not is_number(value))
        if any(value != values[0] for value in values):
            listed = " and ".join(f"{shown(value)} in {place}" for place, value in said.items())
            remedy = ", or load with a rope_theta (--rope-theta)" if field == "rope_theta" else ""
            raise CheckpointError(
                f"{self.path}: {field} must be one number, got {listed}; remove what does not hold"
                f"{remedy}"
            )
        read = {RATIO} if self.remote_code else {TOP, self.chosen}
        if values and values[0] != default and not read & said.keys():
            reader = "the remote code" if self.remote_code else "transformers"
            self.remarks.append(
                f"{self.path}: {field} is {shown(values[0])}, but {reader} does not read it in "
                f"{', '.join(said)} and takes {shown(default)}; write it into "
                f"{RATIO if self.remote_code else self.chosen}"
            )
        return values[0] if values else default


def read_rope(
    path: Path, config_json: dict[str, Any], max_positions: int, needs_theta: bool
) -> Rope:
    """What `config_json`, the content of `path`, says; without `needs_theta`, its theta aside.

    Raises:
        CheckpointError: places contradict each other, or the type is not one of GLM-4's.
    """
    places = places_in(path, config_json)
    theta = settle_theta(places, config_json) if needs_theta else None
    partial = places.settle("partial_rotary_factor", 0.5, places.said("partial_rotary_factor"))
    if not is_number(partial) or not 0 < partial <= 1:
        expected, got = "a number over 0 and at most 1", reprlib.repr(partial)
        raise CheckpointError(f"{path}: partial_rotary_factor must be {expected}, got {got}")
    if places.remote_code and partial != 0.5:
        expected = "0.5, which the remote code has built in"
        raise CheckpointError(
            f"{path}: partial_rotary_factor must be {expected}, got {shown(partial)}"
        )
    yarn = settle_yarn(places, max_positions)
    remark_on_idle_fields(places, yarn)
    return Rope(theta, partial, yarn, places.remarks)


def places_in(path: Path, config_json: dict[str, Any]) -> Places:
    given = {TOP: {name: value for name, value in config_json.items() if value is not None}}
    for name in DICTS:
        fields = config_json.get(name)
        if fields is not None and not isinstance(fields, dict):
            raise CheckpointError(f"{path}: {name} must be an object, got {reprlib.repr(fields)}")
        if fields:
            given[name] = fields
    kinds = {name: kind_of(path, name, given[name]) for name in DICTS if name in given}
    return Places(path, config_json["model_type"] == "chatglm", given, kinds)


def kind_of(path: Path, name: str, fields: dict[str, Any]) -> str:
    """default or yarn."""
    types = [fields[key] for key in ("rope_type", "type") if fields.get(key) is not None]
    for kind in types:
        if kind not in ("default", "yarn"):
            raise CheckpointError(
                f"{path}: {name} must be of type default or yarn, got {reprlib.repr(kind)}"
            )
    if len(set(types)) > 1:
        raise CheckpointError(
            f"{path}: {name} must have one type, got rope_type {types[0]} and type {types[1]}"
        )
    if not types and "factor" in fields:
        raise CheckpointError(f"{path}: {name} must have a rope_type, as it has a factor")
    return types[0] if types else "default"


def settle_theta(places: Places, config_json: dict[str, Any]) -> Any:
    said = places.said("rope_theta")
    if RATIO in config_json:
        ratio = config_json[RATIO]
        if not is_number(ratio) or not 1e-3 <= ratio <= 1e20:
            expected, got = "a positive number, from 0.001 to 1e20", reprlib.repr(ratio)
            raise CheckpointError(f"{places.path}: {RATIO} must be {expected}, got {got}")
        said[RATIO] = 1e4 * ratio
    if not said and not places.remote_code:
        raise CheckpointError(f"{places.path}: rope_theta is missing (transformers takes 10000)")
    return places.settle("rope_theta", 1e4, said)


def settle_yarn(places: Places, max_positions: int) -> dict[str, Any] | None:
    """YaRN's entries, where the place that transformers takes is of that type."""
    scaled = [name for name, kind in places.kinds.items() if kind == "yarn"]
    if not scaled:
        return None
    path = places.path
    if places.remote_code:
        raise CheckpointError(
            f"{path}: {scaled[0]} must not be there, as the remote code (model_type chatglm) does "
            "not read it; YaRN needs a checkpoint of type glm or glm4"
        )
    if places.chosen not in scaled:
        raise CheckpointError(
            f"{path}: rope_scaling and rope_parameters must have one type, got default and yarn; "
            "remove the one that does not hold"
        )
    fields = places.given[places.chosen]
    for other in scaled[1:]:
        names = sorted((fields.keys() | places.given[other].keys()) - {"rope_type", "type"})
        for name in names:
            a, b = fields.get(name), places.given[other].get(name)
            if name not in SETTLED and not same(a, b):
                raise CheckpointError(
                    f"{path}: {name} must be the same in rope_scaling and rope_parameters, got "
                    f"{reprlib.repr(a)} and {reprlib.repr(b)}; remove the one that does not hold"
                )
    entries = {name: value for name, value in fields.items() if name not in ("type", *SETTLED)}
    original = places.settle(ORIGINAL, max_positions, places.said(ORIGINAL))
    return entries | {"rope_type": "yarn", ORIGINAL: original}


def remark_on_idle_fields(places: Places, yarn: dict[str, Any] | None) -> None:
    """On fields of a scaling where they scale nothing, in transformers neither."""
    for place, fields in places.given.items():
        if places.kinds.get(place) == "yarn":
            continue
        idle = sorted(name for name in SCALING_FIELDS & fields.keys() if fields[name] is not None)
        if place == TOP:
            idle = [name for name in idle if yarn is None or not same(fields[name], yarn.get(name))]
            if fields.get("rope_type", "default") not in ("default", yarn and "yarn"):
                idle.append("rope_type")
        if idle:
            kind = "" if place == TOP else ", whose type is default,"
            places.remarks.append(
                f"{places.path}: {', '.join(idle)} in {place}{kind} has no effect; it belongs into "
                "a rope_scaling or rope_parameters of type yarn"
            )


def same(a: Any, b: Any) -> bool:
    return a is b or (is_number(a) and is_number(b) and a == b)


def is_number(value: Any) -> bool:
    """An int or float, no bool, far from the limits of a float."""
    return type(value) in (int, float) and -1e300 < value < 1e300


def shown(number: float) -> str:
    return f"{number:.12g}"


def rope_fields(config: Config) -> dict[str, Any]:
    """The fields of a config.json for a model's RoPE, which every version reads alike: one dict
    that holds all of it, and theta and the partial factor beside it for transformers 4."""
    numbers = {
        "rope_theta": config.theta,
        "partial_rotary_factor": config.rotary_dim / config.head_dim,
    }
    # transformers 4 knows no rope_parameters; transformers 5 takes rope_scaling alone.
    name = "rope_parameters" if config.rope_scaling is None else "rope_scaling"
    return numbers | {name: {"rope_type": "default", **(config.rope_scaling or {}), **numbers}}


# The fields of a config.json that `rope_fields` takes the place of.
ROPE_FIELDS = {*DICTS, *SETTLED, RATIO, "rope_type"}
