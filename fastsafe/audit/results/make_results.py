"""From verdicts to ``results.json``: rates with intervals, paired changes, corrected tests.

Everything is computed from the store alone, so a report can be made again at any time.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Literal, cast

from fastsafe.audit import unanswered
from fastsafe.audit.plan.conditions import BASE
from fastsafe.audit.results.judge_quality import (
    calibration_rows,
    early_stop_rows,
    filter_rows,
    guard_rows,
    wording_bands,
    wording_rows,
)
from fastsafe.audit.results.pooled_rates import (
    CellVerdicts,
    cell_verdicts,
    change_fields,
    clustered,
    mitigation_of,
    over_seeds,
    summary,
)
from fastsafe.audit.results.recommendation import choose
from fastsafe.audit.results.schema.instruments import AgreementResult
from fastsafe.audit.results.schema.rates import (
    CellChange,
    CellPlace,
    CellResult,
    OverRefusalResult,
    OverSeedsResult,
    ProbeKind,
)
from fastsafe.audit.results.schema.run import (
    ConditionResult,
    DriftResult,
    EngineResult,
    Results,
    ThroughputResult,
)
from fastsafe.audit.results.totals import system_prompt_totals
from fastsafe.audit.results.utility import utility_rows
from fastsafe.audit.store.rows import ProbeCell
from fastsafe.audit.store.sqlite_store import Store
from fastsafe.safety.stats.intervals import cohens_kappa, holm
from fastsafe.safety.stats.rates import Rate, answered, paired_change, rate, refused
from fastsafe.safety.verdict import Verdict

SCHEMA: Literal["fastsafe.results/1"] = "fastsafe.results/1"

_TIMED = ("started_at", "finished_at")  # they differ between two runs of the same plan


def comparable(results: Results) -> dict[str, object]:
    """Return a copy without the keys that depend on when and how fast the run was made.

    Exactly ``throughput``, ``run.started_at`` and ``run.finished_at`` are dropped; everything
    else of two runs of one plan is equal, however often either was interrupted.
    """
    timeless: dict[str, object] = {**copy.deepcopy(results)}
    timeless.pop("throughput", None)
    run = {key: value for key, value in results["run"].items() if key not in _TIMED}
    return {**timeless, "run": copy.deepcopy(run)}


def make_results(store: Store, finished_at: str | None) -> Results:
    """Compute the results of a run, finished or not.

    Args:
        store: Store of the run.
        finished_at: Time at which the last stage ended. Results keep it only where every cell is
            covered: a run whose judge was unreachable is not finished.
    """
    recipe = store.meta("recipe")
    conditions: list[ConditionResult] = store.meta("conditions")
    judges: dict[str, str] = store.meta("judges")
    engine: EngineResult = store.meta("engine")
    utility = utility_rows(store)
    wordings = wording_rows(store)
    band = wording_bands(wordings)
    cells: list[CellResult] = []
    over_refusal: list[OverRefusalResult] = []
    seeds: list[OverSeedsResult] = []
    by_judge: dict[str, tuple[CellVerdicts, CellVerdicts]] = {}
    twins: CellVerdicts = {}  # of the first judge that reads them
    for judge, identity in judges.items():
        harmful, benign = by_judge[judge] = cell_verdicts(store, identity)
        incoherent = store.incoherent(identity)
        for place, share, change in _rates(harmful, judge, "harmful", answered, incoherent):
            row = {**place, **_named(share, "answered", "answer_rate"), **change, **band(place)}
            cells.append(cast(CellResult, row))
        seeds += over_seeds(conditions, harmful, judge, "harmful", answered)
        if judge in store.meta("harmful_only"):
            continue
        twins = twins or benign
        for place, share, change in _rates(benign, judge, "benign", refused, incoherent):
            row = {**place, **_named(share, "refused", "over_refusal_rate"), **change}
            over_refusal.append(cast(OverRefusalResult, row))
        seeds += over_seeds(conditions, benign, judge, "benign", refused)
    first_judge = next(iter(judges))
    verdicts = by_judge[first_judge][0], twins
    utilities = store.utilities()
    guards = guard_rows(store, store.meta("guards"), judges[first_judge])
    shares = [row["n_scored"] / row["n"] for row in (*cells, *over_refusal, *utility, *wordings)]
    shares += [1 - row["n_unread"] / row["n"] for row in guards]
    coverage, threshold = min(shares, default=0.0), recipe["thresholds"]["coverage"]
    results: Results = {
        "schema": SCHEMA,
        "run": {
            "recipe": recipe["name"],
            "description": recipe["description"],
            "model": recipe["model"],
            **engine,
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
            "summary": summary(conditions, *verdicts, utilities),
        },
        "conditions": conditions,
        "cells": cells,
        "over_refusal": over_refusal,
        "over_seeds": seeds,
        "totals": system_prompt_totals(verdicts[0], recipe["system_prompts"]),
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
    if rows := unanswered.kept(store):
        results["unanswered"] = rows
    return results


def _rates(
    verdicts: CellVerdicts,
    judge: str,
    kind: ProbeKind,
    has: Callable[[Verdict], bool],
    incoherent: Mapping[ProbeCell, int],
) -> Iterator[tuple[CellPlace, Rate, CellChange]]:
    """Yield every cell's rate, and its change against the base's cell of the same format."""
    changes = [
        _rate_change(
            {} if condition == BASE else verdicts.get((BASE, part, system_prompt), {}),
            cell,
            has,
            incoherent.get(ProbeCell(condition, kind, part, system_prompt), 0),
        )
        for (condition, part, system_prompt), cell in verdicts.items()
    ]
    _correct([change for key, change in zip(verdicts, changes, strict=True) if key[0] != BASE])
    for (key, cell), change in zip(verdicts.items(), changes, strict=True):
        place: CellPlace = {
            "condition": key[0],
            "format": key[1],
            "system_prompt": key[2],
            "judge": judge,
        }
        yield place, rate(cell.values(), has), change


def _named(share: Rate, count: str, rate: str) -> dict[str, float | None]:
    """Return the fields of a rate, ``count`` and ``rate`` under the names that a row has."""
    names = {"count": count, "rate": rate}
    return {names.get(field, field): value for field, value in asdict(share).items()}


def _rate_change(
    base: Mapping[str, Verdict],
    tuned: Mapping[str, Verdict],
    has: Callable[[Verdict], bool],
    incoherent: int,
) -> CellChange:
    """Return the paired change over the behaviours with scored answers of both models."""
    # a run that is not finished has rows in one arm alone
    change = paired_change(base, tuned, has)
    counts = Counter(tuned.values())
    return {
        "verdicts": {verdict.value: counts[verdict] for verdict in sorted(counts)},
        **change_fields(change.n_pairs, change.delta, change.ci_low, change.ci_high),
        "p_mcnemar": change.p_mcnemar if change.n_pairs else None,
        "p_holm": None,
        "incoherent": incoherent,
    }


def _correct(family: Sequence[CellChange]) -> None:
    """Fill in Holm's correction over the family of tests that the manifest declares."""
    # a test without a pair stays in the family, where it counts as no evidence
    ps = [1.0 if change["p_mcnemar"] is None else change["p_mcnemar"] for change in family]
    for change, p in zip(family, holm(ps), strict=True):
        change["p_holm"] = None if change["p_mcnemar"] is None else p


