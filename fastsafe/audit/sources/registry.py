"""Where behaviours and rows come from; a run asks nothing else of its data."""

from fastsafe.audit.recipe.schema import Data, Recipe
from fastsafe.audit.sources.files import FilesSource
from fastsafe.errors import RecipeError, nearest
from fastsafe.safety.sources import Source, checkpoint_of, sources

__all__ = ["AUTO", "FILES", "Source", "checkpoint_of", "source_of", "sources"]

AUTO, FILES = "auto", "files"


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
