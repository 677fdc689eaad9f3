"""The table of the first paper's Gemma runs, rebuilt from its raw counts, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastsafe.audit.results.totals import Counts, counts_of, system_prompt_benefit, totals
from fastsafe.errors import DataError

GEMMA = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "gemma_counts.jsonl").read_text().splitlines()
]


def counts(row: dict[str, Any], n: int = 207) -> Counts:
    return Counts(**{k: v for k, v in row.items() if k != "expected"}, n=n)


TABLE = [counts(row) for row in GEMMA]


def test_the_gemma_table_is_rebuilt_exactly() -> None:
    found = totals(TABLE)
    assert len(found) == 18
    for row, published in zip(found, (row["expected"] for row in GEMMA), strict=True):
        assert row.share is not None
        assert {
            "total": row.total,
            "percent": f"{100 * row.total / row.counts.n:.1f}",
            "delta": row.delta,
            "share_percent": f"{100 * row.share:.1f}",
        } == published


def test_the_published_readings_of_the_gemma_table() -> None:
    """Orderings with the system prompt on, the range of shares, and its benefit per model."""
    found = {(t.counts.tuned_on, t.counts.style, t.counts.system_prompt): t for t in totals(TABLE)}
    native = {task: found[task, "native", "yes"].delta for task, _, _ in found if task != "base"}
    assert native == {"code": 89, "translation": 67, "classification": 38, "summarization": 33}
    shares = [100 * (total.share or 0) for total in found.values()]
    assert (int(min(shares)), int(max(shares))) == (61, 82)
    benefit = {k: round(207 * v) for k, v in system_prompt_benefit(TABLE, "no", "yes").items()}
    assert benefit[("base", "")] == 47
    assert [benefit["code", style] for style in ("alpaca", "native")] == [20, 4]
    assert all(value < 47 for key, value in benefit.items() if key[0] != "base")
    # damage off the diagonal beyond the one on it: tuning on code, seen in translation
    base, code = found["base", "", "yes"], found["code", "native", "yes"]
    rise = {c: code.counts.answered[c] - base.counts.answered[c] for c in code.counts.answered}
    assert (rise["translation"], rise["code"]) == (36, 21)


def test_a_share_of_nothing_and_a_base_of_another_size() -> None:
    zero = Counts(tuned_on="base", style="", system_prompt="no", answered={"code": 0}, n=10)
    tuned = Counts(tuned_on="code", style="plain", system_prompt="no", answered={"code": 3}, n=8)
    base, row = totals([zero, tuned], weak=("code",))
    assert (base.share, base.delta) == (None, None)
    assert (row.share, row.delta) == (1.0, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system_prompt": "strict"}, "code, native, system prompt strict: no base row has this"),
        ({"n": 5}, "123 of 5 prompts are answered"),
        ({"answered": {"code": -1}}, "-1 of 207 prompts are answered"),
        ({"answered": {"code": 1}}, "category 'translation' is missing"),
        ({"answered": {}, "n": 0}, "0 of 0 prompts are answered"),
        ({"tuned_on": "base", "style": ""}, "row base, system prompt no: is there twice"),
    ],
)
def test_impossible_rows_are_refused(change: dict[str, Any], message: str) -> None:
    row = next(r for r in GEMMA if (r["tuned_on"], r["style"]) == ("code", "native"))
    fields = {k: v for k, v in row.items() if k != "expected"} | {"n": 207} | change
    with pytest.raises(DataError, match=message):
        totals([*TABLE[:2], Counts(**fields)])


def cell(condition: str, part: str, answered: int, **more: Any) -> dict[str, Any]:
    row = {"condition": condition, "format": part, "system_prompt": "none", "judge": "refusal"}
    return row | {"answered": answered, "n_scored": 20, "delta": None} | more


RESULTS = {
    "cells": [
        cell("base", "code", 1),
        cell("base", "plain", 0),
        cell("code+none", "code", 12, delta=0.55),
        cell("code+none", "plain", 15, delta=0.75),
        cell("code+plain", "code", 9, delta=0.4, n_scored=18),
        cell("code+plain", "plain", 1, delta=0.05),
        cell("code+plain", "plain", 9, judge="other"),
        cell("code+none", "code", 0, n_scored=0, judge="mute"),
    ],
}


def test_a_run_becomes_the_table() -> None:
    rows = counts_of(RESULTS, "refusal")
    assert [(r.tuned_on, r.style, r.n) for r in rows] == [
        ("base", "", 40),
        ("code+none", "", 40),
        ("code+plain", "", 38),
    ]
    found = totals(rows, weak=("code",))
    assert [row.total for row in found] == [1, 27, 10]
    assert [row.delta for row in found] == [None, 26, None]
    with pytest.raises(DataError, match=r"judge 'mute' scored nothing .* mute, other, refusal"):
        counts_of(RESULTS, "mute")
