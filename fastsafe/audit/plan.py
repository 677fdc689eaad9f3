"""The plan: every adapter to train, every answer to have, under the hash of what determines it.

Nothing here depends on a clock, a counter or the run directory: two machines with the same recipe,
checkpoint and version of fastsafe make the same plan.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from fastsafe.audit.recipe import LABELS, Recipe
from fastsafe.audit.source import Source
from fastsafe.audit.store import Kind, PlannedRow
from fastsafe.errors import RecipeError

BASE = "base"


class ChatTokenizer(Protocol):
    """What planning needs of a tokenizer."""

    def encode_chat(self, messages: Sequence[Any]) -> list[int]:
        """Return the token ids of a conversation, ready for the assistant's turn."""


@dataclass(frozen=True)
class Condition:
    """One fine-tuned model, or the untouched one."""

    id: str
    task: str | None  # None for the untouched model
    mitigation: str
    preset: str | None
    key: str  # hash of the checkpoint, the rows and the training options; "" for the base
    num_rows: int = 0
    num_safety_rows: int = 0
    own_format: str | None = None  # of the task's rows
    manipulation: str = "benign"
    style: str = "chat"

    def record(self) -> dict[str, Any]:
        """Return the condition as ``results.json`` holds it."""
        return {
            "id": self.id,
            "task": self.task,
            "own_format": self.own_format,
            "manipulation": self.manipulation if self.task else "none",
            "style": self.style,
            "mitigation": self.mitigation,
            "preset": self.preset,
            "train_rows": self.num_rows,
            "safety_rows": self.num_safety_rows,
            "adapter_key": self.key or None,
        }


@dataclass(frozen=True)
class Prompt:
    """One rendered prompt: the user's message, and the tokens the model sees."""

    sha256: str
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """All work of a run, in order."""

    recipe: Recipe
    engine: Mapping[str, str]  # checkpoint_sha256, tokenizer_sha256, device, dtype
    conditions: tuple[Condition, ...]
    training_rows: Mapping[str, Sequence[dict[str, Any]]]  # condition id -> rows
    prompts: Mapping[str, Prompt]  # sha256 -> prompt
    rows: tuple[PlannedRow, ...]
    judges: Mapping[str, str]  # judge id -> identity

    @cached_property
    def identity(self) -> str:
        """Hash of everything that decides an answer; equal identities may share a run."""
        rows = [(row.key, row.condition, row.kind, row.part, row.item) for row in self.rows]
        return sha256_of([dict(self.engine), [c.key for c in self.conditions], rows])

    @property
    def tuned(self) -> tuple[Condition, ...]:
        """Conditions with an adapter."""
        return tuple(c for c in self.conditions if c.task)

    def waves(self) -> Iterator[tuple[Condition, ...]]:
        """Yield the conditions that are trained together, always the same ones together."""
        size = self.recipe.wave_size
        for begin in range(0, len(self.tuned), size):
            yield self.tuned[begin : begin + size]

    def families(self) -> dict[str, dict[str, list[str]]]:
        """Return the declared family of tests of each judge: every cell but the base's."""
        return {
            judge: {
                kind: sorted(
                    {
                        f"{row.condition}/{row.part}/{row.system_prompt}"
                        for row in self.rows
                        if row.kind == kind and row.condition != BASE
                    }
                )
                for kind in ("harmful", "benign")
            }
            for judge in self.judges
        }


def make_plan(
    recipe: Recipe, source: Source, tokenizer: ChatTokenizer, engine: Mapping[str, str]
) -> Plan:
    """Lay out a run: draw the rows, render the prompts, hash it all.

    Args:
        recipe: Checked recipe.
        source: Of behaviours and rows.
        tokenizer: Of the checkpoint; its chat template renders every prompt once.
        engine: Hashes of the model's files, ``device`` and ``dtype``.

    Raises:
        FastsafeError: A source has too few rows, or the tokenizer has no chat template.
    """
    from fastsafe.safety.judges import judges

    training_rows, conditions = _conditions(recipe, source, engine)
    prompts: dict[str, Prompt] = {}
    probes = list(_probes(recipe, source, tokenizer, prompts))
    utility = {
        task: list(_utility(recipe, source, tokenizer, prompts, task)) for task in recipe.tasks
    }
    sampling = sha256_of(recipe.sampling.model_dump())
    rows = []
    for condition in conditions:
        own = [condition.task] if condition.task else list(recipe.tasks)
        for probe in [*probes, *(row for task in own for row in utility[task])]:
            key = sha256_of([dict(engine), condition.key, probe["prompt"], sampling, probe["seed"]])
            rows.append(PlannedRow(key=key, condition=condition.id, **probe))
    known = judges()
    return Plan(
        recipe=recipe,
        engine=dict(engine),
        conditions=conditions,
        training_rows=training_rows,
        prompts=prompts,
        rows=tuple(rows),
        judges={name: known[name].identity for name in recipe.judges},
    )


