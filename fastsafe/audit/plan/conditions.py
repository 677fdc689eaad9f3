"""Expand a recipe into conditions: every model of a run, trained, derived or served differently."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from fastsafe.audit.plan.mitigation_variants import MitigationVariant
from fastsafe.audit.recipe.schema import Recipe
from fastsafe.errors import RecipeError
from fastsafe.io.digest import sha256_of
from fastsafe.safety.mixing.rewrite_checks import WORDING, Rewrite
from fastsafe.safety.sources import Source

BASE = "base"
NATIVE, BENIGN = "native", "benign"  # defaults that a condition's id leaves out

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Condition:
    """One fine-tuned model, or the untouched one.

    Attributes:
        id: Unique in a run; names the adapter's folder.
        task: Task it was tuned on, None for the untouched model.
        mitigation: Label of its mitigation variant, "none" without one.
        key: Hash of the checkpoint, the rows and every option that shaped its weights; "" for the
            base. A condition that only serves differently has the key of its parent.
        adapter: Id of the condition whose adapter generates, None for the base.
        parent: Id of the condition whose adapter it changes or serves, None where it is trained.
        own_format: Format of the task's rows.
        seed: Seed of training and mixing, where a recipe has several; the id ends in it.
        worded: Number of rows that the rewriter was asked for, by the reason why its text was
            rejected; "" counts those that were accepted.
        variant: The mitigation that made it; None for the base.
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
    variant: MitigationVariant | None = field(default=None, compare=False)

    @property
    def served(self) -> tuple[str, dict[str, Any]]:
        """Name and settings of its defence, as JSON values."""
        return self.variant.identity if self.variant else ("", {})

    @property
    def objective(self) -> str | Mapping[str, Any]:
        """Training objective, as ``TrainConfig`` takes it."""
        return self.variant.objective if self.variant else "sft"

    @property
    def is_trained(self) -> bool:
        """Whether training makes its adapter."""
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
            "stage": self.variant.stage if self.variant else None,
            "parent": self.parent,
            "preset": self.preset,
            "train_rows": self.num_rows,
            "safety_rows": self.num_safety_rows,
            "adapter_key": self.key or None,
        }


@dataclass(frozen=True)
class ConditionInputs:
    """Everything that decides a run's conditions, except the text that a rewriter returns.

    Attributes:
        recipe: The checked recipe.
        variants: Its mitigations, expanded.
        source: Source of the rows.
        engine: Hashes of the model's files, ``device`` and ``dtype``.
        early_stop: Hash of the early-stopping rule, None without one.
        rewriter: Identity of the model that rewords rows, "" without one.
    """

    recipe: Recipe
    variants: Sequence[MitigationVariant]
    source: Source
    engine: Mapping[str, str]
    early_stop: str | None = None
    rewriter: str = ""


def make_conditions(
    inputs: ConditionInputs, rewrite: Rewrite | None = None
) -> tuple[dict[str, Rows], tuple[Condition, ...]]:
    """Expand tasks x manipulations x styles x seeds x mitigation variants.

    Args:
        inputs: What is expanded.
        rewrite: Returns a row's text in the rewriter's words; None leaves all rows to templates.
            A condition's key hashes the rewriter's identity and the rows before rewriting, so it
            is the same before and after.

    Returns:
        Training rows by condition id, as the trainer takes them, and the conditions: the untouched
        model first, and every condition after its parent.

    Raises:
        RecipeError: A share rounds to no safety row.
        FastsafeError: The source has too few rows.
    """
    recipe = inputs.recipe
    conditions = [Condition(id=BASE, task=None, mitigation="none", preset=None, key="")]
    rows: dict[str, Rows] = {}
    for task in recipe.tasks:
        plain = inputs.source.task_rows(task, recipe.training.rows, "train", recipe.data_seed)
        for manipulation in recipe.manipulations:
            user_rows = _manipulated(recipe, manipulation, plain, rewrite)
            for style, seed in product(recipe.styles, recipe.seeds or (None,)):
                setup = _TaskSetup(inputs, rewrite, task, manipulation, style, seed)
                for variant in inputs.variants:
                    condition, examples = setup.condition(variant, user_rows, conditions)
                    conditions.append(condition)
                    if condition.is_trained:
                        rows[condition.id] = examples
    return rows, tuple(conditions)


def training_seed(recipe: Recipe, condition_seed: int | None = None) -> int:
    """Return the seed of initialisation and row order."""
    seed = recipe.training.seed if condition_seed is None else condition_seed
    return recipe.seed if seed is None else seed


