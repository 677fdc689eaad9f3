"""Texts of the safety floor as data files: refusals, styles, templates, function words."""

import functools
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, TypeVar

T = TypeVar("T")


@functools.cache
def lines(name: str) -> tuple[dict[str, Any], ...]:
    """Return the objects of ``<name>.jsonl`` in this folder."""
    text = files(__name__).joinpath(f"{name}.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines())


def text(name: str) -> str:
    """Return ``<name>.txt`` in this folder, without white space at its end."""
    return files(__name__).joinpath(f"{name}.txt").read_text(encoding="utf-8").rstrip()


def chosen(options: Sequence[T], key: str) -> T:
    """Return the option that the hash of a key picks, whatever the order of the rows."""
    return options[int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % len(options)]
