"""RoPE out of every place where a config.json may say it, against transformers: equal logits, or
one line where the places contradict each other or transformers would lose a value."""

from __future__ import annotations

import json
import warnings
from itertools import combinations

import pytest
import torch
from checkpoints import SIZES, transformers_model, write_json
from safetensors.torch import load_file
from test_checkpoint import CHATGLM as REMOTE_CODE
from test_parity import LOGITS_TOLERANCE, relative_error

import glm4
from glm4.config_json import config_of
from glm4.quantize import quantize_checkpoint

TOP, PARAMETERS, SCALING = PLACES = ("top", "rope_parameters", "rope_scaling")
ORIGINAL = "original_max_position_embeddings"
YARN = {"rope_type": "yarn", "factor": 4.0}
DEFAULT = {"rope_type": "default"}
# Two values of each fact, neither of them what is taken where nothing is said.
VALUES = {"rope_theta": (5e6, 2e6), "partial_rotary_factor": (0.25, 1.0), ORIGINAL: (64, 128)}
TOKENS = torch.randint(0, 320, (1, 100), generator=torch.Generator().manual_seed(0))


def config_with(yarn, said):
    """A config.json whose scaling is YaRN in the place `yarn` (None: nowhere), and that says what
    `said` holds of each place."""
    config = {"model_type": "glm4", **SIZES, "num_hidden_layers": 1}
    del config["rope_parameters"]
    if yarn is not None:
        config[yarn] = dict(YARN)
    for place, fields in said.items():
        if place == TOP:
            config |= fields
        else:
            config[place] = config.get(place, DEFAULT) | fields
    return config


