"""Intervals and tests for rates: closed forms, no sampling, standard library only.

Every rate of a report carries a Wilson interval, every change against the base model a paired
interval and an exact McNemar p-value, and every family of such p-values Holm's correction.
"""

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist


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


def discordant(base: Sequence[bool], tuned: Sequence[bool]) -> tuple[int, int]:
    """Count the pairs that differ: (only base true, only tuned true).

    Raises:
        ValueError: The two arms differ in length.
    """
    if len(base) != len(tuned):
        raise ValueError(f"discordant: tuned has {len(tuned)} rows, expected {len(base)} like base")
    pairs = list(zip(base, tuned, strict=True))
    return sum(b and not t for b, t in pairs), sum(t and not b for b, t in pairs)


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


def paired_delta(
    base: Sequence[bool], tuned: Sequence[bool], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Change of a rate between two arms that saw the same prompts, with its interval.

    Args:
        base: Outcome per prompt of the first arm; only prompts that both arms have scored.
        tuned: Outcome per prompt of the second arm, in the same order.
        confidence: Two-sided level, in (0, 1).

    Returns:
        (delta, low, high) as fractions in [-1, 1], delta = rate(tuned) - rate(base);
        (0, -1, 1) when there is no pair.

    Raises:
        ValueError: The two arms differ in length, or ``confidence`` is not in (0, 1).

    Source: Newcombe 1998 (Stat. Med. 17:2635), method 10: squared distances to the two Wilson
    intervals, less twice their product times phi, whose numerator is pulled n/2 towards zero when
    it is positive.

    Example:
        >>> base, tuned = [False] * 20 + [True] * 5, [False] * 10 + [True] * 15
        >>> [round(x, 3) for x in paired_delta(base, tuned)]
        [0.4, 0.174, 0.569]
    """
    only_base, only_tuned = discordant(base, tuned)
    n = len(base)
    if n == 0:
        return 0.0, -1.0, 1.0
    both = sum(base) - only_base
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


def _distance(x: float, y: float, phi: float) -> float:
    """Third side of a triangle with sides ``x`` and ``y`` and cosine ``phi`` between them."""
    return sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))


def _z(name: str, confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"{name}: confidence is {confidence}, expected a number in (0, 1)")
    return NormalDist().inv_cdf((1 + confidence) / 2)
