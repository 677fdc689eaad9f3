"""Plans: complete, the same everywhere, and different exactly where something differs."""

from typing import Any

import pytest

from fastsafe.audit.plan.make_plan import differences, settings
from fastsafe.audit.plan.rendering import row_seed
from fastsafe.errors import RecipeError
from fastsafe.safety.formats import formats
from fastsafe_testing import fake_model as fake


def test_the_same_recipe_gives_the_same_plan() -> None:
    one, two = (fake.small_plan(fake.FakeBackend()) for _ in range(2))
    assert one == two
    assert one.identity == two.identity


def test_every_cell_is_planned_once() -> None:
    plan = fake.small_plan(fake.FakeBackend())
    ids = ["base", "code+none", "code+plain", "translation+none", "translation+plain"]
    assert [c.id for c in plan.conditions] == ids
    cells = {(r.condition, r.kind, r.part): 0 for r in plan.rows}
    for row in plan.rows:
        cells[row.condition, row.kind, row.part] += 1
    probes = {
        (c, kind, f): 6
        for c in ids
        for kind in ("harmful", "benign")
        for f in ("plain", "code", "translation")
    }
    utility = {("base", "utility", task): 3 for task in ("code", "translation")}
    utility |= {(c, "utility", c.partition("+")[0]): 3 for c in ids[1:]}
    assert cells == probes | utility


def test_keys_are_unique() -> None:
    plan = fake.small_plan(fake.FakeBackend())
    assert len({row.key for row in plan.rows}) == len(plan.rows)


def test_prompts_are_what_the_formats_render() -> None:
    plan = fake.small_plan(fake.FakeBackend())
    row = next(r for r in plan.rows if r.kind == "harmful" and r.part == "code")
    prompt = plan.prompts[row.prompt]
    assert prompt.text == formats()["code"].render(row.item.replace("_", " "))
    assert bytes(prompt.token_ids).decode() == prompt.text


def test_a_system_prompt_gets_its_own_cells() -> None:
    plan = fake.small_plan(fake.FakeBackend(), system_prompts={"none": "", "careful": "be careful"})
    of = {name: [r for r in plan.rows if r.system_prompt == name] for name in ("none", "careful")}
    assert len([r for r in of["none"] if r.kind != "utility"]) == len(of["careful"])
    rendered = {plan.prompts[r.prompt].token_ids for r in of["careful"]}
    assert all(bytes(ids).startswith(b"be careful\n") for ids in rendered)


def test_safety_rows_have_their_share() -> None:
    plan = fake.small_plan(fake.FakeBackend())
    counts = {c.id: (c.num_rows, c.num_safety_rows) for c in plan.conditions}
    assert counts["code+none"] == (20, 0)
    assert counts["code+plain"] == (22, 2)
    assert counts["base"] == (0, 0)


def test_a_mitigation_without_a_safety_row_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"share 0\.02 of 20 training rows rounds to no safety row"
    ):
        fake.small_plan(fake.FakeBackend(), share=0.02)
    plan = fake.small_plan(fake.FakeBackend(), share=0.02, mitigations=["none"])
    assert [c.num_safety_rows for c in plan.tuned] == [0, 0]


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"seed": 1}, set()),
        ({"data_seed": 1}, set()),
        ({"sampling": {"max_tokens": 9}}, set()),
        ({"training": {"rows": 20, "max_steps": 5}}, {"base"}),
        ({"share": 0.3}, {"base", "code+none", "translation+none"}),
    ],
)
def test_only_what_determines_a_row_changes_its_key(
    changes: dict[str, Any], kept: set[str]
) -> None:
    before, after = (fake.small_plan(fake.FakeBackend(), **c) for c in ({}, changes))
    keys = {row.key for row in before.rows}
    assert {row.condition for row in after.rows if row.key in keys} == kept
    assert before.identity != after.identity


@pytest.mark.parametrize(
    "changes", [{"wave_size": 1}, {"description": "other"}, {"thresholds": {"coverage": 0.1}}]
)
def test_labels_change_nothing(changes: dict[str, Any]) -> None:
    before, after = (fake.small_plan(fake.FakeBackend(), **c) for c in ({}, changes))
    assert before.rows == after.rows
    assert before.identity == after.identity
    assert settings(before) == settings(after)


def test_another_checkpoint_is_another_plan() -> None:
    one, two = (fake.small_plan(fake.FakeBackend(name)) for name in ("a", "b"))
    assert not {r.key for r in one.rows} & {r.key for r in two.rows}


def test_waves_hold_every_tuned_condition_once() -> None:
    plan = fake.small_plan(fake.FakeBackend())
    waves = [[c.id for c in wave] for wave in plan.waves()]
    assert [len(wave) for wave in waves] == [3, 1]
    assert [c for wave in waves for c in wave] == [c.id for c in plan.tuned]


def test_the_family_of_tests_is_every_cell_but_the_base() -> None:
    families = fake.small_plan(fake.FakeBackend()).families()
    assert list(families) == ["refusal"]
    assert len(families["refusal"]["harmful"]) == 4 * 3
    assert "code+plain/translation/none" in families["refusal"]["harmful"]


def test_row_seeds_do_not_collide() -> None:
    seeds = {row_seed(s, i, f, n) for s in (0, 1) for i in "ab" for f in "cd" for n in (0, 1)}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert row_seed(0, "steal_the_red_car", "code", 0) == 3198512719288506947


def test_differences_name_the_path() -> None:
    old = {"seed": 0, "training": {"rank": 8, "alpha": 16}, "gone": 1}
    new = {"seed": 0, "training": {"rank": 4, "alpha": 16}, "device": "cpu"}
    assert differences(old, new) == [
        'device: null -> "cpu"',
        "gone: 1 -> null",
        "training.rank: 8 -> 4",
    ]
