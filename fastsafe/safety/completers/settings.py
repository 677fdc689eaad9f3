"""Settings objects from the mappings of a recipe, checked by pydantic."""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from fastsafe.errors import UsageError, closest, nearest, shown

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
_EXPECTED = dict.fromkeys(("dict_type", "mapping_type", "model_type"), "a mapping")
_EXPECTED |= dict.fromkeys(("list_type", "tuple_type"), "a list")
_EXPECTED |= dict.fromkeys(("bool_type", "bool_parsing"), "true or false")
_EXPECTED |= dict.fromkeys(("int_parsing", "int_from_float"), "a valid integer")
_EXPECTED |= {"float_parsing": "a valid number", "int_parsing_size": "a smaller integer"}
_WORDS = {
    "Value error, ": "",
    "String should match pattern": "expected a text like",
    "Input should be": "expected",
    "String should have": "expected",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
}

T = TypeVar("T")


def from_mapping(settings: type[T], mapping: Any, location: str) -> T:
    """Build a settings object from a mapping.

    Args:
        settings: A pydantic dataclass or model with `STRICT` configuration.
        mapping: Value of a recipe.
        location: Names the mapping in errors, e.g. "judge harmbench".

    Raises:
        UsageError: It is no mapping, a key is unknown or missing, or a value does not check.
    """
    if not isinstance(mapping, Mapping):
        raise UsageError(f"{location} is {shown(mapping)}, expected a mapping")
    try:
        return settings(**{str(key): value for key, value in mapping.items()})
    except ValidationError as error:
        # a misspelt key often leaves another one missing: the misspelling explains both
        detail = min(error.errors(), key=lambda detail: detail["type"] not in _UNKNOWN)
        keys = list(vars(settings)["__pydantic_fields__"])
        raise UsageError(f"{location}{_sentence(detail, keys)}") from None


def _sentence(error: ErrorDetails, keys: list[str]) -> str:
    path = ".".join(map(str, error["loc"]))
    if error["type"] in _UNKNOWN:
        return f" has no key {shown(path)}; {nearest(path, keys)}"
    if error["type"] == "missing":
        return f": {path} is missing, expected a value"
    # a rule about several keys names them itself
    return (
        f": {path} is {shown(error['input'])}, {expected(error)}"
        if path
        else f": {expected(error)}"
    )


def expected(error: ErrorDetails) -> str:
    """Return what an error of pydantic expects, in our words.

    Example:
        >>> expected({"type": "tuple_type", "msg": "Input should be ...", "loc": (), "input": 3})
        'expected a list'
    """
    if words := _EXPECTED.get(error["type"]):
        return f"expected {words}"
    message = error["msg"]
    for words, ours in _WORDS.items():
        message = message.replace(words, ours)
    if error["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return f"{message}{closest(error['input'], known)}"
    return message
