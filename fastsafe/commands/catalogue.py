"""List what there is to choose from, and show what a checkpoint holds."""

import inspect as source_of
import sys
from collections.abc import Mapping
from typing import Any

from fastsafe.audit.recipe import load as recipes


def entries(what: str) -> dict[str, str]:
    """Return id -> one line about it, for tasks, formats, judges, mitigations, models, recipes."""
    if what == "models":
        from fastsafe.model.config import known_architectures

        return dict.fromkeys(known_architectures(), "")
    if what == "recipes":
        return {name: recipes.load(name).description for name in recipes.names()}
    if what == "mitigations":
        from fastsafe.audit.plan.mitigation_variants import mitigation_stages

        return {
            name: about if stage == "data" else f"{stage}: {about}"
            for name, (stage, about) in mitigation_stages().items()
        }
    found = {name: _about(part, what) for name, part in _parts(what).items()}
    return found | _families() if what == "judges" else found


def inspect(checkpoint: str) -> dict[str, Any]:
    """Return what a checkpoint holds; headers and configs are read, nothing of it runs.

    Raises:
        CheckpointError: It is missing, malformed or refused.
    """
    from math import prod

    from fastsafe.audit.backend.on_engine import EngineBackend

    runtime = EngineBackend(checkpoint)
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
