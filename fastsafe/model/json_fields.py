"""Reads typed and bounded values out of an untrusted JSON object."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from fastsafe.errors import CheckpointError, shown


@dataclass(frozen=True)
class Fields:
    """One JSON object; every read names the field and the file when it refuses a value.

    A field that is absent or null takes the default; without a default it is refused.
    """

    raw: Mapping[str, Any]
    location: str  # file, and path inside it, that messages name

    def refuse(self, name: str, expected: str) -> CheckpointError:
        """Build the error for a field whose value cannot be used."""
        value = "missing" if self.raw.get(name) is None else shown(self.raw[name])
        return CheckpointError(f"{self.location}: {name} is {value}, expected {expected}")

    def has(self, name: str) -> bool:
        """Whether the field is present and not null."""
        return self.raw.get(name) is not None

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """Read an integer in [low, high]."""
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.refuse(name, f"an integer in [{low}, {high}]")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """Read a finite number in [low, high]."""
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if not is_number(value) or not low <= value <= high:
            raise self.refuse(name, f"a number in [{low:g}, {high:g}]")
        return float(value)

    def optional(self, name: str, low: float, high: float, default: float | None) -> float | None:
        """Read a finite number in [low, high]; absent is the default, null is None."""
        if name not in self.raw:
            return default
        return None if self.raw[name] is None else self.number(name, low, high)

    def flag(self, name: str, default: bool) -> bool:
        """Read true or false."""
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def choice(self, name: str, known: Sequence[str], default: str | None = None) -> str:
        """Read one of the known words."""
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or value not in known:
            raise self.refuse(name, f"one of {', '.join(known)}")
        return value

    def numbers(self, name: str, count: int, low: float, high: float) -> tuple[float, ...]:
        """Read a list of exactly ``count`` finite numbers in [low, high]."""
        value = self.raw.get(name)
        fits = isinstance(value, list) and len(value) == count
        if not fits or not all(is_number(x) and low <= x <= high for x in value or ()):
            raise self.refuse(name, f"a list of {count} numbers in [{low:g}, {high:g}]")
        return tuple(float(x) for x in value or ())

    def words(self, name: str, count: int, known: Sequence[str]) -> tuple[str, ...] | None:
        """Read a list of exactly ``count`` known words; None when absent."""
        value = self.raw.get(name)
        if value is None:
            return None
        fits = isinstance(value, list) and len(value) == count
        if not fits or not all(isinstance(x, str) and x in known for x in value):
            raise self.refuse(name, f"a list of {count} of {', '.join(known)}")
        return tuple(value)

    def section(self, name: str) -> "Fields | None":
        """Read a nested object; None when absent."""
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.refuse(name, "an object")
        return Fields(value, f"{self.location}: {name}")


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether a decoded value is a number that a float can hold."""
    try:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
    except OverflowError:  # an integer beyond the range of a float
        return False
