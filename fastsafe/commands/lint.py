"""Lint a data set: read its rows with the labels of their columns, and apply the rules."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fastsafe.data.conversation import kind_of
from fastsafe.data.exchange import exchange_of
from fastsafe.data.records import records
from fastsafe.data.shapes import shape_of
from fastsafe.errors import DataError
from fastsafe.safety.lint import Declared, Kind, Report, lint

# columns that describe a row; any other column that is not part of its text is dropped
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
# columns of safety sets that no training data has; case does not matter
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


def read_labelled_rows(path: Path) -> list[dict[str, Any]]:
    """Read training rows with the labels of their columns.

    Args:
        path: As ``fastsafe.data.records`` reads it. The shape of each row is found separately: one
            of ``fastsafe.data.shapes``, or the columns query and response, as in the safety set of
            the first paper, or prompt and response.

    Raises:
        DataError: The file is missing or empty, or a row is malformed or of an unknown shape.
    """
    rows = [_labelled(row, location) for location, _, row in records(path)]
    if not rows:
        raise DataError(f"{path}: rows are 0, expected one or more")
    return rows


def read_probes(path: Path) -> list[str]:
    """Read probe texts: lines of a .txt file, or the prompts of behaviours or rows.

    Raises:
        DataError: The file is missing, malformed or empty.
    """
    if path.suffix.lower() == ".txt":
        texts = [line.strip() for line in _read_text(path).splitlines()]
    else:
        texts = [text for location, _, row in records(path) for text in _probe_texts(row, location)]
    texts = [text for text in texts if text]
    if not texts:
        raise DataError(f"{path}: probes are 0, expected one or more")
    return texts


def lint_file(
    path: str | Path,
    *,
    kind: Kind | Literal["auto"] = "auto",
    probes: Sequence[str | Path] = (),
    declared: Declared | None = None,
) -> Report:
    """Lint the rows of a file.

    Args:
        path: Rows, as `read_labelled_rows` reads them.
        kind: Whether rows that do not say it should refuse or answer; "auto" finds it out.
        probes: Files of probes that no row may hold, as `read_probes` reads them.
        declared: Format, language and licence of rows that name none.

    Raises:
        DataError: A file is missing or malformed.
    """
    rows = read_labelled_rows(Path(path))
    texts = [text for file in probes for text in read_probes(Path(file))]
    return lint(rows, kind=kind, probes=texts, declared=declared)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file") from None


def _labelled(record: Mapping[str, Any], location: str) -> dict[str, Any]:
    # a table has every column in every row: null means that the row lacks it
    record = {key: value for key, value in record.items() if value is not None}
    labels = {key: record[key] for key in LABELS if record.get(key)}
    by_name = {key.casefold(): value for key, value in record.items()}
    for keys in _PAIRS:
        if all(key in by_name for key in keys) and "completion" not in by_name:
            texts = zip(("user", "assistant"), (by_name[key] for key in keys), strict=True)
            row = {"messages": [{"role": role, "content": text} for role, text in texts]}
            break
    else:
        row = shape_of(record, location).row(record, location)
    kind_of(row, location)
    return {**labels, **row}


def _probe_texts(record: Mapping[str, Any], location: str) -> list[str]:
    by_name = {key.casefold(): value for key, value in record.items()}
    texts = [by_name[key] for key in _PROBE_COLUMNS if isinstance(by_name.get(key), str)]
    return texts or [exchange_of(_labelled(record, location), location).prompt]
