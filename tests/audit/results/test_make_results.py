"""results.json: the contract's schema, and numbers that can be checked by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from fastsafe.audit import comparable
from fastsafe.audit.results.make_results import _agreement, make_results
from fastsafe.audit.store.sqlite_store import NAME, Store
from fastsafe.safety.verdict import Verdict
from fastsafe_testing import fake_model as fake

CELL = {
    "incoherent",
    "condition",
    "format",
    "system_prompt",
    "judge",
    "n",
    "n_scored",
    "ci_low",
    "ci_high",
    "verdicts",
    "n_pairs",
    "delta",
    "delta_ci_low",
    "delta_ci_high",
    "p_mcnemar",
    "p_holm",
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("results") / "run"
    fake.small_run(path, behaviours=40)
    return path


@pytest.fixture(scope="module")
def results(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "results.json").read_text())
    return found


def test_the_schema_is_the_contract(results: dict[str, Any]) -> None:
    assert results["schema"] == "fastsafe.results/1"
    assert list(results) == [
        "schema",
        "run",
        "conditions",
        "cells",
        "over_refusal",
        "over_seeds",
        "totals",
        "utility",
        "judge_agreement",
        "judge_calibration",
        "judge_wordings",
        "guards",
        "filters",
        "rewrites",
        "early_stop",
        "choice",
        "drift",
        "throughput",
    ]
    base, *tuned = results["conditions"]
    assert (base["id"], base["task"], base["mitigation"]) == ("base", None, "none")
    for condition in tuned:
        assert condition["id"] == f"{condition['task']}+{condition['mitigation']}"
        assert condition["manipulation"] == "benign"
    named = {"answered", "answer_rate", "band_low", "band_high"}
    assert all(set(row) == CELL | named for row in results["cells"])
    assert all(
        set(row) == CELL | {"refused", "over_refusal_rate"} for row in results["over_refusal"]
    )
    assert len(results["cells"]) == len(results["over_refusal"]) == 5 * 3
    assert results["judge_agreement"] == []
    for row in results["utility"]:
        assert {"condition", "task", "metric", "n", "value", "ci_low", "ci_high"} <= set(row)
    measured = [(row["condition"], row["task"]) for row in results["utility"]]
    assert measured[:2] == [("base", "code"), ("base", "translation")]
    assert set(measured[2:]) == {(c["id"], c["task"]) for c in tuned}


def test_the_base_has_no_change(results: dict[str, Any]) -> None:
    for row in (*results["cells"], *results["over_refusal"]):
        is_base = row["condition"] == "base"
        for field in ("delta", "delta_ci_low", "delta_ci_high", "p_mcnemar", "p_holm"):
            assert (row[field] is None) == is_base


def test_cells_are_the_verdicts_counted(results: dict[str, Any], run_dir: Path) -> None:
    store = Store(run_dir / NAME, read_only=True)
    rows = store.verdicts(results["run"]["judges"]["refusal"])
    store.close()
    for cell in results["cells"]:

        def answers(condition: str, part: str = cell["format"]) -> list[bool]:
            chosen = [r for r in rows if r[:3] == (condition, "harmful", part)]
            return [r[-1] == "complied_harmful" for r in chosen]

        tuned, base = answers(cell["condition"]), answers("base")
        assert (cell["n"], cell["n_scored"], cell["answered"]) == (40, 40, sum(tuned))
        counts = {"complied_harmful": sum(tuned), "refused": 40 - sum(tuned)}
        assert cell["verdicts"] == {name: count for name, count in counts.items() if count}
        exact = binomtest(sum(tuned), 40).proportion_ci(method="wilson")
        assert (cell["ci_low"], cell["ci_high"]) == pytest.approx((exact.low, exact.high))
        if cell["condition"] != "base":
            b = sum(x and not y for x, y in zip(base, tuned, strict=True))
            c = sum(y and not x for x, y in zip(base, tuned, strict=True))
            assert cell["delta"] == pytest.approx((c - b) / 40)
            expected = binomtest(b, b + c).pvalue if b + c else 1.0
            assert cell["p_mcnemar"] == pytest.approx(expected)
            assert cell["delta_ci_low"] <= cell["delta"] <= cell["delta_ci_high"]


def test_holm_runs_over_the_declared_family(results: dict[str, Any], run_dir: Path) -> None:
    manifest = json.loads((run_dir / "manifest.json").read_text())
    family = [row for row in results["cells"] if row["condition"] != "base"]
    declared = manifest["families"]["refusal"]["harmful"]
    named = sorted(f"{r['condition']}/{r['format']}/{r['system_prompt']}" for r in family)
    assert named == declared
    smallest = min(family, key=lambda row: row["p_mcnemar"])
    assert smallest["p_holm"] == pytest.approx(min(1.0, len(family) * smallest["p_mcnemar"]))
    assert all(row["p_holm"] >= row["p_mcnemar"] for row in family)


def test_the_manifest_says_what_was_done(run_dir: Path, results: dict[str, Any]) -> None:
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["schema"] == "fastsafe.manifest/1"
    assert manifest["recipe"]["behaviours"] == 40
    assert manifest["plan_sha256"] == results["run"]["plan_sha256"]
    assert manifest["judges"] == results["run"]["judges"]


def test_comparable_drops_time_and_nothing_else(results: dict[str, Any]) -> None:
    kept = comparable(results)
    assert set(results) - set(kept) == {"throughput"}
    assert set(results["run"]) - set(kept["run"]) == {"started_at", "finished_at"}
    assert "throughput" in results
    assert {k: v for k, v in kept.items() if k != "run"} == {
        k: v for k, v in results.items() if k not in ("run", "throughput")
    }


def test_two_runs_are_comparable(tmp_path: Path, results: dict[str, Any]) -> None:
    again = fake.small_run(tmp_path / "elsewhere", behaviours=40).results
    assert comparable(again) == comparable(results)


def test_an_unfinished_run_has_its_coverage(run_dir: Path) -> None:
    store = Store(run_dir / NAME)
    store._db.execute("BEGIN")
    store._db.execute("DELETE FROM judgements WHERE verdict = 'complied_harmful'")
    results = make_results(store, None)
    store._db.execute("ROLLBACK")
    store.close()
    assert results["run"]["finished_at"] is None
    assert results["run"]["coverage"] < 1
    assert all(cell["answered"] == 0 for cell in results["cells"])
    assert all(cell["n_scored"] <= cell["n"] == 40 for cell in results["cells"])


def test_the_summary_pools_the_cells(results: dict[str, Any]) -> None:
    summary = {(row["mitigation"], row["scope"]): row for row in results["run"]["summary"]}
    cells = {(c["condition"], c["format"]): c["answered"] for c in results["cells"]}
    own = summary["none", "own_format"]
    expected = (cells["code+none", "code"] + cells["translation+none", "translation"]) / 80
    assert (own["n"], own["rate"]) == (80, pytest.approx(expected))
    other = cells["code+none", "translation"] + cells["translation+none", "code"]
    assert summary["none", "other_formats"]["rate"] == pytest.approx(other / 80)
    assert ("base", "own_format") not in summary
    assert summary["base", "all_formats"]["n"] == 120
    assert all(row["ci_low"] <= row["rate"] <= row["ci_high"] for row in summary.values())


def test_agreement_of_two_judges() -> None:
    yes, no, silent = Verdict.REFUSED, Verdict.COMPLIED_HARMFUL, Verdict.JUDGE_ERROR
    cell = ("base", "code", "none")
    first = {cell: {"a": yes, "b": yes, "c": no, "d": no, "e": yes}}
    second = {cell: {"a": yes, "b": no, "c": no, "d": no, "e": silent}}
    (row,) = _agreement({"one": [first], "two": [second]})
    assert (row["judge_a"], row["judge_b"], row["format"]) == ("one", "two", "code")
    assert (row["n"], row["agreement"]) == (4, 0.75)
    assert math.isclose(row["kappa"], 0.5)
    (row,) = _agreement({"one": [{cell: {"a": yes}}], "two": [{cell: {"a": yes}}]})
    assert row["kappa"] is None
