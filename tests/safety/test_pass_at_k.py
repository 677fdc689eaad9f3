"""pass@k: the estimator equals counting, and its mean has an interval over problems."""

from itertools import combinations

import pytest

from fastsafe.errors import UsageError
from fastsafe.safety.sandbox import Outcome, Trial, pass_at_k, pass_rate


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_equals_counting_subsets(n: int) -> None:
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations(range(n), k))
            share = sum(min(each) < c for each in subsets) / len(subsets)
            assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_pass_at_k_refuses_what_cannot_be(n: int, c: int, k: int) -> None:
    with pytest.raises(UsageError, match=f"n={n}, c={c}, k={k}, expected"):
        pass_at_k(n, c, k)


def test_pass_rate() -> None:
    right, wrong, late = map(Trial, Outcome)
    found = pass_rate([[right, wrong], [wrong, late], [right, right]], k=1)
    assert found.value == pytest.approx((0.5 + 0 + 1) / 3)
    assert found.n == 3
    assert found.ci_low <= 0.5 <= found.ci_high
    assert pass_rate([[right, wrong], [wrong, late]], k=2).value == 0.5
    assert pass_rate([]).value is None
    with pytest.raises(UsageError, match="n=1, c=1, k=2"):
        pass_rate([[right]], k=2)
