"""MMLU (Hendrycks et al. 2021): exam questions with four options.

Columns ``question``, ``choices``, ``answer`` (cais/mmlu; the place of the right one, from 0), or
``question``, ``A`` to ``D``, ``answer`` (the letter), the original files with a header added.
"""

from ._choices import index_of, lettered, multiple_choice
from ._spec import Example, Row, columns, text


def example(row: Row) -> Example:
    """Read a row of the data set."""
    layouts = "question choices answer", "question A B C D answer"
    question, *options, answer = columns(row, "mmlu", *layouts)
    if "choices" in row:
        options = options[0]
    else:
        answer = index_of(answer, "ABCD", "mmlu")
    return lettered("mmlu", text(question, "mmlu: question"), options, answer)


TASK = multiple_choice("mmlu", example)
