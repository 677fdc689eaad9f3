"""Files of data: every type, and what is malformed is an error with its place."""

import csv
import gzip
import io
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsafe.data import records as module
from fastsafe.data.records import json_lines, records, table
from fastsafe.errors import DataError


def read(folder: Path, name: str, content: str | bytes) -> list[tuple[str, Any]]:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [(record.location.removeprefix(f"{path}: "), record.row) for record in records(path)]


ROWS = [{"a": "1", "b": "two\nlines, and a comma"}, {"a": "", "b": 'é "quoted"'}]
TEXTS = {
    ".csv": 'a,b\n1,"two\nlines, and a comma"\n,"é ""quoted"""\n',
    ".tsv": 'a\tb\n1\t"two\nlines, and a comma"\n\té "quoted"\n',
    ".jsonl": "\n\n".join(map(json.dumps, ROWS)),
    ".json": json.dumps(ROWS),
}
PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".GZ": gzip.compress}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("packed", PACKERS)
def test_every_kind_gives_the_same_rows(tmp_path: Path, kind: str, packed: str) -> None:
    content = PACKERS[packed](b"\xef\xbb\xbf" + TEXTS[kind].encode())
    assert [row for _, row in read(tmp_path, f"x{kind}{packed}", content)] == ROWS


@pytest.mark.parametrize("packed", PACKERS)
def test_parquet_gives_the_same_rows(tmp_path: Path, packed: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    buffer = io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(ROWS), buffer)
    content = PACKERS[packed](buffer.getvalue())
    assert [row for _, row in read(tmp_path, f"x.parquet{packed}", content)] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("x.jsonl.xz", b"plain", "reading failed .*expected a whole file"),
        ("x.jsonl.xz", lzma.compress(b'{"a": 1}')[:-8], "reading failed"),
        ("x.jsonl.gz", b"plain", "reading failed .*Not a gzipped file"),
        ("x.csv.gz", gzip.compress(b"a\n1\n", mtime=0)[:-6], "reading failed"),
        ("x.jsonl.xz", lzma.compress(b"{"), r"x\.jsonl\.xz: line 1: content is not JSON"),
    ],
)
def test_a_damaged_compressed_file_is_named(
    tmp_path: Path, name: str, content: bytes, why: str
) -> None:
    with pytest.raises(DataError, match=why):
        read(tmp_path, name, content)


