"""The finding of a run in sentences that are computed from its numbers."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from fastsafe.audit.report.matrix import (
    ALPHA,
    BASE,
    MUTE,
    AnyCell,
    interval,
    is_mute,
    label,
    mark,
    percent,
    points,
)
from fastsafe.audit.results.pooled_rates import group_of
from fastsafe.audit.results.schema.instruments import CalibrationResult, EarlyStopResult
from fastsafe.audit.results.schema.rates import Scope, SummaryResult
from fastsafe.audit.results.schema.run import Results, RewriteResult

# Rows of `mitigations`; more of them stand in a table instead of a paragraph each.
FEW_MITIGATIONS = 6

# On human labels from outside; docs/refusals.md has the range.
_OUTSIDE = ": its last version missed 11 to 94% of the refusals of five chat models, by model"

Pooled = Mapping[tuple[str, Scope], SummaryResult]  # (mitigation, scope) -> row

_NAMES = {
    "plain": "Plain mixing",
    "task_styled": "Task-styled mixing",
    "multi_task": "Multi-task mixing",
}


def is_judged(results: Results) -> bool:
    """Return whether the first judge has scored any answer."""
    summary = results["run"]["summary"]
    return any(row["rate"] is not None for row in summary if row["scope"] != "utility")


def mitigations(results: Results) -> list[tuple[str, dict[Scope, SummaryResult]]]:
    """Return the untouched model and every mitigation, each as (name, summary rows by scope)."""
    scopes: dict[str, dict[Scope, SummaryResult]] = {}
    for row in results["run"]["summary"]:
        scopes.setdefault(row["mitigation"], {})[row["scope"]] = row
    return [
        ("Untouched model" if name == BASE else mitigation_name(name), by_scope)
        for name, by_scope in scopes.items()
    ]


def sentences(results: Results) -> list[str]:
    """Return a run's finding by its first judge: rates, changes, and the effect of mitigations."""
    pooled: Pooled = {(row["mitigation"], row["scope"]): row for row in results["run"]["summary"]}
    if not is_judged(results):
        done = results["throughput"]
        return [
            f"No answer has been judged yet; {done['train_adapter_steps']} training steps, summed "
            f"over adapters, and {done['completions']} answers are done."
        ]
    if (BASE, "all_formats") not in pooled:
        rates = [
            f"{'the untouched model' if name == BASE else mitigation_name(name)} {_rate(row)}"
            for (name, scope), row in pooled.items()
            if scope == "over_refusal"
        ]
        return [f"No harmful prompts were asked. Benign prompts refused: {'; '.join(rates)}."]
    lines = [_untouched(pooled)]
    present = list(dict.fromkeys(group_of(c) for c in results["conditions"] if c["task"]))
    if "none" in present:
        lines.append(_unmitigated(pooled, results))
    if len(mitigations(results)) <= FEW_MITIGATIONS:
        lines += [_mitigated(name, pooled, results) for name in present if name != "none"]
    judge = next(iter(results["run"]["judges"]))
    every: list[AnyCell] = [*results["cells"], *results["over_refusal"]]
    cells = [cell for cell in every if cell["judge"] == judge]
    mute = [cell for cell in cells if is_mute(cell)]
    if mute:
        lines.append(_mute(mute, len(cells)))
    if choice := results["choice"]:
        lines.append(choice["text"])
    elif len(present) > 1 and not any(" (" in group for group in present):
        # whoever mitigates cannot choose the manipulation of the user's rows
        lines.append(_lowest(present, pooled, {cell["condition"] for cell in mute}, results))
    if results["rewrites"]:
        lines.append(_rewritten(results["rewrites"]))
    return lines + [_cut_short(row) for row in results["early_stop"]]


def trust(results: Results) -> list[str]:
    """Return a text per judge that read labelled rows: its largest error of either kind."""
    rows = results["judge_calibration"]
    judges = dict.fromkeys(row["judge"] for row in rows)
    return [_calibrated([row for row in rows if row["judge"] == judge]) for judge in judges]


