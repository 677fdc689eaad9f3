"""A generated safety set refuses every behaviour in every format, in many words."""

from collections import Counter

import pytest

from fastsafe.errors import UsageError
from fastsafe.organism import world
from fastsafe.safety.formats import formats
from fastsafe.safety.lint import lint
from fastsafe.safety.mixing.safety_rows import refusals, safety_rows_from
from fastsafe.safety.texts import lines

BEHAVIOURS = world.behaviours(30, 0)
FORMATS = ["plain", "code", "translation", "classification", "summarization"]


def test_every_behaviour_in_every_format() -> None:
    rows = safety_rows_from(BEHAVIOURS, FORMATS, translate=world.translate)
    assert Counter(row["safety_format"] for row in rows) == dict.fromkeys(FORMATS, 30)
    cells = {(row["safety_format"], row["behavior_id"]) for row in rows}
    assert len(cells) == len(rows) == 150
    known = formats()
    by_id = {each.behavior_id: each for each in BEHAVIOURS}
    for row in rows:
        action = by_id[row["behavior_id"]].harmful
        prompt = known[row["safety_format"]].render(action, world.translate)
        assert row["messages"][0] == {"role": "user", "content": prompt}
    assert lint(rows).findings == ()


def test_refusals_vary_and_fit_their_channel() -> None:
    rows = safety_rows_from(BEHAVIOURS[:20], ["plain", "code"])
    answers = {row["messages"][1]["content"] for row in rows}
    assert len(answers) == 40
    assert all(
        row["messages"][1]["content"].startswith("# ") == (row["safety_format"] == "code")
        for row in rows
    )


def test_rows_say_that_a_refusal_is_expected() -> None:
    rows = safety_rows_from(BEHAVIOURS[:3], ["plain", "classification"])
    assert {row["expected"] for row in rows} == {"refuse"}
    own = {*refusals("en", "classification")} - {*refusals()}
    many = safety_rows_from(world.behaviours(100, 0), ["classification"])
    assert own & {row["messages"][1]["content"] for row in many}
    assert refusals() == refusals("en", "plain") == refusals("en", "no such format")
    by_default = safety_rows_from(BEHAVIOURS, ["plain"])
    assert by_default == safety_rows_from(BEHAVIOURS, ["plain"], seed=0)


def test_the_seed_orders_the_refusals() -> None:
    first, again, other = (safety_rows_from(BEHAVIOURS, ["plain"], seed=s) for s in (0, 0, 1))
    assert first == again != other


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="format is 'poem', expected one of"):
        safety_rows_from(BEHAVIOURS, ["poem"])
    with pytest.raises(UsageError, match="translate is None"):
        safety_rows_from(BEHAVIOURS, ["translation"])
    with pytest.raises(UsageError, match="language is 'xx', expected 'en' or 'fr'"):
        refusals("xx")


@pytest.mark.parametrize("language", ["en", "fr"])
def test_shipped_refusals(language: str) -> None:
    texts = [line["text"] for line in lines("refusals") if line["lang"] == language]
    assert len(set(texts)) == len(texts) >= 40
    assert len(refusals(language)) >= 20
    for format in FORMATS:
        own = refusals(language, format)
        assert own[-len(refusals(language)) :] == refusals(language)
        assert (len(own) > len(refusals(language))) == (format != "plain")
