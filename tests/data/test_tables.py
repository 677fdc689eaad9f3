"""Data files: every kind gives the same rows, and a bad one names the row."""

import csv
import json
import lzma
from pathlib import Path

import pytest

from fastsafe.data.tables import read_rows, table
from fastsafe.errors import DataError
from fastsafe.io.digest import file_sha256

ROWS = [{"a": "1", "b": "two\nlines, and a comma"}, {"a": "", "b": 'é "quoted"'}]
CSV = 'a,b\n1,"two\nlines, and a comma"\n,"é ""quoted"""\n'


def write(path: Path) -> Path:
    text = {
        ".csv": CSV,
        ".tsv": 'a\tb\n1\t"two\nlines, and a comma"\n\té "quoted"\n',
        ".jsonl": "\n\n".join(map(json.dumps, ROWS)),
        ".json": json.dumps(ROWS),
    }[Path(path.name.removesuffix(".xz")).suffix.lower()]
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
    with pytest.raises(DataError, match=r"r\.parquet: parquet cannot be read from row 0 on"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("r.jsonl", b'{"a": 1}\n{"a": \n', "line 2: content is not JSON"),
        ("r.jsonl", b'{"a": "\\ud800"}', "line 1: content is not JSON"),
        ("r.jsonl", b"3", "line 1: row is int, expected an object"),
        ("r.json", b"[1]", "row 0: row is int, expected an object"),
        ("r.csv", b"a,b\n1\n", "line 2: fields are 1, expected 2 as in the header"),
        ("r.tsv", b"a\tb\n1\n", "row 1: fields are 1, expected 2 as in the header"),
        ("r.tsv", b'a\tb\n1\t"2\n', "line 2 is not CSV"),
        ("r.tsv", b"a\tb\n1\t\x00\n", "line 2 has a NUL character"),
        ("r.tsv", b"a\xe9\tb\n", "byte 1 is not UTF-8; convert"),
        ("r.xlsx", b"", "file type is .xlsx, expected .jsonl"),
        ("r.jsonl.xz", b"plain", "cannot be unpacked"),
        ("r.jsonl.xz", lzma.compress(b'{"a": 1}')[:-8], "cannot be unpacked"),
        ("r.jsonl.xz", lzma.compress(b"{"), r"r\.jsonl\.xz: line 1: content is not JSON"),
    ],
)
def test_malformed(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(tmp_path / name))
    assert name in str(caught.value)


def test_a_field_may_be_long_and_the_process_keeps_its_limit(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "r.tsv").write_text("a\n" + "x" * 200_000)
    ((_, row),) = read_rows(tmp_path / "r.tsv")
    assert len(row["a"]) == 200_000
    assert csv.field_size_limit() == before


def test_missing(tmp_path: Path) -> None:
    for call in (file_sha256, lambda path: list(table(path)), lambda path: list(read_rows(path))):
        with pytest.raises(DataError, match=r"none\.csv: .*\(No such file or directory\)"):
            call(tmp_path / "none.csv")
