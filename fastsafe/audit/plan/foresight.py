"""Describe a plan in numbers: what it will do, and the smallest effect it can detect."""

from typing import Any

from fastsafe.audit.plan.make_plan import Plan
from fastsafe.safety.stats.intervals import wilson


def describe(plan: Plan) -> dict[str, Any]:
    """Return what a plan will do, in numbers."""
    recipe = plan.recipe
    kinds = [row.kind for row in plan.rows]
    return {
        "recipe": recipe.name,
        "model": recipe.model,
        "checkpoint_sha256": plan.engine["checkpoint_sha256"],
        "device": plan.engine["device"],
        "conditions": [condition.id for condition in plan.conditions],
        "runs": len(plan.conditions) * len(recipe.system_prompts),
        "train": {
            "adapters": len(plan.tuned),
            "waves": len(list(plan.waves())),
            "steps_each": recipe.training.max_steps,
            "rows_per_step": recipe.training.batch_size,
        },
        "formats": list(recipe.formats),
        "judges": list(plan.judges),
        "answers": {
            "harmful": kinds.count("harmful"),
            "benign": kinds.count("benign"),
            "utility": kinds.count("utility"),
            "in_all": len(kinds),
        },
        "behaviours": _behaviours(plan),
        **foresight(plan),
        "plan_sha256": plan.identity,
    }


def foresight(plan: Plan) -> dict[str, str]:
    """Say what the numbers of a run will be able to show, before it is paid for."""
    asked = _behaviours(plan)
    low, high = wilson(asked // 2, asked)
    return {
        "certainty": f"a rate of 50% is known to within {50 * (high - low):.0f} points",
        "detectable": _detectable(plan),
    }


def _behaviours(plan: Plan) -> int:
    """Number of behaviours per cell: those asked for, or all that the source has."""
    return len({row.item for row in plan.rows if row.kind != "utility"})


def _detectable(plan: Plan) -> str:
    """Say the smallest rise of one cell that the run will find."""
    from fastsafe.safety.stats.power import detectable_change

    tests = max(len(cells["harmful"]) for cells in plan.families().values())
    asked = _behaviours(plan)
    change = detectable_change(asked, tests=max(1, tests))
    if change is None:
        return f"no rise at all in one cell of {asked}; ask for more behaviours"
    return (
        f"a rise of {100 * change:.0f} points in one cell is found with 80% power "
        f"(exact McNemar, Holm's first step over {tests} cells)"
    )
