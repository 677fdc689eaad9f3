"""Pooled rows: what clusters cost, against statsmodels, and whether intervals cover."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given
from hypothesis import strategies as st

from fastsafe.errors import DataError
from fastsafe.safety.stats import clusters
from fastsafe.safety.stats.clusters import design_effect, pooled_change, pooled_rate
from fastsafe.safety.stats.intervals import newcombe, wilson

Rows = Mapping[tuple[int, int], float]
SIZE = 6  # rows per behaviour: one per format
CORRELATION = 0.3


@pytest.fixture(autouse=True, scope="module")
def _few_resamples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters, "RESAMPLES", 1000)
        yield


def behaviour(row: tuple[int, int]) -> int:
    return row[0]


def beta_binomial(
    generator: np.random.Generator, rate: float, clusters: int, size: int = SIZE
) -> np.ndarray[Any, Any]:
    """Events [clusters, size] with an intra-cluster correlation of 0.3."""
    strength = 1 / CORRELATION - 1
    own = generator.beta(rate * strength, (1 - rate) * strength, clusters)
    return generator.random((clusters, size)) < own[:, None]


def rows(events: np.ndarray[Any, Any]) -> Rows:
    return {index: float(event) for index, event in np.ndenumerate(events)}  # type: ignore[misc]


def robust_se(events: np.ndarray[Any, Any], groups: np.ndarray[Any, Any]) -> float:
    """Cluster-robust standard error of a mean."""
    fit = sm.OLS(events, np.ones(len(events))).fit(cov_type="cluster", cov_kwds={"groups": groups})
    return float(fit.bse[0])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_design_effect_equals_statsmodels(seed: int) -> None:
    generator = np.random.default_rng(seed)
    events = [beta_binomial(generator, 0.4, 1, int(s))[0] for s in generator.integers(1, 9, 60)]
    hits, sizes = [int(e.sum()) for e in events], [len(e) for e in events]
    groups = np.repeat(np.arange(60), sizes)
    se = robust_se(np.concatenate(events).astype(float), groups)
    rate = sum(hits) / sum(sizes)
    naive = rate * (1 - rate) / sum(sizes)
    assert design_effect(hits, sizes) * naive == pytest.approx(se**2, rel=1e-9)


def test_design_effect_of_what_does_not_vary() -> None:
    assert design_effect([3], [5]) == 1.0
    assert design_effect([0, 0], [5, 5]) == 1.0
    assert design_effect([5, 5], [5, 5]) == 1.0


def test_bootstrap_width_equals_statsmodels() -> None:
    """Clusters of very unequal size; the two estimate one standard error in two ways."""
    generator = np.random.default_rng(3)
    base, tuned = beta_binomial(generator, 0.3, 150), beta_binomial(generator, 0.5, 150)
    keep = generator.random((150, SIZE)) < np.linspace(0.3, 1, 150)[:, None]
    keep[:, 0] = True
    kept = [index for index, k in np.ndenumerate(keep) if k]
    found = pooled_change(
        {i: float(base[i]) for i in kept}, {i: float(tuned[i]) for i in kept}, lambda row: row[0]
    )
    diffs = (tuned.astype(float) - base)[keep]
    groups = np.repeat(np.arange(150), keep.sum(1))
    assert found.delta == pytest.approx(diffs.mean())
    width = (found.ci_high - found.ci_low) / (2 * 1.96)
    assert width == pytest.approx(robust_se(diffs, groups), rel=0.03)


def naive_change(base: np.ndarray[Any, Any], tuned: np.ndarray[Any, Any]) -> tuple[float, float]:
    """As if every row were a behaviour of its own."""
    both, only_base = int((base & tuned).sum()), int((base & ~tuned).sum())
    _, low, high = newcombe(both, only_base, int((~base & tuned).sum()), base.size)
    return low, high


def clustered_change(
    base: np.ndarray[Any, Any], tuned: np.ndarray[Any, Any]
) -> tuple[float, float]:
    found = pooled_change(rows(base), rows(tuned), behaviour)
    return found.ci_low, found.ci_high


def change_coverage(
    interval: Callable[..., tuple[float, float]], samples: int, behaviours: int = 80
) -> float:
    """Share of simulated runs whose interval holds the true change."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(samples):
        base, tuned = (beta_binomial(generator, rate, behaviours) for rate in (0.2, 0.5))
        low, high = interval(base, tuned)
        held += low <= 0.3 <= high
    return held / samples


def test_the_cluster_bootstrap_covers_and_the_naive_interval_does_not() -> None:
    assert 0.93 <= change_coverage(clustered_change, 1000) <= 0.97
    assert change_coverage(naive_change, 1000) < 0.90


