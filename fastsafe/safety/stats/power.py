"""Minimum detectable effects: the changes that a run can show, known before it is paid for."""

from math import ceil, log2

ALPHA = 0.05  # family-wise level of the two-sided tests
POWER = 0.8
STEPS = 2000  # of the grid of changes


def detectable_change(n: int, tests: int = 1) -> float | None:
    """Return the minimum detectable effect of a cell: the smallest rise of a rate that it can show.

    Exact for the McNemar test, without simulation or normal approximation, in the best case: no
    pair changes the other way, as in a run at temperature 0 in which tuning only removes refusals.
    All discordant pairs then agree: ``d`` of them have p = 2 / 2^d, and their number is binomial.

    Args:
        n: Pairs, one per behaviour; pooled rows count as their effective number.
        tests: Size of the family: each test is made at alpha / tests, Holm's first step, so that
            the bound holds for every cell of the family.

    Returns:
        A fraction on a grid of 1 / 2000; None where no change at all could be found, as below six
        pairs for a single test.

    Example:
        >>> detectable_change(50), detectable_change(5)
        (0.154, None)
    """
    import numpy as np
    from scipy.stats import binom

    needed = ceil(1 - log2(ALPHA / tests))  # discordant pairs
    if n < needed:
        return None
    power = binom.sf(needed - 1, n, np.arange(1, STEPS + 1) / STEPS)  # rises with the change
    return (int(np.argmax(power >= POWER)) + 1) / STEPS
