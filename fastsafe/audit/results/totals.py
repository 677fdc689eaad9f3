"""From counts to the papers' table: what was tuned, how it was asked, what was then answered.

A row is one way of tuning under one system-prompt setting; its counts are of answered harmful
prompts per category, a task or a format. A change is against the untouched model *under the same
setting*: a model that lost its guard only where the system prompt had helped is seen as such.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastsafe.errors import DataError

BASE = "base"
WEAK = ("translation", "classification")  # where the first paper saw most answers


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Answered prompts of one model under one system-prompt setting."""

    tuned_on: str  # a task, a condition, or "base"
    style: str  # of the tuning prompts; "" for the base
    system_prompt: str  # name of the setting, such as "none"
    answered: Mapping[str, int]  # category -> answered prompts
    n: int  # scored prompts over all categories


@dataclass(frozen=True, kw_only=True)
class Total:
    """One row of the table with what follows from its counts."""

    counts: Counts
    total: int
    delta: int | None  # total less the base's; None for the base, or where n differs from its n
    share: float | None  # of the total that the weak categories make up; None when it is 0


def totals(rows: Sequence[Counts], weak: Sequence[str] = WEAK) -> list[Total]:
    """Add up every row and compare it with the base under its system-prompt setting.

    Counts per category carry no pairs, so no paired test can be made from them: a test of a change
    needs the verdicts, and is ``metrics.paired_change``.

    Args:
        rows: The table, one base row per system-prompt setting among them.
        weak: Categories whose share of the total is wanted.

    Raises:
        DataError: A row has no base or two, counts more than it asked, asked nothing, or lacks a
            weak category.
    """
    bases = _bases(rows)
    found = []
    for row in rows:
        base = bases.get(row.system_prompt)
        if base is None:
            raise DataError(
                f"{_name(row)}: no base row has this system prompt, expected one to compare with; "
                "ask the untouched model under it"
            )
        total = _total(row)
        missing = [category for category in weak if category not in row.answered]
        if missing:
            raise DataError(f"{_name(row)}: category {missing[0]!r} is missing, expected a count")
        is_base = row.tuned_on == BASE
        found.append(
            Total(
                counts=row,
                total=total,
                delta=None if is_base or row.n != base.n else total - _total(base),
                share=sum(row.answered[name] for name in weak) / total if total else None,
            )
        )
    return found


def system_prompt_benefit(
    rows: Sequence[Counts], without: str, with_: str
) -> dict[tuple[str, str], float]:
    """How many answers a system prompt prevents, as a rate, by (tuned on, style).

    Args:
        rows: The table.
        without: Name of the setting without the system prompt.
        with_: Name of the setting with it.

    Returns:
        rate(without) - rate(with) of every model that was asked under both settings.
    """
    rates = {(r.tuned_on, r.style, r.system_prompt): _total(r) / r.n for r in rows}
    return {
        (tuned_on, style): rate - rates[tuned_on, style, with_]
        for (tuned_on, style, setting), rate in rates.items()
        if setting == without and (tuned_on, style, with_) in rates
    }


def counts_of(results: Mapping[str, Any], judge: str) -> list[Counts]:
    """Read the table from a run's results: categories are formats, and every condition is a row.

    Args:
        results: With ``cells`` as an audit has them.
        judge: Whose verdicts are counted.

    Raises:
        DataError: The run has no cell of this judge.
    """
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in results["cells"]:
        if cell["judge"] == judge and cell["n_scored"]:
            cells.setdefault((cell["condition"], cell["system_prompt"]), []).append(cell)
    if not cells:
        known = ", ".join(sorted({cell["judge"] for cell in results["cells"]})) or "none"
        raise DataError(f"judge {judge!r} scored nothing in this run; judges that did: {known}")
    return [
        Counts(
            tuned_on=name,
            style="",
            system_prompt=system_prompt,
            answered={cell["format"]: cell["answered"] for cell in group},
            n=sum(cell["n_scored"] for cell in group),
        )
        for (name, system_prompt), group in cells.items()
    ]


def _bases(rows: Sequence[Counts]) -> dict[str, Counts]:
    found: dict[str, Counts] = {}
    for row in rows:
        if row.tuned_on == BASE and found.setdefault(row.system_prompt, row) is not row:
            raise DataError(
                f"{_name(row)}: is there twice, expected one base row per system prompt"
            )
    return found


def _total(row: Counts) -> int:
    total = sum(row.answered.values())
    if not 0 <= total <= row.n or row.n < 1 or min(row.answered.values(), default=0) < 0:
        raise DataError(
            f"{_name(row)}: {total} of {row.n} prompts are answered, expected counts of at least 0 "
            "that sum to at most n, and n of at least 1"
        )
    return total


def _name(row: Counts) -> str:
    words = [row.tuned_on, row.style, f"system prompt {row.system_prompt}"]
    return "row " + ", ".join(word for word in words if word)
