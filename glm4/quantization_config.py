"""What a checkpoint says about its quantised weights: `quantization_config` of config.json.

Three tools' words for the same few facts (bits, group, zero points, act-order) become a `Scheme`
for each module. Whether a module is quantised at all, its tensors say.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4.checkpoint_file import CheckpointError, read_json
from glm4.module_pattern import ModulePattern, Name

# Files of their own, in which older tools described what they did.
SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
# Each takes up to 20 microseconds for each module; an expression for each has some six.
PATTERNS_LIMIT = 5000
TEXT_LIMIT = 1_000_000
RULES_LIMIT = 50_000  # each module is compared with each


@dataclass(frozen=True)
class Scheme:
    """How the weight of one module is stored."""

    format: str  # pack-quantized, gptq, gptq_v2 or awq
    bits: int
    group_size: int | None  # columns of a row that share a scale; None: all
    symmetric: bool | None = None  # None: its zero points say it
    act_order: bool = False  # so g_idx must be there
    borrows: bool = False  # GPTQ v1 by GPTQModel


def describe(scheme: Scheme) -> str:
    groups = f"groups of {scheme.group_size}" if scheme.group_size else "a scale per row"
    return f"{scheme.format}, {scheme.bits} bits, {groups}"


@dataclass(frozen=True)
class Quantization:
    """What a checkpoint says about its quantised modules: the first rule that fits a name holds.
    A pattern is a module's name, a regular expression after "re:", or "Linear", which is all."""

    path: Path
    rules: tuple[tuple[str | ModulePattern, Scheme | None], ...]

    def scheme(self, module: str) -> Scheme | None:
        name = Name(module)
        for pattern, scheme in self.rules:
            if isinstance(pattern, str):
                if pattern in (module, "Linear"):
                    return scheme
            elif pattern.matches(name):
                return scheme
        return None


def read_quantization(folder: Path, config_json: dict[str, Any]) -> Quantization | None:
    """What config.json, or a file of its own, says about quantised weights; None: it says nothing.

    Raises:
        CheckpointError: a method, format, size or option that is not read here.
    """
    path, method = folder / "config.json", None
    given = config_json.get("quantization_config", config_json.get("compression_config"))
    if given is None:
        path = next(filter(os.path.lexists, (folder / name for name in SIDE_FILES)), path)
        if path.name not in SIDE_FILES:
            return None
        given, method = read_json(path), SIDE_FILES[path.name]
    if not isinstance(given, dict):
        raise CheckpointError(f"{path}: quantization_config must be an object, got {show(given)}")
    if "config_groups" in given:
        method = "compressed-tensors"
    method = given.get("quant_method", method)
    readers = {
        "compressed-tensors": compressed_tensors,
        "gptq": gptq,
        "awq": awq,
        "auto-round": auto_round,
        "intel/auto-round": auto_round,
    }
    if not isinstance(method, str) or method not in readers:
        raise bad_field(path, "quant_method", ", ".join(readers), method)
    rules = readers[method](path, given)
    return Quantization(path, tuple(compiled(path, rules)))


def compiled(
    path: Path, rules: list[tuple[str, Scheme | None]]
) -> Iterator[tuple[str | ModulePattern, Scheme | None]]:
    if len(rules) > RULES_LIMIT:
        raise CheckpointError(
            f"{path}: quantization_config: must have at most {RULES_LIMIT:,} rules"
        )
    if sum(len(text) for text, _ in rules if text.startswith("re:")) > TEXT_LIMIT:
        raise CheckpointError(
            f"{path}: quantization_config: its regular expressions must have at most "
            f"{TEXT_LIMIT:,} characters together"
        )
    size = 0
    for text, scheme in rules:
        if not text.startswith("re:"):
            yield text, scheme
            continue
        try:
            pattern = ModulePattern(text[3:])
        except ValueError as error:
            raise CheckpointError(
                f"{path}: pattern {show(text)} must be a regular expression, as far as they are "
                f"read here ({error})"
            ) from None
        size += pattern.size
        if size > PATTERNS_LIMIT:
            raise CheckpointError(
                f"{path}: quantization_config: its regular expressions must have at most "
                f"{PATTERNS_LIMIT} parts together"
            )
        yield pattern, scheme


