"""The plan: every adapter to train, every answer to have, under the hash of what determines it.

Nothing here depends on a clock, a counter or the run directory: two machines with the same recipe,
checkpoint and version of fastsafe make the same plan.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fastsafe.audit.backend.drift_watch import Watch
from fastsafe.audit.plan.conditions import BASE, Condition, Rows, make_conditions, sha256_of
from fastsafe.audit.plan.panel import Panel, make_panel
from fastsafe.audit.plan.rendering import ChatTokenizer, Prompt, Questions
from fastsafe.audit.recipe.schema import LABELS, Recipe
from fastsafe.audit.sources.registry import Source
from fastsafe.audit.store.rows import PlannedRow
from fastsafe.errors import RecipeError
from fastsafe.progress import Progress, stage


@dataclass(frozen=True)
class Plan:
    """All work of a run, in order."""

    recipe: Recipe
    engine: Mapping[str, str]  # checkpoint_sha256, tokenizer_sha256, device, dtype
    conditions: tuple[Condition, ...]
    training_rows: Mapping[str, Rows]  # id of a trained condition -> rows
    prompts: Mapping[str, Prompt]  # sha256 -> prompt
    rows: tuple[PlannedRow, ...]
    panel: Panel = field(compare=False)
    source: Source = field(compare=False)
    watch: Watch | None = None  # what is read while models are trained
    translator: str | None = None  # who put probes into another language; None where nobody had to

    @cached_property
    def judges(self) -> Mapping[str, str]:
        """Judge id -> hash of everything that can change its verdicts."""
        return self.panel.identities

    @cached_property
    def identity(self) -> str:
        """Hash of everything that decides an answer or its score; equal ones may share a run."""
        rows = [list(vars(row).values()) for row in self.rows]
        watched = [self.watch.sha256] if self.watch else []
        return sha256_of([dict(self.engine), [c.key for c in self.conditions], rows, *watched])

    @property
    def templates(self) -> Mapping[str, str]:
        """Hash of the wording of every format asked: two wordings are never compared."""
        from fastsafe.safety.formats import formats

        return {name: formats()[name].template_sha256 for name in self.recipe.formats}

    @property
    def tuned(self) -> tuple[Condition, ...]:
        """Conditions whose adapter training makes."""
        return tuple(c for c in self.conditions if c.is_trained)

    def waves(self) -> Iterator[tuple[Condition, ...]]:
        """Yield the conditions that are trained together, always the same ones together."""
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

    A judge whose score says nothing of benign prompts tests none.

    Args:
        cells: (condition, kind, format, system prompt) of every row, in any order.
        panel: Whose judges test.
    """
    kinds: dict[str, set[str]] = {"harmful": set(), "benign": set()}
    for condition, kind, part, system_prompt in cells:
        if kind in kinds and condition != BASE:
            kinds[kind].add(f"{condition}/{part}/{system_prompt}")
    return {
        judge: {
            kind: sorted(found)
            for kind, found in kinds.items()
            if kind == "harmful" or judge not in panel.harmful_only
        }
        for judge in panel.judges
    }


def make_plan(
    recipe: Recipe,
    source: Source,
    tokenizer: ChatTokenizer,
    engine: Mapping[str, str],
    panel: Panel | None = None,
) -> Plan:
    """Lay out a run: draw the rows, render the prompts, hash it all.

    Args:
        recipe: Checked recipe.
        source: Of behaviours and rows.
        tokenizer: Of the checkpoint; its chat template renders every prompt once.
        engine: Hashes of the model's files, ``device`` and ``dtype``.
        panel: Judges and guards; those of the recipe when None.

    Raises:
        FastsafeError: A source has too few rows, or the tokenizer has no chat template.
    """
    panel = panel or make_panel(recipe)
    writer = panel.writer
    # what a model is to word is not known yet: who words it, and what from, is
    unsaid = (lambda turns: None, writer.identity) if writer else ()
    filters = {label: guard.identity for label, guard in panel.filters.items()}
    questions = Questions(recipe, source, tokenizer, engine, filters)
    watch = _watch(recipe, questions)
    training_rows, conditions = make_conditions(recipe, source, engine, _early(watch), *unsaid)
    if writer and not any(condition.worded for condition in conditions):
        raise RecipeError(
            f"recipe {recipe.name}: rewrite names a model, and no condition has rows to word; add "
            "manipulation autoif or mitigation paraphrase, or leave it out"
        )
    rows = [row for condition in conditions for row in questions.rows(condition)]
    if all(row.kind == "utility" for row in rows):
        raise RecipeError(
            f"recipe {recipe.name}: no probe is left to ask: the behaviours have a benign side "
            "alone, and benign_twins is false; set it to true or give harmful ones"
        )
    return Plan(
        recipe=recipe,
        engine=dict(engine),
        conditions=conditions,
        training_rows=training_rows,
        prompts=questions.prompts,
        rows=tuple(rows),
        panel=panel,
        source=source,
        watch=watch,
        translator=_translator(recipe, source),
    )


def with_words(plan: Plan, progress: Progress) -> tuple[Plan, list[dict[str, Any]]]:
    """Have the rows worded that a model is to word.

    Returns:
        The plan with these rows, and per condition ``{"condition", "n", "by_model", "flaws"}``:
        how many rows took the model's words, and why the others kept their template.

    Raises:
        DataError: The model answered nothing.
    """
    writer = plan.panel.writer
    if writer is None:
        return plan, []
    where = plan.recipe, plan.source, plan.engine, _early(plan.watch)
    rest = sum(sum(condition.worded.values()) for condition in plan.conditions)

    def said(count: int) -> None:
        nonlocal rest
        rest -= count
        progress.advance(count)

    with stage(progress, "rewrite", rest, "rows"):
        rows, conditions = writer.apply(
            lambda rewrite: make_conditions(*where, rewrite, writer.identity), said
        )
        progress.advance(rest)  # equal ones, asked for once
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


def _early(watch: Watch | None) -> str | None:
    """Hash of what may end a training before its last step."""
    return watch.sha256 if watch and watch.settings.stop_above else None


def _watch(recipe: Recipe, questions: Questions) -> Watch | None:
    if recipe.drift is None:
        return None
    prompts = questions.harmful(recipe.drift.probes)
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
    # a source with one rule for its whole world goes by its own name
    who = getattr(source, "translator", None)
    return who.translator_id if who else f"source:{source.id}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the row-affecting settings that differ, as ``path: old -> new``.

    Args:
        old: ``settings`` of the run that exists.
        new: ``settings`` of the plan at hand.
    """
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += [f"{key}.{line}" for line in differences(before, after)]
        elif before != after:
            found.append(f"{key}: {json.dumps(before)} -> {json.dumps(after)}")
    return found


def settings(plan: Plan) -> dict[str, Any]:
    """Return the settings that decide the rows of a plan, as JSON values."""
    # where the checkpoint lies does not matter, what it holds does
    recipe = plan.recipe.model_dump(mode="json", exclude={*LABELS, "model"})
    wording = {"translator": plan.translator, "templates": dict(plan.templates)}
    return {**recipe, **plan.engine, **wording}
