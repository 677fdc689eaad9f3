"""Names in a recipe: unknown ones are rejected, and mitigations are expanded once per audit."""

from pathlib import Path

import pytest

from fastsafe.audit.plan import checks
from fastsafe.audit.plan.checks import check_recipe
from fastsafe.audit.plan.mitigation_variants import expand_mitigations
from fastsafe.audit.recipe import load as recipes
from fastsafe.audit.recipe.load import load
from fastsafe.audit.run import audit
from fastsafe.errors import RecipeError
from fastsafe_testing import fake_model as fake


def test_every_shipped_recipe_passes() -> None:
    for name in recipes.names():
        recipe = load(name)
        assert [v.label for v in check_recipe(recipe)] == [
            v.label for v in expand_mitigations(recipe)
        ]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("tasks=[cod]", "recipe organism: tasks has 'cod'; did you mean code?"),
        ("formats=[plane]", "recipe organism: formats has 'plane'; did you mean plain?"),
        ("safety_formats=[plane]", "safety_formats has 'plane'; did you mean plain?"),
        ("manipulations=[autif]", "manipulations has 'autif'; did you mean autoif?"),
        ("styles=[nativ]", "styles has 'nativ'; did you mean native?"),
        ("mitigations=[plane]", "mitigations has 'plane'; did you mean plain?"),
        ("judges=[oracle]", "recipe organism: judges has 'oracle'; known: refusal"),
        (
            "judges=[llama_guard]",
            "judges has 'llama_guard'; it asks a model: write {kind: llama_guard, checkpoint: ...}",
        ),
        (
            "mitigations=[{name: wise_ft, of: {a: 1}}]",
            "mitigation wise_ft: of is {'a': 1}, expected",
        ),
        ("source=organsm", "source is 'organsm'; did you mean organism?"),
        ("data.behaviours=mine.jsonl", "rows come from source 'organism', which reads none"),
    ],
)
def test_an_unknown_name_is_one_sentence(override: str, sentence: str) -> None:
    recipe = load("organism", overrides=[override])
    with pytest.raises(RecipeError) as caught:
        check_recipe(recipe)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    # the whole audit says the same, before it looks for a checkpoint
    with pytest.raises(RecipeError) as of_audit:
        audit("organism", overrides=[override, "model=/no/such/checkpoint"])
    assert sentence.split(";")[0].removeprefix("recipe organism: ") in str(of_audit.value)


def test_mitigations_are_expanded_once_per_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def counted(recipe: object) -> object:
        nonlocal calls
        calls += 1
        return expand_mitigations(recipe)  # type: ignore[arg-type]

    monkeypatch.setattr(checks, "expand_mitigations", counted)
    fake.small_run(tmp_path / "run")
    assert calls == 1
