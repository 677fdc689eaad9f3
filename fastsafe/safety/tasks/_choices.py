"""Multiple-choice questions with lettered options, in the layout of the probe format."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastsafe.data.records import Record, records
from fastsafe.errors import DataError

from ._corpus import accuracy
from ._metrics import option, option_accuracy
from ._spec import Example, Row, Task, text


def multiple_choice(
    id: str,
    example: Callable[[Row], Example],
    rows: Callable[[Path], Iterator[Record]] = records,
) -> Task:
    """Return a task whose answers are option letters."""
    return Task(
        id=id,
        format="multiple_choice",
        metric="option_accuracy",
        score=option_accuracy,
        example=example,
        metrics={"accuracy": accuracy(option)},
        rows=rows,
    )


def lettered(task: str, question: str, options: Any, right: Any) -> Example:
    """Return a question as an example: the options in order, answered by a letter alone.

    Args:
        task: Names the task in errors.
        question: Text of the question.
        options: Two to eight texts.
        right: Index of the right option, from 0, as a number or as digits.

    Raises:
        DataError: The options are no such list, or the index is not among them.
    """
    if not isinstance(options, Sequence) or isinstance(options, str) or not 2 <= len(options) <= 8:
        raise DataError(
            f"{task}: options are {str(options)[:40]!r}, expected a list of 2 to 8 texts"
        )
    texts = [text(option, f"{task}: option {i}") for i, option in enumerate(options)]
    index = str(right).strip()
    if index not in map(str, range(len(texts))):
        raise DataError(
            f"{task}: the right option is {index[:40]!r}, expected 0 to {len(texts) - 1}; "
            "test sets hide it"
        )
    lines = [f"{letter}. {option}" for letter, option in zip("ABCDEFGH", texts, strict=False)]
    answer = f"{'ABCDEFGH'[int(index)]}."
    instruction = "\n".join([f"Question: {question}", *lines, "Answer with one letter."])
    return Example(instruction=instruction, answer=answer, reference=answer)


def index_of(letter: Any, letters: Sequence[str], task: str) -> int:
    """Return the index of an option's letter.

    Raises:
        DataError: The letter is none of them.
    """
    if letter not in letters:
        raise DataError(f"{task}: answer is {str(letter)[:40]!r}, expected one of {list(letters)}")
    return letters.index(letter)
