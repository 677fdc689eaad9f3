"""OpenBookQA (Mihaylov et al. 2018): elementary science with four options.

Columns ``question_stem``, ``choices`` (``text`` and ``label`` lists), ``answerKey``
(allenai/openbookqa).
"""

from collections.abc import Mapping

from fastsafe.errors import DataError

from ._choices import index_of, lettered, multiple_choice
from ._spec import Example, Row, columns, text


def example(row: Row) -> Example:
    """Read a row of the data set."""
    stem, choices, key = columns(row, "openbookqa", "question_stem choices answerKey")
    if not isinstance(choices, Mapping):
        raise DataError(f"openbookqa: choices is {type(choices).__name__}, expected text and label")
    options, labels = columns(choices, "openbookqa: choices", "text label")
    if not isinstance(labels, list | tuple):
        raise DataError(f"openbookqa: label is {type(labels).__name__}, expected a list of labels")
    right = index_of(key, labels, "openbookqa")
    return lettered("openbookqa", text(stem, "openbookqa: question_stem"), options, right)


TASK = multiple_choice("openbookqa", example)
