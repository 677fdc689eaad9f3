"""From verdicts to ``results.json``: rates with intervals, paired changes, corrected tests.

Everything is computed from the store alone, so a report can be made again at any time.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from fastsafe.audit.plan.conditions import BASE
from fastsafe.audit.results.judge_quality import (
    bands,
    calibration_rows,
    early_stop_rows,
    filter_rows,
    guard_rows,
    wording_rows,
)
from fastsafe.audit.results.pooled_rates import (
    clustered,
    mitigation_of,
    over_seeds,
    pooled,
    summary,
)
from fastsafe.audit.results.recommendation import choose
from fastsafe.audit.results.totals import WEAK, counts_of, system_prompt_benefit, totals
from fastsafe.audit.results.utility import utility_rows
from fastsafe.audit.store.rows import Kind, ProbeCell
from fastsafe.audit.store.sqlite_store import Store
from fastsafe.safety.stats.intervals import cohens_kappa, holm
from fastsafe.safety.stats.rates import answered, paired_change, rate, refused
from fastsafe.safety.verdict import Verdict

SCHEMA = "fastsafe.results/1"

Cell = tuple[str, str, str]  # condition, format, system prompt
Verdicts = dict[Cell, dict[str, Verdict]]  # -> behaviour -> verdict

# What differs between two runs of the same plan.
_TIMED = ("started_at", "finished_at")


def comparable(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy without what depends on when and how fast the run was made.

    Exactly ``throughput``, ``run.started_at`` and ``run.finished_at`` are dropped; everything
    else of two runs of one plan is equal, however often either was interrupted.
    """
    kept = copy.deepcopy(dict(results))
    kept.pop("throughput", None)
    kept["run"] = {k: v for k, v in kept.get("run", {}).items() if k not in _TIMED}
    return kept


def make_results(store: Store, finished_at: str | None) -> dict[str, Any]:
    """Compute the whole record of a run, finished or not.

    Args:
        store: Of the run.
        finished_at: When the last stage ended. It is the run's only where every cell is covered:
            one whose judge was away is not finished.
    """
    recipe = store.meta("recipe")
    conditions = store.meta("conditions")
    judges: dict[str, str] = store.meta("judges")
    utility = utility_rows(store)
    wordings = wording_rows(store)
    band = bands(wordings)
    cells, over_refusal, by_judge, seeds = [], [], {}, []
    twins: Verdicts = {}  # of the first judge that reads them
    for judge, identity in judges.items():
        harmful, benign = _verdicts(store, identity)
        by_judge[judge] = harmful | {("twin", *cell): v for cell, v in benign.items()}
        doubted = store.incoherent(identity)
        rates = _rows(harmful, judge, answered, "answered", "answer_rate")
        cells += [row | _incoherent(row, doubted, "harmful") | band(row) for row in rates]
        seeds += over_seeds(conditions, harmful, judge, "harmful", answered)
        if judge in store.meta("harmful_only"):
            continue
        twins = twins or benign
        rates = _rows(benign, judge, refused, "refused", "over_refusal_rate")
        over_refusal += [row | _incoherent(row, doubted, "benign") for row in rates]
        seeds += over_seeds(conditions, benign, judge, "benign", refused)
    first_judge = next(iter(judges.values()))
    verdicts = _verdicts(store, first_judge)[0], twins
    utilities = store.utilities()
    by_mitigation = summary(conditions, *verdicts, utilities)
    guards = guard_rows(store, store.meta("guards"), first_judge)
    together = _together(cells, verdicts[0], next(iter(judges)), recipe["system_prompts"])
    shares = [row["n_scored"] / row["n"] for row in (*cells, *over_refusal, *utility, *wordings)]
    shares += [1 - row["n_unread"] / row["n"] for row in guards]
    coverage, threshold = min(shares, default=0.0), recipe["thresholds"]["coverage"]
    return {
        "schema": SCHEMA,
        "run": {
            "recipe": recipe["name"],
            "description": recipe["description"],
            "model": recipe["model"],
            **store.meta("engine"),
            "seed": recipe["seed"],
            "data_seed": recipe["data_seed"],
            "plan_sha256": store.meta("identity"),
            "fastsafe": store.meta("version"),
            "judges": judges,
            "translator": store.meta("translator"),
            "templates": store.meta("templates"),
            "share": recipe["share"],
            "coverage": coverage,
            "coverage_threshold": threshold,
            "started_at": store.meta("started_at"),
            "finished_at": finished_at if coverage >= threshold else None,
            "summary": by_mitigation,
        },
        "conditions": conditions,
        "cells": cells,
        "over_refusal": over_refusal,
        "over_seeds": seeds,
        "totals": together,
        "utility": utility,
        "judge_agreement": _agreement(by_judge),
        "judge_calibration": calibration_rows(store),
        "judge_wordings": wordings,
        "guards": guards,
        "filters": filter_rows(store),
        "rewrites": store.meta("rewrites") or [],
        "early_stop": early_stop_rows(store, judges),
        "choice": choose(summary(conditions, *verdicts, utilities, mitigation_of)),
        "drift": _drift(store),
        "throughput": _throughput(store),
    }


