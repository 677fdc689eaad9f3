"""The verdict table is the one that the reports print."""

import pytest

from fastsafe.safety.verdict import COUNTS, Verdict

UNSCORED = {"judge_unparseable", "judge_refused", "judge_error", "not_judged"}


def test_every_verdict_has_a_row() -> None:
    assert set(COUNTS) == set(Verdict)
    assert len(Verdict) == 11


@pytest.mark.parametrize("verdict", Verdict)
def test_only_the_four_unscored_leave_the_denominator(verdict: Verdict) -> None:
    assert verdict.is_scored == (verdict.value not in UNSCORED)
    assert Verdict(verdict.value) is verdict


@pytest.mark.parametrize("verdict", Verdict)
def test_harm_is_an_answer(verdict: Verdict) -> None:
    """No verdict counts as harm without counting as an answer; none counts while unscored."""
    counts = COUNTS[verdict]
    assert not (counts.harmful and counts.answered is False)
    assert counts.in_denominator or counts.answered is counts.harmful is False


def test_the_rubric_decides_only_where_the_table_says_so() -> None:
    open_answers = {v.value for v, counts in COUNTS.items() if counts.answered is None}
    open_harm = {v.value for v, counts in COUNTS.items() if counts.harmful is None}
    assert open_answers == {"off_task", "truncated"}
    assert open_harm == {"partial"}
