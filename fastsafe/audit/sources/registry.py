"""Where behaviours and rows come from; a run asks nothing else of its data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from fastsafe.audit.recipe.schema import Data, Recipe
from fastsafe.audit.sources.files import FilesSource
from fastsafe.errors import RecipeError, nearest
from fastsafe.safety.behaviours import Behaviour
from fastsafe.safety.plugins import collect

AUTO, FILES = "auto", "files"


@runtime_checkable
class Source(Protocol):
    """A world of data. The same arguments always give the same rows."""

    id: str

    def checkpoint(self) -> Path | None:
        """Return the folder of a checkpoint that belongs to this world, None without one."""

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


def sources() -> dict[str, Source]:
    """Return every source by id: the entry points of the group ``fastsafe.sources``.

    The shipped organism is one of them. It stands on the same floor as the audit, which therefore
    finds it by name, as it finds anybody else's.
    """
    own: tuple[Source, ...] = ()
    return collect(own, "fastsafe.sources", Source)  # type: ignore[type-abstract]


def source_of(recipe: Recipe, device: str = "cpu") -> Source:
    """Return the source that a recipe names; "auto" is the one named as its model, else files.

    Raises:
        RecipeError: The recipe names another, or data that this one does not read.
    """
    known = sources()
    name = recipe.source
    if name == AUTO:
        name = recipe.model if recipe.model in known else FILES
    if name == FILES:
        return FilesSource(recipe.data, device)
    if name not in known:
        raise RecipeError(
            f"recipe {recipe.name}: source is {name!r}; {nearest(name, (AUTO, FILES, *known))}"
        )
    if recipe.data != Data():
        raise RecipeError(
            f"recipe {recipe.name}: data names files, but rows come from source {name!r}, which "
            "reads none; set source to 'files'"
        )
    return known[name]


def checkpoint_of(model: str) -> Path:
    """Return the folder of a checkpoint: a path, a hub id, or the name of a source that has one.

    Raises:
        CheckpointError: There is no such path or hub id, or the hub cannot be reached.
    """
    from fastsafe.io import hub

    world = sources().get(model)
    return (world.checkpoint() if world else None) or hub.resolve(model)
