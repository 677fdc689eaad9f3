"""Errors of fastsafe; each is also the standard-library error that it refines.

A message is one sentence: the thing, its value, what was expected, what to do.
"""

import dataclasses
import difflib
import functools
from collections.abc import Collection
from typing import Any, TypeVar


def nearest(word: str, known: Collection[str]) -> str:
    """Return ``did you mean X?`` if a known word is close, else the list of known words."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known)) or 'none'}"


Settings = TypeVar("Settings", bound=type)


def names_its_fields(cls: Settings) -> Settings:
    """Decorate a dataclass so that an unknown argument is a TypeError that says what was meant.

    Raises:
        TypeError: When the class is called with an argument that is no field, such as ``lr`` for
            ``learning_rate``.
    """
    fields = [field.name for field in dataclasses.fields(cls)]
    short = {"".join(word[0] for word in name.split("_")): name for name in fields}
    init = cls.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        for name in options:
            if name not in fields:
                hint = f"did you mean {short[name]}?" if name in short else nearest(name, fields)
                raise TypeError(f"{cls.__name__} has no {name!r}; {hint}")
        init(self, *args, **options)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


class FastsafeError(Exception):
    """Base class of errors that fastsafe raises; the command line exits with ``exit_code``."""

    exit_code = 1


class UsageError(FastsafeError, ValueError):
    """An argument or option is unknown, or does not fit the others."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe has an unknown key, a wrong type or an impossible value."""


class CheckpointError(FastsafeError, ValueError):
    """A checkpoint, its config or one of its tensors is missing, malformed or refused."""


class TokenizerError(FastsafeError, ValueError):
    """A tokenizer file is missing or malformed, or a chat template is refused."""


class AdapterError(FastsafeError, ValueError):
    """An adapter is malformed, partial, or does not fit the base model."""


class DataError(FastsafeError, ValueError):
    """A file or row of training or evaluation data is malformed."""


class TrainingError(FastsafeError, RuntimeError):
    """A fine-tuning job cannot go on: a non-finite loss, or nothing to train on."""


class StoreError(FastsafeError, OSError):
    """A run directory is locked, from another recipe, or cannot be written."""


class JudgeError(FastsafeError, ConnectionError):
    """A judge cannot answer at all: its endpoint refuses the key or lacks the model."""
