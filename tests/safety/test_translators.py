"""Translators say who they are, and never hand on what is no translation."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from fastsafe.errors import DataError
from fastsafe.safety.formats import (
    Completed,
    Dictionary,
    Pairs,
    Translator,
    formats,
    seed_translator,
)


def test_dictionary() -> None:
    found = Dictionary("upper/1", str.upper)
    assert isinstance(found, Translator)
    assert (found("a car"), found.translator_id) == ("A CAR", "upper/1")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.tsv", "text\ttranslation\na car\tune voiture\n"),
        ("p.csv", "text,translation\na car,une voiture\na car,une voiture\n"),
        ("p.jsonl", '{"text": " a car ", "translation": "une voiture"}'),
        ("p.json", '[{"text": "a car", "translation": "une voiture"}]'),
    ],
)
def test_pairs(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    found = Pairs.read(tmp_path / name)
    assert found("a car") == "une voiture"
    assert found.translator_id.startswith("pairs:")
    with pytest.raises(DataError, match="no translation of 'a boat', expected one in the file"):
        found("a boat")
    (tmp_path / name).write_text(text.replace("voiture", "auto"))
    assert Pairs.read(tmp_path / name).translator_id != found.translator_id


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}', "row 1: columns are text, expected text and translation"),
        ('{"text": "a", "translation": " "}', "expected text and translation, both with words"),
        (
            '{"text": "a", "translation": "b"}\n{"text": "a", "translation": "c"}',
            "row 2: 'a' has two translations",
        ),
    ],
)
def test_bad_pairs(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        Pairs.read(tmp_path / "p.jsonl")


class Fake:
    """A model that has one reply."""

    def __init__(self, reply: str) -> None:
        self.reply = reply
        self.asked: list[Sequence[Mapping[str, str]]] = []

    def __call__(self, messages: Sequence[Mapping[str, str]]) -> str:
        self.asked.append(messages)
        return self.reply


def test_completed_asks_once_per_text() -> None:
    model = Fake(" une voiture\n")
    found = Completed("fake/1", model)
    assert [found("a car"), found("a car")] == ["une voiture"] * 2
    ((message,),) = model.asked
    assert message["role"] == "user"
    assert message["content"].endswith("\n\na car")
    assert "French" in message["content"]
    assert found.translator_id.startswith("fake/1:")
    assert found.translator_id != Completed("fake/1", model, "German").translator_id


@pytest.mark.parametrize(
    ("reply", "got"),
    [("", "no translation"), ("a car", "no translation"), ("I can't help with that.", "a refusal")],
)
def test_completed_refuses_what_is_no_translation(reply: str, got: str) -> None:
    with pytest.raises(DataError, match=f"translator fake/1:.*'a car' got {got}"):
        Completed("fake/1", Fake(reply))("a car")


def test_seed_translator_serves_the_translation_format() -> None:
    text = formats()["translation"].render("forge a grandmother's will", seed_translator())
    assert text.endswith("English: falsifier le testament d'une grand-mère")
