"""Training and test rows of a task, drawn from a file or from the miniature that ships."""

import hashlib
import heapq
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

from fastsafe.data.records import records
from fastsafe.errors import DataError, UsageError

from ._metrics import normalised
from ._spec import Example, Style, Task, prompt_of

TEST_SHARE = 5  # one row in five is of the test split

Split = Literal["train", "test", "all"]


def load_rows(
    task: Task,
    path: str | Path | None = None,
    split: Split = "train",
    n: int | None = None,
    seed: int = 0,
    style: Style = "native",
) -> list[dict[str, Any]]:
    """Draw distinct rows of a task.

    A row is of the test split or not by a hash of its native prompt, whatever its place in the
    file: rows with one prompt share a split, and only the first of them is drawn.

    Args:
        task: One of `tasks`, or of the caller's own.
        path: File with the columns that the task names; None for the miniature.
        split: ``"all"`` where the file is a split of its own.
        n: How many; None for all. A longer list begins with the shorter one of the same seed.
        seed: Draws the rows and their order, which does not hang on the order of the file.
        style: See `Task.prompt`.

    Returns:
        Rows with ``task``, ``reference`` and, where there are any, ``tests``. The native style
        has ``messages``, a user's and an assistant's turn; the raw ones have ``prompt`` and
        ``completion``, which no chat template touches.

    Raises:
        DataError: The file is malformed, or the split holds fewer than ``n`` rows.
        UsageError: The split or the style is unknown, or the task has no such data.
    """
    if split not in ("train", "test", "all"):
        raise UsageError(f"load_rows: split is {split!r}, expected train, test or all")
    if path is not None:
        drawn, where = _draw(task, Path(path), split, n, seed), str(path)
    else:
        name = files(__package__).joinpath("miniature", f"{task.id}.jsonl")
        if not name.is_file():
            raise UsageError(f"load_rows: task {task.id} has no miniature; name a file of its rows")
        where = f"the miniature of {task.id}"
        with as_file(name) as here:
            drawn = _draw(task, here, split, n, seed)
    if n is not None and len(drawn) < n:
        raise DataError(f"{where}: split {split} holds {len(drawn)} rows, expected at least {n}")
    return [_row(task.id, example, style) for example in drawn]


def _draw(task: Task, path: Path, split: str, n: int | None, seed: int) -> list[Example]:
    seen: set[bytes] = set()

    def candidates() -> Any:
        for number, (_, _, row) in enumerate(records(path), start=1):
            try:
                example = task.read(row)
            except DataError as error:
                raise DataError(f"{path}: row {number}: {error}") from error
            key = hashlib.sha256(normalised(prompt_of(example, "native")).encode()).digest()
            is_test = int.from_bytes(key[:8], "big") % TEST_SHARE == 0
            if key not in seen and split in ("all", "test" if is_test else "train"):
                seen.add(key)
                yield hashlib.sha256(f"{seed}|".encode() + key).digest(), key, example

    # a heap of n, so that a file of any size passes through
    found = (
        sorted(candidates(), key=_order)
        if n is None
        else heapq.nsmallest(n, candidates(), key=_order)
    )
    return [example for _, _, example in found]


def _order(candidate: tuple[bytes, bytes, Example]) -> bytes:
    return candidate[0]


def _row(task: str, example: Example, style: Style) -> dict[str, Any]:
    prompt = prompt_of(example, style)
    row: dict[str, Any]
    if style == "native":
        turns = (("user", prompt), ("assistant", example.answer))
        row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    else:
        row = {"prompt": prompt, "completion": example.answer}
    row |= {"task": task, "reference": example.reference}
    return row | {"tests": example.tests} if example.tests else row
