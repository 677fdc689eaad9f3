"""JSON files from outside, read strictly and within bounds.

Stricter than ``json.load``: a size and a depth limit, no duplicate keys, no NaN or infinity, no
lone surrogates, and only regular files.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any, NoReturn

from fastsafe import _native
from fastsafe.errors import CheckpointError

MAX_DEPTH = 64

# Strings are matched whole, so that brackets inside them do not count.
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def read_json(path: Path | str, max_bytes: int, max_depth: int = MAX_DEPTH) -> Any:
    """Parse a JSON file.

    Args:
        path: A regular file or a symbolic link to one.
        max_bytes: Largest size accepted; checked before anything is read.
        max_depth: Deepest nesting of lists and objects accepted; checked before parsing.

    Returns:
        What the text means; every number is finite.

    Raises:
        CheckpointError: The file is missing, not regular, too large, too deep or malformed.
    """
    try:
        file = _native.File(os.fsencode(path))
        if file.size > max_bytes:
            raise ValueError(f"file has {file.size} bytes, expected at most {max_bytes}")
        text = file.read_bytes(0, file.size).decode()
        depth = _depth(text)
        if depth > max_depth:
            raise ValueError(f"JSON is nested {depth} deep, expected at most {max_depth}")
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate has no UTF-8
        return value
    except ValueError as error:  # _native.Error, JSON and Unicode errors all are
        raise CheckpointError(f"{path}: {error}") from None


def read_object(path: Path | str, max_bytes: int, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Parse a JSON file that holds one object; otherwise as ``read_json``."""
    value = read_json(path, max_bytes, max_depth)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: JSON is a {type(value).__name__}, expected an object")
    return value


def _depth(text: str) -> int:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return 0  # cannot be too deep, which saves the scan for nearly every file
    depth = deepest = 0
    for token in _TOKENS.finditer(text):
        first = token[0][0]
        if first in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first in "]}":
            depth -= 1
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"JSON has the key {twice!r} twice, expected once")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"JSON has {constant}, expected finite numbers")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse(text)
    return value
