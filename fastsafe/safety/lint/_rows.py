"""Rows as the rules of the linter read them, and what a rule returns."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from fastsafe.data.conversation import Row
from fastsafe.data.exchange import Exchange, exchange_of
from fastsafe.safety.judges import Judge
from fastsafe.safety.verdict import Verdict

READ_CHARS = 1000

Kind = Literal["safety", "user"]
Rule = Literal[
    "duplicate",
    "near_duplicate",
    "non_refusal",
    "template_leakage",
    "probe_leakage",
    "language",
    "balance",
    "licence",
]


class LintFinding(NamedTuple):
    """One flaw of one row; of the whole set where the first row concerned stands for it."""

    rule: Rule
    row: int  # from 0, header excluded
    detail: str  # counts and other rows, never text of the set
    quote: str = ""  # the text concerned, shown on demand


@dataclass(frozen=True)
class Declared:
    """What is said about a set, and not in it; "" where nothing is."""

    format: str = ""
    language: str = ""  # of the answers
    licence: str = ""


@dataclass(frozen=True)
class LintRow:
    """One row."""

    number: int
    row: Row
    exchange: Exchange
    screen: Judge  # reads whether an answer opens with a refusal

    @cached_property
    def refuses(self) -> bool:
        """Whether the answer opens with a refusal."""
        return self.opens_with_refusal(self.exchange.answer)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Words of the prompt, or of running text, whatever their case and punctuation."""
        return words_of(self.exchange.prompt or self.exchange.answer)

    def opens_with_refusal(self, text: str) -> bool:
        """Whether a part of the answer opens with a refusal."""
        # the screen reads an opening: more than that would cost time alone
        judgement = self.screen.judge(self.exchange.prompt, text[:READ_CHARS], harmful=True)
        return judgement.verdict == Verdict.REFUSED

    def label(self, *columns: str) -> str:
        """Text in the first of the columns that the row has, "" without one."""
        values = (self.row.get(column) for column in columns)
        return str(next((value for value in values if value not in (None, "")), ""))

    def format(self, declared: Declared) -> str:
        """Id of the format that the row says it is in, "" where nobody says."""
        return self.label("safety_format", "task_format", "format") or declared.format


class Set(NamedTuple):
    """A whole set, its rows told apart."""

    items: Sequence[LintRow]
    safety: Sequence[LintRow]  # rows that should refuse
    user: Sequence[LintRow]  # rows that should answer: a user's, or benign twins


def lint_rows(rows: Sequence[Row], screen: Judge) -> list[LintRow]:
    """Read every row once.

    Raises:
        DataError: A row is malformed or token ids.
    """
    return [LintRow(i, row, exchange_of(row, f"row {i}"), screen) for i, row in enumerate(rows)]


def words_of(text: str) -> tuple[str, ...]:
    """Words of a text: compatibility forms, lower case, no punctuation.

    Example:
        >>> words_of("Paint  the CAR!")
        ('paint', 'the', 'car')
    """
    return tuple(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))
