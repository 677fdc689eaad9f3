"""Data files: every kind gives the same rows, and a bad one names the row."""

import json
import lzma
import sys
from pathlib import Path

import pytest

from fastsafe.errors import DataError, UsageError
from fastsafe.safety import files
from fastsafe.safety.files import file_sha256, read_rows

ROWS = [{"a": "1", "b": "two\nlines, and a comma"}, {"a": "", "b": 'é "quoted"'}]
CSV = 'a,b\n1,"two\nlines, and a comma"\n,"é ""quoted"""\n'


def write(path: Path) -> Path:
    text = {
        ".csv": CSV,
        ".tsv": 'a\tb\n1\t"two\nlines, and a comma"\n\té "quoted"\n',
        ".jsonl": "\n\n".join(map(json.dumps, ROWS)),
        ".json": json.dumps(ROWS),
    }[files.suffix_of(path)]
    data = b"\xef\xbb\xbf" + text.encode()
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    return path


@pytest.mark.parametrize("name", ["r.csv", "r.CSV", "r.tsv", "r.jsonl", "r.json", "r.jsonl.xz"])
def test_every_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert list(read_rows(write(tmp_path / name))) == list(enumerate(ROWS, start=1))


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "r.parquet"
    parquet.write_table(arrow.Table.from_pylist(ROWS), path)
    assert list(read_rows(path)) == list(enumerate(ROWS, start=1))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"r\.parquet: after row 0: not parquet"):
        list(read_rows(path))


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"parquet needs pyarrow, which is not installed; pip"):
        list(read_rows(tmp_path / "r.parquet"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("r.jsonl", b'{"a": 1}\n{"a": \n', "row 2: not JSON"),
        ("r.jsonl", b"[" * 100_000, "row 1: not JSON"),
        ("r.jsonl", b"3", "row 1: is int, expected an object"),
        ("r.json", b'{"a": 1}', "is dict, expected a list of objects"),
        ("r.json", b"[1]", "row 1: is int, expected an object"),
        ("r.json", b"[", "r.json: not JSON"),
        ("r.csv", b"a,b\n1\n", "row 1: 1 fields, expected 2 as in the header"),
        ("r.csv", b'a,b\n1,"2\n', "not CSV"),
        ("r.csv", b"a,b\n1,\x002\n3\n", "row 2: 1 fields"),
        ("r.csv", b"a\xe9,b\n", "byte 1 is not UTF-8; convert"),
        ("r.xlsx", b"", "ends in '.xlsx', expected .jsonl"),
        ("r.jsonl.xz", b"plain", "cannot be read"),
        ("r.jsonl.xz", lzma.compress(b'{"a": 1}')[:-8], "cannot be read"),
    ],
)
def test_malformed(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(tmp_path / name))
    assert name in str(caught.value)


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_JSON_CHARS", 3)
    monkeypatch.setattr(files, "MAX_FIELD_CHARS", 3)
    (tmp_path / "r.json").write_text("[{}]")
    with pytest.raises(DataError, match="is longer than 3 characters; write JSONL"):
        list(read_rows(tmp_path / "r.json"))
    (tmp_path / "r.csv").write_text("a\nlonger\n")
    with pytest.raises(DataError, match="line 2: not CSV"):
        list(read_rows(tmp_path / "r.csv"))


def test_missing(tmp_path: Path) -> None:
    for call in (file_sha256, lambda path: list(read_rows(path))):
        with pytest.raises(DataError, match=r"none\.csv: cannot be read \(No such file"):
            call(tmp_path / "none.csv")
