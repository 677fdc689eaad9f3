"""List the names that a recipe can use, and describe a checkpoint."""

import inspect as source_of
import sys
from collections.abc import Mapping
from typing import Any

from fastsafe.audit.recipe import load as recipes


def entries(kind: str) -> dict[str, str]:
    """Return one line about each task, format, judge, mitigation, model or recipe, by its id."""
    if kind == "models":
        from fastsafe.model.families import FAMILIES

        return dict.fromkeys(FAMILIES, "")
    if kind == "recipes":
        return {name: recipes.load(name).description for name in recipes.names()}
    if kind == "mitigations":
        from fastsafe.audit.plan.mitigation_variants import mitigation_stages

        return {
            name: about if stage == "data" else f"{stage}: {about}"
            for name, (stage, about) in mitigation_stages().items()
        }
    lines = {name: _about(part, kind) for name, part in _parts(kind).items()}
    return lines | _families() if kind == "judges" else lines


def inspect(checkpoint: str) -> dict[str, Any]:
    """Return facts about a checkpoint, read from its headers and configuration alone.

    Raises:
        CheckpointError: The checkpoint is missing, malformed or refused.
    """
    from math import prod

    from fastsafe.audit.backend.on_engine import EngineBackend

    runtime = EngineBackend(checkpoint)
    checkpoint_files = runtime.checkpoint
    sizes: dict[str, int] = {}
    for name, shape in checkpoint_files.shapes.items():
        sizes[checkpoint_files.dtypes[name]] = sizes.get(checkpoint_files.dtypes[name], 0) + prod(
            shape
        )
    config = runtime.config
    return {
        "path": str(runtime.path),
        "architecture": config.architecture,
        "parameters": sum(sizes.values()),
        "parameters_by_dtype": sizes,
        "tensors": len(checkpoint_files.names),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "ignored_code_fields": list(config.ignored),
        "sha256": checkpoint_files.sha256(),
    }


def _parts(kind: str) -> Mapping[str, Any]:
    from fastsafe.safety.formats import formats
    from fastsafe.safety.judges import judges
    from fastsafe.safety.tasks import tasks

    registries: dict[str, Any] = {"tasks": tasks, "formats": formats, "judges": judges}
    parts: Mapping[str, Any] = registries[kind]()
    return parts


def _families() -> dict[str, str]:
    """Return one line about each family of model judges, by the ``kind`` that a recipe gives."""
    from fastsafe.safety.judges import families

    return {
        name: f"asks a model: {_first_line(family.classifier)}"
        for name, family in families().items()
        if family.classifier
    }


def _first_line(part: Any) -> str:
    """Return the first line of the docstring of the module that defines a part."""
    module = sys.modules[part.__module__]
    return (source_of.getdoc(module) or "").partition("\n")[0]


def _about(part: Any, kind: str) -> str:
    if kind == "tasks":
        return f"format {part.format}, metric {part.metric}"
    if kind == "formats":
        return " ".join(str(part.template).split())
    return _first_line(type(part))
