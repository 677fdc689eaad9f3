"""Rows of data files, as mappings with their numbers: JSONL, JSON, CSV, TSV, also in xz; parquet.

Only tasks and benchmarks read through this: they need a public data set's own columns, whole and
unchanged, where training data is brought into the shape of a conversation first.
"""

import csv
import hashlib
import json
import lzma
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from fastsafe.errors import DataError, UsageError

MAX_JSON_CHARS = 256 * 2**20  # one value is read whole
MAX_FIELD_CHARS = 100 * 2**20  # a quoted field that never ends must not fill the memory

Row = Mapping[str, Any]


def read_rows(path: str | Path) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a file one by one, each with its number from 1, header excluded.

    Args:
        path: ``*.jsonl``, ``*.json`` (a list of objects, at most `MAX_JSON_CHARS`), ``*.csv``,
            ``*.tsv`` (UTF-8, with or without a byte-order mark; also ``*.xz``) or ``*.parquet``
            (needs pyarrow). A CSV field may hold line breaks.

    Raises:
        DataError: The file is missing, of another kind or malformed; the row is named.
        UsageError: The file is parquet and pyarrow is not installed.
    """
    path = Path(path)
    kind = suffix_of(path)
    try:
        if kind == ".parquet":
            yield from _parquet(path)
        elif kind in (".csv", ".tsv"):
            yield from _csv(path, "\t" if kind == ".tsv" else ",")
        elif kind == ".jsonl":
            yield from _jsonl(path)
        elif kind == ".json":
            yield from _json(path)
        else:
            raise DataError(
                f"{path}: ends in {kind or None!r}, expected .jsonl, .json, .csv, .tsv, .parquet; "
                "convert or rename it"
            )
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason})") from error


def suffix_of(path: Path) -> str:
    """Kind of a file by its name, in lower case, without a last ``.xz``."""
    return Path(path.stem if path.suffix.lower() == ".xz" else path.name).suffix.lower()


def open_text(path: Path) -> IO[str]:
    """Open UTF-8 text with its line breaks as they are; a byte-order mark is dropped."""
    if path.suffix.lower() == ".xz":
        return lzma.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes, in hex.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def csv_records(path: Path, file: IO[str], delimiter: str = ",") -> Iterator[list[str]]:
    """Yield the records of a CSV file, header included.

    Raises:
        DataError: The file is not CSV; the line is named.
    """
    csv.field_size_limit(MAX_FIELD_CHARS)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    try:
        yield from (record for record in reader if record)
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: not CSV ({error})") from error


def _csv(path: Path, delimiter: str) -> Iterator[tuple[int, Row]]:
    with open_text(path) as file:
        records = csv_records(path, file, delimiter)
        header = next(records, None)
        if header is None or len(set(header)) != len(header):
            raise DataError(f"{path}: header is {header}, expected distinct column names")
        for number, record in enumerate(records, start=1):
            if len(record) != len(header):
                raise DataError(
                    f"{path}: row {number}: {len(record)} fields, expected {len(header)} as in the "
                    "header"
                )
            yield number, dict(zip(header, record, strict=True))


def _jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    with open_text(path) as file:
        number = 0
        for line in file:
            if not line.strip():
                continue
            number += 1
            yield number, _object(_parsed(line, f"{path}: row {number}"), f"{path}: row {number}")


def _json(path: Path) -> Iterator[tuple[int, Row]]:
    with open_text(path) as file:
        text = file.read(MAX_JSON_CHARS + 1)
    if len(text) > MAX_JSON_CHARS:
        raise DataError(f"{path}: is longer than {MAX_JSON_CHARS} characters; write JSONL instead")
    rows = _parsed(text, str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path}: is {type(rows).__name__}, expected a list of objects")
    for number, row in enumerate(rows, start=1):
        yield number, _object(row, f"{path}: row {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from error


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: is {type(row).__name__}, expected an object")
    return row


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError(
            f"{path}: parquet needs pyarrow, which is not installed; "
            "pip install 'fastsafe[report]' or convert the file to JSONL"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except arrow.ArrowException as error:
        raise DataError(f"{path}: after row {number}: not parquet ({error})") from error
