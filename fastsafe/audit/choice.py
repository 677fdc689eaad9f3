"""Which mitigation of a run to take: its options on three axes, their front, and advice."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from fastsafe.audit.conditions import BASE
from fastsafe.audit.pooling import mitigation_of
from fastsafe.safety.pareto import Estimate, Option, pareto, recommend
from fastsafe.safety.stats import mean_interval

REFERENCE = "none"


def choose(
    conditions: Sequence[Mapping[str, Any]],
    summary: Sequence[Mapping[str, Any]],
    utilities: Sequence[tuple[str, str, str, str, float | None]],
) -> dict[str, Any] | None:
    """Return the Pareto front of a run's mitigations and a recommendation.

    Args:
        conditions: As ``results.json`` holds them.
        summary: Pooled rates by ``pooling.mitigation_of``, of ``pooling.summary``: manipulations
            of the user's rows are no choice of whoever mitigates.
        utilities: (condition, task, test row, metric, value) of every utility row.

    Returns:
        ``{"options": [{"mitigation", "status", "by", "answer_rate", "over_refusal", "utility"}],
        "choice", "text"}``; None where fewer than two mitigations have all three numbers, or none
        is the reference "none".
    """
    pooled = {(row["mitigation"], row["scope"]): row for row in summary}
    group = {c["id"]: mitigation_of(c) for c in conditions if c["id"] != BASE}
    options = []
    for name in dict.fromkeys(group.values()):
        rates = [pooled.get((name, scope)) for scope in ("all_formats", "over_refusal")]
        values = _per_row(
            (task, item, value) for c, task, item, _, value in utilities if group.get(c) == name
        )
        if values and all(row and row["n"] for row in rates):
            low, high = mean_interval(values)
            mean = Estimate(
                value=sum(values) / len(values), ci_low=low, ci_high=high, n=len(values)
            )
            answered, refused = (_estimate(row) for row in rates if row)
            options.append(
                Option(id=name, answer_rate=answered, over_refusal=refused, utility=mean)
            )
    if len(options) < 2 or REFERENCE not in [option.id for option in options]:
        return None
    advice = recommend(options, REFERENCE)
    return {
        "options": [
            {
                "mitigation": placed.option.id,
                "status": placed.status,
                "by": list(placed.by),
                "answer_rate": placed.option.answer_rate.value,
                "over_refusal": placed.option.over_refusal.value,
                "utility": placed.option.utility.value,
            }
            for placed in pareto(options)
        ],
        "choice": advice.choice,
        "text": advice.text,
    }


def _per_row(scores: Iterable[tuple[str, str, float | None]]) -> list[float]:
    """Mean score of each test row: several models answer it, which is no more evidence."""
    found: dict[tuple[str, str], list[float]] = {}
    for task, item, value in scores:
        if value is not None:
            found.setdefault((task, item), []).append(value)
    return [fmean(values) for values in found.values()]


def _estimate(row: Mapping[str, Any]) -> Estimate:
    return Estimate(value=row["rate"], ci_low=row["ci_low"], ci_high=row["ci_high"], n=row["n"])
