"""The declaration of a benchmark, and helpers that its readers share."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastsafe.data.records import records
from fastsafe.errors import DataError, shown
from fastsafe.io.digest import file_sha256
from fastsafe.safety.behaviours import Behaviour, Origin


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One published set of prompts."""

    id: str
    licence: str
    commercial: bool | None  # whether the licence allows commercial use; None: unknown
    read: Callable[[Path, Origin], Iterator[Behaviour]]
    gated: bool = False  # whether access is granted on request


def rows(path: Path, *layouts: str) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """Yield the rows of a file with their locations for errors and their numbers from 1.

    Args:
        path: As `records`.
        *layouts: Column names, separated by blanks, of each published form.

    Raises:
        DataError: A row lacks a column of every layout; columns beyond them are ignored.
    """
    for number, (location, _, row) in enumerate(records(path), start=1):
        if not any(all(name in row for name in layout.split()) for layout in layouts):
            expected = ", or ".join(layout.replace(" ", ", ") for layout in layouts)
            raise DataError(
                f"{location}: columns are {', '.join(row) or 'none'!a:.200}, expected "
                f"{expected}; is it the right file?"
            )
        yield location, number, row


def words(row: Mapping[str, Any], column: str, location: str) -> str:
    """Return the text of a column, stripped.

    Raises:
        DataError: The value is no text, or empty.
    """
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{location}: {column} is {shown(value)}, expected a text; repair the file")
    return value.strip()


def request(
    id: str, text: str, number: int, origin: Origin, *, harmful: bool = True, category: str = ""
) -> Behaviour:
    """Return the request of row ``number`` as a behaviour with one side alone."""
    return Behaviour(
        id,
        text if harmful else "",
        "" if harmful else text,
        category=category,
        form="request",
        origin=origin,
        source_row=number,
    )


def files_sha256(path: Path) -> str:
    """Return the hash of a file, or of the hashes of a folder's files by name."""
    if not path.is_dir():
        return file_sha256(path)
    paths = sorted(file for file in path.iterdir() if file.is_file())
    return sha256("".join(map(file_sha256, paths)).encode()).hexdigest()
