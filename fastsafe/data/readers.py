"""Read rows of fine-tuning data from a file, strictly: a bad row is an error with its place."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from fastsafe.data.conversation import kind_of
from fastsafe.errors import DataError

_LINES = (".jsonl", ".ndjson")
_DOCUMENT = (".json",)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read every row of a JSON Lines file (.jsonl, .ndjson) or of a JSON list (.json).

    Args:
        path: UTF-8, with or without a byte-order mark; blank lines are skipped.

    Returns:
        The rows in file order, each of one of the kinds of ``fastsafe.data.conversation``.

    Raises:
        DataError: The file is missing, empty or of an unknown type, or a row is malformed; the
            message has the line number, counted from 1, or the index in the list, from 0.
    """
    file = Path(path)
    if file.suffix not in _LINES + _DOCUMENT:
        raise DataError(
            f"{file}: file type is {file.suffix or 'none'}, expected .jsonl, .ndjson or .json; "
            "convert it"
        )
    try:
        data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(
            f"{file}: reading failed ({error.strerror}), expected a file of rows; check the path"
        ) from error
    rows = []
    for where, row in _lines(data, file) if file.suffix in _LINES else _elements(data, file):
        kind_of(row, where)
        rows.append(row)
    if not rows:
        raise DataError(f"{file}: rows are 0, expected one or more; check the file")
    return rows


def _lines(data: bytes, file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            where = f"{file}: line {number}"
            yield where, _parse(line, where)


def _elements(data: bytes, file: Path) -> Iterator[tuple[str, Any]]:
    rows = _parse(data, str(file))
    if not isinstance(rows, list):
        raise DataError(
            f"{file}: content is {type(rows).__name__}, expected a list of rows; "
            "write [row, row, ...], or one row per line in a .jsonl file"
        )
    for index, row in enumerate(rows):
        yield f"{file}: row {index}", row


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
