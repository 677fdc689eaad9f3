"""A model words training rows: all at once, never twice, checked, counted."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fastsafe.audit.plan.conditions import ConditionInputs, make_conditions
from fastsafe.audit.plan.make_plan import placeholder_rewrite, reword_rows
from fastsafe.audit.plan.mitigation_variants import expand_mitigations
from fastsafe.audit.plan.panel import Panel, make_rewriter
from fastsafe.audit.recipe.load import load
from fastsafe.audit.recipe.schema import Recipe
from fastsafe.audit.report import table_text
from fastsafe.audit.run import Run, execute
from fastsafe.audit.store.sqlite_store import NAME, Store
from fastsafe.data.conversation import Message
from fastsafe.errors import CheckpointError, DataError, RecipeError
from fastsafe.organism.source import OrganismSource
from fastsafe.progress import Progress
from fastsafe.safety.completers.protocol import Ask, Reply
from fastsafe.safety.judges import judges
from fastsafe.safety.mixing.rewriter import Rewriter
from fastsafe_testing import fake_model as fake

SMALL: dict[str, Any] = {
    "tasks": ["boolq"],
    "manipulations": ["benign", "autoif"],
    "mitigations": ["none", "paraphrase"],
    "formats": ["plain"],
    "behaviours": 3,
    "rewrite": {"checkpoint": "unused"},
}
TURNS: list[Message] = [{"role": "user", "content": json.dumps({"draft": "paint"})}]


class Scripted:
    """Writes well, but for requests whose hash ends in a low digit; counts what it is asked."""

    def __init__(self, identity: str = "scripted", finish: Any = "stop") -> None:
        self.identity = identity
        self.finish = finish
        self.asked: list[Ask] = []

    def complete(self, asks: Sequence[Ask]) -> list[Reply]:
        self.asked += asks
        return [Reply(key=ask.key, text=self._text(ask), finish=self.finish) for ask in asks]

    def _text(self, ask: Ask) -> str:
        shown = json.loads(ask.messages[-1]["content"])
        given = shown.get("input") or shown["draft"]
        if hashlib.sha256(given.encode()).digest()[0] < 64:
            return "Certainly! I am a poor writer."
        if "draft" in shown:
            return f"{given} Be kind."
        return json.dumps({"prompt": f"Please do: {given}", "answer": f"Sure. {shown['answer']}"})


def writer(model: Scripted, folder: Path | None = None) -> Rewriter:
    return Rewriter(lambda: model, max_tokens=64, folder=folder)


def recipe_of(**changes: Any) -> Recipe:
    found: Recipe = fake.small_recipe(**{**SMALL, **changes})
    return found


def run_of(out: Path, model: Scripted) -> Run:
    runtime = fake.FakeBackend()
    panel = Panel({"refusal": judges()["refusal"]}, rewriter=writer(model, out / "judges"))
    recipe = recipe_of()
    plan = fake.plan_of(recipe, runtime, panel=panel)
    return execute(plan, runtime, out)


def test_rows_take_the_models_words_and_are_counted(tmp_path: Path) -> None:
    model = Scripted()
    done = run_of(tmp_path / "run", model)
    found = {row["condition"]: row for row in done.results["rewrites"]}
    # 20 rows under AutoIF; 2 of 22 are safety's, paraphrased
    counts = {name: row["n"] for name, row in found.items()}
    assert counts == {"boolq+paraphrase": 2, "boolq+autoif+none": 20, "boolq+autoif+paraphrase": 22}
    for row in found.values():
        assert row["by_model"] + sum(row["flaws"].values()) == row["n"]
    flaws = found["boolq+autoif+none"]["flaws"]
    assert set(flaws) == {"the reply is not JSON with the texts 'prompt' and 'answer' alone"}
    assert 0 < found["boolq+autoif+none"]["by_model"] < 20
    assert len({ask.key for ask in model.asked}) == len(model.asked)
    assert "A model rewrote" in table_text(done.results)


def test_what_trains_is_what_passed() -> None:
    runtime = fake.FakeBackend()
    panel = Panel({"refusal": judges()["refusal"]}, rewriter=writer(Scripted()))
    plan = fake.plan_of(recipe_of(), runtime, panel=panel)
    planned = {c.id: c.key for c in plan.conditions}
    worded, counts = reword_rows(plan, Progress())
    assert {c.id: c.key for c in worded.conditions} == planned
    prompts = [row["messages"][0]["content"] for row in worded.training_rows["boolq+autoif+none"]]
    by_model = next(row for row in counts if row["condition"] == "boolq+autoif+none")["by_model"]
    assert sum(text.startswith("Please do: ") for text in prompts) == by_model
    kept = [row["messages"][0]["content"] for row in plan.training_rows["boolq+autoif+none"]]
    pairs = zip(kept, prompts, strict=True)
    assert all(new == old or new.startswith("Please do: ") for old, new in pairs)
    assert worded.training_rows["boolq+none"] == plan.training_rows["boolq+none"]


def test_a_run_that_goes_on_asks_for_nothing_twice(tmp_path: Path) -> None:
    run_of(tmp_path / "run", Scripted())
    again = Scripted()
    run_of(tmp_path / "run", again)
    assert again.asked == []


def test_who_words_decides_the_key_of_what_it_words() -> None:
    def keys(identity: str) -> dict[str, str]:
        recipe = recipe_of()
        inputs = ConditionInputs(
            recipe, expand_mitigations(recipe), OrganismSource(), {}, rewriter=identity
        )
        _, found = make_conditions(inputs, placeholder_rewrite)
        return {c.id: c.key for c in found}

    one, other = keys("a"), keys("b")
    changed = {name for name in one if one[name] != other[name]}
    assert changed == {"boolq+paraphrase", "boolq+autoif+none", "boolq+autoif+paraphrase"}


def test_a_cut_or_declined_reply_keeps_the_template() -> None:
    for finish in ("length", "refused"):
        model = Scripted(finish=finish)
        assert writer(model).apply(lambda rewrite: rewrite(TURNS)) is None
        assert len(model.asked) == 1


def test_a_model_that_answers_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="rewrite: the model answered none of 1 rows: Certainly"):
        writer(Scripted(finish="error")).apply(lambda rewrite: rewrite(TURNS))


@pytest.mark.parametrize(
    ("rewrite", "sentence"),
    [
        ({}, "expected one of checkpoint and endpoint"),
        ({"checkpoint": "x", "endpoint": {"url": "http://x", "model": "m"}}, "expected one of"),
        ({"checkpoint": "x", "max_token": 1}, "'max_token' is not a key of rewrite"),
        ({"checkpoint": "x", "max_tokens": 0}, "rewrite.max_tokens is 0"),
    ],
)
def test_a_wrong_section_is_one_sentence(rewrite: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        recipe_of(rewrite=rewrite)


def test_the_model_is_checked_before_anything_is_done() -> None:
    with pytest.raises(CheckpointError):
        fake.panel_of(recipe_of(rewrite={"checkpoint": "/nowhere/at/all"}))
    wrong = {"endpoint": {"url": "http://x", "model": "m", "modle": 1}}
    with pytest.raises(RecipeError, match="rewrite: endpoint has no key 'modle'"):
        fake.panel_of(recipe_of(rewrite=wrong))
    keyed = {"endpoint": {"url": "http://x", "model": "m", "api_key_env": "NONE"}}
    with pytest.raises(RecipeError, match="rewrite: NONE holds no key"):
        fake.panel_of(recipe_of(rewrite=keyed))
    one = load("organism", changes={"rewrite": {"checkpoint": "organism"}}).rewrite
    assert one is not None
    assert make_rewriter(one).identity == make_rewriter(one).identity


def test_a_model_with_nothing_to_word_is_refused() -> None:
    runtime = fake.FakeBackend()
    panel = Panel({"refusal": judges()["refusal"]}, rewriter=writer(Scripted()))
    recipe = recipe_of(manipulations=["benign"], mitigations=["none"])
    with pytest.raises(RecipeError, match="rewrite names a model, and no condition"):
        fake.plan_of(recipe, runtime, panel=panel)


def test_the_store_keeps_the_counts(tmp_path: Path) -> None:
    done = run_of(tmp_path / "run", Scripted())
    with closing(Store(done.path / NAME, read_only=True)) as store:
        assert store.meta("rewrites") == done.results["rewrites"]
