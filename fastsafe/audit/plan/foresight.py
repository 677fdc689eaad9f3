"""Describe a plan in numbers: what it will do, and the smallest effect it can detect."""

from typing import Any

from fastsafe.audit.backend.protocol import ChatTokenizer
from fastsafe.audit.plan.make_plan import Plan
from fastsafe.data.packing import TrainExample, encode_row
from fastsafe.data.readers import Encoded
from fastsafe.safety.stats.intervals import wilson


def describe(plan: Plan, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Return the work of a plan in numbers: conditions, steps, answers, behaviours.

    Args:
        plan: The plan.
        tokenizer: Tokenizer of the checkpoint, by which every training row is encoded.

    Raises:
        DataError: A row cannot be trained with this tokenizer and chat template.
    """
    recipe = plan.recipe
    trained = _encoded(plan, tokenizer)
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
            "rows": len(trained.examples),
            "tokens_trained": trained.num_trained,
            "tokens_unknown": sum(trained.unknown),
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


def _encoded(plan: Plan, tokenizer: ChatTokenizer) -> Encoded:
    """Encode every different training row of a plan, as training does."""
    loss_on, unk_id = plan.recipe.training.loss_on, tokenizer.unk_id
    examples: dict[str, TrainExample] = {}
    for condition in plan.tuned:
        for i, row in enumerate(plan.training_rows[condition.id]):
            if (key := repr(row)) not in examples:
                location = f"{condition.id}: row {i}"
                examples[key] = encode_row(row, tokenizer, loss_on=loss_on, location=location)
    token_ids = (example.token_ids for example in examples.values())
    unknown = [0 if unk_id is None else ids.count(unk_id) for ids in token_ids]
    return Encoded(list(examples.values()), num_truncated=0, unknown=unknown)


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
