"""The questions of a run: every probe and test row, as the model sees it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastsafe.audit.plan.conditions import Condition
from fastsafe.audit.recipe.schema import Recipe
from fastsafe.audit.sources.registry import Source
from fastsafe.audit.store.rows import Kind, PlannedRow
from fastsafe.io.digest import sha256_of

Turns = Sequence[Mapping[str, Any]]

FULL = 1  # sample number of a probe that is answered in full where the others stop early


class ChatTokenizer(Protocol):
    """What planning needs of a tokenizer."""

    def encode_chat(self, messages: Sequence[Any]) -> list[int]:
        """Return the token ids of a conversation, ready for the assistant's turn."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the tokenizer's special tokens."""


@dataclass(frozen=True)
class Prompt:
    """One rendered prompt: the user's message, and the tokens the model sees."""

    sha256: str
    text: str
    token_ids: tuple[int, ...]


@dataclass
class Questions:
    """Renders the rows of one condition after another; equal prompts are kept once.

    Attributes:
        prompts: Every prompt rendered so far, by its hash.
    """

    recipe: Recipe
    source: Source
    tokenizer: ChatTokenizer
    engine: Mapping[str, str]
    filters: Mapping[str, str]  # label of a treatment that filters -> identity of its guard
    prompts: dict[str, Prompt] = field(default_factory=dict)
    _known: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def harmful(self, n: int) -> list[tuple[str, tuple[int, ...]]]:
        """Return (format, token ids) of ``n`` harmful probes per format, as the base is asked."""
        system_prompt = next(iter(self.recipe.system_prompts))
        found: dict[str, list[str]] = {}
        for row in self._probes(_as_they_are):
            if (row["kind"], row["system_prompt"], row["sample"]) == ("harmful", system_prompt, 0):
                found.setdefault(row["part"], []).append(row["prompt"])
        return [
            (name, self.prompts[prompt].token_ids)
            for name, prompts in found.items()
            for prompt in prompts[:n]
        ]

    def rows(self, condition: Condition) -> Iterator[PlannedRow]:
        """Yield what this condition is asked, under keys that hash all that decides an answer."""
        ask = _asking(condition)
        served = sha256_of(condition.served) if ask else ""
        tasks = [condition.task] if condition.task else list(self.recipe.tasks)
        groups: list[tuple[str, Callable[[Callable[[Turns], Turns]], Iterator[dict[str, Any]]]]]
        groups = [(f"probes {served}", self._probes)]
        groups += [(f"{task} {served}", self._task(task)) for task in tasks if task]
        for name, make in groups:
            if name not in self._known:
                self._known[name] = list(make(ask or _as_they_are))
            for row in self._known[name]:
                sampling = sha256_of(
                    self.recipe.sampling.model_dump() | {"max_tokens": row["max_tokens"]}
                )
                parts = [dict(self.engine), condition.key, row["prompt"], sampling, row["seed"]]
                key = sha256_of(parts)
                guard = self.filters.get(condition.mitigation)
                if guard is None:
                    yield PlannedRow(key=key, condition=condition.id, **row)
                else:
                    settings = {k: v for k, v in condition.served[1].items() if k != "guard"}
                    own = sha256_of([key, guard, settings])
                    yield PlannedRow(key=own, condition=condition.id, filtered_from=key, **row)

    def _probes(self, ask: Callable[[Turns], Turns]) -> Iterator[dict[str, Any]]:
        from fastsafe.safety.formats import formats

        recipe, known, stop = self.recipe, formats(), self.recipe.early_stop
        behaviours = self.source.behaviours(recipe.behaviours, recipe.data_seed)
        kinds: tuple[Kind, ...] = ("harmful", "benign") if recipe.benign_twins else ("harmful",)
        full = recipe.sampling.max_tokens
        short = stop.tokens if stop else full
        for system_id, system_text in recipe.system_prompts.items():
            for name in recipe.formats:
                for kind in kinds:
                    for number, behaviour in enumerate(behaviours):
                        if not behaviour.action(kind == "harmful"):
                            continue
                        text = known[name].ask(behaviour, kind == "harmful", self.source.translate)
                        system = [{"role": "system", "content": system_text}] if system_text else []
                        turns = ask([*system, {"role": "user", "content": text}])
                        row = {
                            "kind": kind,
                            "part": name,
                            "system_prompt": system_id,
                            "item": behaviour.behavior_id,
                            "sample": 0,
                            "seed": row_seed(recipe.seed, behaviour.behavior_id, name, 0),
                            "prompt": self._rendered(turns, text),
                            "max_tokens": short,
                        }
                        yield row
                        if stop and number < stop.check:
                            # the same seed: only the length may differ
                            yield row | {"sample": FULL, "max_tokens": full}

    def _task(self, task: str) -> Callable[[Callable[[Turns], Turns]], Iterator[dict[str, Any]]]:
        def rows(ask: Callable[[Turns], Turns]) -> Iterator[dict[str, Any]]:
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
                    "prompt": self._rendered(ask(turns), turns[-1]["content"]),
                    "max_tokens": recipe.sampling.max_tokens,
                    "reference": test["reference"],
                    "tests": test.get("tests"),
                }

        return rows

    def _rendered(self, turns: Turns, text: str) -> str:
        from fastsafe.safety.mixing.prompt_styles import prompt_text

        how = self.recipe.prompting
        if how == "chat":
            token_ids = tuple(self.tokenizer.encode_chat(turns))
        else:
            rendered = prompt_text(turns, "alpaca" if how == "alpaca" else "plain")
            if how == "as_published":
                rendered = rendered.removesuffix("\n")  # the raw text, and nothing after it
            token_ids = tuple(self.tokenizer.encode(rendered))
        sha256 = sha256_of([text, token_ids])
        self.prompts.setdefault(sha256, Prompt(sha256, text, token_ids))
        return sha256


def row_seed(run_seed: int, item: str, part: str, sample: int) -> int:
    """Return the sampler's seed of one row, in [0, 2**63): never a shared stream."""
    return int(sha256_of([run_seed, item, part, sample])[:16], 16) >> 1


def _as_they_are(turns: Turns) -> Turns:
    return turns


def _asking(condition: Condition) -> Callable[[Turns], Turns] | None:
    """How a condition's questions differ from the others'; None where they do not."""
    treatment = condition.treatment
    if treatment is None or treatment.stage != "serve":
        return None
    from fastsafe.safety.defences import defences

    defence = defences()[treatment.name]
    if defence.acts_on != "prompt":
        return None
    arguments = defence.arguments(treatment.params)
    return lambda turns: defence.apply(turns, **arguments)
