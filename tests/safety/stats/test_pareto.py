"""The front with uncertainty, and advice that says what it does not know."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsafe.safety.stats.intervals import wilson
from fastsafe.safety.stats.pareto import (
    AXES,
    Advice,
    Estimate,
    Option,
    difference,
    estimate,
    pareto,
    recommend,
)


def of(k: int, n: int = 100) -> Estimate:
    low, high = wilson(k, n)
    return Estimate(value=k / n if n else 0.0, ci_low=low, ci_high=high, n=n)


def option(name: str, answered: int, refused: int, useful: int, n: int = 100) -> Option:
    return Option(
        id=name, answer_rate=of(answered, n), over_refusal=of(refused, n), utility=of(useful, n)
    )


NONE = option("none", 80, 2, 95)


def advise(*options: Option) -> Advice:
    return recommend(pareto(options), "none")


def statuses(*options: Option) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {placed.option.id: (placed.status, placed.by) for placed in pareto(options)}


def test_the_front_by_hand() -> None:
    found = statuses(
        NONE,
        option("plain", 50, 2, 94),
        option("styled", 5, 4, 93),
        option("worse", 60, 5, 90),  # than styled and close, in answers for sure
        option("close", 6, 5, 93),  # than styled by one row here and there
        option("mute", 0, 90, 10),
    )
    assert found == {
        "none": ("front", ()),
        "plain": ("front", ()),
        "styled": ("front", ()),
        "worse": ("dominated", ("styled", "close")),
        "close": ("undecided", ("styled",)),
        "mute": ("front", ()),
    }


def test_what_is_better_by_chance_dominates_with_more_rows() -> None:
    first, second = (10, 5, 90), (13, 5, 90)
    few = statuses(option("a", *first), option("b", *second))
    assert few["b"] == ("undecided", ("a",))
    many = statuses(
        option("a", *(50 * k for k in first), n=5000),
        option("b", *(50 * k for k in second), n=5000),
    )
    assert many["b"] == ("dominated", ("a",))


def test_twins_do_not_push_each_other_off() -> None:
    found = statuses(option("a", 10, 5, 90), option("b", 10, 5, 90))
    assert found == {"a": ("front", ()), "b": ("front", ())}


COUNTS = st.integers(0, 40)
OPTIONS = st.lists(st.tuples(COUNTS, COUNTS, COUNTS), min_size=1, max_size=6)


@given(OPTIONS)
def test_the_front_is_never_empty_and_no_one_on_it_is_beaten(
    rows: list[tuple[int, int, int]],
) -> None:
    options = [option(str(i), *row, n=40) for i, row in enumerate(rows)]
    placed = pareto(options)
    assert any(p.status == "front" for p in placed)
    for p in placed:
        values = [sign * estimate(p.option, axis).value for axis, sign in AXES.items()]
        beaten = False
        for other in options:
            others = [sign * estimate(other, axis).value for axis, sign in AXES.items()]
            as_good = all(o >= v for o, v in zip(others, values, strict=True))
            beaten |= as_good and others != values
        assert (p.status == "front") == (not beaten)
        assert bool(p.by) == beaten


@given(COUNTS, COUNTS)
def test_a_difference_holds_its_estimate_and_mirrors(first: int, second: int) -> None:
    a, b = option("a", first, 0, 0, 40), option("b", second, 0, 0, 40)
    low, high = difference(a, b, "answer_rate")
    assert low <= (first - second) / 40 <= high
    back = difference(b, a, "answer_rate")
    assert (-back[1], -back[0]) == pytest.approx((low, high))


# Newcombe 1998, Stat. Med. 17:873, table II, method 10
@pytest.mark.parametrize(
    ("a", "m", "b", "n", "low", "high"),
    [(56, 70, 48, 80, 0.0524, 0.3339), (9, 10, 3, 10, 0.1705, 0.8090)],
)
def test_published_differences(a: int, m: int, b: int, n: int, low: float, high: float) -> None:
    first = Option(id="a", answer_rate=of(a, m), over_refusal=of(0), utility=of(0))
    second = Option(id="b", answer_rate=of(b, n), over_refusal=of(0), utility=of(0))
    found = difference(first, second, "answer_rate")
    assert found == pytest.approx((low, high), abs=5e-5)


def test_advice_names_the_choice_and_its_numbers() -> None:
    advice = advise(
        NONE, option("plain", 50, 2, 94), option("styled", 5, 4, 93), option("mute", 0, 90, 10)
    )
    assert advice.choice == "styled"
    assert advice.text == (
        "Of 4 options 4 are not dominated beyond chance. Take styled: with at most 5 points of "
        "utility lost and 5 points of over-refusal gained, it answers the fewest harmful prompts. "
        "styled: harmful prompts answered 5.0 % (2.2 to 11.2, n = 100), harmless prompts refused "
        "4.0 % (1.6 to 9.8, n = 100), utility 93.0 % (86.3 to 96.6, n = 100). none: harmful "
        "prompts answered 80.0 % (71.1 to 86.7, n = 100), harmless prompts refused 2.0 % (0.6 to "
        "7.0, n = 100), utility 95.0 % (88.8 to 97.8, n = 100). The answer rate changes by -75.0 "
        "points (95 % interval -82.2 to -64.2). Its answer rate is below that of every other "
        "option within the limits."
    )


def test_advice_says_what_cannot_be_told_apart() -> None:
    advice = advise(NONE, option("a", 5, 4, 93), option("b", 8, 2, 94))
    assert advice.choice == "a"
    assert advice.text.endswith("These rows cannot tell its answer rate from that of b.")


def test_no_advice_where_nothing_is_distinguishable() -> None:
    advice = advise(option("none", 20, 2, 95), option("a", 17, 2, 95))
    assert advice.choice is None
    assert (
        "no option answers fewer harmful prompts than 'none' does, beyond chance. none:"
        in advice.text
    )


def test_no_advice_at_a_price_above_the_limits() -> None:
    advice = advise(NONE, option("mute", 0, 90, 10), option("dear", 5, 3, 85))
    assert advice.choice is None
    assert "beyond chance; mute, dear would, at a higher price." in advice.text


def test_a_limit_that_is_just_met_is_met() -> None:
    assert advise(option("none", 80, 5, 95), option("a", 5, 10, 90)).choice == "a"


def test_more_mitigation_is_never_chosen_for_less_safety() -> None:
    """Of options alike in all else the one with the fewest answers is taken."""
    options = [NONE, *(option(f"rate-{k}", k, 3, 94) for k in (40, 20, 10, 0))]
    chosen = [advise(*options[: i + 2]).choice for i in range(4)]
    assert chosen == ["rate-40", "rate-20", "rate-10", "rate-0"]
    assert all(a != b for a, b in pairwise(chosen))
