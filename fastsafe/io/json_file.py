"""JSON files from outside, read strictly and within bounds.

Stricter than ``json.load``: a size and a depth limit, no duplicate keys, no NaN or infinity, no
lone surrogates, and only regular files.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from fastsafe.errors import CheckpointError, shown
from fastsafe.io.checkpoint_file import open_file, read_file

MAX_DEPTH = 64  # nesting of lists and objects

# A string is one token, so that brackets inside it do not count; possessive and with an optional
# end, so that no text makes the scan slower than linear.
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


def read_json(path: Path | str, max_bytes: int) -> Any:
    """Parse a JSON file.

    Args:
        path: A regular file or a symbolic link to one.
        max_bytes: Largest size accepted; checked before anything is read.

    Returns:
        The parsed value; every number is finite.

    Raises:
        CheckpointError: The file is missing, not regular, too large, too deep or malformed.
    """
    content = read_file(path, max_bytes)
    if content is None:
        raise CheckpointError(f"{path}: file is missing, expected JSON; check the path")
    try:
        return parse_json(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: content is not JSON ({error}), expected a whole file in UTF-8; replace it"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def parse_json(content: bytes) -> Any:
    """Parse JSON in UTF-8.

    Raises:
        ValueError: The JSON is too deep or malformed; the message does not name a file.
    """
    text = content.decode()
    if _is_too_deep(text):
        raise ValueError(f"JSON is nested deeper than {MAX_DEPTH}, expected at most that")
    value = json.loads(
        text, object_pairs_hook=unique_keys, parse_constant=_refuse, parse_float=_finite
    )
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate has no UTF-8
    return value


def read_object(path: Path | str, max_bytes: int) -> dict[str, Any]:
    """Parse a JSON file that holds one object; otherwise as ``read_json``."""
    value = read_json(path, max_bytes)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: JSON is a {type(value).__name__}, expected an object")
    return value


def read_optional_object(path: Path | str, max_bytes: int) -> dict[str, Any] | None:
    """Parse as ``read_object``; None if the folder has no entry of that name."""
    return None if open_file(path) is None else read_object(path, max_bytes)


def _is_too_deep(text: str) -> bool:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False  # too few brackets, which saves the scan for nearly every file
    depth = 0
    for token in _TOKENS.finditer(text):
        if token[0] in ("[", "{"):
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif token[0] in ("]", "}"):
            depth -= 1
    return False


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON; raise a ValueError if it has a key twice."""
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"JSON has the key {shown(key)} twice, expected once")
        unique[key] = value
    return unique


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"JSON has {constant}, expected finite numbers")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse(text)
    return value
