"""Regular expressions of adapter configs, matched against module names in bounded time.

``re`` backtracks, so an untrusted pattern such as ``(a|b|ab)*c`` can run for ever. Here Python's
own parser reads the pattern, and a match carries the set of all positions that the pattern may
have reached (Thompson 1968, doi:10.1145/363347.363387), as the bits of one integer. Nothing
backtracks; greedy and lazy repeats are the same, since only whether a name matches is asked. What
such a set cannot express (references to groups, possessive repeats) is refused by name.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

from fastsafe.errors import AdapterError

MAX_PATTERN = 1 << 14  # characters
MAX_NESTING = 32
MAX_STEPS = 2_000_000  # per adapter; 900 rank patterns on 900 modules take a fifth of it

_Node = tuple[Any, Any]  # an operator of Python's parser and its arguments
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    op.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    op.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}
_ONE_CHARACTER = (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN)
_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT)
_LOOKS_AHEAD = (op.ASSERT, op.ASSERT_NOT)
_ANCHORS = (
    op.AT_BEGINNING,
    op.AT_BEGINNING_STRING,
    op.AT_BOUNDARY,
    op.AT_NON_BOUNDARY,
    op.AT_END,
    op.AT_END_STRING,
)


def check_pattern(pattern: str, location: str) -> None:
    r"""Refuse a pattern that is no regular expression or uses what is not matched here.

    Raises:
        AdapterError: The message names the pattern and the construct.

    Example:
        >>> check_pattern(r".*\.(q_proj|v_proj)", "demo")
        >>> check_pattern("(a)\\1", "demo")
        Traceback (most recent call last):
        fastsafe.errors.AdapterError: demo: pattern '(a)\\1' uses GROUPREF, which is not matched ...
    """
    _parse(pattern, location)


class NameMatcher:
    """Matches the patterns of one adapter; all matches together may take ``MAX_STEPS``."""

    def __init__(self, location: str) -> None:
        self.location = location  # file that messages name
        self._steps_left = MAX_STEPS

    def matches(self, pattern: str, name: str, *, suffix: bool = False) -> bool:
        """Return whether the pattern matches the whole name, as ``re.fullmatch`` does.

        Args:
            pattern: Of any origin.
            name: Dotted path of a module, of one line.
            suffix: The pattern may also match what follows a dot of the name, as PEFT matches
                ``rank_pattern``.

        Raises:
            AdapterError: The pattern is refused, or the matches so far took too long.
        """
        parsed = _parse(pattern, self.location)
        if parsed.plain is not None:
            self._spend(1)
            return parsed.plain[suffix].fullmatch(name) is not None
        starts = 1
        if suffix:
            starts |= sum(1 << (i + 1) for i, c in enumerate(name) if c == ".")
        return bool(self._sequence(parsed.nodes, name, starts) >> len(name) & 1)

    def _spend(self, steps: int) -> None:
        self._steps_left -= steps
        if self._steps_left < 0:
            raise AdapterError(
                f"{self.location}: its patterns take more than {MAX_STEPS} steps on the names of "
                "the base model's modules; list the module names instead"
            )

    def _sequence(self, nodes: Sequence[_Node], name: str, at: int) -> int:
        """Return the positions that are reached from the positions ``at``, both as bits."""
        for kind, value in nodes:
            if not at:
                break
            self._spend(1 + at.bit_count())
            if kind in _ONE_CHARACTER:
                at = sum(2 << i for i in _bits(at, len(name)) if _fits(kind, value, name[i]))
            elif kind is op.BRANCH:
                branches, at, start = value[1], 0, at
                for branch in branches:
                    at |= self._sequence(branch, name, start)
            elif kind is op.SUBPATTERN:
                at = self._sequence(value[3], name, at)
            elif kind in _REPEATS:
                at = self._repeated(value, name, at)
            elif kind in _LOOKS_AHEAD:
                wanted = kind is op.ASSERT
                at = sum(
                    1 << i
                    for i in _bits(at, len(name) + 1)
                    if bool(self._sequence(value[1], name, 1 << i)) == wanted
                )
            else:
                at = sum(1 << i for i in _bits(at, len(name) + 1) if _is_at(value, name, i))
        return at

    def _repeated(self, value: tuple[int, int, Any], name: str, at: int) -> int:
        low, high, body = value
        for _ in range(low):
            before, at = at, self._sequence(body, name, at)
            if at == before:  # so does every further repeat
                break
        reached = fresh = at
        for _ in range(high - low):
            fresh = self._sequence(body, name, fresh) & ~reached
            if not fresh:
                break
            reached |= fresh
        return reached


class _Pattern(NamedTuple):
    nodes: Sequence[_Node]
    # Without repeats and branches ``re`` is fast, too: for the whole name, and for what follows a
    # dot. Nearly every key of a rank_pattern is such a pattern, the plain name of a module.
    plain: tuple[re.Pattern[str], re.Pattern[str]] | None


@lru_cache(maxsize=4096)
def _parse(pattern: str, location: str) -> _Pattern:
    if len(pattern) > MAX_PATTERN:
        raise AdapterError(
            f"{location}: pattern has {len(pattern)} characters, expected at most {MAX_PATTERN}"
        )
    try:
        tree = _parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as problem:
        raise AdapterError(
            f"{location}: pattern {pattern!a:.80} is no regular expression: {problem!s:.80}"
        ) from None
    refused = "flags" if tree.state.flags != op.SRE_FLAG_UNICODE else _refused(tree, 0)
    if refused:
        raise AdapterError(
            f"{location}: pattern {pattern!a:.80} uses {refused}, which is not matched in patterns "
            "from untrusted files; list the module names instead"
        )
    plain = None
    if all(kind in _ONE_CHARACTER or kind is op.AT for kind, _ in tree):
        plain = re.compile(pattern), re.compile(rf"(?:.*\.)?(?:{pattern})")
    return _Pattern(tree, plain)


def _refused(nodes: Sequence[_Node], depth: int) -> str:
    """Return the name of a construct that is not matched here; empty when there is none."""
    if depth > MAX_NESTING:
        return f"more than {MAX_NESTING} nested groups"
    for kind, value in nodes:
        if kind is op.BRANCH:
            bodies = value[1]
        elif kind is op.SUBPATTERN:
            bodies = [value[3]]
            if value[1] or value[2]:
                return "flags"
        elif kind in _REPEATS:
            bodies = [value[2]]
        elif kind in _LOOKS_AHEAD:
            bodies = [value[1]]
            if value[0] < 0:
                return "lookbehind"
        elif kind in _ONE_CHARACTER or (kind is op.AT and value in _ANCHORS):
            bodies = []
        else:
            return str(kind)
        for body in bodies:
            if refused := _refused(body, depth + 1):
                return refused
    return ""


def _bits(bits: int, end: int) -> Iterator[int]:
    """List the places below ``end`` of the bits that are set."""
    return (i for i in range(end) if bits >> i & 1)


def _fits(kind: Any, value: Any, char: str) -> bool:
    if kind is op.LITERAL:
        return chr(value) == char
    if kind is op.NOT_LITERAL:
        return chr(value) != char
    if kind is op.ANY:
        return char != "\n"
    negated: bool = value[0][0] is op.NEGATE
    return negated != any(_is_in(item, char) for item in value[negated:])


def _is_in(item: _Node, char: str) -> bool:
    kind, value = item
    if kind is op.LITERAL:
        return chr(value) == char
    if kind is op.RANGE:
        return chr(value[0]) <= char <= chr(value[1])
    return _CATEGORIES[value](char)


def _is_at(anchor: Any, name: str, i: int) -> bool:
    if anchor in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
        return i == 0
    if anchor in (op.AT_END, op.AT_END_STRING):
        return i == len(name)
    is_word = _CATEGORIES[op.CATEGORY_WORD]
    changes = (i > 0 and is_word(name[i - 1])) != (i < len(name) and is_word(name[i]))
    at_boundary: bool = anchor is op.AT_BOUNDARY
    return changes == at_boundary
