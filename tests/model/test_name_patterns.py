"""Patterns of adapters: matched as ``re`` matches them, in bounded time whatever they are."""

import contextlib
import random
import re

import pytest

from fastsafe.errors import AdapterError
from fastsafe.model.name_patterns import MAX_STEPS, NameMatcher, check_pattern

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
NAMES = [f"model.layers.{i}.{module}" for i in range(80) for module in MODULES]
ATOMS = re.split(" ", r"a b c _ . \. \w \W \d \s \S [ab] [^a] [a-c] [\d_] [^\w] ^ $ \b \B")


def expression(generator: random.Random, depth: int) -> str:
    choice = generator.random()
    if depth == 0 or choice < 0.35:
        return generator.choice(ATOMS)
    first, second = expression(generator, depth - 1), expression(generator, depth - 1)
    if choice < 0.5:
        return first + second
    if choice < 0.7:
        return f"({first}|{second})"
    if choice < 0.77:
        return f"{generator.choice(['(?=', '(?!'])}{first})"
    repeats = ["*", "+", "?", "*?", "+?", "??", "{2}", "{0,2}", "{1,}", "{2,3}?"]
    return f"({first}){generator.choice(repeats)}"


def test_random_expressions_match_as_in_re() -> None:
    generator = random.Random(0)
    names = ["a", "ab", "abc", "a.b", "a.b.c", "aab.ba", "b_1.a", "aaabbb", "ba.1_.c"]
    matched = 0
    for _ in range(1000):
        pattern = expression(generator, 4)
        matcher = NameMatcher("test")
        for name in names:
            whole = re.fullmatch(pattern, name) is not None
            suffix = re.match(rf"(.*\.)?({pattern})$", name) is not None
            assert matcher.matches(pattern, name) == whole, (pattern, name)
            assert matcher.matches(pattern, name, suffix=True) == suffix, (pattern, name)
            matched += whole
    assert 500 < matched < 8500


@pytest.mark.parametrize(
    "pattern",
    [
        "(.|[a-z._0-9])" * 30 + "!",
        "(.+)+!",
        "(((.*)*)*)*!",
        "(.|..|...)*!",
        "((a|.)?){4000000000}!",
        "(.?){0,4000000000}!",
        ".*?" * 300 + "!",
        "(?=(.*)*!)(.*)*",
        "(()|(|))*!",
        "(?:" * 30 + ".*" + ")*" * 30 + "!",
    ],
)
def test_expressions_that_backtrack_for_ever_in_re(pattern: str) -> None:
    matcher = NameMatcher("test")
    with contextlib.suppress(AdapterError):  # over the budget
        assert not any(matcher.matches(pattern, name) for name in NAMES)
    assert MAX_STEPS - matcher._steps_left > len(NAMES)


def test_many_patterns_share_one_budget() -> None:
    matcher = NameMatcher("adapter_config.json")
    patterns = [f"{'.*?' * 6}x{i}" for i in range(256)]

    def match_all() -> bool:
        return any(matcher.matches(p, name, suffix=True) for name in NAMES for p in patterns)

    with pytest.raises(AdapterError, match=r"^adapter_config\.json: its patterns take more than"):
        match_all()


@pytest.mark.parametrize("spelling", [str, re.escape, "^{}$".format])
def test_a_pattern_for_every_module_fits_the_budget(spelling: type) -> None:
    names = [f"model.layers.{i}.mlp.{j}_proj" for i in range(126) for j in range(7)]
    matcher = NameMatcher("test")
    for i, name in enumerate(names):
        first = next(
            k for k, key in enumerate(names) if matcher.matches(spelling(key), name, suffix=True)
        )
        assert first == i


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("q_proj(", "is no regular expression: missing"),
        ("*", "is no regular expression: nothing to repeat"),
        ("a{99999999999}", "is no regular expression: the repetition number is too large"),
        ("(" * 40 + ")" * 40, "uses more than 32 nested groups"),
        ("(" * 8000 + ")" * 8000, "is no regular expression: maximum recursion|nested groups"),
        ("x" * (1 << 15), "pattern has 32768 characters, expected at most 16384"),
        (r"(a)\1", "uses GROUPREF, which is not matched in patterns from untrusted files"),
        ("(a)?(?(1)b|c)", "uses GROUPREF_EXISTS"),
        ("(?<=a)b", "uses lookbehind"),
        ("(?>a*)b", "uses ATOMIC_GROUP"),
        ("a*+b", "uses POSSESSIVE_REPEAT"),
        ("(?i)Q_PROJ", "uses flags"),
        ("(?i:Q)_proj", "uses flags"),
        ("(?x) q_proj", "uses flags"),
    ],
)
def test_what_is_not_matched_is_refused_by_name(pattern: str, message: str) -> None:
    with pytest.raises(AdapterError, match=f"^config: .*({message})"):
        check_pattern(pattern, "config")
