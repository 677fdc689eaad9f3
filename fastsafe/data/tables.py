"""Rows of data files with their numbers, and what ``fastsafe.data.records`` does not read.

Tasks and benchmarks need a public data set's own columns, whole and unchanged, where training data
is brought into the shape of a conversation first. Some of their files are tables without a header,
separated by tabs, or packed.
"""

import csv
import lzma
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastsafe.data.records import MAX_FIELD_CHARS, records
from fastsafe.errors import DataError

Row = Mapping[str, Any]


def read_rows(path: str | Path) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a file one by one, each with its number from 1, header excluded.

    Args:
        path: As `records`; also ``*.tsv``, and any of them as ``*.xz``.

    Raises:
        DataError: The file is missing, of another kind or malformed; the row or line is named.
    """
    path = Path(path)
    if path.suffix.lower() == ".xz":
        yield from _unpacked(path)
    elif path.suffix.lower() == ".tsv":
        yield from enumerate(_tab_separated(path), start=1)
    else:
        for number, (where, value) in enumerate(records(path), start=1):
            if not isinstance(value, Mapping):
                raise DataError(f"{where}: row is {type(value).__name__}, expected an object")
            yield number, value


def table(path: Path, delimiter: str = ",") -> Iterator[list[str]]:
    """Yield the records of a table as fields; whether the first is a header nobody decides here.

    Args:
        path: UTF-8, with or without a byte-order mark. Fields are quoted as RFC 4180 has them;
            blank lines are skipped.
        delimiter: One character.

    Raises:
        DataError: The file cannot be read or is no such table; the line is named.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            while (fields := _next(reader, path)) is not None:
                if fields:
                    yield fields
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file") from error


def _next(reader: Any, path: Path) -> list[str] | None:
    limit = csv.field_size_limit(MAX_FIELD_CHARS)  # a setting of the process: put back at once
    try:
        fields: list[str] | None = next(reader, None)
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num} is not CSV ({error}); mend it") from error
    finally:
        csv.field_size_limit(limit)
    if fields and any("\0" in field for field in fields):
        raise DataError(f"{path}: line {reader.line_num} has a NUL character; mend or remove it")
    return fields


def _tab_separated(path: Path) -> Iterator[Row]:
    lines = table(path, "\t")
    header = next(lines, [])
    for number, fields in enumerate(lines, start=1):
        if len(fields) != len(header):
            raise DataError(
                f"{path}: row {number}: fields are {len(fields)}, expected {len(header)} as in the "
                "header"
            )
        yield dict(zip(header, fields, strict=True))


def _unpacked(path: Path) -> Iterator[tuple[int, Row]]:
    with TemporaryDirectory() as folder:
        plain = Path(folder, path.stem)
        try:
            with lzma.open(path) as packed, plain.open("wb") as file:
                shutil.copyfileobj(packed, file)
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise DataError(f"{path}: cannot be unpacked ({error}); download it again") from error
        try:
            yield from read_rows(plain)
        except DataError as error:
            raise DataError(str(error).replace(str(plain), str(path))) from None