def compressed_tensors(path: Path, given: dict[str, Any]) -> list[tuple[str, Scheme | None]]:
    """The rules of `config_groups`, in the order of compressed-tensors: what is ignored, then
    targets by name, by regular expression, by class."""
    if given.get("transform_config"):
        raise bad_field(path, "transform_config", "empty", given["transform_config"])
    sparsity = given.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        raise bad_field(path, "sparsity_config", "empty", sparsity)
    groups, ignore = given.get("config_groups"), given.get("ignore") or []
    if not groups and given.get("kv_cache_scheme"):
        return []  # what is quantised is the cache, not a weight
    if not isinstance(groups, dict) or not groups:
        raise bad_field(path, "config_groups", "an object of groups", groups)
    if not is_strings(ignore):
        raise bad_field(path, "ignore", "a list of modules", ignore)
    targets: dict[str, Scheme | None] = {}
    for name, group in groups.items():
        own = f"config_groups.{name}"
        if not isinstance(group, dict):
            raise bad_field(path, own, "an object", group)
        if not is_strings(group.get("targets")):
            raise bad_field(path, f"{own}.targets", "a list of modules", group.get("targets"))
        weights = group.get("weights")
        scheme = None
        if weights is not None:
            stored_as = group.get("format") or given.get("format")
            if stored_as != "pack-quantized":
                raise bad_field(path, "format", "'pack-quantized'", stored_as)
            scheme = weights_of(path, f"{own}.weights", weights)
        targets |= dict.fromkeys(group["targets"], scheme)
    by_name = sorted(targets.items(), key=lambda item: ("re:" in item[0], item[0]))
    by_name.sort(key=lambda item: item[0] == "Linear")
    return [*((pattern, None) for pattern in ignore), *by_name]


def weights_of(path: Path, own: str, weights: Any) -> Scheme:
    if not isinstance(weights, dict):
        raise bad_field(path, own, "an object", weights)
    bits, size = weights.get("num_bits", 8), weights.get("group_size")
    strategy = weights.get("strategy")
    if strategy is None:
        strategy = "channel" if size == -1 else "group" if size is not None else "tensor"
    order = weights.get("actorder")
    for field, actual, allowed in (
        ("num_bits", bits, (4, 8)),
        ("type", weights.get("type", "int"), ("int",)),
        ("strategy", strategy, ("group", "channel")),
        ("symmetric", weights.get("symmetric", True), (True, False)),
        ("actorder", order, (None, False, True, "weight", "static", "group", "dynamic")),
    ):
        check_field(path, f"{own}.{field}", actual, allowed)
    group_size = None
    if strategy == "group":
        if type(size) is not int or size < 1:
            raise bad_field(path, f"{own}.group_size", "a positive integer", size)
        group_size = size
    return Scheme(
        "pack-quantized",
        bits,
        group_size,
        symmetric=weights.get("symmetric", True),
        act_order=order in (True, "group", "dynamic"),
    )


def gptq(path: Path, given: dict[str, Any]) -> list[tuple[str, Scheme | None]]:
    """One rule for all modules, after those of `dynamic`, GPTQModel's exceptions to it."""
    stored_as = given.get("checkpoint_format", given.get("format", "gptq"))
    check_field(path, "checkpoint_format", stored_as, ("gptq", "gptq_v2"))
    check_field(path, "is_marlin_format", given.get("is_marlin_format", False), (False,))
    check_field(path, "pack_dtype", given.get("pack_dtype", "int32"), ("int32",))
    check_field(path, "rotation", given.get("rotation"), (None, ""))
    meta = given.get("meta")
    tools = meta.get("quantizer") if isinstance(meta, dict) else None
    by_gptqmodel = "gptqmodel" in show(tools).lower()

    def scheme(fields: dict[str, Any], own: str = "") -> Scheme:
        symmetric, act_order = fields.get("sym", True), fields.get("desc_act", False)
        check_field(path, f"{own}sym", symmetric, (True, False))
        check_field(path, f"{own}desc_act", act_order, (True, False))
        bits, group_size = size_fields(path, fields, own, (4, 8))
        return Scheme(stored_as, bits, group_size, symmetric, act_order, by_gptqmodel)

    dynamic = given.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise bad_field(path, "dynamic", "an object", dynamic)
    rules: list[tuple[str, Scheme | None]] = []
    for pattern, changes in dynamic.items():
        if pattern.startswith("-:"):
            rules.append((f"re:{pattern[2:]}", None))
        elif not isinstance(changes, dict):
            raise bad_field(path, f"dynamic.{pattern}", "an object", changes)
        else:
            changed = scheme(given | changes, f"dynamic.{pattern}: ")
            rules.append((f"re:{pattern.removeprefix('+:')}", changed))
    return [*rules, ("Linear", scheme(given))]


