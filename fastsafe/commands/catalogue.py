"""List the names that a recipe can use, and describe a checkpoint."""

import inspect as source_of
import sys
from collections import Counter
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
    if kind == "tasks":
        from fastsafe.safety.tasks import tasks

        return {id: f"format {t.format}, metric {t.metric}" for id, t in tasks().items()}
    if kind == "formats":
        from fastsafe.safety.formats import formats

        return {name: " ".join(format.template.split()) for name, format in formats().items()}
    from fastsafe.safety.judges import families, judges

    lines = {name: _first_line(type(judge)) for name, judge in judges().items()}
    # a family of model judges has as its name the kind that a recipe gives
    return lines | {
        name: f"asks a model: {_first_line(family.classifier)}"
        for name, family in families().items()
        if family.classifier
    }


def inspect(checkpoint: str) -> dict[str, Any]:
    """Return facts about a checkpoint, read from its headers and configuration alone.

    Raises:
        CheckpointError: The checkpoint is missing, malformed or refused.
    """
    from math import prod

    from fastsafe.audit.backend.on_engine import EngineBackend

    runtime = EngineBackend(checkpoint)
    checkpoint_files = runtime.checkpoint
    sizes: Counter[str] = Counter()
    for name, shape in checkpoint_files.shapes.items():
        sizes[checkpoint_files.dtypes[name]] += prod(shape)
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


def _first_line(part: Any) -> str:
    """Return the first line of the docstring of the module that defines a part."""
    module = sys.modules[part.__module__]
    return (source_of.getdoc(module) or "").partition("\n")[0]
