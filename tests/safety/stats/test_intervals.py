"""Intervals and tests: published values, scipy, statsmodels, properties, coverage simulations."""

import math
import statistics
from collections.abc import Callable, Sequence
from math import comb, isclose, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, t, ttest_1samp
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.inter_rater import cohens_kappa as reference_kappa
from statsmodels.stats.inter_rater import to_table
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from fastsafe.safety.stats.intervals import (
    Pairs,
    cohens_kappa,
    difference_interval,
    discordant,
    holm,
    mcnemar_exact,
    mean_interval,
    newcombe,
    pair,
    paired_delta,
    rule_of_three,
    student,
    wilson,
)

COUNTS = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
ARMS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80)
PS = st.lists(st.floats(0, 1), max_size=12)


def joined(base: Sequence[float], tuned: Sequence[float]) -> Pairs[float]:
    """Pair two arms by position, which no caller of the package can."""
    return pair(dict(enumerate(base)), dict(enumerate(tuned)))


def arms(both: int, base: int, tuned: int, neither: int) -> Pairs[float]:
    """Return two arms with the four counts of a paired table."""
    first = [True] * (both + base) + [False] * (tuned + neither)
    return joined(first, [True] * both + [False] * base + [True] * tuned + [False] * neither)


# Newcombe 1998, Stat. Med. 17:857, table I, method 3
@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_published(k: int, n: int, low: float, high: float) -> None:
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


@given(COUNTS)
def test_wilson_equals_scipy(kn: tuple[int, int]) -> None:
    want = binomtest(*kn).proportion_ci(0.95, method="wilson")
    assert wilson(*kn) == pytest.approx((want.low, want.high), abs=1e-12)


@given(COUNTS)
def test_wilson_holds_its_rate_and_mirrors(kn: tuple[int, int]) -> None:
    k, n = kn
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert low < high
    mirrored = wilson(n - k, n)
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-12)


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, -1)])
def test_wilson_refuses_impossible_counts(k: int, n: int) -> None:
    with pytest.raises(ValueError, match=rf"wilson: k is {k}, expected .* with n={n}"):
        wilson(k, n)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_equals_its_sum_of_binomial_terms(b: int, c: int) -> None:
    tail = sum(comb(b + c, i) for i in range(min(b, c) + 1))
    assert mcnemar_exact(b, c) == pytest.approx(min(1.0, 2 * tail / 2 ** (b + c)), rel=1e-9)
    assert mcnemar_exact(b, c) == mcnemar_exact(c, b)


def test_mcnemar_neither_underflows_nor_overflows() -> None:
    assert 0 < mcnemar_exact(0, 1000) < 1e-300
    assert mcnemar_exact(5000, 5000) == 1.0


def test_holm_by_hand() -> None:
    """Ranks 1..4 are multiplied by 4, 3, 2, 1; the last is lifted to the one before."""
    got = holm([0.04, 0.001, 0.02, 0.035])
    assert got == pytest.approx([0.07, 0.004, 0.06, 0.07])
    assert holm([]) == []
    assert holm([0.3, 0.9]) == pytest.approx([0.6, 0.9])
    with pytest.raises(ValueError, match="holm: p-value 1 is nan"):
        holm([0.1, float("nan")])


@given(PS, st.randoms(use_true_random=False))
def test_holm_properties(ps: list[float], random: object) -> None:
    """Never below p or above Bonferroni; keeps order; does not care for the order given."""
    adjusted = holm(ps)
    for p, q in zip(ps, adjusted, strict=True):
        assert p <= q <= min(1.0, len(ps) * p)
    by_p = [q for _, q in sorted(zip(ps, adjusted, strict=True))]
    assert by_p == sorted(by_p)
    assert sorted(holm(ps[::-1])) == sorted(adjusted)


# Newcombe 1998, Stat. Med. 17:2635, method 10; (1, 1, 7, 12) is the airway example of
# Fagerland, Lydersen and Laake 2014, BMC Med. Res. Methodol.
@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((36, 14, 0, 0), 0.1528, 0.4167),
        ((20, 12, 2, 16), 0.0562, 0.3292),
        ((1, 1, 7, 12), -0.5069, -0.0256),
    ],
)
def test_paired_delta_published(table: tuple[int, ...], low: float, high: float) -> None:
    both, first, second, neither = table
    delta, got_low, got_high = paired_delta(arms(both, second, first, neither))
    assert delta == pytest.approx((first - second) / sum(table))
    assert (got_low, got_high) == pytest.approx((low, high), abs=5e-5)


