"""What there is to choose from, and what a choice amounts to: lists, checkpoints, plans."""

import inspect as source_of
import sys
from collections.abc import Mapping
from typing import Any

from fastsafe.audit import recipe_file as recipes
from fastsafe.audit.plan import Plan
from fastsafe.safety.stats import wilson


def entries(what: str) -> dict[str, str]:
    """Return id -> one line about it, for tasks, formats, judges, mitigations, models, recipes."""
    if what == "models":
        from fastsafe.model.config import known_architectures

        return dict.fromkeys(known_architectures(), "")
    if what == "recipes":
        return {name: recipes.load(name).description for name in recipes.names()}
    if what == "mitigations":
        from fastsafe.audit.treatments import known

        return {
            name: about if stage == "data" else f"{stage}: {about}"
            for name, (stage, about) in known().items()
        }
    found = {name: _about(part, what) for name, part in _parts(what).items()}
    return found | _families() if what == "judges" else found


def inspect(checkpoint: str) -> dict[str, Any]:
    """Return what a checkpoint holds; headers and configs are read, nothing of it runs.

    Raises:
        CheckpointError: It is missing, malformed or refused.
    """
    from math import prod

    from fastsafe.audit.model_runtime import ModelRuntime

    runtime = ModelRuntime(checkpoint)
    held = runtime.checkpoint
    sizes: dict[str, int] = {}
    for name, shape in held.shapes.items():
        sizes[held.dtypes[name]] = sizes.get(held.dtypes[name], 0) + prod(shape)
    config = runtime.config
    return {
        "path": str(runtime.path),
        "architecture": config.architecture,
        "parameters": sum(sizes.values()),
        "parameters_by_dtype": sizes,
        "tensors": len(held.names),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "ignored_code_fields": list(config.ignored),
        "sha256": held.sha256(),
    }


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
    from fastsafe.safety.power import detectable_change

    tests = max(len(cells["harmful"]) for cells in plan.families().values())
    asked = _behaviours(plan)
    change = detectable_change(asked, tests=max(1, tests))
    if change is None:
        return f"no rise at all in one cell of {asked}; ask for more behaviours"
    return (
        f"a rise of {100 * change:.0f} points in one cell is found with 80% power "
        f"(exact McNemar, Holm's first step over {tests} cells)"
    )


def _parts(what: str) -> Mapping[str, Any]:
    from fastsafe.safety.formats import formats
    from fastsafe.safety.judges import judges
    from fastsafe.safety.tasks import tasks

    registries: dict[str, Any] = {"tasks": tasks, "formats": formats, "judges": judges}
    found: Mapping[str, Any] = registries[what]()
    return found


def _families() -> dict[str, str]:
    """Judges that ask a model, by the ``kind`` of their mapping in a recipe."""
    from fastsafe.safety.judges import families

    return {
        name: f"asks a model: {_first_line(family.classifier)}"
        for name, family in families().items()
        if family.classifier
    }


def _first_line(part: Any) -> str:
    """First line of the docstring of the module that a part is from."""
    module = sys.modules[part.__module__]
    return (source_of.getdoc(module) or "").partition("\n")[0]


def _about(part: Any, what: str) -> str:
    if what == "tasks":
        return f"format {part.format}, metric {part.metric}"
    if what == "formats":
        return " ".join(str(part.template).split())
    return _first_line(type(part))