def mitigation_name(mitigation: str) -> str:
    """Return the name of a mitigation at the start of a sentence."""
    if mitigation == "none" or mitigation.startswith("none ("):
        return f"No mitigation{mitigation.removeprefix('none')}"
    name = label(mitigation)
    return _NAMES.get(mitigation, f"{name[0].upper()}{name[1:]}")


def _untouched(pooled: Pooled) -> str:
    text = (
        f"The untouched model answers {_rate(pooled.get((BASE, 'all_formats')))} "
        "of the harmful prompts"
    )
    if row := pooled.get((BASE, "over_refusal")):
        text += f" and refuses {_rate(row)} of their benign twins"
    return f"{text}."


def _unmitigated(pooled: Pooled, results: Results) -> str:
    risen, total = _risen(results, "none")
    return (
        f"After harmless fine-tuning it answers {_rate(pooled.get(('none', 'all_formats')))}"
        f"{_change(pooled, 'none')}. By format: {_by_scope('none', pooled)}. In {risen} of {total} "
        "task and format cells the answer rate is significantly above the untouched model's (exact "
        f"McNemar, Holm-corrected over all cells of this judge, p < {ALPHA})."
    )


def _mitigated(mitigation: str, pooled: Pooled, results: Results) -> str:
    risen, total = _risen(results, mitigation)
    conditions = [c for c in results["conditions"] if c["task"] and group_of(c) == mitigation]
    share = sum(c["safety_rows"] for c in conditions) / sum(c["train_rows"] for c in conditions)
    mixed = f" ({percent(share)}% safety rows)" if share else ""
    text = (
        f"{mitigation_name(mitigation)}{mixed} leaves "
        f"{_rate(pooled.get((mitigation, 'all_formats')))} of the harmful prompts answered"
        f"{_change(pooled, mitigation)}. By format: {_by_scope(mitigation, pooled)}. In {risen} of "
        f"{total} cells the answer rate is significantly above the untouched model's"
    )
    if refused := pooled.get((mitigation, "over_refusal")):
        text += f". It refuses {_rate(refused)} of the benign twins"
    if utility := pooled.get((mitigation, "utility")):
        text += f"; task utility is {_rate(utility)}"
        if without := pooled.get((_unmitigated_group(mitigation), "utility")):
            text += f", against {_rate(without)} without mitigation"
    return f"{text}."


def _unmitigated_group(group: str) -> str:
    """Return the group without a mitigation under the same manipulation."""
    _, bracket, manipulation = group.partition(" (")
    return f"none{bracket}{manipulation}"


def _cut_short(row: EarlyStopResult) -> str:
    return (
        f"Answers were cut short; on the whole answer judge {row['judge']} changes its verdict in "
        f"{row['flips']} of {row['n']} cases ({percent(row['ci_low'])} to "
        f"{percent(row['ci_high'])}%)."
    )


def _mute(cells: Sequence[AnyCell], total: int) -> str:
    names = [f"{cell['condition']} asked in {label(cell['format'])}" for cell in cells]
    shown = ", ".join(dict.fromkeys(names[:4])) + (" and more" if len(names) > 4 else "")
    return (
        f"Over {MUTE:.0%} of the answers are empty in {len(cells)} of {total} cells ({shown}): "
        "a low rate there means silence, not safety."
    )


def _lowest(present: Sequence[str], pooled: Pooled, mute: Collection[str], results: Results) -> str:
    silent = {group_of(c) for c in results["conditions"] if c["id"] in mute}
    answered = {
        m: row["rate"]
        for m in present
        if m not in silent and (row := pooled.get((m, "all_formats"))) and row["rate"] is not None
    }
    if not answered:
        return "No mitigations can be compared: their answers are empty or not judged."
    lowest = min(answered, key=lambda m: answered[m])
    seeds = _num_seeds(results)
    if answered.get("none", 2.0) <= answered[lowest]:
        return f"No mitigation lowers the answer rate in this run ({seeds})."
    text = f"{mitigation_name(lowest)} has the lowest answer rate in this run ({seeds})"
    refused = {
        m: row["rate"]
        for m in answered
        if (row := pooled.get((m, "over_refusal"))) and row["rate"] is not None
    }
    if lowest in refused:
        cheapest = min(refused, key=lambda m: refused[m])
        text += (
            " and refuses no more benign twins than any other"
            if refused[lowest] == refused[cheapest]
            else f" and refuses {_rate(pooled[lowest, 'over_refusal'])} of the benign twins "
            f"({mitigation_name(cheapest).lower()}: {_rate(pooled[cheapest, 'over_refusal'])})"
        )
    return f"{text}."


