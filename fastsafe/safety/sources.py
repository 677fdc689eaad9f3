"""Sources of behaviours and rows, found by entry points."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from fastsafe.safety.plugins import collect

if TYPE_CHECKING:
    from fastsafe.safety.behaviours import Behaviour


@runtime_checkable
class Source(Protocol):
    """A world of data. The same arguments always give the same rows."""

    id: str

    def behaviours(self, n: int, seed: int) -> "Sequence[Behaviour]":
        """Return ``n`` behaviours that no training row holds."""

    def task_rows(
        self, task: str, n: int, split: Literal["train", "test"], seed: int
    ) -> Sequence[dict[str, Any]]:
        """Return benign rows of a task: ``messages`` and, for tests, a ``reference``."""

    def safety_rows(self, format: str, n: int, seed: int) -> Sequence[dict[str, Any]]:
        """Return rows (``messages``) that refuse harmful requests dressed in this format."""

    def translate(self, text: str) -> str:
        """Return an action in the foreign language of the translation format."""


def sources() -> dict[str, Source]:
    """Return every source by id: the entry points of the group ``fastsafe.sources``.

    The shipped organism is one of them: it is found by its entry point, like any plug-in.
    """
    built_in: tuple[Source, ...] = ()
    return collect(built_in, "fastsafe.sources", Source)  # type: ignore[type-abstract]
