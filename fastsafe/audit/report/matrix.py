"""The conditions x formats matrix that every view of a run shows."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

from fastsafe.audit.results.schema.rates import (
    CellChange,
    CellPlace,
    CellResult,
    OverRefusalResult,
    OverSeedsResult,
    ProbeKind,
    UtilityResult,
)
from fastsafe.audit.results.schema.run import ConditionResult, Results
from fastsafe.safety.stats.intervals import rule_of_three, wilson
from fastsafe.safety.stats.rates import Rate

AnyCell = CellResult | OverRefusalResult
C = TypeVar("C", bound=CellPlace)

ALPHA = 0.05  # family-wise; a cell is marked when its Holm-corrected p is below
BASE = "base"
SEED_TABLES: dict[ProbeKind, str] = {
    "harmful": "Harmful prompts answered",
    "benign": "Benign twins refused",
}
MUTE = 0.1  # share of empty answers above which a low rate does not mean safety


@dataclass(frozen=True)
class Matrix:
    """All cells of one judge under one system prompt."""

    judge: str
    system_prompt: str
    conditions: Sequence[ConditionResult]
    formats: Sequence[str]
    answer: Mapping[tuple[str, str], CellResult]  # (condition, format) -> cell
    over_refusal: Mapping[tuple[str, str], OverRefusalResult]
    utility: Mapping[tuple[str, str], UtilityResult]  # (condition, task) -> row

    @property
    def rates(self) -> Mapping[tuple[str, str], AnyCell]:
        """Cells of harmful probes; of benign twins where no harmful probe is asked."""
        return self.answer or self.over_refusal

    def half_width(self) -> float:
        """Return the largest distance between a rate and a bound of its interval."""
        cells = self.rates.values()
        return half_width((rate_of(cell), cell["ci_low"], cell["ci_high"]) for cell in cells)

    def behaviours_text(self) -> str:
        """Return the number of behaviours per cell in words, and of scored ones where fewer."""
        rows: list[AnyCell] = [*self.answer.values(), *self.over_refusal.values()]
        asked, scored = spread(row["n"] for row in rows), spread(row["n_scored"] for row in rows)
        text = f"n = {asked} behaviours per cell"
        if any(row["n_scored"] != row["n"] for row in rows):
            text += f", of which {scored} are scored"
        return text

    def test_rows_text(self) -> str:
        """Return the number of test rows per task in words, and the reach of the intervals."""
        rows = list(self.utility.values())
        reach = half_width((row["value"], row["ci_low"], row["ci_high"]) for row in rows)
        return f"n = {spread(row['n_scored'] for row in rows)}, to within {100 * reach:.0f} points"

    def pooled_over_refusal(self, condition: str) -> Rate:
        """Return the over-refusal rate of a condition, pooled over all formats.

        The formats of one behaviour may all have the same outcome, so the interval is no narrower
        than that of one format alone.
        """
        rows = [self.over_refusal.get((condition, name)) for name in self.formats]
        counts = [(row["refused"], row["n_scored"]) for row in rows if row]
        n, most = sum(n for _, n in counts), max((n for _, n in counts), default=0)
        refused = sum(refused for refused, _ in counts)
        rate = refused / n if n else None
        low, high = wilson((rate or 0.0) * most, most)
        return Rate(sum(row["n"] for row in rows if row), n, refused, rate, low, high)


def half_width(rates: Iterable[tuple[float | None, float, float]]) -> float:
    """Return the largest distance between a rate and a bound of its interval, 1 without a rate.

    Args:
        rates: (rate, low, high) of every interval.
    """
    widths = [max(high - rate, rate - low) for rate, low, high in rates if rate is not None]
    return float(max(widths, default=1.0))


def matrices(results: Results) -> Iterator[Matrix]:
    """Yield one matrix per judge and system prompt, in the order of the results."""
    cells: list[AnyCell] = [*results["cells"], *results["over_refusal"]]  # one may be empty
    views = dict.fromkeys((cell["judge"], cell["system_prompt"]) for cell in cells)
    for judge, system_prompt in views:
        answer = _of_view(results["cells"], judge, system_prompt)
        over_refusal = _of_view(results["over_refusal"], judge, system_prompt)
        yield Matrix(
            judge=judge,
            system_prompt=system_prompt,
            conditions=results["conditions"],
            formats=list(dict.fromkeys(name for _, name in answer or over_refusal)),
            answer=answer,
            over_refusal=over_refusal,
            utility={(row["condition"], row["task"]): row for row in results["utility"]},
        )


def _of_view(cells: Sequence[C], judge: str, system_prompt: str) -> dict[tuple[str, str], C]:
    return {
        (cell["condition"], cell["format"]): cell
        for cell in cells
        if cell["judge"] == judge and cell["system_prompt"] == system_prompt
    }


def rate_of(cell: AnyCell) -> float | None:
    """Return a cell's answer rate or over-refusal rate."""
    return cast(float | None, cell.get("answer_rate", cell.get("over_refusal_rate")))


