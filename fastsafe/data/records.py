"""Read a file of data record by record, strictly: what is malformed is an error with its place."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from fastsafe.errors import DataError

MAX_FIELD_CHARS = 100 << 20  # of a CSV; the csv module's own limit, 128 Ki, is less than a paper

_BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """One record as the file holds it."""

    where: str  # "train.jsonl: line 3", for errors
    value: Any


def records(path: Path) -> Iterator[Record]:
    """Read a file by its suffix.

    - .jsonl, .ndjson: one value per line; blank lines are skipped.
    - .json: a list.
    - .csv: RFC 4180 with a header; fields are texts. Lines are counted where a record begins.
    - .parquet: columns become keys; needs pyarrow.

    Args:
        path: Text is UTF-8, with or without a byte-order mark.

    Raises:
        DataError: The file is missing or of an unknown type, or a record is malformed; the message
            has the line, counted from 1, or the index of a list or table, from 0.
    """
    readers = {
        ".jsonl": _lines,
        ".ndjson": _lines,
        ".json": _elements,
        ".csv": _csv_records,
        ".parquet": _parquet_rows,
    }
    if path.suffix.lower() not in readers:
        raise DataError(
            f"{path}: file type is {path.suffix or 'none'}, expected {', '.join(readers)}; "
            "convert it"
        )
    try:
        with path.open("rb") as file:
            yield from readers[path.suffix.lower()](file, path)
    except OSError as error:
        raise DataError(
            f"{path}: reading failed ({error.strerror}), expected a file of rows; check the path"
        ) from error


def _lines(file: BinaryIO, path: Path) -> Iterator[Record]:
    for number, line in enumerate(file, start=1):
        text = line.removeprefix(_BOM) if number == 1 else line
        if text.strip():
            where = f"{path}: line {number}"
            yield Record(where, _parse(text, where))


def _elements(file: BinaryIO, path: Path) -> Iterator[Record]:
    values = _parse(file.read().removeprefix(_BOM), str(path))
    if not isinstance(values, list):
        raise DataError(
            f"{path}: content is {type(values).__name__}, expected a list of rows; "
            "write [row, row, ...], or one row per line in a .jsonl file"
        )
    for index, value in enumerate(values):
        yield Record(f"{path}: row {index}", value)


def _parse(data: bytes, where: str) -> Any:
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate has no UTF-8
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: content is not JSON ({ascii(str(error))[1:-1][:160]}), expected one object "
            "in UTF-8; mend or remove it"
        ) from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key appears twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


class _Text:
    """Lines of a CSV as text, with the number of the last one that was taken."""

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
                raise self.error("is not UTF-8, expected that") from None

    def error(self, what: str) -> DataError:
        """Say what is wrong with the current line."""
        return DataError(f"{self._path}: line {self.number} {what}; mend or remove it")


def _csv_records(file: BinaryIO, path: Path) -> Iterator[Record]:
    text = _Text(file, path)
    reader = csv.reader(iter(text), strict=True)
    header: list[str] | None = None
    begin = 1
    while True:
        fields = _next(reader, text)
        if fields is None:
            return
        where, begin = f"{path}: line {begin}", text.number + 1
        if not fields:
            continue  # a blank line
        if header is None:
            header = fields
            if len(set(header)) < len(header) or "" in header:
                raise DataError(
                    f"{where}: header has columns {', '.join(header)!a:.200}, expected each with "
                    "a name of its own; rename them"
                )
        elif len(fields) != len(header):
            raise DataError(
                f"{where}: fields are {len(fields)}, expected {len(header)} as in the header; "
                "quote fields that hold commas or newlines"
            )
        else:
            yield Record(where, dict(zip(header, fields, strict=True)))


def _next(reader: Any, text: _Text) -> list[str] | None:
    limit = csv.field_size_limit(MAX_FIELD_CHARS)  # a setting of the process: put back at once
    try:
        fields: list[str] | None = next(reader, None)
    except csv.Error as error:
        raise text.error(f"is not CSV ({error}), expected fields as RFC 4180 has them") from None
    finally:
        csv.field_size_limit(limit)
    return fields


def _parquet_rows(file: BinaryIO, path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(
            f"{path}: reading parquet needs pyarrow; run `pip install fastsafe[report]` or convert "
            "the file to .jsonl"
        ) from None
    index = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                yield Record(f"{path}: row {index}", row)
                index += 1
    except ArrowException as error:
        raise DataError(
            f"{path}: parquet cannot be read from row {index} on "
            f"({ascii(str(error))[1:-1][:160]}), expected a whole file; write it again"
        ) from None