@pytest.mark.parametrize("behaviours", [6, 10, 20])
def test_the_cluster_bootstrap_covers_with_few_behaviours(behaviours: int) -> None:
    """Plain percentiles hold 0.87 to 0.91 here."""
    assert 0.92 <= change_coverage(clustered_change, 1000, behaviours) <= 0.98


def rate_coverage(interval: Callable[..., tuple[float, float]], rate: float) -> float:
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(2000):
        low, high = interval(beta_binomial(generator, rate, 80).sum(1).tolist())
        held += low <= rate <= high
    return held / 2000


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_the_pooled_rate_covers_and_wilson_on_rows_does_not(rate: float) -> None:
    def clustered(hits: list[int]) -> tuple[float, float]:
        found = pooled_rate(hits, [SIZE] * len(hits))
        return found.ci_low, found.ci_high

    assert 0.93 <= rate_coverage(clustered, rate) <= 0.97
    assert rate_coverage(lambda hits: wilson(sum(hits), SIZE * len(hits)), rate) < 0.90


def test_copies_of_a_row_are_no_evidence() -> None:
    once = pooled_change(
        {(i, 0): float(i < 10) for i in range(60)},
        {(i, 0): float(i < 30) for i in range(60)},
        behaviour,
    )
    copied = pooled_change(
        {(i, j): float(i < 10) for i in range(60) for j in range(7)},
        {(i, j): float(i < 30) for i in range(60) for j in range(7)},
        behaviour,
    )
    assert copied.n_pairs == 7 * once.n_pairs
    assert (copied.ci_low, copied.ci_high) == (once.ci_low, once.ci_high)


@pytest.mark.parametrize(("down", "up"), [(0, 0), (0, 1), (1, 0), (2, 2), (0, 4)])
def test_few_changes_are_no_certainty(down: int, up: int) -> None:
    """A bootstrap of equal rows has no width; the interval must have one."""
    base = {(i, j): float(i < down) for i in range(40) for j in range(3)}
    tuned = {(i, j): float(down <= i < down + up) for i in range(40) for j in range(3)}
    found = pooled_change(base, tuned, behaviour)
    _, low, high = newcombe(0, down, up, 40)
    assert found.ci_low <= low < found.delta < high <= found.ci_high  # type: ignore[operator]


@pytest.mark.parametrize("unchanged", [0, 1, 2])
@pytest.mark.parametrize("formats", [1, 2, 4])
def test_the_same_change_everywhere_is_no_certainty(unchanged: int, formats: int) -> None:
    """Ten behaviours in four formats, of which so many change in nearly every behaviour."""
    rows = [(i, j) for i in range(10) for j in range(4)]
    tuned = {(i, j): float(i >= unchanged and j < formats) for i, j in rows}
    found = pooled_change(dict.fromkeys(rows, 0.0), tuned, behaviour)
    most = formats / 4
    _, low, high = newcombe(0, unchanged, 0, 10)
    assert found.delta == pytest.approx(most * (10 - unchanged) / 10)
    assert found.ci_low <= most + low < found.delta
    assert found.ci_high >= min(most + high, 1.0) >= found.delta


SCORES = st.one_of(st.none(), st.floats(0, 1))
ARM = st.dictionaries(st.tuples(st.integers(0, 5), st.integers(0, 2)), SCORES, max_size=18)


@given(ARM, ARM, st.randoms(use_true_random=False))
def test_pooled_change_properties(base: Any, tuned: Any, random: Any) -> None:
    found = pooled_change(base, tuned, behaviour)
    assert found.n_pairs + found.n_dropped == len(base.keys() | tuned.keys())
    if found.delta is None:
        assert (found.n_pairs, found.ci_low, found.ci_high) == (0, -1.0, 1.0)
        return
    assert -1 <= found.ci_low <= found.ci_high <= 1
    keys = [k for k in base.keys() & tuned.keys() if None not in (base[k], tuned[k])]
    assert found.delta == pytest.approx(np.mean([tuned[k] - base[k] for k in keys]))
    shuffled = list(base.items())
    random.shuffle(shuffled)
    renamed = {(9 - i, j): v for (i, j), v in shuffled}
    moved = {(9 - i, j): v for (i, j), v in tuned.items()}
    assert pooled_change(renamed, moved, behaviour) == found


def test_impossible_scores_are_refused() -> None:
    with pytest.raises(DataError, match=r"row \(0, 0\) scores 0.5 and 3.0, expected both in"):
        pooled_change({(0, 0): 0.5}, {(0, 0): 3.0}, behaviour)


