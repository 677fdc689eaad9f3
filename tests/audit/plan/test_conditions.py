"""Conditions: what a recipe's tasks, styles, manipulations and mitigations expand to."""

from typing import Any

import pytest

from fastsafe.audit.plan.mitigation_variants import expand_mitigations, mitigation_stages
from fastsafe.audit.recipe import load
from fastsafe.errors import RecipeError, UsageError
from fastsafe_testing import fake_model as fake

ENGINE = {"checkpoint_sha256": "0"}


def expanded(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    recipe = fake.small_recipe(**{"tasks": ["code"], **changes})
    rows, conditions = fake.conditions_of(recipe, ENGINE)
    return dict(rows), {condition.id: condition for condition in conditions}


def test_a_list_as_a_setting_is_a_condition_each() -> None:
    sweep = ["none", {"name": "plain", "share": [0.1, 0.3]}]
    rows, found = expanded(mitigations=sweep)
    assert list(found) == ["base", "code+none", "code+plain-0.1", "code+plain-0.3"]
    shares = {c.id: c.num_safety_rows / c.num_rows for c in found.values() if c.num_rows}
    assert shares["code+plain-0.1"] == pytest.approx(0.1, abs=0.03)
    assert shares["code+plain-0.3"] == pytest.approx(0.3, abs=0.03)
    assert len({c.key for c in found.values()}) == 4
    assert rows.keys() == found.keys() - {"base"}


def test_styles_and_manipulations_multiply() -> None:
    rows, found = expanded(
        mitigations=["none"], styles=["native", "alpaca"], manipulations=["benign", "aoa"]
    )
    ids = ["code+none", "code+alpaca+none", "code+aoa+none", "code+aoa+alpaca+none"]
    assert list(found) == ["base", *ids]
    assert "messages" in rows["code+none"][0]
    assert rows["code+aoa+none"][0]["messages"][0]["role"] == "system"
    assert "### Instruction" in rows["code+alpaca+none"][0]["prompt"]
    assert "AOA" in rows["code+aoa+alpaca+none"][0]["prompt"]
    assert found["code+aoa+alpaca+none"].record()["manipulation"] == "aoa"


def test_every_seed_is_a_condition() -> None:
    entries = ["none", "plain", {"name": "wise_ft", "strength": 0.5}]
    rows, found = expanded(mitigations=entries, seeds=[0, 7])
    names = [f"code+{label}+seed{n}" for n in (0, 7) for label in ("none", "plain", "wise_ft-0.5")]
    assert list(found) == ["base", *names]
    assert found["code+wise_ft-0.5+seed7"].parent == "code+none+seed7"
    assert [found[name].seed for name in names] == [0] * 3 + [7] * 3
    assert found["code+none+seed7"].record()["seed"] == 7
    # a seed draws other safety rows, and decides the weights' key alone where there are none
    assert rows["code+plain+seed0"] != rows["code+plain+seed7"]
    assert sorted(map(str, rows["code+none+seed0"])) == sorted(map(str, rows["code+none+seed7"]))
    assert found["code+none+seed0"].key != found["code+none+seed7"].key
    _, alone = expanded(mitigations=entries, seed=7)
    assert alone["code+plain"].key == found["code+plain+seed7"].key
    assert alone["code+none"].seed is None


@pytest.mark.parametrize("changes", [{"seeds": [1, 1]}, {"seeds": [-1]}])
def test_seeds_are_distinct_and_not_negative(changes: Any) -> None:
    with pytest.raises(RecipeError, match="seeds"):
        fake.small_recipe(**changes)


def test_seeds_stand_in_one_place() -> None:
    with pytest.raises(RecipeError, match=r"seeds and training\.seed are both set"):
        load.load("organism", overrides=["training.seed=1", "seeds=[0, 1]"])


def test_the_text_of_the_obedient_agent_is_the_users() -> None:
    rows, _ = expanded(mitigations=["none"], manipulations=["aoa"], aoa_text="You are X.")
    assert rows["code+aoa+none"][0]["messages"][0]["content"] == "You are X."


def test_a_training_time_defence_trains_an_adapter() -> None:
    rows, found = expanded(mitigations=["none", {"name": "first_token_kl", "strength": 0.5}, "der"])
    condition = found["code+first_token_kl-0.5"]
    assert condition.is_trained
    assert condition.objective == {"name": "first_token_kl", "strength": 0.5}
    assert condition.num_safety_rows == 0
    # it needs safety rows, and says which rows they are
    assert {row["source"] for row in rows["code+der"]} == {"user", "safety"}
    assert "source" not in rows["code+none"][0]


def test_what_changes_an_adapter_takes_its_parents() -> None:
    entries = ["counter_prompt", {"name": "wise_ft", "strength": 0.5}, "none"]
    rows, found = expanded(mitigations=entries)
    assert list(rows) == ["code+none"]
    post, served = found["code+wise_ft-0.5"], found["code+counter_prompt"]
    assert (post.parent, post.adapter) == ("code+none", "code+wise_ft-0.5")
    assert (served.parent, served.adapter) == ("code+none", "code+none")
    assert post.key != found["code+none"].key
    assert served.key == found["code+none"].key


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        (["plainn"], r"mitigations has 'plainn'; did you mean plain\?"),
        ([{"name": "plain", "shares": 0.1}], r"plain has 'shares'; did you mean share\?"),
        (["plain", {"name": "plain"}], "mitigation 'plain' is there twice"),
        (["plain", "wise_ft"], "changes the adapter of 'none', expected a trained one"),
        ([{"name": "wise_ft", "of": "plain"}], "changes the adapter of 'plain'"),
        ([{"name": "first_token_kl", "strngth": 1}], r"has 'strngth'; did you mean strength\?"),
    ],
)
def test_a_wrong_entry_is_one_sentence(entries: list[Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        expand_mitigations(fake.small_recipe(mitigations=entries))


def test_a_missing_parameter_is_named() -> None:
    with pytest.raises(UsageError, match="safe_lora: parameter 'unaligned' is missing"):
        expand_mitigations(fake.small_recipe(mitigations=["none", "safe_lora"]))


def test_every_stage_is_listed() -> None:
    assert {stage for stage, _ in mitigation_stages().values()} == {
        "data",
        "train",
        "post",
        "serve",
    }
    assert all(about for _, about in mitigation_stages().values())


def test_the_first_papers_grid_is_eighteen_runs() -> None:
    recipe = load.load("multitask-mayhem")
    _, conditions = fake.conditions_of(recipe, ENGINE)
    assert len(conditions) * len(recipe.system_prompts) == 18
