"""Render every probe and test row of a run as the token ids that a model sees."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastsafe.audit.backend.protocol import ChatTokenizer
from fastsafe.audit.plan.conditions import Condition
from fastsafe.audit.recipe.schema import Recipe
from fastsafe.audit.store.rows import Kind, PlannedRow
from fastsafe.io.digest import sha256_of
from fastsafe.safety.sources import Source

Turns = Sequence[Mapping[str, Any]]
ChangeTurns = Callable[[Turns], Turns]  # what a defence does to a conversation before it is asked

FULL = 1  # sample number of a probe that is answered in full where the others stop early


@dataclass(frozen=True)
class Prompt:
    """One rendered prompt: the user's message, and the tokens the model sees."""

    sha256: str
    text: str
    token_ids: tuple[int, ...]


@dataclass
class PromptRenderer:
    """Renders the rows of one condition after another; equal prompts are stored once.

    Attributes:
        prompts: Every prompt rendered so far, by its hash.
    """

    recipe: Recipe
    source: Source
    tokenizer: ChatTokenizer
    engine: Mapping[str, str]
    filters: Mapping[str, str]  # label of a mitigation that filters -> identity of its guard
    prompts: dict[str, Prompt] = field(default_factory=dict)
    # (task, or "" for probes; hash of the defence that changes prompts, or "") -> rendered rows
    _rendered: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)

    def harmful_probes(self, n: int) -> list[tuple[str, tuple[int, ...]]]:
        """Return (format, token ids) of ``n`` harmful probes per format, as the base sees them."""
        system_prompt = next(iter(self.recipe.system_prompts))
        prompts_of: dict[str, list[str]] = {}
        for row in self._probes(_unchanged):
            if (row["kind"], row["system_prompt"], row["sample"]) == ("harmful", system_prompt, 0):
                prompts_of.setdefault(row["part"], []).append(row["prompt"])
        return [
            (name, self.prompts[prompt].token_ids)
            for name, prompts in prompts_of.items()
            for prompt in prompts[:n]
        ]

    def rows(self, condition: Condition) -> Iterator[PlannedRow]:
        """Yield a condition's rows; a row's key hashes everything that decides its answer."""
        defence = _prompt_defence(condition)
        defence_sha256 = sha256_of(condition.served) if defence else ""
        change = defence or _unchanged
        tasks = [condition.task] if condition.task else list(self.recipe.tasks)
        for task in ("", *tasks):
            group = task, defence_sha256
            if group not in self._rendered:
                rows = self._test_rows(task, change) if task else self._probes(change)
                self._rendered[group] = list(rows)
            for row in self._rendered[group]:
                yield self._planned(condition, row)

    def _planned(self, condition: Condition, row: Mapping[str, Any]) -> PlannedRow:
        sampling = sha256_of(self.recipe.sampling.model_dump() | {"max_tokens": row["max_tokens"]})
        parts = [dict(self.engine), condition.key, row["prompt"], sampling, row["seed"]]
        key = sha256_of(parts)
        guard = self.filters.get(condition.mitigation)
        if guard is None:
            return PlannedRow(key=key, condition=condition.id, **row)
        settings = {k: v for k, v in condition.served[1].items() if k != "guard"}
        filtered_key = sha256_of([key, guard, settings])
        return PlannedRow(key=filtered_key, condition=condition.id, filtered_from=key, **row)

    def _probes(self, change: ChangeTurns) -> Iterator[dict[str, Any]]:
        from fastsafe.safety.formats import formats

        recipe, early_stop = self.recipe, self.recipe.early_stop
        format_of = formats()
        behaviours = self.source.behaviours(recipe.behaviours, recipe.data_seed)
        kinds: tuple[Kind, ...] = ("harmful", "benign") if recipe.benign_twins else ("harmful",)
        full = recipe.sampling.max_tokens
        short = early_stop.tokens if early_stop else full
        for system_id, system_text in recipe.system_prompts.items():
            system = [{"role": "system", "content": system_text}] if system_text else []
            for name in recipe.formats:
                for kind in kinds:
                    for number, behaviour in enumerate(behaviours):
                        is_harmful = kind == "harmful"
                        if not behaviour.action(is_harmful):
                            continue
                        text = format_of[name].ask(behaviour, is_harmful, self.source.translate)
                        turns = change([*system, {"role": "user", "content": text}])
                        row = {
                            "kind": kind,
                            "part": name,
                            "system_prompt": system_id,
                            "item": behaviour.behavior_id,
                            "sample": 0,
                            "seed": row_seed(recipe.seed, behaviour.behavior_id, name, 0),
                            "prompt": self._prompt(turns, text),
                            "max_tokens": short,
                        }
                        yield row
                        if early_stop and number < early_stop.check:
                            # the same seed: only the length may differ
                            yield row | {"sample": FULL, "max_tokens": full}

    def _test_rows(self, task: str, change: ChangeTurns) -> Iterator[dict[str, Any]]:
        recipe = self.recipe
        tests = self.source.task_rows(task, recipe.utility_rows, "test", recipe.data_seed)
        for number, test in enumerate(tests):
            turns = list(test["messages"][:-1])
            yield {
                "kind": "utility",
                "part": task,
                "system_prompt": "none",
                "item": str(number),
                "sample": 0,
                "seed": row_seed(recipe.seed, f"{task}/{number}", task, 0),
                "prompt": self._prompt(change(turns), turns[-1]["content"]),
                "max_tokens": recipe.sampling.max_tokens,
                "reference": test["reference"],
                "tests": test.get("tests"),
            }

    def _prompt(self, turns: Turns, text: str) -> str:
        """Render a conversation and store it; returns the prompt's hash."""
        from fastsafe.safety.mixing.prompt_styles import prompt_text

        prompting = self.recipe.prompting
        if prompting == "chat":
            token_ids = tuple(self.tokenizer.encode_chat(turns))
        else:
            rendered = prompt_text(turns, "alpaca" if prompting == "alpaca" else "plain")
            if prompting == "as_published":
                rendered = rendered.removesuffix("\n")  # the raw text, and nothing after it
            token_ids = tuple(self.tokenizer.encode(rendered))
        sha256 = sha256_of([text, token_ids])
        self.prompts.setdefault(sha256, Prompt(sha256, text, token_ids))
        return sha256


def row_seed(run_seed: int, item: str, part: str, sample: int) -> int:
    """Return the sampler's seed of one row, in [0, 2**63): rows never share a random stream."""
    return int(sha256_of([run_seed, item, part, sample])[:16], 16) >> 1


def _unchanged(turns: Turns) -> Turns:
    return turns


def _prompt_defence(condition: Condition) -> ChangeTurns | None:
    """Return what a condition's defence does to its prompts, None where it does nothing."""
    variant = condition.variant
    if variant is None or variant.served_on != "prompt":
        return None
    from fastsafe.safety.defences import defences

    defence = defences()[variant.name]
    return partial(defence.apply, **defence.arguments(variant.params))
