"""Conditions: every model of a run, trained, changed afterwards, or served differently."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from fastsafe.audit.plan.mitigation_variants import Treatment, treatments
from fastsafe.audit.recipe.schema import Recipe
from fastsafe.audit.sources.registry import Source
from fastsafe.errors import RecipeError
from fastsafe.safety.mixing.rewrite_checks import WORDING, Rewrite

BASE = "base"
NATIVE, BENIGN = "native", "benign"  # what a condition's id leaves out

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Condition:
    """One fine-tuned model, or the untouched one.

    Attributes:
        id: Unique in a run; names the adapter's folder.
        task: What it was tuned for, None for the untouched model.
        mitigation: Label of its treatment, "none" without one.
        key: Hash of the checkpoint, the rows and every option that shaped its weights; "" for the
            base. Served differently, the same weights keep their key.
        adapter: Id of the condition whose adapter answers, None for the base.
        parent: Id of the condition whose adapter it changes or serves, None where it is trained.
        own_format: Of the task's rows.
        seed: Of training and mixing, where a recipe has several; its id ends in it.
        worded: Rows that a model was asked to word, by why its wording was not taken; "" where it
            was.
        treatment: What was done to it; None for the base.
    """

    id: str
    task: str | None
    mitigation: str
    preset: str | None
    key: str
    adapter: str | None = None
    parent: str | None = None
    num_rows: int = 0
    num_safety_rows: int = 0
    own_format: str | None = None
    manipulation: str = BENIGN
    style: str = NATIVE
    seed: int | None = None
    worded: Mapping[str, int] = field(default_factory=dict, compare=False)
    treatment: Treatment | None = field(default=None, compare=False)

    @property
    def params(self) -> Mapping[str, Any]:
        """Settings of its defence; empty where there is none."""
        return self.treatment.params if self.treatment else {}

    @property
    def served(self) -> tuple[str, dict[str, Any]]:
        """What is done to its questions or answers, as JSON values."""
        return self.treatment.identity if self.treatment else ("", {})

    @property
    def objective(self) -> str | Mapping[str, Any]:
        """What its training minimizes, as ``TrainConfig`` takes it."""
        return self.treatment.objective if self.treatment else "sft"

    @property
    def is_trained(self) -> bool:
        """Whether it has an adapter that training makes."""
        return self.task is not None and self.parent is None

    def record(self) -> dict[str, Any]:
        """Return the condition as ``results.json`` holds it."""
        return {
            "id": self.id,
            "task": self.task,
            "own_format": self.own_format,
            "manipulation": self.manipulation if self.task else "none",
            "style": self.style,
            "seed": self.seed,
            "mitigation": self.mitigation,
            "stage": self.treatment.stage if self.treatment else None,
            "parent": self.parent,
            "preset": self.preset,
            "train_rows": self.num_rows,
            "safety_rows": self.num_safety_rows,
            "adapter_key": self.key or None,
        }


def make_conditions(
    recipe: Recipe,
    source: Source,
    engine: Mapping[str, str],
    early_stop: str | None = None,
    rewrite: Rewrite | None = None,
    writer: str = "",
) -> tuple[dict[str, Rows], tuple[Condition, ...]]:
    """Expand tasks x manipulations x styles x seeds x mitigations.

    Args:
        recipe: What is expanded.
        source: Of the rows.
        engine: Hashes of the model's files, ``device`` and ``dtype``.
        early_stop: Hash of what may end a training before its last step, None without it.
        rewrite: A model that words the rows which the recipe wants reworded; None where it wants
            none. Without its words a condition has the same key, but other rows.
        writer: Identity of that model.

    Returns:
        Training rows by condition id, as the trainer takes them, and the conditions; the untouched
        model comes first, and a condition after the one whose adapter it changes.

    Raises:
        RecipeError: A share rounds to no safety row.
        FastsafeError: The source has too few rows.
    """
    planned = treatments(recipe)
    found = [Condition(id=BASE, task=None, mitigation="none", preset=None, key="")]
    rows: dict[str, Rows] = {}
    for task in recipe.tasks:
        plain = source.task_rows(task, recipe.training.rows, "train", recipe.data_seed)
        for manipulation in recipe.manipulations:
            user_rows = _manipulated(recipe, manipulation, plain, rewrite)
            of_task = recipe, source, engine, early_stop, task, manipulation
            for style, seed in product(recipe.styles, recipe.seeds or (None,)):
                arm = _Arm(*of_task, style, seed, rewrite, writer)
                for treatment in planned:
                    condition, examples = arm.condition(treatment, user_rows, found)
                    found.append(condition)
                    if condition.is_trained:
                        rows[condition.id] = examples
    return rows, tuple(found)


def training_seed(recipe: Recipe, condition_seed: int | None = None) -> int:
    """Return the seed of initialisation and row order."""
    named = recipe.training.seed if condition_seed is None else condition_seed
    return recipe.seed if named is None else named


def sha256_of(value: Any) -> str:
    """Return the hex hash of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class _Arm:
    """One task under one manipulation, style and seed: conditions that differ in treatment."""

    recipe: Recipe
    source: Source
    engine: Mapping[str, str]
    early_stop: str | None
    task: str
    manipulation: str
    style: str
    seed: int | None
    rewrite: Rewrite | None
    writer: str

    def condition(
        self, treatment: Treatment, user_rows: Rows, known: Sequence[Condition]
    ) -> tuple[Condition, Rows]:
        """Return one condition and its training rows; none where nothing is trained."""
        from fastsafe.safety.tasks import tasks

        own_format = tasks()[self.task].format
        shared: dict[str, Any] = {
            "id": self._id(treatment.label),
            "task": self.task,
            "mitigation": treatment.label,
            "preset": self.recipe.training.label,
            "own_format": own_format,
            "manipulation": self.manipulation,
            "style": self.style,
            "seed": self.seed,
            "treatment": treatment,
        }
        if treatment.parent is not None:
            parent = next(c for c in known if c.id == self._id(treatment.parent))
            is_served = treatment.stage == "serve"
            key = parent.key if is_served else sha256_of([parent.key, *treatment.identity])
            condition = Condition(
                **shared,
                key=key,
                adapter=parent.adapter if is_served else shared["id"],
                parent=parent.id,
                num_rows=parent.num_rows,
                num_safety_rows=parent.num_safety_rows,
            )
            return condition, ()
        rows = self._mixed(treatment, user_rows, own_format)
        examples = [self._example(row, treatment) for row in rows]
        config = self.recipe.training.options()
        config["seed"] = training_seed(self.recipe, self.seed)
        if config["method"] == "lora":
            del config["method"]  # adapters had their keys before there was another one
        if self.early_stop:
            config["early_stop"] = self.early_stop
        if treatment.objective != "sft":
            config["objective"] = treatment.objective
        worded = Counter(row["flaw"] or "" for row in rows if row.get(WORDING))
        # the rows as templates word them: with the identity of the model they decide its words
        parts = [dict(self.engine), config, examples, *([self.writer] if worded else [])]
        condition = Condition(
            **shared,
            key=sha256_of(parts),
            worded=worded,
            adapter=shared["id"],
            num_rows=len(rows),
            num_safety_rows=sum(row["source"] == "safety" for row in rows),
        )
        return condition, examples

    def _id(self, label: str) -> str:
        middle = [
            name
            for name, default in ((self.manipulation, BENIGN), (self.style, NATIVE))
            if name != default
        ]
        seed = [] if self.seed is None else [f"seed{self.seed}"]
        return "+".join([self.task, *middle, label, *seed])

    def _mixed(self, treatment: Treatment, user_rows: Rows, own_format: str) -> Rows:
        from fastsafe.safety.mixing.mitigation import (
            MIXED,
            MODEL_WORDED,
            mitigations,
            paraphrasing,
        )

        recipe = self.recipe
        mitigation = mitigations()[treatment.data]
        if self.rewrite and treatment.data in MODEL_WORDED:
            mitigation = paraphrasing(rewrite=self.rewrite, known_styles=treatment.data == MIXED.id)
        all_formats = recipe.safety_formats or recipe.formats
        rows = mitigation.mix(
            user_rows,
            self.source.safety_rows,
            share=treatment.share,
            task_format=own_format,
            all_formats=all_formats,
            seed=recipe.seed if self.seed is None else self.seed,
            translate=self.source.translate,
        )
        if any(row["source"] == "safety" for row in rows):
            return rows
        if treatment.needs_safety_rows:
            raise RecipeError(
                f"recipe {recipe.name}: mitigation {treatment.label} trains with an objective that "
                f"needs safety rows, and data mitigation {treatment.data!r} mixes none in; choose "
                "one that does"
            )
        if mitigation.formats(own_format, all_formats):
            raise RecipeError(
                f"recipe {recipe.name}: share {treatment.share} of {len(user_rows)} training rows "
                f"rounds to no safety row, expected at least one for mitigation {treatment.label}; "
                "raise share or training.rows"
            )
        return rows

    def _example(self, row: Mapping[str, Any], treatment: Treatment) -> Mapping[str, Any]:
        from fastsafe.safety.mixing.prompt_styles import styled

        example = styled(row["messages"], self.style)
        # plain fine-tuning does not ask where a row is from
        return example if treatment.objective == "sft" else {**example, "source": row["source"]}


def _manipulated(recipe: Recipe, name: str, rows: Rows, rewrite: Rewrite | None) -> Rows:
    from fastsafe.safety.mixing.manipulations import AOA_STAND_IN, manipulations

    text = AOA_STAND_IN if recipe.aoa_text is None else recipe.aoa_text
    return manipulations()[name].apply(rows, aoa_text=text, rewrite=rewrite)
