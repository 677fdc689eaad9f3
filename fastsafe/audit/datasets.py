"""Data sets on disk: their rows, what columns say about them, and their lint."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fastsafe.data.conversation import kind_of
from fastsafe.errors import DataError
from fastsafe.safety.exchange import exchange_of
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
# pairs of columns that are a request and its answer, whatever their case
_PAIRS = (
    ("query", "response"),
    ("instruction", "output"),
    ("prompt", "response"),
    ("question", "answer"),
)
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
        path: .jsonl, .json or .csv, UTF-8. Rows of ``fastsafe.data.conversation``, or with the
            columns query and response (as the first paper's safety set has them), instruction,
            input and output, prompt and response, or question and answer.

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
) -> tuple[Report, list[dict[str, Any]]]:
    """Lint a file; returns its rows too.

    Raises:
        DataError: A file is missing or malformed.
    """
    rows = read_rows(path)
    texts = [text for each in probes for text in read_probes(each)]
    return lint(rows, kind=kind, probes=texts, declared=declared), rows


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every record and its place."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        found: Any = _csv(path)
    elif suffix == ".json":
        found = _parsed(_text(path), f"{path}")
        if not isinstance(found, list):
            raise DataError(f"{path}: JSON is {type(found).__name__}, expected a list of rows")
    elif suffix in (".jsonl", ".ndjson"):
        lines = enumerate(_text(path).split("\n"), start=1)
        found = (_parsed(line, f"{path}: line {n}") for n, line in lines if line.strip())
    else:
        raise DataError(f"{path}: suffix is {suffix!r}, expected .jsonl, .json or .csv")
    for i, value in enumerate(found):
        if not isinstance(value, Mapping):
            raise DataError(f"{path}: row {i}: is {type(value).__name__}, expected an object")
        yield f"{path}: row {i}", value


def _csv(path: Path) -> Iterator[dict[str, str]]:
    # newline="": a quoted field may hold line breaks, which the csv module must see as they are
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for i, row in enumerate(reader):
            if None in row or None in row.values():
                raise DataError(f"{path}: row {i}: wrong number of fields for the header")
            yield {column: value for column, value in row.items() if column}  # an unnamed index
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: not CSV ({error})") from None


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None


def _row(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    labels = {key: value[key] for key in LABELS if value.get(key) not in (None, "")}
    for keys in (("messages",), ("prompt", "completion"), ("text",)):
        if all(key in value for key in keys):
            row = {key: value[key] for key in keys}
            kind_of(row, where)
            return {**labels, **row}
    named = {key.casefold(): text for key, text in value.items()}
    for request, answer in _PAIRS:
        if request in named and answer in named:
            texts = [named[request], named[answer]]
            if named.get("input"):
                texts[0] = f"{texts[0]}\n{named['input']}"
            turns = [
                {"role": role, "content": text}
                for role, text in zip(("user", "assistant"), texts, strict=True)
            ]
            kind_of({"messages": turns}, where)
            return {**labels, "messages": turns}
    found = ", ".join(map(str, value)) or "none"
    known = "; ".join(", ".join(pair) for pair in _PAIRS)
    raise DataError(
        f"{where}: columns are {found!a:.200}, expected messages; prompt, completion; text; {known}"
    )


def _probe_texts(value: Mapping[str, Any], where: str) -> list[str]:
    named = {key.casefold(): text for key, text in value.items()}
    texts = [named[key] for key in _PROBE_COLUMNS if isinstance(named.get(key), str)]
    return texts or [exchange_of(_row(value, where), where).prompt]
