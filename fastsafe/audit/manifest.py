"""What a run set out to do, written before it does anything."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fastsafe
from fastsafe.audit.backend.protocol import Runtime
from fastsafe.audit.plan.make_plan import Plan
from fastsafe.audit.store.sqlite_store import now
from fastsafe.io import atomic
from fastsafe.io.json_file import read_json

NAME = "manifest.json"
SCHEMA = "fastsafe.manifest/1"
MAX_BYTES = 64 << 20
REVISABLE = ("fastsafe", "recipe", "judges", "guards", "families")


def write_manifest(run_dir: Path, plan: Plan, runtime: Runtime, started_at: str) -> None:
    """Write ``manifest.json`` once: the resolved recipe, hashes, declared tests and versions.

    The families of tests stand here before the first answer exists, so that nobody can choose
    them by their outcome. What a later command changed (judges, thresholds) is appended to
    ``revisions``, each with its own time.
    """
    path = run_dir / NAME
    record = {
        "schema": SCHEMA,
        "fastsafe": fastsafe.__version__,
        "started_at": started_at,
        "plan_sha256": plan.identity,
        **plan.engine,
        "recipe": plan.recipe.model_dump(mode="json"),
        "conditions": [condition.record() for condition in plan.conditions],
        "judges": dict(plan.judges),
        "guards": plan.panel.guard_identities,
        "translator": plan.translator,
        "templates": dict(plan.templates),
        "families": plan.families(),
        "num_answers": len(plan.rows),
        "environment": runtime.facts(),
        "revisions": [],
    }
    if path.exists():
        revise_manifest(run_dir, {key: record[key] for key in REVISABLE})
    else:
        atomic.write_text(path, to_json(record))


def revise_manifest(run_dir: Path, values: Mapping[str, Any]) -> None:
    """Append those of ``values`` that a later command changed; what was declared first stays."""
    path = run_dir / NAME
    old: dict[str, Any] = read_json(path, MAX_BYTES)
    current = old | {k: v for revision in old["revisions"] for k, v in revision.items()}
    changed = {key: value for key, value in values.items() if value != current[key]}
    if changed:
        record = old | {"revisions": [*old["revisions"], {"at": now(), **changed}]}
        atomic.write_text(path, to_json(record))


def to_json(value: Any) -> str:
    """Return JSON as the run directory holds it: readable, strict, with a final newline."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
