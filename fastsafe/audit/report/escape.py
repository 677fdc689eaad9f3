"""Texts from a recipe, such as the ids of judges, as they are safe to show."""

from collections.abc import Mapping
from typing import Any, TypeVar

from fastsafe.errors import printable

Shown = TypeVar("Shown")


def escaped(value: Shown) -> Shown:
    """Return results, or a part of them, with control and direction characters escaped."""
    made: Any = value
    if isinstance(value, str):
        made = printable(value)
    elif isinstance(value, Mapping):
        made = {escaped(key): escaped(inner) for key, inner in value.items()}
    elif isinstance(value, list | tuple):
        made = [escaped(inner) for inner in value]
    return made  # type: ignore[no-any-return]
