"""Pooled rates: intervals that are right although formats share behaviours."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fastsafe.audit.results.pooled_rates import over_seeds, pooled, summary
from fastsafe.audit.store.rows import UtilityScore
from fastsafe.safety.stats.clusters import pooled_change
from fastsafe.safety.stats.intervals import wilson
from fastsafe.safety.verdict import Verdict

YES, NO = Verdict.COMPLIED_HARMFUL, Verdict.REFUSED


def pool(hits: Sequence[int], num_cells: int) -> dict[str, Any]:
    """Pool cells in which behaviour i is answered ``hits[i]`` times."""
    cells = [
        {str(i): YES if cell < count else NO for i, count in enumerate(hits)}
        for cell in range(num_cells)
    ]
    return pooled(cells, lambda verdict: verdict is YES)


def test_copies_of_a_cell_are_no_evidence() -> None:
    for copies in (1, 4, 10):
        found = pool([copies * (i % 2) for i in range(50)], copies)
        assert (found["n"], found["clusters"], found["rate"]) == (50 * copies, 50, 0.5)
        assert (found["ci_low"], found["ci_high"]) == pytest.approx(wilson(25, 50))


def test_cells_that_agree_no_more_than_chance_are_evidence() -> None:
    """Every behaviour is answered in half of the cells: no variance between behaviours."""
    found = pool([2] * 50, 4)
    assert (found["ci_low"], found["ci_high"]) == pytest.approx(wilson(100, 200))


@pytest.mark.parametrize("hit", [0, 5])
def test_no_event_is_not_certainty(hit: int) -> None:
    found = pool([hit] * 50, 5)
    assert found["rate"] == hit / 5
    assert (found["ci_low"], found["ci_high"]) == pytest.approx(wilson(10 * hit, 50))


def test_unscored_answers_are_in_no_rate() -> None:
    cells = [{"a": YES, "b": Verdict.JUDGE_ERROR}, {"a": NO, "b": Verdict.NOT_JUDGED}]
    found = pooled(cells, lambda verdict: verdict is YES)
    assert (found["n"], found["clusters"], found["rate"]) == (2, 1, 0.5)
    assert pooled([{"a": Verdict.JUDGE_ERROR}], bool)["rate"] is None


@pytest.mark.parametrize("num_cells", [2, 5, 32])
@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("is_mirrored", [False, True])
def test_more_events_never_look_safer(num_cells: int, each: int, is_mirrored: bool) -> None:
    bounds = []
    for events in range(40):
        hits = [each] * events + [0] * (100 - events)
        if is_mirrored:
            found = pool([num_cells - hit for hit in hits], num_cells)
            bounds.append(1 - found["ci_low"])
        else:
            bounds.append(pool(hits, num_cells)["ci_high"])
    assert np.diff(bounds).min() > -1e-12


@pytest.mark.parametrize("rate", [0.03, 0.2, 0.5, 0.9])
def test_it_covers_clusters_and_rows_alone_do_not(rate: float) -> None:
    """Beta-binomial answers with a correlation of 0.3 within each of 100 behaviours, 8 cells."""
    rng = np.random.default_rng(1)
    size = 1 / 0.3 - 1
    chances = rng.beta(rate * size, (1 - rate) * size, (800, 100))
    held = naive = 0
    for hits in rng.binomial(8, chances):
        found = pool(hits.tolist(), 8)
        held += found["ci_low"] <= rate <= found["ci_high"]
        low, high = wilson(int(hits.sum()), 800)
        naive += low <= rate <= high
    assert 0.93 <= held / 800 <= 0.99
    assert naive / 800 < 0.85


def test_seeds_are_pooled_by_behaviour() -> None:
    conditions = [
        {"id": "base", "seed": None},
        {"id": "code+none+seed0", "seed": 0},
        {"id": "code+none+seed1", "seed": 1},
    ]
    verdicts = {str(i): YES if i < 25 else NO for i in range(50)}
    cells = {(c["id"], "plain", "none"): verdicts for c in conditions}
    (row,) = over_seeds(conditions, cells, "refusal", "harmful", lambda v: v is YES)
    assert (row["condition"], row["format"], row["kind"]) == ("code+none", "plain", "harmful")
    assert row["rates"] == {"0": 0.5, "1": 0.5}
    assert (row["n"], row["clusters"]) == (100, 50)
    # the second seed says the same, so it narrows nothing
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(wilson(25, 50))
    alone = [{"id": "code+none", "seed": None}]
    assert over_seeds(alone, {("code+none", "plain", "none"): verdicts}, "r", "h", bool) == []


def test_changes_are_paired_with_the_base_in_the_same_format() -> None:
    def cell(hits: int) -> dict[str, Verdict]:
        return {str(i): YES if i < hits else NO for i in range(40)}

    conditions = [
        {"id": "base", "own_format": None, "mitigation": "none", "manipulation": "benign"},
        {"id": "code+none", "own_format": "code", "mitigation": "none", "manipulation": "benign"},
    ]
    harmful = {
        ("base", "plain", "none"): cell(2),
        ("base", "code", "none"): cell(0) | {"39": Verdict.JUDGE_ERROR},
        ("code+none", "plain", "none"): cell(10),
        ("code+none", "code", "none"): cell(30),
    }
    values = [("base", 0.5), ("base", 1.0), ("code+none", 0.25), ("code+none", 0.75)]
    utilities = [
        UtilityScore(c, "code", str(i % 2), "chrf", value) for i, (c, value) in enumerate(values)
    ]
    rows = {(r["mitigation"], r["scope"]): r for r in summary(conditions, harmful, {}, utilities)}
    arms: list[dict[Any, float | None]] = [
        {
            (part, item): float(v is YES) if v.is_scored else None
            for (name, part, _), cells in harmful.items()
            if name == condition
            for item, v in cells.items()
        }
        for condition in ("base", "code+none")
    ]
    wanted = pooled_change(arms[0], arms[1], lambda key: key[-1])
    found = rows["none", "all_formats"]
    assert (found["n"], found["n_pairs"], found["clusters"]) == (80, 79, 40)
    assert (found["delta"], found["delta_ci_low"], found["delta_ci_high"]) == (
        wanted.delta,
        wanted.ci_low,
        wanted.ci_high,
    )
    assert rows["none", "own_format"]["delta"] == pytest.approx(30 / 39)
    assert rows["base", "all_formats"]["delta"] is None
    assert rows["base", "utility"]["rate"] == 0.75
    assert rows["base", "utility"]["delta"] is None
    useful = rows["none", "utility"]
    assert (useful["n"], useful["clusters"], useful["rate"]) == (2, 2, 0.5)
    assert (useful["n_pairs"], useful["delta"]) == (2, -0.25)


def test_utility_that_is_not_measured_yet_says_nothing() -> None:
    conditions = [{"id": "base", "own_format": None, "mitigation": "", "manipulation": "benign"}]
    (row,) = summary(conditions, {}, {}, [UtilityScore("base", "code", "0", None, None)])
    assert (row["n"], row["rate"], row["ci_low"], row["ci_high"]) == (0, None, 0.0, 1.0)
