"""OpenBookQA (Mihaylov et al. 2018): elementary science with four options.

Columns ``question_stem``, ``choices`` (``text`` and ``label`` lists), ``answerKey``
(allenai/openbookqa), or the original files: ``question`` (``stem``, ``choices``: objects of
``text`` and ``label``), ``answerKey``.
"""

from collections.abc import Mapping

from fastsafe.errors import DataError

from ._choices import index_of, lettered, multiple_choice
from ._spec import Example, Row, columns, text


def example(row: Row) -> Example:
    """Read a row of the data set."""
    if isinstance(row.get("question"), Mapping):
        nested, key = columns(row, "openbookqa", "question answerKey")
        stem, choices = columns(nested, "openbookqa: question", "stem choices")
        if not isinstance(choices, list | tuple) or not all(
            isinstance(choice, Mapping) for choice in choices
        ):
            raise DataError("openbookqa: choices is no list of text and label")
        pairs = [columns(choice, "openbookqa: choices", "text label") for choice in choices]
        options, labels = [text for text, _ in pairs], [label for _, label in pairs]
    else:
        stem, choices, key = columns(row, "openbookqa", "question_stem choices answerKey")
        if not isinstance(choices, Mapping):
            raise DataError(
                f"openbookqa: choices is {type(choices).__name__}, expected text and label"
            )
        options, labels = columns(choices, "openbookqa: choices", "text label")
    if not isinstance(labels, list | tuple):
        raise DataError(f"openbookqa: label is {type(labels).__name__}, expected a list of labels")
    right = index_of(key, labels, "openbookqa")
    return lettered("openbookqa", text(stem, "openbookqa: question_stem"), options, right)


TASK = multiple_choice("openbookqa", example)
