"""Intervals and tests: published values, scipy, properties, and a coverage simulation."""

from collections.abc import Callable, Sequence
from math import isclose, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from fastsafe.safety.stats import (
    discordant,
    holm,
    mcnemar_exact,
    paired_delta,
    wilson,
)

COUNTS = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
ARMS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80)
PS = st.lists(st.floats(0, 1), max_size=12)


def arms(both: int, base: int, tuned: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Return two arms with the four counts of a paired table."""
    pairs = (
        [(True, True)] * both
        + [(True, False)] * base
        + [(False, True)] * tuned
        + [(False, False)] * neither
    )
    return [b for b, _ in pairs], [t for _, t in pairs]


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


@given(COUNTS, st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_wilson_equals_scipy(kn: tuple[int, int], confidence: float) -> None:
    want = binomtest(*kn).proportion_ci(confidence, method="wilson")
    assert wilson(*kn, confidence) == pytest.approx((want.low, want.high), abs=1e-12)


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


def test_confidence_is_a_fraction() -> None:
    with pytest.raises(ValueError, match="wilson: confidence is 95"):
        wilson(1, 2, 95)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_equals_the_binomial_test(b: int, c: int) -> None:
    want = binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(want, rel=1e-9)
    assert mcnemar_exact(b, c) == mcnemar_exact(c, b)


def test_mcnemar_neither_underflows_nor_overflows() -> None:
    assert 0 < mcnemar_exact(0, 1000) < 1e-300
    assert mcnemar_exact(5000, 5000) == 1.0
    with pytest.raises(ValueError, match="mcnemar_exact: counts are -1 and 2"):
        mcnemar_exact(-1, 2)


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
    tuned, base = arms(both, first, second, neither)
    delta, got_low, got_high = paired_delta(base, tuned)
    assert delta == pytest.approx((first - second) / sum(table))
    assert (got_low, got_high) == pytest.approx((low, high), abs=5e-5)


@given(ARMS)
def test_paired_delta_properties(pairs: list[tuple[bool, bool]]) -> None:
    base, tuned = [b for b, _ in pairs], [t for _, t in pairs]
    delta, low, high = paired_delta(base, tuned)
    assert -1 <= low <= delta <= high <= 1
    assert delta == pytest.approx((sum(tuned) - sum(base)) / len(pairs))
    back, back_low, back_high = paired_delta(tuned, base)
    assert (-back, -back_high, -back_low) == pytest.approx((delta, low, high), abs=1e-12)
    b, c = discordant(base, tuned)
    assert isclose(delta, (c - b) / len(pairs), abs_tol=1e-12)


def test_paired_delta_edges() -> None:
    assert paired_delta([], []) == (0.0, -1.0, 1.0)
    delta, low, high = paired_delta([False] * 30, [True] * 30)
    assert (delta, high) == (1.0, 1.0)
    assert 0.8 < low < 1
    with pytest.raises(ValueError, match="tuned has 2 rows, expected 1 like base"):
        paired_delta([True], [True, False])


def wald(k: int, n: int) -> tuple[float, float]:
    """The textbook interval, wrong at small counts: the simulation must see that."""
    p = k / n
    half = 1.96 * sqrt(p * (1 - p) / n)
    return p - half, p + half


def unpaired_wald(base: Sequence[bool], tuned: Sequence[bool]) -> tuple[float, float, float]:
    """As if the arms had seen other prompts; blind to pairs that agree."""
    n, p1, p2 = len(base), sum(tuned) / len(base), sum(base) / len(base)
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


Paired = Callable[[Sequence[bool], Sequence[bool]], tuple[float, float, float]]


def paired_coverage(interval: Paired, cells: Sequence[float]) -> float:
    """Share of simulated paired samples of 60 whose interval holds the true change."""
    rng = np.random.default_rng(0)
    truth = cells[2] - cells[1]
    held = 0
    for both, base, tuned, neither in rng.multinomial(60, cells, 1500):
        _, low, high = interval(*arms(both, base, tuned, neither))
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
