"""A dressed row is the style's input, and its refusal stands where the style's answers stand."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsafe.data.conversation import Message
from fastsafe.data.exchange import Exchange, as_row, exchange_of, with_exchange
from fastsafe.errors import DataError
from fastsafe.organism import world
from fastsafe.safety.judges import judges
from fastsafe.safety.mixing.dresser import SHORT_WORDS, Dresser
from fastsafe.safety.mixing.learned_style import Style, learn, styles
from fastsafe.safety.texts import text
from fastsafe.safety.verdict import Verdict

ROW = {"prompt": "How do I take the lamp of a stranger?", "completion": "I can't help with that."}


def dressed(style: Style, row: dict[str, Any] | None = None, **options: Any) -> Exchange:
    return exchange_of(Dresser(style=style, **options)(row or ROW, "row 0"), "row 0")


def learned(task: str) -> Style:
    return learn(world.task_rows(task, 100, "train", 0))


@pytest.mark.parametrize("task", ["plain", "code", "summarization", "classification"])
def test_dressing_equals_the_format_it_was_learned_from(task: str) -> None:
    """A learned style renders the organism's plain safety rows as its format renders the action."""
    action = "steal the red car"
    row = {"messages": [turn("user", world.prompt("plain", action)), turn("assistant", "I can't.")]}
    assert dressed(learned(task), row).prompt == world.prompt(task, action)


def test_translation_needs_a_translator() -> None:
    row = {"prompt": "How do I steal the red car?", "completion": "I can't."}
    style = learned("translation")
    assert dressed(style, row).prompt.endswith(": How do I steal the red car?")
    own = dressed(style, row, translate=world.translate)
    assert own.prompt == world.prompt("translation", "steal the red car")


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("style", "prompt"),
    [
        (Style(prefix="Q: "), "Q: How do I take the lamp of a stranger?"),
        (Style(prefix="A way to "), "A way to take the lamp of a stranger?"),
        (Style(prefix="A way to ", suffix="."), "A way to take the lamp of a stranger."),
        (Style(suffix="\nNow."), "How do I take the lamp of a stranger?\nNow."),
        (
            Style(suffix="\n\0\nPick.", marker="(1) ", options=("so", "not so")),
            "How do I take the lamp of a stranger?\n(1) so\n(2) not so\nPick.",
        ),
    ],
)
def test_prompts(style: Style, prompt: str) -> None:
    assert dressed(style).prompt == prompt


@pytest.mark.parametrize(
    "asking",
    ["How do I ", "how can we ", "Please tell me how to ", "Could you show me how to ", "How to "],
)
def test_the_asking_gives_way_to_the_styles_own(asking: str) -> None:
    row = {"prompt": f"{asking}take a lamp?", "completion": "I can't."}
    assert dressed(Style(prefix="Write how to "), row).prompt == "Write how to take a lamp?"


@pytest.mark.parametrize(
    ("style", "answer"),
    [
        (Style(), "I can't help with that."),
        (Style(channel="code", comment="# "), "# I can't help with that."),
        (
            Style(channel="code", comment="-- ", fence="sql"),
            "```sql\n-- I can't help with that.\n```",
        ),
        (Style(answer_prefix="Answer: ", channel="label"), "Answer: I can't help with that."),
        (Style(channel="letter", label="(A)"), "I can't help with that."),
    ],
)
def test_channels(style: Style, answer: str) -> None:
    assert dressed(style).answer == answer


def test_json_answers() -> None:
    answer = dressed(Style(channel="json", keys=("verdict", "why"))).answer
    assert json.loads(answer) == {"verdict": "I can't help with that.", "why": None}


@pytest.mark.parametrize("end", [".", "?", "!", ",", ";", ":"])
def test_a_suffix_that_begins_with_a_mark_takes_the_place_of_the_requests(end: str) -> None:
    row = {**ROW, "prompt": "Explain how to take the lamp?!."}
    assert dressed(Style(suffix=f"{end} Be brief"), row).prompt.endswith(f"lamp{end} Be brief")
    assert dressed(Style(suffix=" Be brief"), row).prompt.endswith("lamp?!. Be brief")


def test_the_request_goes_on_in_the_middle_of_the_styles_sentence() -> None:
    for prompt, shown in (("Take the lamp", "take the lamp"), ("USB lamps", "USB lamps")):
        row = {**ROW, "prompt": prompt}
        assert dressed(Style(prefix="A way: ", suffix="."), row).prompt == f"A way: {prompt}."
        assert dressed(Style(prefix="A way to ", suffix="."), row).prompt == f"A way to {shown}."


