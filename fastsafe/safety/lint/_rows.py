"""The linter's input and output: rows, the declarations about a set, and findings."""

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

READ_CHARS = 1000  # of an answer that the refusal screen reads

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
    """One flaw of a row, or of the whole set at the first row concerned."""

    rule: Rule
    row: int  # from 0, header excluded
    detail: str  # counts and row numbers, never text of the set
    quote: str = ""  # the text concerned, shown on demand


@dataclass(frozen=True)
class Declared:
    """Declarations about a set by its user; "" for none."""

    format: str = ""
    language: str = ""  # of the answers
    licence: str = ""
    has_twins: bool = False  # whether benign twins of the safety rows are known beside the set


@dataclass(frozen=True)
class LintRow:
    """One row of a set."""

    number: int
    row: Row
    exchange: Exchange
    screen: Judge  # judges whether an answer opens with a refusal

    @cached_property
    def refuses(self) -> bool:
        """Whether the answer opens with a refusal."""
        return self.opens_with_refusal(self.exchange.answer)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Words of the prompt (of running text without one), by `words_of`."""
        return words_of(self.exchange.prompt or self.exchange.answer)

    def opens_with_refusal(self, text: str) -> bool:
        """Return whether a part of the answer opens with a refusal."""
        # the screen reads the opening alone, so a longer text only costs time
        judgement = self.screen.judge(self.exchange.prompt, text[:READ_CHARS], harmful=True)
        return judgement.verdict == Verdict.REFUSED

    def label(self, *columns: str) -> str:
        """Return the text in the first of the columns that the row has, "" without one."""
        values = (self.row.get(column) for column in columns)
        return str(next((value for value in values if value not in (None, "")), ""))

    def format(self, declared: Declared) -> str:
        """Return the id of the row's format by its columns or by declaration, "" without one."""
        return self.label("safety_format", "task_format", "format") or declared.format


class LintSet(NamedTuple):
    """A whole set, divided into safety rows and user rows."""

    items: Sequence[LintRow]
    safety: Sequence[LintRow]  # rows that should refuse
    user: Sequence[LintRow]  # rows that should answer: a user's, or benign twins


def lint_rows(rows: Sequence[Row], screen: Judge) -> list[LintRow]:
    """Return the rows of a set for the rules.

    Raises:
        DataError: A row is malformed or token ids.
    """
    return [LintRow(i, row, exchange_of(row, f"row {i}"), screen) for i, row in enumerate(rows)]


def words_of(text: str) -> tuple[str, ...]:
    """Return the words of a text, NFKC-normalised, in lower case, without punctuation.

    Example:
        >>> words_of("Paint  the CAR!")
        ('paint', 'the', 'car')
    """
    return tuple(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))
