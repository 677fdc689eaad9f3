"""Treatments: what each entry of a recipe's ``mitigations`` does, and at which stage.

``data`` mixes in safety rows, ``train`` changes the loss, ``post`` changes a trained adapter and
``serve`` the way it is asked or its answers are let through. The last two need no training: they
take the adapter of another treatment.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

from fastsafe.audit.recipe.schema import MitigationSpec, Recipe
from fastsafe.errors import RecipeError, nearest
from fastsafe.io import hub
from fastsafe.io.weight_folder import weights_sha256

Stage = Literal["data", "train", "post", "serve"]

MAX_WORD = 32  # characters of a setting that stands in a label


@dataclass(frozen=True)
class Treatment:
    """One mitigation with its settings.

    Attributes:
        label: What results call it; distinct in a run.
        name: Of the mitigation, objective or defence.
        stage: Where it acts.
        data: Data mitigation whose safety rows are mixed in.
        share: Of the training rows, safety rows included.
        objective: What training minimizes, as ``TrainConfig`` takes it.
        params: Of the defence, where the stage is "post" or "serve".
        parent: Label of the treatment whose adapter is taken; None where one is trained.
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
    def filters(self) -> bool:
        """Whether its answers are its parent's, as far as a guard lets them through."""
        if self.stage != "serve":
            return False
        from fastsafe.safety.defences import defences

        return defences()[self.name].acts_on == "answer"

    @property
    def needs_safety_rows(self) -> bool:
        """Whether its objective tells safety rows from the user's, and so needs some."""
        from fastsafe.train.objectives import objectives

        name = self.objective if isinstance(self.objective, str) else self.objective["name"]
        return objectives()[name].needs_safety_rows

    @cached_property
    def identity(self) -> tuple[str, dict[str, Any]]:
        """What it does to an adapter or its answers, as JSON values.

        Defaults are spelled out. A folder of weights counts by what it holds, not by where it lies.

        Raises:
            RecipeError: A folder holds no weights.
            CheckpointError: It does not exist.
        """
        from fastsafe.safety.defences import defences

        if self.name not in defences():
            return self.name, dict(self.params)
        defence = defences()[self.name]
        given = defence.arguments(self.params)
        if defence.acts_on == "weights":
            given |= {name: self._content(name) for name in defence.needs}
        return self.name, given

    def _content(self, name: str) -> str:
        found = weights_sha256(hub.resolve(self.params[name]))
        if found is None:
            raise RecipeError(
                f"mitigation {self.label}: {name} is {str(self.params[name])!r}, expected the "
                "folder of an adapter or a checkpoint"
            )
        return found


def treatments(recipe: Recipe) -> list[Treatment]:
    """Expand a recipe's mitigations: a list as a setting means one treatment per value.

    Raises:
        RecipeError: A name is unknown, a setting is not one of its own, two entries are the same,
            or the adapter that is to be changed is not trained in this run.
    """
    found: dict[str, Treatment] = {}
    for entry in recipe.mitigations:
        spec = MitigationSpec(name=entry) if isinstance(entry, str) else entry
        for treatment in _expanded(recipe, spec):
            if treatment.label in found:
                raise RecipeError(
                    f"recipe {recipe.name}: mitigation {treatment.label!r} is there twice, "
                    "expected each once; drop one or change a setting"
                )
            found[treatment.label] = treatment
    for treatment in found.values():
        if treatment.stage == "post" and recipe.training.method == "full":
            raise RecipeError(
                f"recipe {recipe.name}: mitigation {treatment.label} changes an adapter, and "
                "training.method is 'full'; use 'lora', or drop it"
            )
        parent = found.get(treatment.parent or "")
        if treatment.parent is not None and (parent is None or parent.parent is not None):
            trained = ", ".join(t.label for t in found.values() if t.parent is None) or "none"
            raise RecipeError(
                f"recipe {recipe.name}: mitigation {treatment.label} changes the adapter of "
                f"{treatment.parent!r}, expected a trained one of this run ({trained}); add it or "
                "set `of`"
            )
    # a parent first, whatever the order in the recipe
    return sorted(found.values(), key=lambda t: t.parent is not None)


@lru_cache
def known() -> dict[str, tuple[Stage, str]]:
    """Stage and one line about every mitigation by name, of all stages."""
    from fastsafe.safety.defences import defences
    from fastsafe.safety.mixing.mitigation import mitigations
    from fastsafe.train.objectives import objectives

    found: dict[str, tuple[Stage, str]] = {}
    for name, mitigation in mitigations().items():
        used = mitigation.formats("<task's format>", ("<every format>",))
        about = f"safety rows dressed as {', '.join(used)}" if used else "no safety rows"
        found[name] = "data", mitigation.about or about
    for name, objective in objectives().items():
        if name != "sft":
            found[name] = "train", (inspect.getdoc(objective) or "").partition("\n")[0]
    for name, defence in defences().items():
        found[name] = defence.stage, defence.about
    return found


def _expanded(recipe: Recipe, spec: MitigationSpec) -> Iterator[Treatment]:
    where = f"recipe {recipe.name}: mitigations"
    if spec.name not in known():
        raise RecipeError(f"{where} has {spec.name!r}; {nearest(spec.name, known())}")
    stage = known()[spec.name][0]
    settings = spec.settings
    allowed = _settings(spec.name, stage)
    if unknown := sorted(set(settings) - set(allowed)):
        raise RecipeError(
            f"{where}: {spec.name} has {unknown[0]!r}; {nearest(unknown[0], allowed or ['name'])}"
        )
    lists = [value if isinstance(value, list | tuple) else [value] for value in settings.values()]
    for values in itertools.product(*lists):
        yield _treatment(recipe, spec.name, stage, dict(zip(settings, values, strict=True)))


def _settings(name: str, stage: Stage) -> Sequence[str]:
    if stage == "data":
        return () if name == "none" else ("share",)
    if stage == "train":
        from fastsafe.train.objectives import objectives

        settings = dataclasses.fields(objectives()[name])
        return (*(setting.name for setting in settings), "data", "share")
    from fastsafe.safety.defences import defences

    defence = defences()[name]
    return (*defence.needs, *defence.params, "of")


def _treatment(recipe: Recipe, name: str, stage: Stage, settings: dict[str, Any]) -> Treatment:
    if stage == "data":
        share = settings.get("share", recipe.share)
        label = "-".join([name, *_shown(settings)])
        return Treatment(label, name, stage, name, share, recipe.training.objective, {})
    if stage == "train":
        from fastsafe.train.objectives import objectives

        needs_safety = objectives()[name].needs_safety_rows
        label = "-".join([name, *_shown(settings)])
        data = settings.pop("data", "plain" if needs_safety else "none")
        share = settings.pop("share", recipe.share)
        return Treatment(label, name, stage, data, share, {"name": name, **settings}, {})
    from fastsafe.safety.defences import defences

    of = settings.pop("of", "none")
    defences()[name].arguments(settings)  # refuses what is missing
    label = "-".join([name, *_shown(settings)])
    label = label if of == "none" else f"{of}+{label}"
    objective = recipe.training.objective
    return Treatment(label, name, stage, "none", recipe.share, objective, settings, of)


def _shown(settings: Mapping[str, Any]) -> list[str]:
    """Settings as they stand in a label, which also names a folder: numbers and short words."""
    # a guard with settings of its own goes by its name
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
