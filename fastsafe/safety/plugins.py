"""Finding the parts of the safety floor: files of a package first, then entry points."""

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


def own_parts(package: str, path: Iterable[str], attribute: str) -> list[Any]:
    """Return ``attribute`` of every module of ``package`` whose name has no leading underscore."""
    names = sorted(m.name for m in iter_modules(path) if not m.name.startswith("_"))
    return [getattr(import_module(f"{package}.{name}"), attribute) for name in names]


def collect(own: Iterable[Part], group: str, kind: type[Part]) -> dict[str, Part]:
    """Return ``own`` and what the entry points of ``group`` name, by id.

    Raises:
        UsageError: Two parts have one id, or an entry point names something that is no ``kind``.
    """
    found = {part.id: part for part in own}
    for point in entry_points(group=group):
        part = point.load()
        if not isinstance(part, kind):
            raise UsageError(
                f"entry point {point.value}: is {type(part).__name__}, expected {kind.__name__}"
            )
        if part.id in found:
            raise UsageError(f"entry point {point.value}: id {part.id!r} is taken; rename it")
        found[part.id] = part
    return found