@given(ARMS)
def test_paired_delta_properties(pairs: list[tuple[bool, bool]]) -> None:
    base, tuned = [b for b, _ in pairs], [t for _, t in pairs]
    delta, low, high = paired_delta(joined(base, tuned))
    assert -1 <= low <= delta <= high <= 1
    assert delta == pytest.approx((sum(tuned) - sum(base)) / len(pairs))
    back, back_low, back_high = paired_delta(joined(tuned, base))
    assert (-back, -back_high, -back_low) == pytest.approx((delta, low, high), abs=1e-12)
    b, c = discordant(joined(base, tuned))
    assert isclose(delta, (c - b) / len(pairs), abs_tol=1e-12)


def test_paired_delta_edges() -> None:
    assert paired_delta(pair({}, {})) == (0.0, -1.0, 1.0)
    delta, low, high = paired_delta(joined([False] * 30, [True] * 30))
    assert (delta, high) == (1.0, 1.0)
    assert 0.8 < low < 1


def wald(k: int, n: int) -> tuple[float, float]:
    """The textbook interval, wrong at small counts: the simulation must see that."""
    p = k / n
    half = 1.96 * sqrt(p * (1 - p) / n)
    return p - half, p + half


def unpaired_wald(pairs: Pairs[float]) -> tuple[float, float, float]:
    """As if the arms had seen other prompts; blind to pairs that agree."""
    n, p1, p2 = len(pairs.keys), statistics.fmean(pairs.tuned), statistics.fmean(pairs.base)
    half = 1.96 * sqrt(p1 * (1 - p1) / n + p2 * (1 - p2) / n)
    return p1 - p2, p1 - p2 - half, p1 - p2 + half


def coverage(interval: Callable[[int, int], tuple[float, float]], rates: Sequence[float]) -> float:
    """Share of simulated samples of 50 whose interval holds the true rate."""
    rng = np.random.default_rng(0)
    held = []
    bounds = [interval(k, 50) for k in range(51)]
    for rate in rates:
        for k in rng.binomial(50, rate, 2000):
            held.append(bounds[k][0] <= rate <= bounds[k][1])
    return float(np.mean(held))


def test_wilson_covers_and_wald_does_not() -> None:
    rates = [0.02, 0.05, 0.1, 0.3, 0.5, 0.8, 0.95, 0.98]
    assert 0.93 <= coverage(wilson, rates) <= 0.97
    assert coverage(wald, rates) < 0.90


Paired = Callable[[Pairs[float]], tuple[float, float, float]]


def paired_coverage(interval: Paired, cells: Sequence[float]) -> float:
    """Share of simulated paired samples of 60 whose interval holds the true change."""
    rng = np.random.default_rng(0)
    truth = cells[2] - cells[1]
    held = 0
    for both, base, tuned, neither in rng.multinomial(60, cells, 1500):
        _, low, high = interval(arms(both, base, tuned, neither))
        held += low <= truth <= high
    return held / 1500


@pytest.mark.parametrize(
    "cells", [(0.05, 0.02, 0.4, 0.53), (0.3, 0.1, 0.2, 0.4), (0.6, 0.05, 0.15, 0.2)]
)
def test_paired_delta_covers(cells: tuple[float, ...]) -> None:
    assert 0.93 <= paired_coverage(paired_delta, cells) <= 0.98


def test_an_unpaired_interval_is_seen_to_fail() -> None:
    """Pairs that mostly agree: it is far too wide; pairs that mostly differ: far too narrow."""
    agree, differ = (0.45, 0.03, 0.07, 0.45), (0.03, 0.47, 0.47, 0.03)
    assert paired_coverage(unpaired_wald, agree) > 0.99
    assert paired_coverage(unpaired_wald, differ) < 0.88
    assert 0.93 <= paired_coverage(paired_delta, differ) <= 0.98


