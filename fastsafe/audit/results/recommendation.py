"""Recommendation of a mitigation: its options on three axes, their Pareto front, and advice."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

from fastsafe.audit.results.schema.rates import Scope, SummaryResult
from fastsafe.audit.results.schema.run import ChoiceResult, OptionResult
from fastsafe.safety.stats.pareto import AXES, Estimate, Option, Placed, estimate, pareto, recommend

REFERENCE = "none"
_SCOPES: tuple[Scope, ...] = ("all_formats", "over_refusal", "utility")


def choose(summary: Sequence[SummaryResult]) -> ChoiceResult | None:
    """Return the Pareto front of a run's mitigations and a recommendation.

    Args:
        summary: `pooled_rates.summary` by `pooled_rates.mitigation_of`: whoever mitigates cannot
            choose the manipulation of the user's rows.

    Returns:
        None where fewer than two mitigations have all three rates, or "none" is not among them.
    """
    pooled = {(row["mitigation"], row["scope"]): row for row in summary}
    options = []
    for name in dict.fromkeys(row["mitigation"] for row in summary if row["mitigation"] != "base"):
        estimates = [
            Estimate(value=row["rate"], ci_low=row["ci_low"], ci_high=row["ci_high"], n=row["n"])
            for scope in _SCOPES
            if (row := pooled.get((name, scope))) and row["rate"] is not None
        ]
        if len(estimates) == len(_SCOPES):
            options.append(Option(id=name, **dict(zip(AXES, estimates, strict=True))))
    if len(options) < 2 or REFERENCE not in [option.id for option in options]:
        return None
    front = pareto(options)
    advice = asdict(recommend(front, REFERENCE))
    return cast(ChoiceResult, {"options": list(map(_option, front)), **advice})


def _option(placed: Placed) -> OptionResult:
    fields: dict[str, Any] = {
        "mitigation": placed.option.id,
        "status": placed.status,
        "by": list(placed.by),
    }
    for axis in AXES:
        for name, value in asdict(estimate(placed.option, axis)).items():
            fields[axis if name == "value" else f"{axis}_{name}"] = value
    return cast(OptionResult, fields)
