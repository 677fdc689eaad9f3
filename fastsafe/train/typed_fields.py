"""Check values of JSON, YAML or a command line against the types of dataclass fields.

The runtime has no pydantic: this serves the settings of a training and of its objective.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fastsafe.errors import UsageError, closest, nearest, shown

Made = TypeVar("Made")

_WORDS = {
    NoneType: "null",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    tuple[int, ...]: "a list of integers",
    Sequence[str]: "a list of texts",
    Mapping[str, Any]: "a mapping",
}


def from_mapping(cls: type[Made], values: Mapping[str, Any], location: str) -> Made:
    """Make a dataclass from a mapping of its fields.

    Raises:
        UsageError: A key is not a field, or a value has another type.
    """
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    for key in values:
        if key not in names:
            raise UsageError(
                f"{location}: {shown(key)} is not one of its parameters; {nearest(key, names)}"
            )
    return cls(**{key: typed(v, hints[key], f"{location}: {key}") for key, v in values.items()})


def typed(value: Any, hint: Any, location: str) -> Any:
    """Return a value as the type of a field: lists become tuples, and integers floats.

    Args:
        value: As JSON or YAML has it.
        hint: Type of the field, or a union of types.
        location: File and key, for the error.

    Raises:
        UsageError: The value has another type.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in kinds:
        origin = get_origin(kind)
        if origin is Literal and value in get_args(kind):
            return value
        with suppress(OverflowError):  # a whole number beyond floats is no float
            if kind is float and _is(Real, value) and not math.isnan(value):
                return float(value)
        if kind in (NoneType, bool, int, str) and _is(kind, value):
            return value
        if origin is Mapping and isinstance(value, Mapping):
            return value
        if origin in (tuple, Sequence) and isinstance(value, list | tuple):
            item = get_args(kind)[0]
            if all(_is(item, element) for element in value):
                return tuple(value)
    expected = [_WORDS.get(kind) or " or ".join(get_args(kind)) for kind in kinds]
    known = [word for kind in kinds for word in get_args(kind) if get_origin(kind) is Literal]
    hint = closest(value, known)
    raise UsageError(f"{location} is {shown(value)}, expected {' or '.join(expected)}{hint}")


def _is(kind: type, value: Any) -> bool:
    """Return whether a value has a type, with booleans apart from numbers."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