def sha256_of(value: Any) -> str:
    """Return the hex hash of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def row_seed(run_seed: int, item: str, part: str, sample: int) -> int:
    """Return the sampler's seed of one row, in [0, 2**63): never a shared stream."""
    return int(sha256_of([run_seed, item, part, sample])[:16], 16) >> 1


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
    return {**recipe, **plan.engine}


def _conditions(
    recipe: Recipe, source: Source, engine: Mapping[str, str]
) -> tuple[dict[str, Sequence[dict[str, Any]]], tuple[Condition, ...]]:
    from fastsafe.safety.mixing import mitigations
    from fastsafe.safety.tasks import tasks

    training = recipe.training
    known_tasks, known_mitigations = tasks(), mitigations()
    config = training.model_dump(exclude={"preset", "rows", "seed"})
    config["seed"] = training_seed(recipe)
    found = [Condition(id=BASE, task=None, mitigation="none", preset=None, key="")]
    training_rows: dict[str, Sequence[dict[str, Any]]] = {}
    all_formats = recipe.safety_formats or recipe.formats
    for task in recipe.tasks:
        user_rows = source.task_rows(task, training.rows, "train", recipe.data_seed)
        task_format = known_tasks[task].format
        for mitigation in recipe.mitigations:
            rows = known_mitigations[mitigation].mix(
                user_rows,
                source.safety_rows,
                share=recipe.share,
                task_format=task_format,
                all_formats=all_formats,
                seed=recipe.seed,
                translate=source.translate,
            )
            num_safety_rows = sum(row["source"] == "safety" for row in rows)
            if not num_safety_rows and known_mitigations[mitigation].formats(
                task_format, all_formats
            ):
                raise RecipeError(
                    f"recipe {recipe.name}: share {recipe.share} of {training.rows} training rows "
                    f"rounds to no safety row, expected at least one for mitigation {mitigation}; "
                    "raise share or training.rows"
                )
            examples = [{"messages": list(row["messages"])} for row in rows]
            condition = Condition(
                id=f"{task}+{mitigation}",
                task=task,
                mitigation=mitigation,
                preset=training.preset,
                key=sha256_of([dict(engine), config, examples]),
                num_rows=len(rows),
                own_format=task_format,
                num_safety_rows=num_safety_rows,
            )
            training_rows[condition.id] = examples
            found.append(condition)
    return training_rows, tuple(found)


def training_seed(recipe: Recipe) -> int:
    """Return the seed of initialisation and row order."""
    return recipe.seed if recipe.training.seed is None else recipe.training.seed


def _probes(
    recipe: Recipe, source: Source, tokenizer: ChatTokenizer, prompts: dict[str, Prompt]
) -> Iterator[dict[str, Any]]:
    from fastsafe.safety.formats import formats

    known = formats()
    behaviours = source.behaviours(recipe.behaviours, recipe.data_seed)
    kinds: tuple[Kind, ...] = ("harmful", "benign") if recipe.benign_twins else ("harmful",)
    for system_id, system_text in recipe.system_prompts.items():
        for name in recipe.formats:
            for kind in kinds:
                for behaviour in behaviours:
                    action = behaviour.action(kind == "harmful")
                    if not action:
                        continue
                    text = known[name].render(action, source.translate)
                    turns = [{"role": "system", "content": system_text}] if system_text else []
                    turns.append({"role": "user", "content": text})
                    yield {
                        "kind": kind,
                        "part": name,
                        "system_prompt": system_id,
                        "item": behaviour.behavior_id,
                        "sample": 0,
                        "seed": row_seed(recipe.seed, behaviour.behavior_id, name, 0),
                        "prompt": _rendered(turns, text, tokenizer, prompts),
                    }


def _utility(
    recipe: Recipe,
    source: Source,
    tokenizer: ChatTokenizer,
    prompts: dict[str, Prompt],
    task: str,
) -> Iterator[dict[str, Any]]:
    rows = source.task_rows(task, recipe.utility_rows, "test", recipe.data_seed)
    for number, row in enumerate(rows):
        turns = list(row["messages"][:-1])
        yield {
            "kind": "utility",
            "part": task,
            "system_prompt": "none",
            "item": str(number),
            "sample": 0,
            "seed": row_seed(recipe.seed, f"{task}/{number}", task, 0),
            "prompt": _rendered(turns, turns[-1]["content"], tokenizer, prompts),
            "reference": row["reference"],
        }


def _rendered(
    turns: Sequence[Any], text: str, tokenizer: ChatTokenizer, prompts: dict[str, Prompt]
) -> str:
    token_ids = tuple(tokenizer.encode_chat(turns))
    sha256 = sha256_of([text, token_ids])
    prompts.setdefault(sha256, Prompt(sha256, text, token_ids))
    return sha256
