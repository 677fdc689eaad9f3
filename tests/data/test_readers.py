import json

import pytest

from fastsafe.data.readers import read_rows
from fastsafe.errors import DataError

ROWS = [
    {"prompt": "a\u2028b", "completion": "ü 🎉"},
    {"messages": [{"role": "user", "content": "x\ny"}], "id": 1},
    {"text": "t\r"},
    {"prompt": [1, 2], "completion": [3]},
]
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
DEEP = b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


def write(folder, name, content):
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"\n".join(LINES)),
        ("a.jsonl", b"\n".join(LINES) + b"\n"),
        ("a.ndjson", b"\r\n".join(LINES) + b"\r\n\r\n"),
        ("a.jsonl", b"\xef\xbb\xbf" + b"\n \n".join(LINES)),
        ("a.json", json.dumps(ROWS, indent=1).encode()),
        ("a.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
    ],
    ids=["lines", "final newline", "crlf and blank", "byte-order mark", "json", "json with mark"],
)
def test_read(name, content, tmp_path):
    path = write(tmp_path, name, content)
    assert read_rows(path) == read_rows(str(path)) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", LINES[0] + b"\n{", "line 2: content is not JSON"),
        ("a.jsonl", b"\n" + LINES[0] + b"\n[1]", "line 3: row is list"),
        ("a.jsonl", LINES[0] + LINES[1], "line 1: content is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1: content is not JSON"),
        ("a.jsonl", b'{"text": "\x00"}', "line 1: content is not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: content is not JSON"),
        ("a.jsonl", b'{"text": "a", "x": NaN}', "line 1: content is not JSON .NaN"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', "line 1: content is not JSON .a key"),
        ("a.jsonl", DEEP, "line 1: content is not JSON"),
        ("a.jsonl", b'{"x": ' + b"9" * 9999 + b"}", "line 1: content is not JSON"),
        ("a.jsonl", LINES[0] + b'\n{"txt": "a"}', "line 2: keys are 'txt'"),
        ("a.jsonl", b"\n\n", "rows are 0"),
        ("a.json", b"", "content is not JSON"),
        ("a.json", b"[]", "rows are 0"),
        ("a.json", b'{"text": "a"}', "content is dict, expected a list"),
        ("a.json", b'[{"text": "a"}, {"text": 1}]', "row 1: text is 1"),
        ("a.csv", b"prompt,completion\n", "file type is .csv"),
        ("a", b"", "file type is none"),
    ],
)
def test_malformed(name, content, expected, tmp_path):
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=expected) as caught:
        read_rows(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_unreadable(tmp_path):
    with pytest.raises(DataError, match=r"reading failed \(No such file"):
        read_rows(tmp_path / "missing.jsonl")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match=r"reading failed \(Is a directory"):
        read_rows(tmp_path / "folder.json")
