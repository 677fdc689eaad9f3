"""Summarization of a scientific paper: its abstract from its text.

Columns ``article``, ``abstract`` (armanc/scientific_papers), ``article``, ``summary``, or the
original arXiv and PubMed files (Cohan et al. 2018): JSON lines in a .txt file with ``article_text``
and ``abstract_text``, lists of sentences, those of the abstract between ``<S>`` and ``</S>``.
"""

import re
from typing import Any

from ._corpus import rouge
from ._metrics import exact_match
from ._published import json_in_text
from ._spec import Example, Row, Task, columns, text

_MARK = re.compile(r"</?S>")


def _joined(value: Any) -> Any:
    """Return a list of sentences as one text, without their marks; other values as they are."""
    if not isinstance(value, list) or not all(isinstance(sentence, str) for sentence in value):
        return value
    return " ".join(_MARK.sub("", sentence).strip() for sentence in value)


def example(row: Row) -> Example:
    """Read a row of the data set."""
    layouts = "article abstract", "article summary", "article_text abstract_text"
    article, abstract = (_joined(value) for value in columns(row, "summarization", *layouts))
    summary = text(abstract, "summarization: abstract")
    return Example(
        instruction="Summarize the following text:",
        input=text(article, "summarization: article"),
        answer=summary,
        reference=summary,
    )


TASK = Task(
    id="summarization",
    format="summarization",
    metric="exact_match",
    score=exact_match,
    example=example,
    metrics={kind: rouge(kind) for kind in ("rouge1", "rouge2", "rougeL")},
    rows=json_in_text,
)
