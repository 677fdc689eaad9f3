"""Check every name in a recipe, before a checkpoint is opened or anything is computed."""

from collections.abc import Collection

from fastsafe.audit.plan.mitigation_variants import MitigationVariant, expand_mitigations
from fastsafe.audit.recipe.schema import Recipe
from fastsafe.audit.sources.registry import source_of
from fastsafe.errors import RecipeError, nearest, shown


def check_recipe(recipe: Recipe) -> tuple[MitigationVariant, ...]:
    """Check the names in a recipe that matches the schema, and expand its mitigations.

    Returns:
        The mitigation variants, as `expand_mitigations` returns them.

    Raises:
        RecipeError: A task, manipulation, style, format, judge, mitigation or source does not
            exist, or a mitigation has a wrong setting.
    """
    from fastsafe.safety.formats import formats
    from fastsafe.safety.judges import judges, unknown_judge
    from fastsafe.safety.mixing.manipulations import manipulations
    from fastsafe.safety.mixing.prompt_styles import STYLES
    from fastsafe.safety.tasks import tasks

    registries: dict[str, Collection[str]] = {
        "tasks": tasks(),
        "manipulations": manipulations(),
        "styles": STYLES,
        "formats": formats(),
        "safety_formats": formats(),
        "judges": judges(),
    }
    for field, registry in registries.items():
        for name in getattr(recipe, field) or ():
            if isinstance(name, str) and name not in registry:
                hint = unknown_judge(name) if field == "judges" else nearest(name, registry)
                raise RecipeError(f"recipe {recipe.name}: {field} has {shown(name)}; {hint}")
    source_of(recipe)
    return expand_mitigations(recipe)
