"""Utility: every model's scores on test rows that no training saw."""

from dataclasses import asdict
from typing import cast

from fastsafe.audit.plan.conditions import BASE
from fastsafe.audit.results.schema.rates import MetricResult, UtilityResult
from fastsafe.audit.store.queries import PASS, StoreQueries
from fastsafe.errors import DataError, UsageError
from fastsafe.safety.stats.intervals import difference_interval, mean_interval, pair, wilson


def utility_rows(store: StoreQueries) -> list[UtilityResult]:
    """Return one row per condition and task: mean score, its change, and corpus metrics."""
    scores: dict[tuple[str, str], dict[str, float | None]] = {}
    metric_of: dict[str, str] = {}
    for row in store.utilities():
        scores.setdefault((row.condition, row.task), {})[row.item] = row.value
        if row.metric:
            metric_of[row.task] = row.metric
    pairs_of: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for condition, task, completion, reference in store.references():
        pairs_of.setdefault((condition, task), []).append((completion, reference))
    tested: dict[tuple[str, str], list[float | None]] = {}
    for row in store.passed():
        tested.setdefault((row.condition, row.task), []).append(row.value)
    rows: list[UtilityResult] = []
    for (condition, task), values in scores.items():
        scored = [value for value in values.values() if value is not None]
        ci_low, ci_high = mean_interval(scored)
        pairs = pair(scores.get((BASE, task), {}), values)
        has_change = condition != BASE and pairs.keys
        score_change = difference_interval(pairs) if has_change else (None, None, None)
        rows.append(
            {
                "condition": condition,
                "task": task,
                "metric": metric_of.get(task),
                "n": len(values),
                "n_scored": len(scored),
                "value": sum(scored) / len(scored) if scored else None,
                "ci_low": ci_low,
                "ci_high": ci_high,
                "delta": score_change[0],
                "delta_ci_low": score_change[1],
                "delta_ci_high": score_change[2],
                "metrics": _metrics(task, pairs_of.get((condition, task), []))
                | _pass_rate(tested.get((condition, task), [])),
            }
        )
    return rows


def _pass_rate(outcomes: list[float | None]) -> dict[str, MetricResult]:
    """Return the share of rows whose code passes its tests; empty where no row has tests."""
    passed = [value == 1 for value in outcomes if value is not None]
    if not outcomes:
        return {}
    if not passed:
        why = "no code was run; --allow-code-exec runs it shut in"
        return {PASS: {"value": None, "why": why}}
    low, high = wilson(sum(passed), len(passed))
    value = sum(passed) / len(passed)
    return {PASS: {"value": value, "ci_low": low, "ci_high": high, "n": len(passed)}}


def _metrics(task: str, pairs: list[tuple[str, str]]) -> dict[str, MetricResult]:
    from fastsafe.safety.tasks import tasks

    results: dict[str, MetricResult] = {}
    for name, metric in tasks()[task].metrics.items() if pairs else ():
        try:
            results[name] = cast(MetricResult, asdict(metric(pairs)))
        except (UsageError, DataError) as error:
            # a library is not installed, or the references of another source have another shape
            results[name] = {"value": None, "why": str(error)}
    return results
