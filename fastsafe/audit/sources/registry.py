"""Find sources by name, and the checkpoint folder that a model's name stands for."""

from pathlib import Path

from fastsafe.audit.recipe.schema import Data, Recipe
from fastsafe.audit.sources.files import FilesSource, OpenCompleter, no_completer
from fastsafe.audit.sources.protocol import Source
from fastsafe.errors import RecipeError, nearest
from fastsafe.safety.plugins import collect

AUTO, FILES = "auto", "files"


def sources() -> dict[str, Source]:
    """Return every source by id: the entry points of the group ``fastsafe.sources``.

    The shipped organism is one of them: it stands on the same floor as the audit, which therefore
    finds it by name, like any plug-in's.
    """
    built_in: tuple[Source, ...] = ()
    return collect(built_in, "fastsafe.sources", Source)  # type: ignore[type-abstract]


def source_of(recipe: Recipe, open_completer: OpenCompleter = no_completer) -> Source:
    """Return the source that a recipe names; "auto" is the one named as its model, else files.

    Args:
        recipe: Its ``source``, ``model`` and ``data`` decide.
        open_completer: Opens the checkpoint that ``data.translator`` names, when the first
            translation is needed.

    Raises:
        RecipeError: The recipe names another, or data that this one does not read.
    """
    registered = sources()
    name = recipe.source
    if name == AUTO:
        name = recipe.model if recipe.model in registered else FILES
    if name == FILES:
        return FilesSource(recipe.data, open_completer)
    if name not in registered:
        raise RecipeError(
            f"recipe {recipe.name}: source is {name!r}; {nearest(name, (AUTO, FILES, *registered))}"
        )
    if recipe.data != Data():
        raise RecipeError(
            f"recipe {recipe.name}: data names files, but rows come from source {name!r}, which "
            "reads none; set source to 'files'"
        )
    return registered[name]


def checkpoint_of(model: str) -> Path:
    """Return the folder of a checkpoint: a path, a hub id, or the name of a source that has one.

    Raises:
        CheckpointError: There is no such path or hub id, or the hub cannot be reached.
    """
    from fastsafe.io import hub

    world = sources().get(model)
    return (world.checkpoint() if world else None) or hub.resolve(model)