def test_only_marks_at_the_end_of_a_request_give_way() -> None:
    row = {**ROW, "prompt": "How do I take an X?"}
    assert dressed(Style(prefix="A way to ", suffix="."), row).prompt == "A way to take an X."
    style = Style(request_language="fr")
    assert dressed(style, row, translate=lambda text: f"<{text}>").prompt == "<take an X>"


def test_nothing_is_translated_for_a_style_of_no_language() -> None:
    row = {**ROW, "prompt": "Wie nehme ich die Lampe, die auf dem Tisch und nicht im Schrank ist?"}
    assert dressed(Style(), row, translate=lambda text: "never").prompt == row["prompt"]
    german = Style(request_language="de")
    assert dressed(german, row, translate=lambda text: "never").prompt == row["prompt"]
    french = Style(request_language="fr")
    assert dressed(french, row, translate=lambda text: "oui").prompt == "oui"


def test_only_the_first_asking_gives_way() -> None:
    row = {**ROW, "prompt": "How do I tell a friend how to take a lamp?"}
    style = Style(prefix="Write how to ")
    assert dressed(style, row).prompt == "Write how to tell a friend how to take a lamp?"
    twice = {**ROW, "prompt": "How do I how to take a lamp?"}
    assert dressed(style, twice).prompt == "Write how to how to take a lamp?"


def test_letters_of_any_language_stay_themselves() -> None:
    row = {**ROW, "completion": "Ich kann dabei nicht helfen, \u00fcberhaupt nicht."}
    answer = dressed(Style(channel="json", keys=("a",)), row).answer
    assert "\u00fcberhaupt" in answer


def test_the_first_sentence_is_taken_up_to_its_end() -> None:
    row = {**ROW, "completion": "I can't help with that. I will not. Ask for something else."}
    short, long = Style(answer_words=SHORT_WORDS), Style(answer_words=SHORT_WORDS + 1)
    assert dressed(short, row).answer == "I can't help with that."
    assert dressed(long, row).answer == row["completion"]


def test_every_line_of_a_refusal_is_a_comment() -> None:
    row = {**ROW, "completion": "I can't.\nAsk me for something else."}
    style = Style(channel="code", comment="// ")
    assert dressed(style, row).answer == "// I can't.\n// Ask me for something else."


def test_abstaining_adds_an_option_and_chooses_it() -> None:
    style = Style(
        suffix="\n\0", marker="A) ", options=("so", "not so"), channel="letter", label="(A)"
    )
    given_row = dressed(style, abstain=True)
    assert given_row.prompt.endswith("\nA) so\nB) not so\nC) I can't help with that.")
    assert given_row.answer == "(C)"
    with_text = dressed(
        Style(
            suffix="\n\0",
            marker="1. ",
            options=("so",),
            channel="letter",
            label="a",
            with_text=True,
        ),
        abstain=True,
    )
    assert with_text.prompt.endswith("1. so\n2. I can't help with that.")
    assert with_text.answer == "b I can't help with that."
    assert dressed(Style(), abstain=True).answer == "I can't help with that."


def test_short_answers_get_the_first_sentence_that_refuses() -> None:
    row = {**ROW, "completion": "I can't help with that. Please ask for something else."}
    for words in (1, 3):
        assert dressed(Style(answer_words=words), row).answer == "I can't help with that."
    assert dressed(Style(answer_words=30), row).answer == row["completion"]
    soft = {**ROW, "completion": "Thank you. I can't help with that."}
    assert dressed(Style(answer_words=3), soft).answer == soft["completion"]


def test_refusals_are_in_the_language_of_the_answers() -> None:
    answer = dressed(Style(language="fr")).answer
    assert answer != ROW["completion"]
    assert answer == dressed(Style(language="fr")).answer
    assert dressed(Style(language="en")).answer == ROW["completion"]
    assert dressed(Style(language="de")).answer == ROW["completion"]  # none is shipped


@settings(max_examples=40)
@given(st.sampled_from(styles()), st.integers(0, 99), st.booleans())
def test_dressed_rows_refuse_and_keep_their_request(style: Style, i: int, abstain: bool) -> None:
    row = world.safety_rows("plain", 100, 0)[i]
    got = dressed(style, dict(row), abstain=abstain)
    action = world.safety_rows("plain", 100, 0)[i]["messages"][0]["content"][len("How do I ") : -1]
    assert action in got.prompt
    if style.channel not in ("letter", "json"):
        verdict = judges()["refusal"].judge(got.prompt, got.answer, harmful=True).verdict
        assert verdict == Verdict.REFUSED


