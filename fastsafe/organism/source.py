"""The organism's world as a source of rows, found by the entry point ``fastsafe.sources``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fastsafe.safety.behaviours import Behaviour

from . import path, world


class OrganismSource:
    """Behaviours and rows of the closed synthetic world, and the checkpoint trained on it."""

    id = "organism"

    def checkpoint(self) -> Path:
        """Return the folder of the shipped checkpoint."""
        return path()

    def behaviours(self, n: int, seed: int) -> Sequence[Behaviour]:
        """Return held-out verb-object pairs and their benign twins."""
        return world.behaviours(n, seed)

    def task_rows(
        self, task: str, n: int, split: Literal["train", "test"], seed: int
    ) -> Sequence[dict[str, Any]]:
        """Return rows of benign verbs; the pairs of the test split occur in no other row."""
        return [dict(row) for row in world.task_rows(task, n, split, seed)]

    def safety_rows(self, format: str, n: int, seed: int) -> Sequence[dict[str, Any]]:
        """Return harmful training pairs dressed in the format, each refused."""
        return [dict(row) for row in world.safety_rows(format, n, seed)]

    def translate(self, text: str) -> str:
        """Return an action in the world's second language."""
        return world.translate(text)


SOURCE = OrganismSource()
