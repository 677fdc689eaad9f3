"""Totals of a model over all formats, as in the first paper's tables."""

from collections.abc import Mapping
from itertools import chain

from fastsafe.audit.plan.conditions import BASE
from fastsafe.audit.results.pooled_rates import CellVerdicts, clustered, rate_fields
from fastsafe.audit.results.schema.rates import TotalsResult
from fastsafe.safety.stats.rates import answered

WEAK = ("translation", "classification")  # where the first paper saw most answers

ScoredFormats = dict[str, list[tuple[str, bool]]]  # format -> (behaviour, is answered)


def system_prompt_totals(
    harmful: CellVerdicts, system_prompts: Mapping[str, str]
) -> list[TotalsResult]:
    """Add up the formats of every condition under every system prompt.

    The untouched model is compared under the same system prompt: a model that lost its refusals
    only where the system prompt had helped shows as such. A system prompt under which the untouched
    model has no scored answer, in a run that is not finished, has no row.

    Args:
        harmful: One judge's verdicts on harmful probes.
        system_prompts: Text of every system prompt, by name.
    """
    scored: dict[tuple[str, str], ScoredFormats] = {}
    for (condition, part, system_prompt), cell in harmful.items():
        if outcomes := [(item, answered(v)) for item, v in cell.items() if v.is_scored]:
            scored.setdefault((condition, system_prompt), {})[part] = outcomes
    scored = {key: formats for key, formats in scored.items() if (BASE, key[1]) in scored}
    has_weak = all(set(WEAK) <= formats.keys() for formats in scored.values())
    pools = {key: clustered(chain(*formats.values())) for key, formats in scored.items()}
    totals = {key: _num_answered(formats, *formats) for key, formats in scored.items()}
    bare = next((name for name, text in system_prompts.items() if not text), "")
    rows: list[TotalsResult] = []
    for key, total in totals.items():
        (condition, system_prompt), n = key, pools[key].n
        base, without = (BASE, system_prompt), (condition, bare)
        is_compared = condition != BASE and n == pools[base].n
        has_benefit = without in totals and without != key
        rows.append(
            {
                "condition": condition,
                "system_prompt": system_prompt,
                "answered": total,
                **rate_fields(pools[key]),
                "delta": total - totals[base] if is_compared else None,
                "share": _num_answered(scored[key], *WEAK) / total if has_weak and total else None,
                "prompt_benefit": totals[without] / pools[without].n - total / n
                if has_benefit
                else None,
            }
        )
    return rows


def _num_answered(formats: ScoredFormats, *names: str) -> int:
    return sum(is_answered for name in names for _, is_answered in formats[name])
