"""Describe a plan in numbers: what it will do, and the smallest effect it can detect."""

from typing import Any

from fastsafe.audit.plan.make_plan import Plan
from fastsafe.safety.stats.intervals import wilson


def describe(plan: Plan) -> dict[str, Any]:
    """Return the work of a plan in numbers: conditions, steps, answers, behaviours."""
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
        "judges": list(plan.panel.judges),
        "answers": {
            "harmful": kinds.count("harmful"),
            "benign": kinds.count("benign"),
            "utility": kinds.count("utility"),
            "in_all": len(kinds),
        },
        "behaviours": _num_behaviours(plan),
        **power_summary(plan),
        "plan_sha256": plan.identity,
    }


def power_summary(plan: Plan) -> dict[str, str]:
    """Return the precision of a rate and the smallest rise that a run can detect, as sentences."""
    behaviours = _num_behaviours(plan)
    low, high = wilson(behaviours // 2, behaviours)
    return {
        "certainty": f"a rate of 50% is known to within {50 * (high - low):.0f} points by "
        f"{behaviours} prompts in each cell",
        "detectable": _detectable(plan),
    }


def _num_behaviours(plan: Plan) -> int:
    """Count the behaviours per cell: those asked for, or all that the source has."""
    return len({row.item for row in plan.rows if row.kind != "utility"})


def _detectable(plan: Plan) -> str:
    """Return a sentence on the smallest rise of one cell that the run can detect."""
    from fastsafe.safety.stats.power import detectable_change

    tests = max(len(cells["harmful"]) for cells in plan.families().values())
    behaviours = _num_behaviours(plan)
    change = detectable_change(behaviours, tests=max(1, tests))
    if change is None:
        return f"no rise at all in one cell of {behaviours}; ask for more behaviours"
    return (
        f"a rise of {100 * change:.0f} points in one cell is found with 80% power "
        f"(exact McNemar, Holm's first step over {tests} cells)"
    )