def awq(path: Path, given: dict[str, Any]) -> list[tuple[str, Scheme | None]]:
    """One rule for all modules; those not to convert have no quantised tensors."""
    version = given.get("version", given.get("checkpoint_format", given.get("format", "gemm")))
    check_field(path, "version", str(version).lower(), ("gemm",))
    synonyms = {"w_bit": "bits", "q_group_size": "group_size"}
    fields = {synonyms.get(name, name): value for name, value in given.items()}
    bits, group_size = size_fields(path, fields, "", (4,))
    return [("Linear", Scheme("awq", bits, group_size))]


# AutoRound's words for how it packed; zero points are stored less 1 in its first two.
PACKINGS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
}


def auto_round(path: Path, given: dict[str, Any]) -> list[tuple[str, Scheme | None]]:
    """One rule for all modules, after the exceptions of `extra_config`, by name or by a regular
    expression that is found in it."""
    packing = given.get("packing_format", given.get("backend"))  # the older name
    check_field(path, "packing_format", packing, tuple(PACKINGS))
    stored_as = PACKINGS[packing]  # type: ignore[index]

    def scheme(fields: dict[str, Any], own: str = "") -> Scheme | None:
        if fields.get("bits") in (16, 32):
            return None
        check_field(path, f"{own}data_type", fields.get("data_type", "int"), ("int",))
        check_field(path, f"{own}act_bits", fields.get("act_bits"), (None, 16, 32))
        symmetric = fields.get("sym", True)
        check_field(path, f"{own}sym", symmetric, (True, False))
        allowed = (4,) if stored_as == "awq" else (4, 8)
        bits, group_size = size_fields(path, fields, own, allowed)
        return Scheme(stored_as, bits, group_size, None if stored_as == "awq" else symmetric)

    extra = given.get("extra_config") or {}
    if not isinstance(extra, dict):
        raise bad_field(path, "extra_config", "an object", extra)
    rules: list[tuple[str, Scheme | None]] = []
    for name, changes in extra.items():
        if not isinstance(changes, dict):
            raise bad_field(path, f"extra_config.{name}", "an object", changes)
        pattern = f"re:.*(?:{name})" if re.search(r"[^\w.-]", name) else name
        rules.append((pattern, scheme(given | changes, f"extra_config.{name}: ")))
    return [*rules, ("Linear", scheme(given))]


def size_fields(
    path: Path, fields: dict[str, Any], own: str, allowed: tuple[int, ...]
) -> tuple[int, int | None]:
    bits, group_size = fields.get("bits"), fields.get("group_size", -1)
    check_field(path, f"{own}bits", bits, allowed)
    if group_size is None or group_size == -1:
        return bits, None  # type: ignore[return-value]
    if type(group_size) is not int or group_size < 1:
        raise bad_field(path, f"{own}group_size", "a positive integer or -1", group_size)
    return bits, group_size  # type: ignore[return-value]


def check_field(path: Path, field: str, actual: Any, allowed: tuple[Any, ...]) -> None:
    if not any(type(actual) is type(one) and actual == one for one in allowed):
        raise bad_field(path, field, " or ".join(repr(one) for one in allowed), actual)


def bad_field(path: Path, field: str, expected: str, actual: Any) -> CheckpointError:
    return CheckpointError(
        f"{path}: quantization_config: {field} must be {expected}, got {show(actual)}"
    )


def is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def show(value: Any) -> str:
    return reprlib.repr(value)  # of bounded length and depth


def write_quantization(schemes: dict[str, Scheme | None]) -> dict[str, Any]:
    """quantization_config of pack-quantized modules; None: one that is left as it is.

    Targets are expressions over all modules of a kind where they share a scheme, else names:
    never the class "Linear", which an engine that joins modules (vLLM: q, k and v) matches first.
    """
    kinds: dict[str, list[str]] = {}
    for module in schemes:
        kinds.setdefault(module.rpartition(".")[2], []).append(module)
    targets: dict[Scheme, list[str]] = {}
    for kind, modules in kinds.items():
        shared = {schemes[module] for module in modules}
        pattern = [f"re:.*\\.{kind}$"] if len(modules) > 1 and len(shared) == 1 else None
        for scheme in dict.fromkeys(schemes[module] for module in modules):
            if scheme is not None:
                names = pattern or [m for m in modules if schemes[m] == scheme]
                targets.setdefault(scheme, []).extend(names)
    groups = {
        f"group_{i}": {
            "targets": names,
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": "group" if scheme.group_size else "channel",
                "group_size": scheme.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for i, (scheme, names) in enumerate(targets.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [module for module, scheme in schemes.items() if scheme is None],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
