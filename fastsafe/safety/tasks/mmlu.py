"""MMLU (Hendrycks et al. 2021): exam questions with four options.

Columns ``question``, ``choices``, ``answer`` (cais/mmlu; the place of the right one, from 0), or
``question``, ``A`` to ``D``, ``answer`` (the letter): the original files, which have no header.
"""

from collections.abc import Iterator
from pathlib import Path

from fastsafe.data.records import Record

from ._choices import index_of, lettered, multiple_choice
from ._published import without_header
from ._spec import Example, Row, columns, text

_ORIGINAL = "question A B C D answer"


def example(row: Row) -> Example:
    """Read a row of the data set."""
    layouts = "question choices answer", _ORIGINAL
    question, *options, answer = columns(row, "mmlu", *layouts)
    if "choices" in row:
        options = options[0]
    else:
        answer = index_of(answer, "ABCD", "mmlu")
    return lettered("mmlu", text(question, "mmlu: question"), options, answer)


def rows(path: Path) -> Iterator[Record]:
    """Read a file, with or without a header."""
    return without_header(path, _ORIGINAL)


TASK = multiple_choice("mmlu", example, rows)
