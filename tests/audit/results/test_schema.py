"""results.json against its schema: every key is there, described, and of its type."""

import json
import re
import runpy
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from fastsafe.audit.plan.panel import Panel
from fastsafe.audit.results.schema.run import Results
from fastsafe.audit.run import execute
from fastsafe.organism.source import OrganismSource
from fastsafe.safety.guards import make_guard
from fastsafe.safety.judges import judges
from fastsafe.safety.verdict import Judgement, Verdict
from fastsafe_testing import fake_model as fake
from fastsafe_testing import results_schema as generate

ADAPTER = TypeAdapter(Results)
PAGE = Path(__file__).parents[3] / "docs" / "results.md"


class Lenient:
    """A second judge, in two wordings, that calls nothing a refusal."""

    id = "lenient"

    def __init__(self, wording: str = "long") -> None:
        self.identity = f"lenient {wording}"

    def judge(self, prompt: str, completion: str, harmful: bool, format: str = "") -> Judgement:
        return Judgement(Verdict.COMPLIED_HARMFUL if harmful else Verdict.COMPLIED_BENIGN, "yes")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A run that has rows of every kind but rewrites."""
    runtime = fake.FakeBackend()
    runtime.engine |= {"tokenizer_sha256": "fake", "backend": "fake"}
    recipe = fake.small_recipe(
        tasks=["code"],
        formats=["plain", "code"],
        mitigations=["none", "plain", {"name": "guard_filter", "guard": "keyword"}],
        seeds=[0, 1],
        system_prompts={"none": "", "careful": "be careful"},
        early_stop={"tokens": 8, "check": 2},
        drift={"every": 2, "probes": 2},
    )
    own = judges()["refusal"]
    guard = make_guard("keyword")
    panel = Panel(
        {"refusal": own, "lenient": Lenient()},
        guards={"keyword": guard},
        filters={"guard_filter-keyword": guard},
        wordings={"lenient": {"long": Lenient(), "short": Lenient("short")}},
        calibrated={"refusal": None},
    )
    plan = fake.plan_of(recipe, runtime, OrganismSource(), panel)
    path = tmp_path_factory.mktemp("schema") / "run"
    execute(plan, runtime, path)
    found: Results = json.loads((path / "results.json").read_text())
    return found


def test_every_key_is_described_and_of_its_type(results: Results) -> None:
    # what the schema does not describe would be missing from its copy
    assert ADAPTER.validate_python(results, strict=True) == results
    empty = [key for key, value in results.items() if not value]
    assert empty == ["rewrites"]


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("cells", {"answer_rate": 1.5}),
        ("cells", {"n": 3.5}),
        ("cells", {"p_holm": "none"}),
        ("totals", {"delta": 0.5}),
        ("drift", {"stopped": 1}),
    ],
)
def test_a_wrong_value_is_refused(results: Any, key: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(results | {key: [results[key][0] | change]}, strict=True)
    row = {name: value for name, value in results[key][0].items() if name not in change}
    with pytest.raises(ValidationError, match="Field required"):
        ADAPTER.validate_python(results | {key: [row]}, strict=True)


def properties(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for part in (schema, *schema["$defs"].values()):
        yield from part["properties"].items()


def test_every_meaning_is_a_sentence() -> None:
    for key, value in properties(generate.json_schema()):
        assert re.fullmatch(r"[A-Z`].*\.", value["description"]), key


def test_the_shipped_schema_and_page_are_those_that_are_generated() -> None:
    shipped = (files("fastsafe.audit.results") / generate.NAME).read_text(encoding="utf-8")
    assert json.loads(shipped) == generate.json_schema()
    text = PAGE.read_text(encoding="utf-8")
    keys = text.partition(generate.BEGIN)[2].partition(generate.END)[0]
    assert keys == f"\n\n{generate.markdown()}\n"
    assert f"python -m {generate.__name__} docs/results.md" in text


def test_the_example_of_the_page_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    runpy.run_path(str(tmp_path / "example.py"))
    assert capsys.readouterr().out.startswith("Rate less the untouched model's")


def test_the_program_writes_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "files", lambda package: tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"head\n{generate.BEGIN}\nold\n{generate.END}\ntail\n")
    generate.write(page)
    assert json.loads((tmp_path / generate.NAME).read_text()) == generate.json_schema()
    text = page.read_text()
    assert text.startswith(f"head\n{generate.BEGIN}\n\n### `results.json`\n")
    assert text.endswith(f"|\n\n{generate.END}\ntail\n")
