"""Which mitigation of a run to take: its options on three axes, their front, and advice."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastsafe.safety.stats.pareto import AXES, Estimate, Option, estimate, pareto, recommend

REFERENCE = "none"
_SCOPES = ("all_formats", "over_refusal", "utility")


def choose(summary: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the Pareto front of a run's mitigations and a recommendation.

    Args:
        summary: Pooled rates by ``pooling.mitigation_of``, of ``pooling.summary``: manipulations
            of the user's rows are no choice of whoever mitigates.

    Returns:
        ``{"options": [{"mitigation", "status", "by", and for each of "answer_rate",
        "over_refusal" and "utility" its value, "<axis>_ci_low", "<axis>_ci_high", "<axis>_n"}],
        "choice", "text"}``; None where fewer than two mitigations have all three numbers, or none
        is the reference "none".
    """
    pooled = {(row["mitigation"], row["scope"]): row for row in summary}
    options = []
    for name in dict.fromkeys(row["mitigation"] for row in summary if row["mitigation"] != "base"):
        rows = [pooled.get((name, scope)) for scope in _SCOPES]
        if all(row and row["n"] for row in rows):
            rates = [_estimate(row) for row in rows if row]
            options.append(Option(id=name, **dict(zip(AXES, rates, strict=True))))
    if len(options) < 2 or REFERENCE not in [option.id for option in options]:
        return None
    front = pareto(options)
    advice = recommend(front, REFERENCE)
    found = []
    for placed in front:
        row: dict[str, Any] = {
            "mitigation": placed.option.id,
            "status": placed.status,
            "by": list(placed.by),
        }
        for axis in AXES:
            value = estimate(placed.option, axis)
            bounds = {"ci_low": value.ci_low, "ci_high": value.ci_high, "n": value.n}
            row |= {axis: value.value} | {f"{axis}_{k}": bound for k, bound in bounds.items()}
        found.append(row)
    return {"options": found, "choice": advice.choice, "text": advice.text}


def _estimate(row: Mapping[str, Any]) -> Estimate:
    return Estimate(value=row["rate"], ci_low=row["ci_low"], ci_high=row["ci_high"], n=row["n"])
