"""What a run set out to do, written before it does anything."""

import json
from pathlib import Path
from typing import Any

import fastsafe
from fastsafe.audit.plan import Plan
from fastsafe.audit.runtime import Runtime
from fastsafe.io import atomic

NAME = "manifest.json"
SCHEMA = "fastsafe.manifest/1"


def write_manifest(run_dir: Path, plan: Plan, runtime: Runtime, started_at: str) -> None:
    """Write ``manifest.json``: the resolved recipe, hashes, declared tests and versions.

    The families of tests stand here before the first answer exists, so that nobody can choose
    them by their outcome.
    """
    record = {
        "schema": SCHEMA,
        "fastsafe": fastsafe.__version__,
        "started_at": started_at,
        "plan_sha256": plan.identity,
        **plan.engine,
        "recipe": plan.recipe.model_dump(mode="json"),
        "conditions": [condition.record() for condition in plan.conditions],
        "judges": dict(plan.judges),
        "families": plan.families(),
        "num_answers": len(plan.rows),
        "environment": runtime.facts(),
    }
    atomic.write_text(run_dir / NAME, to_json(record))


def to_json(value: Any) -> str:
    """Return JSON as the run directory holds it: readable, strict, with a final newline."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
