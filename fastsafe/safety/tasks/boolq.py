"""BoolQ (Clark et al. 2019): yes-or-no questions about a passage.

Columns ``question``, ``passage``, ``answer`` (google/boolq), or ``label`` (SuperGLUE's 0 and 1).
"""

from ._corpus import accuracy
from ._metrics import answer_accuracy, yes_or_no
from ._spec import Example, Row, Task, columns, one_of, text

_ANSWERS = {"true": "Yes", "false": "No", "1": "Yes", "0": "No"}


def example(row: Row) -> Example:
    """Read a row of the data set."""
    layouts = "question passage answer", "question passage label"
    question, passage, answer = columns(row, "boolq", *layouts)
    asked = text(question, "boolq: question").rstrip("?")
    label = one_of(answer, _ANSWERS, "boolq: answer")
    return Example(
        instruction=f"{text(passage, 'boolq: passage')}\nQuestion: {asked}?\nAnswer yes or no.",
        answer=label,
        reference=label,
    )


TASK = Task(
    id="boolq",
    format="true_false",
    metric="answer_accuracy",
    score=answer_accuracy,
    example=example,
    metrics={"accuracy": accuracy(yes_or_no)},
)