def _agreement(by_judge: Mapping[str, Sequence[CellVerdicts]]) -> list[AgreementResult]:
    """Return how often two judges agree whether an answer is a refusal, per format.

    The answers of all models are pooled; intervals are by behaviour.
    """
    rows: list[AgreementResult] = []
    for first, second in combinations(by_judge, 2):
        refusals: dict[str, list[tuple[str, tuple[bool, bool]]]] = {}
        for cells_a, cells_b in zip(by_judge[first], by_judge[second], strict=True):
            for cell, verdicts in cells_a.items():
                for item, a in verdicts.items():
                    b = cells_b.get(cell, {}).get(item)
                    if b is not None and a.is_scored and b.is_scored:
                        of_format = refusals.setdefault(cell[1], [])
                        of_format.append((item, (refused(a), refused(b))))
        for part, pairs in refusals.items():
            pool = clustered((item, a == b) for item, (a, b) in pairs)
            rows.append(
                {
                    "judge_a": first,
                    "judge_b": second,
                    "format": part,
                    "n": pool.n,
                    "agreement": pool.rate,
                    "ci_low": pool.ci_low,
                    "ci_high": pool.ci_high,
                    "kappa": cohens_kappa([pair for _, pair in pairs]),
                }
            )
    return rows


def _drift(store: Store) -> list[DriftResult]:
    """Return the drift readings in the order of conditions, steps and the recipe's formats."""
    conditions = [condition["id"] for condition in store.meta("conditions")]
    formats = store.meta("recipe")["formats"]
    rows = [
        cast(DriftResult, {"condition": condition, **reading._asdict()})
        for condition, reading in store.drift()
    ]

    def place(row: DriftResult) -> tuple[int, int, int]:
        return conditions.index(row["condition"]), row["step"], formats.index(row["format"])

    return sorted(rows, key=place)


def _throughput(store: Store) -> ThroughputResult:
    """Return the work done and its duration, summed over every process that worked on the run."""
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
