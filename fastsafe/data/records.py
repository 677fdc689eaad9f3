"""Read the rows of a data file strictly: a malformed row is an error that names its file and line.

Every command reads its data with this module: ``records`` goes by the suffix of the file,
``json_lines`` ignores it, and ``table`` reads tables that may lack a header.
"""

import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from fastsafe.errors import DataError

MAX_FIELD_CHARS = 100 << 20  # the default of the csv module, 128 Ki, is less than a paper

_BOM = b"\xef\xbb\xbf"
_PACKED = (".gz", ".xz")

_Numbered = tuple[str, int, Any]  # "line" or "row", its number, and the value there


class Record(NamedTuple):
    """One row as the file holds it.

    Attributes:
        location: File and place, such as "train.jsonl: line 3", for errors.
        number: Line where the row begins, from 1; in a JSON list or Parquet its index, from 0.
        row: Values by key or column.
    """

    location: str
    number: int
    row: dict[str, Any]


def records(path: Path) -> Iterator[Record]:
    """Read the rows of a file by its suffix.

    - .jsonl, .ndjson: one object per line; blank lines are skipped.
    - .json: a list of objects.
    - .csv, .tsv: a header, then texts, quoted as in RFC 4180. Columns without a name are dropped,
      such as the index that pandas writes.
    - .parquet: columns become keys; needs pyarrow.

    Args:
        path: Any of these, or one compressed as .gz or .xz. Text is UTF-8, with or without a
            byte-order mark.

    Raises:
        DataError: The file is missing or of an unknown type, or a row is malformed.
    """
    kind = Path(path.stem if path.suffix.lower() in _PACKED else path.name).suffix.lower()
    if kind not in _READERS:
        raise DataError(
            f"{path}: file type is {kind or 'none'}, expected {', '.join(_READERS)}, or one of "
            "them as .gz or .xz; convert it"
        )
    return _read(path, kind)


def json_lines(path: Path) -> Iterator[Record]:
    """Read one object per line, whatever the name of the file.

    Raises:
        DataError: As `records`.
    """
    return _read(path, ".jsonl")


def table(path: Path) -> Iterator[list[str]]:
    """Read the rows of a CSV file as lists of fields, the header included if there is one.

    Raises:
        DataError: As `records`.
    """
    with _opened(path) as file:
        for _, fields in _fields(file, path, ","):
            yield fields


def _read(path: Path, kind: str) -> Iterator[Record]:
    with _opened(path) as file:
        for unit, number, value in _READERS[kind](file, path):
            location = f"{path}: {unit} {number}"
            if not isinstance(value, dict):
                raise DataError(
                    f"{location}: row is {type(value).__name__}, expected an object with keys; "
                    "write one per row"
                )
            yield Record(location, number, value)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, decompressed; failures to read it become errors that name it."""
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error  # a decompressor's has none
        raise DataError(
            f"{path}: reading failed ({reason}), expected a whole file of rows; check the path, or "
            "replace the file"
        ) from error


def _lines(file: BinaryIO, path: Path) -> Iterator[_Numbered]:
    for number, line in enumerate(file, start=1):
        text = line.removeprefix(_BOM) if number == 1 else line
        if text.strip():
            yield "line", number, _parse(text, f"{path}: line {number}")


def _list(file: BinaryIO, path: Path) -> Iterator[_Numbered]:
    values = _parse(file.read().removeprefix(_BOM), str(path))
    if not isinstance(values, list):
        raise DataError(
            f"{path}: content is {type(values).__name__}, expected a list of rows; "
            "write [row, row, ...], or one row per line in a .jsonl file"
        )
    for index, value in enumerate(values):
        yield "row", index, value


def _parse(data: bytes, location: str) -> Any:
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate has no UTF-8
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{location}: content is not JSON ({ascii(str(error))[1:-1][:160]}), expected one "
            "object in UTF-8; correct or remove it"
        ) from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key appears twice")
    return row


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _table_rows(delimiter: str, file: BinaryIO, path: Path) -> Iterator[_Numbered]:
    header: list[str] | None = None
    for number, fields in _fields(file, path, delimiter):
        if header is None:
            header = fields
            named = [name for name in header if name]
            if len(set(named)) < len(named):
                raise DataError(
                    f"{path}: line {number}: header has columns {', '.join(header)!a:.200}, "
                    "expected different names; rename them"
                )
        elif len(fields) != len(header):
            raise DataError(
                f"{path}: line {number}: fields are {len(fields)}, expected {len(header)} as in "
                "the header; quote fields that hold delimiters or newlines"
            )
        else:
            row = zip(header, fields, strict=True)
            yield "line", number, {name: field for name, field in row if name}


def _fields(file: BinaryIO, path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the fields of each row with the number of its first line; blank lines are skipped."""
    lines = _TextLines(file, path)
    reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    while True:
        first = lines.number + 1
        limit = csv.field_size_limit(MAX_FIELD_CHARS)  # global to the process: restored at once
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise lines.error(f"is not CSV ({error}), expected fields as in RFC 4180") from None
        finally:
            csv.field_size_limit(limit)
        if fields is None:
            return
        if fields:
            yield first, fields


class _TextLines:
    """Lines of a table as text, with the number of the last one read."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.number += 1
            if b"\0" in line:
                raise self.error("has a NUL character, expected text")
            try:
                yield (line.removeprefix(_BOM) if self.number == 1 else line).decode()
            except UnicodeDecodeError:
                raise self.error("is not UTF-8") from None

    def error(self, problem: str) -> DataError:
        """Return an error about the current line."""
        return DataError(f"{self._path}: line {self.number} {problem}; correct or remove it")


def _parquet_rows(file: BinaryIO, path: Path) -> Iterator[_Numbered]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(
            f"{path}: reading parquet needs pyarrow; run `pip install '.[report]'` in the clone of "
            "fastsafe or convert the file to .jsonl"
        ) from None
    index = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                yield "row", index, row
                index += 1
    except ArrowException as error:
        raise DataError(
            f"{path}: parquet cannot be read from row {index} on "
            f"({ascii(str(error))[1:-1][:160]}), expected a whole file; write it again"
        ) from None


_READERS: dict[str, Callable[[BinaryIO, Path], Iterator[_Numbered]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _list,
    ".csv": partial(_table_rows, ","),
    ".tsv": partial(_table_rows, "\t"),
    ".parquet": _parquet_rows,
}
