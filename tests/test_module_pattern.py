"""Patterns of quantization_config: the names that `re.match` takes, in a time that is bounded."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glm4.module_pattern import ModulePattern, Name
from glm4.quantization_config import PATTERNS_LIMIT

ATOMS = (
    *("a", "b", "0", "_", "ab", ".", r"\.", "-", "]", "}", "{", "a{,", r"\-", "é", " "),
    *("[ab]", "[^a]", "[]a]", "[^]]", "[a-c0-9]", r"[\d.]", r"[\s\S]", r"[\]a]", "[.]", "[^\\n]"),
    *(r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"\n", "^", "$", r"\A", r"\Z", r"\b", r"\B", ""),
)
REPEATS = ("*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{,2}", "{1,}", "{0}", "{,}", "{2,3}?")


def larger(inner):
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join).map("({})".format),
        inner.map("(?:{})".format),
        inner.map("(?!{})".format),
        inner.map("(?={})".format),
        st.tuples(inner.map("(a?{})".format), st.sampled_from(REPEATS)).map("".join),
        st.tuples(st.sampled_from(ATOMS), st.sampled_from(REPEATS)).map("".join),
    )


PATTERNS = st.recursive(st.sampled_from(ATOMS), larger, max_leaves=8)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(pattern=PATTERNS, text=st.text("ab0_.-{,}]é \n", max_size=8))
@example(pattern="a*", text="")
@example(pattern="a|(?:{2})", text="")
@example(pattern="{,}", text="")
@example(pattern="{a}", text="{a}")
@example(pattern="(?:^|a)*b", text="ab")
@example(pattern=r"(\b|a)+\B.", text="a.")
@example(pattern="$", text="\n")
def test_matches_as_re_does(pattern, text):
    try:
        compiled = re.compile(pattern)
    except re.error:
        with pytest.raises(ValueError, match=r"."):
            ModulePattern(pattern)
        return
    assert ModulePattern(pattern).matches(Name(text)) == bool(compiled.match(text))


# Out of published checkpoints, and of the tools that write them.
IN_USE = [
    "re:.*lm_head",
    "re:.*self_attn.*",
    r"re:.*self_attn\.(q|k|v|o)_proj$",
    r"re:.*mlp\.(gate|up|down)_proj.*",
    r"re:.*\.block_sparse_moe\.gate",
    r"re:^model\.layers\.\d+\.mlp\.gate_up_proj$",
    r"re:model\.layers\.(?:1[0-5]|2\d)\..*",
    r"re:^(?!mtp\.).*layers\.\d+\.self_attn\.o_proj$",
    "re:^(?!.*shared_experts).*$",
    r"re:(?!(?:lm_head)$)(?:.*_proj)",
    r"re:.*layers\.[0-9]+\.mlp\.down_proj",
    r"re:.*\.(?:1[6-9]|20|21)\..*",
    r"re:.*\.19\..*gate.*",
    "re:vision_tower.*",
    "re:.*shared_expert_gate$",
    r"re:.*(self_attn|attention)$",
    r"re:model\.layers\.[1-3]?[0-9]\.mlp.*",
    "re:",
]
NAMES = [
    *(f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 9, 10, 19, 21, 39) for x in "qkvo"),
    *(
        f"model.layers.{i}.mlp.{x}_proj"
        for i in (0, 9, 10, 19, 21, 39)
        for x in ("gate_up", "down")
    ),
    "lm_head",
    "transformer.encoder.layers.0.self_attention.query_key_value",
]


@pytest.mark.parametrize("pattern", IN_USE)
def test_patterns_in_use(pattern):
    source = pattern[3:]
    for name in NAMES:
        assert ModulePattern(source).matches(Name(name)) == bool(re.match(source, name)), name


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*c",
        "(a*)*(a*)*(a*)*c",
        "((a*)*)*c",
        "(.*.*.*.*.*.*)*x",
        "(a?){200}a{100}c",
        "(?!(?!(?!(a|aa)*c).*)(a|aa)*c)c",
        "((a{1,9}){1,9}){1,3}c",
        "(?:a|aa|aaa|aaaa|aaaaa)*c",
    ],
)
def test_nothing_backtracks(pattern):
    start = time.process_time()
    assert not ModulePattern(pattern).matches(Name("a" * 60 + "b"))
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("a{99999999999999999999}", "more than 1000 parts"),
        ("a{1001}", "more than 1000 parts"),
        ("(((a{100}){100}){100}){100}", "more than 1000 parts"),
        ("((){999}){999}", "nothing to repeat"),
        ("(((|){900}){900}){900}", "more than 1000 parts"),
        ("(" * 100000, "more than 50 groups within each other"),
        ("(?:" * 51 + ")" * 51, "more than 50 groups"),
        ("(?<=a)b", r"only \(\.\.\.\), .* are read"),
        ("(?<!a)b", r"only \(\.\.\.\), .* are read"),
        ("(?i)a", r"only \(\.\.\.\), .* are read"),
        ("(?P<x>a)", r"only \(\.\.\.\), .* are read"),
        ("(?>a)", r"only \(\.\.\.\), .* are read"),
        (r"(a)\1", r"references .* are not read, got \\1"),
        (r"\x41", r"are not read, got \\x"),
        ("a*+", "multiple repeat"),
        ("a**", "multiple repeat"),
        ("*a", "nothing to repeat at position 0"),
        ("^*", "nothing to repeat"),
        ("(", "missing \\)"),
        ("a)", "unbalanced parenthesis at position 1"),
        ("[a", "unterminated character set"),
        ("[z-a]", "bad character range"),
        ("\\", "bad escape"),
        (r"\q", "bad escape"),
        ("a{3,2}", "min repeat greater than max"),
    ],
)
def test_rejects(pattern, message):
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as refused:
        ModulePattern(pattern)
    assert time.process_time() - start < 1 and len(str(refused.value)) < 200


def test_a_rule_for_each_module_is_within_the_limit():
    """As GPTQModel may write them for the 61 layers of the largest dense GLM-4."""
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_up_proj", "mlp.down_proj")
    size = sum(
        ModulePattern(rf".*layers\.{i}\.{kind.replace('.', chr(92) + '.')}$").size
        for i in range(61)
        for kind in kinds
    )
    assert size < PATTERNS_LIMIT / 2


def test_a_long_text_is_read_at_once():
    """Joined piece by piece it took a time quadratic in its length."""
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ModulePattern("x" * 10**5).matches(Name("x" * 60))
    assert time.process_time() - start < 2
