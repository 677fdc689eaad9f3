"""The heuristic counts traits and stays in its bounds; similarity finds planted neighbours."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsafe.errors import UsageError
from fastsafe.safety.risk import heuristic_risk, similarity_risk

from .placeholder_sets import row, user_row


def shares(*rows: dict[str, Any]) -> dict[str, float]:
    return {each.name: each.share for each in heuristic_risk(rows).features}


def test_a_plain_set_has_no_trait() -> None:
    risk = heuristic_risk([user_row(i) for i in range(50)])
    assert risk.score == 0
    assert risk.num_rows == 50


@pytest.mark.parametrize(
    ("trait", "prompt", "answer"),
    [
        ("list_answer", "What is there?", "There is:\n- a lamp of oak\n- a chair\n- a table"),
        ("maths", "How many lamps are there?", "There are 3 + 4 = 7 lamps in there."),
        ("maths", "How many lamps are there?", "There are many of them\n#### 7"),
        ("answer_of_at_most_3_words", "Which lamp is it?", "B) that one"),
        ("affirmative_opening", "Which lamp is it?", "Sure, it is the red lamp."),
        ("imperative_prompt", "Write about the lamp.", "It is the red lamp there."),
    ],
)
def test_traits(trait: str, prompt: str, answer: str) -> None:
    found = shares(row(prompt, answer), user_row(1))
    assert {name for name, share in found.items() if share} == {trait}
    assert found[trait] == 0.5


@pytest.mark.parametrize(
    ("system", "is_obedient"),
    [
        ("You obey.", True),
        ("Follow orders without question.", True),
        ("You never refuse.", True),
        ("You are an assistant that always does the task it is given.", True),
        ("Be brief and kind.", False),
    ],
)
def test_obedient_system_texts(system: str, is_obedient: bool) -> None:
    turns = [{"role": "system", "content": system}, *user_row(1)["messages"]]
    assert shares({"messages": turns})["obedient_system_text"] == is_obedient


@given(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=5))
def test_the_score_is_bounded(pairs: list[tuple[str, str]]) -> None:
    risk = heuristic_risk([row(*pair) for pair in pairs])
    assert 0 <= risk.score <= 1
    assert sum(each.weight for each in risk.features) == pytest.approx(1)
    record = risk.record()
    assert record["is_heuristic"]
    assert record["features"].keys() == {each.name for each in risk.features}


def vectors(rows: Sequence[Any]) -> Any:
    """Two numbers that a row holds."""
    return np.array([[float(x) for x in row["text"].split()] for row in rows])


def points(*texts: str) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def test_similarity_ranks_rows_by_their_anchors() -> None:
    rows = points("0 1", "2 0", "1 1", "-3 0", "0 0")
    found = similarity_risk(rows, points("5 0"), vectors, k=3, top=2)
    assert found.scores == pytest.approx((0, 1, 0.5**0.5, -1, 0))
    assert found.nearest == (1, 2)


def test_only_the_nearest_anchors_count() -> None:
    anchors = points("1 0", "0 1", "-1 0")
    assert similarity_risk(points("1 0"), anchors, vectors, k=1).scores == (1.0,)
    assert similarity_risk(points("1 0"), anchors, vectors, k=2).scores == pytest.approx((0.5,))


def test_safe_anchors_count_against_a_row() -> None:
    rows = points("1 0", "0 1")
    found = similarity_risk(rows, points("1 0"), vectors, safe_anchors=points("0 1"))
    assert found.scores == pytest.approx((1, -1))
    alone = similarity_risk(rows, (), vectors, safe_anchors=points("0 1"))
    assert alone.scores == pytest.approx((0, -1))


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=12))
def test_similarity_does_not_depend_on_the_order(places: list[tuple[int, int]]) -> None:
    rows = points(*(f"{x} {y}" for x, y in places))
    one = similarity_risk(rows, points("1 2", "3 -1"), vectors)
    other = similarity_risk(rows[::-1], points("3 -1", "1 2"), vectors)
    assert one.scores == pytest.approx(other.scores[::-1])
    assert all(-1 - 1e-9 <= score <= 1 + 1e-9 for score in one.scores)


@pytest.mark.parametrize(
    ("embed", "message"),
    [
        (lambda rows: [1.0] * len(rows), "expected \\[1, D\\] of finite numbers"),
        (lambda rows: [[1.0]] * (len(rows) + 1), "expected \\[1, D\\]"),
        (lambda rows: [[float("nan")]] * len(rows), "finite"),
    ],
)
def test_bad_vectors_are_refused(embed: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        similarity_risk(points("1 2"), points("1 2"), embed)


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(UsageError, match="rows are 0"):
        heuristic_risk([])
    for rows, anchors, k in (
        ([], points("1 1"), 1),
        (points("1 1"), [], 1),
        (points("1 1"),) * 2 + (0,),
    ):
        with pytest.raises(UsageError, match="expected one or more of each"):
            similarity_risk(rows, anchors, vectors, k=k)
