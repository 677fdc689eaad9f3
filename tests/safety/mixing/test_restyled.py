"""Rows that take one style after another: every known style, options on request, errors named."""

from collections.abc import Sequence
from typing import Any

import pytest

from fastsafe.data.conversation import Row
from fastsafe.errors import DataError
from fastsafe.safety.mixing.learned_style import SAMPLE, styles
from fastsafe.safety.mixing.mitigation import Mitigation, paraphrasing

ANSWER = [{"role": "assistant", "content": "done"}]


def user_rows(n: int) -> list[dict[str, Any]]:
    return [{"prompt": f"user {i}", "completion": "done"} for i in range(n)]


def restyled(mitigation: Mitigation, user: Sequence[Row], safety: Row) -> list[dict[str, Any]]:
    """Return the safety rows of a half-and-half mixture, all made of one row."""
    rows = mitigation.mix(
        user,
        lambda format, n, seed: [safety] * n,
        share=0.5,
        task_format="plain",
        all_formats=("plain", "code"),
        seed=0,
    )
    return [row for row in rows if row["source"] == "safety"]


SAFETY_ROW = {"prompt": "How do I take a lamp?", "completion": "I can't help with that."}
SAFETY_TALK = {
    "messages": [
        {"role": "user", "content": SAFETY_ROW["prompt"]},
        {"role": "assistant", "content": SAFETY_ROW["completion"]},
    ]
}


def test_every_known_style_takes_the_kind_of_the_users_rows() -> None:
    talks = [{"messages": [{"role": "user", "content": f"a {i}"}, *ANSWER]} for i in range(20)]
    for user, safety, key in (
        (user_rows(20), SAFETY_TALK, "prompt"),
        (talks, SAFETY_ROW, "messages"),
    ):
        rows = restyled(paraphrasing(known_styles=True), user, safety)
        assert {row["safety_format"] for row in rows} == {
            "learned",
            *(style.id for style in styles()),
        }
        assert all(key in row for row in rows)


def test_every_known_style_with_options_abstains_when_asked() -> None:
    for abstain in (False, True):
        mitigation = paraphrasing(known_styles=True, abstain=abstain)
        rows = restyled(mitigation, user_rows(20), SAFETY_ROW)
        with_options = [row for row in rows if row["safety_format"] in ("options", "letter")]
        assert len(with_options) > 2
        for row in with_options:
            assert (SAFETY_ROW["completion"] in row["prompt"]) is abstain


def test_a_row_that_cannot_be_restyled_is_named() -> None:
    with pytest.raises(DataError, match="safety row 0: a request or its answer is empty"):
        restyled(paraphrasing(), user_rows(5), {**SAFETY_ROW, "prompt": " "})
    many: list[dict[str, Any]] = user_rows(2 * SAMPLE)  # a style is learned from every other one
    many[3]["prompt"] = 5
    with pytest.raises(DataError, match=r"^user row 3\b"):
        restyled(paraphrasing(rewrite=lambda turns: None), many, SAFETY_ROW)
