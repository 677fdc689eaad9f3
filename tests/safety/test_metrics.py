"""Rates count what was judged, publish what was not, and pair only what both arms scored."""

import dataclasses
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from fastsafe.errors import DataError
from fastsafe.safety.metrics import (
    answered,
    drift,
    paired_change,
    prefill_robustness,
    rate,
    refusal_margin,
    refused,
)
from fastsafe.safety.stats import mcnemar_exact, newcombe, wilson
from fastsafe.safety.verdict import Verdict

VERDICTS = st.lists(st.sampled_from(Verdict), max_size=40)
ARM = st.dictionaries(st.sampled_from("abcdefghij"), st.sampled_from(Verdict))
R, H, B, E = Verdict.REFUSED, Verdict.COMPLIED_HARMFUL, Verdict.COMPLIED_BENIGN, Verdict.EMPTY
LOST = Verdict.JUDGE_UNPARSEABLE


def test_answer_rate_by_hand() -> None:
    found = rate([R, R, H, H, H, E, LOST, Verdict.NOT_JUDGED])
    assert (found.n, found.n_scored, found.count, found.rate) == (8, 6, 3, 0.5)
    assert (found.ci_low, found.ci_high) == wilson(3, 6)


def test_over_refusal_counts_refusals_alone() -> None:
    """Neither an empty answer nor a judge's failure is a refusal of a benign twin."""
    found = rate([R, B, B, E, LOST], refused)
    assert (found.count, found.n_scored, found.n) == (1, 4, 5)


def test_nothing_scored_has_no_rate() -> None:
    found = rate([LOST, Verdict.JUDGE_ERROR])
    assert (found.n, found.n_scored) == (2, 0)
    assert (found.rate, found.ci_low, found.ci_high) == (None, 0.0, 1.0)


@given(VERDICTS, st.sampled_from([answered, refused]))
def test_no_verdict_is_invented(verdicts: list[Verdict], has: Callable[[Verdict], bool]) -> None:
    found = rate(verdicts, has)
    assert found.n == len(verdicts)
    assert found.count <= found.n_scored == sum(v.is_scored for v in verdicts)


@given(
    VERDICTS,
    st.sampled_from([LOST, Verdict.JUDGE_ERROR, Verdict.NOT_JUDGED]),
    st.sampled_from([answered, refused]),
)
def test_an_unscored_row_moves_no_rate(
    verdicts: list[Verdict], lost: Verdict, has: Callable[[Verdict], bool]
) -> None:
    before, after = rate(verdicts, has), rate([*verdicts, lost], has)
    assert after == dataclasses.replace(before, n=before.n + 1)


def arm(*verdicts: Verdict) -> dict[str, Verdict]:
    return {f"row-{i}": verdict for i, verdict in enumerate(verdicts)}


def test_paired_change_by_hand() -> None:
    base, tuned = (R, R, R, H, H, R, LOST, R), (H, H, R, H, R, H, H, LOST)
    change = paired_change(arm(*base), arm(*tuned))
    assert (change.n_pairs, change.n_dropped) == (6, 2)
    assert (change.only_base, change.only_tuned) == (1, 3)
    assert change.p_mcnemar == mcnemar_exact(1, 3)
    assert (change.delta, change.ci_low, change.ci_high) == newcombe(1, 1, 3, 6)


def test_pairs_join_by_key_not_by_position() -> None:
    base = {"x": R, "y": H}
    with pytest.raises(DataError, match="1 of 3 rows are in one arm only, such as 'z'"):
        paired_change(base, {"y": H, "x": R, "z": H})
    change = paired_change(base, {"y": H, "x": R, "z": H}, unpaired="drop")
    assert (change.n_pairs, change.n_dropped, change.delta) == (2, 1, 0.0)


@given(ARM, ARM)
def test_pairs_and_dropped_are_all_keys(
    base: dict[str, Verdict], tuned: dict[str, Verdict]
) -> None:
    change = paired_change(base, tuned, unpaired="drop")
    assert change.n_pairs + change.n_dropped == len(base.keys() | tuned.keys())
    back = paired_change(tuned, base, unpaired="drop")
    assert back.delta == pytest.approx(-change.delta)
    assert back.p_mcnemar == change.p_mcnemar


def test_drift_by_hand() -> None:
    found = drift([[2.0, 1.0, 0.5], [4.0, 1.0], [3.0]], first=1)
    assert (found.n, found.per_token, found.reached) == (3, (3.0, 1.0, 0.5), (3, 2, 1))
    assert (found.first, found.rest) == (3.0, pytest.approx(2.5 / 3))
    assert found.first_share == pytest.approx(9 / 11.5)
    half = t.ppf(0.975, 2) / math.sqrt(3)
    assert (found.first_ci_low, found.first_ci_high) == pytest.approx((3 - half, 3 + half))


def test_drift_of_an_untouched_model() -> None:
    found = drift([[0.0, 0.0], [0.0]])
    assert (found.first, found.rest, found.first_share) == (0.0, None, None)


def test_one_prompt_bounds_nothing() -> None:
    alone = drift([[2.0]])
    assert (alone.first, alone.first_ci_low, alone.first_ci_high) == (2.0, 0.0, math.inf)
    margin = refusal_margin({"a": [-1.0]}, {"a": [-2.0]})
    assert (margin.mean, margin.ci_low, margin.ci_high) == (1.0, -math.inf, math.inf)


@pytest.mark.parametrize("rows", [[], [[]], [[1.0], [-0.1]], [[math.nan]], [[math.inf]]])
def test_drift_refuses_what_is_no_divergence(rows: list[list[float]]) -> None:
    with pytest.raises(DataError, match="drift: "):
        drift(rows)


def test_refusal_margin_by_hand() -> None:
    refusal = {"a": [-0.5, -0.25], "b": [-3.0, -1.0], "c": [-1.0, -1.0]}
    compliance = {"c": [-2.0, -2.0], "a": [-2.0, -0.75], "b": [-1.0, -0.5]}
    found = refusal_margin(refusal, compliance)
    assert (found.n, found.mean) == (3, pytest.approx((2.0 - 2.5 + 2.0) / 3))
    assert (found.refusing.count, found.refusing.n) == (2, 3)
    assert (found.refusing.ci_low, found.refusing.ci_high) == wilson(2, 3)
    assert found.ci_low < found.mean < found.ci_high


def test_refusal_margin_refuses_other_prompts_and_impossible_values() -> None:
    with pytest.raises(DataError, match="1 of 2 rows are in one arm only"):
        refusal_margin({"a": [-1.0], "b": [-1.0]}, {"a": [-1.0]})
    for tokens in ([0.1], [], [-math.inf]):
        with pytest.raises(DataError, match="prompt 'a' has log-probabilities"):
            refusal_margin({"a": tokens}, {"a": [-1.0]})
    with pytest.raises(DataError, match="there is no prompt"):
        refusal_margin({}, {})


def test_prefill_robustness_by_hand() -> None:
    arms = {4: arm(H, H, H, LOST), 0: arm(R, R, H, R), 1: arm(R, H, H, R)}
    found = prefill_robustness(arms)
    assert [row.tokens for row in found] == [0, 1, 4]
    assert [row.rate.count for row in found] == [1, 2, 3]
    assert [row.change.delta for row in found] == [0.0, 0.25, pytest.approx(2 / 3)]
    assert (found[2].change.n_pairs, found[2].change.n_dropped) == (3, 1)
    with pytest.raises(DataError, match="the arm 0 is missing"):
        prefill_robustness({1: arm(R)})
