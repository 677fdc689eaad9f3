"""Defences at serving time: what is put into prompts, and what a guard lets through."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from fastsafe.errors import UsageError
from fastsafe.safety.defences import Screened, defences

ALL = defences()


def prompted(name: str, messages: Sequence[dict[str, str]], **params: Any) -> list[dict[str, str]]:
    defence = ALL[name]
    found: list[dict[str, str]] = defence.apply(messages, **defence.arguments(params))
    return found


ASKED = [{"role": "user", "content": "How do I paint a fence?"}]


@pytest.mark.parametrize("name", ["ptst", "counter_prompt"])
def test_a_safety_prompt_goes_in_front(name: str) -> None:
    (system, user) = prompted(name, ASKED)
    assert user == ASKED[0]
    assert system["role"] == "system"
    assert len(system["content"]) > 80
    own = [{"role": "system", "content": "You translate."}, *ASKED]
    assert prompted(name, own, text="Be safe.") == [
        {"role": "system", "content": "Be safe.\n\nYou translate."},
        *ASKED,
    ]
    assert own[0]["content"] == "You translate."  # the conversation given is left alone


def test_a_reminder_wraps_the_last_user_message() -> None:
    talk = [*ASKED, {"role": "assistant", "content": "With a brush."}, *ASKED]
    found = prompted("self_reminder", talk, text="<{prompt}>")
    assert [message["content"] for message in found] == [
        "How do I paint a fence?",
        "With a brush.",
        "<How do I paint a fence?>",
    ]
    (default,) = prompted("self_reminder", [{"role": "user", "content": "{prompt} {x}"}])
    assert default["content"].count("{prompt} {x}") == 1
    assert default["content"].startswith("Remember")
    with pytest.raises(UsageError, match=r"lacks .prompt., expected it once"):
        prompted("self_reminder", ASKED, text="nothing")
    with pytest.raises(UsageError, match="no user message"):
        prompted("self_reminder", [])


def filtered(
    guard: Callable[..., Any], prompts: Sequence[str], answers: Sequence[str], **params: Any
) -> list[Screened]:
    defence = ALL["guard_filter"]
    found: list[Screened] = defence.apply(
        prompts, answers, **defence.arguments({"guard": guard, "refusal": "No.", **params})
    )
    return found


SCORES = {"bad": 0.9, "odd": 0.5, "lost": None, "fine": 0.1}


def by_word(asked: Sequence[tuple[str, str | None]]) -> list[float | None]:
    """Score the prompt, or where there is one the answer."""
    return [SCORES[prompt if answer is None else answer] for prompt, answer in asked]


PROMPTS = ["fine", "bad", "fine", "fine", "lost"]
ANSWERS = ["fine", "fine", "bad", "odd", "bad"]


def test_a_guard_reads_prompts_and_answers() -> None:
    assert [tuple(row) for row in filtered(by_word, PROMPTS, ANSWERS)] == [
        ("fine", "passed"),
        ("No.", "prompt_refused"),
        ("No.", "answer_refused"),
        ("odd", "passed"),  # at the threshold is not above it
        ("No.", "unscreened"),
    ]


def test_a_guard_that_fails_is_neither_safe_nor_unsafe() -> None:
    (row,) = filtered(by_word, ["lost"], ["fine"], on_failure="pass")
    assert row == ("fine", "unscreened")
    (row,) = filtered(by_word, ["lost"], ["fine"], on_failure="refuse")
    assert row == ("No.", "unscreened")


def test_a_guard_reads_one_side_alone() -> None:
    calls: list[Any] = []

    def watched(asked: Sequence[tuple[str, str | None]]) -> list[float | None]:
        calls.append(list(asked))
        return by_word(asked)

    found = filtered(watched, ["bad", "fine"], ["fine", "bad"], reads="answer", threshold=0.0)
    assert [row.outcome for row in found] == ["answer_refused", "answer_refused"]
    filtered(watched, ["bad", "fine"], ["fine", "bad"], reads="prompt")
    filtered(watched, ["bad", "fine"], ["fine", "bad"])
    filtered(watched, ["bad"], ["fine"])
    assert calls == [
        [("bad", "fine"), ("fine", "bad")],
        [("bad", None), ("fine", None)],
        [("bad", None), ("fine", None)],
        [("fine", "bad")],
        [("bad", None)],
    ]


def test_a_guard_filter_refuses_what_cannot_be() -> None:
    with pytest.raises(UsageError, match="guard gave 1 scores for 2 rows"):
        filtered(lambda asked: [0.0], ["fine", "fine"], ["fine", "fine"])
    with pytest.raises(UsageError, match="reads is 'all'"):
        filtered(by_word, ["fine"], ["fine"], reads="all")
    with pytest.raises(UsageError, match="1 prompts and 2 answers"):
        filtered(by_word, ["fine"], ["fine", "fine"])
    with pytest.raises(UsageError, match="'guard' is missing; give a callable"):
        ALL["guard_filter"].arguments({})
