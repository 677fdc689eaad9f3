"""Downstream tasks: one file per thing that a model is fine-tuned for.

Each file reads one public data set by its own columns and ships a miniature of our own rows with
the same columns. Another package adds tasks by an entry point of the group ``fastsafe.tasks`` that
names a `Task`.
"""

from fastsafe.safety.plugins import collect, own_parts

from ._metrics import exact_match, normalised, option_accuracy
from ._rows import load_rows
from ._spec import Example, Measured, Metric, Task

__all__ = [
    "Example",
    "Measured",
    "Metric",
    "Task",
    "exact_match",
    "load_rows",
    "normalised",
    "option_accuracy",
    "tasks",
]


def tasks() -> dict[str, Task]:
    """Every task by id: the files of this package, then those of entry points.

    Raises:
        UsageError: Two tasks have one id, or an entry point names something else.

    Example:
        >>> tasks()["classification"].metric
        'option_accuracy'
    """
    return collect(own_parts(__name__, __path__, "TASK"), "fastsafe.tasks", Task)
