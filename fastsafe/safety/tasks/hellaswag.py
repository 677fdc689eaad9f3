"""HellaSwag (Zellers et al. 2019): the one of four endings that continues a description.

Columns ``ctx``, ``endings``, ``label`` (Rowan/hellaswag). Rows from WikiHow hold marks in square
brackets, such as ``[title]`` at the start of a sentence, which are removed.
"""

import re

from fastsafe.errors import DataError

from ._choices import lettered, multiple_choice
from ._spec import Example, Row, columns, text


def example(row: Row) -> Example:
    """Read a row of the data set."""
    context, endings, label = columns(row, "hellaswag", "ctx endings label")
    if not isinstance(endings, list) or not all(isinstance(ending, str) for ending in endings):
        raise DataError(f"hellaswag: endings is {type(endings).__name__}, expected a list of texts")
    question = f"What comes next? {_unmarked(text(context, 'hellaswag: ctx'))}"
    return lettered("hellaswag", question, [_unmarked(ending) for ending in endings], label)


def _unmarked(words: str) -> str:
    return " ".join(re.sub(r"\[.*?\]", "", re.sub(r"\.? \[title\]", ".", words)).split())


TASK = multiple_choice("hellaswag", example)
