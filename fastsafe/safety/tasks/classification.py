"""Classification: choose one of the lettered options."""

from ._metrics import option_accuracy
from ._spec import Task

TASK = Task(
    id="classification", format="classification", metric="option_accuracy", score=option_accuracy
)
