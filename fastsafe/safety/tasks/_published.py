"""Read files of tasks as they were published, where they are no table with a header and no JSON."""

from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path

from fastsafe.data.records import Record, json_lines, records, suffix_of, table, text_lines
from fastsafe.errors import DataError


def beside_labels(path: Path) -> Iterator[Record]:
    """Read rows whose labels are in a file of their own: ``NAME.jsonl`` and ``NAME-labels.lst``.

    Raises:
        DataError: One of the files is malformed, or they differ in length.
    """
    labels = path.with_name(path.name.removesuffix("".join(path.suffixes)) + "-labels.lst")
    rows = records(path)
    first = next(rows, None)
    if first is None or "label" in first.row or not labels.is_file():
        yield from () if first is None else chain([first], rows)
        return
    for found, label in zip_longest(chain([first], rows), text_lines(labels)):
        if found is None or label is None:
            fewer, more = (path, labels) if found is None else (labels, path)
            raise DataError(
                f"{fewer}: has fewer rows than {more.name}, expected one label for each row; "
                "download both again"
            )
        yield found._replace(row=found.row | {"label": label[1]})


def without_header(path: Path, columns: str) -> Iterator[Record]:
    """Read a CSV file that may lack its header.

    Args:
        path: The file; another suffix than .csv is read as `records` does.
        columns: Names of its columns, separated by blanks.

    Raises:
        DataError: The file is malformed, or a row has another number of fields.
    """
    names = columns.split()
    lines = table(path) if suffix_of(path) == ".csv" else iter(())
    first = next(lines, None)
    if first is None or len(first[1]) != len(names) or set(first[1]) == set(names):
        yield from records(path)
        return
    for number, (line, fields) in enumerate(chain([first], lines)):
        location = f"{path}: row {number}, line {line}"
        if len(fields) != len(names):
            raise DataError(
                f"{location}: fields are {len(fields)}, expected {len(names)}: {', '.join(names)};"
                " quote fields that hold commas"
            )
        yield Record(location, line, dict(zip(names, fields, strict=True)))


def sentences_and_labels(path: Path) -> Iterator[Record]:
    """Read ``sentence@label`` lines of a .txt file, which may be in Latin-1.

    Raises:
        DataError: A line has no label.
    """
    if suffix_of(path) != ".txt":
        yield from records(path)
        return
    for number, (line, content) in enumerate(text_lines(path, fallback="latin-1")):
        location = f"{path}: row {number}, line {line}"
        sentence, mark, label = content.rpartition("@")
        if not mark:
            raise DataError(
                f"{location}: has no '@', expected a sentence, '@' and its label; remove the line"
            )
        yield Record(location, line, {"sentence": sentence.strip(), "label": label.strip()})


def json_in_text(path: Path) -> Iterator[Record]:
    """Read JSON lines from a .txt file, other files as `records` does."""
    return json_lines(path) if suffix_of(path) == ".txt" else records(path)
