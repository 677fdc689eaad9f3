"""Registries of the safety floor: the modules of a package, then entry points."""

from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Any, Protocol, TypeVar

from fastsafe.errors import UsageError


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


Part = TypeVar("Part", bound=_HasId)


def shipped_parts(package: str, path: Iterable[str], attribute: str) -> list[Any]:
    """Return an attribute of every module of a package whose name has no leading underscore."""
    names = sorted(m.name for m in iter_modules(path) if not m.name.startswith("_"))
    return [getattr(import_module(f"{package}.{name}"), attribute) for name in names]


def collect(shipped: Iterable[Part], group: str, kind: type[Part]) -> dict[str, Part]:
    """Return the parts of a package and of an entry-point group, by id.

    Args:
        shipped: Parts of the package.
        group: Entry-point group.
        kind: Class of the parts.

    Raises:
        UsageError: Two parts have one id, or an entry point names an object of another class.
    """
    parts = {part.id: part for part in shipped}
    for point in entry_points(group=group):
        part = point.load()
        if not isinstance(part, kind):
            raise UsageError(
                f"entry point {point.value}: is {type(part).__name__}, expected {kind.__name__}"
            )
        if part.id in parts:
            raise UsageError(f"entry point {point.value}: id {part.id!r} is taken; rename it")
        parts[part.id] = part
    return parts
