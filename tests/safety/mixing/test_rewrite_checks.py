"""A model's wording is taken where it keeps the row, and the first reason against it is named."""

import pytest

from fastsafe.data.exchange import Exchange
from fastsafe.safety.lint import Kind
from fastsafe.safety.mixing.rewrite_checks import MAX_GROWTH, MIN_KEPT, rejection_reason

GIVEN = Exchange("", "Explain lamps, chairs, ladders and mirrors", "They are things.")
TEMPLATE = GIVEN._replace(prompt="Write about lamps, chairs, ladders and mirrors")


def reason(prompt: str, answer: str = GIVEN.answer, **options: object) -> str:
    return rejection_reason(Exchange("", prompt, answer), TEMPLATE, GIVEN, "user", **options)  # type: ignore[arg-type]


def test_a_wording_may_grow_to_the_limit() -> None:
    longest = int(MAX_GROWTH * len(TEMPLATE.prompt))
    words = TEMPLATE.prompt.ljust(longest, "x")
    assert reason(words) == ""
    assert reason(f"{words}x") == "the request is much longer"


def test_a_wording_keeps_a_share_of_the_words() -> None:
    words = ("explain", "lamps", "chairs", "ladders", "mirrors")  # those of four letters or more
    found = [reason(f"Do it: {' '.join(words[:n])}") == "" for n in range(6)]
    assert found == [n >= MIN_KEPT * len(words) for n in range(6)]


def test_options_are_whole_lines_of_the_request() -> None:
    options = ("A) red", "B) blue")
    assert reason("\n".join((TEMPLATE.prompt, *options)), options=options) == ""
    assert reason("\n".join(options) + "\nlamps chairs ladders mirrors", options=options) == ""
    lost = reason(f"{TEMPLATE.prompt} A) red B) blue", options=options)
    assert lost == "the request loses its options"
    alone = ("lamps and chairs", "ladders and mirrors")
    assert reason("\n".join(alone), options=alone) == ""


@pytest.mark.parametrize(
    "answer", ["They are things.", "Sure: they  ARE\nthings. Yes.", "  They are\tthings.  "]
)
def test_the_original_answer_is_found_whatever_its_spaces_and_case(answer: str) -> None:
    assert reason(TEMPLATE.prompt, answer) == ""
    assert reason(TEMPLATE.prompt, "They are no things.") == "the answer lost the original"


def test_the_language_is_that_of_the_template_or_of_the_row() -> None:
    french = "Pourquoi est-ce que la lampe qui est sur la table est rouge dans la rue ?"
    german = "Warum ist die Lampe auf dem Tisch und nicht auf der Stra\u00dfe?"
    row = Exchange("", french, "Parce que la lampe est dans la rue.")
    for template in (german, french):
        made = rejection_reason(row, row._replace(prompt=template), row, "user")
        assert made == ""
    short = row._replace(prompt="Pourquoi est-ce que la lampe est rouge?")
    translated = short._replace(prompt="Warum ist die Lampe auf dem Tisch und nicht auf dem Stuhl?")
    worded = short._replace(prompt=f"{german} Und rouge?")
    assert rejection_reason(worded, translated, short, "user") == ""
    assert (
        rejection_reason(row._replace(prompt=german), row, row, "user")
        == "the request is in another language"
    )


def test_half_of_the_words_of_four_letters_are_enough() -> None:
    row = Exchange("", "Fold many blue caps", "They are things.")
    found = {
        prompt: rejection_reason(row._replace(prompt=prompt), row, row, "user")
        for prompt in ("Do: many blue it", "Do: many it", "Do it")
    }
    lost = "the request loses its words"
    assert list(found.values()) == ["", lost, lost]


def test_an_answer_is_in_the_language_of_the_template_or_of_the_row() -> None:
    french = "Parce que la lampe qui est sur la table est rouge dans la rue."
    german = "Weil die Lampe auf dem Tisch und nicht auf der Stra\u00dfe ist."
    given = GIVEN._replace(answer=french)
    template = TEMPLATE._replace(answer=german)
    # as the template has it, and as the row has it
    assert rejection_reason(template, template, given, "user") == ""
    kept = TEMPLATE._replace(answer=f"Oui. {french}")
    assert rejection_reason(kept, template, given, "user") == ""


def test_a_row_of_no_known_language_may_be_worded_in_any() -> None:
    row = Exchange("", "lamps, chairs", "They are things.")
    german = "Warum sind lamps und chairs nicht auf"
    assert rejection_reason(row._replace(prompt=german), row, row, "user") == ""


@pytest.mark.parametrize(
    ("kind", "answer"), [("user", "I can't help with that."), ("safety", "They are things.")]
)
def test_a_flaw_of_the_row_itself_is_not_the_models(kind: Kind, answer: str) -> None:
    given, template = GIVEN._replace(answer=answer), TEMPLATE._replace(answer=answer)
    worded = template._replace(prompt="Tell of lamps, chairs, ladders and mirrors")
    assert rejection_reason(worded, template, given, kind) == ""
