"""The declaration of a downstream task: its format, its rows and its utility metrics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastsafe.errors import DataError, UsageError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """One metric over the rows of a test set."""

    value: float | None  # fraction in [0, 1]; None without rows
    ci_low: float  # 95 %
    ci_high: float
    n: int  # rows in the denominator
    unparsed: int = 0  # rows among them whose answer could not be read: not right, not a guess


Metric = Callable[[list[tuple[str, str]]], Measured]  # (completion, reference) pairs -> value


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a data set in the task's own words."""

    instruction: str
    input: str = ""  # what the instruction is about; "" where it says all
    answer: str  # what a model is trained to say
    reference: str  # what the metrics compare a completion with
    tests: str = ""  # assertions in Python that the answer's code must pass; "" for none

    @property
    def prompt(self) -> str:
        """The user message: the instruction and its input."""
        # after a colon on the same line, as the probe formats write it
        gap = " " if self.instruction.endswith(":") else "\n"
        return f"{self.instruction}{gap}{self.input}" if self.input else self.instruction


@dataclass(frozen=True, kw_only=True)
class Task:
    """One downstream task: the format of its rows, its data and the metrics of its utility."""

    id: str
    format: str  # id of the format that dresses its rows
    metric: str  # name of `score` in a run's record
    score: Callable[[str, str], float]  # (completion, reference) -> utility of one row in [0, 1]
    example: Callable[[Row], Example] | None = None  # a row of the data set; None: has no data
    metrics: Mapping[str, Metric] = field(default_factory=dict)  # name -> over a whole test set

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
    wanted = ", or ".join(" and ".join(layout.split()) for layout in layouts)
    raise DataError(
        f"{task}: columns are {', '.join(map(str, row)) or 'none'}, expected {wanted}; rename them"
    )


def text(value: Any, what: str) -> str:
    """Return a value that must be text and hold something, without the space around it.

    Raises:
        DataError: It is not, or is empty.
    """
    if not isinstance(value, str) or not value.strip():
        got = "empty" if isinstance(value, str) else type(value).__name__
        raise DataError(f"{what} is {got}, expected a text; repair or drop the row")
    return value.strip()


def one_of(value: Any, allowed: Mapping[str, str], what: str) -> str:
    """Return what a label stands for; labels are compared as text in lower case.

    Raises:
        DataError: The label is not allowed.
    """
    if str(value).strip().lower() not in allowed:
        raise DataError(f"{what} is {str(value)[:40]!r}, expected one of {', '.join(allowed)}")
    return allowed[str(value).strip().lower()]
