"""The manifest of a run: its resolved recipe and declared tests, written before any work."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fastsafe
from fastsafe.audit.backend.on_engine import EngineBackend
from fastsafe.audit.plan.make_plan import Plan
from fastsafe.audit.sources.files import data_hashes
from fastsafe.audit.store.sqlite_store import now
from fastsafe.errors import CheckpointError, StoreError, shown
from fastsafe.io import atomic
from fastsafe.io.json_file import read_object

NAME = "manifest.json"
SCHEMA = "fastsafe.manifest/1"
MAX_BYTES = 64 << 20
REVISABLE = ("fastsafe", "recipe", "judges", "guards", "families")


def write_manifest(run_dir: Path, plan: Plan, backend: EngineBackend, started_at: str) -> None:
    """Write ``manifest.json`` once: the resolved recipe, hashes, declared tests and versions.

    It declares the families of tests before the first answer exists, so that nobody can choose
    them by their outcome. Later changes of judges or thresholds are appended to ``revisions``,
    each with its time.
    """
    path = run_dir / NAME
    record = {
        "schema": SCHEMA,
        "fastsafe": fastsafe.__version__,
        "started_at": started_at,
        "plan_sha256": plan.identity,
        **plan.engine,
        "recipe": plan.recipe.model_dump(mode="json"),
        "data_sha256": data_hashes(plan.recipe.data),
        "conditions": [condition.record() for condition in plan.conditions],
        "judges": plan.panel.identities,
        "guards": plan.panel.guard_identities,
        "translator": plan.translator,
        "templates": dict(plan.templates),
        "families": plan.families(),
        "num_answers": len(plan.rows),
        "environment": backend.facts(),
        "revisions": [],
    }
    if path.exists():
        revise_manifest(run_dir, {key: record[key] for key in REVISABLE})
    else:
        atomic.write_text(path, to_json(record))


def revise_manifest(run_dir: Path, values: Mapping[str, Any]) -> None:
    """Append the changed ones of ``values`` to ``revisions``; the first declaration stays."""
    path = run_dir / NAME
    record = _read(path)
    current = record | {k: v for revision in record["revisions"] for k, v in revision.items()}
    changed = {key: value for key, value in values.items() if value != current.get(key)}
    if changed:
        record["revisions"].append({"at": now(), **changed})
        atomic.write_text(path, to_json(record))


def _read(path: Path) -> dict[str, Any]:
    try:
        record = read_object(path, MAX_BYTES)
    except CheckpointError as error:
        raise StoreError(f"{error}; delete it, and fastsafe audit writes it again") from None
    revisions = record.get("revisions")
    if not isinstance(revisions, list) or not all(isinstance(each, dict) for each in revisions):
        raise StoreError(
            f"{path}: revisions is {shown(revisions)}, expected a list of objects; delete the "
            "file, and fastsafe audit writes it again"
        )
    return record


def to_json(value: Any) -> str:
    """Return indented strict JSON with a final newline, as files of a run directory have it."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
