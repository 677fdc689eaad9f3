"""pass@k: the chance that one of k completions passes, from n of them."""

from collections.abc import Sequence
from math import comb

from fastsafe.errors import UsageError
from fastsafe.safety.tasks import Measured, resampled

from ._run import Outcome, Trial


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the share of the k-subsets of n completions that hold one of the c that pass.

    1 - C(n-c, k) / C(n, k), in exact integers: unbiased for any k <= n.

    Raises:
        UsageError: Not 0 <= c <= n and 1 <= k <= n.

    Source: Chen et al. 2021, arXiv:2107.03374.

    Example:
        >>> pass_at_k(5, 2, 1)
        0.4
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise UsageError(
            f"pass_at_k: n={n}, c={c}, k={k}, expected 0 <= c <= n and 1 <= k <= n; draw more "
            "completions or lower k"
        )
    return 1 - comb(n - c, k) / comb(n, k)


def pass_rate(problems: Sequence[Sequence[Trial]], k: int = 1) -> Measured:
    """Return the mean of `pass_at_k` over problems, with an interval over problems.

    Args:
        problems: The trials of each problem's completions, at least ``k`` of each.
        k: How many completions one may try.

    Raises:
        UsageError: A problem has fewer than ``k`` trials.
    """
    import numpy as np

    passed = [[trial.outcome is Outcome.PASSED for trial in trials] for trials in problems]
    values = [pass_at_k(len(each), sum(each), k) for each in passed]
    return resampled(np.array([[v, 1.0] for v in values]), lambda sums: float(sums[0] / sums[1]))
