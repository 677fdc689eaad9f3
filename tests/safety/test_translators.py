"""Translators say who they are, and never hand on what is no translation."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from fastsafe.errors import DataError
from fastsafe.safety.completers.protocol import Ask, Finish, Reply
from fastsafe.safety.formats import TranslationTable, formats, seed_translator


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
    found = TranslationTable.read(tmp_path / name)
    assert found("a car") == "une voiture"
    assert found.translator_id.startswith("pairs:")
    with pytest.raises(DataError, match="no translation of 'a boat', expected one in the file"):
        found("a boat")
    with pytest.raises(DataError) as caught:
        found("x" * 5_000)
    assert len(str(caught.value)) < 300
    (tmp_path / name).write_text(text.replace("voiture", "auto"))
    assert TranslationTable.read(tmp_path / name).translator_id != found.translator_id


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}', "row 0, line 1: columns are 'text', expected text and translation"),
        ('{"text": "a", "translation": " "}', "expected text and translation, both with words"),
        (
            '{"text": "a", "translation": "b"}\n{"text": "a", "translation": "c"}',
            "row 1, line 2: 'a' has two translations",
        ),
    ],
)
def test_bad_pairs(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        TranslationTable.read(tmp_path / "p.jsonl")


def test_seed_translator_serves_the_translation_format() -> None:
    text = formats()["translation"].render("forge a grandmother's will", seed_translator())
    assert text.endswith("English: falsifier le testament d'une grand-mère")


class Fake:
    """A model that has one reply."""

    identity = "fake" * 16

    def __init__(self, reply: str, finish: Finish = "stop") -> None:
        self.reply, self.finish = reply, finish
        self.asked: list[Ask] = []

    def complete(self, asks: Sequence[Ask]) -> list[Reply]:
        self.asked += asks
        return [Reply(key=ask.key, text=self.reply, finish=self.finish) for ask in asks]


def test_a_model_is_asked_once_per_text() -> None:
    model = Fake(" une voiture\n")
    found = TranslationTable.by_model(model, ["a car", "a car"])
    assert found("a car") == "une voiture"
    (ask,) = model.asked
    assert ask.messages[0]["content"].endswith("\n\na car")
    assert "French" in ask.messages[0]["content"]
    assert found.translator_id.startswith("model:fakefakefakefake:")


@pytest.mark.parametrize(
    ("reply", "finish", "got"),
    [
        ("", "stop", "no translation"),
        ("a car", "stop", "no translation"),
        ("une", "length", "no translation"),
        ("the cause", "error", "no translation"),
        ("", "refused", "a refusal"),
        ("I can't help with that.", "stop", "a refusal"),
    ],
)
def test_what_is_no_translation_is_refused(reply: str, finish: Finish, got: str) -> None:
    with pytest.raises(DataError, match=f"translator model:.*'a car' got {got}"):
        TranslationTable.by_model(Fake(reply, finish), ["a car"])