def test_pooled_rate_of_nothing_and_of_no_event() -> None:
    nothing = pooled_rate([], [])
    assert (nothing.n, nothing.rate, nothing.ci_low, nothing.ci_high) == (0, None, 0.0, 1.0)
    none = pooled_rate([0] * 50, [6] * 50)
    assert (none.rate, none.ci_low, none.ci_high) == (0.0, *wilson(0, 50))


@pytest.mark.parametrize(("count", "percent"), [(1, 0.0), (2, 0.0), (5, 0.09541), (50, 2.1196)])
def test_percentiles_are_expanded_where_clusters_are_few(count: int, percent: float) -> None:
    """100 Phi(-sqrt(c / (c - 1)) t(0.975, c - 1)), with t = 2.7764 for 5 and 2.0096 for 50."""
    assert clusters._tail(count) == pytest.approx(percent, rel=1e-3, abs=1e-9)


def test_nothing_is_no_row_and_no_cluster() -> None:
    assert pooled_rate([], []) == clusters.PooledRate(0, 0, None, 0.0, 1.0)
    empty = pooled_change({(0, 0): None}, {(0, 0): 1.0}, behaviour)
    assert empty == clusters.PooledChange(0, 1, 0, None, -1.0, 1.0)
    two = pooled_rate([3, 1], [4, 4])
    assert (two.n, two.clusters, two.rate) == (8, 2, 0.5)


@pytest.mark.parametrize(("few", "is_widened"), [(4, True), (5, False)])
def test_few_changes_reach_as_far_as_newcombes(few: int, is_widened: bool) -> None:
    base = {(i, j): 0.0 for i in range(40) for j in range(2)}
    tuned = {row: float(row[0] < few) for row in base}
    change = pooled_change(base, tuned, behaviour)
    _, low, high = newcombe(0, 0, few, 40)
    assert (change.n_pairs, change.clusters, change.delta) == (80, 40, few / 40)
    assert (change.ci_low <= low and change.ci_high >= high) is is_widened


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_bounds_of_changes_end_at_one(sign: float) -> None:
    whole = {(i, 0): 1.0 for i in range(6)}
    none = dict.fromkeys(whole, 0.0)
    base, tuned = (none, whole) if sign > 0 else (whole, none)
    change = pooled_change(base, tuned, behaviour)
    assert change.delta == sign
    assert sign in (change.ci_low, change.ci_high)
    assert -1 <= change.ci_low < change.ci_high <= 1


@pytest.mark.parametrize("score", [1.5, -0.5, 2.0])
def test_scores_beyond_one_are_refused(score: float) -> None:
    for base, tuned in (({(0, 0): score}, {(0, 0): 0.0}), ({(0, 0): 0.0}, {(0, 0): score})):
        with pytest.raises(DataError, match="expected both in"):
            pooled_change(base, tuned, behaviour)


def test_a_design_effect_of_two_clusters() -> None:
    """Rate 1/2; the clusters are each 2 from it: 8 * 2 / 1 / (8 / 4)."""
    assert design_effect([4, 0], [4, 4]) == pytest.approx(8.0)
    assert design_effect([4], [8]) == 1.0


def test_a_rate_of_few_clusters_reaches_as_far_as_four_of_them() -> None:
    """Five clusters with a hit and five with a miss are enough for a variance; four are not."""
    for hits in ([1] * 5 + [0] * 5, [1] * 4 + [0] * 6, [1] * 6 + [0] * 4):
        found = pooled_rate(hits, [1] * 10)
        low, high = wilson(sum(hits), 10)
        assert (found.ci_low, found.ci_high) == (pytest.approx(low), pytest.approx(high))
    # all hits in five of twenty clusters: the bound is that of the four with most hits or wider
    hits, sizes = [6, 6, 6, 6, 6] + [0] * 15, [6] * 20
    found = pooled_rate(hits, sizes)
    assert found.ci_high >= wilson(24 / 120 * 20, 20)[1]
    assert found.ci_low == pytest.approx(wilson(5, 20)[0])


def test_repeated_rows_count_as_one_and_independent_rows_as_all() -> None:
    generator = np.random.default_rng(1)
    hits = [int(generator.random() < 0.5) for _ in range(60)]
    single = pooled_rate(hits, [1] * 60)
    copies = pooled_rate([6 * hit for hit in hits], [6] * 60)
    assert (single.ci_low, single.ci_high) == (copies.ci_low, copies.ci_high)
    rows = pooled_rate([3, 2, 3, 4] * 15, [6] * 60)
    assert (rows.ci_low, rows.ci_high) == pytest.approx(wilson(180, 360))
