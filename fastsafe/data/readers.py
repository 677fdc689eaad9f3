"""Read rows of fine-tuning data, whatever their shape: from files or from the hub."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsafe.data import shapes
from fastsafe.data.conversation import Row, kind_of
from fastsafe.data.packing import Encoder, Example, LossOn, encode_row
from fastsafe.data.records import records
from fastsafe.errors import DataError


@dataclass(frozen=True)
class Dataset:
    """Rows of one source.

    Attributes:
        source: What was read, for messages.
        shape: Name of the shape that was found.
        keys: Keys of the file that became the rows.
        left_out: Keys that no row needs.
        rows: Each of a kind of ``fastsafe.data.conversation``.
        places: File and line of each row.
    """

    source: str
    shape: str
    keys: tuple[str, ...]
    left_out: tuple[str, ...]
    rows: Sequence[Row]
    places: Sequence[str]

    def describe(self) -> str:
        """Return a line such as "alpaca (instruction, output), 1,203 rows; left out: id"."""
        rest = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        return f"{self.shape} ({', '.join(self.keys)}), {len(self.rows):,} rows{rest}"


@dataclass(frozen=True)
class Encoded:
    """A data set as a model sees it.

    Attributes:
        examples: One per row, in order.
        num_truncated: How many were cut.
    """

    examples: Sequence[Example]
    num_truncated: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return sum(len(example.token_ids) for example in self.examples)

    @property
    def num_trained(self) -> int:
        """Tokens that the loss is taken on."""
        return sum(sum(example.trained[1:]) for example in self.examples)


def read_rows(
    paths: str | Path | Sequence[Path],
    *,
    mapping: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Dataset:
    """Read rows and make each one of a kind that can be trained on.

    The shape of the first row decides, and every row must have it.

    Args:
        paths: A file, or several parts of one data set: .jsonl, .ndjson, .json, .csv or .parquet.
        mapping: What a value is -> its key; see ``fastsafe.data.shapes.mapped``. None finds out.
        limit: Most rows to read; None reads all.

    Raises:
        DataError: A file or a row is malformed, of unknown shape, or there is no row; the message
            has the line.
        UsageError: The mapping makes no row.
    """
    files = [Path(paths)] if isinstance(paths, str | Path) else list(paths)
    shape = shapes.mapped(mapping) if mapping else None
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    seen: dict[str, None] = {}
    found = itertools.chain.from_iterable(records(file) for file in files)
    for where, value in itertools.islice(found, limit):
        if not isinstance(value, Mapping):
            raise DataError(
                f"{where}: row is {type(value).__name__}, expected an object with keys; "
                "write one per row"
            )
        raw = {key: each for key, each in value.items() if each is not None}  # as in a table
        if shape is None:
            shape = shapes.shape_of(raw, where)
        if not shape.fits(raw):
            missing = ", ".join(key for key in shape.needs if key not in raw)
            raise DataError(
                f"{where}: {missing} is missing, expected a row of {shape.name} as the first one; "
                "mend or remove it"
            )
        row = shape.row(raw, where)
        kind_of(row, where)
        rows.append(row)
        places.append(where)
        seen |= dict.fromkeys(raw)
    source = ", ".join(map(str, files))
    if shape is None:
        raise DataError(f"{source}: rows are 0, expected one or more; check the file")
    used = [key for key in (*shape.needs, *shape.may) if key in seen]
    left_out = tuple(key for key in seen if key not in used)
    return Dataset(source, shape.name, tuple(used), left_out, rows, places)


def encode(
    dataset: Dataset,
    tokenizer: Encoder,
    *,
    loss_on: LossOn = "completion",
    max_length: int | None = None,
    truncate: bool = False,
) -> Encoded:
    """Encode every row, its place in the errors.

    Args:
        dataset: The rows.
        tokenizer: Of the model that is trained.
        loss_on: As for ``encode_row``.
        max_length: Most tokens of a row; None has no limit.
        truncate: Whether longer rows are cut, and not an error.

    Raises:
        DataError: As ``encode_row``; or an answer is blank, or a row is too long, or has nothing to
            train on once cut.
    """
    examples = []
    num_truncated = 0
    for row, where in zip(dataset.rows, dataset.places, strict=True):
        if loss_on == "completion" and _is_blank(row):
            raise DataError(
                f"{where}: answer is blank, expected some text to train on; mend or remove it"
            )
        example = encode_row(row, tokenizer, loss_on=loss_on, where=where)
        if max_length is not None and len(example.token_ids) > max_length:
            if not truncate:
                raise DataError(
                    f"{where}: row has {len(example.token_ids)} tokens, expected at most "
                    f"{max_length}; shorten or drop it, or cut such rows by --truncate"
                )
            example = example.cut(max_length, where)
            num_truncated += 1
        examples.append(example)
    return Encoded(examples, num_truncated)


def _is_blank(row: Row) -> bool:
    """Whether a row has answers and all are white space: only their end would be trained."""
    answers = row.get("messages", row.get("completion"))
    if isinstance(answers, list | tuple):
        said = [turn for turn in answers if isinstance(turn, Mapping)]
        said = [turn for turn in said if turn["role"] == "assistant"]
        texts = [turn["content"] + turn.get("reasoning_content", "") for turn in said]
        return bool(texts) and not any(text.strip() for text in texts)
    return isinstance(answers, str) and not answers.strip()
