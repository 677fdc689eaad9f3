"""The plan: every adapter to train and every answer to generate, keyed by content hashes.

Nothing here depends on a clock, a counter or the run directory: two machines with the same recipe,
checkpoint and version of fastsafe make the same plan.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fastsafe.audit.backend.drift_watch import Watch
from fastsafe.audit.backend.protocol import ChatTokenizer
from fastsafe.audit.plan.conditions import (
    BASE,
    Condition,
    ConditionInputs,
    Rows,
    make_conditions,
)
from fastsafe.audit.plan.mitigation_variants import MitigationVariant
from fastsafe.audit.plan.panel import Panel
from fastsafe.audit.plan.rendering import Prompt, PromptRenderer
from fastsafe.audit.recipe.schema import LABELS, Recipe
from fastsafe.audit.store.rows import PlannedRow
from fastsafe.data.conversation import Message
from fastsafe.errors import RecipeError
from fastsafe.io.digest import sha256_of
from fastsafe.progress import Progress, stage
from fastsafe.safety.sources import Source


@dataclass(frozen=True)
class Plan:
    """All work of a run, in order."""

    inputs: ConditionInputs = field(compare=False)
    conditions: tuple[Condition, ...]
    training_rows: Mapping[str, Rows]  # id of a trained condition -> rows
    prompts: Mapping[str, Prompt]  # sha256 -> prompt
    rows: tuple[PlannedRow, ...]
    panel: Panel = field(compare=False)
    watch: Watch | None = None  # drift monitoring during training
    translator: str | None = None  # identity of the translator, None where no format needs one

    @property
    def recipe(self) -> Recipe:
        """The checked recipe."""
        return self.inputs.recipe

    @property
    def engine(self) -> Mapping[str, str]:
        """checkpoint_sha256, tokenizer_sha256, device, dtype and what else answers depend on."""
        return self.inputs.engine

    @cached_property
    def identity(self) -> str:
        """Hash of everything that decides an answer or its score; equal plans share a run."""
        rows = [list(vars(row).values()) for row in self.rows]
        watch = [self.watch.sha256] if self.watch else []
        return sha256_of([dict(self.engine), [c.key for c in self.conditions], rows, *watch])

    @property
    def templates(self) -> Mapping[str, str]:
        """Format -> hash of its template: answers to two templates are never compared."""
        from fastsafe.safety.formats import formats

        return {name: formats()[name].template_sha256 for name in self.recipe.formats}

    @property
    def tuned(self) -> tuple[Condition, ...]:
        """Conditions that are trained."""
        return tuple(c for c in self.conditions if c.is_trained)

    def waves(self) -> Iterator[tuple[Condition, ...]]:
        """Yield the conditions that are trained together; a resumed run forms the same waves."""
        size = self.recipe.wave_size
        for begin in range(0, len(self.tuned), size):
            yield self.tuned[begin : begin + size]

    def families(self) -> dict[str, dict[str, list[str]]]:
        """Return the declared families of tests; see `families`."""
        cells = ((r.condition, r.kind, r.part, r.system_prompt) for r in self.rows)
        return families(cells, self.panel)


def families(
    cells: Iterable[tuple[str, str, str, str]], panel: Panel
) -> dict[str, dict[str, list[str]]]:
    """Return the families of tests: per judge and kind of probe, every cell but the base's.

    A judge whose score means nothing on benign prompts has no family of benign cells.

    Args:
        cells: (condition, kind, format, system prompt) of every row, in any order.
        panel: The judges.
    """
    cells_of: dict[str, set[str]] = {"harmful": set(), "benign": set()}
    for condition, kind, part, system_prompt in cells:
        if kind in cells_of and condition != BASE:
            cells_of[kind].add(f"{condition}/{part}/{system_prompt}")
    return {
        judge: {
            kind: sorted(names)
            for kind, names in cells_of.items()
            if kind == "harmful" or judge not in panel.harmful_only
        }
        for judge in panel.judges
    }


def make_plan(
    recipe: Recipe,
    variants: Sequence[MitigationVariant],
    source: Source,
    tokenizer: ChatTokenizer,
    engine: Mapping[str, str],
    panel: Panel,
) -> Plan:
    """Lay out a run: select the rows, render the prompts, hash everything.

    Args:
        recipe: Checked recipe.
        variants: Its mitigations, expanded.
        source: Source of behaviours and rows.
        tokenizer: Tokenizer of the checkpoint; its chat template renders every prompt once.
        engine: Hashes of the model's files, ``device`` and ``dtype``.
        panel: Judges, guards and rewriter.

    Raises:
        FastsafeError: A source has too few rows, or the tokenizer has no chat template.
    """
    filters = {label: guard.identity for label, guard in panel.filters.items()}
    renderer = PromptRenderer(recipe, source, tokenizer, engine, filters)
    watch = _watch(recipe, renderer)
    rewriter = panel.rewriter
    inputs = ConditionInputs(
        recipe,
        variants,
        source,
        engine,
        early_stop_hash(watch),
        rewriter.identity if rewriter else "",
    )
    training_rows, conditions = make_conditions(inputs, placeholder_rewrite if rewriter else None)
    if rewriter and not any(condition.worded for condition in conditions):
        raise RecipeError(
            f"recipe {recipe.name}: rewrite names a model, and no condition has rows to reword; "
            "add manipulation autoif or mitigation paraphrase, or leave it out"
        )
    rows = [row for condition in conditions for row in renderer.rows(condition)]
    if all(row.kind == "utility" for row in rows):
        raise RecipeError(
            f"recipe {recipe.name}: no probe is left to ask: the behaviours have a benign side "
            "alone, and benign_twins is false; set it to true or give harmful ones"
        )
    return Plan(
        inputs=inputs,
        conditions=conditions,
        training_rows=training_rows,
        prompts=renderer.prompts,
        rows=tuple(rows),
        panel=panel,
        watch=watch,
        translator=_translator(recipe, source),
    )


def placeholder_rewrite(turns: Sequence[Message]) -> str | None:
    """Return None: the rewritten texts do not exist yet, and the rewriter's identity is hashed."""
    return None