def cases():
    for field, (one, other) in VALUES.items():
        pairs = [(place, place) for place in PLACES] + list(combinations(PLACES, 2))
        for a, b in pairs:
            for values in ((one, one), (one, other)) if a != b else ((one, one),):
                for yarn in (None, PARAMETERS, SCALING):
                    said = {a: {field: values[0]}, b: {field: values[1]}}
                    if field != "rope_theta":
                        said[TOP] = {"rope_theta": 1e4} | said.get(TOP, {})
                    name = f"{field} {values[0]} in {a}, {values[1]} in {b}, yarn in {yarn}"
                    yield pytest.param(field, yarn, said, id=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rope")
    transformers_model("glm4", num_hidden_layers=1).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    return folder


def ours(folder, config, **options):
    """(logits, lines): logits None where it is refused."""
    write_json(folder / "config.json", config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            logits = glm4.load(folder, "cpu", progress=False, **options).logits(TOKENS)
        except glm4.CheckpointError as error:
            return None, [str(error)]
    return logits, [str(warning.message) for warning in caught]


def theirs(folder, config):
    """(logits, config) of transformers."""
    import transformers

    given = transformers.Glm4Config.from_dict(json.loads(json.dumps(config)))
    model = transformers.Glm4ForCausalLM(given).eval().requires_grad_(False)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model(TOKENS).logits, given


@pytest.mark.parametrize("field, yarn, said", list(cases()))
def test_a_fact_in_two_places(field, yarn, said, folder):
    config = config_with(yarn, said)
    logits, lines = ours(folder, config)
    expected, read = theirs(folder, config)
    values = {fields[field] for fields in said.values() if field in fields}
    matters = field != ORIGINAL or yarn is not None
    contradicts = matters and len(values) > 1
    # A scaling beside the other dict's YaRN switches that off.
    contradicts |= yarn == PARAMETERS and SCALING in said
    if contradicts:
        assert logits is None and len(lines) == 1
    elif matters and read.rope_parameters[field] != (value := values.pop()):
        assert len(lines) == 1 and f"{field} is {value:.12g}, but transformers" in lines[0]
        everywhere = {place: {field: value} for place in (*said, *([yarn] if yarn else []))}
        meant = config_with(yarn, {p: said.get(p, {}) | f for p, f in everywhere.items()})
        meant[SCALING] = meant[SCALING] | {field: value}
        assert relative_error(logits, theirs(folder, meant)[0]) < LOGITS_TOLERANCE
        assert relative_error(logits, expected) > 100 * LOGITS_TOLERANCE
    else:
        assert not lines
        assert relative_error(logits, expected) < LOGITS_TOLERANCE
    assert all(line.startswith(f"{folder / 'config.json'}: ") for line in lines)


THETA = {"rope_theta": 1e4}
# What GLM-4's README tells people to add to a config.json, here to one of transformers 5.
README = {"type": "yarn", "factor": 4.0, ORIGINAL: 64}
SAVED = DEFAULT | THETA | {"partial_rotary_factor": 0.5}
# Equal to transformers, without a word.
EQUAL = {
    "the README's line beside rope_parameters": {PARAMETERS: SAVED, SCALING: README},
    "an empty rope_scaling": {PARAMETERS: SAVED | YARN, SCALING: {}},
    "rope_scaling null": {PARAMETERS: SAVED | YARN, SCALING: None},
    "both, alike": {PARAMETERS: SAVED | YARN, SCALING: SAVED | YARN},
    "both, alike in other words": {
        PARAMETERS: SAVED | YARN | {"attention_factor": None, "factor": 4},
        SCALING: THETA | {"type": "yarn", "factor": 4.0},
    },
    "both types in one dict": {SCALING: SAVED | YARN | {"type": "yarn"}},
    "the type at the top too": {SCALING: SAVED | YARN, "rope_type": "yarn", "factor": 4.0},
    "old style": {**THETA, "partial_rotary_factor": 0.25, SCALING: README},
    "null at the top": {"rope_theta": None, PARAMETERS: SAVED},
    "a ratio that agrees": {PARAMETERS: SAVED, "rope_ratio": 1},
    "no type": {PARAMETERS: THETA},
    "no type, yarn beside it": {PARAMETERS: THETA, SCALING: README},
}
# As transformers, with a remark that matches.
REMARKS = {
    "factor of no scaling": ({PARAMETERS: SAVED | {"factor": 4.0}}, "factor in rope_parameters"),
    "type at the top": (THETA | {"rope_type": "yarn"}, "rope_type in the top level has no"),
    "factor at the top": (
        {PARAMETERS: SAVED | YARN, "factor": 8.0, "beta_fast": 16},
        "beta_fast, factor in the top level has no effect",
    ),
}
REFUSED = {
    "off and on": ({PARAMETERS: SAVED | YARN, SCALING: DEFAULT}, "one type, got default and yarn"),
    "two factors": (
        {PARAMETERS: SAVED | YARN, SCALING: SAVED | YARN | {"factor": 2.0}},
        "factor must be the same in rope_scaling and rope_parameters, got 2.0 and 4.0",
    ),
    "two betas": (
        {PARAMETERS: SAVED | YARN | {"beta_fast": 16}, SCALING: SAVED | YARN},
        "beta_fast must be the same .* got None and 16",
    ),
    "two types": ({SCALING: YARN | {"type": "default"}}, "rope_scaling must have one type"),
    "a factor of no type": (THETA | {SCALING: {"factor": 4.0}}, "must have a rope_type"),
    "a ratio": (
        {PARAMETERS: SAVED, "rope_ratio": 500},
        r"rope_theta must be one number, got 10000 in rope_parameters and 5000000 in rope_ratio",
    ),
    "linear": (
        THETA | {SCALING: {"type": "linear", "factor": 2.0}},
        "rope_scaling must be of type",
    ),
    "dynamic": ({PARAMETERS: SAVED | {"rope_type": "dynamic", "factor": 2.0}}, "got 'dynamic'"),
    "longrope": (
        {PARAMETERS: SAVED | {"rope_type": "longrope"}},
        "default or yarn, got 'longrope'",
    ),
    "another eps": ({PARAMETERS: SAVED, "layernorm_epsilon": 1e-6}, "rms_norm_eps and layernorm_e"),
}


@pytest.mark.parametrize("fields", EQUAL.values(), ids=EQUAL)
def test_places_that_agree(fields, folder):
    config = config_with(None, {}) | fields
    logits, lines = ours(folder, config)
    assert not lines
    assert relative_error(logits, theirs(folder, config)[0]) < LOGITS_TOLERANCE


@pytest.mark.parametrize("fields, message", REMARKS.values(), ids=REMARKS)
def test_fields_without_effect(fields, message, folder):
    config = config_with(None, {}) | fields
    logits, lines = ours(folder, config)
    assert len(lines) == 1 and message in lines[0]
    assert relative_error(logits, theirs(folder, config)[0]) < LOGITS_TOLERANCE


@pytest.mark.parametrize("fields, message", REFUSED.values(), ids=REFUSED)
def test_places_that_contradict(fields, message, folder):
    write_json(folder / "config.json", config_with(None, {}) | fields)
    with pytest.raises(glm4.CheckpointError, match=rf"/config\.json: .*{message}"):
        glm4.load(folder, "cpu")


def test_a_theta_of_ones_own_needs_none(folder):
    """`rope_theta=` settles what the places do not, and what is not there at all."""
    expected, _ = theirs(folder, config_with(None, {TOP: {"rope_theta": 7e5}}))
    for said in ({}, {TOP: {"rope_theta": 5e6}, PARAMETERS: {"rope_theta": 2e6}}):
        logits, lines = ours(folder, config_with(None, said), rope_theta=7e5)
        assert not lines
        assert relative_error(logits, expected) < LOGITS_TOLERANCE


CHATGLM = [
    ({"rope_ratio": 500}, 5e6, None),
    ({}, 1e4, None),
    ({"rope_ratio": 500, "rope_theta": 5e6}, 5e6, None),
    ({"rope_theta": 5e6}, 5e6, "rope_theta is 5000000, but the remote code does not read it"),
    ({"rope_ratio": 500, "rope_theta": 1e4}, None, "10000 in the top level and 5000000 in rope_r"),
    ({"rope_scaling": README}, None, "rope_scaling must not be there"),
    ({"rope_scaling": DEFAULT}, 1e4, None),
    ({"partial_rotary_factor": 0.25}, None, "partial_rotary_factor must be 0.5"),
]


@pytest.mark.parametrize("fields, theta, message", CHATGLM, ids=lambda value: str(value)[:50])
def test_remote_code(fields, theta, message, tmp_path):
    config_json = {k: v for k, v in REMOTE_CODE.items() if k != "rope_ratio"} | fields
    if theta is None:
        with pytest.raises(glm4.CheckpointError, match=message):
            config_of(tmp_path, config_json)
        return
    config, remarks = config_of(tmp_path, config_json)
    assert config.theta == theta and config.rotary_dim == 64 and config.rope_scaling is None
    assert [message in remark for remark in remarks] == ([True] if message else [])


LOST = {PARAMETERS: SAVED | {"rope_theta": 5e6}, SCALING: README}
SOURCES = {
    "README": {PARAMETERS: SAVED, SCALING: README},
    "theta lost": LOST,
    "old style": {**THETA, "partial_rotary_factor": 0.25, SCALING: README},
    "original at the top": {PARAMETERS: SAVED | YARN, ORIGINAL: 64},
    "no scaling": {PARAMETERS: SAVED | {"rope_theta": 5e6}},
    "stray fields": {PARAMETERS: SAVED, "rope_type": "yarn", "rope_ratio": 1},
}


@pytest.mark.parametrize("theta", [None, 7e5])
@pytest.mark.parametrize("fields", SOURCES.values(), ids=SOURCES)
def test_quantize_writes_what_all_read_alike(fields, theta, folder, tmp_path):
    """One dict that holds all of it: transformers, whatever its version, and we read the same."""
    config = config_with(None, {}) | fields
    expected, _ = ours(folder, config, rope_theta=theta)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target = quantize_checkpoint(folder, tmp_path / "target", rope_theta=theta)
    written = json.loads((target / "config.json").read_text())
    assert relative_error(theirs(folder, written)[0], expected) < LOGITS_TOLERANCE
    config, remarks = config_of(target, written)
    assert not remarks
    # Of transformers 4.
    scaling = written.get(SCALING) or {}
    assert written["rope_theta"] == config.theta == (theta or config.theta)
    assert written["partial_rotary_factor"] == config.rotary_dim / config.head_dim
    assert (scaling.get("rope_type") == "yarn") == (config.rope_scaling is not None)
    assert len({PARAMETERS, SCALING} & written.keys()) == 1
    assert not {"rope_type", "rope_ratio", ORIGINAL} & written.keys()
