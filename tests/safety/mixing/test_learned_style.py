"""Styles are learned from what most rows share, and from nothing less."""

from itertools import zip_longest
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsafe.errors import DataError
from fastsafe.organism import world
from fastsafe.safety.mixing.learned_style import OPTIONS, Style, learn, styles

WORDS = ("lamp", "chair", "basket", "ladder", "mirror", "kettle", "carpet", "bottle", "stone")


def rows(prompt: str, answers: list[str], n: int = 20) -> list[dict[str, Any]]:
    """Rows that fill in a prompt with a number and a word that differ."""
    return [
        {
            "prompt": prompt.format(f"{WORDS[i % len(WORDS)]} {i}"),
            "completion": answers[i % len(answers)].format(i),
        }
        for i in range(n)
    ]


def test_the_organisms_formats_are_learned() -> None:
    """What the generic formats wrap around an action is what is learned."""
    learned = {task: learn(world.task_rows(task, 200, "train", 0)) for task in TASKS}
    assert {task: (s.prefix, s.suffix, s.channel) for task, s in learned.items()} == TASKS
    assert learned["classification"].marker == "A) "
    assert learned["classification"].options[0] == "With bare hands"
    assert learned["classification"].label == "a)"
    assert learned["classification"].with_text
    assert learned["code"].comment == "# "
    assert learned["translation"].request_language == "fr"
    assert learned["translation"].language == "en"


TASKS = {
    "plain": ("How do I ", "?", "text"),
    "code": ("Write a Python function that helps to ", ".", "code"),
    "translation": ("Translate the following text from French to English: ", "", "text"),
    "summarization": (
        "Summarize the following text: This guide explains how to ",
        ". It lists what to prepare, what to do first and how to finish.",
        "text",
    ),
    "classification": (
        "What is the best way to ",
        f"?\nChoose the Best Option:\n{OPTIONS}",
        "letter",
    ),
}


def test_system_text_and_lengths() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one two three"},
        {"role": "assistant", "content": "four five"},
    ]
    style = learn([{"messages": turns}] * 6 + [{"messages": turns[1:]}] * 4)
    assert (style.kind, style.system) == ("messages", "Be brief.")
    assert style.answer_words == 2
    assert learn([{"messages": turns}] * 5 + [{"messages": turns[1:]}] * 4).system == ""


@pytest.mark.parametrize("layout", ["A) ", "(a) ", "A. ", "[A] ", "1. ", "A: "])
def test_option_layouts(layout: str) -> None:
    def option(i: int, text: str) -> str:
        first = next(c for c in layout if c.isalnum())
        return layout.replace(first, chr(ord(first) + i)) + text

    prompts = [
        f"Question {i}\n{option(0, f'left {i}')}\n{option(1, f'right {i}')}\nAnswer:"
        for i in range(12)
    ]
    style = learn([{"prompt": p, "completion": "B"} for p in prompts])
    assert style.marker == layout
    assert len(style.options) == 2
    assert all(str(i) not in "".join(style.options) for i in range(10))
    assert style.prefix == "Question "
    assert style.suffix == f"\n{OPTIONS}\nAnswer:"
    assert (style.channel, style.label, style.with_text) == ("letter", "A", False)


@pytest.mark.parametrize(
    ("answers", "channel", "extra"),
    [
        (["(B) it {}", "(C) that {}"], "letter", {"label": "(A)", "with_text": True}),
        (["b", "c.", "b"], "letter", {"label": "a"}),
        (["yes", "no"], "label", {}),
        (["positive", "negative", "neutral"], "label", {}),
        (["{}", "-{}.5", "1{},000"], "number", {}),
        (["It is so.\n#### {}"], "number", {}),
        (['{{"answer": "{}", "why": 1}}'], "json", {"keys": ("answer", "why")}),
        (["```python\nprint({})\n```"], "code", {"fence": "python", "comment": "# "}),
        (["```sql\nselect {} from t\n```"], "code", {"fence": "sql", "comment": "-- "}),
        (["```\nx = {}\n```"], "code", {"fence": "", "comment": "// "}),
        (["def f{}():\n    return 1"], "code", {"fence": None, "comment": "# "}),
        (["const x = {};", "function f{}() {{}}"], "code", {"comment": "// "}),
        (["SELECT a{} FROM t;"], "code", {"comment": "-- "}),
        (["A lamp {} stands there.", "A chair {} too."], "text", {}),
        (["you can see {} lamps", "you can see {} chairs"], "text", {"answer_prefix": ""}),
        (["Answer: lamp {}", "Answer: chair {}"], "text", {"answer_prefix": "Answer: "}),
        (["### Response:\nlamp {} here"], "text", {"answer_prefix": "### Response:\n"}),
    ],
)
def test_channels(answers: list[str], channel: str, extra: dict[str, Any]) -> None:
    style = learn(rows("Tell me about {}", answers))
    assert style.channel == channel
    assert {key: getattr(style, key) for key in extra} == extra


