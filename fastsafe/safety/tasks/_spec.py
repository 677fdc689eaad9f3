"""The declaration of a downstream task: its format, its rows and its utility metrics."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsafe.data.records import Record, records
from fastsafe.errors import DataError, UsageError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """The value of one metric on a test set."""

    value: float | None  # fraction in [0, 1]; None without rows
    ci_low: float  # 95 %
    ci_high: float
    n: int  # rows in the denominator
    unparsed: int = 0  # rows among them whose answer could not be extracted; they count as wrong


Metric = Callable[[list[tuple[str, str]]], Measured]  # (completion, reference) pairs -> value


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a data set as an instruction with its answer."""

    instruction: str
    input: str = ""  # of the instruction; "" where it has none
    answer: str  # target of training
    reference: str  # compared with completions by the metrics
    tests: str = ""  # assertions in Python that the answer's code must pass; "" for none

    @property
    def prompt(self) -> str:
        """The user message: the instruction and its input."""
        # after a colon on the same line, as the probe formats write it
        gap = " " if self.instruction.endswith(":") else "\n"
        return f"{self.instruction}{gap}{self.input}" if self.input else self.instruction


@dataclass(frozen=True, kw_only=True)
class Task:
    """One downstream task: the format of its rows, its data set and its utility metrics."""

    id: str
    format: str  # id of the format of its rows
    metric: str  # name of `score` in results
    score: Callable[[str, str], float]  # (completion, reference) -> utility of one row in [0, 1]
    example: Callable[[Row], Example] | None = None  # reads a row; None for a task without data
    metrics: Mapping[str, Metric] = field(default_factory=dict)  # name -> over a whole test set
    rows: Callable[[Path], Iterator[Record]] = records  # reads the data set's published files

    def read(self, row: Row) -> Example:
        """Return a row of the data set as an example.

        Raises:
            DataError: The row has other columns or values than the data set.
            UsageError: The task reads no data set.
        """
        if self.example is None:
            raise UsageError(f"task {self.id}: reads no data set, expected one that does")
        return self.example(row)


def columns(row: Row, task: str, *layouts: str) -> tuple[Any, ...]:
    """Return the values of the first layout whose columns the row has, in its order.

    Args:
        row: A row; columns beyond the layout's are ignored.
        task: Names the task in errors.
        *layouts: Column names, separated by blanks; each layout is one published form.

    Raises:
        DataError: The row lacks a column of every layout.
    """
    for layout in layouts:
        names = layout.split()
        if all(name in row for name in names):
            return tuple(row[name] for name in names)
    expected = ", or ".join(" and ".join(layout.split()) for layout in layouts)
    raise DataError(
        f"{task}: columns are {', '.join(map(str, row)) or 'none'}, expected {expected}; "
        "rename them"
    )


def text(value: Any, column: str) -> str:
    """Return the text of a column, stripped.

    Raises:
        DataError: The value is no text, or empty.
    """
    if not isinstance(value, str) or not value.strip():
        given = "empty" if isinstance(value, str) else type(value).__name__
        raise DataError(f"{column} is {given}, expected a text; repair or drop the row")
    return value.strip()


def one_of(value: Any, allowed: Mapping[str, str], column: str) -> str:
    """Return the meaning of a label; labels are compared as text in lower case.

    Raises:
        DataError: The label is not allowed.
    """
    if str(value).strip().lower() not in allowed:
        raise DataError(f"{column} is {str(value)[:40]!r}, expected one of {', '.join(allowed)}")
    return allowed[str(value).strip().lower()]
