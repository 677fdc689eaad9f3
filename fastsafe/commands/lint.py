"""Lint a data set: read its rows with the labels of their columns, and apply the rules."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastsafe.data import shapes
from fastsafe.data.conversation import Row
from fastsafe.data.exchange import exchange_of
from fastsafe.data.prompt_lists import read_prompts
from fastsafe.data.records import records
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


class LabelledSet(NamedTuple):
    """The rows of a file with their labels.

    Attributes:
        rows: Training rows with the columns of ``LABELS`` that they have.
        left_out: Columns, and keys of turns, that nothing reads.
    """

    rows: list[dict[str, Any]]
    left_out: tuple[str, ...]


def read_labelled_set(path: Path, mapping: Mapping[str, str] | None = None) -> LabelledSet:
    """Read training rows with the labels of their columns.

    Args:
        path: As ``fastsafe.data.records`` reads it. The shape of each row is found separately: one
            of ``fastsafe.data.shapes``, or the columns query and response, as in the safety set of
            the first paper, or prompt and response.
        mapping: Column for each role; see ``fastsafe.data.shapes.mapped``.

    Raises:
        DataError: The file is missing or empty, or a row is malformed or of an unknown shape.
        UsageError: The mapping makes no row.
    """
    mapped = shapes.mapped(mapping) if mapping else None
    rows: list[dict[str, Any]] = []
    left_out: dict[str, None] = {}
    for location, _, record in records(path):
        # a table has every column in every row: null means that the row lacks it
        raw = {key: value for key, value in record.items() if value is not None}
        shape = mapped or _shape_of(raw, location)
        labels = {key: raw[key] for key in LABELS if raw.get(key) and _is_label(raw[key])}
        rows.append({**labels, **shapes.training_row(shape, raw, location)})
        unread = (key for key in shapes.left_out(shape, raw) if key not in labels)
        left_out |= dict.fromkeys(unread)
    if not rows:
        raise DataError(f"{path}: rows are 0, expected one or more")
    return LabelledSet(rows, tuple(left_out))


def read_probes(path: Path) -> list[str]:
    """Read probe texts: lines of a .txt file, or the prompts of behaviours or rows.

    Raises:
        DataError: The file is missing, malformed or empty.
    """
    if path.suffix.lower() == ".txt":
        texts = [prompt.text for prompt in read_prompts(path)]
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
    mapping: Mapping[str, str] | None = None,
    tokenizer: str | None = None,
) -> Report:
    """Lint the rows of a file.

    Args:
        path: As `read_labelled_set` reads it, with ``mapping``.
        kind: As `lint` takes it, with ``declared``.
        probes: Files of texts that no row may hold.
        declared: Declarations about the set.
        mapping: Column for each role.
        tokenizer: Checkpoint; a note says how many rows hold text that its vocabulary lacks.

    Raises:
        DataError: A file is missing or malformed.
        TokenizerError: The tokenizer is.
        CheckpointError: There is no such checkpoint.
    """
    rows, left_out = read_labelled_set(Path(path), mapping)
    texts = [text for file in probes for text in read_probes(Path(file))]
    try:
        report = lint(rows, kind=kind, probes=texts, declared=declared)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    notes = [f"columns left out: {', '.join(map(ascii, left_out))}"] if left_out else []
    notes += _unknown_words(rows, tokenizer) if tokenizer else []
    return replace(report, notes=(*report.notes, *notes))


def _unknown_words(rows: Sequence[Row], checkpoint: str) -> list[str]:
    """Return a note on the rows whose last exchange the vocabulary of a checkpoint cannot write."""
    from fastsafe.io import hub
    from fastsafe.io.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(hub.resolve(checkpoint))
    exchanges = (exchange_of(row, f"row {i}") for i, row in enumerate(rows))
    unknown = [
        sum(tokenizer.encode(text).count(tokenizer.unk_id) for text in exchange)
        for exchange in exchanges
        if tokenizer.unk_id is not None
    ]
    num_rows = sum(n > 0 for n in unknown)
    if not num_rows:
        return []
    return [f"{sum(unknown):,} tokens in {num_rows:,} rows are unknown to the vocabulary"]


def _shape_of(raw: Mapping[str, Any], location: str) -> shapes.RowShape:
    by_name = {key.casefold(): key for key in raw}
    for keys in _PAIRS:
        if all(key in by_name for key in keys) and "completion" not in by_name:
            names = (by_name[key] for key in keys)
            return shapes.mapped(dict(zip(("user", "assistant"), names, strict=True)))
    return shapes.shape_of(raw, location)


def _is_label(value: Any) -> bool:
    return isinstance(value, str | bool | int | float)


def _probe_texts(record: Mapping[str, Any], location: str) -> list[str]:
    by_name = {key.casefold(): value for key, value in record.items()}
    texts = [by_name[key] for key in _PROBE_COLUMNS if isinstance(by_name.get(key), str)]
    if texts:
        return texts
    raw = {key: value for key, value in record.items() if value is not None}
    row = shapes.training_row(_shape_of(raw, location), raw, location)
    return [exchange_of(row, location).prompt]
