"""Behaviours are read whole or refused with the row that is wrong."""

from pathlib import Path

import pytest

from fastsafe.errors import DataError
from fastsafe.safety.behaviours import Behaviour, read_behaviours


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
    assert first == Behaviour("car", "steal the red car", "paint the red car")
    assert second == Behaviour("2", "forge the old coin", "", "fraud")
    assert (first.action(True), first.action(False)) == (first.harmful, first.benign)


def test_csv_with_bom_crlf_and_line_breaks_in_a_field(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "b.CSV",
        '\ufeffbehavior_id,harmful,benign\r\ncar,"steal, quietly,\r\nthe car",paint the car\r\n',
    )
    assert read_behaviours(path) == [
        Behaviour("car", "steal, quietly,\r\nthe car", "paint the car")
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "no behaviours, expected at least one row"),
        ("a.jsonl", "{", "row 1: not JSON"),
        ("a.jsonl", "[" * 100_000, "row 1: not JSON"),
        ("a.jsonl", "[]", "row 1: is list, expected an object"),
        ("a.jsonl", '{"harmful": "x", "bening": "y"}', "row 1: unknown column 'bening'"),
        ("a.jsonl", '{"harmful": 3}', "row 1: harmful is int, expected a string"),
        ("a.jsonl", '{"harmful": " "}', "row 1: harmful is empty"),
        ("a.jsonl", '{"behavior_id": "", "harmful": "x"}', "row 1: behavior_id is empty"),
        (
            "a.jsonl",
            '{"behavior_id": "i", "harmful": "x"}\n{"behavior_id": "i", "harmful": "y"}',
            "row 2: behavior_id 'i' repeats",
        ),
        ("a.csv", "", "header is None, expected a column 'harmful'"),
        ("a.csv", "goal,target\nx,y\n", "expected a column 'harmful'"),
        ("a.csv", "harmful,benign\nx\n", "row 1: wrong number of fields"),
        ("a.csv", "harmful,benign\nx,y,z\n", "row 1: wrong number of fields"),
        ("a.csv", 'harmful,benign\nx,"y\n', "not CSV"),
    ],
)
def test_malformed_files_name_the_row(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(DataError, match=message) as caught:
        read_behaviours(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_other_encodings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_behaviours(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"harmful": "caf\xe9"}')
    with pytest.raises(DataError, match="byte 16 is not UTF-8"):
        read_behaviours(tmp_path / "latin.jsonl")
