"""Downstream tasks that models are fine-tuned for, one per file.

Each file reads a public data set by its published columns; a miniature of our own rows with the
same columns ships beside it. Another package adds tasks by an entry point of the group
``fastsafe.tasks`` that names a `Task`.
"""

from fastsafe.safety.plugins import collect, shipped_parts

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
    """Return every task by id: the files of this package, then those of entry points.

    Raises:
        UsageError: Two tasks have one id, or an entry point names something else.

    Example:
        >>> tasks()["classification"].metric
        'option_accuracy'
    """
    return collect(shipped_parts(__name__, __path__, "TASK"), "fastsafe.tasks", Task)
