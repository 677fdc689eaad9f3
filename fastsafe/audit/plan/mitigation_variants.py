"""Expand a recipe's ``mitigations`` into variants: one per mitigation and setting.

A variant acts at one stage. ``data`` mixes safety rows into the training rows, ``train`` changes
the training objective, ``post`` changes a trained adapter, and ``serve`` changes prompts or filters
answers. The last two train nothing: they take the adapter of another variant.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

from fastsafe.audit.recipe.schema import MitigationSpec, Recipe
from fastsafe.errors import RecipeError, nearest, shown
from fastsafe.io import hub
from fastsafe.io.weight_folder import weights_sha256

Stage = Literal["data", "train", "post", "serve"]

MAX_WORD = 32  # characters of a setting that a label shows


@dataclass(frozen=True)
class MitigationVariant:
    """One mitigation with one set of settings.

    Attributes:
        label: Its name in results; unique in a run.
        name: Name of the mitigation, objective or defence.
        stage: Stage at which it acts.
        data: Data mitigation whose safety rows are mixed in.
        share: Fraction of the training rows that are safety rows.
        objective: Training objective, as ``TrainConfig`` takes it.
        params: Settings of the defence, where the stage is "post" or "serve".
        parent: Label of the variant whose adapter it takes; None where it trains its own.
    """

    label: str
    name: str
    stage: Stage
    data: str
    share: float
    objective: str | Mapping[str, Any]
    params: Mapping[str, Any]
    parent: str | None = None

    @property
    def served_on(self) -> str | None:
        """What its defence changes when the model is served: "prompt", "answer" or None."""
        if self.stage != "serve":
            return None
        from fastsafe.safety.defences import defences

        return defences()[self.name].acts_on

    @property
    def needs_safety_rows(self) -> bool:
        """Whether its objective treats safety rows differently, and so needs some."""
        from fastsafe.train.objectives import objectives

        name = self.objective if isinstance(self.objective, str) else self.objective["name"]
        return objectives()[name].needs_safety_rows

    @cached_property
    def identity(self) -> tuple[str, dict[str, Any]]:
        """Name and settings as JSON values, for hashing.

        Defaults are spelled out, and a folder of weights is replaced by the hash of its content.

        Raises:
            RecipeError: A folder holds no weights.
            CheckpointError: It does not exist.
        """
        from fastsafe.safety.defences import defences

        if self.name not in defences():
            return self.name, dict(self.params)
        defence = defences()[self.name]
        arguments = defence.arguments(self.params)
        if defence.acts_on == "weights":
            arguments |= {name: self._folder_sha256(name) for name in defence.needs}
        return self.name, arguments

    def _folder_sha256(self, name: str) -> str:
        sha256 = weights_sha256(hub.resolve(self.params[name]))
        if sha256 is None:
            raise RecipeError(
                f"mitigation {self.label}: {name} is {str(self.params[name])!r}, expected the "
                "folder of an adapter or a checkpoint"
            )
        return sha256


def expand_mitigations(recipe: Recipe) -> tuple[MitigationVariant, ...]:
    """Expand a recipe's mitigations; a list as a setting makes one variant per value.

    Returns:
        The variants, those that train an adapter first.

    Raises:
        RecipeError: A name is unknown, a setting is not one of its own, two entries are the same,
            or the adapter that is to be changed is not trained in this run.
    """
    variants: dict[str, MitigationVariant] = {}
    for entry in recipe.mitigations:
        spec = MitigationSpec(name=entry) if isinstance(entry, str) else entry
        for variant in _expanded(recipe, spec):
            if variant.label in variants:
                raise RecipeError(
                    f"recipe {recipe.name}: mitigation {variant.label!r} is there twice, "
                    "expected each once; drop one or change a setting"
                )
            variants[variant.label] = variant
    for variant in variants.values():
        if variant.stage == "post" and recipe.training.method == "full":
            raise RecipeError(
                f"recipe {recipe.name}: mitigation {variant.label} changes an adapter, and "
                "training.method is 'full'; use 'lora', or drop it"
            )
        parent = variants.get(variant.parent or "")
        if variant.parent is not None and (parent is None or parent.parent is not None):
            trained = ", ".join(v.label for v in variants.values() if v.parent is None) or "none"
            raise RecipeError(
                f"recipe {recipe.name}: mitigation {variant.label} changes the adapter of "
                f"{variant.parent!r}, expected a trained one of this run ({trained}); add it or "
                "set `of`"
            )
    # parents first, whatever the order in the recipe
    return tuple(sorted(variants.values(), key=lambda variant: variant.parent is not None))


@lru_cache
def mitigation_stages() -> dict[str, tuple[Stage, str]]:
    """Return the stage of every mitigation and one line about it, by name."""
    from fastsafe.safety.defences import defences
    from fastsafe.safety.mixing.mitigation import mitigations
    from fastsafe.train.objectives import objectives

    stages: dict[str, tuple[Stage, str]] = {}
    for name, mitigation in mitigations().items():
        formats = mitigation.formats("the task's format", ("every format",))
        about = f"safety rows in {' and '.join(formats)}" if formats else "no safety rows"
        stages[name] = "data", mitigation.about or about
    for name, objective in objectives().items():
        if name != "sft":
            about = inspect.getdoc(inspect.getmodule(objective)) or ""
            stages[name] = "train", about.partition("\n")[0].rstrip(".")
    for name, defence in defences().items():
        stages[name] = defence.stage, defence.about
    return stages


def _expanded(recipe: Recipe, spec: MitigationSpec) -> Iterator[MitigationVariant]:
    section, stages = f"recipe {recipe.name}: mitigations", mitigation_stages()
    if spec.name not in stages:
        raise RecipeError(f"{section} has {shown(spec.name)}; {nearest(spec.name, stages)}")
    stage = stages[spec.name][0]
    settings = spec.settings
    allowed = _allowed_settings(spec.name, stage)
    if unknown := sorted(set(settings) - set(allowed)):
        raise RecipeError(
            f"{section}: {spec.name} has {shown(unknown[0])}; "
            f"{nearest(unknown[0], allowed or ['name'])}"
        )
    lists = [value if isinstance(value, list | tuple) else [value] for value in settings.values()]
    for values in itertools.product(*lists):
        yield _variant(recipe, spec.name, stage, dict(zip(settings, values, strict=True)))


def _allowed_settings(name: str, stage: Stage) -> Sequence[str]:
    if stage == "data":
        return () if name == "none" else ("share",)
    if stage == "train":
        from fastsafe.train.objectives import objectives

        settings = dataclasses.fields(objectives()[name])
        return (*(setting.name for setting in settings), "data", "share")
    from fastsafe.safety.defences import defences

    defence = defences()[name]
    return (*defence.needs, *defence.params, "of")


def _variant(
    recipe: Recipe, name: str, stage: Stage, settings: dict[str, Any]
) -> MitigationVariant:
    parent = settings.pop("of", "none")
    if not isinstance(parent, str):
        raise RecipeError(
            f"recipe {recipe.name}: mitigation {name}: of is {shown(parent)}, expected the label "
            "of a mitigation"
        )
    label = "-".join([name, *_label_parts(settings)])
    if stage == "data":
        share = settings.get("share", recipe.share)
        return MitigationVariant(label, name, stage, name, share, recipe.training.objective, {})
    if stage == "train":
        from fastsafe.train.objectives import objectives

        needs_safety = objectives()[name].needs_safety_rows
        data = settings.pop("data", "plain" if needs_safety else "none")
        share = settings.pop("share", recipe.share)
        return MitigationVariant(label, name, stage, data, share, {"name": name, **settings}, {})
    from fastsafe.safety.defences import defences

    defences()[name].arguments(settings)  # raises where a required setting is missing
    label = label if parent == "none" else f"{parent}+{label}"
    objective = recipe.training.objective
    return MitigationVariant(label, name, stage, "none", recipe.share, objective, settings, parent)


def _label_parts(settings: Mapping[str, Any]) -> list[str]:
    """Return the settings that a label shows; it also names a folder: numbers and short words."""
    # a guard that is a mapping is shown by its id
    values = [
        value.get("id", value.get("kind")) if isinstance(value, Mapping) else value
        for value in settings.values()
    ]
    return [
        f"{value:g}" if isinstance(value, float) else str(value)
        for value in values
        if isinstance(value, int | float)
        or (isinstance(value, str) and value.isidentifier() and len(value) <= MAX_WORD)
    ]
