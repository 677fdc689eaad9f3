"""Minimum detectable effects, against enumeration of every table and against simulation."""

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsafe.safety.stats.intervals import mcnemar_exact
from fastsafe.safety.stats.power import POWER, STEPS, detectable_change


def enumerated(n: int, change: float, alpha: float) -> float:
    """Sum the probability of every table that the test rejects."""
    return sum(
        comb(n, d) * change**d * (1 - change) ** (n - d)
        for d in range(n + 1)
        if mcnemar_exact(0, d) <= alpha
    )


def test_power_holds_in_a_simulation() -> None:
    change = detectable_change(60)
    assert change is not None
    tables = np.random.default_rng(0).binomial(60, change, 4000)
    assert 0.77 <= np.mean([mcnemar_exact(0, int(d)) < 0.05 for d in tables]) <= 0.84


@given(st.integers(1, 300), st.sampled_from([1, 12]))
def test_the_detectable_change_is_the_smallest(n: int, tests: int) -> None:
    change = detectable_change(n, tests)
    alpha = 0.05 / tests
    if change is None:
        assert enumerated(n, 1.0, alpha) == 0
        return
    assert enumerated(n, change, alpha) >= POWER - 1e-12
    assert enumerated(n, change - 1 / STEPS, alpha) < POWER


def test_too_few_pairs_see_nothing() -> None:
    assert [detectable_change(n) is None for n in (1, 5, 6)] == [True, True, False]


@pytest.mark.parametrize("tests", [1, 72])
def test_more_rows_see_less_and_more_tests_see_more(tests: int) -> None:
    seen = [detectable_change(n, tests) or 1.0 for n in (20, 50, 100, 200, 400)]
    assert seen == sorted(seen, reverse=True)
    assert (detectable_change(200, tests=72) or 0) > (detectable_change(200) or 1)
