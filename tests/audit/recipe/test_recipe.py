"""Recipes: what is refused, with which sentence, and what overrides do."""

from pathlib import Path
from typing import Any

import pytest

from fastsafe.audit.recipe import load as recipes
from fastsafe.audit.recipe.load import load
from fastsafe.errors import RecipeError


def test_the_organism_recipe_is_what_it_promises() -> None:
    recipe = load("organism")
    assert recipe.tasks == ("summarization", "code", "translation", "classification")
    assert recipe.mitigations == ("none", "plain", "task_styled", "multi_task")
    assert recipe.formats == ("plain", "summarization", "code", "translation", "classification")
    assert recipe.behaviours >= 100
    assert recipe.share == 0.10
    assert (recipe.training.rank, recipe.training.alpha) == (8, 16)
    assert (recipe.training.learning_rate, recipe.training.max_steps) == (2e-3, 100)
    assert (recipe.training.batch_size, len(recipe.training.target_modules)) == (16, 7)
    assert recipe.sampling.temperature == 0
    assert recipe.benign_twins


def test_every_shipped_recipe_checks() -> None:
    assert "organism" in recipes.names()
    for name in recipes.names():
        assert load(name).name == name


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "training.lerning_rate=1",
            "recipe organism: 'lerning_rate' is not a key of training; did you mean learning_rate?",
        ),
        (
            "behaviors=3",
            "recipe organism: 'behaviors' is not a key of the recipe; did you mean behaviours?",
        ),
        ("training.rank=0", "training.rank is 0, expected at least 1"),
        ("share=1.5", "share is 1.5, expected below 1"),
        ("formats=[plain, plain]", "names must not repeat"),
        ("training=7", "training is 7, expected a mapping"),
        ("seed=.nan", "seed is nan, expected a finite number"),
        ("training.rank.deep=1", "--set: training.rank.deep goes into 'rank'"),
        ("judges=[]", "judges is empty, expected at least 1"),
        ("behaviours=many", "behaviours is 'many', expected a valid integer"),
        ("behaviours=1.5", "behaviours is 1.5, expected a valid integer"),
        ("benign_twins=perhaps", "benign_twins is 'perhaps', expected true or false"),
        ("model=[a]", "model is ['a'], expected a valid string"),
        ("name=a/b", "name is 'a/b', expected a text like "),
        ("tasks=[[code]]", "tasks.0 is ['code'], expected a valid string"),
        ("tasks={a: 1}", "tasks is {'a': 1}, expected a valid string"),
        ("judges=3", "judges is 3, expected a valid string or a mapping"),
        ("mitigations=[{share: 1}]", "mitigations.0.name is missing, expected a value"),
        (
            "training.schedule=cosin",
            "training.schedule is 'cosin', expected 'constant', 'linear' or 'cosine'; "
            "did you mean cosine?",
        ),
        ("seed=" + "9" * 5000, "--set: seed has a value that is not YAML: '9999"),
        ("seed=0x" + "f" * 9999, "seed is an integer of 39996 bits, expected "),
        ("training.alpha=1" + "0" * 400, "training.alpha is "),
        ("training.alpha=1e999", "training.alpha is '1e999', expected a finite number"),
        ("seed=2024-13-45", "seed is '2024-13-45', expected a valid integer"),
        ("seed=!!bool x", "--set: seed has a value that is not YAML: '!!bool x'"),
        ("seed=!!int ''", "--set: seed has a value that is not YAML: "),
        ("sampling={temperature: 1, temperature: 0}", "key 'temperature' is written twice"),
        ("model=a\0", "--set: model has a value that is not YAML: 'a\\x00'"),
        ("nothing", "--set: 'nothing' is not of the form a.b=value"),
        ("=1", "--set: '=1' is not of the form a.b=value"),
        ("seed=[1", "--set: seed has a value that is not YAML: '[1'"),
    ],
)
def test_a_wrong_setting_is_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load("organism", overrides=[override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_in_4_bits_are_not_trained_whole() -> None:
    with pytest.raises(RecipeError, match="quantize is 'nf4', whose weights cannot be trained"):
        load("organism", overrides=["quantize=nf4", "training.method=full"])


def test_the_misspelt_key_is_named_before_the_missing_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntask: [code]\nformats: [plain]\n")
    with pytest.raises(RecipeError, match=r"'task' is not a key .* did you mean tasks\?.*1 more"):
        load(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a\n", "holds a list, expected a mapping"),
        ("a: [1\n", "is not valid YAML"),
        ("name: a\nname: b\n", "key 'name' is written twice"),
        ("name: !!python/object/apply:os.system [id]\n", "is not valid YAML"),
        ("", "holds nothing, expected a mapping"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("tasks=code", "tasks", ("code",)),
        ("tasks=code, translation", "tasks", ("code", "translation")),
        ("tasks=[code]", "tasks", ("code",)),
        ("seeds=0,1", "seeds", (0, 1)),
        ("seeds=7", "seeds", (7,)),
        ("mitigations=none", "mitigations", ("none",)),
        ("judges={kind: a}", "judges", ({"kind": "a"},)),
        ("guards=keyword", "guards", ("keyword",)),
        ("safety_formats=null", "safety_formats", None),
    ],
)
def test_one_value_is_a_list_of_one(override: str, key: str, expected: Any) -> None:
    assert getattr(load("organism", overrides=[override]), key) == expected


@pytest.mark.parametrize("name", ["organsim", "nothing.yaml", "no/such/recipe"])
def test_a_missing_recipe_is_named(name: str) -> None:
    with pytest.raises(RecipeError, match=name):
        load(name)


def test_a_missing_recipe_has_a_nearest_match() -> None:
    with pytest.raises(RecipeError, match=r"did you mean organism\?"):
        load("organsim")


@pytest.mark.parametrize(
    ("overrides", "changes", "expected"),
    [
        (["training.rank=4"], {}, ("training.rank", 4)),
        (["training.learning_rate=1e-3"], {}, ("training.learning_rate", 1e-3)),
        (["mitigations=[none]"], {}, ("mitigations", ("none",))),
        (["seed=1", "seed=2"], {}, ("seed", 2)),
        (["seed=1"], {"seed": 3}, ("seed", 3)),
        (["seed=1"], {"seed": None}, ("seed", 1)),
        ([], {"model": "some/path"}, ("model", "some/path")),
        (
            ["system_prompts={none: '', careful: 'be careful'}"],
            {},
            ("system_prompts.careful", "be careful"),
        ),
    ],
)
def test_overrides_are_read_as_yaml(
    overrides: list[str], changes: dict[str, Any], expected: tuple[str, Any]
) -> None:
    value: Any = load("organism", overrides=overrides, changes=changes).model_dump()
    for key in expected[0].split("."):
        value = value[key]
    assert value == expected[1]


def test_limit_only_lowers() -> None:
    recipe = load("organism")
    assert recipe.limited(None) == recipe
    assert (recipe.limited(7).behaviours, recipe.limited(7).utility_rows) == (7, 7)
    assert recipe.limited(10_000) == recipe
    with pytest.raises(RecipeError, match="limit"):
        recipe.limited(0)


def test_a_recipe_can_be_revised() -> None:
    recipe = load("organism")
    assert load(recipe) == recipe
    changed = load(recipe, overrides=["training.rank=4"], changes={"seed": 7, "model": None})
    assert (changed.training.rank, changed.seed, changed.model) == (4, 7, recipe.model)
    with pytest.raises(RecipeError, match=r"recipe organism: 'sed' is not a key .* seed\?"):
        load(recipe, overrides=["sed=1"])


RECIPE = """
name: mine
model: base
tasks: [code, boolq, gsm8k]
formats: [plain]
data:
  behaviours: behaviours.csv
  safety: /absolute/safety.jsonl
  translations: ~/pairs.csv
  tasks: {code: rows/code.csv, boolq: owner/name, gsm8k: gsm8k.jsonl}
judges:
  - refusal
  - {kind: harmbench, checkpoint: judge, template: texts/own.txt}
  - {kind: llama_guard, checkpoint: {path: judge, dtype: bfloat16}}
guards: [keyword, {kind: llama_guard, checkpoint: owner/judge}]
mitigations: [none, {name: resta, unaligned: [base, owner/base]}]
"""


def test_paths_in_a_file_are_relative_to_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "recipes"
    for name in ("rows", "base", "judge", "organism"):
        (folder / name).mkdir(parents=True)
    (folder / "rows" / "code.csv").touch()
    (folder / "mine.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    recipe = load("recipes/mine.yaml", overrides=["data.tasks.boolq=rows/code.csv"])
    assert recipe.model == "recipes/base"
    assert recipe.data.behaviours == "recipes/behaviours.csv"
    assert recipe.data.safety == "/absolute/safety.jsonl"
    assert recipe.data.translations == "~/pairs.csv"
    assert recipe.data.tasks["code"] == "recipes/rows/code.csv"
    assert recipe.data.tasks["boolq"] == "rows/code.csv"  # of --set: relative to the shell's folder
    assert recipe.data.tasks["gsm8k"] == "recipes/gsm8k.jsonl"
    _, harmbench, llama_guard = recipe.judges
    assert harmbench["checkpoint"] == "recipes/judge"  # type: ignore[index]
    assert harmbench["template"] == "recipes/texts/own.txt"  # type: ignore[index]
    assert llama_guard["checkpoint"]["path"] == "recipes/judge"  # type: ignore[index]
    assert recipe.guards[1]["checkpoint"] == "owner/judge"  # type: ignore[index]
    assert recipe.mitigations[1].settings["unaligned"] == ["recipes/base", "owner/base"]  # type: ignore[union-attr]
    assert load("recipes/mine.yaml", overrides=["model=organism"]).model == "organism"
    monkeypatch.chdir(folder)
    assert load("mine.yaml").data.tasks["code"] == "rows/code.csv"
    assert load("mine.yaml").model == "base"


def test_the_model_of_a_rewriter_is_relative_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "rewriter.yaml").write_text("checkpoint: base\n")
    rewriter = recipes.read_rewriter(str(tmp_path / "rewriter.yaml"))
    assert rewriter.checkpoint == str(tmp_path / "base")
