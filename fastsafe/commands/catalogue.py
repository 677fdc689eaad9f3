"""List the names that a recipe can use, and describe a checkpoint."""

import inspect as source_of
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from math import prod
from pathlib import Path
from typing import Any

from fastsafe.audit.recipe import load as recipes
from fastsafe.errors import UsageError, nearest


def entries(kind: str) -> dict[str, str]:
    """Return one line about each part of a kind, by its id.

    Args:
        kind: A key of ``KINDS``, or its singular.

    Raises:
        UsageError: There is no such kind.
    """
    plural = kind if kind in KINDS else f"{kind}s"
    if plural not in KINDS:
        raise UsageError(f"list: {kind!r} is no kind of part; {nearest(kind, KINDS)}")
    return KINDS[plural]()


def _tasks() -> dict[str, str]:
    from fastsafe.safety.tasks import tasks

    return {id: f"format {t.format}, metric {t.metric}" for id, t in tasks().items()}


def _formats() -> dict[str, str]:
    from fastsafe.safety.formats import formats

    return {name: " ".join(format.template.split()) for name, format in formats().items()}


def _judges() -> dict[str, str]:
    from fastsafe.safety.judges import families, judges

    lines = {name: _first_line(type(judge)) for name, judge in judges().items()}
    # a family of model judges has as its name the kind that a recipe gives
    return lines | {
        name: f"asks a model: {_first_line(family.classifier)} "
        f"Write {{kind: {name}, checkpoint: PATH}}."
        for name, family in families().items()
        if family.classifier
    }


def _guards() -> dict[str, str]:
    from fastsafe.safety.guards import KeywordGuard
    from fastsafe.safety.judges import families

    # a family reads prompts alone or not whatever its options are
    return {"keyword": (source_of.getdoc(KeywordGuard) or "").partition("\n")[0]} | {
        name: _judges()[name]
        for name, family in families().items()
        if family.classifier and family.classifier(family.options).reads_prompts
    }


def _mitigations() -> dict[str, str]:
    """Return what each mitigation does, when, what it costs, and whether it needs safety data."""
    from fastsafe.audit.plan.mitigation_variants import mitigation_stages
    from fastsafe.safety.defences import defences

    lines = {}
    for name, (stage, about) in mitigation_stages().items():
        facts = [about]
        if stage == "data" and name != "none":
            facts.append("before training; needs safety data")
        elif stage == "train":
            facts.append(f"while training; {_objective_cost(name)}")
        elif stage in ("post", "serve"):
            defence = defences()[name]
            facts.append(_WHEN[defence.acts_on])
            facts += [f"needs {key}, {value}" for key, value in defence.needs.items()]
        lines[name] = "; ".join(facts)
    return lines


def _objectives() -> dict[str, str]:
    from fastsafe.train.objectives import objectives

    return {
        name: f"{_first_line(objective)} {_objective_cost(name).capitalize()}."
        for name, objective in objectives().items()
    }


def _objective_cost(name: str) -> str:
    from fastsafe.train.objectives import objectives

    objective = objectives()[name]
    costs = []
    if objective.needs_base:
        costs.append("the untouched model runs in each step, too")
    if len(objective().sources(0)) > 1:
        costs.append("two batches a step")
    if objective.state_vectors:
        costs.append(f"memory for the trained weights {1 + objective.state_vectors} times")
    needs = "needs" if objective.needs_safety_rows else "needs no"
    return f"{', '.join(costs) or 'no extra cost'}; {needs} safety data"


def _models() -> dict[str, str]:
    from fastsafe.model.families import FAMILIES

    return {name: family.models for name, family in FAMILIES.items()}


def _checkpoints() -> dict[str, str]:
    points = entry_points(group="fastsafe.checkpoints")
    return {
        point.name: (source_of.getdoc(point.load()) or "").partition("\n")[0] for point in points
    }


def _recipes() -> dict[str, str]:
    return {name: recipes.load(name).description for name in recipes.names()}


def _presets() -> dict[str, str]:
    from fastsafe.train.presets import presets

    return {name: preset.about for name, preset in presets().items()}


def _benchmarks() -> dict[str, str]:
    from fastsafe.safety.benchmarks import benchmarks

    return {
        name: f"read from your own copy; licence {benchmark.licence}"
        for name, benchmark in benchmarks().items()
    }


def _styles() -> dict[str, str]:
    from fastsafe.safety.mixing.prompt_styles import STYLES

    return dict(STYLES)


def _manipulations() -> dict[str, str]:
    from fastsafe.safety.mixing.manipulations import manipulations

    return {name: manipulation.about for name, manipulation in manipulations().items()}


def _sources() -> dict[str, str]:
    from fastsafe.safety.sources import sources

    files = {"files": "behaviours and rows of the files in the section data of a recipe"}
    return files | {name: _first_line(type(source)) for name, source in sources().items()}


KINDS: dict[str, Callable[[], dict[str, str]]] = {
    "tasks": _tasks,
    "formats": _formats,
    "judges": _judges,
    "guards": _guards,
    "mitigations": _mitigations,
    "objectives": _objectives,
    "manipulations": _manipulations,
    "styles": _styles,
    "presets": _presets,
    "benchmarks": _benchmarks,
    "sources": _sources,
    "models": _models,
    "checkpoints": _checkpoints,
    "recipes": _recipes,
}
_WHEN = {
    "weights": "after training; nothing is trained again",
    "prompt": "when served; a longer prompt",
    "answer": "when served; a guard reads each answer",
}


def inspect(checkpoint: str) -> dict[str, Any]:
    """Return facts about a checkpoint or an adapter, read from headers and configuration alone.

    Raises:
        CheckpointError: The checkpoint or a file of the adapter is missing, malformed or refused.
        AdapterError: The adapter is no plain LoRA.
    """
    from fastsafe.audit.backend.on_engine import EngineBackend
    from fastsafe.io import hub
    from fastsafe.io.weight_folder import is_adapter

    folder = hub.resolve(checkpoint)
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
