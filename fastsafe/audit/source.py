"""Where behaviours and rows come from; a run asks nothing else of its data."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from fastsafe.safety.behaviours import Behaviour


class Source(Protocol):
    """A world of data. The same arguments always give the same rows."""

    id: str

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


class OrganismSource:
    """The closed synthetic world of the shipped model."""

    id = "organism"

    def behaviours(self, n: int, seed: int) -> Sequence[Behaviour]:
        """Return held-out verb-object pairs and their benign twins."""
        from fastsafe.organism import world

        return world.behaviours(n, seed)

    def task_rows(
        self, task: str, n: int, split: Literal["train", "test"], seed: int
    ) -> Sequence[dict[str, Any]]:
        """Return rows of benign verbs; the test split holds pairs no other row has."""
        from fastsafe.organism import world

        return [dict(row) for row in world.task_rows(task, n, split, seed)]

    def safety_rows(self, format: str, n: int, seed: int) -> Sequence[dict[str, Any]]:
        """Return harmful training pairs with a refusal in the format's answer channel."""
        from fastsafe.organism import world

        return [dict(row) for row in world.safety_rows(format, n, seed)]

    def translate(self, text: str) -> str:
        """Return an action in the world's second language."""
        from fastsafe.organism import world

        return world.translate(text)


def source(name: str) -> Source:
    """Return the source a recipe names; the recipe has already refused unknown ones."""
    return {"organism": OrganismSource()}[name]
