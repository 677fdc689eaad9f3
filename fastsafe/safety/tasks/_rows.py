"""Training and test rows of a task, drawn from a file or from the shipped miniature."""

import hashlib
import heapq
import logging
from collections import Counter
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

from fastsafe.errors import DataError, UsageError

from ._metrics import folded
from ._spec import Example, Task

_LOGGER = logging.getLogger(__name__)

TEST_SHARE = 5  # one row in five is a test row

# keys of a recipe that say how many rows are asked for
_KEYS = {"train": " by training.rows", "test": " by utility_rows"}

Split = Literal["train", "test", "all"]


def load_rows(
    task: Task,
    path: str | Path | None = None,
    split: Split = "train",
    n: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Draw distinct rows of a task.

    A hash of a row's prompt decides its split, whatever its position in the file: rows with the
    same prompt share a split, and only the first of them is drawn.

    Args:
        task: One of `tasks`, or of the caller's own.
        path: File with the columns that the task names; None for the miniature.
        split: ``"all"`` where the file is a split of its own.
        n: Number of rows; None for all. A longer draw begins with the shorter one of its seed.
        seed: Of the rows drawn and their order, which does not depend on the order of the file.

    Returns:
        Rows with ``messages`` (a user's and an assistant's turn), ``task``, ``reference`` and,
        where the data set has any, ``tests``.

    Raises:
        DataError: The file is malformed, or the split holds fewer than ``n`` rows.
        UsageError: The split is unknown, or the task has no such data.
    """
    if split not in ("train", "test", "all"):
        raise UsageError(f"load_rows: split is {split!r}, expected train, test or all")
    if path is not None:
        drawn, location = _draw(task, Path(path), split, n, seed), str(path)
    else:
        miniature = files(__package__).joinpath("miniature", f"{task.id}.jsonl")
        if not miniature.is_file():
            raise UsageError(f"load_rows: task {task.id} has no miniature; name a file of its rows")
        location = f"the miniature of {task.id}"
        with as_file(miniature) as file:
            drawn = _draw(task, file, split, n, seed)
    if n is not None and len(drawn) < n:
        raise DataError(
            f"{location}: split {split} holds {len(drawn)} rows, expected at least {n}; give more, "
            f"or ask for fewer{_KEYS.get(split, '')}"
        )
    return [_row(task.id, example) for example in drawn]


def _draw(task: Task, path: Path, split: str, n: int | None, seed: int) -> list[Example]:
    seen: set[bytes] = set()
    repeated: Counter[bool] = Counter()

    def candidates() -> Any:
        for location, _, row in task.rows(path):
            try:
                example = task.read(row)
            except DataError as error:
                raise DataError(f"{location}: {error}") from error
            key = hashlib.sha256(folded(example.prompt).encode()).digest()
            is_test = int.from_bytes(key[:8], "big") % TEST_SHARE == 0
            if split not in ("all", "test" if is_test else "train"):
                continue
            repeated.update([key in seen])
            if key not in seen:
                seen.add(key)
                yield hashlib.sha256(f"{seed}|".encode() + key).digest(), key, example

    # a heap of n, so that the rows of a large file are not all held
    drawn = (
        sorted(candidates(), key=_order)
        if n is None
        else heapq.nsmallest(n, candidates(), key=_order)
    )
    if repeated[True]:
        _LOGGER.warning(
            "%s: %d of %d rows (%s) repeat a prompt and are dropped",
            *(path, repeated[True], repeated.total(), split),
        )
    return [example for _, _, example in drawn]


def _order(candidate: tuple[bytes, bytes, Example]) -> bytes:
    return candidate[0]


def _row(task: str, example: Example) -> dict[str, Any]:
    turns = (("user", example.prompt), ("assistant", example.answer))
    messages = [{"role": role, "content": content} for role, content in turns]
    row = {"messages": messages, "task": task, "reference": example.reference}
    return row | {"tests": example.tests} if example.tests else row
