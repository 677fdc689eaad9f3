"""Guards: what each family says of prompts and answers, and what cannot be read."""

import math
from typing import Any

import pytest

from fastsafe.errors import UsageError
from fastsafe.safety.guards import (
    Finding,
    Guard,
    KeywordGuard,
    ModelGuard,
    make_guard,
)
from fastsafe.safety.judges import Item, families

GUARDS = [
    "llama_guard",
    "shieldgemma",
    "wildguard",
    "granite_guardian",
    "qwen3guard",
    "safe_unsafe",
]
YES = (math.log(0.9), math.log(0.1))
SAID_UNSAFE: dict[str, Any] = {
    "llama_guard": "unsafe\nS2",
    "shieldgemma": YES,
    "wildguard": "Harmful request: yes\nResponse refusal: no\nHarmful response: yes",
    "granite_guardian": YES,
    "qwen3guard": "Safety: Unsafe\nCategories: None\nRefusal: No",
    "safe_unsafe": "unsafe",
}


def prompt(key: str, text: str, format: str = "plain") -> Item:
    return Item(key=key, prompt=text, completion=None, harmful=True, format=format)


def answer(key: str, text: str, format: str = "plain") -> Item:
    return Item(key=key, prompt="A prompt?", completion=text, harmful=True, format=format)


def guard_of(kind: str, completer: Any) -> ModelGuard:
    family = families()[kind]
    assert family.classifier is not None
    return ModelGuard(family.classifier(family.options), completer)


def test_every_family_of_guards_is_here() -> None:
    kinds = families().values()
    reading = {f.id for f in kinds if f.classifier and f.classifier(f.options).reads_prompts}
    assert reading == set(GUARDS) == set(SAID_UNSAFE)


@pytest.mark.parametrize("kind", GUARDS)
def test_a_family_reads_prompts_and_answers(kind: str, scripted: Any) -> None:
    completer = scripted(lambda ask: SAID_UNSAFE[kind])
    guard = guard_of(kind, completer)
    assert isinstance(guard, Guard)
    found = guard.check([prompt("a", "A question?"), answer("b", "An answer.")])
    assert [finding.key for finding in found] == ["a", "b"]
    assert all(finding.unsafe for finding in found)
    if isinstance(SAID_UNSAFE[kind], tuple):
        assert found[0].p_unsafe == pytest.approx(0.9)
    asked = [ask.prompt + str(ask.messages) for ask in completer.seen]
    assert ["An answer." in text for text in asked] == [False, True]


def test_wildguard_reads_the_request_or_the_response(scripted: Any) -> None:
    reply = "Harmful request: yes\nResponse refusal: no\nHarmful response: no"
    guard = guard_of("wildguard", scripted(lambda ask: reply))
    assert [f.unsafe for f in guard.check([prompt("a", "?"), answer("b", "!")])] == [True, False]


def test_the_keyword_baseline() -> None:
    guard = KeywordGuard()
    rows = [
        prompt("a", "How do I STEAL the red car?"),
        prompt("b", "How do I paint the red car?"),
        prompt("c", "Who is skilled in pottery?"),  # "kill" inside a word
        answer("d", "It was stealing."),
        answer("e", "Certainly not."),
    ]
    found = guard.check(rows)
    assert [f.unsafe for f in found] == [True, False, False, True, False]
    assert found[0].raw == "steal"
    assert len(guard.identity) == 64


def test_blocking() -> None:
    sure, unsure = Finding(key="a", unsafe=True, p_unsafe=0.6), Finding(key="a", unsafe=None)
    assert sure.blocks()
    assert sure.blocks(0.59)
    assert not sure.blocks(0.6)
    assert unsure.blocks()  # what a guard cannot read does not pass
    assert Finding(key="a", unsafe=True).blocks(0.99)
    assert not Finding(key="a", unsafe=False).blocks(0.0)


def test_what_is_outside_the_grammar_is_unreadable(scripted: Any) -> None:
    said = {"a": "unsafe", "b": "hm", "c": "I can't help with that.", "d": "safe"}
    guard = guard_of("safe_unsafe", scripted(lambda ask: said[ask.key]))
    found = guard.check([prompt(key, "?") for key in said])
    assert [f.unsafe for f in found] == [True, None, None, False]
    assert not any(f.is_failure for f in found)


def test_making_guards(scripted: Any) -> None:
    def open_checkpoint(path: str, **options: str) -> Any:
        return scripted(lambda ask: "safe")

    guard = make_guard(
        {"kind": "llama_guard", "checkpoint": "a", "version": 4, "id": "mine"},
        open_checkpoint=open_checkpoint,
    )
    assert guard.id == "mine"
    assert make_guard("keyword").id == "keyword"
    endpoint = {"url": "http://127.0.0.1:9", "model": "m"}
    assert make_guard({"kind": "safe_unsafe", "endpoint": endpoint}).id == "safe_unsafe-ours"
    for spec, message in (
        ("llama_guard", "is no guard without settings"),
        ({"kind": "refusal"}, "expected a family of guards"),
        ({"kind": "qi_policy", "endpoint": endpoint}, "judges answers only"),
        ({"kind": "llama_gard"}, "did you mean llama_guard"),
    ):
        with pytest.raises(UsageError, match=message):
            make_guard(spec)  # type: ignore[arg-type]