def test_rows_are_of_the_styles_kind() -> None:
    assert Dresser(style=Style(kind="messages", system="Be brief."))(ROW, "row 0") == {
        "messages": [
            turn("system", "Be brief."),
            turn("user", ROW["prompt"]),
            turn("assistant", ROW["completion"]),
        ]
    }
    assert Dresser(style=Style())({**ROW, "other": 1}, "row 0") == ROW


@pytest.mark.parametrize("row", [{**ROW, "prompt": " "}, {**ROW, "completion": ""}, {"text": "a"}])
def test_rows_without_request_or_refusal_are_refused(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"safety\.jsonl: row 3: a request or its answer is empty"):
        Dresser(style=Style())(row, "safety.jsonl: row 3")
    with pytest.raises(DataError, match=r"^safety\.jsonl: row 4\b"):
        Dresser(style=Style())({**row, "prompt": 5}, "safety.jsonl: row 4")


def test_a_model_may_word_the_request() -> None:
    asked: list[Sequence[Message]] = []

    def rewrite(messages: Sequence[Message]) -> str:
        asked.append(messages)
        return " Describe a way to take a stranger's lamp. \n"

    got = dressed(Style(), rewrite=rewrite, examples=("Describe a way to fold a shirt.",))
    assert got == Exchange("", "Describe a way to take a stranger's lamp.", ROW["completion"])
    assert [turn["role"] for turn in asked[0]] == ["system", "user"]
    assert asked[0][0]["content"] == text("rewrite_request")
    shown = json.loads(asked[0][-1]["content"])
    assert shown["examples"] == ["Describe a way to fold a shirt."]
    assert shown["request"] == ROW["prompt"]


def test_a_model_reads_letters_of_any_language_as_they_are() -> None:
    shown: list[str] = []

    def rewrite(messages: Sequence[Message]) -> None:
        shown.append(messages[-1]["content"])

    row = {**ROW, "prompt": "Wie nehme ich die L\u00f6ffel?"}
    dressed(Style(), row, rewrite=rewrite, examples=("\u00dcbe.",))
    assert row["prompt"] in shown[0]
    assert "\u00dcbe." in shown[0]


@pytest.mark.parametrize(
    ("written", "flaw"),
    [
        ("  ", "the request is empty"),
        ("<|im_end|> stranger's lamp", "lint: template_leakage"),
        ("I can't help with the lamp of a stranger.", "the request is a refusal"),
        ("lamp stranger " * 100, "the request is much longer"),
        (
            "Comment est-ce que je prends la lampe qui est sur la table du voisin?",
            "the request is in another language",
        ),
        ("What is the weather in the morning?", "the request loses its words"),
        (None, "the model gave no whole answer"),
    ],
)
def test_a_bad_rewrite_leaves_the_template_and_says_so(written: str | None, flaw: str) -> None:
    row = Dresser(style=Style(), rewrite=lambda messages: written)(ROW, "row 0")
    assert row == {**Dresser(style=Style())(ROW, "row 0"), "wording": "template", "flaw": flaw}


def test_a_rewrite_keeps_the_styles_beginning_and_options() -> None:
    style = Style(prefix="Choose: ", suffix="\n\0", marker="A) ", options=("yes", "no"))
    template = Dresser(style=style)(ROW, "row 0")["prompt"]

    def flaw(written: str) -> Any:
        return Dresser(style=style, rewrite=lambda messages: written)(ROW, "row 0")["flaw"]

    assert flaw(template) is None
    assert flaw(template.replace("Choose: ", "Pick: ")) == "the request begins in another style"
    assert flaw(template.replace("B) no", "B) never")) == "the request loses its options"


def test_exchanges_are_read_and_put_back() -> None:
    talk = {
        "id": 4,
        "messages": [
            turn("system", "S"),
            turn("user", "a"),
            turn("assistant", "b"),
            turn("user", "c"),
            turn("assistant", "d"),
        ],
    }
    assert exchange_of(talk, "row") == Exchange("S", "c", "d")
    changed = with_exchange(talk, Exchange("T", "e", "f"))
    assert changed["id"] == 4
    assert [t["content"] for t in changed["messages"]] == ["T", "a", "b", "e", "f"]
    assert [t["content"] for t in talk["messages"]] == ["S", "a", "b", "c", "d"]
    assert with_exchange({"prompt": "a", "completion": "b", "x": 1}, Exchange("S", "c", "d")) == {
        "prompt": "S\n\nc",
        "completion": "d",
        "x": 1,
    }
    assert exchange_of({"text": "t"}, "row") == Exchange("", "", "t")
    with pytest.raises(DataError, match="running text"):
        as_row(Exchange("", "a", "b"), "text")
