"""Recommendation of a mitigation: its options on three axes, their Pareto front, and advice."""

from collections.abc import Sequence

from fastsafe.audit.results.schema.rates import Scope, SummaryResult
from fastsafe.audit.results.schema.run import ChoiceResult, OptionResult
from fastsafe.safety.stats.pareto import AXES, Estimate, Option, Placed, pareto, recommend

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
    advice = recommend(front, REFERENCE)
    return {
        "options": list(map(_option, front)),
        "choice": advice.choice,
        "text": advice.text,
    }


def _option(placed: Placed) -> OptionResult:
    option = placed.option
    answer_rate, over_refusal, utility = option.answer_rate, option.over_refusal, option.utility
    return {
        "mitigation": option.id,
        "status": placed.status,
        "by": list(placed.by),
        "answer_rate": answer_rate.value,
        "answer_rate_ci_low": answer_rate.ci_low,
        "answer_rate_ci_high": answer_rate.ci_high,
        "answer_rate_n": answer_rate.n,
        "over_refusal": over_refusal.value,
        "over_refusal_ci_low": over_refusal.ci_low,
        "over_refusal_ci_high": over_refusal.ci_high,
        "over_refusal_n": over_refusal.n,
        "utility": utility.value,
        "utility_ci_low": utility.ci_low,
        "utility_ci_high": utility.ci_high,
        "utility_n": utility.n,
    }