def _together(
    cells: Sequence[Mapping[str, Any]],
    harmful: Verdicts,
    judge: str,
    system_prompts: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The first paper's table: all formats of a model under one system prompt, by one judge.

    ``delta`` is against the untouched model under the same system prompt, in answers; ``share`` is
    the part of the weak formats, None where they are not asked; ``prompt_benefit`` the rate without
    a system prompt less the rate under this one. Intervals are by behaviour.
    """
    if not any(cell["judge"] == judge and cell["n_scored"] for cell in cells):
        return []
    counts = counts_of({"cells": cells}, judge)
    asked = {(row.tuned_on, row.system_prompt) for row in counts}
    # a run that is not finished may lack the base
    counts = [row for row in counts if (BASE, row.system_prompt) in asked]
    bare = next((name for name, text in system_prompts.items() if not text), None)
    weak = WEAK if all(set(WEAK) <= row.answered.keys() for row in counts) else ()
    benefit = {
        name: system_prompt_benefit(counts, bare, name) if bare not in (None, name) else {}
        for name in system_prompts
    }
    rows = []
    for row in totals(counts, weak):
        name, system_prompt = row.counts.tuned_on, row.counts.system_prompt
        pool = pooled(
            [v for (c, _, s), v in harmful.items() if (c, s) == (name, system_prompt)], answered
        )
        rows.append(
            {
                "condition": name,
                "system_prompt": system_prompt,
                "answered": row.total,
                **pool,
                "delta": row.delta,
                "share": row.share if weak else None,
                "prompt_benefit": benefit[system_prompt].get((name, "")),
            }
        )
    return rows


def _verdicts(store: Store, identity: str) -> tuple[Verdicts, Verdicts]:
    """Verdicts of one judge on harmful probes, and on their benign twins."""
    found: dict[str, Verdicts] = {"harmful": {}, "benign": {}}
    for condition, kind, part, system_prompt, item, verdict in store.verdicts(identity):
        cell = found[kind].setdefault((condition, part, system_prompt), {})
        cell[item] = Verdict(verdict) if verdict else Verdict.NOT_JUDGED
    return found["harmful"], found["benign"]


def _rows(
    verdicts: Verdicts,
    judge: str,
    has: Callable[[Verdict], bool],
    count_name: str,
    rate_name: str,
) -> list[dict[str, Any]]:
    """One row per cell, the change against the base's cell of the same format beside it."""
    rows = []
    for (condition, part, system_prompt), tuned in verdicts.items():
        share = rate(tuned.values(), has)
        counts = Counter(tuned.values())
        base = {} if condition == BASE else verdicts.get((BASE, part, system_prompt), {})
        rows.append(
            {
                "condition": condition,
                "format": part,
                "system_prompt": system_prompt,
                "judge": judge,
                "n": share.n,
                "n_scored": share.n_scored,
                count_name: share.count,
                rate_name: share.rate,
                "ci_low": share.ci_low,
                "ci_high": share.ci_high,
                "verdicts": {verdict.value: counts[verdict] for verdict in sorted(counts)},
                **_change(base, tuned, has),
            }
        )
    _correct(rows)
    return rows


def _incoherent(
    row: Mapping[str, Any], doubted: Mapping[ProbeCell, int], kind: Kind
) -> dict[str, int]:
    """How many of a cell's answers are no coherent text: neither a refusal nor of any use."""
    cell = ProbeCell(row["condition"], kind, row["format"], row["system_prompt"])
    return {"incoherent": doubted.get(cell, 0)}


def _change(
    base: Mapping[str, Verdict], tuned: Mapping[str, Verdict], has: Callable[[Verdict], bool]
) -> dict[str, Any]:
    """Paired change over the behaviours that both models' answers are scored for."""
    # a run that is not finished has rows in one arm alone
    change = paired_change(base, tuned, has, unpaired="drop")
    found = {
        "delta": change.delta,
        "delta_ci_low": change.ci_low,
        "delta_ci_high": change.ci_high,
        "p_mcnemar": change.p_mcnemar,
        "p_holm": None,
    }
    return {"n_pairs": change.n_pairs, **(found if change.n_pairs else dict.fromkeys(found))}


def _correct(rows: Sequence[dict[str, Any]]) -> None:
    """Fill in Holm's correction over the family that the manifest declares."""
    family = [row for row in rows if row["condition"] != BASE]
    # a test without a pair stays in the family, where it counts as no evidence
    ps = [1.0 if row["p_mcnemar"] is None else row["p_mcnemar"] for row in family]
    for row, p in zip(family, holm(ps), strict=True):
        row["p_holm"] = None if row["p_mcnemar"] is None else p


def _agreement(by_judge: Mapping[str, Mapping[Any, Mapping[str, Verdict]]]) -> list[dict[str, Any]]:
    """How often two judges agree whether an answer is a refusal, per format.

    The answers of all models are pooled; intervals are by behaviour.
    """
    rows = []
    for first, second in combinations(by_judge, 2):
        pairs: dict[str, list[tuple[str, tuple[bool, bool]]]] = {}
        for cell, verdicts in by_judge[first].items():
            for item, a in verdicts.items():
                b = by_judge[second].get(cell, {}).get(item)
                if b is not None and a.is_scored and b.is_scored:
                    pair = (refused(a), refused(b))
                    pairs.setdefault(cell[-2], []).append((item, pair))
        for part, found in pairs.items():
            same = clustered((item, a == b) for item, (a, b) in found)
            rows.append(
                {
                    "judge_a": first,
                    "judge_b": second,
                    "format": part,
                    "n": same.n,
                    "agreement": same.rate,
                    "ci_low": same.ci_low,
                    "ci_high": same.ci_high,
                    "kappa": cohens_kappa([pair for _, pair in found]),
                }
            )
    return rows


def _drift(store: Store) -> list[dict[str, Any]]:
    """Readings while models were trained, in the order of conditions, steps and formats asked."""
    conditions = [condition["id"] for condition in store.meta("conditions")]
    formats = store.meta("recipe")["formats"]
    rows = [{"condition": condition, **row._asdict()} for condition, row in store.drift()]

    def place(row: Mapping[str, Any]) -> tuple[int, int, int]:
        format = formats.index(row["format"])
        return conditions.index(row["condition"]), row["step"], format

    return sorted(rows, key=place)


def _throughput(store: Store) -> dict[str, Any]:
    """Work done over the time it took, summed over every process that worked on the run."""
    train, generate = store.events("train"), store.events("generate")
    train_s = sum(event["duration_s"] for event in train)
    generate_s = sum(event["duration_s"] for event in generate)
    rows = sum(event["rows"] for event in train)
    tokens = sum(event["completion_tokens"] for event in generate)
    return {
        "train_s": train_s,
        "train_adapter_steps": sum(event["steps"] for event in train),
        "train_rows_per_s": rows / train_s if train_s else None,
        "generate_s": generate_s,
        "completions": sum(event["rows"] for event in generate),
        "completion_tokens": tokens,
        "completion_tokens_per_s": tokens / generate_s if generate_s else None,
        "prompt_tokens": sum(event["prompt_tokens"] for event in generate),
    }
