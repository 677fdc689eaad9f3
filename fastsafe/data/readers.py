"""Read data sets for fine-tuning: find the shape of their rows, convert and encode them."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsafe.data import shapes
from fastsafe.data.conversation import Row, has_blank_answer
from fastsafe.data.encoder import Encoder
from fastsafe.data.packing import LossOn, TrainExample, encode_row
from fastsafe.data.records import records
from fastsafe.errors import DataError


@dataclass(frozen=True)
class Dataset:
    """Rows of one data set, ready to be encoded.

    Attributes:
        source: Paths of its files, for messages.
        shape: Name of the shape of its rows, see ``fastsafe.data.shapes``.
        keys: Keys of the file that the rows are made of.
        left_out: Keys of the file that are not used, those of turns as "messages[].id".
        rows: Rows of the kinds of ``fastsafe.data.conversation``.
        locations: File, row and line of each row, for errors.
    """

    source: str
    shape: str
    keys: tuple[str, ...]
    left_out: tuple[str, ...]
    rows: Sequence[Row]
    locations: Sequence[str]

    def describe(self) -> str:
        """Return a line such as "alpaca (instruction, output), 1,203 rows; left out: id"."""
        rest = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        return f"{self.shape} ({', '.join(self.keys)}), {len(self.rows):,} rows{rest}"


@dataclass(frozen=True)
class Encoded:
    """A data set as token ids.

    Attributes:
        examples: One per row, in order.
        num_truncated: Number of rows that were too long and cut.
        unknown: Number of tokens that stand for text that the vocabulary lacks, of each row.
    """

    examples: Sequence[TrainExample]
    num_truncated: int
    unknown: Sequence[int] = ()

    @property
    def unknown_text(self) -> str:
        """A sentence on the text that the vocabulary lacks, "" where it lacks none."""
        rows = sum(n > 0 for n in self.unknown)
        if not rows:
            return ""
        return (
            f"{sum(self.unknown):,} tokens in {rows:,} of {len(self.examples):,} rows are unknown "
            "to the vocabulary: the model cannot read or write what they stand for"
        )

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all examples."""
        return sum(len(example.token_ids) for example in self.examples)

    @property
    def num_trained(self) -> int:
        """Number of tokens that the loss is computed on."""
        return sum(sum(example.trained[1:]) for example in self.examples)


def read_rows(
    paths: str | Path | Sequence[Path],
    *,
    mapping: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Dataset:
    """Read the rows of a data set and convert them to rows that can be trained on.

    The first row decides on the shape; every other row must have the same one.

    Args:
        paths: A file, or several parts of one data set, as `records` reads them.
        mapping: Key of the file for each role; see ``fastsafe.data.shapes.mapped``. None finds the
            shape by the keys of the first row.
        limit: Maximum number of rows to read; None reads all.

    Raises:
        DataError: A file or row is malformed or of an unknown shape, or there is no row; the
            message names the line.
        UsageError: The mapping makes no row.
    """
    files = [Path(paths)] if isinstance(paths, str | Path) else list(paths)
    shape = shapes.mapped(mapping) if mapping else None
    rows: list[dict[str, Any]] = []
    locations: list[str] = []
    seen: dict[str, None] = {}
    left_out: dict[str, None] = {}
    all_records = itertools.chain.from_iterable(records(file) for file in files)
    for location, _, record in itertools.islice(all_records, limit):
        # a table has every column in every row: null means that the row lacks it
        raw = {key: value for key, value in record.items() if value is not None}
        if shape is None:
            shape = shapes.shape_of(raw, location)
        rows.append(shapes.training_row(shape, raw, location))
        locations.append(location)
        seen |= dict.fromkeys(raw)
        left_out |= dict.fromkeys(shapes.left_out(shape, raw))
    source = ", ".join(map(str, files))
    if shape is None:
        raise DataError(f"{source}: rows are 0, expected one or more; check the file")
    used = [key for key in (*shape.needs, *shape.may) if key in seen]
    return Dataset(source, shape.name, tuple(used), tuple(left_out), rows, locations)


def encode(
    dataset: Dataset,
    tokenizer: Encoder,
    *,
    loss_on: LossOn = "completion",
    max_length: int | None = None,
    truncate: bool = False,
) -> Encoded:
    """Encode every row of a data set.

    Args:
        dataset: The rows.
        tokenizer: Tokenizer of the base model.
        loss_on: As for ``encode_row``.
        max_length: Maximum number of tokens of a row; None sets no limit.
        truncate: Cut longer rows instead of raising an error.

    Raises:
        DataError: As ``encode_row``; or an answer is blank, a row is too long, or no trained token
            is left after the cut.
    """
    examples = []
    num_truncated = 0
    unknown = []
    unk_id = tokenizer.unk_id
    for row, location in zip(dataset.rows, dataset.locations, strict=True):
        if loss_on == "completion" and has_blank_answer(row):
            raise DataError(
                f"{location}: answer is blank, expected some text to train on; correct or remove it"
            )
        example = encode_row(row, tokenizer, loss_on=loss_on, location=location)
        if max_length is not None and len(example.token_ids) > max_length:
            if not truncate:
                raise DataError(
                    f"{location}: row has {len(example.token_ids)} tokens, expected at most "
                    f"{max_length}; shorten or drop it, or cut such rows with --truncate"
                )
            example = example.cut(max_length, location)
            num_truncated += 1
        examples.append(example)
        unknown.append(example.token_ids.count(unk_id) if unk_id is not None else 0)
    return Encoded(examples, num_truncated, unknown)
