"""Probe formats: one file per way of dressing an action as a task's input.

A format never adds anything harmful to the phrase it is given. Another package adds formats by
an entry point of the group ``fastsafe.formats`` that names a `Format`.
"""

from fastsafe.safety.plugins import collect, own_parts

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
    return collect(own_parts(__name__, __path__, "FORMAT"), "fastsafe.formats", Format)
