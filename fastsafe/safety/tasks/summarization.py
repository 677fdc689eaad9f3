"""Summarization of a scientific paper: its abstract from its text.

Columns ``article``, ``abstract`` (armanc/scientific_papers), or ``article``, ``summary``.
"""

from ._corpus import rouge
from ._metrics import exact_match
from ._spec import Example, Row, Task, columns, text


def example(row: Row) -> Example:
    """Read a row of the data set."""
    article, abstract = columns(row, "summarization", "article abstract", "article summary")
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
)
