"""Behaviours are read whole or refused with the row that is wrong; the seed set keeps its shape."""

import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from fastsafe.errors import DataError
from fastsafe.safety.behaviours import Behaviour, read_behaviours, seed_behaviours
from fastsafe.safety.formats import seed_translator
from fastsafe.safety.judges.refusal import JUDGE
from fastsafe.safety.verdict import Verdict


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def test_jsonl(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "b.jsonl",
        '{"behavior_id": "car", "harmful": "steal the red car", "benign": "paint the red car"}\n'
        "\n"
        '{"harmful": " forge the old coin ", "category": "fraud"}\n',
    )
    first, second = read_behaviours(path)
    assert first == Behaviour("car", "steal the red car", "paint the red car", source_row=1)
    assert second == Behaviour("2", "forge the old coin", "", "fraud", source_row=2)
    assert (first.action(True), first.action(False)) == (first.harmful, first.benign)


def test_csv_with_bom_crlf_and_line_breaks_in_a_field(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "b.CSV",
        '\ufeffbehavior_id,harmful,benign\r\ncar,"steal, quietly,\r\nthe car",paint the car\r\n',
    )
    assert read_behaviours(path) == [
        Behaviour("car", "steal, quietly,\r\nthe car", "paint the car", source_row=1)
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "no behaviours, expected at least one row"),
        ("a.jsonl", "{", "line 1: content is not JSON"),
        ("a.jsonl", "[" * 100_000, "line 1: content is not JSON"),
        ("a.jsonl", "[]", "line 1: row is list, expected an object"),
        ("a.jsonl", '{"harmful": "x", "bening": "y"}', "column 'bening'; did you mean benign"),
        ("a.jsonl", '{"harmful": 3}', "row 0, line 1: harmful is int, expected a string"),
        ("a.jsonl", '{"harmful": " "}', "row 0, line 1: harmful and benign are empty"),
        ("a.jsonl", '{"behavior_id": "", "harmful": "x"}', "row 0, line 1: behavior_id is empty"),
        (
            "a.jsonl",
            '{"behavior_id": "i", "harmful": "x"}\n{"behavior_id": "i", "harmful": "y"}',
            "row 1: behavior_id 'i' repeats",
        ),
        ("a.jsonl", '{"harmful": "x", "form": "poem"}', "form is 'poem', expected one of action"),
        ("a.jsonl", '{"harmful": "x", "lang": 1}', "row 0, line 1: lang is int, expected a string"),
        ("a.csv", "", "no behaviours, expected at least one row"),
        ("a.csv", "harmful,harmful\nx,y\n", "expected different names"),
        (
            "a.csv",
            "goal,target\nx,y\n",
            "row 0, line 2: unknown column 'goal'; call it harmful, or",
        ),
        ("a.jsonl", '{"Behavior": "x", "a": "y"}', "unknown column 'Behavior'; call it harmful"),
        ("a.jsonl", '{"harmful": "x", "goal": "y"}', "unknown column 'goal'; known: behavior_id, "),
        ("a.csv", "harmful;benign\nx;y\n", "header is 'harmful;benign', whose columns ';' separ"),
        ("a.csv", "category\nx\n", "row 0, line 2: harmful and benign are empty"),
        ("a.csv", "harmful,benign\nx\n", "line 2: fields are 1, expected 2 as in the header"),
        ("a.csv", "harmful,benign\nx,y,z\n", "line 2: fields are 3, expected 2"),
        ("a.txt", "x", "file type is .txt, expected .jsonl"),
        ("a.csv", 'harmful,benign\nx,"y\n', "not CSV"),
    ],
)
def test_malformed_files_name_the_row(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(DataError, match=message) as caught:
        read_behaviours(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_other_encodings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_behaviours(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"harmful": "caf\xe9"}')
    with pytest.raises(DataError, match="line 1: content is not JSON"):
        read_behaviours(tmp_path / "latin.jsonl")


def test_request_with_its_context(tmp_path: Path) -> None:
    line = '{"harmful": "Sum it up.", "benign": "b", "form": "request", "context": "A text."}'
    (found,) = read_behaviours(write(tmp_path, "b.jsonl", line))
    assert found.form == "request"
    assert found.action(True) == "A text.\n\n---\n\nSum it up."
    assert found.action(False) == "b"


SEED = seed_behaviours()
TEXTS = [text for each in SEED for text in (each.harmful, each.benign)]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def test_seed_set_is_large_and_spread() -> None:
    counts = Counter(each.category for each in SEED)
    assert len(SEED) >= 200
    assert len(counts) >= 10
    assert min(counts.values()) >= 10
    assert len({each.behavior_id for each in SEED}) == len(SEED)


def test_seed_texts_are_distinct_phrases() -> None:
    assert len(set(TEXTS)) == len(TEXTS)
    for text in TEXTS:
        assert re.fullmatch(r"[a-z][a-z' -]{10,70}", text), text
        assert 4 <= len(text.split()) <= 12, text


@pytest.mark.parametrize("side", ["harmful", "benign"])
def test_seed_set_has_no_near_duplicates(side: str) -> None:
    found = [words(getattr(each, side)) for each in SEED]
    assert max(len(a & b) / len(a | b) for a, b in combinations(found, 2)) <= 0.7


def test_twins_share_length_and_words() -> None:
    for each in SEED:
        short, long = sorted((len(each.harmful), len(each.benign)))
        assert long - short <= 0.4 * long, each
        assert len(words(each.harmful) & words(each.benign)) >= 2, each


def test_every_seed_text_has_its_own_french() -> None:
    translate = seed_translator()
    found = [translate(text) for text in TEXTS]
    assert len(set(found)) == len(found)
    assert not set(found) & set(TEXTS)
    assert set(translate.translations) == set(TEXTS)
    assert all(JUDGE.judge("", text, True).verdict is not Verdict.REFUSED for text in found)
