"""Errors of fastsafe; each is also the standard-library error that it refines.

A message is one sentence: the thing, its value, what was expected, what to do.
"""

import dataclasses
import difflib
import errno
import functools
import reprlib
import unicodedata
from collections.abc import Collection
from typing import Any, TypeVar

_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (direction), surrogate, line separators
_KEPT = "\n\t\u200c\u200d"  # the joiners are part of words and emoji
_REMEDIES = {
    errno.ENOSPC: "free space there and run the same command again",
    errno.EDQUOT: "free space there and run the same command again",
    errno.EFBIG: "raise the limit on the size of files and run the same command again",
    errno.EROFS: "use a folder that can be written",
    errno.EACCES: "change the permissions there, or use another path",
    errno.EPERM: "change the permissions there, or use another path",
}


class _ShortRepr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write a number of thousands of digits
        return repr(x) if x.bit_length() < 512 else f"an integer of {x.bit_length()} bits"


def shown(value: object, limit: int = 60) -> str:
    """Return the ``repr`` of a value from outside, of at most ``limit`` characters.

    Of a longer list or mapping only the number of items is told. A value of any size and depth
    costs little, and control characters are escaped.

    Example:
        >>> shown("a" * 1_000_000, limit=8), shown([1, 2, 3, 4, 5])
        ("'aaaa...", 'a list of 5')
    """
    text = repr(value[:limit]) if isinstance(value, str) else _ShortRepr().repr(value)
    if isinstance(value, list | tuple | dict) and (len(value) > 4 or len(text) > limit):
        return f"a {type(value).__name__} of {len(value)}"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def printable(text: str) -> str:
    r"""Return text with the characters escaped that would control a terminal or reverse a line.

    Line ends and tabs stay.

    Example:
        >>> printable("a\x1b[31mb")
        'a\\x1b[31mb'
    """
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _HIDDEN and character not in _KEPT
        else character
        for character in text
    )


def os_sentence(error: OSError) -> str:
    """Return an error of the operating system in one sentence: path, reason, and what to do."""
    remedy = _REMEDIES.get(error.errno or 0)
    place = f"{error.filename}: " if error.filename else "output: " if remedy else ""
    return f"{place}{error.strerror or error}{f'; {remedy}' if remedy else ''}"


def nearest(word: str, known: Collection[str]) -> str:
    """Return ``did you mean X?`` if a known word is close, else the list of known words."""
    hint = closest(word, known).removeprefix("; ")
    return hint or f"known: {', '.join(sorted(known)) or 'none'}"


def closest(word: object, known: Collection[str]) -> str:
    """Return ``; did you mean X?`` if a known word is close, else nothing."""
    close = difflib.get_close_matches(word[:100], list(known), n=1) if isinstance(word, str) else []
    return f"; did you mean {close[0]}?" if close else ""


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
