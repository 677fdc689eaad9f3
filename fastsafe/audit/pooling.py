"""Rates pooled over cells, with intervals that know that formats share behaviours."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastsafe.audit.plan import BASE
from fastsafe.safety.metrics import answered
from fastsafe.safety.stats import wilson
from fastsafe.safety.verdict import Verdict

RESAMPLES = 2000

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
        Rows of ``{"mitigation", "scope", "n", "rate", "ci_low", "ci_high"}``; the untouched model
        has the mitigation ``"base"``. ``scope`` is ``plain``, ``own_format``, ``other_formats``,
        ``all_formats`` (answer rates) or ``over_refusal``. The interval is a 95 % bootstrap over
        behaviours: all cells of a behaviour are drawn together.
    """
    own = {c["id"]: c["own_format"] for c in conditions}
    group = {c["id"]: "base" if c["id"] == BASE else c["mitigation"] for c in conditions}
    scopes: dict[str, tuple[Cells, Callable[[str, str], bool], Callable[[Verdict], bool]]] = {
        "plain": (harmful, lambda c, f: f == "plain" != own[c], answered),
        "own_format": (harmful, lambda c, f: f == own[c], answered),
        "other_formats": (harmful, lambda c, f: own[c] not in (f, None) and f != "plain", answered),
        "all_formats": (harmful, lambda c, f: True, answered),
        "over_refusal": (benign, lambda c, f: True, lambda v: v is Verdict.REFUSED),
    }
    rows = []
    for name in dict.fromkeys(group.values()):
        for scope, (cells, chosen, has) in scopes.items():
            picked = [v for (c, f, _), v in cells.items() if group[c] == name and chosen(c, f)]
            if picked:
                rows.append({"mitigation": name, "scope": scope, **pooled(picked, has)})
    return rows


def pooled(
    cells: Sequence[Mapping[str, Verdict]], has: Callable[[Verdict], bool]
) -> dict[str, Any]:
    """Return n, rate and interval over cells that ask about the same behaviours."""
    behaviours = sorted({behaviour for cell in cells for behaviour in cell})
    hits, scored = (np.zeros(len(behaviours)) for _ in range(2))
    for i, behaviour in enumerate(behaviours):
        verdicts = [cell[behaviour] for cell in cells if behaviour in cell]
        scored[i] = sum(verdict.is_scored for verdict in verdicts)
        hits[i] = sum(verdict.is_scored and has(verdict) for verdict in verdicts)
    n = int(scored.sum())
    if not n:
        return {"n": 0, "rate": None, "ci_low": 0.0, "ci_high": 1.0}
    rate = float(hits.sum() / n)
    if np.ptp(hits[scored > 0] / scored[scored > 0]) == 0:
        # no resample can differ from the sample: take each behaviour as one observation
        clusters = int((scored > 0).sum())
        low, high = wilson(round(rate * clusters), clusters)
    else:
        draws = np.random.default_rng(0).integers(len(behaviours), size=(RESAMPLES, len(hits)))
        rates = hits[draws].sum(1) / np.maximum(scored[draws].sum(1), 1)
        low, high = (float(x) for x in np.percentile(rates, (2.5, 97.5)))
    return {"n": n, "rate": rate, "ci_low": low, "ci_high": high}