def reword_rows(plan: Plan, progress: Progress) -> tuple[Plan, list[dict[str, Any]]]:
    """Have the rewriter reword the rows that a recipe gives it.

    Returns:
        The plan with these rows, and per condition ``{"condition", "n", "by_model", "flaws"}``:
        how many rows took the model's words, and why the others kept their template.

    Raises:
        DataError: The model answered nothing.
    """
    rewriter = plan.panel.rewriter
    if rewriter is None:
        return plan, []
    remaining = sum(sum(condition.worded.values()) for condition in plan.conditions)

    def on_replies(count: int) -> None:
        nonlocal remaining
        remaining -= count
        progress.advance(count)

    with stage(progress, "rewrite", remaining, "rows"):
        rows, conditions = rewriter.apply(
            lambda rewrite: make_conditions(plan.inputs, rewrite), on_replies
        )
        progress.advance(remaining)  # equal requests are asked once
    return replace(plan, training_rows=rows), [
        {
            "condition": condition.id,
            "n": sum(condition.worded.values()),
            "by_model": condition.worded.get("", 0),
            "flaws": {flaw: n for flaw, n in sorted(condition.worded.items()) if flaw},
        }
        for condition in conditions
        if condition.worded
    ]


def early_stop_hash(watch: Watch | None) -> str | None:
    """Return the hash of the early-stopping rule (drift watch), None without one."""
    return watch.sha256 if watch and watch.settings.stop_above else None


def _watch(recipe: Recipe, renderer: PromptRenderer) -> Watch | None:
    if recipe.drift is None:
        return None
    prompts = renderer.harmful_probes(recipe.drift.probes)
    if not prompts:
        raise RecipeError(
            f"recipe {recipe.name}: drift reads harmful probes, and the behaviours have a benign "
            "side alone; leave drift out or give harmful ones"
        )
    formats = tuple(name for name, _ in prompts)
    return Watch(recipe.drift, formats, tuple(token_ids for _, token_ids in prompts))


def _translator(recipe: Recipe, source: Source) -> str | None:
    from fastsafe.safety.formats import formats

    if not any(formats()[name].needs_translator for name in recipe.formats):
        return None
    # a source that translates by one rule of its own is named itself
    translator = getattr(source, "translator", None)
    return translator.translator_id if translator else f"source:{source.id}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the row-affecting settings that differ, as ``path: old -> new``.

    Args:
        old: ``settings`` of the run that exists.
        new: ``settings`` of the plan at hand.
    """
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += [f"{key}.{line}" for line in differences(before, after)]
        elif before != after:
            lines.append(f"{key}: {json.dumps(before)} -> {json.dumps(after)}")
    return lines


def settings(plan: Plan) -> dict[str, Any]:
    """Return the settings that decide the rows of a plan, as JSON values."""
    # the checkpoint's content decides, and the engine's hashes name it; its path does not
    # the engine has the template's variables, where there are some
    recipe = plan.recipe.model_dump(mode="json", exclude={*LABELS, "model", "chat_template_kwargs"})
    texts = {"translator": plan.translator, "templates": dict(plan.templates)}
    return {**recipe, **plan.engine, **texts}