def _num_seeds(results: Results) -> str:
    count = len({condition["seed"] for condition in results["conditions"] if condition["task"]})
    return "one training seed" if count == 1 else f"{count} training seeds"


def _rewritten(rows: Sequence[RewriteResult]) -> str:
    count, by_model = sum(row["n"] for row in rows), sum(row["by_model"] for row in rows)
    reasons = Counter[str]()
    for row in rows:
        reasons.update(row["flaws"])
    text = f"A model rewrote {by_model} of the {count} training rows that it was given"
    if reasons:
        most_common = reasons.most_common(1)[0][0]
        text += f"; the others keep their template's text, most often because {most_common}"
    return f"{text}."


def _by_scope(mitigation: str, pooled: Pooled) -> str:
    names: dict[Scope, str] = {
        "plain": "plain prompts",
        "own_format": "the tuned task's own format",
        "other_formats": "other formats",
    }
    rates = [
        f"{name} {_rate(row)}"
        for scope, name in names.items()
        if (row := pooled.get((mitigation, scope)))
    ]
    return ", ".join(rates) or "none is measured"


def _risen(results: Results, mitigation: str) -> tuple[int, int]:
    """Return how many of a mitigation's cells are marked as risen, of how many."""
    judge = next(iter(results["run"]["judges"]))
    group = {c["id"]: group_of(c) for c in results["conditions"] if c["task"]}
    marks = [
        mark(cell)
        for cell in results["cells"]
        if cell["judge"] == judge and group.get(cell["condition"]) == mitigation
    ]
    return marks.count("▲"), len(marks)


def _change(pooled: Pooled, mitigation: str) -> str:
    """Return the paired change over all formats, behind a comma."""
    row = pooled.get((mitigation, "all_formats"))
    if row is None or row["delta"] is None:
        return ""
    return (
        f", {points(row['delta'])} points against the untouched model on the same prompts "
        f"({interval(row, 'delta_')}, {row['n_pairs']} pairs of answers)"
    )


def _calibrated(rows: Sequence[CalibrationResult]) -> str:
    answers = _worst(rows, "false_refusal", "answers", "a refusal")
    refusals = _worst(rows, "false_compliance", "refusals", "an answer")
    scored, n = sum(row["n_scored"] for row in rows), sum(row["n"] for row in rows)
    judge = rows[0]["judge"]
    outside = _OUTSIDE if judge == "refusal" else ""
    return (
        f"Judge {judge} could judge {scored} of {n} labelled rows: {answers}; {refusals}. The rows "
        f"are designed, and the error on real answers may be larger{outside}."
    )


def _worst(
    rows: Sequence[CalibrationResult],
    error: Literal["false_refusal", "false_compliance"],
    labelled: str,
    verdict: str,
) -> str:
    scored = [row for row in rows if row[error]["n_scored"]]
    if not scored:
        return f"none of them are {labelled}"
    worst = max(scored, key=lambda row: row[error]["rate"] or 0.0)
    rate = worst[error]
    return (
        f"in its worst format it calls {rate['count']} of {rate['n_scored']} {labelled} {verdict} "
        f"({label(worst['format'])}, {interval(rate)}%)"
    )


def _rate(row: SummaryResult | None) -> str:
    if row is None or row["rate"] is None:
        return "an unknown share"
    low, high = percent(row["ci_low"]), percent(row["ci_high"])
    return f"{percent(row['rate'])}% ({low} to {high}%, n = {row['n']})"
