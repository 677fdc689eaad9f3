"""List the names that a recipe can use, and describe a checkpoint."""

import inspect as source_of
import sys
from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path
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
    """Return facts about a checkpoint or an adapter, read from headers and configuration alone.

    Raises:
        CheckpointError: The checkpoint or a file of the adapter is missing, malformed or refused.
        AdapterError: The adapter is no plain LoRA.
    """
    from fastsafe.audit.backend.on_engine import EngineBackend
    from fastsafe.io.weight_folder import is_adapter
    from fastsafe.safety.sources import checkpoint_of

    folder = checkpoint_of(checkpoint)
    if is_adapter(folder):
        return _inspect_adapter(folder)
    runtime = EngineBackend(checkpoint)
    checkpoint_files = runtime.checkpoint
    sizes = _sizes((checkpoint_files.dtypes[n], s) for n, s in checkpoint_files.shapes.items())
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


def _inspect_adapter(folder: Path) -> dict[str, Any]:
    from fastsafe.io import safetensors
    from fastsafe.io.weight_folder import ADAPTER_WEIGHTS, weights_sha256
    from fastsafe.model.adapter_files import read_config

    config, _ = read_config(folder)
    tensors = safetensors.read_header(folder / ADAPTER_WEIGHTS).tensors
    sizes = _sizes((info.dtype, info.shape) for info in tensors.values())
    targets = config.target_modules
    return {
        "path": str(folder),
        "adapter": "LoRA",
        "base_model": config.base_model,
        "rank": config.rank,
        "alpha": config.alpha,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "parameters": sum(sizes.values()),
        "parameters_by_dtype": sizes,
        "tensors": len(tensors),
        "sha256": weights_sha256(folder),
    }


def _sizes(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> Counter[str]:
    """Count the elements of tensors by dtype."""
    sizes: Counter[str] = Counter()
    for dtype, shape in tensors:
        sizes[dtype] += prod(shape)
    return sizes


def _first_line(part: Any) -> str:
    """Return the first line of the docstring of the module that defines a part."""
    module = sys.modules[part.__module__]
    return (source_of.getdoc(module) or "").partition("\n")[0]
