"""Prompt styles: training rows and prompts that have no chat template."""

import pytest

from fastsafe.errors import UsageError
from fastsafe.safety.mixing.learned_style import styles
from fastsafe.safety.mixing.prompt_styles import STYLES, prompt_text, styled

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Red."},
]


def test_the_native_style_leaves_the_conversation_to_the_template() -> None:
    assert styled(TURNS, "native") == {"messages": TURNS}


@pytest.mark.parametrize("style", [style for style in STYLES if style != "native"])
def test_a_raw_style_asks_what_the_conversation_asks(style: str) -> None:
    row = styled(TURNS, style)
    assert row["completion"] == "Red."
    assert "Be brief.\n\nName a colour." in row["prompt"]
    assert row["prompt"] == prompt_text(TURNS[:-1], style)


def test_the_words_around_a_request() -> None:
    (known,) = (style for style in styles() if style.id == "alpaca")
    alpaca = prompt_text(TURNS[1:2], "alpaca")
    assert alpaca == f"{known.prefix}Name a colour.{known.suffix}"
    assert "### Instruction" in alpaca
    assert alpaca.rstrip().endswith("### Response:")
    assert prompt_text(TURNS[1:2], "plain") == "Name a colour.\n"


def test_the_native_style_is_no_text() -> None:
    with pytest.raises(UsageError, match="style 'native' has no text of its own; ") as caught:
        prompt_text(TURNS[1:2], "native")
    assert "native" not in str(caught.value).partition(";")[2]


def test_more_than_one_question_is_refused() -> None:
    with pytest.raises(UsageError, match="the turns are user, assistant, user"):
        prompt_text([TURNS[1], TURNS[2], TURNS[1]], "alpaca")


@pytest.mark.parametrize(("style", "near"), [("alpacca", "alpaca"), ("native", "plain, ?alpaca|")])
def test_an_unknown_style_names_the_nearest(style: str, near: str) -> None:
    with pytest.raises(UsageError, match=near):
        prompt_text(TURNS[1:2], style)
