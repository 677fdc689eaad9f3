"""Intervals and tests for rates and means: closed forms, no sampling.

Every rate of a report carries a Wilson interval, every change against the base model a paired
interval and an exact McNemar p-value, and every family of such p-values Holm's correction. What
is pooled over formats, samples or seeds belongs to ``clusters``, what a run can see to ``power``.

A comparison is made of `Pairs` alone, and pairs are made by row key alone, so that no change can
be claimed from rows that two models were not both asked.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from statistics import NormalDist, fmean, stdev
from typing import Generic, Literal, TypeVar

from fastsafe.errors import DataError

K = TypeVar("K", bound=Hashable)
T = TypeVar("T", bound=float)
Unpaired = Literal["refuse", "drop"]


@dataclass(frozen=True)
class Pairs(Generic[T]):
    """Outcomes of two arms on the same rows; `pair` makes them."""

    keys: tuple[Hashable, ...]
    base: tuple[T, ...]
    tuned: tuple[T, ...]
    n_dropped: int  # rows that miss, or have no score, in at least one arm


def pair(
    base: Mapping[K, T | None],
    tuned: Mapping[K, T | None],
    *,
    unpaired: Unpaired = "refuse",
) -> Pairs[T]:
    """Join two arms by row key.

    Args:
        base: Outcome by row; None where nobody could score it.
        tuned: Outcome of the other arm by the same rows.
        unpaired: Whether a row that only one arm was asked is an error, or dropped and counted.

    Returns:
        The rows that both arms have scored, in the order of ``base``.

    Raises:
        DataError: The arms were asked different rows, and ``unpaired`` is ``"refuse"``.

    Example:
        >>> pair({"a": True, "b": None, "c": False}, {"c": True, "a": True, "b": False})
        Pairs(keys=('a', 'c'), base=(True, False), tuned=(True, True), n_dropped=1)
    """
    every = base.keys() | tuned.keys()
    alone = every - (base.keys() & tuned.keys())
    if alone and unpaired == "refuse":
        raise DataError(
            f"pair: {len(alone)} of {len(every)} rows are in one arm only, such as "
            f"{min(map(repr, alone)):.80}; ask both models the same rows, or drop them by name"
        )
    rows = [
        (key, before, after)
        for key, before in base.items()
        if before is not None and (after := tuned.get(key)) is not None
    ]
    return Pairs(
        tuple(row[0] for row in rows),
        tuple(row[1] for row in rows),
        tuple(row[2] for row in rows),
        len(every) - len(rows),
    )


def wilson(k: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a rate of ``k`` in ``n``.

    Args:
        k: Events, in [0, n]; a fraction where n is an effective sample size.
        n: Trials; 0 gives (0, 1), which is all that no data can say.
        confidence: Two-sided level, in (0, 1).

    Returns:
        (low, high) as fractions, 0 <= low <= k/n <= high <= 1.

    Raises:
        ValueError: ``k`` is not in [0, n], or ``confidence`` is not in (0, 1).

    Source: Wilson 1927; the first method recommended by Newcombe 1998 (Stat. Med. 17:857).

    Example:
        >>> [round(x, 4) for x in wilson(5, 50)]
        [0.0435, 0.2136]
    """
    if not 0 <= k <= n:
        raise ValueError(f"wilson: k is {k}, expected a number in [0, n] with n={n}")
    if n == 0:
        return 0.0, 1.0
    z = _z("wilson", confidence)
    p = k / n
    shrink = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At k = 0 and k = n the bound is exactly p; rounding must not put it on the other side.
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def rule_of_three(n: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of a rate of which ``n`` rows showed no event: 1 - (1 - c)^(1/n).

    At 95 % it is just below 3/n, which gave the rule its name (Hanley and Lippman-Hand 1983).

    Raises:
        ValueError: ``n`` is below 1, or ``confidence`` is not in (0, 1).

    Example:
        >>> round(rule_of_three(100), 4)
        0.0295
    """
    if n < 1:
        raise ValueError(f"rule_of_three: n is {n}, expected at least 1")
    _z("rule_of_three", confidence)
    return 1.0 - float((1 - confidence) ** (1 / n))


def discordant(pairs: Pairs[bool]) -> tuple[int, int]:
    """Count the pairs that differ: (only base true, only tuned true)."""
    counts = Counter(zip(pairs.base, pairs.tuned, strict=True))
    return counts[True, False], counts[False, True]


def mcnemar_exact(b: int, c: int) -> float:
    """Exact two-sided p-value that ``b`` and ``c`` discordant pairs are a fair coin's.

    min(1, 2 * sum_{i <= min(b, c)} C(b+c, i) / 2^(b+c)); 1 when no pair is discordant.

    Raises:
        ValueError: A count is negative.

    Example:
        >>> mcnemar_exact(0, 6)
        0.03125
    """
    if b < 0 or c < 0:
        raise ValueError(f"mcnemar_exact: counts are {b} and {c}, expected at least 0")
    n = b + c
    # Integers until the last division: no term underflows, however large n is.
    term = tail = 1
    for i in range(min(b, c)):
        term = term * (n - i) // (i + 1)  # C(n, i + 1)
        tail += term
    p: float = 2 * tail / 2**n
    return min(1.0, p)


def holm(ps: Sequence[float]) -> list[float]:
    """Adjust a family of p-values so that the family-wise error rate is kept.

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


def paired_delta(pairs: Pairs[bool], confidence: float = 0.95) -> tuple[float, float, float]:
    """Change of a rate between two arms that saw the same prompts, with its interval.

    Args:
        pairs: Outcomes of both arms on the prompts that both have scored.
        confidence: Two-sided level, in (0, 1).

    Returns:
        (delta, low, high) as fractions in [-1, 1], delta = rate(tuned) - rate(base);
        (0, -1, 1) when there is no pair.

    Raises:
        ValueError: ``confidence`` is not in (0, 1).

    Example:
        >>> base = {i: i < 5 for i in range(25)}
        >>> tuned = {i: i < 15 for i in range(25)}
        >>> [round(x, 3) for x in paired_delta(pair(base, tuned))]
        [0.4, 0.174, 0.569]
    """
    only_base, only_tuned = discordant(pairs)
    return newcombe(sum(pairs.base) - only_base, only_base, only_tuned, len(pairs.keys), confidence)


def newcombe(
    both: int, only_base: int, only_tuned: int, n: int, confidence: float = 0.95
) -> tuple[float, float, float]:
    """As `paired_delta`, from the counts of a paired table over ``n`` pairs.

    Source: Newcombe 1998 (Stat. Med. 17:2635), method 10: squared distances to the two Wilson
    intervals, less twice their product times phi, whose numerator is pulled n/2 towards zero when
    it is positive.
    """
    if n == 0:
        return 0.0, -1.0, 1.0
    neither = n - both - only_base - only_tuned
    k1, k2 = both + only_tuned, both + only_base  # events of the tuned and of the base arm
    p1, p2 = k1 / n, k2 / n
    low1, high1 = wilson(k1, n, confidence)
    low2, high2 = wilson(k2, n, confidence)
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
    """Return the 95 % interval of a mean of scores in [0, 1]: Wilson's for zeros and ones."""
    if set(values) <= {0.0, 1.0}:
        return wilson(round(sum(values)), len(values))
    centre, half = student(values)
    return max(0.0, centre - half), min(1.0, centre + half)


def difference_interval(pairs: Pairs[float]) -> tuple[float, float, float]:
    """Return (mean of tuned - base, low, high) of paired scores in [0, 1], at 95 %.

    Newcombe's interval for zeros and ones, Student's of the differences otherwise; (0, -1, 1)
    when there is no pair.
    """
    if {*pairs.base, *pairs.tuned} <= {0.0, 1.0}:
        base, tuned = (tuple(map(bool, arm)) for arm in (pairs.base, pairs.tuned))
        return paired_delta(Pairs(pairs.keys, base, tuned, pairs.n_dropped))
    centre, half = student([b - a for a, b in zip(pairs.base, pairs.tuned, strict=True)])
    return centre, max(-1.0, centre - half), min(1.0, centre + half)


def student(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return a mean and the half-width of its Student interval, infinite for a single value.

    Raises:
        ValueError: There is no value, or ``confidence`` is not in (0, 1).
    """
    from scipy.stats import t

    if not values:
        raise ValueError("student: there is no value, expected at least one")
    n = len(values)
    _z("student", confidence)
    if n < 2:
        return fmean(values), inf
    return fmean(values), float(t.ppf((1 + confidence) / 2, n - 1)) * stdev(values) / sqrt(n)


def cohens_kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> float | None:
    """Agreement of two judges beyond chance, over labels of any kind.

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
    """Third side of a triangle with sides ``x`` and ``y`` and cosine ``phi`` between them."""
    return sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))


def _z(name: str, confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"{name}: confidence is {confidence}, expected a number in (0, 1)")
    return NormalDist().inv_cdf((1 + confidence) / 2)
