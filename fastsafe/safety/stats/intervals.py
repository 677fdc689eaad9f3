"""Intervals and tests for rates and means, in closed form and at 95 %.

Every rate of a report carries a Wilson interval, every change against the base model a paired
interval and an exact McNemar p-value, and every family of such p-values Holm's correction. Rates
that are pooled over formats, samples or seeds belong to ``clusters``, minimum detectable effects to
``power``.

A comparison takes `Pairs` alone, and `pair` joins two arms by row key alone, so that no change can
be claimed from rows that only one model was asked.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from statistics import NormalDist, fmean, stdev
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T", bound=float)

CONFIDENCE = 0.95  # of every interval, two-sided
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


@dataclass(frozen=True)
class Pairs(Generic[T]):
    """Outcomes of two arms on the same rows, as `pair` joins them."""

    keys: tuple[Hashable, ...]
    base: tuple[T, ...]
    tuned: tuple[T, ...]
    n_dropped: int  # rows that are missing or unscored in at least one arm


def pair(base: Mapping[K, T | None], tuned: Mapping[K, T | None]) -> Pairs[T]:
    """Join two arms by row key; a row that only one arm has is dropped and counted.

    Args:
        base: Outcome by row; None where the row is unscored.
        tuned: Outcome of the other arm by the same rows.

    Returns:
        The rows that both arms have scored, in the order of ``base``.

    Example:
        >>> pair({"a": True, "b": None, "c": False}, {"c": True, "a": True, "b": False})
        Pairs(keys=('a', 'c'), base=(True, False), tuned=(True, True), n_dropped=1)
    """
    rows = [
        (key, before, after)
        for key, before in base.items()
        if before is not None and (after := tuned.get(key)) is not None
    ]
    return Pairs(
        tuple(row[0] for row in rows),
        tuple(row[1] for row in rows),
        tuple(row[2] for row in rows),
        len(base.keys() | tuned.keys()) - len(rows),
    )


def wilson(k: float, n: float) -> tuple[float, float]:
    """Return Wilson's score interval of a rate of ``k`` in ``n``.

    Args:
        k: Events, in [0, n]; a fraction where n is an effective sample size.
        n: Trials; 0 gives (0, 1).

    Returns:
        (low, high) as fractions, 0 <= low <= k/n <= high <= 1.

    Raises:
        ValueError: ``k`` is not in [0, n].

    Source: Wilson 1927; the first method recommended by Newcombe 1998 (Stat. Med. 17:857).

    Example:
        >>> [round(x, 4) for x in wilson(5, 50)]
        [0.0435, 0.2136]
    """
    if not 0 <= k <= n:
        raise ValueError(f"wilson: k is {k}, expected a number in [0, n] with n={n}")
    if n == 0:
        return 0.0, 1.0
    p = k / n
    shrink = 1 + _Z * _Z / n
    centre = (p + _Z * _Z / (2 * n)) / shrink
    half = _Z / shrink * sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))
    # At k = 0 and k = n the bound is exactly p; rounding must not put it on the other side.
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def rule_of_three(n: int) -> float:
    """Return the one-sided upper bound of a rate after ``n`` rows without an event.

    1 - 0.05^(1/n), just below 3/n, which gave the rule its name (Hanley and Lippman-Hand 1983).

    Raises:
        ValueError: ``n`` is below 1.

    Example:
        >>> round(rule_of_three(100), 4)
        0.0295
    """
    if n < 1:
        raise ValueError(f"rule_of_three: n is {n}, expected at least 1")
    return 1.0 - float((1 - CONFIDENCE) ** (1 / n))


def discordant(pairs: Pairs[bool]) -> tuple[int, int]:
    """Count the discordant pairs: (true in base alone, true in tuned alone)."""
    counts = Counter(zip(pairs.base, pairs.tuned, strict=True))
    return counts[True, False], counts[False, True]


def mcnemar_exact(b: int, c: int) -> float:
    """Return the exact two-sided p-value of McNemar's test: is ``b`` of ``b + c`` a fair coin's?

    Args:
        b: Discordant pairs of one kind.
        c: Discordant pairs of the other kind.

    Returns:
        A p-value; 1 without a discordant pair.

    Example:
        >>> mcnemar_exact(0, 6)
        0.03125
    """
    from scipy.stats import binomtest

    return float(binomtest(b, b + c).pvalue) if b + c else 1.0


def holm(ps: Sequence[float]) -> list[float]:
    """Return a family of p-values with Holm's correction, which bounds the family-wise error rate.

    Args:
        ps: One p-value per hypothesis of the declared family, each in [0, 1].

    Returns:
        Adjusted p-values in the order given; each at least its own p and at most 1.

    Raises:
        ValueError: A value is not in [0, 1] (a missing test is not a p-value: leave it out).

    Source: Holm 1979, Scand. J. Stat. 6:65.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    for i, p in enumerate(ps):
        if not 0 <= p <= 1:
            raise ValueError(f"holm: p-value {i} is {p}, expected a number in [0, 1]")
    adjusted = [0.0] * len(ps)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted


