"""GSM8K (Cobbe et al. 2021): word problems of school arithmetic, answered by a number.

Columns ``question``, ``answer`` (openai/gsm8k); an answer ends in ``####`` and the number.
"""

from fastsafe.errors import DataError

from ._corpus import accuracy
from ._metrics import final_number, number_accuracy
from ._spec import Example, Row, Task, columns, text


def example(row: Row) -> Example:
    """Read a row of the data set."""
    question, answer = columns(row, "gsm8k", "question answer")
    steps = text(answer, "gsm8k: answer")
    if (number := final_number(steps)) is None:
        raise DataError(f"gsm8k: answer ends in {steps[-40:]!r}, expected #### and a number")
    asked = f"{text(question, 'gsm8k: question')}\nGive the number after ####."
    return Example(instruction=asked, answer=steps, reference=number)


TASK = Task(
    id="gsm8k",
    format="plain",
    metric="number_accuracy",
    score=number_accuracy,
    example=example,
    metrics={"exact_match": accuracy(final_number)},
)