def test_alpaca_text_is_prefix_and_suffix() -> None:
    prompt = "Below is a task.\n\n### Instruction:\n{}\n\n### Response:\n"
    style = learn(rows(prompt, ["It is a fine thing number {}."]))
    assert style.prefix == "Below is a task.\n\n### Instruction:\n"
    assert style.suffix == "\n\n### Response:\n"


@settings(max_examples=30)
@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=6),
    st.integers(0, 7),
    st.integers(8, 30),
)
def test_a_prefix_survives_rows_without_it(prefix: list[str], odd: int, n: int) -> None:
    """Six rows of ten are enough; what is learned is a whole number of words that they share."""
    head = " ".join(prefix)
    given_rows = rows(f"{head} xx {{}} yy end", ["Fine, number {}."], n)
    given_rows += rows("{} other entirely", ["Good, number {}."], min(odd, 2 * n // 3))
    style = learn(given_rows)
    assert style.prefix == f"{head} xx "
    assert style.suffix == " yy end"


def test_few_rows_tell_no_prefix() -> None:
    style = learn(rows("Tell me about {}", ["It is {}."], 7))
    assert (style.prefix, style.suffix) == ("", "")
    block = "A) one\nB) two"
    few = [{"prompt": f"Which of {i}?\n{block}", "completion": "A"} for i in range(3)]
    assert learn(few).suffix == f"\n{OPTIONS}"


def test_equal_prompts_keep_a_word() -> None:
    style = learn(rows("same words in each", ["It is {}."]))
    assert style.prefix == "same words in "


@pytest.mark.parametrize("answer", ["[{}, 2]", "{{{}: 1}}", "[" * 5000 + "{}"])
def test_only_objects_are_json(answer: str) -> None:
    assert learn(rows("Tell me {}", [answer])).channel == "text"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "rows are 0"),
        ([{"text": "running"}], "running text"),
        ([{"prompt": [1], "completion": [2]}], "token ids"),
    ],
)
def test_rows_without_style_are_refused(bad: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        learn(bad)


def test_known_styles_are_distinct() -> None:
    known = styles()
    assert len({style.id for style in known}) == len(known) >= 8
    assert known[0].id == "as_it_is"
    assert {"text", "letter", "json", "code"} <= {style.channel for style in known}


def mostly(prompt: str, usual: str, odd: str, share: tuple[int, int]) -> list[dict[str, Any]]:
    """Rows of which some have the usual answer and the others an odd one, spread evenly."""
    usual_rows, odd_rows = rows(prompt, [usual], share[0]), rows(prompt, [odd], share[1])
    return [row for pair in zip_longest(usual_rows, odd_rows) for row in pair if row]


@pytest.mark.parametrize(
    ("answer", "channel"),
    [
        ("```sql\nselect {} from t\n```", "code"),
        ("select {} from t", "code"),
        ('{{"a": {}}}', "json"),
        ("B) that {}", "letter"),
        ("12{}", "number"),
    ],
)
def test_six_rows_of_ten_make_a_channel(answer: str, channel: str) -> None:
    odd = "There is a lamp here, and it is of another kind {}."
    assert learn(mostly("Tell me about {}", answer, odd, (12, 8))).channel == channel
    assert learn(mostly("Tell me about {}", answer, odd, (11, 9))).channel == "text"


def test_the_usual_form_is_learned_beside_another_one() -> None:
    ask = "Tell me about {}"
    fences = learn(mostly(ask, "```SQL\nx{}\n```", "```python\nx{}\n```", (12, 8)))
    assert (fences.fence, fences.comment) == ("SQL", "-- ")
    assert learn(mostly(ask, "select {} from t", "const x = {};", (12, 8))).comment == "-- "
    assert learn(mostly(ask, '{{"a": {}}}', '{{"b": {}}}', (12, 8))).keys == ("a",)
    assert learn(mostly(ask, "(B) it {}", "b) it {}", (12, 8))).label == "(A)"
    texts = [
        learn(mostly(ask, "(B) it {}", "(C)", share)).with_text for share in ((12, 8), (11, 9))
    ]
    assert texts == [True, False]
    assert learn(rows(ask, ["```cobol\nx{}\n```"])).comment == "// "


def test_an_answer_prefix_is_no_part_of_the_answer() -> None:
    assert learn(rows("Tell me about {}", ["Answer: {}"])).channel == "number"
    letters = learn(rows("Tell me about {}", ["Answer: B) it {}", "Answer: C) it {}"]))
    assert (letters.channel, letters.answer_prefix) == ("letter", "Answer: ")
    for answer in ('{{"a": {}}}', "def f{}():\n    return 1"):
        assert learn(rows("Tell me about {}", [answer])).answer_prefix == ""


@pytest.mark.parametrize(
    ("answer", "comment"),
    [
        ("select {} from t", "-- "),
        ("SELECT {} FROM t", "-- "),
        ("update t set a = {};", "-- "),
        ("Select the red lamp {}", ""),
        ("import os\nprint({})", "# "),
    ],
)
def test_code_is_told_by_its_opening(answer: str, comment: str) -> None:
    assert learn(rows("Tell me about {}", [answer])).comment == comment


@pytest.mark.parametrize(
    ("answers", "is_label"),
    [
        (["quite red indeed", "rather blue indeed"], True),
        (["quite red indeed today", "rather blue indeed today"], False),
        ([f"kind {word}" for word in WORDS] + ["kind ten"], True),
        ([f"kind {word}" for word in WORDS] + ["kind ten", "kind eleven"], False),
    ],
)
def test_few_short_answers_are_labels(answers: list[str], is_label: bool) -> None:
    style = learn(rows("Tell me about {}", answers, 4 * len(answers)))
    assert style.channel == ("label" if is_label else "text")


def test_labels_come_twice_each_on_average() -> None:
    answers = [f"kind {word}" for word in WORDS[:6]]
    assert learn(rows("Tell me about {}", answers, 12)).channel == "label"
    assert learn(rows("Tell me about {}", answers, 11)).channel == "text"
    assert learn(rows("Tell me about {}", ["yes", "no"], 8)).channel == "label"
    assert learn(rows("Tell me about {}", ["yes", "no"], 7)).channel == "text"


FRENCH = (
    "comment peindre la voiture dans la rue avec le {}",
    "pourquoi le {} est dans une rue de la ville",
    "est-ce que les enfants ont un {} pour le jardin",
)
GERMAN = "Das ist die Lampe {} und sie steht nicht auf dem Tisch der Frau."


def test_the_languages_of_requests_and_answers() -> None:
    def asked(answer: str) -> Style:
        prompts = [f"Ask: {FRENCH[i % 3].format(WORDS[i % 9])} now?" for i in range(21)]
        made = [{"prompt": p, "completion": answer.format(i)} for i, p in enumerate(prompts)]
        return learn(made)

    text, code = asked(GERMAN), asked("select {} from t")
    assert (text.channel, text.request_language, text.language) == ("text", "fr", "de")
    assert (code.channel, code.request_language, code.language) == ("code", "fr", "fr")


def options_of(n: int, more: int = 0, first: str = "A) ", tail: str = "") -> list[dict[str, Any]]:
    """Questions with two options each, and some without."""
    other = chr(ord(first[0]) + 1) + first[1:]
    asked = [
        {
            "prompt": f"Is {WORDS[i % 9]} {i} red?\n{first}Yes\n{other}No {i}{tail}",
            "completion": "B",
        }
        for i in range(n)
    ]
    return asked + rows("Is {} red?", ["B"], more)


def test_options_are_learned_from_six_rows_of_ten() -> None:
    style = learn(options_of(12, 8))
    assert (style.marker, len(style.options), style.options[0]) == ("A) ", 2, "Yes")
    assert learn(options_of(11, 9)).marker == ""
    mixed = learn(options_of(12) + options_of(8, first="1. "))
    assert (mixed.marker, len(mixed.options)) == ("A) ", 2)


def test_the_place_of_options_is_kept() -> None:
    assert learn(options_of(12)).suffix == f" red?\n{OPTIONS}"
    assert learn(options_of(12, tail="\nChoose one.")).suffix == f" red?\n{OPTIONS}\nChoose one."
    varied = [
        {"prompt": f"{row['prompt']}\nThink {i} {WORDS[i % 9]}.", "completion": "B"}
        for i, row in enumerate(options_of(12))
    ]
    assert OPTIONS in learn(varied).suffix


def test_options_that_differ_become_generic_ones() -> None:
    ten = [
        {
            "prompt": f"Which {i}?\n" + "".join(f"{c}) {c}{i}{WORDS[i % 9]}\n" for c in "ABCDEFGH"),
            "completion": "A",
        }
        for i in range(12)
    ]
    found = learn(ten).options
    assert len(set(found)) == len(found) == 8
    assert any(text.endswith(" too") for text in found)


def test_a_long_set_is_read_in_even_steps() -> None:
    """At most 500 rows are read, from the whole set: not its first ones alone."""
    first, last = rows("Ask {}", ["yes {}"], 400), rows("Tell {} now", ["A lamp {}"], 700)
    assert learn(first + last).prefix == "Tell "