def test_json_lines_under_any_name(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('\n{"a": 1}\n')
    assert list(json_lines(tmp_path / "x")) == [(f"{tmp_path / 'x'}: row 0, line 2", 2, {"a": 1})]


def test_a_table_with_no_header(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b'\xef\xbb\xbfone,"two"\n\n"three\nlines",\n')
    assert list(table(tmp_path / "x")) == [(1, ["one", "two"]), (3, ["three\nlines", ""])]
    with pytest.raises(DataError, match=r"\(No such file or directory\)"):
        list(table(tmp_path / "none.csv"))


def test_a_column_without_a_name_is_an_index(tmp_path: Path) -> None:
    content = ",q,a\n0,x,y\n1,z,\n"
    expected = [
        ("row 0, line 2", {"q": "x", "a": "y"}),
        ("row 1, line 3", {"q": "z", "a": ""}),
    ]
    assert read(tmp_path, "x.csv", content) == expected
    for header in ("Unnamed: 0,q,a", "Unnamed: 0.1,q,a", " ,q,a"):
        assert read(tmp_path, "x.csv", content.replace(",q,a", header, 1)) == expected
    trailing = "q,a,\nx,y,\nz,,\n"
    assert read(tmp_path, "x.csv", trailing) == expected
    assert read(tmp_path, "x.tsv", content.replace(",", "\t")) == expected


def test_json_lines(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xc3\xa9"}'
    expected = [("row 0, line 1", {"a": 1}), ("row 1, line 4", {"a": "é"})]
    assert read(tmp_path, "x.jsonl", content) == expected
    assert read(tmp_path, "x.NDJSON", content) == expected


def test_a_json_list(tmp_path: Path) -> None:
    assert read(tmp_path, "x.json", b'\xef\xbb\xbf[{"a": 1}, {}]') == [
        ("row 0", {"a": 1}),
        ("row 1", {}),
    ]
    with pytest.raises(DataError, match="row 1: row is int, expected an object with keys"):
        read(tmp_path, "x.json", '[{"a": 1}, 2]')
    with pytest.raises(DataError, match="content is int, expected a list"):
        read(tmp_path, "x.json", "1")
    for key in ("data", "rows", "train"):
        with pytest.raises(DataError, match=f"one object with a list of rows under '{key}'"):
            read(tmp_path, "x.json", json.dumps({"version": 1, key: [{"a": 1}]}))
    for content in ("", '[{"a": 1}', '{"a": 1', "[1e999]", '{"a": NaN}', b"[\xff]"):
        with pytest.raises(DataError, match=r"x\.json: .*content is not JSON"):
            read(tmp_path, "x.json", content)


@pytest.mark.parametrize(
    "content",
    [
        '{"a": 1}\n\n{"a": "é"}\n',
        '\ufeff{"a": 1}\r\n\r\n{"a": "é"}',
        '{\n"a": 1} {"a":\n "é"}',
    ],
)
def test_objects_one_after_another_in_json(tmp_path: Path, content: str) -> None:
    (one, first), (two, second) = read(tmp_path, "x.json", content)
    assert (first, second) == ({"a": 1}, {"a": "é"})
    assert one == "row 0, line 1"
    assert two == ("row 1, line 3" if "\n\n" in content.replace("\r", "") else "row 1, line 2")
    assert read(tmp_path, "x.json", '{"a": 1}') == [("row 0, line 1", {"a": 1})]
    with pytest.raises(DataError, match=r"x\.json: line 2: content is not JSON"):
        read(tmp_path, "x.json", '{"a": 1}\n{"a": ')


def test_many_objects_one_after_another(tmp_path: Path) -> None:
    found = read(tmp_path, "x.json", '{"a": "' + "x" * 500 + '"}\n' + '{"a": 1}\n' * 20_000)
    assert found[-1] == ("row 20000, line 20001", {"a": 1})


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_any_line_end_gives_the_same_rows(tmp_path: Path, end: str) -> None:
    table = f'q,a{end}x,"two{end}lines"{end}z,y{end}'
    expected = [("row 0, line 2", {"q": "x", "a": f"two{end}lines"})]
    assert read(tmp_path, "x.csv", table) == [*expected, ("row 1, line 4", {"q": "z", "a": "y"})]
    lines = f'{{"q": 1}}{end}{{"q": 2}}{end}'
    assert [row for _, row in read(tmp_path, "x.jsonl", lines)] == [{"q": 1}, {"q": 2}]


@pytest.mark.parametrize(
    ("name", "header", "mark"),
    [
        ("x.csv", "a;b", ";"),
        ("x.csv", "a\tb", r"\\t"),
        ("x.tsv", "a,b", ","),
        ("x.csv", "a|b", "|"),
    ],
)
def test_another_separator_is_named(tmp_path: Path, name: str, header: str, mark: str) -> None:
    with pytest.raises(
        DataError, match=rf"line 1: header is .*, whose columns '[{mark}]+' separates"
    ):
        read(tmp_path, name, f"{header}\nx\n")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ('{"a": 1, "a": 2}', "a key appears twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": 1e999}', "a number is too large"),
        ('{"a": ' + "9" * 5000 + "}", "integer string conversion"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ("[" * 100_000, "recursion"),
        (b'{"a": "\xff"}', "decode"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str | bytes, why: str) -> None:
    raw = line.encode() if isinstance(line, str) else line
    with pytest.raises(DataError, match=rf"x.jsonl: line 2: .*{why}"):
        read(tmp_path, "x.jsonl", b'{"a": 1}\n' + raw + b"\n")


def test_csv_as_rfc_4180_has_it(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfq,a\r\n"two\r\nlines","a ""b"", c"\r\n\r\nplain,\xc3\xa9'
    assert read(tmp_path, "x.csv", content) == [
        ("row 0, line 2", {"q": "two\r\nlines", "a": 'a "b", c'}),
        ("row 1, line 5", {"q": "plain", "a": "é"}),
    ]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("a,b\n1,2\n1\n", "line 3: fields are 1, expected 2"),
        ("a,b\n1,2,3\n", "line 2: fields are 3, expected 2"),
        ("a,a\n1,2\n", "line 1: header has columns 'a, a'"),
        ("a,b\n1,\0\n", "line 2 has a NUL character"),
        (b"a,b\n1,\xff\n", "line 2 is not UTF-8"),
        ('a,b\n1,"x\n', "line 2 is not CSV"),
        ('a,b\n1,"x"y\n', "line 2 is not CSV"),
        (b"a\xe9,b\n", "line 1 is not UTF-8"),
    ],
)
def test_a_malformed_csv_is_named(tmp_path: Path, content: str | bytes, why: str) -> None:
    with pytest.raises(DataError, match=why):
        read(tmp_path, "x.csv", content)


def test_fields_may_be_longer_than_the_csv_module_thinks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = csv.field_size_limit()
    assert read(tmp_path, "x.csv", "a\n" + "x" * (before + 1))[0][1]["a"] == "x" * (before + 1)
    assert csv.field_size_limit() == before
    monkeypatch.setattr(module, "MAX_FIELD_CHARS", 10)
    with pytest.raises(DataError, match="line 2 is not CSV"):
        read(tmp_path, "x.csv", "a\n" + "x" * 11)


@given(
    rows=st.lists(
        st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"])), min_size=2, max_size=2),
        max_size=5,
    )
)
def test_what_is_written_as_csv_is_read(rows: list[list[str]]) -> None:
    import tempfile

    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["q", "a"])
    writer.writerows(rows)
    with tempfile.TemporaryDirectory() as folder:
        found = read(Path(folder), "x.csv", buffer.getvalue())
    assert [value for _, value in found] == [dict(zip("qa", row, strict=True)) for row in rows]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": "é"}], "n": None}, {"messages": [], "n": 2}]
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = list(records(path))
    assert [record.row for record in found] == rows
    assert found[1].location == f"{path}: row 1"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="parquet cannot be read from row 0 on"):
        list(records(path))


