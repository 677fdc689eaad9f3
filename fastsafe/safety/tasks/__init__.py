"""Downstream tasks: one file per thing that a model is fine-tuned for.

Another package adds tasks by an entry point of the group ``fastsafe.tasks`` that names a `Task`.
"""

import importlib
import pkgutil
from importlib.metadata import entry_points

from fastsafe.errors import UsageError

from ._metrics import exact_match, normalised, option_accuracy
from ._spec import Task

__all__ = ["Task", "exact_match", "normalised", "option_accuracy", "tasks"]


def tasks() -> dict[str, Task]:
    """Every task by id: the files of this package, then those of entry points.

    Raises:
        UsageError: Two tasks have one id, or an entry point names something else.

    Example:
        >>> tasks()["classification"].metric
        'option_accuracy'
    """
    found: dict[str, Task] = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            own: Task = importlib.import_module(f"{__name__}.{module.name}").TASK
            found[own.id] = own
    for point in entry_points(group="fastsafe.tasks"):
        extra = point.load()
        if not isinstance(extra, Task):
            raise UsageError(f"entry point {point.value}: it is {type(extra)}, expected a Task")
        if extra.id in found:
            raise UsageError(f"entry point {point.value}: id {extra.id!r} is taken; rename it")
        found[extra.id] = extra
    return found
