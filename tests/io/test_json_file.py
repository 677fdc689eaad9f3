"""JSON from outside: bounded, strict, one message per flaw (M49 as far as JSON goes)."""

import json
import os
from pathlib import Path

import pytest

from fastsafe.errors import CheckpointError
from fastsafe.io import json_file
from fastsafe.io.json_file import read_json, read_object


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_values(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": [1, 2.5, null, true], "b": {"é\\ud83d\\ude00": "x"}, "c": 1e-5}')
    wanted = {"a": [1, 2.5, None, True], "b": {"é\U0001f600": "x"}, "c": 1e-5}
    assert read_json(path, 1000) == read_object(path, 1000) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"content is not JSON \(Expecting value"),
        ("{", "Expecting property name"),
        ("{} x", "Extra data"),
        ('{"a": 1, "a": 1}', "key 'a' twice, expected once"),
        ('{"a": 1, "\\u0061": 2}', "key 'a' twice, expected once"),
        ('[{"b": {"c": 1, "c": 2}}]', "key 'c' twice"),
        ('{"rope_theta": NaN}', "JSON has NaN, expected finite numbers"),
        ("[-Infinity]", "JSON has -Infinity, expected finite numbers"),
        ("[1e999]", "JSON has 1e999, expected finite numbers"),
        ("[" + "1" * 5000 + "]", "Exceeds the limit"),
        (b"\xff", "invalid start byte"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ('["\\ud800"]', "surrogates not allowed"),
        ("[" * 65 + "]" * 65, "nested deeper than 64"),
        ("[" * 100_000, "nested deeper than 64"),
        ('{"a":' * 100_000, "nested deeper than 64"),
        ('["\\"[", ' + "[" * 65, "nested deeper than 64"),
    ],
)
def test_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json(path, 1 << 20)
    assert str(caught.value).startswith(f"{path}: ")


def test_brackets_in_strings_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = ["[" * 100, "\\", '"{{{{[[[[' * 20, [[]]]
    path = write(tmp_path, json.dumps(value))
    monkeypatch.setattr(json_file, "MAX_DEPTH", 3)
    assert read_json(path, 1000) == value
    monkeypatch.setattr(json_file, "MAX_DEPTH", 2)
    with pytest.raises(CheckpointError, match="nested deeper than 2"):
        read_json(path, 1000)


def test_depth_scan_is_linear(tmp_path: Path) -> None:
    # quadratic, these would take hours
    for text in ('"\\' * 500_000, '\\"' * 500_000, '"' + "[" * 1_000_000, '"' * 1_000_001):
        with pytest.raises(CheckpointError, match="Extra data"):
            read_json(write(tmp_path, "[]" * 100 + text), 4 << 20)


def test_size_is_checked_before_reading(tmp_path: Path) -> None:
    path = write(tmp_path, "{}")
    os.truncate(path, 200_000_000_000)  # sparse
    with pytest.raises(CheckpointError, match="file has 200000000000 bytes, expected at most 4096"):
        read_json(path, 4096)


def test_only_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="expected a regular file"):
            read_json(path, 4096)
    with pytest.raises(CheckpointError, match="file is missing, expected JSON"):
        read_json(tmp_path / "absent", 4096)
    with pytest.raises(CheckpointError, match="path has a NUL byte"):
        read_json(f"{tmp_path}\0", 4096)


@pytest.mark.parametrize("text", ["[]", "1", "null", '"x"'])
def test_object_is_required(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match="expected an object"):
        read_object(write(tmp_path, text), 100)