def test_parquet_of_every_type(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    far = pyarrow.array([3_000_000_000 // 1000, -5_000_000], pyarrow.int32())
    columns = {
        "text": pyarrow.array(["a", "b"], pyarrow.large_string()),
        "source": pyarrow.array(["x", "x"]).dictionary_encode(),
        "date": far.cast(pyarrow.date32()),
        "stamp": pyarrow.array([9 * 10**17] * 2, pyarrow.timestamp("us")),
        "time": pyarrow.array([1, 2], pyarrow.time64("us")),
        "cost": pyarrow.array([1, 2]).cast(pyarrow.decimal128(22, 2)),
        "pairs": pyarrow.array([[("k", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "__index_level_0__": pyarrow.array([5, 6]),
    }
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    rows = [record.row for record in records(path)]
    assert [row["text"] for row in rows] == ["a", "b"]
    assert list(rows[0]) == [name for name in columns if name != "__index_level_0__"]
    assert rows[0]["date"] == "10183-09-21"
    nested = {"a": pyarrow.array([{"d": 1}], pyarrow.struct([("d", pyarrow.int32())]))}
    dates = nested["a"].cast(pyarrow.struct([("d", pyarrow.date32())]))
    parquet.write_table(pyarrow.table({"a": dates}), path)
    assert len(list(records(path))) == 1
    far_dates = pyarrow.StructArray.from_arrays([columns["date"]], ["d"])
    parquet.write_table(pyarrow.table({"a": far_dates}), path)
    with pytest.raises(DataError, match="parquet cannot be read from row 0 on"):
        list(records(path))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow; run `pip install '\.\[report\]'`"):
        read(tmp_path, "x.parquet", b"PAR1")


def test_files_that_are_not_there_or_unknown(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="reading failed"):
        list(records(tmp_path / "x.jsonl"))
    with pytest.raises(DataError, match="reading failed"):
        list(records(tmp_path.with_suffix(".json")))
    with pytest.raises(DataError, match=r"file type is .xlsx, expected .jsonl"):
        list(records(tmp_path / "x.xlsx"))
    with pytest.raises(DataError, match="file type is none"):
        list(records(tmp_path / "x"))


def test_lines_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"a": 1}) + "\nnot json\n")
    assert next(records(path)).row == {"a": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.csv.gz"])
def test_utf_16_is_named(tmp_path: Path, name: str) -> None:
    content = "a,b\n1,2\n".encode("utf-16")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(DataError, match="text is UTF-16, expected UTF-8"):
        list(records(tmp_path / name))
