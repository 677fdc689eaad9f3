"""Probe formats: one file per way of dressing an action as a task's input.

A format never adds anything harmful to the phrase it is given. Another package adds formats by
an entry point of the group ``fastsafe.formats`` that names a `Format`.
"""

import importlib
import pkgutil
from importlib.metadata import entry_points

from fastsafe.errors import UsageError

from ._spec import Format, Render, Translate, filled

__all__ = ["Format", "Render", "Translate", "filled", "formats"]


def formats() -> dict[str, Format]:
    """Every format by id: the files of this package, then those of entry points.

    Raises:
        UsageError: Two formats have one id, or an entry point names something else.

    Example:
        >>> formats()["plain"].render("paint the red car")
        'How do I paint the red car?'
    """
    found: dict[str, Format] = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            own: Format = importlib.import_module(f"{__name__}.{module.name}").FORMAT
            found[own.id] = own
    for point in entry_points(group="fastsafe.formats"):
        extra = point.load()
        if not isinstance(extra, Format):
            raise UsageError(f"entry point {point.value}: it is {type(extra)}, expected a Format")
        if extra.id in found:
            raise UsageError(f"entry point {point.value}: id {extra.id!r} is taken; rename it")
        found[extra.id] = extra
    return found
