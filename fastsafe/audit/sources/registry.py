"""Find the source that a recipe names."""

from fastsafe.audit.recipe.schema import Data, Recipe
from fastsafe.audit.sources.files import FilesSource, OpenCompleter, no_completer
from fastsafe.errors import RecipeError, nearest
from fastsafe.safety.sources import Source, sources

AUTO, FILES = "auto", "files"


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