def test_pairs_are_made_by_key() -> None:
    found = pair({"a": 1, "b": 0, "c": None}, {"c": 1, "b": 1, "a": None})
    assert (found.keys, found.base, found.tuned, found.n_dropped) == (("b",), (0,), (1,), 2)


def test_rows_of_one_arm_are_counted_as_dropped() -> None:
    base, tuned = {"a": True, "b": False}, {"b": True, "z": True, "y": False}
    found = pair(base, tuned)
    assert (found.keys, found.n_dropped) == (("b",), 3)


ROWS = st.dictionaries(st.integers(0, 9), st.one_of(st.none(), st.booleans()))


@given(ROWS, ROWS)
def test_pairs_and_dropped_are_all_rows(base: dict[int, bool], tuned: dict[int, bool]) -> None:
    found = pair(base, tuned)
    assert len(found.keys) + found.n_dropped == len(base.keys() | tuned.keys())
    assert all(base[k] is b for k, b in zip(found.keys, found.base, strict=True))
    assert all(tuned[k] is t for k, t in zip(found.keys, found.tuned, strict=True))


@given(COUNTS)
def test_wilson_equals_statsmodels(kn: tuple[int, int]) -> None:
    want = proportion_confint(*kn, alpha=0.05, method="wilson")
    assert wilson(*kn) == pytest.approx(want, abs=1e-12)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_equals_statsmodels(b: int, c: int) -> None:
    want = min(1.0, float(mcnemar([[5, b], [c, 7]], exact=True).pvalue)) if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 5, 12, 72])
def test_holm_equals_statsmodels(n: int) -> None:
    ps = (np.random.default_rng(n).random(n) ** 4).round(2).tolist()  # with ties
    assert holm(ps) == pytest.approx(list(multipletests(ps, method="holm")[1]), abs=1e-12)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1))
def test_kappa_equals_statsmodels(pairs: list[tuple[str, str]]) -> None:
    found = cohens_kappa(pairs)
    if len({label for pair_ in pairs for label in pair_}) == 1:
        assert found is None
        return
    coded = np.array([["abc".index(a), "abc".index(b)] for a, b in pairs])
    want = reference_kappa(to_table(coded, bins=3)[0], return_results=False)
    assert found == pytest.approx(float(want), abs=1e-12)


def test_kappa_of_nothing() -> None:
    assert cohens_kappa([]) is None


@given(st.integers(1, 10_000))
def test_the_rule_of_three(n: int) -> None:
    bound = rule_of_three(n)
    assert (1 - bound) ** n == pytest.approx(0.05, rel=1e-6)
    assert bound < 3 / n
    assert bound < wilson(0, n)[1] or n < 5  # two-sided and score-based: wider from there on


def test_the_rule_of_three_needs_rows() -> None:
    with pytest.raises(ValueError, match="rule_of_three: n is 0"):
        rule_of_three(0)


def test_scores_between_zero_and_one_get_students_interval() -> None:
    values = [0.1, 0.4, 0.35, 0.8]
    mean = statistics.fmean(values)
    half = t.ppf(0.975, 3) * statistics.stdev(values) / 2
    assert mean_interval(values) == pytest.approx((max(0, mean - half), mean + half))
    moved = joined(values, [v + d for v, d in zip(values, (0.1, 0.2, 0.1, 0.15), strict=True)])
    want = ttest_1samp([0.1, 0.2, 0.1, 0.15], 0).confidence_interval(0.95)
    assert difference_interval(moved) == pytest.approx((0.1375, want.low, want.high))
    assert mean_interval([0.3]) == (0.0, 1.0)
    assert difference_interval(joined([0.5], [0.7])) == pytest.approx((0.2, -1.0, 1.0))
    assert student([0.5]) == (0.5, math.inf), "one value bounds nothing"


def test_zeros_and_ones_get_wilsons_interval() -> None:
    exact = binomtest(3, 4).proportion_ci(method="wilson")
    assert mean_interval([1.0, 0.0, 1.0, 1.0]) == pytest.approx((exact.low, exact.high))
    assert mean_interval([]) == (0.0, 1.0)
    found = difference_interval(joined([1.0, 0.0, 0.0], [1.0, 1.0, 0.0]))
    assert found == newcombe(1, 0, 1, 3)
    assert difference_interval(pair({}, {})) == (0.0, -1.0, 1.0)