@dataclass(frozen=True)
class _TaskSetup:
    """One task under one manipulation, style and seed; its conditions differ in the mitigation."""

    inputs: ConditionInputs
    rewrite: Rewrite | None
    task: str
    manipulation: str
    style: str
    seed: int | None

    def condition(
        self, variant: MitigationVariant, user_rows: Rows, earlier: Sequence[Condition]
    ) -> tuple[Condition, Rows]:
        """Return one condition and its training rows; none where nothing is trained."""
        from fastsafe.safety.tasks import tasks

        recipe = self.inputs.recipe
        own_format = tasks()[self.task].format
        fields: dict[str, Any] = {
            "id": self._id(variant.label),
            "task": self.task,
            "mitigation": variant.label,
            "preset": recipe.training.label,
            "own_format": own_format,
            "manipulation": self.manipulation,
            "style": self.style,
            "seed": self.seed,
            "variant": variant,
        }
        if variant.parent is not None:
            parent = next(c for c in earlier if c.id == self._id(variant.parent))
            is_served = variant.stage == "serve"
            key = parent.key if is_served else sha256_of([parent.key, *variant.identity])
            condition = Condition(
                **fields,
                key=key,
                adapter=parent.adapter if is_served else fields["id"],
                parent=parent.id,
                num_rows=parent.num_rows,
                num_safety_rows=parent.num_safety_rows,
            )
            return condition, ()
        rows = self._mixed(variant, user_rows, own_format)
        examples = [self._example(row, variant) for row in rows]
        config = recipe.training.options()
        config["seed"] = training_seed(recipe, self.seed)
        if config["method"] == "lora":
            del config["method"]  # adapters had their keys before there was another one
        if self.inputs.early_stop:
            config["early_stop"] = self.inputs.early_stop
        if variant.objective != "sft":
            config["objective"] = variant.objective
        worded = Counter(row["flaw"] or "" for row in rows if row.get(WORDING))
        # the rows as templates word them: with the rewriter's identity they decide its text
        rewriter = [self.inputs.rewriter] if worded else []
        condition = Condition(
            **fields,
            key=sha256_of([dict(self.inputs.engine), config, examples, *rewriter]),
            worded=worded,
            adapter=fields["id"],
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

    def _mixed(self, variant: MitigationVariant, user_rows: Rows, own_format: str) -> Rows:
        from fastsafe.safety.mixing.mitigation import (
            MIXED,
            MODEL_WORDED,
            mitigations,
            paraphrasing,
        )

        recipe, source = self.inputs.recipe, self.inputs.source
        mitigation = mitigations()[variant.data]
        if self.rewrite and variant.data in MODEL_WORDED:
            mitigation = paraphrasing(rewrite=self.rewrite, known_styles=variant.data == MIXED.id)
        all_formats = recipe.safety_formats or recipe.formats
        rows = mitigation.mix(
            user_rows,
            source.safety_rows,
            share=variant.share,
            task_format=own_format,
            all_formats=all_formats,
            seed=recipe.seed if self.seed is None else self.seed,
            translate=source.translate,
        )
        if any(row["source"] == "safety" for row in rows):
            return rows
        if variant.needs_safety_rows:
            raise RecipeError(
                f"recipe {recipe.name}: mitigation {variant.label} trains with an objective that "
                f"needs safety rows, and data mitigation {variant.data!r} mixes none in; choose "
                "one that does"
            )
        if mitigation.formats(own_format, all_formats):
            raise RecipeError(
                f"recipe {recipe.name}: share {variant.share} of {len(user_rows)} training rows "
                f"rounds to no safety row, expected at least one for mitigation {variant.label}; "
                "raise share or training.rows"
            )
        return rows

    def _example(self, row: Mapping[str, Any], variant: MitigationVariant) -> Mapping[str, Any]:
        from fastsafe.safety.mixing.prompt_styles import styled

        example = styled(row["messages"], self.style)
        # plain fine-tuning does not use the source column
        return example if variant.objective == "sft" else {**example, "source": row["source"]}


def _manipulated(recipe: Recipe, name: str, rows: Rows, rewrite: Rewrite | None) -> Rows:
    from fastsafe.safety.mixing.manipulations import AOA_STAND_IN, manipulations

    text = AOA_STAND_IN if recipe.aoa_text is None else recipe.aoa_text
    return manipulations()[name].apply(rows, aoa_text=text, rewrite=rewrite)
