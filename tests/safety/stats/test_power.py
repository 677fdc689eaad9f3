"""What a run can see, against enumeration and against its own definition."""

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsafe.safety.stats.intervals import mcnemar_exact
from fastsafe.safety.stats.power import detectable_change, mcnemar_power


def enumerated(n: int, b: float, c: float, alpha: float) -> float:
    """Sum the probability of every table that the test rejects."""
    return sum(
        comb(n, i) * comb(n - i, j) * b**i * c**j * (1 - b - c) ** (n - i - j)
        for i in range(n + 1)
        for j in range(n + 1 - i)
        if mcnemar_exact(i, j) <= alpha
    )


@pytest.mark.parametrize(
    ("n", "b", "c", "alpha"),
    [(30, 0.1, 0.3, 0.05), (12, 0.0, 0.7, 0.05), (20, 0.2, 0.2, 0.01), (9, 0.5, 0.5, 0.5)],
)
def test_power_is_exact(n: int, b: float, c: float, alpha: float) -> None:
    assert mcnemar_power(n, b, c, alpha) == pytest.approx(enumerated(n, b, c, alpha), abs=1e-12)


def test_power_at_no_change_is_at_most_alpha() -> None:
    assert mcnemar_power(200, 0.0, 0.0) == 0.0
    assert mcnemar_power(200, 0.1, 0.1) <= 0.05


def test_power_holds_in_a_simulation() -> None:
    change = detectable_change(60, 0.03)
    assert change is not None
    generator = np.random.default_rng(0)
    tables = generator.multinomial(60, [0.03, 0.03 + change, 1 - 0.06 - change], 4000)
    found = np.mean([mcnemar_exact(int(b), int(c)) < 0.05 for b, c, _ in tables])
    assert 0.77 <= found <= 0.84


@given(st.integers(6, 300), st.sampled_from([0.0, 0.02, 0.1]), st.sampled_from([1, 12]))
def test_the_detectable_change_is_the_smallest(n: int, flips: float, tests: int) -> None:
    found = detectable_change(n, flips, tests=tests)
    if found is None:
        assert mcnemar_power(n, flips, 1 - flips, 0.05 / tests) < 0.8
        return
    assert mcnemar_power(n, flips, flips + found, 0.05 / tests) >= 0.8
    smaller = max(0.0, found - 1 / 2000)
    assert mcnemar_power(n, flips, flips + smaller, 0.05 / tests) < 0.8


def test_too_few_pairs_see_nothing() -> None:
    assert [detectable_change(n) is None for n in (1, 5, 6)] == [True, True, False]


def test_more_rows_see_less_and_more_tests_see_more() -> None:
    seen = [detectable_change(n) or 1.0 for n in (20, 50, 100, 200, 400)]
    assert seen == sorted(seen, reverse=True)
    assert (detectable_change(200, tests=72) or 0) > (detectable_change(200) or 1)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="mcnemar_power: n is 0"):
        mcnemar_power(0, 0.1, 0.1)
    with pytest.raises(ValueError, match=r"shares 0\.6 and 0\.6"):
        mcnemar_power(10, 0.6, 0.6)
    with pytest.raises(ValueError, match=r"flips is 0\.5"):
        detectable_change(50, 0.5)
