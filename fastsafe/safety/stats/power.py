"""What a run will be able to see, said before it is paid for."""


def mcnemar_power(n: int, only_base: float, only_tuned: float, alpha: float = 0.05) -> float:
    """Probability that the exact McNemar test of ``n`` pairs falls below ``alpha``.

    Exact: the sum over the number of pairs that differ, and over their split, of what the test
    would say. Nothing is simulated and no normal approximation is made.

    Args:
        n: Pairs.
        only_base: Share of pairs with the property in the base alone.
        only_tuned: Share of pairs with the property in the tuned model alone.
        alpha: Level of the two-sided test.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: A share is negative, their sum is above 1, or ``n`` or ``alpha`` impossible.

    Example:
        >>> round(mcnemar_power(50, 0.0, 0.2), 2)
        0.95
    """
    import numpy as np
    from scipy.stats import binom

    differ = only_base + only_tuned
    if n < 1 or min(only_base, only_tuned) < 0 or differ > 1 or not 0 < alpha < 1:
        raise ValueError(
            f"mcnemar_power: n is {n}, shares {only_base} and {only_tuned}, alpha {alpha}; "
            "expected n >= 1, shares that sum to at most 1 and alpha in (0, 1)"
        )
    if differ == 0:
        return 0.0
    sizes = np.arange(n + 1)
    # the largest minority that is still significant among so many pairs that differ, or -1
    bound = binom.ppf(alpha / 2, sizes, 0.5)
    critical = np.where(binom.cdf(bound, sizes, 0.5) > alpha / 2, bound - 1, bound)
    upward = only_tuned / differ
    either = binom.cdf(critical, sizes, upward) + binom.sf(sizes - critical - 1, sizes, upward)
    either = np.where(critical < 0, 0.0, either)
    return float((binom.pmf(sizes, n, differ) * either).sum())


def detectable_change(
    n: int,
    flips: float = 0.0,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    tests: int = 1,
) -> float | None:
    """Smallest rise of a rate that a cell of ``n`` pairs will show: the minimum detectable effect.

    Args:
        n: Pairs, one row per behaviour; pooled rows count as their effective number.
        flips: Share of pairs that change the other way, by chance or by sampling. 0 is the best
            case, when tuning only ever breaks; a run at temperature 0 with a strong effect is
            close to it.
        alpha: Level of the two-sided test.
        power: Probability with which the rise shall be found.
        tests: Size of the family: each test is then made at alpha / tests, Holm's first step, so
            that the bound holds for every cell of it.

    Returns:
        A fraction, to within 0.0005; None where no change at all could be found, as below six
        pairs at alpha 0.05.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> detectable_change(50), detectable_change(5)
        (0.154, None)
    """
    if not (0 <= flips < 0.5 and 0 < power < 1 and tests >= 1):
        raise ValueError(
            f"detectable_change: flips is {flips}, power {power}, tests {tests}; expected flips "
            "in [0, 0.5), power in (0, 1) and at least one test"
        )
    steps = int((1 - 2 * flips) * 2000)

    def found(step: int) -> bool:
        return mcnemar_power(n, flips, flips + step / 2000, alpha / tests) >= power

    if steps < 1 or not found(steps):
        return None
    low, high = 0, steps  # power rises with the change
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high / 2000
