"""What a run can see, against enumeration and against its own definition."""

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsafe.safety.power import detectable_change, mcnemar_power, needed_for_half_width
from fastsafe.safety.stats import mcnemar_exact, wilson


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


@given(st.floats(0.01, 0.4), st.sampled_from([0.05, 0.3, 0.5]))
def test_the_n_of_a_half_width_is_the_smallest(half_width: float, rate: float) -> None:
    n = needed_for_half_width(half_width, rate)
    low, high = wilson(rate * n, n)
    assert (high - low) / 2 <= half_width
    if n > 1:
        low, high = wilson(rate * (n - 1), n - 1)
        assert (high - low) / 2 > half_width


def test_published_half_widths() -> None:
    """About 13.4, 9.6 and 6.9 points at 50, 100 and 200 rows."""
    needed = [needed_for_half_width(width) for width in (0.1336, 0.0962, 0.0687)]
    assert needed == pytest.approx([50, 100, 200], abs=1)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="mcnemar_power: n is 0"):
        mcnemar_power(0, 0.1, 0.1)
    with pytest.raises(ValueError, match=r"shares 0\.6 and 0\.6"):
        mcnemar_power(10, 0.6, 0.6)
    with pytest.raises(ValueError, match=r"flips is 0\.5"):
        detectable_change(50, 0.5)
    with pytest.raises(ValueError, match=r"half_width is 0\.7"):
        needed_for_half_width(0.7)
    with pytest.raises(ValueError, match="more than 1000000 rows"):
        needed_for_half_width(0.0001)
