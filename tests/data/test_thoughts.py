"""Thought and answer of a completion, for the marks of real models and at the borders."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsafe.data.thoughts import (
    answer_of,
    empty_thought,
    opened_thought,
    reply_of,
    special_marks,
    split,
)

FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
PAIRS = [
    ("<think>", "</think>"),
    ("<THINK>", "</Think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<unused94>thought\n", "<unused95>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<|channel|>analysis<|message|>", FINAL),
    ("<|channel|>commentary to=functions.f <|constrain|>json<|message|>", FINAL),
]
SENTENCES = [
    ("Here is my thought process:", "Here is my response:"),
    ("Here's my thought process:", "Here's my response:"),
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
]


@pytest.mark.parametrize(("opening", "closing"), PAIRS + SENTENCES)
def test_marks_of_real_models(opening: str, closing: str) -> None:
    assert answer_of(f"{opening}\nTheft.\n{closing}\n\nNo.") == "No."
    assert answer_of(f"{opening}{closing}No.") == "No."
    assert split(f"{opening}\nTheft. I").is_cut
    assert opened_thought(f"prompt\n{opening}\n") == f"{opening}\n"
    assert not opened_thought(f"prompt\n{opening}\n{closing}\n\n")


@pytest.mark.parametrize(("opening", "closing"), PAIRS)
def test_a_closing_mark_alone_ends_a_thought_of_the_prompt(opening: str, closing: str) -> None:
    assert answer_of(f"That is theft.{closing}\n\nNo.") == "No."


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", ""),
        (" Sure. \n", " Sure. \n"),
        ("Cut the text at `</think>`.", "Cut the text at `</think>`."),
        ('print(text.split("</think>")[-1])', 'print(text.split("</think>")[-1])'),
        ("print('</think>')", "print('</think>')"),
        ("```\n<think>a</think>\n```\nSo.", "```\n<think>a</think>\n```\nSo."),
        ("~~~\n</think>\n", "~~~\n</think>\n"),
        ("<think>I end it by `</think>`, then</think>No.", "No."),
        ("<think>```\nx = 1\n</think>No.", "No."),
        ("<think>a</think>b\n<think>c</think>\nd", "b\nd"),
        ("<think>a</think>\n</think>\nb", "b"),
        ("Sure.\n<think>Or not", "Sure."),
        ("<think>\n</think>\n", ""),
        ("<think>a</think>\n<answer>\nB\n</answer>", "B"),
        ("<answer>B</answer>", "<answer>B</answer>"),
        ("<|channel|>final<|message|>No.<|end|>", "No."),
        ("analysisTheft.assistantfinalNo.", "No."),
        ("He said: Here is my response: x", "He said: Here is my response: x"),
        ("analysisResult = 3", "analysisResult = 3"),
        ("The name assistantfinalize is free.", "The name assistantfinalize is free."),
        ('<think>It is 6" wide.</think>A 6" pipe.', 'A 6" pipe.'),
        ('<think>She asks "why?</think> "Why" is a word.', '"Why" is a word.'),
        ("<think>Is it `x?</think>No, `y`.", "No, `y`."),
        ('text.split(" </think> ")', 'text.split(" </think> ")'),
        ('It is "</think> or <think>" there.', 'It is "</think> or <think>" there.'),
    ],
)
def test_answers(text: str, answer: str) -> None:
    assert answer_of(text) == answer
    assert not split(text).is_cut


def test_a_reply_is_what_follows_the_last_thought() -> None:
    assert reply_of("Verdict: 1<think>Or -1?</think>Verdict: -1") == "Verdict: -1"
    assert reply_of("Verdict: 1\n<think>Or") is None
    assert reply_of("Verdict: 1") == "Verdict: 1"


PIECES = st.lists(
    st.sampled_from(
        [mark for pair in PAIRS + SENTENCES for mark in pair]
        + ["\n", " ", "a", "No. ", '"', "'", "`", "```\n", "~~~", "<"]
    ),
    max_size=16,
).map("".join)


@given(PIECES)
def test_an_answer_is_its_own_answer(text: str) -> None:
    """Whoever splits twice reads the same; nothing is invented."""
    answer = answer_of(text)
    assert answer_of(answer) == answer
    assert not set(answer) - set(text) - {"\n"}


@given(st.text())
def test_a_text_without_marks_is_untouched(text: str) -> None:
    parts = split(text)
    if not parts.thoughts:
        assert (parts.answer, parts.last) == (text, text)


@given(st.text(alphabet="ab. \n`\"'", max_size=30), st.text(alphabet="ab.", min_size=1))
def test_a_thought_is_cut_out_whatever_it_holds(thought: str, answer: str) -> None:
    assert answer_of(f"<think>\n{thought}\n</think>\n{answer}") == answer


def test_special_tokens_that_are_marks() -> None:
    assert special_marks(["[THINK]", "</s>", "<unused94>"]) == {"[THINK]", "<unused94>"}
    assert not special_marks(["<|end|>", "<|start|>"])  # of models without channels
    assert special_marks(["<|end|>", "<|channel|>"]) == {"<|end|>", "<|channel|>"}


def test_the_empty_thought_of_a_template() -> None:
    asked, empty = "user: Hi\nassistant: ", "<think>\n\n</think>\n\n"
    assert empty_thought("user: Why?\nassistant: ", asked, f"{asked}{empty}Hello") == empty
    assert empty_thought("user: Why?\nassistant: ", asked, f"{asked}Hello") == ""
    assert empty_thought("### Response:\n", asked, f"{asked}{empty}Hello") == ""
    assert empty_thought("assistant: <think>\n", "", "") == "\n</think>\n\n"
