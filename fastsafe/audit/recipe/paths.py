"""Paths in a recipe's file are relative to the folder of the file."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fastsafe.io.hub import DATA_SUFFIXES

_MODELS = ("judges.*", "guards.*", "mitigations.*.guard", "rewrite")
_TEMPLATES = ("template", "prompt_template")  # of judges and guards
_SUFFIXES = (*DATA_SUFFIXES, ".tsv")  # of names that are those of files
# where a path stands, and nothing else
_FILES = (
    *("data.behaviours", "data.safety", "data.translations"),
    *(f"{model}.{template}" for model in _MODELS for template in _TEMPLATES),
)
# where a hub id or a name may stand, too
_FILES_OR_NAMES = (
    *("model", "data.tasks.*", "data.translator"),
    *(f"{model}.checkpoint" for model in _MODELS),
    *(f"{model}.checkpoint.path" for model in _MODELS),
)


def beside(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's mapping with its paths relative to ``folder``, which holds its file.

    Where a hub id or the name of a source may stand, a path is what exists in ``folder``, or the
    name of a data file. Values
    of a wrong type stay for the schema to refuse.
    """
    from fastsafe.safety.defences import defences
    from fastsafe.safety.sources import sources

    if folder == Path():
        return raw
    registered = sources()

    def file(text: str) -> str:
        return text if text.startswith("~") or not text else str(folder / text)

    def file_or_name(text: str) -> str:
        path = file(text)
        is_file = "/" not in text and text.endswith(_SUFFIXES)
        return path if text not in registered and (is_file or _exists(path)) else text

    weights = {need for d in defences().values() if d.acts_on == "weights" for need in d.needs}
    named = (*_FILES_OR_NAMES, *(f"mitigations.*.{need}" for need in weights))
    made: dict[str, Any] = _changed(_changed(raw, _FILES, file), named, file_or_name)
    return made


def _changed(value: Any, places: Iterable[str], change: Callable[[str], str]) -> Any:
    for place in places:
        value = _at(value, place.split("."), change)
    return value


def _at(value: Any, keys: Sequence[str], change: Callable[[str], str]) -> Any:
    """Return a value with the texts at a place changed; ``*`` is every item or key."""
    if isinstance(value, list) and (not keys or keys[0] == "*"):
        return [_at(item, keys[1:], change) for item in value]
    if isinstance(value, dict) and keys:
        return {
            key: _at(inner, keys[1:], change) if keys[0] in (key, "*") else inner
            for key, inner in value.items()
        }
    return change(value) if isinstance(value, str) and not keys else value


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, or with a NUL character
        return False
