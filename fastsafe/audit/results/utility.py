"""Utility: how well every model still does the tasks, on rows that no training held."""

from dataclasses import asdict
from typing import Any

from fastsafe.audit.plan.conditions import BASE
from fastsafe.audit.store.queries import PASS, StoreQueries
from fastsafe.errors import DataError, UsageError
from fastsafe.safety.stats.intervals import difference_interval, mean_interval, pair, wilson


def utility_rows(store: StoreQueries) -> list[dict[str, Any]]:
    """One row per condition and task: the mean score, its change against the base, more metrics.

    ``metrics`` has the task's metrics over the whole test set; where one cannot be had its value is
    None and ``why`` says why. Where rows carry tests, ``pass@1`` is the share that passes them.
    """
    groups: dict[tuple[str, str], dict[str, float | None]] = {}
    metric_of: dict[str, str] = {}
    for condition, task, item, metric, value in store.utilities():
        groups.setdefault((condition, task), {})[item] = value
        if metric:
            metric_of[task] = metric
    pairs_of: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for condition, task, completion, reference in store.references():
        pairs_of.setdefault((condition, task), []).append((completion, reference))
    tested: dict[tuple[str, str], list[float | None]] = {}
    for condition, task, _, _, passed in store.passed():
        tested.setdefault((condition, task), []).append(passed)
    rows = []
    for (condition, task), values in groups.items():
        scored = [value for value in values.values() if value is not None]
        low, high = mean_interval(scored)
        pairs = pair(groups.get((BASE, task), {}), values, unpaired="drop")
        change = None if condition == BASE or not pairs.keys else difference_interval(pairs)
        rows.append(
            {
                "condition": condition,
                "task": task,
                "metric": metric_of.get(task),
                "n": len(values),
                "n_scored": len(scored),
                "value": sum(scored) / len(scored) if scored else None,
                "ci_low": low,
                "ci_high": high,
                "delta": change[0] if change else None,
                "delta_ci_low": change[1] if change else None,
                "delta_ci_high": change[2] if change else None,
                "metrics": _metrics(task, pairs_of.get((condition, task), []))
                | _pass_rate(tested.get((condition, task), [])),
            }
        )
    return rows


def _pass_rate(outcomes: list[float | None]) -> dict[str, Any]:
    """Share of the rows with tests whose code passes them; empty where no row has tests."""
    found = [value == 1 for value in outcomes if value is not None]
    if not outcomes:
        return {}
    if not found:
        return {PASS: {"value": None, "why": "no code was run; --allow-code-exec runs it shut in"}}
    low, high = wilson(sum(found), len(found))
    value = sum(found) / len(found)
    return {PASS: {"value": value, "ci_low": low, "ci_high": high, "n": len(found)}}


def _metrics(task: str, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    from fastsafe.safety.tasks import tasks

    found: dict[str, Any] = {}
    for name, metric in tasks()[task].metrics.items() if pairs else ():
        try:
            found[name] = asdict(metric(pairs))
        except (UsageError, DataError) as error:
            # a library is not installed, or a world of its own has references of other shapes
            found[name] = {"value": None, "why": str(error)}
    return found
