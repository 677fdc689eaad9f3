"""What a run set out to do, as its store records it: the plan, the recipe, judges and guards."""

import json
from typing import Any

from pydantic import ValidationError

import fastsafe
from fastsafe.audit.plan.make_plan import Plan, differences, settings
from fastsafe.audit.plan.panel import Panel
from fastsafe.audit.recipe.schema import Recipe
from fastsafe.audit.sources.files import data_hashes
from fastsafe.audit.store import sqlite_store as stores
from fastsafe.audit.store.queries import damaged
from fastsafe.audit.store.sqlite_store import Store
from fastsafe.errors import StoreError


def record_plan(store: Store, plan: Plan) -> None:
    """Record the plan in a new store; an old one must have the same."""
    if store.meta("identity") is None:
        prompts = {p.sha256: (p.text, p.token_ids) for p in plan.prompts.values()}
        with store.transaction():
            store.add_plan(plan.rows, prompts)
            store.set_meta(
                {
                    "identity": plan.identity,
                    "settings": settings(plan),
                    "conditions": [condition.record() for condition in plan.conditions],
                    "engine": dict(plan.engine),
                    "translator": plan.translator,
                    "templates": dict(plan.templates),
                    "data_sha256": data_hashes(plan.recipe.data),
                    "started_at": stores.now(),
                }
            )
    elif store.meta("identity") != plan.identity:
        # through JSON, as the store did: tuples become lists
        changed = differences(store.meta("settings"), json.loads(json.dumps(settings(plan))))
        before, after = store.meta("data_sha256") or {}, data_hashes(plan.recipe.data)
        changed += [
            f"the file of {key} has changed"
            for key, sha256 in after.items()
            if before.get(key, sha256) != sha256
        ]
        what = "; ".join(changed) or "this version of fastsafe plans other rows for the same recipe"
        raise StoreError(
            f"run {store.path.parent}: was made with other settings ({what}); use the same ones or "
            "another --out; --no-resume deletes the run and starts over"
        )
    record_panel(store, plan.recipe, plan.panel)


def record_panel(store: Store, recipe: Recipe, panel: Panel) -> dict[str, Any]:
    """Record judges, guards and thresholds in the store; ``fastsafe judge`` may replace them."""
    values = {
        "recipe": recipe.model_dump(mode="json"),
        "judges": panel.identities,
        "guards": panel.guard_identities,
        "harmful_only": panel.harmful_only,
        "wordings": panel.wording_identities,
        "calibrated": dict(panel.calibrated),
        "version": fastsafe.__version__,
    }
    if any(store.meta(key) != value for key, value in values.items()):
        with store.transaction():
            store.set_meta(values)
    return values


def recorded_recipe(store: Store) -> Recipe:
    """Return the recipe that the store holds.

    Raises:
        StoreError: It holds none that is valid.
    """
    recorded = store.meta("recipe")
    if recorded is None:
        raise StoreError(
            f"store {store.path}: holds no recipe yet; begin the run with fastsafe audit"
        )
    for key in ("identity", "settings", "conditions", "engine", "judges", "guards"):
        if store.meta(key) is None:
            raise damaged(store.path, f"{key} is missing")
    try:
        return Recipe.model_validate(recorded)
    except ValidationError:
        raise damaged(store.path, "its recipe is not valid") from None
