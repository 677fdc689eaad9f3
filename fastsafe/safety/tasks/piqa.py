"""PIQA (Bisk et al. 2020): the better of two ways to an everyday goal.

Columns ``goal``, ``sol1``, ``sol2``, ``label`` (ybisk/piqa; 0 for the first), or the original
files: rows without ``label`` in ``train.jsonl``, one label a line in ``train-labels.lst`` beside
it. Rows of the test split hide the label as -1 and are refused.
"""

from ._choices import lettered, multiple_choice
from ._published import beside_labels
from ._spec import Example, Row, columns, text


def example(row: Row) -> Example:
    """Read a row of the data set."""
    goal, first, second, label = columns(row, "piqa", "goal sol1 sol2 label")
    question = f"What is the best way to do this? {text(goal, 'piqa: goal')}"
    return lettered("piqa", question, [first, second], label)


TASK = multiple_choice("piqa", example, beside_labels)
