"""The protocol of a source: where a run's behaviours, task rows and safety rows come from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from fastsafe.safety.behaviours import Behaviour


@runtime_checkable
class Source(Protocol):
    """A world of data. The same arguments always give the same rows."""

    id: str

    def checkpoint(self) -> Path | None:
        """Return the folder of the checkpoint that belongs to this world, None without one."""

    def behaviours(self, n: int, seed: int) -> Sequence[Behaviour]:
        """Return ``n`` behaviours that no training row holds."""

    def task_rows(
        self, task: str, n: int, split: Literal["train", "test"], seed: int
    ) -> Sequence[dict[str, Any]]:
        """Return benign rows of a task: ``messages`` and, for tests, a ``reference``."""

    def safety_rows(self, format: str, n: int, seed: int) -> Sequence[dict[str, Any]]:
        """Return rows (``messages``) that refuse harmful requests dressed in this format."""

    def translate(self, text: str) -> str:
        """Return an action in the foreign language of the translation format."""
