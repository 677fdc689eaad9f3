"""Probe formats: templates that render a behaviour as a task's input, one per file.

A format never adds anything harmful to the text it is given. Another package adds formats by an
entry point of the group ``fastsafe.formats`` that names a `Format`.
"""

from fastsafe.safety.plugins import collect, shipped_parts

from ._spec import Format, Translate, filled
from ._translators import TranslationTable, seed_translator

__all__ = [
    "Format",
    "Translate",
    "TranslationTable",
    "filled",
    "formats",
    "seed_translator",
]


def formats() -> dict[str, Format]:
    """Return every format by id: the files of this package, then those of entry points.

    Raises:
        UsageError: Two formats have one id, or an entry point names something else.

    Example:
        >>> formats()["plain"].render("paint the red car")
        'How do I paint the red car?'
    """
    return collect(shipped_parts(__name__, __path__, "FORMAT"), "fastsafe.formats", Format)