def paired_delta(pairs: Pairs[bool]) -> tuple[float, float, float]:
    """Return the change of a rate between two arms on the same prompts, with its interval.

    Returns:
        (delta, low, high) as fractions in [-1, 1], delta = rate(tuned) - rate(base);
        (0, -1, 1) when there is no pair.

    Example:
        >>> base = {i: i < 5 for i in range(25)}
        >>> tuned = {i: i < 15 for i in range(25)}
        >>> [round(x, 3) for x in paired_delta(pair(base, tuned))]
        [0.4, 0.174, 0.569]
    """
    only_base, only_tuned = discordant(pairs)
    return newcombe(sum(pairs.base) - only_base, only_base, only_tuned, len(pairs.keys))


def newcombe(both: int, only_base: int, only_tuned: int, n: int) -> tuple[float, float, float]:
    """Return what `paired_delta` does, from the counts of a paired table over ``n`` pairs.

    Source: Newcombe 1998 (Stat. Med. 17:2635), method 10: squared distances to the two Wilson
    intervals, less twice their product times phi, whose numerator is pulled n/2 towards zero when
    it is positive.
    """
    if n == 0:
        return 0.0, -1.0, 1.0
    neither = n - both - only_base - only_tuned
    k1, k2 = both + only_tuned, both + only_base  # events of the tuned and of the base arm
    p1, p2 = k1 / n, k2 / n
    low1, high1 = wilson(k1, n)
    low2, high2 = wilson(k2, n)
    margins = k1 * (n - k1) * k2 * (n - k2)
    cross = float(both * neither - only_base * only_tuned)
    if cross > 0:
        cross = max(cross - n / 2, 0.0)
    phi = cross / sqrt(margins) if margins else 0.0
    delta = p1 - p2
    low = delta - _distance(p1 - low1, high2 - p2, phi)
    high = delta + _distance(high1 - p1, p2 - low2, phi)
    return delta, max(low, -1.0), min(high, 1.0)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the interval of a mean of scores in [0, 1]: Wilson's for zeros and ones."""
    if set(values) <= {0.0, 1.0}:
        return wilson(round(sum(values)), len(values))
    centre, half = student(values)
    return max(0.0, centre - half), min(1.0, centre + half)


def difference_interval(pairs: Pairs[float]) -> tuple[float, float, float]:
    """Return (mean of tuned - base, low, high) of paired scores in [0, 1].

    Newcombe's interval for zeros and ones, Student's of the differences otherwise; (0, -1, 1)
    when there is no pair.
    """
    if {*pairs.base, *pairs.tuned} <= {0.0, 1.0}:
        base, tuned = (tuple(map(bool, arm)) for arm in (pairs.base, pairs.tuned))
        return paired_delta(Pairs(pairs.keys, base, tuned, pairs.n_dropped))
    centre, half = student([b - a for a, b in zip(pairs.base, pairs.tuned, strict=True)])
    return centre, max(-1.0, centre - half), min(1.0, centre + half)


def student(values: Sequence[float]) -> tuple[float, float]:
    """Return a mean and the half-width of its Student interval, infinite for a single value."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return fmean(values), inf
    return fmean(values), float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(values) / sqrt(n)


def cohens_kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> float | None:
    """Return Cohen's kappa, the agreement of two judges beyond chance, over labels of any kind.

    Returns:
        (observed - chance) / (1 - chance), at most 1; None without a pair, or where one label
        alone makes chance agreement certain.

    Source: Cohen 1960, Educ. Psychol. Meas. 20:37.

    Example:
        >>> cohens_kappa([("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "no")])
        0.5
    """
    n = len(pairs)
    if n == 0:
        return None
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    # integers until the last division: chance is exactly 1 or it is not
    chance = sum(first[label] * second[label] for label in first)
    same = sum(a == b for a, b in pairs)
    return None if chance == n * n else (same * n - chance) / (n * n - chance)


def _distance(x: float, y: float, phi: float) -> float:
    """Return the third side of a triangle with sides ``x`` and ``y`` and cosine ``phi``."""
    return sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))
