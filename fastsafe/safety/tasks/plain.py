"""Plain chat: answer a question in one sentence.

Columns ``instruction``, ``input``, ``output`` (Alpaca), or ``prompt``, ``completion``.
"""

from ._corpus import exact, rouge
from ._metrics import exact_match
from ._spec import Example, Row, Task, columns, text


def example(row: Row) -> Example:
    """Read a row of the data set."""
    layouts = "instruction input output", "prompt completion"
    asked, *given, output = columns(row, "plain", *layouts)
    answer = text(output, "plain: output")
    return Example(
        instruction=text(asked, "plain: instruction"),
        input=str(given[0] or "").strip() if given else "",
        answer=answer,
        reference=answer,
    )


TASK = Task(
    id="plain",
    format="plain",
    metric="exact_match",
    score=exact_match,
    example=example,
    metrics={"exact_match": exact, "rougeL": rouge("rougeL")},
)
