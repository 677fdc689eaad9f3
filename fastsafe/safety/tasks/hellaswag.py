"""HellaSwag (Zellers et al. 2019): which of four endings goes on with a description.

Columns ``ctx``, ``endings``, ``label`` (Rowan/hellaswag). Rows from WikiHow hold marks in square
brackets, ``[title]`` for the start of a sentence; they are taken out.
"""

import re

from fastsafe.errors import DataError

from ._choices import lettered, multiple_choice
from ._spec import Example, Row, columns, text


def example(row: Row) -> Example:
    """Read one row."""
    context, endings, label = columns(row, "hellaswag", "ctx endings label")
    if not isinstance(endings, list) or not all(isinstance(each, str) for each in endings):
        raise DataError(f"hellaswag: endings is {type(endings).__name__}, expected a list of texts")
    question = f"What comes next? {_unmarked(text(context, 'hellaswag: ctx'))}"
    return lettered("hellaswag", question, [_unmarked(each) for each in endings], label)


def _unmarked(words: str) -> str:
    return " ".join(re.sub(r"\[.*?\]", "", re.sub(r"\.? \[title\]", ".", words)).split())


TASK = multiple_choice("hellaswag", example)
