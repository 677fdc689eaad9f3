"""Behaviours: what a harmful prompt asks for, and its benign twin.

A behaviour is a pair of action phrases, not of prompts: a format dresses the phrase as the input
of one task, so that the same intent can be asked in every format.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsafe.errors import DataError

MAX_FILE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Behaviour:
    """One harmful intent and a harmless one with the same words around it."""

    behavior_id: str  # unique in a run: the key that pairs formats, twins and arms
    harmful: str  # action phrase, e.g. "steal the red car"
    benign: str  # its benign twin, e.g. "paint the red car"; "" where there is none
    category: str = ""

    def action(self, harmful: bool) -> str:
        """Phrase of the harmful probe, or of its benign twin."""
        return self.harmful if harmful else self.benign


def read_behaviours(path: str | Path) -> list[Behaviour]:
    """Read behaviours from a JSONL or CSV file.

    Args:
        path: ``*.csv`` with a header row, or one JSON object per line; UTF-8, columns
            ``behavior_id`` (row number when absent), ``harmful``, ``benign`` and ``category``
            (both optional). Other columns are refused: a misspelt one would be lost.

    Returns:
        Behaviours in the order of the file, at least one, with unique ids.

    Raises:
        DataError: The file is missing, malformed, empty or repeats an id; the message names the
            row (counted from 1, header excluded).
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(
                f"{path}: the file is {path.stat().st_size} bytes, expected at most "
                f"{MAX_FILE_BYTES}; split it"
            )
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file") from error
    rows = _csv_rows if path.suffix.lower() == ".csv" else _jsonl_rows
    found: dict[str, Behaviour] = {}
    for number, row in enumerate(rows(path, text), start=1):
        behaviour = _behaviour(row, number, f"{path}: row {number}")
        if behaviour.behavior_id in found:
            raise DataError(f"{path}: row {number}: behavior_id {behaviour.behavior_id!r} repeats")
        found[behaviour.behavior_id] = behaviour
    if not found:
        raise DataError(f"{path}: no behaviours, expected at least one row")
    return list(found.values())


def _csv_rows(path: Path, text: str) -> Iterator[Mapping[str, Any]]:
    # newline="": a quoted field may hold line breaks, which the csv module must see as they are
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    if reader.fieldnames is None or "harmful" not in reader.fieldnames:
        raise DataError(f"{path}: header is {reader.fieldnames}, expected a column 'harmful'")
    try:
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                raise DataError(f"{path}: row {number}: wrong number of fields for the header")
            yield row
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: not CSV ({error})") from error


def _jsonl_rows(path: Path, text: str) -> Iterator[Mapping[str, Any]]:
    lines = (line for line in text.split("\n") if line.strip())
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}: row {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number}: is {type(row).__name__}, expected an object")
        yield row


def _behaviour(row: Mapping[str, Any], number: int, where: str) -> Behaviour:
    known = ("behavior_id", "harmful", "benign", "category")
    if unknown := sorted(set(row) - set(known)):
        raise DataError(f"{where}: unknown column {unknown[0]!r}, expected {', '.join(known)}")
    text: dict[str, str] = {}
    for column in known:
        value = row.get(column, str(number) if column == "behavior_id" else "")
        if not isinstance(value, str):
            raise DataError(f"{where}: {column} is {type(value).__name__}, expected a string")
        text[column] = value.strip()
    for column in ("behavior_id", "harmful"):
        if not text[column]:
            raise DataError(f"{where}: {column} is empty, expected a phrase")
    return Behaviour(**text)
