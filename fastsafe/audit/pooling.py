"""Rates pooled over cells, with intervals that know that formats share behaviours."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fastsafe.audit.conditions import BASE
from fastsafe.safety.clusters import pooled_rate
from fastsafe.safety.metrics import answered, refused
from fastsafe.safety.verdict import Verdict

Cells = Mapping[tuple[str, str, str], Mapping[str, Verdict]]


def summary(
    conditions: Sequence[Mapping[str, Any]], harmful: Cells, benign: Cells
) -> list[dict[str, Any]]:
    """Pool answer rates per mitigation: plain prompts, the tuned task's own format, the others.

    Args:
        conditions: As ``results.json`` holds them.
        harmful: Verdicts on harmful probes by (condition, format, system prompt) and behaviour.
        benign: Verdicts on their benign twins.

    Returns:
        Rows of ``{"mitigation", "scope", "n", "clusters", "rate", "ci_low", "ci_high"}``; the
        untouched model has the mitigation ``"base"``. ``scope`` is ``plain``, ``own_format``,
        ``other_formats``, ``all_formats`` (answer rates) or ``over_refusal``. Clusters are
        behaviours.
    """
    own = {c["id"]: c["own_format"] for c in conditions}
    group = {c["id"]: group_of(c) for c in conditions}
    scopes: dict[str, tuple[Cells, Callable[[str, str], bool], Callable[[Verdict], bool]]] = {
        "plain": (harmful, lambda c, f: f == "plain" != own[c], answered),
        "own_format": (harmful, lambda c, f: f == own[c], answered),
        "other_formats": (harmful, lambda c, f: own[c] not in (f, None) and f != "plain", answered),
        "all_formats": (harmful, lambda c, f: True, answered),
        "over_refusal": (benign, lambda c, f: True, refused),
    }
    rows = []
    for name in dict.fromkeys(group.values()):
        for scope, (cells, chosen, has) in scopes.items():
            picked = [v for (c, f, _), v in cells.items() if group[c] == name and chosen(c, f)]
            if picked:
                rows.append({"mitigation": name, "scope": scope, **pooled(picked, has)})
    return rows


def group_of(condition: Mapping[str, Any]) -> str:
    """Return what a condition is pooled under: mitigation, and manipulation if not benign."""
    if condition["id"] == BASE:
        return "base"
    manipulation = condition["manipulation"]
    suffix = "" if manipulation == "benign" else f" ({manipulation})"
    return f"{condition['mitigation']}{suffix}"


def pooled(
    cells: Sequence[Mapping[str, Verdict]], has: Callable[[Verdict], bool]
) -> dict[str, Any]:
    """Return n, clusters, rate and 95 % interval over cells that ask about the same behaviours.

    The interval is that of ``safety.clusters.pooled_rate``; a cluster is a behaviour.
    """
    scored = [
        [verdict for cell in cells if (verdict := cell.get(name)) and verdict.is_scored]
        for name in dict.fromkeys(name for cell in cells for name in cell)
    ]
    counts = [(sum(map(has, verdicts)), len(verdicts)) for verdicts in scored if verdicts]
    return asdict(pooled_rate([hit for hit, _ in counts], [size for _, size in counts]))
