"""Rates pooled over cells, with intervals that know that formats share behaviours."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fastsafe.audit.conditions import BASE
from fastsafe.safety.clusters import PooledRate, pooled_rate
from fastsafe.safety.metrics import answered, refused
from fastsafe.safety.verdict import Verdict

Cells = Mapping[tuple[str, str, str], Mapping[str, Verdict]]


def group_of(condition: Mapping[str, Any]) -> str:
    """Return what a condition is pooled under: mitigation, and manipulation if not benign."""
    if condition["id"] == BASE:
        return "base"
    manipulation = condition["manipulation"]
    suffix = "" if manipulation == "benign" else f" ({manipulation})"
    return f"{condition['mitigation']}{suffix}"


def mitigation_of(condition: Mapping[str, Any]) -> str:
    """Return what is chosen between: mitigations, whatever the user's rows are made into."""
    return "base" if condition["id"] == BASE else str(condition["mitigation"])


def summary(
    conditions: Sequence[Mapping[str, Any]],
    harmful: Cells,
    benign: Cells,
    group_of: Callable[[Mapping[str, Any]], str] = group_of,
) -> list[dict[str, Any]]:
    """Pool answer rates per mitigation: plain prompts, the tuned task's own format, the others.

    Tasks, prompt styles and system prompts are pooled, each with the same behaviours.

    Args:
        conditions: As ``results.json`` holds them.
        harmful: Verdicts on harmful probes by (condition, format, system prompt) and behaviour.
        benign: Verdicts on their benign twins; empty where no judge reads them.
        group_of: What a condition is pooled under.

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


def over_seeds(
    conditions: Sequence[Mapping[str, Any]],
    cells: Cells,
    judge: str,
    kind: str,
    has: Callable[[Verdict], bool],
) -> list[dict[str, Any]]:
    """Pool the cells that differ in their training seed alone; none where a run has one seed.

    Returns:
        Rows of ``{"condition", "format", "system_prompt", "judge", "kind", "rates", "n",
        "clusters", "rate", "ci_low", "ci_high"}``: the condition without its seed, and ``rates``
        by seed. Seeds are no extra prompts: clusters are behaviours.
    """
    seeds = {c["id"]: c["seed"] for c in conditions if c.get("seed") is not None}
    groups: dict[tuple[str, str, str], dict[int, Mapping[str, Verdict]]] = {}
    for (name, part, system_prompt), cell in cells.items():
        if name in seeds:
            # the id ends in its seed
            key = name.removesuffix(f"+seed{seeds[name]}"), part, system_prompt
            groups.setdefault(key, {})[seeds[name]] = cell
    return [
        {
            **dict(zip(("condition", "format", "system_prompt"), key, strict=True)),
            "judge": judge,
            "kind": kind,
            "rates": {str(seed): pooled([cell], has)["rate"] for seed, cell in each.items()},
            **pooled(list(each.values()), has),
        }
        for key, each in groups.items()
    ]


def pooled(
    cells: Sequence[Mapping[str, Verdict]], has: Callable[[Verdict], bool]
) -> dict[str, Any]:
    """Return n, clusters, rate and 95 % interval over cells that ask about the same behaviours.

    The interval is that of ``safety.clusters.pooled_rate``; a cluster is a behaviour.
    """
    rows = ((name, verdict) for cell in cells for name, verdict in cell.items())
    return asdict(clustered((name, has(v)) for name, v in rows if v.is_scored))


def clustered(rows: Iterable[tuple[str, bool]]) -> PooledRate:
    """Return the rate over (behaviour, whether it has the property) rows, by behaviour."""
    counts: dict[str, list[int]] = {}
    for behaviour, has in rows:
        count = counts.setdefault(behaviour, [0, 0])
        count[0] += has
        count[1] += 1
    return pooled_rate([hit for hit, _ in counts.values()], [n for _, n in counts.values()])