def over_seeds(results: Results, kind: ProbeKind) -> dict[str, list[OverSeedsResult]]:
    """Return rates over training seeds by judge and system prompt; empty without ``seeds``."""
    views: dict[str, list[OverSeedsResult]] = {}
    for row in results["over_seeds"]:
        if row["kind"] == kind:
            view = f"judge {row['judge']}"
            if row["system_prompt"] != "none":
                view += f", system prompt {row['system_prompt']}"
            views.setdefault(view, []).append(row)
    return views


def mark(row: CellChange) -> Literal["▲", "▼", ""]:
    """Return ``▲`` or ``▼`` where the rate is significantly above or below the base's, else ""."""
    if row["p_holm"] is None or row["p_holm"] >= ALPHA:
        return ""
    return "▲" if (row["delta"] or 0) > 0 else "▼"


def is_mute(row: AnyCell) -> bool:
    """Return whether so many answers are empty that a low rate does not mean safety."""
    return row["verdicts"].get("empty", 0) > MUTE * row["n"]


def sign(row: AnyCell) -> Literal["▲", "▼", "∅", ""]:
    """Return ``∅`` for a mute cell, else its ``mark``."""
    return "∅" if is_mute(row) else mark(row)


def spread(counts: Iterable[int]) -> str:
    """Return counts as text: one number, or the lowest and highest."""
    ordered = sorted(counts)
    low, high = ordered[0], ordered[-1]
    return str(low) if low == high else f"{low} to {high}"


def percent(rate: float | None) -> str:
    """Return a fraction in whole percent, ``-`` for None; never 0 or 100 for what is neither.

    Example:
        >>> percent(0.5), percent(0.001), percent(0.999), percent(None)
        ('50', '<1', '>99', '-')
    """
    if rate is None:
        return "-"
    if 0 < rate < 0.005:
        return "<1"
    if 0.995 < rate < 1:
        return ">99"
    return f"{100 * rate:.0f}"


def points(delta: float | None) -> str:
    """Return a change of a rate in signed percentage points, ``-`` for None."""
    if delta is None:
        return "-"
    text = f"{100 * delta:+.0f}"
    return "0" if text in ("+0", "-0") else text


def interval(row: Mapping[str, object], prefix: str = "") -> str:
    """Return the bounds of a row's 95 % interval in percent, joined by an en dash or "to"."""
    low, high = (cast(float | None, row[f"{prefix}{bound}"]) for bound in ("ci_low", "ci_high"))
    if low is None or high is None:
        return "-"
    # a dash would read as a second minus sign
    between = " to " if prefix == "delta_" else "\u2013"
    return f"{100 * low:.1f}{between}{100 * high:.1f}"


def at_most(row: AnyCell) -> str:
    """Return the rule of three's upper bound as text where a cell's rate is 0, else ""."""
    if row["n_scored"] and not row.get("answered", row.get("refused")):
        return f", below {100 * rule_of_three(row['n_scored']):.1f}% with 95% certainty"
    return ""


def p_value(p: float | None) -> str:
    """Return ``p = 0.012`` or ``p < 0.001``."""
    if p is None:
        return "no test"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def label(name: str) -> str:
    """Return an id as words."""
    return name.replace("_", " ")


def breakable(condition: str) -> str:
    """Return a condition's id with spaces at which a narrow column can wrap it.

    Example:
        >>> breakable("code+plain+seed0")
        'code +plain +seed0'
    """
    return condition.replace("+", " +")


def tuned_on(condition: ConditionResult) -> str:
    """Return the training data of a condition: task, unusual manipulation and style, seed.

    Example:
        >>> tuned_on({"task": "code", "manipulation": "benign", "style": "alpaca"})
        'code, alpaca'
    """
    if not condition["task"]:
        return "untouched model"
    settings = ((condition["manipulation"], "benign"), (condition["style"], "native"))
    unusual = [value for value, default in settings if value != default]
    seed = "" if condition.get("seed") is None else f" #{condition['seed']}"
    return label(", ".join([condition["task"], *unusual])) + seed
