"""Data sets on disk: their rows, what columns say about them, and their lint."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fastsafe.data.conversation import kind_of
from fastsafe.data.exchange import exchange_of
from fastsafe.data.records import Record, records
from fastsafe.data.shapes import shape_of
from fastsafe.data.tables import table
from fastsafe.errors import DataError
from fastsafe.safety.lint import Declared, Kind, Report, lint

# columns that say something about a row; any other one that makes no row is left out
LABELS = (
    "source",
    "expected",
    "safety_format",
    "task_format",
    "format",
    "lang",
    "language",
    "licence",
    "license",
)
# columns of safety sets that no training data has, whatever their case
_PAIRS = (("query", "response"), ("prompt", "response"))
_PROBE_COLUMNS = (
    "harmful",
    "benign",
    "behavior",
    "goal",
    "forbidden_prompt",
    "prompt",
    "query",
    "question",
    "instruction",
)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read rows and what their columns say about them.

    Args:
        path: As ``fastsafe.data.records`` reads it. Rows of any shape of ``fastsafe.data.shapes``,
            or with the columns query and response, as the first paper's safety set has them, or
            prompt and response; the shape of each row is found anew.

    Raises:
        DataError: The file is missing, malformed, of unknown columns, or empty.
    """
    rows = [_row(value, where) for where, value in _records(path)]
    if not rows:
        raise DataError(f"{path}: rows are 0, expected one or more")
    return rows


def read_probes(path: Path) -> list[str]:
    """Read probes: a text file with one per line, or behaviours, or rows with prompts.

    Raises:
        DataError: The file is missing, malformed or empty.
    """
    if path.suffix.lower() == ".txt":
        found = [line.strip() for line in _text(path).splitlines()]
    else:
        found = [text for where, value in _records(path) for text in _probe_texts(value, where)]
    found = [text for text in found if text]
    if not found:
        raise DataError(f"{path}: probes are 0, expected one or more")
    return found


def lint_file(
    path: Path,
    *,
    kind: Kind | Literal["auto"] = "auto",
    probes: Sequence[Path] = (),
    declared: Declared | None = None,
) -> Report:
    """Lint a file.

    Raises:
        DataError: A file is missing or malformed.
    """
    rows = read_rows(path)
    texts = [text for each in probes for text in read_probes(each)]
    return lint(rows, kind=kind, probes=texts, declared=declared)


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every record and its place."""
    is_csv = path.suffix.lower() == ".csv"
    for i, (_, value) in enumerate(_csv(path) if is_csv else records(path)):
        where = f"{path}: row {i}"
        if not isinstance(value, Mapping):
            raise DataError(f"{where}: is {type(value).__name__}, expected an object with keys")
        yield where, {key: each for key, each in value.items() if each is not None}


def _csv(path: Path) -> Iterator[Record]:
    """Read a CSV whose header may leave an index without a name, which `records` refuses."""
    lines = table(path)
    header = next(lines, [])
    for i, fields in enumerate(lines):
        if len(fields) != len(header):
            raise DataError(f"{path}: row {i}: wrong number of fields for the header")
        row = zip(header, fields, strict=True)
        yield Record(f"{path}: row {i}", {key: each for key, each in row if key})


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file") from None


def _row(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    labels = {key: value[key] for key in LABELS if value.get(key)}
    named = {key.casefold(): text for key, text in value.items()}
    for keys in _PAIRS:
        if all(key in named for key in keys) and "completion" not in named:
            texts = zip(("user", "assistant"), (named[key] for key in keys), strict=True)
            row = {"messages": [{"role": role, "content": text} for role, text in texts]}
            break
    else:
        row = shape_of(value, where).row(value, where)
    kind_of(row, where)
    return {**labels, **row}


def _probe_texts(value: Mapping[str, Any], where: str) -> list[str]:
    named = {key.casefold(): text for key, text in value.items()}
    texts = [named[key] for key in _PROBE_COLUMNS if isinstance(named.get(key), str)]
    return texts or [exchange_of(_row(value, where), where).prompt]
