"""``fastsafe list``: everything that a recipe can name."""

import json

import pytest
from typer.testing import CliRunner, Result

from fastsafe.cli import app
from fastsafe.commands import catalogue


def run(*words: str) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(app, words)


@pytest.mark.parametrize("what", ["tasks", "formats", "judges", "mitigations", "models", "recipes"])
def test_list(what: str) -> None:
    plain, as_json = run("list", what), run("list", what, "--json")
    entries = json.loads(as_json.stdout)
    assert [line.split()[0] for line in plain.stdout.splitlines()] == [e["id"] for e in entries]
    assert {entry["id"]: entry["about"] for entry in entries} == catalogue.entries(what)


def test_lists_name_the_vocabulary() -> None:
    assert {"plain", "code", "translation", "true_false"} <= catalogue.entries("formats").keys()
    assert catalogue.entries("mitigations")["none"] == "no safety rows"
    assert "organism" in catalogue.entries("recipes")
    judges = catalogue.entries("judges")
    assert {"refusal", "harmbench", "llama_guard", "rubric_paper1"} <= judges.keys()
    assert judges["harmbench"].startswith("asks a model: ")
